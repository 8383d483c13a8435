/* pathkernel/network/pass.h: autodiff. A tape is the memory of one batch going through a graph: forward, reverse, tangent.
 *
 * Everything here also works along a line w + t d with an own t for each row (pk__line): an operation that is linear in
 * its weights gives
 *     F(w + t d, a) = F(w, a) + t F(d, a),
 * so that rows with different t do not need weights of their own, only two calls for the whole batch.
 */
#ifndef PATHKERNEL_PASS_H
#define PATHKERNEL_PASS_H
#include "../math/elementary.h"
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* outputs (rows x output_width) = f(weights, inputs (rows x input_width)), tiles of rows in parallel.
 * outputs must not overlap inputs. Cost 2 P rows flops. */
PK_API PK__MUST_USE pk_status pk_graph_evaluate(pk_context *context, const pk_graph *graph,
                                                const pk_real *weights, pk_matrix inputs, pk_matrix outputs);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_PASS_INTERNALS_KNOWN)
#define PATHKERNEL_PASS_INTERNALS_KNOWN
/* >>> internals */
/* The weights of a batch: weights + t[row] direction. direction == NULL: weights alone. */
typedef struct pk__line {
    const pk_real *weights, *direction;
    const pk_real *t;
} pk__line;

/* The memory of one batch. value[n] is rows x width, cotangent[n] rows x copies x width, tangent[n]
 * rows x width; value[0] points to the caller's inputs. */
typedef struct pk__tape {
    const pk_graph *graph;
    size_t rows, copies; /* capacity */
    int threads;         /* for each operation; 0: one */
    pk_context *context; /* of the caller, where there are several threads; NULL */
    int unit_seeds; /* set by the caller: the seeds of a row are the outputs' unit vectors, one after the other */
    /* Set by the caller: of each row, the rows at the two ends of its stretch. Piecewise-linear operations have their mean
     * slopes over the stretch then, in a reverse or tangent pass; NULL: the slopes at the row. */
    const size_t *from, *to;
    pk_real *mean; /* the caller's room for that: pk__mean_numbers */
    /* Of each row, where not NULL: a tangent pass with mean slopes raises it to how far the values that have kinks in the stretch
     * are from the mean of those at its ends, in the norm, relative to all values of the node at the row. */
    pk_real *gap;
    pk_real **value, **cotangent, **tangent;
    pk_real *scratch, *line_scratch, *row_weights;
    const pk_real *
        transposed; /* the caller's: pk__pass_transpose of the line's weights, and behind it of its direction; NULL */
    pk__line line; /* of the last reverse */
} pk__tape;

/* Takes the memory of a tape for up to `rows` rows, with `copies` cotangents each (0: no reverse), and tangents if needed. */
PK__INTERNAL void pk__pass_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t copies,
                                int tangents, pk__tape *tape);
/* The same with cotangents for at most reverse_rows rows, since these need most of the memory. The cotangents of an
 * elementwise operation are overwritten by those of its input, if it alone reads that input. */
PK__INTERNAL void pk__pass_take_parts(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                                      size_t copies, int tangents, pk__tape *tape);
/* value[n] = the graph at the line, rows rows of inputs. Cost 2 P rows flops, twice that along a line. */
PK__INTERNAL void pk__pass_forward(pk__tape *tape, const pk__line *line, size_t rows, const pk_real *inputs);
/* cotangent[n] = d (seed . output) / d value[n] for every node that depends on the weights, after a forward
 * on the same line; seeds (rows x copies x output width) stand in pk__pass_seed(). */
PK__INTERNAL void pk__pass_reverse(pk__tape *tape, const pk__line *line, size_t rows, size_t copies);
/* tangent[n] = d value[n] along the line's direction, at each row's t: a Jacobian-vector product. */
PK__INTERNAL void pk__pass_tangent(pk__tape *tape, const pk__line *line, size_t rows);
/* gradient (P) += sum over rows of the gradient, after a reverse with copies == 1. */
PK__INTERNAL void pk__pass_weight_gradient(pk__tape *tape, size_t rows, pk_real *gradient);
/* Whether a node has mean slopes where the tape asks for them. */
PK__INTERNAL int pk__has_mean_slopes(const pk_node *node);
/* How many numbers tape->mean needs. */
PK__INTERNAL size_t pk__mean_numbers(const pk_graph *graph, size_t copies);
/* call->in_cotangent (+)= the mean slopes' transpose times call->out_cotangent, for a node that has them. */
PK__INTERNAL void pk__mean_reverse(const pk__tape *tape, const pk_call *call);
PK__INTERNAL pk_real *pk__pass_output(const pk__tape *tape);
PK__INTERNAL pk_real *pk__pass_seed(const pk__tape *tape);
/* Sets the seeds of so many rows to the outputs' unit vectors, one after the other (copies == output width). The next reverse
 * then copies the weights of a last dense layer instead of multiplying with them. */
