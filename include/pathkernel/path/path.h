/* pathkernel/path/path.h: a network along one step w + t d, 0 <= t <= 1: its values, tangents and cotangents at points
 * (row, t). Values that are constant or affine in t are computed once for each row.
 */
#ifndef PATHKERNEL_PATH_H
#define PATHKERNEL_PATH_H
#include "../network/pass.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_PATH_INTERNALS_KNOWN)
#define PATHKERNEL_PATH_INTERNALS_KNOWN
/* >>> internals */
/* A pre-activation that is a polynomial of a higher degree, or none, is interpolated by a polynomial of this degree on each
 * piece; the caller must judge the pieces by their closure then. */
enum { PK__PATH_DEGREE = 12 };

/* The piece [a, b] of a row's step. A slack is how far the kink at that end may lie from it, 0 where there is no kink. */
typedef struct pk__piece {
    size_t row;
    double a, b, slack_a, slack_b;
    /* Used by the adaptive rule (quadrature.h), which measures the error of a piece and halves it: */
    double error, size;       /* of its last test */
    double family, reference; /* of a piece it has come from by halving: its a and its error */
    double
        missed; /* by how much one node less missed the target, 0: not tried; once accepted, the part of its integral that
                      its test could not explain */
    unsigned char age;    /* halvings since then */
    unsigned char joined; /* there is no kink at a: the piece in front goes on smoothly */
    unsigned char order, nested,
        accepted; /* its nodes; how they are judged; whether they are part of the result */
    unsigned char
        unsplit; /* its kinks have not been looked for: each node has the mean slopes of its stretch */
    /* Then: at least so many switch functions have another sign at its end; how far the mean inputs of layers by two rules are
     * apart, relative to their size. */
    size_t kinks;
    double inputs_apart;
} pk__piece;

typedef struct pk__pieces {
    size_t count, capacity;
    pk__piece *piece;
} pk__pieces;

/* A root of switch function number `at`: its t, how far that may be off (slack), and the slope and rounding of the function. */
typedef struct pk__root {
    double t, slack, slope, rounding;
    size_t at;
} pk__root;

/* One block of rows along one step; memory from an arena, one segment a thread. */
typedef struct pk__path {
    const pk_graph *graph;
    size_t row_capacity, point_capacity;
    /* The current step and block of rows: */
    const pk_real *weights, *direction, *inputs;
    size_t rows;
    /* Nodes that are constant or affine in t are evaluated once per row: base[n] + t slope[n]. */
    pk_real **base, **slope;
    int *gathered;      /* of each node: it is constant, and its values are needed at each point */
    pk__tape tape;      /* of the points */
    int degree;         /* of the samples: the largest of a switch function */
    size_t last_switch; /* the last node with switch functions, 0: none */
    size_t *last_read;  /* of each node: the last node that reads it */
    int interpolates;   /* some switch function is not a polynomial of that degree */
    pk_real *input_points, *switch_values, *coefficients, *conversion;
    double tail[3][PK__PATH_DEGREE + 1]; /* the last Chebyshev coefficients = tail * values at the samples */
    size_t *point_row;
    pk_real *point_t;
    size_t *from, *to; /* of points with mean slopes: the points at the ends of their stretches */
    pk_real *gap;      /* of the same, after pk__path_tangent: pk__tape.gap */
    size_t held;       /* the number of points whose values are in the tape: held_row, held_t */
    size_t *held_row;
    pk_real *held_t;
    pk__pieces pending, batch; /* pieces still to be searched for kinks, and those that are sampled now */
    size_t *pending_start,
        *batch_start; /* for each: the first node whose switch functions have not been searched */
    pk__root *roots;
    size_t root_capacity;
} pk__path;

/* Takes the memory of a segment for blocks of `rows` rows, with at most `points` points at a time, `reverse_points` of them
 * with `copies` cotangents each, and `pieces` pieces. gather: constant values are needed at each point, too. */
PK__INTERNAL void pk__path_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                size_t reverse_points, size_t copies, size_t pieces, int gather,
                                pk__path *segment);
/* Begins a step and a block of rows (rows x input width). transposed: pk__pass_transpose of the weights, followed by that of
 * the direction, or NULL. */
PK__INTERNAL void pk__path_begin(pk__path *segment, const pk_real *weights, const pk_real *direction,
                                 const pk_real *transposed, size_t rows, const pk_real *inputs);
