/* pk_compare: its rules against plain loops over Jacobians, forward in time with one momentum for each example; the residuals and
 * orders of a published table; what holds for every network and optimizer; its calls. */
#include "trained.h"

enum {
    LEFT,
    SEGMENT,
    PATH_INTEGRAL,
    TRAPEZOID,
    MIDPOINT,
    CHECKPOINTS,
    LINEAR_START,
    LINEAR_END,
    TELESCOPING,
    EXACT,
    PARTS = 512, /* of the integrals of networks with kinks, by the trapezoid rule */
    GAUSS = 24   /* of those of smooth ones */
};
static const char *const names[PK_COMPARE_RULES] = {"left",        "segment",     "path_integral", "trapezoid",
                                                    "midpoint",    "checkpoints", "linear_start",  "linear_end",
                                                    "telescoping", "exact"};

/* ---- runs ---- */

enum { SEED = 7, TEST_ROWS = 40 };

typedef struct compared {
    recipe run;
    const char *groups[2];
    int float32;
} compared;

#define RUN(name, loss, optimizer, rows, batch, steps, keep_every, rate, clip, tokens, moments)  \
    {                                                                                            \
        name, loss, optimizer, tokens, rate, clip, rows, batch, steps, keep_every, SEED, moments \
    }

static void make(const compared *c, trained *t)
{
    const trained_more more = {c->groups, (c->groups[0] != NULL) + (c->groups[0] && c->groups[1]), TEST_ROWS,
                               c->float32};
    trained_make_with(&c->run, &more, t);
}

/* ---- by brute force ---- */

typedef struct brute {
    const pk_run *run;
    pk_matrix inputs;
    size_t P, C, N, cells;
    pk_real *w, *jacobian, *own, *gradient, *at, *sum, *update, *p, *f; /* w: (S + 1) x P */
    double *momentum, *share, *rest;                                    /* (N + 1) x P; decay is number N */
    double *contributions, *missed;
} brute;

static void brute_begin(trained *t, pk_matrix inputs, brute *b)
{
    const pk_run *run = &t->run;
    pk_replay replay;
    memset(b, 0, sizeof *b);
    b->run = run;
    b->inputs = inputs;
    b->P = run->parameters;
    b->C = run->outputs;
    b->N = run->examples;
    b->cells = inputs.rows * b->C;
    b->w = FIXTURE_NEW(pk_real, (run->steps + 1) * b->P);
    assert_ok(&t->context, pk_replay_prepare(&t->context, run, 0, &replay));
    for (size_t s = 0; s <= run->steps; s++)
        assert_ok(&t->context, pk_replay_weights(&t->context, &replay, s, b->w + s * b->P));
    pk_replay_release(&t->context, &replay);
    b->jacobian = FIXTURE_NEW(pk_real, b->cells * b->P);
    b->own = FIXTURE_NEW(pk_real, b->C * b->P);
    pk_real **const vectors[] = {&b->gradient, &b->at, &b->sum, &b->update, &b->p};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        *vectors[i] = FIXTURE_NEW(pk_real, b->P);
    b->f = FIXTURE_NEW(pk_real, b->cells + 3 * b->C + t->graph.input_width);
    b->momentum = FIXTURE_NEW(double, (b->N + 1) * b->P);
    b->share = FIXTURE_NEW(double, (b->N + 1) * b->P);
    b->rest = FIXTURE_NEW(double, b->P);
    b->contributions = FIXTURE_NEW(double, b->cells * b->N);
    b->missed = FIXTURE_NEW(double, b->cells);
}

static void brute_end(brute *b)
{
    free(b->w), free(b->jacobian), free(b->own), free(b->gradient), free(b->at), free(b->sum), free(b->update);
    free(b->p), free(b->f), free(b->momentum), free(b->share), free(b->rest), free(b->contributions);
    free(b->missed);
}

static void point(const brute *b, size_t s, double t, pk_real *at)
{
    const pk_real *w = b->w + s * b->P;
    for (size_t p = 0; p < b->P; p++)
        at[p] = (pk_real)(w[p] + (t != 0 ? t * ((double)w[b->P + p] - w[p]) : 0));
}

