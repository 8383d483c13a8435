/* pathkernel/tangent.h: tangent features (gradients of outputs and of losses with respect to the weights),
 * factored or materialised, and their inner products: the hot loop.
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
#ifndef PATHKERNEL_TANGENT_H
#define PATHKERNEL_TANGENT_H
#include "example.h"
#include "quadrature.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_engine {
    PK_ENGINE_AUTO,      /* the cheapest by the cost model */
    PK_ENGINE_FACTORED,  /* Hadamard products at each point */
    PK_ENGINE_HEAD,      /* the outputs taken out of the sum over points, where a layer allows it */
    PK_ENGINE_INTEGRATED /* Phi materialised; the only one for stateful optimisers and PK_TANGENT_ROWS */
} pk_engine;

/* What a layer needs per point. */
typedef enum pk_layer_kind {
    PK_LAYER_DATA,   /* input constant: sum_p w_p delta_p */
    PK_LAYER_LINEAR, /* cotangent constant: sum_p w_p a_p */
    PK_LAYER_POINTS, /* both vary */
    PK_LAYER_ROWS    /* materialised row by row */
} pk_layer_kind;

enum { PK_DIRECTIONS = 3 };

/* tile (row_count * outputs x count, contiguous) of inner products <Phi, g_b>, b = first .. first + count - 1,
 * from one layer, or from several at once (layer -1). */
typedef void pk_tile_sink(void *user, int layer, size_t first, size_t count, const pk_real *tile);

/* One thread's memory. A row's Phi is stored layer by layer: (outputs x layer outputs x layer inputs) of the weight,
 * then (outputs x layer outputs) of the bias; or (outputs x weights) for PK_LAYER_ROWS. */
typedef struct pk_tangent {
    const pk_graph *graph;
    pk_integrator integrator;
    size_t outputs, rows, row_capacity, reverse_points;
    /* Phi can be had of the outputs first_output .. first_output + output_count - 1, at most output_capacity of them,
     * the caller's choice before a step: whole groups of `unit`, which are materialised together whatever is chosen. */
    size_t unit, first_output, output_count, output_capacity;
    pk_layer_kind *kind;
    const pk_node **node;
    int *integrated; /* this step: Phi of the layer is wanted */
    int *headed;     /* this step: the outputs are taken out of the sum over points */
    const pk_node *
        *head;       /* POINTS below an elementwise operation below the last layer: that layer; else NULL */
    pk_real **delta; /* DATA: rows x outputs x out, integrated; LINEAR: the constant cotangent */
    pk_real **input; /* LINEAR: rows x in, integrated; DATA: points into the segment's base */
    pk_real **phi;   /* POINTS and ROWS: rows x output_capacity x weights */
    pk_real **check,
        **size;       /* with bounds, like phi: the difference to a better rule; after a step, the error */
    double allowance; /* c eps of the rounding bound */
    int per_layer;    /* tiles layer by layer */
    const pk_real *directions[PK_DIRECTIONS]; /* P each, NULL: unused */
    pk_real *along[PK_DIRECTIONS];            /* rows x outputs: < Phi, direction > */
    pk_real *weight_sum;                      /* rows */
    /* The contraction: */
    const pk_examples *examples;
    const pk_real *gram; /* rows x gram_ld: inputs times the training inputs, or NULL */
    size_t gram_ld;
    pk_tile_sink *sink;
    void *user;
    pk_real *tile, *left, *right, *scratch, *weighted, *absolute;
    pk_real *head_weights; /* rows x outputs x (out of W^T seed, out of D^T seed) */
    pk_real *slopes;       /* points x 2 out: slope, t slope */
    pk_real *sums;         /* 2 out x PK_EXAMPLE_BLOCK */
    pk_real *places;       /* of some points of a layer used at several places: inputs, then cotangents */
    size_t *place_row;     /* the row of each place */
    pk_points sorted;
    double flops; /* of the contraction, counted */
    double seconds_contraction;
} pk_tangent;

/* Phi of every layer can be had of materialise outputs at a time (it costs rows x materialise x P numbers; 0: of none),
 * in groups of unit; with bounds, also a bound on its error, number by number (three times that). */
PK_API void pk_tangent_take(pk_arena *arena, const pk_graph *graph, const pk_readout *readout, size_t rows,
                            size_t materialise, size_t unit, int bounds,
                            const pk_representation *representation, pk_tangent *tangent);
/* How many test rows make a block, from shapes alone. */
PK_API size_t pk_tangent_block(size_t outputs);
/* How many outputs are materialised together, from shapes alone: their Phi is about a megabyte, or one output's. */
PK_API size_t pk_tangent_unit(size_t outputs, size_t parameters);
/* Integrates the step of the rows and sends the tiles of the factored layers. Phi of the layers for which
 * `engine` (and the cost model) chose to materialise stands in phi afterwards, see pk_tangent_row_phi. */