/* Computes the values at the points (row[p], t[p]), p < count <= point_capacity, into segment->tape. Cost: 4 P flops for
 * each point, or nothing if the tape has all of them in this order already, perhaps with others between. */
PK__INTERNAL void pk__path_forward(pk__path *segment, size_t count, const size_t *row, const pk_real *t);
/* The same, after the points that the tape has already, or instead of them if there is no room. Returns the number of the
 * first one. */
PK__INTERNAL size_t pk__path_append(pk__path *segment, size_t count, const size_t *row, const pk_real *t);
/* Computes tangents along the step's direction at `count` points of the tape, from number `first` on. */
PK__INTERNAL void pk__path_tangent(pk__path *segment, size_t first, size_t count, const size_t *row,
                                   const pk_real *t);
/* The same along a direction in which about half of the layers have the step's direction with the other sign. */
PK__INTERNAL void pk__path_probe(pk__path *segment, size_t first, size_t count, const size_t *row,
                                 const pk_real *t);
/* How many switch functions have other signs at point b of the tape than at point a. */
PK__INTERNAL size_t pk__path_sign_changes(pk__path *segment, size_t a, size_t b);
/* Makes the points `count` nodes and, behind them, the ends from[p] and to[p] of their stretches: point_row and point_t, and where
 * the ends stand. A node whose ends are equal has slopes of its own. There must be room for three times `count` points. Returns
 * the number of points. */
PK__INTERNAL size_t pk__path_stretches(pk__path *segment, size_t count, const size_t *row, const pk_real *t,
                                       const pk_real *from, const pk_real *to);
/* Whether passes of the tape take mean slopes over those stretches, or (0) the slopes at the points. */
PK__INTERNAL void pk__path_use_means(pk__path *segment, int means);
/* Cotangents at the points of the last forward from the seeds in pk__pass_seed(&segment->tape). */
PK__INTERNAL void pk__path_reverse(pk__path *segment, size_t count, const pk_real *t, size_t copies);

PK__INTERNAL void pk__pieces_take(pk__arena *arena, size_t capacity, pk__pieces *pieces);
/* Appends the piece [a, b] of a row, without kinks at its ends, and returns it. There must be room. */
PK__INTERNAL pk__piece *pk__pieces_push(pk__pieces *pieces, size_t row, double a, double b);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PATH_IMPLEMENTED)
#define PATHKERNEL_PATH_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* at = w + t (next - w) of count weights; the difference is taken in double. */
PK__PRIVATE void pk__step_point(size_t count, const pk_real *w, const pk_real *next, double t, pk_real *at)
{
    for (size_t p = 0; p < count; p++)
        at[p] = (pk_real)(w[p] + t * ((double)next[p] - w[p]));
}

PK__INTERNAL void pk__pieces_take(pk__arena *arena, size_t capacity, pk__pieces *pieces)
{
    pieces->count = 0;
    pieces->capacity = capacity;
    pieces->piece = pk__arena_take(arena, capacity, sizeof *pieces->piece);
}

PK__INTERNAL pk__piece *pk__pieces_push(pk__pieces *pieces, size_t row, double a, double b)
{
    pk__piece *piece = &pieces->piece[pieces->count++];
    memset(piece, 0, sizeof *piece);
    piece->row = row;
    piece->a = a;
    piece->b = b;
    return piece;
}

/* Affine in t for each row: no product per point is needed. */
static int pk__is_affine(const pk_node *node)
{
    return node->weight_count && node->input_constant && node->operation->linear_in_weights;
}

static int pk__is_switch(const pk_node *node)
{
    return node->operation && node->operation->switch_count && !node->input_constant;
}

/* Its switch functions are polynomials in t that the samples determine. */
static int pk__is_polynomial(const pk_node *node)
{
    return node->input_degree >= 0 && node->input_degree <= PK__PATH_DEGREE;
}

static int pk__sample_degree(const pk_node *node)
{
    return pk__is_polynomial(node) ? node->input_degree : (int)PK__PATH_DEGREE;
}

/* The sampling nodes: Chebyshev-Lobatto on [0, 1]. */
static double pk__sample_node(int degree, int k)
{
    double s = sin(1.57079632679489661923 * k / degree);
    return s * s;
}

