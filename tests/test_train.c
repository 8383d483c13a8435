/* The training loop: the right steps, the same bits for any number of threads, and nothing lost to a kill, a
 * full disk or a cancel. */
#define _DEFAULT_SOURCE /* mkdtemp, setrlimit */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dirent.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
#include "pathkernel_under_test.h"
#include "wait_killed.h"

/* ---- files ------------------------------------------------------------------------------------------ */

enum { PATH = 300 };
static char root[200], run_path[PATH], whole_path[PATH];

static const char *in(const char *directory, const char *name, char *path)
{
    int length = snprintf(path, PATH, "%s/%s", directory, name);
    assert_in_range(length, 1, PATH - 1);
    return path;
}

static void clear(const char *directory)
{
    char path[PATH];
    DIR *entries = opendir(directory);
    if (!entries)
        return;
    for (struct dirent *entry; (entry = readdir(entries));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            (void)remove(in(directory, entry->d_name, path));
    closedir(entries);
    (void)rmdir(directory);
}

static size_t file_size(const char *directory, const char *name)
{
    char path[PATH];
    struct stat about;
    return stat(in(directory, name, path), &about) == 0 ? (size_t)about.st_size : 0;
}

static void assert_same_file(const char *a, const char *b, const char *name)
{
    char path[PATH];
    size_t size = file_size(a, name);
    assert_int_equal(size, file_size(b, name));
    FILE *file_a = fopen(in(a, name, path), "rb"), *file_b = fopen(in(b, name, path), "rb");
    assert_int_equal(!file_a, !file_b);
    if (!file_a)
        return;
    for (size_t i = 0; i < size; i++)
        assert_int_equal(getc(file_a), getc(file_b));
    fclose(file_a);
    fclose(file_b);
}

static void assert_same_run(const char *a, const char *b)
{
    static const char *const names[] = {"run.txt",           "weights.npy",       "learning_rates.npy",
                                        "batch_offsets.npy", "batch_items.npy",   "gradient_scales.npy",
                                        "train_inputs.npy",  "train_targets.npy", "second_moments.npy"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++)
        assert_same_file(a, b, names[k]);
}

/* ---- a small problem -------------------------------------------------------------------------------- */

enum { N = 150, D = 4, H = 5, C = 3, P = D * H + H + H * C + C, STEPS = 300 };

static double inputs[N * D];
static int64_t targets[N];
static pk_dataset train;
static pk_graph graph;
static pk_real start[P];

static int prepare(void **state)
{
    (void)state;
    const char *folder = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/pathkernel-train-XXXXXX", folder && strlen(folder) < 100 ? folder : "/tmp");
    if (!mkdtemp(root))
        return -1;
    in(root, "run", run_path);
    in(root, "whole", whole_path);
    for (int i = 0; i < N; i++) {
        targets[i] = i % C;
        for (int d = 0; d < D; d++)
            inputs[i * D + d] = sin(0.7 * i * (d + 1)) + (double)(i % C) * (d == i % C);
    }
    size_t inputs_shape[2] = {N, D}, targets_shape[1] = {N};
    train.inputs = pk_array_view(PK_FLOAT64, 2, inputs_shape, inputs);
    train.targets = pk_array_view(PK_INT64, 1, targets_shape, targets);
    return pk_network_parse(NULL, "input 4; dense 5; tanh; dense 3", &graph) ||
           pk_network_initialize(NULL, &graph, 7, start);
}

static int finish(void **state)
{
    (void)state;
    clear(run_path);
    clear(whole_path);
    pk_graph_release(NULL, &graph);
    return rmdir(root);
}

static int start_clean(void **state)
{
    (void)state;
    clear(run_path);
    clear(whole_path);
    return 0;
}

static double decreasing(void *user, size_t step)
{
    (void)user;
    return 0.3 / (1.0 + 0.01 * (double)step);
}

enum { SGD, MOMENTUM, ADAM, RULES };

static pk_train_options make_options(int rule, size_t steps)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.kind = PK_SCHEDULE_FUNCTION;
    options.schedule.function = decreasing;
    options.steps = steps;
    options.batch_size = 32; /* the last batch of an epoch has 22 */
    options.seed = 11;
    if (rule == MOMENTUM) {
        options.optimizer.momentum = 0.9;
        options.optimizer.weight_decay = 1e-3;
        options.clip_norm = 0.5;
    } else if (rule == ADAM) {
        options.optimizer = pk_optimizer_adam();
        options.schedule.kind = PK_SCHEDULE_CONSTANT;
        options.schedule.rate = 0.01;
        options.record_second_moments = 1;
    }
    return options;
}

static void run_training(const pk_train_options *options, int threads, pk_real *weights,
                         pk_train_result *result)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    context.threads = threads;
    memcpy(weights, start, sizeof start);
    if (pk_train(&context, &graph, &train, options, weights, result) != PK_OK)
        fail_msg("%s", pk_message(&context));
    assert_int_equal(context.memory_used, 0);
}

