/* SPDX-License-Identifier: Apache-2.0 */
/* May this connection reach that workload? One decision function for inbound HBONE, inbound plaintext and same node. */
#ifndef SIDESTEP_RBAC_H
#define SIDESTEP_RBAC_H

#include "mesh.h"

struct policy_record;

struct rbac_request {
        const char *identity; /* of the peer, NULL: none; what is no SPIFFE URI is none */
        struct endpoint source;
        struct endpoint destination; /* the application's address and port */
};

enum rbac_reason {
        RBAC_OPEN,         /* no policy selects the workload */
        RBAC_NOT_DENIED,   /* no policy denies, and there is none that allows some only */
        RBAC_ALLOWED,      /* policy, rule */
        RBAC_DENIED,       /* policy, rule */
        RBAC_NOT_ALLOWED,  /* none of those that allow; policy: the first of them */
        RBAC_NOT_RECEIVED, /* policy: its record names one that has not come yet */
};

/* Names are valid as long as the view. */
struct rbac_verdict {
        bool allow;
        enum rbac_reason reason;
        const char *policy;  /* "namespace/name", "" where none decided */
        int rule;            /* its number in the policy, -1 */
        const char *dry_run; /* the first dry run that would have denied, NULL */
};

void rbac_decide(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req,
                 struct rbac_verdict *out);

/* Calls back for every policy that is considered, at most `most`, with the number of its first rule that matches, or
 * -1. */
void rbac_consider(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req, unsigned most,
                   void (*each)(void *arg, const struct policy_record *p, int rule), void *arg);

/* Why a rule does not match: a bit for each list (enum policy_list, and its negation) that stands in the way, in any
 * match of any clause that does not hold; bit LISTS: a match that asks for nothing, which never holds. */
unsigned rbac_missed(const struct policy_record *p, unsigned rule, const struct rbac_request *req);

/* The reason in words, cut at n; before the policy's name where that belongs there. */
const char *rbac_text(const struct rbac_verdict *verdict, char *out, size_t n);

#endif