/* b->gradient: sum_k dl_i/df_k at the weights seeds_at, times df_k/dw at the weights at. */
static void example_gradient(brute *b, size_t i, const pk_real *seeds_at, const pk_real *at)
{
    const pk_graph *graph = &b->run->graph;
    const int64_t item = (int64_t)i;
    const pk_matrix none = {NULL, 0, 0, 0};
    pk_real *f = b->f + b->cells, *target = f + b->C, *seed = target + b->C, *x = seed + b->C;
    const pk_matrix row = pk_matrix_view(x, 1, graph->input_width);
    pk_dataset_inputs(&b->run->train, &item, 1, x);
    pk_criterion_targets(&b->run->criterion, &b->run->train, &item, 1, b->C, target);
    assert_ok(NULL, pk_graph_evaluate(NULL, graph, seeds_at, row, pk_matrix_view(f, 1, b->C)));
    pk_criterion_gradient(&b->run->criterion, b->C, f, target, seed);
    assert_ok(NULL, pk_jacobian(NULL, graph, at, row, pk_matrix_view(b->own, b->C, b->P), none));
    memset(b->gradient, 0, b->P * sizeof *b->gradient);
    for (size_t k = 0; k < b->C; k++)
        for (size_t p = 0; p < b->P; p++)
            b->gradient[p] += seed[k] * b->own[k * b->P + p];
}

/* How a rule takes one step at one point. */
typedef struct place {
    const pk_real *test_weights; /* or NULL: w_s(t) */
    double test_t, train_t;
    int seeds_stay, sparse;
} place;

/* Adds weight times the contributions at one place, and takes them off missed. */
static void brute_add(brute *b, const place *at, double weight)
{
    const pk_run *run = b->run;
    const size_t P = b->P, N = b->N, S = run->steps;
    const pk_matrix none = {NULL, 0, 0, 0};
    const pk_parameter_range all = {0, P, 0}, *ranges = run->groups.count ? run->groups.range : &all;
    const size_t range_count = run->groups.count ? run->groups.range_count : 1;
    pk_real *state = FIXTURE_NEW(pk_real, 3 * P);
    memset(b->momentum, 0, (N + 1) * P * sizeof *b->momentum);
    for (size_t s = 0; s < S; s++) {
        const double scale = pk_run_gradient_scale(run, s), *rates = pk_run_group_rates(run, s);
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        memset(b->share, 0, (N + 1) * P * sizeof *b->share);
        memset(b->sum, 0, P * sizeof *b->sum);
        for (size_t i = 0; i < N; i++) {
            double c = 0;
            for (size_t k = 0; k < batch.count; k++)
                if ((size_t)batch.items[k] == i)
                    c += batch.weights ? batch.weights[k] : 1 / (double)batch.count;
            if (c == 0)
                continue;
            example_gradient(b, i, b->w + s * P, b->w + s * P);
            for (size_t p = 0; p < P; p++)
                b->sum[p] += (pk_real)(c * b->gradient[p]);
            if (at->train_t != 0) {
                point(b, s, at->train_t, b->at);
                example_gradient(b, i, at->seeds_stay ? b->w + s * P : b->at, b->at);
            }
            for (size_t p = 0; p < P; p++)
                b->share[i * P + p] = scale * c * b->gradient[p];
        }
        double test_weight = weight;
        if (at->sparse && S > 10) {
            test_weight = 0;
            for (size_t k = 0; k < 10; k++)
                if (k * S / 10 == s)
                    test_weight = weight * (double)S / 10;
        }
        point(b, s, at->test_t, b->at);
        assert_ok(NULL, pk_jacobian(NULL, &run->graph, at->test_weights ? at->test_weights : b->at, b->inputs,
                                    pk_matrix_view(b->jacobian, b->cells, P), none));
        for (size_t r = 0; r < range_count; r++) {
            const size_t g = ranges[r].group, first = ranges[r].first, count = ranges[r].count;
            const pk_parameter_group *group = g ? &run->groups.group[g - 1] : NULL;
            const pk_optimizer *optimizer = group ? &group->optimizer : &run->optimizer;
            const double rate = !group  ? run->learning_rates[s]
                                : rates ? rates[g - 1]
                                        : group->rate * run->learning_rates[s];
            const pk_real *w = b->w + s * P;
            pk_linear_form form;
            for (size_t p = first; p < first + count; p++)
                b->rest[p] = (double)w[P + p] - w[p];
            if (group && group->frozen) {
                for (size_t i = 0; i <= N; i++)
                    memset(b->share + i * P + first, 0, count * sizeof *b->share);
                continue;
            }
            pk_optimizer_update(optimizer, s, rate, scale, count, w + first, b->sum + first, state + 3 * first,
                                b->update + first);
            const size_t moments_at = optimizer->kind == PK_ADAGRAD || optimizer->kind == PK_RMSPROP ? 0
                                      : optimizer->amsgrad                                           ? 2
                                                                                                     : 1;
            if (run->second_moments.data) {
                pk_real *moments = FIXTURE_NEW(pk_real, P);
                assert_ok(NULL, pk_run_second_moments(NULL, run, s, moments));
                memcpy(state + 3 * first + moments_at * count, moments + first, count * sizeof *moments);
                free(moments);
            }
            pk_optimizer_linear_form(optimizer, s, rate, count, state + 3 * first, &form, b->p + first);
            for (size_t i = 0; i <= N; i++)
                for (size_t p = first; p < first + count; p++) {
                    double *m = b->momentum + i * P + p, *share = b->share + i * P + p;
                    const double g_p = i == N ? form.coupled * w[p] : *share;
                    const double scaled = form.preconditioned ? (double)b->p[p] : form.rate;
                    const double inside = form.before ? scaled * g_p : g_p;
                    *m = form.carry * *m + form.gain * inside;
                    *share = -(form.before ? form.rate : scaled) * (form.enter * *m + form.direct * inside);
                    if (i == N)
                        *share -= form.decoupled * w[p];
                }
            /* What is unattributed is that of the run: with the examples' gradients at w_s. Here all is one sum. */
            const pk_real *m = state + 3 * first;
            for (size_t p = first; p < first + count; p++) {
                double update = b->update[p];
                if (run->second_moments.data) /* by the divisors that were recorded */
                    update = -b->p[p] * ((form.negated ? -form.enter : form.enter) * m[p - first] +
                                         form.direct * (scale * b->sum[p] + form.coupled * w[p])) -
                             form.decoupled * w[p];
                b->rest[p] -= update;
            }
        }
        for (size_t cell = 0; cell < b->cells; cell++) {
            const pk_real *j = b->jacobian + cell * P;
            for (size_t i = 0; i <= N + 1; i++) {
                const double *v = i <= N ? b->share + i * P : b->rest;
                double product = 0;
                for (size_t p = 0; p < P; p++)
                    product += v[p] * j[p];
                b->missed[cell] -= test_weight * product;
                if (i < N)
                    b->contributions[cell * N + i] += test_weight * product;
            }
        }
    }
    free(state);
}

