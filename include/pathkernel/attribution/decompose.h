/* pathkernel/attribution/decompose.h: the predictions of a recorded run, decomposed over its training examples to
 * rounding error, and certified.
 *
 *     h(f(w_S, x)) = initial + sum_i A(x, i) + decay + unattributed + closure
 *
 * (Domingos 2020; Bell et al. 2023, the exact path kernel.) With D_s = w_{s+1} - w_s and
 * Phi_s(x) = integral_0^1 grad_w h(f(w_s + t D_s, x)) dt, the left side is initial + sum_s Phi_s D_s. An
 * optimiser makes D_s linear in the examples' gradients g_i (optimizer.h: pk_linear_form), so that
 *
 *     A(x, i) = - sum_s scale_s c_{s,i} < E_s(x), g_{s,i} >,
 *     E_s = gain_s R_s + direct_s p_s o Phi_s,   R_s = carry_{s+1} R_{s+1} + enter_s p_s o Phi_s,   R_S = 0:
 *
 * stateful optimisers run in reverse time on the test side, without a vector per training example. decay is
 * the part of weight decay, unattributed that of u_s = D_s - (the update recomputed in double).
 */
#ifndef PATHKERNEL_DECOMPOSE_H
#define PATHKERNEL_DECOMPOSE_H
#include "plan.h"

/* >>> declarations */
PK__BEGIN_C

/* Decomposes h(f(w_S, inputs)) of a run. inputs: rows x input width. *out is zeroed first; release it also
 * after PK_NOT_CLOSED, which means: computed, but the worst closure exceeds the tolerance (the message names
 * row, output and step), and after PK_UNATTRIBUTED: computed, but the recorded weights are not those that the declared
 * training gives (the message names row and output), so that contributions are those of another rule. Cost per step: see docs/mathematics.md. Same bits for any number of threads and any
 * memory limit. Memory beyond the results: see pk_decompose_plan; the least is about 30 P numbers, whatever the
 * number of examples, test rows, outputs and steps, and the factors of the largest batch. */
PK_API PK__MUST_USE pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                                           const pk_decompose_options *options, pk_decomposition *out);

/* The same in parts: part(user, rows first_row .. first_row + rows - 1) is called from the calling thread as
 * each pass over the run ends, so that results larger than memory can be written and finished parts survive
 * a cancel. Its tensors are valid during the call. A status other than PK_OK ends the decomposition with it.
 * *summary (may be NULL) gets the sizes, the certificate and the costs over all parts, and no arrays. */
typedef pk_status pk_decomposition_part(void *user, const pk_decomposition *part);
PK_API PK__MUST_USE pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                 const pk_decompose_options *options,
                                                 pk_decomposition_part *part, void *user,
                                                 pk_decomposition *summary);

/* The same for the rows of an array of any type, such as one of pk_array_open: they are read as they are needed, and only those
 * of a part are held. Their shape is compared by pk_run_check_inputs. */
PK_API PK__MUST_USE pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run,
                                                       const pk_array *inputs,
                                                       const pk_decompose_options *options,
                                                       pk_decomposition_part *part, void *user,
                                                       pk_decomposition *summary);

/* How pk_decompose (in_parts: pk_decompose_parts) would cut the job for rows test rows under the context's memory limit,
 * and what that costs; nothing is computed. PK_MEMORY_LIMIT names the least that would do. */
PK_API PK__MUST_USE pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                                const pk_decompose_options *options, int in_parts,
                                                pk_plan *plan);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DECOMPOSE_IMPLEMENTED)
#define PATHKERNEL_DECOMPOSE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- the test side of one block over one window ------------------------------------------------------ */

