/* pathkernel/network/image.h: operations on images of channels x height x width, and on signals of channels x length, which
 * are images of height 1: convolution, its transpose, pooling and upsampling. */
#ifndef PATHKERNEL_IMAGE_H
#define PATHKERNEL_IMAGE_H
#include "dense.h"
#include "shape.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of conv and conv_transpose, of the pools, and of upsample, for pk_graph_add; pairs are height, width. Of signals
 * both numbers of a pair are alike, or the first is that of a height of 1. */
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
/* conv_transpose has these instead of initialization and gain: its weights start as PyTorch's. */
enum { PK_CONVOLUTION_OUTPUT_PAD = PK_CONVOLUTION_INITIAL };
enum {
    PK_POOL_KERNEL, /* of the adaptive pools: the output's sizes */
    PK_POOL_STRIDE = 2 /* 0: the kernel */,
    PK_POOL_PAD = 4,
    PK_POOL_CEIL = 6,
    PK_POOL_SKIP_PAD /* of avg_pool: 0: padding counts as zeros; 1: it is left out */
};
enum { PK_UPSAMPLE_FACTOR, PK_UPSAMPLE_MODE = 2, PK_UPSAMPLE_CORNERS };
typedef enum pk_upsample_mode { PK_UPSAMPLE_NEAREST, PK_UPSAMPLE_LINEAR } pk_upsample_mode;

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
enum { PK__POOL_ADAPTIVE = 11, PK__POOL_SWITCHES, PK__IMAGE_CHANNELS, PK__IMAGE_HEIGHT, PK__IMAGE_WIDTH };

/* ---- windows ----------------------------------------------------------------------------------------- */

/* Windows on a padded plane: tap (i, j) of output (y, x) is number (y stride + i dilation - pad) of height, likewise
 * of width. Where that is in front of the plane it wraps to a number far behind it. */
typedef struct pk__windows {
    size_t height, width, rows, columns; /* of input and output */
    size_t kernel[2], stride[2], pad[2], dilation[2];
    int adaptive; /* window i of n is that of the numbers from i / n up to (i + 1) / n of a side */
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
    windows.adaptive = 0;
    windows.rows = (windows.height + 2 * windows.pad[0] - pk__reach(&windows, 0)) / windows.stride[0] + 1;
    windows.columns = (windows.width + 2 * windows.pad[1] - pk__reach(&windows, 1)) / windows.stride[1] + 1;
    return windows;
}

/* The input's shape, kept in the node: images of channels x height x width, or signals of channels x length. */
static pk_status pk__image_input(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    char text[PK_SHAPE_TEXT];
    if (input->rank != 3 && input->rank != 2)
        return pk__fail(
            context, PK_SHAPE,
            "%s needs images of channels x height x width or signals of channels x length, not values of "
            "shape %s",
            node->operation->name, pk_shape_text(input, text));
    node->attributes[PK__IMAGE_CHANNELS] = (double)input->dims[0];
    node->attributes[PK__IMAGE_HEIGHT] = input->rank == 3 ? (double)input->dims[1] : 1;
    node->attributes[PK__IMAGE_WIDTH] = (double)input->dims[input->rank - 1];
    node->shape = *input;
    return PK_OK;
}

/* The output of an image or a signal. */
static void pk__image_output(pk_node *node, size_t channels, size_t rows, size_t columns)
{
    node->shape.dims[0] = channels;
    if (node->shape.rank == 3)
        node->shape.dims[1] = rows;
    node->shape.dims[node->shape.rank - 1] = columns;
}

/* For signals, a pair of an option is that of a height of 1: what changes nothing, and the one number that was said. */
PK__PRIVATE pk_status pk__signal_pair(pk_context *context, const char *name, const char *option, double neutral,
                                      const pk_shape *input, double *pair)
{
    if (input->rank != 2)
        return PK_OK;
    if (pair[0] != pair[1] && pair[0] != neutral)
        return pk__fail(context, PK_SHAPE, "%s: for signals of channels x length, %s is one number, not %gx%g",
                        name, option, pair[0], pair[1]);
    pair[0] = neutral;
    return PK_OK;
}

