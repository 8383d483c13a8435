/* pathkernel/features/factors.h: the train side of every kernel: the loss gradients of a batch's examples, factored layer by
 * layer and stored in panels, as the products with the test side want them.
 */
#ifndef PATHKERNEL_FACTORS_H
#define PATHKERNEL_FACTORS_H
#include "cost.h"
#include "../training/gradient.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_FACTORS_INTERNALS_KNOWN)
#define PATHKERNEL_FACTORS_INTERNALS_KNOWN
/* >>> internals */
/* What decides how the gradients of a layer that is used at several places (a convolution, a dense layer on tokens) are
 * represented: as one outer product for each place, or materialized number by number ("by rows"). */
typedef struct pk__representation {
    size_t outputs, batch; /* the outputs of a test row; the examples of a step */
    int materialized; /* Phi is needed as a whole: stateful optimizers, bounds, or because the caller says so */
    int factored;     /* otherwise: do not materialize unless it is unavoidable */
    /* the products of the network's inputs with the examples' are known, so that the latter are not needed as factors */
    int known_data;
} pk__representation;

/* 1: gradients of the examples are materialized for the node's weights. Where Phi is, too, that costs fewest flops, as
 * long as a step's gradients fit into 256 MiB; else by flops (cost.h) with five points a step. */
PK__INTERNAL int pk__layer_by_rows(const pk__representation *representation, const pk_node *node);

/* Factors of c_i grad l_i for the examples of a batch, in panels of PK_PANEL examples: feature j of batch position b is
 * number (b / PK_PANEL * features + j) * PK_PANEL + b % PK_PANEL of input[l] (features: places x fan_in) and of cotangent[l]
 * (places x fan_out); a last panel is filled with zeros. input[l] is NULL for known data. rows[l] (weights x ld), for layers by
 * rows, is feature-major. */
typedef struct pk__examples {
    size_t count, ld;
    const int64_t *items;
    int consecutive; /* items[b] == items[0] + b */
    const pk_array
        *recorded; /* dl/df of the items, from the row recorded_row on; NULL: the criterion gives it */
    size_t recorded_row;
    pk_real **input, **cotangent, **rows;
} pk__examples;

enum { PK__EXAMPLE_BLOCK = 256 };

PK__INTERNAL void pk__examples_take(pk__arena *arena, const pk_graph *graph, size_t capacity,
                                    const pk__representation *representation, pk__examples *examples);
/* Weights (count) with a random relative change of up to PK__PERTURBATION each: see pk__examples_magnitude. */
#ifdef PATHKERNEL_FLOAT
#define PK__PERTURBATION 3e-5
#else
#define PK__PERTURBATION 1e-9
#endif
PK__INTERNAL void pk__examples_perturb(size_t count, const pk_real *weights, pk_real *perturbed);
/* For bounds: to, which holds the gradients at perturbed weights, becomes the absolute values of from and how strongly
 * they depend on relative changes of the weights. pk__rounding_allowance times to then holds what rounding leaves of the
 * gradients, also where a loss is nearly zero or terms cancel on the way back. */
PK__INTERNAL void pk__examples_magnitude(const pk__examples *from, const pk_graph *graph, pk__examples *to);
/* sum (graph->untied) += the sum of the examples' gradients, separately for each use of a tied tensor. */
PK__INTERNAL void pk__examples_sum(const pk__examples *examples, const pk_graph *graph, pk_real *sum);
/* The rounding allowance of a gradient, relative to its size: c eps, c = 16 nodes + 2 sum over layers (inputs + outputs). */
PK__INTERNAL double pk__rounding_allowance(const pk_graph *graph);
/* Memory with which one thread fills examples, at most `rows` <= PK__EXAMPLE_BLOCK at a time. */
typedef struct pk__example_workspace {
    pk__tape tape;
    pk_real *inputs, *targets, *row_gradients;
} pk__example_workspace;
PK__INTERNAL void pk__example_workspace_take(pk__arena *arena, const pk_graph *graph, size_t rows,
                                             pk__example_workspace *workspace);
/* recorded: the derivatives of the items' losses by the outputs, from `row` on; NULL: the criterion gives them. */
PK__INTERNAL void pk__examples_begin(pk__examples *examples, const pk_batch *batch, const pk_array *recorded,
                                     size_t row);
/* Fills the columns first .. first + PK__EXAMPLE_BLOCK - 1, as far as there are any, with gradients of
 * c_b l_b at the weights; gradient (graph->untied, may be NULL) += their sum, and weights are as many. Cost about 6 P flops an example. */
PK__INTERNAL void pk__examples_fill(pk__examples *examples, const pk_graph *graph,
                                    const pk_criterion *criterion, const pk_real *weights,
                                    const pk_dataset *data, const pk_batch *batch, size_t first,
                                    pk__example_workspace *workspace, pk_real *gradient);
