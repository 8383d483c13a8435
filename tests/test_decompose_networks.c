/* Whole networks from recorded training to the decomposition: normalisation, attention, tokens, losses on
 * log_softmax. Closure with the default options, and each entry against gradients made one by one with the
 * tape, integrated between the kinks that bisection finds. */
#include "fixture.h"

enum { EXAMPLES = 12, BATCH = 5, STEPS = 5, ROWS = 3, WIDEST = 8 };

typedef struct subject {
    const char *network, *loss;
    size_t tokens; /* inputs are whole numbers below this; 0: normal numbers */
    double rate, adamw_rate;
} subject;

/* ---- the entries one by one ------------------------------------------------------------------------- */

/* A network along one step, for one row. */
typedef struct ruler {
    const pk_graph *graph;
    pk__tape tape;
    unsigned char *memory;
    pk_real *at; /* weights */
    const pk_real *start, *end, *row;
    size_t switches;
    pk_real *values[2]; /* of the switches */
    double *kinks;
    size_t kink_count, kink_capacity;
} ruler;

static void ruler_take(const pk_graph *graph, ruler *r)
{
    pk__arena measure = {NULL, 0, 0, 0};
    memset(r, 0, sizeof *r);
    r->graph = graph;
    pk__pass_take(&measure, graph, 1, 1, 0, &r->tape);
    r->memory = FIXTURE_NEW(unsigned char, measure.used);
    pk__arena arena = {r->memory, measure.used, 0, 0};
    pk__pass_take(&arena, graph, 1, 1, 0, &r->tape);
    r->at = FIXTURE_NEW(pk_real, graph->parameters);
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].operation->switch_count)
            r->switches += graph->nodes[n].operation->switch_count(&graph->nodes[n]);
    for (int i = 0; i < 2; i++)
        r->values[i] = FIXTURE_NEW(pk_real, r->switches);
    r->kink_capacity = 100 + 8 * r->switches;
    r->kinks = FIXTURE_NEW(double, r->kink_capacity);
}

static void ruler_release(ruler *r)
{
    free(r->memory), free(r->at), free(r->values[0]), free(r->values[1]), free(r->kinks);
}

static void forward_at(ruler *r, double t)
{
    const pk__line line = {r->at, NULL, NULL};
    for (size_t p = 0; p < r->graph->parameters; p++)
        r->at[p] = (pk_real)(r->start[p] + t * (r->end[p] - r->start[p]));
    pk__pass_forward(&r->tape, &line, 1, r->row);
}

