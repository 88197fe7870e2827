/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The ABI between the programs in a pod's network namespace, the loader and the engine: every map, key and value.
 * Read by clang (programs), by the C compiler (loader) and by cffi (the part between the markers).
 */
#ifndef SIDESTEP_MAPS_H
#define SIDESTEP_MAPS_H

#include <linux/types.h>

#define CAPTURE_MARK_TURNED 0x111
#define CAPTURE_MARK_DOOR 0x222 /* on its way from one pod's door to the next; nobody else can set it there */
#define CAPTURE_HBONE_PORT 15008
#define CAPTURE_MAX_ADDRESSES 16
#define CAPTURE_MAX_OWN 16384
#define CAPTURE_MAX_DOORS 8192       /* addresses of this node's pods */
#define CAPTURE_OWN_NS 1000000000ULL /* a tag's life */
#define CAPTURE_MAX_PROBES 512       /* of a pod, at once */
#define CAPTURE_LINGER_NS 3000 /* of a door, for bulk that is paced and alone, where a timer costs more than that */
#define KUBELET_MAX_PORTS 16384
#define KUBELET_MAX_NOTES 4096
#define KUBELET_NOTE_NS                                                                                                \
        1000000000ULL /* a note's life, and how long a SYN may take from the pod's door to its socket                  \
                       */
#define VOUCH_MAX_NOTES 4096
#define VOUCH_MAX_SLOTS 8192
#define VOUCH_MAX_VERDICTS 1024          /* of a pod */
#define VOUCH_MAX_PENDING 2048           /* of a pod */
#define VOUCH_ENDED_BYTES (512 * 1024)   /* of records of flows that ended: 9 000 */
#define VOUCH_CUT_NS 1000000000ULL       /* how long the engine has to destroy the sockets of flows that it ends */
#define VOUCH_FULL_NS 5000000000ULL      /* how long the engine has the pair after that */
#define VOUCH_STALE_NS 5000000000ULL     /* a note's, until it is swept; worthless long before */
#define VOUCH_PENDING_NS 120000000000ULL /* that of a SYN that became no socket: longer than any handshake */
#define KUBELET_REPLY_NS 30000000000ULL  /* until when the application's socket must have sent its first packet */

/* cdef begin */
enum capture_slot { SLOT_OUTBOUND = 0, SLOT_INBOUND = 1, SLOT_HBONE = 2, SLOT_COUNT = 3 };

enum capture_mode {
        MODE_OFF = 0,      /* programs may be attached, everything passes */
        MODE_NOTING = 1,   /* enrolment has begun: sockets that send are noted as old, everything passes */
        MODE_LENIENT = 2,  /* noted sockets pass, everything else is turned around */
        MODE_STRICT = 3,   /* everything that is not the engine's is turned around */
        MODE_DRAINING = 4, /* new connections pass; flows that the engine holds are turned around */
};

