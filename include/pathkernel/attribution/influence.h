/* pathkernel/attribution/influence.h: what would have happened: the derivative of the trained network by the weight of each
 * training example, through the whole of a recorded run.
 *
 * A step maps (w, state) to (w', state'), by the gradient of its batch. For a readout h of the final weights, such as an output on a
 * test row, let lambda be dh/dw and mu dh/dstate, going back from lambda = grad h(w_S), mu = 0. For each parameter, with the linear
 * form of the step (training/optimizer.h; x is g', or p g' where p scales what enters m),
 *
 *     g' = scale g + coupled w,   v' = carry_v v + gain_v g'^2,   p = n / (sqrt(v') spread + epsilon),
 *     m' = carry m + gain x,      D = - p (enter m' + direct x) - decoupled w,      w' = w + D,
 *
 * the rule is gone through in reverse, the second moments and what divides by them included: this gives gamma, the cotangent of
 * the batch's gradient g, and what goes to w, m and v directly. Then, for each example i of the batch with weight c_i,
 *
 *     dh/dc_i += c_i < gamma, grad l_i(w) >,        lambda := lambda + (direct part) + H gamma,
 *
 * where H is the Hessian of the step's weighted loss: one Hessian-vector product for each readout and step. Where the gradient was
 * clipped, scale = max_norm / (|G| + 1e-6) depends on the gradient, too: gamma_G = scale (gamma - <gamma, G> G / (|G| (|G| + 1e-6))).
 *
 * All is exact to rounding for smooth networks; with kinks it is the derivative between them. Where v' = 0, the root has no
 * derivative: the direct part is taken, and counted. Compare Maclaurin, Duvenaud and Adams 2015; Bae, Lin, Lorraine and Grosse 2024.
 */
#ifndef PATHKERNEL_INFLUENCE_H
#define PATHKERNEL_INFLUENCE_H
#include "../training/derivatives.h"
#include "walk.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_influence_readout {
    PK_READOUT_OUTPUT = 0, /* f_c, c of the options */
    PK_READOUT_MARGIN, /* f_y - log sum of exp f_c over c other than y, y the row's label: the log odds of its class */
    PK_READOUT_LOSS,     /* the run's loss, with the row's target */
    PK_READOUT_COTANGENT /* any h, by dh/df */
} pk_influence_readout;

typedef struct pk_influence_options {
    pk_influence_readout readout;
    size_t output;            /* of PK_READOUT_OUTPUT */
    const pk_real *cotangent; /* of PK_READOUT_COTANGENT: M x C */
    /* 0: c_i is the factor of example i's loss in every objective, the weights of the others staying: to remove an example is minus the
     * derivative, to first order. 1: the weights of a batch keep their sum, so that they are a mean over what remains. */
    int renormalize;
    int by_step, hyperparameters; /* what else is computed */
} pk_influence_options;

/* M rows, N examples, S steps. The caller's arrays; those that are not asked for are NULL. */
typedef struct pk_influence {
    double *influence; /* M x N */
    double *by_step;   /* M x N x S, with by_step */
    double *
        rate_derivative; /* M x S, with hyperparameters: dh by each step's learning rate, those of groups in proportion */
    double *decay_derivative; /* M, the same: dh by the weight decay, of all parameters alike */
    double *readout;          /* M: h(w_S), but for PK_READOUT_COTANGENT; or NULL */
    size_t without_root;      /* set: parameters and steps with v' = 0 */
} pk_influence;

/* The derivatives for the rows of a data set, whose targets (as the run's) are read for the margin and the loss only. Every rule of
 * the optimizer table, parameter groups, ties, clipping and recorded second moments. Cost: M Hessian products on each step's batch, and
 * 2 M P flops an example. Memory: (2 + V) M P numbers, the states of the optimizer as far as the limit has room, and a batch's
 * gradients. PK_UNSUPPORTED names an operation without second derivatives; PK_ARGUMENT, PK_SHAPE, and what reading the run gives. After
 * an error the arrays hold parts of sums. */
PK_API PK__MUST_USE pk_status pk_influences(pk_context *context, const pk_run *run, const pk_dataset *rows,
                                            const pk_influence_options *options, pk_influence *out);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_INFLUENCE_IMPLEMENTED)
