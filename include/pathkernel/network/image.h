/* pathkernel/network/image.h: operations on images of channels x height x width: convolution and pooling. */
#ifndef PATHKERNEL_IMAGE_H
#define PATHKERNEL_IMAGE_H
#include "dense.h"
#include "shape.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of conv and of the pools, for pk_graph_add; pairs are height, width. */
enum {
    PK_CONVOLUTION_CHANNELS,
    PK_CONVOLUTION_KERNEL,
    PK_CONVOLUTION_STRIDE = 3,
    PK_CONVOLUTION_PAD = 5,
    PK_CONVOLUTION_DILATION = 7,
    PK_CONVOLUTION_GROUPS = 9,
    PK_CONVOLUTION_BIAS,
    PK_CONVOLUTION_INITIAL,
    PK_CONVOLUTION_GAIN
};
enum { PK_POOL_KERNEL, PK_POOL_STRIDE = 2 /* 0: the kernel */, PK_POOL_PAD = 4 };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_IMAGE_IMPLEMENTED)
#define PATHKERNEL_IMAGE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* Behind the attributes of all of them: what the rules need of the input. */
enum { PK__POOL_SWITCHES = 12, PK__IMAGE_CHANNELS, PK__IMAGE_HEIGHT, PK__IMAGE_WIDTH };

/* ---- windows ----------------------------------------------------------------------------------------- */

/* Windows on a padded plane: tap (i, j) of output (y, x) is number (y stride + i dilation - pad) of height, likewise
 * of width. Where that is in front of the plane it wraps to a number far behind it. */
typedef struct pk__windows {
    size_t height, width, rows, columns; /* of input and output */
    size_t kernel[2], stride[2], pad[2], dilation[2];
} pk__windows;

/* How far a window reaches. */
static size_t pk__reach(const pk__windows *windows, int side)
{
    return (windows->kernel[side] - 1) * windows->dilation[side] + 1;
}

/* The attributes of kernel, stride, pad and dilation; -1: one. The windows fit, see pk__image_shape. */
static pk__windows pk__windows_at(const pk_node *node, int kernel, int stride, int pad, int dilation)
{
    pk__windows windows;
    windows.height = (size_t)node->attributes[PK__IMAGE_HEIGHT];
    windows.width = (size_t)node->attributes[PK__IMAGE_WIDTH];
    for (int side = 0; side < 2; side++) {
        windows.kernel[side] = (size_t)node->attributes[kernel + side];
        windows.stride[side] = (size_t)node->attributes[stride + side];
        windows.pad[side] = (size_t)node->attributes[pad + side];
        windows.dilation[side] = dilation < 0 ? 1 : (size_t)node->attributes[dilation + side];
    }
    windows.rows = (windows.height + 2 * windows.pad[0] - pk__reach(&windows, 0)) / windows.stride[0] + 1;
    windows.columns = (windows.width + 2 * windows.pad[1] - pk__reach(&windows, 1)) / windows.stride[1] + 1;
    return windows;
}

/* The input's shape, kept in the node. */
static pk_status pk__image_input(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    char text[PK_SHAPE_TEXT];
    if (input->rank != 3)
        return pk__fail(context, PK_SHAPE,
                        "%s needs images of channels x height x width, not values of shape %s",
                        node->operation->name, pk_shape_text(input, text));
    for (int i = 0; i < 3; i++)
        node->attributes[PK__IMAGE_CHANNELS + i] = (double)input->dims[i];
    node->shape = *input;
    return PK_OK;
}

/* Whether the windows fit; the shape of the output, of as many channels as the input. */
static pk_status pk__image_shape(pk_context *context, const pk_graph *graph, pk_node *node, int kernel,
                                 int stride, int pad, int dilation)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    pk_status status = pk__image_input(context, graph, node);
    if (status)
        return status;
    pk_shape reach = *input, padded = *input;
    char texts[3][PK_SHAPE_TEXT];
    reach.rank = 2;
    for (int side = 0; side < 2; side++) {
        const size_t step = dilation < 0 ? 1 : (size_t)node->attributes[dilation + side];
        reach.dims[side] = ((size_t)node->attributes[kernel + side] - 1) * step + 1;
        padded.dims[1 + side] += 2 * (size_t)node->attributes[pad + side];
    }
    if (reach.dims[0] > padded.dims[1] || reach.dims[1] > padded.dims[2])
        return pk__fail(context, PK_SHAPE,
                        "%s: a kernel that reaches over %s is larger than the input %s padded to %s",
                        node->operation->name, pk_shape_text(&reach, texts[0]), pk_shape_text(input, texts[1]),
                        pk_shape_text(&padded, texts[2]));
    const pk__windows windows = pk__windows_at(node, kernel, stride, pad, dilation);
    node->shape.dims[1] = windows.rows;
    node->shape.dims[2] = windows.columns;
    return PK_OK;
}

