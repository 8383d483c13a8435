/* pathkernel/training/optimizer.h: update rules with their linear form for attribution, learning-rate schedules,
 * clipping.
 *
 * Semantics and defaults are PyTorch's (torch.optim.SGD, Adam, AdamW, RMSprop, Adagrad, NAdam). A rule is one row of the
 * table pk__optimizer_rules: name, keys with defaults and ranges, state vectors, update, linear form.
 *
 *     pk_optimizer optimizer;
 *     pk_status status = pk_optimizer_parse(context, "adamw beta2=0.98 weight_decay=0.1", &optimizer);
 *     pk_optimizer_update(&optimizer, step, rate, 1.0, P, w, gradient, state, update);   // then w += update
 *
 * What a rule needs to be here: given numbers that are recorded or recomputed (the moments that it divides by), its update
 * is linear in the gradients. The moments themselves are never attributed. Rules that are not linear so are Lion (the sign
 * of a mean of gradients: a step's update does not change with a single gradient until the sign does) and Muon (the mean
 * of gradients of a matrix is made orthogonal; the matrices to its left and right that do so depend on all of it, and are no
 * scaling of single numbers).
 */
#ifndef PATHKERNEL_OPTIMIZER_H
#define PATHKERNEL_OPTIMIZER_H
#include "../math/elementary.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_optimizer_kind {
    PK_SGD = 0,
    PK_ADAM,
    PK_ADAMW,
    PK_RMSPROP,
    PK_ADAGRAD,
    PK_NADAM
} pk_optimizer_kind;

/* Zeroed = plain SGD. A rule reads its own fields only. */
typedef struct pk_optimizer {
    pk_optimizer_kind kind;
    double momentum, dampening; /* sgd; momentum: rmsprop as well */
    const double *momenta; /* where a schedule moves it: the momentum, or beta1 of adam and adamw, of each step; not in the text */
    double weight_decay;        /* coupled L2, but decoupled for adamw and where decoupled_weight_decay is 1 */
    double beta1, beta2, epsilon; /* adam, adamw, nadam; epsilon: rmsprop and adagrad as well */
    int nesterov;                 /* sgd */
    int maximize;                 /* 1: gradients count with the opposite sign; decay does not */
    int amsgrad;                  /* adam, adamw: 1: divides by the largest second moment so far */
    int centered;                 /* rmsprop: 1: divides by the deviation from the mean gradient */
    int decoupled_weight_decay;   /* nadam */
    int float32_product; /* nadam: 1: its product of momenta is rounded to float, as PyTorch does by default */
    double alpha;        /* rmsprop */
    double lr_decay;     /* adagrad */
    double initial_accumulator_value; /* adagrad: the sum of squares before step 0 */
    double momentum_decay;            /* nadam */
    /* Of training that goes on from a state that an optimizer had reached (run.h, initial_state.npy); not part of the text. */
    size_t
        initial_step; /* updates made before step 0: the corrections at step s are those of update initial_step + s + 1 */
    int initial_state; /* 1: the state before step 0 is given, so that no rule of a first step applies */
} pk_optimizer;

/* PyTorch's defaults: sgd all 0; adam 0.9, 0.999, 1e-8, no decay; adamw the same with weight_decay 0.01; nadam the same as
 * adam with momentum_decay 0.004; rmsprop alpha 0.99, epsilon 1e-8; adagrad epsilon 1e-10; else 0. */
PK_API pk_optimizer pk_optimizer_default(pk_optimizer_kind kind);
PK_API pk_optimizer pk_optimizer_adam(void);
PK_API pk_optimizer pk_optimizer_adamw(void);

/* The name of a rule, such as "adamw", and of its key number index, such as "beta1"; NULL behind the last one. Rules are
 * numbered from 0 on without a gap. */
PK_API const char *pk_optimizer_name(pk_optimizer_kind kind);
PK_API const char *pk_optimizer_key(pk_optimizer_kind kind, size_t index);

/* "sgd momentum=0.9 nesterov=1": a name, then keys in any order; what is not given has PyTorch's default.
 *     sgd         momentum= dampening= nesterov=0|1 weight_decay= maximize=0|1
 *     adam, adamw beta1= beta2= epsilon= weight_decay= amsgrad=0|1 maximize=0|1
 *     rmsprop     alpha= epsilon= weight_decay= momentum= centered=0|1 maximize=0|1
 *     adagrad     lr_decay= weight_decay= initial_accumulator_value= epsilon= maximize=0|1
 *     nadam       beta1= beta2= epsilon= weight_decay= momentum_decay= decoupled_weight_decay=0|1 float32_product=0|1
 *                 maximize=0|1
 * PK_FORMAT for an unknown name or key, a duplicate key, or what is not a number; PK_ARGUMENT as
 * pk_optimizer_check. The message names the word; *optimizer is untouched then. */
PK_API PK__MUST_USE pk_status pk_optimizer_parse(pk_context *context, const char *text,
                                                 pk_optimizer *optimizer);
/* The text that pk_optimizer_parse turns into the same bits, at most size bytes with NUL (256 always do).
 * PK_ARGUMENT for an unknown kind or too small a size; text is "" then. */
PK_API PK__MUST_USE pk_status pk_optimizer_format(const pk_optimizer *optimizer, char *text, size_t size);
/* The ranges PyTorch checks: momentum, weight_decay, epsilon >= 0, betas in [0, 1), Nesterov only with
 * momentum and without dampening; all finite. PK_ARGUMENT names the key and the value. */
PK_API PK__MUST_USE pk_status pk_optimizer_check(pk_context *context, const pk_optimizer *optimizer);

/* How many vectors of P numbers the rule carries from step to step: sgd 0, with momentum 1 (the buffer),
 * adam, adamw and nadam 2 (m, then v, both uncorrected), with amsgrad 3 (the largest v so far), adagrad 1 (the sum of
 * squares), rmsprop 1 (v), then its buffer with momentum, then the mean gradient where it is centered. */
PK_API size_t pk_optimizer_state_vectors(const pk_optimizer *optimizer);
/* 1 when D_s is a function of w_s and of step s's gradient alone (plain sgd, decay included). */
PK_API int pk_optimizer_stateless(const pk_optimizer *optimizer);

