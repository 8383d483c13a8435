/* bench/bench_decompose.c: how long does a whole decomposition take, what of it is the contraction, and does
 * the cost grow linearly?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_decompose.c -lblis -lm \
 *      -o bench_decompose
 *   ./bench_decompose [--quick] [FOLDER]
 *
 * 100 test digits over 1437 training digits, 64-32-32-10: tanh and ReLU with 100 full-batch steps at rate 0.5
 * (by example; relu_layers also by step and by layer), tanh with 200 AdamW steps of batch 64 (reverse time).
 * FOLDER holds the digits as IDX files; without them made data of the same shape serve. Sizes are test rows x
 * training rows x steps. Lines:
 *
 *   tanh, relu, ...          the whole call; the rate is that of its contraction's flops over the whole time
 *   tanh_contraction, ...    the contraction alone, a thread's time, of the fastest call
 *   scale_steps, _rows, _batch  a tanh job with 5 Gauss nodes a step, one of its sizes over a factor of 16
 *
 * Flops are the least that the factored form needs, so that less work counts as speed: a row and step of n points costs 2
 * batch (n + 1) (W + C W) for widths W and C outputs, since first and last layers are summed over the points first; in
 * reverse time, where Phi is materialized, 2 batch C P.
 *
 * The residual is the worst closure / max(1, |h|); of the entries lines, the largest difference to the
 * reverse-time form with materialized tangent features, relative to the largest contribution.
 */
#include "bench_run.h"
#include <float.h>

#define CLOSURE_BOUND (sizeof(pk_real) == 8 ? 1e-12 : 1e-4)
#define FIXED_BOUND 1e-3 /* of 5 nodes */
#define ENTRY_BOUND (sizeof(pk_real) == 8 ? 1e-10 : 1e-3)

static const char tanh_network[] = "input 64; dense 32; tanh; dense 32; tanh; dense 10";
static const char relu_network[] = "input 64; dense 32; relu; dense 32; relu; dense 10";

/* What is measured, and the call that was fastest. */
typedef struct measured {
    pk_context context;
    const pk_run *run;
    pk_matrix inputs;
    pk_decompose_options options;
    pk_decomposition last, best; /* best: its numbers only */
    pk_status status;
} measured;

static double least_flops(const job *j, const measured *m)
{
    const double hidden = 32, outputs = CLASSES, batch = (double)(j->batch_size ? j->batch_size : j->training);
    const double steps = (double)m->best.rows * (double)m->best.steps;
    if (!pk_optimizer_stateless(&m->run->optimizer))
        return 2 * batch * steps * outputs * (double)m->run->graph.parameters;
    return 2 * batch * ((double)m->best.points + steps) * (hidden + outputs * hidden);
}

/* What a case leaves for comparisons. */
typedef struct outcome {
    double seconds; /* minimum */
} outcome;

/* ---- measuring -------------------------------------------------------------------------------------- */

static void decompose(void *data, size_t repeats)
{
    measured *m = (measured *)data;
    for (size_t r = 0; r < repeats; r++) {
        pk_decomposition_release(&m->context, &m->last);
        pk_status status = pk_decompose(&m->context, m->run, m->inputs, &m->options, &m->last);
        if (status && status != PK_NOT_CLOSED)
            m->status = status;
        if (m->best.passes == 0 || m->last.seconds < m->best.seconds)
            m->best = m->last;
    }
}

static void report_phases(const job *j, const measured *m, int threads)
{
    const pk_decomposition *d = &m->best;
    const double cells = (double)d->rows * (double)d->steps;
    const double beside = d->seconds_read + d->seconds_examples + d->seconds_test;
    const double all = beside + d->seconds_sums + d->seconds_contraction;
    printf("# %s with %d thread%s: %.4f s; of %.4f thread-seconds: read and update %.1f %%, examples %.1f %%, "
           "test side %.1f %% (in all %.1f %%), sums over nodes %.1f %%, contraction %.1f %%\n",
           j->name, threads, threads > 1 ? "s" : "", d->seconds, all, 100 * d->seconds_read / all,
           100 * d->seconds_examples / all, 100 * d->seconds_test / all, 100 * beside / all,
           100 * d->seconds_sums / all, 100 * d->seconds_contraction / all);
    printf(
        "# %s: per row and step %.2f points, %.2f pieces; refused %zu, passes %zu, worst closure %.2e (of one "
        "step %.2e), peak memory %.1f MiB\n",
        j->name, (double)d->points / cells, (double)d->pieces / cells, d->refused, d->passes, d->worst_closure,
        d->worst_step_closure, (double)m->context.memory_peak / 1048576.0);
    fflush(stdout);
}

