/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way to an address, against a naive model: arrays, loops, no index. Random deltas of workloads and services, one
 * by one and in batches; after each, every address and source is asked. The named cases of reference ztunnel.md 1.4
 * and 1.5 stand beside it as tables.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <cmocka.h>
#include "mesh.h"
#include "rbac.h"
#include "records.h"
#include "tunnel.h"

#define WORKLOADS 40
#define SERVICES 12
#define MEMBERS 3
#define ROUNDS 600

struct model_workload {
        bool there, hbone, unhealthy, waypoint, host_network, pod, legacy_app;
        unsigned ns, network, region, zone, node;
        unsigned naddrs;
        unsigned addrs[2]; /* in the pool */
        int capacity;      /* -1: not set */
        unsigned nmembers;
        unsigned members[MEMBERS]; /* services, known or not */
        unsigned target[MEMBERS];  /* 0: not said */
};

struct model_service {
        bool there, waypoint, namespace_only, canonical, allow_unhealthy;
        unsigned mode, families, nscopes, scopes[4];
        unsigned nvips, vips[2];
        int prefix[2]; /* -1: none said */
        unsigned target;
        unsigned nsans;
};

static struct model_workload workloads[WORKLOADS];
static struct model_service services[SERVICES];

static const char *const NS[] = {"alpha", "beta", "gamma"};
static const char *const NETWORK[] = {"", "far"};
static const char *const PLACE[] = {"", "a", "b"};
#define POOL 24

/* Even: IPv4 10.0.x.y, odd: IPv6 fd00::x:y; the last four lie outside the cluster. */
static struct addr pool(unsigned i)
{
        struct addr a;
        uint8_t v4[4] = {10, 0, (uint8_t)(i / 8), (uint8_t)i},
                v6[16] = {0xfd, [13] = (uint8_t)(i / 8), [15] = (uint8_t)i};
        if (i >= POOL - 4) {
                v4[0] = 192;
                v6[0] = 0x20;
        }
        if (i % 2)
                addr_from_bytes(&a, v6, 16);
        else
                addr_from_bytes(&a, v4, 4);
        return a;
}

static uint64_t state = 42;
static uint64_t rnd(void)
{
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (state ^ state >> 29) * 0xbf58476d1ce4e5b9ull >> 16;
}
static unsigned upto(unsigned n)
{
        return (unsigned)(rnd() % n);
}

static const char *workload_uid(unsigned i, char out[64])
{
        snprintf(out, 64, "Kubernetes//%s/%s/w%u", workloads[i].pod ? "Pod" : "Entry", NS[i % 3], i);
        return out;
}

static const char *service_key(unsigned i, char out[64])
{
        snprintf(out, 64, "%s/s%u.local", NS[i % 3], i);
        return out;
}

static void put_address(struct buf *b, unsigned field, unsigned i)
{
        struct addr a = pool(i);
        if (addr_is_v4(&a))
                put_bytes(b, field, a.ip + 12, 4);
        else
                put_bytes(b, field, a.ip, 16);
}

static struct buf workload_body(unsigned i)
{
        const struct model_workload *w = &workloads[i];
        struct buf b = {0}, inner = {0};
        char text[64];
        put_text(&b, 20, workload_uid(i, text));
        snprintf(text, sizeof(text), "w%u", i);
        put_text(&b, 1, text);
        put_text(&b, 2, NS[i % 3]);
        for (unsigned k = 0; k < w->naddrs; k++)
                put_address(&b, 3, w->addrs[k]);
        if (w->network)
                put_text(&b, 4, NETWORK[w->network]);
        put_number(&b, 5, w->hbone);
        put_text(&b, 9, PLACE[w->node]);
        put_number(&b, 17, w->unhealthy);
        if (w->waypoint)
                put_message(&b, 8, gateway_message("waypoint"));
        put_number(&b, 25, w->host_network);
        put_text(&inner, 1, PLACE[w->region]);
        put_text(&inner, 2, PLACE[w->zone]);
        put_message(&b, 24, inner);
        for (unsigned k = 0; k < w->nmembers; k++) {
                struct buf entry = {0}, list = {0};
                put_text(&entry, 1, service_key(w->members[k], text));
                if (w->target[k])
                        put_message(&list, 1, port_message(80, w->target[k]));
                put_message(&entry, 2, list);
                put_message(&b, 22, entry);
        }
        if (w->capacity >= 0) {
                struct buf value = {0};
                put_number(&value, 1, (unsigned)w->capacity);
                put_message(&b, 27, value);
        }
        if (w->legacy_app) {
                struct buf value = {0};
                put_number(&value, 2, 15088);
                put_message(&b, 23, value);
        }
        return as_workload(b);
}

