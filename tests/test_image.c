/* Operations on images: conv and the pools against loops in long double, PyTorch, and their own rules. */
#include "graph_checks.h"

/* One operation on one input, called without a tape. */
typedef struct single {
    pk_context context;
    pk_graph graph;
    pk_call call;
    size_t in, out;
} single;

static void single_open(single *s, const char *name, size_t channels, size_t height, size_t width,
                        const double *attributes)
{
    const int zero = 0;
    pk_shape shape;
    memset(s, 0, sizeof *s);
    memset(&shape, 0, sizeof shape);
    shape.rank = 3;
    shape.dims[0] = channels;
    shape.dims[1] = height;
    shape.dims[2] = width;
    assert_ok(&s->context, pk_graph_input(&s->context, &s->graph, &shape));
    assert_ok(&s->context,
              pk_graph_add(&s->context, &s->graph, pk_operation_find(name), 1, &zero, attributes, NULL));
    s->call.node = &s->graph.nodes[1];
    s->call.in_width[0] = s->in = s->graph.input_width;
    s->out = s->graph.output_width;
    s->call.copies = 1;
}

static void single_close(single *s)
{
    pk_graph_release(&s->context, &s->graph);
    assert_int_equal(s->context.memory_used, 0);
}

static void conv_attributes(double *a, size_t out, const int *kernel, const int *stride, const int *pad,
                            const int *dilation, size_t groups, int bias)
{
    memcpy(a, pk_operation_find("conv")->defaults, PK_NODE_ATTRIBUTES * sizeof *a);
    a[PK_CONVOLUTION_CHANNELS] = (double)out;
    for (int side = 0; side < 2; side++) {
        a[PK_CONVOLUTION_KERNEL + side] = kernel[side];
        a[PK_CONVOLUTION_STRIDE + side] = stride[side];
        a[PK_CONVOLUTION_PAD + side] = pad[side];
        a[PK_CONVOLUTION_DILATION + side] = dilation[side];
    }
    a[PK_CONVOLUTION_GROUPS] = (double)groups;
    a[PK_CONVOLUTION_BIAS] = bias;
}

/* ---- conv against loops ------------------------------------------------------------------------------ */

typedef struct size3 {
    int channels, height, width;
} size3;

/* The definition: output, cotangent of the input and gradient of the weights of one row. */
static void naive_conv(size3 in, size3 out, const double *a, const pk_real *w, const pk_real *x,
                       const pk_real *delta, bf_real *y, bf_real *reverse, bf_real *gradient)
{
    const int *n = NULL;
    int k[10];
    for (int i = 0; i < 9; i++)
        k[i] = (int)a[PK_CONVOLUTION_KERNEL + i];
    n = k; /* kernel 0 1, stride 2 3, pad 4 5, dilation 6 7, groups 8 */
    const int group_in = in.channels / n[8], group_out = out.channels / n[8], places = out.height * out.width;
    const int patch = group_in * n[0] * n[1];
    for (int o = 0; o < out.channels; o++)
        for (int p = 0; p < places; p++) {
            const int row = p / out.width, column = p % out.width;
            const bf_real own = (bf_real)delta[o * places + p];
            bf_real sum = a[PK_CONVOLUTION_BIAS] != 0 ? (bf_real)w[out.channels * patch + o] : 0;
            for (int c = 0; c < group_in; c++)
                for (int i = 0; i < n[0]; i++)
                    for (int j = 0; j < n[1]; j++) {
                        const int v = row * n[2] + i * n[6] - n[4], h = column * n[3] + j * n[7] - n[5];
                        const int from = ((o / group_out * group_in + c) * in.height + v) * in.width + h;
                        const int at = o * patch + (c * n[0] + i) * n[1] + j;
                        if (v < 0 || h < 0 || v >= in.height || h >= in.width)
                            continue;
                        sum += (bf_real)w[at] * (bf_real)x[from];
                        reverse[from] += (bf_real)w[at] * own;
                        gradient[at] += (bf_real)x[from] * own;
                    }
            y[o * places + p] = sum;
            if (a[PK_CONVOLUTION_BIAS] != 0)
                gradient[out.channels * patch + o] += own;
        }
}

