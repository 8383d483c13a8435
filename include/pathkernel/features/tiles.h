/* pathkernel/features/tiles.h: the inner products of a block of rows with a block of examples, layer by layer, as a tile: the
 * hot loop.
 *
 *     pk__tiles_begin(&product, points);                       for the points in memory, after pk__integral_add
 *     for each block of examples, for each layer that is due:
 *         pk__tiles_layer(&product, layer, points, first, count, fresh);
 *
 * What does not change along a step is taken out of the sum over its points:
 *   - a layer whose input is data: sum the cotangents first, and its a_x . a_i is one Gram matrix for all steps;
 *   - a layer behind which everything is linear: its cotangent is constant, sum the inputs first;
 *   - the layer below that one: its cotangents are delta_k = slope o (W + t D)^T seed_k, W the last layer's weight;
 *     sum slope (a_x . a_i + 1) and t slope (a_x . a_i + 1) over the points, then multiply with W and D once;
 *   - any other layer: one Hadamard product per point and output, or, where many points or few examples make it
 *     cheaper, the integrated gradient Phi is materialized and multiplied with the examples' factors (pk__product_row).
 * The first two are due after the last points of the step, the others with each part of the points.
 * A layer that is used at Q places (a convolution, a dense layer on tokens) has a sum of Q outer products: its points
 * count Q times and its examples Q times, so Q^2 products of pairs, or both sides are materialized (pk__layer_by_rows).
 */
#ifndef PATHKERNEL_TILES_H
#define PATHKERNEL_TILES_H
#include "product.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_TILES_INTERNALS_KNOWN)
#define PATHKERNEL_TILES_INTERNALS_KNOWN
/* >>> internals */
/* Prepares the products with the points in memory, and lists the layers that are due in product->due. */
PK__INTERNAL void pk__tiles_begin(pk__product *product, const pk__points *points);
/* product->tile (rows x outputs x count, ld PK__TILE_LD) = or, unless fresh, += the inner products of a layer that is due with
 * the examples first .. first + count - 1, first a multiple of PK__EXAMPLE_BLOCK, count <= PK__EXAMPLE_BLOCK. */
PK__INTERNAL void pk__tiles_layer(pk__product *product, size_t layer, const pk__points *points, size_t first,
                                  size_t count, int fresh);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_TILES_IMPLEMENTED)
#define PATHKERNEL_TILES_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

/* ---- layers used at several places -------------------------------------------------------------------- */

/* One layer used at several places, one block of examples, the points in memory: every place of a point with every place
 * of an example, tile += w_p sum_qr (a_pq . a_ir + bias) (delta_pq . delta_ir). */
static void pk__product_places(pk__product *product, size_t layer, const pk__points *points, size_t first,
                               size_t block)
{
    const pk__integral *integral = product->integral;
    const pk_node *node = integral->layer[layer].node;
    const pk__examples *examples = product->examples;
    const size_t outputs = integral->outputs, positions = node->positions, in = node->fan_in,
                 out = node->fan_out, together = pk__place_points(node, outputs);
    const pk_real *input_panels = pk__first_panel(examples->input[layer], positions * in, first);
    const pk_real *cotangent_panels = pk__first_panel(examples->cotangent[layer], positions * out, first);
    for (size_t p = 0; p < points->count; p += together) {
        const size_t count = pk__min(together, points->count - p), pairs = count * positions;
        pk_real *places = integral->places, *deltas = places + pairs * in, *start = product->place_start;
        for (size_t i = 0; i < count; i++)
            pk__node_places(&integral->integrator.path.tape, node, p + i, outputs, places + i * positions * in,
                            deltas + i * positions * outputs * out);
        for (size_t i = 0; i < pairs; i++) {
            const size_t point = p + i / positions;
            start[i] = points->weight[point];
            for (size_t j = 0; j < in; j++)
                places[i * in + j] *= start[i];
            for (size_t k = 0; k < outputs; k++) {
                product->place_to[i * outputs + k] = (points->row[point] * outputs + k) * PK__TILE_LD;
                product->place_left[i * outputs + k] = i * PK__PAIR;
            }
        }
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            pk__panels inputs = pk__panels_at(input_panels, positions * in, column, block);
            pk__panels cotangents = pk__panels_at(cotangent_panels, positions * out, column, block);
            pk__tile_target left = {PK__TILE_SET, product->left, product->pair_row, NULL, NULL, 0};
            pk__tile_target tile = {PK__TILE_HADAMARD, product->tile + column, product->place_to,
                                    product->left,     product->place_left,    PK_PANEL};
            for (size_t r = 0; r < positions; r++) {
                pk__panel_product(pairs, in, places, in, 1, &inputs, pk__has_bias(node) ? start : NULL, &left);
                pk__panel_product(pairs * outputs, out, deltas, out, 1, &cotangents, NULL, &tile);
                inputs.first += in * PK_PANEL;
                cotangents.first += out * PK_PANEL;
            }
        }
        product->flops += 2.0 * (double)(block * pairs * positions) * (double)(in + outputs * out);
    }
}

