/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. Counters that a worker never waits for (the log is in log.c). Each worker has an open-addressed
 * table of label sets that only it changes; it puts a new set in with one release store, and the scrape, on the control
 * thread, walks the table and reads counters with relaxed loads. Taking a set out would pull it from under the scrape,
 * so a scrape holds the table's mutex, and the worker takes sets out (at most once a minute) only if it gets that mutex
 * by trylock: otherwise the next minute will do. The scrape adds up equal sets of several workers: one series each.
 * Bounds: EVENT_MAX_SETS a worker and one overflow set per reporter, REASONS_MAX reasons.
 */
#include "event.h"
#include "log.h"
#include "table.h"
#include "intern.h"
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define SLOTS (EVENT_MAX_SETS * 2)
#define EXPIRE_MS (15 * 60 * 1000)
#define EXPIRE_EVERY_MS (60 * 1000)
#define REASONS_MAX 32
#define FLAGS (FLAG_IDENTITY_ERROR + 1)

/* ---- label sets ---- */

enum label {
        L_REPORTER,
        L_SRC_WORKLOAD,
        L_SRC_CANONICAL,
        L_SRC_REVISION,
        L_SRC_NAMESPACE,
        L_SRC_PRINCIPAL,
        L_SRC_CLUSTER,
        L_SERVICE,
        L_SERVICE_NAMESPACE,
        L_SERVICE_NAME,
        L_DST_WORKLOAD,
        L_DST_CANONICAL,
        L_DST_REVISION,
        L_DST_NAMESPACE,
        L_DST_PRINCIPAL,
        L_DST_CLUSTER,
        L_SECURITY,
        L_SRC_REGION,
        L_SRC_ZONE,
        L_DST_REGION,
        L_DST_ZONE,
        L_LABELS
};

/* Order and names of reference ztunnel.md 8.1. Two labels show one value twice: app is the canonical name. */
static const struct {
        const char *name;
        enum label value;
} LABELS[] = {
        {"reporter", L_REPORTER},
        {"source_workload", L_SRC_WORKLOAD},
        {"source_canonical_service", L_SRC_CANONICAL},
        {"source_canonical_revision", L_SRC_REVISION},
        {"source_workload_namespace", L_SRC_NAMESPACE},
        {"source_principal", L_SRC_PRINCIPAL},
        {"source_app", L_SRC_CANONICAL},
        {"source_version", L_SRC_REVISION},
        {"source_cluster", L_SRC_CLUSTER},
        {"destination_service", L_SERVICE},
        {"destination_service_namespace", L_SERVICE_NAMESPACE},
        {"destination_service_name", L_SERVICE_NAME},
        {"destination_workload", L_DST_WORKLOAD},
        {"destination_canonical_service", L_DST_CANONICAL},
        {"destination_canonical_revision", L_DST_REVISION},
        {"destination_workload_namespace", L_DST_NAMESPACE},
        {"destination_principal", L_DST_PRINCIPAL},
        {"destination_app", L_DST_CANONICAL},
        {"destination_version", L_DST_REVISION},
        {"destination_cluster", L_DST_CLUSTER},
        {"request_protocol", L_LABELS}, /* "tcp", and response_flags after it */
        {"connection_security_policy", L_SECURITY},
        {"source_region", L_SRC_REGION},
        {"source_zone", L_SRC_ZONE},
        {"destination_region", L_DST_REGION},
        {"destination_zone", L_DST_ZONE},
};

static const char *const FLAG_NAMES[FLAGS] = {
        [FLAG_NONE] = "-",
        [FLAG_DENY] = "DENY",
        [FLAG_CONNECT] = "CONNECT",
        [FLAG_TLS_FAILURE] = "TLS_FAILURE",
        [FLAG_H2_FAILURE] = "H2_HANDSHAKE_FAILURE",
        [FLAG_NETWORK_POLICY] = "NETWORK_POLICY",
        [FLAG_IDENTITY_ERROR] = "IDENTITY_ERROR",
};