/* In eight sums, so that a vector of them is added at a time. */
static double pk__sum(size_t count, const pk_real *x)
{
    double sums[8] = {0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            sums[k] += x[i + k];
    for (size_t k = 0; i < count; i++, k++)
        sums[k] += x[i];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/* Adds factor * tile (cells x count, ld PK__TILE_LD) of one column of by_layer, or of all (-1), to the results of the cells
 * from cell on. */
static void pk__add_cells(const pk__worker *worker, int layer, size_t cell, size_t cells, double factor,
                          size_t first, size_t count, const pk_real *tile)
{
    const pk__job *job = worker->job;
    pk_decomposition *part = job->part;
    const int64_t *items = worker->batch->items + first;
    const size_t outputs = job->outputs, level = layer < 0 ? 0 : (size_t)layer;
    for (const pk_real *from = tile; from < tile + cells * PK__TILE_LD; from += PK__TILE_LD, cell++) {
        const double sum = pk__sum(count, from);
        part->data[cell] += factor * sum;
        for (size_t k = 0; k < part->kept_count; k++) {
            const pk_tensor *tensor = &part->kept[k];
            unsigned axes = tensor->axes;
            size_t layers = axes & PK_BY_LAYER ? part->layers : 1, steps = axes & PK_BY_STEP ? part->steps : 1;
            size_t at = (axes & PK_BY_STEP ? worker->step * layers : 0) + (axes & PK_BY_LAYER ? level : 0);
            double *to = tensor->data + cell * (tensor->row_items / outputs) + at;
            if (axes == PK_BY_EXAMPLE && worker->batch->consecutive) {
                to += items[0];
                for (size_t b = 0; b < count; b++)
                    to[b] += factor * from[b];
            } else if (axes & PK_BY_EXAMPLE) {
                for (size_t b = 0; b < count; b++)
                    to[(size_t)items[b] * steps * layers] += factor * from[b];
            } else if (axes & PK_BY_GROUP) {
                for (size_t b = 0; b < count; b++)
                    to[(size_t)job->options->groups[items[b]] * steps * layers] += factor * from[b];
            } else {
                *to += factor * sum;
            }
        }
    }
}

/* The tile of a block of rows from the factored layers. */
static void pk__add_tile(void *user, int layer, size_t first, size_t count, const pk_real *tile)
{
    const pk__worker *worker = user;
    const pk__job *job = worker->job;
    const size_t outputs = job->outputs;
    layer = layer < 0 ? layer : worker->tangent.node[layer]->column;
    if (job->output_count == outputs) {
        pk__add_cells(worker, layer, worker->row * outputs, worker->rows * outputs, worker->factor, first,
                      count, tile);
        return;
    }
    for (size_t row = 0; row < worker->rows; row++)
        pk__add_cells(worker, layer, (worker->row + row) * outputs + job->first_output, job->output_count,
                      worker->factor, first, count, tile + (row * outputs + job->first_output) * PK__TILE_LD);
}

/* Weights of a layer that Phi keeps apart from its matrix. */
static size_t pk__bias_count(const pk_node *node)
{
    return pk__is_outer(node) && !node->shares && pk__has_bias(node) ? node->width : 0;
}

/* R of one layer of one row, outputs first .. first + count - 1, in the layout of Phi. */
typedef struct pk__part {
    const pk_node *node;
    size_t layer, row, first, count; /* row of the block */
    size_t bias, matrix;             /* weights of each output */
} pk__part;

/* Phi of a part, as it is stored: matrices, and biases elsewhere (inputs == NULL); or as outer products of cotangents and
 * one row of inputs, and the cotangents times bias_input. */
typedef struct pk__phi {
    const pk_real *matrices, *biases;
    const pk_real *cotangents, *inputs;
    pk_real bias_input;
} pk__phi;

/* R of the weights first .. first + count - 1 of a part a step back, and E where it is wanted. p (out x in, then out): NULL where
 * it is a scalar; state and e: matrices, then biases. */
static void pk__advance_range(const pk__part *part, size_t first, size_t count, const pk_linear_form *form,
                              double carry, const pk_real *p, const pk__phi *phi, pk_real *state, pk_real *e)
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

/* R of a part a step back, with the linear form of each range of its weights. next: forms of the step behind. */
static void pk__advance_state(const pk__job *job, const pk__part *part, const pk_linear_form *forms,
                              const pk_linear_form *next, const pk_real *p, const pk__phi *phi, pk_real *state,
                              pk_real *e)
{
    const pk_parameter_groups *groups = &job->run->groups;
    if (!job->grouped) {
        pk__advance_range(part, 0, part->matrix + part->bias, forms, next->carry, p, phi, state, e);
        return;
    }
    /* With ties: each tensor is in one group, wherever it is used. */
    for (size_t i = 0; i < job->graph->piece_count; i++) {
        const pk_tensor_use *piece = &job->graph->pieces[i];
        const pk_parameter_range *range = groups->range;
        if (&job->graph->nodes[piece->node] != part->node)
            continue;
        while (piece->flat >= range->first + range->count)
            range++;
        pk__advance_range(part, piece->spread - part->node->weight_offset, piece->count, &forms[range->group],
                          next[range->group].carry, p, phi, state, e);
    }
    for (size_t r = 0; !job->graph->pieces && r < groups->range_count; r++) {
        const pk_parameter_range *range = &groups->range[r];
        size_t first;
        const size_t count = pk__range_part(range, part->node->weight_offset, part->node->weight_count, &first);
        if (count)
            pk__advance_range(part, first, count, &forms[range->group], next[range->group].carry, p, phi, state,
                              e);
    }
}

/* < e_k, v > for e laid out like Phi of a part and v like the layer's weights. */
static double pk__dot_part(const pk__part *part, size_t k, const pk_real *e, const pk_real *v)
{
    return (double)pk__dot(part->matrix, e + k * part->matrix, v) +
           (double)pk__dot(part->bias, e + part->count * part->matrix + k * part->bias, v + part->matrix);
}

/* The same of what the node brings into w itself: e whole, weights of the whole graph. */
static double pk__dot_own(const pk__part *part, size_t k, const pk_real *e, const pk_real *weights)
{
    const pk_node *node = part->node;
    double sum = 0;
    for (int tensor = 0; tensor < 2; tensor++) {
        const size_t at = tensor ? node->weight_count - node->bias_count : 0;
        if (!node->tied[tensor])
            sum += (double)pk__dot(pk__tensor_count(node, tensor), e + k * part->matrix + at,
                                   weights + node->weight_offset + at);
    }
    return sum;
}

/* The tile of a row, all outputs, with block number `block` of the examples. */
static pk_real *pk__row_tile(const pk__worker *worker, size_t block)
{
    return worker->tile + block * worker->job->outputs * PK__TILE_LD;
}

/* The factor of a step's inner products. Where a step has no direct part and no groups, E = gain R is not copied: R is
 * contracted in its place, and gain belongs to the factor. */
static double pk__entry_factor(const pk__worker *worker, const pk_linear_form *form)
{
    const pk__job *job = worker->job;
    return worker->factor * (job->reverse && !job->grouped && form->direct == 0 ? form->gain : 1);
}

/* The row's tiles += < e, g_b > of a part. */
static void pk__contract_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *e)
{
    const size_t examples = worker->job->window.batches[j].count;
    for (size_t first = 0; first < examples; first += PK__EXAMPLE_BLOCK)
        pk__integral_contract_row(&worker->tangent, part->layer, part->count, e, first,
                                  pk__min(PK__EXAMPLE_BLOCK, examples - first),
                                  pk__row_tile(worker, first / PK__EXAMPLE_BLOCK) + part->first * PK__TILE_LD);
}

/* The row's tiles, of one column or of all, added to the results; then zero. */
static void pk__add_row(pk__worker *worker, size_t row, int column, size_t j, double factor)
{
    const pk__job *job = worker->job;
    const size_t examples = job->window.batches[j].count, first_output = job->first_output;
    const double start = pk__seconds();
    for (size_t first = 0; first < examples; first += PK__EXAMPLE_BLOCK) {
        pk_real *tile = pk__row_tile(worker, first / PK__EXAMPLE_BLOCK) + first_output * PK__TILE_LD;
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, examples - first);
        pk__add_cells(worker, column, (worker->row + row) * job->outputs + first_output, job->output_count,
                      factor, first, count, tile);
        pk__clear_tile(job->output_count, count, tile);
    }
    worker->tangent.seconds_contraction += pk__seconds() - start; /* as the factored layers' tiles count */
}

