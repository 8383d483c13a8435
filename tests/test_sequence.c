/* Tokens: embedding, attention and what makes one vector of them, against PyTorch, naive forms and
 * differences. */
#include "graph_checks.h"

/* ---- PyTorch ---------------------------------------------------------------------------------------- */

/* PyTorch 2.15, float64: outputs for two rows of tokens, and of the gradient of each parameter two weighted sums, in
 * the order of parameters_to_vector. Made by python3 sequence_constants.py, which reads
 *   import torch
 *   from torch import nn, sin
 *   from torch.nn.utils import parameters_to_vector as vector, vector_to_parameters
 *   torch.set_default_dtype(torch.float64)
 *   def wave(a, *shape): return sin(a * torch.arange(torch.Size(shape).numel()) + 1).reshape(shape)
 *   def numbers(t): return '{' + ', '.join(map(repr, t.flatten().tolist())) + '}'
 *   def mask(x): return torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
 *   class Attention(nn.Module):
 *       def __init__(self, width, heads, causal, bias=True):
 *           super().__init__()
 *           self.core, self.causal = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True), causal
 *       def forward(self, x):
 *           return self.core(x, x, x, need_weights=False, attn_mask=mask(x) if self.causal else None)[0]
 *   class Residual(nn.Sequential):
 *       def forward(self, x): return x + super().forward(x)
 *   class Position(nn.Module):
 *       def __init__(self, *shape):
 *           super().__init__()
 *           self.weight = nn.Parameter(torch.zeros(shape))
 *       def forward(self, x): return x + self.weight
 *   class Token(nn.Module):
 *       def forward(self, x): return x[:, -1]
 *   def case(text, net, x):
 *       P = vector(net.parameters()).numel()
 *       vector_to_parameters(.8 * wave(.3, P), net.parameters())
 *       y = net(x)
 *       (y * wave(1.3, *y.shape)).sum().backward()
 *       g = [p.grad.flatten() for p in net.parameters()]
 *       checks = [(p * wave(a, *p.shape)).sum() for p in g for a in (.9, 2.3)]
 *       print('{"%s", %d,\n %s,\n %d, %s},' % (text, P, numbers(y), len(checks), numbers(torch.stack(checks))))
 *   tokens = torch.tensor([[4, 0, 4], [1, 2, 3]])
 *   E, F = nn.Embedding, nn.Flatten()
 *   case('input 3; embedding 5 2; flatten', nn.Sequential(E(5, 2), F), tokens)
 *   case('input 3; embedding 5 4; attention 2; flatten', nn.Sequential(E(5, 4), Attention(4, 2, 0), F), tokens)
 *   case('input 3; embedding 5 4; attention 1 causal nobias; flatten', nn.Sequential(E(5, 4), Attention(4, 1, 1, 0), F), tokens)
 *   case('input 3; embedding 5 4; position; residual( layer_norm; attention 2 causal ); '
 *        'residual( layer_norm; dense 6; gelu; dense 4 ); layer_norm; token -1; dense 5; log_softmax',
 *        nn.Sequential(E(5, 4), Position(3, 4), Residual(nn.LayerNorm(4), Attention(4, 2, 1)),
 *                      Residual(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), nn.LayerNorm(4), Token(),
 *                      nn.Linear(4, 5), nn.LogSoftmax(-1)), tokens)
 */
