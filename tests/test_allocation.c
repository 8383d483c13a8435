/* Allocation failure at every allocation of every public function: a status, nothing leaks, and the next call works. */
#include "fixture.h"

/* What is tried: takes a context, gives everything back itself. */
typedef pk_status job(pk_context *context, void *user);

/* Runs it with the allocator failing at allocation 1, 2, ... until it succeeds; returns how many there are. */
static size_t check(const char *name, job *run, void *user, size_t least)
{
    for (size_t fail_at = 1;; fail_at++) {
        pk_context context;
        fixture_memory memory;
        memset(&context, 0, sizeof context);
        fixture_use(&context, &memory);
        memory.fail_at = fail_at;
        pk_status status = run(&context, user);
        if (memory.held || context.memory_used)
            fail_msg("%s: %zu bytes leak when allocation %zu fails", name, memory.held, fail_at);
        if (memory.allocations < fail_at) {
            assert_ok(&context, status);
            if (fail_at <= least) /* it does allocate through the context */
                fail_msg("%s: %zu allocations only", name, fail_at - 1);
            assert_true(!least || context.memory_peak > 0);
            return fail_at - 1;
        }
        if (status != PK_MEMORY || !strstr(pk_message(&context), "no memory for"))
            fail_msg("%s, allocation %zu: %s: %s", name, fail_at, pk_status_text(status), pk_message(&context));
        assert_true(fail_at < 10000);
    }
}

static pk_status parse(pk_context *context, void *user)
{
    pk_graph graph;
    memset(&graph, 0, sizeof graph);
    pk_status status = pk_network_parse(context, (const char *)user, &graph);
    if (status) {
        pk_graph zero;
        memset(&zero, 0, sizeof zero);
        assert_memory_equal(&graph, &zero, sizeof zero);
    }
    pk_graph_release(context, &graph);
    return status;
}

static void test_parse(void **state)
{
    (void)state;
    char deep[1000] = "input 3";
    for (int i = 0; i < 40; i++) /* beyond the first room for nodes */
        strcat(deep, "; dense 3; tanh");
    check("parse", parse, deep, 2);
}

typedef struct evaluation {
    pk_graph graph;
    pk_real *weights, *inputs, *outputs;
} evaluation;

static pk_status evaluate(pk_context *context, void *user)
{
    evaluation *e = (evaluation *)user;
    return pk_graph_evaluate(context, &e->graph, e->weights, pk_matrix_view(e->inputs, 100, 3),
                             pk_matrix_view(e->outputs, 100, 2));
}

static void test_evaluate(void **state)
{
    (void)state;
    evaluation e;
    memset(&e, 0, sizeof e);
    assert_ok(NULL, pk_network_parse(NULL, "input 3; dense 4; tanh; dense 2", &e.graph));
    e.weights = fixture_normals(1, e.graph.parameters, 1);
    e.inputs = fixture_normals(2, 300, 1);
    e.outputs = FIXTURE_NEW(pk_real, 200);
    check("evaluate", evaluate, &e, 0);
    free(e.weights), free(e.inputs), free(e.outputs);
    pk_graph_release(NULL, &e.graph);
}

typedef struct decomposition {
    const pk_run *run;
    const pk_real *inputs;
    pk_decompose_options options;
    size_t rows;
    uint64_t hash[64];
    int parts;
} decomposition;

static pk_status collect(void *user, const pk_decomposition *part)
{
    fixture_hash_rows(part, ((decomposition *)user)->hash);
    return PK_OK;
}

static pk_status decompose(pk_context *context, void *user)
{
    decomposition *d = (decomposition *)user;
    pk_decomposition out;
    pk_matrix inputs = pk_matrix_view((pk_real *)d->inputs, d->rows, d->run->graph.input_width);
    memset(d->hash, 0, sizeof d->hash);
    if (d->parts)
        return pk_decompose_parts(context, d->run, inputs, &d->options, collect, d, NULL);
    pk_status status = pk_decompose(context, d->run, inputs, &d->options, &out);
    if (!status)
        fixture_hash_rows(&out, d->hash);
    else
        assert_null(out.initial);
    pk_decomposition_release(context, &out);
    return status;
}

static void test_decompose(void **state)
{
    (void)state;
    static const char *const optimizers[] = {"sgd", "adamw", "sgd momentum=0.9"};
    for (int o = 0; o < 3; o++) {
        pk_context context;
        pk_run run;
        bf_run brute;
        decomposition d;
        uint64_t clean[64];
        const bf_recipe recipe = fixture_recipe(3, 6, 4, 3, 0.1);
        memset(&context, 0, sizeof context);
        memset(&d, 0, sizeof d);
        fixture_make("input 3; dense 4; relu; dense 3; tanh; dense 2", BF_SQUARED, optimizers[o], &recipe,
                     &brute);
        fixture_open(&context, &brute, &run);
        d.run = &run;
        d.rows = 60;
        d.inputs = fixture_normals(5, d.rows * 3, 1);
        d.options.keep[0] = PK_BY_EXAMPLE;
        d.options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
        d.options.step_closure = d.options.bounds = 1;
        d.options.rows_at_once = 20;
        assert_ok(&context, decompose(&context, &d));
        memcpy(clean, d.hash, sizeof clean);
        for (d.parts = 0; d.parts < 2; d.parts++) {
            check(optimizers[o], decompose, &d, 2);
            /* Memory that held rubbish before gives the same bits. */
            assert_memory_equal(clean, d.hash, sizeof clean);
        }
        /* 1 KiB, and any limit that is too little: the message names the least, which does. */
        for (d.parts = 0; d.parts < 2; d.parts++) {
            size_t least = 0;
            context.memory_limit = context.memory_used + 1024;
            assert_int_equal(decompose(&context, &d), PK_MEMORY_LIMIT);
            const char *words = "the least that would do is ", *at = strstr(pk_message(&context), words);
            assert_true(at && sscanf(at + strlen(words), "%zu", &least) == 1);
            context.memory_limit = least;
            assert_ok(&context, decompose(&context, &d));
            assert_memory_equal(clean, d.hash, sizeof clean);
            context.memory_limit = least - 1;
            assert_int_equal(decompose(&context, &d), PK_MEMORY_LIMIT);
        }
        context.memory_limit = 0;
        free((pk_real *)d.inputs);
        pk_run_release(&context, &run);
        bf_run_free(&brute);
        assert_int_equal(context.memory_used, 0);
    }
}