/* conversion (degree + 1 squared): Bernstein coefficients = conversion * values at the sampling nodes; the
 * inverse of B[k][i] = binomial(degree, i) x_k^i (1 - x_k)^(degree - i), by Gauss-Jordan with pivoting. */
static void pk__bernstein_conversion(int degree, pk_real *conversion)
{
    enum { N = PK__PATH_DEGREE + 1 };
    long double m[N][2 * N];
    int n = degree + 1;
    for (int k = 0; k < n; k++) {
        long double x = pk__sample_node(degree, k), binomial = 1;
        for (int i = 0; i < n; i++) {
            m[k][i] = binomial * powl(x, i) * powl(1 - x, degree - i);
            binomial = binomial * (degree - i) / (i + 1);
            m[k][n + i] = i == k;
        }
    }
    for (int column = 0; column < n; column++) {
        int pivot = column;
        for (int k = column + 1; k < n; k++)
            if (fabsl(m[k][column]) > fabsl(m[pivot][column]))
                pivot = k;
        for (int i = 0; i < 2 * n; i++) {
            long double swap = m[column][i];
            m[column][i] = m[pivot][i];
            m[pivot][i] = swap;
        }
        long double scale = 1 / m[column][column];
        for (int i = 0; i < 2 * n; i++)
            m[column][i] *= scale;
        for (int k = 0; k < n; k++) {
            long double factor = m[k][column];
            if (k != column && factor != 0)
                for (int i = 0; i < 2 * n; i++)
                    m[k][i] -= factor * m[column][i];
        }
    }
    for (int k = 0; k < n; k++)
        for (int i = 0; i < n; i++)
            conversion[k * n + i] = (pk_real)m[k][n + i];
}

/* The Chebyshev coefficients number PK__PATH_DEGREE - 2 and up of the interpolant, from its values at the sampling nodes. */
static void pk__chebyshev_tail(double tail[3][PK__PATH_DEGREE + 1])
{
    const int degree = PK__PATH_DEGREE;
    for (int i = 0; i < 3; i++)
        for (int k = 0; k <= degree; k++) {
            const int m = degree - 2 + i, end = k == 0 || k == degree;
            tail[i][k] = (m == degree ? 1.0 : 2.0) / degree * (end ? 0.5 : 1.0) *
                         cos(3.14159265358979323846 * m * k / degree);
        }
}

