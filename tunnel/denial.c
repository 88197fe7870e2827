/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. For each worker a ring of its last LAST denials and a table of counters, both of fixed size and
 * made once, under a mutex of that worker's that only readers want too: workers do not meet here. Only connections that
 * are denied come (and those of which a dry run says so), the others never. Nobody holds the mutex for longer than a
 * copy; texts are made from copies, which are put together then. A counter that was not used for 15 minutes gives its
 * place to another when the table is full; what finds no place even so counts as policy "overflow".
 */
#include "denial.h"
#include "intern.h"
#include "table.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define LAST 256
#define COUNTERS 1024
#define PROBES 16
#define EXPIRE_S (15 * 60)

struct entry {
        uint64_t time_ms;
        struct endpoint src, dst;
        bool outbound;
        char pod[320], uid[64], identity[320], policy[256], reason[320];
};

struct counter {
        uint64_t hash, denied, dry_run;
        int64_t used_s;
        char policy[256], workload[128], namespace_[64];
};

struct writer {
        pthread_mutex_t lock;
        uint64_t count; /* of entries ever */
        struct entry last[LAST];
        struct counter counters[COUNTERS + 1]; /* the last one: overflow */
};

struct denials {
        uint64_t seed;
        unsigned writers;
        struct writer writer[];
};

static void copy(char *to, size_t n, const char *from)
{
        size_t len = from ? strnlen(from, n - 1) : 0;
        if (len)
                memcpy(to, from, len);
        to[len] = 0;
}

static int64_t seconds(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec;
}

/* The lock is held. */
static struct counter *counter_of(struct writer *d, uint64_t seed, const char *policy, const struct workload *w)
{
        struct counter key = {0};
        int64_t now = seconds();
        copy(key.policy, sizeof(key.policy), policy);
        copy(key.workload, sizeof(key.workload), w ? w->workload_name : "unknown");
        copy(key.namespace_, sizeof(key.namespace_), w ? w->namespace_ : "unknown");
        key.hash = hash_bytes(key.policy, sizeof(key) - offsetof(struct counter, policy), seed) | 1;
        struct counter *room = NULL, *found = NULL;
        for (unsigned i = 0; i < PROBES && !found; i++) {
                struct counter *c = &d->counters[(key.hash + i) % COUNTERS];
                if (c->hash == key.hash &&
                    memcmp(c->policy, key.policy, sizeof(key) - offsetof(struct counter, policy)) == 0)
                        found = c;
                else if (!room && (!c->hash || now - c->used_s > EXPIRE_S))
                        room = c;
        }
        if (!found && room) {
                *room = key;
                found = room;
        }
        if (!found) {
                found = &d->counters[COUNTERS];
                found->hash = 1;
        }
        found->used_s = now;
        return found;
}

void denials_add(struct denials *all, unsigned writer, const struct denial *what)
{
        struct writer *d = &all->writer[writer];
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        pthread_mutex_lock(&d->lock);
        struct entry *e = &d->last[d->count++ % LAST];
        e->time_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
        e->src = what->src;
        e->dst = what->dst;
        e->outbound = what->outbound;
        snprintf(e->pod, sizeof(e->pod), "%s/%s", what->namespace_, what->pod);
        copy(e->uid, sizeof(e->uid), what->pod_uid);
        copy(e->identity, sizeof(e->identity), what->identity);
        copy(e->policy, sizeof(e->policy), what->policy);
        copy(e->reason, sizeof(e->reason), what->reason);
        if (!what->outbound)
                counter_of(d, all->seed, what->policy, what->workload)->denied++;
        pthread_mutex_unlock(&d->lock);
}

bool denial_is_news(uint64_t *told, const char *policy)
{
        uint64_t which = policy ? hash_bytes(policy, strlen(policy), 0) | 1 : 0;
        bool news = which && which != *told;
        *told = which;
        return news;
}

void denials_dry_run(struct denials *all, unsigned writer, const char *policy, const struct workload *w)
{
        struct writer *d = &all->writer[writer];
        pthread_mutex_lock(&d->lock);
        counter_of(d, all->seed, policy, w)->dry_run++;
        pthread_mutex_unlock(&d->lock);
}

/* ---- text ---- */

static void quoted(FILE *out, const char *s)
{
        fputc('"', out);
        for (; *s; s++) {
                if (*s == '"' || *s == '\\')
                        fputc('\\', out);
                if ((unsigned char)*s >= 0x20)
                        fputc(*s, out);
        }
        fputc('"', out);
}

/* A text that was cut inside a character: the rest of it goes too. */
static char *whole(char *s)
{
        size_t n = strlen(s), back = 0;
        while (back < 3 && back < n && ((unsigned char)s[n - 1 - back] & 0xc0) == 0x80)
                back++;
        if (back < n) {
                unsigned char lead = (unsigned char)s[n - 1 - back];
                size_t needs = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : lead >= 0xc0 ? 1 : 0;
                if (needs > back)
                        s[n - 1 - back] = 0;
        }
        return s;
}

static int finish(FILE *out, int fd, char **text, const size_t *len)
{
        int result = fclose(out) == 0 ? 0 : -ENOMEM;
        for (size_t at = 0; at < *len && !result;) {
                ssize_t n = write(fd, *text + at, *len - at);
                if (n > 0)
                        at += (size_t)n;
                else if (n == 0 || errno != EINTR)
                        result = n ? -errno : -EIO;
        }
        free(*text);
        return result;
}

