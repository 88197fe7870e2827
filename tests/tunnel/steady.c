/* SPDX-License-Identifier: Apache-2.0 */
/* Preloaded into an engine by test_steady.py: counts what its threads, the main one apart, ask of malloc, and the locks
 * that they take, in the file STEADY.PID. A lock that is tried counts as well. */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *block, size_t n);
extern void *__libc_memalign(size_t alignment, size_t n);

static struct {
        atomic_uint_least64_t allocations, locks;
} *counts;

static void count(atomic_uint_least64_t *what)
{
        if (gettid() != getpid())
                atomic_fetch_add(what, 1);
}

#define ALLOCATES()                                                                                                    \
        if (counts)                                                                                                    \
        count(&counts->allocations)
#define LOCKS()                                                                                                        \
        if (counts)                                                                                                    \
        count(&counts->locks)

void *malloc(size_t n)
{
        ALLOCATES();
        return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
        ALLOCATES();
        return __libc_calloc(n, size);
}

void *realloc(void *block, size_t n)
{
        ALLOCATES();
        return __libc_realloc(block, n);
}

void *aligned_alloc(size_t alignment, size_t n)
{
        ALLOCATES();
        return __libc_memalign(alignment, n);
}

#define LOCK(name, type)                                                                                               \
        int name(type *lock)                                                                                           \
        {                                                                                                              \
                static int (*next)(type *);                                                                            \
                if (!next)                                                                                             \
                        *(void **)&next = dlsym(RTLD_NEXT, #name);                                                     \
                LOCKS();                                                                                               \
                return next(lock);                                                                                     \
        }

LOCK(pthread_mutex_lock, pthread_mutex_t)
LOCK(pthread_mutex_trylock, pthread_mutex_t)
LOCK(pthread_rwlock_rdlock, pthread_rwlock_t)
LOCK(pthread_rwlock_wrlock, pthread_rwlock_t)

__attribute__((constructor)) static void begin(void)
{
        char name[4096];
        const char *at = getenv("STEADY");
        if (!at)
                return;
        snprintf(name, sizeof(name), "%s.%d", at, getpid());
        int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, sizeof(*counts)) < 0)
                abort();
        void *shared = mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (shared == MAP_FAILED)
                abort();
        close(fd);
        counts = shared;
}
