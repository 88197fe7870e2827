/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. An open-addressed set of counted strings. Readers see the strings only through records; a record
 * gives its references back when it is freed, that is after the last reader has left every view that held it. The table
 * itself is the writer's alone.
 */
#include "intern.h"
#include "table.h"
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

struct interned {
        uint64_t hash;
        uint32_t refs, len;
        char text[];
};

static uint64_t mix(uint64_t a, uint64_t b)
{
        __uint128_t m = (__uint128_t)a * b;
        return (uint64_t)m ^ (uint64_t)(m >> 64);
}

uint64_t hash_bytes(const void *p, size_t len, uint64_t seed)
{
        const uint8_t *b = p;
        uint64_t h = seed ^ (len * 0x9e3779b97f4a7c15ull), w;
        for (; len >= 8; b += 8, len -= 8) {
                memcpy(&w, b, 8);
                h = mix(h ^ w, 0xa0761d6478bd642full);
        }
        w = 0;
        if (len)
                memcpy(&w, b, len);
        h = mix(h ^ w, 0xe7037ed1a0b428dbull);
        return mix(h ^ seed, 0x8ebc6af09c88c6e3ull);
}

uint64_t hash_seed(void)
{
        uint64_t seed;
        if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
                abort(); /* cannot fail once the kernel's pool is up; never go on with a known seed */
        return seed;
}

static size_t find(const struct interns *in, const void *p, size_t len, uint64_t hash)
{
        size_t i = hash & in->mask;
        for (; in->slots[i]; i = (i + 1) & in->mask) {
                const struct interned *x = in->slots[i];
                if (x->hash == hash && x->len == len && memcmp(x->text, p, len) == 0)
                        break;
        }
        return i;
}

static void grow(struct interns *in)
{
        size_t old = in->slots ? in->mask + 1 : 0, n = old ? old * 2 : 64;
        struct interned **slots = in->slots;
        in->slots = must_alloc(n * sizeof(*in->slots));
        in->mask = n - 1;
        for (size_t i = 0; i < old; i++)
                if (slots[i])
                        in->slots[find(in, slots[i]->text, slots[i]->len, slots[i]->hash)] = slots[i];
        free(slots);
}

const char *intern(struct interns *in, const void *p, size_t len)
{
        if (!in->slots || in->count * 4 >= (in->mask + 1) * 3)
                grow(in);
        uint64_t hash = hash_bytes(p, len, in->seed);
        size_t i = find(in, p, len, hash);
        if (!in->slots[i]) {
                struct interned *x = must_alloc(sizeof(*x) + len + 1);
                x->hash = hash;
                x->len = (uint32_t)len;
                if (len)
                        memcpy(x->text, p, len);
                in->slots[i] = x;
                in->count++;
        }
        in->slots[i]->refs++;
        return in->slots[i]->text;
}

const char *intern_find(const struct interns *in, const void *p, size_t len)
{
        if (!in->slots)
                return NULL;
        struct interned *x = in->slots[find(in, p, len, hash_bytes(p, len, in->seed))];
        return x ? x->text : NULL;
}

void intern_drop(struct interns *in, const char *s)
{
        struct interned *x = (struct interned *)(s - offsetof(struct interned, text));
        if (--x->refs)
                return;
        size_t i = find(in, x->text, x->len, x->hash);
        in->slots[i] = NULL;
        in->count--;
        for (size_t j = (i + 1) & in->mask; in->slots[j]; j = (j + 1) & in->mask) {
                size_t home = in->slots[j]->hash & in->mask;
                if (((j - home) & in->mask) >= ((j - i) & in->mask)) {
                        in->slots[i] = in->slots[j];
                        in->slots[j] = NULL;
                        i = j;
                }
        }
        free(x);
}

void interns_free(struct interns *in)
{
        for (size_t i = 0; in->slots && i <= in->mask; i++)
                free(in->slots[i]);
        free(in->slots);
        *in = (struct interns){.seed = in->seed};
}
