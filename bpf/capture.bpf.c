/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The programs in a pod's network namespace.
 *
 * Theory of operation
 *
 * Outbound: `out_eth` (tc egress of the pod's interface) lets the engine's packets out and turns every other TCP packet
 * around: mark 0x111, redirect to lo, ingress. `in_lo` (tc ingress of lo) makes the frame ours (it carries the
 * gateway's MAC). A rule sends the mark to a table in which every destination is local; the TCP stack looks for a
 * socket; a SYN finds none and `steer` (sk_lookup) picks the engine's outbound listener. Inbound: no program sees the
 * packets; `steer` picks the HBONE listener for port 15008 and the inbound listener for any other port of the pod. The
 * engine's own connects to the application come back to `steer` too: `out_lo` (tc egress of lo), which sees their
 * socket, has put their tuple into `own`; `steer` takes it out and lets the SYN go to the application. A lost tag fails
 * closed: the engine meets itself.
 *
 * Who is the engine: sockets with an entry in `engine_sk`, socket-local storage that only the holder of the map can
 * write (a mark could be set by the application). Children of a marked listener inherit it (F_CLONE). A SYN-ACK is told
 * by its listener's storage. What has no full TCP socket (the last ACK of TIME_WAIT, a RST, a SYN cookie's SYN-ACK)
 * carries no data and follows its connection: where a local socket would take it, it is turned around, else it may
 * leave.
 *
 * The kubelet's probes: kubelet.bpf.c, in the kubelet's cgroup, notes the tuple and the initial sequence number of a
 * probe's SYN in the node's map `probe_notes`. sk_lookup cannot see sequence numbers and sockets are lost between
 * namespaces, so `in_eth` (tc ingress of the pod's interface), which looks at SYNs only, compares, takes the note and
 * keeps the connection in the pod's map `probes`; `steer` hands it to the application. What the application answers is
 * told by the same number: a SYN-ACK acknowledges it, an accepted socket began with it (what it has received leads back
 * to it), and keeps that as its fate. So a connection of the same tuple that is not the noted one stays the engine's,
 * the engine's own connect from the kubelet's address included.
 *
 * Vouched flows: once the engine has allowed a pair (source address, destination address and port) of two pods of this
 * node, it writes an allowance into the source's `verdicts`: a slot of the node's `slots`, and its generation. Each SYN
 * asks anew (`vouch`): is the allowance there, its generation the slot's, the engine alive? Then it passes natively and
 * leaves a note in the node's `vouched`, like the kubelet's; the destination takes it the same way, into `pending`, and
 * the accepted socket's fate remembers slot and generation. Withdrawing is one store by the engine, which
 * destroys both sockets; a packet that leaves all the same is dropped, after a second turned around, which resets its
 * sender. Whatever is full, late or unknown ends at the engine, or is a SYN
 * that is dropped and comes again. Bytes are counted at the end that sends them, by sequence number, so that what is
 * sent twice counts once. The end that closes second, or resets, says what became of the flow (`ended`).
 *
 * Doors: between two such pods the host's network could be deceived (ARP, a bridge's table of MACs), and whoever has
 * the bytes there can read and add. So `door`, at the host's end of each pod's link (tc ingress), moves a packet of a
 * vouched flow straight to the other pod's end (bpf_redirect_peer), with a mark: it knows the flow by the socket, which
 * a veth leaves with the packet, or, where there is none of the flow's (a SYN-ACK, a reset), by the connection that the
 * packet meets in the other pod. Nobody else can set a mark that survives the way into a namespace, so `in_eth` takes
 * notes from marked SYNs alone, and drops what comes for a vouched flow from a pod with a door and has no mark. A pair
 * without doors is the engine's. Connections from before, and those that a draining pod opens, stay on the host's way:
 * its conntrack would take the rest of what it has seen a part of for invalid, when a pod leaves the mesh.
 *
 * Destinations outside the mesh are allowed in the same way, by a slot of kind VOUCH_OUTSIDE. Nobody takes a note
 * there, so none is left; and nobody counts what they send, so the pod's end counts what it has received when it
 * acknowledges.
 *
 * SYN cookies: an application's listener that is over its backlog keeps no request, so the engine's third packet meets
 * no connection, and steer is asked again. The tag must be there again: `out_lo` tags the engine's packets until one of
 * them meets a connection.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "maps.h"
#include "shared.h"

#define LO_IFINDEX 1 /* in every network namespace (net/core/dev.c registers lo first) */
#define ETH_P_MPLS 0x8847
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define TCP_ESTABLISHED 1
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10
#define MAX_EXTENSIONS 8
#define PACING_NEEDED 1 /* enum sk_pacing of the kernel: by timers of the socket's own */
#define LARGE 32768     /* bytes of a packet of bulk */
#define ALONE 64        /* large packets of one socket in a row: nobody else of the pod sends bulk */

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* How much longer `door` takes for a packet of bulk that is paced and alone (linger, below); 0: not at all. */
const volatile __u32 linger_ns = 0;
/* Of this pod's door. It may be wrong for a packet or two: two processors may write it at once. */
__u64 bulk_of = 0;  /* cookie of the socket that sent the last large packet */
__u32 bulk_run = 0; /* how many it has sent in a row, up to ALONE */
__u64 lingered = 0; /* packets for which the door takes longer, if it does for any */

struct tcp_sock;
struct sock {
        __u32 sk_pacing_status;
} __attribute__((preserve_access_index));

struct map_of_asking {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, __u32);
};

struct {
        __uint(type, BPF_MAP_TYPE_SOCKMAP);
        __uint(max_entries, SLOT_COUNT);
        __type(key, __u32);
        __type(value, __u64);
} listeners SEC(".maps");

struct map_of_engine_sk engine_sk SEC(".maps");

struct map_of_fates fates SEC(".maps");

struct {
        __uint(type, BPF_MAP_TYPE_LRU_HASH);
        __uint(max_entries, CAPTURE_MAX_OWN);
        __type(key, struct capture_own_key);
        __type(value, __u64); /* when, CLOCK_MONOTONIC in ns */
} own SEC(".maps");

/* Of the pod as a source. A miss, or one that is old: the engine decides. */
struct {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(map_flags, BPF_F_NO_PREALLOC);
        __uint(max_entries, VOUCH_MAX_VERDICTS);
        __type(key, struct capture_tuple);
        __type(value, struct vouch_verdict);
} verdicts SEC(".maps");

