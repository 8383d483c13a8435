/* Context: allocation, limits, messages, threads, progress; arenas; statuses and version. */
#include "fixture.h"
#ifdef _OPENMP
#include <omp.h>
#endif

static void test_status(void **state)
{
    (void)state;
    const char *seen[PK__STATUS_LAST];
    for (int s = 0; s < PK__STATUS_LAST; s++) {
        seen[s] = pk_status_text((pk_status)s);
        assert_true(strlen(seen[s]) > 3 && strlen(seen[s]) < 80);
        assert_string_not_equal(seen[s], "unknown status");
        for (int before = 0; before < s; before++)
            assert_string_not_equal(seen[s], seen[before]);
    }
    assert_string_equal(pk_status_text(PK__STATUS_LAST), "unknown status");
    assert_string_equal(pk_status_text((pk_status)99), "unknown status");
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", PK_VERSION_MAJOR, PK_VERSION_MINOR, PK_VERSION_PATCH);
    assert_string_equal(version, PK_VERSION);
    assert_string_equal(version, pk_version());
    /* Stored values stay what they are. */
    assert_true(PK_OK == 0 && PK_ARGUMENT == 1 && PK_SHAPE == 2 && PK_NOT_FINITE == 9 && PK_NOT_CLOSED == 10);
}

/* Whatever words a message quotes, it is one line without commands to a terminal. */
static void test_messages(void **state)
{
    (void)state;
    static const char *const texts[] = {"input 2; \x1b[2Jdense 2", "input 2; den\x7fse 2",
                                        "input 2; dense \r2\b", "input 2\x01; dense 2"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        pk_context context;
        pk_graph graph;
        pk_loss loss;
        pk_run run;
        memset(&context, 0, sizeof context);
        for (int way = 0; way < 3; way++) {
            memset(&graph, 0, sizeof graph);
            memset(&run, 0, sizeof run);
            pk_status status = way == 0   ? pk_network_parse(&context, texts[i], &graph)
                               : way == 1 ? pk_loss_parse(&context, texts[i], &loss)
                                          : pk_run_open(&context, texts[i], &run);
            assert_int_not_equal(status, PK_OK);
            assert_true(strlen(pk_message(&context)) > 10);
            for (const char *at = pk_message(&context); *at; at++)
                assert_true((unsigned char)*at >= ' ' && *at != 127);
        }
    }
}

static void test_allocate(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    assert_string_equal(pk_message(&context), "");
    assert_string_equal(pk_message(NULL), "");
    unsigned char *a = NULL, *b = NULL, *none = (unsigned char *)&context;
    assert_ok(&context, pk_allocate(&context, 3, 5, "a", &a));
    assert_true((uintptr_t)a % 64 == 0);
    for (int i = 0; i < 15; i++)
        assert_int_equal(a[i], 0);
    const size_t one = context.memory_used;
    assert_true(one >= 15 && one <= 15 + 192);
    memset(a, 1, 15);
    assert_ok(&context, pk_allocate(&context, 1, 1000, "b", &b));
    assert_int_equal(context.memory_peak, context.memory_used);
    assert_ok(&context, pk_allocate(&context, 0, 8, "nothing", &none));
    assert_null(none);
    none = (unsigned char *)&context;
    assert_ok(&context, pk_allocate(&context, 8, 0, "nothing", &none));
    assert_null(none);
    const size_t both = context.memory_used;
    pk_release(&context, b);
    assert_int_equal(context.memory_used, one);
    assert_int_equal(context.memory_peak, both);
    pk_release(&context, NULL);
    pk_release(&context, a);
    assert_int_equal(context.memory_used, 0);
    assert_int_equal(pk_allocate(NULL, 4, 4, "no context", &a), PK_OK);
    pk_release(NULL, a);
}

static void test_limit(void **state)
{
    (void)state;
    pk_context context;
    void *a = NULL, *b = &a;
    memset(&context, 0, sizeof context);
    context.memory_limit = 1024;
    assert_refused(&context, PK_MEMORY_LIMIT, "the table", pk_allocate(&context, 1, 1025, "the table", &b));
    assert_null(b);
    assert_non_null(strstr(pk_message(&context), "1024"));
    assert_ok(&context, pk_allocate(&context, 1, 512, "a", &a));
    assert_int_equal(pk_allocate(&context, 1, 512, "b", &b), PK_MEMORY_LIMIT);
    context.memory_limit = 100; /* below what is held */
    assert_int_equal(pk_allocate(&context, 1, 1, "b", &b), PK_MEMORY_LIMIT);
    context.memory_limit = 0;
    assert_ok(&context, pk_allocate(&context, 1, 4096, "b", &b));
    pk_release(&context, a);
    pk_release(&context, b);
    assert_int_equal(context.memory_used, 0);
    /* The limit is exact: what is used is allowed as a limit. */
    assert_ok(&context, pk_allocate(&context, 7, 100, "a", &a));
    const size_t used = context.memory_used;
    pk_release(&context, a);
    context.memory_limit = used;
    assert_ok(&context, pk_allocate(&context, 7, 100, "a", &a));
    pk_release(&context, a);
    context.memory_limit = used - 1;
    assert_int_equal(pk_allocate(&context, 7, 100, "a", &a), PK_MEMORY_LIMIT);
    assert_null(a);
    static const size_t counts[] = {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 8 + 1, SIZE_MAX - 64};
    context.memory_limit = 0;
    for (int i = 0; i < 4; i++) {
        a = &context;
        assert_refused(&context, PK_OVERFLOW, "big",
                       pk_allocate(&context, counts[i], i == 3 ? 1 : 8, "big", &a));
        assert_null(a);
    }
}

