/* pathkernel/network/values.h: operations on several values, and on the shape of one: what is needed to write down any
 * network as a graph of named values, such as attention by hand, gates, or the concatenation of branches.
 *
 *     multiply      y = a o b, number by number
 *     matmul        y = A B, or A B^T: matrices in the last two dimensions, one product for each index in front of them
 *     concatenate   several values one behind the other along an axis
 *     view          y[i] = x[offset + sum_k i_k stride_k]: a slice, a permutation of the axes, a repetition along an axis
 *     gather        y[i] = x[places[i]], 0 where the place is -1: any other way to move numbers
 *     reshape       the same numbers in another shape
 *     sum           over an axis
 *     parameter     a tensor of weights, the same for every row
 *
 * All shapes are those of one row: the batch is no axis.
 */
#ifndef PATHKERNEL_VALUES_H
#define PATHKERNEL_VALUES_H
#include "shape.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes, for pk_graph_add. Shapes and permutations: the rank, then a number for each axis. */
enum { PK_MATMUL_TRANSPOSED };
enum { PK_VALUES_AXIS };
enum { PK_GATHER_ROWS, PK_GATHER_COLUMNS }; /* the shape of the result, and of the places, its constants */
enum { PK_VALUES_RANK, PK_VALUES_DIMS };
enum { PK_VIEW_RANK, PK_VIEW_DIMS, PK_VIEW_STRIDES = 5, PK_VIEW_OFFSET = 9 };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_VALUES_IMPLEMENTED)
#define PATHKERNEL_VALUES_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

static int pk__is_same_shape(const pk_shape *a, const pk_shape *b)
{
    return a->rank == b->rank && memcmp(a->dims, b->dims, (size_t)a->rank * sizeof *a->dims) == 0;
}

/* The shape in the attributes from `at` on: rank, then dims. */
static pk_status pk__attribute_shape(pk_context *context, const pk_node *node, int at, pk_shape *shape)
{
    const double rank = node->attributes[at];
    if (!(rank >= 1 && rank <= PK_SHAPE_RANK && rank == floor(rank)))
        return pk__fail(context, PK_SHAPE, "%s: a shape has 1 to %d dimensions, not %g", node->operation->name,
                        PK_SHAPE_RANK, rank);
    shape->rank = (int)rank;
    for (int i = 0; i < shape->rank; i++) {
        const double size = node->attributes[at + 1 + i];
        if (!(size >= 1 && size <= 1e15 && size == floor(size)))
            return pk__fail(context, PK_SHAPE, "%s: a dimension of %g", node->operation->name, size);
        shape->dims[i] = (size_t)size;
    }
    return PK_OK;
}

/* ---- multiply ------------------------------------------------------------------------------------------ */

static pk_status pk__multiply_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    char texts[2][PK_SHAPE_TEXT];
    const pk_shape *a = &graph->nodes[node->inputs[0]].shape, *b = &graph->nodes[node->inputs[1]].shape;
    if (node->input_count != 2)
        return pk__fail(context, PK_ARGUMENT, "multiply has two inputs, not %d", node->input_count);
    if (!pk__is_same_shape(a, b))
        return pk__fail(context, PK_SHAPE, "multiply: values of %s and of %s do not fit",
                        pk_shape_text(a, texts[0]), pk_shape_text(b, texts[1]));
    node->shape = *a;
    return PK_OK;
}

static void pk__multiply_forward(const pk_call *call)
{
    const size_t count = call->rows * call->node->width;
    for (size_t i = 0; i < count; i++)
        call->out[i] = call->in[0][i] * call->in[1][i];
}

static void pk__multiply_tangent(const pk_call *call)
{
    const size_t count = call->rows * call->node->width;
    memset(call->out_tangent, 0, count * sizeof *call->out_tangent);
    for (int j = 0; j < 2; j++)
        if (call->in_tangent[j])
            pk__times(1, count, call->in[1 - j], call->in_tangent[j], 1, call->out_tangent);
}

/* in_cotangent_j (+)= factor_(1-j) o out_cotangent, the factors being values or tangents of the inputs. */
static void pk__multiply_back(const pk_call *call, const pk_real *const *factors, int add)
{
    const size_t width = call->node->width, copies = call->copies;
    for (int j = 0; j < 2; j++)
        for (size_t row = 0; call->in_cotangent[j] && factors[1 - j] && row < call->rows; row++)
            pk__times(copies, width, call->out_cotangent + row * copies * width, factors[1 - j] + row * width,
                      add || call->accumulate[j], call->in_cotangent[j] + row * copies * width);
}

