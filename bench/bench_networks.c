/* bench/bench_networks.c: what do the kinds of networks cost, which rule closes for which, and which representation of
 * a convolution's gradients is the cheaper one?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_networks.c -lblis -lm -o bench_networks
 *   ./bench_networks [--quick] [FOLDER]
 *
 * Test digits over training digits, mini-batches of 64 by SGD. FOLDER holds the digits as IDX files; without them made
 * data of the same shape serve; 28x28 images are the digits enlarged. Sizes are test rows x training rows x steps.
 * Lines NETWORK/RULE: the whole decomposition, all threads; the rate is that of its contraction's flops over the whole
 * time; the residual is the worst closure / max(1, |h|), which only the rule auto has to keep small. Lines
 * NETWORK/rows and /factored: gradients of layers used at several places materialized, or not, for the shape that
 * the line names; the residual is the largest difference of the two, relative to the largest contribution.
 */
#include "bench_run.h"
#include <float.h>

#define CLOSURE_BOUND (sizeof(pk_real) == 8 ? 1e-12 : 1e-4)
#define ENTRY_BOUND (sizeof(pk_real) == 8 ? 1e-11 : 1e-3)

/* One test row after the other comes from behind the training rows. */
typedef struct subject {
    const char *name, *network, *optimizer;
    double rate;
    size_t steps, rows, training;
    int large; /* 28x28 */
} subject;

static const subject subjects[] = {
    {"dense_tanh", "input 64; dense 32; tanh; dense 32; tanh; dense 10", "sgd", 0.5, 40, 32, 512, 0},
    {"dense_relu", "input 64; dense 32; relu; dense 32; relu; dense 10", "sgd", 0.5, 40, 32, 512, 0},
    {"conv_relu", "input 1x8x8; conv 8 3x3 pad=1; relu; max_pool 2; conv 16 3x3 pad=1; relu; flatten; dense 10",
     "sgd", 0.2, 40, 16, 512, 0},
    {"conv_tanh", "input 1x8x8; conv 8 3x3 pad=1; tanh; avg_pool 2; conv 16 3x3 pad=1; tanh; flatten; dense 10",
     "sgd", 0.2, 40, 16, 512, 0},
    {"layer_norm_relu", "input 64; dense 32; layer_norm; relu; dense 32; layer_norm; relu; dense 10", "sgd",
     0.2, 40, 16, 512, 0},
    {"transformer",
     "input 8x8; dense 16; position; residual( layer_norm; attention 2 ); residual( layer_norm; dense 32; "
     "relu; dense 16 ); mean_tokens; dense 10",
     "sgd", 0.1, 40, 16, 512, 0},
    {"transformer_adamw",
     "input 8x8; dense 16; position; residual( attention 2 shared nobias ); residual( dense 32; "
     "relu; dense 16 ); mean_tokens; dense 10",
     "adamw", 0.003, 40, 16, 512, 0},
    {"sign_surrogate", "input 64; dense 32; sign; dense 10", "sgd", 0.1, 40, 16, 512, 0},
    {"resnet9_8x8", RESNET("8x8"), "sgd", 0.1, 10, 4, 256, 0},
    {"resnet9_28x28", RESNET("28x28"), "sgd", 0.1, 5, 2, 256, 1},
};

/* Shapes of layers that are used at several places: channels and places change the cheapest representation. */
static const subject shapes[] = {
    {"8x8_16_16", "input 1x8x8; conv 16 3x3 pad=1; tanh; conv 16 3x3 pad=1; tanh; flatten; dense 10", "sgd",
     0.1, 5, 8, 512, 0},
    {"4x4_16_32", "input 1x8x8; conv 16 2x2 stride=2; tanh; conv 32 3x3 pad=1; tanh; flatten; dense 10", "sgd",
     0.1, 5, 8, 512, 0},
    {"2x2_64_64", "input 1x8x8; conv 64 4x4 stride=4; tanh; conv 64 3x3 pad=1; tanh; flatten; dense 10", "sgd",
     0.1, 5, 8, 512, 0},
    {"2x2_128_128", "input 1x8x8; conv 128 4x4 stride=4; tanh; conv 128 3x3 pad=1; tanh; flatten; dense 10",
     "sgd", 0.1, 5, 8, 512, 0},
    {"2_tokens_64", "input 2x32; dense 64; tanh; dense 64; tanh; flatten; dense 10", "sgd", 0.1, 5, 8, 512, 0},
    {"8_tokens_64", "input 8x8; dense 64; tanh; dense 64; tanh; flatten; dense 10", "sgd", 0.1, 5, 8, 512, 0},
};

typedef struct measured {
    pk_context context;
    pk_run run;
    pk_matrix inputs;
    pk_decompose_options options;
    pk_decomposition last;
    pk_status status;
} measured;

static void decompose(void *data, size_t repeats)
{
    measured *m = (measured *)data;
    for (size_t r = 0; r < repeats; r++) {
        pk_decomposition_release(&m->context, &m->last);
        m->context.memory_peak = m->context.memory_used;
        pk_status status = pk_decompose(&m->context, &m->run, m->inputs, &m->options, &m->last);
        if (status && status != PK_NOT_CLOSED)
            m->status = status;
    }
}

