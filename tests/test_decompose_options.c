/* What can be asked of a decomposition: readouts, kept tensors, parts, bounds, statuses, hostile runs. */
#include "fixture.h"

typedef struct fixture_run {
    pk_context context;
    bf_run brute;
    pk_run run;
    pk_real *inputs;
    size_t rows;
} fixture_run;

static void setup_with(fixture_run *f, const char *network, bf_loss loss, const char *optimizer,
                       const bf_recipe *recipe, size_t rows)
{
    memset(f, 0, sizeof *f);
    f->context.threads = 1; /* small jobs; test_determinism.c has the threads */
    fixture_make(network, loss, optimizer, recipe, &f->brute);
    fixture_open(&f->context, &f->brute, &f->run);
    f->rows = rows;
    f->inputs = fixture_normals(recipe->seed + 77, rows * f->brute.network.inputs, 1);
}

static void setup(fixture_run *f, const char *network, const char *optimizer, size_t rows)
{
    const bf_recipe recipe = fixture_recipe(31, 7, 6, 5, strstr(optimizer, "adam") ? 0.05 : 0.4);
    setup_with(f, network, BF_SOFTMAX_CROSS_ENTROPY, optimizer, &recipe, rows);
}

static void teardown(fixture_run *f)
{
    pk_run_release(&f->context, &f->run);
    bf_run_free(&f->brute);
    free(f->inputs);
    assert_int_equal(f->context.memory_used, 0);
}

static pk_matrix rows_of(const fixture_run *f)
{
    return pk_matrix_view(f->inputs, f->rows, f->brute.network.inputs);
}

static pk_decompose_options defaults(void)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    return options;
}

static const char mixed[] = "input 3; dense 5; relu; dense 4; tanh; dense 3";
static const char kinked[] = "input 3; dense 5; relu; dense 4; leaky_relu 0.2; dense 3";
static const char smooth[] = "input 3; dense 5; tanh; dense 4; gelu; dense 3";
static const char *const all_networks[3] = {mixed, kinked, smooth};

/* ---- readouts --------------------------------------------------------------------------------------- */

/* h of a test row: what the user pointer of the readouts below points to. */
typedef struct reader {
    int kind; /* 0: f itself, 1: margin f_0 - f_1, 2: softmax probability, 3: cross entropy of labels[row] */
    size_t outputs;
    int64_t labels[64];
} reader;

static void read_out(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope)
{
    const reader *r = (const reader *)user;
    const size_t C = r->outputs, label = (size_t)r->labels[row];
    double top = f[0], mass = 0;
    for (size_t c = 0; c < C; c++)
        top = fmax(top, f[c]);
    for (size_t c = 0; c < C; c++)
        mass += exp(f[c] - top);
    for (size_t c = 0; c < C; c++) {
        const double p = exp(f[c] - top) / mass, own = exp(f[label] - top) / mass;
        if (r->kind == 0) {
            h[c] = f[c];
            for (size_t k = 0; k < C; k++)
                slope[c * C + k] = k == c;
        } else if (r->kind == 1) {
            h[0] = f[0] - f[1];
            slope[c] = (double)(c == 0) - (double)(c == 1);
        } else if (r->kind == 2) {
            h[0] = own;
            slope[c] = own * ((double)(c == label) - p);
        } else {
            h[0] = log(mass) + top - f[label];
            slope[c] = p - (double)(c == label);
        }
    }
}

/* A(x, i) of a scalar readout for plain SGD by brute force: dense Gauss-Legendre between the oracle's kinks. */
static void brute_readout(const bf_run *run, const pk_real *x, reader *r, size_t row, bf_real *by_example)
{
    const size_t P = run->parameters, C = run->outputs;
    bf_real *gradients = BF_NEW(bf_real, run->examples * P), *sum = BF_NEW(bf_real, P),
            *decay = BF_NEW(bf_real, P);
    bf_real *phi = BF_NEW(bf_real, P);
    int *used = BF_NEW(int, run->examples);
    for (size_t s = 0; s < run->steps; s++) {
        bf_path path;
        bf_real *kinks, low = 0;
        memset(&path, 0, sizeof path);
        path.net = &run->network;
        path.parameters = P;
        path.outputs = C;
        path.from = bf_extend(P, run->weights + s * P);
        path.change = bf_extend(P, run->weights + (s + 1) * P);
        path.at = BF_NEW(bf_real, P);
        for (size_t p = 0; p < P; p++)
            path.change[p] -= path.from[p];
        path.kinks = bf_kink_functions(&run->network);
        bf_gauss_legendre(path.node, path.weight);
        bf_step_gradients(run, s, path.from, &path.tape, gradients, used, sum, decay);
        bf_forward(&run->network, path.from, x, &path.tape);
        const size_t count = bf_find_kinks(&path, &kinks);
        memset(phi, 0, P * sizeof *phi);
        for (size_t k = 0; k <= count; k++) {
            const bf_real high = k < count ? kinks[k] : 1;
            for (int part = 0; part < 3; part++) /* three panels of 20 nodes a piece */
                for (int q = 0; q < BF_NODES; q++) {
                    const bf_real width = (high - low) / 3;
                    pk_real f[8], h[8], slope[8];
                    bf_real seed[8];
                    bf_path_at(&path, low + width * (part + (1 + path.node[q]) / 2), NULL);
                    for (size_t c = 0; c < C; c++)
                        f[c] = (pk_real)path.tape.value[run->network.layers][c];
                    read_out(r, row, f, h, slope);
                    for (size_t c = 0; c < C; c++)
                        seed[c] = slope[c];
                    bf_reverse(&run->network, path.at, &path.tape, seed, width / 2 * path.weight[q], phi);
                }
            low = high;
        }
        for (size_t i = 0; i < run->examples; i++)
            if (used[i])
                by_example[i] -= run->learning_rates[s] * bf_dot(P, phi, gradients + i * P);
        free(kinks), free(path.from), free(path.change), free(path.at);
    }
    free(gradients), free(sum), free(decay), free(phi), free(used);
}

