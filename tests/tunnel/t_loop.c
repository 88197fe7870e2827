/* SPDX-License-Identifier: Apache-2.0 */
/* The control thread and the workers: a command that comes at the worst moment, after a worker took its mail and before
 * it emptied its wake-up, is not left lying until the next deadline. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>
#include <cmocka.h>
#include "pod.h"

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

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test(test_a_command_at_the_worst_moment)};
        return cmocka_run_group_tests(tests, NULL, NULL);
}
