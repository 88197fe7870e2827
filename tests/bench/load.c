/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The load of `make bench`: one thread, epoll, every byte checked, bounded in time.
 *
 * Theory of operation
 *
 *   load serve PORT [SECONDS]                        answers until it is ended, or for SECONDS
 *   load rr SIZE CONNS ADDRESS PORT SECONDS          round trips of SIZE bytes, one at a time on each connection
 *   load crr CONNS ADDRESS PORT SECONDS              connect, one round trip of 64 bytes, close; CONNS at a time
 *   load bulk CONNS ADDRESS PORT SECONDS             one direction, as fast as it goes
 *   load stall CONNS ADDRESS PORT SECONDS            sends to readers that do not read; says "full" when all is full
 *   load open RATE SIZE CONNS ADDRESS PORT SECONDS   round trips at fixed times, whatever became of the others
 *   load dial RATE ADDRESS PORT SECONDS              crr at fixed times
 *   load hold CONNS ADDRESS PORT SECONDS             one round trip on each connection; says "open" and keeps them
 *
 * A connection begins with eight bytes: the mode ('r', 'b' or 's') and the size of a message. In mode r every message
 * comes back as it was sent, and is compared. In mode b the server counts until the end of the stream and answers with
 * the count, which must be what was sent: bytes that a buffer swallowed are no result. In mode s it reads no more.
 *
 * In an open loop the k-th round trip (dial: connection) is due k/RATE after the start. One that finds none free waits,
 * and its latency counts from when it was due: a peer that stalls cannot hide the requests that it kept from being sent
 * (coordinated omission). What is still unsent at the end counts with its age then, which is less than the truth; it is
 * told as `unsent`.
 *
 * A client works for a warm-up of a tenth of the time (at most 0.5 s) and then for SECONDS, which alone are reported,
 * but for `total_*`, which go with CPU times taken around the whole run. Then it lets every connection finish its work.
 * One line of JSON; status 1 where there was an error or where the work did not end 10 s after its time. Latencies are
 * kept in a histogram with 64 steps to the octave, so percentiles are true to 1.6 %.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 4096
#define CHUNK (256 << 10)
#define GRACE_NS 10000000000ull
#define FULL_NS 500000000ull
#define PATIENCE_NS 100000000ull
#define STEPS 64
#define MAX_DIALS 2048

enum state { FREE, CONNECTING, WORKING, ENDING };

struct conn {
        enum state state;
        char mode;
        uint8_t head[8]; /* server: being read */
        uint32_t head_len, size, got, put;
        uint64_t begun_ns, bytes, answer;
        uint8_t *message;
};

static struct conn conns[MAX_FD];
static uint8_t chunk[CHUNK], pattern[CHUNK];
static int ep;
static uint64_t histogram[64 * STEPS];
static struct {
        uint64_t ops, bytes, errors, total_ops, total_bytes, unsent, max_ns;
        char why[120];
} result;

static void die(const char *what)
{
        fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
        exit(2);
}

static uint64_t now_ns(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void watch(int fd, uint32_t events)
{
        struct epoll_event e = {.events = events | EPOLLET, .data.fd = fd};
        if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) < 0)
                die("epoll_ctl");
}

static void leave(int fd, const char *what, int error)
{
        if (what) {
                result.errors++;
                snprintf(result.why, sizeof(result.why), "%s: %s", what, error ? strerror(error) : "-");
        }
        free(conns[fd].message);
        conns[fd] = (struct conn){0};
        close(fd);
}

/* -- server ------------------------------------------------------------------------------------------------------- */

/* Sends what of the message is due. false: the connection is gone. */
static bool give_back(int fd, struct conn *c)
{
        while (c->put < c->got) {
                ssize_t n = send(fd, c->message + c->put, c->got - c->put, MSG_NOSIGNAL);
                if (n < 0 && errno == EAGAIN)
                        return true;
                if (n < 0) {
                        leave(fd, NULL, 0);
                        return false;
                }
                c->put += (uint32_t)n;
        }
        if (c->put == c->size)
                c->got = c->put = 0;
        return true;
}

