/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * An allowance is for one pair: source address of a pod, address and port of another pod of this node, or of a
 * destination outside the mesh (below). It has a slot of the node's map `slots` (mapped into this process) and is in
 * force by an entry of the source pod's map `verdicts` that names slot and generation. Flows and notes in the kernel
 * carry both; adding one to the slot's generation makes all of them worthless at once.
 *
 *   open    the entry is there: SYNs pass natively
 *   closed  the entry was taken out: new connections meet the engine again, open flows go on and are still judged
 *   cut     closed, and the generation is another: the programs let nothing out any more, and both sockets are
 *           destroyed (sock_diag, told by their cookies, because a look-up by tuple alone may find a listener of
 *           ours). What is left after a second, the programs turn round, which resets it
 *
 * and is forgotten, its slot free, when it is not open, no socket carries it, and no note can be under way.
 *
 * What an engine before this one had allowed comes back with the pods whose sockets carry it, closed. Pods and state
 * come in pieces: until the agent has said that the state is whole (tunnel_whole) nothing new is allowed, and a flow is
 * cut only by a policy that denies it, for no other piece can change that. Then an end that is no pod of ours (it left
 * the mesh with the flow open) is who the state says.
 *
 * Workers make allowances, right after they have decided about a connection of the pair. Who takes them back is the
 * control thread: after every worker has put a new state into force (tunnel_apply), and before that is answered, it
 * judges all of them by it, so one that was made by an older state is among them. What is not clearly so any more (a
 * record that changed, a policy on its way, a dry run that would deny) closes; what is denied is cut.
 *
 * Outside the mesh is what a route leaves in clear text for the very address that was asked for, and nobody's policy is
 * about: no record, a record that speaks no HBONE, a service whose connections pass through. It has no second end here
 * and nothing to be denied by, so its allowance is only ever closed, when its route is another; open flows go on, as
 * those that the engine carries do. There is no bound to the addresses outside: a pod may have OUTSIDE_POD of them, all
 * of them OUTSIDE_NODE slots, and when they are too many those go that were not used for a while.
 *
 * Counters: the programs count connections and bytes per slot, `fold` hands what has grown to the label sets. When a
 * flow ends nobody tells; but the sockets that are there can be seen (iterator `flows`), so those that were opened and
 * are not there have ended. A thread of its own looks once a second, a scrape when it comes. Opened connections are
 * read before the sockets, so one that comes between counts as neither. The log has a line for each flow whose end the
 * programs have told (`ended`), and one for all others of a pair that have ended meanwhile, as for all of a destination
 * outside the mesh: of those the pod's end does not know when it is the last one.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "../bpf/maps.h"
#include "denial.h"
#include "pod.h"
#include "rbac.h"
#include "state.h"
#include "vouch.h"

#define BUCKETS 4096
#define TICK_MS 1000
#define DRAIN_MS 100 /* how often it is looked whether flows have ended, and while they do */
#define BUSY_MS 10
#define PAGE ((size_t)sysconf(_SC_PAGESIZE))
#define RESET_ROUNDS 5 /* how often, and after what time, it is looked whether resets have arrived */
#define RESET_US 2000
#define NOTE_MS 3000         /* longer than a note lives */
#define LATE_MS 10000        /* how long a SYN may be under way after its allowance was closed */
#define STRAY_MS (60 * 1000) /* by then an agent has given us every pod that there is */
#define IDLE_MS (600 * 1000) /* an allowance that nobody uses */
#define UNTIL_S 3600
#define OUTSIDE_POD 512
#define OUTSIDE_NODE (VOUCH_MAX_SLOTS / 2)
#define CROWDED_MS (5 * 1000) /* IDLE_MS of destinations outside, while there are as many as there may be */

_Static_assert(OUTSIDE_POD <= VOUCH_MAX_VERDICTS / 2, "the other half is for pods");

struct allowance {
        struct allowance *next; /* same bucket */
        uint32_t slot, generation;
        bool open, counted, outside; /* counted: opened_before is of this look */
        bool alone;     /* what comes in clear text for it can only be a late one: its source is captured */
        bool inherited; /* an engine before this one counted its flows: those that are open are to be told */
        struct addr src;
        struct endpoint dst;
        struct pod *source, *target; /* NULL: not here (any more) */
        /* Of what may be gone; uids of workloads. "": not known. */
        char *src_uid, *dst_uid, *src_identity, *dst_identity, *src_name, *src_namespace;
        char *service;                            /* outside: what is said of it */
        uint64_t src_record, dst_record, dry_run; /* dry_run: a hash, which one its open flows were told of; 0: none */
        uint64_t closed_ms, used_ms, until_s;
        struct event_set *set[2];
        uint64_t opened_before, told_opened, told_closed, told_sent, told_received;
        uint64_t logged; /* of told_closed and what is about to be: those that have a line of their own */
        uint64_t logged_sent, logged_received; /* outside: what the lines so far have told */
        uint32_t live[2];                      /* ends: that opened, the other */
};

/* What a pod gave us. */
struct member {
        struct member *next;
        struct pod *pod;
        int verdicts, fates;
        uint32_t instance; /* of its programs: maps.h, struct capture_door_of */
};

struct sight {
        struct pod *pod;
        struct vouch_flow flow;
};

/* The ring `ended`: the kernel's side is mapped for reading only. */
struct ring {
        int fd;
        _Atomic uint64_t *consumer;
        const uint8_t *producer; /* a page with the position, then the records, twice */
};

struct sights {
        struct sight *at;
        size_t n, room;
};

struct vouch {
        struct tunnel *engine;
        atomic_bool on;
        atomic_uint count;
        pthread_mutex_t look; /* one look at the sockets at a time; taken before lock */
        pthread_mutex_t lock;
        pthread_cond_t end;
        pthread_t thread;
        bool started, stop;
        int slots_fd, program;
        uint32_t slots_id;
        struct vouch_slot *slots;
        struct ring ended;
        struct member *members;
        struct allowance *buckets[BUCKETS];
        struct allowance *by_slot[VOUCH_MAX_SLOTS];
        unsigned outside;
        uint32_t hand; /* where the search for a free slot goes on */
        uint64_t since_ms;
        bool strays; /* slots of an engine before this one may be in nobody's hands */
};

