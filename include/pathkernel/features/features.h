/* pathkernel/features/features.h: the memory of tangent features, the gradients of a block of test rows' outputs with respect to
 * the weights along a step, and which of its forms each layer takes.
 */
#ifndef PATHKERNEL_FEATURES_H
#define PATHKERNEL_FEATURES_H
#include "factors.h"
#include "../path/integrator.h"

/* >>> declarations */
/* How layers are contracted: for tests and benchmarks. */
typedef enum pk_engine {
    PK_ENGINE_AUTO,      /* the cheapest by the cost model */
    PK_ENGINE_FACTORED,  /* Hadamard products at each point */
    PK_ENGINE_HEAD,      /* the outputs taken out of the sum over points, where a layer allows it */
    PK_ENGINE_INTEGRATED /* Phi materialised; the only one for stateful optimisers and PK_TANGENT_ROWS */
} pk_engine;
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_FEATURES_INTERNALS_KNOWN)
#define PATHKERNEL_FEATURES_INTERNALS_KNOWN
/* >>> internals */
/* What a layer needs per point. */
typedef enum pk__layer_kind {
    PK__LAYER_DATA,   /* input constant: sum_p w_p delta_p */
    PK__LAYER_LINEAR, /* cotangent constant: sum_p w_p a_p */
    PK__LAYER_POINTS, /* both vary */
    PK__LAYER_ROWS    /* materialised row by row */
} pk__layer_kind;

enum { PK__DIRECTIONS = 3 };

/* From one row of a tile to the next: a panel more than a block of examples, so that rows fall on different cache sets. */
enum { PK__TILE_LD = PK__EXAMPLE_BLOCK + PK_PANEL };

/* tile (row_count * outputs x count, ld PK__TILE_LD) of inner products <Phi, g_b>, b = first .. first + count - 1,
 * from one layer, or from several at once (layer -1). */
typedef void pk__tile_sink(void *user, int layer, size_t first, size_t count, const pk_real *tile);

/* One thread's memory. A row's Phi is stored layer by layer: (outputs x layer outputs x layer inputs) of the weight,
 * then (outputs x layer outputs) of the bias; or (outputs x weights) for PK__LAYER_ROWS. */
typedef struct pk__integral {
    const pk_graph *graph;
    pk__integrator integrator;
    size_t outputs, rows, row_capacity, reverse_points;
    /* Phi can be had of the outputs first_output .. first_output + output_count - 1, at most output_capacity of them,
     * the caller's choice before a step: whole groups of `unit`, which are materialised together whatever is chosen. */
    size_t unit, first_output, output_count, output_capacity;
    pk__layer_kind *kind;
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
    const pk_real *directions[PK__DIRECTIONS]; /* P each, NULL: unused */
    pk_real *along[PK__DIRECTIONS];            /* rows x outputs: < Phi, direction > */
    pk_real *weight_sum;                       /* rows */
    unsigned char *begun;                      /* rows: whether the step has had points of it */
    /* The contraction: */
    const pk__examples *examples;
    const pk_real *gram; /* rows x gram_ld: inputs times the training inputs, or NULL */
    size_t gram_ld;
    pk__tile_sink *sink;
    void *user;
    pk_real *tile; /* rows x outputs x PK__TILE_LD */
    pk_real *left; /* points or rows, x PK__TILE_LD */
    pk_real *scratch, *weighted, *absolute;
    pk_real *ones;             /* points or rows */
    pk_real **weighted_inputs; /* of layers at points: points x in, times their weights */
    /* Where rows of products go or come from: the cell of the tile, or the row of left, of a point's or row's output; that of
     * the places of a layer that is used at several; one after another in a tile or a panel. */
    size_t *point_to, *cell_left, *place_to, *place_left, *tile_row, *panel_row, *pair_row;
    /* The headed layer: */
    pk_real *head_weights; /* 1 + rows, x outputs x (out of W^T seed, out of D^T seed) */
    pk_real *slopes;       /* points x 2 out: w slope, w t slope */
    size_t *unit_row;      /* rows x 2 out: the units that are on, as rows of a panel, twice */
    size_t *unit_count;    /* rows */
    pk_real *sums;         /* PK__HEAD_PART x PK__PAIR */
    /* Of some points of a layer used at several places: inputs times weights, then cotangents; weights */
    pk_real *places, *place_start;
    pk__points sorted;
    double flops;                             /* of the contraction, counted */
    double seconds_sums, seconds_contraction; /* of the sums over points; of all that follows them */
} pk__integral;

