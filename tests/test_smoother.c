/* The exact smoother of squared loss and the telescoped predictions: against the network at every step, against the literal
 * recurrence with its own quadrature, under every optimizer; its order where the test side is not integrated; refusals. */
#include "trained.h"

enum { M = 4, N = 6 };

/* network, loss, optimizer, tokens, rate, clip, rows, batch, steps, keep_every, seed, moments */
static const recipe recipes[] = {
    {"input 3; dense 5; tanh; dense 1", "squared", "sgd", 0, 0.2, 0, N, N, 12, 0, 3, 0},
    {"input 3; dense 5; tanh; dense 4; gelu; dense 2", "mean_squared", "sgd", 0, 0.3, 0, N, 4, 8, 0, 4, 0},
    {"input 3; dense 6; relu; dense 5; relu; dense 2", "squared", "sgd", 0, 0.15, 0.5, N, 4, 8, 0, 5, 0},
    {"input 3; dense 6; tanh; dense 5; leaky_relu 0.1; dense 2", "squared", "sgd weight_decay=0.05", 0, 0.15, 0,
     N, 4, 8, 0, 6, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "sgd momentum=0.9 nesterov=1 weight_decay=0.01", 0, 0.05, 0,
     N, 4, 8, 0, 7, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "sgd momentum=0.8 dampening=0.3", 0, 0.1, 0, N, 4, 8, 3, 8,
     0},
    {"input 3; dense 6; relu; dense 2", "squared", "adam", 0, 0.02, 0, N, 4, 8, 0, 9, 1},
    {"input 3; dense 6; relu; dense 4; abs; dense 1", "mean_squared", "adamw weight_decay=0.1", 0, 0.02, 0, N,
     3, 8, 0, 10, 0},
    {"input 1x3x3; conv 2 2x2; tanh; max_pool 2x2; flatten; dense 2", "squared", "sgd", 0, 0.1, 0, N, 4, 6, 0,
     11, 0},
    {"input 3; embedding 6 4; residual( attention 2 ); mean_tokens; dense 2", "squared", "adam", 6, 0.02, 0, N,
     4, 6, 0, 12, 0},
    {"input 4; dense 4 name=a; tanh; dense 4 tied=a transposed; relu; dense 2", "squared", "sgd momentum=0.5",
     0, 0.1, 0, N, 4, 6, 0, 13, 0},
    {"input 3x4; dense 3; layer_norm; flatten; hard_tanh; dense 2", "squared", "adam weight_decay=0.01", 0,
     0.02, 0, N, N, 6, 0, 14, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "sgd maximize=1", 0, 0.05, 0, N, 4, 6, 0, 15, 0},
    {"input 3; dense 5; tanh; dense 2", "mean_squared", "sgd momentum=0.8 weight_decay=0.05 maximize=1", 0,
     0.05, 0, N, 4, 6, 3, 16, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "rmsprop alpha=0.8 momentum=0.7 weight_decay=0.1", 0, 0.02,
     0, N, 4, 8, 0, 17, 0},
    {"input 3; dense 5; relu; dense 2", "squared",
     "rmsprop momentum=0.7 centered=1 maximize=1 weight_decay=0.1", 0, 0.01, 0, N, N, 5, 0, 18, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "rmsprop", 0, 0.01, 0, N, 4, 8, 0, 19, 1},
    {"input 3; dense 5; tanh; dense 2", "squared", "nadam weight_decay=0.1 maximize=1", 0, 0.02, 0, N, 4, 8, 0,
     20, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "nadam weight_decay=0.1 decoupled_weight_decay=1", 0, 0.02,
     0, N, 4, 8, 0, 21, 1},
    {"input 3; dense 5; tanh; dense 2", "squared", "adam beta2=0.5 amsgrad=1", 0, 0.05, 0, N, 2, 9, 0, 22, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "adamw beta2=0.5 amsgrad=1", 0, 0.05, 0, N, 2, 9, 0, 23, 1},
    {"input 3; dense 5; tanh; dense 2", "squared", "adagrad lr_decay=0.1 weight_decay=0.05", 0, 0.1, 0, N, 4, 8,
     0, 24, 1},
};
enum { RECIPES = (int)(sizeof recipes / sizeof *recipes) };

