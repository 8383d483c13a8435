/* Memory: plans stay within the limit for any sizes, hold what they say, and show in no bit of the results. */
#include "fixture.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif

/* ---- plans without a job ------------------------------------------------------------------------------- */

typedef struct shape {
    const char *network, *optimizer;
    size_t examples, rows, steps, batch;
    int bounds;
} shape;

/* A run of such sizes without data, as far as a plan looks at it. */
static void imagine(pk_context *context, const shape *s, int64_t **offsets, pk_run *run)
{
    memset(run, 0, sizeof *run);
    assert_ok(context, pk_network_parse(context, s->network, &run->graph));
    assert_ok(context, pk_optimizer_parse(context, s->optimizer, &run->optimizer));
    *offsets = FIXTURE_NEW(int64_t, s->steps + 1);
    for (size_t i = 0; i <= s->steps; i++)
        (*offsets)[i] = (int64_t)(i * s->batch);
    run->steps = s->steps;
    run->examples = s->examples;
    run->parameters = run->graph.parameters;
    run->outputs = run->graph.output_width;
    run->keep_every = 1;
    run->weights.type = REAL_TYPE;
    run->batch_offsets = *offsets;
}

static size_t least_of(const pk_context *context)
{
    size_t least = 0;
    const char *words = "the least that would do is ", *at = strstr(pk_message(context), words);
    if (!at || sscanf(at + strlen(words), "%zu", &least) != 1)
        fail_msg("no least memory in '%s'", pk_message(context));
    return least;
}

/* Plans for the least memory, for less, and for more and more. */
static void check_plans(const shape *s)
{
    pk_context context;
    pk_run run;
    pk_decompose_options options;
    int64_t *offsets;
    pk_plan plan, before;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    imagine(&context, s, &offsets, &run);
    options.keep[0] = s->bounds ? PK_BY_EXAMPLE : PK_BY_TOTAL;
    options.bounds = s->bounds;
    const size_t held = context.memory_used, outputs = run.outputs;
    const double items = (double)(s->steps * s->batch);
    for (int threads = 1; threads <= 3; threads += 2) {
        context.threads = threads;
        context.memory_limit = 1;
        assert_int_equal(pk_decompose_plan(&context, &run, s->rows, &options, 1, &plan), PK_MEMORY_LIMIT);
        const size_t least = least_of(&context);
        context.memory_limit = least - 1;
        assert_int_equal(pk_decompose_plan(&context, &run, s->rows, &options, 1, &plan), PK_MEMORY_LIMIT);
        assert_int_equal(least_of(&context), least);
        memset(&before, 0, sizeof before);
        for (double more = 1; more < 1e4; more *= 2.5) {
            context.memory_limit = (size_t)((double)least * more);
            assert_ok(&context, pk_decompose_plan(&context, &run, s->rows, &options, 1, &plan));
            assert_true(held + plan.bytes <= context.memory_limit);
            assert_true(plan.threads >= 1 && plan.threads <= (size_t)threads);
            assert_true(plan.rows >= 1 && plan.rows <= s->rows);
            assert_true(plan.outputs >= 1 && plan.outputs <= outputs);
            assert_int_equal(plan.passes, ((s->rows + plan.rows - 1) / plan.rows) *
                                              ((outputs + plan.outputs - 1) / plan.outputs));
            assert_true(plan.window >= 1 && plan.window <= s->steps);
            assert_true(plan.sweeps >= (double)plan.passes);
            assert_close(plan.gradient_flops, plan.sweeps * 6 * (double)run.parameters * items,
                         1e-9 * plan.gradient_flops);
            assert_close(plan.seconds,
                         plan.seconds_examples + plan.seconds_again + plan.seconds_test +
                             plan.seconds_contraction,
                         1e-9 * plan.seconds);
            /* More memory costs no more, but for what is too little to take it. */
            if (before.threads && !(plan.seconds <= 1.1 * before.seconds))
                fail_msg("%s, %s: %zu bytes cost %.4g s, less cost %.4g s", s->network, s->optimizer,
                         context.memory_limit, plan.seconds, before.seconds);
            before = plan;
        }
        context.memory_limit = 0;
        assert_ok(&context, pk_decompose_plan(&context, &run, s->rows, &options, 1, &plan));
        if (plan.passes == 1) {
            assert_int_equal(plan.rows, s->rows);
        } else { /* one pass would take more than 4 GiB beside the results: as good as with such a limit */
            before = plan;
            context.memory_limit = before.bytes + held;
            assert_ok(&context, pk_decompose_plan(&context, &run, s->rows, &options, 1, &plan));
            assert_true(before.bytes > (size_t)1 << 30 && plan.seconds <= 1.1 * before.seconds);
        }
    }
    pk_graph_release(&context, &run.graph);
    free(offsets);
}