/* ---- a child that trains, killed ---------------------------------------------------------------------
 * First in the program: a process that has used OpenMP's threads must not fork and use them again. */

static int wait_for_token(void *user, size_t step, double objective, const pk_real *weights)
{
    (void)step, (void)objective, (void)weights;
    char token;
    return read(*(int *)user, &token, 1) != 1; /* the other end closed: stop */
}

/* A child that trains or resumes into run_path; it makes one step for each token it is given. Both ends stay open here: it may
 * be dead before it is given any. */
static pid_t start_child(pk_train_options options, int ends[2])
{
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[1]);
        pk_context context;
        memset(&context, 0, sizeof context);
        context.threads = 1;
        pk_real weights[P];
        memcpy(weights, start, sizeof start);
        options.record = run_path;
        options.resume = 1;
        options.on_step = wait_for_token;
        options.user = &ends[0];
        pk_status status = pk_train(&context, &graph, &train, &options, weights, NULL);
        if (status != PK_OK)
            fprintf(stderr, "%s\n", pk_message(&context));
        _exit(status == PK_OK ? 0 : 1);
    }
    return child;
}

static void close_both(const int ends[2])
{
    close(ends[0]);
    close(ends[1]);
}

/* Every complete step is as in the whole run. Returns their number. */
static size_t check_complete_steps(const pk_run *whole)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_run run;
    if (pk_run_open(&context, run_path, &run) != PK_OK)
        fail_msg("%s", pk_message(&context));
    pk_real here[P], there[P];
    assert_true(run.steps <= whole->steps);
    for (size_t s = 0; s <= run.steps; s++) {
        assert_int_equal(pk_run_weights(&context, &run, s, here), PK_OK);
        assert_int_equal(pk_run_weights(&context, whole, s, there), PK_OK);
        assert_memory_equal(here, there, sizeof here);
        if (s == run.steps)
            break;
        pk_batch a, b;
        pk_run_batch(&run, s, &a);
        pk_run_batch(whole, s, &b);
        assert_int_equal(a.count, b.count);
        assert_memory_equal(a.items, b.items, a.count * sizeof *a.items);
        assert_true(run.learning_rates[s] == whole->learning_rates[s]);
        assert_true(pk_run_gradient_scale(&run, s) == pk_run_gradient_scale(whole, s));
    }
    size_t steps = run.steps;
    pk_run_release(&context, &run);
    return steps;
}

static void test_killed_at_any_moment(void **state)
{
    (void)state;
    enum { KILLS = 12 };
    pk_random random = {2024, 0, 0};
    for (int rule = 0; rule < RULES; rule++) {
        pk_train_options options = make_options(rule, STEPS);
        pk_real weights[P];
        pk_run whole;
        options.record = whole_path;
        run_training(&options, 1, weights, NULL);
        assert_int_equal(pk_run_open(NULL, whole_path, &whole), PK_OK);
        assert_int_equal(whole.steps, STEPS);
        size_t steps = 0;
        int tokens[2], result;
        for (int k = 0; k < KILLS; k++) {
            pid_t child = start_child(options, tokens);
            /* Some are killed while they start or replay, the others after a few steps and then at any
             * instruction of the steps that the tokens still allow. */
            size_t more = pk_random_below(&random, STEPS / KILLS), row = P * 8;
            char allowed[STEPS] = {0};
            assert_int_equal(write(tokens[1], allowed, more + 2), (ssize_t)(more + 2));
            while (more && file_size(run_path, "weights.npy") < (steps + more + 1) * row &&
                   waitpid(child, &result, WNOHANG) == 0)
                continue;
            for (volatile size_t i = pk_random_below(&random, 200000); i > 0; i = i - 1)
                continue;
            assert_int_equal(kill(child, SIGKILL), 0);
            assert_int_equal(wait_killed(child, &result), child);
            assert_true(WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL);
            close_both(tokens);
            if (file_size(run_path, "run.txt") == 0)
                continue; /* killed before there was a run */
            size_t complete = check_complete_steps(&whole);
            assert_true(complete >= steps + (more ? more - 1 : 0)); /* what was whole stays whole */
            steps = complete;
        }
        assert_true(steps > 0 && steps < STEPS);
        pid_t child = start_child(options, tokens);
        char enough[STEPS] = {0};
        assert_int_equal(write(tokens[1], enough, STEPS), STEPS);
        assert_int_equal(waitpid(child, &result, 0), child);
        assert_int_equal(result, 0);
        close_both(tokens);
        assert_int_equal(check_complete_steps(&whole), STEPS);
        pk_run_release(NULL, &whole);
        assert_same_run(whole_path, run_path);
        start_clean(NULL);
    }
}

/* Steps of a life: made, or repeated. */
typedef struct life {
    size_t left, repeated, made;
    int killed; /* at the end of its life; else cancelled */
} life;