/* ---- conv -------------------------------------------------------------------------------------------- */

/* conv C KxK [stride=1] [pad=0] [dilation=1] [groups=1] [nobias]: PyTorch's Conv2d, padded with zeros. A group takes
 * in channels to out channels: y = W x + b over patches x (in x kernel), W (groups, out, patch), b (groups, out). */
typedef struct pk__convolution {
    pk__windows windows;
    size_t groups, in, out, plane, patch, positions;
    size_t band;   /* rows of an output whose patches are in scratch at a time */
    int pointwise; /* the patches are the input */
    int aligned;   /* an output's rows are as long as the input's, and step by one */
    int thin;      /* products too small for BLIS */
} pk__convolution;

enum { PK__BAND_NUMBERS = 1 << 15, PK__BAND_POSITIONS = 64, PK__THIN_PRODUCT = 1 << 12 };

static pk__convolution pk__convolution_of(const pk_node *node)
{
    pk__convolution c;
    c.windows = pk__windows_at(node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE, PK_CONVOLUTION_PAD,
                               PK_CONVOLUTION_DILATION);
    const pk__windows *w = &c.windows;
    c.groups = (size_t)node->attributes[PK_CONVOLUTION_GROUPS];
    c.in = (size_t)node->attributes[PK__IMAGE_CHANNELS] / c.groups;
    c.out = (size_t)node->attributes[PK_CONVOLUTION_CHANNELS] / c.groups;
    c.plane = w->height * w->width;
    c.patch = c.in * w->kernel[0] * w->kernel[1];
    c.positions = w->rows * w->columns;
    c.pointwise = w->kernel[0] * w->kernel[1] * w->stride[0] * w->stride[1] == 1 && w->pad[0] + w->pad[1] == 0;
    c.aligned = w->stride[0] * w->stride[1] == 1 && w->columns == w->width;
    c.thin = c.out * c.patch * c.positions <= PK__THIN_PRODUCT || c.out < 2;
    c.band = pk__max(PK__BAND_NUMBERS / c.patch, PK__BAND_POSITIONS) / w->columns;
    c.band = c.pointwise ? w->rows : pk__min(pk__max(c.band, 1), w->rows);
    return c;
}

static pk_status pk__convolution_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double channels = node->attributes[PK_CONVOLUTION_CHANNELS],
                 groups = node->attributes[PK_CONVOLUTION_GROUPS];
    pk_status status = pk__image_shape(context, graph, node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE,
                                       PK_CONVOLUTION_PAD, PK_CONVOLUTION_DILATION);
    if (status)
        return status;
    if (fmod(channels, groups) != 0 || fmod(node->attributes[PK__IMAGE_CHANNELS], groups) != 0)
        return pk__fail(context, PK_SHAPE, "conv: %g groups do not divide its %g input and %g output channels",
                        groups, node->attributes[PK__IMAGE_CHANNELS], channels);
    const double patch = node->attributes[PK__IMAGE_CHANNELS] / groups *
                         node->attributes[PK_CONVOLUTION_KERNEL] * node->attributes[PK_CONVOLUTION_KERNEL + 1];
    const double positions = (double)node->shape.dims[1] * (double)node->shape.dims[2];
    if (patch * channels > (double)(SIZE_MAX / 4096) || patch * positions > (double)(SIZE_MAX / 4096))
        return pk__fail(context, PK_OVERFLOW, "conv: its weights or patches overflow");
    const pk__convolution c = pk__convolution_of(node);
    node->shape.dims[0] = (size_t)channels;
    node->weight_count = node->shape.dims[0] * c.patch;
    node->positions = c.positions;
    node->fan_in = c.patch;
    node->fan_out = node->shape.dims[0];
    /* One window that is the whole image is the input itself, in the same order. */
    node->unfolds = c.positions != 1 || c.patch != graph->nodes[node->inputs[0]].width ||
                    c.windows.pad[0] + c.windows.pad[1] != 0;
    pk__node_tensor(node, 4, node->fan_out, (size_t)(node->attributes[PK__IMAGE_CHANNELS] / groups));
    for (int i = 0; i < 2; i++)
        node->tensors[0].shape.dims[2 + i] = (size_t)node->attributes[PK_CONVOLUTION_KERNEL + i];
    if (node->attributes[PK_CONVOLUTION_BIAS] != 0) {
        pk__node_tensor(node, 1, node->fan_out, 0);
        node->weight_count += node->fan_out;
    }
    if (c.groups > 1)
        node->tangent_form = PK_TANGENT_ROWS;
    return PK_OK;
}

