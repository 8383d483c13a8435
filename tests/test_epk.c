/* The symmetric exact path kernel: its definition by Jacobians, symmetry, no negative eigenvalue over test and training rows,
 * the decomposition where the loss is linear in the outputs, kinks, refusals. */
#include "trained.h"

enum { M = 4, N = 6 };

static const recipe linear_loss = {
    "input 3; dense 5; tanh; dense 3; log_softmax", "nll", "sgd", 0, 0.3, 0.5, N, 4, 5, 2, 3, 0};
static const recipe squared = {
    "input 3; dense 5; tanh; dense 4; gelu; dense 2", "squared", "adam", 0, 0.02, 0, N, 4, 5, 0, 7, 0};
static const recipe tokens = {"input 3; embedding 6 4; residual( attention 2 ); mean_tokens; dense 2",
                              "squared",
                              "sgd momentum=0.9",
                              6,
                              0.1,
                              0,
                              N,
                              4,
                              4,
                              0,
                              8,
                              0};
static const recipe convolution = {"input 1x3x3; conv 2 2x2; tanh; flatten; residual( dense 8; tanh ); dense 2",
                                   "squared",
                                   "sgd",
                                   0,
                                   0.1,
                                   0,
                                   N,
                                   4,
                                   4,
                                   0,
                                   8,
                                   0};

static pk_epk_options how(int outputs, int x_train, int y_train, int nodes)
{
    pk_epk_options options;
    memset(&options, 0, sizeof options);
    options.outputs = outputs;
    options.x_train = x_train;
    options.y_train = y_train;
    options.quadrature.rule = nodes ? PK_RULE_GAUSS : PK_RULE_AUTO;
    options.quadrature.nodes = nodes;
    return options;
}

static pk_matrix rows_of(const trained *t, int train)
{
    return train ? pk_matrix_view(NULL, 0, 0) : trained_test(t, M);
}

static double *compute(trained *t, const pk_epk_options *options, pk_epk_report *report)
{
    const size_t C = options->outputs == PK_EPK_FULL ? t->run.outputs : 1;
    double *gram = FIXTURE_NEW(double, (options->x_train ? N : M) * (options->y_train ? N : M) * C * C);
    assert_ok(&t->context, pk_kernel_epk(&t->context, &t->run, rows_of(t, options->x_train),
                                         rows_of(t, options->y_train), options, gram, report));
    return gram;
}

/* By Jacobians, 20 nodes; c by the definition. */
static double *truth_of(trained *t, int x_train, int y_train, int weighted)
{
    pk_context *context = &t->context;
    const pk_run *run = &t->run;
    const size_t P = run->parameters, C = run->outputs, D = t->graph.input_width;
    const size_t n[2] = {x_train ? N : M, y_train ? N : M};
    const int train[2] = {x_train, y_train};
    double *gram = FIXTURE_NEW(double, n[0] * C * n[1] * C), node[20], weight[20];
    pk_real *w[3], *j[2];
    pk_replay replay;
    pk_gauss_legendre(20, node, weight);
    assert_ok(context, pk_replay_prepare(context, run, 0, &replay));
    for (int i = 0; i < 3; i++)
        w[i] = FIXTURE_NEW(pk_real, P);
    for (int i = 0; i < 2; i++)
        j[i] = FIXTURE_NEW(pk_real, n[i] * C * P);
    for (size_t s = 0; s < run->steps; s++) {
        double c[N] = {0};
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        for (size_t b = 0; b < batch.count; b++)
            c[batch.items[b]] += batch.weights ? batch.weights[b] : 1.0 / (double)batch.count;
        for (int e = 0; e < 2; e++)
            assert_ok(context, pk_replay_weights(context, &replay, s + (size_t)e, w[e]));
        for (int q = 0; q < 20; q++) {
            for (size_t p = 0; p < P; p++)
                w[2][p] = (pk_real)(w[0][p] + node[q] * (w[1][p] - w[0][p]));
            for (int i = 0; i < 2; i++)
                assert_ok(context, pk_jacobian(context, &t->graph, train[i] ? w[0] : w[2],
                                               pk_matrix_view(train[i] ? t->train : t->test, n[i], D),
                                               pk_matrix_view(j[i], n[i] * C, P), pk_matrix_view(NULL, 0, 0)));
            for (size_t a = 0; a < n[0] * C; a++)
                for (size_t b = 0; b < n[1] * C; b++) {
                    double sum = weight[q] * run->learning_rates[s] * pk_run_gradient_scale(run, s), dot = 0;
                    sum *= weighted && train[0] ? c[a / C] : 1;
                    sum *= weighted && train[1] ? c[b / C] : 1;
                    for (size_t p = 0; p < P; p++)
                        dot += (double)j[0][a * P + p] * (double)j[1][b * P + p];
                    gram[a * n[1] * C + b] += sum * dot;
                }
        }
    }
    pk_replay_release(context, &replay);
    free(w[0]), free(w[1]), free(w[2]), free(j[0]), free(j[1]);
    return gram;
}

