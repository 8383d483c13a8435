/* Normalisation and softmax: against PyTorch, naive forms in long double, differences, and at the ends of the
 * range. */
#include "graph_checks.h"

/* The array that a test's network names. */
typedef struct statistics {
    size_t rows, columns;
    const double *numbers;
} statistics;

static pk_status load_statistics(void *user, pk_context *context, const char *name, pk_array *array)
{
    const statistics *from = (const statistics *)user;
    const size_t shape[2] = {from->rows, from->columns};
    (void)context;
    assert_string_equal(name, "statistics");
    *array = pk_array_view(PK_FLOAT64, 2, shape, from->numbers);
    return PK_OK;
}

static pk_status parse(pk_context *context, const char *network, const statistics *from, pk_graph *graph)
{
    pk_constants constants;
    constants.load = load_statistics;
    constants.user = (void *)from;
    memset(context, 0, sizeof *context);
    memset(graph, 0, sizeof *graph);
    return pk_network_parse_with(context, network, &constants, graph);
}

static void wave(double frequency, size_t count, pk_real *to)
{
    for (size_t i = 0; i < count; i++)
        to[i] = sin(frequency * (double)i + 1);
}

/* ---- PyTorch ---------------------------------------------------------------------------------------- */

/* PyTorch 2.15, float64: the outputs, then the gradients with respect to the input and the parameters. Made by
 * python3 norm_constants.py, which reads
 *   import torch
 *   from torch import nn, sin
 *   torch.set_default_dtype(torch.float64)
 *   def wave(a, *shape): return sin(a * torch.arange(torch.Size(shape).numel()) + 1).reshape(shape)
 *   def numbers(t): return '{' + ', '.join(map(repr, t.flatten().tolist())) + '}'
 *   def case(text, module, shape):
 *       x = wave(.7, *shape).requires_grad_()
 *       for p in module.parameters(): p.data = wave(.3, *p.shape)
 *       y = module(x[None])[0]
 *       (y * wave(1.3, *y.shape)).sum().backward()
 *       print('{"%s",\n %s,\n %s},' % (text, numbers(y), numbers(torch.cat([t.grad.flatten() for t in [x, *module.parameters()]]))))
 *   frozen = nn.BatchNorm2d(2).eval()
 *   frozen.running_mean, frozen.running_var = torch.tensor([.5, -.25]), torch.tensor([2, .125])
 *   class Scaled(nn.Module):
 *       def forward(self, x): return nn.functional.log_softmax(100 * x, -1)
 *   case('layer_norm', nn.LayerNorm(4), (2, 4))
 *   case('layer_norm dims=3 epsilon=0.125', nn.LayerNorm((2, 3, 1), eps=.125), (2, 3, 1))
 *   case('rms_norm', nn.RMSNorm(4), (2, 4))
 *   case('batch_norm statistics', frozen, (2, 1, 3))
 *   case('softmax', nn.Softmax(-1), (2, 3))
 *   case('scale 100; log_softmax', Scaled(), (2, 3))
 */
