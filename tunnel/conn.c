/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * A flow has two sides; a opened it. Outbound, a is the application's socket and b a socket to the destination, to
 * another pod of this node, or a stream of a tunnel. Inbound, a is the client's socket or a stream, and b the socket
 * towards the application.
 *
 *   accepted -> HELD (its pod's state is not complete: 5 s; a policy that the destination's record names has not come:
 *            1 s, 5 s before its first complete state) | UNKNOWN (no record of the destination: 1 s)
 *            -> decided -> CONNECTING | WAITING for a tunnel -> ASKED (CONNECT sent) -> RELAY -> DEAD
 *
 * Nothing is read from an application before there is somewhere to put it. Each direction ends by itself: an end that
 * was read is passed on when everything before it is; the flow ends when both have. Any error ends both sides at once,
 * with RST and RST_STREAM: what arrived is then a prefix of what was sent, and looks like one. flow_reset is the only
 * way to end early, flow_finish the only way to end in order.
 *
 * Policy decides where a connection enters its destination: inbound flows, and those between two pods of this node.
 * Each that was let in is on the list of the destination's seat, with the seat's epoch. When what decides there
 * changes, the epoch does, and conn_review judges the list anew from its front, some each turn, by the record that the
 * destination has now; what is denied now is reset. New ones join at the end with the new epoch. While a record is gone
 * only a policy that denies explicitly ends what is open; while a policy that it names has not come, nothing does.
 *
 * flow_run moves bytes until both sides block or a turn's share is used up; events only set flags. Between two sockets
 * the bytes pass through the worker's scratch buffer and are stored only when the receiver does not take them.
 */
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "conn.h"
#include "denial.h"
#include "hbone.h"
#include "intern.h"
#include "pod.h"
#include "rbac.h"
#include "vouch.h"

#define TURN_BYTES (1 << 20)
#define STREAM_QUEUE (8 * FRAME_PAYLOAD) /* read ahead of a stream that cannot be written: whole frames */
#define FRONT 16                         /* before a queue's first byte: room for a frame's header */
#define ACCEPT_BATCH 64
#define OWE_MS 2             /* how long an answer waits for the application's first bytes */
#define OWE_BYTES (16 << 10) /* and after how many of the client's it does not */
#define REVIEW_TURN 1024     /* decisions in one turn of the loop, about a millisecond */
#define REVIEW_CUT 16        /* decisions that a reset, or a line in the log, costs as much as */
#define LEAVE_TURN 256       /* sockets closed in one turn, of those whose RST has left: 5 us each */
#define LEAVE_MS 500         /* after which a busy worker closes them too */

_Static_assert(STREAM_QUEUE <= LOOP_SCRATCH, "load() reads a whole queue into the scratch buffer");

/* -- making and ending -------------------------------------------------------------------------------------------- */

static struct flow *flow_new(struct worker *w, struct pod *p, enum flow_way way)
{
        struct flow *f = block_zero(sizeof(*f));
        struct seat *seat = seat_of_workload(w, p->workload);
        if (!f || !seat) {
                block_free(f);
                return NULL;
        }
        f->w = w;
        f->pod = pod_ref(p);
        f->way = way;
        f->a.io = f->b.io = (struct io){.type = IO_SIDE, .fd = -1};
        f->a.left = f->b.left = -1;
        f->b.is_b = true;
        struct link *links[] = {&f->seat, &f->ready,  &f->wait, &f->member,
                                &f->dead, &f->judged, &f->owed, &f->timer.link};
        for (unsigned i = 0; i < sizeof(links) / sizeof(*links); i++)
                link_init(links[i]);
        f->opened_ms = f->last_ms = w->now_ms;
        link_add(&seat->flows, &f->seat);
        atomic_fetch_add(&p->connections, 1);
        if (way != WAY_OUTBOUND)
                atomic_store(&p->last_ms, w->now_ms);
        return f;
}

static struct flow *flow_of_side(struct side *s)
{
        return s->is_b ? container(s, struct flow, b) : container(s, struct flow, a);
}

/* Books what a side's queue holds. */
static void account(struct flow *f, struct side *s)
{
        if (s->out.cap == s->counted)
                return;
        int64_t more = (int64_t)s->out.cap - (int64_t)s->counted;
        atomic_fetch_add_explicit(&f->pod->buffered, (uint64_t)more, memory_order_relaxed);
        atomic_fetch_add_explicit(&f->w->engine->buffered, (uint64_t)more, memory_order_relaxed);
        event_count(f->w->ev, EV_BUFFERED_BYTES, more);
        s->counted = s->out.cap;
}

static void side_leave(struct flow *f, struct side *s)
{
        if (s->left < 0)
                return;
        close(s->left);
        s->left = -1;
        atomic_fetch_sub(&f->w->engine->fds, 1);
}

/* cut: the RST leaves now, for dissolving the connection is a third of what close() costs; the rest waits for
 * conn_free_dead(). */
static void side_close(struct flow *f, struct side *s, bool cut)
{
        static const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
        buf_free(&s->out);
        account(f, s);
        if (s->kind == SIDE_SOCKET && s->io.fd >= 0) {
                s->left = s->io.fd;
                s->io.fd = -1;
                if (!cut || connect(s->left, &nobody, sizeof(nobody)) < 0)
                        side_leave(f, s);
        }
        s->kind = SIDE_NONE;
}

static const char *level_of(enum event_flag flag)
{
        return flag == FLAG_NONE ? "info" : "error";
}

/* The access log's fields of reference/ztunnel.md 8.2. */
static void log_end(struct flow *f, enum event_flag flag, const char *why)
{
        struct worker *w = f->w;
        char src[ENDPOINT_STRLEN], dst[ENDPOINT_STRLEN], extra[1800] = "";
        bool out = f->way == WAY_OUTBOUND;
        size_t at = 0;
        const struct endpoint *to = out && f->hop.port ? &f->hop : &f->dst;
        if (!event_log_room(w->engine->event, w->ev))
                return;
#define FIELD(...)                                                                                                     \
        do {                                                                                                           \
                if (at < sizeof(extra))                                                                                \
                        at += (size_t)snprintf(extra + at, sizeof(extra) - at, __VA_ARGS__);                           \
        } while (0)
        if (f->by_hbone && f->authority)
                FIELD(" dst.hbone_addr=%.100s", f->authority);
        if (f->service_host && *f->service_host)
                FIELD(" dst.service=\"%.255s\"", f->service_host);
        if (out ? (f->by_hbone || f->local) : f->peer != NULL)
                FIELD(" src.identity=\"%.255s\"", out ? f->pod->identity : f->peer);
        if (out ? f->peer != NULL : f->by_hbone)
                FIELD(" dst.identity=\"%.255s\"", out ? f->peer : f->pod->identity);
        if (f->policy && *f->policy)
                FIELD(" policy=\"%.255s\"", f->policy);
        if (flag != FLAG_NONE)
                FIELD(" error=\"%.400s\"", why);
#undef FIELD
        event_log(w->engine->event, w->ev, f->set[0] || f->set[1] ? level_of(flag) : "warn",
                  "connection %s src.addr=%s %s.workload=\"%s\" %s.namespace=\"%s\" dst.addr=%s direction=%s "
                  "bytes_sent=%llu bytes_recv=%llu duration=\"%llums\"%s",
                  f->set[0] || f->set[1] ? "complete" : "failed", endpoint_format(&f->src, src), out ? "src" : "dst",
                  f->pod->name, out ? "src" : "dst", f->pod->namespace_, endpoint_format(to, dst),
                  out ? "outbound" : "inbound", (unsigned long long)(out ? f->sent : f->received),
                  (unsigned long long)(out ? f->received : f->sent), (unsigned long long)(w->now_ms - f->opened_ms),
                  extra);
}

