/* Kernels by the rule auto where a step has to be cut: at kinks of the loss, and where a weight moves so far that an activation
 * runs through its range within a short part of the step. The truth is a sum of Gauss rules between the places where this
 * happens, which networks with one hidden layer tell: its pre-activations are straight lines in t. */
#include "trained.h"

enum { N = 5, D = 3, UNITS = 4, GAUSS = 20, MOST = 4000 };

typedef struct place_list {
    size_t count;
    double at[MOST];
} place_list;

static void add_place(place_list *list, double t)
{
    if (t > 0 && t < 1 && list->count < MOST)
        list->at[list->count++] = t;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct step {
    trained *t;
    pk_real *w, *next, *at;
} step;

static void move_to(step *s, double t)
{
    for (size_t p = 0; p < s->t->run.parameters; p++)
        s->at[p] = (pk_real)((double)s->w[p] + t * ((double)s->next[p] - (double)s->w[p]));
}

/* The functions of one row's outputs that vanish at kinks of the loss. */
static size_t loss_kinks(const trained *t, const pk_real *f, const pk_real *y, double *to)
{
    const pk_criterion *c = &t->run.criterion;
    const size_t C = t->run.outputs;
    size_t count = 0, own = 0;
    for (size_t j = 1; j < C; j++)
        own = y[j] > y[own] ? j : own;
    for (size_t j = 0; j < C; j++) {
        const double d = (double)f[j] - (double)y[j], edge = c->delta > 0  ? c->delta
                                                             : c->beta > 0 ? c->beta
                                                                           : 1;
        if (c->loss == PK_L1)
            to[count++] = d;
        else if (c->loss == PK_HUBER)
            to[count++] = d - edge, to[count++] = d + edge;
        else if (c->loss == PK_HINGE && C == 1)
            to[count++] = 1 - (double)y[0] * (double)f[0];
        else if (c->loss == PK_HINGE && j != own)
            to[count++] = 1 - (double)f[own] + (double)f[j];
    }
    return count;
}

static size_t kinks_at(step *s, size_t row, double t, double *to)
{
    pk_real f[8], y[8];
    const int64_t item = (int64_t)row;
    trained *r = s->t;
    move_to(s, t);
    assert_ok(&r->context,
              pk_graph_evaluate(&r->context, &r->graph, s->at, pk_matrix_view(r->train + row * D, 1, D),
                                pk_matrix_view(f, 1, r->run.outputs)));
    pk_criterion_targets(&r->run.criterion, &r->run.train, &item, 1, r->run.outputs, y);
    return loss_kinks(r, f, y, to);
}

/* Sign changes of the loss's functions between places that are known. */
static void add_loss_kinks(step *s, place_list *list)
{
    const size_t known = list->count;
    for (size_t row = 0; row < N; row++)
        for (size_t i = 0; i + 1 < known; i++)
            for (int part = 0; part < 16; part++) {
                const double length = (list->at[i + 1] - list->at[i]) / 16;
                double lo = list->at[i] + part * length, hi = lo + length, a[16], b[16], m[16];
                const size_t count = kinks_at(s, row, lo, a);
                (void)kinks_at(s, row, hi, b);
                for (size_t k = 0; k < count; k++) {
                    double from = lo, to = hi;
                    if ((a[k] < 0) == (b[k] < 0))
                        continue;
                    for (int half = 0; half < 60; half++) {
                        const double middle = 0.5 * (from + to);
                        (void)kinks_at(s, row, middle, m);
                        if ((m[k] < 0) == (a[k] < 0))
                            from = middle;
                        else
                            to = middle;
                    }
                    add_place(list, 0.5 * (from + to));
                }
            }
}

/* Where the hidden units run through their range. */
static void add_units(const step *s, int hidden, place_list *list)
{
    for (size_t row = 0; hidden && row < N; row++)
        for (size_t u = 0; u < UNITS; u++) {
            double z[2];
            for (int e = 0; e < 2; e++) {
                const pk_real *w = e ? s->next : s->w;
                z[e] = (double)w[UNITS * D + u];
                for (size_t d = 0; d < D; d++)
                    z[e] += (double)w[u * D + d] * (double)s->t->train[row * D + d];
            }
            const double slope = fabs(z[1] - z[0]);
            for (int level = -3; level <= 3; level += 3) { /* hardswish bends at -3 and 3 */
                const double zero = (level - z[0]) / (z[1] - z[0]), from[3] = {zero, 0, 1};
                for (int k = 0; slope > 0 && k < 3; k++) {
                    add_place(list, from[k]);
                    for (double width = 0.5; level == 0 && width < 1024 && width / slope < 1; width *= 2)
                        add_place(list, from[k] - width / slope), add_place(list, from[k] + width / slope);
                }
            }
        }
}

/* gram (N x N) += eta times the integral of the products of the rows' loss gradients; contributions (N x C x N), or NULL. */
static void add_step(step *s, int hidden, double eta, double *gram, double *contributions)
{
    static place_list list;
    trained *r = s->t;
    const size_t P = r->run.parameters, C = r->run.outputs;
    double node[GAUSS], weight[GAUSS];
    int64_t items[N];
    pk_real *g = FIXTURE_NEW(pk_real, N * P), *J = FIXTURE_NEW(pk_real, N * C * P);
    for (size_t i = 0; i < N; i++)
        items[i] = (int64_t)i;
    const pk_batch batch = {N, items, NULL};
    list.count = 2;
    list.at[0] = 0, list.at[1] = 1;
    for (int k = 1; k < 8; k++)
        add_place(&list, k / 8.0);
    add_units(s, hidden, &list);
    qsort(list.at, list.count, sizeof *list.at, by_value);
    add_loss_kinks(s, &list);
    assert_true(list.count < MOST);
    qsort(list.at, list.count, sizeof *list.at, by_value);
    pk_gauss_legendre(GAUSS, node, weight);
    for (size_t i = 0; i + 1 < list.count; i++)
        for (int q = 0; q < GAUSS && list.at[i + 1] > list.at[i]; q++) {
            const double length = list.at[i + 1] - list.at[i], factor = eta * length * weight[q];
            move_to(s, list.at[i] + length * node[q]);
            assert_ok(&r->context,
                      pk_loss_gradients_with(&r->context, &r->graph, &r->run.criterion, s->at, &r->run.train,
                                             &batch, NULL, pk_matrix_view(g, N, P)));
            for (size_t a = 0; a < N; a++)
                for (size_t b = 0; b < N; b++)
                    for (size_t p = 0; p < P; p++)
                        gram[a * N + b] += factor * (double)g[a * P + p] * (double)g[b * P + p];
            if (!contributions)
                continue;
            assert_ok(&r->context, pk_jacobian(&r->context, &r->graph, s->at, pk_matrix_view(r->train, N, D),
                                               pk_matrix_view(J, N * C, P), pk_matrix_view(NULL, 0, 0)));
            for (size_t a = 0; a < N * C; a++)
                for (size_t b = 0; b < N; b++)
                    for (size_t p = 0; p < P; p++)
                        contributions[a * N + b] -= factor / N * (double)J[a * P + p] * (double)g[b * P + p];
        }
    free(g), free(J);
}

/* The kernel of losses, and Domingos' contributions, of all steps. */
static void define(trained *t, int hidden, double *gram, double *contributions)
{
    const size_t P = t->run.parameters;
    step s = {t, FIXTURE_NEW(pk_real, P), FIXTURE_NEW(pk_real, P), FIXTURE_NEW(pk_real, P)};
    for (size_t k = 0; k < t->run.steps; k++) {
        assert_ok(&t->context, pk_run_weights(&t->context, &t->run, k, s.w));
        assert_ok(&t->context, pk_run_weights(&t->context, &t->run, k + 1, s.next));
        add_step(&s, hidden, t->run.learning_rates[k], gram, contributions);
    }
    free(s.w), free(s.next), free(s.at);
}

static double worst_of(size_t count, const double *a, const double *b)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        worst = fmax(worst, fabs(a[i] - b[i]));
        largest = fmax(largest, fabs(b[i]));
    }
    return largest > 0 ? worst / largest : worst;
}

