/* The kernel family on a recorded run: each kernel by its definition with Jacobians and plain loops, over networks, optimizers,
 * output modes, layers and maps; rules along the step; both Grams in one pass; refusals. */
#include "trained.h"

enum { M = 4, N = 6, NODES = 24, MODES = 6 };

/* ---- the definition ------------------------------------------------------------------------------------ */

typedef struct side {
    int train;
    size_t count;
    const pk_real *rows;
    const int64_t *labels;
    pk_dataset data; /* with targets of the loss */
} side;

typedef struct truth {
    trained *t;
    side side[2];
    pk_kernel_options options;
    size_t layer; /* by layer: only the weights of this column */
    double *gram; /* slots x rows C x columns C, or slots x rows x columns for kernels without outputs */
    pk_real *w, *next, *at, *feature[2];
} truth;

static int is_loss(pk_kernel_kind kind)
{
    return kind == PK_KERNEL_LOSS_PATH || kind == PK_KERNEL_TRACIN;
}

static size_t copies_of(const truth *a)
{
    return is_loss(a->options.kind) ? 1 : a->t->run.outputs;
}

/* Gradients of a side's rows at weights: rows x copies x P. */
static void gradients(truth *a, int s, const pk_real *at)
{
    trained *t = a->t;
    const size_t P = t->run.parameters, C = t->run.outputs, D = t->graph.input_width, n = a->side[s].count;
    const pk_matrix none = pk_matrix_view(NULL, 0, 0);
    if (!is_loss(a->options.kind)) {
        assert_ok(&t->context,
                  pk_jacobian(&t->context, &t->graph, at, pk_matrix_view((pk_real *)a->side[s].rows, n, D),
                              pk_matrix_view(a->feature[s], n * C, P), none));
    } else {
        int64_t items[N];
        for (size_t i = 0; i < n; i++)
            items[i] = (int64_t)i;
        const pk_batch batch = {n, items, NULL};
        assert_ok(&t->context,
                  pk_loss_gradients_with(&t->context, &t->graph, &t->run.criterion, at, &a->side[s].data,
                                         &batch, NULL, pk_matrix_view(a->feature[s], n, P)));
    }
    if (!a->options.by_layer)
        return;
    for (size_t b = 0; b < t->graph.block_count; b++) {
        const pk_weight_block *block = &t->graph.blocks[b];
        for (size_t r = 0; block->column != (int)a->layer && r < n * copies_of(a); r++)
            memset(a->feature[s] + r * P + block->first, 0, block->count * sizeof(pk_real));
    }
}

/* gram += omega c c' < features >. */
static void add_products(truth *a, size_t slot, double omega, const double *c)
{
    const size_t P = a->t->run.parameters, k = copies_of(a), rows = a->side[0].count * k,
                 columns = a->side[1].count * k;
    const pk_kernel_kind kind = a->options.kind;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            double sum = 0;
            for (size_t p = 0; p < P; p++)
                sum += (double)a->feature[0][i * P + p] * (double)a->feature[1][j * P + p];
            if (kind == PK_KERNEL_EPK && a->side[0].train && !a->options.unweighted)
                sum *= c[i / k];
            if ((kind == PK_KERNEL_EPK || kind == PK_KERNEL_TRACIN) && a->side[1].train &&
                !a->options.unweighted)
                sum *= c[j / k];
            a->gram[(slot * rows + i) * columns + j] += omega * sum;
        }
}

/* Where the one hidden layer of relu units, `units` of them, changes sign for some row: sorted, from 0 to 1. */
static size_t pieces_of(const truth *a, int units, double *ends)
{
    const size_t D = a->t->graph.input_width;
    size_t count = 1;
    ends[0] = 0;
    for (int s = 0; s < 2; s++)
        for (size_t i = 0; i < a->side[s].count; i++)
            for (int u = 0; u < units; u++) {
                double z[2];
                for (int e = 0; e < 2; e++) {
                    const pk_real *w = e ? a->next : a->w;
                    z[e] = (double)w[(size_t)units * D + (size_t)u];
                    for (size_t d = 0; d < D; d++)
                        z[e] += (double)w[(size_t)u * D + d] * (double)a->side[s].rows[i * D + d];
                }
                if ((z[0] < 0) != (z[1] < 0))
                    ends[count++] = z[0] / (z[0] - z[1]);
            }
    ends[count] = 1;
    for (size_t i = 1; i < count; i++)
        for (size_t j = i; j > 1 && ends[j] < ends[j - 1]; j--) {
            const double swap = ends[j];
            ends[j] = ends[j - 1], ends[j - 1] = swap;
        }
    return count;
}

/* The rule's nodes and weights on [0, 1]. */
static size_t nodes_of(const truth *a, int units, double *node, double *weight)
{
    const pk_quadrature rule = a->options.quadrature;
    const size_t n = (size_t)rule.nodes;
    if (rule.rule == PK_RULE_LEFT) {
        node[0] = 0, weight[0] = 1;
        return 1;
    }
    if (rule.rule == PK_RULE_GAUSS) {
        pk_gauss_legendre((int)n, node, weight);
        return n;
    }
    if (rule.rule != PK_RULE_AUTO) {
        for (size_t q = 0; q < n; q++) {
            const int ends = rule.rule == PK_RULE_TRAPEZOID;
            node[q] = ends ? (double)q / (double)(n - 1) : ((double)q + 0.5) / (double)n;
            weight[q] = ends ? (q == 0 || q == n - 1 ? 0.5 : 1) / (double)(n - 1) : 1 / (double)n;
        }
        return n;
    }
    double ends[200];
    const size_t pieces = pieces_of(a, units, ends), each = units ? 12 : NODES;
    for (size_t p = 0; p < pieces; p++) {
        pk_gauss_legendre((int)each, node + p * each, weight + p * each);
        for (size_t q = p * each; q < (p + 1) * each; q++) {
            node[q] = ends[p] + (ends[p + 1] - ends[p]) * node[q];
            weight[q] *= ends[p + 1] - ends[p];
        }
    }
    return pieces * each;
}

/* Fills gram; units: of the one hidden relu layer, 0: the network is smooth. */
static void define(truth *a, int units)
{
    trained *t = a->t;
    const pk_run *run = &t->run;
    const size_t P = run->parameters, S = run->steps;
    const pk_kernel_options *o = &a->options;
    const int alone = o->kind == PK_KERNEL_NTK, mean = o->kind == PK_KERNEL_PATH_AVERAGE;
    const size_t count = o->steps ? o->step_count : alone ? 1 : mean ? S + 1 : S, slots = alone ? count : 1;
    static double node[2000], weight[2000];
    pk_replay replay;
    assert_ok(&t->context, pk_replay_prepare(&t->context, run, 0, &replay));
    a->w = FIXTURE_NEW(pk_real, P), a->next = FIXTURE_NEW(pk_real, P), a->at = FIXTURE_NEW(pk_real, P);
    for (int s = 0; s < 2; s++)
        a->feature[s] = FIXTURE_NEW(pk_real, a->side[s].count * copies_of(a) * P);
    a->gram = FIXTURE_NEW(double, slots * a->side[0].count * copies_of(a) * a->side[1].count * copies_of(a));
    for (size_t k = 0; k < count; k++) {
        const size_t s = o->steps ? o->steps[k] : alone ? S : k;
        double c[N] = {0};
        assert_ok(&t->context, pk_replay_weights(&t->context, &replay, s, a->w));
        if (alone || mean) {
            gradients(a, 0, a->w), gradients(a, 1, a->w);
            add_products(a, alone ? k : 0, mean ? 1 / (double)count : 1, c);
            continue;
        }
        assert_ok(&t->context, pk_replay_weights(&t->context, &replay, s + 1, a->next));
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        for (size_t b = 0; b < batch.count; b++)
            c[batch.items[b]] += batch.weights ? batch.weights[b] : 1 / (double)batch.count;
        const double eta = run->learning_rates[s] * pk_run_gradient_scale(run, s);
        const size_t nodes = o->kind == PK_KERNEL_TRACIN ? 1 : nodes_of(a, units, node, weight);
        for (size_t q = 0; q < nodes; q++) {
            for (size_t p = 0; p < P; p++)
                a->at[p] = (pk_real)((double)a->w[p] + node[q] * ((double)a->next[p] - (double)a->w[p]));
            for (int e = 0; e < 2; e++) {
                const int moves =
                    o->kind != PK_KERNEL_TRACIN && !(o->kind == PK_KERNEL_EPK && a->side[e].train);
                gradients(a, e, moves ? a->at : a->w);
            }
            add_products(a, 0, o->kind == PK_KERNEL_TRACIN ? eta : eta * weight[q], c);
        }
    }
    pk_replay_release(&t->context, &replay);
    free(a->w), free(a->next), free(a->at), free(a->feature[0]), free(a->feature[1]);
}

