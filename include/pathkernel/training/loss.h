/* pathkernel/training/loss.h: losses, their options and derivatives, and what their targets are.
 *
 * A loss is one row of the table pk__losses: its name, a function that gives value and gradient, one that
 * multiplies with its Hessian, what its targets must be, and whether an integer target is a class. Definitions are
 * those of PyTorch's modules, per example; a batch weights its examples (1/count where no weights are given,
 * PyTorch's mean).
 *
 *     name                    l(f, y), C outputs                                      PyTorch
 *     squared                 sum_j (f_j - y_j)^2 / 2
 *     mean_squared            sum_j (f_j - y_j)^2 / C                                 MSELoss
 *     softmax_cross_entropy   sum_j y_j (log sum_k exp f_k - f_j)                     CrossEntropyLoss
 *     logistic                sum_j (log(1 + exp f_j) - y_j f_j) / C                  BCEWithLogitsLoss
 *     nll                     - sum_j y_j f_j                                         NLLLoss
 *     huber                   sum_j h(f_j - y_j) / C, h(d) = |d| < 1 ? d^2/2 : |d| - 1/2   HuberLoss, SmoothL1Loss
 *     hinge                   sum_{j != k} max(0, 1 - f_k + f_j) / C, y_k = 1         MultiMarginLoss
 *                             C = 1: max(0, 1 - y f)
 *     l1                      sum_j |f_j - y_j| / C                                   L1Loss
 *     kl_div                  sum_j y_j (log y_j - f_j)                               KLDivLoss, batchmean
 *     binary_cross_entropy    - sum_j (y_j log f_j + (1 - y_j) log(1 - f_j)) / C      BCELoss
 *     recorded                sum_j y_j f_j: the target is the derivative dl/df of some loss, as a run
 *                             records it for each item of its batches (run.h, loss_gradients.npy)
 *
 * A criterion is a loss with its options, PyTorch's by name:
 *
 *     softmax_cross_entropy   label_smoothing=E   y becomes (1 - E) y + E / C
 *                             weight=A,B,...      one a class: then y_j becomes weight_j y_j
 *                             ignore_index=K      label K is no class: the example's loss is 0
 *     nll                     weight=, ignore_index=
 *     logistic                pos_weight=A,B,...  one an output, or one for all:
 *                                                 sum_j ((1 - y_j) f_j + (1 + (pos_weight_j - 1) y_j) log(1 + exp -f_j)) / C
 *     huber                   delta=D             h(d) = |d| < D ? d^2/2 : D (|d| - D/2)             HuberLoss
 *                             beta=B              h(d) = |d| < B ? d^2/(2 B) : |d| - B/2             SmoothL1Loss
 *     kl_div                  log_target=1        sum_j exp y_j (y_j - f_j)
 *
 * The mean of PyTorch's losses with weight= or ignore_index= divides by the sum of the weights of the batch's labels: that
 * is in the batch's weights, c_b = 1 / sum_b' weight_{y_b'} (pk_criterion_mean). reduction='sum' is c_b = 1.
 *
 * The derivative at a kink of hinge or l1 is 0, and so is the second one of huber at |d| = D, as in PyTorch. Exponentials
 * never overflow, and small residuals (a confident, correct classification) keep their relative accuracy. As BCELoss,
 * binary_cross_entropy takes no logarithm below -100 and divides by no f (1 - f) below 1e-12; its outputs lie in [0, 1].
 */
#ifndef PATHKERNEL_LOSS_H
#define PATHKERNEL_LOSS_H
#include "../data/dataset.h"
#include "../math/elementary.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_loss {
    PK_SQUARED = 1,
    PK_MEAN_SQUARED,
    PK_SOFTMAX_CROSS_ENTROPY,
    PK_LOGISTIC,
    PK_NLL,
    PK_HUBER,
    PK_HINGE,
    PK_L1,
    PK_KL_DIV,
    PK_BINARY_CROSS_ENTROPY,
    PK_RECORDED
} pk_loss;

/* A loss with its options. Zeroed but for the loss = PyTorch's defaults. A loss reads its own options only. */
typedef struct pk_criterion {
    pk_loss loss;
    double label_smoothing; /* softmax_cross_entropy */
    int ignores;            /* 1: integer label ignore_index is ignored */
    int log_target;         /* kl_div: 1: targets are logarithms */
    int64_t ignore_index;   /* softmax_cross_entropy, nll */
    double delta, beta;     /* huber: one of them > 0; neither: both are 1, which is the same */
    const double *weight;   /* of classes, >= 0; logistic: pos_weight; NULL: all 1 */
    size_t weight_count;    /* outputs; logistic: or 1 */
    void *memory;           /* private: of weight, after pk_criterion_parse */
} pk_criterion;

/* The loss with this name. For another name, PK_FORMAT; the message lists the names. */
PK_API PK__MUST_USE pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss);
/* The name pk_loss_parse takes; "unknown" for a value that is not a loss. Losses are numbered from 1 on without a gap. */
PK_API const char *pk_loss_name(pk_loss loss);

/* l(f, y) for one example. f: outputs numbers, what the network gives; target: outputs numbers as
 * pk_loss_targets writes them. Targets with entries 0 do not multiply infinities. NaN for a value that is
 * not a loss. */
PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target);
/* gradient = dl/df (outputs numbers) of one example; may be f itself, not target. */
PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient);
/* product = (d2l/df2) direction (outputs numbers each) of one example; may be the direction itself. */
PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product);

