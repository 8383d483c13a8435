/* pathkernel/features/product.h: inner products of tangent features with the gradients of examples: the hot loop.
 *
 * For a dense layer the gradient is an outer product, grad_W = delta (x) a, so that
 *     < grad f(x), g_i > = sum over layers (delta_x . delta_i) (a_x . a_i + 1):
 * two small Gram matrices and a Hadamard product per layer, and no vector of P numbers. What does not
 * change along a step is taken out of the sum over its points:
 *   - a layer whose input is data: sum the cotangents first, and its a_x . a_i is one Gram matrix for all steps;
 *   - a layer behind which everything is linear: its cotangent is constant, sum the inputs first;
 *   - the layer below that one: its cotangents are delta_k = slope o (W + t D)^T seed_k, W the last layer's weight;
 *     sum slope (a_x . a_i + 1) and t slope (a_x . a_i + 1) over the points, then multiply with W and D once;
 *   - any other layer: one Hadamard product per point and output, or, where many points or few examples make it
 *     cheaper, the integrated gradient Phi is materialised and multiplied with the examples' factors.
 * Products are of rows of the test side and panels of examples, and the Hadamard product is taken while a tile of
 * them is in registers (tile.h): nothing that is as large as a layer times examples goes through memory.
 * A layer that is used at Q places (a convolution, a dense layer on tokens) has a sum of Q outer products: its points
 * count Q times and its examples Q times, so Q^2 products of pairs, or both sides are materialised (pk__layer_by_rows).
 */
#ifndef PATHKERNEL_PRODUCT_H
#define PATHKERNEL_PRODUCT_H
#include "features.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_PRODUCT_INTERNALS_KNOWN)
#define PATHKERNEL_PRODUCT_INTERNALS_KNOWN
/* >>> internals */
/* tile (outputs x columns, ld PK__TILE_LD) += < e_k, g_b > for the columns b = first .. first + columns - 1, first a multiple
 * of PK_PANEL, columns <= PK__EXAMPLE_BLOCK; e of `outputs` outputs laid out like phi of the layer. The columns that fill the
 * last panel are written, too. */
PK__INTERNAL void pk__integral_contract_row(pk__integral *tangent, size_t layer, size_t outputs,
                                            const pk_real *e, size_t first, size_t columns, pk_real *tile);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PRODUCT_IMPLEMENTED)
#define PATHKERNEL_PRODUCT_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

/* The first panel of a block of examples, of features a number each. */
static const pk_real *pk__first_panel(const pk_real *all, size_t features, size_t first)
{
    return all + first * features; /* first is a multiple of PK_PANEL */
}

/* Columns of the panels that are multiplied together: with AVX-512 tiles are as wide as two. */
static size_t pk__columns_at_once(void)
{
    return PK__HAS_AVX512 ? (size_t)PK__PAIR : (size_t)PK_PANEL;
}

/* Of the panels of a block, those from column on. */
static pk__panels pk__panels_at(const pk_real *panels, size_t features, size_t column, size_t block)
{
    const pk__panels own = {pk__blocks(pk__min(pk__columns_at_once(), block - column), PK_PANEL),
                            pk__first_panel(panels, features, column), PK_PANEL, features * PK_PANEL, 0};
    return own;
}

/* The same, with those behind them, where there are some, fetched in the meantime: tiles are short, so that the processor
 * would see too late that they go on there. Tiles of AVX-512 fetch as they go; else the first-level cache, which is small,
 * takes the beginning of a deep panel, which leaves the room to what is multiplied. */
static pk__panels pk__fetch_panels(const pk_real *panels, size_t features, size_t column, size_t block)
{
    const size_t next = column + pk__columns_at_once();
    pk__panels own = pk__panels_at(panels, features, column, block);
    own.ahead = next < block ? features * pk__columns_at_once() : 0;
#if defined(__GNUC__)
    const size_t rows = own.ahead && !PK__HAS_AVX512 ? pk__min(features, 128) : 0;
    for (size_t p = 0; p < rows; p++)
        __builtin_prefetch(panels + next * features + p * PK_PANEL);
#endif
    return own;
}