/* ---- every public function that takes a context --------------------------------------------------------
 * A job for each, in the table below; test_table_is_complete reads the declarations and finds what is not there. */

enum { NET_ROWS = 12, NET_STEPS = 5 };

/* A small network with data, two recorded runs of it, and files; made once, read by all jobs. */
typedef struct material {
    pk_graph graph;
    pk_run run, kept;
    size_t P;
    pk_real *w, *v, *x, *u, *many;
    double *losses;
    int64_t items[NET_ROWS];
    pk_dataset data, tokens;
    pk_batch batch;
    pk_optimizer optimizer;
    char run_path[300], kept_path[300], made[300], npy[300], csv[300], images[300], labels[300];
} material;

static pk_matrix none(void)
{
    return pk_matrix_view(NULL, 0, 0);
}

#define JOB(name) static pk_status name(pk_context *context, void *user)
#define WITH material *m = (material *)user
#define X(m) pk_matrix_view((m)->x, NET_ROWS, 3)
#define U(m) pk_matrix_view((m)->u, NET_ROWS, 2)

JOB(job_allocate)
{
    void *memory = NULL;
    (void)user;
    pk_status status = pk_allocate(context, 100, 8, "a table", &memory);
    pk_release(context, memory);
    return status;
}

JOB(job_array_map)
{
    WITH;
    pk_array array;
    pk_status status = pk_array_map(context, m->npy, 0, &array);
    if (!status)
        pk_array_release(context, &array);
    return status;
}

JOB(job_array_open)
{
    WITH;
    pk_array array;
    pk_real numbers[6];
    const size_t dims[1] = {3};
    pk_status status = pk_array_open(context, m->npy, 0, &array);
    if (status)
        return status;
    status = pk_array_read(context, &array, 3, 6, numbers);
    if (!status)
        status = pk_array_check_rows(context, &array, 1, dims, "inputs");
    pk_array_release(context, &array);
    return status;
}

JOB(job_array_write)
{
    WITH;
    static const double numbers[6] = {1, 2, 3, 4, 5, 6};
    const size_t shape[2] = {3, 2}, row[2] = {2};
    pk_array_writer writer;
    memset(&writer, 0, sizeof writer);
    pk_status status = pk_array_write(context, m->made, PK_FLOAT64, 2, shape, numbers);
    if (!status)
        status = pk_array_create(context, m->made, PK_FLOAT64, 2, row, &writer);
    if (!status)
        status = pk_array_append(context, &writer, 3, numbers);
    if (!status)
        status = pk_array_flush(context, &writer);
    pk_status closed = pk_array_close(context, &writer);
    status = status ? status : closed;
    if (!status)
        status = pk_array_reopen(context, m->made, PK_FLOAT64, 2, row, 2, &writer);
    closed = pk_array_close(context, &writer);
    (void)remove(m->made);
    return status ? status : closed;
}

JOB(job_data)
{
    WITH;
    pk_dataset rows;
    pk_real numbers[3] = {1, 2, 3};
    pk_loss loss;
    pk_status status = pk_dataset_check(context, &m->data, 3, 2);
    if (!status)
        status = pk_dataset_rows(context, &m->data, 2, 3, &rows);
    if (!status)
        status = pk_loss_check(context, PK_SQUARED, &m->data, 2);
    if (!status)
        status = pk_loss_parse(context, "squared", &loss);
    if (!status)
        status = pk_graph_check_inputs(context, &m->graph, 0, numbers);
    return status;
}

JOB(job_criterion)
{
    WITH;
    const pk_criterion criterion = {.loss = PK_HUBER, .delta = 0.5};
    pk_criterion parsed;
    pk_gradient_workspace workspace;
    pk_trainer trainer;
    memset(&parsed, 0, sizeof parsed);
    memset(&workspace, 0, sizeof workspace);
    memset(&trainer, 0, sizeof trainer);
    pk_status status = pk_criterion_parse(context, "logistic pos_weight=1,2", &parsed);
    if (!status)
        status = pk_criterion_check(context, &criterion, &m->data, 2);
    if (!status)
        status = pk_loss_gradients_with(context, &m->graph, &criterion, m->w, &m->data, &m->batch, m->losses,
                                        pk_matrix_view(m->many, NET_ROWS, m->P));
    if (!status)
        status =
            pk_hessian_product_with(context, &m->graph, &criterion, m->w, &m->data, &m->batch, m->v, m->many);
    if (!status)
        status = pk_gauss_newton_product_with(context, &m->graph, &criterion, m->w, &m->data, &m->batch, m->v,
                                              m->many);
    if (!status)
        status = pk_gradient_prepare(context, &m->graph, NET_ROWS, &workspace);
    if (!status)
        status = pk_batch_gradient_with(context, &m->graph, &criterion, m->w, &m->data, &m->batch, &workspace,
                                        NULL, m->many);
    if (!status)
        status =
            pk_trainer_prepare_with(context, &m->graph, &m->data, &criterion, &m->optimizer, NULL, 4, &trainer);
    pk_trainer_release(context, &trainer);
    pk_gradient_release(context, &workspace);
    pk_criterion_release(context, &parsed);
    return status;
}

JOB(job_csv)
{
    WITH;
    pk_dataset data;
    pk_status status = pk_dataset_csv(context, m->csv, 1, &data);
    if (!status)
        pk_dataset_release(context, &data);
    return status;
}

JOB(job_idx)
{
    WITH;
    pk_dataset data;
    pk_status status = pk_dataset_idx(context, m->images, m->labels, 1, &data);
    if (!status)
        pk_dataset_release(context, &data);
    return status;
}

JOB(job_matrix)
{
    WITH;
    return pk_matrix_multiply(context, 1, X(m), 1, U(m), 0, 0, pk_matrix_view(m->many, 3, 2));
}

