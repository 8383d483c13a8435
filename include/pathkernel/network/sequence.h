/* pathkernel/network/sequence.h: operations on tokens: embedding, attention, and what makes one vector of several. */
#ifndef PATHKERNEL_SEQUENCE_H
#define PATHKERNEL_SEQUENCE_H
#include "norm.h"

/* >>> declarations */
PK__BEGIN_C

/* Attributes, for pk_graph_add. */
enum {
    PK_EMBEDDING_TOKENS,
    PK_EMBEDDING_WIDTH,
    PK_EMBEDDING_PADDING, /* the token of zeros, counted from 1; 0: none */
    PK_EMBEDDING_FIRST,   /* the first number of a row that is a token */
    PK_EMBEDDING_COUNT,   /* how many are tokens; 0: all from the first one on */
    PK_EMBEDDING_OFFSET   /* added to each of them */
};
enum { PK_ATTEND_HEADS, PK_ATTEND_CAUSAL, PK_ATTEND_SHARED };
enum { PK_TOKEN_INDEX };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SEQUENCE_IMPLEMENTED)
#define PATHKERNEL_SEQUENCE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- embedding -------------------------------------------------------------------------------------- */

/* y_i = w[x_(first + i) + offset] for the tokens x of a row of data, w (tokens, width); zeros for the token `padding`. */
static pk_status pk__embedding_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    const size_t tokens = (size_t)node->attributes[PK_EMBEDDING_TOKENS],
                 width = (size_t)node->attributes[PK_EMBEDDING_WIDTH];
    const double first = node->attributes[PK_EMBEDDING_FIRST], all = (double)input->width;
    const double count =
        node->attributes[PK_EMBEDDING_COUNT] != 0 ? node->attributes[PK_EMBEDDING_COUNT] : all - first;
    char text[PK_SHAPE_TEXT];
    if (node->inputs[0] != 0 || input->shape.rank != 1)
        return pk__fail(
            context, PK_SHAPE, "embedding takes the data, a row of whole numbers such as 'input 3', not %s%s",
            pk_shape_text(&input->shape, text), node->inputs[0] ? " values behind other layers" : "");
    if (!(first + count <= all && count >= 1))
        return pk__fail(context, PK_SHAPE,
                        "embedding: a row of data has %g numbers, so tokens %g to %g are not all there", all,
                        first, first + fmax(count, 1) - 1);
    if (node->attributes[PK_EMBEDDING_PADDING] > (double)tokens ||
        node->attributes[PK_EMBEDDING_OFFSET] >= (double)tokens)
        return pk__fail(context, PK_ARGUMENT, "embedding: padding is %g and offset %g; there are %zu tokens",
                        node->attributes[PK_EMBEDDING_PADDING] - 1, node->attributes[PK_EMBEDDING_OFFSET],
                        tokens);
    node->shape.rank = 2;
    node->shape.dims[0] = (size_t)count;
    node->shape.dims[1] = width;
    if (!pk__multiply(tokens, width, &node->weight_count))
        return pk__fail(context, PK_OVERFLOW, "embedding: its weights overflow");
    pk__node_tensor(node, 2, tokens, width);
    return PK_OK;
}

static pk_status pk__embedding_check(pk_context *context, const pk_node *node, size_t row, const pk_real *in)
{
    const double offset = node->attributes[PK_EMBEDDING_OFFSET];
    const size_t first = (size_t)node->attributes[PK_EMBEDDING_FIRST];
    pk_status status = PK_OK;
    for (size_t i = first; i < first + node->shape.dims[0] && !status; i++)
        status = pk__check_token(context, "embedding", row, i, in[i],
                                 node->attributes[PK_EMBEDDING_TOKENS] - offset);
    return status;
}

/* Where the weights of a row's token number i start, SIZE_MAX for padding. What is no token counts as the first one:
 * pk_graph_check_inputs refuses it. */
