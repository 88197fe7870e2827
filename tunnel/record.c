/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. istio.workload.Address to records. A message is decoded in two steps: first into spans that
 * point into the body, then, once all of it was found good, into one block. Recursion is as deep as the messages we
 * know. Unknown fields are skipped after their framing was checked; unknown enum values are refused (but
 * Service.visibility, as ztunnel does), for a value that we do not know might ask for more protection than we give.
 * Field numbers: reference ztunnel.md 3.4. Nothing blocks.
 *
 * Longer than a file should be: one table of fields per message, and both messages share most of the parts.
 */
#include "record.h"
#include "table.h"
#include <stdlib.h>
#include <string.h>

#define NO_LIMIT UINT32_MAX
#define WORKLOAD_SERVICES_MAX 1024 /* they are compared pairwise */

/* ---- scratch ---- */

struct membership_span {
        struct bytes key;
        size_t first, count; /* in ports */
};

struct vip_span {
        struct bytes network;
        struct addr addr;
        uint8_t prefix;
};

struct list {
        void *items;
        size_t count, cap;
};

struct decoder {
        struct list addrs, policies, memberships, ports, vips, sans;
        struct list join;
};

static void *push(struct list *l, size_t size)
{
        if (l->count == l->cap) {
                l->cap = l->cap ? l->cap * 2 : 8;
                l->items = must_grow(l->items, l->cap * size);
        }
        return memset((char *)l->items + size * l->count++, 0, size);
}

struct decoder *decoder_new(void)
{
        return must_alloc(sizeof(struct decoder));
}

void decoder_free(struct decoder *d)
{
        struct list *all[] = {&d->addrs, &d->policies, &d->memberships, &d->ports, &d->vips, &d->sans, &d->join};
        for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
                free(all[i]->items);
        free(d);
}

/* ---- messages that several use ---- */

static const char *port(struct decoder *d, const struct field *in)
{
        struct bytes b;
        struct field f;
        uint32_t service = 0, target = 0;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = proto_number(&f, 65535, &service, PROTO_BAD_PORT);
                else if (f.number == 2)
                        bad = proto_number(&f, 65535, &target, PROTO_BAD_PORT);
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (!service)
                return PROTO_BAD_PORT;
        *(struct port_pair *)push(&d->ports, sizeof(struct port_pair)) =
                (struct port_pair){(uint16_t)service, (uint16_t)target};
        return NULL;
}

static const char *network_address(const struct field *in, struct vip_span *v)
{
        struct bytes b, raw = {0};
        struct field f;
        const char *bad = proto_message(in, &b);
        uint32_t length = NO_LIMIT;
        int r = 0;
        *v = (struct vip_span){.prefix = 128};
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = proto_text(&f, &v->network);
                else if (f.number == 2)
                        bad = proto_message(&f, &raw);
                else if (f.number == 3)
                        bad = proto_number(&f, 128, &length, "prefix length out of range");
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (addr_from_bytes(&v->addr, raw.p, raw.len))
                return PROTO_BAD_ADDRESS;
        if (length == NO_LIMIT)
                return NULL;
        if (raw.len == 4 ? length > 32 : addr_is_v4(&v->addr) && length < 96)
                return "prefix length out of range";
        v->prefix = (uint8_t)(raw.len == 4 ? length + 96 : length);
        return NULL;
}

/* Only whether it is there and well formed: waypoints and gateways come later. */
static const char *gateway(const struct field *in)
{
        struct bytes b, name;
        struct field f, x;
        struct vip_span v;
        const char *bad = proto_message(in, &b);
        bool named = false;
        uint32_t port_;
        int r = 0, q;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1) {
                        struct bytes inner;
                        bad = proto_message(&f, &inner);
                        while (!bad && (q = proto_next(&inner, &x)) != 0)
                                bad = q < 0 ? PROTO_TRUNCATED : x.number <= 2 ? proto_text(&x, &name) : NULL;
                        named = true;
                } else if (f.number == 2) {
                        bad = network_address(&f, &v);
                        named = true;
                } else if (f.number == 3) {
                        bad = proto_number(&f, 65535, &port_, PROTO_BAD_PORT);
                }
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        return named ? NULL : "waypoint or gateway without a destination";
}

