/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * Edge-triggered epoll: every socket is added once, for reading and writing, and never changed; `readable` and
 * `writable` are remembered until a call says EAGAIN (or a short read shows that there was no more). One turn of the
 * loop: adopt the newest state of the mesh, judge anew some of the connections that it may end, take mail, take events,
 * run what is ready, write what the tunnels have, run out deadlines, free the dead. Nothing blocks. A state is in force
 * when no connection is left to judge and the resets were written.
 *
 * A sleep and its wake-up cost more than all the work of a small message (decision 0014). A worker that has little to
 * do at a time, and whose waits have been short, looks for events for LOOK_US before it sleeps, and lets everybody else
 * run between two looks (decision 0016). Its waits are a running average: one that was short, after a turn of few flows
 * and few bytes, speaks for looking, any other against it, so busy workers (whose turns gather more work while they
 * sleep) and idle ones sleep at once. Looking never costs more CPU than the work did.
 *
 * The other way round a stream. Where the sender is slower than its reader, the reader sleeps after each piece, and
 * each piece pays for its wake-up, on the sender's processor. A worker whose last turns all moved much and in one
 * direction therefore pauses before it sleeps, for GATHER_US, in which nothing wakes it and the sockets' buffers fill
 * (decision 0018). Anything in the other direction, or less than STREAM_BYTES a flow, ends that: who waits for an
 * answer does not wait for a pause.
 *
 * The control thread speaks to a worker by mail: a function that runs inside it. It waits for the answer with a
 * deadline; a worker that does not answer for 10 s is stuck, and the command fails.
 */
#include <errno.h>
#include <malloc.h>
#include <sched.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include "block.h"
#include "conn.h"
#include "hbone.h"
#include "loop.h"
#include "pod.h"

#define MAIL_DEADLINE_MS 10000
#define TRIM_KEEP (2 << 20)
#define EVENTS 256
#define LOOK_US 200
#define WAKE_US 40 /* what a sleep adds to a wait, about */
#define FEW_FLOWS 2
#define FEW_BYTES 8192
#define KEEN_MOST 256 /* of worker.keen: all waits were short */
#define KEEN_SPAN 16
#define KEEN_LOOKS 224 /* nearly all: where every second wait is long, looking costs as much again as the work */
#define CREDIT_NS (10 * 1000 * 1000)
#define STREAM_BYTES (32 << 10) /* in a turn, for each flow that was run */
#define STREAM_TURNS 32
#define GATHER_US 200
#define STREAM_GAP_NS (20 * 1000 * 1000) /* a wait of that length ends a stream: who comes then has no part in it */

static const uint64_t lengths_ms[TIMER_LENGTHS] = {
        [TIMER_1S] = 1000,   [TIMER_5S] = 5000,     [TIMER_10S] = 10000,  [TIMER_15S] = 15000,
        [TIMER_20S] = 20000, [TIMER_5MIN] = 300000, [TIMER_1H] = 3600000,
};

static uint64_t clock_ns(clockid_t which)
{
        struct timespec t;
        clock_gettime(which, &t);
        return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t clock_ms(void)
{
        return clock_ns(CLOCK_MONOTONIC) / 1000000;
}

uint64_t loop_random(struct worker *w)
{
        /* xorshift64*: for choice, not for secrets */
        w->random ^= w->random >> 12;
        w->random ^= w->random << 25;
        w->random ^= w->random >> 27;
        return w->random * 2685821657736338717ull;
}

int loop_watch(struct worker *w, struct io *io)
{
        struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET, .data.ptr = io};
        if (io->type == IO_LISTENER || io->type == IO_WAKE)
                e.events = EPOLLIN;
        return epoll_ctl(w->epoll, EPOLL_CTL_ADD, io->fd, &e) < 0 ? -errno : 0;
}

void timer_set(struct worker *w, struct timer *t, enum timer_kind kind, enum timer_length length)
{
        t->kind = kind;
        t->due_ms = w->now_ms + lengths_ms[length];
        link_add(&w->timers[length], &t->link);
}

void timer_shorten(struct worker *w, struct timer *t, enum timer_kind kind, enum timer_length length)
{
        if (w->now_ms + lengths_ms[length] < t->due_ms)
                timer_set(w, t, kind, length);
}

