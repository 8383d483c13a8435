/* bench/bench_run.h: training runs for the benchmarks of whole decompositions: the digits, or made data of any size.
 * With the implementation of pathkernel. */
#ifndef PATHKERNEL_BENCH_RUN_H
#define PATHKERNEL_BENCH_RUN_H
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mkdtemp */
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel/attribution/decompose.h"
#include "pathkernel/network/language.h"
#include "pathkernel/run/train.h"
#include "bench.h"
#include <unistd.h>

enum { SIDE = 8, CLASSES = 10, DIGITS = 1797, TRAINING = 1437, LARGE = 28, LARGE_IMAGES = 320 };

/* ResNet-9's plan, a few channels wide. */
#define RESNET(size)                                                                                         \
    "input 1x" size "; conv 8 3x3 pad=1; relu; conv 16 3x3 pad=1; relu; max_pool 2; residual( conv 16 3x3 "  \
    "pad=1; relu; conv 16 3x3 pad=1; relu ); conv 32 3x3 pad=1; relu; max_pool 2; conv 32 3x3 pad=1; relu; " \
    "residual( conv 32 3x3 pad=1; relu; conv 32 3x3 pad=1; relu ); global_avg_pool; dense 10"

/* One training run and what is asked of it. */
typedef struct job {
    const char *name, *network, *optimizer;
    double rate;
    size_t steps, batch_size, training, rows;
    int layers; /* also by step and by layer */
} job;

/* ---- data and runs ---------------------------------------------------------------------------------- */

/* Classes around centres of their own. */
static void make_data(pk_dataset *data)
{
    static double images[DIGITS * SIDE * SIDE];
    static int64_t labels[DIGITS];
    const size_t shape[3] = {DIGITS, SIDE, SIDE};
    uint64_t state = 1;
    double centre[CLASSES][SIDE * SIDE];
    for (int fill = -1; fill < DIGITS; fill++)
        for (size_t i = 0; i < (fill < 0 ? CLASSES : 1) * SIDE * SIDE; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            double x = (double)(state >> 11) / 9007199254740992.0;
            if (fill < 0)
                centre[i / (SIDE * SIDE)][i % (SIDE * SIDE)] = x;
            else
                images[(size_t)fill * SIDE * SIDE + i] = 0.6 * centre[fill % CLASSES][i] + 0.4 * x;
        }
    for (int i = 0; i < DIGITS; i++)
        labels[i] = i % CLASSES;
    memset(data, 0, sizeof *data);
    data->inputs = pk_array_view(PK_FLOAT64, 3, shape, images);
    data->targets = pk_array_view(PK_INT64, 1, shape, labels);
}

/* The digits of the folder, of this source's neighbour, or of the working directory; else made data. */
static void find_data(pk_context *context, const char *folder, pk_dataset *data)
{
    char own[1024], images[1100], labels[1100];
    const char *source = __FILE__, *slash = strrchr(source, '/'), *candidates[3];
#ifdef BENCH_DATA
    snprintf(own, sizeof own, "%s", BENCH_DATA);
#else
    snprintf(own, sizeof own, "%.*s../examples/data", slash ? (int)(slash + 1 - source) : 0, source);
#endif
    (void)slash;
    candidates[0] = folder ? folder : own;
    candidates[1] = folder ? NULL : "examples/data";
    candidates[2] = NULL;
    for (size_t i = 0; candidates[i]; i++) {
        snprintf(images, sizeof images, "%s/digits-images-idx3-ubyte", candidates[i]);
        snprintf(labels, sizeof labels, "%s/digits-labels-idx1-ubyte", candidates[i]);
        if (pk_dataset_idx(context, images, labels, 1 / 16.0, data) == PK_OK) {
            if (pk_dataset_examples(data) == DIGITS && pk_dataset_width(data) == SIDE * SIDE) {
                printf("# data: %s\n", candidates[i]);
                return;
            }
            pk_dataset_release(context, data);
        }
    }
    printf("# data: made, the digits are not in %s\n", candidates[0]);
    make_data(data);
}

/* The digits with bilinear pixels between. */
static inline void enlarge(const pk_dataset *digits, pk_dataset *large)
{
    static double images[LARGE_IMAGES * LARGE * LARGE];
    static int64_t labels[LARGE_IMAGES];
    const size_t shape[3] = {LARGE_IMAGES, LARGE, LARGE};
    for (int64_t i = 0; i < LARGE_IMAGES; i++) {
        pk_real small[SIDE * SIDE];
        pk_dataset_inputs(digits, &i, 1, small);
        labels[i] = ((const int64_t *)digits->targets.data)[i];
        for (int y = 0; y < LARGE; y++)
            for (int x = 0; x < LARGE; x++) {
                const double v = (double)y * (SIDE - 1) / (LARGE - 1), u = (double)x * (SIDE - 1) / (LARGE - 1);
                const int row = v < SIDE - 2 ? (int)v : SIDE - 2, col = u < SIDE - 2 ? (int)u : SIDE - 2;
                const pk_real *at = small + row * SIDE + col;
                const double above = at[0] + (u - col) * (at[1] - at[0]),
                             below = at[SIDE] + (u - col) * (at[SIDE + 1] - at[SIDE]);
                images[(i * LARGE + y) * LARGE + x] = above + (v - row) * (below - above);
            }
    }
    memset(large, 0, sizeof *large);
    large->inputs = pk_array_view(PK_FLOAT64, 3, shape, images);
    large->targets = pk_array_view(PK_INT64, 1, shape, labels);
}

static void remove_run(const char *directory)
{
    static const char *const files[] = {"run.txt",           "weights.npy",       "learning_rates.npy",
                                        "batch_offsets.npy", "batch_items.npy",   "batch_weights.npy",
                                        "train_inputs.npy",  "train_targets.npy", "resume_state.npy"};
    char path[600];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, files[i]);
        (void)remove(path);
    }
    (void)rmdir(directory);
}

/* Trains, records, opens; the directory is gone afterwards, the run stays mapped. */
static inline pk_status train_run(pk_context *context, const job *j, const pk_dataset *data, pk_run *run)
{
    const char *temporary = getenv("TMPDIR");
    char directory[512];
    pk_dataset rows;
    pk_graph graph;
    pk_train_options options;
    pk_real *weights = NULL;
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    memset(run, 0, sizeof *run);
    snprintf(directory, sizeof directory, "%.400s/pathkernel-bench-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(directory)) {
        perror(directory);
        return PK_IO;
    }
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = j->rate;
    options.steps = j->steps;
    options.batch_size = j->batch_size;
    options.record = directory;
    pk_status status = pk_dataset_rows(context, data, 0, j->training, &rows);
    if (!status)
        status = pk_optimizer_parse(context, j->optimizer, &options.optimizer);
    if (!status)
        status = pk_network_parse(context, j->network, &graph);
    if (!status)
        status = pk_allocate(context, graph.parameters, sizeof *weights, "the weights", &weights);
    if (!status)
        status = pk_network_initialize(context, &graph, 1, weights);
    if (!status)
        status = pk_train(context, &graph, &rows, &options, weights, NULL);
    if (!status)
        status = pk_run_open(context, directory, run);
    pk_release(context, weights);
    pk_graph_release(context, &graph);
    remove_run(directory);
    return status;
}

#endif