static struct buf service_body(unsigned i)
{
        const struct model_service *s = &services[i];
        struct buf b = {0}, lb = {0};
        char text[80];
        snprintf(text, sizeof(text), "s%u", i);
        put_text(&b, 1, text);
        put_text(&b, 2, NS[i % 3]);
        snprintf(text, sizeof(text), "s%u.local", i);
        put_text(&b, 3, text);
        for (unsigned k = 0; k < s->nvips; k++) {
                struct addr a = pool(s->vips[k]);
                bool v4 = addr_is_v4(&a);
                put_message(&b, 4, network_address("", v4 ? a.ip + 12 : a.ip, v4 ? 4 : 16, s->prefix[k]));
        }
        put_message(&b, 5, port_message(443, 8443));
        put_message(&b, 5, port_message(80, s->target));
        for (unsigned k = 0; k < s->nsans; k++) {
                snprintf(text, sizeof(text), "spiffe://cluster.local/ns/x/sa/extra%u", k);
                put_text(&b, 6, text);
        }
        if (s->waypoint)
                put_message(&b, 7, gateway_message("waypoint"));
        for (unsigned k = 0; k < s->nscopes; k++)
                put_number(&lb, 1, s->scopes[k]);
        put_number(&lb, 2, s->mode);
        put_number(&lb, 3, s->allow_unhealthy);
        put_message(&b, 8, lb);
        put_number(&b, 9, s->families);
        put_number(&b, 11, s->canonical);
        put_number(&b, 14, s->namespace_only);
        return as_service(b);
}

static void random_workload(struct model_workload *w)
{
        *w = (struct model_workload){.there = true, .pod = w->pod};
        w->hbone = upto(2);
        w->unhealthy = upto(4) == 0;
        w->waypoint = upto(12) == 0;
        w->host_network = upto(10) == 0;
        w->legacy_app = upto(12) == 0;
        w->network = upto(6) == 0;
        w->region = upto(3);
        w->zone = upto(3);
        w->node = upto(3);
        w->naddrs = upto(3);
        for (unsigned k = 0; k < w->naddrs; k++)
                w->addrs[k] = upto(POOL);
        w->capacity = (int)upto(4) - 1;
        w->nmembers = upto(MEMBERS + 1);
        for (unsigned k = 0; k < w->nmembers; k++) {
                w->members[k] = (upto(SERVICES / MEMBERS) * MEMBERS + k) % SERVICES; /* never one twice */
                w->target[k] = upto(2) ? 9000 + k : 0;
        }
}

static void random_service(struct model_service *s)
{
        *s = (struct model_service){.there = true};
        s->waypoint = upto(12) == 0;
        s->namespace_only = upto(4) == 0;
        s->canonical = upto(3) == 0;
        s->allow_unhealthy = upto(4) == 0;
        s->mode = upto(4);
        s->families = upto(4);
        s->nscopes = upto(4);
        for (unsigned k = 0; k < s->nscopes; k++)
                s->scopes[k] = (unsigned[]){6, 1, 2, 4}[upto(4)];
        s->nvips = upto(3);
        for (unsigned k = 0; k < s->nvips; k++) {
                s->vips[k] = upto(POOL);
                s->prefix[k] = (int[]){-1, -1, 8, 24, 0, 32}[upto(6)];
        }
        s->target = upto(3) ? 8080 : 0;
        s->nsans = upto(3);
}

