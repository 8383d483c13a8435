/* Eigenvalues and singular values by their equations, on matrices that are hard; the energy of rows in the span of a Gram
 * against features; ROC numbers against all pairs. */
#include "trained.h"

static double *normals(uint64_t seed, size_t count)
{
    double *values = FIXTURE_NEW(double, count);
    for (size_t i = 0; i < count; i++)
        values[i] = (double)bf_normal(&seed);
    return values;
}

/* A v = lambda v, V V^T = 1, ascending. */
static void check_symmetric(size_t n, const double *matrix)
{
    double *values = FIXTURE_NEW(double, n), *vectors = FIXTURE_NEW(double, n *n),
           *alone = FIXTURE_NEW(double, n), *place = FIXTURE_NEW(double, n *n);
    pk_context context;
    memset(&context, 0, sizeof context);
    assert_ok(&context, pk_symmetric_eigenvalues(&context, n, matrix, values, vectors));
    assert_ok(&context, pk_symmetric_eigenvalues(&context, n, matrix, alone, NULL));
    for (size_t k = 0; k < n; k++) /* by other means: blocks */
        assert_close(values[k], alone[k], 1e-14 * (double)(n + 4) * fmax(fabs(values[0]), fabs(values[n - 1])));
    memcpy(place, matrix, n * n * sizeof *place);
    assert_ok(&context, pk_symmetric_eigenvalues(&context, n, place, alone, place)); /* in place */
    assert_memory_equal(vectors, place, n * n * sizeof *place);
    const double scale = fmax(fabs(values[0]), fabs(values[n - 1]));
    double trace = 0, sum = 0;
    for (size_t k = 0; k < n; k++) {
        trace += matrix[k * n + k];
        sum += values[k];
        assert_true(k == 0 || values[k] >= values[k - 1]);
        for (size_t i = 0; i < n; i++) {
            double product = 0, dot = 0;
            for (size_t j = 0; j < n; j++) {
                product += matrix[i * n + j] * vectors[k * n + j];
                dot += vectors[i * n + j] * vectors[k * n + j];
            }
            assert_close(product, values[k] * vectors[k * n + i], 1e-14 * (double)(n + 4) * scale);
            assert_close(dot, i == k, 1e-14 * (double)(n + 4));
        }
    }
    assert_close(trace, sum, 1e-14 * (double)(n + 4) * scale);
    assert_int_equal(context.memory_used, 0);
    free(values), free(vectors), free(alone), free(place);
}

static void test_symmetric(void **state)
{
    (void)state;
    for (size_t n = 1; n <= 40; n += n < 8 ? 1 : 8) {
        double *a = normals(n, n * n), *m = FIXTURE_NEW(double, n *n);
        for (int kind = 0; kind < 8; kind++) {
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j < n; j++) {
                    double gram = 0;
                    for (size_t k = 0; k < n; k++)
                        gram += a[i * n + k] * a[j * n + k];
                    m[i * n + j] =
                        kind == 0   ? a[i * n + j] + a[j * n + i] /* indefinite */
                        : kind == 1 ? gram
                        : kind == 2 ? (i == j ? (double)(i % 3) : 0)        /* repeated, diagonal */
                        : kind == 3 ? a[i] * a[j]                           /* rank 1 */
                        : kind == 4 ? 1 / (double)(i + j + 1)               /* Hilbert's */
                        : kind == 5 ? 1e180 * (a[i * n + j] + a[j * n + i]) /* no square fits */
                        : kind == 6 ? 1e-200 * gram
                        : i == j ? fabs((double)i - (double)(n - 1) / 2) /* Wilkinson's: nearly equal pairs */
                                 : (i + 1 == j || j + 1 == i);
                }
            check_symmetric(n, m);
        }
        memset(m, 0, n * n * sizeof *m);
        check_symmetric(n, m);
        free(a), free(m);
    }
    /* The NTK of one hidden layer of ReLU, known to 15 digits. */
    double x[8][3], t[64], values[8];
    for (size_t i = 0; i < 8; i++)
        for (size_t j = 0; j < 3; j++)
            x[i][j] = sin(1 + 3 * (double)i + 2 * (double)j + 0.5 * (double)(i * j));
    for (size_t i = 0; i < 8; i++)
        for (size_t j = 0; j < 8; j++) {
            double s = 0, p = 0, q = 0;
            for (size_t k = 0; k < 3; k++)
                s += 2 * x[i][k] * x[j][k] / 3, p += 2 * x[i][k] * x[i][k] / 3, q += 2 * x[j][k] * x[j][k] / 3;
            const double r = i == j ? 0 : sqrt(p * q - s * s), angle = i == j ? 0 : atan2(r, s);
            const double slope = 0.5 - angle / (2 * M_PI);
            t[i * 8 + j] = 2 * (r / (2 * M_PI) + slope * s) + 2 * s * slope;
        }
    assert_close(t[0], 2.196698719315486, 1e-14);
    assert_ok(NULL, pk_symmetric_eigenvalues(NULL, 8, t, values, NULL));
    assert_close(values[0], 0.19545199814342987, 1e-14);
}

