/* The run directory: what is written is read back bit for bit, at whatever byte it is cut off; everything
 * malformed is refused with a sentence that names the file. */
#define _DEFAULT_SOURCE /* mkdtemp, setrlimit, seteuid */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
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

/* ---- files ------------------------------------------------------------------------------------------ */

enum { PATH = 300 };
static char root[200]; /* a fresh directory of this test program */

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

static char *slurp(const char *directory, const char *name, size_t *size)
{
    char path[PATH];
    FILE *file = fopen(in(directory, name, path), "rb");
    if (!file)
        return NULL;
    char *bytes = (char *)malloc(1 << 20);
    assert_non_null(bytes);
    *size = fread(bytes, 1, 1 << 20, file);
    assert_int_equal(fclose(file), 0);
    return bytes;
}

static void spew(const char *directory, const char *name, const void *bytes, size_t size)
{
    char path[PATH];
    (void)remove(in(directory, name, path)); /* truncating a file instead makes ext4 wait for the disk */
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static const char *const run_files[] = {
    "run.txt",           "weights.npy",      "learning_rates.npy", "batch_items.npy",     "batch_offsets.npy",
    "batch_weights.npy", "train_inputs.npy", "train_targets.npy",  "gradient_scales.npy", "second_moments.npy"};
enum { RUN_FILES = 10 };

static void copy_run(const char *from, const char *to)
{
    clear(to);
    assert_int_equal(mkdir(to, 0777), 0);
    for (int f = 0; f < RUN_FILES; f++) {
        size_t size = 0;
        char *bytes = slurp(from, run_files[f], &size);
        if (bytes)
            spew(to, run_files[f], bytes, size);
        free(bytes);
    }
}

static void assert_same_run(const char *a, const char *b)
{
    for (int f = 0; f < RUN_FILES; f++) {
        size_t size_a = 0, size_b = 0;
        char *bytes_a = slurp(a, run_files[f], &size_a), *bytes_b = slurp(b, run_files[f], &size_b);
        assert_int_equal(!bytes_a, !bytes_b);
        assert_int_equal(size_a, size_b);
        if (bytes_a)
            assert_memory_equal(bytes_a, bytes_b, size_a);
        free(bytes_a);
        free(bytes_b);
    }
}

/* A .npy file with any header text and data. */
static void npy(const char *directory, const char *name, const char *header, const void *data, size_t size)
{
    char *bytes = (char *)calloc(1, 128 + size);
    assert_non_null(bytes);
    memcpy(bytes, "\x93NUMPY\x01\x00\x76\x00", 10);
    memset(bytes + 10, ' ', 117);
    memcpy(bytes + 10, header, strlen(header));
    bytes[127] = '\n';
    if (size)
        memcpy(bytes + 128, data, size);
    spew(directory, name, bytes, 128 + size);
    free(bytes);
}

/* ---- a small run ------------------------------------------------------------------------------------ */

enum { N = 5, D = 3, C = 2, P = C * D + C, S = 6 };
static const char network[] = "input 3; dense 2";

typedef struct run_data {
    double inputs[N * D];
    int64_t targets[N];
    pk_real weights[(S + 1) * P], moments[S * P];
    double rates[S], scales[S], batch_weights[S * N];
    int64_t items[S * N];
    pk_batch batches[S];
    pk_dataset train;
} run_data;

static void make_data(run_data *data)
{
    size_t inputs[2] = {N, D}, targets[1] = {N};
    for (int i = 0; i < N * D; i++)
        data->inputs[i] = sin(1.0 + i);
    for (int i = 0; i < N; i++)
        data->targets[i] = i % C;
    for (int i = 0; i < (S + 1) * P; i++)
        data->weights[i] = (pk_real)cos(i * 1.7);
    for (int i = 0; i < S * P; i++)
        data->moments[i] = (pk_real)(1 + sin(i * 0.3));
    for (int s = 0, at = 0; s < S; s++) {
        data->rates[s] = 0.5 / (s + 1);
        data->scales[s] = 1.0 / (s + 3);
        data->batches[s].count = (size_t)(s % N + 1);
        data->batches[s].items = data->items + at;
        data->batches[s].weights = data->batch_weights + at;
        for (int b = 0; b <= s % N; b++, at++) {
            data->items[at] = (b * 2 + s) % N / 2; /* rows repeat */
            data->batch_weights[at] = 0.1 * (at + 1);
        }
    }
    data->train.inputs = pk_array_view(PK_FLOAT64, 2, inputs, data->inputs);
    data->train.targets = pk_array_view(PK_INT64, 1, targets, data->targets);
}

static pk_recorder_options plain_options(void)
{
    pk_recorder_options options;
    memset(&options, 0, sizeof options);
    options.network = network;
    options.loss = "softmax_cross_entropy";
    return options;
}

static pk_recorder_options full_options(void)
{
    pk_recorder_options options = plain_options();
    options.optimizer = "adam beta1=0.8";
    options.batch_weights = options.gradient_scales = options.second_moments = 1;
    return options;
}

static pk_status record_step(pk_context *context, pk_recorder *recorder, const pk_recorder_options *options,
                             const run_data *data, int s)
{
    pk_batch batch = data->batches[s];
    if (!options->batch_weights)
        batch.weights = NULL;
    return pk_recorder_step(
        context, recorder, data->rates[s], &batch, options->gradient_scales ? data->scales[s] : 1,
        options->second_moments ? data->moments + s * P : NULL, data->weights + (s + 1) * P);
}

static void record(const char *directory, const pk_recorder_options *options, const run_data *data)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_recorder recorder;
    memset(&recorder, 0, sizeof recorder);
    pk_status status = pk_recorder_open(&context, directory, options, &data->train, data->weights, &recorder);
    if (status != PK_OK)
        fail_msg("%s", pk_message(&context));
    for (int s = (int)recorder.steps; s < S; s++)
        assert_int_equal(record_step(&context, &recorder, options, data, s), PK_OK);
    assert_int_equal(recorder.steps, S);
    assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
    assert_int_equal(context.memory_used, 0);
}

/* What a run of `steps` steps must hold. */
/* The arrays one by one: what the run's fields point to, by the names of their files. */
static void check_arrays(const pk_run *run)
{
    const char *name, *seen[20];
    const pk_array *array;
    size_t count = 0;
    for (; (array = pk_run_array(run, count, &name)) != NULL; count++) {
        for (size_t i = 0; i < count; i++)
            assert_string_not_equal(name, seen[i]);
        assert_true(count < sizeof seen / sizeof *seen);
        seen[count] = name;
        if (strcmp(name, "weights.npy") == 0)
            assert_ptr_equal(array, &run->weights);
        if (strcmp(name, "train_targets.npy") == 0)
            assert_ptr_equal(array, &run->train.targets);
        if (strcmp(name, "learning_rates.npy") == 0)
            assert_ptr_equal(array->data, run->learning_rates);
        if (strcmp(name, "batch_weights.npy") == 0)
            assert_ptr_equal(array->data, run->batch_weights);
    }
    assert_int_equal(count, 15);
}

static void check_run(pk_context *context, const pk_run *run, const pk_recorder_options *options,
                      const run_data *data, size_t steps)
{
    pk_real row[P];
    check_arrays(run);
    assert_int_equal(run->steps, steps);
    assert_int_equal(run->parameters, P);
    assert_int_equal(run->examples, N);
    assert_int_equal(run->outputs, C);
    for (size_t s = 0; s <= steps; s++) {
        assert_int_equal(pk_run_weights(context, run, s, row), PK_OK);
        for (int p = 0; p < P; p++) {
            pk_real w = data->weights[s * P + p];
            assert_true(row[p] == (options->float32 ? (pk_real)(float)w : w));
        }
        if (s == steps)
            break;
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        assert_int_equal(batch.count, data->batches[s].count);
        assert_memory_equal(batch.items, data->batches[s].items, batch.count * sizeof *batch.items);
        assert_true(run->learning_rates[s] == data->rates[s]);
        assert_int_equal(batch.weights != NULL, options->batch_weights);
        if (batch.weights)
            assert_memory_equal(batch.weights, data->batches[s].weights, batch.count * sizeof *batch.weights);
        assert_true(pk_run_gradient_scale(run, s) == (options->gradient_scales ? data->scales[s] : 1));
        if (options->second_moments) {
            assert_int_equal(pk_run_second_moments(context, run, s, row), PK_OK);
            for (int p = 0; p < P; p++) {
                pk_real v = data->moments[s * P + p];
                assert_true(row[p] == (options->float32 ? (pk_real)(float)v : v));
            }
        } else {
            assert_int_equal(pk_run_second_moments(context, run, s, row), PK_ARGUMENT);
        }
    }
    assert_int_equal(pk_run_weights(context, run, steps + 1, row), PK_ARGUMENT);
    assert_int_equal(pk_dataset_examples(&run->train), N);
    assert_memory_equal(run->train.inputs.data, data->inputs, sizeof data->inputs);
    assert_memory_equal(run->train.targets.data, data->targets, sizeof data->targets);
}

