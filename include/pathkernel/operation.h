/* pathkernel/operation.h: the built-in operations of the autodiff, one table entry each.
 *
 * To add one, write its rules and its line in pk__operations; to add one from outside, fill a pk_operation
 * and give it to pk_graph_add. The engine knows nothing of single operations.
 */
#ifndef PATHKERNEL_OPERATION_H
#define PATHKERNEL_OPERATION_H
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* A built-in operation by name, NULL where there is none. */
PK_API const pk_operation *pk_operation_find(const char *name);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_OPERATION_IMPLEMENTED)
#define PATHKERNEL_OPERATION_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_C

static pk_status pk__elementwise_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    if (node->operation->parameters && !(isfinite(node->attributes[0]) && node->attributes[0] > 0))
        return pk__fail(context, PK_ARGUMENT, "%s needs a positive finite number, not %g",
                        node->operation->name, node->attributes[0]);
    node->shape = graph->nodes[node->inputs[0]].shape;
    return PK_OK;
}

/* One word as a finite number. */
PK__PRIVATE pk_status pk__parse_number(pk_context *context, const char *word, double *number)
{
    return pk__number(word, strlen(word), number)
               ? PK_OK
               : pk__fail(context, PK_FORMAT, "'%.40s' is not a finite number", word);
}

static size_t pk__one_row_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return node->width;
}

static size_t pk__width_switches(const pk_node *node)
{
    return node->width;
}

/* dense N [nobias]: y = W x + b, W (out, in). attributes: out, bias. */
static pk_status pk__dense_parse(pk_context *context, int count, const char *const *words, double *attributes)
{
    if (count < 1)
        return pk__fail(context, PK_FORMAT, "dense needs its number of outputs");
    if (count > 2 || (count == 2 && strcmp(words[1], "nobias") != 0))
        return pk__fail(context, PK_FORMAT, "'%.40s' is not an option of dense; 'nobias' is", words[count - 1]);
    attributes[1] = count == 1;
    return pk__parse_number(context, words[0], &attributes[0]);
}

static pk_status pk__dense_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    double out = node->attributes[0];
    if (!(out >= 1 && out <= 1e9) || out != floor(out))
        return pk__fail(context, PK_ARGUMENT, "dense needs a whole number of outputs from 1 to 1e9, not %g",
                        out);
    if (input->shape.rank != 1)
        return pk__fail(context, PK_SHAPE, "dense needs a flat input, not one of rank %d", input->shape.rank);
    node->shape.rank = 1;
    node->shape.dims[0] = (size_t)out;
    if (!pk__multiply((size_t)out, input->width, &node->weight_count) ||
        node->weight_count > SIZE_MAX / 2 - (size_t)out)
        return pk__fail(context, PK_OVERFLOW, "dense %g: its weights overflow", out);
    if (node->attributes[1] != 0)
        node->weight_count += (size_t)out;
    return PK_OK;
}

/* out = add o bias, or zero; then the caller adds products. */
static void pk__dense_bias(const pk_call *call, const pk_real *weights, pk_real *out)
{
    size_t width = call->node->width;
    const pk_real *bias = weights + width * call->in_width[0];
    for (size_t row = 0; row < call->rows; row++)
        memcpy(out + row * width, bias, width * sizeof *out);
}

static void pk__dense_apply(const pk_call *call, const pk_real *weights, const pk_real *in, int bias,
                            pk_real beta, pk_real *out)
{
    size_t width = call->node->width, fan_in = call->in_width[0];
    if (bias) {
        pk__dense_bias(call, weights, out);
        beta = 1;
    }
    pk__gemm(0, 1, call->rows, width, fan_in, 1, in, fan_in, weights, fan_in, beta, out, width);
}

static void pk__dense_forward(const pk_call *call)
{
    pk__dense_apply(call, call->weights, call->in[0], call->node->attributes[1] != 0, 0, call->out);
}