/* The part's tiles, tensor by tensor, added to the columns of the nodes that bring these into w. */
static void pk__contract_columns(pk__worker *worker, const pk__part *part, size_t j, const pk_real *e)
{
    const pk__job *job = worker->job;
    const pk_node *node = part->node;
    const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
    const double factor = pk__entry_factor(worker, form);
    const size_t weights = node->weight_count;
    for (int tensor = 0; tensor < 2; tensor++) {
        const size_t count = pk__tensor_count(node, tensor), at = tensor ? weights - node->bias_count : 0;
        if (!count)
            continue;
        memset(worker->tensor, 0, part->count * weights * sizeof *worker->tensor);
        for (size_t k = 0; k < part->count; k++)
            memcpy(worker->tensor + k * weights + at, e + k * weights + at, count * sizeof *e);
        pk__contract_part(worker, part, j, worker->tensor);
        const pk_node *owner = node->tied[tensor] ? &job->graph->nodes[node->tied[tensor]] : node;
        pk__add_row(worker, part->row, owner->column, j, factor);
    }
}

/* |factor| < error, |g_b| > of a part added to the bounds. */
static void pk__bound_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *error)
{
    pk__job *job = worker->job;
    const size_t cell = (worker->row + part->row) * job->outputs + part->first;
    const pk_batch *batch = &job->window.batches[j];
    worker->tangent.examples = &job->window.magnitudes[j];
    for (size_t first = 0; first < batch->count; first += PK__EXAMPLE_BLOCK) {
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, batch->count - first);
        pk__clear_tile(part->count, count, worker->bound_tile);
        pk__integral_contract_row(&worker->tangent, part->layer, part->count, error, first, count,
                                  worker->bound_tile);
        for (size_t k = 0; k < part->count; k++)
            for (size_t b = 0; b < count; b++)
                job->part->bounds[(cell + k) * job->part->examples + (size_t)batch->items[first + b]] +=
                    fabs(worker->factor) * (double)worker->bound_tile[k * PK__TILE_LD + b];
    }
    worker->tangent.examples = &job->window.examples[j];
}

/* One part whose Phi is materialised: E (through R in reverse time), coupled decay, the contraction with the batch, and
 * the bounds by the same way with absolute values. */
static void pk__materialised_part(pk__worker *worker, const pk__part *part, size_t j,
                                  const pk_linear_form *next)
{
    pk__job *job = worker->job;
    pk__window *window = &job->window;
    const pk_linear_form *form = &window->forms[j * window->form_count];
    const size_t U = window->spread, offset = part->node->weight_offset;
    const size_t cell = (worker->row + part->row) * job->outputs;
    /* R: row after row, layer after layer, part after part. */
    size_t at = 0;
    if (job->reverse) {
        const size_t *before = job->state_at + part->layer, all = job->state_at[job->graph->layers];
        at = (worker->row + part->row) * job->plan.outputs * all + job->output_count * before[0] +
             (part->first - job->first_output) * (before[1] - before[0]);
    }
    const pk_real *p =
        window->use_preconditioner ? window->use_preconditioner + j * window->uses_pitch + offset : NULL;
    const pk_real *e = worker->phi;
    pk__phi phi = {NULL, NULL, NULL, NULL, 0};
    if (!job->reverse || job->part->bounds) {
        pk__integral_row_phi(&worker->tangent, part->layer, part->row, part->first, part->count, worker->phi);
        phi.matrices = worker->phi;
        phi.biases = worker->phi + part->count * part->matrix;
    } else if (worker->tangent.phi[part->layer])
        pk__row_view(&worker->tangent, part->layer, part->row, part->first, &phi.matrices, &phi.biases);
    else
        phi.bias_input = pk__row_factors(&worker->tangent, part->layer, part->row, part->first, &phi.cotangents,
                                         &phi.inputs);
    if (job->reverse) {
        /* Without a direct part E is gain R: no copy is needed. */
        const int direct = job->grouped || form->direct != 0;
        e = direct ? worker->effective : job->reverse_state + at;
        pk__advance_state(job, part, form, next, p, &phi, job->reverse_state + at,
                          direct ? worker->effective : NULL);
        for (size_t k = 0; job->grouped && !window->decoupled && k < part->count; k++)
            job->part->decay[cell + part->first + k] -=
                (part->node->shares ? pk__dot_own(part, k, e, window->use_decayed + j * U)
                                    : pk__dot_part(part, k, e, window->use_decayed + j * U + offset));
        for (size_t k = 0; !job->grouped && form->coupled != 0 && k < part->count; k++)
            job->part->decay[cell + part->first + k] -=
                form->coupled * (direct ? 1 : form->gain) *
                (part->node->shares ? pk__dot_own(part, k, e, window->use_weights + j * U)
                                    : pk__dot_part(part, k, e, window->use_weights + j * U + offset));
    }
    if (worker->tangent.per_layer && part->node->shares)
        pk__contract_columns(worker, part, j, e);
    else
        pk__contract_part(worker, part, j, e);
    if (!job->part->bounds)
        return;
    const size_t numbers = part->count * part->node->weight_count, matrix = part->count * part->matrix;
    pk_real *error = worker->effective;
    pk__integral_row_error(&worker->tangent, part->layer, part->row, part->first, part->count, error);
    if (job->reverse) {
        if (window->use_preconditioner_error) {
            /* |error of p Phi| <= p (|error of Phi| + |error of p| / p |Phi|), and p > 0. */
            const pk_real *slack = window->use_preconditioner_error + j * window->uses_pitch + offset;
            for (size_t i = 0; i < numbers; i++) {
                const size_t w = i < matrix ? i % part->matrix : part->matrix + (i - matrix) % part->bias;
                error[i] += p[w] > 0 ? slack[w] / p[w] * (pk_real)fabs(worker->phi[i]) : 0;
            }
        }
        phi.matrices = error;
        phi.biases = error + matrix;
        pk__advance_state(job, part, form, next, p, &phi, job->reverse_error + at, error);
    }
    pk__bound_part(worker, part, j, error);
}

