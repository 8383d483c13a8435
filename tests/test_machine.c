/* Kernel machines: published and independently computed values; conditions of the minimum written out here; every row left out in
 * turn; degenerate data; what is refused. */
#include "gram_anchor.h"

enum { ROWS = ANCHOR_ROWS };

static pk_array numbers(const double *data, size_t rows, size_t cols)
{
    const size_t shape[2] = {rows, cols};
    return pk_array_view(PK_FLOAT64, cols ? 2 : 1, shape, data);
}

static void test_anchors(void **state)
{
    static const double svm[2][ROWS] = {{0, -.5298109262179957, 1, 1, -1, -1, .5298109262179957, 0},
                                        {0, -.2715802555791455, 4.119637286718198, 1.575976614105902,
                                         -3.110542884693681, -2.313490760551274, 0, 0}};
    static const double b[2] = {-.1235668040942561, .4203320929753242},
                        dual[2] = {-3.441599651327507, -5.6956139008241};
    static const double logistic[2][4] = {
        {.35323791219071, -.98644303242279, 3.24007938068677, 2.226270548453239},
        {1.92763108229241, -1.32238554447807, .85481226142200, 1.7938665609733966}};
    double k[ROWS * ROWS], g[ROWS * ROWS], y[ROWS];
    pk_context context = {0};
    pk_machine m;
    (void)state;
    gram_anchor(k, g, y);
    assert_close(k[0], 2.196698719315486, 1e-14);
    const pk_array targets = numbers(y, ROWS, 0);
    const pk_machine_options ridge = {.loss = PK_MACHINE_SQUARED, .regularization = .1};
    assert_ok(&context, pk_machine_fit(&context, ROWS, k, &targets, &ridge, &m));
    assert_close(m.coefficients[0], -.44300566461803104, 1e-12);
    assert_close(m.coefficients[1], -.3782749325298538, 1e-12);
    assert_close(m.coefficients[2], 3.4104422260537777, 1e-12);
    assert_close(m.leave_one_out[0], 1.692083451776264, 1e-12);
    assert_close(m.leave_one_out[1], -.6893097652405225, 1e-12);
    assert_close(m.leave_one_out[2], -.45746206095965447, 1e-12);
    assert_close(m.degrees_of_freedom, 7.06056773213232, 1e-12);
    pk_machine_release(&context, &m);
    for (int c = 0; c < 2; c++) {
        const pk_machine_options hinge = {
            .loss = PK_MACHINE_HINGE, .regularization = c ? .1 : 1, .intercept = 1, .tolerance = 1e-12};
        double form = 0, sum = 0;
        assert_ok(&context, pk_machine_fit(&context, ROWS, k, &targets, &hinge, &m));
        for (int i = 0; i < ROWS; i++) {
            for (int j = 0; j < ROWS; j++)
                form += .5 * m.coefficients[i] * k[i * ROWS + j] * m.coefficients[j];
            sum += fabs(m.coefficients[i]);
            if (!c || (i >= 1 && i <= 5))
                assert_close(m.coefficients[i], svm[c][i], 1e-11);
        }
        assert_close(m.intercept[0], b[c], 1e-11);
        assert_close(form - sum, dual[c], 1e-11);
        pk_machine_release(&context, &m);
    }
    for (int c = 0; c < 2; c++) {
        const pk_machine_options options = {
            .loss = PK_MACHINE_LOGISTIC, .regularization = .1, .penalize_coefficients = c};
        assert_ok(&context, pk_machine_fit(&context, ROWS, k, &targets, &options, &m));
        for (int i = 0; i < 3; i++)
            assert_close(m.coefficients[i], logistic[c][i], 1e-11);
        assert_close(m.objective[0], logistic[c][3], 1e-12);
        pk_machine_release(&context, &m);
    }
}

/* ---- conditions of the minimum ---------------------------------------------------------------------------- */

enum { MOST = 40, CLASSES = 3 };