/* cells x columns of a tile = 0, up to the end of the last panel. */
PK__PRIVATE void pk__clear_tile(size_t cells, size_t columns, pk_real *tile)
{
    for (size_t i = 0; i < cells; i++)
        memset(tile + i * PK__TILE_LD, 0, pk__blocks(columns, PK_PANEL) * PK_PANEL * sizeof *tile);
}

/* For a block of examples: target form= start + A (rows x depth, rows one behind the other) times a panel, panel after panel,
 * for as many rows at a time as stay in the second-level cache. The panels of
 * the target lie side by side. */
static void pk__block_product(size_t rows, size_t depth, const pk_real *a, const pk_real *panels, size_t block,
                              const pk_real *start, const pk__tile_target *target)
{
    const size_t most = pk__part_rows(rows, depth);
    pk__tile_target part = *target;
    for (size_t first = 0; first < rows; first += most) {
        part.to_at = target->to_at + first;
        part.other_at = target->other_at ? target->other_at + first : NULL;
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            const pk__panels b = pk__fetch_panels(panels, depth, column, block);
            part.to = target->to + column;
            part.other = target->other ? target->other + column : NULL;
            pk__panel_product(pk__min(most, rows - first), depth, a + first * depth, depth, 1, &b,
                              start ? start + first : NULL, &part);
        }
    }
}

/* left = start + inputs of rows (rows x in) times those of a block of examples. */
static void pk__multiply_inputs(pk__integral *tangent, size_t layer, size_t rows, const pk_real *inputs,
                                const pk_real *start, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const size_t in = node->fan_in;
    pk__tile_target target = {PK__TILE_SET, tangent->left, tangent->tile_row, NULL, NULL, 0};
    pk__block_product(rows, in, inputs, pk__first_panel(tangent->examples->input[layer], in, first), block,
                      pk__has_bias(node) ? start : NULL, &target);
    tangent->flops += 2.0 * (double)block * (double)(rows * in);
}

/* tile += left o (cotangents of cells (cells x out) times those of a block of examples). */
static void pk__multiply_cotangents(pk__integral *tangent, size_t layer, size_t cells,
                                    const pk_real *cotangents, const size_t *to, const size_t *left,
                                    size_t first, size_t block)
{
    const size_t out = tangent->node[layer]->width;
    pk__tile_target target = {PK__TILE_HADAMARD, tangent->tile, to, tangent->left, left, PK_PANEL};
    pk__block_product(cells, out, cotangents, pk__first_panel(tangent->examples->cotangent[layer], out, first),
                      block, NULL, &target);
    tangent->flops += 2.0 * (double)block * (double)(cells * out);
}

/* ---- layers used at several places ----------------------------------------------------------------------- */

/* One layer used at several places, one block of examples, the points in hand: every place of a point with every place
 * of an example, tile += w_p sum_qr (a_pq . a_ir + bias) (delta_pq . delta_ir). */
static void pk__contract_places(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                                size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk__examples *examples = tangent->examples;
    const size_t outputs = tangent->outputs, positions = node->positions, in = node->fan_in,
                 out = node->fan_out, together = pk__place_points(node, outputs);
    const pk_real *input_panels = pk__first_panel(examples->input[layer], positions * in, first);
    const pk_real *cotangent_panels = pk__first_panel(examples->cotangent[layer], positions * out, first);
    for (size_t p = 0; p < points->count; p += together) {
        const size_t count = pk__min(together, points->count - p), pairs = count * positions;
        pk_real *places = tangent->places, *deltas = places + pairs * in, *start = tangent->place_start;
        for (size_t i = 0; i < count; i++)
            pk__node_places(&tangent->integrator.path.tape, node, p + i, outputs, places + i * positions * in,
                            deltas + i * positions * outputs * out);
        for (size_t i = 0; i < pairs; i++) {
            const size_t point = p + i / positions;
            start[i] = points->weight[point];
            for (size_t j = 0; j < in; j++)
                places[i * in + j] *= start[i];
            for (size_t k = 0; k < outputs; k++) {
                tangent->place_to[i * outputs + k] = (points->row[point] * outputs + k) * PK__TILE_LD;
                tangent->place_left[i * outputs + k] = i * PK__PAIR;
            }
        }
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            pk__panels inputs = pk__panels_at(input_panels, positions * in, column, block);
            pk__panels cotangents = pk__panels_at(cotangent_panels, positions * out, column, block);
            pk__tile_target left = {PK__TILE_SET, tangent->left, tangent->pair_row, NULL, NULL, 0};
            pk__tile_target tile = {PK__TILE_HADAMARD, tangent->tile + column, tangent->place_to,
                                    tangent->left,     tangent->place_left,    PK_PANEL};
            for (size_t r = 0; r < positions; r++) {
                pk__panel_product(pairs, in, places, in, 1, &inputs, pk__has_bias(node) ? start : NULL, &left);
                pk__panel_product(pairs * outputs, out, deltas, out, 1, &cotangents, NULL, &tile);
                inputs.first += in * PK_PANEL;
                cotangents.first += out * PK_PANEL;
            }
        }
        tangent->flops += 2.0 * (double)(block * pairs * positions) * (double)(in + outputs * out);
    }
}