PK__INTERNAL void pk__path_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                size_t reverse_points, size_t copies, size_t pieces, int gather,
                                pk__path *segment)
{
    size_t count = graph->node_count, switches = 0;
    memset(segment, 0, sizeof *segment);
    points = pk__max(points, PK__PATH_DEGREE + 1); /* the samples of one piece */
    segment->graph = graph;
    segment->row_capacity = rows;
    segment->point_capacity = points;
    segment->base = pk__arena_take(arena, count, sizeof *segment->base);
    segment->slope = pk__arena_take(arena, count, sizeof *segment->slope);
    segment->gathered = pk__arena_take(arena, count, sizeof *segment->gathered);
    segment->last_read = pk__arena_take(arena, count, sizeof *segment->last_read);
    for (size_t n = 0; n < count && segment->gathered; n++)
        segment->gathered[n] = 0;
    for (size_t n = 0; n < count; n++) {
        const pk_node *node = &graph->nodes[n];
        int affine = n && pk__is_affine(node), constant = n && !node->varies;
        pk_real *base = affine || constant ? pk__arena_take(arena, rows, node->width * sizeof *base) : NULL;
        pk_real *slope = affine ? pk__arena_take(arena, rows, node->width * sizeof *slope) : NULL;
        if (segment->base) {
            segment->base[n] = base;
            segment->slope[n] = slope;
        }
        if (n && node->varies && (gather || !affine || !pk__is_outer(node) || node->shares) &&
            segment->gathered)
            for (int j = 0; j < node->input_count; j++)
                segment->gathered[node->inputs[j]] |= !graph->nodes[node->inputs[j]].varies;
        for (int j = 0; j < node->input_count && segment->last_read; j++)
            segment->last_read[node->inputs[j]] = n;
        if (n && pk__is_switch(node)) {
            switches = pk__max(switches, node->operation->switch_count(node));
            if (segment->last_switch && segment->degree < 2)
                segment->degree = 2; /* see pk__is_dead */
            segment->last_switch = n;
            if (pk__sample_degree(node) > segment->degree)
                segment->degree = pk__sample_degree(node);
            segment->interpolates |= !pk__is_polynomial(node);
        }
    }
    const size_t samples = (size_t)segment->degree + 1;
    segment->conversion = pk__arena_take(arena, segment->last_switch ? samples * samples : 0, sizeof(pk_real));
    if (segment->conversion && segment->last_switch)
        pk__bernstein_conversion(segment->degree, segment->conversion);
    pk__chebyshev_tail(segment->tail);
    pk__pass_take_parts(arena, graph, points, reverse_points, copies, 1, &segment->tape);
    segment->input_points = pk__arena_take(arena, points, graph->input_width * sizeof(pk_real));
    segment->switch_values = pk__arena_take(arena, points, switches * sizeof(pk_real));
    segment->coefficients = pk__arena_take(arena, PK__PATH_DEGREE + 1, switches * sizeof(pk_real));
    segment->point_row = pk__arena_take(arena, points, sizeof *segment->point_row);
    segment->point_t = pk__arena_take(arena, points, sizeof *segment->point_t);
    segment->from = pk__arena_take(arena, points, sizeof *segment->from);
    segment->to = pk__arena_take(arena, points, sizeof *segment->to);
    segment->gap = pk__arena_take(arena, points, sizeof *segment->gap);
    segment->tape.mean = pk__arena_take(arena, pk__mean_numbers(graph, copies), sizeof(pk_real));
    segment->held_row = pk__arena_take(arena, points, sizeof *segment->held_row);
    segment->held_t = pk__arena_take(arena, points, sizeof *segment->held_t);
    pk__pieces_take(arena, pieces, &segment->pending);
    segment->pending_start = pk__arena_take(arena, pieces, sizeof *segment->pending_start);
    pk__pieces_take(arena, points, &segment->batch);
    segment->batch_start = pk__arena_take(arena, points, sizeof *segment->batch_start);
    segment->root_capacity = pieces;
    segment->roots = pk__arena_take(arena, pieces, sizeof *segment->roots);
}

PK__INTERNAL void pk__path_use_means(pk__path *segment, int means)
{
    segment->tape.from = means ? segment->from : NULL;
    segment->tape.to = means ? segment->to : NULL;
}

PK__INTERNAL size_t pk__path_stretches(pk__path *segment, size_t count, const size_t *row, const pk_real *t,
                                       const pk_real *from, const pk_real *to)
{
    size_t points = count;
    for (size_t p = 0; p < count; p++) {
        segment->point_row[p] = row[p];
        segment->point_t[p] = t[p];
    }
    for (size_t p = 0; p < count; p++) {
        segment->from[p] = segment->to[p] = p;
        if (!(from[p] < to[p]))
            continue;
        const int follows = p && points > count && row[p - 1] == row[p] &&
                            segment->point_t[points - 1] == from[p] && segment->to[p - 1] == points - 1;
        for (int end = follows; end < 2; end++, points++) {
            segment->point_row[points] = row[p];
            segment->point_t[points] = end ? to[p] : from[p];
        }
        segment->from[p] = points - 2;
        segment->to[p] = points - 1;
    }
    return points;
}

/* out = an affine node of the segment's rows with these weights (transposed: NULL where they are not there). */
static void pk__path_affine(pk__path *segment, const pk_node *node, const pk_real *weights,
                            const pk_real *transposed, pk_real *out)
{
    pk_call call;
    pk__pass_call(&segment->tape, node, segment->rows, 1, &call);
    for (int j = 0; j < node->input_count; j++)
        call.in[j] = segment->base[node->inputs[j]];
    call.weights = weights + node->weight_offset;
    call.out = out;
    if (transposed && pk__is_plain_layer(node)) {
        const size_t places = call.rows * node->positions;
        if (pk__has_bias(node))
            for (size_t i = 0; i < places; i++)
                memcpy(out + i * node->fan_out, call.weights + node->fan_out * node->fan_in,
                       node->fan_out * sizeof *out);
        pk__layer_product(node, places, call.in[0], weights, transposed, (pk_real)pk__has_bias(node), out);
    } else {
        node->operation->forward(&call);
    }
}

