/* pathkernel/attribution/sensitivity.h: how the attribution of a prediction moves with its input.
 *
 *     S(x) = dA(x, i)/dx   (N x D),       A(x, i): the contribution of example i to output c, as in decompose.h.
 *
 * A is linear in Phi_s(x), the gradient integrated along each step, and the examples' gradients do not depend on x:
 * S is A with dPhi_s/dx in place of Phi_s, and closes as it does:
 *     sum_i S_i + d decay/dx + d inherited/dx + d unattributed/dx + closure = grad_x f_c(w_S, x) - grad_x f_c(w_0, x).
 *
 * dPhi_s/dx (phi.h) is the integral of the mixed derivative d2 f / dx dw, plus a term for each kink inside the step,
 * where the gradient jumps at a place that itself moves with x. What is exact where:
 *   - smooth networks: to rounding, by Gauss-Legendre of as many nodes as it takes;
 *   - piecewise-linear networks: to rounding, for every x that is on no kink of w_0 .. w_S. A itself is continuous in x, but S
 *     jumps where a kink enters or leaves the path at w_0 or w_S. A kink that touches a step without crossing it (dz/dt = 0)
 *     moves infinitely fast; it is counted in `unresolved`, as are several kinks at one place that move differently, and
 *     the closure says what that costs;
 *   - networks with smooth parts below kinks: as well as the kinks are found, which the closure measures.
 * An optimizer with a state runs in reverse time, as in decompose.h, with D rows in place of the outputs.
 *
 * The singular values of S say in how many directions of the input the attribution moves. (A published signal dimension,
 * OpenReview gZRfDWLlGY, leaves out the derivative of Phi.)
 */
#ifndef PATHKERNEL_SENSITIVITY_H
#define PATHKERNEL_SENSITIVITY_H
#include "../features/phi.h"
#include "decomposition.h"
#include "walk.h"

/* >>> declarations */
PK__BEGIN_C

typedef struct pk_sensitivity_options {
    size_t output;         /* c */
    int by_step, by_layer; /* 1: keep these sums, too */
    double
        tolerance; /* of the closure, relative to the largest number of S and of the gradients; 0: 1e-9, in float 1e-2 */
} pk_sensitivity_options;

typedef struct pk_sensitivity {
    size_t examples, inputs, steps, layers; /* N, D, S, L */
    double *by_example;                     /* N x D: S(x) */
    double *by_step;  /* S x N x D: by the step at which the example's gradient was taken, or NULL */
    double *by_layer; /* L x N x D, or NULL */
    /* D each: the gradients at w_0 and w_S, the sum over the examples, and what else there is: */
    double *initial, *final, *data, *decay, *inherited, *unattributed, *closure;
    double worst_closure; /* the largest |closure| / scale */
    double scale;         /* the largest of |S|, |initial|, |final| */
    size_t points;        /* quadrature nodes */
    size_t kinks,
        unresolved; /* inside the steps; of these, where the jump's place is not known to move in one way */
    size_t refused; /* pieces accepted although more nodes still changed them */
} pk_sensitivity;

/* Of one row x (1 x D) of inputs. *out is zeroed first; release it also after PK_NOT_CLOSED: computed, but the closure exceeds
 * the tolerance. Cost a step: D products of second order at each node, and 2 D P flops an example of the batch. Memory: the
 * results, about 6 D P numbers, B P for a batch of B (at most 64 at a time), and, for optimizers that divide by moments of the gradients, P a
 * step for their preconditioners. PK_UNSUPPORTED: inputs that are tokens; operations without second derivatives, as pk_hessian_product;
 * surrogate gradients. PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE, PK_CANCELLED; *out has no
 * arrays then. */
PK_API PK__MUST_USE pk_status pk_sensitivity_at(pk_context *context, const pk_run *run, pk_matrix input,
                                                const pk_sensitivity_options *options, pk_sensitivity *out);