/* One step: update = D_s, so that w_{s+1} = w_s + D_s, for the gradient gradient_scale * gradient.
 * step counts from 0; state (state_vectors x P) is zero before step 0 (of adagrad, too: its initial value is added at step
 * 0), or with optimizer->initial_state the one to begin with, and is carried on; NULL where there is none. weights, gradient, update: P numbers; state and update overlap nothing; update NULL: only the state is
 * wanted. Every number is computed on its own, so that a part of the P will do. The optimizer has passed
 * pk_optimizer_check. Cost: one pass; no allocation. Agrees with PyTorch to rounding; D_s is rounded
 * relative to itself and not to w_s. As in PyTorch, epsilon = 0 where v = 0 gives NaN. Where rounding makes the variance
 * of a centered rmsprop negative, it is 0 here and NaN there. NAdam's product of momenta is a tensor of PyTorch's default
 * type: float32_product = 1, unless that is float64. */
PK_API void pk_optimizer_update(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                double gradient_scale, size_t parameters, const pk_real *weights,
                                const pk_real *gradient, pk_real *state, pk_real *update);

/* D_s as a linear function of gradients. With g' = gradient_scale g + coupled w_s, and m_0 = 0 or a state to begin with:
 *     m_{s+1} = carry m_s + gain g'
 *     D_s     = - p o (enter m_{s+1} + direct g') - decoupled w_s
 * where p scales the gradients on their way into m (rmsprop with momentum):
 *     m_{s+1} = carry m_s + gain p o g'
 *     D_s     = - rate (enter m_{s+1} + direct p o g') - decoupled w_s                                   */
typedef struct pk_linear_form {
    double carry, gain, enter, direct, coupled, decoupled;
    double rate;        /* p where it is a scalar; its numerator where it is a vector */
    int preconditioned; /* p is a vector */
    int before;         /* p scales what enters m: the second form */
    int negated; /* maximize: rate (or p) and coupled are negative, and m and g' those of PyTorch times -1 */
} pk_linear_form;

/* The linear form of one step. state: as pk_optimizer_update left it after that step (NULL is allowed
 * where preconditioner is NULL or not needed). preconditioner: p, P numbers, written if the form is
 * preconditioned; NULL: only the scalars are wanted. Adam: p = lr / (1 - beta1^{s+1}) /
 * (sqrt(v_{s+1} / (1 - beta2^{s+1})) + epsilon); rmsprop and adagrad: p = rate / (sqrt(v_{s+1}) + epsilon), with momentum
 * 1 / that. */
PK_API void pk_optimizer_linear_form(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                     size_t parameters, const pk_real *state, pk_linear_form *form,
                                     pk_real *preconditioner);

/* min(1, max_norm / (|gradient|_2 + 1e-6)), the factor of torch.nn.utils.clip_grad_norm_. The norm neither
 * overflows nor underflows. NaN where the gradient holds NaN. */
PK_API double pk_clip_scale(const pk_real *gradient, size_t parameters, double max_norm);

typedef enum pk_schedule_kind {
    PK_SCHEDULE_CONSTANT = 0, /* rate */
    PK_SCHEDULE_STEP,         /* rate factor^floor(s / period)                                  StepLR */
    PK_SCHEDULE_COSINE,       /* low + (rate - low) (1 + cos(pi s / period)) / 2     CosineAnnealingLR */
    PK_SCHEDULE_TRIANGULAR,   /* low to rate in period steps and back in period_down          CyclicLR */
    PK_SCHEDULE_ARRAY,        /* rates[s] */
    PK_SCHEDULE_FUNCTION      /* function(user, s) */
} pk_schedule_kind;

/* The learning rate of each step. {0} with a rate is constant. Any kind can be warmed up linearly: it is
 * multiplied by warmup_start + (1 - warmup_start) min(s, warmup) / warmup (LinearLR, chained). */
typedef struct pk_schedule {
    pk_schedule_kind kind;
    double rate, low;
    double factor;              /* 0: 0.1, PyTorch's default */
    size_t period, period_down; /* steps; period_down 0: period */
    size_t warmup;              /* steps; 0: none */
    double warmup_start;        /* 0: 1/3, PyTorch's default */
    const double *rates;
    size_t rates_count;
    double (*function)(void *user, size_t step);
    void *user;
} pk_schedule;

/* The learning rate of a step, counted from 0; past the end of an array its last rate. The schedule has
 * passed pk_schedule_check. */
PK_API double pk_schedule_rate(const pk_schedule *schedule, size_t step);
/* Are all rates of steps 0 .. steps-1 finite and >= 0? A function is not called, only required: who calls
 * it for a step judges its rate. PK_ARGUMENT names the field or the step and its rate. */
PK_API PK__MUST_USE pk_status pk_schedule_check(pk_context *context, const pk_schedule *schedule, size_t steps);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_OPTIMIZER_IMPLEMENTED)
#define PATHKERNEL_OPTIMIZER_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- rules -------------------------------------------------------------------------------------------- */

/* Of count numbers of one step; state vectors are `apart` numbers from each other. */
typedef struct pk__update {
    size_t step;
    double rate, scale;
    size_t count, apart;
    const pk_real *weights, *gradient;
    pk_real *state, *update;
} pk__update;

/* Updates made before a step. */
static double pk__updates_before(const pk_optimizer *optimizer, size_t step)
{
    return (double)optimizer->initial_step + (double)step;
}

/* Whether the state before a step is that of an optimizer that has made no update. */
static int pk__is_first_update(const pk_optimizer *optimizer, size_t step)
{
    return step == 0 && !optimizer->initial_state;
}

static size_t pk__sgd_state_vectors(const pk_optimizer *optimizer)
{
    return optimizer->momentum != 0;
}

static void pk__sgd_update(const pk_optimizer *optimizer, const pk__update *call)
{
    double rate = call->rate, scale = call->scale, decay = optimizer->weight_decay,
           momentum = optimizer->momentum;
    const pk_real *weights = call->weights, *gradient = call->gradient;
    pk_real *buffer = call->state, *update = call->update;
    const size_t count = call->count;
    if (momentum == 0) {
        if (!update)
            return;
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            update[i] = (pk_real)(-rate * (scale * gradient[i] + decay * weights[i]));
        return;
    }
    /* PyTorch starts the buffer as the gradient itself, undampened. */
    const int first = pk__is_first_update(optimizer, call->step);
    double carry = first ? 0 : momentum, gain = first ? 1 : 1 - optimizer->dampening;
    double enter = optimizer->nesterov ? momentum : 1, direct = optimizer->nesterov ? 1 : 0;
    if (update) {
        PK__SIMD
        for (size_t i = 0; i < count; i++) {
            double g = scale * gradient[i] + decay * weights[i], m = carry * buffer[i] + gain * g;
            update[i] = (pk_real)(-rate * (direct * g + enter * m));
            buffer[i] = (pk_real)m;
        }
    } else {
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            buffer[i] = (pk_real)(carry * buffer[i] + gain * (scale * gradient[i] + decay * weights[i]));
    }
}