static uint64_t clock_ms(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* -- maps -----------------------------------------------------------------------------------------------------------
 */

static long bpf(int command, union bpf_attr *attr)
{
        return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static struct capture_tuple verdict_key(const struct allowance *a)
{
        struct capture_tuple key = {.remote_port = a->dst.port};
        memcpy(key.local, a->src.ip, 16);
        memcpy(key.remote, a->dst.addr.ip, 16);
        return key;
}

static bool verdict_write(int map, const struct allowance *a, uint64_t until_ns)
{
        struct capture_tuple key = verdict_key(a);
        struct vouch_verdict value = {.slot = a->slot, .generation = a->generation, .until = until_ns};
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.map_fd = (uint32_t)map;
        attr.key = (uintptr_t)&key;
        attr.value = (uintptr_t)&value;
        return bpf(BPF_MAP_UPDATE_ELEM, &attr) == 0;
}

static void verdict_erase(int map, const struct capture_tuple *key)
{
        union bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.map_fd = (uint32_t)map;
        attr.key = (uintptr_t)key;
        bpf(BPF_MAP_DELETE_ELEM, &attr);
}

static void verdicts_clear(int map)
{
        for (unsigned i = 0; i <= VOUCH_MAX_VERDICTS; i++) {
                struct capture_tuple key;
                union bpf_attr attr;
                memset(&attr, 0, sizeof(attr));
                attr.map_fd = (uint32_t)map;
                attr.next_key = (uintptr_t)&key;
                if (bpf(BPF_MAP_GET_NEXT_KEY, &attr) < 0)
                        return;
                verdict_erase(map, &key);
        }
}

static uint32_t map_id(int map)
{
        struct bpf_map_info info;
        union bpf_attr attr;
        memset(&info, 0, sizeof(info));
        memset(&attr, 0, sizeof(attr));
        attr.info.bpf_fd = (uint32_t)map;
        attr.info.info_len = sizeof(info);
        attr.info.info = (uintptr_t)&info;
        return bpf(BPF_OBJ_GET_INFO_BY_FD, &attr) == 0 ? info.id : 0;
}

/* The flows of one pod, added to what is there. false: they could not be seen. */
static bool look_at(const struct vouch *v, struct pod *pod, int fates, struct sights *s)
{
        union bpf_iter_link_info info;
        union bpf_attr attr;
        memset(&info, 0, sizeof(info));
        memset(&attr, 0, sizeof(attr));
        info.map.map_fd = (uint32_t)fates;
        attr.link_create.prog_fd = (uint32_t)v->program;
        attr.link_create.attach_type = BPF_TRACE_ITER;
        attr.link_create.iter_info = (uintptr_t)&info;
        attr.link_create.iter_info_len = sizeof(info);
        int link = (int)bpf(BPF_LINK_CREATE, &attr);
        if (link < 0)
                return false;
        memset(&attr, 0, sizeof(attr));
        attr.iter_create.link_fd = (uint32_t)link;
        int iterator = (int)bpf(BPF_ITER_CREATE, &attr);
        bool done = false;
        struct vouch_flow some[64];
        size_t have = 0;
        while (iterator >= 0) {
                ssize_t n = read(iterator, (char *)some + have, sizeof(some) - have);
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        continue;
                done = n == 0;
                if (n <= 0)
                        break;
                have += (size_t)n;
                size_t whole = have / sizeof(*some);
                if (s->n + whole > s->room) {
                        size_t room = 2 * s->room + 64;
                        struct sight *more = realloc(s->at, room * sizeof(*more));
                        if (!more)
                                break;
                        s->at = more;
                        s->room = room;
                }
                for (size_t i = 0; i < whole; i++)
                        s->at[s->n++] = (struct sight){.pod = pod, .flow = some[i]};
                have -= whole * sizeof(*some);
                memmove(some, some + whole, have);
        }
        if (iterator >= 0)
                close(iterator);
        close(link);
        return done;
}

/* -- sockets --------------------------------------------------------------------------------------------------------
 */

/* Where sockets of one pod are ended, of one after another. */
struct ender {
        struct pod *pod;
        int fd;
};

static void ender_close(struct ender *e)
{
        if (e->pod && e->fd >= 0)
                close(e->fd);
        e->pod = NULL;
}

/* Asks the kernel about the pod's socket with these ends. type: SOCK_DESTROY, or SOCK_DIAG_BY_FAMILY, whose answer is
 * its state. cookie NULL: any. >= 0, -ENOENT: there is none; -errno. */
static int ask(struct ender *e, struct pod *p, uint16_t type, const struct endpoint *local,
               const struct endpoint *remote, const uint64_t *cookie)
{
        struct {
                struct nlmsghdr header;
                struct inet_diag_req_v2 request;
        } ask;
        struct {
                struct nlmsghdr header;
                union {
                        struct nlmsgerr error;
                        struct inet_diag_msg found;
                        char more[512];
                };
        } answer;
        memset(&ask, 0, sizeof(ask));
        bool four = addr_is_v4(&local->addr);
        int result = 0;
        if (e->pod != p) {
                struct timeval limit = {.tv_sec = 1};
                ender_close(e);
                e->fd = pod_socket(p, AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG);
                e->pod = p;
                setsockopt(e->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
        }
        if (e->fd < 0)
                return e->fd;
        ask.header.nlmsg_len = sizeof(ask);
        ask.header.nlmsg_type = type;
        ask.header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | (type == SOCK_DESTROY ? NLM_F_ACK : 0));
        ask.request.sdiag_family = four ? AF_INET : AF_INET6;
        ask.request.sdiag_protocol = IPPROTO_TCP;
        ask.request.idiag_states = ~0u;
        ask.request.id.idiag_sport = htons(local->port);
        ask.request.id.idiag_dport = htons(remote->port);
        memcpy(ask.request.id.idiag_src, local->addr.ip + (four ? 12 : 0), four ? 4 : 16);
        memcpy(ask.request.id.idiag_dst, remote->addr.ip + (four ? 12 : 0), four ? 4 : 16);
        ask.request.id.idiag_cookie[0] = cookie ? (uint32_t)*cookie : INET_DIAG_NOCOOKIE;
        ask.request.id.idiag_cookie[1] = cookie ? (uint32_t)(*cookie >> 32) : INET_DIAG_NOCOOKIE;
        if (send(e->fd, &ask, sizeof(ask), 0) < 0 || recv(e->fd, &answer, sizeof(answer), 0) < 0)
                result = -errno;
        else if (answer.header.nlmsg_type == NLMSG_ERROR)
                result = answer.error.error;
        else
                result = answer.found.idiag_state;
        if (result == -EAGAIN) /* its answer would be the next one's */
                ender_close(e);
        return result == -ESTALE ? -ENOENT : result;
}

/* Ends a socket of the pod's with a reset. 0, -ENOENT: it is gone; -errno. */
static int destroy(struct ender *e, struct pod *p, const struct vouch_flow *flow)
{
        struct endpoint local = {.port = flow->local_port}, remote = {.port = flow->remote_port};
        uint64_t cookie = flow->cookie;
        memcpy(local.addr.ip, flow->local, 16);
        memcpy(remote.addr.ip, flow->remote, 16);
        return ask(e, p, SOCK_DESTROY, &local, &remote, &cookie);
}

/* -- the table; all with the lock held ------------------------------------------------------------------------------
 */

static struct allowance **bucket(struct vouch *v, const struct addr *src, const struct endpoint *dst)
{
        uint32_t h = 2166136261u ^ dst->port;
        for (int i = 0; i < 16; i++)
                h = ((h ^ src->ip[i]) * 16777619u ^ dst->addr.ip[i]) * 16777619u;
        return &v->buckets[h % BUCKETS];
}

/* The newest of the pair. */
static struct allowance *find(struct vouch *v, const struct addr *src, const struct endpoint *dst)
{
        struct allowance *a = *bucket(v, src, dst);
        while (a && (a->dst.port != dst->port || !addr_equal(&a->src, src) || !addr_equal(&a->dst.addr, &dst->addr)))
                a = a->next;
        return a;
}

static struct member *member_of(struct vouch *v, const struct pod *p)
{
        struct member *m = v->members;
        while (m && m->pod != p)
                m = m->next;
        return m;
}

static uint32_t generation_of(struct vouch *v, uint32_t slot)
{
        return __atomic_load_n(&v->slots[slot].generation, __ATOMIC_ACQUIRE);
}

static void generation_next(struct vouch *v, uint32_t slot)
{
        uint32_t next = generation_of(v, slot) + 1;
        __atomic_store_n(&v->slots[slot].generation, next ? next : 1, __ATOMIC_SEQ_CST);
}

static void shut(struct vouch *v, struct allowance *a)
{
        struct member *m = a->source ? member_of(v, a->source) : NULL;
        struct capture_tuple key = verdict_key(a);
        if (!a->open)
                return;
        if (m)
                verdict_erase(m->verdicts, &key);
        a->open = false;
        a->closed_ms = clock_ms();
}

static void unbind_source(struct allowance *a)
{
        if (a->outside && a->source)
                a->source->outside--;
        pod_unref(a->source);
        a->source = NULL;
}

/* NULL: the slot, which the kernel's side may have named, is nobody's. With the lock held. */
static struct allowance *allowance_of(struct vouch *v, uint32_t slot)
{
        return slot < VOUCH_MAX_SLOTS ? v->by_slot[slot] : NULL;
}

/* slot: it may be given to another pair. */
static void allowance_free(struct vouch *v, struct allowance *a, bool slot)
{
        for (struct allowance **at = bucket(v, &a->src, &a->dst); *at; at = &(*at)->next)
                if (*at == a) {
                        __atomic_store_n(at, a->next, __ATOMIC_RELEASE);
                        break;
                }
        v->by_slot[a->slot] = NULL;
        if (slot)
                v->slots[a->slot].taken = VOUCH_FREE;
        unbind_source(a);
        if (a->outside)
                v->outside--;
        for (int i = 0; i < 2; i++)
                if (a->set[i]) {
                        /* what leaves the mesh with a flow open is not seen any more: for the counters it has ended */
                        event_add(a->set[i], 0, a->told_opened - a->told_closed, 0, 0, clock_ms());
                        event_drop(a->set[i]);
                }
        pod_unref(a->target);
        free(a->src_uid);
        free(a->dst_uid);
        free(a->src_identity);
        free(a->dst_identity);
        free(a->src_name);
        free(a->src_namespace);
        free(a->service);
        free(a);
        atomic_fetch_sub(&v->count, 1);
}

/* Of a slot that is no other allowance's; what it is for is said there. */
static struct allowance *allowance_new(struct vouch *v, uint32_t slot, const struct addr *src,
                                       const struct endpoint *dst)
{
        struct allowance *a = calloc(1, sizeof(*a)), **at = bucket(v, src, dst);
        if (!a)
                return NULL;
        a->slot = slot;
        a->src = *src;
        a->dst = *dst;
        a->used_ms = clock_ms();
        a->src_uid = strdup("");
        a->dst_uid = strdup("");
        a->src_identity = strdup("");
        a->dst_identity = strdup("");
        a->src_name = strdup("");
        a->src_namespace = strdup("");
        a->service = strdup("");
        if (!a->src_uid || !a->dst_uid || !a->src_identity || !a->dst_identity || !a->src_name || !a->src_namespace ||
            !a->service)
                abort(); /* one byte each */
        a->next = *at;
        __atomic_store_n(at, a, __ATOMIC_RELEASE); /* vouch_is_late() looks without the lock */
        v->by_slot[slot] = a;
        a->outside = v->slots[slot].taken == VOUCH_OUTSIDE;
        if (a->outside)
                v->outside++;
        atomic_fetch_add(&v->count, 1);
        return a;
}

static void text_set(char **at, const char *text)
{
        char *copy = strdup(text);
        if (!copy)
                return; /* "": judged as unknown */
        free(*at);
        *at = copy;
}

static void bind_source(struct allowance *a, struct pod *p)
{
        a->source = pod_ref(p);
        if (a->outside)
                p->outside++;
        text_set(&a->src_uid, p->workload);
        text_set(&a->src_identity, p->identity);
        text_set(&a->src_name, p->name);
        text_set(&a->src_namespace, p->namespace_);
}

static void bind_target(struct allowance *a, struct pod *p)
{
        a->target = pod_ref(p);
        text_set(&a->dst_uid, p->workload);
        text_set(&a->dst_identity, p->identity);
}

/* A slot that an engine before this one had, and no socket carries, is free again. */
static void strays_free(struct vouch *v, const struct sights *s)
{
        bool *seen = calloc(VOUCH_MAX_SLOTS, sizeof(*seen));
        if (!seen)
                return;
        for (size_t i = 0; i < s->n; i++)
                if (s->at[i].flow.slot < VOUCH_MAX_SLOTS)
                        seen[s->at[i].flow.slot] = true;
        v->strays = false;
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                if (v->by_slot[i] || !v->slots[i].taken)
                        continue;
                if (seen[i])
                        v->strays = true;
                else
                        v->slots[i].taken = VOUCH_FREE;
        }
        free(seen);
}

static bool slot_take(struct vouch *v, enum vouch_kind kind, uint32_t *slot)
{
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                uint32_t s = (v->hand + i) % VOUCH_MAX_SLOTS;
                if (v->by_slot[s] || v->slots[s].taken)
                        continue;
                v->hand = s + 1;
                *slot = s;
                generation_next(v, s);
                v->slots[s].taken = kind;
                return true;
        }
        return false;
}

