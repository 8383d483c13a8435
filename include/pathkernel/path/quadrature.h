/* pathkernel/path/quadrature.h: which points (row, t) with which weights integrate a step: the literature's
 * rules, adaptive Gauss-Legendre for smooth networks, and the rule that is exact for piecewise-linear ones.
 *
 * What is integrated is the gradient of a readout h(f(w + t d, x)) with respect to the weights. The adaptive rule:
 *   1. split the step at the kinks that can be found (kinks.h);
 *   2. test each piece with n nodes. Its error is the difference between the sum over the nodes of dh/dt, and h at the
 *      end minus h at the start, which forward passes give: the closure of the piece. It may be `target` times the
 *      most that h has changed in a step of this row: contributions are parts of such changes, whatever the size of h;
 *   3. the closure has a floor, the rounding of h. Where the changes are so small that the floor hides what matters, as
 *      in tiny steps of a trained network, the difference to the rule with n + 1 nodes is the error instead: its
 *      rounding is relative to the changes (a nested judgement);
 *   4. a piece that misses gets one node more, up to 16; then it is halved. All pieces of a row are tested before any
 *      is halved, and those that miss by most are halved first, since the number of halvings is limited;
 *   5. an error that neither more nodes nor two halvings lower, in several of the four parts, is rounding: these pieces
 *      are accepted as they are, counted, and their errors go into the bounds. (In one part only, it is a place where h
 *      changes within a short part of the step. It is halved until that is resolved.)
 * Depth first (one piece after the other, to its end) was rejected: where rounding makes the target unreachable, it
 * spends all halvings at the first place where this happens.
 */
#ifndef PATHKERNEL_QUADRATURE_H
#define PATHKERNEL_QUADRATURE_H
#include "kinks.h"

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

/* PK_UNSUPPORTED where the rule does not fit the network or the readout, PK_ARGUMENT for a bad node count. */
PK_API PK__MUST_USE pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                                  const pk_graph *graph, const pk_readout *readout);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_QUADRATURE_INTERNALS_KNOWN)
#define PATHKERNEL_QUADRATURE_INTERNALS_KNOWN
/* >>> internals */
/* h (count) and, unless NULL, slope (count x outputs) of one row. h may be NULL for the built-in kinds. */
PK__INTERNAL void pk__readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                                    pk_real *h, pk_real *slope);

/* Points of a block: t[p] in [0, 1] of row row[p] with weight[p]. Where bounds are asked for, check[p] are the weights of (a
 * rule of higher order minus the rule), and slack[p] those with which the sizes of the gradients bound what no rule sees: how
 * far the kinks beside the point may lie from where they were found, and what a piece left of its closure; else both are
 * NULL. */
typedef struct pk__points {
    size_t count;
    size_t *row;
    pk_real *t, *weight, *check, *slack;
    int last; /* no more points come in this step */
} pk__points;

/* Receives points, at most the segment's point capacity at a time; once with `last` in a step, perhaps with none. */
typedef void pk__point_sink(void *user, const pk__points *points);

/* The order that a row's next step starts with: `nodes` for each of its pieces. For the next `wait` steps, fewer nodes are not
 * tried. */
typedef struct pk__row_order {
    unsigned char nodes, wait;
} pk__row_order;

enum { PK__FIRST_NODES = 2 };

/* What is known of a row along the run, step after step. */
typedef struct pk__row_state {
    double height;        /* the largest |h| that is known */
    double change;        /* the scale of errors: the most that h changed in one step */
    double step_change;   /* the same of this step, as far as it is known */
    size_t halvings;      /* of its pieces in this step */
    pk__row_order order;  /* at first PK__FIRST_NODES */
    unsigned char nested; /* pieces are judged by a nested rule at first */
} pk__row_state;

