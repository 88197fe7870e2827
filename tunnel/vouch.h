/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Vouched flows: pairs of this node's pods, and of its pods with destinations outside the mesh, that the engine has
 * allowed, and that the programs in the pods then let pass natively (bpf/capture.bpf.c). Whatever may take an allowance
 * back is told here.
 */
#ifndef SIDESTEP_VOUCH_H
#define SIDESTEP_VOUCH_H

#include <stdio.h>
#include "loop.h"

struct pod;
struct vouch;

struct vouch *vouch_new(struct tunnel *t);
/* Takes the allowances back; flows that are open go on. */
void vouch_free(struct vouch *v);

/* Control thread. Off: nothing new, and what was allowed is taken back; open flows go on. */
void vouch_enable(struct vouch *v, bool on);
/* fds: verdicts, fates, slots, flows, ended (bpf/loader.h, capture_vouch). Flows that are open already, allowed by an
 * engine before this one, are taken over. */
int vouch_pod(struct vouch *v, struct pod *p, const int *fds);
/* No new flow from or to this pod. */
void vouch_pod_draining(struct vouch *v, struct pod *p);
/* It is not who it was: its flows end. */
void vouch_pod_cut(struct vouch *v, struct pod *p);
void vouch_pod_gone(struct vouch *v, struct pod *p);
/* Lets the node's maps go when no pod is left. */
void vouch_idle(struct vouch *v);
void vouch_identity_gone(struct vouch *v, const char *uri);
/* The newest state of the mesh is in force with every worker: what it denies is cut before this returns, what it
 * leaves open is decided anew for the next connection. */
void vouch_review(struct vouch *v);
/* Brings the counters up to date. */
void vouch_count(struct vouch *v);
/* Calls back for each open flow. */
struct vouch_seen {
        const char *pod, *namespace_, *identity_peer; /* of the end that is looked at; of the other */
        bool inbound;                                 /* the end that opened it is no pod of ours any more */
        struct endpoint src, dst;
        uint64_t sent, received, age_ms;
};
void vouch_each(struct vouch *v, void (*each)(void *arg, const struct vouch_seen *flow), void *arg);

/* Workers. A connection of this pair was allowed just now, by the worker's view. until_s: the first of both
 * certificates ends. */
struct vouch_pair {
        struct pod *source, *target;
        struct addr src;
        struct endpoint dst;
        const struct workload *src_workload, *dst_workload;
        int64_t until_s;
};
void vouch_allow(struct vouch *v, struct worker *w, const struct vouch_pair *pair);
/* Is what came to the inbound listener a vouched flow whose note was lost? */
/* A connection to a destination outside the mesh was let go there just now. */
struct vouch_outside {
        struct pod *source;
        struct addr src;
        struct endpoint dst;
        const struct workload *src_workload;
        const struct route *route;
        int64_t until_s;
};
/* Whether a route leaves the mesh, for the very destination that was asked for; then the kernel can go it alone. */
bool vouch_leaves_mesh(const struct route *r, const struct endpoint *dst);
void vouch_allow_outside(struct vouch *v, struct worker *w, const struct vouch_outside *what);
bool vouch_is_late(struct vouch *v, const struct endpoint *src, const struct endpoint *dst);

#endif