PK_API void pk_tangent_step(pk_tangent *tangent, const pk_real *weights, const pk_real *direction,
                            size_t first_row, size_t rows, const pk_real *inputs, pk_engine engine);
/* phi of the outputs first .. first + count - 1 (of those chosen) of one row after pk_tangent_step: (count x layer outputs
 * x layer inputs) of the weight, then (count x layer outputs) of the bias; count x weights for PK_LAYER_ROWS. */
PK_API void pk_tangent_row_phi(const pk_tangent *tangent, size_t layer, size_t row, size_t first, size_t count,
                               pk_real *phi);
/* error >= |computed - true Phi|, same layout: twice the difference to a rule of higher order, the uncertainty of the
 * kinks times the gradients beside them, and pk_rounding_allowance times sum_p w_p |delta_p| |a_p|. */
PK_API void pk_tangent_row_error(const pk_tangent *tangent, size_t layer, size_t row, size_t first,
                                 size_t count, pk_real *error);
/* tile (outputs x columns) = < e_k, g_b > for the columns b = first .. first + columns - 1, e of `outputs` outputs laid
 * out like phi of the layer. */
PK_API void pk_tangent_contract_row(pk_tangent *tangent, size_t layer, size_t outputs, const pk_real *e,
                                    size_t first, size_t columns, pk_real *tile);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_TANGENT_IMPLEMENTED)
#define PATHKERNEL_TANGENT_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_C

PK_API size_t pk_tangent_block(size_t outputs)
{
    return pk__most(1, pk__least(32, 50 / pk__most(outputs, 1)));
}

PK_API size_t pk_tangent_unit(size_t outputs, size_t parameters)
{
    return pk__most(1, pk__least(outputs, ((size_t)1 << 17) / pk__most(parameters, 1)));
}

/* Points of one call of the sink: enough rows for the products to run at speed, few enough for the cache. */
static size_t pk__point_capacity(size_t outputs)
{
    return pk__most(PK_GAUSS_NODES + 2, pk__least(256, 640 / pk__most(outputs, 1)));
}

/* Of those, points whose cotangents are in memory at one time: about 2^21 numbers, or one point. */
static size_t pk__reverse_points(const pk_graph *graph, size_t points, size_t outputs)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].varies)
            numbers += graph->nodes[n].width;
    return pk__most(1, pk__least(points, ((size_t)1 << 21) / numbers / pk__most(outputs, 1)));
}

/* Rows of products that are on their way to a Hadamard product at one time. */
static size_t pk__product_rows(size_t outputs)
{
    return pk__most(1, 128 / outputs);
}

/* The only node that reads node, NULL where there are none or several. */
static const pk_node *pk__only_reader(const pk_graph *graph, const pk_node *node)
{
    const pk_node *reader = NULL;
    for (size_t n = 1; n < graph->node_count; n++)
        for (int j = 0; j < graph->nodes[n].input_count; j++) {
            if (&graph->nodes[graph->nodes[n].inputs[j]] != node)
                continue;
            if (reader)
                return NULL;
            reader = &graph->nodes[n];
        }
    return reader;
}

/* The last layer where only an elementwise operation stands between it and node. */
static const pk_node *pk__head_of(const pk_graph *graph, const pk_node *node)
{
    const pk_node *between = pk__only_reader(graph, node);
    const pk_node *head = between && between->operation->elementwise ? pk__only_reader(graph, between) : NULL;
    return head && head->cotangent_constant && pk__is_outer(head) ? head : NULL;
}

static pk_layer_kind pk__layer_kind(const pk_node *node, const pk_readout *readout, int bounds,
                                    const pk_representation *representation)
{
    if (pk_layer_by_rows(representation, node))
        return PK_LAYER_ROWS;
    if (bounds || !pk__is_outer(node))
        return PK_LAYER_POINTS;
    if (node->input_constant)
        return PK_LAYER_DATA;
    return node->cotangent_constant && readout->kind != PK_READOUT_FUNCTION ? PK_LAYER_LINEAR : PK_LAYER_POINTS;
}

/* Points of a spread layer whose places are in memory at one time. */
static size_t pk__place_points(const pk_node *node, size_t outputs)
{
    return pk__most(1, ((size_t)1 << 17) / (node->positions * (node->fan_in + outputs * node->fan_out)));
}

/* A layer used at several places, where it is not by rows. */
static int pk__is_spread(const pk_tangent *tangent, size_t layer)
{
    return tangent->kind[layer] == PK_LAYER_POINTS && !pk__is_outer(tangent->node[layer]);
}