/* Counters go on from here. */
static void told_all(struct vouch *v, struct allowance *a)
{
        const struct vouch_slot *s = &v->slots[a->slot];
        a->told_opened = a->told_closed = a->logged = __atomic_load_n(&s->opened, __ATOMIC_RELAXED);
        a->told_sent = a->logged_sent = __atomic_load_n(&s->sent, __ATOMIC_RELAXED);
        a->told_received = a->logged_received = __atomic_load_n(&s->received, __ATOMIC_RELAXED);
}

/* Until when an allowance may be in force, CLOCK_MONOTONIC in ns; certificates last until until_s. */
static uint64_t until_ns(int64_t until_s, uint64_t now_ms)
{
        int64_t left_s = until_s - (int64_t)time(NULL);
        left_s = left_s < 0 ? 0 : left_s > UNTIL_S ? UNTIL_S : left_s;
        return (now_ms + (uint64_t)left_s * 1000) * 1000000;
}

void vouch_allow(struct vouch *v, struct worker *w, const struct vouch_pair *pair)
{
        uint32_t slot;
        if (!atomic_load(&v->on) || !atomic_load(&v->engine->whole) || !atomic_load(&pair->source->vouched) ||
            !atomic_load(&pair->target->vouched) || pair->until_s <= (int64_t)time(NULL))
                return;
        pthread_mutex_lock(&v->lock);
        struct member *m = member_of(v, pair->source), *to = member_of(v, pair->target);
        if (!m || !to || atomic_load(&pair->source->mode) != TUNNEL_SERVING ||
            atomic_load(&pair->target->mode) != TUNNEL_SERVING || !atomic_load(&v->on))
                goto out;
        uint64_t now = clock_ms(), until = until_ns(pair->until_s, now);
        struct allowance *a = find(v, &pair->src, &pair->dst);
        if (a && a->open && a->source == pair->source && a->target == pair->target &&
            a->src_record == pair->src_workload->record && a->dst_record == pair->dst_workload->record) {
                a->used_ms = now;
                verdict_write(m->verdicts, a, until); /* of another worker, or one whose time was over */
                goto out;
        }
        if (a)
                shut(v, a);
        if (!slot_take(v, VOUCH_PAIR, &slot) || !(a = allowance_new(v, slot, &pair->src, &pair->dst))) {
                event_count(w->ev, EV_VOUCH_FULL, 1);
                goto out;
        }
        a->generation = generation_of(v, slot);
        a->src_record = pair->src_workload->record;
        a->dst_record = pair->dst_workload->record;
        v->slots[slot].target = to->instance;
        bind_source(a, pair->source);
        bind_target(a, pair->target);
        told_all(v, a);
        if (!verdict_write(m->verdicts, a, until)) {
                event_count(w->ev, EV_VOUCH_FULL, 1);
                allowance_free(v, a, true);
                goto out;
        }
        a->open = a->alone = true;
        for (int i = 0; i < 2; i++) {
                struct event_labels labels = {.reporter = i ? EVENT_DESTINATION : EVENT_SOURCE,
                                              .src = pair->src_workload,
                                              .dst = pair->dst_workload,
                                              .src_principal = a->src_identity,
                                              .dst_principal = a->dst_identity};
                a->set[i] = event_hold(w->ev, &labels, w->now_ms);
        }
        event_count(w->ev, EV_VOUCHED, 1);
out:
        pthread_mutex_unlock(&v->lock);
}

/* -- outside the mesh -----------------------------------------------------------------------------------------------
 */

bool vouch_leaves_mesh(const struct route *r, const struct endpoint *dst)
{
        /* A service that passes through has no workload; any other chose one, of which only the engine knows. */
        return r->kind == ROUTE_PLAIN && (!*r->service_host || !r->dst) && r->next_hop.port == dst->port &&
               addr_equal(&r->next_hop.addr, &dst->addr);
}

static uint64_t record_of(const struct route *r)
{
        return r->dst ? r->dst->record : 0;
}

#define SERVICE_TEXT 1024
static const char *service_of(const struct route *r, char *out)
{
        snprintf(out, SERVICE_TEXT, "%s %s %s", r->service_namespace, r->service_name, r->service_host);
        return out;
}

