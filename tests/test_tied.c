/* Layers that share tensors: values, gradients, kernels, training, recordings and decompositions, against brute force on
 * the flat vector w: Jacobians checked by differences, contributions carried forward example by example. The same with
 * parameter groups. */
#include "fixture.h"

enum {
    TIED_COLUMNS = 6,
    TIED_TENSORS = 8,
    TIED_EXAMPLES = 5,
    TIED_ROWS = 2,
    TIED_STEPS = 6,
    TIED_NODES = 14,
    TIED_PARTS = 8
};

typedef struct subject {
    const char *network;
    const char *untied;           /* the same, each layer with tensors of its own */
    size_t width, tokens;         /* of the input; tokens: whole numbers below */
    size_t columns[TIED_COLUMNS]; /* numbers of w in each column of by_layer */
    size_t tensors[TIED_TENSORS]; /* and in each parameter tensor */
} subject;

static const subject subjects[] = {
    {"input 3; embedding 6 4 name=tok; tanh; mean_tokens; dense 6 nobias tied=tok",
     "input 3; embedding 6 4; tanh; mean_tokens; dense 6 nobias",
     3,
     6,
     {24},
     {24}},
    {"input 4; dense 4 name=h; tanh; dense 4 tied=h; tanh; dense 2",
     "input 4; dense 4; tanh; dense 4; tanh; dense 2",
     4,
     0,
     {20, 10},
     {16, 4, 8, 2}},
    {"input 4; dense 4 name=h; tanh; dense 4 tied=h.weight; gelu; dense 2",
     "input 4; dense 4; tanh; dense 4; gelu; dense 2",
     4,
     0,
     {20, 4, 10},
     {16, 4, 4, 8, 2}},
    {"input 4; dense 4 name=h; tanh; dense 4 tied=h.bias; tanh; dense 2",
     "input 4; dense 4; tanh; dense 4; tanh; dense 2",
     4,
     0,
     {20, 16, 10},
     {16, 4, 16, 8, 2}},
    {"input 5; dense 3 name=e; sigmoid; dense 5 tied=e.weight transposed",
     "input 5; dense 3; sigmoid; dense 5",
     5,
     0,
     {18, 5},
     {15, 3, 5}},
    {"input 2x5x5; conv 2 3x3 pad=1 name=c; tanh; conv 2 3x3 stride=2 tied=c; flatten; dense 2",
     "input 2x5x5; conv 2 3x3 pad=1; tanh; conv 2 3x3 stride=2; flatten; dense 2",
     50,
     0,
     {38, 18},
     {36, 2, 16, 2}},
    {"input 5; dense 6; layer_norm name=n; tanh; dense 6 nobias; residual( layer_norm tied=n ); dense 2",
     "input 5; dense 6; layer_norm; tanh; dense 6 nobias; residual( layer_norm ); dense 2",
     5,
     0,
     {36, 12, 36, 14},
     {30, 6, 6, 6, 36, 12, 2}},
    {"input 3x4; attention 2 name=a; residual( attention 2 tied=a ); mean_tokens; dense 2",
     "input 3x4; attention 2; residual( attention 2 ); mean_tokens; dense 2",
     12,
     0,
     {60, 20, 10},
     {48, 12, 16, 4, 8, 2}},
    {"input 4; dense 4 nobias name=h; relu; dense 4 tied=h transposed; relu; dense 2 name=o",
     "input 4; dense 4 nobias; relu; dense 4; relu; dense 2",
     4,
     0,
     {16, 4, 10},
     {16, 4, 8, 2}},
};
enum { TIED_SUBJECTS = sizeof subjects / sizeof *subjects };

static const char *const rules[] = {"sgd weight_decay=0.02", "sgd momentum=0.9 weight_decay=0.02",
                                    "adam weight_decay=0.05", "adamw beta1=0.8 weight_decay=0.1"};

typedef struct tied_case {
    pk_context context;
    pk_graph graph;
    pk_dataset data;
    size_t P, C;
    pk_real *inputs, *targets, *weights, *rows;
} tied_case;