static void check_singular(size_t rows, size_t cols, const double *a)
{
    const size_t few = rows < cols ? rows : cols;
    double *values = FIXTURE_NEW(double, few), *left = FIXTURE_NEW(double, few *rows),
           *right = FIXTURE_NEW(double, few *cols), *alone = FIXTURE_NEW(double, few);
    pk_context context;
    memset(&context, 0, sizeof context);
    assert_ok(&context, pk_singular_values(&context, rows, cols, a, values, left, right));
    assert_ok(&context, pk_singular_values(&context, rows, cols, a, alone, NULL, NULL));
    assert_memory_equal(values, alone, few * sizeof *values);
    for (size_t k = 0; k < few; k++)
        assert_true(values[k] >= 0 && (k == 0 || values[k] <= values[k - 1]));
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            double sum = 0;
            for (size_t k = 0; k < few; k++)
                sum += values[k] * left[k * rows + i] * right[k * cols + j];
            assert_close(sum, a[i * cols + j], 1e-13 * values[0]);
        }
    for (size_t k = 0; k < few; k++)
        for (size_t l = 0; l < few; l++) {
            double u = 0, v = 0;
            for (size_t i = 0; i < rows; i++)
                u += left[k * rows + i] * left[l * rows + i];
            for (size_t j = 0; j < cols; j++)
                v += right[k * cols + j] * right[l * cols + j];
            if (values[k] > 1e-12 * values[0] && values[l] > 1e-12 * values[0]) {
                assert_close(u, k == l, 1e-13);
                assert_close(v, k == l, 1e-13);
            }
        }
    free(values), free(left), free(right), free(alone);
}

static void test_singular(void **state)
{
    (void)state;
    static const size_t shapes[][2] = {{1, 1}, {1, 5}, {5, 1}, {4, 4}, {9, 3}, {3, 9}, {30, 12}, {12, 30}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const size_t rows = shapes[s][0], cols = shapes[s][1];
        double *a = normals(s + 3, rows * cols);
        check_singular(rows, cols, a);
        for (size_t i = 0; i < rows * cols; i++)
            a[i] *= 1e-190;
        check_singular(rows, cols, a);
        for (size_t i = 0; i < rows * cols; i++) /* rank 1 */
            a[i] = (double)(i / cols + 1) * ((double)(i % cols) - 1.5);
        check_singular(rows, cols, a);
        memset(a, 0, rows * cols * sizeof *a);
        check_singular(rows, cols, a);
        free(a);
    }
    /* Singular values far apart keep their digits. */
    const double graded[9] = {1, 1, 0, 0, 1e-12, 1e-12, 0, 0, 1e-20};
    double values[3];
    assert_ok(NULL, pk_singular_values(NULL, 3, 3, graded, values, NULL, NULL));
    assert_close(values[0], sqrt(2), 1e-14);
    assert_close(values[1], sqrt(1.5) * 1e-12, 1e-26);
    assert_close(values[2], 1e-20 / sqrt(3), 1e-29);
    const double some[4] = {3, 2, 1, 0};
    assert_true(pk_signal_dimension(4, some, 9.0 / 14) == 1 && pk_signal_dimension(4, some, 0.65) == 2 &&
                pk_signal_dimension(4, some, 0.95) == 3 && pk_signal_dimension(4, some, 1) == 3 &&
                pk_signal_dimension(4, some, 0) == 0 && pk_signal_dimension(0, NULL, 0.9) == 0 &&
                pk_signal_dimension(1, some + 3, 0.9) == 0);
}