/* The label set that such a connection has when the engine carries it. */
static struct event_set *hold_outside(struct event_worker *ev, const struct workload *src, const struct route *r,
                                      uint64_t now)
{
        struct event_labels labels = {.reporter = EVENT_SOURCE,
                                      .src = src,
                                      .dst = r->dst,
                                      .dst_principal = r->dst ? r->dst->identity : NULL,
                                      .service_host = r->service_host,
                                      .service_name = r->service_name,
                                      .service_namespace = r->service_namespace};
        return event_hold(ev, &labels, now);
}

/* Of a pod that has as many as it may, or a node that has. */
static bool crowded(const struct vouch *v, const struct pod *p)
{
        return v->outside >= OUTSIDE_NODE || (p && p->outside >= OUTSIDE_POD);
}

void vouch_allow_outside(struct vouch *v, struct worker *w, const struct vouch_outside *what)
{
        uint32_t slot;
        char service[SERVICE_TEXT];
        if (!atomic_load(&v->on) || !atomic_load(&v->engine->whole) || !atomic_load(&what->source->vouched))
                return;
        pthread_mutex_lock(&v->lock);
        struct member *m = member_of(v, what->source);
        if (!m || atomic_load(&what->source->mode) != TUNNEL_SERVING || !atomic_load(&v->on))
                goto out;
        uint64_t now = clock_ms(), until = until_ns(what->until_s, now);
        struct allowance *a = find(v, &what->src, &what->dst);
        if (a && a->open && a->outside && a->source == what->source && a->src_record == what->src_workload->record &&
            a->dst_record == record_of(what->route)) {
                a->used_ms = now;
                verdict_write(m->verdicts, a, until);
                goto out;
        }
        if (a)
                shut(v, a);
        if (crowded(v, what->source) || !slot_take(v, VOUCH_OUTSIDE, &slot)) {
                event_count(w->ev, EV_OUTSIDE_FULL, 1);
                goto out;
        }
        if (!(a = allowance_new(v, slot, &what->src, &what->dst))) {
                v->slots[slot].taken = VOUCH_FREE;
                goto out;
        }
        a->generation = generation_of(v, slot);
        a->src_record = what->src_workload->record;
        a->dst_record = record_of(what->route);
        bind_source(a, what->source);
        text_set(&a->service, service_of(what->route, service));
        told_all(v, a);
        if (!verdict_write(m->verdicts, a, until)) {
                event_count(w->ev, EV_OUTSIDE_FULL, 1);
                allowance_free(v, a, true);
                goto out;
        }
        a->open = true;
        a->set[0] = hold_outside(w->ev, what->src_workload, what->route, w->now_ms);
        event_count(w->ev, EV_OUTSIDE, 1);
out:
        pthread_mutex_unlock(&v->lock);
}

/* Does it still leave the mesh, as it did? */
static bool still_outside(const struct mesh_view *view, const struct allowance *a)
{
        const struct workload *own = view_workload(view, a->src_uid);
        char service[SERVICE_TEXT];
        struct route r;
        if (!own || own->record != a->src_record)
                return false;
        view_route(view, own, &a->dst, 0, &r);
        return vouch_leaves_mesh(&r, &a->dst) && record_of(&r) == a->dst_record &&
               strcmp(service_of(&r, service), a->service) == 0;
}

/* The label set of what was taken over, once there are records. */
static void hold_set_outside(struct vouch *v, const struct mesh_view *view, struct allowance *a)
{
        static const struct route unknown = {.service_host = "", .service_name = "", .service_namespace = ""};
        const struct workload *src = view_workload(view, a->src_uid);
        struct route r;
        if (a->set[0] || !src || !atomic_load(&v->engine->whole))
                return;
        view_route(view, src, &a->dst, 0, &r);
        a->set[0] = hold_outside(event_worker(v->engine->event, v->engine->nworkers), src,
                                 vouch_leaves_mesh(&r, &a->dst) ? &r : &unknown, clock_ms());
}

/* A line for the flows that ended since the last one, with the bytes that went since then; as the engine writes it for
 * what it lets pass. Totals are given. */
static void tell_ended_outside(struct vouch *v, struct allowance *a, uint64_t closed, uint64_t open, uint64_t sent,
                               uint64_t received)
{
        char src[ENDPOINT_STRLEN], dst[ENDPOINT_STRLEN];
        event_log(v->engine->event, NULL, "info",
                  "connections complete=%llu open=%llu src.addr=%s src.workload=\"%s\" src.namespace=\"%s\" "
                  "dst.addr=%s direction=native bytes_sent=%llu bytes_recv=%llu",
                  (unsigned long long)(closed - a->logged), (unsigned long long)open, addr_format(&a->src, src),
                  a->src_name, a->src_namespace, endpoint_format(&a->dst, dst),
                  (unsigned long long)(sent - a->logged_sent), (unsigned long long)(received - a->logged_received));
        a->logged = closed;
        a->logged_sent = sent;
        a->logged_received = received;
}

/* Does this socket of the pod's carry a flow to another pod? As its programs know it. */
static bool is_flow(struct vouch *v, struct pod *source, const struct endpoint *src, const struct endpoint *dst)
{
        struct sights s = {0};
        bool found = false;
        pthread_mutex_lock(&v->look);
        pthread_mutex_lock(&v->lock);
        struct member *m = member_of(v, source);
        int fates = m ? fcntl(m->fates, F_DUPFD_CLOEXEC, 3) : -1;
        pthread_mutex_unlock(&v->lock);
        if (fates >= 0) {
                look_at(v, source, fates, &s);
                close(fates);
        }
        for (size_t i = 0; i < s.n; i++) {
                const struct vouch_flow *f = &s.at[i].flow;
                found |= f->opened && f->local_port == src->port && f->remote_port == dst->port &&
                         memcmp(f->local, src->addr.ip, 16) == 0 && memcmp(f->remote, dst->addr.ip, 16) == 0 &&
                         f->slot < VOUCH_MAX_SLOTS && v->slots[f->slot].taken == VOUCH_PAIR;
        }
        pthread_mutex_unlock(&v->look);
        free(s.at);
        return found;
}

bool vouch_is_late(struct vouch *v, const struct endpoint *src, const struct endpoint *dst)
{
        struct ender e = {0};
        struct pod *source = NULL;
        if (!atomic_load(&v->count) || !__atomic_load_n(bucket(v, &src->addr, dst), __ATOMIC_ACQUIRE))
                return false; /* nearly all of them: workers do not meet at the lock */
        pthread_mutex_lock(&v->lock);
        struct allowance *a = find(v, &src->addr, dst);
        if (a && !a->outside && a->alone && a->source && atomic_load(&a->source->mode) == TUNNEL_SERVING &&
            (a->open || clock_ms() - a->closed_ms < LATE_MS))
                source = pod_ref(a->source);
        pthread_mutex_unlock(&v->lock);
        if (!source)
                return false;
        /* The host may have made one for another address one for this: then the source has no socket of these ends, at
         * best a listener. And one that has may have opened it before the pair was allowed, or since its pod drains. */
        int state = ask(&e, source, SOCK_DIAG_BY_FAMILY, src, dst, NULL);
        bool late = state != -ENOENT && state != TCP_LISTEN && is_flow(v, source, src, dst);
        ender_close(&e);
        pod_unref(source);
        return late;
}

/* -- looking --------------------------------------------------------------------------------------------------------
 */

/* All flows of all pods, in three steps: what was opened; the sockets, without the lock; the ends of each allowance.
 * With `look` held. Returns false, and nothing is known, when one pod could not be looked at. The caller frees s->at
 * and drops the pods with forget(). */