static int live(void *user, const char *phase, double fraction)
{
    life *l = (life *)user;
    (void)fraction;
    if (strstr(phase, "replaying"))
        l->repeated++;
    else
        l->made++;
    if (--l->left)
        return 0;
    if (l->killed)
        (void)raise(SIGKILL);
    return 1;
}

/* Trains or resumes for so many steps. */
static pk_status live_once(pk_train_options options, life *l, pk_real *weights)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    context.threads = 1;
    context.progress = live;
    context.progress_user = l;
    memcpy(weights, start, sizeof start);
    options.record = run_path;
    options.resume = 1;
    pk_status status = pk_train(&context, &graph, &train, &options, weights, NULL);
    if (status != PK_OK && status != PK_CANCELLED)
        fail_msg("%s", pk_message(&context));
    assert_int_equal(context.memory_used, 0);
    return status;
}

/* However few steps a life has, some of them are new. */
static void test_killed_after_few_steps(void **state)
{
    (void)state;
    enum { FEW = 75 };
    static const size_t lives[] = {3, 4, 7, 16, 20};
    for (int rule = 0; rule < RULES; rule++)
        for (size_t i = 0; i < sizeof lives / sizeof *lives; i++)
            for (int keep = 1; keep <= 2; keep++) {
                pk_train_options options = make_options(rule, FEW);
                pk_real weights[P], resumed[P];
                pk_run whole;
                options.record_second_moments &= keep == 1;
                options.keep_every = (size_t)keep;
                options.record = whole_path;
                run_training(&options, 1, weights, NULL);
                size_t births = 0;
                for (int done = 0; !done; births++) {
                    life l = {lives[i], 0, 0, 1};
                    int result = 0;
                    if (births > FEW)
                        fail_msg("rule %d, %zu steps a life: %zu lives were not enough", rule, lives[i],
                                 births);
                    pid_t child = fork();
                    assert_true(child >= 0);
                    if (child == 0)
                        _exit(live_once(options, &l, resumed) != PK_OK);
                    assert_int_equal(wait_killed(child, &result), child);
                    done = WIFEXITED(result);
                    assert_true(done ? WEXITSTATUS(result) == 0 : WTERMSIG(result) == SIGKILL);
                }
                assert_same_run(whole_path, run_path);
                assert_int_equal(pk_run_open(NULL, whole_path, &whole), PK_OK);
                if (keep == 1)
                    assert_int_equal(check_complete_steps(&whole), FEW);
                pk_run_release(NULL, &whole);
                start_clean(NULL);
            }
}

/* Resuming repeats a bounded number of steps, wherever the recording ends; all where the state is not there. */
static void test_resume_repeats_few_steps(void **state)
{
    (void)state;
    static const size_t ends[] = {1, 2, 15, 16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 95, 96, 97, 100};
    for (int rule = 0; rule < RULES; rule++)
        for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
            for (int damage = 0; damage < (rule != SGD && ends[i] > 17 ? 6 : 1); damage++) {
                pk_train_options options = make_options(rule, 110);
                pk_real weights[P], resumed[P];
                life first = {ends[i], 0, 0, 0}, second = {SIZE_MAX, 0, 0, 0};
                char path[PATH];
                in(run_path, "resume_state.npy", path);
                options.record_second_moments = 0;
                run_training(&options, 1, weights, NULL);
                assert_int_equal(live_once(options, &first, resumed), PK_CANCELLED);
                assert_int_equal(first.made, ends[i]);
                const size_t bytes = file_size(run_path, "resume_state.npy");
                assert_int_equal(bytes != 0, rule != SGD && ends[i] > 16);
                if (damage == 1)
                    assert_int_equal(remove(path), 0); /* as older versions recorded */
                if (damage == 2)
                    assert_int_equal(truncate(path, (off_t)bytes - 8), 0);
                if (damage >= 3) { /* of both rows another step, another hash, another state */
                    const double wrong[] = {1, 12345, 0.125};
                    const long row = 8 * (long)((rule == ADAM ? 2 : 1) * P + 2);
                    FILE *file = fopen(path, "r+b");
                    assert_non_null(file);
                    for (long r = 1; r <= 2; r++) {
                        assert_int_equal(fseek(file, (long)bytes - r * row + 8 * (damage - 3), SEEK_SET), 0);
                        assert_int_equal(fwrite(&wrong[damage - 3], 8, 1, file), 1);
                    }
                    assert_int_equal(fclose(file), 0);
                }
                assert_int_equal(live_once(options, &second, resumed), PK_OK);
                assert_memory_equal(weights, resumed, sizeof weights);
                assert_int_equal(second.made, 110 - ends[i]);
                if (damage)
                    assert_int_equal(second.repeated, ends[i]);
                else
                    assert_in_range(second.repeated, 1, rule == SGD ? 1 : 17);
                start_clean(NULL);
            }
}

