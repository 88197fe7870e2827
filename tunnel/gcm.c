/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * OpenSSL 3.0 does not use VAES; libipsec-mb does, and seals three times as fast (docs/decisions/0015). It is loaded at
 * run time, where it is installed and the CPU has AVX-512 and VAES, and offered to libssl as a provider with two
 * ciphers, in a library context of its own: nothing else in the process sees it. A query "?provider=sidestep" prefers
 * it; everything that it does not have comes from the default provider.
 *
 * Used are the functions for one CPU generation by their exported names. Their structures are not part of a public
 * interface, so only the minor version that was read is accepted, with room to spare, and before first use sealing and
 * opening are compared with published vectors and with OpenSSL's output. What fails there is not used.
 *
 * A cipher context is what libssl needs for TLS 1.3: 12-byte nonces, additional data before data, a 16-byte tag. All
 * else is refused. A nonce serves once: after the tag was made or compared, or after an error, only a new one helps.
 */
#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <dlfcn.h>
#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/provider.h>
#include <pthread.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "gcm.h"

#define LIBRARY "libIPSec_MB.so.1"
#define VERSION_READ 0x103 /* 1.3: major and minor whose structures were read */
#define NONCE 12
#define TAG 16
#define AAD_MOST 64            /* TLS 1.3 has 5 */
#define DATA_MOST (1ull << 36) /* less 32 bytes: the block counter's end */
/* struct gcm_key_data has 1008 bytes in 1.3, struct gcm_context_data 88 */
#define KEY_ROOM 2048
#define STATE_ROOM 256

struct functions {
        void (*pre)(const void *key, void *expanded);
        void (*init)(const void *expanded, void *state, const uint8_t *nonce, const uint8_t *aad, uint64_t n);
        void (*update[2])(const void *expanded, void *state, uint8_t *to, const uint8_t *from, uint64_t n);
        void (*final[2])(const void *expanded, void *state, uint8_t *tag, uint64_t n);
};

enum { OPEN, SEAL };

static struct {
        pthread_once_t once;
        OSSL_LIB_CTX *libctx;
        struct functions f128, f256;
        char name[96];
        atomic_uint contexts;
} gcm = {.once = PTHREAD_ONCE_INIT};

/* -- a cipher context --------------------------------------------------------------------------------------------- */

enum phase { PHASE_DONE, PHASE_NONCE, PHASE_DATA }; /* DONE: no nonce */

struct cipher {
        alignas(64) uint8_t expanded[KEY_ROOM];
        alignas(64) uint8_t state[STATE_ROOM];
        const struct functions *f;
        size_t key_len, aad_len;
        uint64_t data_len;
        enum phase phase;
        bool keyed, sealing, tagged; /* tagged: tag is what was made, or what is to be compared */
        uint8_t nonce[NONCE], tag[TAG], aad[AAD_MOST];
};

static struct cipher *cipher_new(const struct functions *f, size_t key_len)
{
        struct cipher *c = aligned_alloc(alignof(struct cipher), sizeof(*c));
        if (!c)
                return NULL;
        memset(c, 0, sizeof(*c));
        c->f = f;
        c->key_len = key_len;
        atomic_fetch_add_explicit(&gcm.contexts, 1, memory_order_relaxed);
        return c;
}

static void *new_128(void *unused)
{
        (void)unused;
        return cipher_new(&gcm.f128, 16);
}

static void *new_256(void *unused)
{
        (void)unused;
        return cipher_new(&gcm.f256, 32);
}

static void cipher_free(void *arg)
{
        if (!arg)
                return;
        OPENSSL_cleanse(arg, sizeof(struct cipher));
        free(arg);
        atomic_fetch_sub_explicit(&gcm.contexts, 1, memory_order_relaxed);
}