PK__INTERNAL void pk__pass_seed_units(pk__tape *tape, size_t rows);

/* Whether transposed copies of the layers' matrices save time, on a line with many rows. */
PK__INTERNAL int pk__pass_transposes(const pk_graph *graph);
/* transposed (P) := the transposed matrix (inputs x outputs) of each dense layer, at the offset of its weights. Cost P. */
PK__INTERNAL void pk__pass_transpose(const pk_graph *graph, const pk_real *weights, pk_real *transposed);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PASS_IMPLEMENTED)
#define PATHKERNEL_PASS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum {
    PK__MANY_POSITIONS = 16,
    PK__FEW_POSITIONS = 64,    /* a sum of so many outer products needs no packing */
    PK__MANY_COTANGENTS = 8,   /* of a row of the line, for a layer's weights, */
    PK__FEW_WEIGHTS = 1 << 14, /* that stay in the cache: so many at most */
    PK__TRANSPOSED = 1 << 16   /* parameters of a network whose matrices are transposed */
};

/* Whether the weights w + t d are formed for each row: the operation is not linear in them, or it uses them at so many
 * positions that this costs less than a second product. */
static int pk__has_row_weights(const pk_node *node)
{
    return node->weight_count &&
           (!node->operation->linear_in_weights || node->positions >= (size_t)PK__MANY_POSITIONS);
}

/* The same in reverse, where a row has as many cotangents as there are copies. */
static int pk__reverses_by_row(const pk_node *node, size_t copies)
{
    return pk__has_row_weights(node) ||
           (node->weight_count && node->weight_count <= (size_t)PK__FEW_WEIGHTS && !node->input_constant &&
            node->positions * copies >= (size_t)PK__MANY_COTANGENTS);
}

/* Whether the operation multiplies the values of each position by one matrix for all rows: y = w x, perhaps plus a bias. */
static int pk__is_plain_layer(const pk_node *node)
{
    return node->tangent_form == PK_TANGENT_OUTER && !node->unfolds && !node->operation->channels_first &&
           !pk__has_row_weights(node);
}

/* Whether a bias follows the matrix. */
PK__PRIVATE int pk__has_bias(const pk_node *node)
{
    return node->weight_count > node->fan_out * node->fan_in;
}

PK__INTERNAL int pk__pass_transposes(const pk_graph *graph)
{
    int some = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        some |= pk__is_plain_layer(&graph->nodes[n]);
    return some && graph->untied <= (size_t)PK__TRANSPOSED;
}

PK__INTERNAL void pk__pass_transpose(const pk_graph *graph, const pk_real *weights, pk_real *transposed)
{
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (pk__is_plain_layer(node))
            pk__transpose(node->fan_out, node->fan_in, weights + node->weight_offset,
                          transposed + node->weight_offset, node->fan_out);
    }
}

/* The only node that reads `node`; NULL if none or several do. */
PK__PRIVATE const pk_node *pk__only_reader(const pk_graph *graph, const pk_node *node)
{
    return node->only_reader < 0 ? NULL : &graph->nodes[node->only_reader];
}

/* in_place: see pk__pass_take_parts. */
static void pk__pass_layout(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                            size_t copies, int tangents, int in_place, pk__tape *tape)
{
    size_t count = graph->node_count, scratch = 0, line = 0, weights = 0, both = reverse_rows, all = 0;
    memset(tape, 0, sizeof *tape);
    tape->graph = graph;
    tape->rows = rows;
    tape->copies = copies;
    if (!pk__multiply(reverse_rows, copies > 1 ? copies : 1, &both) ||
        !pk__multiply(pk__max(rows, both), graph->widest, &all))
        arena->overflow = 1;
    tape->value = pk__arena_take(arena, count, sizeof *tape->value);
    tape->cotangent = copies ? pk__arena_take(arena, count, sizeof *tape->cotangent) : NULL;
    tape->tangent = tangents ? pk__arena_take(arena, count, sizeof *tape->tangent) : NULL;
    for (size_t n = 0; n < count && !arena->overflow; n++) {
        const pk_node *node = &graph->nodes[n];
        const size_t bytes = node->width * sizeof(pk_real);
        /* The input's value belongs to the caller: no room for it. */
        pk_real *value = n ? pk__arena_take(arena, rows, bytes) : NULL;
        const pk_node *input = n ? &graph->nodes[node->inputs[0]] : NULL;
        const int shared = in_place && n && n + 1 < count && node->operation->elementwise &&
                           pk__only_reader(graph, input) == node;
        pk_real *cotangent = NULL;
        if (shared && tape->cotangent)
            cotangent = tape->cotangent[node->inputs[0]];
        else if (copies && (node->varies || n + 1 == count) && !shared) /* the output's is the seed, always */
            cotangent = pk__arena_take(arena, both, bytes);
        pk_real *tangent = tangents && node->varies ? pk__arena_take(arena, rows, bytes) : NULL;
        if (tape->value)
            tape->value[n] = value;
        if (tape->cotangent)
            tape->cotangent[n] = cotangent;
        if (tape->tangent)
            tape->tangent[n] = tangent;
        if (n && node->operation->scratch && node->operation->scratch(node, rows, copies) > scratch)
            scratch = node->operation->scratch(node, rows, copies);
        if (node->unfolds)
            scratch = pk__max(scratch, node->positions * node->fan_in);
        if (node->weight_count)
            line = pk__max(line, pk__max(rows, both) * node->width);
        if (n && pk__is_plain_layer(node) && !node->input_constant)
            line = pk__max(line, rows * node->positions * node->fan_in);
        if (pk__reverses_by_row(node, copies))
            weights = pk__max(weights, node->weight_count);
    }
    tape->scratch = pk__arena_take(arena, scratch, sizeof(pk_real));
    tape->line_scratch = pk__arena_take(arena, line, sizeof(pk_real));
    tape->row_weights = pk__arena_take(arena, weights, sizeof(pk_real));
}

