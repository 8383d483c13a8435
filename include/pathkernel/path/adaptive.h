/* pathkernel/path/adaptive.h: the adaptive rule: how many nodes each piece of a step takes, and whether that is enough.
 *
 * What is integrated is the gradient of a readout h(f(w + t d, x)) with respect to the weights. The adaptive rule:
 *   1. split the step at the kinks that can be found (kinks.h);
 *   2. test each piece with n nodes. Its error is the difference between the sum over the nodes of dh/dt, and h at the
 *      end minus h at the start, which forward passes give: the closure of the piece. It may be `target` times the
 *      most that h has changed in a step of this row: contributions are parts of such changes, whatever the size of h;
 *   3. the closure has a floor, the rounding of h. Where the changes are so small that the floor hides what matters, as
 *      in tiny steps of a trained network, the difference to the rule with n + 1 nodes is the error instead: its
 *      rounding is relative to the changes (a nested judgement);
 *   4. a piece that misses gets one node more, up to 16; then it is halved (integrator.h). All pieces of a row are tested
 *      before any is halved, and those that miss by most are halved first, since the number of halvings is limited;
 *   5. an error that neither more nodes nor two halvings lower, in several of the four parts, is rounding: these pieces
 *      are accepted as they are, counted, and their errors go into the bounds. (In one part only, it is a place where h
 *      changes within a short part of the step. It is halved until that is resolved.)
 * Depth first (one piece after the other, to its end) was rejected: where rounding makes the target unreachable, it
 * spends all halvings at the first place where this happens.
 *
 * With a tolerance looser than the default, and in a network with kinks, each step is first tested as a whole or in halves, without a look
 * at its kinks (docs/mathematics.md, Quadrature): the nodes have the mean slopes of their stretches (pass.h), and two rules are
 * compared. Only what they miss goes through 1 to 5.
 *
 * A test takes the network's values at the nodes, and the tape keeps them: the pieces that pass are handed over in the
 * order in which they passed, so that the reverse pass finds most of its values there.
 */
#ifndef PATHKERNEL_ADAPTIVE_H
#define PATHKERNEL_ADAPTIVE_H
#include "quadrature.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_ADAPTIVE_INTERNALS_KNOWN)
#define PATHKERNEL_ADAPTIVE_INTERNALS_KNOWN
/* >>> internals */
/* Points of a block: t[p] in [0, 1] of row row[p] with weight[p]. Where bounds are asked for, check[p] are the weights of (a
 * rule of higher order minus the rule), and slack[p] those with which the sizes of the gradients bound what no rule sees: how
 * far the kinks beside the point may lie from where they were found, and what a piece left of its closure; else both are
 * NULL. */
typedef struct pk__points {
    size_t count;
    size_t *row;
    pk_real *t, *weight, *check, *slack;
    pk_real *from, *to; /* the ends of the stretch over which the point has mean slopes; equal: its own slopes */
    int means;          /* some point has mean slopes */
    int last; /* no more points come in this step */
} pk__points;

/* The order that a row's next step starts with: `nodes` for each of its pieces. For the next `wait` steps, fewer nodes are not
 * tried. */
typedef struct pk__row_order {
    unsigned char nodes, wait;
} pk__row_order;

enum { PK__FIRST_NODES = 2 };
/* A step whose kinks are not looked for has so many parts at most, each with so many nodes. */
enum { PK__WHOLE_PARTS = 8, PK__WHOLE_NODES = 16, PK__PROJECTIONS = 2 };

/* What is known of a row along the run, step after step. */
typedef struct pk__row_state {
    double height;        /* the largest |h| that is known */
    double change;        /* the scale of errors: the most that h changed in one step */
    double step_change;   /* the same of this step, as far as it is known */
    size_t halvings;      /* of its pieces in this step */
    pk__row_order order;  /* at first PK__FIRST_NODES */
    unsigned char nested; /* pieces are judged by a nested rule at first */
    /* Of steps whose kinks are not looked for: the nodes that each part of the next one starts with (0: 1), and log2 of the number
     * of parts; so many steps are not tried; the number of the last ones that failed, up to a few. */
    unsigned char whole_nodes, whole_depth, whole_wait, whole_failed;
} pk__row_state;

