/* pathkernel/quadrature.h: which points (row, t) with which weights integrate a step: the literature's
 * rules, adaptive Gauss-Legendre for smooth networks, and the rule that is exact for piecewise-linear ones.
 *
 * What is integrated is the gradient of a readout h(f(w + t d, x)) with respect to the weights. Its product
 * with d is known from forward passes alone: h at the end minus h at the start. The difference to the sum
 * over the nodes is the closure of a piece, and judges it.
 */
#ifndef PATHKERNEL_QUADRATURE_H
#define PATHKERNEL_QUADRATURE_H
#include "segment.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_rule {
    PK_RULE_AUTO,      /* exact where the network is piecewise linear, adaptive Gauss elsewhere */
    PK_RULE_EXACT,     /* split at the kinks; refused where the integrand is no piecewise polynomial */
    PK_RULE_GAUSS,     /* Gauss-Legendre, nodes per step */
    PK_RULE_MIDPOINT,  /* composite midpoint */
    PK_RULE_TRAPEZOID, /* composite trapezoid, nodes >= 2 points */
    PK_RULE_LEFT       /* t = 0, or the left ends of nodes subintervals (TracIn with every step) */
} pk_rule;

typedef struct pk_quadrature {
    pk_rule rule;
    int nodes; /* per step; 0: 1 (trapezoid: 2). Ignored by auto and exact */
} pk_quadrature;

enum { PK_GAUSS_NODES = 32, PK_RULE_NODES = 1000000 };

/* Gauss-Legendre on [0, 1]: count nodes, exact for degree 2 count - 1; count <= 1000 or so. By Newton's
 * method on the Legendre polynomial in long double. Cost O(count^2). */
PK_API void pk_gauss_legendre(int count, double *nodes, double *weights);

/* What is decomposed: a readout h(f) of the network's outputs f. */
typedef enum pk_readout_kind {
    PK_READOUT_ALL,     /* h = f */
    PK_READOUT_ONE,     /* h = f[output] */
    PK_READOUT_LABEL,   /* h = f[labels[row]] */
    PK_READOUT_FUNCTION /* the caller's */
} pk_readout_kind;

typedef struct pk_readout {
    pk_readout_kind kind;
    size_t output;
    const int64_t *labels; /* one per test row */
    /* h[0 .. count-1] = h(f) of test row row, slope[k * outputs + c] = dh_k / df_c; called from several
     * threads at once, differentiable along the path. */
    size_t count;
    void (*function)(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope);
    void *user;
} pk_readout;

/* The number of values of h for a network with outputs outputs. */
PK_API size_t pk_readout_count(const pk_readout *readout, size_t outputs);
/* h (count) and, unless NULL, slope (count x outputs) of one row. h may be NULL for the built-in kinds. */
PK_API void pk_readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                             pk_real *h, pk_real *slope);

/* Points of a block: t[p] in [0, 1] of row row[p] with weight[p]. Where bounds are asked for, check[p] are the
 * weights of (a rule of higher order minus the rule), and slack[p] is how far the kinks beside the point may
 * lie from where they were found; else both are NULL. */
typedef struct pk_points {
    size_t count;
    size_t *row;
    pk_real *t, *weight, *check, *slack;
    int last; /* no more points come in this step */
} pk_points;

/* Receives points, at most the segment's point capacity at a time; once with `last` in a step, perhaps with none. */
typedef void pk_point_sink(void *user, const pk_points *points);

/* What a row of a step starts with: PK_WAITS times the nodes of its pieces, plus for how many steps fewer nodes need not be
 * tried. */
enum { PK_WAITS = 8, PK_FIRST_ORDER = 2 * PK_WAITS };

