/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Which vouched flows are open: an iterator over the storage of a pod's sockets (`fates`), in an object of its own
 * because it needs the kernel's BTF. One program for all pods of the node; whoever asks names the map. It writes a
 * struct vouch_flow for each end that the pod has.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"

#define AF_INET 2
#define TCP_CLOSE 7

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* The kernel's own types, as far as they are read here; CO-RE finds the offsets. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct in6_addr {
        union {
                __u8 u6_addr8[16];
        } in6_u;
};
struct sock_common {
        __be32 skc_daddr, skc_rcv_saddr;
        __be16 skc_dport;
        __u16 skc_num;
        unsigned short skc_family;
        volatile unsigned char skc_state;
        struct in6_addr skc_v6_daddr, skc_v6_rcv_saddr;
};
struct sock {
        struct sock_common __sk_common;
};
struct seq_file {
        int dummy;
};
struct bpf_map {
        int dummy;
};
struct bpf_iter_meta {
        struct seq_file *seq;
        __u64 session_id, seq_num;
};
struct bpf_iter__bpf_sk_storage_map {
        struct bpf_iter_meta *meta;
        struct bpf_map *map;
        struct sock *sk;
        void *value;
};
#pragma clang attribute pop

static __always_inline void mapped(__u8 *to, __u32 ip4)
{
        __builtin_memset(to, 0, 10);
        to[10] = to[11] = 0xff;
        __builtin_memcpy(to + 12, &ip4, 4);
}

SEC("iter/bpf_sk_storage_map")
int flows(struct bpf_iter__bpf_sk_storage_map *ctx)
{
        struct sock *sk = ctx->sk;
        struct capture_fated *fated = ctx->value;
        struct vouch_flow flow = {};
        /* One that has ended keeps its storage as long as the application keeps its descriptor. */
        if (!sk || !fated || fated->fate != FATE_VOUCHED || sk->__sk_common.skc_state == TCP_CLOSE)
                return 0;
        if (sk->__sk_common.skc_family == AF_INET) {
                mapped(flow.local, sk->__sk_common.skc_rcv_saddr);
                mapped(flow.remote, sk->__sk_common.skc_daddr);
        } else {
                bpf_probe_read_kernel(flow.local, 16, &sk->__sk_common.skc_v6_rcv_saddr);
                bpf_probe_read_kernel(flow.remote, 16, &sk->__sk_common.skc_v6_daddr);
        }
        flow.local_port = sk->__sk_common.skc_num;
        flow.remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
        flow.slot = fated->slot;
        flow.generation = fated->generation;
        flow.opened = fated->opened;
        flow.bytes = fated->bytes;
        flow.since = fated->since;
        flow.cookie = bpf_get_socket_cookie(sk);
        bpf_seq_write(ctx->meta->seq, &flow, sizeof(flow));
        return 0;
}
