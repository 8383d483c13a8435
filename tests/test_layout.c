/* The table of the structs' fields: what it says is where the compiler put them. */
#include "fixture.h"

static const pk_field *find(const char *type, const char *name)
{
    for (size_t i = 0; pk_layout(i); i++)
        if (strcmp(pk_layout(i)->type, type) == 0 && strcmp(pk_layout(i)->name, name) == 0)
            return pk_layout(i);
    fail_msg("no %s.%s", type, name);
    return NULL;
}

/* A caller that knows nothing but the table fills options and reads results. */
static void test_used(void **state)
{
    (void)state;
    unsigned char context[sizeof(pk_context)] = {0};
    const int threads = 3;
    const size_t limit = 12345;
    assert_int_equal(find("pk_context", "")->size, sizeof context);
    memcpy(context + find("pk_context", "threads")->offset, &threads, sizeof threads);
    memcpy(context + find("pk_context", "memory_limit")->offset, &limit, sizeof limit);
    pk_context read;
    memcpy(&read, context, sizeof read);
    assert_int_equal(read.threads, 3);
    assert_int_equal(read.memory_limit, 12345);

    pk_graph graph;
    memset(&graph, 0, sizeof graph);
    assert_ok(NULL, pk_network_parse(NULL, "input 3x5; flatten; dense 4; tanh; dense 2", &graph));
    size_t parameters, dims[2];
    memcpy(&parameters, (unsigned char *)&graph + find("pk_graph", "parameters")->offset, sizeof parameters);
    memcpy(dims, (unsigned char *)&graph + find("pk_graph", "input_shape.dims")->offset, sizeof dims);
    assert_int_equal(parameters, 15 * 4 + 4 + 4 * 2 + 2);
    assert_int_equal(dims[0], 3);
    assert_int_equal(dims[1], 5);
    pk_graph_release(NULL, &graph);
}

static void test_kinds(void **state)
{
    (void)state;
    assert_int_equal(find("pk_real", "")->size, sizeof(pk_real));
    assert_int_equal(find("pk_decompose_options", "tolerance")->kind, PK_FIELD_FLOAT);
    assert_int_equal(find("pk_context", "threads")->kind, PK_FIELD_SIGNED);
    assert_int_equal(find("pk_matrix", "rows")->kind, PK_FIELD_UNSIGNED);
    assert_int_equal(find("pk_matrix", "data")->kind, PK_FIELD_OTHER);
    assert_int_equal(find("", "PK_BY_LAYER")->offset, PK_BY_LAYER);
}

/* Fields of a type stand behind it, inside of it, and no name stands there twice. */
static void test_whole(void **state)
{
    (void)state;
    size_t count = 0, size = 0;
    const char *type = "";
    for (const pk_field *field; (field = pk_layout(count)) != NULL; count++) {
        if (field->type[0] && !field->name[0]) {
            type = field->type;
            size = field->size;
        }
        if (field->type[0] && field->name[0]) {
            assert_string_equal(field->type, type);
            assert_true(field->size > 0 && field->offset + field->size <= size);
        }
        for (size_t i = 0; i < count; i++)
            assert_false(strcmp(pk_layout(i)->type, field->type) == 0 &&
                         strcmp(pk_layout(i)->name, field->name) == 0);
    }
    assert_true(count > 100);
    assert_null(pk_layout(count));
    assert_null(pk_layout(SIZE_MAX));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_used),
        cmocka_unit_test(test_kinds),
        cmocka_unit_test(test_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