static int cipher_set(void *arg, const OSSL_PARAM *params)
{
        struct cipher *c = arg;
        for (const OSSL_PARAM *p = params; p && p->key; p++) {
                size_t n;
                if (strcmp(p->key, OSSL_CIPHER_PARAM_AEAD_TAG) == 0) {
                        if (c->sealing || p->data_type != OSSL_PARAM_OCTET_STRING || !p->data || p->data_size != TAG)
                                return 0;
                        memcpy(c->tag, p->data, TAG);
                        c->tagged = true;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_IVLEN) == 0) {
                        if (!OSSL_PARAM_get_size_t(p, &n) || n != NONCE)
                                return 0;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_KEYLEN) == 0) {
                        if (!OSSL_PARAM_get_size_t(p, &n) || n != c->key_len)
                                return 0;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_AEAD_TLS1_AAD) == 0 ||
                           strcmp(p->key, OSSL_CIPHER_PARAM_AEAD_TLS1_IV_FIXED) == 0) {
                        return 0; /* TLS 1.2's way: a caller must not believe that it was taken */
                }
        }
        return 1;
}

static int cipher_get(void *arg, OSSL_PARAM *params)
{
        struct cipher *c = arg;
        for (OSSL_PARAM *p = params; p && p->key; p++) {
                if (strcmp(p->key, OSSL_CIPHER_PARAM_IVLEN) == 0) {
                        if (!OSSL_PARAM_set_size_t(p, NONCE))
                                return 0;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_KEYLEN) == 0) {
                        if (!OSSL_PARAM_set_size_t(p, c->key_len))
                                return 0;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_AEAD_TAGLEN) == 0) {
                        if (!OSSL_PARAM_set_size_t(p, TAG))
                                return 0;
                } else if (strcmp(p->key, OSSL_CIPHER_PARAM_AEAD_TAG) == 0) {
                        if (!c->sealing || !c->tagged || p->data_size != TAG ||
                            !OSSL_PARAM_set_octet_string(p, c->tag, TAG))
                                return 0;
                }
        }
        return 1;
}

static int start(struct cipher *c, bool sealing, const uint8_t *key, size_t key_len, const uint8_t *nonce,
                 size_t nonce_len, const OSSL_PARAM *params)
{
        c->phase = PHASE_DONE;
        c->sealing = sealing;
        c->tagged = false;
        if (key) {
                if (key_len != c->key_len)
                        return 0;
                c->f->pre(key, c->expanded);
                c->keyed = true;
        }
        if (nonce) {
                if (nonce_len != NONCE)
                        return 0;
                memcpy(c->nonce, nonce, NONCE);
                c->aad_len = 0;
                c->data_len = 0;
                c->phase = PHASE_NONCE;
        }
        return cipher_set(c, params);
}

static int seal_init(void *arg, const unsigned char *key, size_t key_len, const unsigned char *nonce, size_t nonce_len,
                     const OSSL_PARAM *params)
{
        return start(arg, true, key, key_len, nonce, nonce_len, params);
}

static int open_init(void *arg, const unsigned char *key, size_t key_len, const unsigned char *nonce, size_t nonce_len,
                     const OSSL_PARAM *params)
{
        return start(arg, false, key, key_len, nonce, nonce_len, params);
}

static int add_aad(struct cipher *c, const uint8_t *from, size_t n)
{
        if (c->phase != PHASE_NONCE || n > AAD_MOST - c->aad_len)
                return 0;
        memcpy(c->aad + c->aad_len, from, n);
        c->aad_len += n;
        return 1;
}

static void begin_data(struct cipher *c)
{
        c->f->init(c->expanded, c->state, c->nonce, c->aad, c->aad_len);
        c->phase = PHASE_DATA;
}

/* to NULL: additional data. */
static int cipher_update(void *arg, unsigned char *to, size_t *put, size_t room, const unsigned char *from, size_t n)
{
        struct cipher *c = arg;
        *put = 0;
        if (!c->keyed || c->phase == PHASE_DONE)
                return 0;
        if (n == 0)
                return 1;
        if (!to ? !add_aad(c, from, n) : room < n || n > DATA_MOST - 32 - c->data_len) {
                c->phase = PHASE_DONE;
                return 0;
        }
        if (to) {
                if (c->phase == PHASE_NONCE)
                        begin_data(c);
                c->f->update[c->sealing](c->expanded, c->state, to, from, n);
                c->data_len += n;
        }
        *put = n;
        return 1;
}

