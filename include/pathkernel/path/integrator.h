/* pathkernel/path/integrator.h: the points (row, t) that integrate a step of a block of rows, with their weights, batch after
 * batch:
 *
 *     pk__integrator_begin(&integrator, ...);
 *     while (pk__integrator_next(&integrator, &points))
 *         ... values, cotangents and sums at the points ...
 *
 * Between two calls the integrator only remembers where it stands (pk__stage): which points are known and not yet handed over,
 * and what is to be found out when these are gone. A fixed rule knows all points at once. Else pieces go round:
 *
 *     waiting --split at kinks, tested--> accepted ............................... handed over
 *                                    `--> failed --halving does not help--> accepted, handed over
 *                                              `--halved--> waiting
 *
 * until none waits. With a loose tolerance the whole step of each row is tested first, without a look at its kinks (adaptive.h). A
 * batch is full before it is handed over, whatever stage its points come from, and pieces are tested only
 * when all earlier points stand in a batch: batches depend on shapes alone, and the tape still has the values of the last
 * test at the points that are handed over (path.h finds them there).
 */
#ifndef PATHKERNEL_INTEGRATOR_H
#define PATHKERNEL_INTEGRATOR_H
#include "adaptive.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_INTEGRATOR_INTERNALS_KNOWN)
#define PATHKERNEL_INTEGRATOR_INTERNALS_KNOWN
/* >>> internals */
/* points: of one batch; reverse_points: of one pk__path_reverse. bounds: also give what bounds on the error of the integrals
 * are made from. */
PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator);
PK__INTERNAL void pk__points_take(pk__arena *arena, size_t capacity, int bounds, pk__points *points);
/* Starts with the step that the integrator's path is at (after pk__path_begin). */
PK__INTERNAL void pk__integrator_begin(pk__integrator *integrator);
/* The next points of the step, valid until the next call; 0 where there are no more. There is at least one batch, and the last
 * one, perhaps without points, has `last` set. */
PK__INTERNAL int pk__integrator_next(pk__integrator *integrator, const pk__points **points);
/* h at both ends of the step of every row, after its last batch: rows x 2 x readouts numbers, until the next step. */
PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_INTEGRATOR_IMPLEMENTED)
#define PATHKERNEL_INTEGRATOR_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

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
    points->from = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->to = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->means = 0;
}

PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator)
{
    size_t pieces = pk__piece_capacity(rows), outputs = graph->output_width;
    memset(integrator, 0, sizeof *integrator);
    points = pk__max(points, PK_GAUSS_NODES + 2);
    pk__path_take(arena, graph, rows, points, reverse_points, copies, pieces, bounds, &integrator->path);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->pending);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->failed);
    pk__pieces_take(arena, pieces, &integrator->pieces);
    integrator->next_order = pk__arena_take(arena, rows, sizeof *integrator->next_order);
    integrator->sequence = pk__arena_take(arena, pieces, sizeof *integrator->sequence);
    pk__points_take(arena, points, bounds, &integrator->points);
    integrator->slope = pk__arena_take(arena, copies, outputs * sizeof *integrator->slope);
    integrator->h = pk__arena_take(arena, copies, 5 * sizeof *integrator->h);
    integrator->ends = pk__arena_take(arena, rows, 2 * copies * sizeof *integrator->ends);
    integrator->has_ends = pk__arena_take(arena, rows, 1);
    const size_t sums = pk__whole_numbers(graph, copies), whole_pieces = PK__WHOLE_PARTS * rows;
    integrator->whole_sums = pk__arena_take(arena, whole_pieces, sums * sizeof *integrator->whole_sums);
    if (integrator->whole_sums)
        memset(integrator->whole_sums, 0, whole_pieces * sums * sizeof *integrator->whole_sums);
}

/* One behind the last of the points from p on that are of its row. */
PK__PRIVATE size_t pk__row_end(const pk__points *points, size_t p)
{
    size_t end = p + 1;
    while (end < points->count && points->row[end] == points->row[p])
        end++;
    return end;
}

/* ---- points of what is known ------------------------------------------------------------------------------ */

