/* graph_oracle.h: brute force for every network of the network language, for tests only. What brute_force.h is for
 * dense networks, this is for all others; the optimisers and losses are its, the method is the same: definitions, one
 * momentum vector for every example carried forward in time, whole Jacobians, extended precision.
 *
 * 1. A network is its formulas. A forward pass computes number by number and writes down, for each number, the
 *    numbers that it came from with the partial derivatives (a Wengert list); derivatives are the sums over that list
 *    backwards. The library gives the list of operations (pk_graph) and nothing else: no value, no derivative.
 * 2. Where something is chosen (the side of a relu, the largest of a window) the pass writes down the choice and how
 *    far it is from another one. Between two points of a step with different choices there is a kink; it is halved
 *    down to the last bit of t. Where a choice comes closest without changing, a golden-section search looks for
 *    two changes between the samples.
 * 3. Between kinks: Gauss-Legendre with 8 nodes, halved until the Jacobian of the halves is that of the whole. What the
 *    last halving still changed, and rounding, is summed up for every entry: the accuracy that the result states.
 *    A step whose integral does not explain the change of the outputs (to 1e-13) is sampled anew, more finely.
 *
 *     go_result truth;
 *     go_decompose(&run, rows, inputs, &truth);       a pk_run of the library under test
 *     ... fabs(got - truth.by_example[i]) <= bound + truth.accuracy[i] ...
 *     go_result_free(&truth);
 *
 * Surrogate activations (sign, step) have no path integral and are refused by abort, like everything unknown. */
#ifndef GRAPH_ORACLE_H
#define GRAPH_ORACLE_H
#include "fixture.h"

#define GO_FUNCTION static inline

enum {
    GO_NODES = 8,
    GO_SAMPLES = 48 /* of the choices, at first */,
    GO_DEPTH = 40,
    GO_ATTEMPTS = 3,
    GO_MOST = 15000 /* evaluations a row and step, at first */
};

/* ---- numbers that know where they came from ---- */

/* at: where it stands in the list; 0: it does not depend on the weights */
typedef struct go_number {
    bf_real value;
    size_t at;
} go_number;
typedef struct go_edge {
    size_t from;
    bf_real slope;
} go_edge;

/* One input's way through a network. numbers[1 .. P] are the weights; number n came from the edges
 * first_edge[n] .. first_edge[n + 1] - 1. */
typedef struct go_tape {
    const pk_graph *graph;
    size_t numbers, edges, number_capacity, edge_capacity;
    size_t *first_edge;
    go_edge *edge;
    bf_real *adjoint;
    go_number **value; /* of each node of the graph */
    bf_real *weights;  /* P */
    size_t choices, choice_capacity;
    int *choice;
    bf_real *margin; /* how far each choice is from another one, >= 0 */
} go_tape;

GO_FUNCTION void go_tape_make(const pk_graph *graph, go_tape *tape)
{
    memset(tape, 0, sizeof *tape);
    tape->graph = graph;
    tape->value = BF_NEW(go_number *, graph->node_count);
    for (size_t n = 0; n < graph->node_count; n++)
        tape->value[n] = BF_NEW(go_number, graph->nodes[n].width);
    tape->weights = BF_NEW(bf_real, graph->parameters);
}

GO_FUNCTION void go_tape_free(go_tape *tape)
{
    for (size_t n = 0; n < tape->graph->node_count; n++)
        free(tape->value[n]);
    free(tape->value), free(tape->weights), free(tape->first_edge), free(tape->edge), free(tape->adjoint);
    free(tape->choice), free(tape->margin);
}

/* room for one more item, whatever there is */
GO_FUNCTION void *go_grow(void *items, size_t count, size_t *capacity, size_t size)
{
    if (count < *capacity)
        return items;
    *capacity = 2 * count + 256;
    void *more = realloc(items, *capacity * size);
    if (!more)
        abort();
    return more;
}

GO_FUNCTION void go_from(go_tape *tape, go_number x, bf_real slope)
{
    if (!x.at || slope == 0)
        return;
    tape->edge = (go_edge *)go_grow(tape->edge, tape->edges, &tape->edge_capacity, sizeof *tape->edge);
    tape->edge[tape->edges].from = x.at;
    tape->edge[tape->edges++].slope = slope;
}

/* The number of this value that came from the edges since the last one. */
GO_FUNCTION go_number go_number_of(go_tape *tape, bf_real value)
{
    go_number number = {value, 0};
    if (tape->edges == tape->first_edge[tape->numbers])
        return number;
    tape->first_edge = (size_t *)go_grow(tape->first_edge, tape->numbers + 1, &tape->number_capacity,
                                         sizeof *tape->first_edge);
    number.at = tape->numbers++;
    tape->first_edge[tape->numbers] = tape->edges;
    return number;
}

GO_FUNCTION go_number go_constant(bf_real value)
{
    const go_number number = {value, 0};
    return number;
}

/* sum_k a[k step_a] b[k step_b], plus c (may be NULL) */
GO_FUNCTION go_number go_product(go_tape *tape, size_t count, const go_number *a, size_t step_a,
                                 const go_number *b, size_t step_b, const go_number *c)
{
    bf_real sum = c ? c->value : 0;
    if (c)
        go_from(tape, *c, 1);
    for (size_t k = 0; k < count; k++, a += step_a, b += step_b) {
        sum += a->value * b->value;
        go_from(tape, *a, b->value);
        go_from(tape, *b, a->value);
    }
    return go_number_of(tape, sum);
}

/* a x + b y + c for fixed a, b, c */
GO_FUNCTION go_number go_mix(go_tape *tape, bf_real a, go_number x, bf_real b, go_number y, bf_real c)
{
    go_from(tape, x, a);
    go_from(tape, y, b);
    return go_number_of(tape, a * x.value + b * y.value + c);
}

GO_FUNCTION go_number go_times(go_tape *tape, go_number a, go_number b)
{
    return go_product(tape, 1, &a, 1, &b, 1, NULL);
}

/* f(x) where its value and slope are known */
GO_FUNCTION go_number go_apply(go_tape *tape, go_number x, bf_real value, bf_real slope)
{
    go_from(tape, x, slope);
    return go_number_of(tape, value);
}

/* sum_k x[k] / divisor */
GO_FUNCTION go_number go_sum(go_tape *tape, size_t count, const go_number *x, bf_real divisor)
{
    bf_real sum = 0;
    for (size_t k = 0; k < count; k++) {
        sum += x[k].value;
        go_from(tape, x[k], 1 / divisor);
    }
    return go_number_of(tape, sum / divisor);
}

GO_FUNCTION void go_choose(go_tape *tape, int choice, bf_real margin)
{
    size_t capacity = tape->choice_capacity;
    tape->choice = (int *)go_grow(tape->choice, tape->choices, &capacity, sizeof *tape->choice);
    tape->margin =
        (bf_real *)go_grow(tape->margin, tape->choices, &tape->choice_capacity, sizeof *tape->margin);
    tape->choice[tape->choices] = choice;
    tape->margin[tape->choices++] = margin;
}

/* ---- the operations, in the words of docs/network-language.md ---- */