static const struct {
    const char *network;
    size_t parameters;
    double outputs[24];
    size_t sums;
    double gradient[36];
} torch_cases[] = {
    {"input 3; embedding 5 2; flatten",
     10,
     {-0.204432881621465, -0.4238689127267944, 0.6731767878463173, 0.7708465483337544, -0.204432881621465,
      -0.4238689127267944, 0.7996588824332042, 0.7570400701499316, 0.6467971230556722, 0.47877771528316526,
      0.2679905201247241, 0.03326452994663239},
     2,
     {1.7481476577902142, 0.6939657594824593}},
    {"input 3; embedding 5 4; attention 2; flatten",
     100,
     {-0.7031906809476193, -2.2950728542977874, -1.8782013754716078, 0.12748947764994856, -0.9478113324011299,
      -3.130833495889391,  -2.2392694227523315, 0.70157850558971,    -0.7031906809476193, -2.2950728542977874,
      -1.8782013754716074, 0.12748947764994845, -2.0029451177516018, -3.435194913242289,  -1.4047110768845217,
      1.6107572993194612,  -1.2313677471271482, -1.524869381479349,  -0.7918459074908251, 0.14458466071345566,
      -1.2894233710187584, -1.2403724698271,    -0.527610959475499,  0.051582913895395155},
     10,
     {-7.0694757550836504, -1.0676412107708182, -3.5513480117535083, 1.5833865031083052, -0.42978269527397983,
      0.7508560604660576, -0.21934042434896805, 0.38324501513459064, 0.2882698906357724, 0.09406935147338696}},
    {"input 3; embedding 5 4; attention 1 causal nobias; flatten",
     84,
     {0.09845652084075804,  -0.20049237324025784, -0.2437564531548362,  0.02383829123148843,
      -0.5659664230344088,  -0.453823752628362,   0.23707331117322644,  0.6256344579945199,
      -0.3628612479040915,  -0.37638375051685646, 0.09009010658649738,  0.44167344796334984,
      -0.9023917309541907,  -0.2270945103771242,  0.737812817285721,    0.7617989017686448,
      -0.06212890550045691, 0.1767352233703276,   0.19021166285526764,  -0.03888588131531014,
      0.5462886835935957,   0.4140764430091423,   -0.24620106345263243, -0.59250217201407},
     6,
     {6.843285574679237, -1.535440479149793, -2.229298801871055, 0.15182995262502608, -0.006769938866745706,
      0.11811896338871852}},
    {"input 3; embedding 5 4; position; residual( layer_norm; attention 2 causal ); residual( layer_norm; "
     "dense 6; gelu; dense 4 ); layer_norm; token -1; dense 5; log_softmax",
     219,
     {-2.2281164903756223, -4.893147614318652, -4.376557756099602, -1.6060056372443965, -0.3982191034305807,
      -1.8951914156633507, -4.524613841658083, -4.27994547062657, -1.7420677687021269, -0.4309825061871732},
     36,
     {1.9563493121307514,   1.1206589324577927,   2.846092981392661,    1.5084145655318566,
      -0.3610115930459193,  0.2026562235729794,   -0.37322962015371464, 0.10696067301548873,
      0.27624923729322604,  -0.12489148102582509, -0.36405175222363806, 0.5008448185124192,
      0.8289791894936938,   0.1271509188092037,   0.7741105222952749,   -1.0319277192265925,
      -2.5803080112414327,  2.6659266503225343,   1.903874017309537,    1.165365856089235,
      0.055119212768363735, 0.15169871650621125,  -1.468350904923515,   -0.7228417062616194,
      -0.33919773122528185, 2.7912746501217343,   1.1026758148067863,   -0.7012636133263707,
      -1.7167021488494267,  0.3997139228071358,   1.0921065032574375,   -0.8723007338435558,
      -0.19773627755294365, -0.31933693784817224, 3.4765928710157086,   0.059726233680426954}},
};

static const pk_real torch_tokens[6] = {4, 0, 4, 1, 2, 3};

static double wave(double frequency, size_t i)
{
    return sin(frequency * (double)i + 1);
}

/* The numbers of the node's parameters in PyTorch, which has weight and bias apart; returns how many. */
static size_t torch_parameters(const pk_node *node, size_t *counts)
{
    counts[0] = node->weight_count;
    counts[1] = 0;
    if (node->tangent_form == PK_TANGENT_OUTER)
        counts[0] = node->fan_in * node->fan_out;
    else if (strcmp(node->operation->name, "affine") == 0)
        counts[0] = node->weight_count / 2;
    counts[1] = node->weight_count - counts[0];
    return counts[1] ? 2 : 1;
}

static void test_torch(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof torch_cases / sizeof *torch_cases; i++) {
        holder h;
        hold(&h, torch_cases[i].network, 2, 1);
        const size_t P = h.graph.parameters, C = h.graph.output_width;
        pk_real w[256], gradient[256] = {0};
        size_t at = 0;
        assert_int_equal(P, torch_cases[i].parameters);
        for (size_t p = 0; p < P; p++)
            w[p] = 0.8 * wave(0.3, p);
        const pk__line line = {w, NULL, NULL};
        pk__pass_forward(&h.tape, &line, 2, torch_tokens);
        for (size_t k = 0; k < 2 * C; k++) {
            assert_close(pk__pass_output(&h.tape)[k], torch_cases[i].outputs[k], ROUNDING(1e-13));
            pk__pass_seed(&h.tape)[k] = wave(1.3, k);
        }
        pk__pass_reverse(&h.tape, &line, 2, 1);
        pk__pass_weight_gradient(&h.tape, 2, gradient);
        for (size_t l = 0; l < h.graph.layers; l++) {
            const pk_node *node = pk_graph_layer(&h.graph, l);
            size_t counts[2], offset = node->weight_offset;
            const size_t parts = torch_parameters(node, counts);
            for (size_t part = 0; part < parts; offset += counts[part++]) {
                double sums[2] = {0, 0};
                for (size_t p = 0; p < counts[part]; p++) {
                    sums[0] += gradient[offset + p] * wave(0.9, p);
                    sums[1] += gradient[offset + p] * wave(2.3, p);
                }
                assert_true(at + 2 <= torch_cases[i].sums);
                assert_close(sums[0], torch_cases[i].gradient[at++], ROUNDING(1e-12));
                assert_close(sums[1], torch_cases[i].gradient[at++], ROUNDING(1e-12));
            }
        }
        assert_int_equal(at, torch_cases[i].sums);
        drop(&h);
    }
}