/* Features f: the energy is the share of |f(x)|^2 in the first r right singular vectors of the training features. */
static void test_energy(void **state)
{
    (void)state;
    enum { n = 9, m = 7, p = 12 };
    for (int kind = 0; kind < 4; kind++) {
        double *train = normals(31 + (uint64_t)kind, n * p), *rows = normals(51, m * p), gram[n * n],
               cross[m * n], diagonal[m], energies[m], values[n], right[n * p];
        pk_novelty_report report;
        pk_novelty_options options = {kind == 1 ? 3 : kind == 3 ? 100 : 0, kind == 2 ? 0.5 : 0};
        for (size_t k = 0; kind >= 2 && k < p; k++) { /* two pairs of equal rows, a row of zeros */
            train[1 * p + k] = train[0 * p + k];
            train[3 * p + k] = 2 * train[2 * p + k];
            train[4 * p + k] = 0;
        }
        for (size_t k = 0; k < p; k++) { /* inside the span; a row of zeros; the largest direction */
            rows[0 * p + k] = 2 * train[2 * p + k] - train[5 * p + k];
            rows[1 * p + k] = 0;
        }
        assert_ok(NULL, pk_singular_values(NULL, n, p, train, values, NULL, right));
        for (size_t k = 0; k < p; k++)
            rows[2 * p + k] = 3 * right[k];
        for (size_t i = 0; i < n * n; i++) {
            gram[i] = 0;
            for (size_t k = 0; k < p; k++)
                gram[i] += train[i / n * p + k] * train[i % n * p + k];
        }
        for (size_t i = 0; i < m; i++) {
            diagonal[i] = 0;
            for (size_t k = 0; k < p; k++)
                diagonal[i] += rows[i * p + k] * rows[i * p + k];
            for (size_t j = 0; j < n; j++) {
                cross[i * n + j] = 0;
                for (size_t k = 0; k < p; k++)
                    cross[i * n + j] += rows[i * p + k] * train[j * p + k];
            }
        }
        assert_ok(NULL, pk_novelty(NULL, n, gram, m, cross, diagonal, &options, energies, &report));
        const size_t whole = kind >= 2 ? 6 : 9;
        const size_t expected = kind == 1   ? 3
                                : kind == 3 ? whole
                                            : pk_signal_dimension(n, values, kind == 2 ? 0.5 : 0.95);
        assert_int_equal(report.whole_rank, whole);
        assert_int_equal(report.rank, expected);
        assert_int_equal(report.zero_rows, 1);
        assert_true(report.share > 0 && report.share <= 1 + 1e-12 && report.least > -1e-14);
        for (size_t i = 0; i < m; i++) {
            double energy = 0;
            for (size_t k = 0; k < expected; k++) {
                double dot = 0;
                for (size_t j = 0; j < p; j++)
                    dot += right[k * p + j] * rows[i * p + j];
                energy += dot * dot;
            }
            assert_close(energies[i], diagonal[i] > 0 ? energy / diagonal[i] : 0, 1e-11);
        }
        assert_true(energies[1] == 0);
        assert_close(energies[2], 1, 1e-11);
        if (kind == 3)
            assert_close(energies[0], 1, 1e-11);
        free(train), free(rows);
    }
    /* Without training rows nothing is known. */
    double one = 1, energy = 5;
    assert_ok(NULL, pk_novelty(NULL, 0, NULL, 1, NULL, &one, NULL, &energy, NULL));
    assert_true(energy == 0);
}