/* The integration of one block of rows, step after step; one a thread. */
typedef struct pk__integrator {
    pk__path segment;
    pk_quadrature quadrature;
    pk_readout readout;
    size_t first_row; /* of the block among the test rows */
    double target;    /* the error a piece may have, relative to the change of its row */
    const double *gauss_nodes, *gauss_weights; /* rules 1 .. PK_GAUSS_NODES, rule n from n (n - 1) / 2 */
    pk__row_state *state;                      /* the caller's, one per row */
    pk__pieces pending, failed, pieces;
    unsigned char *order, *passed, *nested; /* of the pieces; order: nodes */
    pk__row_order *next_order;              /* of the rows */
    double *missed;                         /* of the pieces: the error of one order less; 0: not known */
    size_t *sequence, sequence_count;       /* the pieces that have passed, one after another */
    pk__points buffer;                      /* points on their way to the sink */
    pk_real *slope, *h;
    /* h at both ends of the step (rows x 2 x readouts), of the rows where it has been measured: */
    pk_real *ends;
    unsigned char *has_ends;
    /* Counted over the steps since the caller zeroed them: */
    size_t points_last;                   /* points of the last step: the cost model's guess for the next one */
    size_t points, split_pieces, refused; /* refused: pieces accepted although they missed the target */
} pk__integrator;

/* points: of one call of the sink; reverse_points: of one pk__path_reverse. bounds: also send what bounds on the error
 * of the integrals are made from. */
PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator);
PK__INTERNAL void pk__points_take(pk__arena *arena, size_t capacity, int bounds, pk__points *points);
/* Fills a table of the rules 1 .. PK_GAUSS_NODES, PK_GAUSS_NODES (PK_GAUSS_NODES + 1) / 2 numbers each. */
PK__INTERNAL void pk__gauss_table(double *nodes, double *weights);
/* Sends points of the segment's step (after pk__path_begin) to the sink. */
PK__INTERNAL void pk__integrate(pk__integrator *integrator, pk__point_sink *sink, void *user);
/* h at both ends of the step of every row, after pk__integrate: rows x 2 x readouts numbers, until the next call. */
PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator);
/* <<< internals */
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

PK__INTERNAL void pk__gauss_table(double *nodes, double *weights)
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

PK__INTERNAL void pk__readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
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

/* The integrand is a piecewise polynomial whose pieces can all be found. */
static int pk__is_exact(const pk_graph *graph, const pk_readout *readout)
{
    if (graph->degree < 0 || graph->surrogate || readout->kind == PK_READOUT_FUNCTION ||
        (graph->degree + 1) / 2 > PK_GAUSS_NODES)
        return 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (pk__is_switch(&graph->nodes[n]) && graph->nodes[n].degree > PK__PATH_DEGREE)
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
            (int)PK__PATH_DEGREE);
    return PK_OK;
}

/* Pieces in one batch: room for the kinks of a block; more of them are met by halving the batch. */
static size_t pk__piece_capacity(size_t rows)
{
    return 64 * rows + 1024;
}

/* Halvings a row may cost in one step; an unreachable target or a NaN must end. Of these, at one time: */
enum { PK__HALVINGS = 512, PK__HALVED_TOGETHER = 128 };

PK__INTERNAL void pk__points_take(pk__arena *arena, size_t capacity, int bounds, pk__points *points)
{
    points->count = 0;
    points->row = pk__arena_take(arena, capacity, sizeof *points->row);
    points->t = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->weight = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->check = bounds ? pk__arena_take(arena, capacity, sizeof(pk_real)) : NULL;
    points->slack = bounds ? pk__arena_take(arena, capacity, sizeof(pk_real)) : NULL;
}

PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator)
{
    size_t pieces = pk__piece_capacity(rows), outputs = graph->output_width;
    memset(integrator, 0, sizeof *integrator);
    points = pk__max(points, PK_GAUSS_NODES + 2);
    pk__path_take(arena, graph, rows, points, reverse_points, copies, pieces, bounds, &integrator->segment);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->pending);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->failed);
    pk__pieces_take(arena, pieces, &integrator->pieces);
    integrator->order = pk__arena_take(arena, pieces, 1);
    integrator->passed = pk__arena_take(arena, pieces, 1);
    integrator->nested = pk__arena_take(arena, pieces, 1);
    integrator->next_order = pk__arena_take(arena, rows, sizeof *integrator->next_order);
    integrator->missed = pk__arena_take(arena, pieces, sizeof *integrator->missed);
    integrator->sequence = pk__arena_take(arena, pieces, sizeof *integrator->sequence);
    pk__points_take(arena, points, bounds, &integrator->buffer);
    integrator->slope = pk__arena_take(arena, copies, outputs * sizeof *integrator->slope);
    integrator->h = pk__arena_take(arena, copies, 5 * sizeof *integrator->h);
    integrator->ends = pk__arena_take(arena, rows, 2 * copies * sizeof *integrator->ends);
    integrator->has_ends = pk__arena_take(arena, rows, 1);
}