static void tied_begin(const subject *s, size_t seed, tied_case *t)
{
    memset(t, 0, sizeof *t);
    assert_ok(&t->context, pk_network_parse(&t->context, s->network, &t->graph));
    t->P = t->graph.parameters;
    t->C = t->graph.output_width;
    t->inputs = fixture_normals(seed, TIED_EXAMPLES * s->width, 1);
    t->rows = fixture_normals(seed + 1, TIED_ROWS * s->width, 1);
    t->targets = fixture_normals(seed + 2, TIED_EXAMPLES * t->C, 1);
    for (size_t i = 0; s->tokens && i < TIED_EXAMPLES * s->width; i++)
        t->inputs[i] = (pk_real)((seed + 7 * i) % s->tokens);
    for (size_t i = 0; s->tokens && i < TIED_ROWS * s->width; i++)
        t->rows[i] = (pk_real)((3 * i + 1) % s->tokens);
    size_t shape[PK_SHAPE_RANK + 1] = {TIED_EXAMPLES};
    for (int i = 0; i < t->graph.input_shape.rank; i++)
        shape[i + 1] = t->graph.input_shape.dims[i];
    const size_t outputs[2] = {TIED_EXAMPLES, t->C};
    const pk_type type = sizeof(pk_real) == sizeof(double) ? PK_FLOAT64 : PK_FLOAT32;
    t->data.inputs = pk_array_view(type, t->graph.input_shape.rank + 1, shape, t->inputs);
    t->data.targets = pk_array_view(type, 2, outputs, t->targets);
    t->weights = FIXTURE_NEW(pk_real, t->P);
    assert_ok(&t->context, pk_network_initialize(&t->context, &t->graph, seed, t->weights));
}

static void tied_end(tied_case *t)
{
    pk_graph_release(&t->context, &t->graph);
    free(t->inputs);
    free(t->targets);
    free(t->weights);
    free(t->rows);
    assert_int_equal(t->context.memory_used, 0);
}

/* Values are those of the untied network with copies; Jacobians those of differences; the NTK is J J^T. */
static void test_values_and_gradients(void **state)
{
    (void)state;
    for (size_t n = 0; n < TIED_SUBJECTS; n++) {
        const subject *s = &subjects[n];
        tied_case t;
        pk_graph untied;
        size_t columns = 0, sum = 0;
        tied_begin(s, 10 * n + 1, &t);
        memset(&untied, 0, sizeof untied);
        assert_ok(&t.context, pk_network_parse(&t.context, s->untied, &untied));
        assert_string_equal(t.graph.text, s->network);
        for (; columns < TIED_COLUMNS && s->columns[columns]; columns++)
            sum += s->columns[columns];
        assert_int_equal(t.graph.columns, columns);
        assert_int_equal(t.P, sum);
        const size_t U = untied.parameters, C = t.C, rows = TIED_ROWS * C;
        assert_int_equal(t.graph.untied, U);
        size_t tensor = 0, uses = 0;
        for (; tensor < TIED_TENSORS && s->tensors[tensor]; tensor++) {
            assert_int_equal(t.graph.blocks[tensor].count, s->tensors[tensor]);
            uses += t.graph.blocks[tensor].use_count;
        }
        assert_int_equal(t.graph.block_count, tensor);
        assert_int_equal(uses, untied.block_count);
        pk_real *copies = FIXTURE_NEW(pk_real, U), *f = FIXTURE_NEW(pk_real, rows),
                *g = FIXTURE_NEW(pk_real, rows), *jacobian = FIXTURE_NEW(pk_real, rows * t.P),
                *gram = FIXTURE_NEW(pk_real, rows * rows);
        pk_graph_untie(&t.graph, t.weights, copies);
        const pk_matrix x = pk_matrix_view(t.rows, TIED_ROWS, s->width), none = {NULL, 0, 0, 0};
        assert_ok(&t.context,
                  pk_graph_evaluate(&t.context, &t.graph, t.weights, x, pk_matrix_view(f, TIED_ROWS, C)));
        assert_ok(&t.context,
                  pk_graph_evaluate(&t.context, &untied, copies, x, pk_matrix_view(g, TIED_ROWS, C)));
        assert_memory_equal(f, g, rows * sizeof *f);
        assert_ok(&t.context,
                  pk_jacobian(&t.context, &t.graph, t.weights, x, pk_matrix_view(jacobian, rows, t.P), none));
        const double h = sizeof(pk_real) == sizeof(double) ? 1e-5 : 1e-2;
        for (size_t p = 0; p < t.P; p++) {
            const pk_real before = t.weights[p];
            t.weights[p] = (pk_real)(before + h);
            assert_ok(&t.context,
                      pk_graph_evaluate(&t.context, &t.graph, t.weights, x, pk_matrix_view(f, TIED_ROWS, C)));
            t.weights[p] = (pk_real)(before - h);
            assert_ok(&t.context,
                      pk_graph_evaluate(&t.context, &t.graph, t.weights, x, pk_matrix_view(g, TIED_ROWS, C)));
            t.weights[p] = before;
            for (size_t i = 0; i < rows; i++)
                assert_close(jacobian[i * t.P + p], (f[i] - g[i]) / (2 * h), 100 * h * h + ROUNDING(1e-9));
        }
        assert_ok(&t.context,
                  pk_kernel_ntk(&t.context, &t.graph, t.weights, x, none, pk_matrix_view(gram, rows, rows)));
        for (size_t i = 0; i < rows; i++)
            for (size_t k = 0; k < rows; k++) {
                double product = 0;
                for (size_t p = 0; p < t.P; p++)
                    product += (double)jacobian[i * t.P + p] * (double)jacobian[k * t.P + p];
                assert_close(gram[i * rows + k], product, ROUNDING(1e-11));
            }
        free(copies), free(f), free(g), free(jacobian), free(gram);
        pk_graph_release(&t.context, &untied);
        tied_end(&t);
    }
}

