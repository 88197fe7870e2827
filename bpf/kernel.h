/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The kernel's own types, as far as the iterators read them; CO-RE finds the offsets. For programs that need the
 * kernel's BTF.
 */
#ifndef SIDESTEP_KERNEL_H
#define SIDESTEP_KERNEL_H

#include <linux/types.h>

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
struct inet_connection_sock {
        int dummy;
};
struct tcp_sock {
        __u32 snd_una, snd_nxt, rcv_nxt;
        __u64 bytes_received;
};
struct tcp_request_sock {
        __u64 snt_synack;
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
struct bpf_iter__tcp {
        struct bpf_iter_meta *meta;
        struct sock_common *sk_common;
        __u32 uid;
};
struct bpf_iter__bpf_sk_storage_map {
        struct bpf_iter_meta *meta;
        struct bpf_map *map;
        struct sock *sk;
        void *value;
};
#pragma clang attribute pop

#endif