static int cipher_final(void *arg, unsigned char *to, size_t *put, size_t room)
{
        struct cipher *c = arg;
        uint8_t tag[TAG];
        (void)to, (void)room;
        *put = 0;
        if (!c->keyed || c->phase == PHASE_DONE || (!c->sealing && !c->tagged)) {
                c->phase = PHASE_DONE;
                return 0;
        }
        if (c->phase == PHASE_NONCE)
                begin_data(c);
        c->phase = PHASE_DONE;
        c->f->final[c->sealing](c->expanded, c->state, tag, TAG);
        if (c->sealing) {
                memcpy(c->tag, tag, TAG);
                c->tagged = true;
                return 1;
        }
        int same = CRYPTO_memcmp(tag, c->tag, TAG) == 0;
        OPENSSL_cleanse(tag, TAG); /* the right tag of a forged record is nobody's business */
        return same;
}

/* -- the provider ------------------------------------------------------------------------------------------------- */

static int about(OSSL_PARAM *params, size_t key_len)
{
        static const struct {
                const char *key;
                size_t value;
        } facts[] = {{OSSL_CIPHER_PARAM_MODE, EVP_CIPH_GCM_MODE},
                     {OSSL_CIPHER_PARAM_IVLEN, NONCE},
                     {OSSL_CIPHER_PARAM_BLOCK_SIZE, 1},
                     {OSSL_CIPHER_PARAM_AEAD, 1},
                     {OSSL_CIPHER_PARAM_CUSTOM_IV, 1}};
        for (OSSL_PARAM *p = params; p && p->key; p++) {
                if (strcmp(p->key, OSSL_CIPHER_PARAM_KEYLEN) == 0 && !OSSL_PARAM_set_size_t(p, key_len))
                        return 0;
                for (size_t i = 0; i < sizeof(facts) / sizeof(*facts); i++)
                        if (strcmp(p->key, facts[i].key) == 0 &&
                            !(p->data_type == OSSL_PARAM_INTEGER ? OSSL_PARAM_set_int(p, (int)facts[i].value)
                              : p->data_type == OSSL_PARAM_UNSIGNED_INTEGER && p->data_size == sizeof(unsigned)
                                      ? OSSL_PARAM_set_uint(p, (unsigned)facts[i].value)
                                      : OSSL_PARAM_set_size_t(p, facts[i].value)))
                                return 0;
        }
        return 1;
}

static int about_128(OSSL_PARAM *params)
{
        return about(params, 16);
}

static int about_256(OSSL_PARAM *params)
{
        return about(params, 32);
}

