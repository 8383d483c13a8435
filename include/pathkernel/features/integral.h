/* pathkernel/features/integral.h: the gradients of a block of test rows' outputs, integrated along a step:
 *
 *     pk__integral_begin(&integral, &step);
 *     while (pk__integral_next(&integral, &points)) {
 *         pk__integral_pass(&integral, points);      values and cotangents at the points
 *         pk__integral_add(&integral, points);       sums over the points
 *         ...                                        what else needs these: see tiles.h
 *     }
 *     pk__integral_end(&integral);
 *
 * The quadrature (path/integrator.h) gives points in batches, which are cut into parts that are reversed together. After
 * the last part `along` holds the products with the step's directions, and pk__integral_row_phi gives Phi, row by row, of
 * the layers whose Phi is stored or is an outer product.
 */
#ifndef PATHKERNEL_INTEGRAL_H
#define PATHKERNEL_INTEGRAL_H
#include "sums.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_INTEGRAL_INTERNALS_KNOWN)
#define PATHKERNEL_INTEGRAL_INTERNALS_KNOWN
/* >>> internals */
/* Starts a step. */
PK__INTERNAL void pk__integral_begin(pk__integral *integral, const pk__integral_step *step);
/* Sets *points to the next points, those of a row side by side, which are valid until the next call; returns 0 after the
 * last ones. The last points, which may be none, have `last` set. */
PK__INTERNAL int pk__integral_next(pk__integral *integral, const pk__points **points);
/* Values and cotangents of the network at the points. */
PK__INTERNAL void pk__integral_pass(pk__integral *integral, const pk__points *points);
/* Adds the points to the sums of every layer; after the last ones, the products with the directions of what was summed. */
PK__INTERNAL void pk__integral_add(pk__integral *integral, const pk__points *points);
/* Completes the step: the error of Phi, and Phi of shared tensors. */
PK__INTERNAL void pk__integral_end(pk__integral *integral);
/* After pk__integral_end: phi of the outputs first .. first + count - 1 (of those chosen) of one row: (count x layer outputs
 * x layer inputs) of the weight, then (count x layer outputs) of the bias; count x weights for PK__LAYER_ROWS. */
PK__INTERNAL void pk__integral_row_phi(const pk__integral *integral, size_t layer, size_t row, size_t first,
                                       size_t count, pk_real *phi);
/* error >= |computed - true Phi|, same layout: twice the difference to a rule of higher order, the uncertainty of the
 * kinks times the gradients beside them, and pk__rounding_allowance times sum_p w_p |delta_p| |a_p|. */
PK__INTERNAL void pk__integral_row_error(const pk__integral *integral, size_t layer, size_t row, size_t first,
                                         size_t count, pk_real *error);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_INTEGRAL_IMPLEMENTED)
#define PATHKERNEL_INTEGRAL_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- the points of a step --------------------------------------------------------------------------------- */

/* Element i of a weight block is element pk__use_index of a tensor that uses it. */
static size_t pk__use_index(const pk_parameter_tensor *tensor, size_t i)
{
    const size_t rows = tensor->shape.dims[0], cols = tensor->shape.dims[1];
    return tensor->transposed ? i % rows * cols + i / rows : i;
}

/* Replaces Phi (or its error) of every use of a weight block by the sum over its uses. */
static void pk__share_block(const pk__integral *integral, const pk_weight_block *block, int error)
{
    const pk_node *nodes = integral->graph->nodes, *own = &nodes[block->uses[0].node];
    const size_t cells = integral->rows * integral->output_capacity,
                 own_at = own->tensors[block->uses[0].tensor].first;
    for (int back = 0; back < 2; back++)
        for (size_t u = 1; u < block->use_count; u++) {
            const pk_node *node = &nodes[block->uses[u].node];
            const pk_parameter_tensor *tensor = &node->tensors[block->uses[u].tensor];
            pk_real *sums = error ? integral->layer[own->layer].size : integral->layer[own->layer].phi;
            pk_real *ones = error ? integral->layer[node->layer].size : integral->layer[node->layer].phi;
            for (size_t cell = 0; cell < cells; cell++) {
                pk_real *sum = sums + cell * own->weight_count + own_at;
                pk_real *one = ones + cell * node->weight_count + tensor->first;
                for (size_t i = 0; i < block->count; i++)
                    if (back)
                        one[pk__use_index(tensor, i)] = sum[i];
                    else
                        sum[i] += one[pk__use_index(tensor, i)];
            }
        }
}

/* For a graph with ties: Phi of each use of a tied tensor becomes the sum over all its uses, so that its product with the
 * gradients of the uses is the product of the sums. Its error likewise. */
static void pk__share_tensors(pk__integral *integral)
{
    const pk_graph *graph = integral->graph;
    for (size_t b = 0; b < graph->block_count; b++) {
        pk__share_block(integral, &graph->blocks[b], 0);
        if (integral->bounds)
            pk__share_block(integral, &graph->blocks[b], 1);
    }
}