static void serve(int fd)
{
        struct conn *c = &conns[fd];
        for (;;) {
                ssize_t n;
                if (c->mode == 's')
                        return; /* for ever, until the client is gone */
                if (c->size && c->got == c->size && (!give_back(fd, c) || c->got))
                        return; /* gone, or: writable comes as an event */
                if (c->head_len < sizeof(c->head))
                        n = recv(fd, c->head + c->head_len, sizeof(c->head) - c->head_len, 0);
                else if (c->mode == 'b')
                        n = recv(fd, chunk, sizeof(chunk), 0);
                else
                        n = recv(fd, c->message + c->got, c->size - c->got, 0);
                if (n < 0 && errno == EAGAIN)
                        return;
                if (n <= 0) {
                        if (n == 0 && c->mode == 'b') {
                                uint64_t count = htobe64(c->bytes);
                                if (send(fd, &count, sizeof(count), MSG_NOSIGNAL) != sizeof(count))
                                        result.errors++;
                        }
                        leave(fd, NULL, 0);
                        return;
                }
                if (c->head_len < sizeof(c->head)) {
                        c->head_len += (uint32_t)n;
                        if (c->head_len < sizeof(c->head))
                                continue;
                        uint32_t size;
                        memcpy(&size, c->head + 4, 4);
                        c->mode = (char)c->head[0];
                        c->size = ntohl(size);
                        if ((c->mode != 'r' && c->mode != 'b' && c->mode != 's') || c->size == 0 || c->size > CHUNK ||
                            !(c->message = malloc(c->size))) {
                                leave(fd, NULL, 0);
                                return;
                        }
                } else if (c->mode == 'b') {
                        c->bytes += (uint64_t)n;
                } else {
                        c->got += (uint32_t)n;
                }
        }
}

