/* Fuzz target: whole run folders. One of a few small runs of the library's own is recorded; the input says which, and
 * what is done to its files: bytes written over, cut off, put in between, files removed, exchanged, replaced by folders and
 * links. What is left is opened, read, replayed, decomposed and resumed, or refused with a message. A resume that fails
 * costs no step of what could be read before.
 */
#include "fuzz.h"

enum { FUZZ_RUNS = 7, FUZZ_FILES = 21, FUZZ_EXAMPLES = 5 };

static const char *const fuzz_run_files[FUZZ_FILES] = {"run.txt",
                                                       "weights.npy",
                                                       "learning_rates.npy",
                                                       "batch_offsets.npy",
                                                       "batch_items.npy",
                                                       "train_inputs.npy",
                                                       "train_targets.npy",
                                                       "gradient_scales.npy",
                                                       "batch_weights.npy",
                                                       "second_moments.npy",
                                                       "checksums.npy",
                                                       "optimizer_states.npy",
                                                       "constant_matrix.npy",
                                                       "constant_table.npy",
                                                       "momenta.npy",
                                                       "group_rates.npy",
                                                       "initial_state.npy",
                                                       "run.txt.tmp",
                                                       "weights.npy.tmp",
                                                       "other.npy",
                                                       "resume_state.npy"};

typedef struct fuzz_run {
    const char *network, *optimizer;
    pk_loss loss;
    size_t steps, batch, keep_every;
    int float32, moments;
    double clip;
    size_t initial_step; /* updates before it, with a state; 0: none */
} fuzz_run;

static const fuzz_run fuzz_runs[FUZZ_RUNS] = {
    {"input 2; dense 3; tanh; dense 2", "sgd", PK_SOFTMAX_CROSS_ENTROPY, 4, 2, 1, 0, 0, 0, 0},
    {"input 2; dense 3; relu; dense 2", "adam", PK_SOFTMAX_CROSS_ENTROPY, 4, 0, 2, 0, 0, 0, 0},
    {"input 2; dense 2; gelu; dense 2 nobias", "adamw", PK_SQUARED, 4, 3, 1, 1, 1, 0, 0},
    {"input 2; dense 4; abs; dense 2", "sgd momentum=0.9 weight_decay=0.01", PK_LOGISTIC, 4, 2, 3, 0, 0, 0.5,
     0},
    {"input 1; constant table; dense 2; tanh; propagate matrix; select; dense 2", "sgd momentum=0.5",
     PK_SOFTMAX_CROSS_ENTROPY, 18, 2, 1, 0, 0, 0.1, 0} /* long enough for a state to resume from */,
    {"input 2; dense 3; tanh; dense 2", "adam amsgrad=1", PK_SOFTMAX_CROSS_ENTROPY, 4, 2, 1, 0, 0, 0, 3},
    {"input 2; dense 3; relu; dense 2", "rmsprop momentum=0.5 centered=1 epsilon=1e-3", PK_SQUARED, 4, 0, 2, 0,
     0, 0, 1},
};

typedef struct fuzz_original {
    uint8_t *bytes[FUZZ_FILES]; /* NULL: not there */
    size_t size[FUZZ_FILES];
} fuzz_original;

static const char *fuzz_run_path(const char *name)
{
    static char paths[2][400];
    static int next;
    char *path = paths[next++ % 2];
    snprintf(path, 400, "%s/folder%s%s", fuzz_enter(), *name ? "/" : "", name);
    return path;
}

static void fuzz_put_back(const fuzz_original *from, int file)
{
    const char *path = fuzz_run_path(fuzz_run_files[file]);
    struct stat info;
    if (lstat(path, &info) == 0 && S_ISDIR(info.st_mode))
        fuzz_clear(path);
    else if (lstat(path, &info) == 0 && (!from->bytes[file] || !S_ISREG(info.st_mode)))
        (void)unlink(path);
    if (from->bytes[file])
        fuzz_write_file(path, from->bytes[file], from->size[file]);
}