static size_t pk__convolution_scratch(const pk_node *node, size_t rows, size_t copies)
{
    const pk__convolution c = pk__convolution_of(node);
    (void)rows, (void)copies;
    return c.pointwise ? 0 : c.patch * c.band * c.windows.columns;
}

/* As Conv2d's reset_parameters, and torch.nn.init's fans. */
static void pk__convolution_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    const pk_initial kind = (pk_initial)(int)node->attributes[PK_CONVOLUTION_INITIAL];
    const pk__convolution c = pk__convolution_of(node);
    const size_t fan_out = node->fan_out * (c.patch / c.in), own = node->fan_out * c.patch;
    const int biases = kind == PK_INITIAL_DEFAULT || kind == PK_INITIAL_STANDARD;
    memset(weights + own, 0, (node->weight_count - own) * sizeof *weights);
    pk__initialize_matrix(kind, node->attributes[PK_CONVOLUTION_GAIN], c.patch, fan_out,
                          biases ? node->weight_count : own, random, weights);
}

/* How many steps of stride reach over count. */
static size_t pk__steps(size_t count, size_t stride)
{
    return stride == 1 ? count : pk__blocks(count, stride); /* spares a division where there are many */
}

/* The outputs from first up to past of which tap number of a side is on the plane. */
static void pk__tap_range(const pk__windows *windows, int side, size_t number, size_t *first, size_t *past)
{
    const size_t size = side ? windows->width : windows->height, stride = windows->stride[side];
    const size_t offset = number * windows->dilation[side], pad = windows->pad[side];
    *past = offset < size + pad ? pk__steps(size + pad - offset, stride) : 0;
    *past = pk__min(*past, side ? windows->columns : windows->rows);
    *first = offset < pad ? pk__steps(pad - offset, stride) : 0;
    *first = pk__min(*first, *past);
}

/* The number in the plane of tap (i, j) of output (y, x). */
static size_t pk__tap_number(const pk__windows *windows, size_t i, size_t j, size_t y, size_t x)
{
    return (y * windows->stride[0] + i * windows->dilation[0] - windows->pad[0]) * windows->width +
           x * windows->stride[1] + j * windows->dilation[1] - windows->pad[1];
}

/* What a tap (i, j) has of the output rows from top up to bottom, in patches: rows from first up to past of it, in
 * these numbers from left up to right; they start at number place of the plane. */
typedef struct pk__stretch {
    size_t first, past, left, right, place;
} pk__stretch;

static pk__stretch pk__stretch_of(const pk__windows *w, size_t i, size_t j, size_t top, size_t bottom)
{
    pk__stretch s;
    pk__tap_range(w, 0, i, &s.first, &s.past);
    pk__tap_range(w, 1, j, &s.left, &s.right);
    s.first = pk__max(s.first, top);
    s.past = pk__min(s.past, bottom);
    s.place = 0;
    if (s.first < s.past && s.left < s.right)
        s.place = pk__tap_number(w, i, j, s.first, s.left);
    else
        s.first = s.past = top;
    s.first -= top;
    s.past -= top;
    return s;
}

/* Zeros at both ends of a stretch's rows. */
static void pk__clear_ends(const pk__stretch *stretch, size_t columns, pk_real *rows)
{
    if (stretch->left == 0 && stretch->right == columns)
        return;
    for (size_t y = stretch->first; y < stretch->past; y++) {
        for (size_t x = 0; x < stretch->left; x++)
            rows[y * columns + x] = 0;
        for (size_t x = stretch->right; x < columns; x++)
            rows[y * columns + x] = 0;
    }
}