/* A count of so many numbers is in the range of size_t, and that of its bytes. */
static int pk__is_countable(double count)
{
    return count <= (double)(SIZE_MAX / 4096);
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
    int fits = 1;
    reach.rank = input->rank - 1;
    for (int side = 3 - input->rank; side < 2; side++) {
        const size_t step = dilation < 0 ? 1 : (size_t)node->attributes[dilation + side];
        const int own = side + input->rank - 3;
        reach.dims[own] = ((size_t)node->attributes[kernel + side] - 1) * step + 1;
        padded.dims[1 + own] += 2 * (size_t)node->attributes[pad + side];
        fits &= reach.dims[own] <= padded.dims[1 + own];
    }
    if (!fits)
        return pk__fail(context, PK_SHAPE,
                        "%s: a kernel that reaches over %s is larger than the input %s padded to %s",
                        node->operation->name, pk_shape_text(&reach, texts[0]), pk_shape_text(input, texts[1]),
                        pk_shape_text(&padded, texts[2]));
    const pk__windows windows = pk__windows_at(node, kernel, stride, pad, dilation);
    pk__image_output(node, input->dims[0], windows.rows, windows.columns);
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

static pk__convolution pk__convolution_with(const pk_node *node, const pk__windows *w, double in, double out)
{
    pk__convolution c;
    c.windows = *w;
    c.groups = (size_t)node->attributes[PK_CONVOLUTION_GROUPS];
    c.in = (size_t)in / c.groups;
    c.out = (size_t)out / c.groups;
    c.plane = w->height * w->width;
    c.patch = c.in * w->kernel[0] * w->kernel[1];
    c.positions = w->rows * w->columns;
    c.pointwise = w->kernel[0] * w->kernel[1] * w->stride[0] * w->stride[1] == 1 &&
                  w->pad[0] + w->pad[1] == 0 && c.plane == c.positions;
    c.aligned = w->stride[0] * w->stride[1] == 1 && w->columns == w->width;
    c.thin = c.out * c.patch * c.positions <= PK__THIN_PRODUCT || c.out < 2;
    c.band = pk__max(PK__BAND_NUMBERS / c.patch, PK__BAND_POSITIONS) / w->columns;
    c.band = c.pointwise ? w->rows : pk__min(pk__max(c.band, 1), w->rows);
    return c;
}

static pk__convolution pk__convolution_of(const pk_node *node)
{
    const pk__windows windows = pk__windows_at(node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE,
                                               PK_CONVOLUTION_PAD, PK_CONVOLUTION_DILATION);
    return pk__convolution_with(node, &windows, node->attributes[PK__IMAGE_CHANNELS],
                                node->attributes[PK_CONVOLUTION_CHANNELS]);
}

/* Where the input is a signal, its pairs are. */
static pk_status pk__convolution_pairs(pk_context *context, const pk_graph *graph, pk_node *node)
{
    static const struct {
        const char *name;
        int attribute;
        double neutral;
    } pairs[] = {{"kernel", PK_CONVOLUTION_KERNEL, 1},
                 {"stride", PK_CONVOLUTION_STRIDE, 1},
                 {"pad", PK_CONVOLUTION_PAD, 0},
                 {"dilation", PK_CONVOLUTION_DILATION, 1}};
    pk_status status = PK_OK;
    for (int i = 0; i < 4 && !status; i++)
        status = pk__signal_pair(context, node->operation->name, pairs[i].name, pairs[i].neutral,
                                 &graph->nodes[node->inputs[0]].shape, node->attributes + pairs[i].attribute);
    return status;
}

/* Whether groups divide both numbers of channels, and its counts are in range; the shape of its weights, (to, from / groups,
 * kernel), and its biases. */
static pk_status pk__convolution_weights(pk_context *context, pk_node *node, double to, double from,
                                         double biases, double positions)
{
    const double groups = node->attributes[PK_CONVOLUTION_GROUPS],
                 *kernel = node->attributes + PK_CONVOLUTION_KERNEL;
    const int signal = node->shape.rank == 2;
    if (fmod(to, groups) != 0 || fmod(from, groups) != 0)
        return pk__fail(context, PK_SHAPE, "%s: %g groups do not divide its %g input and %g output channels",
                        node->operation->name, groups, node->attributes[PK__IMAGE_CHANNELS],
                        node->attributes[PK_CONVOLUTION_CHANNELS]);
    const double patch = from / groups * kernel[0] * kernel[1];
    if (!pk__is_countable(patch * to) || !pk__is_countable(patch * positions))
        return pk__fail(context, PK_OVERFLOW, "%s: its weights or patches overflow", node->operation->name);
    node->weight_count = (size_t)to * (size_t)patch;
    node->positions = (size_t)positions;
    pk__node_tensor(node, signal ? 3 : 4, (size_t)to, (size_t)(from / groups));
    node->tensors[0].shape.dims[2] = (size_t)kernel[signal];
    node->tensors[0].shape.dims[3] = (size_t)kernel[1];
    if (node->attributes[PK_CONVOLUTION_BIAS] != 0) {
        pk__node_tensor(node, 1, (size_t)biases, 0);
        node->weight_count += (size_t)biases;
    }
    return PK_OK;
}

static pk_status pk__convolution_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double channels = node->attributes[PK_CONVOLUTION_CHANNELS];
    pk_status status = pk__convolution_pairs(context, graph, node);
    if (!status)
        status = pk__image_shape(context, graph, node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE,
                                 PK_CONVOLUTION_PAD, PK_CONVOLUTION_DILATION);
    if (!status)
        status =
            pk__convolution_weights(context, node, channels, node->attributes[PK__IMAGE_CHANNELS], channels,
                                    (double)node->shape.dims[node->shape.rank - 1] *
                                        (node->shape.rank == 3 ? (double)node->shape.dims[1] : 1));
    if (status)
        return status;
    const pk__convolution c = pk__convolution_of(node);
    node->shape.dims[0] = (size_t)channels;
    node->fan_in = c.patch;
    node->fan_out = node->shape.dims[0];
    /* One window that is the whole image is the input itself, in the same order. */
    node->unfolds = c.positions != 1 || c.patch != graph->nodes[node->inputs[0]].width ||
                    c.windows.pad[0] + c.windows.pad[1] != 0;
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

/* out = W in + b for each of count images, or without biases out (+)= W in. */
static void pk__convolve(const pk__convolution *c, pk_real *scratch, size_t count, const pk_real *weights,
                         const pk_real *biases, const pk_real *in, int add, pk_real *out)
{
    const size_t channels = c->groups * c->out, columns = c->windows.columns;
    for (size_t n = 0; n < count; n++) {
        if (biases)
            pk__spread_biases(channels, c->positions, biases, out);
        for (size_t group = 0; group < c->groups;
             group++, in += c->in * c->plane, out += c->out * c->positions) {
            const pk_real *own = weights + group * c->out * c->patch;
            for (size_t top = 0; top < c->windows.rows; top += c->band) {
                const size_t bottom = pk__min(top + c->band, c->windows.rows), band = (bottom - top) * columns;
                if (!c->pointwise)
                    pk__unfold_band(c, in, top, bottom, scratch);
                pk__patch_product(c, 0, 0, c->out, band, c->patch, own, c->patch, c->pointwise ? in : scratch,
                                  band, biases || add, out + top * columns, c->positions);
            }
        }
    }
}

/* to (+)= W^T delta for each of count images. */
static void pk__convolve_back(const pk__convolution *c, pk_real *scratch, size_t count, const pk_real *weights,
                              const pk_real *delta, int add, pk_real *to)
{
    const size_t columns = c->windows.columns;
    for (size_t n = 0; n < count; n++)
        for (size_t group = 0; group < c->groups;
             group++, to += c->in * c->plane, delta += c->out * c->positions) {
            const pk_real *own = weights + group * c->out * c->patch;
            if (!c->pointwise && !add)
                memset(to, 0, c->in * c->plane * sizeof *to);
            for (size_t top = 0; top < c->windows.rows; top += c->band) {
                const size_t bottom = pk__min(top + c->band, c->windows.rows), band = (bottom - top) * columns;
                pk__patch_product(c, 1, 0, c->patch, band, c->out, own, c->patch, delta + top * columns,
                                  c->positions, c->pointwise && add, c->pointwise ? to : scratch, band);
                if (!c->pointwise)
                    pk__fold_band(c, scratch, top, bottom, to);
            }
        }
}

/* The biases behind the weights of a node, NULL where it has none. */
static const pk_real *pk__biases(const pk_node *node, const pk_real *weights)
{
    return node->tensor_count > 1 ? weights + node->tensors[1].first : NULL;
}

static void pk__convolution_forward(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    pk__convolve(&c, call->scratch, call->rows, call->weights, pk__biases(call->node, call->weights),
                 call->in[0], 0, call->out);
}

static void pk__convolution_tangent(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    if (call->direction)
        pk__convolve(&c, call->scratch, call->rows, call->direction, pk__biases(call->node, call->direction),
                     call->in[0], 0, call->out_tangent);
    if (call->in_tangent[0])
        pk__convolve(&c, call->scratch, call->rows, call->weights, NULL, call->in_tangent[0],
                     call->direction != NULL, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__convolution_reverse(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    pk__convolve_back(&c, call->scratch, call->rows * call->copies, call->weights, call->out_cotangent,
                      call->accumulate[0], call->in_cotangent[0]);
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

/* ---- conv_transpose ---------------------------------------------------------------------------------- */

/* conv_transpose C KxK [stride=1] [pad=0] [output_pad=0] [dilation=1] [groups=1] [nobias]: PyTorch's ConvTranspose2d,
 * y = W^T x + b with the convolution W from images like y to images like x; its weights are (in, out / groups, kernel). */
static pk__convolution pk__transpose_of(const pk_node *node)
{
    pk__windows w;
    w.adaptive = 0;
    w.rows = (size_t)node->attributes[PK__IMAGE_HEIGHT];
    w.columns = (size_t)node->attributes[PK__IMAGE_WIDTH];
    w.height = node->shape.rank == 3 ? node->shape.dims[1] : 1;
    w.width = node->shape.dims[node->shape.rank - 1];
    for (int side = 0; side < 2; side++) {
        w.kernel[side] = (size_t)node->attributes[PK_CONVOLUTION_KERNEL + side];
        w.stride[side] = (size_t)node->attributes[PK_CONVOLUTION_STRIDE + side];
        w.pad[side] = (size_t)node->attributes[PK_CONVOLUTION_PAD + side];
        w.dilation[side] = (size_t)node->attributes[PK_CONVOLUTION_DILATION + side];
    }
    return pk__convolution_with(node, &w, node->attributes[PK_CONVOLUTION_CHANNELS],
                                node->attributes[PK__IMAGE_CHANNELS]);
}

static pk_status pk__transpose_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double channels = node->attributes[PK_CONVOLUTION_CHANNELS];
    double *more = node->attributes + PK_CONVOLUTION_OUTPUT_PAD, sizes[2];
    pk_status status = pk__convolution_pairs(context, graph, node);
    if (!status)
        status = pk__signal_pair(context, "conv_transpose", "output_pad", 0,
                                 &graph->nodes[node->inputs[0]].shape, more);
    if (!status)
        status = pk__image_input(context, graph, node);
    for (int side = 0; side < 2 && !status; side++) {
        const double stride = node->attributes[PK_CONVOLUTION_STRIDE + side],
                     dilation = node->attributes[PK_CONVOLUTION_DILATION + side],
                     reach = (node->attributes[PK_CONVOLUTION_KERNEL + side] - 1) * dilation + 1,
                     pad = node->attributes[PK_CONVOLUTION_PAD + side];
        sizes[side] = (node->attributes[PK__IMAGE_HEIGHT + side] - 1) * stride + reach + more[side] - 2 * pad;
        if (more[side] > 0 && more[side] >= stride && more[side] >= dilation)
            status = pk__fail(
                context, PK_SHAPE,
                "conv_transpose: output_pad is %g; it is less than the stride, %g, or the dilation, %g",
                more[side], stride, dilation);
        else if (sizes[side] < 1)
            status = pk__fail(context, PK_SHAPE, "conv_transpose: a padding of %g leaves nothing of its output",
                              pad);
    }
    if (!status && !pk__is_countable(sizes[0] * sizes[1] * channels))
        status = pk__fail(context, PK_OVERFLOW, "conv_transpose: its output overflows");
    if (!status)
        status =
            pk__convolution_weights(context, node, node->attributes[PK__IMAGE_CHANNELS], channels, channels,
                                    node->attributes[PK__IMAGE_HEIGHT] * node->attributes[PK__IMAGE_WIDTH]);
    if (!status)
        pk__image_output(node, (size_t)channels, (size_t)sizes[0], (size_t)sizes[1]);
    return status;
}

static size_t pk__transpose_scratch(const pk_node *node, size_t rows, size_t copies)
{
    const pk__convolution c = pk__transpose_of(node);
    (void)rows, (void)copies;
    return c.pointwise ? 0 : c.patch * c.band * c.windows.columns;
}

/* As ConvTranspose2d's reset_parameters, whose fan-in is that of the convolution it is the transpose of. */
static void pk__transpose_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    const pk__convolution c = pk__transpose_of(node);
    pk__initialize_matrix(PK_INITIAL_DEFAULT, 1, c.patch, 1, node->weight_count, random, weights);
}

static void pk__transpose_apply(const pk_call *call, const pk_real *weights, const pk_real *biases,
                                const pk_real *in, int add, pk_real *out)
{
    const pk__convolution c = pk__transpose_of(call->node);
    for (size_t row = 0; biases && row < call->rows; row++)
        pk__spread_biases(c.groups * c.in, c.plane, biases, out + row * call->node->width);
    pk__convolve_back(&c, call->scratch, call->rows, weights, in, add || biases, out);
}

static void pk__transpose_forward(const pk_call *call)
{
    pk__transpose_apply(call, call->weights, pk__biases(call->node, call->weights), call->in[0], 0, call->out);
}

static void pk__transpose_tangent(const pk_call *call)
{
    if (call->direction)
        pk__transpose_apply(call, call->direction, pk__biases(call->node, call->direction), call->in[0], 0,
                            call->out_tangent);
    if (call->in_tangent[0])
        pk__transpose_apply(call, call->weights, NULL, call->in_tangent[0], call->direction != NULL,
                            call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__transpose_reverse(const pk_call *call)
{
    const pk__convolution c = pk__transpose_of(call->node);
    pk__convolve(&c, call->scratch, call->rows * call->copies, call->weights, NULL, call->out_cotangent,
                 call->accumulate[0], call->in_cotangent[0]);
}

/* gradient (weights) += that of each row, or gradient[row][copy] = that of each copy. */
static void pk__transpose_gradients(const pk_call *call, int sum)
{
    const pk__convolution c = pk__transpose_of(call->node);
    const size_t columns = c.windows.columns, count = call->node->weight_count;
    if (!sum)
        memset(call->gradient, 0, call->rows * call->copies * count * sizeof(pk_real));
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        const pk_real *delta = call->out_cotangent + copy * call->node->width,
                      *in = call->in[0] + copy / call->copies * call->in_width[0];
        pk_real *to = call->gradient + (sum ? 0 : copy * count);
        if (call->node->tensor_count > 1)
            pk__gather_biases(c.groups * c.in, c.plane, delta, to + call->node->tensors[1].first);
        for (size_t group = 0; group < c.groups; group++) {
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), band = (bottom - top) * columns;
                if (!c.pointwise)
                    pk__unfold_band(&c, delta, top, bottom, call->scratch);
                pk__patch_product(&c, 0, 1, c.out, c.patch, band, in + top * columns, c.positions,
                                  c.pointwise ? delta : call->scratch, band, 1, to, c.patch);
            }
            delta += c.in * c.plane;
            in += c.out * c.positions;
            to += c.out * c.patch;
        }
    }
}

static void pk__transpose_weight_gradient(const pk_call *call)
{
    pk__transpose_gradients(call, 1);
}

static void pk__transpose_row_gradients(const pk_call *call)
{
    pk__transpose_gradients(call, 0);
}

/* ---- pools ------------------------------------------------------------------------------------------- */

static pk__windows pk__pool_windows(const pk_node *node)
{
    pk__windows w = pk__windows_at(node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
    w.adaptive = node->attributes[PK__POOL_ADAPTIVE] != 0;
    for (int side = 0; side < 2; side++) {
        size_t *count = side ? &w.columns : &w.rows;
        const size_t size = side ? w.width : w.height;
        if (w.adaptive) {
            *count = w.kernel[side];
        } else if (node->attributes[PK_POOL_CEIL] != 0) {
            /* A last window that reaches over the end, if it does not start behind it. */
            *count = pk__blocks(size + 2 * w.pad[side] - w.kernel[side], w.stride[side]) + 1;
            *count -= (*count - 1) * w.stride[side] >= size + w.pad[side];
        }
    }
    return w;
}

/* What a window has of a side: its numbers from low up to high, and how many it has with its padding. */
typedef struct pk__span {
    size_t low, high, padded;
} pk__span;

static pk__span pk__window_span(const pk__windows *w, int side, size_t at)
{
    const size_t size = side ? w->width : w->height, pad = w->pad[side];
    pk__span span;
    if (w->adaptive) {
        span.low = at * size / w->kernel[side];
        span.high = pk__blocks((at + 1) * size, w->kernel[side]);
        span.padded = span.high - span.low;
        return span;
    }
    const size_t start = at * w->stride[side], past = start + w->kernel[side];
    span.low = start < pad ? 0 : start - pad;
    span.high = past < pad ? 0 : pk__min(size, past - pad);
    span.padded = pk__min(past, size + 2 * pad) - start;
    return span;
}

/* kernel, stride and pad of a pool: those of a signal, and a stride that was not said. */
PK__PRIVATE pk_status pk__pool_options_of(pk_context *context, const char *name, const pk_shape *input,
                                          double *attributes)
{
    double *stride = attributes + PK_POOL_STRIDE, *kernel = attributes + PK_POOL_KERNEL,
           *pad = attributes + PK_POOL_PAD;
    pk_status status = pk__signal_pair(context, name, "kernel", 1, input, kernel);
    for (int side = 0; side < 2; side++)
        if (stride[side] == 0)
            stride[side] = kernel[side];
    if (!status)
        status = pk__signal_pair(context, name, "stride", 1, input, stride);
    if (!status)
        status = pk__signal_pair(context, name, "pad", 0, input, pad);
    for (int side = 0; side < 2 && !status; side++)
        if (2 * pad[side] > kernel[side])
            status = pk__fail(context, PK_SHAPE, "%s: padding of %gx%g is more than half of its kernel, %gx%g",
                              name, pad[0], pad[1], kernel[0], kernel[1]);
    return status;
}

static pk_status pk__pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    node->attributes[PK__POOL_ADAPTIVE] = 0;
    pk_status status = pk__pool_options_of(context, node->operation->name, input, node->attributes);
    if (!status)
        status = pk__image_shape(context, graph, node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
    if (status)
        return status;
    const pk__windows w = pk__pool_windows(node);
    pk__image_output(node, input->dims[0], w.rows, w.columns);
    return PK_OK;
}

/* adaptive_avg_pool K, adaptive_max_pool K: so many windows a side, which may overlap by one number. */
static pk_status pk__adaptive_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    double *sizes = node->attributes + PK_POOL_KERNEL;
    pk_status status = pk__signal_pair(context, node->operation->name, "output", 1, input, sizes);
    if (!status)
        status = pk__image_input(context, graph, node);
    for (int side = 0; side < 2 && !status; side++) {
        node->attributes[PK_POOL_STRIDE + side] = 1;
        node->attributes[PK_POOL_PAD + side] = 0;
        if (!pk__is_countable((sizes[side] + 1) * node->attributes[PK__IMAGE_HEIGHT + side]))
            status = pk__fail(context, PK_OVERFLOW, "%s: its windows overflow", node->operation->name);
    }
    node->attributes[PK__POOL_ADAPTIVE] = 1;
    if (!status)
        pk__image_output(node, input->dims[0], (size_t)sizes[0], (size_t)sizes[1]);
    return status;
}

/* max_pool K [stride=K] [pad=0] [ceil_mode]: PyTorch's MaxPool2d; padding is never the maximum. */

/* The number in its plane of a window's first maximum, or of its last NaN, as PyTorch's. */
static size_t pk__window_maximum(const pk__windows *w, const pk_real *plane, const pk__span *rows,
                                 const pk__span *columns)
{
    size_t best = rows->low * w->width + columns->low;
    for (size_t row = rows->low; row < rows->high; row++)
        for (size_t at = row * w->width + columns->low; at < row * w->width + columns->high; at++)
            if (plane[at] > plane[best] || isnan(plane[at]))
                best = at;
    return best;
}

/* to[output] = from[the first maximum of the output's window in the input] */
static void pk__pool_pick(const pk_call *call, const pk_real *from, pk_real *to)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t plane = w.height * w.width, planes = call->rows * call->node->shape.dims[0];
    const pk_real *in = call->in[0];
    for (size_t i = 0; i < planes; i++, in += plane, from += plane)
        for (size_t y = 0; y < w.rows; y++) {
            const pk__span rows = pk__window_span(&w, 0, y);
            for (size_t x = 0; x < w.columns; x++) {
                const pk__span columns = pk__window_span(&w, 1, x);
                *to++ = from[pk__window_maximum(&w, in, &rows, &columns)];
            }
        }
}

