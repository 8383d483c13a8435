/* Quadrature: nodes against known values, degrees of exactness, orders of convergence, adaptive and exact
 * rules, and what they do where the target cannot be met. */
#include "fixture.h"

/* The text of each rule, with and without a number of nodes. */
static void test_names(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        pk_quadrature means;
    } good[] = {{"auto", {PK_RULE_AUTO, 0}},
                {"exact", {PK_RULE_EXACT, 0}},
                {"gauss:4", {PK_RULE_GAUSS, 4}},
                {"midpoint:100", {PK_RULE_MIDPOINT, 100}},
                {"trapezoid:2", {PK_RULE_TRAPEZOID, 2}},
                {"left", {PK_RULE_LEFT, 0}},
                {"left:3", {PK_RULE_LEFT, 3}},
                {"midpoint:1000000", {PK_RULE_MIDPOINT, 1000000}}};
    static const char *const bad[] = {"",
                                      "simpson",
                                      "gauss",
                                      "gauss:",
                                      "gauss:0",
                                      "gauss:4x",
                                      "gauss:-1",
                                      "auto:4",
                                      "midpoint:1000001",
                                      "left:",
                                      "gauss:4:4",
                                      "Gauss:4",
                                      "exact:1",
                                      "midpoint:99999999999999999999",
                                      "trapezoid:1",
                                      "gauss:33"};
    static const char *const bad_kernels[] = {"left:1", "left:2", "exact",    "trapezoid:1", "gauss:1001",
                                              "gauss",  "auto:2", "midpoint", "midpoint:0",  "trapezoid:"};
    pk_context context;
    memset(&context, 0, sizeof context);
    pk_quadrature read = {PK_RULE_MIDPOINT, 7};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_ok(&context, pk_quadrature_parse(&context, good[i].text, &read));
        assert_true(read.rule == good[i].means.rule && read.nodes == good[i].means.nodes);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_refused(&context, PK_FORMAT,
                       "auto, exact, gauss:N (1 to 32), midpoint:N (1 to 1000000), trapezoid:N (2 to 1000000), "
                       "left[:N] (1 to 1000000)",
                       pk_quadrature_parse(&context, bad[i], &read));
    assert_true(read.rule == PK_RULE_MIDPOINT && read.nodes == 1000000);
    /* Kernels take other numbers: what is refused of them is not in the list. */
    for (size_t i = 0; i < sizeof bad_kernels / sizeof *bad_kernels; i++)
        assert_refused(&context, PK_FORMAT,
                       "these are: auto, gauss:N (1 to 1000), midpoint:N (1 to 1000000), trapezoid[:N] (2 to "
                       "1000000), left",
                       pk_kernel_rule_parse(&context, bad_kernels[i], &read));
    assert_true(read.rule == PK_RULE_MIDPOINT && read.nodes == 1000000);
    assert_ok(&context, pk_kernel_rule_parse(&context, "trapezoid", &read));
    assert_true(read.rule == PK_RULE_TRAPEZOID && read.nodes == 0);
    assert_ok(&context, pk_kernel_rule_parse(&context, "gauss:1000", &read));
    assert_true(read.rule == PK_RULE_GAUSS && read.nodes == 1000);
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_quadrature_parse(&context, NULL, &read));
    int rules = 0;
    while (pk_rule_name((pk_rule)rules))
        rules++;
    assert_int_equal(rules, 6);
    assert_null(pk_rule_name((pk_rule)-1));
}

