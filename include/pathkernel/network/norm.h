/* pathkernel/network/norm.h: operations on normalization and softmax. */
#ifndef PATHKERNEL_NORM_H
#define PATHKERNEL_NORM_H
#include "../math/elementary.h"
#include "shape.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of normalize and rms_normalize (over the trailing dims dimensions, or, where groups is not 0, over each of so
 * many groups of channels, the first dimension), of standardize (epsilon
 * alone), and of affine, for pk_graph_add. affine with 0 dimensions has one factor for each channel, the
 * first dimension; scalar: one for all. Its factors start as the number PK_AFFINE_FACTOR. */
enum { PK_NORM_EPSILON, PK_NORM_DIMS, PK_NORM_GROUPS };
enum { PK_AFFINE_BIAS, PK_AFFINE_DIMS, PK_AFFINE_SCALAR, PK_AFFINE_FACTOR };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_NORM_IMPLEMENTED)
#define PATHKERNEL_NORM_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* sum_i a_i b_i, b NULL: sum_i a_i. Four chains, since one would wait for each sum; the order is fixed. */
PK__PRIVATE double pk__sum_products(size_t count, const pk_real *a, const pk_real *b)
{
    double part[4] = {0, 0, 0, 0};
    size_t i = 0;
    if (b) {
        for (; i + 4 <= count; i += 4)
            for (size_t k = 0; k < 4; k++)
                part[k] += (double)a[i + k] * b[i + k];
        for (; i < count; i++)
            part[0] += (double)a[i] * b[i];
    } else {
        for (; i + 4 <= count; i += 4)
            for (size_t k = 0; k < 4; k++)
                part[k] += a[i + k];
        for (; i < count; i++)
            part[0] += a[i];
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* The numbers of the trailing dims dimensions of a node's values; 0 where it has fewer dimensions. */
static size_t pk__trailing(const pk_shape *shape, double dims)
{
    size_t count = 1;
    if (dims > shape->rank)
        return 0;
    for (int i = shape->rank - (int)dims; i < shape->rank; i++)
        count *= shape->dims[i];
    return count;
}

static pk_status pk__check_trailing(pk_context *context, const char *name, const pk_shape *shape, double dims)
{
    char text[PK_SHAPE_TEXT];
    return dims <= shape->rank ? PK_OK
                               : pk__fail(context, PK_SHAPE, "%s: dims is %g, but its values are %s", name,
                                          dims, pk_shape_text(shape, text));
}

/* ---- normalize, rms_normalize ----------------------------------------------------------------------- */

/* Over n numbers, normalize: y = (x - mean) / s, s^2 = mean((x - mean)^2) + epsilon (Ba et al. 2016, eq. 3),
 * and rms_normalize: y = x / s, s^2 = mean(x^2) + epsilon (Zhang & Sennrich 2019, eq. 4). For both the
 * Jacobian is symmetric: J v = (v - [mean(v)] - y mean(y v)) / s, where the first mean is normalize's alone.
 * */
static pk_status pk__normalize_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double groups = node->attributes[PK_NORM_GROUPS];
    const pk_node *input = &graph->nodes[node->inputs[0]];
    node->shape = input->shape;
    if (groups == 0)
        return pk__check_trailing(context, node->operation->name, &node->shape, node->attributes[PK_NORM_DIMS]);
    if (fmod((double)node->shape.dims[0], groups) != 0)
        return pk__fail(context, PK_SHAPE, "%s: %g groups do not divide its %zu channels",
                        node->operation->name, groups, node->shape.dims[0]);
    if ((double)input->width == groups)
        return pk__fail(context, PK_SHAPE,
                        "%s: each of its %g groups has one number, which leaves nothing of it",
                        node->operation->name, groups);
    return PK_OK;
}

/* Where one group of numbers stands: y = (x - shift - rest) / root. */
typedef struct pk__norm {
    size_t count, groups; /* numbers of a group, groups of a row */
    int centred;
    double shift, rest, root;
} pk__norm;

static void pk__norm_begin(const pk_node *node, int centred, pk__norm *norm)
{
    const size_t groups = (size_t)node->attributes[PK_NORM_GROUPS];
    norm->count = groups ? node->width / groups : pk__trailing(&node->shape, node->attributes[PK_NORM_DIMS]);
    norm->groups = node->width / norm->count;
    norm->centred = centred;
    norm->shift = norm->rest = 0;
}

static double pk__norm_mean(const pk__norm *norm, const pk_real *a, const pk_real *b)
{
    return pk__sum_products(norm->count, a, b) / (double)norm->count;
}

/* mean_i of x_i - shift - rest, or of its square. */
static double pk__mean_deviation(size_t count, const pk_real *x, double shift, double rest, int square)
{
    double part[4] = {0, 0, 0, 0};
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (size_t k = 0; k < 4; k++) {
            const double deviation = (x[i + k] - shift) - rest;
            part[k] += square ? deviation * deviation : deviation;
        }
    for (; i < count; i++) {
        const double deviation = (x[i] - shift) - rest;
        part[0] += square ? deviation * deviation : deviation;
    }
    return ((part[0] + part[1]) + (part[2] + part[3])) / (double)count;
}

/* The mean in two parts, since the sum of a large mean and small deviations has lost the mean's last digits:
 * of equal numbers every deviation is zero. */
static void pk__norm_group(const pk_node *node, const pk_real *x, pk__norm *norm)
{
    if (norm->centred) {
        norm->shift = pk__mean_deviation(norm->count, x, 0, 0, 0);
        norm->rest = pk__mean_deviation(norm->count, x, norm->shift, 0, 0);
    }
    norm->root = sqrt(pk__mean_deviation(norm->count, x, norm->shift, norm->rest, 1) +
                      node->attributes[PK_NORM_EPSILON]);
}

static void pk__norm_forward(const pk_call *call, int centred)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const pk_real *x = call->in[0];
    pk_real *y = call->out;
    for (size_t group = 0; group < call->rows * norm.groups; group++, x += norm.count, y += norm.count) {
        pk__norm_group(call->node, x, &norm);
        for (size_t i = 0; i < norm.count; i++)
            y[i] = (pk_real)(((x[i] - norm.shift) - norm.rest) / norm.root);
    }
}