/* in_cotangent += out_cotangent at the maximum of each window of one row of inputs, for each copy. */
static void pk__pool_return(const pk_call *call, const pk__windows *w, const pk_real *in,
                            const pk_real *out_cotangent, pk_real *in_cotangent)
{
    const size_t plane = w->height * w->width, channels = call->node->shape.dims[0];
    size_t output = 0;
    for (size_t channel = 0; channel < channels; channel++)
        for (size_t y = 0; y < w->rows; y++) {
            const pk__span rows = pk__window_span(w, 0, y);
            for (size_t x = 0; x < w->columns; x++, output++) {
                const pk__span columns = pk__window_span(w, 1, x);
                const size_t at =
                    channel * plane + pk__window_maximum(w, in + channel * plane, &rows, &columns);
                for (size_t copy = 0; copy < call->copies; copy++)
                    in_cotangent[copy * call->in_width[0] + at] +=
                        out_cotangent[copy * call->node->width + output];
            }
        }
}

static void pk__max_pool_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t in = call->in_width[0], width = call->node->width, copies = call->copies;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * copies * in * sizeof(pk_real));
    for (size_t row = 0; row < call->rows; row++)
        pk__pool_return(call, &w, call->in[0] + row * in, call->out_cotangent + row * copies * width,
                        call->in_cotangent[0] + row * copies * in);
}