PK__INTERNAL void pk__path_begin(pk__path *segment, const pk_real *weights, const pk_real *direction,
                                 const pk_real *transposed, size_t rows, const pk_real *inputs)
{
    const pk_graph *graph = segment->graph;
    segment->weights = weights;
    segment->direction = direction;
    segment->tape.transposed = transposed;
    segment->rows = rows;
    segment->held = 0;
    pk__path_use_means(segment, 0);
    segment->inputs = inputs;
    segment->base[0] = (pk_real *)inputs; /* only read */
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (segment->base[n])
            pk__path_affine(segment, node, weights, transposed, segment->base[n]);
        if (segment->slope[n])
            pk__path_affine(segment, node, direction, transposed ? transposed + graph->untied : NULL,
                            segment->slope[n]);
    }
}

/* The value of node n at points whose earlier nodes are there. */
static void pk__path_node(pk__path *segment, size_t n, size_t count, const size_t *row, const pk_real *t)
{
    const pk__line line = {segment->weights, segment->direction, t};
    const pk_node *node = &segment->graph->nodes[n];
    const size_t width = node->width;
    pk_real *value = segment->tape.value[n];
    const pk_real *base = segment->base[n], *slope = segment->slope[n];
    if (!node->varies) {
        if (segment->gathered[n])
            for (size_t p = 0; p < count; p++)
                memcpy(value + p * width, base + row[p] * width, width * sizeof *value);
    } else if (slope) {
        for (size_t p = 0; p < count; p++)
            for (size_t j = 0; j < width; j++)
                value[p * width + j] = base[row[p] * width + j] + t[p] * slope[row[p] * width + j];
    } else {
        pk__node_forward(&segment->tape, &line, node, count);
    }
}

/* Moves the tape's pointers forward by `first` points, or, with `again`, back. */
static void pk__shift_tape(pk__path *segment, size_t first, int again)
{
    for (size_t n = 0; n < segment->graph->node_count; n++) {
        const size_t numbers = first * segment->graph->nodes[n].width;
        pk_real **value = &segment->tape.value[n], **tangent = &segment->tape.tangent[n];
        *value = again ? *value - numbers : *value + numbers;
        if (*tangent)
            *tangent = again ? *tangent - numbers : *tangent + numbers;
    }
}

PK__INTERNAL size_t pk__path_append(pk__path *segment, size_t count, const size_t *row, const pk_real *t)
{
    const size_t first = count <= segment->point_capacity - segment->held ? segment->held : 0;
    segment->tape.value[0] = segment->input_points;
    pk__shift_tape(segment, first, 0);
    for (size_t n = 0; n < segment->graph->node_count; n++)
        pk__path_node(segment, n, count, row, t);
    pk__shift_tape(segment, first, 1);
    if (count)
        memcpy(segment->held_row + first, row, count * sizeof *row);
    if (count)
        memcpy(segment->held_t + first, t, count * sizeof *t);
    segment->held = first + count;
    return first;
}

/* Returns 1 if the tape already holds the values at these points, in this order; with `move`, it also moves them to the front
 * of the tape. */
static int pk__find_points(pk__path *segment, size_t count, const size_t *row, const pk_real *t, int move)
{
    for (size_t p = 0, at = 0, run; p < count; p += run, at += run) {
        while (at < segment->held && !(segment->held_row[at] == row[p] && segment->held_t[at] == t[p]))
            at++;
        for (run = 0; p + run < count && at + run < segment->held; run++)
            if (segment->held_row[at + run] != row[p + run] || segment->held_t[at + run] != t[p + run])
                break;
        if (!run)
            return 0;
        for (size_t n = 0; move && p < at && n < segment->graph->node_count; n++) {
            const size_t width = segment->graph->nodes[n].width;
            pk_real *value = segment->tape.value[n];
            memmove(value + p * width, value + at * width, run * width * sizeof *value);
        }
    }
    return 1;
}

PK__INTERNAL void pk__path_forward(pk__path *segment, size_t count, const size_t *row, const pk_real *t)
{
    if (!pk__find_points(segment, count, row, t, 0)) {
        segment->held = 0;
        pk__path_append(segment, count, row, t);
        return;
    }
    (void)pk__find_points(segment, count, row, t, 1);
    if (count)
        memcpy(segment->held_row, row, count * sizeof *row);
    if (count)
        memcpy(segment->held_t, t, count * sizeof *t);
    segment->held = count;
}