/* to (+)= J from, for each of copies vectors of each row. */
static void pk__norm_jacobian(const pk_call *call, int centred, size_t copies, const pk_real *from,
                              int accumulate, pk_real *to)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const size_t width = call->node->width, count = norm.count;
    for (size_t group = 0; group < call->rows * norm.groups; group++) {
        const size_t at = group * count, row = group / norm.groups;
        const pk_real *y = call->out + at;
        pk__norm_group(call->node, call->in[0] + at, &norm);
        for (size_t copy = 0; copy < copies; copy++) {
            const size_t place = (row * copies + copy) * width + (at - row * width);
            const pk_real *v = from + place;
            pk_real *out = to + place;
            const double mean = centred ? pk__norm_mean(&norm, v, NULL) : 0, along = pk__norm_mean(&norm, v, y);
            for (size_t i = 0; i < count; i++) {
                const double value = ((v[i] - mean) - y[i] * along) / norm.root;
                out[i] = (pk_real)(accumulate ? out[i] + value : value);
            }
        }
    }
}

/* With a dot for the derivative along the tangent v: s. = mean(y v), y. = J v, so
 * (J u). = -(s. J u + y. mean(u y) + y mean(u y.)) / s. */
static void pk__norm_curvature(const pk_call *call, int centred)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const size_t width = call->node->width, count = norm.count;
    for (size_t group = 0; call->in_tangent[0] && group < call->rows * norm.groups; group++) {
        const size_t at = group * count, row = group / norm.groups;
        const pk_real *y = call->out + at, *v = call->in_tangent[0] + at;
        pk__norm_group(call->node, call->in[0] + at, &norm);
        const double mean_v = centred ? pk__norm_mean(&norm, v, NULL) : 0,
                     root_dot = pk__norm_mean(&norm, v, y);
        for (size_t copy = 0; copy < call->copies; copy++) {
            const size_t place = (row * call->copies + copy) * width + (at - row * width);
            const pk_real *u = call->out_cotangent + place;
            pk_real *out = call->in_cotangent[0] + place;
            const double mean_u = centred ? pk__norm_mean(&norm, u, NULL) : 0,
                         along = pk__norm_mean(&norm, u, y);
            double along_dot = 0;
            for (size_t i = 0; i < count; i++)
                along_dot += u[i] * ((v[i] - mean_v) - y[i] * root_dot);
            along_dot /= (double)count * norm.root;
            for (size_t i = 0; i < count; i++) {
                const double y_dot = ((v[i] - mean_v) - y[i] * root_dot) / norm.root;
                const double slope = ((u[i] - mean_u) - y[i] * along) / norm.root;
                out[i] -= (pk_real)((root_dot * slope + y_dot * along + y[i] * along_dot) / norm.root);
            }
        }
    }
}

