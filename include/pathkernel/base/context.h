/* pathkernel/base/context.h: what a call runs with: allocator, threads, memory limit, progress; aligned
 * memory and arenas. Private, for all modules: errors, sizes, numbers as text.
 *
 * A zeroed pk_context means default everywhere, and NULL is accepted wherever a context is asked for
 * (the message of an error is then lost). A context belongs to one call at a time; distinct contexts may
 * run concurrently. There are no mutable globals.
 */
#ifndef PATHKERNEL_CONTEXT_H
#define PATHKERNEL_CONTEXT_H
#include "status.h"

/* >>> declarations */
PK__BEGIN_C

/* The number type of weights, data, activations and their products. What is added up over examples and steps, results,
 * rates and times are double in any case. All files of a program must agree about it. */
#ifdef PATHKERNEL_FLOAT
typedef float pk_real;
#else
typedef double pk_real;
#endif

#define PK_MESSAGE_SIZE 512

/* Memory from the caller. allocate returns bytes aligned to alignment (a power of two, at most 64), or
 * NULL; release gets what allocate returned and the same size. Both may be called from one thread at a
 * time only. allocate == NULL: the C library. */
typedef struct pk_allocator {
    void *(*allocate)(void *user, size_t bytes, size_t alignment);
    void (*release)(void *user, void *pointer, size_t bytes);
    void *user;
} pk_allocator;

struct pk_operation;

/* Private: what recent parallel regions of a context gained (parallel.h). Times in seconds. */
typedef struct pk_load {
    double until, rest; /* one thread until then; how long that was, at most a second */
    double gain, work;  /* against one thread; of a trial */
    int trusted, tries; /* whether the threads are not on trial; regions of the trial */
    long process;       /* that the first region belongs to */
} pk_load;

typedef struct pk_context {
    pk_allocator allocator;
    /* 0: omp_get_max_threads(), or 1 inside a parallel region or without OpenMP. More than 64 count as 64 or as many as
     * there are processors, and no call starts more than it has tasks for. */
    int threads;
    size_t memory_limit; /* bytes that the library may hold at one time through this context; 0: no limit */
    /* Called between units of work from the calling thread, fraction in [0, 1]; non-zero cancels. */
    int (*progress)(void *user, const char *phase, double fraction);
    void *progress_user;
    /* Operations of the user's own (graph.h) that the network language knows by name, after the built-in ones; the last one
     * is NULL. They outlive every network that was read with this context. NULL: none. */
    const struct pk_operation *const *operations;
    /* Read only: */
    size_t memory_used; /* bytes held now */
    size_t memory_peak; /* the most that was ever held */
    size_t regions;     /* parallel regions that were started */
    size_t backed_off;  /* how often calls went on with one thread for a while, since that was faster */
    pk_load load;
    char message[PK_MESSAGE_SIZE];
} pk_context;

/* The sentence that tells what went wrong last, with the offending shape, file or value; "" if nothing. */
PK_API const char *pk_message(const pk_context *context);

/* Threads that a call with this context uses, >= 1. */
PK_API int pk_threads(const pk_context *context);

/* *(void **)pointer = count * size zeroed bytes, aligned to 64; NULL for 0 bytes. what names the memory
 * in messages. PK_OVERFLOW, PK_MEMORY_LIMIT (the message says what would do) or PK_MEMORY; then
 * *pointer is NULL. */
PK_API PK__MUST_USE pk_status pk_allocate(pk_context *context, size_t count, size_t size, const char *what,
                                          void *pointer);
/* Gives back what pk_allocate gave, through the same context; NULL is allowed. */
PK_API void pk_release(pk_context *context, void *pointer);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_CONTEXT_INTERNALS_KNOWN)
#define PATHKERNEL_CONTEXT_INTERNALS_KNOWN
/* >>> internals */
/* An arena hands out 64-byte aligned pieces of one allocation. With base == NULL it only adds up sizes. The code that
 * takes pieces therefore runs twice, first to measure and then, with memory, to take:
 *
 *     pk__arena arena = {NULL, 0, 0, 0};
 *     do
 *         x = pk__arena_take(&arena, count, sizeof *x);
 *     while (pk__arena_again(context, &arena, "what the memory is for", &status));
 *     if (status) return status;
 *     ... pk_release(context, arena.base);
 */
