/* Kills from outside at random moments: of a child that records, which acknowledges each step through a pipe, and of the
 * program while it decomposes and publishes. PATHKERNEL_ROUNDS multiplies the kills (cmake --workflow --preset campaign).
 * (tests/test_corpus.c kills in front of each system call.) */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include "fixture.h"
#include "wait_killed.h"

enum { STEPS = 60, EXAMPLES = 12, WIDTH = 3, INPUTS = 40 };

static size_t rounds = 1;
static pk_random chance = {2026, 0, 0};
static pk_graph graph;
static pk_dataset train;
static pk_real *inputs, *first_weights;
static int64_t labels[EXAMPLES];
static char full_path[300], killed_path[300], out_path[300], whole_path[300], inputs_path[300], program[1000];

/* Up to so many microseconds. */
static void wait_a_little(uint64_t most)
{
    struct timespec time = {0, (long)(1000 * pk_random_below(&chance, most))};
    (void)nanosleep(&time, NULL);
}

static pk_train_options recipe(int rule)
{
    pk_train_options options;
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.01", "adam", "adamw"};
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    assert_int_equal(pk_optimizer_parse(NULL, optimizers[rule], &options.optimizer), PK_OK);
    options.schedule.rate = 0.05;
    options.steps = STEPS;
    options.batch_size = 5;
    options.resume = 1;
    options.keep_every = rule == 1 ? 7 : rule == 2 ? 16 : 1;
    options.record_second_moments = rule == 3;
    return options;
}

static pk_status train_run(pk_context *context, pk_train_options *options, const char *folder)
{
    pk_real *weights = FIXTURE_NEW(pk_real, graph.parameters);
    memcpy(weights, first_weights, graph.parameters * sizeof *weights);
    context->threads = 1;
    options->record = folder;
    pk_status status = pk_train(context, &graph, &train, options, weights, NULL);
    free(weights);
    return status;
}

static int acknowledge(void *user, size_t step, double objective, const pk_real *weights)
{
    const unsigned char number = (unsigned char)(step + 1);
    (void)objective, (void)weights;
    return write(*(int *)user, &number, 1) != 1;
}

/* Every step of the run that was killed is there with the bits of the one that was not; returns how many. */
static size_t check_steps(const pk_run *full)
{
    pk_context context;
    pk_run run;
    pk_replay replay;
    pk_real *here = FIXTURE_NEW(pk_real, graph.parameters), *there = FIXTURE_NEW(pk_real, graph.parameters);
    memset(&context, 0, sizeof context);
    context.threads = 1;
    assert_ok(&context, pk_run_open(&context, killed_path, &run));
    assert_ok(&context, pk_replay_prepare(&context, &run, 0, &replay));
    assert_true(run.steps <= full->steps);
    for (size_t s = 0; s <= run.steps; s++) {
        assert_ok(&context, pk_replay_weights(&context, &replay, s, here));
        assert_ok(&context, pk_run_weights(&context, full, s, there));
        if (memcmp(here, there, graph.parameters * sizeof *here) != 0)
            fail_msg("step %zu of %zu has other bits", s, run.steps);
    }
    const size_t steps = run.steps;
    pk_replay_release(&context, &replay);
    pk_run_release(&context, &run);
    free(here), free(there);
    assert_int_equal(context.memory_used, 0);
    return steps;
}

