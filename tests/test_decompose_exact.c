/* Decompositions against brute force in long double: every activation, loss, optimizer and engine. The last
 * line of the output gives the worst closure and the worst entry error over everything in this file. */
#include "fixture.h"

static double worst_closure, worst_entry, worst_engines[2]; /* adaptive, exact */
static size_t decompositions;

enum { ROWS = 3 };

typedef struct subject {
    const char *network;
    bf_loss loss;
    const char *optimizer;
    bf_recipe recipe;
} subject;

/* Decomposes with each engine; all agree with the truth and with each other. */
static void check_run(const bf_run *truth_run, const char *name, const pk_real *inputs)
{
    pk_context context;
    pk_run run;
    bf_result truth;
    memset(&context, 0, sizeof context);
    fixture_open(&context, truth_run, &run);
    bf_decompose(truth_run, ROWS, inputs, &truth);
    if (!((double)truth.quadrature_error < 1e-16))
        fail_msg("%s: the oracle has not settled (%g)", name, (double)truth.quadrature_error);
    const size_t entries = ROWS * truth.outputs * truth.examples;
    double *first = NULL;
    for (int way = 0; way < 5; way++) {
        pk_decompose_options options;
        pk_decomposition got;
        memset(&options, 0, sizeof options);
        options.unattributed = (double)INFINITY; /* some of the runs were tampered with */
        context.threads = 1;                     /* test_determinism.c has the threads */
        options.keep[0] = PK_BY_EXAMPLE;
        options.keep[1] = PK_BY_STEP;
        options.keep[2] = PK_BY_LAYER;
        options.engine = way == 1 ? PK_ENGINE_FACTORED : way == 2 ? PK_ENGINE_INTEGRATED : PK_ENGINE_AUTO;
        options.reverse_time = way == 3;
        if (way == 4)
            options.engine = PK_ENGINE_HEAD;
        pk_status status = pk_decompose(
            &context, &run, pk_matrix_view((pk_real *)inputs, ROWS, truth_run->network.inputs), &options, &got);
        if (status)
            fail_msg("%s, way %d: %s: %s", name, way, pk_status_text(status), pk_message(&context));
        double entry = fixture_entry_error(&got, &truth);
        if (!(entry <= ROUNDING(1e-10)) || !(got.worst_closure <= ROUNDING(1e-12)))
            fail_msg("%s, way %d: entry error %.3g, closure %.3g (%zu points, %zu refused)", name, way, entry,
                     got.worst_closure, got.points, got.refused);
        worst_entry = fmax(worst_entry, entry);
        worst_closure = fmax(worst_closure, got.worst_closure);
        decompositions++;
        if (way == 0) {
            first = FIXTURE_NEW(double, entries);
            memcpy(first, got.by_example, entries * sizeof *first);
        } else {
            /* Adaptive rules start at the order that the step before needed, and reverse time has another before. */
            const int exact = run.graph.degree >= 0;
            double scale = fixture_largest(entries, first),
                   apart = fixture_apart(entries, first, got.by_example);
            if (!(apart <= ROUNDING(exact || way != 3 ? 1e-13 : 1e-11) * scale))
                fail_msg("%s: way %d differs from auto by %.3g of %.3g", name, way, apart, scale);
            if (scale > 0)
                worst_engines[exact] = fmax(worst_engines[exact], apart / scale);
        }
        pk_decomposition_release(&context, &got);
    }
    free(first);
    bf_result_free(&truth);
    pk_run_release(&context, &run);
    assert_int_equal(context.memory_used, 0);
}

static void check(const subject *s)
{
    bf_run run;
    char name[300];
    fixture_make(s->network, s->loss, s->optimizer, &s->recipe, &run);
    /* What was recorded counts, not what the gradients would give: the difference is unattributed. */
    for (size_t i = 0; run.second_moments && i < run.steps * run.parameters; i++)
        run.second_moments[i] *= 1 + 0.5 * (double)(i % 3);
    snprintf(name, sizeof name, "%.120s | %s | %.80s | seed %lu", s->network, bf_loss_name(s->loss),
             s->optimizer, (unsigned long)s->recipe.seed);
    pk_real *inputs = fixture_normals(s->recipe.seed + 99, ROWS * run.network.inputs, 1);
    memcpy(inputs, run.inputs, run.network.inputs * sizeof *inputs); /* one training example among them */
    check_run(&run, name, inputs);
    free(inputs);
    bf_run_free(&run);
}

static const char *const activations[] = {
    "identity", "relu",  "leaky_relu 0.1", "tanh",         "sigmoid",  "softplus 2",  "gelu",
    "silu",     "erf",   "hard_tanh",      "abs",          "elu",      "elu 0.5",     "selu",
    "mish",     "relu6", "hardswish",      "hard_sigmoid", "softsign", "log_sigmoid", "gelu tanh"};
