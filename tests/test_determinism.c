/* The same bits for 1, 2, 3 and 5 threads, for any memory limit, and from run to run; for 1 to 16 threads of every kind
 * of network: recorded, replayed, decomposed by examples and by groups, in kernels and in second derivatives. */
#include "fixture.h"

typedef struct subject {
    const char *network, *optimizer;
    size_t examples, batch;
    int bounds, reverse;
    pk_rule rule;
} subject;

enum { ROWS = 70 };

static void read_out(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope)
{
    (void)user;
    h[0] = tanh(f[0]) * (double)(row + 1);
    for (size_t c = 0; c < 3; c++)
        slope[c] = c ? 0 : (1 - tanh(f[0]) * tanh(f[0])) * (double)(row + 1);
}

/* With a context of so many threads and so much memory; 0 and the least that would do where that is too little. */
static size_t decompose(const pk_run *run, const subject *s, int threads, size_t limit, int function,
                        const pk_real *inputs, uint64_t *hash, double *counts)
{
    pk_context context;
    pk_decompose_options options;
    pk_decomposition out;
    memset(&context, 0, sizeof context);
    memset(&options, 0, sizeof options);
    context.threads = threads;
    context.memory_limit = limit;
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    options.step_closure = 1;
    options.bounds = s->bounds;
    options.reverse_time = s->reverse;
    options.tolerance = 1e3;
    options.quadrature.rule = s->rule;
    options.quadrature.nodes = s->rule == PK_RULE_AUTO ? 0 : 3;
    if (function) {
        options.readout.kind = PK_READOUT_FUNCTION;
        options.readout.count = 1;
        options.readout.function = read_out;
    }
    pk_status status = pk_decompose(
        &context, run, pk_matrix_view((pk_real *)inputs, ROWS, run->graph.input_width), &options, &out);
    if (status == PK_MEMORY_LIMIT) {
        size_t least = 0;
        const char *words = "the least that would do is ", *at = strstr(pk_message(&context), words);
        if (!at || sscanf(at + strlen(words), "%zu", &least) != 1)
            fail_msg("no least memory in '%s'", pk_message(&context));
        assert_true(least > limit);
        assert_int_equal(context.memory_used, 0);
        return least;
    }
    assert_ok(&context, status);
    assert_true(!limit || context.memory_peak <= limit);
    memset(hash, 0, ROWS * sizeof *hash);
    fixture_hash_rows(&out, hash);
    counts[0] = (double)out.points;
    counts[1] = out.worst_closure;
    counts[2] = out.worst_step_closure;
    counts[3] = (double)out.worst_step;
    counts[4] = (double)out.worst_row;
    counts[5] = (double)out.worst_step_row;
    counts[6] = (double)out.refused;
    pk_decomposition_release(&context, &out);
    assert_int_equal(context.memory_used, 0);
    return 0;
}

static void check(const subject *s, int function)
{
    pk_context context;
    pk_run run;
    bf_run brute;
    uint64_t first[ROWS], other[ROWS];
    double counts[7], others[7];
    const bf_recipe recipe = fixture_recipe(77, s->examples, 5, s->batch, 0.1);
    memset(&context, 0, sizeof context);
    fixture_make(s->network, BF_SOFTMAX_CROSS_ENTROPY, s->optimizer, &recipe, &brute);
    fixture_open(&context, &brute, &run);
    pk_real *inputs = fixture_normals(4, ROWS * brute.network.inputs, 1);
    assert_int_equal(decompose(&run, s, 1, 0, function, inputs, first, counts), 0);
    static const int threads[] = {2, 3, 5, 1};
    for (int k = 0; k < 4; k++) {
        assert_int_equal(decompose(&run, s, threads[k], 0, function, inputs, other, others), 0);
        if (memcmp(first, other, sizeof first) != 0 || memcmp(counts, others, sizeof counts) != 0)
            fail_msg("%s, %s: %d threads give other bits than 1", s->network, s->optimizer, threads[k]);
    }
    /* The least memory that the messages lead to does work; so does any more. Results count, too. */
    size_t least = 1024;
    for (int tries = 0;; tries++) {
        size_t wanted = decompose(&run, s, 3, least, function, inputs, other, others);
        if (!wanted)
            break;
        if (tries == 2)
            fail_msg("%s, %s: %zu bytes were said to do, and now %zu", s->network, s->optimizer, least, wanted);
        least = wanted;
    }
    for (size_t more = 0; more < 5; more++) {
        assert_int_equal(decompose(&run, s, 3, least + more * least / 4, function, inputs, other, others), 0);
        if (memcmp(first, other, sizeof first) != 0 || memcmp(counts, others, sizeof counts) != 0)
            fail_msg("%s, %s: other bits within %zu bytes", s->network, s->optimizer, least + more * least / 4);
    }
    free(inputs);
    pk_run_release(&context, &run);
    bf_run_free(&brute);
}