/* One behind the last of the points from p on that are of its row. */
PK__PRIVATE size_t pk__row_end(const pk__points *points, size_t p)
{
    size_t end = p + 1;
    while (end < points->count && points->row[end] == points->row[p])
        end++;
    return end;
}

static void pk__flush(pk__integrator *integrator, pk__point_sink *sink, void *user, int last)
{
    integrator->buffer.last = last;
    sink(user, &integrator->buffer);
    integrator->points += integrator->buffer.count;
    integrator->buffer.count = 0;
}

static void pk__emit(pk__integrator *integrator, pk__point_sink *sink, void *user, size_t row, double t,
                     double weight, double check, double slack)
{
    pk__points *buffer = &integrator->buffer;
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

/* How large the polynomial through the values at n nodes can be at the start of [0, 1], for values of size 1 at node q
 * alone; at its end for node n - 1 - q. */
static double pk__edge_weight(int n, const double *x, int q)
{
    double weight = 1;
    for (int r = 0; r < n; r++)
        if (r != q)
            weight *= x[r] / (x[q] - x[r]);
    return fabs(weight);
}

/* The nodes of the rule that shows the error of the rule with n: so many that its own error is far smaller. */
static int pk__check_order(int n)
{
    return n + 4 + n / 4 < PK_GAUSS_NODES ? n + 4 + n / 4 : (int)PK_GAUSS_NODES;
}

/* checked: the rule is not exact, its error is to be estimated by one of more nodes; left is the part of the integral
 * that the piece's own judgement could not explain. */
static void pk__emit_gauss(pk__integrator *integrator, pk__point_sink *sink, void *user, const pk__piece *piece,
                           int order, int checked, double left)
{
    const double *x = integrator->gauss_nodes + order * (order - 1) / 2;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    const double a = piece->a, length = piece->b - a;
    checked = checked && integrator->buffer.check;
    for (int q = 0; q < order; q++) {
        double slack = length * w[q] * left;
        /* A kink that lies elsewhere takes the gradients on its wrong side along: those beside it on both sides. */
        if (integrator->buffer.check && piece->slack_a > 0)
            slack += piece->slack_a * pk__edge_weight(order, x, q);
        if (integrator->buffer.check && piece->slack_b > 0)
            slack += piece->slack_b * pk__edge_weight(order, x, order - 1 - q);
        pk__emit(integrator, sink, user, piece->row, a + length * x[q], length * w[q],
                 checked ? -length * w[q] : 0, slack);
    }
    if (!checked)
        return;
    order = pk__check_order(order);
    x = integrator->gauss_nodes + order * (order - 1) / 2;
    w = integrator->gauss_weights + order * (order - 1) / 2;
    for (int q = 0; q < order; q++)
        pk__emit(integrator, sink, user, piece->row, a + length * x[q], 0, length * w[q], 0);
}

/* A rule that is the same for every row and step. */
static void pk__emit_fixed(pk__integrator *integrator, pk__point_sink *sink, void *user)
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

/* Roundings of what is added: below a few nothing can be measured, and an error below many of them that another node
 * does not mend is rounding. In float no target is below the former, so that they are fewer. */
#define PK__MEASURABLE (sizeof(pk_real) == sizeof(float) ? 4 : 16)
enum { PK__NOISE = 128 };
/* The closure judges a piece while its rounding is at most so many targets. */
enum { PK__JUDGE = 100 };
/* A nested difference that another node does not mend is rounding below this part of what h changes. */
#define PK__NESTED_NOISE (sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-7)

/* What the test of a piece found, each the largest over the readouts: its error, the sum of |dh/dt|, |h|; the error beyond
 * rounding as a part of the sum, at most 1. */
typedef struct pk__judgement {
    double error, size, height, left;
} pk__judgement;

/* sum (+)= the integral of dh/dt, size += that of |dh/dt|, by the rule with `order` nodes, which are the points from first
 * on of the tape; *height: at least |h| there. value: room for h. */
static void pk__sum_nodes(pk__integrator *integrator, size_t first, size_t row, double length, int order,
                          pk_real *value, pk_real *sum, pk_real *size, double *height)
{
    const pk__tape *tape = &integrator->segment.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    const pk_real *f = pk__pass_output(tape) + first * outputs;
    const pk_real *tangent = tape->tangent[tape->graph->node_count - 1] + first * outputs;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    const pk_real *slope = integrator->slope;
    for (int q = 0; q < order; q++, f += outputs, tangent += outputs) {
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f, value,
                          integrator->slope);
        for (size_t k = 0; k < count; k++) {
            double along = 0;
            for (size_t c = 0; c < outputs; c++)
                along += slope[k * outputs + c] * tangent[c];
            sum[k] += (pk_real)(length * w[q] * along);
            if (size)
                size[k] += (pk_real)(length * w[q] * fabs(along));
            if (height)
                *height = fabs((double)value[k]) > *height ? fabs((double)value[k]) : *height;
        }
    }
}

