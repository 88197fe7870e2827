/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. istio.security.Authorization to the compiled form that rbac.c evaluates: flat arrays in one
 * block, addresses mapped and masked, ports as integers, texts with their lengths. A body is read twice by the same
 * functions: the first pass checks it and counts what it holds, the second fills the block. What cannot be understood
 * is refused: a match without a value or an address of a wrong length must not be dropped, for an empty list
 * constrains nothing. Field numbers: reference ztunnel.md 3.5. Nothing blocks.
 */
#include "record.h"
#include "table.h"
#include <stdlib.h>
#include <string.h>

#define ITEMS_MAX (1u << 17) /* of each kind: an empty match is two bytes on the wire and a hundred here */
#define TOO_LARGE "a policy of more than 131072 parts"

enum {
        F_NAMESPACES = 1,
        F_PRINCIPALS = 3,
        F_SOURCE_IPS = 5,
        F_PORTS = 9,
        F_ACCOUNTS = 11,
        F_EXTENSIONS = 13,
};

const char *const policy_list_names[LISTS] = {
        "namespaces",       "notNamespaces",       "principals",      "notPrincipals",
        "sourceIps",        "notSourceIps",        "destinationIps",  "notDestinationIps",
        "destinationPorts", "notDestinationPorts", "serviceAccounts", "notServiceAccounts",
};

/* out NULL: the counting pass. */
struct compiler {
        unsigned rules, clauses, matches, texts, nets, ports, accounts;
        size_t text; /* bytes, each text with its NUL */
        struct policy_record *out;
        struct policy_rule *rule;
        struct policy_clause *clause;
        struct policy_match *match;
        struct policy_text *text_at;
        struct policy_net *net;
        uint16_t *port;
        struct policy_account *account;
        char *chars;
};

static const char *keep(struct compiler *c, struct bytes b)
{
        size_t at = c->text;
        c->text += b.len + 1;
        if (!c->out)
                return NULL;
        if (b.len)
                memcpy(c->chars + at, b.p, b.len);
        c->chars[at + b.len] = 0;
        return c->chars + at;
}

static const char *read_text(struct compiler *c, const struct field *in)
{
        struct bytes b, s = {(const uint8_t *)"", 0};
        struct field f;
        const char *bad = proto_message(in, &b);
        enum policy_text_kind kind = TEXT_EXACT;
        bool some = false;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number < 1 || f.number > 4)
                        continue;
                some = true; /* of several the last one counts, as in any oneof */
                kind = (enum policy_text_kind)(f.number - 1);
                if (kind == TEXT_PRESENCE)
                        bad = proto_framing(&f);
                else
                        bad = proto_text(&f, &s);
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        /* Dropping such a match would widen the policy: an empty list constrains nothing. */
        if (!some)
                return "a match without a value";
        if (kind == TEXT_PRESENCE)
                s.len = 0;
        const char *text = keep(c, s);
        if (c->out)
                c->text_at[c->texts] = (struct policy_text){.kind = kind, .len = (uint32_t)s.len, .text = text};
        return ++c->texts > ITEMS_MAX ? TOO_LARGE : NULL;
}

static const char *read_net(struct compiler *c, const struct field *in)
{
        struct bytes b, raw = {0};
        struct field f;
        struct addr a;
        uint32_t length = 0;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = proto_message(&f, &raw);
                else if (f.number == 2)
                        bad = proto_number(&f, 128, &length, "prefix length out of range");
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (addr_from_bytes(&a, raw.p, raw.len))
                return PROTO_BAD_ADDRESS;
        if (raw.len == 4 ? length > 32 : addr_is_v4(&a) && length < 96)
                return "prefix length out of range";
        if (c->out) {
                struct policy_net *n = &c->net[c->nets];
                n->prefix = (uint8_t)(raw.len == 4 ? length + 96 : length);
                n->v4 = addr_is_v4(&a);
                for (unsigned i = 0; i < 16; i++) {
                        unsigned bits = n->prefix > i * 8 ? n->prefix - i * 8 : 0;
                        n->mask.ip[i] = bits >= 8 ? 0xff : (uint8_t)(0xff00 >> bits);
                        n->base.ip[i] = a.ip[i] & n->mask.ip[i];
                }
        }
        return ++c->nets > ITEMS_MAX ? TOO_LARGE : NULL;
}

