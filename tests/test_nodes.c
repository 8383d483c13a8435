/* Tangent kernels of graph networks, of all pairs of nodes: against Jacobians, and against the closed form of infinite width;
 * the names and closed forms of surrogate gradients. */
#include "fixture.h"

enum { NODES = 5 };

/* A cycle of five nodes and the edge 0 - 2, normalized by row or symmetrically. */
static int symmetric_normalization;

static pk_status load(void *user, pk_context *context, const char *name, pk_array *array)
{
    static double triples[12][3];
    static const size_t shape[2] = {12, 3};
    double adjacency[NODES][NODES] = {{0}}, degree[NODES] = {0};
    size_t count = 0;
    (void)user, (void)context, (void)name;
    for (size_t i = 0; i < NODES; i++)
        adjacency[i][(i + 1) % NODES] = adjacency[(i + 1) % NODES][i] = 1;
    adjacency[0][2] = adjacency[2][0] = 1;
    for (size_t i = 0; i < NODES; i++)
        for (size_t j = 0; j < NODES; j++)
            degree[i] += adjacency[i][j];
    for (size_t i = 0; i < NODES; i++)
        for (size_t j = 0; j < NODES; j++)
            if (adjacency[i][j] != 0) {
                assert_true(count < 12);
                triples[count][0] = (double)i, triples[count][1] = (double)j;
                triples[count++][2] = symmetric_normalization ? 1 / sqrt(degree[i] * degree[j]) : 1 / degree[i];
            }
    assert_int_equal(count, 12);
    *array = pk_array_view(PK_FLOAT64, 2, shape, triples);
    return PK_OK;
}

static void parse(pk_context *context, const char *text, pk_graph *graph)
{
    const pk_constants constants = {load, NULL};
    memset(context, 0, sizeof *context);
    memset(graph, 0, sizeof *graph);
    assert_ok(context, pk_network_parse_with(context, text, &constants, graph));
}

/* All pairs of nodes, of one graph and of two with other features, against the Jacobian; K outputs of a node. */
static void test_jacobian(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 5x3; propagate S; dense 4; tanh; propagate S; dense 3; relu; propagate S; dense 2; flatten",
        "input 5x3; propagate S; dense 4; relu; residual( propagate S; dense 4 ); dense 1; flatten",
        "input 5x3; dense 4; attention 2; propagate S; dense 2; flatten",
        "input 5x3; propagate S; dense 4 name=a; tanh; propagate S; dense 3 tied=a.weight transposed; flatten",
    };
    for (size_t net = 0; net < sizeof networks / sizeof *networks; net++)
        for (size_t rows = 1; rows <= 2; rows++) {
            pk_context context;
            pk_graph graph;
            parse(&context, networks[net], &graph);
            const size_t P = graph.parameters, C = graph.output_width, K = C / NODES, n = rows * NODES, D = 15;
            pk_real *w = fixture_normals(1, P, 0.6), *x = fixture_normals(2, rows * D, 1),
                    *jacobian = FIXTURE_NEW(pk_real, rows * C * P), *gram = FIXTURE_NEW(pk_real, n * n),
                    *whole = FIXTURE_NEW(pk_real, rows * C * rows * C);
            const pk_matrix inputs = pk_matrix_view(x, rows, D), none = pk_matrix_view(NULL, 0, 0);
            assert_ok(&context,
                      pk_jacobian(&context, &graph, w, inputs, pk_matrix_view(jacobian, rows * C, P), none));
            assert_ok(&context,
                      pk_kernel_ntk_nodes(&context, &graph, w, inputs, NODES, pk_matrix_view(gram, n, n)));
            assert_ok(&context, pk_kernel_ntk(&context, &graph, w, inputs, none,
                                              pk_matrix_view(whole, rows * C, rows * C)));
            double largest = fixture_largest(n * n, gram);
            assert_true(largest > 0.1);
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j < n; j++) {
                    double sum = 0;
                    for (size_t k = 0; k < K; k++) {
                        double dot = 0;
                        for (size_t p = 0; p < P; p++)
                            dot += (double)jacobian[(i * K + k) * P + p] * jacobian[(j * K + k) * P + p];
                        assert_close(whole[(i * K + k) * rows * C + j * K + k], dot, ROUNDING(1e-13) * largest);
                        sum += dot;
                    }
                    assert_close(gram[i * n + j], sum, ROUNDING(1e-13) * largest);
                    assert_true(gram[i * n + j] == gram[j * n + i]);
                }
            free(w), free(x), free(jacobian), free(gram), free(whole);
            pk_graph_release(&context, &graph);
            assert_int_equal(context.memory_used, 0);
        }
}

