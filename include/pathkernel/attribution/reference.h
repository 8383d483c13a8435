/* pathkernel/attribution/reference.h: the decomposition of a run by its definition, for readers and for tests. It uses
 * derivatives alone (derivatives.h), none of what makes pk_decompose fast, and runs forward in time:
 *
 *     Phi_s(x) = integral_0^1 J(w_s + t D_s, x) dt,                      D_s = w_{s+1} - w_s
 *     g_{s,i}' = scale_s c_{s,i} grad l_i(w_s),                          decay: coupled_s w_s
 *     m_{s,i}  = carry_s m_{s-1,i} + gain_s g_{s,i}',                    one momentum for each example, one for decay, and one
 *                                                                        that the optimizer begins with and that gets no gradient
 *     D_{s,i}  = - p_s o (enter_s m_{s,i} + direct_s g_{s,i}'),          decay: - decoupled_s w_s besides
 *     A(x, i)  = sum_s < Phi_s(x), D_{s,i} >
 *     unattributed(x) = sum_s < Phi_s(x), D_s - sum_i D_{s,i} >          decay and inherited are two of the i here
 *     closure(x) = f(w_S, x) - f(w_0, x) - sum_i A(x, i) - unattributed(x)
 *
 * An average a_s of the weights (run/average.h) is decomposed in the same way along its own path: Phi_s goes from a_s to a_{s+1},
 * and the average takes up each D_{s,i} as it takes up D_s: d_{s,i} = c_s (e_{s,i} + D_{s,i}), e_{s+1,i} = (1 - c_s) (e_{s,i} + D_{s,i}).
 *
 * pk_decompose carries the test side backward in time instead, and chooses the nodes of the integral itself.
 */
#ifndef PATHKERNEL_REFERENCE_H
#define PATHKERNEL_REFERENCE_H
#include "../run/average.h"
#include "../path/quadrature.h"
#include "../training/derivatives.h"

/* >>> declarations */
PK__BEGIN_C

/* The caller's arrays; all are needed, but inherited only of a run that begins with an optimizer's state. M test rows, C outputs,
 * N training examples. */
typedef struct pk_reference {
    double *initial, *final;                /* M x C */
    double *by_example;                     /* M x C x N */
    double *decay, *unattributed, *closure; /* M x C */
    double *inherited;                      /* M x C, or NULL */
} pk_reference;

/* Decomposes all outputs f(w_S, inputs) of a run (inputs: M x D), under any optimizer. The integral along each step is taken by
 * Gauss-Legendre with `nodes` nodes (1 to 1000) on each of `pieces` equal pieces. A smooth network needs one piece and
 * 10 to 20 nodes; one with kinks, where the error falls like 1 / pieces, many pieces with one node, and the closure tells
 * how far it is. Cost: pieces x nodes Jacobians a step, and 2 (M C + 1) N P flops. Memory: (2 N + 3 M C) P numbers.
 * PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE, and what reading the run gives; arrays hold
 * parts of sums then, also after PK_CANCELLED. */
PK_API PK__MUST_USE pk_status pk_decompose_reference(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                     size_t pieces, int nodes, const pk_reference *out);

/* The same of f(a_S, inputs), where a is an average of the weights; initial is f(w_0, inputs). Memory: (N + 3) P numbers more.
 * PK_ARGUMENT also as pk_average_check. */
PK_API PK__MUST_USE pk_status pk_decompose_reference_average(pk_context *context, const pk_run *run,
                                                             pk_matrix inputs, const pk_average *average,
                                                             size_t pieces, int nodes, const pk_reference *out);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_REFERENCE_IMPLEMENTED)
#define PATHKERNEL_REFERENCE_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

enum { PK__REFERENCE_NODES = 1000 };

/* Sources of updates are the examples 0 .. N-1, decay, which is number N, and the state that the optimizer begins with. */
enum { PK__REFERENCE_OTHERS = 2 };
typedef struct pk__reference_memory {
    pk_replay replay;
    const pk_average *average;
    pk_real *mean, *mean_next;                /* P: a_s and a_{s+1}; w and next where there is no average */
    double *lag;                              /* (N + 3) x P: e of each source and of the rest; or NULL */
    double *node, *weight;                    /* nodes: the rule on [0, 1] */
    pk_real *w, *next, *at, *one;             /* P each: w_s, w_{s+1}, w_s + t D_s, one gradient */
    pk_real *sum, *state, *update;            /* P, V P, P: the optimizer's */
    pk_real *p;                               /* P */
    pk_real *jacobian, *f;                    /* M C x P, M C */
    double *phi, *gradient, *momentum, *rest; /* M C x P, (N + 2) x P twice, P */
    const pk_parameter_range *range; /* of parameters in one group: all of them where there are no groups */
    size_t range_count;
    pk_parameter_range all;
    pk_linear_form *forms; /* 1 + groups */
} pk__reference_memory;

