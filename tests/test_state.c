/* Runs that begin with an optimizer's state, and averages of the weights: against the definition, and against the longer run that
 * a resumed one is a part of. */
#include "trained.h"
#include <sys/stat.h>
#include <unistd.h>

enum { ROWS = 3, EXAMPLES = 7, BEFORE = 3, AFTER = 5, STEPS = BEFORE + AFTER };

static const char *const optimizers[] = {
    "sgd momentum=0.9",
    "sgd momentum=0.8 nesterov=1 weight_decay=0.02",
    "sgd momentum=0.7 dampening=0.4",
    "sgd momentum=0.8 nesterov=1 maximize=1 weight_decay=0.05",
    "adam epsilon=1e-4",
    "adam epsilon=1e-4 weight_decay=0.05 maximize=1",
    "adamw epsilon=1e-4 beta1=0.8 beta2=0.95 weight_decay=0.1",
    "adam epsilon=1e-4 beta2=0.5 amsgrad=1",
    "rmsprop epsilon=1e-3",
    "rmsprop epsilon=1e-3 alpha=0.8 momentum=0.7 weight_decay=0.05",
    "rmsprop epsilon=1e-2 alpha=0.8 centered=1 weight_decay=0.02",
    "rmsprop epsilon=1e-2 alpha=0.7 centered=1 momentum=0.6 maximize=1",
    "adagrad epsilon=1e-3 weight_decay=0.05",
    "adagrad lr_decay=0.1 initial_accumulator_value=0.1 maximize=1",
    "nadam epsilon=1e-4 weight_decay=0.05",
    "nadam epsilon=1e-4 weight_decay=0.05 decoupled_weight_decay=1 momentum_decay=0.1",
    "nadam epsilon=1e-4 maximize=1",
    "sgd",
    "sgd weight_decay=0.05",
};
enum { OPTIMIZERS = (int)(sizeof optimizers / sizeof *optimizers), STATEFUL = OPTIMIZERS - 2 };

static const char *const networks[] = {
    "input 4; dense 5; tanh; dense 4; gelu; dense 2",
    "input 4; dense 5; layer_norm; sigmoid; dense 2",
    "input 4; dense 6; relu; dense 5; relu; dense 2",
    "input 4; dense 4 name=a; tanh; dense 4 tied=a; tanh; dense 4 nobias tied=a.weight transposed; sigmoid; "
    "dense 2",
};
enum { NETWORKS = (int)(sizeof networks / sizeof *networks), KINKED = 2 };

typedef struct case_data {
    pk_context context;
    pk_graph graph;
    pk_criterion criterion;
    pk_optimizer optimizer;
    pk_dataset data;
    size_t shape_x[2], shape_y[2], P, vectors;
    pk_real *x, *y, *test, *start;
    const char *lines[2];
    size_t line_count;
    char folder[2][300]; /* of the long run, of the resumed one */
} case_data;

/* Some rule's rate: it does not blow up. */
static double rate_of(const char *rule)
{
    return strstr(rule, "maximize") || rule[0] != 's' ? 0.02 : 0.1;
}

