/* SPDX-License-Identifier: Apache-2.0 */
/* Mutual TLS 1.3 over buffers: certificates of SPIFFE identities, no I/O, no clock. */
#ifndef SIDESTEP_TLS_H
#define SIDESTEP_TLS_H

#include <openssl/ssl.h>
#include <stdatomic.h>
#include "buf.h"
#include "tls_record.h"

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
        SSL *ssl;           /* until tls_settle() */
        struct buf in, out; /* sealed bytes: received, and to be sent */
        struct traffic rx, tx;
        struct buf message; /* of the handshake's kind, not whole yet */
        size_t opened;      /* bytes of `in` that tls_read() has given away */
        unsigned idle;      /* records without data, one after the other */
        size_t most;        /* content of a record that we send */
        bool server, failed, ended;
        bool asked;     /* the peer wants new keys of us, before the next data */
        char wrong[48]; /* what failed after the handshake */
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
/* The handshake is done and the peer known: frees what only they needed. */
void tls_settle(struct tls *t);
/* The next plaintext, where it is in `in`, until the next call. > 0: its bytes; 0: none now; -1: the peer ended in
 * order; -2: failed. Output may be waiting in every case. */
int tls_read(struct tls *t, const uint8_t **plain);
/* At most RECORD_PLAIN bytes into out: one record, more for a peer that asked for smaller ones. -1: failed.
 * *key_updates counts the changes of keys that we began. */
int tls_write(struct tls *t, const void *plain, size_t n, uint64_t *key_updates);
/* close_notify. */
void tls_end(struct tls *t);
/* What failed, cut. */
const char *tls_error(const struct tls *t, char *text, size_t n);

/* Trust domain of a SPIFFE URI "spiffe://TD/ns/NS/sa/SA"; false where it is not of that form
 * (reference/ztunnel.md 2.1). */
bool spiffe_trust_domain(const char *uri, char *out, size_t n);

#endif
