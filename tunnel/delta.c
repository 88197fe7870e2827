/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. The framing of a response is looked at as a whole before any of it counts, as protobuf's own
 * decoders do; after that the walks cannot fail. Nothing is copied: names and bodies are spans of the message. A name
 * or version that is no text is not this file's affair: records refuse it one by one. Nothing blocks. Field numbers:
 * Envoy's discovery.proto, by way of agent/sidestep/wire/pb.
 */
#include "delta.h"
#include <errno.h>

enum { RESOURCES = 2, TYPE_URL = 4, NONCE = 5, REMOVED = 6 };

static int any(struct bytes b, struct bytes *value)
{
        struct field f;
        int r;
        while ((r = proto_next(&b, &f)) > 0) {
                if (f.number != 1 && f.number != 2)
                        continue;
                if (f.wire != WIRE_LEN)
                        return -EBADMSG;
                if (f.number == 2)
                        *value = f.bytes;
        }
        return r < 0 ? -EBADMSG : 0;
}

static int resource(struct bytes b, struct delta_resource *out)
{
        struct field f;
        int r, bad = 0;
        *out = (struct delta_resource){0};
        while (!bad && (r = proto_next(&b, &f)) > 0) {
                if (f.number > 3)
                        continue; /* aliases, ttl, cache control: of no use here */
                if (f.wire != WIRE_LEN)
                        return -EBADMSG;
                if (f.number == 1)
                        out->version = f.bytes;
                else if (f.number == 2)
                        bad = any(f.bytes, &out->body);
                else
                        out->name = f.bytes;
        }
        return bad || r < 0 ? -EBADMSG : 0;
}

int delta_open(struct delta *d, struct bytes message)
{
        struct bytes b = message;
        struct delta_resource unused;
        struct field f;
        int r;
        *d = (struct delta){.message = message};
        while ((r = proto_next(&b, &f)) > 0) {
                if (f.number < RESOURCES || f.number > REMOVED || f.number == 3)
                        continue;
                if (f.wire != WIRE_LEN)
                        return -EBADMSG;
                if (f.number == RESOURCES) {
                        if (resource(f.bytes, &unused))
                                return -EBADMSG;
                        d->resources++;
                } else if (f.number == REMOVED) {
                        d->removed++;
                } else if (proto_text(&f, f.number == NONCE ? &d->nonce : &d->type_url)) {
                        return -EBADMSG;
                }
        }
        return r < 0 ? -EBADMSG : 0;
}

static bool next(struct bytes *at, uint32_t number, struct bytes *out)
{
        struct field f;
        while (proto_next(at, &f) > 0) {
                if (f.number == number) {
                        *out = f.bytes;
                        return true;
                }
        }
        return false;
}

bool delta_removed(struct bytes *at, struct bytes *name)
{
        return next(at, REMOVED, name);
}

bool delta_resource(struct bytes *at, struct delta_resource *out)
{
        struct bytes b;
        return next(at, RESOURCES, &b) && resource(b, out) == 0;
}
