/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. The state of the mesh as text, for the command line and for a new agent that reconciles. Runs on
 * the control thread, which is the writer of the state: the newest view cannot change meanwhile. Text is gathered in 64
 * KiB pieces and written to an fd that is a memfd, so nothing waits.
 */
#include "mesh.h"
#include "state.h"
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

struct text {
        int fd, error;
        size_t len;
        char buf[65536];
};

static void flush(struct text *t)
{
        size_t at = 0;
        while (!t->error && at < t->len) {
                ssize_t n = write(t->fd, t->buf + at, t->len - at);
                if (n > 0)
                        at += (size_t)n;
                else if (errno != EINTR)
                        t->error = n ? -errno : -EIO;
        }
        t->len = 0;
}

static void put(struct text *t, const char *s, size_t n)
{
        while (n) {
                size_t room = sizeof(t->buf) - t->len, k = n < room ? n : room;
                memcpy(t->buf + t->len, s, k);
                t->len += k;
                s += k;
                n -= k;
                if (t->len == sizeof(t->buf))
                        flush(t);
        }
}

static void raw(struct text *t, const char *s)
{
        put(t, s, strlen(s));
}

/* Records hold UTF-8 without control characters: only these two are special in JSON. */
static void quoted(struct text *t, const char *s)
{
        put(t, "\"", 1);
        for (size_t n; *s; s += n) {
                n = strcspn(s, "\"\\");
                put(t, s, n);
                if (s[n]) {
                        put(t, "\\", 1);
                        put(t, s + n++, 1);
                }
        }
        put(t, "\"", 1);
}

static void key(struct text *t, const char *name)
{
        raw(t, ",\"");
        raw(t, name);
        raw(t, "\":");
}

static void member(struct text *t, const char *name, const char *value)
{
        key(t, name);
        quoted(t, value);
}

static void integer(struct text *t, const char *name, uint64_t value)
{
        char buf[24];
        key(t, name);
        snprintf(buf, sizeof(buf), "%llu", (unsigned long long)value);
        raw(t, buf);
}

static void boolean(struct text *t, const char *name, bool value)
{
        key(t, name);
        raw(t, value ? "true" : "false");
}

static void comma(struct text *t, unsigned i)
{
        if (i)
                raw(t, ",");
}

static void port_map(struct text *t, const struct port_pair *p, unsigned n)
{
        char buf[32];
        raw(t, "{");
        for (unsigned i = 0; i < n; i++) {
                comma(t, i);
                snprintf(buf, sizeof(buf), "\"%u\":%u", p[i].service, p[i].target);
                raw(t, buf);
        }
        raw(t, "}");
}

static void strings(struct text *t, const char *name, const char *const *list, unsigned n)
{
        key(t, name);
        raw(t, "[");
        for (unsigned i = 0; i < n; i++) {
                comma(t, i);
                quoted(t, list[i]);
        }
        raw(t, "]");
}

static void workload(struct text *t, const struct workload_record *r)
{
        const struct workload *w = &r->w;
        char ip[ENDPOINT_STRLEN];
        raw(t, "{\"uid\":");
        quoted(t, w->uid);
        member(t, "name", w->name);
        member(t, "namespace", w->namespace_);
        member(t, "service_account", w->service_account);
        member(t, "identity", w->identity);
        member(t, "trust_domain", w->trust_domain);
        member(t, "network", w->network);
        member(t, "node", w->node);
        member(t, "cluster_id", w->cluster_id);
        member(t, "canonical_name", w->canonical_name);
        member(t, "canonical_revision", w->canonical_revision);
        member(t, "workload_name", w->workload_name);
        member(t, "workload_type", w->workload_type);
        member(t, "region", w->region);
        member(t, "zone", w->zone);
        member(t, "subzone", w->subzone);
        member(t, "protocol", w->protocol == MESH_HBONE ? "HBONE" : "PLAIN");
        boolean(t, "healthy", w->healthy);
        boolean(t, "waypoint", w->has_waypoint);
        boolean(t, "host_network", w->host_network);
        integer(t, "capacity", w->capacity);
        strings(t, "policies", w->policies, w->npolicies);
        key(t, "addresses");
        raw(t, "[");
        for (unsigned i = 0; i < w->naddrs; i++) {
                comma(t, i);
                quoted(t, addr_format(&w->addrs[i], ip));
        }
        raw(t, "]");
        key(t, "services");
        raw(t, "{");
        for (unsigned i = 0; i < r->nservices; i++) {
                comma(t, i);
                quoted(t, r->services[i].service);
                raw(t, ":");
                port_map(t, r->services[i].ports, r->services[i].nports);
        }
        raw(t, "}");
        member(t, "version", r->r.version);
        raw(t, "}");
}