static pk_status fuzz_tables(void *user, pk_context *context, const char *name, pk_array *array)
{
    static const double matrix[4][3] = {{0, 0, 0.5}, {1, 0, 0.25}, {0, 1, 0.25}, {2, 2, -1}},
                        table[3][2] = {{1, 0.5}, {-1, 0.25}, {0.75, -2}};
    static const size_t shapes[2][2] = {{4, 3}, {3, 2}};
    (void)user, (void)context;
    *array = strcmp(name, "matrix") == 0 ? pk_array_view(PK_FLOAT64, 2, shapes[0], matrix)
                                         : pk_array_view(PK_FLOAT64, 2, shapes[1], table);
    return PK_OK;
}

static volatile size_t *fuzz_acknowledged; /* steps that were told to be recorded; NULL: nobody wants to know */

static int fuzz_acknowledge(void *user, size_t step, double objective, const pk_real *weights)
{
    (void)user, (void)objective, (void)weights;
    if (fuzz_acknowledged)
        *fuzz_acknowledged = step + 1;
    return 0;
}

/* Trains the run in the folder up to some steps, as at first or resumed. */
static pk_status fuzz_train(pk_context *context, const fuzz_run *from, size_t steps)
{
    pk_graph graph;
    pk_train_options options;
    pk_real inputs[FUZZ_EXAMPLES * 2], weights[64];
    int64_t labels[FUZZ_EXAMPLES];
    pk_dataset train;
    const pk_constants constants = {fuzz_tables, NULL};
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    FUZZ_REQUIRE(pk_network_parse_with(context, from->network, &constants, &graph) == PK_OK);
    FUZZ_REQUIRE(graph.parameters <= 64);
    const size_t shape[2] = {FUZZ_EXAMPLES, graph.input_width};
    for (size_t i = 0; i < FUZZ_EXAMPLES * graph.input_width; i++)
        inputs[i] = graph.checked ? (pk_real)(i % 3) : (pk_real)(((double)(i * i % 7) - 3) / 2);
    for (size_t i = 0; i < FUZZ_EXAMPLES; i++)
        labels[i] = (int64_t)(i % 2);
    train.inputs = pk_array_view(REAL_TYPE, 2, shape, inputs);
    train.targets = pk_array_view(PK_INT64, 1, shape, labels);
    FUZZ_REQUIRE(pk_optimizer_parse(context, from->optimizer, &options.optimizer) == PK_OK);
    FUZZ_REQUIRE(pk_network_initialize(context, &graph, 1, weights) == PK_OK);
    options.loss = from->loss;
    options.schedule.rate = 0.05;
    options.steps = steps;
    options.batch_size = from->batch;
    options.clip_norm = from->clip;
    options.record = fuzz_run_path("");
    options.resume = 1;
    options.record_float32 = from->float32 || sizeof(pk_real) == sizeof(float);
    options.record_second_moments = from->moments;
    options.keep_every = from->keep_every;
    options.on_step = fuzz_acknowledge;
    pk_real state[3 * 64];
    for (size_t i = 0; i < sizeof state / sizeof *state; i++)
        state[i] = (pk_real)(0.25 + (double)(i % 5) / 16);
    options.initial_state = from->initial_step ? state : NULL;
    options.initial_step = from->initial_step;
    fuzz_tell_inside(1);
    pk_status status = pk_train(context, &graph, &train, &options, weights, NULL);
    fuzz_tell_inside(0);
    pk_graph_release(context, &graph);
    return status;
}

static const fuzz_original *fuzz_original_run(size_t number)
{
    static fuzz_original originals[FUZZ_RUNS];
    static int recorded[FUZZ_RUNS];
    fuzz_original *original = &originals[number];
    if (!recorded[number]) {
        pk_context context;
        memset(&context, 0, sizeof context);
        context.threads = 1;
        fuzz_clear(fuzz_run_path(""));
        pk_status status = fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps);
        if (status)
            fprintf(stderr, "%s\n", context.message);
        FUZZ_REQUIRE(status == PK_OK);
        for (int f = 0; f < FUZZ_FILES; f++)
            original->bytes[f] = fuzz_read_file(fuzz_run_path(fuzz_run_files[f]), &original->size[f]);
        recorded[number] = 1;
    }
    return original;
}

