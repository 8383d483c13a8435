/* pathkernel/contraction.h: inner products of tangent features with the gradients of examples: the hot loop.
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
 * A layer that is used at Q places (a convolution, a dense layer on tokens) has a sum of Q outer products: its points
 * count Q times and its examples Q times, so Q^2 products of pairs, or both sides are materialised (pk_layer_by_rows).
 */
#ifndef PATHKERNEL_CONTRACTION_H
#define PATHKERNEL_CONTRACTION_H
#include "feature.h"

/* >>> declarations */
PK__BEGIN_C

/* tile (outputs x columns) = < e_k, g_b > for the columns b = first .. first + columns - 1, e of `outputs` outputs laid
 * out like phi of the layer. */
PK_API void pk_tangent_contract_row(pk_tangent *tangent, size_t layer, size_t outputs, const pk_real *e,
                                    size_t first, size_t columns, pk_real *tile);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_CONTRACTION_IMPLEMENTED)
#define PATHKERNEL_CONTRACTION_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_C

/* left[p] o right[p, k] summed into tile[row[p], k], over count columns; row == NULL: row p. */
static void pk__hadamard(size_t points, size_t outputs, size_t count, const size_t *row, const pk_real *left,
                         const pk_real *right, pk_real *tile)
{
    for (size_t p = 0; p < points; p++) {
        const pk_real *l = left + p * count;
        pk_real *t = tile + (row ? row[p] : p) * outputs * count;
        const pk_real *r = right + p * outputs * count;
        for (size_t k = 0; k < outputs; k++, t += count, r += count)
            for (size_t i = 0; i < count; i++)
                t[i] += l[i] * r[i];
    }
}

/* One layer used at several places, one block of examples, the points in hand: every place of a point with every place
 * of an example, tile += w_p sum_qr (a_pq . a_ir + bias) (delta_pq . delta_ir). */
static void pk__contract_places(pk_tangent *tangent, size_t layer, const pk_points *points, size_t first,
                                size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t outputs = tangent->outputs, positions = node->positions, in = node->fan_in,
                 out = node->fan_out, together = pk__place_points(node, outputs),
                 chunk = pk__product_rows(outputs);
    const pk_real bias = pk__has_bias(node);
    pk_real *left = tangent->left;
    for (size_t p = 0; p < points->count; p += together) {
        const size_t count = pk__least(together, points->count - p), pairs = count * positions;
        pk_real *places = tangent->places, *deltas = places + pairs * in;
        for (size_t i = 0; i < count; i++)
            pk__node_places(&tangent->integrator.segment.tape, node, p + i, outputs,
                            places + i * positions * in, deltas + i * positions * outputs * out);
        for (size_t i = 0; i < pairs; i++)
            tangent->place_row[i] = points->row[p + i / positions];
        for (size_t r = 0; r < positions; r++) {
            const pk_real *input = examples->input[layer] + r * in * examples->ld + first;
            const pk_real *cotangent = examples->cotangent[layer] + r * out * examples->ld + first;
            pk__gemm(0, 0, pairs, block, in, 1, places, in, input, examples->ld, 0, left, block);
            for (size_t i = 0; i < pairs; i++)
                for (size_t b = 0; b < block; b++)
                    left[i * block + b] = points->weight[p + i / positions] * (left[i * block + b] + bias);
            for (size_t i = 0; i < pairs; i += chunk) {
                const size_t some = pk__least(chunk, pairs - i);
                pk__gemm(0, 0, some * outputs, block, out, 1, deltas + i * outputs * out, out, cotangent,
                         examples->ld, 0, tangent->right, block);
                pk__hadamard(some, outputs, block, tangent->place_row + i, left + i * block, tangent->right,
                             tangent->tile);
            }
        }
        tangent->flops += 2.0 * (double)(block * pairs * positions) * (double)(in + outputs * out);
    }
}

