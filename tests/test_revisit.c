/* Runs that keep every k-th step: the steps between are repeated bit for bit, whatever the optimiser, the number
 * of threads and the interruptions; a decomposition cannot tell them from a full recording; and what cannot be
 * repeated is named. */
#include "fixture.h"
#include "wait_killed.h"
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

enum { N = 150, D = 4, H = 5, C = 3, P = D * H + H + H * C + C, STEPS = 120, PATH = 300 };

static char root[200], full_path[PATH], kept_path[PATH], whole_path[PATH];
static double inputs[N * D];
static int64_t targets[N];
static pk_dataset train;
static pk_graph graph;
static pk_real start[P];

static int prepare(void **state)
{
    (void)state;
    const char *folder = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/pathkernel-replay-XXXXXX",
             folder && strlen(folder) < 100 ? folder : "/tmp");
    if (!mkdtemp(root))
        return -1;
    snprintf(full_path, sizeof full_path, "%s/full", root);
    snprintf(kept_path, sizeof kept_path, "%s/kept", root);
    snprintf(whole_path, sizeof whole_path, "%s/whole", root);
    for (int i = 0; i < N; i++) {
        targets[i] = i % C;
        for (int d = 0; d < D; d++)
            inputs[i * D + d] = sin(0.7 * i * (d + 1)) + (double)(i % C) * (d == i % C);
    }
    const size_t inputs_shape[2] = {N, D}, targets_shape[1] = {N};
    train.inputs = pk_array_view(PK_FLOAT64, 2, inputs_shape, inputs);
    train.targets = pk_array_view(PK_INT64, 1, targets_shape, targets);
    return pk_network_parse(NULL, "input 4; dense 5; tanh; dense 3", &graph) ||
           pk_network_initialize(NULL, &graph, 7, start);
}

static int start_clean(void **state)
{
    (void)state;
    fixture_clear(full_path);
    fixture_clear(kept_path);
    fixture_clear(whole_path);
    return 0;
}

static int finish(void **state)
{
    start_clean(state);
    pk_graph_release(NULL, &graph);
    return rmdir(root);
}

/* ---- files ------------------------------------------------------------------------------------------ */

static const char *const names[] = {"run.txt",           "weights.npy",          "learning_rates.npy",
                                    "batch_offsets.npy", "batch_items.npy",      "gradient_scales.npy",
                                    "train_inputs.npy",  "train_targets.npy",    "second_moments.npy",
                                    "checksums.npy",     "optimizer_states.npy", "batch_weights.npy"};
enum { FILES = sizeof names / sizeof *names };

static size_t file_size(const char *directory, const char *name)
{
    char path[2 * PATH];
    struct stat about;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return stat(path, &about) == 0 ? (size_t)about.st_size : 0;
}

static size_t directory_size(const char *directory)
{
    size_t size = 0;
    for (int f = 0; f < FILES; f++)
        size += file_size(directory, names[f]);
    return size;
}

static FILE *file_open(const char *directory, const char *name, const char *mode)
{
    char path[2 * PATH];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return fopen(path, mode);
}

static void assert_same_run(const char *a, const char *b)
{
    for (int f = 0; f < FILES; f++) {
        if (file_size(a, names[f]) != file_size(b, names[f]))
            fail_msg("%s: %zu and %zu bytes", names[f], file_size(a, names[f]), file_size(b, names[f]));
        FILE *file_a = file_open(a, names[f], "rb"), *file_b = file_open(b, names[f], "rb");
        assert_int_equal(!file_a, !file_b);
        for (size_t i = 0; file_a && i < file_size(a, names[f]); i++)
            if (getc(file_a) != getc(file_b))
                fail_msg("%s differs at byte %zu", names[f], i);
        if (file_a)
            fclose(file_a), fclose(file_b);
    }
}

/* Adds to one byte; offsets below 0 count from the end. */
static void damage(const char *directory, const char *name, long offset, int by)
{
    FILE *file = file_open(directory, name, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, offset, offset < 0 ? SEEK_END : SEEK_SET), 0);
    int byte = getc(file);
    assert_int_equal(fseek(file, offset, offset < 0 ? SEEK_END : SEEK_SET), 0);
    putc((byte + by) & 255, file);
    fclose(file);
}

static void shorten(const char *directory, const char *name, size_t bytes)
{
    char path[2 * PATH];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    assert_int_equal(truncate(path, (off_t)(file_size(directory, name) - bytes)), 0);
}

/* ---- training --------------------------------------------------------------------------------------- */

static double decreasing(void *user, size_t step)
{
    (void)user;
    return 0.3 / (1.0 + 0.01 * (double)step);
}

typedef struct recipe {
    const char *optimizer;
    size_t batch;
    double rate, clip;
} recipe;

static const recipe recipes[] = {{"sgd", 0, 0, 0},
                                 {"sgd weight_decay=0.01", 32, 0, 0},
                                 {"sgd momentum=0.9 weight_decay=0.001", 32, 0, 0.5},
                                 {"sgd momentum=0.8 nesterov=1", 0, 0.05, 0},
                                 {"sgd momentum=0.8 dampening=0.3", 70, 0.05, 0},
                                 {"adam weight_decay=0.01", 32, 0.01, 0},
                                 {"adamw beta2=0.98", 40, 0.02, 0.3}};
