/* SPDX-License-Identifier: Apache-2.0 */
/* The control thread and the workers: a command that comes at the worst moment, after a worker took its mail and before
 * it emptied its wake-up, is not left lying until the next deadline. When a worker looks for events before it sleeps,
 * and when it lets a stream gather. */
#include "loop.c"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>
#include <cmocka.h>

#define ROUNDS 300
#define GUARD_S 60 /* a command that is overlooked waits for a second: then this is too short for all */

static void count_down(struct worker *w, void *arg)
{
        (void)w;
        atomic_fetch_sub((atomic_uint *)arg, 1);
}

/* Runs as mail, and posts the next as the control thread would do now. */
static void post_another(struct worker *w, void *arg)
{
        assert_int_equal(loop_mail(w, count_down, arg), 0);
}

static void test_a_command_at_the_worst_moment(void **unused)
{
        struct tunnel_config config = {.workers = 1, .log_fd = -1};
        struct tunnel *engine;
        (void)unused;
        alarm(GUARD_S);
        assert_int_equal(tunnel_new(&engine, &config), 0);
        for (int i = 0; i < ROUNDS; i++) {
                atomic_uint left;
                atomic_init(&left, 1);
                assert_int_equal(loop_all(engine, post_another, &left), 0);
                while (atomic_load(&left) > 0)
                        usleep(50);
        }
        tunnel_free(engine);
        alarm(0);
}

#define SHORT_NS (50 * 1000)
#define LONG_NS (5 * 1000 * 1000)

static struct worker *after(struct worker *w, unsigned waits, int ran, size_t moved, uint64_t waited_ns)
{
        for (unsigned i = 0; i < waits; i++) {
                w->ran = ran;
                w->moved[i & 1] = moved;
                learn(w, waited_ns, true);
                assert_int_equal(w->ran, 0);
                assert_int_equal(w->moved[0] + w->moved[1], 0);
                assert_in_range(w->keen, 0, KEEN_MOST);
        }
        return w;
}

/* Only short waits after little work make it look; anything else makes it stop soon, and idle ones forget it. */
static void test_who_looks(void **unused)
{
        static const struct {
                int ran;
                size_t moved;
                uint64_t waited_ns;
        } against[] = {
                {0, 0, LONG_NS}, {1, 64, LONG_NS}, {16, 1024, SHORT_NS}, {1, 1 << 20, SHORT_NS}, {0, 0, UINT64_MAX}};
        (void)unused;
        for (unsigned i = 0; i < sizeof(against) / sizeof(*against); i++) {
                struct worker w = {0};
                assert_true(after(&w, 100, against[i].ran, against[i].moved, against[i].waited_ns)->keen < KEEN_LOOKS);
                assert_true(after(&w, 60, 1, 64, SHORT_NS)->keen >= KEEN_LOOKS);
                assert_true(after(&w, 1, against[i].ran, against[i].moved, against[i].waited_ns)->keen >= KEEN_LOOKS);
                assert_true(after(&w, 10, against[i].ran, against[i].moved, against[i].waited_ns)->keen < KEEN_LOOKS);
        }
}

/* It looks as long as it has CPU to spend on that, and spends what it looks. */
static void test_looking_costs_credit(void **unused)
{
        struct worker w = {.epoll = epoll_create1(EPOLL_CLOEXEC)};
        struct io ready = {.type = IO_WAKE, .fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC)};
        struct epoll_event events[EVENTS];
        (void)unused;
        assert_int_equal(loop_watch(&w, &ready), 0);
        w.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
        w.credit_ns = -1000ll * 1000 * 1000 * 1000;
        assert_int_equal(look(&w, events, clock_ns(CLOCK_MONOTONIC)), 0); /* although there is one */
        w.credit_ns = CREDIT_NS;
        assert_int_equal(look(&w, events, clock_ns(CLOCK_MONOTONIC)), 1);
        assert_ptr_equal(events[0].data.ptr, &ready);
        assert_true(w.credit_ns < CREDIT_NS);
        w.cpu_ns = 0; /* all the work of this process was before: more than it may save up */
        w.credit_ns = 0;
        look(&w, events, clock_ns(CLOCK_MONOTONIC));
        assert_true(w.credit_ns <= CREDIT_NS);
        close(ready.fd);
        close(w.epoll);
}

/* Who sends much one way for long is a stream; an answer, a small message or more flows than that are none. */
static void test_what_is_a_stream(void **unused)
{
        static const struct {
                int ran;
                size_t moved[2];
        } against[] = {{1, {1, 0}},       {0, {STREAM_BYTES - 1, 0}}, {1, {STREAM_BYTES, 1}},
                       {1, {1, 1 << 20}}, {0, {0, 1 << 20}},          {33, {1 << 20, 0}}};
        (void)unused;
        for (unsigned i = 0; i < sizeof(against) / sizeof(*against); i++) {
                struct worker w = {0};
                for (unsigned n = 0; n < 3 * STREAM_TURNS; n++) {
                        assert_int_equal(w.streamed >= STREAM_TURNS, n >= STREAM_TURNS);
                        w.ran = (int)n % 3;
                        w.moved[0] = 2 * STREAM_BYTES;
                        learn(&w, n & 1 ? SHORT_NS : LONG_NS, n & 1);
                        learn(&w, LONG_NS, true); /* an event that moved nothing, a WINDOW_UPDATE perhaps */
                }
                w.ran = against[i].ran;
                memcpy(w.moved, against[i].moved, sizeof(w.moved));
                learn(&w, SHORT_NS, true);
                assert_int_equal(w.streamed, 0);
        }
        /* it has ended; what comes next, a handshake perhaps, moves nothing that would tell */
        struct worker w = {.streamed = STREAM_TURNS};
        learn(&w, STREAM_GAP_NS + 1, true);
        assert_int_equal(w.streamed, 0);
        for (unsigned n = 0; n < 10 * STREAM_TURNS; n++) { /* messages of much, and answers of as much */
                static struct worker w;
                w.ran = 1;
                w.moved[n / (STREAM_TURNS - 1) & 1] = 2 * STREAM_BYTES;
                learn(&w, SHORT_NS, true);
                assert_true(w.streamed < STREAM_TURNS);
        }
}

/* What is there already is taken without a pause; else there is one, and what came in it is taken. */
static void test_a_stream_gathers(void **unused)
{
        struct worker w = {.epoll = epoll_create1(EPOLL_CLOEXEC), .streamed = STREAM_TURNS};
        struct io ready = {.type = IO_WAKE, .fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC)};
        struct epoll_event events[EVENTS];
        (void)unused;
        assert_int_equal(loop_watch(&w, &ready), 0);
        assert_int_equal(await(&w, events, 1000), 1);
        assert_int_equal(w.gathered, 0);
        uint64_t taken;
        assert_int_equal(read(ready.fd, &taken, sizeof(taken)), sizeof(taken));
        assert_int_equal(await(&w, events, 1), 0);
        assert_int_equal(w.gathered, 1);
        assert_int_equal(await(&w, events, 0), 0); /* no time for it */
        assert_int_equal(w.gathered, 1);
        w.streamed = STREAM_TURNS - 1;
        assert_int_equal(await(&w, events, 1), 0);
        assert_int_equal(w.gathered, 1);
        close(ready.fd);
        close(w.epoll);
}

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test(test_a_command_at_the_worst_moment),
                                           cmocka_unit_test(test_what_is_a_stream),
                                           cmocka_unit_test(test_a_stream_gathers), cmocka_unit_test(test_who_looks),
                                           cmocka_unit_test(test_looking_costs_credit)};
        return cmocka_run_group_tests(tests, NULL, NULL);
}
