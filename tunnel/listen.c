/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * Sockets of pods are made by a thread that enters the pod's network namespace and comes back (two setns, about 4 us);
 * a thread that cannot come back would open the next pod's sockets in the wrong place, so the process aborts. A socket
 * belongs to its namespace for good.
 *
 * Each pod has three listeners, each a SO_REUSEPORT group with one socket per worker; the SOCKMAP holds one of each
 * group and sk_lookup lets the kernel choose within it. Their own ports do not matter and are taken at random from
 * 61000 to 65535, outside ip_local_port_range: a held port is one that the application cannot bind. All sockets of ours
 * carry an entry in the pod's `engine_sk` storage, which tells the programs that they are ours; it is written before
 * listen() and before connect(), so that no packet is without it.
 *
 * Sockets towards applications reset when they are closed before both directions ended (SO_LINGER 1, 0): also when this
 * process is killed. A truncated stream must never look complete.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "intern.h"
#include "pod.h"

#define ENGINE_MARK 0x539
#define PORT_FIRST 61000
#define PORT_COUNT (65536 - PORT_FIRST)
#define BACKLOG 4096
#define TRIES 64

#ifndef IPV6_FREEBIND
#define IPV6_FREEBIND 78
#endif
#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

static int map_update(int map, const void *key, const void *value)
{
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.map_fd = (uint32_t)map;
        attr.key = (uintptr_t)key;
        attr.value = (uintptr_t)value;
        attr.flags = BPF_ANY;
        return syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)) < 0 ? -errno : 0;
}

/* In the storage of the pod's programs: this socket is the engine's. */
static int mark_ours(const struct pod *p, int fd)
{
        uint32_t one = 1;
        return p->engine_sk < 0 ? 0 : map_update(p->engine_sk, &fd, &one);
}

/* The namespace that every thread of the engine is at home in. */
static int home = -1;

int netns_remember(void)
{
        if (home < 0)
                home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        return home < 0 ? -errno : 0;
}

int pod_socket(const struct pod *p, int family, int type, int protocol)
{
        if (setns(p->netns, CLONE_NEWNET) < 0)
                return -errno;
        int fd = socket(family, type | SOCK_CLOEXEC, protocol), error = errno;
        if (setns(home, CLONE_NEWNET) < 0) {
                fprintf(stderr, "engine: cannot leave a pod's network namespace: %s\n", strerror(errno));
                abort();
        }
        return fd < 0 ? -error : fd;
}

static int socket_inside(const struct pod *p, int family)
{
        return pod_socket(p, family, SOCK_STREAM | SOCK_NONBLOCK, 0);
}

static int set_int(int fd, int level, int option, int value)
{
        return setsockopt(fd, level, option, &value, sizeof(value)) < 0 ? -errno : 0;
}

static void linger_reset(int fd)
{
        struct linger l = {.l_onoff = 1, .l_linger = 0};
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l));
}

/* IP_TRANSPARENT lets an IPv4 listener answer for addresses that are not the pod's; IPv6 does not need it to accept. */
static int transparent(int fd, int family)
{
        int result = set_int(fd, SOL_IP, IP_TRANSPARENT, 1);
        if (family == AF_INET6)
                result = set_int(fd, SOL_IPV6, IPV6_TRANSPARENT, 1);
        return result;
}

/*
 * BBR paces: each burst arms a timer of the socket's, which costs a third of the engine's CPU per byte (decision 0007)
 * and gains nothing inside a pod or between the nodes of one network. Where the namespace's default is a BBR, the
 * engine's sockets take cubic; any other default, and sockets to outside of the mesh, stay as the administrator wants
 * them. Before connect() or listen(): a socket that has begun to pace goes on.
 */
static void unpaced(int fd)
{
        static const char *const instead[] = {"cubic", "reno"};
        for (unsigned i = 0; i < sizeof(instead) / sizeof(*instead); i++)
                if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, instead[i], (socklen_t)strlen(instead[i])) == 0)
                        return;
}

static bool paces(const struct pod *p)
{
        char name[16] = ""; /* TCP_CA_NAME_MAX */
        socklen_t n = sizeof(name) - 1;
        int fd = socket_inside(p, p->ipv6 ? AF_INET6 : AF_INET);
        if (fd < 0)
                return false;
        bool yes = getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &n) == 0 && strncmp(name, "bbr", 3) == 0;
        close(fd);
        return yes;
}