static void begin_case(const char *network, const char *rule, int grouped, uint64_t seed, case_data *c)
{
    memset(c, 0, sizeof *c);
    assert_ok(&c->context, pk_network_parse(&c->context, network, &c->graph));
    assert_ok(&c->context, pk_criterion_parse(&c->context, "squared", &c->criterion));
    assert_ok(&c->context, pk_optimizer_parse(&c->context, rule, &c->optimizer));
    c->P = c->graph.parameters;
    c->x = fixture_normals(seed, EXAMPLES * 4, 1);
    c->y = fixture_normals(seed + 1, EXAMPLES * 2, 1);
    c->test = fixture_normals(seed + 2, ROWS * 4, 1);
    c->start = FIXTURE_NEW(pk_real, c->P);
    c->shape_x[0] = c->shape_y[0] = EXAMPLES;
    c->shape_x[1] = 4;
    c->shape_y[1] = 2;
    c->data.inputs = pk_array_view(REAL_TYPE, 2, c->shape_x, c->x);
    c->data.targets = pk_array_view(REAL_TYPE, 2, c->shape_y, c->y);
    assert_ok(&c->context, pk_network_initialize(&c->context, &c->graph, seed, c->start));
    if (grouped) {
        c->lines[0] = strncmp(rule, "adagrad", 7) == 0   ? "1,3 weight_decay=0 lr_decay=0.3"
                      : strncmp(rule, "rmsprop", 7) == 0 ? "1,3 weight_decay=0 momentum=0.5 rate=0.5"
                      : strstr(rule, "momentum=")        ? "1,3 weight_decay=0 momentum=0.4 nesterov=0 rate=0.5"
                      : rule[0] == 's'                   ? "1,3 weight_decay=0 rate=0.5"
                      : strncmp(rule, "ada", 3) == 0     ? "1,3 weight_decay=0 beta1=0.5 amsgrad=1"
                                                         : "1,3 weight_decay=0 beta1=0.5 maximize=1";
        c->lines[1] = "0 frozen";
        c->line_count = 2;
    }
    snprintf(c->folder[0], sizeof c->folder[0], "%s/long", fixture_run_path);
    snprintf(c->folder[1], sizeof c->folder[1], "%s/resumed", fixture_run_path);
    (void)mkdir(fixture_run_path, 0777);
}

static void end_case(case_data *c)
{
    pk_criterion_release(&c->context, &c->criterion);
    pk_graph_release(&c->context, &c->graph);
    assert_int_equal(c->context.memory_used, 0);
    free(c->x), free(c->y), free(c->test), free(c->start);
    for (int k = 0; k < 2; k++)
        fixture_clear(c->folder[k]), (void)rmdir(c->folder[k]);
    (void)rmdir(fixture_run_path);
}

static pk_train_options options_of(const case_data *c, const char *rule, double clip)
{
    pk_train_options options = {0};
    options.criterion = &c->criterion;
    options.optimizer = c->optimizer;
    options.schedule.rate = rate_of(rule);
    options.clip_norm = clip;
    options.groups = c->lines;
    options.group_count = c->line_count;
    options.replace = 1;
    return options;
}

/* Trains STEPS steps, and again the last AFTER of them from the state in between: the same bits. */
static void train_twice(case_data *c, const char *rule, double clip, size_t keep_every)
{
    pk_train_options options = options_of(c, rule, clip);
    pk_real *long_end = FIXTURE_NEW(pk_real, c->P), *w = FIXTURE_NEW(pk_real, c->P), *state = NULL;
    memcpy(long_end, c->start, c->P * sizeof *w);
    options.steps = STEPS;
    options.record = c->folder[0];
    options.keep_every = BEFORE;
    assert_ok(&c->context, pk_train(&c->context, &c->graph, &c->data, &options, long_end, NULL));
    pk_run run;
    assert_ok(&c->context, pk_run_open(&c->context, c->folder[0], &run));
    c->vectors = pk_parameter_groups_state_vectors(&run.optimizer, &run.groups);
    state = FIXTURE_NEW(pk_real, c->vectors * c->P + 1);
    if (c->vectors)
        assert_ok(&c->context, pk_array_read(&c->context, &run.optimizer_states, c->vectors * c->P,
                                             c->vectors * c->P, state));
    assert_ok(&c->context, pk_run_weights(&c->context, &run, BEFORE, w));
    pk_run_release(&c->context, &run);
    options.steps = AFTER;
    options.record = c->folder[1];
    options.keep_every = keep_every;
    options.initial_state = c->vectors ? state : NULL;
    options.initial_step = BEFORE;
    assert_ok(&c->context, pk_train(&c->context, &c->graph, &c->data, &options, w, NULL));
    assert_memory_equal(w, long_end, c->P * sizeof *w);
    free(long_end), free(w), free(state);
}

typedef struct definition {
    pk_reference out;
    double *memory;
    size_t cells, examples;
} definition;

static definition define(pk_context *context, const pk_run *run, pk_matrix inputs, const pk_average *average,
                         int kinked)
{
    definition d;
    d.cells = inputs.rows * run->outputs;
    d.examples = run->examples;
    d.memory = FIXTURE_NEW(double, d.cells *(6 + d.examples));
    double *at = d.memory;
    double **const parts[] = {&d.out.initial,      &d.out.final,   &d.out.decay,     &d.out.inherited,
                              &d.out.unattributed, &d.out.closure, &d.out.by_example};
    for (size_t i = 0; i < 7; i++, at += d.cells)
        *parts[i] = at;
    assert_ok(context, pk_decompose_reference_average(context, run, inputs, average, kinked ? 500 : 1,
                                                      kinked ? 2 : 20, &d.out));
    return d;
}

