/* pathkernel/network/shape.h: operations without arithmetic of their own: sums of branches, flattening, learned
 * positions, and products with a fixed sparse matrix.
 */
#ifndef PATHKERNEL_SHAPE_H
#define PATHKERNEL_SHAPE_H
#include "elementwise.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of position, for pk_graph_add: tokens and width of the values that it is to be added to. */
enum { PK_POSITION_TOKENS, PK_POSITION_WIDTH };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SHAPE_IMPLEMENTED)
#define PATHKERNEL_SHAPE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* to (+)= from */
PK__PRIVATE void pk__give(size_t count, const pk_real *from, int accumulate, pk_real *to)
{
    if (!accumulate)
        memcpy(to, from, count * sizeof *to);
    else
        for (size_t i = 0; i < count; i++)
            to[i] += from[i];
}

/* Whether number at of a row of data is a whole number below count. */
PK__PRIVATE pk_status pk__check_token(pk_context *context, const char *name, size_t row, size_t at,
                                      double token, double count)
{
    if (token >= 0 && token < count && token == floor(token))
        return PK_OK;
    return pk__fail(context, PK_ARGUMENT, "row %zu, number %zu: %s takes whole numbers from 0 to %.0f, not %g",
                    row, at, name, count - 1, token);
}

/* add: y = sum_j x_j, 2 to PK_NODE_INPUTS inputs of one shape. */
static pk_status pk__add_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *first = &graph->nodes[node->inputs[0]].shape;
    for (int j = 1; j < node->input_count; j++) {
        const pk_shape *other = &graph->nodes[node->inputs[j]].shape;
        char texts[2][PK_SHAPE_TEXT];
        if (other->rank != first->rank ||
            memcmp(other->dims, first->dims, (size_t)first->rank * sizeof *first->dims) != 0)
            return pk__fail(context, PK_SHAPE, "branches of %s and of %s cannot be added",
                            pk_shape_text(first, texts[0]), pk_shape_text(other, texts[1]));
    }
    node->shape = *first;
    return PK_OK;
}

static void pk__add_forward(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        pk__give(call->rows * call->node->width, call->in[j], j > 0, call->out);
}

static void pk__add_tangent(const pk_call *call)
{
    int any = 0;
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_tangent[j])
            pk__give(call->rows * call->node->width, call->in_tangent[j], any++, call->out_tangent);
    if (!any)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__add_reverse(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_cotangent[j])
            pk__give(call->rows * call->copies * call->node->width, call->out_cotangent, call->accumulate[j],
                     call->in_cotangent[j]);
}

/* flatten: the same numbers as one dimension. */
static pk_status pk__flatten_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context;
    node->shape.rank = 1;
    node->shape.dims[0] = graph->nodes[node->inputs[0]].width;
    return PK_OK;
}

/* position: y = w (tokens, width) for every row, whatever the input. */
static pk_status pk__position_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)graph;
    node->shape.rank = 2;
    for (int i = 0; i < 2; i++)
        node->shape.dims[i] = (size_t)node->attributes[i];
    if (!pk__multiply(node->shape.dims[0], node->shape.dims[1], &node->weight_count))
        return pk__fail(context, PK_OVERFLOW, "position: its weights overflow");
    pk__node_tensor(node, 2, node->shape.dims[0], node->shape.dims[1]);
    return PK_OK;
}

static void pk__repeat_rows(size_t rows, size_t width, const pk_real *from, pk_real *to)
{
    for (size_t row = 0; row < rows; row++)
        memcpy(to + row * width, from, width * sizeof *to);
}

static void pk__position_forward(const pk_call *call)
{
    pk__repeat_rows(call->rows, call->node->width, call->weights, call->out);
}

static void pk__position_tangent(const pk_call *call)
{
    if (call->direction)
        pk__repeat_rows(call->rows, call->node->width, call->direction, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__position_reverse(const pk_call *call)
{
    if (call->in_cotangent[0] && !call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * call->copies * call->in_width[0] * sizeof(pk_real));
}

static void pk__position_weight_gradient(const pk_call *call)
{
    for (size_t row = 0; row < call->rows; row++)
        pk__give(call->node->width, call->out_cotangent + row * call->node->width, 1, call->gradient);
}

static void pk__position_row_gradients(const pk_call *call)
{
    memcpy(call->gradient, call->out_cotangent,
           call->rows * call->copies * call->node->width * sizeof(pk_real));
}

/* As PyTorch's Embedding. */
PK__PRIVATE void pk__normal_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    for (size_t i = 0; i < node->weight_count; i++)
        weights[i] = (pk_real)pk_random_normal(random);
}

/* propagate: Y = A X over tokens (tokens x width), A a fixed sparse matrix (tokens x tokens); its constants are
 * triples (row, column, value), one behind the other. Kipf & Welling 2017, eq. 2, without weights. */
static pk_status pk__propagate_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (input->shape.rank != 2)
        return pk__fail(context, PK_SHAPE, "propagate needs values of tokens x width, not of rank %d",
                        input->shape.rank);
    if (node->constant_count == 0 || node->constant_count % 3)
        return pk__fail(context, PK_SHAPE, "propagate: %zu numbers are no triples (row, column, value)",
                        node->constant_count);
    for (size_t i = 0; i < node->constant_count; i += 3)
        for (size_t k = 0; k < 3; k++) {
            const double value = node->constants[i + k], tokens = (double)input->shape.dims[0];
            if (k < 2 ? !(value >= 0 && value < tokens && value == floor(value)) : !isfinite(value))
                return pk__fail(context, PK_ARGUMENT, "propagate: entry %zu has the %s %g; there are %g tokens",
                                i / 3,
                                k == 2 ? "value"
                                : k    ? "column"
                                       : "row",
                                value, tokens);
        }
    node->shape = input->shape;
    return PK_OK;
}

