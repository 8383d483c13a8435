/* The derivative of a training run by the weights of its examples, against retraining: the run's own steps with one weight, one learning
 * rate or the decay a little larger and a little smaller, by central differences at two distances, extrapolated. */
#include "trained.h"

enum { MOST = 12, TEST = 3 };

/* What is changed in a retraining. */
typedef struct change {
    size_t example; /* its weight in every batch, by the factor 1 + weight; SIZE_MAX: none */
    double weight;
    int renormalize; /* the weights of a batch keep their sum */
    size_t step;     /* whose learning rate is larger by `rate`; SIZE_MAX: none */
    double rate, decay;
    double clip; /* the largest norm; 0: gradients are not clipped */
} change;

/* One step of the run's rule: groups one by one, each range with a state of its own. */
static void step(const pk_run *run, size_t s, double rate, double decay, double clip, pk_real *w,
                 pk_real *gradient, pk_real **states)
{
    const size_t P = run->parameters;
    const pk_parameter_range all = {0, P, 0};
    const size_t ranges = run->groups.count ? run->groups.range_count : 1;
    pk_real *update = FIXTURE_NEW(pk_real, P);
    for (size_t r = 0; r < ranges; r++) {
        const pk_parameter_range range = run->groups.count ? run->groups.range[r] : all;
        if (range.group && run->groups.group[range.group - 1].frozen)
            memset(gradient + range.first, 0, range.count * sizeof *gradient);
    }
    const double scale = clip > 0 ? pk_clip_scale(gradient, P, clip) : 1;
    for (size_t r = 0; r < ranges; r++) {
        const pk_parameter_range range = run->groups.count ? run->groups.range[r] : all;
        const pk_parameter_group *group = range.group ? &run->groups.group[range.group - 1] : NULL;
        pk_optimizer optimizer = group ? group->optimizer : run->optimizer;
        if (group && group->frozen)
            continue;
        if (!states[r])
            states[r] = FIXTURE_NEW(pk_real, 4 * range.count);
        optimizer.weight_decay += decay;
        pk_optimizer_update(&optimizer, s, rate * (group ? group->rate : 1), scale, range.count,
                            w + range.first, gradient + range.first, states[r], update + range.first);
        for (size_t p = range.first; p < range.first + range.count; p++)
            w[p] += update[p];
    }
    free(update);
}

/* w (P) := the last weights of the run's training with a change. */
static void retrain(const trained *t, const change *how, pk_real *w)
{
    const pk_run *run = &t->run;
    pk_context context = {0};
    const size_t P = run->parameters;
    pk_real *gradient = FIXTURE_NEW(pk_real, P), *own = FIXTURE_NEW(pk_real, P), *states[64] = {NULL};
    assert_ok(&context, pk_run_weights(&context, run, 0, w));
    for (size_t s = 0; s < run->steps; s++) {
        pk_batch batch;
        double sum = 0, before = 0;
        pk_run_batch(run, s, &batch);
        memset(gradient, 0, P * sizeof *gradient);
        for (int pass = 0; pass < 2; pass++)
            for (size_t b = 0; b < batch.count; b++) {
                const double c = batch.weights ? batch.weights[b] : 1 / (double)batch.count;
                double factor = c * ((size_t)batch.items[b] == how->example ? 1 + how->weight : 1);
                if (!pass) {
                    before += c;
                    sum += factor;
                    continue;
                }
                factor *= how->renormalize ? before / sum : 1;
                const pk_batch item = {1, &batch.items[b], NULL};
                assert_ok(&context,
                          pk_loss_gradients_with(&context, &run->graph, &run->criterion, w, &run->train, &item,
                                                 NULL, pk_matrix_view(own, 1, P)));
                for (size_t p = 0; p < P; p++)
                    gradient[p] += (pk_real)(factor * own[p]);
            }
        step(run, s, run->learning_rates[s] + (s == how->step ? how->rate : 0), how->decay, how->clip, w,
             gradient, states);
    }
    for (size_t r = 0; r < 64; r++)
        free(states[r]);
    free(gradient), free(own);
}