static size_t pk__embedded(const pk_call *call, size_t row, size_t i)
{
    const double *attributes = call->node->attributes;
    const double token = call->in[0][row * call->in_width[0] + (size_t)attributes[PK_EMBEDDING_FIRST] + i] +
                         attributes[PK_EMBEDDING_OFFSET];
    if (attributes[PK_EMBEDDING_PADDING] != 0 && token + 1 == attributes[PK_EMBEDDING_PADDING])
        return SIZE_MAX;
    return token >= 0 && token < attributes[PK_EMBEDDING_TOKENS] ? (size_t)token * call->node->shape.dims[1]
                                                                 : 0;
}

static void pk__embedding_rows(const pk_call *call, const pk_real *weights, pk_real *to)
{
    const size_t tokens = call->node->shape.dims[0], width = call->node->shape.dims[1];
    for (size_t i = 0; i < call->rows * tokens; i++, to += width) {
        const size_t from = pk__embedded(call, i / tokens, i % tokens);
        if (from == SIZE_MAX)
            memset(to, 0, width * sizeof *to);
        else
            memcpy(to, weights + from, width * sizeof *to);
    }
}

static void pk__embedding_forward(const pk_call *call)
{
    pk__embedding_rows(call, call->weights, call->out);
}

static void pk__embedding_tangent(const pk_call *call)
{
    if (call->direction)
        pk__embedding_rows(call, call->direction, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* gradient += (dF/dw)^T delta of the row. */
static void pk__embedding_add(const pk_call *call, size_t row, const pk_real *delta, pk_real *gradient)
{
    const size_t tokens = call->node->shape.dims[0], width = call->node->shape.dims[1];
    for (size_t i = 0; i < tokens; i++, delta += width) {
        const size_t to = pk__embedded(call, row, i);
        if (to != SIZE_MAX)
            pk__give(width, delta, 1, gradient + to);
    }
}

static void pk__embedding_weight_gradient(const pk_call *call)
{
    for (size_t row = 0; row < call->rows; row++)
        pk__embedding_add(call, row, call->out_cotangent + row * call->node->width, call->gradient);
}

static void pk__embedding_row_gradients(const pk_call *call)
{
    const size_t weights = call->node->weight_count;
    memset(call->gradient, 0, call->rows * call->copies * weights * sizeof(pk_real));
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        pk__embedding_add(call, copy / call->copies, call->out_cotangent + copy * call->node->width,
                          call->gradient + copy * weights);
}

/* ---- token, mean_tokens ----------------------------------------------------------------------------- */

static pk_status pk__tokens_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *shape = &graph->nodes[node->inputs[0]].shape;
    char text[PK_SHAPE_TEXT];
    if (shape->rank != 2)
        return pk__fail(context, PK_SHAPE, "%s needs values of tokens x width, not %s", node->operation->name,
                        pk_shape_text(shape, text));
    node->shape.rank = 1;
    node->shape.dims[0] = shape->dims[1];
    return PK_OK;
}

/* token I: y = x_I; a negative I counts from the end. */
static pk_status pk__token_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double tokens = (double)graph->nodes[node->inputs[0]].shape.dims[0];
    const double index = node->attributes[PK_TOKEN_INDEX];
    pk_status status = pk__tokens_shape(context, graph, node);
    if (!status && !(index >= -tokens && index < tokens))
        status = pk__fail(context, PK_SHAPE, "token %g: there are %g tokens", index, tokens);
    return status;
}

/* Where the token starts in a row of its input. */
static size_t pk__token_start(const pk_call *call)
{
    const double index = call->node->attributes[PK_TOKEN_INDEX];
    return index >= 0 ? (size_t)index * call->node->width
                      : call->in_width[0] - (size_t)-index * call->node->width;
}

static void pk__token_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width, start = pk__token_start(call);
    for (size_t row = 0; row < call->rows; row++)
        memcpy(to + row * width, from + row * call->in_width[0] + start, width * sizeof *to);
}

static void pk__token_forward(const pk_call *call)
{
    pk__token_rows(call, call->in[0], call->out);
}

static void pk__token_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__token_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__token_reverse(const pk_call *call)
{
    const size_t width = call->node->width, in = call->in_width[0], start = pk__token_start(call);
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        pk__give(width, call->out_cotangent + copy * width, 1, to + start);
    }
}

