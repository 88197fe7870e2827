/* SPDX-License-Identifier: Apache-2.0 */
/* Records of TLS 1.3 after the handshake: sealed and opened where the bytes are. */
#ifndef SIDESTEP_TLS_RECORD_H
#define SIDESTEP_TLS_RECORD_H

#include <openssl/evp.h>
#include "buf.h"

#define RECORD_PLAIN 16384 /* most content of one record (RFC 8446 5.1) */

enum content_type { CONTENT_ALERT = 21, CONTENT_HANDSHAKE = 22, CONTENT_DATA = 23 };

/* The keys of one direction. Zeros: none yet. */
struct traffic {
        EVP_CIPHER_CTX *cipher;
        uint64_t records; /* since this key is used; makes the next nonce */
        uint8_t secret[48], iv[12];
        unsigned size; /* of the secret: the hash's */
        bool sealing;
};

/* What a record held; the bytes are where the sealed ones were. */
struct content {
        enum content_type type;
        uint8_t *bytes;
        size_t n;
};

/* Keys from a traffic secret (RFC 8446 7.3), for AES-128-GCM with 32 bytes, AES-256-GCM with 48. false: not that, or no
 * memory. */
bool traffic_set(struct traffic *t, const uint8_t *secret, unsigned size, bool sealing);
/* To the next secret (7.2). false: no memory, and no keys are left. */
bool traffic_update(struct traffic *t);
/* Wipes them. */
void traffic_free(struct traffic *t);

/* One record behind what is in `out`; n at most RECORD_PLAIN. */
bool record_seal(struct traffic *t, struct buf *out, enum content_type type, const void *bytes, size_t n);
/* The record at the head of `have` bytes. > 0: its length; 0: it is not whole; < 0: the alert to end with, negated. */
int record_open(struct traffic *t, uint8_t *record, size_t have, struct content *content);

#endif