PK__INTERNAL void pk__pass_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t copies,
                                int tangents, pk__tape *tape)
{
    pk__pass_layout(arena, graph, rows, rows, copies, tangents, 0, tape);
}

PK__INTERNAL void pk__pass_take_parts(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                                      size_t copies, int tangents, pk__tape *tape)
{
    pk__pass_layout(arena, graph, rows, reverse_rows, copies, tangents, 1, tape);
}

PK__INTERNAL pk_real *pk__pass_output(const pk__tape *tape)
{
    return tape->value[tape->graph->node_count - 1];
}

PK__INTERNAL pk_real *pk__pass_seed(const pk__tape *tape)
{
    return tape->cotangent[tape->graph->node_count - 1];
}

PK__INTERNAL void pk__pass_seed_units(pk__tape *tape, size_t rows)
{
    const size_t outputs = tape->graph->output_width;
    pk_real *seed = pk__pass_seed(tape);
    memset(seed, 0, rows * outputs * outputs * sizeof *seed);
    for (size_t i = 0; i < rows * outputs; i++)
        seed[i * outputs + i % outputs] = 1;
    tape->unit_seeds = 1;
}

PK__PRIVATE void pk__pass_call(const pk__tape *tape, const pk_node *node, size_t rows, size_t copies,
                               pk_call *call)
{
    memset(call, 0, sizeof *call);
    call->node = node;
    call->rows = rows;
    call->copies = copies;
    call->threads = tape->threads;
    call->context = tape->context;
    call->scratch = tape->scratch;
    call->out = tape->value[node - tape->graph->nodes];
    for (int j = 0; j < node->input_count; j++) {
        call->in[j] = tape->value[node->inputs[j]];
        call->in_width[j] = tape->graph->nodes[node->inputs[j]].width;
    }
}

/* out[row] (+)= t[row] add[row]; each row has count numbers. */
static void pk__scale_rows(size_t rows, size_t count, const pk_real *t, const pk_real *add, int accumulate,
                           pk_real *out)
{
    for (size_t row = 0; row < rows; row++) {
        const pk_real *from = add + row * count;
        pk_real *to = out + row * count;
        if (accumulate)
            for (size_t j = 0; j < count; j++)
                to[j] += t[row] * from[j];
        else
            for (size_t j = 0; j < count; j++)
                to[j] = t[row] * from[j];
    }
}

#define PK__DEFINE_LINE(suffix, attributes, vectors)                                                   \
    attributes static void pk__at_##suffix(size_t count, const pk_real *weights, pk_real t,            \
                                           const pk_real *direction, pk_real *to)                      \
    {                                                                                                  \
        typedef vectors vector;                                                                        \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                      \
        const vector zero = {0};                                                                       \
        size_t i = 0;                                                                                  \
        for (; i + lanes <= count; i += lanes) {                                                       \
            vector sum = zero;                                                                         \
            if (weights)                                                                               \
                sum = *(const vector *)(weights + i);                                                  \
            *(vector *)(to + i) = PK__ADD_##suffix(sum, (t - zero), *(const vector *)(direction + i)); \
        }                                                                                              \
        for (; i < count; i++)                                                                         \
            to[i] = (weights ? weights[i] : 0) + t * direction[i];                                     \
    }
PK__FOR_PROCESSORS(PK__DEFINE_LINE)

/* to = weights + t direction of count numbers; weights NULL: 0. */
static void pk__line_point(size_t count, const pk_real *weights, pk_real t, const pk_real *direction,
                           pk_real *to)
{
    PK__ON_PROCESSOR(pk__at, (count, weights, t, direction, to));
}

/* to = the numbers offset ... of w + t d at row row of the line. */
static void pk__line_weights(const pk__line *line, size_t row, size_t offset, size_t count, pk_real *to)
{
    const pk_real *weights = line->weights + offset;
    if (!line->direction) {
        memcpy(to, weights, count * sizeof *to);
        return;
    }
    pk__line_point(count, weights, line->t[row], line->direction + offset, to);
}

