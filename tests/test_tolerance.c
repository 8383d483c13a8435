/* A looser tolerance: what it may leave of closures and of single contributions, and what it must save. Networks with kinks are
 * integrated along whole steps then, with mean slopes, and split at their kinks only where that does not do. Against brute force
 * (graph_oracle.h), and against the library's exact decomposition where networks are wider. Costs are counted in points
 * of the quadrature, each a gradient of all outputs. */
#include "random_runs.h"

static const double tolerances[] = {1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8};
enum { TOLERANCES = sizeof tolerances / sizeof *tolerances };

/* ---- one run at all tolerances ---------------------------------------------------------------------------- */

/* Over several runs: the worst entry and closure, as parts of the tolerance, and the points at each tolerance; the last one is the
 * default. */
typedef struct tally {
    double entry[TOLERANCES], closure[TOLERANCES];
    size_t points[TOLERANCES + 1];
} tally;

/* The largest difference of two results' contributions, relative to the largest of the row. */
static double worst_entry(const pk_decomposition *exact, const pk_decomposition *loose)
{
    const size_t entries = exact->outputs * exact->examples;
    double worst = 0;
    for (size_t row = 0; row < exact->rows; row++) {
        const double *a = exact->by_example + row * entries, *b = loose->by_example + row * entries;
        const double largest = fixture_largest_double(entries, a);
        for (size_t i = 0; i < entries; i++) {
            const double difference = fabs(a[i] - b[i]);
            worst = fmax(worst, difference > 0 ? difference / largest : isnan(difference) ? (double)INFINITY : 0);
        }
    }
    return worst;
}

static void decompose(pk_context *context, const pk_run *run, pk_real *inputs, size_t rows, double tolerance,
                      const pk_readout *readout, pk_decomposition *out)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.tolerance = tolerance;
    options.unattributed = HUGE_VAL; /* some runs have weights that no training gave */
    options.keep[0] = PK_BY_EXAMPLE;
    if (readout)
        options.readout = *readout;
    assert_ok(context, pk_decompose(context, run, pk_matrix_view(inputs, rows, run->graph.input_width), &options, out));
    assert_true(out->worst_excess <= 1);
}

/* Closures and entries within each tolerance, and costs that fall with it. */
static void check(const char *what, pk_context *context, const pk_run *run, pk_real *inputs, size_t rows,
                  const pk_readout *readout, tally *all)
{
    pk_decomposition exact, loose;
    decompose(context, run, inputs, rows, 0, readout, &exact);
    size_t last = exact.points;
    all->points[TOLERANCES] += exact.points;
    for (int t = TOLERANCES - 1; t >= 0; t--) {
        decompose(context, run, inputs, rows, tolerances[t], readout, &loose);
        const double entry = worst_entry(&exact, &loose) / tolerances[t];
        if (!(entry <= 1))
            fail_msg("%s at %.0e: an entry is off by %.3g of the tolerance; %zu points, %zu of the exact rule", what,
                     tolerances[t], entry, loose.points, exact.points);
        if (loose.points > last + last / 4 + rows)
            fail_msg("%s at %.0e: %zu points, %zu at the next tighter tolerance", what, tolerances[t], loose.points,
                     last);
        last = loose.points;
        all->entry[t] = fmax(all->entry[t], entry);
        all->closure[t] = fmax(all->closure[t], loose.worst_excess);
        all->points[t] += loose.points;
        pk_decomposition_release(context, &loose);
    }
    pk_decomposition_release(context, &exact);
}

static void tell(const char *what, const tally *all)
{
    for (int t = 0; t < TOLERANCES; t++)
        print_message("%s at %.0e: worst entry %.2g and closure %.2g of the tolerance, %zu points of %zu\n", what,
                      tolerances[t], all->entry[t], all->closure[t], all->points[t], all->points[TOLERANCES]);
}

/* ---- random runs against brute force ---------------------------------------------------------------------- */