enum { RECIPES = sizeof recipes / sizeof *recipes };

static pk_train_options make_options(const recipe *from, size_t steps)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    assert_int_equal(pk_optimizer_parse(NULL, from->optimizer, &options.optimizer), PK_OK);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.kind = from->rate > 0 ? PK_SCHEDULE_CONSTANT : PK_SCHEDULE_FUNCTION;
    options.schedule.rate = from->rate;
    options.schedule.function = decreasing;
    options.steps = steps;
    options.batch_size = from->batch;
    options.seed = 11;
    options.clip_norm = from->clip;
    return options;
}

static void record(pk_train_options options, const char *path, size_t keep_every, int threads)
{
    pk_context context;
    pk_real weights[P];
    memset(&context, 0, sizeof context);
    context.threads = threads;
    options.record = path;
    options.keep_every = keep_every;
    memcpy(weights, start, sizeof start);
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
    assert_int_equal(context.memory_used, 0);
}

static void assert_step(pk_context *context, pk_replay *replay, const pk_run *full, size_t step)
{
    pk_real here[P], there[P];
    assert_ok(context, pk_replay_weights(context, replay, step, here));
    assert_ok(context, pk_run_weights(context, full, step, there));
    if (memcmp(here, there, sizeof here) != 0)
        fail_msg("the replay of step %zu of %zu has other bits", step, full->steps);
}

/* ---- killed, resumed --------------------------------------------------------------------------------
 * First in the program: a process that has used OpenMP's threads must not fork and use them again. */

static int wait_for_token(void *user, size_t step, double objective, const pk_real *weights)
{
    (void)step, (void)objective, (void)weights;
    char token;
    return read(*(int *)user, &token, 1) != 1;
}

static pid_t start_child(pk_train_options options, size_t keep_every, int *tokens)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[1]);
        pk_context context;
        pk_real weights[P];
        memset(&context, 0, sizeof context);
        context.threads = 1;
        memcpy(weights, start, sizeof start);
        options.record = kept_path;
        options.keep_every = keep_every;
        options.resume = 1;
        options.on_step = wait_for_token;
        options.user = &ends[0];
        pk_status status = pk_train(&context, &graph, &train, &options, weights, NULL);
        if (status != PK_OK)
            fprintf(stderr, "%s\n", pk_message(&context));
        _exit(status == PK_OK ? 0 : 1);
    }
    close(ends[0]);
    *tokens = ends[1];
    return child;
}

static void test_killed_at_any_moment(void **state)
{
    static const size_t every[] = {2, 7, 50, 1000};
    pk_random random = {2024, 0, 0};
    for (int r = 0; r < RECIPES; r++) {
        const size_t k = every[r % 4];
        pk_train_options options = make_options(&recipes[r], STEPS);
        pk_context context;
        pk_run full;
        memset(&context, 0, sizeof context);
        context.threads = 1;
        record(options, full_path, 1, 1);
        record(options, whole_path, k, 1);
        assert_ok(&context, pk_run_open(&context, full_path, &full));
        size_t steps = 0;
        int tokens, result;
        for (int kill_number = 0; kill_number < 8; kill_number++) {
            char allowed[STEPS] = {0};
            pid_t child = start_child(options, k, &tokens);
            size_t more = pk_random_below(&random, STEPS / 8);
            assert_int_equal(write(tokens, allowed, more + 2), (ssize_t)(more + 2));
            while (more && file_size(kept_path, "learning_rates.npy") < (steps + more + 1) * 8 &&
                   waitpid(child, &result, WNOHANG) == 0)
                continue;
            for (volatile size_t i = pk_random_below(&random, 100000); i > 0; i = i - 1)
                continue;
            assert_int_equal(kill(child, SIGKILL), 0);
            assert_int_equal(wait_killed(child, &result), child);
            close(tokens);
            if (file_size(kept_path, "run.txt") == 0)
                continue; /* killed before there was a run */
            pk_run run;
            pk_replay replay;
            assert_ok(&context, pk_run_open(&context, kept_path, &run));
            assert_true(run.steps >= steps && run.steps <= STEPS);
            assert_ok(&context, pk_replay_prepare(&context, &run, 0, &replay));
            for (size_t s = 0; s <= run.steps; s++)
                assert_step(&context, &replay, &full, s);
            steps = run.steps;
            pk_replay_release(&context, &replay);
            pk_run_release(&context, &run);
        }
        char enough[STEPS] = {0};
        pid_t child = start_child(options, k, &tokens);
        assert_int_equal(write(tokens, enough, STEPS), STEPS);
        assert_int_equal(waitpid(child, &result, 0), child);
        assert_int_equal(result, 0);
        close(tokens);
        assert_same_run(whole_path, kept_path);
        pk_run_release(&context, &full);
        assert_int_equal(context.memory_used, 0);
        start_clean(state);
    }
}

/* ---- the same bits ---------------------------------------------------------------------------------- */

