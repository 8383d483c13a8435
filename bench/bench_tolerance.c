/* bench/bench_tolerance.c: what does a looser tolerance save where a network has kinks, and what does it leave of the closure
 * and of single contributions?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_tolerance.c -lblis -lm -o bench_tolerance
 *   ./bench_tolerance [--quick] [FOLDER]
 *
 * Test digits over training digits by SGD or AdamW; FOLDER holds the digits as IDX files, without them made data of the same
 * shape serve; 28x28 images are the digits enlarged. Each network is decomposed at 1e-10, 1e-6, 1e-4 and 1e-3. A row of the
 * table: points of the quadrature per test row and step, at each of which all outputs have their gradients taken; the time
 * per row and step, and how many times less that is than at 1e-10; the worst closure, and the largest difference of a single
 * contribution to the one at 1e-10, both relative to the largest contribution of the row. The last column is the closure's or the
 * contributions', whichever is nearer to its tolerance: above 1 the check fails.
 */
#include "bench_run.h"
#include <float.h>

typedef struct subject {
    const char *name, *network, *optimizer;
    double rate;
    size_t steps, rows, training;
    int large; /* 28x28 */
    double least[3]; /* so many times fewer points at 1e-6, 1e-4 and 1e-3, at least; 0: any */
} subject;

static const subject subjects[] = {
    {"cnn_28x28",
     "input 1x28x28; conv 8 3x3 pad=1; relu; max_pool 2; conv 16 3x3 pad=1; relu; max_pool 2; flatten; dense 10", "sgd",
     0.1, 5, 2, 256, 1, {1.5, 20, 60}},
    {"resnet9_28x28", RESNET("28x28"), "sgd", 0.1, 5, 2, 256, 1, {3, 20, 60}},
    {"norm_cnn_28x28",
     "input 1x28x28; conv 8 3x3 pad=1; group_norm 4; relu; max_pool 2; conv 16 3x3 pad=1; group_norm 4; relu; "
     "max_pool 2; flatten; dense 10",
     "sgd", 0.1, 5, 2, 256, 1, {0, 0, 0}},
    {"transformer_28x28",
     "input 28x28; dense 32; position; residual( layer_norm; attention 4 ); residual( layer_norm; dense 128; relu; "
     "dense 32 ); mean_tokens; dense 10",
     "sgd", 0.1, 5, 2, 256, 1, {0, 0, 0}},
    {"conv_relu_8x8",
     "input 1x8x8; conv 8 3x3 pad=1; relu; max_pool 2; conv 16 3x3 pad=1; relu; flatten; dense 10", "sgd", 0.2, 40, 8,
     512, 0, {0, 0, 0}},
    {"resnet9_8x8", RESNET("8x8"), "sgd", 0.1, 10, 4, 256, 0, {0, 0, 0}},
    {"dense_relu", "input 64; dense 32; relu; dense 32; relu; dense 10", "sgd", 0.5, 40, 16, 512, 0, {0, 0, 0}},
    {"layer_norm_relu", "input 64; dense 32; layer_norm; relu; dense 32; layer_norm; relu; dense 10", "sgd", 0.2, 40,
     8, 512, 0, {0, 0, 0}},
    {"transformer",
     "input 8x8; dense 16; position; residual( layer_norm; attention 2 ); residual( layer_norm; dense 32; relu; "
     "dense 16 ); mean_tokens; dense 10",
     "sgd", 0.1, 40, 8, 512, 0, {0, 0, 0}},
    {"transformer_adamw",
     "input 8x8; dense 16; position; residual( attention 2 shared nobias ); residual( dense 32; relu; dense 16 ); "
     "mean_tokens; dense 10",
     "adamw", 0.003, 40, 8, 512, 0, {0, 0, 0}},
};

enum { TOLERANCES = 4 };
static const double tolerances[TOLERANCES] = {1e-10, 1e-6, 1e-4, 1e-3};

/* The largest difference of two results' contributions, relative to the largest contribution of the row. */
static double worst_entry(const pk_decomposition *exact, const pk_decomposition *loose)
{
    const size_t entries = exact->outputs * exact->examples;
    double worst = 0;
    for (size_t row = 0; row < exact->rows; row++) {
        const double *a = exact->by_example + row * entries, *b = loose->by_example + row * entries;
        double largest = 0, difference = 0;
        for (size_t i = 0; i < entries; i++) {
            largest = fmax(largest, fabs(a[i]));
            difference = fmax(difference, fabs(a[i] - b[i]));
        }
        worst = fmax(worst, largest > 0 ? difference / largest : difference);
    }
    return worst;
}