typedef struct problem {
    size_t n, outputs;
    double gram[MOST * MOST], y[MOST * CLASSES];
    int64_t labels[MOST];
    int64_t signs[MOST];
} problem;

/* A Gram matrix of points in `width` dimensions, some twice, scaled. */
static void draw(problem *p, pk_random *random, size_t n, size_t width, double scale)
{
    double x[MOST][6];
    p->n = n;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < width; j++)
            x[i][j] = i % 5 == 4 ? x[i - 1][j] : pk_random_normal(random);
        p->labels[i] = (int64_t)(i < CLASSES ? i : pk_random_below(random, CLASSES));
        p->signs[i] = i < 2 ? 1 - 2 * (int64_t)i : pk_random_below(random, 2) ? 1 : -1;
        for (size_t k = 0; k < CLASSES; k++)
            p->y[i * CLASSES + k] = pk_random_normal(random);
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = 1e-3 * (i == j), one = 0;
            for (size_t k = 0; k < width; k++)
                sum += x[i][k] * x[j][k];
            one = sum;
            p->gram[i * n + j] = scale * (one + .1 * one * one);
        }
}

static double dot(size_t n, const double *a, const double *x, size_t stride)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * x[i * stride];
    return sum;
}

/* -dl/df lies in [low, high] */
static void residual_range(pk_machine_loss loss, double epsilon, double y, double f, double slack, double *low,
                           double *high)
{
    const double margin = 1 - y * f, beyond = fabs(f - y) - epsilon, side = f > y ? -1 : 1;
    switch (loss) {
    case PK_MACHINE_SQUARED: *low = *high = y - f; break;
    case PK_MACHINE_LOGISTIC: *low = *high = y / (1 + exp(y * f)); break;
    case PK_MACHINE_HINGE:
        *low = margin > slack ? 1 : 0;
        *high = margin < -slack ? 0 : 1;
        if (y < 0) {
            const double other = *low;
            *low = -*high;
            *high = -other;
        }
        break;
    case PK_MACHINE_SQUARED_HINGE: *low = *high = margin > 0 ? 2 * y * margin : 0; break;
    default:
        *low = beyond > slack ? 1 : epsilon > 0 || beyond > slack ? 0 : -1;
        *high = beyond < -slack ? 0 : 1;
        if (side < 0) {
            const double other = *low;
            *low = -*high;
            *high = -other;
        }
    }
}

static void check_minimum(const problem *p, const pk_machine_options *options, const pk_machine *m,
                          double slack)
{
    const double lambda = options->regularization;
    for (size_t k = 0; k < m->outputs; k++) {
        double sum = 0, most = 0;
        for (size_t i = 0; i < p->n; i++)
            most = fmax(most, fabs(m->coefficients[i * m->outputs + k]));
        for (size_t i = 0; i < p->n; i++) {
            const double alpha = m->coefficients[i * m->outputs + k], f = m->fitted[i * m->outputs + k];
            const double value =
                dot(p->n, p->gram + i * p->n, m->coefficients + k, m->outputs) + m->intercept[k];
            double y = p->y[i * CLASSES + k], low, high;
            assert_close(value, f, 1e-9 * (fabs(f) + most * p->gram[0]));
            if (options->loss == PK_MACHINE_LOGISTIC || options->loss == PK_MACHINE_HINGE ||
                options->loss == PK_MACHINE_SQUARED_HINGE)
                y = m->outputs == 1 ? (double)p->signs[i] : p->labels[i] == (int64_t)k ? 1 : -1;
            residual_range(options->loss, options->epsilon, y, f, slack, &low, &high);
            sum += alpha;
            if (!(lambda * alpha >= low - slack && lambda * alpha <= high + slack))
                fail_msg("%s, lambda %g: row %zu: lambda alpha %.12g is not in [%.12g, %.12g], f %.12g, y %g",
                         pk_machine_loss_name(options->loss), lambda, i, lambda * alpha, low, high, f, y);
        }
        if (options->intercept)
            assert_close(sum, 0, 1e-8 * (most * (double)p->n + 1));
    }
}