static void test_bits(void **state)
{
    (void)state;
    static const char *const networks[2] = {"input 3; dense 9; relu; dense 7; relu; dense 3",
                                            "input 5; dense 9; tanh; dense 8; gelu; dense 3"};
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.1", "adamw"};
    for (int n = 0; n < 2; n++)
        for (int o = 0; o < 3; o++)
            for (int v = 0; v < 4; v++) {
                subject s = {networks[n], optimizers[o], 600, 0, 0, 0, PK_RULE_AUTO};
                s.batch = v & 1 ? 40 : 0; /* full batches of more than one block, or mini-batches */
                s.bounds = v == 2;
                s.reverse = v == 3;
                check(&s, 0);
            }
}

static void test_readout_and_rules(void **state)
{
    (void)state;
    static const pk_rule fixed[] = {PK_RULE_GAUSS, PK_RULE_MIDPOINT, PK_RULE_TRAPEZOID, PK_RULE_LEFT};
    for (int r = 0; r < 4; r++) {
        subject s = {"input 3; dense 6; tanh; dense 5; relu; dense 3", "sgd", 50, 20, 0, 0, PK_RULE_AUTO};
        s.rule = fixed[r];
        check(&s, r == 1);
    }
    subject s = {"input 3; dense 6; relu; dense 5; tanh; dense 3", "adam", 50, 20, 0, 0, PK_RULE_AUTO};
    check(&s, 1);
}

/* Steps more than any window holds. */
static void test_windows(void **state)
{
    (void)state;
    pk_context context;
    pk_run run;
    bf_run brute;
    static const char *const optimizers[] = {"sgd momentum=0.9", "adamw", "sgd"};
    pk_real *inputs = fixture_normals(8, ROWS * 2, 1);
    for (int o = 0; o < 3; o++) {
        subject s = {NULL, NULL, 0, 0, 0, 0, PK_RULE_AUTO};
        uint64_t first[ROWS], other[ROWS];
        double counts[7], others[7];
        const bf_recipe recipe = fixture_recipe(5, 8, 150, 4, 0.02);
        memset(&context, 0, sizeof context);
        fixture_make("input 2; dense 4; relu; dense 3", BF_SQUARED, optimizers[o], &recipe, &brute);
        fixture_open(&context, &brute, &run);
        assert_int_equal(decompose(&run, &s, 1, 0, 0, inputs, first, counts), 0);
        size_t least = decompose(&run, &s, 1, 1024, 0, inputs, other, others);
        assert_true(least > 1024);
        for (size_t limit = least; limit < 40 * least; limit *= 2) {
            size_t wanted = decompose(&run, &s, 2, limit, 0, inputs, other, others);
            if (wanted) /* the first message was about the results alone */
                continue;
            assert_memory_equal(first, other, sizeof first);
            assert_memory_equal(counts, others, sizeof counts);
        }
        pk_run_release(&context, &run);
        bf_run_free(&brute);
    }
    free(inputs);
}

/* ---- every number of threads, every kind of network -------------------------------------------------------- */

enum { KIND_EXAMPLES = 150, KIND_ROWS = 40, KIND_STEPS = 5, KIND_GROUPS = 4 };

typedef struct kind {
    const char *network, *optimizer;
    size_t keep_every, batch;
    int tokens; /* inputs are whole numbers below this; 0: real numbers */
} kind;