static void pk__norm_tangent(const pk_call *call, int centred)
{
    if (call->in_tangent[0])
        pk__norm_jacobian(call, centred, 1, call->in_tangent[0], 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

#define PK__NORM(name, centred)                                                                  \
    static void pk__##name##_forward(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_forward(call, centred);                                                         \
    }                                                                                            \
    static void pk__##name##_tangent(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_tangent(call, centred);                                                         \
    }                                                                                            \
    static void pk__##name##_reverse(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_jacobian(call, centred, call->copies, call->out_cotangent, call->accumulate[0], \
                          call->in_cotangent[0]);                                                \
    }                                                                                            \
    static void pk__##name##_curvature(const pk_call *call)                                      \
    {                                                                                            \
        pk__norm_curvature(call, centred);                                                       \
    }
PK__NORM(normalize, 1)
PK__NORM(rms_normalize, 0)
#undef PK__NORM

/* ---- standardize ------------------------------------------------------------------------------------ */

/* y = (x - mean_c) / sqrt(variance_c + epsilon) with the channel c the first dimension; its constants are the
 * means, then the variances: batch norm with fixed statistics (Ioffe & Szegedy 2015, algorithm 2). */
static pk_status pk__standardize_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    node->shape = graph->nodes[node->inputs[0]].shape;
    const size_t channels = node->shape.dims[0];
    if (node->constant_count != 2 * channels)
        return pk__fail(context, PK_SHAPE,
                        "standardize: %zu numbers are no mean and variance for each of %zu channels",
                        node->constant_count, channels);
    for (size_t c = 0; c < channels; c++)
        if (!(node->constants[channels + c] >= 0) ||
            !(node->constants[channels + c] + node->attributes[PK_NORM_EPSILON] > 0))
            return pk__fail(context, PK_ARGUMENT,
                            "standardize: channel %zu has the variance %g; with epsilon %g it must be positive",
                            c, (double)node->constants[channels + c], node->attributes[PK_NORM_EPSILON]);
    return PK_OK;
}

/* to (+)= (from - shift mean) / root, for each of count rows. */
static void pk__standardize(const pk_node *node, size_t count, int shift, const pk_real *from, int accumulate,
                            pk_real *to)
{
    const size_t channels = node->shape.dims[0], each = node->width / channels;
    for (size_t row = 0; row < count; row++)
        for (size_t c = 0; c < channels; c++, from += each, to += each) {
            const double mean = shift ? node->constants[c] : 0;
            const double root = sqrt(node->constants[channels + c] + node->attributes[PK_NORM_EPSILON]);
            for (size_t i = 0; i < each; i++) {
                const double value = (from[i] - mean) / root;
                to[i] = (pk_real)(accumulate ? to[i] + value : value);
            }
        }
}

static void pk__standardize_forward(const pk_call *call)
{
    pk__standardize(call->node, call->rows, 1, call->in[0], 0, call->out);
}