static void run_timers(struct worker *w)
{
        for (int i = 0; i < TIMER_LENGTHS; i++) {
                while (!link_alone(&w->timers[i])) {
                        struct timer *t = container(w->timers[i].next, struct timer, link);
                        if (t->due_ms > w->now_ms)
                                break;
                        timer_stop(t);
                        if (t->kind == TIMER_FLOW)
                                flow_expired(container(t, struct flow, timer));
                        else if (t->kind == TIMER_TUN)
                                tun_expired(container(t, struct tun, timer));
                        else
                                tun_ping(container(t, struct tun, ping));
                }
        }
}

/* Milliseconds until the next deadline, at most a second. */
static int patience(const struct worker *w)
{
        uint64_t next = w->now_ms + 1000;
        if (!link_alone(&w->ready) || !link_alone(&w->dirty) || !link_alone(&w->unread) || !link_alone(&w->stale))
                return 0;
        if (!link_alone(&w->left_flows))
                next = w->now_ms + LEAVE_IDLE_MS;
        if (conn_answer_due(w) < next)
                next = conn_answer_due(w);
        for (int i = 0; i < TIMER_LENGTHS; i++) {
                if (link_alone(&w->timers[i]))
                        continue;
                const struct timer *t = container(w->timers[i].next, struct timer, link);
                if (t->due_ms < next)
                        next = t->due_ms;
        }
        return next > w->now_ms ? (int)(next - w->now_ms) : 0;
}

static void take_mail(struct worker *w)
{
        struct mail *m = atomic_load(&w->mail) ? atomic_exchange(&w->mail, NULL) : NULL, *oldest = NULL;
        while (m) {
                struct mail *next = m->next;
                m->next = oldest;
                oldest = m;
                m = next;
        }
        while (oldest) {
                struct mail *next = oldest->next;
                atomic_uint *left = oldest->left;
                oldest->run(w, oldest->arg);
                free(oldest);
                if (left)
                        atomic_fetch_sub(left, 1);
                oldest = next;
        }
}