static const struct {
        const char *name, *type, *help;
} COUNTERS[EV_COUNTERS] = {
        [EV_TUNNELS_OPENED] = {"sidestep_tunnels_opened_total", "counter", "HBONE tunnels opened, both ends."},
        [EV_TUNNELS_CLOSED] = {"sidestep_tunnels_closed_total", "counter", "HBONE tunnels closed, both ends."},
        [EV_TUNNELS_OPEN] = {"sidestep_tunnels_open", "gauge", "HBONE tunnels that are open."},
        [EV_STREAMS_RESET] = {"sidestep_streams_reset_total", "counter", "Streams that ended with a reset."},
        [EV_TLS_HANDSHAKES] = {"sidestep_tls_handshakes_total", "counter", "TLS handshakes completed."},
        [EV_KEY_UPDATES] = {"sidestep_tls_key_updates_total", "counter", "TLS key updates sent."},
        [EV_BUFFERED_BYTES] = {"sidestep_buffered_bytes", "gauge", "Bytes buffered for streams."},
        [EV_SAME_NODE] = {"sidestep_same_node_connections_total", "counter",
                          "Connections between two pods of this engine without TLS."},
        [EV_VOUCHED] = {"sidestep_vouched_pairs_total", "counter",
                        "Pairs of pods of this node that were allowed to talk natively."},
        [EV_VOUCH_FULL] = {"sidestep_vouched_full_total", "counter",
                           "Pairs that stay with the engine because a table was full."},
        [EV_OUTSIDE] = {"sidestep_vouched_outside_total", "counter",
                        "Destinations outside the mesh that a pod was allowed to reach natively."},
        [EV_OUTSIDE_FULL] =
                {"sidestep_vouched_outside_full_total", "counter",
                 "Connections after which a destination stays with the engine: the pod, or the node, has as "
                 "many as it may."},
};

struct event_set {
        _Atomic uint64_t opened, received, sent, closed[FLAGS];
        _Atomic uint64_t used_ms;
        _Atomic uint32_t refs;
        uint32_t len;
        uint64_t hash;
        bool locality; /* some workload is known: the four labels at the end are shown */
        char values[]; /* L_LABELS strings, each with its NUL */
};

struct reason {
        _Atomic(const char *) text;
        _Atomic uint64_t count;
};

struct event_worker {
        unsigned number;
        pthread_mutex_t scrape; /* held by a scrape; the worker only tries */
        uint64_t expired_ms;
        uint32_t nsets;
        uint64_t seed;
        struct event_set *overflow[2];
        struct reason reasons[REASONS_MAX];
        _Atomic int64_t sockets[2], counters[EV_COUNTERS];
        _Atomic(struct event_set *) slots[SLOTS];
};

struct event {
        unsigned workers;
        struct event_worker **worker;
        struct log *log;
};

static const char *known(const char *s)
{
        return s && *s ? s : "unknown";
}

static struct event_set *set_new(const char *const values[L_LABELS], bool locality)
{
        size_t len = 0;
        for (unsigned i = 0; i < L_LABELS; i++)
                len += strlen(values[i]) + 1;
        struct event_set *s = must_alloc(sizeof(*s) + len);
        char *at = s->values;
        for (unsigned i = 0; i < L_LABELS; i++)
                at = stpcpy(at, values[i]) + 1;
        s->len = (uint32_t)len;
        s->locality = locality;
        return s;
}

static bool set_is(const struct event_set *s, uint64_t hash, const char *const values[L_LABELS], bool locality)
{
        const char *at = s->values;
        if (s->hash != hash || s->locality != locality)
                return false;
        for (unsigned i = 0; i < L_LABELS; i++) {
                if (strcmp(at, values[i]) != 0)
                        return false;
                at += strlen(at) + 1;
        }
        return true;
}

static struct event_set *slot(struct event_worker *w, uint32_t i)
{
        return atomic_load_explicit(&w->slots[i], memory_order_relaxed);
}

static void slot_free(struct event_worker *w, uint32_t i)
{
        free(slot(w, i));
        atomic_store_explicit(&w->slots[i], NULL, memory_order_relaxed);
        w->nsets--;
        for (uint32_t j = (i + 1) % SLOTS; slot(w, j); j = (j + 1) % SLOTS) {
                uint32_t home = (uint32_t)(slot(w, j)->hash % SLOTS);
                if ((j + SLOTS - home) % SLOTS >= (j + SLOTS - i) % SLOTS) {
                        atomic_store_explicit(&w->slots[i], slot(w, j), memory_order_relaxed);
                        atomic_store_explicit(&w->slots[j], NULL, memory_order_relaxed);
                        i = j;
                }
        }
}

