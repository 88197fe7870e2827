/* SPDX-License-Identifier: Apache-2.0 */
/* Batches: framing, records that are refused, full batches, policies; views: what a reader holds stays whole while the
 * writer goes on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>
#include "mesh.h"
#include "rbac.h"
#include "records.h"
#include "tunnel.h"

#define UID "Kubernetes//Pod/shop/web"
#define SVC "shop/web.shop.svc.cluster.local"
static const uint8_t IP[4] = {10, 1, 0, 7};

static struct buf plain_workload(void)
{
        struct buf b = {0};
        put_text(&b, 20, UID);
        put_text(&b, 1, "web");
        put_text(&b, 2, "shop");
        put_bytes(&b, 3, IP, 4);
        return b;
}

static struct buf plain_service(void)
{
        struct buf b = {0};
        put_text(&b, 1, "web");
        put_text(&b, 2, "shop");
        put_text(&b, 3, "web.shop.svc.cluster.local");
        put_message(&b, 5, port_message(80, 8080));
        return b;
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
        assert_int_equal(mesh_new(&m, 2), 0);
        return m;
}

static void test_framing(void **unused)
{
        struct mesh *m = fresh();
        struct buf good = one(SET, UID, "1", as_workload(plain_workload()));
        char report[64];
        (void)unused;
        struct {
                size_t at;
                uint8_t value;
        } wrong[] = {
                {0, 'X'}, {3, '2'}, {4, 2},  {7, 0x80},  {8, 0},     {8, 2},     {11, 0xff}, {12, 1}, {16, 0},
                {16, 5},  {20, 0},  {22, 1}, {23, 0xff}, {27, 0xff}, {28, 0xff}, {31, 0xff}, {19, 1}, {26, 1},
        };
        for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
                uint8_t was = good.p[wrong[i].at];
                good.p[wrong[i].at] = wrong[i].value;
                assert_int_equal(mesh_apply(m, good.p, good.len, report, sizeof(report)), -EBADMSG);
                good.p[wrong[i].at] = was;
        }
        for (size_t n = 0; n < good.len; n++) { /* exactly n bytes of heap: a read beyond is caught */
                uint8_t *cut = malloc(n ? n : 1);
                memcpy(cut, good.p, n);
                assert_int_equal(mesh_apply(m, cut, n, report, sizeof(report)), -EBADMSG);
                free(cut);
        }
        buf_put(&good, "\0\0\0\0\0\0\0\0", 8);
        assert_int_equal(mesh_apply(m, good.p, good.len, report, sizeof(report)), -EBADMSG);
        good.len -= 8;
        assert_null(view_workload(mesh_view(m, 0), UID));
        assert_int_equal(mesh_apply(m, good.p, good.len, report, sizeof(report)), 0);
        assert_non_null(view_workload(mesh_view(m, 0), UID));
        buf_free(&good);
        mesh_free(m);
}

static void test_padding(void **unused)
{
        struct mesh *m = fresh();
        struct buf b = one(SET, UID "x", "", as_workload(plain_workload()));
        char report[64];
        (void)unused;
        unsigned tail = 0;
        while (b.p[b.len - 1 - tail] == 0)
                tail++;
        assert_true(tail > 0);
        b.p[b.len - 1] = 1;
        assert_int_equal(mesh_apply(m, b.p, b.len, report, sizeof(report)), -EBADMSG);
        buf_free(&b);
        mesh_free(m);
}

/* Each changes a good record in one way; the last good version must survive. */
enum mistake {
        LEGACY,
        ENUM,
        TYPE_ENUM,
        STATUS_ENUM,
        NETWORK_MODE,
        ADDRESS_5,
        ADDRESS_0,
        OTHER_UID,
        NUL,
        CONTROL,
        NOT_UTF8,
        OVERLONG,
        PORT,
        NO_GATEWAY,
        SLASH_NAMESPACE,
        SLASH_ACCOUNT,
        SLASH_DOMAIN,
        NO_NAMESPACE,
        WRONG_WIRE,
        CUT,
        GROUP,
        TWICE,
        NOTHING,
        GARBAGE,
        MISTAKES
};

