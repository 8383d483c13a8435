/* Threads of 64 KiB, and 16 KiB for the C library: everything from a line of text to a decomposition and the kernels runs on
 * such a stack. How much of it was written to is measured, and printed. */
#define _GNU_SOURCE
#include "fixture.h"
#include <pthread.h>

enum { EXAMPLES = 24, ROWS = 4, STEPS = 3, STACK = (1 << 16) + (1 << 14), ROOM = 1 << 20, MARK = 0x5a };

typedef struct task {
    const char *network, *optimizer;
    int threads, bounds;
    char message[PK_MESSAGE_SIZE + 80];
} task;

/* Notes what failed, and where: cmocka's own checks do not belong into another thread. */
static int failed(task *t, pk_context *context, const char *what, pk_status status)
{
    if (status)
        snprintf(t->message, sizeof t->message, "%s: %.500s", what, pk_message(context));
    return status != PK_OK;
}

static void decompose(task *t, pk_context *context, const pk_run *run, pk_real *x)
{
    pk_decompose_options how;
    pk_decomposition out;
    memset(&how, 0, sizeof how);
    memset(&out, 0, sizeof out);
    how.keep[0] = 0;
    how.bounds = t->bounds;
    if (!failed(t, context, "decompose",
                pk_decompose(context, run, pk_matrix_view(x, ROWS, run->graph.input_width), &how, &out)))
        pk_decomposition_release(context, &out);
}

static void *flow(void *user)
{
    task *t = (task *)user;
    pk_context context;
    pk_graph graph;
    pk_run run;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&run, 0, sizeof run);
    context.threads = t->threads;
    if (failed(t, &context, "parse", pk_network_parse(&context, t->network, &graph)))
        return NULL;
    const size_t P = graph.parameters, D = graph.input_width, C = graph.output_width;
    pk_real *x = (pk_real *)malloc(EXAMPLES * D * sizeof *x), *w = (pk_real *)malloc(P * sizeof *w),
            *product = (pk_real *)malloc(P * sizeof *w),
            *gram = (pk_real *)malloc(EXAMPLES * C * EXAMPLES * C * sizeof *x);
    int64_t labels[EXAMPLES], items[EXAMPLES];
    for (size_t i = 0; i < EXAMPLES * D; i++)
        x[i] = (pk_real)((double)(i * 7919 % 1009) / 500 - 1);
    for (size_t i = 0; i < EXAMPLES; i++)
        labels[i] = (int64_t)(i % C), items[i] = (int64_t)i;
    const size_t shape_x[2] = {EXAMPLES, D}, shape_y[1] = {EXAMPLES};
    const pk_dataset data = {pk_array_view(REAL_TYPE, 2, shape_x, x),
                             pk_array_view(PK_INT64, 1, shape_y, labels)};
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.steps = STEPS;
    options.batch_size = EXAMPLES / 2;
    options.schedule.rate = 0.01;
    options.record = fixture_run_path;
    options.replace = 1;
    const pk_batch batch = {EXAMPLES, items, NULL};
    const pk_matrix all = pk_matrix_view(x, EXAMPLES, D), none = pk_matrix_view(NULL, 0, 0);
    if (!failed(t, &context, "optimizer", pk_optimizer_parse(&context, t->optimizer, &options.optimizer)) &&
        !failed(t, &context, "initialize", pk_network_initialize(&context, &graph, 1, w)) &&
        !failed(t, &context, "train", pk_train(&context, &graph, &data, &options, w, NULL)) &&
        !failed(t, &context, "open", pk_run_open(&context, fixture_run_path, &run))) {
        decompose(t, &context, &run, x);
        pk_run_release(&context, &run);
    }
    if (!t->message[0])
        failed(t, &context, "ntk",
               pk_kernel_ntk(&context, &graph, w, all, none, pk_matrix_view(gram, EXAMPLES * C, EXAMPLES * C)));
    if (!t->message[0])
        failed(t, &context, "hessian",
               pk_hessian_product(&context, &graph, PK_SOFTMAX_CROSS_ENTROPY, w, &data, &batch, w, product));
    if (!t->message[0]) /* and products of matrices as large as blocks have them */
        failed(t, &context, "product",
               pk_matrix_multiply(&context, 2, all, 1, all, 0, 0, pk_matrix_view((pk_real *)gram, 0, 0)) ==
                       PK_SHAPE
                   ? PK_OK
                   : PK_ARGUMENT);
    free(x), free(w), free(product), free(gram);
    pk_graph_release(&context, &graph);
    if (!t->message[0] && context.memory_used)
        snprintf(t->message, sizeof t->message, "%zu bytes are left", context.memory_used);
    return NULL;
}