static void random_runs(rr_kind kind, uint64_t first, uint64_t count)
{
    double worst[TOLERANCES] = {0};
    size_t points[TOLERANCES] = {0};
    for (uint64_t seed = first; seed < first + count; seed++) {
        rr_run r;
        go_result truth;
        rr_verdict v;
        rr_make(seed, kind, &r);
        go_decompose(&r.run, r.rows, r.inputs, &truth);
        for (int t = 0; t < TOLERANCES && !truth.missed; t++) {
            rr_compare(&r, &truth, tolerances[t], 0, &v);
            const double error = v.error / (tolerances[t] + v.accuracy);
            if (v.status || !(error <= 1) || !(v.others <= tolerances[t]))
                fail_msg("seed %d, %s, %s at %.0e: entries off by %.3g, other terms by %.3g of the largest; %s", (int)seed,
                         r.network, r.optimizer, tolerances[t], v.error, v.others, pk_status_text(v.status));
            worst[t] = fmax(worst[t], error);
            points[t] += v.points;
            free(v.looseness);
        }
        go_result_free(&truth);
        rr_free(&r);
    }
    for (int t = 0; t < TOLERANCES; t++)
        print_message("%.0e: worst entry %.2g of the tolerance, %zu points\n", tolerances[t], worst[t], points[t]);
}

static void test_random_linear(void **state)
{
    (void)state;
    random_runs(RR_LINEAR, 1, 60);
}

static void test_random_mixed(void **state)
{
    (void)state;
    random_runs(RR_MIXED, 1, 60);
}

/* ---- wider networks --------------------------------------------------------------------------------------- */

static const char *const networks[] = {
    "input 10; dense 60; relu; dense 60; relu; dense 3",
    "input 10; dense 40; leaky_relu; dense 40; hard_tanh; dense 40; abs; dense 3",
    "input 10; dense 80; relu6; dense 2",
    "input 1x10x10; conv 6 3x3 pad=1; relu; max_pool 2; conv 8 3x3 pad=1; relu; flatten; dense 3",
    "input 1x10x10; conv 6 3x3; hard_sigmoid; max_pool 3 stride=2; residual( conv 6 3x3 pad=1; relu ); global_avg_pool; "
    "dense 3",
    "input 10; dense 50; layer_norm; relu; dense 40; relu; dense 3",
    "input 1x8x8; conv 8 3x3 pad=1; group_norm 2; relu; max_pool 2; conv 8 3x3 pad=1; relu; flatten; dense 3",
    "input 5x6; dense 12; position; residual( layer_norm; attention 2 ); residual( layer_norm; dense 40; relu; "
    "dense 12 ); mean_tokens; dense 3",
    "input 10; dense 50; tanh; dense 50; relu; dense 50; elu; dense 3",
};
static const char *const optimizers[] = {"sgd", "sgd momentum=0.9", "adam", "adamw"};

/* What wide networks save depends on how many kinks a step has; over all of these, at least so much. */
static void test_networks(void **state)
{
    tally all;
    (void)state;
    memset(&all, 0, sizeof all);
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (size_t o = 0; o < sizeof optimizers / sizeof *optimizers; o++)
            for (int small = 0; small < 2; small++) {
                rr_recipe recipe =
                    rr_plain(networks[n], optimizers[o], o % 2 ? PK_SOFTMAX_CROSS_ENTROPY : PK_SQUARED, 0, 10 * n + o);
                rr_run r;
                char what[1200];
                recipe.pace = small ? 0.01 : 0.1;
                recipe.rows = 2;
                rr_build(&recipe, &r);
                snprintf(what, sizeof what, "%s, %s, steps of %g", r.network, r.optimizer, recipe.pace);
                check(what, &r.context, &r.run, r.inputs, r.rows, NULL, &all);
                rr_free(&r);
            }
    tell("wide networks", &all);
    assert_true(4 * all.points[0] <= all.points[TOLERANCES]);
    assert_true(3 * all.points[1] <= 2 * all.points[TOLERANCES]);
    assert_true(all.points[2] < all.points[TOLERANCES]);
}