PK_API void pk_sensitivity_release(pk_context *context, pk_sensitivity *sensitivity);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SENSITIVITY_IMPLEMENTED)
#define PATHKERNEL_SENSITIVITY_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__SENSITIVITY_ROWS = 64 }; /* examples whose gradients are in memory at one time */

typedef struct pk__sensing {
    pk_context *context;
    const pk_run *run;
    const pk_sensitivity_options *options;
    pk_sensitivity *out;
    pk__walk walk;
    pk__step_integral phi;
    pk_replay replay;
    pk_gradient_workspace workspace;
    pk_matrix input;
    pk_real *w, *next;        /* P */
    double *integral;         /* (D + 1) x P: dPhi_s/dx, and behind it Phi_s */
    double *state;            /* D x P: R_s */
    pk_real *left;            /* D x P: E_s */
    pk_real *gradients;       /* PK__SENSITIVITY_ROWS x P */
    pk_real *products;        /* D x PK__SENSITIVITY_ROWS */
    pk_real *preconditioners; /* S x P, or NULL: p is the rate */
    pk_linear_form *forms;    /* (S + 1) x (1 + groups) */
    double *inherited;        /* P: m before step 0, of a run that begins with a state; or NULL */
    int64_t *items;           /* of a block of the batch */
    size_t *column;           /* of each tensor */
    size_t block_count;
    double *total; /* D: sum_s dPhi_s/dx D_s */
} pk__sensing;

static void pk__sensing_take(pk__arena *arena, pk__sensing *m)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters, D = run->graph.input_width, S = run->steps, real = sizeof(pk_real);
    size_t all = 0, wide = 0;
    if (!pk__multiply(D + 1, P, &all) || all > SIZE_MAX / 64 || !pk__multiply(S, P, &wide))
        arena->overflow = 1;
    pk__walk_take(arena, run, &m->walk);
    pk__step_integral_take(arena, 1, &m->phi);
    m->w = pk__arena_take(arena, P, real);
    m->next = pk__arena_take(arena, P, real);
    m->integral = pk__arena_take(arena, all, sizeof(double));
    m->state = pk__arena_take(arena, D * P, sizeof(double));
    m->left = pk__arena_take(arena, D * P, real);
    m->gradients = pk__arena_take(arena, PK__SENSITIVITY_ROWS, P * real);
    m->products = pk__arena_take(arena, PK__SENSITIVITY_ROWS, D * real);
    m->preconditioners = pk__arena_take(arena, pk__walk_adapts(run) ? wide : 0, real);
    m->forms = pk__arena_take(arena, S + 1, (1 + run->groups.count) * sizeof *m->forms);
    m->inherited = run->initial_state.data ? pk__arena_take(arena, P, sizeof(double)) : NULL;
    m->items = pk__arena_take(arena, PK__SENSITIVITY_ROWS, sizeof *m->items);
    m->total = pk__arena_take(arena, D, sizeof(double));
}

/* Forward: the linear forms of all steps, and, where the optimizer is adaptive, their preconditioners. */
static pk_status pk__sensing_forms(pk__sensing *m)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters, count = 1 + run->groups.count;
    pk_status status = pk__walk_begin(m->context, &m->walk, m->inherited);
    for (size_t s = 0; s < run->steps && !status; s++) {
        if (pk__walk_adapts(run)) {
            pk_batch batch;
            pk_run_batch(run, s, &batch);
            status = pk__progress(m->context, "sensitivity", 0.3 * (double)s / (double)run->steps);
            if (!status)
                status = pk_replay_weights(m->context, &m->replay, s, m->w);
            if (!status)
                status = pk_batch_gradient_with(m->context, &run->graph, &run->criterion, m->w, &run->train,
                                                &batch, &m->workspace, NULL, m->walk.gradient);
            for (size_t p = 0; p < P; p++)
                m->walk.gradient[p] *= (pk_real)pk_run_gradient_scale(run, s);
        }
        if (!status)
            status = pk__walk_step(m->context, &m->walk, s, m->w);
        memcpy(m->forms + s * count, m->walk.forms, count * sizeof *m->forms);
        if (!status && pk__walk_adapts(run))
            memcpy(m->preconditioners + s * P, m->walk.p, P * sizeof *m->preconditioners);
    }
    return status;
}