/* ---- the model ---- */

static bool bits_equal(const struct addr *a, const struct addr *b, unsigned first, unsigned n)
{
        for (unsigned i = first; i < first + n; i++)
                if ((a->ip[i / 8] ^ b->ip[i / 8]) >> (7 - i % 8) & 1)
                        return false;
        return true;
}

/* Length of the prefix by which this VIP covers a, as in the mapped form, or -1. */
static int covers(const struct model_service *s, unsigned k, const struct addr *a)
{
        struct addr v = pool(s->vips[k]);
        bool v4 = addr_is_v4(&v);
        int n = s->prefix[k] < 0 ? (v4 ? 32 : 128) : s->prefix[k];
        if (v4 != addr_is_v4(a) || !bits_equal(&v, a, v4 ? 96 : 0, (unsigned)n))
                return -1;
        return v4 ? n + 96 : n;
}

static int model_service_at(const struct addr *a, int src)
{
        int best = -1, best_rank[3] = {-1, -1, -1};
        char key[64], best_key[64];
        bool exact = false;
        for (unsigned pass = 0; pass < 2 && !exact; pass++) { /* addresses first, ranges only when there is none */
                for (unsigned i = 0; i < SERVICES; i++) {
                        const struct model_service *s = &services[i];
                        bool own = src >= 0 && (unsigned)src % 3 == i % 3;
                        if (!s->there || (s->namespace_only && src >= 0 && !own))
                                continue;
                        for (unsigned k = 0; k < s->nvips; k++) {
                                int n = covers(s, k, a), rank[3] = {own, n, s->canonical};
                                if (n < 0 || (pass == 0) != (n == 128))
                                        continue;
                                int c = rank[0] != best_rank[0]   ? rank[0] - best_rank[0]
                                        : rank[1] != best_rank[1] ? rank[1] - best_rank[1]
                                                                  : rank[2] - best_rank[2];
                                service_key(i, key);
                                if (best < 0 || c > 0 || (c == 0 && strcmp(key, best_key) < 0)) {
                                        best = (int)i;
                                        memcpy(best_rank, rank, sizeof(rank));
                                        strcpy(best_key, key);
                                }
                                exact = pass == 0;
                        }
                }
        }
        return best;
}

static bool owns(const struct model_workload *w, const struct addr *a)
{
        for (unsigned k = 0; k < w->naddrs; k++) {
                struct addr x = pool(w->addrs[k]);
                if (addr_equal(&x, a))
                        return true;
        }
        return false;
}

static int model_workload_at(const struct addr *a)
{
        int best = -1, best_rank = -1;
        char uid[64], best_uid[64];
        for (unsigned i = 0; i < WORKLOADS; i++) {
                const struct model_workload *w = &workloads[i];
                int rank = (w->pod ? 2 : 0) + w->hbone;
                if (!w->there || w->host_network || w->network || !owns(w, a))
                        continue;
                workload_uid(i, uid);
                if (rank > best_rank || (rank == best_rank && strcmp(uid, best_uid) > 0)) {
                        best = (int)i;
                        best_rank = rank;
                        strcpy(best_uid, uid);
                }
        }
        return best;
}

static bool same_scope(unsigned scope, const struct model_workload *a, const struct model_workload *b)
{
        return scope == 1   ? a->region == b->region
               : scope == 2 ? a->zone == b->zone
               : scope == 4 ? a->node == b->node
                            : a->network == b->network;
}

/* The table of ztunnel.md 1.5, by its words: leading scopes that match; a first NETWORK adds len-1 more and does not
 * end the count. */