#define PATHKERNEL_INFLUENCE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__INFLUENCE_SPARE = 24, PK__INFLUENCE_EXAMPLES = 64 };
#define PK__INFLUENCE_STATES ((size_t)1 << 28) /* bytes of optimizer states, where there is no limit */

typedef struct pk__influencing {
    pk_context *context;
    const pk_run *run;
    const pk_dataset *rows;
    const pk_influence_options *options;
    pk_influence *out;
    size_t M, P, V, states; /* V: state vectors */
    pk_replay replay;
    pk__walk walk;
    pk__checkpoints checkpoints; /* of the state, by step */
    size_t stride, spare;
    pk_real *w, *other;               /* P: w_s; and on the way to a state */
    pk_real *before;                  /* V P: the state before the step; the walk's is the one after it */
    pk_real *raw;                     /* P: the batch's gradient without its scale */
    pk_real *lambda, *gamma, *curved; /* M x P, M x P, P */
    pk_real *mu;                      /* M x V x P */
    pk_real *gradients; /* examples x P: of the last part of the batch that pk__influence_walk went through */
    pk_real *products;  /* M x examples */
    double *weights, *inner; /* of a batch; M x batch: <gamma, grad l> */
} pk__influencing;

/* Where a rule's vectors stand in its state; SIZE_MAX: it has none. And how its second moments move. */
typedef struct pk__state_layout {
    size_t momentum, second, largest, mean;
    double carry, gain;
} pk__state_layout;

static pk__state_layout pk__state_layout_of(const pk_optimizer *o)
{
    pk__state_layout at = {SIZE_MAX, SIZE_MAX, SIZE_MAX, SIZE_MAX, o->beta2, 1 - o->beta2};
    switch (o->kind) {
    case PK_SGD: at.momentum = o->momentum != 0 ? 0 : SIZE_MAX; break;
    case PK_ADAM:
    case PK_ADAMW: at.largest = o->amsgrad ? 2 : SIZE_MAX; /* fall through */
    case PK_NADAM:
        at.momentum = 0;
        at.second = 1;
        break;
    case PK_RMSPROP:
        at.second = 0;
        at.momentum = o->momentum != 0 ? 1 : SIZE_MAX;
        at.mean = o->centered ? 1 + (size_t)(o->momentum != 0) : SIZE_MAX;
        at.carry = o->alpha;
        at.gain = 1 - o->alpha;
        break;
    case PK_ADAGRAD:
        at.second = 0;
        at.carry = at.gain = 1;
        break;
    }
    return at;
}

/* ---- the optimizer's states, backwards ------------------------------------------------------------------- */

/* raw and walk.gradient of step s from weights w, and the step of the walk. */
static pk_status pk__influence_walk(pk__influencing *m, size_t s, const pk_real *w)
{
    const pk_run *run = m->run;
    const size_t P = m->P;
    const double scale = pk_run_gradient_scale(run, s);
    pk_batch batch;
    pk_run_batch(run, s, &batch);
    memset(m->raw, 0, P * sizeof *m->raw);
    pk_status status = PK_OK;
    for (size_t first = 0; first < batch.count && !status; first += PK__INFLUENCE_EXAMPLES) {
        const size_t count = pk__min((size_t)PK__INFLUENCE_EXAMPLES, batch.count - first);
        const pk_batch part = {count, batch.items + first, NULL};
        status = pk_loss_gradients_with(m->context, &run->graph, &run->criterion, w, &run->train, &part, NULL,
                                        pk_matrix_view(m->gradients, count, P));
        for (size_t b = 0; b < count && !status; b++) {
            const double c = batch.weights ? batch.weights[first + b] : 1 / (double)batch.count;
            for (size_t p = 0; p < P; p++)
                m->raw[p] += (pk_real)(c * m->gradients[b * P + p]);
        }
    }
    if (status)
        return status;
    pk__groups_forget_frozen(&run->groups, m->raw);
    for (size_t p = 0; p < P; p++)
        m->walk.gradient[p] = (pk_real)(scale * m->raw[p]);
    return pk__walk_step(m->context, &m->walk, s, w);
}

