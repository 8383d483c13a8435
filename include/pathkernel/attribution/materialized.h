/* pathkernel/attribution/materialized.h: what a step contributes through the layers whose Phi is formed: in reverse time all of
 * them, else those where that costs less than the products point by point.
 *
 * For each row, layer and part, Phi or (in reverse time) E (recurrence.h) is multiplied with the factors of the step's
 * examples and added to the row's tiles. These are added to the results when a row, or one layer of it, is complete.
 */
#ifndef PATHKERNEL_MATERIALIZED_H
#define PATHKERNEL_MATERIALIZED_H
#include "bounds.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MATERIALIZED_IMPLEMENTED)
#define PATHKERNEL_MATERIALIZED_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

/* The factor of a step's inner products. Where a step has no direct part and no groups, E = gain R: then R itself is
 * multiplied with the examples, and the gain is a part of this factor. */
static double pk__entry_factor(const pk__worker *worker, const pk_linear_form *form)
{
    const pk__job *job = worker->job;
    return worker->factor * (job->reverse && !job->grouped && !pk__form_direct(form) ? form->gain : 1);
}

/* Adds < e, g_b > of a part to the row's tiles. */
static void pk__multiply_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *e)
{
    const size_t examples = worker->job->window.batches[j].count;
    for (size_t first = 0; first < examples; first += PK__EXAMPLE_BLOCK)
        pk__product_row(&worker->product, part->layer, part->count, e, first,
                        pk__min(PK__EXAMPLE_BLOCK, examples - first),
                        pk__row_tile(worker, first / PK__EXAMPLE_BLOCK) + part->first * PK__TILE_LD);
}

/* Adds the part's products, tensor by tensor, to the columns of by_layer to which the tensors belong. */
static void pk__multiply_columns(pk__worker *worker, const pk__part *part, size_t j, const pk_real *e)
{
    const pk__job *job = worker->job;
    const pk_node *node = part->node;
    const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
    const double factor = pk__entry_factor(worker, form);
    const size_t weights = node->weight_count;
    for (int t = 0; t < node->tensor_count; t++) {
        const size_t count = node->tensors[t].count, at = node->tensors[t].first;
        memset(worker->tensor, 0, part->count * weights * sizeof *worker->tensor);
        for (size_t k = 0; k < part->count; k++)
            memcpy(worker->tensor + k * weights + at, e + k * weights + at, count * sizeof *e);
        pk__multiply_part(worker, part, j, worker->tensor);
        pk__add_row(worker, part->row, pk__block_of(job->graph, node, t)->column, j, factor);
    }
}

/* Phi of a part: where it is stored, or a copy if it will be changed. */
static pk__phi_view pk__view_phi(pk__worker *worker, const pk__part *part)
{
    const pk__job *job = worker->job;
    pk__phi_view phi = {NULL, NULL, NULL, NULL, 0};
    if (!job->reverse || job->part->bounds) {
        pk__integral_row_phi(&worker->integral, part->layer, part->row, part->first, part->count, worker->phi);
        phi.matrices = worker->phi;
        phi.biases = worker->phi + part->count * part->matrix;
    } else if (worker->integral.layer[part->layer].phi) {
        pk__row_view(&worker->integral, part->layer, part->row, part->first, &phi.matrices, &phi.biases);
    } else {
        phi.bias_input = pk__row_factors(&worker->integral, part->layer, part->row, part->first,
                                         &phi.cotangents, &phi.inputs);
    }
    return phi;
}

/* Adds the coupled decay, which is a part of the gradients: < E, decay o w >. e: E, or R where the gain is not in it. */
static void pk__add_coupled_decay(const pk__worker *worker, const pk__part *part, size_t j, const pk_real *e,
                                  double gain)
{
    const pk__job *job = worker->job;
    const pk__window *window = &job->window;
    const pk_linear_form *form = &window->forms[j * window->form_count];
    const pk_real *weights = (job->grouped ? window->use_decayed : window->use_weights) + j * window->untied;
    double *decay = job->part->decay + (worker->row + part->row) * job->outputs + part->first;
    if (job->grouped ? window->decoupled : form->coupled == 0)
        return;
    for (size_t k = 0; k < part->count; k++) {
        const double product = part->node->shares
                                   ? pk__dot_own(part, k, e, weights)
                                   : pk__dot_part(part, k, e, weights + part->node->weight_offset);
        decay[k] -= job->grouped ? product : form->coupled * gain * product;
    }
}

