/* SPDX-License-Identifier: Apache-2.0 */
/* What was denied, for whoever asks why: the last denials of the engine, and counters by policy. */
#ifndef SIDESTEP_DENIAL_H
#define SIDESTEP_DENIAL_H

#include "mesh.h"

struct denials;

/* One connection that was denied or cut. Everything is copied, texts cut where they are too long. */
struct denial {
        const char *namespace_, *pod, *pod_uid; /* of the pod at whose door it was */
        bool outbound;                          /* told by the other node: no policy is known */
        struct endpoint src, dst;
        const char *identity, *policy, *reason; /* "" where there is none */
        const struct workload *workload;        /* the destination's record, for the counter; may be NULL */
};

/* writers: the engine's workers, and one more for all other threads. */
struct denials *denials_new(unsigned writers);
void denials_free(struct denials *d);
/* writer: a worker's index. Waits for nobody but a reader, no longer than a copy takes. */
void denials_add(struct denials *d, unsigned writer, const struct denial *what);
/* A dry run would have denied: counted only. */
void denials_dry_run(struct denials *d, unsigned writer, const char *policy, const struct workload *w);
/* Whether the policy of a dry run that would deny (NULL: none) is another one than *told, which becomes it. */
bool denial_is_news(uint64_t *told, const char *policy);
/* sidestep_policy_denied_total and sidestep_policy_dry_run_denied_total as Prometheus text. */
int denials_metrics(struct denials *d, int fd);
/* A JSON array, the newest last. */
int denials_dump(struct denials *d, int fd);

#endif