/* A NaN counts as the largest. */
static double pk__larger(double a, double b)
{
    return a <= b || b != b ? b : a;
}

/* Judges a piece from the tape: its nodes are the points from first on; its ends the points `ends` and the next, or, nested,
 * the nodes of one order more follow its own. height: of the row, as far as it is known. */
static pk__judgement pk__judge(pk__integrator *integrator, size_t first, size_t ends, size_t row, double length,
                               int order, int nested, double height)
{
    const pk__tape *tape = &integrator->segment.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    pk_real *start = integrator->h, *end = start + count, *sum = end + count, *size = sum + count,
            *better = size + count;
    pk__judgement found = {0, 0, height, 0};
    memset(sum, 0, 3 * count * sizeof *sum);
    pk__sum_nodes(integrator, first, row, length, order, start, sum, size, nested ? &found.height : NULL);
    if (nested) {
        pk__sum_nodes(integrator, first + (size_t)order, row, length, order + 1, start, better, NULL, NULL);
    } else {
        const pk_real *f = pk__pass_output(tape) + ends * outputs;
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f, start,
                          integrator->slope);
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + outputs, end,
                          integrator->slope);
    }
    for (size_t k = 0; k < count; k++) {
        found.size = pk__larger(fabs((double)size[k]), found.size);
        if (!nested) {
            found.height = pk__larger(fabs((double)start[k]), found.height);
            found.height = pk__larger(fabs((double)end[k]), found.height);
        }
    }
    const double rounding = PK__MEASURABLE * PK__EPSILON * (nested ? found.size : found.height + found.size);
    for (size_t k = 0; k < count; k++) {
        const double error = fabs((double)(nested ? better[k] - sum[k] : end[k] - start[k] - sum[k]));
        found.error = pk__larger(error, found.error);
        if (!(error <= rounding))
            found.left = pk__larger(error < size[k] ? error / (double)size[k] : 1, found.left);
    }
    return found;
}

enum { PK__LARGEST_ORDER = 16 };

/* *next = what the row's next step starts with, where a piece of it took `nodes` nodes; missed: by how much one node less
 * missed its target, 0: not tried. A test costs little beside a node that is too many, so the next step starts one lower;
 * but steps change slowly, so after a miss by 16^k not for k steps. Of several pieces the largest counts. */
static void pk__plan_next(pk__row_order *next, pk__row_order now, int nodes, double missed)
{
    int wait = now.wait;
    if (missed > 1)
        wait = missed < 1e9 ? (int)(log2(missed) / 4) : 7; /* log2(1e9) / 4 is 7.5 */
    else if (wait && nodes == now.nodes)
        wait--;
    else
        nodes -= nodes > 1;
    if (nodes > next->nodes || (nodes == next->nodes && wait > next->wait)) {
        next->nodes = (unsigned char)nodes;
        next->wait = (unsigned char)wait;
    }
}

/* Whether a piece waits for a test of its order. */
static int pk__is_open(const pk__integrator *integrator, size_t piece)
{
    return !integrator->passed[piece] && integrator->order[piece] <= PK__LARGEST_ORDER;
}

/* Of a piece that is the whole step, what pk__judge left in h. */
static void pk__keep_ends(pk__integrator *integrator, size_t row)
{
    const size_t both = 2 * pk_readout_count(&integrator->readout, integrator->segment.graph->output_width);
    memcpy(integrator->ends + row * both, integrator->h, both * sizeof *integrator->h);
    integrator->has_ends[row] = 1;
}