/* The integration of one block of rows, step after step; one a thread. */
typedef struct pk_integrator {
    pk_segment segment;
    pk_quadrature quadrature;
    pk_readout readout;
    size_t first_row;                          /* of the block among the test rows */
    double target;                             /* closure a piece may have, relative to max(1, |h|) */
    const double *gauss_nodes, *gauss_weights; /* rules 1 .. PK_GAUSS_NODES, rule n from n (n - 1) / 2 */
    unsigned char *row_order;                  /* the caller's, one per row, at first PK_FIRST_ORDER */
    pk_pieces stack, batch, pieces;
    unsigned char *order, *passed, *next_order; /* of the pieces, of the pieces, of the rows */
    double *missed;                             /* of the pieces: the error of one order less; 0: not known */
    size_t *sequence, sequence_count;           /* the pieces that have passed, one after another */
    size_t bisections;
    pk_points buffer; /* points on their way to the sink */
    pk_real *slope, *h;
    /* h at both ends of the step (rows x 2 x readouts), of the rows where it has been measured: */
    pk_real *ends;
    unsigned char *has_ends;
    /* Counted over the steps since the caller zeroed them: */
    size_t points_last;                   /* points of the last step: the cost model's guess for the next one */
    size_t points, split_pieces, refused; /* refused: pieces accepted although they missed the target */
} pk_integrator;

/* points: of one call of the sink; reverse_points: of one pk_segment_reverse. bounds: also send what bounds on the error
 * of the integrals are made from. */
PK_API void pk_integrator_take(pk_arena *arena, const pk_graph *graph, size_t rows, size_t points,
                               size_t reverse_points, size_t copies, int bounds, pk_integrator *integrator);
PK_API void pk_points_take(pk_arena *arena, size_t capacity, int bounds, pk_points *points);
/* Fills a table of the rules 1 .. PK_GAUSS_NODES, PK_GAUSS_NODES (PK_GAUSS_NODES + 1) / 2 numbers each. */
PK_API void pk_gauss_table(double *nodes, double *weights);
/* PK_UNSUPPORTED where the rule does not fit the network or the readout, PK_ARGUMENT for a bad node count. */
PK_API PK__MUST_USE pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                                  const pk_graph *graph, const pk_readout *readout);
/* Sends points of the segment's step (after pk_segment_begin) to the sink. */
PK_API void pk_integrate(pk_integrator *integrator, pk_point_sink *sink, void *user);
/* h at both ends of the step of every row, after pk_integrate: rows x 2 x readouts numbers, until the next call. */
PK_API const pk_real *pk_integrator_ends(pk_integrator *integrator);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_QUADRATURE_IMPLEMENTED)
#define PATHKERNEL_QUADRATURE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

PK_API void pk_gauss_legendre(int count, double *nodes, double *weights)
{
    for (int i = 0; i < count; i++) {
        long double x = cosl(3.14159265358979323846264338327950288L * (i + 0.75L) / (count + 0.5L)), slope = 1;
        for (int iteration = 0; iteration < 100; iteration++) {
            long double p = 1, before = 0;
            for (int k = 1; k <= count; k++) {
                long double next = ((2 * k - 1) * x * p - (k - 1) * before) / k;
                before = p;
                p = next;
            }
            slope = count * (before - x * p) / (1 - x * x);
            long double change = p / slope;
            x -= change;
            if (fabsl(change) < 4 * LDBL_EPSILON)
                break;
        }
        /* Descending x: the last node first, so that nodes ascend. */
        nodes[count - 1 - i] = (double)((1 + x) / 2);
        weights[count - 1 - i] = (double)(1 / ((1 - x * x) * slope * slope));
    }
    if (count % 2)
        nodes[count / 2] = 0.5;
}

PK_API void pk_gauss_table(double *nodes, double *weights)
{
    for (int n = 1; n <= PK_GAUSS_NODES; n++)
        pk_gauss_legendre(n, nodes + n * (n - 1) / 2, weights + n * (n - 1) / 2);
}

PK_API size_t pk_readout_count(const pk_readout *readout, size_t outputs)
{
    switch (readout->kind) {
    case PK_READOUT_ALL: return outputs;
    case PK_READOUT_FUNCTION: return readout->count;
    case PK_READOUT_ONE:
    case PK_READOUT_LABEL:
    default: return 1;
    }
}

PK_API void pk_readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                             pk_real *h, pk_real *slope)
{
    size_t count = pk_readout_count(readout, outputs);
    if (readout->kind == PK_READOUT_FUNCTION) {
        readout->function(readout->user, row, f, h, slope);
        return;
    }
    for (size_t k = 0; k < count; k++) {
        size_t output = readout->kind == PK_READOUT_ALL   ? k
                        : readout->kind == PK_READOUT_ONE ? readout->output
                                                          : (size_t)readout->labels[row];
        if (h && f)
            h[k] = f[output];
        if (slope) {
            memset(slope + k * outputs, 0, outputs * sizeof *slope);
            slope[k * outputs + output] = 1;
        }
    }
}