/* The readouts of the test rows at weights. */
static void read_out(const trained *t, const pk_dataset *rows, const pk_influence_options *options,
                     const pk_real *w, double *h)
{
    const size_t C = t->run.outputs;
    pk_context context = {0};
    pk_real f[TEST * 8];
    int64_t items[TEST] = {0, 1, 2};
    const pk_batch all = {TEST, items, NULL};
    pk_real *gradients = FIXTURE_NEW(pk_real, TEST * t->run.parameters);
    assert_ok(&context,
              pk_graph_evaluate(&context, &t->run.graph, w,
                                pk_matrix_view((pk_real *)rows->inputs.data, TEST, t->run.graph.input_width),
                                pk_matrix_view(f, TEST, C)));
    if (options->readout == PK_READOUT_LOSS)
        assert_ok(&context, pk_loss_gradients_with(&context, &t->run.graph, &t->run.criterion, w, rows, &all, h,
                                                   pk_matrix_view(gradients, TEST, t->run.parameters)));
    for (size_t r = 0; r < TEST && options->readout != PK_READOUT_LOSS; r++) {
        const pk_real *row = f + r * C;
        double others = 0;
        int64_t label = (int64_t)options->output;
        if (options->readout == PK_READOUT_MARGIN)
            pk_array_integers(&rows->targets, r, 1, &label);
        for (size_t c = 0; c < C; c++)
            others += (int64_t)c == label ? 0 : exp((double)row[c]);
        h[r] = (double)row[label] - (options->readout == PK_READOUT_MARGIN ? log(others) : 0);
    }
    free(gradients);
}

/* The derivative of the readouts by the number at `place` of how. */
static void differences(const trained *t, const pk_dataset *rows, const pk_influence_options *options,
                        change how, size_t place, double distance, double *derivative)
{
    double h[4][TEST];
    pk_real *w = FIXTURE_NEW(pk_real, t->run.parameters);
    for (int k = 0; k < 4; k++) {
        const double at = distance * (k % 2 ? -1 : 1) * (k < 2 ? 1 : 2);
        change moved = how;
        memcpy((char *)&moved + place, &at, sizeof at);
        retrain(t, &moved, w);
        read_out(t, rows, options, w, h[k]);
    }
    for (size_t r = 0; r < TEST; r++)
        derivative[r] = (4 * (h[0][r] - h[1][r]) / (2 * distance) - (h[2][r] - h[3][r]) / (4 * distance)) / 3;
    free(w);
}

static const recipe recipes[] = {
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "sgd", 0, .3, 0, 8, 4, 12, 0, 1, 0},
    {"input 3; dense 5; gelu; dense 3", "softmax_cross_entropy", "sgd momentum=0.9 weight_decay=0.01", 0, .1, 0,
     8, 3, 12, 3, 2, 0},
    {"input 3; dense 5; tanh; dense 3", "squared", "sgd momentum=0.8 nesterov=1", 0, .05, 0, 8, 0, 9, 0, 3, 0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "sgd momentum=0.8 dampening=0.3 maximize=1", 0,
     .05, 0, 8, 3, 7, 0, 4, 0},
    {"input 3; dense 5; tanh; layer_norm; dense 3", "softmax_cross_entropy", "adam", 0, .05, 0, 8, 4, 12, 0, 5,
     0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "adamw weight_decay=0.1 beta2=0.9", 0, .05, .3,
     8, 3, 12, 4, 6, 0},
    {"input 3; dense 5; softplus; dense 3", "squared", "adam amsgrad=1 weight_decay=0.02 beta2=0.7", 0, .05, 0,
     8, 3, 12, 0, 72, 0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "rmsprop", 0, .01, 0, 8, 3, 12, 0, 8, 0},
    {"input 3; dense 5; tanh; dense 3", "squared", "rmsprop momentum=0.5 centered=1 weight_decay=0.05", 0, .01,
     .5, 8, 3, 12, 0, 9, 0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "adagrad lr_decay=0.1", 0, .1, 0, 8, 3, 12, 0,
     10, 0},
    {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "nadam weight_decay=0.1", 0, .02, 0, 8, 3, 12,
     0, 11, 0},
    {"input 4; dense 4 name=a; tanh; dense 4 tied=a transposed; tanh; dense 3", "softmax_cross_entropy",
     "adam maximize=1", 0, .02, 0, 8, 3, 8, 0, 12, 0},
    {"input 3; embedding 6 4; residual( attention 2 ); mean_tokens; tanh; dense 3", "softmax_cross_entropy",
     "adamw", 6, .05, 0, 6, 2, 9, 0, 13, 0},
};
enum { RECIPES = sizeof recipes / sizeof *recipes };