static void test_readouts(void **state)
{
    (void)state;
    for (int n = 0; n < 3; n++)
        for (int reverse = 0; reverse < 2; reverse++) {
            fixture_run f;
            pk_decomposition all, got;
            reader r;
            setup(&f, all_networks[n], "sgd", 4);
            const size_t N = f.run.examples, C = f.run.outputs;
            memset(&r, 0, sizeof r);
            r.outputs = C;
            for (size_t i = 0; i < f.rows; i++)
                r.labels[i] = (int64_t)((i + 1) % C);
            pk_decompose_options options = defaults();
            options.reverse_time = reverse;
            assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &all));
            const double scale = fixture_largest(f.rows * C * N, all.by_example);
            for (size_t k = 0; k <= C; k++) { /* one output each, then the labels' */
                options.readout.kind = k < C ? PK_READOUT_ONE : PK_READOUT_LABEL;
                options.readout.output = k < C ? k : 0;
                options.readout.labels = r.labels;
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &got));
                assert_int_equal(got.outputs, 1);
                for (size_t row = 0; row < f.rows; row++) {
                    const size_t cell = row * C + (k < C ? k : (size_t)r.labels[row]);
                    assert_close(got.final[row], all.final[cell], ROUNDING(1e-14));
                    assert_true(fixture_apart(N, got.by_example + row * N, all.by_example + cell * N) <=
                                ROUNDING(1e-12) * scale);
                }
                pk_decomposition_release(&f.context, &got);
            }
            for (r.kind = 0; r.kind < 4; r.kind++) {
                options.readout.kind = PK_READOUT_FUNCTION;
                options.readout.count = r.kind ? 1 : C;
                options.readout.function = read_out;
                options.readout.user = &r;
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &got));
                assert_true(got.worst_closure <= ROUNDING(1e-12));
                if (r.kind == 0)
                    assert_true(fixture_apart(f.rows * C * N, got.by_example, all.by_example) <=
                                ROUNDING(1e-12) * scale);
                for (size_t row = 0; row < f.rows && r.kind; row++) {
                    bf_real *truth = BF_NEW(bf_real, N);
                    brute_readout(&f.brute, f.inputs + row * f.brute.network.inputs, &r, row, truth);
                    double error = fixture_error(N, got.by_example + row * N, truth);
                    if (!(error <= ROUNDING(1e-10) * fixture_largest_real(N, truth) &&
                          error <= ROUNDING(1e-12) * scale))
                        fail_msg("%s, readout %d, row %zu: error %.3g of %.3g", all_networks[n], r.kind, row,
                                 error, scale);
                    free(truth);
                }
                pk_decomposition_release(&f.context, &got);
            }
            pk_decomposition_release(&f.context, &all);
            teardown(&f);
        }
}

/* ---- kept tensors ------------------------------------------------------------------------------------ */

static const char *const rules[] = {"sgd weight_decay=0.1", "sgd momentum=0.9", "adamw weight_decay=0.2"};