/* What brute force finds. */
typedef struct tied_truth {
    double *by_example, *by_layer, *decay, *unattributed;
} tied_truth;

/* Phi_s by Gauss's rule on the flat vector, in equal parts of the step. */
static void tied_features(tied_case *t, const subject *s, const double *nodes, const double *node_weights,
                          const pk_real *from, const pk_real *to, double *phi)
{
    const size_t numbers = TIED_ROWS * t->C * t->P;
    pk_real *w = FIXTURE_NEW(pk_real, t->P), *jacobian = FIXTURE_NEW(pk_real, numbers);
    const pk_matrix none = {NULL, 0, 0, 0};
    memset(phi, 0, numbers * sizeof *phi);
    for (size_t i = 0; i < TIED_PARTS * TIED_NODES; i++) {
        const size_t q = i % TIED_NODES, part = i / TIED_NODES;
        for (size_t p = 0; p < t->P; p++)
            w[p] = (pk_real)(from[p] + ((double)part + nodes[q]) / TIED_PARTS * (to[p] - from[p]));
        assert_ok(&t->context,
                  pk_jacobian(&t->context, &t->graph, w, pk_matrix_view(t->rows, TIED_ROWS, s->width),
                              pk_matrix_view(jacobian, TIED_ROWS * t->C, t->P), none));
        for (size_t k = 0; k < numbers; k++)
            phi[k] += node_weights[q] / TIED_PARTS * jacobian[k];
    }
    free(w);
    free(jacobian);
}

/* What holds for the parameters of one group, beside the rule: numbers, so that nothing is read from run.txt. */
typedef struct tied_group {
    double factor;       /* of the step's rate; 0: of no group */
    double weight_decay; /* below 0: the optimizer's */
    double remembered;   /* momentum or beta1; below 0: the optimizer's */
    double rate;         /* where groups have rates of their own, at step 0; 1/10 of it less each step */
    int frozen;
} tied_group;

/* Tensor k of w is in group k % 3: the first, the second or none. */
typedef struct tied_groups {
    tied_group group[2];
    int own_rates;
} tied_groups;

static const tied_groups grouped[] = {
    {{{.factor = 0.5, .weight_decay = 0.3, .remembered = 0.6},
      {.factor = 2, .weight_decay = 0, .remembered = -1}},
     0},
    {{{.factor = 1, .weight_decay = 0.2, .remembered = -1}, {.frozen = 1}}, 0},
    {{{.frozen = 1}, {.factor = 1.5, .weight_decay = -1, .remembered = 0.3}}, 0},
    {{{.factor = 1, .weight_decay = -1, .remembered = -1, .rate = 0.03},
      {.factor = 1, .weight_decay = 0.4, .remembered = -1, .rate = 0.01}},
     1},
};