/* weight number k of a node */
GO_FUNCTION go_number go_weight(const go_tape *tape, const pk_node *node, size_t k)
{
    const go_number number = {tape->weights[node->weight_offset + k], 1 + node->weight_offset + k};
    return number;
}

GO_FUNCTION void go_dense(go_tape *tape, const pk_node *node, const go_number *x, size_t in, go_number *y)
{
    const size_t out = node->shape.dims[node->shape.rank - 1];
    go_number *row = BF_NEW(go_number, in), bias;
    for (size_t at = 0; at < node->width; at += out, x += in)
        for (size_t j = 0; j < out; j++) {
            for (size_t k = 0; k < in; k++)
                row[k] = go_weight(tape, node, j * in + k);
            bias = node->weight_count > out * in ? go_weight(tape, node, out * in + j) : go_constant(0);
            *y++ = go_product(tape, in, row, 1, x, 1, &bias);
        }
    free(row);
}

/* A window's numbers: of a plane of height x width, those of output (row, column), in order; NULL: padding. */
GO_FUNCTION size_t go_window(const go_number *plane, const size_t *size, const double *kernel,
                             const double *stride, const double *pad, const double *dilation, size_t row,
                             size_t column, const go_number **taps)
{
    size_t count = 0;
    for (long i = 0; i < (long)kernel[0]; i++)
        for (long j = 0; j < (long)kernel[1]; j++) {
            const long y = (long)row * (long)stride[0] + i * (long)dilation[0] - (long)pad[0];
            const long x = (long)column * (long)stride[1] + j * (long)dilation[1] - (long)pad[1];
            const int inside = y >= 0 && y < (long)size[0] && x >= 0 && x < (long)size[1];
            taps[count++] = inside ? plane + y * (long)size[1] + x : NULL;
        }
    return count;
}

/* channels, height, width of an image, or of a signal, whose height is 1 */
GO_FUNCTION void go_image(const pk_shape *shape, size_t *dims)
{
    dims[0] = shape->dims[0];
    dims[1] = shape->rank == 3 ? shape->dims[1] : 1;
    dims[2] = shape->dims[shape->rank - 1];
}

GO_FUNCTION void go_conv(go_tape *tape, const pk_node *node, const pk_shape *from, const go_number *x,
                         go_number *y)
{
    const double *a = node->attributes, *kernel = a + PK_CONVOLUTION_KERNEL;
    size_t size[3], to[3];
    go_image(from, size);
    go_image(&node->shape, to);
    const size_t groups = (size_t)a[PK_CONVOLUTION_GROUPS], in = size[0] / groups, out = to[0] / groups,
                 taps = (size_t)kernel[0] * (size_t)kernel[1], plane = size[1] * size[2],
                 biases = to[0] * in * taps;
    const go_number **window = BF_NEW(const go_number *, taps);
    for (size_t c = 0; c < groups * out; c++)
        for (size_t row = 0; row < to[1]; row++)
            for (size_t column = 0; column < to[2]; column++) {
                go_number sum =
                    node->weight_count > biases ? go_weight(tape, node, biases + c) : go_constant(0);
                for (size_t k = 0; k < in; k++) {
                    go_window(x + (c / out * in + k) * plane, size + 1, kernel, a + PK_CONVOLUTION_STRIDE,
                              a + PK_CONVOLUTION_PAD, a + PK_CONVOLUTION_DILATION, row, column, window);
                    for (size_t t = 0; t < taps; t++) {
                        const go_number w = go_weight(tape, node, (c * in + k) * taps + t);
                        if (window[t])
                            sum = go_product(tape, 1, &w, 1, window[t], 1, &sum);
                    }
                }
                *y++ = sum;
            }
    free(window);
}

/* each number of x is spread over a window of y */
GO_FUNCTION void go_conv_transpose(go_tape *tape, const pk_node *node, const pk_shape *from, const go_number *x,
                                   go_number *y)
{
    const double *a = node->attributes;
    size_t size[3], to[3];
    go_image(from, size);
    go_image(&node->shape, to);
    const long step[2] = {(long)a[PK_CONVOLUTION_STRIDE], (long)a[PK_CONVOLUTION_STRIDE + 1]},
               pad[2] = {(long)a[PK_CONVOLUTION_PAD], (long)a[PK_CONVOLUTION_PAD + 1]},
               dilation[2] = {(long)a[PK_CONVOLUTION_DILATION], (long)a[PK_CONVOLUTION_DILATION + 1]};
    const size_t groups = (size_t)a[PK_CONVOLUTION_GROUPS], in = size[0] / groups, out = to[0] / groups,
                 high = (size_t)a[PK_CONVOLUTION_KERNEL], wide = (size_t)a[PK_CONVOLUTION_KERNEL + 1],
                 biases = size[0] * out * high * wide;
    for (size_t i = 0; i < node->width; i++)
        y[i] =
            node->weight_count > biases ? go_weight(tape, node, biases + i / (to[1] * to[2])) : go_constant(0);
    for (size_t c = 0; c < size[0]; c++)
        for (size_t o = 0; o < out; o++)
            for (size_t t = 0; t < high * wide; t++)
                for (size_t q = 0; q < size[1] * size[2]; q++) {
                    const long row = (long)(q / size[2]) * step[0] + (long)(t / wide) * dilation[0] - pad[0],
                               column = (long)(q % size[2]) * step[1] + (long)(t % wide) * dilation[1] - pad[1];
                    if (row < 0 || row >= (long)to[1] || column < 0 || column >= (long)to[2])
                        continue;
                    go_number *sum = &y[((c / in * out + o) * to[1] + (size_t)row) * to[2] + (size_t)column];
                    const go_number w = go_weight(tape, node, (c * out + o) * high * wide + t);
                    *sum = go_product(tape, 1, &w, 1, &x[c * size[1] * size[2] + q], 1, sum);
                }
}

/* each number of y is the sum of all of its plane, each times how near it is: 1 - distance, and 0 from 1 on */
GO_FUNCTION void go_upsample(go_tape *tape, const pk_node *node, const pk_shape *from, const go_number *x,
                             go_number *y)
{
    const double *a = node->attributes;
    size_t size[3], to[3];
    go_image(from, size);
    go_image(&node->shape, to);
    for (size_t i = 0; i < node->width; i++) {
        const size_t at[2] = {i / to[2] % to[1], i % to[2]}, plane = i / (to[1] * to[2]);
        bf_real place[2], sum = 0;
        for (int side = 0; side < 2; side++) {
            const bf_real factor = (bf_real)a[PK_UPSAMPLE_FACTOR + side], last = (bf_real)size[1 + side] - 1;
            if (a[PK_UPSAMPLE_MODE] == 0)
                place[side] = (bf_real)(at[side] / (size_t)factor);
            else if (a[PK_UPSAMPLE_CORNERS] != 0)
                place[side] = to[1 + side] > 1 ? (bf_real)at[side] * last / (bf_real)(to[1 + side] - 1) : 0;
            else
                place[side] = ((bf_real)at[side] * 2 + 1) / (2 * factor) - 1 / (bf_real)2;
            place[side] = place[side] < 0 ? 0 : place[side] > last ? last : place[side];
        }
        for (size_t k = 0; k < size[1] * size[2]; k++) {
            const bf_real down = 1 - BF_MATH(fabs)(place[0] - (bf_real)(k / size[2])),
                          along = 1 - BF_MATH(fabs)(place[1] - (bf_real)(k % size[2]));
            const go_number near = x[plane * size[1] * size[2] + k];
            if (down <= 0 || along <= 0)
                continue;
            sum += down * along * near.value;
            go_from(tape, near, down * along);
        }
        y[i] = go_number_of(tape, sum);
    }
}