#define CIPHER(bits)                                                                                                   \
        {                                                                                                              \
                {OSSL_FUNC_CIPHER_NEWCTX, (void (*)(void))new_##bits},                                                 \
                        {OSSL_FUNC_CIPHER_FREECTX, (void (*)(void))cipher_free},                                       \
                        {OSSL_FUNC_CIPHER_ENCRYPT_INIT, (void (*)(void))seal_init},                                    \
                        {OSSL_FUNC_CIPHER_DECRYPT_INIT, (void (*)(void))open_init},                                    \
                        {OSSL_FUNC_CIPHER_UPDATE, (void (*)(void))cipher_update},                                      \
                        {OSSL_FUNC_CIPHER_FINAL, (void (*)(void))cipher_final},                                        \
                        {OSSL_FUNC_CIPHER_GET_PARAMS, (void (*)(void))about_##bits},                                   \
                        {OSSL_FUNC_CIPHER_GET_CTX_PARAMS, (void (*)(void))cipher_get},                                 \
                        {OSSL_FUNC_CIPHER_SET_CTX_PARAMS, (void (*)(void))cipher_set}, {0, NULL},                      \
        }

static const OSSL_DISPATCH cipher_128[] = CIPHER(128), cipher_256[] = CIPHER(256);

static const OSSL_ALGORITHM *query(void *unused, int operation, int *no_cache)
{
        /* the names by which libssl asks are the second ones */
        static const OSSL_ALGORITHM ciphers[] = {
                {"AES-128-GCM:id-aes128-GCM:2.16.840.1.101.3.4.1.6", "provider=sidestep", cipher_128, "libipsec-mb"},
                {"AES-256-GCM:id-aes256-GCM:2.16.840.1.101.3.4.1.46", "provider=sidestep", cipher_256, "libipsec-mb"},
                {NULL, NULL, NULL, NULL},
        };
        (void)unused;
        *no_cache = 0;
        return operation == OSSL_OP_CIPHER ? ciphers : NULL;
}

static int provider_init(const OSSL_CORE_HANDLE *handle, const OSSL_DISPATCH *in, const OSSL_DISPATCH **out,
                         void **context)
{
        static const OSSL_DISPATCH functions[] = {{OSSL_FUNC_PROVIDER_QUERY_OPERATION, (void (*)(void))query},
                                                  {0, NULL}};
        (void)in;
        *out = functions;
        *context = (void *)handle;
        return 1;
}

/* -- may it be used? ---------------------------------------------------------------------------------------------- */

struct message {
        const uint8_t *key, *nonce, *aad, *plain;
        int aad_len, len;
};

/* One message through EVP, plain to sealed or back; in two parts, the first of `first` bytes. */
static bool pass(EVP_CIPHER *cipher, bool sealing, const struct message *m, int first, const uint8_t *from, uint8_t *to,
                 uint8_t tag[TAG])
{
        EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
        int n;
        bool ok = c && EVP_CipherInit_ex2(c, cipher, m->key, m->nonce, sealing, NULL) == 1 &&
                  (sealing || EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_TAG, TAG, tag) == 1) &&
                  EVP_CipherUpdate(c, NULL, &n, m->aad, m->aad_len) == 1 &&
                  EVP_CipherUpdate(c, to, &n, from, first) == 1 && n == first &&
                  EVP_CipherUpdate(c, to + first, &n, from + first, m->len - first) == 1 &&
                  EVP_CipherFinal_ex(c, to + m->len, &n) == 1 &&
                  (!sealing || EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, TAG, tag) == 1);
        EVP_CIPHER_CTX_free(c);
        return ok;
}

/* Seals to what is expected, opens that again, in place, and does not open what was changed. */
static bool holds(EVP_CIPHER *cipher, const struct message *m, const uint8_t *sealed, const uint8_t *expected_tag)
{
        uint8_t tag[TAG], *work = malloc((size_t)m->len + 1);
        int first = m->len / 3;
        bool ok = work && pass(cipher, true, m, 0, m->plain, work, tag) && memcmp(work, sealed, (size_t)m->len) == 0 &&
                  memcmp(tag, expected_tag, TAG) == 0 && pass(cipher, false, m, first, work, work, tag) &&
                  memcmp(work, m->plain, (size_t)m->len) == 0;
        /* each bit of the tag, one of them for a long text, and one of the text */
        for (int bit = m->len > 1000 ? TAG * 8 - 1 : 0; ok && bit < TAG * 8; bit++) {
                memcpy(tag, expected_tag, TAG);
                tag[bit / 8] ^= (uint8_t)(1 << bit % 8);
                ok = !pass(cipher, false, m, first, sealed, work, tag);
        }
        if (ok) {
                memcpy(tag, expected_tag, TAG);
                memcpy(work, sealed, (size_t)m->len);
                work[m->len - 1] ^= 0x80;
                ok = !pass(cipher, false, m, first, work, work, tag);
        }
        free(work);
        return ok;
}