static void service(struct text *t, const struct mesh_view *v, const struct service_record *s)
{
        static const char *const modes[] = {"", "strict", "failover", "passthrough"};
        static const char *const families[] = {"automatic", "ipv4", "ipv6", "dual"};
        char ip[ENDPOINT_STRLEN], buf[16];
        uint64_t hash = hash_text(v, s->key);
        uint32_t at = 0;
        const struct endpoints *e;
        raw(t, "{\"key\":");
        quoted(t, s->key);
        member(t, "name", s->name);
        member(t, "namespace", s->namespace_);
        member(t, "hostname", s->hostname);
        key(t, "addresses");
        raw(t, "[");
        for (unsigned i = 0; i < s->nvips; i++) {
                const struct vip *x = &s->vips[i];
                unsigned prefix = addr_is_v4(&x->addr) ? x->prefix - 96u : x->prefix;
                comma(t, i);
                raw(t, "\"");
                raw(t, addr_format(&x->addr, ip));
                if (x->prefix < 128) {
                        snprintf(buf, sizeof(buf), "/%u", prefix);
                        raw(t, buf);
                }
                raw(t, "\"");
        }
        raw(t, "]");
        key(t, "ports");
        port_map(t, s->ports, s->nports);
        key(t, "endpoints");
        raw(t, "[");
        while ((e = table_next(&v->endpoints, hash, &at)) != NULL && e->service != s->key)
                ;
        for (uint32_t i = 0, n = 0; e && e->set && i <= e->set->mask; i++) {
                const struct workload_record *w = e->set->slots[i].value;
                if (w) {
                        comma(t, n++);
                        quoted(t, w->w.uid);
                }
        }
        raw(t, "]");
        strings(t, "subject_alt_names", s->sans, s->nsans);
        member(t, "load_balancing", modes[s->mode]);
        member(t, "ip_families", families[s->families]);
        boolean(t, "waypoint", s->has_waypoint);
        boolean(t, "canonical", s->canonical);
        boolean(t, "namespace_only", s->namespace_only);
        boolean(t, "allow_unhealthy", s->allow_unhealthy);
        member(t, "version", s->r.version);
        raw(t, "}");
}

/* One list of a match, in the words of ztunnel's dump (reference ztunnel.md 8.3). */
static void match_list(struct text *t, const struct policy_record *p, enum policy_list list, struct policy_range r)
{
        static const char *const kinds[] = {"Exact", "Prefix", "Suffix", "Presence"};
        char ip[ENDPOINT_STRLEN], buf[16];
        raw(t, "[");
        for (uint32_t i = r.first; i < r.first + r.count; i++) {
                comma(t, i > r.first);
                if (list == LIST_NAMESPACES || list == LIST_PRINCIPALS) {
                        raw(t, "{\"");
                        raw(t, kinds[p->texts[i].kind]);
                        raw(t, "\":");
                        if (p->texts[i].kind == TEXT_PRESENCE)
                                raw(t, "[]");
                        else
                                quoted(t, p->texts[i].text);
                        raw(t, "}");
                } else if (list == LIST_PORTS) {
                        snprintf(buf, sizeof(buf), "%u", p->ports[i]);
                        raw(t, buf);
                } else if (list == LIST_ACCOUNTS) {
                        raw(t, "{\"namespace\":");
                        quoted(t, p->accounts[i].namespace_);
                        member(t, "serviceAccount", p->accounts[i].account);
                        raw(t, "}");
                } else {
                        const struct policy_net *n = &p->nets[i];
                        snprintf(buf, sizeof(buf), "/%u", n->v4 ? n->prefix - 96u : n->prefix);
                        raw(t, "\"");
                        raw(t, addr_format(&n->base, ip));
                        raw(t, buf);
                        raw(t, "\"");
                }
        }
        raw(t, "]");
}

