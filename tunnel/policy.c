/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. istio.security.Authorization to records. For now a policy's rules are only checked, not kept:
 * whether a policy selects a workload is all that rbac.c asks. What cannot be understood is refused here already: a
 * match without a value or an address of a wrong length must not be dropped, for an empty list constrains nothing.
 * Field numbers: reference ztunnel.md 3.5. Nothing blocks.
 */
#include "record.h"
#include "table.h"
#include <string.h>

static const char *string_match(const struct field *in)
{
        struct bytes b, s;
        struct field f;
        const char *bad = proto_message(in, &b);
        bool some = false;
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number >= 1 && f.number <= 3)
                        bad = proto_text(&f, &s);
                else if (f.number == 4)
                        bad = proto_framing(&f);
                some |= f.number >= 1 && f.number <= 4;
        }
        /* Dropping such a match would widen the policy: an empty list constrains nothing. */
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : some ? NULL : "a match without a value";
}

static const char *cidr(const struct field *in)
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
        return raw.len == 4 && length > 32 ? "prefix length out of range" : NULL;
}

static const char *match_ports(const struct field *in)
{
        struct bytes b = in->bytes;
        uint64_t v = in->value;
        if (in->wire == WIRE_VARINT)
                return v > 65535 ? PROTO_BAD_PORT : NULL;
        if (in->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        while (b.len) {
                if (proto_varint(&b, &v))
                        return PROTO_TRUNCATED;
                if (v > 65535)
                        return PROTO_BAD_PORT;
        }
        return NULL;
}

/* depth 0: Rule (clauses = 1), 1: Clause (matches = 2), 2: Match */
static const char *rule(const struct field *in, unsigned depth)
{
        struct bytes b;
        struct field f;
        const char *bad = proto_message(in, &b);
        int r = 0;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (depth < 2)
                        bad = f.number == depth + 1 ? rule(&f, depth + 1) : NULL;
                else if (f.number >= 1 && f.number <= 4)
                        bad = string_match(&f);
                else if (f.number >= 5 && f.number <= 8)
                        bad = cidr(&f);
                else if (f.number == 9 || f.number == 10)
                        bad = match_ports(&f);
                else if (f.number >= 11 && f.number <= 13)
                        bad = proto_framing(&f);
        }
        return bad ? bad : r < 0 ? PROTO_TRUNCATED : NULL;
}

const char *record_policy(struct interns *in, struct bytes name, struct bytes version, struct bytes body,
                          struct policy_record **policy)
{
        struct bytes b = body, pname = {0}, namespace_ = {0};
        struct field f;
        uint32_t scope = 0, action = 0;
        bool dry_run = false;
        const char *bad = record_check_name(name);
        int r = 0;
        if (!bad && !proto_clean(version.p, version.len))
                bad = PROTO_BAD_TEXT;
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                switch (f.number) {
                case 1:
                        bad = proto_text(&f, &pname);
                        break;
                case 2:
                        bad = proto_text(&f, &namespace_);
                        break;
                case 3:
                        bad = proto_number(&f, 2, &scope, PROTO_BAD_ENUM);
                        break;
                case 4:
                        bad = proto_number(&f, 1, &action, PROTO_BAD_ENUM);
                        break;
                case 5:
                        bad = rule(&f, 0);
                        break;
                case 6:
                        bad = proto_boolean(&f, &dry_run);
                        break;
                case 7:
                        bad = proto_framing(&f);
                        break;
                }
        }
        if (bad || r < 0)
                return bad ? bad : PROTO_TRUNCATED;
        if (scope != POLICY_GLOBAL && !namespace_.len)
                return "a policy without a namespace";
        struct policy_record *x = must_alloc(sizeof(*x) + name.len + version.len + 2);
        char *text = (char *)(x + 1);
        x->r.name = memcpy(text, name.p, name.len);
        x->r.version = memcpy(text + name.len + 1, version.p, version.len);
        x->namespace_ = scope == POLICY_GLOBAL ? intern(in, "", 0) : intern(in, namespace_.p, namespace_.len);
        x->scope = scope;
        x->deny = action == 1;
        x->dry_run = dry_run;
        record_fill(in, &x->r, body);
        *policy = x;
        return NULL;
}