/* mean_tokens: y = the mean of the tokens. */
static void pk__mean_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width, tokens = call->in_width[0] / width;
    for (size_t row = 0; row < call->rows; row++, to += width) {
        for (size_t i = 0; i < tokens; i++, from += width)
            pk__give(width, from, i > 0, to);
        for (size_t j = 0; j < width; j++)
            to[j] /= (pk_real)tokens;
    }
}

static void pk__mean_tokens_reverse(const pk_call *call)
{
    const size_t width = call->node->width, tokens = call->in_width[0] / width;
    pk_real *to = call->in_cotangent[0];
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        for (size_t i = 0; i < tokens; i++, to += width)
            for (size_t j = 0; j < width; j++)
                to[j] =
                    (call->accumulate[0] ? to[j] : 0) + call->out_cotangent[copy * width + j] / (pk_real)tokens;
}

static void pk__mean_tokens_forward(const pk_call *call)
{
    pk__mean_rows(call, call->in[0], call->out);
}

static void pk__mean_tokens_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__mean_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* ---- attend ----------------------------------------------------------------------------------------- */

/* Each head, a slice of the width d = E / heads: O = P V, P = softmax(Q K^T / sqrt(d)) by rows (Vaswani et
 * al. 2017, eq. 1); causal: token i sees tokens 0 .. i, the softmax is over these. A row of the input is Q, K
 * and V side by side (tokens x 3E), or, shared, all three at once (tokens x E). */
static pk_status pk__attend_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *shape = &graph->nodes[node->inputs[0]].shape;
    const size_t heads = (size_t)node->attributes[PK_ATTEND_HEADS];
    const size_t parts = node->attributes[PK_ATTEND_SHARED] != 0 ? 1 : 3;
    char text[PK_SHAPE_TEXT];
    size_t scores = 0;
    if (shape->rank != 2)
        return pk__fail(context, PK_SHAPE, "attend needs values of tokens x width, not %s",
                        pk_shape_text(shape, text));
    if (shape->dims[1] % parts || shape->dims[1] / parts % heads)
        return pk__fail(context, PK_SHAPE, "attention: a width of %zu%s cannot be split into %zu heads",
                        shape->dims[1], parts == 3 ? " for queries, keys and values" : "", heads);
    if (!pk__multiply(shape->dims[0], shape->dims[0], &scores) || scores > SIZE_MAX / 4096)
        return pk__fail(context, PK_OVERFLOW, "attention over %zu tokens: the scores overflow", shape->dims[0]);
    node->shape.rank = 2;
    node->shape.dims[0] = shape->dims[0];
    node->shape.dims[1] = shape->dims[1] / parts;
    return PK_OK;
}

/* P and, for the derivatives, three more matrices of one head of one row; then a slice of a head, transposed. */
static size_t pk__attend_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return node->shape.dims[0] * (4 * node->shape.dims[0] + node->shape.dims[1]);
}

/* The sizes, and where a head's queries, keys and values start in a row. */
typedef struct pk__heads {
    size_t heads, tokens, depth; /* of a head */
    size_t in, out;              /* width of a token */
    size_t key, value;           /* the query is at 0 */
    pk_real scale;
    int causal, shared;
    pk_real *turned; /* depth x tokens, room */
} pk__heads;

static pk__heads pk__attend_heads(const pk_call *call)
{
    const pk_node *node = call->node;
    pk__heads h;
    h.heads = (size_t)node->attributes[PK_ATTEND_HEADS];
    h.causal = node->attributes[PK_ATTEND_CAUSAL] != 0;
    h.shared = node->attributes[PK_ATTEND_SHARED] != 0;
    h.tokens = node->shape.dims[0];
    h.out = node->shape.dims[1];
    h.in = h.shared ? h.out : 3 * h.out;
    h.depth = h.out / h.heads;
    h.key = h.shared ? 0 : h.out;
    h.value = 2 * h.key;
    h.scale = (pk_real)(1 / sqrt((double)h.depth));
    h.turned = call->scratch + 4 * h.tokens * h.tokens;
    return h;
}