static void test_minimum(void **state)
{
    static const double lambdas[] = {1e-3, .1, 1, 30};
    static const double scales[] = {1e-6, 1, 1e6};
    pk_random random = {7, 3, 0};
    size_t fits = 0;
    (void)state;
    for (size_t round = 0; round < 12; round++)
        for (int loss = PK_MACHINE_SQUARED; loss <= PK_MACHINE_EPSILON_INSENSITIVE; loss++)
            for (int intercept = 0; intercept < 2; intercept++) {
                problem p;
                pk_context context = {0};
                pk_machine m;
                const size_t n = 6 + pk_random_below(&random, MOST - 6), several = round % 2;
                draw(&p, &random, n, 1 + pk_random_below(&random, 5), scales[round % 3]);
                const double lambda = lambdas[round % 4] * scales[round % 3];
                const size_t shape[2] = {n, CLASSES}, one[1] = {n};
                const pk_array y =
                    loss == PK_MACHINE_SQUARED || loss == PK_MACHINE_EPSILON_INSENSITIVE
                        ? pk_array_view(PK_FLOAT64, 2, shape, p.y)
                        : pk_array_view(PK_INT64, 1, one,
                                        several || loss == PK_MACHINE_SOFTMAX ? p.labels : p.signs);
                const pk_machine_options options = {.loss = (pk_machine_loss)loss,
                                                    .regularization = lambda,
                                                    .intercept = intercept,
                                                    .epsilon = loss == PK_MACHINE_EPSILON_INSENSITIVE ? .2 : 0,
                                                    .tolerance = 1e-8};
                context.threads = 1 + (int)(round % 2);
                const pk_status status = pk_machine_fit(&context, n, p.gram, &y, &options, &m);
                if (status)
                    fail_msg("round %zu, loss %d, intercept %d, lambda %g, %zu rows: %s", round, loss,
                             intercept, lambda, n, pk_message(&context));
                if (loss != PK_MACHINE_SOFTMAX) {
                    check_minimum(&p, &options, &m, 1e-6);
                } else {
                    assert_int_equal(m.outputs, CLASSES);
                    for (size_t i = 0; i < n; i++) {
                        double sum = 0, total = 0;
                        for (size_t c = 0; c < CLASSES; c++)
                            sum += exp(m.fitted[i * CLASSES + c] - m.fitted[i * CLASSES]);
                        for (size_t c = 0; c < CLASSES; c++) {
                            const double q = exp(m.fitted[i * CLASSES + c] - m.fitted[i * CLASSES]) / sum;
                            assert_close(lambda * m.coefficients[i * CLASSES + c],
                                         (p.labels[i] == (int64_t)c) - q, 1e-7);
                            assert_close(dot(n, p.gram + i * n, m.coefficients + c, CLASSES) + m.intercept[c],
                                         m.fitted[i * CLASSES + c],
                                         1e-6 * (1 + fabs(m.fitted[i * CLASSES + c])));
                            total += m.intercept[c];
                        }
                        assert_close(total, 0, 1e-9);
                    }
                }
                fits++;
                pk_machine_release(&context, &m);
                assert_int_equal(context.memory_used, 0);
            }
    print_message("%zu machines satisfy the conditions of the minimum\n", fits);
}