/* One output alone: fewer closures judge. */
static void test_one_output(void **state)
{
    const pk_readout one = {.kind = PK_READOUT_ONE, .output = 1};
    tally all;
    (void)state;
    memset(&all, 0, sizeof all);
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (uint64_t seed = 0; seed < 4; seed++) {
            rr_recipe recipe = rr_plain(networks[n], optimizers[seed], PK_SOFTMAX_CROSS_ENTROPY, 0, 500 + 10 * n + seed);
            rr_run r;
            recipe.pace = 0.05;
            recipe.rows = 3;
            rr_build(&recipe, &r);
            check(r.network, &r.context, &r.run, r.inputs, r.rows, &one, &all);
            rr_free(&r);
        }
    tell("one output", &all);
}

/* ---- adversaries: steps that no training makes -------------------------------------------------------------- */

enum { STEPS = 3, EXAMPLES = 5 };

/* A run of SGD whose weights are given: (STEPS + 1) x P numbers. */
typedef struct forced {
    pk_context context;
    pk_run run;
    pk_real *weights, *inputs;
    size_t rows;
} forced;

static void force(const char *network, size_t rows, forced *f)
{
    char small[200];
    bf_run brute;
    const bf_recipe recipe = fixture_recipe(21, EXAMPLES, STEPS, 4, 0.1);
    pk_graph graph;
    memset(f, 0, sizeof *f);
    memset(&graph, 0, sizeof graph);
    f->context.threads = 1;
    assert_ok(&f->context, pk_network_parse(&f->context, network, &graph));
    snprintf(small, sizeof small, "input %zu; dense %zu", graph.input_width, graph.output_width);
    fixture_make(small, BF_SQUARED, "sgd", &recipe, &brute);
    fixture_open(&f->context, &brute, &f->run);
    pk_graph_release(&f->context, &f->run.graph);
    pk_array_release(&f->context, &f->run.weights);
    const size_t P = graph.parameters, shape[2] = {STEPS + 1, P};
    f->weights = FIXTURE_NEW(pk_real, (STEPS + 1) * P);
    f->run.graph = graph;
    f->run.parameters = P;
    f->run.weights = pk_array_view(REAL_TYPE, 2, shape, f->weights);
    f->rows = rows;
    f->inputs = fixture_normals(23, rows * graph.input_width, 1);
    bf_run_free(&brute);
}

static void drop(forced *f)
{
    pk_run_release(&f->context, &f->run);
    free(f->weights);
    free(f->inputs);
    assert_int_equal(f->context.memory_used, 0);
}

/* Random walks of the weights, with steps of any size. */
static void walk(forced *f, double size, uint64_t seed)
{
    const size_t P = f->run.parameters;
    for (size_t i = 0; i < (STEPS + 1) * P; i++)
        f->weights[i] = (pk_real)(i < P ? 0.5 * bf_normal(&seed) : f->weights[i - P] + size * bf_normal(&seed));
}

static const char *const small_networks[] = {
    "input 4; dense 8; relu; dense 6; relu; dense 2",
    "input 4; dense 6; hard_tanh; dense 6; leaky_relu; dense 2",
    "input 1x4x4; conv 2 3x3 pad=1; relu; max_pool 2; flatten; dense 2",
    "input 4; dense 6; layer_norm; relu; dense 2",
    "input 3x4; residual( attention 2 ); residual( dense 6; relu; dense 4 ); mean_tokens; dense 2",
};

/* Large steps, up to 1e6 times the weights, and steps of zero between others. */
static void test_rough_steps(void **state)
{
    static const double sizes[] = {0, 1e-12, 1e-4, 1, 1e6};
    tally all;
    (void)state;
    memset(&all, 0, sizeof all);
    for (size_t n = 0; n < sizeof small_networks / sizeof *small_networks; n++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int still = 0; still < 2; still++) {
                forced f;
                char what[400];
                force(small_networks[n], 2, &f);
                walk(&f, sizes[s], 10 * n + s);
                const size_t P = f.run.parameters;
                if (still) /* the step between the others does not move */
                    memcpy(f.weights + 2 * P, f.weights + P, P * sizeof *f.weights);
                snprintf(what, sizeof what, "%s, steps of %g%s", small_networks[n], sizes[s], still ? ", one of 0" : "");
                check(what, &f.context, &f.run, f.inputs, f.rows, NULL, &all);
                drop(&f);
            }
    tell("rough steps", &all);
}