enum { ACTIVATIONS = sizeof activations / sizeof *activations };

/* Every activation with three losses: full batches, mini-batches with repeated rows, batch weights. */
static void test_activations(void **state)
{
    (void)state;
    for (int a = 0; a < ACTIVATIONS; a++)
        for (int v = 0; v < 3; v++) {
            static const bf_loss losses[3] = {BF_SOFTMAX_CROSS_ENTROPY, BF_MEAN_SQUARED, BF_LOGISTIC};
            char network[200];
            snprintf(network, sizeof network, "input 3; dense 5; %s; dense 4%s; %s; dense 2", activations[a],
                     v == 2 ? " nobias" : "", activations[a]);
            subject s = {network, losses[v], "sgd",
                         fixture_recipe((uint64_t)(10 * a + v), 6, 5, v ? 5 : 0, 0.5)};
            s.recipe.batch_weights = v == 2;
            check(&s);
        }
}

static void test_losses(void **state)
{
    (void)state;
    for (int loss = 0; loss < BF_LOSSES; loss++)
        for (int v = 0; v < 2; v++) {
            subject s = {v ? "input 3; dense 5; relu; dense 3" : "input 2; dense 4; tanh; dense 3",
                         (bf_loss)loss, "sgd", fixture_recipe((uint64_t)(200 + 2 * loss + v), 7, 6, 4, 0.4)};
            check(&s);
            if (loss == BF_SOFTMAX_CROSS_ENTROPY || loss == BF_NLL)
                continue;
            s.network =
                v ? "input 3; dense 5; relu; dense 1" : "input 2; dense 4; tanh; dense 1"; /* one output */
            check(&s);
        }
}

static const char *const optimizers[] = {"sgd weight_decay=0.1",
                                         "sgd momentum=0.9",
                                         "sgd momentum=0.8 dampening=0.3 weight_decay=0.05",
                                         "sgd momentum=0.9 nesterov=1",
                                         "sgd momentum=0.9 nesterov=1 weight_decay=0.02",
                                         "adam",
                                         "adam beta1=0.8 beta2=0.95 weight_decay=0.1",
                                         "adam beta1=0 beta2=0.9 epsilon=1e-3",
                                         "adamw",
                                         "adamw beta1=0.9 beta2=0.98 weight_decay=0.3"};

static void test_optimizers(void **state)
{
    (void)state;
    for (size_t o = 0; o < sizeof optimizers / sizeof *optimizers; o++)
        for (int v = 0; v < 3; v++) {
            static const char *const networks[3] = {"input 3; dense 5; tanh; dense 4; tanh; dense 2",
                                                    "input 3; dense 5; relu; dense 4 nobias; relu; dense 2",
                                                    "input 2; dense 3; silu; dense 1"};
            subject s = {networks[v], v == 2 ? BF_SQUARED : BF_SOFTMAX_CROSS_ENTROPY, optimizers[o],
                         fixture_recipe((uint64_t)(300 + 3 * o + (size_t)v), 6, 7, v == 1 ? 0 : 4,
                                        strstr(optimizers[o], "adam") ? 0.05 : 0.2)};
            s.recipe.gradient_scales = v == 0;
            s.recipe.batch_weights = v == 2;
            s.recipe.second_moments = v == 1;
            check(&s);
        }
}

/* One to five weight layers, mixed smooth and kinked parts, layers without bias, narrow necks. */
static void test_shapes(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 3; dense 2",
        "input 3; dense 2 nobias",
        "input 1; dense 1; relu; dense 1",
        "input 3; dense 4; dense 3; dense 2",
        "input 3; dense 4; tanh; dense 4; relu; dense 2",
        "input 3; dense 4; relu; dense 4; tanh; dense 2",
        "input 3; dense 4; relu; dense 3; sigmoid; dense 3; hard_tanh; dense 2",
        "input 2; dense 4; abs; dense 3; relu; dense 3; leaky_relu 0.3; dense 1",
        "input 2; dense 3 nobias; relu; dense 3 nobias; relu; dense 3 nobias; relu; dense 2 nobias",
        "input 2; dense 3; relu; dense 3; relu; dense 3; relu; dense 3; relu; dense 1",
        "input 3; dense 1; tanh; dense 5; relu; dense 2",
        "input 3; dense 4; relu; dense 2; tanh", /* ends with an activation */
        "input 3; dense 4; tanh; dense 2; relu",
    };
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++) {
        subject s = {networks[n], BF_SQUARED, "sgd", fixture_recipe(400 + n, 6, 5, 4, 0.1)};
        check(&s);
        s.optimizer = "adamw weight_decay=0.1";
        s.recipe.learning_rate = 0.05;
        s.recipe.seed += 50;
        check(&s);
    }
}