/* left = w_p (a_p . a_i + bias) for the points in hand and a block of examples. */
static void pk__weighted_inputs(pk_tangent *tangent, size_t layer, const pk_points *points, size_t first,
                                size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t in = node->fan_in;
    const pk_real *a = tangent->integrator.segment.tape.value[node->inputs[0]];
    const pk_real bias = pk__has_bias(node);
    pk_real *left = tangent->left;
    pk__gemm(0, 0, points->count, block, in, 1, a, in, examples->input[layer] + first, examples->ld, 0, left,
             block);
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < block; i++)
            left[p * block + i] = points->weight[p] * (left[p * block + i] + bias);
}

/* One layer, one block of examples, the points in hand: tile += w_p (a_p . a_i + bias) (delta_p . delta_i). */
static void pk__contract_points(pk_tangent *tangent, size_t layer, const pk_points *points, size_t first,
                                size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    size_t outputs = tangent->outputs, chunk = pk__product_rows(outputs), out = node->width;
    size_t in = node->fan_in;
    const pk_real *delta = tangent->integrator.segment.tape.cotangent[node - tangent->graph->nodes];
    pk__weighted_inputs(tangent, layer, points, first, block);
    for (size_t p = 0; p < points->count; p += chunk) {
        size_t count = pk__least(chunk, points->count - p);
        pk__gemm(0, 0, count * outputs, block, out, 1, delta + p * outputs * out, out,
                 examples->cotangent[layer] + first, examples->ld, 0, tangent->right, block);
        pk__hadamard(count, outputs, block, points->row + p, tangent->left + p * block, tangent->right,
                     tangent->tile);
    }
    tangent->flops += 2.0 * (double)block * (double)points->count * (double)(in + outputs * out);
}

/* W^T seed_k and D^T seed_k of the last layer for every row and output, side by side: seeds are its cotangents. */
static void pk__head_weights(pk_tangent *tangent, const pk_node *head)
{
    const pk_segment *segment = &tangent->integrator.segment;
    const size_t outputs = tangent->outputs, out = head->width, in = head->fan_in;
    const size_t cells = tangent->rows * outputs;
    const pk_real *seed = tangent->delta[head->layer];
    for (int part = 0; part < 2; part++)
        pk__gemm(0, 0, cells, in, out, 1, seed, out,
                 (part ? segment->direction : segment->weights) + head->weight_offset, in, 0,
                 tangent->head_weights + (size_t)part * in, 2 * in);
}

/* slope and t slope of the operation between the layer and the last one, at the points in hand. */
static void pk__head_slopes(pk_tangent *tangent, size_t layer, const pk_points *points)
{
    const pk_graph *graph = tangent->graph;
    const pk_tape *tape = &tangent->integrator.segment.tape;
    const pk_node *between = pk__layer_input(graph, tangent->head[layer]);
    const size_t out = between->width;
    pk_real *ones = tangent->left, *slopes = tangent->scratch;
    for (size_t i = 0; i < out; i++)
        ones[i] = 1;
    for (size_t p = 0; p < points->count; p++) {
        pk_call call;
        pk__tape_call(tape, between, 1, 1, &call);
        call.in[0] += p * out;
        call.out += p * out;
        call.out_cotangent = ones;
        call.in_cotangent[0] = slopes;
        between->operation->reverse(&call);
        for (size_t i = 0; i < out; i++) {
            tangent->slopes[p * 2 * out + i] = slopes[i];
            tangent->slopes[p * 2 * out + out + i] = points->t[p] * slopes[i];
        }
    }
}

/* One layer below the last, one block of examples: tile += sum_j (W_kj Q_ji + D_kj R_ji) delta_ij with
 * Q = sum_p w_p slope_p (a_p . a_i + bias) and R the same with t_p: outputs cost once a row, not once a point. */