static void test_kept(void **state)
{
    (void)state;
    static const unsigned keeps[PK_KEPT] = {PK_BY_EXAMPLE | PK_BY_STEP | PK_BY_LAYER,
                                            PK_BY_EXAMPLE | PK_BY_LAYER,
                                            PK_BY_STEP | PK_BY_LAYER,
                                            PK_BY_GROUP | PK_BY_STEP,
                                            PK_BY_EXAMPLE | PK_BY_STEP,
                                            PK_BY_GROUP | PK_BY_STEP | PK_BY_LAYER,
                                            PK_BY_STEP,
                                            PK_BY_GROUP};
    enum { GROUPS = 4 }; /* group 2 stays empty */
    for (size_t o = 0; o < 3; o++)
        for (int n = 0; n < 2; n++)
            for (int engine = 0; engine <= PK_ENGINE_INTEGRATED; engine++) {
                fixture_run f;
                pk_decomposition got;
                setup(&f, all_networks[n], rules[o], 3);
                const size_t N = f.run.examples, S = f.run.steps, L = f.run.graph.layers, C = f.run.outputs;
                const size_t sizes[4] = {N, GROUPS, S, L};
                const int64_t groups[7] = {0, 3, 1, 1, 0, 3, 0};
                assert_int_equal(N, 7);
                pk_decompose_options options = defaults();
                memcpy(options.keep, keeps, sizeof keeps);
                options.groups = groups;
                options.group_count = GROUPS;
                options.engine = (pk_engine)engine;
                options.step_closure = 1;
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &got));
                assert_int_equal(got.kept_count, PK_KEPT);
                assert_null(got.by_example);
                assert_null(got.by_layer);
                assert_ptr_equal(got.by_step, got.kept[6].data);
                const double *full = got.kept[0].data, scale = fixture_largest(f.rows * C * N * S * L, full);
                assert_true(scale > 0);
                for (size_t k = 0; k < PK_KEPT; k++) {
                    const pk_tensor *tensor = &got.kept[k];
                    int rank = 2;
                    size_t items = C;
                    assert_int_equal(tensor->axes, keeps[k]);
                    for (int axis = 0; axis < 4; axis++)
                        if (keeps[k] >> axis & 1U) {
                            assert_int_equal(tensor->shape[rank++], sizes[axis]);
                            items *= sizes[axis];
                        }
                    assert_int_equal(tensor->rank, rank);
                    assert_int_equal(tensor->row_items, items);
                    double *sum = FIXTURE_NEW(double, f.rows *items);
                    for (size_t at = 0; at < f.rows * C * N * S * L; at++) {
                        const size_t l = at % L, s = at / L % S, i = at / (L * S) % N;
                        size_t to = at / (L * S * N);
                        to = keeps[k] & PK_BY_EXAMPLE ? to * N + i : to;
                        to = keeps[k] & PK_BY_GROUP ? to * GROUPS + (size_t)groups[i] : to;
                        to = keeps[k] & PK_BY_STEP ? to * S + s : to;
                        to = keeps[k] & PK_BY_LAYER ? to * L + l : to;
                        sum[to] += full[at];
                    }
                    assert_true(fixture_apart(f.rows * items, sum, tensor->data) <= 1e-14 * scale * 10);
                    free(sum);
                }
                for (size_t cell = 0; cell < f.rows * C; cell++) {
                    double data = 0, closure = 0;
                    for (size_t at = 0; at < N * S * L; at++)
                        data += full[cell * N * S * L + at];
                    for (size_t s = 0; s < S; s++)
                        closure += got.step_closure[cell * S + s];
                    assert_close(data, got.data[cell], 1e-13 * scale * 10);
                    assert_close(closure, got.closure[cell], ROUNDING(1e-13));
                    assert_close(got.initial[cell] + got.data[cell] + got.decay[cell] + got.unattributed[cell] +
                                     got.closure[cell],
                                 got.final[cell], 1e-14);
                }
                pk_decomposition_release(&f.context, &got);
                memset(options.keep, 0, sizeof options.keep);
                options.keep[0] = PK_BY_TOTAL;
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &got));
                assert_int_equal(got.kept_count, 0);
                pk_decomposition_release(&f.context, &got);
                teardown(&f);
            }
}

/* ---- parts ------------------------------------------------------------------------------------------- */

typedef struct collector {
    uint64_t hash[64];
    size_t next, calls, fail_after;
    int cancel_after;
} collector;

static pk_status collect(void *user, const pk_decomposition *part)
{
    collector *c = (collector *)user;
    assert_int_equal(part->first_row, c->next);
    assert_true(part->by_example == part->kept[0].data);
    fixture_hash_rows(part, c->hash);
    c->next += part->rows;
    return ++c->calls == c->fail_after ? PK_IO : PK_OK;
}

static int cancel_when_collected(void *user, const char *phase, double fraction)
{
    const collector *c = (const collector *)user;
    assert_non_null(phase);
    assert_true(fraction >= 0 && fraction <= 1);
    return c->cancel_after && c->calls >= (size_t)c->cancel_after;
}