static int server(uint16_t port, uint64_t until)
{
        struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
        int listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, off = 0;
        if (listener < 0)
                die("socket");
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
        setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* children inherit it */
        if (bind(listener, (struct sockaddr *)&any, sizeof(any)) < 0 || listen(listener, 1024) < 0)
                die("listen");
        struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, events[64];
        if (epoll_ctl(ep, EPOLL_CTL_ADD, listener, &e) < 0)
                die("epoll_ctl");
        printf("listening\n");
        fflush(stdout);
        while (now_ns() < until) {
                int n = epoll_wait(ep, events, 64, 500);
                for (int i = 0; i < n; i++) {
                        int fd = events[i].data.fd;
                        if (fd != listener) {
                                if (conns[fd].state != FREE)
                                        serve(fd);
                                continue;
                        }
                        int made;
                        while ((made = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                                if (made >= MAX_FD) {
                                        close(made);
                                        continue;
                                }
                                conns[made] = (struct conn){.state = WORKING};
                                watch(made, EPOLLIN | EPOLLOUT);
                                serve(made);
                        }
                }
        }
        return 0;
}

/* -- client ------------------------------------------------------------------------------------------------------- */

static struct {
        enum { RR, CRR, DIAL, OPEN, HOLD, BULK, STALL } kind; /* from BULK on without answers */
        uint32_t size;
        struct sockaddr_storage to;
        socklen_t to_len;
        uint64_t from_ns, until_ns; /* what is reported */
        uint64_t progress_ns;
        bool full;
        unsigned working, held;
        unsigned to_begin; /* hold: not so many at once that a listener's queue overflows */
        double rate;       /* open loop: per second, */
        uint64_t begun_ns; /* counted from here, */
        uint64_t due;      /* and this many have begun */
        int idle[MAX_FD];  /* connections for which nothing was due when their answer came */
        unsigned idle_n;
} job;

/* Open loop: when the next round trip is due. */
static uint64_t due_ns(void)
{
        return job.begun_ns + (uint64_t)((double)job.due * 1e9 / job.rate);
}

static void record(uint64_t ns)
{
        if (ns > result.max_ns)
                result.max_ns = ns;
        unsigned octave = 63 - (unsigned)__builtin_clzll(ns | STEPS);
        uint64_t step = (ns >> (octave - 6)) & (STEPS - 1);
        histogram[octave * STEPS + step]++;
}

static uint64_t percentile(double share)
{
        uint64_t all = 0, seen = 0;
        for (unsigned i = 0; i < 64 * STEPS; i++)
                all += histogram[i];
        for (unsigned i = 0; i < 64 * STEPS; i++)
                if ((seen += histogram[i]) > (uint64_t)(share * (double)all))
                        return ((uint64_t)(STEPS + i % STEPS) << (i / STEPS)) >> 6;
        return 0;
}

static void count(uint64_t t, uint64_t ops, uint64_t bytes)
{
        result.total_ops += ops;
        result.total_bytes += bytes;
        if (t >= job.from_ns && t < job.until_ns) {
                result.ops += ops;
                result.bytes += bytes;
        }
}

static void begin(void)
{
        int fd = socket(job.to.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
        if (fd < 0 || fd >= MAX_FD)
                die("socket");
        conns[fd] = (struct conn){.state = CONNECTING, .begun_ns = job.kind == DIAL ? due_ns() : now_ns()};
        job.working++;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        if (job.kind == STALL) { /* its end must not wait for the reader: that one will never read */
                struct linger reset = {.l_onoff = 1};
                setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
        }
        if (connect(fd, (struct sockaddr *)&job.to, job.to_len) < 0 && errno != EINPROGRESS) {
                leave(fd, "connect", errno);
                job.working--;
                return;
        }
        watch(fd, EPOLLIN | EPOLLOUT);
}

static void fail(int fd, const char *what, int error)
{
        leave(fd, what, error);
        job.working--;
}

/* false: the connection is gone. */
static bool push(int fd, struct conn *c)
{
        while (c->state == WORKING && c->put < c->size) {
                ssize_t n = send(fd, pattern + c->put, c->size - c->put, MSG_NOSIGNAL);
                if (n < 0 && errno == EAGAIN)
                        return true;
                if (n < 0) {
                        fail(fd, "send", errno);
                        return false;
                }
                c->put += (uint32_t)n;
                if (job.kind < BULK)
                        continue;
                uint64_t t = now_ns();
                job.progress_ns = t;
                c->bytes += (uint64_t)n;
                count(t, 0, (uint64_t)n);
                c->put %= c->size;
                if (t >= job.until_ns) {
                        shutdown(fd, SHUT_WR);
                        c->state = ENDING;
                }
        }
        return true;
}

/* The next round trip. */
static bool ask(int fd, struct conn *c)
{
        c->got = c->put = 0;
        if (job.kind == RR)
                c->begun_ns = now_ns();
        if (job.kind == OPEN) {
                uint64_t due = due_ns(), t = now_ns();
                if (due >= job.until_ns || t >= job.until_ns) {
                        leave(fd, NULL, 0);
                        job.working--;
                        return false;
                }
                if (due > t) {
                        c->put = c->size;
                        job.idle[job.idle_n++] = fd;
                        return true;
                }
                c->begun_ns = due;
                job.due++;
        }
        return push(fd, c);
}

static bool start(int fd, struct conn *c)
{
        int error = 0;
        socklen_t n = sizeof(error);
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n);
        if (error) {
                fail(fd, "connect", error);
                return false;
        }
        uint8_t head[8 + 64] = {job.kind == BULK ? 'b' : job.kind == STALL ? 's' : 'r'};
        uint32_t size = htonl(job.size);
        memcpy(head + 4, &size, 4);
        memcpy(head + 8, pattern, 64);
        c->state = WORKING;
        c->size = job.size;
        bool whole = job.kind == CRR || job.kind == DIAL; /* one segment for head and request */
        size_t length = whole ? sizeof(head) : 8;
        if (send(fd, head, length, MSG_NOSIGNAL) != (ssize_t)length) {
                fail(fd, "send", errno);
                return false;
        }
        if (whole) {
                c->put = c->size;
                return true;
        }
        return ask(fd, c);
}

/* A whole answer is there. false: the connection is gone. */
static bool answered(int fd, struct conn *c)
{
        uint64_t t = now_ns();
        count(t, 1, job.size);
        uint64_t when = job.kind == OPEN || job.kind == DIAL ? c->begun_ns : t;
        if (when >= job.from_ns && when < job.until_ns)
                record(t - c->begun_ns);
        if (job.kind == OPEN || (job.kind == RR && t < job.until_ns))
                return ask(fd, c);
        if (job.kind == HOLD) {
                job.held++;
                if (job.to_begin) {
                        job.to_begin--;
                        begin();
                }
                return false;
        }
        leave(fd, NULL, 0);
        job.working--;
        if (job.kind != DIAL && t < job.until_ns)
                begin();
        return false;
}

static void client_event(int fd, uint32_t events)
{
        struct conn *c = &conns[fd];
        if (c->state == CONNECTING && ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) == 0 || !start(fd, c)))
                return;
        if (!push(fd, c))
                return;
        for (;;) {
                if (job.kind == BULK) {
                        ssize_t n = recv(fd, (uint8_t *)&c->answer + c->got, sizeof(c->answer) - c->got, 0);
                        if (n < 0 && errno == EAGAIN)
                                return;
                        if (n <= 0) {
                                fail(fd, n ? "recv" : "no count of the bytes", n ? errno : 0);
                                return;
                        }
                        c->got += (uint32_t)n;
                        if (c->got < sizeof(c->answer))
                                continue;
                        bool same = c->state == ENDING && be64toh(c->answer) == c->bytes;
                        leave(fd, same ? NULL : "not every byte arrived", 0);
                        job.working--;
                        return;
                }
                ssize_t n = recv(fd, chunk, job.kind == STALL ? 1 : c->size - c->got, 0);
                if (n < 0 && errno == EAGAIN)
                        return;
                if (n <= 0) {
                        fail(fd, n ? "recv" : "early end", n ? errno : 0);
                        return;
                }
                if (memcmp(chunk, pattern + c->got, (size_t)n) != 0) {
                        fail(fd, "other bytes than were sent", 0);
                        return;
                }
                c->got += (uint32_t)n;
                if (c->got == c->size && !answered(fd, c))
                        return;
        }
}