/* A state from a recording that was replaced is of no use to the next one. */
static void test_replaced_state(void **state)
{
    (void)state;
    pk_train_options options = make_options(ADAM, 40);
    pk_real weights[P];
    options.record = run_path;
    run_training(&options, 1, weights, NULL);
    assert_true(file_size(run_path, "resume_state.npy") > 0);
    options.steps = 3;
    options.replace = 1;
    run_training(&options, 1, weights, NULL);
    assert_int_equal(file_size(run_path, "resume_state.npy"), 0);
}

/* Killed by the kernel at a given byte of the longest file, in the middle of a write. */
static void test_killed_inside_a_write(void **state)
{
    (void)state;
    pk_train_options options = make_options(MOMENTUM, 40);
    pk_real weights[P];
    pk_run whole;
    options.record = whole_path;
    run_training(&options, 1, weights, NULL);
    assert_int_equal(pk_run_open(NULL, whole_path, &whole), PK_OK);
    struct rlimit limit, small, core;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_int_equal(getrlimit(RLIMIT_CORE, &core), 0);
    small = core, small.rlim_cur = 0;
    assert_int_equal(setrlimit(RLIMIT_CORE, &small), 0);
    pk_random random = {77, 0, 0};
    int tokens[2], result, killed = 0;
    size_t least = file_size(whole_path, "train_inputs.npy"), most = file_size(whole_path, "weights.npy");
    char enough[40] = {0};
    for (size_t bytes = least; bytes < most; bytes += pk_random_below(&random, 900)) {
        small = limit, small.rlim_cur = (rlim_t)bytes;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        pid_t child = start_child(options, tokens);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        assert_int_equal(write(tokens[1], enough, sizeof enough), (ssize_t)sizeof enough);
        assert_int_equal(waitpid(child, &result, 0), child);
        close_both(tokens);
        killed += WIFSIGNALED(result) && WTERMSIG(result) == SIGXFSZ;
        check_complete_steps(&whole);
    }
    assert_true(killed > 5);
    pid_t child = start_child(options, tokens);
    assert_int_equal(write(tokens[1], enough, sizeof enough), (ssize_t)sizeof enough);
    assert_int_equal(waitpid(child, &result, 0), child);
    assert_int_equal(result, 0);
    close_both(tokens);
    assert_int_equal(setrlimit(RLIMIT_CORE, &core), 0);
    pk_run_release(NULL, &whole);
    assert_same_run(whole_path, run_path);
}

/* ---- the loop --------------------------------------------------------------------------------------- */

/* Least squares with a dense layer, by hand: w <- w - lr mean((w.x + b - y) (x, 1)). */
static void test_by_hand(void **state)
{
    (void)state;
    enum { ROWS = 7, COLUMNS = 3, COUNT = 50 };
    double x[ROWS * COLUMNS], y[ROWS], w[COLUMNS + 1] = {0.1, -0.2, 0.3, 0.4};
    pk_real weights[COLUMNS + 1];
    for (int i = 0; i < ROWS * COLUMNS; i++)
        x[i] = sin(3.0 * i);
    for (int i = 0; i < ROWS; i++)
        y[i] = cos(2.0 * i);
    for (int p = 0; p <= COLUMNS; p++)
        weights[p] = (pk_real)w[p];
    size_t x_shape[2] = {ROWS, COLUMNS}, y_shape[1] = {ROWS};
    pk_dataset data;
    data.inputs = pk_array_view(PK_FLOAT64, 2, x_shape, x);
    data.targets = pk_array_view(PK_FLOAT64, 1, y_shape, y);
    pk_graph line;
    memset(&line, 0, sizeof line);
    assert_int_equal(pk_network_parse(NULL, "input 3; dense 1", &line), PK_OK);
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SQUARED;
    options.schedule.rate = 0.2;
    options.steps = COUNT;
    options.batch_size = 3;
    options.shuffle_off = 1;
    pk_train_result result;
    assert_int_equal(pk_train(NULL, &line, &data, &options, weights, &result), PK_OK);
    double objective = 0;
    for (int s = 0; s < COUNT; s++) {
        int first = s % 3 * 3, count = first == 6 ? 1 : 3;
        double gradient[COLUMNS + 1] = {0, 0, 0, 0};
        objective = 0;
        for (int i = first; i < first + count; i++) {
            double error = w[COLUMNS] - y[i];
            for (int d = 0; d < COLUMNS; d++)
                error += w[d] * x[i * COLUMNS + d];
            objective += error * error / 2 / count;
            for (int d = 0; d < COLUMNS; d++)
                gradient[d] += error * x[i * COLUMNS + d] / count;
            gradient[COLUMNS] += error / count;
        }
        for (int p = 0; p <= COLUMNS; p++)
            w[p] -= 0.2 * gradient[p];
    }
    double tolerance = sizeof(pk_real) > 4 ? 1e-13 : 1e-4;
    for (int p = 0; p <= COLUMNS; p++)
        assert_true(fabs((double)weights[p] - w[p]) < tolerance);
    assert_true(fabs(result.objective - objective) < tolerance);
    assert_int_equal(result.steps, COUNT);
    assert_int_equal(result.resumed, 0);
    pk_graph_release(NULL, &line);
}

