/* pathkernel/path/kinks.h: the kinks of a network along one step, that is the values of t at which the slope of a
 * piecewise-linear operation jumps, and the pieces of the step between them.
 *
 * A piecewise-linear operation has switch functions (a ReLU: its input; a maximum: the differences of its inputs), and a
 * kink is a sign change of one of them. On a step w + t d, a pre-activation is a polynomial in t as long as no operation
 * before it has a kink. The nodes of the graph are therefore searched in their order, with pieces that get shorter:
 *
 *   1. Take a piece without kinks of earlier nodes. Evaluate the switch functions of the next node at degree + 1 Chebyshev
 *      points of the piece; they determine each polynomial.
 *   2. Convert each to Bernstein form. Its coefficients bound the polynomial, so that one whose coefficients have the same
 *      sign has no root; this rules out nearly all of them at the cost of one small matrix product.
 *   3. Isolate the roots of the others by Descartes' rule of signs: as many roots as sign changes of the coefficients, or
 *      an even number less. With one sign change, false position finds the root; with more, de Casteljau's algorithm
 *      halves the interval. Split the piece at the roots.
 *   4. A piece without roots goes on to the next node with the values it has. Only parts of a split piece are evaluated
 *      again. At the end, the pieces are sorted by row and t.
 *
 * Where a smooth operation comes before, a switch function is not a polynomial, and the samples interpolate it with degree
 * PK__PATH_DEGREE:
 *
 *   5. The last Chebyshev coefficients of the interpolant estimate its error. Where that error leaves the number of roots
 *      undecided, the piece is halved for the search alone; halves without a kink between them are joined afterwards.
 *   6. Newton's method moves each root of the interpolant to the root of the function itself, evaluated by the network.
 *
 * Each kink has a slack: the distance within which its switch function cannot be told from zero, because of rounding and
 * of the error that remains after step 6. The quadrature computes from it what a misplaced kink may cost.
 *
 * References: G. E. Collins and A. G. Akritas, Polynomial real root isolation using Descartes' rule of signs, 1976;
 * J. M. Lane and R. F. Riesenfeld, Bounds on a polynomial, BIT 21, 1981.
 */
#ifndef PATHKERNEL_KINKS_H
#define PATHKERNEL_KINKS_H
#include "path.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_KINKS_INTERNALS_KNOWN)
#define PATHKERNEL_KINKS_INTERNALS_KNOWN
/* >>> internals */
/* to := the pieces of `from`, split at the kinks inside them and sorted by row and t. Returns 1, or 0 if the capacity of
 * `to` or of the segment's own lists does not suffice. Exact for graphs with 0 <= degree <= PK__PATH_DEGREE. Cost: 4 P flops
 * for each sample. */
PK__INTERNAL int pk__path_split(pk__path *segment, const pk__pieces *from, pk__pieces *to);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_KINKS_IMPLEMENTED)
#define PATHKERNEL_KINKS_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* The polynomial with the Bernstein coefficients c (degree + 1) at x, by de Casteljau's algorithm. left and right (each may
 * be NULL): its coefficients on [0, x] and [x, 1]; *slope (may be NULL): its derivative at x. */