/* Open loop: what is due and finds a free connection begins; after the end the free ones leave. Returns for how long
 * there is nothing to do but answers. */
static uint64_t begin_due(void)
{
        uint64_t t = now_ns(), next;
        while (job.idle_n && ((next = due_ns()) <= t || t >= job.until_ns)) {
                int fd = job.idle[--job.idle_n];
                if (conns[fd].state == WORKING) /* else it failed meanwhile */
                        ask(fd, &conns[fd]);    /* leaves where the time is over */
        }
        next = due_ns() < job.until_ns ? due_ns() : job.until_ns;
        if (!job.idle_n || next > t + PATIENCE_NS)
                return PATIENCE_NS;
        return next > t ? next - t : 0;
}

/* The same for connections. */
static uint64_t dial_due(void)
{
        uint64_t t, next;
        while ((next = due_ns()) <= (t = now_ns()) && next < job.until_ns && t < job.until_ns &&
               job.working < MAX_DIALS) {
                begin();
                job.due++;
        }
        return next > t && next < t + PATIENCE_NS ? next - t : PATIENCE_NS / 100;
}

/* What was due before the end and never began. */
static void count_unsent(void)
{
        for (uint64_t due; (due = due_ns()) < job.until_ns; job.due++) {
                if (due >= job.from_ns)
                        record(job.until_ns - due);
                result.unsent++;
        }
}