static void pk__sgd_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                size_t apart, const pk_real *state, pk_linear_form *form,
                                pk_real *preconditioner)
{
    (void)count, (void)apart, (void)state, (void)preconditioner;
    double momentum = optimizer->momentum;
    if (momentum != 0) {
        const int first = pk__is_first_update(optimizer, step);
        form->carry = first ? 0 : momentum;
        form->gain = first ? 1 : 1 - optimizer->dampening;
        form->enter = optimizer->nesterov ? momentum : 1;
    }
    form->direct = momentum == 0 || optimizer->nesterov ? 1 : 0;
    form->coupled = optimizer->weight_decay;
    form->rate = rate;
}

static size_t pk__adam_state_vectors(const pk_optimizer *optimizer)
{
    return optimizer->amsgrad ? 3 : 2;
}

/* Which vector of the state it divides by. */
static size_t pk__adam_moments(const pk_optimizer *optimizer)
{
    return optimizer->amsgrad ? 2 : 1;
}

/* lr / (1 - beta1^n) and 1 / sqrt(1 - beta2^n) at update n, s + 1 where there is no state to begin with. */
static void pk__adam_corrections(const pk_optimizer *optimizer, size_t step, double rate, double *size,
                                 double *spread)
{
    double count = pk__updates_before(optimizer, step) + 1;
    *size = rate / (1 - pow(optimizer->beta1, count));
    *spread = 1 / sqrt(1 - pow(optimizer->beta2, count));
}

static void pk__adam_step(const pk_optimizer *optimizer, const pk__update *call, double coupled,
                          double decoupled)
{
    double size, spread, scale = call->scale, beta2 = optimizer->beta2, epsilon = optimizer->epsilon,
                         roots[256];
    double blend = 1 - optimizer->beta1, blend2 = 1 - beta2;
    pk__adam_corrections(optimizer, call->step, call->rate, &size, &spread);
    /* torch.lerp: from the end that is nearer. */
    const double near = blend < 0.5, gain = near ? blend : blend - 1;
    for (size_t first = 0; first < call->count; first += 256) {
        const size_t count = pk__min(call->count - first, 256);
        const pk_real *weights = call->weights + first, *gradient = call->gradient + first;
        pk_real *m = call->state + first, *v = m + call->apart;
        PK__SIMD
        for (size_t i = 0; i < count; i++) {
            const double g = scale * gradient[i] + coupled * weights[i], end = near ? (double)m[i] : g;
            m[i] = (pk_real)(end + gain * (g - m[i]));
            v[i] = (pk_real)(beta2 * v[i] + blend2 * g * g);
            roots[i] = (double)v[i];
        }
        for (size_t i = 0; optimizer->amsgrad && i < count; i++) {
            pk_real *most = v + call->apart + i;
            *most = v[i] > *most || v[i] != v[i] ? v[i] : *most;
            roots[i] = (double)*most;
        }
        if (!call->update)
            continue;
        pk_real *update = call->update + first;
        pk__all_root(count, 0, roots, roots);
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            update[i] = (pk_real)(-size * m[i] / (roots[i] * spread + epsilon) - decoupled * weights[i]);
    }
}

static void pk__adam_update(const pk_optimizer *optimizer, const pk__update *call)
{
    pk__adam_step(optimizer, call, optimizer->weight_decay, 0);
}

static void pk__adamw_update(const pk_optimizer *optimizer, const pk__update *call)
{
    pk__adam_step(optimizer, call, 0, call->rate * optimizer->weight_decay);
}

static void pk__adam_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                 size_t apart, const pk_real *state, pk_linear_form *form,
                                 pk_real *preconditioner)
{
    double spread;
    const pk_real *moments = state ? state + pk__adam_moments(optimizer) * apart : NULL;
    form->carry = optimizer->beta1;
    form->gain = 1 - optimizer->beta1;
    form->enter = 1;
    form->preconditioned = 1;
    form->coupled = optimizer->kind == PK_ADAM ? optimizer->weight_decay : 0;
    form->decoupled = optimizer->kind == PK_ADAMW ? rate * optimizer->weight_decay : 0;
    pk__adam_corrections(optimizer, step, rate, &form->rate, &spread);
    if (preconditioner)
        for (size_t i = 0; i < count; i++)
            preconditioner[i] =
                (pk_real)(form->rate / (sqrt((double)moments[i]) * spread + optimizer->epsilon));
}

/* ---- rmsprop: v, then the buffer, then the mean gradient ------------------------------------------------ */

static size_t pk__rmsprop_state_vectors(const pk_optimizer *optimizer)
{
    return 1 + (optimizer->momentum != 0) + (optimizer->centered != 0);
}

/* Recorded second moments would have to be in the buffer as well, and are no variance. */
static size_t pk__rmsprop_moments(const pk_optimizer *optimizer)
{
    return optimizer->momentum != 0 || optimizer->centered ? SIZE_MAX : 0;
}

static size_t pk__rmsprop_momentum(const pk_optimizer *optimizer)
{
    return optimizer->momentum != 0 ? 1 : SIZE_MAX;
}

/* Its divisor at number i of a state. */
static double pk__rmsprop_divisor(const pk_optimizer *optimizer, const pk_real *v, const pk_real *mean)
{
    const double variance = (double)*v - (mean ? (double)*mean * *mean : 0);
    return sqrt(variance < 0 ? 0 : variance) + optimizer->epsilon;
}

static void pk__rmsprop_update(const pk_optimizer *optimizer, const pk__update *call)
{
    const double scale = call->scale, decay = optimizer->weight_decay, alpha = optimizer->alpha,
                 blend = 1 - alpha;
    const double gain = blend < 0.5 ? blend : blend - 1; /* torch.lerp: from the end that is nearer */
    pk_real *v = call->state, *buffer = optimizer->momentum != 0 ? v + call->apart : NULL;
    pk_real *mean = optimizer->centered ? v + (buffer ? 2 : 1) * call->apart : NULL;
    for (size_t i = 0; i < call->count; i++) {
        const double g = scale * call->gradient[i] + decay * call->weights[i];
        v[i] = (pk_real)(alpha * v[i] + blend * g * g);
        if (mean)
            mean[i] = (pk_real)((blend < 0.5 ? (double)mean[i] : g) + gain * (g - mean[i]));
        double step = g / pk__rmsprop_divisor(optimizer, v + i, mean ? mean + i : NULL);
        if (buffer)
            step = buffer[i] = (pk_real)(optimizer->momentum * buffer[i] + step);
        if (call->update)
            call->update[i] = (pk_real)(-call->rate * step);
    }
}