/* Coefficients penalized: K (lambda ... ): gradient by alpha K r = lambda alpha. */
static void test_penalized_coefficients(void **state)
{
    pk_random random = {8, 1, 0};
    (void)state;
    for (int round = 0; round < 8; round++) {
        problem p;
        pk_context context = {0};
        pk_machine m;
        const size_t n = 30, one[1] = {30};
        const int softmax = round % 2;
        draw(&p, &random, n, 3, 1);
        const pk_array y = pk_array_view(PK_INT64, 1, one, softmax ? p.labels : p.signs);
        const pk_machine_options options = {.loss = softmax ? PK_MACHINE_SOFTMAX : PK_MACHINE_LOGISTIC,
                                            .regularization = round < 4 ? .05 : 3,
                                            .intercept = round / 2 % 2,
                                            .penalize_coefficients = 1};
        assert_ok(&context, pk_machine_fit(&context, n, p.gram, &y, &options, &m));
        for (size_t k = 0; k < m.outputs; k++) {
            double r[MOST], total = 0, scale = 0;
            for (size_t i = 0; i < n; i++) {
                const double *f = m.fitted + i * m.outputs;
                double sum = 0;
                for (size_t c = 0; c < m.outputs; c++)
                    sum += exp(f[c] - f[k]);
                r[i] = softmax ? (p.labels[i] == (int64_t)k) - 1 / sum
                               : (double)p.signs[i] / (1 + exp((double)p.signs[i] * f[0]));
                total += r[i];
            }
            for (size_t i = 0; i < n; i++)
                scale = fmax(scale, fabs(options.regularization * m.coefficients[i * m.outputs + k]));
            for (size_t i = 0; i < n; i++)
                assert_close(dot(n, p.gram + i * n, r, 1),
                             options.regularization * m.coefficients[i * m.outputs + k], 1e-7 * scale);
            if (options.intercept)
                assert_close(total, 0, 1e-8);
        }
        pk_machine_release(&context, &m);
    }
}

/* ---- ridge: rows left out, variance, attribution ----------------------------------------------------------- */

static void test_leave_one_out(void **state)
{
    pk_random random = {9, 1, 0};
    (void)state;
    for (int intercept = 0; intercept < 2; intercept++) {
        problem p;
        pk_context context = {0};
        pk_machine m, other;
        const size_t n = 23;
        double less[MOST * MOST], targets[MOST * CLASSES], row[MOST], value[CLASSES], share[CLASSES * MOST],
            variance;
        draw(&p, &random, n, 4, 1);
        pk_array y = numbers(p.y, n, CLASSES);
        const pk_machine_options options = {
            .loss = PK_MACHINE_SQUARED, .regularization = .3, .intercept = intercept};
        assert_ok(&context, pk_machine_fit(&context, n, p.gram, &y, &options, &m));
        for (size_t out = 0; out < n; out++) {
            for (size_t i = 0, a = 0; i < n; i++)
                if (i != out) {
                    for (size_t j = 0, c = 0; j < n; j++)
                        if (j != out)
                            less[a * (n - 1) + c++] = p.gram[i * n + j];
                    memcpy(targets + a * CLASSES, p.y + i * CLASSES, sizeof value);
                    row[a++] = p.gram[out * n + i];
                }
            y = numbers(targets, n - 1, CLASSES);
            assert_ok(&context, pk_machine_fit(&context, n - 1, less, &y, &options, &other));
            assert_ok(&context, pk_machine_predict(&context, &other, 1, row, value));
            assert_ok(&context, pk_machine_attribute(&context, &other, 1, row, share));
            for (size_t k = 0; k < CLASSES; k++) {
                double sum = other.intercept[k];
                assert_close(m.leave_one_out[out * CLASSES + k], value[k], 1e-10);
                for (size_t i = 0; i + 1 < n; i++)
                    sum += share[k * (n - 1) + i];
                assert_close(sum, value[k], 1e-12);
            }
            /* H_ii by the answer to a target moved by 1: 1 - lambda P_ii; and 1 / P_ii = variance of the row left out + lambda */
            assert_ok(&context,
                      pk_machine_variance(&context, &other, 1, row, &p.gram[out * n + out], &variance));
            assert_close(m.leverage[out], 1 - .3 / (variance + .3), 1e-11);
            pk_machine_release(&context, &other);
        }
        pk_machine_release(&context, &m);
    }
}

/* ---- degenerate data ---------------------------------------------------------------------------------------- */