/* ---- the layer below the last one ------------------------------------------------------------------------ */

/* 1 where the layer's cotangents are the unit matrix: the last layer of all outputs. */
static int pk__is_readout(const pk__integral *tangent, size_t layer)
{
    return tangent->kind[layer] == PK__LAYER_LINEAR && tangent->integrator.readout.kind == PK_READOUT_ALL &&
           tangent->node[layer] == &tangent->graph->nodes[tangent->graph->node_count - 1];
}

/* W^T seed_k and D^T seed_k of the last layer side by side: seeds are its cotangents. For every row and output, a row's behind
 * those of all rows; where the seeds are unit vectors, those of all rows are the rows of W and D. */
static void pk__head_weights(pk__integral *tangent, const pk_node *head)
{
    const pk__path *segment = &tangent->integrator.path;
    const size_t outputs = tangent->outputs, out = head->width, in = head->fan_in;
    const int shared = pk__is_readout(tangent, head->layer);
    for (size_t part = 0; part < 2; part++) {
        const pk_real *matrix = (part ? segment->direction : segment->weights) + head->weight_offset;
        pk_real *to = tangent->head_weights + part * in;
        if (!shared)
            pk__gemm(0, 0, tangent->rows * outputs, in, out, 1, tangent->delta[head->layer], out, matrix, in, 0,
                     to + outputs * 2 * in, 2 * in);
        for (size_t k = 0; k < outputs && shared; k++)
            memcpy(to + k * 2 * in, matrix + k * in, in * sizeof *to);
    }
}

/* Where the weights of a row stand, of in units below the last layer. */
static pk_real *pk__weights_of_row(const pk__integral *tangent, const pk_node *head, size_t row)
{
    const size_t all = tangent->outputs * 2 * head->fan_in;
    const int shared = pk__is_readout(tangent, head->layer) && tangent->unit_count[row] == head->fan_in;
    return tangent->head_weights + (shared ? 0 : (row + 1) * all);
}

/* w slope and w t slope of the operation between the layer and the last one, at the points in hand. */
static void pk__head_slopes(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk__tape *tape = &tangent->integrator.path.tape;
    const pk_node *between = pk__layer_input(tangent->graph, tangent->head[layer]);
    const size_t out = between->width;
    pk_real *weights = tangent->slopes, *slopes = tangent->scratch;
    pk_call call;
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++)
            weights[p * out + i] = points->weight[p];
    pk__pass_call(tape, between, points->count, 1, &call);
    call.out_cotangent = weights;
    call.in_cotangent[0] = slopes;
    between->operation->reverse(&call);
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++) {
            tangent->slopes[p * 2 * out + i] = slopes[p * out + i];
            tangent->slopes[p * 2 * out + out + i] = points->t[p] * slopes[p * out + i];
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

/* What a headed layer is multiplied with: slopes and weights of the units whose slope is not 0 at all points of their row, as
 * that of a ReLU is where it is off. */
static void pk__prepare_head(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *head = tangent->head[layer];
    const size_t outputs = tangent->outputs, out = head->fan_in;
    pk__head_weights(tangent, head);
    pk__head_slopes(tangent, layer, points);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p];
        size_t *unit_row = tangent->unit_row + row * 2 * out, units = 0;
        pk_real *slopes = tangent->slopes + p * 2 * out;
        last = pk__row_end(points, p);
        for (size_t j = 0; j < out; j++) {
            int on = 0;
            for (size_t i = 0; i < last - p; i++)
                on |= slopes[i * 2 * out + j] != 0;
            if (on)
                unit_row[units++] = j * PK_PANEL;
        }
        memcpy(unit_row + units, unit_row, units * sizeof *unit_row);
        tangent->unit_count[row] = units;
        if (units < out) {
            pk_real *weights = pk__weights_of_row(tangent, head, row);
            pk__keep_units(last - p, out, units, unit_row, slopes, slopes);
            pk__keep_units(outputs, out, units, unit_row,
                           pk__is_readout(tangent, head->layer) ? tangent->head_weights : weights, weights);
        }
    }
}