/* The largest difference of a few rows' contributions to those of the reverse-time form, which shares
 * neither the hoisting nor the Hadamard products. NaN where that could not be computed. */
static double entry_difference(const measured *m, size_t rows, double *seconds, double *flops)
{
    measured other;
    double worst = 0, largest = 0;
    memset(&other, 0, sizeof other);
    other.run = m->run;
    other.inputs = pk_matrix_view(m->inputs.data, rows, m->inputs.cols);
    other.options.engine = PK_ENGINE_INTEGRATED;
    other.options.reverse_time = 1;
    decompose(&other, 1);
    const size_t count = rows * m->last.outputs * m->last.examples;
    const double *theirs = other.status ? NULL : other.last.by_example, *own = m->last.by_example;
    for (size_t i = 0; theirs && i < count; i++) {
        double difference = fabs(own[i] - theirs[i]);
        worst = difference <= worst ? worst : difference;
        largest = fabs(theirs[i]) <= largest ? largest : fabs(theirs[i]);
    }
    *seconds = other.last.seconds;
    *flops = other.last.flops;
    pk_decomposition_release(&other.context, &other.last);
    return theirs ? worst / largest : NAN;
}

/* 0 after an error. */
static int measure(bench_run *bench, const job *j, const pk_run *run, pk_matrix inputs, int threads,
                   int details, outcome *out)
{
    static measured m;
    bench_timing timing;
    char size[64], name[64];
    memset(&m, 0, sizeof m);
    m.run = run;
    m.inputs = inputs;
    m.context.threads = threads;
    m.options.keep[0] = PK_BY_EXAMPLE;
    m.options.keep[1] = j->layers ? PK_BY_STEP : 0;
    m.options.keep[2] = j->layers ? PK_BY_LAYER : 0;
    if (!details) { /* the same work, whatever the training does */
        m.options.quadrature.rule = PK_RULE_GAUSS;
        m.options.quadrature.nodes = 5;
    }
    bench_time(bench, threads, decompose, NULL, &m, &timing);
    if (m.status) {
        fprintf(stderr, "bench_decompose: %s: %s\n", j->name, pk_message(&m.context));
        pk_decomposition_release(&m.context, &m.last);
        return 0;
    }
    out->seconds = timing.minimum;
    snprintf(size, sizeof size, "%zux%zux%zu", inputs.rows, run->examples, run->steps);
    bench_line(bench, j->name, size, threads, least_flops(j, &m), timing, m.best.worst_closure,
               details ? CLOSURE_BOUND : FIXED_BOUND);
    if (details) {
        bench_timing part = timing;
        part.minimum = part.median = m.best.seconds_contraction / threads;
        part.peak_flops = timing.peak_flops * part.minimum / timing.minimum;
        part.uncertainty = 0;
        snprintf(name, sizeof name, "%s_contraction", j->name);
        bench_line(bench, name, size, threads, least_flops(j, &m), part, m.best.worst_closure, CLOSURE_BOUND);
        report_phases(j, &m, threads);
    }
    if (details && threads == 1 && pk_optimizer_stateless(&run->optimizer)) {
        double flops = 0;
        size_t rows = inputs.rows < 3 ? inputs.rows : 3;
        double difference = entry_difference(&m, rows, &timing.minimum, &flops);
        timing.median = timing.minimum;
        timing.peak_flops = timing.minimum * bench->peak[0].rate;
        timing.uncertainty = 0;
        snprintf(name, sizeof name, "%s_entries", j->name);
        snprintf(size, sizeof size, "%zux%zux%zu", rows, run->examples, run->steps);
        bench_line(bench, name, size, 1, flops, timing, difference, ENTRY_BOUND);
    }
    pk_decomposition_release(&m.context, &m.last);
    return 1;
}