static void test_degenerate(void **state)
{
    const double one[1] = {2}, equal[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    static const int64_t positive[3] = {1, 1, 1}, mixed[3] = {1, -1, 1};
    const size_t three[1] = {3}, single[1] = {1};
    pk_context context = {0};
    pk_machine m;
    (void)state;
    for (int loss = PK_MACHINE_SQUARED; loss <= PK_MACHINE_EPSILON_INSENSITIVE; loss++)
        for (int intercept = 0; intercept < 2; intercept++) {
            const pk_machine_options options = {
                .loss = (pk_machine_loss)loss, .regularization = .5, .intercept = intercept};
            const int classes = loss == PK_MACHINE_LOGISTIC || loss == PK_MACHINE_SOFTMAX;
            const pk_array all = pk_array_view(PK_INT64, 1, three, positive),
                           lone = pk_array_view(PK_INT64, 1, single, positive),
                           some =
                               pk_array_view(PK_INT64, 1, three, loss == PK_MACHINE_SOFTMAX ? positive : mixed);
            const pk_status status = pk_machine_fit(&context, 1, one, &lone, &options, &m);
            assert_int_equal(status, classes && intercept ? PK_ARGUMENT : PK_OK);
            if (!status && intercept) /* b alone reaches the target */
                assert_close(m.fitted[0], 1, 1e-9);
            pk_machine_release(&context, &m);
            assert_int_equal(pk_machine_fit(&context, 3, equal, &all, &options, &m),
                             classes && intercept ? PK_ARGUMENT : PK_OK);
            pk_machine_release(&context, &m);
            if (loss != PK_MACHINE_SOFTMAX) {
                assert_ok(&context, pk_machine_fit(&context, 3, equal, &some, &options, &m));
                assert_close(m.fitted[0], m.fitted[1], 1e-9);
                pk_machine_release(&context, &m);
            }
        }
    assert_int_equal(context.memory_used, 0);
}

/* C of 1e-6 and 1e6, separable and not. */
static void test_extreme_bounds(void **state)
{
    pk_random random = {11, 1, 0};
    (void)state;
    for (int round = 0; round < 12; round++) {
        problem p;
        pk_context context = {0};
        pk_machine m;
        const size_t n = 40, shape[1] = {40};
        draw(&p, &random, n, round % 2 ? 5 : 1, 1);
        const pk_array y = pk_array_view(PK_INT64, 1, shape, p.signs);
        const pk_machine_options options = {.loss =
                                                round % 3 == 2 ? PK_MACHINE_SQUARED_HINGE : PK_MACHINE_HINGE,
                                            .regularization = round < 6 ? 1e6 : 1e-6,
                                            .intercept = round / 2 % 2,
                                            .tolerance = 1e-6};
        assert_ok(&context, pk_machine_fit(&context, n, p.gram, &y, &options, &m));
        assert_true(m.certificate <= 1e-6);
        pk_machine_release(&context, &m);
    }
}

/* ---- what is refused ---------------------------------------------------------------------------------------- */

static void test_refused(void **state)
{
    double gram[4] = {1, 2, 2, 1}, skew[4] = {1, .5, .4, 1}, nan[4] = {1, 0, 0, (double)NAN},
           fine[4] = {2, 1, 1, 2}, y[2] = {1, -1}, half[2] = {1, .5};
    const size_t two[1] = {2}, three[1] = {3};
    const int64_t labels[2] = {0, -3};
    pk_context context = {0};
    pk_machine m;
    const pk_array signs = pk_array_view(PK_FLOAT64, 1, two, y),
                   halves = pk_array_view(PK_FLOAT64, 1, two, half),
                   many = pk_array_view(PK_FLOAT64, 1, three, y),
                   negative = pk_array_view(PK_INT64, 1, two, labels);
    pk_machine_options o = {.loss = PK_MACHINE_HINGE, .regularization = 1};
    (void)state;
    assert_refused(&context, PK_ARGUMENT, "least eigenvalue is -1",
                   pk_machine_fit(&context, 2, gram, &signs, &o, &m));
    assert_refused(&context, PK_ARGUMENT, "not symmetric", pk_machine_fit(&context, 2, skew, &signs, &o, &m));
    assert_refused(&context, PK_NOT_FINITE, "(1, 1)", pk_machine_fit(&context, 2, nan, &signs, &o, &m));
    assert_refused(&context, PK_SHAPE, "targets: (3,)", pk_machine_fit(&context, 2, fine, &many, &o, &m));
    assert_refused(&context, PK_ARGUMENT, "row 1 is 0.5", pk_machine_fit(&context, 2, fine, &halves, &o, &m));
    assert_refused(&context, PK_ARGUMENT, "row 1 is -3", pk_machine_fit(&context, 2, fine, &negative, &o, &m));
    o.epsilon = 1;
    assert_refused(&context, PK_ARGUMENT, "no epsilon", pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    o.epsilon = 0;
    o.regularization = 0;
    assert_refused(&context, PK_ARGUMENT, "positive", pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    o.regularization = (double)NAN;
    assert_refused(&context, PK_ARGUMENT, "positive", pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    o.regularization = 1;
    o.penalize_coefficients = 1;
    assert_refused(&context, PK_ARGUMENT, "hinge", pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    o.penalize_coefficients = 0;
    context.memory_limit = 100;
    assert_refused(&context, PK_MEMORY_LIMIT, "machine", pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    context.memory_limit = 0;
    assert_ok(&context, pk_machine_fit(&context, 2, fine, &signs, &o, &m));
    assert_refused(&context, PK_UNSUPPORTED, "no variance",
                   pk_machine_variance(&context, &m, 1, fine, fine, y));
    assert_refused(&context, PK_NOT_FINITE, "(0, 1)", pk_machine_predict(&context, &m, 1, nan + 2, y));
    pk_machine_release(&context, &m);
    assert_refused(&context, PK_ARGUMENT, "not fitted", pk_machine_predict(&context, &m, 1, fine, y));
}

/* The same bits for any number of threads. */
static void test_same_bits(void **state)
{
    pk_random random = {12, 1, 0};
    enum { N = 300 };
    double *x = malloc(N * 6 * sizeof *x), *gram = malloc(N * N * sizeof *gram), *y = malloc(N * sizeof *y);
    const size_t shape[1] = {N};
    (void)state;
    for (size_t i = 0; i < N * 6; i++)
        x[i] = pk_random_normal(&random);
    for (size_t i = 0; i < N; i++) {
        y[i] = pk_random_below(&random, 2) ? 1 : -1;
        for (size_t j = 0; j < N; j++) {
            double sum = 0;
            for (size_t k = 0; k < 6; k++)
                sum += (x[i * 6 + k] - x[j * 6 + k]) * (x[i * 6 + k] - x[j * 6 + k]);
            gram[i * N + j] = exp(-sum / 8);
        }
    }
    const pk_array targets = pk_array_view(PK_FLOAT64, 1, shape, y);
    for (int loss = PK_MACHINE_SQUARED; loss <= PK_MACHINE_HINGE; loss++) {
        pk_context one = {0}, many = {0};
        pk_machine a, b;
        if (loss == PK_MACHINE_SOFTMAX)
            continue;
        const pk_machine_options options = {
            .loss = (pk_machine_loss)loss, .regularization = .01, .intercept = 1};
        one.threads = 1;
        many.threads = 3;
        assert_ok(&one, pk_machine_fit(&one, N, gram, &targets, &options, &a));
        assert_ok(&many, pk_machine_fit(&many, N, gram, &targets, &options, &b));
        assert_memory_equal(a.coefficients, b.coefficients, N * sizeof(double));
        assert_memory_equal(a.fitted, b.fitted, N * sizeof(double));
        pk_machine_release(&one, &a);
        pk_machine_release(&many, &b);
    }
    free(x);
    free(gram);
    free(y);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_anchors),
        cmocka_unit_test(test_minimum),
        cmocka_unit_test(test_penalized_coefficients),
        cmocka_unit_test(test_leave_one_out),
        cmocka_unit_test(test_degenerate),
        cmocka_unit_test(test_extreme_bounds),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