/* A node's weights at row row of the line; until the next call. */
PK__PRIVATE const pk_real *pk__row_weights(const pk__tape *tape, const pk__line *line, const pk_node *node,
                                           size_t row)
{
    if (!line->direction)
        return line->weights + node->weight_offset;
    pk__line_weights(line, row, node->weight_offset, node->weight_count, tape->row_weights);
    return tape->row_weights;
}

/* gradient[row][copy][weight] = (dF/dw)^T out_cotangent of a node with weights. */
PK__PRIVATE void pk__node_row_gradients(const pk_call *call)
{
    const pk_node *node = call->node;
    if (node->tangent_form != PK_TANGENT_OUTER) {
        node->operation->row_gradients(call);
        return;
    }
    const size_t positions = node->positions, in = node->fan_in, out = node->fan_out;
    const int first = node->operation->channels_first;
    for (size_t row = 0; row < call->rows; row++) {
        pk_call one = *call;
        one.rows = 1;
        one.in[0] = call->in[0] + row * call->in_width[0];
        one.out = call->scratch;
        if (node->unfolds)
            node->operation->unfold(&one);
        const pk_real *places = node->unfolds ? one.out : one.in[0];
        for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
            const pk_real *delta = call->out_cotangent + copy * node->width;
            pk_real *gradient = call->gradient + copy * node->weight_count, *bias = gradient + out * in;
            if (positions == 1) /* one outer product: a matrix product would cost three times as much */
                for (size_t j = 0; j < out; j++)
                    for (size_t k = 0; k < in; k++)
                        gradient[j * in + k] = delta[j] * places[k];
            else if (positions <= (size_t)PK__FEW_POSITIONS)
                pk__small_product(out, in, positions, 1, delta, first ? positions : 1, first ? 1 : out, places,
                                  in, 0, gradient, in);
            else
                pk__gemm(!first, 0, out, in, positions, 1, delta, first ? positions : out, places, in, 0,
                         gradient, in);
            for (size_t j = 0; node->weight_count > out * in && j < out; j++) {
                bias[j] = 0;
                for (size_t q = 0; q < positions; q++)
                    bias[j] += first ? delta[j * positions + q] : delta[q * out + j];
            }
        }
    }
}

/* out = or, with beta == 1, += w x of a layer at so many places. transposed: w's, or NULL; only plain layers are in it. */
PK__PRIVATE void pk__layer_product(const pk_node *node, size_t places, const pk_real *x, const pk_real *w,
                                   const pk_real *transposed, pk_real beta, pk_real *out)
{
    const size_t fan_in = node->fan_in, fan_out = node->fan_out;
    if (transposed && pk__is_plain_layer(node)) /* of few rows, twice as fast as below */
        pk__gemm(0, 0, places, fan_out, fan_in, 1, x, fan_in, transposed + node->weight_offset, fan_out, beta,
                 out, fan_out);
    else
        pk__gemm(0, 1, places, fan_out, fan_in, 1, x, fan_in, w + node->weight_offset, fan_in, beta, out,
                 fan_out);
}

/* out = the values (or tangents) of a plain layer y = (w + t d) x + b + t c with the weights w, b along the direction d, c:
 *     y = w x + d (t x) + b + t c,    y. = w x. + d (x + t x.) + c,
 * so that one sum takes both products. */
static void pk__line_layer(const pk__tape *tape, const pk__line *line, const pk_call *call, int tangent)
{
    const pk_node *node = call->node;
    const size_t in = node->fan_in, out = node->fan_out, positions = node->positions,
                 places = call->rows * positions;
    const int bias = pk__has_bias(node);
    const pk_real *b = line->weights + node->weight_offset + out * in,
                  *c = line->direction + node->weight_offset + out * in, *transposed = tape->transposed;
    const pk_real *first = tangent ? call->in_tangent[0] : call->in[0];
    pk_real *second = tape->line_scratch, *to = tangent ? call->out_tangent : call->out;
    for (size_t i = 0; i < places; i++) {
        const pk_real t = line->t[i / positions], *x = call->in[0] + i * in, *own = first + i * in;
        pk__line_point(in, tangent ? x : NULL, t, own, second + i * in);
        if (bias && tangent)
            memcpy(to + i * out, c, out * sizeof *to);
        else if (bias)
            pk__line_point(out, b, t, c, to + i * out);
    }
    pk__layer_product(node, places, first, line->weights, transposed, (pk_real)bias, to);
    pk__layer_product(node, places, second, line->direction,
                      transposed ? transposed + tape->graph->untied : NULL, 1, to);
}

/* From unit seeds the cotangents of the inputs of a last layer y = (w + t d) a + b are its weights: no product. */
static void pk__reverse_unit_seeds(const pk__line *line, const pk_call *call)
{
    const size_t numbers = call->node->fan_out * call->node->fan_in;
    for (size_t row = 0; row < call->rows; row++)
        pk__line_weights(line, row, call->node->weight_offset, numbers, call->in_cotangent[0] + row * numbers);
}

