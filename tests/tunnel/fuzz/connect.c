/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a peer sends inside a tunnel, against the whole engine: its loop and thread, nghttp2 as hbone.c sets it up,
 * authorities, streams, the relay to the application, budgets and logs. Only TLS is another: this file defines what
 * tls.h declares, so the linker leaves tls.c out, and what a peer says is not sealed. The pod is a network namespace
 * (this needs root), its application listens there and answers.
 *
 * First byte: bit 0, the peer is the server that our CONNECT goes to, else the client; bit 1, the rest is frames as
 * below, else bytes as they are; bit 2, IPv6; bits 4 to 7, in how many pieces it comes. Second byte: what the
 * application does. A frame is type, flags, stream, length (2 bytes, big-endian) and payload; the payload of HEADERS is
 * lines "NAME VALUE", which are encoded here, so that changed texts stay good HPACK. The preface and SETTINGS are put
 * before them.
 *
 * It aborts when the application is reached at another address or port than the tunnel's own, or from another client;
 * when a connection, a stream's bytes or an fd is left after the tunnel's end; when the tunnel does not end.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include "conn.h"
#include "hbone.h"
#include "pod.h"

#define IDENTITY "spiffe://cluster.local/ns/default/sa/any"
#define DEADLINE_TURNS 20000 /* about a second and a half, more under load */
#define APPLICATION 8080
#define MOST (1 << 17)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* -- instead of tls.c --------------------------------------------------------------------------------------------- */

int identity_new(struct identity **out, const char *uri, const char *key_pem, const char *chain_pem,
                 const char *roots_pem)
{
        (void)key_pem, (void)chain_pem, (void)roots_pem;
        struct identity *i = calloc(1, sizeof(*i));
        i->ctx = SSL_CTX_new(TLS_method());
        i->uri = strdup(uri);
        i->not_after_s = INT64_MAX;
        spiffe_trust_domain(uri, i->trust_domain, sizeof(i->trust_domain));
        atomic_init(&i->refs, 1);
        *out = i;
        return 0;
}

struct identity *identity_ref(struct identity *i)
{
        atomic_fetch_add(&i->refs, 1);
        return i;
}

void identity_unref(struct identity *i)
{
        if (!i || atomic_fetch_sub(&i->refs, 1) != 1)
                return;
        SSL_CTX_free(i->ctx);
        free(i->uri);
        free(i);
}

bool identity_trusts(const struct identity *i, const uint8_t root[TLS_DIGEST])
{
        (void)i, (void)root;
        return true;
}

int tls_open(struct tls *t, struct identity *i, bool server)
{
        (void)server;
        *t = (struct tls){.ssl = SSL_new(i->ctx)};
        return 0;
}

void tls_close(struct tls *t)
{
        SSL_free(t->ssl);
        t->ssl = NULL;
        buf_free(&t->in);
        buf_free(&t->out);
}

int tls_handshake(struct tls *t)
{
        (void)t;
        return 1;
}

const char *tls_peer(struct tls *t, char uri[TLS_URI_MAX], int64_t *not_after_s, uint8_t root[TLS_DIGEST])
{
        (void)t;
        strcpy(uri, IDENTITY);
        memset(root, 0, TLS_DIGEST);
        *not_after_s = INT64_MAX;
        return NULL;
}

int tls_read(struct tls *t, const uint8_t **plain)
{
        if (t->opened)
                buf_take(&t->in, t->opened);
        t->opened = t->in.len;
        if (t->in.len)
                *plain = buf_at(&t->in);
        return (int)t->opened;
}

int tls_write(struct tls *t, const void *plain, size_t n, uint64_t *key_updates)
{
        (void)key_updates;
        return buf_add(&t->out, plain, n) ? 0 : -1;
}

void tls_settle(struct tls *t)
{
        SSL_free(t->ssl);
        t->ssl = NULL;
}

void tls_end(struct tls *t)
{
        (void)t;
}

const char *tls_error(const struct tls *t, char *text, size_t n)
{
        (void)t;
        snprintf(text, n, "no TLS");
        return text;
}

bool spiffe_trust_domain(const char *uri, char *out, size_t n)
{
        const char *td = uri + strlen("spiffe://");
        snprintf(out, n, "%.*s", (int)strcspn(td, "/"), td);
        return true;
}

/* -- the world around --------------------------------------------------------------------------------------------- */

static const char *const own[] = {"10.0.0.2", "fd00::2"}, *const client[] = {"10.0.0.9", "fd00::9"},
                         *const other[] = {"10.0.0.4", "fd00::4"};
static struct tunnel *engine;
static struct tunnel_ports ports;
static struct pod *pod;
static int home, inside;
static int application[2], peers[2];
static int forbidden[5];
static uint64_t fds; /* that the engine counts when nothing is open */

