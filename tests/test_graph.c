/* Autodiff: every operation and whole graphs, in reverse and forward, against long double, central
 * differences and each other; graphs built node by node with operations from outside. */
#include "graph_checks.h"
#include "user_operations.h"

static const char *const activations[BF_ACTIVATIONS] = {
    "identity", "relu",      "leaky_relu 0.1", "tanh",     "sigmoid",     "softplus 2", "gelu",
    "silu",     "erf",       "hard_tanh",      "abs",      "elu 1.5",     "selu",       "mish",
    "relu6",    "hardswish", "hard_sigmoid",   "softsign", "log_sigmoid", "gelu tanh"};

/* Values and slopes of every activation from tiny to huge, at kinks too. */
static void test_activations(void **state)
{
    (void)state;
    static const double doubles[] = {3,    -3,   6,    0,     -0.0,      1e-320,     -1e-300, 1e-8,  -1e-8,
                                     0.3,  -0.7, 1,    -1,    1 + 1e-15, -1 - 1e-15, 2.5,     -3.5,  8,
                                     -8,   20,   -20,  37.5,  -37.5,     100,        -100,    709,   -745,
                                     1000, -1e4, 1e30, -1e30, 1e154,     -1e154,     1e300,   -1e300};
    enum { COUNT = EITHER(35, 31) }; /* to the end of the range */
    pk_real points[COUNT];
    for (int i = 0; i < COUNT; i++)
        points[i] = (pk_real)doubles[i];
    for (int a = 0; a < BF_ACTIVATIONS; a++) {
        holder h;
        char network[100];
        snprintf(network, sizeof network, "input 1; dense 1 nobias; %s", activations[a]);
        hold(&h, network, COUNT, 1);
        const bf_network net = fixture_network(network);
        const pk_real one = 1;
        const pk__line line = {&one, NULL, NULL};
        pk__pass_forward(&h.tape, &line, COUNT, points);
        for (int i = 0; i < COUNT; i++) {
            pk__pass_seed(&h.tape)[i] = 1;
            h.tape.tangent[1][i] = 1;
        }
        pk__pass_reverse(&h.tape, &line, COUNT, 1);
        for (int i = 0; i < COUNT; i++) {
            const double value = (double)bf_activate(&net.layer[0], (bf_real)points[i]);
            const double slope = (double)bf_slope(&net.layer[0], (bf_real)points[i]);
            const double own = pk__pass_output(&h.tape)[i], own_slope = h.tape.cotangent[1][i];
            if (!(fabs(own - value) <=
                  ROUNDING(4e-16) *
                      fmax(fabs(value), fabs(points[i]) < 1 ? fabs(points[i]) + (value > 0.1) : 1)))
                fail_msg("%s(%g) = %.17g, not %.17g", activations[a], points[i], own, value);
            if (!(fabs(own_slope - slope) <= ROUNDING(1e-15) * fmax(1, fabs(slope))))
                fail_msg("%s'(%g) = %.17g, not %.17g", activations[a], points[i], own_slope, slope);
        }
        drop(&h);
    }
}