typedef struct pk__arena {
    unsigned char *base;
    size_t capacity, used; /* bytes */
    int overflow;          /* a size did not fit into size_t or into the capacity */
} pk__arena;

/* count * size bytes (not zeroed), or NULL when measuring, when count * size == 0 or on overflow. */
PK__INTERNAL void *pk__arena_take(pk__arena *arena, size_t count, size_t size);
/* After measuring: allocates what was measured, and 1 where this succeeded and there is something to take. After taking,
 * and on an error: 0. *status is PK_OK, PK_OVERFLOW or that of pk_allocate. */
PK__INTERNAL int pk__arena_again(pk_context *context, pk__arena *arena, const char *what, pk_status *status);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_CONTEXT_IMPLEMENTED)
#define PATHKERNEL_CONTEXT_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__GLIBC__) && !defined(__USE_XOPEN2K8)
#error "pathkernel's implementation needs POSIX: compile it with -std=gnu11 or -D_POSIX_C_SOURCE=200809L"
#endif
PK__BEGIN_COLD_CODE

/* The rounding unit of pk_real, which limits what can be measured in its numbers. */
#define PK__EPSILON (sizeof(pk_real) == sizeof(float) ? 1.1920929e-7 : 2.220446049250313e-16)

/* 1 unless value is a NaN or an infinity, whatever -ffast-math makes of isfinite. */
PK__INLINE int pk__finite(double value)
{
    uint64_t bits, exponent = (uint64_t)0x7ff << 52;
    memcpy(&bits, &value, sizeof bits);
    return (bits & exponent) != exponent;
}

PK__PRIVATE int pk__thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Numbers are written and read with a point, whatever the locale of the program: this thread has the "C"
 * locale between these two. */
typedef struct pk__locale {
    locale_t plain, before; /* plain: 0 where there is no memory for it */
} pk__locale;

static pk__locale pk__locale_enter(void)
{
    pk__locale locale = {newlocale(LC_ALL_MASK, "C", (locale_t)0), (locale_t)0};
    if (locale.plain)
        locale.before = uselocale(locale.plain);
    return locale;
}

static void pk__locale_leave(pk__locale locale)
{
    if (!locale.plain)
        return;
    uselocale(locale.before);
    freelocale(locale.plain);
}

/* snprintf in the "C" locale. */
PK__FORMAT(3, 4)
PK__PRIVATE int pk__print(char *text, size_t size, const char *format, ...)
{
    va_list arguments;
    pk__locale locale = pk__locale_enter();
    va_start(arguments, format);
    int length = vsnprintf(text, size, format, arguments);
    va_end(arguments);
    pk__locale_leave(locale);
    return length;
}

/* A message quotes files and texts that others wrote: it stays one line, and sends a terminal no commands. */
PK__PRIVATE void pk__clean_message(pk_context *context)
{
    for (char *at = context->message; *at; at++)
        if ((unsigned char)*at < ' ' || *at == 127)
            *at = '?';
}

/* Records the message and returns the status, so that errors read `return pk__fail(...)`. Not from
 * inside a parallel region. */
PK__FORMAT(3, 4)
PK__PRIVATE pk_status pk__fail(pk_context *context, pk_status status, const char *format, ...)
{
    if (context) {
        va_list arguments;
        pk__locale locale = pk__locale_enter();
        va_start(arguments, format);
        vsnprintf(context->message, sizeof context->message, format, arguments);
        va_end(arguments);
        pk__clean_message(context);
        pk__locale_leave(locale);
    }
    return status;
}

/* Bytes of a file as they may stand in a message: printable, and cut to size - 1. Returns text. */
PK__PRIVATE const char *pk__printable(const char *bytes, size_t length, char *text, size_t size)
{
    size_t i;
    for (i = 0; i < length && i + 1 < size; i++)
        text[i] = bytes[i] < ' ' || bytes[i] > '~' ? '?' : bytes[i];
    text[i] = 0;
    return text;
}

