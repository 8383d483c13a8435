/* pathkernel/kernels/pieces.h: the pieces of a step on which the gradient of one row is a polynomial in t, to rounding.
 *
 * path/kinks.h finds the kinks of the network. Two things more make a gradient jump or turn within a step:
 * 1. kinks of the loss (l1, huber, hinge): sign changes of functions of the outputs, such as f_c - y_c. On a piece these are
 *    polynomials in t, or are interpolated, like the switch functions of the network, and the same search finds their roots.
 * 2. weights that move far, so that a smooth activation runs through all of its range within a short part of the step, or
 *    beyond it. No rule whose nodes miss that part sees it: two rules of different order agree on a wrong result.
 *    Pieces are halved until the values of all smooth operations and their derivatives by t, and those of the loss, are
 *    polynomials: interpolated between Gauss nodes they agree with what the network gives at the ends and inside.
 * Ordinary steps are not tested so: pk__rows_are_steady shows from three points that no activation moves far.
 */
#ifndef PATHKERNEL_PIECES_H
#define PATHKERNEL_PIECES_H
#include "../path/quadrature.h"
#include "../training/loss.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_PIECES_INTERNALS_KNOWN)
#define PATHKERNEL_PIECES_INTERNALS_KNOWN
/* >>> internals */
enum {
    PK__PIECE_NODES = 10,                   /* that interpolate */
    PK__PIECE_POINTS = PK__PIECE_NODES + 4, /* and where the interpolants are tested */
    PK__PIECE_DEPTH = 45,                   /* halvings of a piece, at most */
    PK__PIECES_OF_ROW = 256                 /* more are not halved */
};

/* What tests and splits the pieces of rows. The path has room for PK__PIECE_POINTS points, and for 3 of each row. */
typedef struct pk__piece_search {
    pk_context *context;
    const char *name;
    pk__path *path;
    const pk_criterion *criterion; /* the gradient is that of this loss; NULL: of outputs */
    int halves;                    /* pieces are halved, too */
    double tolerance;
    /* Private: */
    double interpolants[4 * PK__PIECE_NODES]; /* tests x nodes */
    double node[PK__PIECE_NODES], test[4];
    double *size;      /* the caller's, of the row that is split, see pk__pieces_split */
    double *now, *own; /* the same of the pieces of one level, and of one piece */
    pk_real *slope;    /* points x outputs: of the loss */
    size_t switches;   /* of the loss */
    int exact;         /* they are polynomials in t on each piece */
    pk__path sampled;  /* their samples, where the search of path/kinks.h reads those of a node */
    pk__root *roots;
    size_t root_capacity;
    pk__pieces lists[2];
    void *memory;
} pk__piece_search;

/* criterion, halves: see above. */
PK__INTERNAL pk_status pk__pieces_prepare(pk_context *context, const char *name, pk__path *path,
                                          const pk_criterion *criterion, int halves, double tolerance,
                                          pk__piece_search *search);
PK__INTERNAL void pk__pieces_release(pk__piece_search *search);
/* Appends to `to` the parts of the `count` pieces of one row, which are sorted and between kinks of the network. The path has
 * begun with this row alone. target: of the loss. size: of the row, for each node of the graph and for the loss, how much its
 * value changes in the whole step, as far as it is known: what errors are measured by; zeros at first, and raised here. to->piece
 * comes from pk_allocate and grows. */
PK__INTERNAL pk_status pk__pieces_split(pk__piece_search *search, size_t count, const pk__piece *pieces,
                                        const pk_real *target, double *size, pk__pieces *to);
/* Appends one piece; the memory grows. */
PK__INTERNAL pk_status pk__pieces_append(pk_context *context, const char *name, pk__pieces *to,
                                         const pk__piece *piece);
/* Whether no smooth operation, nor the loss, moves far on the step between w and w + d: the path has begun with `rows` rows, at
 * most half of their points fit. A rule for all rows, tested by one of another order, will do then. */
