/* The network language: what it builds, what it refuses and in which words; initialisation. */
#include "fixture.h"

static void test_builds(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context,
              pk_network_parse(&context,
                               " input\t64;dense   32 ;\r\n tanh; leaky_relu .25;dense 10 nobias;softplus 2 ",
                               &graph));
    assert_string_equal(graph.text, "input 64; dense 32; tanh; leaky_relu .25; dense 10 nobias; softplus 2");
    assert_int_equal(graph.node_count, 6);
    assert_int_equal(graph.layers, 2);
    assert_int_equal(graph.parameters, 64 * 32 + 32 + 320);
    assert_int_equal(graph.input_width, 64);
    assert_int_equal(graph.output_width, 10);
    assert_int_equal(graph.widest, 64);
    assert_int_equal(graph.degree, -1);
    assert_int_equal(graph.switched, 1);
    const pk_node *second = pk_graph_layer(&graph, 1);
    assert_int_equal(second->weight_offset, 64 * 32 + 32);
    assert_int_equal(second->weight_count, 320);
    assert_int_equal(second->layer, 1);
    assert_true(graph.nodes[3].attributes[0] == 0.25);
    assert_true(graph.nodes[5].attributes[0] == 2);
    /* The text builds the same graph again. */
    pk_graph again;
    memset(&again, 0, sizeof again);
    assert_ok(&context, pk_network_parse(&context, graph.text, &again));
    assert_string_equal(again.text, graph.text);
    assert_int_equal(again.parameters, graph.parameters);
    assert_refused(&context, PK_ARGUMENT, "in use", pk_network_parse(&context, "input 2; dense 1", &again));
    assert_int_equal(again.node_count, 6);
    pk_graph_release(&context, &again);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

static void test_analysis(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int degree, switched;
    } cases[] = {
        {"input 3; dense 2", 1, 0},
        {"input 3; dense 2; dense 2; dense 1", 3, 0},
        {"input 3; dense 4; relu; dense 4; abs; dense 1", 3, 1},
        {"input 3; relu; dense 2", 1, 0}, /* a kink of the data is none of the step */
        {"input 3; tanh; dense 2", 1, 0},
        {"input 3; tanh; dense 2; hard_tanh", 1, 1},
        {"input 3; dense 2; tanh; dense 2", -1, 0},
        {"input 3; dense 2; relu; dense 2; gelu", -1, 1},
        {"input 3; dense 2; identity; dense 2", 2, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        assert_ok(&context, pk_network_parse(&context, cases[i].text, &graph));
        assert_int_equal(graph.degree, cases[i].degree);
        assert_int_equal(graph.switched, cases[i].switched);
        pk_graph_release(&context, &graph);
    }
}