/* What a mode makes of the C x C numbers of rows i and j of a slot. */
static double reduce(const truth *a, size_t slot, size_t i, size_t j, pk_kernel_outputs mode)
{
    const size_t C = copies_of(a), ld = a->side[1].count * C;
    const double *at = a->gram + (slot * a->side[0].count * C + i * C) * ld + j * C;
    double trace = 0, sum = 0;
    for (size_t k = 0; k < C; k++)
        for (size_t l = 0; l < C; l++) {
            sum += at[k * ld + l];
            trace += k == l ? at[k * ld + l] : 0;
        }
    return mode == PK_OUTPUTS_NONE    ? at[0]
           : mode == PK_OUTPUTS_TRACE ? trace
           : mode == PK_OUTPUTS_MEAN  ? trace / (double)C
           : mode == PK_OUTPUTS_SUM   ? sum
           : mode == PK_OUTPUTS_LABEL ? at[(size_t)a->side[0].labels[i] * ld + (size_t)a->side[1].labels[j]]
                                      : at[a->options.output * ld + a->options.output];
}

/* ---- sides --------------------------------------------------------------------------------------------- */

/* Rows of a file, with labels or with targets of the loss, as the run's own. */
typedef struct rows {
    pk_dataset labels, targets;
    int64_t *label;
} rows;

static rows test_rows(const trained *t)
{
    static size_t shape[2], vector[2], label[1];
    rows r;
    memset(&r, 0, sizeof r);
    shape[0] = vector[0] = label[0] = M;
    shape[1] = t->graph.input_width, vector[1] = t->run.outputs;
    r.label = FIXTURE_NEW(int64_t, M);
    for (size_t i = 0; i < M; i++)
        r.label[i] = (int64_t)((2 * i + 1) % t->run.outputs);
    r.labels.inputs = r.targets.inputs = pk_array_view(REAL_TYPE, 2, shape, t->test);
    r.labels.targets = pk_array_view(PK_INT64, 1, label, r.label);
    r.targets.targets = t->run.loss == PK_SQUARED
                            ? pk_array_view(t->run.train.targets.type, 2, vector, t->numbers)
                            : r.labels.targets;
    return r;
}

static side side_of(const trained *t, const rows *r, int train)
{
    side s;
    memset(&s, 0, sizeof s);
    s.train = train;
    s.count = train ? N : M;
    s.rows = train ? t->train : t->test;
    s.labels = train ? t->labels : r->label;
    s.data = train ? t->run.train : r->targets;
    return s;
}

static pk_kernel_options plain(pk_kernel_kind kind, pk_kernel_outputs outputs)
{
    pk_kernel_options options;
    memset(&options, 0, sizeof options);
    options.kind = kind;
    options.outputs = outputs;
    return options;
}

static size_t numbers_of(trained *t, const pk_dataset *left, const pk_dataset *right,
                         const pk_kernel_options *options, size_t *shape, int *rank)
{
    size_t numbers = 1;
    assert_ok(&t->context, pk_kernel_shape(&t->context, &t->run, left, right, options, shape, rank));
    for (int i = 0; i < *rank; i++)
        numbers *= shape[i];
    return numbers;
}

FIXTURE double *compute(trained *t, const pk_dataset *left, const pk_dataset *right,
                        const pk_kernel_options *options, pk_kernel_report *report)
{
    size_t shape[6];
    int rank;
    double *gram = FIXTURE_NEW(double, numbers_of(t, left, right, options, shape, &rank));
    assert_ok(&t->context, pk_kernels(&t->context, &t->run, left, right, 1, options, &gram, report));
    return gram;
}

/* ---- tests --------------------------------------------------------------------------------------------- */

#define RUN(network, loss, optimizer, tokens, rate, keep)                         \
    {                                                                             \
        network, loss, optimizer, tokens, rate, 0.5, N, 4, 4, keep, 7 + tokens, 0 \
    }
static const struct job {
    recipe recipe;
    int units; /* of one hidden relu layer */
} jobs[] = {
    {RUN("input 3; dense 5; tanh; dense 3", "squared", "sgd", 0, 0.1, 0), 0},
    {RUN("input 3; dense 5; tanh; dense 3; log_softmax", "nll", "sgd momentum=0.9 nesterov=1", 0, 0.1, 3), 0},
    {RUN("input 3; dense 4; gelu; dense 3; silu; dense 2", "softmax_cross_entropy", "adam", 0, 0.02, 0), 0},
    {RUN("input 3; dense 4 nobias; sigmoid; layer_norm; dense 2", "squared", "adamw weight_decay=0.1", 0, 0.02,
         2),
     0},
    {RUN("input 1x4x4; conv 2 3x3; tanh; flatten; residual( dense 8; tanh ); dense 2", "squared", "sgd", 0, 0.1,
         0),
     0},
    {RUN("input 3; embedding 6 4; residual( attention 2 ); mean_tokens; dense 2", "squared", "sgd momentum=0.9",
         6, 0.1, 0),
     0},
    {RUN("input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh; dense 2", "squared", "adam", 0, 0.02, 0), 0},
    {RUN("input 3; dense 6; relu; dense 3", "softmax_cross_entropy", "sgd", 0, 0.7, 0), 6},
    {RUN("input 3; dense 6; leaky_relu 0.2; dense 2", "squared", "adamw", 0, 0.1, 3), 6},
    {RUN("input 3; dense 5; tanh; dense 3", "softmax_cross_entropy label_smoothing=0.2 weight=1,2,0.5",
         "rmsprop momentum=0.7 maximize=1", 0, 0.02, 0),
     0},
    {RUN("input 3; dense 5; tanh; dense 3; log_softmax", "nll weight=1,3,0.5 ignore_index=0", "nadam", 0, 0.02,
         3),
     0},
    {RUN("input 3; dense 4; tanh; dense 2", "squared", "adam amsgrad=1", 0, 0.02, 2), 0},
};
enum { JOBS = (int)(sizeof jobs / sizeof *jobs) };

static const pk_kernel_outputs modes[MODES] = {PK_OUTPUTS_TRACE, PK_OUTPUTS_FULL,  PK_OUTPUTS_MEAN,
                                               PK_OUTPUTS_SUM,   PK_OUTPUTS_LABEL, PK_OUTPUTS_ONE};

/* One kernel in all its modes, of one call, against the definition; the worst difference, of the largest entry. */
static double check_kernel(trained *t, const struct job *job, pk_kernel_options options, int left, int right)
{
    rows r = test_rows(t);
    const size_t C = t->run.outputs;
    truth a;
    memset(&a, 0, sizeof a);
    a.t = t;
    a.options = options;
    a.options.output = C - 1;
    a.side[0] = side_of(t, &r, left), a.side[1] = side_of(t, &r, right);
    const pk_dataset *file = is_loss(options.kind) ? &r.targets : &r.labels;
    const pk_dataset *x = left ? NULL : file, *y = right ? NULL : file;
    const int loss = is_loss(options.kind), labels = t->run.loss != PK_SQUARED || (!left && !right);
    pk_kernel_options all[MODES];
    double *grams[MODES], worst = 0, largest = 0;
    pk_kernel_report reports[MODES];
    int count = 0;
    for (int m = 0; m < (loss ? 1 : MODES); m++)
        if (modes[m] != PK_OUTPUTS_LABEL || labels) {
            size_t shape[6];
            int rank;
            all[count] = a.options;
            all[count].outputs = loss ? PK_OUTPUTS_NONE : modes[m];
            grams[count] = FIXTURE_NEW(double, numbers_of(t, x, y, &all[count], shape, &rank));
            count++;
        }
    assert_ok(&t->context, pk_kernels(&t->context, &t->run, x, y, (size_t)count, all, grams, reports));
    const size_t slots = options.kind == PK_KERNEL_NTK && options.steps ? options.step_count : 1;
    const size_t layers = options.by_layer ? t->graph.columns : 1, n = a.side[0].count, m = a.side[1].count;
    for (size_t layer = 0; layer < layers; layer++) {
        a.layer = layer;
        define(&a, job->units);
        largest = fmax(largest, fixture_largest(slots * n * m * copies_of(&a) * copies_of(&a), a.gram));
        for (int g = 0; g < count; g++)
            for (size_t slot = 0; slot < slots; slot++)
                for (size_t i = 0; i < n; i++)
                    for (size_t j = 0; j < m; j++) {
                        const double *from = grams[g] + (slot * layers + layer) * n * m *
                                                            (all[g].outputs == PK_OUTPUTS_FULL ? C * C : 1);
                        if (all[g].outputs != PK_OUTPUTS_FULL) {
                            worst = fmax(worst, fabs(from[i * m + j] - reduce(&a, slot, i, j, all[g].outputs)));
                            continue;
                        }
                        for (size_t k = 0; k < C; k++)
                            for (size_t l = 0; l < C; l++)
                                worst = fmax(worst, fabs(from[((i * C + k) * m + j) * C + l] -
                                                         a.gram[((slot * n + i) * C + k) * m * C + j * C + l]));
                    }
        free(a.gram);
    }
    if (left == right && !(options.kind == PK_KERNEL_TRACIN && left && !options.unweighted))
        for (int g = 0; g < count; g++)
            for (size_t i = 0; all[g].outputs != PK_OUTPUTS_FULL && i < n * m; i++)
                if (grams[g][i] != grams[g][i % m * m + i / m])
                    fail_msg("%s is not symmetric", pk_kernel_name(options.kind));
    for (int g = 0; g < count; g++) {
        assert_true(reports[g].error <= EITHER(1e-10, 1e-4) && reports[g].refused == 0);
        free(grams[g]);
    }
    free(r.label);
    return worst / largest;
}