PK__INTERNAL int pk__rows_are_steady(pk__path *path, size_t rows, const pk_criterion *criterion);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PIECES_IMPLEMENTED)
#define PATHKERNEL_PIECES_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK__INTERNAL pk_status pk__pieces_append(pk_context *context, const char *name, pk__pieces *to,
                                         const pk__piece *piece)
{
    if (to->count == to->capacity) {
        const size_t capacity = 2 * pk__max(to->capacity, 128);
        pk__piece *more = NULL;
        const pk_status status = pk_allocate(context, capacity, sizeof *more, name, &more);
        if (status)
            return status;
        if (to->count)
            memcpy(more, to->piece, to->count * sizeof *more);
        pk_release(context, to->piece);
        to->piece = more;
        to->capacity = capacity;
    }
    to->piece[to->count++] = *piece;
    return PK_OK;
}

static void pk__pieces_search_take(pk__arena *arena, pk__piece_search *search)
{
    const pk_graph *graph = search->path->graph;
    const size_t C = graph->output_width, samples = PK__PATH_DEGREE + 1;
    search->now = pk__arena_take(arena, graph->node_count + 1, sizeof *search->now);
    search->own = pk__arena_take(arena, graph->node_count + 1, sizeof *search->own);
    search->slope = pk__arena_take(arena, C, PK__PIECE_POINTS * sizeof *search->slope);
    search->root_capacity = pk__max(64, 4 * search->switches);
    search->sampled.switch_values = pk__arena_take(arena, search->switches, samples * sizeof(pk_real));
    search->sampled.coefficients = pk__arena_take(arena, search->switches, samples * sizeof(pk_real));
    search->sampled.conversion =
        pk__arena_take(arena, search->switches ? samples * samples : 0, sizeof(pk_real));
    search->roots = pk__arena_take(arena, search->root_capacity, sizeof *search->roots);
}

PK__INTERNAL pk_status pk__pieces_prepare(pk_context *context, const char *name, pk__path *path,
                                          const pk_criterion *criterion, int halves, double tolerance,
                                          pk__piece_search *search)
{
    double weight[2 * PK__PIECE_NODES], finer[2 * PK__PIECE_NODES];
    memset(search, 0, sizeof *search);
    search->context = context;
    search->name = name;
    search->path = path;
    search->criterion = criterion;
    search->halves = halves;
    search->tolerance = tolerance;
    search->switches = pk__criterion_kinks(criterion, path->graph->output_width);
    const int degree = path->graph->nodes[path->graph->node_count - 1].degree;
    /* All but those of binary_cross_entropy are linear in the outputs. */
    search->exact =
        degree >= 0 && degree <= PK__PATH_DEGREE && pk__criterion_degree(criterion) >= 0 && !path->interpolates;
    search->sampled.degree = search->exact ? (int)pk__max(2, (size_t)degree) : (int)PK__PATH_DEGREE;
    pk_gauss_legendre(PK__PIECE_NODES, search->node, weight);
    pk_gauss_legendre(2 * PK__PIECE_NODES, finer, weight);
    /* Beside a kink, which an end may be, only the inside tells. */
    const double end = path->graph->switched || search->switches ? 1e-6 : 0;
    search->test[0] = end;
    search->test[1] = finer[0];
    search->test[2] = finer[2 * PK__PIECE_NODES - 1];
    search->test[3] = 1 - end;
    for (int i = 0; i < 4; i++)
        for (int q = 0; q < PK__PIECE_NODES; q++)
            search->interpolants[i * PK__PIECE_NODES + q] =
                pk__lagrange(PK__PIECE_NODES, search->node, q, search->test[i]);
    pk__arena measured = {NULL, 0, 0, 0};
    pk__pieces_search_take(&measured, search);
    if (measured.overflow)
        return pk__fail(context, PK_OVERFLOW, "%s: the memory for this network overflows", name);
    const pk_status status = pk_allocate(context, measured.used, 1, name, &search->memory);
    pk__arena arena = {search->memory, measured.used, 0, 0};
    if (status)
        return status;
    pk__pieces_search_take(&arena, search);
    if (search->switches)
        pk__bernstein_conversion(search->sampled.degree, search->sampled.conversion);
    pk__chebyshev_tail(search->sampled.tail);
    return PK_OK;
}