static const struct {
    const char *network; /* the first affine's beta gets the input's gradient */
    double outputs[12], gradient[24];
} torch_cases[] = {
    {"input 2x4; affine dims=2; layer_norm; flatten",
     {1.3157417494340629, 1.9066255739039064, 1.1043293246144266, -0.6124034992886337, 1.1961880641012004,
      -0.11820455433734418, 0.27448474435322223, 2.2962247770150443},
     {0.9116850983256608, 0.19846843762795308, -1.4476060384726628, 0.3374525025190511, -0.13945115859159962,
      0.2032193171038914, -0.17480143134087722, 0.11103327282858366, 0.4392449220008551, -0.3232219521878251,
      -0.47067418220889884, 0.7265709036308454, 0.7583815819904001, 1.6837051889514592, 0.14239674959690923,
      -1.6075232615172146}},
    {"input 2x3x1; affine dims=3; layer_norm dims=3 epsilon=0.125; flatten",
     {1.5371129954245135, 1.9357248952228885, 1.6245802399137321, 0.8101811690442877, 0.051187524381888484,
      -0.22764301639171017},
     {0.6720135893488903, 0.6679153664172277, -0.7052683059312593, -1.2257623395190764, -0.10620317473008167,
      0.6973048644142994, 0.695642010616617, 0.7523674164969267, -0.2766961964275065, 0.141319216798713,
      0.07782884653981356, -1.294790424236676, 0.8414709848078965, 0.7457052121767203, -0.44252044329485246,
      -0.9824526126243325, -0.0830894028174964, 0.9379999767747389}},
    {"input 2x4; affine dims=2; rms_norm; flatten",
     {0.9659272395603244, 1.303493801060472, 0.9210486746417615, 0.053676774032929433, -0.6864486815961012,
      -1.2558172850704303, -1.1773820404141688, -0.47171056645489917},
     {0.4474081969878818, 0.3691229064826925, -1.0196365349924055, -1.2938773251996631, -0.5050932928452919,
      0.5470052637480546, 0.18481946935407445, -1.0403121141315994, 1.0337092689450915, -0.21372291352532757,
      -1.0967215045526961, 0.25585704379398994}},
    {"input 2x1x3; affine dims=3; batch_norm statistics; flatten",
     {1.0446490727377995, 1.1340156534167085, 0.945873042706134, 1.7581869570502962, -0.022593258872578764,
      -1.0191397030566942},
     {0.5006822639350856, 0.44370082938281014, -0.26330335969576646, -2.677424168813029, -0.22643898791368172,
      2.5562798407693355, 0.4075250497842506, -2.655280179469207, 1.1446557536897644, -0.12754203866709002}},
    {"input 2x3; affine dims=2; softmax; flatten",
     {0.33232538142620827, 0.38618185256155657, 0.2814927660122352, 0.5315842063423457, 0.27655869125033833,
      0.19185710240731588},
     {0.13240418189361028, 0.11687852833832735, -0.24928271023193768, -0.3280827053025748, 0.07804044559468686,
      0.2500422597078879}},
    {"input 2x3; affine dims=2; scale 100; log_softmax; flatten",
     {-15.019382864487417, -3.0003021429462707e-07, -31.620163290161976, 0.0, -65.34385533760098,
      -101.91107800983879},
     {84.14706413766581, -39.89501980817845, -44.25204432948737, -85.49105739572424, -8.30894028174964,
      93.7999976774739}},
};

static void test_torch(void **state)
{
    (void)state;
    static const double numbers[4] = {0.5, -0.25, 2, 0.125};
    static const statistics frozen = {2, 2, numbers};
    for (size_t i = 0; i < sizeof torch_cases / sizeof *torch_cases; i++) {
        holder h;
        memset(&h, 0, sizeof h);
        assert_ok(&h.context, parse(&h.context, torch_cases[i].network, &frozen, &h.graph));
        hold_graph(&h, 1, 1);
        const size_t in = h.graph.input_width, P = h.graph.parameters, own = P - 2 * in;
        pk_real w[64] = {0}, x[12], gradient[64] = {0};
        assert_ok(&h.context, pk_network_initialize(&h.context, &h.graph, 1, w));
        const pk_node *last = pk_graph_layer(&h.graph, h.graph.layers - 1);
        for (size_t p = 0; p < P; p++) /* gammas start at 1, betas at 0 */
            assert_true(w[p] ==
                        (p < in || (p >= 2 * in && p < 2 * in + own / (last->attributes[PK_AFFINE_BIAS] + 1))));
        for (size_t p = 2 * in; p < P; p++)
            w[p] =
                sin(0.3 * (double)((p - 2 * in) % (own / (1 + (last->attributes[PK_AFFINE_BIAS] != 0)))) + 1);
        wave(0.7, in, x);
        const pk__line line = {w, NULL, NULL};
        pk__pass_forward(&h.tape, &line, 1, x);
        for (size_t k = 0; k < in; k++)
            assert_close(pk__pass_output(&h.tape)[k], torch_cases[i].outputs[k], ROUNDING(1e-13));
        wave(1.3, in, pk__pass_seed(&h.tape));
        pk__pass_reverse(&h.tape, &line, 1, 1);
        pk__pass_weight_gradient(&h.tape, 1, gradient);
        for (size_t p = in; p < P; p++)
            assert_close(gradient[p], torch_cases[i].gradient[p - in], ROUNDING(5e-13));
        drop(&h);
    }
}

