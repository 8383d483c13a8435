/* files.h: what the tests of arrays and data sets share: a folder of their own, checks of a status and its
 * message, an allocator that refuses. Includes the library as static functions, so that the readers of memory
 * behind the readers of files can be called. */
#ifndef FILES_H
#define FILES_H
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mkdtemp, and what else POSIX does not have */
#endif
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "pathkernel_under_test.h"

static char folder[200]; /* a fresh one for this program */
static char path[300], path2[300];

static const char *in_folder(const char *name, char *full)
{
    snprintf(full, 300, "%s/%s", folder, name);
    return full;
}

static void write_file(const char *full, const void *bytes, size_t size)
{
    FILE *file = fopen(full, "wb");
    assert_non_null(file);
    assert_true(fwrite(bytes, 1, size, file) == size);
    assert_int_equal(fclose(file), 0);
}

#define assert_ok(call) assert_status(PK_OK, "", call)
#define assert_status(wanted, words, call) assert_status_at(wanted, words, call, #call, __LINE__)
static pk_context context; /* of assert_status; its memory must be back at 0 in the end */

static void assert_status_at(pk_status wanted, const char *words, pk_status status, const char *call, int line)
{
    if (status != wanted || (wanted != PK_OK && !strstr(pk_message(&context), words)))
        fail_msg("line %d: %s: %s, message: %s; wanted %s: %s", line, call, pk_status_text(status),
                 pk_message(&context), pk_status_text(wanted), words);
}

typedef struct counting {
    size_t left; /* allocations before the first refusal */
    size_t calls;
    long held;
} counting;

static void *counting_allocate(void *user, size_t bytes, size_t alignment)
{
    counting *count = (counting *)user;
    void *block = NULL;
    count->calls++;
    if (count->left == 0)
        return NULL;
    count->left--;
    if (posix_memalign(&block, alignment, bytes) != 0)
        return NULL;
    count->held++;
    return block;
}

static void counting_release(void *user, void *pointer, size_t bytes)
{
    (void)bytes;
    ((counting *)user)->held--;
    free(pointer);
}

/* What an allocating call makes. */
typedef union made {
    pk_array array;
    pk_dataset dataset;
} made;

/* Refuses each allocation of the call in turn, then one byte less than it needs: an error, nothing written,
 * nothing held. The call releases what it made. */
static void check_allocations(pk_status (*call)(pk_context *with, made *out), size_t allocations)
{
    made out, before;
    memset(&before, 0x5a, sizeof before);
    for (size_t left = 0; left <= allocations; left++) {
        counting count = {left, 0, 0};
        pk_context with;
        memset(&with, 0, sizeof with);
        with.allocator.allocate = counting_allocate;
        with.allocator.release = counting_release;
        with.allocator.user = &count;
        out = before;
        pk_status status = call(&with, &out);
        assert_int_equal(count.held, 0);
        assert_int_equal(with.memory_used, 0);
        assert_int_equal(status, left < allocations ? PK_MEMORY : PK_OK);
        if (status == PK_OK)
            break;
        assert_int_equal(count.calls, left + 1);
        assert_memory_equal(&out, &before, sizeof out);
        assert_true(strlen(with.message) > 0);
    }
    size_t least = 0;
    for (int less = 0; less < 2; less++) {
        pk_context with;
        memset(&with, 0, sizeof with);
        with.memory_limit = less ? least - 1 : 0;
        out = before;
        assert_int_equal(call(&with, &out), less ? PK_MEMORY_LIMIT : PK_OK);
        assert_int_equal(with.memory_used, 0);
        least = with.memory_peak;
    }
}

static int first_free_descriptor(void)
{
    int file = open("/dev/null", O_RDONLY);
    close(file);
    return file;
}

static int set_up(void **state)
{
    const char *parent = getenv("TMPDIR");
    (void)state;
    snprintf(folder, sizeof folder, "%s/pathkernel-XXXXXX", parent && strlen(parent) < 150 ? parent : "/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state)
{
    char command[240];
    (void)state;
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command) == 0 && context.memory_used == 0 ? 0 : -1;
}

#endif