static int listener_open(struct pod *p, enum role role, uint16_t port)
{
        int family = p->ipv6 ? AF_INET6 : AF_INET, fd = socket_inside(p, family), result;
        struct sockaddr_storage any = {.ss_family = (sa_family_t)family};
        if (fd < 0)
                return fd;
        if (family == AF_INET6) {
                ((struct sockaddr_in6 *)&any)->sin6_port = htons(port);
                set_int(fd, SOL_IPV6, IPV6_V6ONLY, 0);
        } else {
                ((struct sockaddr_in *)&any)->sin_port = htons(port);
        }
        set_int(fd, SOL_SOCKET, SO_MARK, ENGINE_MARK);
        set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        if (p->paces)
                unpaced(fd);
        if (role != ROLE_HBONE) {
                linger_reset(fd);
                set_int(fd, SOL_SOCKET, SO_OOBINLINE, 1); /* inherited; decision 0012 */
        } else {
                set_int(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 20000);
        }
        /* Inherited: an accepted socket sits on the port that was called, and must not keep the application from it. */
        set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1);
        if ((result = transparent(fd, family)) < 0 || (result = set_int(fd, SOL_SOCKET, SO_REUSEPORT, 1)) < 0 ||
            (result = mark_ours(p, fd)) < 0)
                goto fail;
        if (bind(fd, (struct sockaddr *)&any,
                 family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in)) < 0 ||
            listen(fd, BACKLOG) < 0) {
                result = -errno;
                goto fail;
        }
        return fd;
fail:
        close(fd);
        return result;
}

static bool has_ipv6(const struct pod *p)
{
        int fd = socket_inside(p, AF_INET6);
        if (fd < 0)
                return false;
        struct sockaddr_in6 lo = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        bool yes = bind(fd, (struct sockaddr *)&lo, sizeof(lo)) == 0;
        close(fd);
        return yes;
}

static void close_role(struct pod *p, int role, unsigned workers)
{
        for (unsigned i = 0; i < workers; i++) {
                if (p->fds[role][i] >= 0)
                        close(p->fds[role][i]);
                p->fds[role][i] = -1;
        }
}

/* One role: the same free port for all workers. */
static int open_role(struct pod *p, enum role role, unsigned workers, uint16_t *port)
{
        int result = -EADDRINUSE;
        unsigned seed =
                (unsigned)p->netns_cookie ^ (unsigned)getpid() ^ (unsigned)(uintptr_t)p ^ ((unsigned)role << 16);
        for (int attempt = 0; attempt < TRIES && result == -EADDRINUSE; attempt++) {
                *port = (uint16_t)(PORT_FIRST + (unsigned)rand_r(&seed) % PORT_COUNT);
                if ((role > ROLE_OUTBOUND && *port == p->ports.outbound) ||
                    (role > ROLE_INBOUND && *port == p->ports.inbound))
                        continue; /* the same port would be the same SO_REUSEPORT group */
                result = 0;
                for (unsigned i = 0; i < workers && result == 0; i++) {
                        int fd = listener_open(p, role, *port);
                        p->fds[role][i] = fd;
                        if (fd < 0)
                                result = fd;
                }
                if (result < 0)
                        close_role(p, role, workers);
        }
        return result;
}

int pod_open(struct pod *p, unsigned workers, char *error, size_t n)
{
        uint16_t *ports[ROLES] = {&p->ports.outbound, &p->ports.inbound, &p->ports.hbone};
        p->ipv6 = has_ipv6(p);
        p->paces = paces(p);
        for (int role = 0; role < ROLES; role++) {
                int result = open_role(p, (enum role)role, workers, ports[role]);
                if (result < 0) {
                        snprintf(error, n, "listener %d: %s", role, strerror(-result));
                        while (--role >= 0)
                                close_role(p, role, workers);
                        return result;
                }
        }
        return 0;
}

/* In service: sk_lookup finds the group through one of its sockets. */
int pod_serve(struct pod *p)
{
        for (uint32_t role = 0; role < ROLES && p->listeners_map >= 0; role++) {
                uint64_t fd = (uint64_t)p->fds[role][0];
                int result = map_update(p->listeners_map, &role, &fd);
                if (result < 0)
                        return result;
        }
        return 0;
}