/* NIST DLMF 3.5(v): zeros and weights of the Legendre polynomials on [-1, 1]. */
static void test_gauss_nodes(void **state)
{
    (void)state;
    static const double x5[] = {0.90617984593866399280, 0.53846931010568309104, 0};
    static const double w5[] = {0.23692688505618908751, 0.47862867049936646804, 0.56888888888888888889};
    static const double x10[] = {0.97390652851717172008, 0.86506336668898451073, 0.67940956829902440623,
                                 0.43339539412924719080, 0.14887433898163121089};
    static const double w10[] = {0.066671344308688137594, 0.14945134915058059315, 0.21908636251598204400,
                                 0.26926671930999635509, 0.29552422471475287017};
    double x[64], w[64];
    pk_gauss_legendre(1, x, w);
    assert_true(x[0] == 0.5 && w[0] == 1);
    pk_gauss_legendre(2, x, w);
    assert_close(x[0], 0.5 - 0.5 / sqrt(3.0), 1e-16);
    assert_close(w[0], 0.5, 1e-16);
    pk_gauss_legendre(5, x, w);
    for (int i = 0; i < 3; i++) {
        assert_close(x[4 - i], (1 + x5[i]) / 2, 1.2e-16);
        assert_close(x[i], (1 - x5[i]) / 2, 1.2e-16);
        assert_close(w[i], w5[i] / 2, 1.2e-16);
        assert_close(w[4 - i], w5[i] / 2, 1.2e-16);
    }
    pk_gauss_legendre(10, x, w);
    for (int i = 0; i < 5; i++) {
        assert_close(x[9 - i], (1 + x10[i]) / 2, 1.2e-16);
        assert_close(w[9 - i], w10[i] / 2, 1.2e-16);
    }
    for (int n = 1; n <= 64; n++) { /* exact for t^m, m <= 2 n - 1, and ascending */
        pk_gauss_legendre(n, x, w);
        for (int m = 0; m <= 2 * n - 1; m++) {
            long double sum = 0;
            for (int i = 0; i < n; i++)
                sum += w[i] * powl((long double)x[i], m);
            assert_close(sum, 1.0L / (m + 1), 4e-16);
        }
        long double sum = 0;
        for (int i = 0; i < n && n <= 12; i++)
            sum += w[i] * powl((long double)x[i], 2 * n);
        assert_true(n > 12 || fabsl(sum - 1.0L / (2 * n + 1)) > 1e-16L); /* and not beyond */
        for (int i = 1; i < n; i++)
            assert_true(x[i] > x[i - 1] && w[i] > 0);
        assert_true(x[0] > 0 && x[n - 1] < 1);
    }
    double table_x[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2],
        table_w[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2];
    pk__gauss_table(table_x, table_w);
    for (int n = 1; n <= PK_GAUSS_NODES; n++) {
        pk_gauss_legendre(n, x, w);
        assert_memory_equal(x, table_x + n * (n - 1) / 2, (size_t)n * sizeof *x);
        assert_memory_equal(w, table_w + n * (n - 1) / 2, (size_t)n * sizeof *w);
    }
    pk_gauss_legendre(32, x, w);
    double *many = FIXTURE_NEW(double, 2000);
    pk_gauss_legendre(1000, many, many + 1000);
    long double sum = 0;
    for (int i = 0; i < 1000; i++)
        sum += many[1000 + i] * expl(many[i]);
    assert_close(sum, expl(1.0L) - 1, 1e-15);
    free(many);
}

/* One step from random weights in a random direction of some length, as a run. */
typedef struct step {
    pk_context context;
    pk_run run;
    pk_real *inputs, *weights;
    size_t rows;
} step;

static void make_step(step *s, const char *network, double length, uint64_t seed, size_t rows)
{
    bf_run brute;
    char small[64];
    pk_graph graph;
    const bf_recipe recipe = fixture_recipe(seed, 4, 1, 0, 0.01);
    memset(s, 0, sizeof *s);
    memset(&graph, 0, sizeof graph);
    s->context.threads = 1;
    assert_ok(&s->context, pk_network_parse(&s->context, network, &graph));
    /* A recording of a small network with the same inputs and outputs, with graph and weights replaced. */
    snprintf(small, sizeof small, "input %zu; dense %zu", graph.input_width, graph.output_width);
    fixture_make(small, BF_SQUARED, "sgd", &recipe, &brute);
    fixture_open(&s->context, &brute, &s->run);
    pk_graph_release(&s->context, &s->run.graph);
    pk_array_release(&s->context, &s->run.weights);
    const size_t P = graph.parameters, shape[2] = {2, P};
    pk_real *direction = fixture_normals(seed + 5, P, length);
    s->weights = FIXTURE_NEW(pk_real, 2 * P);
    assert_ok(&s->context, pk_network_initialize(&s->context, &graph, seed, s->weights));
    for (size_t p = 0; p < P; p++)
        s->weights[P + p] = s->weights[p] + direction[p];
    s->run.graph = graph;
    s->run.parameters = P;
    s->run.weights = pk_array_view(REAL_TYPE, 2, shape, s->weights);
    s->rows = rows;
    s->inputs = fixture_normals(seed + 9, rows * graph.input_width, 1);
    free(direction);
    bf_run_free(&brute);
}

