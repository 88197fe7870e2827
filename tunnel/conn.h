/* SPDX-License-Identifier: Apache-2.0 */
/* One connection of an application: where it comes from, where it goes, the bytes between. */
#ifndef SIDESTEP_CONN_H
#define SIDESTEP_CONN_H

#include "buf.h"
#include "loop.h"
#include "tls.h"

struct listener;
struct seat;

enum flow_state {
        FLOW_NEW,        /* accepted, not looked at yet */
        FLOW_HELD,       /* waits for its pod's state (5 s) */
        FLOW_UNKNOWN,    /* waits for a record of its destination (1 s) */
        FLOW_CONNECTING, /* b is on its way */
        FLOW_WAITING,    /* for a tunnel */
        FLOW_ASKED,      /* CONNECT was sent */
        FLOW_RELAY,
        FLOW_DEAD,
};
enum flow_way { WAY_OUTBOUND, WAY_INBOUND_PLAIN, WAY_INBOUND_HBONE };
enum side_kind { SIDE_NONE, SIDE_SOCKET, SIDE_STREAM };

/* One end of a flow. `out` holds what is to be sent to it. */
struct side {
        struct io io;
        bool is_b;
        enum side_kind kind;
        struct tun *tun;
        int32_t stream;
        bool ended;   /* it will send no more */
        bool closing; /* it was told that no more will come */
        bool fresh;   /* stream: a window update is due to its growth */
        uint32_t window, drained;
        struct buf out;
        size_t kept;    /* stream: of out, sent ahead of the answer and kept until it comes */
        size_t counted; /* of out.cap in the budgets */
        int left;       /* a dissolved socket that is still to be closed, or -1 */
};

struct flow {
        struct worker *w;
        struct pod *pod, *target; /* target: the other pod of a same-node flow */
        enum flow_state state;
        enum flow_way way;
        bool by_hbone, local, tuple_src, tuple_own;
        bool unsent, retried; /* the request never left, or was refused unseen; it was given to another tunnel */
        bool early;           /* ASKED: bytes may go ahead of the answer */
        bool owes;            /* RELAY: the answer is not sent yet, it goes with the first bytes */
        struct side a, b;     /* a opened it */
        struct endpoint src, dst, hop;
        struct endpoint own; /* bound source of b towards an application */
        struct endpoint app; /* where policy decides: the application's address and port */
        char *authority, *service_host, *service_name, *service_namespace;
        char *method;                                /* of a request that is being read */
        char *peer;                                  /* identity of the other side, where one was proved; owned */
        struct link seat, ready, wait, member, dead; /* member: of its tunnel */
        struct link judged;                          /* at the destination's seat, once it was let in */
        struct link owed;                            /* at its worker, while it owes */
        uint64_t epoch;                              /* the seat's, by which it was */
        struct timer timer;
        uint64_t opened_ms, last_ms, sent, received; /* a to b, b to a */
        uint64_t owed_ms;                            /* since when it owes */
        uint64_t told_sent, told_received;           /* of these, what the counters have */
        struct event_set *set[2];                    /* source's, destination's view */
        const char *policy;                          /* that ends it; NULL unless it is ending */
        uint64_t dry_run;                            /* which one it was last told that it denies; a hash, 0: none */
};

static inline struct side *side_of(struct io *io)
{
        return container(io, struct side, io);
}

void conn_accept(struct worker *w, struct listener *l);
/* The mesh, a pod or an identity changed: what waits is looked at again. */
void conn_state_changed(struct worker *w);
/* Judges anew, as many as one turn allows, connections that a change of the mesh may end; worker.stale has the rest. */
void conn_review(struct worker *w);
/* For a new seat: what decides about its connections, as of now. */
void conn_seat(struct worker *w, struct seat *seat);
void conn_abort_all(struct worker *w);
void conn_abort_seat(struct worker *w, struct seat *seat);
/* Frees what has ended. Sockets whose RST has left are closed later, some each turn, by a worker that has nothing else
 * to do. Returns whether more are due now. */
#define LEAVE_IDLE_MS 20
bool conn_free_dead(struct worker *w, bool idle);

void flow_event(struct side *s);
void flow_run(struct flow *f);
void flow_ready(struct flow *f);
void flow_expired(struct flow *f);
/* Sends the answers that have waited for bytes long enough. */
void conn_answer(struct worker *w);
uint64_t conn_answer_due(const struct worker *w);
/* Brings the counters up to date: a scrape shows connections that are still open. */
void flow_count(struct flow *f);
/* Ends it at once: sockets with RST, streams with RST_STREAM. */
void flow_reset(struct flow *f, enum event_flag flag, const char *why);

/* From hbone.c. */
struct flow *flow_from_stream(struct tun *t, int32_t stream);
void flow_request(struct flow *f); /* every header is there */
/* Answers the stream with a status and ends the flow. */
void flow_deny(struct flow *f, int status, enum event_flag flag, const char *why);
void flow_answer(struct flow *f, int status);
void flow_tunnel_open(struct flow *f, struct tun *t);
void flow_tunnel_lost(struct flow *f, enum event_flag flag, const char *why);
void flow_stream_closed(struct flow *f, uint32_t code);
/* Bytes for the other side. false: over budget or no memory. */
bool flow_data(struct flow *f, const uint8_t *bytes, size_t n);
/* The own side of a flow for the header `baggage` (reference/ztunnel.md 2.3). */
void flow_baggage(struct flow *f, char *out, size_t n);

static inline struct side *flow_stream_side(struct flow *f)
{
        return f->way == WAY_INBOUND_HBONE ? &f->a : &f->b;
}
static inline struct side *flow_other(struct flow *f, const struct side *s)
{
        return s == &f->a ? &f->b : &f->a;
}

#endif