/* By the tangent kernel of a trained network: training rows are inside, rows along a direction that no training row has are
 * novel. */
static void test_network(void **state)
{
    (void)state;
    enum { N = 12, M = 10 };
    trained t;
    const recipe how = {"input 4; dense 6; tanh; dense 2", "squared", "sgd", 0, 0.1, 0, N, N, 10, 0, 3, 0};
    trained_make(&how, &t);
    pk_real w[200], gram[N * N], cross[2 * M * N], own[4 * M * M];
    pk_real *rows = FIXTURE_NEW(pk_real, 2 * M * 4);
    double g[N * N], k[2 * M * N], d[2 * M], energies[2 * M], area = 0, rate = 0;
    pk_replay replay;
    assert_ok(&t.context, pk_replay_prepare(&t.context, &t.run, 0, &replay));
    assert_ok(&t.context, pk_replay_weights(&t.context, &replay, t.run.steps, w));
    for (size_t i = 0; i < M; i++) { /* near training rows; far away */
        for (size_t j = 0; j < 4; j++) {
            rows[i * 4 + j] = t.train[i * 4 + j] + (pk_real)0.01 * t.test[i * 4 + j];
            rows[(M + i) * 4 + j] = 5 * t.test[i * 4 + j];
        }
    }
    const pk_matrix train = pk_matrix_view(t.train, N, 4), all = pk_matrix_view(rows, (size_t)2 * M, 4);
    assert_ok(&t.context, pk_kernel_ntk_trace(&t.context, &t.graph, w, train, pk_matrix_view(NULL, 0, 0),
                                              pk_matrix_view(gram, N, N)));
    assert_ok(&t.context, pk_kernel_ntk_trace(&t.context, &t.graph, w, all, train,
                                              pk_matrix_view(cross, (size_t)2 * M, N)));
    assert_ok(&t.context, pk_kernel_ntk_trace(&t.context, &t.graph, w, all, pk_matrix_view(NULL, 0, 0),
                                              pk_matrix_view(own, (size_t)2 * M, (size_t)2 * M)));
    for (size_t i = 0; i < N * N; i++)
        g[i] = gram[i];
    for (size_t i = 0; i < 2 * M * N; i++)
        k[i] = cross[i];
    for (size_t i = 0; i < 2 * M; i++)
        d[i] = own[i * 2 * M + i];
    const pk_novelty_options full = {N, 0};
    double self[N];
    for (size_t i = 0; i < N; i++)
        self[i] = g[i * N + i];
    assert_ok(&t.context, pk_novelty(&t.context, N, g, N, g, self, &full, energies, NULL));
    for (size_t i = 0; i < N; i++)
        assert_close(energies[i], 1, ROUNDING(1e-10));
    assert_ok(&t.context, pk_novelty(&t.context, N, g, (size_t)2 * M, k, d, &full, energies, NULL));
    assert_ok(&t.context, pk_auroc(&t.context, M, energies, M, energies + M, &area));
    assert_ok(&t.context, pk_false_positives(&t.context, M, energies, M, energies + M, 0.95, &rate));
    assert_true(area > 0.99 && rate < 0.01);
    pk_replay_release(&t.context, &replay);
    free(rows);
    trained_release(&t);
}