/* Differences of the pairs of numbers that are in one window, each pair once: their number is pk__pool_pairs.
 * A pair that is in several windows is reported with the first of them. */
static size_t pk__pool_differences(const pk__windows *w, const pk_real *plane, pk_real *out)
{
    size_t count = 0, above = 0; /* above, before: where the window above, the one before, ends */
    for (size_t y = 0; y < w->rows; y++) {
        const pk__span rows = pk__window_span(w, 0, y);
        for (size_t x = 0, before = 0; x < w->columns; x++) {
            const pk__span columns = pk__window_span(w, 1, x);
            const size_t across = columns.high - columns.low, taps = (rows.high - rows.low) * across;
            for (size_t a = 0; a < taps; a++) {
                const size_t row = rows.low + a / across, column = columns.low + a % across;
                for (size_t b = a + 1; b < taps; b++) {
                    const size_t other_row = rows.low + b / across, other = columns.low + b % across;
                    if (other_row < above || pk__max(column, other) < before)
                        continue;
                    out[count++] = plane[row * w->width + column] - plane[other_row * w->width + other];
                }
            }
            before = columns.high;
        }
        above = rows.high;
    }
    return count;
}

/* avg_pool K [stride=K] [pad=0] [ceil_mode] [count_include_pad=1]: PyTorch's AvgPool2d; padding counts as zeros, or not. */