void flow_count(struct flow *f)
{
        for (int i = 0; i < 2; i++)
                if (f->set[i])
                        event_bytes(f->set[i], f->sent - f->told_sent, f->received - f->told_received);
        f->told_sent = f->sent;
        f->told_received = f->received;
}

static void flow_end(struct flow *f, enum event_flag flag, const char *why)
{
        struct worker *w = f->w;
        if (f->state == FLOW_DEAD)
                return;
        if (f->state == FLOW_HELD)
                atomic_fetch_sub(&f->pod->held, 1);
        struct side *stream = flow_stream_side(f);
        if (!link_alone(&f->member)) {
                if (stream->kind == SIDE_STREAM)
                        tun_reset_stream(stream, f->state == FLOW_RELAY || f->state == FLOW_ASKED
                                                         ? NGHTTP2_CONNECT_ERROR
                                                         : NGHTTP2_CANCEL);
                else /* waits for a tunnel */
                        pool_give_up(f);
        }
        log_end(f, flag, why);
        f->state = FLOW_DEAD;
        timer_stop(&f->timer);
        flow_count(f);
        for (int i = 0; i < 2; i++)
                if (f->set[i]) {
                        event_close(w->ev, f->set[i], flag, w->now_ms);
                        f->set[i] = NULL;
                }
        if (f->way != WAY_INBOUND_HBONE)
                event_sockets(w->ev, f->way == WAY_OUTBOUND ? EVENT_SOURCE : EVENT_DESTINATION, -1);
        struct pod *in = f->target ? f->target : f->pod;
        if (f->tuple_src)
                pod_tuple_remove(f->pod, &f->src, false);
        if (f->tuple_own)
                pod_tuple_remove(in, &f->own, true);
        side_close(f, &f->a, flag != FLAG_NONE);
        side_close(f, &f->b, flag != FLAG_NONE);
        struct link *links[] = {&f->seat, &f->ready, &f->wait, &f->member, &f->judged, &f->owed};
        for (unsigned i = 0; i < sizeof(links) / sizeof(*links); i++)
                link_remove(links[i]);
        atomic_fetch_sub(&f->pod->connections, 1);
        if (f->target)
                atomic_fetch_sub(&f->target->connections, 1);
        f->last_ms = w->now_ms;
        link_add(f->a.left >= 0 || f->b.left >= 0 ? &w->left_flows : &w->dead_flows, &f->dead);
}

void flow_reset(struct flow *f, enum event_flag flag, const char *why)
{
        flow_end(f, flag == FLAG_NONE ? FLAG_CONNECT : flag, why);
}

/* Both directions ended in order: what is still in the sockets is delivered. */
static void flow_finish(struct flow *f)
{
        struct linger off = {0};
        if (f->a.kind == SIDE_SOCKET)
                setsockopt(f->a.io.fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off));
        if (f->b.kind == SIDE_SOCKET)
                setsockopt(f->b.io.fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off));
        struct side *stream = flow_stream_side(f);
        if (stream->kind == SIDE_STREAM) {
                /* the stream closes by itself once its END_STREAM is written: it only forgets us */
                tun_forget(stream);
        }
        flow_end(f, FLAG_NONE, "");
}

static void flow_free(struct flow *f)
{
        link_remove(&f->dead);
        side_leave(f, &f->a);
        side_leave(f, &f->b);
        pod_unref(f->pod);
        pod_unref(f->target);
        char *texts[] = {f->authority, f->service_host, f->service_name, f->service_namespace, f->method, f->peer};
        for (unsigned i = 0; i < sizeof(texts) / sizeof(*texts); i++)
                block_free(texts[i]);
        block_free(f);
}

bool conn_free_dead(struct worker *w, bool idle)
{
        while (!link_alone(&w->dead_flows))
                flow_free(container(w->dead_flows.next, struct flow, dead));
        for (unsigned n = 0; !link_alone(&w->left_flows); n++) {
                struct flow *f = container(w->left_flows.next, struct flow, dead);
                if (n == LEAVE_TURN)
                        return true;
                if (w->now_ms - f->last_ms < (idle ? LEAVE_IDLE_MS : LEAVE_MS))
                        break;
                flow_free(f);
        }
        return false;
}

void flow_ready(struct flow *f)
{
        if (f->state != FLOW_DEAD && link_alone(&f->ready))
                link_add(&f->w->ready, &f->ready);
}

static void refuse(struct flow *f, enum event_flag flag, const char *reason, const char *why)
{
        event_refused(f->w->ev, reason);
        flow_reset(f, flag, why);
}

/* -- who and where ------------------------------------------------------------------------------------------------ */

/* Everything that decides about the pod's connections is there. Before the first state is whole, a policy of the
 * namespace or of the mesh, which no record names, may be on its way. */
static const struct workload *complete(struct worker *w, struct pod *p, struct identity **i)
{
        const struct workload *own = view_workload(w->view, p->workload);
        *i = worker_identity(w, p->identity);
        return atomic_load(&w->engine->whole) && own && *i && (*i)->not_after_s > (int64_t)time(NULL) ? own : NULL;
}

void flow_baggage(struct flow *f, char *out, size_t n)
{
        const struct workload *own = view_workload(f->w->view, f->pod->workload);
        const char *type = own && own->workload_type && *own->workload_type ? own->workload_type : "pod";
        size_t at = 0;
        out[0] = 0;
#define ITEM(key, value)                                                                                               \
        do {                                                                                                           \
                if (own && (value) && *(value) && at < n)                                                              \
                        at += (size_t)snprintf(out + at, n - at, "%s%s=%.100s", at ? "," : "", key, value);            \
        } while (0)
        char name[64];
        snprintf(name, sizeof(name), "k8s.%.20s.name", type);
        ITEM("k8s.cluster.name", own->cluster_id);
        ITEM("k8s.namespace.name", own->namespace_);
        ITEM(name, own->workload_name);
        ITEM("service.name", own->canonical_name);
        ITEM("service.version", own->canonical_revision);
        ITEM("cloud.region", own->region);
        ITEM("cloud.availability_zone", own->zone);
#undef ITEM
        if (at >= n)
                out[n - 1] = 0;
}

