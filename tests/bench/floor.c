/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor: the least that a pair of proxies can cost which seals what passes between them.
 *
 * Theory of operation
 *
 *   floor in ADDRESS PORT PEER PEER_PORT TUNNELS     beside the client: plain bytes in, sealed ones to the peer
 *   floor out ADDRESS PORT TO TO_PORT                beside the server: sealed ones in, plain bytes to the application
 *
 * Three TCP hops through two processes with two workers each. A worker has an epoll of its own, a listener of its own
 * (SO_REUSEPORT) and, at `in`, TUNNELS connections to the peer that are open before the first client comes; a
 * connection of a client takes one of them and gives it back at its end, so no hop waits for a handshake but the last.
 * On the way between lie records: four bytes (type, length), and of at most 16 KiB of data the AES-128-GCM ciphertext
 * and its tag. Nothing else is there: no TLS, no HTTP/2, no capture, no identity, no policy, no counters per
 * connection, no limit of memory. **The key is known to everybody: this measures, and protects nothing.**
 *
 * Sockets do not pace (cubic where the system has a BBR; docs/decisions/0007), as those of the engine. Says "ready" and
 * the version of libcrypto. Each line on standard input is answered with what passed so far; at its end the process
 * ends.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define WORKERS 2
#define MAX_FD 8192
#define RECORD (16 << 10)
#define HEAD 4
#define TAG 16
#define TURN (128 << 10)
#define SCRATCH (2 * TURN + 16 * (HEAD + TAG) + RECORD)

enum type { BEGIN = 1, DATA, END };

struct bytes {
        uint8_t *at;
        size_t from, to, room;
};

/* A tunnel and the connection that has it now (app < 0: none). Edge-triggered: `*_in` says that there may be more to
 * read; a short read says that there is not, unless the other side has ended (`*_hup`): then the end of the stream is
 * still to be read. */
struct flow {
        int app, tun;
        bool app_in, tun_in, app_hup, tun_hup;
        bool app_ended, tun_ended; /* no more from there */
        bool shut;                 /* and the application knows */
        uint64_t sealed, opened;   /* nonces of the two directions */
        struct bytes to_tun, to_app, raw;
        struct flow *next; /* idle */
};

static struct worker {
        pthread_t thread;
        int ep, listener;
        struct flow *idle;
        EVP_CIPHER_CTX *seal, *open;
        uint8_t in[SCRATCH], out[SCRATCH];
        _Atomic uint64_t flows, records, bytes;
} workers[WORKERS];

static struct flow *flow_of[MAX_FD];
static bool entry; /* in */
static struct sockaddr_storage here, there;
static socklen_t here_len, there_len;
static unsigned tunnels;
static bool bbr;

static void die(const char *what)
{
        fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
        exit(2);
}

/* -- bytes that wait ------------------------------------------------------------------------------------------------
 */

static void keep(struct bytes *b, const uint8_t *from, size_t n)
{
        if (b->from == b->to)
                b->from = b->to = 0;
        if (b->to + n > b->room) {
                b->room = b->to + n;
                b->at = realloc(b->at, b->room);
                if (!b->at)
                        die("memory");
        }
        memcpy(b->at + b->to, from, n);
        b->to += n;
}

/* false: the socket is gone. What it does not take at once is kept. */
static bool give(int fd, struct bytes *waiting, const uint8_t *from, size_t n)
{
        size_t put = 0;
        while (waiting->from == waiting->to && put < n) {
                ssize_t done = send(fd, from + put, n - put, MSG_NOSIGNAL);
                if (done < 0 && errno != EAGAIN)
                        return false;
                if (done < 0)
                        break;
                put += (size_t)done;
        }
        if (put < n)
                keep(waiting, from + put, n - put);
        return true;
}

static bool flush(int fd, struct bytes *waiting)
{
        while (waiting->from < waiting->to) {
                ssize_t done = send(fd, waiting->at + waiting->from, waiting->to - waiting->from, MSG_NOSIGNAL);
                if (done < 0)
                        return errno == EAGAIN;
                waiting->from += (size_t)done;
        }
        return true;
}

/* -- records --------------------------------------------------------------------------------------------------------
 */

static size_t head(uint8_t *out, enum type type, size_t n)
{
        out[0] = (uint8_t)type;
        out[1] = (uint8_t)(n >> 16);
        out[2] = (uint8_t)(n >> 8);
        out[3] = (uint8_t)n;
        return HEAD;
}