/* One by how many numbers a window's sum is divided. */
static pk_real pk__window_factor(const pk_node *node, const pk__span *rows, const pk__span *columns)
{
    const int padded = node->attributes[PK_POOL_SKIP_PAD] == 0;
    return (pk_real)(1 / ((double)(padded ? rows->padded : rows->high - rows->low) *
                          (double)(padded ? columns->padded : columns->high - columns->low)));
}

static void pk__average(const pk_call *call, const pk_real *in, pk_real *out)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t planes = call->rows * call->node->shape.dims[0];
    for (size_t plane = 0; plane < planes; plane++, in += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++) {
            const pk__span rows = pk__window_span(&w, 0, y);
            for (size_t x = 0; x < w.columns; x++) {
                const pk__span columns = pk__window_span(&w, 1, x);
                pk_real sum = 0;
                for (size_t row = rows.low; row < rows.high; row++)
                    for (size_t column = columns.low; column < columns.high; column++)
                        sum += in[row * w.width + column];
                *out++ = pk__window_factor(call->node, &rows, &columns) * sum;
            }
        }
}

static void pk__average_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t planes = call->rows * call->copies * call->node->shape.dims[0];
    const pk_real *delta = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    if (!call->accumulate[0])
        memset(to, 0, call->rows * call->copies * call->in_width[0] * sizeof *to);
    for (size_t plane = 0; plane < planes; plane++, to += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++) {
            const pk__span rows = pk__window_span(&w, 0, y);
            for (size_t x = 0; x < w.columns; x++) {
                const pk__span columns = pk__window_span(&w, 1, x);
                const pk_real part = pk__window_factor(call->node, &rows, &columns) * *delta++;
                for (size_t row = rows.low; row < rows.high; row++)
                    for (size_t column = columns.low; column < columns.high; column++)
                        to[row * w.width + column] += part;
            }
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
        const pk__span span = pk__window_span(w, side, at);
        const size_t low = span.low, high = span.high;
        const double in = high > low ? (double)(high - low) : 0,
                     both = before > low ? (double)(before - low) : 0;
        double times = 1;
        if (!w->adaptive && at > first && at < past) { /* this one, and those that are like it */
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

/* The numbers of the largest window of a side. */
static double pk__widest_window(const pk__windows *w, int side)
{
    const size_t size = side ? w->width : w->height;
    return (double)(w->adaptive ? pk__min(size, pk__blocks(size, w->kernel[side]) + 1) : w->kernel[side]);
}

static pk_status pk__max_pool_pairs(pk_context *context, pk_node *node)
{
    const pk__windows w = pk__pool_windows(node);
    const double taps = pk__widest_window(&w, 0) * pk__widest_window(&w, 1);
    if (taps * taps * (double)w.rows * (double)w.columns * (double)node->shape.dims[0] > 1e9)
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s: windows of %g numbers have too many pairs whose order would be watched",
                        node->operation->name, taps);
    node->attributes[PK__POOL_SWITCHES] = (double)node->shape.dims[0] * pk__pool_pairs(&w);
    return PK_OK;
}

static pk_status pk__max_pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__pool_shape(context, graph, node);
    return status ? status : pk__max_pool_pairs(context, node);
}

