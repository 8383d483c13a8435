/* Decompositions of graphs built node by node, with operations from outside: against a direct integration of
 * whole gradients, and the representations of tangent features against each other. */
#include "user_operations.h"

typedef struct job {
    pk_context context;
    pk_run run;
    pk_real *weights, *inputs;
    size_t rows;
} job;

/* A recorded run of a small dense network of the same inputs and outputs, with graph and weights replaced:
 * what the optimizer does not explain is unattributed, and everything must still close. */
static void begin(job *j, pk_graph *graph, const char *optimizer, size_t rows, const pk_real *weights)
{
    enum { STEPS = 4 };
    bf_run brute;
    char small[64];
    const bf_recipe recipe = fixture_recipe(21, 6, STEPS, 4, 0.05);
    memset(j, 0, sizeof *j);
    j->context.threads = 1;
    snprintf(small, sizeof small, "input %zu; dense %zu", graph->input_width, graph->output_width);
    fixture_make(small, BF_SQUARED, optimizer, &recipe, &brute);
    fixture_open(&j->context, &brute, &j->run);
    pk_graph_release(&j->context, &j->run.graph);
    pk_array_release(&j->context, &j->run.weights);
    const size_t P = graph->parameters, shape[2] = {STEPS + 1, P};
    j->weights = FIXTURE_NEW(pk_real, (STEPS + 1) * P);
    uint64_t seed = 17;
    for (size_t i = 0; i < (STEPS + 1) * P; i++)
        j->weights[i] = weights ? weights[i]
                                : (i < P ? 0.5 * bf_normal(&seed) : j->weights[i - P] + 0.1 * bf_normal(&seed));
    j->run.graph = *graph;
    j->run.parameters = P;
    j->run.weights = pk_array_view(REAL_TYPE, 2, shape, j->weights);
    j->rows = rows;
    j->inputs = fixture_normals(23, rows * graph->input_width, 1);
    bf_run_free(&brute);
}

static void end(job *j)
{
    pk_run_release(&j->context, &j->run);
    free(j->weights);
    free(j->inputs);
    assert_int_equal(j->context.memory_used, 0);
}

static void decompose(job *j, pk_engine engine, int reverse, pk_decomposition *out)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.unattributed = (double)INFINITY; /* no rule made these steps */
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP;
    options.keep[2] = PK_BY_LAYER;
    options.engine = engine;
    options.reverse_time = reverse;
    assert_ok(&j->context,
              pk_decompose(&j->context, &j->run, pk_matrix_view(j->inputs, j->rows, j->run.graph.input_width),
                           &options, out));
    assert_true(out->worst_closure <= ROUNDING(1e-12));
}

/* gradient (P) of u . f at plain weights, by a tape. */
static void gradient_at(const pk_graph *graph, pk__tape *tape, const pk_real *w, const pk_real *x,
                        const pk_real *u, pk_real *gradient)
{
    const pk__line line = {w, NULL, NULL};
    pk__pass_forward(tape, &line, 1, x);
    memcpy(pk__pass_seed(tape), u, graph->output_width * sizeof *u);
    pk__pass_reverse(tape, &line, 1, 1);
    memset(gradient, 0, graph->parameters * sizeof *gradient);
    pk__pass_weight_gradient(tape, 1, gradient);
}

/* by_example of a smooth graph under plain SGD, the direct way: whole gradients at 20 Gauss nodes on each of
 * four parts of a step. */
static double *direct(job *j)
{
    const pk_run *run = &j->run;
    const pk_graph *graph = &run->graph;
    const size_t P = graph->parameters, C = graph->output_width, N = run->examples;
    double *result = FIXTURE_NEW(double, j->rows *C *N), node[20], weight[20];
    pk_real *at = FIXTURE_NEW(pk_real, P), *own = FIXTURE_NEW(pk_real, P);
    pk_real *phi = FIXTURE_NEW(pk_real, P), *u = FIXTURE_NEW(pk_real, C);
    pk_gradient_workspace workspace;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__tape tape;
    memset(&workspace, 0, sizeof workspace);
    pk_gauss_legendre(20, node, weight);
    pk__pass_take(&arena, graph, 1, 1, 0, &tape);
    unsigned char *memory = NULL;
    assert_ok(&j->context, pk_allocate(&j->context, arena.used, 1, "a tape", &memory));
    pk__arena real = {memory, arena.used, 0, 0};
    pk__pass_take(&real, graph, 1, 1, 0, &tape);
    assert_ok(&j->context, pk_gradient_prepare(&j->context, graph, 1, &workspace));
    for (size_t s = 0; s < run->steps; s++) {
        const pk_real *w = j->weights + s * P;
        for (size_t r = 0; r < j->rows; r++)
            for (size_t c = 0; c < C; c++) {
                memset(phi, 0, P * sizeof *phi);
                memset(u, 0, C * sizeof *u);
                u[c] = 1;
                for (int part = 0; part < 4; part++)
                    for (int q = 0; q < 20; q++) {
                        for (size_t p = 0; p < P; p++)
                            at[p] = w[p] + (part + node[q]) / 4 * (w[P + p] - w[p]);
                        gradient_at(graph, &tape, at, j->inputs + r * graph->input_width, u, own);
                        for (size_t p = 0; p < P; p++)
                            phi[p] += weight[q] / 4 * own[p];
                    }
                for (int64_t b = run->batch_offsets[s]; b < run->batch_offsets[s + 1]; b++) {
                    const int64_t item = run->batch_items[b];
                    const pk_batch single = {1, &item, NULL};
                    double dot = 0;
                    assert_ok(&j->context, pk_batch_gradient(&j->context, graph, run->loss, w, &run->train,
                                                             &single, &workspace, NULL, own));
                    for (size_t p = 0; p < P; p++)
                        dot += phi[p] * own[p];
                    result[(r * C + c) * N + (size_t)item] -=
                        run->learning_rates[s] / (double)(run->batch_offsets[s + 1] - run->batch_offsets[s]) *
                        dot;
                }
            }
    }
    pk_gradient_release(&j->context, &workspace);
    pk_release(&j->context, memory);
    free(at), free(own), free(phi), free(u);
    return result;
}