/* Row by row, each with its own weights. */
static void pk__by_row(pk__tape *tape, const pk__line *line, const pk_call *whole,
                       void (*rule)(const pk_call *))
{
    const pk_node *node = whole->node;
    for (size_t row = 0; row < whole->rows; row++) {
        pk_call call = *whole;
        call.rows = 1;
        call.weights = pk__row_weights(tape, line, node, row);
        call.out += row * node->width;
        if (call.out_tangent)
            call.out_tangent += row * node->width;
        if (call.out_cotangent)
            call.out_cotangent += row * call.copies * node->width;
        for (int j = 0; j < node->input_count; j++) {
            call.in[j] += row * call.in_width[j];
            if (call.in_tangent[j])
                call.in_tangent[j] += row * call.in_width[j];
            if (call.in_cotangent[j])
                call.in_cotangent[j] += row * call.copies * call.in_width[j];
        }
        rule(&call);
    }
}

PK__PRIVATE void pk__node_forward(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows)
{
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = line->weights + node->weight_offset;
    int along = line->direction && node->weight_count;
    if (along && pk__is_plain_layer(node) && !node->input_constant) {
        pk__line_layer(tape, line, &call, 0);
        return;
    }
    if (along && pk__has_row_weights(node)) {
        pk__by_row(tape, line, &call, node->operation->forward);
        return;
    }
    node->operation->forward(&call);
    if (along) {
        pk_real *out = call.out;
        call.weights = line->direction + node->weight_offset;
        call.out = tape->line_scratch;
        node->operation->forward(&call);
        pk__scale_rows(rows, node->width, line->t, tape->line_scratch, 1, out);
    }
}

PK__INTERNAL void pk__pass_forward(pk__tape *tape, const pk__line *line, size_t rows, const pk_real *inputs)
{
    const pk_graph *graph = tape->graph;
    tape->value[0] = (pk_real *)inputs; /* only read */
    for (size_t n = 1; n < graph->node_count; n++)
        pk__node_forward(tape, line, &graph->nodes[n], rows);
}

/* ---- mean slopes ------------------------------------------------------------------------------------------ */

/* Along a stretch of a step an operation that is piecewise linear has one linear rule after the other. With the values at both
 * ends, its mean slope over the stretch is that of the secant: of a number whose input goes from z_a to z_b and whose output
 * goes from y_a to y_b,
 *
 *     slope_a + ((y_b - y_a) - slope_a (z_b - z_a)) / (z_b - z_a),
 *
 * exact where z is linear in t, whatever number of kinks is between. The second term is rounding where there is no kink, and then
 * it is left out. An operation whose outputs depend on several inputs, such as a maximum, has rule a at the start and rule b at
 * the end; rule b counts for the part of the stretch with which the secant is met. */

PK__INTERNAL int pk__has_mean_slopes(const pk_node *node)
{
    return node->operation && node->operation->smoothness == PK_PIECEWISE_LINEAR &&
           node->operation->switch_count && !node->weight_count && !node->input_constant;
}

PK__INTERNAL size_t pk__mean_numbers(const pk_graph *graph, size_t copies)
{
    int some = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        some |= pk__has_mean_slopes(&graph->nodes[n]);
    return some ? (PK_NODE_INPUTS + 3 + pk__max(copies, 1)) * graph->widest : 0;
}

/* Multiples of the rounding of what is subtracted; a smaller difference to the rule at the start is no kink. */
enum { PK__NO_KINK = 8 };

/* What the output does beyond the rule at the start; 0 where that is rounding. */
static double pk__beyond_rule(double y_a, double y_b, double rule, double size)
{
    const double beyond = (y_b - y_a) - rule;
    return fabs(beyond) > PK__NO_KINK * PK__EPSILON * (fabs(y_a) + fabs(y_b) + size) ? beyond : 0;
}

/* The node at one row of the tape, for operation rules. */
static pk_call pk__call_at(const pk__tape *tape, const pk_node *node, size_t row, size_t copies)
{
    pk_call call;
    pk__pass_call(tape, node, 1, copies, &call);
    call.out += row * node->width;
    for (int j = 0; j < node->input_count; j++)
        call.in[j] += row * call.in_width[j];
    return call;
}

