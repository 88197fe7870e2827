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
 * OpenSSL and nghttp2 do not say how large it is what they free: malloc_usable_size() does, so a block has nothing of
 * ours in front of it and an open connection costs no byte more. Sizes step by 16 bytes up to 1 KiB and by a quarter of
 * a power of two beyond. Under AddressSanitizer all of this is malloc and free: it shall see each use of what was
 * freed.
 */
#include <malloc.h>
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
#define SLACK (4 * STEP) /* malloc may give a little more than it was asked for */
#define BLOCK_LARGEST (128 << 10)
#define SHELVES (SMALL / STEP + 1 + 4 * 7) /* four for each doubling from SMALL to BLOCK_LARGEST */
#define SHELF_MOST (BLOCKS_MOST / 4)

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

/* What is on a shelf. */
static size_t size_on(unsigned shelf)
{
        if (shelf <= SMALL / STEP)
                return (size_t)shelf * STEP;
        unsigned nth = shelf - SMALL / STEP - 1;
        return ((size_t)SMALL << nth / 4) / 4 * (5 + nth % 4);
}

/* The first shelf whose blocks are large enough; SHELVES: none. */
static unsigned shelf_for(size_t n)
{
        if (n <= SMALL)
                return n ? (unsigned)((n + STEP - 1) / STEP) : 1; /* room for a link */
        if (n > BLOCK_LARGEST)
                return SHELVES;
        unsigned power = 63 - (unsigned)__builtin_clzll(n - 1);
        size_t low = (size_t)1 << power;
        return SMALL / STEP + 1 + 4 * (power - 10) + (unsigned)((n - 1 - low) / (low / 4));
}

void *block_new(size_t n)
{
        unsigned shelf = shelf_for(n);
        if (!KEEPS || shelf == SHELVES)
                return malloc(n ? n : 1);
        struct kept *k = own.shelf[shelf].first;
        if (!k)
                return malloc(size_on(shelf));
        own.shelf[shelf].first = k->next;
        own.shelf[shelf].bytes -= size_on(shelf);
        own.bytes -= size_on(shelf);
        return k;
}

void block_free(void *block)
{
        if (!KEEPS || !block || !own.keeps) {
                free(block);
                return;
        }
        size_t has = malloc_usable_size(block), most = has < BLOCK_LARGEST ? has : BLOCK_LARGEST;
        unsigned shelf = shelf_for(most);
        if (size_on(shelf) > most)
                shelf--;
        size_t n = size_on(shelf);
        if (has - n > SLACK || own.bytes + n > BLOCKS_MOST || own.shelf[shelf].bytes + n > SHELF_MOST) {
                free(block);
                return;
        }
        struct kept *k = block;
        k->next = own.shelf[shelf].first;
        own.shelf[shelf].first = k;
        own.shelf[shelf].bytes += n;
        own.bytes += n;
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
        size_t have = malloc_usable_size(block);
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
                        free(k);
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

/* Wiped: SSL_free() in 3.0 gives the traffic secrets of an open connection back as they are. Only handshakes and
 * changes of keys free anything, no record does. */
static void openssl_free(void *block, const char *file, int line)
{
        (void)file, (void)line;
        if (block)
                OPENSSL_cleanse(block, malloc_usable_size(block));
        block_free(block);
}

void blocks_for_openssl(void)
{
        CRYPTO_set_mem_functions(openssl_new, openssl_grow, openssl_free);
}
