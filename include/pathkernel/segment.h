/* pathkernel/segment.h: a network along one step w + t d, 0 <= t <= 1: its values, tangents and cotangents
 * at points (row, t), and the kinks of its piecewise-linear parts.
 *
 * Along a step each pre-activation of a piecewise-linear network is a piecewise polynomial in t. Its sign
 * changes are found layer by layer: sample at degree + 1 nodes of each piece that the layers below left,
 * convert to Bernstein form, skip what keeps one sign, isolate the roots of the rest, split there.
 */
#ifndef PATHKERNEL_SEGMENT_H
#define PATHKERNEL_SEGMENT_H
#include "graph.h"

/* >>> declarations */
PK__BEGIN_C

/* Above this degree, or where a pre-activation is no polynomial, it is interpolated by a polynomial of this
 * degree on each piece, and the caller must judge the pieces by their closure. */
enum { PK_SEGMENT_DEGREE = 12 };

/* Pieces of rows: [a, b] of row; slack is the uncertainty of a (0 where a is no kink). */
typedef struct pk_pieces {
    size_t count, capacity;
    size_t *row;
    double *a, *b, *slack;
} pk_pieces;

/* One block of rows along one step; memory from an arena, one segment a thread. */
typedef struct pk_segment {
    const pk_graph *graph;
    size_t row_capacity, point_capacity;
    /* The step and the rows it is at: */
    const pk_real *weights, *direction, *inputs;
    size_t rows;
    /* Nodes that are constant or affine in t are evaluated once per row: base[n] + t slope[n]. */
    pk_real **base, **slope;
    int *gathered; /* a constant node that is needed at each point */
    pk_tape tape;  /* of the points */
    pk_real *input_points, *switch_values, *coefficients, *conversion[PK_SEGMENT_DEGREE + 1];
    size_t *point_row;
    pk_real *point_t;
    pk_pieces spare;
    double *roots; /* (t, slack) pairs */
    size_t root_capacity;
} pk_segment;

/* Takes a segment for blocks of rows rows, points points at a time, reverse_points of them with copies cotangents
 * each, pieces pieces at a time. gather: constant values are wanted at each point, too. */
PK_API void pk_segment_take(pk_arena *arena, const pk_graph *graph, size_t rows, size_t points,
                            size_t reverse_points, size_t copies, size_t pieces, int gather,
                            pk_segment *segment);
/* Moves it to a step and a block of rows (rows x input width). */
PK_API void pk_segment_begin(pk_segment *segment, const pk_real *weights, const pk_real *direction, size_t rows,
                             const pk_real *inputs);
/* Values at points (row[p], t[p]), p < count <= point_capacity, of the nodes before node number stop: in
 * segment->tape, point by point. Cost 4 P flops a point. */
PK_API void pk_segment_forward(pk_segment *segment, size_t count, const size_t *row, const pk_real *t,
                               size_t stop);
/* Tangents along the step's direction at the points of the last forward. */
PK_API void pk_segment_tangent(pk_segment *segment, size_t count, const size_t *row, const pk_real *t);
/* Cotangents at the points of the last forward from the seeds in pk_tape_seed(&segment->tape). */
PK_API void pk_segment_reverse(pk_segment *segment, size_t count, const pk_real *t, size_t copies);
/* to = the pieces from, split at the kinks inside them. 1, or 0 where the capacity does not suffice. Exact
 * for graphs with 0 <= degree <= PK_SEGMENT_DEGREE. Cost 4 P flops a sample. */
PK_API int pk_segment_split(pk_segment *segment, const pk_pieces *from, pk_pieces *to);

PK_API void pk_pieces_take(pk_arena *arena, size_t capacity, pk_pieces *pieces);
/* Appends a piece; the caller knows that it fits. */
PK_API void pk_pieces_push(pk_pieces *pieces, size_t row, double a, double b, double slack);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SEGMENT_IMPLEMENTED)
#define PATHKERNEL_SEGMENT_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_C