static void count_open(struct flow *f, enum event_reporter reporter, const struct workload *src,
                       const struct workload *dst, const char *src_id, const char *dst_id, bool tls)
{
        struct event_labels l = {.reporter = reporter,
                                 .src = src,
                                 .dst = dst,
                                 .src_principal = src_id,
                                 .dst_principal = dst_id,
                                 .service_host = f->service_host,
                                 .service_name = f->service_name,
                                 .service_namespace = f->service_namespace,
                                 .mutual_tls = tls};
        int at = f->set[0] ? 1 : 0;
        f->set[at] = event_open(f->w->ev, &l, f->w->now_ms);
}

static char *copy(const char *text)
{
        return text && *text ? block_text(text) : NULL;
}

#define PORT_TRIES 16

/* A plaintext connection to the application from the client's address; its port is ours to choose (pod.h). */
static int connect_plain(struct flow *f, struct pod *in, const struct endpoint *to)
{
        int fd = -EADDRNOTAVAIL;
        for (int i = 0; i < PORT_TRIES && (fd == -EADDRNOTAVAIL || fd == -EADDRINUSE); i++) {
                struct endpoint source = {.addr = f->src.addr};
                source.port = pod_tuple_port(in, &source.addr, loop_random(f->w));
                if (source.port == 0)
                        return -EADDRNOTAVAIL;
                fd = pod_connect(in, &source, to, AIM_APPLICATION);
                if (fd < 0) {
                        pod_tuple_remove(in, &source, true);
                } else {
                        f->own = source;
                        f->tuple_own = true;
                }
        }
        return fd;
}

/* b is on its way to the application: from the client's address. */
static int connect_application(struct flow *f, struct pod *in, const struct endpoint *to, bool plain)
{
        struct endpoint source = {.addr = f->src.addr};
        int fd = plain ? connect_plain(f, in, to)
                       : pod_connect(in, addr_equal(&source.addr, &to->addr) ? NULL : &source, to, AIM_APPLICATION);
        if (fd < 0)
                return fd;
        f->b.io.fd = fd;
        f->b.kind = SIDE_SOCKET;
        atomic_fetch_add(&f->w->engine->fds, 1);
        if (!plain) {
                struct sockaddr_storage ss;
                socklen_t n = sizeof(ss);
                if (getsockname(fd, (struct sockaddr *)&ss, &n) == 0 && addr_from_sockaddr(&f->own, &ss) == 0) {
                        pod_tuple_add(in, &f->own, true);
                        f->tuple_own = true;
                }
        }
        f->state = FLOW_CONNECTING;
        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_10S);
        return loop_watch(f->w, &f->b.io);
}

static void decide(struct flow *f);

/* The next connections of this pod to a destination outside the mesh need no engine. What would want to have a say (a
 * waypoint on the destination or its service, an unknown address of the cluster) is no plain route. */
static void vouch_for_outside(struct flow *f, const struct workload *own, const struct route *r)
{
        const struct identity *mine = worker_identity(f->w, f->pod->identity);
        if (!mine || !vouch_leaves_mesh(r, &f->dst) || !pod_has(f->pod, &f->src.addr))
                return;
        struct vouch_outside what = {.source = f->pod,
                                     .src = f->src.addr,
                                     .dst = f->dst,
                                     .src_workload = own,
                                     .route = r,
                                     .until_s = mine->not_after_s};
        vouch_allow_outside(f->w->engine->vouch, f->w, &what);
}

static void go_plain(struct flow *f, const struct workload *own, const struct route *r)
{
        count_open(f, EVENT_SOURCE, own, r->dst, NULL, r->dst ? r->dst->identity : NULL, false);
        int fd = pod_connect(f->pod, NULL, &r->next_hop, AIM_OUTSIDE);
        if (fd < 0) {
                flow_reset(f, FLAG_CONNECT, strerror(-fd));
                return;
        }
        f->b.io.fd = fd;
        f->b.kind = SIDE_SOCKET;
        atomic_fetch_add(&f->w->engine->fds, 1);
        f->state = FLOW_CONNECTING;
        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_10S);
        if (loop_watch(f->w, &f->b.io) < 0)
                flow_reset(f, FLAG_CONNECT, "epoll");
        vouch_for_outside(f, own, r);
}

/* -- may it ------------------------------------------------------------------------------------------------------- */

/* Who asks to come in; NULL: nobody knows. */
static const char *caller(const struct flow *f)
{
        return f->way == WAY_OUTBOUND ? f->pod->identity : f->by_hbone ? f->peer : NULL;
}

static void judge(const struct flow *f, const struct workload *dst, struct rbac_verdict *out)
{
        struct rbac_request request = {.identity = caller(f), .source = f->src, .destination = f->app};
        rbac_decide(f->w->view, dst, &request, out);
}

/* Refused, or cut, at this pod. The texts are gone when this returns. */
static void denied(struct flow *f, const struct pod *at, const struct workload *dst, const struct rbac_verdict *v,
                   bool cut)
{
        char reason[320], why[400];
        struct denial what = {.namespace_ = at->namespace_,
                              .pod = at->name,
                              .pod_uid = at->uid,
                              .src = f->src,
                              .dst = f->app,
                              .identity = caller(f),
                              .policy = v->policy,
                              .reason = rbac_text(v, reason, sizeof(reason)),
                              .workload = dst};
        denials_add(f->w->engine->denials, f->w->index, &what);
        if (cut)
                snprintf(why, sizeof(why), "connection closed due to policy change");
        else
                snprintf(why, sizeof(why), "connection closed due to policy rejection: %s", reason);
        f->policy = v->policy;
        if (f->way == WAY_INBOUND_HBONE && f->state != FLOW_RELAY)
                flow_deny(f, 401, FLAG_DENY, why);
        else
                flow_reset(f, FLAG_DENY, why);
        f->policy = NULL;
}

/* A dry run (NULL: none) would have denied it. Counted and logged when that is news: once for a connection, not for
 * each change that has it judged anew. Returns whether it is. */
static bool dry_ran(struct flow *f, const struct workload *dst, const char *policy)
{
        struct worker *w = f->w;
        if (!denial_is_news(&f->dry_run, policy))
                return false;
        denials_dry_run(w->engine->denials, w->index, policy, dst);
        if (event_log_room(w->engine->event, w->ev))
                event_dry_run(w->engine->event, w->ev, &f->src, caller(f), &f->app, dst, policy);
        return true;
}

/* It was let in: it stays on the seat's list as long as it lives. */
static void let_in(struct flow *f, struct seat *seat, const struct workload *dst, const struct rbac_verdict *v)
{
        dry_ran(f, dst, v->dry_run);
        if (f->state == FLOW_DEAD)
                return;
        f->epoch = seat->epoch;
        link_add(&seat->judged, &f->judged);
}

/* Connections of one pod to one port differ in nothing that policy looks at: judged once a turn. */
#define MEMO 64
struct memo {
        const struct flow *like; /* of this turn: also a dead one keeps its memory until the end of it */
        struct rbac_verdict verdict;
};

static bool alike(const struct flow *a, const struct flow *b)
{
        const char *x = caller(a), *y = caller(b);
        return addr_equal(&a->src.addr, &b->src.addr) && a->app.port == b->app.port &&
               addr_equal(&a->app.addr, &b->app.addr) && (x && y ? strcmp(x, y) == 0 : x == y);
}