static void test_allocator(void **state)
{
    (void)state;
    pk_context context;
    fixture_memory memory;
    unsigned char *a = NULL, *b = NULL;
    memset(&context, 0, sizeof context);
    fixture_use(&context, &memory);
    memory.fail_at = 2;
    assert_ok(&context, pk_allocate(&context, 10, 10, "a", &a));
    for (int i = 0; i < 100; i++)
        assert_int_equal(a[i], 0); /* zeroed, whatever the allocator gave */
    assert_int_equal(memory.held, context.memory_used);
    assert_refused(&context, PK_MEMORY, "no memory", pk_allocate(&context, 10, 10, "b", &b));
    assert_null(b);
    assert_int_equal(memory.held, context.memory_used);
    pk_release(&context, a);
    assert_int_equal(memory.held, 0);
}

static void test_arena(void **state)
{
    (void)state;
    pk__arena measure = {NULL, 0, 0, 0};
    assert_null(pk__arena_take(&measure, 3, 5));
    assert_null(pk__arena_take(&measure, 100, 8));
    assert_null(pk__arena_take(&measure, 0, 8));
    assert_int_equal(measure.used, 64 + 832);
    assert_false(measure.overflow);
    unsigned char *memory = NULL;
    assert_ok(NULL, pk_allocate(NULL, measure.used, 1, "an arena", &memory));
    pk__arena arena = {memory, measure.used, 0, 0};
    unsigned char *a = (unsigned char *)pk__arena_take(&arena, 3, 5),
                  *b = (unsigned char *)pk__arena_take(&arena, 100, 8);
    assert_ptr_equal(a, memory);
    assert_ptr_equal(b, memory + 64);
    assert_null(pk__arena_take(&arena, 0, 8));
    assert_false(arena.overflow);
    assert_null(pk__arena_take(&arena, 1, 1)); /* full */
    assert_true(arena.overflow);
    pk_release(NULL, memory);
    static const size_t big[] = {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 8 + 1};
    for (int i = 0; i < 3; i++) {
        pk__arena over = {NULL, 0, 0, 0};
        assert_null(pk__arena_take(&over, big[i], 8));
        assert_true(over.overflow);
    }
    pk__arena sum = {NULL, 0, 0, 0};
    for (int i = 0; i < 5; i++)
        (void)pk__arena_take(&sum, SIZE_MAX / 4, 1);
    assert_true(sum.overflow);
}

static void test_threads(void **state)
{
    (void)state;
    pk_context context;
    memset(&context, 0, sizeof context);
    assert_true(pk_threads(NULL) >= 1);
    assert_int_equal(pk_threads(&context), pk_threads(NULL));
    context.threads = 3;
    assert_int_equal(pk_threads(&context), 3);
    context.threads = -2;
    assert_true(pk_threads(&context) >= 1);
#ifdef _OPENMP
    context.threads = 0;
    assert_int_equal(pk_threads(&context), omp_get_max_threads());
    int inside = 0;
#pragma omp parallel num_threads(2)
    {
#pragma omp single
        inside = pk_threads(&context);
    }
    assert_int_equal(inside, 1);
#endif
}

/* The loop that measures and takes: memory for all pieces, none for none, and what it says where there is not enough. */
static void test_arena_twice(void **state)
{
    (void)state;
    const size_t counts[] = {0, 7, 100, SIZE_MAX / 4};
    for (int c = 0; c < 4; c++)
        for (int limited = 0; limited < 2; limited++) {
            pk_context context;
            memset(&context, 0, sizeof context);
            context.memory_limit = limited ? 64 : 0;
            pk__arena arena = {NULL, 0, 0, 0};
            pk_status status;
            int runs = 0;
            double *first, *second;
            do {
                first = (double *)pk__arena_take(&arena, counts[c], sizeof *first);
                second = (double *)pk__arena_take(&arena, counts[c], sizeof *second);
                runs++;
            } while (pk__arena_again(&context, &arena, "two pieces", &status));
            const pk_status expected = c == 3 ? PK_OVERFLOW : c && limited ? PK_MEMORY_LIMIT : PK_OK;
            assert_int_equal(status, expected);
            assert_int_equal(runs, c && !status ? 2 : 1);
            assert_true((first != NULL) == (c && !status) && (second != NULL) == (c && !status));
            if (first)
                assert_true((unsigned char *)first == arena.base && second >= first + counts[c]);
            if (status)
                assert_non_null(strstr(pk_message(&context), "two pieces"));
            pk_release(&context, arena.base);
            assert_int_equal(context.memory_used, 0);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status),  cmocka_unit_test(test_messages),    cmocka_unit_test(test_allocate),
        cmocka_unit_test(test_limit),   cmocka_unit_test(test_allocator),   cmocka_unit_test(test_arena),
        cmocka_unit_test(test_threads), cmocka_unit_test(test_arena_twice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
