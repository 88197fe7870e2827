/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation. Open addressing with linear probing, deletion by shifting back, so a probe ends at the first
 * free slot. The shard is chosen by the top ten bits of the hash, the slot by the low ones. A shard whose generation is
 * the one being built is not visible to a reader yet and is changed in place; any other is copied first and the old one
 * put into the bin. 100 000 entries make shards of about a hundred: a change copies some 3 KiB. Nothing here blocks;
 * only the writer calls anything but table_next().
 */
#include "table.h"
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void out_of_memory(void)
{
        fputs("engine: out of memory for the state of the mesh\n", stderr);
        abort();
}

void *must_grow(void *block, size_t size)
{
        void *p = realloc(block, size ? size : 1);
        if (!p)
                out_of_memory();
        return p;
}

void *must_alloc(size_t size)
{
        void *p = calloc(1, size ? size : 1);
        if (!p)
                out_of_memory();
        return p;
}

void bin_add(struct bin *b, void *block, enum dead_kind kind)
{
        if (b->len == b->cap) {
                b->cap = b->cap ? b->cap * 2 : 64;
                b->queue = must_grow(b->queue, b->cap * sizeof(*b->queue));
        }
        b->queue[b->len++] = (struct dead){.block = block, .gen = b->gen, .kind = kind};
}

static void place(struct shard *s, uint64_t hash, void *value)
{
        uint32_t i = (uint32_t)hash & s->mask;
        while (s->slots[i].value)
                i = (i + 1) & s->mask;
        s->slots[i] = (struct slot){.hash = hash, .value = value};
        s->count++;
}

static struct shard *shard_new(uint64_t gen, uint32_t slots)
{
        struct shard *s = must_alloc(sizeof(*s) + slots * sizeof(struct slot));
        s->gen = gen;
        s->mask = slots - 1;
        return s;
}

/* A shard that may be changed, with room for one more when grow is set (at most 3/4 full, so every probe finds a free
 * slot). */
static struct shard *writable(struct shard **sp, struct bin *b, bool grow)
{
        struct shard *s = *sp, *n;
        uint32_t need = s ? s->count + grow : 1;
        if (!s) {
                *sp = shard_new(b->gen, 4);
                return *sp;
        }
        uint32_t slots = s->mask + 1;
        bool full = need * 4 > slots * 3;
        if (s->gen == b->gen && !full)
                return s;
        if (full) {
                n = shard_new(b->gen, slots * 2);
                for (uint32_t i = 0; i < slots; i++)
                        if (s->slots[i].value)
                                place(n, s->slots[i].hash, s->slots[i].value);
        } else {
                size_t size = sizeof(*s) + slots * sizeof(struct slot);
                n = must_grow(NULL, size);
                memcpy(n, s, size);
                n->gen = b->gen;
        }
        if (s->gen == b->gen)
                free(s);
        else
                bin_add(b, s, DEAD_BLOCK);
        *sp = n;
        return n;
}

void shard_insert(struct shard **s, struct bin *b, uint64_t hash, void *value)
{
        place(writable(s, b, true), hash, value);
}

static int find(const struct shard *s, uint64_t hash, const void *value, uint32_t *at)
{
        for (uint32_t i = (uint32_t)hash & s->mask; s->slots[i].value; i = (i + 1) & s->mask) {
                if (s->slots[i].value == value && s->slots[i].hash == hash) {
                        *at = i;
                        return 1;
                }
        }
        return 0;
}

int shard_remove(struct shard **sp, struct bin *b, uint64_t hash, const void *value)
{
        uint32_t i;
        if (!*sp || !find(*sp, hash, value, &i))
                return 0;
        struct shard *s = writable(sp, b, false); /* a copy keeps every slot's place */
        s->slots[i].value = NULL;
        s->count--;
        for (uint32_t j = (i + 1) & s->mask; s->slots[j].value; j = (j + 1) & s->mask) {
                uint32_t home = (uint32_t)s->slots[j].hash & s->mask;
                /* Moves back unless its home lies cyclically in (i, j]. */
                if (((j - home) & s->mask) >= ((j - i) & s->mask)) {
                        s->slots[i] = s->slots[j];
                        s->slots[j].value = NULL;
                        i = j;
                }
        }
        if (!s->count) {
                free(s); /* made or copied in this generation */
                *sp = NULL;
        } else if (s->mask > 7 && s->count * 8 < s->mask) {
                struct shard *n = shard_new(b->gen, (s->mask + 1) / 2);
                for (uint32_t k = 0; k <= s->mask; k++)
                        if (s->slots[k].value)
                                place(n, s->slots[k].hash, s->slots[k].value);
                free(s);
                *sp = n;
        }
        return 1;
}

void table_insert(struct table *t, struct bin *b, uint64_t hash, void *value)
{
        shard_insert(&t->shards[hash >> 54], b, hash, value);
}

int table_remove(struct table *t, struct bin *b, uint64_t hash, const void *value)
{
        return shard_remove(&t->shards[hash >> 54], b, hash, value);
}