/* What a judgement of piece number i decides: it passes, or it is tested again by another order or judge. 1: again. */
static int pk__decide(pk__integrator *integrator, size_t i, const pk__judgement *found)
{
    pk__piece *piece = &integrator->pieces.piece[i];
    pk__row_state *state = &integrator->state[piece->row];
    const double before = integrator->missed[i], eps = PK__EPSILON;
    const int nodes = integrator->order[i], nested = integrator->nested[i];
    if (piece->size < 0 && isfinite(found->size)) { /* its first test */
        state->step_change += found->size;
        state->change = pk__larger(state->step_change, state->change);
    }
    piece->size = found->size;
    piece->error = found->error;
    if (isfinite(found->height))
        state->height = pk__larger(found->height, state->height);
    const double allowed = integrator->target * state->change;
    const double closure_floor = PK__MEASURABLE * eps * (state->height + found->size);
    if (!nested && closure_floor > PK__JUDGE * allowed && found->error <= closure_floor) {
        integrator->nested[i] = state->nested = 1;
        return 1;
    }
    if (nested && 2 * closure_floor < PK__JUDGE * allowed)
        state->nested = 0; /* from the next step on */
    const double floor = nested ? PK__MEASURABLE * eps * found->size : closure_floor;
    const double limit = allowed > floor ? allowed : floor;
    const double error = found->error <= limit ? (limit > 0 ? found->error / limit : 0) : found->error / limit;
    double noise = PK__NOISE / PK__MEASURABLE * floor;
    if (nested) {
        const double most = PK__NESTED_NOISE * found->size;
        noise = pk__larger(noise, closure_floor < most ? closure_floor : most);
    }
    integrator->missed[i] = error;
    if (error > 1 && before > 0 && error >= 0.5 * before && found->error <= noise) {
        integrator->order[i]--;
    } else if (!(error <= 1)) {
        integrator->order[i] = (unsigned char)(nodes < 12 ? nodes + 1 : nodes + 2);
        return integrator->order[i] <= PK__LARGEST_ORDER;
    }
    integrator->passed[i] = 1;
    integrator->missed[i] = found->left; /* the rest of its use: for the bounds */
    integrator->sequence[integrator->sequence_count++] = i;
    pk__plan_next(&integrator->next_order[piece->row], state->order, integrator->order[i], before);
    return 0;
}

/* Tests every piece that has not passed with its own order. Whether some piece is to be tested again. */
static int pk__test_pieces(pk__integrator *integrator)
{
    pk__path *segment = &integrator->segment;
    const pk__pieces *pieces = &integrator->pieces;
    const unsigned char *order = integrator->order, *nested = integrator->nested;
    int again = 0;
    for (size_t next = 0, last; next < pieces->count; next = last) {
        size_t points = 0, ends = 0;
        for (last = next; last < pieces->count; last++) { /* the nodes of all pieces; slopes are wanted here */
            const pk__piece *piece = &pieces->piece[last];
            const size_t nodes = order[last], all = nested[last] ? 2 * nodes + 1 : nodes;
            if (!pk__is_open(integrator, last))
                continue;
            if (points + all + ends + 2 > segment->point_capacity)
                break;
            for (size_t i = 0; i < all; i++, points++) {
                const size_t n = nodes + (i >= nodes), q = i < nodes ? i : i - nodes;
                segment->point_row[points] = piece->row;
                segment->point_t[points] =
                    (pk_real)(piece->a + (piece->b - piece->a) * integrator->gauss_nodes[n * (n - 1) / 2 + q]);
            }
            ends += nested[last] ? 0 : 2;
        }
        if (!points)
            continue;
        ends = points;
        for (size_t i = next; i < last; i++) /* then their ends; only values are */
            for (int end = 0; end < 2 && pk__is_open(integrator, i) && !nested[i]; end++, ends++) {
                segment->point_row[ends] = pieces->piece[i].row;
                segment->point_t[ends] = (pk_real)(end ? pieces->piece[i].b : pieces->piece[i].a);
            }
        const size_t first = pk__path_append(segment, ends, segment->point_row, segment->point_t);
        pk__path_tangent(segment, first, points, segment->point_row, segment->point_t);
        ends = first + points;
        points = first;
        for (size_t i = next; i < last; i++) {
            const pk__piece *piece = &pieces->piece[i];
            if (!pk__is_open(integrator, i))
                continue;
            const size_t nodes = order[i];
            const int closed = !nested[i];
            /* The values at the ends are those at the ends' t, rounded. */
            const double length = (double)(pk_real)piece->b - (double)(pk_real)piece->a;
            const pk__judgement found = pk__judge(integrator, points, ends, piece->row, length, (int)nodes,
                                                  !closed, integrator->state[piece->row].height);
            if (closed && piece->a == 0 && piece->b == 1)
                pk__keep_ends(integrator, piece->row);
            points += closed ? nodes : 2 * nodes + 1;
            ends += closed ? 2 : 0;
            again |= pk__decide(integrator, i, &found);
        }
    }
    return again;
}