static void test_refuses(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        pk_status status;
        const char *words[3];
    } cases[] = {
        {"", PK_FORMAT, {"layer 1", "no words", ""}},
        {";", PK_FORMAT, {"layer 1", "no words", ""}},
        {"   ", PK_FORMAT, {"layer 1", "", ""}},
        {"dense 3", PK_FORMAT, {"layer 1", "'dense'", "input"}},
        {"input", PK_FORMAT, {"layer 1", "input", ""}},
        {"input 3 4; dense 2", PK_FORMAT, {"layer 1", "input", ""}},
        {"input 0; dense 2", PK_OVERFLOW, {"layer 1", "zero", ""}},
        {"input -3; dense 2", PK_FORMAT, {"layer 1", "'-3'", "shape"}},
        {"input 3x; dense 2", PK_FORMAT, {"layer 1", "'3x'", ""}},
        {"input 3y4; dense 2", PK_FORMAT, {"layer 1", "'3y4'", ""}},
        {"input 3.5; dense 2", PK_FORMAT, {"layer 1", "'3.5'", ""}},
        {"input 1x2x3x4x5; dense 2", PK_FORMAT, {"layer 1", "1x2x3x4x5", ""}},
        {"input 99999999999999999999999; dense 2", PK_OVERFLOW, {"layer 1", "too large", ""}},
        {"input 4294967296x4294967296; dense 2", PK_OVERFLOW, {"layer 1", "too large", ""}},
        {"input 2x2; dense 2", PK_SHAPE, {"2x2 numbers", "flatten", "mean_tokens"}},
        {"input 3; input 3; dense 2", PK_FORMAT, {"layer 2", "'input'", ""}},
        {"input 3; densely 2", PK_FORMAT, {"layer 2", "'densely'", ""}},
        {"input 3; Dense 2", PK_FORMAT, {"layer 2", "'Dense'", ""}},
        {"input 3; dense", PK_FORMAT, {"layer 2", "dense needs", ""}},
        {"input 3; dense 2 bias", PK_FORMAT, {"layer 2", "'bias'", "nobias"}},
        {"input 3; dense 2 nobias nobias", PK_FORMAT, {"layer 2", "'nobias'", ""}},
        {"input 3; dense 0", PK_ARGUMENT, {"layer 2", "from 1 to 1e+09", ""}},
        {"input 3; dense 2.5", PK_ARGUMENT, {"layer 2", "2.5", ""}},
        {"input 3; dense -1", PK_ARGUMENT, {"layer 2", "-1", ""}},
        {"input 3; dense 2k", PK_FORMAT, {"layer 2", "'2k'", ""}},
        {"input 3; dense nan", PK_FORMAT, {"layer 2", "nan", ""}},
        {"input 3; dense inf", PK_FORMAT, {"layer 2", "inf", ""}},
        {"input 3; dense 2; tanh 3", PK_FORMAT, {"layer 3", "'3'", ""}},
        {"input 3; dense 2; leaky_relu 1 2", PK_FORMAT, {"layer 3", "'2'", ""}},
        {"input 3; dense 2; leaky_relu x", PK_FORMAT, {"layer 3", "'x'", ""}},
        {"input 3; dense 2;", PK_FORMAT, {"layer 3", "no words", ""}},
        {"input 3;; dense 2", PK_FORMAT, {"layer 2", "no words", ""}},
        {"input 3; tanh", PK_ARGUMENT, {"no weights", "", ""}},
        {"input 3", PK_ARGUMENT, {"no weights", "", ""}},
        {"input 1000000; dense 1000000000; dense 1000000000; dense 1000000000; dense 1000000000; dense "
         "1000000000",
         PK_OVERFLOW,
         {"layer", "overflow", ""}},
        {"input 3; dense 2 init=hé", PK_FORMAT, {"layer 2", "none of: default he", ""}},
        {"input 3; dense 2 gain=-1", PK_ARGUMENT, {"layer 2", "gain is -1", ""}},
        {"input 3; dense 2 gain=", PK_FORMAT, {"layer 2", "finite number", ""}},
        {"input 3; dense 2 w_std=2", PK_FORMAT, {"layer 2", "belongs to ntk", ""}},
        {"input 3; dense 2 ntk ntk", PK_FORMAT, {"layer 2", "'ntk' comes twice", ""}},
        {"input 3; add", PK_FORMAT, {"layer 2", "'add'", ""}},
        {"input 3; dropout 0.5; dense 2", PK_UNSUPPORTED, {"layer 2", "random network", ""}},
        {"input 3; residual; dense 2", PK_FORMAT, {"layer 2", "'residual'", ""}},
        {"input 3; dense( dense 2 )", PK_FORMAT, {"layer 2", "'dense'", "residual"}},
        {"residual( dense 2 )", PK_FORMAT, {"layer 1", "'residual'", ""}},
        {"input 3; residual( dense 3", PK_FORMAT, {"layer 2", "')'", "missing"}},
        {"input 3; residual( dense 3 | ", PK_FORMAT, {"layer 4", "no words", ""}},
        {"input 3; residual( dense 3 | dense 3 | dense 3 )", PK_FORMAT, {"layer 2", "'|'", ""}},
        {"input 3; residual( dense 3 ) dense 2", PK_FORMAT, {"layer 2", "';' is missing", ""}},
        {"input 3; residual( dense 4 )", PK_SHAPE, {"layer 2", "of 4 and of 3", ""}},
        {"input 3; dense 3 )", PK_FORMAT, {"layer 2", "')' outside", ""}},
        {"input 3; propagate a; dense 2", PK_ARGUMENT, {"layer 2", "no arrays", "'a'"}},
        {"input 3; propagate ../a; dense 2", PK_FORMAT, {"layer 2", "name", ""}},
        {"input 3; fourier 0; dense 2", PK_ARGUMENT, {"layer 2", "frequencies is 0", ""}},
        {"input 3; dense 2; fourier 3", PK_UNSUPPORTED, {"layer 3", "before the first weights", ""}},
        {"input 3; dense 2; position", PK_SHAPE, {"layer 3", "tokens x width", ""}},
        {"input 3; dense 2; select", PK_SHAPE, {"layer 3", "one number a row", ""}},
        {"input 3; a b c d e f g h i j k l m n o p q r s t u v", PK_FORMAT, {"layer 2", "words", ""}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_context context;
        pk_graph graph, zero;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        memset(&zero, 0, sizeof zero);
        pk_status status = pk_network_parse(&context, cases[i].text, &graph);
        if (status != cases[i].status)
            fail_msg("'%s': %s: %s", cases[i].text, pk_status_text(status), pk_message(&context));
        for (int w = 0; w < 3; w++)
            if (!strstr(pk_message(&context), cases[i].words[w]))
                fail_msg("'%s': no '%s' in '%s'", cases[i].text, cases[i].words[w], pk_message(&context));
        assert_memory_equal(&graph, &zero, sizeof zero);
        assert_int_equal(context.memory_used, 0);
        assert_int_equal(pk_network_parse(NULL, cases[i].text, &graph), status); /* no context, no message */
    }
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_refused(&context, PK_ARGUMENT, "no text", pk_network_parse(&context, NULL, &graph));
}