/* The node's. Not an LRU: the source goes its native way only if its note is there and stays. */
struct {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(max_entries, VOUCH_MAX_NOTES);
        __type(key, struct capture_tuple);
        __type(value, struct capture_probe);
} vouched SEC(".maps");

/* The node's; the engine has it mapped. */
struct {
        __uint(type, BPF_MAP_TYPE_ARRAY);
        __uint(map_flags, BPF_F_MMAPABLE);
        __uint(max_entries, VOUCH_MAX_SLOTS);
        __type(key, __u32);
        __type(value, struct vouch_slot);
} slots SEC(".maps");

/* The node's, read by the engine. */
struct {
        __uint(type, BPF_MAP_TYPE_RINGBUF);
        __uint(max_entries, VOUCH_ENDED_BYTES);
} ended SEC(".maps");

struct map_of_pending pending SEC(".maps");

struct map_of_probe_notes probe_notes SEC(".maps");

struct map_of_probes probes SEC(".maps");

struct {
        __uint(type, BPF_MAP_TYPE_ARRAY);
        __uint(max_entries, 1);
        __type(key, __u32);
        __type(value, struct capture_pod);
} pod SEC(".maps");

struct {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(max_entries, CAPTURE_MAX_ADDRESSES);
        __type(key, struct capture_address);
        __type(value, __u8);
} addresses SEC(".maps");

struct {
        __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
        __uint(max_entries, COUNT_MAX);
        __type(key, __u32);
        __type(value, __u64);
} counters SEC(".maps");

/* Set while a program of ours asks for a connection: the look-up runs steer, which then has no say. */
struct map_of_asking asking SEC(".maps");

/* The node's: the same, while a door asks for one of another pod. */
struct map_of_asking doors_asking SEC(".maps");

/* The node's: which pods have a door, by address. A miss: packets take the way that the host has for them. */
struct {
        __uint(type, BPF_MAP_TYPE_HASH);
        __uint(map_flags, BPF_F_NO_PREALLOC);
        __uint(max_entries, CAPTURE_MAX_DOORS);
        __type(key, struct capture_address);
        __type(value, struct capture_door_of);
} doors SEC(".maps");

static __always_inline void count(__u32 what)
{
        __u64 *n = bpf_map_lookup_elem(&counters, &what);
        if (n)
                (*n)++;
}

static __always_inline __u32 mode(void)
{
        __u32 zero = 0;
        struct capture_pod *p = bpf_map_lookup_elem(&pod, &zero);
        return p ? p->mode : MODE_STRICT;
}

static __always_inline int drop(__u32 why)
{
        count(why);
        return TC_ACT_SHOT;
}

/* UNSPEC: filters of others, behind ours, are asked too. */
static __always_inline int pass(__u32 why)
{
        count(why);
        return TC_ACT_UNSPEC;
}

/* The packet goes back into the pod's own stack, where steer finds the engine. */
static __always_inline int turn(struct __sk_buff *skb)
{
        count(COUNT_TURNED);
        skb->mark = CAPTURE_MARK_TURNED;
        return bpf_redirect(LO_IFINDEX, BPF_F_INGRESS);
}

/* A TCP packet as far as the decision needs it. */
struct packet {
        struct bpf_sock_tuple tuple; /* in the packet's own direction */
        __u32 tuple_size;
        __u32 seq, ack_seq;               /* host order */
        __u32 payload;                    /* bytes */
        bool syn, ack, rst, fin, options; /* options: of IPv4 */
};

/* Where the TCP header is: > 0; 0: not TCP or none of our business; < 0: -reason to drop. */
static __always_inline int find_tcp4(struct __sk_buff *skb, struct packet *p)
{
        struct iphdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0)
                return -COUNT_DROP_SHORT;
        if (ip.protocol != IPPROTO_TCP)
                return 0;
        if (ip.frag_off & bpf_htons(0x3fff)) /* more fragments, or an offset */
                return -COUNT_DROP_FRAGMENT;
        if (ip.ihl < 5)
                return -COUNT_DROP_SHORT;
        p->options = ip.ihl > 5;
        p->tuple.ipv4.saddr = ip.saddr;
        p->tuple.ipv4.daddr = ip.daddr;
        p->tuple_size = sizeof(p->tuple.ipv4);
        return ETH_HLEN + ip.ihl * 4;
}

static __always_inline int find_tcp6(struct __sk_buff *skb, struct packet *p)
{
        struct ipv6hdr ip;
        if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0)
                return -COUNT_DROP_SHORT;
        if (ip.daddr.s6_addr[0] == 0xff || (ip.daddr.s6_addr[0] == 0xfe && (ip.daddr.s6_addr[1] & 0xc0) == 0x80))
                return 0; /* multicast and link-local */
        __builtin_memcpy(p->tuple.ipv6.saddr, &ip.saddr, 16);
        __builtin_memcpy(p->tuple.ipv6.daddr, &ip.daddr, 16);
        p->tuple_size = sizeof(p->tuple.ipv6);
        __u8 next = ip.nexthdr;
        __u32 at = ETH_HLEN + sizeof(ip);
        if (next == IPPROTO_TCP)
                return at;
        for (int i = 0; i < MAX_EXTENSIONS; i++) {
                struct {
                        __u8 next, length;
                } ext;
                switch (next) {
                case IPPROTO_UDP:
                case IPPROTO_ICMPV6:
                        return 0;
                case 0:   /* hop by hop */
                case 43:  /* routing */
                case 60:  /* destination options */
                case 135: /* mobility */
                        if (bpf_skb_load_bytes(skb, at, &ext, sizeof(ext)) < 0)
                                return -COUNT_DROP_EXTENSION;
                        at += 8 + ext.length * 8;
                        break;
                case 44: /* fragment: eight bytes, the first of which names what is in it */
                        if (bpf_skb_load_bytes(skb, at, &ext, sizeof(ext)) < 0)
                                return -COUNT_DROP_EXTENSION;
                        at += 8;
                        break;
                case 51: /* authentication */
                        if (bpf_skb_load_bytes(skb, at, &ext, sizeof(ext)) < 0)
                                return -COUNT_DROP_EXTENSION;
                        at += 8 + ext.length * 4;
                        break;
                default: /* TCP behind extensions among them */
                        return -COUNT_DROP_EXTENSION;
                }
                next = ext.next;
        }
        return -COUNT_DROP_EXTENSION;
}