/* Each epoch visits every example once, in another order, which the seed decides. */
static void test_batches(void **state)
{
    (void)state;
    pk_train_options options = make_options(SGD, 15);
    pk_real weights[P];
    options.record = run_path;
    run_training(&options, 1, weights, NULL);
    options.record = whole_path;
    options.seed++;
    run_training(&options, 1, weights, NULL);
    pk_run run, other;
    assert_int_equal(pk_run_open(NULL, run_path, &run), PK_OK);
    assert_int_equal(pk_run_open(NULL, whole_path, &other), PK_OK);
    assert_int_equal(run.batch_offsets[15], 3 * N);
    for (int s = 0; s < 15; s++)
        assert_int_equal(run.batch_offsets[s + 1] - run.batch_offsets[s], s % 5 == 4 ? 22 : 32);
    for (int epoch = 0; epoch < 3; epoch++) {
        int seen[N] = {0};
        for (int i = 0; i < N; i++)
            seen[run.batch_items[epoch * N + i]]++;
        for (int i = 0; i < N; i++)
            assert_int_equal(seen[i], 1);
    }
    assert_memory_not_equal(run.batch_items, run.batch_items + N, N * sizeof(int64_t));
    assert_memory_not_equal(run.batch_items, other.batch_items, N * sizeof(int64_t));
    pk_run_release(NULL, &run);
    pk_run_release(NULL, &other);
    clear(run_path);
    /* Full batches stand in row order. */
    options.batch_size = 0;
    options.steps = 2;
    options.record = run_path;
    run_training(&options, 1, weights, NULL);
    assert_int_equal(pk_run_open(NULL, run_path, &run), PK_OK);
    for (int i = 0; i < 2 * N; i++)
        assert_int_equal(run.batch_items[i], i % N);
    pk_run_release(NULL, &run);
}

typedef struct watch {
    size_t calls, stop_after;
    double first, last;
    pk_real weights[P];
} watch;

static int watch_step(void *user, size_t step, double objective, const pk_real *weights)
{
    watch *w = (watch *)user;
    if (!w->calls++)
        w->first = objective;
    w->last = objective;
    memcpy(w->weights, weights, sizeof w->weights);
    return step + 1 == w->stop_after;
}

static int watch_progress(void *user, const char *phase, double fraction)
{
    (void)phase;
    return fraction >= *(double *)user;
}

static void test_training_learns(void **state)
{
    (void)state;
    for (int rule = 0; rule < RULES; rule++) {
        pk_train_options options = make_options(rule, STEPS);
        options.record_second_moments = 0;
        options.batch_size = 0;
        watch seen;
        memset(&seen, 0, sizeof seen);
        options.on_step = watch_step;
        options.user = &seen;
        pk_real weights[P];
        pk_train_result result;
        run_training(&options, 1, weights, &result);
        assert_int_equal(seen.calls, STEPS);
        assert_true(seen.last < 0.8 * seen.first);
        assert_true(result.objective == seen.last);
        assert_memory_equal(seen.weights, weights, sizeof weights);
    }
}

static void test_cancel_keeps_steps(void **state)
{
    (void)state;
    for (int how = 0; how < 2; how++) {
        pk_train_options options = make_options(ADAM, 60);
        pk_real weights[P], resumed[P];
        options.record = whole_path;
        run_training(&options, 1, weights, NULL);
        options.record = run_path;
        watch seen;
        memset(&seen, 0, sizeof seen);
        double fraction = 0.5;
        pk_context context;
        memset(&context, 0, sizeof context);
        if (how) {
            context.progress = watch_progress;
            context.progress_user = &fraction;
        } else {
            seen.stop_after = 30;
            options.on_step = watch_step;
            options.user = &seen;
        }
        pk_train_result result;
        memcpy(resumed, start, sizeof start);
        assert_int_equal(pk_train(&context, &graph, &train, &options, resumed, &result), PK_CANCELLED);
        assert_int_equal(result.steps, 30);
        pk_run run;
        assert_int_equal(pk_run_open(NULL, run_path, &run), PK_OK);
        assert_int_equal(run.steps, 30);
        assert_int_equal(run.cut_off, 0);
        pk_run_release(NULL, &run);
        options.resume = 1;
        options.on_step = NULL;
        run_training(&options, 2, resumed, &result);
        assert_int_equal(result.steps, 60);
        assert_int_equal(result.resumed, 30);
        assert_memory_equal(resumed, weights, sizeof weights);
        assert_same_run(whole_path, run_path);
        /* Once more: nothing is left to do. */
        run_training(&options, 1, resumed, &result);
        assert_int_equal(result.resumed, 60);
        assert_true(isnan(result.objective));
        assert_memory_equal(resumed, weights, sizeof weights);
        assert_same_run(whole_path, run_path);
        start_clean(NULL);
    }
}