enum capture_counter {
        COUNT_TURNED,         /* outbound packets turned around */
        COUNT_ENGINE,         /* outbound packets of the engine's sockets */
        COUNT_OLD,            /* outbound packets of noted sockets */
        COUNT_CONTROL,        /* data-free packets without a socket (TIME_WAIT, RST, SYN cookie) that passed */
        COUNT_NATIVE,         /* outbound packets that passed because the mode lets them */
        COUNT_LOCAL,          /* not TCP, or not ours to touch */
        COUNT_DROP_FRAGMENT,  /* IPv4 fragments of TCP */
        COUNT_DROP_EXTENSION, /* IPv6 extension chains that end in TCP or are not known */
        COUNT_DROP_VLAN,
        COUNT_DROP_SHORT,  /* cannot be parsed */
        COUNT_TAGGED,      /* packets of the engine's connects to the application */
        COUNT_TAG_FULL,    /* no room for a tag: the engine resets the connection */
        COUNT_IN_OUTBOUND, /* SYNs given to the outbound listener */
        COUNT_IN_INBOUND,
        COUNT_IN_HBONE,
        COUNT_IN_OWN,         /* SYNs of the engine handed to the application */
        COUNT_IN_SELF,        /* the pod to itself, loopback */
        COUNT_IN_NATIVE,      /* passed because of the mode */
        COUNT_IN_NO_LISTENER, /* dropped: the engine is not there */
        COUNT_IN_PROBE,       /* SYNs of the kubelet handed to the application */
        COUNT_PROBE,          /* outbound packets of the application's ends of probes */
        COUNT_PROBE_FULL,     /* a noted SYN that could not be remembered: clear text like any other */
        COUNT_VOUCHED,        /* outbound packets of vouched flows, both ends */
        COUNT_VOUCH_FULL,     /* no room for a note: the engine's */
        COUNT_VOUCH_CUT,      /* outbound packets of flows whose allowance was withdrawn: turned around */
        COUNT_IN_VOUCHED,     /* SYNs of vouched flows handed to the application */
        COUNT_VOUCH_UNTOLD,   /* vouched flows that ended without room to say so: no line of their own in the log */
        COUNT_IN_LATE,        /* of those, dropped: an old note, one withdrawn, or no room; the client repeats them */
        COUNT_OUTSIDE,        /* SYNs to destinations outside the mesh that passed natively */
        COUNT_DOOR,           /* packets that went from door to door */
        COUNT_IN_ASTRAY,      /* dropped: for a vouched flow, and not come by the door */
        COUNT_MAX
};

struct capture_pod {
        __u32 mode;
        __u32 ifindex; /* of the interface that carries out_eth */
        __u64 netns_ino;
        __u64 since_us; /* NOTING: since when steer gives new connections to the engine, CLOCK_MONOTONIC; 0: not yet */
};

/* Value of `engine_sk`. The engine writes ENGINE_SOCKET; CONNECTS is the programs' own: a connect to the application
 * that has not met its connection yet. */
enum capture_engine { ENGINE_SOCKET = 1, ENGINE_CONNECTS = 2 };

/* What became of an application's socket; value of `fates`. */
enum capture_fate {
        FATE_NOTED = 1, /* open before the enrolment, says the iterator; not yet checked against the engine's sockets */
        FATE_CAPTURED = 2, /* turned around from its SYN on: never native again */
        FATE_NATIVE = 3,   /* opened natively (before the enrolment, or while draining) */
        FATE_PROBE = 4,    /* accepted from the kubelet: native in every mode */
        FATE_VOUCHED = 5, /* between two pods of this node, or to a destination outside the mesh, allowed by the engine:
                             native as long as its slot says so */
};

/* Value of `fates`. isn: of the SYN that opened it natively, so that its retransmission is told from a new connect of
 * the same socket. The rest: VOUCHED only. */
struct capture_fated {
        __u32 fate;
        __u32 isn;
        __u32 slot, generation;
        __u32 next;   /* sequence number behind the last byte that was counted */
        __u8 opened;  /* it is the end that opened it */
        __u8 by_door; /* `door` is known */
        __u16 told;   /* that it has ended */
        __u64 bytes;  /* sent by this end */
        __u64 since;  /* CLOCK_MONOTONIC in ns */
        union {
                __u64 received; /* by this end, where the other one is outside the mesh */
                struct {
                        __u32 door;     /* interface of the other end's door */
                        __u32 instance; /* of the other end's programs */
                };
        };
};

/* Value of the node's `doors`; key: an address of a pod, struct capture_address. instance: whose programs, and so whose
 * fates of sockets: the id of the map `fates`, which the kernel gives once. A pod that is enrolled anew has another
 * one, and so has the next pod with its address. */
struct capture_door_of {
        __u32 ifindex; /* of the host's end of the pod's link */
        __u32 nsid;    /* of the pod's namespace, as the host's numbers it */
        __u32 netns_ino;
        __u32 instance;
};

