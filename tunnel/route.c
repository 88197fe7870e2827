/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. What the workers ask of a view; pure functions of the view and their arguments, without locks or
 * allocation.
 *
 * The way to an address (reference ztunnel.md 1.3 to 1.5): a service with this VIP that the source may see, else a
 * workload with this address, else nothing. What we cannot do yet as the record asks (waypoints, other networks) is
 * refused, never done in a weaker way. We differ from ztunnel where it is safer: a service is looked up before a
 * workload for everything; an address of a PASSTHROUGH service that belongs to a workload is treated as that workload;
 * unhealthy endpoints are left out when chosen, so that a changed health policy counts at once; endpoints on other
 * networks are not chosen while there are any on ours, nor are those without an address of the VIP's family while there
 * are any with one (as kube-proxy does: the client may have no address of the other).
 *
 * Choice of an endpoint: weighted by capacity. Where any endpoint will do, a random one is accepted with probability
 * capacity / max, a bounded number of times: constant time. Otherwise two passes over the set.
 */
#include "state.h"

#define HBONE_PORT 15008
#define PICK_TRIES 32

static const char *const NO_WAYPOINTS = "waypoints are not supported yet";

/* ---- lookups ---- */

const struct workload_record *view_workload_record(const struct mesh_view *v, const char *uid)
{
        uint32_t at = 0;
        uint64_t hash = hash_text(v, uid);
        for (struct workload_record *w; (w = table_next(&v->workloads, hash, &at)) != NULL;)
                if (strcmp(w->w.uid, uid) == 0)
                        return w;
        return NULL;
}

const struct service_record *view_service(const struct mesh_view *v, const char *key)
{
        uint32_t at = 0;
        uint64_t hash = hash_text(v, key);
        for (struct service_record *s; (s = table_next(&v->services, hash, &at)) != NULL;)
                if (strcmp(s->key, key) == 0)
                        return s;
        return NULL;
}

const struct policy_record *view_policy(const struct mesh_view *v, const char *name)
{
        uint32_t at = 0;
        uint64_t hash = hash_text(v, name);
        for (struct policy_record *p; (p = table_next(&v->policies, hash, &at)) != NULL;)
                if (strcmp(p->r.name, name) == 0)
                        return p;
        return NULL;
}

const struct scope *view_scope(const struct mesh_view *v, const char *namespace_)
{
        uint32_t at = 0;
        uint64_t hash = hash_text(v, namespace_);
        for (struct scope *s; (s = table_next(&v->scopes, hash, &at)) != NULL;)
                if (strcmp(s->namespace_, namespace_) == 0)
                        return s;
        return NULL;
}

const struct workload *view_workload(const struct mesh_view *v, const char *uid)
{
        const struct workload_record *w = view_workload_record(v, uid);
        return w ? &w->w : NULL;
}

static bool has_address(const struct workload *w, const struct addr *a)
{
        for (unsigned i = 0; i < w->naddrs; i++)
                if (addr_equal(&w->addrs[i], a))
                        return true;
        return false;
}

/* Of several workloads with one address: pods before others, HBONE before plain, then the greatest uid, so that the
 * answer does not depend on the order in which they came. */
const struct workload *view_workload_at(const struct mesh_view *v, const struct addr *a)
{
        const char *network = v->settings->network;
        const struct workload_record *best = NULL;
        uint64_t hash = hash_vip(v, network, a, 128);
        uint32_t at = 0;
        for (struct workload_record *w; (w = table_next(&v->addresses, hash, &at)) != NULL;) {
                if (strcmp(w->w.network, network) != 0 || !has_address(&w->w, a))
                        continue;
                if (!best || w->rank > best->rank || (w->rank == best->rank && strcmp(w->w.uid, best->w.uid) > 0))
                        best = w;
        }
        return best ? &best->w : NULL;
}

static bool has_vip(const struct service_record *s, const char *network, const struct addr *a, unsigned prefix)
{
        for (unsigned i = 0; i < s->nvips; i++)
                if (s->vips[i].prefix == prefix && strcmp(s->vips[i].network, network) == 0 &&
                    addr_in(a, &s->vips[i].addr, prefix))
                        return true;
        return false;
}