/* "softmax_cross_entropy label_smoothing=0.1 weight=1,0.5,2": a name, then its options in any order; a list has no spaces.
 * PK_FORMAT for an unknown name or option, one given twice, or what is not a number; PK_ARGUMENT for a value out of range.
 * The message names the word; *criterion is untouched then. Owns its weights. */
PK_API PK__MUST_USE pk_status pk_criterion_parse(pk_context *context, const char *text,
                                                 pk_criterion *criterion);
PK_API void pk_criterion_release(pk_context *context, pk_criterion *criterion);
/* The text that pk_criterion_parse turns into the same bits, cut off at size bytes with its NUL; returns the bytes that all
 * of it takes with its NUL, so that a call with size 0 asks for them. 0 for a value that is not a loss. */
PK_API size_t pk_criterion_format(const pk_criterion *criterion, char *text, size_t size);
/* As pk_loss_value, pk_loss_gradient, pk_loss_hessian_product, with the options. target: as pk_criterion_targets writes it:
 * smoothing, class weights and ignored labels are in it. */
PK_API double pk_criterion_value(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                 const pk_real *target);
PK_API void pk_criterion_gradient(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                  const pk_real *target, pk_real *gradient);
PK_API void pk_criterion_hessian_product(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                         const pk_real *target, const pk_real *direction, pk_real *product);

/* Do the targets fit the loss and the number of outputs? Reads every target.
 *   (N,) integers        classes in [0, outputs), made one-hot. With one output they are numbers instead
 *                        (0 or 1 for logistic, +1 or -1 for hinge), except for the two losses on
 *                        (log-)probabilities.
 *   (N, outputs) floats, or (N,) where outputs == 1: finite, and
 *                        softmax_cross_entropy, nll: >= 0 (a row need not sum to 1)
 *                        logistic, binary_cross_entropy: in [0, 1]
 *                        kl_div: >= 0 unless they are logarithms
 *                        hinge: one 1, the others 0; with one output +1 or -1.
 * Statuses as pk_dataset_check; the message names the first row that does not fit. Cost: two passes over the
 * targets; one row is allocated. */
PK_API PK__MUST_USE pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset,
                                            size_t outputs);
/* targets (count x outputs): the rows items[0..count) of the dataset's targets as vectors. The dataset has
 * passed pk_loss_check, and items are in range. */
PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets);
/* The same with options: also whether these are in range and their weights as many as the outputs. ignore_index and
 * log_target need labels and numbers. */
PK_API PK__MUST_USE pk_status pk_criterion_check(pk_context *context, const pk_criterion *criterion,
                                                 const pk_dataset *dataset, size_t outputs);
PK_API void pk_criterion_targets(const pk_criterion *criterion, const pk_dataset *dataset, const int64_t *items,
                                 size_t count, size_t outputs, pk_real *targets);
/* weights (count): what PyTorch's reduction='mean' multiplies each loss of a batch with: 1 / count; with class weights or
 * ignore_index, and labels, 1 / the sum of the weights of the batch's labels (1 each without, 0 of those ignored): infinite
 * where all of them are ignored. */
PK_API void pk_criterion_mean(const pk_criterion *criterion, const pk_dataset *dataset, const int64_t *items,
                              size_t count, double *weights);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_LOSS_IMPLEMENTED)
#define PATHKERNEL_LOSS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- rules: value, and the gradient where it is not NULL; gradient may be f. c: the options --------------- */

static double pk__squared(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                          pk_real *gradient)
{
    (void)c;
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)d;
    }
    return sum / 2;
}

static double pk__mean_squared(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                               pk_real *gradient)
{
    (void)c;
    double sum = 0, factor = 2 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)(factor * d);
    }
    return sum / (double)outputs;
}

/* With Z = 1 + rest after the largest output is subtracted: log Z = log1p(rest), and 1 - p = rest / Z for
 * the largest, so that nothing cancels where the network is sure. */
static double pk__softmax_cross_entropy(const pk_criterion *c, size_t outputs, const pk_real *f,
                                        const pk_real *y, pk_real *gradient)
{
    (void)c;
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    const double largest = f[top];
    double rest = 0, total = 0, value = 0, e[16];
    for (size_t first = 0; first < outputs; first += 16) {
        const size_t count = pk__min(outputs - first, 16);
        for (size_t j = 0; j < count; j++) {
            e[j] = f[first + j] - largest;
            total += y[first + j];
            if (y[first + j] != 0) /* 0 * infinity is 0 here */
                value -= y[first + j] * e[j];
        }
        pk__all_exponential(count, 1, e, e);
        for (size_t j = 0; j < count; j++) { /* of the largest: 1, NaN for infinity */
            rest += first + j == top ? 0 : e[j];
            if (gradient)
                gradient[first + j] = (pk_real)e[j];
        }
    }
    if (gradient) {
        const double inverse = 1 / (1 + rest);
        for (size_t j = 0; j < outputs; j++) {
            double p = gradient[j] * inverse, q = j == top ? rest * inverse : 1 - p;
            gradient[j] = (pk_real)(p * (total - y[j]) - y[j] * q);
        }
    }
    return value + total * log1p(rest);
}

/* Of output j, where its target is 1. */
static double pk__positive_weight(const pk_criterion *c, size_t j)
{
    return c->weight ? c->weight[c->weight_count > 1 ? j : 0] : 1;
}