/* Passes of a given length: longer jobs have more of them, a short one has one, none repeats much, and only parts have them. */
static void test_pass_seconds(void **state)
{
    (void)state;
    static const char *const optimizers[] = {"sgd", "adamw"};
    for (int o = 0; o < 2; o++) {
        pk_context context;
        pk_run run;
        int64_t *offsets;
        shape s = {"input 64; dense 32; tanh; dense 32; tanh; dense 10", optimizers[o], 1000, 0, 300, 100, 0};
        size_t passes = 1;
        memset(&context, 0, sizeof context);
        context.threads = 2;
        imagine(&context, &s, &offsets, &run);
        for (size_t rows = 10; rows <= 10000000; rows *= 10) {
            pk_decompose_options options;
            pk_plan plan, whole, parts;
            memset(&options, 0, sizeof options);
            options.keep[0] = PK_BY_TOTAL;
            assert_ok(&context, pk_decompose_plan(&context, &run, rows, &options, 1, &whole));
            assert_ok(&context, pk_decompose_plan(&context, &run, rows, &options, 0, &parts));
            options.pass_seconds = 10;
            assert_ok(&context, pk_decompose_plan(&context, &run, rows, &options, 0, &plan));
            assert_int_equal(plan.passes, parts.passes);
            assert_ok(&context, pk_decompose_plan(&context, &run, rows, &options, 1, &parts));
            if (whole.seconds < 20)
                assert_int_equal(parts.passes, whole.passes);
            else if (whole.seconds > 200 && parts.passes < 5)
                fail_msg("%zu rows, %g s: %zu passes", rows, whole.seconds, parts.passes);
            if (parts.seconds > 1.25 * whole.seconds)
                fail_msg("%zu rows: %g s in one pass, %g s in %zu", rows, whole.seconds, parts.seconds,
                         parts.passes);
            assert_true(parts.passes >= passes);
            passes = parts.passes;
            options.rows_at_once = rows; /* the caller's word counts */
            assert_ok(&context, pk_decompose_plan(&context, &run, rows, &options, 1, &plan));
            assert_int_equal(plan.passes, whole.passes);
        }
        assert_true(passes > 10);
        pk_graph_release(&context, &run.graph);
        free(offsets);
    }
}

static void test_grid(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 3; dense 2", "input 64; dense 32; tanh; dense 32; relu; dense 10",
        "input 784; dense 128; relu; dense 10", "input 20; dense 300; tanh; dense 300; tanh; dense 1000"};
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 nesterov=1", "adamw"};
    size_t count = 4;
#ifdef SANITIZED
    print_message("one network of %zu: a sanitizer makes the grid slow\n", count);
    count = 1;
#endif
    for (size_t n = 0; n < count; n++)
        for (size_t o = 0; o < 3; o++)
            for (int v = 0; v < 4; v++) {
                shape s = {networks[n], optimizers[o], 1000, 50, 40, 32, 0};
                if (v == 1) { /* long */
                    s.steps = 30000;
                    s.rows = 7;
                }
                if (v == 2) { /* wide */
                    s.examples = 50000;
                    s.rows = 10000;
                    s.steps = 3;
                    s.batch = 600;
                }
                s.bounds = v == 3;
                check_plans(&s);
            }
}

