/* Measures against published values and those of SciPy 1.17 (scipy.stats.pearsonr, spearmanr, kendalltau), against their definitions,
 * and at the ends of the range. */
#include "gram_anchor.h"

enum { ROWS = ANCHOR_ROWS };

static void test_grams(void **state)
{
    double t[ROWS * ROWS], g[ROWS * ROWS], y[ROWS], alignment;
    pk_context context = {0};
    pk_gram_measures one;
    pk_gram_pair_measures two;
    (void)state;
    gram_anchor(t, g, y);
    for (double scale = 1e-150; scale < 1e151; scale *= 1e150) {
        double scaled[ROWS * ROWS];
        for (int i = 0; i < ROWS * ROWS; i++)
            scaled[i] = t[i] * scale;
        assert_ok(&context, pk_measure_gram_pair(&context, ROWS, scaled, g, &two));
        assert_close(two.cka, .9375992901002983, 1e-13);
        assert_close(two.cka_unbiased, .9435301171515562, 1e-13);
        assert_close(two.alignment, .7365688806594016, 1e-13);
        assert_close(two.distance, 1 - .7365688806594016, 1e-13);
        assert_ok(&context, pk_measure_gram(&context, ROWS, scaled, &one));
        assert_close(one.effective_rank, 5.638255056419204, 1e-12);
        assert_close(one.participation_ratio, 4.785330514761964, 1e-12);
        assert_close(one.trace_over_max, 3.4297281751147675, 1e-12);
        assert_close(one.least / scale, .19545199814342987, 1e-13);
        assert_ok(&context, pk_target_alignment(&context, ROWS, scaled, y, &alignment));
        assert_close(alignment, .3153705517430619, 1e-13);
    }
    /* A mean far above what varies: the formula by sums would lose all digits of the centred one. */
    for (int i = 0; i < ROWS * ROWS; i++)
        g[i] += 1e6;
    assert_ok(&context, pk_measure_gram_pair(&context, ROWS, t, g, &two));
    assert_close(two.cka, .9375992901002983, 1e-8);
    /* Nothing to be alike: NaN, and no error. */
    memset(g, 0, sizeof g);
    assert_ok(&context, pk_measure_gram_pair(&context, ROWS, t, g, &two));
    assert_true(isnan(two.alignment) && isnan(two.cka) && isnan(two.cka_unbiased));
    const double three[9] = {2, 1, 0, 1, 3, 0, 0, 0, 1};
    assert_ok(&context, pk_measure_gram_pair(&context, 3, three, three, &two));
    assert_true(isnan(two.cka_unbiased) && two.cka > 0.99);
    g[0] = 1;
    g[ROWS + 1] = -1;
    assert_ok(&context, pk_measure_gram(&context, ROWS, g, &one));
    assert_true(isnan(one.effective_rank) && one.least == -1);
    t[1] = 7;
    assert_refused(&context, PK_ARGUMENT, "(1, 0)", pk_measure_gram_pair(&context, ROWS, g, t, &two));
    assert_refused(&context, PK_ARGUMENT, "second matrix", pk_measure_gram_pair(&context, ROWS, g, t, &two));
    t[9] = (double)INFINITY;
    assert_refused(&context, PK_NOT_FINITE, "(1, 1)", pk_measure_gram(&context, ROWS, t, &one));
}

static void test_specialization(void **state)
{
    const double grams[2 * 4] = {2, 0, 0, 1, 1, 0, 0, 2};
    const int64_t labels[2] = {0, 1}, bad[2] = {0, 2};
    double special[4];
    pk_context context = {0};
    (void)state;
    /* A(K_cc, y_d) = K_cc[d d] / |K_cc|: 2 and 1 by sqrt 5, and the mean over c is 1.5 / sqrt 5 */
    assert_ok(&context, pk_kernel_specialization(&context, 2, 2, grams, 2, labels, special));
    assert_close(special[0], 4. / 3, 1e-15);
    assert_close(special[1], 2. / 3, 1e-15);
    assert_close(special[2], 2. / 3, 1e-15);
    assert_close(special[3], 4. / 3, 1e-15);
    assert_refused(&context, PK_ARGUMENT, "label 1 is 2",
                   pk_kernel_specialization(&context, 2, 2, grams, 2, bad, special));
}