static const char *read_port(struct compiler *c, uint64_t v)
{
        if (v > 65535)
                return PROTO_BAD_PORT;
        if (c->out)
                c->port[c->ports] = (uint16_t)v;
        return ++c->ports > ITEMS_MAX ? TOO_LARGE : NULL;
}

static const char *read_ports(struct compiler *c, const struct field *in)
{
        struct bytes b = in->bytes;
        uint64_t v = in->value;
        const char *bad = NULL;
        if (in->wire == WIRE_VARINT)
                return read_port(c, v);
        if (in->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        while (b.len && !bad)
                bad = proto_varint(&b, &v) ? PROTO_TRUNCATED : read_port(c, v);
        return bad;
}

static const char *read_account(struct compiler *c, const struct field *in)
{
        struct bytes b, ns = {(const uint8_t *)"", 0}, sa = ns;
        struct field f;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number == 1)
                        bad = proto_text(&f, &ns);
                else if (f.number == 2)
                        bad = proto_text(&f, &sa);
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        const char *ns_text = keep(c, ns), *sa_text = keep(c, sa);
        if (c->out)
                c->account[c->accounts] = (struct policy_account){.namespace_ = ns_text,
                                                                  .account = sa_text,
                                                                  .namespace_len = (uint32_t)ns.len,
                                                                  .account_len = (uint32_t)sa.len};
        return ++c->accounts > ITEMS_MAX ? TOO_LARGE : NULL;
}

/* The values of one list of a match; other lists may lie between them on the wire, so each list is a pass of its own.
 */
static const char *read_list(struct compiler *c, struct bytes b, unsigned number)
{
        struct field f;
        const char *bad = NULL;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number != number)
                        continue;
                if (number < F_SOURCE_IPS)
                        bad = read_text(c, &f);
                else if (number < F_PORTS)
                        bad = read_net(c, &f);
                else if (number < F_ACCOUNTS)
                        bad = read_ports(c, &f);
                else
                        bad = read_account(c, &f);
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

static unsigned *counter_of(struct compiler *c, unsigned number)
{
        return number < F_SOURCE_IPS ? &c->texts
               : number < F_PORTS    ? &c->nets
               : number < F_ACCOUNTS ? &c->ports
                                     : &c->accounts;
}

static const char *read_match(struct compiler *c, const struct field *in)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        struct bytes all = b;
        uint16_t used = 0;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number >= F_NAMESPACES && f.number < F_EXTENSIONS)
                        used |= (uint16_t)(1u << f.number);
                else if (f.number == F_EXTENSIONS)
                        bad = proto_framing(&f);
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        struct policy_match *m = c->out ? &c->match[c->matches] : NULL;
        if (++c->matches > ITEMS_MAX)
                return TOO_LARGE;
        for (unsigned number = F_NAMESPACES; number < F_EXTENSIONS; number++) {
                unsigned *n = counter_of(c, number), first = *n;
                bad = used & 1u << number ? read_list(c, all, number) : NULL;
                if (bad)
                        return bad;
                if (m)
                        m->lists[number - 1] = (struct policy_range){.first = first, .count = *n - first};
        }
        return NULL;
}

static const char *read_clause(struct compiler *c, const struct field *in)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        unsigned first = c->matches, at = c->clauses++;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0)
                bad = f.number == 2 ? read_match(c, &f) : NULL;
        if (c->out)
                c->clause[at].matches = (struct policy_range){.first = first, .count = c->matches - first};
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : c->clauses > ITEMS_MAX ? TOO_LARGE : NULL;
}

static const char *read_rule(struct compiler *c, const struct field *in)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        unsigned first = c->clauses, at = c->rules++;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0)
                bad = f.number == 1 ? read_clause(c, &f) : NULL;
        if (c->out)
                c->rule[at].clauses = (struct policy_range){.first = first, .count = c->clauses - first};
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : c->rules > ITEMS_MAX ? TOO_LARGE : NULL;
}

/* What is not a list. */
struct head {
        struct bytes name, namespace_;
        uint32_t scope, action;
        bool dry_run;
};