/* Whether a layer's part of the probe has the other sign: + - - + - + + - and so on (Thue and Morse), so that neither neighbours
 * nor distant layers go together. */
static int pk__probe_sign(const pk_node *node)
{
    unsigned bits = node->layer < 0 ? 0 : (unsigned)node->layer, odd = 0;
    for (; bits; bits >>= 1)
        odd ^= bits & 1;
    return (int)odd;
}

static void pk__negate(size_t count, pk_real *x)
{
    for (size_t i = 0; i < count; i++)
        x[i] = -x[i];
}

/* The tangent of a node along the direction with the other sign: -T(-x., d) = T(x., -d). */
static void pk__turned_tangent(pk__path *segment, const pk__line *line, const pk_node *node, size_t count)
{
    const pk_graph *graph = segment->graph;
    pk_real **tangent = segment->tape.tangent;
    for (int turn = 0; turn < 2; turn++) {
        for (int j = 0; j < node->input_count; j++) {
            int again = 0; /* an input that is read twice is turned once */
            for (int i = 0; i < j; i++)
                again |= node->inputs[i] == node->inputs[j];
            if (!again && graph->nodes[node->inputs[j]].varies)
                pk__negate(count * graph->nodes[node->inputs[j]].width, tangent[node->inputs[j]]);
        }
        if (!turn)
            pk__node_tangent(&segment->tape, line, node, count);
    }
    pk__negate(count * node->width, tangent[node - graph->nodes]);
}

static void pk__path_tangents(pk__path *segment, size_t first, size_t count, const size_t *row,
                              const pk_real *t, int probe)
{
    const pk_graph *graph = segment->graph;
    const pk__line line = {segment->weights, segment->direction, t};
    pk__shift_tape(segment, first, 0);
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        const int turned = probe && pk__probe_sign(node) && node->varies;
        for (size_t p = 0; segment->slope[n] && p < count; p++)
            memcpy(segment->tape.tangent[n] + p * node->width, segment->slope[n] + row[p] * node->width,
                   node->width * sizeof(pk_real));
        if (segment->slope[n] && turned)
            pk__negate(count * node->width, segment->tape.tangent[n]);
        if (!segment->slope[n] && turned)
            pk__turned_tangent(segment, &line, node, count);
        else if (!segment->slope[n])
            pk__node_tangent(&segment->tape, &line, node, count);
    }
    pk__shift_tape(segment, first, 1);
}

PK__INTERNAL void pk__path_tangent(pk__path *segment, size_t first, size_t count, const size_t *row,
                                   const pk_real *t)
{
    segment->tape.gap = segment->tape.from ? segment->gap : NULL;
    for (size_t p = 0; segment->tape.gap && p < count; p++)
        segment->gap[p] = 0;
    pk__path_tangents(segment, first, count, row, t, 0);
    segment->tape.gap = NULL;
}

PK__INTERNAL void pk__path_probe(pk__path *segment, size_t first, size_t count, const size_t *row,
                                 const pk_real *t)
{
    pk__path_tangents(segment, first, count, row, t, 1);
}

PK__INTERNAL size_t pk__path_sign_changes(pk__path *segment, size_t a, size_t b)
{
    size_t changes = 0;
    for (size_t n = 1; n < segment->graph->node_count; n++) {
        const pk_node *node = &segment->graph->nodes[n];
        if (!pk__is_switch(node))
            continue;
        const size_t switches = node->operation->switch_count(node);
        pk_real *at_a = segment->switch_values, *at_b = at_a + switches;
        for (int end = 0; end < 2; end++) {
            pk_call call;
            pk__pass_call(&segment->tape, node, 1, 1, &call);
            for (int j = 0; j < node->input_count; j++)
                call.in[j] += (end ? b : a) * call.in_width[j];
            call.out = end ? at_b : at_a;
            node->operation->switches(&call);
        }
        for (size_t i = 0; i < switches; i++)
            changes += (at_a[i] < 0 && at_b[i] > 0) || (at_a[i] > 0 && at_b[i] < 0);
    }
    return changes;
}

PK__INTERNAL void pk__path_reverse(pk__path *segment, size_t count, const pk_real *t, size_t copies)
{
    const pk__line line = {segment->weights, segment->direction, t};
    pk__pass_reverse(&segment->tape, &line, count, copies);
}

PK__END_CODE
/* <<< implementation */
#endif