static void pk__multiply_reverse(const pk_call *call)
{
    pk__multiply_back(call, call->in, 0);
}

static void pk__multiply_curvature(const pk_call *call)
{
    pk__multiply_back(call, call->in_tangent, 1);
}

/* ---- matmul -------------------------------------------------------------------------------------------- */

/* Sizes of one product, y (m x n) = a (m x k) b, b k x n or, transposed, n x k. */
typedef struct pk__matmul {
    size_t count, m, n, k; /* count: products of a row */
    int transposed;
} pk__matmul;

static pk__matmul pk__matmul_of(const pk_call *call)
{
    const pk_shape *shape = &call->node->shape;
    pk__matmul size = {.m = shape->dims[shape->rank - 2], .n = shape->dims[shape->rank - 1]};
    size.count = call->node->width / (size.m * size.n);
    size.k = call->in_width[0] / (size.count * size.m);
    size.transposed = call->node->attributes[PK_MATMUL_TRANSPOSED] != 0;
    return size;
}

static pk_status pk__matmul_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    char texts[2][PK_SHAPE_TEXT];
    const pk_shape *a = &graph->nodes[node->inputs[0]].shape, *b = &graph->nodes[node->inputs[1]].shape;
    const int transposed = node->attributes[PK_MATMUL_TRANSPOSED] != 0, last = a->rank - 1;
    if (node->input_count != 2)
        return pk__fail(context, PK_ARGUMENT, "matmul has two inputs, not %d", node->input_count);
    if (a->rank < 2 || b->rank != a->rank ||
        memcmp(a->dims, b->dims, (size_t)(a->rank - 2) * sizeof *a->dims) != 0 ||
        a->dims[last] != b->dims[transposed ? last : last - 1])
        return pk__fail(context, PK_SHAPE, "matmul: matrices of %s and of %s%s cannot be multiplied",
                        pk_shape_text(a, texts[0]), pk_shape_text(b, texts[1]),
                        transposed ? ", the second one transposed," : "");
    node->shape = *a;
    node->shape.dims[last] = b->dims[transposed ? last - 1 : last];
    return PK_OK;
}

/* y = beta y + a b of every product of one row. */
static void pk__matmul_product(const pk__matmul *size, const pk_real *a, const pk_real *b, pk_real beta,
                               pk_real *y)
{
    const size_t m = size->m, n = size->n, k = size->k;
    for (size_t i = 0; i < size->count; i++)
        pk__gemm(0, size->transposed, m, n, k, 1, a + i * m * k, k, b + i * n * k, size->transposed ? k : n,
                 beta, y + i * m * n, n);
}

static void pk__matmul_forward(const pk_call *call)
{
    const pk__matmul size = pk__matmul_of(call);
    for (size_t row = 0; row < call->rows; row++)
        pk__matmul_product(&size, call->in[0] + row * call->in_width[0], call->in[1] + row * call->in_width[1],
                           0, call->out + row * call->node->width);
}

static void pk__matmul_tangent(const pk_call *call)
{
    const pk__matmul size = pk__matmul_of(call);
    for (size_t row = 0; row < call->rows; row++) {
        const size_t a = row * call->in_width[0], b = row * call->in_width[1];
        pk_real *to = call->out_tangent + row * call->node->width;
        memset(to, 0, call->node->width * sizeof *to);
        if (call->in_tangent[0])
            pk__matmul_product(&size, call->in_tangent[0] + a, call->in[1] + b, 1, to);
        if (call->in_tangent[1])
            pk__matmul_product(&size, call->in[0] + a, call->in_tangent[1] + b, 1, to);
    }
}

