/* What a run records of other programs' training: the derivatives of a loss in the place of its name, and momenta that move. */
#include "fixture.h"
#include "trained.h"

enum { ROWS = 3, EXAMPLES = 7, BATCH = 3, STEPS = 6, OUTPUTS = 2 };
#define NETWORK "input 4; dense 5; tanh; dense 4; gelu; dense 2"

static const char *path_of(const char *name)
{
    static char path[600];
    snprintf(path, sizeof path, "%s/%s", fixture_run_path, name);
    return path;
}

static void manifest(const char *loss, const char *optimizer)
{
    FILE *file = fopen(path_of("run.txt"), "w");
    assert_non_null(file);
    fprintf(file, "pathkernel-run 1\nnetwork " NETWORK "\nloss %s\noptimizer %s\n", loss, optimizer);
    assert_int_equal(fclose(file), 0);
}

static void numbers(pk_context *context, const char *name, size_t rows, size_t columns, const double *from)
{
    const size_t shape[2] = {rows, columns};
    assert_ok(context, pk_array_write(context, path_of(name), PK_FLOAT64, columns ? 2 : 1, shape, from));
}

/* The derivatives of the run's own loss at every item of every step. */
static void derivatives(trained *t, double *to)
{
    pk_context *context = &t->context;
    pk_real *w = FIXTURE_NEW(pk_real, t->run.parameters), f[OUTPUTS], target[OUTPUTS],
            *x = FIXTURE_NEW(pk_real, 4);
    for (size_t s = 0; s < STEPS; s++) {
        pk_batch batch;
        pk_run_batch(&t->run, s, &batch);
        assert_ok(context, pk_run_weights(context, &t->run, s, w));
        for (size_t b = 0; b < batch.count; b++, to += OUTPUTS) {
            pk_dataset_inputs(&t->run.train, batch.items + b, 1, x);
            assert_ok(context, pk_graph_evaluate(context, &t->run.graph, w, pk_matrix_view(x, 1, 4),
                                                 pk_matrix_view(f, 1, OUTPUTS)));
            pk_criterion_targets(&t->run.criterion, &t->run.train, batch.items + b, 1, OUTPUTS, target);
            pk_criterion_gradient(&t->run.criterion, OUTPUTS, f, target, f);
            for (size_t c = 0; c < OUTPUTS; c++)
                to[c] = f[c];
        }
    }
    free(w), free(x);
}

/* Opens the run again after its files were changed. */
static pk_status reopen(trained *t)
{
    pk_run_release(&t->context, &t->run);
    memset(&t->run, 0, sizeof t->run);
    return pk_run_open(&t->context, fixture_run_path, &t->run);
}

static double apart(trained *t, const pk_decomposition *a)
{
    pk_decompose_options options;
    pk_decomposition b;
    memset(&options, 0, sizeof options);
    assert_ok(&t->context, pk_decompose(&t->context, &t->run, trained_test(t, ROWS), &options, &b));
    double worst = 0, largest = 0;
    for (size_t i = 0; i < ROWS * OUTPUTS * EXAMPLES; i++) {
        worst = fmax(worst, fabs((double)a->by_example[i] - b.by_example[i]));
        largest = fmax(largest, fabs((double)a->by_example[i]));
    }
    for (size_t i = 0; i < ROWS * OUTPUTS; i++)
        worst = fmax(worst, fabs((double)a->decay[i] - b.decay[i]));
    pk_decomposition_release(&t->context, &b);
    assert_true(largest > 1e-3);
    return worst / largest;
}

static const recipe recipes[] = {
    {NETWORK, "softmax_cross_entropy", "sgd momentum=0.8 nesterov=1 weight_decay=0.02", 0, 0.1, 0.3, EXAMPLES,
     BATCH, STEPS, 0, 5, 0},
    {NETWORK, "softmax_cross_entropy", "adamw epsilon=1e-4 weight_decay=0.1", 0, 0.02, 0, EXAMPLES, BATCH,
     STEPS, 0, 6, 0},
};

