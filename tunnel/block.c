/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * A connection needs some forty blocks of memory for a moment: itself, its names, its queues, what nghttp2 and OpenSSL
 * keep about its stream and its records. A worker puts what it frees on a list by size, of its own and without a lock,
 * and takes the next connection's from there: in steady state none comes from malloc and none goes back
 * (tests/tunnel/test_steady.py).
 *
 * Bounds: BLOCKS_MOST bytes on all lists of a thread, a quarter of it on one, blocks of at most BLOCK_LARGEST; the rest
 * goes to free(). A worker that has had nothing to do for a second gives all of it back (loop.c). Other threads keep
 * nothing.
 *
 * Each block has its size in front, because OpenSSL and nghttp2 do not say it when they free. Sizes step by 16 bytes up
 * to 1 KiB and by a quarter of a power of two beyond. Under AddressSanitizer all of this is malloc and free: it shall
 * see each use of what was freed.
 */
#include <openssl/crypto.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "block.h"

#ifdef KEEPS /* the test of this file */
#elif defined(__SANITIZE_ADDRESS__)
#define KEEPS 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KEEPS 0
#endif
#endif
#ifndef KEEPS
#define KEEPS 1
#endif

#define SMALL 1024
#define STEP 16
#define BLOCK_LARGEST (128 << 10)
#define SHELVES (SMALL / STEP + 1 + 4 * 7) /* four for each doubling from SMALL to BLOCK_LARGEST */
#define SHELF_MOST (BLOCKS_MOST / 4)

union head {
        struct {
                size_t size;
                unsigned shelf; /* SHELVES: none */
        };
        max_align_t align;
};

struct kept {
        struct kept *next;
};

static _Thread_local struct {
        bool keeps;
        size_t bytes;
        struct {
                struct kept *first;
                size_t bytes;
        } shelf[SHELVES];
} own;

/* The class of a size, which grows to the size of that shelf. */
static unsigned shelf_of(size_t *n)
{
        if (*n <= SMALL) {
                unsigned shelf = (unsigned)((*n + STEP - 1) / STEP);
                shelf = shelf ? shelf : 1; /* room for a link */
                *n = (size_t)shelf * STEP;
                return shelf;
        }
        if (*n > BLOCK_LARGEST)
                return SHELVES;
        unsigned power = 63 - (unsigned)__builtin_clzll(*n - 1);
        size_t low = (size_t)1 << power, quarter = low / 4, nth = (*n - 1 - low) / quarter;
        *n = low + (nth + 1) * quarter;
        return SMALL / STEP + 1 + 4 * (power - 10) + (unsigned)nth;
}

void *block_new(size_t n)
{
        if (!KEEPS)
                return malloc(n ? n : 1);
        unsigned shelf = shelf_of(&n);
        if (shelf < SHELVES && own.shelf[shelf].first) {
                struct kept *k = own.shelf[shelf].first;
                own.shelf[shelf].first = k->next;
                own.shelf[shelf].bytes -= n;
                own.bytes -= n;
                return k;
        }
        union head *h = n <= SIZE_MAX - sizeof(*h) ? malloc(sizeof(*h) + n) : NULL;
        if (!h)
                return NULL;
        h->size = n;
        h->shelf = shelf;
        return h + 1;
}

void block_free(void *block)
{
        if (!KEEPS || !block) {
                free(block);
                return;
        }
        union head *h = (union head *)block - 1;
        if (!own.keeps || h->shelf == SHELVES || own.bytes + h->size > BLOCKS_MOST ||
            own.shelf[h->shelf].bytes + h->size > SHELF_MOST) {
                free(h);
                return;
        }
        struct kept *k = block;
        k->next = own.shelf[h->shelf].first;
        own.shelf[h->shelf].first = k;
        own.shelf[h->shelf].bytes += h->size;
        own.bytes += h->size;
}

void *block_zero(size_t n)
{
        void *block = block_new(n);
        return block ? memset(block, 0, n) : NULL;
}

void *block_grow(void *block, size_t n)
{
        if (!KEEPS)
                return realloc(block, n ? n : 1);
        if (!block)
                return block_new(n);
        size_t have = ((union head *)block - 1)->size;
        if (n <= have)
                return block;
        void *more = block_new(n);
        if (!more)
                return NULL;
        memcpy(more, block, have);
        block_free(block);
        return more;
}

char *block_text_n(const char *text, size_t n)
{
        char *copy = block_new(n + 1);
        if (copy) {
                memcpy(copy, text, n);
                copy[n] = 0;
        }
        return copy;
}

char *block_text(const char *text)
{
        return block_text_n(text, strlen(text));
}

void blocks_give_back(void)
{
        for (unsigned i = 0; i < SHELVES && own.bytes; i++) {
                for (struct kept *k = own.shelf[i].first, *next; k; k = next) {
                        next = k->next;
                        free((union head *)k - 1);
                }
                own.bytes -= own.shelf[i].bytes;
                own.shelf[i].first = NULL;
                own.shelf[i].bytes = 0;
        }
}

void blocks_keep(bool on)
{
        own.keeps = on;
        if (!on)
                blocks_give_back();
}

static void *openssl_new(size_t n, const char *file, int line)
{
        (void)file, (void)line;
        return n ? block_new(n) : NULL;
}

static void *openssl_grow(void *block, size_t n, const char *file, int line)
{
        (void)file, (void)line;
        if (n)
                return block_grow(block, n);
        block_free(block);
        return NULL;
}

static void openssl_free(void *block, const char *file, int line)
{
        (void)file, (void)line;
        block_free(block);
}

void blocks_for_openssl(void)
{
        CRYPTO_set_mem_functions(openssl_new, openssl_grow, openssl_free);
}