/* patches (patch x (bottom - top) columns) of a group's channels, for the output rows from top up to bottom. */
static void pk__unfold_band(const pk__convolution *c, const pk_real *in, size_t top, size_t bottom,
                            pk_real *patches)
{
    const pk__windows *w = &c->windows;
    const size_t columns = w->columns, step = w->stride[1], rows = bottom - top;
    const size_t taps = w->kernel[0] * w->kernel[1];
    for (size_t tap = 0, i = 0, j = 0; tap < taps; tap++, j++) {
        if (j == w->kernel[1])
            i++, j = 0;
        const pk__stretch s = pk__stretch_of(w, i, j, top, bottom);
        for (size_t channel = 0; channel < c->in; channel++) {
            const pk_real *from = in + channel * c->plane + s.place;
            pk_real *to = patches + (channel * taps + tap) * rows * columns;
            memset(to, 0, s.first * columns * sizeof *to);
            if (c->aligned && s.past > s.first)
                memcpy(to + s.first * columns + s.left, from,
                       ((s.past - s.first - 1) * columns + s.right - s.left) * sizeof *to);
            else
                for (size_t y = s.first; y < s.past; y++, from += w->stride[0] * w->width)
                    for (size_t x = s.left; x < s.right; x++)
                        to[y * columns + x] = from[(x - s.left) * step];
            pk__clear_ends(&s, columns, to);
            memset(to + s.past * columns, 0, (rows - s.past) * columns * sizeof *to);
        }
    }
}

/* in += the sum of patches at their places: the transpose of pk__unfold_band. Overwrites patches. */
static void pk__fold_band(const pk__convolution *c, pk_real *patches, size_t top, size_t bottom, pk_real *in)
{
    const pk__windows *w = &c->windows;
    const size_t columns = w->columns, step = w->stride[1], rows = bottom - top;
    const size_t taps = w->kernel[0] * w->kernel[1];
    for (size_t tap = 0, i = 0, j = 0; tap < taps; tap++, j++) {
        if (j == w->kernel[1])
            i++, j = 0;
        const pk__stretch s = pk__stretch_of(w, i, j, top, bottom);
        for (size_t channel = 0; channel < c->in; channel++) {
            pk_real *to = in + channel * c->plane + s.place;
            pk_real *from = patches + (channel * taps + tap) * rows * columns;
            if (c->aligned && s.past > s.first) {
                const size_t count = (s.past - s.first - 1) * columns + s.right - s.left;
                pk__clear_ends(&s, columns, from);
                from += s.first * columns + s.left;
                for (size_t x = 0; x < count; x++)
                    to[x] += from[x];
            } else
                for (size_t y = s.first; y < s.past; y++, to += w->stride[0] * w->width)
                    for (size_t x = s.left; x < s.right; x++)
                        to[(x - s.left) * step] += from[y * columns + x];
        }
    }
}

/* pk__gemm, or the same by hand where its fixed cost is most of it. */
static void pk__patch_product(const pk__convolution *c, int transpose_a, int transpose_b, size_t m, size_t n,
                              size_t k, const pk_real *a, size_t lda, const pk_real *b, size_t ldb, int add,
                              pk_real *to, size_t ld)
{
    if (!c->thin) {
        pk__gemm(transpose_a, transpose_b, m, n, k, 1, a, lda, b, ldb, add ? 1 : 0, to, ld);
        return;
    }
    const size_t down = transpose_a ? 1 : lda, along = transpose_a ? lda : 1;
    for (size_t i = 0; i < m; i++, a += down, to += ld) {
        if (!add)
            memset(to, 0, n * sizeof *to);
        if (transpose_b)
            for (size_t j = 0; j < n; j++) {
                const pk_real *x = a, *y = b + j * ldb;
                pk_real sum[4] = {0, 0, 0, 0};
                size_t p = 0;
                for (; p + 4 <= k; p += 4)
                    for (size_t q = 0; q < 4; q++)
                        sum[q] += x[p + q] * y[p + q];
                for (; p < k; p++)
                    sum[0] += x[p] * y[p];
                to[j] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
        else
            for (size_t p = 0; p < k; p++) {
                const pk_real factor = a[p * along], *y = b + p * ldb;
                for (size_t j = 0; j < n; j++)
                    to[j] += factor * y[j];
            }
    }
}

/* out (channels x positions) = the bias of each channel. */
static void pk__spread_biases(size_t channels, size_t positions, const pk_real *biases, pk_real *out)
{
    for (size_t channel = 0; channel < channels; channel++)
        for (size_t q = 0; q < positions; q++)
            *out++ = biases[channel];
}

/* biases += the sums over positions of delta (channels x positions). */
static void pk__gather_biases(size_t channels, size_t positions, const pk_real *delta, pk_real *biases)
{
    for (size_t channel = 0; channel < channels; channel++)
        for (size_t q = 0; q < positions; q++)
            biases[channel] += *delta++;
}

/* out (positions x patch) for each row. */
static void pk__convolution_unfold(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const pk__windows *w = &c.windows;
    pk_real *to = call->out;
    for (size_t place = 0; place < call->rows * c.positions; place++) {
        const size_t row = place / c.positions, q = place % c.positions;
        const size_t top = q / w->columns * w->stride[0] - w->pad[0],
                     left = q % w->columns * w->stride[1] - w->pad[1];
        const pk_real *from = call->in[0] + row * call->in_width[0];
        for (size_t channel = 0; channel < c.in; channel++, from += c.plane)
            for (size_t i = 0, y = top; i < w->kernel[0]; i++, y += w->dilation[0])
                for (size_t j = 0, x = left; j < w->kernel[1]; j++, x += w->dilation[1])
                    *to++ = y < w->height && x < w->width ? from[y * w->width + x] : 0;
    }
}

/* out = W in + b for each row, or out (+)= W in. */
static void pk__convolve(const pk_call *call, const pk_real *weights, const pk_real *in, int bias, int add,
                         pk_real *out)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t channels = c.groups * c.out, columns = c.windows.columns;
    bias = bias && call->node->attributes[PK_CONVOLUTION_BIAS] != 0;
    const pk_real *biases = weights + channels * c.patch;
    for (size_t row = 0; row < call->rows; row++, in += call->in_width[0], out += call->node->width) {
        if (bias)
            pk__spread_biases(channels, c.positions, biases, out);
        for (size_t group = 0; group < c.groups; group++) {
            const pk_real *own = weights + group * c.out * c.patch, *from = in + group * c.in * c.plane;
            pk_real *to = out + group * c.out * c.positions;
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), count = (bottom - top) * columns;
                if (!c.pointwise)
                    pk__unfold_band(&c, from, top, bottom, call->scratch);
                pk__patch_product(&c, 0, 0, c.out, count, c.patch, own, c.patch,
                                  c.pointwise ? from : call->scratch, count, bias || add, to + top * columns,
                                  c.positions);
            }
        }
    }
}