/* ---- naive forms ------------------------------------------------------------------------------------ */

/* Adds an operation to an input of this shape. */
static const pk_node *one_node(holder *h, const char *name, int rank, const size_t *dims, double first,
                               double second, size_t constant_count, const pk_real *constants)
{
    pk_shape shape;
    const int zero = 0;
    const pk_operation *operation = pk_operation_find(name);
    double attributes[PK_NODE_ATTRIBUTES];
    memset(h, 0, sizeof *h);
    memset(&shape, 0, sizeof shape);
    shape.rank = rank;
    memcpy(shape.dims, dims, (size_t)rank * sizeof *dims);
    memcpy(attributes, operation->defaults, sizeof attributes);
    attributes[0] = first;
    attributes[1] = second;
    assert_ok(&h->context, pk_graph_input(&h->context, &h->graph, &shape));
    assert_ok(&h->context, pk_graph_add_constants(&h->context, &h->graph, operation, 1, &zero, attributes,
                                                  constant_count, constants, NULL));
    return &h->graph.nodes[1];
}

/* Values of one row by the definition. group: how many numbers belong together, or, of standardize and of
 * affine by channel, have one mean and variance, or gamma and beta. */
static void naive(const char *name, size_t width, size_t group, int by_channel, double epsilon,
                  const pk_real *numbers, size_t rest, const pk_real *x, bf_real *y)
{
    for (size_t i = 0; i < width; i++) {
        const size_t start = i / group * group, which = by_channel ? i / group : i % group;
        bf_real mean = 0, square = 0, sum = 0;
        for (size_t k = start; k < start + group; k++)
            mean += (bf_real)x[k] / (bf_real)group;
        for (size_t k = start; k < start + group; k++) {
            const bf_real from = name[0] == 'n' ? mean : 0;
            square += ((bf_real)x[k] - from) * ((bf_real)x[k] - from) / (bf_real)group;
            sum += expl((bf_real)x[k] - (bf_real)x[i]);
        }
        if (strcmp(name, "normalize") == 0)
            y[i] = ((bf_real)x[i] - mean) / sqrtl(square + (bf_real)epsilon);
        else if (strcmp(name, "rms_normalize") == 0)
            y[i] = (bf_real)x[i] / sqrtl(square + (bf_real)epsilon);
        else if (strcmp(name, "standardize") == 0)
            y[i] = ((bf_real)x[i] - (bf_real)numbers[which]) /
                   sqrtl((bf_real)numbers[rest + which] + (bf_real)epsilon);
        else if (strcmp(name, "affine") == 0)
            y[i] = (bf_real)numbers[which] * (bf_real)x[i] + (rest ? (bf_real)numbers[rest + which] : 0);
        else
            y[i] = strcmp(name, "softmax") == 0 ? 1 / sum : -logl(sum);
    }
}

static void check_forward(const char *name, int rank, const size_t *dims, int trailing, double first,
                          double second, size_t constants, uint64_t seed)
{
    enum { ROWS = 3 };
    holder h;
    size_t group = 1;
    pk_real *numbers = fixture_normals(seed, constants + 1, 1);
    for (size_t i = constants / 2; i < constants; i++)
        numbers[i] = fabs(numbers[i]);
    const pk_node *node = one_node(&h, name, rank, dims, first, second, constants, constants ? numbers : NULL);
    const size_t width = node->width, weights = node->weight_count;
    const int by_channel = trailing == 0;
    for (int i = by_channel ? 1 : rank - trailing; i < rank; i++)
        group *= dims[i];
    pk_real *w = fixture_normals(seed + 1, weights + 1, 1), *x = fixture_normals(seed + 2, ROWS * width, 3);
    pk_real *y = FIXTURE_NEW(pk_real, ROWS * width);
    bf_real *expected = BF_NEW(bf_real, width);
    assert_int_equal(node->shape.rank, rank);
    assert_memory_equal(node->shape.dims, dims, (size_t)rank * sizeof *dims);
    assert_ok(&h.context, pk_graph_evaluate(&h.context, &h.graph, w, pk_matrix_view(x, ROWS, width),
                                            pk_matrix_view(y, ROWS, width)));
    const size_t rest = constants ? constants / 2 : name[0] != 'a' || first == 0 ? 0 : weights / 2;
    for (size_t row = 0; row < ROWS; row++) {
        naive(name, width, group, by_channel, first, weights ? w : numbers, rest, x + row * width, expected);
        for (size_t i = 0; i < width; i++)
            assert_close(y[row * width + i], (double)expected[i],
                         ROUNDING(4e-15) * fmax(1, fabs((double)expected[i])));
    }
    free(numbers), free(w), free(x), free(y), free(expected);
    drop(&h);
}