/* The state before a step into the walk. */
static pk_status pk__influence_state(pk__influencing *m, size_t step)
{
    const size_t bytes = m->V * m->P * sizeof(pk_real);
    const pk_real *nearest = NULL;
    pk_status status = PK_OK;
    if (!m->V)
        return PK_OK;
    size_t from = pk__checkpoints_find(&m->checkpoints, 0, step, &nearest);
    if (nearest)
        memcpy(m->walk.state, nearest, bytes);
    else {
        memset(m->walk.state, 0, bytes);
        status = pk__walk_begin(m->context, &m->walk, NULL);
    }
    while (from < step && !status) {
        const size_t next = pk__checkpoints_next(&m->checkpoints, from, step, 1);
        for (; from < next && !status; from++) {
            status = pk_replay_weights(m->context, &m->replay, from, m->other);
            if (!status)
                status = pk__influence_walk(m, from, m->other);
        }
        pk_real *kept = status ? NULL : pk__checkpoints_add(&m->checkpoints, from);
        if (kept)
            memcpy(kept, m->walk.state, bytes);
    }
    return status;
}

/* Goes through the run once and keeps the states that are kept for good. */
static pk_status pk__influence_save(pk__influencing *m)
{
    const size_t last = m->checkpoints.fixed * m->stride;
    pk_status status = m->V ? pk__walk_begin(m->context, &m->walk, NULL) : PK_OK;
    for (size_t s = 0; s < last && !status; s++) {
        status = pk__progress(m->context, "the optimizer's states", (double)s / (double)last);
        if (!status)
            status = pk_replay_weights(m->context, &m->replay, s, m->other);
        if (!status)
            status = pk__influence_walk(m, s, m->other);
        pk_real *kept = status ? NULL : pk__checkpoints_fixed(&m->checkpoints, s + 1);
        if (kept)
            memcpy(kept, m->walk.state, m->V * m->P * sizeof *kept);
    }
    return status;
}

/* ---- one step backwards ---------------------------------------------------------------------------------- */

/* The rule of a range in reverse, for readout number r: lambda and mu become their direct parts, gamma is the cotangent of the scaled
 * gradient. form, p: of the step, but of rate 1 where the rate is 0 (unit). */
