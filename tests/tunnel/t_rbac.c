/* SPDX-License-Identifier: Apache-2.0 */
/* Policies: what is refused and why, what stands in for it, the order of a namespace's policies, views that are held
 * while the writer goes on, and the stamp by which open connections are left alone. What a policy matches is the
 * business of test_policies.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <cmocka.h>
#include <sys/mman.h>
#include <unistd.h>
#include "mesh.h"
#include "rbac.h"
#include "records.h"
#include "state.h"
#include "tunnel.h"

#define UID "Kubernetes//Pod/shop/web"
static const uint8_t IP[4] = {10, 1, 0, 7};

static struct buf web(const char *named)
{
        struct buf b = {0};
        put_text(&b, 20, UID);
        put_text(&b, 1, "web");
        put_text(&b, 2, "shop");
        put_bytes(&b, 3, IP, 4);
        if (*named)
                put_text(&b, 16, named);
        return as_workload(b);
}

static void apply(struct mesh *m, struct buf b, const char *expected)
{
        char report[4096];
        assert_int_equal(mesh_apply(m, b.p, b.len, report, sizeof(report)), 0);
        assert_string_equal(report, expected);
        buf_free(&b);
}

static struct buf one(uint32_t op, const char *name, const char *version, struct buf body)
{
        struct buf b = batch_new(0);
        batch_add(&b, op, name, version, body);
        return b;
}

static struct mesh *fresh(void)
{
        struct mesh *m;
        assert_int_equal(mesh_new(&m, 1), 0);
        apply(m, one(SET, UID, "1", web("")), "");
        return m;
}

enum { GLOBAL, NAMESPACE, SELECTOR };
enum { ALLOW, DENY };

static struct buf head(const char *ns, unsigned scope, unsigned action)
{
        struct buf b = {0};
        put_text(&b, 1, "p");
        put_text(&b, 2, ns);
        put_number(&b, 3, scope);
        put_number(&b, 4, action);
        return b;
}

/* A policy with one rule of one clause of this match. */
static struct buf with_match(struct buf policy, struct buf match)
{
        struct buf clause = {0}, rule = {0};
        put_message(&clause, 2, match);
        put_message(&rule, 1, clause);
        put_message(&policy, 5, rule);
        return policy;
}

/* One that matches everything. */
static struct buf closed(const char *ns, unsigned scope)
{
        struct buf b = head(ns, scope, DENY);
        put_bytes(&b, 5, "", 0);
        return b;
}

static struct rbac_verdict ask(const struct mesh_view *v, const char *identity, const void *source, size_t len,
                               uint16_t port)
{
        struct rbac_request req = {.identity = identity, .destination.port = port};
        struct rbac_verdict verdict;
        addr_from_bytes(&req.source.addr, source, len);
        addr_from_bytes(&req.destination.addr, IP, 4);
        rbac_decide(v, view_workload(v, UID), &req, &verdict);
        return verdict;
}

static enum rbac_reason reason(struct mesh *m, uint16_t port)
{
        return ask(mesh_view(m, 0), "spiffe://td/ns/a/sa/b", IP, 4, port).reason;
}

/* ---- what is refused ---- */

static struct buf text_match(unsigned kind, const void *p, size_t n)
{
        struct buf b = {0};
        put_bytes(&b, kind, p, n);
        return b;
}

static struct buf net(const void *p, size_t n, unsigned length)
{
        struct buf b = {0};
        put_bytes(&b, 1, p, n);
        put_number(&b, 2, length);
        return b;
}

static struct buf field(unsigned number, struct buf value)
{
        struct buf b = {0};
        put_message(&b, number, value);
        return b;
}

static struct buf raw(const char *p, size_t n)
{
        struct buf b = {0};
        buf_put(&b, p, n);
        return b;
}