static void pk__contract_head(pk_tangent *tangent, size_t layer, const pk_points *points, size_t first,
                              size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t outputs = tangent->outputs, out = node->width, in = node->fan_in;
    pk_real *left = tangent->left, *sums = tangent->sums;
    pk__weighted_inputs(tangent, layer, points, first, block);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p];
        for (last = p + 1; last < points->count && points->row[last] == row; last++)
            ;
        pk__gemm(1, 0, 2 * out, block, last - p, 1, tangent->slopes + p * 2 * out, 2 * out, left + p * block,
                 block, 0, sums, block);
        for (size_t j = 0; j < 2 * out; j++) {
            const pk_real *delta = examples->cotangent[layer] + j % out * examples->ld + first;
            for (size_t i = 0; i < block; i++)
                sums[j * block + i] *= delta[i];
        }
        pk__gemm(0, 0, outputs, block, 2 * out, 1, tangent->head_weights + row * outputs * 2 * out, 2 * out,
                 sums, block, 1, tangent->tile + row * outputs * block, block);
        tangent->flops += 4.0 * (double)block * (double)(out * (last - p + outputs));
    }
    tangent->flops += 2.0 * (double)block * (double)(points->count * in);
}

/* tile += left o (delta . delta_i) of a whole step, delta that of each row and output. */
static void pk__contract_cotangents(pk_tangent *tangent, size_t layer, size_t first, size_t block)
{
    const pk_examples *examples = tangent->examples;
    const size_t rows = tangent->rows, outputs = tangent->outputs, out = tangent->node[layer]->width;
    pk__gemm(0, 0, rows * outputs, block, out, 1, tangent->delta[layer], out,
             examples->cotangent[layer] + first, examples->ld, 0, tangent->right, block);
    pk__hadamard(rows, outputs, block, NULL, tangent->left, tangent->right, tangent->tile);
    tangent->flops += 2.0 * (double)block * (double)(rows * outputs * out);
}

/* A layer on data, whole step: tile += (x . x_i + bias) (delta . delta_i). */
static void pk__contract_data(pk_tangent *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t rows = tangent->rows, in = node->fan_in;
    const pk_real bias = pk__has_bias(node);
    pk_real *left = tangent->left;
    if (tangent->gram && node->inputs[0] == 0) {
        const int64_t *items = examples->items + first;
        for (size_t r = 0; r < rows; r++) {
            const pk_real *gram = tangent->gram + r * tangent->gram_ld;
            if (examples->consecutive)
                for (size_t i = 0; i < block; i++)
                    left[r * block + i] = gram[(size_t)items[0] + i] + bias;
            else
                for (size_t i = 0; i < block; i++)
                    left[r * block + i] = gram[items[i]] + bias;
        }
    } else {
        pk__gemm(0, 0, rows, block, in, 1, tangent->integrator.segment.base[node->inputs[0]], in,
                 examples->input[layer] + first, examples->ld, 0, left, block);
        for (size_t i = 0; i < rows * block; i++)
            left[i] += bias;
        tangent->flops += 2.0 * (double)block * (double)(rows * in);
    }
    pk__contract_cotangents(tangent, layer, first, block);
}

/* A layer with a constant cotangent, whole step: tile += (a . a_i + bias) (delta . delta_i), a summed over points. */
static void pk__contract_linear(pk_tangent *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t rows = tangent->rows, outputs = tangent->outputs, in = node->fan_in;
    const pk_real bias = pk__has_bias(node);
    pk_real *left = tangent->left;
    pk__gemm(0, 0, rows, block, in, 1, tangent->input[layer], in, examples->input[layer] + first, examples->ld,
             0, left, block);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < block; i++)
            left[r * block + i] += bias * tangent->weight_sum[r];
    tangent->flops += 2.0 * (double)block * (double)(rows * in);
    if (tangent->integrator.readout.kind == PK_READOUT_ALL &&
        node == &tangent->graph->nodes[tangent->graph->node_count - 1]) {
        /* The last layer of all outputs: delta is the unit matrix. */
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < outputs; k++) {
                const pk_real *right = examples->cotangent[layer] + k * examples->ld + first;
                pk_real *tile = tangent->tile + (r * outputs + k) * block;
                for (size_t i = 0; i < block; i++)
                    tile[i] += left[r * block + i] * right[i];
            }
        return;
    }
    pk__contract_cotangents(tangent, layer, first, block);
}