static void check_conv(size3 in, const double *a, uint64_t seed)
{
    enum { ROWS = 2 };
    single s;
    single_open(&s, "conv", (size_t)in.channels, (size_t)in.height, (size_t)in.width, a);
    const pk_node *node = s.call.node;
    const pk_operation *operation = node->operation;
    const size_t P = node->weight_count;
    const size3 out = {(int)node->shape.dims[0], (int)node->shape.dims[1], (int)node->shape.dims[2]};
    pk_real *w = fixture_normals(seed, P, 1), *x = fixture_normals(seed + 1, ROWS * s.in, 1);
    pk_real *delta = fixture_normals(seed + 2, ROWS * s.out, 1), *y = fixture_normals(1, ROWS * s.out, 1);
    pk_real *reverse = fixture_normals(2, ROWS * s.in, 1), *gradient = FIXTURE_NEW(pk_real, P);
    pk_real *scratch = FIXTURE_NEW(pk_real, operation->scratch(node, 1, 1));
    bf_real *true_y = BF_NEW(bf_real, s.out), *true_reverse = BF_NEW(bf_real, s.in),
            *true_gradient = BF_NEW(bf_real, P);
    s.call.rows = ROWS;
    s.call.weights = w;
    s.call.in[0] = x;
    s.call.out = y;
    s.call.out_cotangent = delta;
    s.call.in_cotangent[0] = reverse;
    s.call.gradient = gradient;
    s.call.scratch = scratch;
    operation->forward(&s.call);
    operation->reverse(&s.call);
    operation->weight_gradient(&s.call);
    /* c k eps |A||B|: sums of at most so many products of numbers below 5 */
    const double tolerance = 25 * ROUNDING(2.3e-16) * (double)(s.in + s.out + P);
    for (size_t row = 0; row < ROWS; row++) {
        memset(true_reverse, 0, s.in * sizeof *true_reverse);
        naive_conv(in, out, a, w, x + row * s.in, delta + row * s.out, true_y, true_reverse, true_gradient);
        for (size_t i = 0; i < s.out; i++)
            assert_close(y[row * s.out + i], true_y[i], tolerance);
        for (size_t i = 0; i < s.in; i++)
            assert_close(reverse[row * s.in + i], true_reverse[i], tolerance);
    }
    for (size_t i = 0; i < P; i++)
        assert_close(gradient[i], true_gradient[i], tolerance);
    free(w), free(x), free(delta), free(y), free(reverse), free(gradient), free(scratch);
    free(true_y), free(true_reverse), free(true_gradient);
    single_close(&s);
}

static int drawn(uint64_t *seed, int least, int most)
{
    return least + (int)(bf_uniform(seed) * (most - least + 1));
}

static void test_conv_values(void **state)
{
    (void)state;
    uint64_t seed = 5;
    int checked = 0;
    for (int k = 0; k < 400; k++) {
        const int groups = drawn(&seed, 1, 3), one[2] = {1, 1}, none[2] = {0, 0};
        const size3 in = {groups * drawn(&seed, 1, 3), drawn(&seed, 1, 8), drawn(&seed, 1, 8)};
        const size_t out = (size_t)(groups * drawn(&seed, 1, 6));
        int number[8];
        double a[PK_NODE_ATTRIBUTES];
        for (int i = 0; i < 8; i++)
            number[i] = i < 4 ? drawn(&seed, 1, 3) : i < 6 ? drawn(&seed, 0, 3) : drawn(&seed, 1, 2);
        if ((number[0] - 1) * number[6] + 1 > in.height + 2 * number[4] ||
            (number[1] - 1) * number[7] + 1 > in.width + 2 * number[5])
            continue;
        if (k % 10 == 0)
            conv_attributes(a, out, one, one, none, one, (size_t)groups, k % 20 == 0);
        else
            conv_attributes(a, out, number, number + 2, number + 4, number + 6, (size_t)groups, k % 2);
        check_conv(in, a, (uint64_t)k);
        checked++;
    }
    assert_true(checked > 200);
    /* More patches than are in scratch at a time. */
    const int three[2] = {3, 3}, five[2] = {5, 3}, one[2] = {1, 1}, two[2] = {1, 2};
    const size3 large = {8, 30, 29}, wide = {100, 9, 17};
    double a[PK_NODE_ATTRIBUTES];
    conv_attributes(a, 5, three, one, one, one, 1, 1);
    check_conv(large, a, 1);
    conv_attributes(a, 8, five, two, two, two, 2, 1);
    check_conv(large, a, 2);
    conv_attributes(a, 2, three, one, one, one, 1, 0);
    check_conv(wide, a, 3);
}

/* ---- PyTorch ----------------------------------------------------------------------------------------- */

/* PyTorch 2.15, float64: python3 image_constants.py, which reads
 *   import torch
 *   n = lambda *s: ((7 * torch.arange(torch.Size(s).numel()) + 3) % 11 - 5).double().reshape(s) / 4
 *   def show(name, module, ties, *shape):
 *       x = (torch.floor(n(1, *shape)) if ties else n(1, *shape)).requires_grad_()
 *       for p in module.double().parameters(): p.data = n(*p.shape)
 *       y = module(x); (y * n(*y.shape)).sum().backward()
 *       lists = [("out", y), ("in", x.grad)]
 *       if list(module.parameters()): lists.append(("weights", torch.cat([p.grad.flatten() for p in module.parameters()])))
 *       for what, a in lists: print(f"static const double {name}_{what}[] = {{{', '.join('%.17g' % v for v in a.detach().flatten())}}};")
 *   nn = torch.nn
 *   show("groups", nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), 0, 2, 4, 3)
 *   show("plain", nn.Conv2d(2, 2, 3, stride=2, padding=1), 0, 2, 4, 3)
 *   show("maximum", nn.MaxPool2d((3, 2), stride=(2, 1), padding=1), 1, 1, 5, 4)
 *   show("average", nn.AvgPool2d((3, 2), stride=(2, 1), padding=1), 0, 1, 5, 4)
 */