/* The mean slopes of an elementwise operation over the stretch of row p. */
static const pk_real *pk__mean_slopes(const pk__tape *tape, const pk_node *node, size_t p)
{
    const size_t width = node->width;
    pk_real *slope = tape->mean, *rule = slope + width,
            *ones = rule + width; /* rule: the slopes at the start */
    pk_call a = pk__call_at(tape, node, tape->from[p], 1);
    const pk_call b = pk__call_at(tape, node, tape->to[p], 1);
    for (size_t j = 0; j < width; j++)
        ones[j] = 1;
    a.in_tangent[0] = ones;
    a.out_tangent = slope;
    node->operation->tangent(&a);
    memcpy(rule, slope, width * sizeof *rule);
    for (size_t j = 0; j < width; j++) {
        const double z_a = a.in[0][j], z_b = b.in[0][j], apart = z_b - z_a;
        const double beyond = pk__beyond_rule(a.out[j], b.out[j], slope[j] * apart,
                                              fabs((double)slope[j]) * (fabs(z_a) + fabs(z_b)));
        if (beyond != 0 && apart != 0)
            slope[j] = (pk_real)(slope[j] + beyond / apart);
    }
    return slope;
}

/* Of an operation whose outputs depend on several inputs: the part of the stretch of row p for which the rule at its end counts,
 * for each output; NULL: none of it for all of them. */
static const pk_real *pk__mean_parts(const pk__tape *tape, const pk_node *node, size_t p)
{
    const size_t width = node->width, widest = tape->graph->widest;
    pk_real *part = tape->mean, *rule_b = part + widest, *apart = rule_b + widest;
    pk_call a = pk__call_at(tape, node, tape->from[p], 1), b = pk__call_at(tape, node, tape->to[p], 1);
    int some = 0;
    for (int j = 0; j < node->input_count; j++, apart += widest) {
        for (size_t i = 0; i < a.in_width[j]; i++)
            apart[i] = b.in[j][i] - a.in[j][i];
        a.in_tangent[j] = b.in_tangent[j] = apart;
    }
    a.out_tangent = part;
    b.out_tangent = rule_b;
    node->operation->tangent(&a);
    node->operation->tangent(&b);
    for (size_t i = 0; i < width; i++) {
        const double beyond = pk__beyond_rule(a.out[i], b.out[i], part[i], fabs((double)part[i])),
                     between = (double)rule_b[i] - (double)part[i];
        const double met = beyond == 0 ? 0 : between != 0 ? beyond / between : 0.5;
        part[i] = (pk_real)(met < 0 ? 0 : met > 1 ? 1 : met);
        some |= met != 0;
    }
    return some ? part : NULL;
}

/* to = part o from, or (1 - part) o from, of `copies` times `width` numbers. */
static void pk__take_parts(size_t copies, size_t width, const pk_real *part, int rest, const pk_real *from,
                           pk_real *to)
{
    for (size_t k = 0; k < copies; k++, from += width, to += width)
        for (size_t i = 0; i < width; i++)
            to[i] = (rest ? 1 - part[i] : part[i]) * from[i];
}

PK__INTERNAL void pk__mean_reverse(const pk__tape *tape, const pk_call *call)
{
    const pk_node *node = call->node;
    const size_t width = node->width, copies = call->copies;
    for (size_t p = 0; p < call->rows; p++) {
        const pk_real *from = call->out_cotangent + p * copies * width;
        if (node->operation->elementwise) {
            if (call->in_cotangent[0])
                pk__times(copies, width, from, pk__mean_slopes(tape, node, p), call->accumulate[0],
                          call->in_cotangent[0] + p * copies * width);
            continue;
        }
        const pk_real *part = pk__mean_parts(tape, node, p);
        pk_real *scaled = tape->mean + (PK_NODE_INPUTS + 3) * tape->graph->widest;
        for (int end = 0; end < (part ? 2 : 1); end++) {
            pk_call one = pk__call_at(tape, node, end ? tape->to[p] : tape->from[p], copies);
            one.out_cotangent = from;
            for (int j = 0; j < node->input_count; j++) {
                one.accumulate[j] = end || call->accumulate[j];
                one.in_cotangent[j] =
                    call->in_cotangent[j] ? call->in_cotangent[j] + p * copies * call->in_width[j] : NULL;
            }
            if (part) {
                pk__take_parts(copies, width, part, !end, from, scaled);
                one.out_cotangent = scaled;
            }
            node->operation->reverse(&one);
        }
    }
}

/* Raises tape->gap of row p: kinked tells of each number of the node whether (not 0) it has kinks in the stretch, by how it differs
 * from rule (NULL: 0). */
static void pk__raise_gap(const pk__tape *tape, const pk_node *node, size_t p, const pk_real *kinked,
                          const pk_real *rule)
{
    const size_t width = node->width;
    const pk_real *value = tape->value[node - tape->graph->nodes], *y = value + p * width,
                  *y_a = value + tape->from[p] * width, *y_b = value + tape->to[p] * width;
    double gap = 0, size = 0;
    for (size_t i = 0; i < width; i++) {
        const double apart = kinked[i] != (rule ? rule[i] : 0) ? 0.5 * ((double)y_a[i] + y_b[i]) - y[i] : 0;
        gap += apart * apart;
        size += (double)y[i] * y[i];
    }
    if (gap > 0) {
        const double ratio = sqrt(gap / size);
        tape->gap[p] = ratio > tape->gap[p] ? (pk_real)ratio : tape->gap[p];
    }
}

