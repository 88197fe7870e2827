/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. Each worker has a ring of 64 KiB with one writer and one reader; all other threads share one
 * with a mutex. A line that finds no room is counted and gone. The log thread empties the rings in turn, whole lines,
 * at most 4096 bytes (PIPE_BUF) a write, after poll() said that there is room, so that it can be told to stop while the
 * reader of a pipe stalls. It sleeps on an eventfd, and producers write to that only when it said that it sleeps: they
 * store the ring's head, then load "state"; it stores LOG_SLEEPS, then looks at the rings once more. After lines came
 * it rests first: for REST_MS only a ring that is half full wakes it, so that a busy engine does not pay a wake-up for
 * each connection. Control characters in a line become '?': a peer cannot forge a second line.
 */
#include "log.h"
#include "table.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define RING 65536
#define LINE_MAX_LEN 2048
#define WRITE_MAX 4096
#define STOP_MS 1000
#define REST_MS 20 /* a line of a busy engine comes out that much later at most */

struct ring {
        _Alignas(64) _Atomic uint64_t head; /* written up to here, by the producer */
        _Alignas(64) _Atomic uint64_t tail; /* read up to here, by the log thread */
        _Alignas(64) _Atomic uint64_t dropped;
        char bytes[RING];
};

enum log_state { LOG_WORKS, LOG_RESTS, LOG_SLEEPS };

struct log {
        int fd, wake_fd;
        unsigned rings;
        pthread_t thread;
        _Atomic enum log_state state;
        _Atomic bool stop;
        pthread_mutex_t shared;
        struct ring *ring; /* rings + 1 */
};

uint64_t log_dropped(const struct log *l)
{
        uint64_t n = 0;
        for (unsigned i = 0; i <= l->rings; i++)
                n += l->ring[i].dropped;
        return n;
}

/* How many bytes wait in the ring afterwards; 0: no room, the line is gone. */
static size_t ring_put(struct ring *r, const char *line, size_t len)
{
        uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
        size_t at = head % RING, first = RING - at < len ? RING - at : len;
        if (RING - (head - tail) < len) {
                atomic_fetch_add_explicit(&r->dropped, 1, memory_order_relaxed);
                return 0;
        }
        memcpy(r->bytes + at, line, first);
        memcpy(r->bytes, line + first, len - first);
        atomic_store(&r->head, head + len); /* ordered before the look at "state" */
        return head + len - tail;
}

/* Whole lines, at most size bytes. */
static size_t ring_peek(struct ring *r, char *out, size_t size)
{
        uint64_t head = atomic_load(&r->head), tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
        size_t len = head - tail < size ? head - tail : size, at = tail % RING,
               first = RING - at < len ? RING - at : len;
        memcpy(out, r->bytes + at, first);
        memcpy(out + first, r->bytes, len - first);
        while (len && out[len - 1] != '\n')
                len--;
        return len;
}

static size_t line_start(char *out, const char *level)
{
        struct timespec now;
        struct tm tm;
        clock_gettime(CLOCK_REALTIME, &now);
        gmtime_r(&now.tv_sec, &tm);
        size_t n = strftime(out, LINE_MAX_LEN, "%Y-%m-%dT%H:%M:%S", &tm);
        return n + (size_t)snprintf(out + n, LINE_MAX_LEN - n, ".%06ldZ\t%s\t", now.tv_nsec / 1000, level);
}

void log_line(struct log *l, unsigned ring, const char *level, const char *fmt, va_list ap)
{
        char line[LINE_MAX_LEN];
        size_t waiting;
        if (l->fd < 0)
                return;
        size_t start = line_start(line, level), len = start;
        int n = vsnprintf(line + len, sizeof(line) - 1 - len, fmt, ap);
        if (n > 0)
                len += (size_t)n < sizeof(line) - 2 - len ? (size_t)n : sizeof(line) - 2 - len;
        for (size_t i = start; i < len; i++)
                if ((unsigned char)line[i] < 0x20 ? line[i] != '\t' : line[i] == 0x7f)
                        line[i] = '?';
        line[len++] = '\n';
        if (ring < l->rings) {
                waiting = ring_put(&l->ring[ring], line, len);
        } else {
                pthread_mutex_lock(&l->shared); /* nobody holds it for longer than a copy */
                waiting = ring_put(&l->ring[l->rings], line, len);
                pthread_mutex_unlock(&l->shared);
        }
        enum log_state state = atomic_load(&l->state);
        if (waiting && (state == LOG_SLEEPS || (state == LOG_RESTS && waiting > RING / 2)))
                eventfd_write(l->wake_fd, 1);
}

bool log_room(struct log *l, unsigned ring)
{
        struct ring *r = &l->ring[ring];
        if (RING - (atomic_load_explicit(&r->head, memory_order_relaxed) -
                    atomic_load_explicit(&r->tail, memory_order_acquire)) >=
            LINE_MAX_LEN)
                return true;
        atomic_fetch_add_explicit(&r->dropped, 1, memory_order_relaxed);
        return false;
}