/* clang-format off */
static const pk_real groups_out[] = {-0.125, -1.4375, -1.5625, 0.8125, -0.4375, -0.6875, 0.1875, -1.4375,
    -0.3125, -1.0625, 2.25, -0.8125, 0.6875, 1.4375, 1.1875, 2.5625, 0.8125, 2.1875, 0.3125, 1.0625, 0.5,
    0.5, -0.4375, 0.0625, 0.8125, 0.75, 0.5, -1.8125, 0.4375, -0.0625, 1.125, -0.625, -4.4375, -1.0625,
    0.6875, 0, -1.5, 0, -0.1875, -0.5625};
static const pk_real groups_in[] = {-0.5, -0.5625, -1.3125, 2, -2.25, 1.0625, -0.8125, 0.5, 0.4375, -0.25,
    0.125, -0.875, -1.625, -0.4375, -2, 1.1875, -2.625, 0.4375, -1.875, 1.375, 1.1875, 0.5625, -1.9375,
    1.75};
static const pk_real groups_weights[] = {-0.8125, -1, -1.4375, 0.9375, -1.375, 0.75, 1.5, -0.75, 1.125,
    -1.3125, 1.0625, -1.625, -0.75, -0.75, -1.1875, -1.875, 0.6875, -1.625, 2, -0.75, 1.5625, -1.875, -1.5,
    1, -0.5, 1.25, 0.25, -0.75};
static const pk_real plain_out[] = {-1.6875, -2.0625, -1.875, -4.3125, 4.4375, 1.625, 1.5, 7.4375};
static const pk_real plain_in[] = {-1, 0.3125, 1.25, -0.5625, 2.125, -0.1875, 0.75, -0.3125, -1.125, 0.9375,
    -0.125, -1.125, -1.375, 2.4375, 0.3125, 2.375, 2.0625, -1.125, 1.3125, -1.8125, -1.125, -1.25, -1.625,
    0.9375};
static const pk_real plain_weights[] = {-0.75, -0.1875, 0.25, 1, 0.5, -0.4375, 0.875, 0.4375, -0.375, 0, 1,
    0, 0.5, -0.4375, -0.1875, 0.375, -2.5625, -0.125, 0.75, 0.75, -1, 0.5625, 0.3125, 0.5, 0.375, 0.125,
    0.5, 0, -1.75, 0, -0.1875, -0.4375, 0.5, -0.375, 1.4375, 0.5, 0.25, 0.75};
static const pk_real maximum_out[] = {1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1};
static const pk_real maximum_in[] = {0, 1.5, -0.75, 0, -1.5, 0.75, 0, 1, 0, 0, 0, 0, 0, 1.25, 0, -2, 0, 0, 0,
    0};
static const pk_real average_out[] = {0.083333333333333329, 0.29166666666666669, 0.083333333333333329,
    -0.125, 0, 0.33333333333333331, 0.16666666666666666, -0.375, 0, 0.20833333333333334,
    0.20833333333333334, 0.083333333333333329, -0.125, 0.125, 0.125};
static const pk_real average_in[] = {0.125, 0.25, -0.083333333333333343, 0.041666666666666657,
    -0.041666666666666657, 0.20833333333333334, 0, -0.20833333333333334, -0.16666666666666666,
    -0.041666666666666657, 0.083333333333333343, -0.25, -0.16666666666666666, 0.083333333333333356,
    0.33333333333333337, -0.33333333333333337, 0, 0.125, 0.25, -0.083333333333333343};
/* clang-format on */

/* ((7 i + 3) mod 11 - 5) / 4, as in the program above. */
static pk_real *pattern(size_t count)
{
    pk_real *numbers = FIXTURE_NEW(pk_real, count);
    for (size_t i = 0; i < count; i++)
        numbers[i] = ((double)((7 * i + 3) % 11) - 5) / 4;
    return numbers;
}