PK__INTERNAL void pk__pieces_release(pk__piece_search *search)
{
    if (!search->path)
        return;
    pk_release(search->context, search->lists[0].piece);
    pk_release(search->context, search->lists[1].piece);
    pk_release(search->context, search->memory);
    memset(search, 0, sizeof *search);
}

/* ---- kinks of the loss ----------------------------------------------------------------------------------- */

/* The loss's switch functions at `count` points of row 0: count x switches. */
static void pk__pieces_switches(pk__piece_search *search, const pk_real *target, size_t count, const pk_real *t,
                                pk_real *to)
{
    static const size_t zero[PK__PATH_DEGREE + 1] = {0};
    const size_t C = search->path->graph->output_width;
    pk__path_forward(search->path, count, zero, t);
    for (size_t p = 0; p < count; p++)
        pk__criterion_switches(search->criterion, C, pk__pass_output(&search->path->tape) + p * C, target,
                               to + p * search->switches);
}

/* Moves the root of an interpolant to that of the function: the secant method, as long as it reduces the function. */
static void pk__pieces_refine(pk__piece_search *search, const pk_real *target, const pk__piece *piece,
                              pk__root *root)
{
    double best = INFINITY, best_t = root->t, slope = root->slope, t = root->t, last_t = 0, last = 0;
    for (int step = 0; step < 8; step++) {
        pk_real at = (pk_real)t;
        pk__pieces_switches(search, target, 1, &at, search->sampled.switch_values);
        const double value = search->sampled.switch_values[root->at];
        if (!(fabs(value) < best))
            break;
        if (step && t != last_t && value != last)
            slope = (value - last) / (t - last_t);
        best = fabs(value), best_t = t;
        last = value, last_t = t;
        t = fmin(fmax(t - value / slope, piece->a), piece->b);
        if (!(fabs(t - last_t) > DBL_EPSILON * fabs(t)))
            break;
    }
    root->t = best_t;
}

/* Appends the parts of a piece between the kinks of the loss. */
static pk_status pk__pieces_kinks(pk__piece_search *search, const pk__piece *piece, const pk_real *target,
                                  int depth, pk__pieces *to)
{
    const int degree = search->sampled.degree;
    pk_real t[PK__PATH_DEGREE + 1];
    for (int k = 0; k <= degree; k++)
        t[k] = (pk_real)(piece->a + (piece->b - piece->a) * pk__sample_node(degree, k));
    pk__pieces_switches(search, target, (size_t)degree + 1, t, search->sampled.switch_values);
    pk__root_sink sink = {piece->a, piece->b, 0, 0, 0, search->roots, 0, search->root_capacity};
    const int shortest = piece->b - piece->a <= PK__SHORTEST_SEARCH;
    const int undecided =
        pk__piece_roots(&search->sampled, 0, search->exact, shortest, search->switches, 0, &sink);
    if (undecided || sink.count > sink.capacity) {
        pk__piece half = *piece;
        if (depth >= PK__PIECE_DEPTH)
            return pk__fail(search->context, PK_UNSUPPORTED,
                            "%s: the loss has more kinks in one step of a row than there is room for",
                            search->name);
        half.b = 0.5 * (piece->a + piece->b);
        const pk_status status = pk__pieces_kinks(search, &half, target, depth + 1, to);
        half.a = half.b, half.b = piece->b;
        return status ? status : pk__pieces_kinks(search, &half, target, depth + 1, to);
    }
    for (size_t r = 0; !search->exact && r < sink.count; r++)
        pk__pieces_refine(search, target, piece, &sink.roots[r]);
    pk__sort_roots(sink.count, sink.roots);
    pk__piece part = *piece;
    for (size_t r = 0; r < sink.count; r++) {
        if (sink.roots[r].t - part.a <= 4 * PK__EPSILON || piece->b - sink.roots[r].t <= 4 * PK__EPSILON)
            continue;
        part.b = sink.roots[r].t;
        const pk_status status = pk__pieces_append(search->context, search->name, to, &part);
        if (status)
            return status;
        part.a = part.b;
    }
    part.b = piece->b;
    return pk__pieces_append(search->context, search->name, to, &part);
}

