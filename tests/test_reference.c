/* The definition of the decomposition (reference.h): against brute force in extended precision, and the engine against it,
 * under every optimizer, for every kind of layer. */
#include "trained.h"

typedef struct result {
    pk_reference arrays;
    double *memory;
    size_t cells, examples;
} result;

static result take(size_t rows, const pk_run *run)
{
    result r;
    r.cells = rows * run->outputs;
    r.examples = run->examples;
    r.memory = FIXTURE_NEW(double, r.cells *(6 + r.examples));
    memset(r.memory, 0xff, r.cells * (6 + r.examples) * sizeof(double));
    double *at = r.memory;
    double **const parts[] = {&r.arrays.initial,   &r.arrays.final,        &r.arrays.decay,
                              &r.arrays.inherited, &r.arrays.unattributed, &r.arrays.closure,
                              &r.arrays.by_example};
    for (int i = 0; i < 7; i++, at += r.cells)
        *parts[i] = at;
    return r;
}

static const char *const optimizers[] = {
    "sgd",
    "sgd weight_decay=0.05",
    "sgd momentum=0.9",
    "sgd momentum=0.8 nesterov=1 weight_decay=0.02",
    "sgd momentum=0.7 dampening=0.4",
    "adam epsilon=1e-4",
    "adam epsilon=1e-4 weight_decay=0.05",
    "adamw epsilon=1e-4 beta1=0.8 beta2=0.95 weight_decay=0.1",
    "rmsprop epsilon=1e-3",
    "rmsprop epsilon=1e-3 alpha=0.8 momentum=0.7 weight_decay=0.05",
    "rmsprop epsilon=1e-2 alpha=0.8 centered=1 weight_decay=0.02",
    "rmsprop epsilon=1e-2 alpha=0.7 centered=1 momentum=0.6 maximize=1",
    "adagrad epsilon=1e-3 weight_decay=0.05",
    "adagrad lr_decay=0.1 initial_accumulator_value=0.1 maximize=1",
    "adam epsilon=1e-4 beta2=0.5 amsgrad=1",
    "adamw epsilon=1e-4 beta2=0.6 amsgrad=1 maximize=1 weight_decay=0.1",
    "nadam epsilon=1e-4 weight_decay=0.05",
    "nadam epsilon=1e-4 weight_decay=0.05 decoupled_weight_decay=1 momentum_decay=0.1",
    "nadam epsilon=1e-4 maximize=1",
    "sgd maximize=1 weight_decay=0.05",
    "sgd momentum=0.8 nesterov=1 maximize=1 weight_decay=0.05",
};
static const struct {
    const char *network;
    size_t tokens;
} networks[] = {
    {"input 4; dense 5; tanh; dense 4; gelu; dense 2", 0},
    {"input 1x4x4; conv 2 3x3 pad=1; tanh; avg_pool 2x2; flatten; dense 2", 0},
    {"input 4; dense 5; layer_norm; sigmoid; dense 2", 0},
    {"input 3x4; dense 4; rms_norm; tanh; mean_tokens; dense 2", 0},
    {"input 3; embedding 6 4; position; residual( attention 2 ); mean_tokens; dense 2", 6},
    {"input 4; dense 5; residual( dense 4; silu; dense 5 ); residual( tanh; dense 3 | dense 3 ); dense 2", 0},
};
enum { BRUTE = 8 }; /* those that brute_force.h has */
enum { OPTIMIZERS = (int)(sizeof optimizers / sizeof *optimizers) };
enum { NETWORKS = (int)(sizeof networks / sizeof *networks), ROWS = 3 };

/* The engine's numbers against the definition's, as parts of the largest entry. */
static double compare(const pk_decomposition *engine, const result *r, double *closure)
{
    const pk_reference *a = &r->arrays;
    const double largest = fixture_largest(r->cells * r->examples, a->by_example);
    const double size =
        fmax(largest, fmax(fixture_largest(r->cells, a->initial), fixture_largest(r->cells, a->final)));
    double worst = fixture_apart(r->cells * r->examples, engine->by_example, a->by_example);
    worst = fmax(worst, fixture_apart(r->cells, engine->decay, a->decay));
    worst = fmax(worst, fixture_apart(r->cells, engine->unattributed, a->unattributed));
    worst = fmax(worst, fixture_apart(r->cells, engine->initial, a->initial));
    worst = fmax(worst, fixture_apart(r->cells, engine->final, a->final));
    assert_true(largest > 1e-3);
    *closure = fixture_largest(r->cells, a->closure) / size;
    return worst / largest;
}