/* Threads, recording and float32 recording change no bit of the weights. */
static void test_same_bits(void **state)
{
    (void)state;
    for (int rule = 0; rule < RULES; rule++)
        for (int full = 0; full < 2; full++) {
            pk_train_options options = make_options(rule, 40);
            if (full)
                options.batch_size = 0;
            pk_real expected[P], weights[P];
            options.record = run_path;
            run_training(&options, 1, expected, NULL);
            for (int threads = 2; threads <= 5; threads++) {
                options.record = whole_path;
                run_training(&options, threads, weights, NULL);
                assert_memory_equal(weights, expected, sizeof weights);
                assert_same_run(run_path, whole_path);
                clear(whole_path);
            }
            options.record_float32 = 1;
            options.record = whole_path;
            run_training(&options, 1, weights, NULL);
            assert_memory_equal(weights, expected, sizeof weights);
            pk_run run;
            pk_real row[P];
            assert_int_equal(pk_run_open(NULL, whole_path, &run), PK_OK);
            assert_int_equal(pk_run_weights(NULL, &run, 40, row), PK_OK);
            for (int p = 0; p < P; p++)
                assert_true(row[p] == (pk_real)(float)expected[p]);
            pk_run_release(NULL, &run);
            options.record = NULL;
            options.record_float32 = options.record_second_moments = 0;
            run_training(&options, 1, weights, NULL);
            assert_memory_equal(weights, expected, sizeof weights);
            start_clean(NULL);
        }
}

/* Training that blows up ends at the last finite weights, and so does its recording. */
static void test_divergence(void **state)
{
    (void)state;
    pk_train_options options = make_options(SGD, 100);
    options.loss = PK_SQUARED;
    options.schedule.kind = PK_SCHEDULE_CONSTANT;
    options.schedule.rate = EITHER(1e100, 1e12);
    options.record = run_path;
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_real weights[P], row[P];
    memcpy(weights, start, sizeof start);
    pk_train_result result;
    assert_int_equal(pk_train(&context, &graph, &train, &options, weights, &result), PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "step "));
    assert_true(result.steps > 0 && result.steps < 100);
    pk_run run;
    assert_int_equal(pk_run_open(&context, run_path, &run), PK_OK);
    assert_int_equal(run.steps, result.steps);
    assert_int_equal(pk_run_weights(&context, &run, run.steps, row), PK_OK);
    assert_memory_equal(row, weights, sizeof row);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
}

static void test_full_disk(void **state)
{
    (void)state;
    pk_train_options options = make_options(ADAM, 60);
    pk_real weights[P], row[P];
    options.record = whole_path;
    run_training(&options, 1, weights, NULL);
    struct rlimit limit, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    pk_context context;
    memset(&context, 0, sizeof context);
    options.record = run_path;
    options.resume = 1;
    size_t before = 0;
    for (rlim_t bytes = 5000; bytes < 19000; bytes += 1999) {
        small = limit, small.rlim_cur = bytes;
        memcpy(weights, start, sizeof start);
        pk_train_result result;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        pk_status status = pk_train(&context, &graph, &train, &options, weights, &result);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        assert_int_equal(status, PK_IO);
        assert_non_null(strstr(pk_message(&context), ".npy"));
        assert_true(result.resumed == before && result.steps > before);
        before = result.steps;
        pk_run run;
        assert_int_equal(pk_run_open(&context, run_path, &run), PK_OK);
        assert_int_equal(run.steps, result.steps);
        assert_int_equal(pk_run_weights(&context, &run, run.steps, row), PK_OK);
        assert_memory_equal(row, weights, sizeof row);
        pk_run_release(&context, &run);
        assert_int_equal(context.memory_used, 0);
    }
    signal(SIGXFSZ, handler);
    run_training(&options, 1, weights, NULL);
    assert_same_run(whole_path, run_path);
}

static void assert_refused(const pk_train_options *options, pk_status expected, const char *message)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_real weights[P];
    memcpy(weights, start, sizeof start);
    pk_train_result result;
    pk_status status = pk_train(&context, &graph, &train, options, weights, &result);
    if (status != expected || !strstr(pk_message(&context), message))
        fail_msg("status %d, '%s' instead of '%s'", (int)status, pk_message(&context), message);
    assert_memory_equal(weights, start, sizeof start);
    assert_int_equal(context.memory_used, 0);
}