/* One unit carries nearly all of the output, and its kink stands where it is put: in the middle of a step, near one of its ends, or
 * in every place where a rule has a node or a stretch of it ends. Other units hardly move. */
static void test_one_huge_kink(void **state)
{
    static const double places[] = {0.5,  1e-2,    1 - 1e-2, 1e-4,  1 - 1e-4,     1 - 1e-8,    0.25,
                                    0.75, 1.0 / 3, 0.123,    0.877, 0.2113248654, 0.7886751346};
    tally all;
    (void)state;
    memset(&all, 0, sizeof all);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        for (int deep = 0; deep < 2; deep++)
            for (int off = 0; off < 2; off++) {
                forced f;
                char what[100];
                force(deep ? "input 4; dense 30; relu; dense 30; relu; dense 2" : "input 4; dense 30; relu; dense 2", 1, &f);
                walk(&f, 1e-3, i);
                const size_t P = f.run.parameters;
                /* Unit 0 of the first layer: its bias takes it from z to z (1 - 1/place). */
                const pk_node *layer = pk_graph_layer(&f.run.graph, 0), *second = pk_graph_layer(&f.run.graph, 1);
                for (size_t s = 0; s <= STEPS; s++) {
                    pk_real *w = f.weights + s * P;
                    memset(w, 0, 4 * sizeof *w);
                    const double before = off ? -1 : 1, after = before * (1 - 1 / places[i]);
                    w[layer->weight_offset + 30 * 4] = (pk_real)(s % 2 ? after : before);
                    for (size_t k = 0; k < second->fan_out; k++)
                        w[second->weight_offset + k * 30] = (pk_real)(100 + s);
                }
                snprintf(what, sizeof what, "a kink at %g, %d layers", places[i], deep + 1);
                check(what, &f.context, &f.run, f.inputs, f.rows, NULL, &all);
                drop(&f);
            }
    tell("one huge kink", &all);
}

/* A unit that crosses its kink and comes back within a step has the same sign at both ends: the second layer's unit is the
 * difference of two units of the first that grow one after the other. */
static void test_there_and_back(void **state)
{
    tally all;
    (void)state;
    memset(&all, 0, sizeof all);
    for (int i = 0; i < 40; i++) {
        forced f;
        uint64_t seed = (uint64_t)i + 1;
        char what[100];
        force("input 1; dense 2; relu; dense 1; relu; dense 1", 1, &f);
        f.inputs[0] = 1;
        const double early = 0.05 + 0.4 * bf_uniform(&seed), late = early + 0.05 + 0.4 * bf_uniform(&seed),
                     height = 0.3 * bf_uniform(&seed);
        for (size_t s = 0; s <= STEPS; s++) {
            /* dense 2: weights (2), biases (2); dense 1: weights (2), bias; dense 1: weight, bias. At t both units are
             * max(0, t - early) and max(0, t - late); the third is -height + the first - 3 times the second. */
            const double t = s % 2;
            const double w[9] = {t, t, -early, -late, 1, -3, -height * early, 1 + 0.1 * t, 0.1};
            for (size_t p = 0; p < 9; p++)
                f.weights[s * 9 + p] = (pk_real)w[p];
        }
        assert_int_equal(f.run.parameters, 9);
        snprintf(what, sizeof what, "there at %g and back at %g", early, late);
        check(what, &f.context, &f.run, f.inputs, f.rows, NULL, &all);
        drop(&f);
    }
    tell("there and back", &all);
}

/* ---- what a tolerance does not change ----------------------------------------------------------------------- */