static int lowest_free_descriptor(void)
{
    int file = dup(0);
    close(file);
    return file;
}

/* ---- tests ------------------------------------------------------------------------------------------ */

static void test_written_is_read(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    pk_context context;
    memset(&context, 0, sizeof context);
    int descriptor = lowest_free_descriptor();
    for (int kind = 0; kind < 16; kind++) {
        pk_recorder_options options = plain_options();
        options.float32 = kind & 1;
        options.batch_weights = kind >> 1 & 1;
        options.gradient_scales = kind >> 2 & 1;
        options.second_moments = kind >> 3 & 1;
        clear(in(root, "run", directory));
        record(directory, &options, &data);
        pk_run run;
        assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
        assert_int_equal(run.cut_off, 0);
        assert_int_equal(run.loss, PK_SOFTMAX_CROSS_ENTROPY);
        assert_string_equal(run.graph.text, network);
        check_run(&context, &run, &options, &data, S);
        pk_run_release(&context, &run);
        pk_run_release(&context, &run); /* zeroed: allowed */
        assert_int_equal(context.memory_used, 0);
    }
    assert_int_equal(lowest_free_descriptor(), descriptor);
    clear(directory);
}

/* Batches without weights are recorded as 1/count where weights are recorded. */
/* An edge from node 0 to itself, of a weight that tells the names apart. */
static pk_status load_named(void *user, pk_context *context, const char *name, pk_array *array)
{
    static const double edges[2][3] = {{0, 0, 0.5}, {0, 0, 0.25}};
    static const size_t shape[2] = {1, 3};
    (void)user, (void)context;
    *array = pk_array_view(PK_FLOAT64, 2, shape, edges[name[strlen(name) - 1] == 'b']);
    return PK_OK;
}

