/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. A protobuf reader over bounded spans. It never reads past the end of a span, does not recurse,
 * allocates nothing, and refuses groups, field number 0, lengths beyond the span and varints that do not fit 64 bits.
 * Text must be UTF-8 without control characters: it goes into logs, labels and lists of lines.
 */
#include "proto.h"

int proto_varint(struct bytes *b, uint64_t *out)
{
        uint64_t v = 0;
        for (unsigned i = 0; i < 10 && i < b->len; i++) {
                if (i == 9 && b->p[i] > 1)
                        return -1;
                v |= (uint64_t)(b->p[i] & 0x7f) << (7 * i);
                if (!(b->p[i] & 0x80)) {
                        b->p += i + 1;
                        b->len -= i + 1;
                        *out = v;
                        return 0;
                }
        }
        return -1;
}

static int skip(struct bytes *b, uint64_t n)
{
        if (n > b->len)
                return -1;
        b->p += n;
        b->len -= n;
        return 0;
}

int proto_next(struct bytes *b, struct field *f)
{
        uint64_t key;
        if (!b->len)
                return 0;
        if (proto_varint(b, &key) || key >> 3 == 0 || key >> 3 > 0x1fffffff)
                return -1;
        *f = (struct field){.number = (uint32_t)(key >> 3), .wire = key & 7};
        switch (f->wire) {
        case WIRE_VARINT:
                return proto_varint(b, &f->value) ? -1 : 1;
        case WIRE_I64:
                return skip(b, 8) ? -1 : 1;
        case WIRE_I32:
                return skip(b, 4) ? -1 : 1;
        case WIRE_LEN: {
                uint64_t n;
                if (proto_varint(b, &n))
                        return -1;
                f->bytes.p = b->p;
                if (skip(b, n))
                        return -1;
                f->bytes.len = (size_t)n;
                return 1;
        }
        }
        return -1;
}

bool proto_clean(const uint8_t *p, size_t len)
{
        for (size_t i = 0; i < len;) {
                uint8_t c = p[i];
                unsigned more;
                uint32_t v;
                if (c < 0x80) {
                        if (c < 0x20 || c == 0x7f)
                                return false;
                        i++;
                        continue;
                }
                if (c >= 0xc2 && c <= 0xdf) {
                        more = 1;
                        v = c & 0x1f;
                } else if (c >= 0xe0 && c <= 0xef) {
                        more = 2;
                        v = c & 0x0f;
                } else if (c >= 0xf0 && c <= 0xf4) {
                        more = 3;
                        v = c & 0x07;
                } else {
                        return false;
                }
                if (len - i <= more)
                        return false;
                for (unsigned k = 1; k <= more; k++) {
                        if ((p[i + k] & 0xc0) != 0x80)
                                return false;
                        v = v << 6 | (p[i + k] & 0x3f);
                }
                if ((more == 2 && v < 0x800) || (more == 3 && v < 0x10000) || v > 0x10ffff ||
                    (v >= 0xd800 && v <= 0xdfff))
                        return false;
                i += more + 1;
        }
        return true;
}

const char *proto_text(const struct field *f, struct bytes *out)
{
        if (f->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        if (!proto_clean(f->bytes.p, f->bytes.len))
                return PROTO_BAD_TEXT;
        *out = f->bytes;
        return NULL;
}

const char *proto_number(const struct field *f, uint32_t max, uint32_t *out, const char *reason)
{
        if (f->wire != WIRE_VARINT)
                return PROTO_WRONG_TYPE;
        if (f->value > max)
                return reason;
        *out = (uint32_t)f->value;
        return NULL;
}

const char *proto_boolean(const struct field *f, bool *out)
{
        if (f->wire != WIRE_VARINT)
                return PROTO_WRONG_TYPE;
        *out = f->value != 0;
        return NULL;
}

const char *proto_framing(const struct field *f)
{
        struct bytes b = f->bytes;
        struct field x;
        int r;
        if (f->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        while ((r = proto_next(&b, &x)) > 0)
                ;
        return r ? PROTO_TRUNCATED : NULL;
}

const char *proto_message(const struct field *f, struct bytes *body)
{
        if (f->wire != WIRE_LEN)
                return PROTO_WRONG_TYPE;
        *body = f->bytes;
        return NULL;
}
