/* How attributions move with the input: against differences of the decomposition, by example, step and layer; its closure, with
 * kinks and without, under every optimizer; refusals. */
#include "trained.h"

enum { N = 6 };

/* network, loss, optimizer, tokens, rate, clip, rows, batch, steps, keep_every, seed, moments */
static const recipe smooth[] = {
    {"input 3; dense 5; tanh; dense 4; gelu; dense 2", "squared", "sgd", 0, 0.2, 0, N, 4, 7, 0, 3, 0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "sgd momentum=0.9 weight_decay=0.05", 0, 0.1,
     0.4, N, 4, 7, 0, 4, 0},
    {"input 3; dense 5; softplus; dense 2", "squared", "adam weight_decay=0.01", 0, 0.02, 0, N, 4, 7, 3, 5, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "adamw weight_decay=0.1", 0, 0.02, 0, N, 4, 7, 0, 6, 1},
    {"input 2x4; dense 3; layer_norm; attention 1; flatten; dense 2", "squared", "sgd momentum=0.5 nesterov=1",
     0, 0.1, 0, N, N, 5, 0, 7, 0},
    {"input 1x3x3; conv 2 2x2; tanh; avg_pool 2x2; flatten; residual( dense 2; erf ); dense 2", "squared",
     "sgd", 0, 0.1, 0, N, 4, 5, 0, 8, 0},
    {"input 4; dense 4 name=a; tanh; dense 4 tied=a transposed; tanh; dense 2", "squared", "sgd", 0, 0.2, 0, N,
     4, 5, 0, 9, 0},
    {"input 3; fourier 3 scale=0.3 seed=2; dense 4; tanh; dense 2", "squared", "sgd", 0, 0.2, 0, N, 4, 5, 0, 10,
     0},
    {"input 3; dense 5; tanh; dense 2", "squared", "sgd momentum=0.8 weight_decay=0.05 maximize=1", 0, 0.05, 0,
     N, 4, 6, 0, 11, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "rmsprop alpha=0.8 momentum=0.7 weight_decay=0.1", 0, 0.02,
     0, N, 4, 7, 0, 12, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "rmsprop momentum=0.7 centered=1 maximize=1", 0, 0.01, 0, N,
     N, 5, 0, 13, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "nadam weight_decay=0.1 decoupled_weight_decay=1", 0, 0.02,
     0, N, 4, 7, 0, 14, 1},
    {"input 3; dense 5; tanh; dense 2", "squared", "adam beta2=0.5 amsgrad=1 maximize=1", 0, 0.05, 0, N, 2, 9,
     0, 15, 0},
    {"input 3; dense 5; tanh; dense 2", "squared", "adagrad lr_decay=0.1 weight_decay=0.05", 0, 0.1, 0, N, 4, 7,
     0, 16, 1},
    {"input 3; dense 5; tanh; dense 3",
     "softmax_cross_entropy label_smoothing=0.2 weight=1,2,0.5 ignore_index=0", "adam", 0, 0.05, 0, N, N, 7, 0,
     17, 0},
    {"input 3; dense 5; tanh; dense 2", "huber delta=0.3", "sgd momentum=0.5", 0, 0.3, 0, N, 4, 7, 0, 18, 0},
};
static const recipe kinked[] = {
    {"input 3; dense 6; relu; dense 2", "squared", "sgd", 0, 0.4, 0, N, 4, 12, 0, 23, 0},
    {"input 3; dense 8; relu; dense 6; relu; dense 5; relu; dense 2", "squared", "sgd", 0, 0.5, 0, N, 4, 16, 0,
     34, 0},
    {"input 3; dense 8; leaky_relu 0.2; dense 6; abs; dense 2", "squared", "adam", 0, 0.1, 0, N, 4, 10, 0, 25,
     0},
    {"input 3; dense 8; tanh; dense 6; relu; dense 2", "squared", "sgd momentum=0.5", 0, 0.6, 0, N, 4, 14, 0,
     41, 0},
    {"input 1x4x4; conv 3 3x3; relu; max_pool 2x2; flatten; dense 2", "squared", "sgd", 0, 0.4, 0, N, 4, 12, 0,
     27, 0},
    {"input 3; dense 8; hard_tanh; residual( dense 8; relu ); dense 2", "squared", "adamw", 0, 0.1, 0, N, 4, 10,
     0, 28, 0},
    {"input 4; dense 4 name=a; relu; dense 4 tied=a transposed; relu; dense 2", "squared", "sgd", 0, 0.3, 0, N,
     4, 8, 0, 29, 0},
};
enum { SMOOTH = (int)(sizeof smooth / sizeof *smooth), KINKED = (int)(sizeof kinked / sizeof *kinked) };

