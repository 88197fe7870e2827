/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. A ring of the last LAST denials and a table of counters, both of fixed size and made once, under
 * one mutex: only connections that are denied come here (and those of which a dry run says so), the others never.
 * Nobody holds the mutex for longer than a copy; texts are made from copies. A counter that was not used for 15 minutes
 * gives its place to another when the table is full; what finds no place even so counts as policy "overflow".
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

struct denials {
        pthread_mutex_t lock;
        uint64_t seed, count; /* of entries ever */
        struct entry last[LAST];
        struct counter counters[COUNTERS + 1]; /* the last one: overflow */
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
static struct counter *counter_of(struct denials *d, const char *policy, const struct workload *w)
{
        struct counter key = {0};
        int64_t now = seconds();
        copy(key.policy, sizeof(key.policy), policy);
        copy(key.workload, sizeof(key.workload), w ? w->workload_name : "unknown");
        copy(key.namespace_, sizeof(key.namespace_), w ? w->namespace_ : "unknown");
        key.hash = hash_bytes(key.policy, sizeof(key) - offsetof(struct counter, policy), d->seed) | 1;
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

void denials_add(struct denials *d, const struct denial *what)
{
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
                counter_of(d, what->policy, what->workload)->denied++;
        pthread_mutex_unlock(&d->lock);
}

void denials_dry_run(struct denials *d, const char *policy, const struct workload *w)
{
        pthread_mutex_lock(&d->lock);
        counter_of(d, policy, w)->dry_run++;
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

static void family(FILE *out, const char *name, const char *help, const struct counter *all, bool dry_run)
{
        fprintf(out, "# HELP %s %s\n# TYPE %s counter\n", name, help, name);
        for (unsigned i = 0; i <= COUNTERS; i++) {
                const struct counter *c = &all[i];
                uint64_t n = dry_run ? c->dry_run : c->denied;
                if (!c->hash || !n)
                        continue;
                fprintf(out, "%s{policy=", name);
                quoted(out, c->policy);
                fputs(",destination_workload=", out);
                quoted(out, c->workload);
                fputs(",destination_workload_namespace=", out);
                quoted(out, c->namespace_);
                fprintf(out, "} %llu\n", (unsigned long long)n);
        }
}

int denials_metrics(struct denials *d, int fd)
{
        struct counter *all = must_alloc(sizeof(d->counters));
        char *text = NULL;
        size_t len = 0;
        FILE *out = open_memstream(&text, &len);
        if (!out) {
                free(all);
                return -errno;
        }
        pthread_mutex_lock(&d->lock);
        memcpy(all, d->counters, sizeof(d->counters));
        pthread_mutex_unlock(&d->lock);
        for (unsigned i = 0; i <= COUNTERS; i++) {
                whole(all[i].policy);
                whole(all[i].workload);
                whole(all[i].namespace_);
        }
        family(out, "sidestep_policy_denied_total", "Connections denied or cut, by the policy that did.", all, false);
        family(out, "sidestep_policy_dry_run_denied_total", "Connections that a dry run would have denied.", all, true);
        free(all);
        return finish(out, fd, &text, &len);
}

int denials_dump(struct denials *d, int fd)
{
        struct entry *all = must_alloc(sizeof(d->last));
        char *text = NULL, ip[ENDPOINT_STRLEN];
        size_t len = 0;
        FILE *out = open_memstream(&text, &len);
        if (!out) {
                free(all);
                return -errno;
        }
        pthread_mutex_lock(&d->lock);
        uint64_t count = d->count;
        memcpy(all, d->last, sizeof(d->last));
        pthread_mutex_unlock(&d->lock);
        fputc('[', out);
        uint64_t first = count > LAST ? count - LAST : 0;
        for (uint64_t i = first; i < count; i++) {
                struct entry *e = &all[i % LAST];
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

struct denials *denials_new(void)
{
        struct denials *d = must_alloc(sizeof(*d)); /* its pages are touched when they are used */
        pthread_mutex_init(&d->lock, NULL);
        d->seed = hash_seed();
        copy(d->counters[COUNTERS].policy, sizeof(d->counters[COUNTERS].policy), "overflow");
        copy(d->counters[COUNTERS].workload, sizeof(d->counters[COUNTERS].workload), "overflow");
        copy(d->counters[COUNTERS].namespace_, sizeof(d->counters[COUNTERS].namespace_), "overflow");
        return d;
}

void denials_free(struct denials *d)
{
        if (!d)
                return;
        pthread_mutex_destroy(&d->lock);
        free(d);
}
