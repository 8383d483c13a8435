/* pathkernel/features/product.h: inner products of the integrated gradients with the gradients of examples: the memory, and the
 * products of rows with panels that all of them consist of. tiles.h puts them together.
 *
 * For a dense layer the gradient is an outer product, grad_W = delta (x) a, so that
 *     < grad f(x), g_i > = sum over layers (delta_x . delta_i) (a_x . a_i + 1):
 * two small Gram matrices and a Hadamard product per layer, and no vector of P numbers. Products are of rows of the test side
 * and panels of examples, and the Hadamard product is taken while a tile of them is in registers (math/tile.h): nothing that is
 * as large as a layer times examples goes through memory.
 */
#ifndef PATHKERNEL_PRODUCT_H
#define PATHKERNEL_PRODUCT_H
#include "integral.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_PRODUCT_INTERNALS_KNOWN)
#define PATHKERNEL_PRODUCT_INTERNALS_KNOWN
/* >>> internals */
/* The distance between the rows of a tile: one panel more than a block of examples, so that rows do not fall on the same
 * cache sets. */
enum { PK__TILE_LD = PK__EXAMPLE_BLOCK + PK_PANEL };

/* The products of one block of rows; one a thread. */
typedef struct pk__product {
    const pk__integral *integral; /* the test side */
    const pk__examples *examples; /* the train side, set by the caller before a step */
    /* rows x gram_ld: products of the rows' inputs with the training inputs, or NULL; set by the caller */
    const pk_real *gram;
    size_t gram_ld;
    size_t *due, due_count; /* the layers that are multiplied point by point, the last layer first */
    pk_real *tile;          /* rows x outputs x PK__TILE_LD */
    pk_real *
        left; /* points or rows, x PK__TILE_LD: products of inputs, to be multiplied with those of cotangents */
    pk_real *ones;             /* points or rows */
    pk_real **weighted_inputs; /* of layers at points: points x in, times their weights */
    /* Offsets of rows of products: of the cell in a tile, or the row in left, for each output of a point or row; for each
     * place of a layer used at several places; of consecutive rows in a tile, and in a panel. */
    size_t *point_to, *cell_left, *place_to, *place_left, *tile_row, *panel_row, *pair_row;
    pk_real *place_start; /* the points' weights, place by place */
    /* For the layer below the last one, where the outputs are taken out of the sum over points: */
    pk_real *last_weights; /* 1 + rows, x outputs x (out of W^T seed, out of D^T seed) */
    pk_real *slopes;       /* points x 2 out: w slope, w t slope */
    size_t *unit_row;      /* rows x 2 out: the units whose slope is not 0, as rows of a panel, twice */
    size_t *unit_count;    /* rows */
    pk_real *sums;         /* PK__SUMS_IN_HAND x PK__PAIR */
    double flops;          /* counted */
    double seconds;        /* added up by the caller */
} pk__product;

/* factored: some layers are multiplied point by point. pk__integral_take comes first. */
PK__INTERNAL void pk__product_take(pk__arena *arena, const pk__integral *integral, int factored,
                                   pk__product *product);
/* tile (outputs x columns, ld PK__TILE_LD) += < e_k, g_b > for the columns b = first .. first + columns - 1, first a
 * multiple of PK_PANEL, columns <= PK__EXAMPLE_BLOCK; e has `outputs` outputs in the layout of the layer's Phi. Columns
 * that only fill the last panel are written, too. */
PK__INTERNAL void pk__product_row(pk__product *product, size_t layer, size_t outputs, const pk_real *e,
                                  size_t first, size_t columns, pk_real *tile);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PRODUCT_IMPLEMENTED)
#define PATHKERNEL_PRODUCT_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

enum {
    PK__PART_NUMBERS =
        1 << 14, /* numbers of rows that stay in a second-level cache of 512 KB together with the panels */
    PK__SUMS_IN_HAND = 96 /* sums of the layer below the last one that stay in the first-level cache */
};

static pk_real *pk__take_reals(pk__arena *arena, size_t count, size_t numbers)
{
    return pk__arena_take(arena, count, numbers * sizeof(pk_real));
}

static size_t *pk__take_indices(pk__arena *arena, size_t count)
{
    return pk__arena_take(arena, count, sizeof(size_t));
}

