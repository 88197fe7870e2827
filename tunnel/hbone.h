/* SPDX-License-Identifier: Apache-2.0 */
/* A tunnel: one TLS connection with HTTP/2 CONNECT streams inside, of one pod, as client or as server. */
#ifndef SIDESTEP_HBONE_H
#define SIDESTEP_HBONE_H

#include <nghttp2/nghttp2.h>
#include "conn.h"
#include "loop.h"
#include "tls.h"

#define HBONE_PORT 15008
#define TUN_STREAMS_SERVER 200
#define TUN_STREAMS_CLIENT 100
#define FRAME_PAYLOAD 16375   /* with its header of 9 bytes one TLS record */
#define TUN_QUEUE (128 << 10) /* sealed bytes waiting for the socket, beyond which no stream is asked for more */
#define WINDOW_FIRST (256 << 10)
#define SETTINGS_EARLY 0xed01 /* value 1 from a server: docs/interfaces.md, HBONE */
#define WINDOW_MOST (4 << 20)

enum tun_state { TUN_HELD, TUN_CONNECTING, TUN_HANDSHAKE, TUN_OPEN, TUN_DEAD };

struct tun {
        struct io io;
        struct worker *w;
        struct pod *pod;
        enum tun_state state;
        bool server, no_new, pinged, in_h2;
        bool early; /* client: the peer takes bytes before it has answered CONNECT */
        struct tls tls;
        nghttp2_session *h2;
        struct identity *identity;
        char peer[TLS_URI_MAX];
        struct endpoint remote, local;
        int64_t until_s;          /* earliest end of both chains, wall clock */
        uint8_t root[TLS_DIGEST]; /* that the peer's chain ends with */
        /* client: whom it is for */
        uint64_t record;
        char **sans;
        unsigned nsans;
        struct link seat, dirty, unread, pool, held, dead;
        struct link streams, waiting; /* flows, link `member` */
        unsigned nstreams, nwaiting, most;
        unsigned early_resets;
        struct timer timer, ping;
        uint64_t heard_ms, opened_ms, key_updates;
};

/* NULL: another worker has it now, or it is closed. */
struct tun *tun_accept(struct worker *w, struct pod *p, int fd, const struct endpoint *remote,
                       const struct endpoint *local);
/* pool.c: the flow gets a stream now or waits for one; 0 or -errno. */
int pool_open(struct flow *f, const struct route *r, struct identity *i);
int tun_dial(struct worker *w, struct pod *p, struct identity *i, const struct endpoint *hop, struct tun **out);
/* The flow waits no more. */
void pool_give_up(struct flow *f);
/* The mesh changed: is the tunnel still for the right peer, with the right certificate? */
void pool_review(struct tun *t);
bool tun_has_room(const struct tun *t);
int tun_submit(struct tun *t, struct flow *f);

void tun_event(struct tun *t);
void tun_expired(struct tun *t);
void tun_ping(struct tun *t);
void tun_fail(struct tun *t, enum event_flag flag, const char *why);
void tun_mark_dirty(struct tun *t);
void tun_flush_dirty(struct worker *w);
void tun_free_dead(struct worker *w);
/* The identity of a held server tunnel may be there now. */
void tun_try_start(struct tun *t);
/* No new streams from now on; ends when the last one does. */
void tun_retire(struct tun *t);
/* The identity of its pod has another certificate (NULL: none): retired, or cut where its peer is not trusted now. */
void tun_recertified(struct tun *t, const struct identity *now);

/* For a flow's stream. */
void tun_resume(struct side *s);
void tun_reset_stream(struct side *s, uint32_t code);
void tun_taken(struct side *s, size_t n);
/* The flow has ended in order: the stream ends by itself. */
void tun_forget(struct side *s);
int tun_respond(struct side *s, struct flow *f, int status);

#endif