/* The least does not grow with the number of examples, of test rows or of outputs, and hardly with that of steps. */
static void test_least(void **state)
{
    (void)state;
    static const shape shapes[] = {
        {"input 100; dense 400; tanh; dense 10", "adamw", 1000, 10, 100, 32, 0},
        {"input 100; dense 400; tanh; dense 10", "adamw", 1000000, 10, 100, 32, 0},
        {"input 100; dense 400; tanh; dense 10", "adamw", 1000, 100000, 100, 32, 0},
        {"input 100; dense 400; tanh; dense 10", "adamw", 1000, 10, 100000, 32, 0},
    };
    size_t least[4];
    for (size_t i = 0; i < 4; i++) {
        pk_context context;
        pk_run run;
        pk_decompose_options options;
        pk_plan plan;
        int64_t *offsets;
        memset(&context, 0, sizeof context);
        memset(&options, 0, sizeof options);
        imagine(&context, &shapes[i], &offsets, &run);
        options.keep[0] = PK_BY_TOTAL;
        context.memory_limit = 1;
        assert_int_equal(pk_decompose_plan(&context, &run, shapes[i].rows, &options, 1, &plan),
                         PK_MEMORY_LIMIT);
        least[i] = least_of(&context);
        print_message("least memory: %5.1f P numbers for %zu examples, %zu rows, %zu steps\n",
                      (double)least[i] / sizeof(pk_real) / (double)run.parameters, shapes[i].examples,
                      shapes[i].rows, shapes[i].steps);
        assert_true(least[i] <=
                    least[0] + least[0] / EITHER(16, 8)); /* beside the numbers, counts of 8 bytes */
        pk_graph_release(&context, &run.graph);
        free(offsets);
    }
}

static void test_plan_arguments(void **state)
{
    (void)state;
    static const shape s = {"input 3; dense 2", "sgd", 10, 10, 5, 2, 0};
    pk_context context;
    pk_run run;
    pk_decompose_options options;
    pk_plan plan;
    int64_t *offsets;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    imagine(&context, &s, &offsets, &run);
    assert_int_equal(pk_decompose_plan(&context, &run, 0, NULL, 1, &plan), PK_ARGUMENT);
    assert_int_equal(pk_decompose_plan(&context, NULL, 1, NULL, 1, &plan), PK_ARGUMENT);
    assert_int_equal(pk_decompose_plan(&context, &run, 1, NULL, 1, NULL), PK_ARGUMENT);
    options.tolerance = -1;
    assert_int_equal(pk_decompose_plan(&context, &run, 1, &options, 1, &plan), PK_ARGUMENT);
    assert_ok(&context, pk_decompose_plan(&context, &run, 1, NULL, 0, &plan));
    pk_graph_release(&context, &run.graph);
    free(offsets);
}

/* ---- states kept on the way back ----------------------------------------------------------------------- */