/* The tiles of the factored layers, block after block of examples: of the points in hand and, after the last
 * ones, of what was summed over the step. */
PK__PRIVATE void pk__contract(pk_tangent *tangent, const pk_points *points)
{
    const pk_examples *examples = tangent->examples;
    double start = pk__seconds();
    for (size_t l = 0; points->count && l < tangent->graph->layers; l++)
        if (tangent->headed[l]) { /* at most one layer stands below the last one */
            pk__head_weights(tangent, tangent->head[l]);
            pk__head_slopes(tangent, l, points);
        }
    for (size_t first = 0; examples && first < examples->count; first += PK_EXAMPLE_BLOCK) {
        size_t block = pk__least(PK_EXAMPLE_BLOCK, examples->count - first);
        size_t cells = tangent->rows * tangent->outputs * block;
        int filled = 0;
        for (size_t l = 0; l < tangent->graph->layers; l++) {
            pk_layer_kind kind = tangent->kind[l];
            if (tangent->integrated[l] || (kind == PK_LAYER_POINTS ? !points->count : !points->last))
                continue;
            if (!filled || tangent->per_layer)
                memset(tangent->tile, 0, cells * sizeof *tangent->tile);
            filled = 1;
            if (kind == PK_LAYER_POINTS && tangent->headed[l])
                pk__contract_head(tangent, l, points, first, block);
            else if (pk__is_spread(tangent, l))
                pk__contract_places(tangent, l, points, first, block);
            else if (kind == PK_LAYER_POINTS)
                pk__contract_points(tangent, l, points, first, block);
            else if (kind == PK_LAYER_DATA)
                pk__contract_data(tangent, l, first, block);
            else
                pk__contract_linear(tangent, l, first, block);
            if (tangent->per_layer)
                tangent->sink(tangent->user, (int)l, first, block, tangent->tile);
        }
        if (filled && !tangent->per_layer)
            tangent->sink(tangent->user, -1, first, block, tangent->tile);
    }
    tangent->seconds_contraction += pk__seconds() - start;
}

/* How a layer is contracted in a step: the cost model, with the points per row of the last step. */
PK__PRIVATE void pk__choose_contraction(pk_tangent *tangent, size_t layer, pk_engine engine)
{
    const pk_node *node = tangent->node[layer];
    const int is_points = tangent->kind[layer] == PK_LAYER_POINTS && !pk__is_spread(tangent, layer);
    double in = (double)node->fan_in, out = (double)node->width;
    double outputs = (double)tangent->outputs, batch = tangent->examples ? (double)tangent->examples->count : 1;
    double points = (double)tangent->integrator.points_last / (double)pk__most(tangent->rows, 1);
    /* Flops a row. A Hadamard product reads and writes memory, worth about 8 flops a number; the head's sums are
     * products over few points, which run at half the rate. */
    double factored = points * batch * (2 * (outputs * out + in) + 8 * outputs);
    double headed = batch * (points * (2 * in + 8 * out) + 4 * outputs * out + 8 * out);
    double integrated = 2 * points * outputs * out * in + batch * outputs * out * (2 * in + 4);
    const int automatic = engine == PK_ENGINE_AUTO && is_points;
    tangent->headed[layer] = tangent->head[layer] && (engine == PK_ENGINE_HEAD ||
                                                      (automatic && headed < factored && headed < integrated));
    tangent->integrated[layer] =
        tangent->kind[layer] == PK_LAYER_ROWS ||
        (!pk__is_spread(tangent, layer) && (engine == PK_ENGINE_INTEGRATED || tangent->check)) ||
        (automatic && tangent->phi[layer] && !tangent->headed[layer] && integrated < factored);
}

