/* failing_calls.h: system calls and allocations of this program that fail on purpose. The linker sends each call of a
 * name in cmake/tests.cmake to __wrap_NAME (--wrap), so that the library and the program are tested as they are; calls
 * from other libraries go where they always did.
 */
#ifndef FAILING_CALLS_H
#define FAILING_CALLS_H
#include <stdarg.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>

typedef enum failing_mode {
    FAIL_DISK,   /* ENOSPC, that one call */
    FAIL_BROKEN, /* EIO, that one and all later ones that write or sync */
    FAIL_MEMORY, /* ENOMEM: allocations and mappings */
    FAIL_SIGNAL, /* EINTR, that one call */
    FAIL_SHORT,  /* half of what was to be read or written */
    FAIL_MODES,
    FAIL_KILLED = FAIL_MODES, /* the process is killed in front of that call */
    FAIL_TORN                 /* and after half of what was to be written */
} failing_mode;

static struct {
    int wanted, armed; /* armed: inside the code under test */
    failing_mode mode;
    size_t calls,
        at; /* made since it was armed, of the kind that the mode is about; the number that fails, from 1 */
} failing;

enum { CALL_WRITES = 1, CALL_WAITS = 2, CALL_ALLOCATES = 4, CALL_COUNTED = 8, CALL_FILE = 16 };

/* Whether this call fails; errno is set then. */
static int failing_here(int kind)
{
    static const int reasons[] = {ENOSPC, EIO, ENOMEM, EINTR, 0, 0, 0};
    static const int kinds[] = {CALL_FILE,    CALL_FILE, CALL_ALLOCATES, CALL_WAITS,
                                CALL_COUNTED, CALL_FILE, CALL_COUNTED};
    if (!failing.armed || !(kind & kinds[failing.mode]))
        return 0;
    failing.calls++;
    if (failing.calls != failing.at &&
        !(failing.mode == FAIL_BROKEN && failing.calls > failing.at && failing.at && (kind & CALL_WRITES)))
        return 0;
    if (failing.mode == FAIL_KILLED)
        (void)kill(getpid(), SIGKILL);
    errno = reasons[failing.mode];
    return 1;
}

/* open, with a mode where it makes a file */
int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
    va_list arguments;
    unsigned mode = 0;
    va_start(arguments, flags);
    if (flags & O_CREAT)
        mode = va_arg(arguments, unsigned);
    va_end(arguments);
    return failing_here(CALL_FILE | CALL_WAITS) ? -1 : __real_open(path, flags, mode);
}

int __real_openat(int folder, const char *path, int flags, ...);
int __wrap_openat(int folder, const char *path, int flags, ...);
int __wrap_openat(int folder, const char *path, int flags, ...)
{
    va_list arguments;
    unsigned mode = 0;
    va_start(arguments, flags);
    if (flags & O_CREAT)
        mode = va_arg(arguments, unsigned);
    va_end(arguments);
    return failing_here(CALL_FILE | CALL_WAITS) ? -1 : __real_openat(folder, path, flags, mode);
}

/* A call that fails with -1. */
#define FAILING(name, parameters, arguments, kind)                \
    int __real_##name parameters;                                 \
    int __wrap_##name parameters;                                 \
    int __wrap_##name parameters                                  \
    {                                                             \
        return failing_here(kind) ? -1 : __real_##name arguments; \
    }
FAILING(rename, (const char *from, const char *to), (from, to), CALL_FILE | CALL_WRITES)
FAILING(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), CALL_FILE | CALL_WRITES)
FAILING(fsync, (int file), (file), CALL_FILE | CALL_WRITES | CALL_WAITS)
FAILING(fdatasync, (int file), (file), CALL_FILE | CALL_WRITES | CALL_WAITS)
FAILING(ftruncate, (int file, off_t size), (file, size), CALL_FILE | CALL_WRITES | CALL_WAITS)
FAILING(mkdir, (const char *path, mode_t mode), (path, mode), CALL_FILE | CALL_WRITES)
FAILING(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), CALL_FILE | CALL_WRITES)
FAILING(fstat, (int file, struct stat *info), (file, info), CALL_FILE)
FAILING(flock, (int file, int what), (file, what), CALL_FILE | CALL_WAITS)

/* It is closed, whatever it says. */
int __real_close(int file);
int __wrap_close(int file);
int __wrap_close(int file)
{
    int failed = failing_here(CALL_FILE), reason = errno, status = __real_close(file);
    errno = failed ? reason : errno;
    return failed ? -1 : status;
}

/* Reads and writes may do half. */
#define FAILING_TRANSFER(name, parameters, arguments, half, kind)                           \
    ssize_t __real_##name parameters;                                                       \
    ssize_t __wrap_##name parameters;                                                       \
    ssize_t __wrap_##name parameters                                                        \
    {                                                                                       \
        if (!failing_here(CALL_FILE | CALL_WAITS | (size > 1 ? CALL_COUNTED : 0) | (kind))) \
            return __real_##name arguments;                                                 \
        if (failing.mode < FAIL_SHORT)                                                      \
            return -1;                                                                      \
        ssize_t done = __real_##name half;                                                  \
        if (failing.mode == FAIL_TORN)                                                      \
            (void)kill(getpid(), SIGKILL);                                                  \
        return done;                                                                        \
    }
FAILING_TRANSFER(read, (int file, void *to, size_t size), (file, to, size), (file, to, size / 2), 0)
FAILING_TRANSFER(pread, (int file, void *to, size_t size, off_t at), (file, to, size, at),
                 (file, to, size / 2, at), 0)
FAILING_TRANSFER(write, (int file, const void *from, size_t size), (file, from, size), (file, from, size / 2),
                 CALL_WRITES)
FAILING_TRANSFER(pwrite, (int file, const void *from, size_t size, off_t at), (file, from, size, at),
                 (file, from, size / 2, at), CALL_WRITES)

void *__real_mmap(void *at, size_t size, int protection, int flags, int file, off_t offset);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int file, off_t offset);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int file, off_t offset)
{
    return failing_here(CALL_ALLOCATES) ? MAP_FAILED : __real_mmap(at, size, protection, flags, file, offset);
}

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
    return failing_here(CALL_ALLOCATES) ? NULL : __real_malloc(size);
}

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size)
{
    return failing_here(CALL_ALLOCATES) ? NULL : __real_calloc(count, size);
}

void *__real_realloc(void *block, size_t size);
void *__wrap_realloc(void *block, size_t size);
void *__wrap_realloc(void *block, size_t size)
{
    return failing_here(CALL_ALLOCATES) ? NULL : __real_realloc(block, size);
}

void *__real_aligned_alloc(size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return failing_here(CALL_ALLOCATES) ? NULL : __real_aligned_alloc(alignment, size);
}

int __real_posix_memalign(void **block, size_t alignment, size_t size);
int __wrap_posix_memalign(void **block, size_t alignment, size_t size);
int __wrap_posix_memalign(void **block, size_t alignment, size_t size)
{
    return failing_here(CALL_ALLOCATES) ? ENOMEM : __real_posix_memalign(block, alignment, size);
}

#endif