/* Every window is as it was on the way forward, and what is gone through again is what the formula says. */
static void test_states(void **state)
{
    (void)state;
    enum { STEPS = 43 };
    pk_context context;
    pk_run run;
    bf_run brute;
    const bf_recipe recipe = fixture_recipe(5, 8, STEPS, 4, 0.02);
    memset(&context, 0, sizeof context);
    fixture_make("input 2; dense 4; relu; dense 3", BF_SQUARED, "adamw", &recipe, &brute);
    fixture_open(&context, &brute, &run);
    const size_t P = run.parameters;
    pk_real *forward = FIXTURE_NEW(pk_real, STEPS * P);
    for (size_t capacity = 1; capacity <= 5; capacity += 2)
        for (size_t stride = 1; stride <= STEPS; stride = stride < 4 ? stride + 1 : 2 * stride + 1)
            for (size_t spare = 0; spare < 6; spare++) {
                pk__window window;
                pk__arena arena = {NULL, 0, 0, 0};
                unsigned char *memory = NULL;
                pk__steps_begin(&run, &window);
                pk__steps_take(&arena, capacity, stride, spare, 1, 0, &window);
                assert_ok(&context, pk_allocate(&context, arena.used, 1, "windows", &memory));
                pk__arena own = {memory, arena.used, 0, 0};
                pk__steps_take(&own, capacity, stride, spare, 1, 0, &window);
                if (capacity == 1 && stride == 1 && spare == 0)
                    for (size_t s = 0; s < STEPS; s++) {
                        assert_ok(&context, pk__steps_prepare(&context, &window, s, 1));
                        memcpy(forward + s * P, window.preconditioner, P * sizeof *forward);
                    }
                assert_ok(&context, pk__steps_save_states(&context, &window));
                const size_t saved = window.advanced, windows = window.windows;
                assert_int_equal(saved, (windows - 1) / stride * stride);
                for (int pass = 1; pass <= 2; pass++) {
                    for (size_t w = windows; w-- > 0;) {
                        assert_ok(&context, pk__steps_visit(&context, &window, w));
                        for (size_t j = 0; j < window.count; j++)
                            assert_memory_equal(window.preconditioner + j * window.pitch,
                                                forward + (w * capacity + j) * P, P * sizeof *forward);
                    }
                    double again = 0;
                    for (size_t first = 0; first < windows; first += stride)
                        again += pk__checkpoints_again(stride < windows - first ? stride : windows - first, spare);
                    assert_close((double)(window.advanced - saved), pass * again, 0);
                }
                pk_release(&context, memory);
            }
    /* Griewank and Walther's table: 3 states more than the first reach 35 windows with three repeats at most. */
    assert_close(pk__checkpoints_again(1, 0), 0, 0);
    assert_close(pk__checkpoints_again(10, 0), 45, 0);
    assert_close(pk__checkpoints_again(10, 9), 9, 0);
    assert_close(pk__checkpoints_again(35, 3), 3 * 35 - 21, 0);
    free(forward);
    pk_run_release(&context, &run);
    bf_run_free(&brute);
}

/* ---- jobs ---------------------------------------------------------------------------------------------- */

enum { ROWS = 3 };

typedef struct outcome {
    uint64_t hash[ROWS];
    size_t next, counts[4];
} outcome;

static pk_status collect(void *user, const pk_decomposition *part)
{
    outcome *o = (outcome *)user;
    assert_int_equal(part->first_row, o->next);
    o->next += part->rows;
    fixture_hash_rows(part, o->hash);
    return PK_OK;
}

/* Decomposes as planned; the plan's passes are made, and no more is held than it says. */
static pk_plan decompose(pk_context *context, const pk_run *run, const pk_real *inputs,
                         const pk_decompose_options *options, outcome *o)
{
    pk_plan plan;
    pk_decomposition summary;
    const size_t held = context->memory_used;
    assert_ok(context, pk_decompose_plan(context, run, ROWS, options, 1, &plan));
    memset(o, 0, sizeof *o);
    context->memory_peak = held;
    assert_ok(context,
              pk_decompose_parts(context, run, pk_matrix_view((pk_real *)inputs, ROWS, run->graph.input_width),
                                 options, collect, o, &summary));
    assert_int_equal(o->next, ROWS);
    assert_int_equal(summary.passes, plan.passes);
    assert_true(context->memory_peak <= held + plan.bytes);
    assert_true(!context->memory_limit || context->memory_peak <= context->memory_limit);
    if (!options->bounds && !pk_optimizer_stateless(&run->optimizer)) /* but for the biases, which are added */
        assert_true(summary.flops > 0.9 * plan.contraction_flops &&
                    summary.flops <= plan.contraction_flops * (1 + 1e-12));
    o->next = 0;
    o->counts[0] = summary.points;
    o->counts[1] = summary.worst_step;
    o->counts[2] = summary.worst_step_row;
    o->counts[3] = summary.refused;
    return plan;
}

