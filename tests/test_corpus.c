/* Every input that the fuzz targets start from, and every one that ever failed (tests/corpus/regressions), without
 * libFuzzer: in each configuration that the tests run in. Then the same program and the same training with system calls
 * and allocations that fail, one after another, and with kills in front of each. */
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
        fprintf(stderr, "%s\n", names[i]);                   /* the last one, where it ends in a crash */
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

#ifdef FAILING_CALLS
#include "failing_calls.h"
#include "wait_killed.h"

/* ---- calls that fail --------------------------------------------------------------------------------------- */

static const char *const mode_names[FAIL_MODES] = {"ENOSPC", "EIO from there on", "ENOMEM", "EINTR", "half"};

/* All files of a folder that are results, in one string of bytes: name, size, contents; sorted by name. */
typedef struct snapshot {
    uint8_t *bytes;
    size_t size, files;
    size_t rows; /* of every array, or SIZE_MAX where they differ */
} snapshot;

static int is_result(const struct dirent *entry)
{
    const size_t length = strlen(entry->d_name);
    return length > 4 && strcmp(entry->d_name + length - 4, ".npy") == 0;
}

/* rows: take no more of each array; SIZE_MAX: the files as they are. */
static snapshot take_snapshot(const char *folder, size_t rows)
{
    snapshot taken = {NULL, 0, 0, 0};
    struct dirent **entries = NULL;
    int count = scandir(folder, &entries, is_result, alphasort);
    for (int i = 0; i < count; i++) {
        pk_array array;
        char path[700];
        snprintf(path, sizeof path, "%s/%s", folder, entries[i]->d_name);
        if (access(path, F_OK) != 0) { /* a link to what is not there yet: nobody can read it */
            free(entries[i]);
            continue;
        }
        if (pk_array_map(NULL, path, 0, &array) != PK_OK)
            fail_msg("%s is no whole array", path);
        const size_t there = array.shape[0], wanted = rows < there ? rows : there;
        const size_t name = strlen(entries[i]->d_name),
                     size = wanted * array.row_items * pk_type_size(array.type);
        taken.bytes = (uint8_t *)realloc(taken.bytes, taken.size + name + size);
        assert_non_null(taken.bytes);
        memcpy(taken.bytes + taken.size, entries[i]->d_name, name);
        if (size)
            memcpy(taken.bytes + taken.size + name, array.data, size);
        taken.size += name + size;
        taken.rows = !taken.files || taken.rows == there ? there : SIZE_MAX;
        taken.files++;
        pk_array_release(NULL, &array);
        free(entries[i]);
    }
    free(entries);
    return taken;
}

static int same_snapshot(const snapshot *a, const snapshot *b)
{
    return a->files == b->files && a->size == b->size && (!a->size || memcmp(a->bytes, b->bytes, a->size) == 0);
}

static int open_descriptors(void)
{
    int count = 0;
    for (int i = 0; i < 200; i++)
        count += fcntl(i, F_GETFD) >= 0;
    return count;
}

static void arm(int begins)
{
    failing.armed = begins && failing.wanted;
}

static int run_program(const char *network, const char *more)
{
    char words[12][40] = {"pathkernel-decompose", "",  "--inputs", "x.npy", "--out", "out", "--threads", "1",
                          "--rows-at-once",       "1", "",         ""};
    char *arguments[13];
    snprintf(words[1], sizeof words[1], "%s", network);
    snprintf(words[10], sizeof words[10], "%s", more);
    int count = *more ? 11 : 10;
    for (int i = 0; i < count; i++)
        arguments[i] = words[i];
    arguments[count] = NULL;
    return fuzz_program_call(count, arguments);
}

/* Whatever fails: the older results whole, the new ones whole, so many rows of the new ones as the message says, or
 * none; one sentence; no descriptor is left open. */