static const char *packed_scope(const struct field *f, uint8_t scopes[LB_SCOPES_MAX], uint8_t *n)
{
        struct bytes b = f->bytes;
        uint64_t v = f->value;
        if (f->wire != WIRE_VARINT && f->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        do {
                if (f->wire == WIRE_LEN) {
                        if (!b.len)
                                return NULL;
                        if (proto_varint(&b, &v))
                                return PROTO_TRUNCATED;
                }
                if (v < SCOPE_REGION || v > SCOPE_NETWORK)
                        return PROTO_BAD_ENUM;
                if (*n == LB_SCOPES_MAX)
                        return "too many routing preferences";
                scopes[(*n)++] = (uint8_t)v;
        } while (f->wire == WIRE_LEN);
        return NULL;
}

/* ---- Workload ---- */

enum {
        W_NAME,
        W_NAMESPACE,
        W_NETWORK,
        W_TRUST_DOMAIN,
        W_ACCOUNT,
        W_NODE,
        W_CANONICAL,
        W_REVISION,
        W_WORKLOAD,
        W_CLUSTER,
        W_UID,
        W_HOSTNAME,
        W_REGION,
        W_ZONE,
        W_SUBZONE,
        W_TEXTS
};

struct workload_span {
        struct bytes text[W_TEXTS];
        uint32_t protocol, type, status, network_mode, capacity;
        bool waypoint, app_tunnel;
};

static const char *workload_services(struct decoder *d, const struct field *in)
{
        struct bytes b, list;
        struct field f, x;
        struct membership_span m = {.first = d->ports.count};
        const char *bad = proto_message(in, &b);
        int r = 0, q;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1) {
                        bad = proto_text(&f, &m.key);
                } else if (f.number == 2) {
                        bad = proto_message(&f, &list);
                        while (!bad && (q = proto_next(&list, &x)) != 0)
                                bad = q < 0 ? PROTO_TRUNCATED : x.number == 1 ? port(d, &x) : NULL;
                }
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (!m.key.len)
                return "service without a name";
        if (d->memberships.count == WORKLOAD_SERVICES_MAX)
                return "endpoint of too many services";
        m.count = d->ports.count - m.first;
        /* Of two entries with one key protobuf keeps the last. */
        struct membership_span *all = d->memberships.items;
        for (size_t i = 0; i < d->memberships.count; i++) {
                if (all[i].key.len == m.key.len && memcmp(all[i].key.p, m.key.p, m.key.len) == 0) {
                        all[i] = m;
                        return NULL;
                }
        }
        *(struct membership_span *)push(&d->memberships, sizeof(m)) = m;
        return NULL;
}

static const char *workload_nested(struct workload_span *w, const struct field *in)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        uint32_t x;
        int r = 0;
        if (in->number == 27)
                w->capacity = 0; /* google.protobuf.UInt32Value: present and empty is 0 */
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (in->number == 27 && f.number == 1)
                        bad = proto_number(&f, UINT32_MAX, &w->capacity, "capacity out of range");
                else if (in->number == 24 && f.number >= 1 && f.number <= 3)
                        bad = proto_text(&f, &w->text[W_REGION + f.number - 1]);
                else if (in->number == 23 && f.number == 1)
                        bad = proto_number(&f, 1, &x, PROTO_BAD_ENUM);
                else if (in->number == 23 && f.number == 2)
                        bad = proto_number(&f, 65535, &x, PROTO_BAD_PORT);
        }
        if (in->number == 23)
                w->app_tunnel = true;
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