/* Phi of every layer can be had of materialise outputs at a time (it costs rows x materialise x P numbers; 0: of none),
 * in groups of unit; with bounds, also a bound on its error, number by number (three times that). */
PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialise, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *tangent);
/* How many test rows make a block, from shapes alone. */
PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs);
/* How many outputs are materialised together, from shapes alone: their Phi is about a megabyte, or one output's. */
PK__INTERNAL size_t pk__integral_unit(size_t outputs, size_t parameters);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_FEATURES_IMPLEMENTED)
#define PATHKERNEL_FEATURES_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs)
{
    /* What is in memory of them at one time stays in the second-level cache. Examples of wide layers do not, and are worth
     * fetching for more rows. */
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

/* Points of one call of the sink: enough rows for the products to run at speed, few enough for the cache. */
static size_t pk__point_capacity(size_t outputs)
{
    return pk__max(PK_GAUSS_NODES + 2, pk__min(256, 640 / pk__max(outputs, 1)));
}

/* Of those, points whose cotangents are in memory at one time: about 2^21 numbers, or one point. */
static size_t pk__reverse_points(const pk_graph *graph, size_t points, size_t outputs)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].varies)
            numbers += graph->nodes[n].width;
    return pk__max(1, pk__min(points, ((size_t)1 << 21) / numbers / pk__max(outputs, 1)));
}

enum {
    PK__PART_NUMBERS = 1 << 14, /* of rows, which stay in a second-level cache of 512 KB beside the panels */
    PK__HEAD_PART = 96          /* sums of a headed layer in hand: they stay in the first-level cache */
};

/* The last layer where only an elementwise operation stands between it and node. */
static const pk_node *pk__head_of(const pk_graph *graph, const pk_node *node)
{
    const pk_node *between = pk__only_reader(graph, node);
    const pk_node *head = between && between->operation->elementwise ? pk__only_reader(graph, between) : NULL;
    return head && head->cotangent_constant && pk__is_outer(head) ? head : NULL;
}

static pk__layer_kind pk__kind_of_layer(const pk_node *node, const pk_readout *readout, int bounds,
                                        const pk__representation *representation)
{
    /* Phi of a shared tensor is the sum over its uses, so it is needed as a whole. */
    if (pk__layer_by_rows(representation, node) || (representation->materialised && !pk__is_outer(node)) ||
        node->shares)
        return PK__LAYER_ROWS;
    if (bounds || !pk__is_outer(node))
        return PK__LAYER_POINTS;
    if (node->input_constant)
        return PK__LAYER_DATA;
    return node->cotangent_constant && readout->kind != PK_READOUT_FUNCTION ? PK__LAYER_LINEAR
                                                                            : PK__LAYER_POINTS;
}

/* Points of a spread layer whose places are in memory at one time. */
PK__PRIVATE size_t pk__place_points(const pk_node *node, size_t outputs)
{
    return pk__max(1, ((size_t)1 << 16) / (node->positions * (node->fan_in + outputs * node->fan_out)));
}

/* A layer used at several places, where it is not by rows. */
PK__PRIVATE int pk__is_spread(const pk__integral *tangent, size_t layer)
{
    return tangent->kind[layer] == PK__LAYER_POINTS && !pk__is_outer(tangent->node[layer]);
}

/* Rows of a product that stay in the second-level cache while panel after panel passes: equal parts of all of them. */
PK__PRIVATE size_t pk__part_rows(size_t rows, size_t depth)
{
    const size_t numbers = PK__HAS_AVX512 ? 4 * (size_t)PK__PART_NUMBERS : (size_t)PK__PART_NUMBERS;
    const size_t tiles = 2 * PK__TALLEST, most = pk__max(1, numbers / tiles / pk__max(depth, 1)) * tiles;
    const size_t all = pk__max(rows, 1), parts = pk__blocks(all, most);
    return pk__blocks(pk__blocks(all, parts), tiles) * tiles;
}