PK__COLD_BEGIN

/* The integrand is a piecewise polynomial whose pieces can all be found. */
static int pk__is_exact(const pk_graph *graph, const pk_readout *readout)
{
    if (graph->degree < 0 || graph->surrogate || readout->kind == PK_READOUT_FUNCTION ||
        (graph->degree + 1) / 2 > PK_GAUSS_NODES)
        return 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (pk__is_switch(&graph->nodes[n]) && graph->nodes[n].degree > PK_SEGMENT_DEGREE)
            return 0;
    return 1;
}

PK_API pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                     const pk_graph *graph, const pk_readout *readout)
{
    if ((int)quadrature->rule < 0 || quadrature->rule > PK_RULE_LEFT)
        return pk__fail(context, PK_ARGUMENT, "quadrature rule %d does not exist", (int)quadrature->rule);
    if (quadrature->nodes < 0 || quadrature->nodes > PK_RULE_NODES)
        return pk__fail(context, PK_ARGUMENT, "a quadrature with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_RULE_NODES);
    if (quadrature->rule == PK_RULE_GAUSS && quadrature->nodes > PK_GAUSS_NODES)
        return pk__fail(context, PK_ARGUMENT, "Gauss-Legendre with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_GAUSS_NODES);
    if (quadrature->rule == PK_RULE_TRAPEZOID && quadrature->nodes == 1)
        return pk__fail(context, PK_ARGUMENT, "the trapezoid rule needs at least 2 nodes");
    if (quadrature->rule == PK_RULE_EXACT && !pk__is_exact(graph, readout))
        return pk__fail(
            context, PK_UNSUPPORTED,
            "the exact rule needs a piecewise-linear network (degree at most %d at a kink) and a linear "
            "readout; use auto, which measures its closure",
            (int)PK_SEGMENT_DEGREE);
    return PK_OK;
}

/* Pieces in one batch: room for the kinks of a block; more of them are met by halving the batch. */
static size_t pk__piece_capacity(size_t rows)
{
    return 64 * rows + 1024;
}

PK_API void pk_points_take(pk_arena *arena, size_t capacity, int bounds, pk_points *points)
{
    points->count = 0;
    points->row = (size_t *)pk_arena_take(arena, capacity, sizeof *points->row);
    points->t = (pk_real *)pk_arena_take(arena, capacity, sizeof(pk_real));
    points->weight = (pk_real *)pk_arena_take(arena, capacity, sizeof(pk_real));
    points->check = bounds ? (pk_real *)pk_arena_take(arena, capacity, sizeof(pk_real)) : NULL;
    points->slack = bounds ? (pk_real *)pk_arena_take(arena, capacity, sizeof(pk_real)) : NULL;
}

PK_API void pk_integrator_take(pk_arena *arena, const pk_graph *graph, size_t rows, size_t points,
                               size_t reverse_points, size_t copies, int bounds, pk_integrator *integrator)
{
    size_t pieces = pk__piece_capacity(rows), outputs = graph->output_width;
    memset(integrator, 0, sizeof *integrator);
    points = pk__most(points, PK_GAUSS_NODES + 2);
    pk_segment_take(arena, graph, rows, points, reverse_points, copies, pieces, bounds, &integrator->segment);
    /* Each level of bisection leaves at most one more batch: depth 64 is beyond the resolution of t. */
    pk_pieces_take(arena, 66 * rows + 64 * pieces, &integrator->stack);
    pk_pieces_take(arena, rows, &integrator->batch);
    pk_pieces_take(arena, pieces, &integrator->pieces);
    integrator->order = (unsigned char *)pk_arena_take(arena, pieces, 1);
    integrator->passed = (unsigned char *)pk_arena_take(arena, pieces, 1);
    integrator->next_order = (unsigned char *)pk_arena_take(arena, rows, 1);
    integrator->missed = (double *)pk_arena_take(arena, pieces, sizeof *integrator->missed);
    integrator->sequence = (size_t *)pk_arena_take(arena, pieces, sizeof *integrator->sequence);
    pk_points_take(arena, points, bounds, &integrator->buffer);
    integrator->slope = (pk_real *)pk_arena_take(arena, copies, outputs * sizeof *integrator->slope);
    integrator->h = (pk_real *)pk_arena_take(arena, copies, 4 * sizeof *integrator->h);
    integrator->ends = (pk_real *)pk_arena_take(arena, rows, 2 * copies * sizeof *integrator->ends);
    integrator->has_ends = (unsigned char *)pk_arena_take(arena, rows, 1);
}

/* One behind the last of the points from p on that are of its row. */
PK__PRIVATE size_t pk__row_end(const pk_points *points, size_t p)
{
    size_t end = p + 1;
    while (end < points->count && points->row[end] == points->row[p])
        end++;
    return end;
}

static void pk__flush(pk_integrator *integrator, pk_point_sink *sink, void *user, int last)
{
    integrator->buffer.last = last;
    sink(user, &integrator->buffer);
    integrator->points += integrator->buffer.count;
    integrator->buffer.count = 0;
}

static void pk__emit(pk_integrator *integrator, pk_point_sink *sink, void *user, size_t row, double t,
                     double weight, double check, double slack)
{
    pk_points *buffer = &integrator->buffer;
    if (buffer->count == integrator->segment.point_capacity)
        pk__flush(integrator, sink, user, 0);
    size_t at = buffer->count++;
    buffer->row[at] = row;
    buffer->t[at] = (pk_real)t;
    buffer->weight[at] = (pk_real)weight;
    if (buffer->check) {
        buffer->check[at] = (pk_real)check;
        buffer->slack[at] = (pk_real)slack;
    }
}

/* checked: the rule is not exact, its error is to be estimated by one of two more nodes. */
static void pk__emit_gauss(pk_integrator *integrator, pk_point_sink *sink, void *user, size_t piece, int order,
                           int checked)
{
    const pk_pieces *pieces = &integrator->pieces;
    const double *x = integrator->gauss_nodes + order * (order - 1) / 2;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    size_t row = pieces->row[piece];
    double a = pieces->a[piece], length = pieces->b[piece] - a, slack = pieces->slack[piece], after = 0;
    if (piece + 1 < pieces->count && pieces->row[piece + 1] == row)
        after = pieces->slack[piece + 1];
    checked = checked && integrator->buffer.check;
    for (int q = 0; q < order; q++)
        pk__emit(integrator, sink, user, row, a + length * x[q], length * w[q], checked ? -length * w[q] : 0,
                 (q == 0 ? slack : 0) + (q == order - 1 ? after : 0));
    if (!checked)
        return;
    order += 2;
    x = integrator->gauss_nodes + order * (order - 1) / 2;
    w = integrator->gauss_weights + order * (order - 1) / 2;
    for (int q = 0; q < order; q++)
        pk__emit(integrator, sink, user, row, a + length * x[q], 0, length * w[q], 0);
}

/* A rule that is the same for every row and step. */
static void pk__emit_fixed(pk_integrator *integrator, pk_point_sink *sink, void *user)
{
    pk_rule rule = integrator->quadrature.rule;
    int count = integrator->quadrature.nodes ? integrator->quadrature.nodes : rule == PK_RULE_TRAPEZOID ? 2 : 1;
    const double *x = integrator->gauss_nodes + count * (count - 1) / 2;
    const double *w = integrator->gauss_weights + count * (count - 1) / 2;
    for (size_t row = 0; row < integrator->segment.rows; row++)
        for (int q = 0; q < count; q++) {
            double t = 0, weight = 1.0 / count;
            if (rule == PK_RULE_GAUSS) {
                t = x[q];
                weight = w[q];
            } else if (rule == PK_RULE_MIDPOINT) {
                t = (q + 0.5) / count;
            } else if (rule == PK_RULE_LEFT) {
                t = (double)q / count;
            } else {
                t = (double)q / (count - 1);
                weight = (q == 0 || q == count - 1 ? 0.5 : 1.0) / (count - 1);
            }
            pk__emit(integrator, sink, user, row, t, weight, 0, 0);
        }
}

PK__COLD_END

/* Roundings of what is added: below a few nothing can be measured, and an error below many of them that another node
 * does not mend is rounding. In float no target is below the former, so that they are fewer. */
#define PK__MEASURABLE (sizeof(pk_real) == sizeof(float) ? 4 : 16)
enum { PK__NOISE = 128 };

/* The closure of a piece over its target, from the tape: its nodes are the points from first on, its ends the point `ends`
 * and the next. At most 1: accepted. *roundings: the closure in roundings of what is added. */
static double pk__piece_error(pk_integrator *integrator, size_t first, size_t ends, size_t row, double length,
                              int order, double *roundings)
{
    const pk_tape *tape = &integrator->segment.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    const pk_real *f = pk_tape_output(tape) + first * outputs;
    const pk_real *tangent = tape->tangent[tape->graph->node_count - 1] + first * outputs;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    pk_real *start = integrator->h, *end = start + count, *sum = end + count, *size = sum + count;
    pk_real *slope = integrator->slope;
    memset(sum, 0, 2 * count * sizeof *sum);
    for (int q = 0; q < order; q++) {
        pk_readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + (size_t)q * outputs,
                         start, slope);
        for (size_t k = 0; k < count; k++) {
            double along = 0;
            for (size_t c = 0; c < outputs; c++)
                along += slope[k * outputs + c] * tangent[(size_t)q * outputs + c];
            sum[k] += (pk_real)(length * w[q] * along);
            size[k] += (pk_real)(length * w[q] * fabs(along));
        }
    }
    f = pk_tape_output(tape) + ends * outputs;
    pk_readout_apply(&integrator->readout, outputs, integrator->first_row + row, f, start, slope);
    pk_readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + outputs, end, slope);
    double worst = 0;
    *roundings = 0;
    for (size_t k = 0; k < count; k++) {
        double scale =
            fabs((double)start[k]) > fabs((double)end[k]) ? fabs((double)start[k]) : fabs((double)end[k]);
        scale = scale > 1 ? scale : 1;
        const double rounding = PK__EPSILON * (scale + size[k]), floor = PK__MEASURABLE * rounding;
        double allowed = integrator->target * scale > floor ? integrator->target * scale : floor;
        double error = fabs((double)(end[k] - start[k] - sum[k]));
        /* NaN counts as bad. */
        worst = error / allowed <= worst ? worst : error / allowed;
        *roundings = error / rounding <= *roundings ? *roundings : error / rounding;
    }
    return worst;
}