/* Constants whose names have all the characters that a name can have, and differ in the last. */
static void test_long_names(void **state)
{
    (void)state;
    static const char named[] = "input 1x3; propagate abcdefghijklmnopqrstuvwxyz_123a; "
                                "propagate abcdefghijklmnopqrstuvwxyz_123b; flatten; dense 2";
    const pk_constants constants = {load_named, NULL};
    char directory[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    const size_t shape[3] = {N, 1, D};
    data.train.inputs = pk_array_view(PK_FLOAT64, 3, shape, data.inputs);
    options.network = named;
    options.constants = &constants;
    record(in(root, "run", directory), &options, &data);
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_run run;
    if (pk_run_open(&context, directory, &run))
        fail_msg("%s", pk_message(&context));
    pk_array found;
    const pk_node *node = pk_graph_named(&run.graph, NULL, &found);
    assert_non_null(node);
    assert_string_equal(node->constant_name, "abcdefghijklmnopqrstuvwxyz_123a");
    assert_true(((const pk_real *)found.data)[2] == 0.5);
    node = pk_graph_named(&run.graph, node, &found);
    assert_non_null(node);
    assert_string_equal(node->constant_name, "abcdefghijklmnopqrstuvwxyz_123b");
    assert_true(((const pk_real *)found.data)[2] == 0.25);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
}

static void test_uniform_weights(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    for (int s = 0; s < S; s++)
        data.batches[s].weights = NULL;
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    pk_run run;
    assert_int_equal(pk_run_open(NULL, directory, &run), PK_OK);
    for (size_t s = 0; s < S; s++) {
        pk_batch batch;
        pk_run_batch(&run, s, &batch);
        for (size_t b = 0; b < batch.count; b++)
            assert_true(batch.weights[b] == 1 / (double)batch.count);
    }
    pk_run_release(NULL, &run);
    clear(directory);
}

static void test_bytes_become_numbers(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    unsigned char bytes[N * D];
    size_t shape[3] = {N, 1, D};
    for (int i = 0; i < N * D; i++)
        bytes[i] = (unsigned char)(i * 17);
    data.train.inputs = pk_array_view(PK_UINT8, 3, shape, bytes);
    pk_recorder_options options = plain_options();
    record(in(root, "run", directory), &options, &data);
    pk_run run;
    assert_int_equal(pk_run_open(NULL, directory, &run), PK_OK);
    assert_int_equal(run.train.inputs.type, sizeof(pk_real) == 8 ? PK_FLOAT64 : PK_FLOAT32);
    assert_int_equal(run.train.inputs.rank, 3);
    for (int i = 0; i < N * D; i++)
        assert_true(((const pk_real *)run.train.inputs.data)[i] == bytes[i]);
    pk_run_release(NULL, &run);
    options.resume = 1;
    record(directory, &options, &data); /* the same data: nothing to add */
    clear(directory);
}

typedef struct manifest_case {
    const char *text;
    size_t size; /* 0: strlen */
    int status;
    const char *message; /* a part of it */
} manifest_case;

#define NETWORK "network input 3; dense 2\n"
#define LOSS "loss softmax_cross_entropy\n"
#define OPTIMIZER "optimizer sgd\n"

static void test_manifests(void **state)
{
    (void)state;
    char directory[PATH], path[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    record(in(root, "run", directory), &options, &data);
    static const char nul[] = "pathkernel-run 1\n" NETWORK "loss squ\0ared\n" OPTIMIZER;
    const manifest_case cases[] = {
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER, 0, PK_OK, ""},
        {"pathkernel-run 1\n" OPTIMIZER LOSS NETWORK, 0, PK_OK, ""},
        {"pathkernel-run 1\r\nnetwork input 3; dense 2\r\nloss softmax_cross_entropy\r\noptimizer sgd\r\n", 0,
         PK_OK, ""},
        {"pathkernel-run 1\r\nnetwork input 3; dense 2\r\nloss softmax_cross_entropy\r\noptimizer sgd\r", 0,
         PK_OK, ""},
        {"pathkernel-run 1\n" NETWORK LOSS "optimizer sgd", 0, PK_OK, ""},
        {"\n# made by hand\n\tpathkernel-run\t1 # comment\n\n" NETWORK
         "  loss softmax_cross_entropy  # c\n" OPTIMIZER "#",
         0, PK_OK, ""},
        {"", 0, PK_FORMAT, "run.txt line 1: expected 'pathkernel-run 1', found an empty file"},
        {"# nothing\n", 0, PK_FORMAT, "run.txt line 1: expected 'pathkernel-run 1'"},
        {NETWORK LOSS OPTIMIZER, 0, PK_FORMAT, "run.txt line 1: expected 'pathkernel-run 1', found 'network'"},
        {"pathkernel-run 2\n", 0, PK_UNSUPPORTED, "run.txt line 1: version '2'"},
        {"pathkernel-run\n", 0, PK_UNSUPPORTED, "run.txt line 1: version ''"},
        {"pathkernel-run 1\npathkernel-run 1\n", 0, PK_FORMAT, "run.txt line 2: unknown key 'pathkernel-run'"},
        {"pathkernel-run 1\n" NETWORK "colour red\n" LOSS OPTIMIZER, 0, PK_FORMAT,
         "run.txt line 3: unknown key 'colour'"},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "\n" LOSS, 0, PK_FORMAT,
         "run.txt line 6: 'loss' again, it stands on line 3"},
        {"pathkernel-run 1\n" NETWORK "loss\n" OPTIMIZER, 0, PK_FORMAT, "run.txt line 3: 'loss' has no value"},
        {"pathkernel-run 1\n" NETWORK "loss # squared\n" OPTIMIZER, 0, PK_FORMAT,
         "run.txt line 3: 'loss' has no value"},
        {"pathkernel-run 1\n" NETWORK LOSS, 0, PK_FORMAT, "without a 'optimizer' line"},
        {"pathkernel-run 1\n" LOSS OPTIMIZER, 0, PK_FORMAT, "without a 'network' line"},
        {"pathkernel-run 1\n" NETWORK OPTIMIZER, 0, PK_FORMAT, "without a 'loss' line"},
        {nul, sizeof nul - 1, PK_FORMAT, "run.txt line 3: a control character (0x00) in column 9"},
        {"pathkernel-run 1\rnetwork input 3\r", 0, PK_FORMAT,
         "run.txt line 1: a control character (0x0d) in column 17"},
        {"pathkernel-run 1\nnetwork input 3; dens 2\n" LOSS OPTIMIZER, 0, -1, "run.txt line 2: "},
        {"pathkernel-run 1\n" NETWORK "loss least\n" OPTIMIZER, 0, -1, "run.txt line 3: "},
        {"pathkernel-run 1\n" NETWORK "loss huber delta=0\n" OPTIMIZER, 0, -1,
         "run.txt line 3: loss huber: delta is 0"},
        {"pathkernel-run 1\n" NETWORK "loss nll weight=1,2\nweight 3\n" OPTIMIZER, 0, -1,
         "unknown key 'weight'"},
        {"pathkernel-run 1\n" NETWORK LOSS "optimizer sgd momentum=-1\n", 0, -1, "run.txt line 4: "},
        {"pathkernel-run 1\n" NETWORK LOSS "optimizer sgd momentun=1\n", 0, -1, "run.txt line 4: "},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step 7\n", 0, PK_OK, ""}, /* there is no state */
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step\n", 0, PK_FORMAT,
         "run.txt line 5: 'initial_step' has no value"},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step -1\n", 0, PK_FORMAT,
         "run.txt line 5: initial_step '-1' is not a whole number from 0"},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step 2.5\n", 0, PK_FORMAT,
         "run.txt line 5: initial_step '2.5' is not a whole number from 0"},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step 10000000000\n", 0, PK_FORMAT,
         "run.txt line 5: initial_step '10000000000' is not"},
        {"pathkernel-run 1\n" NETWORK LOSS OPTIMIZER "initial_step 1\ninitial_step 1\n", 0, PK_FORMAT,
         "run.txt line 6: 'initial_step' again"},
        {"pathkernel-run 1\n" NETWORK LOSS "optimizer sgd momentum=0.9\ninitial_step 1\n", 0, PK_IO,
         "initial_state.npy is missing"},
        {"pathkernel-run 1\nnetwork input 3; tanh\n" LOSS OPTIMIZER, 0, PK_ARGUMENT, "run.txt line 2: "},
        {"pathkernel-run 1\nnetwork input 3; dense 3\n" LOSS OPTIMIZER, 0, PK_SHAPE,
         "weights.npy has rows of 8 numbers"},
    };
    pk_context context;
    memset(&context, 0, sizeof context);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        pk_run run;
        memset(&run, 0x5a, sizeof run);
        pk_run before = run;
        context.message[0] = '\0';
        spew(directory, "run.txt", cases[c].text, cases[c].size ? cases[c].size : strlen(cases[c].text));
        pk_status status = pk_run_open(&context, directory, &run);
        if (cases[c].status >= 0)
            assert_int_equal(status, cases[c].status);
        else
            assert_int_not_equal(status, PK_OK);
        if (!strstr(pk_message(&context), cases[c].message))
            fail_msg("case %zu: '%s'", c, pk_message(&context));
        if (status == PK_OK)
            pk_run_release(&context, &run);
        else
            assert_memory_equal(&run, &before, sizeof run); /* untouched */
        assert_int_equal(context.memory_used, 0);
    }
    /* Long lines and long files. */
    const size_t size = 10000000;
    char *text = (char *)malloc(size);
    assert_non_null(text);
    pk_run run;
    memset(text, 'x', size);
    spew(directory, "run.txt", text, size);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_FORMAT);
    assert_non_null(strstr(pk_message(&context), "run.txt line 1: longer than"));
    memcpy(text, "pathkernel-run 1\nnetwork ", 25);
    spew(directory, "run.txt", text, size);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_FORMAT);
    assert_non_null(strstr(pk_message(&context), "run.txt line 2: longer than"));
    memset(text, '\n', size);
    const char small[] = "pathkernel-run 1\n" NETWORK LOSS OPTIMIZER;
    memcpy(text, small, sizeof small - 1);
    spew(directory, "run.txt", text, size);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_FORMAT);
    assert_non_null(strstr(pk_message(&context), "run.txt is longer than"));
    free(text);
    /* No manifest, one that is a directory or a pipe, no directory. */
    assert_int_equal(remove(in(directory, "run.txt", path)), 0);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_IO);
    assert_non_null(strstr(pk_message(&context), "run.txt: No such file"));
    assert_int_equal(mkdir(path, 0777), 0);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_IO);
    assert_non_null(strstr(pk_message(&context), "not a regular file"));
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(mkfifo(path, 0666), 0);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_IO);
    assert_int_equal(pk_run_open(&context, "/nowhere/at/all", &run), PK_IO);
    assert_int_equal(pk_run_open(&context, NULL, &run), PK_ARGUMENT);
    assert_int_equal(pk_run_open(NULL, directory, NULL), PK_ARGUMENT);
    assert_int_equal(context.memory_used, 0);
    clear(directory);
}

typedef struct array_case {
    const char *name, *header;
    const void *data;
    size_t size;
    int status; /* -1: any error */
    const char *message;
} array_case;

#define HEADER(descr, shape) "{'descr': '" descr "', 'fortran_order': False, 'shape': (" shape "), }"