/* For any limit, from the least on; networks are large enough that the outputs are cut. */
static void check_bits(const pk_run *run, int bounds, const char *name)
{
    pk_context context;
    pk_decompose_options options;
    outcome first, other;
    pk_plan plan;
    size_t cut = 0;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    pk_real *inputs = fixture_normals(5, ROWS * run->graph.input_width, 1);
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    options.step_closure = 1;
    options.bounds = bounds;
    options.engine = PK_ENGINE_INTEGRATED; /* also without an optimizer's state there is Phi to cut */
    assert_true(pk__integral_unit(5, run->parameters) < 4);
    context.threads = 1;
    (void)decompose(&context, run, inputs, &options, &first);
    for (int threads = 1; threads <= 2; threads++) {
        context.threads = threads;
        context.memory_limit = 1;
        assert_int_equal(pk_decompose_plan(&context, run, ROWS, &options, 1, &plan), PK_MEMORY_LIMIT);
        const size_t least = least_of(&context);
        for (size_t sixths = 6; sixths < 14; sixths += threads + 1) {
            context.memory_limit = least / 6 * sixths + least % 6;
            plan = decompose(&context, run, inputs, &options, &other);
            cut += plan.outputs < run->outputs;
            if (memcmp(&first, &other, sizeof first) != 0)
                fail_msg("%s: %zu rows and %zu outputs in a pass give other bits", name, plan.rows,
                         plan.outputs);
        }
        context.memory_limit = 0;
    }
    assert_true(cut > 0);
    free(inputs);
}

static void test_same_bits(void **state)
{
    (void)state;
    static const char *const networks[2] = {
        "input 30; dense 125; tanh; dense 125; relu; dense 125; tanh; dense 125; tanh; dense 5",
        "input 40; dense 125; relu; dense 125; relu; dense 125; dense 120; relu; dense 5"};
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 nesterov=1 weight_decay=0.1", "adamw"};
    for (int n = 0; n < 2; n++)
        for (int o = 0; o < 3; o++)
            for (int bounds = 0; bounds < 2 - n; bounds++) {
                pk_context context;
                pk_run run;
                bf_run brute;
                const bf_recipe recipe = fixture_recipe(3, 6, 4, 3, o == 2 ? 0.01 : 0.05);
                memset(&context, 0, sizeof context);
                fixture_make(networks[n], BF_SQUARED, optimizers[o], &recipe, &brute);
                fixture_open(&context, &brute, &run);
                check_bits(&run, bounds, networks[n]);
                pk_run_release(&context, &run);
                bf_run_free(&brute);
            }
}

/* Layers whose gradients are materialized row by row. */
static void test_same_bits_by_rows(void **state)
{
    (void)state;
    static const char *const networks[2] = {
        "input 1x10x10; conv 6 3x3; tanh; flatten; dense 100; relu; dense 5",
        "input 100; dense 200; layer_norm; tanh; dense 100; tanh; dense 5"};
    const char *temporary = getenv("TMPDIR");
    pk_real *inputs = fixture_normals(8, 6 * 100, 1), *targets = fixture_normals(9, 6 * 5, 1);
    const size_t in[2] = {6, 100}, out[2] = {6, 5}, image[4] = {6, 1, 10, 10};
    for (int n = 0; n < 2; n++) {
        char directory[300];
        pk_context context;
        pk_train_options training;
        pk_train_result trained;
        pk_dataset data;
        pk_graph graph;
        pk_run run;
        memset(&context, 0, sizeof context);
        memset(&training, 0, sizeof training);
        memset(&graph, 0, sizeof graph);
        data.inputs = n ? pk_array_view(REAL_TYPE, 2, in, inputs) : pk_array_view(REAL_TYPE, 4, image, inputs);
        data.targets = pk_array_view(REAL_TYPE, 2, out, targets);
        snprintf(directory, sizeof directory, "%.200s/pathkernel-test-XXXXXX", temporary ? temporary : "/tmp");
        assert_non_null(mkdtemp(directory));
        assert_ok(&context, pk_network_parse(&context, networks[n], &graph));
        pk_real *weights = FIXTURE_NEW(pk_real, graph.parameters);
        assert_ok(&context, pk_network_initialize(&context, &graph, 1, weights));
        training.loss = PK_SQUARED;
        training.optimizer = pk_optimizer_adamw();
        training.schedule.rate = 0.01;
        training.steps = 4;
        training.batch_size = 3;
        training.record = directory;
        assert_ok(&context, pk_train(&context, &graph, &data, &training, weights, &trained));
        assert_ok(&context, pk_run_open(&context, directory, &run));
        fixture_clear(directory);
        for (int bounds = 0; bounds < 2; bounds++)
            check_bits(&run, bounds, networks[n]);
        pk_run_release(&context, &run);
        pk_graph_release(&context, &graph);
        free(weights);
    }
    free(inputs), free(targets);
}