static bool look(struct vouch *v, struct sights *s, struct member **seen)
{
        bool all = true;
        *seen = NULL;
        *s = (struct sights){0};
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && atomic_load(&v->count); i++) {
                struct allowance *a = v->by_slot[i];
                if (!a)
                        continue;
                a->opened_before = __atomic_load_n(&v->slots[i].opened, __ATOMIC_ACQUIRE);
                a->counted = true;
                a->live[0] = a->live[1] = 0;
        }
        for (struct member *m = v->members; m; m = m->next) {
                struct member *copy = calloc(1, sizeof(*copy));
                if (!copy)
                        abort();
                *copy = (struct member){.next = *seen,
                                        .pod = pod_ref(m->pod),
                                        .verdicts = -1,
                                        .fates = fcntl(m->fates, F_DUPFD_CLOEXEC, 3)};
                *seen = copy;
        }
        pthread_mutex_unlock(&v->lock);
        for (struct member *m = *seen; m; m = m->next)
                all &= m->fates >= 0 && look_at(v, m->pod, m->fates, s);
        pthread_mutex_lock(&v->lock);
        for (size_t i = 0; i < s->n; i++) {
                struct allowance *a = allowance_of(v, s->at[i].flow.slot);
                if (a)
                        a->live[s->at[i].flow.opened ? 0 : 1]++;
        }
        pthread_mutex_unlock(&v->lock);
        return all;
}

static void forget(struct sights *s, struct member *seen)
{
        while (seen) {
                struct member *next = seen->next;
                pod_unref(seen->pod);
                if (seen->fates >= 0)
                        close(seen->fates);
                free(seen);
                seen = next;
        }
        free(s->at);
}

static void tell_ended(struct vouch *v, struct event_worker *ev, const struct vouch_ended *e)
{
        struct allowance *a = allowance_of(v, e->slot);
        char src[ENDPOINT_STRLEN], dst[ENDPOINT_STRLEN];
        if (!a || a->generation != e->generation)
                return;
        struct endpoint from = {.addr = a->src, .port = e->port};
        event_log(v->engine->event, ev, "info",
                  "connection complete src.addr=%s src.workload=\"%s\" src.namespace=\"%s\" dst.addr=%s "
                  "direction=native bytes_sent=%llu bytes_recv=%llu duration=\"%llums\" src.identity=\"%s\" "
                  "dst.identity=\"%s\"%s",
                  endpoint_format(&from, src), a->src_name, a->src_namespace, endpoint_format(&a->dst, dst),
                  (unsigned long long)e->sent, (unsigned long long)e->received,
                  (unsigned long long)((e->when - e->since) / 1000000), a->src_identity, a->dst_identity,
                  e->reset ? " error=\"connection reset\"" : "");
        a->logged++;
}

/* Lines for the flows that the programs have told of, as long as the log has room. True: no more are there. With the
 * lock held. */
static bool drain(struct vouch *v, unsigned *n)
{
        if (!v->ended.consumer)
                return true;
        struct event_worker *ev = event_worker(v->engine->event, v->engine->nworkers);
        uint64_t at = atomic_load_explicit(v->ended.consumer, memory_order_relaxed);
        uint64_t end = __atomic_load_n((const uint64_t *)v->ended.producer, __ATOMIC_ACQUIRE);
        bool all = true;
        while (at < end) {
                const uint8_t *record = v->ended.producer + PAGE + at % VOUCH_ENDED_BYTES;
                uint32_t len = __atomic_load_n((const uint32_t *)record, __ATOMIC_ACQUIRE);
                if (len & BPF_RINGBUF_BUSY_BIT || !event_log_room(v->engine->event, ev)) {
                        all = false;
                        break;
                }
                bool there = !(len & BPF_RINGBUF_DISCARD_BIT);
                len &= ~(uint32_t)BPF_RINGBUF_DISCARD_BIT;
                struct vouch_ended e;
                if (there && len == sizeof(e)) {
                        memcpy(&e, record + BPF_RINGBUF_HDR_SZ, sizeof(e));
                        tell_ended(v, ev, &e);
                        (*n)++;
                }
                at += (BPF_RINGBUF_HDR_SZ + len + 7) / 8 * 8;
                atomic_store_explicit(v->ended.consumer, at, memory_order_release);
        }
        return all;
}

/* What has grown goes to the counters; a line for those that ended and had none. With the lock held. */
static void fold(struct vouch *v, struct allowance *a, bool drained)
{
        const struct vouch_slot *s = &v->slots[a->slot];
        uint64_t now = clock_ms(), live = a->live[a->source ? 0 : 1], opened = a->opened_before;
        uint64_t closed = opened > live ? opened - live : 0;
        uint64_t sent = __atomic_load_n(&s->sent, __ATOMIC_RELAXED),
                 received = __atomic_load_n(&s->received, __ATOMIC_RELAXED);
        if (!a->set[0] || !a->counted || (a->outside && !a->source)) /* then its sockets were not looked at */
                return;
        closed = closed > a->told_closed ? closed : a->told_closed;
        uint64_t ended = closed - a->told_closed;
        if (opened != a->told_opened || ended || sent != a->told_sent || received != a->told_received)
                a->used_ms = now;
        for (int i = 0; i < 2 && a->set[i]; i++)
                event_add(a->set[i], opened - a->told_opened, ended, sent - a->told_sent, received - a->told_received,
                          now);
        if (ended && a->outside)
                tell_ended_outside(v, a, closed, live, sent, received);
        if (drained && closed > a->logged) {
                char src[ENDPOINT_STRLEN], dst[ENDPOINT_STRLEN];
                event_log(v->engine->event, NULL, "info",
                          "connections complete=%llu open=%llu src.addr=%s src.workload=\"%s\" src.namespace=\"%s\" "
                          "dst.addr=%s direction=native src.identity=\"%s\" dst.identity=\"%s\"",
                          (unsigned long long)(closed - a->logged), (unsigned long long)live, addr_format(&a->src, src),
                          a->src_name, a->src_namespace, endpoint_format(&a->dst, dst), a->src_identity,
                          a->dst_identity);
                a->logged = closed;
        }
        if (drained && !live)
                a->logged = closed; /* a flow may have told of its end twice, from both */
        a->told_opened = opened;
        a->told_closed = closed;
        a->told_sent = sent;
        a->told_received = received;
}

/* A look, and what follows from it. */
static void tick(struct vouch *v)
{
        struct sights s;
        struct member *seen;
        pthread_mutex_lock(&v->look);
        if (!v->slots || (!atomic_load(&v->count) && !v->strays)) {
                pthread_mutex_unlock(&v->look);
                return;
        }
        bool all = look(v, &s, &seen);
        struct ender e = {0};
        for (size_t i = 0; i < s.n; i++) /* what was cut and is still there */
                if (s.at[i].flow.slot < VOUCH_MAX_SLOTS &&
                    s.at[i].flow.generation != generation_of(v, s.at[i].flow.slot))
                        destroy(&e, s.at[i].pod, &s.at[i].flow);
        ender_close(&e);
        pthread_mutex_lock(&v->lock);
        unsigned n = 0;
        bool drained = drain(v, &n); /* whose socket was not there any more has told by now */
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && all; i++) {
                struct allowance *a = v->by_slot[i];
                if (!a || !a->counted)
                        continue;
                if (a->inherited && a->set[0]) { /* those that are open were opened for this engine's counters too */
                        uint64_t live = a->live[a->source ? 0 : 1];
                        a->told_opened = a->told_closed = a->logged =
                                a->opened_before > live ? a->opened_before - live : 0;
                        a->inherited = false;
                }
                fold(v, a, drained);
                uint64_t now = clock_ms(); /* not before what was noted of it */
                uint64_t idle_ms = a->outside && crowded(v, a->source) ? CROWDED_MS : IDLE_MS;
                if (a->open && !a->live[0] && !a->live[1] && now - a->used_ms > idle_ms)
                        shut(v, a);
                if (!a->open && !a->live[0] && !a->live[1] && now - a->closed_ms > NOTE_MS) {
                        generation_next(v, i);
                        allowance_free(v, a, true);
                }
        }
        if (all && v->strays && clock_ms() - v->since_ms > STRAY_MS)
                strays_free(v, &s);
        pthread_mutex_unlock(&v->lock);
        forget(&s, seen);
        pthread_mutex_unlock(&v->look);
}