PK_API void pk_pieces_take(pk_arena *arena, size_t capacity, pk_pieces *pieces)
{
    pieces->count = 0;
    pieces->capacity = capacity;
    pieces->row = (size_t *)pk_arena_take(arena, capacity, sizeof *pieces->row);
    pieces->a = (double *)pk_arena_take(arena, capacity, sizeof *pieces->a);
    pieces->b = (double *)pk_arena_take(arena, capacity, sizeof *pieces->b);
    pieces->slack = (double *)pk_arena_take(arena, capacity, sizeof *pieces->slack);
}

PK_API void pk_pieces_push(pk_pieces *pieces, size_t row, double a, double b, double slack)
{
    size_t at = pieces->count++;
    pieces->row[at] = row;
    pieces->a[at] = a;
    pieces->b[at] = b;
    pieces->slack[at] = slack;
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

static int pk__sample_degree(const pk_node *node)
{
    return node->degree >= 0 && node->degree <= PK_SEGMENT_DEGREE ? node->degree : (int)PK_SEGMENT_DEGREE;
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
    enum { N = PK_SEGMENT_DEGREE + 1 };
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

PK_API void pk_segment_take(pk_arena *arena, const pk_graph *graph, size_t rows, size_t points,
                            size_t reverse_points, size_t copies, size_t pieces, int gather,
                            pk_segment *segment)
{
    size_t count = graph->node_count, switches = 0;
    memset(segment, 0, sizeof *segment);
    points = pk__most(points, PK_SEGMENT_DEGREE + 1); /* the samples of one piece */
    segment->graph = graph;
    segment->row_capacity = rows;
    segment->point_capacity = points;
    segment->base = (pk_real **)pk_arena_take(arena, count, sizeof *segment->base);
    segment->slope = (pk_real **)pk_arena_take(arena, count, sizeof *segment->slope);
    segment->gathered = (int *)pk_arena_take(arena, count, sizeof *segment->gathered);
    for (size_t n = 0; n < count && segment->gathered; n++)
        segment->gathered[n] = 0;
    for (size_t n = 0; n < count; n++) {
        const pk_node *node = &graph->nodes[n];
        int affine = n && pk__is_affine(node), constant = n && !node->varies;
        pk_real *base =
            affine || constant ? (pk_real *)pk_arena_take(arena, rows, node->width * sizeof *base) : NULL;
        pk_real *slope = affine ? (pk_real *)pk_arena_take(arena, rows, node->width * sizeof *slope) : NULL;
        if (segment->base) {
            segment->base[n] = base;
            segment->slope[n] = slope;
        }
        if (n && node->varies && (gather || !affine || !pk__is_outer(node)) && segment->gathered)
            for (int j = 0; j < node->input_count; j++)
                segment->gathered[node->inputs[j]] |= !graph->nodes[node->inputs[j]].varies;
        if (n && pk__is_switch(node)) {
            int degree = pk__sample_degree(node);
            switches = pk__most(switches, node->operation->switch_count(node));
            if (!segment->conversion[degree]) {
                size_t square = (size_t)(degree + 1) * (size_t)(degree + 1);
                segment->conversion[degree] = (pk_real *)pk_arena_take(arena, square, sizeof(pk_real));
                if (segment->conversion[degree])
                    pk__bernstein_conversion(degree, segment->conversion[degree]);
            }
        }
    }
    pk_tape_take_parts(arena, graph, points, reverse_points, copies, 1, &segment->tape);
    segment->input_points = (pk_real *)pk_arena_take(arena, points, graph->input_width * sizeof(pk_real));
    segment->switch_values = (pk_real *)pk_arena_take(arena, points, switches * sizeof(pk_real));
    segment->coefficients = (pk_real *)pk_arena_take(arena, PK_SEGMENT_DEGREE + 1, switches * sizeof(pk_real));
    segment->point_row = (size_t *)pk_arena_take(arena, points, sizeof *segment->point_row);
    segment->point_t = (pk_real *)pk_arena_take(arena, points, sizeof *segment->point_t);
    pk_pieces_take(arena, pieces, &segment->spare);
    segment->root_capacity = pieces;
    segment->roots = (double *)pk_arena_take(arena, pieces, 2 * sizeof *segment->roots);
}

PK_API void pk_segment_begin(pk_segment *segment, const pk_real *weights, const pk_real *direction, size_t rows,
                             const pk_real *inputs)
{
    const pk_graph *graph = segment->graph;
    segment->weights = weights;
    segment->direction = direction;
    segment->rows = rows;
    segment->inputs = inputs;
    segment->base[0] = (pk_real *)inputs; /* only read */
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!segment->base[n])
            continue;
        pk_call call;
        pk__tape_call(&segment->tape, node, rows, 1, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] = segment->base[node->inputs[j]];
        call.weights = weights + node->weight_offset;
        call.out = segment->base[n];
        node->operation->forward(&call);
        if (segment->slope[n]) {
            call.weights = direction + node->weight_offset;
            call.out = segment->slope[n];
            node->operation->forward(&call);
        }
    }
}