/* The lines of run.txt for these groups: how many of them name a tensor. */
static size_t tied_lines(const subject *s, const tied_groups *groups, const char *rule, char lines[2][200])
{
    size_t tensors = 0, count = 0;
    while (tensors < TIED_TENSORS && s->tensors[tensors])
        tensors++;
    for (size_t g = 0; groups && g < 2 && g < tensors; g++, count++) {
        const tied_group *group = &groups->group[g];
        char *text = lines[g];
        for (size_t k = g; k < tensors; k += 3)
            text += sprintf(text, "%s%zu", k > g ? "," : "", k);
        if (group->frozen)
            text += sprintf(text, " frozen");
        if (!group->frozen && group->weight_decay >= 0)
            text += sprintf(text, " weight_decay=%g", group->weight_decay);
        if (!group->frozen && group->remembered >= 0)
            text +=
                sprintf(text, strncmp(rule, "sgd", 3) == 0 ? " momentum=%g" : " beta1=%g", group->remembered);
        if (!group->frozen && !groups->own_rates)
            sprintf(text, " rate=%g", group->factor);
    }
    return count;
}

/* What holds for parameter p at a step; rate: of the step. */
static int tied_settings(const subject *s, const tied_groups *groups, size_t p, size_t step, pk_optimizer *o,
                         double *rate)
{
    size_t tensor = 0, end = s->tensors[0];
    while (p >= end)
        end += s->tensors[++tensor];
    if (!groups || tensor % 3 == 2)
        return 0;
    const tied_group *group = &groups->group[tensor % 3];
    *rate = groups->own_rates ? group->rate * (1 - 0.1 * (double)step) : group->factor * *rate;
    if (group->weight_decay >= 0)
        o->weight_decay = group->weight_decay;
    if (group->remembered >= 0)
        *(o->kind == PK_SGD ? &o->momentum : &o->beta1) = group->remembered;
    return group->frozen;
}

/* D_s = sum_i D_s^i + decay + rest, with a momentum of its own for each example, and one for decay. */
static void tied_brute_force(tied_case *t, const subject *s, const tied_groups *groups, const pk_run *run,
                             tied_truth *truth)
{
    const size_t P = t->P, cells = TIED_ROWS * t->C, N = TIED_EXAMPLES;
    const int adam = run->optimizer.kind != PK_SGD, coupled = run->optimizer.kind != PK_ADAMW;
    double nodes[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2], weights[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2];
    double *momenta = FIXTURE_NEW(double, (N + 1) * P), *v = FIXTURE_NEW(double, P),
           *phi = FIXTURE_NEW(double, cells *P), *parts = FIXTURE_NEW(double, (N + 1) * P);
    pk_real *w = FIXTURE_NEW(pk_real, 2 * P), *gradients = FIXTURE_NEW(pk_real, N * P);
    pk__gauss_table(nodes, weights);
    const size_t at = TIED_NODES * (TIED_NODES - 1) / 2;
    size_t columns = t->graph.columns;
    truth->by_example = FIXTURE_NEW(double, cells *N);
    truth->by_layer = FIXTURE_NEW(double, cells *columns);
    truth->decay = FIXTURE_NEW(double, cells);
    truth->unattributed = FIXTURE_NEW(double, cells);
    for (size_t step = 0; step < run->steps; step++) {
        pk_batch batch;
        pk_run_batch(run, step, &batch);
        assert_ok(&t->context, pk_run_weights(&t->context, run, step, w));
        assert_ok(&t->context, pk_run_weights(&t->context, run, step + 1, w + P));
        assert_ok(&t->context, pk_loss_gradients(&t->context, &t->graph, run->loss, w, &t->data, &batch, NULL,
                                                 pk_matrix_view(gradients, batch.count, P)));
        tied_features(t, s, nodes + at, weights + at, w, w + P, phi);
        memset(parts, 0, (N + 1) * P * sizeof *parts);
        for (size_t b = 0; b < batch.count; b++)
            for (size_t p = 0; p < P; p++)
                parts[(size_t)batch.items[b] * P + p] += (double)gradients[b * P + p] / (double)batch.count;
        for (size_t p = 0; p < P; p++) {
            pk_optimizer own = run->optimizer;
            const pk_optimizer *o = &own;
            double whole = 0, rate = run->learning_rates[step], sum = 0;
            const int frozen = tied_settings(s, groups, p, step, &own, &rate);
            double scale = rate = frozen ? 0 : rate;
            parts[N * P + p] = coupled ? o->weight_decay * w[p] : 0;
            for (size_t i = 0; i <= N; i++)
                whole += parts[i * P + p];
            if (adam) {
                v[p] = o->beta2 * v[p] + (1 - o->beta2) * whole * whole;
                scale = rate / (1 - pow(o->beta1, (double)step + 1)) /
                        (sqrt(v[p] / (1 - pow(o->beta2, (double)step + 1))) + o->epsilon);
            }
            for (size_t i = 0; i <= N; i++) {
                double *m = &momenta[i * P + p];
                *m = adam ? o->beta1 * *m + (1 - o->beta1) * parts[i * P + p]
                          : o->momentum * *m + parts[i * P + p];
                parts[i * P + p] = -scale * *m - (i == N && !coupled ? rate * o->weight_decay * w[p] : 0);
                sum += parts[i * P + p];
            }
            const double rest = (double)w[P + p] - (double)w[p] - sum;
            size_t column = 0, end = s->columns[0];
            while (p >= end)
                end += s->columns[++column];
            assert_true(!frozen || rest == 0);
            for (size_t c = 0; c < cells; c++) {
                for (size_t i = 0; i < N; i++) {
                    truth->by_example[c * N + i] += phi[c * P + p] * parts[i * P + p];
                    truth->by_layer[c * columns + column] += phi[c * P + p] * parts[i * P + p];
                }
                truth->decay[c] += phi[c * P + p] * parts[N * P + p];
                truth->unattributed[c] += phi[c * P + p] * rest;
            }
        }
    }
    free(momenta), free(v), free(phi), free(parts), free(w), free(gradients);
}

