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
    "input 4; dense 4 name=a; tanh; dense 4 tied=a; tanh; dense 4 nobias tied=a.weight transposed; dense 2",
    "input 1x2x2; conv 2 2x2 pad=1; tanh; flatten; dense 2",
    "input 2x2; dense 4; residual( layer_norm; attention 2 ); mean_tokens; dense 2",
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

/* Little memory, so that windows are short and states of the optimizer and of the average are computed again: the same bits. */
static void test_memory(void **state)
{
    (void)state;
    case_data c;
    pk_run run;
    pk_decomposition whole, part;
    pk_decompose_options options = {0};
    const char *rule = "adamw epsilon=1e-4 weight_decay=0.1";
    begin_case(networks[0], rule, 0, 5, &c);
    pk_train_options training = options_of(&c, rule, 0);
    pk_real begin[2 * 59], *w = FIXTURE_NEW(pk_real, c.P);
    for (size_t i = 0; i < 2 * 59; i++)
        begin[i] = (pk_real)(i < 59 ? 0.01 * sin((double)i) : 0.01);
    memcpy(w, c.start, c.P * sizeof *w);
    training.steps = 60;
    training.record = c.folder[0];
    training.initial_state = begin;
    training.initial_step = 9;
    assert_ok(&c.context, pk_train(&c.context, &c.graph, &c.data, &training, w, NULL));
    assert_ok(&c.context, pk_run_open(&c.context, c.folder[0], &run));
    assert_ok(&c.context, pk_average_parse(&c.context, "swa:11:4", &options.average));
    const pk_matrix inputs = pk_matrix_view(c.test, ROWS, 4);
    assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &whole));
    assert_adds_up(&whole);
    const size_t cells = ROWS * 2, held = c.context.memory_used;
    size_t shortest = SIZE_MAX, fewest = SIZE_MAX, limits = 0;
    pk_plan plan;
    c.context.threads = 1;
    assert_ok(&c.context, pk_decompose_plan(&c.context, &run, ROWS, &options, 0, &plan));
    for (size_t limit = plan.bytes; limit > 1000; limit -= limit / 64) {
        c.context.memory_limit = held + limit;
        if (pk_decompose_plan(&c.context, &run, ROWS, &options, 0, &plan) != PK_OK)
            break;
        assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &part));
        assert_memory_equal(part.by_example, whole.by_example, cells * EXAMPLES * sizeof(double));
        assert_memory_equal(part.inherited, whole.inherited, cells * sizeof(double));
        assert_memory_equal(part.decay, whole.decay, cells * sizeof(double));
        assert_memory_equal(part.unattributed, whole.unattributed, cells * sizeof(double));
        shortest = plan.window < shortest ? plan.window : shortest;
        const size_t windows = (60 - 1) / plan.window + 1, kept = (windows - 1) / plan.stride + plan.spare;
        fewest = windows > 4 && kept < fewest ? kept : fewest;
        pk_decomposition_release(&c.context, &part);
        limits++;
    }
    c.context.memory_limit = 0;
    print_message("%zu limits, windows of down to %zu steps, %zu states kept\n", limits, shortest, fewest);
    assert_true(limits > 3 && shortest <= 6 && fewest < 12);
    pk_decomposition_release(&c.context, &whole);
    pk_run_release(&c.context, &run);
    free(w);
    end_case(&c);
}