/* missed = f_S - f_0. */
static void brute_clear(brute *b)
{
    memset(b->contributions, 0, b->cells * b->N * sizeof(double));
    memset(b->missed, 0, b->cells * sizeof(double));
    for (int end = 0; end < 2; end++) {
        assert_ok(NULL, pk_graph_evaluate(NULL, &b->run->graph, b->w + (end ? b->run->steps * b->P : 0),
                                          b->inputs, pk_matrix_view(b->f, b->inputs.rows, b->C)));
        for (size_t cell = 0; cell < b->cells; cell++)
            b->missed[cell] += end ? b->f[cell] : -b->f[cell];
    }
}

static void brute_rule(brute *b, int rule, int points, const double *t, const double *weights)
{
    place at = {NULL, 0, 0, 0, 0};
    brute_clear(b);
    if (rule == LINEAR_START || rule == LINEAR_END)
        at.test_weights = b->w + (rule == LINEAR_END ? b->run->steps * b->P : 0);
    at.sparse = rule == CHECKPOINTS;
    at.seeds_stay = rule == SEGMENT;
    if (rule == SEGMENT || rule == PATH_INTEGRAL || rule == EXACT) {
        for (int q = 0; q < points; q++) {
            at.test_t = t[q];
            at.train_t = rule == EXACT ? 0 : t[q];
            brute_add(b, &at, weights[q]);
        }
    } else if (rule == TRAPEZOID) {
        brute_add(b, &at, 0.5);
        at.test_t = at.train_t = 1;
        brute_add(b, &at, 0.5);
    } else {
        at.test_t = rule == MIDPOINT ? 0.5 : 0;
        brute_add(b, &at, 1);
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void residuals(const brute *b, double *largest, double *median)
{
    double *sorted = FIXTURE_NEW(double, b->cells);
    for (size_t i = 0; i < b->cells; i++)
        sorted[i] = fabs(b->missed[i]);
    qsort(sorted, b->cells, sizeof *sorted, ascending);
    *largest = sorted[b->cells - 1];
    *median = b->cells % 2 ? sorted[b->cells / 2] : (sorted[b->cells / 2 - 1] + sorted[b->cells / 2]) / 2;
    free(sorted);
}

/* Twice the rank from the mean, by counting. */
static double twice_rank(size_t count, const double *x, size_t i)
{
    double sum = 0;
    for (size_t j = 0; j < count; j++)
        sum += (x[j] < x[i]) - (x[j] > x[i]);
    return sum;
}

static double spearman(size_t cells, size_t N, const double *exact, const double *rule)
{
    double sum = 0;
    size_t ordered = 0;
    for (size_t cell = 0; cell < cells; cell++) {
        double ab = 0, aa = 0, bb = 0;
        for (size_t i = 0; i < N; i++) {
            const double a = twice_rank(N, exact + cell * N, i), b = twice_rank(N, rule + cell * N, i);
            aa += a * a, bb += b * b, ab += a * b;
        }
        ordered += aa > 0;
        sum += aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
    }
    return ordered ? sum / (double)ordered : (double)NAN;
}

static void test_rules(void **state)
{
    (void)state;
    static const char *const tanh_network = "input 3; dense 5; tanh; dense 2";
    static const char *const relu_network = "input 3; dense 6; relu; dense 4; relu; dense 2";
    static const compared recipes[] = {
        {RUN("input 3; dense 5; tanh; dense 2", "squared", "sgd", 7, 0, 13, 0, 0.3, 0, 0, 0), {NULL}, 0},
        {RUN(tanh_network, "softmax_cross_entropy", "sgd weight_decay=0.05", 7, 3, 23, 0, 0.5, 1, 0, 0),
         {NULL},
         0},
        {RUN(tanh_network, "softmax_cross_entropy", "sgd momentum=0.8", 7, 3, 12, 0, 0.2, 0, 0, 0), {NULL}, 0},
        {RUN(tanh_network, "squared", "sgd momentum=0.8 nesterov=1 weight_decay=0.05", 6, 4, 12, 5, 0.05, 0, 0,
             0),
         {NULL},
         0},
        {RUN(tanh_network, "squared", "adam weight_decay=0.05", 6, 4, 12, 0, 0.05, 0, 0, 0), {NULL}, 0},
        {RUN(tanh_network, "softmax_cross_entropy", "adamw beta1=0.7", 6, 4, 12, 0, 0.05, 0, 0, 1), {NULL}, 1},
        {RUN(tanh_network, "squared", "sgd momentum=0.6 weight_decay=0.05 maximize=1", 6, 4, 12, 0, 0.02, 0, 0,
             0),
         {NULL},
         0},
        {RUN(tanh_network, "softmax_cross_entropy label_smoothing=0.2 weight=1,2",
             "rmsprop alpha=0.8 momentum=0.7 weight_decay=0.1", 6, 4, 12, 0, 0.02, 0, 0, 0),
         {NULL},
         0},
        {RUN(tanh_network, "squared", "rmsprop momentum=0.7 centered=1 maximize=1", 6, 4, 12, 0, 0.01, 0, 0, 0),
         {"1 rate=2 momentum=0", "3 frozen"},
         0},
        {RUN(tanh_network, "softmax_cross_entropy", "nadam weight_decay=0.1 decoupled_weight_decay=1", 6, 4, 12,
             0, 0.02, 0, 0, 1),
         {NULL},
         1},
        {RUN(tanh_network, "squared", "adam beta2=0.5 amsgrad=1 maximize=1", 6, 4, 12, 0, 0.02, 0, 0, 1),
         {NULL},
         1},
        {RUN(tanh_network, "squared", "adagrad lr_decay=0.1 weight_decay=0.05", 6, 4, 12, 0, 0.1, 0, 0, 0),
         {NULL},
         0},
        {RUN(tanh_network, "squared", "sgd momentum=0.5", 6, 4, 12, 0, 0.1, 0, 0, 0),
         {"1 weight_decay=0.1 rate=0.5", "3 frozen"},
         0},
        {RUN(tanh_network, "squared", "adamw", 6, 4, 12, 0, 0.05, 0, 0, 0),
         {"0,2 weight_decay=0.3", "1 rate=2"},
         0},
        {RUN("input 3; dense 3 name=h; tanh; dense 3 tied=h; tanh; dense 2", "squared", "sgd momentum=0.5", 6,
             4, 12, 0, 0.1, 0, 0, 0),
         {NULL},
         0},
        {RUN(relu_network, "squared", "sgd", 5, 0, 11, 0, 0.1, 0, 0, 0), {NULL}, 0},
        {RUN(relu_network, "softmax_cross_entropy", "sgd momentum=0.8", 5, 2, 11, 0, 0.1, 0, 0, 0), {NULL}, 0},
        {RUN(relu_network, "softmax_cross_entropy", "adam", 5, 2, 6, 0, 0.02, 0, 0, 0), {NULL}, 0},
        {RUN(tanh_network, "squared", "sgd momentum=0.5", 7, 0, 4, 0, 0.3, 0, 0, 0),
         {NULL},
         0}, /* fewer steps than checkpoints */
    };
    double gauss[2][GAUSS], parts[2][PARTS + 1];
    pk_gauss_legendre(GAUSS, gauss[0], gauss[1]);
    for (int j = 0; j <= PARTS; j++) {
        parts[0][j] = (double)j / PARTS;
        parts[1][j] = (j == 0 || j == PARTS ? 0.5 : 1.0) / PARTS;
    }
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        pk_comparison rules[PK_COMPARE_RULES];
        pk_decomposition exact;
        trained t;
        brute b;
        make(&recipes[k], &t);
        const int kinks = strstr(recipes[k].run.network, "relu") != NULL;
        const pk_matrix inputs = trained_test(&t, 5);
        assert_ok(&t.context, pk_compare(&t.context, &t.run, inputs, rules));
        assert_ok(&t.context, pk_decompose(&t.context, &t.run, inputs, NULL, &exact));
        brute_begin(&t, inputs, &b);
        for (int rule = 0; rule < PK_COMPARE_RULES; rule++) {
            double largest, median;
            assert_string_equal(rules[rule].rule, names[rule]);
            assert_true(rules[rule].seconds > 0);
            if (rule == EXACT && kinks) { /* by its own nodes */
                assert_true(rules[rule].residual_max <= ROUNDING(1e-13));
                assert_close(rules[rule].spearman, 1, 0);
                continue;
            }
            brute_rule(&b, rule, kinks ? PARTS + 1 : GAUSS, kinks ? parts[0] : gauss[0],
                       kinks ? parts[1] : gauss[1]);
            residuals(&b, &largest, &median);
            /* Rows that meet no kinks are integrated better. */
            const int jumps = kinks && (rule == SEGMENT || rule == PATH_INTEGRAL);
            const double tolerance = jumps ? EITHER(1e-6, 5e-4) : ROUNDING(2e-10);
            assert_close(rules[rule].residual_max, largest, tolerance * (1 + largest));
            assert_close(rules[rule].residual_median, median, tolerance * (1 + median));
            if (rule == TELESCOPING)
                assert_true(isnan(rules[rule].spearman));
            else if (sizeof(pk_real) == sizeof(double)) /* in float, rounding exchanges neighbours */
                assert_close(rules[rule].spearman, spearman(b.cells, b.N, exact.by_example, b.contributions),
                             1e-12);
            if (rule != EXACT && rule != TELESCOPING)
                assert_true(largest > 1e-6); /* else nothing was compared */
        }
        brute_end(&b);
        pk_decomposition_release(&t.context, &exact);
        trained_release(&t);
    }
}

/* ---- the table: 6 rows, 2-5-1 tanh, total time 12; numbers of an independent program ---- */

static const double table_x[12] = {0.1257302210933933,  -0.1321048632913019, 0.6404226504432821,
                                   0.10490011715303971, -0.535669373161111,  0.36159505490948474,
                                   1.3040000451301372,  0.9470809631292422,  -0.7037352358069926,
                                   -1.2654214710460525, -0.6232744625373522, 0.0413259793472436};
static const double table_z[8] = {-2.3250307746388343, -0.21879166393254573, -1.2459109472530652,
                                  -0.7322673547034516, -0.5442589828573099,  -0.31630015636915454,
                                  0.4116305363741328,  1.0425133694426776};
static const double table_w[21] = {
    -0.08997426406082398, 0.95652442938478,     -0.46563627144062947, 0.24605704906511378, 0.632429127156266,
    0.06580860843261219,  -0.5204494745476659,  -0.6452077633808936,  -0.3204080779671374, 0.15413658642903458,
    -0.7067327284771151,  -0.14642290241019915, -0.1114575069401344,  0.37859190928006536, 0.15026138575443862,
    0.24876089632794496,  -0.4576800265928376,  -0.09072954358493862, 0.5487828290429306,  1.0454018016545323,
    -0.8813458724728841};

static void test_table(void **state)
{
    (void)state;
    static const struct {
        int rule;
        double order, residual[4];
    } expected[] = {{LEFT, 1, {4.8140591e-02, 2.3777043e-02, 1.1788707e-02, 5.8663880e-03}},
                    {TELESCOPING, 1, {4.8140591e-02, 2.3777043e-02, 1.1788707e-02, 5.8663880e-03}},
                    {SEGMENT, 1, {2.6943201e-02, 1.2391194e-02, 5.9612220e-03, 2.9249241e-03}},
                    {PATH_INTEGRAL, 1, {2.4575902e-01, 1.2545134e-01, 6.3339463e-02, 3.1818097e-02}},
                    {TRAPEZOID, 1, {2.4371184e-01, 1.2530064e-01, 6.3331394e-02, 3.1819107e-02}},
                    {MIDPOINT, 2, {1.4745284e-03, 3.2377695e-04, 7.5019664e-05, 1.8023031e-05}}};
    static const double rate[4] = {0.2, 0.1, 0.05, 0.025};
    pk_comparison rules[4][PK_COMPARE_RULES];
    for (int k = 0; k < 4; k++) {
        pk_context context = {0};
        pk_graph graph = {0};
        pk_train_options options;
        pk_dataset data;
        pk_run run;
        pk_real x[12], y[6], z[8], w[21];
        const size_t shape_x[2] = {6, 2}, shape_y[2] = {6, 1};
        for (size_t i = 0; i < 12; i++)
            x[i] = (pk_real)table_x[i];
        for (size_t i = 0; i < 6; i++)
            y[i] = (pk_real)sin(table_x[2 * i]);
        for (size_t i = 0; i < 8; i++)
            z[i] = (pk_real)table_z[i];
        for (size_t i = 0; i < 21; i++)
            w[i] = (pk_real)table_w[i];
        memset(&options, 0, sizeof options);
        assert_ok(&context, pk_network_parse(&context, "input 2; dense 5; tanh; dense 1", &graph));
        data.inputs = pk_array_view(REAL_TYPE, 2, shape_x, x);
        data.targets = pk_array_view(REAL_TYPE, 2, shape_y, y);
        options.loss = PK_SQUARED;
        options.schedule.rate = rate[k];
        options.steps = (size_t)(12 / rate[k] + 0.5);
        options.record = fixture_run_path;
        options.replace = 1;
        assert_ok(&context, pk_train(&context, &graph, &data, &options, w, NULL));
        assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
        assert_ok(&context, pk_compare(&context, &run, pk_matrix_view(z, 4, 2), rules[k]));
        for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
            assert_close(rules[k][expected[i].rule].residual_max, expected[i].residual[k],
                         EITHER(1e-7 * expected[i].residual[k], 1e-4));
        assert_true(rules[k][EXACT].residual_max <= ROUNDING(5e-13));
        assert_close(rules[k][EXACT].spearman, 1, 0);
        pk_run_release(&context, &run);
        pk_graph_release(&context, &graph);
    }
    for (size_t i = 0; i < sizeof expected / sizeof *expected && sizeof(pk_real) == sizeof(double); i++) {
        const int rule = expected[i].rule;
        assert_close(log2(rules[2][rule].residual_max / rules[3][rule].residual_max), expected[i].order, 0.1);
    }
}

/* ---- what holds for every network ---- */

static void test_identities(void **state)
{
    (void)state;
    static const compared recipes[] = {
        {RUN("input 1x6x6; conv 3 3x3 pad=1; relu; max_pool 2; flatten; dense 2", "squared", "sgd momentum=0.9",
             5, 3, 12, 0, 0.02, 0, 0, 0),
         {NULL},
         0},
        {RUN("input 1x6x6; conv 3 3x3; gelu; avg_pool 2; flatten; dense 2", "softmax_cross_entropy", "sgd", 5,
             3, 15, 4, 0.05, 0, 0, 0),
         {NULL},
         0},
        {RUN("input 6; embedding 7 4; attention 2; layer_norm; flatten; dense 2", "softmax_cross_entropy",
             "adamw", 5, 3, 12, 0, 0.01, 0, 7, 0),
         {NULL},
         0},
        {RUN("input 5; dense 4; tanh; dense 4; abs; dense 3", "softmax_cross_entropy", "sgd", 9, 4, 30, 0, 0.1,
             0, 0, 0),
         {NULL},
         1},
        {RUN("input 5; dense 4; tanh; dense 3", "softmax_cross_entropy", "adam", 9, 4, 20, 6, 0.02, 0.5, 0, 0),
         {"0 frozen", "3 weight_decay=0.2"},
         0},
    };
    for (size_t k = 0; k < sizeof recipes / sizeof *recipes; k++) {
        static const struct {
            int rule;
            pk_rule quadrature;
        } same[] = {{LEFT, PK_RULE_LEFT}, {MIDPOINT, PK_RULE_MIDPOINT}, {EXACT, PK_RULE_AUTO}};
        pk_comparison rules[PK_COMPARE_RULES];
        trained t;
        make(&recipes[k], &t);
        assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 6), rules));
        /* The shares of a step add up to it. */
        assert_close(rules[LEFT].residual_max, rules[TELESCOPING].residual_max, ROUNDING(1e-13) * 10);
        assert_close(rules[LEFT].residual_median, rules[TELESCOPING].residual_median, ROUNDING(1e-13) * 10);
        assert_true(rules[LEFT].residual_max > 1e-6);
        for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
            pk_decompose_options options;
            pk_decomposition d;
            memset(&options, 0, sizeof options);
            options.quadrature.rule = same[i].quadrature;
            const pk_status status = pk_decompose(&t.context, &t.run, trained_test(&t, 6), &options, &d);
            assert_true(status == PK_OK || (status == PK_NOT_CLOSED && same[i].rule != EXACT));
            assert_close(rules[same[i].rule].residual_max, fixture_largest(d.rows * d.outputs, d.closure),
                         ROUNDING(1e-13));
            pk_decomposition_release(&t.context, &d);
        }
        assert_close(rules[EXACT].spearman, 1, 0);
        assert_true(rules[EXACT].residual_max < EITHER(1e-3, 1e-1) * rules[LEFT].residual_max);
        trained_release(&t);
    }
}