JOB(job_graph)
{
    pk_graph graph;
    const pk_shape shape = {1, {5}};
    const pk_real constants[6] = {1, 2, 3, 4, 5, 6};
    const int first[1] = {0};
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    (void)user;
    memset(&graph, 0, sizeof graph);
    pk_status status = pk_graph_input(context, &graph, &shape);
    for (int i = 0; !status && i < 40; i++) {
        const int before[1] = {i};
        status = pk_graph_add(context, &graph, pk_operation_find("tanh"), 1, before, NULL, NULL);
    }
    if (!status)
        status = pk_graph_add_constants(context, &graph, pk_operation_find("relu"), 1, first, attributes, 6,
                                        constants, NULL);
    int nodes[2] = {0, 0};
    const pk_operation *dense = pk_operation_find("dense");
    memcpy(attributes, dense->defaults, sizeof attributes);
    attributes[PK_DENSE_OUTPUTS] = 5;
    for (int i = 0; !status && i < 2; i++)
        status = pk_graph_add(context, &graph, dense, 1, first, attributes, &nodes[i]);
    if (!status)
        status = pk_graph_tie(context, &graph, nodes[1], 0, nodes[0], 1);
    pk_graph_release(context, &graph);
    return status;
}

static pk_status load_matrix(void *user, pk_context *context, const char *name, pk_array *array)
{
    static const double matrix[3][3] = {{0, 0, 0.5}, {1, 0, 0.25}, {2, 2, -1}};
    static const size_t shape[2] = {3, 3};
    (void)user, (void)context, (void)name;
    *array = pk_array_view(PK_FLOAT64, 2, shape, matrix);
    return PK_OK;
}

JOB(job_parse_with)
{
    const pk_constants constants = {load_matrix, NULL};
    pk_graph graph;
    (void)user;
    memset(&graph, 0, sizeof graph);
    pk_status status = pk_network_parse_with(
        context, "input 4x2; propagate matrix; fourier 3; residual( dense 2; tanh; dense 6 ); flatten; dense 2",
        &constants, &graph);
    pk_graph_release(context, &graph);
    return status;
}

JOB(job_parse)
{
    (void)user;
    return parse(context, (void *)(uintptr_t) "input 1x6x6; conv 2 3x3 pad=1; max_pool 2; flatten; dense 3");
}

JOB(job_initialize)
{
    WITH;
    return pk_network_initialize(context, &m->graph, 1, m->many);
}

JOB(job_evaluate)
{
    WITH;
    return pk_graph_evaluate(context, &m->graph, m->w, X(m), pk_matrix_view(m->many, NET_ROWS, 2));
}

JOB(job_vjp)
{
    WITH;
    return pk_vjp(context, &m->graph, m->w, X(m), U(m), pk_matrix_view(m->many, NET_ROWS, m->P), none());
}

JOB(job_vjp_sum)
{
    WITH;
    return pk_vjp_sum(context, &m->graph, m->w, X(m), U(m), m->many);
}

JOB(job_jvp)
{
    WITH;
    return pk_jvp(context, &m->graph, m->w, X(m), m->v, X(m), pk_matrix_view(m->many, NET_ROWS, 2));
}

JOB(job_jacobian)
{
    WITH;
    return pk_jacobian(context, &m->graph, m->w, X(m), pk_matrix_view(m->many, 2 * NET_ROWS, m->P), none());
}

JOB(job_loss_gradients)
{
    WITH;
    return pk_loss_gradients(context, &m->graph, PK_SQUARED, m->w, &m->data, &m->batch, m->losses,
                             pk_matrix_view(m->many, NET_ROWS, m->P));
}

JOB(job_mixed)
{
    WITH;
    return pk_mixed_product(context, &m->graph, m->w, X(m), U(m), m->v, X(m),
                            pk_matrix_view(m->many, NET_ROWS, m->P), none());
}

JOB(job_hessian)
{
    WITH;
    return pk_hessian_product(context, &m->graph, PK_SQUARED, m->w, &m->data, &m->batch, m->v, m->many);
}

JOB(job_gauss_newton)
{
    WITH;
    return pk_gauss_newton_product(context, &m->graph, PK_SQUARED, m->w, &m->data, &m->batch, m->v, m->many);
}

JOB(job_ntk)
{
    WITH;
    return pk_kernel_ntk(context, &m->graph, m->w, X(m), none(),
                         pk_matrix_view(m->many, 2 * NET_ROWS, 2 * NET_ROWS));
}

JOB(job_ntk_trace)
{
    WITH;
    return pk_kernel_ntk_trace(context, &m->graph, m->w, X(m), X(m),
                               pk_matrix_view(m->many, NET_ROWS, NET_ROWS));
}

JOB(job_reference)
{
    WITH;
    enum { CELLS = NET_ROWS * 2 };
    static double numbers[5][CELLS], by_example[CELLS * NET_ROWS];
    const pk_reference out = {numbers[0], numbers[1], by_example, numbers[2], numbers[3], numbers[4], NULL};
    return pk_decompose_reference(context, &m->kept, X(m), 2, 2, &out);
}

JOB(job_compare)
{
    WITH;
    pk_comparison rules[PK_COMPARE_RULES];
    pk_run first =
        m->kept; /* one step, in which no unit is switched: else a thousand decompositions, each several times */
    first.steps = 1;
    return pk_compare(context, &first, X(m), rules);
}

JOB(job_kernels)
{
    WITH;
    static double numbers[6][2 * NET_ROWS * NET_ROWS];
    double *const grams[6] = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    pk_kernel_options options[6];
    memset(options, 0, sizeof options);
    options[0].kind = PK_KERNEL_EPK;
    options[1].kind = PK_KERNEL_NTK;
    options[2].kind = PK_KERNEL_CONJUGATE;
    options[3].kind = PK_KERNEL_TRACIN;
    options[4].kind = PK_KERNEL_LOSS_PATH;
    options[5].kind = PK_KERNEL_PATH;
    options[0].outputs = options[5].outputs = PK_OUTPUTS_TRACE;
    options[1].outputs = PK_OUTPUTS_SUM;
    options[0].map = PK_MAP_COSINE;
    options[2].map = PK_MAP_CENTER;
    options[2].left_train = 1;
    return pk_kernels(context, &m->kept, &m->data, NULL, 6, options, grams, NULL);
}