/* Values, Jacobian by reverse with several copies, weight gradients, tangents: against the oracle. */
static void check_network(const char *network, uint64_t seed)
{
    holder h;
    enum { ROWS = 5 };
    const bf_network net = fixture_network(network);
    const size_t P = bf_parameters(&net), C = bf_outputs(&net), in = net.inputs;
    pk_real *w = fixture_normals(seed, P, 0.6), *d = fixture_normals(seed + 1, P, 1);
    pk_real *x = fixture_normals(seed + 2, ROWS * in, 1), *u = fixture_normals(seed + 3, ROWS * C, 1);
    hold(&h, network, ROWS, C);
    assert_int_equal(h.graph.parameters, P);
    assert_int_equal(h.graph.output_width, C);
    assert_int_equal(h.graph.layers, net.layers);
    for (size_t l = 0; l < net.layers; l++)
        assert_int_equal(pk_graph_layer(&h.graph, l)->weight_offset, bf_offset(&net, l));
    const pk__line line = {w, d, NULL}, plain = {w, NULL, NULL};
    pk_real t[ROWS] = {0, 0, 0, 0, 0};
    const pk__line along = {w, d, t};
    (void)line;
    pk__pass_forward(&h.tape, &along, ROWS, x);
    pk__pass_tangent(&h.tape, &along, ROWS);
    pk_real *tangent = FIXTURE_NEW(pk_real, ROWS * C);
    memcpy(tangent, h.tape.tangent[h.graph.node_count - 1], ROWS * C * sizeof *tangent);
    pk__pass_forward(&h.tape, &plain, ROWS, x);
    for (size_t r = 0; r < ROWS; r++)
        for (size_t k = 0; k < C; k++)
            for (size_t c = 0; c < C; c++)
                pk__pass_seed(&h.tape)[(r * C + k) * C + c] = c == k;
    pk__pass_reverse(&h.tape, &plain, ROWS, C);
    bf_real f[64], *jacobian = BF_NEW(bf_real, C * P);
    for (size_t r = 0; r < ROWS; r++) {
        bf_evaluate(&net, w, x + r * in, f, jacobian);
        for (size_t c = 0; c < C; c++) {
            bf_real push = 0;
            for (size_t p = 0; p < P; p++)
                push += jacobian[c * P + p] * (bf_real)d[p];
            assert_close(pk__pass_output(&h.tape)[r * C + c], (double)f[c],
                         ROUNDING(1e-14) * fmax(1, fabs((double)f[c])));
            assert_close(tangent[r * C + c], (double)push, ROUNDING(1e-13) * fmax(1, fabs((double)push)));
            for (size_t l = 0; l < net.layers;
                 l++) { /* the outer product of cotangent and input is the Jacobian */
                const pk_node *node = pk_graph_layer(&h.graph, l);
                const size_t n = (size_t)(node - h.graph.nodes), before = (size_t)node->inputs[0];
                const size_t fan_in = h.graph.nodes[before].width;
                for (size_t j = 0; j < node->width; j++) {
                    const double delta = h.tape.cotangent[n][(r * C + c) * node->width + j];
                    for (size_t k = 0; k < fan_in; k++)
                        assert_close(delta * h.tape.value[before][r * fan_in + k],
                                     jacobian[c * P + node->weight_offset + j * fan_in + k], ROUNDING(1e-13));
                }
            }
        }
    }
    /* gradient += sum over rows of u . J, after one reverse with u; adjoint of the tangent */
    pk_real *gradient = FIXTURE_NEW(pk_real, P);
    bf_real *expected = BF_NEW(bf_real, P);
    double left = 0, right = 0, size = 0;
    for (size_t p = 0; p < P; p++)
        gradient[p] = (pk_real)p;
    memcpy(pk__pass_seed(&h.tape), u, ROWS * C * sizeof *u);
    pk__pass_reverse(&h.tape, &plain, ROWS, 1);
    pk__pass_weight_gradient(&h.tape, ROWS, gradient);
    for (size_t r = 0; r < ROWS; r++) {
        bf_evaluate(&net, w, x + r * in, f, jacobian);
        for (size_t c = 0; c < C; c++) {
            left += u[r * C + c] * tangent[r * C + c];
            for (size_t p = 0; p < P; p++)
                expected[p] += (bf_real)u[r * C + c] * jacobian[c * P + p];
        }
    }
    for (size_t p = 0; p < P; p++) {
        assert_close(gradient[p] - (pk_real)p, (double)expected[p], ROUNDING(1e-13) * fmax(1, (double)p));
        right += (gradient[p] - (pk_real)p) * d[p];
        size += fabs(gradient[p] * d[p]);
    }
    assert_close(left, right, ROUNDING(1e-13) * fmax(1, size));
    free(w), free(d), free(x), free(u), free(tangent), free(jacobian), free(gradient), free(expected);
    drop(&h);
}

static void test_networks(void **state)
{
    (void)state;
    for (int a = 0; a < BF_ACTIVATIONS; a++)
        for (int b = 0; b < 3; b++) {
            char network[200];
            snprintf(network, sizeof network, "input %d; dense %d%s; %s; dense 4; %s; dense %d nobias",
                     1 + a % 4, 3 + b, b == 1 ? " nobias" : "", activations[a],
                     activations[(a + b) % BF_ACTIVATIONS], 1 + b);
            check_network(network, (uint64_t)(10 * a + b));
        }
    check_network("input 2; dense 3", 500);
    check_network("input 2; dense 3; relu", 501);
    check_network("input 40; dense 70; tanh; dense 33; relu; dense 17", 502);
}

/* ---- graphs node by node ------------------------------------------------------------------------------ */