/* Each malformed value of each field of a match: refused with a reason, the namespace is closed. */
static void test_malformed_fields(void **unused)
{
        static const uint8_t zero[17], mapped[16] = {[10] = 0xff, [11] = 0xff, [12] = 10};
        (void)unused;
        struct {
                struct buf match;
                const char *reason;
        } cases[64];
        unsigned n = 0;
        for (unsigned list = 1; list <= 4; list++) {
                cases[n].reason = "a match without a value";
                cases[n++].match = field(list, (struct buf){0});
                cases[n].reason = "text that is not UTF-8 or holds control characters";
                cases[n++].match = field(list, text_match(1, "\xff", 1));
                cases[n].reason = "text that is not UTF-8 or holds control characters";
                cases[n++].match = field(list, text_match(3, "a\nb", 3));
                cases[n].reason = "field of a wrong type";
                cases[n++].match = field(list, raw("\x08\x01", 2));
                cases[n].reason = "malformed protobuf";
                cases[n++].match = field(list, raw("\x0a\x05x", 3));
        }
        for (unsigned list = 5; list <= 8; list++) {
                cases[n].reason = "address is neither 4 nor 16 bytes";
                cases[n++].match = field(list, net(zero, 5, 8));
                cases[n].reason = "prefix length out of range";
                cases[n++].match = field(list, net(zero, 4, 33));
                cases[n].reason = "prefix length out of range";
                cases[n++].match = field(list, net(zero, 16, 129));
                cases[n].reason = "prefix length out of range";
                cases[n++].match = field(list, net(mapped, 16, 95));
        }
        for (unsigned list = 9; list <= 10; list++) {
                cases[n].match = (struct buf){0};
                cases[n].reason = "port out of range";
                put_number(&cases[n++].match, list, 65536);
                cases[n].reason = "port out of range";
                cases[n++].match = field(list, raw("\x50\x80\x80\x04", 4));
                cases[n].reason = "malformed protobuf";
                cases[n++].match = field(list, raw("\x50\x80", 2));
        }
        for (unsigned list = 11; list <= 12; list++) {
                cases[n].reason = "field of a wrong type";
                cases[n++].match = field(list, raw("\x08\x01", 2));
                cases[n].reason = "text that is not UTF-8 or holds control characters";
                cases[n++].match = field(list, text_match(2, "\x7f", 1));
        }
        cases[n].reason = "malformed protobuf";
        cases[n++].match = field(13, raw("\x0b", 1));
        for (unsigned i = 0; i < n; i++) {
                struct mesh *m = fresh();
                char report[128];
                snprintf(report, sizeof(report), "shop/p: %s\n", cases[i].reason);
                apply(m, one(POLICY, "shop/p", "1", with_match(head("shop", NAMESPACE, ALLOW), cases[i].match)),
                      report);
                assert_int_equal(reason(m, 80), RBAC_DENIED);
                mesh_free(m);
        }
}

static void test_malformed_heads(void **unused)
{
        struct mesh *m = fresh();
        struct buf many = {0}, clause = {0}, rule = {0}, policy = head("shop", NAMESPACE, ALLOW);
        (void)unused;
        apply(m, one(POLICY, "shop/a", "1", head("shop", 3, DENY)), "shop/a: unknown enum value\n");
        apply(m, one(POLICY, "shop/b", "1", head("shop", NAMESPACE, 2)), "shop/b: unknown enum value\n");
        apply(m, one(POLICY, "shop/c", "1", head("", NAMESPACE, DENY)), "shop/c: a policy without a namespace\n");
        apply(m, one(POLICY, "shop/d", "1", head("", SELECTOR, DENY)), "shop/d: a policy without a namespace\n");
        apply(m, one(POLICY, "shop/e", "1", raw("\x28\x01", 2)), "shop/e: field of a wrong type\n");
        apply(m, one(POLICY, "shop/f", "\x01", head("shop", NAMESPACE, DENY)),
              "shop/f: text that is not UTF-8 or holds control characters\n");
        for (unsigned i = 0; i <= 1u << 17; i++)
                put_bytes(&many, 2, "", 0);
        buf_put(&clause, many.p, many.len);
        buf_free(&many);
        put_message(&rule, 1, clause);
        put_message(&policy, 5, rule);
        apply(m, one(POLICY, "shop/g", "1", policy), "shop/g: a policy of more than 131072 parts\n");
        mesh_free(m);
}

