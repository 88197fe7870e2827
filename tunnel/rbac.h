/* SPDX-License-Identifier: Apache-2.0 */
/* May this connection reach that workload? One decision function for inbound HBONE, inbound plaintext and same node. */
#ifndef SIDESTEP_RBAC_H
#define SIDESTEP_RBAC_H

#include "mesh.h"

struct rbac_request {
        const char *identity; /* of the peer, NULL: none */
        struct endpoint source;
        struct endpoint destination; /* the application's address and port */
};

struct rbac_verdict {
        bool allow;
        const char *policy; /* "namespace/name" that decided, "" when none did */
};

void rbac_decide(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req,
                 struct rbac_verdict *out);

#endif