void vouch_each(struct vouch *v, void (*each)(void *arg, const struct vouch_seen *flow), void *arg)
{
        struct sights s;
        struct member *seen;
        if (!atomic_load(&v->count))
                return;
        pthread_mutex_lock(&v->look);
        look(v, &s, &seen);
        uint64_t now = clock_ms();
        pthread_mutex_lock(&v->lock);
        for (size_t i = 0; i < s.n; i++) {
                const struct vouch_flow *f = &s.at[i].flow;
                struct allowance *a = allowance_of(v, f->slot);
                /* Of two ends the one that opened it; the other where that one has left the mesh. */
                if (!a || (!f->opened && a->source))
                        continue;
                struct vouch_seen one = {.pod = s.at[i].pod->name,
                                         .namespace_ = s.at[i].pod->namespace_,
                                         .identity_peer = f->opened ? a->dst_identity : a->src_identity,
                                         .inbound = !f->opened,
                                         .src = {.addr = a->src, .port = f->opened ? f->local_port : f->remote_port},
                                         .dst = a->dst,
                                         .sent = f->bytes,
                                         .received = f->received,
                                         .age_ms = now - f->since / 1000000};
                for (size_t k = 0; k < s.n && f->opened; k++) {
                        const struct vouch_flow *o = &s.at[k].flow;
                        if (o->slot == f->slot && !o->opened && o->remote_port == f->local_port)
                                one.received = o->bytes;
                }
                each(arg, &one);
        }
        pthread_mutex_unlock(&v->lock);
        forget(&s, seen);
        pthread_mutex_unlock(&v->look);
}

static void *watch(void *arg)
{
        struct vouch *v = arg;
        uint64_t due = clock_ms() + TICK_MS;
        unsigned wait_ms = DRAIN_MS;
        pthread_mutex_lock(&v->lock);
        while (!v->stop) {
                struct timespec until;
                uint64_t at = clock_ms() + wait_ms;
                until.tv_sec = (time_t)(at / 1000);
                until.tv_nsec = (long)(at % 1000) * 1000000;
                pthread_cond_timedwait(&v->end, &v->lock, &until);
                if (v->stop)
                        break;
                unsigned n = 0;
                wait_ms = drain(v, &n) && n < 8 ? DRAIN_MS : BUSY_MS;
                if (clock_ms() < due)
                        continue;
                due = clock_ms() + TICK_MS;
                pthread_mutex_unlock(&v->lock);
                tick(v);
                pthread_mutex_lock(&v->lock);
        }
        pthread_mutex_unlock(&v->lock);
        return NULL;
}

/* -- judging; control thread ----------------------------------------------------------------------------------------
 */

enum judgement { STAYS, SHUTS, CUTS };

static enum judgement judge(const struct vouch *v, const struct mesh_view *view, const struct allowance *a,
                            struct rbac_verdict *verdict)
{
        const struct workload *own = view_workload(view, a->src_uid);
        struct workload gone = {.namespace_ = a->target ? a->target->namespace_ : ""};
        struct rbac_request request = {.identity = *a->src_identity ? a->src_identity : NULL,
                                       .source = {.addr = a->src, .port = 1},
                                       .destination = a->dst};
        struct route route;
        const struct workload *at = view_workload_at(view, &a->dst.addr), *dst = view_workload(view, a->dst_uid);
        memset(verdict, 0, sizeof(*verdict));
        verdict->policy = "";
        verdict->reason = RBAC_NOT_ALLOWED;
        if (a->outside)
                return still_outside(view, a) ? STAYS : SHUTS;
        bool whole = atomic_load(&v->engine->whole);
        const struct workload *from = view_workload_at(view, &a->src);
        if (whole && ((at && strcmp(at->uid, a->dst_uid) != 0) || (from && strcmp(from->uid, a->src_uid) != 0)))
                return CUTS; /* the address is another's by now */
        rbac_decide(view, dst ? dst : &gone, &request, verdict);
        whole = whole && dst && a->target && !view_policy_missing(view, dst);
        if (!verdict->allow && (verdict->reason == RBAC_DENIED || (whole && verdict->reason != RBAC_NOT_RECEIVED)))
                return CUTS;
        if (!own || !at || !verdict->allow || verdict->dry_run || own->record != a->src_record ||
            at->record != a->dst_record)
                return SHUTS;
        view_route(view, own, &a->dst, 0, &route);
        bool expected = false;
        for (unsigned i = 0; i < route.nsans; i++)
                expected |= strcmp(route.sans[i], a->dst_identity) == 0;
        bool same = expected && route.kind == ROUTE_HBONE && !*route.service_host && route.dst == at &&
                    addr_equal(&route.target.addr, &a->dst.addr) && route.target.port == a->dst.port;
        return same ? STAYS : SHUTS;
}

/* One line and one denial for each flow that a policy ends. */
static void tell_cut(struct vouch *v, struct allowance *a, const struct vouch_flow *flow, const char *policy,
                     const char *reason)
{
        char src[ENDPOINT_STRLEN], dst[ENDPOINT_STRLEN];
        struct endpoint from = {.addr = a->src, .port = flow->local_port};
        struct denial what = {.namespace_ = a->target ? a->target->namespace_ : "",
                              .pod = a->target ? a->target->name : "",
                              .pod_uid = a->target ? a->target->uid : "",
                              .src = from,
                              .dst = a->dst,
                              .identity = a->src_identity,
                              .policy = policy,
                              .reason = reason,
                              .workload = view_workload(mesh_newest(v->engine->mesh), a->dst_uid)};
        denials_add(v->engine->denials, v->engine->nworkers, &what);
        event_log(v->engine->event, NULL, "error",
                  "connection complete src.addr=%s src.workload=\"%s\" src.namespace=\"%s\" dst.addr=%s "
                  "direction=native bytes_sent=%llu duration=\"%llums\" src.identity=\"%s\" dst.identity=\"%s\" "
                  "policy=\"%s\" error=\"connection closed due to policy change\"",
                  endpoint_format(&from, src), a->src_name, a->src_namespace, endpoint_format(&a->dst, dst),
                  (unsigned long long)flow->bytes, (unsigned long long)(clock_ms() - flow->since / 1000000),
                  a->src_identity, a->dst_identity, policy);
        a->logged++;
}

/* Who the ends of what was taken over are that are no pods of ours: whom the whole state has at their addresses. */
static void resolve(struct vouch *v, const struct mesh_view *view, struct allowance *a)
{
        const struct workload *w;
        if (!atomic_load(&v->engine->whole))
                return;
        if (!*a->src_uid && (w = view_workload_at(view, &a->src))) {
                text_set(&a->src_uid, w->uid);
                text_set(&a->src_identity, w->identity);
                text_set(&a->src_name, w->name);
                text_set(&a->src_namespace, w->namespace_);
        }
        if (!a->outside && !*a->dst_uid && (w = view_workload_at(view, &a->dst.addr))) {
                text_set(&a->dst_uid, w->uid);
                text_set(&a->dst_identity, w->identity);
        }
}

/* Label sets of what was taken over, once there are records. */
static void hold_sets(struct vouch *v, const struct mesh_view *view, struct allowance *a)
{
        const struct workload *src = view_workload(view, a->src_uid), *dst = view_workload(view, a->dst_uid);
        if (a->outside) {
                hold_set_outside(v, view, a);
                return;
        }
        if (a->set[0] || !src || !dst)
                return;
        for (int i = 0; i < 2; i++) {
                struct event_labels labels = {.reporter = i ? EVENT_DESTINATION : EVENT_SOURCE,
                                              .src = src,
                                              .dst = dst,
                                              .src_principal = a->src_identity,
                                              .dst_principal = a->dst_identity};
                a->set[i] = event_hold(event_worker(v->engine->event, v->engine->nworkers), &labels, clock_ms());
        }
}

/* Destroys the ends of flows that were cut: those that opened them, or the others. */
static void end_all(const struct sights *s, const bool *gone, bool opened)
{
        struct ender e = {0};
        for (size_t i = 0; i < s->n; i++)
                if (s->at[i].flow.slot < VOUCH_MAX_SLOTS && gone[s->at[i].flow.slot] &&
                    (s->at[i].flow.opened != 0) == opened)
                        destroy(&e, s->at[i].pod, &s->at[i].flow);
        ender_close(&e);
}