static pk_status pk__adaptive_max_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__adaptive_shape(context, graph, node);
    return status ? status : pk__max_pool_pairs(context, node);
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
    node->attributes[PK__POOL_ADAPTIVE] = node->attributes[PK_POOL_CEIL] = 0;
    node->shape.rank = 1;
    return status;
}

/* ---- upsample ---------------------------------------------------------------------------------------- */

/* upsample F [nearest | bilinear] [align_corners]: PyTorch's Upsample(scale_factor=F): each number is that of one place of
 * the input or, bilinear, a mean of the two a side around it. */
static pk_status pk__upsample_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    double *factor = node->attributes + PK_UPSAMPLE_FACTOR;
    pk_status status =
        pk__signal_pair(context, "upsample", "factor", 1, &graph->nodes[node->inputs[0]].shape, factor);
    if (!status)
        status = pk__image_input(context, graph, node);
    if (!status && node->attributes[PK_UPSAMPLE_CORNERS] != 0 && node->attributes[PK_UPSAMPLE_MODE] == 0)
        status = pk__fail(context, PK_ARGUMENT, "upsample: align_corners belongs to bilinear");
    if (!status && !pk__is_countable((double)graph->nodes[node->inputs[0]].width * factor[0] * factor[1]))
        status = pk__fail(context, PK_OVERFLOW, "upsample: its output overflows");
    if (!status)
        pk__image_output(node, node->shape.dims[0], (size_t)(node->attributes[PK__IMAGE_HEIGHT] * factor[0]),
                         (size_t)(node->attributes[PK__IMAGE_WIDTH] * factor[1]));
    return status;
}