static unsigned model_rank(const struct model_service *s, int src, const struct model_workload *w)
{
        unsigned rank = 0;
        if (src < 0)
                return 0;
        for (unsigned i = 0; i < s->nscopes; i++) {
                if (same_scope(s->scopes[i], &workloads[src], w))
                        rank += i == 0 && s->scopes[0] == 6 ? 1 + (s->nscopes - 1) : 1;
                else if (i != 0 || s->scopes[0] != 6)
                        break;
        }
        return rank;
}

static unsigned model_target(unsigned svc, const struct model_workload *w)
{
        for (unsigned k = 0; k < w->nmembers; k++)
                if (w->members[k] == svc && w->target[k])
                        return w->target[k];
        return services[svc].target ? services[svc].target : w->legacy_app ? 80 : 0;
}

static bool member(unsigned svc, const struct model_workload *w)
{
        for (unsigned k = 0; k < w->nmembers; k++)
                if (w->members[k] == svc)
                        return true;
        return false;
}

static bool allowed(const struct model_service *s, const struct model_workload *w, unsigned k, const struct addr *dst)
{
        struct addr a = pool(w->addrs[k]);
        if (addr_equal(&a, dst))
                return true;
        return !(s->families == 1 && !addr_is_v4(&a)) && !(s->families == 2 && addr_is_v4(&a));
}

/* Marks the endpoints that may be chosen. Returns how many; elsewhere: there were others, on another network. */
static unsigned model_choices(unsigned svc, int src, const struct addr *dst, bool may[WORKLOADS], bool *elsewhere)
{
        const struct model_service *s = &services[svc];
        unsigned n = 0, best = 0, full = s->nscopes;
        bool near = false; /* one of them has an address of the same family */
        if (s->nscopes && s->scopes[0] == 6)
                full = 2 * s->nscopes - 1;
        *elsewhere = false;
        for (unsigned pass = 0; pass < 2; pass++) {
                for (unsigned i = 0; i < WORKLOADS; i++) {
                        const struct model_workload *w = &workloads[i];
                        bool address = false, same = false;
                        may[i] = false;
                        if (!w->there || !member(svc, w) || (w->unhealthy && !s->allow_unhealthy) || w->capacity == 0 ||
                            !model_target(svc, w))
                                continue;
                        if (w->network) {
                                *elsewhere = true;
                                continue;
                        }
                        for (unsigned k = 0; k < w->naddrs; k++) {
                                struct addr a = pool(w->addrs[k]);
                                address |= allowed(s, w, k, dst);
                                same |= allowed(s, w, k, dst) && addr_is_v4(&a) == addr_is_v4(dst);
                        }
                        unsigned rank = model_rank(s, src, w);
                        if (!address || (s->mode == 1 && rank != full))
                                continue;
                        if (same && !near) { /* then those of the other family do not count at all */
                                near = true;
                                best = 0;
                        }
                        if (near && !same)
                                continue;
                        if (s->mode == 2 && rank > best)
                                best = rank;
                        may[i] = pass == 1 && (s->mode != 2 || rank == best);
                        n += may[i];
                }
        }
        return n;
}

static void check_endpoint(const struct route *r, unsigned svc, unsigned w, const struct addr *dst)
{
        char text[80];
        bool found = false;
        assert_int_equal(r->target.port, model_target(svc, &workloads[w]));
        for (unsigned k = 0; k < workloads[w].naddrs; k++) {
                struct addr a = pool(workloads[w].addrs[k]);
                if (addr_equal(&a, &r->target.addr)) {
                        assert_true(allowed(&services[svc], &workloads[w], k, dst));
                        found = true;
                }
                /* An address of the VIP's family is preferred. */
                if (allowed(&services[svc], &workloads[w], k, dst) && addr_is_v4(&a) == addr_is_v4(dst))
                        assert_int_equal(addr_is_v4(&r->target.addr), addr_is_v4(dst));
        }
        assert_true(found);
        if (!workloads[w].hbone)
                return;
        assert_int_equal(r->nsans, 1 + services[svc].nsans);
        for (unsigned k = 0; k < services[svc].nsans; k++) {
                snprintf(text, sizeof(text), "spiffe://cluster.local/ns/x/sa/extra%u", k);
                assert_string_equal(r->sans[k + 1], text);
        }
}