PK_API void pk_tangent_take(pk_arena *arena, const pk_graph *graph, const pk_readout *readout, size_t rows,
                            size_t materialise, size_t unit, int bounds,
                            const pk_representation *representation, pk_tangent *tangent)
{
    size_t outputs = pk_readout_count(readout, graph->output_width), layers = graph->layers;
    size_t points = pk__point_capacity(outputs), block = PK_EXAMPLE_BLOCK, both = rows * outputs, widest = 0,
           deepest = 0, places = 0, place_numbers = 0;
    memset(tangent, 0, sizeof *tangent);
    tangent->graph = graph;
    tangent->outputs = outputs;
    tangent->row_capacity = rows;
    tangent->unit = unit;
    tangent->output_capacity = tangent->output_count = materialise ? materialise : outputs;
    tangent->allowance = pk_rounding_allowance(graph);
    points = pk__most(points, PK_GAUSS_NODES + 2);
    tangent->reverse_points = pk__reverse_points(graph, points, outputs);
    pk_integrator_take(arena, graph, rows, points, tangent->reverse_points, outputs, bounds,
                       &tangent->integrator);
    tangent->integrator.readout = *readout;
    points = tangent->reverse_points;
    tangent->kind = (pk_layer_kind *)pk_arena_take(arena, layers, sizeof *tangent->kind);
    tangent->node = (const pk_node **)pk_arena_take(arena, layers, sizeof *tangent->node);
    tangent->integrated = (int *)pk_arena_take(arena, layers, sizeof *tangent->integrated);
    tangent->headed = (int *)pk_arena_take(arena, layers, sizeof *tangent->headed);
    tangent->head = (const pk_node **)pk_arena_take(arena, layers, sizeof *tangent->head);
    tangent->delta = (pk_real **)pk_arena_take(arena, layers, sizeof(pk_real *));
    tangent->input = (pk_real **)pk_arena_take(arena, layers, sizeof(pk_real *));
    tangent->phi = (pk_real **)pk_arena_take(arena, layers, sizeof(pk_real *));
    tangent->check = bounds ? (pk_real **)pk_arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    tangent->size = bounds ? (pk_real **)pk_arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    for (size_t l = 0; l < layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        pk_layer_kind kind = pk__layer_kind(node, readout, bounds, representation);
        size_t fan_in = pk__layer_input(graph, node)->width;
        const int spread = node->tangent_form == PK_TANGENT_OUTER && !pk__is_outer(node);
        int hoisted = kind == PK_LAYER_DATA || kind == PK_LAYER_LINEAR;
        int phi_wanted =
            kind == PK_LAYER_ROWS || (kind == PK_LAYER_POINTS && !spread && (materialise || bounds));
        pk_real *delta = hoisted ? (pk_real *)pk_arena_take(arena, both, node->width * sizeof *delta) : NULL;
        pk_real *input =
            kind == PK_LAYER_LINEAR ? (pk_real *)pk_arena_take(arena, rows, fan_in * sizeof *input) : NULL;
        const size_t cells = rows * tangent->output_capacity, bytes = node->weight_count * sizeof(pk_real);
        pk_real *phi = phi_wanted ? (pk_real *)pk_arena_take(arena, cells, bytes) : NULL;
        pk_real *check = bounds ? (pk_real *)pk_arena_take(arena, cells, bytes) : NULL;
        pk_real *size = bounds ? (pk_real *)pk_arena_take(arena, cells, bytes) : NULL;
        if (tangent->check) {
            tangent->check[l] = check;
            tangent->size[l] = size;
        }
        if (tangent->kind) {
            tangent->kind[l] = kind;
            tangent->head[l] = kind == PK_LAYER_POINTS && !bounds && readout->kind != PK_READOUT_FUNCTION
                                   ? pk__head_of(graph, node)
                                   : NULL;
            tangent->node[l] = node;
            tangent->delta[l] = delta;
            tangent->input[l] = input;
            tangent->phi[l] = phi;
        }
        if (phi_wanted)
            deepest = pk__most(deepest, fan_in);
        if (spread) {
            const size_t together = pk__place_points(node, outputs) * node->positions;
            places = pk__most(places, together);
            place_numbers = pk__most(place_numbers, together * (node->fan_in + outputs * node->fan_out));
        }
        widest = pk__most(widest, pk__most(node->width, kind == PK_LAYER_ROWS ? node->weight_count : 0));
    }
    for (int v = 0; v < PK_DIRECTIONS; v++)
        tangent->along[v] = (pk_real *)pk_arena_take(arena, both, sizeof(pk_real));
    tangent->weight_sum = (pk_real *)pk_arena_take(arena, rows, sizeof(pk_real));
    size_t product = pk__most(pk__most(pk__product_rows(outputs) * outputs, both), points);
    tangent->tile = (pk_real *)pk_arena_take(arena, both, block * sizeof(pk_real));
    tangent->left = (pk_real *)pk_arena_take(
        arena, pk__most(pk__most(rows, points), pk__most(places, pk__blocks(widest, block))),
        block * sizeof(pk_real));
    tangent->places = (pk_real *)pk_arena_take(arena, place_numbers, sizeof(pk_real));
    tangent->place_row = (size_t *)pk_arena_take(arena, places, sizeof *tangent->place_row);
    tangent->right = (pk_real *)pk_arena_take(arena, product, block * sizeof(pk_real));
    /* Products with a direction (points x widest) or with Phi (outputs x widest x a part of the block). */
    tangent->scratch =
        (pk_real *)pk_arena_take(arena, pk__most(pk__most(points * (bounds ? outputs : 1), rows), outputs * 64),
                                 widest * sizeof(pk_real));
    tangent->weighted = (pk_real *)pk_arena_take(arena, points, deepest * sizeof(pk_real));
    tangent->head_weights = (pk_real *)pk_arena_take(arena, both, 2 * widest * sizeof(pk_real));
    tangent->slopes = (pk_real *)pk_arena_take(arena, points, 2 * widest * sizeof(pk_real));
    tangent->sums = (pk_real *)pk_arena_take(arena, block, 2 * widest * sizeof(pk_real));
    tangent->absolute = bounds ? (pk_real *)pk_arena_take(arena, points, deepest * sizeof(pk_real)) : NULL;
    points = tangent->integrator.segment.point_capacity;
    pk_points_take(arena, points, bounds, &tangent->sorted);
}

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
    const pk_real bias = pk__has_bias(tangent->graph, node);
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
    const size_t in = pk__layer_input(tangent->graph, node)->width;
    const pk_real *a = tangent->integrator.segment.tape.value[node->inputs[0]];
    const pk_real bias = pk__has_bias(tangent->graph, node);
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
    size_t in = pk__layer_input(tangent->graph, node)->width;
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
    const size_t outputs = tangent->outputs, out = head->width,
                 in = pk__layer_input(tangent->graph, head)->width;
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
    const size_t outputs = tangent->outputs, out = node->width,
                 in = pk__layer_input(tangent->graph, node)->width;
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