static void pk__influence_rule(pk__influencing *m, size_t r, const pk_parameter_range *range,
                               const pk_linear_form *form, double rate, const double *rates, int unit,
                               double *by_rate, double *by_decay)
{
    const pk_run *run = m->run;
    const pk_optimizer *o = pk__group_optimizer(&run->optimizer, &run->groups, range->group);
    const pk__state_layout at = pk__state_layout_of(o);
    const size_t P = m->P;
    const int adapts = at.second != SIZE_MAX, before = form->before;
    const double sign = form->negated ? -1 : 1, real_rate = unit ? 0 : 1, given = unit ? 1 : rate;
    const double numerator = before ? 1 : form->rate;
    const double own_rate = pk__group_rate(&run->groups, range->group, given, rates);
    pk_real *lambda = m->lambda + r * P, *gamma = m->gamma + r * P, *mu = m->V ? m->mu + r * m->V * P : NULL;
    const pk_real *after = m->walk.state;
#define OLD(vector) m->before[at.vector * P + i]
#define NEW(vector) after[at.vector * P + i]
    for (size_t i = range->first; i < range->first + range->count; i++) {
        const double w = m->w[i], l = lambda[i], g = m->walk.gradient[i] + form->coupled * w, p = m->walk.p[i];
        const double x = before ? p * g : g;
        const double old = at.momentum != SIZE_MAX ? sign * OLD(momentum) : 0;
        const double momentum = at.momentum != SIZE_MAX ? form->carry * old + form->gain * x : 0;
        const double q = form->enter * momentum + form->direct * x, outer = before ? form->rate : p;
        /* D = - outer q - decoupled w, outer and decoupled times the rate: 0 where it is */
        const double d_q = -real_rate * outer * l;
        double d_outer = -q * l, d_p = before ? 0 : real_rate * d_outer;
        const double d_m =
            (at.momentum != SIZE_MAX ? sign * (double)mu[at.momentum * P + i] : 0) + form->enter * d_q;
        const double d_x = form->direct * d_q + (at.momentum != SIZE_MAX ? form->gain * d_m : 0);
        double d_g = before ? p * d_x : d_x;
        *by_rate += (d_outer * outer - form->decoupled * w * l) / given;
        d_p += before ? g * d_x : 0;
        if (at.momentum != SIZE_MAX)
            mu[at.momentum * P + i] = (pk_real)(sign * form->carry * d_m);
        if (adapts) {
            const size_t divides = at.largest != SIZE_MAX ? at.largest : at.second;
            double divisor = after[divides * P + i], d_second = mu[at.second * P + i], d_mean = 0;
            if (at.mean != SIZE_MAX) {
                divisor -= (double)NEW(mean) * NEW(mean);
                d_mean = sign * (double)mu[at.mean * P + i];
            }
            double d_divisor = 0;
            if (divisor > 0)
                d_divisor = -d_p * p * (1 - o->epsilon * p / numerator) / (2 * divisor);
            else if (r == 0)
                m->out->without_root++;
            if (at.largest != SIZE_MAX) {
                d_divisor += mu[at.largest * P + i];
                const int grew = NEW(largest) > OLD(largest);
                d_second += grew ? d_divisor : 0;
                mu[at.largest * P + i] = (pk_real)(grew ? 0 : d_divisor);
            } else {
                d_second += d_divisor;
            }
            if (at.mean != SIZE_MAX) {
                d_mean -= divisor > 0 ? 2 * sign * NEW(mean) * d_divisor : 0;
                d_g += at.gain * d_mean;
                mu[at.mean * P + i] = (pk_real)(sign * at.carry * d_mean);
            }
            d_g += 2 * at.gain * g * d_second;
            mu[at.second * P + i] = (pk_real)(at.carry * d_second);
        }
        *by_decay += pk__optimizer_decoupled(o) ? -real_rate * own_rate * w * l : sign * w * d_g;
        gamma[i] = (pk_real)d_g;
        lambda[i] = (pk_real)(l + form->coupled * d_g - real_rate * form->decoupled * l);
    }
#undef OLD
#undef NEW
}

/* gamma of the scaled gradient becomes that of the batch's: times the scale, less what the norm in it takes. */
static void pk__influence_clip(pk__influencing *m, double scale)
{
    const size_t P = m->P;
    double norm = 0;
    for (size_t p = 0; p < P; p++)
        norm += (double)m->raw[p] * m->raw[p];
    norm = sqrt(norm);
    for (size_t r = 0; r < m->M; r++) {
        pk_real *gamma = m->gamma + r * P;
        double dot = 0;
        for (size_t p = 0; p < P; p++)
            dot += (double)gamma[p] * m->raw[p];
        const double along = scale < 1 && norm > 0 ? dot / (norm * (norm + 1e-6)) : 0;
        for (size_t p = 0; p < P; p++)
            gamma[p] = (pk_real)(scale * (gamma[p] - along * m->raw[p]));
    }
}

/* Adds the products with the examples' gradients. */
static pk_status pk__influence_examples(pk__influencing *m, size_t s, const pk_batch *batch)
{
    const pk_run *run = m->run;
    const size_t P = m->P, N = run->examples;
    double total = 0;
    pk_status status = PK_OK;
    for (size_t b = 0; b < batch->count; b++) {
        m->weights[b] = batch->weights ? batch->weights[b] : 1 / (double)batch->count;
        total += m->weights[b];
    }
    for (size_t first = 0; first < batch->count && !status; first += PK__INFLUENCE_EXAMPLES) {
        const size_t count = pk__min((size_t)PK__INFLUENCE_EXAMPLES, batch->count - first);
        const pk_batch part = {count, batch->items + first, NULL};
        if (count < batch->count) /* else they are there, from the walk */
            status = pk_loss_gradients_with(m->context, &run->graph, &run->criterion, m->w, &run->train, &part,
                                            NULL, pk_matrix_view(m->gradients, count, P));
        if (status)
            break;
        pk__gemm(0, 1, m->M, count, P, 1, m->gamma, P, m->gradients, P, 0, m->products, count);
        for (size_t r = 0; r < m->M; r++)
            for (size_t b = 0; b < count; b++)
                m->inner[r * batch->count + first + b] = m->products[r * count + b];
    }
    for (size_t r = 0; r < m->M && !status; r++) {
        double *inner = m->inner + r * batch->count, mean = 0;
        for (size_t b = 0; b < batch->count; b++)
            mean += m->weights[b] * inner[b] / total;
        for (size_t b = 0; b < batch->count; b++) {
            const double share =
                m->weights[b] * (inner[b] - (m->options->renormalize && total != 0 ? mean : 0));
            const size_t cell = r * N + (size_t)batch->items[b];
            m->out->influence[cell] += share;
            if (m->options->by_step)
                m->out->by_step[cell * run->steps + s] += share;
        }
    }
    return status;
}