static void match(struct text *t, const struct policy_record *p, const struct policy_match *m)
{
        bool any = false;
        raw(t, "{");
        for (unsigned i = 0; i < LISTS; i++) {
                if (!m->lists[i].count)
                        continue;
                comma(t, any);
                any = true;
                quoted(t, policy_list_names[i]);
                raw(t, ":");
                match_list(t, p, (enum policy_list)(i & ~1u), m->lists[i]);
        }
        raw(t, "}");
}

static void policy(struct text *t, const struct policy_record *p)
{
        static const char *const scopes[] = {"Global", "Namespace", "WorkloadSelector"};
        raw(t, "{\"key\":");
        quoted(t, p->r.name);
        member(t, "name", p->name);
        member(t, "namespace", p->home);
        member(t, "scope", scopes[p->scope]);
        member(t, "action", p->deny ? "Deny" : "Allow");
        key(t, "rules");
        raw(t, "[");
        for (unsigned r = 0; r < p->nrules; r++) {
                struct policy_range clauses = p->rules[r].clauses;
                comma(t, r);
                raw(t, "[");
                for (uint32_t c = 0; c < clauses.count; c++) {
                        struct policy_range matches = p->clauses[clauses.first + c].matches;
                        comma(t, c);
                        raw(t, "[");
                        for (uint32_t m = 0; m < matches.count; m++) {
                                comma(t, m);
                                match(t, p, &p->matches[matches.first + m]);
                        }
                        raw(t, "]");
                }
                raw(t, "]");
        }
        raw(t, "]");
        boolean(t, "dryRun", p->dry_run);
        if (p->undecodable)
                member(t, "undecodable", p->undecodable);
        member(t, "version", p->r.version);
        raw(t, "}");
}

static void version(struct text *t, const char *kind, const struct record *r)
{
        raw(t, kind);
        raw(t, " ");
        raw(t, r->name);
        raw(t, " ");
        raw(t, r->version);
        raw(t, "\n");
}

static void versions(struct text *t, const struct mesh_view *v)
{
        TABLE_EACH(&v->workloads, w, struct workload_record)
        version(t, "address", &w->r);
        TABLE_EACH(&v->services, s, struct service_record)
        version(t, "address", &s->r);
        TABLE_EACH(&v->policies, p, struct policy_record)
        version(t, "policy", &p->r);
}

/* Each record has a line of its own, so that a reader can pass over what it does not look for. */
static void next_line(struct text *t, unsigned n)
{
        if (n)
                raw(t, ",\n");
}

int mesh_dump(struct mesh *m, const char *what, int fd)
{
        const struct mesh_view *v = mesh_newest(m);
        struct text *t = must_alloc(sizeof(*t));
        unsigned n = 0;
        int r;
        t->fd = fd;
        if (strcmp(what, "versions") == 0) {
                versions(t, v);
        } else if (strcmp(what, "workloads") == 0) {
                raw(t, "[\n");
                TABLE_EACH(&v->workloads, w, struct workload_record)
                {
                        next_line(t, n++);
                        workload(t, w);
                }
                raw(t, "\n]\n");
        } else if (strcmp(what, "services") == 0) {
                raw(t, "[\n");
                TABLE_EACH(&v->services, s, struct service_record)
                {
                        next_line(t, n++);
                        service(t, v, s);
                }
                raw(t, "\n]\n");
        } else if (strcmp(what, "policies") == 0) {
                raw(t, "[\n");
                TABLE_EACH(&v->policies, p, struct policy_record)
                {
                        next_line(t, n++);
                        policy(t, p);
                }
                raw(t, "\n]\n");
        } else {
                t->error = -EINVAL;
        }
        flush(t);
        r = t->error;
        free(t);
        return r;
}