/* The definition and the engine's decomposition of a run, which must agree; the caller releases both. */
static result judge(trained *t, const char *network, const char *rule, const pk_decompose_options *options,
                    pk_decomposition *engine, double *worst, double *worst_closure)
{
    const pk_matrix inputs = trained_test(t, ROWS);
    result r = take(ROWS, &t->run);
    assert_ok(&t->context, pk_decompose_reference(&t->context, &t->run, inputs, 1, 20, &r.arrays));
    assert_ok(&t->context, pk_decompose(&t->context, &t->run, inputs, options, engine));
    double closure, error = compare(engine, &r, &closure);
    const double rest = fixture_largest(r.cells, r.arrays.unattributed);
    if (!(error <= ROUNDING(1e-10) && closure <= ROUNDING(1e-12) && rest <= ROUNDING(1e-12)))
        fail_msg("%s; %s: entries differ by %.3g of the largest, closure %.3g, unattributed %.3g", network,
                 rule, error, closure, rest);
    *worst = fmax(*worst, error);
    *worst_closure = fmax(*worst_closure, closure);
    return r;
}

static void test_engine(void **state)
{
    (void)state;
    double worst = 0, worst_closure = 0;
    for (int n = 0; n < NETWORKS; n++)
        for (int o = 0; o < OPTIMIZERS; o++) {
            const int divides = optimizers[o][0] != 's';
            const int moments =
                o == 6 || (o >= BRUTE && o % 3 != 2 && divides && !strstr(optimizers[o], "centered") &&
                           !(optimizers[o][0] == 'r' && strstr(optimizers[o], "momentum")));
            const recipe how = {networks[n].network,
                                n % 2 ? "squared" : "softmax_cross_entropy",
                                optimizers[o],
                                networks[n].tokens,
                                divides                             ? 0.02
                                : strstr(optimizers[o], "maximize") ? 0.02
                                                                    : 0.15,
                                o % 3 == 1 ? 0.3 : 0,
                                7,
                                3,
                                6,
                                o % 3 == 2 ? 3 : 0,
                                (uint64_t)(20 * n + o),
                                moments};
            trained t;
            trained_make(&how, &t);
            if (how.clip > 0 && o < BRUTE) /* it does clip */
                assert_true(pk_run_gradient_scale(&t.run, 0) < 1);
            pk_decompose_options options;
            pk_decomposition engine;
            memset(&options, 0, sizeof options);
            result r = judge(&t, how.network, how.optimizer, &options, &engine, &worst, &worst_closure);
            if (n == 0 && o >= BRUTE) { /* bounds hold, and are not negative where gradients count negatively */
                pk_decomposition bounded;
                options.bounds = 1;
                const pk_status status =
                    pk_decompose(&t.context, &t.run, trained_test(&t, ROWS), &options, &bounded);
                if (strstr(how.optimizer, "centered")) {
                    assert_int_equal(status, PK_UNSUPPORTED);
                    assert_non_null(strstr(pk_message(&t.context), "rmsprop centered=1"));
                } else {
                    assert_ok(&t.context, status);
                    const double largest = fixture_largest(r.cells * r.examples, r.arrays.by_example);
                    for (size_t i = 0; i < r.cells * r.examples; i++) {
                        assert_true(bounded.bounds[i] >= 0 &&
                                    (sizeof(pk_real) < 8 || bounded.bounds[i] < 1e-5 * largest));
                        assert_true(fabs((double)bounded.by_example[i] - r.arrays.by_example[i]) <=
                                    bounded.bounds[i] + ROUNDING(2e-14) * largest);
                    }
                    pk_decomposition_release(&t.context, &bounded);
                }
            }
            /* Decay is told from the examples where there is some. */
            assert_int_equal(strstr(how.optimizer, "weight_decay") != NULL,
                             fixture_largest(r.cells, r.arrays.decay) > 0);
            free(r.memory);
            pk_decomposition_release(&t.context, &engine);
            trained_release(&t);
        }
    print_message("%d runs: entries differ by %.2g of the largest, closure %.2g\n", NETWORKS * OPTIMIZERS,
                  worst, worst_closure);
}