static void test_definition(void **state)
{
    (void)state;
    static const recipe *const recipes[] = {&linear_loss, &squared, &tokens, &convolution};
    double worst = 0;
    for (int r = 0; r < 4; r++) {
        trained t;
        trained_make(recipes[r], &t);
        const size_t C = t.run.outputs;
        for (int kind = 0; kind < 8; kind++) {
            const int x_train = kind & 1, y_train = kind >> 1 & 1, weighted = kind >> 2;
            const size_t n = x_train ? N : M, m = y_train ? N : M;
            double *truth = truth_of(&t, x_train, y_train, weighted);
            const double largest = fixture_largest(n * C * m * C, truth);
            for (int nodes = 0; nodes <= 16; nodes += 16) {
                pk_epk_options options = how(PK_EPK_FULL, x_train, y_train, nodes);
                pk_epk_report report;
                options.unweighted = !weighted;
                double *full = compute(&t, &options, &report);
                options.outputs = PK_EPK_TRACE;
                double *trace = compute(&t, &options, NULL);
                worst = fmax(worst, fixture_apart(n * C * m * C, full, truth) / largest);
                for (size_t i = 0; i < n * m; i++) {
                    double sum = 0;
                    for (size_t k = 0; k < C; k++)
                        sum += truth[(i / m * C + k) * m * C + i % m * C + k];
                    worst = fmax(worst, fabs(trace[i] - sum) / largest);
                }
                assert_true(report.error <= EITHER(1e-10, 1e-4) && report.refused == 0 &&
                            report.points >= t.run.steps);
                free(full), free(trace);
            }
            free(truth);
        }
        trained_release(&t);
    }
    print_message("worst entry %.2g of the largest\n", worst);
    assert_true(worst <= ROUNDING(1e-12));
}

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
    trained t;
    trained_make(&linear_loss, &t);
    memcpy(t.test, t.train, t.graph.input_width * sizeof *t.test);
    double all[ALL * ALL], trace = 0;
    for (int kind = 0; kind < 4; kind++) {
        const int x_train = kind & 1, y_train = kind >> 1;
        const pk_epk_options options = how(PK_EPK_TRACE, x_train, y_train, 0);
        const size_t n = x_train ? N : M, m = y_train ? N : M;
        double *gram = compute(&t, &options, NULL);
        for (size_t i = 0; i < n * m; i++)
            all[((x_train ? M : 0) + i / m) * ALL + (y_train ? M : 0) + i % m] = gram[i];
        if (x_train == y_train)
            for (size_t i = 0; i < n * m; i++)
                assert_true(gram[i] == gram[i % m * m + i / m]);
        free(gram);
    }
    for (size_t i = 0; i < ALL * ALL; i++)
        assert_close(all[i], all[i % ALL * ALL + i / ALL], ROUNDING(1e-12) * fixture_largest(ALL * ALL, all));
    /* The discontinuity. */
    assert_true(fabs(all[0] - all[M]) > 0.01 * fabs(all[0]) && fabs(all[M] - all[M * ALL + M]) > 0.01 * all[M]);
    for (size_t i = 0; i < ALL; i++)
        trace += all[i * ALL + i];
    const double least = least_eigenvalue(ALL, all);
    print_message("least eigenvalue %.3g, trace %.3g\n", least, trace);
    assert_true(least >= -ROUNDING(1e-12) * trace / ALL && trace > 0);
    trained_release(&t);
}

/* nll on log_softmax: dl/df = -e_y, so that the kernel alone gives the change, and each contribution. */
static void test_machine(void **state)
{
    (void)state;
    recipe r = linear_loss;
    r.steps = 40;
    trained t;
    trained_make(&r, &t);
    const size_t C = t.run.outputs;
    const pk_epk_options options = how(PK_EPK_FULL, 0, 1, 0);
    double *gram = compute(&t, &options, NULL), worst = 0, residual = 0, largest = 0;
    pk_decompose_options all;
    pk_decomposition d;
    memset(&all, 0, sizeof all);
    assert_ok(&t.context, pk_decompose(&t.context, &t.run, rows_of(&t, 0), &all, &d));
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
    print_message("entries differ by %.2g, residual %.2g, largest %.2g\n", worst, residual, largest);
    assert_true(worst <= ROUNDING(1e-12) * largest && residual <= ROUNDING(1e-12) && largest > 0.1);
    pk_decomposition_release(&t.context, &d);
    free(gram);
    trained_release(&t);
}

