/* Parallel regions beside other programs, by counted work: the clocks are the test's own. Threads that lose against one
 * thread are left alone for a while and tried again; the bits are the same; few regions a step; no more threads than tasks;
 * a child of fork does not wait for its parent's threads. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif

/* The machine: by how much each look at the clock moves it on, and the processor time of a thread. */
static double machine_time, machine_wall, machine_work;
static __thread double machine_thread;

static int machine_clock(clockid_t clock, struct timespec *now)
{
    double seconds;
    if (clock == CLOCK_MONOTONIC) {
#ifdef _OPENMP
#pragma omp atomic capture
#endif
        seconds = machine_time += machine_wall;
    } else {
        seconds = machine_thread += machine_work;
    }
    now->tv_sec = (time_t)seconds;
    now->tv_nsec = (long)(1e9 * (seconds - (double)now->tv_sec));
    return 0;
}

#define clock_gettime(clock, now) machine_clock(clock, now)
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "pathkernel_under_test.h"

enum { IN = 6, OUT = 3, EXAMPLES = 640, TEST_ROWS = 40 };
static const char network[] = "input 6; dense 64; tanh; dense 64; tanh; dense 3";

/* Regions as on an idle machine, or beside others. */
static void idle_machine(void)
{
    machine_wall = 1e-6;
    machine_work = 500e-6;
}
#ifdef _OPENMP
static void busy_machine(void)
{
    machine_wall = 8e-3;
    machine_work = 200e-6;
}
#endif

#define assert_ok(context, call)                                                     \
    do {                                                                             \
        pk_status status_of_call = (call);                                           \
        if (status_of_call)                                                          \
            fail_msg("%s: %s", pk_status_text(status_of_call), pk_message(context)); \
    } while (0)

/* ---- a small network and its data ---- */

typedef struct subject {
    pk_context context;
    pk_graph graph;
    pk_dataset train;
    pk_real *start, *weights;
} subject;

static pk_real inputs[EXAMPLES * IN];
static int64_t labels[EXAMPLES];

static void make_subject(subject *s, int threads)
{
    const size_t shape[2] = {EXAMPLES, IN};
    memset(s, 0, sizeof *s);
    s->context.threads = threads;
    pk_random random = {7, 0, 0};
    for (size_t i = 0; i < EXAMPLES * IN; i++)
        inputs[i] = (pk_real)pk_random_normal(&random);
    for (size_t i = 0; i < EXAMPLES; i++)
        labels[i] = (int64_t)(i % OUT);
    s->train.inputs = pk_array_view(PK__REAL_TYPE, 2, shape, inputs);
    s->train.targets = pk_array_view(PK_INT64, 1, shape, labels);
    assert_ok(&s->context, pk_network_parse(&s->context, network, &s->graph));
    assert_ok(&s->context, pk_allocate(&s->context, 2 * s->graph.parameters, sizeof(pk_real), "w", &s->start));
    s->weights = s->start + s->graph.parameters;
    assert_ok(&s->context, pk_network_initialize(&s->context, &s->graph, 3, s->start));
}

static void release_subject(subject *s)
{
    pk_release(&s->context, s->start);
    pk_graph_release(&s->context, &s->graph);
    assert_int_equal(s->context.memory_used, 0);
}

static void train(subject *s, size_t steps, const char *optimizer, const char *record)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.01;
    options.steps = steps;
    options.record = record;
    assert_ok(&s->context, pk_optimizer_parse(&s->context, optimizer, &options.optimizer));
    memcpy(s->weights, s->start, s->graph.parameters * sizeof *s->weights);
    assert_ok(&s->context, pk_train(&s->context, &s->graph, &s->train, &options, s->weights, NULL));
}

static void remove_folder(const char *directory)
{
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    assert_int_equal(system(command), 0);
}

/* ---- tasks ---- */

static void test_each_task_once(void **state)
{
    (void)state;
    static const size_t counts[] = {0, 1, 2, 3, 7, 64, 1000};
    static int taken[1000];
    for (int trusted = 0; trusted < 3; trusted++) /* 2: a context that is not watched */
        for (int threads = -1; threads <= 9; threads++)
            for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
                const size_t tasks = counts[c];
                pk_context context;
                memset(&context, 0, sizeof context);
                context.load.trusted = trusted;
                int wrong_thread = 0;
                memset(taken, 0, sizeof taken);
                idle_machine();
                pk__team team = pk__team_of(trusted < 2 ? &context : NULL, threads, tasks);
                assert_true(team.threads >= 1 && team.threads <= (threads > 1 ? threads : 1));
                assert_true((size_t)team.threads <= (tasks ? tasks : 1));
                PK__PARALLEL(team)
                for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
                    taken[task]++;
                    if (pk__thread() >= team.threads) {
                        PK__ATOMIC_WRITE
                        wrong_thread = 1;
                    }
                }
                pk__team_end(&team);
                for (size_t i = 0; i < tasks; i++)
                    assert_int_equal(taken[i], 1);
                assert_false(wrong_thread);