static void pk__rmsprop_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                    size_t apart, const pk_real *state, pk_linear_form *form,
                                    pk_real *preconditioner)
{
    const int buffered = optimizer->momentum != 0;
    const pk_real *mean = optimizer->centered && state ? state + (buffered ? 2 : 1) * apart : NULL;
    (void)step;
    form->before = buffered;
    form->carry = optimizer->momentum;
    form->gain = form->enter = buffered;
    form->direct = !buffered;
    form->coupled = optimizer->weight_decay;
    form->preconditioned = 1;
    form->rate = rate;
    if (preconditioner)
        for (size_t i = 0; i < count; i++)
            preconditioner[i] = (pk_real)((buffered ? 1 : rate) /
                                          pk__rmsprop_divisor(optimizer, state + i, mean ? mean + i : NULL));
}

/* ---- adagrad: the sum of squares ------------------------------------------------------------------------ */

static size_t pk__adagrad_state_vectors(const pk_optimizer *optimizer)
{
    (void)optimizer;
    return 1;
}

static size_t pk__adagrad_moments(const pk_optimizer *optimizer)
{
    (void)optimizer;
    return 0;
}

static size_t pk__adagrad_momentum(const pk_optimizer *optimizer)
{
    (void)optimizer;
    return SIZE_MAX;
}

static void pk__adagrad_update(const pk_optimizer *optimizer, const pk__update *call)
{
    const double scale = call->scale, decay = optimizer->weight_decay, epsilon = optimizer->epsilon;
    const double rate = call->rate / (1 + pk__updates_before(optimizer, call->step) * optimizer->lr_decay);
    const double initial =
        pk__is_first_update(optimizer, call->step) ? optimizer->initial_accumulator_value : 0;
    pk_real *sum = call->state;
    for (size_t i = 0; i < call->count; i++) {
        const double g = scale * call->gradient[i] + decay * call->weights[i];
        sum[i] = (pk_real)(sum[i] + initial + g * g);
        if (call->update)
            call->update[i] = (pk_real)(-rate * g / (sqrt((double)sum[i]) + epsilon));
    }
}

static void pk__adagrad_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                    size_t apart, const pk_real *state, pk_linear_form *form,
                                    pk_real *preconditioner)
{
    (void)apart;
    form->direct = 1;
    form->coupled = optimizer->weight_decay;
    form->preconditioned = 1;
    form->rate = rate / (1 + pk__updates_before(optimizer, step) * optimizer->lr_decay);
    if (preconditioner)
        for (size_t i = 0; i < count; i++)
            preconditioner[i] = (pk_real)(form->rate / (sqrt((double)state[i]) + optimizer->epsilon));
}

/* ---- nadam: m, then v ----------------------------------------------------------------------------------- */

/* mu of update number k, counted from 1. */
static double pk__nadam_momentum(const pk_optimizer *optimizer, double k)
{
    return optimizer->beta1 * (1 - 0.5 * pow(0.96, k * optimizer->momentum_decay));
}

/* mu_1 mu_2 ... mu_n. Many of them from logarithms: log(1 - q^k / 2) = - sum_j q^{jk} / (j 2^j), summed over k. */
static double pk__nadam_product(const pk_optimizer *optimizer, double n)
{
    double product = 1, sum = 0;
    if (optimizer->float32_product) {
        float rounded = 1;
        for (double k = 1; k <= n && rounded > 1e-20f; k++) /* less makes no difference */
            rounded *= (float)pk__nadam_momentum(optimizer, k);
        return (double)rounded;
    }
    if (n <= 64) {
        for (double k = 1; k <= n; k++)
            product *= pk__nadam_momentum(optimizer, k);
        return product;
    }
    const double log_q = optimizer->momentum_decay * log(0.96);
    for (double j = 1, half = 0.5; j <= 60; j++, half /= 2)
        sum -= half / j * (log_q == 0 ? n : exp(j * log_q) * expm1(j * n * log_q) / expm1(j * log_q));
    return exp(n * log(optimizer->beta1) + sum);
}

/* What m and g are multiplied with, and 1 / (1 - beta2^{s+1}). */
static void pk__nadam_factors(const pk_optimizer *optimizer, size_t step, double *enter, double *direct,
                              double *spread)
{
    const double k = pk__updates_before(optimizer, step) + 1, mu = pk__nadam_momentum(optimizer, k),
                 next = pk__nadam_momentum(optimizer, k + 1), product = pk__nadam_product(optimizer, k);
    *direct = (1 - mu) / (1 - product);
    *enter = next / (1 - product * next);
    *spread = 1 - pow(optimizer->beta2, k);
}

static void pk__nadam_update(const pk_optimizer *optimizer, const pk__update *call)
{
    const double scale = call->scale, beta2 = optimizer->beta2, blend = 1 - optimizer->beta1,
                 blend2 = 1 - beta2;
    const double coupled = optimizer->decoupled_weight_decay ? 0 : optimizer->weight_decay;
    const double decoupled = optimizer->decoupled_weight_decay ? call->rate * optimizer->weight_decay : 0;
    const double gain = blend < 0.5 ? blend : blend - 1;
    double enter, direct, spread;
    pk__nadam_factors(optimizer, call->step, &enter, &direct, &spread);
    pk_real *m = call->state, *v = m + call->apart;
    for (size_t i = 0; i < call->count; i++) {
        const double w = call->weights[i], g = scale * call->gradient[i] + coupled * w;
        m[i] = (pk_real)((blend < 0.5 ? (double)m[i] : g) + gain * (g - m[i]));
        v[i] = (pk_real)(beta2 * v[i] + blend2 * g * g);
        if (call->update)
            call->update[i] = (pk_real)(-call->rate * (direct * g + enter * m[i]) /
                                            (sqrt(v[i] / spread) + optimizer->epsilon) -
                                        decoupled * w);
    }
}

static void pk__nadam_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                  size_t apart, const pk_real *state, pk_linear_form *form,
                                  pk_real *preconditioner)
{
    double spread;
    pk__nadam_factors(optimizer, step, &form->enter, &form->direct, &spread);
    form->carry = optimizer->beta1;
    form->gain = 1 - optimizer->beta1;
    form->preconditioned = 1;
    form->coupled = optimizer->decoupled_weight_decay ? 0 : optimizer->weight_decay;
    form->decoupled = optimizer->decoupled_weight_decay ? rate * optimizer->weight_decay : 0;
    form->rate = rate;
    if (preconditioner)
        for (size_t i = 0; i < count; i++)
            preconditioner[i] = (pk_real)(rate / (sqrt(state[apart + i] / spread) + optimizer->epsilon));
}