static __always_inline int find_tcp(struct __sk_buff *skb, struct packet *p)
{
        int at = 0;
        __be16 type;
        if (skb->vlan_present)
                return -COUNT_DROP_VLAN;
        /* As the frame says it, which is what the other end will read: a packet socket may claim any skb->protocol. */
        if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type)) < 0)
                return -COUNT_DROP_SHORT;
        switch (bpf_ntohs(type)) {
        case ETH_P_IP:
                at = find_tcp4(skb, p);
                break;
        case ETH_P_IPV6:
                at = find_tcp6(skb, p);
                break;
        case ETH_P_8021Q:
        case ETH_P_8021AD:
        case ETH_P_MPLS:
                return -COUNT_DROP_VLAN;
        }
        if (at <= 0)
                return at;
        struct tcphdr tcp;
        if (bpf_skb_load_bytes(skb, at, &tcp, sizeof(tcp)) < 0)
                return -COUNT_DROP_SHORT;
        p->seq = bpf_ntohl(tcp.seq);
        p->ack_seq = bpf_ntohl(tcp.ack_seq);
        p->syn = tcp.syn;
        p->ack = tcp.ack;
        p->rst = tcp.rst;
        p->fin = tcp.fin;
        __u32 headers = (__u32)at + tcp.doff * 4;
        p->payload = skb->len > headers ? skb->len - headers : 0;
        if (p->tuple_size == sizeof(p->tuple.ipv4)) {
                p->tuple.ipv4.sport = tcp.source;
                p->tuple.ipv4.dport = tcp.dest;
        } else {
                p->tuple.ipv6.sport = tcp.source;
                p->tuple.ipv6.dport = tcp.dest;
        }
        return at;
}

/* The connection (or its request, or its TIME_WAIT) that this packet would meet if it came into that namespace; to be
 * released. A listener is no answer. ask: of the map that keeps that namespace's steer out of it. */
static __always_inline struct bpf_sock *find_connection(struct __sk_buff *skb, struct packet *p, __u64 nsid, __u32 *ask)
{
        __u32 size = p->tuple_size;
        barrier_var(size); /* the verifier wants to see a constant */
        if (size != sizeof(p->tuple.ipv4))
                size = sizeof(p->tuple.ipv6);
        *ask = 1;
        struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, &p->tuple, size, nsid, 0);
        *ask = 0;
        if (sk && sk->state == TCP_LISTEN) {
                bpf_sk_release(sk);
                return NULL;
        }
        return sk;
}

/* Is there one in this namespace? On the way out of eth0 the other end then is the engine. */
static __always_inline bool meets_connection(struct __sk_buff *skb, struct packet *p)
{
        __u32 zero = 0;
        __u32 *ask = bpf_map_lookup_elem(&asking, &zero);
        if (!ask)
                return true; /* cannot be */
        struct bpf_sock *sk = find_connection(skb, p, BPF_F_CURRENT_NETNS, ask);
        if (!sk)
                return false;
        bpf_sk_release(sk);
        return true;
}

/* The tuple of a packet that the pod sends. */
static __always_inline void tuple_of(struct packet *p, struct capture_tuple *t)
{
        __builtin_memset(t, 0, sizeof(*t));
        if (p->tuple_size == sizeof(p->tuple.ipv4)) {
                mapped(t->local, p->tuple.ipv4.saddr);
                mapped(t->remote, p->tuple.ipv4.daddr);
                t->local_port = bpf_ntohs(p->tuple.ipv4.sport);
                t->remote_port = bpf_ntohs(p->tuple.ipv4.dport);
        } else {
                __builtin_memcpy(t->local, p->tuple.ipv6.saddr, 16);
                __builtin_memcpy(t->remote, p->tuple.ipv6.daddr, 16);
                t->local_port = bpf_ntohs(p->tuple.ipv6.sport);
                t->remote_port = bpf_ntohs(p->tuple.ipv6.dport);
        }
}

/* The probe that a packet of the pod may belong to. What it began with must be compared. */
static __always_inline struct capture_probe *probe_of(struct capture_tuple *t)
{
        struct capture_probe *probe = bpf_map_lookup_elem(&probes, t);
        /* Long before the clock behind initial sequence numbers comes round (275 s). */
        return probe && bpf_ktime_get_ns() - probe->when < KUBELET_REPLY_NS ? probe : NULL;
}

/* Is the allowance still given? */
static __always_inline struct vouch_slot *slot_of(__u32 slot, __u32 generation)
{
        struct vouch_slot *s = bpf_map_lookup_elem(&slots, &slot);
        return s && generation && *(volatile __u32 *)&s->generation == generation ? s : NULL;
}

/* The door of the pod with this address, NULL: it has none. */
static __always_inline struct capture_door_of *door_at(const __u8 *address)
{
        struct capture_address key;
        __builtin_memcpy(key.ip, address, 16);
        return bpf_map_lookup_elem(&doors, &key);
}

/* Its interface, or 0. */
static __always_inline __u32 door_of(const __u8 *address)
{
        struct capture_door_of *d = door_at(address);
        return d ? d->ifindex : 0;
}

/* A vouched flow's way to its other end. */
static __always_inline void by_way_of(struct capture_fated *fated, struct capture_door_of *to)
{
        fated->by_door = to != NULL;
        fated->door = to ? to->ifindex : 0;
        fated->instance = to ? to->instance : 0;
}

/* Did the socket begin with this SYN? What it has received leads back to it; a FIN counts one more. */
static __always_inline bool began_with(struct bpf_sock *sk, struct bpf_tcp_sock *tcp, __u32 isn)
{
        __u32 more = tcp->rcv_nxt - (__u32)tcp->bytes_received - isn;
        __u32 state = *(volatile __u32 *)&sk->state;
        return more == 1 || (more == 2 && state != TCP_ESTABLISHED);
}

/* Was this socket accepted from the kubelet, or from a vouched client? Takes the SYN out: its fate says it from now on.
 */
static __always_inline void accepted(struct bpf_sock *sk, struct packet *p, struct capture_fated *now)
{
        struct capture_tuple t;
        tuple_of(p, &t);
        struct capture_probe *syn = probe_of(&t);
        if (syn) {
                struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
                if (tcp && began_with(sk, tcp, syn->isn)) {
                        bpf_map_delete_elem(&probes, &t);
                        now->fate = FATE_PROBE;
                        return;
                }
        }
        syn = bpf_map_lookup_elem(&pending, &t);
        if (syn) {
                struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
                if (tcp && began_with(sk, tcp, syn->isn)) {
                        now->fate = FATE_VOUCHED;
                        now->slot = syn->slot;
                        now->generation = syn->generation;
                        now->next = p->seq + p->syn; /* Fast Open: the SYN-ACK is the accepted socket's */
                        now->since = syn->when;
                        by_way_of(now, door_at(t.remote));
                        bpf_map_delete_elem(&pending, &t);
                }
        }
}