/* Makes every flow of the slot worthless. With the lock held. */
static bool cut(struct vouch *v, struct allowance *a)
{
        if (a->generation != generation_of(v, a->slot))
                return false;
        __atomic_store_n(&v->slots[a->slot].cut, clock_ms() * 1000000, __ATOMIC_SEQ_CST);
        generation_next(v, a->slot);
        return true;
}

/* Ends the flows of slots that were cut. view: policy did it, and is told of each. */
static void finish(struct vouch *v, const bool *gone, const struct mesh_view *view)
{
        struct sights s;
        struct member *seen;
        bool left = false;
        pthread_mutex_lock(&v->look);
        look(v, &s, &seen);
        pthread_mutex_lock(&v->lock);
        for (size_t i = 0; i < s.n; i++) {
                const struct vouch_flow *f = &s.at[i].flow;
                struct allowance *a = allowance_of(v, f->slot);
                struct rbac_verdict verdict;
                char reason[320];
                if (!a || !gone[f->slot])
                        continue;
                left |= !f->opened;
                if (!f->opened || !view)
                        continue;
                judge(v, view, a, &verdict);
                tell_cut(v, a, f, verdict.policy, rbac_text(&verdict, reason, sizeof(reason)));
        }
        pthread_mutex_unlock(&v->lock);
        end_all(&s, gone, false);
        /* They hear ECONNABORTED; the others, by the reset that comes from there, ECONNRESET, which is what clients
         * know. An accepted socket that has not sent a packet is not seen: its client then is destroyed, and the reset
         * goes the other way. */
        for (int i = 0; i < RESET_ROUNDS && left; i++) {
                usleep(RESET_US);
                forget(&s, seen);
                look(v, &s, &seen);
                left = false;
                for (size_t k = 0; k < s.n; k++)
                        left |= s.at[k].flow.slot < VOUCH_MAX_SLOTS && gone[s.at[k].flow.slot];
        }
        end_all(&s, gone, true);
        forget(&s, seen);
        pthread_mutex_unlock(&v->look);
}

/* Whether a dry run would deny the pair that the flows of its slot were not told of. With the lock held. */
static bool dry_ran(struct allowance *a, const struct rbac_verdict *verdict)
{
        return denial_is_news(&a->dry_run, verdict->allow ? verdict->dry_run : NULL);
}

/* One line and one more of the counter for each open flow that a dry run would deny, as for those that the engine
 * carries. */
static void tell_dry_run(struct vouch *v, const struct mesh_view *view, const bool *dry)
{
        struct sights s;
        struct member *seen;
        pthread_mutex_lock(&v->look);
        look(v, &s, &seen);
        pthread_mutex_lock(&v->lock);
        for (size_t i = 0; i < s.n; i++) {
                const struct vouch_flow *f = &s.at[i].flow;
                struct allowance *a = allowance_of(v, f->slot);
                const struct workload *dst = a ? view_workload(view, a->dst_uid) : NULL;
                struct rbac_verdict verdict;
                if (!dst || !dry[f->slot] || !f->opened)
                        continue;
                judge(v, view, a, &verdict);
                if (!verdict.dry_run)
                        continue;
                struct endpoint from = {.addr = a->src, .port = f->local_port};
                denials_dry_run(v->engine->denials, v->engine->nworkers, verdict.dry_run, dst);
                event_dry_run(v->engine->event, NULL, &from, a->src_identity, &a->dst, dst, verdict.dry_run);
        }
        pthread_mutex_unlock(&v->lock);
        forget(&s, seen);
        pthread_mutex_unlock(&v->look);
}

void vouch_review(struct vouch *v)
{
        const struct mesh_view *view = mesh_newest(v->engine->mesh);
        bool some = false, told = false, *gone, *dry;
        if (!atomic_load(&v->count))
                return;
        if (!(gone = calloc(2 * VOUCH_MAX_SLOTS, sizeof(*gone))))
                abort(); /* what is denied must end */
        dry = gone + VOUCH_MAX_SLOTS;
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                struct allowance *a = v->by_slot[i];
                struct rbac_verdict verdict;
                if (!a)
                        continue;
                resolve(v, view, a);
                /* Taken over, and its source is not known yet. */
                if (!*a->src_uid && clock_ms() - a->closed_ms < STRAY_MS)
                        continue;
                hold_sets(v, view, a);
                enum judgement now = judge(v, view, a, &verdict);
                if (now != STAYS)
                        shut(v, a);
                if (now == CUTS && cut(v, a))
                        gone[i] = some = true;
                if (dry_ran(a, &verdict))
                        dry[i] = told = true;
        }
        pthread_mutex_unlock(&v->lock);
        if (some)
                finish(v, gone, view);
        if (told)
                tell_dry_run(v, view, dry);
        free(gone);
}

void vouch_pod_cut(struct vouch *v, struct pod *p)
{
        bool some = false, *gone;
        if (!atomic_load(&v->count))
                return;
        if (!(gone = calloc(VOUCH_MAX_SLOTS, sizeof(*gone))))
                abort();
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                struct allowance *a = v->by_slot[i];
                if (!a || (a->source != p && a->target != p))
                        continue;
                shut(v, a);
                if (cut(v, a))
                        gone[i] = some = true;
        }
        pthread_mutex_unlock(&v->lock);
        if (some)
                finish(v, gone, NULL);
        free(gone);
}

/* -- pods -----------------------------------------------------------------------------------------------------------
 */

void vouch_enable(struct vouch *v, bool on)
{
        atomic_store(&v->on, on);
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && !on && atomic_load(&v->count); i++)
                if (v->by_slot[i])
                        shut(v, v->by_slot[i]);
        pthread_mutex_unlock(&v->lock);
}

static void ring_drop(struct ring *r)
{
        if (r->consumer)
                munmap((void *)r->consumer, PAGE);
        if (r->producer)
                munmap((void *)(uintptr_t)r->producer, PAGE + 2 * (size_t)VOUCH_ENDED_BYTES);
        if (r->fd >= 0)
                close(r->fd);
        *r = (struct ring){.fd = -1};
}

/* Takes over fd. */
static int ring_map(struct ring *r, int fd)
{
        *r = (struct ring){.fd = fd};
        if (fd < 0)
                return -errno;
        void *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED)
                return -errno;
        r->consumer = at;
        at = mmap(NULL, PAGE + 2 * (size_t)VOUCH_ENDED_BYTES, PROT_READ, MAP_SHARED, fd, (off_t)PAGE);
        if (at == MAP_FAILED)
                return -errno;
        r->producer = at;
        return 0;
}

static void node_drop(struct vouch *v)
{
        if (!v->slots)
                return;
        munmap(v->slots, VOUCH_MAX_SLOTS * sizeof(struct vouch_slot));
        close(v->slots_fd);
        close(v->program);
        ring_drop(&v->ended);
        v->slots = NULL;
}

/* The node's maps, when they are others than before: the last pod was gone meanwhile. */
static int node_take(struct vouch *v, int slots, int program, int ended)
{
        uint32_t id = map_id(slots);
        struct ring ring = {.fd = -1};
        if (v->slots && id == v->slots_id)
                return 0;
        int fds[2] = {fcntl(slots, F_DUPFD_CLOEXEC, 3), fcntl(program, F_DUPFD_CLOEXEC, 3)};
        int error = ring_map(&ring, fcntl(ended, F_DUPFD_CLOEXEC, 3));
        void *at = MAP_FAILED;
        if (fds[0] >= 0 && fds[1] >= 0 && error == 0) {
                at = mmap(NULL, VOUCH_MAX_SLOTS * sizeof(struct vouch_slot), PROT_READ | PROT_WRITE, MAP_SHARED, fds[0],
                          0);
                error = -errno;
        }
        if (at == MAP_FAILED) {
                ring_drop(&ring);
                for (int i = 0; i < 2; i++)
                        if (fds[i] >= 0)
                                close(fds[i]);
                return error < 0 ? error : -EMFILE;
        }
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++)
                if (v->by_slot[i]) {
                        shut(v, v->by_slot[i]);
                        allowance_free(v, v->by_slot[i], false);
                }
        node_drop(v);
        v->slots = at;
        v->slots_fd = fds[0];
        v->program = fds[1];
        v->ended = ring;
        v->slots_id = id;
        v->since_ms = clock_ms();
        v->strays = true;
        return 0;
}