static void judge_once(const struct flow *f, const struct workload *dst, struct memo *memo, struct rbac_verdict *out)
{
        uint32_t low;
        memcpy(&low, f->src.addr.ip + 12, sizeof(low));
        struct memo *m = &memo[((low ^ f->app.port) * 2654435761u >> 16) % MEMO];
        if (!m->like || !alike(m->like, f)) {
                judge(f, dst, &m->verdict);
                m->like = f;
        }
        *out = m->verdict;
}

/* Returns what it cost, in decisions. */
static unsigned judge_anew(struct flow *f, struct seat *seat, struct memo *memo)
{
        struct rbac_verdict v;
        struct workload gone = {.namespace_ = seat->pod->namespace_};
        const struct workload *dst = view_workload(f->w->view, seat->pod->workload);
        judge_once(f, dst ? dst : &gone, memo, &v);
        if (v.allow || v.reason == RBAC_NOT_RECEIVED || (!dst && v.reason != RBAC_DENIED)) {
                f->epoch = seat->epoch;
                link_add(&seat->judged, &f->judged);
                return dst && v.allow && dry_ran(f, dst, v.dry_run) ? REVIEW_CUT : 1;
        }
        denied(f, seat->pod, dst, &v, true);
        return REVIEW_CUT;
}

void conn_review(struct worker *w)
{
        unsigned left = REVIEW_TURN;
        while (!link_alone(&w->stale)) {
                struct seat *seat = container(w->stale.next, struct seat, stale);
                struct memo memo[MEMO] = {0};
                while (!link_alone(&seat->judged)) {
                        struct flow *f = container(seat->judged.next, struct flow, judged);
                        if (f->epoch == seat->epoch)
                                break;
                        if (left == 0)
                                return;
                        unsigned cost = judge_anew(f, seat, memo);
                        left = left > cost ? left - cost : 0;
                }
                link_remove(&seat->stale);
        }
}

/* Waits for state, in the list of those that do; what it waits for next may only shorten the wait. */
static void hold(struct flow *f, enum flow_state state, enum timer_length patience)
{
        if (link_alone(&f->wait)) {
                link_add(&f->w->held, &f->wait);
                timer_set(f->w, &f->timer, TIMER_FLOW, patience);
        } else {
                timer_shorten(f->w, &f->timer, TIMER_FLOW, patience);
        }
        if (f->state == FLOW_HELD)
                atomic_fetch_sub(&f->pod->held, 1);
        if (state == FLOW_HELD)
                atomic_fetch_add(&f->pod->held, 1);
        f->state = state;
}

static void release(struct flow *f)
{
        if (link_alone(&f->wait))
                return;
        if (f->state == FLOW_HELD)
                atomic_fetch_sub(&f->pod->held, 1);
        f->state = FLOW_CONNECTING;
        link_remove(&f->wait);
        timer_stop(&f->timer);
}

/* For a policy that the record of this pod names: before its first complete state all of it may be on its way. */
static enum timer_length patience_at(const struct pod *p)
{
        return atomic_load(&p->complete) ? TIMER_1S : TIMER_5S;
}

static void note_complete(struct worker *w, struct pod *p)
{
        struct identity *i;
        const struct workload *own = atomic_load(&p->complete) ? NULL : complete(w, p, &i);
        if (own && !view_policy_missing(w->view, own))
                atomic_store(&p->complete, true);
}

/* The next connections of this pair need no engine. Only what was addressed to the pod itself: a Service's address is
 * translated after the source's programs have seen it. */
static void vouch_for(struct flow *f, const struct workload *own, const struct route *r)
{
        struct worker *w = f->w;
        const struct identity *mine = worker_identity(w, f->pod->identity),
                              *theirs = worker_identity(w, f->target->identity);
        if (*r->service_host || f->dst.port != r->target.port || !addr_equal(&f->dst.addr, &r->target.addr) ||
            !pod_has(f->pod, &f->src.addr) || f->dst.port == HBONE_PORT || pod_owns_port(f->target, f->dst.port) ||
            !mine || !theirs || !atomic_load(&f->target->complete))
                return;
        struct vouch_pair pair = {.source = f->pod,
                                  .target = f->target,
                                  .src = f->src.addr,
                                  .dst = f->dst,
                                  .src_workload = own,
                                  .dst_workload = r->dst,
                                  .until_s = mine->not_after_s < theirs->not_after_s ? mine->not_after_s
                                                                                     : theirs->not_after_s};
        vouch_allow(w->engine->vouch, w, &pair);
}

static void go_local(struct flow *f, struct seat *near, const struct workload *own, const struct route *r,
                     const struct rbac_verdict *verdict)
{
        struct pod *target = near->pod;
        f->local = true;
        f->target = pod_ref(target);
        atomic_fetch_add(&target->connections, 1);
        atomic_store(&target->last_ms, f->w->now_ms);
        f->peer = copy(target->identity);
        count_open(f, EVENT_SOURCE, own, r->dst, f->pod->identity, target->identity, false);
        count_open(f, EVENT_DESTINATION, own, r->dst, f->pod->identity, target->identity, false);
        event_count(f->w->ev, EV_SAME_NODE, 1);
        if (!verdict->allow) {
                denied(f, target, r->dst, verdict, false);
                return;
        }
        int result = connect_application(f, target, &r->target, false);
        if (result < 0)
                flow_reset(f, FLAG_CONNECT, strerror(-result));
        let_in(f, near, r->dst, verdict);
        if (!verdict->dry_run)
                vouch_for(f, own, r);
}

static void go_hbone(struct flow *f, const struct workload *own, const struct route *r, struct identity *i)
{
        char authority[ENDPOINT_STRLEN];
        f->by_hbone = true;
        f->authority = block_text(endpoint_format(&r->target, authority));
        f->hop = r->next_hop;
        count_open(f, EVENT_SOURCE, own, r->dst, f->pod->identity, r->dst->identity, true);
        if (!f->authority) {
                flow_reset(f, FLAG_CONNECT, "no memory");
                return;
        }
        f->state = FLOW_WAITING;
        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_20S);
        int result = pool_open(f, r, i);
        if (result < 0 && f->state != FLOW_DEAD)
                flow_reset(f, FLAG_CONNECT, strerror(-result));
}

static bool expects(const struct route *r, const char *identity)
{
        for (unsigned i = 0; i < r->nsans; i++)
                if (strcmp(r->sans[i], identity) == 0)
                        return true;
        return false;
}

/* The other pod of this node that it goes to. Only what is really that pod: its address, and an identity that the
 * record allows. The rest is for TLS to find out, and what goes from one family to the other for a tunnel: it has an
 * address of the pod's own in that family, where this way has only the client's. */
static struct seat *near_of(struct flow *f, const struct route *r)
{
        if (r->kind != ROUTE_HBONE || atomic_load(&f->w->engine->same_node_mtls) ||
            addr_is_v4(&r->target.addr) != addr_is_v4(&f->src.addr))
                return NULL;
        struct seat *seat = seat_of_workload(f->w, r->dst->uid);
        return seat && pod_has(seat->pod, &r->target.addr) && expects(r, seat->pod->identity) ? seat : NULL;
}

