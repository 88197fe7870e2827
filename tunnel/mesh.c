/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. A view is an immutable picture of the mesh: seven tables of 1024 shards each, and counts. The
 * writer copies the newest view (56 KiB of shard pointers), applies a batch to the copy, touching copies of the shards
 * it changes, and publishes it with one pointer store. What the new view no longer refers to goes into a bin, stamped
 * with the new generation.
 *
 * Each reader has a cell with the generation it uses. The writer may free what was binned at generation g once every
 * reader uses g or a later one, or none. A reader that comes from none announces generation 1 (hold everything) before
 * it loads the newest view, both sequentially consistent: either the writer sees the announcement, or the reader sees
 * the view that the writer has just published.
 *
 * Beside the generation that it uses a reader's cell has the one that it has put into force (mesh_in_force). Only the
 * writer allocates, frees or waits (mesh_sync, on a futex that readers touch then, at most MESH_SYNC_MS).
 * A worker's mesh_view() is two loads when nothing is new. A batch costs what its records cost: a delta of one about 20
 * us, whatever the mesh's size. A set of endpoints is one shard, copied when one of them changes: 10 000 endpoints, 256
 * KiB.
 */
#include "mesh.h"
#include "delta.h"
#include "state.h"
#include "tunnel.h"
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define GEN_NONE UINT64_MAX
#define GEN_ALL 1u /* views start at 2 */
#define NAME_MAX_LEN 2048
#define VERSION_MAX_LEN 1024
#define TRIM_BYTES (1u << 20)

struct cell {
        _Alignas(64) _Atomic uint64_t gen; /* in use */
        _Atomic uint64_t forced;           /* in force */
};

struct mesh {
        _Atomic(struct mesh_view *) newest;
        struct cell *cells;
        unsigned readers;
        _Atomic uint32_t adopted; /* futex: counts views that came into force with a reader */
        _Atomic uint32_t waiting; /* the writer is in mesh_sync */

        /* The writer's. */
        struct bin bin;
        struct interns names;
        struct decoder *decoder;
        uint64_t next_record;
        bool trim; /* a large batch came: what it left free goes back to the kernel */
};

/* ---- readers ---- */