static void check_constants(single *s, int ties, const pk_real *out, const pk_real *in, const pk_real *weights,
                            const pk_real *weight_gradient)
{
    const pk_operation *operation = s->call.node->operation;
    const size_t P = s->call.node->weight_count;
    pk_real *x = pattern(s->in), *delta = pattern(s->out), *y = FIXTURE_NEW(pk_real, s->out);
    pk_real *reverse = FIXTURE_NEW(pk_real, s->in), *gradient = FIXTURE_NEW(pk_real, P);
    pk_real *scratch = FIXTURE_NEW(pk_real, operation->scratch ? operation->scratch(s->call.node, 1, 1) : 0);
    for (size_t i = 0; ties && i < s->in; i++)
        x[i] = floor(x[i]);
    s->call.rows = 1;
    s->call.weights = weights;
    s->call.in[0] = x;
    s->call.out = y;
    s->call.out_cotangent = delta;
    s->call.in_cotangent[0] = reverse;
    s->call.gradient = gradient;
    s->call.scratch = scratch;
    operation->forward(&s->call);
    operation->reverse(&s->call);
    if (P)
        operation->weight_gradient(&s->call);
    for (size_t i = 0; i < s->out; i++)
        assert_close(y[i], out[i], ROUNDING(1e-15));
    for (size_t i = 0; i < s->in; i++)
        assert_close(reverse[i], in[i], ROUNDING(1e-15));
    for (size_t i = 0; i < P; i++)
        assert_close(gradient[i], weight_gradient[i], ROUNDING(1e-15));
    free(x), free(delta), free(y), free(reverse), free(gradient), free(scratch);
    single_close(s);
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void test_pytorch(void **state)
{
    (void)state;
    single s;
    double a[PK_NODE_ATTRIBUTES] = {3, 2, 2, 1, 1, 1};
    pk_real weights[COUNT(plain_weights)];
    const int three[2] = {3, 3}, kernel[2] = {3, 2}, two[2] = {2, 2}, one[2] = {1, 1}, stride[2] = {2, 1},
              pad[2] = {1, 2};
    single_open(&s, "max_pool", 1, 5, 4, a);
    assert_int_equal(s.out, COUNT(maximum_out));
    check_constants(&s, 1, maximum_out, maximum_in, NULL, NULL);
    single_open(&s, "avg_pool", 1, 5, 4, a);
    assert_int_equal(s.out, COUNT(average_out));
    check_constants(&s, 0, average_out, average_in, NULL, NULL);
    for (int plain = 0; plain < 2; plain++) { /* each parameter has the pattern of its own */
        conv_attributes(a, plain ? 2 : 4, plain ? three : kernel, plain ? two : stride, plain ? one : pad,
                        plain ? one : pad, plain ? 1 : 2, 1);
        single_open(&s, "conv", 2, 4, 3, a);
        const size_t count = plain ? COUNT(plain_weights) : COUNT(groups_weights);
        assert_int_equal(s.graph.parameters, count);
        assert_int_equal(s.out, plain ? COUNT(plain_out) : COUNT(groups_out));
        pk_real *own = pattern(count);
        for (size_t i = 0, biases = plain ? 2 : 4; i < count; i++)
            weights[i] = i < count - biases ? own[i] : own[i - (count - biases)];
        check_constants(&s, 0, plain ? plain_out : groups_out, plain ? plain_in : groups_in, weights,
                        plain ? plain_weights : groups_weights);
        free(own);
    }
}

/* ---- pools ------------------------------------------------------------------------------------------- */

/* Whole numbers, many of them equal. */
static pk_real *whole_numbers(uint64_t seed, size_t count, int most)
{
    pk_real *numbers = FIXTURE_NEW(pk_real, count);
    for (size_t i = 0; i < count; i++)
        numbers[i] = drawn(&seed, 0, most);
    return numbers;
}

/* Output and cotangents of a chain of pools behind a convolution that changes nothing. */
static void pool_chain(size3 in, double (*pools)[PK_NODE_ATTRIBUTES], int count, const pk_real *x,
                       const pk_real *delta, pk_real *out, pk_real *reverse, size_t *outputs)
{
    enum { ROWS = 2, COPIES = 3 };
    holder h;
    pk_shape shape;
    const int kernel[2] = {1, 1}, pad[2] = {0, 0};
    double conv[PK_NODE_ATTRIBUTES];
    int node = 0;
    memset(&h, 0, sizeof h);
    memset(&shape, 0, sizeof shape);
    shape.rank = 3;
    shape.dims[0] = (size_t)in.channels;
    shape.dims[1] = (size_t)in.height;
    shape.dims[2] = (size_t)in.width;
    conv_attributes(conv, shape.dims[0], kernel, kernel, pad, kernel, shape.dims[0], 0);
    assert_ok(&h.context, pk_graph_input(&h.context, &h.graph, &shape));
    assert_ok(&h.context, pk_graph_add(&h.context, &h.graph, pk_operation_find("conv"), 1, &node, conv, &node));
    for (int i = 0; i < count; i++)
        assert_ok(&h.context,
                  pk_graph_add(&h.context, &h.graph, pk_operation_find("max_pool"), 1, &node, pools[i], &node));
    hold_graph(&h, ROWS, COPIES);
    pk_real *ones = FIXTURE_NEW(pk_real, h.graph.parameters);
    for (size_t i = 0; i < h.graph.parameters; i++)
        ones[i] = 1;
    const pk__line line = {ones, NULL, NULL};
    *outputs = h.graph.output_width;
    pk__pass_forward(&h.tape, &line, ROWS, x);
    memcpy(out, pk__pass_output(&h.tape), ROWS * *outputs * sizeof *out);
    memcpy(pk__pass_seed(&h.tape), delta, ROWS * COPIES * *outputs * sizeof *delta);
    pk__pass_reverse(&h.tape, &line, ROWS, COPIES);
    memcpy(reverse, h.tape.cotangent[1], ROWS * COPIES * h.graph.input_width * sizeof *reverse);
    free(ones);
    drop(&h);
}

/* A KxK pool is a 1xK and a Kx1 pool, ties included: the way the language writes it. */
static void test_separable(void **state)
{
    (void)state;
    enum { MOST = 2 * 3 * 2 * 9 * 9 };
    uint64_t seed = 9;
    pk_real out[2][MOST], reverse[2][MOST];
    int checked = 0;
    for (int k = 0; k < 200; k++) {
        const size3 in = {drawn(&seed, 1, 2), drawn(&seed, 1, 9), drawn(&seed, 1, 9)};
        double whole[1][PK_NODE_ATTRIBUTES] = {{0}}, parts[2][PK_NODE_ATTRIBUTES] = {{0}, {0}};
        for (int side = 0; side < 2; side++) {
            const int size = side ? in.width : in.height, kernel = drawn(&seed, 1, 4),
                      pad = drawn(&seed, 0, kernel / 2), stride = drawn(&seed, 1, kernel);
            whole[0][PK_POOL_KERNEL + side] = parts[!side][PK_POOL_KERNEL + side] = kernel;
            whole[0][PK_POOL_STRIDE + side] = parts[!side][PK_POOL_STRIDE + side] = stride;
            whole[0][PK_POOL_PAD + side] = parts[!side][PK_POOL_PAD + side] = pad;
            parts[side][PK_POOL_KERNEL + side] = parts[side][PK_POOL_STRIDE + side] = 1;
            if (kernel > size + 2 * pad)
                whole[0][PK_POOL_KERNEL] = 0;
        }
        if (whole[0][PK_POOL_KERNEL] == 0)
            continue;
        size_t outputs[2];
        pk_real *x = whole_numbers(seed, MOST, k % 2 ? 1 : 4), *delta = fixture_normals(seed, MOST, 1);
        for (size_t i = 0; i < MOST; i++)
            x[i] -= 3; /* below the zero of padding, were there one */
        pool_chain(in, whole, 1, x, delta, out[0], reverse[0], &outputs[0]);
        pool_chain(in, parts, 2, x, delta, out[1], reverse[1], &outputs[1]);
        assert_int_equal(outputs[0], outputs[1]);
        assert_memory_equal(out[0], out[1], 2 * outputs[0] * sizeof **out);
        for (int i = 0; i < 2 * 3 * in.channels * in.height * in.width; i++)
            assert_close(reverse[0][i], reverse[1][i], ROUNDING(1e-14));
        free(x), free(delta);
        checked++;
    }
    assert_true(checked > 100);
}

/* Each pair of numbers that are in one window, once, and no other. */
static void test_pool_switches(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int k = 0; k < 100; k++) {
        const int height = drawn(&seed, 3, 7), width = drawn(&seed, 3, 7);
        const size_t plane = (size_t)(height * width);
        double a[PK_NODE_ATTRIBUTES] = {0};
        single s;
        for (int side = 0; side < 2; side++) {
            a[PK_POOL_KERNEL + side] = k % 3 == side ? 1 : drawn(&seed, 1, 3);
            a[PK_POOL_STRIDE + side] = drawn(&seed, 0, 3);
            a[PK_POOL_PAD + side] = drawn(&seed, 0, (int)a[PK_POOL_KERNEL + side] / 2);
        }
        single_open(&s, "max_pool", 2, (size_t)height, (size_t)width, a);
        const pk_node *node = s.call.node;
        const size_t count = node->operation->switch_count(node), outputs = s.out / 2;
        unsigned char *pairs = FIXTURE_NEW(unsigned char, plane *plane);
        size_t expected = 0;
        for (size_t q = 0; q < outputs; q++)
            for (size_t first = 0; first < plane; first++)
                for (size_t second = first + 1; second < plane; second++) {
                    int inside = 1;
                    for (int side = 0; side < 2; side++) {
                        const size_t columns = node->shape.dims[2], own = side ? q % columns : q / columns;
                        const size_t ends[2] = {first, second};
                        for (int e = 0; e < 2; e++) {
                            const double at =
                                (double)(side ? ends[e] % (size_t)width : ends[e] / (size_t)width);
                            const double start =
                                (double)own * node->attributes[PK_POOL_STRIDE + side] - a[PK_POOL_PAD + side];
                            inside &= at >= start && at < start + a[PK_POOL_KERNEL + side];
                        }
                    }
                    expected += inside && !pairs[first * plane + second];
                    pairs[first * plane + second] |= (unsigned char)inside;
                }
        assert_int_equal(count, 2 * expected);
        /* The numbers are powers of two, so that a difference tells its pair: 2^a - 2^b. */
        pk_real *x = FIXTURE_NEW(pk_real, 2 * plane);
        for (size_t i = 0; i < 2 * plane; i++)
            x[i] = ldexp(1, (int)(i % plane));
        pk_real *out = FIXTURE_NEW(pk_real, count);
        s.call.rows = 1;
        s.call.in[0] = x;
        s.call.out = out;
        node->operation->switches(&s.call);
        for (int channel = 0; channel < 2; channel++) {
            unsigned char *left = FIXTURE_NEW(unsigned char, plane *plane);
            memcpy(left, pairs, plane * plane);
            for (size_t i = 0; i < count / 2; i++) {
                double difference = fabs(out[(size_t)channel * count / 2 + i]);
                int first = 0, exponent;
                while (fmod(difference, 2) == 0) {
                    difference /= 2;
                    first++;
                }
                assert_true(frexp(difference + 1, &exponent) == 0.5);
                const size_t pair = (size_t)first * plane + (size_t)(first + exponent - 1);
                assert_true(left[pair]);
                left[pair] = 0;
            }
            free(left);
        }
        free(x), free(out), free(pairs);
        single_close(&s);
    }
}