/* With the cotangent u of y: of a it is u b^T, of b a^T u, or, transposed, u b and u^T a. */
static void pk__matmul_back(const pk_call *call, const pk_real *const *factors, int add)
{
    const pk__matmul size = pk__matmul_of(call);
    const size_t m = size.m, n = size.n, k = size.k;
    const int flip = size.transposed;
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        const size_t row = copy / call->copies;
        for (size_t i = 0; i < size.count; i++) {
            const pk_real *u = call->out_cotangent + copy * call->node->width + i * m * n;
            if (call->in_cotangent[0] && factors[1])
                pk__gemm(0, !flip, m, k, n, 1, u, n, factors[1] + row * call->in_width[1] + i * n * k,
                         flip ? k : n, add || call->accumulate[0],
                         call->in_cotangent[0] + copy * call->in_width[0] + i * m * k, k);
            if (!call->in_cotangent[1] || !factors[0])
                continue;
            const pk_real *a = factors[0] + row * call->in_width[0] + i * m * k;
            pk_real *to = call->in_cotangent[1] + copy * call->in_width[1] + i * n * k;
            const pk_real beta = add || call->accumulate[1];
            if (flip)
                pk__gemm(1, 0, n, k, m, 1, u, n, a, k, beta, to, k);
            else
                pk__gemm(1, 0, k, n, m, 1, a, k, u, n, beta, to, n);
        }
    }
}

static void pk__matmul_reverse(const pk_call *call)
{
    pk__matmul_back(call, call->in, 0);
}

static void pk__matmul_curvature(const pk_call *call)
{
    pk__matmul_back(call, call->in_tangent, 1);
}

/* ---- concatenate --------------------------------------------------------------------------------------- */

static pk_status pk__concatenate_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double axis = node->attributes[PK_VALUES_AXIS];
    const pk_shape *first = &graph->nodes[node->inputs[0]].shape;
    char texts[2][PK_SHAPE_TEXT];
    if (!(axis >= 0 && axis < first->rank && axis == floor(axis)))
        return pk__fail(context, PK_SHAPE, "concatenate: values of %s have no axis %g",
                        pk_shape_text(first, texts[0]), axis);
    node->shape = *first;
    for (int j = 1; j < node->input_count; j++) {
        const pk_shape *other = &graph->nodes[node->inputs[j]].shape;
        pk_shape like = *other;
        like.dims[(int)axis] = first->dims[(int)axis];
        if (!pk__is_same_shape(first, &like))
            return pk__fail(context, PK_SHAPE, "concatenate: values of %s and of %s do not fit along axis %g",
                            pk_shape_text(first, texts[0]), pk_shape_text(other, texts[1]), axis);
        node->shape.dims[(int)axis] += other->dims[(int)axis];
    }
    return PK_OK;
}

/* Copies the numbers of input j between the whole and a part, for `rows` rows: part to whole, or back with add. */
static void pk__concatenate_copy(const pk_call *call, int j, size_t rows, int back, int add, pk_real *whole,
                                 pk_real *part)
{
    const pk_node *node = call->node;
    size_t runs = 1, at = 0; /* runs of a row; of a run, the numbers before this input's */
    for (int i = 0; i < (int)node->attributes[PK_VALUES_AXIS]; i++)
        runs *= node->shape.dims[i];
    for (int i = 0; i < j; i++)
        at += call->in_width[i] / runs;
    const size_t own = call->in_width[j] / runs, all = node->width / runs;
    for (size_t run = 0; run < rows * runs; run++)
        if (back)
            pk__give(own, whole + run * all + at, add, part + run * own);
        else
            memcpy(whole + run * all + at, part + run * own, own * sizeof *part);
}

static void pk__concatenate_forward(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        pk__concatenate_copy(call, j, call->rows, 0, 0, call->out, (pk_real *)call->in[j]); /* only read */
}

static void pk__concatenate_tangent(const pk_call *call)
{
    memset(call->out_tangent, 0, call->rows * call->node->width * sizeof *call->out_tangent);
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_tangent[j])
            pk__concatenate_copy(call, j, call->rows, 0, 0, call->out_tangent, (pk_real *)call->in_tangent[j]);
}

static void pk__concatenate_reverse(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_cotangent[j])
            pk__concatenate_copy(call, j, call->rows * call->copies, 1, call->accumulate[j],
                                 (pk_real *)call->out_cotangent, call->in_cotangent[j]);
}

/* ---- view ---------------------------------------------------------------------------------------------- */

static pk_status pk__view_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const size_t width = graph->nodes[node->inputs[0]].width;
    const double offset = node->attributes[PK_VIEW_OFFSET];
    double last = offset;
    pk_status status = pk__attribute_shape(context, node, PK_VIEW_RANK, &node->shape);
    int fits = offset >= 0 && offset == floor(offset);
    for (int i = 0; !status && i < node->shape.rank; i++) {
        const double stride = node->attributes[PK_VIEW_STRIDES + i];
        fits &= stride >= 0 && stride == floor(stride);
        last += stride * ((double)node->shape.dims[i] - 1);
    }
    if (!status && !(fits && last < (double)width))
        status = pk__fail(context, PK_SHAPE, "view: its last number is number %g of %zu", last, width);
    return status;
}