/* A layer on data, whole step: tile += (x . x_i + bias) (delta . delta_i). */
static void pk__contract_data(pk_tangent *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    size_t rows = tangent->rows, outputs = tangent->outputs, out = node->width;
    size_t in = pk__layer_input(tangent->graph, node)->width;
    const pk_real bias = pk__has_bias(tangent->graph, node);
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
    pk__gemm(0, 0, rows * outputs, block, out, 1, tangent->delta[layer], out,
             examples->cotangent[layer] + first, examples->ld, 0, tangent->right, block);
    pk__hadamard(rows, outputs, block, NULL, left, tangent->right, tangent->tile);
    tangent->flops += 2.0 * (double)block * (double)(rows * outputs * out);
}

/* A layer with a constant cotangent, whole step: tile += (a . a_i + bias) (delta . delta_i), a summed over points. */
static void pk__contract_linear(pk_tangent *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    size_t rows = tangent->rows, outputs = tangent->outputs, out = node->width;
    size_t in = pk__layer_input(tangent->graph, node)->width;
    const pk_real bias = pk__has_bias(tangent->graph, node);
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
    pk__gemm(0, 0, rows * outputs, block, out, 1, tangent->delta[layer], out,
             examples->cotangent[layer] + first, examples->ld, 0, tangent->right, block);
    pk__hadamard(rows, outputs, block, NULL, left, tangent->right, tangent->tile);
    tangent->flops += 2.0 * (double)block * (double)(rows * outputs * out);
}

/* The tiles of the factored layers, block after block of examples: of the points in hand and, after the last
 * ones, of what was summed over the step. */
static void pk__contract(pk_tangent *tangent, const pk_points *points)
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

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p) for one layer at points, or rows where row == NULL. */
static void pk__add_along(pk_tangent *tangent, size_t layer, size_t count, const size_t *row,
                          const pk_real *weight, const pk_real *input, const pk_real *delta,
                          const pk_real *bias_scale)
{
    const pk_node *node = tangent->node[layer];
    size_t out = node->width, in = pk__layer_input(tangent->graph, node)->width, outputs = tangent->outputs;
    for (int v = 0; v < PK_DIRECTIONS; v++) {
        if (!tangent->directions[v])
            continue;
        const pk_real *direction = tangent->directions[v] + node->weight_offset;
        pk_real *product = tangent->scratch;
        pk__gemm(0, 1, count, out, in, 1, input, in, direction, in, 0, product, out);
        for (size_t p = 0; p < count; p++) {
            pk_real *at = product + p * out;
            if (pk__has_bias(tangent->graph, node))
                for (size_t j = 0; j < out; j++)
                    at[j] += (bias_scale ? bias_scale[p] : 1) * direction[out * in + j];
            for (size_t k = 0; k < outputs; k++) {
                const pk_real *d = delta + (p * outputs + k) * out;
                pk_real sum = 0;
                for (size_t j = 0; j < out; j++)
                    sum += d[j] * at[j];
                tangent->along[v][(row ? row[p] : p) * outputs + k] += weight ? weight[p] * sum : sum;
            }
        }
    }
}