static void test_definition(void **state)
{
    (void)state;
    static const pk_kernel_kind kinds[] = {PK_KERNEL_NTK, PK_KERNEL_PATH,      PK_KERNEL_PATH_AVERAGE,
                                           PK_KERNEL_EPK, PK_KERNEL_LOSS_PATH, PK_KERNEL_TRACIN};
    static const size_t some[] = {2, 0, 3}, twice[] = {1, 3, 1};
    /* Then four of them with parameter groups, one of which is frozen, recorded in single precision where all steps are kept. */
    static const char *const groups[] = {"0 rate=0.5", "1 frozen", "3 weight_decay=0.1"};
    static const int again[] = {0, 6, 7, 8};
    double all = 0;
    for (int number = 0; number < JOBS + 4; number++) {
        const int j = number < JOBS ? number : again[number - JOBS];
        trained t;
        const trained_more grouped = {
            .groups = groups, .group_count = 3, .float32 = !jobs[j].recipe.keep_every};
        if (number < JOBS)
            trained_make(&jobs[j].recipe, &t);
        else
            trained_make_with(&jobs[j].recipe, &grouped, &t);
        assert_true(number < JOBS ||
                    (t.run.groups.count == 3 &&
                     (jobs[j].recipe.keep_every ? t.run.keep_every > 1 : t.run.weights.type == PK_FLOAT32)));
        double worst = 0;
        for (int kind = 0; kind < 6; kind++)
            for (int sides = 0; sides < 4; sides++)
                for (int how = 0; how < 4; how++) {
                    pk_kernel_options options = plain(kinds[kind], PK_OUTPUTS_NONE);
                    options.by_layer = how == 1;
                    if (how == 2)
                        options.steps = kinds[kind] == PK_KERNEL_NTK ? some : twice, options.step_count = 3;
                    options.unweighted =
                        how == 3 && (kinds[kind] == PK_KERNEL_EPK || kinds[kind] == PK_KERNEL_TRACIN);
                    worst = fmax(worst, check_kernel(&t, &jobs[j], options, sides & 1, sides >> 1));
                }
        print_message("%-75s %.2g\n", jobs[j].recipe.network, worst);
        all = fmax(all, worst);
        trained_release(&t);
    }
    assert_true(all <= ROUNDING(1e-11));
}

/* ---- what is fed to layers ----------------------------------------------------------------------------- */

/* The values in front of the matrix layers of a graph that ends there: the network cut off, by its line. */
static void fed(trained *t, const char *line, const pk_real *w, const pk_real *x, size_t n, pk_real *out)
{
    pk_graph part;
    memset(&part, 0, sizeof part);
    assert_ok(&t->context, pk_network_parse(&t->context, line, &part));
    assert_ok(&t->context,
              pk_graph_evaluate(&t->context, &part, w, pk_matrix_view((pk_real *)x, n, part.input_width),
                                pk_matrix_view(out, n, part.output_width)));
    pk_graph_release(&t->context, &part);
}

static const struct feed {
    recipe recipe;
    int layers;
    const char *before[4]; /* the network in front of each matrix layer; NULL: the input itself */
    size_t widths[4];
    int tokens; /* the first layer is fed unit vectors of so many tokens */
} feeds[] = {
    {RUN("input 3; dense 5; tanh; dense 3; log_softmax", "nll", "sgd", 0, 0.1, 2),
     2,
     {NULL, "input 3; dense 5; tanh"},
     {3, 5},
     0},
    {RUN("input 1x4x4; conv 2 3x3; tanh; flatten; layer_norm; dense 2", "squared", "adam", 0, 0.02, 0),
     2,
     {NULL, "input 1x4x4; conv 2 3x3; tanh; flatten; layer_norm"},
     {16, 8},
     0},
    {RUN("input 3; embedding 6 4; position; dense 2; mean_tokens", "squared", "sgd", 6, 0.1, 0),
     2,
     {NULL, "input 3; embedding 6 4; position; flatten"},
     {3, 12},
     6},
    {RUN("input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh; dense 2", "squared", "sgd", 0, 0.1, 0),
     3,
     {NULL, "input 3; dense 3; tanh", "input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh"},
     {3, 3, 3},
     0},
};

static void test_fed(void **state)
{
    (void)state;
    for (size_t f = 0; f < sizeof feeds / sizeof *feeds; f++) {
        const struct feed *feed = &feeds[f];
        trained t;
        trained_make(&feed->recipe, &t);
        rows r = test_rows(&t);
        static const size_t steps[] = {4, 0};
        const size_t P = t.run.parameters, layers = (size_t)feed->layers;
        pk_kernel_options options[3] = {plain(PK_KERNEL_EMBEDDING, PK_OUTPUTS_NONE),
                                        plain(PK_KERNEL_EMBEDDING, PK_OUTPUTS_NONE),
                                        plain(PK_KERNEL_CONJUGATE, PK_OUTPUTS_NONE)};
        double whole[2 * M * N], by_layer[2 * 4 * M * N], last[2 * M * N];
        double *const grams[3] = {whole, by_layer, last};
        for (int k = 0; k < 3; k++)
            options[k].steps = steps, options[k].step_count = 2;
        options[1].by_layer = 1;
        options[2].append_one = 1;
        size_t shape[6];
        int rank;
        assert_int_equal(numbers_of(&t, &r.labels, NULL, &options[1], shape, &rank), 2 * layers * M * N);
        assert_true(rank == 4 && shape[0] == 2 && shape[1] == layers && shape[2] == M && shape[3] == N);
        assert_ok(&t.context, pk_kernels(&t.context, &t.run, &r.labels, NULL, 3, options, grams, NULL));
        pk_real *w = FIXTURE_NEW(pk_real, P), x[2][N * 16];
        pk_replay replay;
        assert_ok(&t.context, pk_replay_prepare(&t.context, &t.run, 0, &replay));
        for (size_t k = 0; k < 2; k++) {
            assert_ok(&t.context, pk_replay_weights(&t.context, &replay, steps[k], w));
            double sum[M * N] = {0};
            for (size_t l = 0; l < layers; l++) {
                for (int s = 0; s < 2; s++) {
                    const pk_real *from = s ? t.train : t.test;
                    if (feed->before[l])
                        fed(&t, feed->before[l], w, from, s ? N : M, x[s]);
                    else
                        memcpy(x[s], from, (s ? N : M) * feed->widths[0] * sizeof *from);
                }
                for (size_t i = 0; i < M; i++)
                    for (size_t j = 0; j < N; j++) {
                        double dot = 0;
                        for (size_t d = 0; d < feed->widths[l]; d++) {
                            const double a = (double)x[0][i * feed->widths[l] + d],
                                         b = (double)x[1][j * feed->widths[l] + d];
                            dot += feed->tokens && l == 0 ? a == b : a * b;
                        }
                        sum[i * N + j] += dot;
                        assert_close(by_layer[((k * layers + l) * M + i) * N + j], dot,
                                     ROUNDING(1e-13) * (1 + fabs(dot)));
                        if (l + 1 == layers)
                            assert_close(last[(k * M + i) * N + j], dot + 1, ROUNDING(1e-13) * (1 + fabs(dot)));
                    }
            }
            for (size_t i = 0; i < M * N; i++)
                assert_close(whole[k * M * N + i], sum[i], ROUNDING(1e-13) * (1 + fabs(sum[i])));
        }
        pk_replay_release(&t.context, &replay);
        free(w), free(r.label);
        trained_release(&t);
    }
}

/* ---- maps ---------------------------------------------------------------------------------------------- */