/* 1 and *value where the whole text is a finite decimal number of fewer than 512 characters, correctly
 * rounded, with a point whatever the locale; else 0. */
PK__PRIVATE int pk__number(const char *text, size_t length, double *value)
{
    static const double powers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                    1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    char copy[512];
    size_t i = 0, digits = 0;
    uint64_t mantissa = 0;
    int exponent = 0, point = 0, exact = 1, negative = length && text[0] == '-';
    if (length >= sizeof copy)
        return 0;
    for (i = length && (text[0] == '-' || text[0] == '+'); i < length; i++) {
        if (text[i] == '.' && !point) {
            point = 1;
        } else if (text[i] >= '0' && text[i] <= '9') {
            digits++;
            if (mantissa < (uint64_t)1 << 53) /* so that it stays below 2^57 */
                mantissa = 10 * mantissa + (uint64_t)(text[i] - '0'), exponent -= point;
            else
                exact = 0;
        } else {
            break;
        }
    }
    if (!digits)
        return 0;
    if (i < length) {
        int minus = 0, written = 0;
        if (text[i] != 'e' && text[i] != 'E')
            return 0;
        if (++i < length && (text[i] == '-' || text[i] == '+'))
            minus = text[i++] == '-';
        if (i == length)
            return 0;
        for (; i < length; i++) {
            if (text[i] < '0' || text[i] > '9')
                return 0;
            written = written < 100000 ? 10 * written + (text[i] - '0') : written;
        }
        exponent += minus ? -written : written;
    }
    /* Both operands exact, so one operation rounds correctly (Clinger 1990). */
    if (FLT_EVAL_METHOD == 0 && exact && mantissa <= (uint64_t)1 << 53 && exponent >= -22 && exponent <= 22) {
        double magnitude =
            exponent < 0 ? (double)mantissa / powers[-exponent] : (double)mantissa * powers[exponent];
        *value = negative ? -magnitude : magnitude;
        return 1;
    }
    pk__locale locale = pk__locale_enter();
    memcpy(copy, text, length);
    copy[length] = 0;
    double parsed = strtod(copy, NULL);
    pk__locale_leave(locale);
    if (!locale.plain || !pk__finite(parsed))
        return 0;
    *value = parsed;
    return 1;
}

/* The shortest text from which pk__number reads the same bits, in at most 48 bytes. */
PK__PRIVATE void pk__number_text(double value, char *text, size_t size)
{
    double back;
    for (int digits = 15; digits <= 17; digits++) {
        pk__print(text, size, "%.*g", digits, value);
        if (pk__number(text, strlen(text), &back) && back == value)
            break;
    }
}