/* The part of a state that the optimizer begins with, - < R_0, carry_0 m_0 >. */
static void pk__add_inherited(const pk__worker *worker, const pk__part *part, const pk_real *r)
{
    const pk__job *job = worker->job;
    const pk_real *inherited = job->window.use_inherited;
    double *to = job->part->inherited + (worker->row + part->row) * job->outputs + part->first;
    for (size_t k = 0; k < part->count; k++)
        to[k] -= part->node->shares ? pk__dot_own(part, k, r, inherited)
                                    : pk__dot_part(part, k, r, inherited + part->node->weight_offset);
}

/* One part whose Phi is materialized: E (through R in reverse time), coupled decay, the products with the batch, and
 * the bounds by the same way with absolute values. */
static void pk__materialized_part(pk__worker *worker, const pk__part *part, size_t j,
                                  const pk_linear_form *next)
{
    pk__job *job = worker->job;
    const pk__window *window = &job->window;
    const pk_linear_form *form = &window->forms[j * window->form_count];
    const pk_real *p = NULL, *e = worker->phi;
    if (window->use_preconditioner)
        p = window->use_preconditioner + j * window->uses_pitch + part->node->weight_offset;
    pk__phi_view phi = {NULL, NULL, NULL, NULL, 0};
    if (pk__step_average(job, j) != 0)
        phi = pk__view_phi(worker, part);
    if (job->average_state) {
        pk_real *mean = job->average_state + pk__state_place(worker, part);
        pk__advance_average(worker, part, j, &phi, mean);
        if (job->part->bounds)
            memcpy(worker->phi, mean, part->count * part->node->weight_count * sizeof *mean);
    }
    if (job->reverse) {
        /* Without a direct part E is gain R: no copy is needed. */
        const int direct = job->grouped || pk__form_direct(form);
        pk_real *state = job->reverse_state + pk__state_place(worker, part);
        pk__advance_state(job, part, form, next, p, &phi, state, direct ? worker->effective : NULL);
        e = direct ? worker->effective : state;
        pk__add_coupled_decay(worker, part, j, e, direct ? 1 : form->gain);
        if (window->inherited && worker->step == 0)
            pk__add_inherited(worker, part, state);
    }
    if (job->by_layer && part->node->shares)
        pk__multiply_columns(worker, part, j, e);
    else
        pk__multiply_part(worker, part, j, e);
    if (job->part->bounds)
        pk__bound_materialized(worker, part, j, next, p);
}

static void pk__materialized_layer(pk__worker *worker, size_t row, size_t layer, size_t j,
                                   const pk_linear_form *next)
{
    const pk__job *job = worker->job;
    pk__part part;
    part.node = worker->integral.layer[layer].node;
    part.layer = layer;
    part.row = row;
    part.bias = pk__bias_count(part.node);
    part.matrix = part.node->weight_count - part.bias;
    const size_t last = job->first_output + job->output_count;
    /* Parts are small enough for a copy to stay in the cache; where R is used without a copy, a part is everything. */
    const int copied = !job->reverse || job->direct || job->part->bounds != NULL;
    const size_t each = copied ? pk__part_outputs(part.node, job->unit) : job->unit;
    for (size_t unit = job->first_output; unit < last; unit += job->unit) {
        const size_t end = pk__min(unit + job->unit, last);
        for (part.first = unit; part.first < end; part.first += part.count) {
            part.count = pk__min(each, end - part.first);
            pk__materialized_part(worker, &part, j, next);
        }
    }
}

/* The layers of a step whose Phi is materialized. */
PK__PRIVATE void pk__materialized_layers(pk__worker *worker, size_t j, const pk_linear_form *next)
{
    const pk__job *job = worker->job;
    const pk__layer_integral *layer = worker->integral.layer;
    const double factor = pk__entry_factor(worker, &job->window.forms[j * job->window.form_count]);
    size_t layers = 0;
    for (size_t l = 0; l < job->graph->layers; l++)
        layers += layer[l].integrated != 0;
    for (size_t row = 0; layers && row < worker->rows; row++) {
        for (size_t l = 0; l < job->graph->layers; l++) {
            if (!layer[l].integrated)
                continue;
            pk__materialized_layer(worker, row, l, j, next);
            if (job->by_layer &&
                !layer[l].node->shares) /* else each of its tensors has been added to its own column */
                pk__add_row(worker, row, pk__block_of(job->graph, layer[l].node, 0)->column, j, factor);
        }
        if (!job->by_layer)
            pk__add_row(worker, row, -1, j, factor);
    }
}

PK__END_CODE
/* <<< implementation */
#endif
