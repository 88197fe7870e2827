/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * A tunnel is a socket, a TLS session and an nghttp2 session, each fed by the one before: bytes come in by tun_event,
 * leave by tun_flush. HTTP/2 is driven by mem_recv and mem_send only, so the loop keeps control; nothing here writes to
 * a socket from inside a callback.
 *
 * Frames and records: a DATA frame has at most 16 375 bytes, so that frame header and payload fill one TLS record;
 * small frames that leave together share one. No stream is asked for bytes while TUN_QUEUE sealed bytes wait for the
 * socket: a bulk stream does not delay its neighbours.
 *
 * Windows: connection credit goes back on receipt, stream credit when the reader of the stream has taken the bytes. A
 * slow reader stops its own stream and nobody else's. A stream's window starts at 256 KiB and doubles up to 4 MiB as
 * long as its reader drains a window's worth and the budgets allow it.
 *
 * A server says in its SETTINGS that it takes bytes ahead of its answer to CONNECT (SETTINGS_EARLY, ours; unknown to
 * others, who ignore it). Towards such a peer DATA follows the request at once, in the same record where it is there,
 * and is kept until the answer: a request that was not processed is repeated with it. Towards all others, and before
 * their SETTINGS have come, not a byte goes ahead (RFC 9110 9.3.6).
 *
 * A client tunnel belongs to one pod and one set of expected identities (pool.c); a server tunnel to the pod it arrived
 * at. It takes no new stream once its own certificate, or the record that it was opened for, is replaced, and closes
 * with its last one; it is cut at the first end of a certificate of either chain, and when the root of its peer's is
 * not trusted any more.
 */
#include <errno.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "hbone.h"
#include "pod.h"

#define DIRECT 4096 /* larger payloads are not copied together with others */
#define CONNECTION_WINDOW (16 << 20)
#define EARLY_RESETS                                                                                                   \
        2000 /* streams that a client reset before they were connected, in a tunnel's life, less those that worked */

static _Thread_local struct {
        uint8_t bytes[RECORD_PLAIN];
        size_t len;
} stage;

/* -- writing ------------------------------------------------------------------------------------------------------ */

void tun_mark_dirty(struct tun *t)
{
        if (t->state != TUN_DEAD && link_alone(&t->dirty))
                link_add(&t->w->dirty, &t->dirty);
}

static int stage_seal(struct tun *t)
{
        if (stage.len == 0)
                return 0;
        int result = tls_write(&t->tls, stage.bytes, stage.len, &t->key_updates);
        stage.len = 0;
        return result;
}

static int stage_add(struct tun *t, const uint8_t *bytes, size_t n)
{
        while (n > 0) {
                size_t part = RECORD_PLAIN - stage.len < n ? RECORD_PLAIN - stage.len : n;
                memcpy(stage.bytes + stage.len, bytes, part);
                stage.len += part;
                bytes += part;
                n -= part;
                if (stage.len == RECORD_PLAIN && stage_seal(t) < 0)
                        return -1;
        }
        return 0;
}

static ssize_t on_read_data(nghttp2_session *h2, int32_t id, uint8_t *buf, size_t length, uint32_t *flags,
                            nghttp2_data_source *source, void *arg)
{
        struct flow *f = nghttp2_session_get_stream_user_data(h2, id);
        (void)source, (void)buf, (void)arg;
        if (!f)
                return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
        struct side *s = flow_stream_side(f);
        size_t left = s->out.len - s->kept, n = left < length ? left : length;
        if (f->state == FLOW_ASKED && !f->early)
                return NGHTTP2_ERR_DEFERRED;
        if (n > FRAME_PAYLOAD)
                n = FRAME_PAYLOAD;
        bool last = flow_other(f, s)->ended && n == left;
        if (n == 0 && !last)
                return NGHTTP2_ERR_DEFERRED;
        *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
        if (last)
                *flags |= NGHTTP2_DATA_FLAG_EOF;
        return (ssize_t)n;
}

static int on_send_data(nghttp2_session *h2, nghttp2_frame *frame, const uint8_t *header, size_t length,
                        nghttp2_data_source *source, void *arg)
{
        struct tun *t = arg;
        /* A frame that met a full queue waits inside nghttp2, and its flow may have ended since: the RST_STREAM of that
         * is behind it. Only the stream tells whether the flow is there, the source does not. */
        struct flow *f = nghttp2_session_get_stream_user_data(h2, frame->hd.stream_id);
        (void)source;
        if (!f)
                return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
        struct side *s = flow_stream_side(f);
        if (t->tls.out.len >= TUN_QUEUE)
                return NGHTTP2_ERR_WOULDBLOCK;
        if ((stage.len + 9 + length > RECORD_PLAIN || length > DIRECT) && stage_seal(t) < 0)
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        uint8_t *payload = length ? buf_at(&s->out) + s->kept : NULL; /* an end alone has no queue */
        if (length > DIRECT && s->out.head >= 9 && s->kept == 0) {
                /* sealed from where it is: the header goes into the bytes before it, which are taken */
                uint8_t *record = payload - 9;
                memcpy(record, header, 9);
                if (tls_write(&t->tls, record, length + 9, &t->key_updates) < 0)
                        return NGHTTP2_ERR_CALLBACK_FAILURE;
        } else if (stage_add(t, header, 9) < 0 || (length && stage_add(t, payload, length) < 0)) {
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
        if (f->state == FLOW_ASKED)
                s->kept += length;
        else if (length)
                buf_take(&s->out, length);
        if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)
                s->closing = true;
        if (s->closing || flow_other(f, s)->io.readable)
                flow_ready(f);
        return 0;
}