static void pk__standardize_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__standardize(call->node, call->rows, 0, call->in_tangent[0], 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__standardize_reverse(const pk_call *call)
{
    pk__standardize(call->node, call->rows * call->copies, 0, call->out_cotangent, call->accumulate[0],
                    call->in_cotangent[0]);
}

/* ---- affine ----------------------------------------------------------------------------------------- */

/* y = gamma x + beta: a gamma, and a beta, for each number of the trailing dims dimensions, or (dims 0) for
 * each channel, or (scalar) for all numbers. Weights: gamma, then beta. */
static pk_status pk__affine_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double dims = node->attributes[PK_AFFINE_DIMS];
    node->shape = graph->nodes[node->inputs[0]].shape;
    const int scalar = node->attributes[PK_AFFINE_SCALAR] != 0, flat = dims == 0 || scalar;
    const int biased = node->attributes[PK_AFFINE_BIAS] != 0, rank = flat ? 1 : (int)dims;
    pk_status status = pk__check_trailing(context, "affine", &node->shape, dims);
    if (status)
        return status;
    for (int t = 0; t <= biased; t++) {
        pk_shape *shape = &node->tensors[t].shape;
        shape->rank = rank;
        for (int i = 0; i < rank; i++)
            shape->dims[i] = scalar ? 1 : node->shape.dims[flat ? 0 : node->shape.rank - rank + i];
    }
    node->tensor_count = 1 + biased;
    node->weight_count = scalar ? 1 : flat ? node->shape.dims[0] : pk__trailing(&node->shape, dims);
    node->weight_count *= 1 + (size_t)biased; /* at most twice the input's width, which is far from overflow */
    return PK_OK;
}

static void pk__affine_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    const int biased = node->attributes[PK_AFFINE_BIAS] != 0;
    (void)random;
    for (size_t i = 0; i < node->weight_count; i++)
        weights[i] = !biased || i < node->weight_count / 2 ? (pk_real)node->attributes[PK_AFFINE_FACTOR] : 0;
}

/* A row is outer x count x each numbers, of which each slice [o][j] has the gamma j. */
typedef struct pk__affine {
    size_t outer, count, each;
    int biased;
} pk__affine;

static pk__affine pk__affine_layout(const pk_node *node)
{
    pk__affine layout;
    layout.biased = node->attributes[PK_AFFINE_BIAS] != 0;
    layout.count = layout.biased ? node->weight_count / 2 : node->weight_count;
    layout.each = node->attributes[PK_AFFINE_DIMS] == 0 || node->attributes[PK_AFFINE_SCALAR] != 0
                      ? node->width / layout.count
                      : 1;
    layout.outer = node->width / layout.count / layout.each;
    return layout;
}

/* to (+)= gamma from (+ beta), for each of count rows. */
static void pk__affine_apply(const pk_node *node, size_t count, const pk_real *weights, const pk_real *from,
                             int bias, int accumulate, pk_real *to)
{
    const pk__affine layout = pk__affine_layout(node);
    const pk_real *beta = bias && layout.biased ? weights + layout.count : NULL;
    for (size_t slice = 0; slice < count * layout.outer; slice++) {
        for (size_t j = 0; layout.each == 1 && j < layout.count; j++)
            to[j] = (accumulate ? to[j] : 0) + (weights[j] * from[j] + (beta ? beta[j] : 0));
        for (size_t j = 0; layout.each > 1 && j < layout.count; j++) {
            const pk_real gamma = weights[j], shift = beta ? beta[j] : 0;
            for (size_t i = j * layout.each; i < (j + 1) * layout.each; i++)
                to[i] = (accumulate ? to[i] : 0) + (gamma * from[i] + shift);
        }
        from += layout.count * layout.each;
        to += layout.count * layout.each;
    }
}