PK_API void pk_segment_forward(pk_segment *segment, size_t count, const size_t *row, const pk_real *t,
                               size_t stop)
{
    const pk_graph *graph = segment->graph;
    const pk_line line = {segment->weights, segment->direction, t};
    segment->tape.value[0] = segment->input_points;
    for (size_t n = 0; n < stop; n++) {
        const pk_node *node = &graph->nodes[n];
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
}

PK_API void pk_segment_tangent(pk_segment *segment, size_t count, const size_t *row, const pk_real *t)
{
    const pk_graph *graph = segment->graph;
    const pk_line line = {segment->weights, segment->direction, t};
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (segment->slope[n])
            for (size_t p = 0; p < count; p++)
                memcpy(segment->tape.tangent[n] + p * node->width, segment->slope[n] + row[p] * node->width,
                       node->width * sizeof(pk_real));
        else
            pk__node_tangent(&segment->tape, &line, node, count);
    }
}

PK_API void pk_segment_reverse(pk_segment *segment, size_t count, const pk_real *t, size_t copies)
{
    const pk_line line = {segment->weights, segment->direction, t};
    pk_tape_reverse(&segment->tape, &line, count, copies);
}

/* ---- kinks ----------------------------------------------------------------------------------------- */

/* c (degree + 1) at x by de Casteljau; left and right (may be NULL) are the halves, *slope the derivative. */
static double pk__casteljau(int degree, const double *c, double x, double *left, double *right, double *slope)
{
    double work[PK_SEGMENT_DEGREE + 1];
    memcpy(work, c, (size_t)(degree + 1) * sizeof *work);
    if (slope)
        *slope = degree == 1 ? c[1] - c[0] : 0;
    for (int k = 0; k <= degree; k++) {
        if (left)
            left[k] = work[0];
        if (right)
            right[degree - k] = work[degree - k];
        if (slope && degree - k == 1)
            *slope = degree * (work[1] - work[0]);
        for (int i = 0; i < degree - k; i++)
            work[i] = (1 - x) * work[i] + x * work[i + 1];
    }
    return work[0];
}

/* The one root of c, of which the ends have opposite signs: false position (Illinois) with bisection. */
static double pk__bracketed_root(int degree, const double *c)
{
    double lo = 0, hi = 1, at_lo = c[0], at_hi = c[degree];
    if (degree == 1)
        return at_lo / (at_lo - at_hi);
    for (int i = 0, side = 0; i < 200 && hi - lo > DBL_EPSILON * hi; i++) {
        double x = i % 4 == 3 ? 0.5 * (lo + hi) : lo + (hi - lo) * (at_lo / (at_lo - at_hi));
        if (!(x > lo && x < hi))
            x = 0.5 * (lo + hi);
        if (!(x > lo && x < hi))
            break;
        double value = pk__casteljau(degree, c, x, NULL, NULL, NULL);
        if (value == 0)
            return x;
        if ((value > 0) == (at_hi > 0)) {
            hi = x;
            at_hi = value;
            if (side == 1)
                at_lo *= 0.5;
            side = 1;
        } else {
            lo = x;
            at_lo = value;
            if (side == -1)
                at_hi *= 0.5;
            side = -1;
        }
    }
    return 0.5 * (lo + hi);
}