static pk_sensitivity_options everything(size_t output)
{
    pk_sensitivity_options options;
    memset(&options, 0, sizeof options);
    options.output = output;
    options.by_step = options.by_layer = 1;
    return options;
}

/* The sums that S and its parts must be. */
static void check_sums(const pk_sensitivity *s)
{
    const size_t cells = s->examples * s->inputs;
    for (size_t i = 0; i < cells; i++) {
        double steps = 0, layers = 0;
        for (size_t k = 0; k < s->steps; k++)
            steps += s->by_step[k * cells + i];
        for (size_t k = 0; k < s->layers; k++)
            layers += s->by_layer[k * cells + i];
        assert_close(steps, s->by_example[i], ROUNDING(1e-13) * s->scale);
        assert_close(layers, s->by_example[i], ROUNDING(1e-13) * s->scale);
    }
    for (size_t d = 0; d < s->inputs; d++) {
        double sum = s->decay[d] + s->unattributed[d] + s->closure[d];
        for (size_t i = 0; i < s->examples; i++)
            sum += s->by_example[i * s->inputs + d];
        assert_close(sum, s->final[d] - s->initial[d], ROUNDING(1e-13) * s->scale);
    }
}

/* The largest difference of S, its steps, layers and decay from central differences of the decomposition, as a part of the
 * largest number of S. wide: fourth order, with wide steps; else of second order, with small ones, beside kinks. */
static double apart_from_differences(trained *t, const pk_sensitivity *s, size_t output, int wide)
{
    static const double at[4] = {1, 0.5, -0.5, -1}, by[4] = {-1.0 / 6, 8.0 / 6, -8.0 / 6, 1.0 / 6};
    const double step = wide ? EITHER(0x1p-8, 0x1p-3) : EITHER(0x1p-20, 0x1p-9);
    const size_t D = s->inputs, C = t->run.outputs, L = s->layers, S = s->steps;
    double worst = 0;
    for (size_t d = 0; d < D; d++) {
        double *slope = FIXTURE_NEW(double, N *(1 + S + L) + 1);
        pk_real *rows = FIXTURE_NEW(pk_real, 4 * D);
        pk_decompose_options options;
        pk_decomposition out;
        memset(&options, 0, sizeof options);
        options.keep[0] = PK_BY_EXAMPLE;
        options.keep[1] = PK_BY_EXAMPLE | PK_BY_STEP;
        options.keep[2] = PK_BY_EXAMPLE | PK_BY_LAYER;
        options.tolerance = EITHER(1e-13, 1e-4);
        for (int k = 0; k < 4; k++) {
            memcpy(rows + (size_t)k * D, t->test, D * sizeof *rows);
            rows[(size_t)k * D + d] += (pk_real)(step * at[k]);
        }
        pk_status status = pk_decompose(&t->context, &t->run, pk_matrix_view(rows, 4, D), &options, &out);
        if (status != PK_NOT_CLOSED)
            assert_ok(&t->context, status);
        for (size_t k = 0; k < 4; k++) {
            const size_t cell = k * C + output;
            for (size_t i = 0; i < N * (1 + S + L); i++)
                slope[i] += by[k] / step *
                            (i < N             ? out.by_example[cell * N + i]
                             : i < N * (1 + S) ? out.kept[1].data[cell * N * S + i - N]
                                               : out.kept[2].data[cell * N * L + i - N * (1 + S)]);
            slope[N * (1 + S + L)] += by[k] / step * out.decay[cell];
        }
        for (size_t i = 0; i < N; i++) {
            worst = fmax(worst, fabs(slope[i] - s->by_example[i * D + d]));
            for (size_t k = 0; k < S; k++)
                worst = fmax(worst, fabs(slope[N + i * S + k] - s->by_step[(k * N + i) * D + d]));
            for (size_t k = 0; k < L; k++)
                worst = fmax(worst, fabs(slope[N * (1 + S) + i * L + k] - s->by_layer[(k * N + i) * D + d]));
        }
        worst = fmax(worst, fabs(slope[N * (1 + S + L)] - s->decay[d]));
        pk_decomposition_release(&t->context, &out);
        free(slope), free(rows);
    }
    return worst / s->scale;
}

