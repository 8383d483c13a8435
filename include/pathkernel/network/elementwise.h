/* pathkernel/network/elementwise.h: elementwise operations. */
#ifndef PATHKERNEL_ELEMENTWISE_H
#define PATHKERNEL_ELEMENTWISE_H
#include "../math/elementary.h"
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* The one attribute of leaky_relu (slope below zero), elu (alpha), scale (factor), softplus (beta), sine (frequency), power (exponent), gelu
 * (1: its tanh form), and of sign and step (sharpness of the surrogate's slope), for pk_graph_add. */
enum { PK_ACTIVATION_NUMBER };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_ELEMENTWISE_IMPLEMENTED)
#define PATHKERNEL_ELEMENTWISE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

PK__PRIVATE pk_status pk__same_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context;
    node->shape = graph->nodes[node->inputs[0]].shape;
    return PK_OK;
}

PK__PRIVATE size_t pk__one_row_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return node->width;
}

PK__PRIVATE size_t pk__width_switches(const pk_node *node)
{
    return node->width;
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
    pk__times(1, count, call->in_tangent[0], out, 0, out);
}

/* in_cotangent (+)= slope o out_cotangent, or, with the second derivatives as slopes, += slope o in_tangent o
 * out_cotangent. */
static void pk__elementwise_reverse(const pk_call *call, pk__slopes *slopes, int second)
{
    size_t width = call->node->width, copies = call->copies;
    pk_real *slope = call->scratch;
    const pk_real *from = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];                                /* may be from */
    if (copies == 1 && !second && !call->accumulate[0] && to != from) { /* no slope is used twice */
        const size_t count = call->rows * width;
        slopes(call, 0, count, to);
        pk__times(1, count, from, to, 0, to);
        return;
    }
    for (size_t row = 0; row < call->rows; row++) {
        slopes(call, row * width, width, slope);
        if (second)
            pk__times(1, width, call->in_tangent[0] + row * width, slope, 0, slope);
        pk__times(copies, width, from, slope, second || call->accumulate[0], to);
        from += copies * width;
        to += copies * width;
    }
}

/* slope[i] = E(x, y), for the numbers first .. first + count - 1. */
#define PK__SLOPES(name, kind, E)                                                                    \
    static void pk__##name##_##kind(const pk_call *call, size_t first, size_t count, pk_real *slope) \
    {                                                                                                \
        const double *p = call->node->attributes;                                                    \
        const pk_real *in = call->in[0] + first, *out = call->out + first;                           \
        (void)p;                                                                                     \
        for (size_t i = 0; i < count; i++) {                                                         \
            pk_real x = in[i], y = out[i];                                                           \
            (void)x, (void)y;                                                                        \
            slope[i] = (pk_real)(E);                                                                 \
        }                                                                                            \
    }

/* Elementwise y = V(x) with slope D(x, y) and second derivative D2(x, y) between kinks: p are the node's
 * attributes. Slopes at kinks are PyTorch's. */
#define PK__ELEMENTWISE(name, V, D, D2)                   \
    static void pk__##name##_forward(const pk_call *call) \
    {                                                     \
        const double *p = call->node->attributes;         \
        size_t count = call->rows * call->node->width;    \
        const pk_real *in = call->in[0];                  \
        pk_real *out = call->out;                         \
        (void)p;                                          \
        for (size_t i = 0; i < count; i++) {              \
            pk_real x = in[i];                            \
            out[i] = (pk_real)(V);                        \
        }                                                 \
    }                                                     \
    PK__ELEMENTWISE_RULES(name, D, D2)
/* The same with y from elementary.h. */
#define PK__ELEMENTWISE_FAST(name, D, D2)                                                               \
    static void pk__##name##_forward(const pk_call *call)                                               \
    {                                                                                                   \
        pk__elementary_reals(pk__all_##name, call->rows * call->node->width, call->node->attributes[0], \
                             call->in[0], call->out);                                                   \
    }                                                                                                   \
    PK__ELEMENTWISE_RULES(name, D, D2)