/* Test rows follow the training rows. */
static pk_status test_rows(pk_context *context, const pk_dataset *data, size_t rows, pk_real **inputs)
{
    int64_t items[DIGITS - TRAINING];
    pk_status status = pk_allocate(context, rows, SIDE * SIDE * sizeof **inputs, "the test rows", inputs);
    for (size_t i = 0; i < rows; i++)
        items[i] = (int64_t)(TRAINING + i);
    if (!status)
        pk_dataset_inputs(data, items, rows, *inputs);
    return status;
}

/* A job with 1 thread and, with details, with all of them. *one is that of 1 thread. 0 after an error. */
static int measure_job(bench_run *bench, const job *j, const pk_dataset *data, int details, outcome *one)
{
    pk_context context;
    pk_run run;
    pk_real *inputs = NULL;
    int made = 0;
    memset(&context, 0, sizeof context);
    pk_status status = train_run(&context, j, data, &run);
    if (!status)
        status = test_rows(&context, data, j->rows, &inputs);
    if (status) {
        fprintf(stderr, "bench_decompose: %s: %s\n", j->name, pk_message(&context));
    } else {
        pk_matrix view = pk_matrix_view(inputs, j->rows, SIDE * SIDE);
        made = measure(bench, j, &run, view, 1, details, one);
        if (made && details && bench->threads > 1) {
            outcome all;
            made = measure(bench, j, &run, view, bench->threads, details, &all);
            if (made)
                printf("# %s: %d threads %.2f times one (minima)\n", j->name, bench->threads,
                       one->seconds / all.seconds);
        }
    }
    pk_release(&context, inputs);
    pk_run_release(&context, &run);
    return made;
}

/* One size over a factor of 16; the time per unit of it, relative to the smallest's. */
static int measure_scaling(bench_run *bench, const char *name, const job *base, const pk_dataset *data,
                           int axis)
{
    outcome each[5];
    for (size_t i = 0; i < 5; i++) {
        const size_t factor = (size_t)1 << i;
        job j = *base;
        j.name = name;
        j.steps *= axis == 0 ? factor : 1;
        j.rows *= axis == 1 ? factor : 1;
        j.training *= axis == 2 ? factor : 1;
        if (!measure_job(bench, &j, data, 0, &each[i]))
            return 0;
    }
    printf("# %s: minimum time per unit, relative to the smallest:", name);
    for (size_t i = 0; i < 5; i++)
        printf(" %.2f", each[i].seconds / (double)((size_t)1 << i) / each[0].seconds);
    printf("\n");
    return 1;
}

int main(int argc, char **argv)
{
    static const job jobs[] = {{"tanh", tanh_network, "sgd", 0.5, 100, 0, TRAINING, 100, 0},
                               {"relu", relu_network, "sgd", 0.5, 100, 0, TRAINING, 100, 0},
                               {"relu_layers", relu_network, "sgd", 0.5, 100, 0, TRAINING, 100, 1},
                               {"adamw", tanh_network, "adamw", 0.003, 200, 64, TRAINING, 100, 0}};
    static const job small = {"", tanh_network, "sgd", 0.5, 10, 0, 80, 20, 0};
    static const char *const scales[] = {"scale_steps", "scale_rows", "scale_batch"};
    const char *folder = NULL;
    bench_run bench;
    pk_context context;
    pk_dataset data;
    outcome out;
    int made = 1;
    if (argc > 1 && argv[argc - 1][0] != '-')
        folder = argv[--argc];
    if (!bench_start(&bench, argc, argv, "bench_decompose"))
        return 2;
    memset(&context, 0, sizeof context);
    memset(&data, 0, sizeof data);
    find_data(&context, folder, &data);
    for (size_t i = 0; made && i < sizeof jobs / sizeof *jobs; i++) {
        job j = jobs[i];
        if (bench.quick) {
            j.steps /= 20;
            j.rows = 10;
            j.training = 300;
        }
        made = measure_job(&bench, &j, &data, 1, &out);
    }
    for (int axis = 0; made && axis < 3; axis++) {
        job base = small;
        if (bench.quick) {
            base.steps = base.rows = 2;
            base.training = 16;
        }
        made = measure_scaling(&bench, scales[axis], &base, &data, axis);
    }
    pk_dataset_release(&context, &data);
    return made ? bench_finish(&bench) : 2;
}