static void expire(struct event_worker *w, uint64_t now_ms)
{
        if (now_ms - w->expired_ms < EXPIRE_EVERY_MS || pthread_mutex_trylock(&w->scrape))
                return;
        w->expired_ms = now_ms;
        for (uint32_t i = 0; i < SLOTS;) {
                struct event_set *s = slot(w, i);
                if (s && !s->refs && now_ms - s->used_ms >= EXPIRE_MS)
                        slot_free(w, i); /* another may have moved here: look again */
                else
                        i++;
        }
        pthread_mutex_unlock(&w->scrape);
}

static struct event_set *set_find(struct event_worker *w, const char *const values[L_LABELS], bool locality)
{
        uint64_t hash = w->seed;
        for (unsigned i = 0; i < L_LABELS; i++)
                hash = hash_bytes(values[i], strlen(values[i]), hash);
        uint32_t at = (uint32_t)(hash % SLOTS);
        for (struct event_set *s; (s = slot(w, at)) != NULL; at = (at + 1) % SLOTS)
                if (set_is(s, hash, values, locality))
                        return s;
        if (w->nsets == EVENT_MAX_SETS)
                return w->overflow[*values[L_REPORTER] == 'd'];
        struct event_set *s = set_new(values, locality);
        s->hash = hash;
        w->nsets++;
        atomic_store_explicit(&w->slots[at], s, memory_order_release);
        return s;
}

static void side(const char *values[L_LABELS], const struct workload *w, enum label first, enum label cluster)
{
        values[first] = known(w ? w->workload_name : NULL);
        values[first + 1] = known(w ? w->canonical_name : NULL);
        values[first + 2] = known(w ? w->canonical_revision : NULL);
        values[first + 3] = known(w ? w->namespace_ : NULL);
        values[cluster] = known(w ? w->cluster_id : NULL);
}

struct event_set *event_hold(struct event_worker *w, const struct event_labels *l, uint64_t now_ms)
{
        const char *values[L_LABELS];
        values[L_REPORTER] = l->reporter == EVENT_SOURCE ? "source" : "destination";
        side(values, l->src, L_SRC_WORKLOAD, L_SRC_CLUSTER);
        side(values, l->dst, L_DST_WORKLOAD, L_DST_CLUSTER);
        values[L_SRC_PRINCIPAL] = known(l->src_principal);
        values[L_DST_PRINCIPAL] = known(l->dst_principal);
        values[L_SERVICE] = known(l->service_host);
        values[L_SERVICE_NAMESPACE] = known(l->service_namespace);
        values[L_SERVICE_NAME] = known(l->service_name);
        values[L_SECURITY] = l->mutual_tls ? "mutual_tls" : "unknown";
        values[L_SRC_REGION] = known(l->src ? l->src->region : NULL);
        values[L_SRC_ZONE] = known(l->src ? l->src->zone : NULL);
        values[L_DST_REGION] = known(l->dst ? l->dst->region : NULL);
        values[L_DST_ZONE] = known(l->dst ? l->dst->zone : NULL);
        expire(w, now_ms);
        struct event_set *s = set_find(w, values, l->src || l->dst);
        atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
        atomic_store_explicit(&s->used_ms, now_ms, memory_order_relaxed);
        return s;
}

struct event_set *event_open(struct event_worker *w, const struct event_labels *l, uint64_t now_ms)
{
        struct event_set *s = event_hold(w, l, now_ms);
        atomic_fetch_add_explicit(&s->opened, 1, memory_order_relaxed);
        return s;
}

void event_add(struct event_set *s, uint64_t opened, uint64_t closed, uint64_t received, uint64_t sent, uint64_t now_ms)
{
        atomic_fetch_add_explicit(&s->opened, opened, memory_order_relaxed);
        atomic_fetch_add_explicit(&s->closed[FLAG_NONE], closed, memory_order_relaxed);
        event_bytes(s, received, sent);
        atomic_store_explicit(&s->used_ms, now_ms, memory_order_relaxed);
}

void event_drop(struct event_set *s)
{
        atomic_fetch_sub_explicit(&s->refs, 1, memory_order_relaxed);
}

void event_bytes(struct event_set *s, uint64_t received, uint64_t sent)
{
        if (received)
                atomic_fetch_add_explicit(&s->received, received, memory_order_relaxed);
        if (sent)
                atomic_fetch_add_explicit(&s->sent, sent, memory_order_relaxed);
}