static void must(bool good, const char *what)
{
        if (good)
                return;
        fprintf(stderr, "fuzz-connect: %s (%s)\n", what, strerror(errno));
        abort();
}

static socklen_t name(struct sockaddr_storage *ss, const char *address, uint16_t port)
{
        struct endpoint e = {.port = port};
        uint8_t ip[16];
        bool four = inet_pton(AF_INET, address, ip) == 1;
        must(four || inet_pton(AF_INET6, address, ip) == 1, address);
        addr_from_bytes(&e.addr, ip, four ? 4 : 16);
        return addr_to_sockaddr(&e, ss);
}

static int listen_at(const char *address, uint16_t port)
{
        struct sockaddr_storage ss;
        socklen_t n = name(&ss, address, port);
        int fd = socket(ss.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
        must(bind(fd, (struct sockaddr *)&ss, n) == 0 && listen(fd, 1024) == 0, "listen");
        return fd;
}

static void make_namespace(void)
{
        home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        must(unshare(CLONE_NEWNET) == 0, "must run as root: it makes a network namespace");
        inside = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        must(system("set -e; ip link set lo up; for a in 10.0.0.2/32 10.0.0.9/32 10.0.0.4/32; do ip addr add $a dev lo;"
                    "done; for a in fd00::2/128 fd00::9/128 fd00::4/128; do ip addr add $a dev lo nodad; done;"
                    "sysctl -qw net.ipv4.tcp_max_tw_buckets=64") == 0,
             "addresses of the namespace");
        for (int i = 0; i < 2; i++) {
                application[i] = listen_at(own[i], APPLICATION);
                peers[i] = listen_at(other[i], HBONE_PORT);
                forbidden[i] = listen_at(other[i], APPLICATION);
                forbidden[2 + i] = listen_at(own[i], HBONE_PORT);
        }
        forbidden[4] = listen_at("127.0.0.1", APPLICATION);
        must(setns(home, CLONE_NEWNET) == 0, "setns");
}

static uint8_t *put(uint8_t *at, unsigned field, const void *bytes, size_t n)
{
        if (field >= 16)
                *at++ = (uint8_t)(0x80 | (field << 3 | 2));
        *at++ = (uint8_t)(field >= 16 ? field >> 4 : field << 3 | 2);
        *at++ = (uint8_t)n;
        memcpy(at, bytes, n);
        return at + n;
}

/* APPLY of one healthy workload of ours with an address of each family. */
static void apply_workload(const char *uid, const char *const addresses[2])
{
        uint8_t batch[512] = {'S', 'S', 'B', '1'}, body[256], *at = body, ip[16];
        char report[256];
        at = put(at, 20, uid, strlen(uid));
        at = put(at, 1, "any", 3);
        at = put(at, 2, "default", 7);
        at = put(at, 7, "any", 3);
        at = put(at, 13, "any", 3);
        for (int i = 0; i < 2; i++) {
                inet_pton(i ? AF_INET6 : AF_INET, addresses[i], ip);
                at = put(at, 3, ip, i ? 16 : 4);
        }
        *at++ = 5 << 3, *at++ = 1; /* tunnel_protocol: HBONE */
        size_t inner = (size_t)(at - body), n = strlen(uid), used = 16 + n + 1 + inner + 3;
        uint32_t numbers[] = {1, (uint32_t)n, 1, (uint32_t)inner + 3}, count = 1;
        memcpy(batch + 8, &count, 4);
        memcpy(batch + 16, numbers, 16);
        memcpy(batch + 32, uid, n);
        batch[32 + n] = '1';
        uint8_t *address = batch + 33 + n;
        address[0] = 1 << 3 | 2, address[1] = (uint8_t)(inner | 0x80), address[2] = (uint8_t)(inner >> 7);
        memcpy(address + 3, body, inner); /* its length in two bytes, needed or not */
        int fd = memfd_create("batch", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        size_t all = 16 + ((used + 7) & ~(size_t)7);
        must(write(fd, batch, all) == (ssize_t)all &&
                     fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW) == 0 &&
                     tunnel_apply(engine, fd, report, sizeof(report)) == 0 && !*report,
             "APPLY");
        close(fd);
}

static void set_up(void)
{
        struct tunnel_config config = {.workers = 1, .log_fd = open("/dev/null", O_WRONLY | O_CLOEXEC)};
        struct tunnel_settings settings = {.network = "",
                                           .cluster_id = "Kubernetes",
                                           .trust_domain = "cluster.local",
                                           .node = "node",
                                           .cluster_cidrs = "10.0.0.0/8,fd00::/8"};
        struct tunnel_pod described = {.uid = "u",
                                       .namespace_ = "default",
                                       .name = "any",
                                       .service_account = "any",
                                       .workload = "Kubernetes//Pod/default/own",
                                       .identity = IDENTITY,
                                       .addresses = "10.0.0.2,fd00::2",
                                       .netns_cookie = 1,
                                       .netns_ino = 1};
        int64_t not_after;
        make_namespace();
        must(tunnel_new(&engine, &config) == 0 && tunnel_settings(engine, &settings) == 0 &&
                     tunnel_whole(engine) == 0 && tunnel_identity_set(engine, IDENTITY, "", "", "", &not_after) == 0 &&
                     tunnel_pod_add(engine, &described, inside, -1, -1, NULL, &ports) == 0,
             "the engine");
        apply_workload(described.workload, own);
        apply_workload("Kubernetes//Pod/default/other", other);
        pod = container(engine->pods.next, struct pod, link);
        fds = atomic_load(&engine->fds);
}

/* -- one input ---------------------------------------------------------------------------------------------------- */

static void nothing(struct worker *w, void *arg)
{
        (void)w, (void)arg;
}

/* What was sent before has been seen by the worker: it takes mail, then events, so the second mail is behind them. */
static void turn(void)
{
        must(loop_all(engine, nothing, NULL) == 0 && loop_all(engine, nothing, NULL) == 0, "the worker is stuck");
}

struct arrival {
        int fd;
        bool six;
};

static void arrive(struct worker *w, void *arg)
{
        const struct arrival *a = arg;
        struct sockaddr_storage ss;
        struct endpoint from, to;
        name(&ss, client[a->six], 40000);
        addr_from_sockaddr(&from, &ss);
        name(&ss, own[a->six], HBONE_PORT);
        addr_from_sockaddr(&to, &ss);
        must(tun_accept(w, pod, a->fd, &from, &to) != NULL, "tun_accept");
}

static size_t put_line(uint8_t *out, const uint8_t *text, size_t n)
{
        const uint8_t *space = memchr(text, ' ', n);
        size_t first = space ? (size_t)(space - text) : n, second = space ? n - first - 1 : 0;
        if (first > 126 || second > 16000)
                return 0;
        uint8_t *at = out;
        *at++ = 0; /* literal, not indexed, new name, no Huffman */
        *at++ = (uint8_t)first;
        memcpy(at, text, first);
        at += first;
        if (second < 127) {
                *at++ = (uint8_t)second;
        } else {
                *at++ = 127;
                size_t rest = second - 127;
                for (; rest >= 128; rest >>= 7)
                        *at++ = (uint8_t)(rest | 0x80);
                *at++ = (uint8_t)rest;
        }
        if (second)
                memcpy(at, space + 1, second);
        return (size_t)(at - out) + second;
}

static size_t put_frames(uint8_t *out, const uint8_t *in, size_t size, bool client_speaks)
{
        static const uint8_t settings[9] = {0, 0, 0, 4};
        uint8_t *at = out;
        if (client_speaks) {
                memcpy(at, NGHTTP2_CLIENT_MAGIC, NGHTTP2_CLIENT_MAGIC_LEN);
                at += NGHTTP2_CLIENT_MAGIC_LEN;
        }
        memcpy(at, settings, sizeof(settings));
        at += sizeof(settings);
        while (size >= 5 && at - out < MOST / 2) {
                size_t n = (size_t)in[3] << 8 | in[4];
                const uint8_t *payload = in + 5;
                uint8_t *frame = at;
                if (n > size - 5)
                        n = size - 5;
                at += 9;
                if (in[0] == NGHTTP2_HEADERS) {
                        for (size_t i = 0; i < n;) {
                                const uint8_t *end = memchr(payload + i, '\n', n - i);
                                size_t line = end ? (size_t)(end - payload) - i : n - i;
                                at += put_line(at, payload + i, line);
                                i += line + 1;
                        }
                } else {
                        memcpy(at, payload, n);
                        at += n;
                }
                size_t length = (size_t)(at - frame) - 9;
                const uint8_t header[9] = {
                        (uint8_t)(length >> 16), (uint8_t)(length >> 8), (uint8_t)length, in[0], in[1], 0, 0, 0, in[2]};
                memcpy(frame, header, 9);
                in = payload + n;
                size -= 5 + n;
        }
        return (size_t)(at - out);
}

static void drain(int fd)
{
        uint8_t bytes[65536];
        while (recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
                ;
}

static void reset_on_close(int fd)
{
        struct linger l = {1, 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l));
}

static bool is_at(const struct sockaddr_storage *ss, const char *address, int port)
{
        struct sockaddr_storage want;
        struct endpoint a, b;
        name(&want, address, 1);
        return addr_from_sockaddr(&a, ss) == 0 && addr_from_sockaddr(&b, &want) == 0 && addr_equal(&a.addr, &b.addr) &&
               (port == 0 || a.port == port);
}

/* The application: takes what comes, does what `mood` says; `open` holds its connections. */
static void serve(int *open_fds, unsigned *n, bool six, uint8_t mood)
{
        static uint8_t answer[65536];
        for (unsigned i = 0; i < sizeof(forbidden) / sizeof(*forbidden); i++)
                must(accept4(forbidden[i], NULL, NULL, SOCK_CLOEXEC) < 0, "somebody was reached who must not be");
        must(accept4(application[!six], NULL, NULL, SOCK_CLOEXEC) < 0, "the application's other family was reached");
        for (int fd; *n < 64 && (fd = accept4(application[six], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0;) {
                struct sockaddr_storage peer;
                socklen_t length = sizeof(peer);
                if (getpeername(fd, (struct sockaddr *)&peer, &length) == 0)
                        must(is_at(&peer, client[six], 0), "the application sees another client");
                open_fds[(*n)++] = fd;
                reset_on_close(fd);
                if (mood & 1)
                        send(fd, answer, mood & 2 ? sizeof(answer) : 10, MSG_NOSIGNAL | MSG_DONTWAIT);
                if (mood & 4)
                        shutdown(fd, SHUT_WR);
        }
        for (unsigned i = 0; i < *n; i++)
                if (mood & 8) {
                        close(open_fds[i]);
                        open_fds[i--] = open_fds[--*n];
                } else if (!(mood & 16)) {
                        drain(open_fds[i]);
                }
}

/* An application of the pod's asks for `other`; its connection, and the tunnel that was dialled for it. */
static int ask(bool six, int *tunnel)
{
        struct sockaddr_storage ss;
        socklen_t n = name(&ss, other[six], ports.outbound);
        must(setns(inside, CLONE_NEWNET) == 0, "setns");
        int fd = socket(ss.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        must(connect(fd, (struct sockaddr *)&ss, n) == 0, "connect");
        must(setns(home, CLONE_NEWNET) == 0, "setns");
        reset_on_close(fd);
        struct pollfd wait = {.fd = peers[six], .events = POLLIN};
        must(poll(&wait, 1, 5000) == 1, "the engine does not dial");
        *tunnel = accept4(peers[six], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        turn();
        return fd;
}

/* A further tunnel, dialled because the first refused the stream: it says the same, and ends. */
static void answer_again(bool six, const uint8_t *wire, size_t length)
{
        for (int fd; (fd = accept4(peers[six], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0;) {
                send(fd, wire, length, MSG_NOSIGNAL | MSG_DONTWAIT);
                turn();
                drain(fd);
                close(fd);
        }
}

static bool at_rest(void)
{
        struct tunnel_pod_stats stats;
        tunnel_pod_stats(engine, "u", &stats);
        return stats.connections == 0 && stats.held == 0 && atomic_load(&pod->buffered) == 0 &&
               atomic_load(&engine->buffered) == 0 && atomic_load(&engine->fds) == fds;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        static uint8_t wire[2 * MOST]; /* a payload of empty lines is trebled */
        int ends[2], open_fds[64], app = -1;
        unsigned n = 0;
        if (!engine)
                set_up();
        if (size < 2 || size > MOST / 4)
                return 0;
        bool server_speaks = data[0] & 1, six = data[0] & 4;
        uint8_t mood = data[1];
        size_t pieces = 1 + (data[0] >> 4), length = size - 2;
        if (data[0] & 2)
                length = put_frames(wire, data + 2, length, !server_speaks);
        else
                memcpy(wire, data + 2, length);
        if (server_speaks) {
                app = ask(six, &ends[0]);
        } else {
                must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0, "socketpair");
                struct arrival a = {ends[1], six};
                must(loop_all(engine, arrive, &a) == 0, "the worker is stuck");
        }
        if (app >= 0 && mood & 1)
                send(app, wire, length < 1000 ? length : 1000, MSG_NOSIGNAL | MSG_DONTWAIT);
        for (size_t at = 0, part = length / pieces + 1; at < length; at += part) {
                size_t now = length - at < part ? length - at : part;
                if (send(ends[0], wire + at, now, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)now)
                        break;
                turn();
                drain(ends[0]);
                serve(open_fds, &n, six, mood);
                if (app >= 0)
                        drain(app);
        }
        for (int i = 0; i < 2; i++) {
                turn();
                drain(ends[0]);
                serve(open_fds, &n, six, mood);
                answer_again(six, wire, length);
        }
        shutdown(ends[0], SHUT_WR);
        if (app >= 0)
                close(app);
        for (int turns = 0; !at_rest(); turns++) {
                must(turns < DEADLINE_TURNS, "something is left of the tunnel");
                turn();
                drain(ends[0]);
                answer_again(six, wire, length);
        }
        serve(open_fds, &n, six, 0);
        while (n > 0)
                close(open_fds[--n]);
        close(ends[0]);
        return 0;
}
