/* bench/bench_train.c: how long does an epoch of training take, and what does recording add?
 *
 *   cc -O2 -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_train.c -lblis -lm -o bench_train
 *   ./bench_train [--quick] [--job digits|wide] [--optimizer NAME] [--threads N] [--batch N] [--keep DIR] [FOLDER]
 *
 * digits: 64-32-32-10, tanh, 1437 digits, batch 32; wide: 784-128-10, ReLU, 6400 made examples, batch 64. Each with
 * SGD, momentum, Adam and AdamW, with a recording of every step (…_recorded) and without, with 1 thread and all. FOLDER
 * holds the digits as IDX files; without them made data of the same shape serve. Sizes are examples x parameters.
 *
 * The time is that of one epoch, without the first of a call: the checks of the data, the start of a recording and the
 * start of threads are paid once a call. --keep DIR leaves the recordings of one epoch each in DIR/JOB-OPTIMIZER, which
 * is how bench/peers/run_training.py gets weights, batches and rates.
 *
 * The residual is the largest difference of the weights after some steps to those of plain loops, relative to the
 * largest weight; it is infinite where recording or another number of threads changes a bit.
 */
#include "bench_run.h"

enum { WIDE = 784, WIDE_EXAMPLES = 6400, LAYERS = 3, CHECKED_STEPS = 10 };

/* What is trained, and how. */
typedef struct training {
    const char *name, *network;
    size_t widths[LAYERS + 1], layers, examples, batch_size;
    double (*activation)(double x);
    double (*slope)(double y); /* of the activation, from its value */
} training;

typedef struct rule {
    const char *name, *text;
    double rate;
} rule;

static double relu(double x)
{
    return x > 0 ? x : 0;
}

static double relu_slope(double y)
{
    return y > 0;
}

static double tanh_slope(double y)
{
    return 1 - y * y;
}

static const training trainings[] = {
    {"digits",
     "input 64; dense 32; tanh; dense 32; tanh; dense 10",
     {64, 32, 32, 10},
     3,
     TRAINING,
     32,
     tanh,
     tanh_slope},
    {"wide",
     "input 784; dense 128; relu; dense 10",
     {WIDE, 128, 10, 0},
     2,
     WIDE_EXAMPLES,
     64,
     relu,
     relu_slope},
};
static const rule rules[] = {{"sgd", "sgd", 0.1},
                             {"momentum", "sgd momentum=0.9", 0.02},
                             {"adam", "adam", 0.001},
                             {"adamw", "adamw", 0.001}};

/* What the command line chose. */
typedef struct choice {
    const char *job, *optimizer, *keep, *folder;
    size_t batch_size;
    int threads;
} choice;

/* ---- one call ------------------------------------------------------------------------------------------- */

typedef struct measured {
    pk_context context;
    const pk_graph *graph;
    const pk_dataset *data;
    const pk_real *initial;
    pk_real *weights;
    pk_train_options options;
    size_t per_epoch;
    double seconds, started; /* of all epochs but the first of each call; when the second began */
    pk_status status;
} measured;

static int on_step(void *user, size_t step, double objective, const pk_real *weights)
{
    measured *m = (measured *)user;
    (void)objective, (void)weights;
    if (step + 1 == m->per_epoch)
        m->started = bench_seconds();
    else if (step + 1 == m->options.steps)
        m->seconds += bench_seconds() - m->started;
    return 0;
}

static void train_steps(measured *m, size_t steps)
{
    m->options.steps = steps;
    memcpy(m->weights, m->initial, m->graph->parameters * sizeof *m->weights);
    const pk_status status = pk_train(&m->context, m->graph, m->data, &m->options, m->weights, NULL);
    m->status = m->status ? m->status : status;
    if (m->options.record)
        remove_run(m->options.record);
}

static void train_epochs(void *data, size_t repeats)
{
    measured *m = (measured *)data;
    train_steps(m, (repeats + 1) * m->per_epoch);
}

static double train_clock(void *data)
{
    return ((measured *)data)->seconds;
}

/* ---- the same in plain loops ---------------------------------------------------------------------------- */