/* What a window of a side has of it, and how many numbers with padding. */
GO_FUNCTION long go_span(const pk_node *node, int side, long size, long windows, long at, long *low, long *high)
{
    const double *a = node->attributes;
    const long kernel = (long)a[PK_POOL_KERNEL + side], pad = (long)a[PK_POOL_PAD + side];
    if (strstr(node->operation->name, "adaptive") || strstr(node->operation->name, "global")) {
        *low = at * size / windows;
        *high = (at * size + size + windows - 1) / windows;
        return *high - *low;
    }
    const long start = at * (long)a[PK_POOL_STRIDE + side] - pad;
    const long past = start + kernel < size + pad ? start + kernel : size + pad;
    *low = start > 0 ? start : 0;
    *high = past < size ? past : size;
    return past - start;
}

/* all pools; largest: of the maximum */
GO_FUNCTION void go_pool(go_tape *tape, const pk_node *node, const pk_shape *from, int largest,
                         const go_number *x, go_number *y)
{
    size_t size[3], to[3] = {0, 1, 1};
    go_image(from, size);
    if (node->shape.rank == from->rank)
        go_image(&node->shape, to);
    for (size_t c = 0; c < size[0]; c++, x += size[1] * size[2])
        for (size_t output = 0; output < to[1] * to[2]; output++) {
            long low[2], high[2], padded[2];
            for (int side = 0; side < 2; side++)
                padded[side] = go_span(node, side, (long)size[1 + side], (long)to[1 + side],
                                       (long)(side ? output % to[2] : output / to[2]), &low[side], &high[side]);
            const int skip = node->attributes[PK_POOL_SKIP_PAD] != 0;
            const bf_real numbers =
                (bf_real)(skip ? (high[0] - low[0]) * (high[1] - low[1]) : padded[0] * padded[1]);
            const go_number *best = NULL;
            bf_real sum = 0, margin = HUGE_VAL;
            for (long row = low[0]; row < high[0]; row++)
                for (long column = low[1]; column < high[1]; column++) {
                    const go_number *tap = x + row * (long)size[2] + column;
                    sum += tap->value;
                    if (!largest)
                        go_from(tape, *tap, 1 / numbers);
                    if (!best || tap->value > best->value)
                        best = tap;
                }
            if (!largest) {
                *y++ = go_number_of(tape, sum / numbers);
                continue;
            }
            /* Numbers that are equal but for rounding (the same sum in another order, as behind an upsampling of equal
             * numbers) are one choice, the first of them: which is the largest would change from point to point. */
            bf_real magnitude = 0;
            for (long row = low[0]; row < high[0]; row++)
                for (long column = low[1]; column < high[1]; column++)
                    magnitude = BF_MATH(fmax)(magnitude, BF_MATH(fabs)(x[row * (long)size[2] + column].value));
            const go_number *first = NULL;
            for (long row = low[0]; row < high[0]; row++)
                for (long column = low[1]; column < high[1]; column++) {
                    const go_number *tap = x + row * (long)size[2] + column;
                    const bf_real behind = best->value - tap->value;
                    if (behind > 64 * BF_EPSILON * magnitude)
                        margin = BF_MATH(fmin)(margin, behind);
                    else if (!first)
                        first = tap;
                }
            best = first;
            go_choose(tape, (int)(best - x), margin);
            *y++ = *best;
        }
}

/* normalize (centred) and rms_normalize: slices of count numbers */
GO_FUNCTION void go_normalize(go_tape *tape, const pk_node *node, int centred, const go_number *x, go_number *y)
{
    size_t count = 1;
    for (int d = 0; d < (int)node->attributes[PK_NORM_DIMS]; d++)
        count *= node->shape.dims[node->shape.rank - 1 - d];
    if (node->attributes[PK_NORM_GROUPS] != 0)
        count = node->width / (size_t)node->attributes[PK_NORM_GROUPS];
    const bf_real epsilon = (bf_real)node->attributes[PK_NORM_EPSILON], n = (bf_real)count;
    for (size_t at = 0; at < node->width; at += count, x += count, y += count) {
        const go_number mean = centred ? go_sum(tape, count, x, n) : go_constant(0);
        for (size_t k = 0; k < count; k++)
            y[k] = go_mix(tape, 1, x[k], -1, mean, 0);
        const go_number squares = go_product(tape, count, y, 1, y, 1, NULL);
        const bf_real variance = squares.value / n + epsilon, root = BF_MATH(sqrt)(variance);
        const go_number factor = go_apply(tape, squares, 1 / root, -1 / (2 * n * variance * root));
        for (size_t k = 0; k < count; k++)
            y[k] = go_times(tape, y[k], factor);
    }
}

GO_FUNCTION void go_standardize(go_tape *tape, const pk_node *node, const go_number *x, go_number *y)
{
    const size_t channels = node->shape.dims[0], each = node->width / channels;
    for (size_t i = 0; i < node->width; i++) {
        const bf_real mean = (bf_real)node->constants[i / each],
                      variance = (bf_real)node->constants[channels + i / each];
        const bf_real root = BF_MATH(sqrt)(variance + (bf_real)node->attributes[PK_NORM_EPSILON]);
        y[i] = go_mix(tape, 1 / root, x[i], 0, x[i], -mean / root);
    }
}

GO_FUNCTION void go_affine(go_tape *tape, const pk_node *node, const go_number *x, go_number *y)
{
    const int biased = node->attributes[PK_AFFINE_BIAS] != 0,
              channels = node->attributes[PK_AFFINE_DIMS] == 0 || node->attributes[PK_AFFINE_SCALAR] != 0;
    const size_t count = biased ? node->weight_count / 2 : node->weight_count;
    for (size_t i = 0; i < node->width; i++) {
        const size_t k = channels ? i / (node->width / count) : i % count;
        const go_number factor = go_weight(tape, node, k),
                        summand = biased ? go_weight(tape, node, count + k) : go_constant(0);
        y[i] = go_product(tape, 1, &factor, 1, &x[i], 1, &summand);
    }
}

/* p = softmax(x), or log_softmax; the shift by the largest changes neither value nor derivatives */
GO_FUNCTION void go_softmax(go_tape *tape, size_t count, int logarithm, const go_number *x, go_number *p)
{
    bf_real top = x[0].value;
    go_number *powers = BF_NEW(go_number, count);
    for (size_t k = 1; k < count; k++)
        top = BF_MATH(fmax)(top, x[k].value);
    for (size_t k = 0; k < count; k++) {
        const bf_real power = BF_MATH(exp)(x[k].value - top);
        powers[k] = go_apply(tape, x[k], power, power);
    }
    const go_number sum = go_sum(tape, count, powers, 1);
    const go_number part = logarithm ? go_apply(tape, sum, BF_MATH(log)(sum.value), 1 / sum.value)
                                     : go_apply(tape, sum, 1 / sum.value, -1 / (sum.value * sum.value));
    for (size_t k = 0; k < count; k++)
        p[k] = logarithm ? go_mix(tape, 1, x[k], -1, part, -top) : go_times(tape, powers[k], part);
    free(powers);
}