/* One layer below the last, one block of examples: tile += sum_j (W_kj Q_ji + D_kj R_ji) delta_ij with
 * Q = sum_p w_p slope_p (a_p . a_i + bias) and R the same with t_p: outputs cost once a row, not once a point. */
static void pk__contract_head(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                              size_t block)
{
    const pk_node *node = tangent->node[layer];
    const size_t outputs = tangent->outputs, out = node->width;
    const pk_real *cotangents = pk__first_panel(tangent->examples->cotangent[layer], out, first);
    pk__multiply_inputs(tangent, layer, points->count, tangent->integrator.path.tape.value[node->inputs[0]],
                        tangent->ones, first, block);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p], units = 2 * tangent->unit_count[row];
        const pk_real *slopes = tangent->slopes + p * 2 * out;
        const pk_real *weights = pk__weights_of_row(tangent, tangent->head[layer], row);
        const size_t *unit_row = tangent->unit_row + row * 2 * out;
        pk__tile_target tile = {PK__TILE_ADD, NULL, tangent->tile_row, NULL, NULL, 0};
        last = pk__row_end(points, p);
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            const pk__panels b = pk__fetch_panels(cotangents, out, column, block);
            const pk__panels left = {b.count, tangent->left + p * PK__TILE_LD + column, PK__TILE_LD, PK_PANEL,
                                     0};
            const pk__panels sums = {b.count, tangent->sums, PK__PAIR, PK_PANEL, 0};
            tile.to = tangent->tile + row * outputs * PK__TILE_LD + column;
            for (size_t j = 0; j < units; j += PK__HEAD_PART) {
                const size_t count = pk__min(PK__HEAD_PART, units - j);
                pk__panel_sums(count, last - p, slopes + j, 2 * out, &left, b.first, b.apart, unit_row + j,
                               tangent->sums);
                pk__panel_product(outputs, count, weights + j, 2 * out, 1, &sums, NULL, &tile);
            }
        }
        tangent->flops += 4.0 * (double)block * (double)(out * (last - p + outputs));
    }
}

/* ---- layers whose sum over points is taken first --------------------------------------------------------- */