/* Leaves the note of this SYN that the destination takes. */
static __always_inline bool leave_note(struct capture_tuple *t, __u16 port, struct capture_probe *what)
{
        struct capture_tuple note = {.local_port = t->remote_port, .remote_port = port};
        __builtin_memcpy(note.local, t->remote, 16);
        __builtin_memcpy(note.remote, t->local, 16);
        if (bpf_map_update_elem(&vouched, &note, what, BPF_ANY) == 0)
                return true;
        count(COUNT_VOUCH_FULL);
        return false;
}

/* May this SYN go natively? */
static __always_inline bool vouch(struct bpf_sock *sk, struct packet *p, struct capture_fated *fated,
                                  struct capture_fated *now)
{
        struct capture_tuple t;
        __u32 outbound = SLOT_OUTBOUND;
        /* Begun with the engine, ended with it; data in a SYN is nothing that anybody here looks at, one with options
         * in_eth would not know again, and a socket of one device the other end's door would not find. */
        if (sk->bound_dev_if || (fated && fated->fate == FATE_CAPTURED && fated->isn == p->seq) || p->payload ||
            p->options)
                return false;
        tuple_of(p, &t);
        __u16 port = t.local_port;
        t.local_port = 0;
        struct vouch_verdict *v = bpf_map_lookup_elem(&verdicts, &t);
        struct capture_probe what = {.isn = p->seq, .when = bpf_ktime_get_ns()};
        if (!v || what.when > v->until)
                return false;
        what.slot = v->slot;
        what.generation = v->generation;
        struct vouch_slot *s = slot_of(what.slot, what.generation);
        if (!s || (s->full && what.when - s->full < VOUCH_FULL_NS))
                return false;
        struct bpf_sock *engine = bpf_map_lookup_elem(&listeners, &outbound);
        if (!engine)
                return false; /* nobody would withdraw it */
        bpf_sk_release(engine);
        if (s->taken == VOUCH_OUTSIDE) {
                count(COUNT_OUTSIDE);
        } else {
                /* Without a door the bytes would cross the node's own network, where others may read them. And the
                 * door must be the one of the pod that was allowed: its address may be another's before the engine
                 * has heard of it. */
                struct capture_address own_address;
                struct capture_door_of *to = door_at(t.remote);
                __builtin_memcpy(own_address.ip, t.local, 16);
                if (!to || to->instance != s->target || !door_of(t.local) ||
                    !bpf_map_lookup_elem(&addresses, &own_address))
                        return false;
                by_way_of(now, to);
                if (!leave_note(&t, port, &what))
                        return false;
        }
        now->fate = FATE_VOUCHED;
        now->slot = what.slot;
        now->generation = what.generation;
        now->next = p->seq + 1;
        now->opened = 1;
        now->since = what.when;
        return true;
}

/* What came from outside, as far as the pod's end has acknowledged it. A FIN counts as one byte there: before it is
 * known whether one came, one byte less is counted. */
static __always_inline void outside_received(struct bpf_sock *sk, struct capture_fated *fated, struct vouch_slot *s)
{
        struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
        __u64 got = tcp ? tcp->bytes_received : 0;
        if (got && *(volatile __u32 *)&sk->state != TCP_ESTABLISHED)
                got--;
        if (got <= fated->received)
                return;
        __sync_fetch_and_add(&s->received, got - fated->received);
        fated->received = got;
}

/* Says that a vouched flow ends, once: with the FIN of the end that closes second, or with a reset. Who received a FIN
 * has counted it as a byte. */
static __always_inline void tell_end(struct bpf_sock *sk, struct packet *p, struct capture_fated *fated)
{
        __u32 state = *(volatile __u32 *)&sk->state;
        bool second = p->fin && state == TCP_LAST_ACK;
        if ((!second && !p->rst) || fated->told)
                return;
        struct bpf_tcp_sock *tcp = bpf_tcp_sock(sk);
        struct vouch_ended *e = bpf_ringbuf_reserve(&ended, sizeof(*e), 0);
        if (!e) {
                count(COUNT_VOUCH_UNTOLD);
                return;
        }
        __u16 port = p->tuple_size == sizeof(p->tuple.ipv4)
                             ? (fated->opened ? p->tuple.ipv4.sport : p->tuple.ipv4.dport)
                             : (fated->opened ? p->tuple.ipv6.sport : p->tuple.ipv6.dport);
        __u64 other = tcp ? tcp->bytes_received - second : 0;
        e->slot = fated->slot;
        e->generation = fated->generation;
        e->port = bpf_ntohs(port);
        e->reset = !second;
        e->reserved = 0;
        e->sent = fated->opened ? fated->bytes : other;
        e->received = fated->opened ? other : fated->bytes;
        e->since = fated->since;
        e->when = bpf_ktime_get_ns();
        bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
        fated->told = 1;
}

/* Something that has been sent before is sent again: is the other end's door where it was? A pod may get a new link.
 * false: another pod, or the same one enrolled anew with another link, has the address: nobody is there any more. */
static __always_inline bool is_still_there(struct bpf_sock *sk, struct capture_fated *fated)
{
        struct capture_address remote;
        if (sk->family == AF_INET) {
                mapped(remote.ip, sk->dst_ip4);
        } else {
                __u32 ip[4] = {sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3]};
                __builtin_memcpy(remote.ip, ip, 16);
        }
        struct capture_door_of *to = bpf_map_lookup_elem(&doors, &remote);
        if (!to || to->ifindex == fated->door)
                return true;
        if (to->instance != fated->instance)
                return false;
        fated->door = to->ifindex;
        return true;
}

/* A packet of a vouched flow leaves. */
static __always_inline int vouched_leaves(struct __sk_buff *skb, struct bpf_sock *sk, struct packet *p,
                                          struct capture_fated *fated)
{
        struct vouch_slot *s = slot_of(fated->slot, fated->generation);
        if (!s) {
                if (p->rst && !p->payload)
                        return pass(COUNT_VOUCHED); /* the other end is to hear of it */
                /* Turned around it resets this end, and nobody tells the other one; so the engine, which destroys both,
                 * goes first. */
                s = bpf_map_lookup_elem(&slots, &fated->slot);
                if (s && bpf_ktime_get_ns() - s->cut < VOUCH_CUT_NS)
                        return drop(COUNT_VOUCH_CUT);
                count(COUNT_VOUCH_CUT);
                return turn(skb);
        }
        __u32 end = p->seq + p->payload;
        __u32 more = end - fated->next;
        if (p->payload && (__s32)more > 0) {
                fated->next = end;
                fated->bytes += more;
                __sync_fetch_and_add(fated->opened ? &s->sent : &s->received, more);
        } else if (fated->by_door && (__s32)(p->seq - fated->next) < 0 && !is_still_there(sk, fated)) {
                count(COUNT_VOUCH_CUT);
                return turn(skb); /* which resets this end */
        }
        if (s->taken == VOUCH_OUTSIDE)
                outside_received(sk, fated, s);
        else if (p->fin || p->rst)
                tell_end(sk, p, fated);
        return pass(COUNT_VOUCHED);
}