static void pk__materialised_layer(pk__worker *worker, size_t row, size_t layer, size_t j,
                                   const pk_linear_form *next)
{
    const pk__job *job = worker->job;
    pk__part part;
    part.node = worker->tangent.node[layer];
    part.layer = layer;
    part.row = row;
    part.bias = pk__bias_count(part.node);
    part.matrix = part.node->weight_count - part.bias;
    const size_t last = job->first_output + job->output_count;
    /* Copies of a part should stay in the cache; where R is used as it stands there are none. */
    const int copied = !job->reverse || job->direct || job->part->bounds != NULL;
    const size_t each = copied ? pk__part_outputs(part.node, job->unit) : job->unit;
    for (size_t unit = job->first_output; unit < last; unit += job->unit) {
        const size_t end = pk__min(unit + job->unit, last);
        for (part.first = unit; part.first < end; part.first += part.count) {
            part.count = pk__min(each, end - part.first);
            pk__materialised_part(worker, &part, j, next);
        }
    }
}

/* The layers of a step whose Phi is materialised. */
static void pk__materialised_layers(pk__worker *worker, size_t j, const pk_linear_form *next)
{
    const pk__job *job = worker->job;
    const pk__integral *tangent = &worker->tangent;
    const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
    const double factor = pk__entry_factor(worker, form);
    size_t layers = 0;
    for (size_t l = 0; l < job->graph->layers; l++)
        layers += tangent->integrated[l] != 0;
    for (size_t row = 0; layers && row < worker->rows; row++) {
        for (size_t l = 0; l < job->graph->layers; l++) {
            if (!tangent->integrated[l])
                continue;
            pk__materialised_layer(worker, row, l, j, next);
            if (tangent->per_layer)
                if (!tangent->node[l]->shares) /* else each of its tensors went to its own column */
                    pk__add_row(worker, row, tangent->node[l]->column, j, factor);
        }
        if (!tangent->per_layer)
            pk__add_row(worker, row, -1, j, factor);
    }
}

/* What a step adds beside its examples, and its own closure. */
static void pk__close_step(pk__worker *worker, pk__block_state *block, size_t j, size_t step)
{
    pk__job *job = worker->job;
    pk_decomposition *part = job->part;
    const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
    const pk_real *ends = pk__integrator_ends(&worker->tangent.integrator);
    double linear = job->grouped ? 1 : form->decoupled; /* with groups it is in the direction */
    if (!job->reverse)
        linear += form->rate * (form->direct + form->gain * form->enter) * form->coupled;
    for (size_t i = 0; i < worker->rows * job->outputs; i++) {
        const size_t cell = worker->row * job->outputs + i, output = i % job->outputs;
        if (output < job->first_output || output >= job->first_output + job->output_count)
            continue;
        const pk_real *start = ends + (2 * (i / job->outputs) * job->outputs + output),
                      *end = start + job->outputs;
        double closure = (double)(*end - *start) - (double)worker->tangent.along[0][i];
        job->variation[cell] += fabs((double)worker->tangent.along[0][i]);
        part->unattributed[cell] += worker->tangent.along[1][i];
        if (worker->tangent.directions[2])
            part->decay[cell] -= linear * worker->tangent.along[2][i];
        if (part->step_closure)
            part->step_closure[cell * part->steps + step] = closure;
        /* Of equals the first step, then the first row, in whatever order they are met. */
        const size_t row = part->first_row + worker->row + i / job->outputs;
        const int before = step < block->worst_step || (step == block->worst_step && row < block->worst_row);
        if (pk__worse(fabs(closure), block->worst) || (fabs(closure) == block->worst && before)) {
            block->worst = fabs(closure);
            block->worst_step = step;
            block->worst_row = row;
        }
    }
}

