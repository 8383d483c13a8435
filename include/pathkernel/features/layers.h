/* pathkernel/features/layers.h: what is stored of each layer while the gradients of the outputs of a block of test rows
 * are integrated along a step, and the memory for it.
 *
 * A layer whose weights are W and whose input is a has the gradient delta (x) a, delta being the cotangent of what it computes;
 * its integral is Phi = sum_p w_p delta_p (x) a_p over the points p of the quadrature. Phi itself is large. What is stored
 * depends on what changes along the step (pk__layer_kind):
 *   - the input does not (the layer is on data): sum_p w_p delta_p, and the input;
 *   - the cotangent does not (everything behind the layer is linear): sum_p w_p a_p, and the cotangent;
 *   - both do: nothing, where each point is multiplied with the examples' factors while it is in memory (product.h); or Phi,
 *     where that costs less, or where it is needed as a whole: by optimizers with a state and by bounds;
 *   - the layer's gradient is no outer product: Phi, number by number.
 * pk__choose_form decides, step by step, by the flops that each way takes.
 */
#ifndef PATHKERNEL_LAYERS_H
#define PATHKERNEL_LAYERS_H
#include "factors.h"
#include "../path/integrator.h"

/* >>> declarations */
/* How layers are contracted: for tests and benchmarks. */
typedef enum pk_engine {
    PK_ENGINE_AUTO,      /* the cheapest by the cost model */
    PK_ENGINE_FACTORED,  /* Hadamard products at each point */
    PK_ENGINE_HEAD,      /* the outputs taken out of the sum over points, where a layer allows it */
    PK_ENGINE_INTEGRATED /* Phi materialized; the only one for stateful optimizers and PK_TANGENT_ROWS */
} pk_engine;
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_LAYERS_INTERNALS_KNOWN)
#define PATHKERNEL_LAYERS_INTERNALS_KNOWN
/* >>> internals */
/* What changes along a step, of a layer's input and its cotangent. */
typedef enum pk__layer_kind {
    PK__LAYER_DATA,   /* the cotangent alone */
    PK__LAYER_LINEAR, /* the input alone */
    PK__LAYER_POINTS, /* both */
    PK__LAYER_ROWS    /* both, and Phi is materialized number by number */
} pk__layer_kind;

/* One layer. A row's Phi is stored as a matrix (outputs x layer outputs x layer inputs) and then a bias (outputs x layer
 * outputs); or as outputs x weights for PK__LAYER_ROWS. */
typedef struct pk__layer_integral {
    const pk_node *node;
    /* the last layer, if only an elementwise operation is between it and this one; else NULL */
    const pk_node *last;
    pk__layer_kind kind;
    unsigned char integrated;      /* in this step Phi is computed */
    unsigned char outputs_outside; /* in this step the outputs are taken out of the sum over points */
    pk_real *delta;                /* DATA: rows x outputs x out, integrated; LINEAR: the constant cotangent */
    pk_real *input;                /* LINEAR: rows x in, integrated */
    pk_real *phi;                  /* POINTS and ROWS: rows x output_capacity x weights */
    pk_real *check, *size; /* with bounds, like phi: the difference to a better rule; after a step, the error */
} pk__layer_integral;

enum { PK__DIRECTIONS = 3 };

/* The step that is integrated, and how. */
typedef struct pk__integral_step {
    const pk_real *weights, *direction;        /* of the step, one copy for each use of a tied tensor */
    const pk_real *transposed;                 /* as for pk__path_begin */
    const pk_real *directions[PK__DIRECTIONS]; /* the products < Phi, direction > are wanted; NULL: unused */
    size_t first_row, rows;                    /* of the block, among the test rows */
    const pk_real *inputs;                     /* of the rows */
    pk_engine engine;
    /* the number of examples that Phi will be multiplied with, for the cost model; 0: unknown */
    size_t examples;
} pk__integral_step;

/* The integral of one block of rows along one step; one a thread. */
typedef struct pk__integral {
    const pk_graph *graph;
    pk__integrator integrator;
    size_t outputs, rows, row_capacity, reverse_points;
    /* Phi is computed for the outputs [first_output, first_output + output_count), at most output_capacity of them, set by
     * the caller before each step. They are whole groups of `unit` outputs, and a group is always materialized together. */
    size_t unit, first_output, output_count, output_capacity;
    int bounds;
    pk__layer_integral *layer;                 /* of each layer */
    double allowance;                          /* c eps of the rounding bound */
    const pk_real *directions[PK__DIRECTIONS]; /* of the step */
    pk_real *along[PK__DIRECTIONS];            /* rows x outputs: < Phi, direction > */
    pk_real *weight_sum;                       /* rows */
    unsigned char *begun; /* rows: whether points of the row have been added in this step */
    pk__points sorted,
        part; /* the points of the quadrature, sorted by row; the part of them that is reversed together */
    const pk__points *batch; /* the batch that `part` belongs to; NULL: the next batch has to be asked for */
    size_t taken;            /* points of the batch that were in a part already */
    pk_real *scratch, *weighted, *absolute;
    /* for layers used at several places: the number of points whose factors are in memory together */
    size_t place_points;
    pk_real *places; /* memory for these factors: inputs, then cotangents */
    double seconds;  /* of the sums over points */
} pk__integral;