static void test_bad_arrays(void **state)
{
    (void)state;
    char directory[PATH], damaged[PATH], path[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    in(root, "damaged", damaged);
    static const char zeros[4096] = {0};
    const double bad_rates[S] = {1, 1, (double)NAN, 1, 1, 1}, bad_scales[S] = {1, 1, 1, 1, 1, (double)INFINITY};
    double bad_weights[S * N], bad_inputs[N * D];
    int64_t bad_items[16], low_items[16];
    memcpy(bad_weights, data.batch_weights, sizeof bad_weights);
    memcpy(bad_inputs, data.inputs, sizeof bad_inputs);
    memcpy(bad_items, data.items, sizeof bad_items);
    memcpy(low_items, data.items, sizeof low_items);
    bad_weights[7] = -(double)INFINITY;
    bad_inputs[4] = (double)NAN;
    bad_items[3] = N;
    low_items[15] = -1;
    const int64_t backwards[S + 1] = {0, 1, 3, 2, 10, 15, 16}, empty[S + 1] = {0, 1, 3, 3, 10, 15, 16},
                                late[S + 1] = {1, 2, 3, 6, 10, 15, 16},
                                negative[S + 1] = {0, -1, 3, 6, 10, 15, 16}, labels[N] = {0, 1, 2, 0, 1},
                                low_labels[N] = {0, 1, -1, 0, 1};
    const array_case cases[] = {
        {"weights.npy", HEADER("<f2", "7, 8"), zeros, 112, PK_UNSUPPORTED, "weights.npy"},
        {"weights.npy", HEADER(">f8", "7, 8"), zeros, 448, PK_UNSUPPORTED, "weights.npy"},
        {"weights.npy", HEADER("|O", "7, 8"), zeros, 448, PK_UNSUPPORTED, "weights.npy"},
        {"weights.npy", "{'descr': '<f8', 'fortran_order': True, 'shape': (7, 8), }", zeros, 448,
         PK_UNSUPPORTED, "weights.npy"},
        {"weights.npy", HEADER("<f8", "4611686018427387904, 8"), zeros, 448, PK_OVERFLOW, "weights.npy"},
        {"weights.npy", HEADER("<f8", "7, 4611686018427387904"), zeros, 448, -1, "weights.npy"},
        {"weights.npy", HEADER("<i8", "7, 8"), zeros, 448, PK_FORMAT, "weights.npy holds int64"},
        {"weights.npy", HEADER("<f8", "7, 9"), zeros, 504, PK_SHAPE,
         "weights.npy has rows of 9 numbers, the network has 8 parameters"},
        {"weights.npy", HEADER("<f8", "56,"), zeros, 448, PK_SHAPE, "weights.npy has 1 dimensions"},
        {"weights.npy", HEADER("<f8", "7, 8, 1"), zeros, 448, PK_SHAPE, "weights.npy has 3 dimensions"},
        {"weights.npy", HEADER("<f8", "0, 8"), zeros, 0, PK_FORMAT, "weights.npy holds no row"},
        {"weights.npy", "import os", zeros, 448, -1, "weights.npy"},
        {"second_moments.npy", HEADER("<f8", "6, 7"), zeros, 336, PK_SHAPE, "second_moments.npy has rows of 7"},
        {"learning_rates.npy", HEADER("<f4", "6,"), zeros, 24, PK_FORMAT, "learning_rates.npy holds float32"},
        {"learning_rates.npy", HEADER("<f8", "6, 1"), zeros, 48, PK_SHAPE,
         "learning_rates.npy has 2 dimensions"},
        {"learning_rates.npy", HEADER("<f8", "6,"), bad_rates, 48, PK_NOT_FINITE,
         "learning_rates.npy holds nan at row 2"},
        {"gradient_scales.npy", HEADER("<f8", "6,"), bad_scales, 48, PK_NOT_FINITE,
         "gradient_scales.npy holds inf at row 5"},
        {"batch_weights.npy", HEADER("<f8", "16,"), bad_weights, 128, PK_NOT_FINITE,
         "batch_weights.npy holds -inf at row 7"},
        {"batch_offsets.npy", HEADER("<i8", "7,"), backwards, 56, PK_FORMAT,
         "batch_offsets.npy goes backwards at row 3"},
        {"batch_offsets.npy", HEADER("<i8", "7,"), negative, 56, PK_FORMAT,
         "batch_offsets.npy goes backwards at row 1"},
        {"batch_offsets.npy", HEADER("<i8", "7,"), empty, 56, PK_FORMAT,
         "batch_offsets.npy holds an empty batch at row 3"},
        {"batch_offsets.npy", HEADER("<i8", "7,"), late, 56, PK_FORMAT, "batch_offsets.npy starts with 1"},
        {"batch_offsets.npy", HEADER("<i8", "0,"), late, 0, PK_FORMAT, "batch_offsets.npy holds no row"},
        {"batch_offsets.npy", HEADER("<f8", "7,"), zeros, 56, PK_FORMAT, "batch_offsets.npy holds float64"},
        {"batch_items.npy", HEADER("<i8", "16,"), bad_items, 128, PK_ARGUMENT,
         "batch_items.npy holds 5 at row 3"},
        {"batch_items.npy", HEADER("<i8", "16,"), low_items, 128, PK_ARGUMENT,
         "batch_items.npy holds -1 at row 15"},
        {"train_inputs.npy", HEADER("<f8", "5, 3"), bad_inputs, 120, PK_NOT_FINITE, "train_inputs.npy"},
        {"train_inputs.npy", HEADER("<f8", "5, 4"), zeros, 160, PK_SHAPE, "train_inputs.npy"},
        {"train_inputs.npy", HEADER("<f8", "4, 3"), zeros, 96, PK_SHAPE, "train_inputs.npy"},
        {"train_inputs.npy", HEADER("<f2", "5, 3"), zeros, 30, PK_UNSUPPORTED, "items of type <f2"},
        {"train_inputs.npy", HEADER("<f8", "9, 3"), zeros, 120, PK_FORMAT, "train_inputs.npy"},
        {"train_inputs.npy", HEADER("<f8", "0, 3"), zeros, 0, -1, "train_inputs.npy"},
        {"train_targets.npy", HEADER("<i8", "5,"), labels, 40, PK_ARGUMENT, "train_targets.npy"},
        {"train_targets.npy", HEADER("<i8", "5,"), low_labels, 40, PK_ARGUMENT, "train_targets.npy"},
        {"train_targets.npy", HEADER("<f8", "5, 3"), zeros, 120, PK_SHAPE, "train_targets.npy"},
        {"train_targets.npy", HEADER("<i8", "4,"), labels, 32, PK_SHAPE, "train_targets.npy"},
    };
    pk_context context;
    memset(&context, 0, sizeof context);
    int descriptor = lowest_free_descriptor();
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        copy_run(directory, damaged);
        npy(damaged, cases[c].name, cases[c].header, cases[c].data, cases[c].size);
        pk_run run;
        pk_status status = pk_run_open(&context, damaged, &run);
        if (cases[c].status >= 0 ? (int)status != cases[c].status : status == PK_OK)
            fail_msg("case %zu: status %d, '%s'", c, (int)status, pk_message(&context));
        if (status == PK_OK)
            pk_run_release(&context, &run);
        else if (!strstr(pk_message(&context), cases[c].message))
            fail_msg("case %zu: '%s'", c, pk_message(&context));
        assert_int_equal(context.memory_used, 0);
    }
    /* Every file missing, empty, with half a header, and a directory in its place. */
    for (int f = 1; f < RUN_FILES; f++)
        for (int how = 0; how < 4; how++) {
            copy_run(directory, damaged);
            size_t size = 0;
            char *bytes = slurp(damaged, run_files[f], &size);
            assert_int_equal(remove(in(damaged, run_files[f], path)), 0);
            if (how == 1)
                spew(damaged, run_files[f], "", 0);
            else if (how == 2)
                spew(damaged, run_files[f], bytes, 64);
            else if (how == 3)
                assert_int_equal(mkdir(path, 0777), 0);
            free(bytes);
            pk_run run;
            pk_status status = pk_run_open(&context, damaged, &run);
            int optional = f == 5 || f >= 8;
            if (how == 0 && optional) {
                assert_int_equal(status, PK_OK);
                pk_run_release(&context, &run);
            } else {
                assert_int_equal(status, how == 0 || how == 3 ? PK_IO : PK_FORMAT);
                assert_non_null(strstr(pk_message(&context), run_files[f]));
            }
        }
    assert_int_equal(context.memory_used, 0);
    assert_int_equal(lowest_free_descriptor(), descriptor);
    clear(damaged);
    clear(directory);
}

static void test_weights_that_are_not_finite(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    record(in(root, "run", directory), &options, &data);
    double weights[(S + 1) * P] = {0};
    weights[2 * P + 3] = (double)NAN;
    weights[4 * P] = -(double)INFINITY;
    npy(directory, "weights.npy", HEADER("<f8", "7, 8"), weights, sizeof weights);
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_run run;
    pk_real row[P];
    assert_int_equal(pk_run_open(&context, directory, &run), PK_OK); /* does not read them */
    assert_int_equal(pk_run_weights(&context, &run, 1, row), PK_OK);
    assert_int_equal(pk_run_weights(&context, &run, 2, row), PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "weights.npy: parameter 3 at step 2 is nan"));
    assert_int_equal(pk_run_weights(&context, &run, 4, row), PK_NOT_FINITE);
    assert_non_null(strstr(pk_message(&context), "parameter 0 at step 4 is -inf"));
    pk_run_release(&context, &run);
    clear(directory);
}

/* The growing files of a run with everything, in the order in which a step writes them. */
typedef struct growing {
    const char *name;
    size_t row, before;
    int per_item;
    char *bytes;
    size_t size;
} growing;
enum { GROWING = 7 };
static const growing growing_files[GROWING] = {
    {"learning_rates.npy", 8, 0, 0, NULL, 0},  {"batch_offsets.npy", 8, 1, 0, NULL, 0},
    {"batch_items.npy", 8, 0, 1, NULL, 0},     {"batch_weights.npy", 8, 0, 1, NULL, 0},
    {"gradient_scales.npy", 8, 0, 0, NULL, 0}, {"second_moments.npy", P * 8, 0, 0, NULL, 0},
    {"weights.npy", P * 8, 1, 0, NULL, 0}};

