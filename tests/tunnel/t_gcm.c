/* SPDX-License-Identifier: Apache-2.0 */
/* AES-GCM as the engine has it against OpenSSL's own: the cipher by itself, and TLS connections with a peer that knows
 * nothing of ours. Where libipsec-mb is not used both are OpenSSL's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include <dlfcn.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/provider.h>
#include <openssl/x509v3.h>
#include "gcm.h"
#include "tls.h"

#define MOST 70000
#define TAG 16

static uint64_t dice = 20260101;

static unsigned roll(unsigned n)
{
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        return (unsigned)(dice >> 33) % n;
}

static void fill(uint8_t *to, size_t n)
{
        for (size_t i = 0; i < n; i++)
                to[i] = (uint8_t)roll(256);
}

/* -- which one ---------------------------------------------------------------------------------------------------- */

static void test_it_is_used_where_it_can_be(void **unused)
{
        char line[8192];
        bool cpu = false;
        FILE *f = fopen("/proc/cpuinfo", "r");
        assert_non_null(f);
        while (fgets(line, sizeof(line), f))
                if (strncmp(line, "flags", 5) == 0)
                        cpu = strstr(line, " vaes") && strstr(line, " vpclmulqdq") && strstr(line, " avx512vl");
        fclose(f);
        void *library = dlopen("libIPSec_MB.so.1", RTLD_NOW | RTLD_LOCAL);
        unsigned (*version)(void) = NULL;
        void *symbol = library ? dlsym(library, "imb_get_version") : NULL;
        memcpy(&version, &symbol, sizeof(symbol));
        bool expected = cpu && version && version() >> 8 == 0x103;
        (void)unused;
        print_message("%s\n", gcm_name());
        assert_int_equal(gcm_libctx() != NULL, expected);
        assert_int_equal(gcm_query() != NULL, expected);
        assert_int_equal(strncmp(gcm_name(), "libipsec-mb ", 12) == 0, expected);
        EVP_CIPHER *c = EVP_CIPHER_fetch(gcm_libctx(), "AES-256-GCM", gcm_query());
        assert_non_null(c);
        const OSSL_PROVIDER *from = EVP_CIPHER_get0_provider(c);
        assert_string_equal(OSSL_PROVIDER_get0_name(from), expected ? "sidestep" : "default");
        EVP_CIPHER_free(c);
        /* the rest of the process has OpenSSL's */
        c = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
        assert_string_equal(OSSL_PROVIDER_get0_name(EVP_CIPHER_get0_provider(c)), "default");
        EVP_CIPHER_free(c);
        if (library)
                dlclose(library);
}

/* -- the cipher --------------------------------------------------------------------------------------------------- */

static EVP_CIPHER_CTX *cipher(bool ours, int bits, const uint8_t *key, bool sealing)
{
        const char *name = bits == 128 ? "AES-128-GCM" : "AES-256-GCM";
        EVP_CIPHER *c = EVP_CIPHER_fetch(ours ? gcm_libctx() : NULL, name, ours ? gcm_query() : "provider=default");
        EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
        assert_non_null(c);
        assert_int_equal(EVP_CipherInit_ex2(ctx, c, key, NULL, sealing, NULL), 1);
        EVP_CIPHER_free(c);
        return ctx;
}

/* One message in parts of random lengths, the additional data too; NULL tag: none is set. 1, or 0 where it was refused.
 */
static int run(EVP_CIPHER_CTX *c, bool sealing, const uint8_t *nonce, const uint8_t *aad, size_t aad_len,
               const uint8_t *from, uint8_t *to, size_t len, uint8_t *tag, unsigned part)
{
        int n;
        assert_int_equal(EVP_CipherInit_ex2(c, NULL, NULL, nonce, sealing, NULL), 1);
        if (!sealing && tag)
                assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_TAG, TAG, tag), 1);
        for (size_t at = 0, more; at < aad_len; at += more) {
                more = part ? 1 + roll(part) : aad_len;
                more = more > aad_len - at ? aad_len - at : more;
                assert_int_equal(EVP_CipherUpdate(c, NULL, &n, aad + at, (int)more), 1);
        }
        for (size_t at = 0, more; at < len; at += more) {
                more = part ? 1 + roll(part) : len;
                more = more > len - at ? len - at : more;
                assert_int_equal(EVP_CipherUpdate(c, to + at, &n, from + at, (int)more), 1);
                assert_int_equal(n, (int)more);
        }
        if (EVP_CipherFinal_ex(c, to + len, &n) != 1)
                return 0;
        assert_int_equal(n, 0);
        if (sealing)
                assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, TAG, tag), 1);
        return 1;
}