/* Takes memory for Phi of every layer and `materialize` outputs (rows x materialize x P numbers; 0: none), in groups of
 * `unit`; with bounds, three times as much, for a bound on the error of each number. */
PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialize, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *integral);
/* The number of test rows in a block; it depends on shapes alone. */
PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs);
/* The number of outputs that are materialized together; it depends on shapes alone. Their Phi takes about a megabyte, or it
 * is that of one output. */
PK__INTERNAL size_t pk__integral_unit(size_t outputs, size_t parameters);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_LAYERS_IMPLEMENTED)
#define PATHKERNEL_LAYERS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs)
{
    /* What a block has in memory at one time stays in the second-level cache. The examples' factors of wide layers do not,
     * so that it pays to use them for more rows once they are fetched. */
    size_t widest = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        widest = pk__max(widest, pk__max(node->fan_in, node->fan_out));
    }
    return pk__max(
        1, pk__min(widest < 128 || widest >= 256 ? 32 : 16, (widest < 256 ? 50 : 100) / pk__max(outputs, 1)));
}

PK__INTERNAL size_t pk__integral_unit(size_t outputs, size_t parameters)
{
    return pk__max(1, pk__min(outputs, ((size_t)1 << 17) / pk__max(parameters, 1)));
}

/* The number of points in a batch: enough for fast products, and few enough for the cache. */
static size_t pk__point_capacity(size_t outputs)
{
    return pk__max(PK_GAUSS_NODES + 2, pk__min(256, 640 / pk__max(outputs, 1)));
}

/* The number of these points whose cotangents are in memory at one time: about 2^21 numbers, or one point. */
static size_t pk__reverse_points(const pk_graph *graph, size_t points, size_t outputs)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].varies)
            numbers += graph->nodes[n].width;
    return pk__max(1, pk__min(points, ((size_t)1 << 21) / numbers / pk__max(outputs, 1)));
}

static pk__layer_kind pk__layer_kind_of(const pk_node *node, const pk_readout *readout, int bounds,
                                        const pk__representation *representation)
{
    /* Phi of a shared tensor is the sum over its uses, so it is needed as a whole. */
    if (pk__layer_by_rows(representation, node) || (representation->materialized && !pk__is_outer(node)) ||
        node->shares)
        return PK__LAYER_ROWS;
    if (bounds || !pk__is_outer(node))
        return PK__LAYER_POINTS;
    if (node->input_constant)
        return PK__LAYER_DATA;
    return node->cotangent_constant && readout->kind != PK_READOUT_FUNCTION ? PK__LAYER_LINEAR
                                                                            : PK__LAYER_POINTS;
}

/* The number of points whose factors are in memory at one time, for a layer used at several places. */
PK__PRIVATE size_t pk__place_points(const pk_node *node, size_t outputs)
{
    return pk__max(1, ((size_t)1 << 16) / (node->positions * (node->fan_in + outputs * node->fan_out)));
}

/* Whether a layer is used at several places and has outer products, rather than gradients by rows. */
PK__PRIVATE int pk__is_used_at_places(const pk__integral *integral, size_t layer)
{
    return integral->layer[layer].kind == PK__LAYER_POINTS && !pk__is_outer(integral->layer[layer].node);
}

/* Takes the memory of one layer. */
static void pk__layer_take(pk__arena *arena, const pk__integral *integral, pk__layer_kind kind, int phi_wanted,
                           pk__layer_integral *layer)
{
    const pk_node *node = layer->node;
    const size_t rows = integral->row_capacity, both = rows * integral->outputs, real = sizeof(pk_real);
    const size_t cells = rows * integral->output_capacity, bytes = node->weight_count * real;
    const int summed_first = kind == PK__LAYER_DATA || kind == PK__LAYER_LINEAR;
    layer->kind = kind;
    layer->delta = summed_first ? pk__arena_take(arena, both, node->width * real) : NULL;
    layer->input = kind == PK__LAYER_LINEAR
                       ? pk__arena_take(arena, rows, pk__layer_input(integral->graph, node)->width * real)
                       : NULL;
    layer->phi = phi_wanted ? pk__arena_take(arena, cells, bytes) : NULL;
    layer->check = integral->bounds ? pk__arena_take(arena, cells, bytes) : NULL;
    layer->size = integral->bounds ? pk__arena_take(arena, cells, bytes) : NULL;
}

PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialize, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *integral)
{
    const size_t outputs = pk_readout_count(readout, graph->output_width), real = sizeof(pk_real);
    const size_t points = pk__max(pk__point_capacity(outputs), PK_GAUSS_NODES + 2);
    size_t widest = 0, deepest = 0, place_numbers = 0, by_rows = 0;
    memset(integral, 0, sizeof *integral);
    integral->graph = graph;
    integral->outputs = outputs;
    integral->row_capacity = rows;
    integral->unit = unit;
    integral->output_capacity = integral->output_count = materialize ? materialize : outputs;
    integral->bounds = bounds;
    integral->allowance = pk__rounding_allowance(graph);
    integral->reverse_points = pk__reverse_points(graph, points, outputs);
    pk__integrator_take(arena, graph, rows, points, integral->reverse_points, outputs, bounds,
                        &integral->integrator);
    integral->integrator.readout = *readout;
    integral->layer = pk__arena_take(arena, graph->layers, sizeof *integral->layer);
    for (size_t l = 0; l < graph->layers; l++) {
        pk__layer_integral measured, *layer = integral->layer ? &integral->layer[l] : &measured;
        const pk_node *node = pk_graph_layer(graph, l);
        const pk__layer_kind kind = pk__layer_kind_of(node, readout, bounds, representation);
        const int at_places =
            node->tangent_form == PK_TANGENT_OUTER && (!pk__is_outer(node) || kind == PK__LAYER_ROWS);
        const int phi_wanted =
            kind == PK__LAYER_ROWS || (kind == PK__LAYER_POINTS && !at_places && (materialize || bounds));
        memset(layer, 0, sizeof *layer);
        layer->node = node;
        if (kind == PK__LAYER_POINTS && !bounds && readout->kind != PK_READOUT_FUNCTION)
            layer->last = pk__last_behind(graph, node);
        pk__layer_take(arena, integral, kind, phi_wanted, layer);
        if (phi_wanted)
            deepest = pk__max(deepest, pk__layer_input(graph, node)->width);
        if (at_places) {
            const size_t together = pk__place_points(node, outputs) * node->positions;
            integral->place_points = pk__max(integral->place_points, together);
            place_numbers = pk__max(place_numbers, together * (node->fan_in + outputs * node->fan_out));
        }
        widest = pk__max(widest, node->width);
        by_rows = pk__max(by_rows, kind == PK__LAYER_ROWS ? node->weight_count : 0);
    }
    for (int v = 0; v < PK__DIRECTIONS; v++)
        integral->along[v] = pk__arena_take(arena, rows * outputs, real);
    integral->weight_sum = pk__arena_take(arena, rows, real);
    integral->begun = pk__arena_take(arena, rows, 1);
    integral->places = pk__arena_take(arena, place_numbers, real);
    /* Products with a direction (points x widest), slopes of the units of a row or its outputs, or a point's gradients of a
     * layer by rows (outputs x weights). */
    const size_t reversed = integral->reverse_points;
    const size_t items = pk__max(pk__max(reversed * (bounds ? outputs : 2), rows), 2 * outputs);
    integral->scratch = pk__arena_take(arena, pk__max(items * widest, outputs * by_rows), real);
    integral->weighted = pk__arena_take(arena, reversed, deepest * real);
    integral->absolute = bounds ? pk__arena_take(arena, reversed, deepest * real) : NULL;
    pk__points_take(arena, integral->integrator.path.point_capacity, bounds, &integral->sorted);
}

/* Decides how a layer is multiplied with the examples in a step: the cost model, with the points per row of the last step. */
PK__PRIVATE void pk__choose_form(pk__integral *integral, size_t layer, const pk__integral_step *step)
{
    const pk_node *node = integral->layer[layer].node;
    const int is_points =
        integral->layer[layer].kind == PK__LAYER_POINTS && !pk__is_used_at_places(integral, layer);
    const pk__product_sizes sizes = {.left = (double)integral->outputs,
                                     .right = 1,
                                     .summed = 1,
                                     .points = (double)integral->integrator.points_last /
                                               (double)pk__max(integral->rows, 1),
                                     .formed = 1 / (double)pk__max(step->examples, 1)};
    const double factored = pk__product_flops(PK__PRODUCT_FACTORED, node, &sizes),
                 outside = pk__product_flops(PK__PRODUCT_OUTSIDE, node, &sizes),
                 integrated = pk__product_flops(PK__PRODUCT_ON_THE_LEFT, node, &sizes);
    const pk_engine engine = step->engine;
    const int automatic = engine == PK_ENGINE_AUTO && is_points;
    integral->layer[layer].outputs_outside =
        integral->layer[layer].last &&
        (engine == PK_ENGINE_HEAD || (automatic && outside < factored && outside < integrated));
    integral->layer[layer].integrated =
        integral->layer[layer].kind == PK__LAYER_ROWS ||
        (!pk__is_used_at_places(integral, layer) && (engine == PK_ENGINE_INTEGRATED || integral->bounds)) ||
        (automatic && integral->layer[layer].phi && !integral->layer[layer].outputs_outside &&
         integrated < factored);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