enum { PK__LARGEST_ORDER = 16 };

PK__COLD_BEGIN

/* *next = what the row's next step starts with, where a piece of it took `nodes` nodes; missed: by how much one node less
 * missed its target, 0: not tried. A test costs little beside a node that is too many, so the next step starts one lower;
 * but steps change slowly, so after a miss by 16^k not for k steps. Of several pieces the largest counts. */
static void pk__plan_next(unsigned char *next, unsigned char now, int nodes, double missed)
{
    int wait = now % PK_WAITS;
    if (missed > 1)
        wait = missed < 1e9 ? (int)(log2(missed) / 4) : PK_WAITS - 1; /* log2(1e9) / 4 is 7.5 */
    else if (wait && nodes == now / PK_WAITS)
        wait--;
    else
        nodes -= nodes > 1;
    const int start = nodes * PK_WAITS + wait;
    *next = (unsigned char)(start > *next ? start : *next);
}

/* Whether a piece waits for a test of its order. */
static int pk__is_open(const pk_integrator *integrator, size_t piece)
{
    return !integrator->passed[piece] && integrator->order[piece] <= PK__LARGEST_ORDER;
}

/* Of a piece that is the whole step, what pk__piece_error left in h. */
static void pk__keep_ends(pk_integrator *integrator, size_t row)
{
    const size_t both = 2 * pk_readout_count(&integrator->readout, integrator->segment.graph->output_width);
    memcpy(integrator->ends + row * both, integrator->h, both * sizeof *integrator->h);
    integrator->has_ends[row] = 1;
}