/* ---- naive forms ------------------------------------------------------------------------------------ */

/* Adds an operation to an input of this shape, with up to three attributes. */
static const pk_node *one_node(holder *h, const char *name, int rank, size_t tokens, size_t width, double first,
                               double second, double third)
{
    pk_shape shape;
    const int zero = 0;
    double attributes[PK_NODE_ATTRIBUTES] = {first, second, third};
    memset(h, 0, sizeof *h);
    memset(&shape, 0, sizeof shape);
    shape.rank = rank;
    shape.dims[0] = tokens;
    shape.dims[1] = width;
    assert_ok(&h->context, pk_graph_input(&h->context, &h->graph, &shape));
    assert_ok(&h->context,
              pk_graph_add(&h->context, &h->graph, pk_operation_find(name), 1, &zero, attributes, NULL));
    return &h->graph.nodes[1];
}

static void evaluate(holder *h, const pk_real *w, const pk_real *x, size_t rows, pk_real *y)
{
    assert_ok(&h->context, pk_graph_evaluate(&h->context, &h->graph, w,
                                             pk_matrix_view((pk_real *)x, rows, h->graph.input_width),
                                             pk_matrix_view(y, rows, h->graph.output_width)));
}

static void naive_attend(size_t T, size_t E, size_t heads, int causal, int shared, const pk_real *x, bf_real *y)
{
    const size_t W = shared ? E : 3 * E, d = E / heads, key = shared ? 0 : E, value = 2 * key;
    bf_real *p = BF_NEW(bf_real, T);
    for (size_t head = 0; head < heads; head++)
        for (size_t i = 0; i < T; i++) {
            const size_t seen = causal ? i + 1 : T;
            bf_real sum = 0;
            for (size_t j = 0; j < seen; j++) {
                p[j] = 0;
                for (size_t k = 0; k < d; k++)
                    p[j] += (bf_real)x[i * W + head * d + k] * (bf_real)x[j * W + key + head * d + k];
                p[j] = expl(p[j] / sqrtl((bf_real)d));
                sum += p[j];
            }
            for (size_t k = 0; k < d; k++) {
                y[i * E + head * d + k] = 0;
                for (size_t j = 0; j < seen; j++)
                    y[i * E + head * d + k] += p[j] / sum * (bf_real)x[j * W + value + head * d + k];
            }
        }
    free(p);
}