static void pk__block_window(pk__worker *worker, size_t number, size_t first, size_t count)
{
    pk__job *job = worker->job;
    pk__block_state *block = &job->blocks[number];
    pk__integral *tangent = &worker->tangent;
    const size_t U = job->window.spread;
    const double begin = pk__seconds(), before = tangent->seconds_sums + tangent->seconds_contraction;
    worker->row = number * job->block;
    worker->rows = pk__min(job->block, job->part->rows - worker->row);
    tangent->integrator.state = job->row_state + worker->row;
    tangent->integrator.points_last = block->points_last;
    tangent->integrator.point_count = tangent->integrator.split_pieces = tangent->integrator.refused = 0;
    tangent->flops = 0;
    tangent->gram = job->gram ? job->gram + worker->row * job->gram_ld : NULL;
    tangent->gram_ld = job->gram_ld;
    tangent->sink = pk__add_tile;
    tangent->user = worker;
    tangent->first_output = job->first_output;
    tangent->output_count = job->output_count;
    tangent->per_layer = 0;
    for (size_t k = 0; k < job->part->kept_count; k++)
        tangent->per_layer |= (job->part->kept[k].axes & PK_BY_LAYER) != 0;
    for (size_t i = 0; i < count; i++) {
        size_t j = job->reverse ? count - 1 - i : i;
        const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
        double scale = pk_run_gradient_scale(job->run, first + j);
        worker->step = first + j;
        worker->batch = &job->window.examples[j];
        worker->factor =
            job->reverse ? -scale : -scale * form->rate * (form->direct + form->gain * form->enter);
        tangent->examples = &job->window.examples[j];
        tangent->directions[0] = job->window.use_direction + j * U;
        tangent->directions[1] = job->window.use_remainder + j * U;
        tangent->directions[2] = !job->decays   ? NULL
                                 : job->grouped ? job->window.use_decayed + j * U
                                                : job->window.use_weights + j * U;
        pk__integral_step(tangent, job->window.use_weights + j * U, job->window.use_direction + j * U,
                          job->window.transposed ? job->window.transposed + j * 2 * U : NULL,
                          job->part->first_row + worker->row, worker->rows,
                          job->rows + worker->row * job->graph->input_width,
                          job->reverse ? PK_ENGINE_INTEGRATED : job->options->engine);
        if (job->graph->pieces)
            pk__integral_share(tangent);
        pk__materialised_layers(
            worker, j, j + 1 < count ? job->window.forms + (j + 1) * job->window.form_count : job->next_forms);
        pk__close_step(worker, block, j, first + j);
    }
    block->points_last = tangent->integrator.points_last;
    if (job->first_output == 0) { /* they are the same for every slice of the outputs */
        block->points += tangent->integrator.point_count;
        block->pieces += tangent->integrator.split_pieces;
        block->refused += tangent->integrator.refused;
    }
    block->flops += tangent->flops;
    worker->seconds_test +=
        pk__seconds() - begin - (tangent->seconds_sums + tangent->seconds_contraction - before);
}

/* ---- one pass over the run ----------------------------------------------------------------------------- */

/* Gram matrix of the pass's rows and the training inputs: the first layer's share, the same at every step. */
static void pk__fill_gram(pk__job *job)
{
    const size_t in = job->graph->input_width, N = job->run->examples;
    const size_t blocks = pk__blocks(N, PK__EXAMPLE_BLOCK);
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__worker *worker = &job->workers[pk__thread()];
        size_t first = b * PK__EXAMPLE_BLOCK, count = pk__min(PK__EXAMPLE_BLOCK, N - first);
        int64_t items[PK__EXAMPLE_BLOCK];
        for (size_t i = 0; i < count; i++)
            items[i] = (int64_t)(first + i);
        pk_dataset_inputs(&job->run->train, items, count, worker->left_inputs);
        for (size_t row = 0; row < job->part->rows; row += job->block)
            pk__gemm(0, 1, pk__min(job->block, job->part->rows - row), count, in, 1, job->rows + row * in, in,
                     worker->left_inputs, in, 0, job->gram + row * job->gram_ld + first, job->gram_ld);
    }
    pk__team_end(&team);
}

/* h(f(w_s, x)) of the pass's rows, block by block in the workers' memory. */
static pk_status pk__predict(pk__job *job, size_t step, double *h)
{
    const pk_graph *graph = job->graph;
    const size_t rows = job->part->rows, classes = graph->output_width, outputs = job->outputs;
    const size_t blocks = pk__blocks(rows, job->block);
    pk_status status = pk_replay_weights(job->context, &job->window.replay, step, job->window.weights);
    if (status)
        return status;
    if (graph->pieces)
        pk_graph_spread(graph, job->window.weights, job->window.use_weights);
    const pk__line line = {job->window.use_weights, NULL, NULL};
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__integrator *integrator = &job->workers[pk__thread()].tangent.integrator;
        pk__tape *tape = &integrator->path.tape;
        size_t first = b * job->block, count = pk__min(job->block, rows - first);
        pk__pass_forward(tape, &line, count, job->rows + first * graph->input_width);
        for (size_t r = 0; r < count; r++) {
            pk__readout_apply(&job->options->readout, classes, job->part->first_row + first + r,
                              pk__pass_output(tape) + r * classes, integrator->h, integrator->slope);
            for (size_t k = 0; k < outputs; k++)
                h[(first + r) * outputs + k] = integrator->h[k];
        }
    }
    pk__team_end(&team);
    return PK_OK;
}

/* The largest unattributed term that is taken for rounding, from the precision of the run's last weights. */
static double pk__unattributed_limit(const pk__job *job, const pk_real *weights)
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

/* The largest |x|, at least `largest`; numbers that are not finite do not count. */
static double pk__largest(size_t count, const double *x, double largest)
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

/* No bound of a cell is below rounding of the largest contribution of an example to its row. They must explain the cell's
 * closure, but for the closure's own rounding; else they are raised. */
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