/* Test cases 4 and 16 of the GCM specification (McGrew and Viega). */
static const uint8_t KAT_KEY[32] = "\xfe\xff\xe9\x92\x86\x65\x73\x1c\x6d\x6a\x8f\x94\x67\x30\x83\x08"
                                   "\xfe\xff\xe9\x92\x86\x65\x73\x1c\x6d\x6a\x8f\x94\x67\x30\x83\x08";
static const uint8_t KAT_NONCE[NONCE] = "\xca\xfe\xba\xbe\xfa\xce\xdb\xad\xde\xca\xf8\x88";
static const uint8_t KAT_AAD[20] = "\xfe\xed\xfa\xce\xde\xad\xbe\xef\xfe\xed\xfa\xce\xde\xad\xbe\xef\xab\xad\xda\xd2";
static const uint8_t KAT_PLAIN[60] =
        "\xd9\x31\x32\x25\xf8\x84\x06\xe5\xa5\x59\x09\xc5\xaf\xf5\x26\x9a\x86\xa7\xa9\x53\x15\x34\xf7\xda\x2e\x4c"
        "\x30\x3d\x8a\x31\x8a\x72\x1c\x3c\x0c\x95\x95\x68\x09\x53\x2f\xcf\x0e\x24\x49\xa6\xb5\x25\xb1\x6a\xed\xf5"
        "\xaa\x0d\xe6\x57\xba\x63\x7b\x39";
static const uint8_t KAT_128[60] =
        "\x42\x83\x1e\xc2\x21\x77\x74\x24\x4b\x72\x21\xb7\x84\xd0\xd4\x9c\xe3\xaa\x21\x2f\x2c\x02\xa4\xe0\x35\xc1"
        "\x7e\x23\x29\xac\xa1\x2e\x21\xd5\x14\xb2\x54\x66\x93\x1c\x7d\x8f\x6a\x5a\xac\x84\xaa\x05\x1b\xa3\x0b\x39"
        "\x6a\x0a\xac\x97\x3d\x58\xe0\x91";
static const uint8_t KAT_128_TAG[TAG] = "\x5b\xc9\x4f\xbc\x32\x21\xa5\xdb\x94\xfa\xe9\x5a\xe7\x12\x1a\x47";
static const uint8_t KAT_256[60] =
        "\x52\x2d\xc1\xf0\x99\x56\x7d\x07\xf4\x7f\x37\xa3\x2a\x84\x42\x7d\x64\x3a\x8c\xdc\xbf\xe5\xc0\xc9\x75\x98"
        "\xa2\xbd\x25\x55\xd1\xaa\x8c\xb0\x8e\x48\x59\x0d\xbb\x3d\xa7\xb0\x8b\x10\x56\x82\x88\x38\xc5\xf6\x1e\x63"
        "\x93\xba\x7a\x0a\xbc\xc9\xf6\x62";
static const uint8_t KAT_256_TAG[TAG] = "\x76\xfc\x6e\xce\x0f\x4e\x17\x68\xcd\xdf\x88\x53\xbb\x2d\x55\x1b";

/* The published vectors are shorter than the loops of eight and sixteen blocks: a record's length too, as OpenSSL has
 * it. */
static bool self_test(OSSL_LIB_CTX *libctx, const char *name, const uint8_t *sealed, const uint8_t *tag)
{
        static uint8_t plain[16401], other[sizeof(plain)];
        static const int lengths[] = {1, 100, 800, sizeof(plain)};
        EVP_CIPHER *ours = EVP_CIPHER_fetch(libctx, name, "provider=sidestep"),
                   *theirs = EVP_CIPHER_fetch(libctx, name, "provider=default");
        struct message m = {KAT_KEY, KAT_NONCE, KAT_AAD, KAT_PLAIN, sizeof(KAT_AAD), sizeof(KAT_PLAIN)};
        bool ok = ours && theirs && holds(ours, &m, sealed, tag);
        for (size_t i = 0; i < sizeof(plain); i++)
                plain[i] = (uint8_t)(i * 167 + i / 256);
        for (size_t i = 0; ok && i < sizeof(lengths) / sizeof(*lengths); i++) {
                uint8_t reference[TAG];
                m.plain = plain;
                m.aad_len = 5;
                m.len = lengths[i];
                ok = pass(theirs, true, &m, 0, plain, other, reference) && holds(ours, &m, other, reference);
        }
        EVP_CIPHER_free(ours);
        EVP_CIPHER_free(theirs);
        return ok;
}