/* At i, of as many numbers as a `number` is: one, or a vector of them. */
#define PK__BACK_STEP(number, nothing)                                    \
    number entering = rate - nothing;                                     \
    if (p)                                                                \
        entering = *(const number *)(p + i);                              \
    entering *= factor * *(const number *)(phi + i);                      \
    const number next = keep * *(number *)(state + i) + enter * entering; \
    *(number *)(state + i) = next;                                        \
    if (e)                                                                \
        *(number *)(e + i) = gain * next + direct * entering;
#define PK__DEFINE_BACK(suffix, attributes, vectors)                                                      \
    attributes static void pk__back_##suffix(size_t rows, size_t count, const pk_linear_form *form,       \
                                             double carry, const pk_real *p, const pk_real *factors,      \
                                             const pk_real *phi, size_t step, pk_real *state, pk_real *e) \
    {                                                                                                     \
        typedef vectors vector;                                                                           \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                         \
        const pk_real keep = (pk_real)carry, enter = (pk_real)form->enter, rate = (pk_real)form->rate;    \
        const pk_real gain = (pk_real)form->gain, direct = (pk_real)form->direct;                         \
        const vector zero = {0};                                                                          \
        for (size_t row = 0; row < rows; row++) {                                                         \
            const pk_real factor = factors ? factors[row] : 1;                                            \
            size_t i = 0;                                                                                 \
            for (; i + lanes <= count; i += lanes) {                                                      \
                PK__BACK_STEP(vector, zero)                                                               \
            }                                                                                             \
            for (; i < count; i++) {                                                                      \
                PK__BACK_STEP(pk_real, 0)                                                                 \
            }                                                                                             \
            p = p ? p + count : NULL;                                                                     \
            e = e ? e + count : NULL;                                                                     \
            phi += step;                                                                                  \
            state += count;                                                                               \
        }                                                                                                 \
    }
PK__FOR_PROCESSORS(PK__DEFINE_BACK)

/* state = carry state + enter p o phi, and e = gain state + direct p o phi where e is wanted, of rows x count numbers: one
 * pass, since memory bounds it. phi: factors (NULL: 1), a number a row, times rows that are `step` numbers apart (0: all the
 * same one). p NULL: the rate. Where p scales what enters m: state = carry state + enter rate phi, and
 * e = p o (gain state + direct rate phi), which is always wanted then. */
PK__PRIVATE void pk__linear_form_back(size_t rows, size_t count, const pk_linear_form *form, double carry,
                                      const pk_real *p, const pk_real *factors, const pk_real *phi, size_t step,
                                      pk_real *state, pk_real *e)
{
    const pk_real *inside = form->before ? NULL : p;
    PK__ON_PROCESSOR(pk__back, (rows, count, form, carry, inside, factors, phi, step, state, e));
    for (size_t i = 0; form->before && i < rows * count; i++)
        e[i] *= p[i];
}

typedef enum pk__range { PK__ANY, PK__NOT_NEGATIVE, PK__BELOW_ONE, PK__SWITCH } pk__range;

/* A field of pk_optimizer: a double, or an int for a switch. */
typedef struct pk__optimizer_key {
    const char *name;
    size_t offset;
    pk__range range;
    double standard; /* PyTorch's default */
} pk__optimizer_key;

enum { PK__OPTIMIZER_KEYS = 9 };

typedef struct pk__optimizer_rule {
    pk_optimizer_kind kind;
    const char *name;
    pk__optimizer_key keys[PK__OPTIMIZER_KEYS]; /* ends with a NULL name */
    size_t (*state_vectors)(const pk_optimizer *optimizer);
    /* The number of the state vector that second_moments.npy has; SIZE_MAX: it has none. NULL: never. */
    size_t (*moments)(const pk_optimizer *optimizer);
    /* The number of the state vector that m of the linear form is; SIZE_MAX: it has none. NULL: the first. */
    size_t (*momentum)(const pk_optimizer *optimizer);
    void (*update)(const pk_optimizer *optimizer, const pk__update *call);
    void (*linear_form)(const pk_optimizer *optimizer, size_t step, double rate, size_t count, size_t apart,
                        const pk_real *state, pk_linear_form *form,
                        pk_real *preconditioner); /* form is zeroed */
} pk__optimizer_rule;

#define PK__KEY(field, allowed, value)                                                               \
    {                                                                                                \
        .name = #field, .offset = offsetof(pk_optimizer, field), .range = allowed, .standard = value \
    }
static const pk__optimizer_rule pk__optimizer_rules[] = {
    {.kind = PK_SGD,
     .name = "sgd",
     .keys = {PK__KEY(momentum, PK__NOT_NEGATIVE, 0), PK__KEY(dampening, PK__ANY, 0),
              PK__KEY(nesterov, PK__SWITCH, 0), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0),
              PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__sgd_state_vectors,
     .update = pk__sgd_update,
     .linear_form = pk__sgd_linear_form},
    {.kind = PK_ADAM,
     .name = "adam",
     .keys = {PK__KEY(beta1, PK__BELOW_ONE, 0.9), PK__KEY(beta2, PK__BELOW_ONE, 0.999),
              PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0),
              PK__KEY(amsgrad, PK__SWITCH, 0), PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__adam_state_vectors,
     .moments = pk__adam_moments,
     .update = pk__adam_update,
     .linear_form = pk__adam_linear_form},
    {.kind = PK_ADAMW,
     .name = "adamw",
     .keys = {PK__KEY(beta1, PK__BELOW_ONE, 0.9), PK__KEY(beta2, PK__BELOW_ONE, 0.999),
              PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0.01),
              PK__KEY(amsgrad, PK__SWITCH, 0), PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__adam_state_vectors,
     .moments = pk__adam_moments,
     .update = pk__adamw_update,
     .linear_form = pk__adam_linear_form},
    {.kind = PK_RMSPROP,
     .name = "rmsprop",
     .keys = {PK__KEY(alpha, PK__BELOW_ONE, 0.99), PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8),
              PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0), PK__KEY(momentum, PK__NOT_NEGATIVE, 0),
              PK__KEY(centered, PK__SWITCH, 0), PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__rmsprop_state_vectors,
     .moments = pk__rmsprop_moments,
     .momentum = pk__rmsprop_momentum,
     .update = pk__rmsprop_update,
     .linear_form = pk__rmsprop_linear_form},
    {.kind = PK_ADAGRAD,
     .name = "adagrad",
     .keys = {PK__KEY(lr_decay, PK__NOT_NEGATIVE, 0), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0),
              PK__KEY(initial_accumulator_value, PK__NOT_NEGATIVE, 0),
              PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-10), PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__adagrad_state_vectors,
     .moments = pk__adagrad_moments,
     .momentum = pk__adagrad_momentum,
     .update = pk__adagrad_update,
     .linear_form = pk__adagrad_linear_form},
    {.kind = PK_NADAM,
     .name = "nadam",
     .keys = {PK__KEY(beta1, PK__BELOW_ONE, 0.9), PK__KEY(beta2, PK__BELOW_ONE, 0.999),
              PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0),
              PK__KEY(momentum_decay, PK__NOT_NEGATIVE, 4e-3), PK__KEY(decoupled_weight_decay, PK__SWITCH, 0),
              PK__KEY(float32_product, PK__SWITCH, 0), PK__KEY(maximize, PK__SWITCH, 0)},
     .state_vectors = pk__adam_state_vectors,
     .moments = pk__adam_moments,
     .update = pk__nadam_update,
     .linear_form = pk__nadam_linear_form},
};
#undef PK__KEY