static void pk__convolution_forward(const pk_call *call)
{
    pk__convolve(call, call->weights, call->in[0], 1, 0, call->out);
}

static void pk__convolution_tangent(const pk_call *call)
{
    if (call->direction)
        pk__convolve(call, call->direction, call->in[0], 1, 0, call->out_tangent);
    if (call->in_tangent[0])
        pk__convolve(call, call->weights, call->in_tangent[0], 0, call->direction != NULL, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__convolution_reverse(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t columns = c.windows.columns;
    const pk_real *delta = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        for (size_t group = 0; group < c.groups; group++, to += c.in * c.plane, delta += c.out * c.positions) {
            const pk_real *own = call->weights + group * c.out * c.patch;
            if (!c.pointwise && !call->accumulate[0])
                memset(to, 0, c.in * c.plane * sizeof *to);
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), count = (bottom - top) * columns;
                pk__patch_product(&c, 1, 0, c.patch, count, c.out, own, c.patch, delta + top * columns,
                                  c.positions, c.pointwise && call->accumulate[0],
                                  c.pointwise ? to : call->scratch, count);
                if (!c.pointwise)
                    pk__fold_band(&c, call->scratch, top, bottom, to);
            }
        }
}

/* gradient (weights) += that of each row, or gradient[row][copy] = that of each copy. */
static void pk__convolution_gradients(const pk_call *call, int sum)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t columns = c.windows.columns, width = call->node->width, count = call->node->weight_count;
    const size_t biases = c.groups * c.out * c.patch;
    if (!sum)
        memset(call->gradient, 0, call->rows * call->copies * count * sizeof(pk_real));
    for (size_t row = 0; row < call->rows; row++) {
        const pk_real *in = call->in[0] + row * call->in_width[0];
        const size_t first = row * call->copies;
        for (size_t group = 0; group < c.groups; group++, in += c.in * c.plane)
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), band = (bottom - top) * columns;
                if (!c.pointwise)
                    pk__unfold_band(&c, in, top, bottom, call->scratch);
                for (size_t copy = first; copy < first + call->copies; copy++) {
                    pk_real *to = call->gradient + (sum ? 0 : copy * count) + group * c.out * c.patch;
                    const pk_real *delta = call->out_cotangent + copy * width + group * c.out * c.positions;
                    pk__patch_product(&c, 0, 1, c.out, c.patch, band, delta + top * columns, c.positions,
                                      c.pointwise ? in : call->scratch, band, 1, to, c.patch);
                }
            }
        for (size_t copy = first; count > biases && copy < first + call->copies; copy++)
            pk__gather_biases(c.groups * c.out, c.positions, call->out_cotangent + copy * width,
                              call->gradient + (sum ? 0 : copy * count) + biases);
    }
}