static void test_loss_kinks(void **state)
{
    (void)state;
    static const char *const networks[] = {"input 3; dense 2", "input 3; dense 4; relu; dense 2",
                                           "input 3; dense 4; tanh; dense 2", "input 3; dense 4; gelu; dense 1",
                                           "input 3; dense 4; elu; dense 1"};
    static const char *const losses[] = {"l1", "huber delta=0.3", "huber beta=0.2", "hinge", "squared"};
    for (int n = 0; n < 5; n++)
        for (int l = 0; l < 5; l++) {
            trained t;
            const recipe r = {networks[n], losses[l], "sgd", 0, 2, 0, N, N, 3, 0, (uint64_t)(11 + n), 0};
            if (l == 3 && n > 2) /* +1 and -1 are no labels of one output */
                continue;
            trained_make(&r, &t);
            const size_t C = t.run.outputs;
            double gram[N * N] = {0}, contributions[N * 2 * N] = {0}, computed[N * N], own[N * 2 * N];
            double *place = computed;
            pk_kernel_options o;
            pk_kernel_report report;
            pk_domingos d;
            memset(&o, 0, sizeof o);
            memset(&d, 0, sizeof d);
            o.kind = PK_KERNEL_LOSS_PATH;
            d.contributions = own;
            define(&t, n > 0, gram, contributions);
            /* In single precision, short pieces have ends that are rounded: the error says so, which the entries need not show. */
            const pk_status status = pk_kernels(&t.context, &t.run, NULL, NULL, 1, &o, &place, &report);
            if (status != EITHER(PK_OK, PK_NOT_CLOSED))
                assert_ok(&t.context, status);
            const pk_dataset inputs = {.inputs = t.run.train.inputs};
            assert_ok(&t.context,
                      pk_kernel_domingos(&t.context, &t.run, &inputs, (pk_quadrature){PK_RULE_AUTO, 0}, 0, &d));
            const double kernel = worst_of(N * N, computed, gram),
                         machine = worst_of(N * C * N, own, contributions);
            print_message("%-34s %-16s kernel %.2g, error %.2g, contributions %.2g, error %.2g\n", networks[n],
                          losses[l], kernel, report.error, machine, d.error);
            assert_true(kernel <= ROUNDING(1e-11) && machine <= ROUNDING(1e-11));
            trained_release(&t);
        }
}