static bool cpu_has_it(void)
{
#ifdef __x86_64__
        unsigned a, b, c = 0, d;
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("bmi2") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && c & bit_VAES &&
               c & bit_VPCLMULQDQ;
#else
        return false;
#endif
}

static bool find(void *library, struct functions *f, int bits)
{
        const struct {
                const char *name;
                void *to;
        } wanted[] = {{"pre_%d", &f->pre},
                      {"init_%d", &f->init},
                      {"dec_%d_update", &f->update[OPEN]},
                      {"enc_%d_update", &f->update[SEAL]},
                      {"dec_%d_finalize", &f->final[OPEN]},
                      {"enc_%d_finalize", &f->final[SEAL]}};
        for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++) {
                char part[32], name[64];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
                snprintf(part, sizeof(part), wanted[i].name, bits);
#pragma GCC diagnostic pop
                snprintf(name, sizeof(name), "aes_gcm_%s_vaes_avx512", part);
                void *symbol = dlsym(library, name);
                if (!symbol)
                        return false;
                memcpy(wanted[i].to, &symbol, sizeof(symbol));
        }
        return true;
}

/* NULL: it is in use; else why not. */
static const char *load(void)
{
        if (!cpu_has_it())
                return "the CPU has no VAES with AVX-512";
        void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
        if (!library)
                return "libipsec-mb is not installed";
        unsigned (*version)(void) = NULL;
        void *symbol = dlsym(library, "imb_get_version");
        memcpy(&version, &symbol, sizeof(symbol));
        const char *why = "libipsec-mb is of a version that was not read";
        unsigned number = version ? version() : 0;
        if (number >> 8 != VERSION_READ || !find(library, &gcm.f128, 128) || !find(library, &gcm.f256, 256)) {
                dlclose(library);
                return why;
        }
        OSSL_LIB_CTX *libctx = OSSL_LIB_CTX_new();
        why = "libipsec-mb cannot be a provider";
        if (libctx && OSSL_PROVIDER_add_builtin(libctx, "sidestep", provider_init) == 1 &&
            OSSL_PROVIDER_load(libctx, "default") && OSSL_PROVIDER_load(libctx, "sidestep")) {
                why = "libipsec-mb FAILED its self-test";
                if (self_test(libctx, "AES-128-GCM", KAT_128, KAT_128_TAG) &&
                    self_test(libctx, "AES-256-GCM", KAT_256, KAT_256_TAG)) {
                        gcm.libctx = libctx;
                        snprintf(gcm.name, sizeof(gcm.name), "libipsec-mb %u.%u.%u", number >> 16, number >> 8 & 0xff,
                                 number & 0xff);
                        return NULL;
                }
        }
        OSSL_LIB_CTX_free(libctx);
        dlclose(library);
        return why;
}

static void choose(void)
{
        const char *why = load();
        if (why)
                snprintf(gcm.name, sizeof(gcm.name), "OpenSSL (%s)", why);
        ERR_clear_error();
}

OSSL_LIB_CTX *gcm_libctx(void)
{
        pthread_once(&gcm.once, choose);
        return gcm.libctx;
}

const char *gcm_query(void)
{
        return gcm_libctx() ? "?provider=sidestep" : NULL;
}

const char *gcm_name(void)
{
        pthread_once(&gcm.once, choose);
        return gcm.name;
}

unsigned gcm_contexts(void)
{
        return atomic_load_explicit(&gcm.contexts, memory_order_relaxed);
}