static void test_lists(void **state)
{
    static const double a[11] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5}, b[11] = {2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4};
    double large[11], small[11], value, equal[3] = {2, 2, 2}, nan[3] = {1, (double)NAN, 2};
    pk_context context = {0};
    (void)state;
    for (int i = 0; i < 11; i++) {
        large[i] = 1e300 * a[i];
        small[i] = 1e-300 * b[i];
    }
    assert_ok(&context, pk_pearson(&context, 11, a, b, &value));
    assert_close(value, 0.09422924859889797, 1e-15);
    assert_ok(&context, pk_pearson(&context, 11, large, small, &value));
    assert_close(value, 0.09422924859889797, 1e-14);
    assert_ok(&context, pk_spearman(&context, 11, a, b, &value));
    assert_close(value, 0.1384567651467695, 1e-15);
    assert_ok(&context, pk_kendall(&context, 11, a, b, &value));
    assert_close(value, 0.14757295747452434, 1e-15);
    assert_ok(&context, pk_kendall(&context, 11, large, small, &value));
    assert_close(value, 0.14757295747452434, 1e-15);
    pk_status (*const each[])(pk_context *, size_t, const double *, const double *,
                              double *) = {pk_pearson, pk_spearman, pk_kendall};
    for (int f = 0; f < 3; f++) {
        assert_ok(&context, each[f](&context, 3, a, equal, &value));
        assert_true(isnan(value)); /* a constant list, as SciPy */
        assert_ok(&context, each[f](&context, 0, NULL, NULL, &value));
        assert_true(isnan(value));
        assert_ok(&context, each[f](&context, 2, a, a + 1, &value));
        assert_close(value, -1, 1e-15);
        assert_ok(&context, each[f](&context, 5, a, a, &value));
        assert_close(value, 1, 1e-15);
        assert_refused(&context, PK_NOT_FINITE, "number 1 of the second list",
                       each[f](&context, 3, a, nan, &value));
    }
    assert_ok(&context, pk_top_overlap(&context, 11, a, b, 3, &value));
    assert_close(value, 2. / 3, 1e-15); /* places 5, 7, 4 of a, and 3, 5, 7 of b */
    assert_refused(&context, PK_ARGUMENT, "12 largest of 11", pk_top_overlap(&context, 11, a, b, 12, &value));
}

/* Kendall's tau by its definition, pair by pair, on lists with many equal numbers. */
static void test_kendall_by_pairs(void **state)
{
    pk_random random = {3, 0, 0};
    (void)state;
    for (int round = 0; round < 60; round++) {
        enum { MOST = 70 };
        const size_t n = 2 + pk_random_below(&random, MOST - 2), values = 1 + pk_random_below(&random, 2 * n);
        double a[MOST], b[MOST], more = 0, in_a = 0, in_b = 0, found;
        pk_context context = {0};
        for (size_t i = 0; i < n; i++) {
            a[i] = (double)pk_random_below(&random, values);
            b[i] = (double)pk_random_below(&random, values);
        }
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < i; j++) {
                const int x = (a[i] > a[j]) - (a[i] < a[j]), y = (b[i] > b[j]) - (b[i] < b[j]);
                more += x * y;
                in_a += x * x;
                in_b += y * y;
            }
        assert_ok(&context, pk_kendall(&context, n, a, b, &found));
        if (in_a * in_b == 0)
            assert_true(isnan(found));
        else
            assert_close(found, more / sqrt(in_a * in_b), 1e-14);
    }
}

