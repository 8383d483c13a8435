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

/* The names of the layers: each is known to the parser, and none is listed twice. */
static void test_layers(void **state)
{
    static const char *const some[] = {"dense",      "relu",      "leaky_relu", "conv",
                                       "layer_norm", "attention", "residual"};
    int found[sizeof some / sizeof *some] = {0};
    const char *name;
    (void)state;
    for (size_t i = 0; (name = pk_network_layer(i)) != NULL; i++) {
        pk_context context;
        pk_graph graph;
        char text[100];
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        snprintf(text, sizeof text, "input 4; %s", name);
        if (pk_network_parse(&context, text, &graph) != PK_OK && strstr(pk_message(&context), "is not a layer"))
            fail_msg("%s: %s", text, pk_message(&context));
        pk_graph_release(&context, &graph);
        for (size_t k = 0; k < i; k++)
            assert_string_not_equal(name, pk_network_layer(k));
        for (size_t k = 0; k < sizeof some / sizeof *some; k++)
            found[k] += strcmp(some[k], name) == 0;
        assert_string_not_equal(name, "view"); /* what the language builds only as a part of its layers */
    }
    for (size_t k = 0; k < sizeof some / sizeof *some; k++)
        assert_int_equal(found[k], 1);
    assert_null(pk_network_layer(1000));
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
        {"input 3; dense 2; relu6; dense 2; hard_sigmoid; dense 2", 3, 1},
        {"input 3; dense 2; prelu; dense 2", 3, 1},
        {"input 3; dense 2; elu; dense 2", -1, 1},
        {"input 3; elu; dense 2", 1, 0},
        {"input 3; above; dense 2", 1, 0},
        {"input 3x2; dense 4; max 0; dense 2; min 0", 2, 1},
        {"input 3x2; max 1; dense 2", 1, 0}, /* of data */
        {"input 3; as x; dense 3; divide x; dense 2", 2, 0},
        {"input 3; as x; dense 3; as y; from x; divide y; dense 2", -1, 0},
        {"input 3; dense 2; hardswish; dense 2", -1, 1},
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

/* What people write at first, and the words that a sentence must have to tell them what to do. */
static void test_sentences(void **state)
{
    (void)state;
    static const struct {
        const char *text, *words[2];
    } cases[] = {
        /* separators */
        {"input 5, dense 5, tanh", {"layer 1", "layers are separated by ';'"}},
        {"input 5,dense 5", {"layer 1", "layers are separated by ';'"}},
        {"input 5 dense 5 tanh", {"'dense' stands behind", "layers are separated by ';'"}},
        {"input 5\ndense 5", {"'dense' stands behind", "layers are separated by ';'"}},
        {"input 5 -> dense 5", {"'->'", "layers are separated by ';'"}},
        {"input 5 | dense 5", {"'|' outside", "layers are separated by ';'"}},
        {"input 5: dense 5", {"'dense' stands behind", "layers are separated by ';'"}},
        {"input 5; dense 5, tanh; dense 2", {"layer 2", "layers are separated by ';'"}},
        {"input 5; dense 5 tanh; dense 2", {"'tanh' is not an option of dense", "separated by ';'"}},
        {"input 5; dense 5 -> tanh; dense 2", {"'->' is not an option of dense", "separated by ';'"}},
        {"input 5; dense tanh", {"dense: outputs: 'tanh'", "separated by ';'"}},
        {"input 5; dense 5; tanh,", {"layer 3: 'tanh,'", "separated by ';'"}},
        {"input 5; dense 5; tanh dense 2", {"layer 3: 'dense'", "separated by ';'"}},
        {"input 4x4; position dense 3; flatten", {"'dense' is not an option of position", "separated"}},
        {"input 5; a b c d e f g h i j k l m n o p q", {"more than 16 words behind 'a'", "separated"}},
        {"input 5;; dense 5", {"layer 2: no words", "between ';' and ';'"}},
        {"input 5; dense 5;", {"layer 3: no words", "between ';' and the end of the text"}},
        {"; input 5", {"layer 1: no words", "between the start of the text and ';'"}},
        /* input */
        {"input", {"the shape of an example", "'input 64'"}},
        {"dense 5; tanh", {"starts with 'input'", "not with 'dense'"}},
        {"Input 5; dense 5", {"starts with 'input'", "not with 'Input'"}},
        {"input=5; dense 5", {"starts with 'input'", "not with 'input=5'"}},
        {"input 28 28; flatten; dense 2", {"one shape", "'28' stands behind"}},
        {"input 1,28,28; flatten; dense 2", {"'1,28,28'", "written with x"}},
        {"input (1,28,28); flatten; dense 2", {"'input' has no parentheses", "blanks"}},
        {"input 1x2x3x4x5; dense 2", {"'1x2x3x4x5'", "more than 4 dimensions"}},
        {"input 0; dense 2", {"a dimension of zero", "at least 1"}},
        {"input 3x0x3; flatten; dense 2", {"a dimension of zero", "at least 1"}},
        {"input 5X5; dense 2", {"'5X5'", "such as 64 or 1x28x28"}},
        {"input 5; input 5; dense 2", {"layer 2: 'input' is the first layer", ""}},
        /* names */
        {"input 5; dens 5", {"'dens' is not a layer", "is it 'dense'?"}},
        {"input 5; Dense 5", {"'Dense' is not a layer", "is it 'dense'?"}},
        {"input 5; linear 5", {"'linear' is not a layer", "is it 'dense'?"}},
        {"input 5; Linear 5", {"'Linear' is not a layer", "is it 'dense'?"}},
        {"input 5; dense 2; ReLU", {"'ReLU' is not a layer", "is it 'relu'?"}},
        {"input 5; dense 2; laekyrelu", {"'laekyrelu' is not a layer", "docs/network-language.md"}},
        {"input 1x5x5; maxpool 2; flatten; dense 2", {"'maxpool'", "is it 'max_pool'?"}},
        {"input 1x5x5; conv2d 2 3; flatten; dense 2", {"'conv2d'", "is it 'conv'?"}},
        {"input 5; layernorm; dense 2", {"'layernorm'", "is it 'layer_norm'?"}},
        {"input 5; batchnorm; dense 2", {"'batchnorm'", "is it 'batch_norm'?"}},
        {"input 5; quantum 3; dense 2",
         {"'quantum' is not a layer that is known;", "docs/network-language.md"}},
        {"input 5; add; dense 2", {"add needs the name of a value", "layer 2"}},
        {"input 5; add y; dense 2", {"no value before it has the name 'y'", "'as NAME'"}},
        {"input 5; as y; dense 3; add y; dense 2", {"values of 3 and of 5 ('y') do not fit", "layer 4"}},
        {"input 5; as y; dense 3; as y; dense 2", {"the name 'y' already", "layer 4"}},
        {"input 5; as input; dense 2", {"'input' is the name of the network's inputs", "layer 2"}},
        {"input 5; as; dense 2", {"as needs a name", "layer 2"}},
        {"input 5; as a b; dense 2", {"'b' stands behind that", "layer 2"}},
        {"input 5; from z; dense 2", {"no value before it has the name 'z'", "layer 2"}},
        {"input 5; dense 5 name=z; from z; dense 2", {"no value before it has the name 'z'", "layer 3"}},
        {"input 5; as z; dense 5 tied=z; dense 2", {"no layer before it says name=z", "layer 3"}},
        {"input 3x4; as a; matmul a; flatten; dense 2", {"3x4 and of 3x4 cannot be multiplied", "layer 3"}},
        {"input 3x4; as a; matmul a transposed; flatten; dense 2", {"transposed", "layer 3"}},
        {"input 3x4; as a; matmul a flip; flatten; dense 2", {"possible is 'transpose'", "layer 3"}},
        {"input 4; as a; matmul a transpose; dense 2", {"cannot be multiplied", "layer 3"}},
        {"input 5; dense 4; above; dense 2", {"above compares data", "layer 3"}},
        {"input 5; dense 4; max; dense 2", {"max needs an axis", "layer 3"}},
        {"input 5; dense 4; max 1; dense 2", {"values of 4 have no axis 1", "layer 3"}},
        {"input 5; dense 4; min 0 1; dense 2", {"'1' stands behind that", "layer 3"}},
        {"input 5; dense 4; min -1; dense 2", {"'-1' is not a whole number", "layer 3"}},
        {"input 5; dense 4; divide y; dense 2", {"no value before it has the name 'y'", "layer 3"}},
        {"input 5; dense 4; gather; dense 2", {"gather needs the name of an array", "layer 3"}},
        {"input 5; embedding 4 2 padding=4; flatten; dense 2", {"padding is 4", "4 tokens"}},
        {"input 5; embedding 4 2 offset=4; flatten; dense 2", {"offset 4", "4 tokens"}},
        {"input 5; embedding 4 2 first=5; flatten; dense 2", {"a row of data has 5 numbers", "layer 2"}},
        {"input 5; embedding 4 2 first=3 count=3; flatten; dense 2", {"tokens 3 to 5", "layer 2"}},
        {"input 3x4; slice 2 0 1; flatten; dense 2", {"3x4 have no axis 2", "layer 2"}},
        {"input 3x4; slice 1 2 3; flatten; dense 2", {"3 numbers from 2 on", "axis 1 of 3x4"}},
        {"input 3x4; slice 1 -1 3; flatten; dense 2", {"'-1' is not a whole number", "layer 2"}},
        {"input 3x4; slice 1 1 0; flatten; dense 2", {"0 numbers from 1 on", "layer 2"}},
        {"input 3x4; slice 1; flatten; dense 2", {"an axis, the first index and how many", "layer 2"}},
        {"input 3x4; permute 0 0; flatten; dense 2", {"every axis of 3x4 has to come once", "layer 2"}},
        {"input 3x4; permute 1; flatten; dense 2", {"every axis once", "layer 2"}},
        {"input 3x4; reshape 5x2; dense 2; flatten", {"5x2 holds 10 numbers, and 3x4 has 12", "layer 2"}},
        {"input 3x4; reshape 0x2; dense 2; flatten", {"a dimension of 0", "layer 2"}},
        {"input 3x4; as a; concat 0 a b; flatten; dense 2", {"the name 'b'", "layer 3"}},
        {"input 3x4; dense 5; concat 0 input; flatten; dense 2",
         {"3x5 and of 3x4 do not fit along axis 0", ""}},
        {"input 3x4; concat 2 input; flatten; dense 2", {"no axis 2", "layer 2"}},
        {"input 3x4; sum 2; flatten; dense 2", {"no axis 2", "layer 2"}},
        {"input 3; view; dense 2", {"'view' is not a layer", ""}},
        /* numbers */
        {"input 5; dense", {"dense needs its outputs", "number"}},
        {"input 5; dense five", {"dense: outputs: 'five'", "finite number"}},
        {"input 5; dense -3", {"outputs is -3", "from 1"}},
        {"input 5; dense 1e30", {"outputs is 1e+30", "to 1e+09"}},
        {"input 5; scale; dense 2", {"scale needs its factor", "number"}},
        {"input 5; leaky_relu -1; dense 2", {"number is -1", "above 0"}},
        {"input 5; elu -1; dense 2", {"elu: number is -1", "above 0"}},
        {"input 4x3x3; group_norm 3; flatten; dense 2",
         {"normalize: 3 groups do not divide its 4 channels", ""}},
        {"input 4x3x3; group_norm; flatten; dense 2",
         {"group_norm needs its number of groups", "behind a blank"}},
        {"input 4x3x3; group_norm 0; flatten; dense 2", {"group_norm: number of groups is 0", "from 1"}},
        {"input 4; group_norm 4; dense 2", {"each of its 4 groups has one number", ""}},
        {"input 4; instance_norm; dense 2",
         {"instance_norm needs channels of several numbers each", "vector of 4"}},
        {"input 4x1; instance_norm; flatten; dense 2", {"each of its 4 groups has one number", ""}},
        {"input 5; dense 4; prelu 3; dense 2",
         {"prelu: 3 slopes for 4 channels", "one slope, or one for each"}},
        {"input 5; dense 4; prelu 0; dense 2", {"number of slopes is 0", "from 1"}},
        {"input 5; dense 4; gelu erf; dense 2", {"'erf' is not an option of gelu", "possible are 'tanh'"}},
        {"input 5; dense 4; softmin 1; dense 2", {"'1' is not an option of softmin", "layer 3"}},
        {"input 5; layer_norm epsilon=-1; dense 2", {"epsilon is -1", "from 0 on"}},
        {"input 1x5x5; conv 3; flatten; dense 2", {"conv needs its kernel", "3x3"}},
        {"input 1x5x5; conv 3x3; flatten; dense 2", {"conv: channels: '3x3'", "finite number"}},
        {"input 1x5x5; conv 3 3,3; flatten; dense 2", {"'3,3'", "written with x"}},
        {"input 1x5x5; conv 3 3x3x3; flatten; dense 2", {"conv: kernel: '3x3x3'", "pair"}},
        {"input 1x5x5; conv 3 3 pad=same; flatten; dense 2", {"conv: pad: 'same'", "finite number"}},
        {"input 1x5x5; max_pool 2 pad=2; flatten; dense 2", {"padding of 2x2", "kernel, 2x2"}},
        /* options */
        {"input 5; dense 5 6", {"'6' is not an option of dense", "'nobias'"}},
        {"input 5; dense outputs=5", {"'outputs=5' is not an option of dense", "'nobias'"}},
        {"input 5; dense 5 nobias=1", {"'nobias=1'", "without a value"}},
        {"input 5; dense 5 init", {"'init'", "init=1"}},
        {"input 5; dense 5 init=xavier", {"dense: init: 'xavier'", "glorot"}},
        {"input 5; dense 5 gain=", {"dense: gain: ''", "finite number"}},
        {"input 5; dense 5 ntk w_std=0", {"w_std is 0", "above 0"}},
        {"input 1x5x5; conv 3 3 stride 2; flatten; dense 2", {"'stride'", "stride=1"}},
        {"input 1x5x5; conv 3 3 stride = 2; flatten; dense 2", {"'stride'", "without blanks"}},
        {"input 1x5x5; conv 3 3 padding=1; flatten; dense 2", {"'padding=1'", "'pad='"}},
        {"input 5; tanh 3; dense 2", {"'3' is not an option of tanh", ""}},
        {"input 5; embedding 5 3; attention 2; flatten; dense 2", {"a width of 3", "2 heads"}},
        /* parentheses */
        {"input 5; dense(5)", {"'dense' has no parentheses", "'dense 10'"}},
        {"input 5; skip( dense 5 )", {"'skip' has no parentheses", "'residual'"}},
        {"input 5; residual dense 5", {"'residual' has its layers in parentheses", "residual( BODY )"}},
        {"input 5; residual( dense 5", {"')' of a residual is missing", ""}},
        {"input 5; residual( dense 5 ))", {"')' outside of a residual", "no '('"}},
        {"input 5; residual( )", {"no words", "between '(' and ')'"}},
        {"input 5; residual( dense 5 | )", {"no words", "between '|' and ')'"}},
        {"input 5; ( dense 5 )", {"no words", "between ';' and '('"}},
        {"input 5; residual( dense 5 | dense 5 | dense 5 )", {"second '|'", "two branches"}},
        {"input 5; residual( dense 5 ) tanh", {"'tanh' behind the ')'", "a ';' is missing"}},
        {"input 5; residual( dense 4 ); dense 2", {"of 4 and of 5", "input, which is the shortcut"}},
        {"input 5; residual( dense 4 | dense 3 ); dense 2", {"of 4 and of 3", "its shortcut the second"}},
        {"input 4; residual( residual( dense 3 ) ); dense 2", {"network, layer 3: residual", "of 3 and of 4"}},
        /* the end */
        {"input 1x5x5; conv 3 3", {"3x3x3 numbers, not a vector", "'flatten'"}},
        {"input 5; tanh", {"no weights", "trained"}},
    };
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_true(pk_network_parse(&context, cases[i].text, &graph) != PK_OK);
        for (int w = 0; w < 2; w++)
            if (!strstr(pk_message(&context), cases[i].words[w]))
                fail_msg("'%s': no '%s' in '%s'", cases[i].text, cases[i].words[w], pk_message(&context));
        assert_int_equal(graph.node_count, 0);
        assert_int_equal(context.memory_used, 0);
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
        {"input 3; add", PK_FORMAT, {"layer 2", "add needs", ""}},
        {"input 3; dropout 0.5; dense 2", PK_UNSUPPORTED, {"layer 2", "random network", ""}},
        {"input 2x2x2; batch_norm; flatten; dense 2",
         PK_FORMAT,
         {"layer 2", "means and variances", "training mode"}},
        {"input 2x2x2; batch_norm epsilon=1; flatten; dense 2",
         PK_FORMAT,
         {"layer 2", "means and variances", ""}},
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

/* Standard deviations of weights, whether biases are drawn, the largest weight where it is bounded. */
static void test_initial_kinds(void **state)
{
    (void)state;
    static const struct {
        const char *options;
        double deviation, largest; /* largest: of deviation; 0: unbounded */
        int biases;
    } kinds[] = {
        {"", 0.057735026918962576, 1.7320508075688772, 1},
        {"gain=2", 0.11547005383792515, 1.7320508075688772, 1},
        {"init=he", 0.14142135623730950, 0, 0},
        {"init=he_uniform", 0.14142135623730950, 1.7320508075688772, 0},
        {"init=glorot gain=3", 0.3, 0, 0},
        {"init=glorot_uniform", 0.1, 1.7320508075688772, 0},
        {"init=lecun", 0.1, 0, 0},
        {"init=lecun_uniform", 0.1, 1.7320508075688772, 0},
        {"init=normal gain=0.02", 0.02, 0, 0},
        {"init=zero", 0, 0, 0},
        {"ntk", 1, 0, 1},
    };
    enum { IN = 100, OUT = 100 };
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        pk_context context;
        pk_graph graph;
        char text[100];
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        snprintf(text, sizeof text, "input %d; dense %d %s", IN, OUT, kinds[k].options);
        assert_ok(&context, pk_network_parse(&context, text, &graph));
        pk_real *w = FIXTURE_NEW(pk_real, graph.parameters);
        assert_int_equal(graph.parameters, IN * OUT + OUT);
        assert_ok(&context, pk_network_initialize(&context, &graph, 3, w));
        double squares = 0, largest = 0, biases = 0;
        for (size_t i = 0; i < IN * OUT; i++) {
            squares += (double)w[i] * w[i];
            largest = fmax(largest, fabs(w[i]));
        }
        for (size_t j = 0; j < OUT; j++)
            biases += fabs(w[IN * OUT + j]);
        assert_close(sqrt(squares / (IN * OUT)), kinds[k].deviation, 0.03 * kinds[k].deviation);
        assert_int_equal(biases > 0, kinds[k].biases);
        if (kinds[k].largest > 0)
            assert_true(largest <= kinds[k].largest * kinds[k].deviation * (1 + 1e-15) &&
                        largest > 0.99 * kinds[k].largest * kinds[k].deviation);
        free(w);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

/* The NTK parameterisation is a dense layer whose input and output are scaled. */
static void test_ntk(void **state)
{
    (void)state;
    pk_context context;
    pk_graph ntk, plain;
    memset(&context, 0, sizeof context);
    memset(&ntk, 0, sizeof ntk);
    memset(&plain, 0, sizeof plain);
    assert_ok(&context,
              pk_network_parse(&context,
                               "input 2x3x3; conv 3 2x2 ntk w_std=1.5 b_std=0.5; flatten; dense 2 ntk", &ntk));
    assert_ok(&context, pk_network_parse(&context, "input 2x3x3; conv 3 2x2; flatten; dense 2", &plain));
    assert_int_equal(ntk.parameters, plain.parameters);
    const size_t conv = 3 * 2 * 4;
    pk_real *w = fixture_normals(5, ntk.parameters, 1), *v = FIXTURE_NEW(pk_real, ntk.parameters);
    pk_real *x = fixture_normals(6, 18, 1), f[2], g[2];
    for (size_t i = 0; i < ntk.parameters; i++)
        v[i] = w[i] * (i < conv                 ? 1.5 / sqrt(8.0)
                       : i < conv + 3           ? 0.5
                       : i < ntk.parameters - 2 ? 1 / sqrt(12.0)
                                                : 1);
    assert_ok(&context,
              pk_graph_evaluate(&context, &ntk, w, pk_matrix_view(x, 1, 18), pk_matrix_view(f, 1, 2)));
    assert_ok(&context,
              pk_graph_evaluate(&context, &plain, v, pk_matrix_view(x, 1, 18), pk_matrix_view(g, 1, 2)));
    for (int c = 0; c < 2; c++)
        assert_close(f[c], g[c], ROUNDING(1e-14));
    free(w), free(v), free(x);
    pk_graph_release(&context, &ntk);
    pk_graph_release(&context, &plain);
}

/* Branches: what they build, in which order their weights come, and that the canonical text says the same. */
static void test_branches(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&again, 0, sizeof again);
    assert_ok(&context,
              pk_network_parse(
                  &context,
                  "input 3;dense 4;residual(dense 5 nobias;relu;residual(dense 5);dense 6|dense 6 nobias) ;"
                  "residual( tanh );dense 2",
                  &graph));
    assert_string_equal(graph.text,
                        "input 3; dense 4; residual( dense 5 nobias; relu; residual( dense 5 ); dense 6 | "
                        "dense 6 nobias ); residual( tanh ); dense 2");
    static const size_t counts[] = {3 * 4 + 4, 4 * 5, 5 * 5 + 5, 5 * 6 + 6, 4 * 6, 6 * 2 + 2};
    assert_int_equal(graph.layers, 6);
    for (size_t l = 0; l < 6; l++)
        assert_int_equal(pk_graph_layer(&graph, l)->weight_count, counts[l]);
    assert_ok(&context, pk_network_parse(&context, graph.text, &again));
    assert_string_equal(again.text, graph.text);
    assert_int_equal(again.node_count, graph.node_count);
    pk_graph_release(&context, &graph);
    pk_graph_release(&context, &again);
    /* Nested too deep. */
    char deep[1000] = "input 3; dense 3";
    for (int i = 0; i < 40; i++)
        strcat(deep, "; residual( dense 3");
    assert_refused(&context, PK_FORMAT, "32 deep", pk_network_parse(&context, deep, &graph));
    assert_int_equal(context.memory_used, 0);
}

typedef struct loader {
    size_t loads, rows, columns;
    double *numbers;
} loader;

static pk_status load_counted(void *user, pk_context *context, const char *name, pk_array *array)
{
    loader *l = (loader *)user;
    const size_t shape[2] = {l->rows, l->columns};
    (void)context, (void)name;
    l->loads++;
    *array = pk_array_view(PK_FLOAT64, 2, shape, l->numbers);
    return PK_OK;
}

/* Places are whole numbers from -1 on that the value has, as many as the result has numbers. */
static void test_gather(void **state)
{
    (void)state;
    static double good[6] = {0, 4, -1, 2, 2, 1}, past[6] = {0, 5, -1, 2, 2, 1}, low[6] = {0, 4, -2, 2, 2, 1},
                  half[6] = {0, 4, 0.5, 2, 2, 1};
    static double *const arrays[] = {good, past, low, half};
    static const char *const words[] = {NULL, "place 1 is 5; the value has the places 0 to 4", "place 2 is -2",
                                        "place 2 is 0.5"};
    for (int i = 0; i < 4; i++) {
        loader l = {0, 3, 2, arrays[i]};
        const pk_constants constants = {load_counted, &l};
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        const char *text = "input 5; gather places; dense 2; flatten";
        if (words[i]) {
            assert_refused(&context, PK_ARGUMENT, words[i],
                           pk_network_parse_with(&context, text, &constants, &graph));
            continue;
        }
        assert_ok(&context, pk_network_parse_with(&context, text, &constants, &graph));
        pk_real x[5] = {1, 2, 3, 4, 5}, w[6] = {1, 0, 0, 1, 0, 0}, y[6];
        const double wanted[6] = {1, 5, 0, 3, 3, 2};
        assert_ok(&context,
                  pk_graph_evaluate(&context, &graph, w, pk_matrix_view(x, 1, 5), pk_matrix_view(y, 1, 6)));
        for (int k = 0; k < 6; k++)
            assert_true(y[k] == (pk_real)wanted[k]);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

/* Appends a piece some times. */
static void append(char *text, const char *piece, int times)
{
    char *at = text + strlen(text);
    for (int i = 0; i < times; i++, at += strlen(piece))
        strcpy(at, piece);
}

/* Lines of a few words whose sizes are large take neither memory nor time: what grows with the sizes is counted in closed
 * form, or refused before it is made. Where the pairs of the first one were counted one by one it took minutes, which the
 * tests' time limit would end. */
static void test_large_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *start, *piece, *end;
        int times;
        pk_status status;
        const char *words;
    } cases[] = {
        {"input 1x6000x6000", "; max_pool 3x1 stride=1x1 pad=1x0", "; flatten; dense 1", 1900, PK_OK, ""},
        {"input 1x1x1000000", "; max_pool 1x3 stride=1 pad=0x1", "; flatten; dense 1", 1900, PK_OK, ""},
        {"input 1x100000x100000", "; conv 1 3x3 pad=1", "; flatten; dense 1", 3000, PK_OK, ""},
        {"input 1000", "; fourier 100000", "; dense 1", 1, PK_OVERFLOW, "1e+08 numbers"},
        {"input 1000", "; fourier 100", "; dense 1", 3000, PK_OVERFLOW, "at most 524288"},
        {"input 100000000", "; residual( fourier 1 | fourier 1 )", "; dense 1", 1, PK_OVERFLOW,
         "at most 524288"},
        {"input 2; dense 2", "; abs", "", 9998, PK_OK, ""},
        {"input 2; dense 2", "; residual( abs )", "", 3500, PK_OK, ""},
        {"input 100000", "; embedding 1000000000 1000000000; flatten", "; dense 1", 1, PK_OVERFLOW, ""},
        {"input 1000000x64", "; attention 8", "; flatten; dense 1", 3000, PK_OK, ""},
        {"input 1000000x64", "; position", "; flatten; dense 1", 3000, PK_OK, ""},
        {"input 1000000000", "; layer_norm", "; dense 1", 3000, PK_OK, ""},
        {"input 1000000000", "; dense 1000000", "", 1, PK_OK, ""},
    };
    enum { MOST = 1 << 25 };
    char *text = FIXTURE_NEW(char, 1 << 18);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        context.memory_limit = MOST;
        strcpy(text, cases[i].start);
        append(text, cases[i].piece, cases[i].times);
        append(text, cases[i].end, 1);
        const pk_status status = pk_network_parse(&context, text, &graph);
        if (status != cases[i].status || (status && !strstr(pk_message(&context), cases[i].words)))
            fail_msg("%.80s: %s: %s", text, pk_status_text(status), pk_message(&context));
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
    free(text);
}

/* An array that many layers name is loaded, kept and checked once. */
static void test_shared_arrays(void **state)
{
    (void)state;
    static const char *const pieces[] = {"; batch_norm a", "; propagate a; residual( propagate a )",
                                         "; constant a; dense 3"};
    enum { TIMES = 1000, CHANNELS = 20000 };
    char *text = FIXTURE_NEW(char, 1 << 18);
    for (int kind = 0; kind < 3; kind++) {
        pk_context context;
        pk_graph graph, again;
        loader l = {0, kind ? CHANNELS : 2, kind == 1 ? 3 : kind ? 2 : CHANNELS, NULL};
        pk_array array;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        memset(&again, 0, sizeof again);
        l.numbers = FIXTURE_NEW(double, l.rows *l.columns);
        for (size_t i = 0; i < l.rows * l.columns; i++)
            l.numbers[i] = kind == 1 ? (double)(i % 3 == 2 ? 7 : i / 3 % 20) : 1 + (double)(i % 5);
        const pk_constants constants = {load_counted, &l};
        strcpy(text, kind ? "input 20x4" : "input 20000");
        append(text, pieces[kind], TIMES);
        append(text, "; flatten; dense 1", 1);
        context.memory_limit = (size_t)1 << 25;
        assert_ok(&context, pk_network_parse_with(&context, text, &constants, &graph));
        assert_int_equal(l.loads, 1);
        const pk_node *node = pk_graph_named(&graph, NULL, &array);
        assert_non_null(node);
        assert_int_equal(array.shape[0], l.rows);
        assert_int_equal(array.shape[1], l.columns);
        assert_null(pk_graph_named(&graph, node, &array));
        const pk_constants own = pk_graph_constants(&graph);
        assert_ok(&context, pk_network_parse_with(&context, graph.text, &own, &again));
        assert_string_equal(again.text, graph.text);
        pk_graph_release(&context, &again);
        pk_graph_release(&context, &graph);
        /* Another shape is checked anew. */
        strcpy(text, kind ? "input 20x4" : "input 20000");
        append(text, pieces[kind], 1);
        append(text,
               kind == 1 ? "; flatten; dense 5; constant a; dense 4; propagate a" : "; flatten; batch_norm a",
               1);
        if (kind == 1) /* 20000 tokens: the array's indices are below 20 */
            assert_refused(&context, PK_SHAPE, "20000x4",
                           pk_network_parse_with(&context, text, &constants, &graph));
        else if (kind == 2)
            assert_refused(&context, PK_SHAPE, "one of means and one of variances",
                           pk_network_parse_with(&context, text, &constants, &graph));
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
        free(l.numbers);
    }
    free(text);
}

/* A text is as long as a run directory can record it, or refused before anything is made of it. */
static void test_longest_text(void **state)
{
    (void)state;
    enum { LONGEST = (1 << 16) - 64 };
    pk_context context;
    pk_graph graph;
    char *text = FIXTURE_NEW(char, 1 << 20);
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    strcpy(text, "input 3; dense 2");
    append(text, "; identity", (LONGEST - (int)strlen(text)) / 10);
    const int left = LONGEST - (int)strlen(text);
    assert_true(left >= 2 && left < 12);
    /* Zeros in front of a number fill up. */
    memmove(text + 6 + left, text + 6, strlen(text + 6) + 1);
    memset(text + 6, '0', (size_t)left);
    assert_int_equal(strlen(text), LONGEST);
    assert_ok(&context, pk_network_parse(&context, text, &graph));
    assert_int_equal(strlen(graph.text), LONGEST);
    pk_graph_release(&context, &graph);
    memmove(text + 7, text + 6, strlen(text + 6) + 1); /* one more */
    assert_refused(&context, PK_FORMAT, "longer than the 65472 characters",
                   pk_network_parse(&context, text, &graph));
    assert_int_equal(context.memory_used, 0);
    /* Blanks in a row count as one. */
    strcpy(text, "input 3;");
    append(text, " ", 900000);
    append(text, "dense 2", 1);
    assert_ok(&context, pk_network_parse(&context, text, &graph));
    assert_string_equal(graph.text, "input 3; dense 2");
    pk_graph_release(&context, &graph);
    free(text);
}

/* Outputs that no weight reaches. */
static void test_constant_outputs(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int refused;
    } cases[] = {
        {"input 4; dense 3; constant a; flatten", 1},
        {"input 4; dense 3; constant a; tanh; flatten", 1},
        {"input 4; dense 3; constant a; token 0", 1},
        {"input 4; dense 3; constant a; residual( tanh | abs ); mean_tokens", 1},
        {"input 4; residual( dense 3; constant a | constant a ); flatten", 1},
        {"input 4; constant a; flatten", 1},
        {"input 4; dense 3; constant a; flatten; dense 2", 0},
        {"input 4; dense 3; constant a; position; flatten", 0},
        {"input 4; dense 3; constant a; residual( dense 2 ); flatten", 0},
    };
    double numbers[6] = {1, 2, 3, 4, 5, 6};
    loader l = {0, 3, 2, numbers};
    const pk_constants constants = {load_counted, &l};
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const pk_status status = pk_network_parse_with(&context, cases[i].text, &constants, &graph);
        if (cases[i].refused ? status != PK_ARGUMENT || !strstr(pk_message(&context), "weights")
                             : status != PK_OK)
            fail_msg("%s: %s: %s", cases[i].text, pk_status_text(status), pk_message(&context));
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_builds),
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_analysis),
        cmocka_unit_test(test_refuses),
        cmocka_unit_test(test_sentences),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_initialize),
        cmocka_unit_test(test_initial_kinds),
        cmocka_unit_test(test_ntk),
        cmocka_unit_test(test_branches),
        cmocka_unit_test(test_large_sizes),
        cmocka_unit_test(test_gather),
        cmocka_unit_test(test_shared_arrays),
        cmocka_unit_test(test_longest_text),
        cmocka_unit_test(test_constant_outputs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