/* No memory for an accepted socket's fate: it is captured, and whoever calls next comes by way of the engine. */
static __always_inline int turn_unknown(struct __sk_buff *skb, struct capture_fated *now)
{
        struct vouch_slot *s = now->fate == FATE_VOUCHED ? slot_of(now->slot, now->generation) : NULL;
        if (s)
                s->full = bpf_ktime_get_ns();
        return turn(skb);
}

/* An application's TCP socket sends: what becomes of the packet. */
static __always_inline int decide(struct __sk_buff *skb, struct bpf_sock *sk, struct packet *p, __u32 m)
{
        bool native = m == MODE_NOTING || m == MODE_DRAINING;
        struct capture_fated now = {.fate = FATE_CAPTURED, .isn = p->seq};
        struct capture_fated *fated;

        if (p->syn && !p->ack) {
                fated = bpf_sk_storage_get(&fates, sk, 0, 0);
                /* A connect that was under way before goes on as it began; the same socket with another number is a new
                 * connect. */
                bool before = fated && (fated->fate == FATE_NOTED || fated->fate == FATE_NATIVE);
                bool again = before && fated->isn == p->seq && m != MODE_STRICT;
                bool opens = true;
                if (native || again) {
                        now.fate = FATE_NATIVE;
                } else if (vouch(sk, p, fated, &now)) {
                        /* The same once more, or a new connect? */
                        opens = !fated || fated->fate != FATE_VOUCHED || fated->isn != p->seq;
                }
                if (!fated)
                        fated = bpf_sk_storage_get(&fates, sk, &now, BPF_SK_STORAGE_GET_F_CREATE);
                if (!fated)
                        return turn(skb); /* no memory for its fate: then it is the engine's */
                *fated = now;
                if (now.fate == FATE_VOUCHED && opens) { /* after its fate: who counts reads them the other way round */
                        struct vouch_slot *s = slot_of(now.slot, now.generation);
                        if (s)
                                __sync_fetch_and_add(&s->opened, 1);
                }
        } else {
                fated = bpf_sk_storage_get(&fates, sk, 0, 0);
                if (!fated && !native) {
                        /* What was not noted is not from before: accepted from the engine, from the kubelet, or from a
                         * vouched client. */
                        accepted(sk, p, &now);
                        fated = bpf_sk_storage_get(&fates, sk, &now, BPF_SK_STORAGE_GET_F_CREATE);
                        if (!fated)
                                return turn_unknown(skb, &now);
                } else if (m != MODE_STRICT && (!fated || fated->fate == FATE_NOTED)) {
                        /* Seen for the first time in the middle: the engine's other end, or a connection from before.
                         */
                        bool engine = meets_connection(skb, p);
                        if (!engine)
                                now.fate = FATE_NATIVE;
                        if (!engine && !fated)
                                accepted(sk, p, &now);
                        if (!fated)
                                fated = bpf_sk_storage_get(&fates, sk, &now, BPF_SK_STORAGE_GET_F_CREATE);
                        if (!fated)
                                return engine ? turn(skb) : pass(COUNT_NATIVE);
                        *fated = now;
                }
        }
        if (fated->fate == FATE_VOUCHED)
                return vouched_leaves(skb, sk, p, fated);
        if (fated->fate == FATE_PROBE)
                return pass(COUNT_PROBE);
        if (fated->fate == FATE_NATIVE && m != MODE_STRICT)
                return pass(m == MODE_LENIENT ? COUNT_OLD : COUNT_NATIVE);
        return turn(skb);
}

/* The TCP header of a packet whose headers are where the kernel puts them: no tag, fragment, option or extension. */
static __always_inline struct tcphdr *plain_tcp(struct __sk_buff *skb, void *data, void *end)
{
        struct ethhdr *eth = data;
        struct tcphdr *tcp;
        if ((void *)(eth + 1) > end || skb->vlan_present)
                return NULL;
        if (eth->h_proto == bpf_htons(ETH_P_IP)) {
                struct iphdr *ip = (void *)(eth + 1);
                if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_TCP || ip->ihl != 5 ||
                    ip->frag_off & bpf_htons(0x3fff))
                        return NULL;
                tcp = (void *)(ip + 1);
        } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
                struct ipv6hdr *ip = (void *)(eth + 1);
                if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_TCP)
                        return NULL;
                tcp = (void *)(ip + 1);
        } else {
                return NULL;
        }
        return (void *)(tcp + 1) <= end ? tcp : NULL;
}

/* Is it a plain segment in the middle of a connection? What it says of it. */
static __always_inline bool in_the_middle(struct __sk_buff *skb, struct packet *p)
{
        void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
        struct tcphdr *tcp = plain_tcp(skb, data, end);
        if (!tcp || tcp->syn || tcp->fin || tcp->rst)
                return false;
        __u32 headers = (__u32)((void *)tcp - data) + tcp->doff * 4;
        p->seq = bpf_ntohl(tcp->seq);
        p->payload = skb->len > headers ? skb->len - headers : 0;
        return true;
}

