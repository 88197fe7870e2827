/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* A wire that loses what a pod sends: behind the programs of the pod's interface, before the host's end. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* The flags of a TCP packet without options or extensions of IP; -1: none. */
static __always_inline int flags(struct __sk_buff *skb)
{
        __u8 protocol, found;
        __u32 ip6 = skb->protocol == bpf_htons(ETH_P_IPV6);
        if (bpf_skb_load_bytes(skb, ETH_HLEN + (ip6 ? 6 : 9), &protocol, 1) < 0 || protocol != IPPROTO_TCP ||
            bpf_skb_load_bytes(skb, ETH_HLEN + (ip6 ? 40 : 20) + 13, &found, 1) < 0)
                return -1;
        return found;
}

SEC("tc/tcp")
int tcp(struct __sk_buff *skb)
{
        return flags(skb) >= 0 ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

SEC("tc/all_but_syn")
int all_but_syn(struct __sk_buff *skb)
{
        int found = flags(skb);
        return found >= 0 && !(found & 2) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}