/* How far the engine is from the definition, as a part of the largest entry; kinked: the definition is rough. */
static double apart(const pk_decomposition *got, const definition *d)
{
    const double largest = fixture_largest(d->cells * d->examples, d->out.by_example);
    double worst = fixture_apart(d->cells * d->examples, got->by_example, d->out.by_example);
    worst = fmax(worst, fixture_apart(d->cells, got->decay, d->out.decay));
    worst = fmax(worst, fixture_apart(d->cells, got->inherited, d->out.inherited));
    worst = fmax(worst, fixture_apart(d->cells, got->unattributed, d->out.unattributed));
    worst = fmax(worst, fixture_apart(d->cells, got->initial, d->out.initial));
    worst = fmax(worst, fixture_apart(d->cells, got->final, d->out.final));
    assert_true(largest > 1e-4);
    return worst / largest;
}

/* final - initial is the sum of everything. */
static void assert_adds_up(const pk_decomposition *d)
{
    for (size_t i = 0; i < d->rows * d->outputs; i++) {
        const double sum =
            d->initial[i] + d->data[i] + d->decay[i] + d->inherited[i] + d->unattributed[i] + d->closure[i];
        assert_true(fabs(sum - d->final[i]) <= 1e-14 * d->scale);
    }
    assert_true(d->worst_closure <= ROUNDING(1e-12));
    assert_true(d->worst_unattributed <= ROUNDING(1e-12));
}

/* Whether some tensor that is trained has a momentum. */
static int has_momentum(const pk_run *run)
{
    for (size_t g = 0; g <= run->groups.count; g++) {
        const pk_optimizer *own = g ? &run->groups.group[g - 1].optimizer : &run->optimizer;
        if ((!g || !run->groups.group[g - 1].frozen) && own->kind != PK_ADAGRAD &&
            ((own->kind != PK_RMSPROP && own->kind != PK_SGD) || own->momentum != 0))
            return 1;
    }
    return 0;
}