/* Rows of both kinds, behind each other. */
static pk_real *all_rows(const trained *t)
{
    const size_t D = t->graph.input_width;
    pk_real *rows = FIXTURE_NEW(pk_real, (N + M) * D);
    memcpy(rows, t->train, N * D * sizeof *rows);
    memcpy(rows + N * D, t->test, M * D * sizeof *rows);
    return rows;
}

static void outputs_at(trained *t, size_t s, const pk_real *rows, size_t count, pk_real *f)
{
    pk_context *context = &t->context;
    pk_replay replay;
    pk_real *w = FIXTURE_NEW(pk_real, t->run.parameters);
    assert_ok(context, pk_replay_prepare(context, &t->run, 0, &replay));
    assert_ok(context, pk_replay_weights(context, &replay, s, w));
    assert_ok(context, pk_graph_evaluate(context, &t->graph, w,
                                         pk_matrix_view((pk_real *)rows, count, t->graph.input_width),
                                         pk_matrix_view(f, count, t->graph.output_width)));
    pk_replay_release(context, &replay);
    free(w);
}

/* At every step, for every row, s y + c is the network. */
static void test_network(void **state)
{
    (void)state;
    double worst = 0;
    for (int r = 0; r < RECIPES; r++) {
        trained t;
        pk_smoother smoother;
        trained_make(&recipes[r], &t);
        const size_t C = t.run.outputs, S = t.run.steps, cells = (N + M) * C;
        pk_real *rows = all_rows(&t), *f = FIXTURE_NEW(pk_real, cells), *f0 = FIXTURE_NEW(pk_real, cells);
        assert_ok(&t.context, pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &smoother));
        assert_true(smoother.rows == N + M && smoother.examples == N && smoother.steps == S);
        outputs_at(&t, 0, rows, N + M, f0);
        double moved = 0;
        for (size_t s = 0; s <= S; s++) {
            outputs_at(&t, s, rows, N + M, f);
            const double scale = fmax(1, fixture_largest(cells, f));
            for (size_t i = 0; i < cells; i++) {
                worst = fmax(worst, fabs(smoother.predictions[s * cells + i] - f[i]) / scale);
                moved = fmax(moved, fabs((double)f[i] - f0[i]));
            }
        }
        /* The matrix itself, not only its predictions. */
        for (size_t i = 0; i < cells; i++) {
            double value = smoother.constant[i];
            for (size_t j = 0; j < N * C; j++)
                value += smoother.matrix[i * N * C + j] * smoother.targets[j];
            assert_close(value, f[i], ROUNDING(1e-12) * fmax(1, fixture_largest(cells, f)));
        }
        if (!(worst <= EITHER(1e-12, 2e-4) && moved > 0.02))
            fail_msg("%s: %.3g off, moved %.3g", recipes[r].network, worst, moved);
        assert_true(smoother.residual <= EITHER(1e-12, 2e-4) && smoother.refused == 0 && smoother.points >= S);
        assert_true(smoother.unattributed <= EITHER(1e-13, 1e-4));
        pk_smoother_release(&t.context, &smoother);
        free(rows), free(f), free(f0);
        trained_release(&t);
    }
    print_message("s y + c is the network to %.2g\n", worst);
}

/* Groups with rates, decay and momenta of their own, and frozen tensors. */
static void test_groups(void **state)
{
    (void)state;
    static const double rates[2] = {0.1, 0.02};
    for (int o = 0; o < TRAINED_GROUPED; o++) {
        trained t;
        pk_smoother smoother;
        trained_make_grouped(o, N, rates, &t);
        assert_ok(&t.context, pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &smoother));
        assert_true(smoother.residual <= EITHER(1e-12, 2e-4) && smoother.unattributed <= EITHER(1e-13, 1e-4));
        assert_true(smoother.effective[2 * 8] > 1e-3);
        pk_smoother_release(&t.context, &smoother);
        trained_release(&t);
    }
}