/* Kinks are closed in on, also those beyond the outermost node of a piece: entries as those of the decomposition. */
static void test_kinks(void **state)
{
    (void)state;
    recipe r = linear_loss;
    r.network = "input 3; dense 24; relu; dense 3; log_softmax";
    r.rate = 1;
    trained t;
    trained_make(&r, &t);
    const size_t C = t.run.outputs;
    pk_epk_options options = how(PK_EPK_FULL, 0, 1, 0);
    pk_epk_report report;
    options.tolerance = EITHER(1e-8, 1e-3);
    double *gram = compute(&t, &options, &report), worst = 0, largest = 0;
    pk_decompose_options all;
    pk_decomposition d;
    memset(&all, 0, sizeof all);
    assert_ok(&t.context, pk_decompose(&t.context, &t.run, rows_of(&t, 0), &all, &d));
    for (size_t cell = 0; cell < M * C; cell++)
        for (size_t i = 0; i < N; i++) {
            worst = fmax(worst,
                         fabs(gram[cell * N * C + i * C + (size_t)t.labels[i]] - d.by_example[cell * N + i]));
            largest = fmax(largest, fabs(d.by_example[cell * N + i]));
        }
    print_message("relu: %.2g of the largest, error %.2g, %zu points\n", worst / largest, report.error,
                  report.points);
    assert_true(worst <= options.tolerance * largest && report.points > EITHER(40, 20) * t.run.steps);
    pk_decomposition_release(&t.context, &d);
    free(gram);
    trained_release(&t);
}

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
    trained_make(&squared, &t);
    pk_context *context = &t.context;
    double gram[4 * N * N], reached = 0;
    const pk_matrix x = rows_of(&t, 0), none = rows_of(&t, 1);
    pk_epk_options options = how(PK_EPK_TRACE, 0, 1, 0);
    double *plain = compute(&t, &options, NULL), *other;
    context->threads = 3;
    other = compute(&t, &options, NULL);
    assert_memory_equal(plain, other, M * N * sizeof *plain);
    free(other);
    context->threads = 1;
    context->memory_limit = 2000000;
    other = compute(&t, &options, NULL);
    assert_memory_equal(plain, other, M * N * sizeof *plain);
    free(other);
    context->memory_limit = 3000;
    assert_refused(context, PK_MEMORY_LIMIT, "bytes",
                   pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL));
    context->memory_limit = 0;
    context->progress = cancel;
    context->progress_user = &reached;
    assert_int_equal(pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL), PK_CANCELLED);
    assert_close(reached, 0.4, 0.01);
    assert_true(context->progress == cancel);
    context->progress = NULL;
    /* Steps add up. */
    static const size_t some[] = {3, 0, 4}, rest[] = {1, 2}, beyond[] = {0, 5};
    options.steps = some, options.step_count = 3;
    other = compute(&t, &options, NULL);
    options.steps = rest, options.step_count = 2;
    double *more = compute(&t, &options, NULL);
    for (size_t i = 0; i < M * N; i++)
        assert_close(plain[i], other[i] + more[i], ROUNDING(1e-13) * fixture_largest(M * N, plain));
    free(other), free(more), free(plain);
    options.steps = beyond;
    assert_refused(context, PK_ARGUMENT, "step 5 of a run of 5 steps",
                   pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL));
    options = how(0, 0, 1, 0);
    assert_refused(context, PK_ARGUMENT, "outputs is 0",
                   pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL));
    options = how(PK_EPK_TRACE, 0, 1, 1001);
    assert_refused(context, PK_ARGUMENT, "1001 nodes",
                   pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL));
    options = how(PK_EPK_TRACE, 0, 1, 0);
    options.tolerance = -1;
    assert_refused(context, PK_ARGUMENT, "tolerance -1",
                   pk_kernel_epk(context, &t.run, x, none, &options, gram, NULL));
    options.tolerance = 0;
    assert_refused(context, PK_ARGUMENT, "missing",
                   pk_kernel_epk(context, NULL, x, none, &options, gram, NULL));
    assert_refused(context, PK_ARGUMENT, "missing", pk_kernel_epk(context, &t.run, x, none, NULL, gram, NULL));
    assert_refused(context, PK_ARGUMENT, "missing",
                   pk_kernel_epk(context, &t.run, x, none, &options, NULL, NULL));
    assert_refused(context, PK_ARGUMENT, "first inputs are NULL",
                   pk_kernel_epk(context, &t.run, pk_matrix_view(NULL, 2, 3), none, &options, gram, NULL));
    assert_refused(context, PK_SHAPE, "first inputs",
                   pk_kernel_epk(context, &t.run, pk_matrix_view(t.test, 2, 2), none, &options, gram, NULL));
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition), cmocka_unit_test(test_symmetric), cmocka_unit_test(test_machine),
        cmocka_unit_test(test_kinks),      cmocka_unit_test(test_calls),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