static double pk__logistic(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                           pk_real *gradient)
{
    double sum = 0, count = (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double x = f[j], t = y[j], e = exp(-fabs(x)), tail = e / (1 + e); /* sigmoid(-|x|) */
        const double positive = pk__positive_weight(c, j), both = 1 + (positive - 1) * t;
        sum += (x > 0 ? (1 - t) * x : -positive * t * x) + both * log1p(e);
        if (gradient) /* both sigmoid(x) - positive t without cancelling at t = 0 or 1 */
            gradient[j] = (pk_real)((x > 0 ? (1 - t) - both * tail : both * tail - positive * t) / count);
    }
    return sum / count;
}

static double pk__nll(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                      pk_real *gradient)
{
    (void)c;
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        if (y[j] != 0)
            sum -= (double)y[j] * f[j];
        if (gradient)
            gradient[j] = -y[j];
    }
    return sum;
}

/* Where it becomes linear: delta of HuberLoss, beta of SmoothL1Loss. */
static double pk__huber_edge(const pk_criterion *c)
{
    return c->delta > 0 ? c->delta : c->beta > 0 ? c->beta : 1;
}

static double pk__huber(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                        pk_real *gradient)
{
    const double edge = pk__huber_edge(c), beta = c->beta > 0 ? c->beta : 1, slope = edge / beta;
    double sum = 0, factor = 1 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j], size = fabs(d);
        sum += size < edge ? 0.5 * d * (d / beta) : slope * (size - 0.5 * edge);
        if (gradient)
            gradient[j] = (pk_real)(factor * (d <= -edge ? -slope : d >= edge ? slope : d / beta));
    }
    return sum / (double)outputs;
}

static double pk__hinge(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                        pk_real *gradient)
{
    (void)c;
    if (outputs == 1) {
        double z = 1 - (double)y[0] * f[0];
        if (gradient)
            gradient[0] = z > 0 ? -y[0] : z != z ? (pk_real)z : 0;
        return z > 0 || z != z ? z : 0;
    }
    size_t k = 0;
    for (size_t j = 1; j < outputs; j++)
        if (y[j] > y[k])
            k = j;
    double own = f[k], factor = 1 / (double)outputs, sum = 0, sum_gradient = 0;
    for (size_t j = 0; j < outputs; j++) {
        double z = j == k ? 0 : 1 - own + f[j], g = z > 0 ? factor : z != z ? z : 0;
        if (z > 0 || z != z)
            sum += z;
        sum_gradient += g;
        if (gradient)
            gradient[j] = (pk_real)g;
    }
    if (gradient)
        gradient[k] = (pk_real)-sum_gradient;
    return sum / (double)outputs;
}

static double pk__l1(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                     pk_real *gradient)
{
    double sum = 0, factor = 1 / (double)outputs;
    (void)c;
    for (size_t j = 0; j < outputs; j++) {
        const double d = (double)f[j] - y[j];
        sum += fabs(d);
        if (gradient)
            gradient[j] = (pk_real)(d > 0 ? factor : d < 0 ? -factor : d); /* 0, or NaN */
    }
    return sum / (double)outputs;
}

static double pk__kl_div(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                         pk_real *gradient)
{
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        const double mass = c->log_target ? exp(y[j]) : y[j];
        if (mass != 0)
            sum += mass * ((c->log_target ? (double)y[j] : log(mass)) - f[j]);
        if (gradient)
            gradient[j] = (pk_real)-mass;
    }
    return sum;
}

static double pk__recorded(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                           pk_real *gradient)
{
    double sum = 0;
    (void)c;
    for (size_t j = 0; j < outputs; j++) {
        sum += (double)y[j] * f[j];
        if (gradient)
            gradient[j] = y[j];
    }
    return sum;
}

/* The least divisor of BCELoss's gradient: 1e-12 in single precision, for float64 as well. */
#define PK__LEAST_SPREAD ((double)1e-12f)

/* torch.nn.BCELoss on probabilities: logarithms from -100 on, and no division by less than 1e-12. */
static double pk__binary_cross_entropy(const pk_criterion *c, size_t outputs, const pk_real *f,
                                       const pk_real *y, pk_real *gradient)
{
    double sum = 0, count = (double)outputs;
    (void)c;
    for (size_t j = 0; j < outputs; j++) {
        const double p = f[j], t = y[j], spread = p * (1 - p);
        if (!(p >= 0 && p <= 1)) { /* it is not defined there */
            sum = (double)NAN;
            if (gradient)
                gradient[j] = (pk_real)NAN;
            continue;
        }
        const double yes = log(p), no = log1p(-p);
        sum -= t * (yes > -100 ? yes : -100) + (1 - t) * (no > -100 ? no : -100);
        if (gradient)
            gradient[j] = (pk_real)((p - t) / (spread > PK__LEAST_SPREAD ? spread : PK__LEAST_SPREAD) / count);
    }
    return sum / count;
}

/* ---- products with the Hessian; product may be v ------------------------------------------------------- */

static void pk__squared_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                                const pk_real *v, pk_real *product)
{
    (void)c;
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = v[j];
}

static void pk__mean_squared_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                                     const pk_real *v, pk_real *product)
{
    (void)c;
    const double factor = 2 / (double)outputs;
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = (pk_real)(factor * v[j]);
}

/* sum_k y_k (diag p - p p^T) v, from the differences to the largest output's v: small where the network is sure. */
static void pk__softmax_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                                const pk_real *v, pk_real *product)
{
    (void)c;
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    double sum = 0, total = 0, mean = 0;
    const double largest = f[top], base = v[top];
    for (size_t j = 0; j < outputs; j++) {
        const double e = j == top ? 1 : exp(f[j] - largest);
        sum += e;
        total += y[j];
        mean += e * (v[j] - base);
    }
    mean /= sum;
    for (size_t j = 0; j < outputs; j++) {
        const double p = (j == top ? 1 : exp(f[j] - largest)) / sum;
        product[j] = (pk_real)(total * p * ((v[j] - base) - mean));
    }
}