void event_close(struct event_worker *w, struct event_set *s, enum event_flag flag, uint64_t now_ms)
{
        atomic_fetch_add_explicit(&s->closed[flag], 1, memory_order_relaxed);
        atomic_store_explicit(&s->used_ms, now_ms, memory_order_relaxed);
        atomic_fetch_sub_explicit(&s->refs, 1, memory_order_relaxed);
        expire(w, now_ms);
}

void event_refused(struct event_worker *w, const char *reason)
{
        unsigned i = 0;
        for (; i < REASONS_MAX - 1; i++) {
                const char *text = atomic_load_explicit(&w->reasons[i].text, memory_order_relaxed);
                if (!text)
                        atomic_store_explicit(&w->reasons[i].text, reason, memory_order_release);
                if (!text || strcmp(text, reason) == 0)
                        break;
        }
        if (i == REASONS_MAX - 1)
                atomic_store_explicit(&w->reasons[i].text, "other", memory_order_release);
        atomic_fetch_add_explicit(&w->reasons[i].count, 1, memory_order_relaxed);
}

void event_sockets(struct event_worker *w, enum event_reporter r, int delta)
{
        atomic_fetch_add_explicit(&w->sockets[r], delta, memory_order_relaxed);
}

void event_count(struct event_worker *w, enum event_counter c, int64_t delta)
{
        atomic_fetch_add_explicit(&w->counters[c], delta, memory_order_relaxed);
}

/* ---- the scrape ---- */

struct series {
        const struct event_set *set; /* labels; valid while the mutexes are held */
        uint64_t opened, received, sent, closed[FLAGS];
};

struct text {
        char *p;
        size_t len, cap;
};

static void put(struct text *t, const char *s, size_t n)
{
        if (t->len + n > t->cap) {
                t->cap = (t->len + n) * 2;
                t->p = must_grow(t->p, t->cap);
        }
        memcpy(t->p + t->len, s, n);
        t->len += n;
}

static void raw(struct text *t, const char *s)
{
        put(t, s, strlen(s));
}

static void value(struct text *t, const char *s)
{
        for (; *s; s++) {
                if (*s == '\n')
                        raw(t, "\\n");
                else if (*s == '"' || *s == '\\')
                        put(t, (char[]){'\\', *s}, 2);
                else
                        put(t, s, 1);
        }
}

static void number(struct text *t, const char *before, int64_t n)
{
        char buf[32];
        raw(t, before);
        put(t, buf, (size_t)snprintf(buf, sizeof(buf), " %lld\n", (long long)n));
}

static void family(struct text *t, const char *name, const char *type, const char *help)
{
        raw(t, "# HELP ");
        raw(t, name);
        raw(t, " ");
        raw(t, help);
        raw(t, "\n# TYPE ");
        raw(t, name);
        raw(t, " ");
        raw(t, type);
        raw(t, "\n");
}

static void sample(struct text *t, const char *name, const struct event_set *s, enum event_flag flag, uint64_t n)
{
        const char *values[L_LABELS], *at = s->values;
        for (unsigned i = 0; i < L_LABELS; i++, at += strlen(at) + 1)
                values[i] = at;
        raw(t, name);
        for (unsigned i = 0; i < sizeof(LABELS) / sizeof(*LABELS); i++) {
                if (LABELS[i].value == L_SRC_REGION && !s->locality)
                        break;
                raw(t, i ? "," : "{");
                raw(t, LABELS[i].name);
                raw(t, "=\"");
                if (LABELS[i].value == L_LABELS) {
                        raw(t, "tcp\",response_flags=\"");
                        raw(t, FLAG_NAMES[flag]);
                } else {
                        value(t, values[LABELS[i].value]);
                }
                raw(t, "\"");
        }
        number(t, "}", (int64_t)n);
}

static int by_labels(const void *a, const void *b)
{
        const struct event_set *x = ((const struct series *)a)->set, *y = ((const struct series *)b)->set;
        if (x->len != y->len)
                return x->len < y->len ? -1 : 1;
        int c = memcmp(x->values, y->values, x->len);
        return c ? c : (int)x->locality - (int)y->locality;
}