/* Computes R_s and E_s of step s, and the parts of decay and of D_s. */
static void pk__sensing_back(pk__sensing *m, size_t s)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters, D = m->out->inputs, count = 1 + run->groups.count;
    const pk_linear_form *here = m->forms + s * count, *after = here + count;
    for (size_t r = 0; r < m->walk.range_count; r++) {
        const pk_parameter_range *range = &m->walk.range[r];
        const pk_linear_form *form = &here[range->group];
        /* Step S has no form: R_S = 0, whatever carries it. */
        const double carry = s + 1 < run->steps ? after[range->group].carry : 0;
        for (size_t d = 0; d < D; d++)
            for (size_t p = range->first; p < range->first + range->count; p++) {
                const double scale = m->preconditioners ? (double)m->preconditioners[s * P + p] : form->rate;
                const double inside = pk__form_inside(form, scale), outside = pk__form_outside(form, scale);
                const double moved = m->integral[d * P + p], step = (double)m->next[p] - m->w[p];
                double *state = &m->state[d * P + p];
                *state = carry * *state + form->enter * outside * moved;
                const double effective = inside * (form->gain * *state + form->direct * outside * moved);
                m->left[d * P + p] = (pk_real)effective;
                m->out->decay[d] -= (form->coupled * effective + form->decoupled * moved) * m->w[p];
                m->total[d] += moved * step;
            }
    }
}

/* Adds the part of the state that the run begins with: it enters m_1 as carry_0 m_0, and from there all later steps, through R_0. */
static void pk__sensing_inherited(pk__sensing *m)
{
    const size_t P = m->run->parameters;
    for (size_t r = 0; m->inherited && m->run->steps && r < m->walk.range_count; r++) {
        const pk_parameter_range *range = &m->walk.range[r];
        for (size_t d = 0; d < m->out->inputs; d++)
            for (size_t p = range->first; p < range->first + range->count; p++)
                m->out->inherited[d] -= m->forms[range->group].carry * m->state[d * P + p] * m->inherited[p];
    }
}

/* The examples of a step. */
static pk_status pk__sensing_batch(pk__sensing *m, size_t s)
{
    const pk_run *run = m->run;
    pk_sensitivity *out = m->out;
    const size_t P = run->parameters, D = out->inputs, N = out->examples;
    const double clip = pk_run_gradient_scale(run, s);
    pk_batch batch;
    pk_run_batch(run, s, &batch);
    for (size_t first = 0; first < batch.count; first += PK__SENSITIVITY_ROWS) {
        const size_t count = pk__min(batch.count - first, PK__SENSITIVITY_ROWS);
        const pk_batch part = {count, batch.items + first, NULL};
        pk_status status = pk_loss_gradients_with(m->context, &run->graph, &run->criterion, m->w, &run->train,
                                                  &part, NULL, pk_matrix_view(m->gradients, count, P));
        if (status)
            return status;
        /* All tensors at once or, by layer, one after the other. */
        for (size_t b = 0; b < (m->options->by_layer ? m->block_count : 1); b++) {
            const size_t offset = m->options->by_layer ? run->graph.blocks[b].first : 0;
            const size_t width = m->options->by_layer ? run->graph.blocks[b].count : P;
            double *layer =
                m->options->by_layer ? out->by_layer + (size_t)run->graph.blocks[b].column * N * D : NULL;
            pk__gemm(0, 1, D, count, width, 1, m->left + offset, P, m->gradients + offset, P, 0, m->products,
                     count);
            for (size_t i = 0; i < count; i++) {
                const size_t item = (size_t)batch.items[first + i];
                const double c = batch.weights ? batch.weights[first + i] : 1 / (double)batch.count;
                for (size_t d = 0; d < D; d++) {
                    const double part_of = -clip * c * m->products[d * count + i];
                    out->by_example[item * D + d] += part_of;
                    if (out->by_step)
                        out->by_step[(s * N + item) * D + d] += part_of;
                    if (layer)
                        layer[item * D + d] += part_of;
                }
            }
        }
    }
    return PK_OK;
}