static const pk__optimizer_rule *pk__optimizer_find(pk_optimizer_kind kind)
{
    for (size_t i = 0; i < sizeof pk__optimizer_rules / sizeof pk__optimizer_rules[0]; i++)
        if (pk__optimizer_rules[i].kind == kind)
            return &pk__optimizer_rules[i];
    return NULL;
}

static double pk__key_get(const pk__optimizer_key *key, const pk_optimizer *optimizer)
{
    const char *field = (const char *)optimizer + key->offset;
    double value;
    int flag;
    if (key->range != PK__SWITCH) {
        memcpy(&value, field, sizeof value);
        return value;
    }
    memcpy(&flag, field, sizeof flag);
    return flag;
}

static void pk__key_set(const pk__optimizer_key *key, pk_optimizer *optimizer, double value)
{
    char *field = (char *)optimizer + key->offset;
    int flag = value != 0;
    if (key->range == PK__SWITCH)
        memcpy(field, &flag, sizeof flag);
    else
        memcpy(field, &value, sizeof value);
}

PK_API const char *pk_optimizer_name(pk_optimizer_kind kind)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(kind);
    return rule ? rule->name : NULL;
}

PK_API const char *pk_optimizer_key(pk_optimizer_kind kind, size_t index)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(kind);
    for (size_t i = 0; rule && i < index; i++)
        if (!rule->keys[i].name)
            return NULL;
    return rule ? rule->keys[index].name : NULL;
}

PK_API pk_optimizer pk_optimizer_default(pk_optimizer_kind kind)
{
    pk_optimizer optimizer;
    memset(&optimizer, 0, sizeof optimizer);
    optimizer.kind = kind;
    const pk__optimizer_rule *rule = pk__optimizer_find(kind);
    for (const pk__optimizer_key *key = rule ? rule->keys : NULL; key && key->name; key++)
        pk__key_set(key, &optimizer, key->standard);
    return optimizer;
}

PK_API pk_optimizer pk_optimizer_adam(void)
{
    return pk_optimizer_default(PK_ADAM);
}

PK_API pk_optimizer pk_optimizer_adamw(void)
{
    return pk_optimizer_default(PK_ADAMW);
}

/* What a value of the key must be, NULL if it is. */
static const char *pk__key_refuse(const pk__optimizer_key *key, double value)
{
    switch (key->range) {
    case PK__SWITCH: return value == 0 || value == 1 ? NULL : "0 or 1";
    case PK__BELOW_ONE: return value >= 0 && value < 1 ? NULL : "in [0, 1)";
    case PK__NOT_NEGATIVE: return isfinite(value) && value >= 0 ? NULL : "finite and >= 0";
    default: return isfinite(value) ? NULL : "finite";
    }
}

PK_API pk_status pk_optimizer_check(pk_context *context, const pk_optimizer *optimizer)
{
    if (!optimizer)
        return pk__fail(context, PK_ARGUMENT, "optimizer: it is NULL");
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "optimizer: kind %d is unknown", (int)optimizer->kind);
    for (const pk__optimizer_key *key = rule->keys; key->name; key++) {
        double value = pk__key_get(key, optimizer);
        const char *asked = pk__key_refuse(key, value);
        if (asked)
            return pk__fail(context, PK_ARGUMENT, "optimizer %s: %s is %.17g; it must be %s", rule->name,
                            key->name, value, asked);
    }
    if (optimizer->kind == PK_SGD && optimizer->nesterov &&
        (optimizer->momentum == 0 || optimizer->dampening != 0))
        return pk__fail(context, PK_ARGUMENT,
                        "optimizer sgd: nesterov needs momentum > 0 and dampening 0, not %.17g and %.17g",
                        optimizer->momentum, optimizer->dampening);
    return PK_OK;
}

PK_API size_t pk_optimizer_state_vectors(const pk_optimizer *optimizer)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    return rule ? rule->state_vectors(optimizer) : 0;
}

PK_API int pk_optimizer_stateless(const pk_optimizer *optimizer)
{
    return pk_optimizer_state_vectors(optimizer) == 0;
}

/* The optimizer with the momentum that it has at a step. */
static pk_optimizer pk__optimizer_at(const pk_optimizer *optimizer, size_t step)
{
    pk_optimizer at = *optimizer;
    if (optimizer->momenta)
        at.momentum = at.beta1 = optimizer->momenta[step]; /* a rule reads one of them */
    return at;
}

PK__PRIVATE void pk__optimizer_part(const pk_optimizer *optimizer, const pk__update *call)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    const pk_optimizer at = pk__optimizer_at(optimizer, call->step);
    pk__update signed_call = *call;
    signed_call.scale = optimizer->maximize ? -call->scale : call->scale;
    if (rule)
        rule->update(&at, &signed_call);
}

/* Whether it has one number, the momentum or beta1, that a schedule can move from step to step. */
PK__PRIVATE int pk__optimizer_has_momentum(const pk_optimizer *optimizer)
{
    return optimizer->kind == PK_ADAM || optimizer->kind == PK_ADAMW ||
           ((optimizer->kind == PK_SGD || optimizer->kind == PK_RMSPROP) && optimizer->momentum != 0);
}