/* C := beta C + alpha op(A) B. Heads of a few short tokens are too small for a library's product. */
static void pk__attend_product(int transpose_a, size_t m, size_t n, size_t k, pk_real alpha, const pk_real *a,
                               size_t lda, const pk_real *b, size_t ldb, pk_real beta, pk_real *c, size_t ldc)
{
    if (m * n * k > 8192) {
        pk__gemm(transpose_a, 0, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    const size_t down = transpose_a ? 1 : lda, along = transpose_a ? lda : 1;
    pk__small_product(m, n, k, alpha, a, down, along, b, ldb, beta, c, ldc);
}

/* tokens x tokens = beta to + alpha a b^T, of slices of a head, and tokens x depth += alpha op(p) b. */
static void pk__scores(const pk__heads *h, pk_real alpha, const pk_real *a, size_t lda, const pk_real *b,
                       size_t ldb, pk_real beta, pk_real *to)
{
    for (size_t i = 0; i < h->tokens; i++)
        for (size_t j = 0; j < h->depth; j++)
            h->turned[j * h->tokens + i] = b[i * ldb + j];
    pk__attend_product(0, h->tokens, h->tokens, h->depth, alpha, a, lda, h->turned, h->tokens, beta, to,
                       h->tokens);
}

static void pk__mix(const pk__heads *h, int transpose, pk_real alpha, const pk_real *p, const pk_real *b,
                    size_t ldb, pk_real beta, pk_real *to, size_t ldto)
{
    pk__attend_product(transpose, h->tokens, h->depth, h->tokens, alpha, p, h->tokens, b, ldb, beta, to, ldto);
}

/* The tokens that token i sees. */
static size_t pk__seen(const pk__heads *h, size_t i)
{
    return h->causal ? i + 1 : h->tokens;
}

/* P of the head whose query starts at x. */
static void pk__attend_weights(const pk__heads *h, const pk_real *x, pk_real *p)
{
    pk__scores(h, h->scale, x, h->in, x + h->key, h->in, 0, p);
    for (size_t i = 0; i < h->tokens; i++, p += h->tokens) {
        const size_t seen = pk__seen(h, i);
        pk__softmax_row(seen, p, p);
        memset(p + seen, 0, (h->tokens - seen) * sizeof *p);
    }
}

/* s := p o (s - p . s) by rows: the softmax's tangent and cotangent. */
static void pk__attend_jacobian(const pk__heads *h, const pk_real *p, pk_real *s)
{
    for (size_t i = 0; i < h->tokens; i++, p += h->tokens, s += h->tokens) {
        const size_t seen = pk__seen(h, i);
        const double mean = pk__sum_products(seen, p, s);
        for (size_t j = 0; j < seen; j++)
            s[j] = (pk_real)(p[j] * (s[j] - mean));
        memset(s + seen, 0, (h->tokens - seen) * sizeof *s);
    }
}

/* s (U V^T on entry) := S, s_dot (U V.^T) := S. = P. o (s - P . s) + P o (s_dot - P . s_dot - P. . s). */
static void pk__attend_second(const pk__heads *h, const pk_real *p, const pk_real *p_dot, pk_real *s,
                              pk_real *s_dot)
{
    for (size_t i = 0; i < h->tokens; i++) {
        const size_t seen = pk__seen(h, i), hidden = h->tokens - seen;
        const double mean = pk__sum_products(seen, p, s);
        const double mean_dot = pk__sum_products(seen, p, s_dot) + pk__sum_products(seen, p_dot, s);
        for (size_t j = 0; j < seen; j++) {
            s_dot[j] = (pk_real)(p_dot[j] * (s[j] - mean) + p[j] * (s_dot[j] - mean_dot));
            s[j] = (pk_real)(p[j] * (s[j] - mean));
        }
        memset(s + seen, 0, hidden * sizeof *s);
        memset(s_dot + seen, 0, hidden * sizeof *s_dot);
        p += h->tokens, p_dot += h->tokens, s += h->tokens, s_dot += h->tokens;
    }
}

/* P. = the tangent of P along v. */
static void pk__attend_weights_tangent(const pk__heads *h, const pk_real *x, const pk_real *v, const pk_real *p,
                                       pk_real *p_dot)
{
    pk__scores(h, h->scale, v, h->in, x + h->key, h->in, 0, p_dot);
    pk__scores(h, h->scale, x, h->in, v + h->key, h->in, 1, p_dot);
    pk__attend_jacobian(h, p, p_dot);
}

static void pk__attend_forward(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const pk_real *x = call->in[0] + row * call->in_width[0] + head * h.depth;
            pk__attend_weights(&h, x, call->scratch);
            pk__mix(&h, 0, 1, call->scratch, x + h.value, h.in, 0,
                    call->out + row * call->node->width + head * h.depth, h.out);
        }
}

/* O. = P. V + P V. */
static void pk__attend_tangent(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call);
    pk_real *p = call->scratch, *p_dot = p + h.tokens * h.tokens;
    if (!call->in_tangent[0])
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    for (size_t row = 0; call->in_tangent[0] && row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const size_t at = row * call->in_width[0] + head * h.depth;
            const pk_real *x = call->in[0] + at, *v = call->in_tangent[0] + at;
            pk_real *to = call->out_tangent + row * call->node->width + head * h.depth;
            pk__attend_weights(&h, x, p);
            pk__attend_weights_tangent(&h, x, v, p, p_dot);
            pk__mix(&h, 0, 1, p_dot, x + h.value, h.in, 0, to, h.out);
            pk__mix(&h, 0, 1, p, v + h.value, h.in, 1, to, h.out);
        }
}