/* phi += sum_p w_p delta_p (x) a_p over count points of one row, of the chosen outputs. */
static void pk__add_outer(pk_tangent *tangent, const pk_node *node, size_t count, const pk_real *weight,
                          const pk_real *a, const pk_real *delta, pk_real *phi)
{
    size_t out = node->width, in = pk__layer_input(tangent->graph, node)->width, outputs = tangent->outputs;
    const size_t chosen = tangent->output_count;
    delta += tangent->first_output * out;
    /* Weighted inputs, so that one product serves a unit of outputs. */
    for (size_t p = 0; p < count; p++)
        for (size_t j = 0; j < in; j++)
            tangent->weighted[p * in + j] = weight[p] * a[p * in + j];
    for (size_t k = 0; k < chosen; k += tangent->unit)
        pk__gemm(1, 0, pk__least(tangent->unit, chosen - k) * out, in, count, 1, delta + k * out, outputs * out,
                 tangent->weighted, in, 1, phi + k * out * in, in);
    if (pk__has_bias(tangent->graph, node)) {
        pk_real *bias = phi + chosen * out * in;
        for (size_t p = 0; p < count; p++)
            for (size_t j = 0; j < chosen * out; j++)
                bias[j] += weight[p] * delta[p * outputs * out + j];
    }
}

/* Phi of one row from its points first .. last - 1, and what bounds its error. */
static void pk__add_phi(pk_tangent *tangent, size_t layer, const pk_points *points, size_t first, size_t last)
{
    const pk_node *node = tangent->node[layer];
    const pk_tape *tape = &tangent->integrator.segment.tape;
    size_t out = node->width, in = pk__layer_input(tangent->graph, node)->width, outputs = tangent->outputs;
    size_t count = last - first, at = points->row[first] * tangent->output_capacity * node->weight_count;
    pk_real *a = tape->value[node->inputs[0]] + first * in;
    pk_real *delta = tape->cotangent[node - tangent->graph->nodes] + first * outputs * out;
    pk__add_outer(tangent, node, count, points->weight + first, a, delta, tangent->phi[layer] + at);
    if (!tangent->check)
        return;
    pk__add_outer(tangent, node, count, points->check + first, a, delta, tangent->check[layer] + at);
    /* The sizes: absolute values of the factors, weighted by the rounding allowance and the kinks' slack. */
    pk_real *sizes = tangent->scratch, *weight = tangent->sorted.slack;
    for (size_t p = 0; p < count; p++)
        weight[p] = (pk_real)(tangent->allowance * fabs(points->weight[first + p]) + points->slack[first + p]);
    for (size_t i = 0; i < count * outputs * out; i++)
        sizes[i] = (pk_real)fabs(delta[i]);
    for (size_t i = 0; i < count * in; i++)
        tangent->absolute[i] = (pk_real)fabs(a[i]);
    pk__add_outer(tangent, node, count, weight, tangent->absolute, sizes, tangent->size[layer] + at);
}

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p), for any layer that is linear in its weights. */
static void pk__add_along_places(pk_tangent *tangent, size_t layer, const pk_points *points)
{
    const pk_node *node = tangent->node[layer];
    const pk_tape *tape = &tangent->integrator.segment.tape;
    const size_t outputs = tangent->outputs, width = node->width;
    const pk_real *delta = tape->cotangent[node - tangent->graph->nodes];
    pk_call call;
    pk__tape_call(tape, node, points->count, 1, &call);
    call.out = tangent->scratch;
    for (int v = 0; v < PK_DIRECTIONS; v++) {
        if (!tangent->directions[v])
            continue;
        call.weights = tangent->directions[v] + node->weight_offset;
        node->operation->forward(&call);
        for (size_t p = 0; p < points->count; p++)
            for (size_t k = 0; k < outputs; k++)
                tangent->along[v][points->row[p] * outputs + k] +=
                    points->weight[p] * pk__dot(width, delta + (p * outputs + k) * width, call.out + p * width);
    }
}

