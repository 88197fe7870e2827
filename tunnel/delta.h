/* SPDX-License-Identifier: Apache-2.0 */
/* envoy.service.discovery.v3.DeltaDiscoveryResponse as it came: the records that it brings and takes away. */
#ifndef SIDESTEP_DELTA_H
#define SIDESTEP_DELTA_H

#include "proto.h"

struct delta {
        struct bytes message, type_url, nonce;
        uint64_t resources, removed;
};

struct delta_resource {
        struct bytes name, version, body;
};

/* Looks at all of it. -EBADMSG: it is no such message. The bytes stay the caller's, and must stay. */
int delta_open(struct delta *d, struct bytes message);
/* Each walks from at (the message at first), and returns false at the end. */
bool delta_removed(struct bytes *at, struct bytes *name);
bool delta_resource(struct bytes *at, struct delta_resource *out);

#endif
