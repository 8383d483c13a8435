/* brute_force.h: the decomposition of a run by brute force, for tests only. It shares no code and no method
 * with the library: plain loops in extended precision, whole Jacobians, one momentum buffer for every
 * example carried forward in time, kinks found by sampling and bisection, and adaptive Gauss-Legendre
 * that bisects until every entry of the integrated Jacobian has settled to about 1e-17 of the largest.
 *
 *     bf_network network = {4, 2, {{8, 0, BF_TANH, 0}, {3, 0, BF_IDENTITY, 0}}};
 *     bf_recipe recipe = {1, 20, 6, 7, 0.1, 1, 0, 0, 0}; (seed, examples, steps, batch, rate, ...)
 *     bf_optimizer optimizer = {BF_SGD, 0.9, 0, 0, 0, 0, 0, 0};
 *     bf_run run;  bf_result truth;
 *     bf_run_make(&network, BF_SOFTMAX_CROSS_ENTROPY, &optimizer, &recipe, &run);
 *     bf_decompose(&run, 2, run.inputs, &truth);      ... compare ...
 *     bf_result_free(&truth);  bf_run_free(&run);
 *
 * Only for small networks: the cost of a step is (rows * outputs + 1) * examples * parameters, and the memory
 * 2 * (examples + steps) * parameters numbers. Out of memory aborts: this is a test.
 * BF_QUAD (GCC, -std=gnu11 or gnu++17, -lquadmath) computes in __float128, to check the oracle itself. */
#ifndef BRUTE_FORCE_H
#define BRUTE_FORCE_H
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef BF_QUAD
#include <quadmath.h>
typedef __float128 bf_real;
#define BF_MATH(function) function##q
#define BF_EPSILON ((bf_real)DBL_EPSILON * (bf_real)DBL_EPSILON) /* FLT128_EPSILON is not pedantic */
#else
typedef long double bf_real;
#define BF_MATH(function) function##l
#define BF_EPSILON LDBL_EPSILON
#endif
#define BF_FUNCTION static inline
#ifndef BF_STORED /* the weights and data of a run: the numbers of the library under test */
#define BF_STORED double
#endif
#define BF_NEW(type, count) ((type *)bf_take((size_t)(count), sizeof(type)))

enum {
    BF_LAYERS = 8,
    BF_WIDTH = 128 /* most inputs or units */,
    BF_NODES = 20,
    BF_SAMPLES = 256,
    BF_DEPTH = 40
};

typedef enum bf_activation {
    BF_IDENTITY,
    BF_RELU,
    BF_LEAKY_RELU,
    BF_TANH,
    BF_SIGMOID,
    BF_SOFTPLUS,
    BF_GELU,
    BF_SILU,
    BF_ERF,
    BF_HARD_TANH,
    BF_ABS,
    BF_ELU,
    BF_SELU,
    BF_MISH,
    BF_RELU6,
    BF_HARDSWISH,
    BF_HARD_SIGMOID,
    BF_SOFTSIGN,
    BF_LOG_SIGMOID,
    BF_GELU_TANH,
    BF_ACTIVATIONS
} bf_activation;
typedef enum bf_loss {
    BF_SQUARED,
    BF_MEAN_SQUARED,
    BF_SOFTMAX_CROSS_ENTROPY,
    BF_LOGISTIC,
    BF_NLL,
    BF_HUBER,
    BF_HINGE,
    BF_LOSSES
} bf_loss;
typedef enum bf_rule { BF_SGD, BF_ADAM, BF_ADAMW, BF_RMSPROP, BF_ADAGRAD, BF_NADAM } bf_rule;

/* of Klambauer et al. 2017 */
#define BF_SELU_SCALE 1.0507009873554804934193349852946
#define BF_SELU_ALPHA 1.6732632423543772848170429916717

/* a dense layer and what follows it; parameter: leaky_relu's slope, softplus' beta, elu's alpha */
typedef struct bf_layer {
    size_t width;
    int no_bias;
    bf_activation activation;
    double parameter;
} bf_layer;
typedef struct bf_network {
    size_t inputs, layers;
    bf_layer layer[BF_LAYERS];
} bf_network;
typedef struct bf_optimizer {
    bf_rule rule;
    double momentum, dampening, weight_decay;
    int nesterov;
    double beta1, beta2, epsilon; /* adam, adamw and nadam; no defaults here */
    double alpha, lr_decay, initial_accumulator_value, momentum_decay; /* rmsprop, adagrad, nadam */
    int decoupled, maximize;
} bf_optimizer;
typedef struct bf_run {
    bf_network network;
    bf_loss loss;
    bf_optimizer optimizer;
    size_t steps, parameters, examples, outputs;
    BF_STORED *weights;     /* (S+1) x P */
    double *learning_rates; /* S */
    int64_t *batch_offsets; /* S+1 */
    int64_t *batch_items;
    double *batch_weights;     /* NULL: 1 / batch size */
    double *gradient_scales;   /* S, or NULL: 1 */
    BF_STORED *second_moments; /* S x P, or NULL: recomputed */
    BF_STORED *inputs;         /* N x D */
    BF_STORED *targets;        /* N x C; one-hot for labels, +1/-1 for hinge with one output */
    int64_t *labels;           /* N, or NULL; bf_run_make sets it where targets is one-hot */
} bf_run;
typedef struct bf_result {
    size_t rows, outputs, examples, steps, layers,
        pieces /* intervals between kinks, over all rows and steps */;
    bf_real *by_example, *by_step, *by_layer;                         /* M x C x (N | S | layers) */
    bf_real *decay, *unattributed, *closure, *initial, *final_output; /* M x C */
    bf_real quadrature_error; /* the worst *error of bf_path_jacobian; above 1e-16: do not trust this result */
} bf_result;
/* How bf_run_make makes a run; batch: the most rows a batch has, 0: always all rows once. */
typedef struct bf_recipe {
    uint64_t seed;
    size_t examples, steps, batch;
    double learning_rate;
    int batch_weights, gradient_scales, second_moments, float32 /* weights rounded to float each step */;
} bf_recipe;

BF_FUNCTION void *bf_take(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory)
        abort();
    return memory;
}