/* Outbound: everything about the pod is there; where does this go? */
static void route_outbound(struct flow *f, const struct workload *own, struct identity *i)
{
        struct route r;
        struct rbac_verdict verdict;
        view_route(f->w->view, own, &f->dst, loop_random(f->w), &r);
        if (r.kind == ROUTE_UNKNOWN) {
                hold(f, FLOW_UNKNOWN, TIMER_1S);
                return;
        }
        struct seat *near = near_of(f, &r);
        if (near) {
                f->app = r.target;
                judge(f, r.dst, &verdict);
                if (verdict.reason == RBAC_NOT_RECEIVED) {
                        hold(f, FLOW_HELD, patience_at(near->pod));
                        return;
                }
        }
        release(f);
        f->service_host = copy(r.service_host);
        f->service_name = copy(r.service_name);
        f->service_namespace = copy(r.service_namespace);
        f->hop = r.next_hop;
        if (near)
                go_local(f, near, own, &r, &verdict);
        else if (r.kind == ROUTE_PLAIN)
                go_plain(f, own, &r);
        else if (r.kind == ROUTE_HBONE)
                go_hbone(f, own, &r, i);
        else
                refuse(f, FLAG_CONNECT, "no_route", r.reason ? r.reason : "refused");
}

/* Inbound, plain or by HBONE: may it, and then to the application. */
static void admit(struct flow *f, const struct workload *own)
{
        struct worker *w = f->w;
        struct seat *seat = seat_of_workload(w, f->pod->workload);
        struct rbac_verdict verdict;
        struct route labels;
        f->app = f->dst;
        judge(f, own, &verdict);
        if (verdict.reason == RBAC_NOT_RECEIVED) {
                hold(f, FLOW_HELD, patience_at(f->pod));
                return;
        }
        release(f);
        const struct workload *src = view_workload_at(w->view, &f->src.addr);
        if (f->by_hbone && src && strcmp(src->identity, f->peer) != 0)
                src = NULL; /* the address says one thing, the certificate another: the certificate is right */
        view_inbound_service(w->view, own, f->dst.port, &labels);
        f->service_host = copy(labels.service_host);
        f->service_name = copy(labels.service_name);
        f->service_namespace = copy(labels.service_namespace);
        count_open(f, EVENT_DESTINATION, src, own, f->by_hbone ? f->peer : NULL,
                   f->by_hbone ? f->pod->identity : own->identity, f->by_hbone);
        if (!verdict.allow) {
                denied(f, f->pod, own, &verdict, false);
                return;
        }
        int result = seat ? connect_application(f, f->pod, &f->dst, !f->by_hbone) : -ENOENT;
        if (result < 0) {
                if (f->by_hbone)
                        flow_deny(f, 503, FLAG_CONNECT, strerror(-result));
                else
                        flow_reset(f, FLAG_CONNECT, strerror(-result));
        } else {
                let_in(f, seat, own, &verdict);
        }
}

/* A flow that can be decided is, else it is held. A pod's own policies are about those who come; before its first
 * complete state it speaks to nobody either. */
static void decide(struct flow *f)
{
        struct identity *i;
        const struct workload *own = complete(f->w, f->pod, &i);
        note_complete(f->w, f->pod);
        if (!own || (f->way == WAY_OUTBOUND && !atomic_load(&f->pod->complete)))
                hold(f, FLOW_HELD, TIMER_5S);
        else if (f->way == WAY_OUTBOUND)
                route_outbound(f, own, i);
        else
                admit(f, own);
}

/* Nobody has brought what it was held for. */
static void give_up(struct flow *f)
{
        struct worker *w = f->w;
        char why[600];
        struct identity *i;
        const struct workload *own = view_workload(w->view, f->pod->workload);
        struct rbac_verdict verdict;
        if (complete(w, f->pod, &i)) {
                const struct workload *dst = f->way == WAY_OUTBOUND ? view_workload_at(w->view, &f->app.addr) : own;
                struct seat *seat = dst ? seat_of_workload(w, dst->uid) : NULL;
                if (seat && f->app.port) {
                        judge(f, dst, &verdict);
                        if (!verdict.allow) {
                                event_refused(w->ev, "held_timeout");
                                denied(f, seat->pod, dst, &verdict, false);
                                return;
                        }
                }
                const char *missing = view_policy_missing(w->view, own);
                snprintf(why, sizeof(why), "policy not received yet: %.500s", missing ? missing : "none");
        } else if (!own) {
                snprintf(why, sizeof(why), "no record of %.200s within 5 s", f->pod->workload);
        } else if (!atomic_load(&w->engine->whole)) {
                snprintf(why, sizeof(why), "not all records and policies within 5 s");
        } else {
                snprintf(why, sizeof(why),
                         i ? "the certificate for %.300s has expired" : "no certificate for %.300s within 5 s",
                         f->pod->identity);
        }
        if (f->way == WAY_INBOUND_HBONE)
                flow_deny(f, 503, FLAG_IDENTITY_ERROR, why);
        else
                refuse(f, FLAG_IDENTITY_ERROR, "held_timeout", why);
}

void conn_seat(struct worker *w, struct seat *seat)
{
        uint64_t stamp = view_stamp(w->view, seat->pod->workload, seat->pod->namespace_);
        if (stamp != seat->stamp || !seat->epoch) {
                seat->stamp = stamp;
                seat->epoch++;
        }
        if (!link_alone(&seat->judged) && container(seat->judged.next, struct flow, judged)->epoch != seat->epoch &&
            link_alone(&seat->stale))
                link_add(&w->stale, &seat->stale);
        note_complete(w, seat->pod);
}

void conn_state_changed(struct worker *w)
{
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *l = w->seats[i].next; l != &w->seats[i]; l = l->next)
                        conn_seat(w, container(l, struct seat, link));
        /* each is looked at once: those that go on waiting stay where they are */
        for (struct link *l = w->held.next, *next; l != &w->held; l = next) {
                next = l->next;
                decide(container(l, struct flow, wait));
        }
        for (struct link *l = w->held_tuns.next, *next; l != &w->held_tuns; l = next) {
                next = l->next;
                tun_try_start(container(l, struct tun, held));
        }
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *l = w->pool[i].next, *next; l != &w->pool[i]; l = next) {
                        struct tun *t = container(l, struct tun, pool);
                        next = l->next;
                        pool_review(t);
                }
}

/* -- accepting ---------------------------------------------------------------------------------------------------- */