/* With the cotangent U of O: of V it is P^T U, of the scores S = P o (U V^T - rows of P . U V^T), of Q scale
 * S K, of K scale S^T Q. */
static void pk__attend_reverse(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call);
    pk_real *p = call->scratch, *s = p + h.tokens * h.tokens;
    const pk_real add = call->accumulate[0] ? 1 : 0;
    for (size_t row = 0; row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const pk_real *x = call->in[0] + row * call->in_width[0] + head * h.depth;
            pk__attend_weights(&h, x, p);
            for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
                const pk_real *u = call->out_cotangent + copy * call->node->width + head * h.depth;
                pk_real *to = call->in_cotangent[0] + copy * call->in_width[0] + head * h.depth;
                pk__scores(&h, 1, u, h.out, x + h.value, h.in, 0, s);
                pk__attend_jacobian(&h, p, s);
                pk__mix(&h, 1, 1, p, u, h.out, add, to + h.value, h.in);
                pk__mix(&h, 0, h.scale, s, x + h.key, h.in, h.shared ? 1 : add, to, h.in);
                pk__mix(&h, 1, h.scale, s, x, h.in, h.shared ? 1 : add, to + h.key, h.in);
            }
        }
}

/* The derivative of reverse along the tangent v of the input. */
static void pk__attend_curvature(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call);
    const size_t square = h.tokens * h.tokens;
    pk_real *p = call->scratch, *p_dot = p + square, *s = p_dot + square, *s_dot = s + square;
    for (size_t row = 0; call->in_tangent[0] && row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const size_t at = row * call->in_width[0] + head * h.depth;
            const pk_real *x = call->in[0] + at, *v = call->in_tangent[0] + at;
            pk__attend_weights(&h, x, p);
            pk__attend_weights_tangent(&h, x, v, p, p_dot);
            for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
                const pk_real *u = call->out_cotangent + copy * call->node->width + head * h.depth;
                pk_real *to = call->in_cotangent[0] + copy * call->in_width[0] + head * h.depth;
                pk__scores(&h, 1, u, h.out, x + h.value, h.in, 0, s);
                pk__scores(&h, 1, u, h.out, v + h.value, h.in, 0, s_dot);
                pk__attend_second(&h, p, p_dot, s, s_dot);
                pk__mix(&h, 1, 1, p_dot, u, h.out, 1, to + h.value, h.in);
                pk__mix(&h, 0, h.scale, s_dot, x + h.key, h.in, 1, to, h.in);
                pk__mix(&h, 0, h.scale, s, v + h.key, h.in, 1, to, h.in);
                pk__mix(&h, 1, h.scale, s_dot, x, h.in, 1, to + h.key, h.in);
                pk__mix(&h, 1, h.scale, s, v, h.in, 1, to + h.key, h.in);
            }
        }
}