/* Losses with options, as they are trained with, recorded and read back. */
static void test_losses(void **state)
{
    (void)state;
    static const char *const losses[] = {
        "softmax_cross_entropy label_smoothing=0.1",
        "softmax_cross_entropy label_smoothing=0.2 ignore_index=-100 weight=0.5,2",
        "nll ignore_index=-7 weight=1.5,0.25",
        "logistic pos_weight=0.5,3",
        "huber delta=0.25",
        "huber beta=0.5",
        "l1",
        "kl_div",
        "kl_div log_target=1",
        "binary_cross_entropy",
    };
    double worst = 0, worst_closure = 0;
    for (size_t l = 0; l < sizeof losses / sizeof *losses; l++)
        for (int n = 0; n < NETWORKS; n++) {
            char network[200];
            const int probabilities = strncmp(losses[l], "bin", 3) == 0,
                      logarithms = losses[l][0] == 'n' || losses[l][0] == 'k';
            snprintf(network, sizeof network, "%s%s", networks[n].network,
                     probabilities ? "; sigmoid"
                     : logarithms  ? "; log_softmax"
                                   : "");
            const recipe how = {network,
                                losses[l],
                                l % 2 ? "sgd momentum=0.9" : "adamw epsilon=1e-4",
                                networks[n].tokens,
                                l % 2 ? 0.1 : 0.02,
                                0,
                                9,
                                5,
                                6,
                                l % 3 == 1 ? 3 : 0,
                                (uint64_t)(30 * n) + l,
                                0};
            trained t;
            trained_make(&how, &t);
            pk_decompose_options options;
            pk_decomposition engine;
            memset(&options, 0, sizeof options);
            result r = judge(&t, network, losses[l], &options, &engine, &worst, &worst_closure);
            /* Ignored examples contribute nothing. */
            for (size_t i = 0; i < r.cells * r.examples; i++)
                if (t.run.criterion.ignores && t.labels[i % r.examples] == t.run.criterion.ignore_index)
                    assert_true(engine.by_example[i] == 0);
            free(r.memory);
            pk_decomposition_release(&t.context, &engine);
            trained_release(&t);
        }
    print_message("entries differ by %.2g of the largest, closure %.2g\n", worst, worst_closure);
}

/* In extended precision: batches whose rows repeat, with weights and scales, and recorded moments. */
static void test_brute_force(void **state)
{
    (void)state;
    for (int o = 0; o < BRUTE; o++) {
        pk_context context;
        pk_run run;
        bf_run brute;
        bf_result truth;
        bf_recipe from = fixture_recipe(5 + (uint64_t)o, 6, 8, 4, optimizers[o][0] == 'a' ? 0.02 : 0.1);
        from.batch_weights = from.gradient_scales = 1;
        from.second_moments = o % 2;
        memset(&context, 0, sizeof context);
        fixture_make("input 3; dense 5; tanh; dense 4; sigmoid; dense 2", BF_SQUARED, optimizers[o], &from,
                     &brute);
        fixture_open(&context, &brute, &run);
        pk_real *x = fixture_normals(9, ROWS * 3, 1);
        bf_decompose(&brute, ROWS, x, &truth);
        result r = take(ROWS, &run);
        assert_ok(&context,
                  pk_decompose_reference(&context, &run, pk_matrix_view(x, ROWS, 3), 1, 20, &r.arrays));
        const double largest = fixture_largest_real(r.cells * r.examples, truth.by_example);
        double error = fixture_error(r.cells * r.examples, r.arrays.by_example, truth.by_example);
        error = fmax(error, fixture_error(r.cells, r.arrays.decay, truth.decay));
        error = fmax(error, fixture_error(r.cells, r.arrays.unattributed, truth.unattributed));
        error = fmax(error, fixture_error(r.cells, r.arrays.initial, truth.initial));
        error = fmax(error, fixture_error(r.cells, r.arrays.final, truth.final_output));
        if (!(error <= ROUNDING(1e-12) * largest))
            fail_msg("%s: %.3g of the largest", optimizers[o], error / largest);
        free(r.memory), free(x);
        bf_result_free(&truth);
        bf_run_free(&brute);
        pk_run_release(&context, &run);
    }
}