/* ---- pieces that are halved ------------------------------------------------------------------------------ */

/* Whether the numbers at the tests are those of the interpolant through the nodes: values, points x width, and what an error
 * costs. *largest: of the values. */
static double pk__pieces_error(const pk__piece_search *search, size_t width, const pk_real *values,
                               double *largest)
{
    double error = 0;
    *largest = 0;
    for (size_t p = 0; p < PK__PIECE_POINTS * width; p++)
        *largest = fmax(*largest, fabs((double)values[p]));
    for (int i = 0; i < 4 && *largest > 0; i++)
        for (size_t u = 0; u < width; u++) {
            double sum = -(double)values[(PK__PIECE_NODES + (size_t)i) * width + u];
            for (size_t q = 0; q < PK__PIECE_NODES; q++)
                sum += search->interpolants[(size_t)i * PK__PIECE_NODES + q] * values[q * width + u];
            error = fmax(error, fabs(sum));
        }
    return isfinite(*largest) ? error : 0; /* the product will say it */
}

/* Whether a piece is short enough for smooth operations (target == NULL), or the loss. Sizes go into search->own. */
static int pk__pieces_measure(pk__piece_search *search, const pk__piece *piece, const pk_real *target)
{
    static const size_t zero[PK__PIECE_POINTS] = {0};
    const pk_graph *graph = search->path->graph;
    const size_t C = graph->output_width;
    const double length = piece->b - piece->a;
    pk__tape *tape = &search->path->tape;
    pk_real t[PK__PIECE_POINTS];
    int good = 1;
    for (int q = 0; q < PK__PIECE_POINTS; q++)
        t[q] = (pk_real)(piece->a +
                         length * (q < PK__PIECE_NODES ? search->node[q] : search->test[q - PK__PIECE_NODES]));
    pk__path_forward(search->path, PK__PIECE_POINTS, zero, t);
    if (target) {
        double largest;
        for (size_t p = 0; p < PK__PIECE_POINTS; p++)
            pk_criterion_gradient(search->criterion, C, pk__pass_output(tape) + p * C, target,
                                  search->slope + p * C);
        const double error = length * pk__pieces_error(search, C, search->slope, &largest);
        double *own = &search->own[graph->node_count];
        *own = length * largest;
        return error <=
               search->tolerance *
                       fmax(fmax(search->size[graph->node_count], search->now[graph->node_count]), *own) +
                   64 * PK__EPSILON * *own;
    }
    pk__path_tangent(search->path, 0, PK__PIECE_POINTS, zero, t);
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        search->own[n] = 0;
        if (!node->varies || node->operation->smoothness != PK_SMOOTH || node->input_constant)
            continue;
        const size_t W = node->width;
        const pk_real *value = tape->value[n], *tangent = tape->tangent[n];
        const pk_real *in = graph->nodes[node->inputs[0]].varies ? tape->tangent[node->inputs[0]] : NULL;
        double height, steep, pushed = 0, apart = 0;
        const double error = pk__pieces_error(search, W, value, &height),
                     bent = length * pk__pieces_error(search, W, tangent, &steep);
        for (size_t u = 0; u < W; u++)
            apart = fmax(apart, fabs((double)value[(PK__PIECE_POINTS - 1) * W + u] -
                                     (double)value[PK__PIECE_NODES * W + u]));
        for (size_t p = 0; in && p < PK__PIECE_POINTS * graph->nodes[node->inputs[0]].width; p++)
            pushed = fmax(pushed, fabs((double)in[p]));
        search->own[n] = fmax(apart, length * steep);
        const double allowed = search->tolerance * fmax(fmax(search->size[n], search->now[n]), search->own[n]);
        good &= error <= allowed + 64 * PK__EPSILON * height &&
                bent <= allowed + 64 * PK__EPSILON * length * fmax(steep, pushed);
    }
    return good;
}