static const char *read_policy(struct compiler *c, struct bytes b, struct head *h)
{
        struct field f;
        const char *bad = NULL;
        int r = 0;
        *h = (struct head){.name = {(const uint8_t *)"", 0}, .namespace_ = {(const uint8_t *)"", 0}};
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                switch (f.number) {
                case 1:
                        bad = proto_text(&f, &h->name);
                        break;
                case 2:
                        bad = proto_text(&f, &h->namespace_);
                        break;
                case 3:
                        bad = proto_number(&f, 2, &h->scope, PROTO_BAD_ENUM);
                        break;
                case 4:
                        bad = proto_number(&f, 1, &h->action, PROTO_BAD_ENUM);
                        break;
                case 5:
                        bad = read_rule(c, &f);
                        break;
                case 6:
                        bad = proto_boolean(&f, &h->dry_run);
                        break;
                case 7:
                        bad = proto_framing(&f);
                        break;
                }
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

/* One block: the record, the arrays in the order of their alignment, the texts. */
static struct policy_record *policy_block(struct compiler *c, size_t texts)
{
        size_t size = sizeof(struct policy_record) + c->accounts * sizeof(*c->account) +
                      c->texts * sizeof(*c->text_at) + c->matches * sizeof(*c->match) +
                      c->clauses * sizeof(*c->clause) + c->rules * sizeof(*c->rule) + c->ports * sizeof(*c->port) +
                      c->nets * sizeof(*c->net) + c->text + texts;
        struct policy_record *x = must_alloc(size);
        struct policy_account *accounts = (struct policy_account *)(x + 1);
        struct policy_text *strings = (struct policy_text *)(accounts + c->accounts);
        struct policy_match *matches = (struct policy_match *)(strings + c->texts);
        struct policy_clause *clauses = (struct policy_clause *)(matches + c->matches);
        struct policy_rule *rules = (struct policy_rule *)(clauses + c->clauses);
        uint16_t *ports = (uint16_t *)(rules + c->rules);
        struct policy_net *nets = (struct policy_net *)(ports + c->ports);
        x->rules = rules;
        x->nrules = c->rules;
        x->clauses = clauses;
        x->matches = matches;
        x->texts = strings;
        x->nets = nets;
        x->ports = ports;
        x->accounts = accounts;
        *c = (struct compiler){.out = x,
                               .rule = rules,
                               .clause = clauses,
                               .match = matches,
                               .text_at = strings,
                               .net = nets,
                               .port = ports,
                               .account = accounts,
                               .chars = (char *)(nets + c->nets)};
        return x;
}

const char *record_policy(struct interns *in, struct bytes name, struct bytes version, struct bytes body,
                          struct policy_record **policy)
{
        struct compiler c = {0};
        struct head h;
        const char *bad = record_check_name(name);
        if (!bad && !proto_clean(version.p, version.len))
                bad = PROTO_BAD_TEXT;
        if (!bad)
                bad = read_policy(&c, body, &h);
        if (bad)
                return bad;
        if (h.scope != POLICY_GLOBAL && !h.namespace_.len)
                return "a policy without a namespace";
        struct policy_record *x = policy_block(&c, name.len + version.len + h.name.len + h.namespace_.len + 4);
        read_policy(&c, body, &h);
        x->r.name = keep(&c, name);
        x->r.version = keep(&c, version);
        x->name = keep(&c, h.name);
        x->home = keep(&c, h.namespace_);
        x->namespace_ = h.scope == POLICY_GLOBAL ? intern(in, "", 0) : intern(in, h.namespace_.p, h.namespace_.len);
        x->scope = (enum policy_scope)h.scope;
        x->deny = h.action == 1;
        x->dry_run = h.dry_run;
        record_fill(in, &x->r, body);
        *policy = x;
        return NULL;
}

struct policy_record *record_stand_in(struct interns *in, struct bytes name, const char *root_namespace,
                                      const char *reason)
{
        const uint8_t *slash = memchr(name.p, '/', name.len);
        struct bytes home = {name.p, slash ? (size_t)(slash - name.p) : 0};
        struct bytes own = {slash ? slash + 1 : name.p, name.len - home.len - (slash != NULL)};
        bool global =
                !home.len || (home.len == strlen(root_namespace) && memcmp(home.p, root_namespace, home.len) == 0);
        struct compiler c = {.rules = 1};
        struct policy_record *x = policy_block(&c, 2 * name.len + 4); /* its rule has no clause: it matches all */
        x->r.name = keep(&c, name);
        x->r.version = keep(&c, (struct bytes){name.p, 0});
        x->name = keep(&c, own);
        x->home = keep(&c, home);
        x->namespace_ = global ? intern(in, "", 0) : intern(in, home.p, home.len);
        x->scope = global ? POLICY_GLOBAL : POLICY_NAMESPACE;
        x->deny = true;
        x->undecodable = reason;
        return x;
}