static int client(unsigned n, double seconds)
{
        struct epoll_event events[64];
        double warm = seconds / 10 < 0.5 ? seconds / 10 : 0.5;
        uint64_t begun = now_ns();
        job.begun_ns = begun;
        job.from_ns = begun + (uint64_t)(warm * 1e9);
        job.until_ns = job.from_ns + (uint64_t)(seconds * 1e9);
        prctl(PR_SET_TIMERSLACK, 1ul); /* 50 us by default: too coarse for an open loop */
        job.to_begin = job.kind == HOLD && n > 64 ? n - 64 : 0;
        for (unsigned i = 0; i < n - job.to_begin; i++)
                begin();
        while ((job.working > 0 || (job.kind == DIAL && now_ns() < job.until_ns)) &&
               now_ns() < job.until_ns + GRACE_NS) {
                uint64_t wait = job.kind == OPEN ? begin_due() : job.kind == DIAL ? dial_due() : PATIENCE_NS;
                struct timespec timeout = {.tv_nsec = (long)wait};
                int ready = epoll_pwait2(ep, events, 64, &timeout, NULL);
                for (int i = 0; i < ready; i++)
                        if (conns[events[i].data.fd].state != FREE)
                                client_event(events[i].data.fd, events[i].events);
                uint64_t t = now_ns();
                bool full = job.kind == STALL && job.progress_ns && t - job.progress_ns > FULL_NS;
                if (!job.full && (full || (job.kind == HOLD && job.held == n))) {
                        job.full = true;
                        printf(job.kind == HOLD ? "open\n" : "full\n");
                        fflush(stdout);
                }
                if ((job.kind == STALL || job.kind == HOLD) && t >= job.until_ns)
                        break;
        }
        if (job.kind == OPEN || job.kind == DIAL)
                count_unsent();
        uint64_t ended = now_ns();
        if (job.working > 0 && job.kind != STALL && job.kind != HOLD) {
                result.errors += job.working;
                snprintf(result.why, sizeof(result.why), "%u connections did not end", job.working);
        }
        printf("{\"seconds\":%.3f,\"ops\":%llu,\"bytes\":%llu,\"p50_ns\":%llu,\"p99_ns\":%llu,\"max_ns\":%llu,\"total_"
               "seconds\":%.3f,"
               "\"total_ops\":%llu,\"total_bytes\":%llu,\"unsent\":%llu,\"errors\":%llu,\"error\":\"%s\"}\n",
               seconds, (unsigned long long)result.ops, (unsigned long long)result.bytes,
               (unsigned long long)percentile(0.5), (unsigned long long)percentile(0.99),
               (unsigned long long)result.max_ns, (double)(ended - begun) / 1e9, (unsigned long long)result.total_ops,
               (unsigned long long)result.total_bytes, (unsigned long long)result.unsent,
               (unsigned long long)result.errors, result.why);
        return result.errors ? 1 : 0;
}

static void address(const char *text, const char *port)
{
        struct sockaddr_in *v4 = (struct sockaddr_in *)&job.to;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&job.to;
        if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
                v4->sin_family = AF_INET;
                v4->sin_port = htons((uint16_t)atoi(port));
                job.to_len = sizeof(*v4);
        } else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
                v6->sin6_family = AF_INET6;
                v6->sin6_port = htons((uint16_t)atoi(port));
                job.to_len = sizeof(*v6);
        } else {
                fprintf(stderr, "load: not an address: %s\n", text);
                exit(2);
        }
}

int main(int argc, char **argv)
{
        const char *mode = argc > 1 ? argv[1] : "";
        signal(SIGPIPE, SIG_IGN);
        ep = epoll_create1(0);
        for (unsigned i = 0; i < CHUNK; i++)
                pattern[i] = (uint8_t)(i * 131 + (i >> 8) * 17 + 7);
        if (strcmp(mode, "serve") == 0 && (argc == 3 || argc == 4))
                return server((uint16_t)atoi(argv[2]),
                              argc == 4 ? now_ns() + (uint64_t)(atof(argv[3]) * 1e9) : UINT64_MAX);
        if (strcmp(mode, "dial") == 0 && argc == 6 && (job.rate = atof(argv[2])) > 0) {
                job.kind = DIAL;
                job.size = 64;
                address(argv[3], argv[4]);
                return client(0, atof(argv[5]));
        }
        if (strcmp(mode, "open") == 0 && argc == 8 && (job.rate = atof(argv[2])) > 0) {
                job.kind = OPEN;
                argv++;
                argc--;
        }
        if ((strcmp(mode, "rr") == 0 || job.kind == OPEN) && argc == 7 && atoi(argv[2]) > 0 && atoi(argv[2]) <= CHUNK) {
                job.size = (uint32_t)atoi(argv[2]);
                argv++;
        } else if ((strcmp(mode, "crr") == 0 || strcmp(mode, "hold") == 0) && argc == 6) {
                job.kind = mode[0] == 'c' ? CRR : HOLD;
                job.size = 64;
        } else if ((strcmp(mode, "bulk") == 0 || strcmp(mode, "stall") == 0) && argc == 6) {
                job.kind = mode[0] == 'b' ? BULK : STALL;
                job.size = 128 << 10;
        } else {
                fprintf(stderr, "load serve PORT [SECONDS] | rr SIZE CONNS ADDRESS PORT SECONDS | "
                                "open RATE SIZE CONNS ADDRESS PORT SECONDS | dial RATE ADDRESS PORT SECONDS | "
                                "crr|bulk|stall|hold CONNS ADDRESS PORT SECONDS\n");
                return 2;
        }
        address(argv[3], argv[4]);
        return client((unsigned)atoi(argv[2]), atof(argv[5]));
}