/* Going back window by window costs what few snapshots make of it (Griewank and Walther 2000), not the square of the steps. */
static void test_backwards(void **state)
{
    pk_context context;
    pk_run run;
    pk_real row[P];
    memset(&context, 0, sizeof context);
    const pk_train_options options = make_options(&recipes[0], STEPS);
    record(options, kept_path, 1000, 1);
    assert_ok(&context, pk_run_open(&context, kept_path, &run));
    for (size_t reach = 1; reach <= 27; reach *= 3) {
        pk_replay replay;
        const size_t windows = (STEPS + reach - 1) / reach;
        assert_ok(&context, pk_replay_prepare(&context, &run, reach, &replay));
        for (size_t w = windows; w-- > 0;)
            for (size_t s = w * reach; s <= (w + 1) * reach && s <= STEPS; s++)
                assert_ok(&context, pk_replay_weights(&context, &replay, s, row));
        /* Each window once, and what leads to its first step. */
        const double again = pk__checkpoints_again(windows, PK_REPLAY_STOPS);
        assert_true((double)replay.repeated <= STEPS + (again + 1) * (double)reach);
        pk_replay_release(&context, &replay);
    }
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    start_clean(state);
}

static void test_every_step(void **state)
{
    static const size_t every[] = {2, 7, 50, 1000};
    for (int r = 0; r < RECIPES; r++)
        for (int e = 0; e < 4; e++) {
            const pk_train_options options = make_options(&recipes[r], STEPS);
            const size_t k = every[e], stateful = pk_optimizer_state_vectors(&options.optimizer);
            pk_context context;
            pk_run full, run;
            pk_replay replay;
            pk_real row[P];
            memset(&context, 0, sizeof context);
            record(options, full_path, e ? 1 : 0, 1);
            record(options, kept_path, k, 3);
            assert_ok(&context, pk_run_open(&context, full_path, &full));
            assert_ok(&context, pk_run_open(&context, kept_path, &run));
            assert_int_equal(full.keep_every, 1);
            assert_int_equal(run.keep_every, k);
            assert_int_equal(run.steps, STEPS);
            assert_int_equal(run.cut_off, 0);
            assert_int_equal(run.weights.shape[0], STEPS / k + 1);
            assert_int_equal(run.optimizer_states.data ? run.optimizer_states.shape[1] : 0, stateful * P);
            for (size_t reach = 0; reach < 40; reach += 13) {
                context.threads = reach == 13 ? 3 : 1;
                assert_ok(&context, pk_replay_prepare(&context, &run, reach, &replay));
                for (size_t s = 0; s <= STEPS; s++)
                    assert_step(&context, &replay, &full, s);
                assert_int_equal(replay.repeated, STEPS);
                for (size_t w = STEPS / (reach + 1) + 1; w-- > 0;) /* windows, backwards */
                    for (size_t s = w * (reach + 1); s <= w * (reach + 1) + reach + 1 && s <= STEPS; s++)
                        assert_step(&context, &replay, &full, s);
                pk_random random = {k + reach, 0, 0};
                for (int i = 0; i < 30; i++)
                    assert_step(&context, &replay, &full, pk_random_below(&random, STEPS + 1));
                assert_refused(&context, PK_ARGUMENT, "the run has 120 steps",
                               pk_replay_weights(&context, &replay, STEPS + 1, row));
                pk_replay_release(&context, &replay);
            }
            /* What was kept is read without replay; the rest is refused. */
            for (size_t s = 0; s <= STEPS; s++)
                if (s % k)
                    assert_refused(&context, PK_ARGUMENT, "pk_replay_weights",
                                   pk_run_weights(&context, &run, s, row));
                else
                    assert_ok(&context, pk_run_weights(&context, &run, s, row));
            /* A full recording needs nothing. */
            assert_ok(&context, pk_replay_prepare(&context, &full, 5, &replay));
            for (size_t s = 0; s <= STEPS; s++)
                assert_step(&context, &replay, &full, s);
            assert_int_equal(replay.repeated, 0);
            pk_replay_release(&context, &replay);
            pk_run_release(&context, &run);
            pk_run_release(&context, &full);
            assert_int_equal(context.memory_used, 0);
            start_clean(state);
        }
}

