/* SPDX-License-Identifier: Apache-2.0 */
/* Lines from many threads to one fd, by a thread of its own: complete, in order per ring, bounded; never waited for. */
#ifndef SIDESTEP_LOG_H
#define SIDESTEP_LOG_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>

struct log;

/* rings: one for each thread that writes without a lock; ring number "rings" is for all others, under a mutex. fd is
 * duplicated; -1: no log, lines are thrown away. */
int log_new(struct log **out, unsigned rings, int fd);
/* Writes out what is there, for at most a second. No thread may write any more. */
void log_free(struct log *l);
/* One line: time, level, text, LF; at most 2 KiB. */
void log_line(struct log *l, unsigned ring, const char *level, const char *fmt, va_list ap)
        __attribute__((format(printf, 4, 0)));
/* Whether a line would find room, else it is counted as dropped: for lines that cost much to make. */
bool log_room(struct log *l, unsigned ring);
uint64_t log_dropped(const struct log *l); /* lines that found no room, or no reader */

#endif