/* index = 0, step, 2 step, ... */
static void pk__fill_indices(size_t count, size_t step, size_t *index)
{
    for (size_t i = 0; index && i < count; i++)
        index[i] = i * step;
}

PK__INTERNAL void pk__product_take(pk__arena *arena, const pk__integral *integral, int factored,
                                   pk__product *product)
{
    const pk_graph *graph = integral->graph;
    const size_t outputs = integral->outputs, rows = integral->row_capacity, points = integral->reverse_points;
    const size_t places = integral->place_points, items = pk__max(points, rows);
    size_t most = pk__max(pk__max(items * outputs, places), PK__SUMS_IN_HAND), widest = 0;
    memset(product, 0, sizeof *product);
    product->integral = integral;
    product->due = pk__take_indices(arena, graph->layers);
    product->weighted_inputs = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const int used = factored && pk__is_outer(node);
        pk_real *inputs = pk__take_reals(arena, used ? points : 0, node->fan_in);
        if (product->weighted_inputs)
            product->weighted_inputs[l] = inputs;
        widest = pk__max(widest, used ? node->width : 0);
        most = pk__max(most, node->fan_out);
    }
    product->tile = pk__take_reals(arena, rows * outputs, PK__TILE_LD);
    product->left = pk__take_reals(arena, pk__max(items * PK__TILE_LD, places * PK__PAIR), 1);
    product->ones = pk__take_reals(arena, items, 1);
    product->point_to = pk__take_indices(arena, points * outputs);
    product->cell_left = pk__take_indices(arena, items * outputs);
    product->place_to = pk__take_indices(arena, places * outputs);
    product->place_left = pk__take_indices(arena, places * outputs);
    product->place_start = pk__take_reals(arena, places, 1);
    product->last_weights = pk__take_reals(arena, (1 + rows) * outputs, 2 * widest);
    product->slopes = pk__take_reals(arena, points, 2 * widest);
    product->unit_row = pk__take_indices(arena, rows * 2 * widest);
    product->unit_count = pk__take_indices(arena, rows);
    product->sums = pk__take_reals(arena, PK__SUMS_IN_HAND, PK__PAIR);
    product->tile_row = pk__take_indices(arena, most);
    product->panel_row = pk__take_indices(arena, most);
    product->pair_row = pk__take_indices(arena, places);
    pk__fill_indices(most, PK__TILE_LD, product->tile_row);
    pk__fill_indices(most, PK_PANEL, product->panel_row);
    pk__fill_indices(places, PK__PAIR, product->pair_row);
    for (size_t i = 0; product->ones && i < items; i++)
        product->ones[i] = 1;
    for (size_t i = 0; product->cell_left && i < items * outputs; i++)
        product->cell_left[i] = i / outputs * PK__TILE_LD;
}

/* The first panel of a block of examples, of features a number each. */
PK__PRIVATE const pk_real *pk__first_panel(const pk_real *all, size_t features, size_t first)
{
    return all + first * features; /* first is a multiple of PK_PANEL */
}

/* The number of columns that are multiplied together: two panels with AVX-512, else one. */
PK__PRIVATE size_t pk__columns_at_once(void)
{
    return PK__HAS_AVX512 ? (size_t)PK__PAIR : (size_t)PK_PANEL;
}

/* The panels of a block that begin at `column`. */
PK__PRIVATE pk__panels pk__panels_at(const pk_real *panels, size_t features, size_t column, size_t block)
{
    const pk__panels own = {pk__blocks(pk__min(pk__columns_at_once(), block - column), PK_PANEL),
                            pk__first_panel(panels, features, column), PK_PANEL, features * PK_PANEL, 0};
    return own;
}

/* The same; the panels after these are fetched into the cache meanwhile, because tiles are short and the processor would
 * notice too late that they go on there. AVX-512 tiles fetch while they multiply. For the others the beginning of a deep
 * panel is fetched into the first-level cache, which has no room for more. */
PK__PRIVATE pk__panels pk__fetch_panels(const pk_real *panels, size_t features, size_t column, size_t block)
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

/* Sets cells x columns of a tile to 0, up to the end of the last panel. */
PK__PRIVATE void pk__clear_tile(size_t cells, size_t columns, pk_real *tile)
{
    for (size_t i = 0; i < cells; i++)
        memset(tile + i * PK__TILE_LD, 0, pk__blocks(columns, PK_PANEL) * PK_PANEL * sizeof *tile);
}