static struct buf mistaken(enum mistake k)
{
        struct buf b = plain_workload(), entry = {0}, list = {0}, out;
        switch (k) {
        case LEGACY:
                put_number(&b, 5, 2);
                break;
        case ENUM:
                put_number(&b, 5, 3);
                break;
        case TYPE_ENUM:
                put_number(&b, 12, 4);
                break;
        case STATUS_ENUM:
                put_number(&b, 17, UINT64_MAX);
                break;
        case NETWORK_MODE:
                put_number(&b, 25, 2);
                break;
        case ADDRESS_5:
                put_bytes(&b, 3, "12345", 5);
                break;
        case ADDRESS_0:
                put_bytes(&b, 3, "", 0);
                break;
        case OTHER_UID:
                put_text(&b, 20, "Kubernetes//Pod/shop/admin");
                break;
        case NUL:
                put_bytes(&b, 9, "a\0b", 3);
                break;
        case CONTROL:
                put_text(&b, 9, "a\nb");
                break;
        case NOT_UTF8:
                put_text(&b, 9, "a\xff");
                break;
        case OVERLONG:
                put_text(&b, 9, "\xc0\xaf");
                break;
        case PORT:
                put_text(&entry, 1, SVC);
                put_message(&list, 1, port_message(65536, 1));
                put_message(&entry, 2, list);
                put_message(&b, 22, entry);
                break;
        case NO_GATEWAY:
                put_bytes(&b, 8, "", 0);
                break;
        case SLASH_NAMESPACE:
                put_text(&b, 2, "shop/sa/admin");
                break;
        case SLASH_ACCOUNT:
                put_text(&b, 7, "a/b");
                break;
        case SLASH_DOMAIN:
                put_text(&b, 6, "a/ns/b");
                break;
        case NO_NAMESPACE:
                put_text(&b, 2, "");
                break;
        case WRONG_WIRE:
                put_number(&b, 1, 7);
                break;
        case CUT:
                b.len--;
                break;
        case GROUP:
                put_varint(&b, 99 << 3 | 3);
                break;
        default:
                break;
        }
        if (k == NOTHING || k == GARBAGE) {
                buf_free(&b);
                if (k == GARBAGE)
                        buf_put(&b, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 11);
                return b;
        }
        out = as_workload(b);
        if (k == TWICE)
                put_message(&out, 2, plain_service());
        return out;
}

static void test_rejected(void **unused)
{
        struct mesh *m = fresh();
        (void)unused;
        apply(m, one(SET, UID, "good", as_workload(plain_workload())), "");
        for (enum mistake k = 0; k < MISTAKES; k++) {
                struct buf b = one(SET, UID, "bad", mistaken(k));
                char report[256];
                assert_int_equal(mesh_apply(m, b.p, b.len, report, sizeof(report)), 0);
                assert_int_equal(strncmp(report, UID ": ", strlen(UID) + 2), 0);
                assert_int_equal(report[strlen(report) - 1], '\n');
                buf_free(&b);
                const struct workload *w = view_workload(mesh_view(m, 0), UID);
                assert_non_null(w);
                assert_string_equal(w->identity, "spiffe://cluster.local/ns/shop/sa/default");
                assert_int_equal(w->protocol, MESH_PLAIN);
        }
        apply(m, one(SET, "a b", "1", as_workload(plain_workload())), "a?b: a name with a space\n");
        mesh_free(m);
}

static void test_report_is_cut_at_lines(void **unused)
{
        struct mesh *m = fresh();
        struct buf b = batch_new(0);
        char report[100], name[32];
        (void)unused;
        for (unsigned i = 0; i < 50; i++) {
                snprintf(name, sizeof(name), "u%u", i);
                batch_add(&b, SET, name, "", mistaken(NOTHING));
        }
        for (size_t n = 0; n <= sizeof(report); n++) {
                memset(report, 'x', sizeof(report));
                assert_int_equal(mesh_apply(m, b.p, b.len, report, n), 0);
                if (n) {
                        assert_true(strnlen(report, n) < n);
                        assert_true(!*report || report[strlen(report) - 1] == '\n');
                }
                for (size_t i = n; i < sizeof(report); i++)
                        assert_int_equal(report[i], 'x');
        }
        buf_free(&b);
        mesh_free(m);
}

static void test_tolerated(void **unused)
{
        struct mesh *m = fresh();
        struct buf w = plain_workload(), s = plain_service();
        (void)unused;
        put_text(&w, 99, "a field of tomorrow");
        put_number(&w, 98, 5);
        put_text(&w, 26, "");
        apply(m, one(SET, UID, "1", as_workload(w)), "");
        put_number(&s, 14, 77); /* unknown visibility is PUBLIC */
        put_text(&s, 6, "no spiffe uri");
        apply(m, one(SET, SVC, "1", as_service(s)), "");
        mesh_free(m);
}

