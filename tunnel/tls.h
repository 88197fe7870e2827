/* SPDX-License-Identifier: Apache-2.0 */
/* Mutual TLS 1.3 over buffers: certificates of SPIFFE identities, no I/O, no clock. */
#ifndef SIDESTEP_TLS_H
#define SIDESTEP_TLS_H

#include <openssl/ssl.h>
#include <stdatomic.h>
#include "buf.h"

#define TLS_URI_MAX 512
#define TLS_DIGEST 32

/* One identity with one certificate; immutable, counted. A renewed certificate is a new one. */
struct identity {
        atomic_uint refs;
        SSL_CTX *ctx;
        char *uri;
        char trust_domain[256];
        char serial[64];
        int64_t not_after_s;
        unsigned nroots;
        uint8_t (*roots)[TLS_DIGEST]; /* of each root that it trusts */
};

struct tls {
        SSL *ssl;
        struct buf in, out; /* sealed bytes: received, and to be sent */
        uint64_t sealed;    /* records since the last KeyUpdate */
};

/* tunnel.h, tunnel_identity_set: the same errors. */
int identity_new(struct identity **out, const char *uri, const char *key_pem, const char *chain_pem,
                 const char *roots_pem);
struct identity *identity_ref(struct identity *i);
void identity_unref(struct identity *i);
bool identity_trusts(const struct identity *i, const uint8_t root[TLS_DIGEST]);

int tls_open(struct tls *t, struct identity *i, bool server);
void tls_close(struct tls *t);
/* 1: done; 0: needs more bytes; -1: failed (tls_error). Output may be waiting in every case. */
int tls_handshake(struct tls *t);
/* After the handshake: ALPN h2, exactly one SPIFFE identity in the peer's certificate, which is copied; not_after_s:
 * earliest end of the verified chain; root: digest of the certificate that it ends with. NULL, or what is wrong. */
const char *tls_peer(struct tls *t, char uri[TLS_URI_MAX], int64_t *not_after_s, uint8_t root[TLS_DIGEST]);
/* > 0: bytes of plaintext; 0: none now; -1: the peer ended in order; -2: failed. */
int tls_read(struct tls *t, void *plain, int n);
/* One record of at most 16 KiB into out. -1: failed. *key_updates is counted up. */
int tls_write(struct tls *t, const void *plain, int n, uint64_t *key_updates);
/* Received bytes may hold another record. */
bool tls_pending(const struct tls *t);
/* Nothing comes for a while: gives 32 KiB back until something does. */
void tls_rest(struct tls *t);
/* close_notify. */
void tls_end(struct tls *t);
/* The last error of this thread, cut. */
const char *tls_error(char *text, size_t n);

/* Trust domain of a SPIFFE URI "spiffe://TD/ns/NS/sa/SA"; false where it is not of that form
 * (reference/ztunnel.md 2.1). */
bool spiffe_trust_domain(const char *uri, char *out, size_t n);

#endif