static void test_maps(void **state)
{
    (void)state;
    static const pk_kernel_kind kinds[] = {PK_KERNEL_NTK,   PK_KERNEL_CONJUGATE, PK_KERNEL_EMBEDDING,
                                           PK_KERNEL_PATH,  PK_KERNEL_EPK,       PK_KERNEL_LOSS_PATH,
                                           PK_KERNEL_TRACIN};
    static const size_t steps[] = {0, 2};
    trained t;
    trained_make(&jobs[1].recipe, &t);
    rows r = test_rows(&t);
    for (int kind = 0; kind < 7; kind++)
        for (int by_layer = 0; by_layer < (kinds[kind] == PK_KERNEL_CONJUGATE ? 1 : 2); by_layer++) {
            pk_kernel_options o =
                plain(kinds[kind], kind < 1 || kind == 3 || kind == 4 ? PK_OUTPUTS_TRACE : PK_OUTPUTS_NONE);
            const pk_dataset *x = &r.targets;
            size_t shape[6];
            int rank;
            o.steps = steps, o.step_count = 2;
            o.by_layer = by_layer;
            const size_t planes = numbers_of(&t, x, NULL, &o, shape, &rank) / (M * N);
            /* A side with itself: training rows of tracin have c on both. */
            double *own[2], *both = compute(&t, x, NULL, &o, NULL), *square;
            own[0] = compute(&t, x, x, &o, NULL);
            own[1] = compute(&t, NULL, NULL, &o, NULL);
            square = compute(&t, NULL, NULL, &o, NULL);
            pk_replay replay;
            o.map = PK_MAP_COSINE;
            pk_kernel_report report;
            double *cosine = compute(&t, x, NULL, &o, &report), *same = compute(&t, x, x, &o, NULL);
            assert_int_equal(report.zero_rows, 0);
            (void)replay;
            for (size_t p = 0; p < planes; p++)
                for (size_t i = 0; i < M; i++) {
                    for (size_t j = 0; j < N; j++) {
                        double y = own[1][p * N * N + j * N + j];
                        if (kinds[kind] == PK_KERNEL_TRACIN) { /* sum_s eta c^2 |g|^2, from steps alone */
                            y = 0;
                            for (int k = 0; k < 2; k++) {
                                pk_kernel_options one = o;
                                pk_batch batch;
                                double c = 0;
                                one.map = PK_MAP_NONE;
                                one.unweighted = 1;
                                one.steps = &steps[k], one.step_count = 1;
                                double *g = compute(&t, NULL, NULL, &one, NULL);
                                pk_run_batch(&t.run, steps[k], &batch);
                                for (size_t b = 0; b < batch.count; b++)
                                    c += batch.items[b] == (int64_t)j ? 1.0 / (double)batch.count : 0;
                                y += c * c * g[p * N * N + j * N + j];
                                free(g);
                            }
                        }
                        const double expected =
                            both[(p * M + i) * N + j] / sqrt(own[0][(p * M + i) * M + i] * y);
                        if (y > 0)
                            assert_close(cosine[(p * M + i) * N + j], expected, ROUNDING(1e-12));
                        else
                            assert_true(cosine[(p * M + i) * N + j] == 0);
                    }
                    assert_true(same[(p * M + i) * M + i] == 1);
                }
            o.map = PK_MAP_CENTER;
            double *center = compute(&t, NULL, NULL, &o, NULL);
            const double largest = fixture_largest(planes * N * N, square);
            for (size_t p = 0; p < planes; p++)
                for (size_t i = 0; i < N; i++)
                    for (size_t j = 0; j < N; j++) {
                        double expected = 0;
                        for (size_t a = 0; a < N; a++)
                            for (size_t b = 0; b < N; b++)
                                expected += ((double)(a == i) - 1.0 / N) * square[(p * N + a) * N + b] *
                                            ((double)(b == j) - 1.0 / N);
                        assert_close(center[(p * N + i) * N + j], expected, ROUNDING(1e-13) * largest);
                    }
            free(both), free(own[0]), free(own[1]), free(square), free(cosine), free(same), free(center);
        }
    /* A row of zeros into a network without biases. */
    free(r.label);
    trained_release(&t);
    static const recipe bare =
        RUN("input 3; dense 4 nobias; tanh; dense 2 nobias", "squared", "sgd", 0, 0.1, 0);
    trained_make(&bare, &t);
    r = test_rows(&t);
    memset(t.test + 3, 0, 3 * sizeof *t.test);
    pk_kernel_options o = plain(PK_KERNEL_NTK, PK_OUTPUTS_TRACE);
    pk_kernel_report report;
    o.map = PK_MAP_COSINE;
    double *same = compute(&t, &r.labels, &r.labels, &o, &report);
    assert_int_equal(report.zero_rows, 1);
    double *cosine = compute(&t, &r.labels, NULL, &o, &report);
    assert_int_equal(report.zero_rows, 1);
    for (size_t j = 0; j < N; j++)
        assert_true(cosine[N + j] == 0 && cosine[j] != 0 && (j >= M || same[M + j] == 0));
    free(same), free(cosine), free(r.label);
    trained_release(&t);
}

/* ---- several kernels in a pass ------------------------------------------------------------------------- */

/* Test rows and training rows with the training rows, and kernels of all kinds, in one pass: as alone. */
static void test_together(void **state)
{
    (void)state;
    trained t;
    trained_make(&jobs[1].recipe, &t);
    rows r = test_rows(&t);
    pk_kernel_options all[11];
    double *grams[11];
    pk_kernel_report reports[11];
    size_t n = 0;
    for (int kind = 1; pk_kernel_name((pk_kernel_kind)kind); kind++) {
        const int loss = is_loss((pk_kernel_kind)kind),
                  none = loss || kind == PK_KERNEL_CONJUGATE || kind == PK_KERNEL_EMBEDDING;
        all[n++] = plain((pk_kernel_kind)kind, none ? PK_OUTPUTS_NONE : PK_OUTPUTS_TRACE);
        assert_int_equal(pk_kernel_find(pk_kernel_name((pk_kernel_kind)kind)), kind);
    }
    assert_int_equal(n, 8);
    all[n] = all[0], all[n++].left_train = 1;
    all[n] = plain(PK_KERNEL_EPK, PK_OUTPUTS_LABEL), all[n++].left_train = 1;
    all[n] = plain(PK_KERNEL_PATH, PK_OUTPUTS_FULL), all[n++].by_layer = 1;
    for (size_t k = 0; k < n; k++) {
        size_t shape[6];
        int rank;
        grams[k] = FIXTURE_NEW(double, numbers_of(&t, &r.targets, NULL, &all[k], shape, &rank));
    }
    assert_ok(&t.context, pk_kernels(&t.context, &t.run, &r.targets, NULL, n, all, grams, reports));
    for (size_t k = 0; k < n; k++) {
        size_t shape[6];
        int rank;
        const size_t numbers = numbers_of(&t, &r.targets, NULL, &all[k], shape, &rank);
        pk_kernel_options alone = all[k];
        alone.left_train = 0;
        double *own = compute(&t, all[k].left_train ? NULL : &r.targets, NULL, &alone, NULL);
        assert_true(fixture_apart(numbers, own, grams[k]) <= ROUNDING(1e-13) * fixture_largest(numbers, own));
        free(own), free(grams[k]);
    }
    assert_true(pk_kernel_name((pk_kernel_kind)9) == NULL && pk_kernel_name((pk_kernel_kind)0) == NULL);
    assert_int_equal(pk_kernel_find("ntks"), 0);
    for (int m = 0; m < PK_OUTPUTS_ONE; m++)
        if (pk_kernel_outputs_name((pk_kernel_outputs)m))
            assert_int_equal(pk_kernel_outputs_find(pk_kernel_outputs_name((pk_kernel_outputs)m)), m);
    for (int m = 0; m <= PK_MAP_CENTER; m++)
        assert_int_equal(pk_kernel_map_find(pk_kernel_map_name((pk_kernel_map)m)), m);
    free(r.label);
    trained_release(&t);
}

/* Rules with nodes of their own, by the definition. */
static void test_rules(void **state)
{
    (void)state;
    static const pk_quadrature rules[] = {{PK_RULE_LEFT, 0},
                                          {PK_RULE_GAUSS, 3},
                                          {PK_RULE_MIDPOINT, 2},
                                          {PK_RULE_TRAPEZOID, 2},
                                          {PK_RULE_TRAPEZOID, 5}};
    static const pk_kernel_kind kinds[] = {PK_KERNEL_PATH, PK_KERNEL_EPK, PK_KERNEL_LOSS_PATH};
    double worst = 0;
    for (int j = 0; j < JOBS; j += 7) {
        trained t;
        trained_make(&jobs[j].recipe, &t);
        for (int rule = 0; rule < 5; rule++)
            for (int kind = 0; kind < 3; kind++)
                for (int sides = 0; sides < 4; sides++) {
                    pk_kernel_options o = plain(kinds[kind], PK_OUTPUTS_NONE);
                    o.quadrature = rules[rule];
                    worst = fmax(worst, check_kernel(&t, &jobs[j], o, sides & 1, sides >> 1));
                }
        trained_release(&t);
    }
    print_message("%.2g\n", worst);
    assert_true(worst <= ROUNDING(1e-12));
}

/* Rows with kinks at places of their own in two layers: fine common nodes come near, to second order. */
static void test_deep_kinks(void **state)
{
    (void)state;
    static const recipe deep =
        RUN("input 3; dense 6; relu; dense 5; relu; dense 2", "squared", "sgd", 0, 0.4, 0);
    static const recipe mixed =
        RUN("input 3; dense 5; tanh; dense 5; relu; dense 2", "squared", "adam", 0, 0.1, 0);
    static const size_t step[] = {0};
    for (int k = 0; k < 2; k++) {
        trained t;
        trained_make(k ? &mixed : &deep, &t);
        rows r = test_rows(&t);
        for (int sides = 0; sides < 3; sides++) {
            pk_kernel_options o = plain(sides == 1 ? PK_KERNEL_EPK : PK_KERNEL_PATH, PK_OUTPUTS_FULL);
            pk_kernel_report report;
            o.steps = step, o.step_count = 1;
            double *exact = compute(&t, &r.labels, sides == 2 ? &r.labels : NULL, &o, &report);
            o.quadrature.rule = PK_RULE_MIDPOINT;
            o.quadrature.nodes = 20000;
            double *fine = compute(&t, &r.labels, sides == 2 ? &r.labels : NULL, &o, NULL);
            const size_t numbers = M * (sides == 2 ? M : N) * 4;
            const double apart = fixture_apart(numbers, exact, fine) / fixture_largest(numbers, exact);
            print_message("%.2g, error %.2g, %zu points\n", apart, report.error, report.points);
            /* The midpoints of an interval with a jump miss by up to half of it. */
            assert_true(apart <= EITHER(2e-5, 1e-3) && report.error <= EITHER(1e-10, 1e-4));
            free(exact), free(fine);
        }
        free(r.label);
        trained_release(&t);
    }
}