static double evaluate(holder *h, const pk_real *w, const pk_real *x, const pk_real *u, size_t rows)
{
    const size_t C = h->graph.output_width;
    pk_real *out = FIXTURE_NEW(pk_real, rows * C);
    double sum = 0;
    assert_ok(&h->context, pk_graph_evaluate(&h->context, &h->graph, w,
                                             pk_matrix_view((pk_real *)x, rows, h->graph.input_width),
                                             pk_matrix_view(out, rows, C)));
    for (size_t i = 0; i < rows * C; i++)
        sum += u[i] * out[i];
    free(out);
    return sum;
}

/* gradient (P) of sum u . f(w + t d), each row at its own t, from the cotangents of every layer. */
static void full_gradient(holder *h, const pk__line *line, const pk_real *u, const pk_real *x, size_t rows,
                          pk_real *gradient)
{
    const size_t C = h->graph.output_width;
    pk__pass_forward(&h->tape, line, rows, x);
    memcpy(pk__pass_seed(&h->tape), u, rows * C * sizeof *u);
    pk__pass_reverse(&h->tape, line, rows, 1);
    memset(gradient, 0, h->graph.parameters * sizeof *gradient);
    pk__pass_weight_gradient(&h->tape, rows, gradient);
}

/* A residual network of operations from outside. */
static void test_residual(void **state)
{
    (void)state;
    user_operations all;
    user_fill(&all);
    for (int kinked = 0; kinked < 2; kinked++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        user_residual(&context, &all, 3, 2, kinked, &graph);
        assert_int_equal(graph.degree < 0, !kinked);
        assert_int_equal(graph.switched, kinked);
        check_graph(&context, &graph, 11);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

/* The rules of every elementwise operation, second derivatives and switches among them. */
static void test_rules(void **state)
{
    (void)state;
    static const char *const others[] = {"scale -1.5", "sine 2", "sign", "step 3"};
    for (int a = 0; a < BF_ACTIVATIONS + 4; a++) {
        char network[200];
        snprintf(network, sizeof network, "input 3; dense 4; residual( %s; dense 4 ); dense 2",
                 a < BF_ACTIVATIONS ? activations[a] : others[a - BF_ACTIVATIONS]);
        check_network_text(network, (uint64_t)a);
    }
}

/* A node that nobody reads does not disturb the others. */
static void test_unread_node(void **state)
{
    (void)state;
    holder h;
    memset(&h, 0, sizeof h);
    const pk_operation *dense = pk_operation_find("dense");
    user_input(&h.context, &h.graph, 2);
    int a = user_node(&h.context, &h.graph, dense, 0, -1, 3);
    (void)user_node(&h.context, &h.graph, dense, a, -1, 5); /* unread */
    int c = user_node(&h.context, &h.graph, pk_operation_find("tanh"), a, -1, 0);
    (void)user_node(&h.context, &h.graph, dense, c, -1, 2);
    hold_graph(&h, 3, 1);
    const size_t P = h.graph.parameters;
    pk_real *w = fixture_normals(1, P, 1), *x = fixture_normals(2, 6, 1), *u = fixture_normals(3, 6, 1);
    pk_real *gradient = FIXTURE_NEW(pk_real, P);
    const pk__line plain = {w, NULL, NULL};
    full_gradient(&h, &plain, u, x, 3, gradient);
    for (size_t p = 0; p < P; p++) {
        const pk_real keep = w[p], step = (pk_real)(sizeof(pk_real) > sizeof(float) ? 1e-5 : 1e-2);
        w[p] = keep + step;
        double slope = evaluate(&h, w, x, u, 3);
        w[p] = keep - step;
        slope = (slope - evaluate(&h, w, x, u, 3)) / (2 * (double)step);
        w[p] = keep;
        assert_close(gradient[p], slope, ROUNDING(1e-8));
    }
    free(w), free(x), free(u), free(gradient);
    drop(&h);
}

/* ---- arguments ---------------------------------------------------------------------------------------- */

static pk_status bad_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context, (void)graph;
    node->shape.rank = 2;
    node->shape.dims[0] = SIZE_MAX / 2;
    node->shape.dims[1] = 4;
    return PK_OK;
}

static void test_arguments(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph, before;
    pk_shape shape;
    int zero = 0, wrong = 5, many[5] = {0, 0, 0, 0, 0}, number = -7;
    double attributes[PK_NODE_ATTRIBUTES] = {0}, no[PK_NODE_ATTRIBUTES] = {0, 1};
    const pk_operation *dense = pk_operation_find("dense"), *relu = pk_operation_find("relu");
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&shape, 0, sizeof shape);
    assert_null(pk_operation_find("conv9"));
    assert_null(pk_operation_find(""));
    assert_refused(&context, PK_ARGUMENT, "no input yet",
                   pk_graph_add(&context, &graph, relu, 1, &zero, NULL, NULL));
    assert_refused(&context, PK_SHAPE, "rank 0", pk_graph_input(&context, &graph, &shape));
    shape.rank = 5;
    assert_refused(&context, PK_SHAPE, "rank 5", pk_graph_input(&context, &graph, &shape));
    shape.rank = 2;
    shape.dims[0] = 3;
    assert_refused(&context, PK_OVERFLOW, "zero", pk_graph_input(&context, &graph, &shape));
    shape.dims[1] = SIZE_MAX / 2;
    assert_refused(&context, PK_OVERFLOW, "too large", pk_graph_input(&context, &graph, &shape));
    assert_int_equal(graph.node_count, 0);
    shape.dims[1] = 2;
    assert_ok(&context, pk_graph_input(&context, &graph, &shape));
    assert_int_equal(graph.input_width, 6);
    assert_refused(&context, PK_ARGUMENT, "already", pk_graph_input(&context, &graph, &shape));
    before = graph;
    assert_refused(&context, PK_ARGUMENT, "no operation",
                   pk_graph_add(&context, &graph, NULL, 1, &zero, NULL, &number));
    assert_refused(&context, PK_ARGUMENT, "0 inputs",
                   pk_graph_add(&context, &graph, relu, 0, &zero, NULL, &number));
    assert_refused(&context, PK_ARGUMENT, "5 inputs",
                   pk_graph_add(&context, &graph, relu, 5, many, NULL, &number));
    assert_refused(&context, PK_ARGUMENT, "node 5",
                   pk_graph_add(&context, &graph, relu, 1, &wrong, NULL, &number));
    wrong = -1;
    assert_refused(&context, PK_ARGUMENT, "node -1",
                   pk_graph_add(&context, &graph, relu, 1, &wrong, NULL, &number));
    assert_refused(&context, PK_ARGUMENT, "dense: outputs is 0; a whole number from 1",
                   pk_graph_add(&context, &graph, dense, 1, &zero, no, &number));
    pk_operation odd = *relu;
    odd.shape = bad_shape;
    assert_refused(&context, PK_OVERFLOW, "too large",
                   pk_graph_add(&context, &graph, &odd, 1, &zero, NULL, &number));
    assert_memory_equal(&graph, &before, sizeof before);
    assert_int_equal(number, -7);
    pk_graph_release(&context, &graph);
    shape.rank = 1;
    assert_ok(&context, pk_graph_input(&context, &graph, &shape));
    static const double outs[] = {0, -1, 1.5, 2e9, (double)NAN, (double)INFINITY};
    for (int k = 0; k < 6; k++) {
        attributes[0] = outs[k];
        assert_refused(&context, PK_ARGUMENT, "whole number",
                       pk_graph_add(&context, &graph, dense, 1, &zero, attributes, NULL));
    }
    attributes[0] = 4;
    assert_ok(&context, pk_graph_add(&context, &graph, dense, 1, &zero, attributes, &number));
    assert_int_equal(number, 1);
    assert_null(pk_graph_layer(&graph, 1));
    /* evaluate */
    pk_real w[12] = {1}, x[6] = {1, 2, 3, 4, 5, 6}, y[8] = {7, 7, 7, 7, 7, 7, 7, 7};
    pk_matrix in = pk_matrix_view(x, 2, 3), out = pk_matrix_view(y, 2, 4), bad;
    bad = in, bad.cols = 2;
    assert_refused(&context, PK_SHAPE, "2 x 2", pk_graph_evaluate(&context, &graph, w, bad, out));
    bad = in, bad.ld = 2;
    assert_refused(&context, PK_SHAPE, "ld 2", pk_graph_evaluate(&context, &graph, w, bad, out));
    bad = out, bad.rows = 1;
    assert_refused(&context, PK_SHAPE, "1 x 4", pk_graph_evaluate(&context, &graph, w, in, bad));
    bad = out, bad.data = NULL;
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_graph_evaluate(&context, &graph, w, in, bad));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_graph_evaluate(&context, &graph, NULL, in, out));
    assert_true(y[0] == 7 && y[7] == 7);
    bad = in, bad.rows = 0, bad.data = NULL;
    pk_matrix empty = out;
    empty.rows = 0;
    assert_ok(&context, pk_graph_evaluate(&context, &graph, NULL, bad, empty));
    assert_ok(&context, pk_graph_evaluate(&context, &graph, w, in, out));
    assert_true(y[0] == 1 && y[4] == 4 && y[7] == 0);
    context.memory_limit = context.memory_used + 100;
    assert_int_equal(pk_graph_evaluate(&context, &graph, w, in, out), PK_MEMORY_LIMIT);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