static void pk__logistic_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                                 const pk_real *v, pk_real *product)
{
    for (size_t j = 0; j < outputs; j++) {
        const double e = exp(-fabs(f[j])), tail = e / (1 + e);
        const double both = 1 + (pk__positive_weight(c, j) - 1) * y[j];
        product[j] = (pk_real)(both * tail * (1 - tail) / (double)outputs * v[j]);
    }
}

/* nll, kl_div, l1 and hinge: (piecewise) linear. */
static void pk__no_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                           const pk_real *v, pk_real *product)
{
    (void)c;
    (void)f, (void)y, (void)v;
    memset(product, 0, outputs * sizeof *product);
}

static void pk__huber_hessian(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                              const pk_real *v, pk_real *product)
{
    const double edge = pk__huber_edge(c), inside = 1 / (c->beta > 0 ? c->beta : 1) / (double)outputs;
    for (size_t j = 0; j < outputs; j++)
        product[j] = fabs((double)f[j] - y[j]) < edge ? (pk_real)(inside * v[j]) : 0;
}

/* Of the gradient as it is computed: it is linear where its divisor is 1e-12. */
static void pk__binary_cross_entropy_hessian(const pk_criterion *c, size_t outputs, const pk_real *f,
                                             const pk_real *y, const pk_real *v, pk_real *product)
{
    (void)c;
    for (size_t j = 0; j < outputs; j++) {
        const double p = f[j], t = y[j], spread = p * (1 - p);
        const double second =
            spread > PK__LEAST_SPREAD ? t / (p * p) + (1 - t) / ((1 - p) * (1 - p)) : 1 / PK__LEAST_SPREAD;
        product[j] = (pk_real)(second / (double)outputs * v[j]);
    }
}

/* ---- checks of targets: NULL, or the words for what is required ------------------------------------- */

static const char *pk__accept_any(size_t outputs, const pk_real *y)
{
    (void)outputs, (void)y;
    return NULL;
}

static const char *pk__accept_masses(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (y[j] < 0)
            return "numbers >= 0";
    return NULL;
}

static const char *pk__accept_probabilities(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (!(y[j] >= 0 && y[j] <= 1))
            return "numbers in [0, 1]";
    return NULL;
}

static const char *pk__accept_class(size_t outputs, const pk_real *y)
{
    if (outputs == 1)
        return y[0] == 1 || y[0] == -1 ? NULL : "+1 or -1";
    size_t ones = 0, zeros = 0;
    for (size_t j = 0; j < outputs; j++) {
        ones += y[j] == 1;
        zeros += y[j] == 0;
    }
    return ones == 1 && ones + zeros == outputs ? NULL : "one 1 and otherwise 0";
}

/* ---- kinks: functions of the outputs that change their sign where the gradient jumps or bends ------------- */

static void pk__l1_switches(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                            pk_real *to)
{
    (void)c;
    for (size_t j = 0; j < outputs; j++)
        to[j] = f[j] - y[j];
}

static void pk__huber_switches(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                               pk_real *to)
{
    const pk_real edge = (pk_real)pk__huber_edge(c);
    for (size_t j = 0; j < outputs; j++) {
        to[2 * j] = f[j] - y[j] - edge;
        to[2 * j + 1] = f[j] - y[j] + edge;
    }
}

static void pk__hinge_switches(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                               pk_real *to)
{
    size_t k = 0;
    (void)c;
    if (outputs == 1) {
        to[0] = 1 - y[0] * f[0];
        return;
    }
    for (size_t j = 1; j < outputs; j++)
        if (y[j] > y[k])
            k = j;
    for (size_t j = 0; j < outputs; j++)
        to[j] = j == k ? 1 : 1 - f[k] + f[j];
}

/* Where its divisor ends, in logarithms: of an output of sigmoid these are nearly straight. */
static void pk__binary_cross_entropy_switches(const pk_criterion *c, size_t outputs, const pk_real *f,
                                              const pk_real *y, pk_real *to)
{
    (void)c, (void)y;
    for (size_t j = 0; j < outputs; j++) {
        const double spread = (double)f[j] * (1 - (double)f[j]);
        to[j] = (pk_real)log((spread > 1e-300 ? spread : 1e-300) / PK__LEAST_SPREAD);
    }
}

enum {
    PK__LABEL_SMOOTHING = 1,
    PK__IGNORE_INDEX = 2,
    PK__DELTA = 4,
    PK__BETA = 8,
    PK__LOG_TARGET = 16,
    PK__WEIGHT = 32,
    PK__POS_WEIGHT = 64,
    PK__LOSS_LISTS = PK__WEIGHT | PK__POS_WEIGHT
};

typedef struct pk__loss_rule {
    pk_loss loss;
    const char *name;
    double (*evaluate)(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                       pk_real *gradient);
    void (*curvature)(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y,
                      const pk_real *v, pk_real *product);
    const char *(*accept)(size_t outputs, const pk_real *y);
    const char *domain; /* what its outputs must be, if anything */
    int classes;        /* integer targets are classes even with one output */
    unsigned options;   /* those it takes */
    int degree;         /* of the gradient as a polynomial in f, between kinks; -1: it is none */
    size_t kinks;       /* switch functions for each output, 0: the loss has no kinks */
    void (*switches)(const pk_criterion *c, size_t outputs, const pk_real *f, const pk_real *y, pk_real *to);
} pk__loss_rule;