static const char *workload_span(struct decoder *d, struct bytes b, struct workload_span *w)
{
        static const uint8_t texts[28] = {
                [1] = W_NAME + 1,      [2] = W_NAMESPACE + 1, [4] = W_NETWORK + 1,    [6] = W_TRUST_DOMAIN + 1,
                [7] = W_ACCOUNT + 1,   [9] = W_NODE + 1,      [10] = W_CANONICAL + 1, [11] = W_REVISION + 1,
                [13] = W_WORKLOAD + 1, [18] = W_CLUSTER + 1,  [20] = W_UID + 1,       [21] = W_HOSTNAME + 1,
        };
        struct field f;
        const char *bad = NULL;
        bool unused;
        int r = 0;
        *w = (struct workload_span){.capacity = 1};
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number < 28 && texts[f.number]) {
                        bad = proto_text(&f, &w->text[texts[f.number] - 1]);
                        continue;
                }
                switch (f.number) {
                case 3: {
                        struct addr a;
                        if (f.wire != WIRE_LEN)
                                bad = PROTO_WRONG_TYPE;
                        else if (addr_from_bytes(&a, f.bytes.p, f.bytes.len))
                                bad = PROTO_BAD_ADDRESS;
                        else
                                *(struct addr *)push(&d->addrs, sizeof(a)) = a;
                        break;
                }
                case 5:
                        bad = proto_number(&f, 2, &w->protocol, PROTO_BAD_ENUM);
                        if (!bad && w->protocol == 2)
                                bad = "the legacy tunnel protocol is not supported";
                        break;
                case 8:
                        w->waypoint = true;
                        bad = gateway(&f);
                        break;
                case 12:
                        bad = proto_number(&f, 3, &w->type, PROTO_BAD_ENUM);
                        break;
                case 14:
                        bad = proto_boolean(&f, &unused);
                        break;
                case 16: {
                        struct bytes name;
                        bad = proto_text(&f, &name);
                        if (!bad)
                                *(struct bytes *)push(&d->policies, sizeof(name)) = name;
                        break;
                }
                case 17:
                        bad = proto_number(&f, 1, &w->status, PROTO_BAD_ENUM);
                        break;
                case 19:
                        bad = gateway(&f);
                        break;
                case 22:
                        bad = workload_services(d, &f);
                        break;
                case 23:
                case 24:
                case 27:
                        bad = workload_nested(w, &f);
                        break;
                case 25:
                        bad = proto_number(&f, 1, &w->network_mode, PROTO_BAD_ENUM);
                        break;
                case 26:
                        bad = proto_framing(&f);
                        break;
                }
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

/* Hands out pieces of one block; a first pass with base NULL only counts. */
struct pack {
        char *base;
        size_t used;
};

static void *pack(struct pack *p, size_t size, size_t align)
{
        p->used = (p->used + align - 1) & ~(align - 1);
        void *at = p->base ? p->base + p->used : NULL;
        p->used += size;
        return at;
}

static const char *pack_text(struct pack *p, struct bytes b)
{
        char *at = pack(p, b.len + 1, 1);
        if (at) {
                if (b.len)
                        memcpy(at, b.p, b.len);
                at[b.len] = 0;
        }
        return at;
}

static const char *intern_text(struct interns *in, struct bytes b, const char *otherwise)
{
        return b.len ? intern(in, b.p, b.len) : intern(in, otherwise, strlen(otherwise));
}

static bool has_slash(struct bytes b)
{
        return b.len && memchr(b.p, '/', b.len);
}

static bool is_tail(struct bytes all, struct bytes end)
{
        return end.len && end.len < all.len && memcmp(all.p + all.len - end.len, end.p, end.len) == 0;
}

static const char *const WORKLOAD_TYPES[] = {"deployment", "cronjob", "pod", "job"};

