/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * libssl copies each byte twice on its way out and twice on its way in, and asks much of itself for each record. After
 * the handshake TLS 1.3 has little more to say than records (RFC 8446 5.2): five bytes of header, which are the
 * additional data, content and its type under AES-GCM, the tag. They are sealed from where the plaintext lies into what
 * will be sent, and opened in the buffer that they came in. docs/decisions/0018 has the figures.
 *
 * A nonce is the direction's IV with the count of its records under it (5.3). It is taken before anything is sealed,
 * so that an error cannot use it twice. A change of keys that fails leaves none: the old one would count anew. Nothing
 * of a record is looked at before its tag was compared.
 */
#include <openssl/core_names.h>
#include <openssl/kdf.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include "gcm.h"
#include "tls_record.h"

#define HEADER 5
#define TAG 16
#define SEALED_MOST (RECORD_PLAIN + 256)

static struct {
        pthread_once_t once;
        EVP_KDF *kdf;
        EVP_CIPHER *aes128, *aes256;
} fetched = {.once = PTHREAD_ONCE_INIT};

static void fetch(void)
{
        fetched.kdf = EVP_KDF_fetch(gcm_libctx(), "TLS13-KDF", NULL);
        fetched.aes128 = EVP_CIPHER_fetch(gcm_libctx(), "AES-128-GCM", gcm_query());
        fetched.aes256 = EVP_CIPHER_fetch(gcm_libctx(), "AES-256-GCM", gcm_query());
}

/* HKDF-Expand-Label(secret, label, "", n) */
static bool expand(const struct traffic *t, const char *label, uint8_t *to, size_t n)
{
        int mode = EVP_KDF_HKDF_MODE_EXPAND_ONLY;
        OSSL_PARAM params[] = {
                OSSL_PARAM_construct_int(OSSL_KDF_PARAM_MODE, &mode),
                OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, t->size == 48 ? "SHA384" : "SHA256", 0),
                OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)t->secret, t->size),
                OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_PREFIX, "tls13 ", 6),
                OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_LABEL, (void *)label, strlen(label)),
                OSSL_PARAM_construct_end(),
        };
        EVP_KDF_CTX *kdf = fetched.kdf ? EVP_KDF_CTX_new(fetched.kdf) : NULL;
        bool good = kdf && EVP_KDF_derive(kdf, to, n, params) == 1;
        EVP_KDF_CTX_free(kdf);
        return good;
}

void traffic_free(struct traffic *t)
{
        EVP_CIPHER_CTX_free(t->cipher);
        OPENSSL_cleanse(t, sizeof(*t));
}

/* Key and IV of the secret that is there; none if that fails. */
static bool rekey(struct traffic *t)
{
        uint8_t key[32];
        const EVP_CIPHER *cipher = t->size == 48 ? fetched.aes256 : fetched.aes128;
        bool good = cipher && expand(t, "key", key, t->size == 48 ? 32 : 16) && expand(t, "iv", t->iv, sizeof(t->iv)) &&
                    EVP_CipherInit_ex2(t->cipher, cipher, key, NULL, t->sealing, NULL) == 1;
        OPENSSL_cleanse(key, sizeof(key));
        if (!good)
                return traffic_free(t), false;
        t->records = 0;
        return true;
}

bool traffic_set(struct traffic *t, const uint8_t *secret, unsigned size, bool sealing)
{
        pthread_once(&fetched.once, fetch);
        if (size != 32 && size != 48)
                return false;
        memmove(t->secret, secret, size);
        t->size = size;
        t->sealing = sealing;
        if (!t->cipher)
                t->cipher = EVP_CIPHER_CTX_new();
        return t->cipher && rekey(t);
}

bool traffic_update(struct traffic *t)
{
        uint8_t next[sizeof(t->secret)];
        bool good = expand(t, "traffic upd", next, t->size);
        if (good)
                memcpy(t->secret, next, t->size);
        OPENSSL_cleanse(next, sizeof(next));
        if (!good)
                traffic_free(t);
        return good && rekey(t);
}

/* The next nonce, and the header as additional data. */
static bool begin(struct traffic *t, const uint8_t header[HEADER])
{
        uint8_t nonce[sizeof(t->iv)];
        int n;
        if (!t->cipher)
                return false;
        memcpy(nonce, t->iv, sizeof(nonce));
        for (unsigned i = 0; i < 8; i++)
                nonce[sizeof(nonce) - 1 - i] ^= (uint8_t)(t->records >> 8 * i);
        t->records++;
        return EVP_CipherInit_ex2(t->cipher, NULL, NULL, nonce, -1, NULL) == 1 &&
               EVP_CipherUpdate(t->cipher, NULL, &n, header, HEADER) == 1;
}

bool record_seal(struct traffic *t, struct buf *out, enum content_type type, const void *bytes, size_t n)
{
        size_t sealed = n + 1 + TAG;
        uint8_t *to = n <= RECORD_PLAIN && t->cipher ? buf_room(out, HEADER + sealed) : NULL;
        uint8_t kind = (uint8_t)type;
        int put;
        if (!to)
                return false;
        to[0] = CONTENT_DATA;
        to[1] = TLS1_2_VERSION_MAJOR;
        to[2] = TLS1_2_VERSION_MINOR;
        to[3] = (uint8_t)(sealed >> 8);
        to[4] = (uint8_t)sealed;
        if (!begin(t, to) || (n && EVP_CipherUpdate(t->cipher, to + HEADER, &put, bytes, (int)n) != 1) ||
            EVP_CipherUpdate(t->cipher, to + HEADER + n, &put, &kind, 1) != 1 ||
            EVP_CipherFinal_ex(t->cipher, to + HEADER + n + 1, &put) != 1 ||
            EVP_CIPHER_CTX_ctrl(t->cipher, EVP_CTRL_AEAD_GET_TAG, TAG, to + HEADER + n + 1) != 1)
                return false;
        out->len += HEADER + sealed;
        return true;
}

int record_open(struct traffic *t, uint8_t *record, size_t have, struct content *content)
{
        if (have < HEADER)
                return 0;
        size_t sealed = (size_t)record[3] << 8 | record[4], n;
        uint8_t *at = record + HEADER;
        int put;
        if (record[0] != CONTENT_DATA)
                return -SSL3_AD_UNEXPECTED_MESSAGE; /* nothing is in clear text any more, not even an alert */
        if (sealed > SEALED_MOST)
                return -TLS1_AD_RECORD_OVERFLOW;
        if (sealed < 1 + TAG)
                return -SSL3_AD_BAD_RECORD_MAC;
        if (have < HEADER + sealed)
                return 0;
        n = sealed - TAG;
        if (!begin(t, record) || EVP_CIPHER_CTX_ctrl(t->cipher, EVP_CTRL_AEAD_SET_TAG, TAG, at + n) != 1 ||
            EVP_CipherUpdate(t->cipher, at, &put, at, (int)n) != 1 ||
            EVP_CipherFinal_ex(t->cipher, at + n, &put) != 1) {
                OPENSSL_cleanse(at, n);
                return -SSL3_AD_BAD_RECORD_MAC;
        }
        while (n > 0 && at[n - 1] == 0) /* padding */
                n--;
        if (n == 0)
                return -SSL3_AD_UNEXPECTED_MESSAGE;
        *content = (struct content){.type = at[n - 1], .bytes = at, .n = n - 1};
        return n - 1 > RECORD_PLAIN ? -TLS1_AD_RECORD_OVERFLOW : (int)(HEADER + sealed);
}