static void nonce(uint8_t iv[12], uint64_t number)
{
        memset(iv, 0, 4);
        memcpy(iv + 4, &number, 8);
}

/* At most TURN bytes become records. Returns their length. */
static size_t seal(struct worker *w, struct flow *f, const uint8_t *from, size_t n, uint8_t *out)
{
        size_t made = 0;
        for (size_t at = 0, part; at < n; at += part) {
                part = n - at < RECORD ? n - at : RECORD;
                uint8_t iv[12];
                int len;
                nonce(iv, f->sealed++);
                made += head(out + made, DATA, part + TAG);
                if (EVP_EncryptInit_ex(w->seal, NULL, NULL, NULL, iv) != 1 ||
                    EVP_EncryptUpdate(w->seal, out + made, &len, from + at, (int)part) != 1 ||
                    EVP_EncryptFinal_ex(w->seal, out + made + part, &len) != 1 ||
                    EVP_CIPHER_CTX_ctrl(w->seal, EVP_CTRL_AEAD_GET_TAG, TAG, out + made + part) != 1)
                        die("seal");
                made += part + TAG;
                atomic_fetch_add_explicit(&w->records, 1, memory_order_relaxed);
        }
        atomic_fetch_add_explicit(&w->bytes, n, memory_order_relaxed);
        return made;
}

/* false: this is not what was sealed. `n` has the tag in it. */
static bool unseal(struct worker *w, struct flow *f, uint8_t *from, size_t n, uint8_t *out)
{
        uint8_t iv[12];
        int len;
        nonce(iv, f->opened++);
        return n > TAG && n <= RECORD + TAG && EVP_DecryptInit_ex(w->open, NULL, NULL, NULL, iv) == 1 &&
               EVP_DecryptUpdate(w->open, out, &len, from, (int)(n - TAG)) == 1 &&
               EVP_CIPHER_CTX_ctrl(w->open, EVP_CTRL_AEAD_SET_TAG, TAG, from + n - TAG) == 1 &&
               EVP_DecryptFinal_ex(w->open, out + n - TAG, &len) == 1;
}

/* -- sockets --------------------------------------------------------------------------------------------------------
 */

static void prepare(int fd)
{
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
        if (bbr && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5) < 0)
                setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

static void watch(struct worker *w, int fd, struct flow *f)
{
        if (fd >= MAX_FD) {
                errno = EMFILE;
                die("too many connections");
        }
        struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.fd = fd};
        flow_of[fd] = f;
        if (epoll_ctl(w->ep, EPOLL_CTL_ADD, fd, &e) < 0)
                die("epoll_ctl");
}

static int dial(void)
{
        int fd = socket(there.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0)
                die("socket");
        prepare(fd);
        if (connect(fd, (struct sockaddr *)&there, there_len) < 0 && errno != EINPROGRESS)
                die("connect");
        return fd;
}

static struct flow *flow_new(struct worker *w, int tun)
{
        struct flow *f = calloc(1, sizeof(*f));
        if (!f)
                die("memory");
        f->tun = tun;
        f->app = -1;
        watch(w, tun, f);
        return f;
}