/* ---- the size of MNIST ---------------------------------------------------------------------------------- */

enum { DIGITS = 8000, PIXELS = 784, CLASSES = 10 };

/* Ten blurred patterns with noise, zero at four pixels of five: rows as sparse as those of MNIST. */
static void draw_digits(pk_real *inputs, int64_t *labels)
{
    uint64_t seed = 9;
    pk_real *pattern = FIXTURE_NEW(pk_real, CLASSES * PIXELS);
    for (size_t i = 0; i < CLASSES * PIXELS; i++)
        pattern[i] = fmax(0, bf_normal(&seed) - 0.84);
    for (size_t i = 0; i < DIGITS; i++) {
        labels[i] = (int64_t)(i % CLASSES);
        for (size_t j = 0; j < PIXELS; j++) {
            const double ink = pattern[(size_t)labels[i] * PIXELS + j];
            inputs[i * PIXELS + j] = ink > 0 ? fmin(1, fmax(0, ink + 0.3 * bf_normal(&seed))) : 0;
        }
    }
    free(pattern);
}

/* 784-128-10, 8000 examples, AdamW, batches of 64, 375 steps: momenta of all examples would take 6.5 GB.
 * PATHKERNEL_KEEP=DIR leaves the run there, with 100 inputs: docs/performance.md has what all of them take. */
