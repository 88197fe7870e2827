/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the mesh looks like: workloads, services, policies, and the way to an address.
 *
 * One writer (the control thread) builds, many workers read. mesh_apply() clones the touched shards and publishes a new
 * view; a worker adopts it with mesh_view() at the top of its loop and uses it until the next call. A connection copies
 * what it needs out of a view and holds no pointer into one across loop iterations. mesh_sync() returns once every
 * worker has said mesh_in_force(): it has moved on, and so have the connections that it had decided.
 */
#ifndef SIDESTEP_MESH_H
#define SIDESTEP_MESH_H

#include "addr.h"

struct mesh;
struct mesh_view;
struct tunnel_settings;
struct tunnel_delta;

enum mesh_protocol { MESH_PLAIN, MESH_HBONE };

/* A workload as the workers read it. Strings live as long as the view. */
struct workload {
        const char *uid, *name, *namespace_, *service_account, *trust_domain, *network, *node, *cluster_id;
        const char *canonical_name, *canonical_revision, *workload_name, *workload_type;
        const char *region, *zone, *subzone;
        const char *identity; /* spiffe://TD/ns/NS/sa/SA */
        const struct addr *addrs;
        unsigned naddrs;
        const char *const *policies; /* names of the selector policies */
        unsigned npolicies;
        enum mesh_protocol protocol;
        bool healthy, has_waypoint, host_network, app_tunnel;
        uint32_t capacity;
        uint64_t record; /* changes when the record changes: tunnels to it are then not reused */
};

/* What a connection that was addressed to (dst) should do. Everything is valid as long as the view. */
enum route_kind {
        ROUTE_PLAIN,   /* clear text to next_hop */
        ROUTE_HBONE,   /* tunnel to next_hop (port 15008), CONNECT authority target */
        ROUTE_REFUSE,  /* reason says why */
        ROUTE_UNKNOWN, /* inside the cluster's ranges without a record: hold, then refuse */
};

#define ROUTE_SANS 64 /* a service with more is refused as a record */

/* Not to be copied by assignment: sans may point into san_space. */
struct route {
        enum route_kind kind;
        const struct workload *dst; /* NULL: outside the mesh */
        struct endpoint target;     /* the workload's address and port, after service translation */
        struct endpoint next_hop;
        const char *service_host, *service_name, *service_namespace; /* "" when not addressed by service */
        const char *const *sans; /* identities the peer may have: the workload's, then the service's */
        unsigned nsans;
        const char *reason; /* static */
        const char *san_space[ROUTE_SANS];
};

int mesh_new(struct mesh **out, unsigned readers);
void mesh_free(struct mesh *m);
int mesh_settings(struct mesh *m, const struct tunnel_settings *s);

/* Writer. One batch, all or nothing in framing; single records that cannot be decoded are reported as "name: reason\n".
 */
int mesh_apply(struct mesh *m, const uint8_t *batch, size_t len, char *report, size_t report_len);
/* The same from a delta-xDS response as it came: what it takes away first, then what it brings. told: what the response
 * says of itself. One of another type changes nothing. A policy whose name is empty or too long comes under another. */
#define MESH_ADDRESS "type.googleapis.com/istio.workload.Address"
#define MESH_AUTHORIZATION "type.googleapis.com/istio.security.Authorization"
int mesh_apply_delta(struct mesh *m, const uint8_t *message, size_t len, struct tunnel_delta *told, char *report,
                     size_t report_len);
/* Writer: waits until the newest view is in force with every reader (wake is called for each with which it is not, to
 * get it out of epoll), frees older ones. -ETIMEDOUT after MESH_SYNC_MS: a reader is stuck; the state is published all
 * the same, and what it may hold is kept. */
#define MESH_SYNC_MS 10000
int mesh_sync(struct mesh *m, void (*wake)(void *arg, unsigned reader), void *arg);
/* Writer. "workloads", "services", "policies": a JSON array; "versions": lines "address NAME VERSION" and "policy NAME
 * VERSION". */
int mesh_dump(struct mesh *m, const char *what, int fd);
struct mesh_counts {
        uint64_t workloads, services, policies;
};
void mesh_counts(struct mesh *m, struct mesh_counts *out); /* Writer. */

/* Reader, worker (reader): adopts and returns the newest view. Never blocks, takes no lock. */
const struct mesh_view *mesh_view(struct mesh *m, unsigned reader);
/* The reader has put the view that it adopted last into force: nothing that it decided by an older one is left. */
void mesh_in_force(struct mesh *m, unsigned reader);
/* A reader that sleeps or ends holds no view. */
void mesh_leave(struct mesh *m, unsigned reader);

uint64_t view_generation(const struct mesh_view *v);
const struct workload *view_workload(const struct mesh_view *v, const char *uid);
const struct workload *view_workload_at(const struct mesh_view *v, const struct addr *a); /* own network */
/* reference/ztunnel.md 1.3 to 1.5. random: one 64-bit random number per call. */
void view_route(const struct mesh_view *v, const struct workload *src, const struct endpoint *dst, uint64_t random,
                struct route *out);
/* For inbound labels: the first service of the workload whose target port is this one. "" where none. */
void view_inbound_service(const struct mesh_view *v, const struct workload *w, uint16_t port, struct route *out);
/* The first policy that the record names and that has not been received, NULL: none. */
const char *view_policy_missing(const struct mesh_view *v, const struct workload *w);
/* A number that changes when anything changes that decides about connections to this workload: its record, the policies
 * that select it. namespace_: where it is looked for while there is no record. */
uint64_t view_stamp(const struct mesh_view *v, const char *uid, const char *namespace_);

#endif