/* The recurrence as it is written, for plain SGD: Jacobians at 24 nodes, and on 4000 midpoints where there are kinks. */
static void test_recurrence(void **state)
{
    (void)state;
    for (int r = 0; r < 3; r++) {
        trained t;
        pk_smoother smoother;
        trained_make(&recipes[r], &t);
        pk_context *context = &t.context;
        const pk_run *run = &t.run;
        const size_t P = run->parameters, C = run->outputs, S = run->steps, cells = (N + M) * C, K = N * C + 1;
        const double kappa = run->loss == PK_SQUARED ? 1 : 2 / (double)C;
        const int kinks = run->graph.switched, nodes = kinks ? 400 : 24;
        pk_real *rows = all_rows(&t), *f = FIXTURE_NEW(pk_real, cells), *w[3],
                *j = FIXTURE_NEW(pk_real, cells * P), *g = FIXTURE_NEW(pk_real, cells * P);
        double *table = FIXTURE_NEW(double, cells *K), *next = FIXTURE_NEW(double, cells *K), node[24],
               weight[24], *phi = FIXTURE_NEW(double, cells *P), effective[2] = {0, 0};
        pk_replay replay;
        pk_gauss_legendre(24, node, weight);
        for (int i = 0; i < 3; i++)
            w[i] = FIXTURE_NEW(pk_real, P);
        assert_ok(context, pk_replay_prepare(context, run, 0, &replay));
        outputs_at(&t, 0, rows, N + M, f);
        for (size_t i = 0; i < cells; i++)
            table[i * K + K - 1] = f[i];
        for (size_t s = 0; s < S; s++) {
            pk_batch batch;
            pk_run_batch(run, s, &batch);
            for (size_t e = 0; e < 2; e++)
                assert_ok(context, pk_replay_weights(context, &replay, s + e, w[e]));
            const pk_matrix x = pk_matrix_view(rows, N + M, run->graph.input_width);
            const pk_matrix none = pk_matrix_view(NULL, 0, 0);
            assert_ok(context, pk_jacobian(context, &t.graph, w[0], x, pk_matrix_view(g, cells, P), none));
            memset(phi, 0, cells * P * sizeof *phi);
            for (int q = 0; q < nodes; q++) {
                const double at = kinks ? (q + 0.5) / nodes : node[q], by = kinks ? 1.0 / nodes : weight[q];
                for (size_t p = 0; p < P; p++)
                    w[2][p] = (pk_real)(w[0][p] + at * (w[1][p] - w[0][p]));
                assert_ok(context, pk_jacobian(context, &t.graph, w[2], x, pk_matrix_view(j, cells, P), none));
                for (size_t i = 0; i < cells * P; i++)
                    phi[i] += by * j[i];
            }
            memcpy(next, table, cells * K * sizeof *next);
            for (size_t i = 0; i < cells; i++)
                for (size_t b = 0; b < batch.count; b++)
                    for (size_t c = 0; c < C; c++) {
                        const size_t at = (size_t)batch.items[b] * C + c;
                        double kernel = run->learning_rates[s] * pk_run_gradient_scale(run, s) * kappa /
                                        (double)batch.count,
                               dot = 0;
                        for (size_t p = 0; p < P; p++)
                            dot += phi[i * P + p] * g[at * P + p];
                        kernel *= dot;
                        for (size_t k = 0; k < K; k++)
                            next[i * K + k] -= kernel * (table[at * K + k] - (k == at));
                    }
            memcpy(table, next, cells * K * sizeof *next);
        }
        assert_ok(context, pk_smooth(context, run, trained_test(&t, M), NULL, &smoother));
        double apart = 0, largest = 0;
        for (size_t i = 0; i < cells; i++)
            for (size_t k = 0; k < K; k++) {
                const double own = k + 1 < K ? smoother.matrix[i * (K - 1) + k] : smoother.constant[i];
                apart = fmax(apart, fabs(own - table[i * K + k]));
                largest = fmax(largest, fabs(table[i * K + k]));
                if (k + 1 < K)
                    effective[i >= N * C] += table[i * K + k] * table[i * K + k];
            }
        print_message("recurrence: %.2g of %.2g apart\n", apart, largest);
        assert_true(largest > 0.1 && apart <= (kinks ? 3e-3 : EITHER(1e-12, 1e-4)) * largest);
        /* Effective parameters: of all training rows, of all test rows, of some. */
        const size_t some[2] = {1, N + 2}, train[N] = {0, 1, 2, 3, 4, 5};
        double both = 0;
        for (size_t i = 0; i < 2 * C; i++)
            for (size_t k = 0; k + 1 < K; k++)
                both += pow(smoother.matrix[(some[i / C] * C + i % C) * (K - 1) + k], 2);
        const double much = 1e-2 + (kinks ? 1 : 0);
        assert_close(smoother.effective[2 * S], effective[0], much * effective[0]);
        assert_close(smoother.effective[2 * S + 1], effective[1] * N / M, much * effective[1] * N / M);
        assert_close(smoother.effective[2 * S], pk_effective_parameters(&smoother, N, train), 1e-6);
        assert_close(pk_effective_parameters(&smoother, 2, some), both * N / 2, 1e-6 * both);
        assert_true(pk_effective_parameters(&smoother, 0, NULL) == 0 && smoother.effective[0] == 0);
        pk_smoother_release(context, &smoother);
        pk_replay_release(context, &replay);
        free(rows), free(f), free(j), free(g), free(table), free(next), free(phi);
        free(w[0]), free(w[1]), free(w[2]);
        trained_release(&t);
    }
}

