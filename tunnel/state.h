/* SPDX-License-Identifier: Apache-2.0 */
/* What a view is made of: shared by mesh.c, which builds it, and route.c, which reads it. */
#ifndef SIDESTEP_STATE_H
#define SIDESTEP_STATE_H

#include "record.h"
#include "table.h"

struct cidr {
        struct addr addr;
        uint8_t prefix;
};

struct view_settings {
        char *network, *cluster_id, *trust_domain, *root_namespace;
        struct cidr *cidrs; /* of the cluster */
        unsigned ncidrs;
        bool unknown_pass;
};

/* The workloads that name a service, whether the service is known or not. */
struct endpoints {
        uint64_t gen;
        const char *service;   /* interned */
        uint32_t max_capacity; /* at least that of any: bounds the rejection in route.c */
        struct shard *set;     /* of struct workload_record, by uid */
};

/* The policies that apply to a namespace, or to the whole mesh, without being named. */
struct scope {
        uint64_t gen;           /* it is as it was made in this generation */
        const char *namespace_; /* interned; "" for the mesh */
        unsigned n, cap;
        unsigned ndeny,
                nallow; /* enforced ones: first those that deny, then those that allow, then dry runs; by name */
        struct policy_record *items[];
};

struct mesh_view {
        uint64_t gen, seed;
        const struct view_settings *settings;
        uint64_t nworkloads, nservices, npolicies;
        uint32_t prefixes[129]; /* how many VIPs have this prefix length */
        struct table workloads; /* by uid */
        struct table addresses; /* workload_record by hash_vip(network, address, 128) */
        struct table services;  /* by "namespace/hostname" */
        struct table vips;      /* service_record by hash_vip(network, masked address, prefix) */
        struct table endpoints; /* by "namespace/hostname" */
        struct table policies;  /* by name */
        struct table scopes;    /* struct scope by namespace, "" for the mesh */
};

static inline uint64_t hash_text(const struct mesh_view *v, const char *s)
{
        return hash_bytes(s, strlen(s), v->seed);
}

static inline uint64_t hash_vip(const struct mesh_view *v, const char *network, const struct addr *a, uint8_t prefix)
{
        return hash_bytes(a, sizeof(*a), hash_text(v, network) + prefix);
}

static inline struct addr addr_mask(const struct addr *a, unsigned prefix)
{
        struct addr out = *a;
        for (unsigned i = 0; i < 16; i++) {
                unsigned keep = prefix >= (i + 1) * 8 ? 8 : prefix > i * 8 ? prefix - i * 8 : 0;
                out.ip[i] &= (uint8_t)(0xff00 >> keep);
        }
        return out;
}

/* A short IPv6 prefix such as ::/0 does not cover the mapped IPv4 addresses. */
static inline bool addr_in(const struct addr *a, const struct addr *base, unsigned prefix)
{
        struct addr m = addr_mask(a, prefix), b = addr_mask(base, prefix);
        return addr_is_v4(a) == addr_is_v4(base) && addr_equal(&m, &b);
}

/* The writer's own look at the newest view, without adopting it. */
const struct mesh_view *mesh_newest(struct mesh *m);

const struct workload_record *view_workload_record(const struct mesh_view *v, const char *uid);
const struct service_record *view_service(const struct mesh_view *v, const char *key);
const struct policy_record *view_policy(const struct mesh_view *v, const char *name);
const struct scope *view_scope(const struct mesh_view *v, const char *namespace_); /* NULL: no policies */

#endif