/* The two places of a side that output number at lies between, and the parts that it has of each. */
typedef struct pk__between {
    size_t place[2];
    pk_real part[2];
} pk__between;

static pk__between pk__upsample_place(const pk_node *node, int side, size_t at)
{
    const size_t factor = (size_t)node->attributes[PK_UPSAMPLE_FACTOR + side],
                 size = (size_t)node->attributes[PK__IMAGE_HEIGHT + side], last = size - 1, out = size * factor;
    pk__between between = {{at / factor, at / factor}, {1, 0}};
    if (node->attributes[PK_UPSAMPLE_MODE] == 0 || factor == 1)
        return between;
    double place = ((double)at + 0.5) / (double)factor - 0.5;
    if (node->attributes[PK_UPSAMPLE_CORNERS] != 0)
        place = (double)at * ((double)last / (double)(out - 1));
    place = place < 0 ? 0 : place;
    between.place[0] = pk__min((size_t)place, last);
    between.place[1] = pk__min(between.place[0] + 1, last);
    between.part[1] = (pk_real)(place - (double)between.place[0]);
    between.part[0] = 1 - between.part[1];
    return between;
}

/* to (+)= U from, or U^T from, for each plane of count images. */
static void pk__upsample(const pk_call *call, size_t count, int transpose, const pk_real *from, pk_real *to)
{
    const pk_node *node = call->node;
    const size_t height = (size_t)node->attributes[PK__IMAGE_HEIGHT],
                 width = (size_t)node->attributes[PK__IMAGE_WIDTH], planes = node->shape.dims[0],
                 rows = height * (size_t)node->attributes[PK_UPSAMPLE_FACTOR],
                 columns = width * (size_t)node->attributes[PK_UPSAMPLE_FACTOR + 1];
    const pk_real *in = from;
    pk_real *back = to;
    for (size_t plane = 0; plane < count * planes; plane++, in += height * width, back += height * width)
        for (size_t y = 0; y < rows; y++) {
            const pk__between row = pk__upsample_place(node, 0, y);
            for (size_t x = 0; x < columns; x++) {
                const pk__between column = pk__upsample_place(node, 1, x);
                pk_real sum = 0;
                for (int i = 0; i < 4; i++) {
                    const size_t at = row.place[i / 2] * width + column.place[i % 2];
                    const pk_real part = row.part[i / 2] * column.part[i % 2];
                    if (part == 0)
                        continue;
                    if (transpose)
                        back[at] += part * *from;
                    else
                        sum += part * in[at];
                }
                if (transpose)
                    from++;
                else
                    *to++ = sum;
            }
        }
}

static void pk__upsample_forward(const pk_call *call)
{
    pk__upsample(call, call->rows, 0, call->in[0], call->out);
}

static void pk__upsample_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__upsample(call, call->rows, 0, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__upsample_reverse(const pk_call *call)
{
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * call->copies * call->in_width[0] * sizeof(pk_real));
    pk__upsample(call, call->rows * call->copies, 1, call->out_cotangent, call->in_cotangent[0]);
}

/* The words that both convolutions take. */
#define PK__CONVOLUTION_OPTIONS                                                                            \
    {.name = "channels",                                                                                   \
     .kind = PK_OPTION_NUMBER,                                                                             \
     .attribute = PK_CONVOLUTION_CHANNELS,                                                                 \
     .position = 1,                                                                                        \
     .required = 1,                                                                                        \
     .least = 1,                                                                                           \
     .most = 1e9,                                                                                          \
     .whole = 1},                                                                                          \
        {.name = "kernel",                                                                                 \
         .kind = PK_OPTION_PAIR,                                                                           \
         .attribute = PK_CONVOLUTION_KERNEL,                                                               \
         .position = 2,                                                                                    \
         .required = 1,                                                                                    \
         .least = 1,                                                                                       \
         .most = 1e6,                                                                                      \
         .whole = 1},                                                                                      \
        {.name = "stride",                                                                                 \
         .kind = PK_OPTION_PAIR,                                                                           \
         .attribute = PK_CONVOLUTION_STRIDE,                                                               \
         .least = 1,                                                                                       \
         .most = 1e6,                                                                                      \
         .whole = 1},                                                                                      \
        {.name = "pad", .kind = PK_OPTION_PAIR, .attribute = PK_CONVOLUTION_PAD, .most = 1e6, .whole = 1}, \
        {.name = "dilation",                                                                               \
         .kind = PK_OPTION_PAIR,                                                                           \
         .attribute = PK_CONVOLUTION_DILATION,                                                             \
         .least = 1,                                                                                       \
         .most = 1e6,                                                                                      \
         .whole = 1},                                                                                      \
        {.name = "groups",                                                                                 \
         .kind = PK_OPTION_NUMBER,                                                                         \
         .attribute = PK_CONVOLUTION_GROUPS,                                                               \
         .least = 1,                                                                                       \
         .most = 1e9,                                                                                      \
         .whole = 1},                                                                                      \
    {                                                                                                      \
        .name = "nobias", .kind = PK_OPTION_FLAG, .attribute = PK_CONVOLUTION_BIAS                         \
    }

