/* Allocation failure at every allocation: a status, nothing leaks, and the next call works. */
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
            assert_true(fail_at > least); /* it does allocate through the context */
            assert_true(context.memory_peak > 0);
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
            check(optimizers[o], decompose, &d, 5);
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
        cmocka_unit_test(test_parse),
        cmocka_unit_test(test_evaluate),
        cmocka_unit_test(test_decompose),
        cmocka_unit_test(test_overflow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