/* Halves pieces, level by level, until each is short enough; appends them, not sorted. */
static pk_status pk__pieces_halve(pk__piece_search *search, size_t count, const pk__piece *pieces,
                                  const pk_real *target, pk__pieces *to)
{
    const size_t nodes = search->path->graph->node_count + 1, before = to->count;
    pk__pieces *now = &search->lists[0], *next = &search->lists[1];
    pk_status status = PK_OK;
    memset(search->own, 0, nodes * sizeof *search->own);
    now->count = next->count = 0;
    for (size_t i = 0; !status && i < count; i++)
        status = pk__pieces_append(search->context, search->name, now, &pieces[i]);
    for (int depth = 0; !status && now->count; depth++) {
        next->count = 0;
        memset(search->now, 0, nodes * sizeof *search->now);
        for (size_t i = 0; !status && i < now->count; i++) {
            pk__piece piece = now->piece[i];
            const int good = pk__pieces_measure(search, &piece, target);
            for (size_t n = 0; n < nodes; n++)
                search->now[n] += search->own[n];
            /* A length that t cannot tell apart is no length. */
            const int last = depth == PK__PIECE_DEPTH || piece.b - piece.a < 32 * PK__EPSILON * piece.b ||
                             to->count - before + next->count + now->count - i > PK__PIECES_OF_ROW;
            if (good || last) {
                status = pk__pieces_append(search->context, search->name, to, &piece);
                continue;
            }
            const double middle = 0.5 * (piece.a + piece.b), end = piece.b;
            piece.b = middle;
            status = pk__pieces_append(search->context, search->name, next, &piece);
            piece.a = middle, piece.b = end;
            if (!status)
                status = pk__pieces_append(search->context, search->name, next, &piece);
        }
        for (size_t n = 0; n < nodes; n++)
            search->size[n] = fmax(search->size[n], search->now[n]);
        const pk__pieces swap = *now;
        *now = *next, *next = swap;
    }
    return status;
}

static void pk__pieces_sort(pk__pieces *to, size_t first)
{
    pk__pieces added = {to->count - first, to->count - first, to->piece ? to->piece + first : NULL};
    pk__sort_pieces(&added, pk__precedes_by_place);
}

PK__INTERNAL pk_status pk__pieces_split(pk__piece_search *search, size_t count, const pk__piece *pieces,
                                        const pk_real *target, double *size, pk__pieces *to)
{
    const size_t first = to->count;
    search->size = size;
    pk__pieces found = {0, 0, NULL}, parted = {0, 0, NULL};
    pk_status status = PK_OK;
    if (search->halves)
        status = pk__pieces_halve(search, count, pieces, NULL, &found);
    for (size_t i = 0; !status && !search->halves && i < count; i++)
        status = pk__pieces_append(search->context, search->name, &found, &pieces[i]);
    if (!status)
        pk__pieces_sort(&found, 0);
    for (size_t i = 0; !status && i < found.count; i++)
        status = search->switches ? pk__pieces_kinks(search, &found.piece[i], target, 0, &parted)
                                  : pk__pieces_append(search->context, search->name, &parted, &found.piece[i]);
    /* Polynomials of the outputs are as smooth as these; the slope of binary_cross_entropy alone says nothing: it is large where
     * that of the outputs is small. */
    const int bends = pk__criterion_degree(search->criterion) < 0 && search->criterion && !search->switches;
    if (!status && search->halves && bends)
        status = pk__pieces_halve(search, parted.count, parted.piece, target, to);
    else
        for (size_t i = 0; !status && i < parted.count; i++)
            status = pk__pieces_append(search->context, search->name, to, &parted.piece[i]);
    if (!status)
        pk__pieces_sort(to, first);
    pk_release(search->context, found.piece);
    pk_release(search->context, parted.piece);
    return status;
}