static void test_capacity_wrapper(void **unused)
{
        struct mesh *m = fresh();
        struct buf w = plain_workload();
        (void)unused;
        apply(m, one(SET, UID, "1", as_workload(plain_workload())), "");
        assert_int_equal(view_workload(mesh_view(m, 0), UID)->capacity, 1);
        put_bytes(&w, 27, "", 0); /* there, and zero */
        apply(m, one(SET, UID, "2", as_workload(w)), "");
        assert_int_equal(view_workload(mesh_view(m, 0), UID)->capacity, 0);
        mesh_free(m);
}

static void test_full_and_unchanged(void **unused)
{
        struct mesh *m = fresh();
        struct mesh_counts n;
        struct buf b = batch_new(0), w = plain_workload();
        uint64_t record;
        (void)unused;
        batch_add(&b, SET, UID, "1", as_workload(plain_workload()));
        batch_add(&b, SET, SVC, "1", as_service(plain_service()));
        apply(m, b, "");
        record = view_workload(mesh_view(m, 0), UID)->record;
        assert_true(record > 0);
        apply(m, one(SET, UID, "1", as_workload(plain_workload())), "");
        assert_int_equal(view_workload(mesh_view(m, 0), UID)->record, record);
        apply(m, one(SET, UID, "2", as_workload(plain_workload())), ""); /* another version, the same content */
        assert_int_equal(view_workload(mesh_view(m, 0), UID)->record, record);
        put_text(&w, 9, "node2");
        apply(m, one(SET, UID, "3", as_workload(w)), "");
        assert_true(view_workload(mesh_view(m, 0), UID)->record != record);

        b = batch_new(1); /* full: the service goes; what could not be decoded stays as it was */
        batch_add(&b, SET, UID, "4", mistaken(LEGACY));
        apply(m, b, UID ": the legacy tunnel protocol is not supported\n");
        mesh_counts(m, &n);
        assert_int_equal(n.workloads, 1);
        assert_int_equal(n.services, 0);
        assert_string_equal(view_workload(mesh_view(m, 0), UID)->node, "node2");
        apply(m, batch_new(1), "");
        mesh_counts(m, &n);
        assert_int_equal(n.workloads + n.services + n.policies, 0);
        mesh_free(m);
}

static struct buf policy(const char *ns, unsigned scope, bool dry_run)
{
        struct buf b = {0};
        put_text(&b, 1, "p");
        put_text(&b, 2, ns);
        put_number(&b, 3, scope);
        put_number(&b, 6, dry_run);
        return b;
}

static bool allowed(struct mesh *m, const char *expected)
{
        struct rbac_request req = {.identity = "spiffe://cluster.local/ns/a/sa/b"};
        struct rbac_verdict verdict;
        const struct mesh_view *v = mesh_view(m, 0);
        rbac_decide(v, view_workload(v, UID), &req, &verdict);
        assert_string_equal(verdict.policy, expected);
        return verdict.allow;
}

static void test_policies_close(void **unused)
{
        struct mesh *m = fresh();
        struct buf w = plain_workload();
        (void)unused;
        apply(m, one(SET, UID, "1", as_workload(plain_workload())), "");
        assert_true(allowed(m, ""));
        apply(m, one(POLICY, "other/p", "1", policy("other", 1, false)), "");
        assert_true(allowed(m, ""));
        apply(m, one(POLICY, "shop/p", "1", policy("shop", 2, false)), ""); /* selects by name, and nobody names it */
        assert_true(allowed(m, ""));
        apply(m, one(POLICY, "shop/p", "2", policy("shop", 1, true)), ""); /* dry run */
        assert_true(allowed(m, ""));
        apply(m, one(POLICY, "shop/p", "3", policy("shop", 1, false)), "");
        assert_false(allowed(m, "shop/p"));
        apply(m, one(POLICY_GONE, "shop/p", "", (struct buf){0}), "");
        assert_true(allowed(m, ""));
        apply(m, one(POLICY, "istio-system/p", "1", policy("istio-system", 0, false)), "");
        assert_false(allowed(m, "istio-system/p"));
        apply(m, one(POLICY_GONE, "istio-system/p", "", (struct buf){0}), "");

        put_text(&w, 16, "shop/named");
        apply(m, one(SET, UID, "2", as_workload(w)), "");
        assert_string_equal(view_policy_missing(mesh_view(m, 0), view_workload(mesh_view(m, 0), UID)), "shop/named");
        assert_false(allowed(m, "shop/named")); /* not known yet: closed */
        apply(m, one(POLICY, "shop/named", "1", policy("shop", 2, false)), "");
        assert_null(view_policy_missing(mesh_view(m, 0), view_workload(mesh_view(m, 0), UID)));
        assert_false(allowed(m, "shop/named"));
        apply(m, one(POLICY, "shop/named", "2", policy("shop", 2, true)), "");
        assert_true(allowed(m, ""));
        mesh_free(m);
}