static void test_parts(void **state)
{
    (void)state;
    static const size_t at_once[] = {0, 1, 3, 17, 40, 1000};
    for (size_t o = 0; o < 3; o++)
        for (int n = 0; n < 3; n++) {
            fixture_run f;
            pk_decomposition whole, summary;
            uint64_t hash[64] = {0};
            setup(&f, all_networks[n], rules[o], 40);
            pk_decompose_options options = defaults();
            options.keep[0] = PK_BY_EXAMPLE;
            options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
            options.step_closure = 1;
            assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &whole));
            fixture_hash_rows(&whole, hash);
            for (size_t k = 0; k < sizeof at_once / sizeof *at_once; k++) {
                collector c;
                memset(&c, 0, sizeof c);
                options.rows_at_once = at_once[k];
                assert_ok(&f.context,
                          pk_decompose_parts(&f.context, &f.run, rows_of(&f), &options, collect, &c, &summary));
                assert_int_equal(c.next, f.rows);
                assert_memory_equal(c.hash, hash, sizeof hash);
                assert_true(summary.worst_closure == whole.worst_closure);
                assert_int_equal(summary.worst_row, whole.worst_row);
                assert_int_equal(summary.worst_step, whole.worst_step);
                assert_int_equal(summary.points, whole.points);
                assert_int_equal(summary.passes, c.calls);
                assert_null(summary.initial);
                assert_int_equal(summary.kept_count, 0);
                /* pk_decompose itself, in as many passes */
                pk_decomposition again;
                uint64_t other[64] = {0};
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &again));
                fixture_hash_rows(&again, other);
                assert_memory_equal(other, hash, sizeof hash);
                pk_decomposition_release(&f.context, &again);
            }
            pk_decomposition_release(&f.context, &whole);
            if (n == 0) { /* a part that fails ends it; so does a cancel; what is finished stays */
                collector c;
                memset(&c, 0, sizeof c);
                options.rows_at_once = 1;
                c.fail_after = 2;
                assert_int_equal(
                    pk_decompose_parts(&f.context, &f.run, rows_of(&f), &options, collect, &c, NULL), PK_IO);
                assert_int_equal(c.calls, 2);
                memset(&c, 0, sizeof c);
                c.cancel_after = 1;
                f.context.progress = cancel_when_collected;
                f.context.progress_user = &c;
                assert_refused(
                    &f.context, PK_CANCELLED, "cancelled",
                    pk_decompose_parts(&f.context, &f.run, rows_of(&f), &options, collect, &c, NULL));
                assert_int_equal(c.calls, 1);
                memset(&c, 0, sizeof c); /* a callback that does not cancel sees all of it */
                assert_ok(&f.context,
                          pk_decompose_parts(&f.context, &f.run, rows_of(&f), &options, collect, &c, NULL));
                assert_int_equal(c.next, f.rows);
            }
            teardown(&f);
        }
}

/* Rows that lie apart in memory, no options, no context: the same numbers. */
static void test_views(void **state)
{
    (void)state;
    fixture_run f;
    pk_decomposition whole, other;
    setup(&f, kinked, "sgd", 5);
    assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), NULL, &whole));
    pk_real *wide = FIXTURE_NEW(pk_real, 5 * 8);
    for (size_t i = 0; i < 5 * 8; i++)
        wide[i] = i % 8 < 3 ? f.inputs[i / 8 * 3 + i % 8] : (double)NAN;
    pk_matrix apart = {wide, 5, 3, 8};
    assert_ok(&f.context, pk_decompose(NULL, &f.run, apart, NULL, &other));
    uint64_t a[8] = {0}, b[8] = {0};
    fixture_hash_rows(&whole, a);
    fixture_hash_rows(&other, b);
    assert_memory_equal(a, b, sizeof a);
    pk_decomposition_release(NULL, &other);
    pk_decomposition_release(&f.context, &whole);
    free(wide);
    teardown(&f);
}

/* ---- bounds ------------------------------------------------------------------------------------------ */

static void test_bounds(void **state)
{
    (void)state;
    static const char *const optimizers[] = {"sgd", "sgd momentum=0.9 weight_decay=0.1", "adam",
                                             "adamw weight_decay=0.1"};
    double tightest = 0, loosest = 0; /* error / bound; bound / largest entry */
    for (int n = 0; n < 4; n++)
        for (size_t o = 0; o < 4; o++)
            for (int v = 0; v < 2; v++) {
                fixture_run f;
                bf_result truth;
                pk_decomposition got;
                const bf_recipe recipe =
                    fixture_recipe(61 + (uint64_t)n, 6, 5, v ? 4 : 0,
                                   (strstr(optimizers[o], "adam") ? 0.05 : 0.3) * (v ? 4 : 1));
                setup_with(&f, n < 3 ? all_networks[n] : "input 3; dense 3", BF_SOFTMAX_CROSS_ENTROPY,
                           optimizers[o], &recipe, 3);
                pk_decompose_options options = defaults();
                options.bounds = 1;
                options.reverse_time = v;
                assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &got));
                bf_decompose(&f.brute, f.rows, f.inputs, &truth);
                const size_t entries = f.rows * f.run.outputs * f.run.examples;
                const double scale = fixture_largest(entries, got.by_example);
                for (size_t i = 0; i < entries; i++) {
                    double error = fabs((double)((bf_real)got.by_example[i] - truth.by_example[i]));
                    if (!(error <= got.bounds[i]))
                        fail_msg("%s, %s: entry %zu is off by %.3g, its bound is %.3g", f.run.graph.text,
                                 optimizers[o], i, error, got.bounds[i]);
                    if (got.bounds[i] > 0)
                        tightest = fmax(tightest, error / got.bounds[i]);
                }
                loosest = fmax(loosest, fixture_largest(entries, got.bounds) / scale);
                bf_result_free(&truth);
                pk_decomposition_release(&f.context, &got);
                teardown(&f);
            }
    print_message(
        "bounds: the largest error is %.3g of its bound, the largest bound %.3g of the largest entry\n",
        tightest, loosest);
    assert_true(loosest <= EITHER(1e-8, 4)); /* kinks at small slopes: 1e8 roundings */
}

