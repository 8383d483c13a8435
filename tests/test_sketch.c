/* Sketches: products that are kept on average, with the spread that they should have; the same map whatever is beside a row; an
 * isometry where nothing is left out; kernels with their measured error; features of the infinite ReLU network. */
#include "trained.h"

static double dot_of(size_t count, const pk_real *a, const pk_real *b)
{
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* Over many seeds: the mean of < R a, R b > is < a, b >, its variance about (|a|^2 |b|^2 + < a, b >^2) / m. */
static void test_products(void **state)
{
    (void)state;
    enum { P = 100, SEEDS = 2000 };
    pk_real *v = fixture_normals(3, 3 * P, 1);
    for (size_t k = 0; k < P; k++)
        v[2 * P + k] = k == 7; /* a spike: what signs alone would keep, and a sample of numbers lose */
    for (int kind = 0; kind < 2; kind++)
        for (size_t m = 4; m <= 64; m *= 4) {
            double mean[4] = {0}, square[4] = {0};
            for (uint64_t seed = 1; seed <= SEEDS; seed++) {
                const pk_sketch sketch = {(pk_sketch_kind)kind, m, seed};
                pk_real out[3 * 64];
                assert_ok(NULL,
                          pk_sketch_vectors(NULL, &sketch, pk_matrix_view(v, 3, P), pk_matrix_view(out, 3, m)));
                for (int pair = 0; pair < 4; pair++) {
                    const int a = pair == 1, b = pair == 0 || pair == 1 ? 1 : 2;
                    const double size = sqrt(dot_of(P, v + a * P, v + a * P) * dot_of(P, v + b * P, v + b * P));
                    const double off = (dot_of(m, out + (size_t)a * m, out + (size_t)b * m) -
                                        dot_of(P, v + a * P, v + b * P)) /
                                       size;
                    mean[pair] += off / SEEDS;
                    square[pair] += off * off / SEEDS;
                }
            }
            for (int pair = 0; pair < 4; pair++) {
                const double spread = sqrt(square[pair]), most = sqrt(2.2 / (double)m);
                if (!(fabs(mean[pair]) < 5 * spread / sqrt(SEEDS) + 1e-12 && spread < most))
                    fail_msg("kind %d, size %zu, pair %d: mean %.3g, spread %.3g", kind, m, pair, mean[pair],
                             spread);
                assert_true(spread > 0.3 / sqrt((double)m) || (kind == 1 && m == 64) || pair == 3);
            }
        }
    free(v);
}

/* What a row becomes does not depend on its place or its neighbours; another seed is another map; whole: an isometry. */
static void test_map(void **state)
{
    (void)state;
    enum { P = 70, ROWS = 5 };
    pk_real *v = fixture_normals(4, ROWS * P, 1), all[ROWS * 128], one[128];
    for (int kind = 0; kind < 2; kind++) {
        pk_sketch sketch = {(pk_sketch_kind)kind, 90, 11};
        assert_ok(NULL,
                  pk_sketch_vectors(NULL, &sketch, pk_matrix_view(v, ROWS, P), pk_matrix_view(all, ROWS, 90)));
        for (size_t r = 0; r < ROWS; r++) {
            assert_ok(NULL, pk_sketch_vectors(NULL, &sketch, pk_matrix_view(v + r * P, 1, P),
                                              pk_matrix_view(one, 1, 90)));
            assert_memory_equal(one, all + r * 90, 90 * sizeof *one);
        }
        sketch.seed = 12;
        assert_ok(NULL, pk_sketch_vectors(NULL, &sketch, pk_matrix_view(v, 1, P), pk_matrix_view(one, 1, 90)));
        assert_memory_not_equal(one, all, 90 * sizeof *one);
    }
    const pk_sketch whole = {PK_SKETCH_SRHT, 128, 5};
    assert_ok(NULL,
              pk_sketch_vectors(NULL, &whole, pk_matrix_view(v, ROWS, P), pk_matrix_view(all, ROWS, 128)));
    for (size_t i = 0; i < ROWS; i++)
        for (size_t j = 0; j < ROWS; j++)
            assert_close(dot_of(128, all + i * 128, all + j * 128), dot_of(P, v + i * P, v + j * P),
                         ROUNDING(1e-12));
    /* Rademacher's entries are all +-1/sqrt(m): of a unit vector. */
    const pk_sketch signs = {PK_SKETCH_RADEMACHER, 100, 5};
    size_t plus = 0;
    memset(v, 0, P * sizeof *v);
    v[33] = 3;
    assert_ok(NULL, pk_sketch_vectors(NULL, &signs, pk_matrix_view(v, 1, P), pk_matrix_view(one, 1, 100)));
    for (size_t i = 0; i < 100; i++) {
        assert_close(fabs((double)one[i]), 0.3, ROUNDING(1e-15));
        plus += one[i] > 0;
    }
    assert_true(plus > 25 && plus < 75);
    free(v);
}

/* The kernel's estimate: its error falls like 1/sqrt(m), and the report tells it. */
static void test_kernel(void **state)
{
    (void)state;
    enum { N = 12, M = 9 };
    static const char *const networks[] = {"input 3; dense 12; tanh; dense 10; relu; dense 2",
                                           "input 1x4x4; conv 3 3x3; gelu; flatten; dense 3"};
    for (int net = 0; net < 2; net++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        assert_ok(&context, pk_network_parse(&context, networks[net], &graph));
        const size_t D = graph.input_width, C = graph.output_width, P = graph.parameters;
        pk_real *w = fixture_normals(1, P, 0.5), *x = fixture_normals(2, N * D, 1),
                *y = fixture_normals(3, M * D, 1);
        const pk_matrix left = pk_matrix_view(x, N, D), right = pk_matrix_view(y, M, D),
                        none = pk_matrix_view(NULL, 0, 0);
        for (int trace = 0; trace < 2; trace++)
            for (int symmetric = 0; symmetric < 2; symmetric++) {
                const size_t kept = trace ? 1 : C, rows = N * kept, columns = (symmetric ? N : M) * kept;
                pk_real *exact = FIXTURE_NEW(pk_real, rows * columns),
                        *estimate = FIXTURE_NEW(pk_real, rows * columns);
                const pk_matrix to = pk_matrix_view(exact, rows, columns),
                                about = pk_matrix_view(estimate, rows, columns),
                                other = symmetric ? none : right;
                assert_ok(&context, trace ? pk_kernel_ntk_trace(&context, &graph, w, left, other, to)
                                          : pk_kernel_ntk(&context, &graph, w, left, other, to));
                for (int kind = 0; kind < 2; kind++) {
                    double errors[3] = {0, 0, 0};
                    for (int k = 0; k < 3; k++)
                        for (uint64_t seed = 0; seed < 12; seed++) {
                            const pk_sketch sketch = {(pk_sketch_kind)kind, (size_t)8 << (2 * k), seed};
                            pk_sketch_report report;
                            double apart = 0, size = 0;
                            if (kind == PK_SKETCH_SRHT && sketch.size > P)
                                continue;
                            assert_ok(&context, pk_kernel_sketched(&context, &graph, w, left, other, &sketch,
                                                                   trace, about, &report));
                            for (size_t i = 0; i < rows * columns; i++) {
                                apart += (estimate[i] - exact[i]) * (estimate[i] - exact[i]);
                                size += (double)exact[i] * exact[i];
                            }
                            /* So few rows are all in the sample. */
                            assert_true(report.rows == N && report.columns == (symmetric ? N : M));
                            assert_close(report.error, sqrt(apart / size), ROUNDING(1e-12));
                            errors[k] += sqrt(apart / size) / 12;
                        }
                    assert_true(errors[0] / errors[1] > 1.5 && errors[0] / errors[1] < 2.7);
                    assert_true(kind == PK_SKETCH_SRHT ||
                                (errors[1] / errors[2] > 1.5 && errors[1] / errors[2] < 2.7));
                }
                const pk_sketch whole = {PK_SKETCH_SRHT, P > 128 ? 256 : 128, 3};
                pk_sketch_report report;
                assert_true(P > 64 && P <= 256);
                assert_ok(&context,
                          pk_kernel_sketched(&context, &graph, w, left, other, &whole, trace, about, &report));
                assert_true(report.error < ROUNDING(1e-14));
                free(exact), free(estimate);
            }
        free(w), free(x), free(y);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
    /* Of many rows 16 are sampled, and their error is near that of all. */
    pk_graph graph;
    memset(&graph, 0, sizeof graph);
    assert_ok(NULL, pk_network_parse(NULL, networks[0], &graph));
    enum { MANY = 60 };
    pk_real *w = fixture_normals(1, graph.parameters, 0.5), *x = fixture_normals(2, MANY * 3, 1),
            *exact = FIXTURE_NEW(pk_real, MANY * MANY), *about = FIXTURE_NEW(pk_real, MANY * MANY);
    const pk_matrix rows = pk_matrix_view(x, MANY, 3), none = pk_matrix_view(NULL, 0, 0);
    const pk_sketch sketch = {PK_SKETCH_RADEMACHER, 64, 3};
    pk_sketch_report report;
    double apart = 0, size = 0;
    assert_ok(NULL, pk_kernel_ntk_trace(NULL, &graph, w, rows, none, pk_matrix_view(exact, MANY, MANY)));
    assert_ok(NULL, pk_kernel_sketched(NULL, &graph, w, rows, none, &sketch, 1,
                                       pk_matrix_view(about, MANY, MANY), &report));
    for (size_t i = 0; i < MANY * MANY; i++) {
        apart += (about[i] - exact[i]) * (about[i] - exact[i]);
        size += (double)exact[i] * exact[i];
    }
    assert_true(report.rows == 16 && report.columns == 16);
    assert_true(report.error > 0.3 * sqrt(apart / size) && report.error < 3 * sqrt(apart / size));
    free(w), free(x), free(exact), free(about);
    pk_graph_release(NULL, &graph);
}

/* The infinite-width tangent kernel of `layers` hidden layers of ReLU. */
static double infinite_ntk(size_t D, const pk_real *x, const pk_real *y, size_t layers, double std)
{
    double s = dot_of(D, x, y) / (double)D, p = dot_of(D, x, x) / (double)D, q = dot_of(D, y, y) / (double)D;
    const double v = std * std;
    s *= v, p *= v, q *= v;
    double theta = s;
    for (size_t l = 0; l < layers; l++) {
        const double r = sqrt(fmax(p * q - s * s, 0)), angle = p * q > 0 ? atan2(r, s) : M_PI / 2;
        const double slope = 0.5 - angle / (2 * M_PI);
        s = v * (r / (2 * M_PI) + slope * s);
        theta = s + v * slope * theta;
        p *= v / 2, q *= v / 2;
    }
    return theta;
}

static void test_relu_features(void **state)
{
    (void)state;
    enum { N = 6, D = 3, SEEDS = 6 };
    pk_real x[N * D];
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < D; j++)
            x[i * D + j] = (pk_real)sin(1 + 3 * (double)i + 2 * (double)j + 0.5 * (double)(i * j));
    assert_close(infinite_ntk(D, x, x, 1, sqrt(2)), 2.196698719315486, ROUNDING(1e-6));
    assert_close(infinite_ntk(D, x, x + D, 1, sqrt(2)), -.09611267071882777, ROUNDING(1e-6));
    for (size_t layers = 1; layers <= 3; layers++) {
        double errors[3] = {0, 0, 0}, bias = 0, size = 0;
        for (int k = 0; k < 3; k++) {
            const size_t m = (size_t)64 << (2 * k), all = 2 * m;
            pk_real *features = FIXTURE_NEW(pk_real, N * all);
            double mean[N * N] = {0};
            size = 0;
            for (uint64_t seed = 0; seed < SEEDS; seed++) {
                const double std = layers == 2 ? 1.3 : 0;
                const pk_relu_features how = {layers, m, m, std, seed};
                double apart = 0;
                assert_ok(NULL, pk_relu_ntk_features(NULL, pk_matrix_view(x, N, D), &how,
                                                     pk_matrix_view(features, N, all)));
                for (size_t i = 0; i < N * N; i++) {
                    const double truth =
                        infinite_ntk(D, x + i / N * D, x + i % N * D, layers, std > 0 ? std : sqrt(2));
                    const double off = dot_of(all, features + i / N * all, features + i % N * all) - truth;
                    mean[i] += off / SEEDS;
                    apart += off * off;
                    size += truth * truth / SEEDS;
                }
                errors[k] += apart / SEEDS;
            }
            errors[k] = sqrt(errors[k] / size);
            bias = 0;
            for (size_t i = 0; i < N * N; i++)
                bias += mean[i] * mean[i];
            bias = sqrt(bias / size);
            free(features);
        }
        print_message("%zu layers: %.3g %.3g %.3g; of the mean %.3g\n", layers, errors[0], errors[1], errors[2],
                      bias);
        for (int k = 0; k < 2; k++)
            assert_true(errors[k] / errors[k + 1] > 1.3 && errors[k] / errors[k + 1] < 3.2);
        assert_true(errors[2] < 0.2 && bias < 0.8 * errors[2]);
    }
    /* A row of zeros. */
    pk_real features[4 * 16], rows[2 * D] = {0, 0, 0, 1, 2, 3};
    const pk_relu_features how = {2, 8, 8, 0, 1};
    assert_ok(NULL,
              pk_relu_ntk_features(NULL, pk_matrix_view(rows, 2, D), &how, pk_matrix_view(features, 2, 16)));
    assert_true(fixture_largest(16, features) == 0 && fixture_largest(16, features + 16) > 0);
}

static void test_refusals(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, "input 3; dense 4; tanh; dense 2", &graph));
    pk_real *w = fixture_normals(1, graph.parameters, 0.5), x[12] = {1, 2, 3}, gram[64], out[64] = {7};
    const pk_matrix rows = pk_matrix_view(x, 4, 3), none = pk_matrix_view(NULL, 0, 0);
    pk_sketch sketch = {PK_SKETCH_SRHT, 5, 1};
    assert_refused(&context, PK_ARGUMENT, "size 5 of an SRHT of 3 numbers, which has 4",
                   pk_sketch_vectors(&context, &sketch, rows, pk_matrix_view(out, 4, 5)));
    sketch.size = 0;
    assert_refused(&context, PK_ARGUMENT, "size is 0",
                   pk_sketch_vectors(&context, &sketch, rows, pk_matrix_view(out, 4, 5)));
    assert_refused(
        &context, PK_ARGUMENT, "size is 0",
        pk_kernel_sketched(&context, &graph, w, rows, none, NULL, 1, pk_matrix_view(gram, 4, 4), NULL));
    sketch.size = 4;
    sketch.kind = (pk_sketch_kind)7;
    assert_refused(&context, PK_ARGUMENT, "kind 7",
                   pk_sketch_vectors(&context, &sketch, rows, pk_matrix_view(out, 4, 4)));
    sketch.kind = PK_SKETCH_RADEMACHER;
    assert_refused(&context, PK_SHAPE, "sketched vectors are 4 x 5",
                   pk_sketch_vectors(&context, &sketch, rows, pk_matrix_view(out, 4, 5)));
    assert_refused(&context, PK_ARGUMENT, "overlaps",
                   pk_sketch_vectors(&context, &sketch, rows, pk_matrix_view(x, 4, 4)));
    assert_refused(&context, PK_SHAPE, "features are 4 x 4 (ld 4), not 8 x 4",
                   pk_sketch_gradients(&context, &graph, w, rows, &sketch, pk_matrix_view(out, 4, 4)));
    assert_refused(
        &context, PK_SHAPE, "entries of the result are 4 x 4 (ld 4), not 8 x 8",
        pk_kernel_sketched(&context, &graph, w, rows, none, &sketch, 0, pk_matrix_view(gram, 4, 4), NULL));
    assert_refused(
        &context, PK_ARGUMENT, "no network",
        pk_kernel_sketched(&context, NULL, w, rows, none, &sketch, 0, pk_matrix_view(gram, 8, 8), NULL));
    context.memory_limit = context.memory_used + 300;
    assert_refused(
        &context, PK_MEMORY_LIMIT, "sketch",
        pk_kernel_sketched(&context, &graph, w, rows, none, &sketch, 0, pk_matrix_view(gram, 8, 8), NULL));
    context.memory_limit = 0;
    pk_relu_features how = {0, 4, 4, 0, 1};
    assert_refused(&context, PK_ARGUMENT, "the layers, the width",
                   pk_relu_ntk_features(&context, rows, &how, pk_matrix_view(out, 4, 8)));
    how.layers = 1;
    how.weight_std = -1;
    assert_refused(&context, PK_ARGUMENT, "deviation is -1",
                   pk_relu_ntk_features(&context, rows, &how, pk_matrix_view(out, 4, 8)));
    how.weight_std = 0;
    assert_refused(&context, PK_SHAPE, "features are 4 x 7",
                   pk_relu_ntk_features(&context, rows, &how, pk_matrix_view(out, 4, 7)));
    assert_true(out[0] == 7);
    free(w);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_products),      cmocka_unit_test(test_map),      cmocka_unit_test(test_kernel),
        cmocka_unit_test(test_relu_features), cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
