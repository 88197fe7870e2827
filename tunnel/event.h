/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the engine tells the world: counters per label set, and the access log.
 *
 * Counters: each worker has a table of label sets of its own; a connection holds a counted reference to its set and
 * adds with relaxed atomics; the scrape sums over workers. A set that no connection holds expires 15 minutes after its
 * last use; at most EVENT_MAX_SETS per worker, beyond that everything counts into one set with "overflow" labels. Log:
 * a worker formats a line into a bounded ring; a thread of its own writes it out and may block as long as it likes;
 * lines that found no room are counted (sidestep_log_lines_dropped_total), never waited for.
 */
#ifndef SIDESTEP_EVENT_H
#define SIDESTEP_EVENT_H

#include "mesh.h"
#include <stdarg.h>

#define EVENT_MAX_SETS 4096

enum event_reporter { EVENT_SOURCE, EVENT_DESTINATION };
/* response_flags of reference/ztunnel.md 8.1, and why. */
enum event_flag {
        FLAG_NONE,
        FLAG_DENY,
        FLAG_CONNECT,
        FLAG_TLS_FAILURE,
        FLAG_H2_FAILURE,
        FLAG_NETWORK_POLICY,
        FLAG_IDENTITY_ERROR
};

/* One side of a flow, as far as it is known; strings are copied. NULL is "unknown". */
struct event_labels {
        enum event_reporter reporter;
        const struct workload *src, *dst;
        const char *src_principal, *dst_principal; /* NULL where there was no identity */
        const char *service_host, *service_name, *service_namespace;
        bool mutual_tls; /* only when this flow had TLS */
};

struct event;        /* the engine's */
struct event_worker; /* one worker's */
struct event_set;    /* one label set of one worker */

int event_new(struct event **out, unsigned workers, int log_fd);
void event_free(struct event *e);
struct event_worker *event_worker(struct event *e, unsigned i);

/* Takes a reference; now_ms is the worker's clock. Never fails: beyond the bound it is the overflow set. */
struct event_set *event_open(struct event_worker *w, const struct event_labels *l, uint64_t now_ms); /* counts opened */
/* For connections that are counted elsewhere (vouch.h): the same without counting one, until event_drop. Any thread may
 * add to what is held; closed ones ended without a flag. */
struct event_set *event_hold(struct event_worker *w, const struct event_labels *l, uint64_t now_ms);
void event_add(struct event_set *s, uint64_t opened, uint64_t closed, uint64_t received, uint64_t sent,
               uint64_t now_ms);
void event_drop(struct event_set *s);
/* received: request direction, sent: response direction, for both reporters (the flip of ztunnel.md 8.1). */
void event_bytes(struct event_set *s, uint64_t received, uint64_t sent);
void event_close(struct event_worker *w, struct event_set *s, enum event_flag flag,
                 uint64_t now_ms); /* counts closed, failed; drops the reference */

/* Refusals that never became a connection with labels: by reason ("unknown_destination", "held_timeout", "own_tuple",
 * ...). Static strings only. */
void event_refused(struct event_worker *w, const char *reason);
void event_sockets(struct event_worker *w, enum event_reporter r, int delta);

/* Other counters and gauges of the engine, each registered once in event.c's table. */
enum event_counter {
        EV_TUNNELS_OPENED,
        EV_TUNNELS_CLOSED,
        EV_TUNNELS_OPEN,
        EV_STREAMS_RESET,
        EV_TLS_HANDSHAKES,
        EV_KEY_UPDATES,
        EV_BUFFERED_BYTES,
        EV_SAME_NODE,
        EV_VOUCHED,
        EV_VOUCH_FULL,
        EV_OUTSIDE,
        EV_OUTSIDE_FULL,
        EV_COUNTERS
};
void event_count(struct event_worker *w, enum event_counter c, int64_t delta);

/* One log line, level "info"|"warn"|"error"; the time and the level are put in front, LF at the end. Callable from any
 * thread (w NULL: control thread). */
void event_log(struct event *e, struct event_worker *w, const char *level, const char *fmt, ...)
        __attribute__((format(printf, 4, 5)));

/* False: a line of this worker would find no room and was counted; for lines that cost much to make. */
bool event_log_room(struct event *e, struct event_worker *w);
/* The line about a connection that a dry run would deny. who: NULL has no identity. */
void event_dry_run(struct event *e, struct event_worker *w, const struct endpoint *src, const char *who,
                   const struct endpoint *dst, const struct workload *to, const char *policy);

/* Prometheus text, HELP and TYPE included. */
int event_metrics(struct event *e, int fd);

#endif