static void test_roc(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed < 60; seed++) {
        const size_t a = 1 + seed % 13, b = 1 + seed * 7 % 11;
        double *high = normals(seed, a), *low = normals(seed + 100, b), area, rate;
        double pairs = 0;
        for (size_t i = 0; i < a; i++)
            high[i] = seed % 2 ? floor(2 * high[i]) : high[i] + 0.3; /* ties */
        for (size_t j = 0; j < b && seed % 2; j++)
            low[j] = floor(2 * low[j]);
        for (size_t i = 0; i < a; i++)
            for (size_t j = 0; j < b; j++)
                pairs += high[i] > low[j] ? 1 : high[i] == low[j] ? 0.5 : 0;
        assert_ok(NULL, pk_auroc(NULL, a, high, b, low, &area));
        assert_close(area, pairs / (double)(a * b), 1e-14);
        static const double rates[] = {0.95, 0.5, 1, 0.2};
        for (int r = 0; r < 4; r++) {
            double best = 2;
            for (size_t i = 0; i < a; i++) { /* every threshold that is a number of high */
                size_t kept = 0, wrong = 0;
                for (size_t k = 0; k < a; k++)
                    kept += high[k] >= high[i];
                for (size_t k = 0; k < b; k++)
                    wrong += low[k] >= high[i];
                if ((double)kept >= rates[r] * (double)a - 1e-9)
                    best = fmin(best, (double)wrong / (double)b);
            }
            assert_ok(NULL, pk_false_positives(NULL, a, high, b, low, rates[r], &rate));
            assert_close(rate, best, 1e-14);
        }
        free(high), free(low);
    }
    double two[2] = {1, 2}, bad[2] = {1, NAN}, out = 0;
    assert_ok(NULL, pk_auroc(NULL, 2, two, 2, bad, &out));
    assert_true(isnan(out));
    out = 0;
    assert_ok(NULL, pk_false_positives(NULL, 0, NULL, 2, two, 0.95, &out));
    assert_true(isnan(out));
}

static void test_refusals(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    double matrix[4] = {1, 2, 3, 4}, values[2] = {7, 7}, energies[2], diagonal[2] = {1, 1},
           negative[4] = {1, 2, 2, 1}, good[4] = {2, 1, 1, 2};
    assert_refused(&context, PK_ARGUMENT, "not symmetric: (1, 0) is 3 and (0, 1) 2",
                   pk_symmetric_eigenvalues(&context, 2, matrix, values, NULL));
    assert_true(values[0] == 7);
    matrix[1] = NAN;
    assert_refused(&context, PK_NOT_FINITE, "(0, 1) of the matrix",
                   pk_symmetric_eigenvalues(&context, 2, matrix, values, NULL));
    assert_refused(&context, PK_NOT_FINITE, "(0, 1) of the matrix",
                   pk_singular_values(&context, 2, 2, matrix, values, NULL, NULL));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_symmetric_eigenvalues(&context, 2, NULL, values, NULL));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_singular_values(&context, 2, 2, good, NULL, NULL, NULL));
    assert_refused(&context, PK_OVERFLOW, "overflows",
                   pk_symmetric_eigenvalues(&context, SIZE_MAX / 8, good, values, NULL));
    assert_refused(&context, PK_ARGUMENT, "no Gram matrix",
                   pk_novelty(&context, 2, negative, 2, good, diagonal, NULL, energies, NULL));
    diagonal[1] = -1;
    assert_refused(&context, PK_ARGUMENT, "row 1 is -1",
                   pk_novelty(&context, 2, good, 2, good, diagonal, NULL, energies, NULL));
    diagonal[1] = INFINITY;
    assert_refused(&context, PK_NOT_FINITE, "row 1",
                   pk_novelty(&context, 2, good, 2, good, diagonal, NULL, energies, NULL));
    diagonal[1] = 1;
    const pk_novelty_options options = {0, 1.5};
    assert_refused(&context, PK_ARGUMENT, "fraction 1.5",
                   pk_novelty(&context, 2, good, 2, good, diagonal, &options, energies, NULL));
    assert_refused(&context, PK_ARGUMENT, "is NULL",
                   pk_novelty(&context, 2, good, 2, NULL, diagonal, NULL, energies, NULL));
    context.memory_limit = 10;
    assert_refused(&context, PK_MEMORY_LIMIT, "novelty",
                   pk_novelty(&context, 2, good, 2, good, diagonal, NULL, energies, NULL));
    assert_refused(&context, PK_MEMORY_LIMIT, "auroc", pk_auroc(&context, 2, good, 2, good, energies));
    context.memory_limit = 0;
    assert_refused(&context, PK_ARGUMENT, "rate 0",
                   pk_false_positives(&context, 2, good, 2, good, 0, energies));
    assert_refused(&context, PK_ARGUMENT, "auroc: a list", pk_auroc(&context, 2, NULL, 2, good, energies));
    assert_int_equal(context.memory_used, 0);
}

