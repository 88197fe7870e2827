/* SPDX-License-Identifier: Apache-2.0 */
/* The ends of connections that a pod's workers must not mix up: noted and taken back by all of them at once, without a
 * lock; no two have the same port, nothing is lost, nothing is left. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include "pod.h"

#define THREADS 4
#define ROUNDS 400
#define HELD 40
#define CLIENTS 3 /* few, so that they choose among the same ports */

static struct pod *pod_made(void)
{
        struct pod *p = calloc(1, sizeof(*p));
        assert_non_null(p);
        p->tuples = calloc(POD_TUPLES, sizeof(*p->tuples));
        assert_non_null(p->tuples);
        p->netns = p->engine_sk = p->listeners_map = -1;
        p->tuple_seed = 42;
        atomic_init(&p->refs, 1);
        return p;
}

static struct endpoint end(unsigned client, uint16_t port)
{
        struct endpoint e = {.port = port};
        uint8_t ip[4] = {10, 0, 0, (uint8_t)client};
        addr_from_bytes(&e.addr, ip, 4);
        return e;
}

static unsigned left_in(struct pod *p)
{
        unsigned n = 0;
        for (unsigned i = 0; i < POD_TUPLES; i++)
                for (struct tuples *t = &p->tuples[i]; t; t = atomic_load(&t->next))
                        for (unsigned k = 0; k < sizeof(t->mark) / sizeof(t->mark[0]); k++)
                                n += atomic_load(&t->mark[k]) != 0;
        return n;
}

static void test_one_after_the_other(void **unused)
{
        struct pod *p = pod_made();
        struct endpoint e = end(1, 5000), other = end(1, 5001);
        (void)unused;
        assert_false(pod_tuple_is_own(p, &e));
        pod_tuple_add(p, &e, false); /* a client's: to two ports of the pod */
        pod_tuple_add(p, &e, false);
        assert_false(pod_tuple_is_own(p, &e));
        pod_tuple_add(p, &e, true);
        assert_true(pod_tuple_is_own(p, &e));
        assert_false(pod_tuple_is_own(p, &other));
        pod_tuple_remove(p, &e, true);
        assert_false(pod_tuple_is_own(p, &e));
        pod_tuple_remove(p, &e, true); /* there is none: the client's stay */
        assert_int_equal(left_in(p), 2);
        pod_tuple_remove(p, &e, false);
        pod_tuple_remove(p, &e, false);
        assert_int_equal(left_in(p), 0);
        pod_unref(p);
}

/* A port that a client has is not chosen, nor one that was chosen already; with none left there is none. */
static void test_ports_are_free_ones(void **unused)
{
        struct pod *p = pod_made();
        struct endpoint e = end(1, 0);
        static bool seen[65536];
        unsigned found = 0, taken = 0;
        (void)unused;
        for (unsigned port = 1024; port < 32767; port += 2, taken++) {
                e.port = (uint16_t)port;
                pod_tuple_add(p, &e, false);
        }
        for (uint64_t random = 0; random < 20000; random++) {
                uint16_t port = pod_tuple_port(p, &e.addr, random);
                if (!port)
                        continue;
                assert_true(port % 2 == 1 && !seen[port]);
                seen[port] = true;
                found++;
        }
        assert_true(found > 15000);
        assert_int_equal(left_in(p), taken + found);
        pod_unref(p);
}

struct hand {
        pthread_t thread;
        struct pod *pod;
        atomic_bool (*chosen)[65536];
        unsigned index;
};

/* In a thread of its own: assertions of cmocka are for the main one. */
static atomic_uint wrong;
#define expect(what)                                                                                                   \
        do {                                                                                                           \
                if (!(what)) {                                                                                         \
                        atomic_fetch_add(&wrong, 1);                                                                   \
                        fprintf(stderr, "%s\n", #what);                                                                \
                }                                                                                                      \
        } while (0)

static void let_go(struct hand *h, struct endpoint *e)
{
        if (!e->port)
                return;
        expect(pod_tuple_is_own(h->pod, e));
        expect(atomic_exchange(&h->chosen[e->addr.ip[15]][e->port], false));
        pod_tuple_remove(h->pod, e, true);
        e->port = 0;
}

static void *work(void *arg)
{
        struct hand *h = arg;
        struct endpoint held[HELD] = {0};
        uint64_t random = 1 + h->index;
        for (unsigned n = 0; n < ROUNDS * HELD; n++) {
                struct endpoint *e = &held[n % HELD];
                unsigned client = n % CLIENTS;
                let_go(h, e);
                *e = end(client, 0);
                random = random * 6364136223846793005ull + 1442695040888963407ull;
                e->port = pod_tuple_port(h->pod, &e->addr, (random >> 33) % 64); /* few beginnings: they meet */
                expect(e->port && !atomic_exchange(&h->chosen[client][e->port], true));
                struct endpoint mine = end(100 + h->index, (uint16_t)n);
                pod_tuple_add(h->pod, &mine, false);
                pod_tuple_remove(h->pod, &mine, false);
        }
        for (unsigned i = 0; i < HELD; i++)
                let_go(h, &held[i]);
        return NULL;
}

static void test_all_at_once(void **unused)
{
        static atomic_bool chosen[CLIENTS][65536];
        struct hand hands[THREADS];
        struct pod *p = pod_made();
        (void)unused;
        for (unsigned i = 0; i < THREADS; i++) {
                hands[i] = (struct hand){.pod = p, .chosen = chosen, .index = i};
                assert_int_equal(pthread_create(&hands[i].thread, NULL, work, &hands[i]), 0);
        }
        for (unsigned i = 0; i < THREADS; i++)
                pthread_join(hands[i].thread, NULL);
        assert_int_equal(atomic_load(&wrong), 0);
        assert_int_equal(left_in(p), 0);
        pod_unref(p);
}

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test(test_one_after_the_other),
                                           cmocka_unit_test(test_ports_are_free_ones),
                                           cmocka_unit_test(test_all_at_once)};
        return cmocka_run_group_tests(tests, NULL, NULL);
}