/* Trains, replays, decomposes and compares inputs with so many threads; the hash of every number that comes out. */
static uint64_t everything(const kind *k, int threads)
{
    pk_context context;
    pk_graph graph;
    pk_run run;
    pk_replay replay;
    pk_train_options options;
    pk_decompose_options by;
    pk_decomposition out;
    uint64_t hash = 1, rows[KIND_ROWS];
    int64_t labels[KIND_EXAMPLES], groups[KIND_EXAMPLES];
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    memset(&by, 0, sizeof by);
    context.threads = threads;
    assert_ok(&context, pk_network_parse(&context, k->network, &graph));
    const size_t P = graph.parameters, D = graph.input_width, C = graph.output_width;
    pk_real *x = fixture_normals(3, KIND_EXAMPLES * D, 1), *w = FIXTURE_NEW(pk_real, P),
            *v = fixture_normals(5, P, 1), *product = FIXTURE_NEW(pk_real, P),
            *gram = FIXTURE_NEW(pk_real, KIND_ROWS * C * KIND_ROWS * C);
    for (size_t i = 0; k->tokens && i < KIND_EXAMPLES * D; i++)
        x[i] = (pk_real)((int)(fabs((double)x[i]) * 1000) % k->tokens);
    for (size_t i = 0; i < KIND_EXAMPLES; i++) {
        labels[i] = (int64_t)(i * 7 % C);
        groups[i] = (int64_t)(i % KIND_GROUPS);
    }
    const size_t shape[2] = {KIND_EXAMPLES, D};
    pk_dataset train;
    train.inputs = pk_array_view(REAL_TYPE, 2, shape, x);
    train.targets = pk_array_view(PK_INT64, 1, shape, labels);
    assert_ok(&context, pk_network_initialize(&context, &graph, 4, w));
    assert_ok(&context, pk_optimizer_parse(&context, k->optimizer, &options.optimizer));
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.01;
    options.steps = KIND_STEPS;
    options.batch_size = k->batch;
    options.clip_norm = 0.7;
    options.keep_every = k->keep_every;
    options.record = fixture_run_path;
    options.replace = 1;
    assert_ok(&context, pk_train(&context, &graph, &train, &options, w, NULL));
    hash = fixture_hash_reals(hash, P, w);

    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
    assert_ok(&context, pk_replay_prepare(&context, &run, 2, &replay));
    for (size_t s = KIND_STEPS + 1; s-- > 0;) {
        assert_ok(&context, pk_replay_weights(&context, &replay, s, w));
        hash = fixture_hash_reals(hash, P, w);
    }
    pk_replay_release(&context, &replay);
    by.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    by.tolerance = 1e3;
    for (int grouped = 0; grouped < 2; grouped++) {
        by.keep[0] = grouped ? PK_BY_GROUP | PK_BY_STEP : PK_BY_EXAMPLE;
        by.groups = grouped ? groups : NULL;
        by.group_count = grouped ? KIND_GROUPS : 0;
        assert_ok(&context, pk_decompose(&context, &run, pk_matrix_view(x, KIND_ROWS, D), &by, &out));
        fixture_hash_rows(&out, rows);
        for (size_t r = 0; r < KIND_ROWS; r++)
            hash = (hash ^ rows[r]) * 0x100000001b3u;
        pk_decomposition_release(&context, &out);
    }
    pk_run_release(&context, &run);

    const pk_matrix all = pk_matrix_view(x, KIND_ROWS, D), none = pk_matrix_view(NULL, 0, 0);
    assert_ok(&context, pk_kernel_ntk(&context, &graph, w, all, none,
                                      pk_matrix_view(gram, KIND_ROWS * C, KIND_ROWS * C)));
    hash = fixture_hash_reals(hash, KIND_ROWS * C * KIND_ROWS * C, gram);
    assert_ok(&context, pk_kernel_ntk_trace(&context, &graph, w, all, pk_matrix_view(x + D, KIND_ROWS / 2, D),
                                            pk_matrix_view(gram, KIND_ROWS, KIND_ROWS / 2)));
    hash = fixture_hash_reals(hash, KIND_ROWS * (KIND_ROWS / 2), gram);
    int64_t items[KIND_EXAMPLES];
    for (size_t i = 0; i < KIND_EXAMPLES; i++)
        items[i] = (int64_t)i;
    const pk_batch batch = {KIND_EXAMPLES, items, NULL};
    assert_ok(&context, pk_hessian_product(&context, &graph, options.loss, w, &train, &batch, v, product));
    hash = fixture_hash_reals(hash, P, product);
    assert_ok(&context, pk_gauss_newton_product(&context, &graph, options.loss, w, &train, &batch, v, product));
    hash = fixture_hash_reals(hash, P, product);
    free(x), free(w), free(v), free(product), free(gram);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    return hash;
}

static void test_every_kind(void **state)
{
    static const kind kinds[] = {
        {"input 5; dense 9; tanh; dense 8; relu; dense 3", "adamw weight_decay=0.1", 2, 0, 0},
        {"input 2x6x6; conv 4 3x3 pad=1 groups=2; relu; max_pool 2x2; residual( conv 4 3x3 pad=1; relu ); conv "
         "4 2x2; "
         "flatten; dense 3",
         "sgd momentum=0.9 weight_decay=0.01", 1, 70, 0},
        {"input 2x5x5; conv 3 3x3 stride=2 pad=1; gelu; avg_pool 2x2; flatten; dense 3", "adam", 3, 0, 0},
        {"input 5; embedding 7 4; position; residual( layer_norm; attention 2 causal ); layer_norm; "
         "mean_tokens; dense 3",
         "adamw", 2, 0, 7},
        {"input 4x3; dense 4; attention 1 shared; tanh; flatten; dense 5; rms_norm; dense 3", "sgd", 1, 60, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const uint64_t one = everything(&kinds[i], 1);
        for (int threads = 2; threads <= 16; threads++)
            if (everything(&kinds[i], threads) != one)
                fail_msg("%s, %s: %d threads give other bits than 1", kinds[i].network, kinds[i].optimizer,
                         threads);
        if (one == everything(&kinds[(i + 1) % (sizeof kinds / sizeof *kinds)], 1))
            fail_msg("the hash sees nothing");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bits),
        cmocka_unit_test(test_readout_and_rules),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_every_kind),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
