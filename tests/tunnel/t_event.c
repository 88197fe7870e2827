/* SPDX-License-Identifier: Apache-2.0 */
/* Label sets: names, order, escaping, sums over workers, expiry, the bound. The log: complete, in order, bounded, never
 * waited for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "event.h"

#define MINUTE 60000ull

static char *scrape(struct event *e)
{
        int fd = memfd_create("metrics", MFD_CLOEXEC);
        assert_int_equal(event_metrics(e, fd), 0);
        size_t n = (size_t)lseek(fd, 0, SEEK_END);
        char *text = calloc(1, n + 1);
        assert_int_equal(pread(fd, text, n, 0), n);
        close(fd);
        return text;
}

static bool has(struct event *e, const char *what)
{
        char *text = scrape(e);
        bool found = strstr(text, what) != NULL;
        if (!found)
                fprintf(stderr, "not found: %s\nin:\n%s\n", what, text);
        free(text);
        return found;
}

static unsigned count(struct event *e, const char *what)
{
        char *text = scrape(e);
        unsigned n = 0;
        size_t len = strlen(what);
        for (const char *at = text; *at; at++) /* strstr() under ASan measures the rest of the text at each call */
                n += *at == *what && strncmp(at, what, len) == 0;
        free(text);
        return n;
}

static const struct workload WEB = {.workload_name = "web",
                                    .canonical_name = "web-canonical",
                                    .canonical_revision = "v1",
                                    .namespace_ = "shop",
                                    .cluster_id = "Kubernetes",
                                    .region = "r1",
                                    .zone = "z1"};
static const struct workload DB = {.workload_name = "db",
                                   .canonical_name = "db",
                                   .canonical_revision = "latest",
                                   .namespace_ = "data",
                                   .cluster_id = "Kubernetes",
                                   .region = "r1",
                                   .zone = ""};

#define LABELS                                                                                                         \
        "{reporter=\"source\",source_workload=\"web\",source_canonical_service=\"web-canonical\","                     \
        "source_canonical_revision=\"v1\",source_workload_namespace=\"shop\","                                         \
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",source_app=\"web-canonical\","                     \
        "source_version=\"v1\",source_cluster=\"Kubernetes\",destination_service=\"db.data.svc.cluster.local\","       \
        "destination_service_namespace=\"data\",destination_service_name=\"db\",destination_workload=\"db\","          \
        "destination_canonical_service=\"db\",destination_canonical_revision=\"latest\","                              \
        "destination_workload_namespace=\"data\",destination_principal=\"spiffe://cluster.local/ns/data/sa/db\","      \
        "destination_app=\"db\",destination_version=\"latest\",destination_cluster=\"Kubernetes\","                    \
        "request_protocol=\"tcp\",response_flags=\""
#define LABELS_END                                                                                                     \
        "\",connection_security_policy=\"mutual_tls\",source_region=\"r1\",source_zone=\"z1\","                        \
        "destination_region=\"r1\",destination_zone=\"unknown\"}"

static struct event_labels full(void)
{
        return (struct event_labels){.reporter = EVENT_SOURCE,
                                     .src = &WEB,
                                     .dst = &DB,
                                     .src_principal = "spiffe://cluster.local/ns/shop/sa/web",
                                     .dst_principal = "spiffe://cluster.local/ns/data/sa/db",
                                     .service_host = "db.data.svc.cluster.local",
                                     .service_name = "db",
                                     .service_namespace = "data",
                                     .mutual_tls = true};
}