/* Bits do not depend on threads or on the rows that go together; entries agree under every engine. */
static void test_same_results(void **state)
{
    static const pk_engine engines[] = {PK_ENGINE_AUTO, PK_ENGINE_FACTORED, PK_ENGINE_HEAD, PK_ENGINE_INTEGRATED};
    (void)state;
    for (size_t n = 0; n < sizeof networks / sizeof *networks; n++)
        for (int momentum = 0; momentum < 2; momentum++) {
            rr_recipe recipe = rr_plain(networks[n], optimizers[momentum], PK_SQUARED, 0, 70 + n);
            rr_run r;
            pk_decomposition first, other;
            recipe.rows = 12;
            recipe.pace = 0.1;
            rr_build(&recipe, &r);
            const pk_matrix inputs = pk_matrix_view(r.inputs, r.rows, r.run.graph.input_width);
            for (int way = 0; way < 8; way++) {
                pk_decompose_options options;
                memset(&options, 0, sizeof options);
                options.tolerance = 1e-3;
                options.keep[0] = PK_BY_EXAMPLE;
                options.engine = engines[way % 4];
                options.bounds = way == 7;
                options.rows_at_once = way == 5 ? 1 : 0;
                r.context.threads = way == 4 ? 3 : 1;
                if (way == 7)
                    options.engine = PK_ENGINE_AUTO;
                if (way == 6) {
                    options.engine = PK_ENGINE_AUTO;
                    options.readout = (pk_readout){.kind = PK_READOUT_ALL};
                }
                if (way == 5)
                    options.engine = PK_ENGINE_AUTO;
                assert_ok(&r.context, pk_decompose(&r.context, &r.run, inputs, &options, &other));
                const size_t entries = other.rows * other.outputs * other.examples;
                if (way == 0) {
                    first = other;
                    continue;
                }
                assert_int_equal(other.points >= first.points, 1);
                if (way >= 4 && way < 7)
                    assert_memory_equal(other.by_example, first.by_example, entries * sizeof(double));
                assert_true(worst_entry(&first, &other) <= ROUNDING(1e-11));
                for (size_t i = 0; way == 7 && i < entries; i++)
                    assert_true(other.bounds[i] > 0 || other.by_example[i] == 0);
                pk_decomposition_release(&r.context, &other);
            }
            pk_decomposition_release(&r.context, &first);
            rr_free(&r);
        }
}

/* The exact rule is exact at any tolerance, and the default is as exact as 1e-10. */
static void test_exact(void **state)
{
    rr_recipe recipe = rr_plain(networks[0], "sgd", PK_SQUARED, 0, 3);
    rr_run r;
    pk_decomposition results[4];
    (void)state;
    rr_build(&recipe, &r);
    const pk_matrix inputs = pk_matrix_view(r.inputs, r.rows, r.run.graph.input_width);
    for (int way = 0; way < 4; way++) {
        pk_decompose_options options;
        memset(&options, 0, sizeof options);
        options.keep[0] = PK_BY_EXAMPLE;
        options.tolerance = way == 1 ? PK_TOLERANCE : way == 2 ? 1e-1 : way == 3 ? 2 * PK_TOLERANCE : 0;
        options.quadrature.rule = way == 2 ? PK_RULE_EXACT : PK_RULE_AUTO;
        assert_ok(&r.context, pk_decompose(&r.context, &r.run, inputs, &options, &results[way]));
        if (way && way < 3) {
            assert_int_equal(results[way].points, results[0].points);
            assert_memory_equal(results[way].by_example, results[0].by_example,
                                results[0].rows * results[0].outputs * results[0].examples * sizeof(double));
        }
    }
    for (int way = 0; way < 4; way++)
        pk_decomposition_release(&r.context, &results[way]);
    rr_free(&r);
}

int main(void)
{
#ifdef PATHKERNEL_FLOAT
    print_message("nothing to do: these runs and their tolerances are for double\n");
    return 0;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_linear), cmocka_unit_test(test_random_mixed), cmocka_unit_test(test_networks),
        cmocka_unit_test(test_one_output),    cmocka_unit_test(test_rough_steps),  cmocka_unit_test(test_one_huge_kink),
        cmocka_unit_test(test_there_and_back), cmocka_unit_test(test_same_results), cmocka_unit_test(test_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