PK__INTERNAL void pk__integral_begin(pk__integral *integral, const pk__integral_step *step)
{
    const pk_graph *graph = integral->graph;
    const size_t outputs = integral->outputs, rows = step->rows, real = sizeof(pk_real);
    const size_t chosen = rows * integral->output_capacity;
    integral->rows = rows;
    integral->integrator.first_row = step->first_row;
    pk__path_begin(&integral->integrator.path, step->weights, step->direction, step->transposed, rows,
                   step->inputs);
    memset(integral->weight_sum, 0, rows * real);
    memset(integral->begun, 0, rows);
    for (int v = 0; v < PK__DIRECTIONS; v++) {
        integral->directions[v] = step->directions[v];
        memset(integral->along[v], 0, rows * outputs * real);
    }
    for (size_t l = 0; l < graph->layers; l++) {
        const pk__layer_integral *layer = &integral->layer[l];
        const size_t numbers = chosen * layer->node->weight_count;
        pk__choose_form(integral, l, step);
        if (layer->delta)
            memset(layer->delta, 0, rows * outputs * layer->node->width * real);
        if (layer->input)
            memset(layer->input, 0, rows * layer->node->fan_in * real);
        /* Else Phi is set, rather than added to, by the row's first points; every row has some. */
        if (layer->kind != PK__LAYER_ROWS)
            continue;
        memset(layer->phi, 0, numbers * real);
        if (integral->bounds) {
            memset(layer->check, 0, numbers * real);
            memset(layer->size, 0, numbers * real);
        }
    }
    integral->batch = NULL;
    integral->integrator.points_last = 0;
    pk__integrator_begin(&integral->integrator);
}

PK__INTERNAL int pk__integral_next(pk__integral *integral, const pk__points **points)
{
    pk__points *part = &integral->part;
    if (!integral->batch) {
        const pk__points *batch;
        if (!pk__integrator_next(&integral->integrator, &batch))
            return 0;
        integral->integrator.points_last += batch->count;
        integral->batch = pk__sort_points(integral, batch);
        integral->taken = 0;
    }
    const size_t first = integral->taken, left = integral->batch->count - first;
    *part = *integral->batch;
    part->count = pk__min(integral->reverse_points, left);
    if (part->means) /* with the ends of their stretches */
        part->count = pk__min(part->count, pk__max(integral->integrator.path.point_capacity / 3, 1));
    part->row += first;
    part->t += first;
    part->weight += first;
    part->from += first;
    part->to += first;
    if (part->check) {
        part->check += first;
        part->slack += first;
    }
    integral->taken += part->count;
    if (part->count == left)
        integral->batch = NULL;
    part->last = part->last && part->count == left;
    *points = part;
    return 1;
}

PK__INTERNAL void pk__integral_pass(pk__integral *integral, const pk__points *points)
{
    pk__path *path = &integral->integrator.path;
    const pk_readout *readout = &integral->integrator.readout;
    const size_t outputs = integral->outputs, classes = integral->graph->output_width;
    if (!points->count)
        return;
    if (points->means) {
        const size_t all =
            pk__path_stretches(path, points->count, points->row, points->t, points->from, points->to);
        pk__path_forward(path, all, path->point_row, path->point_t);
    } else {
        pk__path_forward(path, points->count, points->row, points->t);
    }
    pk__path_use_means(path, points->means);
    for (size_t p = 0; p < points->count; p++)
        pk__readout_apply(readout, classes, integral->integrator.first_row + points->row[p],
                          pk__pass_output(&path->tape) + p * classes, integral->integrator.h,
                          pk__pass_seed(&path->tape) + p * outputs * classes);
    path->tape.unit_seeds = readout->kind == PK_READOUT_ALL;
    pk__path_reverse(path, points->count, points->t, outputs);
}

/* The products with the directions of what was summed over all points of the step. */
static void pk__add_along_sums(pk__integral *integral, size_t l)
{
    const pk__layer_integral *layer = &integral->layer[l];
    const size_t rows = integral->rows;
    if (layer->kind == PK__LAYER_ROWS)
        pk__add_along_rows(integral, l);
    else if (layer->kind == PK__LAYER_DATA)
        pk__add_along(integral, l, rows, NULL, NULL, integral->integrator.path.base[layer->node->inputs[0]],
                      layer->delta, NULL);
    else if (layer->kind == PK__LAYER_LINEAR)
        pk__add_along(integral, l, rows, NULL, NULL, layer->input, layer->delta, integral->weight_sum);
}