/* gradient += (dF/dw)^T delta of one row x. */
static void pk__affine_gradient(const pk__affine *layout, const pk_real *x, const pk_real *delta,
                                pk_real *gradient)
{
    const size_t count = layout->count, each = layout->each;
    for (size_t slice = 0; slice < layout->outer; slice++, x += count * each, delta += count * each) {
        for (size_t j = 0; each == 1 && j < count; j++)
            gradient[j] += x[j] * delta[j];
        for (size_t j = 0; each > 1 && j < count; j++)
            gradient[j] += (pk_real)pk__sum_products(each, x + j * each, delta + j * each);
        for (size_t j = 0; each == 1 && layout->biased && j < count; j++)
            gradient[count + j] += delta[j];
        for (size_t j = 0; each > 1 && layout->biased && j < count; j++)
            gradient[count + j] += (pk_real)pk__sum_products(each, delta + j * each, NULL);
    }
}

static void pk__affine_forward(const pk_call *call)
{
    pk__affine_apply(call->node, call->rows, call->weights, call->in[0], 1, 0, call->out);
}

static void pk__affine_tangent(const pk_call *call)
{
    if (call->direction)
        pk__affine_apply(call->node, call->rows, call->direction, call->in[0], 1, 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    if (call->in_tangent[0])
        pk__affine_apply(call->node, call->rows, call->weights, call->in_tangent[0], 0, 1, call->out_tangent);
}

static void pk__affine_reverse(const pk_call *call)
{
    pk__affine_apply(call->node, call->rows * call->copies, call->weights, call->out_cotangent, 0,
                     call->accumulate[0], call->in_cotangent[0]);
}

static void pk__affine_weight_gradient(const pk_call *call)
{
    const pk__affine layout = pk__affine_layout(call->node);
    const size_t width = call->node->width;
    for (size_t row = 0; row < call->rows; row++)
        pk__affine_gradient(&layout, call->in[0] + row * width, call->out_cotangent + row * width,
                            call->gradient);
}

static void pk__affine_row_gradients(const pk_call *call)
{
    const pk__affine layout = pk__affine_layout(call->node);
    const size_t width = call->node->width, weights = call->node->weight_count;
    memset(call->gradient, 0, call->rows * call->copies * weights * sizeof(pk_real));
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        pk__affine_gradient(&layout, call->in[0] + copy / call->copies * width,
                            call->out_cotangent + copy * width, call->gradient + copy * weights);
}

/* ---- softmax, log_softmax --------------------------------------------------------------------------- */

/* p_i = exp(x_i) / sum_j exp(x_j) and y_i = log p_i, over the last dimension. */
static size_t pk__last_dimension(const pk_node *node)
{
    return node->shape.dims[node->shape.rank - 1];
}

static size_t pk__softmax_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return pk__last_dimension(node);
}

static size_t pk__largest_at(size_t count, const pk_real *x)
{
    size_t at = 0;
    for (size_t i = 1; i < count; i++)
        at = x[i] > x[at] ? i : at;
    return at;
}

/* p = softmax(x) of count numbers; may be in place. */
PK__PRIVATE void pk__softmax_row(size_t count, const pk_real *x, pk_real *p)
{
    const pk_real most = x[pk__largest_at(count, x)];
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        p[i] = x[i] - most;
    pk__elementary_reals(pk__all_exponential, count, 1, p, p);
    for (size_t i = 0; i < count; i++)
        sum += p[i];
    for (size_t i = 0; i < count; i++)
        p[i] = (pk_real)(p[i] / sum);
}

/* The largest term of the sum is 1: log1p of the others keeps the logarithm of a p near 1. */
static void pk__log_softmax_forward(const pk_call *call)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    for (size_t at = 0; at < all; at += count) {
        const pk_real *x = call->in[0] + at;
        pk_real *y = call->out + at;
        const size_t first = pk__largest_at(count, x);
        double others = 0;
        for (size_t i = 0; i < count; i++)
            y[i] = x[i] - x[first];
        pk__elementary_reals(pk__all_exponential, count, 1, y, y);
        for (size_t i = 0; i < count; i++)
            others += i == first ? 0 : (double)y[i];
        const double logarithm = log1p(others);
        for (size_t i = 0; i < count; i++)
            y[i] = (pk_real)((double)(x[i] - x[first]) - logarithm);
    }
}