static double tied_largest(size_t count, const double *x, const double *y)
{
    double largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = fmax(largest, fabs(x[i] - (y ? y[i] : 0)));
    return largest;
}

/* Training with a recording; keep_every, and in two parts, to the same bits. */
static void tied_train(tied_case *t, const subject *s, const char *rule, const tied_groups *groups,
                       const char *directory, size_t keep_every, pk_real *weights)
{
    char text[2][200];
    const char *const lines[2] = {text[0], text[1]};
    pk_schedule schedules[2];
    pk_train_options options;
    memset(&options, 0, sizeof options);
    memset(schedules, 0, sizeof schedules);
    options.groups = lines;
    options.group_count = tied_lines(s, groups, rule, text);
    if (groups && groups->own_rates)
        options.group_schedules = schedules;
    double rates[2][TIED_STEPS];
    for (int g = 0; g < 2 && groups; g++) {
        for (size_t step = 0; step < TIED_STEPS; step++)
            rates[g][step] = groups->group[g].rate * (1 - 0.1 * (double)step);
        schedules[g].rates = rates[g];
        schedules[g].rates_count = TIED_STEPS;
        schedules[g].kind = PK_SCHEDULE_ARRAY;
    }
    options.loss = PK_MEAN_SQUARED;
    assert_ok(&t->context, pk_optimizer_parse(&t->context, rule, &options.optimizer));
    options.schedule.rate = strncmp(rule, "sgd", 3) == 0 ? 0.1 : 0.01;
    options.batch_size = 3;
    options.seed = 5;
    options.record = directory;
    options.keep_every = keep_every;
    for (int part = 0; part < 2; part++) {
        memcpy(weights, t->weights, t->P * sizeof *weights);
        options.steps = part ? TIED_STEPS : TIED_STEPS / 2;
        options.resume = part;
        options.replace = !part;
        assert_ok(&t->context, pk_train(&t->context, &t->graph, &t->data, &options, weights, NULL));
    }
}

/* What was worst in the runs of a test. */
typedef struct tied_worst {
    double entry, closure;
} tied_worst;

/* The definition (reference.h) finds what brute force finds. */
static void tied_reference(tied_case *t, const subject *s, const pk_run *run, const tied_truth *truth,
                           double scale)
{
    const size_t cells = TIED_ROWS * t->C, N = TIED_EXAMPLES;
    double *numbers = FIXTURE_NEW(double, cells *(N + 5));
    const pk_reference out = {
        numbers + cells * N,       numbers + cells * (N + 1), numbers, numbers + cells * (N + 2),
        numbers + cells * (N + 3), numbers + cells * (N + 4), NULL};
    assert_ok(&t->context,
              pk_decompose_reference(&t->context, run, pk_matrix_view(t->rows, TIED_ROWS, s->width), 4,
                                     TIED_NODES, &out));
    assert_true(tied_largest(cells * N, out.by_example, truth->by_example) <= ROUNDING(1e-10) * scale);
    assert_true(tied_largest(cells, out.decay, truth->decay) <= ROUNDING(1e-10) * scale);
    assert_true(tied_largest(cells, out.unattributed, truth->unattributed) <= ROUNDING(1e-10) * scale);
    assert_true(tied_largest(cells, out.closure, NULL) <= ROUNDING(1e-11));
    free(numbers);
}

