/* SPDX-License-Identifier: Apache-2.0 */
/* Memory for what comes and goes with each connection: a worker keeps what it freed for the next one. */
#ifndef SIDESTEP_BLOCK_H
#define SIDESTEP_BLOCK_H

#include <stdbool.h>
#include <stddef.h>

/* As malloc, calloc for one, realloc, strdup, strndup and free; only with one another. NULL: no memory. Any thread may
 * free what another has made. */
void *block_new(size_t n);
void *block_zero(size_t n);
void *block_grow(void *block, size_t n);
char *block_text(const char *text);
char *block_text_n(const char *text, size_t n);
void block_free(void *block);

/* From now on this thread keeps what it frees, at most BLOCKS_MOST bytes; or no more. */
#define BLOCKS_MOST (1 << 20)
void blocks_keep(bool on);
/* What it has kept so far goes back. */
void blocks_give_back(void);

/* OpenSSL's memory too. Only before it has any: else, as in a process that used it before us, it stays with malloc. */
void blocks_for_openssl(void);

#endif