/* The p of the slice at `at`. */
static const pk_real *pk__probabilities(const pk_call *call, int logarithm, size_t at)
{
    const size_t count = pk__last_dimension(call->node);
    if (!logarithm)
        return call->out + at;
    pk__elementary_reals(pk__all_exponential, count, 1, call->out + at, call->scratch);
    return call->scratch;
}

/* softmax: p. = p o (x. - p . x.); log_softmax: y. = x. - p . x. */
static void pk__softmax_tangents(const pk_call *call, int logarithm)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    const pk_real *v = call->in_tangent[0];
    if (!v)
        memset(call->out_tangent, 0, all * sizeof(pk_real));
    for (size_t at = 0; v && at < all; at += count) {
        const pk_real *p = pk__probabilities(call, logarithm, at);
        const double mean = pk__sum_products(count, p, v + at);
        for (size_t i = 0; i < count; i++)
            call->out_tangent[at + i] = (pk_real)((v[at + i] - mean) * (logarithm ? 1 : p[i]));
    }
}

/* softmax: p o (u - p . u); log_softmax: u - p sum(u). With second their derivatives along the tangent, of
 * which p. = p o (v - p . v): p. o (u - p . u) - p (p. . u), and -p. sum(u). Where the largest p is nearly 1, nothing
 * cancels: u enters by its differences to the u of that p, and 1 - p is taken from log p. */
static void pk__softmax_cotangents(const pk_call *call, int logarithm, int second)
{
    const size_t count = pk__last_dimension(call->node), width = call->node->width;
    const int accumulate = second || call->accumulate[0];
    if (second && !call->in_tangent[0])
        return;
    for (size_t at = 0; at < call->rows * width; at += count) {
        const size_t row = at / width;
        const pk_real *p = pk__probabilities(call, logarithm, at),
                      *v = second ? call->in_tangent[0] + at : NULL;
        const double mean_v = second ? pk__sum_products(count, p, v) : 0;
        const size_t top = pk__largest_at(count, p);
        const double rest = logarithm && !second ? -expm1((double)call->out[at + top]) : 0;
        for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
            const pk_real *u = call->out_cotangent + copy * width + (at - row * width);
            pk_real *to = call->in_cotangent[0] + copy * width + (at - row * width);
            const double base = logarithm ? 0 : u[top];
            double sum = 0, mean_dot = 0;
            for (size_t i = 0; i < count; i++)
                sum += i == top ? 0 : logarithm ? (double)u[i] : p[i] * (u[i] - base);
            const double others = sum;
            sum += logarithm ? (double)u[top] : base;
            for (size_t i = 0; second && !logarithm && i < count; i++)
                mean_dot += p[i] * (v[i] - mean_v) * u[i];
            for (size_t i = 0; i < count; i++) {
                double value = logarithm ? u[i] - p[i] * sum : p[i] * (u[i] - base - others);
                if (logarithm && i == top)
                    value = u[i] * rest - p[i] * others;
                if (second) {
                    const double p_dot = p[i] * (v[i] - mean_v);
                    value = logarithm ? -p_dot * sum : p_dot * (u[i] - sum) - p[i] * mean_dot;
                }
                to[i] = (pk_real)(accumulate ? to[i] + value : value);
            }
        }
    }
}

static void pk__softmax_forward(const pk_call *call)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    for (size_t at = 0; at < all; at += count)
        pk__softmax_row(count, call->in[0] + at, call->out + at);
}

#define PK__SOFTMAX(name, logarithm)                        \
    static void pk__##name##_tangent(const pk_call *call)   \
    {                                                       \
        pk__softmax_tangents(call, logarithm);              \
    }                                                       \
    static void pk__##name##_reverse(const pk_call *call)   \
    {                                                       \
        pk__softmax_cotangents(call, logarithm, 0);         \
    }                                                       \
    static void pk__##name##_curvature(const pk_call *call) \
    {                                                       \
        pk__softmax_cotangents(call, logarithm, 1);         \
    }
