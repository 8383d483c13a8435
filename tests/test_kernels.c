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
    size_t layer;      /* by layer: only the weights of this column */
    double *gram;      /* slots x rows C x columns C, or slots x rows x columns for kernels without outputs */
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
        assert_ok(&t->context, pk_loss_gradients(&t->context, &t->graph, t->run.loss, at, &a->side[s].data, &batch,
                                                 NULL, pk_matrix_view(a->feature[s], n, P)));
    }
    if (!a->options.by_layer)
        return;
    pk_weight_block blocks[32];
    const size_t count = pk_graph_blocks(&t->graph, blocks, 32), all = n * copies_of(a);
    assert_true(count <= 32);
    for (size_t b = 0; b < count; b++)
        for (size_t r = 0; t->graph.nodes[blocks[b].node].column != (int)a->layer && r < all; r++)
            memset(a->feature[s] + r * P + blocks[b].offset, 0, blocks[b].count * sizeof(pk_real));
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
            if ((kind == PK_KERNEL_EPK || kind == PK_KERNEL_TRACIN) && a->side[1].train && !a->options.unweighted)
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
    a->gram =
        FIXTURE_NEW(double, slots * a->side[0].count * copies_of(a) * a->side[1].count * copies_of(a));
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
    {RUN("input 3; dense 4 nobias; sigmoid; layer_norm; dense 2", "squared", "adamw weight_decay=0.1", 0, 0.02, 2),
     0},
    {RUN("input 1x4x4; conv 2 3x3; tanh; flatten; residual( dense 8; tanh ); dense 2", "squared", "sgd", 0, 0.1, 0),
     0},
    {RUN("input 3; embedding 6 4; residual( attention 2 ); mean_tokens; dense 2", "squared", "sgd momentum=0.9", 6,
         0.1, 0),
     0},
    {RUN("input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh; dense 2", "squared", "adam", 0, 0.02, 0), 0},
    {RUN("input 3; dense 6; relu; dense 3", "softmax_cross_entropy", "sgd", 0, 0.7, 0), 6},
    {RUN("input 3; dense 6; leaky_relu 0.2; dense 2", "squared", "adamw", 0, 0.1, 3), 6},
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
    assert_ok(&t->context,
              pk_kernels(&t->context, &t->run, x, y, (size_t)count, all, grams, reports));
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
                        const double *from = grams[g] + (slot * layers + layer) * n * m * (all[g].outputs == PK_OUTPUTS_FULL ? C * C : 1);
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
    double all = 0;
    for (int j = 0; j < JOBS; j++) {
        trained t;
        trained_make(&jobs[j].recipe, &t);
        double worst = 0;
        for (int kind = 0; kind < 6; kind++)
            for (int sides = 0; sides < 4; sides++)
                for (int how = 0; how < 4; how++) {
                    pk_kernel_options options = plain(kinds[kind], PK_OUTPUTS_NONE);
                    options.by_layer = how == 1;
                    if (how == 2)
                        options.steps = kinds[kind] == PK_KERNEL_NTK ? some : twice, options.step_count = 3;
                    options.unweighted = how == 3 && (kinds[kind] == PK_KERNEL_EPK || kinds[kind] == PK_KERNEL_TRACIN);
                    worst = fmax(worst, check_kernel(&t, &jobs[j], options, sides & 1, sides >> 1));
                }
        print_message("%-75s %.2g\n", jobs[j].recipe.network, worst);
        all = fmax(all, worst);
        trained_release(&t);
    }
    assert_true(all <= ROUNDING(1e-11));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