PK__INTERNAL void pk__integral_add(pk__integral *integral, const pk__points *points)
{
    const pk__tape *tape = &integral->integrator.path.tape;
    const size_t count = points->count, layers = integral->graph->layers;
    for (size_t p = 0; p < count; p++)
        integral->weight_sum[points->row[p]] += points->weight[p];
    for (size_t l = 0; count && l < layers; l++) {
        const pk__layer_integral *layer = &integral->layer[l];
        const pk_node *node = layer->node;
        const int at_places = pk__is_used_at_places(integral, l);
        if (at_places)
            pk__add_along_places(integral, l, points);
        else if (layer->kind == PK__LAYER_POINTS)
            pk__add_along(integral, l, count, points->row, points->weight, tape->value[node->inputs[0]],
                          tape->cotangent[node - integral->graph->nodes], NULL);
        if (layer->kind != PK__LAYER_POINTS || (layer->integrated && !at_places))
            pk__add_points(integral, l, points);
    }
    for (size_t p = 0; p < count; p++)
        integral->begun[points->row[p]] = 1;
    for (size_t l = 0; points->last && l < layers; l++)
        pk__add_along_sums(integral, l);
}

PK__INTERNAL void pk__integral_end(pk__integral *integral)
{
    const size_t chosen = integral->rows * integral->output_capacity;
    for (size_t l = 0; integral->bounds && l < integral->graph->layers; l++) {
        const pk__layer_integral *layer = &integral->layer[l];
        for (size_t i = 0; i < chosen * layer->node->weight_count; i++)
            layer->size[i] += (pk_real)(2 * fabs(layer->check[i]));
    }
    if (integral->graph->tied)
        pk__share_tensors(integral);
}

/* ---- Phi of a row ------------------------------------------------------------------------------------------ */

/* Where the matrices and biases of one row of phi begin, for the outputs from `first` on of a layer whose Phi is stored. */
PK__PRIVATE void pk__row_view(const pk__integral *integral, size_t layer, size_t row, size_t first,
                              const pk_real **matrices, const pk_real **biases)
{
    const pk_node *node = integral->layer[layer].node;
    const int rows = integral->layer[layer].kind == PK__LAYER_ROWS;
    const size_t bias = !rows && pk__has_bias(node) ? node->width : 0, matrix = node->weight_count - bias;
    const pk_real *from = integral->layer[layer].phi + row * integral->output_capacity * node->weight_count;
    first -= integral->first_output;
    *matrices = from + first * matrix;
    *biases = from + integral->output_count * matrix + first * bias;
}

/* Copies the outputs [first, first + count) of one row of phi (or check, size), which has the matrices of all chosen
 * outputs and then their biases. */
static void pk__row_outputs(const pk__integral *integral, size_t layer, size_t row, size_t first, size_t count,
                            const pk_real *from, pk_real *to)
{
    const pk_node *node = integral->layer[layer].node;
    const size_t weights = node->weight_count;
    const int rows = integral->layer[layer].kind == PK__LAYER_ROWS;
    const size_t bias = !rows && pk__has_bias(node) ? node->width : 0, matrix = weights - bias;
    from += row * integral->output_capacity * weights;
    first -= integral->first_output;
    memcpy(to, from + first * matrix, count * matrix * sizeof *to);
    memcpy(to + count * matrix, from + integral->output_count * matrix + first * bias,
           count * bias * sizeof *to);
}

/* The factors of one row's Phi of a layer whose sum over points is taken first: cotangents of the outputs from first on (x
 * layer outputs) and inputs. Returns the number that acts as the input of the bias. */
PK__PRIVATE pk_real pk__row_factors(const pk__integral *integral, size_t layer, size_t row, size_t first,
                                    const pk_real **cotangents, const pk_real **inputs)
{
    const pk_node *node = integral->layer[layer].node;
    const int data = integral->layer[layer].kind == PK__LAYER_DATA;
    *inputs = (data ? integral->integrator.path.base[node->inputs[0]] : integral->layer[layer].input) +
              row * node->fan_in;
    *cotangents = integral->layer[layer].delta + (row * integral->outputs + first) * node->width;
    return data ? 1 : integral->weight_sum[row];
}

PK__INTERNAL void pk__integral_row_phi(const pk__integral *integral, size_t layer, size_t row, size_t first,
                                       size_t count, pk_real *phi)
{
    const pk_node *node = integral->layer[layer].node;
    const size_t out = node->width, in = node->fan_in;
    if (integral->layer[layer].phi) {
        pk__row_outputs(integral, layer, row, first, count, integral->layer[layer].phi, phi);
        return;
    }
    const pk_real *delta, *a;
    const pk_real bias = pk__row_factors(integral, layer, row, first, &delta, &a);
    for (size_t j = 0; j < count * out; j++)
        for (size_t i = 0; i < in; i++)
            phi[j * in + i] = delta[j] * a[i];
    if (pk__has_bias(node))
        for (size_t j = 0; j < count * out; j++)
            phi[count * out * in + j] = delta[j] * bias;
}

PK__INTERNAL void pk__integral_row_error(const pk__integral *integral, size_t layer, size_t row, size_t first,
                                         size_t count, pk_real *error)
{
    pk__row_outputs(integral, layer, row, first, count, integral->layer[layer].size, error);
}

PK__END_CODE
/* <<< implementation */
#endif