static double check(trained *t, double clip, const pk_influence_options *options)
{
    const size_t N = t->run.examples, S = t->run.steps, shape[2] = {TEST, t->run.graph.input_width};
    static double influence[TEST * MOST], by_step[TEST * MOST * 64], rates[TEST * 64], decay[TEST],
        readout[TEST];
    double wanted[TEST], worst = 0, largest = 0, h[TEST];
    pk_context *context = &t->context;
    pk_dataset rows = {pk_array_view(REAL_TYPE, 2, shape, t->test), t->run.train.targets};
    rows.targets.shape[0] = TEST;
    pk_influence out = {influence, by_step, rates, decay, readout, 0};
    assert_ok(context, pk_influences(context, &t->run, &rows, options, &out));
    pk_real *w = FIXTURE_NEW(pk_real, t->run.parameters);
    assert_ok(context, pk_run_weights(context, &t->run, S, w));
    read_out(t, &rows, options, w, h);
    free(w);
    for (size_t r = 0; r < TEST; r++)
        assert_close(readout[r], h[r], 1e-12 * (1 + fabs(h[r])));
    for (size_t i = 0; i < TEST * N; i++) {
        double sum = 0;
        for (size_t s = 0; s < S; s++)
            sum += by_step[i * S + s];
        assert_close(sum, influence[i], 1e-12 * (1 + fabs(influence[i])));
        largest = fmax(largest, fabs(influence[i]));
    }
    change how = {SIZE_MAX, 0, options->renormalize, SIZE_MAX, 0, 0, clip};
    for (size_t i = 0; i < N; i++) {
        how.example = i;
        differences(t, &rows, options, how, offsetof(change, weight), 2e-4, wanted);
        for (size_t r = 0; r < TEST; r++)
            worst = fmax(worst, fabs(wanted[r] - influence[r * N + i]) / largest);
    }
    how.example = SIZE_MAX;
    for (size_t s = 0; s < S; s += 3) {
        how.step = s;
        differences(t, &rows, options, how, offsetof(change, rate), 2e-4 * t->run.learning_rates[s], wanted);
        for (size_t r = 0; r < TEST; r++) {
            double most = 1e-3;
            for (size_t k = 0; k < S; k++)
                most = fmax(most, fabs(rates[r * S + k]));
            worst = fmax(worst, fabs(wanted[r] - rates[r * S + s]) / most);
        }
    }
    how.step = SIZE_MAX;
    differences(t, &rows, options, how, offsetof(change, decay), 1e-4, wanted);
    for (size_t r = 0; r < TEST; r++)
        worst = fmax(worst, fabs(wanted[r] - decay[r]) / fmax(1, fabs(decay[r])));
    return worst;
}

static void test_against_retraining(void **state)
{
    (void)state;
    if (sizeof(pk_real) == sizeof(float)) {
        print_message("left out in single precision: differences of retrained networks are rounding there\n");
        return;
    }
    int failed = 0;
    for (int k = 0; k < RECIPES; k++) {
        trained t;
        const pk_influence_readout readouts[3] = {PK_READOUT_OUTPUT, PK_READOUT_MARGIN, PK_READOUT_LOSS};
        const int classes = strcmp(recipes[k].loss, "squared") != 0;
        const pk_influence_options options = {.readout = classes ? readouts[k % 3] : readouts[k % 2 * 2],
                                              .output = 1,
                                              .renormalize = k / 2 % 2,
                                              .by_step = 1,
                                              .hyperparameters = 1};
        trained_make(&recipes[k], &t);
        const double worst = check(&t, recipes[k].clip, &options);
        print_message("%-50s %.1e\n", recipes[k].optimizer, worst);
        failed += !(worst < 1e-7);
        trained_release(&t);
    }
    assert_int_equal(failed, 0);
}