static void test_nan(void **state)
{
    (void)state;
    const double a[PK_NODE_ATTRIBUTES] = {1, 3, 0, 0, 0, 1};
    pk_real x[4] = {1, (double)NAN, 5, 2}, y[2];
    single s;
    single_open(&s, "max_pool", 1, 1, 4, a);
    assert_int_equal(s.out, 2);
    s.call.rows = 1;
    s.call.in[0] = x;
    s.call.out = y;
    s.call.node->operation->forward(&s.call);
    assert_true(isnan(y[0]) && y[1] == 5);
    single_close(&s);
}

/* ---- every rule -------------------------------------------------------------------------------------- */

static void test_rules(void **state)
{
    (void)state;
    static const char *const layers[] = {
        "conv 2 3x3",
        "conv 3 3x2 stride=2x1 pad=1x2 dilation=1x2 nobias",
        "conv 5 1x1",
        "conv 4 1x1 stride=2",
        "conv 4 2x2 groups=2",
        "conv 8 3x3 pad=1 groups=2 nobias",
        "conv 10 1x1 groups=2",
        "conv 4 3x3 stride=2 pad=2 groups=4",
        "conv 8 1x1 groups=4",
        "max_pool 2",
        "max_pool 3 stride=2 pad=1",
        "max_pool 3x1 stride=1",
        "max_pool 2x3 stride=1x2 pad=1x0",
        "avg_pool 2",
        "avg_pool 3x2 stride=1x2 pad=1",
        "conv 3 3x3 pad=1; relu; max_pool 2; residual( conv 3 3x3 pad=1; relu; conv 3 1x1 ); avg_pool 1x2",
        "residual( conv 4 3x3 pad=1 groups=4 | conv 4 1x1 )",
    };
    for (size_t k = 0; k < COUNT(layers); k++) {
        char network[300];
        snprintf(network, sizeof network, "input 2x5x6; conv 4 2x2 pad=1; %s; flatten; dense 2", layers[k]);
        check_network_text(network, k);
        snprintf(network, sizeof network, "input 2x5x6; conv 4 3x2; %s; tanh; global_avg_pool; dense 2",
                 layers[k]);
        check_network_text(network, k + 100);
    }
    /* A pool of whole windows by itself, not as the two that the language makes of it. */
    pk_context context;
    pk_graph graph;
    pk_shape shape = {3, {2, 5, 5, 0}};
    const int kernel[2] = {2, 2}, one[2] = {1, 1}, none[2] = {0, 0};
    double a[PK_NODE_ATTRIBUTES], pool[PK_NODE_ATTRIBUTES] = {3, 2, 1, 2, 1, 0};
    int node = 0;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    conv_attributes(a, 3, kernel, one, none, one, 1, 1);
    assert_ok(&context, pk_graph_input(&context, &graph, &shape));
    assert_ok(&context, pk_graph_add(&context, &graph, pk_operation_find("conv"), 1, &node, a, &node));
    assert_ok(&context, pk_graph_add(&context, &graph, pk_operation_find("max_pool"), 1, &node, pool, &node));
    check_graph(&context, &graph, 7);
    pk_graph_release(&context, &graph);
}