/* Of first order, the smoother and the telescoped predictions miss by an amount that halves with the rate, at the same time. */
static void test_order(void **state)
{
    (void)state;
    double smoothed[3], telescoped[3];
    for (int k = 0; k < 3; k++) {
        trained t;
        pk_smoother smoother;
        const recipe how = {"input 3; dense 5; tanh; dense 1",
                            "squared",
                            "sgd",
                            0,
                            0.1 / (1 << k),
                            0,
                            N,
                            N,
                            (size_t)40 << k,
                            0,
                            21,
                            0};
        trained_make(&how, &t);
        const pk_smoother_options options = {1, 0};
        const size_t S = t.run.steps;
        double *line = FIXTURE_NEW(double, (S + 1) * M);
        pk_real f[M];
        assert_ok(&t.context, pk_smooth(&t.context, &t.run, trained_test(&t, M), &options, &smoother));
        assert_ok(&t.context, pk_telescope(&t.context, &t.run, trained_test(&t, M), line));
        smoothed[k] = smoother.residual;
        telescoped[k] = 0;
        for (size_t s = 0; s <= S; s++) {
            outputs_at(&t, s, t.test, M, f);
            for (size_t i = 0; i < M; i++) {
                telescoped[k] = fmax(telescoped[k], fabs(line[s * M + i] - f[i]));
                if (s == 0)
                    assert_true(line[i] == f[i]);
            }
        }
        pk_smoother_release(&t.context, &smoother);
        free(line);
        trained_release(&t);
    }
    print_message("first order: smoother %.2g %.2g %.2g, telescoped %.2g %.2g %.2g\n", smoothed[0], smoothed[1],
                  smoothed[2], telescoped[0], telescoped[1], telescoped[2]);
    for (int k = 0; k < 2; k++) {
        assert_true(smoothed[k] > 1e-4 && smoothed[k] / smoothed[k + 1] > 1.6 &&
                    smoothed[k] / smoothed[k + 1] < 2.6);
        assert_true(telescoped[k] > 1e-4 && telescoped[k] / telescoped[k + 1] > 1.6 &&
                    telescoped[k] / telescoped[k + 1] < 2.6);
    }
}