/* Tests every piece that has not passed with its own order: it passes, or its order is raised. Whether some piece is to
 * be tested again. */
static int pk__test_pieces(pk_integrator *integrator)
{
    pk_segment *segment = &integrator->segment;
    const pk_pieces *pieces = &integrator->pieces;
    unsigned char *order = integrator->order;
    int again = 0;
    for (size_t next = 0, last; next < pieces->count; next = last) {
        size_t points = 0, tested = 0;
        for (last = next; last < pieces->count; last++) { /* the nodes of all pieces; slopes are wanted here */
            const double a = pieces->a[last], b = pieces->b[last];
            const size_t nodes = order[last];
            if (!pk__is_open(integrator, last))
                continue;
            if (points + nodes + 2 * (tested + 1) > segment->point_capacity)
                break;
            const double *x = integrator->gauss_nodes + nodes * (nodes - 1) / 2;
            for (size_t q = 0; q < nodes; q++, points++) {
                segment->point_row[points] = pieces->row[last];
                segment->point_t[points] = (pk_real)(a + (b - a) * x[q]);
            }
            tested++;
        }
        if (!points)
            continue;
        size_t ends = points;
        for (size_t i = next; i < last; i++) /* then their ends; only values are */
            for (int end = 0; end < 2 && pk__is_open(integrator, i); end++, ends++) {
                segment->point_row[ends] = pieces->row[i];
                segment->point_t[ends] = (pk_real)(end ? pieces->b[i] : pieces->a[i]);
            }
        const size_t first = pk_segment_append(segment, ends, segment->point_row, segment->point_t);
        pk_segment_tangent(segment, first, points, segment->point_row, segment->point_t);
        ends = first + points;
        points = first;
        for (size_t i = next; i < last; i++) {
            const int nodes = order[i];
            if (!pk__is_open(integrator, i))
                continue;
            /* The values at the ends are those at the ends' t, rounded. */
            const double length = (double)(pk_real)pieces->b[i] - (double)(pk_real)pieces->a[i];
            double roundings,
                error = pk__piece_error(integrator, points, ends, pieces->row[i], length, nodes, &roundings);
            const double before = integrator->missed[i];
            if (pieces->a[i] == 0 && pieces->b[i] == 1)
                pk__keep_ends(integrator, pieces->row[i]);
            points += (size_t)nodes;
            ends += 2;
            integrator->missed[i] = error;
            if (error > 1 && before > 0 && error >= 0.5 * before && roundings <= PK__NOISE) {
                order[i]--;
            } else if (!(error <= 1)) {
                order[i] = (unsigned char)(nodes < 12 ? nodes + 1 : nodes + 2);
                again |= order[i] <= PK__LARGEST_ORDER;
                continue;
            }
            integrator->passed[i] = 1;
            integrator->sequence[integrator->sequence_count++] = i;
            pk__plan_next(&integrator->next_order[pieces->row[i]], integrator->row_order[pieces->row[i]],
                          order[i], before);
        }
    }
    return again;
}

