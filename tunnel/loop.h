/* SPDX-License-Identifier: Apache-2.0 */
/* A worker: one thread, one epoll, its own pods' listeners, connections and tunnels. Nothing here is shared unless it
 * says so. */
#ifndef SIDESTEP_LOOP_H
#define SIDESTEP_LOOP_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include "event.h"
#include "mesh.h"

struct tunnel;
struct pod;
struct identity;
struct flow;
struct tun;

/* What an epoll event belongs to. Edge-triggered: set once, the flags remember. */
enum io_type { IO_WAKE, IO_LISTENER, IO_SIDE, IO_TUN };

struct io {
        enum io_type type;
        int fd;                                  /* -1: closed; late events are ignored */
        bool readable, writable, hangup, urgent; /* urgent: a read may end at the mark */
        bool failed; /* an error was reported: nothing more will come, also where nobody is reading */
};

/* Doubly linked, circular, with a head that is a link too. */
struct link {
        struct link *prev, *next;
};

static inline void link_init(struct link *l)
{
        l->prev = l->next = l;
}

static inline bool link_alone(const struct link *l)
{
        return l->next == l;
}

static inline void link_remove(struct link *l)
{
        l->prev->next = l->next;
        l->next->prev = l->prev;
        link_init(l);
}

static inline void link_add(struct link *head, struct link *l)
{
        link_remove(l);
        l->prev = head->prev;
        l->next = head;
        head->prev->next = l;
        head->prev = l;
}

#define container(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* Deadlines of a few fixed lengths: each length is a queue that is sorted by itself. */
enum timer_length { TIMER_1S, TIMER_5S, TIMER_10S, TIMER_15S, TIMER_20S, TIMER_5MIN, TIMER_1H, TIMER_LENGTHS };
enum timer_kind { TIMER_FLOW, TIMER_TUN, TIMER_PING };

struct timer {
        struct link link;
        uint64_t due_ms;
        enum timer_kind kind;
};

#define LOOP_HASH 256

/* A pod as one worker has it. */
struct seat {
        struct link link;
        struct pod *pod;
        struct listener *listeners[3];
        struct link flows, tuns;
        /* Connections that were let in here, those of other pods of this node too; in the order of their epoch. */
        struct link judged, stale; /* stale: some of them were judged by what is no longer so (worker.stale) */
        uint64_t stamp, epoch;     /* of what decides about them; counts its changes */
};

struct worker {
        struct tunnel *engine;
        unsigned index;
        pthread_t thread;
        int epoll;
        struct io wake;
        bool stop;
        bool woken; /* by what may have come after this turn took mail and state: another turn at once */

        const struct mesh_view *view;
        uint64_t generation; /* of view: when it changes, what waits is looked at again */
        uint64_t in_force;   /* generation by which everything open was judged */
        bool look_again;
        struct link stale; /* seats with connections to judge anew */
        struct event_worker *ev;
        uint64_t now_ms, busy_ms, random; /* busy_ms: when events came last */
        /* Whether to look, or to pause, before a sleep: see loop.c. Of this turn: flows that were run, bytes that they
         * moved, from the client and to it. Of the turns before: how many in a row moved much one way, and which. */
        int keen, ran;
        size_t moved[2];
        unsigned streamed, gathered;
        bool back;
        int64_t credit_ns; /* CPU that it may spend on looking */
        uint64_t cpu_ns;   /* its own, when it looked last */

        struct link seats[LOOP_HASH]; /* by hash of the workload's uid */
        struct link identities[LOOP_HASH];
        struct link timers[TIMER_LENGTHS];
        struct link held; /* flows and tunnels that wait for state: struct flow, link `wait` */
        struct link held_tuns;
        struct link ready;  /* flows with more to do than one turn allows */
        struct link dirty;  /* tunnels with something to write */
        struct link unread; /* tunnels with more to read than one turn allows */
        struct link owed;   /* flows whose answer waits for their first bytes: struct flow, link `owed` */
        struct link dead_flows, left_flows, dead_tuns,
                dead_listeners; /* freed at the end of a turn: events of this turn may still name them */
        struct link pool[LOOP_HASH];

        _Atomic(struct mail *) mail; /* newest first; anybody adds, the worker takes all */

        uint8_t *scratch; /* LOOP_SCRATCH bytes for one read */
};

#define LOOP_SCRATCH (256 << 10)

/* A command to a worker; runs there. */
struct mail {
        struct mail *next;
        void (*run)(struct worker *w, void *arg);
        void *arg;
        atomic_uint *left; /* counted down when it has run; NULL: nobody waits */
};

int loop_start(struct worker *w, struct tunnel *engine, unsigned index);
void loop_stop(struct worker *w);
/* Runs a function in every worker and waits until all have. */
int loop_all(struct tunnel *engine, void (*run)(struct worker *, void *), void *arg);
void loop_wake(struct worker *w);
/* From one worker to another, which owns arg from then on; not once w->stop is set here. -ENOMEM: it was not sent. */
int loop_mail(struct worker *to, void (*run)(struct worker *, void *), void *arg);

int loop_watch(struct worker *w, struct io *io);
void timer_set(struct worker *w, struct timer *t, enum timer_kind kind, enum timer_length length);
/* The same for a timer that runs, but never later than it was. */
void timer_shorten(struct worker *w, struct timer *t, enum timer_kind kind, enum timer_length length);
static inline void timer_stop(struct timer *t)
{
        link_remove(&t->link);
}
uint64_t loop_random(struct worker *w);
/* The tunnel has more to read than one turn allows. */
void loop_again(struct worker *w, struct tun *t);
static inline uint32_t loop_hash(const char *text)
{
        uint32_t h = 2166136261u;
        for (; *text; text++)
                h = (h ^ (uint8_t)*text) * 16777619u;
        return h % LOOP_HASH;
}

#endif