static void accepted(struct worker *w, struct listener *l, int fd, const struct endpoint *peer)
{
        struct pod *p = l->seat->pod;
        struct sockaddr_storage ss;
        struct endpoint local;
        socklen_t n = sizeof(ss);
        const char *wrong = NULL;
        if (getsockname(fd, (struct sockaddr *)&ss, &n) < 0 || addr_from_sockaddr(&local, &ss) < 0)
                wrong = "no_address";
        else if (atomic_load(&w->engine->fds) > atomic_load(&w->engine->fd_limit))
                wrong = "too_many_files";
        else if (addr_is_loopback(&local.addr) || (pod_has(p, &local.addr) && pod_owns_port(p, local.port)))
                wrong = "own_port";
        else if (l->role == ROLE_INBOUND && pod_tuple_is_own(p, peer))
                wrong = "own_tuple";
        else if (l->role == ROLE_INBOUND && vouch_is_late(w->engine->vouch, peer, &local))
                wrong = "late_vouched";
        if (wrong) {
                struct linger reset = {1, 0};
                event_refused(w->ev, wrong);
                setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
                close(fd);
                return;
        }
        if (l->role == ROLE_HBONE) {
                tun_accept(w, p, fd, peer, &local);
                return;
        }
        struct flow *f = flow_new(w, p, l->role == ROLE_OUTBOUND ? WAY_OUTBOUND : WAY_INBOUND_PLAIN);
        if (!f) {
                close(fd);
                return;
        }
        atomic_fetch_add(&w->engine->fds, 1);
        event_sockets(w->ev, f->way == WAY_OUTBOUND ? EVENT_SOURCE : EVENT_DESTINATION, 1);
        f->a.io.fd = fd;
        f->a.io.readable = f->a.io.writable = true; /* what came with the connection is read without an event */
        f->a.kind = SIDE_SOCKET;
        f->src = *peer;
        f->dst = local;
        if (f->way == WAY_INBOUND_PLAIN) {
                pod_tuple_add(p, peer, false);
                f->tuple_src = true;
        }
        if (loop_watch(w, &f->a.io) < 0)
                flow_reset(f, FLAG_CONNECT, "epoll");
        else
                decide(f);
}

void conn_accept(struct worker *w, struct listener *l)
{
        for (int i = 0; i < ACCEPT_BATCH && l->io.fd >= 0; i++) {
                struct sockaddr_storage ss;
                struct endpoint peer;
                socklen_t n = sizeof(ss);
                int fd = accept4(l->io.fd, (struct sockaddr *)&ss, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd < 0) {
                        if (errno == EMFILE || errno == ENFILE)
                                event_refused(w->ev, "too_many_files");
                        if (errno == ECONNABORTED || errno == EINTR)
                                continue;
                        return;
                }
                if (addr_from_sockaddr(&peer, &ss) < 0)
                        close(fd);
                else
                        accepted(w, l, fd, &peer);
        }
}

/* -- moving bytes ------------------------------------------------------------------------------------------------- */

/* Sends what waits for a socket. false: the flow is dead. */
static bool drain(struct flow *f, struct side *to, struct side *from)
{
        while (to->out.len && to->io.writable) {
                ssize_t n = send(to->io.fd, buf_at(&to->out), to->out.len, MSG_NOSIGNAL);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 && errno == EAGAIN) {
                        to->io.writable = false;
                        break;
                }
                if (n < 0) {
                        flow_reset(f, FLAG_CONNECT, strerror(errno));
                        return false;
                }
                buf_take(&to->out, (size_t)n);
                if (from->kind == SIDE_STREAM)
                        tun_taken(from, (size_t)n);
        }
        account(f, to);
        return true;
}

static void count_bytes(struct flow *f, const struct side *from, size_t n)
{
        if (from == &f->a)
                f->sent += n;
        else
                f->received += n;
        f->last_ms = f->w->now_ms;
        f->w->moved[from->is_b] += n;
}

/* Socket to socket. Returns bytes moved, or -1 when the flow is dead. */
static ssize_t splice(struct flow *f, struct side *from, struct side *to, size_t most)
{
        size_t moved = 0;
        while (from->io.readable && !from->ended && to->out.len == 0 && moved < most) {
                ssize_t n = recv(from->io.fd, f->w->scratch, LOOP_SCRATCH, 0);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 && errno == EAGAIN) {
                        from->io.readable = from->io.urgent = false;
                        break;
                }
                if (n < 0) {
                        flow_reset(f, FLAG_CONNECT, strerror(errno));
                        return -1;
                }
                if (n == 0) {
                        from->ended = true;
                        break;
                }
                if (n < LOOP_SCRATCH && !from->io.hangup && !from->io.urgent)
                        from->io.readable = false;
                count_bytes(f, from, (size_t)n);
                moved += (size_t)n;
                ssize_t put = 0;
                while (to->io.writable && put < n) {
                        ssize_t sent = send(to->io.fd, f->w->scratch + put, (size_t)(n - put), MSG_NOSIGNAL);
                        if (sent < 0 && errno == EINTR)
                                continue;
                        if (sent < 0 && errno == EAGAIN) {
                                to->io.writable = false;
                                break;
                        }
                        if (sent < 0) {
                                flow_reset(f, FLAG_CONNECT, strerror(errno));
                                return -1;
                        }
                        put += sent;
                }
                if (put < n && !buf_add(&to->out, f->w->scratch + put, (size_t)(n - put))) {
                        flow_reset(f, FLAG_CONNECT, "no memory");
                        return -1;
                }
                account(f, to);
        }
        return (ssize_t)moved;
}

/* The answer to CONNECT. false: the flow is dead. */
static bool answer(struct flow *f)
{
        f->owes = false;
        link_remove(&f->owed);
        if (tun_respond(&f->a, f, 200) == 0)
                return true;
        flow_reset(f, FLAG_H2_FAILURE, "no response could be sent");
        return false;
}

/* Socket to stream: into the stream's queue; the tunnel takes it from there. */
static ssize_t load(struct flow *f, struct side *from, struct side *to, size_t most)
{
        size_t moved = 0;
        while (from->io.readable && !from->ended && to->out.len < STREAM_QUEUE && moved < most) {
                size_t want = STREAM_QUEUE - to->out.len;
                uint8_t *room = f->w->scratch;
                if (to->out.len > 8192 || to->out.last > 8192) { /* many bytes last time: no copy */
                        room = buf_room(&to->out, want + FRONT);
                        if (!room) {
                                flow_reset(f, FLAG_CONNECT, "no memory");
                                return -1;
                        }
                        if (to->out.len == 0) {
                                to->out.head = FRONT;
                                room = buf_at(&to->out);
                        }
                }
                ssize_t n = recv(from->io.fd, room, want, 0);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 && errno == EAGAIN) {
                        from->io.readable = from->io.urgent = false;
                        break;
                }
                if (n < 0) {
                        flow_reset(f, FLAG_CONNECT, strerror(errno));
                        return -1;
                }
                if (n == 0) {
                        from->ended = true;
                        break;
                }
                if ((size_t)n < want && !from->io.hangup && !from->io.urgent)
                        from->io.readable = false;
                if (room != f->w->scratch) {
                        to->out.len += (size_t)n;
                } else if (!buf_add(&to->out, room, (size_t)n)) {
                        flow_reset(f, FLAG_CONNECT, "no memory");
                        return -1;
                }
                if (f->state == FLOW_RELAY) /* what goes ahead of an answer counts when there is one */
                        count_bytes(f, from, (size_t)n);
                moved += (size_t)n;
        }
        if (to->out.len == 0)
                buf_empty(&to->out);
        account(f, to);
        if (!moved && !from->ended)
                return 0;
        if (f->owes && !answer(f))
                return -1;
        tun_resume(to);
        return (ssize_t)moved;
}