static const pk_option pk__convolution_options[] = {
    PK__CONVOLUTION_OPTIONS,
    PK__INITIAL_OPTIONS(PK_CONVOLUTION_INITIAL),
    {.name = NULL},
};
static const pk_option pk__transpose_options[] = {
    PK__CONVOLUTION_OPTIONS,
    {.name = "output_pad",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_CONVOLUTION_OUTPUT_PAD,
     .most = 1e6,
     .whole = 1},
    {.name = NULL},
};
#undef PK__CONVOLUTION_OPTIONS
static const pk_option pk__upsample_options[] = {
    {.name = "factor",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_UPSAMPLE_FACTOR,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e6,
     .whole = 1},
    {.name = "mode",
     .kind = PK_OPTION_CHOICE,
     .attribute = PK_UPSAMPLE_MODE,
     .position = 2,
     .choices = "nearest bilinear linear"},
    {.name = "align_corners", .kind = PK_OPTION_FLAG, .attribute = PK_UPSAMPLE_CORNERS, .least = 1},
    {.name = NULL},
};
static const pk_option pk__adaptive_options[] = {
    {.name = "output",
     .kind = PK_OPTION_PAIR,
     .attribute = PK_POOL_KERNEL,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e6,
     .whole = 1},
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
    {.name = "ceil_mode", .kind = PK_OPTION_FLAG, .attribute = PK_POOL_CEIL, .least = 1},
    {.name = "count_include_pad", .kind = PK_OPTION_CHOICE, .attribute = PK_POOL_SKIP_PAD, .choices = "1 0"},
    {.name = NULL},
};
static const pk_option pk__max_pool_options[] = {
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
    {.name = "ceil_mode", .kind = PK_OPTION_FLAG, .attribute = PK_POOL_CEIL, .least = 1},
    {.name = NULL},
};

#define PK__MAX_POOL(text, words, sizes)                                                           \
    {                                                                                              \
        .name = text, .smoothness = PK_PIECEWISE_LINEAR, .linear_in_weights = 1, .options = words, \
        .shape = sizes, .forward = pk__max_pool_forward, .tangent = pk__max_pool_tangent,          \
        .reverse = pk__max_pool_reverse, .switch_count = pk__max_pool_switch_count,                \
        .switches = pk__max_pool_switches                                                          \
    }
#define PK__AVERAGE_POOL(text, words, sizes)                                                             \
    {                                                                                                    \
        .name = text, .smoothness = PK_LINEAR, .linear_in_weights = 1, .options = words, .shape = sizes, \
        .forward = pk__average_forward, .tangent = pk__average_tangent, .reverse = pk__average_reverse   \
    }

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
    {.name = "conv_transpose",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_ROWS,
     .linear_in_weights = 1,
     .options = pk__transpose_options,
     .defaults = {[PK_CONVOLUTION_STRIDE] = 1,
                  1,
                  [PK_CONVOLUTION_DILATION] = 1,
                  1,
                  [PK_CONVOLUTION_GROUPS] = 1,
                  [PK_CONVOLUTION_BIAS] = 1},
     .shape = pk__transpose_shape,
     .scratch = pk__transpose_scratch,
     .forward = pk__transpose_forward,
     .tangent = pk__transpose_tangent,
     .reverse = pk__transpose_reverse,
     .weight_gradient = pk__transpose_weight_gradient,
     .row_gradients = pk__transpose_row_gradients,
     .initialize = pk__transpose_initialize},
    PK__MAX_POOL("max_pool", pk__max_pool_options, pk__max_pool_shape),
    PK__MAX_POOL("adaptive_max_pool", pk__adaptive_options, pk__adaptive_max_shape),
    PK__AVERAGE_POOL("avg_pool", pk__pool_options, pk__pool_shape),
    PK__AVERAGE_POOL("adaptive_avg_pool", pk__adaptive_options, pk__adaptive_shape),
    {.name = "upsample",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .options = pk__upsample_options,
     .shape = pk__upsample_shape,
     .forward = pk__upsample_forward,
     .tangent = pk__upsample_tangent,
     .reverse = pk__upsample_reverse},
    PK__AVERAGE_POOL("global_avg_pool", NULL, pk__global_average_shape),
};
#undef PK__MAX_POOL
#undef PK__AVERAGE_POOL

PK__END_CODE
/* <<< implementation */
#endif