/* For each row: to[i] = from[place of i] (wide: the input), or back: to[place of i] += from[i]. */
static void pk__view_copy(const pk_call *call, size_t rows, int back, const pk_real *from, pk_real *to)
{
    const pk_node *node = call->node;
    const double *strides = node->attributes + PK_VIEW_STRIDES;
    const pk_shape *shape = &node->shape;
    const size_t width = node->width, in = call->in_width[0], run = shape->dims[shape->rank - 1];
    const size_t step = (size_t)strides[shape->rank - 1];
    for (size_t row = 0; row < rows; row++)
        for (size_t first = 0; first < width; first += run) {
            size_t at = (size_t)node->attributes[PK_VIEW_OFFSET] + row * in, rest = first / run;
            for (int i = shape->rank - 2; i >= 0; i--) {
                at += rest % shape->dims[i] * (size_t)strides[i];
                rest /= shape->dims[i];
            }
            const size_t own = row * width + first;
            if (back)
                for (size_t j = 0; j < run; j++)
                    to[at + j * step] += from[own + j];
            else
                for (size_t j = 0; j < run; j++)
                    to[own + j] = from[at + j * step];
        }
}

static void pk__view_forward(const pk_call *call)
{
    pk__view_copy(call, call->rows, 0, call->in[0], call->out);
}

static void pk__view_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__view_copy(call, call->rows, 0, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof *call->out_tangent);
}

static void pk__view_reverse(const pk_call *call)
{
    const size_t rows = call->rows * call->copies;
    if (!call->in_cotangent[0])
        return;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, rows * call->in_width[0] * sizeof(pk_real));
    pk__view_copy(call, rows, 1, call->out_cotangent, call->in_cotangent[0]);
}

/* ---- gather ---------------------------------------------------------------------------------------------- */

static pk_status pk__gather_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double width = (double)graph->nodes[node->inputs[0]].width;
    size_t count = 0;
    node->shape.rank = 2;
    for (int i = 0; i < 2; i++)
        node->shape.dims[i] = (size_t)node->attributes[i];
    if (!pk__multiply(node->shape.dims[0], node->shape.dims[1], &count) || count != node->constant_count)
        return pk__fail(context, PK_SHAPE, "gather: %g x %g numbers, of %zu places", node->attributes[0],
                        node->attributes[1], node->constant_count);
    for (size_t i = 0; i < count; i++) {
        const double place = node->constants[i];
        if (!(place >= -1 && place < width && place == floor(place)))
            return pk__fail(context, PK_ARGUMENT,
                            "gather: place %zu is %g; the value has the places 0 to %g, and -1 stands for 0", i,
                            place, width - 1);
    }
    return PK_OK;
}

static void pk__gather(const pk_call *call, const pk_real *from, pk_real *to)
{
    const pk_node *node = call->node;
    for (size_t row = 0; row < call->rows; row++, from += call->in_width[0], to += node->width)
        for (size_t i = 0; i < node->width; i++)
            to[i] = node->constants[i] < 0 ? 0 : from[(size_t)node->constants[i]];
}

static void pk__gather_forward(const pk_call *call)
{
    pk__gather(call, call->in[0], call->out);
}

static void pk__gather_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__gather(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof *call->out_tangent);
}

static void pk__gather_reverse(const pk_call *call)
{
    const pk_node *node = call->node;
    const size_t rows = call->rows * call->copies;
    const pk_real *from = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    if (!to)
        return;
    if (!call->accumulate[0])
        memset(to, 0, rows * call->in_width[0] * sizeof *to);
    for (size_t row = 0; row < rows; row++, to += call->in_width[0], from += node->width)
        for (size_t i = 0; i < node->width; i++)
            if (node->constants[i] >= 0)
                to[(size_t)node->constants[i]] += from[i];
}

/* ---- reshape, sum, parameter ------------------------------------------------------------------------- */

