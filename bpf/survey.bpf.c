/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * Which TCP sockets a network namespace has: iterators over all of them, in an object of their own because they need
 * the kernel's BTF.
 *
 * `adopt` gives those that were accepted from a vouched client and have sent nothing yet their fate, so that their SYN
 * need not be remembered longer. `note` gives each socket that has no fate and is not the engine's the fate NOTED
 * (bpf/capture.bpf.c asks at its next packet whether the engine holds the other end); `claim` gives them the fate
 * CAPTURED; `survey` only looks. All write a struct capture_seen for each socket.
 *
 * `carry` is for another layout of the pins: what the map of fates says that whoever asks names, `fates` says too.
 */
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <stdbool.h>
#include "kernel.h"
#include "maps.h"
#include "shared.h"

#define AF_INET 2
#define TCP_SYN_SENT 2
#define TCP_TIME_WAIT 6
#define TCP_CLOSE 7
#define TCP_LISTEN 10
#define TCP_NEW_SYN_RECV 12

char LICENSE[] SEC("license") = "Dual MIT/GPL";

struct map_of_engine_sk engine_sk SEC(".maps");

struct map_of_fates fates SEC(".maps");

struct map_of_probes probes SEC(".maps");

struct map_of_pending pending SEC(".maps");

/* Accepted from the kubelet or from a vouched client, and has sent nothing yet: capture.bpf.c, accepted. */
static __always_inline bool accepted(struct capture_seen *seen, struct tcp_sock *tcp, struct capture_fated *now)
{
        struct capture_tuple t = {.local_port = seen->local_port, .remote_port = seen->remote_port};
        __builtin_memcpy(t.local, seen->local, 16);
        __builtin_memcpy(t.remote, seen->remote, 16);
        struct capture_probe *probe = bpf_map_lookup_elem(&probes, &t), *vouch = bpf_map_lookup_elem(&pending, &t);
        /* A FIN counts one more; who has sent nothing has not acknowledged one. */
        __u32 began = tcp->rcv_nxt - (__u32)tcp->bytes_received;
        if (probe && bpf_ktime_get_ns() - probe->when < KUBELET_REPLY_NS && began == probe->isn + 1) {
                now->fate = FATE_PROBE;
                return true;
        }
        if (vouch && began == vouch->isn + 1) {
                now->fate = FATE_VOUCHED;
                now->slot = vouch->slot;
                now->generation = vouch->generation;
                now->next = tcp->snd_nxt;
                now->since = vouch->when;
                bpf_map_delete_elem(&pending, &t);
                return true;
        }
        return false;
}

/* fate 0: none is given but to those that were accepted. */
static __always_inline int look(struct bpf_iter__tcp *ctx, __u32 fate, bool adopts)
{
        struct sock_common *sk = ctx->sk_common;
        struct capture_seen seen = {.kind = KIND_OTHER};
        if (!sk)
                return 0;
        seen.state = sk->skc_state;
        if (seen.state == TCP_LISTEN || seen.state == TCP_TIME_WAIT || seen.state == TCP_CLOSE)
                return 0;
        if (sk->skc_family == AF_INET) {
                mapped(seen.local, sk->skc_rcv_saddr);
                mapped(seen.remote, sk->skc_daddr);
        } else {
                bpf_probe_read_kernel(seen.local, 16, &sk->skc_v6_rcv_saddr);
                bpf_probe_read_kernel(seen.remote, 16, &sk->skc_v6_daddr);
        }
        seen.local_port = sk->skc_num;
        seen.remote_port = bpf_ntohs(sk->skc_dport);
        if (seen.state == TCP_NEW_SYN_RECV) {
                struct tcp_request_sock *request = bpf_skc_to_tcp_request_sock(sk);
                if (!request)
                        return 0;
                seen.kind = KIND_REQUEST;
                seen.synack_us = request->snt_synack;
        } else {
                struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
                if (!tcp)
                        return 0;
                __u32 *engine = bpf_sk_storage_get(&engine_sk, tcp, 0, 0);
                if (engine) {
                        seen.kind = KIND_ENGINE;
                } else {
                        struct capture_fated *fated = bpf_sk_storage_get(&fates, tcp, 0, 0);
                        struct capture_fated noted = {.fate = fate};
                        if (!fated && seen.state == TCP_SYN_SENT)
                                noted.isn = tcp->snd_una;
                        if (!fated && adopts)
                                accepted(&seen, tcp, &noted);
                        if (!fated && noted.fate) {
                                fated = bpf_sk_storage_get(&fates, tcp, &noted, BPF_SK_STORAGE_GET_F_CREATE);
                        }
                        if (fated && fated->fate != FATE_CAPTURED && fated->fate != FATE_PROBE &&
                            fated->fate != FATE_VOUCHED)
                                seen.kind = KIND_OLD;
                }
        }
        bpf_seq_write(ctx->meta->seq, &seen, sizeof(seen));
        return 0;
}

SEC("iter/tcp")
int note(struct bpf_iter__tcp *ctx)
{
        return look(ctx, FATE_NOTED, true);
}

SEC("iter/tcp")
int claim(struct bpf_iter__tcp *ctx)
{
        return look(ctx, FATE_CAPTURED, true);
}

SEC("iter/tcp")
int survey(struct bpf_iter__tcp *ctx)
{
        return look(ctx, 0, false);
}

SEC("iter/tcp")
int adopt(struct bpf_iter__tcp *ctx)
{
        return look(ctx, 0, true);
}

/* A fate as layout v1 has it. */
struct former_fated {
        __u32 fate, isn;
};

SEC("iter/bpf_sk_storage_map")
int carry(struct bpf_iter__bpf_sk_storage_map *ctx)
{
        struct sock *sk = ctx->sk;
        struct former_fated *was = ctx->value;
        struct capture_fated now = {};
        if (!sk || !was)
                return 0;
        now.fate = was->fate;
        now.isn = was->isn;
        bpf_sk_storage_get(&fates, sk, &now, BPF_SK_STORAGE_GET_F_CREATE);
        return 0;
}