JOB(job_domingos)
{
    WITH;
    static double contributions[NET_ROWS * 2 * NET_ROWS], intercept[NET_ROWS * 2];
    const pk_quadrature left = {PK_RULE_LEFT, 1};
    pk_domingos result = {contributions, NULL, intercept, 0, 0};
    return pk_kernel_domingos(context, &m->kept, &m->data, left, 0, &result);
}

JOB(job_kernel_file)
{
    WITH;
    char path[300];
    size_t shape[6];
    int rank;
    pk_kernel_options options;
    memset(&options, 0, sizeof options);
    options.kind = PK_KERNEL_PATH_AVERAGE;
    options.outputs = PK_OUTPUTS_TRACE;
    options.map = PK_MAP_COSINE;
    snprintf(path, sizeof path, "%s/gram.npy", fixture_folder);
    pk_status status = pk_kernel_shape(context, &m->kept, &m->data, NULL, &options, shape, &rank);
    if (!status)
        status = pk_kernel_file(context, &m->kept, &m->data, NULL, &options, path, NULL);
    (void)remove(path);
    strcat(path, ".part");
    (void)remove(path);
    return status;
}

JOB(job_smooth)
{
    WITH;
    pk_smoother smoother;
    pk_status status = pk_smooth(context, &m->kept, pk_matrix_view(m->x, 2, 3), NULL, &smoother);
    assert_true(!status == !!smoother.matrix);
    pk_smoother_release(context, &smoother);
    return status;
}

JOB(job_sensitivity)
{
    WITH;
    pk_sensitivity sensitivity;
    const pk_sensitivity_options options = {1, 1, 1, 0};
    pk_status status = pk_sensitivity_at(context, &m->kept, pk_matrix_view(m->x, 1, 3), &options, &sensitivity);
    assert_true(!status == !!sensitivity.by_example);
    pk_sensitivity_release(context, &sensitivity);
    return status;
}

JOB(job_novelty)
{
    (void)user;
    const double gram[4] = {2, 1, 1, 2}, diagonal[2] = {2, 3};
    double values[2], vectors[4], energies[2], number;
    pk_status status = pk_symmetric_eigenvalues(context, 2, gram, values, vectors);
    if (!status)
        status = pk_singular_values(context, 2, 2, gram, values, NULL, vectors);
    if (!status)
        status = pk_novelty(context, 2, gram, 2, gram, diagonal, NULL, energies, NULL);
    if (!status)
        status = pk_auroc(context, 2, gram, 2, diagonal, &number);
    return status ? status : pk_false_positives(context, 2, gram, 2, diagonal, 0.95, &number);
}

JOB(job_influence)
{
    WITH;
    static double influence[NET_ROWS * 64], by_step[NET_ROWS * 64 * 16], rates[NET_ROWS * 16], decay[NET_ROWS];
    const pk_influence_options options = {.readout = PK_READOUT_LOSS, .by_step = 1, .hyperparameters = 1};
    pk_influence out = {influence, by_step, rates, decay, NULL, 0};
    assert_true(m->kept.examples <= 64 && m->kept.steps <= 16);
    return pk_influences(context, &m->kept, &m->data, &options, &out);
}

JOB(job_machine)
{
    (void)user;
    const double gram[9] = {2, 1, .5, 1, 2, 1, .5, 1, 2}, numbers[3] = {1, -1, 1}, diagonal[3] = {2, 3, 2};
    const int64_t labels[3] = {0, 1, 2};
    const size_t shape[1] = {3};
    double out[3], special[2];
    const int64_t classes[1] = {0};
    pk_gram_measures one;
    pk_gram_pair_measures two;
    pk_prediction_measures predictions;
    pk_status status = PK_OK;
    for (int loss = PK_MACHINE_SQUARED; loss <= PK_MACHINE_EPSILON_INSENSITIVE && !status; loss++) {
        pk_machine machine;
        const pk_machine_options options = {
            .loss = (pk_machine_loss)loss, .regularization = .5, .intercept = 1};
        const pk_array targets = loss == PK_MACHINE_SOFTMAX ? pk_array_view(PK_INT64, 1, shape, labels)
                                                            : pk_array_view(PK_FLOAT64, 1, shape, numbers);
        status = pk_machine_fit(context, 3, gram, &targets, &options, &machine);
        assert_true(!status == !!machine.coefficients);
        if (!status && loss == PK_MACHINE_SQUARED) {
            status = pk_machine_predict(context, &machine, 1, gram, out);
            if (!status)
                status = pk_machine_attribute(context, &machine, 1, gram, out);
            if (!status)
                status = pk_machine_variance(context, &machine, 3, gram, diagonal, out);
        }
        pk_machine_release(context, &machine);
    }
    if (!status)
        status = pk_pearson(context, 3, numbers, diagonal, out);
    if (!status)
        status = pk_spearman(context, 3, numbers, diagonal, out);
    if (!status)
        status = pk_kendall(context, 3, numbers, diagonal, out);
    if (!status)
        status = pk_top_overlap(context, 3, numbers, diagonal, 2, out);
    if (!status)
        status = pk_measure_gram(context, 3, gram, &one);
    if (!status)
        status = pk_target_alignment(context, 3, gram, numbers, out);
    if (!status)
        status = pk_kernel_specialization(context, 1, 1, gram, 1, classes, special);
    if (!status)
        status = pk_measure_gram_pair(context, 3, gram, gram, &two);
    return status ? status : pk_measure_predictions(context, 1, 3, gram, gram, classes, &predictions);
}

JOB(job_run_novelty)
{
    WITH;
    double energies[NET_ROWS];
    pk_kernel_options options;
    memset(&options, 0, sizeof options);
    options.kind = PK_KERNEL_NTK;
    options.outputs = PK_OUTPUTS_TRACE;
    return pk_kernel_novelty(context, &m->kept, &m->data, &options, NULL, energies, NULL);
}