/* Phi of a layer used at several places, point by point: products over many places of a few points each. */
static void pk__add_rows_places(pk_tangent *tangent, size_t layer, const pk_points *points)
{
    const pk_node *node = tangent->node[layer];
    const size_t outputs = tangent->outputs, weights = node->weight_count, in = node->fan_in,
                 out = node->fan_out, positions = node->positions, most = pk__place_points(node, outputs);
    for (size_t p = 0, last; p < points->count; p = last) {
        for (last = p + 1; last < points->count && last - p < most && points->row[last] == points->row[p];
             last++)
            ;
        const size_t pairs = (last - p) * positions;
        pk_real *places = tangent->places, *deltas = places + pairs * in;
        for (size_t i = p; i < last; i++) {
            pk_real *own = places + (i - p) * positions * in;
            pk__node_places(&tangent->integrator.segment.tape, node, i, outputs, own,
                            deltas + (i - p) * positions * outputs * out);
            for (size_t j = 0; j < positions * outputs * out; j++)
                deltas[(i - p) * positions * outputs * out + j] *= points->weight[i];
        }
        for (size_t chosen = 0; chosen < tangent->output_count; chosen++) {
            const pk_real *delta = deltas + (tangent->first_output + chosen) * out;
            pk_real *phi = tangent->phi[layer] + (points->row[p] * tangent->output_capacity + chosen) * weights;
            pk__gemm(1, 0, out, in, pairs, 1, delta, outputs * out, places, in, 1, phi, in);
            for (size_t i = 0; weights > out * in && i < pairs; i++)
                for (size_t j = 0; j < out; j++)
                    phi[out * in + j] += delta[i * outputs * out + j];
        }
    }
}