static struct series read_set(const struct event_set *s)
{
        struct series r = {.set = s, .opened = s->opened, .received = s->received, .sent = s->sent};
        for (unsigned f = 0; f < FLAGS; f++)
                r.closed[f] = s->closed[f];
        return r;
}

static size_t gather(struct event *e, struct series *all)
{
        size_t n = 0, kept = 0;
        for (unsigned i = 0; i < e->workers; i++) {
                struct event_worker *w = e->worker[i];
                for (uint32_t k = 0; k < SLOTS; k++) {
                        const struct event_set *s = atomic_load_explicit(&w->slots[k], memory_order_acquire);
                        if (s)
                                all[n++] = read_set(s);
                }
                for (unsigned k = 0; k < 2; k++)
                        if (w->overflow[k]->opened)
                                all[n++] = read_set(w->overflow[k]);
        }
        qsort(all, n, sizeof(*all), by_labels);
        for (size_t i = 0; i < n; i++) {
                if (!kept || by_labels(&all[kept - 1], &all[i])) {
                        all[kept++] = all[i];
                        continue;
                }
                struct series *to = &all[kept - 1];
                to->opened += all[i].opened;
                to->received += all[i].received;
                to->sent += all[i].sent;
                for (unsigned f = 0; f < FLAGS; f++)
                        to->closed[f] += all[i].closed[f];
        }
        return kept;
}

static void traffic(struct text *t, struct event *e)
{
        static const struct {
                const char *name, *help;
        } families[] = {
                {"istio_tcp_connections_opened_total", "TCP connections opened."},
                {"istio_tcp_connections_closed_total", "TCP connections closed."},
                {"istio_tcp_connections_failed_total", "TCP connections that failed (unstable)."},
                {"istio_tcp_received_bytes_total", "Bytes in the direction of requests."},
                {"istio_tcp_sent_bytes_total", "Bytes in the direction of responses."},
        };
        struct series *all = must_alloc(((size_t)e->workers * (EVENT_MAX_SETS + 2) + 1) * sizeof(*all));
        for (unsigned i = 0; i < e->workers; i++)
                pthread_mutex_lock(&e->worker[i]->scrape);
        size_t n = gather(e, all);
        for (unsigned k = 0; k < sizeof(families) / sizeof(*families); k++) {
                const char *name = families[k].name;
                family(t, name, "counter", families[k].help);
                for (size_t i = 0; i < n; i++) {
                        const struct series *s = &all[i];
                        if (k == 0 || k > 2)
                                sample(t, name, s->set, FLAG_NONE, k == 0 ? s->opened : k == 3 ? s->received : s->sent);
                        for (unsigned f = k == 2; f < FLAGS && (k == 1 || k == 2); f++)
                                if (s->closed[f])
                                        sample(t, name, s->set, f, s->closed[f]);
                }
        }
        for (unsigned i = 0; i < e->workers; i++)
                pthread_mutex_unlock(&e->worker[i]->scrape);
        free(all);
        family(t, "sidestep_label_sets", "gauge", "Sets of traffic labels in memory.");
        number(t, "sidestep_label_sets", (int64_t)n);
}

static void refusals(struct text *t, struct event *e)
{
        family(t, "sidestep_connections_refused_total", "counter",
               "Connections refused before they had traffic labels.");
        for (unsigned i = 0; i < e->workers; i++) {
                for (unsigned k = 0; k < REASONS_MAX; k++) {
                        const char *text = atomic_load_explicit(&e->worker[i]->reasons[k].text, memory_order_acquire);
                        uint64_t sum = 0;
                        bool first = true;
                        if (!text)
                                continue;
                        for (unsigned j = 0; j < e->workers; j++) {
                                for (unsigned x = 0; x < REASONS_MAX; x++) {
                                        struct reason *r = &e->worker[j]->reasons[x];
                                        const char *other = atomic_load_explicit(&r->text, memory_order_acquire);
                                        if (!other || strcmp(other, text) != 0)
                                                continue;
                                        sum += r->count;
                                        first &= j > i || (j == i && x >= k);
                                }
                        }
                        if (!first) /* shown already, with a worker before */
                                continue;
                        raw(t, "sidestep_connections_refused_total{reason=\"");
                        value(t, text);
                        number(t, "\"}", (int64_t)sum);
                }
        }
}