JOB(job_sketch)
{
    WITH;
    static pk_real gram[NET_ROWS * NET_ROWS], features[NET_ROWS * 2 * 16];
    const pk_sketch sketch = {PK_SKETCH_SRHT, 8, 1};
    const pk_relu_features how = {2, 8, 8, 0, 1};
    pk_sketch_report report;
    pk_status status =
        pk_sketch_gradients(context, &m->graph, m->w, X(m), &sketch, pk_matrix_view(features, NET_ROWS * 2, 8));
    if (!status)
        status = pk_sketch_vectors(context, &sketch, pk_matrix_view(features, NET_ROWS, 8),
                                   pk_matrix_view(gram, NET_ROWS, 8));
    if (!status)
        status = pk_relu_ntk_features(context, X(m), &how, pk_matrix_view(features, NET_ROWS, 16));
    if (!status)
        status = pk_kernel_ntk_nodes(context, &m->graph, m->w, pk_matrix_view(m->x, 2, 3), 2,
                                     pk_matrix_view(gram, 4, 4));
    return status ? status
                  : pk_kernel_sketched(context, &m->graph, m->w, X(m), none(), &sketch, 1,
                                       pk_matrix_view(gram, NET_ROWS, NET_ROWS), &report);
}

JOB(job_telescope)
{
    WITH;
    static double predictions[(NET_STEPS + 1) * NET_ROWS * 2];
    return pk_telescope(context, &m->kept, X(m), predictions);
}

JOB(job_batch_gradient)
{
    WITH;
    pk_gradient_workspace workspace;
    memset(&workspace, 0, sizeof workspace);
    pk_status status = pk_gradient_prepare(context, &m->graph, NET_ROWS, &workspace);
    if (!status)
        status = pk_batch_gradient(context, &m->graph, PK_SQUARED, m->w, &m->data, &m->batch, &workspace, NULL,
                                   m->many);
    pk_gradient_release(context, &workspace);
    return status;
}

JOB(job_optimizer)
{
    pk_optimizer optimizer;
    const pk_schedule schedule = {PK_SCHEDULE_COSINE, 0.1, 0, 0, 10, 0, 0, 0, NULL, 0, NULL, NULL};
    (void)user;
    pk_status status = pk_optimizer_parse(context, "adamw beta1=0.8", &optimizer);
    if (!status)
        status = pk_optimizer_check(context, &optimizer);
    return status ? status : pk_schedule_check(context, &schedule, 100);
}

JOB(job_open)
{
    WITH;
    pk_run run;
    memset(&run, 0, sizeof run);
    pk_status status = pk_run_open(context, m->run_path, &run);
    if (!status)
        status = pk_run_weights(context, &run, 1, m->many);
    if (!status)
        status = pk_run_second_moments(context, &run, 1, m->many);
    pk_run_release(context, &run);
    return status;
}

JOB(job_recover)
{
    WITH;
    pk_run run;
    memset(&run, 0, sizeof run);
    pk_status status = pk_run_recover(context, m->run_path, &run);
    if (!status)
        status = pk_run_until(context, &run, 2);
    if (!status)
        status = pk_run_check_inputs(context, &run, &m->data.inputs, "inputs");
    pk_run_release(context, &run);
    return status;
}

JOB(job_replay)
{
    WITH;
    pk_replay replay;
    memset(&replay, 0, sizeof replay);
    pk_status status = pk_replay_prepare(context, &m->kept, 3, &replay);
    if (!status)
        status = pk_replay_weights(context, &replay, 3, m->many);
    pk_replay_release(context, &replay);
    return status;
}

static void remove_made(const material *m)
{
    fixture_clear(m->made);
}

/* Recorded by hand: with a trainer, and with keep_every too. */
static pk_status record_by_hand(pk_context *context, const material *m, size_t keep_every)
{
    pk_recorder recorder;
    pk_recorder_options options;
    pk_trainer trainer;
    memset(&recorder, 0, sizeof recorder);
    memset(&options, 0, sizeof options);
    memset(&trainer, 0, sizeof trainer);
    const char *const lines[] = {"0 momentum=0.5", "1 frozen"};
    const double rates[2] = {0.02, 0};
    const int grouped = keep_every < 2;
    pk_parameter_groups groups;
    memset(&groups, 0, sizeof groups);
    options.network = m->graph.text;
    options.loss = "huber delta=0.5";
    options.optimizer = "sgd momentum=0.9";
    options.groups = lines;
    options.group_count = grouped ? 2 : 0;
    options.group_rates = grouped;
    options.keep_every = keep_every;
    options.batch_weights = options.gradient_scales = keep_every < 2;
    options.replace = 1;
    pk_status status = pk_recorder_open(context, m->made, &options, &m->data, m->w, &recorder);
    if (!status && grouped)
        status = pk_parameter_groups_parse(context, &m->graph, &m->optimizer, 2, lines, &groups);
    if (!status && grouped)
        status = pk_trainer_prepare_groups(context, &m->graph, &m->data, PK_SQUARED, &m->optimizer, &groups,
                                           NET_ROWS, &trainer);
    else if (!status)
        status =
            pk_trainer_prepare(context, &m->graph, &m->data, PK_SQUARED, &m->optimizer, NET_ROWS, &trainer);
    for (size_t s = 0; !status && s < 3; s++) {
        double scale = 1;
        trainer.group_rates = rates;
        if (grouped)
            status = pk_recorder_group_rates(context, &recorder, rates);
        if (status)
            break;
        status = pk_training_step(context, &trainer, s, 0.01, 0, &m->batch, m->w, m->many, &scale, NULL);
        if (!status)
            status = s == 2 && keep_every < 2
                         ? pk_recorder_step(context, &recorder, 0.01, &m->batch, 1, NULL, m->many)
                         : pk_recorder_training_step(context, &recorder, 0.01, &m->batch, scale, trainer.state,
                                                     m->many);
    }
    pk_trainer_release(context, &trainer);
    pk_parameter_groups_release(context, &groups);
    pk_status closed = pk_recorder_close(context, &recorder);
    return status ? status : closed;
}

JOB(job_recorder)
{
    WITH;
    pk_status status = record_by_hand(context, m, 0);
    remove_made(m);
    return status;
}

JOB(job_recorder_kept)
{
    WITH;
    pk_status status = record_by_hand(context, m, 2);
    remove_made(m);
    return status;
}