static void test_program_calls_fail(void **state)
{
    static char told[FUZZ_TOLD], complained[FUZZ_TOLD];
    size_t sites = 0;
    (void)state;
    fuzz_program_begin();
    int before = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(before >= 0 && fchdir(fuzz_home) == 0);
    for (int older = 0; older < 2; older++) {
        snapshot old = {NULL, 0, 0, 0}, whole;
        assert_int_equal(run_program("relu", ""), 0);
        whole = take_snapshot("out", SIZE_MAX);
        assert_true(whole.files >= 6 && whole.rows == 3);
        for (int mode = 0; mode < FAIL_MODES; mode++)
            for (size_t at = 1;; at++) {
                fuzz_clear("out");
                if (older) {
                    assert_int_equal(run_program("tanh", ""), 0);
                    free(old.bytes);
                    old = take_snapshot("out", SIZE_MAX);
                }
                const int descriptors = open_descriptors();
                failing.mode = (failing_mode)mode;
                failing.at = at;
                failing.calls = 0;
                failing.wanted = 1;
                int status = run_program("relu", "");
                failing.wanted = 0;
                fuzz_take_told(0, told);
                fuzz_take_told(1, complained);
                const snapshot now = take_snapshot("out", SIZE_MAX);
                const snapshot part = take_snapshot("out", now.rows);
                const char *fault = NULL;
                if (status < 0 || status > 2)
                    fault = "the exit status";
                else if (status < 2 && !same_snapshot(&now, &whole))
                    fault = "other results, and success";
                else if (status == 2 && !fuzz_one_line(complained))
                    fault = "no one sentence";
                else if (open_descriptors() != descriptors)
                    fault = "a descriptor is left open";
                else if (status == 2 && now.files && !same_snapshot(&now, &old)) {
                    /* of the new ones: the same rows of all */
                    if (now.files != whole.files || now.rows == SIZE_MAX || now.rows > 3)
                        fault = "half published";
                }
                if (fault)
                    fail_msg("%s at call %zu, %s results before: %s (status %d, %zu files): %s",
                             mode_names[mode], at, older ? "with" : "without", fault, status, now.files,
                             complained);
                free(now.bytes);
                free(part.bytes);
                if (failing.calls < at)
                    break;
                sites++;
            }
        free(old.bytes);
        free(whole.bytes);
        fuzz_clear("out");
    }
    print_message("%zu calls of the program failed, one at a time\n", sites);
    fuzz_tidy();
    assert_int_equal(fchdir(before), 0);
    close(before);
}

/* The run in the folder has the bytes of the original, whatever state there is to resume from. */
static void check_run_files(size_t number, const fuzz_original *whole, const char *fate, size_t at)
{
    for (int f = 0; f < FUZZ_FILES; f++) {
        size_t size;
        if (strcmp(fuzz_run_files[f], "resume_state.npy") == 0)
            continue;
        uint8_t *bytes = fuzz_read_file(fuzz_run_path(fuzz_run_files[f]), &size);
        if (!bytes != !whole->bytes[f] || size != whole->size[f] ||
            (bytes && memcmp(bytes, whole->bytes[f], size) != 0))
            fail_msg("run %zu, %s at call %zu: %s differs", number, fate, at, fuzz_run_files[f]);
        free(bytes);
    }
}

/* Whatever fails while a run is recorded or resumed: what was recorded opens, and a resume gives the bits of a run that
 * nothing befell. */
static void test_training_calls_fail(void **state)
{
    size_t sites = 0;
    (void)state;
    for (size_t number = 0; number < FUZZ_RUNS; number++) {
        const fuzz_original *whole = fuzz_original_run(number);
        for (int mode = 0; mode < FAIL_MODES; mode++)
            for (size_t at = 1;; at++) {
                pk_context context;
                memset(&context, 0, sizeof context);
                context.threads = 1;
                fuzz_clear(fuzz_run_path(""));
                const int descriptors = open_descriptors();
                failing.mode = (failing_mode)mode;
                failing.at = at;
                failing.calls = 0;
                failing.wanted = 1;
                pk_status status = fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps);
                failing.wanted = 0;
                if (status && (!context.message[0] || strchr(context.message, '\n')))
                    fail_msg("run %zu, %s at call %zu: '%s'", number, mode_names[mode], at, context.message);
                if (context.memory_used || open_descriptors() != descriptors)
                    fail_msg("run %zu, %s at call %zu: something is left open", number, mode_names[mode], at);
                const int coarse = fuzz_runs[number].float32 && sizeof(pk_real) > sizeof(float);
                pk_status again =
                    coarse ? PK_OK : fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps);
                if (again)
                    fail_msg("run %zu, %s at call %zu: no resume: %s", number, mode_names[mode], at,
                             context.message);
                if (!coarse)
                    check_run_files(number, whole, mode_names[mode], at);
                if (failing.calls < at)
                    break;
                sites++;
            }
    }
    fuzz_clear(fuzz_run_path(""));
    print_message("%zu calls of training and resuming failed, one at a time\n", sites);
}

/* ---- kills ------------------------------------------------------------------------------------------------- */

/* A child that is killed at that call; returns 0 where it came to its end instead. */
static int killed_child(failing_mode mode, size_t at, void (*act)(size_t number), size_t number)
{
    int status = 0;
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        failing.mode = mode;
        failing.at = at;
        failing.calls = 0;
        failing.wanted = 1;
        act(number);
        _exit(0);
    }
    assert_int_equal(wait_killed(child, &status), child);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return 1;
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return 0;
}

static void act_program(size_t number)
{
    (void)number;
    if (run_program("relu", "") != 0)
        _exit(1);
}

/* Killed in front of each call of its own, or inside a write: the older results whole, or the new ones, or none; and the
 * next job is not in the way of what is left. */