/* The rule path_integral of pk_compare has the same kinks: with plain SGD its contributions are Domingos'. */
static void test_path_integral(void **state)
{
    (void)state;
    static const char *const losses[] = {"l1", "huber delta=0.3", "hinge"};
    for (int l = 0; l < 3; l++) {
        const recipe r = {"input 3; dense 4; tanh; dense 2", losses[l], "sgd", 0, 2, 0, N, N, 3, 0, 13, 0};
        trained t;
        trained_make(&r, &t);
        const size_t C = t.run.outputs;
        double own[N * 2 * N], intercept[N * 2], largest = 0;
        pk_real final[N * 2], *w = FIXTURE_NEW(pk_real, t.run.parameters);
        pk_comparison rules[PK_COMPARE_RULES];
        pk_domingos d = {own, NULL, intercept, 0, 0};
        const pk_dataset inputs = {.inputs = t.run.train.inputs};
        assert_ok(&t.context,
                  pk_kernel_domingos(&t.context, &t.run, &inputs, (pk_quadrature){PK_RULE_AUTO, 0}, 0, &d));
        assert_ok(&t.context, pk_run_weights(&t.context, &t.run, t.run.steps, w));
        assert_ok(&t.context, pk_graph_evaluate(&t.context, &t.graph, w, pk_matrix_view(t.train, N, D),
                                                pk_matrix_view(final, N, C)));
        for (size_t cell = 0; cell < N * C; cell++) {
            double left = (double) final[cell] - intercept[cell];
            for (size_t i = 0; i < N; i++)
                left -= own[cell * N + i];
            largest = fmax(largest, fabs(left));
        }
        assert_ok(&t.context, pk_compare(&t.context, &t.run, pk_matrix_view(t.train, N, D), rules));
        assert_string_equal(rules[2].rule, "path_integral");
        print_message("%-16s residual %.6g, of the machine %.6g\n", losses[l], rules[2].residual_max, largest);
        assert_close(rules[2].residual_max, largest, 2e-3 * largest);
        free(w);
        trained_release(&t);
    }
}

/* One step whose rate makes weights move by up to 1e12. Either the result is right, or the status says that it is not. */
static void test_far_weights(void **state)
{
    (void)state;
    static const char *const smooth[] = {"tanh",      "sigmoid", "softplus", "softplus 20", "gelu",
                                         "gelu tanh", "silu",    "erf",      "mish",        "log_sigmoid",
                                         "elu",       "selu",    "softsign", "hardswish"};
    static const char *const losses[] = {"squared", "l1", "mean_squared"};
    int closed = 0, all = 0;
    for (int a = 0; a < (int)(sizeof smooth / sizeof *smooth); a++)
        for (int power = -12; power <= 12; power += 3) {
            char network[80];
            snprintf(network, sizeof network, "input 3; dense 4; %s; dense 2", smooth[a]);
            trained t;
            const recipe r = {network, losses[(a + power + 12) % 3], "sgd", 0, pow(10, power), 0, N, N, 1,
                              0,       (uint64_t)(40 + a),           0};
            if (sizeof(pk_real) == sizeof(float) && power > 3)
                continue;
            trained_make(&r, &t);
            double gram[N * N] = {0}, computed[N * N], *place = computed;
            pk_kernel_options o;
            pk_kernel_report report;
            memset(&o, 0, sizeof o);
            o.kind = PK_KERNEL_LOSS_PATH;
            define(&t, 1, gram, NULL);
            const pk_status status = pk_kernels(&t.context, &t.run, NULL, NULL, 1, &o, &place, &report);
            const double worst = worst_of(N * N, computed, gram);
            if (status || worst > 1e-12)
                print_message("%s, rate 1e%d: status %d, off by %.2g, error %.2g, %zu points\n", smooth[a],
                              power, (int)status, worst, report.error, report.points);
            assert_true(status == PK_OK || status == PK_NOT_CLOSED);
            assert_true(status || worst <= EITHER(1e-10 + 1e-15 * pow(10, power), 1e-3));
            assert_true(power > EITHER(3, -1) || !status);
            all++, closed += !status;
            trained_release(&t);
        }
    print_message("%d of %d within the tolerance\n", closed, all);
    assert_true(4 * closed >= 3 * all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss_kinks),
        cmocka_unit_test(test_path_integral),
        cmocka_unit_test(test_far_weights),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
