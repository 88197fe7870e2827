/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records: what one istio.workload.Address or istio.security.Authorization says, decoded and checked.
 *
 * A record is one block, immutable once a reader may see it. Strings that are its own are packed behind it, those that
 * many share are interned.
 */
#ifndef SIDESTEP_RECORD_H
#define SIDESTEP_RECORD_H

#include "intern.h"
#include "mesh.h"
#include "proto.h"

/* What all records have; only the writer looks at it. */
struct record {
        const char *name, *version;
        uint64_t body_hash;
        uint64_t seen; /* generation of the last full batch that named it */
        uint32_t body_len;
};

struct port_pair {
        uint16_t service, target;
};

/* A workload is an endpoint of this service. */
struct membership {
        const char *service; /* "namespace/hostname", interned */
        const struct port_pair *ports;
        unsigned nports;
};

struct workload_record {
        struct workload w; /* first: readers get a pointer to this */
        struct record r;
        const struct membership *services;
        unsigned nservices;
        uint8_t rank; /* among workloads of one address, ztunnel.md 1.4 */
};

struct vip {
        const char *network; /* interned */
        struct addr addr;
        uint8_t prefix; /* in the mapped form: 128 is one address */
};

enum lb_mode { LB_ANY, LB_STRICT, LB_FAILOVER, LB_PASSTHROUGH };
enum lb_scope { SCOPE_REGION = 1, SCOPE_ZONE, SCOPE_SUBZONE, SCOPE_NODE, SCOPE_CLUSTER, SCOPE_NETWORK };
enum ip_families { FAMILIES_ANY, FAMILIES_V4, FAMILIES_V6, FAMILIES_BOTH };
#define LB_SCOPES_MAX 8

struct service_record {
        struct record r;
        const char *key; /* "namespace/hostname", interned: equal to membership.service */
        const char *name, *namespace_, *hostname;
        const struct vip *vips;
        const struct port_pair *ports; /* target 0: each endpoint says */
        const char *const *sans;
        unsigned nvips, nports, nsans;
        uint8_t scopes[LB_SCOPES_MAX], nscopes;
        uint8_t mode, families;
        bool allow_unhealthy, canonical, namespace_only, has_waypoint;
};

enum policy_scope { POLICY_GLOBAL, POLICY_NAMESPACE, POLICY_SELECTOR };

/* A policy as rbac.c reads it: rules are alternatives, the clauses of a rule must all hold, the matches of a clause are
 * alternatives, the lists of a match must all hold. */
struct policy_range {
        uint32_t first, count;
};

struct policy_rule {
        struct policy_range clauses;
};

struct policy_clause {
        struct policy_range matches;
};

enum policy_text_kind { TEXT_EXACT, TEXT_PREFIX, TEXT_SUFFIX, TEXT_PRESENCE };

struct policy_text {
        const char *text;
        uint32_t len;
        enum policy_text_kind kind;
};

struct policy_net {
        struct addr base, mask; /* base & mask == base */
        uint8_t prefix;         /* in the mapped form */
        bool v4;
};

struct policy_account {
        const char *namespace_, *account;
        uint32_t namespace_len, account_len;
};

/* In the order of the wire: each positive list, then its negation. */
enum policy_list {
        LIST_NAMESPACES,
        LIST_PRINCIPALS = 2,
        LIST_SOURCE_IPS = 4,
        LIST_DESTINATION_IPS = 6,
        LIST_PORTS = 8,
        LIST_ACCOUNTS = 10,
        LISTS = 12
};

extern const char *const policy_list_names[LISTS]; /* in ztunnel's words */

struct policy_match {
        struct policy_range lists[LISTS];
};

struct policy_record {
        struct record r;
        const char *name, *home; /* as the body says: its name, and the namespace it lives in */
        const char *namespace_;  /* interned; where it applies: "" for mesh-wide ones */
        enum policy_scope scope;
        bool deny, dry_run;
        const char *undecodable; /* static reason: this stands for one that could not be decoded; else NULL */
        uint64_t serial;         /* no two records have the same */
        unsigned nrules;
        const struct policy_rule *rules;
        const struct policy_clause *clauses;
        const struct policy_match *matches;
        const struct policy_text *texts;
        const struct policy_net *nets;
        const uint16_t *ports;
        const struct policy_account *accounts;
};

/* Room for decoding, kept between records. */
struct decoder;
struct decoder *decoder_new(void);
void decoder_free(struct decoder *d);

/* Each returns NULL and stores the record(s), or a static reason and stores nothing. Of an address exactly one of the
 * two is set. The name must be the one that the body says. */
const char *record_address(struct decoder *d, struct interns *in, struct bytes name, struct bytes version,
                           struct bytes body, struct workload_record **workload, struct service_record **service);
const char *record_policy(struct interns *in, struct bytes name, struct bytes version, struct bytes body,
                          struct policy_record **policy);
/* Stands for a policy that could not be decoded, for the static reason: denies the namespace that its name begins with,
 * everything where that is the root namespace or the name has none. */
struct policy_record *record_stand_in(struct interns *in, struct bytes name, const char *root_namespace,
                                      const char *reason);

void record_free_workload(struct interns *in, struct workload_record *w);
void record_free_service(struct interns *in, struct service_record *s);
void record_free_policy(struct interns *in, struct policy_record *p);

/* Of both kinds: names are lines of the list of versions. */
const char *record_check_name(struct bytes name);
void record_fill(struct interns *in, struct record *r, struct bytes body);

#endif