/* ---- refused ----------------------------------------------------------------------------------------- */

static void test_bad_arguments(void **state)
{
    (void)state;
    fixture_run f;
    pk_decomposition out;
    pk_context *c;
    setup(&f, mixed, "sgd", 3);
    c = &f.context;
    const size_t held = c->memory_used;
    const pk_run *run = &f.run;
    pk_matrix good = rows_of(&f);
    pk_matrix bad = good;
    pk_decompose_options options = defaults();
#define REFUSED(status, words, inputs)                                                  \
    do {                                                                                \
        assert_refused(c, status, words, pk_decompose(c, run, inputs, &options, &out)); \
        assert_null(out.initial);                                                       \
        assert_int_equal(c->memory_used, held);                                         \
        options = defaults();                                                           \
    } while (0)
    bad.rows = 0;
    REFUSED(PK_SHAPE, "0 x 3", bad);
    bad = good, bad.cols = 2;
    REFUSED(PK_SHAPE, "3 x 2", bad);
    bad = good, bad.ld = 2;
    REFUSED(PK_SHAPE, "ld 2", bad);
    bad = good, bad.data = NULL;
    REFUSED(PK_SHAPE, "", bad);
    const double keep = f.inputs[4];
    f.inputs[4] = (double)NAN;
    REFUSED(PK_NOT_FINITE, "row 1, column 1", good);
    f.inputs[4] = (double)INFINITY;
    REFUSED(PK_NOT_FINITE, "row 1, column 1", good);
    f.inputs[4] = keep;
    options.tolerance = -1;
    REFUSED(PK_ARGUMENT, "tolerance", good);
    options.tolerance = (double)NAN;
    REFUSED(PK_ARGUMENT, "tolerance", good);
    options.keep[0] = 64;
    REFUSED(PK_ARGUMENT, "keep[0] = 64", good);
    options.keep[0] = PK_BY_EXAMPLE, options.keep[1] = PK_BY_EXAMPLE | PK_BY_GROUP;
    REFUSED(PK_ARGUMENT, "keep[1] = 3", good);
    options.keep[0] = PK_BY_TOTAL | PK_BY_STEP;
    REFUSED(PK_ARGUMENT, "keep[0]", good);
    options.keep[0] = PK_BY_GROUP;
    REFUSED(PK_ARGUMENT, "groups", good);
    int64_t groups[7] = {0, 1, 2, 0, 1, 2, 3};
    options.keep[0] = PK_BY_GROUP, options.groups = groups, options.group_count = 3;
    REFUSED(PK_ARGUMENT, "example 6 is in group 3 of 3", good);
    groups[6] = -1;
    options.keep[0] = PK_BY_GROUP, options.groups = groups, options.group_count = 3;
    REFUSED(PK_ARGUMENT, "example 6 is in group -1", good);
    options.readout.kind = PK_READOUT_ONE, options.readout.output = 3;
    REFUSED(PK_ARGUMENT, "output 3 of a network with 3", good);
    options.readout.kind = PK_READOUT_LABEL;
    REFUSED(PK_ARGUMENT, "labels", good);
    const int64_t labels[3] = {0, 2, 3}, negative[3] = {0, -1, 0};
    options.readout.kind = PK_READOUT_LABEL, options.readout.labels = labels;
    REFUSED(PK_ARGUMENT, "label 3 of input 2", good);
    options.readout.kind = PK_READOUT_LABEL, options.readout.labels = negative;
    REFUSED(PK_ARGUMENT, "label -1 of input 1", good);
    options.readout.kind = PK_READOUT_FUNCTION, options.readout.count = 1;
    REFUSED(PK_ARGUMENT, "readout", good);
    options.readout.kind = PK_READOUT_FUNCTION, options.readout.function = read_out;
    REFUSED(PK_ARGUMENT, "readout", good);
    options.readout.kind = (pk_readout_kind)7;
    REFUSED(PK_ARGUMENT, "readout", good);
    options.engine = (pk_engine)(PK_ENGINE_INTEGRATED + 1);
    REFUSED(PK_ARGUMENT, "engine 4", good);
    options.quadrature.rule = (pk_rule)6;
    REFUSED(PK_ARGUMENT, "rule 6", good);
    options.quadrature.rule = PK_RULE_GAUSS, options.quadrature.nodes = PK_GAUSS_NODES + 1;
    REFUSED(PK_ARGUMENT, "33 nodes", good);
    options.quadrature.rule = PK_RULE_MIDPOINT, options.quadrature.nodes = -1;
    REFUSED(PK_ARGUMENT, "-1 nodes", good);
    options.quadrature.rule = PK_RULE_LEFT, options.quadrature.nodes = PK_RULE_NODES + 1;
    REFUSED(PK_ARGUMENT, "nodes", good);
    options.quadrature.rule = PK_RULE_TRAPEZOID, options.quadrature.nodes = 1;
    REFUSED(PK_ARGUMENT, "at least 2", good);
    options.quadrature.rule = PK_RULE_EXACT; /* the network is mixed */
    REFUSED(PK_UNSUPPORTED, "exact", good);
    options.bounds = 1, options.quadrature.rule = PK_RULE_LEFT;
    REFUSED(PK_UNSUPPORTED, "bounds", good);
    options.step_closure = 1;
    assert_refused(c, PK_ARGUMENT, "function", pk_decompose_parts(c, run, good, &options, NULL, NULL, NULL));
    teardown(&f);
}

