/* SPDX-License-Identifier: Apache-2.0 */
/* Pods and identities as the engine has them: shared by the workers, counted, immutable but for the atomics. */
#ifndef SIDESTEP_POD_H
#define SIDESTEP_POD_H

#include "loop.h"
#include "tls.h"
#include "tunnel.h"

enum role { ROLE_OUTBOUND, ROLE_INBOUND, ROLE_HBONE, ROLES }; /* the slots of bpf/maps.h */

struct listener {
        struct io io;
        enum role role;
        struct seat *seat;
        struct link dead;
};

#define POD_TUPLES 512 /* buckets */

/* Ends of connections in the pod's namespace that must not meet: see pod_tuple_*. One cache line of a bucket. */
struct tuples {
        atomic_uint_least64_t mark[7]; /* 0: free */
        _Atomic(struct tuples *) next;
};

struct pod {
        atomic_uint refs;
        struct link link; /* the engine's list; control thread only */
        char *uid, *namespace_, *name, *service_account, *workload, *identity;
        struct addr addresses[16];
        unsigned naddresses;
        uint64_t netns_cookie, netns_ino;
        int netns, engine_sk, listeners_map;
        struct tunnel_ports ports;
        bool ipv6;
        bool paces;        /* the namespace's congestion control would pace what the engine sends: see unpaced() */
        int fds[ROLES][8]; /* until the workers have taken them */

        atomic_int mode;
        atomic_bool complete; /* once everything that decides about its connections was there */
        atomic_uint_least64_t connections, held, buffered, last_ms;
        atomic_bool vouched;    /* it gave its maps to vouch.c: connections of others need not ask there */
        unsigned outside;       /* allowances for destinations outside the mesh; vouch.c, under its lock */
        atomic_uint tunnels[8]; /* that have come here, by worker */
        struct tuples *tuples;  /* POD_TUPLES of them, which more hang on */
        uint64_t tuple_seed;
};

/* To be called once, before the first worker: the way back from the pods' namespaces. */
int netns_remember(void);

struct pod *pod_ref(struct pod *p);
void pod_unref(struct pod *p);
bool pod_has(const struct pod *p, const struct addr *a);
bool pod_owns_port(const struct pod *p, uint16_t port);

/* A socket inside the pod's namespace, -errno. */
int pod_socket(const struct pod *p, int family, int type, int protocol);

/* Opens the listeners of all workers in the pod's namespace; puts them in service. */
int pod_open(struct pod *p, unsigned workers, char *error, size_t n);
int pod_serve(struct pod *p);
/* Other maps than before: every listener is marked in them and put in service there. */
int pod_revive(struct pod *p, int listeners_map, int engine_sk, unsigned workers);

/* A TCP socket in the pod's namespace, marked as the engine's, on its way to `to`. source NULL: the pod's own address;
 * source->port 0: any. All but tunnels reset when they are closed early. -errno. */
enum aim { AIM_APPLICATION, AIM_OUTSIDE, AIM_TUNNEL };
int pod_connect(struct pod *p, const struct endpoint *source, const struct endpoint *to, enum aim aim);

/* Tuples: (address, port) of each client of an open plaintext connection, and of each socket of the engine towards an
 * application. An accepted socket that comes from a tuple of our own is our own SYN whose tag was lost. All workers, no
 * lock: see listen.c. */
void pod_tuple_add(struct pod *p, const struct endpoint *e, bool own);
void pod_tuple_remove(struct pod *p, const struct endpoint *e, bool own);
bool pod_tuple_is_own(struct pod *p, const struct endpoint *e);
/* A port for (client address) that no open connection of it has; 0: none found. Added as own. */
uint16_t pod_tuple_port(struct pod *p, const struct addr *client, uint64_t random);

/* Per worker. */
struct seat *seat_of_workload(struct worker *w, const char *workload);
struct held_identity {
        struct link link;
        struct identity *identity;
};
struct identity *worker_identity(struct worker *w, const char *uri);

struct tunnel {
        struct tunnel_config config;
        unsigned nworkers;
        struct worker workers[8];
        struct mesh *mesh;
        struct event *event;
        struct denials *denials;
        struct link pods; /* control thread */
        struct link identities;
        char trust_domain[256];
        atomic_int same_node_mtls;
        struct vouch *vouch;
        atomic_bool whole; /* the agent has given all that it had to give */
        atomic_uint_least64_t fds, fd_limit, buffered;
        uint64_t started_s;
};

#endif