static void pk__certify_row(pk__job *job, size_t row)
{
    pk_decomposition *part = job->part;
    const size_t outputs = part->outputs, first = row * outputs;
    for (size_t i = first; i < first + outputs; i++)
        part->closure[i] =
            part->final[i] - part->initial[i] - part->data[i] - part->decay[i] - part->unattributed[i];
    double height = pk__largest(outputs, part->initial + first, 0);
    height = pk__largest(outputs, part->final + first, height);
    double largest = pk__largest(outputs, job->variation + first, 0);
    largest = pk__largest(outputs, part->data + first, largest);
    largest = pk__largest(outputs, part->decay + first, largest);
    largest = pk__largest(outputs, part->unattributed + first, largest);
    for (size_t k = 0; k < part->kept_count; k++) {
        const size_t items = part->kept[k].row_items;
        largest = items ? pk__largest(items, part->kept[k].data + row * items, largest) : largest;
    }
    const double scale = height > largest ? height : largest;
    const double floor = (job->tolerance < PK_CLOSURE_ROUNDING ? job->tolerance : PK_CLOSURE_ROUNDING) * height;
    const double allowed = job->tolerance * largest > floor ? job->tolerance * largest : floor;
    part->scale = scale > part->scale ? scale : part->scale;
    const size_t entries = outputs * part->examples;
    const double entry =
        part->bounds && part->by_example ? pk__largest(entries, part->by_example + row * entries, 0) : 0;
    for (size_t i = first; i < first + outputs; i++) {
        const double closure = fabs(part->closure[i]), excess = pk__part_of(closure, allowed);
        if (pk__worse(pk__part_of(closure, scale), part->worst_closure))
            part->worst_closure = pk__part_of(closure, scale);
        if (pk__worse(pk__part_of(closure, largest), part->worst_relative))
            part->worst_relative = pk__part_of(closure, largest);
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
            pk__raise_bounds(job, i, height, entry);
    }
}

static void pk__certify(pk__job *job)
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

/* Sets the state of each row before the first step from its outputs at both ends of the run. */
static void pk__begin_rows(pk__job *job)
{
    const pk_decomposition *part = job->part;
    for (size_t row = 0; row < part->rows; row++) {
        pk__row_state *state = &job->row_state[row];
        memset(state, 0, sizeof *state);
        state->order.nodes = PK__FIRST_NODES;
        for (size_t i = row * part->outputs; i < (row + 1) * part->outputs; i++) {
            const double change = part->final[i] - part->initial[i];
            state->height = pk__largest(1, &part->initial[i], state->height);
            state->height = pk__largest(1, &part->final[i], state->height);
            state->change = pk__largest(1, &change, state->change);
        }
        state->change /= (double)pk__max(job->run->steps, 1);
    }
}

/* A pass over the run with the outputs first_output .. first_output + output_count - 1 of the part's rows. */
static pk_status pk__pass(pk__job *job, double done, double share)
{
    const size_t in = job->graph->input_width, steps = job->run->steps;
    const size_t window = job->plan.window, windows = job->window.windows;
    const size_t blocks = pk__blocks(job->part->rows, job->block);
    for (size_t r = 0; r < job->part->rows; r++) {
        const size_t row = job->part->first_row + r;
        if (job->input_array) {
            pk_status status = pk_array_read(job->context, job->input_array, row * in, in, job->rows + r * in);
            if (status)
                return pk__prefix(job->context, status, "inputs: the file ");
        } else {
            memcpy(job->rows + r * in, job->inputs.data + row * job->inputs.ld, in * sizeof(pk_real));
        }
    }
    if (job->first_output == 0) {
        pk_status status = pk__predict(job, 0, job->part->initial);
        if (!status)
            status = pk__predict(job, steps, job->part->final);
        if (status)
            return status;
        job->unattributed = pk__unattributed_limit(job, job->window.weights);
        memset(job->blocks, 0, blocks * sizeof *job->blocks);
        memset(job->variation, 0, job->part->rows * job->outputs * sizeof *job->variation);
        if (job->gram)
            pk__fill_gram(job);
    }
    for (size_t b = 0; b < blocks; b++)
        job->blocks[b].points_last = 0;
    pk__begin_rows(job);
    const size_t numbers =
        job->reverse ? job->part->rows * job->plan.outputs * job->state_at[job->graph->layers] : 0;
    if (job->reverse_error)
        memset(job->reverse_error, 0, numbers * sizeof(pk_real));
    if (job->reverse)
        memset(job->reverse_state, 0, numbers * sizeof(pk_real));
    memset(job->next_forms, 0, job->window.form_count * sizeof *job->next_forms);
    for (size_t i = 0; i < windows; i++) {
        size_t w = job->reverse ? windows - 1 - i : i;
        size_t first = w * window, count = pk__min(window, steps - first);
        pk_status status =
            pk__progress(job->context, "decomposing", done + share * (double)i / (double)windows);
        if (status)
            return status;
        status = pk__steps_visit(job->context, &job->window, w);
        if (status)
            return status;
        pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
        PK__PARALLEL(team)
        for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team))
            pk__block_window(&job->workers[pk__thread()], b, first, count);
        pk__team_end(&team);
        memcpy(job->next_forms, job->window.forms, job->window.form_count * sizeof *job->next_forms);
    }
    return PK_OK;
}