/* x: tokens x (queries, keys, values; shared: one for all three), a head's columns together */
GO_FUNCTION void go_attend(go_tape *tape, const pk_node *node, const go_number *x, go_number *y)
{
    const size_t tokens = node->shape.dims[0], width = node->shape.dims[1],
                 heads = (size_t)node->attributes[PK_ATTEND_HEADS], depth = width / heads;
    const int causal = node->attributes[PK_ATTEND_CAUSAL] != 0,
              shared = node->attributes[PK_ATTEND_SHARED] != 0;
    const size_t in = shared ? width : 3 * width, key = shared ? 0 : width;
    const bf_real scale = 1 / BF_MATH(sqrt)((bf_real)depth);
    go_number *p = BF_NEW(go_number, tokens);
    for (size_t h = 0; h < heads; h++)
        for (size_t i = 0; i < tokens; i++) {
            const size_t seen = causal ? i + 1 : tokens;
            for (size_t j = 0; j < seen; j++) {
                const go_number score =
                    go_product(tape, depth, x + i * in + h * depth, 1, x + j * in + key + h * depth, 1, NULL);
                p[j] = go_mix(tape, scale, score, 0, score, 0);
            }
            go_softmax(tape, seen, 0, p, p);
            for (size_t d = 0; d < depth; d++)
                y[i * width + h * depth + d] =
                    go_product(tape, seen, p, 1, x + 2 * key + h * depth + d, in, NULL);
        }
    free(p);
}

/* number by number; 0: not such an operation */
GO_FUNCTION int go_elementwise(go_tape *tape, const pk_node *node, const char *name, const go_number *x,
                               go_number *y)
{
    const double *places;
    const bf_real parameter = (bf_real)node->attributes[PK_ACTIVATION_NUMBER];
    const int sine = strcmp(name, "sine") == 0, scale = strcmp(name, "scale") == 0;
    const int exponential = strcmp(name, "exp") == 0, logarithm = strcmp(name, "log") == 0,
              power = strcmp(name, "power") == 0;
    bf_layer layer;
    int found = 0;
    while (found < BF_ACTIVATIONS && strcmp(name, bf_activation_name(found)) != 0)
        found++;
    if (found == BF_ACTIVATIONS && !sine && !scale && !exponential && !logarithm && !power)
        return 0;
    if (found == BF_GELU && parameter != 0)
        found = BF_GELU_TANH;
    memset(&layer, 0, sizeof layer);
    layer.activation = (bf_activation)found;
    const size_t kinks = bf_kinks(layer.activation, &places);
    layer.parameter = node->attributes[PK_ACTIVATION_NUMBER];
    for (size_t i = 0; i < node->width; i++) {
        const bf_real z = x[i].value;
        if (sine)
            y[i] = go_apply(tape, x[i], BF_MATH(sin)(parameter * z), parameter * BF_MATH(cos)(parameter * z));
        else if (scale)
            y[i] = go_apply(tape, x[i], parameter * z, parameter);
        else if (exponential)
            y[i] = go_apply(tape, x[i], BF_MATH(exp)(z), BF_MATH(exp)(z));
        else if (logarithm)
            y[i] = go_apply(tape, x[i], BF_MATH(log)(z), 1 / z);
        else if (power)
            y[i] = go_apply(tape, x[i], BF_MATH(pow)(z, parameter), parameter * BF_MATH(pow)(z, parameter - 1));
        else
            y[i] = go_apply(tape, x[i], bf_activate(&layer, z), bf_slope(&layer, z));
        for (size_t k = 0; k < kinks; k++)
            go_choose(tape, bf_sign(z - (bf_real)places[k]), BF_MATH(fabs)(z - (bf_real)places[k]));
    }
    return 1;
}

/* Operations on several values, and views; 0: not such an operation. a, b: its first two inputs. */
GO_FUNCTION int go_values(go_tape *tape, const pk_node *node, const char *name, const go_number *a,
                          go_number *y)
{
    const go_number *b = tape->value[node->inputs[node->input_count > 1]];
    const pk_node *first = &tape->graph->nodes[node->inputs[0]];
    const pk_shape *shape = &node->shape, *from = &first->shape;
    const double *attribute = node->attributes;
    for (size_t i = 0; i < node->width; i++) {
        size_t index[PK_SHAPE_RANK], rest = i;
        for (int d = shape->rank - 1; d >= 0; d--) {
            index[d] = rest % shape->dims[d];
            rest /= shape->dims[d];
        }
        if (strcmp(name, "multiply") == 0) {
            go_from(tape, a[i], b[i].value);
            go_from(tape, b[i], a[i].value);
            y[i] = go_number_of(tape, a[i].value * b[i].value);
        } else if (strcmp(name, "matmul") == 0) {
            const size_t row = index[shape->rank - 2], column = index[shape->rank - 1];
            const size_t m = shape->dims[shape->rank - 2], n = shape->dims[shape->rank - 1];
            const size_t k = from->dims[from->rank - 1], which = i / (m * n);
            bf_real sum = 0;
            for (size_t l = 0; l < k; l++) {
                const go_number p = a[which * m * k + row * k + l];
                const go_number q = b[which * k * n + (attribute[0] != 0 ? column * k + l : l * n + column)];
                go_from(tape, p, q.value);
                go_from(tape, q, p.value);
                sum += p.value * q.value;
            }
            y[i] = go_number_of(tape, sum);
        } else if (strcmp(name, "view") == 0) {
            size_t at = (size_t)attribute[9];
            for (int d = 0; d < shape->rank; d++)
                at += index[d] * (size_t)attribute[5 + d];
            y[i] = a[at];
        } else if (strcmp(name, "sum") == 0) {
            const int axis = (int)attribute[0];
            size_t at = 0;
            bf_real sum = 0;
            for (size_t l = 0; l < from->dims[axis]; l++) {
                at = 0;
                for (int d = 0, own = 0; d < from->rank; d++)
                    at = at * from->dims[d] + (d == axis ? l : index[own++]);
                go_from(tape, a[at], 1);
                sum += a[at].value;
            }
            y[i] = go_number_of(tape, sum);
        } else if (strcmp(name, "concatenate") == 0) {
            const int axis = (int)attribute[0];
            int j = 0;
            for (; index[axis] >= tape->graph->nodes[node->inputs[j]].shape.dims[axis]; j++)
                index[axis] -= tape->graph->nodes[node->inputs[j]].shape.dims[axis];
            size_t at = 0;
            for (int d = 0; d < shape->rank; d++)
                at = at * tape->graph->nodes[node->inputs[j]].shape.dims[d] + index[d];
            y[i] = tape->value[node->inputs[j]][at];
        } else
            return 0;
    }
    return 1;
}

