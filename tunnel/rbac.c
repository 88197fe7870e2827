/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. The one place where it is decided whether a connection may reach a workload: for inbound HBONE,
 * for inbound plaintext and for two pods of one node. A pure function of the view and the request; it allocates
 * nothing, formats nothing and waits for nothing.
 *
 * Evaluation is that of reference ztunnel.md 5. Considered are the policies of the workload's namespace, those of the
 * mesh, and those that its record names; each found by one hash lookup, so that others cost nothing. Order: a policy
 * that denies and matches; a named one that has not come yet (it may deny); one that allows and matches; none that
 * allows at all; else denied. Dry runs never decide: the first DRY_RUNS_MAX are looked at, so that what would have
 * been denied can be counted.
 *
 * The identity is split once. A missing one is empty text: lists of what must be do not match (but an exact "" as
 * namespace), lists of what must not be do. Addresses are compared in the mapped form; IPv4 nets never hold an IPv6
 * address, nor the other way round.
 */
#include "rbac.h"
#include "state.h"

#define DRY_RUNS_MAX 32

struct span {
        const char *p;
        size_t len;
};

/* What a connection is, taken apart. */
struct caller {
        struct span principal, namespace_, account; /* principal: without spiffe:// */
        bool known;
        uint64_t source[2], destination[2];
        bool source_v4, destination_v4;
        uint16_t port;
};

static void split(const char *uri, struct caller *c)
{
        struct span none = {"", 0};
        c->principal = c->namespace_ = c->account = none;
        c->known = false;
        if (!uri || strncmp(uri, "spiffe://", 9) != 0)
                return;
        const char *td = uri + 9, *ns = strchr(td, '/');
        if (!ns || ns == td || strncmp(ns, "/ns/", 4) != 0)
                return;
        const char *name = ns + 4, *sa = strchr(name, '/');
        if (!sa || strncmp(sa, "/sa/", 4) != 0 || strchr(sa + 4, '/'))
                return;
        size_t account = strlen(sa + 4);
        c->principal = (struct span){td, (size_t)(sa + 4 - td) + account};
        c->namespace_ = (struct span){name, (size_t)(sa - name)};
        c->account = (struct span){sa + 4, account};
        c->known = true;
}

static void take_apart(const struct rbac_request *req, struct caller *c)
{
        split(req->identity, c);
        memcpy(c->source, &req->source.addr, sizeof(c->source));
        memcpy(c->destination, &req->destination.addr, sizeof(c->destination));
        c->source_v4 = addr_is_v4(&req->source.addr);
        c->destination_v4 = addr_is_v4(&req->destination.addr);
        c->port = req->destination.port;
}

/* ---- one policy ---- */

static bool text_hit(const struct policy_text *t, struct span s)
{
        switch (t->kind) {
        case TEXT_EXACT:
                return s.len == t->len && memcmp(s.p, t->text, s.len) == 0;
        case TEXT_PREFIX:
                return s.len >= t->len && memcmp(s.p, t->text, t->len) == 0;
        case TEXT_SUFFIX:
                return s.len >= t->len && memcmp(s.p + s.len - t->len, t->text, t->len) == 0;
        case TEXT_PRESENCE:
                return s.len > 0;
        }
        return false;
}

static bool net_hit(const struct policy_net *n, const uint64_t a[2], bool v4)
{
        uint64_t base[2], mask[2];
        memcpy(base, &n->base, sizeof(base));
        memcpy(mask, &n->mask, sizeof(mask));
        return n->v4 == v4 && (a[0] & mask[0]) == base[0] && (a[1] & mask[1]) == base[1];
}

static bool account_hit(const struct policy_account *a, const struct caller *c)
{
        return c->known && a->namespace_len == c->namespace_.len && a->account_len == c->account.len &&
               memcmp(a->namespace_, c->namespace_.p, a->namespace_len) == 0 &&
               memcmp(a->account, c->account.p, a->account_len) == 0;
}

static bool list_hit(const struct policy_record *p, enum policy_list list, struct policy_range r,
                     const struct caller *c)
{
        for (uint32_t i = r.first, end = r.first + r.count; i < end; i++) {
                bool hit = false;
                switch (list) {
                case LIST_NAMESPACES:
                        hit = text_hit(&p->texts[i], c->namespace_);
                        break;
                case LIST_PRINCIPALS: /* without an identity there is no spiffe:// to match after */
                        hit = c->known && text_hit(&p->texts[i], c->principal);
                        break;
                case LIST_SOURCE_IPS:
                        hit = net_hit(&p->nets[i], c->source, c->source_v4);
                        break;
                case LIST_DESTINATION_IPS:
                        hit = net_hit(&p->nets[i], c->destination, c->destination_v4);
                        break;
                case LIST_PORTS:
                        hit = p->ports[i] == c->port;
                        break;
                case LIST_ACCOUNTS:
                        hit = account_hit(&p->accounts[i], c);
                        break;
                case LISTS:
                        break;
                }
                if (hit)
                        return true;
        }
        return false;
}