/* 1 and *product = a * b, or 0 on overflow. */
PK__PRIVATE int pk__multiply(size_t a, size_t b, size_t *product)
{
    if (b != 0 && a > SIZE_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

/* Always inline: gcc does not by itself where its options differ, as they do between the tiles and the rest. */
PK__INLINE size_t pk__min(size_t a, size_t b)
{
    return a < b ? a : b;
}

PK__INLINE size_t pk__max(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The number of blocks of `size` that hold `count`. */
PK__INLINE size_t pk__blocks(size_t count, size_t size)
{
    return count / size + (count % size != 0);
}

PK__PRIVATE double pk__seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

PK__PRIVATE pk_status pk__progress(pk_context *context, const char *phase, double fraction)
{
    if (context && context->progress && context->progress(context->progress_user, phase, fraction) != 0)
        return pk__fail(context, PK_CANCELLED, "cancelled by the caller during %s", phase);
    return PK_OK;
}

PK_API const char *pk_message(const pk_context *context)
{
    return context ? context->message : "";
}

PK_API int pk_threads(const pk_context *context)
{
    enum { ANY_MACHINE = 64 };
    int threads = context && context->threads > 0 ? context->threads : 1, most = ANY_MACHINE;
#ifdef _OPENMP
    if (!context || context->threads <= 0)
        threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads > most && omp_get_num_procs() > most)
        most = omp_get_num_procs();
#endif
    return threads < most ? threads : most;
}

enum { PK__ALIGNMENT = 64 };

/* Stored before each allocation, in a cache line of its own: its whole size, and the pointer to be freed. */
typedef struct pk__header {
    size_t bytes;
    void *block;
} pk__header;

/* pk_allocate, where clear == 0 without zeroes. */
PK__PRIVATE pk_status pk__allocate(pk_context *context, size_t count, size_t size, int clear, const char *what,
                                   void *pointer)
{
    void *none = NULL;
    memcpy(pointer, &none, sizeof none);
    size_t bytes = 0;
    if (!pk__multiply(count, size, &bytes) || bytes > SIZE_MAX / 2 - 2 * PK__ALIGNMENT)
        return pk__fail(context, PK_OVERFLOW, "%s: %zu items of %zu bytes overflow", what, count, size);
    if (bytes == 0)
        return PK_OK;
    const int own = !context || !context->allocator.allocate;
    bytes = (bytes + PK__ALIGNMENT - 1) / PK__ALIGNMENT * PK__ALIGNMENT + (own ? 2 : 1) * PK__ALIGNMENT;
    if (context && context->memory_limit &&
        (context->memory_used > context->memory_limit || bytes > context->memory_limit - context->memory_used))
        return pk__fail(context, PK_MEMORY_LIMIT,
                        "%s needs %zu bytes beside the %zu held, more than the memory limit of %zu bytes", what,
                        bytes, context->memory_used, context->memory_limit);
    /* Large blocks of calloc are zero pages that whoever writes them first gets: no thread clears them alone. */
    void *block = !own    ? context->allocator.allocate(context->allocator.user, bytes, PK__ALIGNMENT)
                  : clear ? calloc(1, bytes)
                          : malloc(bytes);
    if (!block)
        return pk__fail(context, PK_MEMORY, "%s: no memory for %zu bytes", what, bytes);
    if (!own && clear)
        memset(block, 0, bytes);
    unsigned char *start = (unsigned char *)block + PK__ALIGNMENT;
    if (own)
        start += PK__ALIGNMENT - (uintptr_t)start % PK__ALIGNMENT;
    pk__header *header = (pk__header *)(start - PK__ALIGNMENT);
    header->bytes = bytes;
    header->block = block;
    if (context) {
        context->memory_used += bytes;
        if (context->memory_used > context->memory_peak)
            context->memory_peak = context->memory_used;
    }
    memcpy(pointer, &start, sizeof start);
    return PK_OK;
}

PK_API pk_status pk_allocate(pk_context *context, size_t count, size_t size, const char *what, void *pointer)
{
    return pk__allocate(context, count, size, 1, what, pointer);
}

PK_API void pk_release(pk_context *context, void *pointer)
{
    if (!pointer)
        return;
    const pk__header header = *(pk__header *)((unsigned char *)pointer - PK__ALIGNMENT);
    if (context) {
        context->memory_used -= header.bytes;
        if (context->allocator.allocate) {
            context->allocator.release(context->allocator.user, header.block, header.bytes);
            return;
        }
    }
    free(header.block);
}

PK__INTERNAL void *pk__arena_take(pk__arena *arena, size_t count, size_t size)
{
    size_t bytes = 0;
    if (!pk__multiply(count, size, &bytes) || bytes > SIZE_MAX / 2 || arena->used > SIZE_MAX / 2 - bytes - 64) {
        arena->overflow = 1;
        return NULL;
    }
    bytes = (bytes + PK__ALIGNMENT - 1) / PK__ALIGNMENT * PK__ALIGNMENT;
    size_t start = arena->used;
    if (arena->base && bytes > arena->capacity - start) {
        arena->overflow = 1;
        return NULL;
    }
    arena->used += bytes;
    return arena->base && bytes ? arena->base + start : NULL;
}

PK__INTERNAL int pk__arena_again(pk_context *context, pk__arena *arena, const char *what, pk_status *status)
{
    *status = PK_OK;
    if (arena->base)
        return 0;
    if (arena->overflow)
        *status = pk__fail(context, PK_OVERFLOW, "%s: its size overflows", what);
    else
        *status = pk_allocate(context, arena->used, 1, what, &arena->base);
    arena->capacity = arena->used;
    arena->used = 0;
    return arena->base != NULL;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