/* What has no arithmetic of its own; 0: not such an operation. data: the row of the network's inputs. */
GO_FUNCTION int go_structure(go_tape *tape, const pk_node *node, const char *name, const go_number *x,
                             size_t in, const pk_real *data, go_number *y)
{
    const size_t width = node->shape.dims[node->shape.rank - 1];
    if (strcmp(name, "flatten") == 0 || strcmp(name, "reshape") == 0) {
        memcpy(y, x, node->width * sizeof *y);
    } else if (strcmp(name, "add") == 0) {
        for (size_t i = 0; i < node->width; i++) {
            y[i] = x[i];
            for (int j = 1; j < node->input_count; j++)
                y[i] = go_mix(tape, 1, y[i], 1, tape->value[node->inputs[j]][i], 0);
        }
    } else if (strcmp(name, "position") == 0 || strcmp(name, "parameter") == 0) {
        for (size_t i = 0; i < node->width; i++)
            y[i] = go_weight(tape, node, i);
    } else if (strcmp(name, "constant") == 0) {
        for (size_t i = 0; i < node->width; i++)
            y[i] = go_constant((bf_real)node->constants[i]);
    } else if (strcmp(name, "gather") == 0) {
        for (size_t i = 0; i < node->width; i++)
            y[i] = node->constants[i] < 0 ? go_constant(0) : x[(size_t)node->constants[i]];
    } else if (strcmp(name, "above") == 0) {
        for (size_t i = 0; i < node->width; i++)
            y[i] = go_constant(x[i].value > (bf_real)node->attributes[PK_ACTIVATION_NUMBER]);
    } else if (strcmp(name, "embedding") == 0) {
        const double *a = node->attributes;
        for (size_t i = 0; i < node->width; i++) {
            const size_t token =
                (size_t)(data[(size_t)a[PK_EMBEDDING_FIRST] + i / width] + a[PK_EMBEDDING_OFFSET]);
            y[i] = token + 1 == (size_t)a[PK_EMBEDDING_PADDING]
                       ? go_constant(0)
                       : go_weight(tape, node, token * width + i % width);
        }
    } else if (strcmp(name, "token") == 0) {
        const double token = node->attributes[PK_TOKEN_INDEX];
        memcpy(y, x + (token < 0 ? in / width - (size_t)-token : (size_t)token) * width, width * sizeof *y);
    } else if (strcmp(name, "select") == 0) {
        memcpy(y, x + (size_t)data[0] * width, width * sizeof *y);
    } else if (strcmp(name, "mean_tokens") == 0) {
        for (size_t j = 0; j < width; j++) {
            bf_real sum = 0;
            for (size_t i = j; i < in; i += width) {
                sum += x[i].value;
                go_from(tape, x[i], 1 / (bf_real)(in / width));
            }
            y[j] = go_number_of(tape, sum / (bf_real)(in / width));
        }
    } else if (strcmp(name, "propagate") == 0) {
        for (size_t i = 0; i < node->width; i++)
            y[i] = go_constant(0);
        for (size_t e = 0; e < node->constant_count; e += 3)
            for (size_t j = 0; j < width; j++) {
                go_number *to = &y[(size_t)node->constants[e] * width + j];
                *to = go_mix(tape, 1, *to, (bf_real)node->constants[e + 2],
                             x[(size_t)node->constants[e + 1] * width + j], 0);
            }
    } else if (strcmp(name, "fourier") == 0) {
        const bf_real turn = 2 * BF_MATH(acos)((bf_real)-1);
        for (size_t j = 0; j < node->width / 2; j++) {
            bf_real angle = 0;
            for (size_t k = 0; k < in; k++)
                angle += (bf_real)node->constants[j * in + k] * x[k].value;
            y[j] = go_constant(BF_MATH(cos)(turn * angle));
            y[node->width / 2 + j] = go_constant(BF_MATH(sin)(turn * angle));
        }
    } else
        return 0;
    return 1;
}

/* -> the C outputs at tape->weights, inside the tape */
GO_FUNCTION const go_number *go_forward(go_tape *tape, const pk_real *data)
{
    const pk_graph *graph = tape->graph;
    tape->edges = tape->choices = 0;
    tape->numbers = graph->parameters + 1;
    while (tape->number_capacity <= tape->numbers)
        tape->first_edge = (size_t *)go_grow(tape->first_edge, tape->numbers, &tape->number_capacity,
                                             sizeof *tape->first_edge);
    memset(tape->first_edge, 0, (tape->numbers + 1) * sizeof *tape->first_edge);
    for (size_t i = 0; i < graph->nodes[0].width; i++)
        tape->value[0][i] = go_constant((bf_real)data[i]);
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n], *before = &graph->nodes[node->inputs[0]];
        const char *name = node->operation->name;
        const go_number *x = tape->value[node->inputs[0]];
        go_number *y = tape->value[n];
        const size_t last = node->shape.dims[node->shape.rank - 1];
        if (strcmp(name, "dense") == 0)
            go_dense(tape, node, x, before->shape.dims[before->shape.rank - 1], y);
        else if (strcmp(name, "conv") == 0)
            go_conv(tape, node, &before->shape, x, y);
        else if (strcmp(name, "conv_transpose") == 0)
            go_conv_transpose(tape, node, &before->shape, x, y);
        else if (strcmp(name, "upsample") == 0)
            go_upsample(tape, node, &before->shape, x, y);
        else if (strstr(name, "_pool"))
            go_pool(tape, node, &before->shape, strstr(name, "max_pool") != NULL, x, y);
        else if (strcmp(name, "normalize") == 0 || strcmp(name, "rms_normalize") == 0)
            go_normalize(tape, node, name[0] == 'n', x, y);
        else if (strcmp(name, "standardize") == 0)
            go_standardize(tape, node, x, y);
        else if (strcmp(name, "affine") == 0)
            go_affine(tape, node, x, y);
        else if (strcmp(name, "softmax") == 0 || strcmp(name, "log_softmax") == 0)
            for (size_t at = 0; at < node->width; at += last)
                go_softmax(tape, last, name[0] == 'l', x + at, y + at);
        else if (strcmp(name, "attend") == 0)
            go_attend(tape, node, x, y);
        else if (!go_elementwise(tape, node, name, x, y) && !go_values(tape, node, name, x, y) &&
                 !go_structure(tape, node, name, x, before->width, data, y)) {
            fprintf(stderr, "graph_oracle.h has no formula for '%s'\n", name);
            abort();
        }
    }
    return tape->value[graph->node_count - 1];
}

/* gradient (P) += scale * gradient of < seed, f >, at the last go_forward */
GO_FUNCTION void go_reverse(go_tape *tape, const bf_real *seed, bf_real scale, bf_real *gradient)
{
    const pk_graph *graph = tape->graph;
    const go_number *outputs = tape->value[graph->node_count - 1];
    free(tape->adjoint);
    tape->adjoint = BF_NEW(bf_real, tape->numbers);
    for (size_t c = 0; c < graph->output_width; c++)
        tape->adjoint[outputs[c].at] += seed[c];
    for (size_t n = tape->numbers; n-- > graph->parameters + 1;)
        for (size_t e = tape->first_edge[n]; tape->adjoint[n] != 0 && e < tape->first_edge[n + 1]; e++)
            tape->adjoint[tape->edge[e].from] += tape->adjoint[n] * tape->edge[e].slope;
    for (size_t p = 0; p < graph->parameters; p++)
        gradient[p] += scale * tape->adjoint[1 + p];
}

