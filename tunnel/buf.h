/* SPDX-License-Identifier: Apache-2.0 */
/* Bytes on their way: a growing array with a head. Empty ones hold no memory, so that an idle connection costs none. */
#ifndef SIDESTEP_BUF_H
#define SIDESTEP_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include "block.h"

struct buf {
        uint8_t *bytes;
        size_t head, len, cap;
        size_t most, last; /* greatest length since it was empty, and the time before: what it will take again */
};

static inline uint8_t *buf_at(const struct buf *b)
{
        return b->bytes + b->head;
}

/* Room for n more bytes behind what is there; NULL: no memory. */
static inline uint8_t *buf_room(struct buf *b, size_t n)
{
        if (b->cap - b->head - b->len < n) {
                if (b->head >= b->len / 4 && b->cap - b->len >= n) {
                        memmove(b->bytes, b->bytes + b->head, b->len);
                        b->head = 0;
                } else {
                        size_t cap = b->cap ? b->cap : 4096, want = b->len + n;
                        if (want > 4096 && want < b->last)
                                want = b->last; /* once, instead of growing to it with a copy each time */
                        while (cap < want)
                                cap *= 2;
                        uint8_t *bytes = block_new(cap);
                        if (!bytes)
                                return NULL;
                        if (b->len)
                                memcpy(bytes, b->bytes + b->head, b->len);
                        block_free(b->bytes);
                        b->bytes = bytes;
                        b->cap = cap;
                        b->head = 0;
                }
        }
        return b->bytes + b->head + b->len;
}

static inline void buf_free(struct buf *b)
{
        block_free(b->bytes);
        *b = (struct buf){0};
}

/* Holds no bytes: gives its memory back, if that was more than a small one. */
static inline void buf_empty(struct buf *b)
{
        b->head = 0;
        if (b->cap > 4096) {
                block_free(b->bytes);
                b->bytes = NULL;
                b->cap = 0;
        }
}

/* Memory goes back as soon as the last byte is taken; small buffers are kept for the next message. */
static inline void buf_take(struct buf *b, size_t n)
{
        if (b->len > b->most)
                b->most = b->len;
        b->head += n;
        b->len -= n;
        if (b->len)
                return;
        b->last = b->most;
        b->most = 0;
        buf_empty(b);
}

static inline bool buf_add(struct buf *b, const void *bytes, size_t n)
{
        uint8_t *to = buf_room(b, n);
        if (!to)
                return false;
        memcpy(to, bytes, n);
        b->len += n;
        return true;
}

#endif