/* call->out_tangent = the mean slopes times call->in_tangent. */
static void pk__mean_tangent(const pk__tape *tape, const pk_call *call)
{
    const pk_node *node = call->node;
    const size_t width = node->width;
    for (size_t p = 0; p < call->rows; p++) {
        pk_real *to = call->out_tangent + p * width;
        if (node->operation->elementwise) {
            const pk_real *slope = pk__mean_slopes(tape, node, p);
            if (tape->gap)
                pk__raise_gap(tape, node, p, slope, slope + width);
            for (size_t j = 0; j < width; j++)
                to[j] = call->in_tangent[0] ? slope[j] * call->in_tangent[0][p * width + j] : 0;
            continue;
        }
        const pk_real *part = pk__mean_parts(tape, node, p);
        pk_real *at_end = tape->mean + tape->graph->widest;
        if (part && tape->gap)
            pk__raise_gap(tape, node, p, part, NULL);
        for (int end = 0; end < (part ? 2 : 1); end++) {
            pk_call one = pk__call_at(tape, node, end ? tape->to[p] : tape->from[p], 1);
            for (int j = 0; j < node->input_count; j++)
                one.in_tangent[j] = call->in_tangent[j] ? call->in_tangent[j] + p * call->in_width[j] : NULL;
            one.out_tangent = end ? at_end : to;
            node->operation->tangent(&one);
        }
        for (size_t j = 0; part && j < width; j++)
            to[j] += part[j] * (at_end[j] - to[j]);
    }
}

PK__PRIVATE void pk__node_reverse(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows,
                                  size_t copies)
{
    const pk_graph *graph = tape->graph;
    if (node->input_constant)
        return;
    pk_call call;
    pk__pass_call(tape, node, rows, copies, &call);
    call.weights = line->weights + node->weight_offset;
    call.out_cotangent = tape->cotangent[node - graph->nodes];
    for (int j = 0; j < node->input_count; j++) {
        if (!graph->nodes[node->inputs[j]].varies)
            continue;
        call.in_cotangent[j] = tape->cotangent[node->inputs[j]];
        /* The first consumer met, which is the last in the graph, writes; the others add. */
        call.accumulate[j] = node->shared[j];
    }
    if (tape->from && pk__has_mean_slopes(node)) {
        pk__mean_reverse(tape, &call);
        return;
    }
    int along = line->direction && node->weight_count;
    if (tape->unit_seeds && node == &graph->nodes[graph->node_count - 1] && copies == node->fan_out &&
        pk__is_outer(node) && !call.accumulate[0]) {
        pk__reverse_unit_seeds(line, &call);
        return;
    }
    if (along && pk__reverses_by_row(node, copies)) {
        pk__by_row(tape, line, &call, node->operation->reverse);
        return;
    }
    node->operation->reverse(&call);
    if (along) {
        pk__scale_rows(rows, copies * node->width, line->t, call.out_cotangent, 0, tape->line_scratch);
        call.weights = line->direction + node->weight_offset;
        call.out_cotangent = tape->line_scratch;
        for (int j = 0; j < node->input_count; j++)
            call.accumulate[j] = 1;
        node->operation->reverse(&call);
    }
}

PK__INTERNAL void pk__pass_reverse(pk__tape *tape, const pk__line *line, size_t rows, size_t copies)
{
    tape->line = *line;
    for (size_t n = tape->graph->node_count - 1; n > 0; n--) {
        const pk_node *node = &tape->graph->nodes[n];
        if (node->unread && node->varies)
            memset(tape->cotangent[n], 0, rows * copies * node->width * sizeof(pk_real));
        pk__node_reverse(tape, line, node, rows, copies);
    }
}

PK__PRIVATE void pk__node_tangent(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows)
{
    const pk_graph *graph = tape->graph;
    if (!node->varies)
        return;
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = line->weights + node->weight_offset;
    call.direction = line->direction && node->weight_count ? line->direction + node->weight_offset : NULL;
    call.out_tangent = tape->tangent[node - graph->nodes];
    for (int j = 0; j < node->input_count; j++)
        call.in_tangent[j] = graph->nodes[node->inputs[j]].varies ? tape->tangent[node->inputs[j]] : NULL;
    if (tape->from && pk__has_mean_slopes(node)) {
        pk__mean_tangent(tape, &call);
        return;
    }
    if (call.direction && line->t && pk__is_plain_layer(node) && !node->input_constant) {
        pk__line_layer(tape, line, &call, 1);
        return;
    }
    if (call.direction && line->t && pk__has_row_weights(node)) {
        pk__by_row(tape, line, &call, node->operation->tangent);
        return;
    }
    node->operation->tangent(&call);
    /* dF/din at w + t d is linear in the weights, too: add its t d part. */
    if (call.direction && line->t && !node->input_constant) {
        pk_real *out = call.out_tangent;
        call.weights = call.direction;
        call.direction = NULL;
        call.out_tangent = tape->line_scratch;
        node->operation->tangent(&call);
        pk__scale_rows(rows, node->width, line->t, tape->line_scratch, 1, out);
    }
}

