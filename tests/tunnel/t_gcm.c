/* SPDX-License-Identifier: Apache-2.0 */
/* AES-GCM as the engine has it against OpenSSL's own. Where libipsec-mb is not used both are OpenSSL's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include <dlfcn.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/provider.h>
#include "dice.h"
#include "gcm.h"

#define MOST 70000
#define TAG 16

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

int main(void)
{
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_it_is_used_where_it_can_be),
                cmocka_unit_test(test_the_same_as_openssl),
                cmocka_unit_test(test_what_is_not_tls_is_refused),
        };
        return cmocka_run_group_tests(tests, NULL, NULL);
}