#ifdef _OPENMP
                assert_int_equal(context.regions, trusted < 2 && threads > 1 && tasks > 1);
#else
                assert_int_equal(context.regions, 0);
#endif
            }
}

#ifdef _OPENMP
/* ---- the rule, by itself ---- */

/* One region of so long, whose work was so much; whether several threads had it. */
static int region(pk_context *context, double wall, double work)
{
    machine_wall = machine_work = 0;
    pk__team team = pk__team_of(context, 2, 8);
    if (team.threads == 1) {
        machine_time += work;
        return 0;
    }
    machine_time += wall;
    team.work = work;
    pk__team_end(&team);
    return 1;
}

static void test_idle_machine_is_trusted(void **state)
{
    (void)state;
    static const double works[] = {5e-6, 50e-6, 1e-3, 0.1};
    for (int i = 0; i < 4; i++) {
        pk_context context;
        memset(&context, 0, sizeof context);
        for (int r = 0; r < 10000; r++)
            assert_true(region(&context, 0.55 * works[i] + 1e-6, works[i]));
        assert_int_equal(context.regions, 10000);
        assert_int_equal(context.backed_off, 0);
        assert_true(context.load.trusted);
    }
}

/* A region that is held up now and then costs less than to give the threads up. */
static void test_rare_delay_is_forgiven(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int r = 0; r < 20000; r++)
        assert_true(region(&context, 0.55e-3 + (r % 200 == 199 ? 15e-3 : 0), 1e-3));
    assert_int_equal(context.backed_off, 0);
}

/* Beside a busy process, whatever the work of a region and however long it is held up: what is lost is a tenth of what one
 * thread would have taken, and what the first tries cost. */
static void test_busy_machine_is_left_alone(void **state)
{
    (void)state;
    static const double works[] = {20e-6, 0.5e-3, 5e-3, 50e-3, 0.5}, delays[] = {2e-3, 8e-3, 25e-3, 0.3};
    for (int i = 0; i < 5; i++)
        for (int d = 0; d < 4; d++)
            for (int learned = 0; learned < 2; learned++) { /* 1: the load comes later */
                pk_context context;
                memset(&context, 0, sizeof context);
                for (int r = 0; learned && r < 2000; r++)
                    assert_true(region(&context, 0.55 * works[i], works[i]));
                const double begin = machine_time, whole = works[i] < 0.1 && d < 3 ? 20 : 120;
                const size_t before = context.regions, regions = (size_t)(whole / works[i]);
                for (size_t r = 0; r < regions; r++)
                    (void)region(&context, works[i] + delays[d], works[i]);
                const double lost = machine_time - begin - (double)regions * works[i];
                if (lost > 0.1 * whole + 3 * delays[d] + 0.03)
                    fail_msg("regions of %g s held up for %g s: %g s of %g lost", works[i], delays[d], lost,
                             whole);
                assert_true(context.backed_off >= 1);
                assert_true(context.regions - before < regions / 8 + 40 || works[i] >= 0.1);
                /* The load goes away: within the longest rest the threads are back. */
                const double free = machine_time;
                while (!region(&context, 0.55 * works[i], works[i]))
                    assert_true(machine_time - free <=
                                PK__LOAD_LONGEST + PK__LOAD_REST * (delays[d] + 0.2 * works[i]));
                for (int r = 0; r < 3000; r++)
                    assert_true(region(&context, 0.55 * works[i], works[i]));
                assert_true(context.load.rest == 0 || works[i] < 50e-6); /* forgotten */
            }
}

/* One long delay: the threads rest once, and what was lost is not held against the next trial. */
static void test_one_delay(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int i = 1; i <= 20; i++) {
        for (int r = 0; r < 100; r++)
            assert_true(region(&context, 0.55e-3, 1e-3));
        assert_true(region(&context, 0.4, 1e-3));
        assert_int_equal(context.backed_off, i);
        assert_false(region(&context, 0.55e-3, 1e-3));
        machine_time += 10;
    }
}

