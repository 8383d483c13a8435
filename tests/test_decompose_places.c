/* Layers that are used at several places: both representations of their gradients, under every engine, against
 * gradients made one by one with the tape and summed over a fine rule. */
#include "fixture.h"

enum { EXAMPLES = 9, STEPS = 4, ROWS = 3 };

typedef struct subject {
    const char *network, *optimizer;
    size_t batch;
    double rate;
} subject;

/* gradient (P) of < seed, f > at weights for one input; seed NULL: of the loss of one target. */
static void gradient_at(const pk_graph *graph, const pk_real *weights, const pk_real *x, const pk_real *seed,
                        const pk_real *target, unsigned char *memory, size_t bytes, pk_real *gradient)
{
    const size_t outputs = graph->output_width;
    const pk__line line = {weights, NULL, NULL};
    pk__arena arena = {memory, bytes, 0, 0};
    pk__tape tape;
    pk__pass_take(&arena, graph, 1, 1, 0, &tape);
    pk__pass_forward(&tape, &line, 1, x);
    if (seed)
        memcpy(pk__pass_seed(&tape), seed, outputs * sizeof *seed);
    else
        pk_loss_gradient(PK_SOFTMAX_CROSS_ENTROPY, outputs, pk__pass_output(&tape), target,
                         pk__pass_seed(&tape));
    pk__pass_reverse(&tape, &line, 1, 1);
    memset(gradient, 0, graph->parameters * sizeof *gradient);
    pk__pass_weight_gradient(&tape, 1, gradient);
}

/* A (rows x outputs x examples) of a plain SGD run by Gauss-Legendre with 32 nodes on 8 parts of each step. */
static void brute(pk_context *context, const pk_run *run, const pk_real *inputs, double *expected)
{
    enum { NODES = 32, PARTS = 8 };
    const pk_graph *graph = &run->graph;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width;
    pk__arena measure = {NULL, 0, 0, 0};
    pk__tape tape;
    double x[NODES], w[NODES];
    pk__pass_take(&measure, graph, 1, 1, 0, &tape);
    unsigned char *memory = FIXTURE_NEW(unsigned char, measure.used);
    pk_real *start = FIXTURE_NEW(pk_real, P), *end = FIXTURE_NEW(pk_real, P), *at = FIXTURE_NEW(pk_real, P),
            *gradient = FIXTURE_NEW(pk_real, P), *phi = FIXTURE_NEW(pk_real, ROWS * C * P),
            *seed = FIXTURE_NEW(pk_real, C), *row = FIXTURE_NEW(pk_real, D);
    pk_gauss_legendre(NODES, x, w);
    memset(expected, 0, ROWS * C * EXAMPLES * sizeof *expected);
    for (size_t s = 0; s < run->steps; s++) {
        assert_ok(context, pk_run_weights(context, run, s, start));
        assert_ok(context, pk_run_weights(context, run, s + 1, end));
        memset(phi, 0, ROWS * C * P * sizeof *phi);
        for (int q = 0; q < NODES * PARTS; q++) {
            const double t = (q / NODES + x[q % NODES]) / PARTS;
            for (size_t p = 0; p < P; p++)
                at[p] = (pk_real)(start[p] + t * (end[p] - start[p]));
            for (size_t k = 0; k < ROWS * C; k++) {
                for (size_t c = 0; c < C; c++)
                    seed[c] = c == k % C;
                gradient_at(graph, at, inputs + k / C * D, seed, NULL, memory, measure.used, gradient);
                for (size_t p = 0; p < P; p++)
                    phi[k * P + p] += w[q % NODES] / PARTS * gradient[p];
            }
        }
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        for (size_t b = 0; b < batch.count; b++) {
            pk_dataset_inputs(&run->train, &batch.items[b], 1, row);
            pk_loss_targets(run->loss, &run->train, &batch.items[b], 1, C, seed);
            gradient_at(graph, start, row, NULL, seed, memory, measure.used, gradient);
            for (size_t k = 0; k < ROWS * C; k++) {
                double sum = 0;
                for (size_t p = 0; p < P; p++)
                    sum += phi[k * P + p] * gradient[p];
                expected[k * EXAMPLES + (size_t)batch.items[b]] -=
                    run->learning_rates[s] / (double)batch.count * sum;
            }
        }
    }
    free(memory), free(start), free(end), free(at), free(gradient), free(phi), free(seed), free(row);
}

static double worst_closure, worst_entry;