static void test_resumed(void **state)
{
    (void)state;
    double worst = 0, worst_split = 0, worst_closure = 0;
    int runs = 0;
    for (int n = 0; n < NETWORKS; n++)
        for (int o = 0; o < STATEFUL; o++)
            for (int grouped = 0; grouped < 2; grouped++) {
                const char *rule = optimizers[o];
                case_data c;
                pk_run run, whole;
                pk_decomposition got, before;
                pk_decompose_options options = {0};
                const pk_average none = {0};
                begin_case(networks[n], rule, grouped, (uint64_t)(100 * n + o), &c);
                train_twice(&c, rule, o % 3 == 1 ? 0.3 : 0, o % 3 == 2 ? 2 : 1);
                assert_ok(&c.context, pk_run_open(&c.context, c.folder[0], &whole));
                assert_ok(&c.context, pk_run_open(&c.context, c.folder[1], &run));
                assert_int_equal(run.optimizer.initial_step, BEFORE);
                const pk_matrix inputs = pk_matrix_view(c.test, ROWS, 4);
                options.keep[0] = PK_BY_EXAMPLE;
                options.keep[1] = PK_BY_EXAMPLE | PK_BY_STEP;
                assert_ok(&c.context, pk_decompose(&c.context, &whole, inputs, &options, &before));
                assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &got));
                assert_adds_up(&got);
                assert_true(fixture_largest(before.rows * 2, before.inherited) == 0);
                worst_closure = fmax(worst_closure, got.worst_closure);
                definition d = define(&c.context, &run, inputs, &none, n == KINKED);
                const double largest = fixture_largest(d.cells * d.examples, got.by_example);
                const double error = apart(&got, &d);
                if (!(error <= (n == KINKED ? 1e-2 : ROUNDING(1e-10))))
                    fail_msg("%s; %s: %.3g of the largest", networks[n], rule, error);
                worst = n == KINKED ? worst : fmax(worst, error);
                /* What is inherited is not small, where there is a momentum, and zero elsewhere. */
                const double inherited = fixture_largest(d.cells, got.inherited);
                if (has_momentum(&run) ? !(inherited > 1e-6) : inherited != 0)
                    fail_msg("%s; %s: inherited %.3g", networks[n], rule, inherited);
                /* Gradients of the same steps contribute the same to the same end: the longer run's last steps. */
                const double *all = before.kept[1].data, *part = got.kept[1].data;
                double split = 0;
                for (size_t i = 0; i < d.cells * d.examples; i++)
                    split = fmax(split, fixture_apart(AFTER, part + i * AFTER, all + i * STEPS + BEFORE));
                worst_split = fmax(worst_split, split / largest);
                if (!(split <= ROUNDING(1e-12) * largest))
                    fail_msg("%s; %s: steps differ by %.3g", networks[n], rule, split / largest);
                pk_decomposition_release(&c.context, &before);
                /* One row in a pass: the same bits. */
                options.rows_at_once = 1;
                assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &before));
                assert_memory_equal(before.inherited, got.inherited, d.cells * sizeof(double));
                assert_memory_equal(before.by_example, got.by_example, d.cells * d.examples * sizeof(double));
                pk_decomposition_release(&c.context, &before);
                pk_decomposition_release(&c.context, &got);
                /* Its bounds hold. */
                if (n == 0 && !strstr(rule, "centered")) {
                    options = (pk_decompose_options){.bounds = 1};
                    assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &got));
                    assert_adds_up(&got);
                    for (size_t i = 0; i < d.cells * d.examples; i++)
                        assert_true(fabs(got.by_example[i] - d.out.by_example[i]) <=
                                    got.bounds[i] + ROUNDING(2e-14) * largest);
                    pk_decomposition_release(&c.context, &got);
                }
                free(d.memory);
                pk_run_release(&c.context, &whole);
                pk_run_release(&c.context, &run);
                end_case(&c);
                runs++;
            }
    print_message(
        "%d runs: entries differ by %.2g of the largest, by step from the longer run %.2g, closure %.2g\n",
        runs, worst, worst_split, worst_closure);
}

static const char *const averages[] = {"ema:0.7", "ema:0.6:1", "ema:0.5:2:2", "swa:0:1",
                                       "swa:2:3", "swa:1:2",   "ema:0"};
enum { AVERAGES = (int)(sizeof averages / sizeof *averages) };

/* a_S from its definition: the weights one by one. */
static void average_plainly(case_data *c, const pk_run *run, const char *text, double *mean)
{
    pk_replay replay;
    pk_real *w = FIXTURE_NEW(pk_real, c->P);
    double beta = 0, used = 0;
    unsigned from = 0, every = 1;
    const int ema = text[0] == 'e';
    if (ema)
        (void)sscanf(text, "ema:%lf:%u:%u", &beta, &from, &every);
    else
        (void)sscanf(text, "swa:%u:%u", &from, &every);
    assert_ok(&c->context, pk_replay_prepare(&c->context, run, 0, &replay));
    for (size_t s = from; s <= run->steps; s += every, used++) {
        assert_ok(&c->context, pk_replay_weights(&c->context, &replay, s, w));
        for (size_t p = 0; p < c->P; p++)
            mean[p] = used == 0 ? (double)w[p]
                      : ema     ? beta * mean[p] + (1 - beta) * w[p]
                                : (mean[p] * used + w[p]) / (used + 1);
    }
    pk_replay_release(&c->context, &replay);
    free(w);
}

