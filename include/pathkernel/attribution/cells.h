/* pathkernel/attribution/cells.h: tiles of inner products, added to the results.
 *
 * A cell is an output of a test row. For each cell the results keep sums over any of examples (or their groups), steps and layers
 * (decomposition.h); a tile has a row of inner products with a block of examples for each cell. Tiles of several layers are
 * added as one, unless some result is kept by layer. Sums are taken in an order that depends on shapes alone.
 */
#ifndef PATHKERNEL_CELLS_H
#define PATHKERNEL_CELLS_H
#include "plan.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_CELLS_IMPLEMENTED)
#define PATHKERNEL_CELLS_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE

/* Eight sums, so that the compiler can add a vector of them at a time. */
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

/* Adds factor * tile (cells x count, ld PK__TILE_LD) to the results of the cells that begin at `cell`, in one column of
 * by_layer or, with -1, in all. */
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

/* Computes the tile of a block of rows with the examples [first, first + count), for one layer or, with layer -1, for all
 * of worker->product.due. */
PK__PRIVATE void pk__add_tile(const pk__worker *worker, int layer, size_t first, size_t count,
                              const pk_real *tile)
{
    const pk__job *job = worker->job;
    const size_t outputs = job->outputs;
    layer = layer < 0 ? layer : pk__block_of(job->graph, worker->integral.layer[layer].node, 0)->column;
    if (job->output_count == outputs) {
        pk__add_cells(worker, layer, worker->row * outputs, worker->rows * outputs, worker->factor, first,
                      count, tile);
        return;
    }
    for (size_t row = 0; row < worker->rows; row++)
        pk__add_cells(worker, layer, (worker->row + row) * outputs + job->first_output, job->output_count,
                      worker->factor, first, count, tile + (row * outputs + job->first_output) * PK__TILE_LD);
}

/* Where the tile of a row and all outputs with block number `block` of the examples begins. */
PK__PRIVATE pk_real *pk__row_tile(const pk__worker *worker, size_t block)
{
    return worker->tile + block * worker->job->outputs * PK__TILE_LD;
}

/* Adds the row's tiles to the results, in one column or in all, and sets them to zero. */
PK__PRIVATE void pk__add_row(pk__worker *worker, size_t row, int column, size_t j, double factor)
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
    worker->product.seconds += pk__seconds() - start; /* counted like the tiles of factored layers */
}

PK__END_CODE
/* <<< implementation */
#endif