/* gradient += that of one example; value holds the layers' values one after another. */
static void plain_example(const training *t, const double *w, const pk_real *input, int64_t label, double share,
                          double *value, double *cotangent, double *gradient)
{
    const double *layer = w;
    double *in = value, largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < t->widths[0]; i++)
        value[i] = (double)input[i];
    for (size_t l = 0; l < t->layers; l++) {
        const size_t from = t->widths[l], to = t->widths[l + 1];
        double *out = in + from;
        for (size_t j = 0; j < to; j++) {
            double z = layer[to * from + j];
            for (size_t i = 0; i < from; i++)
                z += layer[j * from + i] * in[i];
            out[j] = l + 1 < t->layers ? t->activation(z) : z;
        }
        layer += to * (from + 1);
        in = out;
    }
    for (size_t j = 0; j < t->widths[t->layers]; j++)
        largest = in[j] > largest ? in[j] : largest;
    for (size_t j = 0; j < t->widths[t->layers]; j++)
        sum += exp(in[j] - largest);
    for (size_t j = 0; j < t->widths[t->layers]; j++)
        cotangent[j] = share * (exp(in[j] - largest) / sum - ((int64_t)j == label));
    for (size_t l = t->layers; l-- > 0;) {
        const size_t from = t->widths[l], to = t->widths[l + 1];
        double before[1024];
        layer -= to * (from + 1);
        double *own = gradient + (layer - w);
        in -= from;
        for (size_t i = 0; i < from; i++)
            before[i] = 0;
        for (size_t j = 0; j < to; j++) {
            own[to * from + j] += cotangent[j];
            for (size_t i = 0; i < from; i++) {
                own[j * from + i] += cotangent[j] * in[i];
                before[i] += cotangent[j] * layer[j * from + i];
            }
        }
        for (size_t i = 0; l && i < from; i++)
            cotangent[i] = before[i] * t->slope(in[i]);
    }
}

static void plain_update(const pk_optimizer *o, double rate, size_t step, double g, double *w, double *m,
                         double *v)
{
    if (o->kind == PK_SGD) {
        *m = step ? o->momentum * *m + g : g;
        *w -= rate * *m;
        return;
    }
    *w -= rate * o->weight_decay * *w; /* decoupled: adam comes without */
    *m = o->beta1 * *m + (1 - o->beta1) * g;
    *v = o->beta2 * *v + (1 - o->beta2) * g * g;
    const double first = *m / (1 - pow(o->beta1, (double)step + 1));
    const double second = *v / (1 - pow(o->beta2, (double)step + 1));
    *w -= rate * first / (sqrt(second) + o->epsilon);
}

/* The largest difference to plain loops after some steps of the first epoch, in the order of its permutation. */
static double plain_difference(const training *t, const rule *r, const measured *m, size_t steps)
{
    const size_t P = m->graph->parameters, examples = t->examples;
    double *memory = (double *)calloc(4 * P + 4096, sizeof *memory), *w = memory, *g = w + P, *s = g + P;
    int64_t *order = (int64_t *)calloc(examples, sizeof *order);
    pk_real *input = (pk_real *)calloc(t->widths[0], sizeof *input);
    pk_random random = {m->options.seed, 0, 0};
    double worst = 0, largest = 0;
    for (size_t p = 0; memory && p < P; p++)
        w[p] = (double)m->initial[p];
    for (size_t i = 0; order && i < examples; i++)
        order[i] = (int64_t)i;
    if (!memory || !order || !input)
        worst = INFINITY;
    else
        pk_random_shuffle(&random, examples, order);
    for (size_t step = 0; worst == 0 && step < steps; step++) {
        memset(g, 0, P * sizeof *g);
        for (size_t b = 0; b < m->options.batch_size; b++) {
            const int64_t item = order[step * m->options.batch_size + b];
            pk_dataset_inputs(m->data, &item, 1, input);
            plain_example(t, w, input, ((const int64_t *)m->data->targets.data)[item],
                          1 / (double)m->options.batch_size, s + 2 * P, s + 2 * P + 2048, g);
        }
        for (size_t p = 0; p < P; p++)
            plain_update(&m->options.optimizer, r->rate, step, g[p], &w[p], &s[p], &s[P + p]);
    }
    for (size_t p = 0; worst < INFINITY && p < P; p++) {
        const double difference = fabs(w[p] - (double)m->weights[p]);
        worst = difference <= worst ? worst : difference;
        largest = fabs(w[p]) > largest ? fabs(w[p]) : largest;
    }
    free(memory);
    free(order);
    free(input);
    return worst / largest;
}

/* ---- cases ---------------------------------------------------------------------------------------------- */

/* Adam divides by the root of squares: where a gradient almost cancels, rounding decides its digits. */
static double bound(const rule *r)
{
    const int adam = strncmp(r->name, "adam", 4) == 0;
    return sizeof(pk_real) == 8 ? (adam ? 1e-8 : 1e-12) : adam ? 2e-2 : 1e-4;
}

