/* SPDX-License-Identifier: Apache-2.0 */
/* Reading protobuf messages that strangers may have written. Functions that return text give NULL, or a static reason
 * to refuse. */
#ifndef SIDESTEP_PROTO_H
#define SIDESTEP_PROTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bytes {
        const uint8_t *p;
        size_t len;
};

enum wire { WIRE_VARINT = 0, WIRE_I64 = 1, WIRE_LEN = 2, WIRE_I32 = 5 };

struct field {
        uint32_t number;
        enum wire wire;
        uint64_t value;     /* WIRE_VARINT */
        struct bytes bytes; /* WIRE_LEN */
};

#define PROTO_TRUNCATED "malformed protobuf"
#define PROTO_WRONG_TYPE "field of a wrong type"
#define PROTO_BAD_TEXT "text that is not UTF-8 or holds control characters"
#define PROTO_BAD_ENUM "unknown enum value"
#define PROTO_BAD_ADDRESS "address is neither 4 nor 16 bytes"
#define PROTO_BAD_PORT "port out of range"

/* Takes a field off the front. 1: a field, 0: the end, -1: malformed. */
int proto_next(struct bytes *b, struct field *f);
int proto_varint(struct bytes *b, uint64_t *out);

const char *proto_text(const struct field *f, struct bytes *out);
const char *proto_number(const struct field *f, uint32_t max, uint32_t *out,
                         const char *reason); /* reason: above max */
const char *proto_boolean(const struct field *f, bool *out);
const char *proto_message(const struct field *f, struct bytes *body); /* only opens it */
const char *proto_framing(const struct field *f); /* a message of which only the fields' framing matters */

/* UTF-8 without control characters. */
bool proto_clean(const uint8_t *p, size_t len);

#endif