static void tun_send(struct tun *t)
{
        while (t->io.writable && t->tls.out.len) {
                ssize_t n = send(t->io.fd, buf_at(&t->tls.out), t->tls.out.len, MSG_NOSIGNAL);
                if (n > 0) {
                        buf_take(&t->tls.out, (size_t)n);
                } else if (n < 0 && errno == EINTR) {
                        continue;
                } else {
                        t->io.writable = false; /* EAGAIN; an error comes again as an event */
                }
        }
}

static void tun_flush(struct tun *t)
{
        if (t->state == TUN_OPEN) {
                for (;;) {
                        const uint8_t *bytes;
                        ssize_t n = 0;
                        stage.len = 0;
                        while (t->tls.out.len < TUN_QUEUE && (n = nghttp2_session_mem_send(t->h2, &bytes)) > 0)
                                if (stage_add(t, bytes, (size_t)n) < 0) {
                                        n = -1;
                                        break;
                                }
                        if (n < 0 || stage_seal(t) < 0) {
                                tun_fail(t, FLAG_H2_FAILURE, "HTTP/2 session failed");
                                return;
                        }
                        bool more = t->tls.out.len >= TUN_QUEUE;
                        tun_send(t);
                        if (!more || t->tls.out.len >= TUN_QUEUE)
                                break;
                }
                if (t->tls.out.len == 0 && !nghttp2_session_want_read(t->h2) && !nghttp2_session_want_write(t->h2)) {
                        tun_fail(t, FLAG_NONE, "closed");
                        return;
                }
        } else {
                tun_send(t);
        }
}

void tun_flush_dirty(struct worker *w)
{
        while (!link_alone(&w->dirty)) {
                struct tun *t = container(w->dirty.next, struct tun, dirty);
                link_remove(&t->dirty);
                if (t->state != TUN_DEAD)
                        tun_flush(t);
        }
}

/* -- HTTP/2 callbacks --------------------------------------------------------------------------------------------- */

static struct flow *flow_of(nghttp2_session *h2, int32_t id)
{
        return nghttp2_session_get_stream_user_data(h2, id);
}