/* ---- the integral of the Jacobian along a step, for one row ---- */

typedef struct go_path {
    go_tape tape;
    const pk_real *data;
    bf_real *from, *change;                   /* P */
    bf_real node[GO_NODES], weight[GO_NODES]; /* on [-1, 1] */
    bf_real scale;                            /* the largest entry of a mean Jacobian so far */
    bf_real *total, *error;                   /* C x P: the integral, and what the last halvings changed */
    bf_real *kinks;
    size_t kink_count, kink_capacity, evaluations, missed /* panels that did not settle */;
    size_t samples, most; /* of the choices; of the evaluations */
    int least_depth;      /* panels are halved so often at least */
} go_path;

GO_FUNCTION void go_path_at(go_path *path, bf_real t)
{
    for (size_t p = 0; p < path->tape.graph->parameters; p++)
        path->tape.weights[p] = path->from[p] + t * path->change[p];
    go_forward(&path->tape, path->data);
    path->evaluations++;
}

/* The choices at t: the caller frees them. */
GO_FUNCTION int *go_choices_at(go_path *path, bf_real t, bf_real *margins)
{
    go_path_at(path, t);
    int *choices = BF_NEW(int, path->tape.choices);
    if (path->tape.choices)
        memcpy(choices, path->tape.choice, path->tape.choices * sizeof *choices);
    if (margins && path->tape.choices)
        memcpy(margins, path->tape.margin, path->tape.choices * sizeof *margins);
    return choices;
}

GO_FUNCTION void go_kink(go_path *path, bf_real t)
{
    path->kinks = (bf_real *)go_grow(path->kinks, path->kink_count, &path->kink_capacity, sizeof *path->kinks);
    path->kinks[path->kink_count++] = t;
}

/* All places in (low, high) at which choices change, to the last bit. flickers (NULL at first) counts those of a short
 * interval: where a pre-activation has a double zero its sign is rounding, and a few of its changes will do. */
GO_FUNCTION void go_split(go_path *path, bf_real low, const int *at_low, bf_real high, const int *at_high,
                          int *flickers)
{
    const size_t bytes = path->tape.choices * sizeof *at_low;
    const bf_real middle = (low + high) / 2;
    int own = 0;
    if (!bytes || memcmp(at_low, at_high, bytes) == 0)
        return;
    if (!flickers && high - low < 1e-8)
        flickers = &own;
    if (middle <= low || middle >= high || high - low < BF_EPSILON / 16 || (flickers && *flickers > 16) ||
        path->evaluations > path->most) {
        path->missed += path->evaluations > path->most;
        if (flickers)
            ++*flickers;
        go_kink(path, high);
        return;
    }
    int *at_middle = go_choices_at(path, middle, NULL);
    go_split(path, low, at_low, middle, at_middle, flickers);
    go_split(path, middle, at_middle, high, at_high, flickers);
    free(at_middle);
}

/* Choice j is the same at t - h, t and t + h and closest to another one at t: does it change twice between? */
GO_FUNCTION void go_dip(go_path *path, size_t j, bf_real t, bf_real h, const int *before, const int *at,
                        const int *after)
{
    const bf_real golden = (BF_MATH(sqrt)((bf_real)5) - 1) / 2;
    bf_real low = t - h, high = t + h;
    for (int i = 0; i < 80 && high > low; i++) {
        const bf_real probe[2] = {high - golden * (high - low), low + golden * (high - low)};
        bf_real margin[2];
        for (int k = 0; k < 2; k++) {
            int *here = go_choices_at(path, probe[k], NULL);
            margin[k] = path->tape.margin[j];
            const int found = here[j] != at[j];
            if (found && probe[k] > 0 && probe[k] < 1) {
                if (probe[k] < t) {
                    go_split(path, t - h, before, probe[k], here, NULL);
                    go_split(path, probe[k], here, t, at, NULL);
                } else {
                    go_split(path, t, at, probe[k], here, NULL);
                    go_split(path, probe[k], here, t + h, after, NULL);
                }
            }
            free(here);
            if (found)
                return;
        }
        if (margin[0] < margin[1])
            high = probe[1];
        else
            low = probe[0];
    }
}

/* The sorted kinks inside (0, 1). One sample beyond either end shows dips at the ends. */
GO_FUNCTION void go_find_kinks(go_path *path)
{
    const size_t samples = path->samples + 3;
    const bf_real h = 1 / (bf_real)path->samples;
    path->kink_count = 0;
    go_path_at(path, 0);
    const size_t K = path->tape.choices;
    if (!K)
        return;
    bf_real *margins = BF_NEW(bf_real, samples * K);
    int **choices = BF_NEW(int *, samples);
    for (size_t k = 0; k < samples; k++)
        choices[k] = go_choices_at(path, ((bf_real)k - 1) * h, margins + k * K);
    for (size_t k = 1; k + 2 < samples; k++)
        go_split(path, (bf_real)(k - 1) * h, choices[k], (bf_real)k * h, choices[k + 1], NULL);
    for (size_t j = 0; j < K; j++)
        for (size_t k = 1; k + 1 < samples; k++) {
            const bf_real a = margins[(k - 1) * K + j], b = margins[k * K + j], c = margins[(k + 1) * K + j];
            if (choices[k - 1][j] == choices[k][j] && choices[k + 1][j] == choices[k][j] && b <= a && b <= c &&
                b > 0 && b <= 4 * (a + c - 2 * b))
                go_dip(path, j, ((bf_real)k - 1) * h, h, choices[k - 1], choices[k], choices[k + 1]);
        }
    for (size_t k = 0; k < samples; k++)
        free(choices[k]);
    free(choices), free(margins);
    if (path->kink_count)
        qsort(path->kinks, path->kink_count, sizeof *path->kinks, bf_compare);
}

/* -> the integral of the Jacobian over [low, high] by one Gauss-Legendre rule, C x P */
GO_FUNCTION bf_real *go_panel(go_path *path, bf_real low, bf_real high)
{
    const size_t C = path->tape.graph->output_width, P = path->tape.graph->parameters;
    bf_real *sum = BF_NEW(bf_real, C * P), *seed = BF_NEW(bf_real, C);
    for (int i = 0; i < GO_NODES; i++) {
        go_path_at(path, low + (high - low) * (1 + path->node[i]) / 2);
        for (size_t c = 0; c < C; c++) {
            seed[c] = 1;
            go_reverse(&path->tape, seed, (high - low) / 2 * path->weight[i], sum + c * P);
            seed[c] = 0;
        }
    }
    for (size_t i = 0; i < C * P; i++)
        path->scale = BF_MATH(fmax)(path->scale, BF_MATH(fabs)(sum[i]) / (high - low));
    free(seed);
    return sum;
}