static void test_naive(void **state)
{
    (void)state;
    enum { ROWS = 3 };
    /* The last one's products go through the library's. */
    static const size_t sizes[][3] = {{1, 1, 1}, {3, 4, 2}, {4, 6, 1}, {2, 15, 5}, {3, 32, 2}, {33, 20, 2}};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int causal = 0; causal < 2; causal++)
            for (int shared = 0; shared < 2; shared++) {
                const size_t T = sizes[s][0], E = sizes[s][1], heads = sizes[s][2], W = shared ? E : 3 * E;
                pk_real *x = fixture_normals(s, ROWS * T * W, 1), *y = FIXTURE_NEW(pk_real, ROWS * T * E);
                bf_real *expected = BF_NEW(bf_real, T * E);
                holder h;
                const pk_node *node = one_node(&h, "attend", 2, T, W, (double)heads, causal, shared);
                assert_true(node->shape.rank == 2 && node->shape.dims[0] == T && node->shape.dims[1] == E);
                evaluate(&h, x, x, ROWS, y);
                for (size_t row = 0; row < ROWS; row++) {
                    naive_attend(T, E, heads, causal, shared, x + row * T * W, expected);
                    for (size_t i = 0; i < T * E; i++)
                        assert_close(y[row * T * E + i], (double)expected[i], ROUNDING(1e-14));
                }
                free(x), free(y), free(expected);
                drop(&h);
            }
    /* The others choose numbers. */
    pk_real x[2 * 12], y[2 * 12], w[20];
    holder h;
    for (size_t i = 0; i < 24; i++)
        x[i] = wave(0.7, i);
    for (int index = -4; index < 4; index++) {
        const pk_node *node = one_node(&h, "token", 2, 4, 3, index, 0, 0);
        assert_true(node->shape.rank == 1 && node->width == 3);
        evaluate(&h, x, x, 2, y);
        for (size_t row = 0; row < 2; row++)
            assert_memory_equal(y + 3 * row, x + 12 * row + 3 * ((index + 4) % 4), 3 * sizeof *y);
        drop(&h);
    }
    (void)one_node(&h, "mean_tokens", 2, 4, 3, 0, 0, 0);
    evaluate(&h, x, x, 2, y);
    for (size_t i = 0; i < 6; i++) {
        const pk_real *from = x + i / 3 * 12 + i % 3;
        assert_close(y[i], (from[0] + from[3] + from[6] + from[9]) / 4, ROUNDING(1e-15));
    }
    drop(&h);
    const pk_node *node = one_node(&h, "embedding", 1, 3, 1, 5, 4, 0);
    assert_true(node->shape.rank == 2 && node->shape.dims[0] == 3 && node->shape.dims[1] == 4 &&
                node->weight_count == 20);
    for (size_t i = 0; i < 20; i++)
        w[i] = wave(0.3, i);
    evaluate(&h, w, torch_tokens, 2, y);
    for (size_t i = 0; i < 6; i++)
        assert_memory_equal(y + 4 * i, w + 4 * (size_t)torch_tokens[i], 4 * sizeof *y);
    drop(&h);
}

/* ---- derivatives ------------------------------------------------------------------------------------ */

static void check_tokens(const char *network, const pk_real *tokens, uint64_t seed)
{
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, network, &graph));
    check_graph_at(&context, &graph, seed, tokens);
    pk_graph_release(&context, &graph);
}

static void test_rules(void **state)
{
    (void)state;
    static const char *const values[] = {
        "input 3x2; dense 4; token 0",
        "input 3x2; dense 4; token -2; dense 2",
        "input 3x2; dense 4; mean_tokens",
        "input 1x2; dense 4; residual( mean_tokens; dense 4 | token -1 )",
        /* one branch adds to what the other wrote */
        "input 3x2; dense 4; residual( attend 2 shared | attend 1 causal shared ); token 1",
        "input 3x2; dense 6; residual( attend 1 | attend 2 causal; tanh ); flatten; dense 2",
        "input 1x2; dense 9; attend 3; mean_tokens; dense 2",
        "input 4x2; attention 2; mean_tokens; dense 3",
        "input 4x2; attention 1 causal shared nobias; token -1; dense 3",
        /* large enough for the library's products */
        "input 21x2; dense 60; attend 1; mean_tokens; dense 3",
        "input 21x2; dense 20; attend 1 causal shared; mean_tokens; dense 3",
    };
    static const pk_real tokens[9] = {4, 0, 4, 1, 2, 3, 0, 0, 0};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        check_network_text(values[i], 300 + i);
    check_tokens("input 3; embedding 5 2; flatten", tokens, 1);
    check_tokens("input 3; embedding 5 4; mean_tokens; dense 3; tanh", tokens, 2);
    check_tokens(torch_cases[3].network, tokens, 3);
    check_tokens("input 3; embedding 7 8; position; residual( attention 2 nobias shared ); "
                 "residual( dense 16; gelu; dense 8 ); token -1; dense 7",
                 tokens, 4);
}

/* What a token is given does not depend on those behind it. */
static void test_causal(void **state)
{
    (void)state;
    enum { T = 5, E = 4 };
    for (int shared = 0; shared < 2; shared++)
        for (size_t changed = 0; changed < T; changed++) {
            const size_t W = shared ? E : 3 * E;
            pk_real x[T * 3 * E], y[T * E], z[T * E];
            holder h;
            (void)one_node(&h, "attend", 2, T, W, 2, 1, shared);
            for (size_t i = 0; i < T * W; i++)
                x[i] = wave(0.7, i);
            evaluate(&h, x, x, 1, y);
            for (size_t i = 0; i < W; i++)
                x[changed * W + i] = (pk_real)(i % 2 ? EITHER(1e200, 1e30) : -EITHER(1e200, 1e30));
            evaluate(&h, x, x, 1, z);
            assert_memory_equal(y, z, changed * E * sizeof *y);
            drop(&h);
        }
}

/* ---- starting weights, arguments -------------------------------------------------------------------- */