/* ---- the layer below the last one --------------------------------------------------------------------- */

/* 1 where the layer's cotangents are the unit matrix: the last layer of all outputs. */
static int pk__has_unit_cotangents(const pk__integral *integral, size_t layer)
{
    return integral->layer[layer].kind == PK__LAYER_LINEAR &&
           integral->integrator.readout.kind == PK_READOUT_ALL &&
           integral->layer[layer].node == &integral->graph->nodes[integral->graph->node_count - 1];
}

/* W^T seed_k and D^T seed_k of the last layer side by side: seeds are its cotangents. For every row and output, a row's behind
 * those of all rows; where the seeds are unit vectors, those of all rows are the rows of W and D. */
static void pk__last_weights(pk__product *product, const pk_node *head)
{
    const pk__integral *integral = product->integral;
    const pk__path *segment = &integral->integrator.path;
    const size_t outputs = integral->outputs, out = head->width, in = head->fan_in;
    const int shared = pk__has_unit_cotangents(integral, head->layer);
    for (size_t part = 0; part < 2; part++) {
        const pk_real *matrix = (part ? segment->direction : segment->weights) + head->weight_offset;
        pk_real *to = product->last_weights + part * in;
        if (!shared)
            pk__gemm(0, 0, integral->rows * outputs, in, out, 1, integral->layer[head->layer].delta, out,
                     matrix, in, 0, to + outputs * 2 * in, 2 * in);
        for (size_t k = 0; k < outputs && shared; k++)
            memcpy(to + k * 2 * in, matrix + k * in, in * sizeof *to);
    }
}

/* Where the weights of a row stand, of in units below the last layer. */
static pk_real *pk__last_weights_of_row(const pk__product *product, const pk_node *head, size_t row)
{
    const pk__integral *integral = product->integral;
    const size_t all = integral->outputs * 2 * head->fan_in;
    const int shared =
        pk__has_unit_cotangents(integral, head->layer) && product->unit_count[row] == head->fan_in;
    return product->last_weights + (shared ? 0 : (row + 1) * all);
}

/* w slope and w t slope of the operation between the layer and the last one, at the points in memory. */
static void pk__slopes_between(pk__product *product, size_t layer, const pk__points *points)
{
    const pk__integral *integral = product->integral;
    const pk__tape *tape = &integral->integrator.path.tape;
    const pk_node *between = pk__layer_input(integral->graph, integral->layer[layer].last);
    const size_t out = between->width;
    pk_real *weights = product->slopes, *slopes = integral->scratch;
    pk_call call;
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++)
            weights[p * out + i] = points->weight[p];
    pk__pass_call(tape, between, points->count, 1, &call);
    call.out_cotangent = weights;
    call.in_cotangent[0] = slopes;
    if (tape->from && pk__has_mean_slopes(between))
        pk__mean_reverse(tape, &call);
    else
        between->operation->reverse(&call);
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++) {
            product->slopes[p * 2 * out + i] = slopes[p * out + i];
            product->slopes[p * 2 * out + out + i] = points->t[p] * slopes[p * out + i];
        }
}

/* to = the columns of the units that are on, side by side, of count rows of 2 out numbers; from may be to. */
static void pk__keep_units(size_t count, size_t out, size_t units, const size_t *unit_row, const pk_real *from,
                           pk_real *to)
{
    for (size_t i = 0; i < count; i++, from += 2 * out, to += 2 * out)
        for (size_t j = 0; j < 2 * units; j++)
            to[j] = from[unit_row[j] / PK_PANEL + (j < units ? 0 : out)];
}

/* What the layer below the last one is multiplied with: slopes and weights of the units whose slope is not 0 at all points of their row, as
 * that of a ReLU is where it is off. */