/* Networks of growing width tend to the infinite one, whose entries are known. */
static void test_width(void **state)
{
    (void)state;
    static const struct {
        int symmetric, layers;
        double theta[3]; /* (0,0), (0,1), (2,3) */
    } known[] = {
        {0, 1, {.14796619932745642, .06924261514734432, .006440697660617551}},
        {0, 2, {.4207116688852254, .4284252505875676, .17199128351051074}},
        {1, 1, {.16453404470534427, .07709545095213721, -.006729491359191531}},
    };
    static const size_t at[3] = {0, 1, 2 * NODES + 3};
    pk_real x[NODES * 3];
    for (size_t i = 0; i < NODES; i++)
        for (size_t j = 0; j < 3; j++)
            x[i * 3 + j] = (pk_real)sin(1 + 3 * (double)i + 2 * (double)j);
    for (size_t k = 0; k < 3; k++) {
        double errors[2] = {0, 0};
        symmetric_normalization = known[k].symmetric;
        for (int wide = 0; wide < 2; wide++) {
            enum { SEEDS = 60 };
            char text[300];
            const int m = wide ? 512 : 32;
            pk_context context;
            pk_graph graph;
            double mean[3] = {0, 0, 0};
            snprintf(text, sizeof text, "input 5x3");
            for (int l = 0; l < known[k].layers; l++)
                snprintf(text + strlen(text), sizeof text - strlen(text),
                         "; propagate S; dense %d nobias ntk w_std=1.41421356237309505; relu", m);
            strcat(text, "; propagate S; dense 1 nobias ntk w_std=1; flatten");
            parse(&context, text, &graph);
            for (uint64_t seed = 1; seed <= SEEDS; seed++) {
                pk_real *w = fixture_normals(seed, graph.parameters, 1), gram[NODES * NODES];
                assert_ok(&context, pk_kernel_ntk_nodes(&context, &graph, w, pk_matrix_view(x, 1, NODES * 3),
                                                        NODES, pk_matrix_view(gram, NODES, NODES)));
                for (int i = 0; i < 3; i++) {
                    const double off = gram[at[i]] - known[k].theta[i];
                    errors[wide] += off * off / SEEDS;
                    mean[i] += off / SEEDS;
                }
                free(w);
            }
            errors[wide] = sqrt(errors[wide]);
            for (int i = 0; i < 3; i++)
                assert_close(mean[i], 0, 4 * errors[wide] / sqrt(SEEDS));
            pk_graph_release(&context, &graph);
        }
        print_message("%d hidden, %s: %.3g at width 32, %.3g at 512\n", known[k].layers,
                      known[k].symmetric ? "symmetric" : "row", errors[0], errors[1]);
        assert_true(errors[0] / errors[1] > 2.4 && errors[0] / errors[1] < 6.5 && errors[1] < 0.1);
    }
    symmetric_normalization = 0;
}