/* One thing done to one file. */
static void fuzz_patch(const fuzz_original *original, int file, fuzz_bytes *bytes)
{
    const char *path = fuzz_run_path(fuzz_run_files[file]);
    uint8_t inserted[256];
    size_t size = 0, offset = 0, count = 0;
    const unsigned what = fuzz_byte(bytes) % 9;
    uint8_t *now = what == 4 || what > 5 ? NULL : fuzz_read_file(path, &size);
    struct stat info;
    if (what < 2 || what == 3) {
        offset = fuzz_two_bytes(bytes) % (size + 1);
        count = what == 3 ? fuzz_byte(bytes) % 64 : 1 + fuzz_byte(bytes) % 16;
        for (size_t i = 0; i < count; i++)
            inserted[i] = (uint8_t)fuzz_byte(bytes);
    }
    if (lstat(path, &info) == 0 && !S_ISREG(info.st_mode)) { /* once a folder or a link, so until the end */
        free(now);
        return;
    }
    switch (what) {
    case 0: /* over what is there */
        for (size_t i = 0; i < count && offset + i < size; i++)
            now[offset + i] = inserted[i];
        if (now)
            fuzz_write_file(path, now, size);
        break;
    case 1: /* between what is there */
    case 3: {
        uint8_t *longer = (uint8_t *)malloc(size + count + 1);
        FUZZ_REQUIRE(longer);
        if (offset)
            memcpy(longer, now, offset);
        memcpy(longer + offset, inserted, count);
        if (size > offset)
            memcpy(longer + offset + count, now + offset, size - offset);
        fuzz_write_file(path, longer, size + count);
        free(longer);
        break;
    }
    case 2: /* cut */
        offset = fuzz_two_bytes(bytes) % (size + 1);
        if (now)
            fuzz_write_file(path, now, offset);
        break;
    case 4: (void)unlink(path); break;
    case 5: { /* what stands in another file */
        const int other = (int)(fuzz_byte(bytes) % FUZZ_FILES);
        if (original->bytes[other])
            fuzz_write_file(path, original->bytes[other], original->size[other]);
        break;
    }
    case 6:
        (void)unlink(path);
        (void)mkdir(path, 0777);
        break;
    case 7: /* a link to another of the files, to nothing or to itself */
        (void)unlink(path);
        if (symlink(fuzz_run_files[fuzz_byte(bytes) % FUZZ_FILES], path) != 0)
            FUZZ_REQUIRE(errno == EEXIST);
        break;
    case 8: /* zeros behind it */
        (void)truncate(path, info.st_size < 4096 ? info.st_size + (off_t)fuzz_two_bytes(bytes) % 4096 : 4096);
        break;
    }
    free(now);
}

static int fuzz_refused(const pk_context *context, pk_status status)
{
    FUZZ_REQUIRE(status == PK_OK || context->message[0]);
    FUZZ_REQUIRE(status != PK_MEMORY);
    for (const char *at = context->message; status && *at; at++)
        FUZZ_REQUIRE((unsigned char)*at >= ' ' && *at != 127);
    return status != PK_OK;
}