int pod_revive(struct pod *p, int listeners_map, int engine_sk, unsigned workers)
{
        int fds[2] = {fcntl(listeners_map, F_DUPFD_CLOEXEC, 3), fcntl(engine_sk, F_DUPFD_CLOEXEC, 3)};
        if (fds[0] < 0 || fds[1] < 0) {
                for (int i = 0; i < 2; i++)
                        if (fds[i] >= 0)
                                close(fds[i]);
                return listeners_map < 0 || engine_sk < 0 ? 0 : -errno;
        }
        /* workers may be connecting with the old number: it keeps its place */
        if (dup3(fds[0], p->listeners_map, O_CLOEXEC) < 0 || dup3(fds[1], p->engine_sk, O_CLOEXEC) < 0)
                return -errno;
        close(fds[0]);
        close(fds[1]);
        for (int role = 0; role < ROLES; role++)
                for (unsigned i = 0; i < workers; i++) {
                        int result = mark_ours(p, p->fds[role][i]);
                        if (result < 0)
                                return result;
                }
        return pod_serve(p);
}

/* Ports of spoofed sources: below the usual range of clients, so that an application's own connection with the same
 * client, from before it was enrolled or native again, has another port: a SYN with that tuple would never be answered.
 * They are named one by one: IP_LOCAL_PORT_RANGE only narrows net.ipv4.ip_local_port_range, it cannot leave it. */
#define SPOOF_FIRST 1024
#define SPOOF_LAST 32767
#define SPOOF_TRIES 32

static int connect_once(struct pod *p, const struct endpoint *source, const struct endpoint *to, enum aim aim)
{
        struct sockaddr_storage address;
        int family = addr_is_v4(&to->addr) ? AF_INET : AF_INET6, fd = socket_inside(p, family), result;
        if (fd < 0)
                return fd;
        set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        set_int(fd, SOL_SOCKET, SO_MARK, ENGINE_MARK);
        if ((result = mark_ours(p, fd)) < 0)
                goto fail;
        if (p->paces && aim != AIM_OUTSIDE)
                unpaced(fd);
        if (aim != AIM_TUNNEL) {
                linger_reset(fd);
                set_int(fd, SOL_SOCKET, SO_OOBINLINE, 1);
        }
        if (source) {
                int level = family == AF_INET ? SOL_IP : SOL_IPV6;
                set_int(fd, level, family == AF_INET ? IP_TRANSPARENT : IPV6_TRANSPARENT, 1);
                set_int(fd, level, family == AF_INET ? IP_FREEBIND : IPV6_FREEBIND, 1);
                set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1); /* the port may be in TIME_WAIT towards another destination */
                if (source->port == 0)
                        set_int(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1);
                socklen_t length = addr_to_sockaddr(source, &address);
                if (bind(fd, (struct sockaddr *)&address, length) < 0) {
                        result = -errno;
                        goto fail;
                }
        }
        socklen_t length = addr_to_sockaddr(to, &address);
        if (connect(fd, (struct sockaddr *)&address, length) < 0 && errno != EINPROGRESS) {
                result = -errno;
                goto fail;
        }
        return fd;
fail:
        close(fd);
        return result;
}

int pod_connect(struct pod *p, const struct endpoint *source, const struct endpoint *to, enum aim aim)
{
        if (!source || source->port != 0)
                return connect_once(p, source, to, aim);
        struct endpoint at = *source;
        for (int i = 0; i < SPOOF_TRIES; i++) {
                uint32_t number;
                if (getrandom(&number, sizeof(number), 0) != sizeof(number))
                        break;
                at.port = (uint16_t)(SPOOF_FIRST + number % (SPOOF_LAST - SPOOF_FIRST));
                int fd = connect_once(p, &at, to, aim);
                if (fd != -EADDRNOTAVAIL && fd != -EADDRINUSE)
                        return fd;
        }
        return connect_once(p, source, to, aim); /* nearly all are in use: any that the kernel finds */
}

struct pod *pod_ref(struct pod *p)
{
        atomic_fetch_add_explicit(&p->refs, 1, memory_order_relaxed);
        return p;
}

void pod_unref(struct pod *p)
{
        if (!p || atomic_fetch_sub(&p->refs, 1) != 1)
                return;
        int fds[] = {p->netns, p->engine_sk, p->listeners_map};
        for (unsigned i = 0; i < 3; i++)
                if (fds[i] >= 0)
                        close(fds[i]);
        for (int i = 0; p->tuples && i < POD_TUPLES; i++)
                for (struct tuples *t = p->tuples[i].next, *next; t; t = next) {
                        next = t->next;
                        free(t);
                }
        free(p->tuples);
        char *texts[] = {p->uid, p->namespace_, p->name, p->service_account, p->workload, p->identity};
        for (unsigned i = 0; i < sizeof(texts) / sizeof(*texts); i++)
                free(texts[i]);
        free(p);
}