/* Lexicographic: own namespace, prefix length, canonical; the smallest key breaks ties. */
static bool better(const struct service_record *s, unsigned prefix, const struct service_record *best,
                   unsigned best_prefix, const char *ns)
{
        if (!best)
                return true;
        bool own = ns && strcmp(s->namespace_, ns) == 0, best_own = ns && strcmp(best->namespace_, ns) == 0;
        if (own != best_own)
                return own;
        if (prefix != best_prefix)
                return prefix > best_prefix;
        if (s->canonical != best->canonical)
                return s->canonical;
        return strcmp(s->key, best->key) < 0;
}

static const struct service_record *service_at(const struct mesh_view *v, const struct addr *a, const char *ns)
{
        const char *network = v->settings->network;
        const struct service_record *best = NULL;
        unsigned best_prefix = 0;
        for (int prefix = 128; prefix >= 0; prefix--) {
                if (!v->prefixes[prefix])
                        continue;
                struct addr masked = addr_mask(a, (unsigned)prefix);
                uint64_t hash = hash_vip(v, network, &masked, (uint8_t)prefix);
                uint32_t at = 0;
                for (struct service_record *s; (s = table_next(&v->vips, hash, &at)) != NULL;) {
                        if (s->namespace_only && ns && strcmp(s->namespace_, ns) != 0)
                                continue;
                        if (!has_vip(s, network, a, (unsigned)prefix) ||
                            !better(s, (unsigned)prefix, best, best_prefix, ns))
                                continue;
                        best = s;
                        best_prefix = (unsigned)prefix;
                }
                if (best && prefix == 128)
                        break; /* an exact address ends the search, whoever it belongs to */
        }
        return best;
}

static const struct endpoints *endpoints_of(const struct mesh_view *v, const struct service_record *s)
{
        uint64_t hash = hash_text(v, s->key);
        uint32_t at = 0;
        for (struct endpoints *e; (e = table_next(&v->endpoints, hash, &at)) != NULL;)
                if (e->service == s->key) /* both interned */
                        return e;
        return NULL;
}

/* ---- choice of an endpoint ---- */

struct want {
        const struct service_record *service;
        const struct workload *src; /* may be NULL */
        const char *network;
        struct endpoint dst;     /* the VIP and its port */
        uint16_t service_target; /* 0: the endpoint must say */
};

static uint16_t target_port(const struct want *q, const struct workload_record *w)
{
        for (unsigned i = 0; i < w->nservices; i++) {
                if (w->services[i].service != q->service->key)
                        continue;
                for (unsigned k = 0; k < w->services[i].nports; k++)
                        if (w->services[i].ports[k].service == q->dst.port && w->services[i].ports[k].target)
                                return w->services[i].ports[k].target;
        }
        if (q->service_target)
                return q->service_target;
        return w->w.app_tunnel ? q->dst.port : 0;
}

/* The literal VIP if it is one of the workload's own, else one of the VIP's family, else the first that the service's
 * families allow. */
static const struct addr *target_address(const struct want *q, const struct workload *w)
{
        const struct addr *first = NULL;
        if (has_address(w, &q->dst.addr))
                return &q->dst.addr;
        for (unsigned i = 0; i < w->naddrs; i++) {
                bool v4 = addr_is_v4(&w->addrs[i]);
                if (q->service->families == (v4 ? FAMILIES_V6 : FAMILIES_V4))
                        continue;
                if (v4 == addr_is_v4(&q->dst.addr))
                        return &w->addrs[i];
                if (!first)
                        first = &w->addrs[i];
        }
        return first;
}

static bool scope_matches(enum lb_scope scope, const struct workload *a, const struct workload *b)
{
        switch (scope) {
        case SCOPE_REGION:
                return strcmp(a->region, b->region) == 0;
        case SCOPE_ZONE:
                return strcmp(a->zone, b->zone) == 0;
        case SCOPE_SUBZONE:
                return strcmp(a->subzone, b->subzone) == 0;
        case SCOPE_NODE:
                return strcmp(a->node, b->node) == 0;
        case SCOPE_CLUSTER:
                return strcmp(a->cluster_id, b->cluster_id) == 0;
        case SCOPE_NETWORK:
                return strcmp(a->network, b->network) == 0;
        }
        return false;
}

/* How near an endpoint is. NETWORK in the first place is preferred, not required: see ztunnel.md 1.5. */
static unsigned rank_of(const struct want *q, const struct workload *w)
{
        const struct service_record *s = q->service;
        unsigned rank = 0;
        if (!q->src)
                return 0;
        for (unsigned i = 0; i < s->nscopes; i++) {
                bool match = scope_matches(s->scopes[i], q->src, w);
                if (i == 0 && s->scopes[0] == SCOPE_NETWORK) {
                        rank += match ? s->nscopes : 0;
                        continue;
                }
                if (!match)
                        break;
                rank++;
        }
        return rank;
}