/* left = x . x_i + bias of a layer on data: from the Gram matrix of the inputs, where there is one. */
static void pk__multiply_data(pk__integral *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk__examples *examples = tangent->examples;
    const pk_real bias = pk__has_bias(node);
    if (!tangent->gram || node->inputs[0] != 0) {
        pk__multiply_inputs(tangent, layer, tangent->rows, tangent->integrator.path.base[node->inputs[0]],
                            tangent->ones, first, block);
        return;
    }
    const int64_t *items = examples->items + first;
    for (size_t r = 0; r < tangent->rows; r++) {
        const pk_real *gram = tangent->gram + r * tangent->gram_ld;
        pk_real *left = tangent->left + r * PK__TILE_LD;
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
static void pk__add_readout(pk__integral *tangent, size_t layer, size_t first, size_t block, int fresh)
{
    const size_t outputs = tangent->outputs;
    const pk_real *panels = pk__first_panel(tangent->examples->cotangent[layer], outputs, first);
    for (size_t cell = 0; cell < tangent->rows * outputs; cell++) {
        const pk_real *left = tangent->left + cell / outputs * PK__TILE_LD;
        pk_real *tile = tangent->tile + cell * PK__TILE_LD;
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

/* ---- a step ---------------------------------------------------------------------------------------------- */

/* Where a layer has something to contract now. */
static int pk__is_due(const pk__integral *tangent, size_t layer, const pk__points *points)
{
    return !tangent->integrated[layer] &&
           (tangent->kind[layer] == PK__LAYER_POINTS ? points->count > 0 : points->last);
}

/* What all blocks of examples are multiplied with, beside what stands in the tape: inputs of points times their weights, and
 * the cell of the tile and the row of left that each product belongs to. */
static void pk__prepare_layers(pk__integral *tangent, const pk__points *points)
{
    const size_t outputs = tangent->outputs;
    for (size_t p = 0; p < points->count; p++)
        for (size_t k = 0; k < outputs; k++)
            tangent->point_to[p * outputs + k] = (points->row[p] * outputs + k) * PK__TILE_LD;
    for (size_t l = 0; points->count && l < tangent->graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        const pk_real *inputs = tangent->integrator.path.tape.value[node->inputs[0]];
        const size_t in = node->fan_in;
        if (tangent->integrated[l] || tangent->kind[l] != PK__LAYER_POINTS || pk__is_spread(tangent, l))
            continue;
        if (tangent->headed[l]) /* at most one layer stands below the last one */
            pk__prepare_head(tangent, l, points);
        else
            for (size_t p = 0; p < points->count; p++)
                for (size_t i = p * in; i < (p + 1) * in; i++)
                    tangent->weighted_inputs[l][i] = points->weight[p] * inputs[i];
    }
}

/* fresh: the tile holds nothing yet. */
static void pk__contract_layer(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                               size_t block, int fresh)
{
    const size_t outputs = tangent->outputs, rows = tangent->rows, count = points->count;
    if (fresh && !pk__is_readout(tangent, layer))
        pk__clear_tile(rows * outputs, block, tangent->tile);
    if (pk__is_spread(tangent, layer)) {
        pk__contract_places(tangent, layer, points, first, block);
    } else if (tangent->kind[layer] == PK__LAYER_POINTS && tangent->headed[layer]) {
        pk__contract_head(tangent, layer, points, first, block);
    } else if (tangent->kind[layer] == PK__LAYER_POINTS) {
        const pk_node *node = tangent->node[layer];
        pk__multiply_inputs(tangent, layer, count, tangent->weighted_inputs[layer], points->weight, first,
                            block);
        pk__multiply_cotangents(tangent, layer, count * outputs,
                                tangent->integrator.path.tape.cotangent[node - tangent->graph->nodes],
                                tangent->point_to, tangent->cell_left, first, block);
    } else {
        if (tangent->kind[layer] == PK__LAYER_DATA)
            pk__multiply_data(tangent, layer, first, block);
        else
            pk__multiply_inputs(tangent, layer, rows, tangent->input[layer], tangent->weight_sum, first, block);
        if (pk__is_readout(tangent, layer))
            pk__add_readout(tangent, layer, first, block, fresh);
        else
            pk__multiply_cotangents(tangent, layer, rows * outputs, tangent->delta[layer], tangent->tile_row,
                                    tangent->cell_left, first, block);
    }
}

/* The tiles of the factored layers, block after block of examples: of the points in hand and, after the last
 * ones, of what was summed over the step. */
PK__PRIVATE void pk__contract(pk__integral *tangent, const pk__points *points)
{
    const pk__examples *examples = tangent->examples;
    const size_t layers = tangent->graph->layers;
    double start = pk__seconds();
    if (examples && examples->count)
        pk__prepare_layers(tangent, points);
    for (size_t first = 0; examples && first < examples->count; first += PK__EXAMPLE_BLOCK) {
        const size_t block = pk__min(PK__EXAMPLE_BLOCK, examples->count - first);
        int filled = 0;
        for (size_t i = 0; i < layers; i++) {
            const size_t l = (i + layers - 1) % layers; /* the last one first: it may set the tile */
            if (!pk__is_due(tangent, l, points))
                continue;
            pk__contract_layer(tangent, l, points, first, block, !filled || tangent->per_layer);
            filled = 1;
            if (tangent->per_layer)
                tangent->sink(tangent->user, (int)l, first, block, tangent->tile);
        }
        if (filled && !tangent->per_layer)
            tangent->sink(tangent->user, -1, first, block, tangent->tile);
    }
    tangent->seconds_contraction += pk__seconds() - start;
}

/* How a layer is contracted in a step: the cost model, with the points per row of the last step. */
PK__PRIVATE void pk__choose_contraction(pk__integral *tangent, size_t layer, pk_engine engine)
{
    const pk_node *node = tangent->node[layer];
    const int is_points = tangent->kind[layer] == PK__LAYER_POINTS && !pk__is_spread(tangent, layer);
    double in = (double)node->fan_in, out = (double)node->width;
    double outputs = (double)tangent->outputs, batch = tangent->examples ? (double)tangent->examples->count : 1;
    double points = (double)tangent->integrator.points_last / (double)pk__max(tangent->rows, 1);
    /* Flops a row. What is done with a tile of registers costs about 8 flops a number; few points make small tiles. */
    double factored = points * batch * (2 * (outputs * out + in) + 8 * outputs);
    double headed = batch * (points * 2 * in + out * (6 * points + 8) + 4 * outputs * out);
    double integrated = 3 * points * outputs * out * in + batch * outputs * out * (2 * in + 8);
    const int automatic = engine == PK_ENGINE_AUTO && is_points;
    tangent->headed[layer] = tangent->head[layer] && (engine == PK_ENGINE_HEAD ||
                                                      (automatic && headed < factored && headed < integrated));
    tangent->integrated[layer] =
        tangent->kind[layer] == PK__LAYER_ROWS ||
        (!pk__is_spread(tangent, layer) && (engine == PK_ENGINE_INTEGRATED || tangent->check)) ||
        (automatic && tangent->phi[layer] && !tangent->headed[layer] && integrated < factored);
}

/* tile += sum over the places of an example of (e_k a_i + bias) . delta_i, output after output and unit after unit. */
static void pk__contract_matrix(pk__integral *tangent, size_t layer, size_t outputs, const pk_real *e,
                                size_t first, size_t columns, pk_real *tile)
{
    const pk_node *node = tangent->node[layer];
    const size_t in = node->fan_in, out = node->fan_out, places = node->positions,
                 most = pk__part_rows(node->fan_out, node->fan_in);
    /* Matrix and bias stand together where a layer is materialised row by row; else all matrices, then all biases. */
    const int together = tangent->kind[layer] == PK__LAYER_ROWS;
    const size_t stride = together ? node->weight_count : out * in, bias_stride = together ? stride : out;
    const pk_real *biases = pk__has_bias(node) ? e + (together ? out * in : outputs * out * in) : NULL;
    const pk_real *panels = pk__first_panel(tangent->examples->input[layer], places * in, first);
    const pk_real *cotangents = pk__first_panel(tangent->examples->cotangent[layer], places * out, first);
    pk__tile_target target = {PK__TILE_DOT, NULL, NULL, NULL, tangent->panel_row, places * out * PK_PANEL};
    for (size_t k = 0; k < outputs; k++)
        for (size_t j = 0; j < out; j += most)
            for (size_t column = 0; column < columns; column += pk__columns_at_once()) {
                pk__panels inputs = pk__panels_at(panels, places * in, column, columns);
                target.to = tile + k * PK__TILE_LD + column;
                for (size_t q = 0; q < places; q++, inputs.first += in * PK_PANEL) {
                    target.other = cotangents + column * places * out + (q * out + j) * PK_PANEL;
                    pk__panel_product(pk__min(most, out - j), in, e + k * stride + j * in, in, 1, &inputs,
                                      biases ? biases + k * bias_stride + j : NULL, &target);
                }
            }
    tangent->flops += 2.0 * (double)(outputs * out * places) * (double)columns * (double)in;
}

PK__INTERNAL void pk__integral_contract_row(pk__integral *tangent, size_t layer, size_t outputs,
                                            const pk_real *e, size_t first, size_t columns, pk_real *tile)
{
    const pk__examples *examples = tangent->examples;
    const size_t weights = tangent->node[layer]->weight_count;
    double start = pk__seconds();
    if (!examples->rows[layer]) {
        pk__contract_matrix(tangent, layer, outputs, e, first, columns, tile);
    } else {
        pk__gemm(0, 0, outputs, columns, weights, 1, e, weights, examples->rows[layer] + first, examples->ld, 1,
                 tile, PK__TILE_LD);
        tangent->flops += 2.0 * (double)outputs * (double)columns * (double)weights;
    }
    tangent->seconds_contraction += pk__seconds() - start;
}

PK__END_CODE
/* <<< implementation */
#endif