/* Threads that gain nothing, on whatever machine, are given up, too. */
static void test_small_regions_are_serial(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    int several = 0;
    for (int r = 0; r < 1000000; r++)
        several += region(&context, 25e-6, 20e-6);
    assert_true(several < 50000);
}

/* ---- jobs ---- */

static void test_training(void **state)
{
    (void)state;
    enum { STEPS = 400 };
    static const char *const optimizers[] = {"sgd", "adamw"};
    for (int o = 0; o < 2; o++) {
        subject one, idle, busy;
        idle_machine();
        make_subject(&one, 1);
        train(&one, STEPS, optimizers[o], NULL);
        assert_int_equal(one.context.regions, 0);
        make_subject(&idle, 3);
        train(&idle, STEPS, optimizers[o], NULL);
        assert_int_equal(idle.context.regions, STEPS); /* one a step */
        assert_int_equal(idle.context.backed_off, 0);
        busy_machine();
        make_subject(&busy, 3);
        train(&busy, STEPS, optimizers[o], NULL);
        assert_true(busy.context.backed_off >= 1);
        assert_in_range(busy.context.regions, 1, 20);
        const size_t bytes = one.graph.parameters * sizeof *one.weights;
        assert_memory_equal(one.weights, idle.weights, bytes);
        assert_memory_equal(one.weights, busy.weights, bytes);
        release_subject(&one);
        release_subject(&idle);
        release_subject(&busy);
    }
}

static void test_kernel(void **state)
{
    (void)state;
    enum { EDGE = 128 * OUT, CALLS = 60 };
    static pk_real grams[3][EDGE * EDGE];
    subject subjects[3];
    for (int k = 0; k < 3; k++) { /* one thread, idle, busy */
        idle_machine();
        make_subject(&subjects[k], k ? 2 : 1);
        if (k == 2)
            busy_machine();
        for (int i = 0; i < CALLS; i++)
            assert_ok(&subjects[k].context,
                      pk_kernel_ntk(&subjects[k].context, &subjects[k].graph, subjects[k].start,
                                    pk_matrix_view(inputs, 128, IN), pk_matrix_view(inputs, 128, IN),
                                    pk_matrix_view(grams[k], EDGE, EDGE)));
        assert_memory_equal(grams[0], grams[k], sizeof grams[0]);
    }
    assert_int_equal(subjects[0].context.regions, 0);
    assert_true(subjects[1].context.regions >= CALLS && subjects[1].context.regions <= 8 * CALLS);
    assert_int_equal(subjects[1].context.backed_off, 0);
    assert_true(subjects[2].context.backed_off >= 1 && subjects[2].context.regions <= 20);
    for (int k = 0; k < 3; k++)
        release_subject(&subjects[k]);
}

static void test_decompositions(void **state)
{
    (void)state;
    enum { STEPS = 128, WINDOWS = 4 };
    static const char *const optimizers[] = {"sgd", "adamw"};
    for (int o = 0; o < 2; o++) {
        char directory[] = "/tmp/pathkernel-parallel-XXXXXX", record[64];
        assert_non_null(mkdtemp(directory));
        snprintf(record, sizeof record, "%s/run", directory);
        idle_machine();
        subject s;
        make_subject(&s, 1);
        train(&s, STEPS, optimizers[o], record);
        double *first = NULL;
        size_t numbers = 0;
        for (int k = 0; k < 4; k++) { /* one thread; idle, and again; busy */
            pk_context context;
            pk_run run;
            pk_decomposition result;
            memset(&context, 0, sizeof context);
            context.threads = k ? 2 : 1;
            assert_ok(&context, pk_run_open(&context, record, &run));
            pk_decompose_options options;
            memset(&options, 0, sizeof options);
            options.tolerance = 1;
            if (k == 3)
                busy_machine();
            else
                idle_machine();
            assert_ok(&context,
                      pk_decompose(&context, &run, pk_matrix_view(inputs, TEST_ROWS, IN), &options, &result));
            numbers = result.rows * result.outputs * result.examples;
            if (!first) {
                first = (double *)malloc(numbers * sizeof *first);
                assert_non_null(first);
                memcpy(first, result.by_example, numbers * sizeof *first);
            }
            assert_memory_equal(first, result.by_example, numbers * sizeof *first);
            if (k == 0)
                assert_int_equal(context.regions, 0);
            else if (k < 3)
                /* At most four a window, two of them where only the optimizer's state is advanced; predictions and the
                 * Gram matrix. */
                assert_in_range(context.regions, WINDOWS, (o ? 6 : 4) * WINDOWS + 4);
            else
                assert_true(context.backed_off >= 1 && context.regions <= 6);
            pk_decomposition_release(&context, &result);
            pk_run_release(&context, &run);
            assert_int_equal(context.memory_used, 0);
        }
        free(first);
        release_subject(&s);
        remove_folder(directory);
    }
}
#endif