/* phi = the integral of the Jacobian along the step from w to next, or that of their average. */
static pk_status pk__reference_integral(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                        int nodes, pk__reference_memory *m)
{
    const size_t P = run->parameters, cells = inputs.rows * run->outputs;
    const pk_matrix none = {NULL, 0, 0, 0};
    if (!cells) /* no test rows, no memory for them */
        return PK_OK;
    memset(m->phi, 0, cells * P * sizeof *m->phi);
    for (size_t k = 0; k < pieces * (size_t)nodes; k++) {
        const double t = ((double)(k / (size_t)nodes) + m->node[k % (size_t)nodes]) / (double)pieces;
        const double weight = m->weight[k % (size_t)nodes] / (double)pieces;
        pk__step_point(P, m->mean, m->mean_next, t, m->at);
        pk_status status =
            pk_jacobian(context, &run->graph, m->at, inputs, pk_matrix_view(m->jacobian, cells, P), none);
        if (status)
            return status;
        for (size_t i = 0; i < cells * P; i++)
            m->phi[i] += weight * m->jacobian[i];
    }
    return PK_OK;
}

/* gradient: row i the scaled and weighted gradient of example i, row N that of coupled decay; and the linear
 * form of the step, for each parameter group: of the parameters in none, then of the first. */
static pk_status pk__reference_step(pk_context *context, const pk_run *run, size_t s, pk__reference_memory *m,
                                    pk_linear_form *forms)
{
    const size_t P = run->parameters, N = run->examples;
    const double scale = pk_run_gradient_scale(run, s), rate = run->learning_rates[s];
    const double *rates = pk_run_group_rates(run, s);
    const pk__update whole = {s, rate, 1, P, P, m->w, m->sum, m->state, m->update};
    pk_batch batch;
    pk_status status = PK_OK;
    pk_run_batch(run, s, &batch);
    memset(m->gradient, 0, (N + PK__REFERENCE_OTHERS) * P * sizeof *m->gradient);
    size_t row = 0;
    const pk_array *recorded = pk_run_loss_gradients(run, s, &row);
    for (size_t b = 0; !status && b < batch.count; b++) {
        const int64_t first = 0;
        const pk_batch item = {1, &first, NULL};
        const double c = batch.weights ? batch.weights[b] : 1 / (double)batch.count;
        pk_dataset one;
        status = pk_dataset_rows(context, &run->train, (size_t)batch.items[b], 1, &one);
        if (!status && recorded)
            one.targets = pk_array_rows(recorded, row + b, 1);
        if (!status)
            status = pk_loss_gradients_with(context, &run->graph, &run->criterion, m->w, &one, &item, NULL,
                                            pk_matrix_view(m->one, 1, P));
        for (size_t p = 0; !status && p < P; p++)
            m->gradient[(size_t)batch.items[b] * P + p] += scale * c * m->one[p];
    }
    for (size_t p = 0; p < P; p++) {
        double sum = 0;
        for (size_t i = 0; i < N; i++)
            sum += m->gradient[i * P + p];
        m->sum[p] = (pk_real)sum;
    }
    if (status)
        return status;
    pk__groups_update(&run->optimizer, &run->groups, rates, 0, &whole);
    const size_t moments = pk__groups_moments(&run->optimizer, &run->groups);
    if (run->second_moments.data && moments != SIZE_MAX)
        status = pk_run_second_moments(context, run, s, m->state + moments * P);
    for (size_t r = 0; r < m->range_count; r++) {
        const pk_parameter_range *range = &m->range[r];
        const size_t first = range->first;
        pk_linear_form *form = &forms[range->group];
        pk__group_form(&run->optimizer, &run->groups, range->group, s, rate, rates, range->count, P,
                       m->state ? m->state + first : NULL, form, m->p + first);
        for (size_t p = first; p < first + range->count; p++) {
            m->gradient[N * P + p] = form->coupled * m->w[p];
            m->rest[p] = (double)m->next[p] - m->w[p];
        }
    }
    return status;
}