/* Opens, reads and decomposes; the number of steps that could be opened, or -1. */
static long fuzz_read_run(pk_context *context)
{
    pk_run run;
    memset(&run, 0, sizeof run);
    if (fuzz_refused(context, pk_run_open(context, fuzz_run_path(""), &run)))
        return -1;
    long steps = (long)run.steps;
    FUZZ_REQUIRE(run.graph.parameters == run.parameters && run.parameters > 0);
    if (run.parameters > 400 || run.graph.widest > 64 || run.steps > 24 || run.batch_offsets[run.steps] > 200 ||
        run.examples > 64) {
        pk_run_release(context, &run);
        return steps;
    }
    pk_replay replay;
    pk_decomposition out;
    pk_decompose_options options;
    pk_real *weights = NULL, *inputs = NULL;
    const size_t D = run.graph.input_width, rows = 2;
    FUZZ_REQUIRE(pk_allocate(context, run.parameters, sizeof *weights, "weights", &weights) == PK_OK);
    FUZZ_REQUIRE(pk_allocate(context, rows * D, sizeof *inputs, "inputs", &inputs) == PK_OK);
    memset(&options, 0, sizeof options);
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    for (size_t s = 0; s <= run.steps; s += run.keep_every) {
        (void)fuzz_refused(context, pk_run_weights(context, &run, s, weights));
        if (run.second_moments.data && s < run.steps)
            (void)fuzz_refused(context, pk_run_second_moments(context, &run, s, weights));
    }
    for (size_t s = 0; s < run.steps; s++) {
        pk_batch batch;
        pk_run_batch(&run, s, &batch);
        FUZZ_REQUIRE(isfinite(pk_run_gradient_scale(&run, s)));
        for (size_t i = 0; i < batch.count; i++)
            FUZZ_REQUIRE(batch.items[i] >= 0 && (size_t)batch.items[i] < run.examples);
    }
    pk_status status = pk_replay_prepare(context, &run, 0, &replay);
    if (!fuzz_refused(context, status)) {
        for (size_t s = 0; s <= run.steps; s++)
            (void)fuzz_refused(context, pk_replay_weights(context, &replay, s, weights));
        pk_replay_release(context, &replay);
    }
    for (size_t i = 0; i < rows * D; i++)
        inputs[i] = (pk_real)(i % 2);
    for (int averaged = 0; averaged < (run.initial_state.data ? 2 : 1); averaged++) {
        if (averaged)
            options.average = (pk_average){PK_AVERAGE_SWA, 0, run.steps / 2, 2};
        status = pk_decompose(context, &run, pk_matrix_view(inputs, rows, D), &options, &out);
        (void)fuzz_refused(context, status);
        for (size_t cell = 0; (status == PK_OK || status == PK_NOT_CLOSED) && cell < rows * out.outputs;
             cell++) {
            const double parts[] = {out.initial[cell], out.decay[cell], out.inherited[cell], out.closure[cell],
                                    out.unattributed[cell]};
            double sum = 0, most = fabs(out.final[cell]);
            for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
                sum += parts[i];
                most += fabs(parts[i]);
            }
            for (size_t i = 0; i < out.examples; i++) {
                sum += out.by_example[cell * out.examples + i];
                most += fabs(out.by_example[cell * out.examples + i]);
            }
            FUZZ_REQUIRE(!isfinite(most) || fabs(sum - out.final[cell]) <= 1e-12 * most);
        }
        pk_decomposition_release(context, &out);
    }
    pk_release(context, inputs);
    pk_release(context, weights);
    pk_run_release(context, &run);
    return steps;
}

static int fuzz_folder_target(const uint8_t *data, size_t size)
{
    pk_context context;
    fuzz_bytes bytes = {data, size};
    static size_t last = FUZZ_RUNS; /* the run that the folder holds */
    const unsigned first = fuzz_byte(&bytes);
    const size_t number = first % FUZZ_RUNS;
    const fuzz_original *original = fuzz_original_run(number);
    unsigned changed = 0;
    memset(&context, 0, sizeof context);
    context.threads = 1;
    context.memory_limit = (size_t)1 << 26;
    (void)mkdir(fuzz_run_path(""), 0777);
    if (number != last)
        changed = ~0u;
    for (int f = 0; f < FUZZ_FILES; f++)
        if (changed >> f & 1)
            fuzz_put_back(original, f);
    last = number;
    changed = 0;
    for (int patch = 0; patch < 8 && bytes.left; patch++) {
        const int file = (int)(fuzz_byte(&bytes) % FUZZ_FILES);
        changed |= 1u << file;
        fuzz_patch(original, file, &bytes);
    }
    const long steps = fuzz_read_run(&context);
    FUZZ_REQUIRE(context.memory_used == 0);
    if (first >= 128) {
        (void)fuzz_refused(&context,
                           fuzz_train(&context, &fuzz_runs[number], fuzz_runs[number].steps + first % 3));
        FUZZ_REQUIRE(context.memory_used == 0);
        const long after = fuzz_read_run(&context);
        FUZZ_REQUIRE(after >= steps);
        changed = ~0u;
    }
    FUZZ_REQUIRE(context.memory_used == 0);
    for (int f = 0; f < FUZZ_FILES; f++)
        if (changed >> f & 1)
            fuzz_put_back(original, f);
    return 0;
}