static void dispatch(struct worker *w, struct epoll_event *e)
{
        struct io *io = e->data.ptr;
        if (io->fd < 0)
                return;
        if (e->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                io->readable = true;
        if (e->events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
                io->writable = true;
        if (e->events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                io->hangup = true;
        if (e->events & EPOLLERR)
                io->failed = true;
        if (e->events & EPOLLPRI)
                io->urgent = true;
        switch (io->type) {
        case IO_WAKE: {
                uint64_t n;
                if (read(io->fd, &n, sizeof(n)) < 0)
                        break; /* woken for what is there already */
                w->woken = true;
                break;
        }
        case IO_LISTENER:
                conn_accept(w, container(io, struct listener, io));
                break;
        case IO_SIDE:
                flow_event(side_of(io));
                break;
        case IO_TUN:
                tun_event(container(io, struct tun, io));
                break;
        }
}

static void free_dead_listeners(struct worker *w)
{
        while (!link_alone(&w->dead_listeners)) {
                struct listener *l = container(w->dead_listeners.next, struct listener, dead);
                link_remove(&l->dead);
                free(l);
        }
}

/* Events without a sleep, for as long as that may pay. */
static int look(struct worker *w, struct epoll_event *events, uint64_t now_ns)
{
        uint64_t cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID), until = now_ns + LOOK_US * 1000ull;
        int n = 0;
        w->credit_ns += (int64_t)(cpu - w->cpu_ns);
        if (w->credit_ns > CREDIT_NS)
                w->credit_ns = CREDIT_NS;
        if (w->credit_ns > 0) {
                while ((n = epoll_wait(w->epoll, events, EVENTS, 0)) == 0 && clock_ns(CLOCK_MONOTONIC) < until)
                        sched_yield();
                uint64_t after = clock_ns(CLOCK_THREAD_CPUTIME_ID);
                w->credit_ns -= (int64_t)(after - cpu);
                cpu = after;
        }
        w->cpu_ns = cpu;
        return n;
}

/* What a wait says about the next one: short, after a turn of little work, or not; and what the turn says of a stream.
 */
static void learn(struct worker *w, uint64_t waited_ns, bool slept)
{
        size_t moved = w->moved[0] + w->moved[1];
        bool pays =
                w->ran <= FEW_FLOWS && moved <= FEW_BYTES && waited_ns <= (LOOK_US + (slept ? WAKE_US : 0)) * 1000ull;
        w->keen += ((pays ? KEEN_MOST : 0) - w->keen) / KEEN_SPAN;
        if (moved) {
                bool back = w->moved[1] > 0, much = moved >= STREAM_BYTES * (size_t)(w->ran ? w->ran : 1);
                w->streamed = much && !w->moved[!back] && back == w->back ? w->streamed + 1 : 0;
                w->back = back;
        }
        if (waited_ns > STREAM_GAP_NS)
                w->streamed = 0;
        w->ran = 0;
        w->moved[0] = w->moved[1] = 0;
}

/* Lets more of a stream come, without being woken for each piece of it, if nothing is there. */
static int gather(struct worker *w, struct epoll_event *events)
{
        int n = epoll_wait(w->epoll, events, EVENTS, 0);
        if (n == 0) {
                nanosleep(&(struct timespec){.tv_nsec = GATHER_US * 1000}, NULL);
                w->gathered++;
        }
        return n;
}

/* The next events, at most `ms` milliseconds from now; sets the worker's clock. */
static int await(struct worker *w, struct epoll_event *events, int ms)
{
        uint64_t began = clock_ns(CLOCK_MONOTONIC);
        int n = ms && w->keen >= KEEN_LOOKS ? look(w, events, began) : 0;
        bool slept = n == 0 && ms;
        if (slept && w->streamed >= STREAM_TURNS)
                n = gather(w, events);
        if (n == 0)
                n = epoll_wait(w->epoll, events, EVENTS, ms);
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        if (ms)
                learn(w, now - began, slept);
        w->now_ms = now / 1000000;
        if (n > 0)
                w->busy_ms = w->now_ms;
        return n;
}

static void *loop_run(void *arg)
{
        struct worker *w = arg;
        struct epoll_event events[EVENTS];
        blocks_keep(true);
        while (!w->stop) {
                int n = await(w, events, w->woken ? 0 : patience(w));
                w->woken = false;
                w->view = mesh_view(w->engine->mesh, w->index);
                if (w->generation != view_generation(w->view) || w->look_again) {
                        w->generation = view_generation(w->view);
                        w->look_again = false;
                        conn_state_changed(w);
                }
                conn_review(w);
                take_mail(w);
                for (int i = 0; i < n; i++)
                        dispatch(w, &events[i]);
                for (struct link *l = w->ready.next, *end = w->ready.prev; !link_alone(&w->ready);) {
                        /* those that are ready now, once: what becomes ready again meanwhile waits for the next turn */
                        struct link *next = l->next;
                        bool last = l == end;
                        link_remove(l);
                        w->ran++;
                        flow_run(container(l, struct flow, ready));
                        if (last || next == &w->ready)
                                break;
                        l = next;
                }
                for (struct link *end = w->unread.prev, *l; !link_alone(&w->unread);) {
                        l = w->unread.next;
                        link_remove(l);
                        tun_event(container(l, struct tun, unread));
                        if (l == end)
                                break;
                }
                conn_answer(w);
                tun_flush_dirty(w);
                if (w->in_force != w->generation && link_alone(&w->stale)) {
                        w->in_force = w->generation;
                        mesh_in_force(w->engine->mesh, w->index);
                }
                run_timers(w);
                if (conn_free_dead(w, n == 0 && link_alone(&w->ready) && link_alone(&w->stale)))
                        w->woken = true; /* for the rest of them the next turn does not wait */
                tun_free_dead(w);
                free_dead_listeners(w);
                if (w->now_ms - w->busy_ms > 1000)
                        blocks_give_back();
        }
        conn_abort_all(w);
        w->now_ms += LEAVE_IDLE_MS; /* all of it is due */
        while (conn_free_dead(w, true))
                ;
        tun_free_dead(w);
        free_dead_listeners(w);
        mesh_leave(w->engine->mesh, w->index);
        blocks_keep(false);
        return NULL;
}

void loop_again(struct worker *w, struct tun *t)
{
        link_add(&w->unread, &t->unread);
}

void loop_wake(struct worker *w)
{
        uint64_t one = 1;
        if (write(w->wake.fd, &one, sizeof(one)) < 0)
                return; /* full: it is awake */
}

static void post(struct worker *w, struct mail *m)
{
        m->next = atomic_load(&w->mail);
        while (!atomic_compare_exchange_weak(&w->mail, &m->next, m))
                ;
        loop_wake(w);
}

int loop_mail(struct worker *to, void (*run)(struct worker *, void *), void *arg)
{
        struct mail *m = calloc(1, sizeof(*m));
        if (!m)
                return -ENOMEM;
        *m = (struct mail){.run = run, .arg = arg};
        post(to, m);
        return 0;
}

int loop_all(struct tunnel *engine, void (*run)(struct worker *, void *), void *arg)
{
        /* On the heap: after a deadline the workers may still count it down. */
        atomic_uint *left = malloc(sizeof(*left));
        if (!left)
                return -ENOMEM;
        atomic_init(left, engine->nworkers);
        for (unsigned i = 0; i < engine->nworkers; i++) {
                struct worker *w = &engine->workers[i];
                struct mail *m = calloc(1, sizeof(*m));
                if (!m)
                        abort(); /* half a command is worse than none, and 40 bytes were not to be had */
                *m = (struct mail){.run = run, .arg = arg, .left = left};
                post(w, m);
        }
        for (int waited_us = 0; atomic_load(left) > 0; waited_us += 50) {
                if (waited_us > MAIL_DEADLINE_MS * 1000)
                        return -ETIMEDOUT;
                usleep(50);
        }
        free(left);
        return 0;
}

int loop_start(struct worker *w, struct tunnel *engine, unsigned index)
{
        /* Queues of up to TRIM_KEEP come and go many times a second: the allocator's own thresholds would give their
         * pages back and fault them in again each time. */
        mallopt(M_TRIM_THRESHOLD, TRIM_KEEP);
        mallopt(M_MMAP_THRESHOLD, TRIM_KEEP);
        w->engine = engine;
        w->index = index;
        w->ev = event_worker(engine->event, index);
        w->now_ms = clock_ms();
        w->random = 0x9e3779b97f4a7c15ull ^ (w->now_ms << 20) ^ ((uint64_t)getpid() << 8) ^ (index + 1);
        for (int i = 0; i < LOOP_HASH; i++) {
                link_init(&w->seats[i]);
                link_init(&w->identities[i]);
                link_init(&w->pool[i]);
        }
        for (int i = 0; i < TIMER_LENGTHS; i++)
                link_init(&w->timers[i]);
        link_init(&w->stale);
        link_init(&w->held);
        link_init(&w->held_tuns);
        link_init(&w->ready);
        link_init(&w->dirty);
        link_init(&w->unread);
        link_init(&w->owed);
        link_init(&w->dead_flows);
        link_init(&w->left_flows);
        link_init(&w->dead_tuns);
        link_init(&w->dead_listeners);
        w->scratch = malloc(LOOP_SCRATCH);
        w->epoll = epoll_create1(EPOLL_CLOEXEC);
        w->wake = (struct io){.type = IO_WAKE, .fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
        if (!w->scratch || w->epoll < 0 || w->wake.fd < 0)
                return -ENOMEM;
        int result = loop_watch(w, &w->wake);
        if (result < 0)
                return result;
        result = -pthread_create(&w->thread, NULL, loop_run, w);
        if (result == 0) {
                char name[16];
                snprintf(name, sizeof(name), "worker-%u", index);
                pthread_setname_np(w->thread, name);
        }
        return result;
}

static void order_stop(struct worker *w, void *arg)
{
        (void)arg;
        w->stop = true;
}

void loop_stop(struct worker *w)
{
        struct tunnel *engine = w->engine;
        for (unsigned i = 0; i < engine->nworkers; i++)
                if (&engine->workers[i] == w && i == 0)
                        loop_all(engine, order_stop, NULL);
        pthread_join(w->thread, NULL);
        take_mail(w); /* of other workers: all of it was sent before they took the order */
        close(w->epoll);
        close(w->wake.fd);
        free(w->scratch);
}
