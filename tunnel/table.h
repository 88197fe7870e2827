/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copy-on-write hash multimap, and the bin for what readers may still hold.
 *
 * One writer, many readers that take no lock. A slot holds a hash and a pointer; whoever looks up compares keys. The
 * same hash may be there many times. A table has TABLE_SHARDS shards; a change copies the one shard it touches, unless
 * that was made in the generation being built.
 */
#ifndef SIDESTEP_TABLE_H
#define SIDESTEP_TABLE_H

#include <stddef.h>
#include <stdint.h>

#define TABLE_SHARDS 1024

enum dead_kind { DEAD_BLOCK, DEAD_SETTINGS, DEAD_WORKLOAD, DEAD_SERVICE, DEAD_POLICY, DEAD_ENDPOINTS, DEAD_SCOPE };

struct dead {
        void *block;
        uint64_t gen; /* no view of this generation or later refers to it */
        enum dead_kind kind;
};

/* First in, first out; gen is the generation that is being built. */
struct bin {
        uint64_t gen;
        struct dead *queue;
        size_t head, len, cap;
};

struct slot {
        uint64_t hash;
        void *value; /* NULL: free */
};

struct shard {
        uint64_t gen;
        uint32_t count, mask;
        struct slot slots[];
};

struct table {
        struct shard *shards[TABLE_SHARDS];
};

/* Memory for the state is not recoverable: without it the process ends, and the supervisor starts a new one. */
void *must_alloc(size_t size);
void *must_grow(void *block, size_t size);

void bin_add(struct bin *b, void *block, enum dead_kind kind);

/* Both work on a shard alone too: a set of endpoints is one. */
void shard_insert(struct shard **s, struct bin *b, uint64_t hash, void *value);
int shard_remove(struct shard **s, struct bin *b, uint64_t hash, const void *value); /* 1: it was there */

void table_insert(struct table *t, struct bin *b, uint64_t hash, void *value);
int table_remove(struct table *t, struct bin *b, uint64_t hash, const void *value);

/* for (void *v; (v = table_next(t, hash, &at)) != NULL;) with at = 0 before. */
static inline void *table_next(const struct table *t, uint64_t hash, uint32_t *at)
{
        const struct shard *s = t->shards[hash >> 54];
        if (!s)
                return NULL;
        for (; *at <= s->mask; ++*at) {
                const struct slot *x = &s->slots[((uint32_t)hash + *at) & s->mask];
                if (!x->value)
                        return NULL;
                if (x->hash == hash) {
                        ++*at;
                        return x->value;
                }
        }
        return NULL;
}

#define TABLE_EACH(t, var, type)                                                                                       \
        for (unsigned var##_s = 0; var##_s < TABLE_SHARDS; var##_s++)                                                  \
                for (uint32_t var##_i = 0; (t)->shards[var##_s] && var##_i <= (t)->shards[var##_s]->mask; var##_i++)   \
                        for (type *var = (t)->shards[var##_s]->slots[var##_i].value; var; var = NULL)

#endif
