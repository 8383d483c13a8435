/* pathkernel/attribution/bounds.h: how far a result may be off: bounds on single entries, and the certificate of the whole.
 *
 * Every row of every output has a closure, final - initial - everything that was attributed: what the decomposition misses.
 * It is measured against what the row is made of, and the worst one is the certificate (pk__certify). A closure says nothing
 * of single entries, whose errors may cancel. Their bounds go the way of the entries with absolute values:
 *
 *     |error of an entry| <= sum over steps of |factor| < error of E_s, |g_i| + rounding of g_i >,
 *
 * where the error of E_s comes from that of Phi (features/integral.h), of p_s (steps.h), and through the same recurrence as R. They
 * are first-order estimates. Where those of a cell do not add up to its closure, all of them are raised until they do.
 */
#ifndef PATHKERNEL_BOUNDS_H
#define PATHKERNEL_BOUNDS_H
#include "recurrence.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_BOUNDS_IMPLEMENTED)
#define PATHKERNEL_BOUNDS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- bounds on entries -------------------------------------------------------------------------------- */

/* Adds |factor| < error, |g_b| > of a part to the bounds. */
static void pk__bound_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *error)
{
    pk__job *job = worker->job;
    const size_t cell = (worker->row + part->row) * job->outputs + part->first;
    const pk_batch *batch = &job->window.batches[j];
    worker->product.examples = &job->window.magnitudes[j];
    for (size_t first = 0; first < batch->count; first += PK__EXAMPLE_BLOCK) {
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, batch->count - first);
        pk__clear_tile(part->count, count, worker->bound_tile);
        pk__product_row(&worker->product, part->layer, part->count, error, first, count, worker->bound_tile);
        for (size_t k = 0; k < part->count; k++)
            for (size_t b = 0; b < count; b++)
                job->part->bounds[(cell + k) * job->part->examples + (size_t)batch->items[first + b]] +=
                    fabs(worker->factor) * (double)worker->bound_tile[k * PK__TILE_LD + b];
    }
    worker->product.examples = &job->window.examples[j];
}

/* error: a bound on that of Phi of a part; with an average of that of T, which takes it as T takes Phi. */
static void pk__average_error(pk__worker *worker, const pk__part *part, size_t j, pk_real *error)
{
    const pk__job *job = worker->job;
    const size_t numbers = part->count * part->node->weight_count;
    const double c = pk__step_average(job, j);
    if (c != 0)
        pk__integral_row_error(&worker->integral, part->layer, part->row, part->first, part->count, error);
    if (!job->average_error)
        return;
    pk_real *mean = job->average_error + pk__state_place(worker, part);
    for (size_t i = 0; i < numbers; i++) {
        mean[i] = c != 0 ? (pk_real)((1 - c) * mean[i] + c * error[i]) : mean[i];
        error[i] = mean[i];
    }
}

/* The bounds of a part whose phi stands in the worker's memory; next: forms of the step behind; p: as for
 * pk__advance_state. */
PK__PRIVATE void pk__bound_materialized(pk__worker *worker, const pk__part *part, size_t j,
                                        const pk_linear_form *next, const pk_real *p)
{
    pk__job *job = worker->job;
    const pk__window *window = &job->window;
    const size_t numbers = part->count * part->node->weight_count, matrix = part->count * part->matrix;
    const pk_linear_form *form = &window->forms[j * window->form_count];
    const pk_real *slack =
        window->use_preconditioner_error
            ? window->use_preconditioner_error + j * window->uses_pitch + part->node->weight_offset
            : NULL;
    pk_real *error = worker->effective;
    pk__average_error(worker, part, j, error);
    if (job->reverse) {
        if (slack) {
            /* |error of p Phi| <= |p| (|error of Phi| + |error of p| / |p| |Phi|). */
            for (size_t i = 0; i < numbers; i++) {
                const size_t w = i < matrix ? i % part->matrix : part->matrix + (i - matrix) % part->bias;
                error[i] += p[w] != 0 ? (pk_real)fabs(slack[w] / p[w] * worker->phi[i]) : 0;
            }
        }
        const pk__phi_view phi = {error, error + matrix, NULL, NULL, 0};
        const size_t at = pk__state_place(worker, part);
        pk__advance_state(job, part, form, next, p, &phi, job->reverse_error + at, error);
        int before = 0;
        for (size_t f = 0; f < window->form_count; f++)
            before |= form[f].before;
        for (size_t i = 0; i < numbers; i++) { /* with maximize all factors are negative */
            const size_t w = i < matrix ? i % part->matrix : part->matrix + (i - matrix) % part->bias;
            error[i] = (pk_real)fabs(error[i]);
            if (before && slack) /* of p R */
                error[i] += slack[w] * (pk_real)fabs(job->reverse_state[at + i]);
        }
    }
    pk__bound_part(worker, part, j, error);
}