/* Trains; the test rows follow the training rows. Release with drop. */
static int make(measured *m, const subject *s, const pk_dataset *data, pk_real **rows)
{
    const job j = {s->name, s->network, s->optimizer, s->rate, s->steps, 64, s->training, s->rows, 0};
    int64_t items[DIGITS];
    const size_t width = pk_dataset_width(data), shape[2] = {data->inputs.shape[0], width};
    pk_dataset flat = *data; /* rows as vectors: other networks take them as tokens */
    flat.inputs = pk_array_view(data->inputs.type, 2, shape, data->inputs.data);
    memset(m, 0, sizeof *m);
    *rows = NULL;
    pk_status status = train_run(&m->context, &j, &flat, &m->run);
    if (!status)
        status = pk_allocate(&m->context, s->rows, width * sizeof **rows, "the test rows", rows);
    if (status) {
        fprintf(stderr, "bench_networks: %s: %s\n", s->name, pk_message(&m->context));
        return 0;
    }
    for (size_t i = 0; i < s->rows; i++)
        items[i] = (int64_t)(s->training + i);
    pk_dataset_inputs(data, items, s->rows, *rows);
    m->inputs = pk_matrix_view(*rows, s->rows, width);
    return 1;
}

static void drop(measured *m, pk_real *rows)
{
    pk_decomposition_release(&m->context, &m->last);
    pk_release(&m->context, rows);
    pk_run_release(&m->context, &m->run);
}

static int failed(const measured *m, const char *name)
{
    if (m->status)
        fprintf(stderr, "bench_networks: %s: %s\n", name, pk_message(&m->context));
    return m->status != PK_OK;
}

static int measure_rules(bench_run *bench, const subject *s, const pk_dataset *data)
{
    static const struct {
        const char *name;
        pk_quadrature quadrature;
    } rules[] = {
        {"auto", {PK_RULE_AUTO, 0}}, {"gauss8", {PK_RULE_GAUSS, 8}}, {"midpoint16", {PK_RULE_MIDPOINT, 16}}};
    measured m;
    pk_real *rows;
    bench_timing timing;
    char size[64], name[96];
    int made = make(&m, s, data, &rows);
    for (size_t r = 0; made && r < (s->large ? 1 : sizeof rules / sizeof *rules); r++) {
        const int judged = r == 0 && !m.run.graph.surrogate;
        m.options.quadrature = rules[r].quadrature;
        bench_time(bench, bench->threads, decompose, NULL, &m, &timing);
        made = !failed(&m, s->name);
        const pk_decomposition *d = &m.last;
        const double cells = (double)d->rows * (double)d->steps;
        snprintf(size, sizeof size, "%zux%zux%zu", s->rows, s->training, s->steps);
        snprintf(name, sizeof name, "%s/%s", s->name, rules[r].name);
        bench_line(bench, name, size, bench->threads, d->flops, timing, d->worst_closure,
                   judged ? CLOSURE_BOUND : DBL_MAX);
        printf(
            "# %s: P = %zu; per row and step %.1f points, %.1f pieces, %.3g ms; refused %zu; peak %.1f MiB\n",
            name, m.run.parameters, (double)d->points / cells, (double)d->pieces / cells,
            1e3 * timing.minimum / cells, d->refused, (double)m.context.memory_peak / 1048576.0);
    }
    drop(&m, rows);
    return made;
}

static int measure_representations(bench_run *bench, const subject *s, const pk_dataset *data)
{
    static const struct {
        const char *name;
        pk_engine engine;
    } ways[] = {{"rows", PK_ENGINE_INTEGRATED}, {"factored", PK_ENGINE_FACTORED}, {"auto", PK_ENGINE_AUTO}};
    measured m;
    pk_real *rows;
    double *first = NULL;
    bench_timing timing[3];
    char size[64], name[96];
    int made = make(&m, s, data, &rows);
    for (size_t w = 0; made && w < 3; w++) {
        m.options.engine = ways[w].engine;
        bench_time(bench, bench->threads, decompose, NULL, &m, &timing[w]);
        made = !failed(&m, s->name);
        const size_t count = made ? m.last.rows * m.last.outputs * m.last.examples : 0;
        double worst = 0, largest = 0;
        if (w == 0 && made && pk_allocate(&m.context, count, sizeof *first, "entries", &first) == PK_OK)
            memcpy(first, m.last.by_example, count * sizeof *first);
        for (size_t i = 0; first && i < count; i++) {
            worst = fmax(worst, fabs(first[i] - m.last.by_example[i]));
            largest = fmax(largest, fabs(first[i]));
        }
        snprintf(size, sizeof size, "%zux%zux%zu", s->rows, s->training, s->steps);
        snprintf(name, sizeof name, "%s/%s", s->name, ways[w].name);
        bench_line(bench, name, size, bench->threads, m.last.flops, timing[w], worst / largest, ENTRY_BOUND);
    }
    if (made)
        printf("# %s: factored takes %.2f times as long as rows; auto %.2f times as long as the better one\n",
               s->name, timing[1].minimum / timing[0].minimum,
               timing[2].minimum / fmin(timing[0].minimum, timing[1].minimum));
    pk_release(&m.context, first);
    drop(&m, rows);
    return made;
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
    if (!bench_start(&bench, argc, argv, "bench_networks"))
        return 2;
    memset(&context, 0, sizeof context);
    memset(&data, 0, sizeof data);
    find_data(&context, folder, &data);
    enlarge(&data, &large);
    for (size_t i = 0; made && i < sizeof subjects / sizeof *subjects; i++) {
        subject s = subjects[i];
        if (bench.quick && s.large) {
            printf("# %s: left out, --quick\n", s.name);
            continue;
        }
        if (bench.quick) {
            s.steps = 2;
            s.rows = 2;
            s.training = 64;
        }
        made = measure_rules(&bench, &s, s.large ? &large : &data);
    }
    for (size_t i = 0; made && i < sizeof shapes / sizeof *shapes; i++) {
        subject s = shapes[i];
        if (bench.quick) {
            s.steps = 2;
            s.rows = 2;
            s.training = 64;
        }
        made = measure_representations(&bench, &s, &data);
    }
    pk_dataset_release(&context, &data);
    return made ? bench_finish(&bench) : 2;
}