/* The same with the losses' gradients with respect to the outputs at other weights, seeds_at: sum_k (dl_b/df_k at seeds_at)
 * (df_k/dw at weights). */
PK__INTERNAL void pk__examples_fill_apart(pk__examples *examples, const pk_graph *graph,
                                          const pk_criterion *criterion, const pk_real *seeds_at,
                                          const pk_real *weights, const pk_dataset *data, const pk_batch *batch,
                                          size_t first, pk__example_workspace *workspace, pk_real *gradient);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_FACTORS_IMPLEMENTED)
#define PATHKERNEL_FACTORS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
#include <time.h>
PK__BEGIN_CODE

static const pk_node *pk__layer_input(const pk_graph *graph, const pk_node *node)
{
    return &graph->nodes[node->inputs[0]];
}

/* The last layer where only an elementwise operation stands between it and node. */
PK__PRIVATE const pk_node *pk__last_behind(const pk_graph *graph, const pk_node *node)
{
    const pk_node *between = pk__only_reader(graph, node);
    const pk_node *head = between && between->operation->elementwise ? pk__only_reader(graph, between) : NULL;
    return head && head->cotangent_constant && pk__is_outer(head) ? head : NULL;
}

PK__INTERNAL int pk__layer_by_rows(const pk__representation *representation, const pk_node *node)
{
    if (pk__is_outer(node))
        return 0;
    if (node->tangent_form != PK_TANGENT_OUTER)
        return 1;
    if (representation->materialized)
        return representation->batch <= ((size_t)1 << 25) / node->weight_count;
    const pk__product_sizes sizes = {.left = (double)representation->outputs,
                                     .right = 1,
                                     .summed = 1,
                                     .points = 5,
                                     .formed = 1 / (double)pk__max(representation->batch, 1)};
    return !representation->factored && pk__product_flops(PK__PRODUCT_BY_ROWS, node, &sizes) <=
                                            pk__product_flops(PK__PRODUCT_FACTORED, node, &sizes);
}

PK__INTERNAL void pk__examples_take(pk__arena *arena, const pk_graph *graph, size_t capacity,
                                    const pk__representation *representation, pk__examples *examples)
{
    memset(examples, 0, sizeof *examples);
    /* Whole cache lines, and no multiple of 4 KiB, which would map every feature to the same cache set. */
    const size_t columns = pk__blocks(capacity, PK_PANEL) * PK_PANEL;
    examples->ld = columns % 512 ? columns : columns + PK_PANEL;
    examples->input = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->cotangent = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->rows = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        int rows = pk__layer_by_rows(representation, node);
        const size_t bytes = columns * sizeof(pk_real);
        const int known =
            representation->known_data && pk__is_outer(node) && node->inputs[0] == 0 && !node->shares;
        pk_real *input = rows || known ? NULL : pk__arena_take(arena, node->positions * node->fan_in, bytes);
        pk_real *cotangent = rows ? NULL : pk__arena_take(arena, node->width, bytes);
        pk_real *gradients =
            rows ? pk__arena_take(arena, node->weight_count, examples->ld * sizeof(pk_real)) : NULL;
        if (examples->input) {
            examples->input[l] = input;
            examples->cotangent[l] = cotangent;
            examples->rows[l] = gradients;
        }
    }
}

/* The number of examples that go through the network at one time: a block of them, or about 2^20 values. */
static size_t pk__example_rows(const pk_graph *graph)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        numbers += graph->nodes[n].width;
    return pk__max(1, pk__min(PK__EXAMPLE_BLOCK, ((size_t)1 << 20) / numbers));
}

PK__INTERNAL void pk__example_workspace_take(pk__arena *arena, const pk_graph *graph, size_t rows,
                                             pk__example_workspace *workspace)
{
    size_t most = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        if (pk__is_outer(node))
            continue;
        most = pk__max(most, node->weight_count);
        if (node->tangent_form == PK_TANGENT_OUTER)
            most = pk__max(most, node->positions * node->fan_in + node->width);
    }
    rows = pk__min(rows, pk__example_rows(graph));
    pk__pass_take(arena, graph, rows, 1, 0, &workspace->tape);
    workspace->inputs = pk__arena_take(arena, rows, graph->input_width * sizeof(pk_real));
    workspace->targets = pk__arena_take(arena, rows, graph->output_width * sizeof(pk_real));
    workspace->row_gradients = pk__arena_take(arena, most, rows * sizeof(pk_real));
}

PK__INTERNAL void pk__examples_begin(pk__examples *examples, const pk_batch *batch, const pk_array *recorded,
                                     size_t row)
{
    examples->recorded = recorded;
    examples->recorded_row = row;
    examples->count = batch->count;
    examples->items = batch->items;
    examples->consecutive = 1;
    for (size_t b = 1; b < batch->count; b++)
        examples->consecutive &= batch->items[b] == batch->items[0] + (int64_t)b;
}