static void test_mnist(void **state)
{
    (void)state;
    static const size_t megabyte = (size_t)1 << 20;
    const char *temporary = getenv("TMPDIR"), *keep = getenv("PATHKERNEL_KEEP");
    char directory[300], path[320];
    pk_context context;
    pk_train_options training;
    pk_train_result trained;
    pk_decompose_options options;
    pk_dataset data;
    pk_graph graph;
    pk_run run;
    pk_plan plan;
    const char *reason = NULL;
#ifdef SANITIZED
    reason = "a sanitizer makes it ten times slower";
#elif !defined(PATHKERNEL_BLIS)
    reason = "without BLIS it takes minutes";
#elif defined(PATHKERNEL_TEST_AMALGAM)
    reason = "the suite on modules has it";
#endif
    const shape s = {"input 784; dense 128; relu; dense 10", "adamw", DIGITS, 100, 375, 64, 0};
    int64_t *offsets;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    imagine(&context, &s, &offsets, &run);
    assert_int_equal(run.parameters, 101770);
    context.threads = 2;
    static const size_t limits[] = {64, 512, 4096};
    for (size_t i = 0; i < 3; i++) { /* with all of by_example, of 100 inputs */
        context.memory_limit = limits[i] * megabyte;
        assert_ok(&context, pk_decompose_plan(&context, &run, 100, &options, i < 2, &plan));
        assert_true(context.memory_used + plan.bytes <= context.memory_limit);
        print_message(
            "100 inputs within %4zu MiB: %zu passes of %zu inputs and %zu outputs, %.1f sweeps over the "
            "examples, about %.0f s\n",
            limits[i], plan.passes, plan.rows, plan.outputs, plan.sweeps, plan.seconds);
        assert_true(plan.sweeps < 200);
    }
    context.memory_limit = 0;
    pk_graph_release(&context, &run.graph);
    free(offsets);
    if (reason) {
        print_message("not run: %s\n", reason);
        return;
    }
    pk_real *inputs = FIXTURE_NEW(pk_real, DIGITS * PIXELS);
    int64_t *labels = FIXTURE_NEW(int64_t, DIGITS);
    const size_t shape2[2] = {DIGITS, PIXELS}, shape1[1] = {DIGITS};
    draw_digits(inputs, labels);
    data.inputs = pk_array_view(REAL_TYPE, 2, shape2, inputs);
    data.targets = pk_array_view(PK_INT64, 1, shape1, labels);
    if (keep) {
        snprintf(directory, sizeof directory, "%.290s", keep);
    } else {
        snprintf(directory, sizeof directory, "%.200s/pathkernel-test-XXXXXX", temporary ? temporary : "/tmp");
        assert_non_null(mkdtemp(directory));
    }
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, s.network, &graph));
    pk_real *weights = FIXTURE_NEW(pk_real, graph.parameters);
    assert_ok(&context, pk_network_initialize(&context, &graph, 1, weights));
    memset(&training, 0, sizeof training);
    training.loss = PK_SOFTMAX_CROSS_ENTROPY;
    training.optimizer = pk_optimizer_adamw();
    training.schedule.rate = 1e-3;
    training.steps = 375;
    training.batch_size = 64;
    training.record = directory;
    assert_ok(&context, pk_train(&context, &graph, &data, &training, weights, &trained));
    assert_ok(&context, pk_run_open(&context, directory, &run));
    pk_graph_release(&context, &graph);

    /* Two rows in one pass, and in passes of some of their outputs. */
    const size_t tested[2] = {100, PIXELS};
    for (size_t j = 0; j < 100 * PIXELS; j++)
        inputs[j] *= 0.9; /* no examples any more */
    snprintf(path, sizeof path, "%s/inputs.npy", directory);
    assert_ok(&context, pk_array_write(&context, path, REAL_TYPE, 2, tested, inputs));
    if (!keep)
        fixture_clear(directory);
    uint64_t first[2], other[2];
    for (int tight = 0; tight < 2; tight++) {
        pk_decomposition got;
        const size_t held = context.memory_used;
        context.memory_limit = (tight ? EITHER(40, 22) : 512) * megabyte;
        context.memory_peak = held;
        assert_ok(&context, pk_decompose_plan(&context, &run, 2, &options, 0, &plan));
        assert_ok(&context, pk_decompose(&context, &run, pk_matrix_view(inputs, 2, PIXELS), &options, &got));
        assert_int_equal(got.passes, plan.passes);
        assert_int_equal(got.passes, tight ? 2 : 1); /* of half the outputs each */
        assert_true(context.memory_peak <= context.memory_limit && context.memory_peak <= held + plan.bytes);
        assert_true(got.worst_closure <= ROUNDING(1e-12));
        assert_true(got.worst_unattributed <= ROUNDING(1e-12));
        fixture_hash_rows(&got, tight ? other : first);
        print_message("2 inputs within %zu MiB: %.1f MiB at the peak, %zu passes, closure %.2g\n",
                      context.memory_limit / megabyte, (double)context.memory_peak / (double)megabyte,
                      got.passes, got.worst_closure);
        pk_decomposition_release(&context, &got);
    }
    assert_memory_equal(first, other, sizeof first);
    context.memory_limit = 0;
    pk_run_release(&context, &run);
    free(inputs), free(labels), free(weights);
    assert_int_equal(context.memory_used, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grid),
        cmocka_unit_test(test_pass_seconds),
        cmocka_unit_test(test_least),
        cmocka_unit_test(test_plan_arguments),
        cmocka_unit_test(test_states),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_same_bits_by_rows),
        cmocka_unit_test(test_mnist),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
