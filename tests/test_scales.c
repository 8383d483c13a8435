/* Decompositions do not depend on the unit of the outputs: at scales from 1e-12 to 1e12, at large steps and small ones,
 * entries are within 1e-10 of the largest, and closures are small against what is decomposed. Against brute force
 * (graph_oracle.h). */
#include "random_runs.h"

static const char *const networks[] = {
    "input 4; dense 6; tanh; dense 5; sigmoid; dense 3",
    "input 4; dense 6; gelu; dense 5; layer_norm; dense 3",
    "input 4; dense 6; relu; dense 5; relu; dense 3",
    "input 1x4x4; conv 2 3x3; abs; max_pool 2 stride=1; flatten; dense 3",
    "input 4; dense 6; tanh; dense 5; relu; dense 3",
    ("input 3x4; residual( rms_norm; attention 2 causal ); residual( dense 5; leaky_relu; dense 4 ); "
     "mean_tokens; dense 3"),
};
static const char *const optimizers[] = {"sgd", "sgd momentum=0.9", "adam", "adamw"};

/* What some runs leave at worst, and which of them is the first to leave too much. */
typedef struct worst {
    double error, closure, others;
    size_t runs, failures;
    char first[1600];
} worst;

/* One run: entries to 1e-10 of the largest; closures to 1e-12 of the row's own scale, the largest of the output
 * before and after and of the contributions. */
static void check(const rr_recipe *recipe, worst *w)
{
    rr_run r;
    go_result truth;
    rr_verdict v;
    rr_build(recipe, &r);
    go_decompose(&r.run, r.rows, r.inputs, &truth);
    rr_compare(&r, &truth, 0, 0, &v);
    assert_int_equal(truth.missed, 0);
    assert_true(v.largest > 0);
    w->runs++;
    w->error = fmax(w->error, v.error), w->others = fmax(w->others, v.others);
    w->closure = fmax(w->closure, v.row_closure);
    if (v.status || !(v.error <= ROUNDING(1e-10)) || !(v.others <= ROUNDING(1e-10)) ||
        !(v.row_closure <= ROUNDING(1e-12))) {
        if (!w->failures++)
            snprintf(
                w->first, sizeof w->first,
                "%s, %s, outputs of %.0e, steps of %.0e: entries (%.3g) are off by %.3g of the largest, other "
                "terms by %.3g; the closure is %.3g of the row's scale; %s",
                recipe->network, recipe->optimizer, recipe->scale, recipe->pace, v.largest, v.error, v.others,
                v.row_closure, pk_status_text(v.status));
    }
    free(v.looseness);
    go_result_free(&truth);
    rr_free(&r);
}

static void test_scales(void **state)
{
    static const double paces[] = {0.2, 1e-5};
    enum { LARGEST = EITHER(12, 6) }; /* in float Adam's squares of larger gradients overflow */
    size_t failures = 0;
    char first[1600] = "";
    (void)state;
    for (int unscaled = 0; unscaled < 2; unscaled++) /* the scale in the weights; in a layer of its own */
        for (int power = -LARGEST; power <= LARGEST; power += 3) {
            worst w;
            memset(&w, 0, sizeof w);
            for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
                for (size_t o = 0; o < 4; o++)
                    for (size_t p = 0; p < 2; p++) {
                        rr_recipe recipe = rr_plain(networks[n], optimizers[o], PK_SQUARED, 0, 10 * n + o);
                        recipe.steps = 5;
                        recipe.pace = paces[p];
                        recipe.scale = pow(10, power);
                        recipe.unscaled = unscaled;
                        if (unscaled)
                            snprintf(recipe.network + strlen(recipe.network), 40, "; scale 1e%d", power);
                        check(&recipe, &w);
                    }
            print_message("1e%-3d %s: entries %.1e of the largest, other terms %.1e, closures %.1e; %zu of %zu "
                          "runs fail\n",
                          power, unscaled ? "by a layer" : "by weights", w.error, w.others, w.closure,
                          w.failures, w.runs);
            if (!failures)
                memcpy(first, w.first, sizeof first);
            failures += w.failures;
        }
    if (failures)
        fail_msg("%zu runs; the first: %s", failures, first);
}

/* Ordinary outputs, but steps so small that what is decomposed is small: what a trained network does. */
static void test_small_steps(void **state)
{
    worst w;
    (void)state;
    memset(&w, 0, sizeof w);
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (size_t o = 0; o < 4; o++)
            for (int power = -8; power <= -3; power++) {
                rr_recipe recipe =
                    rr_plain(networks[n], optimizers[o], PK_SOFTMAX_CROSS_ENTROPY, 0, 50 + 10 * n + o);
                recipe.steps = 5;
                recipe.pace = pow(10, power);
                check(&recipe, &w);
            }
    print_message("entries %.1e of the largest, other terms %.1e, closures %.1e; %zu of %zu runs fail\n",
                  w.error, w.others, w.closure, w.failures, w.runs);
    if (w.failures)
        fail_msg("%zu runs; the first: %s", w.failures, w.first);
}

int main(void)
{
#ifdef PATHKERNEL_FLOAT
    print_message("nothing to do: these runs and their tolerances are for double\n");
    return 0;
#endif
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_scales), cmocka_unit_test(test_small_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