/* Long texts: one word of a megabyte, a megabyte of blanks, very many layers. */
static void test_long(void **state)
{
    (void)state;
    enum { SIZE = 1 << 20 };
    pk_context context;
    pk_graph graph;
    char *text = FIXTURE_NEW(char, SIZE + 100);
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(text, 'a', SIZE);
    assert_refused(&context, PK_FORMAT, "layer 1", pk_network_parse(&context, text, &graph));
    memcpy(text, "input 3; ", 9);
    assert_refused(&context, PK_FORMAT, "layer 2", pk_network_parse(&context, text, &graph));
    memset(text, ' ', SIZE);
    memcpy(text, "input 3; ", 9);
    strcpy(text + SIZE, "dense 2");
    assert_ok(&context, pk_network_parse(&context, text, &graph));
    assert_string_equal(graph.text, "input 3; dense 2");
    pk_graph_release(&context, &graph);
    memset(text, ';', SIZE);
    assert_int_equal(pk_network_parse(&context, text, &graph), PK_FORMAT);
    memset(text, 0, SIZE);
    size_t at = (size_t)sprintf(text, "input 2; dense 2");
    for (int i = 0; i < 20000; i++)
        at += (size_t)sprintf(text + at, "; abs");
    pk_status status = pk_network_parse(&context, text, &graph);
    assert_true(status == PK_FORMAT && strstr(pk_message(&context), "more than 10000 layers"));
    text[16 + 5 * 1000] = 0; /* a thousand are fine */
    assert_ok(&context, pk_network_parse(&context, text, &graph));
    assert_int_equal(graph.node_count, 1002);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    free(text);
}

static void test_initialize(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph, empty;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&empty, 0, sizeof empty);
    assert_ok(&context,
              pk_network_parse(&context, "input 100; dense 50; relu; dense 25 nobias; relu; dense 10", &graph));
    pk_real *w = FIXTURE_NEW(pk_real, graph.parameters), *again = FIXTURE_NEW(pk_real, graph.parameters);
    assert_ok(&context, pk_network_initialize(&context, &graph, 7, w));
    assert_ok(&context, pk_network_initialize(&context, &graph, 7, again));
    assert_memory_equal(w, again, graph.parameters * sizeof *w);
    assert_ok(&context, pk_network_initialize(&context, &graph, 8, again));
    static const double fan_in[3] = {100, 50, 25};
    for (size_t l = 0; l < 3; l++) { /* PyTorch's Linear: uniform in +-1/sqrt(fan in), biases too */
        const pk_node *node = pk_graph_layer(&graph, l);
        const double bound = 1 / sqrt(fan_in[l]);
        double sum = 0, squares = 0, largest = 0;
        size_t same = 0;
        for (size_t i = 0; i < node->weight_count; i++) {
            const double value = w[node->weight_offset + i];
            sum += value;
            squares += value * value;
            largest = fmax(largest, fabs(value));
            same += value == again[node->weight_offset + i];
        }
        const double n = (double)node->weight_count;
        assert_true(largest <= bound && largest > bound * (1 - 20 / n));
        assert_true(fabs(sum / n) < 4 * bound / sqrt(3 * n));
        assert_close(squares / n, bound * bound / 3, 4 * bound * bound * 0.3 / sqrt(n));
        assert_int_equal(same, 0);
    }
    assert_int_equal(pk_network_initialize(&context, &graph, 7, NULL), PK_ARGUMENT);
    assert_int_equal(pk_network_initialize(&context, &empty, 7, w), PK_ARGUMENT);
    free(w), free(again);
    pk_graph_release(&context, &graph);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_builds), cmocka_unit_test(test_analysis),   cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_long),   cmocka_unit_test(test_initialize),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