static void test_naive(void **state)
{
    (void)state;
    static const size_t shapes[][4] = {{5, 1, 1, 1}, {1, 1, 1, 1}, {3, 7, 1, 1}, {2, 1, 1, 1},
                                       {4, 2, 3, 1}, {2, 3, 2, 5}, {3, 1, 9, 1}, {1, 33, 1, 1}};
    static const int ranks[] = {1, 1, 2, 1, 3, 4, 3, 2};
    for (size_t s = 0; s < sizeof ranks / sizeof *ranks; s++) {
        const int rank = ranks[s];
        const size_t *dims = shapes[s];
        const uint64_t seed = 10 * (uint64_t)s;
        for (int k = 1; k <= rank; k++) {
            check_forward("normalize", rank, dims, k, k == 1 ? 1e-5 : 0.25, k, 0, seed);
            check_forward("rms_normalize", rank, dims, k, k == 1 ? 2.220446049250313e-16 : 0.25, k, 0, seed);
            check_forward("affine", rank, dims, k, 1, k, 0, seed);
            check_forward("affine", rank, dims, k, 0, k, 0, seed);
        }
        check_forward("affine", rank, dims, 0, 1, 0, 0, seed);
        check_forward("affine", rank, dims, 0, 0, 0, 0, seed);
        check_forward("standardize", rank, dims, 0, 1e-3, 0, 2 * dims[0], seed);
        check_forward("softmax", rank, dims, 1, 0, 0, 0, seed);
        check_forward("log_softmax", rank, dims, 1, 0, 0, 0, seed);
    }
}

/* ---- derivatives ------------------------------------------------------------------------------------ */

static void test_rules(void **state)
{
    (void)state;
    static const char *const networks[] = {
        "input 4; dense 6; layer_norm; dense 3",
        "input 3; dense 1; layer_norm",
        "input 2x3x4; dense 5; layer_norm dims=2 epsilon=0.1; layer_norm dims=3 noaffine; flatten; dense 3",
        "input 4; dense 6; rms_norm; dense 3; rms_norm epsilon=0.5 noaffine",
        "input 2x3x4; dense 5; rms_norm dims=3 epsilon=0.1; flatten; dense 3",
        "input 3x2; affine; dense 4; affine dims=0 nobias; affine dims=2; flatten; dense 2; affine nobias",
        "input 2x3x2; dense 4; affine dims=0; tanh; affine dims=2; flatten",
        "input 4; dense 5; softmax; dense 3; log_softmax",
        "input 3x4; dense 5; log_softmax; dense 3; softmax; flatten",
        "input 4; dense 1; softmax; dense 2; log_softmax",
    };
    for (size_t i = 0; i < sizeof networks / sizeof *networks; i++)
        check_network_text(networks[i], 100 + i);
    static const struct {
        const char *network;
        size_t channels;
    } frozen[] = {{"input 3; dense 4; batch_norm statistics; tanh; dense 3", 4},
                  {"input 2x3x4; dense 5; batch_norm statistics epsilon=0.1 noaffine; flatten; dense 2", 2}};
    for (size_t i = 0; i < 2; i++) {
        static const double numbers[8] = {0.5, -2, 0.25, 1, 0.5, 2, 0.125, 0};
        const double two[4] = {0.5, -2, 0.25, 1};
        const statistics from = {2, frozen[i].channels, i ? two : numbers};
        pk_context context;
        pk_graph graph;
        assert_ok(&context, parse(&context, frozen[i].network, &from, &graph));
        assert_int_equal(graph.degree < 0, i == 0);
        check_graph(&context, &graph, 200 + i);
        pk_graph_release(&context, &graph);
    }
}

