/* SPDX-License-Identifier: Apache-2.0 */
/* Builds protobuf bodies and batches for tests: an encoder of its own, so that no mistake of the decoder is repeated
 * here. */
#ifndef SIDESTEP_TEST_RECORDS_H
#define SIDESTEP_TEST_RECORDS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct buf {
        uint8_t *p;
        size_t len, cap;
};

static inline void buf_put(struct buf *b, const void *p, size_t n)
{
        if (b->len + n > b->cap) {
                b->cap = (b->len + n) * 2;
                b->p = realloc(b->p, b->cap);
        }
        if (n)
                memcpy(b->p + b->len, p, n);
        b->len += n;
}

static inline void buf_free(struct buf *b)
{
        free(b->p);
        *b = (struct buf){0};
}

static inline void put_varint(struct buf *b, uint64_t v)
{
        uint8_t out[10];
        unsigned n = 0;
        do {
                out[n] = (uint8_t)(v & 0x7f) | (v > 0x7f ? 0x80 : 0);
                n++;
                v >>= 7;
        } while (v);
        buf_put(b, out, n);
}

static inline void put_number(struct buf *b, unsigned field, uint64_t v)
{
        put_varint(b, field << 3);
        put_varint(b, v);
}

static inline void put_bytes(struct buf *b, unsigned field, const void *p, size_t n)
{
        put_varint(b, field << 3 | 2);
        put_varint(b, n);
        buf_put(b, p, n);
}

static inline void put_text(struct buf *b, unsigned field, const char *s)
{
        put_bytes(b, field, s, strlen(s));
}

/* Takes the message's bytes and frees them. */
static inline void put_message(struct buf *b, unsigned field, struct buf m)
{
        put_bytes(b, field, m.p, m.len);
        buf_free(&m);
}

static inline void put_le32(struct buf *b, uint32_t v)
{
        uint8_t x[4] = {(uint8_t)v, (uint8_t)(v >> 8), (uint8_t)(v >> 16), (uint8_t)(v >> 24)};
        buf_put(b, x, 4);
}

enum { SET = 1, DEL = 2, POLICY = 3, POLICY_GONE = 4 };

static inline struct buf batch_new(uint32_t flags)
{
        struct buf b = {0};
        buf_put(&b, "SSB1", 4);
        put_le32(&b, flags);
        put_le32(&b, 0);
        put_le32(&b, 0);
        return b;
}

/* Takes the body. */
static inline void batch_add(struct buf *b, uint32_t op, const char *name, const char *version, struct buf body)
{
        static const uint8_t zero[8];
        size_t used = 16 + strlen(name) + strlen(version) + body.len;
        uint32_t count;
        put_le32(b, op);
        put_le32(b, (uint32_t)strlen(name));
        put_le32(b, (uint32_t)strlen(version));
        put_le32(b, (uint32_t)body.len);
        buf_put(b, name, strlen(name));
        buf_put(b, version, strlen(version));
        buf_put(b, body.p, body.len);
        buf_put(b, zero, (8 - used % 8) % 8);
        buf_free(&body);
        memcpy(&count, b->p + 8, 4); /* the tests run on little-endian machines only */
        count++;
        memcpy(b->p + 8, &count, 4);
}

static inline struct buf port_message(unsigned service, unsigned target)
{
        struct buf b = {0};
        put_number(&b, 1, service);
        if (target)
                put_number(&b, 2, target);
        return b;
}

static inline struct buf network_address(const char *network, const void *ip, size_t len, int prefix)
{
        struct buf b = {0};
        if (*network)
                put_text(&b, 1, network);
        put_bytes(&b, 2, ip, len);
        if (prefix >= 0)
                put_number(&b, 3, (unsigned)prefix);
        return b;
}

static inline struct buf gateway_message(const char *hostname)
{
        struct buf b = {0}, name = {0};
        put_text(&name, 1, "istio-system");
        put_text(&name, 2, hostname);
        put_message(&b, 1, name);
        put_number(&b, 3, 15008);
        return b;
}

/* workload in an Address */
static inline struct buf as_workload(struct buf w)
{
        struct buf b = {0};
        put_message(&b, 1, w);
        return b;
}

static inline struct buf as_service(struct buf s)
{
        struct buf b = {0};
        put_message(&b, 2, s);
        return b;
}

#endif