/* input 2; dense 3 or none; a constant (1, 2); perhaps a layer behind it. */
static void constant_graph(pk_context *context, pk_graph *graph, int first, int last)
{
    const pk_operation *constant = pk_operation_find("constant");
    const pk_real numbers[2] = {1, -2};
    double attributes[PK_NODE_ATTRIBUTES] = {1, 2};
    const int zero = 0;
    int node = 0;
    user_input(context, graph, 2);
    if (first)
        node = user_node(context, graph, pk_operation_find("dense"), 0, -1, 3);
    node = user_node(context, graph, pk_operation_find("tanh"), node, -1, 0); /* nobody takes it */
    assert_ok(context,
              pk_graph_add_constants(context, graph, constant, 1, &zero, attributes, 2, numbers, &node));
    node = user_node(context, graph, pk_operation_find("flatten"), node, -1, 0);
    if (last)
        (void)user_node(context, graph, pk_operation_find("dense"), node, -1, 2);
}

/* Whatever asks an output for a cotangent, where some weights, or all, do not reach it: their derivatives are 0. */
static void test_constant_outputs(void **state)
{
    (void)state;
    enum { ROWS = 3, MOST = 20 };
    for (int kind = 0; kind < 4; kind++) {
        pk_context context;
        pk_graph graph;
        const int first = kind != 1, last = kind >= 2;
        memset(&context, 0, sizeof context);
        constant_graph(&context, &graph, first, last);
        const size_t P = graph.parameters, own = (size_t)(first ? 9 : 0);
        assert_int_equal(P, own + (size_t)(last ? 6 : 0));
        pk_real w[MOST], d[MOST], gradient[MOST], x[ROWS * 2], u[ROWS * 2], rows[ROWS * 2 * MOST],
            tangents[ROWS * 2], slopes[ROWS * 2 * 2], gram[ROWS * 2 * ROWS * 2];
        for (size_t i = 0; i < MOST; i++)
            w[i] = d[i] = (pk_real)(0.25 * (double)i - 1);
        for (size_t i = 0; i < ROWS * 2; i++)
            x[i] = u[i] = (pk_real)(1 + i);
        const size_t shape[2] = {ROWS, 2};
        const pk_dataset data = {pk_array_view(REAL_TYPE, 2, shape, x), pk_array_view(REAL_TYPE, 2, shape, u)};
        const int64_t items[ROWS] = {0, 1, 2};
        const pk_batch batch = {ROWS, items, NULL};
        const pk_matrix in = pk_matrix_view(x, ROWS, 2), cotangents = pk_matrix_view(u, ROWS, 2),
                        none = pk_matrix_view(NULL, 0, 0);
        pk_gradient_workspace workspace;
        double objective = -1;
        memset(&workspace, 0, sizeof workspace);
        assert_ok(&context, pk_gradient_prepare(&context, &graph, ROWS, &workspace));
        assert_ok(&context, pk_batch_gradient(&context, &graph, PK_SQUARED, w, &data, &batch, &workspace,
                                              &objective, gradient));
        assert_true(objective > 0);
        for (size_t p = 0; p < own; p++)
            assert_true(gradient[p] == 0);
        for (size_t p = own; p < P; p++)
            assert_true(gradient[p] != 0);
        pk_gradient_release(&context, &workspace);
        memset(rows, 0xff, sizeof rows);
        memset(slopes, 0xff, sizeof slopes);
        assert_ok(&context, pk_vjp(&context, &graph, w, in, cotangents, pk_matrix_view(rows, ROWS, P),
                                   pk_matrix_view(slopes, ROWS, 2)));
        for (size_t i = 0; i < ROWS * 2; i++)
            assert_true(slopes[i] == 0);
        for (size_t i = 0; i < ROWS * P; i++)
            assert_true(i % P < own ? rows[i] == 0 : rows[i] == rows[i]);
        if (P) {
            assert_ok(&context, pk_vjp_sum(&context, &graph, w, in, cotangents, gradient));
            assert_ok(&context, pk_jvp(&context, &graph, w, in, d, none, pk_matrix_view(tangents, ROWS, 2)));
            assert_true((tangents[0] != 0) == last);
            assert_ok(&context,
                      pk_hessian_product(&context, &graph, PK_SQUARED, w, &data, &batch, d, gradient));
            for (size_t p = 0; p < own; p++)
                assert_true(gradient[p] == 0);
            assert_ok(&context,
                      pk_gauss_newton_product(&context, &graph, PK_SQUARED, w, &data, &batch, d, gradient));
            assert_ok(&context, pk_loss_gradients(&context, &graph, PK_SQUARED, w, &data, &batch, NULL,
                                                  pk_matrix_view(rows, ROWS, P)));
        }
        assert_ok(&context, pk_jvp(&context, &graph, w, in, NULL, in, pk_matrix_view(tangents, ROWS, 2)));
        assert_true(tangents[0] == 0);
        assert_ok(&context, pk_jacobian(&context, &graph, w, in, pk_matrix_view(rows, ROWS * 2, P),
                                        pk_matrix_view(slopes, ROWS * 2, 2)));
        assert_ok(&context,
                  pk_kernel_ntk(&context, &graph, w, in, none, pk_matrix_view(gram, ROWS * 2, ROWS * 2)));
        for (size_t i = 0; i < ROWS * 2; i++)
            for (size_t j = 0; j < ROWS * 2; j++) {
                double sum = 0;
                for (size_t p = 0; p < P; p++)
                    sum += (double)rows[i * P + p] * rows[j * P + p];
                assert_close(gram[i * ROWS * 2 + j], sum, ROUNDING(1e-13));
            }
        /* The examples of a step. */
        const pk__representation how = {0};
        pk__examples examples;
        pk__example_workspace room;
        pk__arena measure = {NULL, 0, 0, 0};
        pk__examples_take(&measure, &graph, ROWS, &how, &examples);
        pk__example_workspace_take(&measure, &graph, ROWS, &room);
        pk__arena arena = {FIXTURE_NEW(unsigned char, measure.used), measure.used, 0, 0};
        pk__examples_take(&arena, &graph, ROWS, &how, &examples);
        pk__example_workspace_take(&arena, &graph, ROWS, &room);
        pk__examples_begin(&examples, &batch, NULL, 0);
        memset(gradient, 0, sizeof gradient);
        const pk_criterion squared = {.loss = PK_SQUARED};
        pk__examples_fill(&examples, &graph, &squared, w, &data, &batch, 0, &room, gradient);
        for (size_t p = 0; p < own; p++)
            assert_true(gradient[p] == 0);
        free(arena.base);
        /* Training. */
        pk_train_options options;
        memset(&options, 0, sizeof options);
        options.loss = PK_SQUARED;
        options.steps = 2;
        options.schedule.rate = 0.01;
        if (last)
            assert_ok(&context, pk_train(&context, &graph, &data, &options, w, NULL));
        else
            assert_refused(&context, PK_SHAPE, "parameters",
                           pk_train(&context, &graph, &data, &options, w, NULL));
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

static size_t wrong_positions, wrong_fan_in, wrong_weights;
static int wrong_unfolds, wrong_tensors; /* 1: too small, 2: too many, 3: empty */

/* dense, with one number that is not its own. */
static pk_status wrong_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk_operation_find("dense")->shape(context, graph, node);
    node->positions += wrong_positions;
    node->fan_in += wrong_fan_in;
    node->weight_count += wrong_weights;
    node->unfolds |= wrong_unfolds;
    node->tensor_count = wrong_tensors == 2 ? PK_NODE_TENSORS + 1 : wrong_tensors != 0;
    for (int t = 0; t < PK_NODE_TENSORS; t++) {
        node->tensors[t].shape.rank = 1;
        node->tensors[t].shape.dims[0] = wrong_tensors == 1 ? node->weight_count - 1 : 0;
    }
    return status;
}

/* An operation whose table says what its nodes are not. */
static void test_false_operations(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    pk_shape shape = {1, {3}};
    const int inputs[2] = {0, 0};
    double attributes[PK_NODE_ATTRIBUTES] = {4, 1, 0, 1};
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_graph_input(&context, &graph, &shape));
    const pk_operation dense = *pk_operation_find("dense"), relu = *pk_operation_find("relu");
    for (int k = 0; k < 17; k++) {
        pk_operation own = k < 11 || k > 13 ? dense : relu;
        const char *words = "fit its 3 inputs, 4 outputs";
        own.name = "own";
        if (k < 11 || k > 13)
            own.shape = wrong_shape;
        wrong_tensors = k > 13 ? k - 13 : 0;
        if (k > 13)
            words = k == 14   ? "its parameter tensors have 15 numbers, it has 16 weights"
                    : k == 15 ? "5 parameter tensors; 1 to 4 are possible"
                              : "a dimension of zero";
        wrong_positions = k == 0, wrong_fan_in = k == 1, wrong_weights = k == 2, wrong_unfolds = k == 3;
        if (k == 3)
            words = "unfold is missing";
        if (k == 4)
            own.smoothness = PK_SMOOTH, words = "PK_TANGENT_OUTER is for one input";
        if (k == 5)
            own.linear_in_weights = 0, words = "PK_TANGENT_OUTER is for one input";
        if (k == 6)
            own.tangent_form = PK_TANGENT_ROWS, words = "needs row_gradients";
        if (k == 7)
            own.tangent_form = PK_TANGENT_NONE, words = "no tangent form";
        if (k == 8)
            own.weight_gradient = NULL, words = "no rule for their gradient";
        if (k == 9)
            own.reverse = NULL, words = "reverse is missing";
        if (k == 10)
            own.elementwise = 1, words = "elementwise";
        if (k == 11)
            own.switch_count = NULL, words = "switch_count and switches";
        if (k == 12)
            own.forward = NULL, words = "forward";
        if (k == 13)
            words = "elementwise";
        assert_refused(&context,
                       k < 3 || k == 14 ? PK_SHAPE
                       : k == 16        ? PK_OVERFLOW
                                        : PK_ARGUMENT,
                       words, pk_graph_add(&context, &graph, &own, k == 13 ? 2 : 1, inputs, attributes, NULL));
        assert_int_equal(graph.node_count, 1);
    }
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

/* The same bits for any number of threads, rows apart in memory. */
static void test_evaluate_bits(void **state)
{
    (void)state;
    enum { ROWS = 333 };
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, "input 5; dense 17; tanh; dense 9; relu; dense 3", &graph));
    pk_real *w = fixture_normals(1, graph.parameters, 1), *x = fixture_normals(2, ROWS * 5, 1);
    pk_real *wide = FIXTURE_NEW(pk_real, ROWS * 7), *first = FIXTURE_NEW(pk_real, ROWS * 3),
            *y = FIXTURE_NEW(pk_real, ROWS * 4);
    for (size_t i = 0; i < ROWS * 5; i++)
        wide[i / 5 * 7 + i % 5] = x[i];
    context.threads = 1;
    assert_ok(&context, pk_graph_evaluate(&context, &graph, w, pk_matrix_view(x, ROWS, 5),
                                          pk_matrix_view(first, ROWS, 3)));
    for (int threads = 2; threads <= 5; threads++) {
        pk_matrix in = {wide, ROWS, 5, 7}, out = {y, ROWS, 3, 4};
        context.threads = threads;
        for (size_t i = 0; i < ROWS * 4; i++)
            y[i] = -5;
        assert_ok(&context, pk_graph_evaluate(&context, &graph, w, in, out));
        for (size_t r = 0; r < ROWS; r++) {
            assert_memory_equal(y + 4 * r, first + 3 * r, 3 * sizeof *y);
            assert_true(y[4 * r + 3] == -5);
        }
    }
    free(w), free(x), free(wide), free(first), free(y);
    pk_graph_release(&context, &graph);
}