/* A schedule that moves the momentum, or beta1: recorded by a loop of one's own, read, decomposed. */
static void test_momenta(void **state)
{
    (void)state;
    static const char *const moving[] = {"sgd momentum=0.9",
                                         "sgd momentum=0.8 nesterov=1 weight_decay=0.02 maximize=1",
                                         "sgd momentum=0.7 dampening=0.4",
                                         "adam epsilon=1e-4 weight_decay=0.05",
                                         "adamw epsilon=1e-4 amsgrad=1 weight_decay=0.1",
                                         "rmsprop epsilon=1e-3 alpha=0.8 momentum=0.7 weight_decay=0.05",
                                         "rmsprop epsilon=1e-2 alpha=0.7 centered=1 momentum=0.6"};
    double worst = 0, worst_closure = 0;
    for (size_t o = 0; o < sizeof moving / sizeof *moving; o++)
        for (int kind = 0; kind < 4; kind++) { /* grouped or not */
            case_data c;
            pk_recorder recorder;
            pk_recorder_options options = {0};
            pk_trainer trainer = {0};
            pk_parameter_groups groups = {0};
            pk_run run;
            double momenta[STEPS];
            const int grouped = kind % 2;
            const char *const lines[] = {"1,3 weight_decay=0 rate=0.5", "0 frozen"};
            begin_case(networks[kind], moving[o], 0, 40 + o, &c);
            pk_real *w = c.start, *next = FIXTURE_NEW(pk_real, c.P), *state_before = NULL;
            options.network = networks[kind];
            options.loss = "squared";
            options.optimizer = moving[o];
            options.groups = lines;
            options.group_count = grouped ? 2 : 0;
            options.replace = 1;
            c.vectors = pk_optimizer_state_vectors(&c.optimizer);
            state_before = FIXTURE_NEW(pk_real, c.vectors * c.P);
            for (size_t i = 0; i < c.vectors * c.P; i++)
                state_before[i] = (pk_real)(0.02 + 0.01 * (double)(i % 3));
            if (o % 2) {
                options.initial_state = state_before;
                options.initial_step = c.optimizer.initial_step = 5;
                c.optimizer.initial_state = 1;
            }
            assert_ok(&c.context, pk_parameter_groups_parse(&c.context, &c.graph, &c.optimizer,
                                                            options.group_count, lines, &groups));
            assert_ok(&c.context, pk_recorder_open(&c.context, c.folder[0], &options, &c.data, w, &recorder));
            assert_ok(&c.context, pk_trainer_prepare_with(&c.context, &c.graph, &c.data, &c.criterion,
                                                          &c.optimizer, &groups, EXAMPLES, &trainer));
            if (o % 2)
                memcpy(trainer.state, state_before, c.vectors * c.P * sizeof *w);
            for (size_t s = 0; s < STEPS; s++) {
                const double moved = momenta[s] = 0.95 - 0.1 * (double)(s % 4);
                const int64_t items[3] = {(int64_t)(s % EXAMPLES), (int64_t)((3 * s + 1) % EXAMPLES), 2};
                const pk_batch batch = {3, items, NULL};
                double scale;
                trainer.optimizer.momentum = trainer.optimizer.beta1 = moved;
                for (size_t g = 0; g < groups.count; g++)
                    groups.group[g].optimizer.momentum = groups.group[g].optimizer.beta1 = moved;
                assert_ok(&c.context,
                          pk_training_step(&c.context, &trainer, s, 0.02, 0, &batch, w, next, &scale, NULL));
                assert_ok(&c.context, pk_recorder_training_step(&c.context, &recorder, 0.02, &batch, 1,
                                                                trainer.state, next));
                memcpy(w, next, c.P * sizeof *w);
            }
            assert_ok(&c.context, pk_recorder_close(&c.context, &recorder));
            char path[400];
            const size_t shape[1] = {STEPS};
            snprintf(path, sizeof path, "%s/momenta.npy", c.folder[0]);
            assert_ok(&c.context, pk_array_write(&c.context, path, PK_FLOAT64, 1, shape, momenta));
            pk_trainer_release(&c.context, &trainer);
            pk_parameter_groups_release(&c.context, &groups);
            assert_ok(&c.context, pk_run_open(&c.context, c.folder[0], &run));
            assert_non_null(run.optimizer.momenta);
            pk_decomposition got;
            pk_decompose_options how = {0};
            const pk_matrix inputs = pk_matrix_view(c.test, ROWS, 4);
            for (int averaged = 0; averaged < 2; averaged++) {
                if (averaged)
                    assert_ok(&c.context, pk_average_parse(&c.context, "ema:0.8:1", &how.average));
                assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &how, &got));
                assert_adds_up(&got);
                definition d = define(&c.context, &run, inputs, &how.average, kind == KINKED);
                const double error = apart(&got, &d);
                if (!(error <= (kind == KINKED ? 1e-2 : ROUNDING(1e-10))))
                    fail_msg("%s; %s: %.3g of the largest", networks[kind], moving[o], error);
                worst = kind == KINKED ? worst : fmax(worst, error);
                worst_closure = fmax(worst_closure, got.worst_closure);
                pk_decomposition_release(&c.context, &got);
                free(d.memory);
            }
            pk_run_release(&c.context, &run);
            momenta[4] = kind ? 0 : 1; /* what a momentum is not */
            assert_ok(&c.context, pk_array_write(&c.context, path, PK_FLOAT64, 1, shape, momenta));
            assert_refused(&c.context, PK_ARGUMENT, "momenta.npy holds",
                           pk_run_open(&c.context, c.folder[0], &run));
            assert_ok(&c.context, pk_array_write(&c.context, path, PK_FLOAT32, 1, shape, momenta));
            assert_refused(&c.context, PK_FORMAT, "momenta.npy holds float32",
                           pk_run_open(&c.context, c.folder[0], &run));
            (void)unlink(path);
            free(next), free(state_before);
            end_case(&c);
        }
    print_message("entries differ by %.2g of the largest, closure %.2g\n", worst, worst_closure);
    /* Rules that no schedule moves, and groups with a momentum of their own. */
    static const struct {
        const char *rule, *line;
        pk_status status;
        const char *message;
    } refused[] = {{"sgd", NULL, PK_FORMAT, "momenta.npy: the optimizer in run.txt has no momentum"},
                   {"nadam", NULL, PK_FORMAT, "momenta.npy: the optimizer in run.txt has no momentum"},
                   {"rmsprop", NULL, PK_FORMAT, "momenta.npy: the optimizer in run.txt has no momentum"},
                   {"adagrad", NULL, PK_FORMAT, "momenta.npy: the optimizer in run.txt has no momentum"},
                   {"adam", "1 beta1=0.5", PK_FORMAT, "run.txt line 5: a momentum of the group's own"},
                   {"sgd momentum=0.9", "1 momentum=0.5", PK_FORMAT, "line 5: a momentum of the group's own"}};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        case_data c;
        pk_run run;
        char path[400];
        double numbers[AFTER];
        const size_t shape[1] = {AFTER};
        begin_case(networks[0], refused[i].rule, 0, i, &c);
        c.lines[0] = refused[i].line;
        c.line_count = refused[i].line != NULL;
        train_twice(&c, refused[i].rule, 0, 1);
        for (size_t s = 0; s < AFTER; s++)
            numbers[s] = 0.5;
        snprintf(path, sizeof path, "%s/momenta.npy", c.folder[1]);
        assert_ok(&c.context, pk_array_write(&c.context, path, PK_FLOAT64, 1, shape, numbers));
        assert_refused(&c.context, refused[i].status, refused[i].message,
                       pk_run_open(&c.context, c.folder[1], &run));
        (void)unlink(path);
        end_case(&c);
    }
}