/* Pass after pass, all outputs of the part's rows: done and share of the whole are theirs. */
static pk_status pk__passes(pk__job *job, double done, double share)
{
    const size_t outputs = job->outputs;
    for (size_t first = 0; first < outputs; first += job->plan.outputs) {
        job->first_output = first;
        job->output_count = pk__min(job->plan.outputs, outputs - first);
        pk_status status = pk__pass(job, done + share * (double)first / (double)outputs,
                                    share * (double)job->output_count / (double)outputs);
        if (status)
            return status;
    }
    pk__certify(job);
    return PK_OK;
}

/* ---- the calls ------------------------------------------------------------------------------------------- */

static pk_status pk__check_inputs(pk_context *context, const pk_run *run, pk_matrix inputs)
{
    if (inputs.rows == 0 || !inputs.data || inputs.cols != run->graph.input_width || inputs.ld < inputs.cols)
        return pk__fail(context, PK_SHAPE, "inputs are %zu x %zu (ld %zu); the network takes rows of %zu",
                        inputs.rows, inputs.cols, inputs.ld, run->graph.input_width);
    for (size_t r = 0; r < inputs.rows; r++)
        for (size_t j = 0; j < inputs.cols; j++)
            if (!isfinite(inputs.data[r * inputs.ld + j]))
                return pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, column %zu is not finite", r, j);
    for (size_t r = 0; run->graph.checked && r < inputs.rows; r++) {
        pk_status status = pk_graph_check_inputs(context, &run->graph, r, inputs.data + r * inputs.ld);
        if (status)
            return pk__prefix(context, status, "inputs: ");
    }
    return PK_OK;
}

/* The numbers of an array, row by row. */
static pk_status pk__check_array(pk_context *context, const pk_run *run, const pk_array *inputs)
{
    const size_t width = run->graph.input_width;
    pk_real *row = NULL;
    pk_status status = pk_allocate(context, width, sizeof *row, "a row of inputs", &row);
    for (size_t r = 0; !status && r < inputs->shape[0]; r++) {
        status = pk_array_read(context, inputs, r * width, width, row);
        if (status)
            status = pk__prefix(context, status, "inputs: the file ");
        for (size_t j = 0; !status && j < width; j++)
            if (!isfinite(row[j]))
                status = pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, number %zu is not finite", r, j);
        if (!status && run->graph.checked)
            status = pk__prefix(context, pk_graph_check_inputs(context, &run->graph, r, row), "inputs: ");
    }
    pk_release(context, row);
    return status;
}

static pk_status pk__check_options(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options)
{
    const pk_readout *readout = &options->readout;
    if (!(options->tolerance >= 0) || !isfinite(options->tolerance))
        return pk__fail(context, PK_ARGUMENT, "a tolerance of %g", options->tolerance);
    if (!(options->unattributed >= 0))
        return pk__fail(context, PK_ARGUMENT, "a limit of %g for what is unattributed", options->unattributed);
    if ((int)readout->kind < 0 || readout->kind > PK_READOUT_FUNCTION ||
        (readout->kind == PK_READOUT_FUNCTION && (!readout->function || !readout->count)) ||
        (readout->kind == PK_READOUT_LABEL && !readout->labels))
        return pk__fail(context, PK_ARGUMENT, "the readout lacks its function, its count or its labels");
    if (readout->kind == PK_READOUT_ONE && readout->output >= run->outputs)
        return pk__fail(context, PK_ARGUMENT, "output %zu of a network with %zu outputs", readout->output,
                        run->outputs);
    for (size_t r = 0; readout->kind == PK_READOUT_LABEL && r < rows; r++)
        if (readout->labels[r] < 0 || (size_t)readout->labels[r] >= run->outputs)
            return pk__fail(context, PK_ARGUMENT, "label %lld of input %zu, of a network with %zu outputs",
                            (long long)readout->labels[r], r, run->outputs);
    for (size_t i = 0; options->groups && i < run->examples; i++)
        if (options->groups[i] < 0 || (size_t)options->groups[i] >= options->group_count)
            return pk__fail(context, PK_ARGUMENT, "example %zu is in group %lld of %zu", i,
                            (long long)options->groups[i], options->group_count);
    if ((int)options->engine < 0 || options->engine > PK_ENGINE_INTEGRATED)
        return pk__fail(context, PK_ARGUMENT, "engine %d does not exist", (int)options->engine);
    if (options->bounds && options->quadrature.rule != PK_RULE_AUTO &&
        options->quadrature.rule != PK_RULE_EXACT)
        return pk__fail(context, PK_UNSUPPORTED, "bounds need a rule that measures its error: auto or exact");
    return pk_quadrature_check(context, &options->quadrature, &run->graph, readout);
}

static void pk__add_summary(const pk_decomposition *part, pk_decomposition *whole)
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

/* The status of a decomposition that was computed. The closure is judged first: where it is open, nothing else holds. */
static pk_status pk__verdict(const pk__job *job, const pk_decomposition *whole)
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