static void test_policy_rejected(void **unused)
{
        struct mesh *m = fresh();
        struct buf empty_match = policy("shop", 1, false), rules = {0}, clause = {0}, match = {0},
                   bad_scope = policy("shop", 3, false);
        (void)unused;
        put_bytes(&match, 3, "", 0); /* principals: a StringMatch without a value would be no constraint at all */
        put_message(&clause, 2, match);
        put_message(&rules, 1, clause);
        /* Rule.clauses = 1, Clause.matches = 2 */
        put_message(&empty_match, 5, rules);
        apply(m, one(POLICY, "shop/p", "1", policy("shop", 1, false)), "");
        struct buf b = one(POLICY, "shop/p", "2", empty_match);
        char report[256];
        assert_int_equal(mesh_apply(m, b.p, b.len, report, sizeof(report)), 0);
        assert_string_equal(report, "shop/p: a match without a value\n");
        buf_free(&b);
        apply(m, one(POLICY, "shop/q", "1", bad_scope), "shop/q: unknown enum value\n");
        apply(m, one(POLICY, "p", "1", policy("", 1, false)), "p: a policy without a namespace\n");
        struct mesh_counts n;
        mesh_counts(m, &n);
        assert_int_equal(n.policies, 3); /* two of them stand in */
        mesh_free(m);
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

static void test_dumps(void **unused)
{
        struct mesh *m = fresh();
        struct buf w = plain_workload();
        char *text;
        (void)unused;
        put_text(&w, 10, "a\"b\\c");
        apply(m, one(SET, UID, "7", as_workload(w)), "");
        apply(m, one(POLICY, "shop/p", "9", policy("shop", 1, false)), "");
        text = dump(m, "versions");
        assert_string_equal(text, "address " UID " 7\npolicy shop/p 9\n");
        free(text);
        text = dump(m, "workloads");
        assert_non_null(strstr(text, "\"canonical_name\":\"a\\\"b\\\\c\""));
        assert_non_null(strstr(text, "\"addresses\":[\"10.1.0.7\"]"));
        assert_int_equal(text[0], '[');
        free(text);
        assert_int_equal(mesh_dump(m, "secrets", 1), -EINVAL);
        mesh_free(m);
}

/* ---- views ---- */

static struct buf numbered(unsigned i, unsigned generation)
{
        struct buf b = {0};
        char text[64];
        uint8_t ip[4] = {10, (uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i};
        snprintf(text, sizeof(text), "u%u", i);
        put_text(&b, 20, text);
        put_text(&b, 1, text);
        put_text(&b, 2, "shop");
        put_bytes(&b, 3, ip, 4);
        snprintf(text, sizeof(text), "node%u", generation);
        put_text(&b, 9, text);
        return as_workload(b);
}

static struct buf generation(unsigned count, unsigned number)
{
        struct buf b = batch_new(0);
        char name[32], version[32];
        for (unsigned i = 0; i < count; i++) {
                snprintf(name, sizeof(name), "u%u", i);
                snprintf(version, sizeof(version), "%u", number);
                batch_add(&b, SET, name, version, numbered(i, number));
        }
        return b;
}

static void test_held_view_stays(void **unused)
{
        struct mesh *m = fresh();
        (void)unused;
        apply(m, generation(200, 1), "");
        const struct mesh_view *held = mesh_view(m, 0);
        const struct workload *w = view_workload(held, "u7");
        for (unsigned g = 2; g < 40; g++)
                apply(m, generation(200, g), "");
        apply(m, batch_new(1), "");
        assert_string_equal(w->node, "node1");
        assert_ptr_equal(view_workload(held, "u7"), w);
        assert_string_equal(view_workload(held, "u199")->node, "node1");
        mesh_leave(m, 1);
        assert_null(view_workload(mesh_view(m, 0), "u7"));
        mesh_in_force(m, 0);
        assert_int_equal(mesh_sync(m, NULL, NULL), 0);
        mesh_free(m);
}

struct readers {
        struct mesh *m;
        atomic_bool stop;
        atomic_uint ready;
        atomic_ulong looks;
};

struct reader {
        struct readers *all;
        unsigned number;
};

/* All workloads of one view are of one generation, whatever the writer does, and generations do not go back. */
static void *reader_thread(void *arg)
{
        struct reader *r = arg;
        unsigned long last = 0;
        while (!atomic_load(&r->all->stop)) {
                const struct mesh_view *v = mesh_view(r->all->m, r->number);
                const struct workload *first = view_workload(v, "u0");
                unsigned long g = strtoul(first->node + 4, NULL, 10);
                for (unsigned i = 1; i < 30; i++) {
                        char uid[16];
                        snprintf(uid, sizeof(uid), "u%u", i);
                        const struct workload *w = view_workload(v, uid);
                        if (!w || strcmp(w->node, first->node) != 0)
                                abort();
                }
                if (g < last)
                        abort();
                last = g;
                mesh_in_force(r->all->m, r->number);
                if (atomic_fetch_add(&r->all->looks, 1) % 64 == 63)
                        mesh_leave(r->all->m, r->number); /* and in again */
                else if (atomic_load(&r->all->looks) == 1)
                        atomic_fetch_add(&r->all->ready, 1);
        }
        mesh_leave(r->all->m, r->number);
        return NULL;
}

static void woken(void *arg, unsigned reader)
{
        (void)reader;
        atomic_fetch_add((atomic_uint *)arg, 1);
}

static void test_readers_and_writer(void **unused)
{
        struct readers all = {0};
        struct reader r[2] = {{&all, 0}, {&all, 1}};
        pthread_t thread[2];
        atomic_uint wakes = 0;
        (void)unused;
        all.m = fresh();
        apply(all.m, generation(30, 1), "");
        for (unsigned i = 0; i < 2; i++)
                assert_int_equal(pthread_create(&thread[i], NULL, reader_thread, &r[i]), 0);
        for (unsigned g = 2; g < 400; g++) {
                apply(all.m, generation(30, g), "");
                if (g % 4 == 0)
                        assert_int_equal(mesh_sync(all.m, woken, &wakes), 0);
        }
        atomic_store(&all.stop, true);
        for (unsigned i = 0; i < 2; i++)
                pthread_join(thread[i], NULL);
        assert_true(atomic_load(&all.looks) > 100);
        mesh_free(all.m);
}

static void test_sync_waits_for_the_last(void **unused)
{
        struct mesh *m = fresh();
        atomic_uint wakes = 0;
        struct readers all = {.m = m};
        struct reader r = {&all, 1};
        pthread_t thread;
        (void)unused;
        apply(m, generation(30, 1), "");
        mesh_view(m, 1); /* holds an old view until its thread runs */
        apply(m, generation(30, 2), "");
        assert_int_equal(pthread_create(&thread, NULL, reader_thread, &r), 0);
        assert_int_equal(mesh_sync(m, woken, &wakes), 0);
        assert_true(atomic_load(&wakes) <= 1);
        atomic_store(&all.stop, true);
        pthread_join(thread, NULL);
        mesh_free(m);
}

/* ---- responses ---- */

static void add_resource(struct buf *b, const char *name, const char *version, struct buf body)
{
        struct buf any = {0}, resource = {0};
        put_text(&any, 1, "ignored");
        put_message(&any, 2, body);
        put_text(&resource, 1, version);
        put_message(&resource, 2, any);
        put_text(&resource, 3, name);
        put_text(&resource, 4, "an alias");
        put_message(b, 2, resource);
}

static int take(struct mesh *m, struct buf b, struct tunnel_delta *told, const char *expected)
{
        char report[4096];
        int result = mesh_apply_delta(m, b.p, b.len, told, report, sizeof(report));
        if (!result)
                assert_string_equal(report, expected);
        buf_free(&b);
        return result;
}

/* As it came: what it takes away, what it brings, what it says of itself; fields in any order. */
static void test_response(void **state)
{
        struct mesh *m = fresh();
        struct tunnel_delta told;
        struct mesh_counts n;
        struct buf b = {0};
        (void)state;
        put_text(&b, 5, "nonce-1");
        put_text(&b, 1, "of the system");
        add_resource(&b, UID, "1", as_workload(plain_workload()));
        add_resource(&b, SVC, "2", as_service(plain_service()));
        put_text(&b, 4, MESH_ADDRESS);
        assert_int_equal(take(m, b, &told, ""), 0);
        assert_string_equal(told.type_url, MESH_ADDRESS);
        assert_string_equal(told.nonce, "nonce-1");
        assert_int_equal(told.resources, 2);
        mesh_counts(m, &n);
        assert_int_equal(n.workloads * 10 + n.services, 11);

        /* Removed and brought in one: it is there. What never was there is no error. */
        b = (struct buf){0};
        add_resource(&b, UID, "3", as_workload(plain_workload()));
        put_text(&b, 6, UID);
        put_text(&b, 6, SVC);
        put_text(&b, 6, "");
        put_text(&b, 4, MESH_ADDRESS);
        assert_int_equal(take(m, b, &told, ""), 0);
        assert_int_equal(told.removed, 3);
        mesh_counts(m, &n);
        assert_int_equal(n.workloads * 10 + n.services, 10);
        mesh_free(m);
}

static void test_response_refused(void **state)
{
        struct mesh *m = fresh();
        struct tunnel_delta told;
        struct mesh_counts n;
        struct buf good = {0}, b = {0};
        char long_name[3000];
        (void)state;
        /* One record is refused, the others are not; a name of no use among addresses is refused, and counts among
         * policies. */
        memset(long_name, 'x', sizeof(long_name) - 1);
        memcpy(long_name, "shop/", 5);
        long_name[sizeof(long_name) - 1] = 0;
        add_resource(&b, "", "1", as_workload(plain_workload()));
        add_resource(&b, UID, "1", as_workload(plain_workload()));
        put_text(&b, 4, MESH_ADDRESS);
        assert_int_equal(take(m, b, &told, ": a name of no bytes, or of more than 2048\n"), 0);
        b = (struct buf){0};
        struct buf malformed = {0};
        buf_put(&malformed, "\xff", 1);
        add_resource(&b, long_name, "1", malformed);
        put_text(&b, 4, MESH_AUTHORIZATION);
        char report[3000];
        assert_int_equal(mesh_apply_delta(m, b.p, b.len, &told, report, sizeof(report)), 0);
        assert_memory_equal(report, long_name, 2048);
        assert_memory_equal(report + 2048, ": ", 2); /* the rest of the name is left out */
        buf_free(&b);
        mesh_counts(m, &n);
        assert_int_equal(n.workloads * 10 + n.policies, 11); /* a stand-in: it denies */
        b = (struct buf){0};
        put_text(&b, 6, long_name);
        put_text(&b, 4, MESH_AUTHORIZATION);
        assert_int_equal(take(m, b, &told, ""), 0);
        mesh_counts(m, &n);
        assert_int_equal(n.policies, 0);

        /* Another type changes nothing. One that is cut anywhere within a field changes nothing either. */
        b = (struct buf){0};
        put_text(&b, 6, UID);
        put_text(&b, 4, "type.googleapis.com/another");
        assert_int_equal(take(m, b, &told, ""), 0);
        put_text(&good, 6, UID);
        put_text(&good, 4, MESH_ADDRESS);
        size_t whole = good.len;
        for (good.len = 1; good.len < whole; good.len++) {
                int result = mesh_apply_delta(m, good.p, good.len, &told, report, sizeof(report));
                if (good.len != strlen(UID) + 2) /* the end of the first field: a response without a type */
                        assert_int_equal(result, -EBADMSG);
                mesh_counts(m, &n);
                assert_int_equal(n.workloads, 1);
        }
        assert_int_equal(take(m, good, &told, ""), 0); /* the control */
        mesh_counts(m, &n);
        assert_int_equal(n.workloads, 0);
        mesh_free(m);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_framing),
                cmocka_unit_test(test_padding),
                cmocka_unit_test(test_rejected),
                cmocka_unit_test(test_report_is_cut_at_lines),
                cmocka_unit_test(test_tolerated),
                cmocka_unit_test(test_capacity_wrapper),
                cmocka_unit_test(test_full_and_unchanged),
                cmocka_unit_test(test_response),
                cmocka_unit_test(test_response_refused),
                cmocka_unit_test(test_policies_close),
                cmocka_unit_test(test_policy_rejected),
                cmocka_unit_test(test_dumps),
                cmocka_unit_test(test_held_view_stays),
                cmocka_unit_test(test_readers_and_writer),
                cmocka_unit_test(test_sync_waits_for_the_last),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