/* Puts a point into the batch, where the caller knows that there is room. */
static void pk__put_point(pk__integrator *integrator, size_t row, double t, double weight, double check,
                          double slack)
{
    pk__points *points = &integrator->points;
    const size_t at = points->count++;
    points->row[at] = row;
    points->t[at] = (pk_real)t;
    points->weight[at] = (pk_real)weight;
    points->from[at] = points->to[at] = (pk_real)t;
    if (points->check) {
        points->check[at] = (pk_real)check;
        points->slack[at] = (pk_real)slack;
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
/* The same of a whole step with mean slopes, whose errors fall more slowly. */
static int pk__check_whole(int n)
{
    return 2 * n + 2 < PK_GAUSS_NODES ? 2 * n + 2 : (int)PK_GAUSS_NODES;
}

/* The nodes of the rule that shows the error of a piece; 0: none is needed. */
static int pk__piece_check(const pk__integrator *integrator, const pk__piece *piece)
{
    return !integrator->points.check || (integrator->fixed_order && !piece->unsplit) ? 0
           : piece->unsplit                                                          ? pk__check_whole(piece->order)
                                                            : pk__check_order(piece->order);
}

/* How many points a piece has: its nodes or, of a piece that nothing is known of, its middle; then, with bounds, the nodes of a
 * rule that shows the error. */
static int pk__piece_points(const pk__integrator *integrator, const pk__piece *piece)
{
    return piece->order == 0 ? 1 : piece->order + pk__piece_check(integrator, piece);
}

/* The point that has been put last has mean slopes over the stretch of a node, where the piece's kinks have not been looked for. */
static void pk__set_stretch(pk__integrator *integrator, const pk__piece *piece, int order, int node)
{
    pk__points *points = &integrator->points;
    if (!piece->unsplit)
        return;
    points->from[points->count - 1] = (pk_real)pk__stretch_end(integrator, piece->a, piece->b, order, node);
    points->to[points->count - 1] = (pk_real)pk__stretch_end(integrator, piece->a, piece->b, order, node + 1);
    points->means = 1;
}

/* Point number `node` of a piece. A fixed order is exact; the error of any other is to be estimated. */
static void pk__put_node(pk__integrator *integrator, const pk__piece *piece, int node)
{
    const int bounds = integrator->points.check != NULL, check = pk__piece_check(integrator, piece);
    const double a = piece->a, length = piece->b - a;
    int order = piece->order;
    if (order == 0) {
        pk__put_point(integrator, piece->row, 0.5 * (piece->a + piece->b), length, 0, length);
        return;
    }
    const int checking = node >= order;
    if (checking) {
        node -= order;
        order = check;
    }
    const double *x = integrator->gauss_nodes + order * (order - 1) / 2;
    const double weight = length * integrator->gauss_weights[order * (order - 1) / 2 + node];
    if (checking) {
        pk__put_point(integrator, piece->row, a + length * x[node], 0, weight, 0);
        pk__set_stretch(integrator, piece, order, node);
        return;
    }
    double slack = weight * piece->missed;
    /* A kink that lies elsewhere takes the gradients on its wrong side along: those beside it on both sides. */
    if (bounds && piece->slack_a > 0)
        slack += piece->slack_a * pk__edge_weight(order, x, node);
    if (bounds && piece->slack_b > 0)
        slack += piece->slack_b * pk__edge_weight(order, x, order - 1 - node);
    pk__put_point(integrator, piece->row, a + length * x[node], weight, check ? -weight : 0, slack);
    pk__set_stretch(integrator, piece, order, node);
}

/* Puts points of the pieces that are handed over into the batch. 0: it is full, and there are more. */
static int pk__put_pieces(pk__integrator *integrator)
{
    pk__handover *handover = &integrator->handover;
    for (; handover->next < handover->count; handover->next++, handover->node = 0) {
        const size_t at = handover->sequence ? handover->sequence[handover->next] : handover->next;
        const pk__piece *piece = &handover->pieces[at];
        const int count = piece->accepted ? pk__piece_points(integrator, piece) : 0;
        for (; handover->node < count; handover->node++) {
            if (integrator->points.count == integrator->path.point_capacity)
                return 0;
            pk__put_node(integrator, piece, handover->node);
        }
    }
    return 1;
}

/* The same of a rule that is the same for every row and step: handover.next is a row. */
static int pk__put_rule(pk__integrator *integrator)
{
    pk__handover *handover = &integrator->handover;
    const pk_rule rule = integrator->quadrature.rule;
    const int given = integrator->quadrature.nodes, count = given ? given : rule == PK_RULE_TRAPEZOID ? 2 : 1;
    const double *x = integrator->gauss_nodes + count * (count - 1) / 2;
    const double *w = integrator->gauss_weights + count * (count - 1) / 2;
    for (; handover->next < integrator->path.rows; handover->next++, handover->node = 0)
        for (; handover->node < count; handover->node++) {
            const int q = handover->node;
            double t = 0, weight = 1.0 / count;
            if (integrator->points.count == integrator->path.point_capacity)
                return 0;
            if (integrator->at_one_point) {
                t = integrator->point;
                weight = integrator->point_weight;
            } else if (rule == PK_RULE_GAUSS) {
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
            pk__put_point(integrator, handover->next, t, weight, 0, 0);
        }
    return 1;
}

/* ---- what is known next ----------------------------------------------------------------------------------- */

/* Pieces, as they stand or in a sequence of their indices, wait to be handed over. */
static void pk__hand_over(pk__integrator *integrator, const pk__piece *pieces, const size_t *sequence,
                          size_t count)
{
    integrator->handover = (pk__handover){pieces, sequence, count, 0, 0};
}

/* Shorter pieces have nodes that pk_real hardly tells apart. */
#define PK__SHORTEST (sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-13)
/* After so many halvings the error must have fallen by half, unless at most so many parts are left. */
enum { PK__GENERATIONS = 2, PK__FEW_PARTS = 1 };
/* Errors that are a larger part of |h| are no rounding. */
#define PK__LARGEST_ROUNDING (sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-8)

/* Takes a piece as it is, although it missed: with the most nodes, or by its middle where its kinks have not been found. */
static void pk__accept(pk__integrator *integrator, pk__piece *piece)
{
    integrator->refused++;
    piece->accepted = 1;
    piece->order = piece->size < 0 ? 0 : PK__LARGEST_ORDER;
    piece->missed = piece->error < piece->size ? piece->error / piece->size : 1;
}

/* A piece that has not passed, or whose kinks do not find room, waits for its halves; or is accepted where halving is of no
 * use: 1. */
static int pk__fail_piece(pk__integrator *integrator, pk__piece *piece)
{
    pk__pieces *to = &integrator->failed;
    if (piece->b - piece->a < PK__SHORTEST || to->count == to->capacity) {
        pk__accept(integrator, piece);
        return 1;
    }
    to->piece[to->count++] = *piece;
    return 0;
}

/* The pieces between kinks: a fixed order is enough for each, or they are tested. */
static void pk__measure_pieces(pk__integrator *integrator)
{
    const pk__pieces *pieces = &integrator->pieces;
    integrator->split_pieces += pieces->count;
    integrator->sequence_count = 0;
    for (size_t i = 0; i < pieces->count; i++)
        pieces->piece[i].accepted = 0;
    if (!integrator->fixed_order)
        pk__adapt(integrator);
    for (size_t i = 0; i < pieces->count; i++) {
        pk__piece *piece = &pieces->piece[i];
        if (integrator->fixed_order) {
            piece->order = (unsigned char)integrator->fixed_order;
            pk__accept_in_sequence(integrator, piece, 0);
        } else if (!piece->accepted && pk__fail_piece(integrator, piece)) {
            pk__accept_in_sequence(integrator, piece, piece->missed);
        }
    }
    pk__hand_over(integrator, pieces->piece, integrator->sequence, integrator->sequence_count);
}

/* Stage WHOLE: the steps of all rows without a look at their kinks. Those that pass are handed over; the others wait. */
static void pk__take_whole(pk__integrator *integrator)
{
    pk__pieces *pending = &integrator->pending, *pieces = &integrator->pieces;
    integrator->sequence_count = 0;
    pk__adapt_whole(integrator);
    pending->count = 0;
    for (size_t i = 0; i < pieces->count; i++)
        if (!pieces->piece[i].accepted)
            (void)pk__pieces_push(pending, pieces->piece[i].row, pieces->piece[i].a, pieces->piece[i].b);
    pk__sort_pieces(pending, pk__precedes_by_place);
    integrator->split_pieces += pieces->count - pending->count;
    pk__hand_over(integrator, pieces->piece, integrator->sequence, integrator->sequence_count);
}

/* Stage PIECES: as many of the pieces that wait as there are rows. */
static void pk__take_waiting(pk__integrator *integrator)
{
    pk__pieces *pending = &integrator->pending;
    const size_t first = integrator->waiting, rows = integrator->path.rows;
    pk__pieces batch = {pk__min(rows, pending->count - first), 0, pending->piece + first};
    integrator->waiting += rows;
    if (pk__path_split(&integrator->path, &batch, &integrator->pieces)) {
        pk__measure_pieces(integrator);
        return;
    }
    /* More kinks than there is room for: half as long pieces have fewer. */
    for (size_t i = 0; i < batch.count; i++) {
        batch.piece[i].size = -1;
        batch.piece[i].error = INFINITY;
        (void)pk__fail_piece(integrator, &batch.piece[i]);
    }
    pk__hand_over(integrator, batch.piece, NULL, batch.count);
}

/* By row; of a row the largest error first, NaN in front of all, then by t. */
static int pk__precedes_by_error(const pk__piece *piece, const pk__piece *other)
{
    if (piece->row != other->row || piece->error == other->error)
        return pk__precedes_by_place(piece, other);
    return isnan(piece->error) ? !isnan(other->error) || piece->a < other->a : piece->error > other->error;
}

/* Stage STALLED: of each family of failed pieces, the parts of one ancestor, those whose error has not fallen are accepted as
 * they are where there are several. */
static void pk__accept_stalled(pk__integrator *integrator)
{
    pk__pieces *failed = &integrator->failed;
    pk__sort_pieces(failed, pk__precedes_by_place);
    for (size_t first = 0, last; first < failed->count; first = last) {
        const size_t row = failed->piece[first].row;
        const double family = failed->piece[first].family;
        const pk__row_state *state = &integrator->state[row];
        for (last = first; last < failed->count; last++)
            if (failed->piece[last].row != row || failed->piece[last].family != family)
                break;
        const int several = last - first > PK__FEW_PARTS;
        for (size_t i = first; i < last; i++) {
            pk__piece *piece = &failed->piece[i];
            const int judged = piece->age == 0 || piece->age == PK__GENERATIONS;
            if (judged && piece->age && several && piece->size >= 0 &&
                !(piece->error < 0.5 * piece->reference) &&
                !(piece->error > PK__LARGEST_ROUNDING * (state->height + state->change))) {
                pk__accept(integrator, piece);
                continue;
            }
            if (judged) { /* an ancestor of its own from now on */
                piece->family = piece->a;
                piece->reference = piece->error;
                piece->age = 0;
            }
            piece->age++;
        }
    }
    pk__hand_over(integrator, failed->piece, NULL, failed->count);
}

/* Stage HALVE: the halves of what has failed wait, the worst first, as long as there are halvings; the rest is accepted. */
static void pk__halve_failed(pk__integrator *integrator)
{
    pk__pieces *pending = &integrator->pending, *failed = &integrator->failed;
    size_t left = 0;
    for (size_t i = 0; i < failed->count; i++)
        if (!failed->piece[i].accepted)
            failed->piece[left++] = failed->piece[i];
    failed->count = left;
    pk__sort_pieces(failed, pk__precedes_by_error);
    pending->count = integrator->waiting = 0;
    for (size_t i = 0; i < failed->count; i++) {
        pk__piece *piece = &failed->piece[i];
        pk__row_state *state = &integrator->state[piece->row];
        if (state->halvings >= PK__HALVINGS || pending->count + 2 > pending->capacity) {
            pk__accept(integrator, piece);
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
    pk__hand_over(integrator, failed->piece, NULL, failed->count);
}

/* The orders that the rows' next steps start with. */
static void pk__plan_rows(pk__integrator *integrator)
{
    for (size_t row = 0; !integrator->fixed_order && row < integrator->path.rows; row++)
        if (integrator->next_order[row].nodes)
            integrator->state[row].order = integrator->next_order[row];
        else if (!integrator->whole_target) /* some row's whole step may have passed: it has no pieces */
            integrator->state[row].order = (pk__row_order){PK__LARGEST_ORDER, 0};
}

/* Finds out which points come next, all that were known before having been put into batches. 0: there are none. */
static int pk__find_more(pk__integrator *integrator)
{
    switch (integrator->stage) {
    case PK__STAGE_WHOLE:
        pk__take_whole(integrator);
        integrator->stage = PK__STAGE_PIECES;
        return 1;
    case PK__STAGE_PIECES:
        if (integrator->waiting == 0)
            integrator->failed.count = 0;
        pk__take_waiting(integrator);
        if (integrator->waiting >= integrator->pending.count)
            integrator->stage = PK__STAGE_STALLED;
        return 1;
    case PK__STAGE_STALLED:
        pk__accept_stalled(integrator);
        integrator->stage = PK__STAGE_HALVE;
        return 1;
    case PK__STAGE_HALVE:
        pk__halve_failed(integrator);
        if (integrator->pending.count) {
            integrator->stage = PK__STAGE_PIECES;
            return 1;
        }
        pk__plan_rows(integrator);
        integrator->stage = PK__STAGE_END;
        return 1;
    case PK__STAGE_RULE:
    case PK__STAGE_END:
    default: return 0;
    }
}

/* ---- the calls -------------------------------------------------------------------------------------------- */

enum { PK__SURROGATE_NODES = 8 };

PK__INTERNAL void pk__integrator_begin(pk__integrator *integrator)
{
    const pk__path *path = &integrator->path;
    const pk_graph *graph = path->graph;
    const pk_rule rule = integrator->quadrature.rule;
    memset(integrator->has_ends, 0, path->rows);
    integrator->points.last = 0;
    pk__hand_over(integrator, NULL, NULL, 0);
    integrator->stage = PK__STAGE_RULE;
    if (integrator->at_one_point || (rule != PK_RULE_AUTO && rule != PK_RULE_EXACT))
        return;
    integrator->stage = integrator->whole_target > 0 && rule == PK_RULE_AUTO && path->last_switch && !graph->surrogate
                            ? PK__STAGE_WHOLE
                            : PK__STAGE_PIECES;
    /* A surrogate's integrand is no derivative, so that nothing can judge a rule: take one that is fine between
     * the jumps of its values. */
    integrator->fixed_order = graph->surrogate                             ? (int)PK__SURROGATE_NODES
                              : !pk__is_exact(graph, &integrator->readout) ? 0
                              : graph->degree < 2                          ? 1
                                                                           : (graph->degree + 1) / 2;
    memset(integrator->next_order, 0, path->rows * sizeof *integrator->next_order);
    integrator->pending.count = integrator->waiting = 0;
    for (size_t row = 0; row < path->rows; row++) {
        integrator->state[row].halvings = 0;
        integrator->state[row].step_change = 0;
        pk__pieces_push(&integrator->pending, row, 0, 1);
    }
}

PK__INTERNAL int pk__integrator_next(pk__integrator *integrator, const pk__points **points)
{
    pk__points *batch = &integrator->points;
    if (batch->last)
        return 0;
    batch->count = 0;
    batch->means = 0;
    *points = batch;
    if (integrator->stage == PK__STAGE_RULE) {
        batch->last = pk__put_rule(integrator);
    } else {
        int full = 0, more = 1;
        while (!full && more) {
            full = !pk__put_pieces(integrator);
            more = full || pk__find_more(integrator);
        }
        batch->last = !more;
    }
    integrator->point_count += batch->count;
    return 1;
}

PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator)
{
    pk__path *path = &integrator->path;
    const size_t classes = path->graph->output_width, outputs = pk_readout_count(&integrator->readout, classes);
    for (size_t row = 0, points = 0; row < path->rows; row++) {
        for (int end = 0; end < 2 && !integrator->has_ends[row]; end++, points++) {
            path->point_row[points] = row;
            path->point_t[points] = (pk_real)end;
        }
        if (!points || (row + 1 < path->rows && points + 2 <= path->point_capacity))
            continue;
        pk__path_forward(path, points, path->point_row, path->point_t);
        for (size_t p = 0; p < points; p++)
            pk__readout_apply(&integrator->readout, classes, integrator->first_row + path->point_row[p],
                              pk__pass_output(&path->tape) + p * classes,
                              integrator->ends + (2 * path->point_row[p] + p % 2) * outputs, integrator->slope);
        points = 0;
    }
    return integrator->ends;
}

PK__END_CODE
/* <<< implementation */
#endif