/* D of a source, P numbers, as the average takes it. */
static void pk__reference_average(const pk__reference_memory *m, size_t P, size_t s, double *lag, double *share)
{
    const double c = pk_average_weight(m->average, s);
    for (size_t p = 0; p < P; p++) {
        const double due = lag[p] + share[p];
        share[p] = c * due;
        lag[p] = (1 - c) * due;
    }
}

/* Adds a step: < Phi, D_i > for each source, and what is left of D. */
static void pk__reference_add(const pk_run *run, size_t s, size_t cells, const pk_linear_form *forms,
                              pk__reference_memory *m, const pk_reference *out)
{
    const size_t P = run->parameters, N = run->examples, sources = N + PK__REFERENCE_OTHERS;
    for (size_t k = 0; k < sources * m->range_count; k++) {
        const size_t i = k / m->range_count;
        const pk_parameter_range *range = &m->range[k % m->range_count];
        const pk_linear_form *form = &forms[range->group];
        double *momentum = m->momentum + i * P, *share = m->gradient + i * P;
        for (size_t p = range->first; p < range->first + range->count; p++) {
            const double outside = pk__form_outside(form, m->p[p]);
            share[p] *= pk__form_inside(form, m->p[p]);
            momentum[p] = form->carry * momentum[p] + form->gain * share[p];
            share[p] = -outside * (form->enter * momentum[p] + form->direct * share[p]) -
                       (i == N ? form->decoupled * m->w[p] : 0);
            m->rest[p] -= share[p];
        }
    }
    for (size_t i = 0; m->lag && i <= sources; i++)
        pk__reference_average(m, P, s, m->lag + i * P, i < sources ? m->gradient + i * P : m->rest);
    for (size_t cell = 0; cell < cells; cell++)
        for (size_t i = 0; i <= sources; i++) {
            const double *share = i < sources ? m->gradient + i * P : m->rest;
            double sum = 0;
            for (size_t p = 0; p < P; p++)
                sum += m->phi[cell * P + p] * share[p];
            double *to = i < N         ? &out->by_example[cell * N + i]
                         : i == N      ? &out->decay[cell]
                         : i < sources ? out->inherited ? &out->inherited[cell] : NULL
                                       : &out->unattributed[cell];
            if (to)
                *to += sum;
        }
}

/* The definition itself; the memory has been taken. */
static pk_status pk__reference_run(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                   int nodes, pk__reference_memory *m, const pk_reference *out)
{
    const size_t P = run->parameters, N = run->examples, cells = inputs.rows * run->outputs;
    const pk_matrix f = pk_matrix_view(m->f, inputs.rows, run->outputs);
    pk_gauss_legendre(nodes, m->node, m->weight);
    memset(out->by_example, 0, cells * N * sizeof(double));
    memset(out->decay, 0, cells * sizeof(double));
    memset(out->unattributed, 0, cells * sizeof(double));
    if (out->inherited)
        memset(out->inherited, 0, cells * sizeof(double));
    pk_status status = pk_replay_weights(context, &m->replay, 0, m->next);
    if (!status)
        status = pk_graph_evaluate(context, &run->graph, m->next, inputs, f);
    if (!status && run->initial_state.data) {
        status = pk_run_initial_state(context, run, m->state);
        pk__groups_first_momentum(&run->optimizer, &run->groups, P, m->state, m->p);
        for (size_t p = 0; p < P; p++)
            m->momentum[(N + 1) * P + p] = m->p[p];
    }
    if (m->lag)
        memcpy(m->mean_next, m->next, P * sizeof *m->next);
    for (size_t cell = 0; cell < cells; cell++)
        out->initial[cell] = m->f[cell];
    for (size_t s = 0; !status && s < run->steps; s++) {
        memcpy(m->w, m->next, P * sizeof *m->w);
        if (m->lag)
            memcpy(m->mean, m->mean_next, P * sizeof *m->mean);
        status = pk__progress(context, "reference", (double)s / (double)run->steps);
        if (!status)
            status = pk_replay_weights(context, &m->replay, s + 1, m->next);
        if (!status && m->lag)
            pk__average_update(pk_average_weight(m->average, s), P, m->next, m->mean_next, NULL);
        if (!status)
            status = pk__reference_integral(context, run, inputs, pieces, nodes, m);
        if (!status)
            status = pk__reference_step(context, run, s, m, m->forms);
        if (!status)
            pk__reference_add(run, s, cells, m->forms, m, out);
    }
    if (!status)
        status = pk_graph_evaluate(context, &run->graph, m->mean_next, inputs, f);
    for (size_t cell = 0; cell < cells; cell++) {
        out->final[cell] = m->f[cell];
        out->closure[cell] = out->final[cell] - out->initial[cell] - out->decay[cell] - out->unattributed[cell];
        out->closure[cell] -= out->inherited ? out->inherited[cell] : 0;
        for (size_t i = 0; i < N; i++)
            out->closure[cell] -= out->by_example[cell * N + i];
    }
    return status;
}