/* Forward, weight gradient, and the cotangents of all layers but the first. */
static double flops(const training *t)
{
    double all = 0;
    for (size_t l = 0; l < t->layers; l++)
        all += (l ? 6.0 : 4.0) * (double)t->widths[l] * (double)t->widths[l + 1];
    return all * (double)t->examples;
}

/* One case; *bits (P) hold what its first steps lead to, or are compared with it. 0 after an error. */
static int measure(bench_run *bench, const training *t, const rule *r, const choice *chosen, measured *m,
                   const char *record, pk_real *bits, double *residual)
{
    const size_t P = m->graph->parameters;
    const size_t steps = m->per_epoch - 1 < CHECKED_STEPS ? m->per_epoch - 1 : CHECKED_STEPS;
    bench_timing timing;
    char name[80], size[64];
    m->options.record = record;
    m->options.record_float32 = record && sizeof(pk_real) == sizeof(float);
    m->options.on_step = NULL;
    train_steps(m, steps);
    if (!m->status && *residual < 0) {
        *residual = plain_difference(t, r, m, steps);
        memcpy(bits, m->weights, P * sizeof *bits);
    }
    const int same = memcmp(bits, m->weights, P * sizeof *bits) == 0;
    m->options.on_step = on_step;
    if (!m->status)
        bench_time(bench, m->context.threads, train_epochs, train_clock, m, &timing);
    if (m->status) {
        fprintf(stderr, "bench_train: %s, %s: %s\n", t->name, r->name, pk_message(&m->context));
        return 0;
    }
    snprintf(name, sizeof name, "%s_%s%s", t->name, r->name, record ? "_recorded" : "");
    snprintf(size, sizeof size, "%zux%zu", t->examples, P);
    bench_line(bench, name, size, m->context.threads, flops(t), timing, same ? *residual : INFINITY, bound(r));
    if (chosen->keep && record && m->context.threads == (chosen->threads ? chosen->threads : 1)) {
        char folder[600];
        snprintf(folder, sizeof folder, "%.400s/%s-%s", chosen->keep, t->name, r->name);
        m->options.record = folder;
        m->options.replace = 1;
        m->options.on_step = NULL;
        m->options.steps = m->per_epoch;
        memcpy(m->weights, m->initial, P * sizeof *m->weights);
        m->status = pk_train(&m->context, m->graph, m->data, &m->options, m->weights, NULL);
        m->options.replace = 0;
        if (m->status)
            fprintf(stderr, "bench_train: %s\n", pk_message(&m->context));
    }
    return !m->status;
}

/* 0 after an error. */
static int measure_training(bench_run *bench, const training *t, const rule *r, const choice *chosen,
                            const pk_dataset *all)
{
    const char *temporary = getenv("TMPDIR");
    char directory[512];
    pk_dataset rows;
    pk_graph graph;
    measured m;
    pk_real *initial = NULL, *bits = NULL;
    double residual = -1;
    memset(&graph, 0, sizeof graph);
    memset(&m, 0, sizeof m);
    snprintf(directory, sizeof directory, "%.400s/pathkernel-bench-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(directory)) {
        perror(directory);
        return 0;
    }
    (void)rmdir(directory); /* a recording makes it */
    m.graph = &graph;
    m.data = &rows;
    m.options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    m.options.schedule.rate = r->rate;
    m.options.batch_size = chosen->batch_size ? chosen->batch_size : t->batch_size;
    m.options.user = &m;
    m.per_epoch = (t->examples - 1) / m.options.batch_size + 1;
    pk_status status = pk_dataset_rows(&m.context, all, 0, t->examples, &rows);
    if (!status)
        status = pk_optimizer_parse(&m.context, r->text, &m.options.optimizer);
    if (strcmp(r->name, "adam") == 0) /* plain_update knows decoupled decay only */
        m.options.optimizer.weight_decay = 0;
    if (!status)
        status = pk_network_parse(&m.context, t->network, &graph);
    if (!status)
        status = pk_allocate(&m.context, graph.parameters, sizeof *initial, "the initial weights", &initial);
    if (!status)
        status = pk_allocate(&m.context, graph.parameters, sizeof *bits, "weights to compare", &bits);
    if (!status)
        status = pk_allocate(&m.context, graph.parameters, sizeof *m.weights, "the weights", &m.weights);
    if (!status)
        status = pk_network_initialize(&m.context, &graph, 1, initial);
    if (status)
        fprintf(stderr, "bench_train: %s: %s\n", t->name, pk_message(&m.context));
    m.initial = initial;
    const int one = chosen->threads ? chosen->threads : 1, most = chosen->threads ? one : bench->threads;
    int made = !status;
    for (int threads = one; made && threads <= most; threads = threads < most ? most : most + 1)
        for (int recorded = 0; made && recorded < 2; recorded++) {
            m.context.threads = threads;
            made = measure(bench, t, r, chosen, &m, recorded ? directory : NULL, bits, &residual);
        }
    pk_release(&m.context, m.weights);
    pk_release(&m.context, bits);
    pk_release(&m.context, initial);
    pk_graph_release(&m.context, &graph);
    return made;
}