/* Shorter pieces have nodes that pk_real hardly tells apart. */
#define PK__SHORTEST (sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-13)
/* After so many halvings the error must have fallen by half, unless at most so many parts are left. */
enum { PK__GENERATIONS = 2, PK__FEW_PARTS = 1 };
/* Errors that are a larger part of |h| are no rounding. */
#define PK__LARGEST_ROUNDING (sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-8)

/* Takes a piece as it is, although it missed. */
static void pk__accept(pk__integrator *integrator, const pk__piece *piece, pk__point_sink *sink, void *user)
{
    const double length = piece->b - piece->a;
    integrator->refused++;
    if (piece->size < 0) { /* its kinks have not been found */
        pk__emit(integrator, sink, user, piece->row, 0.5 * (piece->a + piece->b), length, 0, length);
        return;
    }
    const double left = piece->error < piece->size ? piece->error / piece->size : 1;
    pk__emit_gauss(integrator, sink, user, piece, PK__LARGEST_ORDER, 1, left);
}

/* A piece that has not passed, or whose kinks do not find room, waits for its halves; or is accepted where halving is of no
 * use. */
static void pk__fail_piece(pk__integrator *integrator, const pk__piece *piece, pk__point_sink *sink, void *user)
{
    pk__pieces *to = &integrator->failed;
    if (piece->b - piece->a < PK__SHORTEST || to->count == to->capacity)
        pk__accept(integrator, piece, sink, user);
    else
        to->piece[to->count++] = *piece;
}

/* By row; of a row the largest error first, NaN in front of all, then by t. */
static int pk__precedes_by_error(const pk__piece *piece, const pk__piece *other)
{
    if (piece->row != other->row || piece->error == other->error)
        return pk__precedes_by_place(piece, other);
    return isnan(piece->error) ? !isnan(other->error) || piece->a < other->a : piece->error > other->error;
}

/* Of each family of failed pieces, the parts of one ancestor, those whose error has not fallen are taken as they are where
 * there are several. */
static void pk__drop_stalled(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__pieces *failed = &integrator->failed;
    size_t kept = 0;
    pk__sort_pieces(failed, pk__precedes_by_place);
    for (size_t first = 0, last; first < failed->count; first = last) {
        const size_t row = failed->piece[first].row;
        const double family = failed->piece[first].family;
        for (last = first; last < failed->count; last++)
            if (failed->piece[last].row != row || failed->piece[last].family != family)
                break;
        for (size_t i = first; i < last; i++) {
            pk__piece piece = failed->piece[i];
            if (piece.age == 0 || piece.age == PK__GENERATIONS) {
                const pk__row_state *state = &integrator->state[row];
                if (piece.age && last - first > PK__FEW_PARTS && piece.size >= 0 &&
                    !(piece.error < 0.5 * piece.reference) &&
                    !(piece.error > PK__LARGEST_ROUNDING * (state->height + state->change))) {
                    pk__accept(integrator, &piece, sink, user);
                    continue;
                }
                piece.family = piece.a;
                piece.reference = piece.error;
                piece.age = 0;
            }
            piece.age++;
            failed->piece[kept++] = piece;
        }
    }
    failed->count = kept;
}

/* The halves of what has failed, the worst first, as long as there are halvings; the rest is accepted. */
static void pk__halve_failed(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__pieces *pending = &integrator->pending, *failed = &integrator->failed;
    pk__drop_stalled(integrator, sink, user);
    pk__sort_pieces(failed, pk__precedes_by_error);
    pending->count = 0;
    for (size_t i = 0; i < failed->count; i++) {
        const pk__piece *piece = &failed->piece[i];
        pk__row_state *state = &integrator->state[piece->row];
        if (state->halvings >= PK__HALVINGS || pending->count + 2 > pending->capacity) {
            pk__accept(integrator, piece, sink, user);
            continue;
        }
        state->halvings++;
        for (int half = 0; half < 2; half++) {
            pk__piece *part = &pending->piece[pending->count++];
            *part = *piece;
            if (half) {
                part->a = 0.5 * (piece->a + piece->b);
                part->slack_a = 0;
            } else {
                part->b = 0.5 * (piece->a + piece->b);
                part->slack_b = 0;
            }
        }
    }
}

