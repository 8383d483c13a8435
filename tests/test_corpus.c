/* Every input that the fuzz targets start from, and every one that ever failed (tests/corpus/regressions), without
 * libFuzzer: in each configuration that the tests run in. */
#include "fuzz.h"
#include "fuzz_targets.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif

enum { CORPUS_FILES = 4000 };

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Gives a target the files of a folder, in the order of their names; returns how many there are. */
static size_t run_folder(const fuzz_target *target, const char *folder)
{
    static char *names[CORPUS_FILES];
    size_t count = 0;
    DIR *entries = opendir(folder);
    for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;)
        if (entry->d_name[0] != '.') {
            assert_true(count < CORPUS_FILES);
            names[count] = (char *)malloc(strlen(folder) + strlen(entry->d_name) + 2);
            assert_non_null(names[count]);
            sprintf(names[count++], "%s/%s", folder, entry->d_name);
        }
    if (entries)
        closedir(entries);
    qsort(names, count, sizeof *names, by_name);
    for (size_t i = 0; i < count; i++) {
        size_t size = 0;
        uint8_t *bytes = fuzz_read_file(names[i], &size);
        assert_non_null(bytes);
        fprintf(stderr, "%s\n", names[i]); /* the last one, where it ends in a crash */
        uint8_t *exact = (uint8_t *)malloc(size ? size : 1); /* so that a sanitizer sees a read past it */
        assert_non_null(exact);
        if (size)
            memcpy(exact, bytes, size);
        assert_int_equal(target->run(exact, size), 0);
        free(exact);
        free(bytes);
        free(names[i]);
    }
    return count;
}

static void run_target(void **state)
{
    const fuzz_target *target = (const fuzz_target *)*state;
    char folder[200];
    snprintf(folder, sizeof folder, "tests/corpus/%s", target->name);
    assert_true(run_folder(target, folder) > 0); /* run from the source folder */
    snprintf(folder, sizeof folder, "tests/corpus/regressions/%s", target->name);
    (void)run_folder(target, folder);
}

int main(void)
{
    struct CMUnitTest tests[FUZZ_TARGETS];
    memset(tests, 0, sizeof tests);
    for (size_t i = 0; i < FUZZ_TARGETS; i++) {
        tests[i].name = fuzz_targets[i].name;
        tests[i].test_func = run_target;
        tests[i].initial_state = (void *)(uintptr_t)&fuzz_targets[i];
    }
    return cmocka_run_group_tests_name("corpus", tests, NULL, NULL);
}