/* Steps that throw the weights far. */
static void test_huge_steps(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 3; dense 5; relu; dense 4; relu; dense 3",
        "input 3; dense 5; leaky_relu 0.2; dense 4; abs; dense 3",
        "input 2; dense 4; hard_tanh; dense 4; hard_tanh; dense 2",
        "input 3; dense 4; relu; dense 3; relu; dense 3; relu; dense 2",
        "input 3; dense 4; tanh; dense 2",
        "input 3; dense 4; gelu; dense 2",
        "input 3; dense 4; tanh; dense 3; relu; dense 2",
    };
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++) {
        subject s = {networks[n], BF_SOFTMAX_CROSS_ENTROPY, "sgd", fixture_recipe(500 + n, 6, 4, 0, 10)};
        check(&s);
    }
}

/* Batches beyond one block of examples, in parallel lanes, and more test rows than a block holds. */
static void test_many_examples(void **state)
{
    (void)state;
    subject s = {"input 2; dense 3; relu; dense 2", BF_SOFTMAX_CROSS_ENTROPY, "sgd",
                 fixture_recipe(600, 600, 2, 0, 0.5)};
    check(&s);
    s.optimizer = "sgd momentum=0.9";
    check(&s);
    s.recipe = fixture_recipe(601, 300, 3, 600, 0.5); /* many repeats */
    check(&s);
}

/* Steps of length zero (rate 0) among others; float32 weights leave an unattributed rest and still close. */
static void test_still_steps(void **state)
{
    (void)state;
    for (int v = 0; v < 4; v++) {
        static const char *const rules[4] = {"sgd", "sgd momentum=0.9", "adamw", "sgd weight_decay=0.1"};
        bf_run run;
        bf_recipe recipe = fixture_recipe((uint64_t)(700 + v), 5, 4, 3, v == 2 ? 0.05 : 0.3);
        recipe.float32 = 1;
        fixture_make("input 3; dense 4; relu; dense 3; tanh; dense 2", BF_SQUARED, rules[v], &recipe, &run);
        pk_real *inputs = fixture_normals(5, ROWS * run.network.inputs, 1);
        check_run(&run, "float32", inputs);
        /* w_2 = w_1: the rate is zero, or it is not and the rest is unattributed. */
        memcpy(run.weights + 2 * run.parameters, run.weights + run.parameters,
               run.parameters * sizeof(pk_real));
        run.learning_rates[1] = v % 2 ? run.learning_rates[1] : 0;
        check_run(&run, "a step of length zero", inputs);
        memset(inputs, 0, ROWS * run.network.inputs * sizeof *inputs);
        check_run(&run, "inputs of zeros", inputs);
        free(inputs);
        bf_run_free(&run);
    }
}

/* Units that are dead, at zero, or switch at the same t. */
static void test_degenerate_units(void **state)
{
    (void)state;
    for (int v = 0; v < 4; v++) {
        bf_run run;
        const bf_recipe recipe = fixture_recipe((uint64_t)(800 + v), 5, 3, 0, 1);
        fixture_make("input 3; dense 5; relu; dense 4; relu; dense 2", BF_SOFTMAX_CROSS_ENTROPY, "sgd", &recipe,
                     &run);
        const size_t P = run.parameters;
        for (size_t s = 0; s <= run.steps; s++) {
            pk_real *w = run.weights + s * P;
            if (v == 0) /* unit 1 has no weights at all: its pre-activation is zero all along */
                w[3] = w[4] = w[5] = w[15 + 1] = 0;
            if (v == 1) /* unit 1 is unit 0, twice: both switch at the same t */
                for (int k = 0; k < 3; k++)
                    w[3 + k] = 2 * w[k];
            if (v == 1)
                w[15 + 1] = 2 * w[15];
            if (v == 2) /* all units of the first layer dead: the second sees zeros and its bias */
                for (int j = 0; j < 5; j++)
                    w[15 + j] = -1e3;
            if (v == 3) /* weights fade in from exact zeros */
                for (size_t p = 0; p < P && s == 0; p++)
                    w[p] = 0;
        }
        pk_real *inputs = fixture_normals(6, ROWS * run.network.inputs, 1);
        check_run(&run,
                  v == 0   ? "zero unit"
                  : v == 1 ? "twin units"
                  : v == 2 ? "dead units"
                           : "from zeros",
                  inputs);
        free(inputs);
        bf_run_free(&run);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_activations), cmocka_unit_test(test_losses),
        cmocka_unit_test(test_optimizers),  cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_huge_steps),  cmocka_unit_test(test_many_examples),
        cmocka_unit_test(test_still_steps), cmocka_unit_test(test_degenerate_units),
    };
    int failures = cmocka_run_group_tests(tests, NULL, NULL);
    printf(
        "worst closure %.3g; worst entry error %.3g of the largest entry, over %zu decompositions; engines and "
        "reverse time agree to %.3g (exact rule), %.3g (adaptive)\n",
        worst_closure, worst_entry, decompositions, worst_engines[1], worst_engines[0]);
    return failures;
}