/* Other analyses of runs that begin with a state: what it contributes is a part of what they find, too. */
static void test_analyses(void **state)
{
    (void)state;
    double worst_residual = 0, worst_inherited = 0;
    for (int o = 0; o < STATEFUL; o++)
        for (int grouped = 0; grouped < 2; grouped++) {
            case_data c;
            pk_run run;
            pk_smoother smoother;
            pk_sensitivity at;
            const pk_smoother_options plainly = {0};
            const pk_sensitivity_options first = {0};
            begin_case(networks[0], optimizers[o], grouped, (uint64_t)(300 + o), &c);
            train_twice(&c, optimizers[o], o % 3 == 1 ? 0.3 : 0, o % 3 == 2 ? 2 : 1);
            assert_ok(&c.context, pk_run_open(&c.context, c.folder[1], &run));
            assert_ok(&c.context,
                      pk_smooth(&c.context, &run, pk_matrix_view(c.test, ROWS, 4), &plainly, &smoother));
            worst_residual = fmax(worst_residual, smoother.residual);
            assert_true(smoother.residual <= ROUNDING(1e-12) && smoother.unattributed <= ROUNDING(1e-12));
            pk_smoother_release(&c.context, &smoother);
            assert_ok(&c.context,
                      pk_sensitivity_at(&c.context, &run, pk_matrix_view(c.test, 1, 4), &first, &at));
            assert_true(at.worst_closure <= ROUNDING(1e-12));
            for (size_t d = 0; d < 4; d++)
                assert_true(fabs(at.unattributed[d]) <= ROUNDING(1e-12) * at.scale);
            /* inherited is the derivative of what pk_decompose calls so. */
            double slope[4] = {0};
            const double step = sizeof(pk_real) == 8 ? 1e-5 : 1e-2;
            for (size_t k = 0; k < 8; k++) {
                pk_decomposition moved;
                pk_real x[4];
                memcpy(x, c.test, sizeof x);
                x[k / 2] += (pk_real)(k % 2 ? -step : step);
                assert_ok(&c.context, pk_decompose(&c.context, &run, pk_matrix_view(x, 1, 4), NULL, &moved));
                slope[k / 2] += (k % 2 ? -1 : 1) * moved.inherited[0] / (2 * step);
                pk_decomposition_release(&c.context, &moved);
            }
            for (size_t d = 0; d < 4; d++) {
                worst_inherited = fmax(worst_inherited, fabs(slope[d] - at.inherited[d]) / at.scale);
                assert_true(fabs(slope[d] - at.inherited[d]) <=
                            (sizeof(pk_real) == 8 ? 1e-8 : 1e-2) * at.scale);
            }
            assert_int_equal(fixture_largest(4, at.inherited) > 0, has_momentum(&run));
            pk_sensitivity_release(&c.context, &at);
            if (o == 1) {
                pk_comparison rules[PK_COMPARE_RULES];
                assert_ok(&c.context, pk_compare(&c.context, &run, pk_matrix_view(c.test, 1, 4), rules));
                assert_true(rules[PK_COMPARE_RULES - 1].residual_max <= ROUNDING(1e-12));
            }
            pk_run_release(&c.context, &run);
            end_case(&c);
        }
    print_message("smoothers miss the network by %.2g, derivatives of what is inherited by %.2g\n",
                  worst_residual, worst_inherited);
}