/* Waits until the log takes bytes. False: told to stop and the time for that is over. */
static bool log_ready(struct log *l, uint64_t *stop_at)
{
        struct pollfd fds[2] = {{.fd = l->fd, .events = POLLOUT}, {.fd = l->wake_fd, .events = POLLIN}};
        for (;;) {
                struct timespec now;
                clock_gettime(CLOCK_MONOTONIC, &now);
                uint64_t ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
                bool stop = atomic_load(&l->stop);
                if (stop && !*stop_at)
                        *stop_at = ms + STOP_MS;
                if (stop && ms >= *stop_at)
                        return false;
                int n = poll(fds, stop ? 1 : 2, stop ? (int)(*stop_at - ms) : -1);
                if (n > 0 && fds[0].revents)
                        return true;
                if (n > 0 && !stop) {
                        eventfd_t unused;
                        eventfd_read(l->wake_fd, &unused);
                }
        }
}

static bool log_write(struct log *l, const char *p, size_t len, uint64_t *stop_at)
{
        while (len) {
                if (!log_ready(l, stop_at))
                        return false;
                ssize_t n = write(l->fd, p, len);
                if (n < 0 && errno != EAGAIN && errno != EINTR)
                        return false; /* nobody reads any more */
                if (n > 0) {
                        p += n;
                        len -= (size_t)n;
                }
        }
        return true;
}

static bool drain(struct log *l, struct ring *r, uint64_t *stop_at)
{
        char buf[WRITE_MAX];
        size_t len;
        bool any = false;
        while ((len = ring_peek(r, buf, sizeof(buf))) != 0) {
                any = true;
                if (!log_write(l, buf, len, stop_at))
                        for (size_t i = 0; i < len; i++)
                                r->dropped += buf[i] == '\n';
                atomic_fetch_add_explicit(&r->tail, len, memory_order_release);
        }
        return any;
}

static bool drain_all(struct log *l, uint64_t *told, uint64_t *stop_at)
{
        bool any = false;
        for (unsigned i = 0; i <= l->rings; i++)
                any |= drain(l, &l->ring[i], stop_at);
        uint64_t dropped = log_dropped(l);
        if (dropped != *told && !atomic_load(&l->stop)) {
                char line[LINE_MAX_LEN];
                size_t n = line_start(line, "warn");
                n += (size_t)snprintf(line + n, sizeof(line) - n,
                                      "log\t%llu lines were dropped, the reader is too slow\n",
                                      (unsigned long long)(dropped - *told));
                *told = dropped;
                log_write(l, line, n, stop_at);
        }
        return any;
}

static void log_wait(struct log *l, int ms)
{
        struct pollfd wake = {.fd = l->wake_fd, .events = POLLIN};
        eventfd_t unused;
        if (poll(&wake, 1, ms) > 0)
                eventfd_read(l->wake_fd, &unused);
}

static void *log_thread(void *arg)
{
        struct log *l = arg;
        uint64_t told = 0, stop_at = 0;
        for (;;) {
                bool stop = atomic_load(&l->stop);
                if (drain_all(l, &told, &stop_at)) {
                        atomic_store(&l->state, LOG_RESTS);
                        if (!stop)
                                log_wait(l, REST_MS);
                } else if (stop) {
                        return NULL;
                } else {
                        atomic_store(&l->state, LOG_SLEEPS);
                        if (!drain_all(l, &told, &stop_at))
                                log_wait(l, -1);
                }
                atomic_store(&l->state, LOG_WORKS);
        }
}

static int start(struct log *l, int fd)
{
        sigset_t all, old;
        int r;
        l->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (l->fd < 0)
                return -errno;
        l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (l->wake_fd < 0)
                return -errno;
        sigfillset(&all); /* SIGPIPE included: a reader that went away is an error of write() */
        pthread_sigmask(SIG_SETMASK, &all, &old);
        r = -pthread_create(&l->thread, NULL, log_thread, l);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        return r;
}

static void release(struct log *l)
{
        if (l->fd >= 0)
                close(l->fd);
        if (l->wake_fd >= 0)
                close(l->wake_fd);
        pthread_mutex_destroy(&l->shared);
        free(l->ring);
        free(l);
}

int log_new(struct log **out, unsigned rings, int fd)
{
        struct log *l = must_alloc(sizeof(*l));
        int r;
        l->fd = l->wake_fd = -1;
        l->rings = rings;
        pthread_mutex_init(&l->shared, NULL);
        l->ring = aligned_alloc(64, (rings + 1) * sizeof(*l->ring));
        if (!l->ring)
                abort();
        for (unsigned i = 0; i <= rings; i++) { /* the bytes stay untouched until they are used */
                atomic_init(&l->ring[i].head, 0);
                atomic_init(&l->ring[i].tail, 0);
                atomic_init(&l->ring[i].dropped, 0);
        }
        r = fd < 0 ? 0 : start(l, fd);
        if (r) {
                release(l);
                return r;
        }
        *out = l;
        return 0;
}

void log_free(struct log *l)
{
        if (l->fd >= 0) {
                atomic_store(&l->stop, true);
                eventfd_write(l->wake_fd, 1);
                pthread_join(l->thread, NULL);
        }
        release(l);
}