/* ---- steps on which nothing moves far -------------------------------------------------------------------- */

/* How far an input may move, of operations for which that is a number; 0: it must be small beside the input itself. */
static double pk__steady_move(const pk_node *node)
{
    static const char *const relative[] = {"log", "power", "normalize", "rms_normalize", "attend"};
    static const char *const scaled[] = {"softplus", "sine"};
    for (size_t i = 0; i < sizeof relative / sizeof *relative; i++)
        if (strcmp(node->operation->name, relative[i]) == 0)
            return 0;
    for (size_t i = 0; i < sizeof scaled / sizeof *scaled; i++)
        if (strcmp(node->operation->name, scaled[i]) == 0)
            return 1 / fmax(fabs(node->attributes[0]), 1e-300);
    return 1;
}

/* Whether numbers at three points of a row (each `width`) stay near each other: within `move`, or within a part of themselves. */
static int pk__steady_numbers(size_t width, const pk_real *at, double move)
{
    double largest = 0, apart = 0;
    int small = 1;
    for (size_t u = 0; u < width; u++) {
        const double a = at[u], b = at[width + u], c = at[2 * width + u], most = fmax(fabs(a - b), fabs(c - b)),
                     size = fmin(fmin(fabs(a), fabs(b)), fabs(c));
        largest = fmax(largest, size);
        apart = fmax(apart, most);
        small &= most <= 0.125 * size;
    }
    return move > 0 ? apart <= move : small || apart <= 0.03 * largest;
}

PK__INTERNAL int pk__rows_are_steady(pk__path *path, size_t rows, const pk_criterion *criterion)
{
    const pk_graph *graph = path->graph;
    const size_t some = pk__max(1, path->point_capacity / 3), last = graph->node_count - 1;
    const int bends = criterion && pk__criterion_degree(criterion) < 0 && !pk__criterion_kinks(criterion, 1);
    for (size_t first = 0; first < rows; first += some) {
        const size_t count = pk__min(some, rows - first);
        for (size_t p = 0; p < 3 * count; p++) {
            path->point_row[p] = first + p / 3;
            path->point_t[p] = (pk_real)0.5 * (pk_real)(p % 3);
        }
        pk__path_forward(path, 3 * count, path->point_row, path->point_t);
        for (size_t n = 1; n < graph->node_count; n++) {
            const pk_node *node = &graph->nodes[n];
            const size_t input = (size_t)node->inputs[0], W = graph->nodes[input].width;
            if (!node->varies)
                continue;
            if (node->operation->smoothness == PK_SMOOTH && !node->input_constant) {
                const double move = pk__steady_move(node);
                for (size_t r = 0; graph->nodes[input].varies && r < count; r++)
                    if (!pk__steady_numbers(W, path->tape.value[input] + 3 * r * W, move) ||
                        (move == 0 &&
                         !pk__steady_numbers(node->width, path->tape.value[n] + 3 * r * node->width, 0.1)))
                        return 0;
            }
        }
        for (size_t r = 0; bends && graph->nodes[last].varies && r < count; r++)
            if (!pk__steady_numbers(graph->output_width, path->tape.value[last] + 3 * r * graph->output_width,
                                    1))
                return 0;
    }
    /* Three points tell nothing of what could happen between them where weights move by much. */
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        double largest = 0;
        for (size_t p = 0; p < node->weight_count; p++)
            largest = fmax(largest, fabs((double)path->direction[node->weight_offset + p]));
        if (largest * (double)pk__max(1, node->fan_in) > 16)
            return 0;
    }
    return 1;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