static void test_resume_refuses_another_run(void **state)
{
    (void)state;
    for (int rule = 0; rule < RULES; rule++) {
        pk_train_options options = make_options(rule, 20), changed;
        pk_real weights[P];
        options.record = run_path;
        run_training(&options, 1, weights, NULL);
        assert_refused(&options, PK_ARGUMENT, "holds a run already");
        options.resume = 1;
        options.steps = 30;
        changed = options, changed.steps = 10;
        assert_refused(&changed, PK_ARGUMENT, "holds 20 steps already, more than the 10");
        changed = options, changed.seed++;
        assert_refused(&changed, PK_ARGUMENT, "its step 0 used another batch");
        changed = options, changed.batch_size = 31;
        assert_refused(&changed, PK_ARGUMENT, "its step 0 used another batch");
        changed = options, changed.schedule.kind = PK_SCHEDULE_CONSTANT, changed.schedule.rate = 0.25;
        assert_refused(&changed, PK_ARGUMENT, "the rate of its step 0 is");
        changed = options, changed.optimizer.weight_decay += 0.5;
        assert_refused(&changed, PK_ARGUMENT, "its optimizer is");
        changed = options, changed.clip_norm = options.clip_norm > 0 ? 0 : 1;
        assert_refused(&changed, PK_ARGUMENT, "gradient_scales.npy");
        if (options.clip_norm > 0) {
            changed = options, changed.clip_norm /= 4;
            assert_refused(&changed, PK_ARGUMENT, "made by other options");
        }
        changed = options, changed.loss = PK_SQUARED;
        assert_refused(&changed, PK_ARGUMENT, "its loss is");
        start[3] += 1;
        assert_refused(&options, PK_ARGUMENT, "it starts from other weights");
        start[3] -= 1;
        clear(run_path);
        if (sizeof(pk_real) > 4) {
            options.record_float32 = 1;
            options.resume = 0;
            run_training(&options, 1, weights, NULL);
            options.resume = 1;
            assert_refused(&options, PK_UNSUPPORTED, "recorded as float32");
        }
        clear(run_path);
    }
}

static void test_arguments(void **state)
{
    (void)state;
    pk_train_options options = make_options(SGD, 5), changed;
    pk_real weights[P] = {0};
    assert_int_equal(pk_train(NULL, NULL, &train, &options, weights, NULL), PK_ARGUMENT);
    assert_int_equal(pk_train(NULL, &graph, NULL, &options, weights, NULL), PK_ARGUMENT);
    assert_int_equal(pk_train(NULL, &graph, &train, NULL, weights, NULL), PK_ARGUMENT);
    assert_int_equal(pk_train(NULL, &graph, &train, &options, NULL, NULL), PK_ARGUMENT);
    changed = options, changed.resume = 1;
    assert_refused(&changed, PK_ARGUMENT, "without a directory");
    changed = options, changed.record = run_path, changed.record_second_moments = 1;
    assert_refused(&changed, PK_ARGUMENT, "no second moments");
    changed = options, changed.clip_norm = -1;
    assert_refused(&changed, PK_ARGUMENT, "clip_norm is -1");
    changed = options, changed.optimizer.momentum = -1;
    assert_refused(&changed, PK_ARGUMENT, "momentum");
    changed = options, changed.schedule.kind = PK_SCHEDULE_CONSTANT, changed.schedule.rate = (double)NAN;
    assert_refused(&changed, PK_ARGUMENT, "rate");
    changed = options, changed.loss = (pk_loss)99;
    assert_refused(&changed, PK_ARGUMENT, "loss");
    changed = options, changed.record = "/nowhere/at/all";
    assert_refused(&changed, PK_IO, "/nowhere/at/all: No such file");
    start[2] = (pk_real)NAN;
    assert_int_equal(pk_train(NULL, &graph, &train, &options, start, NULL), PK_NOT_FINITE);
    assert_int_equal(pk_network_initialize(NULL, &graph, 7, start), PK_OK);
    targets[5] = C;
    assert_refused(&options, PK_ARGUMENT, "5");
    targets[5] = 5 % C;
    assert_int_equal(access(run_path, F_OK), -1);
    /* No steps: only w_0 is recorded. */
    changed = options, changed.steps = 0, changed.record = run_path;
    run_training(&changed, 1, weights, NULL);
    assert_memory_equal(weights, start, sizeof start);
    pk_run run;
    assert_int_equal(pk_run_open(NULL, run_path, &run), PK_OK);
    assert_int_equal(run.steps, 0);
    pk_run_release(NULL, &run);
}

typedef struct counting {
    long allocations, fail_at, outstanding;
} counting;

static void *counting_allocate(void *user, size_t bytes, size_t alignment)
{
    counting *count = (counting *)user;
    void *pointer = NULL;
    if (count->allocations++ == count->fail_at || posix_memalign(&pointer, alignment, bytes) != 0)
        return NULL;
    count->outstanding++;
    return pointer;
}

static void counting_release(void *user, void *pointer, size_t bytes)
{
    (void)bytes;
    ((counting *)user)->outstanding--;
    free(pointer);
}