static void test_smooth(void **state)
{
    (void)state;
    double closure = 0, apart = 0;
    for (int r = 0; r < SMOOTH; r++)
        for (size_t output = 0; output < 2; output++) {
            trained t;
            pk_sensitivity s;
            trained_make(&smooth[r], &t);
            const pk_sensitivity_options options = everything(output);
            assert_ok(&t.context, pk_sensitivity_at(&t.context, &t.run, trained_test(&t, 1), &options, &s));
            check_sums(&s);
            closure = fmax(closure, s.worst_closure);
            const double here = apart_from_differences(&t, &s, output, 1);
            if (!(here <= EITHER(1e-7, 3e-2)))
                fail_msg("%s: %.3g apart from differences", smooth[r].network, here);
            apart = fmax(apart, here);
            assert_true(s.kinks == 0 && s.unresolved == 0 && s.refused == 0 && s.scale > 0.01);
            assert_true(fixture_largest(s.inputs, s.unattributed) <= EITHER(1e-12, 1e-3) * s.scale);
            pk_sensitivity_release(&t.context, &s);
            trained_release(&t);
        }
    print_message("smooth: closure %.2g, differences %.2g\n", closure, apart);
    assert_true(closure <= EITHER(1e-11, 1e-3));
}

static void test_kinks(void **state)
{
    (void)state;
    double closure = 0, apart = 0;
    size_t kinks = 0;
    for (int r = 0; r < KINKED; r++)
        for (size_t output = 0; output < 2; output++) {
            trained t;
            pk_sensitivity s;
            trained_make(&kinked[r], &t);
            const pk_sensitivity_options options = everything(output);
            assert_ok(&t.context, pk_sensitivity_at(&t.context, &t.run, trained_test(&t, 1), &options, &s));
            check_sums(&s);
            closure = fmax(closure, s.worst_closure);
            const double here = apart_from_differences(&t, &s, output, 0);
            print_message("%s: %zu kinks, %zu unresolved, closure %.2g, differences %.2g\n", kinked[r].network,
                          s.kinks, s.unresolved, s.worst_closure, here);
            apart = fmax(apart, here);
            kinks += s.kinks;
            assert_true(s.unresolved == 0 && s.kinks > 0 && s.scale > 0.01);
            pk_sensitivity_release(&t.context, &s);
            trained_release(&t);
        }
    print_message("kinks: %zu, closure %.2g, differences %.2g\n", kinks, closure, apart);
    assert_true(kinks > 20 && closure <= EITHER(1e-11, 5e-3) && apart <= EITHER(1e-5, 2e-1));
}

/* Groups with rates, decay and momenta of their own, and frozen tensors. */
static void test_groups(void **state)
{
    (void)state;
    static const double rates[2] = {0.2, 0.05};
    for (int o = 0; o < TRAINED_GROUPED; o++) {
        trained t;
        pk_sensitivity s;
        const pk_sensitivity_options options = everything(1);
        const char *optimizer = trained_make_grouped(o, N, rates, &t);
        assert_ok(&t.context, pk_sensitivity_at(&t.context, &t.run, trained_test(&t, 1), &options, &s));
        check_sums(&s);
        assert_true(s.worst_closure <= EITHER(1e-11, 5e-3));
        assert_true(fixture_largest(s.inputs, s.unattributed) <= EITHER(1e-12, 1e-3) * s.scale);
        const double here = apart_from_differences(&t, &s, 1, 0);
        if (!(here <= EITHER(1e-5, 2e-1)))
            fail_msg("%s: %.3g apart from differences", optimizer, here);
        pk_sensitivity_release(&t.context, &s);
        trained_release(&t);
    }
}

/* Recorded in float32, and under another name: what the declared training does not explain is told apart. */
static void test_unattributed(void **state)
{
    (void)state;
    pk_context context;
    bf_run brute;
    pk_run run;
    pk_sensitivity s;
    const bf_recipe how = fixture_recipe(3, N, 8, 4, 0.1);
    memset(&context, 0, sizeof context);
    fixture_make("input 3; dense 4; relu; dense 3; tanh; dense 2", BF_SQUARED, "sgd momentum=0.9", &how,
                 &brute);
    for (size_t i = 0; i < (brute.steps + 1) * brute.parameters; i++)
        brute.weights[i] = (pk_real)(float)brute.weights[i];
    fixture_open(&context, &brute, &run);
    pk_real *x = fixture_normals(5, 3, 1);
    const pk_sensitivity_options options = everything(0);
    for (int wrong = 0; wrong < 2; wrong++) {
        if (wrong)
            run.optimizer.momentum = 0.5;
        assert_ok(&context, pk_sensitivity_at(&context, &run, pk_matrix_view(x, 1, 3), &options, &s));
        check_sums(&s);
        const double left = fixture_largest(3, s.unattributed) / s.scale;
        assert_true(s.worst_closure <= EITHER(1e-11, 5e-3));
        assert_true(wrong ? left > 1e-2 : left > 1e-10 && left < 1e-4);
        pk_sensitivity_release(&context, &s);
    }
    free(x);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    bf_run_free(&brute);
}