static void drop_step(step *s)
{
    pk_run_release(&s->context, &s->run);
    free(s->inputs);
    free(s->weights);
}

/* The worst closure of the step with a rule: relative, or as it is. */
static double measure(step *s, pk_rule rule, int nodes, int relative, size_t *points, size_t *refused)
{
    pk_decompose_options options;
    pk_decomposition out;
    memset(&options, 0, sizeof options);
    options.unattributed = (double)INFINITY; /* no rule made these steps */
    options.quadrature.rule = rule;
    options.quadrature.nodes = nodes;
    pk_status status = pk_decompose(
        &s->context, &s->run, pk_matrix_view(s->inputs, s->rows, s->run.graph.input_width), &options, &out);
    if (status != PK_NOT_CLOSED)
        assert_ok(&s->context, status);
    double worst = relative ? out.worst_closure : out.worst_step_closure;
    if (points)
        *points = out.points;
    if (refused)
        *refused = out.refused;
    pk_decomposition_release(&s->context, &out);
    return worst;
}

/* The worst closure of the step with a rule, of the largest output or change of its row. */
static double closure(step *s, pk_rule rule, int nodes, size_t *points, size_t *refused)
{
    return measure(s, rule, nodes, 1, points, refused);
}

static const char smooth[] = "input 3; dense 6; tanh; dense 5; tanh; dense 2";

/* Composite rules: error ~ nodes^-order. */
static void test_orders(void **state)
{
    (void)state;
    static const struct {
        pk_rule rule;
        double order;
        const char *name;
    } rules[] = {
        {PK_RULE_LEFT, 1, "left"}, {PK_RULE_MIDPOINT, 2, "midpoint"}, {PK_RULE_TRAPEZOID, 2, "trapezoid"}};
    step s;
    make_step(&s, smooth, 0.3, 1, 1);
    enum { INTERVALS = EITHER(64, 8) }; /* as many as leave an error beyond rounding */
    for (int r = 0; r < 3; r++) {
        const int points_per_interval = rules[r].rule == PK_RULE_TRAPEZOID;
        size_t points;
        double before = closure(&s, rules[r].rule, INTERVALS + points_per_interval, &points, NULL);
        double after = closure(&s, rules[r].rule, 2 * INTERVALS + points_per_interval, NULL, NULL);
        assert_int_equal(points, INTERVALS + points_per_interval);
        print_message("%s: order %.3f (closure %.3g with %d intervals)\n", rules[r].name, log2(before / after),
                      after, 2 * INTERVALS);
        assert_close(log2(before / after), rules[r].order, 0.05);
    }
    /* Defaults: one node; the trapezoid two. Midpoint and Gauss with one node are the same. */
    size_t points;
    assert_close(closure(&s, PK_RULE_MIDPOINT, 0, &points, NULL), closure(&s, PK_RULE_GAUSS, 1, NULL, NULL),
                 ROUNDING(1e-15));
    assert_int_equal(points, 1);
    (void)closure(&s, PK_RULE_TRAPEZOID, 0, &points, NULL);
    assert_int_equal(points, 2);
    (void)closure(&s, PK_RULE_LEFT, 0, &points, NULL);
    assert_int_equal(points, 1);
    drop_step(&s);
    /* Gauss with n nodes: error ~ length^(2 n + 1). */
    static const double lengths[5] = {0, 0.02, 0.04, 0.06, 0.05};
    for (int n = 1; n <= EITHER(4, 2); n++) { /* of three nodes, float sees its own rounding */
        double error[2];
        for (int half = 0; half < 2; half++) {
            make_step(&s, smooth, (half ? 0.5 : 1) * lengths[n], 3, 30);
            error[half] = measure(&s, PK_RULE_GAUSS, n, 0, NULL, NULL);
            drop_step(&s);
        }
        print_message("gauss %d: order %.2f in the length of the step (closure %.3g)\n", n,
                      log2(error[0] / error[1]), error[1]);
        assert_close(log2(error[0] / error[1]), 2 * n + 1, 0.7);
    }
}