/* Trains, records every step and every fourth one, and decomposes both in each way. */
static void tied_check(size_t n, size_t r, const tied_groups *groups, tied_worst *worst)
{
    const subject *s = &subjects[n];
    tied_case t;
    pk_run run, sparse;
    char second[300];
    tied_truth truth;
    const int kinked = strstr(s->network, "relu") != NULL; /* its closure alone is judged */
    tied_begin(s, 100 * n + r, &t);
    pk_real *w = FIXTURE_NEW(pk_real, t.P), *again = FIXTURE_NEW(pk_real, t.P);
    snprintf(second, sizeof second, "%s-sparse", fixture_run_path);
    tied_train(&t, s, rules[r], groups, fixture_run_path, 0, w);
    tied_train(&t, s, rules[r], groups, second, 4, again);
    assert_memory_equal(w, again, t.P * sizeof *w);
    assert_ok(&t.context, pk_run_open(&t.context, fixture_run_path, &run));
    assert_ok(&t.context, pk_run_open(&t.context, second, &sparse));
    tied_brute_force(&t, s, groups, &run, &truth);
    const size_t cells = TIED_ROWS * t.C, N = TIED_EXAMPLES, columns = t.graph.columns;
    const double scale = tied_largest(cells * N, truth.by_example, NULL);
    assert_int_equal(run.groups.count != 0, groups != NULL);
    if (!kinked)
        tied_reference(&t, s, &run, &truth, scale);
    pk_decomposition first;
    for (int way = 0; way < 6; way++) {
        pk_decompose_options options;
        pk_decomposition d;
        memset(&options, 0, sizeof options);
        options.keep[0] = PK_BY_EXAMPLE;
        if (way != 5) {
            options.keep[1] = PK_BY_LAYER;
            options.keep[2] = PK_BY_STEP;
        }
        options.bounds = way == 1;
        options.engine = way == 2 ? PK_ENGINE_FACTORED : way == 3 ? PK_ENGINE_INTEGRATED : PK_ENGINE_AUTO;
        options.tolerance = ROUNDING(1e-10);
        t.context.threads = way == 4 ? 3 : 0;
        const pk_matrix x = pk_matrix_view(t.rows, TIED_ROWS, s->width);
        if (way == 4) {
            /* The least memory that will do, in sixteenths of what is taken where there is no limit. */
            const size_t used = t.context.memory_used;
            pk_plan plan, less;
            assert_ok(&t.context, pk_decompose_plan(&t.context, &sparse, TIED_ROWS, &options, 0, &plan));
            pk_status limited = PK_MEMORY_LIMIT;
            for (size_t part = 4; limited == PK_MEMORY_LIMIT && part <= 16; part++) {
                t.context.memory_limit = used + plan.bytes / 16 * part + 16;
                limited = pk_decompose_plan(&t.context, &sparse, TIED_ROWS, &options, 0, &less);
            }
            assert_ok(&t.context, limited);
        }
        const pk_status status = pk_decompose(&t.context, way == 4 ? &sparse : &run, x, &options, &d);
        if (status)
            fail_msg("%s, %s, way %d: %s", s->network, rules[r], way, pk_message(&t.context));
        t.context.threads = 0;
        t.context.memory_limit = 0;
        const double error = tied_largest(cells * N, d.by_example, truth.by_example) / scale;
        worst->entry = kinked ? worst->entry : fmax(worst->entry, error);
        worst->closure = fmax(worst->closure, d.worst_closure);
        if ((!kinked && error > ROUNDING(1e-10)) || d.worst_closure > ROUNDING(1e-12))
            fail_msg("%s, %s, way %d: entries off by %.3g, closure %.3g", s->network, rules[r], way, error,
                     d.worst_closure);
        assert_true(kinked || tied_largest(cells, d.decay, truth.decay) <= ROUNDING(1e-10) * scale);
        assert_true(kinked ||
                    tied_largest(cells, d.unattributed, truth.unattributed) <= ROUNDING(1e-10) * scale);
        if (way != 5) {
            assert_int_equal(d.layers, columns);
            if (!kinked && tied_largest(cells * columns, d.by_layer, truth.by_layer) > ROUNDING(1e-10) * scale)
                fail_msg("%s, %s, way %d: by_layer", s->network, rules[r], way);
        }
        for (size_t i = 0; !kinked && options.bounds && i < cells * N; i++)
            assert_true(fabs(d.by_example[i] - truth.by_example[i]) <= d.bounds[i] + ROUNDING(1e-13) * scale);
        if (way == 4)
            assert_memory_equal(first.by_example, d.by_example, cells * N * sizeof *d.by_example);
        if (way == 0)
            first = d;
        else
            pk_decomposition_release(&t.context, &d);
    }
    pk_decomposition_release(&t.context, &first);
    free(truth.by_example), free(truth.by_layer), free(truth.decay), free(truth.unattributed);
    free(w), free(again);
    pk_run_release(&t.context, &run);
    pk_run_release(&t.context, &sparse);
    fixture_clear(fixture_run_path);
    fixture_clear(second);
    tied_end(&t);
}