static void test_program_killed(void **state)
{
    size_t kills = 0;
    (void)state;
    fuzz_program_begin();
    int before = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(before >= 0 && fchdir(fuzz_home) == 0);
    assert_int_equal(run_program("relu", ""), 0);
    const snapshot whole = take_snapshot("out", SIZE_MAX);
    for (int older = 0; older < 2; older++)
        for (int mode = FAIL_KILLED; mode <= FAIL_TORN; mode++)
            for (size_t at = 1;; at++) {
                snapshot old = {NULL, 0, 0, 0};
                fuzz_clear("out");
                if (older) {
                    assert_int_equal(run_program("tanh", ""), 0);
                    old = take_snapshot("out", SIZE_MAX);
                }
                const int killed = killed_child((failing_mode)mode, at, act_program, 0);
                const snapshot now = take_snapshot("out", SIZE_MAX);
                if (!same_snapshot(&now, &whole) && (killed ? !same_snapshot(&now, &old) : 1))
                    fail_msg("killed at call %zu%s: %zu files are neither the %zu older ones nor the new ones",
                             at, mode == FAIL_TORN ? ", after half of it" : "", now.files, old.files);
                assert_int_equal(run_program("relu", ""), 0);
                const snapshot again = take_snapshot("out", SIZE_MAX);
                assert_true(same_snapshot(&again, &whole));
                free(now.bytes);
                free(old.bytes);
                free(again.bytes);
                if (!killed)
                    break;
                kills++;
            }
    free(whole.bytes);
    print_message("%zu kills, no mixture\n", kills);
    fuzz_tidy();
    assert_int_equal(fchdir(before), 0);
    close(before);
}

static void act_train(size_t number)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    context.threads = 1;
    if (fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps) != PK_OK) {
        fprintf(stderr, "run %zu, call %zu of mode %d: %s\n", number, failing.at, (int)failing.mode,
                context.message);
        _exit(1);
    }
}

/* Killed in front of each call, or inside a write, then resumed and killed again at the next one: no step that was
 * acknowledged is lost, and in the end the bits are those of a run that nothing befell. */
static void test_training_killed(void **state)
{
    size_t kills = 0, acknowledged = 0;
    void *shared = mmap(NULL, sizeof(size_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    (void)state;
    assert_true(shared != MAP_FAILED);
    for (size_t number = 0; number < FUZZ_RUNS; number++) {
        const fuzz_original *whole = fuzz_original_run(number);
        if (fuzz_runs[number].float32 && sizeof(pk_real) > sizeof(float))
            continue; /* cannot be resumed */
        for (int mode = FAIL_KILLED; mode <= FAIL_TORN; mode++)
            for (size_t at = 1;; at++) {
                pk_context context;
                pk_run run;
                size_t last = 0;
                int killed = 1;
                memset(&context, 0, sizeof context);
                context.threads = 1;
                fuzz_clear(fuzz_run_path(""));
                for (int again = 0; again < 3 && killed; again++) {
                    fuzz_acknowledged = (volatile size_t *)shared;
                    *fuzz_acknowledged = last;
                    killed = killed_child((failing_mode)mode, at + 3 * (size_t)again, act_train, number);
                    last = *fuzz_acknowledged;
                    fuzz_acknowledged = NULL;
                    kills += (size_t)killed;
                    memset(&run, 0, sizeof run);
                    pk_status status = pk_run_open(&context, fuzz_run_path(""), &run);
                    if (status ? last > 0 : run.steps < last)
                        fail_msg(
                            "run %zu, killed at call %zu: %zu steps were acknowledged, and %zu are there: %s",
                            number, at, last, status ? 0 : run.steps, context.message);
                    if (status == PK_OK)
                        pk_run_release(&context, &run);
                    acknowledged += last;
                }
                if (fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps) != PK_OK)
                    fail_msg("run %zu, killed at call %zu: no resume: %s", number, at, context.message);
                check_run_files(number, whole, "killed", at);
                if (!killed)
                    break;
            }
    }
    (void)munmap(shared, sizeof(size_t));
    fuzz_clear(fuzz_run_path(""));
    assert_true(acknowledged > 0);
    print_message("%zu kills of training and resuming, no step lost of %zu\n", kills, acknowledged);
}
#endif

int main(void)
{
    struct CMUnitTest tests[FUZZ_TARGETS + 4];
    size_t count = FUZZ_TARGETS;
    memset(tests, 0, sizeof tests);
#ifdef FAILING_CALLS
    fuzz_inside = arm;
    tests[count].name = "the program's calls fail";
    tests[count++].test_func = test_program_calls_fail;
    tests[count].name = "training's calls fail";
    tests[count++].test_func = test_training_calls_fail;
    tests[count].name = "the program is killed";
    tests[count++].test_func = test_program_killed;
    tests[count].name = "training is killed";
    tests[count++].test_func = test_training_killed;
#else
    print_message("left out: calls that fail; that takes Linux and a linker that wraps them\n");
#endif
    for (size_t i = 0; i < FUZZ_TARGETS; i++) {
        tests[i].name = fuzz_targets[i].name;
        tests[i].test_func = run_target;
        tests[i].initial_state = (void *)(uintptr_t)&fuzz_targets[i];
    }
    return _cmocka_run_group_tests("corpus", tests, count, NULL, NULL);
}