/* What no list knows is skipped, as in any protobuf; of a oneof the last one counts; lists may come in pieces. */
static void test_tolerated(void **unused)
{
        static const uint8_t mapped[16] = {[10] = 0xff, [11] = 0xff, [12] = 10, [13] = 1, [14] = 0, [15] = 7};
        struct mesh *m = fresh();
        struct buf match = {0}, text = {0};
        (void)unused;
        put_text(&text, 1, "nobody");
        put_text(&text, 2, "a");
        put_message(&match, 1, text);
        put_number(&match, 9, 80);
        put_number(&match, 99, 7);
        put_message(&match, 1, text_match(1, "other", 5));
        put_bytes(&match, 9, "\x51\xbb\x03", 3); /* packed: 81, 443 */
        put_message(&match, 5, net(mapped, 16, 128));
        put_bytes(&match, 13, "", 0);
        apply(m, one(POLICY, "shop/p", "1", with_match(head("shop", NAMESPACE, DENY), match)), "");
        assert_int_equal(reason(m, 80), RBAC_DENIED);
        assert_int_equal(reason(m, 81), RBAC_DENIED);
        assert_int_equal(reason(m, 443), RBAC_DENIED);
        assert_int_equal(reason(m, 82), RBAC_NOT_DENIED);
        const struct mesh_view *v = mesh_view(m, 0);
        assert_int_equal(ask(v, "spiffe://td/ns/other/sa/x", IP, 4, 80).reason, RBAC_DENIED);
        assert_int_equal(ask(v, "spiffe://td/ns/nobody/sa/x", IP, 4, 80).reason, RBAC_NOT_DENIED);
        assert_int_equal(ask(v, "spiffe://td/ns/a/sa/b", "\x0a\x01\x00\x08", 4, 80).reason, RBAC_NOT_DENIED);
        mesh_free(m);
}

/* What is no SPIFFE identity is none. */
static void test_identities(void **unused)
{
        static const char *const none[] = {"",
                                           "spiffe://",
                                           "td/ns/a/sa/b",
                                           "spiffe:///ns/a/sa/b",
                                           "spiffe://td/ns/a",
                                           "spiffe://td/ns/a/sb/b",
                                           "spiffe://td/nt/a/sa/b",
                                           "spiffe://td/ns/a/sa/b/c"};
        struct mesh *m = fresh();
        struct buf match = {0};
        (void)unused;
        put_message(&match, 4, text_match(4, "", 0)); /* not_principals: present */
        apply(m, one(POLICY, "shop/strict", "1", with_match(head("shop", NAMESPACE, DENY), match)), "");
        const struct mesh_view *v = mesh_view(m, 0);
        assert_int_equal(ask(v, NULL, IP, 4, 80).reason, RBAC_DENIED);
        for (unsigned i = 0; i < sizeof(none) / sizeof(*none); i++)
                assert_int_equal(ask(v, none[i], IP, 4, 80).reason, RBAC_DENIED);
        assert_int_equal(ask(v, "spiffe://td/ns/a/sa/b", IP, 4, 80).reason, RBAC_NOT_DENIED);
        mesh_free(m);
}

/* ---- stand-ins ---- */

static const struct policy_record *held(struct mesh *m, const char *name)
{
        return view_policy(mesh_newest(m), name);
}

static char *dump(struct mesh *m, const char *what)
{
        int fd = memfd_create("dump", MFD_CLOEXEC);
        assert_int_equal(mesh_dump(m, what, fd), 0);
        size_t n = (size_t)lseek(fd, 0, SEEK_END);
        char *text = calloc(1, n + 1);
        assert_int_equal(pread(fd, text, n, 0), n);
        close(fd);
        return text;
}

static void test_stand_ins(void **unused)
{
        struct tunnel_settings settings = {.root_namespace = "mesh"};
        struct mesh *m = fresh();
        (void)unused;
        assert_int_equal(mesh_settings(m, &settings), 0);
        static const struct {
                const char *name;
                bool closes;
                enum policy_scope scope;
        } names[] = {
                {"shop/p", true, POLICY_NAMESPACE},   {"other/p", false, POLICY_NAMESPACE},
                {"mesh/p", true, POLICY_GLOBAL},      {"nowhere", true, POLICY_GLOBAL},
                {"/p", true, POLICY_GLOBAL},          {"shop/", true, POLICY_NAMESPACE},
                {"meshy/p", false, POLICY_NAMESPACE}, {"istio-system/p", false, POLICY_NAMESPACE},
        };
        for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
                char report[128];
                snprintf(report, sizeof(report), "%s: malformed protobuf\n", names[i].name);
                apply(m, one(POLICY, names[i].name, "1", raw("\xff", 1)), report);
                assert_int_equal(held(m, names[i].name)->scope, names[i].scope);
                assert_string_equal(held(m, names[i].name)->r.version, "");
                assert_int_equal(reason(m, 80), names[i].closes ? RBAC_DENIED : RBAC_OPEN);
                apply(m, one(POLICY_GONE, names[i].name, "", (struct buf){0}), "");
                assert_null(held(m, names[i].name));
                assert_int_equal(reason(m, 80), RBAC_OPEN);
        }
        mesh_free(m);
}

