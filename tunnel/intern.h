/* SPDX-License-Identifier: Apache-2.0 */
/* Strings that many records share (namespaces, accounts, nodes, services), each held once and counted. Writer only. */
#ifndef SIDESTEP_INTERN_H
#define SIDESTEP_INTERN_H

#include <stddef.h>
#include <stdint.h>

struct interned;

struct interns {
        struct interned **slots;
        size_t count, mask;
        uint64_t seed;
};

/* Not cryptographic; the seed is random, so that names chosen by users cannot be made to collide. */
uint64_t hash_bytes(const void *p, size_t len, uint64_t seed);
uint64_t hash_seed(void);

/* Takes a reference. Equal strings have equal pointers. */
const char *intern(struct interns *in, const void *p, size_t len);
void intern_drop(struct interns *in, const char *s);
/* The pointer if the string is held, else NULL; no reference. */
const char *intern_find(const struct interns *in, const void *p, size_t len);
void interns_free(struct interns *in);

#endif