static void switches_at(ruler *r, double t, pk_real *values)
{
    forward_at(r, t);
    for (size_t n = 1; n < r->graph->node_count; n++) {
        const pk_node *node = &r->graph->nodes[n];
        pk_call call;
        if (!node->operation->switch_count)
            continue;
        memset(&call, 0, sizeof call);
        call.node = node;
        call.rows = 1;
        call.in[0] = r->tape.value[node->inputs[0]];
        call.in_width[0] = r->graph->nodes[node->inputs[0]].width;
        call.out = values;
        node->operation->switches(&call);
        values += node->operation->switch_count(node);
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void push_kink(ruler *r, double t)
{
    assert_true(r->kink_count < r->kink_capacity);
    r->kinks[r->kink_count++] = t;
}

/* Where some switch changes its sign, and quarters, from 0 to 1. */
static void find_kinks(ruler *r)
{
    enum { SAMPLES = 200, QUARTERS = 4 };
    r->kink_count = 0;
    for (int i = 0; i <= QUARTERS; i++)
        push_kink(r, (double)i / QUARTERS);
    if (!r->switches)
        return;
    pk_real *before = FIXTURE_NEW(pk_real, r->switches), *after = r->values[1];
    switches_at(r, 0, before);
    for (int i = 1; i <= SAMPLES; i++) {
        switches_at(r, (double)i / SAMPLES, after);
        for (size_t s = 0; s < r->switches; s++) {
            double lo = (double)(i - 1) / SAMPLES, hi = (double)i / SAMPLES;
            if ((before[s] > 0) == (after[s] > 0))
                continue;
            while (hi - lo > 1e-15) {
                const double middle = 0.5 * (lo + hi);
                switches_at(r, middle, r->values[0]);
                if ((r->values[0][s] > 0) == (before[s] > 0))
                    lo = middle;
                else
                    hi = middle;
            }
            push_kink(r, hi);
        }
        memcpy(before, after, r->switches * sizeof *before);
    }
    qsort(r->kinks, r->kink_count, sizeof *r->kinks, ascending);
    free(before);
}

/* gradient (P) = that of < seed, f > where the last forward was. */
static void gradient_there(ruler *r, const pk_real *seed, pk_real *gradient)
{
    const pk__line line = {r->at, NULL, NULL};
    memcpy(pk__pass_seed(&r->tape), seed, r->graph->output_width * sizeof *seed);
    pk__pass_reverse(&r->tape, &line, 1, 1);
    memset(gradient, 0, r->graph->parameters * sizeof *gradient);
    pk__pass_weight_gradient(&r->tape, 1, gradient);
}

/* phi (outputs x P) = the integral of the gradients over the step. */
static void integrate(ruler *r, pk_real *gradient, pk_real *phi)
{
    enum { NODES = 20 };
    const size_t P = r->graph->parameters, C = r->graph->output_width;
    double x[NODES], w[NODES];
    pk_gauss_legendre(NODES, x, w);
    memset(phi, 0, C * P * sizeof *phi);
    find_kinks(r);
    for (size_t k = 0; k + 1 < r->kink_count; k++)
        for (int q = 0; q < NODES; q++) {
            const double length = r->kinks[k + 1] - r->kinks[k];
            forward_at(r, r->kinks[k] + x[q] * length);
            for (size_t c = 0; c < C; c++) {
                pk_real seed[WIDEST] = {0};
                seed[c] = 1;
                gradient_there(r, seed, gradient);
                for (size_t p = 0; p < P; p++)
                    phi[c * P + p] += w[q] * length * gradient[p];
            }
        }
}

/* A (rows x outputs x examples) of a plain SGD run. */
static void brute(pk_context *context, const pk_run *run, const pk_real *inputs, double *expected)
{
    const pk_graph *graph = &run->graph;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width;
    ruler r;
    ruler_take(graph, &r);
    pk_real *start = FIXTURE_NEW(pk_real, P), *end = FIXTURE_NEW(pk_real, P),
            *gradient = FIXTURE_NEW(pk_real, P), *phi = FIXTURE_NEW(pk_real, ROWS * C * P),
            *row = FIXTURE_NEW(pk_real, D), target[WIDEST], seed[WIDEST];
    memset(expected, 0, ROWS * C * EXAMPLES * sizeof *expected);
    for (size_t s = 0; s < run->steps; s++) {
        assert_ok(context, pk_run_weights(context, run, s, start));
        assert_ok(context, pk_run_weights(context, run, s + 1, end));
        r.start = start;
        r.end = end;
        for (size_t k = 0; k < ROWS; k++) {
            r.row = inputs + k * D;
            integrate(&r, gradient, phi + k * C * P);
        }
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        for (size_t b = 0; b < batch.count; b++) {
            const size_t item = (size_t)batch.items[b];
            pk_dataset_inputs(&run->train, &batch.items[b], 1, row);
            pk_loss_targets(run->loss, &run->train, &batch.items[b], 1, C, target);
            r.row = row;
            forward_at(&r, 0);
            pk_loss_gradient(run->loss, C, pk__pass_output(&r.tape), target, seed);
            gradient_there(&r, seed, gradient);
            for (size_t k = 0; k < ROWS * C; k++) {
                double sum = 0;
                for (size_t p = 0; p < P; p++)
                    sum += phi[k * P + p] * gradient[p];
                expected[k * EXAMPLES + item] -= run->learning_rates[s] / (double)batch.count * sum;
            }
        }
    }
    ruler_release(&r);
    free(start), free(end), free(gradient), free(phi), free(row);
}

/* ---- the pipeline ----------------------------------------------------------------------------------- */

/* Means and variances of four channels, for `batch_norm statistics`. */
static pk_status load_statistics(void *user, pk_context *context, const char *name, pk_array *array)
{
    static const double numbers[2][8] = {{0.25, -0.5, 0, 0.125, 1, -1, 0.5, 0},
                                         {1, 0.5, 2, 0.25, 1, 3, 0.125, 0.75}};
    const size_t shape[2] = {2, 8};
    (void)user, (void)context, (void)name;
    *array = pk_array_view(PK_FLOAT64, 2, shape, numbers);
    return PK_OK;
}

static double worst_closure, worst_entry;

static void check(const subject *s, const char *optimizer, double rate, uint64_t seed)
{
    pk_constants constants = {load_statistics, NULL};
    pk_context context;
    pk_graph graph;
    pk_run run;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse_with(&context, s->network, &constants, &graph));
    const size_t P = graph.parameters, C = graph.output_width, D = graph.input_width, cells = ROWS * C;
    const size_t shape_x[2] = {EXAMPLES, D}, shape_y[1] = {EXAMPLES};
    pk_real *data = fixture_normals(seed, EXAMPLES * D, 1), *test = fixture_normals(seed + 1, ROWS * D, 1);
    int64_t labels[EXAMPLES], *tokens = FIXTURE_NEW(int64_t, EXAMPLES * D);
    for (size_t i = 0; s->tokens && i < EXAMPLES * D; i++) /* the first row of each is the same */
        tokens[i] = (int64_t)((i * i + 3 * i + seed) % s->tokens);
    for (size_t i = 0; s->tokens && i < ROWS * D; i++)
        test[i] = (double)(i < D ? (size_t)tokens[i] : (5 * i + 2) % s->tokens);
    for (size_t i = 0; i < EXAMPLES; i++)
        labels[i] = (int64_t)(i % C);
    pk_dataset train;
    train.inputs = pk_array_view(s->tokens ? PK_INT64 : REAL_TYPE, 2, shape_x,
                                 s->tokens ? (const void *)tokens : (const void *)data);
    train.targets = pk_array_view(PK_INT64, 1, shape_y, labels);
    pk_real *weights = FIXTURE_NEW(pk_real, P);
    assert_ok(&context, pk_network_initialize(&context, &graph, seed, weights));
    pk_train_options options;
    pk_train_result result;
    memset(&options, 0, sizeof options);
    assert_ok(&context, pk_loss_parse(&context, s->loss, &options.loss));
    options.steps = STEPS;
    options.batch_size = BATCH;
    options.schedule.rate = rate;
    options.record = fixture_run_path;
    options.replace = 1;
    assert_ok(&context, pk_optimizer_parse(&context, optimizer, &options.optimizer));
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, &result));
    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));

    pk_decompose_options how;
    pk_decomposition out;
    memset(&how, 0, sizeof how);
    const pk_matrix inputs = {test, ROWS, D, D};
    assert_ok(&context, pk_decompose(&context, &run, inputs, &how, &out));
    const double *got = out.kept[0].data;
    print_message("%s; %s: closure %.2g, %zu points in %zu pieces, %zu refused\n", s->network, optimizer,
                  out.worst_closure, out.points, out.pieces, out.refused);
    worst_closure = fmax(worst_closure, out.worst_closure);
    if (strcmp(optimizer, "sgd") == 0) {
        double *expected = FIXTURE_NEW(double, cells *EXAMPLES);
        brute(&context, &run, test, expected);
        const double largest = fixture_largest(cells * EXAMPLES, expected);
        assert_true(largest > 1e-3);
        const double error = fixture_apart(cells * EXAMPLES, got, expected) / largest;
        print_message("    worst entry error %.2g of the largest, %.2g\n", error, largest);
        worst_entry = fmax(worst_entry, error);
        free(expected);
    }
    pk_decomposition_release(&context, &out);
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    free(data), free(test), free(tokens), free(weights);
}