/* What is polynomial is exact: affine with one node of any symmetric rule, the exact rule for all kinks. */
static void test_exact(void **state)
{
    (void)state;
    static const char *const affine[] = {"input 3; dense 2", "input 3; dense 2 nobias",
                                         "input 3; dense 4; dense 2", "input 3; tanh; dense 2"};
    step s;
    size_t points, refused;
    for (size_t n = 0; n < 4; n++) {
        make_step(&s, affine[n], 3, n, 4);
        assert_true(closure(&s, PK_RULE_GAUSS, 1, NULL, NULL) <= ROUNDING(1e-14));
        assert_true(closure(&s, PK_RULE_AUTO, 0, &points, NULL) <= ROUNDING(1e-14));
        assert_int_equal(points, 4); /* one node a row */
        if (n != 2)                  /* not two layers */
            assert_true(closure(&s, PK_RULE_LEFT, 1, NULL, NULL) <= ROUNDING(1e-14));
        drop_step(&s);
    }
    static const char *const kinked[] = {
        "input 3; dense 6; relu; dense 2",
        "input 3; dense 6; abs; dense 6; relu; dense 2",
        "input 3; dense 6; hard_tanh; dense 6; leaky_relu 0.3; dense 6; relu; dense 2",
        "input 3; dense 5; relu; dense 5; abs; dense 5; relu; dense 5; relu; dense 2",
        "input 3; dense 4; relu; dense 4; relu; dense 4; relu; dense 4; relu; dense 4; relu; dense 2",
        "input 3; dense 6; relu; dense 2; hard_tanh",
    };
    double worst = 0;
    for (size_t n = 0; n < sizeof kinked / sizeof *kinked; n++)
        for (uint64_t seed = 0; seed < 4; seed++) {
            make_step(&s, kinked[n], seed == 3 ? 10 : 1, 10 + seed, 5);
            double error = closure(&s, PK_RULE_EXACT, 0, &points, &refused);
            worst = fmax(worst, error);
            assert_int_equal(refused, 0);
            assert_close(closure(&s, PK_RULE_AUTO, 0, NULL, NULL), error, 0); /* auto chooses it */
            drop_step(&s);
        }
    print_message("exact rule: worst closure %.3g of the output\n", worst);
    assert_true(worst <= ROUNDING(1e-12));
}

/* Adaptive: smooth and mixed networks along steps of all lengths. */
static void test_adaptive(void **state)
{
    (void)state;
    static const char *const networks[] = {
        smooth,
        "input 3; dense 6; tanh; dense 5; relu; dense 2",
        "input 3; dense 6; relu; dense 5; tanh; dense 4; abs; dense 2",
        "input 3; dense 6; gelu; dense 5; silu; dense 2",
        "input 3; dense 6; erf; dense 5; hard_tanh; dense 2",
        "input 3; dense 6; softplus 5; dense 5; sigmoid; dense 2",
        "input 3; dense 8; sigmoid; dense 8; leaky_relu 0.1; dense 8; tanh; dense 2; relu"};
    static const double lengths[] = {1e-6, 0.01, 1, 30};
    for (size_t l = 0; l < 4; l++) {
        size_t most = 0, given_up = 0;
        double worst = 0;
        for (size_t n = 0; n < sizeof networks / sizeof *networks; n++) {
            step s;
            size_t points, refused;
            make_step(&s, networks[n], lengths[l], 40 + n, 5);
            double error = closure(&s, PK_RULE_AUTO, 0, &points, &refused);
            worst = fmax(worst, error);
            most = points > most ? points : most;
            given_up += refused;
            drop_step(&s);
        }
        print_message("adaptive, length %g: worst closure %.3g, at most %zu points for 5 rows, %zu refused\n",
                      lengths[l], worst, most, given_up);
        assert_true(worst <= ROUNDING(1e-12));
    }
}