static void pk__dense_tangent(const pk_call *call)
{
    pk_real beta = 0;
    if (call->direction) {
        pk__dense_apply(call, call->direction, call->in[0], call->node->attributes[1] != 0, 0,
                        call->out_tangent);
        beta = 1;
    }
    if (call->in_tangent[0])
        pk__dense_apply(call, call->weights, call->in_tangent[0], 0, beta, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__dense_reverse(const pk_call *call)
{
    size_t width = call->node->width, fan_in = call->in_width[0];
    pk__gemm(0, 0, call->rows * call->copies, fan_in, width, 1, call->out_cotangent, width, call->weights,
             fan_in, call->accumulate[0] ? 1 : 0, call->in_cotangent[0], fan_in);
}

static void pk__dense_weight_gradient(const pk_call *call)
{
    size_t width = call->node->width, fan_in = call->in_width[0];
    pk__gemm(1, 0, width, fan_in, call->rows, 1, call->out_cotangent, width, call->in[0], fan_in, 1,
             call->gradient, fan_in);
    if (call->node->attributes[1] != 0) {
        pk_real *bias = call->gradient + width * fan_in;
        for (size_t row = 0; row < call->rows; row++)
            for (size_t j = 0; j < width; j++)
                bias[j] += call->out_cotangent[row * width + j];
    }
}

/* Elementwise y = V(x) with slope D(x, y): p are the node's attributes, threshold the number of switch
 * functions x - c. Slopes at kinks are PyTorch's. */
#define PK__ELEMENTWISE(name, V, D)                                                                  \
    static void pk__##name##_forward(const pk_call *call)                                            \
    {                                                                                                \
        const double *p = call->node->attributes;                                                    \
        size_t count = call->rows * call->node->width;                                               \
        const pk_real *in = call->in[0];                                                             \
        pk_real *out = call->out;                                                                    \
        (void)p;                                                                                     \
        for (size_t i = 0; i < count; i++) {                                                         \
            pk_real x = in[i];                                                                       \
            out[i] = (pk_real)(V);                                                                   \
        }                                                                                            \
    }                                                                                                \
    static void pk__##name##_slopes(const pk_call *call, size_t first, size_t count, pk_real *slope) \
    {                                                                                                \
        const double *p = call->node->attributes;                                                    \
        const pk_real *in = call->in[0] + first, *out = call->out + first;                           \
        (void)p;                                                                                     \
        for (size_t i = 0; i < count; i++) {                                                         \
            pk_real x = in[i], y = out[i];                                                           \
            (void)x, (void)y;                                                                        \
            slope[i] = (pk_real)(D);                                                                 \
        }                                                                                            \
    }                                                                                                \
    static void pk__##name##_tangent(const pk_call *call)                                            \
    {                                                                                                \
        pk__elementwise_tangent(call, pk__##name##_slopes);                                          \
    }                                                                                                \
    static void pk__##name##_reverse(const pk_call *call)                                            \
    {                                                                                                \
        pk__elementwise_reverse(call, pk__##name##_slopes);                                          \
    }

typedef void pk__slopes(const pk_call *call, size_t first, size_t count, pk_real *slope);

static void pk__elementwise_tangent(const pk_call *call, pk__slopes *slopes)
{
    size_t count = call->rows * call->node->width;
    pk_real *out = call->out_tangent;
    if (!call->in_tangent[0]) {
        memset(out, 0, count * sizeof *out);
        return;
    }
    slopes(call, 0, count, out);
    for (size_t i = 0; i < count; i++)
        out[i] *= call->in_tangent[0][i];
}

static void pk__elementwise_reverse(const pk_call *call, pk__slopes *slopes)
{
    size_t width = call->node->width, copies = call->copies;
    pk_real *slope = call->scratch;
    for (size_t row = 0; row < call->rows; row++) {
        slopes(call, row * width, width, slope);
        for (size_t copy = 0; copy < copies; copy++) {
            const pk_real *from = call->out_cotangent + (row * copies + copy) * width;
            pk_real *to = call->in_cotangent[0] + (row * copies + copy) * width;
            if (call->accumulate[0])
                for (size_t j = 0; j < width; j++)
                    to[j] += from[j] * slope[j];
            else
                for (size_t j = 0; j < width; j++)
                    to[j] = from[j] * slope[j];
        }
    }
}

#define PK__SQRT_HALF 0.70710678118654752440
#define PK__INV_SQRT_2PI 0.39894228040143267794
#define PK__TWO_BY_SQRT_PI 1.12837916709551257390

PK__PRIVATE double pk__sigmoid(double x)
{
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* log(1 + e^(b x)) / b, without overflow and without PyTorch's switch to x at b x > 20: that switch is a
 * jump of 2e-9 / b, which no path integral could close over. */
static double pk__softplus(double x, double b)
{
    return (b * x > 0 ? x : 0) + log1p(exp(-fabs(b * x))) / b;
}

PK__ELEMENTWISE(identity, x, 1)
PK__ELEMENTWISE(relu, x > 0 ? x : 0, x > 0 ? 1 : 0)
PK__ELEMENTWISE(leaky_relu, x > 0 ? x : p[0] * x, x > 0 ? 1 : p[0])
PK__ELEMENTWISE(hard_tanh, x<-1 ? -1 : x> 1 ? 1 : x, x > -1 && x < 1 ? 1 : 0)
PK__ELEMENTWISE(abs, fabs(x), x > 0 ? 1 : x < 0 ? -1 : 0)
PK__ELEMENTWISE(tanh, tanh(x), 1 - y * y)
PK__ELEMENTWISE(sigmoid, pk__sigmoid(x), y *(1 - y))
PK__ELEMENTWISE(softplus, pk__softplus(x, p[0]), pk__sigmoid(p[0] * x))
PK__ELEMENTWISE(gelu, 0.5 * x * erfc(-x * PK__SQRT_HALF),
                0.5 * erfc(-x * PK__SQRT_HALF) + x * PK__INV_SQRT_2PI * exp(-0.5 * x * x))
PK__ELEMENTWISE(silu, x *pk__sigmoid(x), pk__sigmoid(x) * (1 + x * pk__sigmoid(-x)))
PK__ELEMENTWISE(erf, erf(x), PK__TWO_BY_SQRT_PI *exp(-x *x))
#undef PK__ELEMENTWISE

static void pk__zero_switches(const pk_call *call)
{
    memcpy(call->out, call->in[0], call->rows * call->node->width * sizeof(pk_real));
}

static size_t pk__hard_tanh_switch_count(const pk_node *node)
{
    return 2 * node->width;
}

static void pk__hard_tanh_switches(const pk_call *call)
{
    size_t count = call->rows * call->node->width;
    for (size_t i = 0; i < count; i++) {
        call->out[2 * i] = call->in[0][i] + 1;
        call->out[2 * i + 1] = call->in[0][i] - 1;
    }
}

#define PK__SMOOTH_OPERATION(name, kind, parameters, value)                                              \
    {                                                                                                    \
#name, kind, PK_TANGENT_NONE, 1, parameters,                                                     \
            {value, 0, 0, 0, 0, 0, 0, 0 }, NULL, pk__elementwise_shape, pk__one_row_scratch,             \
             pk__##name##_forward, pk__##name##_tangent, pk__##name##_reverse, NULL, NULL, NULL, NULL, 1 \
    }
#define PK__KINKED_OPERATION(name, parameters, value, count, switches)                                        \
    {                                                                                                         \
#name, PK_PIECEWISE_LINEAR, PK_TANGENT_NONE, 1, parameters,                                           \
            {value, 0, 0, 0, 0, 0, 0, 0 }, NULL, pk__elementwise_shape, pk__one_row_scratch,                  \
             pk__##name##_forward, pk__##name##_tangent, pk__##name##_reverse, NULL, NULL, count, switches, 1 \
    }

static const pk_operation pk__operations[] = {
    {"dense",
     PK_LINEAR,
     PK_TANGENT_OUTER,
     1,
     1,
     {0, 1, 0, 0, 0, 0, 0, 0},
     pk__dense_parse,
     pk__dense_shape,
     NULL,
     pk__dense_forward,
     pk__dense_tangent,
     pk__dense_reverse,
     pk__dense_weight_gradient,
     NULL,
     NULL,
     NULL,
     0},
    PK__SMOOTH_OPERATION(identity, PK_LINEAR, 0, 0),
    PK__KINKED_OPERATION(relu, 0, 0, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(leaky_relu, 1, 0.01, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(hard_tanh, 0, 0, pk__hard_tanh_switch_count, pk__hard_tanh_switches),
    PK__KINKED_OPERATION(abs, 0, 0, pk__width_switches, pk__zero_switches),
    PK__SMOOTH_OPERATION(tanh, PK_SMOOTH, 0, 0),
    PK__SMOOTH_OPERATION(sigmoid, PK_SMOOTH, 0, 0),
    PK__SMOOTH_OPERATION(softplus, PK_SMOOTH, 1, 1),
    PK__SMOOTH_OPERATION(gelu, PK_SMOOTH, 0, 0),
    PK__SMOOTH_OPERATION(silu, PK_SMOOTH, 0, 0),
    PK__SMOOTH_OPERATION(erf, PK_SMOOTH, 0, 0),
};
#undef PK__SMOOTH_OPERATION
#undef PK__KINKED_OPERATION

PK_API const pk_operation *pk_operation_find(const char *name)
{
    for (size_t i = 0; i < sizeof pk__operations / sizeof *pk__operations; i++)
        if (strcmp(name, pk__operations[i].name) == 0)
            return &pk__operations[i];
    return NULL;
}

PK__END_C
/* <<< implementation */
#endif