/* The largest output or contribution of a row of a run by plain gradient descent, whose steps change its outputs by what
 * the examples of that step contribute. contribution: the latter alone. */
static double row_scale(const pk_decomposition *d, size_t row, double *contribution)
{
    double outputs = 0, largest = 0;
    for (size_t i = row * d->outputs; i < (row + 1) * d->outputs; i++) {
        double path = 0;
        outputs = fmax(outputs, fmax(fabs(d->initial[i]), fabs(d->final[i])));
        for (size_t n = 0; n < d->examples; n++)
            largest = fmax(largest, fabs(d->by_example[i * d->examples + n]));
        for (size_t s = 0; s < d->steps; s++)
            path += fabs(d->by_step[i * d->steps + s]);
        largest = fmax(largest, path);
    }
    *contribution = largest;
    return fmax(outputs, largest);
}

/* The left rule does not close: the result is there, and the message tells where it is worst. */
static void test_not_closed(void **state)
{
    (void)state;
    fixture_run f;
    pk_decomposition out;
    setup(&f, kinked, "sgd", 5);
    pk_decompose_options options = defaults();
    options.quadrature.rule = PK_RULE_LEFT;
    options.step_closure = 1;
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP;
    assert_int_equal(pk_decompose(&f.context, &f.run, rows_of(&f), &options, &out), PK_NOT_CLOSED);
    double worst = 0, worst_relative = 0, worst_step = 0;
    char words[3][80];
    size_t step = 0, row = 0, output = 0;
    for (size_t i = 0; i < f.rows * out.outputs; i++) {
        double contribution;
        const double scale = row_scale(&out, i / out.outputs, &contribution);
        worst = fmax(worst, fabs(out.closure[i]) / scale);
        if (fabs(out.closure[i]) / contribution > worst_relative) {
            worst_relative = fabs(out.closure[i]) / contribution;
            row = i / out.outputs;
            output = i % out.outputs;
        }
        for (size_t s = 0; s < out.steps; s++)
            if (fabs(out.step_closure[i * out.steps + s]) > worst_step) {
                worst_step = fabs(out.step_closure[i * out.steps + s]);
                step = s;
            }
    }
    assert_true(worst > 1e-4);
    assert_close(out.worst_closure, worst, ROUNDING(1e-12) * worst);
    assert_close(out.worst_relative, worst_relative, ROUNDING(1e-12) * worst_relative);
    assert_close(out.worst_excess, worst_relative / PK_TOLERANCE, ROUNDING(1e-12) * out.worst_excess);
    assert_close(out.worst_step_closure, worst_step, 0);
    assert_int_equal(out.worst_row, row);
    assert_int_equal(out.worst_output, output);
    assert_int_equal(out.worst_step, step);
    snprintf(words[0], sizeof words[0], "row %zu", row);
    snprintf(words[1], sizeof words[1], "output %zu", output);
    snprintf(words[2], sizeof words[2], "step is %zu", step);
    for (int k = 0; k < 3; k++)
        assert_non_null(strstr(pk_message(&f.context), words[k]));
    pk_decomposition_release(&f.context, &out);
    options.tolerance = 1.001 * worst_relative; /* a looser tolerance closes */
    assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &out));
    pk_decomposition_release(&f.context, &out);
    options.tolerance = 0; /* parts end with the same status, all delivered */
    collector c;
    memset(&c, 0, sizeof c);
    assert_int_equal(pk_decompose_parts(&f.context, &f.run, rows_of(&f), &options, collect, &c, &out),
                     PK_NOT_CLOSED);
    assert_int_equal(c.next, f.rows);
    teardown(&f);
}