/* ---- more threads than tasks or processors ---- */

static void test_too_many_threads(void **state)
{
    (void)state;
    static const int wanted[] = {100000, 1 << 30, 2147483647};
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int i = 0; i < 3; i++) {
        context.threads = wanted[i];
        assert_in_range(pk_threads(&context), 1, 65536);
    }
    size_t peak[2] = {0, 0};
    for (int k = 0; k < 2; k++) {
        subject s;
        idle_machine();
        make_subject(&s, k ? 100000 : 8);
        char directory[] = "/tmp/pathkernel-parallel-XXXXXX", record[64];
        assert_non_null(mkdtemp(directory));
        snprintf(record, sizeof record, "%s/run", directory);
        train(&s, 4, "adam", record);
        static pk_real gram[16 * OUT * 16 * OUT], outputs[EXAMPLES * OUT];
        const pk_matrix x = pk_matrix_view(inputs, 16, IN);
        assert_ok(&s.context, pk_kernel_ntk(&s.context, &s.graph, s.weights, x, x,
                                            pk_matrix_view(gram, 16 * OUT, 16 * OUT)));
        assert_ok(&s.context,
                  pk_graph_evaluate(&s.context, &s.graph, s.weights, pk_matrix_view(inputs, EXAMPLES, IN),
                                    pk_matrix_view(outputs, EXAMPLES, OUT)));
        pk_run run;
        pk_decomposition result;
        pk_decompose_options options;
        memset(&options, 0, sizeof options);
        options.tolerance = 1;
        assert_ok(&s.context, pk_run_open(&s.context, record, &run));
        assert_ok(&s.context, pk_decompose(&s.context, &run, x, &options, &result));
        pk_decomposition_release(&s.context, &result);
        pk_run_release(&s.context, &run);
        peak[k] = s.context.memory_peak;
        release_subject(&s);
        remove_folder(directory);
    }
    assert_true(peak[1] < 10 * peak[0]);
}

/* ---- fork ---- */

/* The parent's threads are not there in the child: a call with the parent's context must not wait for them. */
static void test_fork(void **state)
{
    (void)state;
    enum { STEPS = 20 };
    subject s;
    idle_machine();
    make_subject(&s, 2);
    train(&s, STEPS, "sgd", NULL);
    const size_t bytes = s.graph.parameters * sizeof *s.weights;
    pk_real *first = (pk_real *)malloc(bytes);
    assert_non_null(first);
    memcpy(first, s.weights, bytes);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(60); /* kills a child that waits for ever */
        const size_t regions = s.context.regions;
        pk_train_options options;
        memset(&options, 0, sizeof options);
        options.loss = PK_SOFTMAX_CROSS_ENTROPY;
        options.schedule.rate = 0.01;
        options.steps = STEPS;
        memcpy(s.weights, s.start, bytes);
        pk_status status = pk_train(&s.context, &s.graph, &s.train, &options, s.weights, NULL);
        _exit(status ? 1 : memcmp(s.weights, first, bytes) ? 2 : s.context.regions != regions ? 3 : 0);
    }
    int result = 0;
    assert_int_equal(waitpid(child, &result, 0), child);
    assert_true(WIFEXITED(result));
    assert_int_equal(WEXITSTATUS(result), 0);
    train(&s, STEPS, "sgd", NULL); /* the parent goes on with its threads */
    assert_memory_equal(s.weights, first, bytes);
    free(first);
    release_subject(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_task_once),
#ifdef _OPENMP
        cmocka_unit_test(test_idle_machine_is_trusted),
        cmocka_unit_test(test_rare_delay_is_forgiven),
        cmocka_unit_test(test_busy_machine_is_left_alone),
        cmocka_unit_test(test_one_delay),
        cmocka_unit_test(test_small_regions_are_serial),
        cmocka_unit_test(test_training),
        cmocka_unit_test(test_kernel),
        cmocka_unit_test(test_decompositions),
#endif
        cmocka_unit_test(test_too_many_threads),
        cmocka_unit_test(test_fork),
    };
#ifndef _OPENMP
    printf("Without OpenMP there are no regions to watch.\n");
#endif
    return cmocka_run_group_tests(tests, NULL, NULL);
}
