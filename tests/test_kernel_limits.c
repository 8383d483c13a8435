/* What kernels refuse: for want of memory, where the message names the least number of bytes that would do, and it does; and
 * rows that the network or the loss does not take. */
#include "trained.h"

enum { N = 6, KINDS = 8 };

/* The last number of a message. */
static size_t number_of(const char *message)
{
    const char *at = strstr(message, "the least that would do is ");
    assert_non_null(at);
    return (size_t)strtoull(at + 27, NULL, 10);
}

typedef struct call {
    trained *t;
    pk_kernel_options options;
    int how; /* 0: pk_kernels, 1: pk_kernel_file, 2: pk_kernel_domingos */
    const char *path;
    double numbers[4096];
} call;

static pk_status run_call(call *c, size_t limit)
{
    pk_context *context = &c->t->context;
    double *gram = c->numbers;
    const pk_dataset inputs = {.inputs = c->t->run.train.inputs};
    pk_domingos d;
    memset(&d, 0, sizeof d);
    d.contributions = c->numbers;
    context->memory_limit = limit;
    context->memory_peak = context->memory_used;
    const pk_status status =
        c->how == 2   ? pk_kernel_domingos(context, &c->t->run, &inputs, c->options.quadrature, 0, &d)
        : c->how == 1 ? pk_kernel_file(context, &c->t->run, NULL, NULL, &c->options, c->path, NULL)
                      : pk_kernels(context, &c->t->run, NULL, NULL, 1, &c->options, &gram, NULL);
    assert_true(!limit || context->memory_peak <= limit || status);
    context->memory_limit = 0;
    return status == EITHER(PK_OK, PK_NOT_CLOSED) ? PK_OK
                                                  : status; /* rounding of short pieces in single precision */
}

/* Refused with less than it names, done with what it names, which is not much more than what is taken. */
static void check_call(call *c)
{
    pk_context *context = &c->t->context;
    const size_t held = context->memory_used, first = held + 1000;
    assert_int_equal(run_call(c, first), PK_MEMORY_LIMIT);
    const size_t least = number_of(pk_message(context));
    assert_int_equal(context->memory_used, held);
    const pk_status done = run_call(c, least);
    if (done)
        fail_msg("%zu bytes were said to do: %s", least, pk_message(context));
    assert_int_equal(run_call(c, least - least / 4), PK_MEMORY_LIMIT);
    assert_true(number_of(pk_message(context)) <= least + least / 16);
    assert_int_equal(run_call(c, 0), PK_OK);
    assert_int_equal(context->memory_used, held);
}

static void test_least_memory(void **state)
{
    (void)state;
    static const recipe recipes[] = {
        {"input 3; dense 5; relu; dense 3", "softmax_cross_entropy", "sgd", 0, 0.5, 0, N, 4, 4, 0, 3, 0},
        {"input 3; dense 5; tanh; dense 3", "softmax_cross_entropy", "adam", 0, 0.05, 0, N, 4, 4, 3, 5, 0},
        {"input 3; dense 3 name=a; tanh; dense 3 tied=a; tanh; dense 3", "softmax_cross_entropy", "sgd", 0, 50,
         0, N, 4, 4, 0, 5, 0}};
    char path[300];
    snprintf(path, sizeof path, "%s.npy", fixture_run_path);
    for (int r = 0; r < 3; r++) {
        trained t;
        trained_make(&recipes[r], &t);
        for (int kind = 1; kind <= KINDS; kind++)
            for (int how = 0; how < 3; how++) {
                static call c;
                memset(&c, 0, sizeof c);
                c.t = &t;
                c.how = how;
                c.path = path;
                c.options.kind = (pk_kernel_kind)kind;
                if (kind == PK_KERNEL_NTK || kind == PK_KERNEL_PATH || kind == PK_KERNEL_EPK ||
                    kind == PK_KERNEL_PATH_AVERAGE)
                    c.options.outputs = how ? PK_OUTPUTS_FULL : PK_OUTPUTS_TRACE;
                if (how == 2 && kind > 1)
                    continue;
                c.options.map = how == 0 && kind % 2 ? PK_MAP_COSINE : PK_MAP_NONE;
                c.options.by_layer = how == 1 && kind != PK_KERNEL_CONJUGATE;
                check_call(&c);
            }
        trained_release(&t);
    }
    (void)remove(path);
}

/* Every kernel names the side and the row of what it does not take: conjugate and embedding, which form no gradient, too. */
static void test_bad_rows(void **state)
{
    (void)state;
    static const recipe tokens = {"input 3; embedding 6 4; mean_tokens; dense 3",
                                  "softmax_cross_entropy",
                                  "sgd",
                                  6,
                                  0.1,
                                  0,
                                  N,
                                  4,
                                  2,
                                  0,
                                  3,
                                  0};
    trained t;
    trained_make(&tokens, &t);
    const size_t shape[2] = {N, 3}, length[1] = {N};
    double numbers[N * N], *gram = numbers;
    const pk_dataset rows = {.inputs = pk_array_view(REAL_TYPE, 2, shape, t.test),
                             .targets = pk_array_view(PK_INT64, 1, length, t.labels)};
    static const pk_real bad[] = {6, -1, (pk_real)0.5};
    for (int kind = 1; kind <= KINDS; kind++)
        for (int right = 0; right < 2; right++) {
            pk_kernel_options o;
            memset(&o, 0, sizeof o);
            o.kind = (pk_kernel_kind)kind;
            o.outputs = kind == PK_KERNEL_NTK || kind == PK_KERNEL_PATH || kind == PK_KERNEL_EPK ||
                                kind == PK_KERNEL_PATH_AVERAGE
                            ? PK_OUTPUTS_LABEL
                            : PK_OUTPUTS_NONE;
            char where[64];
            snprintf(where, sizeof where, "%s: %s rows: row 2, number 1", pk_kernel_name(o.kind),
                     right ? "right" : "left");
            const pk_dataset *left = right ? NULL : &rows, *other = right ? &rows : NULL;
            const pk_real was = t.test[7];
            for (int b = 0; b < 3; b++) {
                t.test[7] = bad[b];
                assert_refused(&t.context, PK_ARGUMENT, where,
                               pk_kernels(&t.context, &t.run, left, other, 1, &o, &gram, NULL));
            }
            t.test[7] = was;
            const int64_t label = t.labels[4];
            t.labels[4] = 3;
            snprintf(where, sizeof where, "%s: %s rows: ", pk_kernel_name(o.kind), right ? "right" : "left");
            if (kind != PK_KERNEL_CONJUGATE && kind != PK_KERNEL_EMBEDDING) {
                assert_refused(&t.context, PK_ARGUMENT, where,
                               pk_kernels(&t.context, &t.run, left, other, 1, &o, &gram, NULL));
                assert_non_null(strstr(pk_message(&t.context), "row 4"));
            }
            t.labels[4] = label;
            assert_ok(&t.context, pk_kernels(&t.context, &t.run, left, other, 1, &o, &gram, NULL));
        }
    trained_release(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_least_memory),
        cmocka_unit_test(test_bad_rows),
    };
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