/* A wrong optimizer shows as unattributed; closure stays. */
static void test_wrong_optimizer(void **state)
{
    (void)state;
    static const char *const wrong[] = {"sgd", "adamw beta1=0.8 weight_decay=0.1", "adamw weight_decay=0.2",
                                        "adam"};
    bf_run brute;
    const bf_recipe recipe = fixture_recipe(71, 6, 6, 4, 0.05);
    fixture_make(mixed, BF_SOFTMAX_CROSS_ENTROPY, "adamw weight_decay=0.1", &recipe, &brute);
    pk_real *inputs = fixture_normals(3, 2 * 3, 1);
    for (int k = -1; k < 4; k++) {
        pk_context context;
        pk_run run;
        pk_decomposition out;
        memset(&context, 0, sizeof context);
        fixture_open_as(&context, &brute, NULL, k < 0 ? NULL : wrong[k], &run);
        assert_int_equal(pk_decompose(&context, &run, pk_matrix_view(inputs, 2, 3), NULL, &out),
                         k < 0 ? PK_OK : PK_UNATTRIBUTED);
        assert_true(k < 0 ? out.worst_unattributed < ROUNDING(1e-13) : out.worst_unattributed > 1e-4);
        double worst = 0;
        for (size_t i = 0; i < out.rows * out.outputs; i++)
            worst = fmax(worst, fabs(out.unattributed[i]) / fmax(1, fabs(out.final[i])));
        assert_true(worst == out.worst_unattributed);
        const size_t cell = out.worst_unattributed_row * out.outputs + out.worst_unattributed_output;
        assert_true(fabs(out.unattributed[cell]) / fmax(1, fabs(out.final[cell])) == worst);
        /* The limit is the caller's to choose; a tolerance that is missed as well comes first, in the same line. */
        if (k >= 0) {
            char limit[40];
            pk_decompose_options options;
            snprintf(limit, sizeof limit, "exceeds %.3g", out.unattributed_limit);
            assert_non_null(strstr(pk_message(&context), "unattributed "));
            assert_non_null(strstr(pk_message(&context), limit));
            memset(&options, 0, sizeof options);
            pk_decomposition_release(&context, &out);
            options.unattributed = 1.01 * worst;
            assert_ok(&context, pk_decompose(&context, &run, pk_matrix_view(inputs, 2, 3), &options, &out));
            pk_decomposition_release(&context, &out);
            options.unattributed = 0.99 * worst;
            options.tolerance = 1e-300;
            assert_int_equal(pk_decompose(&context, &run, pk_matrix_view(inputs, 2, 3), &options, &out),
                             PK_NOT_CLOSED);
            assert_non_null(strstr(pk_message(&context), "closure "));
            assert_non_null(strstr(pk_message(&context), "; and unattributed "));
            assert_non_null(strstr(pk_message(&context), "the declared training"));
        }
        assert_true(out.worst_closure <= ROUNDING(1e-12));
        pk_decomposition_release(&context, &out);
        pk_run_release(&context, &run);
    }
    free(inputs);
    bf_run_free(&brute);
}

/* ---- hostile runs ------------------------------------------------------------------------------------ */

/* Weights that are no numbers or overflow end with a status, at every step, with every kind of optimizer. */
static void test_not_finite(void **state)
{
    (void)state;
    static const double values[] = {(double)NAN,         (double)INFINITY,      -(double)INFINITY,
                                    EITHER(1e300, 1e37), EITHER(-1e308, -3e38), EITHER(1e155, 1e20),
                                    EITHER(1e100, 1e15), EITHER(1e30, 1e5)};
    enum { VALUES = 8 };
    for (size_t o = 0; o < 3; o++)
        for (int n = 0; n < 3; n++)
            for (size_t k = 0; k < VALUES; k++)
                for (int where = 0; where < 2; where++) {
                    fixture_run f;
                    pk_decomposition out;
                    setup(&f, all_networks[n], rules[o], 3);
                    const size_t P = f.run.parameters;
                    pk_real *own = FIXTURE_NEW(pk_real, (f.run.steps + 1) * P);
                    memcpy(own, f.brute.weights, (f.run.steps + 1) * P * sizeof *own);
                    if (where) /* one weight of one step; else all of a step */
                        own[3 * P + 2] = values[k];
                    else
                        for (size_t p = 0; p < P; p++)
                            own[3 * P + p] *= values[k];
                    const pk_array recorded = f.run.weights;
                    const size_t shape[2] = {f.run.steps + 1, P};
                    f.run.weights = pk_array_view(REAL_TYPE, 2, shape, own);
                    pk_status status = pk_decompose(&f.context, &f.run, rows_of(&f), NULL, &out);
                    if (!isfinite(values[k])) {
                        assert_int_equal(status, PK_NOT_FINITE);
                        assert_non_null(strstr(pk_message(&f.context), "3"));
                    } else if (status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED &&
                               status != PK_NOT_FINITE) {
                        fail_msg("weights of %g: %s: %s", values[k], pk_status_text(status),
                                 pk_message(&f.context));
                    }
                    /* What is called closed is closed. */
                    const int closed = status == PK_OK || status == PK_UNATTRIBUTED;
                    for (size_t i = 0; closed && i < f.rows * out.outputs; i++)
                        assert_true(fabs(out.closure[i]) <= PK_TOLERANCE * fmax(DBL_MIN, out.scale));
                    pk_decomposition_release(&f.context, &out);
                    f.run.weights = recorded;
                    free(own);
                    teardown(&f);
                }
}