static pk_status train_into(pk_context *context, const material *m, const char *folder, size_t steps,
                            size_t keep_every, int resume)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SQUARED;
    options.optimizer = keep_every ? m->optimizer : pk_optimizer_adam();
    options.schedule.rate = 0.01;
    options.steps = steps;
    options.batch_size = 5;
    options.record = folder;
    options.resume = resume;
    options.replace = !resume;
    options.keep_every = keep_every;
    options.record_second_moments = !keep_every;
    memcpy(m->many, m->w, m->P * sizeof *m->many);
    return pk_train(context, &m->graph, &m->data, &options, m->many, NULL);
}

JOB(job_train)
{
    WITH;
    pk_status status = train_into(context, m, m->made, 2, 0, 0);
    remove_made(m);
    return status;
}

/* A resume that fails costs no step: the next one goes on. */
JOB(job_resume)
{
    WITH;
    pk_run run;
    pk_status status = train_into(context, m, m->made, 6, 4, 1);
    memset(&run, 0, sizeof run);
    if (access(m->made, F_OK) == 0) {
        pk_context other;
        memset(&other, 0, sizeof other);
        if (pk_run_open(&other, m->made, &run) == PK_OK) {
            assert_true(status || run.steps == 6);
            pk_run_release(&other, &run);
        }
    }
    if (!status)
        remove_made(m);
    return status;
}

/* A run that begins with a state, an average of its weights, both decomposed. */
JOB(job_begun)
{
    WITH;
    pk_run run;
    pk_train_options options;
    pk_decompose_options how;
    pk_decomposition out;
    static double numbers[6][NET_ROWS * 2], by_example[NET_ROWS * 2 * NET_ROWS];
    const pk_reference reference = {numbers[0], numbers[1], by_example, numbers[2],
                                    numbers[3], numbers[4], numbers[5]};
    memset(&run, 0, sizeof run);
    memset(&options, 0, sizeof options);
    memset(&how, 0, sizeof how);
    memset(&out, 0, sizeof out);
    pk_real *w = FIXTURE_NEW(pk_real, m->P), *velocity = FIXTURE_NEW(pk_real, m->P);
    memcpy(w, m->w, m->P * sizeof *w);
    memcpy(velocity, m->v, m->P * sizeof *w);
    options.loss = PK_SQUARED;
    options.optimizer = m->optimizer;
    options.schedule.rate = 0.01;
    options.steps = 3;
    options.record = m->made;
    options.replace = 1;
    options.keep_every = 2;
    options.initial_state = velocity;
    options.initial_step = 2;
    pk_status status = pk_train(context, &m->graph, &m->data, &options, w, NULL);
    if (!status)
        status = pk_run_open(context, m->made, &run);
    if (!status)
        status = pk_run_initial_state(context, &run, m->many);
    if (!status)
        status = pk_average_parse(context, "swa:1:1", &how.average);
    if (!status)
        status = pk_average_check(context, &how.average, run.steps);
    if (!status)
        status = pk_run_average(context, &run, &how.average, w);
    if (!status)
        status = pk_decompose(context, &run, X(m), &how, &out);
    if (!status)
        status = pk_decompose_reference_average(context, &run, X(m), &how.average, 1, 2, &reference);
    pk_decomposition_release(context, &out);
    pk_run_release(context, &run);
    free(w), free(velocity);
    remove_made(m);
    return status;
}

JOB(job_decompose)
{
    WITH;
    pk_decomposition out;
    pk_plan plan;
    pk_status status = pk_decompose(context, &m->kept, X(m), NULL, &out);
    pk_decomposition_release(context, &out);
    return status ? status : pk_decompose_plan(context, &m->kept, NET_ROWS, NULL, 1, &plan);
}

static pk_status take_part(void *user, const pk_decomposition *part)
{
    (void)user, (void)part;
    return PK_OK;
}

JOB(job_decompose_parts)
{
    WITH;
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.rows_at_once = 5;
    options.bounds = 1;
    return pk_decompose_parts(context, &m->run, X(m), &options, take_part, NULL, NULL);
}

JOB(job_decompose_array)
{
    WITH;
    return pk_decompose_array_parts(context, &m->kept, &m->data.inputs, NULL, take_part, NULL, NULL);
}

JOB(job_quadrature)
{
    WITH;
    pk_quadrature quadrature = {PK_RULE_GAUSS, 3};
    pk_readout readout;
    memset(&readout, 0, sizeof readout);
    pk_status status = pk_quadrature_parse(context, "gauss:3", &quadrature);
    if (!status)
        status = pk_kernel_rule_parse(context, "gauss:3", &quadrature);
    return status ? status : pk_quadrature_check(context, &quadrature, &m->graph, &readout);
}

JOB(job_window)
{
    WITH;
    pk__window window;
    pk_status status = PK_OK;
    void *memory = NULL;
    for (int take = 0; take < 2 && !status; take++) {
        pk__arena arena = {(unsigned char *)memory, 0, 0, 0};
        if (take) { /* not of the context: this is about what the functions allocate */
            assert_int_equal(posix_memalign(&memory, 64, (size_t)1 << 20), 0);
            arena.base = (unsigned char *)memory;
            arena.capacity = (size_t)1 << 20;
        }
        pk__steps_begin(&m->kept, &window);
        window.representation.outputs = 2;
        window.representation.batch = window.largest_batch;
        window.representation.materialized = 1;
        pk__steps_take(&arena, 2, 1, 0, 1, 0, &window);
        assert_true(arena.used < (size_t)1 << 20);
    }
    status = pk__steps_prepare(context, &window, 0, 2);
    if (!status)
        status = pk__steps_save_states(context, &window);
    if (!status)
        status = pk__steps_visit(context, &window, 1);
    free(memory);
    return status;
}