/* The number of the state vector that second_moments.npy has; SIZE_MAX: none. */
PK__PRIVATE size_t pk__optimizer_moments(const pk_optimizer *optimizer)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    return rule && rule->moments ? rule->moments(optimizer) : SIZE_MAX;
}

/* The number of the state vector that is m of the linear form, up to the sign of a form that is negated; SIZE_MAX: none. */
PK__PRIVATE size_t pk__optimizer_momentum(const pk_optimizer *optimizer)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    if (!rule || !rule->state_vectors(optimizer))
        return SIZE_MAX;
    return rule->momentum ? rule->momentum(optimizer) : 0;
}

/* Whether all numbers of state vector number `vector` are >= 0: of all but m, and rmsprop's mean gradient. */
PK__PRIVATE int pk__optimizer_not_negative(const pk_optimizer *optimizer, size_t vector)
{
    if (vector >= pk_optimizer_state_vectors(optimizer) || vector == pk__optimizer_momentum(optimizer))
        return 0;
    return optimizer->kind != PK_RMSPROP || vector == 0;
}

/* Whether weight decay shrinks the weights beside the gradients, instead of being a part of them. */
PK__PRIVATE int pk__optimizer_decoupled(const pk_optimizer *optimizer)
{
    return optimizer->kind == PK_ADAMW || (optimizer->kind == PK_NADAM && optimizer->decoupled_weight_decay);
}

/* Whether the gradients of a step take another way than through R = gain m: E of decompose.h is no multiple of R then. */
PK__PRIVATE int pk__form_direct(const pk_linear_form *form)
{
    return form->direct != 0 || form->before;
}

/* The factors of a form for one number, whose preconditioner is p (the rate, where there is none): of the gradients on their way
 * in, and of what comes out. With them both forms are one:
 *     m_{s+1} = carry m_s + gain inside g',     D_s = - outside (enter m_{s+1} + direct inside g') - decoupled w_s. */
PK__PRIVATE double pk__form_inside(const pk_linear_form *form, double p)
{
    return form->before ? p : 1;
}

PK__PRIVATE double pk__form_outside(const pk_linear_form *form, double p)
{
    return form->before ? form->rate : p;
}

PK_API void pk_optimizer_update(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                double gradient_scale, size_t parameters, const pk_real *weights,
                                const pk_real *gradient, pk_real *state, pk_real *update)
{
    const pk__update call = {step,    learning_rate, gradient_scale, parameters, parameters,
                             weights, gradient,      state,          update};
    pk__optimizer_part(optimizer, &call);
}

/* Of count parameters, whose state vectors are `apart` numbers from each other. */
PK__PRIVATE void pk__optimizer_form(const pk_optimizer *optimizer, size_t step, double rate, size_t count,
                                    size_t apart, const pk_real *state, pk_linear_form *form,
                                    pk_real *preconditioner)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    const pk_optimizer at = pk__optimizer_at(optimizer, step);
    memset(form, 0, sizeof *form);
    if (rule)
        rule->linear_form(&at, step, rate, count, apart, state, form, preconditioner);
    if (!optimizer->maximize)
        return;
    form->negated = 1;
    form->rate = -form->rate;
    form->coupled = -form->coupled;
    for (size_t i = 0; preconditioner && form->preconditioned && !form->before && i < count; i++)
        preconditioner[i] = -preconditioner[i];
}

PK_API void pk_optimizer_linear_form(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                     size_t parameters, const pk_real *state, pk_linear_form *form,
                                     pk_real *preconditioner)
{
    pk__optimizer_form(optimizer, step, learning_rate, parameters, parameters, state, form, preconditioner);
}

/* ---- text --------------------------------------------------------------------------------------------- */

/* key=value: one word of `length` bytes. seen: a bit a key. */
PK__PRIVATE pk_status pk__optimizer_word(pk_context *context, const pk__optimizer_rule *rule, const char *text,
                                         size_t length, pk_optimizer *parsed, unsigned *seen)
{
    size_t name = strcspn(text, "= \t");
    int shown = (int)(length < 40 ? length : 40), index = 0;
    double value = 0;
    while (rule->keys[index].name &&
           (strlen(rule->keys[index].name) != name || strncmp(rule->keys[index].name, text, name) != 0))
        index++;
    const pk__optimizer_key *key = &rule->keys[index];
    if (!key->name) {
        char names[128] = "";
        for (const pk__optimizer_key *known = rule->keys; known->name; known++)
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s",
                     known == rule->keys ? "" : ", ", known->name);
        return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' is not one of its keys: %s", rule->name,
                        shown, text, names);
    }
    if (text[name] != '=' || !pk__number(text + name + 1, length - name - 1, &value))
        return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' is not %s=number", rule->name, shown, text,
                        key->name);
    if (*seen & (1u << index))
        return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' gives %s a second time", rule->name, shown,
                        text, key->name);
    if (pk__key_refuse(key, value)) /* before a switch becomes an int */
        return pk__fail(context, PK_ARGUMENT, "optimizer %s: %s is %.17g; it must be %s", rule->name, key->name,
                        value, pk__key_refuse(key, value));
    *seen |= 1u << index;
    pk__key_set(key, parsed, value);
    return PK_OK;
}

/* " name=value", the shortest that gives the same bits back; its length. */
PK__PRIVATE size_t pk__key_text(const char *name, double value, char *text, size_t size)
{
    char number[48];
    pk__number_text(value, number, sizeof number);
    return (size_t)snprintf(text, size, " %s=%s", name, number);
}

static pk_status pk__unknown_optimizer(pk_context *context, const char *text, size_t length)
{
    const size_t count = sizeof pk__optimizer_rules / sizeof *pk__optimizer_rules;
    char names[128] = "";
    for (size_t i = 0; i < count; i++)
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s",
                 i == 0          ? ""
                 : i + 1 < count ? ", "
                                 : " or ",
                 pk__optimizer_rules[i].name);
    return pk__fail(context, PK_FORMAT, "optimizer: '%.*s' is not %s", (int)(length < 40 ? length : 40), text,
                    names);
}