static pk_status pk__influence_step(pk__influencing *m, size_t s)
{
    const pk_run *run = m->run;
    const size_t P = m->P;
    const double rate = run->learning_rates[s], *rates = pk_run_group_rates(run, s);
    pk_batch batch;
    pk_run_batch(run, s, &batch);
    pk_status status = pk__influence_state(m, s);
    if (!status)
        status = pk_replay_weights(m->context, &m->replay, s, m->w);
    if (status)
        return status;
    if (m->V)
        memcpy(m->before, m->walk.state, m->V * P * sizeof *m->before);
    status = pk__influence_walk(m, s, m->w);
    const int unit = rate == 0;
    for (size_t r = 0; r < m->walk.range_count && !status; r++) {
        const pk_parameter_range *range = &m->walk.range[r];
        pk_linear_form form = m->walk.forms[range->group];
        if (unit)
            pk__group_form(&run->optimizer, &run->groups, range->group, s, 1, rates, range->count, P,
                           m->walk.state ? m->walk.state + range->first : NULL, &form,
                           m->walk.p + range->first);
        for (size_t h = 0; h < m->M; h++) {
            double by_rate = 0, by_decay = 0;
            if (pk__group_frozen(&run->groups, range->group))
                memset(m->gamma + h * P + range->first, 0, range->count * sizeof *m->gamma);
            else
                pk__influence_rule(m, h, range, &form, rate, rates, unit, &by_rate, &by_decay);
            if (m->options->hyperparameters) {
                m->out->rate_derivative[h * run->steps + s] += by_rate;
                m->out->decay_derivative[h] += by_decay;
            }
        }
    }
    if (status)
        return status;
    pk__influence_clip(m, pk_run_gradient_scale(run, s));
    status = pk__influence_examples(m, s, &batch);
    for (size_t h = 0; h < m->M && s && !status; h++) {
        status = pk_hessian_product_with(m->context, &run->graph, &run->criterion, m->w, &run->train, &batch,
                                         m->gamma + h * P, m->curved);
        for (size_t p = 0; p < P && !status; p++)
            m->lambda[h * P + p] += m->curved[p];
    }
    return status;
}

/* ---- readouts -------------------------------------------------------------------------------------------- */