static void losses(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        trained t;
        trained_make(&recipes[k], &t);
        pk_context *context = &t.context;
        pk_decompose_options options;
        pk_decomposition named;
        memset(&options, 0, sizeof options);
        assert_ok(context, pk_decompose(context, &t.run, trained_test(&t, ROWS), &options, &named));
        double d[STEPS * BATCH * OUTPUTS];
        const size_t items = (size_t)t.run.batch_offsets[STEPS];
        assert_true(items <= STEPS * BATCH);
        derivatives(&t, d);
        numbers(context, "loss_gradients.npy", items, OUTPUTS, d);
        assert_refused(context, PK_FORMAT, "the loss in run.txt is softmax_cross_entropy, not recorded",
                       reopen(&t));
        manifest("recorded", recipes[k].optimizer);
        assert_ok(context, reopen(&t));
        assert_true(apart(&t, &named) < ROUNDING(1e-12));
        /* The definition reads them, too. */
        double all[ROWS * OUTPUTS * (EXAMPLES + 5)];
        pk_reference r = {.by_example = all};
        double *rest[5] = {0};
        for (int i = 0; i < 5; i++)
            rest[i] = all + ROWS * OUTPUTS * (EXAMPLES + (size_t)i);
        r.initial = rest[0], r.final = rest[1], r.decay = rest[2], r.unattributed = rest[3],
        r.closure = rest[4];
        assert_ok(context, pk_decompose_reference(context, &t.run, trained_test(&t, ROWS), 1, 20, &r));
        double worst = 0;
        for (size_t i = 0; i < ROWS * OUTPUTS * EXAMPLES; i++)
            worst = fmax(worst, fabs((double)named.by_example[i] - r.by_example[i]));
        assert_true(worst < ROUNDING(1e-10));
        /* What needs the loss elsewhere is refused. */
        pk_sensitivity_options sensing;
        pk_sensitivity out;
        memset(&sensing, 0, sizeof sensing);
        sensing.tolerance = 1e-6;
        assert_refused(context, PK_UNSUPPORTED, "recorded derivatives",
                       pk_sensitivity_at(context, &t.run, trained_test(&t, 1), &sensing, &out));
        pk_decomposition_release(context, &named);
        /* Targets are not read; numbers that are wrong are named. */
        const size_t shape[2] = {EXAMPLES, 5};
        int64_t odd[EXAMPLES * 5] = {-7};
        assert_ok(context, pk_array_write(context, path_of("train_targets.npy"), PK_INT64, 2, shape, odd));
        assert_ok(context, reopen(&t));
        d[4] = NAN;
        numbers(context, "loss_gradients.npy", items, OUTPUTS, d);
        assert_refused(context, PK_NOT_FINITE, "loss_gradients.npy holds nan at row 2, column 0", reopen(&t));
        numbers(context, "loss_gradients.npy", items / 2, OUTPUTS * 2, d);
        assert_refused(context, PK_SHAPE, "rows of 4 numbers, the network has 2 outputs", reopen(&t));
        d[4] = 0;
        numbers(context, "loss_gradients.npy", items - BATCH - 1, OUTPUTS, d);
        assert_refused(context, PK_SHAPE, "loss_gradients.npy", reopen(&t));
        trained_release(&t);
    }
}

static void momenta(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        trained t;
        trained_make(&recipes[k], &t);
        pk_context *context = &t.context;
        pk_decompose_options options;
        pk_decomposition constant;
        double m[STEPS];
        memset(&options, 0, sizeof options);
        assert_ok(context, pk_decompose(context, &t.run, trained_test(&t, ROWS), &options, &constant));
        for (size_t s = 0; s < STEPS; s++)
            m[s] = k ? 0.9 : 0.8;
        numbers(context, "momenta.npy", STEPS, 0, m);
        assert_ok(context, reopen(&t));
        assert_true(apart(&t, &constant) == 0);
        m[3] = 0.5; /* of one step: another rule, whose updates are not those of the run */
        numbers(context, "momenta.npy", STEPS, 0, m);
        assert_ok(context, reopen(&t));
        pk_decomposition other;
        const pk_status status = pk_decompose(context, &t.run, trained_test(&t, ROWS), &options, &other);
        assert_int_equal(status, PK_UNATTRIBUTED);
        pk_decomposition_release(context, &other);
        pk_linear_form form;
        pk_optimizer_linear_form(&t.run.optimizer, 3, 0.1, 0, NULL, &form, NULL);
        assert_close(form.carry, 0.5, 0);
        pk_optimizer_linear_form(&t.run.optimizer, 4, 0.1, 0, NULL, &form, NULL);
        assert_close(form.carry, k ? 0.9 : 0.8, 0);
        pk_decomposition_release(context, &constant);
        m[3] = 1;
        numbers(context, "momenta.npy", STEPS, 0, m);
        assert_refused(context, PK_ARGUMENT, "momenta.npy holds 1 at row 3", reopen(&t));
        m[3] = 0.5;
        numbers(context, "momenta.npy", STEPS, 0, m);
        manifest("softmax_cross_entropy", "sgd");
        assert_refused(context, PK_FORMAT, "has no momentum that moves", reopen(&t));
        manifest("softmax_cross_entropy",
                 k ? "adamw\ngroup 1 beta1=0.5" : "sgd momentum=0.8\ngroup 1 momentum=0.5");
        assert_refused(context, PK_FORMAT, "run.txt line 5: a momentum of the group's own", reopen(&t));
        trained_release(&t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(losses), cmocka_unit_test(momenta)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