/* ---- arguments --------------------------------------------------------------------------------------- */

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        pk_status status;
        const char *layer, *words;
    } refused[] = {
        {PK_SHAPE, "conv 4 5x3",
         "conv: a kernel that reaches over 5x3 is larger than the input 2x4x6 padded to 2x4x6"},
        {PK_SHAPE, "conv 4 3x3 dilation=1x3 pad=1x0",
         "reaches over 3x7 is larger than the input 2x4x6 padded to 2x6x6"},
        {PK_SHAPE, "conv 4 3x3 groups=3", "3 groups do not divide its 2 input and 4 output channels"},
        {PK_SHAPE, "conv 3 3x3 groups=2", "2 groups do not divide its 2 input and 3 output channels"},
        {PK_SHAPE, "flatten; conv 3 3x3",
         "conv needs images of channels x height x width or signals of channels x length, not values of shape "
         "48"},
        {PK_SHAPE, "flatten; max_pool 2", "max_pool needs images"},
        {PK_SHAPE, "flatten; avg_pool 2", "avg_pool needs images"},
        {PK_SHAPE, "flatten; global_avg_pool", "global_avg_pool needs images"},
        {PK_SHAPE, "max_pool 5x1", "reaches over 5x1 is larger than the input 2x4x6 padded to 2x4x6"},
        {PK_SHAPE, "max_pool 2 pad=2", "is more than half of its kernel"},
        {PK_SHAPE, "avg_pool 3 pad=2", "padding of 2x2 is more than half of its kernel, 3x3"},
        {PK_ARGUMENT, "conv 0 3x3", "channels is 0"},
        {PK_ARGUMENT, "conv 1.5 3x3", "channels is 1.5; a whole number"},
        {PK_ARGUMENT, "conv 3 0x3", "kernel is 0"},
        {PK_ARGUMENT, "conv 3 3x3 stride=0", "stride is 0"},
        {PK_ARGUMENT, "conv 3 3x3 dilation=0", "dilation is 0"},
        {PK_ARGUMENT, "conv 3 3x3 pad=-1", "pad is -1"},
        {PK_ARGUMENT, "conv 3 3x3 groups=0", "groups is 0"},
        {PK_ARGUMENT, "avg_pool 2 stride=1.5", "stride is 1.5"},
        {PK_FORMAT, "conv 3", "conv needs its kernel"},
        {PK_FORMAT, "max_pool", "max_pool needs its kernel"},
        {PK_FORMAT, "global_avg_pool 2", "'2' is not an option"},
        {PK_SHAPE, "flatten; conv_transpose 3 2", "conv_transpose needs images"},
        {PK_SHAPE, "flatten; upsample 2", "upsample needs images"},
        {PK_SHAPE, "flatten; adaptive_avg_pool 2", "adaptive_avg_pool needs images"},
        {PK_SHAPE, "flatten; adaptive_max_pool 2", "adaptive_max_pool needs images"},
        {PK_FORMAT, "conv_transpose 3", "conv_transpose needs its kernel"},
        {PK_SHAPE, "conv_transpose 3 2x2 output_pad=1", "output_pad is 1; it is less than the stride, 1"},
        {PK_SHAPE, "conv_transpose 3 2x2 pad=3", "a padding of 3 leaves nothing"},
        {PK_SHAPE, "conv_transpose 3 2x2 groups=3", "3 groups do not divide its 2 input and 3 output channels"},
        {PK_OVERFLOW, "conv_transpose 1000000 1000000 stride=1000000", "its output overflows"},
        {PK_FORMAT, "upsample", "upsample needs its factor"},
        {PK_ARGUMENT, "upsample 0", "factor is 0"},
        {PK_ARGUMENT, "upsample 1.5", "a whole number"},
        {PK_FORMAT, "upsample 2 cubic", "'cubic' is none of: nearest bilinear linear"},
        {PK_ARGUMENT, "upsample 2 align_corners", "align_corners belongs to bilinear"},
        {PK_OVERFLOW, "upsample 1000000; upsample 1000000; upsample 1000000", "overflow"},
        {PK_FORMAT, "adaptive_avg_pool", "adaptive_avg_pool needs its output"},
        {PK_ARGUMENT, "adaptive_max_pool 0", "output is 0"},
        {PK_FORMAT, "max_pool 2 count_include_pad=0", "is not an option of max_pool"},
        {PK_FORMAT, "avg_pool 2 count_include_pad=2", "'2' is none of: 1 0"},
    };
    for (size_t k = 0; k < COUNT(refused); k++) {
        char network[200];
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        snprintf(network, sizeof network, "input 2x4x6; %s; flatten; dense 2", refused[k].layer);
        assert_refused(&context, refused[k].status, refused[k].words,
                       pk_network_parse(&context, network, &graph));
        assert_int_equal(context.memory_used, 0);
    }
    /* Too many pairs to watch, and numbers of patches beyond memory. */
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_refused(&context, PK_UNSUPPORTED, "too many pairs",
                   pk_network_parse(&context, "input 1x2000x2000; conv 1 1x1; max_pool 1000; flatten", &graph));
    assert_int_equal(pk_network_parse(&context,
                                      "input 1000000000x3000x3000; conv 100 1000x1000 pad=500000; flatten",
                                      &graph),
                     PK_OVERFLOW);
}