/* Bytes of a file that holds `steps` steps. */
static size_t length_of(const growing *file, const run_data *data, size_t steps)
{
    size_t rows = steps, all = S;
    if (file->per_item)
        for (rows = all = 0; all < 16;) {
            for (size_t s = 0; s < S; s++) {
                rows += s < steps ? data->batches[s].count : 0;
                all += data->batches[s].count;
            }
        }
    return file->size - (all - rows) * file->row;
}

/* A kill at every byte that a step writes: the steps before it are there, and recording goes on to the same run. */
static void test_killed_anywhere(void **state)
{
    (void)state;
    char directory[PATH], cut[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    in(root, "cut", cut);
    copy_run(directory, cut);
    pk_context context;
    memset(&context, 0, sizeof context);
    growing files[GROWING];
    memcpy(files, growing_files, sizeof files);
    for (int f = 0; f < GROWING; f++)
        files[f].bytes = slurp(directory, files[f].name, &files[f].size);
    size_t kills = 0;
    for (size_t step = 0; step < S; step++)
        for (int f = 0; f < GROWING; f++) {
            const size_t first = length_of(&files[f], &data, step),
                         last = length_of(&files[f], &data, step + 1);
            for (int k = 0; k < GROWING; k++)
                spew(cut, files[k].name, files[k].bytes, length_of(&files[k], &data, step + (k < f)));
            for (size_t keep = first; keep < last + (f < GROWING - 1); keep++, kills++) {
                spew(cut, files[f].name, files[f].bytes, keep);
                pk_run run;
                if (pk_run_open(&context, cut, &run) != PK_OK)
                    fail_msg("step %zu, %zu bytes of %s: %s", step, keep, files[f].name, pk_message(&context));
                assert_int_equal(run.cut_off, f > 0 || keep > first);
                check_run(&context, &run, &options, &data, step);
                pk_run_release(&context, &run);
                if (kills % 37)
                    continue;
                options.resume = 1;
                record(cut, &options, &data);
                options.resume = 0;
                assert_same_run(directory, cut);
                for (int k = 0; k < GROWING; k++)
                    spew(cut, files[k].name, files[k].bytes, length_of(&files[k], &data, step + (k < f)));
            }
        }
    assert_true(kills > 500);
    for (int f = 0; f < GROWING; f++)
        free(files[f].bytes);
    clear(cut);
    clear(directory);
}

/* Lengths that no kill leaves: every file at every byte while the others are whole. Refused with both counts, not resumed;
 * recovered up to the shortest. */
static void test_cut_off_anywhere(void **state)
{
    (void)state;
    char directory[PATH], cut[PATH], words[80];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    in(root, "cut", cut);
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int f = 0; f < GROWING; f++) {
        growing file = growing_files[f];
        file.bytes = slurp(directory, file.name, &file.size);
        const size_t header = length_of(&file, &data, 0) - file.before * file.row;
        copy_run(directory, cut);
        for (size_t keep = header + file.before * file.row; keep < file.size; keep++) {
            size_t steps = 0;
            while (length_of(&file, &data, steps + 1) <= keep)
                steps++;
            spew(cut, file.name, file.bytes, keep);
            pk_run run;
            const int killed = f == GROWING - 1 && steps == S - 1;
            pk_status status = pk_run_open(&context, cut, &run);
            if (killed) {
                assert_int_equal(status, PK_OK);
                pk_run_release(&context, &run);
                continue;
            }
            assert_int_equal(status, PK_SHAPE);
            const size_t rows = (keep - header) / file.row;
            snprintf(words, sizeof words, "%s holds %zu row%s", file.name, rows, rows == 1 ? "" : "s");
            if (!strstr(pk_message(&context), words) ||
                !strstr(pk_message(&context),
                        f == GROWING - 1 ? "learning_rates.npy holds 6 rows" : "weights.npy holds 7 rows"))
                fail_msg("'%s' instead of '%s'", pk_message(&context), words);
            if (keep % 11 == 0) {
                pk_recorder recorder;
                options.resume = 1;
                assert_int_equal(
                    pk_recorder_open(&context, cut, &options, &data.train, data.weights, &recorder), PK_SHAPE);
                options.resume = 0;
            }
            assert_int_equal(pk_run_recover(&context, cut, &run), PK_OK);
            assert_int_equal(run.cut_off, 1);
            assert_non_null(strstr(pk_message(&context), file.name));
            check_run(&context, &run, &options, &data, steps);
            pk_run_release(&context, &run);
        }
        free(file.bytes);
    }
    assert_int_equal(context.memory_used, 0);
    clear(cut);
    clear(directory);
}

/* Files that are longer than a kill leaves them. */
static void test_too_long(void **state)
{
    (void)state;
    char directory[PATH], longer[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    in(root, "cut", longer);
    pk_context context;
    memset(&context, 0, sizeof context);
    for (int f = 0; f < GROWING; f++) {
        const growing *file = &growing_files[f];
        size_t size = 0;
        char *bytes = slurp(directory, file->name, &size);
        memcpy(bytes + size, "12345678", 8);
        memcpy(bytes + size + 8, bytes + size - 2 * file->row, 2 * file->row);
        copy_run(directory, longer);
        /* A part of the next row, or all of it but the last file's, are what a kill leaves. A next batch is not known
         * before its offset is. */
        const struct {
            size_t more;
            int killed;
        } cases[] = {{file->row - 1, !file->per_item},
                     {file->row, f < GROWING - 1 && !file->per_item},
                     {file->row + 1, 0},
                     {2 * file->row, 0}};
        for (size_t c = 0; c < 4; c++) {
            pk_run run;
            spew(longer, file->name, bytes, size + cases[c].more);
            pk_status status = pk_run_open(&context, longer, &run);
            if (status != (cases[c].killed ? PK_OK : PK_SHAPE))
                fail_msg("%s, %zu bytes more: status %d, '%s'", file->name, cases[c].more, (int)status,
                         pk_message(&context));
            if (status == PK_OK) {
                check_run(&context, &run, &options, &data, S);
                pk_run_release(&context, &run);
            } else {
                assert_non_null(strstr(pk_message(&context), file->name));
            }
        }
        free(bytes);
    }
    clear(longer);
    clear(directory);
}

/* The first steps of a run, and integers of any type where the format says integers. */
static void test_until_and_types(void **state)
{
    (void)state;
    char directory[PATH], path[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    record(in(root, "run", directory), &options, &data);
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_run run;
    for (size_t steps = 0; steps <= S; steps++) {
        assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
        assert_int_equal(pk_run_until(&context, &run, S + 1), PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "step 7: the run has 6 steps"));
        assert_int_equal(pk_run_until(&context, &run, steps), PK_OK);
        check_run(&context, &run, &options, &data, steps);
        assert_int_equal(pk_run_until(&context, &run, steps + 1), PK_ARGUMENT);
        pk_run_release(&context, &run);
    }
    int32_t items[16];
    uint16_t offsets[S + 1] = {0};
    int8_t inputs[N * D];
    uint8_t labels[N];
    for (int i = 0; i < 16; i++)
        items[i] = (int32_t)data.items[i];
    for (int s = 0; s < S; s++)
        offsets[s + 1] = (uint16_t)(offsets[s] + data.batches[s].count);
    for (int i = 0; i < N * D; i++)
        data.inputs[i] = inputs[i] = (int8_t)(3 * i - 20);
    for (int i = 0; i < N; i++)
        labels[i] = (uint8_t)data.targets[i];
    npy(directory, "batch_items.npy", HEADER("<i4", "16,"), items, sizeof items);
    npy(directory, "batch_offsets.npy", HEADER("<u2", "7,"), offsets, sizeof offsets);
    npy(directory, "train_inputs.npy", HEADER("|i1", "5, 3"), inputs, sizeof inputs);
    npy(directory, "train_targets.npy", HEADER("|b1", "5,"), labels, sizeof labels);
    const float scales[S] = {0.5f, 1, 0.1f, 1, 1, 1};
    npy(directory, "gradient_scales.npy", HEADER("<f4", "6,"), scales, sizeof scales);
    npy(directory, "batch_weights.npy", HEADER("|b1", "16,"), "\1\0\1\1\1\1\1\1\1\1\1\1\1\1\1\1", 16);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
    assert_int_equal(run.steps, S);
    for (int i = 0; i < 16; i++)
        assert_true(run.batch_items[i] == data.items[i] && run.batch_weights[i] == (i != 1));
    for (int s = 0; s < S; s++)
        assert_true(run.gradient_scales[s] == (double)scales[s] && run.batch_offsets[s] == offsets[s]);
    const int64_t all[N] = {0, 1, 2, 3, 4};
    pk_real rows[N * D], targets[N * C];
    pk_dataset_inputs(&run.train, all, N, rows);
    for (int i = 0; i < N * D; i++)
        assert_true(rows[i] == (pk_real)inputs[i]);
    pk_loss_targets(run.loss, &run.train, all, N, C, targets);
    for (int i = 0; i < N * C; i++)
        assert_true(targets[i] == (data.targets[i / C] == i % C));
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    /* Bools are no numbers of rows, and rates have all their digits. */
    npy(directory, "batch_items.npy", HEADER("|b1", "16,"), "\1\0\1\1\1\1\1\1\1\1\1\1\1\1\1\1", 16);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_FORMAT);
    assert_non_null(strstr(pk_message(&context), "batch_items.npy holds bool, it has to hold integers"));
    /* A link to nowhere is no absent file. */
    npy(directory, "batch_items.npy", HEADER("<i4", "16,"), items, sizeof items);
    assert_int_equal(remove(in(directory, "gradient_scales.npy", path)), 0);
    assert_int_equal(symlink("nowhere", path), 0);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_IO);
    assert_non_null(strstr(pk_message(&context), "gradient_scales.npy"));
    assert_int_equal(context.memory_used, 0);
    clear(directory);
}