static unsigned rank_full(const struct service_record *s)
{
        return s->nscopes && s->scopes[0] == SCOPE_NETWORK ? 2u * s->nscopes - 1 : s->nscopes;
}

enum usable { UNUSABLE, OTHER_NETWORK, OTHER_FAMILY, USABLE };
#define SAME_FAMILY 1024u /* of a rank: more than all scopes together */

static enum usable usable(const struct want *q, const struct workload_record *w)
{
        if (!w->w.capacity || (!w->w.healthy && !q->service->allow_unhealthy) || !target_port(q, w))
                return UNUSABLE;
        if (strcmp(w->w.network, q->network) != 0)
                return OTHER_NETWORK;
        if (q->service->mode == LB_STRICT && rank_of(q, &w->w) != rank_full(q->service))
                return UNUSABLE;
        const struct addr *a = target_address(q, &w->w);
        return !a ? UNUSABLE : addr_is_v4(a) == addr_is_v4(&q->dst.addr) ? USABLE : OTHER_FAMILY;
}

/* Of two that can be used the one with the greater rank. */
static unsigned rank_among(const struct want *q, const struct workload *w, enum usable u)
{
        return (u == USABLE ? SAME_FAMILY : 0) + (q->service->mode == LB_FAILOVER ? rank_of(q, w) : 0);
}

/* splitmix64: one random number becomes as many as are needed. */
static uint64_t more_random(uint64_t *state)
{
        uint64_t z = *state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
}

static const struct workload_record *pick_quick(const struct want *q, const struct endpoints *e, uint64_t *random)
{
        for (unsigned i = 0; i < PICK_TRIES; i++) {
                uint64_t r = more_random(random);
                const struct workload_record *w = e->set->slots[r & e->set->mask].value;
                /* capacity / max_capacity: 32 random bits against a fraction of 2^32 */
                if (w && (r >> 32) * e->max_capacity < (uint64_t)w->w.capacity << 32 && usable(q, w) == USABLE)
                        return w;
        }
        return NULL;
}

static const struct workload_record *pick(const struct want *q, const struct endpoints *e, uint64_t random,
                                          const char **reason)
{
        const struct workload_record *w;
        bool elsewhere = false;
        unsigned best = 0;
        uint64_t total = 0;
        *reason = "no healthy upstream";
        if (!e || !e->set)
                return NULL;
        if (q->service->mode == LB_ANY && (w = pick_quick(q, e, &random)) != NULL)
                return w;
        for (uint32_t i = 0; i <= e->set->mask; i++) {
                w = e->set->slots[i].value;
                enum usable u = w ? usable(q, w) : UNUSABLE;
                elsewhere |= u == OTHER_NETWORK;
                if (u < OTHER_FAMILY)
                        continue;
                unsigned rank = rank_among(q, &w->w, u);
                if (rank > best) {
                        best = rank;
                        total = 0;
                }
                if (rank == best)
                        total += w->w.capacity;
        }
        if (!total) {
                if (elsewhere)
                        *reason = "all endpoints are on other networks, which is not supported yet";
                return NULL;
        }
        uint64_t at = (uint64_t)((__uint128_t)more_random(&random) * total >> 64);
        for (uint32_t i = 0; i <= e->set->mask; i++) {
                w = e->set->slots[i].value;
                enum usable u = w ? usable(q, w) : UNUSABLE;
                if (u < OTHER_FAMILY || rank_among(q, &w->w, u) != best)
                        continue;
                if (at < w->w.capacity)
                        return w;
                at -= w->w.capacity;
        }
        return NULL;
}

/* ---- the way ---- */

static void refuse(struct route *out, const char *reason)
{
        out->kind = ROUTE_REFUSE;
        out->reason = reason;
}

static void to_workload(const struct workload *w, const struct service_record *s, struct route *out)
{
        out->dst = w;
        out->next_hop = out->target;
        out->sans = &w->identity;
        out->nsans = 1;
        if (w->protocol == MESH_PLAIN) {
                out->kind = ROUTE_PLAIN;
                return;
        }
        out->kind = ROUTE_HBONE;
        out->next_hop.port = HBONE_PORT;
        if (s && s->nsans) {
                out->san_space[0] = w->identity;
                memcpy(out->san_space + 1, s->sans, s->nsans * sizeof(*s->sans));
                out->sans = out->san_space;
                out->nsans = s->nsans + 1;
        }
}