/* Many rows: between whole comparisons of two rules a few rows stand for all, and rows without kinks have common nodes. Three rows at
 * a time are compared as a whole, always, and have to give the same numbers. Some rows are far larger than others. */
static void test_many_rows(void **state)
{
    (void)state;
    enum { MANY = 48, FEW = 3 };
    static const char *const networks[] = {"input 3; dense 6; tanh; dense 4; tanh; dense 3",
                                           "input 3; dense 8; relu; dense 3",
                                           "input 3; dense 6; relu; dense 5; relu; dense 3",
                                           "input 3; dense 5; tanh; dense 5; relu; dense 3",
                                           "input 1x4x4; conv 2 3x3; relu; flatten; dense 3",
                                           "input 3; dense 3 name=a; relu; dense 3 tied=a; dense 3",
                                           "input 3; dense 3; tanh; dense 3 name=b; tanh; dense 3 tied=b"};
    static const struct {
        pk_kernel_kind kind;
        pk_kernel_outputs outputs;
        int by_layer, train, same;
    } what[] = {
        {PK_KERNEL_PATH, PK_OUTPUTS_TRACE, 0, 0, 0},     {PK_KERNEL_PATH, PK_OUTPUTS_TRACE, 0, 0, 1},
        {PK_KERNEL_PATH, PK_OUTPUTS_FULL, 1, 0, 0},      {PK_KERNEL_PATH, PK_OUTPUTS_LABEL, 0, 0, 0},
        {PK_KERNEL_EPK, PK_OUTPUTS_TRACE, 1, 1, 0},      {PK_KERNEL_EPK, PK_OUTPUTS_FULL, 0, 1, 0},
        {PK_KERNEL_LOSS_PATH, PK_OUTPUTS_NONE, 0, 1, 0}, {PK_KERNEL_LOSS_PATH, PK_OUTPUTS_NONE, 0, 0, 1}};
    double worst = 0;
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++) {
        const recipe r = {networks[n], "softmax_cross_entropy", "sgd", 0, 0.4, 0, MANY, 8, 6, 0, 11 + n, 0};
        trained t;
        trained_make(&r, &t);
        const size_t D = t.graph.input_width, C = t.run.outputs;
        for (size_t i = 0; i < MANY * D; i++)
            if (i / D % 17 == 5)
                t.test[i] *= 12;
        for (size_t k = 0; k < sizeof what / sizeof *what; k++) {
            const size_t shape[2] = {MANY, D}, label[1] = {MANY};
            const pk_dataset all = {pk_array_view(REAL_TYPE, 2, shape, t.test),
                                    pk_array_view(PK_INT64, 1, label, t.labels)};
            pk_kernel_options o = plain(what[k].kind, what[k].outputs);
            pk_kernel_report report;
            o.by_layer = what[k].by_layer;
            const pk_dataset *right = what[k].train ? NULL : &all;
            double *whole = compute(&t, what[k].same ? right : &all, right, &o, &report);
            const size_t width = what[k].outputs == PK_OUTPUTS_FULL ? C : 1,
                         planes = o.by_layer ? t.graph.columns : 1;
            const double largest = fixture_largest(planes * MANY * width * MANY * width, whole);
            assert_true(report.error <= EITHER(1e-10, 1e-4));
            for (size_t i = 0; i < MANY; i += 8) {
                const size_t some[2] = {FEW, D}, some_label[1] = {FEW};
                const pk_dataset few = {pk_array_view(REAL_TYPE, 2, some, t.test + i * D),
                                        pk_array_view(PK_INT64, 1, some_label, t.labels + i)};
                double *part = compute(&t, &few, what[k].train ? NULL : &few, &o, NULL);
                const size_t columns = what[k].train ? MANY : FEW, at = what[k].train ? 0 : i;
                for (size_t p = 0; p < planes; p++)
                    for (size_t x = 0; x < FEW * width; x++)
                        for (size_t y = 0; y < columns * width; y++) {
                            const double own = part[(p * FEW * width + x) * columns * width + y];
                            const double of_all =
                                whole[(p * MANY * width + i * width + x) * MANY * width + at * width + y];
                            worst = fmax(worst, fabs(own - of_all) / largest);
                        }
                free(part);
            }
            for (size_t x = 0; what[k].same && x < MANY * width; x++)
                for (size_t y = 0; y < x; y++)
                    assert_true(whole[x * MANY * width + y] == whole[y * MANY * width + x]);
            free(whole);
        }
        trained_release(&t);
    }
    print_message("%.2g\n", worst);
    assert_true(worst <= ROUNDING(2e-12));
}

/* Between whole comparisons of two rules, points are those of one rule; a step that is suddenly longer is seen. */
static void test_spared(void **state)
{
    (void)state;
    enum { MANY = 40, STEPS = 12 };
    recipe r = {"input 3; dense 6; tanh; dense 2", "squared", "sgd", 0, 0.02, 0, MANY, 0, STEPS, 0, 5, 0};
    trained t;
    trained_make(&r, &t);
    const size_t shape[2] = {MANY, 3};
    const pk_dataset all = {pk_array_view(REAL_TYPE, 2, shape, t.test), {0}};
    static const size_t steps[] = {0, 1, 2, 3, 4, 5, 6, 7};
    pk_kernel_options o = plain(PK_KERNEL_PATH, PK_OUTPUTS_TRACE);
    pk_kernel_report first, more;
    o.steps = steps, o.step_count = 1;
    free(compute(&t, &all, NULL, &o, &first));
    o.step_count = 8;
    free(compute(&t, &all, NULL, &o, &more));
    print_message("%zu points in one step, %zu in eight\n", first.points, more.points);
    assert_true(more.points < 6 * first.points);
    assert_true(more.error <= EITHER(1e-11, 1e-4));
    trained_release(&t);
}

/* ---- the exact path kernel ---------------------------------------------------------------------------- */

/* The least eigenvalue of a symmetric matrix, by Jacobi's rotations. */
static double least_eigenvalue(size_t n, double *a)
{
    for (int sweep = 0; sweep < 50; sweep++)
        for (size_t p = 0; p < n; p++)
            for (size_t q = p + 1; q < n; q++) {
                if (a[p * n + q] == 0)
                    continue;
                const double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
                const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                const double c = 1 / sqrt(t * t + 1), s = t * c;
                for (size_t k = 0; k < n; k++) {
                    const double x = a[k * n + p], y = a[k * n + q];
                    a[k * n + p] = c * x - s * y, a[k * n + q] = s * x + c * y;
                }
                for (size_t k = 0; k < n; k++) {
                    const double x = a[p * n + k], y = a[q * n + k];
                    a[p * n + k] = c * x - s * y, a[q * n + k] = s * x + c * y;
                }
            }
    double least = a[0];
    for (size_t i = 1; i < n; i++)
        least = fmin(least, a[i * n + i]);
    return least;
}

/* Over test and training rows together; test row 0 is training row 0 by its numbers, and has another feature. */
static void test_symmetric(void **state)
{
    (void)state;
    enum { ALL = M + N };
    for (int j = 1; j < JOBS; j += 6) {
        trained t;
        trained_make(&jobs[j].recipe, &t);
        rows r = test_rows(&t);
        memcpy(t.test, t.train, t.graph.input_width * sizeof *t.test);
        double all[ALL * ALL], trace = 0;
        for (int kind = 0; kind < 4; kind++) {
            const int x = kind & 1, y = kind >> 1;
            const pk_kernel_options o = plain(PK_KERNEL_EPK, PK_OUTPUTS_TRACE);
            const size_t n = x ? N : M, m = y ? N : M;
            double *gram = compute(&t, x ? NULL : &r.labels, y ? NULL : &r.labels, &o, NULL);
            for (size_t i = 0; i < n * m; i++)
                all[((x ? M : 0) + i / m) * ALL + (y ? M : 0) + i % m] = gram[i];
            free(gram);
        }
        for (size_t i = 0; i < ALL * ALL; i++)
            assert_close(all[i], all[i % ALL * ALL + i / ALL],
                         ROUNDING(1e-12) * fixture_largest(ALL * ALL, all));
        /* The discontinuity. */
        assert_true(fabs(all[0] - all[M]) > 0.01 * fabs(all[0]) &&
                    fabs(all[M] - all[M * ALL + M]) > 0.01 * all[M]);
        for (size_t i = 0; i < ALL; i++)
            trace += all[i * ALL + i];
        const double least = least_eigenvalue(ALL, all);
        print_message("%s: least eigenvalue %.3g, trace %.3g\n", jobs[j].recipe.network, least, trace);
        assert_true(least >= -ROUNDING(1e-12) * trace / ALL && trace > 0);
        free(r.label);
        trained_release(&t);
    }
}