/* First in the program: a process that has used OpenMP's threads must not fork and use them again. */
static void test_recording(void **state)
{
    size_t kills = 0, acknowledged = 0;
    (void)state;
    for (int rule = 0; rule < 4; rule++) {
        pk_train_options options = recipe(rule), kept = options;
        pk_context context;
        pk_run full;
        memset(&context, 0, sizeof context);
        kept.keep_every = 1;
        fixture_clear(full_path);
        fixture_clear(killed_path);
        assert_ok(&context, train_run(&context, &kept, full_path));
        assert_ok(&context, pk_run_open(&context, full_path, &full));
        size_t steps = 0;
        for (size_t k = 0; k < 20 * rounds; k++) {
            int ends[2], status;
            unsigned char number = 0;
            if (steps == STEPS) { /* from the beginning again */
                fixture_clear(killed_path);
                steps = 0;
            }
            assert_int_equal(pipe(ends), 0);
            fflush(stdout);
            pid_t child = fork();
            assert_true(child >= 0);
            if (child == 0) {
                close(ends[0]);
                options.on_step = acknowledge;
                options.user = &ends[1];
                _exit(train_run(&context, &options, killed_path) == PK_OK ? 0 : 1);
            }
            close(ends[1]);
            /* After so many acknowledgements, and a little more. */
            for (uint64_t more = pk_random_below(&chance, 6); more > 0; more--)
                if (read(ends[0], &number, 1) != 1)
                    break;
            wait_a_little(500);
            assert_int_equal(kill(child, SIGKILL), 0);
            assert_int_equal(wait_killed(child, &status), child);
            assert_true(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
            while (read(ends[0], &number, 1) == 1)
                continue;
            close(ends[0]);
            kills++;
            if (number == 0 && steps == 0 && access(killed_path, F_OK) != 0)
                continue; /* killed before there was a run */
            char manifest[400];
            snprintf(manifest, sizeof manifest, "%.300s/run.txt", killed_path);
            if (number == 0 && steps == 0 && access(manifest, F_OK) != 0)
                continue;
            const size_t there = check_steps(&full);
            if (there < number || there < steps)
                fail_msg("%s: %zu steps are there, %d were acknowledged, %zu were there before",
                         options.optimizer.kind == PK_SGD ? "sgd" : "adam", there, number, steps);
            acknowledged += number > steps ? number - steps : 0;
            steps = there;
        }
        options.on_step = NULL;
        assert_ok(&context, train_run(&context, &options, killed_path));
        assert_int_equal(check_steps(&full), STEPS);
        pk_run_release(&context, &full);
    }
    assert_true(acknowledged > 0);
    print_message("%zu kills, none of %zu acknowledged steps lost, no other bit\n", kills, acknowledged);
}

/* ---- the program ------------------------------------------------------------------------------------------- */

static pid_t start_program(const char *run, const char *folder)
{
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        int nothing = open("/dev/null", O_WRONLY);
        if (nothing < 0 || dup2(nothing, 1) < 0 || dup2(nothing, 2) < 0)
            _exit(99);
        execl(program, program, run, "--inputs", inputs_path, "--out", folder, "--threads", "1",
              "--rows-at-once", "16", "--top", "0", (char *)NULL);
        _exit(98);
    }
    return child;
}

static void run_program(const char *run, const char *folder)
{
    int status = 0;
    assert_int_equal(waitpid(start_program(run, folder), &status, 0) > 0, 1);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* 1: the results in out_path have the bytes of those in folder. */
static int same_results(const char *folder)
{
    static const char *const names[] = {"by_example", "initial", "final", "decay", "unattributed", "closure"};
    int same = 1;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char one[400], other[400];
        pk_array a, b;
        snprintf(one, sizeof one, "%.300s/%s.npy", folder, names[i]);
        snprintf(other, sizeof other, "%.300s/%s.npy", out_path, names[i]);
        assert_int_equal(pk_array_map(NULL, one, 0, &a), PK_OK);
        if (pk_array_map(NULL, other, 0, &b) != PK_OK) {
            pk_array_release(NULL, &a);
            return 0;
        }
        same &= pk_array_items(&a) == pk_array_items(&b) &&
                memcmp(a.data, b.data, pk_array_items(&a) * pk_type_size(a.type)) == 0;
        pk_array_release(NULL, &a);
        pk_array_release(NULL, &b);
    }
    return same;
}