/* More kinks in a row's step than there is room for at one time: split by halves, still exact. */
static void test_many_kinks(void **state)
{
    (void)state;
    step s;
    size_t points, refused;
    make_step(&s, "input 2; dense 2500; hard_tanh; dense 1", 30, 2, 1);
    double error = closure(&s, PK_RULE_EXACT, 0, &points, &refused);
    assert_true(points > 64 + 1024); /* the room of one row */
    assert_int_equal(refused, 0);
    assert_true(error <= ROUNDING(1e-12));
    drop_step(&s);
}

/* A readout with a jump, and one of NaN: bounded work, and the result says that it did not close. */
static void jump(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope)
{
    (void)row;
    h[0] = *(const int *)user ? (double)NAN : f[0] > 0.01 ? 1 : 0;
    slope[0] = slope[1] = 0;
}

static void test_hopeless(void **state)
{
    (void)state;
    for (int nan = 0; nan < 2; nan++) {
        step s;
        pk_decomposition out;
        pk_decompose_options options;
        make_step(&s, smooth, 3, 8, 8);
        memset(&options, 0, sizeof options);
        options.readout.kind = PK_READOUT_FUNCTION;
        options.readout.count = 1;
        options.readout.function = jump;
        options.readout.user = &nan;
        assert_refused(&s.context, PK_NOT_CLOSED, "row",
                       pk_decompose(&s.context, &s.run, pk_matrix_view(s.inputs, 8, 3), &options, &out));
        assert_true(out.refused > 0);
        assert_true(nan ? isnan(out.worst_closure) : out.worst_closure > 0.5);
        assert_true(out.points < 2000000);
        pk_decomposition_release(&s.context, &out);
        drop_step(&s);
    }
}

/* ---- points that are pulled ---- */

enum { PULLED_ROWS = 5, PULLED_POINTS = PK_GAUSS_NODES + 2 };

/* All points of the step that the path is at; how many, and in how many batches of PULLED_POINTS. */
static size_t pull_step(pk__integrator *integrator, size_t *batches)
{
    const pk__points *points;
    double sum[PULLED_ROWS] = {0};
    size_t count = 0;
    int last = 0;
    *batches = 0;
    integrator->point_count = 0;
    pk__integrator_begin(integrator);
    while (pk__integrator_next(integrator, &points)) {
        assert_false(last);
        last = points->last;
        assert_true(last ? points->count <= PULLED_POINTS : points->count == PULLED_POINTS);
        for (size_t p = 0; p < points->count; p++) {
            assert_true(points->row[p] < PULLED_ROWS);
            assert_true(points->t[p] >= 0 && points->t[p] <= 1);
            sum[points->row[p]] += (double)points->weight[p];
        }
        /* As the caller does it: the tape then holds these points, whatever it held before. */
        if (points->count)
            pk__path_forward(&integrator->path, points->count, points->row, points->t);
        count += points->count;
        ++*batches;
    }
    assert_true(last);
    assert_false(pk__integrator_next(integrator, &points));
    assert_int_equal(count, integrator->point_count);
    for (size_t r = 0; r < PULLED_ROWS; r++)
        assert_close(sum[r], 1, ROUNDING(1e-12));
    return count;
}