/* Starting weights: ranges and spreads as PyTorch's for Conv2d, of which fan_in is 2 x 3 x 3 and fan_out 80 x 9. */
static void test_initialize(void **state)
{
    (void)state;
    static const struct {
        const char *init;
        double variance, most;
    } kinds[] = {
        {"", 1.0 / 3 / 18, 0.2357022603955159},
        {"init=he", 2.0 / 18, 10},
        {"init=glorot", 2.0 / (18 + 720), 10},
        {"init=glorot_uniform gain=2", 8.0 / (18 + 720), 0.18033392693348646},
        {"init=standard", 1, 10},
    };
    for (size_t k = 0; k < COUNT(kinds); k++) {
        enum { OUT = 80, WEIGHTS = OUT * 18 };
        char network[200];
        pk_context context;
        pk_graph graph;
        pk_real w[WEIGHTS + OUT];
        double square = 0, biases = 0;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        snprintf(network, sizeof network, "input 4x3x3; conv %d 3x3 groups=2 %s; flatten", OUT, kinds[k].init);
        assert_ok(&context, pk_network_parse(&context, network, &graph));
        assert_int_equal(graph.parameters, WEIGHTS + OUT);
        assert_ok(&context, pk_network_initialize(&context, &graph, 1, w));
        for (size_t i = 0; i < WEIGHTS + OUT; i++) {
            *(i < WEIGHTS ? &square : &biases) += w[i] * w[i];
            assert_true(fabs(w[i]) <= kinds[k].most);
        }
        assert_close(square / WEIGHTS / kinds[k].variance, 1, 0.15);
        if (k == 0 || k == COUNT(kinds) - 1)
            assert_close(biases / OUT / kinds[k].variance, 1, 0.5);
        else
            assert_true(biases == 0);
        pk_graph_release(&context, &graph);
    }
}