/* The same for a layer used at several places whose examples are factored: tile = sum_q (e_k a_iq + bias) . delta_iq. */
static void pk__contract_row_places(pk_tangent *tangent, size_t layer, size_t outputs, const pk_real *e,
                                    size_t first, size_t columns, pk_real *tile)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    const size_t in = node->fan_in, out = node->fan_out, ld = examples->ld, weights = node->weight_count;
    memset(tile, 0, outputs * columns * sizeof *tile);
    for (size_t at = 0; at < columns; at += 64) {
        const size_t part = pk__least(64, columns - at);
        for (size_t q = 0; q < node->positions; q++)
            for (size_t k = 0; k < outputs; k++) {
                const pk_real *own = e + k * weights;
                pk__gemm(0, 0, out, part, in, 1, own, in, examples->input[layer] + q * in * ld + first + at, ld,
                         0, tangent->scratch, part);
                for (size_t j = 0; j < out; j++) {
                    const pk_real *product = tangent->scratch + j * part;
                    const pk_real *delta = examples->cotangent[layer] + (q * out + j) * ld + first + at;
                    const pk_real add = weights > out * in ? own[out * in + j] : 0;
                    pk_real *to = tile + k * columns + at;
                    for (size_t i = 0; i < part; i++)
                        to[i] += (product[i] + add) * delta[i];
                }
            }
    }
    tangent->flops += 2.0 * (double)(outputs * out * node->positions) * (double)columns * (double)in;
}

PK_API void pk_tangent_contract_row(pk_tangent *tangent, size_t layer, size_t outputs, const pk_real *e,
                                    size_t first, size_t columns, pk_real *tile)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    size_t out = node->width, ld = examples->ld;
    double start = pk__seconds();
    if (tangent->kind[layer] == PK_LAYER_ROWS && !examples->rows[layer]) {
        pk__contract_row_places(tangent, layer, outputs, e, first, columns, tile);
        tangent->seconds_contraction += pk__seconds() - start;
        return;
    }
    if (tangent->kind[layer] == PK_LAYER_ROWS) {
        pk__gemm(0, 0, outputs, columns, node->weight_count, 1, e, node->weight_count,
                 examples->rows[layer] + first, ld, 0, tile, columns);
        tangent->flops += 2.0 * (double)outputs * (double)columns * (double)node->weight_count;
        tangent->seconds_contraction += pk__seconds() - start;
        return;
    }
    size_t in = node->fan_in;
    const pk_real *bias = pk__has_bias(node) ? e + outputs * out * in : NULL;
    memset(tile, 0, outputs * columns * sizeof *tile);
    /* e a_i for all outputs at once, a part of the examples at a time so that it stays in the cache. */
    for (size_t at = 0; at < columns; at += 64) {
        size_t part = pk__least(64, columns - at);
        pk__gemm(0, 0, outputs * out, part, in, 1, e, in, examples->input[layer] + first + at, ld, 0,
                 tangent->scratch, part);
        for (size_t k = 0; k < outputs; k++)
            for (size_t j = 0; j < out; j++) {
                const pk_real *product = tangent->scratch + (k * out + j) * part;
                const pk_real *delta = examples->cotangent[layer] + j * ld + first + at;
                const pk_real add = bias ? bias[k * out + j] : 0;
                pk_real *to = tile + k * columns + at;
                for (size_t i = 0; i < part; i++)
                    to[i] += (product[i] + add) * delta[i];
            }
    }
    tangent->flops += 2.0 * (double)(outputs * out) * (double)columns * (double)in;
    tangent->seconds_contraction += pk__seconds() - start;
}

PK__END_C
/* <<< implementation */
#endif
