/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The program in the kubelet's cgroup2 directory: notes the SYNs of its probes.
 *
 * Whose socket sends a packet can be seen only where the socket is: between namespaces it is lost, and source address
 * and port are anybody's to forge. So each SYN is noted here, on its way out, with its initial sequence number; in the
 * pod, `in_eth` (capture.bpf.c) takes the note. Only sockets that were made in the directory itself count, not those of
 * directories below it, and only ports that the agent wrote into `probe_ports`. Any doubt means no note, and the probe
 * is then clear text like any other. Nothing is ever dropped here.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"
#include "shared.h"

#define PASS 1

char LICENSE[] SEC("license") = "Dual MIT/GPL";

const volatile __u64 kubelet_cgroup = 0; /* id of the directory */

struct {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(map_flags, BPF_F_NO_PREALLOC);
        __uint(max_entries, KUBELET_MAX_PORTS);
        __type(key, struct kubelet_port);
        __type(value, __u8);
} probe_ports SEC(".maps");

struct map_of_probe_notes probe_notes SEC(".maps");

struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, KUBELET_MAX);
        __type(key, __u32);
        __type(value, __u64);
} kubelet_counters SEC(".maps");

static __always_inline void count(__u32 what)
{
        __u64 *n = bpf_map_lookup_elem(&kubelet_counters, &what);
        if (n)
                (*n)++;
}

SEC("cgroup_skb/egress")
int probe_syn(struct __sk_buff *skb)
{
        void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
        struct capture_tuple t = {};
        struct tcphdr *tcp;
        if (skb->protocol == bpf_htons(ETH_P_IP)) {
                struct iphdr *ip = data;
                if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_TCP || ip->ihl != 5)
                        return PASS;
                tcp = (void *)(ip + 1);
                if ((void *)(tcp + 1) > end || !tcp->syn || tcp->ack)
                        return PASS;
                mapped(t.local, ip->daddr);
                mapped(t.remote, ip->saddr);
        } else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
                struct ipv6hdr *ip = data;
                if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_TCP)
                        return PASS;
                tcp = (void *)(ip + 1);
                if ((void *)(tcp + 1) > end || !tcp->syn || tcp->ack)
                        return PASS;
                __builtin_memcpy(t.local, &ip->daddr, 16);
                __builtin_memcpy(t.remote, &ip->saddr, 16);
        } else {
                return PASS;
        }
        if (bpf_skb_cgroup_id(skb) != kubelet_cgroup)
                return PASS;
        t.local_port = bpf_ntohs(tcp->dest);
        t.remote_port = bpf_ntohs(tcp->source);
        struct kubelet_port port = {.port = t.local_port};
        __builtin_memcpy(port.ip, t.local, 16);
        if (!bpf_map_lookup_elem(&probe_ports, &port)) {
                port.port = 0;
                if (bpf_map_lookup_elem(&probe_ports, &port))
                        count(KUBELET_REFUSED);
                return PASS;
        }
        struct capture_probe note = {.isn = bpf_ntohl(tcp->seq), .when = bpf_ktime_get_ns()};
        count(bpf_map_update_elem(&probe_notes, &t, &note, BPF_ANY) ? KUBELET_FULL : KUBELET_NOTED);
        return PASS;
}
