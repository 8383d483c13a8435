/* pathkernel/network/dense.h: the dense layer, and the usual distributions of starting weights. */
#ifndef PATHKERNEL_DENSE_H
#define PATHKERNEL_DENSE_H
#include "../math/elementary.h"
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes of dense, for pk_graph_add: outputs, 1 with bias, initialization, gain. */
enum { PK_DENSE_OUTPUTS, PK_DENSE_BIAS, PK_DENSE_INITIAL, PK_DENSE_GAIN };

/* Starting weights: PyTorch's default for Linear and Conv2d is uniform in +-1/sqrt(fan_in), biases too. The others
 * have zero biases; normal ones have the standard deviation gain times
 *     He: sqrt(2 / fan_in), Glorot: sqrt(2 / (fan_in + fan_out)), LeCun: sqrt(1 / fan_in), normal: 1,
 * uniform ones the same standard deviation. */
typedef enum pk_initial {
    PK_INITIAL_DEFAULT,
    PK_INITIAL_HE,
    PK_INITIAL_HE_UNIFORM,
    PK_INITIAL_GLOROT,
    PK_INITIAL_GLOROT_UNIFORM,
    PK_INITIAL_LECUN,
    PK_INITIAL_LECUN_UNIFORM,
    PK_INITIAL_NORMAL,
    PK_INITIAL_ZERO,
    PK_INITIAL_STANDARD /* weights and biases standard normal, whatever the gain: the NTK parameterization's */
} pk_initial;

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DENSE_IMPLEMENTED)
#define PATHKERNEL_DENSE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

#define PK__INITIAL_OPTIONS(first)                                                                       \
    {.name = "init",                                                                                     \
     .kind = PK_OPTION_CHOICE,                                                                           \
     .attribute = first,                                                                                 \
     .choices = "default he he_uniform glorot glorot_uniform lecun lecun_uniform normal zero standard"}, \
    {                                                                                                    \
        .name = "gain", .kind = PK_OPTION_NUMBER, .attribute = (first) + 1, .most = DBL_MAX              \
    }

/* A weight of fan_out x fan_in and count - fan_out fan_in biases. */
PK__PRIVATE void pk__initialize_matrix(pk_initial kind, double gain, size_t fan_in, size_t fan_out,
                                       size_t count, pk_random *random, pk_real *weights)
{
    const double in = (double)fan_in, out = (double)fan_out;
    double size = gain; /* the standard deviation, or half the width of a uniform distribution */
    int uniform = 0, biases = 0;
    switch (kind) {
    case PK_INITIAL_DEFAULT:
        size /= sqrt(in);
        uniform = biases = 1;
        break;
    case PK_INITIAL_HE: size *= sqrt(2 / in); break;
    case PK_INITIAL_HE_UNIFORM:
        size *= sqrt(6 / in);
        uniform = 1;
        break;
    case PK_INITIAL_GLOROT: size *= sqrt(2 / (in + out)); break;
    case PK_INITIAL_GLOROT_UNIFORM:
        size *= sqrt(6 / (in + out));
        uniform = 1;
        break;
    case PK_INITIAL_LECUN: size *= sqrt(1 / in); break;
    case PK_INITIAL_LECUN_UNIFORM:
        size *= sqrt(3 / in);
        uniform = 1;
        break;
    case PK_INITIAL_ZERO: size = 0; break;
    case PK_INITIAL_STANDARD:
        size = 1;
        biases = 1;
        break;
    case PK_INITIAL_NORMAL:
    default: break;
    }
    const size_t drawn = biases ? count : pk__min(count, fan_in * fan_out);
    for (size_t i = 0; i < count; i++) {
        if (i >= drawn || size == 0)
            weights[i] = 0;
        else if (uniform)
            weights[i] = (pk_real)(size * (2 * pk_random_uniform(random) - 1));
        else
            weights[i] = (pk_real)(size * pk_random_normal(random));
    }
}

/* dense N [nobias]: y = W x + b along the last dimension, W (out, in). */
static pk_status pk__dense_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    const size_t out = (size_t)node->attributes[PK_DENSE_OUTPUTS];
    node->shape = input->shape;
    node->fan_in = input->shape.dims[input->shape.rank - 1];
    node->fan_out = node->shape.dims[input->shape.rank - 1] = out;
    node->positions = input->width / node->fan_in;
    if (!pk__multiply(out, node->fan_in, &node->weight_count) || node->weight_count > SIZE_MAX / 2 - out)
        return pk__fail(context, PK_OVERFLOW, "dense %zu: its weights overflow", out);
    if (node->attributes[PK_DENSE_BIAS] != 0)
        node->weight_count += out;
    return PK_OK;
}

static void pk__dense_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    pk__initialize_matrix((pk_initial)(int)node->attributes[PK_DENSE_INITIAL], node->attributes[PK_DENSE_GAIN],
                          node->fan_in, node->fan_out, node->weight_count, random, weights);
}

static int pk__dense_bias(const pk_call *call)
{
    return call->node->attributes[PK_DENSE_BIAS] != 0;
}

/* A product of a layer: C (+)= op(A) op(B) in tiles of rows or of columns of C. Tiles are cut by shape only, from a size
 * on that is worth starting threads for, so that threads can share the tiles of one block of rows. */
typedef struct pk__dense_product {
    int transpose_a, transpose_b;
    size_t m, n, k;
    const pk_real *a, *b;
    size_t lda, ldb;
    pk_real beta, *c;
    size_t ldc, tile; /* ldc: also the columns of C where rows are cut */
    int by_rows;
} pk__dense_product;

enum { PK__DENSE_TILE = 256 / (int)sizeof(pk_real), PK__DENSE_TILES = 8, PK__DENSE_WORTH = 1 << 19 };