/* The energy by features: the part of a row's gradient in the span of the training rows', by Gram and Schmidt. */
static double energy_of(size_t n, size_t P, const pk_real *train, const pk_real *row,
                        const unsigned char *counts)
{
    double *basis = FIXTURE_NEW(double, n *P), *v = FIXTURE_NEW(double, P), inside = 0, whole = 0;
    size_t rank = 0;
    for (size_t i = 0; i <= n; i++) {
        double before = 0, after = 0;
        for (size_t p = 0; p < P; p++) {
            v[p] = counts[p] ? (double)(i < n ? train[i * P + p] : row[p]) : 0;
            before += v[p] * v[p];
        }
        for (int twice = 0; twice < 2; twice++)
            for (size_t b = 0; b < rank; b++) {
                double dot = 0;
                for (size_t p = 0; p < P; p++)
                    dot += basis[b * P + p] * v[p];
                inside += i == n ? dot * dot : 0;
                for (size_t p = 0; p < P; p++)
                    v[p] -= dot * basis[b * P + p];
            }
        for (size_t p = 0; p < P; p++)
            after += v[p] * v[p];
        whole = before;
        for (size_t p = 0; i < n && after > 1e-20 * before && p < P; p++)
            basis[rank * P + p] = v[p] / sqrt(after);
        rank += i < n && after > 1e-20 * before;
    }
    free(basis), free(v);
    return inside / whole;
}