static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.1", "adam weight_decay=0.1",
                                         "adamw weight_decay=0.1"};

static void test_residual(void **state)
{
    (void)state;
    user_operations all;
    user_fill(&all);
    for (int kinked = 0; kinked < 2; kinked++)
        for (int o = 0; o < 4; o++) {
            job j;
            pk_context context;
            pk_graph graph;
            pk_decomposition first, other;
            memset(&context, 0, sizeof context);
            user_residual(&context, &all, 3, 2, kinked, &graph);
            begin(&j, &graph, optimizers[o], 3, NULL);
            j.context.memory_used += context.memory_used; /* the graph is released through this one */
            const size_t entries = j.rows * 2 * j.run.examples;
            decompose(&j, PK_ENGINE_AUTO, 0, &first);
            const double scale = fixture_largest(entries, first.by_example);
            assert_true(scale > 0);
            if (!kinked && o == 0) {
                double *truth = direct(&j);
                double apart = fixture_apart(entries, truth, first.by_example);
                print_message("residual graph: entries within %.3g of the direct way\n", apart / scale);
                assert_true(apart <= ROUNDING(1e-11) * scale);
                free(truth);
            }
            for (int way = 1; way < 4; way++) {
                decompose(&j,
                          way == 1   ? PK_ENGINE_FACTORED
                          : way == 2 ? PK_ENGINE_INTEGRATED
                                     : PK_ENGINE_AUTO,
                          way == 3, &other);
                assert_true(fixture_apart(entries, first.by_example, other.by_example) <=
                            ROUNDING(kinked ? 1e-13 : 1e-11) * scale);
                assert_true(fixture_apart(j.rows * 2, first.decay, other.decay) <=
                            ROUNDING(1e-11) * fmax(scale, 1));
                pk_decomposition_release(&j.context, &other);
            }
            pk_decomposition_release(&j.context, &first);
            end(&j);
        }
}

/* The same dense network with gradients as outer products, with a bias of its own making, and as rows. */
static void test_dense_forms(void **state)
{
    (void)state;
    user_operations all;
    user_fill(&all);
    const pk_operation *forms[3] = {pk_operation_find("dense"), &all.own_dense, &all.dense_rows};
    static const char *const activations[2] = {"relu", "tanh"};
    for (int a = 0; a < 2; a++)
        for (int o = 0; o < 4; o++) {
            double *reference = NULL, scale = 0, *decay = NULL;
            for (int form = 0; form < 4; form++) { /* the last: rows between outer products */
                job j;
                pk_context context;
                pk_graph graph;
                pk_decomposition got;
                memset(&context, 0, sizeof context);
                user_input(&context, &graph, 3);
                const pk_operation *activation = pk_operation_find(activations[a]);
                int n = user_node(&context, &graph, forms[form % 3], 0, -1, 5);
                n = user_node(&context, &graph, activation, n, -1, 0);
                n = user_node(&context, &graph, forms[form == 3 ? 2 : form], n, -1, 4);
                n = user_node(&context, &graph, activation, n, -1, 0);
                (void)user_node(&context, &graph, forms[form % 3], n, -1, 2);
                begin(&j, &graph, optimizers[o], 3, NULL);
                j.context.memory_used += context.memory_used;
                const size_t entries = j.rows * 2 * j.run.examples;
                for (int engine = 0; engine < 3; engine++) {
                    decompose(&j, (pk_engine)engine, 0, &got);
                    if (!reference) {
                        reference = FIXTURE_NEW(double, entries);
                        decay = FIXTURE_NEW(double, j.rows * 2);
                        memcpy(reference, got.by_example, entries * sizeof *reference);
                        memcpy(decay, got.decay, j.rows * 2 * sizeof *decay);
                        scale = fixture_largest(entries, reference);
                    }
                    const double apart = fixture_apart(entries, reference, got.by_example);
                    if (!(apart <= ROUNDING(1e-13) * scale &&
                          fixture_apart(j.rows * 2, decay, got.decay) <= ROUNDING(1e-13)))
                        fail_msg("%s, %s: form %d, engine %d is %.3g of %.3g off", activations[a],
                                 optimizers[o], form, engine, apart, scale);
                    pk_decomposition_release(&j.context, &got);
                }
                end(&j);
            }
            free(reference);
            free(decay);
        }
}