/* The single machine where dl/df is constant: nll of log-softmax outputs, dl/df = -e_y, and hinge while it is active,
 * dl/df = -y. The kernel alone gives the change, and each contribution; with kinks, too. */
static void test_machine(void **state)
{
    (void)state;
    static const recipe machines[] = {
        {"input 3; dense 5; tanh; dense 3; log_softmax", "nll", "sgd", 0, 0.3, 0.5, N, 4, 40, 2, 7, 0},
        {"input 3; dense 24; relu; dense 3; log_softmax", "nll", "sgd", 0, 1, 0.5, N, 4, 5, 0, 7, 0},
        {"input 3; dense 12; relu; dense 8; relu; dense 3; log_softmax", "nll", "sgd", 0, 0.2, 0, N, 4, 10, 0,
         7, 0},
        {"input 3; dense 5; tanh; dense 3", "nll", "sgd", 0, 0.1, 0.5, N, 4, 20, 0, 3, 0}};
    for (int k = 0; k < 4; k++) {
        trained t;
        trained_make(&machines[k], &t);
        rows r = test_rows(&t);
        const size_t C = t.run.outputs;
        const pk_kernel_options o = plain(PK_KERNEL_EPK, PK_OUTPUTS_FULL);
        pk_kernel_report report;
        double *gram = compute(&t, &r.labels, NULL, &o, &report), worst = 0, residual = 0, largest = 0;
        pk_decompose_options options;
        pk_decomposition d;
        memset(&options, 0, sizeof options);
        assert_ok(&t.context, pk_decompose(&t.context, &t.run, trained_test(&t, M), &options, &d));
        for (size_t cell = 0; cell < M * C; cell++) {
            double left = d.final[cell] - d.initial[cell];
            for (size_t i = 0; i < N; i++) {
                const double entry = gram[cell * N * C + i * C + (size_t)t.labels[i]];
                worst = fmax(worst, fabs(entry - d.by_example[cell * N + i]));
                largest = fmax(largest, fabs(entry));
                left -= entry;
            }
            residual = fmax(residual, fabs(left));
        }
        print_message("entries differ by %.2g, residual %.2g, largest %.2g, %zu points, error %.2g\n", worst,
                      residual, largest, report.points, report.error);
        assert_true(worst <= ROUNDING(1e-12) * largest && residual <= ROUNDING(1e-12) * fmax(largest, 1) &&
                    largest > 0.1);
        pk_decomposition_release(&t.context, &d);
        free(gram), free(r.label);
        trained_release(&t);
    }
}

/* Contributions by the definition; their sum is a K + b. */
static void test_domingos(void **state)
{
    (void)state;
    static const int which[] = {1, 7, 9, 10}; /* the third goes up its gradients */
    for (int k = 0; k < 4; k++) {
        const struct job *job = &jobs[which[k]];
        trained t;
        trained_make(&job->recipe, &t);
        rows r = test_rows(&t);
        const size_t C = t.run.outputs, P = t.run.parameters, D = t.graph.input_width;
        const double sign = which[k] == 9 ? 1 : -1;
        assert_true(t.run.optimizer.maximize == (which[k] == 9));
        double *numbers[3], expected[M * 3 * N] = {0};
        numbers[0] = FIXTURE_NEW(double, M *C *N), numbers[1] = FIXTURE_NEW(double, M *C *N);
        numbers[2] = FIXTURE_NEW(double, M *C);
        pk_domingos d = {numbers[0], numbers[1], numbers[2], 0, 0};
        const pk_quadrature zero = {PK_RULE_AUTO, 0};
        assert_ok(&t.context, pk_kernel_domingos(&t.context, &t.run, &r.labels, zero, 0, &d));
        assert_true(d.undefined == 0 && d.error <= EITHER(1e-10, 1e-4));
        /* By 2000 (without kinks 24) nodes a step. */
        pk_real *w[3], *j = FIXTURE_NEW(pk_real, M * C * P), *g = FIXTURE_NEW(pk_real, N * P);
        pk_replay replay;
        static double node[2000], weight[2000];
        truth a;
        memset(&a, 0, sizeof a);
        a.t = &t;
        a.options = plain(PK_KERNEL_PATH, PK_OUTPUTS_FULL);
        a.side[0] = side_of(&t, &r, 0), a.side[1] = side_of(&t, &r, 1);
        for (int i = 0; i < 3; i++)
            w[i] = FIXTURE_NEW(pk_real, P);
        assert_ok(&t.context, pk_replay_prepare(&t.context, &t.run, 0, &replay));
        for (size_t s = 0; s < t.run.steps; s++) {
            double c[N] = {0};
            pk_batch batch;
            int64_t items[N] = {0, 1, 2, 3, 4, 5};
            const pk_batch all = {N, items, NULL};
            pk_run_batch(&t.run, s, &batch);
            for (size_t b = 0; b < batch.count; b++)
                c[batch.items[b]] += batch.weights ? batch.weights[b] : 1.0 / (double)batch.count;
            for (size_t e = 0; e < 2; e++)
                assert_ok(&t.context, pk_replay_weights(&t.context, &replay, s + e, w[e]));
            a.w = w[0], a.next = w[1];
            const size_t nodes = nodes_of(&a, job->units, node, weight);
            for (size_t q = 0; q < nodes; q++) {
                for (size_t p = 0; p < P; p++)
                    w[2][p] = (pk_real)((double)w[0][p] + node[q] * ((double)w[1][p] - (double)w[0][p]));
                assert_ok(&t.context, pk_jacobian(&t.context, &t.graph, w[2], pk_matrix_view(t.test, M, D),
                                                  pk_matrix_view(j, M * C, P), pk_matrix_view(NULL, 0, 0)));
                assert_ok(&t.context,
                          pk_loss_gradients_with(&t.context, &t.graph, &t.run.criterion, w[2], &t.run.train,
                                                 &all, NULL, pk_matrix_view(g, N, P)));
                for (size_t m = 0; m < M * C; m++)
                    for (size_t i = 0; i < N; i++)
                        for (size_t p = 0; p < P; p++)
                            expected[m * N + i] += sign * weight[q] * t.run.learning_rates[s] *
                                                   pk_run_gradient_scale(&t.run, s) * c[i] *
                                                   (double)j[m * P + p] * (double)g[i * P + p];
            }
        }
        pk_replay_release(&t.context, &replay);
        const double largest = fixture_largest(M * C * N, expected);
        print_message("%.2g, error %.2g\n", fixture_apart(M * C * N, expected, numbers[0]) / largest, d.error);
        assert_true(fixture_apart(M * C * N, expected, numbers[0]) <= ROUNDING(1e-11) * largest);
        for (size_t c = 0; c < C; c++) {
            pk_kernel_options o = plain(PK_KERNEL_PATH, PK_OUTPUTS_ONE);
            o.output = c;
            double *gram = compute(&t, &r.labels, NULL, &o, NULL);
            for (size_t m = 0; m < M; m++)
                for (size_t i = 0; i < N; i++)
                    assert_close(numbers[1][(m * C + c) * N + i] * gram[m * N + i],
                                 expected[(m * C + c) * N + i], ROUNDING(1e-10) * largest);
            free(gram);
        }
        assert_ok(&t.context, pk_run_weights(&t.context, &t.run, 0, w[0]));
        pk_real f[M * 3];
        assert_ok(&t.context, pk_graph_evaluate(&t.context, &t.graph, w[0], pk_matrix_view(t.test, M, D),
                                                pk_matrix_view(f, M, C)));
        for (size_t m = 0; m < M * C; m++)
            assert_true(numbers[2][m] == (double)f[m]);
        for (int i = 0; i < 3; i++)
            free(w[i]), free(numbers[i]);
        free(j), free(g), free(r.label);
        trained_release(&t);
    }
    /* A test row of zeros, and no bias: the path kernel vanishes. */
    static const recipe bare =
        RUN("input 3; dense 4 nobias; tanh; dense 2 nobias", "squared", "sgd", 0, 0.1, 0);
    trained t;
    trained_make(&bare, &t);
    rows r = test_rows(&t);
    memset(t.test + 3, 0, 3 * sizeof *t.test);
    double contributions[M * 2 * N], coefficients[M * 2 * N];
    pk_domingos d = {contributions, coefficients, NULL, 0, 0};
    const pk_quadrature left = {PK_RULE_LEFT, 1};
    assert_refused(&t.context, PK_UNSUPPORTED,
                   "12 coefficients are undefined, where the path kernel is 0, the first "
                   "that of test row 1, output 0, training row 0",
                   pk_kernel_domingos(&t.context, &t.run, &r.labels, left, 0, &d));
    assert_true(d.undefined == 12 && contributions[2 * N] == 0 && isnan(coefficients[2 * N]) &&
                coefficients[0] != 0);
    d.coefficients = NULL;
    assert_ok(&t.context, pk_kernel_domingos(&t.context, &t.run, &r.labels, left, 0, &d));
    d.contributions = NULL;
    assert_refused(&t.context, PK_ARGUMENT, "missing",
                   pk_kernel_domingos(&t.context, &t.run, &r.labels, left, 0, &d));
    free(r.label);
    trained_release(&t);
    /* Groups that go up and down; where those that go down are frozen, there is one sign. */
    static const char *const both[] = {"0 maximize=1"}, *const up[] = {"0 maximize=1", "1 frozen"};
    for (int frozen = 0; frozen < 2; frozen++) {
        const trained_more grouped = {frozen ? up : both, frozen ? 2 : 1, 0, 0};
        trained_make_with(&bare, &grouped, &t);
        r = test_rows(&t);
        d.contributions = contributions;
        if (frozen)
            assert_ok(&t.context, pk_kernel_domingos(&t.context, &t.run, &r.labels, left, 0, &d));
        else
            assert_refused(&t.context, PK_UNSUPPORTED, "maximize is not the same for all parameter groups",
                           pk_kernel_domingos(&t.context, &t.run, &r.labels, left, 0, &d));
        free(r.label);
        trained_release(&t);
    }
}

