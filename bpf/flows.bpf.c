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
#include "kernel.h"
#include "maps.h"
#include "shared.h"

#define AF_INET 2
#define TCP_CLOSE 7

char LICENSE[] SEC("license") = "Dual MIT/GPL";

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
        flow.received = fated->by_door ? 0 : fated->received;
        flow.since = fated->since;
        flow.cookie = bpf_get_socket_cookie(sk);
        bpf_seq_write(ctx->meta->seq, &flow, sizeof(flow));
        return 0;
}