static void pk__below_last_prepare(pk__product *product, size_t layer, const pk__points *points)
{
    const pk__integral *integral = product->integral;
    const pk_node *head = integral->layer[layer].last;
    const size_t outputs = integral->outputs, out = head->fan_in;
    pk__last_weights(product, head);
    pk__slopes_between(product, layer, points);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p];
        size_t *unit_row = product->unit_row + row * 2 * out, units = 0;
        pk_real *slopes = product->slopes + p * 2 * out;
        last = pk__row_end(points, p);
        for (size_t j = 0; j < out; j++) {
            int on = 0;
            for (size_t i = 0; i < last - p; i++)
                on |= slopes[i * 2 * out + j] != 0;
            if (on)
                unit_row[units++] = j * PK_PANEL;
        }
        memcpy(unit_row + units, unit_row, units * sizeof *unit_row);
        product->unit_count[row] = units;
        if (units < out) {
            pk_real *weights = pk__last_weights_of_row(product, head, row);
            pk__keep_units(last - p, out, units, unit_row, slopes, slopes);
            pk__keep_units(outputs, out, units, unit_row,
                           pk__has_unit_cotangents(integral, head->layer) ? product->last_weights : weights,
                           weights);
        }
    }
}

/* One layer below the last, one block of examples: tile += sum_j (W_kj Q_ji + D_kj R_ji) delta_ij with
 * Q = sum_p w_p slope_p (a_p . a_i + bias) and R the same with t_p: outputs cost once a row, not once a point. */
static void pk__below_last_product(pk__product *product, size_t layer, const pk__points *points, size_t first,
                                   size_t block)
{
    const pk__integral *integral = product->integral;
    const pk_node *node = integral->layer[layer].node;
    const size_t outputs = integral->outputs, out = node->width;
    const pk_real *cotangents = pk__first_panel(product->examples->cotangent[layer], out, first);
    pk__multiply_inputs(product, layer, points->count, integral->integrator.path.tape.value[node->inputs[0]],
                        product->ones, first, block);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p], units = 2 * product->unit_count[row];
        const pk_real *slopes = product->slopes + p * 2 * out;
        const pk_real *weights = pk__last_weights_of_row(product, integral->layer[layer].last, row);
        const size_t *unit_row = product->unit_row + row * 2 * out;
        pk__tile_target tile = {PK__TILE_ADD, NULL, product->tile_row, NULL, NULL, 0};
        last = pk__row_end(points, p);
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            const pk__panels b = pk__fetch_panels(cotangents, out, column, block);
            const pk__panels left = {b.count, product->left + p * PK__TILE_LD + column, PK__TILE_LD, PK_PANEL,
                                     0};
            const pk__panels sums = {b.count, product->sums, PK__PAIR, PK_PANEL, 0};
            tile.to = product->tile + row * outputs * PK__TILE_LD + column;
            for (size_t j = 0; j < units; j += PK__SUMS_IN_HAND) {
                const size_t count = pk__min(PK__SUMS_IN_HAND, units - j);
                pk__panel_sums(count, last - p, slopes + j, 2 * out, &left, b.first, b.apart, unit_row + j,
                               product->sums);
                pk__panel_product(outputs, count, weights + j, 2 * out, 1, &sums, NULL, &tile);
            }
        }
        product->flops += 4.0 * (double)block * (double)(out * (last - p + outputs));
    }
}

/* ---- layers whose sum over points is taken first ------------------------------------------------------ */

/* left = x . x_i + bias of a layer on data: from the Gram matrix of the inputs, where there is one. */
static void pk__multiply_data(pk__product *product, size_t layer, size_t first, size_t block)
{
    const pk__integral *integral = product->integral;
    const pk_node *node = integral->layer[layer].node;
    const pk__examples *examples = product->examples;
    const pk_real bias = pk__has_bias(node);
    if (!product->gram || node->inputs[0] != 0) {
        pk__multiply_inputs(product, layer, integral->rows, integral->integrator.path.base[node->inputs[0]],
                            product->ones, first, block);
        return;
    }
    const int64_t *items = examples->items + first;
    for (size_t r = 0; r < integral->rows; r++) {
        const pk_real *gram = product->gram + r * product->gram_ld;
        pk_real *left = product->left + r * PK__TILE_LD;
        if (examples->consecutive)
            for (size_t i = 0; i < block; i++)
                left[i] = gram[(size_t)items[0] + i] + bias;
        else
            for (size_t i = 0; i < block; i++)
                left[i] = gram[items[i]] + bias;
        for (size_t i = block; i % PK_PANEL; i++)
            left[i] = 0;
    }
}