static void leave_app(struct flow *f, bool reset)
{
        if (f->app < 0)
                return;
        struct linger now = {.l_onoff = 1};
        if (reset)
                setsockopt(f->app, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
        flow_of[f->app] = NULL;
        close(f->app);
        f->app = -1;
}

/* A connection that did not end in order takes its tunnel with it. */
static void drop(struct flow *f)
{
        if (entry && f->app < 0) {
                fprintf(stderr, "floor: the peer has closed an idle tunnel\n");
                exit(1);
        }
        leave_app(f, true);
        flow_of[f->tun] = NULL;
        close(f->tun);
        free(f->to_tun.at);
        free(f->to_app.at);
        free(f->raw.at);
        free(f);
}

static void begin(struct worker *w, struct flow *f, int app)
{
        f->app = app;
        f->app_in = f->app_hup = f->app_ended = f->tun_ended = f->shut = false;
        watch(w, app, f);
        atomic_fetch_add_explicit(&w->flows, 1, memory_order_relaxed);
}

/* -- the two directions ---------------------------------------------------------------------------------------------
 */

/* From the application into the tunnel. false: broken. */
static bool out(struct worker *w, struct flow *f)
{
        for (;;) {
                if (!flush(f->tun, &f->to_tun))
                        return false;
                if (f->to_tun.from < f->to_tun.to || f->app < 0 || !f->app_in || f->app_ended)
                        return true;
                ssize_t n = recv(f->app, w->in, TURN, 0);
                if (n < 0 && errno == EAGAIN) {
                        f->app_in = false;
                        return true;
                }
                if (n < 0)
                        return false;
                f->app_in = n == TURN || f->app_hup;
                f->app_ended = n == 0;
                size_t made = n ? seal(w, f, w->in, (size_t)n, w->out) : head(w->out, END, 0);
                if (!give(f->tun, &f->to_tun, w->out, made))
                        return false;
        }
}

/* Whole records of [from, from + n): data goes to the application. Returns how much was used, or -1. */
static ssize_t take(struct worker *w, struct flow *f, uint8_t *from, size_t n)
{
        size_t used = 0, made = 0;
        while (n - used >= HEAD && !f->tun_ended) {
                size_t len = (size_t)from[used + 1] << 16 | (size_t)from[used + 2] << 8 | from[used + 3];
                if (len > RECORD + TAG)
                        return -1;
                if (n - used < HEAD + len)
                        break;
                uint8_t *body = from + used + HEAD, type = from[used];
                used += HEAD + len;
                if (type == BEGIN && !entry && f->app < 0)
                        begin(w, f, dial());
                else if (type == DATA && f->app >= 0 && unseal(w, f, body, len, w->out + made))
                        made += len - TAG;
                else if (type == END && f->app >= 0)
                        f->tun_ended = true;
                else
                        return -1;
        }
        if (made && !give(f->app, &f->to_app, w->out, made))
                return -1;
        return (ssize_t)used;
}

/* From the tunnel to the application. false: broken. */
static bool in(struct worker *w, struct flow *f)
{
        for (;;) {
                if (f->app >= 0 && !flush(f->app, &f->to_app))
                        return false;
                if (f->to_app.from < f->to_app.to)
                        return true;
                if (f->tun_ended && !f->shut) {
                        shutdown(f->app, SHUT_WR);
                        f->shut = true;
                }
                if (f->tun_ended || !f->tun_in)
                        return true;
                size_t old = f->raw.to - f->raw.from;
                if (old)
                        memcpy(w->in, f->raw.at + f->raw.from, old);
                f->raw.from = f->raw.to = 0;
                ssize_t n = recv(f->tun, w->in + old, TURN, 0);
                if (n == 0 || (n < 0 && errno != EAGAIN))
                        return false;
                f->tun_in = n == TURN || (n > 0 && f->tun_hup);
                size_t have = old + (n > 0 ? (size_t)n : 0);
                ssize_t used = take(w, f, w->in, have);
                if (used < 0)
                        return false;
                if ((size_t)used < have)
                        keep(&f->raw, w->in + used, have - (size_t)used);
        }
}

static void turn(struct worker *w, struct flow *f)
{
        for (;;) {
                if (!in(w, f) || !out(w, f)) {
                        drop(f);
                        return;
                }
                if (f->app < 0 || !f->app_ended || !f->shut || f->to_tun.from < f->to_tun.to)
                        return;
                /* Both directions ended in order: the tunnel is free, and the next connection's bytes may be here. */
                leave_app(f, false);
                f->tun_ended = f->app_ended = f->shut = false;
                if (entry) {
                        f->next = w->idle;
                        w->idle = f;
                        return;
                }
        }
}

static void accepted(struct worker *w, int fd)
{
        if (!entry) {
                struct flow *f = flow_new(w, fd);
                f->tun_in = true;
                turn(w, f);
                return;
        }
        struct flow *f = w->idle;
        if (f)
                w->idle = f->next;
        else
                f = flow_new(w, dial());
        uint8_t word[HEAD];
        begin(w, f, fd);
        keep(&f->to_tun, word, head(word, BEGIN, 0)); /* goes with the first bytes where they are here already */
        ssize_t n = recv(fd, w->in, TURN, 0);
        f->app_in = n == TURN || n == 0;
        if (n > 0)
                keep(&f->to_tun, w->out, seal(w, f, w->in, (size_t)n, w->out));
        turn(w, f);
}

static void *work(void *arg)
{
        struct worker *w = arg;
        struct epoll_event events[64];
        for (;;) {
                int n = epoll_wait(w->ep, events, 64, -1);
                for (int i = 0; i < n; i++) {
                        int fd = events[i].data.fd, made;
                        if (fd == w->listener) {
                                while ((made = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
                                        accepted(w, made);
                                continue;
                        }
                        struct flow *f = flow_of[fd];
                        if (!f)
                                continue;
                        if (events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                                *(fd == f->tun ? &f->tun_hup : &f->app_hup) = true;
                        if (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
                                *(fd == f->tun ? &f->tun_in : &f->app_in) = true;
                        turn(w, f);
                }
        }
        return NULL;
}

/* -- setting up -----------------------------------------------------------------------------------------------------
 */

static socklen_t address(const char *text, const char *port, struct sockaddr_storage *to)
{
        struct sockaddr_in *v4 = (struct sockaddr_in *)to;
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)to;
        if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
                v4->sin_family = AF_INET;
                v4->sin_port = htons((uint16_t)atoi(port));
                return sizeof(*v4);
        }
        if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1) {
                fprintf(stderr, "floor: not an address: %s\n", text);
                exit(2);
        }
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)atoi(port));
        return sizeof(*v6);
}