static void test_initialize(void **state)
{
    (void)state;
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, "input 3; embedding 100 50; flatten", &graph));
    pk_real *w = FIXTURE_NEW(pk_real, 5000), sum = 0, square = 0, fourth = 0;
    assert_ok(&context, pk_network_initialize(&context, &graph, 1, w));
    for (size_t i = 0; i < 5000; i++) {
        sum += w[i];
        square += w[i] * w[i];
        fourth += w[i] * w[i] * w[i] * w[i];
    }
    assert_close(sum / 5000, 0, 0.05); /* normal: 0, 1, 3, four deviations apart at most */
    assert_close(square / 5000, 1, 0.08);
    assert_close(fourth / 5000, 3, 0.56);
    free(w);
    pk_graph_release(&context, &graph);
}

static void refused(const char *network, pk_status status, const char *words)
{
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_refused(&context, status, words, pk_network_parse(&context, network, &graph));
    assert_int_equal(context.memory_used, 0);
}

static void test_arguments(void **state)
{
    (void)state;
    refused("input 3; embedding 5", PK_FORMAT, "embedding needs its width");
    refused("input 3; embedding 0 2", PK_ARGUMENT, "embedding: number of tokens is 0");
    refused("input 3; embedding 2.5 2", PK_ARGUMENT, "whole number");
    refused("input 3x2; embedding 5 2", PK_SHAPE,
            "embedding takes the data, a row of whole numbers such as 'input 3'");
    refused("input 3; dense 3; embedding 5 2", PK_SHAPE, "not 3 values behind other layers");
    refused("input 3; token 0", PK_SHAPE, "token needs values of tokens x width, not 3");
    refused("input 3x2; token", PK_FORMAT, "token needs its number");
    refused("input 3x2; token 3", PK_SHAPE, "token 3: there are 3 tokens");
    refused("input 3x2; token -4", PK_SHAPE, "token -4: there are 3 tokens");
    refused("input 3x2; token 0.5", PK_ARGUMENT, "whole number");
    refused("input 3x2x1; mean_tokens", PK_SHAPE, "mean_tokens needs values of tokens x width, not 3x2x1");
    refused("input 6; attend 1", PK_SHAPE, "attend needs values of tokens x width, not 6");
    refused("input 3x4; attend 1", PK_SHAPE,
            "a width of 4 for queries, keys and values cannot be split into 1 heads");
    refused("input 3x6; attend 4", PK_SHAPE,
            "a width of 6 for queries, keys and values cannot be split into 4 heads");
    refused("input 3x6; attend 4 shared", PK_SHAPE, "a width of 6 cannot be split into 4 heads");
    refused("input 3x6; attend 0", PK_ARGUMENT, "number of heads is 0");
    refused("input 3x4; attention 3", PK_SHAPE, "cannot be split into 3 heads");

    /* Tokens that are none are refused; and a rule that meets one reads no other memory. */
    static const pk_real wrong[][3] = {
        {0, 5, 1}, {0, 0, -1}, {0.5, 0, 0}, {(pk_real)EITHER(1e300, 1e30), 0, 0}, {0, NAN, 0}};
    static const char *const words[] = {"row 1, number 1: embedding takes whole numbers from 0 to 4, not 5",
                                        "row 1, number 2", "not 0.5", EITHER("not 1e+300", "not 1e+30"),
                                        "row 1, number 1"};
    for (size_t i = 0; i < 5; i++) {
        holder h;
        pk_real x[6] = {4, 0, 1}, y[12], w[10], expected[6];
        hold(&h, "input 3; embedding 5 2; flatten", 2, 1);
        memcpy(x + 3, wrong[i], sizeof wrong[i]);
        for (size_t p = 0; p < 10; p++)
            w[p] = wave(0.3, p);
        assert_refused(
            &h.context, PK_ARGUMENT, words[i],
            pk_graph_evaluate(&h.context, &h.graph, w, pk_matrix_view(x, 2, 3), pk_matrix_view(y, 2, 6)));
        const pk__line line = {w, NULL, NULL};
        pk__pass_forward(&h.tape, &line, 2, x);
        for (size_t k = 0; k < 3; k++) {
            const size_t token = wrong[i][k] >= 0 && wrong[i][k] < 5 ? (size_t)wrong[i][k] : 0;
            memcpy(expected + 2 * k, w + 2 * token, 2 * sizeof *w);
        }
        assert_memory_equal(pk__pass_output(&h.tape) + 6, expected, sizeof expected);
        drop(&h);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torch),  cmocka_unit_test(test_naive),      cmocka_unit_test(test_rules),
        cmocka_unit_test(test_causal), cmocka_unit_test(test_initialize), cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