/* ---- calls --------------------------------------------------------------------------------------------- */

static int cancel(void *user, const char *phase, double fraction)
{
    (void)phase;
    *(double *)user = fraction;
    return fraction > 0.3;
}

static void test_calls(void **state)
{
    (void)state;
    trained t;
    trained_make(&jobs[7].recipe, &t);
    pk_context *context = &t.context;
    rows r = test_rows(&t);
    for (int kind = 1; pk_kernel_name((pk_kernel_kind)kind); kind++) {
        const int outputs = kind == PK_KERNEL_NTK || kind >= PK_KERNEL_PATH;
        pk_kernel_options o =
            plain((pk_kernel_kind)kind,
                  outputs && !is_loss((pk_kernel_kind)kind) ? PK_OUTPUTS_FULL : PK_OUTPUTS_NONE);
        size_t shape[6];
        int rank;
        const size_t numbers = numbers_of(&t, &r.targets, NULL, &o, shape, &rank);
        double *gram = compute(&t, &r.targets, NULL, &o, NULL), *other, reached = 0;
        context->threads = 3;
        other = compute(&t, &r.targets, NULL, &o, NULL);
        assert_memory_equal(gram, other, numbers * sizeof *gram);
        free(other);
        context->threads = 1;
        context->memory_limit = 40000000;
        other = compute(&t, &r.targets, NULL, &o, NULL);
        assert_memory_equal(gram, other, numbers * sizeof *gram);
        context->memory_limit = 3000;
        assert_refused(context, PK_MEMORY_LIMIT, "bytes",
                       pk_kernels(context, &t.run, &r.targets, NULL, 1, &o, &other, NULL));
        context->memory_limit = 0;
        if (kind > PK_KERNEL_EMBEDDING) {
            context->progress = cancel;
            context->progress_user = &reached;
            assert_int_equal(pk_kernels(context, &t.run, &r.targets, NULL, 1, &o, &other, NULL), PK_CANCELLED);
            assert_close(reached, 0.4, 0.01);
            assert_true(context->progress == cancel);
            context->progress = NULL;
        }
        free(gram), free(other);
    }
    free(r.label);
    trained_release(&t);
}

#define REFUSED(status, words, x, y)                                                                      \
    do {                                                                                                  \
        size_t shape[6];                                                                                  \
        int rank;                                                                                         \
        assert_refused(context, status, words, pk_kernel_shape(context, &t.run, x, y, &o, shape, &rank)); \
        assert_refused(context, status, words, pk_kernels(context, &t.run, x, y, 1, &o, &gram, NULL));    \
        assert_refused(context, status, words, pk_kernel_file(context, &t.run, x, y, &o, path, NULL));    \
        assert_int_not_equal(access(path, F_OK), 0);                                                      \
    } while (0)

static void test_refusals(void **state)
{
    (void)state;
    trained t;
    trained_make(&jobs[1].recipe, &t);
    pk_context *context = &t.context;
    rows r = test_rows(&t);
    char path[300];
    snprintf(path, sizeof path, "%s/refused.npy", fixture_folder);
    double numbers[400] = {0}, *gram = numbers;
    static const size_t beyond[] = {0, 5}, last[] = {4};
    pk_kernel_options o = plain(PK_KERNEL_NTK, PK_OUTPUTS_TRACE);
    o.steps = beyond, o.step_count = 2;
    REFUSED(PK_ARGUMENT, "ntk: the weights of step 5 of a run of 4 steps", &r.labels, NULL);
    o.steps = last, o.step_count = 1;
    free(compute(&t, &r.labels, NULL, &o, NULL));
    o.step_count = 0;
    REFUSED(PK_ARGUMENT, "empty", &r.labels, NULL);
    o.step_count = 1;
    for (int kind = PK_KERNEL_PATH; kind <= PK_KERNEL_TRACIN; kind++) {
        if (kind == PK_KERNEL_PATH_AVERAGE)
            continue;
        o.kind = (pk_kernel_kind)kind;
        o.outputs = is_loss(o.kind) ? PK_OUTPUTS_NONE : PK_OUTPUTS_SUM;
        REFUSED(PK_ARGUMENT, "step 4 of a run of 4 steps", &r.targets, NULL);
    }
    o = plain((pk_kernel_kind)9, PK_OUTPUTS_TRACE);
    REFUSED(PK_ARGUMENT, "9 is not the kind", &r.labels, NULL);
    o = plain(PK_KERNEL_PATH, PK_OUTPUTS_NONE);
    REFUSED(PK_ARGUMENT, "must be named", &r.labels, NULL);
    o.outputs = PK_OUTPUTS_ONE, o.output = 3;
    REFUSED(PK_ARGUMENT, "output 3 of a network with 3", &r.labels, NULL);
    o = plain(PK_KERNEL_CONJUGATE, PK_OUTPUTS_TRACE);
    REFUSED(PK_ARGUMENT, "has no outputs", &r.labels, NULL);
    o = plain(PK_KERNEL_TRACIN, PK_OUTPUTS_SUM);
    REFUSED(PK_ARGUMENT, "has no outputs", &r.targets, NULL);
    o = plain(PK_KERNEL_TRACIN, PK_OUTPUTS_NONE);
    o.quadrature.rule = PK_RULE_GAUSS;
    REFUSED(PK_ARGUMENT, "no rule but left", &r.targets, NULL);
    o = plain(PK_KERNEL_EPK, PK_OUTPUTS_TRACE);
    o.quadrature.rule = PK_RULE_GAUSS, o.quadrature.nodes = 1001;
    REFUSED(PK_ARGUMENT, "1001 nodes", &r.labels, NULL);
    o.quadrature.rule = PK_RULE_EXACT, o.quadrature.nodes = 0;
    REFUSED(PK_ARGUMENT, "none of auto", &r.labels, NULL);
    o.quadrature.rule = PK_RULE_AUTO, o.tolerance = -1;
    REFUSED(PK_ARGUMENT, "tolerance -1", &r.labels, NULL);
    o = plain(PK_KERNEL_NTK, PK_OUTPUTS_FULL);
    o.map = PK_MAP_COSINE;
    REFUSED(PK_ARGUMENT, "not for all outputs with all", &r.labels, NULL);
    o.outputs = PK_OUTPUTS_TRACE, o.map = PK_MAP_CENTER;
    REFUSED(PK_ARGUMENT, "the same rows on both sides", &r.labels, NULL);
    o.map = PK_MAP_NONE, o.unweighted = 1;
    REFUSED(PK_ARGUMENT, "does not weight", &r.labels, NULL);
    o.unweighted = 0, o.append_one = 1;
    REFUSED(PK_ARGUMENT, "a 1 is appended for conjugate", &r.labels, NULL);
    o = plain(PK_KERNEL_CONJUGATE, PK_OUTPUTS_NONE);
    o.by_layer = 1;
    REFUSED(PK_ARGUMENT, "of one layer", &r.labels, NULL);
    /* Rows and their targets. */
    pk_dataset bad = r.labels;
    const size_t wide[2] = {2, 6}, few[1] = {3};
    o = plain(PK_KERNEL_LOSS_PATH, PK_OUTPUTS_NONE);
    memset(&bad.targets, 0, sizeof bad.targets);
    REFUSED(PK_ARGUMENT, "left rows need the targets of the loss", &bad, NULL);
    bad.targets = pk_array_view(PK_INT64, 1, few, r.label);
    REFUSED(PK_SHAPE, "right rows: 3 rows of targets for 4", NULL, &bad);
    o = plain(PK_KERNEL_NTK, PK_OUTPUTS_LABEL);
    REFUSED(PK_SHAPE, "3 rows of targets for 4", &bad, NULL);
    memset(&bad.targets, 0, sizeof bad.targets);
    REFUSED(PK_ARGUMENT, "left rows need labels", &bad, NULL);
    bad = r.labels;
    r.label[2] = 3;
    REFUSED(PK_ARGUMENT, "row 2 has label 3, the network has 3 outputs", &bad, NULL);
    o = plain(PK_KERNEL_TRACIN, PK_OUTPUTS_NONE);
    REFUSED(PK_ARGUMENT, "3", NULL, &bad);
    r.label[2] = -1;
    REFUSED(PK_ARGUMENT, "-1", NULL, &bad);
    o = plain(PK_KERNEL_NTK, PK_OUTPUTS_LABEL);
    REFUSED(PK_ARGUMENT, "label -1", NULL, &bad);
    o = plain(PK_KERNEL_NTK, PK_OUTPUTS_TRACE);
    bad.inputs = pk_array_view(REAL_TYPE, 2, wide, t.test);
    REFUSED(PK_SHAPE, "right rows", NULL, &bad);
    bad = r.labels;
    const pk_real was = t.test[4];
    t.test[4] = (pk_real)NAN;
    REFUSED(PK_NOT_FINITE, "left rows: row 1", &bad, NULL);
    t.test[4] = was;
    assert_refused(context, PK_ARGUMENT, "missing",
                   pk_kernels(context, &t.run, NULL, NULL, 1, NULL, &gram, NULL));
    assert_refused(context, PK_ARGUMENT, "missing", pk_kernels(context, NULL, NULL, NULL, 1, &o, &gram, NULL));
    gram = NULL;
    assert_refused(context, PK_ARGUMENT, "no place",
                   pk_kernels(context, &t.run, NULL, NULL, 1, &o, &gram, NULL));
    /* A tolerance that rounding does not meet. */
    gram = numbers;
    o = plain(PK_KERNEL_PATH, PK_OUTPUTS_TRACE);
    o.tolerance = 1e-18;
    pk_kernel_report report;
    assert_refused(context, PK_NOT_CLOSED, "not 1e-18",
                   pk_kernels(context, &t.run, &r.labels, NULL, 1, &o, &gram, &report));
    assert_true(report.error > 1e-18 && gram[0] != 0);
    free(r.label);
    trained_release(&t);
    /* Targets that are vectors have no label. */
    trained_make(&jobs[0].recipe, &t);
    o = plain(PK_KERNEL_NTK, PK_OUTPUTS_LABEL);
    REFUSED(PK_ARGUMENT, "training rows: targets are not class labels", NULL, NULL);
    trained_release(&t);
    static const recipe bare = RUN("input 3; affine; tanh", "squared", "sgd", 0, 0.1, 0);
    trained_make(&bare, &t);
    o = plain(PK_KERNEL_CONJUGATE, PK_OUTPUTS_NONE);
    REFUSED(PK_UNSUPPORTED, "conjugate: the network has no matrix layer", NULL, NULL);
    o = plain(PK_KERNEL_EMBEDDING, PK_OUTPUTS_NONE);
    REFUSED(PK_UNSUPPORTED, "no matrix layer", NULL, NULL);
    trained_release(&t);
}