static void test_no_memory(void **state)
{
    (void)state;
    pk_train_options options = make_options(ADAM, 3);
    options.record = run_path;
    options.resume = 1;
    for (int again = 0; again < 2; again++) { /* a fresh run, then one with a replay */
        pk_status status = PK_MEMORY;
        long fail_at = 0;
        for (; status != PK_OK; fail_at++) {
            counting count = {0, fail_at, 0};
            pk_context context;
            memset(&context, 0, sizeof context);
            context.threads = 2;
            context.allocator.allocate = counting_allocate;
            context.allocator.release = counting_release;
            context.allocator.user = &count;
            pk_real weights[P];
            memcpy(weights, start, sizeof start);
            status = pk_train(&context, &graph, &train, &options, weights, NULL);
            assert_true(status == PK_OK || status == PK_MEMORY);
            assert_int_equal(count.outstanding, 0);
            assert_int_equal(context.memory_used, 0);
        }
        assert_true(fail_at > 10);
    }
    pk_context context;
    memset(&context, 0, sizeof context);
    context.memory_limit = 1024;
    pk_real weights[P];
    memcpy(weights, start, sizeof start);
    assert_int_equal(pk_train(&context, &graph, &train, &options, weights, NULL), PK_MEMORY_LIMIT);
    assert_non_null(strstr(pk_message(&context), "1024"));
    assert_int_equal(context.memory_used, 0);
}

/* Weights of classes: PyTorch's mean over the weights of a batch's labels, recorded, and resumed to the same bits. */
static void test_weighted_classes(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int every = 0; every < 5; every += 4) {
        const double weight[C] = {0.5, 2, 1.25};
        const pk_criterion criterion = {.loss = PK_SOFTMAX_CROSS_ENTROPY,
                                        .label_smoothing = 0.1,
                                        .ignores = 1,
                                        .ignore_index = 1,
                                        .weight = weight,
                                        .weight_count = C};
        pk_train_options options = make_options(MOMENTUM, 9);
        pk_real whole[P], parts[P];
        pk_train_result result;
        pk_run run;
        options.criterion = &criterion;
        run_training(&options, 1, whole, &result);
        options.record = run_path, options.resume = 1, options.keep_every = (size_t)every;
        for (options.steps = 3; options.steps <= 9; options.steps += 3)
            run_training(&options, 2, parts, &result);
        assert_memory_equal(whole, parts, sizeof whole);
        assert_int_equal(pk_run_open(&context, run_path, &run), PK_OK);
        assert_true(run.loss == PK_SOFTMAX_CROSS_ENTROPY && run.criterion.label_smoothing == 0.1);
        assert_memory_equal(run.criterion.weight, weight, sizeof weight);
        for (size_t s = 0; s < run.steps; s++) {
            pk_batch batch;
            double mean[N];
            pk_run_batch(&run, s, &batch);
            pk_criterion_mean(&run.criterion, &train, batch.items, batch.count, mean);
            assert_memory_equal(batch.weights, mean, batch.count * sizeof *mean);
        }
        pk_run_release(&context, &run);
        pk_criterion other = criterion;
        other.label_smoothing = 0.2;
        options.criterion = &other;
        assert_int_equal(pk_train(&context, &graph, &train, &options, parts, &result), PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "its loss is 'softmax_cross_entropy label_smoothing=0.1"));
        for (int64_t i = 0; i < N; i++)
            assert_true(targets[i] == i % C);
        targets[0] = targets[1] = 1; /* a batch of nothing but ignored labels */
        options.record = NULL, options.resume = 0, options.keep_every = 0, options.batch_size = 2;
        options.shuffle_off = 1;
        assert_int_equal(pk_train(&context, &graph, &train, &options, parts, &result), PK_NOT_FINITE);
        assert_non_null(strstr(pk_message(&context), "step 0: each label of the batch is ignored"));
        targets[0] = 0;
        other.loss = PK_L1; /* and options.loss is another */
        assert_int_equal(pk_train(&context, &graph, &train, &options, parts, &result), PK_ARGUMENT);
        assert_non_null(
            strstr(pk_message(&context), "loss is softmax_cross_entropy, and that of criterion is l1"));
        assert_int_equal(context.memory_used, 0);
        clear(run_path);
    }
}

#define TEST(function) cmocka_unit_test_setup(function, start_clean)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_killed_at_any_moment),
        TEST(test_killed_after_few_steps),
        TEST(test_killed_inside_a_write),
        TEST(test_by_hand),
        TEST(test_batches),
        TEST(test_training_learns),
        TEST(test_cancel_keeps_steps),
        TEST(test_same_bits),
        TEST(test_divergence),
        TEST(test_full_disk),
        TEST(test_resume_repeats_few_steps),
        TEST(test_replaced_state),
        TEST(test_resume_refuses_another_run),
        TEST(test_weighted_classes),
        TEST(test_arguments),
        TEST(test_no_memory),
    };
    return cmocka_run_group_tests(tests, prepare, finish);
}