/* One that has no list at all does not match. */
static bool match_holds(const struct policy_record *p, const struct policy_match *m, const struct caller *c)
{
        bool some = false;
        for (unsigned list = 0; list < LISTS; list += 2) {
                struct policy_range yes = m->lists[list], no = m->lists[list + 1];
                some |= yes.count || no.count;
                if (yes.count && !list_hit(p, (enum policy_list)list, yes, c))
                        return false;
                if (no.count && list_hit(p, (enum policy_list)list, no, c))
                        return false;
        }
        return some;
}

static bool clause_holds(const struct policy_record *p, const struct policy_clause *clause, const struct caller *c)
{
        for (uint32_t i = 0; i < clause->matches.count; i++)
                if (match_holds(p, &p->matches[clause->matches.first + i], c))
                        return true;
        return clause->matches.count == 0;
}

/* The number of the first rule that matches, or -1. */
static int policy_matches(const struct policy_record *p, const struct caller *c)
{
        for (unsigned r = 0; r < p->nrules; r++) {
                struct policy_range clauses = p->rules[r].clauses;
                uint32_t i = 0;
                while (i < clauses.count && clause_holds(p, &p->clauses[clauses.first + i], c))
                        i++;
                if (i == clauses.count)
                        return (int)r;
        }
        return -1;
}

/* ---- all that select a workload ---- */

struct selection {
        const struct mesh_view *v;
        const struct workload *w;
        const struct scope *near, *mesh; /* may be NULL */
};

static struct selection selection_of(const struct mesh_view *v, const struct workload *w)
{
        return (struct selection){v, w, view_scope(v, w->namespace_), view_scope(v, "")};
}

enum kind { KIND_DENY, KIND_ALLOW, KIND_DRY_RUN };

static enum kind kind_of(const struct policy_record *p)
{
        return p->dry_run ? KIND_DRY_RUN : p->deny ? KIND_DENY : KIND_ALLOW;
}

struct search {
        const struct policy_record *hit, *first; /* that matches; that there is */
        int rule;
        const char *missing_name; /* of one that the record names and nobody has sent */
};

static bool try_policy(const struct policy_record *p, const struct caller *c, struct search *s)
{
        if (!s->first)
                s->first = p;
        s->rule = policy_matches(p, c);
        if (s->rule < 0)
                return false;
        s->hit = p;
        return true;
}

static bool try_scope(const struct scope *scope, enum kind kind, const struct caller *c, struct search *s)
{
        unsigned from = !scope || kind == KIND_DENY ? 0 : scope->ndeny;
        unsigned count = !scope ? 0 : kind == KIND_DENY ? scope->ndeny : scope->nallow;
        for (unsigned i = from; i < from + count; i++)
                if (try_policy(scope->items[i], c, s))
                        return true;
        return false;
}

/* Enforced policies of one kind: the first that matches. */
static void search(const struct selection *sel, enum kind kind, const struct caller *c, struct search *s)
{
        *s = (struct search){.rule = -1};
        if (try_scope(sel->near, kind, c, s) || try_scope(sel->mesh, kind, c, s))
                return;
        for (unsigned i = 0; i < sel->w->npolicies; i++) {
                const struct policy_record *p = view_policy(sel->v, sel->w->policies[i]);
                if (!p && !s->missing_name)
                        s->missing_name = sel->w->policies[i];
                if (p && kind_of(p) == kind && try_policy(p, c, s))
                        return;
        }
}

struct dry {
        const struct policy_record *denies, *allows; /* allows: there is one */
        bool allowed;
        unsigned seen;
};

static void dry_policy(struct dry *d, const struct policy_record *p, const struct caller *c)
{
        if (d->seen == DRY_RUNS_MAX)
                return;
        d->seen++;
        bool hit = policy_matches(p, c) >= 0;
        if (p->deny && hit && !d->denies)
                d->denies = p;
        if (!p->deny && !d->allows)
                d->allows = p;
        d->allowed |= !p->deny && hit;
}

static const char *dry_run(const struct selection *sel, const struct caller *c, bool enforced_allow)
{
        const struct scope *scopes[] = {sel->near, sel->mesh};
        struct dry d = {0};
        for (unsigned k = 0; k < 2; k++)
                for (unsigned i = scopes[k] ? scopes[k]->ndeny + scopes[k]->nallow : 0; scopes[k] && i < scopes[k]->n;
                     i++)
                        dry_policy(&d, scopes[k]->items[i], c);
        for (unsigned i = 0; i < sel->w->npolicies; i++) {
                const struct policy_record *p = view_policy(sel->v, sel->w->policies[i]);
                if (p && p->dry_run)
                        dry_policy(&d, p, c);
        }
        if (d.denies)
                return d.denies->r.name;
        return d.allows && !d.allowed && !enforced_allow ? d.allows->r.name : NULL;
}