/* ---- the ends of the range -------------------------------------------------------------------------- */

static void forward_row(holder *h, const pk_real *x, pk_real *y)
{
    const size_t width = h->graph.input_width;
    assert_ok(&h->context, pk_graph_evaluate(&h->context, &h->graph, x, pk_matrix_view((pk_real *)x, 1, width),
                                             pk_matrix_view(y, 1, width)));
    drop(h);
}

static void test_extremes(void **state)
{
    (void)state;
    static const size_t five = 5, many = 1000;
    static const pk_real constants[] = {
        0, 0.1, -1.0 / 3, EITHER(1e-300, 1e-38), 1e10 / 3, EITHER(-1e150, -1e18) / 7};
    holder h;
    pk_real y[1000], x[1000];
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) { /* equal numbers have no deviations */
        for (size_t k = 0; k < many; k++)
            x[k] = constants[i];
        (void)one_node(&h, "normalize", 1, &many, 1e-5, 1, 0, NULL);
        forward_row(&h, x, y);
        for (size_t k = 0; k < many; k++)
            assert_true(fabs(y[k]) <= ROUNDING(1e-15) * fabs(x[k]) * ROUNDING(1e-15) / 3e-3);
    }
    for (size_t k = 0; k < many; k++) /* small deviations from a large mean */
        x[k] = (pk_real)EITHER(1e9, 1e6) + (pk_real)(k % 2);
    (void)one_node(&h, "normalize", 1, &many, 0, 1, 0, NULL);
    forward_row(&h, x, y);
    for (size_t k = 0; k < many; k++)
        assert_true(y[k] == (k % 2 ? 1 : -1));
    memset(x, 0, sizeof x);
    (void)one_node(&h, "rms_normalize", 1, &five, 2.220446049250313e-16, 1, 0, NULL);
    forward_row(&h, x, y);
    assert_true(y[0] == 0 && y[4] == 0);

    const pk_real large = (pk_real)EITHER(1e300, 1e30), most_of_all = (pk_real)EITHER(1e308, 1e38);
    const pk_real whole = (pk_real)EITHER(1e16, 1e7), tiny = (pk_real)EITHER(1e-300, 1e-38);
    const pk_real huge[][5] = {{large, -large, 0, large, 5},
                               {most_of_all, -most_of_all, most_of_all, 1, 0},
                               {-most_of_all, -most_of_all, -most_of_all, -most_of_all, -most_of_all},
                               {whole, whole + 2, whole, whole - 2, 0},
                               {-745, 0, -40, -tiny, -800}};
    for (size_t i = 0; i < 5; i++) {
        pk_real p[5];
        (void)one_node(&h, "softmax", 1, &five, 0, 0, 0, NULL);
        forward_row(&h, huge[i], p);
        (void)one_node(&h, "log_softmax", 1, &five, 0, 0, 0, NULL);
        forward_row(&h, huge[i], y);
        bf_real sum = 0, most = huge[i][0];
        for (size_t k = 1; k < 5; k++)
            most = fmaxl(most, (bf_real)huge[i][k]);
        for (size_t k = 0; k < 5; k++)
            sum += expl((bf_real)huge[i][k] - most);
        for (size_t k = 0; k < 5; k++) {
            const bf_real logarithm = (bf_real)huge[i][k] - most - logl(sum);
            assert_close(p[k], (double)expl(logarithm), ROUNDING(4e-16));
            if (logarithm < -(bf_real)EITHER(1.7e308, 3.4e38))
                assert_true(y[k] < -EITHER(1.7e308, 3.4e38));
            else
                assert_close(y[k], (double)logarithm, ROUNDING(4e-16) * fmax(1, fabs((double)logarithm)));
        }
        /* Derivatives there are finite. */
        const pk_operation *operations[2] = {pk_operation_find("softmax"), pk_operation_find("log_softmax")};
        for (int o = 0; o < 2; o++) {
            const pk_real v[5] = {1, -2, 3, 0.5, 1}, u[5] = {0.5, 1, -1, 2, 1};
            pk_real tangent[5], cotangent[5], scratch[5];
            pk_call call;
            memset(&call, 0, sizeof call);
            call.node = one_node(&h, operations[o]->name, 1, &five, 0, 0, 0, NULL);
            call.rows = call.copies = 1;
            call.in[0] = huge[i];
            call.in_tangent[0] = v;
            call.out = o ? y : p;
            call.out_tangent = tangent;
            call.out_cotangent = u;
            call.in_cotangent[0] = cotangent;
            call.scratch = scratch;
            operations[o]->tangent(&call);
            operations[o]->reverse(&call);
            double mean = 0, dot = 0;
            for (size_t k = 0; k < 5; k++) {
                mean += p[k] * v[k];
                dot += p[k] * u[k];
            }
            for (size_t k = 0; k < 5; k++) {
                assert_close(tangent[k], o ? v[k] - mean : p[k] * (v[k] - mean), ROUNDING(1e-15));
                assert_close(cotangent[k], o ? u[k] - p[k] * 3.5 : p[k] * (u[k] - dot), ROUNDING(2e-15));
            }
            drop(&h);
        }
    }
    /* A probability near 1 keeps its logarithm. */
    static const size_t two = 2;
    static const pk_real apart[2] = {0, -50};
    (void)one_node(&h, "log_softmax", 1, &two, 0, 0, 0, NULL);
    forward_row(&h, apart, y);
    assert_close(y[0], -1.9287498479639178e-22, ROUNDING(1e-37));
}