/* Two units that are copies of each other change sign at one place: their jumps are one, and it is resolved. */
static void test_copies(void **state)
{
    (void)state;
    pk_context context;
    bf_run brute;
    pk_run run;
    pk_sensitivity s;
    const bf_recipe how = fixture_recipe(5, N, 12, N, 0.5);
    memset(&context, 0, sizeof context);
    fixture_make("input 2; dense 4; relu; dense 1", BF_SQUARED, "sgd", &how, &brute);
    /* Unit 1 is unit 0 at every step, so each is half of one unit. */
    for (size_t k = 0; k <= brute.steps; k++) {
        pk_real *w = brute.weights + k * brute.parameters;
        w[2] = w[0], w[3] = w[1], w[9] = w[8], w[13] = w[12];
    }
    fixture_open(&context, &brute, &run);
    const pk_sensitivity_options options = everything(0);
    size_t kinks = 0;
    for (uint64_t seed = 1; seed < 30; seed++) {
        pk_real *x = fixture_normals(seed, 2, 1);
        assert_ok(&context, pk_sensitivity_at(&context, &run, pk_matrix_view(x, 1, 2), &options, &s));
        assert_true(s.worst_closure <= EITHER(1e-11, 1e-3) && s.unresolved == 0);
        kinks += s.kinks;
        pk_sensitivity_release(&context, &s);
        free(x);
    }
    assert_true(kinks > 0);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
    bf_run_free(&brute);
}

static int stop(void *user, const char *phase, double fraction)
{
    assert_true(strcmp(phase, "sensitivity") == 0 && fraction >= 0 && fraction <= 1);
    return ++*(int *)user > 3;
}

static void test_behaviour(void **state)
{
    (void)state;
    trained t;
    pk_sensitivity one, two;
    const recipe tokens = {
        "input 3; embedding 6 4; flatten; dense 2", "squared", "sgd", 6, 0.1, 0, N, 4, 4, 0, 8, 0};
    const recipe sign = {"input 3; dense 4; sign; dense 2", "squared", "sgd", 0, 0.1, 0, N, 4, 4, 0, 5, 0};
    pk_sensitivity_options options = everything(0);
    trained_make(&tokens, &t);
    assert_refused(&t.context, PK_UNSUPPORTED, "takes whole numbers",
                   pk_sensitivity_at(&t.context, &t.run, trained_test(&t, 1), &options, &one));
    assert_null(one.by_example);
    trained_release(&t);
    trained_make(&sign, &t);
    assert_refused(&t.context, PK_UNSUPPORTED, "surrogate",
                   pk_sensitivity_at(&t.context, &t.run, trained_test(&t, 1), &options, &one));
    trained_release(&t);
    trained_make(&kinked[1], &t);
    pk_context *context = &t.context;
    context->threads = 1;
    assert_ok(context, pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one));
    context->threads = 3;
    options.by_step = options.by_layer = 0;
    assert_ok(context, pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &two));
    assert_true(!two.by_step && !two.by_layer);
    for (size_t i = 0; i < N * 3; i++)
        assert_close(one.by_example[i], two.by_example[i], ROUNDING(1e-14) * one.scale);
    assert_memory_equal(one.final, two.final, 3 * sizeof(double));
    pk_sensitivity_release(context, &one);
    pk_sensitivity_release(context, &two);
    options.output = 2;
    assert_refused(context, PK_ARGUMENT, "output 2 of a network with 2",
                   pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one));
    options.output = 0;
    assert_refused(context, PK_SHAPE, "sensitivity: the inputs are 2 x 3",
                   pk_sensitivity_at(context, &t.run, trained_test(&t, 2), &options, &one));
    assert_refused(context, PK_ARGUMENT, "the run, the options",
                   pk_sensitivity_at(context, NULL, trained_test(&t, 1), &options, &one));
    assert_refused(context, PK_ARGUMENT, "the run, the options",
                   pk_sensitivity_at(context, &t.run, trained_test(&t, 1), NULL, &one));
    options.tolerance = -1;
    assert_refused(context, PK_ARGUMENT, "tolerance is -1",
                   pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one));
    options.tolerance = 1e-30;
    pk_status status = pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one);
    assert_refused(context, PK_NOT_CLOSED, "miss that of the output", status);
    assert_non_null(one.by_example);
    pk_sensitivity_release(context, &one);
    options.tolerance = 0;
    int calls = 0;
    context->progress = stop;
    context->progress_user = &calls;
    assert_int_equal(pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one), PK_CANCELLED);
    assert_null(one.by_example);
    context->progress = NULL;
    context->memory_limit = context->memory_used + 2000;
    assert_refused(context, PK_MEMORY_LIMIT, "sensitivity",
                   pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &options, &one));
    context->memory_limit = 0;
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_smooth), cmocka_unit_test(test_kinks),        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_groups), cmocka_unit_test(test_unattributed), cmocka_unit_test(test_behaviour),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