static int on_begin_headers(nghttp2_session *h2, const nghttp2_frame *frame, void *arg)
{
        struct tun *t = arg;
        if (!t->server || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
                return 0;
        struct flow *f = flow_from_stream(t, frame->hd.stream_id);
        if (!f)
                return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
        nghttp2_session_set_stream_user_data(h2, frame->hd.stream_id, f);
        link_add(&t->streams, &f->member);
        t->nstreams++;
        timer_stop(&t->timer);
        return 0;
}

static bool is(const uint8_t *name, size_t n, const char *text)
{
        return n == strlen(text) && memcmp(name, text, n) == 0;
}

static int on_header(nghttp2_session *h2, const nghttp2_frame *frame, const uint8_t *name, size_t nn,
                     const uint8_t *value, size_t nv, uint8_t flags, void *arg)
{
        struct tun *t = arg;
        struct flow *f = flow_of(h2, frame->hd.stream_id);
        (void)flags;
        if (!f)
                return 0;
        if (t->server && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
                char **to = is(name, nn, ":authority") ? &f->authority : is(name, nn, ":method") ? &f->method : NULL;
                if (to && !*to)
                        *to = block_text_n((const char *)value, nv);
        } else if (!t->server && frame->headers.cat == NGHTTP2_HCAT_RESPONSE && is(name, nn, ":status")) {
                flow_answer(f, nv == 3 ? (value[0] - '0') * 100 + (value[1] - '0') * 10 + value[2] - '0' : 0);
        }
        return 0;
}

static int on_frame(nghttp2_session *h2, const nghttp2_frame *frame, void *arg)
{
        struct tun *t = arg;
        struct flow *f = frame->hd.stream_id ? flow_of(h2, frame->hd.stream_id) : NULL;
        switch (frame->hd.type) {
        case NGHTTP2_HEADERS:
                if (f && t->server && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
                        flow_request(f);
                /* fall through */
        case NGHTTP2_DATA:
                if (f && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) {
                        flow_stream_side(f)->ended = true;
                        flow_ready(f);
                }
                break;
        case NGHTTP2_SETTINGS:
                if (!t->server) {
                        uint32_t most =
                                nghttp2_session_get_remote_settings(h2, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS);
                        t->most = most < TUN_STREAMS_CLIENT ? most : TUN_STREAMS_CLIENT;
                        for (size_t i = 0; i < frame->settings.niv; i++)
                                if (frame->settings.iv[i].settings_id == SETTINGS_EARLY)
                                        t->early = frame->settings.iv[i].value == 1;
                }
                break;
        case NGHTTP2_GOAWAY:
                tun_retire(t);
                break;
        case NGHTTP2_PING:
                if (frame->hd.flags & NGHTTP2_FLAG_ACK)
                        t->pinged = false;
                break;
        }
        return 0;
}

static int on_data(nghttp2_session *h2, uint8_t flags, int32_t id, const uint8_t *bytes, size_t n, void *arg)
{
        struct tun *t = arg;
        struct flow *f = flow_of(h2, id);
        (void)flags;
        if (nghttp2_session_consume_connection(h2, n) != 0)
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        tun_mark_dirty(t);
        if (!f) {
                nghttp2_session_consume_stream(h2, id, n);
                return 0;
        }
        if (!flow_data(f, bytes, n))
                flow_reset(f, FLAG_CONNECT, "no memory");
        return 0;
}

/* No stream is left. A server waits longer than any client, whose CONNECT could meet its close. */
static void rest(struct tun *t)
{
        if (t->no_new && !t->server)
                nghttp2_session_terminate_session(t->h2, NGHTTP2_NO_ERROR);
        timer_set(t->w, &t->timer, TIMER_TUN, t->no_new ? TIMER_10S : t->server ? TIMER_1H : TIMER_5MIN);
        tun_mark_dirty(t);
}

static int on_close(nghttp2_session *h2, int32_t id, uint32_t code, void *arg)
{
        struct tun *t = arg;
        struct flow *f = flow_of(h2, id);
        if (!f)
                return 0;
        link_remove(&f->member);
        t->nstreams--;
        if (code != NGHTTP2_NO_ERROR)
                event_count(t->w->ev, EV_STREAMS_RESET, 1);
        if (t->server && code != NGHTTP2_NO_ERROR && f->state != FLOW_RELAY)
                t->early_resets++;
        else if (t->early_resets)
                t->early_resets--;
        flow_stream_side(f)->kind = SIDE_NONE; /* the stream's number means nothing any more */
        flow_stream_closed(f, code);
        if (t->nstreams == 0 && t->nwaiting == 0)
                rest(t);
        return t->early_resets > EARLY_RESETS ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

/* A GOAWAY came between the request and its HEADERS: the peer has not seen it. */
static int on_not_sent(nghttp2_session *h2, const nghttp2_frame *frame, int error, void *arg)
{
        struct flow *f = frame->hd.type == NGHTTP2_HEADERS ? flow_of(h2, frame->hd.stream_id) : NULL;
        (void)error, (void)arg;
        if (f)
                f->unsent = true;
        return 0;
}

static void *h2_new(size_t n, void *arg)
{
        (void)arg;
        return block_new(n);
}

static void h2_free(void *block, void *arg)
{
        (void)arg;
        block_free(block);
}

static void *h2_zero(size_t n, size_t size, void *arg)
{
        (void)arg;
        return size && n > SIZE_MAX / size ? NULL : block_zero(n * size);
}

static void *h2_grow(void *block, size_t n, void *arg)
{
        (void)arg;
        return block_grow(block, n);
}

static int start_h2(struct tun *t)
{
        static const nghttp2_settings_entry common[] = {
                {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW_FIRST},
                {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, 1 << 20},
                {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, 65536},
        };
        nghttp2_settings_entry settings[5];
        memcpy(settings, common, sizeof(common));
        settings[3] = t->server ? (nghttp2_settings_entry){NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, TUN_STREAMS_SERVER}
                                : (nghttp2_settings_entry){NGHTTP2_SETTINGS_ENABLE_PUSH, 0};
        settings[4] = (nghttp2_settings_entry){SETTINGS_EARLY, 1};
        static nghttp2_mem memory = {.malloc = h2_new,
                                     .free = h2_free,
                                     .calloc = h2_zero,
                                     .realloc = h2_grow}; /* not const in the library */
        nghttp2_session_callbacks *callbacks = NULL;
        nghttp2_option *option = NULL;
        int result = -ENOMEM;
        if (nghttp2_session_callbacks_new(&callbacks) != 0 || nghttp2_option_new(&option) != 0)
                goto out;
        nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
        nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
        nghttp2_session_callbacks_set_on_frame_not_send_callback(callbacks, on_not_sent);
        nghttp2_session_callbacks_set_send_data_callback(callbacks, on_send_data);
        nghttp2_option_set_no_auto_window_update(option, 1);
        nghttp2_option_set_no_closed_streams(option, 1);
        nghttp2_option_set_peer_max_concurrent_streams(option, TUN_STREAMS_CLIENT);
        /* the library's own limiter would end a tunnel after 1000 resets of well-behaved applications; ours is
         * EARLY_RESETS */
        nghttp2_option_set_stream_reset_rate_limit(option, UINT64_MAX / 2, UINT64_MAX / 2);
        if ((t->server ? nghttp2_session_server_new3 : nghttp2_session_client_new3)(&t->h2, callbacks, t, option,
                                                                                    &memory) != 0 ||
            nghttp2_submit_settings(t->h2, NGHTTP2_FLAG_NONE, settings, t->server ? 5 : 4) != 0 ||
            nghttp2_session_set_local_window_size(t->h2, NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW) != 0)
                goto out;
        result = 0;
out:
        nghttp2_session_callbacks_del(callbacks);
        nghttp2_option_del(option);
        return result;
}

/* -- life --------------------------------------------------------------------------------------------------------- */

static struct tun *tun_new(struct worker *w, struct pod *p, int fd, bool server)
{
        struct tun *t = calloc(1, sizeof(*t));
        if (!t)
                return NULL;
        t->io = (struct io){.type = IO_TUN, .fd = fd, .writable = server};
        t->w = w;
        t->pod = pod_ref(p);
        t->server = server;
        t->most = TUN_STREAMS_CLIENT;
        t->opened_ms = t->heard_ms = w->now_ms;
        t->until_s = INT64_MAX;
        struct link *links[] = {&t->seat, &t->dirty,   &t->unread,  &t->pool,       &t->held,
                                &t->dead, &t->streams, &t->waiting, &t->timer.link, &t->ping.link};
        for (unsigned i = 0; i < sizeof(links) / sizeof(*links); i++)
                link_init(links[i]);
        atomic_fetch_add(&w->engine->fds, 1);
        return t;
}

/* TLS begins; the socket is connected. */
static void tun_start(struct tun *t, struct identity *i)
{
        t->identity = identity_ref(i);
        t->until_s = i->not_after_s;
        t->state = TUN_HANDSHAKE;
        timer_set(t->w, &t->timer, TIMER_TUN, TIMER_10S);
        if (tls_open(&t->tls, i, t->server) < 0)
                tun_fail(t, FLAG_TLS_FAILURE, "no memory for TLS");
        else
                tun_event(t);
}

void tun_try_start(struct tun *t)
{
        struct identity *i = worker_identity(t->w, t->pod->identity);
        if (!i || i->not_after_s <= (int64_t)time(NULL) || !view_workload(t->w->view, t->pod->workload))
                return;
        link_remove(&t->held);
        atomic_fetch_sub(&t->pod->held, 1);
        tun_start(t, i);
}

struct handed {
        struct pod *pod;
        int fd;
        struct endpoint remote, local;
};

static struct tun *tun_begin(struct worker *w, struct pod *p, int fd, const struct endpoint *remote,
                             const struct endpoint *local)
{
        struct tun *t = w->stop ? NULL : tun_new(w, p, fd, true);
        struct seat *seat = seat_of_workload(w, p->workload);
        if (!t || !seat || loop_watch(w, &t->io) < 0) {
                close(fd);
                atomic_fetch_sub(&p->tunnels[w->index], 1);
                if (t) {
                        atomic_fetch_sub(&w->engine->fds, 1);
                        pod_unref(t->pod);
                        free(t);
                }
                return NULL;
        }
        t->remote = *remote;
        t->local = *local;
        link_add(&seat->tuns, &t->seat);
        event_sockets(w->ev, EVENT_DESTINATION, 1);
        event_count(w->ev, EV_TUNNELS_OPENED, 1);
        event_count(w->ev, EV_TUNNELS_OPEN, 1);
        t->state = TUN_HELD;
        link_add(&w->held_tuns, &t->held);
        atomic_fetch_add(&p->held, 1);
        timer_set(w, &t->timer, TIMER_TUN, TIMER_5S);
        tun_try_start(t);
        return t;
}

static void take_over(struct worker *w, void *arg)
{
        struct handed *h = arg;
        tun_begin(w, h->pod, h->fd, &h->remote, &h->local);
        pod_unref(h->pod);
        free(h);
}

/* The kernel chose this worker by a hash: the two tunnels of a pair of nodes meet at one worker half of the time, for
 * as long as they live. Which one has fewest of this pod's gets it. */
struct tun *tun_accept(struct worker *w, struct pod *p, int fd, const struct endpoint *remote,
                       const struct endpoint *local)
{
        struct tunnel *engine = w->engine;
        unsigned to = w->index;
        for (unsigned i = 0; i < engine->nworkers; i++)
                if (atomic_load(&p->tunnels[i]) < atomic_load(&p->tunnels[to]))
                        to = i;
        struct handed *h = to == w->index || w->stop ? NULL : malloc(sizeof(*h));
        if (h) {
                *h = (struct handed){pod_ref(p), fd, *remote, *local};
                atomic_fetch_add(&p->tunnels[to], 1);
                if (loop_mail(&engine->workers[to], take_over, h) == 0)
                        return NULL;
                atomic_fetch_sub(&p->tunnels[to], 1);
                pod_unref(p);
                free(h);
        }
        atomic_fetch_add(&p->tunnels[w->index], 1);
        return tun_begin(w, p, fd, remote, local);
}

int tun_dial(struct worker *w, struct pod *p, struct identity *i, const struct endpoint *hop, struct tun **out)
{
        struct seat *seat = seat_of_workload(w, p->workload);
        int fd = seat ? pod_connect(p, NULL, hop, AIM_TUNNEL) : -ENOENT;
        if (fd < 0)
                return fd;
        int limit = 20000;
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof(limit));
        struct tun *t = tun_new(w, p, fd, false);
        if (!t || loop_watch(w, &t->io) < 0) {
                close(fd);
                if (t) {
                        atomic_fetch_sub(&w->engine->fds, 1);
                        pod_unref(t->pod);
                        free(t);
                }
                return -ENOMEM;
        }
        t->remote = *hop;
        t->identity = identity_ref(i);
        t->until_s = i->not_after_s;
        t->state = TUN_CONNECTING;
        link_add(&seat->tuns, &t->seat);
        timer_set(w, &t->timer, TIMER_TUN, TIMER_10S);
        event_count(w->ev, EV_TUNNELS_OPENED, 1);
        event_count(w->ev, EV_TUNNELS_OPEN, 1);
        *out = t;
        return 0;
}

bool tun_has_room(const struct tun *t)
{
        return t->state != TUN_DEAD && !t->no_new && t->nstreams + t->nwaiting < t->most &&
               t->until_s > (int64_t)time(NULL);
}

void tun_retire(struct tun *t)
{
        if (t->no_new || t->state == TUN_DEAD)
                return;
        t->no_new = true;
        link_remove(&t->pool);
        if (t->state != TUN_OPEN)
                return;
        if (t->server) {
                /* A notice, not yet the end (RFC 9113 6.8): a CONNECT that is on its way is still served. */
                nghttp2_submit_shutdown_notice(t->h2);
                if (t->nstreams == 0)
                        rest(t);
        } else if (t->nstreams == 0) {
                nghttp2_session_terminate_session(t->h2, NGHTTP2_NO_ERROR);
        }
        tun_mark_dirty(t);
}

void tun_fail(struct tun *t, enum event_flag flag, const char *why)
{
        struct worker *w = t->w;
        if (t->state == TUN_DEAD)
                return;
        bool was_open = t->state == TUN_OPEN;
        if (t->state == TUN_HELD && !link_alone(&t->held))
                atomic_fetch_sub(&t->pod->held, 1);
        t->state = TUN_DEAD;
        timer_stop(&t->timer);
        timer_stop(&t->ping);
        struct link *links[] = {&t->seat, &t->dirty, &t->unread, &t->pool, &t->held};
        for (unsigned i = 0; i < sizeof(links) / sizeof(*links); i++)
                link_remove(links[i]);
        if (flag != FLAG_NONE && !(was_open && t->nstreams == 0)) {
                char from[ENDPOINT_STRLEN], to[ENDPOINT_STRLEN];
                event_log(w->engine->event, w->ev, "warn",
                          "tunnel failed pod=\"%s/%s\" direction=%s %s=%s local=%s error=\"%s\"", t->pod->namespace_,
                          t->pod->name, t->server ? "inbound" : "outbound", t->server ? "src.addr" : "dst.addr",
                          endpoint_format(&t->remote, from), endpoint_format(&t->local, to), why);
        }
        while (!link_alone(&t->streams)) {
                struct flow *f = container(t->streams.next, struct flow, member);
                link_remove(&f->member);
                flow_stream_side(f)->kind = SIDE_NONE;
                flow_tunnel_lost(f, flag == FLAG_NONE ? FLAG_CONNECT : flag, why);
        }
        while (!link_alone(&t->waiting)) {
                struct flow *f = container(t->waiting.next, struct flow, member);
                link_remove(&f->member);
                flow_tunnel_lost(f, flag == FLAG_NONE ? FLAG_CONNECT : flag, why);
        }
        t->nstreams = t->nwaiting = 0;
        if (flag == FLAG_NONE) {
                tls_end(&t->tls);
                tun_send(t);
        }
        close(t->io.fd);
        t->io.fd = -1;
        atomic_fetch_sub(&w->engine->fds, 1);
        if (t->server) {
                event_sockets(w->ev, EVENT_DESTINATION, -1);
                atomic_fetch_sub(&t->pod->tunnels[w->index], 1);
        }
        event_count(w->ev, EV_TUNNELS_OPEN, -1);
        event_count(w->ev, EV_TUNNELS_CLOSED, 1);
        if (t->key_updates)
                event_count(w->ev, EV_KEY_UPDATES, (int64_t)t->key_updates);
        link_add(&w->dead_tuns, &t->dead);
}

void tun_free_dead(struct worker *w)
{
        while (!link_alone(&w->dead_tuns)) {
                struct tun *t = container(w->dead_tuns.next, struct tun, dead);
                link_remove(&t->dead);
                nghttp2_session_del(t->h2);
                tls_close(&t->tls);
                identity_unref(t->identity);
                pod_unref(t->pod);
                for (unsigned i = 0; i < t->nsans; i++)
                        free(t->sans[i]);
                free(t->sans);
                free(t);
        }
}

/* -- coming up ---------------------------------------------------------------------------------------------------- */

#define UNTRUSTED "the root of the peer's certificate is not trusted any more"

/* Who is at the other end? NULL, or what is wrong. */
static const char *check_peer(struct tun *t)
{
        char own[256], theirs[256];
        int64_t until_s;
        const char *wrong = tls_peer(&t->tls, t->peer, &until_s, t->root);
        const struct identity *now = worker_identity(t->w, t->pod->identity);
        if (wrong)
                return wrong;
        if (now && !identity_trusts(now, t->root))
                return UNTRUSTED; /* changed while it came up */
        if (until_s < t->until_s)
                t->until_s = until_s;
        if (t->server) {
                spiffe_trust_domain(t->identity->uri, own, sizeof(own));
                spiffe_trust_domain(t->peer, theirs, sizeof(theirs));
                return strcmp(own, theirs) == 0 ? NULL : "peer is of another trust domain";
        }
        for (unsigned i = 0; i < t->nsans; i++)
                if (strcmp(t->sans[i], t->peer) == 0)
                        return NULL;
        return "peer has another identity than the destination";
}

void tun_recertified(struct tun *t, const struct identity *now)
{
        if (now && t->state == TUN_OPEN && !identity_trusts(now, t->root))
                tun_fail(t, FLAG_IDENTITY_ERROR, UNTRUSTED);
        else
                tun_retire(t);
}

static void set_ping(struct tun *t)
{
        bool soon = t->until_s - (int64_t)time(NULL) <= 10;
        timer_set(t->w, &t->ping, TIMER_PING, soon ? TIMER_1S : TIMER_10S);
}

static void tun_opened(struct tun *t)
{
        const char *wrong = check_peer(t);
        tls_settle(&t->tls);
        event_count(t->w->ev, EV_TLS_HANDSHAKES, 1);
        if (wrong || start_h2(t) < 0) {
                tun_fail(t, FLAG_TLS_FAILURE, wrong ? wrong : "no memory for HTTP/2");
                return;
        }
        t->state = TUN_OPEN;
        if (t->no_new && t->server)
                nghttp2_submit_shutdown_notice(t->h2); /* retired while it came up */
        if (link_alone(&t->waiting))
                rest(t);
        set_ping(t);
        tun_mark_dirty(t);
        while (!link_alone(&t->waiting)) {
                struct flow *f = container(t->waiting.next, struct flow, member);
                link_remove(&f->member);
                t->nwaiting--;
                if (tun_submit(t, f) < 0)
                        flow_tunnel_lost(f, FLAG_H2_FAILURE, "no stream");
        }
}

static void handshake(struct tun *t)
{
        char text[128];
        int result = tls_handshake(&t->tls);
        tun_mark_dirty(t);
        if (result == 1) {
                tun_opened(t);
        } else if (result < 0) {
                tls_error(&t->tls, text, sizeof(text));
                tun_send(t); /* the alert */
                char from[ENDPOINT_STRLEN];
                event_log(t->w->engine->event, t->w->ev, "warn",
                          "TLS handshake failed pod=\"%s/%s\" direction=%s peer=%s error=\"%s\"", t->pod->namespace_,
                          t->pod->name, t->server ? "inbound" : "outbound", endpoint_format(&t->remote, from), text);
                tun_fail(t, FLAG_TLS_FAILURE, "TLS handshake failed");
        }
}

/* Everything that is in tls.in, through TLS and HTTP/2. */
static void digest(struct tun *t)
{
        if (t->state == TUN_HANDSHAKE)
                handshake(t);
        while (t->state == TUN_OPEN) {
                const uint8_t *plain;
                int n = tls_read(&t->tls, &plain);
                if (n == 0)
                        return;
                if (n < 0) {
                        char text[128];
                        if (n == -2) {
                                tun_send(t); /* the alert */
                                event_log(t->w->engine->event, t->w->ev, "warn",
                                          "TLS failed pod=\"%s/%s\" error=\"%s\"", t->pod->namespace_, t->pod->name,
                                          tls_error(&t->tls, text, sizeof(text)));
                        }
                        tun_fail(t, n == -1 ? FLAG_NONE : FLAG_TLS_FAILURE, n == -1 ? "closed by peer" : "TLS failed");
                        return;
                }
                ssize_t taken = nghttp2_session_mem_recv(t->h2, plain, (size_t)n);
                tun_mark_dirty(t);
                if (taken != n) {
                        tun_fail(t, FLAG_H2_FAILURE, taken < 0 ? nghttp2_strerror((int)taken) : "HTTP/2 session ended");
                        return;
                }
        }
}

#define READ_AT_ONCE (64 << 10)
#define TURN_BYTES (128 << 10) /* then others have their turn */

static void receive(struct tun *t)
{
        size_t turn = 0;
        while (t->io.readable && (t->state == TUN_OPEN || t->state == TUN_HANDSHAKE) && turn < TURN_BYTES) {
                uint8_t *to = buf_room(&t->tls.in, READ_AT_ONCE);
                if (!to) {
                        tun_fail(t, FLAG_CONNECT, "no memory");
                        return;
                }
                ssize_t n = recv(t->io.fd, to, READ_AT_ONCE, 0);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 && errno == EAGAIN) {
                        t->io.readable = false;
                        break;
                }
                if (n <= 0) {
                        tun_fail(t, t->nstreams || t->nwaiting ? FLAG_CONNECT : FLAG_NONE,
                                 n == 0 ? "tunnel ended by peer" : strerror(errno));
                        return;
                }
                if (n < READ_AT_ONCE && !t->io.hangup)
                        t->io.readable = false;
                t->tls.in.len += (size_t)n;
                turn += (size_t)n;
                t->heard_ms = t->w->now_ms;
                digest(t);
        }
        if (t->io.readable && t->state != TUN_DEAD)
                loop_again(t->w, t);
}

void tun_event(struct tun *t)
{
        switch (t->state) {
        case TUN_CONNECTING:
                if (!t->io.writable)
                        return;
                int error = 0;
                socklen_t length = sizeof(error);
                struct sockaddr_storage local;
                getsockopt(t->io.fd, SOL_SOCKET, SO_ERROR, &error, &length);
                if (error) {
                        tun_fail(t, error == ETIMEDOUT ? FLAG_NETWORK_POLICY : FLAG_CONNECT, strerror(error));
                        return;
                }
                length = sizeof(local);
                if (getsockname(t->io.fd, (struct sockaddr *)&local, &length) == 0)
                        addr_from_sockaddr(&t->local, &local);
                t->state = TUN_HANDSHAKE;
                timer_set(t->w, &t->timer, TIMER_TUN, TIMER_10S);
                if (tls_open(&t->tls, t->identity, false) < 0) {
                        tun_fail(t, FLAG_TLS_FAILURE, "no memory for TLS");
                        return;
                }
                handshake(t);
                break;
        case TUN_HELD:
        case TUN_DEAD:
                return;
        case TUN_HANDSHAKE:
                if (t->server && SSL_in_before(t->tls.ssl))
                        handshake(t);
                break;
        case TUN_OPEN:
                break;
        }
        receive(t);
        if (t->state != TUN_DEAD && t->io.writable && (t->tls.out.len || t->state == TUN_OPEN))
                tun_mark_dirty(t);
}

void tun_expired(struct tun *t)
{
        switch (t->state) {
        case TUN_HELD:
                event_refused(t->w->ev, "held_timeout");
                tun_fail(t, FLAG_IDENTITY_ERROR, "no certificate or record of the pod within 5 s");
                break;
        case TUN_CONNECTING:
                tun_fail(t, FLAG_NETWORK_POLICY,
                         "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008");
                break;
        case TUN_HANDSHAKE:
                tun_fail(t, FLAG_TLS_FAILURE, "TLS handshake took longer than 10 s");
                break;
        case TUN_OPEN:
                if (t->nstreams == 0 && t->nwaiting == 0)
                        tun_retire(t), tun_fail(t, FLAG_NONE, "idle");
                break;
        case TUN_DEAD:
                break;
        }
}

/* Every 10 s: asks a silent peer whether it is there, and looks whether the certificates still hold; every second when
 * their end is near. No tunnel outlives them. */
void tun_ping(struct tun *t)
{
        if (t->state != TUN_OPEN)
                return;
        if (t->until_s <= (int64_t)time(NULL)) {
                tun_fail(t, FLAG_IDENTITY_ERROR, "a certificate of the tunnel has expired");
                return;
        }
        bool silent = t->w->now_ms - t->heard_ms >= 10000;
        if (silent && t->pinged && t->w->now_ms - t->heard_ms >= 30000) {
                tun_fail(t, FLAG_CONNECT, "peer does not answer");
                return;
        }
        if (silent && t->nstreams && !t->pinged) {
                nghttp2_submit_ping(t->h2, NGHTTP2_FLAG_NONE, NULL);
                t->pinged = true;
                tun_mark_dirty(t);
        }
        set_ping(t);
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

static nghttp2_nv header(const char *name, const char *value)
{
        return (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value), NGHTTP2_NV_FLAG_NONE};
}

/* Of another value each time: it would only push others out of the table of headers. */
static nghttp2_nv once(const char *name, const char *value)
{
        nghttp2_nv nv = header(name, value);
        nv.flags = NGHTTP2_NV_FLAG_NO_INDEX;
        return nv;
}

int tun_submit(struct tun *t, struct flow *f)
{
        char forwarded[ENDPOINT_STRLEN + 300], traceparent[64], baggage[512], client[ENDPOINT_STRLEN];
        if (t->state != TUN_OPEN) {
                f->b.tun = t;
                link_add(&t->waiting, &f->member);
                t->nwaiting++;
                return 0;
        }
        endpoint_format(&f->src, client);
        if (f->service_host && *f->service_host)
                snprintf(forwarded, sizeof(forwarded), "for=\"%s\";host=%.255s", client, f->service_host);
        else
                snprintf(forwarded, sizeof(forwarded), "for=\"%s\"", client);
        snprintf(traceparent, sizeof(traceparent), "00-%016llx%016llx-%016llx-00",
                 (unsigned long long)loop_random(t->w), (unsigned long long)loop_random(t->w),
                 (unsigned long long)loop_random(t->w));
        flow_baggage(f, baggage, sizeof(baggage));
        nghttp2_nv headers[] = {
                header(":method", "CONNECT"), header(":authority", f->authority), header("baggage", baggage),
                once("forwarded", forwarded), once("traceparent", traceparent),
        };
        nghttp2_data_provider provider = {.source.ptr = f, .read_callback = on_read_data};
        int32_t id = nghttp2_submit_request(t->h2, NULL, headers, sizeof(headers) / sizeof(*headers), &provider, f);
        if (id < 0)
                return -EPROTO;
        if (id > 1 << 29)
                tun_retire(t);
        f->b.kind = SIDE_STREAM;
        f->b.tun = t;
        f->b.stream = id;
        f->b.window = WINDOW_FIRST;
        link_add(&t->streams, &f->member);
        t->nstreams++;
        timer_stop(&t->timer);
        flow_tunnel_open(f, t);
        tun_mark_dirty(t);
        return 0;
}

void tun_resume(struct side *s)
{
        if (s->kind != SIDE_STREAM)
                return;
        nghttp2_session_resume_data(s->tun->h2, s->stream); /* an error means: not deferred */
        tun_mark_dirty(s->tun);
}

void tun_reset_stream(struct side *s, uint32_t code)
{
        if (s->kind != SIDE_STREAM)
                return;
        nghttp2_submit_rst_stream(s->tun->h2, NGHTTP2_FLAG_NONE, s->stream, code);
        tun_forget(s);
}

void tun_forget(struct side *s)
{
        if (s->kind != SIDE_STREAM)
                return;
        nghttp2_session_set_stream_user_data(s->tun->h2, s->stream, NULL);
        struct flow *f = s->is_b ? container(s, struct flow, b) : container(s, struct flow, a);
        link_remove(&f->member);
        s->tun->nstreams--;
        if (s->tun->nstreams == 0 && s->tun->nwaiting == 0 && s->tun->state == TUN_OPEN)
                rest(s->tun);
        tun_mark_dirty(s->tun);
        s->kind = SIDE_NONE;
}

void tun_taken(struct side *s, size_t n)
{
        if (s->kind != SIDE_STREAM)
                return;
        struct tunnel *engine = s->tun->w->engine;
        nghttp2_session_consume_stream(s->tun->h2, s->stream, n);
        s->drained += (uint32_t)n;
        if (s->drained >= s->window && s->window < WINDOW_MOST &&
            atomic_load_explicit(&s->tun->pod->buffered, memory_order_relaxed) < engine->config.pod_budget &&
            atomic_load_explicit(&engine->buffered, memory_order_relaxed) < engine->config.engine_budget) {
                s->window *= 2;
                s->drained = 0;
                nghttp2_session_set_local_window_size(s->tun->h2, NGHTTP2_FLAG_NONE, s->stream, (int32_t)s->window);
        }
        tun_mark_dirty(s->tun);
}

int tun_respond(struct side *s, struct flow *f, int status)
{
        char text[16], baggage[512];
        if (s->kind != SIDE_STREAM)
                return -EPIPE;
        snprintf(text, sizeof(text), "%d", status);
        flow_baggage(f, baggage, sizeof(baggage));
        nghttp2_nv headers[] = {header(":status", text), header("baggage", baggage)};
        nghttp2_data_provider provider = {.source.ptr = f, .read_callback = on_read_data};
        int result = nghttp2_submit_response(s->tun->h2, s->stream, headers, status == 200 ? 2 : 1,
                                             status == 200 ? &provider : NULL);
        tun_mark_dirty(s->tun);
        return result == 0 ? 0 : -EPROTO;
}
