/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * What several BPF objects have in common: maps that more than one of them uses, and how addresses are written. For
 * programs only. Each object defines the maps that it uses, `struct map_of_X X SEC(".maps")`; the loader gives all of
 * them the same pin.
 */
#ifndef SIDESTEP_SHARED_H
#define SIDESTEP_SHARED_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"

struct map_of_engine_sk {
        __uint(type, BPF_MAP_TYPE_SK_STORAGE);
        __uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
        __type(key, int);
        __type(value, __u32);
};

struct map_of_fates {
        __uint(type, BPF_MAP_TYPE_SK_STORAGE);
        __uint(map_flags, BPF_F_NO_PREALLOC);
        __type(key, int);
        __type(value, struct capture_fated);
};

/* The node's, shared by all pods and kubelet.bpf.c. */
struct map_of_probe_notes {
        __uint(type, BPF_MAP_TYPE_LRU_HASH);
        __uint(max_entries, KUBELET_MAX_NOTES);
        __type(key, struct capture_tuple);
        __type(value, struct capture_probe);
};

struct map_of_probes {
        __uint(type, BPF_MAP_TYPE_LRU_HASH);
        __uint(max_entries, CAPTURE_MAX_PROBES);
        __type(key, struct capture_tuple);
        __type(value, struct capture_probe);
};

/* Of the pod as a destination: from its door to the first packet of the accepted socket. Not an LRU: what is forgotten
 * here is a connection that breaks. */
struct map_of_pending {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(map_flags, BPF_F_NO_PREALLOC);
        __uint(max_entries, VOUCH_MAX_PENDING);
        __type(key, struct capture_tuple);
        __type(value, struct capture_probe);
};

/* An IPv4 address as IPv6 writes it. */
static __always_inline void mapped(__u8 *to, __u32 ip4)
{
        __builtin_memset(to, 0, 10);
        to[10] = to[11] = 0xff;
        __builtin_memcpy(to + 12, &ip4, 4);
}

#endif