static pk_status pk__reshape_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    char texts[2][PK_SHAPE_TEXT];
    pk_status status = pk__attribute_shape(context, node, PK_VALUES_RANK, &node->shape);
    size_t width = 0;
    if (!status)
        status = pk__shape_width(context, &node->shape, &width);
    if (!status && width != input->width)
        status = pk__fail(context, PK_SHAPE, "reshape: %s holds %zu numbers, and %s has %zu",
                          pk_shape_text(&node->shape, texts[0]), width, pk_shape_text(&input->shape, texts[1]),
                          input->width);
    return status;
}

/* The axis goes; of a vector one number is left. */
static pk_status pk__sum_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *shape = &graph->nodes[node->inputs[0]].shape;
    const double axis = node->attributes[PK_VALUES_AXIS];
    char text[PK_SHAPE_TEXT];
    if (!(axis >= 0 && axis < shape->rank && axis == floor(axis)))
        return pk__fail(context, PK_SHAPE, "sum: values of %s have no axis %g", pk_shape_text(shape, text),
                        axis);
    node->shape.rank = 0;
    for (int i = 0; i < shape->rank; i++)
        if (i != (int)axis)
            node->shape.dims[node->shape.rank++] = shape->dims[i];
    if (!node->shape.rank)
        node->shape.dims[node->shape.rank++] = 1;
    return PK_OK;
}

/* Numbers behind the axis; with the width of the input and of the node that is all of the shape that matters. */
static size_t pk__sum_inner(const pk_node *node)
{
    size_t inner = 1;
    for (int i = (int)node->attributes[PK_VALUES_AXIS]; i < node->shape.rank; i++)
        inner *= node->shape.dims[i];
    return inner;
}

static void pk__sum_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t inner = pk__sum_inner(call->node), terms = call->in_width[0] / call->node->width;
    for (size_t run = 0; run < call->rows * (call->node->width / inner); run++, to += inner)
        for (size_t i = 0; i < terms; i++, from += inner)
            pk__give(inner, from, i > 0, to);
}

static void pk__sum_forward(const pk_call *call)
{
    pk__sum_rows(call, call->in[0], call->out);
}

static void pk__sum_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__sum_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof *call->out_tangent);
}

static void pk__sum_reverse(const pk_call *call)
{
    const size_t inner = pk__sum_inner(call->node), terms = call->in_width[0] / call->node->width;
    const pk_real *from = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    for (size_t run = 0; to && run < call->rows * call->copies * (call->node->width / inner);
         run++, from += inner)
        for (size_t i = 0; i < terms; i++, to += inner)
            pk__give(inner, from, call->accumulate[0], to);
}

static pk_status pk__parameter_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)graph;
    pk_status status = pk__attribute_shape(context, node, PK_VALUES_RANK, &node->shape);
    if (!status)
        status = pk__shape_width(context, &node->shape, &node->weight_count);
    pk__node_tensor(node, 1, node->weight_count, 0);
    node->tensors[0].shape = node->shape;
    return status;
}

#define PK__VALUES_RULES(rule) \
    .forward = pk__##rule##_forward, .tangent = pk__##rule##_tangent, .reverse = pk__##rule##_reverse

static const pk_operation pk__values_operations[] = {
    {.name = "multiply",
     .smoothness = PK_MULTILINEAR,
     .linear_in_weights = 1,
     .shape = pk__multiply_shape,
     .curvature = pk__multiply_curvature,
     PK__VALUES_RULES(multiply)},
    {.name = "matmul",
     .smoothness = PK_MULTILINEAR,
     .linear_in_weights = 1,
     .shape = pk__matmul_shape,
     .curvature = pk__matmul_curvature,
     PK__VALUES_RULES(matmul)},
    {.name = "concatenate",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__concatenate_shape,
     PK__VALUES_RULES(concatenate)},
    {.name = "view",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__view_shape,
     PK__VALUES_RULES(view)},
    {.name = "gather",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__gather_shape,
     PK__VALUES_RULES(gather)},
    {.name = "reshape",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__reshape_shape,
     PK__VALUES_RULES(add)},
    {.name = "sum",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__sum_shape,
     PK__VALUES_RULES(sum)},
    {.name = "parameter",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_ROWS,
     .linear_in_weights = 1,
     .shape = pk__parameter_shape,
     .weight_gradient = pk__position_weight_gradient,
     .row_gradients = pk__position_row_gradients,
     .initialize = pk__normal_initialize,
     PK__VALUES_RULES(position)},
};
#undef PK__VALUES_RULES

PK__END_CODE
/* <<< implementation */
#endif