/* Adds the integral over [low, high], of which one rule gives `whole` (released here). */
GO_FUNCTION void go_integrate(go_path *path, bf_real low, bf_real high, bf_real *whole, int depth)
{
    const size_t size = path->tape.graph->output_width * path->tape.graph->parameters;
    const bf_real middle = (low + high) / 2;
    bf_real *left = go_panel(path, low, middle), *right = go_panel(path, middle, high), change = 0;
    for (size_t i = 0; i < size; i++)
        change = BF_MATH(fmax)(change, BF_MATH(fabs)(left[i] + right[i] - whole[i]));
    const int settled = change <= 1024 * BF_EPSILON * path->scale * (high - low) + BF_EPSILON * path->scale;
    if ((!settled || depth < path->least_depth) && depth < GO_DEPTH && path->evaluations <= path->most) {
        free(whole);
        go_integrate(path, low, middle, left, depth + 1);
        go_integrate(path, middle, high, right, depth + 1);
        return;
    }
    path->missed += !settled;
    for (size_t i = 0; i < size; i++) {
        path->total[i] += left[i] + right[i];
        path->error[i] += BF_MATH(fabs)(left[i] + right[i] - whole[i]);
    }
    free(whole), free(left), free(right);
}

/* How far the integral is from explaining the change of the outputs over the step, relative to its parts. */
GO_FUNCTION bf_real go_gap(go_path *path)
{
    const size_t C = path->tape.graph->output_width, P = path->tape.graph->parameters;
    bf_real *change = BF_NEW(bf_real, C), worst = 0;
    for (int end = 0; end < 2; end++) {
        go_path_at(path, end);
        for (size_t c = 0; c < C; c++)
            change[c] += (end ? 1 : -1) * path->tape.value[path->tape.graph->node_count - 1][c].value;
    }
    for (size_t c = 0; c < C; c++) {
        bf_real sum = 0, parts = BF_MATH(fabs)(path->tape.value[path->tape.graph->node_count - 1][c].value);
        for (size_t p = 0; p < P; p++) {
            sum += path->total[c * P + p] * path->change[p];
            parts += BF_MATH(fabs)(path->total[c * P + p] * path->change[p]);
        }
        if (change[c] != sum)
            worst = BF_MATH(fmax)(worst, BF_MATH(fabs)(change[c] - sum) / parts);
    }
    free(change);
    return worst;
}

/* path->total and path->error of one row's step from `from` along path->change; -> the pieces between kinks. A spike
 * between the nodes of two rules goes unseen; where the integral does not explain the change of the outputs, the step is
 * looked at more closely. */
GO_FUNCTION size_t go_path_jacobian(go_path *path, const pk_real *data)
{
    const size_t size = path->tape.graph->output_width * path->tape.graph->parameters, missed = path->missed;
    size_t pieces = 0;
    path->data = data;
    for (int attempt = 0; attempt < GO_ATTEMPTS; attempt++) {
        bf_real low = 0;
        path->samples = (size_t)GO_SAMPLES << 2 * attempt;
        path->least_depth = 1 + 3 * attempt;
        path->most = (size_t)GO_MOST << attempt;
        path->scale = 0;
        path->evaluations = 0;
        path->missed = missed;
        pieces = 0;
        memset(path->total, 0, size * sizeof *path->total);
        memset(path->error, 0, size * sizeof *path->error);
        go_find_kinks(path);
        for (size_t k = 0; k <= path->kink_count; k++) {
            const bf_real high = k < path->kink_count ? path->kinks[k] : 1;
            if (high > low) {
                go_integrate(path, low, high, go_panel(path, low, high), 0);
                low = high;
                pieces++;
            }
        }
        if (go_gap(path) <= 1000000 * BF_EPSILON)
            return pieces;
    }
    path->missed++;
    return pieces;
}

GO_FUNCTION void go_path_make(const pk_graph *graph, go_path *path)
{
    bf_real node[GO_NODES], weight[GO_NODES];
    const size_t P = graph->parameters, C = graph->output_width;
    double low_node[GO_NODES];
    memset(path, 0, sizeof *path);
    go_tape_make(graph, &path->tape);
    path->from = BF_NEW(bf_real, P), path->change = BF_NEW(bf_real, P);
    path->total = BF_NEW(bf_real, C * P), path->error = BF_NEW(bf_real, C * P);
    for (int i = 0; i < GO_NODES; i++) { /* Newton's method on the Legendre polynomial */
        low_node[i] = cos(3.14159265358979 * (i + 0.75) / (GO_NODES + 0.5));
        bf_real x = (bf_real)low_node[i], slope = 1;
        for (int newton = 0; newton < 10; newton++) {
            bf_real p = x, before = 1;
            for (int k = 2; k <= GO_NODES; k++) {
                const bf_real next = ((2 * k - 1) * x * p - (k - 1) * before) / k;
                before = p;
                p = next;
            }
            slope = GO_NODES * (before - x * p) / (1 - x * x);
            x -= p / slope;
        }
        node[i] = x;
        weight[i] = 2 / ((1 - x * x) * slope * slope);
    }
    memcpy(path->node, node, sizeof node);
    memcpy(path->weight, weight, sizeof weight);
}

GO_FUNCTION void go_path_free(go_path *path)
{
    go_tape_free(&path->tape);
    free(path->from), free(path->change), free(path->total), free(path->error), free(path->kinks);
}

/* ---- the decomposition of a run ---- */

typedef struct go_result {
    size_t rows, outputs, examples, steps, layers, pieces, evaluations;
    size_t missed; /* > 0: some step is too rough for this oracle, nothing here is to be used */
    bf_real *by_example, *accuracy; /* M x C x N: entries, and how far off they may be */
    bf_real *by_step, *by_layer;    /* M x C x (S | layers) */
    bf_real *decay, *unattributed, *closure, *initial, *final_output; /* M x C */
} go_result;

/* The gradient of example i's loss at w, times scale, added to gradient. */
GO_FUNCTION void go_loss_gradient(const pk_run *run, bf_loss loss, go_tape *tape, size_t i, const bf_real *w,
                                  bf_real scale, bf_real *gradient)
{
    const size_t C = run->outputs, D = run->graph.input_width;
    const int64_t item = (int64_t)i;
    pk_real *x = BF_NEW(pk_real, D), *target = BF_NEW(pk_real, C);
    bf_real *f = BF_NEW(bf_real, C), *seed = BF_NEW(bf_real, C);
    pk_dataset_inputs(&run->train, &item, 1, x);
    pk_loss_targets(run->loss, &run->train, &item, 1, C, target);
    memcpy(tape->weights, w, run->parameters * sizeof *w);
    const go_number *outputs = go_forward(tape, x);
    for (size_t c = 0; c < C; c++)
        f[c] = outputs[c].value;
    bf_loss_value(loss, C, f, target, seed);
    go_reverse(tape, seed, scale, gradient);
    free(x), free(target), free(f), free(seed);
}

GO_FUNCTION void go_result_make(const pk_run *run, size_t rows, go_result *out)
{
    const size_t cells = rows * run->outputs;
    memset(out, 0, sizeof *out);
    out->rows = rows, out->outputs = run->outputs, out->examples = run->examples, out->steps = run->steps;
    out->layers = run->graph.layers;
    out->by_example = BF_NEW(bf_real, cells * run->examples),
    out->accuracy = BF_NEW(bf_real, cells * run->examples);
    out->by_step = BF_NEW(bf_real, cells * run->steps),
    out->by_layer = BF_NEW(bf_real, cells * run->graph.layers);
    out->decay = BF_NEW(bf_real, cells), out->unattributed = BF_NEW(bf_real, cells);
    out->closure = BF_NEW(bf_real, cells), out->initial = BF_NEW(bf_real, cells);
    out->final_output = BF_NEW(bf_real, cells);
}