/* The largest of `largest` and the |x| that are finite. */
PK__PRIVATE double pk__largest(size_t count, const double *x, double largest)
{
    for (size_t i = 0; i < count; i++)
        largest = isfinite(x[i]) && fabs(x[i]) > largest ? fabs(x[i]) : largest;
    return largest;
}

/* value / scale; 0 where the value is 0, whatever the scale is. */
static double pk__part_of(double value, double scale)
{
    return value == 0 ? 0 : value / scale;
}

/* Raises the bounds of a cell: each to at least the rounding error of the largest contribution of an example to its row,
 * and all of them until their sum explains the cell's closure, up to the rounding of the closure itself. */
static void pk__raise_bounds(pk__job *job, size_t cell, double height, double largest)
{
    pk_decomposition *part = job->part;
    double *bounds = part->bounds + cell * part->examples, sum = 0;
    for (size_t i = 0; i < part->examples; i++)
        bounds[i] += bounds[i] > 0 ? PK__MEASURABLE * PK__EPSILON * largest : 0;
    const double closure = fabs(part->closure[cell]) - PK__MEASURABLE * PK__EPSILON * height;
    for (size_t i = 0; i < part->examples; i++)
        sum += bounds[i];
    if (!(closure > sum))
        return;
    for (size_t i = 0; i < part->examples; i++)
        bounds[i] = sum > 0 ? bounds[i] * (closure / sum * (1 + PK__MEASURABLE * PK__EPSILON)) : closure;
    part->raised++;
}

/* ---- the certificate ---------------------------------------------------------------------------------- */

/* The limit below which the unattributed part is explained by rounding, from the precision of the run's last weights. */
PK__PRIVATE double pk__unattributed_limit(const pk__job *job, const pk_real *weights)
{
    const double given = job->options->unattributed;
    if (given > 0)
        return given;
    int coarse = 1;
    for (size_t p = 0; coarse && p < job->graph->parameters; p++)
        coarse = weights[p] == (pk_real)(float)weights[p];
    const double epsilon = coarse ? 1.1920929e-7 : 2.220446049250313e-16;
    return fmax(PK_UNATTRIBUTED_LEAST,
                PK_UNATTRIBUTED_EPSILONS * epsilon * sqrt((double)pk__max(job->run->steps, 1)));
}

/* What the rows of a result are measured against. */
typedef struct pk__row_scale {
    double height;  /* the largest output of the row, at either end of the run */
    double largest; /* the largest contribution of any kind */
    double allowed; /* the largest closure that is accepted */
} pk__row_scale;

static pk__row_scale pk__scale_of_row(const pk__job *job, size_t row)
{
    const pk_decomposition *part = job->part;
    const size_t outputs = part->outputs, first = row * outputs;
    double height = pk__largest(outputs, part->initial + first, 0);
    height = pk__largest(outputs, part->final + first, height);
    double largest = pk__largest(outputs, job->variation + first, 0);
    largest = pk__largest(outputs, part->data + first, largest);
    largest = pk__largest(outputs, part->decay + first, largest);
    largest = pk__largest(outputs, part->inherited + first, largest);
    largest = pk__largest(outputs, part->unattributed + first, largest);
    for (size_t k = 0; k < part->kept_count; k++) {
        const size_t items = part->kept[k].row_items;
        largest = items ? pk__largest(items, part->kept[k].data + row * items, largest) : largest;
    }
    const double floor = (job->tolerance < PK_CLOSURE_ROUNDING ? job->tolerance : PK_CLOSURE_ROUNDING) * height;
    const double allowed = job->tolerance * largest > floor ? job->tolerance * largest : floor;
    return (pk__row_scale){height, largest, allowed};
}

static void pk__certify_row(pk__job *job, size_t row)
{
    pk_decomposition *part = job->part;
    const size_t outputs = part->outputs, first = row * outputs, entries = outputs * part->examples;
    for (size_t i = first; i < first + outputs; i++)
        part->closure[i] = part->final[i] - part->initial[i] - part->data[i] - part->decay[i] -
                           part->unattributed[i] - part->inherited[i];
    const pk__row_scale of = pk__scale_of_row(job, row);
    const double scale = of.height > of.largest ? of.height : of.largest;
    part->scale = scale > part->scale ? scale : part->scale;
    const double entry =
        part->bounds && part->by_example ? pk__largest(entries, part->by_example + row * entries, 0) : 0;
    for (size_t i = first; i < first + outputs; i++) {
        const double closure = fabs(part->closure[i]), excess = pk__part_of(closure, of.allowed);
        if (pk__worse(pk__part_of(closure, scale), part->worst_closure))
            part->worst_closure = pk__part_of(closure, scale);
        if (pk__worse(pk__part_of(closure, of.largest), part->worst_relative))
            part->worst_relative = pk__part_of(closure, of.largest);
        if (pk__worse(excess, part->worst_excess)) {
            part->worst_excess = excess;
            part->worst_row = part->first_row + row;
            part->worst_output = i - first;
        }
        const double size = fabs(part->final[i]) > 1 ? fabs(part->final[i]) : 1;
        if (pk__worse(fabs(part->unattributed[i]) / size, part->worst_unattributed)) {
            part->worst_unattributed = fabs(part->unattributed[i]) / size;
            part->worst_unattributed_row = part->first_row + row;
            part->worst_unattributed_output = i - first;
        }
        if (part->bounds)
            pk__raise_bounds(job, i, of.height, entry);
    }
}