/* Raises the order of each piece until it passes or the largest order is reached; emits what passed. */
static void pk__adapt(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    const pk__pieces *pieces = &integrator->pieces;
    memset(integrator->passed, 0, pieces->count);
    memset(integrator->missed, 0, pieces->count * sizeof *integrator->missed);
    for (size_t i = 0; i < pieces->count; i++) {
        pk__piece *piece = &pieces->piece[i];
        const pk__row_state *state = &integrator->state[piece->row];
        integrator->order[i] = state->order.nodes;
        integrator->nested[i] = state->nested;
        piece->size = piece->age ? 0 : -1; /* halves are parts of what has been counted */
    }
    integrator->sequence_count = 0;
    while (pk__test_pieces(integrator))
        ;
    for (size_t i = 0; i < integrator->sequence_count; i++) { /* as the tape holds their nodes */
        const size_t at = integrator->sequence[i];
        pk__emit_gauss(integrator, sink, user, &pieces->piece[at], integrator->order[at], 1,
                       integrator->missed[at]);
    }
    for (size_t i = 0; i < pieces->count; i++)
        if (!integrator->passed[i])
            pk__fail_piece(integrator, &pieces->piece[i], sink, user);
}

enum { PK__SURROGATE_NODES = 8 };

PK__INTERNAL void pk__integrate(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__path *segment = &integrator->segment;
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
    pk__pieces *pending = &integrator->pending, *pieces = &integrator->pieces;
    memset(integrator->next_order, 0, segment->rows * sizeof *integrator->next_order);
    pending->count = 0;
    for (size_t row = 0; row < segment->rows; row++) {
        integrator->state[row].halvings = 0;
        integrator->state[row].step_change = 0;
        pk__pieces_push(pending, row, 0, 1);
    }
    while (pending->count) {
        integrator->failed.count = 0;
        for (size_t first = 0; first < pending->count; first += segment->rows) {
            pk__pieces batch = {pk__min(segment->rows, pending->count - first), 0, pending->piece + first};
            if (!pk__path_split(segment, &batch, pieces)) {
                /* More kinks than there is room for: half as long pieces have fewer. */
                for (size_t i = 0; i < batch.count; i++) {
                    batch.piece[i].size = -1;
                    batch.piece[i].error = INFINITY;
                    pk__fail_piece(integrator, &batch.piece[i], sink, user);
                }
                continue;
            }
            integrator->split_pieces += pieces->count;
            for (size_t i = 0; fixed && i < pieces->count; i++)
                pk__emit_gauss(integrator, sink, user, &pieces->piece[i], order, 0, 0);
            if (!fixed)
                pk__adapt(integrator, sink, user);
        }
        pk__halve_failed(integrator, sink, user);
    }
    for (size_t row = 0; !fixed && row < segment->rows; row++)
        integrator->state[row].order = integrator->next_order[row].nodes
                                           ? integrator->next_order[row]
                                           : (pk__row_order){PK__LARGEST_ORDER, 0};
    pk__flush(integrator, sink, user, 1);
}

PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator)
{
    pk__path *segment = &integrator->segment;
    const size_t classes = segment->graph->output_width,
                 outputs = pk_readout_count(&integrator->readout, classes);
    for (size_t row = 0, points = 0; row < segment->rows; row++) {
        for (int end = 0; end < 2 && !integrator->has_ends[row]; end++, points++) {
            segment->point_row[points] = row;
            segment->point_t[points] = (pk_real)end;
        }
        if (!points || (row + 1 < segment->rows && points + 2 <= segment->point_capacity))
            continue;
        pk__path_forward(segment, points, segment->point_row, segment->point_t);
        for (size_t p = 0; p < points; p++)
            pk__readout_apply(&integrator->readout, classes, integrator->first_row + segment->point_row[p],
                              pk__pass_output(&segment->tape) + p * classes,
                              integrator->ends + (2 * segment->point_row[p] + p % 2) * outputs,
                              integrator->slope);
        points = 0;
    }
    return integrator->ends;
}

PK__END_CODE
/* <<< implementation */
#endif