static void test_decompositions(void **state)
{
    tied_worst worst = {0, 0};
    (void)state;
    for (size_t n = 0; n < TIED_SUBJECTS; n++)
        for (size_t r = 0; r < sizeof rules / sizeof *rules; r++)
            tied_check(n, r, NULL, &worst);
    print_message("worst entry %.2g of the largest, worst closure %.2g\n", worst.entry, worst.closure);
}

static void test_decompositions_with_groups(void **state)
{
    tied_worst worst = {0, 0};
    (void)state;
    for (size_t n = 0; n < TIED_SUBJECTS; n++)
        for (size_t r = 0; r < sizeof rules / sizeof *rules; r++)
            for (size_t g = 0; g < sizeof grouped / sizeof *grouped; g++)
                tied_check(n, r, &grouped[g], &worst);
    print_message("worst entry %.2g of the largest, worst closure %.2g\n", worst.entry, worst.closure);
}

static void test_refusals(void **state)
{
    static const char *const cases[][2] = {
        {"input 4; dense 4; relu name=a; dense 2", "relu: it has no weights"},
        {"input 4; dense 4 name=a; dense 2 tied=b", "no layer before it says name=b"},
        {"input 4; dense 4 name=a; dense 2 tied=a", "shape 2x4, that of the dense which it shares is 4x4"},
        {"input 4; dense 3 name=a; dense 4 tied=a", "shape 4x3, that of the dense which it shares is 3x4"},
        {"input 4; dense 4 name=a; dense 4 name=a", "has the name 'a' already"},
        {"input 4; dense 4 name=a transposed; dense 2", "'transposed' belongs to tied="},
        {"input 4; dense 4 nobias name=a; dense 4 tied=a.bias", "has no bias to share"},
        {"input 4; dense 4 name=a; dense 4 tied=a.scale", "'.weight' and '.bias' are possible"},
        {"input 4; dense 4 name=a.b; dense 2", "not the name of a layer"},
        {"input 4; dense 4 name=a name=b; dense 2", "comes twice"},
        {"input 1x4x4; conv 2 1x3 name=c; conv 2 3x1 tied=c; flatten", "network, layer 3"},
        {"input 4; residual( dense 4 tied=a ); dense 4 name=a", "no layer before it says name=a"},
        {"input 4; dense 4 name=a; layer_norm name=n; dense 4 tied=n transposed; dense 2", "network, layer 4"},
        {"input 3x4; attention 2 name=a; dense 12 tied=a; flatten", "do not have the same weights"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        const pk_status status = pk_network_parse(&context, cases[i][0], &graph);
        if (!status || !strstr(pk_message(&context), cases[i][1]))
            fail_msg("%s: expected '%s', got: %s", cases[i][0], cases[i][1], pk_message(&context));
        assert_int_equal(context.memory_used, 0);
    }
}

/* Layers that each have a weight and a bias fill the list of tensors; what follows them has none. */
static void test_last_tensor(void **state)
{
    (void)state;
    pk_context context;
    fixture_memory memory;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    fixture_use(&context, &memory);
    assert_ok(&context,
              pk_network_parse(&context, "input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh", &graph));
    assert_int_equal(graph.parameters, 12);
    pk_graph_release(&context, &graph);
    assert_int_equal(memory.held, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_last_tensor),    cmocka_unit_test(test_values_and_gradients),
        cmocka_unit_test(test_decompositions), cmocka_unit_test(test_decompositions_with_groups),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