/* grad_x f_c at weights. */
static pk_status pk__sensing_gradient(pk__sensing *m, const pk_real *w, double *to)
{
    const pk_graph *graph = &m->run->graph;
    const size_t D = m->out->inputs;
    /* Cotangents and result are arrays that other functions use later. */
    pk_status status =
        pk_vjp(m->context, graph, w, m->input, pk_matrix_view(m->phi.seeds, 1, graph->output_width),
               pk__no_matrix(), pk_matrix_view(m->products, 1, D));
    for (size_t d = 0; d < D && !status; d++)
        to[d] = m->products[d];
    return status;
}

static pk_status pk__sensing_run(pk__sensing *m)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters;
    pk_status status = pk__sensing_forms(m);
    if (!status)
        status = pk_replay_weights(m->context, &m->replay, run->steps, m->next);
    m->phi.output = m->options->output;
    m->phi.seeds[m->phi.output] = 1;
    if (!status)
        status = pk__sensing_gradient(m, m->next, m->out->final);
    for (size_t s = run->steps; s-- > 0 && !status;) {
        status = pk__progress(m->context, "sensitivity", 1 - 0.7 * (double)(s + 1) / (double)run->steps);
        if (!status)
            status = pk_replay_weights(m->context, &m->replay, s, m->w);
        if (!status)
            status = pk__step_integral_run(&m->phi, m->w, m->next, m->input, m->integral);
        if (status)
            break;
        pk__sensing_back(m, s);
        status = pk__sensing_batch(m, s);
        memcpy(m->next, m->w, P * sizeof *m->next);
    }
    if (!status)
        pk__sensing_inherited(m);
    return status ? status : pk__sensing_gradient(m, m->next, m->out->initial);
}

/* Computes the unattributed part and the closure, and judges the closure. */
static pk_status pk__sensing_finish(pk__sensing *m)
{
    pk_sensitivity *out = m->out;
    const double given = m->options->tolerance;
    const double tolerance = given > 0 ? given : sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-9;
    for (size_t i = 0; i < out->examples * out->inputs; i++) {
        out->data[i % out->inputs] += out->by_example[i];
        out->scale = fmax(out->scale, fabs(out->by_example[i]));
    }
    double worst = 0;
    for (size_t d = 0; d < out->inputs; d++) {
        out->unattributed[d] = m->total[d] - out->data[d] - out->decay[d] - out->inherited[d];
        out->closure[d] = out->final[d] - out->initial[d] - m->total[d];
        worst = pk__worse(fabs(out->closure[d]), worst) ? fabs(out->closure[d]) : worst;
        out->scale = fmax(out->scale, fmax(fabs(out->initial[d]), fabs(out->final[d])));
    }
    out->worst_closure = worst > 0 ? worst / out->scale : worst;
    out->points = m->phi.points;
    out->kinks = m->phi.kinks;
    out->unresolved = m->phi.unresolved;
    out->refused = m->phi.refused;
    if (!(out->worst_closure <= tolerance))
        return pk__fail(
            m->context, PK_NOT_CLOSED,
            "sensitivity: the derivatives miss that of the output by %.3g of the largest of them, more "
            "than %.3g; %zu of %zu kinks are not resolved",
            out->worst_closure, tolerance, out->unresolved, out->kinks);
    return PK_OK;
}