static void test_publishing(void **state)
{
    size_t kills = 0, finished = 0;
    char older[300], half[400];
    (void)state;
    const size_t shape[2] = {INPUTS, WIDTH};
    pk_real *x = fixture_normals(9, INPUTS * WIDTH, 1);
    snprintf(older, sizeof older, "%.200s/older", fixture_folder);
    snprintf(half, sizeof half, "%.200s/half", fixture_folder);
    assert_int_equal(pk_array_write(NULL, inputs_path, REAL_TYPE, 2, shape, x), PK_OK);
    free(x);
    /* Two runs that differ in their results. */
    pk_train_options options = recipe(0);
    pk_context context;
    memset(&context, 0, sizeof context);
    options.steps = STEPS / 2;
    assert_ok(&context, train_run(&context, &options, half));
    fixture_clear(full_path);
    options = recipe(0);
    assert_ok(&context, train_run(&context, &options, full_path));
    run_program(half, older);
    run_program(full_path, whole_path);
    run_program(half, out_path);
    for (size_t k = 0; k < 40 * rounds; k++) {
        int status = 0;
        pid_t child = start_program(full_path, out_path);
        wait_a_little(15000);
        assert_int_equal(kill(child, SIGKILL), 0);
        assert_int_equal(wait_killed(child, &status), child);
        kills += (size_t)WIFSIGNALED(status);
        finished += (size_t)WIFEXITED(status);
        if (!same_results(older) && !same_results(whole_path))
            fail_msg("kill %zu: the results are neither the older ones nor the new ones", k);
        if (same_results(whole_path))
            run_program(half, out_path);
    }
    run_program(full_path, out_path);
    assert_true(same_results(whole_path));
    print_message("%zu kills, %zu came too late, no mixture\n", kills, finished);
    fixture_clear(half);
    fixture_clear(older);
}

static int begin(void **state)
{
    const char *given = getenv("PATHKERNEL_DECOMPOSE"), *more = getenv("PATHKERNEL_ROUNDS");
    static size_t shapes[2] = {EXAMPLES, WIDTH};
    if (fixture_enter(state))
        return -1;
    if (more && atoi(more) > 0)
        rounds = (size_t)atoi(more);
    snprintf(program, sizeof program, "%s", given ? given : "build/test/pathkernel-decompose");
    if (access(program, X_OK) != 0) {
        fprintf(stderr, "%s: not there; build it, or set PATHKERNEL_DECOMPOSE\n", program);
        return -1;
    }
    snprintf(full_path, sizeof full_path, "%s/full", fixture_folder);
    snprintf(killed_path, sizeof killed_path, "%s/killed", fixture_folder);
    snprintf(out_path, sizeof out_path, "%s/out", fixture_folder);
    snprintf(whole_path, sizeof whole_path, "%s/whole", fixture_folder);
    snprintf(inputs_path, sizeof inputs_path, "%s/inputs.npy", fixture_folder);
    if (pk_network_parse(NULL, "input 3; dense 5; tanh; dense 2", &graph) != PK_OK)
        return -1;
    first_weights = FIXTURE_NEW(pk_real, graph.parameters);
    if (pk_network_initialize(NULL, &graph, 5, first_weights) != PK_OK)
        return -1;
    inputs = fixture_normals(3, EXAMPLES * WIDTH, 1);
    for (int i = 0; i < EXAMPLES; i++)
        labels[i] = i % 2;
    train.inputs = pk_array_view(REAL_TYPE, 2, shapes, inputs);
    train.targets = pk_array_view(PK_INT64, 1, shapes, labels);
    return 0;
}

static int end(void **state)
{
    free(inputs), free(first_weights);
    pk_graph_release(NULL, &graph);
    fixture_clear(full_path);
    fixture_clear(killed_path);
    fixture_clear(out_path);
    fixture_clear(whole_path);
    return fixture_leave(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recording),
        cmocka_unit_test(test_publishing),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