PK__INTERNAL void pk__pass_tangent(pk__tape *tape, const pk__line *line, size_t rows)
{
    for (size_t n = 1; n < tape->graph->node_count; n++)
        pk__node_tangent(tape, line, &tape->graph->nodes[n], rows);
}

PK__INTERNAL void pk__pass_weight_gradient(pk__tape *tape, size_t rows, pk_real *gradient)
{
    const pk_graph *graph = tape->graph;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        pk_call call;
        pk__pass_call(tape, node, rows, 1, &call);
        call.weights = tape->line.weights + node->weight_offset;
        call.out_cotangent = tape->cotangent[n];
        call.gradient = gradient + node->weight_offset;
        if (tape->line.direction && !node->operation->linear_in_weights)
            pk__by_row(tape, &tape->line, &call, node->operation->weight_gradient);
        else
            node->operation->weight_gradient(&call);
    }
}

#define PK__EVALUATE_ROWS ((size_t)64)

/* What one thread evaluates a network with. */
typedef struct pk__evaluator {
    pk__tape tape;
    pk_real *rows; /* PK__EVALUATE_ROWS x D: a block of the inputs */
} pk__evaluator;

/* *untied: the weights in the layout of the untied weights, NULL without ties. */
static void pk__evaluators_take(pk__arena *arena, const pk_graph *graph, size_t threads,
                                pk__evaluator **evaluators, pk_real **untied)
{
    *evaluators = pk__arena_take(arena, threads, sizeof **evaluators);
    *untied = pk__arena_take(arena, graph->tied ? graph->untied : 0, sizeof **untied);
    for (size_t thread = 0; thread < threads; thread++) {
        pk__evaluator measured, *own = *evaluators ? *evaluators + thread : &measured;
        pk__pass_take(arena, graph, PK__EVALUATE_ROWS, 0, 0, &own->tape);
        own->rows = pk__arena_take(arena, PK__EVALUATE_ROWS, graph->input_width * sizeof(pk_real));
    }
}

PK_API pk_status pk_graph_evaluate(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                   pk_matrix inputs, pk_matrix outputs)
{
    if (!graph->node_count || inputs.cols != graph->input_width || outputs.cols != graph->output_width ||
        inputs.rows != outputs.rows || inputs.ld < inputs.cols || outputs.ld < outputs.cols)
        return pk__fail(
            context, PK_SHAPE,
            "a network from %zu to %zu cannot take inputs of %zu x %zu (ld %zu) to outputs of %zu x %zu "
            "(ld %zu)",
            graph->input_width, graph->output_width, inputs.rows, inputs.cols, inputs.ld, outputs.rows,
            outputs.cols, outputs.ld);
    if (inputs.rows == 0)
        return PK_OK;
    if (!weights || !inputs.data || !outputs.data)
        return pk__fail(context, PK_ARGUMENT, "weights, inputs or outputs are NULL");
    for (size_t row = 0; graph->checked && row < inputs.rows; row++) {
        pk_status status = pk_graph_check_inputs(context, graph, row, inputs.data + row * inputs.ld);
        if (status)
            return status;
    }
    size_t blocks = pk__blocks(inputs.rows, PK__EVALUATE_ROWS);
    size_t threads = pk__min((size_t)pk_threads(context), blocks);
    pk__arena arena = {NULL, 0, 0, 0};
    pk__evaluator *evaluators;
    pk_real *untied;
    pk_status status;
    do
        pk__evaluators_take(&arena, graph, threads, &evaluators, &untied);
    while (pk__arena_again(context, &arena, "evaluating the network", &status));
    if (status)
        return status;
    if (untied) {
        pk_graph_untie(graph, weights, untied);
        weights = untied;
    }
    const pk__line line = {weights, NULL, NULL};
    pk__team team = pk__team_of(context, (int)threads, blocks);
    PK__PARALLEL(team)
    for (size_t block = pk__first_task(&team); block < blocks; block = pk__next_task(&team)) {
        pk__evaluator *own = &evaluators[pk__thread()];
        size_t first = block * PK__EVALUATE_ROWS;
        size_t count = pk__min(inputs.rows - first, PK__EVALUATE_ROWS);
        for (size_t row = 0; row < count; row++)
            memcpy(own->rows + row * inputs.cols, inputs.data + (first + row) * inputs.ld,
                   inputs.cols * sizeof(pk_real));
        pk__pass_forward(&own->tape, &line, count, own->rows);
        for (size_t row = 0; row < count; row++)
            memcpy(outputs.data + (first + row) * outputs.ld, pk__pass_output(&own->tape) + row * outputs.cols,
                   outputs.cols * sizeof(pk_real));
    }
    pk__team_end(&team);
    pk_release(context, arena.base);
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