/* Ten classes around centres of their own. 0 where memory is missing. */
static int make_wide(pk_dataset *data)
{
    const size_t shape[2] = {WIDE_EXAMPLES, WIDE};
    pk_real *inputs = (pk_real *)malloc((WIDE_EXAMPLES + CLASSES) * WIDE * sizeof *inputs);
    int64_t *labels = (int64_t *)malloc(WIDE_EXAMPLES * sizeof *labels);
    uint64_t state = 1;
    memset(data, 0, sizeof *data);
    data->inputs = pk_array_view(sizeof(pk_real) == 8 ? PK_FLOAT64 : PK_FLOAT32, 2, shape, inputs);
    data->targets = pk_array_view(PK_INT64, 1, shape, labels);
    if (!inputs || !labels)
        return 0;
    const pk_real *centres = inputs + WIDE_EXAMPLES * WIDE;
    for (size_t i = (WIDE_EXAMPLES + CLASSES) * WIDE; i-- > 0;) { /* the centres first, behind the examples */
        state = state * 6364136223846793005u + 1442695040888963407u;
        const size_t row = i / WIDE, label = row % CLASSES;
        const double x = (double)(state >> 11) / 9007199254740992.0;
        inputs[i] =
            (pk_real)(row >= WIDE_EXAMPLES ? x : 0.3 * (double)centres[label * WIDE + i % WIDE] + 0.7 * x);
        if (row < WIDE_EXAMPLES)
            labels[row] = (int64_t)label;
    }
    return 1;
}

/* Takes the arguments that bench_start does not know; 0 where one has no value. */
static int choose(int *argc, char **argv, choice *chosen)
{
    int kept = 1;
    memset(chosen, 0, sizeof *chosen);
    for (int i = 1; i < *argc; i++) {
        const char **text = strcmp(argv[i], "--job") == 0         ? &chosen->job
                            : strcmp(argv[i], "--optimizer") == 0 ? &chosen->optimizer
                            : strcmp(argv[i], "--keep") == 0      ? &chosen->keep
                                                                  : NULL;
        const int number = strcmp(argv[i], "--threads") == 0 || strcmp(argv[i], "--batch") == 0;
        if ((text || number) && i + 1 >= *argc)
            return 0;
        if (text)
            *text = argv[++i];
        else if (strcmp(argv[i], "--threads") == 0)
            chosen->threads = atoi(argv[++i]);
        else if (number)
            chosen->batch_size = (size_t)atoi(argv[++i]);
        else if (argv[i][0] != '-')
            chosen->folder = argv[i];
        else
            argv[kept++] = argv[i];
    }
    *argc = kept;
    return 1;
}

int main(int argc, char **argv)
{
    bench_run bench;
    choice chosen;
    pk_context context;
    pk_dataset digits, wide;
    if (!choose(&argc, argv, &chosen) || !bench_start(&bench, argc, argv, "bench_train"))
        return 2;
    memset(&context, 0, sizeof context);
    memset(&digits, 0, sizeof digits);
    find_data(&context, chosen.folder, &digits);
    int made = make_wide(&wide);
    for (size_t i = 0; i < sizeof trainings / sizeof *trainings; i++)
        for (size_t k = 0; made && k < sizeof rules / sizeof *rules; k++) {
            training t = trainings[i];
            if ((chosen.job && strcmp(chosen.job, t.name) != 0) ||
                (chosen.optimizer && strcmp(chosen.optimizer, rules[k].name) != 0))
                continue;
            t.examples = bench.quick ? 8 * t.batch_size + 1 : t.examples;
            made = measure_training(&bench, &t, &rules[k], &chosen, i ? &wide : &digits);
        }
    free((void *)wide.inputs.data);
    free((void *)wide.targets.data);
    pk_dataset_release(&context, &digits);
    return made ? bench_finish(&bench) : 2;
}