/* Columns first .. first + count - 1 of panels of features = rows of from (count x features); the rest of a last panel = 0. */
static void pk__put_panels(size_t count, size_t features, const pk_real *from, size_t first, pk_real *panels)
{
    for (size_t b = 0, columns; b < count; b += columns) {
        const size_t lane = (first + b) % PK_PANEL;
        pk_real *to = panels + (first + b) / PK_PANEL * features * PK_PANEL;
        columns = pk__min(PK_PANEL - lane, count - b);
        pk__interleave(columns, features, from + b * features, 1, features, to + lane);
        for (size_t i = lane + columns; i < PK_PANEL; i++)
            for (size_t j = 0; j < features; j++)
                to[j * PK_PANEL + i] = 0;
    }
}

/* places (positions x fan_in) and deltas (positions x copies x fan_out) of row row of a node that is used at several
 * places. */
PK__PRIVATE void pk__node_places(const pk__tape *tape, const pk_node *node, size_t row, size_t copies,
                                 pk_real *places, pk_real *deltas)
{
    const size_t positions = node->positions, out = node->fan_out;
    const int channels = node->operation->channels_first;
    const size_t next_place = channels ? 1 : out, next_unit = channels ? positions : 1;
    const pk_real *from = tape->cotangent[node - tape->graph->nodes] + row * copies * node->width;
    pk_call call;
    pk__pass_call(tape, node, 1, copies, &call);
    call.in[0] += row * call.in_width[0];
    call.out = places;
    if (node->unfolds)
        node->operation->unfold(&call);
    else
        memcpy(places, call.in[0], call.in_width[0] * sizeof *places);
    for (size_t k = 0; k < copies; k++, from += node->width)
        for (size_t q = 0; q < positions; q++) {
            const pk_real *at = from + q * next_place;
            pk_real *to = deltas + (q * copies + k) * out;
            for (size_t j = 0; j < out; j++)
                to[j] = at[j * next_unit];
        }
}

PK__INTERNAL void pk__examples_perturb(size_t count, const pk_real *weights, pk_real *perturbed)
{
    /* Changes have random sizes, not only random signs: else half of all pairs of weights would change by the same factor,
     * and their difference would seem exact. */
    pk_random random = {0, 0, 0};
    for (size_t i = 0; i < count; i += 4) {
        const uint64_t bits = pk_random_bits(&random);
        for (size_t k = 0; k < 4 && i + k < count; k++) {
            const double change = (double)(bits >> 16 * k & 0xffff) / 32768 - 1;
            perturbed[i + k] = (pk_real)(weights[i + k] * (1 + PK__PERTURBATION * change));
        }
    }
}

/* The observed change counts twice, because random changes are half as large as the largest on average. */
PK__INTERNAL void pk__examples_magnitude(const pk__examples *from, const pk_graph *graph, pk__examples *to)
{
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const pk_real *sources[3] = {from->input[l], from->cotangent[l], from->rows[l]};
        pk_real *targets[3] = {to->input[l], to->cotangent[l], to->rows[l]};
        const size_t columns = pk__blocks(from->count, PK_PANEL) * PK_PANEL;
        const size_t numbers[3] = {node->positions * node->fan_in * columns, node->width * columns,
                                   node->weight_count * from->ld};
        for (int part = 0; part < 3; part++)
            for (size_t i = 0; sources[part] && i < numbers[part]; i++)
                targets[part][i] = (pk_real)(fabs(sources[part][i]) +
                                             2 * fabs(targets[part][i] - sources[part][i]) / PK__PERTURBATION);
    }
}

PK__INTERNAL void pk__examples_sum(const pk__examples *examples, const pk_graph *graph, pk_real *sum)
{
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t in = node->fan_in, out = node->fan_out, ld = examples->ld, count = examples->count;
        pk_real *to = sum + node->weight_offset;
        if (examples->rows[l]) {
            for (size_t i = 0; i < node->weight_count; i++)
                for (size_t b = 0; b < count; b++)
                    to[i] += examples->rows[l][i * ld + b];
            continue;
        }
        /* One place of a panel after the other, because the features of a panel are sorted by place. */
        for (size_t q = 0; q < pk__blocks(count, PK_PANEL) * node->positions; q++) {
            const pk_real *input = examples->input[l] + q * in * PK_PANEL;
            const pk_real *cotangent = examples->cotangent[l] + q * out * PK_PANEL;
            pk__gemm(0, 1, out, in, PK_PANEL, 1, cotangent, PK_PANEL, input, PK_PANEL, 1, to, in);
            for (size_t j = 0; pk__has_bias(node) && j < out; j++)
                for (size_t b = 0; b < PK_PANEL; b++)
                    to[out * in + j] += cotangent[j * PK_PANEL + b];
        }
    }
}