bool pod_has(const struct pod *p, const struct addr *a)
{
        for (unsigned i = 0; i < p->naddresses; i++)
                if (addr_equal(&p->addresses[i], a))
                        return true;
        return false;
}

bool pod_owns_port(const struct pod *p, uint16_t port)
{
        return port == p->ports.outbound || port == p->ports.inbound || port == p->ports.hbone;
}

/* -- tuples ------------------------------------------------------------------------------------------------------- */

/*
 * What one worker notes all of them see, at once and without a lock. A tuple is a mark: a hash of its address and port
 * with the pod's secret seed, 63 bits of it, and whose it is. Two tuples of one mark are not to be expected in the life
 * of a cluster, nor to be made by whoever does not know the seed. A bucket is a list of cache lines; a mark is put into
 * a free place and taken out of its place by compare and exchange, and lines are only ever added: there are as many as
 * there were connections at once, 9 bytes each, until the pod goes.
 */
static uint64_t mark_of(const struct pod *p, const struct endpoint *e, bool own)
{
        uint8_t key[18];
        memcpy(key, e->addr.ip, 16);
        memcpy(key + 16, &e->port, 2);
        uint64_t h = hash_bytes(key, sizeof(key), p->tuple_seed) & ~1ull;
        return (h ? h : 2) | own;
}

static struct tuples *bucket(struct pod *p, uint64_t mark)
{
        return &p->tuples[(mark >> 1) % POD_TUPLES];
}

#define PLACES (sizeof(((struct tuples *)0)->mark) / sizeof(((struct tuples *)0)->mark[0]))

static unsigned count_of(struct pod *p, uint64_t mark)
{
        unsigned n = 0;
        for (struct tuples *t = bucket(p, mark); t; t = atomic_load(&t->next))
                for (unsigned i = 0; i < PLACES; i++)
                        n += atomic_load(&t->mark[i]) == mark;
        return n;
}

/* One such mark becomes another in its place: none, or from none. false: there was none, to the last line. */
static bool exchange(struct tuples *t, uint64_t from, uint64_t to, struct tuples **last)
{
        for (; t; *last = t, t = atomic_load(&t->next))
                for (unsigned i = 0; i < PLACES; i++) {
                        uint64_t is = from;
                        if (atomic_load(&t->mark[i]) == from && atomic_compare_exchange_strong(&t->mark[i], &is, to))
                                return true;
                }
        return false;
}

static void add_mark(struct pod *p, uint64_t mark)
{
        struct tuples *last = NULL, *more = NULL;
        while (!exchange(last ? last : bucket(p, mark), 0, mark, &last)) {
                if (!more && !(more = calloc(1, sizeof(*more))))
                        return; /* then a lost tag is not recognised; the connection is refused elsewhere for want of
                                   identity */
                struct tuples *none = NULL;
                if (atomic_compare_exchange_strong(&last->next, &none, more))
                        more = NULL;
        }
        free(more);
}

void pod_tuple_add(struct pod *p, const struct endpoint *e, bool own)
{
        add_mark(p, mark_of(p, e, own));
}

void pod_tuple_remove(struct pod *p, const struct endpoint *e, bool own)
{
        struct tuples *last;
        uint64_t mark = mark_of(p, e, own);
        exchange(bucket(p, mark), mark, 0, &last);
}

bool pod_tuple_is_own(struct pod *p, const struct endpoint *e)
{
        return count_of(p, mark_of(p, e, true)) > 0;
}

uint16_t pod_tuple_port(struct pod *p, const struct addr *client, uint64_t random)
{
        struct endpoint e = {.addr = *client};
        for (unsigned i = 0; i < 256; i++) {
                e.port = (uint16_t)(SPOOF_FIRST + (random + i * 7919) % (SPOOF_LAST - SPOOF_FIRST));
                uint64_t ours = mark_of(p, &e, true), theirs = mark_of(p, &e, false);
                if (count_of(p, ours) || count_of(p, theirs))
                        continue;
                /* first noted, then looked at again: of two workers that choose the same at once none has it */
                add_mark(p, ours);
                if (count_of(p, ours) == 1 && !count_of(p, theirs))
                        return e.port;
                pod_tuple_remove(p, &e, true);
        }
        return 0;
}