static void test_labels_and_sums(void **unused)
{
        struct event_labels l = full();
        struct event *e;
        (void)unused;
        assert_int_equal(event_new(&e, 2, -1), 0);
        struct event_set *a = event_open(event_worker(e, 0), &l, 0), *b = event_open(event_worker(e, 1), &l, 0);
        struct event_set *again = event_open(event_worker(e, 0), &l, 0);
        assert_ptr_equal(a, again);
        event_bytes(a, 11, 22);
        event_bytes(b, 100, 200);
        event_close(event_worker(e, 0), a, FLAG_NONE, 0);
        event_close(event_worker(e, 0), again, FLAG_CONNECT, 0);
        event_close(event_worker(e, 1), b, FLAG_NONE, 0);
        assert_true(has(e, "\nistio_tcp_connections_opened_total" LABELS "-" LABELS_END " 3\n"));
        assert_true(has(e, "\nistio_tcp_connections_closed_total" LABELS "-" LABELS_END " 2\n"));
        assert_true(has(e, "\nistio_tcp_connections_closed_total" LABELS "CONNECT" LABELS_END " 1\n"));
        assert_true(has(e, "\nistio_tcp_connections_failed_total" LABELS "CONNECT" LABELS_END " 1\n"));
        assert_true(has(e, "\nistio_tcp_received_bytes_total" LABELS "-" LABELS_END " 111\n"));
        assert_true(has(e, "\nistio_tcp_sent_bytes_total" LABELS "-" LABELS_END " 222\n"));
        assert_int_equal(count(e, "\nistio_tcp_connections_opened_total{"), 1);
        assert_int_equal(count(e, "\nistio_tcp_connections_failed_total{"), 1);
        assert_true(has(e, "# TYPE istio_tcp_connections_opened_total counter\n"));
        event_free(e);
}

static void test_unknown_and_escaping(void **unused)
{
        struct event_labels l = {.reporter = EVENT_DESTINATION, .src_principal = "a\"b\\c\nd"};
        struct event *e;
        (void)unused;
        assert_int_equal(event_new(&e, 1, -1), 0);
        event_open(event_worker(e, 0), &l, 0);
        assert_true(has(e, "source_principal=\"a\\\"b\\\\c\\nd\""));
        assert_true(has(e, "{reporter=\"destination\",source_workload=\"unknown\""));
        assert_true(has(e, "connection_security_policy=\"unknown\"} 1\n")); /* no locality of nobody */
        assert_int_equal(count(e, "source_region"), 0);
        event_free(e);
}

static void test_gauges_and_refusals(void **unused)
{
        struct event *e;
        (void)unused;
        assert_int_equal(event_new(&e, 2, -1), 0);
        event_sockets(event_worker(e, 0), EVENT_SOURCE, 3);
        event_sockets(event_worker(e, 1), EVENT_SOURCE, -1);
        event_count(event_worker(e, 1), EV_TUNNELS_OPEN, 5);
        event_refused(event_worker(e, 1), "unknown_destination");
        event_refused(event_worker(e, 0), "held_timeout");
        event_refused(event_worker(e, 0), "unknown_destination");
        assert_true(has(e, "istio_tcp_sockets_open{reporter=\"source\"} 2\n"));
        assert_true(has(e, "istio_tcp_sockets_open{reporter=\"destination\"} 0\n"));
        assert_true(has(e, "sidestep_tunnels_open 5\n"));
        assert_true(has(e, "sidestep_connections_refused_total{reason=\"unknown_destination\"} 2\n"));
        assert_true(has(e, "sidestep_connections_refused_total{reason=\"held_timeout\"} 1\n"));
        assert_int_equal(count(e, "{reason=\"unknown_destination\"}"), 1);
        for (unsigned i = 0; i < EV_COUNTERS; i++) /* each has a line of its own in the table */
                event_count(event_worker(e, 0), i, 1);
        assert_int_equal(count(e, "(null)"), 0);
        event_free(e);
}

static struct event_set *numbered(struct event *e, unsigned i, uint64_t now)
{
        struct event_labels l = full();
        char name[32];
        snprintf(name, sizeof(name), "svc-%u-end", i);
        l.service_name = name;
        return event_open(event_worker(e, 0), &l, now);
}

static void test_bound(void **unused)
{
        struct event *e;
        (void)unused;
        assert_int_equal(event_new(&e, 1, -1), 0);
        for (unsigned i = 0; i < EVENT_MAX_SETS + 500; i++)
                event_close(event_worker(e, 0), numbered(e, i, 0), FLAG_NONE, 0);
        assert_true(has(e, "source_workload=\"overflow\""));
        assert_int_equal(count(e, "\nistio_tcp_connections_opened_total{"), EVENT_MAX_SETS + 1);
        assert_true(has(e, "sidestep_label_sets 4097\n"));
        event_free(e);
}