static pk_status pk__sensing_results(pk_context *context, const pk_sensitivity_options *options,
                                     pk_sensitivity *out)
{
    const size_t D = out->inputs;
    size_t matrix = 0;
    pk_status status;
    double **const vectors[] = {&out->initial,   &out->final,        &out->data,   &out->decay,
                                &out->inherited, &out->unattributed, &out->closure};
    pk__arena arena = {NULL, 0, 0, !pk__multiply(out->examples, D * sizeof(double), &matrix)};
    do {
        out->by_example = pk__arena_take(&arena, 1, matrix); /* never empty, so that it begins the memory */
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
            *vectors[i] = pk__arena_take(&arena, D, sizeof(double));
        out->by_step = pk__arena_take(&arena, options->by_step ? out->steps : 0, matrix);
        out->by_layer = pk__arena_take(&arena, options->by_layer ? out->layers : 0, matrix);
    } while (pk__arena_again(context, &arena, "the sensitivity's results", &status));
    return status;
}

PK_API void pk_sensitivity_release(pk_context *context, pk_sensitivity *sensitivity)
{
    pk_release(context, sensitivity->by_example);
    memset(sensitivity, 0, sizeof *sensitivity);
}

static pk_status pk__sensing_check(pk_context *context, const pk_run *run, pk_matrix input,
                                   const pk_sensitivity_options *options, const pk_sensitivity *out)
{
    if (!run || !run->weights.data || !options || !out)
        return pk__fail(context, PK_ARGUMENT,
                        "sensitivity: the run, the options or the place for the result is missing");
    if (options->output >= run->outputs)
        return pk__fail(context, PK_ARGUMENT, "sensitivity: output %zu of a network with %zu outputs",
                        options->output, run->outputs);
    if (!(options->tolerance >= 0 && options->tolerance < INFINITY))
        return pk__fail(context, PK_ARGUMENT, "sensitivity: the tolerance is %g", options->tolerance);
    if (run->loss_gradients.data)
        return pk__fail(context, PK_UNSUPPORTED,
                        "sensitivity: the run has recorded derivatives of a loss, not the loss");
    if (run->graph.surrogate)
        return pk__fail(context, PK_UNSUPPORTED,
                        "sensitivity: the network has an operation with a surrogate for a derivative");
    return pk__sweep_matrix(context, "sensitivity", "inputs", input, 1, run->graph.input_width);
}

PK_API pk_status pk_sensitivity_at(pk_context *context, const pk_run *run, pk_matrix input,
                                   const pk_sensitivity_options *options, pk_sensitivity *out)
{
    if (out)
        memset(out, 0, sizeof *out);
    pk_status status = pk__sensing_check(context, run, input, options, out);
    if (status)
        return status;
    pk__sensing m;
    pk__arena arena = {NULL, 0, 0, 0};
    memset(&m, 0, sizeof m);
    m.context = context, m.run = run, m.options = options, m.out = out, m.input = input;
    m.block_count = run->graph.block_count;
    out->examples = run->examples, out->inputs = run->graph.input_width, out->steps = run->steps;
    out->layers = run->graph.columns;
    status = pk__sensing_results(context, options, out);
    if (!status)
        status = pk__step_integral_begin(context, &run->graph, 1, &m.phi);
    if (!status) {
        do
            pk__sensing_take(&arena, &m);
        while (pk__arena_again(context, &arena, "the sensitivity", &status));
    }
    if (!status)
        status = pk_replay_prepare(context, run, run->steps, &m.replay);
    if (!status && pk__walk_adapts(run))
        status = pk_gradient_prepare(context, &run->graph, pk__largest_batch(run), &m.workspace);
    if (!status)
        status = pk__sensing_run(&m);
    if (!status)
        status = pk__sensing_finish(&m);
    pk_gradient_release(context, &m.workspace);
    pk__step_integral_end(&m.phi);
    pk_replay_release(context, &m.replay);
    pk_release(context, arena.base);
    if (status && status != PK_NOT_CLOSED)
        pk_sensitivity_release(context, out);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