/* Phi of a layer whose gradients are materialised point by point. */
static void pk__add_rows(pk_tangent *tangent, size_t layer, const pk_points *points)
{
    const pk_node *node = tangent->node[layer];
    const pk_tape *tape = &tangent->integrator.segment.tape;
    size_t outputs = tangent->outputs, weights = node->weight_count;
    if (node->tangent_form == PK_TANGENT_OUTER && !tangent->check) {
        pk__add_rows_places(tangent, layer, points);
        return;
    }
    for (size_t p = 0; p < points->count; p++) {
        const size_t at = points->row[p] * tangent->output_capacity * weights;
        const pk_real weight = points->weight[p],
                      *gradient = tangent->scratch + tangent->first_output * weights;
        pk_call call;
        pk__tape_call(tape, node, 1, outputs, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += p * call.in_width[j];
        call.out += p * node->width;
        call.out_cotangent = tape->cotangent[node - tangent->graph->nodes] + p * outputs * node->width;
        call.weights = pk__row_weights(tape, &tape->line, node, p);
        call.gradient = tangent->scratch;
        pk__node_row_gradients(&call);
        for (size_t i = 0; i < tangent->output_count * weights; i++)
            tangent->phi[layer][at + i] += weight * gradient[i];
        for (size_t i = 0; tangent->check && i < tangent->output_count * weights; i++) {
            tangent->check[layer][at + i] += points->check[p] * gradient[i];
            tangent->size[layer][at + i] +=
                (pk_real)((tangent->allowance * fabs(weight) + points->slack[p]) * fabs(gradient[i]));
        }
    }
}

/* along[v][row, k] += < Phi, direction_v > of the chosen outputs of a layer by rows, whose Phi is complete. */
static void pk__add_along_rows(pk_tangent *tangent, size_t layer)
{
    const pk_node *node = tangent->node[layer];
    const size_t weights = node->weight_count, chosen = tangent->output_count;
    for (int v = 0; v < PK_DIRECTIONS; v++)
        for (size_t i = 0; tangent->directions[v] && i < tangent->rows * chosen; i++) {
            const size_t row = i / chosen, k = i % chosen;
            tangent->along[v][row * tangent->outputs + tangent->first_output + k] +=
                pk__dot(weights, tangent->phi[layer] + (row * tangent->output_capacity + k) * weights,
                        tangent->directions[v] + node->weight_offset);
        }
}

/* Points of one row side by side: products over a row's points need them so. Stable. */
static const pk_points *pk__sort_points(pk_tangent *tangent, const pk_points *points)
{
    int sorted = 1;
    for (size_t p = 1; p < points->count; p++)
        sorted &= points->row[p - 1] <= points->row[p];
    if (sorted)
        return points;
    pk_points *to = &tangent->sorted;
    to->count = 0;
    to->last = points->last;
    for (size_t r = 0; r < tangent->rows; r++)
        for (size_t p = 0; p < points->count; p++) {
            if (points->row[p] != r)
                continue;
            size_t at = to->count++;
            to->row[at] = r;
            to->t[at] = points->t[p];
            to->weight[at] = points->weight[p];
            if (points->check) {
                to->check[at] = points->check[p];
                to->slack[at] = points->slack[p];
            }
        }
    return to;
}

/* As many points as can be reversed at one time. */
static void pk__tangent_part(pk_tangent *tangent, const pk_points *points)
{
    pk_segment *segment = &tangent->integrator.segment;
    const pk_graph *graph = tangent->graph;
    const size_t outputs = tangent->outputs, classes = graph->output_width, count = points->count;
    const size_t *row = points->row;
    const pk_real *weight = points->weight;
    if (count)
        pk_segment_forward(segment, count, row, points->t, graph->node_count);
    for (size_t p = 0; p < count; p++) {
        pk_readout_apply(&tangent->integrator.readout, classes, tangent->integrator.first_row + row[p],
                         pk_tape_output(&segment->tape) + p * classes, tangent->integrator.h,
                         pk_tape_seed(&segment->tape) + p * outputs * classes);
        tangent->weight_sum[row[p]] += weight[p];
    }
    if (count)
        pk_segment_reverse(segment, count, points->t, outputs);
    for (size_t l = 0; count && l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        const pk_real *delta = segment->tape.cotangent[node - graph->nodes];
        const pk_real *a = segment->tape.value[node->inputs[0]];
        size_t out = node->width, in = pk__layer_input(graph, node)->width;
        switch (tangent->kind[l]) {
        case PK_LAYER_DATA:
            for (size_t p = 0; p < count; p++)
                for (size_t j = 0; j < outputs * out; j++)
                    tangent->delta[l][row[p] * outputs * out + j] += weight[p] * delta[p * outputs * out + j];
            break;
        case PK_LAYER_LINEAR:
            for (size_t p = 0; p < count; p++) {
                memcpy(tangent->delta[l] + row[p] * outputs * out, delta + p * outputs * out,
                       outputs * out * sizeof *delta);
                for (size_t j = 0; j < in; j++)
                    tangent->input[l][row[p] * in + j] += weight[p] * a[p * in + j];
            }
            break;
        case PK_LAYER_ROWS: pk__add_rows(tangent, l, points); break;
        case PK_LAYER_POINTS:
        default:
            if (pk__is_spread(tangent, l)) {
                pk__add_along_places(tangent, l, points);
                break;
            }
            pk__add_along(tangent, l, count, row, weight, a, delta, NULL);
            if (!tangent->integrated[l])
                break;
            for (size_t p = 0, last; p < count; p = last) {
                for (last = p + 1; last < count && row[last] == row[p]; last++)
                    ;
                pk__add_phi(tangent, l, points, p, last);
            }
        }
    }
    for (size_t l = 0; points->last && l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        if (tangent->kind[l] == PK_LAYER_ROWS)
            pk__add_along_rows(tangent, l);
        else if (tangent->kind[l] == PK_LAYER_DATA)
            pk__add_along(tangent, l, tangent->rows, NULL, NULL, segment->base[node->inputs[0]],
                          tangent->delta[l], NULL);
        else if (tangent->kind[l] == PK_LAYER_LINEAR)
            pk__add_along(tangent, l, tangent->rows, NULL, NULL, tangent->input[l], tangent->delta[l],
                          tangent->weight_sum);
    }
    pk__contract(tangent, points);
}

static void pk__tangent_points(void *user, const pk_points *unsorted)
{
    pk_tangent *tangent = (pk_tangent *)user;
    const pk_points *points = pk__sort_points(tangent, unsorted);
    size_t first = 0;
    do {
        pk_points part = *points;
        part.count = pk__least(tangent->reverse_points, points->count - first);
        part.row += first;
        part.t += first;
        part.weight += first;
        if (part.check) {
            part.check += first;
            part.slack += first;
        }
        first += part.count;
        part.last = points->last && first == points->count;
        pk__tangent_part(tangent, &part);
    } while (first < points->count);
}

/* How a layer is contracted in a step: the cost model, with the points per row of the last step. */
static void pk__choose_contraction(pk_tangent *tangent, size_t layer, pk_engine engine)
{
    const pk_node *node = tangent->node[layer];
    const int is_points = tangent->kind[layer] == PK_LAYER_POINTS && !pk__is_spread(tangent, layer);
    double in = (double)pk__layer_input(tangent->graph, node)->width, out = (double)node->width;
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

PK_API void pk_tangent_step(pk_tangent *tangent, const pk_real *weights, const pk_real *direction,
                            size_t first_row, size_t rows, const pk_real *inputs, pk_engine engine)
{
    const pk_graph *graph = tangent->graph;
    size_t outputs = tangent->outputs;
    const size_t chosen = rows * tangent->output_capacity;
    tangent->rows = rows;
    tangent->integrator.first_row = first_row;
    pk_segment_begin(&tangent->integrator.segment, weights, direction, rows, inputs);
    memset(tangent->weight_sum, 0, rows * sizeof(pk_real));
    for (int v = 0; v < PK_DIRECTIONS; v++)
        memset(tangent->along[v], 0, rows * outputs * sizeof(pk_real));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        pk__choose_contraction(tangent, l, engine);
        if (tangent->delta[l])
            memset(tangent->delta[l], 0, rows * outputs * node->width * sizeof(pk_real));
        if (tangent->input[l])
            memset(tangent->input[l], 0, rows * pk__layer_input(graph, node)->width * sizeof(pk_real));
        if (tangent->phi[l] && tangent->integrated[l])
            memset(tangent->phi[l], 0, chosen * node->weight_count * sizeof(pk_real));
        if (tangent->check) {
            memset(tangent->check[l], 0, chosen * node->weight_count * sizeof(pk_real));
            memset(tangent->size[l], 0, chosen * node->weight_count * sizeof(pk_real));
        }
    }
    size_t before = tangent->integrator.points;
    pk_integrate(&tangent->integrator, pk__tangent_points, tangent);
    tangent->integrator.points_last = tangent->integrator.points - before;
    for (size_t l = 0; tangent->check && l < graph->layers; l++)
        for (size_t i = 0; i < chosen * tangent->node[l]->weight_count; i++)
            tangent->size[l][i] += (pk_real)(2 * fabs(tangent->check[l][i]));
}

/* The outputs first .. first + count - 1 of one row of phi (or check, size), whose matrix and bias parts of all chosen
 * outputs stand one behind the other. */
static void pk__row_outputs(const pk_tangent *tangent, size_t layer, size_t row, size_t first, size_t count,
                            const pk_real *from, pk_real *to)
{
    const pk_node *node = tangent->node[layer];
    const size_t weights = node->weight_count;
    const int rows = tangent->kind[layer] == PK_LAYER_ROWS;
    const size_t bias = !rows && pk__has_bias(tangent->graph, node) ? node->width : 0, matrix = weights - bias;
    from += row * tangent->output_capacity * weights;
    first -= tangent->first_output;
    memcpy(to, from + first * matrix, count * matrix * sizeof *to);
    memcpy(to + count * matrix, from + tangent->output_count * matrix + first * bias,
           count * bias * sizeof *to);
}

PK_API void pk_tangent_row_phi(const pk_tangent *tangent, size_t layer, size_t row, size_t first, size_t count,
                               pk_real *phi)
{
    const pk_node *node = tangent->node[layer];
    size_t outputs = tangent->outputs, out = node->width, in = pk__layer_input(tangent->graph, node)->width;
    if (tangent->phi[layer]) {
        pk__row_outputs(tangent, layer, row, first, count, tangent->phi[layer], phi);
        return;
    }
    const int data = tangent->kind[layer] == PK_LAYER_DATA;
    const pk_real *a =
        (data ? tangent->integrator.segment.base[node->inputs[0]] : tangent->input[layer]) + row * in;
    const pk_real *delta = tangent->delta[layer] + (row * outputs + first) * out;
    for (size_t j = 0; j < count * out; j++)
        for (size_t i = 0; i < in; i++)
            phi[j * in + i] = delta[j] * a[i];
    if (pk__has_bias(tangent->graph, node))
        for (size_t j = 0; j < count * out; j++)
            phi[count * out * in + j] = delta[j] * (data ? 1 : tangent->weight_sum[row]);
}

PK_API void pk_tangent_row_error(const pk_tangent *tangent, size_t layer, size_t row, size_t first,
                                 size_t count, pk_real *error)
{
    pk__row_outputs(tangent, layer, row, first, count, tangent->size[layer], error);
}

PK_API void pk_tangent_contract_row(pk_tangent *tangent, size_t layer, size_t outputs, const pk_real *e,
                                    size_t first, size_t columns, pk_real *tile)
{
    const pk_node *node = tangent->node[layer];
    const pk_examples *examples = tangent->examples;
    size_t out = node->width, ld = examples->ld;
    double start = pk__seconds();
    if (tangent->kind[layer] == PK_LAYER_ROWS) {
        pk__gemm(0, 0, outputs, columns, node->weight_count, 1, e, node->weight_count,
                 examples->rows[layer] + first, ld, 0, tile, columns);
        tangent->flops += 2.0 * (double)outputs * (double)columns * (double)node->weight_count;
        tangent->seconds_contraction += pk__seconds() - start;
        return;
    }
    size_t in = pk__layer_input(tangent->graph, node)->width;
    const pk_real *bias = pk__has_bias(tangent->graph, node) ? e + outputs * out * in : NULL;
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