static unsigned seen[5]; /* how often each kind came: a test of the test */

static void check_route(const struct mesh_view *v, int src, unsigned dst_index)
{
        char text[64];
        struct endpoint dst = {.addr = pool(dst_index), .port = 80};
        const struct workload *w = src < 0 ? NULL : view_workload(v, workload_uid((unsigned)src, text));
        int svc = model_service_at(&dst.addr, src), at = model_workload_at(&dst.addr);
        struct route r;
        bool may[WORKLOADS], elsewhere;
        view_route(v, w, &dst, rnd(), &r);
        seen[r.kind]++;
        snprintf(text, sizeof(text), "s%d.local", svc);
        assert_string_equal(r.service_host, svc < 0 ? "" : text);
        if (svc >= 0 && services[svc].waypoint) {
                assert_int_equal(r.kind, ROUTE_REFUSE);
                return;
        }
        if (svc >= 0 && services[svc].mode != 3) {
                unsigned n = model_choices((unsigned)svc, src, &dst.addr, may, &elsewhere);
                if (!n) {
                        assert_int_equal(r.kind, ROUTE_REFUSE);
                        assert_string_equal(
                                r.reason, elsewhere ? "all endpoints are on other networks, which is not supported yet"
                                                    : "no healthy upstream");
                        return;
                }
                assert_non_null(r.dst);
                unsigned i = (unsigned)atoi(strrchr(r.dst->uid, 'w') + 1);
                assert_true(may[i]);
                seen[4]++;
                assert_int_equal(r.kind, workloads[i].hbone ? ROUTE_HBONE : ROUTE_PLAIN);
                check_endpoint(&r, (unsigned)svc, i, &dst.addr);
        } else if (at >= 0) {
                assert_non_null(r.dst);
                assert_string_equal(r.dst->uid, workload_uid((unsigned)at, text));
                assert_int_equal(r.kind, workloads[at].waypoint ? ROUTE_REFUSE
                                         : workloads[at].hbone  ? ROUTE_HBONE
                                                                : ROUTE_PLAIN);
                assert_int_equal(r.target.port, 80);
        } else {
                assert_null(r.dst);
                assert_int_equal(r.kind, svc < 0 && dst_index < POOL - 4 ? ROUTE_UNKNOWN : ROUTE_PLAIN);
        }
        if (r.kind == ROUTE_HBONE)
                assert_int_equal(r.next_hop.port, 15008);
        if (r.kind == ROUTE_HBONE || r.kind == ROUTE_PLAIN)
                assert_true(addr_equal(&r.next_hop.addr, &r.target.addr));
}

static void apply(struct mesh *m, struct buf *b)
{
        char report[4096];
        assert_int_equal(mesh_apply(m, b->p, b->len, report, sizeof(report)), 0);
        assert_string_equal(report, "");
        buf_free(b);
}

static void change(struct buf *b, unsigned *serial)
{
        char name[64], version[32];
        snprintf(version, sizeof(version), "v%u", ++*serial);
        if (upto(3)) {
                unsigned i = upto(WORKLOADS);
                if (workloads[i].there && upto(4) == 0) {
                        batch_add(b, DEL, workload_uid(i, name), "", (struct buf){0});
                        workloads[i].there = false;
                        return;
                }
                if (!workloads[i].there)
                        workloads[i].pod = upto(2);
                random_workload(&workloads[i]);
                batch_add(b, SET, workload_uid(i, name), version, workload_body(i));
        } else {
                unsigned i = upto(SERVICES);
                if (services[i].there && upto(4) == 0) {
                        batch_add(b, DEL, service_key(i, name), "", (struct buf){0});
                        services[i].there = false;
                        return;
                }
                random_service(&services[i]);
                batch_add(b, SET, service_key(i, name), version, service_body(i));
        }
}