BF_FUNCTION bf_real bf_dot(size_t count, const bf_real *a, const bf_real *b)
{
    bf_real sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

/* ---- the network ---- */

BF_FUNCTION size_t bf_fan_in(const bf_network *net, size_t l)
{
    return l ? net->layer[l - 1].width : net->inputs;
}

BF_FUNCTION size_t bf_outputs(const bf_network *net)
{
    return net->layer[net->layers - 1].width;
}

/* parameters of the layers before l: layer l's start at [bf_offset(l), bf_offset(l + 1)) */
BF_FUNCTION size_t bf_offset(const bf_network *net, size_t l)
{
    size_t count = 0;
    for (size_t k = 0; k < l; k++)
        count += net->layer[k].width * (bf_fan_in(net, k) + (net->layer[k].no_bias ? 0 : 1));
    return count;
}

BF_FUNCTION size_t bf_parameters(const bf_network *net)
{
    return bf_offset(net, net->layers);
}

BF_FUNCTION bf_real bf_sigmoid(bf_real z)
{
    return z >= 0 ? 1 / (1 + BF_MATH(exp)(-z)) : BF_MATH(exp)(z) / (1 + BF_MATH(exp)(z));
}

/* log(1 + exp(z)) */
BF_FUNCTION bf_real bf_log1p_exp(bf_real z)
{
    return (z > 0 ? z : 0) + BF_MATH(log1p)(BF_MATH(exp)(-BF_MATH(fabs)(z)));
}

/* in the network language */
BF_FUNCTION const char *bf_activation_name(int activation)
{
    static const char *const name[BF_ACTIVATIONS] = {
        "identity", "relu",      "leaky_relu",   "tanh",     "sigmoid",     "softplus", "gelu",
        "silu",     "erf",       "hard_tanh",    "abs",      "elu",         "selu",     "mish",
        "relu6",    "hardswish", "hard_sigmoid", "softsign", "log_sigmoid", "gelu tanh"};
    return name[activation];
}

/* -> where an activation has kinks, in itself or in a derivative, and how many */
BF_FUNCTION size_t bf_kinks(bf_activation activation, const double **places)
{
    static const double one[] = {-1, 1}, three[] = {-3, 3}, zero_six[] = {0, 6};
    *places = zero_six;
    switch (activation) {
    case BF_RELU:
    case BF_LEAKY_RELU:
    case BF_ABS:
    case BF_ELU:
    case BF_SELU:
    case BF_SOFTSIGN: return 1;
    case BF_RELU6: return 2;
    case BF_HARD_TANH: *places = one; return 2;
    case BF_HARD_SIGMOID:
    case BF_HARDSWISH: *places = three; return 2;
    default: return 0;
    }
}

/* -> the kink functions of a network */
BF_FUNCTION size_t bf_kink_functions(const bf_network *net)
{
    const double *places;
    size_t count = 0;
    for (size_t l = 0; l < net->layers; l++)
        count += net->layer[l].width * bf_kinks(net->layer[l].activation, &places);
    return count;
}

BF_FUNCTION int bf_has_parameter(bf_activation activation)
{
    return activation == BF_LEAKY_RELU || activation == BF_SOFTPLUS || activation == BF_ELU;
}

/* (z + 0.044715 z^3) sqrt(2 / pi) and its slope */
BF_FUNCTION bf_real bf_gelu_angle(bf_real z, bf_real *slope)
{
    const bf_real k = BF_MATH(sqrt)(2 / BF_MATH(acos)((bf_real)-1)), c = 44715 / (bf_real)1000000;
    *slope = k * (1 + 3 * c * z * z);
    return k * (z + c * z * z * z);
}

BF_FUNCTION bf_real bf_activate(const bf_layer *layer, bf_real z)
{
    const bf_real p = (bf_real)layer->parameter, half = (bf_real)0.5;
    const bf_real scale = (bf_real)BF_SELU_SCALE, alpha = (bf_real)BF_SELU_ALPHA;
    bf_real slope;
    switch (layer->activation) {
    case BF_RELU: return z > 0 ? z : 0;
    case BF_LEAKY_RELU: return z > 0 ? z : p * z;
    case BF_TANH: return BF_MATH(tanh)(z);
    case BF_SIGMOID: return bf_sigmoid(z);
    case BF_SOFTPLUS: return bf_log1p_exp(p * z) / p;
    case BF_GELU: return half * z * BF_MATH(erfc)(-z * BF_MATH(sqrt)(half));
    case BF_SILU: return z * bf_sigmoid(z);
    case BF_ERF: return BF_MATH(erf)(z);
    case BF_HARD_TANH: return z < -1 ? -1 : z > 1 ? 1 : z;
    case BF_ABS: return z < 0 ? -z : z;
    case BF_ELU: return z > 0 ? z : p * BF_MATH(expm1)(z);
    case BF_SELU: return scale * (z > 0 ? z : alpha * BF_MATH(expm1)(z));
    case BF_MISH: return z * BF_MATH(tanh)(bf_log1p_exp(z));
    case BF_RELU6: return z < 0 ? 0 : z > 6 ? 6 : z;
    case BF_HARDSWISH: return z < -3 ? 0 : z > 3 ? z : z * (z + 3) / 6;
    case BF_HARD_SIGMOID: return z < -3 ? 0 : z > 3 ? 1 : (z + 3) / 6;
    case BF_SOFTSIGN: return z / (1 + BF_MATH(fabs)(z));
    case BF_LOG_SIGMOID: return -bf_log1p_exp(-z);
    case BF_GELU_TANH: return z * bf_sigmoid(2 * bf_gelu_angle(z, &slope));
    default: return z;
    }
}

/* the derivative, with PyTorch's choices at kinks */
BF_FUNCTION bf_real bf_slope(const bf_layer *layer, bf_real z)
{
    const bf_real p = (bf_real)layer->parameter, half = (bf_real)0.5, pi = BF_MATH(acos)((bf_real)-1);
    const bf_real normal = BF_MATH(exp)(-half * z * z) / BF_MATH(sqrt)(2 * pi), s = bf_sigmoid(z);
    const bf_real scale = (bf_real)BF_SELU_SCALE, alpha = (bf_real)BF_SELU_ALPHA;
    bf_real slope = 0, angle, th;
    switch (layer->activation) {
    case BF_RELU: return z > 0;
    case BF_LEAKY_RELU: return z > 0 ? 1 : p;
    case BF_TANH: return 1 / (BF_MATH(cosh)(z) * BF_MATH(cosh)(z));
    case BF_SIGMOID: return s * bf_sigmoid(-z);
    case BF_SOFTPLUS: return bf_sigmoid(p * z);
    case BF_GELU: return half * BF_MATH(erfc)(-z * BF_MATH(sqrt)(half)) + z * normal;
    case BF_SILU: return s + z * s * bf_sigmoid(-z);
    case BF_ERF: return 2 / BF_MATH(sqrt)(pi) * BF_MATH(exp)(-z * z);
    case BF_HARD_TANH: return z > -1 && z < 1;
    case BF_ABS: return (bf_real)((z > 0) - (z < 0));
    case BF_ELU: return z > 0 ? 1 : p * BF_MATH(exp)(z);
    case BF_SELU: return scale * (z > 0 ? 1 : alpha * BF_MATH(exp)(z));
    case BF_MISH:
        th = BF_MATH(tanh)(bf_log1p_exp(z));
        angle = BF_MATH(cosh)(bf_log1p_exp(z));
        return th + z * (s / angle) / angle;
    case BF_RELU6: return z > 0 && z < 6;
    case BF_HARDSWISH: return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + half;
    case BF_HARD_SIGMOID: return z > -3 && z < 3 ? (bf_real)1 / 6 : 0;
    case BF_SOFTSIGN: return 1 / (1 + BF_MATH(fabs)(z)) / (1 + BF_MATH(fabs)(z));
    case BF_LOG_SIGMOID: return bf_sigmoid(-z);
    case BF_GELU_TANH:
        angle = 2 * bf_gelu_angle(z, &slope);
        th = bf_sigmoid(angle) * bf_sigmoid(-angle);
        return bf_sigmoid(angle) + (th == 0 ? 0 : z * th * 2 * slope);
    default: return 1;
    }
}

/* One input's way through the network: value[0] = x, z[l] and slope[l] the pre-activations of layer l and the
 * activation's derivative there, value[l + 1] its outputs. */
typedef struct bf_tape {
    bf_real value[BF_LAYERS + 1][BF_WIDTH], z[BF_LAYERS][BF_WIDTH], slope[BF_LAYERS][BF_WIDTH];
} bf_tape;

/* -> C outputs, inside the tape; x == NULL: the same input as before */
BF_FUNCTION const bf_real *bf_forward(const bf_network *net, const bf_real *w, const BF_STORED *x,
                                      bf_tape *tape)
{
    for (size_t l = 0; l < net->layers; l++)
        if (bf_fan_in(net, l) > BF_WIDTH || net->layer[l].width > BF_WIDTH)
            abort();
    for (size_t k = 0; x && k < net->inputs; k++)
        tape->value[0][k] = (bf_real)x[k];
    for (size_t l = 0; l < net->layers; l++) {
        const size_t in = bf_fan_in(net, l), out = net->layer[l].width;
        for (size_t j = 0; j < out; j++) {
            const bf_real z = bf_dot(in, w + j * in, tape->value[l]);
            tape->z[l][j] = net->layer[l].no_bias ? z : z + w[out * in + j];
            tape->value[l + 1][j] = bf_activate(&net->layer[l], tape->z[l][j]);
            tape->slope[l][j] = bf_slope(&net->layer[l], tape->z[l][j]);
        }
        w += out * in + (net->layer[l].no_bias ? 0 : out);
    }
    return tape->value[net->layers];
}

/* gradient (P) += scale * gradient of <seed, f>, at the weights of the last bf_forward */
BF_FUNCTION void bf_reverse(const bf_network *net, const bf_real *w, const bf_tape *tape, const bf_real *seed,
                            bf_real scale, bf_real *gradient)
{
    bf_real above[BF_WIDTH], below[BF_WIDTH];
    memcpy(above, seed, bf_outputs(net) * sizeof *seed);
    for (size_t l = net->layers; l-- > 0;) {
        const size_t in = bf_fan_in(net, l), out = net->layer[l].width, start = bf_offset(net, l);
        memset(below, 0, sizeof below);
        for (size_t j = 0; j < out; j++) {
            const bf_real delta = above[j] * tape->slope[l][j];
            for (size_t k = 0; k < in; k++) {
                gradient[start + j * in + k] += scale * delta * tape->value[l][k];
                below[k] += delta * w[start + j * in + k];
            }
            if (!net->layer[l].no_bias)
                gradient[start + out * in + j] += scale * delta;
        }
        memcpy(above, below, sizeof above);
    }
}

/* jacobian (C x P) += scale * d f / d w */
BF_FUNCTION void bf_jacobian(const bf_network *net, const bf_real *w, const bf_tape *tape, bf_real scale,
                             bf_real *jacobian)
{
    for (size_t c = 0; c < bf_outputs(net); c++) {
        bf_real seed[BF_WIDTH] = {0};
        seed[c] = 1;
        bf_reverse(net, w, tape, seed, scale, jacobian + c * bf_parameters(net));
    }
}

BF_FUNCTION bf_real *bf_extend(size_t count, const BF_STORED *values)
{
    bf_real *extended = BF_NEW(bf_real, count);
    for (size_t i = 0; i < count; i++)
        extended[i] = (bf_real)values[i];
    return extended;
}

/* outputs (C), jacobian (C x P, may be NULL) at stored weights */
BF_FUNCTION void bf_evaluate(const bf_network *net, const BF_STORED *weights, const BF_STORED *x,
                             bf_real *outputs, bf_real *jacobian)
{
    const size_t P = bf_parameters(net), C = bf_outputs(net);
    bf_real *w = bf_extend(P, weights);
    bf_tape tape;
    memcpy(outputs, bf_forward(net, w, x, &tape), C * sizeof *outputs);
    if (jacobian) {
        memset(jacobian, 0, C * P * sizeof *jacobian);
        bf_jacobian(net, w, &tape, 1, jacobian);
    }
    free(w);
}

/* ---- losses ---- */

/* the loss of one example; gradient (C) = d loss / d f, may be NULL */
BF_FUNCTION bf_real bf_loss_value(bf_loss loss, size_t C, const bf_real *f, const BF_STORED *target,
                                  bf_real *gradient)
{
    const bf_real mean = 1 / (bf_real)C;
    bf_real sum = 0, top = f[0], mass = 0, targets = 0;
    size_t label = 0;
    for (size_t c = 0; c < C; c++) {
        top = f[c] > top ? f[c] : top;
        label = target[c] > target[label] ? c : label;
        targets += (bf_real)target[c];
        if (gradient)
            gradient[c] = 0;
    }
    for (size_t c = 0; c < C; c++)
        mass += BF_MATH(exp)(f[c] - top);
    for (size_t c = 0; c < C; c++) {
        const bf_real y = (bf_real)target[c], d = f[c] - y;
        bf_real g = 0;
        switch (loss) {
        case BF_SQUARED:
            sum += d * d / 2;
            g = d;
            break;
        case BF_MEAN_SQUARED:
            sum += d * d * mean;
            g = 2 * d * mean;
            break;
        case BF_SOFTMAX_CROSS_ENTROPY:
            sum -= y * (f[c] - top - BF_MATH(log)(mass));
            for (size_t j = 0; j < C;
                 j++) /* targets p_c - y, written so that nothing cancels where y is 0 or 1 */
                g += BF_MATH(exp)(f[j] - top) / mass * (j == c ? targets - y : -y);
            break;
        case BF_LOGISTIC:
            sum += (bf_log1p_exp(f[c]) - y * f[c]) * mean;
            g = ((1 - y) * bf_sigmoid(f[c]) - y * bf_sigmoid(-f[c])) * mean;
            break;
        case BF_NLL:
            sum -= y * f[c];
            g = -y;
            break;
        case BF_HUBER:
            sum += (d > -1 && d < 1 ? d * d / 2 : BF_MATH(fabs)(d) - (bf_real)0.5) * mean;
            g = (d < -1 ? -1 : d > 1 ? 1 : d) * mean;
            break;
        default: /* hinge */
            if (C == 1 && 1 - y * f[0] > 0) {
                sum = 1 - y * f[0];
                g = -y;
            } else if (C > 1 && c != label && 1 - f[label] + f[c] > 0) {
                sum += (1 - f[label] + f[c]) * mean;
                g = mean;
                if (gradient)
                    gradient[label] -= mean;
            }
        }
        if (gradient)
            gradient[c] += g;
    }
    return sum;
}

/* gradient (P) += scale * grad_w loss(f(w, x), target); -> the loss */
BF_FUNCTION bf_real bf_loss_gradient(const bf_network *net, bf_loss loss, const bf_real *w, const BF_STORED *x,
                                     const BF_STORED *target, bf_tape *tape, bf_real scale, bf_real *gradient)
{
    bf_real seed[BF_WIDTH];
    const bf_real value = bf_loss_value(loss, bf_outputs(net), bf_forward(net, w, x, tape), target, seed);
    bf_reverse(net, w, tape, seed, scale, gradient);
    return value;
}

/* ---- the integral of the Jacobian along a segment ---- */

typedef struct bf_path {
    const bf_network *net;
    size_t parameters, outputs, kinks /* functions whose roots are kinks */;
    bf_real *from, *change, *at;              /* P */
    bf_real node[BF_NODES], weight[BF_NODES]; /* on [-1, 1] */
    bf_real scale, error;
    bf_tape tape;
} bf_path;

BF_FUNCTION void bf_gauss_legendre(bf_real *node, bf_real *weight)
{
    for (int i = 0; i < BF_NODES; i++) {
        bf_real x = (bf_real)cos(3.14159265358979 * (i + 0.75) / (BF_NODES + 0.5)), slope = 1;
        for (int newton = 0; newton < 10; newton++) {
            bf_real p = x, before = 1;
            for (int k = 2; k <= BF_NODES; k++) {
                const bf_real next = ((2 * k - 1) * x * p - (k - 1) * before) / k;
                before = p;
                p = next;
            }
            slope = BF_NODES * (before - x * p) / (1 - x * x);
            x -= p / slope;
        }
        node[i] = x;
        weight[i] = 2 / ((1 - x * x) * slope * slope);
    }
}

/* The network at from + t * change; values (may be NULL): the kink functions there. */
BF_FUNCTION void bf_path_at(bf_path *path, bf_real t, bf_real *values)
{
    size_t count = 0;
    for (size_t p = 0; p < path->parameters; p++)
        path->at[p] = path->from[p] + t * path->change[p];
    bf_forward(path->net, path->at, NULL, &path->tape);
    for (size_t l = 0; values && l < path->net->layers; l++) {
        const double *places;
        const size_t kinks = bf_kinks(path->net->layer[l].activation, &places);
        for (size_t j = 0; j < path->net->layer[l].width; j++)
            for (size_t k = 0; k < kinks; k++)
                values[count++] = path->tape.z[l][j] - (bf_real)places[k];
    }
}

BF_FUNCTION int bf_sign(bf_real x)
{
    return (x > 0) - (x < 0);
}

/* the place in (low, high] where kink function j first leaves the sign that it has at low, to the last bit */
BF_FUNCTION bf_real bf_bisect(bf_path *path, size_t j, int sign, bf_real low, bf_real high, bf_real *values)
{
    for (int i = 0; i < 128; i++) {
        const bf_real middle = (low + high) / 2;
        if (middle <= low || middle >= high)
            break;
        bf_path_at(path, middle, values);
        if (bf_sign(values[j]) == sign)
            low = middle;
        else
            high = middle;
    }
    return high;
}

/* Function j has one sign at t - h, t and t + h, and is smallest at t: does it cross zero twice between?
 * Golden-section search for its minimum stops at the first place of another sign. */
BF_FUNCTION size_t bf_double_crossing(bf_path *path, size_t j, int sign, bf_real t, bf_real h, bf_real *values,
                                      bf_real *roots)
{
    const bf_real golden = (BF_MATH(sqrt)((bf_real)5) - 1) / 2;
    bf_real low = t - h, high = t + h, best[2], at[2];
    for (int i = 0; i < 100; i++) {
        at[0] = high - golden * (high - low);
        at[1] = low + golden * (high - low);
        for (int k = 0; k < 2; k++) {
            bf_path_at(path, at[k], values);
            best[k] = sign * values[j];
            if (best[k] < 0) {
                roots[0] = bf_bisect(path, j, sign, t - h, at[k], values);
                roots[1] = bf_bisect(path, j, -sign, at[k], t + h, values);
                return 2;
            }
        }
        if (best[0] < best[1])
            high = at[1];
        else
            low = at[0];
    }
    return 0;
}

BF_FUNCTION int bf_compare(const void *a, const void *b)
{
    return bf_sign(*(const bf_real *)a - *(const bf_real *)b);
}

/* -> *kinks: the sorted places in [0, 1] at which a kink function changes sign. Samples every 1/256, one
 * sample beyond either end, so that a function that dips between the first two samples is seen too. */
BF_FUNCTION size_t bf_find_kinks(bf_path *path, bf_real **kinks)
{
    const size_t K = path->kinks, samples = BF_SAMPLES + 3;
    const bf_real h = 1 / (bf_real)BF_SAMPLES;
    bf_real *values = BF_NEW(bf_real, samples * K), *here = BF_NEW(bf_real, K);
    size_t count = 0;
    *kinks = BF_NEW(bf_real, 3 * K * samples);
    for (size_t k = 0; K && k < samples; k++)
        bf_path_at(path, ((bf_real)k - 1) * h, values + k * K);
    for (size_t j = 0; j < K; j++)
        for (size_t k = 1; k + 1 < samples; k++) {
            const bf_real t = ((bf_real)k - 1) * h, a = values[(k - 1) * K + j], b = values[k * K + j];
            const bf_real c = values[(k + 1) * K + j], rise = bf_sign(b) * (a + c - 2 * b);
            if (k + 2 < samples && bf_sign(b) != bf_sign(c))
                (*kinks)[count++] = bf_bisect(path, j, bf_sign(b), t, t + h, here);
            /* a dip goes no deeper than its neighbours rise, with room for what is not convex */
            if (bf_sign(b) != 0 && bf_sign(a) == bf_sign(b) && bf_sign(c) == bf_sign(b) &&
                bf_sign(b) * (a - b) >= 0 && bf_sign(b) * (c - b) >= 0 && BF_MATH(fabs)(b) <= 4 * rise)
                count += bf_double_crossing(path, j, bf_sign(b), t, h, here, *kinks + count);
        }
    qsort(*kinks, count, sizeof **kinks, bf_compare);
    free(values);
    free(here);
    return count;
}

/* -> the integral of the Jacobian over [low, high] by one Gauss-Legendre rule, C x P */
BF_FUNCTION bf_real *bf_panel(bf_path *path, bf_real low, bf_real high)
{
    const size_t size = path->outputs * path->parameters;
    bf_real *sum = BF_NEW(bf_real, size);
    for (int i = 0; i < BF_NODES; i++) {
        bf_path_at(path, low + (high - low) * (1 + path->node[i]) / 2, NULL);
        bf_jacobian(path->net, path->at, &path->tape, (high - low) / 2 * path->weight[i], sum);
    }
    for (size_t i = 0; high > low && i < size; i++)
        path->scale = BF_MATH(fmax)(path->scale, BF_MATH(fabs)(sum[i]) / (high - low));
    return sum;
}

/* total += the integral over [low, high], which one rule says is whole (released here). */
BF_FUNCTION void bf_integrate(bf_path *path, bf_real low, bf_real high, bf_real *whole, int depth,
                              bf_real *total)
{
    const size_t size = path->outputs * path->parameters;
    const bf_real middle = (low + high) / 2;
    bf_real *left = bf_panel(path, low, middle), *right = bf_panel(path, middle, high), change = 0;
    for (size_t i = 0; i < size; i++)
        change = BF_MATH(fmax)(change, BF_MATH(fabs)(left[i] + right[i] - whole[i]));
    free(whole);
    if (change > 256 * BF_EPSILON * path->scale && depth < BF_DEPTH) {
        bf_integrate(path, low, middle, left, depth + 1, total);
        bf_integrate(path, middle, high, right, depth + 1, total);
        return;
    }
    path->error = BF_MATH(fmax)(path->error, change);
    for (size_t i = 0; i < size; i++)
        total[i] += left[i] + right[i];
    free(left);
    free(right);
}

/* total (C x P) = the integral over t in [0, 1] of the Jacobian at from + t (to - from). *error: the largest
 * change of an entry that the last bisection still made, relative to the largest entry (may be NULL).
 * -> the number of pieces between kinks. */
BF_FUNCTION size_t bf_path_jacobian(const bf_network *net, const BF_STORED *from, const BF_STORED *to,
                                    const BF_STORED *x, bf_real *total, bf_real *error)
{
    bf_path path;
    memset(&path, 0, sizeof path);
    path.net = net;
    path.parameters = bf_parameters(net);
    path.outputs = bf_outputs(net);
    path.from = bf_extend(path.parameters, from);
    path.change = bf_extend(path.parameters, to);
    path.at = BF_NEW(bf_real, path.parameters);
    for (size_t p = 0; p < path.parameters; p++)
        path.change[p] -= path.from[p];
    path.kinks = bf_kink_functions(net);
    bf_gauss_legendre(path.node, path.weight);
    bf_forward(net, path.from, x, &path.tape); /* sets the input */
    memset(total, 0, path.outputs * path.parameters * sizeof *total);
    bf_real *kinks, low = 0;
    const size_t count = bf_find_kinks(&path, &kinks);
    size_t pieces = 0;
    for (size_t k = 0; k <= count; k++) {
        const bf_real high = k < count && kinks[k] < 1 ? kinks[k] : 1;
        if (high > low) {
            bf_integrate(&path, low, high, bf_panel(&path, low, high), 0, total);
            low = high;
            pieces++;
        }
    }
    if (error)
        *error = path.scale > 0 ? path.error / path.scale : 0;
    free(path.from);
    free(path.change);
    free(path.at);
    free(kinks);
    return pieces;
}

/* ---- optimisers ---- */

BF_FUNCTION int bf_decoupled(const bf_optimizer *o)
{
    return o->rule == BF_ADAMW || o->decoupled;
}

BF_FUNCTION int bf_stateful(const bf_optimizer *o)
{
    return o->rule == BF_ADAM || o->rule == BF_ADAMW || o->rule == BF_NADAM || o->momentum != 0;
}

/* NAdam's momentum of step s. */
BF_FUNCTION bf_real bf_nadam_momentum(const bf_optimizer *o, size_t s)
{
    return (bf_real)o->beta1 *
           (1 - BF_MATH(pow)((bf_real)0.96, (bf_real)(s + 1) * (bf_real)o->momentum_decay) / 2);
}

/* What multiplies NAdam's gradient, and its first moment. */
BF_FUNCTION void bf_nadam_factors(const bf_optimizer *o, size_t s, bf_real *direct, bf_real *entered)
{
    bf_real product = 1;
    for (size_t k = 0; k <= s; k++)
        product *= bf_nadam_momentum(o, k);
    const bf_real next = bf_nadam_momentum(o, s + 1);
    *direct = (1 - bf_nadam_momentum(o, s)) / (1 - product);
    *entered = next / (1 - product * next);
}

/* What PyTorch's optimiser does with one source's share of the gradient (NULL: 0) in step s: updates its share
 * m of the first moment, and writes its share of the update. Linear in the share, so shares add up.
 * denominator: Adam's. */
BF_FUNCTION void bf_advance(const bf_optimizer *o, size_t s, double learning_rate, size_t P,
                            const bf_real *denominator, const bf_real *share, bf_real *m, bf_real *update)
{
    const bf_real lr = (bf_real)learning_rate, mu = (bf_real)o->momentum, b1 = (bf_real)o->beta1;
    const bf_real correction = 1 - BF_MATH(pow)(b1, (bf_real)(s + 1));
    bf_real direct = 0, entered = 0;
    if (o->rule == BF_NADAM)
        bf_nadam_factors(o, s, &direct, &entered);
    for (size_t p = 0; p < P; p++) {
        const bf_real g = share ? share[p] : 0;
        if (o->rule == BF_NADAM) {
            m[p] = b1 * m[p] + (1 - b1) * g;
            update[p] = -lr * (direct * g + entered * m[p]) / denominator[p];
        } else if (o->rule == BF_RMSPROP) {
            m[p] = mu * m[p] + g / denominator[p];
            update[p] = -lr * m[p];
        } else if (o->rule == BF_ADAGRAD) {
            update[p] = -lr / (1 + (bf_real)s * (bf_real)o->lr_decay) * g / denominator[p];
        } else if (o->rule != BF_SGD) {
            m[p] = b1 * m[p] + (1 - b1) * g;
            update[p] = -lr / correction * m[p] / denominator[p];
        } else if (o->momentum != 0) {
            m[p] = s == 0 ? g : mu * m[p] + (1 - (bf_real)o->dampening) * g;
            update[p] = -lr * (o->nesterov ? g + mu * m[p] : m[p]);
        } else
            update[p] = -lr * g;
    }
}

/* One step's gradients at w_s, with batch weights and the clipping scale: of each example (NULL: not wanted;
 * used[i] tells which), their sum, and of coupled weight decay. */
BF_FUNCTION void bf_step_gradients(const bf_run *run, size_t s, const bf_real *w, bf_tape *tape,
                                   bf_real *examples, int *used, bf_real *sum, bf_real *decay)
{
    const size_t P = run->parameters, N = run->examples;
    const int64_t first = run->batch_offsets[s], end = run->batch_offsets[s + 1];
    bf_real *own = BF_NEW(bf_real, P);
    memset(sum, 0, P * sizeof *sum);
    if (examples)
        memset(examples, 0, N * P * sizeof *examples);
    memset(used, 0, N * sizeof *used);
    for (int64_t b = first; b < end; b++) {
        const size_t i = (size_t)run->batch_items[b];
        const bf_real c = run->batch_weights ? (bf_real)run->batch_weights[b] : 1 / (bf_real)(end - first);
        memset(own, 0, P * sizeof *own);
        bf_loss_gradient(&run->network, run->loss, w, run->inputs + i * run->network.inputs,
                         run->targets + i * run->outputs, tape,
                         c * (run->gradient_scales ? (bf_real)run->gradient_scales[s] : 1) *
                             (run->optimizer.maximize ? -1 : 1),
                         own);
        used[i] = 1;
        for (size_t p = 0; p < P; p++) {
            sum[p] += own[p];
            if (examples)
                examples[i * P + p] += own[p];
        }
    }
    for (size_t p = 0; p < P; p++)
        decay[p] = bf_decoupled(&run->optimizer) ? 0 : (bf_real)run->optimizer.weight_decay * w[p];
    free(own);
}

/* v (P): the second moment, or Adagrad's sum, advanced by step s, or the recorded one;
 * denominator = sqrt(v / (1 - beta2^(s+1))) + epsilon, of RMSprop and Adagrad without the correction */
BF_FUNCTION void bf_second_moment(const bf_run *run, size_t s, const bf_real *sum, const bf_real *decay,
                                  bf_real *v, bf_real *denominator)
{
    const int plain = run->optimizer.rule == BF_RMSPROP || run->optimizer.rule == BF_ADAGRAD;
    const bf_real b2 = (bf_real)(plain ? run->optimizer.alpha : run->optimizer.beta2),
                  correction = plain ? 1 : 1 - BF_MATH(pow)(b2, (bf_real)(s + 1));
    for (size_t p = 0; run->optimizer.rule != BF_SGD && p < run->parameters; p++) {
        const bf_real g = sum[p] + decay[p];
        if (run->second_moments)
            v[p] = (bf_real)run->second_moments[s * run->parameters + p];
        else if (run->optimizer.rule == BF_ADAGRAD)
            v[p] = (s ? v[p] : (bf_real)run->optimizer.initial_accumulator_value) + g * g;
        else
            v[p] = b2 * v[p] + (1 - b2) * g * g;
        denominator[p] = BF_MATH(sqrt)(v[p] / correction) + (bf_real)run->optimizer.epsilon;
    }
}

/* The share of weight decay in step s: coupled through the gradient, or AdamW's own. */
BF_FUNCTION void bf_advance_decay(const bf_run *run, size_t s, const bf_real *w, const bf_real *denominator,
                                  const bf_real *decay, bf_real *m, bf_real *update)
{
    bf_advance(&run->optimizer, s, run->learning_rates[s], run->parameters, denominator, decay, m, update);
    for (size_t p = 0; bf_decoupled(&run->optimizer) && p < run->parameters; p++)
        update[p] -= (bf_real)run->learning_rates[s] * (bf_real)run->optimizer.weight_decay * w[p];
}

/* ---- the decomposition ---- */

/* inputs: rows x D test inputs. The sources of the updates are the N examples, the S steps at which gradients
 * were taken (the same gradients, summed the other way), and decay. */
BF_FUNCTION void bf_decompose(const bf_run *run, size_t rows, const BF_STORED *inputs, bf_result *out)
{
    const size_t P = run->parameters, N = run->examples, S = run->steps, C = run->outputs,
                 L = run->network.layers;
    const size_t sources = N + S + 1, cells = rows * C;
    const int stateful = bf_stateful(&run->optimizer);
    bf_real *gradient = BF_NEW(bf_real, N * P), *m = BF_NEW(bf_real, sources * P),
            *phi = BF_NEW(bf_real, C * P);
    bf_real *update = BF_NEW(bf_real, sources * P), *sum = BF_NEW(bf_real, P), *decay = BF_NEW(bf_real, P);
    bf_real *v = BF_NEW(bf_real, P), *denominator = BF_NEW(bf_real, P), *rest = BF_NEW(bf_real, P);
    bf_real *data = BF_NEW(bf_real, P), error;
    int *used = BF_NEW(int, N), *live = BF_NEW(int, sources);
    bf_tape tape;
    memset(out, 0, sizeof *out);
    out->rows = rows, out->outputs = C, out->examples = N, out->steps = S, out->layers = L;
    out->by_example = BF_NEW(bf_real, cells * N), out->by_step = BF_NEW(bf_real, cells * S);
    out->by_layer = BF_NEW(bf_real, cells * L), out->decay = BF_NEW(bf_real, cells);
    out->unattributed = BF_NEW(bf_real, cells), out->closure = BF_NEW(bf_real, cells);
    out->initial = BF_NEW(bf_real, cells), out->final_output = BF_NEW(bf_real, cells);
    for (size_t s = 0; s < S; s++) {
        const double lr = run->learning_rates[s];
        bf_real *w = bf_extend(P, run->weights + s * P);
        bf_step_gradients(run, s, w, &tape, gradient, used, sum, decay);
        bf_second_moment(run, s, sum, decay, v, denominator);
        for (size_t i = 0; i < N + S; i++) {
            const bf_real *share = i < N ? (used[i] ? gradient + i * P : NULL) : i - N == s ? sum : NULL;
            live[i] = share || (stateful && live[i]);
            if (live[i])
                bf_advance(&run->optimizer, s, lr, P, denominator, share, m + i * P, update + i * P);
        }
        bf_advance_decay(run, s, w, denominator, decay, m + (N + S) * P, update + (N + S) * P);
        for (size_t p = 0; p < P; p++) {
            data[p] = 0;
            for (size_t i = 0; i < N; i++)
                data[p] += live[i] ? update[i * P + p] : 0;
            rest[p] = (bf_real)run->weights[(s + 1) * P + p] - w[p] - data[p] - update[(N + S) * P + p];
        }
        for (size_t r = 0; r < rows; r++) {
            out->pieces += bf_path_jacobian(&run->network, run->weights + s * P, run->weights + (s + 1) * P,
                                            inputs + r * run->network.inputs, phi, &error);
            out->quadrature_error = BF_MATH(fmax)(out->quadrature_error, error);
            for (size_t c = 0; c < C; c++) {
                const size_t cell = r * C + c;
                for (size_t i = 0; i < N + S; i++)
                    if (live[i])
                        *(i < N ? out->by_example + cell * N + i : out->by_step + cell * S + (i - N)) +=
                            bf_dot(P, phi + c * P, update + i * P);
                for (size_t l = 0; l < L; l++) {
                    const size_t at = bf_offset(&run->network, l), size = bf_offset(&run->network, l + 1) - at;
                    out->by_layer[cell * L + l] += bf_dot(size, phi + c * P + at, data + at);
                }
                out->decay[cell] += bf_dot(P, phi + c * P, update + (N + S) * P);
                out->unattributed[cell] += bf_dot(P, phi + c * P, rest);
            }
        }
        free(w);
    }
    for (size_t r = 0; r < rows; r++) {
        bf_evaluate(&run->network, run->weights, inputs + r * run->network.inputs, out->initial + r * C, NULL);
        bf_evaluate(&run->network, run->weights + S * P, inputs + r * run->network.inputs,
                    out->final_output + r * C, NULL);
    }
    for (size_t cell = 0; cell < cells; cell++) {
        out->closure[cell] =
            out->final_output[cell] - out->initial[cell] - out->decay[cell] - out->unattributed[cell];
        for (size_t i = 0; i < N; i++)
            out->closure[cell] -= out->by_example[cell * N + i];
    }
    free(gradient), free(m), free(phi), free(update), free(sum), free(decay), free(v), free(denominator);
    free(rest), free(data), free(used), free(live);
}

BF_FUNCTION void bf_result_free(bf_result *r)
{
    free(r->by_example), free(r->by_step), free(r->by_layer), free(r->decay), free(r->unattributed);
    free(r->closure), free(r->initial), free(r->final_output);
    memset(r, 0, sizeof *r);
}

/* ---- random runs ---- */

BF_FUNCTION double bf_uniform(uint64_t *state) /* splitmix64, in (0, 1) */
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ((double)((z ^ (z >> 31)) >> 12) + 0.5) / 4503599627370496.0;
}