static void pk__convolution_weight_gradient(const pk_call *call)
{
    pk__convolution_gradients(call, 1);
}

static void pk__convolution_row_gradients(const pk_call *call)
{
    pk__convolution_gradients(call, 0);
}

/* ---- pools ------------------------------------------------------------------------------------------- */

static pk__windows pk__pool_windows(const pk_node *node)
{
    return pk__windows_at(node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
}

static pk_status pk__pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    double *stride = node->attributes + PK_POOL_STRIDE;
    const double *kernel = node->attributes + PK_POOL_KERNEL, *pad = node->attributes + PK_POOL_PAD;
    for (int side = 0; side < 2; side++) {
        if (stride[side] == 0)
            stride[side] = kernel[side];
        if (2 * pad[side] > kernel[side])
            return pk__fail(context, PK_SHAPE, "%s: padding of %gx%g is more than half of its kernel, %gx%g",
                            node->operation->name, pad[0], pad[1], kernel[0], kernel[1]);
    }
    return pk__image_shape(context, graph, node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
}

/* max_pool K [stride=K] [pad=0]: PyTorch's MaxPool2d; padding is never the maximum. */

/* The number in its plane of a window's first maximum, or of its last NaN, as PyTorch's. */
static size_t pk__window_maximum(const pk__windows *w, const pk_real *plane, size_t y, size_t x)
{
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < w->kernel[0]; i++)
        for (size_t j = 0; j < w->kernel[1]; j++) {
            const size_t row = y * w->stride[0] + i - w->pad[0], column = x * w->stride[1] + j - w->pad[1];
            const size_t at = row * w->width + column;
            if (row < w->height && column < w->width &&
                (best == SIZE_MAX || plane[at] > plane[best] || isnan(plane[at])))
                best = at;
        }
    return best;
}

/* The same for output number output of an image: its number in the image. */
static size_t pk__pool_maximum(const pk__windows *w, const pk_real *image, size_t output)
{
    const size_t positions = w->rows * w->columns, plane = output / positions * w->height * w->width;
    return plane + pk__window_maximum(w, image + plane, output % positions / w->columns, output % w->columns);
}

/* to[output] = from[the first maximum of the output's window in the input] */
static void pk__pool_pick(const pk_call *call, const pk_real *from, pk_real *to)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real *in = call->in[0];
    for (size_t row = 0; row < call->rows; row++, in += call->in_width[0], from += call->in_width[0])
        for (size_t output = 0; output < call->node->width; output++)
            *to++ = from[pk__pool_maximum(&w, in, output)];
}

static void pk__max_pool_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t in = call->in_width[0], width = call->node->width, copies = call->copies;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * copies * in * sizeof(pk_real));
    for (size_t row = 0; row < call->rows; row++)
        for (size_t output = 0; output < width; output++) {
            const size_t at = pk__pool_maximum(&w, call->in[0] + row * in, output);
            for (size_t copy = row * copies; copy < (row + 1) * copies; copy++)
                call->in_cotangent[0][copy * in + at] += call->out_cotangent[copy * width + output];
        }
}

/* Whether the window in front of number at of a side, which starts stride earlier, has number last, too. */
static int pk__in_window_before(const pk__windows *w, int side, size_t at, size_t last)
{
    return at > 0 && last + w->pad[side] < (at - 1) * w->stride[side] + w->kernel[side];
}

/* Differences of the pairs of numbers that are in one window, each pair once: their number is pk__pool_pairs.
 * A pair that is in several windows is reported with the first of them. */
static size_t pk__pool_differences(const pk__windows *w, const pk_real *plane, pk_real *out)
{
    const size_t taps = w->kernel[0] * w->kernel[1];
    size_t count = 0;
    for (size_t y = 0; y < w->rows; y++)
        for (size_t x = 0; x < w->columns; x++)
            for (size_t a = 0; a < taps; a++)
                for (size_t b = a + 1; b < taps; b++) {
                    const size_t top = y * w->stride[0] - w->pad[0], left = x * w->stride[1] - w->pad[1];
                    const size_t row[2] = {top + a / w->kernel[1], top + b / w->kernel[1]};
                    const size_t column[2] = {left + a % w->kernel[1], left + b % w->kernel[1]};
                    if (row[0] >= w->height || row[1] >= w->height || column[0] >= w->width ||
                        column[1] >= w->width || pk__in_window_before(w, 0, y, row[1]) ||
                        pk__in_window_before(w, 1, x, pk__max(column[0], column[1])))
                        continue;
                    out[count++] = plane[row[0] * w->width + column[0]] - plane[row[1] * w->width + column[1]];
                }
    return count;
}

