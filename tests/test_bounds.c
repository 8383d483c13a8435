/* The bound on the error of each A(x, i) holds against brute force in long double, and means something: it
 * is far below the entries. Tolerances are loosened on purpose, so that quadrature error is there to bound. */
#include "fixture.h"

enum { ROWS = 3 };

/* Worst true error over bound; 0 / 0 counts as held. */
static double check(const char *network, const char *optimizer, double rate, double tolerance,
                    double *looseness)
{
    pk_context context;
    pk_run run;
    bf_run made;
    bf_result truth;
    pk_decomposition got;
    pk_decompose_options options;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    bf_recipe recipe = fixture_recipe(7, 12, 8, 5, rate);
    fixture_make(network, BF_SOFTMAX_CROSS_ENTROPY, optimizer, &recipe, &made);
    fixture_open(&context, &made, &run);
    pk_real *inputs = fixture_normals(3, ROWS * made.network.inputs, 1);
    bf_decompose(&made, ROWS, inputs, &truth);
    options.bounds = 1;
    options.tolerance = tolerance;
    assert_ok(&context,
              pk_decompose(&context, &run, pk_matrix_view(inputs, ROWS, made.network.inputs), &options, &got));
    double worst = 0, largest_bound = 0, largest = 0;
    for (size_t i = 0; i < ROWS * truth.outputs * truth.examples; i++) {
        double error = (double)fabsl((long double)(got.by_example[i] - (bf_real)truth.by_example[i]));
        assert_true(got.bounds[i] >= 0 && isfinite(got.bounds[i]));
        if (error > 0)
            worst = fmax(worst, got.bounds[i] > 0 ? error / got.bounds[i] : INFINITY);
        largest_bound = fmax(largest_bound, got.bounds[i]);
        largest = fmax(largest, fabs(got.by_example[i]));
    }
    *looseness = largest_bound / largest;
    printf("%-62s %-26s tolerance %-6.0e error/bound %.2e, bound/entry %.2e\n", network, optimizer, tolerance,
           worst, *looseness);
    pk_decomposition_release(&context, &got);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    bf_result_free(&truth);
    bf_run_free(&made);
    free(inputs);
    return worst;
}

static void test_bounds_hold(void **state)
{
    static const char *const networks[] = {
        "input 4; dense 6; tanh; dense 3",
        "input 4; dense 6; tanh; dense 5; sigmoid; dense 3",
        "input 4; dense 6; gelu; dense 5; softplus 2; dense 3",
        "input 4; dense 6; relu; dense 3",
        "input 4; dense 6; relu; dense 5; relu; dense 4; relu; dense 3",
        "input 4; dense 6; abs; dense 5; hard_tanh; dense 3",
        "input 4; dense 6; tanh; dense 5; relu; dense 3",
        "input 4; dense 3",
    };
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.01", "adamw"};
    static const double tolerances[] = {1e-3, EITHER(1e-6, 1e-4), EITHER(1e-10, 1e-5)};
    (void)state;
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (size_t o = 0; o < 3; o++)
            for (size_t t = 0; t < 3; t++) {
                double looseness = 0, rate = o == 2 ? 0.02 : 0.3;
                double worst = check(networks[n], optimizers[o], rate, tolerances[t], &looseness);
                if (!(worst <= 1))
                    fail_msg("%s, %s: an error is %.3g times its bound", networks[n], optimizers[o], worst);
                if (!(looseness <= fmax(EITHER(1e-8, 0.5), 10 * tolerances[t])))
                    fail_msg("%s, %s: bounds of %.3g of the entries say nothing", networks[n], optimizers[o],
                             looseness);
            }
}

/* Bounds belong to rules that measure themselves. */
static void test_bounds_need_a_rule(void **state)
{
    pk_context context;
    pk_run run;
    bf_run made;
    pk_decomposition got;
    pk_decompose_options options;
    pk_real inputs[4] = {1, 2, 3, 4};
    (void)state;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    bf_recipe recipe = fixture_recipe(1, 4, 2, 2, 0.1);
    fixture_make("input 4; dense 3; tanh; dense 2", BF_SOFTMAX_CROSS_ENTROPY, "sgd", &recipe, &made);
    fixture_open(&context, &made, &run);
    options.bounds = 1;
    options.quadrature.rule = PK_RULE_LEFT;
    assert_refused(&context, PK_UNSUPPORTED, "bounds",
                   pk_decompose(&context, &run, pk_matrix_view(inputs, 1, 4), &options, &got));
    pk_run_release(&context, &run);
    bf_run_free(&made);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bounds_hold),
                                       cmocka_unit_test(test_bounds_need_a_rule)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