/* Passes over all rows. whole has its arrays, or a part callback is there and each pass has own ones. */
static pk_status pk__run_passes(pk__job *job, pk_decomposition *whole, pk_decomposition_part *callback,
                                void *user)
{
    const size_t rows = whole->rows;
    double start = pk__seconds();
    pk_status status =
        job->window.stride && job->run->steps ? pk__steps_save_states(job->context, &job->window) : PK_OK;
    for (size_t first = 0; !status && first < rows; first += job->plan.rows) {
        size_t count = pk__min(job->plan.rows, rows - first);
        pk_decomposition part;
        if (callback) {
            part = *whole;
            part.first_row = first;
            part.rows = count;
            status = pk__allocate_results(job->context, job->options, &part);
        } else {
            pk__view_rows(whole, first, count, &part);
        }
        job->part = &part;
        if (!status)
            status = pk__passes(job, (double)first / (double)rows, (double)count / (double)rows);
        if (!status) {
            part.passes = pk__blocks(job->outputs, job->plan.outputs);
            pk__add_summary(&part, whole);
            if (callback)
                status = callback(user, &part);
        }
        if (callback)
            pk_decomposition_release(job->context, &part);
    }
    for (size_t w = 0; w < job->plan.threads; w++) {
        whole->seconds_examples += job->window.seconds[w];
        whole->seconds_test += job->workers[w].seconds_test;
        whole->seconds_sums += job->workers[w].tangent.seconds_sums;
        whole->seconds_contraction += job->workers[w].tangent.seconds_contraction;
    }
    whole->seconds_read = job->window.seconds_read;
    whole->seconds = pk__seconds() - start;
    whole->unattributed_limit = job->unattributed;
    if (!(job->options->unattributed > 0) && whole->scale < 1)
        whole->unattributed_limit *= whole->scale;
    return status ? status : pk__verdict(job, whole);
}

/* The sizes of the result, the job and its plan, for inputs or for a number of rows without any. */
static pk_status pk__plan_job(pk__job *job, pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, int by_pass, pk_decomposition *whole)
{
    memset(whole, 0, sizeof *whole);
    pk_status status = pk__check_options(context, run, inputs.rows, options);
    if (status)
        return status;
    whole->rows = inputs.rows;
    whole->outputs = pk_readout_count(&options->readout, run->graph.output_width);
    whole->examples = run->examples;
    whole->groups = options->group_count;
    whole->steps = run->steps;
    whole->layers = run->graph.columns;
    status = pk__keep(context, options, whole);
    if (status)
        return status;
    pk__job_begin(job, context, run, inputs, options);
    return pk__job_plan(job, inputs.rows, pk__result_bytes(whole, options), by_pass);
}

/* array, where it is not NULL, in place of inputs. */
static pk_status pk__decompose(pk_context *context, const pk_run *run, pk_matrix inputs, const pk_array *array,
                               const pk_decompose_options *options, pk_decomposition *whole,
                               pk_decomposition_part *callback, void *user)
{
    pk__job own_job, *job = &own_job;
    pk_decompose_options defaults;
    memset(&defaults, 0, sizeof defaults);
    memset(job, 0, sizeof *job);
    options = options ? options : &defaults;
    pk_status status =
        array ? pk_run_check_inputs(context, run, array, "inputs") : pk__check_inputs(context, run, inputs);
    memset(whole, 0, sizeof *whole);
    if (!status && array)
        inputs.rows = array->shape[0];
    if (!status && !inputs.rows)
        status = pk__fail(context, PK_SHAPE, "inputs: there are none");
    if (!status)
        status = pk__plan_job(job, context, run, inputs, options, callback != NULL, whole);
    if (status)
        return status;
    job->input_array = array;
    if (array) /* with memory of its own, less than that of the job */
        status = pk__check_array(context, run, array);
    if (status)
        return status;
    if (!callback)
        status = pk__allocate_results(context, options, whole);
    pk__arena arena = {NULL, 0, 0, 0};
    if (!status) {
        pk__job_layout(job, &arena);
        status = pk_allocate(context, 1, arena.used, "the decomposition's work", &job->memory);
    }
    if (!status) {
        pk__arena own = {job->memory, arena.used, 0, 0};
        pk__job_layout(job, &own);
        status = pk__run_passes(job, whole, callback, user);
    }
    pk_release(context, job->memory);
    return status;
}

PK_API pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, pk_decomposition *out)
{
    pk_status status = pk__decompose(context, run, inputs, NULL, options, out, NULL, NULL);
    if (status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED)
        pk_decomposition_release(context, out);
    return status;
}

static pk_status pk__decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                     const pk_array *array, const pk_decompose_options *options,
                                     pk_decomposition_part *part, void *user, pk_decomposition *summary)
{
    pk_decomposition own;
    if (!part)
        return pk__fail(context, PK_ARGUMENT, "decomposing in parts needs a function that takes them");
    summary = summary ? summary : &own;
    pk_status status = pk__decompose(context, run, inputs, array, options, summary, part, user);
    memset(summary->kept, 0, sizeof summary->kept);
    summary->kept_count = 0;
    return status;
}

PK_API pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                    const pk_decompose_options *options, pk_decomposition_part *part,
                                    void *user, pk_decomposition *summary)
{
    return pk__decompose_parts(context, run, inputs, NULL, options, part, user, summary);
}

PK_API pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run, const pk_array *inputs,
                                          const pk_decompose_options *options, pk_decomposition_part *part,
                                          void *user, pk_decomposition *summary)
{
    const pk_matrix none = {NULL, 0, 0, 0};
    if (!inputs)
        return pk__fail(context, PK_ARGUMENT, "inputs: no array");
    return pk__decompose_parts(context, run, none, inputs, options, part, user, summary);
}

PK_API pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options, int in_parts, pk_plan *plan)
{
    pk__job job;
    pk_decompose_options defaults;
    pk_decomposition whole;
    memset(&defaults, 0, sizeof defaults);
    memset(&job, 0, sizeof job);
    if (!run || !plan || !rows)
        return pk__fail(context, PK_ARGUMENT, "pk_decompose_plan: no run, no rows or no place for the plan");
    const pk_matrix inputs = {NULL, rows, run->graph.input_width, run->graph.input_width};
    pk_status status =
        pk__plan_job(&job, context, run, inputs, options ? options : &defaults, in_parts, &whole);
    if (!status)
        *plan = job.plan;
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