static struct buf everything(void)
{
        struct buf b = batch_new(1);
        char name[64];
        for (unsigned i = 0; i < WORKLOADS; i++)
                if (workloads[i].there)
                        batch_add(&b, SET, workload_uid(i, name), "full", workload_body(i));
        for (unsigned i = 0; i < SERVICES; i++)
                if (services[i].there)
                        batch_add(&b, SET, service_key(i, name), "full", service_body(i));
        return b;
}

static struct mesh *fresh(void)
{
        struct tunnel_settings s = {.cluster_cidrs = "10.0.0.0/8,fd00::/8"};
        struct mesh *m;
        assert_int_equal(mesh_new(&m, 1), 0);
        assert_int_equal(mesh_settings(m, &s), 0);
        return m;
}

static void check_all(struct mesh *m)
{
        const struct mesh_view *v = mesh_view(m, 0);
        struct mesh_counts n;
        unsigned there = 0, known = 0;
        char text[64];
        for (unsigned i = 0; i < WORKLOADS; i++) {
                assert_int_equal(view_workload(v, workload_uid(i, text)) != NULL, workloads[i].there);
                there += workloads[i].there;
        }
        for (unsigned i = 0; i < SERVICES; i++)
                known += services[i].there;
        mesh_counts(m, &n);
        assert_int_equal(n.workloads, there);
        assert_int_equal(n.services, known);
        for (unsigned i = 0; i < POOL; i++) {
                struct addr a = pool(i);
                int want = model_workload_at(&a);
                const struct workload *got = view_workload_at(v, &a);
                assert_int_equal(got != NULL, want >= 0);
                if (got)
                        assert_string_equal(got->uid, workload_uid((unsigned)want, text));
                int src = (int)upto(WORKLOADS + 3) - 3;
                check_route(v, src < 0 || !workloads[src].there ? -1 : src, i);
        }
}

static void test_random_deltas(void **unused)
{
        struct mesh *m = fresh();
        unsigned serial = 0;
        (void)unused;
        memset(workloads, 0, sizeof(workloads));
        memset(services, 0, sizeof(services));
        for (unsigned round = 0; round < ROUNDS; round++) {
                struct buf b = batch_new(0);
                for (unsigned n = upto(8) ? 1 : upto(30); n; n--)
                        change(&b, &serial);
                apply(m, &b);
                check_all(m);
                if (round % 100 == 99) { /* the same again, as a full batch, into this mesh and into an empty one */
                        struct mesh *other = fresh();
                        b = everything();
                        apply(m, &b);
                        check_all(m);
                        b = everything();
                        apply(other, &b);
                        check_all(other);
                        mesh_free(other);
                }
                mesh_in_force(m, 0);
                mesh_sync(m, NULL, NULL);
        }
        for (unsigned k = 0; k < 5; k++)
                assert_true(seen[k] > 100);
        mesh_free(m);
}

/* ---- named cases ---- */

static void reset_model(void)
{
        memset(workloads, 0, sizeof(workloads));
        memset(services, 0, sizeof(services));
}

static struct mesh *load(void)
{
        struct mesh *m = fresh();
        struct buf b = everything();
        apply(m, &b);
        return m;
}

static void test_capacity_shares(void **unused)
{
        unsigned count[3] = {0};
        struct endpoint dst = {.addr = pool(0), .port = 80};
        struct route r;
        (void)unused;
        for (unsigned mode = 0; mode <= 2; mode += 2) { /* the quick pick, and the one in two passes */
                reset_model();
                services[0] =
                        (struct model_service){.there = true, .nvips = 1, .prefix = {-1}, .target = 8080, .mode = mode};
                for (unsigned i = 0; i < 3; i++)
                        workloads[i] = (struct model_workload){.there = true,
                                                               .naddrs = 1,
                                                               .addrs = {2 + i},
                                                               .nmembers = 1,
                                                               .capacity = (int[]){3, 0, 1}[i]};
                struct mesh *m = load();
                memset(count, 0, sizeof(count));
                for (unsigned n = 0; n < 40000; n++) {
                        view_route(mesh_view(m, 0), NULL, &dst, rnd(), &r);
                        count[atoi(strrchr(r.dst->uid, 'w') + 1)]++;
                }
                assert_int_equal(count[1], 0);
                /* 30 000 of 40 000 expected, standard deviation 87: ten of those */
                assert_in_range(count[0], 29130, 30870);
                mesh_free(m);
        }
}

