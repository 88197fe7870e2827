/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine's decision function without an engine: batches and questions on stdin, a line per answer on stdout. With a
 * number as argument every block of questions is asked that many times, and the line is how long one took.
 *
 * A block is a letter and a u32 (little endian): 'B' bytes of a state batch; 'Q' that many questions, each u16 length
 * and text of the identity, 16 bytes and u16 of the source, 16 bytes and u16 of the destination, whose workload is the
 * one that has the address. An answer: reason (enum rbac_reason), rule, policy or "-", dry run or "-".
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "rbac.h"
#include "tunnel.h"

struct question {
        char identity[512];
        struct rbac_request request;
        const struct workload *workload;
};

static void get(void *to, size_t n)
{
        if (fread(to, 1, n, stdin) != n) {
                fprintf(stderr, "decide: stdin ends inside a block\n");
                exit(1);
        }
}

static void endpoint(struct endpoint *e)
{
        get(&e->addr, 16);
        get(&e->port, 2);
}

static void question(struct question *q)
{
        uint16_t len;
        get(&len, 2);
        if (len >= sizeof(q->identity)) {
                fprintf(stderr, "decide: an identity of %u bytes\n", len);
                exit(1);
        }
        get(q->identity, len);
        q->identity[len] = 0;
        q->request.identity = len ? q->identity : NULL;
        endpoint(&q->request.source);
        endpoint(&q->request.destination);
}

static void answer(const struct mesh_view *v, struct question *q)
{
        struct rbac_verdict a;
        if (!q->workload) {
                printf("no workload\n");
                return;
        }
        rbac_decide(v, q->workload, &q->request, &a);
        printf("%d %d %s %s\n", a.reason, a.rule, *a.policy ? a.policy : "-", a.dry_run ? a.dry_run : "-");
}

static void measure(const struct mesh_view *v, struct question *q, uint32_t n, unsigned long times)
{
        struct timespec a, b;
        unsigned long allowed = 0;
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (unsigned long t = 0; t < times; t++)
                for (uint32_t i = 0; i < n; i++) {
                        struct rbac_verdict verdict;
                        rbac_decide(v, q[i].workload, &q[i].request, &verdict);
                        allowed += verdict.allow;
                }
        clock_gettime(CLOCK_MONOTONIC, &b);
        double ns = (double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec);
        printf("%.1f %lu\n", ns / (double)(times * n), allowed);
}

static void batch(struct mesh *m, uint32_t len)
{
        char report[4096];
        uint8_t *b = malloc(len ? len : 1);
        if (!b)
                abort();
        get(b, len);
        int result = mesh_apply(m, b, len, report, sizeof(report));
        if (result)
                fprintf(stderr, "decide: batch: %d\n", result);
        fputs(report, stderr); /* what was refused */
        free(b);
        mesh_view(m, 0);
        mesh_in_force(m, 0);
        mesh_sync(m, NULL, NULL);
}

int main(int argc, char **argv)
{
        struct mesh *m;
        int kind;
        unsigned long times = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
        mesh_new(&m, 1);
        while ((kind = getchar()) != EOF) {
                uint32_t n;
                get(&n, 4);
                if (kind == 'B') {
                        batch(m, n);
                        continue;
                }
                const struct mesh_view *v = mesh_view(m, 0);
                struct question *all = calloc(n ? n : 1, sizeof(*all));
                if (!all)
                        abort();
                for (uint32_t i = 0; i < n; i++) {
                        question(&all[i]);
                        all[i].workload = view_workload_at(v, &all[i].request.destination.addr);
                }
                if (times)
                        measure(v, all, n, times);
                for (uint32_t i = 0; i < n && !times; i++)
                        answer(v, &all[i]);
                free(all);
        }
        mesh_leave(m, 0);
        mesh_free(m);
        return 0;
}