static void pk__reference_take(pk__arena *arena, const pk_run *run, size_t cells, int nodes,
                               pk__reference_memory *m)
{
    const size_t P = run->parameters, real = sizeof(pk_real), number = sizeof(double);
    const size_t vectors = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    size_t sources = 0, results = 0;
    if (!pk__multiply(run->examples + PK__REFERENCE_OTHERS + 1, P, &sources) ||
        !pk__multiply(cells, P, &results))
        arena->overflow = 1;
    m->node = pk__arena_take(arena, (size_t)nodes, number);
    m->weight = pk__arena_take(arena, (size_t)nodes, number);
    pk_real **const vector[] = {&m->w, &m->next, &m->at, &m->one, &m->sum, &m->update, &m->p};
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++)
        *vector[i] = pk__arena_take(arena, P, real);
    m->state = pk__arena_take(arena, P, vectors * real);
    m->jacobian = pk__arena_take(arena, results, real);
    m->f = pk__arena_take(arena, cells, real);
    m->phi = pk__arena_take(arena, results, number);
    m->gradient = pk__arena_take(arena, sources, number);
    m->momentum = pk__arena_take(arena, sources, number);
    m->lag = m->average->kind ? pk__arena_take(arena, sources, number) : NULL;
    m->mean = m->average->kind ? pk__arena_take(arena, P, real) : m->w;
    m->mean_next = m->average->kind ? pk__arena_take(arena, P, real) : m->next;
    m->rest = pk__arena_take(arena, P, number);
    m->forms = pk__arena_take(arena, 1 + run->groups.count, sizeof *m->forms);
    m->all.count = P;
    m->range = run->groups.count ? run->groups.range : &m->all;
    m->range_count = run->groups.count ? run->groups.range_count : 1;
}

PK_API pk_status pk_decompose_reference(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                        int nodes, const pk_reference *out)
{
    pk_average none;
    memset(&none, 0, sizeof none);
    return pk_decompose_reference_average(context, run, inputs, &none, pieces, nodes, out);
}

PK_API pk_status pk_decompose_reference_average(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                const pk_average *average, size_t pieces, int nodes,
                                                const pk_reference *out)
{
    if (!run || !run->weights.data || !out || !out->initial || !out->final || !out->by_example || !out->decay ||
        !out->unattributed || !out->closure || (run->initial_state.data && !out->inherited))
        return pk__fail(context, PK_ARGUMENT, "reference: the run or an array of the result is missing");
    if (nodes < 1 || nodes > PK__REFERENCE_NODES || !pieces || pieces > SIZE_MAX / PK__REFERENCE_NODES)
        return pk__fail(context, PK_ARGUMENT,
                        "reference: %zu pieces of %d nodes; there is at least 1 piece, with 1 to %d nodes",
                        pieces, nodes, (int)PK__REFERENCE_NODES);
    pk_status status = pk_average_check(context, average, run->steps);
    if (!status)
        status = pk__sweep_matrix(context, "reference", "inputs", inputs, inputs.rows, run->graph.input_width);
    if (status)
        return status;
    size_t cells = 0;
    pk__reference_memory memory;
    memset(&memory, 0, sizeof memory);
    memory.average = average;
    pk__arena arena = {NULL, 0, 0, !pk__multiply(inputs.rows, run->outputs, &cells)};
    do
        pk__reference_take(&arena, run, cells, nodes, &memory);
    while (pk__arena_again(context, &arena, "the reference decomposition", &status));
    if (!status)
        status = pk_replay_prepare(context, run, 0, &memory.replay);
    if (!status)
        status = pk__reference_run(context, run, inputs, pieces, nodes, &memory, out);
    pk_replay_release(context, &memory.replay);
    pk_release(context, arena.base);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