/* A model that is linear in its weights has one J: all rules but those whose dl/df moves are exact. */
static void test_linear(void **state)
{
    (void)state;
    const compared r = {
        RUN("input 3; dense 2", "squared", "sgd momentum=0.5", 7, 3, 20, 0, 0.1, 0, 0, 0), {NULL}, 0};
    pk_comparison rules[PK_COMPARE_RULES];
    trained t;
    make(&r, &t);
    assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 5), rules));
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++) {
        const int moves = rule == PATH_INTEGRAL || rule == TRAPEZOID || rule == CHECKPOINTS;
        assert_true(moves == (rules[rule].residual_max > ROUNDING(1e-13)));
    }
    /* dl/df is linear there, so that two points are enough. */
    assert_close(rules[PATH_INTEGRAL].residual_max, rules[TRAPEZOID].residual_max, ROUNDING(1e-12));
    trained_release(&t);
}

/* ---- ranks, ends, calls ---- */

static void test_ranks(void **state)
{
    (void)state;
    /* One example: there is no order. */
    compared r = {
        RUN("input 3; dense 2; tanh; dense 2", "squared", "sgd", 1, 0, 6, 0, 0.1, 0, 0, 0), {NULL}, 0};
    pk_comparison rules[PK_COMPARE_RULES];
    trained t;
    make(&r, &t);
    assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 3), rules));
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++)
        assert_true(isnan(rules[rule].spearman));
    trained_release(&t);
    /* No steps: nothing changes, nothing has an order. */
    r.run.rows = 4;
    r.run.steps = 0;
    make(&r, &t);
    assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 3), rules));
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++) {
        assert_true(rules[rule].residual_max == 0 && rules[rule].residual_median == 0);
        assert_true(isnan(rules[rule].spearman));
    }
    trained_release(&t);
    /* Examples that no batch has met are equal to each other, and have no share: average ranks. */
    r.run.rows = 9;
    r.run.batch = 2;
    r.run.steps = 3;
    make(&r, &t);
    assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 3), rules));
    assert_close(rules[EXACT].spearman, 1, 0);
    assert_true(rules[LEFT].spearman > 0.5 && rules[LEFT].spearman <= 1);
    trained_release(&t);
    /* The output weights are frozen at 0: the outputs never move, nor does any contribution differ from 0. */
    r.run.network = "input 3; dense 2; relu; dense 1";
    r.run.batch = 0;
    make(&r, &t);
    for (size_t i = 0; i < TEST_ROWS * 3; i++)
        t.test[i] = 0; /* only biases act */
    assert_ok(&t.context, pk_compare(&t.context, &t.run, trained_test(&t, 1), rules));
    assert_close(rules[EXACT].spearman, 1, 0);
    trained_release(&t);
}