static const struct entry {
    const char *names; /* the functions that the job calls */
    job *run;
    size_t least; /* allocations that it makes at least, so that it is known to make them */
} entries[] = {
    {"pk_allocate pk_release", job_allocate, 1},
    {"pk_array_map pk_array_release", job_array_map, 0},
    {"pk_array_open pk_array_read pk_array_check_rows", job_array_open, 0},
    {"pk_array_write pk_array_create pk_array_append pk_array_flush pk_array_close pk_array_reopen",
     job_array_write, 0},
    {"pk_dataset_check pk_dataset_rows pk_loss_check pk_loss_parse pk_graph_check_inputs", job_data, 1},
    {"pk_criterion_parse pk_criterion_check pk_criterion_release pk_loss_gradients_with "
     "pk_hessian_product_with "
     "pk_gauss_newton_product_with pk_batch_gradient_with pk_trainer_prepare_with",
     job_criterion, 7},
    {"pk_dataset_csv pk_dataset_release", job_csv, 1},
    {"pk_dataset_idx", job_idx, 1},
    {"pk_matrix_multiply", job_matrix, 0},
    {"pk_graph_input pk_graph_add pk_graph_add_constants pk_graph_tie pk_graph_release", job_graph, 4},
    {"pk_network_parse_with", job_parse_with, 5},
    {"pk_network_parse", job_parse, 2},
    {"pk_network_initialize", job_initialize, 0},
    {"pk_graph_evaluate", job_evaluate, 1},
    {"pk_vjp", job_vjp, 1},
    {"pk_vjp_sum", job_vjp_sum, 1},
    {"pk_jvp", job_jvp, 1},
    {"pk_jacobian", job_jacobian, 1},
    {"pk_loss_gradients", job_loss_gradients, 1},
    {"pk_hessian_product", job_hessian, 1},
    {"pk_mixed_product", job_mixed, 1},
    {"pk_gauss_newton_product", job_gauss_newton, 1},
    {"pk_kernel_ntk", job_ntk, 1},
    {"pk_kernel_ntk_trace", job_ntk_trace, 1},
    {"pk_gradient_prepare pk_batch_gradient pk_gradient_release", job_batch_gradient, 1},
    {"pk_optimizer_parse pk_optimizer_check pk_schedule_check", job_optimizer, 0},
    {"pk_run_open pk_run_weights pk_run_second_moments pk_run_release", job_open, 3},
    {"pk_run_recover pk_run_until pk_run_check_inputs", job_recover, 3},
    {"pk_replay_prepare pk_replay_weights pk_replay_release", job_replay, 1},
    {"pk_recorder_open pk_recorder_step pk_recorder_training_step pk_recorder_close pk_trainer_prepare "
     "pk_training_step pk_trainer_release pk_parameter_groups_parse pk_parameter_groups_release "
     "pk_trainer_prepare_groups pk_recorder_group_rates",
     job_recorder, 3},
    {"pk_recorder_open pk_recorder_training_step", job_recorder_kept, 3},
    {"pk_train", job_train, 3},
    {"pk_train", job_resume, 3},
    {"pk_decompose pk_decompose_plan pk_decomposition_release", job_decompose, 2},
    {"pk_run_initial_state pk_average_parse pk_average_check pk_run_average pk_decompose_reference_average",
     job_begun, 10},
    {"pk_decompose_parts", job_decompose_parts, 3},
    {"pk_decompose_array_parts", job_decompose_array, 3},
    {"pk_quadrature_check pk_quadrature_parse pk_kernel_rule_parse", job_quadrature, 0},
    {"pk_kernels", job_kernels, 20},
    {"pk_kernel_shape pk_kernel_file", job_kernel_file, 10},
    {"pk_kernel_domingos", job_domingos, 10},
    {"pk_decompose_reference", job_reference, 10},
    {"pk_smooth pk_smoother_release", job_smooth, 10},
    {"pk_telescope", job_telescope, 3},
    {"pk_sketch_vectors pk_sketch_gradients pk_kernel_sketched pk_relu_ntk_features pk_kernel_ntk_nodes",
     job_sketch, 10},
    {"pk_symmetric_eigenvalues pk_singular_values pk_novelty pk_auroc pk_false_positives", job_novelty, 5},
    {"pk_cholesky pk_cholesky_solve pk_machine_fit pk_machine_predict pk_machine_attribute pk_machine_variance "
     "pk_machine_release pk_pearson pk_spearman pk_kendall pk_top_overlap pk_measure_gram pk_target_alignment "
     "pk_kernel_specialization pk_measure_gram_pair pk_measure_predictions",
     job_machine, 10},
    {"pk_kernel_novelty", job_run_novelty, 10},
    {"pk_influences", job_influence, 10},
    {"pk_sensitivity_at pk_sensitivity_release", job_sensitivity, 10},
    {"pk_compare", job_compare, 10},
    {"pk__steps_prepare pk__steps_save_states pk__steps_visit", job_window, 0},
};
enum { ENTRIES = (int)(sizeof entries / sizeof *entries) };

static void write_bytes(const char *path, const void *bytes, size_t size)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_true(fwrite(bytes, 1, size, file) == size);
    assert_int_equal(fclose(file), 0);
}