static const pk__loss_rule pk__losses[] = {
    {.loss = PK_SQUARED,
     .name = "squared",
     .evaluate = pk__squared,
     .curvature = pk__squared_hessian,
     .accept = pk__accept_any,
     .degree = 1},
    {.loss = PK_MEAN_SQUARED,
     .name = "mean_squared",
     .evaluate = pk__mean_squared,
     .curvature = pk__mean_squared_hessian,
     .accept = pk__accept_any,
     .degree = 1},
    {.loss = PK_SOFTMAX_CROSS_ENTROPY,
     .name = "softmax_cross_entropy",
     .evaluate = pk__softmax_cross_entropy,
     .curvature = pk__softmax_hessian,
     .accept = pk__accept_masses,
     .classes = 1,
     .options = PK__LABEL_SMOOTHING | PK__IGNORE_INDEX | PK__WEIGHT,
     .degree = -1},
    {.loss = PK_LOGISTIC,
     .name = "logistic",
     .evaluate = pk__logistic,
     .curvature = pk__logistic_hessian,
     .accept = pk__accept_probabilities,
     .options = PK__POS_WEIGHT,
     .degree = -1},
    {.loss = PK_NLL,
     .name = "nll",
     .evaluate = pk__nll,
     .curvature = pk__no_hessian,
     .accept = pk__accept_masses,
     .classes = 1,
     .options = PK__IGNORE_INDEX | PK__WEIGHT},
    {.loss = PK_HUBER,
     .name = "huber",
     .evaluate = pk__huber,
     .curvature = pk__huber_hessian,
     .accept = pk__accept_any,
     .options = PK__DELTA | PK__BETA,
     .degree = 1,
     .kinks = 2,
     .switches = pk__huber_switches},
    {.loss = PK_HINGE,
     .name = "hinge",
     .evaluate = pk__hinge,
     .curvature = pk__no_hessian,
     .accept = pk__accept_class,
     .kinks = 1,
     .switches = pk__hinge_switches},
    {.loss = PK_L1,
     .name = "l1",
     .evaluate = pk__l1,
     .curvature = pk__no_hessian,
     .accept = pk__accept_any,
     .kinks = 1,
     .switches = pk__l1_switches},
    {.loss = PK_KL_DIV,
     .name = "kl_div",
     .evaluate = pk__kl_div,
     .curvature = pk__no_hessian,
     .accept = pk__accept_masses,
     .classes = 1,
     .options = PK__LOG_TARGET},
    {.loss = PK_BINARY_CROSS_ENTROPY,
     .name = "binary_cross_entropy",
     .evaluate = pk__binary_cross_entropy,
     .curvature = pk__binary_cross_entropy_hessian,
     .accept = pk__accept_probabilities,
     .domain = "binary_cross_entropy takes outputs in [0, 1], such as those of sigmoid",
     .degree = -1,
     .kinks = 1,
     .switches = pk__binary_cross_entropy_switches},
    {.loss = PK_RECORDED,
     .name = "recorded",
     .evaluate = pk__recorded,
     .curvature = pk__no_hessian,
     .accept = pk__accept_any,
     .degree = -1},
};

enum { PK__LOSSES = (int)(sizeof pk__losses / sizeof pk__losses[0]) };

PK__PRIVATE const pk__loss_rule *pk__loss_find(pk_loss loss)
{
    for (int i = 0; i < PK__LOSSES; i++)
        if (pk__losses[i].loss == loss)
            return &pk__losses[i];
    return NULL;
}

/* How many functions of the outputs change their sign where the loss has kinks, and their values at the outputs f. */
PK__PRIVATE size_t pk__criterion_kinks(const pk_criterion *c, size_t outputs)
{
    const pk__loss_rule *rule = c ? pk__loss_find(c->loss) : NULL;
    return rule ? rule->kinks * outputs : 0;
}

PK__PRIVATE void pk__criterion_switches(const pk_criterion *c, size_t outputs, const pk_real *f,
                                        const pk_real *target, pk_real *to)
{
    pk__loss_find(c->loss)->switches(c, outputs, f, target, to);
}

/* The degree of the gradient as a polynomial in the outputs, between kinks; -1: it is none. */
PK__PRIVATE int pk__criterion_degree(const pk_criterion *c)
{
    const pk__loss_rule *rule = c ? pk__loss_find(c->loss) : NULL;
    return rule ? rule->degree : -1;
}

PK_API pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss)
{
    if (!name || !loss)
        return pk__fail(context, PK_ARGUMENT, "loss: the name or the place for the loss is NULL");
    char names[192] = "";
    for (int i = 0; i < PK__LOSSES; i++) {
        if (strcmp(pk__losses[i].name, name) == 0) {
            *loss = pk__losses[i].loss;
            return PK_OK;
        }
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "",
                 pk__losses[i].name);
    }
    return pk__fail(context, PK_FORMAT, "'%.40s' is not a loss; these are: %s", name, names);
}

PK_API const char *pk_loss_name(pk_loss loss)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    return rule ? rule->name : "unknown";
}

/* A loss with PyTorch's defaults. */
PK__PRIVATE pk_criterion pk__criterion_of(pk_loss loss)
{
    pk_criterion criterion;
    memset(&criterion, 0, sizeof criterion);
    criterion.loss = loss;
    return criterion;
}

PK_API double pk_criterion_value(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                 const pk_real *target)
{
    const pk__loss_rule *rule = pk__loss_find(criterion->loss);
    return rule ? rule->evaluate(criterion, outputs, f, target, NULL) : (double)NAN;
}