/* One direction. false: the flow is dead. */
static bool relay(struct flow *f, struct side *from, struct side *to)
{
        ssize_t moved = 0;
        if (to->kind == SIDE_SOCKET) {
                if (!drain(f, to, from))
                        return false;
                if (from->kind == SIDE_SOCKET)
                        moved = splice(f, from, to, TURN_BYTES);
                if (moved < 0)
                        return false;
                if (from->ended && to->out.len == 0 && !to->closing) {
                        shutdown(to->io.fd, SHUT_WR);
                        to->closing = true;
                }
        } else if (to->kind == SIDE_STREAM) {
                moved = load(f, from, to, TURN_BYTES);
                if (moved < 0)
                        return false;
        }
        if (moved >= TURN_BYTES)
                flow_ready(f);
        return true;
}

static void relay_begins(struct flow *f)
{
        timer_stop(&f->timer);
        f->state = FLOW_RELAY;
        flow_ready(f);
}

/* The application's socket stands; `early` bytes came with the request. Their answer waits a moment for the
 * application's: one record instead of two, and one wake-up of the other engine. */
static void stands(struct flow *f, size_t early)
{
        if (f->way == WAY_INBOUND_HBONE) {
                if (early)
                        count_bytes(f, &f->a, early);
                f->owes = early && early <= OWE_BYTES;
                f->owed_ms = f->w->now_ms;
                if (f->owes)
                        link_add(&f->w->owed, &f->owed);
                else if (!answer(f))
                        return;
        }
        relay_begins(f);
}

uint64_t conn_answer_due(const struct worker *w)
{
        return link_alone(&w->owed) ? UINT64_MAX : container(w->owed.next, struct flow, owed)->owed_ms + OWE_MS;
}

void conn_answer(struct worker *w)
{
        while (conn_answer_due(w) <= w->now_ms)
                answer(container(w->owed.next, struct flow, owed));
}

/* What came with the request goes to the application although nobody has said yet that the socket stands: inside a pod
 * it mostly does. */
static void push(struct flow *f)
{
        struct buf *out = &f->b.out;
        size_t early = out->len;
        ssize_t n = send(f->b.io.fd, buf_at(out), out->len, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return; /* an event comes */
        if (n < 0) {
                flow_deny(f, 503, FLAG_CONNECT, strerror(errno));
                return;
        }
        f->b.io.writable = true;
        buf_take(out, (size_t)n);
        tun_taken(&f->a, (size_t)n);
        stands(f, early);
}

void flow_run(struct flow *f)
{
        if (f->state == FLOW_ASKED && f->early)
                load(f, &f->a, &f->b, TURN_BYTES);
        if (f->state == FLOW_CONNECTING && f->b.out.len)
                push(f);
        if (f->state != FLOW_RELAY)
                return;
        if (!relay(f, &f->a, &f->b) || !relay(f, &f->b, &f->a))
                return;
        if (f->a.ended && f->b.ended && f->a.closing && f->b.closing) {
                flow_finish(f);
                return;
        }
        /* A reset that no read will find: its side has ended already, or the other side takes nothing. */
        if ((f->a.io.failed || f->b.io.failed) && link_alone(&f->ready)) {
                flow_reset(f, FLAG_CONNECT, strerror(ECONNRESET));
                return;
        }
        if ((f->a.ended || f->b.ended) && link_alone(&f->timer.link))
                timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_1H);
}

bool flow_data(struct flow *f, const uint8_t *bytes, size_t n)
{
        struct side *from = flow_stream_side(f), *to = flow_other(f, from);
        if (!buf_add(&to->out, bytes, n))
                return false;
        account(f, to);
        if (f->state == FLOW_RELAY)
                count_bytes(f, from, n);
        if (!f->owes || f->sent <= OWE_BYTES || answer(f))
                flow_ready(f);
        return true;
}

/* -- events ------------------------------------------------------------------------------------------------------- */

static void connected(struct flow *f)
{
        int error = 0;
        socklen_t n = sizeof(error);
        getsockopt(f->b.io.fd, SOL_SOCKET, SO_ERROR, &error, &n);
        if (error) {
                if (f->way == WAY_INBOUND_HBONE)
                        flow_deny(f, 503, FLAG_CONNECT, strerror(error));
                else
                        flow_reset(f, FLAG_CONNECT, strerror(error));
                return;
        }
        stands(f, f->b.out.len);
}

void flow_event(struct side *s)
{
        struct flow *f = flow_of_side(s);
        if (f->state == FLOW_CONNECTING && s->is_b) {
                if (s->io.writable)
                        connected(f);
                return;
        }
        if (f->state == FLOW_RELAY) {
                flow_ready(f);
                return;
        }
        if (f->state == FLOW_ASKED && f->early)
                flow_ready(f);
        if (s->io.hangup && f->state != FLOW_DEAD) {
                /* the client may be gone already: an error there ends the flow, a half-close is for later */
                int error = 0;
                socklen_t n = sizeof(error);
                getsockopt(s->io.fd, SOL_SOCKET, SO_ERROR, &error, &n);
                if (error)
                        flow_reset(f, FLAG_CONNECT, strerror(error));
        }
}

void flow_expired(struct flow *f)
{
        switch (f->state) {
        case FLOW_HELD:
                give_up(f);
                break;
        case FLOW_UNKNOWN:
                refuse(f, FLAG_CONNECT, "unknown_destination", "no record of this address of the cluster");
                break;
        case FLOW_CONNECTING:
                if (f->way == WAY_INBOUND_HBONE)
                        flow_deny(f, 503, FLAG_CONNECT, "connect took longer than 10 s");
                else
                        flow_reset(f, FLAG_CONNECT, "connect took longer than 10 s");
                break;
        case FLOW_WAITING:
                flow_reset(f, FLAG_CONNECT, "no tunnel within 20 s");
                break;
        case FLOW_ASKED:
                flow_reset(f, FLAG_CONNECT, "no answer to CONNECT within 15 s");
                break;
        case FLOW_RELAY:
                if (f->w->now_ms - f->last_ms >= 3600000)
                        flow_reset(f, FLAG_CONNECT, "half closed for an hour without a byte");
                else
                        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_1H);
                break;
        case FLOW_NEW:
        case FLOW_DEAD:
                break;
        }
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

struct flow *flow_from_stream(struct tun *t, int32_t stream)
{
        struct flow *f = flow_new(t->w, t->pod, WAY_INBOUND_HBONE);
        if (!f)
                return NULL;
        f->by_hbone = true;
        f->state = FLOW_WAITING;
        f->src = t->remote;
        f->dst = t->local;
        f->peer = block_text(t->peer);
        f->a.kind = SIDE_STREAM;
        f->a.tun = t;
        f->a.stream = stream;
        f->a.window = WINDOW_FIRST;
        timer_set(t->w, &f->timer, TIMER_FLOW, TIMER_15S);
        return f;
}