#define PK__ELEMENTWISE_RULES(name, D, D2)                      \
    PK__SLOPES(name, slopes, D)                                 \
    PK__SLOPES(name, seconds, D2)                               \
    PK__COLD_BEGIN                                              \
    static void pk__##name##_tangent(const pk_call *call)       \
    {                                                           \
        pk__elementwise_tangent(call, pk__##name##_slopes);     \
    }                                                           \
    static void pk__##name##_reverse(const pk_call *call)       \
    {                                                           \
        pk__elementwise_reverse(call, pk__##name##_slopes, 0);  \
    }                                                           \
    static void pk__##name##_curvature(const pk_call *call)     \
    {                                                           \
        pk__elementwise_reverse(call, pk__##name##_seconds, 1); \
    }                                                           \
    PK__COLD_END

/* Derivative number order (0 to 2) of mish, x tanh(log(1 + e^x)), by w = e^-|x|, which does not overflow. */
static double pk__mish(double x, int order)
{
    const double w = exp(-fabs(x)), s = x > 0 ? 1 / (1 + w) : w / (1 + w); /* the sigmoid of x */
    const double d = x > 0 ? 1 + 2 * w + 2 * w * w : w * w + 2 * w + 2;
    const double t = (x > 0 ? 1 + 2 * w : w * w + 2 * w) / d;
    const double g = 4 * (1 + w) * (x > 0 ? w * w : w) / (d * d); /* the slope of t */
    if (order < 2)
        return order ? t + x * g : x * t;
    return 2 * g + x * g * (1 + s - 4 * (1 + w) * (x > 0 ? 1 : w) / d);
}

/* The same of x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). Far out u^2 e^-2u is 0. */
static double pk__gelu_tanh(double x, int order)
{
    static const double k = 0.79788456080286535588, c = 0.044715;
    if (!(fabs(x) < 40))
        return order == 0 ? (x < 0 ? 0 : x) : order == 1 ? x > 0 : x * 0;
    const double twice = 2 * k * (x + c * x * x * x), s = pk__sigmoid(twice), q = s * pk__sigmoid(-twice);
    const double slope = 2 * k * (1 + 3 * c * x * x);
    if (order < 2)
        return order ? s + x * q * slope : x * s;
    return q * (2 * slope + x * ((1 - 2 * s) * slope * slope + 12 * k * c * x));
}

#define PK__SELU_SCALE 1.0507009873554804934
#define PK__SELU_ALPHA 1.6732632423543772848
#define PK__SQRT_HALF 0.70710678118654752440
#define PK__INV_SQRT_2PI 0.39894228040143267794
#define PK__TWO_BY_SQRT_PI 1.12837916709551257390

PK__ELEMENTWISE(identity, x, 1, 0)
PK__ELEMENTWISE(relu, x > 0 ? x : 0, x > 0 ? 1 : 0, 0)
PK__ELEMENTWISE(leaky_relu, x > 0 ? x : p[0] * x, x > 0 ? 1 : p[0], 0)
PK__ELEMENTWISE(hard_tanh, x<-1 ? -1 : x> 1 ? 1 : x, x > -1 && x < 1 ? 1 : 0, 0)
PK__ELEMENTWISE(abs, fabs(x), x > 0 ? 1 : x < 0 ? -1 : 0, 0)
PK__ELEMENTWISE(scale, p[0] * x, p[0], 0)
PK__ELEMENTWISE(above, x > p[0], 0, 0)
PK__ELEMENTWISE_FAST(tanh, 1 - y * y, -2 * y * (1 - y * y))
PK__ELEMENTWISE_FAST(sigmoid, y *(1 - y), y *(1 - y) * (1 - 2 * y))
PK__ELEMENTWISE_FAST(softplus, pk__sigmoid(p[0] * x), p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x))
PK__ELEMENTWISE(gelu, p[0] != 0 ? pk__gelu_tanh(x, 0) : 0.5 * x * erfc(-x * PK__SQRT_HALF),
                p[0] != 0 ? pk__gelu_tanh(x, 1)
                          : 0.5 * erfc(-x * PK__SQRT_HALF) + x * PK__INV_SQRT_2PI * exp(-0.5 * x * x),
                p[0] != 0 ? pk__gelu_tanh(x, 2) : PK__INV_SQRT_2PI * exp(-0.5 * x * x) * (2 - x * x))
PK__ELEMENTWISE(mish, pk__mish(x, 0), pk__mish(x, 1), pk__mish(x, 2))
PK__ELEMENTWISE(elu, x > 0 ? x : p[0] * expm1(x), x > 0 ? 1 : p[0] * exp(x), x > 0 ? 0 : p[0] * exp(x))
PK__ELEMENTWISE(selu, PK__SELU_SCALE *(x > 0 ? x : PK__SELU_ALPHA * expm1(x)),
                PK__SELU_SCALE *(x > 0 ? 1 : PK__SELU_ALPHA * exp(x)),
                x > 0 ? 0 : PK__SELU_SCALE * PK__SELU_ALPHA * exp(x))
PK__ELEMENTWISE(relu6, x<0 ? 0 : x> 6 ? 6 : x, x > 0 && x < 6 ? 1 : 0, 0)
PK__ELEMENTWISE(hard_sigmoid, x<-3 ? 0 : x> 3 ? 1 : (x + 3) / 6, x > -3 && x < 3 ? 1.0 / 6 : 0, 0)
PK__ELEMENTWISE(hardswish, x<-3 ? 0 : x> 3 ? x : x *(x + 3) / 6,
                x <= -3  ? 0
                : x >= 3 ? 1
                         : x / 3 + 0.5,
                x > -3 && x < 3 ? 1.0 / 3 : 0)
PK__ELEMENTWISE(softsign, x / (1 + fabs(x)), 1 / ((1 + fabs(x)) * (1 + fabs(x))),
                (x > 0 ? -2 : 2) / ((1 + fabs(x)) * (1 + fabs(x)) * (1 + fabs(x))))
PK__ELEMENTWISE(log_sigmoid, (x < 0 ? x : 0) - log1p(exp(-fabs(x))), pk__sigmoid(-x),
                -pk__sigmoid(x) * pk__sigmoid(-x))
PK__ELEMENTWISE(silu, x *pk__sigmoid(x), pk__sigmoid(x) * (1 + x * pk__sigmoid(-x)),
                pk__sigmoid(x) * pk__sigmoid(-x) * (2 + x * (1 - 2 * pk__sigmoid(x))))
PK__ELEMENTWISE(erf, erf(x), PK__TWO_BY_SQRT_PI *exp(-x *x), -2 * x * PK__TWO_BY_SQRT_PI * exp(-x * x))
PK__ELEMENTWISE(exp, exp(x), y, y)
PK__ELEMENTWISE(log, log(x), 1 / x, -1 / (x * x))
PK__ELEMENTWISE(power, pow(x, p[0]), p[0] * pow(x, p[0] - 1), p[0] * (p[0] - 1) * pow(x, p[0] - 2))
PK__ELEMENTWISE(sine, sin(p[0] * x), p[0] * cos(p[0] * x), -p[0] * p[0] * y)
/* The surrogates are the slopes of erf(b x) and of sigmoid(b x) (Eilers, Memmesheimer & Goedeke, 2024). */
PK__ELEMENTWISE(sign, (x > 0) - (x < 0), p[0] * PK__TWO_BY_SQRT_PI * exp(-p[0] * p[0] * x * x),
                -2 * p[0] * p[0] * x * p[0] * PK__TWO_BY_SQRT_PI * exp(-p[0] * p[0] * x * x))
PK__ELEMENTWISE(step, x > 0, p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x),
                p[0] * p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x) * (1 - 2 * pk__sigmoid(p[0] * x)))