/* What the recorder asks to have on the platter: it and the name of the manifest. */
static char synchronised[20];
int fsync(int file)
{
    char path[PATH];
    struct stat about;
    const size_t used = strlen(synchronised);
    if (used + 2 > sizeof synchronised || fstat(file, &about) != 0)
        return 0;
    const int there = access(in(root, "run/run.txt", path), F_OK) == 0;
    const int aside = access(in(root, "run/run.txt.tmp", path), F_OK) == 0;
    synchronised[used] = S_ISDIR(about.st_mode) ? (there && !aside ? 'd' : '?')
                         : aside                ? (!there && about.st_size > 80 ? 'm' : '?')
                                                : 'a';
    synchronised[used + 1] = 0;
    return 0;
}

static void test_manifest_reaches_the_disk(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    synchronised[0] = 0;
    record(in(root, "run", directory), &options, &data);
    assert_string_equal(synchronised, "aamd"); /* two arrays, the manifest before it has its name, the name */
    clear(directory);
}

/* A run is recorded into regular files, in a process without standard streams as well; links are not followed. */
static void test_recorder_files(void **state)
{
    (void)state;
    char directory[PATH], clean[PATH], path[PATH], victim[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "clean", clean), &options, &data);
    in(root, "run", directory);
    for (int closed = 1; closed < 8; closed += 3) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            pk_recorder recorder;
            memset(&recorder, 0, sizeof recorder);
            for (int i = 0; i < 3; i++)
                if (closed >> i & 1)
                    close(i);
            int wrong = pk_recorder_open(NULL, directory, &options, &data.train, data.weights, &recorder);
            for (int s = 0; s < S && !wrong; s++) {
                for (int i = 0; i < 3; i++)
                    wrong |= (closed >> i & 1) && write(i, "what a program prints", 21) >= 0;
                wrong |= record_step(NULL, &recorder, &options, &data, s);
            }
            _exit(wrong | pk_recorder_close(NULL, &recorder));
        }
        int result = 0;
        assert_int_equal(waitpid(child, &result, 0), child);
        assert_int_equal(result, 0);
        assert_same_run(clean, directory);
        clear(directory);
    }
    static const char *const names[] = {"weights.npy", "train_inputs.npy", "run.txt", "batch_items.npy"};
    in(root, "other", victim);
    for (int k = 0; k < 4; k++) {
        pk_context context;
        pk_recorder recorder;
        memset(&context, 0, sizeof context);
        assert_int_equal(mkdir(directory, 0777), 0);
        assert_int_equal(symlink(victim, in(directory, names[k], path)), 0);
        assert_int_equal(pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder),
                         PK_ARGUMENT);
        options.resume = 1; /* a start that was cut off is started anew, but not through a link */
        pk_status status =
            pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
        assert_int_equal(status, k == 1 ? PK_OK : PK_IO); /* what is written aside takes the link's place */
        if (status == PK_OK)
            assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
        options.resume = 0;
        assert_int_equal(access(victim, F_OK), -1);
        clear(directory);
    }
    clear(clean);
}

/* Rows that are gone while the run is open are an error, not a signal. */
static void test_shrinks(void **state)
{
    (void)state;
    char directory[PATH], path[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "run", directory), &options, &data);
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_run run;
    pk_real row[P];
    assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
    assert_int_equal(truncate(in(directory, "weights.npy", path), 0), 0);
    assert_int_equal(truncate(in(directory, "second_moments.npy", path), 200), 0);
    assert_int_equal(pk_run_weights(&context, &run, 3, row), PK_IO);
    assert_non_null(strstr(pk_message(&context), "weights.npy: the row of step 3 became shorter"));
    assert_int_equal(pk_run_second_moments(&context, &run, 0, row), PK_OK);
    assert_int_equal(pk_run_second_moments(&context, &run, 2, row), PK_IO);
    assert_non_null(strstr(pk_message(&context), "second_moments.npy"));
    pk_run_release(&context, &run);
    clear(directory);
}

/* Training data whose axes stand in another order, and inputs for a network that takes plain vectors. */
static void test_axes(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_recorder recorder;
    const size_t right[4] = {N, 1, 3, 1}, transposed[3] = {N, 2, 3}, flat[2] = {N, 6};
    double many[N * 6] = {0};
    in(root, "run", directory);
    options.network = "input 1x3x2; flatten; dense 2";
    data.train.inputs = pk_array_view(PK_FLOAT64, 3, transposed, many);
    pk_status status = pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
    assert_int_equal(status, PK_SHAPE);
    assert_non_null(
        strstr(pk_message(&context), "the network takes 1x3x2: as many numbers, but in another order"));
    assert_int_equal(access(directory, F_OK), -1);
    options.network = network;
    data.train.inputs = pk_array_view(PK_FLOAT64, 4, right, data.inputs);
    record(directory, &options, &data);
    pk_run run;
    assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
    pk_run_release(&context, &run);
    clear(directory);
    /* Vectors, but the training inputs tell what their numbers are. */
    pk_real weights[2 * 6 + 2] = {0};
    options.network = "input 6; dense 2";
    data.train.inputs = pk_array_view(PK_FLOAT64, 3, transposed, many);
    assert_int_equal(pk_recorder_open(&context, directory, &options, &data.train, weights, &recorder), PK_OK);
    assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
    assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
    const size_t other[3] = {N, 3, 2};
    pk_array inputs = pk_array_view(PK_FLOAT64, 3, other, many);
    assert_int_equal(pk_run_check_inputs(&context, &run, &inputs, "x.npy"), PK_SHAPE);
    assert_non_null(strstr(pk_message(&context), "x.npy has shape (5, 3, 2), the training inputs (5, 2, 3)"));
    inputs = pk_array_view(PK_FLOAT64, 3, transposed, many);
    assert_int_equal(pk_run_check_inputs(&context, &run, &inputs, "x.npy"), PK_OK);
    inputs = pk_array_view(PK_FLOAT64, 2, flat, many);
    assert_int_equal(pk_run_check_inputs(&context, &run, &inputs, "x.npy"), PK_OK);
    inputs = pk_array_view(PK_FLOAT64, 2, right, many);
    assert_int_equal(pk_run_check_inputs(&context, &run, &inputs, "x.npy"), PK_SHAPE);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    clear(directory);
}