PK_API void pk_criterion_gradient(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                  const pk_real *target, pk_real *gradient)
{
    const pk__loss_rule *rule = pk__loss_find(criterion->loss);
    if (rule)
        rule->evaluate(criterion, outputs, f, target, gradient);
    else
        for (size_t j = 0; j < outputs; j++)
            gradient[j] = (pk_real)NAN;
}

PK_API void pk_criterion_hessian_product(const pk_criterion *criterion, size_t outputs, const pk_real *f,
                                         const pk_real *target, const pk_real *direction, pk_real *product)
{
    const pk__loss_rule *rule = pk__loss_find(criterion->loss);
    if (rule)
        rule->curvature(criterion, outputs, f, target, direction, product);
    else
        for (size_t j = 0; j < outputs; j++)
            product[j] = (pk_real)NAN;
}

PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk_criterion_value(&criterion, outputs, f, target);
}

PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    pk_criterion_gradient(&criterion, outputs, f, target, gradient);
}

PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    pk_criterion_hessian_product(&criterion, outputs, f, target, direction, product);
}

/* ---- options ------------------------------------------------------------------------------------------ */

typedef struct pk__loss_option {
    unsigned option;
    const char *name, *asked; /* what a value must be */
} pk__loss_option;

static const pk__loss_option pk__loss_options[] = {
    {.option = PK__LABEL_SMOOTHING, .name = "label_smoothing", .asked = "in [0, 1]"},
    {.option = PK__IGNORE_INDEX, .name = "ignore_index", .asked = "a whole number"},
    {.option = PK__DELTA, .name = "delta", .asked = "finite and > 0"},
    {.option = PK__BETA, .name = "beta", .asked = "finite and > 0 (0 is the loss l1)"},
    {.option = PK__LOG_TARGET, .name = "log_target", .asked = "0 or 1"},
    {.option = PK__WEIGHT, .name = "weight", .asked = "finite and >= 0"},
    {.option = PK__POS_WEIGHT, .name = "pos_weight", .asked = "finite and >= 0"},
};

enum { PK__LOSS_OPTIONS = (int)(sizeof pk__loss_options / sizeof pk__loss_options[0]) };

/* Number i of an option; *count: how many it has, 0: it is not stated. */
static double pk__option_get(const pk_criterion *c, unsigned option, size_t i, size_t *count)
{
    const double value = option == PK__LABEL_SMOOTHING      ? c->label_smoothing
                         : option == PK__IGNORE_INDEX       ? (double)c->ignore_index
                         : option == PK__DELTA              ? c->delta
                         : option == PK__BETA               ? c->beta
                         : option == PK__LOG_TARGET         ? (double)c->log_target
                         : c->weight && i < c->weight_count ? c->weight[i]
                                                            : 0;
    *count = option == PK__IGNORE_INDEX ? c->ignores != 0
             : option & PK__LOSS_LISTS  ? (c->weight ? c->weight_count : 0)
                                        : value != 0;
    return value;
}

static int pk__option_good(unsigned option, double value)
{
    switch (option) {
    case PK__LABEL_SMOOTHING: return value >= 0 && value <= 1;
    case PK__IGNORE_INDEX: return fabs(value) < 9007199254740992.0 && floor(value) == value;
    case PK__LOG_TARGET: return value == 0 || value == 1;
    case PK__DELTA:
    case PK__BETA: return isfinite(value) && value > 0;
    default: return isfinite(value) && value >= 0;
    }
}

/* Are the options in range? Those of other losses are not read. */
static pk_status pk__criterion_options(pk_context *context, const pk__loss_rule *rule, const pk_criterion *c)
{
    for (int k = 0; k < PK__LOSS_OPTIONS; k++) {
        const pk__loss_option *option = &pk__loss_options[k];
        size_t count = 1;
        for (size_t i = 0; rule->options & option->option && i < count; i++) {
            const double value = pk__option_get(c, option->option, i, &count);
            if (count && !pk__option_good(option->option, value))
                return pk__fail(context, PK_ARGUMENT, "loss %s: %s is %.17g; it must be %s", rule->name,
                                option->name, value, option->asked);
        }
    }
    if (rule->options & PK__DELTA && c->delta != 0 && c->beta != 0)
        return pk__fail(context, PK_ARGUMENT,
                        "loss %s: delta (HuberLoss) and beta (SmoothL1Loss) exclude each other", rule->name);
    return PK_OK;
}