/* The number of pairs that max_pool watches against all pairs of numbers and all windows. */
static void test_pool_pairs(void **state)
{
    (void)state;
    size_t pools = 0;
    for (size_t number = 0; number < 7 * 7 * 5 * 3 * 5 * 5; number++) {
        size_t n = number;
        const int height = 1 + (int)(n % 7);
        n /= 7;
        const int width = 1 + (int)(n % 7);
        n /= 7;
        const int down = 1 + (int)(n % 5);
        n /= 5;
        const int across = 1 + (int)(n % 3);
        n /= 3;
        const int stride = 1 + (int)(n % 5), other = 1 + (int)(n / 5),
                  pad = (int)(number % (size_t)(down / 2 + 1)),
                  side = (int)(number / 3 % (size_t)(across / 2 + 1));
        if (height + 2 * pad < down || width + 2 * side < across)
            continue;
        size_t pairs = 0;
        for (int a = 0; a < height * width; a++)
            for (int b = a + 1; b < height * width; b++) {
                int together = 0;
                for (int y = -pad; y + down <= height + pad; y += stride)
                    for (int x = -side; x + across <= width + side; x += other)
                        together |= a / width >= y && b / width < y + down && a % width >= x &&
                                    b % width >= x && a % width < x + across && b % width < x + across;
                pairs += (size_t)together;
            }
        pk_context context;
        pk_graph graph;
        const pk_shape shape = {3, {2, (size_t)height, (size_t)width}};
        const double attributes[PK_NODE_ATTRIBUTES] = {down, across, stride, other, pad, side};
        int node = 0;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        assert_ok(&context, pk_graph_input(&context, &graph, &shape));
        assert_ok(&context,
                  pk_graph_add(&context, &graph, pk_operation_find("max_pool"), 1, &node, attributes, &node));
        const size_t count = graph.nodes[1].operation->switch_count(&graph.nodes[1]);
        if (count != 2 * pairs)
            fail_msg("%dx%d, kernel %dx%d, stride %dx%d, pad %dx%d: %zu pairs, not %zu", height, width, down,
                     across, stride, other, pad, side, count, 2 * pairs);
        pk_graph_release(&context, &graph);
        pools++;
    }
    assert_true(pools > 10000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conv_values), cmocka_unit_test(test_pytorch),
        cmocka_unit_test(test_separable),   cmocka_unit_test(test_pool_switches),
        cmocka_unit_test(test_nan),         cmocka_unit_test(test_rules),
        cmocka_unit_test(test_refused),     cmocka_unit_test(test_initialize),
        cmocka_unit_test(test_pool_pairs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