static void make_material(material *m)
{
    static const unsigned char images[] = {0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 1, 1, 2, 3, 4},
                               labels[] = {0, 0, 8, 1, 0, 0, 0, 2, 0, 1};
    static size_t shapes[2][2] = {{NET_ROWS, 3}, {NET_ROWS, 2}};
    pk_context context;
    memset(&context, 0, sizeof context);
    memset(m, 0, sizeof *m);
    assert_ok(&context,
              pk_network_parse(&context, "input 3; dense 4; tanh; dense 3; relu; dense 2", &m->graph));
    assert_ok(&context, pk_optimizer_parse(&context, "sgd momentum=0.9", &m->optimizer));
    m->P = m->graph.parameters;
    m->w = fixture_normals(1, m->P, 0.5);
    m->v = fixture_normals(2, m->P, 1);
    m->x = fixture_normals(3, NET_ROWS * 3, 1);
    m->u = fixture_normals(4, NET_ROWS * 2, 1);
    m->many = FIXTURE_NEW(pk_real, 2 * NET_ROWS * (m->P + 2 * NET_ROWS));
    m->losses = FIXTURE_NEW(double, NET_ROWS);
    for (size_t i = 0; i < NET_ROWS; i++)
        m->items[i] = (int64_t)i;
    m->data.inputs = pk_array_view(REAL_TYPE, 2, shapes[0], m->x);
    m->data.targets = pk_array_view(REAL_TYPE, 2, shapes[1], m->u);
    m->batch.count = NET_ROWS;
    m->batch.items = m->items;
    snprintf(m->made, sizeof m->made, "%s/made", fixture_folder);
    snprintf(m->npy, sizeof m->npy, "%s/a.npy", fixture_folder);
    snprintf(m->csv, sizeof m->csv, "%s/a.csv", fixture_folder);
    snprintf(m->images, sizeof m->images, "%s/images", fixture_folder);
    snprintf(m->labels, sizeof m->labels, "%s/labels", fixture_folder);
    snprintf(m->run_path, sizeof m->run_path, "%s/run", fixture_folder);
    snprintf(m->kept_path, sizeof m->kept_path, "%s/kept", fixture_folder);
    assert_ok(&context, pk_array_write(&context, m->npy, REAL_TYPE, 2, shapes[0], m->x));
    write_bytes(m->csv, "a,b,c\n1,2,3\n4,5,6\n", 18);
    write_bytes(m->images, images, sizeof images);
    write_bytes(m->labels, labels, sizeof labels);
    assert_ok(&context, train_into(&context, m, m->run_path, NET_STEPS, 0, 0));
    assert_ok(&context, train_into(&context, m, m->kept_path, NET_STEPS, 3, 0));
    assert_ok(&context, pk_run_open(&context, m->run_path, &m->run));
    assert_ok(&context, pk_run_open(&context, m->kept_path, &m->kept));
}

static void test_every_function(void **state)
{
    (void)state;
    material m;
    size_t sites = 0;
    make_material(&m);
    for (int i = 0; i < ENTRIES; i++)
        sites += check(entries[i].names, entries[i].run, &m, entries[i].least);
    print_message("%zu allocations refused, one at a time\n", sites);
    pk_run_release(NULL, &m.run);
    pk_run_release(NULL, &m.kept);
    pk_graph_release(NULL, &m.graph);
    fixture_clear(m.kept_path);
    free(m.w), free(m.v), free(m.x), free(m.u), free(m.many), free(m.losses);
}

/* Whether the word is one of the list's. */
static int in_list(const char *list, const char *word)
{
    const size_t length = strlen(word);
    for (const char *at = strstr(list, word); at; at = strstr(at + 1, word))
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || !at[length]))
            return 1;
    return 0;
}

/* Finds each PK_API function of a header whose first argument is a context; returns how many there are. */
static size_t look_up(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        fail_msg("%s is not there: run from the source folder", path);
    static char text[1 << 21];
    size_t size = fread(text, 1, sizeof text - 1, file), count = 0;
    assert_true(size > 0 && size < sizeof text - 1);
    text[size] = 0;
    fclose(file);
    for (char *at = strstr(text, "\nPK_API "); at; at = strstr(at + 1, "\nPK_API ")) {
        char *open = strchr(at, '('), *begin = open, name[80];
        if (!open)
            break;
        while (begin[-1] == '_' || (begin[-1] >= 'a' && begin[-1] <= 'z') ||
               (begin[-1] >= '0' && begin[-1] <= '9'))
            begin--;
        if (strncmp(open, "(pk_context *context", 20) != 0)
            continue;
        snprintf(name, sizeof name, "%.*s", (int)(open - begin), begin);
        int found = 0;
        for (int i = 0; i < ENTRIES && !found; i++)
            found = in_list(entries[i].names, name);
        if (!found)
            fail_msg("%s: %s takes a context, and no job of this test calls it", path, name);
        count++;
    }
    return count;
}

static void test_table_is_complete(void **state)
{
    (void)state;
#ifdef PATHKERNEL_TEST_AMALGAM
    const size_t count = look_up("pathkernel.h");
#else
    size_t count = 0;
    char line[200], path[300];
    FILE *modules = fopen("cmake/modules.txt", "r");
    assert_non_null(modules);
    while (fgets(line, sizeof line, modules))
        if (line[0] != '#' && line[0] != '\n') {
            snprintf(path, sizeof path, "include/pathkernel/%.*s.h", (int)strcspn(line, "\n"), line);
            count += look_up(path);
        }
    fclose(modules);
#endif
    assert_true(count > 100); /* declared and defined: the search does find them */
}

/* Sizes that overflow are refused before anything is allocated. */
static void test_overflow(void **state)
{
    (void)state;
    pk_context context;
    fixture_memory memory;
    memset(&context, 0, sizeof context);
    fixture_use(&context, &memory);
    void *pointer = &memory;
    assert_refused(&context, PK_OVERFLOW, "a table",
                   pk_allocate(&context, SIZE_MAX / 4, 8, "a table", &pointer));
    assert_null(pointer);
    assert_int_equal(pk_allocate(&context, SIZE_MAX - 20, 1, "a table", &pointer), PK_OVERFLOW);
    assert_int_equal(memory.allocations, 0);
    pk_run run; /* a shape made up: kept tensors beyond any memory */
    pk_decomposition out;
    pk_decompose_options options;
    bf_run brute;
    const bf_recipe recipe = fixture_recipe(3, 6, 2, 3, 0.1);
    pk_real x[3] = {1, 2, 3};
    memset(&options, 0, sizeof options);
    fixture_make("input 3; dense 2", BF_SQUARED, "sgd", &recipe, &brute);
    fixture_open(&context, &brute, &run);
    options.keep[0] = PK_BY_GROUP | PK_BY_STEP;
    const int64_t groups[6] = {0};
    options.groups = groups;
    options.group_count = SIZE_MAX / 2;
    assert_refused(&context, PK_OVERFLOW, "keep[0]",
                   pk_decompose(&context, &run, pk_matrix_view(x, 1, 3), &options, &out));
    options.group_count = (size_t)1 << 58;
    pk_status status = pk_decompose(&context, &run, pk_matrix_view(x, 1, 3), &options, &out);
    assert_true(status == PK_OVERFLOW || status == PK_MEMORY);
    pk_run_release(&context, &run);
    bf_run_free(&brute);
    assert_int_equal(memory.held, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse),          cmocka_unit_test(test_evaluate),
        cmocka_unit_test(test_decompose),      cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_every_function), cmocka_unit_test(test_table_is_complete),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