static void test_predictions(void **state)
{
    static const double surrogate[15] = {2, 1, 0, 0, 3, 1, 1, 1, 1, 50, -1000, 0, .5, .25, 2},
                        network[15] = {1, 2, 0, 0, 1, 0, 2, 0, 1, 60, -10, 1, 0, 0, 4};
    static const int64_t labels[5] = {0, 1, 2, 0, 2}, bad[5] = {0, 1, 3, 0, 2};
    pk_context context = {0};
    pk_prediction_measures m;
    (void)state;
    assert_ok(&context, pk_measure_predictions(&context, 5, 3, surrogate, network, labels, &m));
    assert_int_equal(m.left_out, 1);
    assert_close(m.kendall, 0.5477225575051662, 1e-14);
    assert_close(m.pearson, 0.5486685347545142, 1e-13);
    assert_close(m.spearman, 0.7378647873726218, 1e-14);
    assert_close(m.log_odds_r2, 0.18752188129657135, 1e-13);
    assert_close(m.r_miss, .5, 0);
    assert_close(m.tad, .2, 1e-15);
    assert_refused(&context, PK_ARGUMENT, "label 2 is 3",
                   pk_measure_predictions(&context, 5, 3, surrogate, network, bad, &m));
    /* All right: no row that one of them misses. */
    assert_ok(&context, pk_measure_predictions(&context, 1, 3, surrogate, surrogate, labels, &m));
    assert_true(isnan(m.r_miss) && isnan(m.kendall) && m.tad == 0);
}

/* Cholesky's factor and the eigenvalues without vectors, of any order: products and vectors say the same. */
static void test_factors(void **state)
{
    static const size_t orders[] = {1, 2, 3, 31, 32, 33, 63, 64, 65, 129, 200, 300};
    pk_random random = {5, 0, 0};
    (void)state;
    for (size_t o = 0; o < sizeof orders / sizeof *orders; o++) {
        const size_t n = orders[o];
        double *a = malloc(n * n * sizeof *a), *l = malloc(n * n * sizeof *l), *v = malloc(n * n * sizeof *v),
               *values = malloc(n * sizeof *values), *again = malloc(n * sizeof *again),
               *x = malloc(3 * n * sizeof *x);
        pk_context context = {0};
        size_t row = 0;
        context.threads = 1 + (int)(o % 3);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j <= i; j++)
                a[i * n + j] = a[j * n + i] = pk_random_normal(&random) + (i == j ? 3 * sqrt((double)n) : 0);
        memcpy(l, a, n * n * sizeof *l);
        memcpy(l, a, n * n * sizeof *l);
        assert_ok(&context, pk_cholesky(&context, n, l, &row));
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j <= i; j++) {
                double sum = 0;
                for (size_t k = 0; k <= j; k++)
                    sum += l[i * n + k] * l[j * n + k];
                assert_close(sum, a[i * n + j], 1e-13 * (double)n);
            }
        for (size_t i = 0; i < 3 * n; i++)
            x[i] = pk_random_normal(&random);
        double *right = malloc(3 * n * sizeof *right);
        memcpy(right, x, 3 * n * sizeof *x);
        assert_ok(&context, pk_cholesky_solve(&context, n, l, 0, 3, x));
        for (size_t i = 0; i < n; i++)
            for (size_t c = 0; c < 3; c++) {
                double sum = 0;
                for (size_t k = 0; k < n; k++)
                    sum += a[i * n + k] * x[k * 3 + c];
                assert_close(sum, right[i * 3 + c], 1e-12 * (double)n);
            }
        assert_ok(&context, pk_symmetric_eigenvalues(&context, n, a, values, NULL));
        assert_ok(&context, pk_symmetric_eigenvalues(&context, n, a, again, v));
        for (size_t k = 0; k < n; k++)
            assert_close(values[k], again[k], 1e-14 * (double)n * values[n - 1]);
        a[n * n - 1] = -1;
        assert_refused(&context, PK_ARGUMENT, "not positive definite", pk_cholesky(&context, n, a, &row));
        assert_int_equal(row, n - 1);
        free(a);
        free(l);
        free(v);
        free(values);
        free(again);
        free(x);
        free(right);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grams),       cmocka_unit_test(test_specialization),
        cmocka_unit_test(test_lists),       cmocka_unit_test(test_kendall_by_pairs),
        cmocka_unit_test(test_predictions), cmocka_unit_test(test_factors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