static void test_expiry(void **unused)
{
        struct event *e;
        uint64_t now = 1000;
        (void)unused;
        assert_int_equal(event_new(&e, 1, -1), 0);
        struct event_set *held = numbered(e, 9999, now);
        for (unsigned i = 0; i < 1000; i++)
                event_close(event_worker(e, 0), numbered(e, i, now), FLAG_NONE, now);
        now += 14 * MINUTE;
        event_close(event_worker(e, 0), numbered(e, 7, now), FLAG_NONE, now); /* used again: stays longer */
        assert_true(has(e, "svc-8-end"));
        now += 2 * MINUTE;
        numbered(e, 5000, now);
        assert_int_equal(count(e, "svc-8-end"), 0);
        assert_true(has(e, "svc-7-end"));
        assert_true(has(e, "svc-9999-end")); /* a connection holds it */
        assert_int_equal(count(e, "\nistio_tcp_connections_opened_total{"), 3);
        event_close(event_worker(e, 0), held, FLAG_NONE, now);
        now += 16 * MINUTE;
        numbered(e, 5001, now);
        assert_int_equal(count(e, "svc-9999-end"), 0);
        assert_true(has(e, "svc-5001-end"));
        event_free(e);
}

/* A worker that opens, closes and expires all the time while somebody scrapes all the time: what ASan has to say. */
static void *busy(void *arg)
{
        struct event *e = arg;
        uint64_t now = 0;
        for (unsigned i = 0; i < 5000; i++) {
                now += 3 * MINUTE;
                event_close(event_worker(e, 0), numbered(e, i % 700, now), i % FLAG_IDENTITY_ERROR, now);
        }
        return NULL;
}

static void test_scrape_beside_a_worker(void **unused)
{
        struct event *e;
        pthread_t t;
        (void)unused;
        assert_int_equal(event_new(&e, 1, -1), 0);
        assert_int_equal(pthread_create(&t, NULL, busy, e), 0);
        for (unsigned i = 0; i < 50; i++)
                free(scrape(e));
        pthread_join(t, NULL);
        event_free(e);
}

/* ---- the log ---- */

static size_t read_all(int fd, char **out)
{
        size_t len = 0, cap = 1 << 16;
        ssize_t n;
        *out = malloc(cap);
        while ((n = read(fd, *out + len, cap - len - 1)) > 0) {
                len += (size_t)n;
                if (cap - len < 4096)
                        *out = realloc(*out, cap *= 2);
        }
        (*out)[len] = 0;
        return len;
}

struct job {
        struct event *e;
        unsigned worker;
};

#define LINES 300

static void *writer(void *arg)
{
        struct job *j = arg;
        for (unsigned i = 0; i < LINES; i++)
                event_log(j->e, event_worker(j->e, j->worker), "info", "access\tworker %u line %u", j->worker, i);
        return NULL;
}

static void test_log_complete_and_ordered(void **unused)
{
        struct event *e;
        struct job jobs[3];
        pthread_t t[3];
        char *text, *save = NULL;
        unsigned next[4] = {0}, dropped = 0;
        int fd = memfd_create("log", MFD_CLOEXEC);
        (void)unused;
        assert_int_equal(event_new(&e, 3, fd), 0);
        for (unsigned i = 0; i < 3; i++) {
                jobs[i] = (struct job){e, i};
                pthread_create(&t[i], NULL, writer, &jobs[i]);
        }
        for (unsigned i = 0; i < LINES; i++)
                event_log(e, NULL, "warn", "access\tworker 3 line %u", i);
        for (unsigned i = 0; i < 3; i++)
                pthread_join(t[i], NULL);
        event_free(e);
        lseek(fd, 0, SEEK_SET);
        read_all(fd, &text);
        for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
                unsigned w, n;
                char *rest = strchr(line, '\t');
                assert_int_equal(strlen("2026-11-24T13:00:00.123456Z"), rest - line);
                assert_int_equal(line[10], 'T');
                assert_int_equal(rest[-1], 'Z');
                rest = strchr(rest + 1, '\t');
                assert_int_equal(sscanf(rest, "\taccess\tworker %u line %u", &w, &n), 2);
                assert_int_equal(n, next[w]);
                next[w]++;
        }
        for (unsigned w = 0; w < 4; w++)
                assert_int_equal(next[w], LINES); /* 300 lines of 60 bytes fit: none is lost */
        assert_int_equal(dropped, 0);
        free(text);
        close(fd);
}