/* Tiny numbers: denormal weights and steps. */
static void test_tiny(void **state)
{
    (void)state;
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.unattributed = (double)INFINITY; /* no rule trained these */
    for (int n = 0; n < 3; n++)
        for (int exponent = EITHER(-320, -44); exponent <= EITHER(-20, -4); exponent += EITHER(50, 8)) {
            fixture_run f;
            pk_decomposition out;
            setup(&f, all_networks[n], "sgd", 3);
            const size_t P = f.run.parameters;
            pk_real *own = FIXTURE_NEW(pk_real, (f.run.steps + 1) * P);
            for (size_t i = 0; i < (f.run.steps + 1) * P; i++)
                own[i] = f.brute.weights[i] * pow(10, exponent);
            const pk_array recorded = f.run.weights;
            const size_t shape[2] = {f.run.steps + 1, P};
            f.run.weights = pk_array_view(REAL_TYPE, 2, shape, own);
            assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &out));
            pk_decomposition_release(&f.context, &out);
            f.run.weights = recorded;
            free(own);
            teardown(&f);
        }
}

static void test_no_steps(void **state)
{
    (void)state;
    for (size_t o = 0; o < 3; o++)
        for (int n = 0; n < 3; n++) {
            fixture_run f;
            pk_decomposition out;
            const bf_recipe recipe = fixture_recipe(9, 4, 0, 0, 0.1);
            setup_with(&f, all_networks[n], BF_SQUARED, rules[o], &recipe, 3);
            pk_decompose_options options = defaults();
            options.keep[0] = PK_BY_EXAMPLE;
            options.keep[1] = PK_BY_STEP;
            options.keep[2] = PK_BY_LAYER;
            options.step_closure = options.bounds = 1;
            assert_ok(&f.context, pk_decompose(&f.context, &f.run, rows_of(&f), &options, &out));
            assert_int_equal(out.steps, 0);
            assert_close(fixture_largest(f.rows * 3 * 4, out.by_example), 0, 0);
            assert_close(out.worst_closure, 0, 0);
            assert_memory_equal(out.initial, out.final, f.rows * 3 * sizeof(double));
            pk_decomposition_release(&f.context, &out);
            teardown(&f);
        }
}

/* ---- strongest --------------------------------------------------------------------------------------- */

static void test_strongest(void **state)
{
    (void)state;
    const double values[] = {1, -3, 0, 5, 5, -3, 2, -0.0, (double)NAN};
    size_t at[9];
    assert_int_equal(pk_strongest(values, 9, 1, 3, at), 3);
    assert_true(at[0] == 3 && at[1] == 4 && at[2] == 6);
    assert_int_equal(pk_strongest(values, 9, 1, 9, at), 4);
    assert_int_equal(at[3], 0);
    assert_int_equal(pk_strongest(values, 9, -1, 9, at), 2);
    assert_true(at[0] == 1 && at[1] == 5);
    assert_int_equal(pk_strongest(values, 9, -1, 1, at), 1);
    assert_int_equal(at[0], 1);
    assert_int_equal(pk_strongest(values, 9, 1, 0, at), 0);
    assert_int_equal(pk_strongest(values, 0, 1, 3, at), 0);
    double many[100];
    uint64_t seed = 1;
    for (int trial = 0; trial < 50; trial++) {
        size_t wanted = 1 + (size_t)trial % 20, chosen[20];
        for (int i = 0; i < 100; i++)
            many[i] = floor(10 * bf_normal(&seed));
        size_t found = pk_strongest(many, 100, -1, wanted, chosen);
        size_t below = 0;
        for (int i = 0; i < 100; i++)
            below += many[i] < 0;
        assert_int_equal(found, below < wanted ? below : wanted);
        for (size_t k = 1; k < found; k++)
            assert_true(many[chosen[k - 1]] < many[chosen[k]] ||
                        (many[chosen[k - 1]] == many[chosen[k]] && chosen[k - 1] < chosen[k]));
        for (size_t i = 0, stronger = 0; found && i < 100; i++) {
            stronger += many[i] < many[chosen[found - 1]];
            assert_true(stronger < wanted);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_readouts),   cmocka_unit_test(test_kept),
        cmocka_unit_test(test_parts),      cmocka_unit_test(test_views),
        cmocka_unit_test(test_bounds),     cmocka_unit_test(test_bad_arguments),
        cmocka_unit_test(test_not_closed), cmocka_unit_test(test_wrong_optimizer),
        cmocka_unit_test(test_not_finite), cmocka_unit_test(test_tiny),
        cmocka_unit_test(test_no_steps),   cmocka_unit_test(test_strongest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