static void pulled_layout(pk__arena *arena, const pk_graph *graph, pk__integrator *integrator)
{
    const size_t table = PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2;
    double *nodes = pk__arena_take(arena, table, sizeof(double)),
           *weights = pk__arena_take(arena, table, sizeof(double));
    pk__integrator_take(arena, graph, PULLED_ROWS, PULLED_POINTS, PULLED_POINTS, graph->output_width, 0,
                        integrator);
    integrator->state = pk__arena_take(arena, PULLED_ROWS, sizeof *integrator->state);
    integrator->gauss_nodes = nodes;
    integrator->gauss_weights = weights;
    if (nodes)
        pk__gauss_table(nodes, weights);
}

/* Batches are full but for the last, which says so; the weights of each row sum to the length of the step. */
static void test_pulled(void **state)
{
    (void)state;
    static const struct {
        const char *network;
        pk_quadrature quadrature;
        double target;
        size_t least, most; /* points */
    } cases[] = {
        {"input 3; dense 4; tanh; dense 2", {PK_RULE_LEFT, 0}, 0, PULLED_ROWS, PULLED_ROWS},
        {"input 3; dense 4; tanh; dense 2", {PK_RULE_MIDPOINT, 100}, 0, 500, 500},
        {"input 3; dense 4; tanh; dense 2", {PK_RULE_TRAPEZOID, 34}, 0, 170, 170},
        {"input 3; dense 4; tanh; dense 2", {PK_RULE_GAUSS, 7}, 0, 35, 35},
        {"input 3; dense 4; tanh; dense 2", {PK_RULE_AUTO, 0}, 1e-4, 10, 300},
        {"input 3; dense 4; tanh; dense 2",
         {PK_RULE_AUTO, 0},
         0,
         10,
         100000}, /* unreachable: pieces are halved */
        {"input 3; dense 40; relu; dense 40; relu; dense 2", {PK_RULE_EXACT, 0}, 0, 200, 2000},
        {"input 3; dense 9; relu; dense 4; gelu; dense 2", {PK_RULE_AUTO, 0}, 1e-6, 30, 3000},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_context context;
        pk_graph graph;
        pk__integrator integrator;
        pk__arena arena = {NULL, 0, 0, 0};
        void *memory = NULL;
        size_t batches;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        assert_ok(&context, pk_network_parse(&context, cases[i].network, &graph));
        pulled_layout(&arena, &graph, &integrator);
        assert_ok(&context, pk_allocate(&context, arena.used, 1, "an integrator", &memory));
        pk__arena own = {memory, arena.used, 0, 0};
        pulled_layout(&own, &graph, &integrator);
        integrator.quadrature = cases[i].quadrature;
        integrator.target = cases[i].target;
        memset(integrator.state, 0, PULLED_ROWS * sizeof *integrator.state);
        for (size_t r = 0; r < PULLED_ROWS; r++)
            integrator.state[r].order.nodes = PK__FIRST_NODES;
        pk_real *w = fixture_normals(i + 1, graph.parameters, 1),
                *d = fixture_normals(i + 2, graph.parameters, 1);
        pk_real *x = fixture_normals(i + 3, PULLED_ROWS * 3, 1);
        for (int again = 0; again < 2; again++) {
            pk__path_begin(&integrator.path, w, d, NULL, PULLED_ROWS, x);
            const size_t count = pull_step(&integrator, &batches);
            assert_true(count >= cases[i].least && count <= cases[i].most);
            const size_t full = count / PULLED_POINTS;
            assert_in_range(batches, count % PULLED_POINTS ? full + 1 : full, full + 1);
        }
        free(w), free(d), free(x);
        pk_release(&context, memory);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),    cmocka_unit_test(test_gauss_nodes), cmocka_unit_test(test_orders),
        cmocka_unit_test(test_exact),    cmocka_unit_test(test_adaptive),    cmocka_unit_test(test_many_kinks),
        cmocka_unit_test(test_hopeless), cmocka_unit_test(test_pulled),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