/* Batches of enough work that threads are started. */
static void test_threads(void **state)
{
    (void)state;
    enum { WIDE = 60, ROWS = 400, COUNT = 12 };
    pk_graph wide;
    pk_dataset data;
    pk_context context;
    memset(&wide, 0, sizeof wide);
    memset(&context, 0, sizeof context);
    assert_ok(&context, pk_network_parse(&context, "input 8; dense 60; relu; dense 60; tanh; dense 2", &wide));
    pk_real *x = fixture_normals(3, ROWS * 8, 1), *y = fixture_normals(4, ROWS * 2, 1);
    const size_t x_shape[2] = {ROWS, 8}, y_shape[2] = {ROWS, 2};
    data.inputs = pk_array_view(REAL_TYPE, 2, x_shape, x);
    data.targets = pk_array_view(REAL_TYPE, 2, y_shape, y);
    pk_real *weights = FIXTURE_NEW(pk_real, wide.parameters), *row = FIXTURE_NEW(pk_real, wide.parameters);
    pk_train_options options = make_options(&recipes[6], COUNT);
    options.loss = PK_SQUARED;
    options.batch_size = 390;
    options.record = kept_path;
    options.keep_every = 5;
    uint64_t first = 0;
    for (int recorder = 1; recorder <= 4; recorder++) {
        context.threads = recorder;
        assert_ok(&context, pk_network_initialize(&context, &wide, 1, weights));
        assert_ok(&context, pk_train(&context, &wide, &data, &options, weights, NULL));
        for (int reader = 1; reader <= 5; reader += 2) {
            pk_run run;
            pk_replay replay;
            uint64_t hash = 1;
            context.threads = reader;
            assert_ok(&context, pk_run_open(&context, kept_path, &run));
            assert_ok(&context, pk_replay_prepare(&context, &run, 3, &replay));
            for (size_t s = COUNT + 1; s-- > 0;) {
                assert_ok(&context, pk_replay_weights(&context, &replay, s, row));
                for (size_t p = 0; p < wide.parameters; p++) {
                    const double number = row[p];
                    hash = fixture_hash(hash, 1, &number);
                }
                if (s == COUNT)
                    assert_memory_equal(row, weights, wide.parameters * sizeof *row);
            }
            pk_replay_release(&context, &replay);
            pk_run_release(&context, &run);
            first = first ? first : hash;
            assert_true(hash == first);
        }
        fixture_clear(kept_path);
    }
    pk_graph_release(&context, &wide);
    assert_int_equal(context.memory_used, 0);
    free(x), free(y), free(weights), free(row);
}

/* ---- decomposed ------------------------------------------------------------------------------------- */

enum { TEST_ROWS = 20 };

/* The hash of everything that pk_decompose gives, by row; 0 and the least that would do if the memory is short. */
static size_t decompose(const char *path, const pk_real *tests, int threads, size_t limit, size_t rows_at_once,
                        int bounds, uint64_t *hash)
{
    pk_context context;
    pk_decompose_options options;
    pk_decomposition out;
    pk_run run;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    context.threads = threads;
    assert_ok(&context, pk_run_open(&context, path, &run));
    context.memory_limit = limit;
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    options.step_closure = 1;
    options.bounds = bounds;
    options.rows_at_once = rows_at_once;
    size_t least = 0;
    pk_status status = pk_decompose(
        &context, &run, pk_matrix_view((pk_real *)tests, TEST_ROWS, run.graph.input_width), &options, &out);
    if (status == PK_MEMORY_LIMIT) {
        const char *words = "the least that would do is ", *at = strstr(pk_message(&context), words);
        assert_true(at && sscanf(at + strlen(words), "%zu", &least) == 1);
    } else {
        assert_ok(&context, status);
        assert_true(!limit || context.memory_peak <= limit);
        fixture_hash_rows(&out, hash);
        pk_decomposition_release(&context, &out);
    }
    context.memory_limit = 0;
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    return least;
}