static void pk__dense_tile(const pk__dense_product *p, size_t tile)
{
    const size_t first = tile * p->tile, count = pk__min((p->by_rows ? p->m : p->n) - first, p->tile);
    if (p->by_rows)
        pk__gemm(p->transpose_a, p->transpose_b, count, p->n, p->k, 1,
                 p->a + first * (p->transpose_a ? 1 : p->lda), p->lda, p->b, p->ldb, p->beta,
                 p->c + first * p->ldc, p->ldc);
    else
        pk__gemm(p->transpose_a, p->transpose_b, p->m, count, p->k, 1, p->a, p->lda,
                 p->b + first * (p->transpose_b ? p->ldb : 1), p->ldb, p->beta, p->c + first, p->ldc);
}

static void pk__dense_multiply(pk__dense_product *p, const pk_call *call)
{
    const size_t cut = p->by_rows ? p->m : p->n;
    const double parts = (double)p->m * (double)p->n * (double)p->k / PK__DENSE_WORTH;
    /* Few rows are packed for each tile again. */
    const size_t most = p->m > PK__FEW_PANELS * PK_PANEL ? PK__DENSE_TILES : PK__DENSE_TILES / 2;
    p->tile = parts < 2 ? cut : pk__max(PK__DENSE_TILE, (cut / most + 7) / 8 * 8);
    const size_t tiles = pk__blocks(cut, p->tile);
    const int threads = (int)pk__min((size_t)pk__max((size_t)call->threads, 1), tiles);
    if (threads > 1 && threads <= parts) {
        pk__team team = pk__team_of(call->context, threads, tiles);
        PK__PARALLEL(team)
        for (size_t tile = pk__first_task(&team); tile < tiles; tile = pk__next_task(&team))
            pk__dense_tile(p, tile);
        pk__team_end(&team);
    } else {
        for (size_t tile = 0; tile < tiles; tile++)
            pk__dense_tile(p, tile);
    }
}

static void pk__dense_apply(const pk_call *call, const pk_real *weights, const pk_real *in, int bias,
                            pk_real beta, pk_real *out)
{
    const size_t rows = call->rows * call->node->positions, width = call->node->fan_out,
                 fan_in = call->node->fan_in;
    if (bias) {
        const pk_real *from = weights + width * fan_in;
        for (size_t row = 0; row < rows; row++)
            memcpy(out + row * width, from, width * sizeof *out);
        beta = 1;
    }
    pk__dense_product product = {0,      1,      rows, width, fan_in, in, weights,
                                 fan_in, fan_in, beta, out,   width,  0,  0};
    pk__dense_multiply(&product, call);
}

static void pk__dense_forward(const pk_call *call)
{
    pk__dense_apply(call, call->weights, call->in[0], pk__dense_bias(call), 0, call->out);
}

static void pk__dense_tangent(const pk_call *call)
{
    pk_real beta = 0;
    if (call->direction) {
        pk__dense_apply(call, call->direction, call->in[0], pk__dense_bias(call), 0, call->out_tangent);
        beta = 1;
    }
    if (call->in_tangent[0])
        pk__dense_apply(call, call->weights, call->in_tangent[0], 0, beta, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__dense_reverse(const pk_call *call)
{
    const size_t width = call->node->fan_out, fan_in = call->node->fan_in,
                 rows = call->rows * call->copies * call->node->positions;
    const int accumulate = call->accumulate[0];
    pk_real *to = call->in_cotangent[0];
    if (call->node->positions == 1 &&
        pk__has_common_zeros(rows, call->copies, width, call->out_cotangent, width)) {
        pk__grouped_product(rows, call->copies, fan_in, width, call->out_cotangent, width, call->weights,
                            fan_in, !accumulate, to, fan_in);
        return;
    }
    pk__dense_product product = {0,
                                 0,
                                 rows,
                                 fan_in,
                                 width,
                                 call->out_cotangent,
                                 call->weights,
                                 width,
                                 fan_in,
                                 (pk_real)(accumulate ? 1 : 0),
                                 to,
                                 fan_in,
                                 0,
                                 0};
    pk__dense_multiply(&product, call);
}

static void pk__dense_weight_gradient(const pk_call *call)
{
    const size_t rows = call->rows * call->node->positions, width = call->node->fan_out,
                 fan_in = call->node->fan_in;
    pk__dense_product product = {1,           0,     width,  fan_in, rows,           call->out_cotangent,
                                 call->in[0], width, fan_in, 1,      call->gradient, fan_in,
                                 0,           1};
    pk__dense_multiply(&product, call);
    if (pk__dense_bias(call)) {
        pk_real *bias = call->gradient + width * fan_in;
        for (size_t row = 0; row < rows; row++) {
            const pk_real *cotangent = call->out_cotangent + row * width;
            PK__SIMD
            for (size_t j = 0; j < width; j++)
                bias[j] += cotangent[j];
        }
    }
}

static const pk_option pk__dense_options[] = {
    {.name = "outputs",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_DENSE_OUTPUTS,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "nobias", .kind = PK_OPTION_FLAG, .attribute = PK_DENSE_BIAS},
    PK__INITIAL_OPTIONS(PK_DENSE_INITIAL),
    {.name = NULL},
};

static const pk_operation pk__dense_operations[] = {
    {.name = "dense",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_OUTER,
     .linear_in_weights = 1,
     .options = pk__dense_options,
     .defaults = {0, 1, 0, 1},
     .shape = pk__dense_shape,
     .forward = pk__dense_forward,
     .tangent = pk__dense_tangent,
     .reverse = pk__dense_reverse,
     .weight_gradient = pk__dense_weight_gradient,
     .initialize = pk__dense_initialize},
};

PK__END_CODE
/* <<< implementation */
#endif
