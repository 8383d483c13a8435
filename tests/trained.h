/* trained.h: small runs of pk_train of any network line and optimiser, for tests that need a recorded run. */
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

/* Group lines of the runs that are made from now on. */
static const char *const *trained_groups;
static size_t trained_group_count;

/* Trains and opens the run; its data stay in *to. Until fixture_leave or the next run in the same folder. */
FIXTURE void trained_make(const recipe *r, trained *to)
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
    to->test = fixture_normals(r->seed + 1, rows * D, 1);
    to->numbers = fixture_normals(r->seed + 2, rows * C, 1);
    to->labels = FIXTURE_NEW(int64_t, rows);
    for (size_t i = 0; r->tokens && i < rows * D; i++) {
        to->train[i] = (pk_real)((i * i + 3 * i + r->seed) % r->tokens);
        to->test[i] = (pk_real)((5 * i + 2 + i / D) % r->tokens);
    }
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
    options.groups = trained_groups;
    options.group_count = trained_group_count;
    to->weights = FIXTURE_NEW(pk_real, to->graph.parameters);
    assert_ok(context, pk_network_initialize(context, &to->graph, r->seed, to->weights));
    assert_ok(context, pk_train(context, &to->graph, &data, &options, to->weights, &result));
    pk_criterion_release(context, &criterion);
    assert_ok(context, pk_run_open(context, fixture_run_path, &to->run));
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
