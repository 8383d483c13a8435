/* fuzz.h: what the fuzz targets share. Each is a function of bytes in a file fuzz_*.c, and all of them stand in one
 * program, fuzz.c: under libFuzzer (cmake/fuzz.cmake), and in every configuration as test_corpus.c, which gives them
 * the committed inputs. Names begin with fuzz_, since the program's own source is included behind them.
 */
#ifndef FUZZ_H
#define FUZZ_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create */
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "pathkernel_under_test.h"

/* A broken promise: says where, and ends as a crash does. */
#define FUZZ_REQUIRE(condition)                                                            \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

/* Told when the code under test begins (1) and ends (0), where somebody wants to know (failing_calls.h). */
static void (*fuzz_inside)(int begins);

static inline void fuzz_tell_inside(int begins)
{
    if (fuzz_inside)
        fuzz_inside(begins);
}

/* The bytes of an input that choose, one by one; zeros behind the end. */
typedef struct fuzz_bytes {
    const uint8_t *at;
    size_t left;
} fuzz_bytes;

static inline unsigned fuzz_byte(fuzz_bytes *bytes)
{
    if (!bytes->left)
        return 0;
    bytes->left--;
    return *bytes->at++;
}

static inline unsigned fuzz_two_bytes(fuzz_bytes *bytes)
{
    unsigned low = fuzz_byte(bytes);
    return low + 256 * fuzz_byte(bytes);
}

/* Everything in a folder, and the folder itself. */
static inline void fuzz_clear(const char *folder)
{
    DIR *entries = opendir(folder);
    for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;) {
        char path[700];
        struct stat info;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) >= (int)sizeof path)
            continue;
        if (lstat(path, &info) == 0 && S_ISDIR(info.st_mode))
            fuzz_clear(path);
        else
            (void)unlink(path);
    }
    if (entries)
        closedir(entries);
    (void)rmdir(folder);
}

/* A folder of this process, in memory where the machine has that; gone when the process ends. */
static char fuzz_folder[300];

static inline void fuzz_leave(void)
{
    fuzz_clear(fuzz_folder);
}

static inline const char *fuzz_enter(void)
{
    const char *temporary = getenv("TMPDIR");
    if (*fuzz_folder)
        return fuzz_folder;
    if (access("/dev/shm", W_OK) == 0)
        temporary = "/dev/shm";
    snprintf(fuzz_folder, sizeof fuzz_folder, "%.200s/pathkernel-fuzz-XXXXXX", temporary ? temporary : "/tmp");
    FUZZ_REQUIRE(mkdtemp(fuzz_folder));
    (void)atexit(fuzz_leave);
    return fuzz_folder;
}

static inline void fuzz_write_file(const char *path, const void *bytes, size_t size)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    FUZZ_REQUIRE(file >= 0 && (!size || write(file, bytes, size) == (ssize_t)size));
    close(file);
}

/* The whole file in memory of malloc; NULL where there is none. */
static inline uint8_t *fuzz_read_file(const char *path, size_t *size)
{
    int file = open(path, O_RDONLY | O_NONBLOCK);
    struct stat info;
    *size = 0;
    if (file < 0)
        return NULL;
    uint8_t *bytes =
        fstat(file, &info) == 0 && S_ISREG(info.st_mode) ? (uint8_t *)malloc((size_t)info.st_size + 1) : NULL;
    if (bytes) {
        ssize_t got = read(file, bytes, (size_t)info.st_size);
        *size = got > 0 ? (size_t)got : 0;
    }
    close(file);
    return bytes;
}

#endif