/* Of a run, by step and layer; and of kernels along steps against the matrices themselves. */
static void test_of_a_run(void **state)
{
    (void)state;
    enum { ROWS = 6, TEST = 4 };
    static const recipe how = {
        "input 3; dense 5; tanh; dense 2", "softmax_cross_entropy", "sgd", 0, 0.3, 0, ROWS, 4, 5, 0, 3, 0};
    trained t;
    trained_make(&how, &t);
    pk_context *context = &t.context;
    const size_t P = t.run.parameters, D = 3, shape[2] = {TEST, 3}, steps[2] = {5, 2};
    const pk_dataset rows = {.inputs = pk_array_view(REAL_TYPE, 2, shape, t.test)};
    double energies[2 * 2 * TEST], worst = 0, least = 1;
    pk_novelty_report reports[4];
    const pk_novelty_options whole = {0, 1};
    pk_kernel_options o;
    memset(&o, 0, sizeof o);
    o.kind = PK_KERNEL_NTK, o.outputs = PK_OUTPUTS_ONE, o.output = 1, o.by_layer = 1;
    o.steps = steps, o.step_count = 2;
    assert_ok(context, pk_kernel_novelty(context, &t.run, &rows, &o, &whole, energies, reports));
    pk_real *w = FIXTURE_NEW(pk_real, P), *J = FIXTURE_NEW(pk_real, (ROWS + TEST) * 2 * P);
    pk_real *own = FIXTURE_NEW(pk_real, (ROWS + TEST) * P);
    unsigned char *counts = FIXTURE_NEW(unsigned char, P);
    for (size_t k = 0; k < 2; k++) {
        assert_ok(context, pk_run_weights(context, &t.run, steps[k], w));
        for (int s = 0; s < 2; s++)
            assert_ok(context, pk_jacobian(context, &t.graph, w,
                                           pk_matrix_view(s ? t.test : t.train, s ? TEST : ROWS, D),
                                           pk_matrix_view(J + (s ? ROWS * 2 * P : 0), (s ? TEST : ROWS) * 2, P),
                                           pk_matrix_view(NULL, 0, 0)));
        for (size_t i = 0; i < ROWS + TEST; i++)
            memcpy(own + i * P, J + (2 * i + 1) * P, P * sizeof *own);
        for (size_t layer = 0; layer < 2; layer++) {
            for (size_t b = 0; b < t.graph.block_count; b++)
                memset(counts + t.graph.blocks[b].first, t.graph.blocks[b].column == (int)layer,
                       t.graph.blocks[b].count);
            for (size_t m = 0; m < TEST; m++) {
                const double energy = energy_of(ROWS, P, own, own + (ROWS + m) * P, counts);
                worst = fmax(worst, fabs(energy - energies[(k * 2 + layer) * TEST + m]));
                least = fmin(least, energy);
            }
            assert_true(reports[k * 2 + layer].rank == reports[k * 2 + layer].whole_rank);
        }
    }
    print_message("by step and layer: differ by %.2g, least %.3g\n", worst, least);
    assert_true(worst <= EITHER(1e-9, 1e-2) && least < 0.999);
    /* epk: test rows move, training rows do not; by the matrices. */
    memset(&o, 0, sizeof o);
    o.kind = PK_KERNEL_EPK, o.outputs = PK_OUTPUTS_TRACE;
    double train[ROWS * ROWS], cross[TEST * ROWS], both[TEST * TEST], diagonal[TEST], expected[TEST];
    double *place[3] = {train, cross, both};
    assert_ok(context, pk_kernels(context, &t.run, NULL, NULL, 1, &o, &place[0], NULL));
    assert_ok(context, pk_kernels(context, &t.run, &rows, NULL, 1, &o, &place[1], NULL));
    assert_ok(context, pk_kernels(context, &t.run, &rows, &rows, 1, &o, &place[2], NULL));
    for (size_t m = 0; m < TEST; m++)
        diagonal[m] = both[m * TEST + m];
    assert_ok(context, pk_novelty(context, ROWS, train, TEST, cross, diagonal, NULL, expected, NULL));
    assert_ok(context, pk_kernel_novelty(context, &t.run, &rows, &o, NULL, energies, NULL));
    for (size_t m = 0; m < TEST; m++)
        assert_close(energies[m], expected[m], EITHER(1e-10, 1e-3));
    o.outputs = PK_OUTPUTS_FULL;
    assert_refused(context, PK_ARGUMENT, "one number for each pair",
                   pk_kernel_novelty(context, &t.run, &rows, &o, NULL, energies, NULL));
    memset(&o, 0, sizeof o);
    o.kind = PK_KERNEL_TRACIN;
    const pk_dataset labelled = {.inputs = rows.inputs, .targets = pk_array_view(PK_INT64, 1, shape, t.labels)};
    assert_refused(context, PK_ARGUMENT, "different features",
                   pk_kernel_novelty(context, &t.run, &labelled, &o, NULL, energies, NULL));
    o.unweighted = 1;
    assert_ok(context, pk_kernel_novelty(context, &t.run, &labelled, &o, NULL, energies, NULL));
    assert_refused(context, PK_ARGUMENT, "missing",
                   pk_kernel_novelty(context, &t.run, NULL, &o, NULL, energies, NULL));
    free(w), free(J), free(own), free(counts);
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_symmetric), cmocka_unit_test(test_singular), cmocka_unit_test(test_energy),
        cmocka_unit_test(test_network),   cmocka_unit_test(test_roc),      cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_of_a_run),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