/* Has one of these sockets opened a flow of the slot? */
static bool opens(const struct sights *s, uint32_t slot)
{
        for (size_t i = 0; i < s->n; i++)
                if (s->at[i].flow.slot == slot && s->at[i].flow.opened)
                        return true;
        return false;
}

/* Flows of a pod that an engine before this one had allowed. With the lock held. */
static void take_over(struct vouch *v, struct pod *p, const struct sights *s)
{
        for (size_t i = 0; i < s->n; i++) {
                const struct vouch_flow *f = &s->at[i].flow;
                if (f->slot >= VOUCH_MAX_SLOTS || f->generation != generation_of(v, f->slot))
                        continue;
                struct allowance *a = v->by_slot[f->slot];
                struct addr src;
                struct endpoint dst = {.port = f->opened ? f->remote_port : f->local_port};
                memcpy(src.ip, f->opened ? f->local : f->remote, 16);
                memcpy(dst.addr.ip, f->opened ? f->remote : f->local, 16);
                if (!a) {
                        if (!(a = allowance_new(v, f->slot, &src, &dst)))
                                continue;
                        a->generation = f->generation;
                        a->closed_ms = clock_ms();
                        a->inherited = true;
                        told_all(v, a);
                }
        }
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                struct allowance *a = v->by_slot[i];
                if (!a)
                        continue;
                /* One that left the mesh with the flow open and is back has an end of it that nobody sees. */
                if (!a->source && pod_has(p, &a->src) && (!*a->src_uid || strcmp(a->src_uid, p->workload) == 0) &&
                    opens(s, i))
                        bind_source(a, p);
                if (!a->outside && !a->target && pod_has(p, &a->dst.addr) &&
                    (!*a->dst_uid || strcmp(a->dst_uid, p->workload) == 0))
                        bind_target(a, p);
        }
        for (struct member *m = v->members; m; m = m->next)
                for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++) {
                        struct allowance *a = v->by_slot[i];
                        if (a && !a->outside && !a->target && pod_has(m->pod, &a->dst.addr) &&
                            (!*a->dst_uid || strcmp(a->dst_uid, m->pod->workload) == 0))
                                bind_target(a, m->pod);
                }
}

int vouch_pod(struct vouch *v, struct pod *p, const int *fds)
{
        vouch_pod_gone(v, p);
        struct sights s = {0};
        struct member *m = calloc(1, sizeof(*m));
        if (!m)
                return -ENOMEM;
        *m = (struct member){.pod = pod_ref(p),
                             .verdicts = fcntl(fds[0], F_DUPFD_CLOEXEC, 3),
                             .fates = fcntl(fds[1], F_DUPFD_CLOEXEC, 3),
                             .instance = map_id(fds[1])};
        pthread_mutex_lock(&v->look);
        pthread_mutex_lock(&v->lock);
        int result = m->verdicts < 0 || m->fates < 0 ? -EMFILE : node_take(v, fds[2], fds[3], fds[4]);
        if (result == 0 && !v->started) {
                result = -pthread_create(&v->thread, NULL, watch, v);
                v->started = result == 0;
                if (v->started)
                        pthread_setname_np(v->thread, "vouch");
        }
        if (result == 0) {
                m->next = v->members;
                v->members = m;
                atomic_store(&p->vouched, true);
                verdicts_clear(m->verdicts); /* an engine's before this one: decided anew */
                if (!look_at(v, p, m->fates, &s))
                        event_log(v->engine->event, NULL, "error",
                                  "pod=\"%s/%s\" error=\"vouched flows cannot be seen\"", p->namespace_, p->name);
                take_over(v, p, &s);
        } else {
                pod_unref(m->pod);
                if (m->verdicts >= 0)
                        close(m->verdicts);
                if (m->fates >= 0)
                        close(m->fates);
                free(m);
        }
        pthread_mutex_unlock(&v->lock);
        pthread_mutex_unlock(&v->look);
        if (s.n)
                vouch_review(v); /* policy may have changed while there was no engine */
        free(s.at);
        return result;
}

void vouch_pod_draining(struct vouch *v, struct pod *p)
{
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && atomic_load(&v->count); i++) {
                struct allowance *a = v->by_slot[i];
                if (!a || (a->source != p && a->target != p))
                        continue;
                shut(v, a);
                /* Its source may send in clear text from now on, also when it is on its way back into the mesh. */
                a->alone = false;
        }
        pthread_mutex_unlock(&v->lock);
}

void vouch_pod_gone(struct vouch *v, struct pod *p)
{
        vouch_pod_draining(v, p);
        tick(v); /* while its ends can be seen */
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && atomic_load(&v->count); i++) {
                struct allowance *a = v->by_slot[i];
                if (a && a->source == p)
                        unbind_source(a);
                if (a && a->target == p) {
                        pod_unref(p);
                        a->target = NULL;
                }
        }
        for (struct member **at = &v->members; *at; at = &(*at)->next)
                if ((*at)->pod == p) {
                        struct member *m = *at;
                        *at = m->next;
                        atomic_store(&p->vouched, false);
                        close(m->verdicts);
                        close(m->fates);
                        free(m);
                        pod_unref(p);
                        break;
                }
        pthread_mutex_unlock(&v->lock);
}

void vouch_idle(struct vouch *v)
{
        pthread_mutex_lock(&v->look);
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && !v->members; i++)
                if (v->by_slot[i])
                        allowance_free(v, v->by_slot[i], false);
        if (!v->members)
                node_drop(v);
        pthread_mutex_unlock(&v->lock);
        pthread_mutex_unlock(&v->look);
}

void vouch_identity_gone(struct vouch *v, const char *uri)
{
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS && atomic_load(&v->count); i++) {
                struct allowance *a = v->by_slot[i];
                if (a && (strcmp(a->src_identity, uri) == 0 || strcmp(a->dst_identity, uri) == 0))
                        shut(v, a);
        }
        pthread_mutex_unlock(&v->lock);
}

void vouch_count(struct vouch *v)
{
        if (!atomic_load(&v->count))
                return;
        pthread_mutex_lock(&v->lock);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++)
                if (v->by_slot[i])
                        hold_sets(v, mesh_newest(v->engine->mesh), v->by_slot[i]);
        pthread_mutex_unlock(&v->lock);
        tick(v);
}

struct vouch *vouch_new(struct tunnel *t)
{
        struct vouch *v = calloc(1, sizeof(*v));
        pthread_condattr_t monotonic;
        if (!v)
                return NULL;
        v->engine = t;
        v->slots_fd = v->program = v->ended.fd = -1;
        pthread_condattr_init(&monotonic);
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
        pthread_mutex_init(&v->look, NULL);
        pthread_mutex_init(&v->lock, NULL);
        pthread_cond_init(&v->end, &monotonic);
        pthread_condattr_destroy(&monotonic);
        return v;
}

void vouch_free(struct vouch *v)
{
        if (!v)
                return;
        pthread_mutex_lock(&v->lock);
        v->stop = true;
        pthread_cond_signal(&v->end);
        pthread_mutex_unlock(&v->lock);
        if (v->started)
                pthread_join(v->thread, NULL);
        while (v->members)
                vouch_pod_gone(v, v->members->pod);
        for (uint32_t i = 0; i < VOUCH_MAX_SLOTS; i++)
                if (v->by_slot[i])
                        allowance_free(v, v->by_slot[i], false);
        node_drop(v);
        pthread_mutex_destroy(&v->look);
        pthread_mutex_destroy(&v->lock);
        pthread_cond_destroy(&v->end);
        free(v);
}