/* tile = or, unless fresh, += left o cotangents of the examples, output by output. */
static void pk__add_readout(pk__product *product, size_t layer, size_t first, size_t block, int fresh)
{
    const pk__integral *integral = product->integral;
    const size_t outputs = integral->outputs;
    const pk_real *panels = pk__first_panel(product->examples->cotangent[layer], outputs, first);
    for (size_t cell = 0; cell < integral->rows * outputs; cell++) {
        const pk_real *left = product->left + cell / outputs * PK__TILE_LD;
        pk_real *tile = product->tile + cell * PK__TILE_LD;
        for (size_t column = 0; column < block; column += PK_PANEL) {
            const pk_real *right = panels + column * outputs + cell % outputs * PK_PANEL;
            if (fresh)
                for (size_t i = 0; i < PK_PANEL; i++)
                    tile[column + i] = left[column + i] * right[i];
            else
                for (size_t i = 0; i < PK_PANEL; i++)
                    tile[column + i] += left[column + i] * right[i];
        }
    }
}

/* ---- any layer ---------------------------------------------------------------------------------------- */

/* Whether there are products of a layer to be taken with the points in memory. */
static int pk__is_due(const pk__integral *integral, size_t layer, const pk__points *points)
{
    return !integral->layer[layer].integrated &&
           (integral->layer[layer].kind == PK__LAYER_POINTS ? points->count > 0 : points->last);
}

PK__INTERNAL void pk__tiles_begin(pk__product *product, const pk__points *points)
{
    const pk__integral *integral = product->integral;
    const size_t outputs = integral->outputs, layers = integral->graph->layers;
    product->due_count = 0;
    if (!product->examples || !product->examples->count)
        return;
    for (size_t i = 0; i < layers; i++) {
        const size_t l = (i + layers - 1) % layers; /* the last one first: it may set the tile */
        if (pk__is_due(integral, l, points))
            product->due[product->due_count++] = l;
    }
    /* Inputs of points times their weights, and the cell of the tile that each product belongs to. */
    for (size_t p = 0; p < points->count; p++)
        for (size_t k = 0; k < outputs; k++)
            product->point_to[p * outputs + k] = (points->row[p] * outputs + k) * PK__TILE_LD;
    for (size_t l = 0; points->count && l < layers; l++) {
        const pk_node *node = integral->layer[l].node;
        const pk_real *inputs = integral->integrator.path.tape.value[node->inputs[0]];
        const size_t in = node->fan_in;
        if (integral->layer[l].integrated || integral->layer[l].kind != PK__LAYER_POINTS ||
            pk__is_used_at_places(integral, l))
            continue;
        if (integral->layer[l].outputs_outside) /* at most one layer stands below the last one */
            pk__below_last_prepare(product, l, points);
        else
            for (size_t p = 0; p < points->count; p++)
                for (size_t i = p * in; i < (p + 1) * in; i++)
                    product->weighted_inputs[l][i] = points->weight[p] * inputs[i];
    }
}

PK__INTERNAL void pk__tiles_layer(pk__product *product, size_t layer, const pk__points *points, size_t first,
                                  size_t block, int fresh)
{
    const pk__integral *integral = product->integral;
    const size_t outputs = integral->outputs, rows = integral->rows, count = points->count;
    if (fresh && !pk__has_unit_cotangents(integral, layer))
        pk__clear_tile(rows * outputs, block, product->tile);
    if (pk__is_used_at_places(integral, layer)) {
        pk__product_places(product, layer, points, first, block);
    } else if (integral->layer[layer].kind == PK__LAYER_POINTS && integral->layer[layer].outputs_outside) {
        pk__below_last_product(product, layer, points, first, block);
    } else if (integral->layer[layer].kind == PK__LAYER_POINTS) {
        const pk_node *node = integral->layer[layer].node;
        pk__multiply_inputs(product, layer, count, product->weighted_inputs[layer], points->weight, first,
                            block);
        pk__multiply_cotangents(product, layer, count * outputs,
                                integral->integrator.path.tape.cotangent[node - integral->graph->nodes],
                                product->point_to, product->cell_left, first, block);
    } else {
        if (integral->layer[layer].kind == PK__LAYER_DATA)
            pk__multiply_data(product, layer, first, block);
        else
            pk__multiply_inputs(product, layer, rows, integral->layer[layer].input, integral->weight_sum, first,
                                block);
        if (pk__has_unit_cotangents(integral, layer))
            pk__add_readout(product, layer, first, block, fresh);
        else
            pk__multiply_cotangents(product, layer, rows * outputs, integral->layer[layer].delta,
                                    product->tile_row, product->cell_left, first, block);
    }
}

PK__END_CODE
/* <<< implementation */
#endif