BF_FUNCTION double bf_normal(uint64_t *state)
{
    const double radius = sqrt(-2 * log(bf_uniform(state)));
    return radius * cos(6.283185307179586 * bf_uniform(state));
}

/* Random data that fits the loss, PyTorch's initialisation, and a training run whose batches have 1 to
 * recipe->batch rows (the same row may come twice), with weights rounded to double (or float) after every
 * step. Aborts when the run diverges. */
BF_FUNCTION void bf_run_make(const bf_network *net, bf_loss loss, const bf_optimizer *optimizer,
                             const bf_recipe *recipe, bf_run *run)
{
    const size_t P = bf_parameters(net), C = bf_outputs(net), N = recipe->examples, S = recipe->steps;
    uint64_t state = recipe->seed * 0x2545f4914f6cdd1du + 1;
    size_t p = 0;
    memset(run, 0, sizeof *run);
    run->network = *net, run->loss = loss, run->optimizer = *optimizer;
    run->steps = S, run->parameters = P, run->examples = N, run->outputs = C;
    run->weights = BF_NEW(BF_STORED, (S + 1) * P), run->learning_rates = BF_NEW(double, S);
    run->inputs = BF_NEW(BF_STORED, N * net->inputs), run->targets = BF_NEW(BF_STORED, N * C);
    run->batch_offsets = BF_NEW(int64_t, S + 1);
    run->batch_items = BF_NEW(int64_t, S * (recipe->batch ? recipe->batch : N));
    if (recipe->batch_weights)
        run->batch_weights = BF_NEW(double, S *(recipe->batch ? recipe->batch : N));
    if (recipe->gradient_scales)
        run->gradient_scales = BF_NEW(double, S);
    if (loss == BF_SOFTMAX_CROSS_ENTROPY || loss == BF_NLL || (loss == BF_HINGE && C > 1))
        run->labels = BF_NEW(int64_t, N);
    for (size_t i = 0; i < N * net->inputs; i++)
        run->inputs[i] = (BF_STORED)bf_normal(&state);
    for (size_t i = 0; i < N; i++) {
        for (size_t c = 0; c < C; c++) {
            const double u = bf_uniform(&state);
            run->targets[i * C + c] = (BF_STORED)(run->labels           ? 0
                                                  : loss == BF_HINGE    ? (u < 0.5 ? -1 : 1)
                                                  : loss == BF_LOGISTIC ? u < 0.5
                                                                        : bf_normal(&state));
        }
        if (run->labels) {
            run->labels[i] = (int64_t)(bf_uniform(&state) * (double)C);
            run->targets[i * C + (size_t)run->labels[i]] = 1;
        }
    }
    for (size_t l = 0; l < net->layers; l++)
        for (; p < bf_offset(net, l + 1); p++)
            run->weights[p] = (BF_STORED)((2 * bf_uniform(&state) - 1) / sqrt((double)bf_fan_in(net, l)));
    for (p = 0; recipe->float32 && p < P; p++)
        run->weights[p] = (BF_STORED)(float)run->weights[p];
    for (size_t s = 0; s < S; s++) {
        const size_t size = recipe->batch ? 1 + (size_t)(bf_uniform(&state) * (double)recipe->batch) : N;
        const int64_t first = run->batch_offsets[s];
        run->batch_offsets[s + 1] = first + (int64_t)size;
        run->learning_rates[s] = recipe->learning_rate * (0.5 + bf_uniform(&state));
        for (size_t b = 0; b < size; b++) {
            run->batch_items[first + (int64_t)b] =
                recipe->batch ? (int64_t)(bf_uniform(&state) * (double)N) : (int64_t)b;
            if (run->batch_weights)
                run->batch_weights[first + (int64_t)b] = (0.5 + bf_uniform(&state)) / (double)size;
        }
        if (recipe->batch && size > 2) /* make sure that rows repeat */
            run->batch_items[first + 1] = run->batch_items[first];
        if (run->gradient_scales)
            run->gradient_scales[s] = 0.25 + 0.75 * bf_uniform(&state);
    }
    bf_real *m = BF_NEW(bf_real, 2 * P), *v = BF_NEW(bf_real, P), *denominator = BF_NEW(bf_real, P);
    bf_real *sum = BF_NEW(bf_real, P), *decay = BF_NEW(bf_real, P), *update = BF_NEW(bf_real, 2 * P);
    BF_STORED *moments = BF_NEW(BF_STORED, S * P);
    int *used = BF_NEW(int, N);
    bf_tape tape;
    for (size_t s = 0; s < S; s++) {
        bf_real *w = bf_extend(P, run->weights + s * P);
        bf_step_gradients(run, s, w, &tape, NULL, used, sum, decay);
        bf_second_moment(run, s, sum, decay, v, denominator);
        bf_advance(optimizer, s, run->learning_rates[s], P, denominator, sum, m, update);
        bf_advance_decay(run, s, w, denominator, decay, m + P, update + P);
        for (p = 0; p < P; p++) {
            const double next = (double)(w[p] + update[p] + update[P + p]);
            if (!(fabs(next) < 1e30)) {
                fprintf(stderr, "bf_run_make: the run diverges in step %lu\n", (unsigned long)s);
                abort();
            }
            run->weights[(s + 1) * P + p] = (BF_STORED)(recipe->float32 ? (double)(float)next : next);
            moments[s * P + p] = (BF_STORED)v[p];
        }
        free(w);
    }
    if (recipe->second_moments && optimizer->rule != BF_SGD)
        run->second_moments = moments;
    else
        free(moments);
    free(m), free(v), free(denominator), free(sum), free(decay), free(update), free(used);
}

