/* pathkernel/example.h: the train side of every kernel: the loss gradients of a batch's examples, factored layer by
 * layer and stored feature-major, as the products with the test side want them.
 */
#ifndef PATHKERNEL_EXAMPLE_H
#define PATHKERNEL_EXAMPLE_H
#include "loss.h"

/* >>> declarations */
PK__BEGIN_C

/* Factors of c_i grad l_i for the examples of a batch, feature-major: input[l] is (layer inputs x ld), cotangent[l]
 * (layer outputs x ld), rows[l] (weights x ld) for layers of the form PK_TANGENT_ROWS. Column b is batch position b. */
typedef struct pk_examples {
    size_t count, ld;
    const int64_t *items;
    int consecutive; /* items[b] == items[0] + b */
    pk_real **input, **cotangent, **rows;
} pk_examples;

enum { PK_EXAMPLE_BLOCK = 256 };

PK_API void pk_examples_take(pk_arena *arena, const pk_graph *graph, size_t capacity, pk_examples *examples);
/* to = the absolute values of from: for bounds. */
PK_API void pk_examples_magnitude(const pk_examples *from, const pk_graph *graph, pk_examples *to);
/* sum (P) += sum over the examples of their gradients. */
PK_API void pk_examples_sum(const pk_examples *examples, const pk_graph *graph, pk_real *sum);
/* The rounding allowance of a gradient, relative to its size: c eps, c = 2 sum over layers (inputs + outputs). */
PK_API double pk_rounding_allowance(const pk_graph *graph);
/* Memory of one thread to fill examples. */
typedef struct pk_example_workspace {
    pk_tape tape;
    pk_real *inputs, *targets, *row_gradients;
} pk_example_workspace;
PK_API void pk_example_workspace_take(pk_arena *arena, const pk_graph *graph, pk_example_workspace *workspace);
PK_API void pk_examples_begin(pk_examples *examples, const pk_batch *batch);
/* Fills the columns first .. first + PK_EXAMPLE_BLOCK - 1, as far as there are any, with gradients of
 * c_b l_b at the weights; gradient (P, may be NULL) += their sum. Cost about 6 P flops an example. */
PK_API void pk_examples_fill(pk_examples *examples, const pk_graph *graph, pk_loss loss, const pk_real *weights,
                             const pk_dataset *data, const pk_batch *batch, size_t first,
                             pk_example_workspace *workspace, pk_real *gradient);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_EXAMPLE_IMPLEMENTED)
#define PATHKERNEL_EXAMPLE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
#include <time.h>
PK__BEGIN_C

#define PK__EPSILON (sizeof(pk_real) == sizeof(float) ? 1.1920929e-7 : 2.220446049250313e-16)

PK__PRIVATE pk_real pk__dot(size_t count, const pk_real *a, const pk_real *b)
{
    pk_real sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

static const pk_node *pk__layer_input(const pk_graph *graph, const pk_node *node)
{
    return &graph->nodes[node->inputs[0]];
}

/* The bias of an outer-product layer is what its weight (out, in) leaves. */
static int pk__has_bias(const pk_graph *graph, const pk_node *node)
{
    (void)graph;
    return node->weight_count > node->fan_out * node->fan_in;
}

PK_API void pk_examples_take(pk_arena *arena, const pk_graph *graph, size_t capacity, pk_examples *examples)
{
    memset(examples, 0, sizeof *examples);
    /* Whole cache lines, and no multiple of 4 KiB, which would map every feature to the same cache set. */
    examples->ld = (capacity + 7) / 8 * 8;
    if (examples->ld % 512 == 0)
        examples->ld += 8;
    examples->input = (pk_real **)pk_arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->cotangent = (pk_real **)pk_arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->rows = (pk_real **)pk_arena_take(arena, graph->layers, sizeof(pk_real *));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        int rows = !pk__is_outer(node);
        size_t bytes = examples->ld * sizeof(pk_real);
        pk_real *input =
            rows ? NULL : (pk_real *)pk_arena_take(arena, pk__layer_input(graph, node)->width, bytes);
        pk_real *cotangent = rows ? NULL : (pk_real *)pk_arena_take(arena, node->width, bytes);
        pk_real *gradients = rows ? (pk_real *)pk_arena_take(arena, node->weight_count, bytes) : NULL;
        if (examples->input) {
            examples->input[l] = input;
            examples->cotangent[l] = cotangent;
            examples->rows[l] = gradients;
        }
    }
}

PK_API void pk_example_workspace_take(pk_arena *arena, const pk_graph *graph, pk_example_workspace *workspace)
{
    size_t most = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].weight_count && !pk__is_outer(&graph->nodes[n]))
            most = pk__most(most, graph->nodes[n].weight_count);
    pk_tape_take(arena, graph, PK_EXAMPLE_BLOCK, 1, 0, &workspace->tape);
    workspace->inputs = (pk_real *)pk_arena_take(arena, PK_EXAMPLE_BLOCK, graph->input_width * sizeof(pk_real));
    workspace->targets =
        (pk_real *)pk_arena_take(arena, PK_EXAMPLE_BLOCK, graph->output_width * sizeof(pk_real));
    workspace->row_gradients = (pk_real *)pk_arena_take(arena, most, PK_EXAMPLE_BLOCK * sizeof(pk_real));
}