SEC("tc")
int out_eth(struct __sk_buff *skb)
{
        struct packet p = {};
        __u32 m = mode();
        if (m == MODE_OFF)
                return TC_ACT_UNSPEC;
        struct bpf_sock *full = NULL, *sk = skb->sk;
        if (sk) {
                full = bpf_sk_fullsock(sk);
                /* Most packets of vouched flows need no more than this. */
                struct capture_fated *fated = full ? bpf_sk_storage_get(&fates, full, 0, 0) : NULL;
                if (fated && fated->fate == FATE_VOUCHED && in_the_middle(skb, &p))
                        return vouched_leaves(skb, full, &p, fated);
                if (full && bpf_sk_storage_get(&engine_sk, full, 0, 0))
                        return pass(COUNT_ENGINE);
        }
        int at = find_tcp(skb, &p);
        if (at == 0)
                return pass(COUNT_LOCAL);
        if (at < 0)
                return m == MODE_STRICT || m == MODE_LENIENT ? drop(-at) : pass(COUNT_NATIVE);

        if (full) {
                /* The kernel's control socket, raw and packet sockets are not STREAM. */
                __u32 type = *(volatile __u32 *)&full->type;
                __u32 protocol = *(volatile __u32 *)&full->protocol;
                if (type == SOCK_STREAM && protocol == IPPROTO_TCP)
                        return decide(skb, full, &p, m);
        } else if (sk) {
                /* A SYN-ACK: its request socket points to the listener. */
                struct bpf_sock *listener = bpf_get_listener_sock(sk);
                if (listener && bpf_sk_storage_get(&engine_sk, listener, 0, 0))
                        return pass(COUNT_ENGINE);
                if (listener && (m == MODE_NOTING || m == MODE_DRAINING) && !meets_connection(skb, &p))
                        return pass(COUNT_NATIVE);
                if (listener) {
                        struct capture_tuple t;
                        tuple_of(&p, &t);
                        struct capture_probe *syn = probe_of(&t);
                        if (syn && p.ack_seq == syn->isn + 1)
                                return pass(COUNT_PROBE);
                        syn = bpf_map_lookup_elem(&pending, &t);
                        if (syn && p.ack_seq == syn->isn + 1 && slot_of(syn->slot, syn->generation))
                                return pass(COUNT_VOUCHED);
                        return turn(skb);
                }
        }
        if (m == MODE_NOTING || m == MODE_DRAINING)
                return meets_connection(skb, &p) ? turn(skb) : pass(COUNT_NATIVE);
        /* A SYN has a socket, a SYN-ACK a request; only the SYN-ACK of a SYN cookie has nothing. */
        bool opens = p.syn && !(p.ack && !sk);
        if (p.payload || opens || meets_connection(skb, &p))
                return turn(skb);
        return pass(COUNT_CONTROL);
}

SEC("tc")
int in_lo(struct __sk_buff *skb)
{
        /* The frame carries the gateway's MAC: without this ip_rcv would take it for somebody else's. */
        if (skb->mark == CAPTURE_MARK_TURNED)
                bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
        return TC_ACT_UNSPEC;
}

SEC("tc")
int out_lo(struct __sk_buff *skb)
{
        struct bpf_sock *sk = skb->sk;
        if (!sk)
                return TC_ACT_UNSPEC;
        sk = bpf_sk_fullsock(sk);
        if (!sk)
                return TC_ACT_UNSPEC;
        __u32 *engine = bpf_sk_storage_get(&engine_sk, sk, 0, 0);
        if (!engine || mode() == MODE_OFF)
                return TC_ACT_UNSPEC;
        struct packet p = {};
        if (find_tcp(skb, &p) <= 0 || p.rst)
                return TC_ACT_UNSPEC;
        struct capture_own_key key = {};
        if (p.tuple_size == sizeof(p.tuple.ipv4)) {
                mapped(key.remote, p.tuple.ipv4.saddr);
                key.remote_port = bpf_ntohs(p.tuple.ipv4.sport);
                key.local_port = bpf_ntohs(p.tuple.ipv4.dport);
        } else {
                __builtin_memcpy(key.remote, p.tuple.ipv6.saddr, 16);
                key.remote_port = bpf_ntohs(p.tuple.ipv6.sport);
                key.local_port = bpf_ntohs(p.tuple.ipv6.dport);
        }
        if (key.local_port == CAPTURE_HBONE_PORT) /* nobody's but the engine's */
                return TC_ACT_UNSPEC;
        if (p.syn && !p.ack) {
                *engine = ENGINE_CONNECTS;
        } else if (*engine != ENGINE_CONNECTS) {
                return TC_ACT_UNSPEC;
        } else if (meets_connection(skb, &p)) {
                *engine = ENGINE_SOCKET; /* the application has it: no tag may be left behind */
                return TC_ACT_UNSPEC;
        }
        __u64 now = bpf_ktime_get_ns();
        count(bpf_map_update_elem(&own, &key, &now, BPF_ANY) == 0 ? COUNT_TAGGED : COUNT_TAG_FULL);
        return TC_ACT_UNSPEC;
}

/* A single paced stream (BBR) arms a timer for most packets that it sends, and where that is dear, as in a virtual
 * machine, timers are what it does: the faster a packet is at its receiver, the more often both ends sleep, and the
 * more timers and wake-ups a byte needs (decision 0017). There the door takes about as long as the host's forwarding
 * did. Several streams, or one without timers, keep the processors busy by themselves and lose by it. */
static __always_inline void linger(struct __sk_buff *skb, struct bpf_sock *full)
{
        if (skb->len < LARGE)
                return;
        __u64 who = bpf_get_socket_cookie(skb);
        if (who != bulk_of) {
                bulk_of = who;
                bulk_run = 0;
                return;
        }
        if (bulk_run < ALONE) {
                bulk_run++;
                return;
        }
        struct sock *sk = (struct sock *)bpf_skc_to_tcp_sock(full);
        if (!sk || sk->sk_pacing_status != PACING_NEEDED)
                return;
        lingered++;
        __u64 begun = bpf_ktime_get_ns();
        for (int i = 0; i < 400 && bpf_ktime_get_ns() - begun < linger_ns; i++)
                ;
}

/* From door to door: the packet comes out of the other pod's interface, with a mark that says so. */
static __always_inline int through(struct __sk_buff *skb, __u32 ifindex)
{
        count(COUNT_DOOR);
        bpf_skb_change_type(skb, 0 /* PACKET_HOST */); /* whatever MAC the pod was made to believe in */
        skb->mark = CAPTURE_MARK_DOOR;
        return bpf_redirect_peer(ifindex, 0);
}

/* Is the packet the socket's own? Rules of the pod's namespace may have made another one of it, and a sender that is
 * not who its socket says would be believed. A socket that has just ended has no port any more: none is its own. */
static __always_inline bool is_own(struct __sk_buff *skb, struct bpf_sock *sk)
{
        void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
        struct tcphdr *tcp = plain_tcp(skb, data, end);
        if (!tcp || bpf_ntohs(tcp->source) != sk->src_port || tcp->dest != sk->dst_port)
                return false;
        struct ethhdr *eth = data;
        if (eth->h_proto == bpf_htons(ETH_P_IP)) {
                struct iphdr *ip = (void *)(eth + 1);
                return ip->saddr == sk->src_ip4 && ip->daddr == sk->dst_ip4;
        }
        struct ipv6hdr *ip = (void *)(eth + 1);
        for (int i = 0; i < 4; i++)
                if (ip->saddr.s6_addr32[i] != sk->src_ip6[i] || ip->daddr.s6_addr32[i] != sk->dst_ip6[i])
                        return false;
        return true;
}