int event_metrics(struct event *e, int fd)
{
        struct text t = {0};
        int64_t sum[2] = {0};
        int r = 0;
        traffic(&t, e);
        refusals(&t, e);
        for (unsigned i = 0; i < e->workers; i++) {
                sum[0] += e->worker[i]->sockets[0];
                sum[1] += e->worker[i]->sockets[1];
        }
        family(&t, "istio_tcp_sockets_open", "gauge", "Sockets and tunnels that are open (unstable).");
        number(&t, "istio_tcp_sockets_open{reporter=\"source\"}", sum[EVENT_SOURCE]);
        number(&t, "istio_tcp_sockets_open{reporter=\"destination\"}", sum[EVENT_DESTINATION]);
        for (unsigned c = 0; c < EV_COUNTERS; c++) {
                int64_t n = 0;
                for (unsigned i = 0; i < e->workers; i++)
                        n += e->worker[i]->counters[c];
                family(&t, COUNTERS[c].name, COUNTERS[c].type, COUNTERS[c].help);
                number(&t, COUNTERS[c].name, n);
        }
        family(&t, "sidestep_log_lines_dropped_total", "counter",
               "Log lines that found no room: the reader is too slow.");
        number(&t, "sidestep_log_lines_dropped_total", (int64_t)log_dropped(e->log));
        for (size_t at = 0; at < t.len && !r;) {
                ssize_t n = write(fd, t.p + at, t.len - at);
                if (n > 0)
                        at += (size_t)n;
                else if (n == 0 || errno != EINTR)
                        r = n ? -errno : -EIO;
        }
        free(t.p);
        return r;
}

/* ---- log, life ---- */

void event_log(struct event *e, struct event_worker *w, const char *level, const char *fmt, ...)
{
        va_list ap;
        va_start(ap, fmt);
        log_line(e->log, w ? w->number : e->workers, level, fmt, ap);
        va_end(ap);
}

void event_dry_run(struct event *e, struct event_worker *w, const struct endpoint *src, const char *who,
                   const struct endpoint *dst, const struct workload *to, const char *policy)
{
        char from[ENDPOINT_STRLEN], at[ENDPOINT_STRLEN];
        event_log(e, w, "info",
                  "dry run would deny src.addr=%s%s%.255s%s dst.addr=%s dst.workload=\"%.255s\" "
                  "dst.namespace=\"%.255s\" policy=\"%.255s\"",
                  endpoint_format(src, from), who ? " src.identity=\"" : "", who ? who : "", who ? "\"" : "",
                  endpoint_format(dst, at), to->name, to->namespace_, policy);
}

bool event_log_room(struct event *e, struct event_worker *w)
{
        return log_room(e->log, w->number);
}

struct event_worker *event_worker(struct event *e, unsigned i)
{
        return e->worker[i];
}

static struct event_worker *worker_new(unsigned number)
{
        struct event_worker *w = must_alloc(sizeof(*w));
        w->number = number;
        w->seed = hash_seed();
        pthread_mutex_init(&w->scrape, NULL);
        for (unsigned r = 0; r < 2; r++) {
                const char *values[L_LABELS];
                for (unsigned i = 0; i < L_LABELS; i++)
                        values[i] = "overflow";
                values[L_REPORTER] = r == EVENT_SOURCE ? "source" : "destination";
                values[L_SECURITY] = "unknown";
                w->overflow[r] = set_new(values, false);
        }
        return w;
}

static void release(struct event *e)
{
        for (unsigned i = 0; i < e->workers; i++) {
                struct event_worker *w = e->worker[i];
                for (uint32_t k = 0; k < SLOTS; k++)
                        free(slot(w, k));
                free(w->overflow[0]);
                free(w->overflow[1]);
                pthread_mutex_destroy(&w->scrape);
                free(w);
        }
        free(e->worker);
        free(e);
}

int event_new(struct event **out, unsigned workers, int log_fd)
{
        struct event *e = must_alloc(sizeof(*e));
        int r;
        e->workers = workers;
        e->worker = must_alloc(workers * sizeof(*e->worker));
        for (unsigned i = 0; i < workers; i++)
                e->worker[i] = worker_new(i);
        r = log_new(&e->log, workers, log_fd);
        if (r) {
                release(e);
                return r;
        }
        *out = e;
        return 0;
}

void event_free(struct event *e)
{
        if (!e)
                return;
        log_free(e->log);
        release(e);
}