/* ---- the table -------------------------------------------------------------------------------------- */

static const pk_option pk__embedding_options[] = {
    {.name = "number of tokens",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_EMBEDDING_TOKENS,
     .position = 1,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "width",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_EMBEDDING_WIDTH,
     .position = 2,
     .required = 1,
     .least = 1,
     .most = 1e9,
     .whole = 1},
    {.name = "padding", .kind = PK_OPTION_NUMBER, .attribute = PK_EMBEDDING_PADDING, .most = 1e9, .whole = 1},
    {.name = "first", .kind = PK_OPTION_NUMBER, .attribute = PK_EMBEDDING_FIRST, .most = 1e9, .whole = 1},
    {.name = "count", .kind = PK_OPTION_NUMBER, .attribute = PK_EMBEDDING_COUNT, .most = 1e9, .whole = 1},
    {.name = "offset", .kind = PK_OPTION_NUMBER, .attribute = PK_EMBEDDING_OFFSET, .most = 1e9, .whole = 1},
    {.name = NULL},
};
static const pk_option pk__token_options[] = {
    {.name = "number",
     .kind = PK_OPTION_NUMBER,
     .attribute = PK_TOKEN_INDEX,
     .position = 1,
     .required = 1,
     .least = -1e9,
     .most = 1e9,
     .whole = 1},
    {.name = NULL},
};
/* The words that attend and the layer attention (language.h) take. */
#define PK__ATTEND_OPTIONS                                                                     \
    {.name = "number of heads",                                                                \
     .kind = PK_OPTION_NUMBER,                                                                 \
     .attribute = PK_ATTEND_HEADS,                                                             \
     .position = 1,                                                                            \
     .required = 1,                                                                            \
     .least = 1,                                                                               \
     .most = 1e6,                                                                              \
     .whole = 1},                                                                              \
        {.name = "causal", .kind = PK_OPTION_FLAG, .attribute = PK_ATTEND_CAUSAL, .least = 1}, \
    {                                                                                          \
        .name = "shared", .kind = PK_OPTION_FLAG, .attribute = PK_ATTEND_SHARED, .least = 1    \
    }

static const pk_option pk__attend_options[] = {PK__ATTEND_OPTIONS, {.name = NULL}};

static const pk_operation pk__sequence_operations[] = {
    {.name = "embedding",
     .smoothness = PK_LINEAR,
     .tangent_form = PK_TANGENT_ROWS,
     .linear_in_weights = 1,
     .options = pk__embedding_options,
     .shape = pk__embedding_shape,
     .forward = pk__embedding_forward,
     .tangent = pk__embedding_tangent,
     .reverse = pk__position_reverse,
     .weight_gradient = pk__embedding_weight_gradient,
     .row_gradients = pk__embedding_row_gradients,
     .check = pk__embedding_check,
     .initialize = pk__normal_initialize},
    {.name = "token",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .options = pk__token_options,
     .shape = pk__token_shape,
     .forward = pk__token_forward,
     .tangent = pk__token_tangent,
     .reverse = pk__token_reverse},
    {.name = "mean_tokens",
     .smoothness = PK_LINEAR,
     .linear_in_weights = 1,
     .shape = pk__tokens_shape,
     .forward = pk__mean_tokens_forward,
     .tangent = pk__mean_tokens_tangent,
     .reverse = pk__mean_tokens_reverse},
    {.name = "attend",
     .smoothness = PK_SMOOTH,
     .linear_in_weights = 1,
     .options = pk__attend_options,
     .shape = pk__attend_shape,
     .scratch = pk__attend_scratch,
     .forward = pk__attend_forward,
     .tangent = pk__attend_tangent,
     .reverse = pk__attend_reverse,
     .curvature = pk__attend_curvature},
};

PK__END_CODE
/* <<< implementation */
#endif