/* Parameter groups with rates, decay and a frozen tensor. */
static void test_groups(void **state)
{
    static const char *const lines[] = {"0 rate=0.5 weight_decay=0.1", "2 frozen", "5 rate=2"};
    static const char *const optimizers[] = {"sgd momentum=0.9", "adamw", "rmsprop momentum=0.8 maximize=1",
                                             "adagrad"};
    (void)state;
    for (int o = 0; o < 4 && sizeof(pk_real) > sizeof(float); o++) {
        trained t;
        const trained_more grouped = {.groups = lines, .group_count = 3};
        const recipe how = {"input 3; dense 5; tanh; dense 4; tanh; dense 3",
                            "softmax_cross_entropy",
                            optimizers[o],
                            0,
                            .02,
                            o % 2 ? .4 : 0,
                            8,
                            3,
                            10,
                            0,
                            20,
                            0};
        const pk_influence_options options = {
            .readout = PK_READOUT_MARGIN, .renormalize = o % 2, .by_step = 1, .hyperparameters = 1};
        trained_make_with(&how, &grouped, &t);
        const double worst = check(&t, how.clip, &options);
        print_message("groups, %-43s %.1e\n", optimizers[o], worst);
        assert_true(worst < 1e-7);
        trained_release(&t);
    }
}

/* With little memory states are computed again; the bits stay. */
static void test_memory(void **state)
{
    const recipe how = {
        "input 3; dense 20; tanh; dense 3", "softmax_cross_entropy", "adam", 0, .02, 0, 8, 4, 40, 5, 30, 0};
    static double all[TEST * MOST], few[TEST * MOST];
    const pk_influence_options options = {.readout = PK_READOUT_OUTPUT};
    trained t;
    (void)state;
    trained_make(&how, &t);
    const size_t shape[2] = {TEST, 3};
    const pk_dataset rows = {.inputs = pk_array_view(REAL_TYPE, 2, shape, t.test)};
    pk_influence out = {.influence = all};
    pk_context *context = &t.context;
    context->threads = 1;
    assert_ok(context, pk_influences(context, &t.run, &rows, &options, &out));
    const size_t held = context->memory_used;
    out.influence = few;
    context->threads = 2;
    context->memory_limit = held + 250000;
    context->memory_peak = 0;
    assert_ok(context, pk_influences(context, &t.run, &rows, &options, &out));
    assert_true(context->memory_peak <= context->memory_limit);
    assert_memory_equal(all, few, sizeof all);
    assert_int_equal(context->memory_used, held);
    context->memory_limit = held + 1000;
    assert_refused(context, PK_MEMORY_LIMIT, "influence",
                   pk_influences(context, &t.run, &rows, &options, &out));
    context->memory_limit = 0;
    trained_release(&t);
}

static void test_refused(void **state)
{
    static const int64_t labels[TEST] = {0, 1, 3};
    const recipe how = {
        "input 3; dense 4; tanh; dense 3", "softmax_cross_entropy", "sgd", 0, .1, 0, 8, 4, 3, 0, 31, 0};
    double influence[TEST * MOST];
    trained t;
    (void)state;
    trained_make(&how, &t);
    pk_context *context = &t.context;
    const size_t shape[2] = {TEST, 3}, wide[2] = {TEST, 4};
    pk_dataset rows = {pk_array_view(REAL_TYPE, 2, shape, t.test), pk_array_view(PK_INT64, 1, shape, labels)};
    pk_influence out = {.influence = influence};
    pk_influence_options options = {.readout = PK_READOUT_OUTPUT, .output = 3};
    assert_refused(context, PK_ARGUMENT, "outputs 0 to 2",
                   pk_influences(context, &t.run, &rows, &options, &out));
    options.readout = PK_READOUT_MARGIN;
    assert_refused(context, PK_ARGUMENT, "row 2 is 3", pk_influences(context, &t.run, &rows, &options, &out));
    options.by_step = 1;
    assert_refused(context, PK_ARGUMENT, "missing", pk_influences(context, &t.run, &rows, &options, &out));
    options.by_step = 0;
    rows.inputs = pk_array_view(REAL_TYPE, 2, wide, t.test);
    assert_refused(context, PK_SHAPE, "influence", pk_influences(context, &t.run, &rows, &options, &out));
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_against_retraining, fixture_enter, fixture_leave),
        cmocka_unit_test_setup_teardown(test_groups, fixture_enter, fixture_leave),
        cmocka_unit_test_setup_teardown(test_memory, fixture_enter, fixture_leave),
        cmocka_unit_test_setup_teardown(test_refused, fixture_enter, fixture_leave),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