/* Bytes of the stack that the flow wrote to. */
static size_t run_on(task *t, unsigned char *memory, size_t size)
{
    pthread_attr_t attributes;
    pthread_t thread;
    memset(memory, MARK, size);
    assert_int_equal(pthread_attr_init(&attributes), 0);
    assert_int_equal(pthread_attr_setstack(&attributes, memory, size), 0);
    assert_int_equal(pthread_create(&thread, &attributes, flow, t), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(pthread_attr_destroy(&attributes), 0);
    size_t low = 0;
    while (low < size && memory[low] == MARK)
        low++;
    return size - low;
}

static void test_flows(void **state)
{
    (void)state;
    static char deep[4096];
    static const struct {
        const char *network, *optimizer;
        int bounds;
    } flows[] = {
        {"input 20; dense 128; relu; dense 300; relu; dense 10", "sgd", 0},
        {"input 300; dense 70; tanh; dense 11", "adam", 1},
        {"input 1x12x12; conv 9 3x3 pad=1; relu; max_pool 2; conv 5 3x3 groups=1; tanh; flatten; dense 10",
         "sgd momentum=0.9", 0},
        {"input 6x20; residual( layer_norm; attention 4 ); residual( dense 40; gelu; dense 20 ); mean_tokens; "
         "dense 4",
         "adamw", 0},
        {"input 9; dense 257; relu; dense 257 nobias; relu; dense 257", "sgd", 0},
        {deep, "sgd", 0},
    };
    strcpy(deep, "input 4; dense 4");
    for (int i = 0; i < 32; i++)
        strcat(deep, "; residual( dense 4; relu");
    for (int i = 0; i < 32; i++)
        strcat(deep, " )");
    unsigned char *taken = (unsigned char *)fixture_take(ROOM + 4096, 1);
    unsigned char *memory = taken + 4096 - (uintptr_t)taken % 4096;
    size_t most = 0;
#if !defined(__OPTIMIZE__) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    const int judged = 0;
#elif defined(__has_feature)
    const int judged = !__has_feature(address_sanitizer) && !__has_feature(memory_sanitizer) &&
                       !__has_feature(thread_sanitizer) && !__has_feature(undefined_behavior_sanitizer);
#else
    const int judged = 1;
#endif
    if (!judged)
        print_message("not judged: frames of this build are not those of a release\n");
    for (size_t i = 0; i < sizeof flows / sizeof *flows; i++)
        for (int threads = 1; threads <= 2; threads++) {
            task t = {flows[i].network, flows[i].optimizer, threads, flows[i].bounds, ""};
            size_t used = run_on(&t, memory, ROOM);
            if (t.message[0])
                fail_msg("%.60s: %s", flows[i].network, t.message);
            print_message("%zu bytes of stack: %.60s, %d threads\n", used, flows[i].network, threads);
            most = used > most ? used : most;
            if (judged && used > STACK)
                fail_msg("%.60s: %zu bytes of stack", flows[i].network, used);
        }
    print_message("%zu bytes of stack at most\n", most);
    free(taken);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_flows)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