/* avg_pool K [stride=K] [pad=0]: PyTorch's AvgPool2d; padding counts as zeros. */
static void pk__average(const pk_call *call, const pk_real *in, pk_real *out)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real factor = (pk_real)(1 / ((double)w.kernel[0] * (double)w.kernel[1]));
    const size_t planes = call->rows * call->node->shape.dims[0];
    for (size_t plane = 0; plane < planes; plane++, in += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++)
            for (size_t x = 0; x < w.columns; x++) {
                pk_real sum = 0;
                for (size_t i = 0; i < w.kernel[0]; i++)
                    for (size_t j = 0; j < w.kernel[1]; j++) {
                        const size_t row = y * w.stride[0] + i - w.pad[0],
                                     column = x * w.stride[1] + j - w.pad[1];
                        if (row < w.height && column < w.width)
                            sum += in[row * w.width + column];
                    }
                *out++ = factor * sum;
            }
}

static void pk__average_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real factor = (pk_real)(1 / ((double)w.kernel[0] * (double)w.kernel[1]));
    const size_t planes = call->rows * call->copies * call->node->shape.dims[0];
    const pk_real *delta = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    if (!call->accumulate[0])
        memset(to, 0, call->rows * call->copies * call->in_width[0] * sizeof *to);
    for (size_t plane = 0; plane < planes; plane++, to += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++)
            for (size_t x = 0; x < w.columns; x++, delta++)
                for (size_t i = 0; i < w.kernel[0]; i++)
                    for (size_t j = 0; j < w.kernel[1]; j++) {
                        const size_t row = y * w.stride[0] + i - w.pad[0],
                                     column = x * w.stride[1] + j - w.pad[1];
                        if (row < w.height && column < w.width)
                            to[row * w.width + column] += factor * *delta;
                    }
}

static void pk__max_pool_forward(const pk_call *call)
{
    pk__pool_pick(call, call->in[0], call->out);
}

static void pk__max_pool_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__pool_pick(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* Of one side: the pairs (a, b) of numbers that are in one window, in either order and with themselves, and the numbers that
 * are in some window. Windows that reach over neither end are all alike: the work is in those that do. */
static void pk__side_pairs(const pk__windows *w, int side, double *pairs, double *numbers)
{
    const size_t size = side ? w->width : w->height, count = side ? w->columns : w->rows;
    const size_t kernel = w->kernel[side], stride = w->stride[side], pad = w->pad[side];
    /* Windows first .. past - 1 reach over no end. */
    const size_t first = pk__min(count, pk__blocks(pad, stride));
    const size_t past =
        pk__max(first, size + pad < kernel ? 0 : pk__min(count, (size + pad - kernel) / stride + 1));
    double some = 0;
    *numbers = 0;
    for (size_t at = 0, before = 0; at < count; at++) {
        const size_t start = at * stride, low = start < pad ? 0 : start - pad;
        const size_t high = pk__min(size, start + kernel < pad ? 0 : start + kernel - pad);
        const double in = high > low ? (double)(high - low) : 0,
                     both = before > low ? (double)(before - low) : 0;
        double times = 1;
        if (at > first && at < past) { /* this one, and those that are like it */
            times = (double)(past - at);
            at = past - 1;
        }
        before = times > 1 ? at * stride - pad + kernel : high;
        some += times * (in * (in + 1) - both * (both + 1)) / 2;
        *numbers += times * (in - both);
    }
    *pairs = 2 * some - *numbers;
}

/* The pairs of two numbers of a plane that are in one window: their rows are, and their columns. */
static double pk__pool_pairs(const pk__windows *w)
{
    double pairs[2], numbers[2];
    for (int side = 0; side < 2; side++)
        pk__side_pairs(w, side, &pairs[side], &numbers[side]);
    return (pairs[0] * pairs[1] - numbers[0] * numbers[1]) / 2;
}

static pk_status pk__max_pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__pool_shape(context, graph, node);
    if (status)
        return status;
    const pk__windows w = pk__pool_windows(node);
    const double taps = node->attributes[PK_POOL_KERNEL] * node->attributes[PK_POOL_KERNEL + 1];
    if (taps * taps * (double)w.rows * (double)w.columns * (double)node->shape.dims[0] > 1e9)
        return pk__fail(context, PK_UNSUPPORTED,
                        "max_pool: windows of %g numbers have too many pairs whose order would be watched",
                        taps);
    node->attributes[PK__POOL_SWITCHES] = (double)node->shape.dims[0] * pk__pool_pairs(&w);
    return PK_OK;
}