/* to += A from, or A^T from, for each of count matrices. */
static void pk__propagate(const pk_node *node, size_t count, int transpose, const pk_real *from, pk_real *to)
{
    const size_t width = node->shape.dims[1];
    for (size_t m = 0; m < count; m++, from += node->width, to += node->width)
        for (size_t i = 0; i < node->constant_count; i += 3) {
            const pk_real value = node->constants[i + 2];
            const pk_real *x = from + (size_t)node->constants[i + !transpose] * width;
            pk_real *y = to + (size_t)node->constants[i + transpose] * width;
            for (size_t j = 0; j < width; j++)
                y[j] += value * x[j];
        }
}

static void pk__propagate_forward(const pk_call *call)
{
    memset(call->out, 0, call->rows * call->node->width * sizeof(pk_real));
    pk__propagate(call->node, call->rows, 0, call->in[0], call->out);
}

static void pk__propagate_tangent(const pk_call *call)
{
    memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    if (call->in_tangent[0])
        pk__propagate(call->node, call->rows, 0, call->in_tangent[0], call->out_tangent);
}

static void pk__propagate_reverse(const pk_call *call)
{
    const size_t count = call->rows * call->copies;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, count * call->node->width * sizeof(pk_real));
    pk__propagate(call->node, count, 1, call->out_cotangent, call->in_cotangent[0]);
}

/* constant: y = the node's constants for every row, of the shape (attribute 0) x (attribute 1); no cotangent. */
static pk_status pk__constant_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)graph;
    node->shape.rank = 2;
    for (int i = 0; i < 2; i++)
        node->shape.dims[i] = (size_t)node->attributes[i];
    if (node->shape.dims[0] * node->shape.dims[1] != node->constant_count)
        return pk__fail(context, PK_SHAPE, "a constant of %zu x %zu has %zu numbers", node->shape.dims[0],
                        node->shape.dims[1], node->constant_count);
    return PK_OK;
}

static void pk__constant_forward(const pk_call *call)
{
    pk__repeat_rows(call->rows, call->node->width, call->node->constants, call->out);
}

static void pk__constant_tangent(const pk_call *call)
{
    memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* fourier: y = (cos 2 pi B x, sin 2 pi B x), B (N, in) the node's constants; on data only: its slopes are for
 * derivatives with respect to the data, along weights it is a constant.
 * Rahimi & Recht 2007; Tancik et al. 2020, eq. 5. */
static pk_status pk__fourier_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (input->varies)
        return pk__fail(context, PK_UNSUPPORTED,
                        "Fourier features are taken of data, before the first weights");
    if (!node->constant_count || node->constant_count % input->width)
        return pk__fail(context, PK_SHAPE, "fourier: %zu frequencies for %zu inputs", node->constant_count,
                        input->width);
    node->shape.rank = 1;
    node->shape.dims[0] = 2 * (node->constant_count / input->width);
    return PK_OK;
}

#define PK__TWO_PI 6.28318530717958647693

static void pk__fourier_forward(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    pk__gemm(0, 1, call->rows, count, in, 1, call->in[0], in, call->node->constants, in, 0, call->out,
             2 * count);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t j = 0; j < count; j++) {
            pk_real *y = call->out + row * 2 * count + j;
            const double angle = PK__TWO_PI * *y;
            y[0] = (pk_real)cos(angle);
            y[count] = (pk_real)sin(angle);
        }
}

static void pk__fourier_tangent(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    if (!call->in_tangent[0]) {
        memset(call->out_tangent, 0, call->rows * 2 * count * sizeof(pk_real));
        return;
    }
    pk__gemm(0, 1, call->rows, count, in, PK__TWO_PI, call->in_tangent[0], in, call->node->constants, in, 0,
             call->out_tangent, 2 * count);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t j = 0; j < count; j++) {
            const pk_real *y = call->out + row * 2 * count + j;
            pk_real *to = call->out_tangent + row * 2 * count + j;
            to[count] = y[0] * to[0];
            to[0] *= -y[count];
        }
}