/* PyTorch's list of parameters, with their shapes. */
static void parameter_tensors_are_listed(void **state)
{
    static const struct {
        const char *network;
        size_t count;
        size_t dims[8][PK_SHAPE_RANK];
    } cases[] = {
        {"input 5; dense 4; tanh; dense 3 nobias", 3, {{4, 5}, {4}, {3, 4}}},
        {"input 2x4x4; conv 4 3x3; flatten; dense 2", 4, {{4, 2, 3, 3}, {4}, {2, 16}, {2}}},
        {"input 2x4x4; conv 4 3x3 groups=2 nobias; flatten; dense 2", 3, {{4, 1, 3, 3}, {2, 16}, {2}}},
        {"input 4; embedding 7 6; position; layer_norm; mean_tokens; dense 2",
         6,
         {{7, 6}, {4, 6}, {6}, {6}, {2, 6}, {2}}},
        {"input 6; rms_norm; dense 2", 3, {{6}, {2, 6}, {2}}},
        {"input 3x4; attention 2; flatten", 4, {{12, 4}, {12}, {4, 4}, {4}}},
    };
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        pk_context context = {0};
        pk_graph graph = {0};
        size_t at = 0;
        if (pk_network_parse(&context, cases[c].network, &graph))
            fail_msg("%s", pk_message(&context));
        assert_int_equal(graph.block_count, cases[c].count);
        for (size_t b = 0; b < cases[c].count; b++) {
            const pk_weight_block *block = &graph.blocks[b];
            size_t count = 1;
            assert_int_equal(block->first, at);
            for (int i = 0; i < PK_SHAPE_RANK; i++) {
                assert_int_equal(i < block->shape.rank ? block->shape.dims[i] : 0, cases[c].dims[b][i]);
                count *= i < block->shape.rank ? block->shape.dims[i] : 1;
            }
            assert_int_equal(block->count, count);
            assert_int_equal(block->use_count, 1);
            const pk_node *node = &graph.nodes[block->uses[0].node];
            assert_int_equal(node->weight_offset + node->tensors[block->uses[0].tensor].first, at);
            assert_int_equal(block->column, node->layer);
            at += count;
        }
        assert_int_equal(at, graph.parameters);
        pk_graph_release(&context, &graph);
    }
}