static void assert_refused(const char *directory, const pk_recorder_options *options, const run_data *data,
                           pk_status expected, const char *message)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_recorder recorder, before;
    memset(&recorder, 0x5a, sizeof recorder);
    before = recorder;
    pk_status status = pk_recorder_open(&context, directory, options, &data->train, data->weights, &recorder);
    if (status != expected || !strstr(pk_message(&context), message))
        fail_msg("status %d, '%s' instead of '%s'", (int)status, pk_message(&context), message);
    assert_memory_equal(&recorder, &before, sizeof recorder);
    assert_int_equal(context.memory_used, 0);
}

static void test_recorder_refuses(void **state)
{
    (void)state;
    char directory[PATH], other[PATH], path[PATH];
    run_data data, changed;
    make_data(&data);
    pk_recorder_options options = plain_options(), different;
    int descriptor = lowest_free_descriptor();
    record(in(root, "run", directory), &options, &data);
    copy_run(directory, in(root, "other", other));
    /* A run is never overwritten, nor a file of its name, unless it is asked for. */
    assert_refused(directory, &options, &data, PK_ARGUMENT, "holds a run already");
    different = options, different.replace = 1;
    record(directory, &different, &data);
    assert_same_run(directory, other);
    different.resume = 1;
    assert_refused(directory, &different, &data, PK_ARGUMENT, "both resumed and replaced");
    assert_int_equal(remove(in(other, "run.txt", path)), 0);
    assert_refused(other, &options, &data, PK_ARGUMENT, "learning_rates.npy exists already");
    clear(other);
    /* What does not fit is refused before anything is made. */
    different = options, different.network = "input 4; dense 2";
    assert_refused(other, &different, &data, PK_SHAPE, "");
    different = options, different.network = "input 3; dense 2; gulu";
    assert_refused(other, &different, &data, PK_FORMAT, "gulu");
    different = options, different.loss = "least";
    assert_refused(other, &different, &data, PK_FORMAT, "least");
    different = options, different.optimizer = "sgd speed=1";
    assert_refused(other, &different, &data, PK_FORMAT, "speed");
    different = options, different.loss = NULL;
    assert_refused(other, &different, &data, PK_ARGUMENT, "loss");
    changed = data, changed.weights[5] = (pk_real)NAN;
    assert_refused(other, &options, &changed, PK_NOT_FINITE, "initial weights: parameter 5 is nan");
    different = options, different.float32 = 1;
    if (sizeof(pk_real) > 4) {
        changed = data, changed.weights[2] = (pk_real)1e300;
        assert_refused(other, &different, &changed, PK_NOT_FINITE, "not a finite float32");
    }
    assert_int_equal(access(other, F_OK), -1);
    /* Only the same run is resumed. */
    options.resume = 1;
    different = options, different.optimizer = "sgd momentum=0.5";
    assert_refused(directory, &different, &data, PK_ARGUMENT, "its optimizer is");
    different = options, different.loss = "squared";
    assert_refused(directory, &different, &data, PK_ARGUMENT,
                   "its loss is 'softmax_cross_entropy', not 'squared'");
    different = options, different.network = "input 3; dense 2; tanh";
    assert_refused(directory, &different, &data, PK_ARGUMENT, "its network is");
    different = options, different.float32 = 1;
    assert_refused(directory, &different, &data, PK_ARGUMENT, "weights.npy holds float64, not float32");
    different = options, different.batch_weights = 1;
    assert_refused(directory, &different, &data, PK_ARGUMENT, "recorded without batch_weights.npy");
    changed = data, changed.inputs[0] += 1, changed.train.inputs.data = changed.inputs;
    assert_refused(directory, &options, &changed, PK_ARGUMENT, "train_inputs.npy holds other data");
    changed = data, changed.targets[4] = 1, changed.train.targets.data = changed.targets;
    assert_refused(directory, &options, &changed, PK_ARGUMENT, "train_targets.npy holds other data");
    changed = data, changed.weights[7] += 1;
    assert_refused(directory, &options, &changed, PK_ARGUMENT, "it starts from other weights, parameter 7");
    /* One recorder at a time. */
    pk_recorder recorder;
    assert_int_equal(pk_recorder_open(NULL, directory, &options, &data.train, NULL, &recorder), PK_OK);
    assert_int_equal(recorder.steps, S);
    assert_refused(directory, &options, &data, PK_IO, "is being recorded by another");
    assert_int_equal(pk_recorder_close(NULL, &recorder), PK_OK);
    assert_int_equal(pk_recorder_open(NULL, other, &options, &data.train, NULL, &recorder), PK_ARGUMENT);
    assert_int_equal(access(other, F_OK), -1);
    assert_int_equal(lowest_free_descriptor(), descriptor);
    clear(directory);
}

/* A step that is refused writes nothing. */
static void test_steps_refused(void **state)
{
    (void)state;
    char directory[PATH], clean[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    record(in(root, "clean", clean), &options, &data);
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_recorder recorder;
    in(root, "run", directory);
    assert_int_equal(pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder),
                     PK_OK);
    pk_real bad[P] = {0};
    bad[6] = (pk_real)INFINITY;
    int64_t items[2] = {1, N}, negative[1] = {-1};
    pk_batch good = {1, items, NULL}, outside = {2, items, NULL}, below = {1, negative, NULL},
             none = {0, items, NULL}, weighted = {1, items, data.batch_weights};
    const pk_real *after = data.weights + P;
    for (int s = 0; s < S; s++) {
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &outside, 1, NULL, after), PK_ARGUMENT);
        assert_non_null(strstr(pk_message(&context), "item 1 of the batch is 5"));
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &below, 1, NULL, after), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &none, 1, NULL, after), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &weighted, 1, NULL, after), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &good, 0.5, NULL, after), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &good, 1, after, after), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &good, 1, NULL, NULL), PK_ARGUMENT);
        assert_int_equal(pk_recorder_step(&context, &recorder, (double)NAN, &good, 1, NULL, after),
                         PK_NOT_FINITE);
        assert_int_equal(pk_recorder_step(&context, &recorder, 1, &good, 1, NULL, bad), PK_NOT_FINITE);
        assert_non_null(strstr(pk_message(&context), "parameter 6 is inf"));
        assert_int_equal(record_step(&context, &recorder, &options, &data, s), PK_OK);
    }
    assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
    assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK); /* zeroed */
    assert_int_equal(pk_recorder_step(&context, &recorder, 1, &good, 1, NULL, after), PK_ARGUMENT);
    assert_same_run(clean, directory);
    clear(directory);
    clear(clean);
}

