/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. The one place where it is decided whether a connection may reach a workload: for inbound HBONE,
 * for inbound plaintext and for two pods of one node. A pure function of the view and the request; it allocates nothing
 * and waits for nothing.
 *
 * Policies are not evaluated yet; evaluation (reference ztunnel.md 5) belongs here and nowhere else. Until then a
 * workload that any enforced policy selects is closed: an ALLOW policy might not name this peer, a DENY policy might. A
 * policy that the record names and that has not come yet closes it too. Without a policy everything is allowed, as in
 * every mesh of this kind.
 */
#include "rbac.h"

void rbac_decide(const struct mesh_view *v, const struct workload *dst, const struct rbac_request *req,
                 struct rbac_verdict *out)
{
        const char *policy = view_policy_for(v, dst);
        (void)req;
        out->allow = !policy;
        out->policy = policy ? policy : "";
}