/* The number of rows of a product that are multiplied together with one panel after the other, so that they stay in the
 * second-level cache. All rows are divided into equal parts. */
static size_t pk__part_rows(size_t rows, size_t depth)
{
    const size_t numbers = PK__HAS_AVX512 ? 4 * (size_t)PK__PART_NUMBERS : (size_t)PK__PART_NUMBERS;
    const size_t tiles = 2 * PK__TALLEST, most = pk__max(1, numbers / tiles / pk__max(depth, 1)) * tiles;
    const size_t all = pk__max(rows, 1), parts = pk__blocks(all, most);
    return pk__blocks(pk__blocks(all, parts), tiles) * tiles;
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
PK__PRIVATE void pk__multiply_inputs(pk__product *product, size_t layer, size_t rows, const pk_real *inputs,
                                     const pk_real *start, size_t first, size_t block)
{
    const pk__integral *integral = product->integral;
    const pk_node *node = integral->layer[layer].node;
    const size_t in = node->fan_in;
    pk__tile_target target = {PK__TILE_SET, product->left, product->tile_row, NULL, NULL, 0};
    pk__block_product(rows, in, inputs, pk__first_panel(product->examples->input[layer], in, first), block,
                      pk__has_bias(node) ? start : NULL, &target);
    product->flops += 2.0 * (double)block * (double)(rows * in);
}

/* tile += left o (cotangents of cells (cells x out) times those of a block of examples). */
PK__PRIVATE void pk__multiply_cotangents(pk__product *product, size_t layer, size_t cells,
                                         const pk_real *cotangents, const size_t *to, const size_t *left,
                                         size_t first, size_t block)
{
    const pk__integral *integral = product->integral;
    const size_t out = integral->layer[layer].node->width;
    pk__tile_target target = {PK__TILE_HADAMARD, product->tile, to, product->left, left, PK_PANEL};
    pk__block_product(cells, out, cotangents, pk__first_panel(product->examples->cotangent[layer], out, first),
                      block, NULL, &target);
    product->flops += 2.0 * (double)block * (double)(cells * out);
}

/* tile += sum over the places of an example of (e_k a_i + bias) . delta_i, for each output and each unit. */
static void pk__product_matrix(pk__product *product, size_t layer, size_t outputs, const pk_real *e,
                               size_t first, size_t columns, pk_real *tile)
{
    const pk__integral *integral = product->integral;
    const pk_node *node = integral->layer[layer].node;
    const size_t in = node->fan_in, out = node->fan_out, places = node->positions,
                 most = pk__part_rows(node->fan_out, node->fan_in);
    /* A layer that is materialized row by row stores each matrix with its bias; other layers store all matrices, then all
     * biases. */
    const int together = integral->layer[layer].kind == PK__LAYER_ROWS;
    const size_t stride = together ? node->weight_count : out * in, bias_stride = together ? stride : out;
    const pk_real *biases = pk__has_bias(node) ? e + (together ? out * in : outputs * out * in) : NULL;
    const pk_real *panels = pk__first_panel(product->examples->input[layer], places * in, first);
    const pk_real *cotangents = pk__first_panel(product->examples->cotangent[layer], places * out, first);
    pk__tile_target target = {PK__TILE_DOT, NULL, NULL, NULL, product->panel_row, places * out * PK_PANEL};
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
    product->flops += 2.0 * (double)(outputs * out * places) * (double)columns * (double)in;
}

PK__INTERNAL void pk__product_row(pk__product *product, size_t layer, size_t outputs, const pk_real *e,
                                  size_t first, size_t columns, pk_real *tile)
{
    const pk__examples *examples = product->examples;
    const size_t weights = product->integral->layer[layer].node->weight_count;
    double start = pk__seconds();
    if (!examples->rows[layer]) {
        pk__product_matrix(product, layer, outputs, e, first, columns, tile);
    } else {
        pk__gemm(0, 0, outputs, columns, weights, 1, e, weights, examples->rows[layer] + first, examples->ld, 1,
                 tile, PK__TILE_LD);
        product->flops += 2.0 * (double)outputs * (double)columns * (double)weights;
    }
    product->seconds += pk__seconds() - start;
}

PK__END_CODE
/* <<< implementation */
#endif