/* Where the integration of a step stands: what is found out next, when all points that are known have been handed over. */
typedef enum pk__stage {
    PK__STAGE_RULE,    /* a rule that is the same for every row: nothing more is to be found out */
    PK__STAGE_WHOLE,   /* whole steps are tested with mean slopes; those that fail wait */
    PK__STAGE_PIECES,  /* the next pieces that wait are split at their kinks and tested */
    PK__STAGE_STALLED, /* of those that failed, the pieces that halving does not help are accepted */
    PK__STAGE_HALVE,   /* the rest of them is halved; the halves wait */
    PK__STAGE_END
} pk__stage;

/* Pieces on their way to the caller, node by node: those of the list that are accepted. */
typedef struct pk__handover {
    const pk__piece *pieces;
    const size_t *sequence; /* their order; NULL: as they stand */
    size_t count, next;     /* next: the first that is not complete */
    int node;               /* its next node */
} pk__handover;

/* The integration of one block of rows, step after step; one a thread. */
typedef struct pk__integrator {
    pk__path path;
    pk_quadrature quadrature;
    pk_readout readout;
    size_t first_row; /* of the block among the test rows */
    double target;    /* the error a piece may have, relative to the change of its row */
    /* The error a whole step may have whose kinks are not looked for: relative to its own change, or to the largest change of its
     * row; 0: kinks are always looked for. */
    double whole_target, whole_least;
    int at_one_point; /* instead of a rule: one point a row, at `point` with point_weight */
    double point, point_weight;
    const double *gauss_nodes, *gauss_weights; /* rules 1 .. PK_GAUSS_NODES, rule n from n (n - 1) / 2 */
    pk__row_state *state;                      /* the caller's, one per row */
    /* This step: */
    pk__stage stage;
    int fixed_order;                  /* nodes of every piece; 0: adaptive */
    size_t waiting;                   /* the first of `pending` that has not been looked at */
    pk__pieces pending, failed;       /* to be tested; to be halved */
    pk__pieces pieces;                /* under test, between their kinks */
    size_t *sequence, sequence_count; /* of those, the ones that are accepted, in the order of the tape */
    pk__row_order *next_order;        /* of the rows */
    pk__handover handover;
    pk__points points;
    /* h at both ends of the step (rows x 2 x readouts), of the rows where it has been measured: */
    pk_real *ends;
    unsigned char *has_ends;
    /* Of the last rule that was tested on each of `pieces`, where kinks are not looked for: PK__WHOLE_PARTS rows x (2 x readouts,
     * along the step and along the probe; PK__PROJECTIONS x layers, of the layers' mean inputs). */
    pk_real *whole_sums;
    pk_real *slope, *h; /* room for one readout, and five h */
    /* Counted over the steps since the caller zeroed them: */
    size_t points_last; /* points of the last step: the cost model's guess for the next one */
    size_t point_count, split_pieces, refused; /* refused: pieces accepted although they missed the target */
} pk__integrator;
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_ADAPTIVE_IMPLEMENTED)
#define PATHKERNEL_ADAPTIVE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* Multiples of the rounding of what is added. Below the first, nothing can be measured; an error below the second that another
 * node does not lower is rounding. In float, where no target is below the first, it is smaller. */
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
    const pk__tape *tape = &integrator->path.tape;
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

/* Judges a piece from the tape: its nodes are the points from first on; its ends the points `start_at` and `end_at`, or, nested,
 * the nodes of one order more follow its own. height: of the row, as far as it is known. */