/* What a slot is for. */
enum vouch_kind { VOUCH_FREE = 0, VOUCH_PAIR = 1, VOUCH_OUTSIDE = 2 };

#define VOUCH_FDS 5 /* what an engine gets of a pod to vouch: loader.h, capture_vouch */

/* An allowance's state: value of the node's `slots`. The engine writes the generation, the programs count. */
struct vouch_slot {
        /* read with each packet, written seldom */
        __u32 generation; /* flows and notes of another one are worth nothing; 0: never given */
        __u32 taken;      /* enum vouch_kind; an engine, this or an earlier one, has it: it is nobody else's */
        __u64 full;       /* when a destination last had no room for a SYN, CLOCK_MONOTONIC in ns; 0: never */
        __u64 cut;        /* when the generation was last changed to end flows, CLOCK_MONOTONIC in ns */
        __u32 target;     /* VOUCH_PAIR: for which instance of programs, as in struct capture_door_of */
        __u8 line0[36];
        /* written by either end, on its own processor as likely as not: a cache line each */
        __u64 opened, sent; /* connections; bytes of the end that opened */
        __u8 line1[48];
        __u64 received; /* bytes of the other */
        __u8 line2[56];
};

/* Value of a pod's `verdicts`, which only the engine writes; key: struct capture_tuple with local_port 0. */
struct vouch_verdict {
        __u32 slot, generation;
        __u64 until; /* CLOCK_MONOTONIC in ns */
};

/* What the iterator `flows` says of a vouched end. */
struct vouch_flow {
        __u8 local[16], remote[16];
        __u16 local_port, remote_port; /* host order */
        __u32 slot, generation, opened;
        __u64 bytes, received, since, cookie; /* received: as in struct capture_fated */
};

/* A vouched flow that ends; record of the node's `ended`. sent: by the end that opened it. */
struct vouch_ended {
        __u32 slot, generation;
        __u16 port;  /* of the end that opened it, host order */
        __u16 reset; /* by a reset, not in order */
        __u32 reserved;
        __u64 sent, received, since, when; /* since, when: CLOCK_MONOTONIC in ns */
};

/* What the survey (survey.bpf.c) says of each TCP socket of the namespace. */
enum capture_kind { KIND_REQUEST = 1, KIND_OLD = 2, KIND_OTHER = 3, KIND_ENGINE = 4 };

struct capture_seen {
        __u8 local[16], remote[16];
        __u16 local_port, remote_port; /* host order */
        __u8 kind, state;
        __u16 reserved;
        __u64 synack_us; /* of a request: when its first SYN-ACK was sent, CLOCK_MONOTONIC; 0: not yet */
};

struct capture_address {
        __u8 ip[16];
};

struct capture_own_key {
        __u8 remote[16];
        __u16 remote_port; /* host order */
        __u16 local_port;  /* host order */
};

/* A connection as the pod sees it: the pod is local. Ports in host order. */
struct capture_tuple {
        __u8 local[16], remote[16];
        __u16 local_port, remote_port;
};

/* A noted SYN: of the kubelet in `probe_notes`, of a vouched flow in `vouched` (between the socket that sends it and
 * the pod's door); in `probes` and `pending` from there on. */
struct capture_probe {
        __u32 isn;
        __u32 open;             /* at the door it was the noted one; 2: counted. 0: another SYN of its tuple came */
        __u64 when;             /* CLOCK_MONOTONIC in ns */
        __u32 slot, generation; /* vouched */
};

/* Key of `probe_ports`: a port of an enrolled pod that its declared probes ask, host order; port 0 stands for the pod.
 */
struct kubelet_port {
        __u8 ip[16];
        __u16 port;
        __u16 reserved;
};

enum kubelet_counter {
        KUBELET_NOTED,   /* SYNs to a declared port of an enrolled pod */
        KUBELET_REFUSED, /* SYNs to another port of an enrolled pod */
        KUBELET_FULL,    /* no room for a note */
        KUBELET_MAX
};
/* cdef end */

#endif