/* lambda = grad h(w_S), and the readouts. f: M x C outputs, which become cotangents. */
static pk_status pk__influence_begin(pk__influencing *m, pk_matrix inputs, pk_real *f, int64_t *items)
{
    const pk_run *run = m->run;
    const size_t C = run->outputs;
    const pk_matrix none = {NULL, 0, 0, 0}, lambda = pk_matrix_view(m->lambda, m->M, m->P);
    double *readout = m->out->readout;
    pk_status status = pk_replay_weights(m->context, &m->replay, run->steps, m->w);
    if (!status && m->options->readout == PK_READOUT_LOSS) {
        const pk_batch all = {m->M, items, NULL};
        for (size_t r = 0; r < m->M; r++)
            items[r] = (int64_t)r;
        return pk_loss_gradients_with(m->context, &run->graph, &run->criterion, m->w, m->rows, &all, readout,
                                      lambda);
    }
    if (!status && m->options->readout != PK_READOUT_COTANGENT)
        status = pk_graph_evaluate(m->context, &run->graph, m->w, inputs, pk_matrix_view(f, m->M, C));
    for (size_t r = 0; r < m->M && !status; r++) {
        pk_real *row = f + r * C;
        int64_t label = (int64_t)m->options->output;
        double most = -INFINITY, sum = 0;
        if (m->options->readout == PK_READOUT_COTANGENT) {
            memcpy(row, m->options->cotangent + r * C, C * sizeof *row);
            continue;
        }
        if (m->options->readout == PK_READOUT_MARGIN)
            pk_array_integers(&m->rows->targets, r, 1, &label);
        const double own = row[label];
        for (size_t c = 0; c < C; c++)
            most = (int64_t)c != label ? fmax(most, (double)row[c]) : most;
        for (size_t c = 0; c < C; c++)
            sum += (int64_t)c != label ? exp((double)row[c] - most) : 0;
        const int margin = m->options->readout == PK_READOUT_MARGIN;
        if (readout)
            readout[r] = own - (margin ? most + log(sum) : 0);
        for (size_t c = 0; c < C; c++)
            row[c] = (pk_real)((int64_t)c == label ? 1 : margin ? -exp((double)row[c] - most) / sum : 0);
    }
    return status ? status
                  : pk_vjp(m->context, &run->graph, m->w, inputs, pk_matrix_view(f, m->M, C), lambda, none);
}

static pk_status pk__influence_run(pk__influencing *m, pk_matrix inputs, pk_real *f, int64_t *items)
{
    const pk_run *run = m->run;
    const size_t M = m->M, N = run->examples, S = run->steps;
    pk_influence *out = m->out;
    out->without_root = 0;
    memset(out->influence, 0, M * N * sizeof(double));
    if (m->options->by_step)
        memset(out->by_step, 0, M * N * S * sizeof(double));
    if (m->options->hyperparameters) {
        memset(out->rate_derivative, 0, M * S * sizeof(double));
        memset(out->decay_derivative, 0, M * sizeof(double));
    }
    pk_status status = pk__influence_begin(m, inputs, f, items);
    if (!status)
        status = pk__influence_save(m);
    for (size_t s = S; s-- > 0 && !status;) {
        status = pk__progress(m->context, "influence", (double)(S - 1 - s) / (double)S);
        if (!status)
            status = pk__influence_step(m, s);
    }
    return status;
}

/* ---- memory, arguments ----------------------------------------------------------------------------------- */

static void pk__influence_take(pk__arena *arena, pk__influencing *m, size_t largest, pk_real **inputs,
                               pk_real **f, int64_t **items)
{
    const pk_run *run = m->run;
    const size_t P = m->P, real = sizeof(pk_real);
    size_t cotangents = 0, numbers = 0;
    if (!pk__multiply(m->M, P, &cotangents) || !pk__multiply(cotangents, pk__max(m->V, (size_t)1), &numbers))
        arena->overflow = 1;
    pk__walk_take(arena, run, &m->walk);
    m->w = pk__arena_take(arena, P, real);
    m->other = pk__arena_take(arena, P, real);
    m->raw = pk__arena_take(arena, P, real);
    m->curved = pk__arena_take(arena, P, real);
    m->before = pk__arena_take(arena, P, m->V * real);
    m->lambda = pk__arena_take(arena, cotangents, real);
    m->gamma = pk__arena_take(arena, cotangents, real);
    m->mu = pk__arena_take(arena, m->V ? numbers : 0, real);
    m->gradients = pk__arena_take(arena, pk__min(largest, (size_t)PK__INFLUENCE_EXAMPLES), P * real);
    m->products = pk__arena_take(arena, m->M, PK__INFLUENCE_EXAMPLES * real);
    m->weights = pk__arena_take(arena, largest, sizeof(double));
    m->inner = pk__arena_take(arena, m->M, largest * sizeof(double));
    *inputs = pk__arena_take(arena, m->M, run->graph.input_width * real);
    *f = pk__arena_take(arena, m->M, run->outputs * real);
    *items = pk__arena_take(arena, m->M, sizeof **items);
    pk__checkpoints_take(arena, run->steps, m->stride, m->spare, m->V * P, &m->checkpoints);
}