/* Bisections a row may cost in one step; an unreachable target or a NaN must end. */
enum { PK__BISECTIONS = 512 };
/* Shorter pieces have nodes that pk_real hardly tells apart. */
#define PK__SHORTEST (sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-9)

/* Halves what has not passed; what cannot be halved any more is accepted and counted. */
static void pk__bisect(pk_integrator *integrator, const pk_pieces *pieces, const unsigned char *passed,
                       pk_point_sink *sink, void *user)
{
    for (size_t i = 0; i < pieces->count; i++) {
        double a = pieces->a[i], b = pieces->b[i], middle = 0.5 * (a + b);
        if (passed && passed[i])
            continue;
        if (b - a < PK__SHORTEST || integrator->bisections >= PK__BISECTIONS * integrator->segment.rows ||
            integrator->stack.count + 2 > integrator->stack.capacity) {
            if (passed)
                pk__emit_gauss(integrator, sink, user, i, PK_GAUSS_NODES / 2, 1);
            else
                pk__emit(integrator, sink, user, pieces->row[i], middle, b - a, 0, b - a);
            integrator->refused++;
            continue;
        }
        integrator->bisections++;
        pk_pieces_push(&integrator->stack, pieces->row[i], middle, b, 0);
        pk_pieces_push(&integrator->stack, pieces->row[i], a, middle, pieces->slack[i]);
    }
}