static void pk__fourier_reverse(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        const pk_real *y = call->out + copy / call->copies * 2 * count;
        const pk_real *c = call->out_cotangent + copy * 2 * count;
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        for (size_t j = 0; j < count; j++) {
            const pk_real slope = (pk_real)PK__TWO_PI * (c[count + j] * y[j] - c[j] * y[count + j]);
            for (size_t i = 0; i < in; i++)
                to[i] += slope * call->node->constants[j * in + i];
        }
    }
}

/* With a = 2 pi B x, along x': the slope c_s cos a - c_c sin a of a moves by -(c_s sin a + c_c cos a) a'. */
static void pk__fourier_curvature(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        const size_t row = copy / call->copies;
        const pk_real *y = call->out + row * 2 * count, *c = call->out_cotangent + copy * 2 * count;
        for (size_t j = 0; call->in_tangent[0] && j < count; j++) {
            const pk_real *frequency = call->node->constants + j * in;
            double moved = 0;
            for (size_t i = 0; i < in; i++)
                moved += PK__TWO_PI * frequency[i] * call->in_tangent[0][row * in + i];
            moved *= -PK__TWO_PI * (c[count + j] * y[count + j] + c[j] * y[j]);
            for (size_t i = 0; i < in; i++)
                call->in_cotangent[0][copy * in + i] += (pk_real)(moved * frequency[i]);
        }
    }
}

/* select: y = the token of the first input (tokens x width) that the row's data, the second input, name. */
static pk_status pk__select_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (node->input_count != 2 || node->inputs[1] != 0 || graph->input_width != 1 || input->shape.rank != 2)
        return pk__fail(context, PK_SHAPE,
                        "select needs values of tokens x width, and data of one number a row");
    node->shape.rank = 1;
    node->shape.dims[0] = input->shape.dims[1];
    node->attributes[0] = (double)input->shape.dims[0];
    return PK_OK;
}

static pk_status pk__select_check(pk_context *context, const pk_node *node, size_t row, const pk_real *in)
{
    return pk__check_token(context, "select", row, 0, in[0], node->attributes[0]);
}

/* Where the row's token starts; a token that is none counts as the first: pk_graph_check_inputs refuses it. */
static size_t pk__selected(const pk_call *call, size_t row)
{
    const double token = call->in[1][row];
    return token >= 0 && token * (double)call->node->width < (double)call->in_width[0]
               ? (size_t)token * call->node->width
               : 0;
}

static void pk__select_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width;
    for (size_t row = 0; row < call->rows; row++)
        memcpy(to + row * width, from + row * call->in_width[0] + pk__selected(call, row), width * sizeof *to);
}

static void pk__select_forward(const pk_call *call)
{
    pk__select_rows(call, call->in[0], call->out);
}

static void pk__select_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__select_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__select_reverse(const pk_call *call)
{
    const size_t width = call->node->width, in = call->in_width[0];
    for (size_t copy = 0; call->in_cotangent[0] && copy < call->rows * call->copies; copy++) {
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        pk__give(width, call->out_cotangent + copy * width, 1, to + pk__selected(call, copy / call->copies));
    }
}

static const pk_option pk__position_options[] = {
    {.name = "tokens",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_POSITION_TOKENS,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "width",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_POSITION_WIDTH,
     .position = 2,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = NULL},
};

#define PK__LINEAR_OPERATION(own_name, shape_rule, forward_rule, tangent_rule, reverse_rule)    \
    {                                                                                           \
        .name = own_name, .smoothness = PK_LINEAR, .linear_in_weights = 1, .shape = shape_rule, \
        .forward = forward_rule, .tangent = tangent_rule, .reverse = reverse_rule               \
    }

static const pk_operation pk__structure_operations[] = {
    PK__LINEAR_OPERATION("add", pk__add_shape, pk__add_forward, pk__add_tangent, pk__add_reverse),
    PK__LINEAR_OPERATION("flatten", pk__flatten_shape, pk__add_forward, pk__add_tangent, pk__add_reverse),
    PK__LINEAR_OPERATION("propagate", pk__propagate_shape, pk__propagate_forward, pk__propagate_tangent,
                         pk__propagate_reverse),
    {.name = "select",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__select_shape,
     .forward = pk__select_forward,
     .tangent = pk__select_tangent,
     .reverse = pk__select_reverse,
     .check = pk__select_check},
    {.name = "fourier",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .shape = pk__fourier_shape,
     .forward = pk__fourier_forward,
     .tangent = pk__fourier_tangent,
     .reverse = pk__fourier_reverse,
     .curvature = pk__fourier_curvature},
    {.name = "constant",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .options = pk__position_options,
     .shape = pk__constant_shape,
     .forward = pk__constant_forward,
     .tangent = pk__constant_tangent,
     .reverse = pk__position_reverse},
    {.name = "position",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_ROWS,
     .linear_in_weights = 1,
     .options = pk__position_options,
     .shape = pk__position_shape,
     .forward = pk__position_forward,
     .tangent = pk__position_tangent,
     .reverse = pk__position_reverse,
     .weight_gradient = pk__position_weight_gradient,
     .row_gradients = pk__position_row_gradients,
     .initialize = pk__normal_initialize},
};

PK__END_CODE
/* <<< implementation */
#endif