static int watch(void *user, const char *phase, double fraction)
{
    double *seen = (double *)user; /* the last, how many, where to stop */
    assert_string_equal(phase, "comparing");
    assert_true(fraction >= seen[0] && fraction <= 1);
    seen[0] = fraction;
    seen[1]++;
    return fraction > seen[2];
}

static int same_rules(const pk_comparison *a, const pk_comparison *b)
{
    int same = 1;
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++)
        same &= memcmp(&a[rule].residual_max, &b[rule].residual_max, 3 * sizeof(double)) == 0;
    return same;
}

/* The same bits for any threads and limits of a run with kinks, whose steps are cut finely. */
static void test_bits(void **state)
{
    (void)state;
    const compared r = {
        RUN("input 3; dense 6; relu; dense 2", "squared", "sgd momentum=0.5", 90, 40, 3, 0, 0.3, 0, 0, 0),
        {NULL},
        0};
    pk_comparison plain[PK_COMPARE_RULES], rules[PK_COMPARE_RULES];
    trained t;
    make(&r, &t);
    pk_context *context = &t.context;
    context->threads = 1;
    assert_ok(context, pk_compare(context, &t.run, trained_test(&t, 24), plain));
    context->memory_limit = context->memory_peak * 9 / 10;
    context->threads = 3;
    assert_ok(context, pk_compare(context, &t.run, trained_test(&t, 24), rules));
    assert_true(same_rules(plain, rules));
    context->memory_limit = 0;
    trained_release(&t);
}