GO_FUNCTION void go_result_free(go_result *r)
{
    free(r->by_example), free(r->accuracy), free(r->by_step), free(r->by_layer), free(r->decay);
    free(r->unattributed), free(r->closure), free(r->initial), free(r->final_output);
    memset(r, 0, sizeof *r);
}

/* The loss and the optimiser of a run in the oracle's words. */
GO_FUNCTION bf_run go_settings(const pk_run *run)
{
    bf_run settings;
    memset(&settings, 0, sizeof settings);
    settings.loss = BF_LOSSES;
    for (int l = 0; l < BF_LOSSES; l++)
        if (strcmp(bf_loss_name((bf_loss)l), pk_loss_name(run->loss)) == 0)
            settings.loss = (bf_loss)l;
    if (settings.loss == BF_LOSSES)
        abort();
    settings.optimizer = fixture_optimizer_of(&run->optimizer);
    settings.steps = run->steps, settings.parameters = run->parameters, settings.examples = run->examples;
    settings.outputs = run->outputs;
    settings.learning_rates = (double *)run->learning_rates;
    return settings;
}

/* inputs: rows x input width. Runs with all weights recorded (keep_every 1). The sources of the updates are the N
 * examples, the S steps at which gradients were taken (the same gradients, summed the other way), and decay. */
GO_FUNCTION void go_decompose(const pk_run *run, size_t rows, const pk_real *inputs, go_result *out)
{
    const size_t P = run->parameters, N = run->examples, S = run->steps, C = run->outputs,
                 D = run->graph.input_width, sources = N + S + 1, cells = rows * C;
    bf_run settings = go_settings(run);
    const int stateful = bf_stateful(&settings.optimizer);
    bf_real *gradient = BF_NEW(bf_real, N * P), *m = BF_NEW(bf_real, sources * P);
    bf_real *update = BF_NEW(bf_real, sources * P), *sum = BF_NEW(bf_real, P), *decay = BF_NEW(bf_real, P);
    bf_real *v = BF_NEW(bf_real, P), *denominator = BF_NEW(bf_real, P), *data = BF_NEW(bf_real, P);
    bf_real *rest = BF_NEW(bf_real, P);
    pk_real *stored = BF_NEW(pk_real, 2 * P), *moments = NULL;
    int *live = BF_NEW(int, sources);
    go_path path;
    go_path_make(&run->graph, &path);
    go_result_make(run, rows, out);
    if (run->second_moments.data) {
        moments = BF_NEW(pk_real, S * P);
        pk_array_reals(&run->second_moments, 0, S * P, moments);
        settings.second_moments = moments;
    }
    for (size_t s = 0; s < S; s++) {
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        pk_array_reals(&run->weights, s * P, 2 * P, stored);
        bf_real *w = path.from;
        for (size_t p = 0; p < P; p++) {
            w[p] = (bf_real)stored[p];
            path.change[p] = (bf_real)stored[P + p] - w[p];
            decay[p] = bf_decoupled(&settings.optimizer) ? 0 : (bf_real)settings.optimizer.weight_decay * w[p];
        }
        memset(gradient, 0, N * P * sizeof *gradient);
        memset(sum, 0, P * sizeof *sum);
        for (size_t b = 0; b < batch.count; b++) {
            const size_t i = (size_t)batch.items[b];
            const bf_real c = batch.weights ? (bf_real)batch.weights[b] : 1 / (bf_real)batch.count;
            go_loss_gradient(run, settings.loss, &path.tape, i, w,
                             c * (bf_real)pk_run_gradient_scale(run, s) *
                                 (settings.optimizer.maximize ? -1 : 1),
                             gradient + i * P);
            live[i] = 2;
        }
        for (size_t i = 0; i < N; i++)
            for (size_t p = 0; p < P; p++)
                sum[p] += gradient[i * P + p];
        bf_second_moment(&settings, s, sum, decay, v, denominator);
        memset(data, 0, P * sizeof *data);
        live[N + s] = 2;
        for (size_t i = 0; i < N + S; i++) {
            const bf_real *share = live[i] < 2 ? NULL : i < N ? gradient + i * P : sum;
            live[i] = live[i] == 2 || (stateful && live[i]);
            if (live[i])
                bf_advance(&settings.optimizer, s, run->learning_rates[s], P, denominator, share, m + i * P,
                           update + i * P);
            for (size_t p = 0; live[i] && i < N && p < P; p++)
                data[p] += update[i * P + p];
        }
        bf_advance_decay(&settings, s, w, denominator, decay, m + (N + S) * P, update + (N + S) * P);
        for (size_t p = 0; p < P; p++)
            rest[p] = path.change[p] - data[p] - update[(N + S) * P + p];
        for (size_t r = 0; r < rows && !out->missed; r++) {
            out->pieces += go_path_jacobian(&path, inputs + r * D);
            out->evaluations += path.evaluations;
            out->missed += path.missed;
            path.missed = 0;
            if (out->missed)
                continue;
            for (size_t c = 0; c < C; c++) {
                const size_t cell = r * C + c;
                const bf_real *phi = path.total + c * P, *error = path.error + c * P;
                for (size_t i = 0; i < N + S; i++) {
                    if (!live[i])
                        continue;
                    *(i < N ? out->by_example + cell * N + i : out->by_step + cell * S + (i - N)) +=
                        bf_dot(P, phi, update + i * P);
                    for (size_t p = 0; i < N && p < P; p++)
                        out->accuracy[cell * N + i] += BF_MATH(fabs)(update[i * P + p]) *
                                                       (error[p] + 256 * BF_EPSILON * BF_MATH(fabs)(phi[p]));
                }
                for (size_t l = 0; l < run->graph.layers; l++) {
                    const pk_node *layer = pk_graph_layer(&run->graph, l);
                    out->by_layer[cell * run->graph.layers + l] +=
                        bf_dot(layer->weight_count, phi + layer->weight_offset, data + layer->weight_offset);
                }
                out->decay[cell] += bf_dot(P, phi, update + (N + S) * P);
                out->unattributed[cell] += bf_dot(P, phi, rest);
            }
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t end = 0; end < 2; end++) {
            pk_array_reals(&run->weights, end * S * P, P, stored);
            for (size_t p = 0; p < P; p++)
                path.tape.weights[p] = (bf_real)stored[p];
            const go_number *f = go_forward(&path.tape, inputs + r * D);
            for (size_t c = 0; c < C; c++)
                (end ? out->final_output : out->initial)[r * C + c] = f[c].value;
        }
    for (size_t cell = 0; cell < cells; cell++) {
        out->closure[cell] =
            out->final_output[cell] - out->initial[cell] - out->decay[cell] - out->unattributed[cell];
        for (size_t i = 0; i < N; i++)
            out->closure[cell] -= out->by_example[cell * N + i];
    }
    go_path_free(&path);
    free(gradient), free(m), free(update), free(sum), free(decay), free(v), free(denominator), free(data);
    free(rest), free(stored), free(moments), free(live);
}
#endif