/* One network at all tolerances. 0: it could not be decomposed. */
static int measure(bench_run *bench, const subject *s, const pk_dataset *data)
{
    const job j = {s->name, s->network, s->optimizer, s->rate, s->steps, 64, s->training, s->rows, 0};
    const size_t width = pk_dataset_width(data), shape[2] = {data->inputs.shape[0], width};
    pk_context context;
    pk_run run;
    pk_decomposition results[TOLERANCES];
    pk_decompose_options options;
    pk_real *rows = NULL;
    int64_t items[LARGE_IMAGES];
    pk_dataset flat = *data;
    double seconds[TOLERANCES];
    flat.inputs = pk_array_view(data->inputs.type, 2, shape, data->inputs.data);
    memset(&context, 0, sizeof context);
    memset(results, 0, sizeof results);
    memset(&options, 0, sizeof options);
    pk_status status = train_run(&context, &j, &flat, &run);
    if (!status)
        status = pk_allocate(&context, s->rows, width * sizeof *rows, "the test rows", &rows);
    for (size_t i = 0; i < s->rows; i++)
        items[i] = (int64_t)(s->training + i);
    if (!status)
        pk_dataset_inputs(data, items, s->rows, rows);
    const double cells = (double)s->rows * (double)s->steps;
    for (int t = 0; t < TOLERANCES && !status; t++) {
        const double least = t > 0 ? s->least[t - 1] : 0;
        /* 1e-10 is the default in double; a build in float has a looser one, and checks no more than that. */
        options.tolerance = t == 0 && sizeof(pk_real) == 8 ? 0 : fmax(tolerances[t], sizeof(pk_real) == 8 ? 0 : 1e-3);
        seconds[t] = DBL_MAX;
        for (int repeat = 0; repeat < (t > 0 && !bench->quick ? 3 : 1) && !status; repeat++) {
            pk_decomposition_release(&context, &results[t]);
            const double start = bench_seconds();
            status = pk_decompose(&context, &run, pk_matrix_view(rows, s->rows, width), &options, &results[t]);
            seconds[t] = fmin(seconds[t], bench_seconds() - start);
        }
        if (status)
            break;
        const pk_decomposition *d = &results[t];
        const double entry = t > 0 ? worst_entry(&results[0], d) : 0, tolerance = fmax(options.tolerance, PK_TOLERANCE),
                     used = fmax(d->worst_excess, entry / tolerance),
                     fewer = (double)results[0].points / (double)d->points;
        const int fails = !(used <= 1) || (!bench->quick && sizeof(pk_real) == 8 && fewer < least);
        printf("%s,%.0e,%.2f,%.4g,%.1f,%.1f,%.1e,%.1e,%.2g%s\n", s->name, tolerance, (double)d->points / cells,
               1e3 * seconds[t] / cells, fewer, seconds[0] / seconds[t], d->worst_relative, entry, used,
               fails ? " FAILED" : "");
        fflush(stdout);
        bench->failures += fails;
    }
    if (status)
        fprintf(stderr, "bench_tolerance: %s: %s\n", s->name, pk_message(&context));
    for (int t = 0; t < TOLERANCES; t++)
        pk_decomposition_release(&context, &results[t]);
    pk_release(&context, rows);
    pk_run_release(&context, &run);
    return !status;
}

int main(int argc, char **argv)
{
    const char *folder = NULL;
    bench_run bench;
    pk_context context;
    pk_dataset data, large;
    int made = 1;
    if (argc > 1 && argv[argc - 1][0] != '-')
        folder = argv[--argc];
    if (!bench_start(&bench, argc, argv, "bench_tolerance"))
        return 2;
    memset(&context, 0, sizeof context);
    memset(&data, 0, sizeof data);
    find_data(&context, folder, &data);
    enlarge(&data, &large);
    printf("# per row and step; fewer: points; faster: time; entry: the worst one, against 1e-10; used: of the tolerance\n"
           "network,tolerance,points,ms,fewer,faster,closure,entry,used\n");
    for (size_t i = 0; made && i < sizeof subjects / sizeof *subjects; i++) {
        subject s = subjects[i];
        if (bench.quick && s.large)
            continue;
        if (bench.quick) {
            s.steps = 3;
            s.rows = 2;
            s.training = 64;
        }
        made = measure(&bench, &s, s.large ? &large : &data);
    }
    pk_dataset_release(&context, &data);
    return made ? bench_finish(&bench) : 2;
}
