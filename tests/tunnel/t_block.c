/* SPDX-License-Identifier: Apache-2.0 */
/* What a worker keeps of its memory: blocks are whole, what is kept is bounded and goes back. Under AddressSanitizer
 * block.c is malloc and free, so it is here once more as everybody else has it. */
#define KEEPS 1
#include "block.c"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <cmocka.h>

#define LIVE 512
#define STEPS 200000

static uint64_t dice = 88172645463325252ull;

static size_t roll(size_t most)
{
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        return (size_t)(dice % most);
}

/* As many small ones as large ones, and some that no shelf is for. */
static size_t some_size(void)
{
        return roll((size_t)2 << roll(19));
}

static size_t kept_bytes(void)
{
        size_t sum = 0;
        for (unsigned i = 0; i < SHELVES; i++) {
                size_t bytes = 0;
                for (struct kept *k = own.shelf[i].first; k; k = k->next) {
                        assert_true(malloc_usable_size(k) >= size_on(i));
                        bytes += size_on(i);
                }
                assert_int_equal(bytes, own.shelf[i].bytes);
                assert_true(bytes <= SHELF_MOST);
                sum += bytes;
        }
        return sum;
}

static void test_shelves(void **unused)
{
        unsigned before = 0;
        (void)unused;
        for (size_t n = 0; n <= BLOCK_LARGEST; n++) {
                unsigned shelf = shelf_for(n);
                size_t size = size_on(shelf);
                assert_true(shelf < SHELVES && size >= n && size >= sizeof(struct kept) && size % STEP == 0);
                assert_true(n <= SMALL ? size < n + STEP || n == 0 : size - n <= n / 4);
                assert_true(shelf == before || shelf == before + 1 || n == 0); /* each size on one, in order */
                assert_int_equal(shelf_for(size), shelf);
                before = shelf;
        }
        assert_int_equal(before, SHELVES - 1);
        assert_int_equal(size_on(before), BLOCK_LARGEST);
        assert_int_equal(shelf_for(BLOCK_LARGEST + 1), SHELVES);
}

static void test_blocks_are_whole_and_bounded(void **unused)
{
        static struct {
                uint8_t *at, mark;
                size_t n;
        } live[LIVE];
        size_t most = 0;
        (void)unused;
        blocks_keep(true);
        for (unsigned step = 0; step < STEPS; step++) {
                unsigned i = (unsigned)roll(LIVE);
                for (size_t k = 0; k < live[i].n; k += 1 + live[i].n / 16)
                        assert_int_equal(live[i].at[k], live[i].mark);
                size_t n = some_size(), same = n < live[i].n ? n : live[i].n;
                if (live[i].at && roll(3) == 0) {
                        live[i].at = block_grow(live[i].at, n);
                        assert_non_null(live[i].at);
                        for (size_t k = 0; k < same; k += 1 + same / 16)
                                assert_int_equal(live[i].at[k], live[i].mark);
                } else {
                        block_free(live[i].at);
                        live[i].at = roll(2) ? block_new(n) : block_zero(n);
                        assert_non_null(live[i].at);
                }
                assert_int_equal((uintptr_t)live[i].at % STEP, 0);
                live[i].n = n;
                live[i].mark = (uint8_t)roll(256);
                memset(live[i].at, live[i].mark, n);
                if (step % 256 == 0) {
                        assert_int_equal(kept_bytes(), own.bytes);
                        assert_true(own.bytes <= BLOCKS_MOST);
                        most = own.bytes > most ? own.bytes : most;
                }
        }
        assert_true(most > 0);
        for (unsigned i = 0; i < LIVE; i++)
                block_free(live[i].at);
        assert_true(own.bytes > 0);
        blocks_give_back();
        assert_int_equal(own.bytes, 0);
        assert_int_equal(kept_bytes(), 0);
        block_free(block_new(100));
        assert_int_equal(own.bytes, 112);
        blocks_keep(false);
        block_free(block_new(100));
        assert_int_equal(own.bytes, 0);
}

static void test_texts(void **unused)
{
        (void)unused;
        char *a = block_text("identity"), *b = block_text_n("identity", 2), *zero = block_zero(3);
        assert_string_equal(a, "identity");
        assert_string_equal(b, "id");
        assert_memory_equal(zero, "\0\0\0", 3);
        block_free(a);
        block_free(b);
        block_free(zero);
        block_free(NULL);
}

/* What OpenSSL frees holds nothing of what it held, on the shelf and for who gets it next. */
static void test_of_openssl_is_wiped(void **unused)
{
        static const size_t sizes[] = {32, 48, 1000, 7608, BLOCK_LARGEST};
        (void)unused;
        blocks_keep(true);
        for (unsigned i = 0; i < 2 * sizeof(sizes) / sizeof(*sizes); i++) {
                size_t n = sizes[i / 2], left = 0;
                uint8_t *block = openssl_new(n, "", 0);
                memset(block, 0x5a, n);
                if (i & 1)
                        openssl_free(block, "", 0);
                else
                        block_free(block); /* the control: others' are not */
                uint8_t *again = block_new(n);
                assert_ptr_equal(again, block);
                for (size_t at = sizeof(struct kept); at < n; at++)
                        left += again[at] == 0x5a;
                assert_int_equal(left, i & 1 ? 0 : n - sizeof(struct kept));
                block_free(again);
        }
        openssl_free(NULL, "", 0);
        blocks_keep(false);
}

int main(void)
{
        const struct CMUnitTest tests[] = {cmocka_unit_test(test_shelves),
                                           cmocka_unit_test(test_blocks_are_whole_and_bounded),
                                           cmocka_unit_test(test_texts), cmocka_unit_test(test_of_openssl_is_wiped)};
        return cmocka_run_group_tests(tests, NULL, NULL);
}