BF_FUNCTION void bf_run_free(bf_run *run)
{
    free(run->weights), free(run->learning_rates), free(run->batch_offsets), free(run->batch_items);
    free(run->batch_weights), free(run->gradient_scales), free(run->second_moments);
    free(run->inputs), free(run->targets), free(run->labels);
    memset(run, 0, sizeof *run);
}

/* ---- the run directory's words for the above ---- */

BF_FUNCTION void bf_network_text(const bf_network *net, char *text, size_t size)
{
    size_t at = (size_t)snprintf(text, size, "input %lu", (unsigned long)net->inputs);
    for (size_t l = 0; l < net->layers && at < size; l++) {
        const bf_layer *layer = &net->layer[l];
        at += (size_t)snprintf(text + at, size - at, "; dense %lu%s", (unsigned long)layer->width,
                               layer->no_bias ? " nobias" : "");
        if (at < size && bf_has_parameter(layer->activation))
            at += (size_t)snprintf(text + at, size - at, "; %s %.17g", bf_activation_name(layer->activation),
                                   layer->parameter);
        else if (at < size && layer->activation != BF_IDENTITY)
            at += (size_t)snprintf(text + at, size - at, "; %s", bf_activation_name(layer->activation));
    }
}

BF_FUNCTION const char *bf_loss_name(bf_loss loss)
{
    static const char *const name[BF_LOSSES] = {
        "squared", "mean_squared", "softmax_cross_entropy", "logistic", "nll", "huber", "hinge"};
    return name[loss];
}

BF_FUNCTION void bf_optimizer_text(const bf_optimizer *o, char *text, size_t size)
{
    if (o->rule == BF_SGD)
        snprintf(text, size, "sgd momentum=%.17g dampening=%.17g weight_decay=%.17g nesterov=%d", o->momentum,
                 o->dampening, o->weight_decay, o->nesterov);
    else
        snprintf(text, size, "%s beta1=%.17g beta2=%.17g epsilon=%.17g weight_decay=%.17g",
                 o->rule == BF_ADAM ? "adam" : "adamw", o->beta1, o->beta2, o->epsilon, o->weight_decay);
}
#endif