#undef PK__ELEMENTWISE
#undef PK__ELEMENTWISE_FAST
#undef PK__ELEMENTWISE_RULES
#undef PK__SLOPES

static void pk__zero_switches(const pk_call *call)
{
    memcpy(call->out, call->in[0], call->rows * call->node->width * sizeof(pk_real));
}

static size_t pk__two_switch_count(const pk_node *node)
{
    return 2 * node->width;
}

/* Kinks at low and high. */
static void pk__two_switches(const pk_call *call, pk_real low, pk_real high)
{
    size_t count = call->rows * call->node->width;
    for (size_t i = 0; i < count; i++) {
        call->out[2 * i] = call->in[0][i] - low;
        call->out[2 * i + 1] = call->in[0][i] - high;
    }
}

static void pk__hard_tanh_switches(const pk_call *call)
{
    pk__two_switches(call, -1, 1);
}

static void pk__relu6_switches(const pk_call *call)
{
    pk__two_switches(call, 0, 6);
}

static void pk__hard_sigmoid_switches(const pk_call *call)
{
    pk__two_switches(call, -3, 3);
}

/* above: 1 where x > C, and 0 elsewhere. It jumps, so that no path integral could close over it: it is for data alone. */
static pk_status pk__above_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    if (graph->nodes[node->inputs[0]].varies)
        return pk__fail(context, PK_UNSUPPORTED,
                        "above compares data, before the first weights: a value that jumps while the weights "
                        "change has no path integral");
    return pk__same_shape(context, graph, node);
}

static void pk__above_switches(const pk_call *call)
{
    const size_t count = call->rows * call->node->width;
    for (size_t i = 0; i < count; i++)
        call->out[i] = (pk_real)(call->in[0][i] - call->node->attributes[PK_ACTIVATION_NUMBER]);
}

static const pk_option pk__above_option[] = {
    {.name = "number", .kind = PK_OPTION_NUMBER, .position = 1, .least = -DBL_MAX, .most = DBL_MAX},
    {.name = NULL},
};
static const pk_option pk__positive_option[] = {
    {.name = "number", .kind = PK_OPTION_NUMBER, .position = 1, .least = DBL_MIN, .most = DBL_MAX},
    {.name = NULL},
};
static const pk_option pk__gelu_option[] = {
    {.name = "tanh", .kind = PK_OPTION_FLAG, .least = 1},
    {.name = NULL},
};
static const pk_option pk__power_option[] = {
    {.name = "exponent",
     .kind = PK_OPTION_NUMBER,
     .position = 1,
     .required = 1,
     .least = -DBL_MAX,
     .most = DBL_MAX},
    {.name = NULL},
};
static const pk_option pk__scale_option[] = {
    {.name = "factor",
     .kind = PK_OPTION_NUMBER,
     .position = 1,
     .required = 1,
     .least = -DBL_MAX,
     .most = DBL_MAX},
    {.name = NULL},
};