/* Has a vouched SYN of this tuple been sent, which nobody has accepted yet? Who sent it is told of whatever comes of
 * it, also of the engine's answer to another SYN. */
static __always_inline bool is_noted(struct capture_tuple *t)
{
        return bpf_map_lookup_elem(&pending, t) || bpf_map_lookup_elem(&vouched, t);
}

SEC("tc")
int door(struct __sk_buff *skb)
{
        struct packet p = {};
        struct capture_tuple t;
        struct bpf_sock *full = NULL, *sk = skb->sk; /* a veth leaves the packet its socket */
        bool engine = false, flow = false;
        if (sk) {
                full = bpf_sk_fullsock(sk);
                struct capture_fated *fated = full ? bpf_sk_storage_get(&fates, full, 0, 0) : NULL;
                /* To another pod, that is: outside there is none to look for. Who was accepted may not know its door.
                 */
                flow = fated && fated->fate == FATE_VOUCHED && (fated->by_door || !fated->opened);
                if (flow && fated->by_door && is_own(skb, full)) {
                        linger(skb, full);
                        return through(skb, fated->door);
                }
                engine = full && bpf_sk_storage_get(&engine_sk, full, 0, 0);
                /* The others' have a way, by the host, which follows connections and must see all of one. */
                if (fated && !engine && !flow)
                        return TC_ACT_UNSPEC;
                /* Its tunnels are most of what it sends. */
                if (engine && (full->src_port == CAPTURE_HBONE_PORT || full->dst_port == bpf_htons(CAPTURE_HBONE_PORT)))
                        return TC_ACT_UNSPEC;
        }
        if (find_tcp(skb, &p) <= 0 || (p.payload && !flow) || (engine && !p.rst))
                return TC_ACT_UNSPEC;
        tuple_of(&p, &t);
        if (t.local_port == CAPTURE_HBONE_PORT || t.remote_port == CAPTURE_HBONE_PORT)
                return TC_ACT_UNSPEC;
        struct capture_door_of *to = door_at(t.remote);
        if (!to || door_of(t.local) != skb->ifindex) /* who speaks for another pod goes no short way */
                return TC_ACT_UNSPEC;
        if (p.syn && !is_noted(&t))
                return TC_ACT_UNSPEC;
        __u32 zero = 0, *ask = bpf_map_lookup_elem(&doors_asking, &zero);
        sk = ask ? find_connection(skb, &p, to->nsid, ask) : NULL;
        if (!sk)
                return TC_ACT_UNSPEC;
        bpf_sk_release(sk);
        return through(skb, to->ifindex);
}

/* Is this packet, which did not come by a door, for a vouched flow? t: as the pod sees it. */
static __always_inline bool astray(struct __sk_buff *skb, struct capture_tuple *t)
{
        struct packet p = {};
        struct capture_door_of *from = door_at(t->remote);
        if (t->local_port == CAPTURE_HBONE_PORT || t->remote_port == CAPTURE_HBONE_PORT || !from ||
            find_tcp(skb, &p) <= 0)
                return false;
        __u32 zero = 0, *ask = bpf_map_lookup_elem(&asking, &zero);
        struct bpf_sock *sk = ask ? find_connection(skb, &p, BPF_F_CURRENT_NETNS, ask) : NULL;
        if (!sk)
                return false;
        struct bpf_sock *full = bpf_sk_fullsock(sk);
        struct capture_fated *fated = full ? bpf_sk_storage_get(&fates, full, 0, 0) : NULL;
        /* A pod that was enrolled anew meanwhile knows nothing of it any more: its end is one from before. */
        bool vouched_for = fated && fated->fate == FATE_VOUCHED && fated->by_door &&
                           !(from->ifindex == fated->door && from->instance != fated->instance);
        bpf_sk_release(sk);
        return vouched_for;
}

/* TCP in fragments, with options or extensions, or in pieces: pods with a door send none of it to a vouched flow, and
 * somebody who speaks for them may. */
static __noinline int strange(struct __sk_buff *skb)
{
        struct capture_tuple t = {};
        struct packet p = {};
        __be16 type = 0;
        __u32 ip4 = 0;
        if (!skb)
                return TC_ACT_UNSPEC;
        if (find_tcp(skb, &p) == 0)
                return TC_ACT_UNSPEC;
        if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &type, sizeof(type)) < 0)
                return TC_ACT_UNSPEC;
        if (type == bpf_htons(ETH_P_IP)) {
                if (bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct iphdr, saddr), &ip4, sizeof(ip4)) < 0)
                        return TC_ACT_UNSPEC;
                mapped(t.remote, ip4);
        } else if (type != bpf_htons(ETH_P_IPV6) ||
                   bpf_skb_load_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), t.remote, 16) < 0) {
                return TC_ACT_UNSPEC;
        }
        return door_of(t.remote) ? drop(COUNT_IN_ASTRAY) : TC_ACT_UNSPEC;
}