static double pk__casteljau(int degree, const double *c, double x, double *left, double *right, double *slope)
{
    double work[PK__PATH_DEGREE + 1];
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

/* The root of c on [0, 1], where its ends have opposite signs and there is only one: false position (the Illinois
 * variant), with a bisection in every fourth step. */
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

/* Collects the roots of a piece [a, b]: t = a + (b - a) x for a root x in [0, 1]. The polynomial approximates switch function
 * number `at` up to `rounding`, and up to `error` if it is an interpolant. */
typedef struct pk__root_sink {
    double a, b, rounding, error;
    size_t at;
    pk__root *roots;
    size_t count, capacity;
} pk__root_sink;

/* Estimates how far from its root x the polynomial c stays below `uncertain` in size: the least of the distances at which
 * the k-th term of its Taylor series reaches it. For a double root this is a square root, and no slope of zero divides. */
static double pk__root_slack(int degree, const double *c, double x, double uncertain)
{
    double work[PK__PATH_DEGREE + 1], least = 1, factor = 1;
    memcpy(work, c, (size_t)(degree + 1) * sizeof *work);
    for (int k = 1; k <= degree; k++) {
        factor *= (double)(degree - k + 1) / k;
        for (int i = 0; i <= degree - k; i++)
            work[i] = work[i + 1] - work[i];
        const double size = factor * fabs(pk__casteljau(degree - k, work, x, NULL, NULL, NULL));
        if (uncertain < size) {
            const double width = k == 1 ? uncertain / size : pow(uncertain / size, 1.0 / k);
            least = width < least ? width : least;
        }
    }
    return 2 * least < 1 ? 2 * least : 1;
}

/* Adds the root x of the polynomial c, whose [0, 1] is the part [lo, hi] of the piece. */
static void pk__push_root(pk__root_sink *sink, int degree, const double *c, double x, double lo, double hi)
{
    if (sink->count < sink->capacity) {
        const double length = (sink->b - sink->a) * (hi - lo);
        pk__root *root = &sink->roots[sink->count];
        double slope = 0;
        pk__casteljau(degree, c, x, NULL, NULL, &slope);
        root->t = sink->a + (sink->b - sink->a) * (lo + (hi - lo) * x);
        root->slack = length * pk__root_slack(degree, c, x, sink->rounding + sink->error);
        root->slope = slope / length;
        root->rounding = sink->rounding;
        root->at = sink->at;
    }
    sink->count++; /* beyond the capacity: the caller sees it */
}

/* The number of sign changes in the sequence c; numbers of size at most `drop` are left out. */
static int pk__sign_changes(int degree, const double *c, double drop)
{
    int changes = 0;
    double last = 0;
    for (int i = 0; i <= degree; i++)
        if (fabs(c[i]) > drop) {
            changes += last != 0 && (c[i] > 0) != (last > 0);
            last = c[i];
        }
    return changes;
}

/* Adds the roots with a sign change inside (lo, hi) of the polynomial that has the Bernstein coefficients c on [lo, hi]. */
static void pk__isolate(int degree, const double *c, double lo, double hi, pk__root_sink *sink)
{
    const int changes = pk__sign_changes(degree, c, 0);
    if (changes == 0 || sink->count > sink->capacity)
        return;
    if (changes == 1 && c[0] != 0 && c[degree] != 0) {
        pk__push_root(sink, degree, c, pk__bracketed_root(degree, c), lo, hi);
        return;
    }
    double middle = 0.5 * (lo + hi), left[PK__PATH_DEGREE + 1], right[PK__PATH_DEGREE + 1];
    if (hi - lo < 4 * DBL_EPSILON) {
        /* A cluster that touches zero: one split serves them all. */
        pk__push_root(sink, degree, c, 0.5, lo, hi);
        return;
    }
    if (pk__casteljau(degree, c, 0.5, left, right, NULL) == 0)
        pk__push_root(sink, degree, right, 0, middle, hi);
    pk__isolate(degree, left, lo, middle, sink);
    pk__isolate(degree, right, middle, hi, sink);
}

/* Whether switch function j is zero throughout the piece, up to rounding at its ends: the difference of two units that are
 * both zero there, such as two rectified ones that compete in a max pool. Splitting the piece would only make it shorter. */
static int pk__is_dead(const pk__path *segment, size_t switches, size_t j, const pk_real *values)
{
    double largest = 0;
    for (int k = 1; k < segment->degree; k++)
        if (values[(size_t)k * switches + j] != 0)
            return 0;
    if (segment->degree < 2)
        return 0;
    for (size_t i = 0; i < switches; i++)
        largest = fabs(values[i]) > largest ? fabs(values[i]) : largest;
    return fabs(values[j]) <= 64 * PK__EPSILON * largest &&
           fabs(values[(size_t)segment->degree * switches + j]) <= 64 * PK__EPSILON * largest;
}

enum {
    PK__SWITCH_ROUNDINGS = 16, /* the error of a switch function, in roundings of the largest one of its node */
    PK__NEWTON_STEPS = 4,
    PK__NEWTON_POINTS = 8 /* roots that are refined at a time: points after those of the samples */
};
/* Pieces are halved down to this length in order to separate the roots of a switch function. */
#define PK__SHORTEST_SEARCH 1e-6

/* Estimates the error of the interpolant of switch function j by the largest of its last three Chebyshev coefficients, since
 * these decrease roughly geometrically. */
static double pk__interpolation_error(const pk__path *segment, size_t switches, size_t j, const pk_real *values)
{
    double largest = 0;
    for (int i = 0; i < 3; i++) {
        double sum = 0;
        for (int k = 0; k <= PK__PATH_DEGREE; k++)
            sum += segment->tail[i][k] * values[(size_t)k * switches + j];
        largest = fabs(sum) > largest ? fabs(sum) : largest;
    }
    return 4 * largest;
}

/* The largest of the coefficients of a layer's switch functions. */
static double pk__largest_coefficient(const pk_real *coefficients, size_t count)
{
    double largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = fabs((double)coefficients[i]) > largest ? fabs((double)coefficients[i]) : largest;
    return largest;
}

/* Adds the roots of a piece's switch functions to sink; the samples begin at point `first` of switch_values. The functions are
 * polynomials of degree 1 (linear; two samples suffice), of the samples' degree, or interpolated (exact == 0). Returns 1 if
 * the error of an interpolant leaves the number of its roots undecided and the piece may still be halved (!shortest). */
static int pk__piece_roots(pk__path *segment, int linear, int exact, int shortest, size_t switches,
                           size_t first, pk__root_sink *sink)
{
    const int degree = linear ? 1 : segment->degree;
    const pk_real *values = segment->switch_values + first * switches;
    pk_real *coefficients = segment->coefficients;
    double largest = -1;
    for (int k = 0; k <= degree; k++) {
        pk_real *to = coefficients + (size_t)k * switches;
        if (k == 0 || k == degree) { /* end coefficients are end values, exactly */
            memcpy(to, values + (size_t)(k ? segment->degree : 0) * switches, switches * sizeof *to);
            continue;
        }
        memset(to, 0, switches * sizeof *to);
        for (int i = 0; i <= degree; i++) {
            const pk_real *from = values + (size_t)i * switches;
            const pk_real factor = segment->conversion[k * (degree + 1) + i];
            for (size_t j = 0; j < switches; j++)
                to[j] += factor * from[j];
        }
    }
    for (size_t j = 0; j < switches; j++) {
        double c[PK__PATH_DEGREE + 1], low = coefficients[j], high = low, error = 0;
        for (int k = 0; k <= degree; k++) {
            c[k] = coefficients[(size_t)k * switches + j];
            low = c[k] < low ? c[k] : low;
            high = c[k] > high ? c[k] : high;
        }
        if (!exact && 4 * low < high && low < 4 * high) /* a root is possible */
            error = pk__interpolation_error(segment, switches, j, values);
        if (!(low < error && high > -error && (low < 0 || high > 0)) ||
            pk__is_dead(segment, switches, j, values))
            continue;
        if (largest < 0)
            largest = pk__largest_coefficient(coefficients, ((size_t)degree + 1) * switches);
        const double rounding = PK__SWITCH_ROUNDINGS * PK__EPSILON * largest;
        if (!shortest && error > 32 * rounding &&
            (pk__sign_changes(degree, c, 0) != 1 || fabs(c[0]) <= error || fabs(c[degree]) <= error))
            return 1;
        /* A function that is zero at an end may grow like t^2 from there, as in a branch whose weights start at zero. Sign
         * changes below the rounding are then no kinks. */
        if ((c[0] == 0 || c[degree] == 0) && pk__sign_changes(degree, c, rounding) == 0)
            continue;
        sink->rounding = rounding;
        sink->error = error;
        sink->at = j;
        pk__isolate(degree, c, 0, 1, sink);
    }
    return 0;
}

/* The switch functions of node n at `count` more points, which are stored after the `used` points of the samples. */
static const pk_real *pk__switches_behind(pk__path *segment, size_t n, size_t used, size_t count)
{
    const pk_node *node = &segment->graph->nodes[n];
    pk_real *out = segment->switch_values + used * node->operation->switch_count(node);
    pk_call call;
    pk__shift_tape(segment, used, 0);
    for (size_t m = 0; m < n; m++)
        pk__path_node(segment, m, count, segment->point_row + used, segment->point_t + used);
    pk__pass_call(&segment->tape, node, count, 1, &call);
    call.out = out;
    node->operation->switches(&call);
    pk__shift_tape(segment, used, 1);
    return out;
}

/* Moves roots of interpolants, of a piece [a, b] of a row, to the roots of the switch functions of node n: Newton's method
 * with the slopes of the interpolants, as long as it reduces the size of the function. */
static void pk__refine_roots(pk__path *segment, size_t n, size_t used, size_t row, double a, double b,
                             size_t count, pk__root *roots)
{
    const pk_node *node = &segment->graph->nodes[n];
    const size_t switches = node->operation->switch_count(node);
    double best_t[PK__NEWTON_POINTS], best[PK__NEWTON_POINTS];
    for (size_t r = 0; r < count; r++) {
        best_t[r] = roots[r].t;
        best[r] = -1;
    }
    for (int step = 0; step < PK__NEWTON_STEPS; step++) {
        int moved = 0;
        for (size_t r = 0; r < count; r++) {
            segment->point_row[used + r] = row;
            segment->point_t[used + r] = (pk_real)roots[r].t;
        }
        const pk_real *z = pk__switches_behind(segment, n, used, count);
        for (size_t r = 0; r < count; r++) {
            const double value = (double)z[r * switches + roots[r].at];
            double t = roots[r].t - value / roots[r].slope;
            if (best[r] >= 0 && !(fabs(value) < best[r]))
                continue;
            best[r] = fabs(value);
            best_t[r] = roots[r].t;
            t = t < a ? a : t > b ? b : t;
            if (!(fabs(t - roots[r].t) > DBL_EPSILON))
                continue;
            roots[r].t = t;
            moved = 1;
        }
        if (!moved)
            break;
    }
    for (size_t r = 0; r < count; r++) {
        const double left = 2 * (best[r] + roots[r].rounding) / fabs(roots[r].slope);
        roots[r].t = best_t[r];
        roots[r].slack = left < roots[r].slack ? left : roots[r].slack;
    }
}

static void pk__sort_roots(size_t count, pk__root *roots)
{
    for (size_t i = 1; i < count; i++) { /* insertion sort: few */
        const pk__root root = roots[i];
        size_t k = i;
        for (; k > 0 && roots[k - 1].t > root.t; k--)
            roots[k] = roots[k - 1];
        roots[k] = root;
    }
}

/* Appends a piece, split at the roots, to pieces. Returns the number of parts, or 0 if they do not fit. */
static size_t pk__append_split(pk__pieces *pieces, const pk__piece *piece, pk__root_sink *sink)
{
    const size_t before = pieces->count;
    const double least = 4 * PK__EPSILON;
    pk__piece rest = *piece;
    if (sink->count > sink->capacity || pieces->count + sink->count + 1 > pieces->capacity)
        return 0;
    pk__sort_roots(sink->count, sink->roots);
    for (size_t i = 0; i < sink->count; i++) {
        const double t = sink->roots[i].t, slack = sink->roots[i].slack;
        if (t - rest.a <= least) {
            rest.slack_a = slack > rest.slack_a ? slack : rest.slack_a;
            rest.joined = 0;
        } else if (rest.b - t <= least) {
            rest.slack_b = slack > rest.slack_b ? slack : rest.slack_b;
        } else {
            pk__piece part = rest;
            part.b = t;
            part.slack_b = slack;
            pieces->piece[pieces->count++] = part;
            rest.a = t;
            rest.slack_a = slack;
            rest.joined = 0;
        }
    }
    pieces->piece[pieces->count++] = rest;
    return pieces->count - before;
}

/* Moves as many pending pieces to the batch as there are points for, and sets their sample points. */
static void pk__begin_batch(pk__path *segment)
{
    pk__pieces *pending = &segment->pending, *batch = &segment->batch;
    const size_t samples = (size_t)segment->degree + 1;
    const size_t most = (segment->point_capacity - (segment->interpolates ? PK__NEWTON_POINTS : 0)) / samples;
    batch->count = 0;
    while (pending->count && batch->count < most) {
        const size_t top = --pending->count, i = batch->count++;
        const pk__piece *piece = &pending->piece[top];
        segment->batch_start[i] = segment->pending_start[top];
        batch->piece[i] = *piece;
        for (size_t k = 0; k < samples; k++) {
            segment->point_row[i * samples + k] = piece->row;
            segment->point_t[i * samples + k] =
                (pk_real)(piece->a + (piece->b - piece->a) * pk__sample_node(segment->degree, (int)k));
        }
    }
}

/* Moves piece `from` of the batch to number `to`, with the values at its samples that node n and later ones need. */
static void pk__keep_piece(pk__path *segment, size_t n, size_t from, size_t to)
{
    const size_t samples = (size_t)segment->degree + 1;
    pk__pieces *batch = &segment->batch;
    if (from == to)
        return;
    batch->piece[to] = batch->piece[from];
    segment->batch_start[to] = segment->batch_start[from];
    memcpy(segment->point_row + to * samples, segment->point_row + from * samples,
           samples * sizeof *segment->point_row);
    memcpy(segment->point_t + to * samples, segment->point_t + from * samples,
           samples * sizeof *segment->point_t);
    for (size_t m = 0; m < n; m++) {
        const pk_node *node = &segment->graph->nodes[m];
        const size_t count = samples * node->width;
        if (segment->last_read[m] >= n && (node->varies || segment->gathered[m]))
            memcpy(segment->tape.value[m] + to * count, segment->tape.value[m] + from * count,
                   count * sizeof(pk_real));
    }
}

/* Makes both halves of a piece pending; they are joined again after the search. Returns 0 if there is no room. */
static int pk__halve_search(pk__path *segment, const pk__piece *piece, size_t n)
{
    pk__pieces *pending = &segment->pending;
    if (pending->count + 2 > pending->capacity)
        return 0;
    for (int half = 0; half < 2; half++) {
        pk__piece part = *piece;
        const double middle = 0.5 * (piece->a + piece->b);
        if (half) {
            part.a = middle;
            part.slack_a = 0;
            part.joined = 1;
        } else {
            part.b = middle;
            part.slack_b = 0;
        }
        segment->pending_start[pending->count] = n;
        pending->piece[pending->count++] = part;
    }
    return 1;
}

/* Searches the switch functions of node n: a piece with kinks leaves the batch, and its parts become pending. Returns 0 if
 * there is no room. */
static int pk__split_batch(pk__path *segment, size_t n)
{
    const pk_node *node = &segment->graph->nodes[n];
    const size_t samples = (size_t)segment->degree + 1, switches = node->operation->switch_count(node);
    const size_t used = segment->batch.count * samples;
    const int exact = pk__is_polynomial(node);
    pk__pieces *batch = &segment->batch, *pending = &segment->pending;
    size_t kept = 0;
    pk_call call;
    pk__pass_call(&segment->tape, node, used, 1, &call);
    call.out = segment->switch_values;
    node->operation->switches(&call);
    for (size_t i = 0; i < batch->count; i++) {
        if (segment->batch_start[i] <= n) {
            const pk__piece piece = batch->piece[i];
            const int shortest = piece.b - piece.a <= PK__SHORTEST_SEARCH;
            pk__root_sink sink = {piece.a, piece.b, 0, 0, 0, segment->roots, 0, segment->root_capacity};
            if (pk__piece_roots(segment, node->input_degree == 1, exact, shortest, switches, i * samples, &sink)) {
                if (!pk__halve_search(segment, &piece, n))
                    return 0;
                continue;
            }
            if (sink.count > sink.capacity)
                return 0;
            for (size_t r = 0; !exact && r < sink.count; r += PK__NEWTON_POINTS)
                pk__refine_roots(segment, n, used, piece.row, piece.a, piece.b,
                                 pk__min(PK__NEWTON_POINTS, sink.count - r), sink.roots + r);
            const size_t parts = pk__append_split(pending, &piece, &sink);
            if (!parts)
                return 0;
            for (size_t k = 0; k < parts; k++)
                segment->pending_start[pending->count - 1 - k] = n + 1;
            if (parts > 1)
                continue;
            batch->piece[i] = pending->piece[--pending->count]; /* it has no kink and stays */
        }
        pk__keep_piece(segment, n, i, kept++);
    }
    batch->count = kept;
    return 1;
}

typedef int pk__piece_order(const pk__piece *piece, const pk__piece *other);

/* By row, then by t. */
PK__PRIVATE int pk__precedes_by_place(const pk__piece *piece, const pk__piece *other)
{
    return piece->row < other->row || (piece->row == other->row && piece->a < other->a);
}

/* Shell sort: in place. */
PK__PRIVATE void pk__sort_pieces(pk__pieces *pieces, pk__piece_order *precedes)
{
    size_t gap = 1;
    while (gap < pieces->count / 3)
        gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (size_t i = gap; i < pieces->count; i++) {
            const pk__piece piece = pieces->piece[i];
            size_t k = i;
            for (; k >= gap && precedes(&piece, &pieces->piece[k - gap]); k -= gap)
                pieces->piece[k] = pieces->piece[k - gap];
            pieces->piece[k] = piece;
        }
}

/* Joins the halves of pieces that were halved for the search alone; the pieces are sorted. */
static void pk__join_pieces(pk__pieces *pieces)
{
    size_t kept = 0;
    for (size_t i = 0; i < pieces->count; i++) {
        const pk__piece piece = pieces->piece[i];
        pk__piece *last = kept ? &pieces->piece[kept - 1] : NULL;
        if (last && piece.joined && last->row == piece.row && last->b == piece.a && last->slack_b == 0) {
            last->b = piece.b;
            last->slack_b = piece.slack_b;
        } else {
            pieces->piece[kept++] = piece;
        }
    }
    pieces->count = kept;
}

PK__INTERNAL int pk__path_split(pk__path *segment, const pk__pieces *from, pk__pieces *to)
{
    pk__pieces *pending = &segment->pending, *batch = &segment->batch;
    const size_t samples = (size_t)segment->degree + 1;
    to->count = pending->count = 0;
    if (from->count > to->capacity || from->count > pending->capacity)
        return 0;
    for (size_t i = 0; i < from->count; i++) {
        pk__pieces *first = segment->last_switch ? pending : to;
        segment->pending_start[i] = 1;
        first->piece[first->count] = from->piece[i];
        first->piece[first->count++].joined = 0;
    }
    segment->tape.value[0] = segment->input_points;
    segment->held = 0; /* the samples overwrite the values in the tape */
    while (pending->count) {
        pk__begin_batch(segment);
        for (size_t n = 0; n <= segment->last_switch && batch->count; n++) {
            if (n && pk__is_switch(&segment->graph->nodes[n]) && !pk__split_batch(segment, n))
                return 0;
            if (n < segment->last_switch && batch->count)
                pk__path_node(segment, n, batch->count * samples, segment->point_row, segment->point_t);
        }
        for (size_t i = 0; i < batch->count; i++) {
            if (to->count == to->capacity)
                return 0;
            to->piece[to->count++] = batch->piece[i];
        }
    }
    pk__sort_pieces(to, pk__precedes_by_place);
    pk__join_pieces(to);
    return 1;
}

PK__END_CODE
/* <<< implementation */
#endif