static void test_the_last_good_version_stays(void **unused)
{
        struct mesh *m = fresh();
        char *text;
        (void)unused;
        apply(m, one(POLICY, "shop/p", "1", head("shop", NAMESPACE, DENY)), "");
        apply(m, one(POLICY, "shop/p", "2", raw("\xff", 1)), "shop/p: malformed protobuf\n");
        assert_null(held(m, "shop/p")->undecodable);
        assert_int_equal(reason(m, 80), RBAC_NOT_DENIED);
        apply(m, one(POLICY, "shop/q", "1", raw("\xff", 1)), "shop/q: malformed protobuf\n");
        const struct policy_record *was = held(m, "shop/q");
        apply(m, one(POLICY, "shop/q", "2", raw("\xff", 1)), "shop/q: malformed protobuf\n");
        assert_ptr_equal(held(m, "shop/q"), was); /* nothing new: no connection is judged anew */
        apply(m, one(POLICY, "shop/q", "3", head("shop", 3, DENY)), "shop/q: unknown enum value\n");
        assert_string_equal(held(m, "shop/q")->undecodable, "unknown enum value");
        text = dump(m, "versions");
        assert_non_null(strstr(text, "policy shop/q \n"));
        assert_non_null(strstr(text, "policy shop/p 1\n"));
        free(text);
        text = dump(m, "policies");
        assert_non_null(strstr(text, "\"undecodable\":\"unknown enum value\""));
        free(text);
        apply(m, one(POLICY, "shop/q", "4", head("shop", NAMESPACE, DENY)), "");
        assert_null(held(m, "shop/q")->undecodable);
        assert_int_equal(reason(m, 80), RBAC_NOT_DENIED);

        /* a name that the list of versions cannot hold */
        apply(m, one(POLICY, "shop/a b", "1", closed("shop", NAMESPACE)), "shop/a?b: a name with a space\n");
        assert_int_equal(reason(m, 80), RBAC_DENIED);
        assert_non_null(held(m, "shop/a?b"));
        apply(m, one(POLICY_GONE, "shop/a b", "", (struct buf){0}), "");
        assert_int_equal(reason(m, 80), RBAC_NOT_DENIED);

        apply(m, one(POLICY, "shop/r", "1", raw("\xff", 1)), "shop/r: malformed protobuf\n");
        apply(m, batch_new(1), ""); /* a full batch that does not name it */
        assert_null(held(m, "shop/r"));
        mesh_free(m);
}

/* ---- a namespace's policies ---- */

static void check_order(const struct scope *s)
{
        assert_true(s->n && s->n <= s->cap && s->ndeny + s->nallow <= s->n);
        for (unsigned i = 0; i < s->n; i++) {
                const struct policy_record *p = s->items[i];
                assert_int_equal(p->dry_run, i >= s->ndeny + s->nallow);
                if (!p->dry_run)
                        assert_int_equal(p->deny, i < s->ndeny);
                if (i && i != s->ndeny && i != s->ndeny + s->nallow)
                        assert_true(strcmp(s->items[i - 1]->r.name, p->r.name) < 0);
        }
}

static void test_order_within_a_namespace(void **unused)
{
        struct mesh *m = fresh();
        bool there[300] = {0};
        unsigned seed = 7, count = 0;
        (void)unused;
        for (unsigned round = 0; round < 400; round++) {
                struct buf b = batch_new(0);
                for (unsigned k = 0; k < 8; k++) {
                        unsigned i = (unsigned)rand_r(&seed) % 300;
                        char name[32];
                        snprintf(name, sizeof(name), "shop/p%u", i);
                        if (there[i] && rand_r(&seed) % 2) {
                                batch_add(&b, POLICY_GONE, name, "", (struct buf){0});
                                there[i] = false;
                                count--;
                                continue;
                        }
                        struct buf p = head("shop", NAMESPACE, (unsigned)rand_r(&seed) % 2);
                        put_number(&p, 6, rand_r(&seed) % 4 == 0);
                        batch_add(&b, POLICY, name, round % 2 ? "1" : "2", p);
                        count += !there[i];
                        there[i] = true;
                }
                apply(m, b, "");
                const struct scope *s = view_scope(mesh_view(m, 0), "shop");
                assert_int_equal(s ? s->n : 0, count);
                if (s)
                        check_order(s);
                mesh_in_force(m, 0);
                mesh_sync(m, NULL, NULL);
        }
        apply(m, batch_new(1), "");
        assert_null(view_scope(mesh_view(m, 0), "shop"));
        mesh_free(m);
}