/* Example [network, region, zone] of ztunnel.md 1.5. */
static void test_network_first(void **unused)
{
        static const struct {
                unsigned network, region, zone, rank;
        } cases[] = {{0, 1, 1, 5}, {0, 1, 2, 4}, {0, 2, 2, 3}, {1, 1, 1, 2}, {1, 1, 2, 1}, {1, 2, 2, 0}};
        struct model_service s = {.nscopes = 3, .scopes = {6, 1, 2}};
        (void)unused;
        reset_model();
        workloads[0] = (struct model_workload){.region = 1, .zone = 1};
        for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
                struct model_workload w = {
                        .network = cases[i].network, .region = cases[i].region, .zone = cases[i].zone};
                assert_int_equal(model_rank(&s, 0, &w),
                                 cases[i].rank); /* the model itself; the engine is compared with it */
        }
}

static void test_refusals(void **unused)
{
        struct endpoint dst = {.addr = pool(0), .port = 81}, outside = {.addr = pool(POOL - 2), .port = 80};
        struct tunnel_settings pass = {.cluster_cidrs = "10.0.0.0/8", .unknown_pass = 1},
                               bad = {.cluster_cidrs = "10.0.0.0/33"};
        struct route r;
        (void)unused;
        reset_model();
        services[0] = (struct model_service){.there = true, .nvips = 1, .prefix = {-1}, .target = 8080};
        struct mesh *m = load();
        view_route(mesh_view(m, 0), NULL, &dst, 1, &r);
        assert_int_equal(r.kind, ROUTE_REFUSE);
        assert_string_equal(r.reason, "the service does not have this port");
        view_route(mesh_view(m, 0), NULL, &outside, 1, &r);
        assert_int_equal(r.kind, ROUTE_PLAIN);
        dst.addr = pool(2);
        view_route(mesh_view(m, 0), NULL, &dst, 1, &r);
        assert_int_equal(r.kind, ROUTE_UNKNOWN);
        assert_int_equal(mesh_settings(m, &bad), -22);
        view_route(mesh_view(m, 0), NULL, &dst, 1, &r);
        assert_int_equal(r.kind, ROUTE_UNKNOWN);
        assert_int_equal(mesh_settings(m, &pass), 0);
        view_route(mesh_view(m, 0), NULL, &dst, 1, &r);
        assert_int_equal(r.kind, ROUTE_PLAIN);
        mesh_free(m);
}

static void test_inbound_service(void **unused)
{
        struct route r;
        char uid[64];
        (void)unused;
        reset_model();
        services[0] = (struct model_service){.there = true, .target = 8080};
        services[1] = (struct model_service){.there = true};
        workloads[0] = (struct model_workload){
                .there = true, .nmembers = 2, .members = {0, 1}, .target = {0, 9001}, .capacity = -1};
        struct mesh *m = load();
        const struct mesh_view *v = mesh_view(m, 0);
        const struct workload *w = view_workload(v, workload_uid(0, uid));
        view_inbound_service(v, w, 8080, &r);
        assert_string_equal(r.service_name, "s0");
        view_inbound_service(v, w, 9001, &r);
        assert_string_equal(r.service_host, "s1.local");
        view_inbound_service(v, w, 1234, &r);
        assert_string_equal(r.service_name, "");
        mesh_free(m);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_random_deltas),   cmocka_unit_test(test_capacity_shares),
                cmocka_unit_test(test_network_first),   cmocka_unit_test(test_refusals),
                cmocka_unit_test(test_inbound_service),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