static void test_sequences(void **state)
{
    (void)state;
    static const subject subjects[] = {
        {"input 6; dense 8; layer_norm; relu; dense 3", "softmax_cross_entropy", 0, 0.3, 0.01},
        {"input 3; embedding 7 8; position; residual( attention 2 nobias shared ); residual( dense 16; relu; "
         "dense 8 "
         "); token -1; dense 7",
         "softmax_cross_entropy", 7, 0.1, 0.01},
        {"input 5; dense 8; tanh; dense 4; log_softmax", "nll", 0, 0.3, 0.01},
        {"input 5; dense 8; batch_norm statistics; relu; dense 3; softmax", "squared", 0, 0.2, 0.01},
        {"input 4; embedding 6 4; residual( layer_norm; attention 2 causal ); residual( layer_norm; dense 8; "
         "gelu; "
         "dense 4 ); rms_norm; mean_tokens; dense 5",
         "softmax_cross_entropy", 6, 0.1, 0.01},
    };
    for (size_t i = 0; i < sizeof subjects / sizeof *subjects; i++) {
        check(&subjects[i], "sgd", subjects[i].rate, 10 * i);
        check(&subjects[i], "adamw", subjects[i].adamw_rate, 10 * i + 1);
    }
    assert_true(worst_closure <= ROUNDING(1e-12));
    assert_true(worst_entry <= ROUNDING(1e-11));
}

/* Tokens that are none reach neither training nor a decomposition. */
static void test_tokens(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    pk_run run;
    pk_decomposition out;
    pk_train_options options;
    const size_t shape_x[2] = {2, 2}, shape_y[1] = {2};
    const int64_t labels[2] = {0, 1};
    int64_t tokens[4] = {0, 2, 1, 3};
    pk_real test[4] = {2, 1, 0.5, 0};
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    assert_ok(&context, pk_network_parse(&context, "input 2; embedding 3 2; mean_tokens", &graph));
    pk_real weights[6];
    assert_ok(&context, pk_network_initialize(&context, &graph, 1, weights));
    pk_dataset train;
    train.inputs = pk_array_view(PK_INT64, 2, shape_x, tokens);
    train.targets = pk_array_view(PK_INT64, 1, shape_y, labels);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.steps = 1;
    options.schedule.rate = 1;
    for (int record = 0; record < 2; record++) {
        options.record = record ? fixture_run_path : NULL;
        options.replace = record;
        assert_refused(&context, PK_ARGUMENT,
                       "row 1, number 1: embedding takes whole numbers from 0 to 2, not 3",
                       pk_train(&context, &graph, &train, &options, weights, NULL));
    }
    tokens[3] = 0;
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
    assert_refused(&context, PK_ARGUMENT, "row 1, number 0: embedding takes whole numbers from 0 to 2, not 0.5",
                   pk_decompose(&context, &run, pk_matrix_view(test, 2, 2), NULL, &out));
    pk_decomposition_release(&context, &out);
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sequences), cmocka_unit_test(test_tokens)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