/* name=value or name=value,value,...: one word of `length` bytes. seen: the options before it. */
static pk_status pk__criterion_word(pk_context *context, const pk__loss_rule *rule, const char *text,
                                    size_t length, pk_criterion *c, double *numbers, unsigned *seen)
{
    const size_t name = strcspn(text, "= \t");
    const int shown = (int)pk__min(length, 40);
    const pk__loss_option *option = NULL;
    for (int k = 0; k < PK__LOSS_OPTIONS; k++)
        if (rule->options & pk__loss_options[k].option && strlen(pk__loss_options[k].name) == name &&
            strncmp(pk__loss_options[k].name, text, name) == 0)
            option = &pk__loss_options[k];
    if (!option)
        return pk__fail(context, PK_FORMAT, "loss %s: '%.*s' is not one of its options", rule->name, shown,
                        text);
    if (*seen & option->option)
        return pk__fail(context, PK_FORMAT, "loss %s: '%.*s' gives %s a second time", rule->name, shown, text,
                        option->name);
    *seen |= option->option;
    const int list = (option->option & PK__LOSS_LISTS) != 0;
    size_t at = name + 1, count = 0;
    for (int more = text[name] == '='; more; more = text[at - 1] == ',') {
        const size_t digits = list ? strcspn(text + at, ", \t") : length - at;
        double value = 0;
        if (!pk__number(text + at, digits, &value))
            break;
        if (!pk__option_good(option->option, value))
            return pk__fail(context, PK_ARGUMENT, "loss %s: %s is %.17g; it must be %s", rule->name,
                            option->name, value, option->asked);
        switch (option->option) {
        case PK__LABEL_SMOOTHING: c->label_smoothing = value; break;
        case PK__IGNORE_INDEX: c->ignores = 1, c->ignore_index = (int64_t)value; break;
        case PK__DELTA: c->delta = value; break;
        case PK__BETA: c->beta = value; break;
        case PK__LOG_TARGET: c->log_target = value != 0; break;
        default: numbers[count] = value;
        }
        count++;
        at += digits + 1;
    }
    if (!count || at != length + 1)
        return pk__fail(context, PK_FORMAT, "loss %s: '%.*s' is not %s=number%s", rule->name, shown, text,
                        option->name, list ? ",number,..." : "");
    if (list)
        c->weight = numbers, c->weight_count = count;
    return PK_OK;
}

PK_API pk_status pk_criterion_parse(pk_context *context, const char *text, pk_criterion *criterion)
{
    const char *space = " \t";
    char name[48];
    if (!text || !criterion)
        return pk__fail(context, PK_ARGUMENT, "loss: the text or the place for the loss is NULL");
    text += strspn(text, space);
    size_t length = strcspn(text, space), commas = 1;
    snprintf(name, sizeof name, "%.*s", (int)pk__min(length, sizeof name - 1), text);
    pk_criterion parsed = pk__criterion_of((pk_loss)0);
    pk_status status = pk_loss_parse(context, name, &parsed.loss);
    if (status)
        return status;
    const pk__loss_rule *rule = pk__loss_find(parsed.loss);
    double *numbers = NULL;
    for (const char *at = text; *at; at++)
        commas += *at == ',';
    if (strstr(text + length, "weight=")) /* a list, of at most that many numbers */
        status = pk_allocate(context, commas, sizeof *numbers, "the weights of the loss", &numbers);
    unsigned seen = 0;
    for (text += length, text += strspn(text, space); !status && *text;
         text += length, text += strspn(text, space)) {
        length = strcspn(text, space);
        status = pk__criterion_word(context, rule, text, length, &parsed, numbers, &seen);
    }
    if (!status)
        status = pk__criterion_options(context, rule, &parsed);
    if (status || !parsed.weight) {
        pk_release(context, numbers);
        numbers = NULL;
    }
    parsed.memory = numbers;
    if (!status)
        *criterion = parsed;
    return status;
}

PK_API void pk_criterion_release(pk_context *context, pk_criterion *criterion)
{
    if (!criterion)
        return;
    pk_release(context, criterion->memory);
    memset(criterion, 0, sizeof *criterion);
}

/* Adds to a text that is cut off at size bytes; *used: of the whole text. */
static void pk__add_text(char *text, size_t size, size_t *used, const char *more)
{
    for (size_t length = strlen(more), i = 0; i <= length; i++)
        if (*used + i < size)
            text[*used + i] = i + 1 + *used == size ? '\0' : more[i];
    *used += strlen(more);
}

PK_API size_t pk_criterion_format(const pk_criterion *criterion, char *text, size_t size)
{
    const pk__loss_rule *rule = criterion ? pk__loss_find(criterion->loss) : NULL;
    size_t used = 0;
    if (!rule)
        return 0;
    pk__add_text(text, size, &used, rule->name);
    for (int k = 0; k < PK__LOSS_OPTIONS; k++) {
        const pk__loss_option *option = &pk__loss_options[k];
        size_t count = 1;
        for (size_t i = 0; rule->options & option->option && i < count; i++) {
            char number[48];
            const double value = pk__option_get(criterion, option->option, i, &count);
            if (!count)
                break;
            pk__number_text(value, number, sizeof number);
            pk__add_text(text, size, &used, i ? "," : " ");
            pk__add_text(text, size, &used, i ? "" : option->name);
            pk__add_text(text, size, &used, i ? "" : "=");
            pk__add_text(text, size, &used, number);
        }
    }
    return used + 1;
}

/* ---- targets ------------------------------------------------------------------------------------------ */

/* Smoothing and class weights, in the masses that softmax_cross_entropy and nll take. */
static void pk__weigh_masses(const pk__loss_rule *rule, const pk_criterion *c, size_t outputs, pk_real *target)
{
    const double smoothing = rule->options & PK__LABEL_SMOOTHING ? c->label_smoothing : 0;
    const double *weight = rule->options & PK__WEIGHT ? c->weight : NULL;
    if (smoothing == 0 && !weight)
        return;
    for (size_t j = 0; j < outputs; j++) {
        const double mass = (1 - smoothing) * target[j] + smoothing / (double)outputs;
        target[j] = (pk_real)(weight ? weight[j] * mass : mass);
    }
}

static int pk__label_ignored(const pk__loss_rule *rule, const pk_criterion *c, int64_t label)
{
    return rule->options & PK__IGNORE_INDEX && c->ignores && label == c->ignore_index;
}