static EVP_CIPHER_CTX *context(int encrypt)
{
        static const uint8_t key[16] = "known to anybody";
        EVP_CIPHER_CTX *made = EVP_CIPHER_CTX_new();
        if (!made || EVP_CipherInit_ex(made, EVP_aes_128_gcm(), NULL, key, NULL, encrypt) != 1)
                die("AES-128-GCM");
        return made;
}

static void start(struct worker *w)
{
        int one = 1;
        w->seal = context(1);
        w->open = context(0);
        w->ep = epoll_create1(EPOLL_CLOEXEC);
        w->listener = socket(here.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (w->ep < 0 || w->listener < 0)
                die("socket");
        setsockopt(w->listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        setsockopt(w->listener, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one));
        prepare(w->listener); /* what it accepts inherits that */
        struct epoll_event e = {.events = EPOLLIN, .data.fd = w->listener};
        if (bind(w->listener, (struct sockaddr *)&here, here_len) < 0 || listen(w->listener, 4096) < 0 ||
            epoll_ctl(w->ep, EPOLL_CTL_ADD, w->listener, &e) < 0)
                die("listen");
        for (unsigned i = 0; i < tunnels; i++) {
                int fd = socket(there.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (fd < 0)
                        die("socket");
                prepare(fd);
                if (connect(fd, (struct sockaddr *)&there, there_len) < 0)
                        die("connect to the peer");
                int flags = 1;
                if (ioctl(fd, FIONBIO, &flags) < 0)
                        die("FIONBIO");
                struct flow *f = flow_new(w, fd);
                f->next = w->idle;
                w->idle = f;
        }
}

int main(int argc, char **argv)
{
        entry = argc == 7 && strcmp(argv[1], "in") == 0;
        if (!entry && (argc != 6 || strcmp(argv[1], "out") != 0)) {
                fprintf(stderr, "floor in ADDRESS PORT PEER PEER_PORT TUNNELS | out ADDRESS PORT TO TO_PORT\n");
                return 2;
        }
        char line[256];
        FILE *control = fopen("/proc/sys/net/ipv4/tcp_congestion_control", "re");
        bbr = control && fgets(line, sizeof(line), control) && strncmp(line, "bbr", 3) == 0;
        if (control)
                fclose(control);
        signal(SIGPIPE, SIG_IGN);
        here_len = address(argv[2], argv[3], &here);
        there_len = address(argv[4], argv[5], &there);
        tunnels = entry ? (unsigned)atoi(argv[6]) : 0;
        for (unsigned i = 0; i < WORKERS; i++)
                start(&workers[i]);
        for (unsigned i = 0; i < WORKERS; i++)
                if ((errno = pthread_create(&workers[i].thread, NULL, work, &workers[i])))
                        die("thread");
        printf("ready %s\n", OpenSSL_version(OPENSSL_VERSION));
        fflush(stdout);
        while (fgets(line, sizeof(line), stdin)) {
                uint64_t flows = 0, records = 0, bytes = 0;
                for (unsigned i = 0; i < WORKERS; i++) {
                        flows += workers[i].flows;
                        records += workers[i].records;
                        bytes += workers[i].bytes;
                }
                printf("{\"flows\":%llu,\"records\":%llu,\"bytes\":%llu}\n", (unsigned long long)flows,
                       (unsigned long long)records, (unsigned long long)bytes);
                fflush(stdout);
        }
        return 0;
}