PK_API pk_status pk_optimizer_parse(pk_context *context, const char *text, pk_optimizer *optimizer)
{
    const char *space = " \t";
    if (!text || !optimizer)
        return pk__fail(context, PK_ARGUMENT, "optimizer: the text or the place for the optimizer is NULL");
    text += strspn(text, space);
    size_t length = strcspn(text, space);
    const pk__optimizer_rule *rule = NULL;
    for (size_t i = 0; i < sizeof pk__optimizer_rules / sizeof pk__optimizer_rules[0]; i++)
        if (strlen(pk__optimizer_rules[i].name) == length &&
            strncmp(pk__optimizer_rules[i].name, text, length) == 0)
            rule = &pk__optimizer_rules[i];
    if (!rule)
        return pk__unknown_optimizer(context, text, length);
    pk_optimizer parsed = pk_optimizer_default(rule->kind);
    unsigned seen = 0;
    for (text += length, text += strspn(text, space); *text; text += length, text += strspn(text, space)) {
        length = strcspn(text, space);
        pk_status status = pk__optimizer_word(context, rule, text, length, &parsed, &seen);
        if (status)
            return status;
    }
    pk_status status = pk_optimizer_check(context, &parsed);
    if (!status)
        *optimizer = parsed;
    return status;
}

PK_API pk_status pk_optimizer_format(const pk_optimizer *optimizer, char *text, size_t size)
{
    if (!text || size == 0)
        return PK_ARGUMENT;
    text[0] = '\0';
    const pk__optimizer_rule *rule = optimizer ? pk__optimizer_find(optimizer->kind) : NULL;
    if (!rule)
        return PK_ARGUMENT;
    char whole[512];
    size_t used = (size_t)snprintf(whole, sizeof whole, "%s", rule->name);
    for (const pk__optimizer_key *key = rule->keys; key->name; key++) {
        double value = pk__key_get(key, optimizer);
        if (value == 0 && key->standard == 0)
            continue;
        used += pk__key_text(key->name, value, whole + used, sizeof whole - used);
    }
    if (used + 1 > size)
        return PK_ARGUMENT;
    memcpy(text, whole, used + 1);
    return PK_OK;
}

/* ---- clipping and schedules ---------------------------------------------------------------------------- */

/* sum (factor x_i)^2 in eight chains, so that the additions do not wait for each other. */
static double pk__sum_of_squares(const pk_real *x, size_t count, double factor)
{
    double chain[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++) {
            double y = factor * x[i + k];
            chain[k] += y * y;
        }
    for (; i < count; i++)
        chain[i % 8] += (factor * x[i]) * (factor * x[i]);
    return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

PK_API double pk_clip_scale(const pk_real *gradient, size_t parameters, double max_norm)
{
    double sum = pk__sum_of_squares(gradient, parameters, 1), norm = sqrt(sum);
    if (!(sum > 1e-280 && sum < 1e300)) { /* squares may have overflowed or vanished: scale by a power of 2 */
        double largest = 0;
        for (size_t i = 0; i < parameters; i++)
            if (fabs((double)gradient[i]) > largest || gradient[i] != gradient[i])
                largest = fabs((double)gradient[i]);
        int exponent = 0;
        if (largest != largest)
            return largest;
        if (largest > 0 && isfinite(largest)) {
            (void)frexp(largest, &exponent);
            exponent = exponent < -1000 ? -1000 : exponent;
            norm = ldexp(sqrt(pk__sum_of_squares(gradient, parameters, ldexp(1, -exponent))), exponent);
        }
    }
    double scale = max_norm / (norm + 1e-6);
    return scale < 1 || scale != scale ? scale : 1;
}

PK_API double pk_schedule_rate(const pk_schedule *schedule, size_t step)
{
    double s = (double)step, rate = schedule->rate, low = schedule->low, period = (double)schedule->period;
    switch (schedule->kind) {
    case PK_SCHEDULE_STEP:
        rate *= pow(schedule->factor != 0 ? schedule->factor : 0.1, floor(s / period));
        break;
    case PK_SCHEDULE_COSINE:
        rate = low + (rate - low) * (1 + cos(3.14159265358979323846 * s / period)) / 2;
        break;
    case PK_SCHEDULE_TRIANGULAR: {
        double down = schedule->period_down ? (double)schedule->period_down : period;
        double place = fmod(s, period + down);
        rate = low + (rate - low) * (place <= period ? place / period : (period + down - place) / down);
        break;
    }
    case PK_SCHEDULE_ARRAY:
        rate = schedule->rates[step < schedule->rates_count ? step : schedule->rates_count - 1];
        break;
    case PK_SCHEDULE_FUNCTION: rate = schedule->function(schedule->user, step); break;
    default: break;
    }
    if (step < schedule->warmup) {
        double start = schedule->warmup_start != 0 ? schedule->warmup_start : 1.0 / 3;
        rate *= start + (1 - start) * s / (double)schedule->warmup;
    }
    return rate;
}

PK_API pk_status pk_schedule_check(pk_context *context, const pk_schedule *schedule, size_t steps)
{
    if (!schedule)
        return pk__fail(context, PK_ARGUMENT, "schedule: it is NULL");
    pk_schedule_kind kind = schedule->kind;
    int periodic = kind == PK_SCHEDULE_STEP || kind == PK_SCHEDULE_COSINE || kind == PK_SCHEDULE_TRIANGULAR;
    if ((int)kind < (int)PK_SCHEDULE_CONSTANT || (int)kind > (int)PK_SCHEDULE_FUNCTION)
        return pk__fail(context, PK_ARGUMENT, "schedule: kind %d is unknown", (int)kind);
    if (periodic && schedule->period == 0)
        return pk__fail(context, PK_ARGUMENT, "schedule: period is 0 steps");
    if (kind == PK_SCHEDULE_ARRAY && steps && (!schedule->rates || schedule->rates_count < steps))
        return pk__fail(context, PK_ARGUMENT, "schedule: %zu rates for %zu steps",
                        schedule->rates ? schedule->rates_count : (size_t)0, steps);
    if (kind == PK_SCHEDULE_FUNCTION && !schedule->function)
        return pk__fail(context, PK_ARGUMENT, "schedule: the function is NULL");
    if (!isfinite(schedule->factor) || !isfinite(schedule->warmup_start) || schedule->factor < 0 ||
        schedule->warmup_start < 0)
        return pk__fail(context, PK_ARGUMENT, "schedule: factor %g or warmup_start %g is not finite and >= 0",
                        schedule->factor, schedule->warmup_start);
    for (size_t step = 0; kind != PK_SCHEDULE_FUNCTION && step < steps; step++) {
        double rate = pk_schedule_rate(schedule, step);
        if (!isfinite(rate) || rate < 0)
            return pk__fail(context, PK_ARGUMENT,
                            "schedule: the rate of step %zu is %g; it must be finite and >= 0", step, rate);
    }
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
