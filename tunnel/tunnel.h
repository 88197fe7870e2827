/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine's public interface, and the cdef of sidestep._tunnel. Only integers, bytes and fds cross it.
 *
 * All functions may be called from one control thread (the engine's host); none blocks longer than it says. They return
 * 0 or -errno. fds that are handed in are duplicated: the caller keeps and closes its own. Strings are NUL-terminated
 * UTF-8. Nothing here is called per connection.
 */
#ifndef SIDESTEP_TUNNEL_H
#define SIDESTEP_TUNNEL_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */
struct tunnel;

struct tunnel_config {
        unsigned workers;       /* 0: min(usable CPUs, 4) */
        uint64_t pod_budget;    /* bytes buffered for one pod; 0: 64 MiB */
        uint64_t engine_budget; /* bytes buffered in all; 0: 256 MiB */
        int log_fd;             /* access log and messages, written by a thread of its own; -1: none */
};

struct tunnel_settings {
        const char *network;      /* own network, "" by default */
        const char *cluster_id;   /* "Kubernetes" by default */
        const char *trust_domain; /* "cluster.local" by default */
        const char
                *root_namespace; /* policies of it that cannot be decoded deny everything; "istio-system" by default */
        const char *node;
        const char *cluster_cidrs; /* comma separated, both families */
        int same_node_mtls;        /* 0: direct between two pods of this engine, 1: mutual TLS there too */
        int same_node_native; /* with 0 above: once one connection of a pair was allowed, the next ones pass natively */
        int unknown_pass;     /* 0: an unknown address inside cluster_cidrs is held 1 s and refused, 1: plain */
};

struct tunnel_pod {
        const char *uid; /* Kubernetes UID */
        const char *namespace_;
        const char *name;
        const char *service_account;
        const char *workload;  /* xDS name of its own record */
        const char *identity;  /* SPIFFE URI it speaks with */
        const char *addresses; /* comma separated, both families */
        uint64_t netns_cookie;
        uint64_t netns_ino;
};

struct tunnel_ports {
        uint16_t outbound, inbound, hbone; /* the listeners' own ports, which an application cannot bind */
};

struct tunnel_pod_stats {
        uint64_t connections; /* open: accepted or towards the application */
        uint64_t quiet_ms;    /* since the last new inbound stream or connection */
        uint64_t held;        /* waiting for their state */
};

struct tunnel_counts {
        uint64_t workloads, services, policies; /* held now */
};

enum tunnel_mode { TUNNEL_SERVING = 0, TUNNEL_DRAINING = 1 };

int tunnel_new(struct tunnel **out, const struct tunnel_config *cfg);
/* Stops the workers, resets what is open. */
void tunnel_free(struct tunnel *t);
int tunnel_settings(struct tunnel *t, const struct tunnel_settings *s);

/* Opens the listeners in the netns, stores them in the SOCKMAP, marks them in the SK_STORAGE map. Idempotent by uid +
 * cookie: a pod with another netns_cookie replaces the old one. netns must not be the caller's own: -EINVAL. vouch:
 * NULL, or what native flows need (bpf/loader.h, capture_vouch). */
int tunnel_pod_add(struct tunnel *t, const struct tunnel_pod *pod, int netns_fd, int listeners_fd, int engine_sk_fd,
                   const int *vouch, struct tunnel_ports *ports);
int tunnel_pod_mode(struct tunnel *t, const char *uid, int mode);
int tunnel_pod_del(struct tunnel *t, const char *uid);
int tunnel_pod_stats(struct tunnel *t, const char *uid, struct tunnel_pod_stats *out);

/* chain: leaf first, then intermediates. -EKEYREJECTED: key and leaf differ, or the leaf has not exactly this SPIFFE
 * URI SAN; -EKEYEXPIRED; -EBADMSG: not PEM. not_after: seconds since the epoch, the earliest of the chain. */
int tunnel_identity_set(struct tunnel *t, const char *identity, const char *key_pem, const char *chain_pem,
                        const char *roots_pem, int64_t *not_after);
int tunnel_identity_del(struct tunnel *t, const char *identity);

/* Applies a batch (docs/interfaces.md) from a sealed memfd; returns when every worker has adopted it and live
 * connections were re-evaluated. Rejected records are listed in report as "name: reason" lines (cut at report_len,
 * always terminated). -EPERM: seals missing; -EBADMSG: the framing is wrong, nothing was applied. */
int tunnel_apply(struct tunnel *t, int memfd, char *report, size_t report_len);
/* The first state is whole: what was applied so far is all that there is. Until then connections are held. */
int tunnel_whole(struct tunnel *t);

struct tunnel_delta {
        char type_url[128], nonce[1024];
        uint64_t resources, removed;
};

/* The same from a delta-xDS response, as it came. told: what it says of itself; one of another type than Address and
 * Authorization changes nothing. */
int tunnel_apply_delta(struct tunnel *t, int memfd, struct tunnel_delta *told, char *report, size_t report_len);

/* What would be decided about a connection, by the function that decides, on the newest state: a JSON object
 * (docs/interfaces.md, AUTHZ). identity "" for none; source "IP" or "IP:PORT", destination "IP:PORT", IPv6 with a port
 * in brackets. -EINVAL: one of them is not that; -EMSGSIZE: the answer does not fit. */
int tunnel_authz(struct tunnel *t, const char *identity, const char *source, const char *destination, char *out,
                 size_t out_len);

void tunnel_counts(struct tunnel *t, struct tunnel_counts *out);

/* Writes into an fd: Prometheus text; JSON array of "connections", "tunnels", "pods", "workloads", "services",
 * "policies", "identities", "denials"; "versions": lines "kind name version". */
int tunnel_metrics(struct tunnel *t, int fd);
int tunnel_dump(struct tunnel *t, const char *what, int fd);
const char *tunnel_openssl_version(void);
/* What seals and opens TLS records: "libipsec-mb VERSION", or "OpenSSL (why not the other)". */
const char *tunnel_aes_gcm(void);
/* cdef end */

#endif