/* The target of one row as outputs numbers. A class out of range gives zeros. */
PK__PRIVATE void pk__loss_target(const pk_criterion *c, const pk_array *targets, size_t row, size_t outputs,
                                 pk_real *target)
{
    const pk__loss_rule *rule = pk__loss_find(c->loss);
    if (!pk__is_labels(targets)) {
        pk_array_reals(targets, row * outputs, outputs, target);
    } else {
        const int64_t label = pk__label(targets, row);
        if (outputs == 1 && !rule->classes)
            target[0] = (pk_real)label;
        else
            for (size_t j = 0; j < outputs; j++)
                target[j] = label == (int64_t)j;
        if (pk__label_ignored(rule, c, label)) {
            memset(target, 0, outputs * sizeof *target);
            return;
        }
    }
    pk__weigh_masses(rule, c, outputs, target);
}

static pk_status pk__loss_check_rows(pk_context *context, const pk__loss_rule *rule, const pk_criterion *c,
                                     const pk_array *targets, size_t outputs, pk_real *target)
{
    const int labels = pk__is_labels(targets) && (outputs > 1 || rule->classes);
    for (size_t row = 0; row < targets->shape[0]; row++) {
        if (labels) {
            const int64_t label = pk__label(targets, row);
            if ((label < 0 || (uint64_t)label >= outputs) && !pk__label_ignored(rule, c, label))
                return pk__fail(context, PK_ARGUMENT, "targets, row %zu: label %lld is not in [0, %zu)", row,
                                (long long)label, outputs);
            continue;
        }
        const pk_criterion plain = pk__criterion_of(c->loss);
        pk__loss_target(&plain, targets, row, outputs, target);
        const char *asked =
            c->log_target && rule->options & PK__LOG_TARGET ? NULL : rule->accept(outputs, target);
        if (asked)
            return pk__fail(context, PK_ARGUMENT, "targets, row %zu: %s takes %s; the row starts with %g", row,
                            rule->name, asked, (double)target[0]);
    }
    return PK_OK;
}

PK_API pk_status pk_criterion_check(pk_context *context, const pk_criterion *criterion,
                                    const pk_dataset *dataset, size_t outputs)
{
    const pk__loss_rule *rule = criterion ? pk__loss_find(criterion->loss) : NULL;
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "targets: %d is not a loss",
                        criterion ? (int)criterion->loss : 0);
    if (!dataset || outputs == 0)
        return pk__fail(context, PK_ARGUMENT, "targets: a dataset and at least one output are needed");
    pk_real *target = NULL;
    pk_status status = pk__criterion_options(context, rule, criterion);
    if (!status && rule->options & PK__LOSS_LISTS && criterion->weight && criterion->weight_count != outputs &&
        !(rule->options & PK__POS_WEIGHT && criterion->weight_count == 1))
        status =
            pk__fail(context, PK_SHAPE, "loss %s: %s has %zu numbers for %zu outputs", rule->name,
                     rule->options & PK__WEIGHT ? "weight" : "pos_weight", criterion->weight_count, outputs);
    if (!status)
        status = pk__dataset_check_targets(context, dataset, outputs);
    const int labels = !status && pk__is_labels(&dataset->targets);
    if (!status && !labels && rule->options & PK__IGNORE_INDEX && criterion->ignores)
        status =
            pk__fail(context, PK_ARGUMENT,
                     "loss %s: ignore_index is a label, and the targets are numbers, not labels", rule->name);
    if (labels && rule->options & PK__LOG_TARGET && criterion->log_target)
        status = pk__fail(context, PK_ARGUMENT,
                          "loss %s: log_target=1 takes logarithms of probabilities, and the targets are labels",
                          rule->name);
    if (!status)
        status = pk_allocate(context, outputs, sizeof *target, "one target", &target);
    if (!status)
        status = pk__loss_check_rows(context, rule, criterion, &dataset->targets, outputs, target);
    pk_release(context, target);
    return status;
}

PK_API pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset, size_t outputs)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk_criterion_check(context, &criterion, dataset, outputs);
}

PK_API void pk_criterion_targets(const pk_criterion *criterion, const pk_dataset *dataset, const int64_t *items,
                                 size_t count, size_t outputs, pk_real *targets)
{
    if (pk__loss_find(criterion->loss))
        for (size_t b = 0; b < count; b++)
            pk__loss_target(criterion, &dataset->targets, (size_t)items[b], outputs, targets + b * outputs);
}

PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    pk_criterion_targets(&criterion, dataset, items, count, outputs, targets);
}

/* Whether a mean is over weights of labels. */
PK__PRIVATE int pk__mean_is_weighted(const pk_criterion *c, const pk_array *targets)
{
    const pk__loss_rule *rule = pk__loss_find(c->loss);
    return rule && pk__is_labels(targets) &&
           ((rule->options & PK__WEIGHT && c->weight) || (rule->options & PK__IGNORE_INDEX && c->ignores));
}

PK_API void pk_criterion_mean(const pk_criterion *criterion, const pk_dataset *dataset, const int64_t *items,
                              size_t count, double *weights)
{
    const pk__loss_rule *rule = pk__loss_find(criterion->loss);
    double sum = (double)count;
    if (pk__mean_is_weighted(criterion, &dataset->targets)) {
        sum = 0;
        for (size_t b = 0; b < count; b++) {
            const int64_t label = pk__label(&dataset->targets, (size_t)items[b]);
            if (!pk__label_ignored(rule, criterion, label))
                sum += criterion->weight ? criterion->weight[label] : 1;
        }
    }
    for (size_t b = 0; b < count; b++)
        weights[b] = 1 / sum;
}

PK__END_CODE
/* <<< implementation */
#endif