/* Raises the order of each piece until it passes or the largest order is reached; emits what passed. */
static void pk__adapt(pk_integrator *integrator, pk_point_sink *sink, void *user)
{
    pk_pieces *pieces = &integrator->pieces;
    memset(integrator->passed, 0, pieces->count);
    memset(integrator->missed, 0, pieces->count * sizeof *integrator->missed);
    for (size_t i = 0; i < pieces->count; i++)
        integrator->order[i] = integrator->row_order[pieces->row[i]] / PK_WAITS;
    integrator->sequence_count = 0;
    while (pk__test_pieces(integrator))
        ;
    for (size_t i = 0; i < integrator->sequence_count; i++) /* as the tape holds their nodes */
        pk__emit_gauss(integrator, sink, user, integrator->sequence[i],
                       integrator->order[integrator->sequence[i]], 1);
    pk__bisect(integrator, pieces, integrator->passed, sink, user);
}

enum { PK__SURROGATE_NODES = 8 };

PK_API void pk_integrate(pk_integrator *integrator, pk_point_sink *sink, void *user)
{
    pk_segment *segment = &integrator->segment;
    pk_rule rule = integrator->quadrature.rule;
    memset(integrator->has_ends, 0, segment->rows);
    if (rule != PK_RULE_AUTO && rule != PK_RULE_EXACT) {
        pk__emit_fixed(integrator, sink, user);
        pk__flush(integrator, sink, user, 1);
        return;
    }
    int exact = pk__is_exact(segment->graph, &integrator->readout);
    /* A surrogate's integrand is no derivative, so that nothing can judge a rule: take one that is fine between
     * the jumps of its values. */
    int fixed = exact || segment->graph->surrogate;
    int order = segment->graph->surrogate    ? PK__SURROGATE_NODES
                : segment->graph->degree < 2 ? 1
                                             : (segment->graph->degree + 1) / 2;
    pk_pieces *stack = &integrator->stack, *batch = &integrator->batch, *pieces = &integrator->pieces;
    stack->count = 0;
    integrator->bisections = 0;
    memset(integrator->next_order, 0, segment->rows);
    for (size_t row = segment->rows; row-- > 0;)
        pk_pieces_push(stack, row, 0, 1, 0);
    while (stack->count) {
        batch->count = 0;
        while (stack->count && batch->count < batch->capacity) {
            size_t top = --stack->count;
            pk_pieces_push(batch, stack->row[top], stack->a[top], stack->b[top], stack->slack[top]);
        }
        if (!pk_segment_split(segment, batch, pieces)) {
            /* More kinks than there is room for: half as long pieces have fewer. */
            pk__bisect(integrator, batch, NULL, sink, user);
            continue;
        }
        integrator->split_pieces += pieces->count;
        if (!fixed) {
            pk__adapt(integrator, sink, user);
            continue;
        }
        for (size_t i = 0; i < pieces->count; i++)
            pk__emit_gauss(integrator, sink, user, i, order, 0);
    }
    for (size_t row = 0; !fixed && row < segment->rows; row++)
        integrator->row_order[row] =
            integrator->next_order[row] ? integrator->next_order[row] : PK__LARGEST_ORDER * PK_WAITS;
    pk__flush(integrator, sink, user, 1);
}

PK_API const pk_real *pk_integrator_ends(pk_integrator *integrator)
{
    pk_segment *segment = &integrator->segment;
    const size_t classes = segment->graph->output_width,
                 outputs = pk_readout_count(&integrator->readout, classes);
    for (size_t row = 0, points = 0; row < segment->rows; row++) {
        for (int end = 0; end < 2 && !integrator->has_ends[row]; end++, points++) {
            segment->point_row[points] = row;
            segment->point_t[points] = (pk_real)end;
        }
        if (!points || (row + 1 < segment->rows && points + 2 <= segment->point_capacity))
            continue;
        pk_segment_forward(segment, points, segment->point_row, segment->point_t);
        for (size_t p = 0; p < points; p++)
            pk_readout_apply(&integrator->readout, classes, integrator->first_row + segment->point_row[p],
                             pk_tape_output(&segment->tape) + p * classes,
                             integrator->ends + (2 * segment->point_row[p] + p % 2) * outputs,
                             integrator->slope);
        points = 0;
    }
    return integrator->ends;
}

PK__COLD_END

PK__END_CODE
/* <<< implementation */
#endif