static pk_real *pk__take_reals(pk__arena *arena, size_t count, size_t numbers)
{
    return pk__arena_take(arena, count, numbers * sizeof(pk_real));
}

static size_t *pk__take_indices(pk__arena *arena, size_t count)
{
    return pk__arena_take(arena, count, sizeof(size_t));
}

/* What the contraction needs: points in hand at one time, places of a layer that is used at several, and their numbers. */
static void pk__contraction_take(pk__arena *arena, size_t points, size_t places, size_t place_numbers,
                                 int factored, pk__integral *tangent)
{
    const size_t outputs = tangent->outputs, rows = tangent->row_capacity, layers = tangent->graph->layers;
    const size_t items = pk__max(points, rows);
    size_t most = pk__max(pk__max(items * outputs, places), PK__HEAD_PART), widest = 0;
    tangent->weighted_inputs = pk__arena_take(arena, layers, sizeof(pk_real *));
    for (size_t l = 0; l < layers; l++) {
        const pk_node *node = pk_graph_layer(tangent->graph, l);
        const int used = factored && pk__is_outer(node);
        pk_real *inputs = pk__take_reals(arena, used ? points : 0, node->fan_in);
        if (tangent->weighted_inputs)
            tangent->weighted_inputs[l] = inputs;
        widest = pk__max(widest, used ? node->width : 0);
        most = pk__max(most, node->fan_out);
    }
    tangent->tile = pk__take_reals(arena, rows * outputs, PK__TILE_LD);
    tangent->left = pk__take_reals(arena, pk__max(items * PK__TILE_LD, places * PK__PAIR), 1);
    tangent->ones = pk__take_reals(arena, items, 1);
    tangent->point_to = pk__take_indices(arena, points * outputs);
    tangent->cell_left = pk__take_indices(arena, items * outputs);
    tangent->place_to = pk__take_indices(arena, places * outputs);
    tangent->place_left = pk__take_indices(arena, places * outputs);
    tangent->places = pk__take_reals(arena, place_numbers, 1);
    tangent->place_start = pk__take_reals(arena, places, 1);
    tangent->head_weights = pk__take_reals(arena, (1 + rows) * outputs, 2 * widest);
    tangent->slopes = pk__take_reals(arena, points, 2 * widest);
    tangent->unit_row = pk__take_indices(arena, rows * 2 * widest);
    tangent->unit_count = pk__take_indices(arena, rows);
    tangent->sums = pk__take_reals(arena, PK__HEAD_PART, PK__PAIR);
    tangent->tile_row = pk__take_indices(arena, most);
    tangent->panel_row = pk__take_indices(arena, most);
    tangent->pair_row = pk__take_indices(arena, places);
    for (size_t i = 0; tangent->panel_row && i < most; i++) {
        tangent->tile_row[i] = i * PK__TILE_LD;
        tangent->panel_row[i] = i * PK_PANEL;
    }
    for (size_t i = 0; tangent->panel_row && i < places; i++)
        tangent->pair_row[i] = i * PK__PAIR;
    for (size_t i = 0; tangent->panel_row && i < items; i++)
        tangent->ones[i] = 1;
    for (size_t i = 0; tangent->panel_row && i < items * outputs; i++)
        tangent->cell_left[i] = i / outputs * PK__TILE_LD;
}

PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialise, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *tangent)
{
    size_t outputs = pk_readout_count(readout, graph->output_width), layers = graph->layers;
    size_t points = pk__point_capacity(outputs), both = rows * outputs, widest = 0, deepest = 0, places = 0,
           place_numbers = 0, by_rows = 0;
    memset(tangent, 0, sizeof *tangent);
    tangent->graph = graph;
    tangent->outputs = outputs;
    tangent->row_capacity = rows;
    tangent->unit = unit;
    tangent->output_capacity = tangent->output_count = materialise ? materialise : outputs;
    tangent->allowance = pk__rounding_allowance(graph);
    points = pk__max(points, PK_GAUSS_NODES + 2);
    tangent->reverse_points = pk__reverse_points(graph, points, outputs);
    pk__integrator_take(arena, graph, rows, points, tangent->reverse_points, outputs, bounds,
                        &tangent->integrator);
    tangent->integrator.readout = *readout;
    points = tangent->reverse_points;
    tangent->kind = pk__arena_take(arena, layers, sizeof *tangent->kind);
    tangent->node = pk__arena_take(arena, layers, sizeof *tangent->node);
    tangent->integrated = pk__arena_take(arena, layers, sizeof *tangent->integrated);
    tangent->headed = pk__arena_take(arena, layers, sizeof *tangent->headed);
    tangent->head = pk__arena_take(arena, layers, sizeof *tangent->head);
    tangent->delta = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->input = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->phi = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->check = bounds ? pk__arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    tangent->size = bounds ? pk__arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    for (size_t l = 0; l < layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        pk__layer_kind kind = pk__kind_of_layer(node, readout, bounds, representation);
        size_t fan_in = pk__layer_input(graph, node)->width;
        const int spread =
            node->tangent_form == PK_TANGENT_OUTER && (!pk__is_outer(node) || kind == PK__LAYER_ROWS);
        int hoisted = kind == PK__LAYER_DATA || kind == PK__LAYER_LINEAR;
        int phi_wanted =
            kind == PK__LAYER_ROWS || (kind == PK__LAYER_POINTS && !spread && (materialise || bounds));
        pk_real *delta = hoisted ? pk__arena_take(arena, both, node->width * sizeof *delta) : NULL;
        pk_real *input = kind == PK__LAYER_LINEAR ? pk__arena_take(arena, rows, fan_in * sizeof *input) : NULL;
        const size_t cells = rows * tangent->output_capacity, bytes = node->weight_count * sizeof(pk_real);
        pk_real *phi = phi_wanted ? pk__arena_take(arena, cells, bytes) : NULL;
        pk_real *check = bounds ? pk__arena_take(arena, cells, bytes) : NULL;
        pk_real *size = bounds ? pk__arena_take(arena, cells, bytes) : NULL;
        if (tangent->check) {
            tangent->check[l] = check;
            tangent->size[l] = size;
        }
        if (tangent->kind) {
            tangent->kind[l] = kind;
            tangent->head[l] = kind == PK__LAYER_POINTS && !bounds && readout->kind != PK_READOUT_FUNCTION
                                   ? pk__head_of(graph, node)
                                   : NULL;
            tangent->node[l] = node;
            tangent->delta[l] = delta;
            tangent->input[l] = input;
            tangent->phi[l] = phi;
        }
        if (phi_wanted)
            deepest = pk__max(deepest, fan_in);
        if (spread) {
            const size_t together = pk__place_points(node, outputs) * node->positions;
            places = pk__max(places, together);
            place_numbers = pk__max(place_numbers, together * (node->fan_in + outputs * node->fan_out));
        }
        widest = pk__max(widest, node->width);
        by_rows = pk__max(by_rows, kind == PK__LAYER_ROWS ? node->weight_count : 0);
    }
    for (int v = 0; v < PK__DIRECTIONS; v++)
        tangent->along[v] = pk__arena_take(arena, both, sizeof(pk_real));
    tangent->weight_sum = pk__arena_take(arena, rows, sizeof(pk_real));
    tangent->begun = pk__arena_take(arena, rows, 1);
    pk__contraction_take(arena, points, places, place_numbers, !representation->materialised, tangent);
    /* Products with a direction (points x widest), slopes of the units of a row or its outputs, or a point's gradients of a
     * layer by rows (outputs x weights). */
    tangent->scratch =
        pk__arena_take(arena,
                       pk__max(pk__max(pk__max(points * (bounds ? outputs : 2), rows), 2 * outputs) * widest,
                               outputs * by_rows),
                       sizeof(pk_real));
    tangent->weighted = pk__arena_take(arena, points, deepest * sizeof(pk_real));
    tangent->absolute = bounds ? pk__arena_take(arena, points, deepest * sizeof(pk_real)) : NULL;
    points = tangent->integrator.path.point_capacity;
    pk__points_take(arena, points, bounds, &tangent->sorted);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
