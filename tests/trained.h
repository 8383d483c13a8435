/* trained.h: small runs of pk_train of any network line and optimizer, for tests that need a recorded run. */
#ifndef TRAINED_H
#define TRAINED_H
#include "fixture.h"

typedef struct trained {
    pk_context context;
    pk_graph graph;
    pk_run run;
    size_t rows;           /* of train, and of test */
    pk_real *train, *test; /* rows x D */
    pk_real *numbers;
    int64_t *labels;
    pk_real *weights;
} trained;

typedef struct recipe {
    const char *network, *loss, *optimizer;
    size_t tokens; /* inputs are whole numbers below this; 0: normal numbers */
    double rate, clip;
    size_t rows, batch, steps, keep_every;
    uint64_t seed;
    int moments; /* Adam's are recorded */
} recipe;

/* What few runs need. */
typedef struct trained_more {
    const char *const *groups; /* lines */
    size_t group_count;
    size_t test_rows; /* 0: as many as there are training rows */
    int float32;
} trained_more;

/* Trains and opens the run; its data stay in *to. Until fixture_leave or the next run in the same folder. */
FIXTURE void trained_make_with(const recipe *r, const trained_more *more, trained *to)
{
    memset(to, 0, sizeof *to);
    pk_context *context = &to->context;
    assert_ok(context, pk_network_parse(context, r->network, &to->graph));
    const size_t D = to->graph.input_width, C = to->graph.output_width, rows = r->rows;
    const size_t shape_x[2] = {rows, D}, shape_y[2] = {rows, C};
    pk_train_options options;
    pk_train_result result;
    pk_dataset data;
    to->rows = rows;
    to->train = fixture_normals(r->seed, rows * D, 1);
    const size_t test_rows = more->test_rows ? more->test_rows : rows;
    to->test = fixture_normals(r->seed + 1, test_rows * D, 1);
    to->numbers = fixture_normals(r->seed + 2, rows * C, 1);
    to->labels = FIXTURE_NEW(int64_t, rows);
    for (size_t i = 0; r->tokens && i < rows * D; i++)
        to->train[i] = (pk_real)((i * i + 3 * i + r->seed) % r->tokens);
    for (size_t i = 0; r->tokens && i < test_rows * D; i++)
        to->test[i] = (pk_real)((5 * i + 2 + i / D) % r->tokens);
    for (size_t i = 0; i < rows; i++)
        to->labels[i] = (int64_t)(i % C);
    memset(&options, 0, sizeof options);
    pk_criterion criterion;
    assert_ok(context, pk_criterion_parse(context, r->loss, &criterion));
    options.criterion = &criterion;
    for (size_t i = 0; criterion.ignores && i < rows; i += 3)
        to->labels[i] = criterion.ignore_index;
    assert_ok(context, pk_optimizer_parse(context, r->optimizer, &options.optimizer));
    data.inputs = pk_array_view(REAL_TYPE, 2, shape_x, to->train);
    const int classes =
        criterion.loss == PK_SOFTMAX_CROSS_ENTROPY || criterion.loss == PK_NLL || criterion.loss == PK_HINGE;
    data.targets = classes ? pk_array_view(PK_INT64, 1, shape_y, to->labels)
                           : pk_array_view(REAL_TYPE, 2, shape_y, to->numbers);
    /* Probabilities, where a loss takes no others. */
    for (size_t i = 0; (criterion.loss == PK_LOGISTIC || criterion.loss >= PK_KL_DIV) && i < rows * C; i++)
        to->numbers[i] = (pk_real)(criterion.log_target ? -fabs((double)to->numbers[i])
                                   : to->numbers[i] > 0 ? 1
                                                        : 0.25);
    options.steps = r->steps;
    options.batch_size = r->batch;
    options.schedule.rate = r->rate;
    options.clip_norm = r->clip;
    options.keep_every = r->keep_every;
    options.record_second_moments = r->moments;
    options.seed = r->seed;
    options.record = fixture_run_path;
    options.replace = 1;
    options.groups = more->groups;
    options.group_count = more->group_count;
    options.record_float32 = more->float32;
    to->weights = FIXTURE_NEW(pk_real, to->graph.parameters);
    assert_ok(context, pk_network_initialize(context, &to->graph, r->seed, to->weights));
    assert_ok(context, pk_train(context, &to->graph, &data, &options, to->weights, &result));
    pk_criterion_release(context, &criterion);
    assert_ok(context, pk_run_open(context, fixture_run_path, &to->run));
}

FIXTURE void trained_make(const recipe *r, trained *to)
{
    const trained_more none = {NULL, 0, 0, 0};
    trained_make_with(r, &none, to);
}

enum { TRAINED_GROUPED = 7 };

/* Run number o, below TRAINED_GROUPED, with an optimizer of its own and groups with rates, decay and frozen tensors. rates: of the
 * plain optimizers, and of those that divide by a root of second moments. */
FIXTURE const char *trained_make_grouped(int o, size_t rows, const double rates[2], trained *to)
{
    static const char *const lines[] = {"0 rate=0.5 weight_decay=0.1", "2 frozen", "5 rate=2"};
    static const char *const optimizers[TRAINED_GROUPED] = {
        "sgd",   "sgd momentum=0.9", "adamw",  "rmsprop momentum=0.8 maximize=1",
        "nadam", "adam amsgrad=1",   "adagrad"};
    const trained_more grouped = {lines, 3, 0, 0};
    const recipe how = {"input 3; dense 6; relu; dense 4; tanh; dense 2",
                        "squared",
                        optimizers[o],
                        0,
                        rates[o >= 2],
                        0,
                        rows,
                        4,
                        8,
                        0,
                        17,
                        0};
    trained_make_with(&how, &grouped, to);
    assert_int_equal(to->run.groups.count, 3);
    return optimizers[o];
}

FIXTURE pk_matrix trained_test(const trained *t, size_t rows)
{
    return pk_matrix_view(t->test, rows, t->graph.input_width);
}

FIXTURE void trained_release(trained *t)
{
    pk_run_release(&t->context, &t->run);
    pk_graph_release(&t->context, &t->graph);
    assert_int_equal(t->context.memory_used, 0);
    free(t->train), free(t->test), free(t->numbers), free(t->labels), free(t->weights);
}

#endif