/* Factors of the loss gradients: their products are the gradients of single examples. */
static size_t panel_at(size_t features, size_t feature, size_t b)
{
    return (b / PK_PANEL * features + feature) * PK_PANEL + b % PK_PANEL;
}

static void test_examples(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    pk__examples examples;
    pk__example_workspace workspace, *w = &workspace;
    pk_gradient_workspace single;
    enum { N = 7 };
    pk_real data[N * 3], targets[N * 2];
    int64_t items[9] = {3, 4, 5, 6, 0, 0, 2, 1, 3};
    const size_t shape_x[2] = {N, 3}, shape_y[2] = {N, 2};
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&single, 0, sizeof single);
    assert_ok(&context,
              pk_network_parse(&context, "input 3; dense 5; tanh; dense 4 nobias; relu; dense 2", &graph));
    const size_t P = graph.parameters;
    pk_real *at = fixture_normals(1, P, 1), *gradient = FIXTURE_NEW(pk_real, P), *own = FIXTURE_NEW(pk_real, P);
    uint64_t seed = 2;
    for (int i = 0; i < N * 3; i++)
        data[i] = bf_normal(&seed);
    for (int i = 0; i < N * 2; i++)
        targets[i] = bf_normal(&seed);
    pk_dataset set;
    set.inputs = pk_array_view(REAL_TYPE, 2, shape_x, data);
    set.targets = pk_array_view(REAL_TYPE, 2, shape_y, targets);
    double batch_weights[9];
    for (int i = 0; i < 9; i++)
        batch_weights[i] = 0.1 * (i + 1);
    const pk_batch batch = {9, items, batch_weights};
    const pk__representation representation = {2, 9, 0, 0, 0};
    pk__arena arena = {NULL, 0, 0, 0};
    unsigned char *memory = NULL;
    for (int pass = 0; pass < 2; pass++) {
        if (pass) {
            assert_ok(&context, pk_allocate(&context, arena.used, 1, "examples", &memory));
            memset(memory, 0xff, arena.used);
            arena.base = memory;
            arena.capacity = arena.used;
            arena.used = 0;
        }
        pk__examples_take(&arena, &graph, 9, &representation, &examples);
        pk__example_workspace_take(&arena, &graph, PK__EXAMPLE_BLOCK, w);
    }
    pk__examples_begin(&examples, &batch, NULL, 0);
    assert_int_equal(examples.count, 9);
    assert_int_equal(examples.consecutive, 0);
    const pk_criterion squared = {.loss = PK_SQUARED};
    pk__examples_fill(&examples, &graph, &squared, at, &set, &batch, 0, w, gradient);
    assert_ok(&context, pk_gradient_prepare(&context, &graph, 1, &single));
    for (size_t b = 0; b < 9; b++) {
        const pk_batch one = {1, items + b, batch_weights + b};
        assert_ok(&context,
                  pk_batch_gradient(&context, &graph, PK_SQUARED, at, &set, &one, &single, NULL, own));
        for (size_t l = 0; l < graph.layers; l++) {
            const pk_node *node = pk_graph_layer(&graph, l);
            const size_t in = graph.nodes[node->inputs[0]].width, out = node->width;
            for (size_t j = 0; j < out; j++) {
                const double delta = examples.cotangent[l][panel_at(out, j, b)];
                for (size_t k = 0; k < in; k++)
                    assert_close(delta * examples.input[l][panel_at(in, k, b)],
                                 own[node->weight_offset + j * in + k], ROUNDING(1e-13));
                if (node->weight_count > in * out)
                    assert_close(delta, own[node->weight_offset + in * out + j], ROUNDING(1e-13));
            }
        }
        for (size_t p = 0; p < P; p++)
            gradient[p] -= own[p];
    }
    assert_true(fixture_largest(P, gradient) <= ROUNDING(1e-13));
    const pk_batch run = {4, items, NULL};
    pk__examples_begin(&examples, &run, NULL, 0);
    assert_int_equal(examples.consecutive, 1);
    pk_gradient_release(&context, &single);
    pk_release(&context, memory);
    pk_graph_release(&context, &graph);
    free(at), free(gradient), free(own);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_residual),
        cmocka_unit_test(test_dense_forms),
        cmocka_unit_test(test_examples),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