/* Stores the factors of `count` examples in the columns from `first` on. room: places x (fan_in + fan_out) numbers. */
static void pk__fill_places(const pk__tape *tape, const pk_node *node, size_t count, pk_real *room,
                            pk__examples *examples, size_t first)
{
    const size_t ins = node->positions * node->fan_in;
    for (size_t b = 0; b < count; b++) {
        pk__node_places(tape, node, b, 1, room, room + ins);
        pk__put_panels(1, ins, room, first + b, examples->input[node->layer]);
        pk__put_panels(1, node->width, room + ins, first + b, examples->cotangent[node->layer]);
    }
}

/* Fills the columns [first, first + count), at most as many as the workspace holds. */
static void pk__fill_rows(pk__examples *examples, const pk_graph *graph, const pk_criterion *criterion,
                          const pk_real *seeds_at, const pk_real *weights, const pk_dataset *data,
                          const pk_batch *batch, size_t first, size_t count, pk__example_workspace *workspace,
                          pk_real *gradient)
{
    const size_t outputs = graph->output_width;
    pk__tape *tape = &workspace->tape;
    const pk__line line = {weights, NULL, NULL}, seeds_line = {seeds_at, NULL, NULL};
    pk_dataset_inputs(data, batch->items + first, count, workspace->inputs);
    if (examples->recorded)
        pk_array_reals(examples->recorded, (examples->recorded_row + first) * outputs, count * outputs,
                       workspace->targets);
    else
        pk_criterion_targets(criterion, data, batch->items + first, count, outputs, workspace->targets);
    pk__pass_forward(tape, &seeds_line, count, workspace->inputs);
    const pk_real *f = pk__pass_output(tape);
    pk_real *seed = pk__pass_seed(tape);
    for (size_t b = 0; b < count; b++) {
        pk_criterion_gradient(criterion, outputs, f + b * outputs, workspace->targets + b * outputs,
                              seed + b * outputs);
        double weight = batch->weights ? batch->weights[first + b] : 1.0 / (double)batch->count;
        for (size_t c = 0; c < outputs; c++)
            seed[b * outputs + c] = (pk_real)(weight * seed[b * outputs + c]);
    }
    if (seeds_at != weights)
        pk__pass_forward(tape, &line, count, workspace->inputs);
    pk__pass_reverse(tape, &line, count, 1);
    if (gradient)
        pk__pass_weight_gradient(tape, count, gradient);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t n = (size_t)(node - graph->nodes);
        if (examples->rows[l]) {
            pk_call call;
            pk__pass_call(tape, node, count, 1, &call);
            call.weights = weights + node->weight_offset;
            call.out_cotangent = tape->cotangent[n];
            call.gradient = workspace->row_gradients;
            pk__node_row_gradients(&call);
            pk__transpose(count, node->weight_count, workspace->row_gradients, examples->rows[l] + first,
                          examples->ld);
            continue;
        }
        if (pk__is_outer(node)) {
            if (examples->input[l])
                pk__put_panels(count, node->fan_in, tape->value[node->inputs[0]], first, examples->input[l]);
            pk__put_panels(count, node->width, tape->cotangent[n], first, examples->cotangent[l]);
        } else {
            pk__fill_places(tape, node, count, workspace->row_gradients, examples, first);
        }
    }
}

PK__INTERNAL void pk__examples_fill_apart(pk__examples *examples, const pk_graph *graph,
                                          const pk_criterion *criterion, const pk_real *seeds_at,
                                          const pk_real *weights, const pk_dataset *data, const pk_batch *batch,
                                          size_t first, pk__example_workspace *workspace, pk_real *gradient)
{
    const size_t last = first + pk__min(batch->count - first, PK__EXAMPLE_BLOCK), rows = workspace->tape.rows;
    for (; first < last; first += rows)
        pk__fill_rows(examples, graph, criterion, seeds_at, weights, data, batch, first,
                      pk__min(rows, last - first), workspace, gradient);
}

PK__INTERNAL void pk__examples_fill(pk__examples *examples, const pk_graph *graph,
                                    const pk_criterion *criterion, const pk_real *weights,
                                    const pk_dataset *data, const pk_batch *batch, size_t first,
                                    pk__example_workspace *workspace, pk_real *gradient)
{
    pk__examples_fill_apart(examples, graph, criterion, weights, weights, data, batch, first, workspace,
                            gradient);
}

PK__INTERNAL double pk__rounding_allowance(const pk_graph *graph)
{
    double sum = 8 * (double)graph->node_count;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        sum += (double)(node->width + pk__layer_input(graph, node)->width);
    }
    return 2 * PK__EPSILON * sum;
}

PK__END_CODE
/* <<< implementation */
#endif