/* Where roots go: t = a + (b - a) x for x in the local [lo, hi], scale is the size of the polynomial. */
typedef struct pk__root_sink {
    double a, b, scale;
    double *roots;
    size_t count, capacity;
} pk__root_sink;

static void pk__push_root(pk__root_sink *sink, double x, double slope)
{
    if (sink->count < sink->capacity) {
        double length = sink->b - sink->a;
        /* Rounding moves the zero of z by its own error over |dz/dt|. */
        double slack = 64 * DBL_EPSILON * sink->scale / (fabs(slope) + DBL_MIN);
        sink->roots[2 * sink->count] = sink->a + length * x;
        sink->roots[2 * sink->count + 1] = length * (slack < 1 ? slack : 1);
    }
    sink->count++; /* beyond the capacity: the caller sees it */
}

/* Pushes the sign changes inside (lo, hi) of the polynomial with Bernstein coefficients c on [lo, hi]. */
static void pk__isolate(int degree, const double *c, double lo, double hi, pk__root_sink *sink)
{
    int changes = 0;
    double last = 0;
    for (int i = 0; i <= degree; i++)
        if (c[i] != 0) {
            changes += last != 0 && (c[i] > 0) != (last > 0);
            last = c[i];
        }
    if (changes == 0 || sink->count > sink->capacity)
        return;
    if (changes == 1 && c[0] != 0 && c[degree] != 0) {
        double slope = 0, x = pk__bracketed_root(degree, c);
        pk__casteljau(degree, c, x, NULL, NULL, &slope);
        pk__push_root(sink, lo + (hi - lo) * x, slope / (hi - lo));
        return;
    }
    double middle = 0.5 * (lo + hi), left[PK_SEGMENT_DEGREE + 1], right[PK_SEGMENT_DEGREE + 1];
    if (hi - lo < 4 * DBL_EPSILON) {
        /* A cluster that touches zero: one split serves them all. */
        pk__push_root(sink, middle, 0);
        return;
    }
    if (pk__casteljau(degree, c, 0.5, left, right, NULL) == 0)
        pk__push_root(sink, middle, degree * 2 * (right[1] - right[0]) / (hi - lo));
    pk__isolate(degree, left, lo, middle, sink);
    pk__isolate(degree, right, middle, hi, sink);
}

/* The sign changes of one piece's switch functions, whose samples stand in switch_values at point first. */
static void pk__piece_roots(pk_segment *segment, int degree, size_t switches, size_t first, pk__root_sink *sink)
{
    const pk_real *values = segment->switch_values + first * switches;
    pk_real *coefficients = segment->coefficients;
    const pk_real *conversion = segment->conversion[degree];
    for (int k = 0; k <= degree; k++) {
        pk_real *to = coefficients + (size_t)k * switches;
        if (k == 0 || k == degree) { /* end coefficients are end values, exactly */
            memcpy(to, values + (size_t)k * switches, switches * sizeof *to);
            continue;
        }
        memset(to, 0, switches * sizeof *to);
        for (int i = 0; i <= degree; i++) {
            const pk_real *from = values + (size_t)i * switches;
            const pk_real factor = conversion[k * (degree + 1) + i];
            for (size_t j = 0; j < switches; j++)
                to[j] += factor * from[j];
        }
    }
    for (size_t j = 0; j < switches; j++) {
        double c[PK_SEGMENT_DEGREE + 1], low = coefficients[j], high = low;
        for (int k = 0; k <= degree; k++) {
            c[k] = coefficients[(size_t)k * switches + j];
            low = c[k] < low ? c[k] : low;
            high = c[k] > high ? c[k] : high;
        }
        if (!(low < 0 && high > 0))
            continue;
        sink->scale = high - low;
        pk__isolate(degree, c, 0, 1, sink);
    }
}