PK__PRIVATE void pk__certify(pk__job *job)
{
    pk_decomposition *part = job->part;
    size_t blocks = pk__blocks(part->rows, job->block);
    part->worst_closure = part->worst_relative = part->worst_excess = part->worst_unattributed = 0;
    part->raised = 0;
    part->scale = 0;
    for (size_t row = 0; row < part->rows; row++)
        pk__certify_row(job, row);
    part->worst_step_closure = 0;
    part->points = part->pieces = part->refused = 0;
    part->flops = 0;
    for (size_t b = 0; b < blocks; b++) {
        const pk__block_state *block = &job->blocks[b];
        part->points += block->points;
        part->pieces += block->pieces;
        part->refused += block->refused;
        part->flops += block->flops;
        if (pk__worse(block->worst, part->worst_step_closure)) {
            part->worst_step_closure = block->worst;
            part->worst_step = block->worst_step;
            part->worst_step_row = block->worst_row;
        }
    }
}

PK__PRIVATE void pk__add_summary(const pk_decomposition *part, pk_decomposition *whole)
{
    if (!whole->passes || pk__worse(part->worst_excess, whole->worst_excess)) {
        whole->worst_excess = part->worst_excess;
        whole->worst_row = part->worst_row;
        whole->worst_output = part->worst_output;
    }
    if (!whole->passes || pk__worse(part->worst_closure, whole->worst_closure))
        whole->worst_closure = part->worst_closure;
    if (!whole->passes || pk__worse(part->worst_relative, whole->worst_relative))
        whole->worst_relative = part->worst_relative;
    whole->raised += part->raised;
    whole->scale = part->scale > whole->scale ? part->scale : whole->scale;
    if (!whole->passes || pk__worse(part->worst_step_closure, whole->worst_step_closure)) {
        whole->worst_step_closure = part->worst_step_closure;
        whole->worst_step = part->worst_step;
        whole->worst_step_row = part->worst_step_row;
    }
    if (!whole->passes || pk__worse(part->worst_unattributed, whole->worst_unattributed)) {
        whole->worst_unattributed = part->worst_unattributed;
        whole->worst_unattributed_row = part->worst_unattributed_row;
        whole->worst_unattributed_output = part->worst_unattributed_output;
    }
    whole->points += part->points;
    whole->pieces += part->pieces;
    whole->refused += part->refused;
    whole->flops += part->flops;
    whole->passes += part->passes;
}

/* The status of a decomposition that was computed. The closure is judged first, because the other results mean nothing
 * without it. */
PK__PRIVATE pk_status pk__verdict(const pk__job *job, const pk_decomposition *whole)
{
    const int closed = whole->worst_excess <= 1;
    const int explained = whole->worst_unattributed <= whole->unattributed_limit;
    char text[400] = "";
    if (!explained)
        snprintf(
            text, sizeof text,
            "unattributed %.3g of max(1, |f|) at row %zu, output %zu exceeds %.3g, far more than rounding: the "
            "loss, optimizer, rates, batches or gradient scales that are declared did not train these weights, "
            "and "
            "contributions are those of the declared training",
            whole->worst_unattributed, whole->worst_unattributed_row, whole->worst_unattributed_output,
            whole->unattributed_limit);
    if (!closed)
        return pk__fail(
            job->context, PK_NOT_CLOSED,
            "closure is %.3g times what the tolerance %.3g allows at row %zu, output %zu; at worst it is "
            "%.3g of a row's largest output or contribution, %.3g of its largest contribution; the worst "
            "step is %zu (closure %.3g at row %zu)%s%s",
            whole->worst_excess, job->tolerance, whole->worst_row, whole->worst_output, whole->worst_closure,
            whole->worst_relative, whole->worst_step, whole->worst_step_closure, whole->worst_step_row,
            explained ? "" : "; and ", text);
    return explained ? PK_OK : pk__fail(job->context, PK_UNATTRIBUTED, "%s", text);
}

PK__END_CODE
/* <<< implementation */
#endif