static void test_one_line_is_one_line(void **unused)
{
        struct event *e;
        char *text, longer[5000];
        int fd = memfd_create("log", MFD_CLOEXEC);
        (void)unused;
        memset(longer, 'x', sizeof(longer) - 1);
        longer[sizeof(longer) - 1] = 0;
        assert_int_equal(event_new(&e, 1, fd), 0);
        event_log(e, NULL, "info", "peer said %s", "a\nb\x1b[31m\x7f");
        event_log(e, NULL, "info", "%s", longer);
        event_free(e);
        lseek(fd, 0, SEEK_SET);
        assert_true(read_all(fd, &text) < 2200);
        assert_non_null(strstr(text, "\tinfo\tpeer said a?b?[31m?\n"));
        assert_int_equal(text[strlen(text) - 1], '\n');
        free(text);
        close(fd);
}

/* Nobody reads the pipe: producers go on, the scrape says how many lines were lost, and what was written is whole
 * lines. */
static void test_stalled_reader(void **unused)
{
        struct event *e;
        char *text, lost[80], *save = NULL;
        unsigned kept = 0, sent = 5000, dropped = 0;
        int p[2];
        (void)unused;
        assert_int_equal(pipe2(p, O_CLOEXEC), 0);
        assert_int_equal(event_new(&e, 1, p[1]), 0);
        for (unsigned i = 0; i < sent; i++)
                event_log(e, event_worker(e, 0), "info", "line %06u of many that nobody reads", i);
        text = scrape(e);
        char *at = strstr(text, "\nsidestep_log_lines_dropped_total ");
        assert_non_null(at);
        dropped = (unsigned)strtoul(at + strlen("\nsidestep_log_lines_dropped_total "), NULL, 10);
        assert_true(dropped > 0);
        free(text);
        fcntl(p[0], F_SETFL, O_NONBLOCK);
        snprintf(lost, sizeof(lost), "%u lines were dropped", dropped);
        text = NULL;
        size_t len = 0;
        /* Read until it says how many were dropped: within the hang guard of poll. */
        while (!text || !strstr(text, lost)) {
                struct pollfd pfd = {.fd = p[0], .events = POLLIN};
                char *more;
                assert_int_equal(poll(&pfd, 1, 20000), 1);
                size_t n = read_all(p[0], &more);
                text = realloc(text, len + n + 1);
                memcpy(text + len, more, n + 1);
                len += n;
                free(more);
        }
        for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
                kept += strstr(line, "of many that nobody reads") != NULL;
        assert_int_equal(kept + dropped, sent);
        free(text);
        event_free(e);
        close(p[0]);
        close(p[1]);
}

/* It ends although the pipe is full, and although the reader has gone. */
static void test_end_with_a_stalled_reader(void **unused)
{
        struct event *e;
        int p[2];
        (void)unused;
        for (unsigned gone = 0; gone < 2; gone++) {
                assert_int_equal(pipe2(p, O_CLOEXEC), 0);
                assert_int_equal(event_new(&e, 1, p[1]), 0);
                if (gone)
                        close(p[0]);
                for (unsigned i = 0; i < 5000; i++)
                        event_log(e, NULL, "info", "line %06u of many that nobody reads", i);
                event_free(e);
                if (!gone)
                        close(p[0]);
                close(p[1]);
        }
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_labels_and_sums),
                cmocka_unit_test(test_unknown_and_escaping),
                cmocka_unit_test(test_gauges_and_refusals),
                cmocka_unit_test(test_bound),
                cmocka_unit_test(test_expiry),
                cmocka_unit_test(test_scrape_beside_a_worker),
                cmocka_unit_test(test_log_complete_and_ordered),
                cmocka_unit_test(test_one_line_is_one_line),
                cmocka_unit_test(test_stalled_reader),
                cmocka_unit_test(test_end_with_a_stalled_reader),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