/* Appends [a, b] of row to pieces, split at the roots. 0 where it does not fit. */
static int pk__append_split(pk_pieces *pieces, size_t row, double a, double b, double slack,
                            pk__root_sink *sink)
{
    double *roots = sink->roots;
    if (sink->count > sink->capacity)
        return 0;
    for (size_t i = 1; i < sink->count; i++) { /* insertion sort of pairs: few */
        double t = roots[2 * i], own = roots[2 * i + 1];
        size_t k = i;
        for (; k > 0 && roots[2 * k - 2] > t; k--) {
            roots[2 * k] = roots[2 * k - 2];
            roots[2 * k + 1] = roots[2 * k - 1];
        }
        roots[2 * k] = t;
        roots[2 * k + 1] = own;
    }
    const double least = 4 * DBL_EPSILON;
    for (size_t i = 0; i < sink->count; i++) {
        double t = roots[2 * i], own = roots[2 * i + 1];
        if (t - a <= least || b - t <= least) {
            slack = own > slack ? own : slack;
            continue;
        }
        if (pieces->count == pieces->capacity)
            return 0;
        pk_pieces_push(pieces, row, a, t, slack);
        a = t;
        slack = own;
    }
    if (pieces->count == pieces->capacity)
        return 0;
    pk_pieces_push(pieces, row, a, b, slack);
    return 1;
}

/* Splits from at the kinks of one node into to. */
static int pk__split_node(pk_segment *segment, const pk_node *node, const pk_pieces *from, pk_pieces *to)
{
    int degree = pk__sample_degree(node);
    size_t samples = (size_t)degree + 1, switches = node->operation->switch_count(node);
    size_t chunk = segment->point_capacity / samples;
    to->count = 0;
    for (size_t first = 0; first < from->count; first += chunk) {
        size_t count = pk__least(chunk, from->count - first);
        for (size_t i = 0; i < count; i++)
            for (size_t k = 0; k < samples; k++) {
                double a = from->a[first + i], b = from->b[first + i];
                segment->point_row[i * samples + k] = from->row[first + i];
                segment->point_t[i * samples + k] = (pk_real)(a + (b - a) * pk__sample_node(degree, (int)k));
            }
        pk_segment_forward(segment, count * samples, segment->point_row, segment->point_t,
                           (size_t)(node - segment->graph->nodes));
        pk_call call;
        pk__tape_call(&segment->tape, node, count * samples, 1, &call);
        call.out = segment->switch_values;
        node->operation->switches(&call);
        for (size_t i = 0; i < count; i++) {
            size_t at = first + i;
            pk__root_sink sink = {from->a[at], from->b[at], 1, segment->roots, 0, segment->root_capacity};
            pk__piece_roots(segment, degree, switches, i * samples, &sink);
            if (!pk__append_split(to, from->row[at], from->a[at], from->b[at], from->slack[at], &sink))
                return 0;
        }
    }
    return 1;
}

static void pk__copy_pieces(const pk_pieces *from, pk_pieces *to)
{
    to->count = from->count;
    memcpy(to->row, from->row, from->count * sizeof *to->row);
    memcpy(to->a, from->a, from->count * sizeof *to->a);
    memcpy(to->b, from->b, from->count * sizeof *to->b);
    memcpy(to->slack, from->slack, from->count * sizeof *to->slack);
}

PK_API int pk_segment_split(pk_segment *segment, const pk_pieces *from, pk_pieces *to)
{
    const pk_graph *graph = segment->graph;
    if (from->count > to->capacity)
        return 0;
    pk__copy_pieces(from, to);
    for (size_t n = 1; n < graph->node_count; n++) {
        if (!pk__is_switch(&graph->nodes[n]))
            continue;
        if (!pk__split_node(segment, &graph->nodes[n], to, &segment->spare) ||
            segment->spare.count > to->capacity)
            return 0;
        pk__copy_pieces(&segment->spare, to);
    }
    return 1;
}

PK__END_C
/* <<< implementation */
#endif