/* A graph with tied nodes is the same after each allocation of pk_graph_add that fails, and can be added to. */
static void add_to_a_tied_graph_without_memory(void **state)
{
    const pk_shape shape = {1, {3}};
    const pk_operation *dense = pk_operation_find("dense"), *tanh = pk_operation_find("tanh");
    double attributes[PK_NODE_ATTRIBUTES];
    const pk_real constants[2] = {1, 2};
    fixture_memory memory;
    pk_context context = {0};
    pk_graph graph = {0};
    size_t refused = 0;
    (void)state;
    fixture_use(&context, &memory);
    memcpy(attributes, dense->defaults, sizeof attributes);
    attributes[PK_DENSE_OUTPUTS] = 3;
    assert_ok(&context, pk_graph_input(&context, &graph, &shape));
    for (int last = 0; last < 40; last++) {
        const pk_operation *operation = last % 3 == 2 ? tanh : dense;
        const size_t before[] = {graph.node_count, graph.parameters, graph.untied, graph.layers, graph.columns};
        int number = -1;
        for (size_t at = 1;; at++, refused++) {
            memory.allocations = 0;
            memory.fail_at = at;
            if (!pk_graph_add_constants(&context, &graph, operation, 1, &last,
                                        operation == dense ? attributes : NULL, 2, constants, &number))
                break;
            const size_t now[] = {graph.node_count, graph.parameters, graph.untied, graph.layers,
                                  graph.columns};
            assert_memory_equal(before, now, sizeof now);
            assert_int_equal(number, -1);
        }
        memory.fail_at = 0;
        assert_int_equal(number, last + 1);
        if (operation == dense && number > 1)
            assert_ok(&context, pk_graph_tie(&context, &graph, number, 0, 1, number % 2));
    }
    assert_true(refused > 40);
    assert_int_equal(graph.layers, 27);
    assert_int_equal(graph.parameters, 9 + 27 * 3);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    assert_int_equal(memory.held, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parameter_tensors_are_listed),
        cmocka_unit_test(add_to_a_tied_graph_without_memory),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_networks),
        cmocka_unit_test(test_residual),
        cmocka_unit_test(test_rules),
        cmocka_unit_test(test_unread_node),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_evaluate_bits),
        cmocka_unit_test(test_false_operations),
        cmocka_unit_test(test_constant_outputs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