/* With kinks, equal pieces approach what the engine finds at once. */
static void test_kinks(void **state)
{
    (void)state;
    const recipe how = {
        "input 4; dense 9; relu; dense 2", "squared", "sgd momentum=0.5", 0, 0.3, 0, 7, 4, 5, 0, 3, 0};
    trained t;
    trained_make(&how, &t);
    double before = INFINITY;
    for (size_t pieces = 1; pieces <= 4096; pieces *= 64) {
        result r = take(ROWS, &t.run);
        assert_ok(&t.context,
                  pk_decompose_reference(&t.context, &t.run, trained_test(&t, ROWS), pieces, 1, &r.arrays));
        const double closure = fixture_largest(r.cells, r.arrays.closure);
        print_message("%zu pieces: closure %.2g\n", pieces, closure);
        assert_true(closure < before / 4);
        before = closure;
        free(r.memory);
    }
    trained_release(&t);
}

static int cancel(void *user, const char *phase, double fraction)
{
    (void)phase;
    *(double *)user = fraction;
    return fraction > 0.3;
}

static void test_refusals(void **state)
{
    (void)state;
    const recipe how = {"input 4; dense 3; tanh; dense 2", "squared", "adam", 0, 0.1, 0, 5, 5, 4, 0, 3, 0};
    trained t;
    trained_make(&how, &t);
    result r = take(ROWS, &t.run);
    pk_context *context = &t.context;
    pk_run closed;
    memset(&closed, 0, sizeof closed);
    pk_matrix x = trained_test(&t, ROWS);
    pk_reference part = r.arrays;
    part.decay = NULL;
    assert_refused(context, PK_ARGUMENT, "missing", pk_decompose_reference(context, NULL, x, 1, 2, &r.arrays));
    assert_refused(context, PK_ARGUMENT, "missing",
                   pk_decompose_reference(context, &closed, x, 1, 2, &r.arrays));
    assert_refused(context, PK_ARGUMENT, "missing", pk_decompose_reference(context, &t.run, x, 1, 2, NULL));
    assert_refused(context, PK_ARGUMENT, "missing", pk_decompose_reference(context, &t.run, x, 1, 2, &part));
    assert_refused(context, PK_ARGUMENT, "0 pieces",
                   pk_decompose_reference(context, &t.run, x, 0, 2, &r.arrays));
    assert_refused(context, PK_ARGUMENT, "0 nodes",
                   pk_decompose_reference(context, &t.run, x, 1, 0, &r.arrays));
    assert_refused(context, PK_ARGUMENT, "1001 nodes",
                   pk_decompose_reference(context, &t.run, x, 1, 1001, &r.arrays));
    x.cols = x.ld = 3;
    assert_refused(context, PK_SHAPE, "3 x 3", pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays));
    x = pk_matrix_view(NULL, ROWS, 4);
    assert_refused(context, PK_ARGUMENT, "NULL", pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays));
    x = trained_test(&t, ROWS);
    context->memory_limit = 2000;
    assert_refused(context, PK_MEMORY_LIMIT, "bytes",
                   pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays));
    context->memory_limit = 0;
    double reached = 0;
    context->progress = cancel;
    context->progress_user = &reached;
    assert_int_equal(pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays), PK_CANCELLED);
    assert_close(reached, 0.5, 0.01);
    context->progress = NULL;
    t.test[1] = (pk_real)NAN;
    assert_int_equal(pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays), PK_NOT_FINITE);
    /* No steps, no rows. */
    t.test[1] = 0;
    assert_ok(context, pk_decompose_reference(context, &t.run, pk_matrix_view(t.test, 0, 4), 1, 2, &r.arrays));
    assert_ok(context, pk_run_until(context, &t.run, 0));
    assert_ok(context, pk_decompose_reference(context, &t.run, x, 1, 2, &r.arrays));
    assert_true(fixture_largest(r.cells * r.examples, r.arrays.by_example) == 0);
    assert_memory_equal(r.arrays.initial, r.arrays.final, r.cells * sizeof(double));
    free(r.memory);
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine), cmocka_unit_test(test_losses),   cmocka_unit_test(test_brute_force),
        cmocka_unit_test(test_kinks),  cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