static size_t pk__max_pool_switch_count(const pk_node *node)
{
    return (size_t)node->attributes[PK__POOL_SWITCHES];
}

static void pk__max_pool_switches(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t planes = call->rows * call->node->shape.dims[0];
    pk_real *out = call->out;
    for (size_t plane = 0; plane < planes; plane++)
        out += pk__pool_differences(&w, call->in[0] + plane * w.height * w.width, out);
}

static void pk__average_forward(const pk_call *call)
{
    pk__average(call, call->in[0], call->out);
}

static void pk__average_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__average(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* global_avg_pool: the mean of each channel, one number of it. */
static pk_status pk__global_average_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__image_input(context, graph, node);
    for (int side = 0; side < 2; side++) {
        node->attributes[PK_POOL_KERNEL + side] = node->attributes[PK__IMAGE_HEIGHT + side];
        node->attributes[PK_POOL_STRIDE + side] = 1;
        node->attributes[PK_POOL_PAD + side] = 0;
    }
    node->shape.rank = 1;
    return status;
}

static const pk_option pk__convolution_options[] = {
    {.name = "channels",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_CONVOLUTION_CHANNELS,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "kernel",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_CONVOLUTION_KERNEL,
     .position = 2,
     .required = 1,
     .least = 1,
     .most = 1e6,
     .whole = 1},
    {.name = "stride",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_CONVOLUTION_STRIDE,
     .least = 1,
     .most = 1e6,
     .whole = 1},
    {.name = "pad", .kind = PK_OPTION_PAIR, .attribute = PK_CONVOLUTION_PAD, .most = 1e6, .whole = 1},
    {.name = "dilation",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_CONVOLUTION_DILATION,
     .least = 1,
     .most = 1e6,
     .whole = 1},
    {.name = "groups",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_CONVOLUTION_GROUPS,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "nobias", .kind = PK_OPTION_FLAG, .attribute = PK_CONVOLUTION_BIAS},
    PK__INITIAL_OPTIONS(PK_CONVOLUTION_INITIAL),
    {.name = NULL},
};
static const pk_option pk__pool_options[] = {
    {.name = "kernel",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_POOL_KERNEL,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e6,
     .whole = 1},
    {.name = "stride", .kind = PK_OPTION_PAIR, .attribute = PK_POOL_STRIDE, .most = 1e6, .whole = 1},
    {.name = "pad", .kind = PK_OPTION_PAIR, .attribute = PK_POOL_PAD, .most = 1e6, .whole = 1},
    {.name = NULL},
};

static const pk_operation pk__image_operations[] = {
    {.name = "conv",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_OUTER,
     .linear_in_weights = 1,
     .options = pk__convolution_options,
     .defaults = {0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, PK_INITIAL_DEFAULT, 1},
     .shape = pk__convolution_shape,
     .scratch = pk__convolution_scratch,
     .forward = pk__convolution_forward,
     .tangent = pk__convolution_tangent,
     .reverse = pk__convolution_reverse,
     .weight_gradient = pk__convolution_weight_gradient,
     .row_gradients = pk__convolution_row_gradients,
     .unfold = pk__convolution_unfold,
     .channels_first = 1,
     .initialize = pk__convolution_initialize},
    {.name = "max_pool",
     .smoothness = PK_PIECEWISE_LINEAR,
     .linear_in_weights = 1,
     .options = pk__pool_options,
     .shape = pk__max_pool_shape,
     .forward = pk__max_pool_forward,
     .tangent = pk__max_pool_tangent,
     .reverse = pk__max_pool_reverse,
     .switch_count = pk__max_pool_switch_count,
     .switches = pk__max_pool_switches},
    {.name = "avg_pool",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .options = pk__pool_options,
     .shape = pk__pool_shape,
     .forward = pk__average_forward,
     .tangent = pk__average_tangent,
     .reverse = pk__average_reverse},
    PK__LINEAR_OPERATION("global_avg_pool", pk__global_average_shape, pk__average_forward, pk__average_tangent,
                         pk__average_reverse),
};

PK__END_CODE
/* <<< implementation */
#endif