PK__SOFTMAX(softmax, 0)
PK__SOFTMAX(log_softmax, 1)
#undef PK__SOFTMAX

/* ---- the table -------------------------------------------------------------------------------------- */

static const pk_option pk__normalize_options[] = {
    {.name = "epsilon", .kind = PK_OPTION_NUMBER, .attribute = PK_NORM_EPSILON, .most = DBL_MAX},
    {.name = "dims",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_NORM_DIMS,
     .least = 1,
     .most = PK_SHAPE_RANK,
     .whole = 1},
    {.name = "groups", .kind = PK_OPTION_NUMBER, .attribute = PK_NORM_GROUPS, .most = 1e9, .whole = 1},
    {.name = NULL},
};
static const pk_option pk__standardize_options[] = {
    {.name = "epsilon", .kind = PK_OPTION_NUMBER, .attribute = PK_NORM_EPSILON, .most = DBL_MAX},
    {.name = NULL},
};
static const pk_option pk__affine_options[] = {
    {.name = "nobias", .kind = PK_OPTION_FLAG, .attribute = PK_AFFINE_BIAS},
    {.name = "dims", .kind = PK_OPTION_NUMBER, .attribute = PK_AFFINE_DIMS, .most = PK_SHAPE_RANK, .whole = 1},
    {.name = "scalar", .kind = PK_OPTION_FLAG, .attribute = PK_AFFINE_SCALAR, .least = 1},
    {.name = "factor",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_AFFINE_FACTOR,
     .least = -DBL_MAX,
     .most = DBL_MAX},
    {.name = NULL},
};

/* rms_normalize: the epsilon of torch.nn.RMSNorm in double precision, torch.finfo(torch.float64).eps. */
static const pk_operation pk__norm_operations[] = {
    {.name = "normalize",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .options = pk__normalize_options,
     .defaults = {1e-5, 1},
     .shape = pk__normalize_shape,
     .forward = pk__normalize_forward,
     .tangent = pk__normalize_tangent,
     .reverse = pk__normalize_reverse,
     .curvature = pk__normalize_curvature},
    {.name = "rms_normalize",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .options = pk__normalize_options,
     .defaults = {2.220446049250313e-16, 1},
     .shape = pk__normalize_shape,
     .forward = pk__rms_normalize_forward,
     .tangent = pk__rms_normalize_tangent,
     .reverse = pk__rms_normalize_reverse,
     .curvature = pk__rms_normalize_curvature},
    {.name = "standardize",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .options = pk__standardize_options,
     .defaults = {1e-5},
     .shape = pk__standardize_shape,
     .forward = pk__standardize_forward,
     .tangent = pk__standardize_tangent,
     .reverse = pk__standardize_reverse},
    {.name = "affine",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_ROWS,
     .linear_in_weights = 1,
     .options = pk__affine_options,
     .defaults = {[PK_AFFINE_BIAS] = 1, [PK_AFFINE_DIMS] = 1, [PK_AFFINE_FACTOR] = 1},
     .shape = pk__affine_shape,
     .forward = pk__affine_forward,
     .tangent = pk__affine_tangent,
     .reverse = pk__affine_reverse,
     .weight_gradient = pk__affine_weight_gradient,
     .row_gradients = pk__affine_row_gradients,
     .initialize = pk__affine_initialize},
    {.name = "softmax",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .shape = pk__same_shape,
     .scratch = pk__softmax_scratch,
     .forward = pk__softmax_forward,
     .tangent = pk__softmax_tangent,
     .reverse = pk__softmax_reverse,
     .curvature = pk__softmax_curvature},
    {.name = "log_softmax",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .shape = pk__same_shape,
     .scratch = pk__softmax_scratch,
     .forward = pk__log_softmax_forward,
     .tangent = pk__log_softmax_tangent,
     .reverse = pk__log_softmax_reverse,
     .curvature = pk__log_softmax_curvature},
};

PK__END_CODE
/* <<< implementation */
#endif