#define PK__ACTIVATION(word, kind, list, value, count, rule, second)                                     \
    {                                                                                                    \
        .name = #word, .smoothness = kind, .linear_in_weights = 1, .options = list, .defaults = {value}, \
        .shape = pk__same_shape, .scratch = pk__one_row_scratch, .forward = pk__##word##_forward,        \
        .tangent = pk__##word##_tangent, .reverse = pk__##word##_reverse, .switch_count = count,         \
        .switches = rule, .elementwise = 1, .curvature = second                                          \
    }
#define PK__SMOOTH_OPERATION(name, options, value) \
    PK__ACTIVATION(name, PK_SMOOTH, options, value, NULL, NULL, pk__##name##_curvature)
/* Analytic between kinks. */
#define PK__JOINED_OPERATION(name, options, value, count, switches) \
    PK__ACTIVATION(name, PK_SMOOTH, options, value, count, switches, pk__##name##_curvature)
#define PK__KINKED_OPERATION(name, options, value, count, switches) \
    PK__ACTIVATION(name, PK_PIECEWISE_LINEAR, options, value, count, switches, pk__##name##_curvature)

static const pk_operation pk__activation_operations[] = {
    PK__ACTIVATION(identity, PK_LINEAR, NULL, 0, NULL, NULL, pk__identity_curvature),
    PK__ACTIVATION(scale, PK_LINEAR, pk__scale_option, 1, NULL, NULL, pk__scale_curvature),
    PK__KINKED_OPERATION(relu, NULL, 0, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(leaky_relu, pk__positive_option, 0.01, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(hard_tanh, NULL, 0, pk__two_switch_count, pk__hard_tanh_switches),
    PK__KINKED_OPERATION(relu6, NULL, 0, pk__two_switch_count, pk__relu6_switches),
    PK__KINKED_OPERATION(hard_sigmoid, NULL, 0, pk__two_switch_count, pk__hard_sigmoid_switches),
    PK__KINKED_OPERATION(abs, NULL, 0, pk__width_switches, pk__zero_switches),
    {.name = "above",
     .smoothness = PK_PIECEWISE_LINEAR,
     .linear_in_weights = 1,
     .options = pk__above_option,
     .shape = pk__above_shape,
     .scratch = pk__one_row_scratch,
     .forward = pk__above_forward,
     .tangent = pk__above_tangent,
     .reverse = pk__above_reverse,
     .switch_count = pk__width_switches,
     .switches = pk__above_switches,
     .elementwise = 1,
     .curvature = pk__above_curvature},
    PK__SMOOTH_OPERATION(tanh, NULL, 0),
    PK__SMOOTH_OPERATION(sigmoid, NULL, 0),
    PK__SMOOTH_OPERATION(softplus, pk__positive_option, 1),
    PK__SMOOTH_OPERATION(gelu, pk__gelu_option, 0),
    PK__SMOOTH_OPERATION(silu, NULL, 0),
    PK__SMOOTH_OPERATION(erf, NULL, 0),
    PK__SMOOTH_OPERATION(sine, pk__positive_option, 1),
    PK__SMOOTH_OPERATION(exp, NULL, 0),
    PK__SMOOTH_OPERATION(log, NULL, 0),
    PK__SMOOTH_OPERATION(power, pk__power_option, 1),
    PK__SMOOTH_OPERATION(mish, NULL, 0),
    PK__SMOOTH_OPERATION(log_sigmoid, NULL, 0),
    PK__JOINED_OPERATION(elu, pk__positive_option, 1, pk__width_switches, pk__zero_switches),
    PK__JOINED_OPERATION(selu, NULL, 0, pk__width_switches, pk__zero_switches),
    PK__JOINED_OPERATION(softsign, NULL, 0, pk__width_switches, pk__zero_switches),
    PK__JOINED_OPERATION(hardswish, NULL, 0, pk__two_switch_count, pk__hard_sigmoid_switches),
    PK__ACTIVATION(sign, PK_SURROGATE, pk__positive_option, 1, pk__width_switches, pk__zero_switches,
                   pk__sign_curvature),
    PK__ACTIVATION(step, PK_SURROGATE, pk__positive_option, 1, pk__width_switches, pk__zero_switches,
                   pk__step_curvature),
};
#undef PK__SMOOTH_OPERATION
#undef PK__JOINED_OPERATION
#undef PK__KINKED_OPERATION
#undef PK__ACTIVATION

PK__END_CODE
/* <<< implementation */
#endif