static void compare(int bits, size_t len, size_t aad_len, unsigned part)
{
        static uint8_t plain[MOST], sealed[MOST], other[MOST];
        uint8_t key[32], nonce[12], aad[64], tag[TAG], reference[TAG];
        fill(key, sizeof(key)), fill(nonce, sizeof(nonce)), fill(aad, sizeof(aad)), fill(plain, len);
        EVP_CIPHER_CTX *ours = cipher(true, bits, key, true), *theirs = cipher(false, bits, key, true),
                       *opens = cipher(true, bits, key, false);
        run(theirs, true, nonce, aad, aad_len, plain, sealed, len, reference, 0);
        for (int in_place = 0; in_place < 2; in_place++) {
                memcpy(other, plain, len);
                run(ours, true, nonce, aad, aad_len, in_place ? other : plain, other, len, tag, part);
                assert_memory_equal(other, sealed, len);
                assert_memory_equal(tag, reference, TAG);
                memcpy(other, sealed, len);
                assert_int_equal(
                        run(opens, false, nonce, aad, aad_len, in_place ? other : sealed, other, len, tag, part), 1);
                assert_memory_equal(other, plain, len);
        }
        uint8_t *changed[] = {tag, aad_len ? aad : tag, len ? sealed : tag, nonce};
        size_t room[] = {TAG, aad_len ? aad_len : TAG, len ? len : TAG, sizeof(nonce)};
        for (int i = 0; i < 4; i++) {
                unsigned at = roll((unsigned)room[i]);
                uint8_t bit = (uint8_t)(1 << roll(8));
                changed[i][at] ^= bit;
                assert_int_equal(run(opens, false, nonce, aad, aad_len, sealed, other, len, tag, part), 0);
                changed[i][at] ^= bit;
                assert_int_equal(run(opens, false, nonce, aad, aad_len, sealed, other, len, tag, part), 1);
        }
        EVP_CIPHER_CTX_free(ours), EVP_CIPHER_CTX_free(theirs), EVP_CIPHER_CTX_free(opens);
}

static void test_the_same_as_openssl(void **unused)
{
        (void)unused;
        for (int bits = 128; bits <= 256; bits += 128) {
                for (size_t len = 0; len < 300; len++)
                        compare(bits, len, roll(65), roll(2) ? 1 + roll(100) : 0);
                for (int i = 0; i < 60; i++)
                        compare(bits, roll(MOST), roll(65), roll(2) ? 1 + roll(20000) : 0);
                compare(bits, 16401, 5, 0);
        }
}

static void test_what_is_not_tls_is_refused(void **unused)
{
        uint8_t key[16] = {1}, nonce[12] = {2}, aad[65] = {3}, tag[TAG] = {0}, text[16] = {0};
        int n;
        (void)unused;
        if (!gcm_libctx()) /* OpenSSL's own takes more, and is not ours to test */
                return;
        EVP_CIPHER_CTX *c = cipher(true, 128, key, true), *opens = cipher(true, 128, key, false);
        assert_int_equal(EVP_CipherUpdate(c, text, &n, text, 16), 0); /* no nonce yet */
        assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, TAG, tag), 0);
        run(c, true, nonce, aad, 5, text, text, 16, tag, 0);
        assert_int_equal(EVP_CipherUpdate(c, text, &n, text, 16), 0); /* a nonce serves once */
        assert_int_equal(EVP_CipherFinal_ex(c, text, &n), 0);
        EVP_CipherInit_ex2(c, NULL, NULL, nonce, 1, NULL);
        assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_GET_TAG, TAG, tag), 0); /* the tag of the last message */
        assert_int_equal(EVP_CipherUpdate(c, NULL, &n, aad, 65), 0);                  /* longer than there is room */
        assert_int_equal(EVP_CipherUpdate(c, text, &n, text, 16), 0);
        EVP_CipherInit_ex2(c, NULL, NULL, nonce, 1, NULL);
        assert_int_equal(EVP_CipherUpdate(c, text, &n, text, 16), 1);
        assert_int_equal(EVP_CipherUpdate(c, NULL, &n, aad, 5), 0); /* behind the data */
        assert_int_equal(EVP_CipherFinal_ex(c, text, &n), 0);
        assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_IVLEN, 8, NULL), 0);
        assert_int_equal(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_IVLEN, 12, NULL), 1);
        assert_int_equal(EVP_CIPHER_CTX_ctrl(opens, EVP_CTRL_AEAD_SET_TAG, 12, tag), 0);
        assert_int_equal(run(opens, false, nonce, aad, 5, text, text, 16, NULL, 0), 0); /* no tag */
        ERR_clear_error();
        EVP_CIPHER_CTX_free(c), EVP_CIPHER_CTX_free(opens);
}