static void judge_average(case_data *c, const pk_run *run, const char *network, const char *rule, int a,
                          double *worst, double *worst_closure)
{
    pk_decomposition got, other;
    pk_decompose_options options = {0};
    const int kinked = strcmp(network, networks[KINKED]) == 0;
    const pk_matrix inputs = pk_matrix_view(c->test, ROWS, 4);
    assert_ok(&c->context, pk_average_parse(&c->context, averages[a], &options.average));
    assert_ok(&c->context, pk_decompose(&c->context, run, inputs, &options, &got));
    assert_adds_up(&got);
    *worst_closure = fmax(*worst_closure, got.worst_closure);
    definition d = define(&c->context, run, inputs, &options.average, kinked);
    const double largest = fixture_largest(d.cells * d.examples, d.out.by_example);
    const double error = apart(&got, &d);
    if (!(error <= (kinked ? 1e-2 : ROUNDING(1e-10))))
        fail_msg("%s; %s; %s: %.3g of the largest", network, rule, averages[a], error);
    *worst = kinked ? *worst : fmax(*worst, error);
    /* final is the network at the average of the weights. */
    double *mean = FIXTURE_NEW(double, c->P);
    pk_real *weights = FIXTURE_NEW(pk_real, c->P), f[ROWS * 2];
    average_plainly(c, run, averages[a], mean);
    assert_ok(&c->context, pk_run_average(&c->context, run, &options.average, weights));
    for (size_t p = 0; p < c->P; p++)
        assert_true(fabs(weights[p] - mean[p]) <= ROUNDING(1e-14) * (1 + fabs(mean[p])));
    assert_ok(&c->context,
              pk_graph_evaluate(&c->context, &c->graph, weights, inputs, pk_matrix_view(f, ROWS, 2)));
    for (size_t i = 0; i < d.cells; i++)
        assert_true(fabs(f[i] - got.final[i]) <= ROUNDING(1e-14) * got.scale);
    free(mean), free(weights);
    /* Other passes give the same bits; an average that follows the weights is the weights. */
    options.rows_at_once = 1;
    assert_ok(&c->context, pk_decompose(&c->context, run, inputs, &options, &other));
    assert_memory_equal(got.by_example, other.by_example, d.cells * d.examples * sizeof(double));
    assert_memory_equal(got.decay, other.decay, d.cells * sizeof(double));
    assert_memory_equal(got.inherited, other.inherited, d.cells * sizeof(double));
    pk_decomposition_release(&c->context, &other);
    if (strcmp(averages[a], "ema:0") == 0) {
        options = (pk_decompose_options){.reverse_time = 1};
        assert_ok(&c->context, pk_decompose(&c->context, run, inputs, &options, &other));
        assert_true(fixture_apart(d.cells * d.examples, got.by_example, other.by_example) <=
                    ROUNDING(1e-13) * largest);
        pk_decomposition_release(&c->context, &other);
    } else if (!kinked && a % 2 == 0 && !strstr(rule, "centered")) {
        options = (pk_decompose_options){.bounds = 1, .average = options.average};
        assert_ok(&c->context, pk_decompose(&c->context, run, inputs, &options, &other));
        for (size_t i = 0; i < d.cells * d.examples; i++)
            assert_true(fabs(other.by_example[i] - d.out.by_example[i]) <=
                        other.bounds[i] + ROUNDING(2e-14) * largest);
        pk_decomposition_release(&c->context, &other);
    }
    pk_decomposition_release(&c->context, &got);
    free(d.memory);
}

static void test_averages(void **state)
{
    (void)state;
    double worst = 0, worst_closure = 0;
    int runs = 0;
    for (int n = 0; n < NETWORKS; n++)
        for (int o = 0; o < OPTIMIZERS; o++) {
            case_data c;
            if (n && (n + o) % 3) /* all of the first network, a third of the others */
                continue;
            begin_case(networks[n], optimizers[o], (o + n) % 2, (uint64_t)(200 * n + 10 * o), &c);
            train_twice(&c, optimizers[o], o % 3 == 1 ? 0.3 : 0, o % 2 ? 2 : 1);
            for (int a = 0; a < AVERAGES; a++, runs++) {
                pk_run run;
                assert_ok(&c.context, pk_run_open(&c.context, c.folder[(o + a / 2) % 2], &run));
                if (a == 1) /* the average of the first steps */
                    assert_ok(&c.context, pk_run_until(&c.context, &run, run.steps - 1));
                judge_average(&c, &run, networks[n], optimizers[o], a, &worst, &worst_closure);
                pk_run_release(&c.context, &run);
            }
            end_case(&c);
        }
    print_message("%d runs: entries differ by %.2g of the largest, closure %.2g\n", runs, worst, worst_closure);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resumed),
        cmocka_unit_test(test_averages),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
