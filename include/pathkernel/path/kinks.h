/* pathkernel/path/kinks.h: where a network is not smooth along a step: the kinks of its piecewise-linear parts.
 *
 * Along a step each pre-activation of a piecewise-linear network is a piecewise polynomial in t. Its sign
 * changes are found layer by layer:
 *   1. sample the switch functions of a layer at degree + 1 nodes of a piece that the layers below left;
 *   2. convert to Bernstein form, skip what keeps one sign, isolate the roots of the rest, split there;
 *   3. a piece without roots goes on to the next layer with the samples that it has; only what was split is
 *      sampled again.
 * Where a smooth operation stands below, a switch function is no polynomial and the samples only interpolate it:
 *   4. the last Chebyshev coefficients of the interpolant tell its error. Where that error leaves open how many
 *      zeros there are, the piece is halved for this search and joined again afterwards;
 *   5. each zero of the interpolant is moved onto the zero of the function itself by Newton steps, whose values
 *      come from the network.
 * Each kink carries its slack: the distance within which the switch function differs from zero by no more than
 * its own rounding and the remaining error of step 5.
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
/* to = the pieces from, split at the kinks inside them, by row and t. 1, or 0 where the capacity does not suffice. Exact
 * for graphs with 0 <= degree <= PK__PATH_DEGREE. Cost 4 P flops a sample. */
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

/* c (degree + 1) at x by de Casteljau; left and right (may be NULL) are the halves, *slope the derivative. */
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

/* Where the roots of a piece go: t = a + (b - a) x for x in the local [0, 1]. The polynomial stands for switch function
 * number `at`, but for its rounding and the error of an interpolant. */
typedef struct pk__root_sink {
    double a, b, rounding, error;
    size_t at;
    pk__root *roots;
    size_t count, capacity;
} pk__root_sink;

/* How far around x the polynomial c stays within `uncertain` of zero, about: of the k-th derivatives the one that leaves
 * first. At a double zero that is a square root, no division by a slope of zero. */
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

/* x: of the polynomial c on the local [lo, hi]. */
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

/* How often the numbers change their sign; those of at most `drop` have none. */
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

/* Pushes the sign changes inside (lo, hi) of the polynomial with Bernstein coefficients c on [lo, hi]. */
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

/* A difference of units that are off inside the piece, such as two rectified ones in one pool: exactly zero there, and
 * rounding at the ends, where their own kinks are. To split it would only make short pieces. */
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
    PK__SWITCH_ROUNDINGS = 16, /* of the largest number of a layer: what rounding leaves of a switch function */
    PK__NEWTON_STEPS = 4,
    PK__NEWTON_POINTS = 8 /* room for them behind the samples */
};
/* Pieces are halved down to this length in order to see the zeros of a switch function apart. */
#define PK__SHORTEST_SEARCH 1e-6

/* The error of the interpolant of switch function j: its Chebyshev coefficients fall about geometrically. */
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

/* The sign changes of one piece's switch functions, whose samples stand in switch_values at point first: polynomials of
 * degree 1 (samples 0 and the last suffice), at most of the samples' degree, or interpolated (exact == 0). Unless the
 * piece is the shortest: 1 where the interpolant's error leaves open how many there are. */
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
        if (!exact && 4 * low < high && low < 4 * high) /* zero is not far away */
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
        /* From a zero at an end, a branch that starts with weights of zero for one, it may leave as t^2: what is between are
         * roundings of the samples. */
        if ((c[0] == 0 || c[degree] == 0) && pk__sign_changes(degree, c, rounding) == 0)
            continue;
        sink->rounding = rounding;
        sink->error = error;
        sink->at = j;
        pk__isolate(degree, c, 0, 1, sink);
    }
    return 0;
}

/* The switch functions of node n at points behind the samples of the batch, which end at point `used`. */
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

/* Moves roots of interpolants of a piece of row onto the zeros of the switch functions of node n themselves: Newton steps
 * with the interpolants' slopes, as long as the values fall. */
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

/* Appends a piece of the batch to pieces, split at the roots. How many parts; 0 where they do not fit. */
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

/* The next pieces that wait, as many as there are points for, and their samples. */
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

/* Moves piece `from` of the batch and all that is known of its samples, as far as nodes from n on need it. */
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

/* Both halves of a piece wait, to be joined again when all is found. 0: no room. */
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

/* Looks at the switches of node n: pieces with kinks leave the batch, their parts wait. 0: no room. */
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
            if (pk__piece_roots(segment, node->degree == 1, exact, shortest, switches, i * samples, &sink)) {
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
            batch->piece[i] = pending->piece[--pending->count]; /* it is whole: go on with it */
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

/* Joins what was halved for the search alone; the pieces are sorted. */
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
    segment->held = 0; /* samples take their place */
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