static void test_calls(void **state)
{
    (void)state;
    static const compared recipes[] = {
        {RUN("input 3; dense 6; gelu; dense 2", "squared", "sgd", 300, 40, 12, 0, 0.1, 0, 0, 0), {NULL}, 0},
        {RUN("input 3; dense 6; tanh; dense 2", "squared", "adam", 300, 40, 12, 0, 0.02, 0, 0, 0), {NULL}, 0}};
    for (size_t k = 0; k < 2; k++) {
        pk_comparison plain[PK_COMPARE_RULES], rules[PK_COMPARE_RULES];
        double seen[3] = {0, 0, 2};
        trained t;
        make(&recipes[k], &t);
        pk_context *context = &t.context;
        context->threads = 1;
        const pk_matrix inputs = trained_test(&t, TEST_ROWS);
        assert_ok(context, pk_compare(context, &t.run, inputs, plain));
        const size_t peak = context->memory_peak;
        for (int threads = 2; threads <= 5; threads += 3) {
            context->threads = threads;
            assert_ok(context, pk_compare(context, &t.run, inputs, rules));
            assert_true(same_rules(plain, rules));
        }
        /* Rows in parts: half of the memory, and the least. */
        size_t limit = peak / 2, smallest = 0;
        context->threads = 1;
        for (; limit > 1000; limit = limit * 2 / 3) {
            context->memory_peak = 0;
            context->memory_limit = limit;
            const pk_status status = pk_compare(context, &t.run, inputs, rules);
            if (status) {
                assert_int_equal(status, PK_MEMORY_LIMIT);
                break;
            }
            assert_true(same_rules(plain, rules));
            assert_true(context->memory_peak <= limit);
            smallest = limit;
        }
        assert_true(smallest > 0);
        context->memory_limit = 0;
        context->progress = watch;
        context->progress_user = seen;
        assert_ok(context, pk_compare(context, &t.run, inputs, rules));
        assert_true(seen[0] == 1 && seen[1] > 20);
        for (double stop = 0.001; stop < 1; stop += 0.1) {
            seen[0] = seen[1] = 0;
            seen[2] = stop;
            assert_int_equal(pk_compare(context, &t.run, inputs, rules), PK_CANCELLED);
            assert_true(context->progress == watch && context->progress_user == seen);
        }
        context->progress = NULL;
        /* Bad input. */
        pk_matrix bad = inputs;
        bad.cols = 2;
        assert_refused(context, PK_ARGUMENT, "compare: the run", pk_compare(context, NULL, inputs, rules));
        assert_refused(context, PK_ARGUMENT, "the place for the rules",
                       pk_compare(context, &t.run, inputs, NULL));
        assert_refused(context, PK_SHAPE, "compare: inputs are 40 x 2",
                       pk_compare(context, &t.run, bad, rules));
        bad = inputs;
        bad.rows = 0;
        assert_refused(context, PK_SHAPE, "compare: inputs are 0 x 3", pk_compare(context, &t.run, bad, rules));
        const pk_real kept = t.test[7];
        t.test[7] = (pk_real)NAN;
        assert_refused(context, PK_NOT_FINITE, "row 2, column 1", pk_compare(context, &t.run, inputs, rules));
        t.test[7] = kept;
        /* A run that is described wrongly: as pk_decompose says, with the rules. */
        double *rates = (double *)t.run.learning_rates;
        double *wrong = FIXTURE_NEW(double, t.run.steps);
        memcpy(wrong, rates, t.run.steps * sizeof *wrong);
        wrong[3] *= 1.5;
        t.run.learning_rates = wrong;
        assert_refused(context, PK_UNATTRIBUTED, "unattributed", pk_compare(context, &t.run, inputs, rules));
        assert_close(rules[LEFT].residual_max, plain[LEFT].residual_max, ROUNDING(1e-12));
        t.run.learning_rates = rates;
        free(wrong);
        trained_release(&t);
    }
}

int main(void)
{
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_rules),  cmocka_unit_test(test_table), cmocka_unit_test(test_identities),
        cmocka_unit_test(test_linear), cmocka_unit_test(test_ranks), cmocka_unit_test(test_calls),
        cmocka_unit_test(test_bits),
    };
    return cmocka_run_group_tests(all, fixture_enter, fixture_leave);
}