/* A linear network by least squares: the smoother is the one of gradient descent on ridge-free regression, in closed form
 * S_t = I - (I - eta K / n)^t on the training rows. */
static void test_linear(void **state)
{
    (void)state;
    trained t;
    pk_smoother smoother;
    const recipe how = {"input 3; dense 1 nobias", "squared", "sgd", 0, 0.3, 0, N, N, 9, 0, 31, 0};
    trained_make(&how, &t);
    assert_ok(&t.context, pk_smooth(&t.context, &t.run, pk_matrix_view(NULL, 0, 0), NULL, &smoother));
    double rest[N][N], kernel[N][N];
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++) {
            rest[i][j] = i == j;
            kernel[i][j] = 0;
            for (size_t d = 0; d < 3; d++)
                kernel[i][j] += 0.3 / N * t.train[i * 3 + d] * t.train[j * 3 + d];
        }
    for (int s = 0; s < 9; s++) {
        double next[N][N];
        for (size_t i = 0; i < N; i++)
            for (size_t j = 0; j < N; j++) {
                next[i][j] = rest[i][j];
                for (size_t k = 0; k < N; k++)
                    next[i][j] -= kernel[i][k] * rest[k][j];
            }
        memcpy(rest, next, sizeof rest);
    }
    double trace = 0, norm = 0;
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < N; j++) {
            assert_close(smoother.matrix[i * N + j], (i == j) - rest[i][j], ROUNDING(1e-14));
            trace += i == j ? smoother.matrix[i * N + j] : 0;
            norm += smoother.matrix[i * N + j] * smoother.matrix[i * N + j];
        }
    /* No more effective parameters than dimensions. */
    assert_true(trace > 0.5 && trace <= 3 && norm <= 3);
    assert_close(smoother.effective[2 * 9], norm, ROUNDING(1e-13));
    assert_true(smoother.effective[2 * 9 + 1] == 0 && smoother.rows == N);
    pk_smoother_release(&t.context, &smoother);
    trained_release(&t);
}

/* The same bits for any number of threads; a run of float32 weights closes too; groups. */
static void test_runs(void **state)
{
    (void)state;
    trained t;
    pk_smoother one, many;
    trained_make(&recipes[2], &t);
    t.context.threads = 1;
    assert_ok(&t.context, pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &one));
    t.context.threads = 3;
    assert_ok(&t.context, pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &many));
    const size_t cells = (N + M) * t.run.outputs;
    assert_memory_equal(one.matrix, many.matrix, cells * N * t.run.outputs * sizeof(double));
    assert_memory_equal(one.predictions, many.predictions, (t.run.steps + 1) * cells * sizeof(double));
    pk_smoother_release(&t.context, &one);
    pk_smoother_release(&t.context, &many);
    trained_release(&t);
    /* Recorded in float32: what rounding of the weights adds goes into c. */
    pk_context context;
    bf_run brute;
    pk_run run;
    const bf_recipe how = fixture_recipe(3, N, 8, 4, 0.1);
    memset(&context, 0, sizeof context);
    fixture_make("input 3; dense 4; relu; dense 3; tanh; dense 2", BF_SQUARED, "sgd momentum=0.9", &how,
                 &brute);
    for (size_t i = 0; i < (brute.steps + 1) * brute.parameters; i++)
        brute.weights[i] = (pk_real)(float)brute.weights[i];
    fixture_open(&context, &brute, &run);
    pk_real *test = fixture_normals(5, M * 3, 1);
    assert_ok(&context, pk_smooth(&context, &run, pk_matrix_view(test, M, 3), NULL, &one));
    assert_true(one.residual <= EITHER(1e-12, 1e-4));
    assert_true(one.unattributed > 1e-10 && one.unattributed < 1e-4);
    pk_smoother_release(&context, &one);
    /* The declared training is not the recorded one. */
    run.optimizer.momentum = 0.5;
    pk_status status = pk_smooth(&context, &run, pk_matrix_view(test, M, 3), NULL, &one);
    assert_refused(&context, PK_UNATTRIBUTED, "differ from the declared training", status);
    assert_non_null(one.matrix);
    pk_smoother_release(&context, &one);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    free(test);
    bf_run_free(&brute);
}