static pk__judgement pk__judge(pk__integrator *integrator, size_t first, size_t start_at, size_t end_at,
                               size_t row, double length, int order, int nested, double height)
{
    const pk__tape *tape = &integrator->path.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    pk_real *start = integrator->h, *end = start + count, *sum = end + count, *size = sum + count,
            *better = size + count;
    pk__judgement found = {0, 0, height, 0};
    memset(sum, 0, 3 * count * sizeof *sum);
    pk__sum_nodes(integrator, first, row, length, order, start, sum, size, nested ? &found.height : NULL);
    if (nested) {
        pk__sum_nodes(integrator, first + (size_t)order, row, length, order + 1, start, better, NULL, NULL);
    } else {
        const pk_real *f = pk__pass_output(tape);
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + start_at * outputs, start,
                          integrator->slope);
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + end_at * outputs, end,
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
static int pk__is_open(const pk__piece *piece)
{
    return !piece->accepted && piece->order > 0 && piece->order <= PK__LARGEST_ORDER;
}

/* Of a piece that is the whole step, what pk__judge left in h. */
static void pk__keep_ends(pk__integrator *integrator, size_t row)
{
    const size_t both = 2 * pk_readout_count(&integrator->readout, integrator->path.graph->output_width);
    memcpy(integrator->ends + row * both, integrator->h, both * sizeof *integrator->h);
    integrator->has_ends[row] = 1;
}

/* A piece becomes part of the result, behind those that are it already. left: the part of its integral that its test could not
 * explain, for the bounds. */
static void pk__accept_in_sequence(pk__integrator *integrator, pk__piece *piece, double left)
{
    piece->accepted = 1;
    piece->missed = left;
    integrator->sequence[integrator->sequence_count++] = (size_t)(piece - integrator->pieces.piece);
}

/* What a judgement of a piece decides: it passes, or it is tested again by another order or judge. 1: again. */
static int pk__decide(pk__integrator *integrator, pk__piece *piece, const pk__judgement *found)
{
    pk__row_state *state = &integrator->state[piece->row];
    const double before = piece->missed, eps = PK__EPSILON;
    const int nodes = piece->order, nested = piece->nested;
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
        piece->nested = state->nested = 1;
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
    piece->missed = error;
    if (error > 1 && before > 0 && error >= 0.5 * before && found->error <= noise) {
        piece->order--;
    } else if (!(error <= 1)) {
        piece->order = (unsigned char)(nodes < 12 ? nodes + 1 : nodes + 2);
        return piece->order <= PK__LARGEST_ORDER;
    }
    pk__accept_in_sequence(integrator, piece, found->left);
    pk__plan_next(&integrator->next_order[piece->row], state->order, piece->order, before);
    return 0;
}

/* The points of the tests of the pieces from `next` on, as many pieces as find room: first the nodes of all, *nodes of them;
 * then the ends of those that are judged by their closure. Returns how many points there are; *last: one behind the last
 * piece. */
static size_t pk__test_points(pk__integrator *integrator, size_t next, size_t *last, size_t *nodes)
{
    pk__path *path = &integrator->path;
    const pk__pieces *pieces = &integrator->pieces;
    size_t points = 0, ends = 0;
    for (*last = next; *last < pieces->count; ++*last) {
        const pk__piece *piece = &pieces->piece[*last];
        const size_t own = piece->order, all = piece->nested ? 2 * own + 1 : own;
        if (!pk__is_open(piece))
            continue;
        /* The first one fits in any case: at most 33 nodes without ends, or 16 with two, where there is room for 34. */
        if (points && points + all + ends + 2 > path->point_capacity)
            break;
        for (size_t i = 0; i < all; i++, points++) {
            const size_t n = own + (i >= own), q = i < own ? i : i - own;
            path->point_row[points] = piece->row;
            path->point_t[points] =
                (pk_real)(piece->a + (piece->b - piece->a) * integrator->gauss_nodes[n * (n - 1) / 2 + q]);
        }
        ends += piece->nested ? 0 : 2;
    }
    *nodes = points;
    for (size_t i = next; points && i < *last; i++)
        for (int end = 0; end < 2 && pk__is_open(&pieces->piece[i]) && !pieces->piece[i].nested;
             end++, points++) {
            path->point_row[points] = pieces->piece[i].row;
            path->point_t[points] = (pk_real)(end ? pieces->piece[i].b : pieces->piece[i].a);
        }
    return points;
}

/* Tests every piece that is open with its own order. Whether some piece is to be tested again. */
static int pk__test_pieces(pk__integrator *integrator)
{
    pk__path *path = &integrator->path;
    const pk__pieces *pieces = &integrator->pieces;
    int again = 0;
    for (size_t next = 0, last; next < pieces->count; next = last) {
        size_t nodes;
        const size_t count = pk__test_points(integrator, next, &last, &nodes);
        if (!count)
            continue;
        /* Values at all points; the slopes along the step at the nodes alone. */
        size_t point = pk__path_append(path, count, path->point_row, path->point_t), end = point + nodes;
        pk__path_tangent(path, point, nodes, path->point_row, path->point_t);
        for (size_t i = next; i < last; i++) {
            pk__piece *piece = &pieces->piece[i];
            if (!pk__is_open(piece))
                continue;
            const size_t own = piece->order;
            const int closed = !piece->nested;
            /* The values at the ends are those at the ends' t, rounded. */
            const double length = (double)(pk_real)piece->b - (double)(pk_real)piece->a;
            const pk__judgement found = pk__judge(integrator, point, end, end + 1, piece->row, length, (int)own, !closed,
                                                  integrator->state[piece->row].height);
            if (closed && piece->a == 0 && piece->b == 1)
                pk__keep_ends(integrator, piece->row);
            point += closed ? own : 2 * own + 1;
            end += closed ? 2 : 0;
            again |= pk__decide(integrator, piece, &found);
        }
    }
    return again;
}

/* Tests `pieces`: each gets more nodes until it passes or has the most. Those that pass are accepted. */
PK__PRIVATE void pk__adapt(pk__integrator *integrator)
{
    for (size_t i = 0; i < integrator->pieces.count; i++) {
        pk__piece *piece = &integrator->pieces.piece[i];
        const pk__row_state *state = &integrator->state[piece->row];
        piece->order = state->order.nodes;
        piece->nested = state->nested;
        piece->missed = 0;
        piece->size = piece->age ? 0 : -1; /* halves are parts of what has been counted */
    }
    while (pk__test_pieces(integrator))
        ;
}

/* ---- whole steps, whose kinks are not looked for ------------------------------------------------------------ */

/* Failures one after the other that count; in whole_target, how far the mean inputs of layers may be apart, and the gap beside kinks, which
 * is more than what is missed there. */
enum { PK__WHOLE_FAILURES = 5, PK__INPUTS_APART = 12, PK__KINKS_APART = 32 };

/* Where the stretch of node `node` of the rule with `order` nodes on [a, b] begins: the ends of the stretches divide the piece as
 * its weights do. node == order: where the last one ends. */
PK__PRIVATE double pk__stretch_end(const pk__integrator *integrator, double a, double b, int order, int node)
{
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    double sum = 0;
    if (node == order)
        return b;
    for (int q = 0; q < node; q++)
        sum += w[q];
    return a + (b - a) * sum;
}

/* The points of the tests of the whole steps from `next` on: first the nodes of all, *nodes of them, then the ends of their
 * stretches. Returns how many points there are; *last: one behind the last piece. */
static size_t pk__whole_points(pk__integrator *integrator, size_t next, size_t *last, size_t *nodes)
{
    pk__path *path = &integrator->path;
    const pk__pieces *pieces = &integrator->pieces;
    size_t points = 0, all = 0;
    for (*last = next; *last < pieces->count; ++*last) {
        const pk__piece *piece = &pieces->piece[*last];
        const size_t own = piece->order;
        if (!pk__is_open(piece))
            continue;
        if (points && all + 2 * own + 1 > path->point_capacity)
            break;
        all += 2 * own + 1;
        for (size_t q = 0; q < own; q++, points++) {
            path->point_row[points] = piece->row;
            path->point_t[points] =
                (pk_real)(piece->a + (piece->b - piece->a) * integrator->gauss_nodes[own * (own - 1) / 2 + q]);
        }
    }
    *nodes = points;
    for (size_t i = next, node = 0; i < *last; i++) {
        const pk__piece *piece = &pieces->piece[i];
        for (int q = 0; q <= piece->order && pk__is_open(piece); q++, points++) {
            path->point_row[points] = piece->row;
            path->point_t[points] =
                (pk_real)pk__stretch_end(integrator, piece->a, piece->b, piece->order, q);
            if (q == piece->order)
                continue;
            path->from[node] = points;
            path->to[node++] = points + 1;
        }
    }
    return points;
}

/* How many numbers of integrator->whole_sums a piece has. */
PK__PRIVATE size_t pk__whole_numbers(const pk_graph *graph, size_t readouts)
{
    return 2 * readouts + PK__PROJECTIONS * graph->layers;
}

/* How much of the values between layers the rule with the nodes from number `first` of the test on may miss beside the kinks. */
static double pk__whole_gap(const pk__integrator *integrator, size_t first, const pk__piece *piece)
{
    const double *w = integrator->gauss_weights + piece->order * (piece->order - 1) / 2;
    double sum = 0;
    for (int q = 0; q < piece->order; q++) {
        const double gap = w[q] * integrator->path.gap[first + (size_t)q];
        sum += gap * gap;
    }
    return sqrt(sum) * (piece->b - piece->a);
}

/* The layers' mean inputs by the rule with the nodes from `first` on, projected on vectors of random signs, become those of piece
 * number `at`. Returns how far they are from what was there: the largest over the layers, relative to the size of the inputs. */
static double pk__whole_inputs(pk__integrator *integrator, size_t first, size_t at)
{
    const pk_graph *graph = integrator->path.graph;
    const pk__piece *piece = &integrator->pieces.piece[at];
    const size_t readouts = pk_readout_count(&integrator->readout, graph->output_width);
    pk_real *before = integrator->whole_sums + at * pk__whole_numbers(graph, readouts) + 2 * readouts;
    const double *w = integrator->gauss_weights + piece->order * (piece->order - 1) / 2;
    double largest = 0;
    for (size_t l = 0; l < graph->layers; l++, before += PK__PROJECTIONS) {
        const pk_node *node = &graph->nodes[graph->nodes[l].layer_node];
        const size_t width = graph->nodes[node->inputs[0]].width;
        const pk_real *value = integrator->path.tape.value[node->inputs[0]] + first * width;
        double sum[PK__PROJECTIONS] = {0}, size = 0, apart = 0;
        if (node->input_constant)
            continue;
        for (int q = 0; q < piece->order; q++, value += width) {
            uint32_t random = 1;
            double part[PK__PROJECTIONS] = {0};
            for (size_t i = 0; i < width; i++) {
                const double a = value[i];
                random = random * 1664525u + 1013904223u;
                part[0] += random >> 31 ? -a : a;
                part[1] += random >> 30 & 1 ? -a : a;
                size += w[q] * a * a;
            }
            for (int k = 0; k < PK__PROJECTIONS; k++)
                sum[k] += w[q] * part[k];
        }
        for (int k = 0; k < PK__PROJECTIONS; k++) {
            apart = pk__larger(fabs(sum[k] - (double)before[k]), apart);
            before[k] = (pk_real)sum[k];
        }
        if (apart > 0)
            largest = pk__larger(apart / sqrt(size), largest);
    }
    return largest * (piece->b - piece->a);
}

/* The sums of the rule with the nodes from `first` on, along the step or along the probe, become those of piece number `at`. Returns
 * the largest difference to what was there. */
static double pk__whole_difference(pk__integrator *integrator, size_t first, size_t at, int probe)
{
    const pk__piece *piece = &integrator->pieces.piece[at];
    const size_t count = pk_readout_count(&integrator->readout, integrator->path.graph->output_width);
    pk_real *before = integrator->whole_sums + at * pk__whole_numbers(integrator->path.graph, count) +
                      (size_t)probe * count,
            *value = integrator->h, *sum = value + count;
    double largest = 0;
    memset(sum, 0, count * sizeof *sum);
    pk__sum_nodes(integrator, first, piece->row, piece->b - piece->a, piece->order, value, sum, NULL, NULL);
    for (size_t k = 0; k < count; k++) {
        largest = pk__larger(fabs((double)sum[k] - (double)before[k]), largest);
        before[k] = sum[k];
    }
    return largest;
}

/* So many nodes a piece may take whose kinks are not looked for: at most a part of what it would take between its kinks, since tests
 * cost, too. */
static double pk__whole_limit(const pk__integrator *integrator, const pk__piece *piece)
{
    const int fixed = integrator->fixed_order;
    const double most = PK__WHOLE_PARTS * PK__WHOLE_NODES * (piece->b - piece->a),
                 split = (double)(piece->kinks + 1) * (fixed ? fixed : 1);
    return 0.7 * split > most ? most : 0.7 * split > 1 ? 0.7 * split : 1;
}

/* The error that a piece may have whose kinks are not looked for. */
static double pk__whole_allowed(const pk__integrator *integrator, const pk__piece *piece)
{
    return pk__larger(integrator->whole_target * piece->size, integrator->whole_least *
                                                                  integrator->state[piece->row].change *
                                                                  (piece->b - piece->a));
}

/* What the tests of a piece decide, of which `reference` is the closure of the rule before, with `family` nodes (0: there is none),
 * `missed` that of this rule, and `error` the difference of the two: one of them is accepted, or a rule with more nodes is
 * tested, or (order 0) the piece is halved, if so many nodes as `reference` are worth it, or its kinks are looked for. 1: a test
 * follows.
 *
 * Mean slopes make the closure of each rule nearly an identity (its error is of the same order as theirs, but smaller), so that
 * the difference of two rules judges, too, along the step and along the probe. Errors fall about like the square of the
 * number of nodes: that of the rule with fewer nodes is the difference, that of the other a part of it. An example's gradient
 * may be large where the step hardly goes; so the layers' mean inputs by the two rules must agree, too. */
static int pk__decide_whole(pk__integrator *integrator, pk__piece *piece)
{
    pk__row_state *state = &integrator->state[piece->row];
    const int nodes = piece->order, before = (int)piece->family;
    const double floor = PK__MEASURABLE * PK__EPSILON * (state->height + piece->size),
                 allowed = pk__whole_allowed(integrator, piece);
    const double apart = piece->inputs_apart * allowed / (PK__INPUTS_APART * integrator->whole_target);
    double error = piece->missed;
    if (before) {
        const double ratio = (double)nodes / before;
        piece->error = pk__larger(apart, piece->error);
        error = pk__larger(piece->error / (ratio * ratio - 1), piece->missed);
    }
    /* Where the rounding of h hides what the closure is to show, nothing can be judged. */
    const double limit = pk__whole_limit(integrator, piece);
    const int judged = floor <= allowed && isfinite(error);
    if (judged && before && piece->error <= allowed && piece->reference <= allowed)
        piece->order = (unsigned char)before;
    if (judged && before && piece->order <= limit && (piece->order == before || error <= allowed)) {
        pk__accept_in_sequence(integrator, piece, 0);
        return 0;
    }
    const double wanted = judged ? nodes * sqrt(error / allowed) : INFINITY;
    const int next = 2 * nodes > (int)fmin(wanted, PK__WHOLE_NODES) ? 2 * nodes : (int)fmin(wanted, PK__WHOLE_NODES);
    if (nodes == PK__WHOLE_NODES || !(wanted <= 2 * PK__WHOLE_NODES) ||
        !(next <= limit || nodes == 1)) {
        piece->order = 0;
        piece->reference = wanted;
        return 0;
    }
    piece->family = nodes;
    piece->reference = piece->missed;
    piece->order = (unsigned char)(next < PK__WHOLE_NODES ? next : PK__WHOLE_NODES);
    return 1;
}

/* Tests every piece that is open, without a look at its kinks. Whether some is to be tested again. */
static int pk__test_whole(pk__integrator *integrator)
{
    pk__path *path = &integrator->path;
    const pk__pieces *pieces = &integrator->pieces;
    int again = 0;
    for (size_t next = 0, last; next < pieces->count; next = last) {
        size_t nodes;
        const size_t count = pk__whole_points(integrator, next, &last, &nodes);
        if (!count)
            continue;
        const size_t start = pk__path_append(path, count, path->point_row, path->point_t);
        pk__path_use_means(path, 1);
        for (int probe = 0; probe < 2; probe++) {
            size_t point = start, end = start + nodes;
            if (probe)
                pk__path_probe(path, start, nodes, path->point_row, path->point_t);
            else
                pk__path_tangent(path, start, nodes, path->point_row, path->point_t);
            for (size_t i = next; i < last; i++) {
                pk__piece *piece = &pieces->piece[i];
                pk__row_state *state = &integrator->state[piece->row];
                const size_t own = piece->order;
                if (!pk__is_open(piece))
                    continue;
                if (!probe) {
                    const pk__judgement found =
                        pk__judge(integrator, point, end, end + own, piece->row,
                                  (double)(pk_real)piece->b - (double)(pk_real)piece->a, (int)own, 0, state->height);
                    if (piece->a == 0 && piece->b == 1)
                        pk__keep_ends(integrator, piece->row);
                    piece->size = found.size;
                    if (isfinite(found.height))
                        state->height = pk__larger(found.height, state->height);
                    if (isfinite(found.size))
                        state->change = pk__larger(found.size, state->change);
                    /* A kink whose stretch is hardly seen by the nodes, near an end of the step, shows in the values at the ends. */
                    const double allowed = pk__whole_allowed(integrator, piece);
                    piece->missed = pk__larger(pk__whole_gap(integrator, point - start, piece) * allowed /
                                                   (PK__KINKS_APART * integrator->whole_target),
                                               found.error);
                    piece->inputs_apart = pk__whole_inputs(integrator, point, i);
                    piece->kinks = pk__path_sign_changes(path, end, end + own);
                }
                const double difference = pk__whole_difference(integrator, point, i, probe);
                piece->error = probe ? pk__larger(difference, piece->error) : difference;
                point += own;
                end += own + 1;
                again |= probe && pk__decide_whole(integrator, piece);
            }
        }
        pk__path_use_means(path, 0);
    }
    return again;
}

/* Halves the pieces that failed, where that is promising. Whether there are any. */
static int pk__halve_whole(pk__integrator *integrator)
{
    pk__pieces *pieces = &integrator->pieces;
    const size_t count = pieces->count;
    int some = 0;
    for (size_t i = 0; i < count; i++) {
        pk__piece *piece = &pieces->piece[i];
        const double length = piece->b - piece->a, middle = 0.5 * (piece->a + piece->b), wanted = piece->reference;
        const double limit = pk__whole_limit(integrator, piece);
        if (piece->accepted || piece->order || PK__WHOLE_PARTS * length < 2 || limit < 2 || !(wanted <= limit))
            continue;
        /* a quarter of what is wanted of each half, for the first rule */
        piece->order = (unsigned char)(wanted < 16 ? 1 : wanted < 64 ? (int)(wanted / 8) : 8);
        piece->family = piece->reference = 0;
        pk__piece *half = &pieces->piece[pieces->count++];
        *half = *piece;
        piece->b = half->a = middle;
        some = 1;
    }
    return some;
}

/* What the next step of a row starts with, where this one took `nodes` nodes in each of 2^depth parts at most (0: most of it
 * failed): half of them, for which the rule with twice as many is the judge. Steps change slowly: after several failures one after
 * the other, 2, 6, 14 .. steps are not tried. */
static void pk__plan_whole(pk__row_state *state, int nodes, int depth)
{
    if (nodes) {
        const int fewer = depth > 0 && nodes <= PK__WHOLE_NODES / 4;
        state->whole_nodes = (unsigned char)(nodes > 1 ? fewer ? nodes : nodes / 2 : 1);
        state->whole_depth = (unsigned char)(depth - fewer);
        state->whole_failed = 0;
        return;
    }
    state->whole_failed = (unsigned char)(state->whole_failed + (state->whole_failed < PK__WHOLE_FAILURES));
    state->whole_wait = (unsigned char)((1 << state->whole_failed) - 2);
}

/* Tests the steps of the rows without a look at their kinks, as wholes or in parts. Of `pieces` then, those that passed are accepted;
 * the others are to be split. */
PK__PRIVATE void pk__adapt_whole(pk__integrator *integrator)
{
    pk__pieces *pieces = &integrator->pieces;
    const size_t rows = integrator->path.rows;
    pieces->count = 0;
    for (size_t row = 0; row < rows; row++) {
        const pk__row_state *state = &integrator->state[row];
        const int parts = state->whole_wait ? 1 : 1 << state->whole_depth;
        for (int part = 0; part < parts; part++) {
            pk__piece *piece =
                pk__pieces_push(pieces, row, (double)part / parts, (double)(part + 1) / parts);
            piece->unsplit = 1;
            piece->reference = INFINITY;
            piece->order = state->whole_wait ? 0 : state->whole_nodes ? state->whole_nodes : 1;
        }
    }
    do
        while (pk__test_whole(integrator))
            ;
    while (pk__halve_whole(integrator));
    for (size_t row = 0; row < rows; row++) {
        pk__row_state *state = &integrator->state[row];
        int nodes = 0, depth = 0;
        double passed = 0; /* part of the step */
        for (size_t i = 0; i < pieces->count; i++) {
            const pk__piece *piece = &pieces->piece[i];
            if (piece->row != row)
                continue;
            nodes = piece->order > nodes ? piece->order : nodes;
            while (piece->b - piece->a < 0.75 / (1 << depth))
                depth++;
            passed += piece->accepted ? piece->b - piece->a : 0;
            state->step_change += piece->accepted ? piece->size : 0;
        }
        if (state->whole_wait)
            state->whole_wait--;
        else
            pk__plan_whole(state, passed < 0.5 ? 0 : nodes, depth);
    }
}

PK__END_CODE
/* <<< implementation */
#endif