static struct workload_record *workload_block(struct decoder *d, struct interns *in, const struct workload_span *w,
                                              struct bytes version)
{
        struct workload_record *x = NULL;
        const struct membership_span *spans = d->memberships.items;
        const struct bytes *names = d->policies.items;
        bool tail = is_tail(w->text[W_UID], w->text[W_NAME]); /* of 100 000 pods' uids: .../NAMESPACE/NAME */
        struct pack p = {0};
        for (int pass = 0; pass < 2; pass++) {
                if (pass)
                        p = (struct pack){.base = must_alloc(p.used)};
                x = pack(&p, sizeof(*x), _Alignof(struct workload_record));
                const char **policies = pack(&p, d->policies.count * sizeof(char *), sizeof(char *));
                struct membership *members = pack(&p, d->memberships.count * sizeof(*members), sizeof(char *));
                struct port_pair *ports = pack(&p, d->ports.count * sizeof(*ports), _Alignof(struct port_pair));
                struct addr *addrs = pack(&p, d->addrs.count * sizeof(*addrs), 1);
                const char *uid = pack_text(&p, w->text[W_UID]);
                const char *name = tail ? (uid ? uid + w->text[W_UID].len - w->text[W_NAME].len : NULL)
                                        : pack_text(&p, w->text[W_NAME]);
                const char *ver = pack_text(&p, version);
                if (!pass)
                        continue;
                x->w.uid = uid;
                x->w.name = name;
                x->r.name = uid;
                x->r.version = ver;
                x->w.addrs = addrs;
                x->w.policies = policies;
                x->services = members;
                if (d->addrs.count)
                        memcpy(addrs, d->addrs.items, d->addrs.count * sizeof(*addrs));
                if (d->ports.count)
                        memcpy(ports, d->ports.items, d->ports.count * sizeof(*ports));
                for (size_t i = 0; i < d->policies.count; i++)
                        policies[i] = intern(in, names[i].p, names[i].len);
                for (size_t i = 0; i < d->memberships.count; i++)
                        members[i] = (struct membership){.service = intern(in, spans[i].key.p, spans[i].key.len),
                                                         .ports = ports + spans[i].first,
                                                         .nports = (unsigned)spans[i].count};
        }
        x->w.naddrs = (unsigned)d->addrs.count;
        x->w.npolicies = (unsigned)d->policies.count;
        x->nservices = (unsigned)d->memberships.count;
        x->w.namespace_ = intern_text(in, w->text[W_NAMESPACE], "");
        x->w.service_account = intern_text(in, w->text[W_ACCOUNT], "default");
        x->w.trust_domain = intern_text(in, w->text[W_TRUST_DOMAIN], "cluster.local");
        x->w.network = intern_text(in, w->text[W_NETWORK], "");
        x->w.node = intern_text(in, w->text[W_NODE], "");
        x->w.cluster_id = intern_text(in, w->text[W_CLUSTER], "Kubernetes");
        x->w.canonical_name = intern_text(in, w->text[W_CANONICAL], "");
        x->w.canonical_revision = intern_text(in, w->text[W_REVISION], "");
        x->w.workload_name = intern_text(in, w->text[W_WORKLOAD], "");
        x->w.workload_type = WORKLOAD_TYPES[w->type];
        x->w.region = intern_text(in, w->text[W_REGION], "");
        x->w.zone = intern_text(in, w->text[W_ZONE], "");
        x->w.subzone = intern_text(in, w->text[W_SUBZONE], "");

        size_t len = strlen(x->w.trust_domain) + strlen(x->w.namespace_) + strlen(x->w.service_account) + 20;
        char *id = must_alloc(len);
        int n = snprintf(id, len, "spiffe://%s/ns/%s/sa/%s", x->w.trust_domain, x->w.namespace_, x->w.service_account);
        x->w.identity = intern(in, id, (size_t)n);
        free(id);

        x->w.protocol = w->protocol ? MESH_HBONE : MESH_PLAIN;
        x->w.healthy = w->status == 0;
        x->w.has_waypoint = w->waypoint;
        x->w.host_network = w->network_mode == 1;
        x->w.app_tunnel = w->app_tunnel;
        x->w.capacity = w->capacity;
        bool pod = strstr(x->w.uid, "//Pod/") != NULL;
        x->rank = (uint8_t)(pod ? 2 + (w->protocol != 0) : w->protocol != 0);
        return x;
}

static const char *decode_workload(struct decoder *d, struct interns *in, struct bytes name, struct bytes version,
                                   struct bytes body, struct workload_record **out)
{
        struct workload_span w;
        const char *bad = workload_span(d, body, &w);
        if (bad)
                return bad;
        if (w.text[W_UID].len != name.len || memcmp(w.text[W_UID].p, name.p, name.len) != 0)
                return "the resource's name is not the workload's uid";
        /* Else spiffe://TD/ns/A/sa/B could be made to name somebody else. */
        if (!w.text[W_NAMESPACE].len || has_slash(w.text[W_NAMESPACE]) || has_slash(w.text[W_ACCOUNT]) ||
            has_slash(w.text[W_TRUST_DOMAIN]))
                return "namespace, service account or trust domain cannot be part of an identity";
        *out = workload_block(d, in, &w, version);
        return NULL;
}

/* ---- Service ---- */

struct service_span {
        struct bytes name, namespace_, hostname;
        uint8_t scopes[LB_SCOPES_MAX], nscopes;
        uint32_t mode, health, families;
        bool waypoint, canonical, namespace_only;
};