static int stop(void *user, const char *phase, double fraction)
{
    assert_true(fraction >= 0 && fraction <= 1);
    assert_true(strcmp(phase, "smoother") == 0 || strcmp(phase, "telescoping") == 0);
    return ++*(int *)user > 3;
}

static void test_refusals(void **state)
{
    (void)state;
    trained t;
    pk_smoother out;
    const recipe classes = {
        "input 3; dense 4; tanh; dense 3", "softmax_cross_entropy", "sgd", 0, 0.1, 0, N, 4, 4, 0, 5, 0};
    const recipe step = {"input 3; dense 4; sign; dense 2", "squared", "sgd", 0, 0.1, 0, N, 4, 4, 0, 5, 0};
    trained_make(&classes, &t);
    assert_refused(&t.context, PK_UNSUPPORTED, "softmax_cross_entropy are not linear",
                   pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &out));
    assert_null(out.matrix);
    trained_release(&t);
    trained_make(&step, &t);
    assert_refused(&t.context, PK_UNSUPPORTED, "surrogate",
                   pk_smooth(&t.context, &t.run, trained_test(&t, M), NULL, &out));
    trained_release(&t);
    trained_make(&recipes[0], &t);
    pk_context *context = &t.context;
    double *line = FIXTURE_NEW(double, 100);
    pk_smoother_options options = {0, -1};
    assert_refused(context, PK_ARGUMENT, "smoother: the run",
                   pk_smooth(context, NULL, trained_test(&t, M), NULL, &out));
    assert_refused(context, PK_ARGUMENT, "smoother: the run",
                   pk_smooth(context, &t.run, trained_test(&t, M), NULL, NULL));
    assert_refused(context, PK_ARGUMENT, "tolerance is -1",
                   pk_smooth(context, &t.run, trained_test(&t, M), &options, &out));
    assert_refused(context, PK_SHAPE, "smoother: the inputs are 4 x 2",
                   pk_smooth(context, &t.run, pk_matrix_view(t.test, M, 2), NULL, &out));
    assert_refused(context, PK_SHAPE, "telescoping: the inputs are 4 x 2",
                   pk_telescope(context, &t.run, pk_matrix_view(t.test, M, 2), line));
    assert_refused(context, PK_ARGUMENT, "telescoping: the run",
                   pk_telescope(context, &t.run, trained_test(&t, M), NULL));
    assert_ok(context, pk_telescope(context, &t.run, pk_matrix_view(NULL, 0, 3), NULL));
    options.tolerance = 1e-30;
    pk_status status = pk_smooth(context, &t.run, trained_test(&t, M), &options, &out);
    assert_refused(context, PK_NOT_CLOSED, "misses the network", status);
    assert_non_null(out.matrix);
    pk_smoother_release(context, &out);
    int calls = 0;
    context->progress = stop;
    context->progress_user = &calls;
    assert_int_equal(pk_smooth(context, &t.run, trained_test(&t, M), NULL, &out), PK_CANCELLED);
    assert_null(out.matrix);
    calls = 0;
    assert_int_equal(pk_telescope(context, &t.run, trained_test(&t, M), line), PK_CANCELLED);
    context->progress = NULL;
    context->memory_limit = context->memory_used + 2000;
    assert_refused(context, PK_MEMORY_LIMIT, "smoother",
                   pk_smooth(context, &t.run, trained_test(&t, M), NULL, &out));
    context->memory_limit = 0;
    free(line);
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_network),  cmocka_unit_test(test_groups), cmocka_unit_test(test_recurrence),
        cmocka_unit_test(test_order),    cmocka_unit_test(test_linear), cmocka_unit_test(test_runs),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