static void test_decomposed(void **state)
{
    static const size_t every[] = {7, 50, 1000};
    pk_real *tests = fixture_normals(9, TEST_ROWS * D, 1);
    for (int r = 0; r < RECIPES; r++) {
        uint64_t full[TEST_ROWS], kept[TEST_ROWS];
        const pk_train_options options = make_options(&recipes[r], STEPS);
        const int bounds = r == 2 || r == 6;
        record(options, full_path, 1, 1);
        assert_int_equal(decompose(full_path, tests, 2, 0, 0, bounds, full), 0);
        for (int e = 0; e < 3; e++) {
            record(options, kept_path, every[e], 1);
            assert_int_equal(decompose(kept_path, tests, 2, 0, 0, bounds, kept), 0);
            assert_memory_equal(full, kept, sizeof full);
            assert_int_equal(decompose(kept_path, tests, 3, 0, 7, bounds, kept), 0);
            assert_memory_equal(full, kept, sizeof full);
            size_t least = 1024;
            for (int tries = 0; tries < 3; tries++) {
                size_t wanted = decompose(kept_path, tests, 1, least, 0, bounds, kept);
                if (!wanted)
                    break;
                assert_true(wanted > least && tries < 2);
                least = wanted;
            }
            assert_memory_equal(full, kept, sizeof full);
            fixture_clear(kept_path);
        }
        start_clean(state);
    }
    free(tests);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A long run of a small network. PATHKERNEL_LONG_STEPS=20000 makes it longer, and times it. */
static void test_long(void **state)
{
    const char *asked = getenv("PATHKERNEL_LONG_STEPS");
    const size_t steps = asked ? (size_t)atol(asked) : 2000;
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9", "adamw"};
    enum { LONG_N = 256, LONG_D = 8 };
    pk_real *x = fixture_normals(1, LONG_N * LONG_D, 1), *tests = fixture_normals(2, TEST_ROWS * LONG_D, 1);
    int64_t labels[LONG_N];
    for (int i = 0; i < LONG_N; i++)
        labels[i] = x[i * LONG_D] > 0.4 ? 2 : x[i * LONG_D + 1] > 0;
    const size_t x_shape[2] = {LONG_N, LONG_D}, labels_shape[1] = {LONG_N};
    pk_dataset data;
    data.inputs = pk_array_view(REAL_TYPE, 2, x_shape, x);
    data.targets = pk_array_view(PK_INT64, 1, labels_shape, labels);
    pk_graph small;
    memset(&small, 0, sizeof small);
    assert_int_equal(pk_network_parse(NULL, "input 8; dense 6; tanh; dense 3", &small), PK_OK);
    for (int o = 0; o < 3; o++) {
        pk_real weights[2][75];
        assert_int_equal(small.parameters, 75);
        double trained[3], decomposed[2];
        uint64_t hash[2][TEST_ROWS];
        const char *paths[2] = {full_path, kept_path};
        pk_train_options options;
        pk_context context;
        memset(&options, 0, sizeof options);
        memset(&context, 0, sizeof context);
        assert_ok(&context, pk_optimizer_parse(&context, optimizers[o], &options.optimizer));
        options.loss = PK_SOFTMAX_CROSS_ENTROPY;
        options.schedule.rate = o == 2 ? 0.003 : 0.02;
        options.steps = steps;
        options.batch_size = 16;
        for (int kept = 0; kept < 3; kept++) { /* 2: not recorded */
            double begin = seconds();
            options.record = kept < 2 ? paths[kept] : NULL;
            options.keep_every = kept == 1 ? 50 : 0;
            assert_ok(&context, pk_network_initialize(&context, &small, 5, weights[kept % 2]));
            assert_ok(&context, pk_train(&context, &small, &data, &options, weights[kept % 2], NULL));
            trained[kept] = seconds() - begin;
        }
        assert_memory_equal(weights[0], weights[1], sizeof weights[0]);
        for (int kept = 0; kept < 2; kept++) {
            double begin = seconds();
            assert_int_equal(decompose(paths[kept], tests, 1, 0, 0, 0, hash[kept]), 0);
            decomposed[kept] = seconds() - begin;
        }
        assert_memory_equal(hash[0], hash[1], sizeof hash[0]);
        assert_true(file_size(kept_path, "weights.npy") < file_size(full_path, "weights.npy") / 49 + 4096);
        if (asked)
            print_message(
                "%s, %zu steps: %zu bytes, %zu with k = 50 (weights and states %zu, %zu); trained in %.3f s "
                "(full) %.3f s (k = 50) %.3f s (not recorded), decomposed in %.2f s and %.2f s\n",
                optimizers[o], steps, directory_size(full_path), directory_size(kept_path),
                file_size(full_path, "weights.npy"),
                file_size(kept_path, "weights.npy") + file_size(kept_path, "optimizer_states.npy"), trained[0],
                trained[1], trained[2], decomposed[0], decomposed[1]);
        start_clean(state);
    }
    pk_graph_release(NULL, &small);
    free(x), free(tests);
}

/* ---- own loops -------------------------------------------------------------------------------------- */

/* A loop of one's own with the library's step writes what pk_train writes; with steps of its own it is refused. */
static void test_own_loop(void **state)
{
    for (int r = 0; r < RECIPES; r++)
        for (size_t every = 1; every < 20; every += 6) {
            const pk_train_options options = make_options(&recipes[r], 40);
            pk_context context;
            pk_run whole;
            pk_recorder recorder;
            pk_recorder_options recording;
            pk_trainer trainer;
            pk_real weights[2][P];
            memset(&context, 0, sizeof context);
            memset(&recording, 0, sizeof recording);
            record(options, whole_path, every, 1);
            assert_ok(&context, pk_run_open(&context, whole_path, &whole));
            recording.network = graph.text;
            recording.loss = "softmax_cross_entropy";
            recording.optimizer = recipes[r].optimizer;
            recording.gradient_scales = options.clip_norm > 0;
            recording.keep_every = every;
            memcpy(weights[0], start, sizeof start);
            assert_ok(&context, pk_recorder_open(&context, kept_path, &recording, &train, start, &recorder));
            assert_ok(&context, pk_trainer_prepare(&context, &graph, &train, options.loss, &options.optimizer,
                                                   N, &trainer));
            for (size_t s = 0; s < 40; s++) {
                double scale;
                pk_batch batch;
                pk_run_batch(&whole, s, &batch);
                pk_real *from = weights[s % 2], *to = weights[1 - s % 2];
                assert_ok(&context, pk_training_step(&context, &trainer, s, whole.learning_rates[s],
                                                     options.clip_norm, &batch, from, to, &scale, NULL));
                if (every > 1) {
                    assert_refused(&context, PK_ARGUMENT, "pk_recorder_training_step",
                                   pk_recorder_step(&context, &recorder, whole.learning_rates[s], &batch, scale,
                                                    NULL, to));
                    if (trainer.state_numbers)
                        assert_refused(&context, PK_ARGUMENT, "state is missing",
                                       pk_recorder_training_step(&context, &recorder, whole.learning_rates[s],
                                                                 &batch, scale, NULL, to));
                }
                assert_ok(&context, pk_recorder_training_step(&context, &recorder, whole.learning_rates[s],
                                                              &batch, scale, trainer.state, to));
            }
            pk_batch none = {0, NULL, NULL};
            assert_refused(&context, PK_ARGUMENT, "learning rate of step 40",
                           pk_training_step(&context, &trainer, 40, (double)NAN, 0, &none, weights[0],
                                            weights[1], NULL, NULL));
            assert_refused(
                &context, PK_ARGUMENT, "clip_norm of step 40",
                pk_training_step(&context, &trainer, 40, 0.1, -1, &none, weights[0], weights[1], NULL, NULL));
            pk_trainer_release(&context, &trainer);
            assert_ok(&context, pk_recorder_close(&context, &recorder));
            pk_run_release(&context, &whole);
            assert_int_equal(context.memory_used, 0);
            assert_same_run(whole_path, kept_path);
            start_clean(state);
        }
}

/* ---- what is wrong ---------------------------------------------------------------------------------- */

/* Replays all steps of kept_path. */
static pk_status replay_all(pk_context *context)
{
    pk_run run;
    pk_replay replay;
    pk_real row[P];
    pk_status status = pk_run_open(context, kept_path, &run);
    if (status)
        return status;
    memset(&replay, 0, sizeof replay);
    status = pk_replay_prepare(context, &run, 0, &replay);
    for (size_t s = 0; !status && s <= run.steps; s++)
        status = pk_replay_weights(context, &replay, s, row);
    pk_replay_release(context, &replay);
    pk_run_release(context, &run);
    assert_int_equal(context->memory_used, 0);
    return status;
}

static void test_damaged(void **state)
{
    pk_context context;
    pk_train_options options = make_options(&recipes[6], 100);
    memset(&context, 0, sizeof context);
    record(options, kept_path, 20, 1);
    assert_ok(&context, replay_all(&context));
    const long row = P * 8;
    /* The lowest bit of a number of a kept row: seen by who starts there. */
    pk_run run;
    pk_replay replay;
    pk_real weights[P];
    static const struct {
        const char *file;
        long offset;
        size_t step;
    } rows[] = {{"weights.npy", -2 * P * 8 + 16, 80},
                {"optimizer_states.npy", -3 * 2 * P * 8 + 8 * P, 60},
                {"weights.npy", -6 * P * 8, 0}};
    const long byte = EITHER(0, 4); /* of a float64: what float rounds away it cannot see, nor need it */
    for (int k = 0; k < 3; k++) {
        char words[80];
        damage(kept_path, rows[k].file, rows[k].offset + byte, 1);
        assert_ok(&context, pk_run_open(&context, kept_path, &run));
        assert_ok(&context, pk_replay_prepare(&context, &run, 0, &replay));
        snprintf(words, sizeof words, "the rows of step %zu are damaged", rows[k].step);
        assert_refused(&context, PK_FORMAT, words,
                       pk_replay_weights(&context, &replay, rows[k].step + 5, weights));
        assert_ok(&context, pk_replay_weights(&context, &replay, (rows[k].step + 40) % 120, weights));
        pk_replay_release(&context, &replay);
        pk_run_release(&context, &run);
        damage(kept_path, rows[k].file, rows[k].offset + byte, -1);
    }
    assert_ok(&context, replay_all(&context));
    /* The small rows: the step that no longer gives what was recorded. The sixth byte: one unit in the last place of a
     * rate may change no bit of a weight. */
    damage(kept_path, "learning_rates.npy", -100 * 8 + 37 * 8 + 5, 1);
    assert_refused(&context, PK_NOT_REPRODUCED, "recorded at step 38", replay_all(&context));
    damage(kept_path, "learning_rates.npy", -100 * 8 + 37 * 8 + 5, -1);
    damage(kept_path, "gradient_scales.npy", -8 + 5, 1);
    assert_refused(&context, PK_NOT_REPRODUCED, "recorded at step 100", replay_all(&context));
    damage(kept_path, "gradient_scales.npy", -8 + 5, -1);
    damage(kept_path, "checksums.npy", -100 * 8 + 54 * 8, 1);
    assert_refused(&context, PK_NOT_REPRODUCED, "recorded at step 55", replay_all(&context));
    options.record = kept_path;
    options.resume = 1;
    options.keep_every = 20;
    options.steps = 103;
    memcpy(weights, start, sizeof start);
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL)); /* starts at step 80 */
    damage(kept_path, "checksums.npy", -8, 1);
    memcpy(weights, start, sizeof start);
    assert_refused(&context, PK_ARGUMENT, "step 102 was made by other options",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    assert_memory_equal(weights, start, sizeof start);
    damage(kept_path, "checksums.npy", -8, -1);
    damage(kept_path, "weights.npy", -row + byte, 1);
    assert_refused(&context, PK_FORMAT, "the rows of step 100",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    damage(kept_path, "weights.npy", -row + byte, -1);
    options.clip_norm = 0.001;
    assert_refused(&context, PK_ARGUMENT, "by other options",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    assert_int_equal(context.memory_used, 0);
    start_clean(state);
}

static void expect_steps(size_t steps, int cut_off)
{
    pk_context context;
    pk_run run;
    memset(&context, 0, sizeof context);
    assert_ok(&context, pk_run_open(&context, kept_path, &run));
    assert_int_equal(run.steps, steps);
    assert_int_equal(run.cut_off, cut_off);
    pk_run_release(&context, &run);
    assert_ok(&context, replay_all(&context));
}

/* Where the files end decides which steps there are. */
static void test_cut_off(void **state)
{
    pk_train_options options = make_options(&recipes[6], 50);
    record(options, kept_path, 10, 1);
    expect_steps(50, 0);
    /* Killed while it wrote step 50, which keeps its weights: ever earlier in the order of writing. */
    pk_real weights[P];
    pk_context context;
    pk_run run;
    memset(&context, 0, sizeof context);
    record(options, whole_path, 10, 1);
    static const struct {
        const char *file;
        long bytes;
    } kills[] = {{"weights.npy", 1},          {"weights.npy", P * 8 - 1},
                 {"optimizer_states.npy", 9}, {"optimizer_states.npy", 2 * P * 8 - 9},
                 {"checksums.npy", 3},        {"checksums.npy", 5},
                 {"gradient_scales.npy", 8}};
    for (size_t k = 0; k < sizeof kills / sizeof *kills; k++) {
        for (size_t before = 0; before <= k; before++)
            shorten(kept_path, kills[before].file, kills[before].bytes);
        expect_steps(49, 1);
        memcpy(weights, start, sizeof start);
        options.resume = 1;
        options.record = kept_path;
        options.keep_every = 10;
        assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
        assert_same_run(whole_path, kept_path);
    }
    /* Between two kept steps checksums.npy is the last. */
    options.steps = 53;
    memcpy(weights, start, sizeof start);
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
    shorten(kept_path, "checksums.npy", 7);
    expect_steps(52, 1);
    shorten(kept_path, "checksums.npy", 1);
    expect_steps(52, 1);
    /* What no kill leaves. */
    static const struct {
        const char *file;
        long bytes;
        size_t steps;
        const char *words;
    } mistakes[] = {
        {"checksums.npy", 8, 51, "checksums.npy holds 52 rows, learning_rates.npy holds 53 rows"},
        {"optimizer_states.npy", 2 * P * 8, 49, "optimizer_states.npy holds 5 rows, "},
        {"weights.npy", 2 * P * 8, 39, "weights.npy holds 4 rows, "},
        {"learning_rates.npy", 40 * 8, 13, "learning_rates.npy holds 13 rows, weights.npy holds 4 rows"}};
    for (size_t k = 0; k < sizeof mistakes / sizeof *mistakes; k++) {
        shorten(kept_path, mistakes[k].file, mistakes[k].bytes);
        assert_refused(&context, PK_SHAPE, mistakes[k].words, pk_run_open(&context, kept_path, &run));
        memcpy(weights, start, sizeof start);
        assert_refused(&context, PK_SHAPE, mistakes[k].words,
                       pk_train(&context, &graph, &train, &options, weights, NULL));
        assert_ok(&context, pk_run_recover(&context, kept_path, &run));
        assert_int_equal(run.steps, mistakes[k].steps);
        assert_int_equal(run.cut_off, 1);
        pk_run_release(&context, &run);
    }
    assert_int_equal(context.memory_used, 0);
    start_clean(state);
}

static void write_manifest(const char *line)
{
    FILE *file = file_open(kept_path, "run.txt", "w");
    assert_non_null(file);
    fprintf(file,
            "pathkernel-run 1\n%s\nnetwork input 4; dense 5; tanh; dense 3\nloss softmax_cross_entropy\n"
            "optimizer adamw beta2=0.98\n",
            line);
    fclose(file);
}

static void test_refused(void **state)
{
    pk_context context;
    pk_run run;
    pk_real weights[P];
    pk_train_options options = make_options(&recipes[6], 30);
    memset(&context, 0, sizeof context);
    memcpy(weights, start, sizeof start);
    options.keep_every = 10;
    assert_refused(&context, PK_ARGUMENT, "without a directory",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    options.record = kept_path;
    options.record_second_moments = 1;
    assert_refused(&context, PK_ARGUMENT, "second moments",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    options.record_second_moments = 0;
    options.record_float32 = 1;
    if (sizeof(pk_real) > sizeof(float)) /* float is whole in float32 */
        assert_refused(&context, PK_ARGUMENT, "float32",
                       pk_train(&context, &graph, &train, &options, weights, NULL));
    options.record_float32 = 0;
    options.keep_every = (size_t)PK_KEEP_EVERY_MOST + 1;
    assert_refused(&context, PK_ARGUMENT, "keep_every 1000000001",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    options.keep_every = 10;
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
    options.resume = 1;
    options.keep_every = 11;
    assert_refused(&context, PK_ARGUMENT, "keeps every 10th step, not every 11th",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    options.keep_every = 0;
    assert_refused(&context, PK_ARGUMENT, "keeps every 10th step, not every 1",
                   pk_train(&context, &graph, &train, &options, weights, NULL));
    static const char *const lines[] = {"keep_every 0",
                                        "keep_every -5",
                                        "keep_every 10x",
                                        "keep_every 1000000001",
                                        "keep_every 1e2",
                                        "keep_every 0x10",
                                        "keep_every 99999999999999999999999"};
    for (size_t k = 0; k < sizeof lines / sizeof *lines; k++) {
        write_manifest(lines[k]);
        assert_refused(&context, PK_FORMAT, "is not a whole number from 1 to",
                       pk_run_open(&context, kept_path, &run));
    }
    write_manifest("keep_every");
    assert_refused(&context, PK_FORMAT, "'keep_every' has no value", pk_run_open(&context, kept_path, &run));
    write_manifest("keep_every 10\nkeep_every 10");
    assert_refused(&context, PK_FORMAT, "run.txt line 3: 'keep_every' again",
                   pk_run_open(&context, kept_path, &run));
    write_manifest("keep_every 1"); /* as if every step were there: the rows say how many */
    assert_refused(&context, PK_SHAPE, "weights.npy holds 4 rows, learning_rates.npy holds 30 rows",
                   pk_run_open(&context, kept_path, &run));
    assert_ok(&context, pk_run_recover(&context, kept_path, &run));
    assert_int_equal(run.steps, 3);
    pk_run_release(&context, &run);
    write_manifest("keep_every 10");
    assert_ok(&context, replay_all(&context));
    write_manifest("keep_every 9"); /* rows of other steps */
    damage(kept_path, "checksums.npy", -31 * 8, 1);
    assert_refused(&context, PK_FORMAT, "the rows of step 0 are damaged", replay_all(&context));
    damage(kept_path, "checksums.npy", -31 * 8, -1);
    assert_refused(&context, PK_NOT_REPRODUCED, "recorded at step 9", replay_all(&context));
    write_manifest("keep_every 10");
    char path[2 * PATH], other[2 * PATH];
    static const char *const needed[] = {"checksums.npy", "optimizer_states.npy", "weights.npy"};
    for (int k = 0; k < 3; k++) {
        snprintf(path, sizeof path, "%s/%s", kept_path, needed[k]);
        snprintf(other, sizeof other, "%s/away", kept_path);
        assert_int_equal(rename(path, other), 0);
        assert_refused(&context, PK_IO, needed[k], pk_run_open(&context, kept_path, &run));
        assert_int_equal(rename(other, path), 0);
    }
    snprintf(path, sizeof path, "%s/second_moments.npy", kept_path);
    const size_t shape[2] = {30, P};
    double *moments = FIXTURE_NEW(double, 30 * P);
    assert_ok(&context, pk_array_write(&context, path, PK_FLOAT64, 2, shape, moments));
    assert_refused(&context, PK_FORMAT, "optimizer_states.npy in its place",
                   pk_run_open(&context, kept_path, &run));
    snprintf(path, sizeof path, "%s/optimizer_states.npy", kept_path);
    assert_ok(&context, pk_array_write(&context, path, PK_FLOAT64, 2, shape, moments));
    assert_int_equal(remove((snprintf(path, sizeof path, "%s/second_moments.npy", kept_path), path)), 0);
    assert_refused(&context, PK_SHAPE, "rows of 43 numbers", pk_run_open(&context, kept_path, &run));
    free(moments);
    assert_int_equal(context.memory_used, 0);
    start_clean(state);
}

/* Every allocation refused once: a clean error, and what was recorded before is there. */
static void test_no_memory(void **state)
{
    pk_train_options options = make_options(&recipes[6], 20);
    options.record = kept_path;
    options.keep_every = 6;
    options.resume = 1;
    for (size_t at = 1, done = 0; !done; at++) {
        fixture_memory memory;
        pk_context context;
        pk_real weights[P];
        memset(&context, 0, sizeof context);
        fixture_use(&context, &memory);
        memory.fail_at = at;
        memcpy(weights, start, sizeof start);
        if (at % 2)
            options.steps = 20 + at; /* now and then there is something to resume */
        pk_status status = pk_train(&context, &graph, &train, &options, weights, NULL);
        if (!status)
            status = replay_all(&context);
        assert_true(status == PK_OK || status == PK_MEMORY);
        done = status == PK_OK && memory.allocations < at;
        assert_int_equal(memory.held, 0);
        assert_true(at < 500);
    }
    start_clean(state);
}

static void test_choose(void **state)
{
    (void)state;
    for (size_t steps = 1; steps < 200; steps += 33)
        for (size_t vectors = 0; vectors < 3; vectors++)
            for (uint64_t bytes = 0; bytes < 70000; bytes += 331) {
                size_t k = pk_recorder_choose_keep_every(43, steps, vectors, bytes), least = 0;
                for (size_t every = 1; every <= steps + 1 && !least; every++) {
                    size_t rows = steps / every + 1;
                    size_t needed =
                        every == 1 ? rows * 43 * 8 : rows * 43 * 8 * (1 + vectors) + 8 * (steps + 1);
                    if (needed <= bytes)
                        least = every;
                }
                if (k != least)
                    fail_msg("%zu steps, %zu vectors, %zu bytes: %zu, not %zu", steps, vectors, (size_t)bytes,
                             k, least);
            }
    assert_int_equal(pk_recorder_choose_keep_every(101770, 100000, 2, (uint64_t)1 << 62), 1);
    assert_int_equal(pk_recorder_choose_keep_every(0, 100, 0, 0), 1);
}

#define TEST(function) cmocka_unit_test_setup(function, start_clean)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_killed_at_any_moment),
        TEST(test_backwards),
        TEST(test_every_step),
        TEST(test_threads),
        TEST(test_decomposed),
        TEST(test_long),
        TEST(test_own_loop),
        TEST(test_damaged),
        TEST(test_cut_off),
        TEST(test_refused),
        TEST(test_no_memory),
        TEST(test_choose),
    };
    return cmocka_run_group_tests(tests, prepare, finish);
}