/* ---- into a file --------------------------------------------------------------------------------------- */

typedef struct watch {
    double first, stop;
    int said;
} watch;

static int stop_at(void *user, const char *phase, double fraction)
{
    watch *w = user;
    w->said |= strstr(phase, "kernel file, ") == phase && strstr(phase, " bytes") != NULL;
    w->first = w->first < 0 ? fraction : w->first;
    return fraction > w->stop;
}

/* More rows than a block: interrupted after some parts, finished by another call, the bits of pk_kernels. */
static void test_file(void **state)
{
    (void)state;
    enum { MANY = 600 };
    trained t;
    trained_make(&jobs[1].recipe, &t);
    pk_context *context = &t.context;
    const size_t shape[2] = {MANY, 3}, label[1] = {MANY};
    pk_real *x = fixture_normals(5, MANY * 3, 1);
    int64_t *labels = FIXTURE_NEW(int64_t, MANY);
    pk_dataset many = {pk_array_view(REAL_TYPE, 2, shape, x), pk_array_view(PK_INT64, 1, label, labels)};
    char path[300], part[310];
    snprintf(path, sizeof path, "%s/gram.npy", fixture_folder);
    snprintf(part, sizeof part, "%s.part", path);
    static const size_t steps[] = {3, 1};
    for (int k = 0; k < 7; k++) {
        static const pk_kernel_kind kinds[] = {PK_KERNEL_NTK,      PK_KERNEL_PATH, PK_KERNEL_CONJUGATE,
                                               PK_KERNEL_TRACIN,   PK_KERNEL_EPK,  PK_KERNEL_NTK,
                                               PK_KERNEL_EMBEDDING};
        pk_kernel_options o = plain(kinds[k], k == 2 || k == 3 || k == 6 ? PK_OUTPUTS_NONE
                                              : k == 1                   ? PK_OUTPUTS_FULL
                                                                         : PK_OUTPUTS_TRACE);
        const pk_dataset *right = k == 3 || k == 4 ? NULL : &many;
        o.steps = steps, o.step_count = 2;
        o.by_layer = k == 0;
        o.map = k == 5 ? PK_MAP_COSINE : k == 6 ? PK_MAP_CENTER : k == 4 ? PK_MAP_COSINE : PK_MAP_NONE;
        size_t found[6];
        int rank;
        const size_t numbers = numbers_of(&t, &many, right, &o, found, &rank);
        pk_kernel_report report, own;
        double *gram = compute(&t, &many, right, &o, &own);
        watch w = {-1, k == 1 ? 0.1 : 0.4, 0};
        const size_t limit = 50000000;
        context->memory_limit = k == 3 ? 0 : limit;
        context->progress = stop_at;
        context->progress_user = &w;
        assert_int_equal(pk_kernel_file(context, &t.run, &many, right, &o, path, &report), PK_CANCELLED);
        assert_true(w.said && w.first == 0);
        const int parts = access(part, F_OK) == 0;
        w.first = -1, w.stop = 2;
        assert_ok(context, pk_kernel_file(context, &t.run, &many, right, &o, path, &report));
        assert_true(parts ? w.first > 0 : w.first == 0);
        assert_true(access(part, F_OK) != 0);
        assert_true(context->memory_peak <= limit || k == 3);
        context->progress = NULL;
        context->memory_limit = 0;
        pk_array array;
        memset(&array, 0, sizeof array);
        assert_ok(context, pk_array_map(context, path, 0, &array));
        assert_true(array.type == PK_FLOAT64 && array.rank == rank);
        for (int i = 0; i < rank; i++)
            assert_int_equal(array.shape[i], found[i]);
        assert_memory_equal(array.data, gram, numbers * sizeof *gram);
        assert_true(report.zero_rows == own.zero_rows && fabs(report.error - own.error) <= 1e-15);
        pk_array_release(context, &array);
        free(gram);
        print_message("%s: %s\n", pk_kernel_name(kinds[k]), parts ? "resumed" : "began again");
    }
    /* Another kernel does not go on with the parts of the first. */
    pk_kernel_options o = plain(PK_KERNEL_NTK, PK_OUTPUTS_TRACE);
    watch w = {-1, 0.4, 0};
    o.by_layer = 1;
    context->memory_limit = 32000000;
    context->progress = stop_at;
    context->progress_user = &w;
    assert_int_equal(pk_kernel_file(context, &t.run, &many, &many, &o, path, NULL), PK_CANCELLED);
    assert_int_equal(access(part, F_OK), 0);
    w.first = -1;
    o.outputs = PK_OUTPUTS_SUM;
    assert_int_equal(pk_kernel_file(context, &t.run, &many, &many, &o, path, NULL), PK_CANCELLED);
    assert_true(w.first == 0);
    /* Nor does another loss. */
    assert_int_equal(access(part, F_OK), 0);
    t.run.criterion.ignores = 1;
    t.run.criterion.ignore_index = 99;
    w.first = -1;
    assert_int_equal(pk_kernel_file(context, &t.run, &many, &many, &o, path, NULL), PK_CANCELLED);
    assert_true(w.first == 0);
    context->progress = NULL;
    context->memory_limit = 0;
    /* A folder that is not there; a matrix larger than any disk. */
    o.by_layer = 0;
    assert_refused(context, PK_IO, "cannot be made",
                   pk_kernel_file(context, &t.run, &many, &many, &o, "/nowhere/gram.npy", NULL));
    const size_t huge[2] = {(size_t)1 << 22, 3};
    many.inputs = pk_array_view(REAL_TYPE, 2, huge, x);
    pk_array zeros = pk_array_view(REAL_TYPE, 2, huge, FIXTURE_NEW(pk_real, huge[0] * 3));
    many.inputs = zeros;
    assert_refused(context, PK_IO, "the disk has room for",
                   pk_kernel_file(context, &t.run, &many, &many, &o, path, NULL));
    free((void *)(uintptr_t)zeros.data), free(x), free(labels);
    (void)remove(path), (void)remove(part);
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition), cmocka_unit_test(test_fed),     cmocka_unit_test(test_maps),
        cmocka_unit_test(test_together),   cmocka_unit_test(test_rules),   cmocka_unit_test(test_deep_kinks),
        cmocka_unit_test(test_symmetric),  cmocka_unit_test(test_machine), cmocka_unit_test(test_calls),
        cmocka_unit_test(test_refusals),   cmocka_unit_test(test_file),    cmocka_unit_test(test_domingos),
        cmocka_unit_test(test_many_rows),  cmocka_unit_test(test_spared),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
