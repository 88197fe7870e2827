/* SPDX-License-Identifier: Apache-2.0 */
/*
 * customers: a load that never stops and forgives nothing.
 *
 *   customers serve PORT                      echoes what it gets, on [::]:PORT
 *   customers buy ADDRESS PORT RATE KEPT      RATE new connections a second with one request each, and KEPT connections
 * that stay open and ask every 100 ms
 *
 * Theory of operation: one thread, epoll, non-blocking. A request is 64 bytes that name the connection and a sequence
 * number; the answer must be the same bytes. There are no retries: each error, each early end, each wrong byte and each
 * wait above 10 s is a failure, and a kept connection that ended is never opened again. Twice a second, and at SIGTERM,
 * a line of JSON with running totals goes to stdout. New connections are started by the clock, so that a stall of the
 * server shows as waiting requests and not as a lower rate.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SIZE 64
#define MAX_FD 16384
#define TIMEOUT_NS 10000000000ull
#define KEPT_PAUSE_NS 100000000ull

enum state { FREE, CONNECTING, ASKING, PAUSING };

struct customer {
        enum state state;
        bool kept;
        uint32_t sequence;
        size_t got;
        uint64_t since; /* ns: start of the wait, or of the pause */
        char expected[SIZE];
};

static struct customer customers[MAX_FD];
static struct {
        uint64_t start, requests, failed, timeouts, kept_open, kept_broken, opened, worst_us;
        char last_error[96];
} totals;
static volatile sig_atomic_t stop;

static void on_term(int sig)
{
        (void)sig;
        stop = 1;
}

static uint64_t now_ns(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
        fprintf(stderr, "customers: %s: %s\n", what, strerror(errno));
        exit(1);
}

static void report(void)
{
        printf("{\"requests\": %llu, \"failed\": %llu, \"timeouts\": %llu, \"kept_open\": %llu, \"kept_broken\": %llu, "
               "\"opened\": %llu, \"worst_ms\": %.1f, \"last_error\": \"%s\", \"seconds\": %.3f}\n",
               (unsigned long long)totals.requests, (unsigned long long)totals.failed,
               (unsigned long long)totals.timeouts, (unsigned long long)totals.kept_open,
               (unsigned long long)totals.kept_broken, (unsigned long long)totals.opened,
               (double)totals.worst_us / 1000, totals.last_error, (double)(now_ns() - totals.start) / 1e9);
        fflush(stdout);
        totals.worst_us = 0;
}

/* The only way out of a connection. what: NULL for a good end. */
static void leave(int fd, const char *what, int error)
{
        struct customer *c = &customers[fd];
        if (what) {
                totals.failed++;
                snprintf(totals.last_error, sizeof(totals.last_error), "%s%s: %s", c->kept ? "kept " : "", what,
                         strerror(error));
                if (c->kept)
                        totals.kept_broken++;
        }
        if (c->kept)
                totals.kept_open--;
        c->state = FREE;
        close(fd);
}

static void ask(int fd)
{
        struct customer *c = &customers[fd];
        memset(c->expected, 'x', SIZE);
        snprintf(c->expected, SIZE, "canary-customers %d %u %llu", fd, c->sequence++,
                 (unsigned long long)totals.requests);
        c->got = 0;
        c->state = ASKING;
        if (send(fd, c->expected, SIZE, MSG_NOSIGNAL) != SIZE)
                leave(fd, "send", errno);
}

static void enter(int ep, const struct sockaddr *address, socklen_t length, bool kept)
{
        int fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0 || fd >= MAX_FD)
                die("socket");
        struct customer *c = &customers[fd];
        *c = (struct customer){.state = CONNECTING, .kept = kept, .since = now_ns()};
        totals.opened++;
        totals.kept_open += kept;
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        if (connect(fd, address, length) < 0 && errno != EINPROGRESS) {
                totals.requests++;
                leave(fd, "connect", errno);
                return;
        }
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET | EPOLLRDHUP, .data.fd = fd};
        if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &event) < 0)
                die("epoll_ctl");
}

static void ready(int fd, uint32_t events)
{
        struct customer *c = &customers[fd];
        if (c->state == CONNECTING && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
                int error = 0;
                socklen_t length = sizeof(error);
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
                if (error) {
                        totals.requests++;
                        leave(fd, "connect", error);
                        return;
                }
                ask(fd);
        }
        char buffer[SIZE];
        while (c->state == ASKING || c->state == PAUSING) {
                ssize_t n = recv(fd, buffer, SIZE - (c->state == ASKING ? c->got : 0), 0);
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        return;
                if (n <= 0 || c->state == PAUSING) {
                        totals.requests++;
                        leave(fd, n == 0 ? "early end" : "recv", n == 0 ? 0 : errno);
                        return;
                }
                if (memcmp(buffer, c->expected + c->got, (size_t)n) != 0) {
                        totals.requests++;
                        leave(fd, "wrong bytes", 0);
                        return;
                }
                c->got += (size_t)n;
                if (c->got < SIZE)
                        continue;
                uint64_t now = now_ns();
                totals.requests++;
                if ((now - c->since) / 1000 > totals.worst_us)
                        totals.worst_us = (now - c->since) / 1000;
                if (!c->kept) {
                        leave(fd, NULL, 0);
                        return;
                }
                c->state = PAUSING;
                c->since = now;
        }
}