static void touch(struct mesh *m)
{
        atomic_fetch_add(&m->adopted, 1);
        if (atomic_load(&m->waiting))
                syscall(SYS_futex, &m->adopted, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

const struct mesh_view *mesh_view(struct mesh *m, unsigned reader)
{
        _Atomic uint64_t *cell = &m->cells[reader].gen;
        uint64_t mine = atomic_load_explicit(cell, memory_order_relaxed);
        if (mine == GEN_NONE) { /* waited for from now on */
                atomic_store(&m->cells[reader].forced, 0);
                atomic_store(cell, GEN_ALL);
        }
        const struct mesh_view *v = atomic_load(&m->newest);
        if (v->gen != mine)
                atomic_store(cell, v->gen);
        return v;
}

void mesh_in_force(struct mesh *m, unsigned reader)
{
        struct cell *c = &m->cells[reader];
        atomic_store(&c->forced, atomic_load_explicit(&c->gen, memory_order_relaxed));
        touch(m);
}

void mesh_leave(struct mesh *m, unsigned reader)
{
        atomic_store(&m->cells[reader].gen, GEN_NONE);
        atomic_store(&m->cells[reader].forced, GEN_NONE);
        touch(m);
}

uint64_t view_generation(const struct mesh_view *v)
{
        return v->gen;
}

/* ---- generations ---- */

static struct mesh_view *newest(struct mesh *m)
{
        return atomic_load_explicit(&m->newest, memory_order_relaxed);
}

static struct mesh_view *view_begin(struct mesh *m)
{
        struct mesh_view *v = must_grow(NULL, sizeof(*v));
        memcpy(v, newest(m), sizeof(*v));
        v->gen++;
        m->bin.gen = v->gen;
        return v;
}

static void settings_free(struct view_settings *s)
{
        free(s->network);
        free(s->cluster_id);
        free(s->trust_domain);
        free(s->root_namespace);
        free(s->cidrs);
        free(s);
}

static void bury(struct mesh *m, const struct dead *d)
{
        struct endpoints *e = d->block;
        switch (d->kind) {
        case DEAD_BLOCK:
                free(d->block);
                break;
        case DEAD_SETTINGS:
                settings_free(d->block);
                break;
        case DEAD_WORKLOAD:
                record_free_workload(&m->names, d->block);
                break;
        case DEAD_SERVICE:
                record_free_service(&m->names, d->block);
                break;
        case DEAD_POLICY:
                record_free_policy(&m->names, d->block);
                break;
        case DEAD_ENDPOINTS: /* the set was binned on its own, if it was not passed on */
                intern_drop(&m->names, e->service);
                free(e);
                break;
        case DEAD_SCOPE:
                intern_drop(&m->names, ((struct scope *)d->block)->namespace_);
                free(d->block);
                break;
        }
}

static uint64_t oldest(struct mesh *m, bool in_force)
{
        uint64_t least = GEN_NONE;
        for (unsigned i = 0; i < m->readers; i++) {
                uint64_t g = atomic_load(in_force ? &m->cells[i].forced : &m->cells[i].gen);
                if (g < least)
                        least = g;
        }
        return least;
}

static void collect(struct mesh *m)
{
        uint64_t least = oldest(m, false);
        struct bin *b = &m->bin;
        while (b->head < b->len && b->queue[b->head].gen <= least)
                bury(m, &b->queue[b->head++]);
        if (b->head == b->len) {
                b->head = b->len = 0;
                if (b->cap > 4096) {
                        free(b->queue);
                        b->queue = NULL;
                        b->cap = 0;
                }
        } else if (b->head > b->len / 2) {
                memmove(b->queue, b->queue + b->head, (b->len - b->head) * sizeof(*b->queue));
                b->len -= b->head;
                b->head = 0;
        }
}

static void publish(struct mesh *m, struct mesh_view *v)
{
        struct mesh_view *old = newest(m);
        atomic_store(&m->newest, v);
        bin_add(&m->bin, old, DEAD_BLOCK);
        collect(m);
}

static uint64_t now_ms(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

int mesh_sync(struct mesh *m, void (*wake)(void *arg, unsigned reader), void *arg)
{
        uint64_t gen = newest(m)->gen, end = now_ms() + MESH_SYNC_MS;
        int r = 0;
        atomic_store(&m->waiting, 1);
        for (unsigned i = 0; i < m->readers; i++)
                if (wake && atomic_load(&m->cells[i].forced) < gen)
                        wake(arg, i);
        for (;;) {
                uint32_t seen = atomic_load(&m->adopted);
                if (oldest(m, true) >= gen)
                        break;
                uint64_t now = now_ms();
                if (now >= end) {
                        r = -ETIMEDOUT;
                        break;
                }
                struct timespec left = {.tv_sec = (time_t)((end - now) / 1000),
                                        .tv_nsec = (long)((end - now) % 1000) * 1000000};
                syscall(SYS_futex, &m->adopted, FUTEX_WAIT_PRIVATE, seen, &left, NULL, 0);
        }
        atomic_store(&m->waiting, 0);
        collect(m);
        if (m->trim) {
                malloc_trim(0);
                m->trim = false;
        }
        return r;
}

/* ---- indexes; the view is the one being built ---- */

static struct endpoints *endpoints_find(const struct mesh_view *v, const char *service, uint64_t hash)
{
        uint32_t at = 0;
        for (struct endpoints *e; (e = table_next(&v->endpoints, hash, &at)) != NULL;)
                if (e->service == service) /* interned */
                        return e;
        return NULL;
}

static struct endpoints *endpoints_writable(struct mesh *m, struct mesh_view *v, const char *service, bool make)
{
        uint64_t hash = hash_text(v, service);
        struct endpoints *e = endpoints_find(v, service, hash), *n;
        if ((e && e->gen == v->gen) || (!e && !make))
                return e;
        n = must_alloc(sizeof(*n));
        if (e) {
                *n = *e;
                table_remove(&v->endpoints, &m->bin, hash, e);
                bin_add(&m->bin, e, DEAD_ENDPOINTS);
        }
        n->service = intern(&m->names, service, strlen(service));
        n->gen = v->gen;
        table_insert(&v->endpoints, &m->bin, hash, n);
        return n;
}

static void workload_index(struct mesh *m, struct mesh_view *v, struct workload_record *w)
{
        uint64_t uid = hash_text(v, w->w.uid);
        table_insert(&v->workloads, &m->bin, uid, w);
        v->nworkloads++;
        for (unsigned i = 0; i < w->w.naddrs && !w->w.host_network; i++)
                table_insert(&v->addresses, &m->bin, hash_vip(v, w->w.network, &w->w.addrs[i], 128), w);
        for (unsigned i = 0; i < w->nservices; i++) {
                struct endpoints *e = endpoints_writable(m, v, w->services[i].service, true);
                if (w->w.capacity > e->max_capacity)
                        e->max_capacity = w->w.capacity;
                shard_insert(&e->set, &m->bin, uid, w);
        }
}

static void workload_remove(struct mesh *m, struct mesh_view *v, struct workload_record *w)
{
        uint64_t uid = hash_text(v, w->w.uid);
        table_remove(&v->workloads, &m->bin, uid, w);
        v->nworkloads--;
        for (unsigned i = 0; i < w->w.naddrs && !w->w.host_network; i++)
                table_remove(&v->addresses, &m->bin, hash_vip(v, w->w.network, &w->w.addrs[i], 128), w);
        for (unsigned i = 0; i < w->nservices; i++) {
                struct endpoints *e = endpoints_writable(m, v, w->services[i].service, false);
                shard_remove(&e->set, &m->bin, uid, w);
                if (!e->set) { /* made in this generation: no reader has seen it */
                        table_remove(&v->endpoints, &m->bin, hash_text(v, e->service), e);
                        bin_add(&m->bin, e, DEAD_ENDPOINTS);
                }
        }
        bin_add(&m->bin, w, DEAD_WORKLOAD);
}

static void service_index(struct mesh *m, struct mesh_view *v, struct service_record *s, bool add)
{
        uint64_t hash = hash_text(v, s->key);
        if (add)
                table_insert(&v->services, &m->bin, hash, s);
        else
                table_remove(&v->services, &m->bin, hash, s);
        v->nservices += add ? 1 : -1;
        for (unsigned i = 0; i < s->nvips; i++) {
                struct addr masked = addr_mask(&s->vips[i].addr, s->vips[i].prefix);
                hash = hash_vip(v, s->vips[i].network, &masked, s->vips[i].prefix);
                if (add)
                        table_insert(&v->vips, &m->bin, hash, s);
                else
                        table_remove(&v->vips, &m->bin, hash, s);
                v->prefixes[s->vips[i].prefix] += add ? 1 : -1;
        }
        if (!add)
                bin_add(&m->bin, s, DEAD_SERVICE);
}

/* ---- scopes ---- */

static unsigned place_of(const struct policy_record *p)
{
        return p->dry_run ? 2 : p->deny ? 0 : 1;
}

static int order(const struct policy_record *a, const struct policy_record *b)
{
        return place_of(a) != place_of(b) ? (int)place_of(a) - (int)place_of(b) : strcmp(a->r.name, b->r.name);
}

/* A copy that belongs to this generation, with room for one more. */
static struct scope *scope_writable(struct mesh *m, struct mesh_view *v, const char *ns)
{
        struct scope *s = (struct scope *)view_scope(v, ns), *n;
        uint64_t hash = hash_text(v, ns);
        if (s && s->gen == v->gen && s->n < s->cap)
                return s;
        unsigned cap = s && s->n >= 2 ? s->n + s->n / 2 : 4;
        n = must_alloc(sizeof(*n) + cap * sizeof(n->items[0]));
        if (s) {
                memcpy(n, s, sizeof(*s) + s->n * sizeof(s->items[0]));
                table_remove(&v->scopes, &m->bin, hash, s);
                bin_add(&m->bin, s, DEAD_SCOPE);
        }
        n->namespace_ = intern(&m->names, ns, strlen(ns));
        n->gen = v->gen;
        n->cap = cap;
        table_insert(&v->scopes, &m->bin, hash, n);
        return n;
}

/* Where it is, or belongs. */
static unsigned scope_find(const struct scope *s, const struct policy_record *p)
{
        unsigned low = 0, high = s->n;
        while (low < high) {
                unsigned middle = (low + high) / 2;
                if (order(s->items[middle], p) < 0)
                        low = middle + 1;
                else
                        high = middle;
        }
        return low;
}

static void scope_change(struct mesh *m, struct mesh_view *v, struct policy_record *p, bool add)
{
        struct scope *s = scope_writable(m, v, p->namespace_);
        unsigned at = scope_find(s, p), *count = place_of(p) == 0 ? &s->ndeny : &s->nallow;
        struct policy_record **here = &s->items[at];
        if (add) {
                memmove(here + 1, here, (s->n - at) * sizeof(*here));
                *here = p;
        } else {
                memmove(here, here + 1, (s->n - at - 1) * sizeof(*here));
        }
        s->n += add ? 1 : -1u;
        if (!p->dry_run)
                *count += add ? 1 : -1u;
        if (s->n == 0) {
                table_remove(&v->scopes, &m->bin, hash_text(v, s->namespace_), s);
                bin_add(&m->bin, s, DEAD_SCOPE);
        }
}

static void policy_index(struct mesh *m, struct mesh_view *v, struct policy_record *p, bool add)
{
        uint64_t hash = hash_text(v, p->r.name);
        v->npolicies += add ? 1 : -1;
        if (add)
                table_insert(&v->policies, &m->bin, hash, p);
        else
                table_remove(&v->policies, &m->bin, hash, p);
        if (p->scope != POLICY_SELECTOR)
                scope_change(m, v, p, add);
        if (!add)
                bin_add(&m->bin, p, DEAD_POLICY);
}

/* ---- batches ---- */

enum op { OP_ADDRESS_SET = 1, OP_ADDRESS_DEL, OP_POLICY_SET, OP_POLICY_DEL };
#define BATCH_FULL 1u
#define BATCH_HEADER 16
#define RECORD_HEADER 16

struct batch_record {
        enum op op;
        struct bytes name, version, body;
        struct bytes told; /* the name as it came, for the report */
};

static uint32_t le32(const uint8_t *p)
{
        return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Takes one record off the front. The bounds are compared before anything is added up: no length can wrap. */
static int batch_next(struct bytes *b, struct batch_record *r)
{
        if (b->len < RECORD_HEADER)
                return -EBADMSG;
        uint32_t op = le32(b->p);
        uint64_t name = le32(b->p + 4), version = le32(b->p + 8), body = le32(b->p + 12);
        uint64_t used = RECORD_HEADER + name + version + body, padded = (used + 7) & ~7ull;
        if (op < OP_ADDRESS_SET || op > OP_POLICY_DEL || !name || name > NAME_MAX_LEN || version > VERSION_MAX_LEN ||
            padded > b->len)
                return -EBADMSG;
        for (uint64_t i = used; i < padded; i++)
                if (b->p[i])
                        return -EBADMSG;
        r->op = op;
        r->name = r->told = (struct bytes){b->p + RECORD_HEADER, name};
        r->version = (struct bytes){r->name.p + name, version};
        r->body = (struct bytes){r->version.p + version, body};
        b->p += padded;
        b->len -= padded;
        return 0;
}

static int batch_check(const uint8_t *p, size_t len, uint32_t *flags)
{
        struct bytes b = {p + BATCH_HEADER, len - BATCH_HEADER};
        struct batch_record r;
        if (len < BATCH_HEADER || memcmp(p, "SSB1", 4) != 0 || le32(p + 12))
                return -EBADMSG;
        *flags = le32(p + 4);
        if (*flags & ~BATCH_FULL)
                return -EBADMSG;
        for (uint32_t n = le32(p + 8); n; n--)
                if (batch_next(&b, &r))
                        return -EBADMSG;
        return b.len ? -EBADMSG : 0;
}

struct report {
        char *at;
        size_t left;
};

/* Whole lines only: a cut reason would be taken for another. What is given comes from the batch: print nothing that
 * could be two lines. */
static void reject(struct report *r, struct bytes name, const char *reason)
{
        if (name.len > NAME_MAX_LEN)
                name.len = NAME_MAX_LEN;
        size_t len = name.len + 2 + strlen(reason) + 1;
        if (len >= r->left) {
                r->left = r->left ? 1 : 0; /* no later, shorter one either */
                return;
        }
        for (size_t i = 0; i < name.len; i++)
                *r->at++ = name.p[i] < 0x21 || name.p[i] == 0x7f ? '?' : (char)name.p[i];
        r->at += sprintf(r->at, ": %s\n", reason);
        r->left -= len;
}

static bool same(const struct record *a, const struct record *b)
{
        return a->body_hash == b->body_hash && a->body_len == b->body_len && strcmp(a->version, b->version) == 0;
}

static void apply_address(struct mesh *m, struct mesh_view *v, const struct batch_record *r, struct report *report)
{
        char name[NAME_MAX_LEN + 1];
        struct workload_record *w = NULL, *was;
        struct service_record *s = NULL, *had;
        memcpy(name, r->name.p, r->name.len);
        name[r->name.len] = 0;
        was = (struct workload_record *)view_workload_record(v, name);
        had = (struct service_record *)view_service(v, name);
        if (was)
                was->r.seen = v->gen;
        if (had)
                had->r.seen = v->gen;
        if (r->op == OP_ADDRESS_SET) {
                const char *bad = record_address(m->decoder, &m->names, r->name, r->version, r->body, &w, &s);
                if (bad) {
                        reject(report, r->told, bad);
                        return;
                }
        }
        if (w && was && same(&w->r, &was->r)) {
                record_free_workload(&m->names, w);
                return;
        }
        if (s && had && same(&s->r, &had->r)) {
                record_free_service(&m->names, s);
                return;
        }
        if (w) {
                bool equal = was && w->r.body_hash == was->r.body_hash && w->r.body_len == was->r.body_len;
                w->w.record = equal ? was->w.record : ++m->next_record; /* a new version alone does not end tunnels */
                w->r.seen = v->gen;
        }
        if (s)
                s->r.seen = v->gen;
        if (was)
                workload_remove(m, v, was);
        if (had)
                service_index(m, v, had, false);
        if (w)
                workload_index(m, v, w);
        if (s)
                service_index(m, v, s, true);
}

/* One that cannot be decoded keeps its last good version, else a stand-in denies in its place. Its name then is what a
 * line of the list of versions can hold: the server must hear that it is there. */
static void apply_policy(struct mesh *m, struct mesh_view *v, const struct batch_record *r, struct report *report)
{
        char name[NAME_MAX_LEN + 1];
        struct policy_record *p = NULL, *was;
        struct bytes safe = {(const uint8_t *)name, r->name.len};
        memcpy(name, r->name.p, r->name.len);
        name[r->name.len] = 0;
        if (record_check_name(r->name))
                for (size_t i = 0; i < r->name.len; i++)
                        if (name[i] <= ' ' || name[i] >= 0x7f)
                                name[i] = '?';
        was = (struct policy_record *)view_policy(v, name);
        if (was)
                was->r.seen = v->gen;
        if (r->op == OP_POLICY_SET) {
                const char *bad = record_policy(&m->names, r->name, r->version, r->body, &p);
                if (bad) {
                        reject(report, r->told, bad);
                        if (was && (!was->undecodable || strcmp(was->undecodable, bad) == 0))
                                return;
                        p = record_stand_in(&m->names, safe, v->settings->root_namespace, bad);
                }
                p->r.seen = v->gen;
                p->serial = ++m->next_record;
        }
        if (p && was && !p->undecodable && !was->undecodable && same(&p->r, &was->r)) {
                record_free_policy(&m->names, p);
                return;
        }
        if (was)
                policy_index(m, v, was, false);
        if (p)
                policy_index(m, v, p, true);
}

/* After a full batch: what it did not name goes. Collected first, for removal moves what is iterated. */
static void sweep(struct mesh *m, struct mesh_view *v)
{
        uint64_t most = v->nworkloads + v->nservices + v->npolicies;
        void **gone = must_alloc(most * sizeof(*gone));
        size_t n = 0;
        TABLE_EACH(&v->workloads, w, struct workload_record)
        if (w->r.seen != v->gen)
                gone[n++] = w;
        for (size_t i = 0; i < n; i++)
                workload_remove(m, v, gone[i]);
        n = 0;
        TABLE_EACH(&v->services, s, struct service_record)
        if (s->r.seen != v->gen)
                gone[n++] = s;
        for (size_t i = 0; i < n; i++)
                service_index(m, v, gone[i], false);
        n = 0;
        TABLE_EACH(&v->policies, p, struct policy_record)
        if (p->r.seen != v->gen)
                gone[n++] = p;
        for (size_t i = 0; i < n; i++)
                policy_index(m, v, gone[i], false);
        free(gone);
}

int mesh_apply(struct mesh *m, const uint8_t *batch, size_t len, char *report, size_t report_len)
{
        struct report out = {report, report_len};
        struct batch_record r;
        uint32_t flags;
        if (report_len)
                *report = 0;
        if (len < BATCH_HEADER || batch_check(batch, len, &flags))
                return -EBADMSG;
        struct mesh_view *v = view_begin(m);
        struct bytes b = {batch + BATCH_HEADER, len - BATCH_HEADER};
        while (b.len && !batch_next(&b, &r)) {
                if (r.op == OP_ADDRESS_SET || r.op == OP_ADDRESS_DEL)
                        apply_address(m, v, &r, &out);
                else
                        apply_policy(m, v, &r, &out);
        }
        if (flags & BATCH_FULL)
                sweep(m, v);
        publish(m, v);
        m->trim |= len >= TRIM_BYTES;
        return 0;
}

/* The name under which a policy is held: its own. One that is empty or too long for a record must not be passed over:
 * it comes under one that begins alike, so that it is in force, or stood in for, in its namespace. */
static struct bytes policy_name(const struct mesh *m, struct bytes name, char space[NAME_MAX_LEN + 1])
{
        size_t n = NAME_MAX_LEN - 32;
        if (name.len && name.len <= NAME_MAX_LEN)
                return name;
        if (n > name.len)
                n = name.len;
        while (n && (name.p[n] & 0xc0) == 0x80) /* whole characters */
                n--;
        if (n)
                memcpy(space, name.p, n);
        n += (size_t)sprintf(space + n, "~%016llx", (unsigned long long)hash_bytes(name.p, name.len, m->names.seed));
        return (struct bytes){(const uint8_t *)space, n};
}

static void apply_delta(struct mesh *m, struct mesh_view *v, const struct delta *d, bool policies, struct report *out)
{
        char space[NAME_MAX_LEN + 1];
        struct delta_resource x;
        struct batch_record r = {.op = policies ? OP_POLICY_DEL : OP_ADDRESS_DEL};
        struct bytes at = d->message;
        while (d->removed && delta_removed(&at, &r.told)) {
                r.name = policies ? policy_name(m, r.told, space) : r.told;
                if (policies)
                        apply_policy(m, v, &r, out);
                else if (r.name.len && r.name.len <= NAME_MAX_LEN) /* else it never was one */
                        apply_address(m, v, &r, out);
        }
        r.op = policies ? OP_POLICY_SET : OP_ADDRESS_SET;
        for (at = d->message; delta_resource(&at, &x);) {
                r.told = x.name;
                r.name = policies ? policy_name(m, x.name, space) : x.name;
                r.body = x.body;
                r.version = x.version.len > VERSION_MAX_LEN ? (struct bytes){0} : x.version;
                if (policies)
                        apply_policy(m, v, &r, out);
                else if (!r.name.len || r.name.len > NAME_MAX_LEN)
                        reject(out, r.told, "a name of no bytes, or of more than 2048");
                else
                        apply_address(m, v, &r, out);
        }
}

int mesh_apply_delta(struct mesh *m, const uint8_t *message, size_t len, struct tunnel_delta *told, char *report,
                     size_t report_len)
{
        struct report out = {report, report_len};
        struct delta d;
        if (report_len)
                *report = 0;
        if (delta_open(&d, (struct bytes){message, len}) || d.type_url.len >= sizeof(told->type_url) ||
            d.nonce.len >= sizeof(told->nonce))
                return -EBADMSG;
        *told = (struct tunnel_delta){.resources = d.resources, .removed = d.removed};
        if (d.type_url.len)
                memcpy(told->type_url, d.type_url.p, d.type_url.len);
        if (d.nonce.len)
                memcpy(told->nonce, d.nonce.p, d.nonce.len);
        bool policies = strcmp(told->type_url, MESH_AUTHORIZATION) == 0;
        if (!policies && strcmp(told->type_url, MESH_ADDRESS) != 0)
                return 0;
        struct mesh_view *v = view_begin(m);
        apply_delta(m, v, &d, policies, &out);
        publish(m, v);
        m->trim |= len >= TRIM_BYTES;
        return 0;
}

/* ---- settings, life ---- */

static int parse_cidr(const char *s, size_t len, struct cidr *out)
{
        char buf[64], *slash, *end;
        if (!len || len >= sizeof(buf))
                return -EINVAL;
        memcpy(buf, s, len);
        buf[len] = 0;
        slash = strchr(buf, '/');
        if (slash)
                *slash = 0;
        struct in_addr a4;
        struct in6_addr a6;
        unsigned long bits = 32, prefix;
        if (inet_pton(AF_INET, buf, &a4) == 1) {
                addr_from_bytes(&out->addr, (const uint8_t *)&a4, 4);
        } else if (inet_pton(AF_INET6, buf, &a6) == 1) {
                addr_from_bytes(&out->addr, (const uint8_t *)&a6, 16);
                bits = 128;
        } else {
                return -EINVAL;
        }
        prefix = bits;
        if (slash) {
                if (slash[1] < '0' || slash[1] > '9')
                        return -EINVAL;
                prefix = strtoul(slash + 1, &end, 10);
                if (*end || prefix > bits)
                        return -EINVAL;
        }
        out->prefix = (uint8_t)(prefix + 128 - bits);
        return 0;
}

static char *copy(const char *s, const char *otherwise)
{
        if (!s || !*s)
                s = otherwise;
        size_t n = strlen(s) + 1;
        return memcpy(must_alloc(n), s, n);
}

static struct view_settings *settings_new(const struct tunnel_settings *s)
{
        struct view_settings *n = must_alloc(sizeof(*n));
        n->network = copy(s->network, "");
        n->cluster_id = copy(s->cluster_id, "Kubernetes");
        n->trust_domain = copy(s->trust_domain, "cluster.local");
        n->root_namespace = copy(s->root_namespace, "istio-system");
        n->unknown_pass = s->unknown_pass;
        return n;
}

int mesh_settings(struct mesh *m, const struct tunnel_settings *s)
{
        struct view_settings *n = settings_new(s);
        const char *p = s->cluster_cidrs ? s->cluster_cidrs : "";
        while (*p) {
                size_t len = strcspn(p, ",");
                n->cidrs = must_grow(n->cidrs, (n->ncidrs + 1) * sizeof(*n->cidrs));
                if (parse_cidr(p, len, &n->cidrs[n->ncidrs++])) {
                        settings_free(n);
                        return -EINVAL;
                }
                p += len;
                p += *p == ',';
        }
        struct mesh_view *v = view_begin(m);
        bin_add(&m->bin, (void *)v->settings, DEAD_SETTINGS);
        v->settings = n;
        publish(m, v);
        return 0;
}

int mesh_new(struct mesh **out, unsigned readers)
{
        static const struct tunnel_settings none;
        struct mesh *m = must_alloc(sizeof(*m));
        struct mesh_view *v = must_alloc(sizeof(*v));
        m->cells = aligned_alloc(64, (readers ? readers : 1) * sizeof(*m->cells));
        if (!m->cells)
                abort();
        m->readers = readers;
        for (unsigned i = 0; i < readers; i++) {
                atomic_init(&m->cells[i].gen, GEN_NONE);
                atomic_init(&m->cells[i].forced, GEN_NONE);
        }
        m->names.seed = hash_seed();
        m->decoder = decoder_new();
        v->gen = GEN_ALL + 1;
        v->seed = hash_seed();
        v->settings = settings_new(&none);
        atomic_init(&m->newest, v);
        *out = m;
        return 0;
}

/* No reader may be left. */
void mesh_free(struct mesh *m)
{
        struct mesh_view *v;
        if (!m)
                return;
        v = view_begin(m);
        sweep(m, v); /* nothing was seen in this generation: all goes */
        for (unsigned i = 0; i < m->readers; i++)
                atomic_store(&m->cells[i].gen, GEN_NONE);
        publish(m, v);
        settings_free((struct view_settings *)v->settings);
        free(v);
        free(m->bin.queue);
        interns_free(&m->names);
        decoder_free(m->decoder);
        free(m->cells);
        free(m);
}

void mesh_counts(struct mesh *m, struct mesh_counts *out)
{
        const struct mesh_view *v = newest(m);
        *out = (struct mesh_counts){v->nworkloads, v->nservices, v->npolicies};
}

const struct mesh_view *mesh_newest(struct mesh *m)
{
        return newest(m);
}