/* Every state where there is room, else some for good and some that move. */
static void pk__influence_plan(pk__influencing *m)
{
    const size_t S = m->run->steps, one = m->V * m->P * sizeof(pk_real);
    const size_t limit = m->context ? m->context->memory_limit : 0,
                 room = limit ? (limit - pk__min(limit, m->context->memory_used)) / 4 : PK__INFLUENCE_STATES;
    m->stride = m->V && S ? 1 : 0;
    m->spare = 0;
    if (!m->V || one * S <= room)
        return;
    const size_t fit = pk__max(room / one, (size_t)4);
    m->spare = pk__min((size_t)PK__INFLUENCE_SPARE, fit / 2);
    m->stride = pk__blocks(S, pk__max(fit - m->spare, (size_t)1));
}

static pk_status pk__influence_check(pk_context *context, const pk_run *run, const pk_dataset *rows,
                                     const pk_influence_options *options, const pk_influence *out)
{
    if (!run || !run->weights.data || !rows || !rows->inputs.data || !options || !out || !out->influence ||
        (options->by_step && !out->by_step) ||
        (options->hyperparameters && (!out->rate_derivative || !out->decay_derivative)) ||
        (options->readout == PK_READOUT_COTANGENT && !options->cotangent))
        return pk__fail(context, PK_ARGUMENT,
                        "influence: the run, the rows or an array of the result is missing");
    pk_status status = pk_run_check_inputs(context, run, &rows->inputs, "influence, rows");
    if (!status && options->readout == PK_READOUT_OUTPUT && options->output >= run->outputs)
        status = pk__fail(context, PK_ARGUMENT, "influence: output %zu; the network has the outputs 0 to %zu",
                          options->output, run->outputs - 1);
    if (!status && options->readout == PK_READOUT_LOSS)
        status = pk_criterion_check(context, &run->criterion, rows, run->outputs);
    if (status || options->readout != PK_READOUT_MARGIN)
        return status;
    if (run->outputs < 2)
        return pk__fail(context, PK_ARGUMENT, "influence: the margin takes two outputs; the network has one");
    if (rows->targets.rank != 1 || rows->targets.shape[0] != rows->inputs.shape[0] ||
        rows->targets.type == PK_FLOAT32 || rows->targets.type == PK_FLOAT64)
        return pk__fail(context, PK_SHAPE, "influence: the margin takes an integer label for each of %zu rows",
                        rows->inputs.shape[0]);
    for (size_t r = 0; r < rows->inputs.shape[0]; r++) {
        int64_t label = 0;
        pk_array_integers(&rows->targets, r, 1, &label);
        if (label < 0 || (uint64_t)label >= run->outputs)
            return pk__fail(context, PK_ARGUMENT,
                            "influence: the label of row %zu is %lld; the outputs are 0 to %zu", r,
                            (long long)label, run->outputs - 1);
    }
    return PK_OK;
}

PK_API pk_status pk_influences(pk_context *context, const pk_run *run, const pk_dataset *rows,
                               const pk_influence_options *options, pk_influence *out)
{
    pk__influencing m = {.context = context, .run = run, .rows = rows, .options = options, .out = out};
    pk_real *inputs = NULL, *f = NULL;
    int64_t *items = NULL;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status = pk__influence_check(context, run, rows, options, out);
    if (status)
        return status;
    const size_t largest = pk__max(pk__largest_batch(run), (size_t)1);
    m.M = rows->inputs.shape[0];
    m.P = run->parameters;
    m.V = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    pk__influence_plan(&m);
    do
        pk__influence_take(&arena, &m, largest, &inputs, &f, &items);
    while (pk__arena_again(context, &arena, "influence", &status));
    if (!status)
        status = pk_replay_prepare(context, run, 0, &m.replay);
    if (!status)
        status = pk_array_read(context, &rows->inputs, 0, m.M * run->graph.input_width, inputs);
    if (!status)
        status = pk__influence_run(&m, pk_matrix_view(inputs, m.M, run->graph.input_width), f, items);
    pk_replay_release(context, &m.replay);
    pk_release(context, arena.base);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