static void check(const subject *s, uint64_t seed)
{
    static const pk_engine engines[] = {PK_ENGINE_AUTO, PK_ENGINE_FACTORED, PK_ENGINE_HEAD,
                                        PK_ENGINE_INTEGRATED};
    pk_context context;
    pk_graph graph;
    pk_run run;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, s->network, &graph));
    const size_t P = graph.parameters, C = graph.output_width, D = graph.input_width;
    const size_t shape_x[2] = {EXAMPLES, D}, shape_y[1] = {EXAMPLES}, cells = ROWS * C;
    pk_real *data = fixture_normals(seed, EXAMPLES * D, 1), *test = fixture_normals(seed + 1, ROWS * D, 1);
    int64_t labels[EXAMPLES];
    for (size_t i = 0; i < EXAMPLES; i++)
        labels[i] = (int64_t)(i % C);
    pk_dataset train = {pk_array_view(REAL_TYPE, 2, shape_x, data),
                        pk_array_view(PK_INT64, 1, shape_y, labels)};
    pk_real *weights = FIXTURE_NEW(pk_real, P);
    assert_ok(&context, pk_network_initialize(&context, &graph, seed, weights));
    pk_train_options options;
    pk_train_result result;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.steps = STEPS;
    options.batch_size = s->batch;
    options.schedule.rate = s->rate;
    options.record = fixture_run_path;
    options.replace = 1;
    assert_ok(&context, pk_optimizer_parse(&context, s->optimizer, &options.optimizer));
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, &result));
    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
    double *expected = NULL, *first = FIXTURE_NEW(double, cells *EXAMPLES), largest = 0;
    if (strcmp(s->optimizer, "sgd") == 0) {
        expected = FIXTURE_NEW(double, cells *EXAMPLES);
        brute(&context, &run, test, expected);
    }
    for (int e = 0; e < 5; e++) { /* the last: with bounds, which materialize */
        pk_decompose_options how;
        pk_decomposition out;
        memset(&how, 0, sizeof how);
        how.engine = engines[e % 4];
        how.bounds = e == 4;
        how.keep[0] = PK_BY_EXAMPLE;
        const pk_matrix inputs = {test, ROWS, D, D};
        assert_ok(&context, pk_decompose(&context, &run, inputs, &how, &out));
        const double *got = out.kept[0].data;
        if (e == 0)
            memcpy(first, got, cells * EXAMPLES * sizeof *got);
        for (size_t i = 0; i < cells * EXAMPLES; i++)
            largest = fmax(largest, fabs(first[i]));
        for (size_t i = 0; i < cells * EXAMPLES; i++) {
            const double truth = expected ? expected[i] : first[i], error = fabs(got[i] - truth) / largest;
            if (!(error <= ROUNDING(1e-11)))
                fail_msg("%s, %s, engine %d: entry %zu is %.17g, not %.17g", s->network, s->optimizer, e, i,
                         got[i], truth);
            worst_entry = fmax(worst_entry, error);
            if (how.bounds)
                assert_true(fabs(got[i] - truth) <= out.bounds[i] + 1e-13 * largest);
        }
        worst_closure = fmax(worst_closure, out.worst_closure);
        pk_decomposition_release(&context, &out);
    }
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    free(data), free(test), free(weights), free(expected), free(first);
}

static void test_engines(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 4x3; dense 5; tanh; dense 4 nobias; tanh; flatten; dense 3",
        "input 2x3; dense 4; position; tanh; residual( dense 4 ); flatten; dense 3; tanh; dense 3",
        "input 1x5x5; conv 2 3x3; tanh; conv 3 3x3 pad=1 nobias; tanh; flatten; dense 3",
        "input 2x4x4; conv 3 2x2 stride=2; tanh; conv 4 2x2; tanh; flatten; dense 2",
        "input 2x4x4; residual( conv 4 3x3 pad=1 groups=2; tanh; conv 2 1x1 ); avg_pool 2; flatten; dense 2",
    };
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.01", "adamw"};
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (size_t o = 0; o < 3; o++) {
            const subject s = {networks[n], optimizers[o], o % 2 ? 4 : 0, o == 2 ? 0.01 : 0.3};
            check(&s, 10 * n + o);
        }
    print_message("worst closure %.3g, worst entry error %.3g of the largest entry\n", worst_closure,
                  worst_entry);
    assert_true(worst_closure <= ROUNDING(1e-12));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_engines)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