/* ---- arguments -------------------------------------------------------------------------------------- */

static void refused(const char *network, const statistics *from, pk_status status, const char *words)
{
    pk_context context;
    pk_graph graph;
    assert_refused(&context, status, words, parse(&context, network, from, &graph));
    assert_int_equal(context.memory_used, 0);
}

static void test_arguments(void **state)
{
    (void)state;
    static const double numbers[6] = {1, 2, 3, 4, -0.5, 6}, nothing[4] = {1, 2, 0, 0};
    static const statistics odd = {1, 3, numbers}, negative = {2, 3, numbers}, zero = {2, 2, nothing};
    refused("input 2; normalize dims=2", NULL, PK_SHAPE, "normalize: dims is 2, but its values are 2");
    refused("input 2x3; rms_normalize dims=3", NULL, PK_SHAPE,
            "rms_normalize: dims is 3, but its values are 2x3");
    refused("input 2; affine dims=2", NULL, PK_SHAPE, "affine: dims is 2");
    refused("input 2; affine dims=5", NULL, PK_ARGUMENT, "affine: dims is 5; a whole number from 0 to 4");
    refused("input 2; normalize dims=0", NULL, PK_ARGUMENT, "a whole number from 1 to 4");
    refused("input 2; normalize dims=1.5", NULL, PK_ARGUMENT, "dims is 1.5");
    refused("input 2; normalize epsilon=-1", NULL, PK_ARGUMENT, "epsilon is -1");
    refused("input 2; normalize nobias", NULL, PK_FORMAT, "'nobias' is not an option of normalize");
    refused("input 2; softmax 3", NULL, PK_FORMAT, "'3' is not an option");
    refused("input 2; standardize", NULL, PK_SHAPE,
            "0 numbers are no mean and variance for each of 2 channels");
    refused("input 3; batch_norm statistics", &odd, PK_SHAPE, "3 numbers");
    refused("input 3; batch_norm statistics", &negative, PK_ARGUMENT, "channel 1 has the variance -0.5");
    refused("input 2; batch_norm statistics epsilon=0", &zero, PK_ARGUMENT, "channel 0 has the variance 0");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torch),    cmocka_unit_test(test_naive),     cmocka_unit_test(test_rules),
        cmocka_unit_test(test_extremes), cmocka_unit_test(test_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