/* -- TLS ---------------------------------------------------------------------------------------------------------- */

#define URI "spiffe://cluster.local/ns/a/sa/b"

/* One self-signed certificate, which both sides have and trust. */
static void credentials(char **key_pem, char **cert_pem)
{
        EVP_PKEY *key = EVP_EC_gen("P-256");
        X509 *cert = X509_new();
        X509_set_version(cert, 2);
        ASN1_INTEGER_set(X509_get_serialNumber(cert), 7);
        X509_gmtime_adj(X509_getm_notBefore(cert), -3600);
        X509_gmtime_adj(X509_getm_notAfter(cert), 86400);
        X509_set_pubkey(cert, key);
        const char *extensions[][2] = {{"subjectAltName", "critical,URI:" URI},
                                       {"basicConstraints", "critical,CA:TRUE"}};
        for (int i = 0; i < 2; i++) {
                X509_EXTENSION *e = X509V3_EXT_conf(NULL, NULL, extensions[i][0], extensions[i][1]);
                assert_non_null(e);
                X509_add_ext(cert, e, -1);
                X509_EXTENSION_free(e);
        }
        assert_true(X509_sign(cert, key, EVP_sha256()) > 0);
        BIO *bio[] = {BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem())};
        PEM_write_bio_PrivateKey(bio[0], key, NULL, NULL, 0, NULL, NULL);
        PEM_write_bio_X509(bio[1], cert);
        char **out[] = {key_pem, cert_pem};
        for (int i = 0; i < 2; i++) {
                char *text;
                long n = BIO_get_mem_data(bio[i], &text);
                *out[i] = strndup(text, (size_t)n);
                BIO_free(bio[i]);
        }
        EVP_PKEY_free(key);
        X509_free(cert);
}

struct pair {
        struct tls ours;
        SSL *theirs;
        BIO *in, *out; /* theirs */
};

static void carry(struct pair *p)
{
        char *bytes;
        long n = BIO_get_mem_data(p->out, &bytes);
        assert_true(n == 0 || buf_add(&p->ours.in, bytes, (size_t)n));
        assert_int_equal(BIO_reset(p->out), 1);
        if (p->ours.out.len)
                assert_int_equal(BIO_write(p->in, buf_at(&p->ours.out), (int)p->ours.out.len), (int)p->ours.out.len);
        buf_take(&p->ours.out, p->ours.out.len);
}

static int any(int ok, X509_STORE_CTX *store)
{
        (void)ok, (void)store;
        return 1;
}