static const char *load_balancing(struct service_span *s, const struct field *in)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = packed_scope(&f, s->scopes, &s->nscopes);
                else if (f.number == 2)
                        bad = proto_number(&f, LB_PASSTHROUGH, &s->mode, PROTO_BAD_ENUM);
                else if (f.number == 3)
                        bad = proto_number(&f, 1, &s->health, PROTO_BAD_ENUM);
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

static const char *weighted_waypoint(const struct field *in)
{
        struct bytes b;
        struct field f;
        uint32_t weight;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = gateway(&f);
                else if (f.number == 2)
                        bad = proto_number(&f, UINT32_MAX, &weight, "weight out of range");
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

static const char *service_span(struct decoder *d, struct bytes b, struct service_span *s)
{
        struct field f;
        struct vip_span v;
        const char *bad = NULL;
        bool unused;
        int r = 0;
        *s = (struct service_span){0};
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                switch (f.number) {
                case 1:
                        bad = proto_text(&f, &s->name);
                        break;
                case 2:
                        bad = proto_text(&f, &s->namespace_);
                        break;
                case 3:
                        bad = proto_text(&f, &s->hostname);
                        break;
                case 4:
                        bad = network_address(&f, &v);
                        if (!bad)
                                *(struct vip_span *)push(&d->vips, sizeof(v)) = v;
                        break;
                case 5:
                        bad = port(d, &f);
                        break;
                case 6: {
                        struct bytes san;
                        bad = proto_text(&f, &san);
                        /* What is no SPIFFE URI can never match a peer. */
                        if (!bad && san.len > 9 && memcmp(san.p, "spiffe://", 9) == 0)
                                *(struct bytes *)push(&d->sans, sizeof(san)) = san;
                        break;
                }
                case 7:
                        s->waypoint = true;
                        bad = gateway(&f);
                        break;
                case 8:
                        bad = load_balancing(s, &f);
                        break;
                case 9:
                        bad = proto_number(&f, FAMILIES_BOTH, &s->families, PROTO_BAD_ENUM);
                        break;
                case 10:
                        bad = proto_framing(&f);
                        break;
                case 11:
                        bad = proto_boolean(&f, &s->canonical);
                        break;
                case 12:
                        bad = proto_boolean(&f, &unused);
                        break;
                case 13:
                        s->waypoint = true;
                        bad = weighted_waypoint(&f);
                        break;
                case 14: /* unknown values are PUBLIC */
                        if (f.wire != WIRE_VARINT)
                                bad = PROTO_WRONG_TYPE;
                        else
                                s->namespace_only = f.value == 1;
                        break;
                }
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        return d->sans.count > ROUTE_SANS - 1 ? "too many subject alternative names" : NULL;
}

static struct service_record *service_block(struct decoder *d, struct interns *in, const struct service_span *s,
                                            struct bytes name, struct bytes version)
{
        struct service_record *x = NULL;
        const struct vip_span *spans = d->vips.items;
        const struct bytes *names = d->sans.items;
        struct pack p = {0};
        for (int pass = 0; pass < 2; pass++) {
                if (pass)
                        p = (struct pack){.base = must_alloc(p.used)};
                x = pack(&p, sizeof(*x), _Alignof(struct service_record));
                const char **sans = pack(&p, d->sans.count * sizeof(char *), sizeof(char *));
                struct vip *vips = pack(&p, d->vips.count * sizeof(*vips), _Alignof(struct vip));
                struct port_pair *ports = pack(&p, d->ports.count * sizeof(*ports), _Alignof(struct port_pair));
                const char *ver = pack_text(&p, version), *nm = pack_text(&p, s->name);
                if (!pass)
                        continue;
                x->r.version = ver;
                x->name = nm;
                x->sans = sans;
                x->vips = vips;
                x->ports = ports;
                if (d->ports.count)
                        memcpy(ports, d->ports.items, d->ports.count * sizeof(*ports));
                for (size_t i = 0; i < d->sans.count; i++)
                        sans[i] = intern(in, names[i].p, names[i].len);
                for (size_t i = 0; i < d->vips.count; i++)
                        vips[i] = (struct vip){.network = intern_text(in, spans[i].network, ""),
                                               .addr = spans[i].addr,
                                               .prefix = spans[i].prefix};
        }
        x->r.name = x->key = intern(in, name.p, name.len);
        x->namespace_ = intern(in, s->namespace_.p, s->namespace_.len);
        x->hostname = intern(in, s->hostname.p, s->hostname.len);
        x->nvips = (unsigned)d->vips.count;
        x->nports = (unsigned)d->ports.count;
        x->nsans = (unsigned)d->sans.count;
        memcpy(x->scopes, s->scopes, sizeof(x->scopes));
        x->nscopes = s->nscopes;
        x->mode = (uint8_t)s->mode;
        x->families = (uint8_t)s->families;
        x->allow_unhealthy = s->health == 1;
        x->canonical = s->canonical;
        x->namespace_only = s->namespace_only;
        x->has_waypoint = s->waypoint;
        return x;
}

static const char *decode_service(struct decoder *d, struct interns *in, struct bytes name, struct bytes version,
                                  struct bytes body, struct service_record **out)
{
        struct service_span s;
        const char *bad = service_span(d, body, &s);
        if (bad)
                return bad;
        size_t n = s.namespace_.len;
        if (!n || !s.hostname.len || has_slash(s.namespace_) || name.len != n + 1 + s.hostname.len ||
            name.p[n] != '/' || memcmp(name.p, s.namespace_.p, n) != 0 ||
            memcmp(name.p + n + 1, s.hostname.p, s.hostname.len) != 0)
                return "the resource's name is not the service's namespace/hostname";
        *out = service_block(d, in, &s, name, version);
        return NULL;
}

const char *record_check_name(struct bytes name)
{
        if (!proto_clean(name.p, name.len))
                return PROTO_BAD_TEXT;
        return memchr(name.p, ' ', name.len) ? "a name with a space" : NULL;
}

void record_fill(struct interns *in, struct record *r, struct bytes body)
{
        r->body_len = (uint32_t)body.len;
        r->body_hash = hash_bytes(body.p, body.len, in->seed);
}

const char *record_address(struct decoder *d, struct interns *in, struct bytes name, struct bytes version,
                           struct bytes body, struct workload_record **workload, struct service_record **service)
{
        struct list *all[] = {&d->addrs, &d->policies, &d->memberships, &d->ports, &d->vips, &d->sans};
        struct bytes b = body, inner = {0};
        struct field f;
        uint32_t kind = 0;
        const char *bad = record_check_name(name);
        int r = 0;
        for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
                all[i]->count = 0;
        if (!bad && !proto_clean(version.p, version.len))
                bad = PROTO_BAD_TEXT;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number != 1 && f.number != 2)
                        continue;
                if (kind)
                        return "more than one workload or service";
                kind = f.number;
                bad = proto_message(&f, &inner);
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (!kind)
                return "neither a workload nor a service";
        *workload = NULL;
        *service = NULL;
        if (kind == 1)
                bad = decode_workload(d, in, name, version, inner, workload);
        else
                bad = decode_service(d, in, name, version, inner, service);
        if (!bad)
                record_fill(in, kind == 1 ? &(*workload)->r : &(*service)->r, body);
        return bad;
}