/* Starts what is due, and counts what waited too long. */
static void tick(uint64_t now)
{
        for (int fd = 0; fd < MAX_FD; fd++) {
                struct customer *c = &customers[fd];
                if (c->state == PAUSING && now - c->since >= KEPT_PAUSE_NS) {
                        c->since = now;
                        ask(fd);
                } else if ((c->state == CONNECTING || c->state == ASKING) && now - c->since > TIMEOUT_NS) {
                        totals.timeouts++;
                        totals.requests++;
                        leave(fd, c->state == CONNECTING ? "connect took 10 s" : "answer took 10 s", 0);
                }
        }
}

static int buy(char **argv)
{
        union {
                struct sockaddr any;
                struct sockaddr_in v4;
                struct sockaddr_in6 v6;
        } to = {0};
        socklen_t length;
        if (inet_pton(AF_INET, argv[2], &to.v4.sin_addr) == 1) {
                to.v4.sin_family = AF_INET;
                to.v4.sin_port = htons((uint16_t)atoi(argv[3]));
                length = sizeof(to.v4);
        } else if (inet_pton(AF_INET6, argv[2], &to.v6.sin6_addr) == 1) {
                to.v6.sin6_family = AF_INET6;
                to.v6.sin6_port = htons((uint16_t)atoi(argv[3]));
                length = sizeof(to.v6);
        } else {
                fprintf(stderr, "customers: %s is no address\n", argv[2]);
                return 2;
        }
        unsigned rate = (unsigned)atoi(argv[4]), kept = (unsigned)atoi(argv[5]);
        int ep = epoll_create1(EPOLL_CLOEXEC);
        if (ep < 0)
                die("epoll_create1");
        for (unsigned i = 0; i < kept; i++)
                enter(ep, &to.any, length, true);
        uint64_t start = totals.start = now_ns(), fresh = 0, said = start, ticked = start;
        while (!stop) {
                uint64_t now = now_ns();
                for (uint64_t due = rate * (now - start) / 1000000000ull; fresh < due; fresh++)
                        enter(ep, &to.any, length, false);
                if (now - ticked > 10000000ull) {
                        tick(now_ns());
                        ticked = now;
                }
                if (now - said > 500000000ull) {
                        report();
                        said = now;
                }
                struct epoll_event events[256];
                int n = epoll_wait(ep, events, 256, 1);
                for (int i = 0; i < n; i++)
                        ready(events[i].data.fd, events[i].events);
        }
        report();
        return 0;
}

static int serve(char **argv)
{
        int ep = epoll_create1(EPOLL_CLOEXEC),
            listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(argv[2]))};
        int one = 1, zero = 0;
        if (listener < 0) { /* a namespace without IPv6 */
                listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
                struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = any.sin6_port};
                setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
                if (bind(listener, (struct sockaddr *)&any4, sizeof(any4)) < 0)
                        die("bind");
        } else {
                setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
                setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
                if (bind(listener, (struct sockaddr *)&any, sizeof(any)) < 0)
                        die("bind");
        }
        if (listen(listener, 4096) < 0)
                die("listen");
        struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
        epoll_ctl(ep, EPOLL_CTL_ADD, listener, &event);
        while (!stop) {
                struct epoll_event events[256];
                int n = epoll_wait(ep, events, 256, 500);
                for (int i = 0; i < n; i++) {
                        int fd = events[i].data.fd;
                        if (fd == listener) {
                                int accepted;
                                while ((accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                                        setsockopt(accepted, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
                                        event = (struct epoll_event){.events = EPOLLIN, .data.fd = accepted};
                                        epoll_ctl(ep, EPOLL_CTL_ADD, accepted, &event);
                                }
                                continue;
                        }
                        char buffer[4096];
                        ssize_t got = recv(fd, buffer, sizeof(buffer), 0);
                        if (got < 0 && (errno == EAGAIN || errno == EINTR))
                                continue;
                        if (got <= 0 || send(fd, buffer, (size_t)got, MSG_NOSIGNAL) != got)
                                close(fd);
                }
        }
        return 0;
}

int main(int argc, char **argv)
{
        signal(SIGTERM, on_term);
        signal(SIGINT, on_term);
        signal(SIGPIPE, SIG_IGN);
        if (argc == 3 && strcmp(argv[1], "serve") == 0)
                return serve(argv);
        if (argc == 6 && strcmp(argv[1], "buy") == 0)
                return buy(argv);
        fprintf(stderr, "usage: customers serve PORT | customers buy ADDRESS PORT RATE KEPT\n");
        return 2;
}