void flow_deny(struct flow *f, int status, enum event_flag flag, const char *why)
{
        if (f->a.kind == SIDE_STREAM && tun_respond(&f->a, f, status) == 0)
                tun_forget(&f->a);
        flow_end(f, flag, why);
}

/* "1.2.3.4:80" or "[::1]:80"; names are for waypoints, which are not here. */
static int parse_authority(const char *text, struct endpoint *out)
{
        char host[64];
        uint8_t ip[16];
        const char *colon = strrchr(text, ':');
        if (!colon || colon == text || (size_t)(colon - text) >= sizeof(host))
                return -1;
        memcpy(host, text, (size_t)(colon - text));
        host[colon - text] = 0;
        char *end;
        unsigned long port = colon[1] >= '0' && colon[1] <= '9' ? strtoul(colon + 1, &end, 10) : 0;
        if (port == 0 || port > 65535 || *end)
                return -1;
        out->port = (uint16_t)port;
        size_t n = strlen(host);
        if (host[0] == '[' && host[n - 1] == ']') {
                host[n - 1] = 0;
                return inet_pton(AF_INET6, host + 1, ip) == 1 ? addr_from_bytes(&out->addr, ip, 16) : -1;
        }
        return inet_pton(AF_INET, host, ip) == 1 ? addr_from_bytes(&out->addr, ip, 4) : -1;
}

void flow_request(struct flow *f)
{
        struct endpoint to;
        struct tunnel *engine = f->w->engine;
        if (!f->peer || !f->method || strcmp(f->method, "CONNECT") != 0)
                flow_deny(f, 400, FLAG_CONNECT, "expected method CONNECT");
        else if (!f->authority || parse_authority(f->authority, &to) < 0)
                flow_deny(f, 400, FLAG_CONNECT, "no valid authority pseudo header");
        else if (!addr_equal(&to.addr, &f->dst.addr))
                flow_deny(f, 400, FLAG_CONNECT, "authority is not the address of this pod");
        else if (to.port == HBONE_PORT || pod_owns_port(f->pod, to.port))
                flow_deny(f, 503, FLAG_CONNECT, "attempted recursive call to ourselves");
        else if (f->a.tun->until_s <= (int64_t)time(NULL))
                flow_deny(f, 503, FLAG_IDENTITY_ERROR, "a certificate of the tunnel has expired");
        else if (atomic_load(&engine->fds) > atomic_load(&engine->fd_limit))
                flow_deny(f, 503, FLAG_CONNECT, "too many open files");
        else if (atomic_load(&f->pod->buffered) > engine->config.pod_budget ||
                 atomic_load(&engine->buffered) > engine->config.engine_budget)
                flow_deny(f, 503, FLAG_CONNECT, "over the budget of buffered bytes");
        else {
                f->dst = to;
                timer_stop(&f->timer);
                decide(f);
        }
}

void flow_tunnel_open(struct flow *f, struct tun *t)
{
        block_free(f->peer);
        f->peer = block_text(t->peer);
        f->state = FLOW_ASKED;
        f->early = t->early;
        if (f->early)
                flow_ready(f);
        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_15S);
}

/* The other node says so; its engine knows by which policy. */
static void told_denied(struct flow *f)
{
        struct denial what = {.namespace_ = f->pod->namespace_,
                              .pod = f->pod->name,
                              .pod_uid = f->pod->uid,
                              .outbound = true,
                              .src = f->src,
                              .dst = f->dst,
                              .identity = f->pod->identity,
                              .policy = "",
                              .reason = "denied by the destination (http status 401)"};
        denials_add(f->w->engine->denials, f->w->index, &what);
}

void flow_answer(struct flow *f, int status)
{
        if (f->state != FLOW_ASKED)
                return;
        if (status == 200) {
                struct side *s = &f->b;
                if (s->out.len)
                        count_bytes(f, &f->a, s->out.len);
                if (s->kept)
                        buf_take(&s->out, s->kept);
                s->kept = 0;
                account(f, s);
                relay_begins(f);
                tun_resume(s);
        } else if (status < 100 || status > 199) {
                if (status == 401)
                        told_denied(f);
                flow_reset(f, status == 401 ? FLAG_DENY : FLAG_CONNECT,
                           status == 401   ? "http status: 401"
                           : status == 503 ? "http status: 503"
                                           : "http status: other");
        }
}

void flow_tunnel_lost(struct flow *f, enum event_flag flag, const char *why)
{
        flow_reset(f, flag, why);
}

/* Once more by another tunnel: the peer has not processed the request (RFC 9113 8.7), and what was read is kept. */
static bool retry(struct flow *f)
{
        struct identity *i;
        struct route r;
        const struct workload *own = complete(f->w, f->pod, &i);
        if (f->way != WAY_OUTBOUND || f->state != FLOW_ASKED || f->retried || !own)
                return false;
        view_route(f->w->view, own, &f->dst, loop_random(f->w), &r);
        if (r.kind != ROUTE_HBONE || f->a.io.fd < 0)
                return false;
        char authority[ENDPOINT_STRLEN];
        char *text = block_text(endpoint_format(&r.target, authority));
        if (!text)
                return false;
        block_free(f->authority);
        f->authority = text;
        f->hop = r.next_hop;
        f->retried = true;
        f->unsent = false;
        f->b.kind = SIDE_NONE;
        f->b.kept = 0;
        f->b.closing = false;
        f->state = FLOW_WAITING;
        timer_set(f->w, &f->timer, TIMER_FLOW, TIMER_20S);
        int result = pool_open(f, &r, i);
        if (result < 0 && f->state != FLOW_DEAD)
                flow_reset(f, FLAG_CONNECT, strerror(-result));
        return true;
}

void flow_stream_closed(struct flow *f, uint32_t code)
{
        if ((f->unsent || code == NGHTTP2_REFUSED_STREAM) && retry(f))
                return;
        struct side *stream = flow_stream_side(f), *other = flow_other(f, stream);
        if (code != NGHTTP2_NO_ERROR || !stream->ended) {
                flow_reset(f, FLAG_CONNECT,
                           code == NGHTTP2_NO_ERROR ? "stream ended early" : "stream was reset by the peer");
                return;
        }
        /* the peer has all of our bytes and we all of its: they may still be on the way to the application */
        stream->closing = true;
        other->ended = true;
        flow_ready(f);
}

/* -- clearing ----------------------------------------------------------------------------------------------------- */

void conn_abort_seat(struct worker *w, struct seat *seat)
{
        (void)w;
        while (!link_alone(&seat->flows))
                flow_reset(container(seat->flows.next, struct flow, seat), FLAG_CONNECT, "the pod left the mesh");
        while (!link_alone(&seat->tuns))
                tun_fail(container(seat->tuns.next, struct tun, seat), FLAG_NONE, "the pod left the mesh");
}

void conn_abort_all(struct worker *w)
{
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *l = w->seats[i].next; l != &w->seats[i]; l = l->next)
                        conn_abort_seat(w, container(l, struct seat, link));
}