static void verdict(struct rbac_verdict *out, enum rbac_reason reason, const struct policy_record *p, int rule)
{
        out->reason = reason;
        out->allow = reason == RBAC_OPEN || reason == RBAC_NOT_DENIED || reason == RBAC_ALLOWED;
        out->policy = p ? p->r.name : "";
        out->rule = rule;
}

void rbac_decide(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req,
                 struct rbac_verdict *out)
{
        struct selection sel = selection_of(v, dst);
        struct caller c;
        struct search deny, allow;
        out->dry_run = NULL;
        if (!sel.near && !sel.mesh && !dst->npolicies) {
                verdict(out, RBAC_OPEN, NULL, -1);
                return;
        }
        take_apart(req, &c);
        search(&sel, KIND_DENY, &c, &deny);
        if (deny.hit) {
                verdict(out, RBAC_DENIED, deny.hit, deny.rule);
                return;
        }
        if (deny.missing_name) {
                verdict(out, RBAC_NOT_RECEIVED, NULL, -1);
                out->policy = deny.missing_name;
                return;
        }
        search(&sel, KIND_ALLOW, &c, &allow);
        if (allow.hit)
                verdict(out, RBAC_ALLOWED, allow.hit, allow.rule);
        else if (allow.first)
                verdict(out, RBAC_NOT_ALLOWED, allow.first, -1);
        else
                verdict(out, deny.first ? RBAC_NOT_DENIED : RBAC_OPEN, NULL, -1);
        if (out->allow)
                out->dry_run = dry_run(&sel, &c, allow.first != NULL);
}

/* What of one match does not hold. */
static unsigned match_misses(const struct policy_record *p, const struct policy_match *m, const struct caller *c)
{
        unsigned missed = 0;
        bool some = false;
        for (unsigned list = 0; list < LISTS; list += 2) {
                struct policy_range yes = m->lists[list], no = m->lists[list + 1];
                some |= yes.count || no.count;
                if (yes.count && !list_hit(p, (enum policy_list)list, yes, c))
                        missed |= 1u << list;
                if (no.count && list_hit(p, (enum policy_list)list, no, c))
                        missed |= 1u << (list + 1);
        }
        return some ? missed : 1u << LISTS;
}

unsigned rbac_missed(const struct policy_record *p, unsigned rule, const struct rbac_request *req)
{
        struct policy_range clauses = p->rules[rule].clauses;
        struct caller c;
        unsigned missed = 0;
        take_apart(req, &c);
        for (uint32_t i = clauses.first; i < clauses.first + clauses.count; i++) {
                struct policy_range matches = p->clauses[i].matches;
                for (uint32_t k = 0; k < matches.count && !clause_holds(p, &p->clauses[i], &c); k++)
                        missed |= match_misses(p, &p->matches[matches.first + k], &c);
        }
        return missed;
}

void rbac_consider(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req, unsigned most,
                   void (*each)(void *arg, const struct policy_record *p, int rule), void *arg)
{
        struct selection sel = selection_of(v, dst);
        const struct scope *scopes[] = {sel.near, sel.mesh};
        struct caller c;
        take_apart(req, &c);
        for (unsigned k = 0; k < 2; k++)
                for (unsigned i = 0; scopes[k] && i < scopes[k]->n && most; i++, most--)
                        each(arg, scopes[k]->items[i], policy_matches(scopes[k]->items[i], &c));
        for (unsigned i = 0; i < dst->npolicies && most; i++) {
                const struct policy_record *p = view_policy(v, dst->policies[i]);
                if (p) {
                        each(arg, p, policy_matches(p, &c));
                        most--;
                }
        }
}

const char *rbac_text(const struct rbac_verdict *verdict, char *out, size_t n)
{
        switch (verdict->reason) {
        case RBAC_OPEN:
                snprintf(out, n, "no policy selects the workload");
                break;
        case RBAC_NOT_DENIED:
                snprintf(out, n, "no policy denies, and there are no allow policies");
                break;
        case RBAC_ALLOWED:
                snprintf(out, n, "allowed by: %s", verdict->policy);
                break;
        case RBAC_DENIED:
                snprintf(out, n, "explicitly denied by: %s", verdict->policy);
                break;
        case RBAC_NOT_ALLOWED:
                snprintf(out, n, "allow policies exist, but none allowed");
                break;
        case RBAC_NOT_RECEIVED:
                snprintf(out, n, "policy not received yet: %s", verdict->policy);
                break;
        }
        return out;
}