/* A disk that is full after any number of bytes, played by a limit on the size of a file. */
static void test_full_disk(void **state)
{
    (void)state;
    char directory[PATH], whole[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = full_options();
    record(in(root, "whole", whole), &options, &data);
    in(root, "run", directory);
    pk_context context;
    memset(&context, 0, sizeof context);
    struct rlimit limit, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    int started = 0, unstarted = 0;
    for (rlim_t bytes = 0; bytes < 600; bytes += 13) {
        pk_recorder recorder;
        memset(&recorder, 0, sizeof recorder);
        small = limit;
        small.rlim_cur = bytes;
        options.resume = 0;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        pk_status status =
            pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
        int opened = status == PK_OK;
        while (status == PK_OK && recorder.steps < S)
            status = record_step(&context, &recorder, &options, &data, (int)recorder.steps);
        size_t steps = recorder.steps;
        char message[PK_MESSAGE_SIZE];
        memcpy(message, pk_message(&context), sizeof message);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        if (opened && status != PK_OK) /* also when there is room again: its files disagree */
            assert_int_equal(record_step(&context, &recorder, &options, &data, (int)steps), PK_IO);
        pk_status closed = pk_recorder_close(&context, &recorder);
        assert_int_equal(context.memory_used, 0);
        if (status == PK_OK) { /* all of it fitted */
            assert_int_equal(closed, PK_OK);
        } else {
            assert_int_equal(status, PK_IO);
            assert_true(strstr(message, ".npy") || strstr(message, "run.txt"));
        }
        if (!opened) {
            unstarted++;
            assert_int_equal(access(directory, F_OK), -1); /* nothing is left of it */
            continue;
        }
        started++;
        pk_run run;
        assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
        check_run(&context, &run, &options, &data, steps);
        pk_run_release(&context, &run);
        options.resume = 1;
        record(directory, &options, &data);
        assert_same_run(whole, directory);
        clear(directory);
    }
    signal(SIGXFSZ, handler);
    assert_true(started > 5 && unstarted > 5);
    clear(whole);
}

static void test_unwritable(void **state)
{
    (void)state;
    char directory[PATH], inside[PATH];
    run_data data;
    make_data(&data);
    pk_recorder_options options = plain_options();
    in(root, "run", directory);
    in(root, "missing/run", inside);
    assert_refused(inside, &options, &data, PK_IO, "missing/run: No such file or directory");
    spew(root, "run", "a file", 6);
    assert_refused(directory, &options, &data, PK_IO, "run: Not a directory");
    in(root, "run/inside", inside);
    assert_refused(inside, &options, &data, PK_IO, "run/inside: Not a directory");
    assert_int_equal(remove(directory), 0);
    /* A folder without the right to write, as a user who is not root. */
    assert_int_equal(mkdir(directory, 0777), 0);
    assert_int_equal(chmod(root, 0755), 0);
    assert_int_equal(chmod(directory, 0555), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (geteuid() == 0 && seteuid(65534) != 0)
            _exit(0); /* no such user here: nothing to test */
        pk_context context;
        memset(&context, 0, sizeof context);
        pk_recorder recorder;
        pk_status status =
            pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
        _exit(status == PK_IO && strstr(pk_message(&context), "train_inputs.npy") &&
                      strstr(pk_message(&context), "Permission denied") && context.memory_used == 0
                  ? 0
                  : 1);
    }
    int result = 0;
    assert_int_equal(waitpid(child, &result, 0), child);
    assert_int_equal(result, 0);
    assert_int_equal(chmod(directory, 0777), 0);
    clear(directory);
}

/* An allocator that fails at one allocation and counts what is out. */
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

static pk_context counting_context(counting *count, long fail_at)
{
    pk_context context;
    memset(&context, 0, sizeof context);
    count->allocations = count->outstanding = 0;
    count->fail_at = fail_at;
    context.allocator.allocate = counting_allocate;
    context.allocator.release = counting_release;
    context.allocator.user = count;
    return context;
}

static void test_no_memory(void **state)
{
    (void)state;
    char directory[PATH];
    run_data data;
    make_data(&data);
    unsigned char bytes[N * D] = {0};
    size_t shape[2] = {N, D};
    data.train.inputs = pk_array_view(PK_UINT8, 2, shape, bytes); /* one allocation more */
    pk_recorder_options options = full_options();
    options.float32 = 1;
    in(root, "run", directory);
    counting count;
    int descriptor = lowest_free_descriptor();
    /* A fresh recording, every step of it. */
    pk_status status = PK_MEMORY;
    long fail_at = 0;
    for (; status != PK_OK; fail_at++) {
        pk_context context = counting_context(&count, fail_at);
        pk_recorder recorder;
        memset(&recorder, 0, sizeof recorder);
        status = pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
        if (status == PK_OK) {
            pk_batch batch = data.batches[0];
            batch.weights = NULL;
            status = pk_recorder_step(&context, &recorder, 1, &batch, 1, data.moments, data.weights + P);
            assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
            if (status != PK_OK)
                clear(directory);
        }
        assert_true(status == PK_OK || (status == PK_MEMORY && access(directory, F_OK) != 0));
        assert_int_equal(count.outstanding, 0);
        assert_int_equal(context.memory_used, 0);
        assert_int_equal(lowest_free_descriptor(), descriptor);
    }
    assert_true(fail_at > 5);
    /* A resumed one. */
    options.resume = 1;
    status = PK_MEMORY;
    for (fail_at = 0; status != PK_OK; fail_at++) {
        pk_context context = counting_context(&count, fail_at);
        pk_recorder recorder;
        memset(&recorder, 0, sizeof recorder);
        status = pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder);
        assert_true(status == PK_OK || status == PK_MEMORY);
        if (status == PK_OK)
            assert_int_equal(recorder.steps, 1);
        assert_int_equal(pk_recorder_close(&context, &recorder), PK_OK);
        assert_int_equal(count.outstanding, 0);
        assert_int_equal(lowest_free_descriptor(), descriptor);
    }
    assert_true(fail_at > 5);
    /* Reading it. */
    status = PK_MEMORY;
    for (fail_at = 0; status != PK_OK; fail_at++) {
        pk_context context = counting_context(&count, fail_at);
        pk_run run;
        status = pk_run_open(&context, directory, &run);
        assert_true(status == PK_OK || status == PK_MEMORY);
        if (status == PK_OK)
            pk_run_release(&context, &run);
        assert_int_equal(count.outstanding, 0);
        assert_int_equal(context.memory_used, 0);
        assert_int_equal(lowest_free_descriptor(), descriptor);
    }
    assert_true(fail_at > 3);
    /* A memory limit of 1 KiB. */
    pk_context context;
    memset(&context, 0, sizeof context);
    context.memory_limit = 1024;
    pk_run run;
    pk_recorder recorder;
    assert_int_equal(pk_run_open(&context, directory, &run), PK_MEMORY_LIMIT);
    assert_non_null(strstr(pk_message(&context), "1024"));
    /* The least that it names does, and a byte less does not, whatever block was the first to be refused. */
    for (size_t limit = 250, refusals = 0; limit < 4096; limit += 60) {
        context.memory_limit = limit;
        pk_status opened = pk_run_open(&context, directory, &run);
        if (opened == PK_OK) {
            assert_true(refusals > 0);
            pk_run_release(&context, &run);
            continue;
        }
        refusals++;
        assert_int_equal(opened, PK_MEMORY_LIMIT);
        const char *least = strstr(pk_message(&context), "the least that would do is ");
        if (!least)
            fail_msg("%zu bytes: %s", limit, pk_message(&context));
        context.memory_limit = (size_t)strtoull(least + 27, NULL, 10);
        assert_true(context.memory_limit > limit);
        assert_int_equal(pk_run_open(&context, directory, &run), PK_OK);
        pk_run_release(&context, &run);
        context.memory_limit--;
        assert_int_equal(pk_run_open(&context, directory, &run), PK_MEMORY_LIMIT);
    }
    context.memory_limit = 1024;
    assert_int_equal(pk_recorder_open(&context, directory, &options, &data.train, data.weights, &recorder),
                     PK_MEMORY_LIMIT);
    assert_int_equal(context.memory_used, 0);
    clear(directory);
}

static int start_clean(void **state)
{
    (void)state;
    char path[PATH];
    static const char *const left[] = {"run", "other", "cut", "damaged", "whole", "clean"};
    for (size_t k = 0; k < sizeof left / sizeof *left; k++)
        clear(in(root, left[k], path));
    return 0;
}

static int make_root(void **state)
{
    (void)state;
    const char *folder = getenv("TMPDIR");
    snprintf(root, sizeof root, "%s/pathkernel-trajectory-XXXXXX",
             folder && strlen(folder) < 100 ? folder : "/tmp");
    return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state)
{
    start_clean(state);
    return rmdir(root);
}

#define TEST(function) cmocka_unit_test_setup(function, start_clean)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_written_is_read),
        TEST(test_long_names),
        TEST(test_uniform_weights),
        TEST(test_bytes_become_numbers),
        TEST(test_manifests),
        TEST(test_bad_arrays),
        TEST(test_weights_that_are_not_finite),
        TEST(test_cut_off_anywhere),
        TEST(test_killed_anywhere),
        TEST(test_too_long),
        TEST(test_until_and_types),
        TEST(test_axes),
        TEST(test_manifest_reaches_the_disk),
        TEST(test_recorder_files),
        TEST(test_shrinks),
        TEST(test_recorder_refuses),
        TEST(test_steps_refused),
        TEST(test_full_disk),
        TEST(test_unwritable),
        TEST(test_no_memory),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