static void test_a_held_view_decides_as_it_did(void **unused)
{
        struct mesh *m = fresh();
        (void)unused;
        apply(m, one(POLICY, "shop/p", "1", closed("shop", NAMESPACE)), "");
        const struct mesh_view *v = mesh_view(m, 0);
        for (unsigned i = 0; i < 50; i++) {
                char name[32];
                snprintf(name, sizeof(name), "shop/q%u", i);
                apply(m, one(POLICY, name, "1", closed("shop", NAMESPACE)), "");
        }
        apply(m, one(POLICY, "shop/p", "2", head("shop", NAMESPACE, DENY)), "");
        apply(m, batch_new(1), "");
        struct rbac_verdict old = ask(v, NULL, IP, 4, 80);
        assert_int_equal(old.reason, RBAC_DENIED);
        assert_string_equal(old.policy, "shop/p");
        assert_null(view_workload(mesh_view(m, 0), UID));
        mesh_free(m);
}

/* ---- the stamp ---- */

static void test_stamps(void **unused)
{
        struct mesh *m = fresh();
        uint64_t last, now;
        (void)unused;
#define STAMP() view_stamp(mesh_view(m, 0), UID, "shop")
#define CHANGES(batch)                                                                                                 \
        do {                                                                                                           \
                last = STAMP();                                                                                        \
                apply(m, batch, "");                                                                                   \
                now = STAMP();                                                                                         \
                assert_true(now != last);                                                                              \
        } while (0)
#define STAYS(batch)                                                                                                   \
        do {                                                                                                           \
                last = STAMP();                                                                                        \
                apply(m, batch, "");                                                                                   \
                now = STAMP();                                                                                         \
                assert_true(now == last);                                                                              \
        } while (0)
        CHANGES(one(POLICY, "shop/p", "1", closed("shop", NAMESPACE)));
        STAYS(one(POLICY, "shop/p", "1", closed("shop", NAMESPACE)));
        CHANGES(one(POLICY, "shop/p", "2", head("shop", NAMESPACE, DENY)));
        STAYS(one(POLICY, "other/p", "1", closed("other", NAMESPACE)));
        STAYS(one(POLICY, "shop/s", "1", closed("shop", SELECTOR)));
        CHANGES(one(POLICY, "istio-system/p", "1", closed("istio-system", GLOBAL)));
        CHANGES(one(POLICY_GONE, "istio-system/p", "", (struct buf){0}));
        STAYS(one(SET, UID, "2", web("")));
        CHANGES(one(SET, UID, "3", web("shop/s")));
        CHANGES(one(POLICY, "shop/s", "2", head("shop", SELECTOR, DENY)));
        CHANGES(one(POLICY_GONE, "shop/s", "", (struct buf){0}));
        CHANGES(one(POLICY, "shop/s", "2", head("shop", SELECTOR, DENY)));
        CHANGES(one(POLICY_GONE, "shop/p", "", (struct buf){0}));
        CHANGES(one(DEL, UID, "", (struct buf){0}));
        CHANGES(one(POLICY, "shop/p", "1", closed("shop", NAMESPACE))); /* there is no record, but a namespace */
        CHANGES(one(SET, UID, "3", web("shop/s")));
        mesh_free(m);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_malformed_fields),
                cmocka_unit_test(test_malformed_heads),
                cmocka_unit_test(test_tolerated),
                cmocka_unit_test(test_identities),
                cmocka_unit_test(test_stand_ins),
                cmocka_unit_test(test_the_last_good_version_stays),
                cmocka_unit_test(test_order_within_a_namespace),
                cmocka_unit_test(test_a_held_view_decides_as_it_did),
                cmocka_unit_test(test_stamps),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