/* initial_state.npy and initial_step of a recorded run, changed. */
typedef struct bad_state {
    const char *rule, *line; /* line: what stands in the place of the initial_step line; NULL: as it is */
    pk_type type;
    size_t rows, columns; /* of the file; 0: as they are; SIZE_MAX columns: one dimension */
    double value;         /* at the last number; 0: as it is */
    int absent;
    pk_status status;
    const char *message;
} bad_state;

static void test_bad_states(void **state)
{
    (void)state;
    static const bad_state cases[] = {
        {"adam", NULL, PK_FLOAT64, 0, 0, 0, 0, PK_OK, ""},
        {"adam", NULL, PK_FLOAT32, 0, 0, 0, 0, PK_OK, ""},
        {"adam", "initial_step 0\n", PK_FLOAT64, 0, 0, 0, 0, PK_OK, ""},
        {"sgd momentum=0.9", "initial_step 0\n", PK_FLOAT64, 0, 0, -1, 0, PK_OK, ""},
        {"adam", NULL, PK_INT64, 0, 0, 0, 0, PK_FORMAT,
         "initial_state.npy holds int64, it has to hold float64"},
        {"adam", NULL, PK_FLOAT64, 1, 0, 0, 0, PK_SHAPE,
         "initial_state.npy has shape (1, 59); the optimizer 'adam"},
        {"adam", NULL, PK_FLOAT64, 3, 0, 0, 0, PK_SHAPE, "has 2 vectors of 59 parameters"},
        {"adam", NULL, PK_FLOAT64, 2, 58, 0, 0, PK_SHAPE, "has shape (2, 58)"},
        {"adam", NULL, PK_FLOAT64, 2, SIZE_MAX, 0, 0, PK_SHAPE, "has shape (2,)"},
        {"adam amsgrad=1", NULL, PK_FLOAT64, 2, 0, 0, 0, PK_SHAPE, "has 3 vectors"},
        {"sgd momentum=0.9", NULL, PK_FLOAT64, 2, 0, 0, 0, PK_SHAPE, "has 1 vector of 59"},
        {"adam", NULL, PK_FLOAT64, 0, 0, (double)NAN, 0, PK_NOT_FINITE,
         "initial_state.npy holds nan at row 1, column 58"},
        {"adagrad", NULL, PK_FLOAT64, 0, 0, (double)INFINITY, 0, PK_NOT_FINITE,
         "holds inf at row 0, column 58"},
        {"adam", NULL, PK_FLOAT64, 0, 0, -1e-9, 0, PK_FORMAT,
         "at row 1, column 58; the optimizer divides by its root"},
        {"adam amsgrad=1", NULL, PK_FLOAT64, 0, 0, -1e-9, 0, PK_FORMAT, "at row 2, column 58"},
        {"nadam", NULL, PK_FLOAT64, 0, 0, -1, 0, PK_FORMAT, "at row 1, column 58"},
        {"rmsprop", NULL, PK_FLOAT64, 0, 0, -1, 0, PK_FORMAT, "at row 0, column 58"},
        {"rmsprop momentum=0.5", NULL, PK_FLOAT64, 0, 0, -1, 0, PK_OK, ""},
        {"rmsprop momentum=0.5 centered=1", NULL, PK_FLOAT64, 0, 0, -1, 0, PK_OK, ""},
        {"adagrad", NULL, PK_FLOAT64, 0, 0, -1, 0, PK_FORMAT, "at row 0, column 58"},
        {"adam", NULL, PK_FLOAT64, 0, 0, 0, 1, PK_IO,
         "initial_state.npy is missing: run.txt has an initial_step line"},
        {"adam", "", PK_FLOAT64, 0, 0, 0, 0, PK_FORMAT, "run.txt has no initial_step line"},
        {"adam", "", PK_FLOAT64, 0, 0, 0, 1, PK_OK, ""},
        {"sgd", NULL, PK_FLOAT64, 1, 0, 0, 0, PK_FORMAT, "the optimizer 'sgd' has no state"},
        {"sgd", NULL, PK_FLOAT64, 1, 0, 0, 1, PK_OK, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const bad_state *bad = &cases[i];
        case_data c;
        pk_run run;
        char path[400], text[600];
        begin_case(networks[0], bad->rule, 0, i, &c);
        train_twice(&c, bad->rule, 0, 1);
        snprintf(path, sizeof path, "%s/initial_state.npy", c.folder[1]);
        const size_t rows = bad->rows ? bad->rows : c.vectors, columns = bad->columns ? bad->columns : c.P;
        const size_t shape[2] = {rows, columns};
        double numbers[4 * 64] = {0};
        float small[4 * 64] = {0};
        int64_t whole[4 * 64] = {0};
        assert_true(c.P == 59 && rows <= 4);
        for (size_t k = 0; k < 4 * 64; k++)
            numbers[k] = small[k] = (float)(0.125 * (double)(k % 5));
        if (bad->value != 0)
            numbers[rows * columns - 1] = bad->value;
        (void)unlink(path);
        if (!bad->absent)
            assert_ok(&c.context,
                      pk_array_write(&c.context, path, bad->type, columns == SIZE_MAX ? 1 : 2, shape,
                                     bad->type == PK_INT64     ? (const void *)whole
                                     : bad->type == PK_FLOAT32 ? (const void *)small
                                                               : (const void *)numbers));
        snprintf(path, sizeof path, "%s/run.txt", c.folder[1]);
        FILE *file = fopen(path, "r+");
        assert_non_null(file);
        text[fread(text, 1, sizeof text - 1, file)] = '\0';
        char *line = strstr(text, "initial_step 3\n");
        assert_non_null(line);
        if (bad->line) {
            strcpy(line, bad->line);
            assert_int_equal(fclose(file), 0);
            file = fopen(path, "w");
            assert_non_null(file);
            assert_true(fputs(text, file) >= 0);
        }
        assert_int_equal(fclose(file), 0);
        const pk_status status = pk_run_open(&c.context, c.folder[1], &run);
        if (status != bad->status || !strstr(status ? pk_message(&c.context) : "", bad->message))
            fail_msg("case %zu: %d, %s", i, (int)status, pk_message(&c.context));
        if (!status) { /* what is read is the file's, or zeros */
            pk_real there[4 * 64];
            assert_ok(&c.context, pk_run_initial_state(&c.context, &run, there));
            for (size_t k = 0; k < c.vectors * c.P; k++)
                assert_true((double)there[k] == (bad->absent ? 0 : (double)(pk_real)numbers[k]));
            pk_run_release(&c.context, &run);
        }
        end_case(&c);
    }
}

/* Training and recording from a state, where it is not one, and resumed with another one. */
static void test_bad_options(void **state)
{
    (void)state;
    case_data c;
    begin_case(networks[0], "adam", 0, 1, &c);
    pk_train_options options = options_of(&c, "adam", 0);
    pk_real *w = FIXTURE_NEW(pk_real, c.P), begin[2 * 59];
    for (size_t i = 0; i < 2 * 59; i++)
        begin[i] = (pk_real)0.25;
    memcpy(w, c.start, c.P * sizeof *w);
    options.steps = 2;
    options.record = c.folder[0];
    options.initial_step = 3;
    assert_refused(&c.context, PK_ARGUMENT, "initial_step without initial_state",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    options.initial_state = begin;
    begin[70] = (pk_real)INFINITY;
    assert_refused(&c.context, PK_NOT_FINITE, "number 70 of initial_state is inf",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    begin[70] = (pk_real)0.25;
    options.optimizer = pk_optimizer_default(PK_SGD);
    assert_refused(&c.context, PK_ARGUMENT, "of an optimizer that has none",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    options.optimizer = c.optimizer;
    assert_ok(&c.context, pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    /* It goes on from the same state, and from no other. */
    options.replace = 0;
    options.resume = 1;
    options.steps = 4;
    begin[3] += (pk_real)0.5;
    memcpy(w, c.start, c.P * sizeof *w);
    assert_refused(&c.context, PK_ARGUMENT, "cannot be resumed: it begins with another state",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    begin[3] = (pk_real)0.25;
    options.initial_step = 4;
    assert_refused(&c.context, PK_ARGUMENT, "it begins with a state of the optimizer, after 3 updates",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    options.initial_step = 0;
    options.initial_state = NULL;
    assert_refused(&c.context, PK_ARGUMENT, "it begins with a state of the optimizer, after 3 updates",
                   pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    options.initial_step = 3;
    options.initial_state = begin;
    assert_ok(&c.context, pk_train(&c.context, &c.graph, &c.data, &options, w, NULL));
    pk_real *once = FIXTURE_NEW(pk_real, c.P);
    memcpy(once, c.start, c.P * sizeof *w);
    options.replace = 1;
    options.resume = 0;
    assert_ok(&c.context, pk_train(&c.context, &c.graph, &c.data, &options, once, NULL));
    assert_memory_equal(once, w, c.P * sizeof *w);
    free(once), free(w);
    end_case(&c);
}

static void test_average_texts(void **state)
{
    (void)state;
    static const char *const wrong[] = {"",
                                        "ema",
                                        "ema:",
                                        "ema:x",
                                        "ema:0.9:",
                                        "ema:0.9:1:",
                                        "ema:0.9:1:0",
                                        "ema:0.9:-1",
                                        "ema:0.9:1:2:3",
                                        "ema:0.9 ",
                                        "swa",
                                        "swa:",
                                        "swa:1",
                                        "swa:1:",
                                        "swa:1:0",
                                        "swa:1:2:3",
                                        "swa:-1:2",
                                        "swa:1.5:2",
                                        "Ema:0.9",
                                        "ema=0.9",
                                        "swa:1:2x",
                                        "swa:9999999999999999999999:1"};
    pk_context context = {0};
    pk_average average = {PK_AVERAGE_SWA, 7, 7, 7};
    const pk_average before = average;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        if (pk_average_parse(&context, wrong[i], &average) != PK_ARGUMENT)
            fail_msg("'%s' is taken", wrong[i]);
        assert_non_null(strstr(pk_message(&context), "is no average"));
        assert_memory_equal(&average, &before, sizeof before);
    }
    static const char *const betas[] = {"ema:1", "ema:-0.1", "ema:2:3", "ema:1e9"};
    for (size_t i = 0; i < sizeof betas / sizeof *betas; i++)
        assert_refused(&context, PK_ARGUMENT, "it must be in [0, 1)",
                       pk_average_parse(&context, betas[i], &average));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_average_parse(&context, NULL, &average));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_average_parse(&context, "ema:0.9", NULL));
    assert_ok(&context, pk_average_parse(&context, "ema:0.999:10:5", &average));
    assert_true(average.kind == PK_AVERAGE_EMA && average.beta == 0.999 && average.from == 10 &&
                average.every == 5);
    assert_ok(&context, pk_average_check(&context, &average, 10));
    assert_refused(&context, PK_ARGUMENT, "starts after step 10; there are 9",
                   pk_average_check(&context, &average, 9));
    average.beta = 1;
    assert_refused(&context, PK_ARGUMENT, "beta 1", pk_average_check(&context, &average, 10));
    average.kind = (pk_average_kind)3;
    assert_refused(&context, PK_ARGUMENT, "kind 3", pk_average_check(&context, &average, 10));
    assert_refused(&context, PK_ARGUMENT, "NULL", pk_average_check(&context, NULL, 10));
    /* The weight of each update: SWA is the mean of w_2, w_5, w_8. */
    assert_ok(&context, pk_average_parse(&context, "swa:2:3", &average));
    const double weights[] = {1, 1, 0, 0, 0.5, 0, 0, 1. / 3};
    for (size_t s = 0; s < 8; s++)
        assert_true(pk_average_weight(&average, s) == weights[s]);
    /* A decomposition of fewer steps than the average begins with. */
    case_data c;
    pk_run run;
    pk_decomposition out;
    pk_decompose_options options = {0};
    begin_case(networks[0], "sgd", 0, 1, &c);
    train_twice(&c, "sgd", 0, 1);
    assert_ok(&c.context, pk_run_open(&c.context, c.folder[0], &run));
    options.average = (pk_average){PK_AVERAGE_EMA, 0.5, STEPS, 1};
    const pk_matrix inputs = pk_matrix_view(c.test, ROWS, 4);
    assert_ok(&c.context, pk_decompose(&c.context, &run, inputs, &options, &out)); /* w_S itself */
    pk_decomposition_release(&c.context, &out);
    assert_ok(&c.context, pk_run_until(&c.context, &run, STEPS - 1));
    assert_refused(&c.context, PK_ARGUMENT, "starts after step 8; there are 7",
                   pk_decompose(&c.context, &run, inputs, &options, &out));
    assert_refused(&c.context, PK_ARGUMENT, "starts after step 8; there are 7",
                   pk_run_average(&c.context, &run, &options.average, c.start));
    pk_run_release(&c.context, &run);
    end_case(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resumed),     cmocka_unit_test(test_averages),
        cmocka_unit_test(test_analyses),    cmocka_unit_test(test_bad_states),
        cmocka_unit_test(test_bad_options), cmocka_unit_test(test_average_texts),
        cmocka_unit_test(test_memory),      cmocka_unit_test(test_momenta),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