static void family(FILE *out, const char *name, const char *help, const struct counter *all, size_t n, bool dry_run)
{
        fprintf(out, "# HELP %s %s\n# TYPE %s counter\n", name, help, name);
        for (size_t i = 0; i < n; i++) {
                const struct counter *c = &all[i];
                uint64_t value = dry_run ? c->dry_run : c->denied;
                if (!value)
                        continue;
                fprintf(out, "%s{policy=", name);
                quoted(out, c->policy);
                fputs(",destination_workload=", out);
                quoted(out, c->workload);
                fputs(",destination_workload_namespace=", out);
                quoted(out, c->namespace_);
                fprintf(out, "} %llu\n", (unsigned long long)value);
        }
}

static int by_key(const void *a, const void *b)
{
        const struct counter *x = a, *y = b;
        if (x->hash != y->hash)
                return x->hash < y->hash ? -1 : 1;
        return memcmp(x->policy, y->policy, sizeof(*x) - offsetof(struct counter, policy));
}

/* The counters of all writers, those of one key as one; the caller's. */
static struct counter *gather(struct denials *d, size_t *n)
{
        struct counter *all = must_alloc(d->writers * sizeof(d->writer->counters));
        size_t have = 0;
        for (unsigned i = 0; i < d->writers; i++) {
                struct writer *w = &d->writer[i];
                pthread_mutex_lock(&w->lock);
                for (unsigned k = 0; k <= COUNTERS; k++)
                        if (w->counters[k].hash)
                                all[have++] = w->counters[k];
                pthread_mutex_unlock(&w->lock);
        }
        qsort(all, have, sizeof(*all), by_key);
        *n = 0;
        for (size_t i = 0; i < have; i++) {
                if (*n && by_key(&all[*n - 1], &all[i]) == 0) {
                        all[*n - 1].denied += all[i].denied;
                        all[*n - 1].dry_run += all[i].dry_run;
                } else {
                        all[(*n)++] = all[i];
                }
        }
        return all;
}

int denials_metrics(struct denials *d, int fd)
{
        char *text = NULL;
        size_t len = 0, n;
        FILE *out = open_memstream(&text, &len);
        if (!out)
                return -errno;
        struct counter *all = gather(d, &n);
        for (size_t i = 0; i < n; i++) {
                whole(all[i].policy);
                whole(all[i].workload);
                whole(all[i].namespace_);
        }
        family(out, "sidestep_policy_denied_total", "Connections denied or cut, by the policy that did.", all, n,
               false);
        family(out, "sidestep_policy_dry_run_denied_total", "Connections that a dry run would have denied.", all, n,
               true);
        free(all);
        return finish(out, fd, &text, &len);
}

struct told {
        unsigned writer;
        uint64_t nth; /* of that writer */
        struct entry entry;
};

static int by_time(const void *a, const void *b)
{
        const struct told *x = a, *y = b;
        if (x->entry.time_ms != y->entry.time_ms)
                return x->entry.time_ms < y->entry.time_ms ? -1 : 1;
        if (x->writer != y->writer)
                return x->writer < y->writer ? -1 : 1;
        return x->nth < y->nth ? -1 : 1;
}

int denials_dump(struct denials *d, int fd)
{
        char *text = NULL, ip[ENDPOINT_STRLEN];
        size_t len = 0, n = 0;
        FILE *out = open_memstream(&text, &len);
        if (!out)
                return -errno;
        struct told *all = must_alloc(d->writers * LAST * sizeof(*all));
        for (unsigned i = 0; i < d->writers; i++) {
                struct writer *w = &d->writer[i];
                pthread_mutex_lock(&w->lock);
                for (uint64_t k = w->count > LAST ? w->count - LAST : 0; k < w->count; k++)
                        all[n++] = (struct told){.writer = i, .nth = k, .entry = w->last[k % LAST]};
                pthread_mutex_unlock(&w->lock);
        }
        qsort(all, n, sizeof(*all), by_time);
        fputc('[', out);
        size_t first = n > LAST ? n - LAST : 0;
        for (size_t i = first; i < n; i++) {
                struct entry *e = &all[i].entry;
                fprintf(out, "%s\n{\"time_ms\":%llu,\"direction\":\"%s\"", i != first ? "," : "",
                        (unsigned long long)e->time_ms, e->outbound ? "outbound" : "inbound");
                struct {
                        const char *key, *value;
                } texts[] = {
                        {"pod", whole(e->pod)},       {"pod_uid", whole(e->uid)},   {"identity", whole(e->identity)},
                        {"policy", whole(e->policy)}, {"reason", whole(e->reason)},
                };
                for (unsigned k = 0; k < sizeof(texts) / sizeof(*texts); k++) {
                        fprintf(out, ",\"%s\":", texts[k].key);
                        quoted(out, texts[k].value);
                }
                fprintf(out, ",\"src\":\"%s\"", endpoint_format(&e->src, ip));
                fprintf(out, ",\"dst\":\"%s\"}", endpoint_format(&e->dst, ip));
        }
        fputs("\n]\n", out);
        free(all);
        return finish(out, fd, &text, &len);
}

struct denials *denials_new(unsigned writers)
{
        /* its pages are touched when they are used */
        struct denials *d = must_alloc(sizeof(*d) + writers * sizeof(*d->writer));
        d->seed = hash_seed();
        d->writers = writers;
        for (unsigned i = 0; i < writers; i++) {
                struct counter *overflow = &d->writer[i].counters[COUNTERS];
                pthread_mutex_init(&d->writer[i].lock, NULL);
                copy(overflow->policy, sizeof(overflow->policy), "overflow");
                copy(overflow->workload, sizeof(overflow->workload), "overflow");
                copy(overflow->namespace_, sizeof(overflow->namespace_), "overflow");
        }
        return d;
}

void denials_free(struct denials *d)
{
        if (!d)
                return;
        for (unsigned i = 0; i < d->writers; i++)
                pthread_mutex_destroy(&d->writer[i].lock);
        free(d);
}