static void meet(struct pair *p, struct identity *i, bool server, const char *suite, const char *key_pem,
                 const char *cert_pem)
{
        SSL_CTX *ctx = SSL_CTX_new(TLS_method()); /* of the process: plain OpenSSL */
        BIO *bio = BIO_new_mem_buf(key_pem, -1);
        EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
        BIO_free(bio);
        bio = BIO_new_mem_buf(cert_pem, -1);
        X509 *cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
        BIO_free(bio);
        assert_int_equal(SSL_CTX_use_certificate(ctx, cert), 1);
        assert_int_equal(SSL_CTX_use_PrivateKey(ctx, key), 1);
        EVP_PKEY_free(key);
        X509_free(cert);
        SSL_CTX_set_ciphersuites(ctx, suite);
        SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, any);
        assert_int_equal(tls_open(&p->ours, i, server), 0);
        p->theirs = SSL_new(ctx);
        SSL_CTX_free(ctx);
        p->in = BIO_new(BIO_s_mem());
        p->out = BIO_new(BIO_s_mem());
        SSL_set_bio(p->theirs, p->in, p->out);
        if (server)
                SSL_set_connect_state(p->theirs);
        else
                SSL_set_accept_state(p->theirs);
        int done = 0, other = 0;
        for (int turn = 0; turn < 10 && !(done == 1 && other == 1); turn++) {
                other = SSL_do_handshake(p->theirs);
                carry(p);
                done = tls_handshake(&p->ours);
                carry(p);
                assert_int_not_equal(done, -1);
        }
        assert_int_equal(done, 1);
        assert_int_equal(other, 1);
        assert_string_equal(SSL_get_cipher_name(p->theirs), suite);
        assert_int_equal(gcm_contexts(), gcm_libctx() ? 2 : 0); /* both directions are ours, and only of our side */
}

static void part(struct pair *p)
{
        tls_close(&p->ours);
        SSL_free(p->theirs);
        assert_int_equal(gcm_contexts(), 0);
}

/* One message each way, of several records. */
static void talk(struct pair *p, size_t len)
{
        static uint8_t sent[MOST], got[MOST + 16384];
        uint64_t updates = 0;
        size_t have = 0, put;
        fill(sent, len);
        for (size_t at = 0, n; at < len; at += n) {
                n = len - at > 16384 ? 16384 : len - at;
                assert_int_equal(tls_write(&p->ours, sent + at, (int)n, &updates), 0);
        }
        carry(p);
        for (int n; have < len && (n = SSL_read(p->theirs, got + have, 16384)) > 0; have += (size_t)n)
                ;
        assert_int_equal(have, len);
        assert_memory_equal(got, sent, len);
        fill(sent, len);
        assert_int_equal(SSL_write_ex(p->theirs, sent, len, &put), 1);
        carry(p);
        have = 0;
        for (int n; have < len && (n = tls_read(&p->ours, got + have, 16384)) > 0; have += (size_t)n)
                ;
        assert_int_equal(have, len);
        assert_memory_equal(got, sent, len);
        assert_int_equal(tls_read(&p->ours, got, 16384), 0);
}

static void test_tls_with_plain_openssl(void **unused)
{
        static const char *const suites[] = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"};
        char *key, *cert;
        uint8_t one[1];
        (void)unused;
        credentials(&key, &cert);
        struct identity *i;
        assert_int_equal(identity_new(&i, URI, key, cert, cert), 0);
        for (int k = 0; k < 4; k++) {
                struct pair p = {0};
                meet(&p, i, k & 1, suites[k / 2], key, cert);
                for (int n = 0; n < 40; n++)
                        talk(&p, 1 + roll(n & 1 ? 300 : MOST));
                /* new keys for each direction, by either side, with and without an answer */
                for (int n = 0; n < 8; n++) {
                        int kind = n & 1 ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED;
                        assert_int_equal(SSL_key_update(n & 2 ? p.ours.ssl : p.theirs, kind), 1);
                        assert_int_equal(SSL_do_handshake(n & 2 ? p.ours.ssl : p.theirs), 1);
                        talk(&p, 1 + roll(MOST));
                }
                /* a byte that changed on the way ends it, and nothing of the record is handed out */
                assert_int_equal(SSL_write(p.theirs, "x", 1), 1);
                carry(&p);
                buf_at(&p.ours.in)[p.ours.in.len - 1 - roll(17)] ^= 1;
                assert_int_equal(tls_read(&p.ours, one, 1), -2);
                assert_int_equal(tls_read(&p.ours, one, 1), -2);
                part(&p);
                ERR_clear_error();
        }
        identity_unref(i);
        free(key);
        free(cert);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_it_is_used_where_it_can_be),
                cmocka_unit_test(test_the_same_as_openssl),
                cmocka_unit_test(test_what_is_not_tls_is_refused),
                cmocka_unit_test(test_tls_with_plain_openssl),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