/* ---- the end ---- */

void record_free_workload(struct interns *in, struct workload_record *x)
{
        const char *shared[] = {x->w.namespace_,    x->w.service_account, x->w.trust_domain,   x->w.network,
                                x->w.node,          x->w.cluster_id,      x->w.canonical_name, x->w.canonical_revision,
                                x->w.workload_name, x->w.region,          x->w.zone,           x->w.subzone,
                                x->w.identity};
        for (size_t i = 0; i < sizeof(shared) / sizeof(*shared); i++)
                intern_drop(in, shared[i]);
        for (unsigned i = 0; i < x->w.npolicies; i++)
                intern_drop(in, x->w.policies[i]);
        for (unsigned i = 0; i < x->nservices; i++)
                intern_drop(in, x->services[i].service);
        free(x);
}

void record_free_service(struct interns *in, struct service_record *x)
{
        for (unsigned i = 0; i < x->nvips; i++)
                intern_drop(in, x->vips[i].network);
        for (unsigned i = 0; i < x->nsans; i++)
                intern_drop(in, x->sans[i]);
        intern_drop(in, x->key);
        intern_drop(in, x->namespace_);
        intern_drop(in, x->hostname);
        free(x);
}

void record_free_policy(struct interns *in, struct policy_record *x)
{
        intern_drop(in, x->namespace_);
        free(x);
}