PK_API void pk_examples_begin(pk_examples *examples, const pk_batch *batch)
{
    examples->count = batch->count;
    examples->items = batch->items;
    examples->consecutive = 1;
    for (size_t b = 1; b < batch->count; b++)
        examples->consecutive &= batch->items[b] == batch->items[0] + (int64_t)b;
}

/* to (cols x ld, starting at a column) = transposed from (rows x cols). */
static void pk__transpose(size_t rows, size_t cols, const pk_real *from, pk_real *to, size_t ld)
{
    enum { TILE = 16 };
    for (size_t i = 0; i < rows; i += TILE)
        for (size_t j = 0; j < cols; j++)
            for (size_t k = i; k < rows && k < i + TILE; k++)
                to[j * ld + k] = from[k * cols + j];
}

PK_API void pk_examples_fill(pk_examples *examples, const pk_graph *graph, pk_loss loss, const pk_real *weights,
                             const pk_dataset *data, const pk_batch *batch, size_t first,
                             pk_example_workspace *workspace, pk_real *gradient)
{
    size_t count = pk__least(batch->count - first, PK_EXAMPLE_BLOCK), outputs = graph->output_width;
    pk_tape *tape = &workspace->tape;
    const pk_line line = {weights, NULL, NULL};
    pk_dataset_inputs(data, batch->items + first, count, workspace->inputs);
    pk_loss_targets(loss, data, batch->items + first, count, outputs, workspace->targets);
    pk_tape_forward(tape, &line, count, workspace->inputs);
    const pk_real *f = pk_tape_output(tape);
    pk_real *seed = pk_tape_seed(tape);
    for (size_t b = 0; b < count; b++) {
        pk_loss_gradient(loss, outputs, f + b * outputs, workspace->targets + b * outputs, seed + b * outputs);
        double weight = batch->weights ? batch->weights[first + b] : 1.0 / (double)batch->count;
        for (size_t c = 0; c < outputs; c++)
            seed[b * outputs + c] = (pk_real)(weight * seed[b * outputs + c]);
    }
    pk_tape_reverse(tape, &line, count, 1);
    if (gradient)
        pk_tape_weight_gradient(tape, count, gradient);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t n = (size_t)(node - graph->nodes);
        if (examples->rows[l]) {
            pk_call call;
            pk__tape_call(tape, node, count, 1, &call);
            call.weights = weights + node->weight_offset;
            call.out_cotangent = tape->cotangent[n];
            call.gradient = workspace->row_gradients;
            pk__node_row_gradients(&call);
            pk__transpose(count, node->weight_count, workspace->row_gradients, examples->rows[l] + first,
                          examples->ld);
            continue;
        }
        pk__transpose(count, pk__layer_input(graph, node)->width, tape->value[node->inputs[0]],
                      examples->input[l] + first, examples->ld);
        pk__transpose(count, node->width, tape->cotangent[n], examples->cotangent[l] + first, examples->ld);
    }
}

PK_API void pk_examples_magnitude(const pk_examples *from, const pk_graph *graph, pk_examples *to)
{
    to->count = from->count;
    to->items = from->items;
    to->consecutive = from->consecutive;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const pk_real *sources[3] = {from->input[l], from->cotangent[l], from->rows[l]};
        pk_real *targets[3] = {to->input[l], to->cotangent[l], to->rows[l]};
        const size_t features[3] = {pk__layer_input(graph, node)->width, node->width, node->weight_count};
        for (int part = 0; part < 3; part++)
            for (size_t i = 0; sources[part] && i < features[part] * from->ld; i++)
                targets[part][i] = (pk_real)fabs(sources[part][i]);
    }
}

PK_API void pk_examples_sum(const pk_examples *examples, const pk_graph *graph, pk_real *sum)
{
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t out = node->width, ld = examples->ld, count = examples->count;
        pk_real *to = sum + node->weight_offset;
        if (examples->rows[l]) {
            for (size_t i = 0; i < node->weight_count; i++)
                for (size_t b = 0; b < count; b++)
                    to[i] += examples->rows[l][i * ld + b];
            continue;
        }
        const size_t in = pk__layer_input(graph, node)->width;
        pk__gemm(0, 1, out, in, count, 1, examples->cotangent[l], ld, examples->input[l], ld, 1, to, in);
        for (size_t j = 0; pk__has_bias(graph, node) && j < out; j++)
            for (size_t b = 0; b < count; b++)
                to[out * in + j] += examples->cotangent[l][j * ld + b];
    }
}

PK_API double pk_rounding_allowance(const pk_graph *graph)
{
    double sum = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        sum += (double)(node->width + pk__layer_input(graph, node)->width);
    }
    return 2 * PK__EPSILON * sum;
}

PK__END_C
/* <<< implementation */
#endif
