/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loads the programs of one pod, attaches them in its network namespace, changes their mode, looks whether they are
 * still there.
 *
 * A pod's instance is named by its directory of pins (BPFDIR/v3/POD_UID, on a bpffs). All functions return 0 (or what
 * is said) or -errno and then write one line into error (of CAPTURE_ERROR_LEN bytes). All are idempotent: a crash in
 * the middle is finished by the same call again. Those with a netns enter it in the calling thread and come back (the
 * process aborts if that fails): call them from a thread that has nothing else to do with namespaces. Not thread-safe
 * for the same pod.
 */
#ifndef SIDESTEP_LOADER_H
#define SIDESTEP_LOADER_H

#include <stddef.h>
#include <stdint.h>
#include "maps.h"

/* cdef begin */
#define CAPTURE_ERROR_LEN 512
#define CAPTURE_LAYOUT "v3" /* v2 and v1 are known to capture_upgrade */

/* What capture_verify finds missing. */
#define CAPTURE_NO_PINS 1
#define CAPTURE_NO_OUT_ETH 2
#define CAPTURE_NO_IN_LO 4
#define CAPTURE_NO_OUT_LO 8
#define CAPTURE_NO_STEER 16
#define CAPTURE_NO_ROUTE4 32
#define CAPTURE_NO_ROUTE6 64
#define CAPTURE_NO_ACCEPT_LOCAL 128
#define CAPTURE_NO_IN_ETH 256

/* Loads programs and maps, pins them; attaches nothing. addresses: comma separated, both families; they replace those
 * from before. */
int capture_prepare(const char *pins, const char *addresses, char *error);
/* Takes over the instance that an agent of a layout before pinned in `from`: the maps that are the same in both
 * layouts stay what they are, so the engine's sockets stay in service; sk_lookup's program is exchanged in one step;
 * the pins of before go. Capture lets nothing through meanwhile. The tc filters are still the ones of before:
 * capture_verify misses them, capture_set_mode exchanges them. Also where `from` is not there (any more). */
int capture_upgrade(const char *from, const char *pins, char *error);
/* The fds of `listeners` and `engine_sk`; the caller closes them. */
int capture_maps(const char *pins, int *listeners, int *engine_sk, char *error);
/* What the engine needs to vouch for flows: fds of `verdicts`, `fates`, the node's `slots`, iterator `flows` and
 * `ended`; the caller closes them. Needs BTF of the kernel. */
int capture_vouch(const char *pins, int fds[VOUCH_FDS], char *error);
/* Gives accepted sockets that have said nothing their fate, and takes SYNs out that became no socket. netns -1: it is
 * gone. */
int capture_sweep(const char *pins, int netns, char *error);
/* Takes notes out that nobody took; node: as below. */
int capture_sweep_notes(const char *node, char *error);
/* Attaches what is not attached, in the order that lets nothing through (strict) or breaks nothing (lenient), and sets
 * the mode (enum capture_mode: STRICT, LENIENT, DRAINING). To LENIENT: -EAGAIN while connections from before are half
 * open; call again. */
int capture_set_mode(const char *pins, int netns, const char *interface, int mode, char *error);
/* The mode, and the inode of the namespace in which it is attached (0: nowhere). -ENOENT: no such instance. */
int capture_read(const char *pins, uint32_t *mode, uint64_t *netns_ino, char *error);
/* >= 0: CAPTURE_NO_*. */
int capture_verify(const char *pins, int netns, const char *interface, char *error);
/* Keeps the pod's door, in `host`, the namespace in which its link has the other end. 0: it is there; 1: from now on.
 * -EOPNOTSUPP: the link allows none. The pod's connections are captured as before without one. */
int capture_door(const char *pins, int host, int netns, const char *interface, char *error);
/* Bit i: slot i of `listeners` holds a socket. */
int capture_listeners(const char *pins, char *error);
/* Number of open connections from before the enrolment. */
int capture_old(const char *pins, int netns, char *error);
/* Number of connections between the engine and the application whose both ends are still there, those included that the
 * engine's process has closed and the kernel is still delivering. Taking the programs out would cut them. */
int capture_held(const char *pins, int netns, char *error);
/* out[i]: enum capture_counter; returns how many of n were written. */
int capture_counters(const char *pins, uint64_t *out, int n, char *error);
const char *capture_counter_name(int counter);
/* Takes everything out but the clsact qdiscs (deleting them loses packets) and removes the pins, the node's too where
 * it was the last pod. host: as above, where there may be a door, else -1. netns -1: it is gone. */
int capture_detach(const char *pins, int host, int netns, const char *interface, char *error);
/* Tries thing number i that capture needs of the kernel, and takes it back: each program alone, then all attached in a
 * namespace made for it. -ERANGE: there is no thing i. name: what it is, for people. */
int capture_probe(int i, const char **name, char *error);
/* Tries what native flows need of the kernel beyond that, and takes it back: the iterator over socket storage, and
 * SOCK_DESTROY (in a namespace made for it). */
int capture_native(char *error);

/* The kubelet exemption of the node, with pins in BPFDIR/v3/node. */
/* Attaches the program that notes probes to a cgroup2 directory. 1: it was not there, or in another directory. -EINVAL:
 * no cgroup2 directory, or its root. */
int kubelet_attach(const char *node, const char *cgroup, char *error);
/* Adds ports that are probed; exact: and takes all others out. */
int kubelet_ports(const char *node, const struct kubelet_port *ports, int n, int exact, char *error);
/* out[i]: enum kubelet_counter; returns how many of n were written. -ENOENT: nothing is attached. */
int kubelet_counters(const char *node, uint64_t *out, int n, char *error);
/* From here on no probe is told from other clear text. Also where nothing is attached. */
int kubelet_detach(const char *node, char *error);
/* cdef end */

#endif
