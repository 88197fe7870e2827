/* SPDX-License-Identifier: Apache-2.0 */
/* An accepted tunnel goes to the worker with the fewest of its pod's (decision 0014), also when that worker stops while
 * it is on its way: then it is closed, and nothing of it is left. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>
#include "hbone.h"
#include "pod.h"

#define WORKERS 3
#define GUARD_S 60
#define MANY 30

static struct world {
        struct tunnel *engine;
        struct pod *pod;
        struct seat seats[WORKERS];
        int fds[MANY], peers[MANY];
        atomic_uint wrong, done;
} world;

static void make_seat(struct worker *w, void *arg)
{
        struct world *it = arg;
        struct seat *s = &it->seats[w->index];
        struct link *links[] = {&s->link, &s->flows, &s->tuns, &s->judged, &s->stale};
        for (unsigned i = 0; i < sizeof(links) / sizeof(*links); i++)
                link_init(links[i]);
        s->pod = it->pod;
        conn_seat(w, s);
        link_add(&w->seats[loop_hash(it->pod->workload)], &s->link);
}

static int begin(void **state)
{
        struct tunnel_config config = {.workers = WORKERS, .log_fd = -1};
        struct pod *p = calloc(1, sizeof(*p));
        alarm(GUARD_S);
        memset(&world, 0, sizeof(world));
        assert_non_null(p);
        p->netns = p->engine_sk = p->listeners_map = -1;
        atomic_init(&p->refs, 1);
        p->namespace_ = strdup("default");
        p->name = strdup("pod");
        p->workload = strdup("workload");
        p->identity = strdup("identity");
        world.pod = p;
        assert_int_equal(tunnel_new(&world.engine, &config), 0);
        assert_int_equal(loop_all(world.engine, make_seat, &world), 0);
        for (int i = 0; i < MANY; i++) {
                int pair[2];
                assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), 0);
                world.fds[i] = pair[0];
                world.peers[i] = pair[1];
        }
        *state = &world;
        return 0;
}

/* The engine is gone: every tunnel is closed and counted down, nobody holds the pod. */
static void end(struct world *it, int tunnels)
{
        for (int i = 0; i < tunnels; i++) {
                char byte;
                assert_int_equal(recv(it->peers[i], &byte, 1, 0), 0);
        }
        for (int i = 0; i < MANY; i++) {
                close(it->peers[i]);
                if (i >= tunnels)
                        close(it->fds[i]);
        }
        for (int i = 0; i < WORKERS; i++)
                assert_int_equal(atomic_load(&it->pod->tunnels[i]), 0);
        assert_int_equal(atomic_load(&it->pod->refs), 1);
        assert_int_equal(atomic_load(&it->wrong), 0);
        pod_unref(it->pod);
        alarm(0);
}

static void accept_one(struct worker *w, struct world *it, int i)
{
        struct endpoint remote = {.port = 1}, local = {.port = HBONE_PORT};
        tun_accept(w, it->pod, it->fds[i], &remote, &local);
}

static void count_seat(struct worker *w, void *arg)
{
        struct world *it = arg;
        struct seat *s = &it->seats[w->index];
        unsigned n = 0;
        for (struct link *l = s->tuns.next; l != &s->tuns; l = l->next, n++)
                if (container(l, struct tun, seat)->w != w)
                        atomic_fetch_add(&it->wrong, 1);
        if (n != MANY / WORKERS)
                atomic_fetch_add(&it->wrong, 1);
        atomic_fetch_add(&it->done, 1);
}

/* All come to one worker, as the kernel's hash may have it. They are counted right behind those that are handed over:
 * without a certificate they would be held for 5 s and no longer. */
static void accept_all(struct worker *w, void *arg)
{
        struct world *it = arg;
        for (int i = 0; i < MANY; i++) {
                accept_one(w, it, i);
                unsigned most = 0, fewest = MANY;
                for (int k = 0; k < WORKERS; k++) {
                        unsigned n = atomic_load(&it->pod->tunnels[k]);
                        most = n > most ? n : most;
                        fewest = n < fewest ? n : fewest;
                }
                if (most - fewest > 1)
                        atomic_fetch_add(&it->wrong, 1);
        }
        for (int i = 0; i < WORKERS; i++)
                if (&it->engine->workers[i] == w)
                        count_seat(w, it);
                else if (loop_mail(&it->engine->workers[i], count_seat, it) < 0)
                        atomic_fetch_add(&it->wrong, 1);
}

static void test_tunnels_are_spread(void **state)
{
        struct world *it = *state;
        assert_int_equal(loop_mail(&it->engine->workers[1], accept_all, it), 0);
        while (atomic_load(&it->done) < WORKERS)
                usleep(50);
        tunnel_free(it->engine);
        end(it, MANY);
}

/* Runs in worker 0, and takes its own order to stop only after this: meanwhile the others have taken theirs. */
static void accept_late(struct worker *w, void *arg)
{
        struct world *it = arg;
        for (int i = 1; i < WORKERS; i++)
                while (!__atomic_load_n(&it->engine->workers[i].stop, __ATOMIC_ACQUIRE))
                        usleep(50);
        for (int i = 0; i < WORKERS; i++) /* one each */
                accept_one(w, it, i);
        for (int i = 0; i < WORKERS; i++)
                if (atomic_load(&it->pod->tunnels[i]) != 1)
                        atomic_fetch_add(&it->wrong, 1);
        atomic_fetch_add(&it->done, 1);
}

static void test_a_worker_stops_while_a_tunnel_comes(void **state)
{
        struct world *it = *state;
        assert_int_equal(loop_mail(&it->engine->workers[0], accept_late, it), 0);
        tunnel_free(it->engine);
        assert_int_equal(atomic_load(&it->done), 1);
        end(it, WORKERS);
}

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test_setup(test_tunnels_are_spread, begin),
                                           cmocka_unit_test_setup(test_a_worker_stops_while_a_tunnel_comes, begin)};
        return cmocka_run_group_tests(tests, NULL, NULL);
}