SEC("tc")
int in_eth(struct __sk_buff *skb)
{
        void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
        struct ethhdr *eth = data;
        struct capture_tuple t = {};
        struct tcphdr *tcp;
        bool by_door = skb->mark == CAPTURE_MARK_DOOR;
        if (by_door)
                skb->mark = 0;
        if ((void *)(eth + 1) > end)
                return TC_ACT_UNSPEC;
        if (eth->h_proto == bpf_htons(ETH_P_IP)) {
                struct iphdr *ip = (void *)(eth + 1);
                if ((void *)(ip + 1) <= end && ip->protocol != IPPROTO_TCP)
                        return TC_ACT_UNSPEC;
                tcp = (void *)(ip + 1);
                if ((void *)(tcp + 1) > end || ip->ihl != 5 || ip->frag_off & bpf_htons(0x3fff))
                        return by_door ? TC_ACT_UNSPEC : strange(skb);
                mapped(t.local, ip->daddr);
                mapped(t.remote, ip->saddr);
        } else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
                struct ipv6hdr *ip = (void *)(eth + 1);
                if ((void *)(ip + 1) <= end && (ip->nexthdr == IPPROTO_UDP || ip->nexthdr == IPPROTO_ICMPV6))
                        return TC_ACT_UNSPEC;
                tcp = (void *)(ip + 1);
                if ((void *)(tcp + 1) > end || ip->nexthdr != IPPROTO_TCP)
                        return by_door ? TC_ACT_UNSPEC : strange(skb);
                __builtin_memcpy(t.local, &ip->daddr, 16);
                __builtin_memcpy(t.remote, &ip->saddr, 16);
        } else {
                return TC_ACT_UNSPEC;
        }
        if (by_door && (!tcp->syn || tcp->ack))
                return TC_ACT_UNSPEC;
        t.local_port = bpf_ntohs(tcp->dest);
        t.remote_port = bpf_ntohs(tcp->source);
        if (!tcp->syn || tcp->ack)
                return astray(skb, &t) ? drop(COUNT_IN_ASTRAY) : TC_ACT_UNSPEC;
        struct capture_probe now = {.isn = bpf_ntohl(tcp->seq), .open = 1, .when = bpf_ktime_get_ns()};
        struct capture_probe *note = bpf_map_lookup_elem(&probe_notes, &t);
        if (note && note->isn == now.isn && now.when - note->when < KUBELET_NOTE_NS) {
                bpf_map_delete_elem(&probe_notes, &t); /* once; a repeated SYN is noted anew */
                if (bpf_map_update_elem(&probes, &t, &now, BPF_ANY))
                        count(COUNT_PROBE_FULL);
                return TC_ACT_UNSPEC;
        }
        struct capture_probe *before = bpf_map_lookup_elem(&probes, &t);
        if (before)
                before->open = 0; /* steer could not tell the two apart */
        note = bpf_map_lookup_elem(&vouched, &t);
        if (note && note->isn == now.isn) {
                struct vouch_slot *s = slot_of(note->slot, note->generation);
                bool good = s && by_door && now.when - note->when < KUBELET_NOTE_NS;
                if (s && !by_door)
                        s->full = now.when; /* its way to the door is blocked: the next one is the engine's */
                now.slot = note->slot;
                now.generation = note->generation;
                /* First the one, then the other: between them it must not be nobody's. */
                if (good && bpf_map_update_elem(&pending, &t, &now, BPF_ANY)) {
                        s->full = now.when; /* the SYN comes again, and then is the engine's */
                        good = false;
                }
                bpf_map_delete_elem(&vouched, &t);
                return good ? TC_ACT_UNSPEC : drop(COUNT_IN_LATE);
        }
        before = bpf_map_lookup_elem(&pending, &t);
        if (before && before->isn == now.isn)
                return drop(COUNT_IN_LATE); /* a copy: its sender notes each that it sends */
        if (before)
                before->open = 0;
        return TC_ACT_UNSPEC;
}

static __always_inline int give(struct bpf_sk_lookup *ctx, __u32 slot, __u32 counter)
{
        struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &slot);
        if (!sk) {
                count(COUNT_IN_NO_LISTENER);
                return SK_DROP;
        }
        long error = bpf_sk_assign(ctx, sk, 0);
        bpf_sk_release(sk);
        count(error ? COUNT_IN_NO_LISTENER : counter);
        return error ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
        __u32 m = mode();
        struct capture_address local = {};
        struct capture_own_key key = {};
        __u32 zero = 0;
        __u32 *ask = bpf_map_lookup_elem(&asking, &zero), *other = bpf_map_lookup_elem(&doors_asking, &zero);
        if (ctx->protocol != IPPROTO_TCP || m == MODE_OFF || (ask && *ask) || (other && *other))
                return SK_PASS;
        if (ctx->family == AF_INET) {
                mapped(local.ip, ctx->local_ip4);
                mapped(key.remote, ctx->remote_ip4);
                if (local.ip[12] == 127)
                        return SK_PASS;
        } else {
                __u32 l[4] = {ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]};
                __u32 r[4] = {ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3]};
                if (!l[0] && !l[1] && !l[2] && l[3] == bpf_htonl(1))
                        return SK_PASS;
                __builtin_memcpy(local.ip, l, 16);
                __builtin_memcpy(key.remote, r, 16);
                if (local.ip[0] == 0xfe && (local.ip[1] & 0xc0) == 0x80)
                        return SK_PASS;
        }
        key.remote_port = bpf_ntohs((__u16)ctx->remote_port);
        key.local_port = (__u16)ctx->local_port;
        __u64 *tag = bpf_map_lookup_elem(&own, &key);
        if (tag) {
                /* A packet on lo arrives at once: an old tag is one whose packet was lost, and belongs to nobody. */
                bool fresh = bpf_ktime_get_ns() - *tag < CAPTURE_OWN_NS;
                bpf_map_delete_elem(&own, &key);
                if (fresh) {
                        count(COUNT_IN_OWN);
                        return SK_PASS;
                }
        }
        if (!bpf_map_lookup_elem(&addresses, &local))
                return give(ctx, SLOT_OUTBOUND, COUNT_IN_OUTBOUND); /* only our rule delivers what is not the pod's */
        if (ctx->local_port == CAPTURE_HBONE_PORT)
                return give(ctx, SLOT_HBONE, COUNT_IN_HBONE);
        struct capture_tuple t = {.local_port = key.local_port, .remote_port = key.remote_port};
        __builtin_memcpy(t.local, local.ip, 16);
        __builtin_memcpy(t.remote, key.remote, 16);
        struct capture_probe *probe = bpf_map_lookup_elem(&probes, &t);
        /* A listener that sends SYN cookies is looked up again by the third packet. */
        if (probe && probe->open && bpf_ktime_get_ns() - probe->when < KUBELET_NOTE_NS) {
                if (probe->open == 1) {
                        probe->open = 2;
                        count(COUNT_IN_PROBE);
                }
                return SK_PASS;
        }
        probe = bpf_map_lookup_elem(&pending, &t);
        if (probe && probe->open && bpf_ktime_get_ns() - probe->when < VOUCH_PENDING_NS &&
            slot_of(probe->slot, probe->generation)) {
                if (probe->open == 1) {
                        probe->open = 2;
                        count(COUNT_IN_VOUCHED);
                }
                return SK_PASS;
        }
        __builtin_memcpy(local.ip, key.remote, 16);
        if (bpf_map_lookup_elem(&addresses, &local)) {
                count(COUNT_IN_SELF);
                return SK_PASS;
        }
        if (m == MODE_DRAINING) {
                count(COUNT_IN_NATIVE);
                return SK_PASS;
        }
        return give(ctx, SLOT_INBOUND, COUNT_IN_INBOUND);
}