static void to_service(const struct mesh_view *v, const struct service_record *s, const struct workload *src,
                       uint64_t random, struct route *out)
{
        struct want q = {.service = s, .src = src, .network = v->settings->network, .dst = out->target};
        const struct workload_record *w;
        bool defined = false;
        const char *reason;
        for (unsigned i = 0; i < s->nports && !defined; i++) {
                defined = s->ports[i].service == q.dst.port;
                q.service_target = defined ? s->ports[i].target : 0;
        }
        if (!defined) {
                refuse(out, "the service does not have this port");
                return;
        }
        w = pick(&q, endpoints_of(v, s), random, &reason);
        if (!w) {
                refuse(out, reason);
                return;
        }
        out->target = (struct endpoint){.addr = *target_address(&q, &w->w), .port = target_port(&q, w)};
        to_workload(&w->w, s, out);
}

static bool inside(const struct view_settings *s, const struct addr *a)
{
        for (unsigned i = 0; i < s->ncidrs; i++)
                if (addr_in(a, &s->cidrs[i].addr, s->cidrs[i].prefix))
                        return true;
        return false;
}

void view_route(const struct mesh_view *v, const struct workload *src, const struct endpoint *dst, uint64_t random,
                struct route *out)
{
        const struct service_record *s = service_at(v, &dst->addr, src ? src->namespace_ : NULL);
        const struct workload *w;
        out->kind = ROUTE_REFUSE;
        out->dst = NULL;
        out->target = out->next_hop = *dst;
        out->service_host = out->service_name = out->service_namespace = "";
        out->sans = NULL;
        out->nsans = 0;
        out->reason = "";
        if (s) {
                out->service_host = s->hostname;
                out->service_name = s->name;
                out->service_namespace = s->namespace_;
                if (s->has_waypoint) {
                        refuse(out, NO_WAYPOINTS);
                        return;
                }
                if (s->mode != LB_PASSTHROUGH) {
                        /* A workload's own waypoint is not for traffic that was addressed to a service. */
                        to_service(v, s, src, random, out);
                        return;
                }
        }
        w = view_workload_at(v, &dst->addr);
        if (w) {
                out->dst = w;
                if (w->has_waypoint)
                        refuse(out, NO_WAYPOINTS);
                else
                        to_workload(w, s, out);
                return;
        }
        if (s || v->settings->unknown_pass || !inside(v->settings, &dst->addr)) {
                out->kind = ROUTE_PLAIN;
                return;
        }
        out->kind = ROUTE_UNKNOWN;
        out->reason = "unknown destination";
}

void view_inbound_service(const struct mesh_view *v, const struct workload *w, uint16_t port, struct route *out)
{
        const struct workload_record *r = (const struct workload_record *)w;
        out->service_host = out->service_name = out->service_namespace = "";
        for (unsigned i = 0; i < r->nservices; i++) {
                const struct service_record *s = view_service(v, r->services[i].service);
                bool match = false;
                for (unsigned k = 0; s && k < s->nports && !match; k++) {
                        struct want q = {
                                .service = s, .dst.port = s->ports[k].service, .service_target = s->ports[k].target};
                        match = target_port(&q, r) == port;
                }
                if (match) {
                        out->service_host = s->hostname;
                        out->service_name = s->name;
                        out->service_namespace = s->namespace_;
                        return;
                }
        }
}

/* ---- policies ---- */

const char *view_policy_missing(const struct mesh_view *v, const struct workload *w)
{
        for (unsigned i = 0; i < w->npolicies; i++)
                if (!view_policy(v, w->policies[i]))
                        return w->policies[i];
        return NULL;
}

uint64_t view_stamp(const struct mesh_view *v, const char *uid, const char *namespace_)
{
        const struct workload *w = view_workload(v, uid);
        const struct scope *near = view_scope(v, w ? w->namespace_ : namespace_), *mesh = view_scope(v, "");
        /* Each number stands for one state of what it belongs to and is never used again. */
        uint64_t parts[] = {w ? w->record : 0, near ? near->gen : 0, mesh ? mesh->gen : 0};
        uint64_t stamp = hash_bytes(parts, sizeof(parts), v->seed);
        for (unsigned i = 0; w && i < w->npolicies; i++) {
                const struct policy_record *p = view_policy(v, w->policies[i]);
                uint64_t serial = p ? p->serial : 0;
                stamp = hash_bytes(&serial, sizeof(serial), stamp);
        }
        return stamp;
}
