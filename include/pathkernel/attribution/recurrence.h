/* pathkernel/attribution/recurrence.h: the recurrence of reverse time, for a part of a layer at a time.
 *
 * An optimizer with a state makes the step D_s from all gradients up to s. Instead of carrying a vector for each training example
 * forward, the test side goes from the last step to the first and carries, for each output of each test row,
 *
 *     R_s = carry_{s+1} R_{s+1} + enter_s p_s o Phi_s,      R_S = 0,
 *     E_s = gain_s R_s + direct_s p_s o Phi_s,
 *
 * so that the contribution of example i at step s is -scale_s < E_s, g_i > (decompose.h; training/optimizer.h has the linear
 * form: carry, enter, gain, direct, p). Phi_s and R are large, so they go through the cache in parts: some outputs of one layer of
 * one row. With parameter groups the linear form differs by ranges of the weights.
 *
 * For an average of the weights, T_s = c_s Phi_s + (1 - c_s) T_{s+1} takes the place of Phi_s, and Phi_s is taken along the
 * path of the average (run/average.h). A state that the run begins with contributes - carry_0 < R_0, m_0 >.
 */
#ifndef PATHKERNEL_RECURRENCE_H
#define PATHKERNEL_RECURRENCE_H
#include "cells.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_RECURRENCE_IMPLEMENTED)
#define PATHKERNEL_RECURRENCE_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

/* The number of weights of a layer that Phi stores apart from its matrix: its biases. */
PK__PRIVATE size_t pk__bias_count(const pk_node *node)
{
    return pk__is_outer(node) && !node->shares && pk__has_bias(node) ? node->width : 0;
}

/* A part of R: one layer of one row, the outputs [first, first + count), in the layout of Phi. */
typedef struct pk__part {
    const pk_node *node;
    size_t layer, row, first, count; /* row: within the block */
    size_t bias, matrix;             /* weights of each output */
} pk__part;

/* Phi of a part, as it is stored: either matrices and, apart from them, biases (inputs == NULL); or, in factors, cotangents
 * and one row of inputs, with bias_input as the input of the biases. */
typedef struct pk__phi_view {
    const pk_real *matrices, *biases;
    const pk_real *cotangents, *inputs;
    pk_real bias_input;
} pk__phi_view;

/* Takes R of the weights [first, first + count) of a part one step back, and computes E if e is not NULL. p (out x in, then
 * out) is NULL where it is one number; state and e have matrices, then biases. */
static void pk__advance_range(const pk__part *part, size_t first, size_t count, const pk_linear_form *form,
                              double carry, const pk_real *p, const pk__phi_view *phi, pk_real *state,
                              pk_real *e)
{
    const size_t in = part->node->fan_in, out = part->node->fan_out, matrix = part->matrix;
    const size_t last = first + count, matrices = part->count * matrix, end = pk__min(last, matrix);
    const size_t bias = pk__max(first, matrix) - matrix;
    for (size_t k = 0; k < part->count; k++) {
        size_t at = k * matrix + first;
        if (first < end && phi->inputs) /* the matrix is one tensor */
            pk__linear_form_back(out, in, form, carry, p, phi->cotangents + k * out, phi->inputs, 0, state + at,
                                 e ? e + at : NULL);
        else if (first < end)
            pk__linear_form_back(1, end - first, form, carry, p ? p + first : NULL, NULL, phi->matrices + at, 0,
                                 state + at, e ? e + at : NULL);
        if (last <= matrix)
            continue;
        at = matrices + k * part->bias + bias;
        pk__linear_form_back(1, last - matrix - bias, form, carry, p ? p + matrix + bias : NULL,
                             phi->inputs ? &phi->bias_input : NULL,
                             (phi->inputs ? phi->cotangents : phi->biases) + k * part->bias + bias, 0,
                             state + at, e ? e + at : NULL);
    }
}

/* Takes R of a part one step back, with the linear form of each range of its weights. next: the forms of step s + 1. */
PK__PRIVATE void pk__advance_state(const pk__job *job, const pk__part *part, const pk_linear_form *forms,
                                   const pk_linear_form *next, const pk_real *p, const pk__phi_view *phi,
                                   pk_real *state, pk_real *e)
{
    const pk_parameter_groups *groups = &job->run->groups;
    if (!job->grouped) {
        pk__advance_range(part, 0, part->matrix + part->bias, forms, next->carry, p, phi, state, e);
        return;
    }
    for (int t = 0; t < part->node->tensor_count; t++) {
        const pk_parameter_tensor *tensor = &part->node->tensors[t];
        const size_t group = groups->tensor[tensor->block];
        pk__advance_range(part, tensor->first, tensor->count, &forms[group], next[group].carry, p, phi, state,
                          e);
    }
}

/* The weight c_s of step number j of the window in the average; 1 where there is none. */
PK__PRIVATE double pk__step_average(const pk__job *job, size_t j)
{
    return job->window.average ? pk_average_weight(job->window.average, job->window.first + j) : 1;
}

/* T of a part a step back, from Phi, which is replaced by it. */
PK__PRIVATE void pk__advance_average(const pk__worker *worker, const pk__part *part, size_t j,
                                     pk__phi_view *phi, pk_real *state)
{
    const double c = pk__step_average(worker->job, j);
    pk_linear_form form;
    memset(&form, 0, sizeof form);
    form.enter = c;
    form.rate = 1;
    if (c != 0)
        pk__advance_range(part, 0, part->matrix + part->bias, &form, 1 - c, NULL, phi, state, NULL);
    *phi = (pk__phi_view){state, state + part->count * part->matrix, NULL, NULL, 0};
}

/* < e_k, v > for e laid out like Phi of a part and v like the layer's weights. */
PK__PRIVATE double pk__dot_part(const pk__part *part, size_t k, const pk_real *e, const pk_real *v)
{
    return (double)pk__dot(part->matrix, e + k * part->matrix, v) +
           (double)pk__dot(part->bias, e + part->count * part->matrix + k * part->bias, v + part->matrix);
}

/* The same of what the node brings into w itself: e whole, weights of the whole graph. */
PK__PRIVATE double pk__dot_own(const pk__part *part, size_t k, const pk_real *e, const pk_real *weights)
{
    const pk_node *node = part->node;
    double sum = 0;
    for (int t = 0; t < node->tensor_count; t++) {
        const size_t at = node->tensors[t].first;
        if (!node->tensors[t].tied)
            sum += (double)pk__dot(node->tensors[t].count, e + k * part->matrix + at,
                                   weights + node->weight_offset + at);
    }
    return sum;
}

/* Where R of a part begins. R is stored by row, then by layer, then by part. */
PK__PRIVATE size_t pk__state_place(const pk__worker *worker, const pk__part *part)
{
    const pk__job *job = worker->job;
    const size_t *before = job->state_at + part->layer, all = job->state_at[job->graph->layers];
    return (worker->row + part->row) * job->plan.outputs * all + job->output_count * before[0] +
           (part->first - job->first_output) * (before[1] - before[0]);
}

PK__END_CODE
/* <<< implementation */
#endif