/* Of sign and step, S S^T with the surrogate slopes, while the derivative of the network is 0. */
static void test_surrogate(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    enum { N = 3 };
    parse(&context, "input 2; dense 4; sign 1.5; dense 1", &graph);
    assert_string_equal(pk_tangent_kernel_name(&graph), "surrogate kernel");
    const size_t P = graph.parameters;
    pk_real *w = fixture_normals(1, P, 1), *x = fixture_normals(2, N * 2, 1), gram[N * N], f[2];
    assert_ok(&context, pk_kernel_ntk(&context, &graph, w, pk_matrix_view(x, N, 2), pk_matrix_view(NULL, 0, 0),
                                      pk_matrix_view(gram, N, N)));
    for (size_t a = 0; a < N; a++)
        for (size_t b = 0; b < N; b++) {
            double sum = 1; /* of the last bias */
            for (size_t j = 0; j < 4; j++) {
                double z[2], slope[2], out = 1;
                for (int side = 0; side < 2; side++) {
                    const pk_real *row = x + (side ? b : a) * 2;
                    z[side] = w[2 * j] * row[0] + w[2 * j + 1] * row[1] + w[8 + j];
                    slope[side] = 1.5 * 2 / sqrt(M_PI) * exp(-2.25 * z[side] * z[side]);
                    out *= z[side] > 0 ? 1 : -1;
                }
                const double inner = x[a * 2] * x[b * 2] + x[a * 2 + 1] * x[b * 2 + 1] + 1;
                sum += out + w[12 + j] * w[12 + j] * slope[0] * slope[1] * inner;
            }
            assert_close(gram[a * N + b], sum, ROUNDING(1e-13) * 10);
        }
    /* The network itself does not move with the weights below the sign. */
    assert_ok(&context,
              pk_graph_evaluate(&context, &graph, w, pk_matrix_view(x, 1, 2), pk_matrix_view(f, 1, 1)));
    w[0] += (pk_real)1e-4;
    assert_ok(&context,
              pk_graph_evaluate(&context, &graph, w, pk_matrix_view(x, 1, 2), pk_matrix_view(f + 1, 1, 1)));
    assert_true(f[0] == f[1]);
    free(w), free(x);
    pk_graph_release(&context, &graph);
    parse(&context, "input 2; sign; dense 4; tanh; dense 1", &graph); /* of data: a derivative all the same */
    assert_string_equal(pk_tangent_kernel_name(&graph), "ntk");
    pk_graph_release(&context, &graph);
    /* The closed form, checked by quadrature elsewhere, and here by the trapezoid rule. */
    static const double known[5][2] = {{1, .41440417436697},
                                       {2, .46996129156466},
                                       {5, .48999754241171},
                                       {20, .49385252573747},
                                       {INFINITY, .4941127709981443}};
    for (int i = 0; i < 5; i++)
        assert_close(pk_surrogate_slope(known[i][0], 1.3, .4, .9), known[i][1], 1e-13);
    double sum = 0;
    for (double u = -9; u <= 9; u += 0.02)
        for (double v = -9; v <= 9; v += 0.02) {
            const double a = sqrt(1.3) * u, b = .4 / sqrt(1.3) * u + sqrt(.9 - .16 / 1.3) * v;
            sum +=
                0.02 * 0.02 / (2 * M_PI) * exp(-(u * u + v * v) / 2) * 4 / M_PI * 2 * exp(-4 * a * a - b * b);
        }
    assert_close(sum, pk_surrogate_slope(2, 1.3, .4, .9), 1e-12);
    assert_true(isnan(pk_surrogate_slope(0, 1, 0, 1)) && isnan(pk_surrogate_slope(1, 1, 2, 1)) &&
                isnan(pk_surrogate_slope(INFINITY, 0, 0, 1)) && isnan(pk_surrogate_slope(1, -1, 0, 1)));
}

static void test_refusals(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    pk_real x[15] = {1, 2, 3}, gram[25], *w;
    parse(&context, "input 5x3; propagate S; dense 2; flatten; dense 3", &graph);
    w = fixture_normals(1, graph.parameters, 1);
    assert_refused(
        &context, PK_SHAPE, "3 outputs has not as many for each of 5 nodes",
        pk_kernel_ntk_nodes(&context, &graph, w, pk_matrix_view(x, 1, 15), NODES, pk_matrix_view(gram, 5, 5)));
    pk_graph_release(&context, &graph);
    free(w);
    parse(&context, "input 5x3; propagate S; dense 2; flatten", &graph);
    w = fixture_normals(1, graph.parameters, 1);
    assert_refused(
        &context, PK_SHAPE, "nodes: the inputs are 1 x 14",
        pk_kernel_ntk_nodes(&context, &graph, w, pk_matrix_view(x, 1, 14), NODES, pk_matrix_view(gram, 5, 5)));
    assert_refused(
        &context, PK_SHAPE, "entries of the result are 4 x 5",
        pk_kernel_ntk_nodes(&context, &graph, w, pk_matrix_view(x, 1, 15), NODES, pk_matrix_view(gram, 4, 5)));
    assert_refused(&context, PK_ARGUMENT, "weights are NULL",
                   pk_kernel_ntk_nodes(&context, &graph, NULL, pk_matrix_view(x, 1, 15), NODES,
                                       pk_matrix_view(gram, 5, 5)));
    context.memory_limit = context.memory_used + 100;
    assert_refused(
        &context, PK_MEMORY_LIMIT, "nodes",
        pk_kernel_ntk_nodes(&context, &graph, w, pk_matrix_view(x, 1, 15), NODES, pk_matrix_view(gram, 5, 5)));
    free(w);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_jacobian),
        cmocka_unit_test(test_width),
        cmocka_unit_test(test_surrogate),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
