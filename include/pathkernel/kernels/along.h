/* pathkernel/kernels/along.h: Gram matrices of gradients, integrated along one step w + t D, 0 <= t <= 1.
 *
 *     G = integral_0^1 < L(t), R(t) > dt,        each side at w + t D (it moves) or at w
 *
 * Fixed rules take common values of t. The rule auto is
 * 1. where no kink depends on the weights and no activation moves far (pieces.h): Gauss-Legendre with n and n + 1 nodes, common
 *    to all rows, until the whole matrix agrees; n begins with that of the step before. Where more nodes help too little, the
 *    piece is halved. Where the network and the loss are polynomials, their degree gives n.
 * 2. where there are kinks, of the network or of a loss, or where an activation moves far: each row has pieces of its own, between its own kinks (path/kinks.h), with n Gauss nodes each.
 *    On a piece the gradients are polynomials in t of known degree, so that their values at n nodes determine them:
 *        integral < L, R > dt = sum_{u, v} W_uv < L(t_u), R(t_v) >,   W_uv = integral over both pieces of the Lagrange
 *                                                                    polynomials of u and v.
 *    So rows with different kinks meet exactly, and each row goes through the network at its own nodes alone. n follows from
 *    the degree where the network is piecewise linear; else n and n + 1 are compared, and all pieces are halved where
 *    more nodes help too little. The integral of df/dt of each row against the change of f shows a kink that was missed.
 * Rejected: the union of all rows' kinks as common pieces costs each row the kinks of all others; halving until a kink is
 * closed in on costs about 33 matrices a kink.
 */
#ifndef PATHKERNEL_ALONG_H
#define PATHKERNEL_ALONG_H
#include "../features/gram.h"
#include "pieces.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_ALONG_INTERNALS_KNOWN)
#define PATHKERNEL_ALONG_INTERNALS_KNOWN
/* >>> internals */
/* What integrates; prepared once, for blocks of up to so many numbers and rows. */
typedef struct pk__along {
    pk_context *context;
    const char *name;
    const pk_graph *graph;
    const pk_criterion *criterion; /* of the features that are losses */
    const pk_real *w, *next;       /* P: the ends of the step, the caller's */
    pk_real *direction;            /* P: next - w; pk__along_begin */
    /* Of the call: */
    int summed, by_layer;
    pk_quadrature rule;
    double tolerance;
    double error;           /* of the last integral: the largest difference of an entry */
    size_t points, refused; /* counted: values of t, or points of rows; pieces accepted although they missed */
    /* Private: */
    size_t numbers;
    pk_real *at, *part, *spread;
    double *coarse, *fine, *nodes, *weights;
    double scale;
    size_t halvings;
    void *memory;
} pk__along;

enum { PK__ALONG_NODES = 1000 };

PK__INTERNAL pk_status pk__along_prepare(pk_context *context, const pk_graph *graph, size_t numbers,
                                         pk__along *along);
PK__INTERNAL void pk__along_release(pk__along *along);
/* Computes the direction of a step, after w and next are set. */
PK__INTERNAL void pk__along_begin(pk__along *along);
/* result = G of the rows; right == NULL: left with itself. Rows have their seeds, labels and targets, no weights. moves:
 * whether left and right move. *order (0 at first) is that of the last step of these rows. */
PK__INTERNAL pk_status pk__along_integrate(pk__along *along, const pk__gram_rows_of *left,
                                           const pk__gram_rows_of *right, const int moves[2],
                                           unsigned char *order, double *result);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_ALONG_IMPLEMENTED)
#define PATHKERNEL_ALONG_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

enum {
    PK__ALONG_ORDER = 16,     /* nodes of a piece, at most */
    PK__ALONG_DEPTH = 40,     /* halvings of a piece, */
    PK__ALONG_HALVINGS = 512, /* of a step */
    PK__ALONG_REFINED = 4,    /* halvings of all pieces of rows with kinks */
    PK__ALONG_WINDOW = 16,    /* more pieces of a row are not multiplied with all of another one's */
    PK__ALONG_ROWS = 16,      /* rows whose kinks are found together */
    PK__ALONG_POINTS = 256,   /* of the left side at one time; more where one row has more */
    PK__ALONG_TILE = 1 << 21  /* numbers of a product of points */
};

static void pk__along_take(pk__arena *arena, pk__along *along)
{
    const size_t P = along->graph->parameters;
    along->direction = pk__arena_take(arena, P, sizeof(pk_real));
    along->at = pk__arena_take(arena, P, sizeof(pk_real));
    along->spread =
        along->graph->tied ? pk__arena_take(arena, along->graph->spread, 2 * sizeof(pk_real)) : NULL;
    along->part = pk__arena_take(arena, along->numbers, sizeof(pk_real));
    along->coarse = pk__arena_take(arena, along->numbers, sizeof(double));
    along->fine = pk__arena_take(arena, along->numbers, sizeof(double));
    along->nodes = pk__arena_take(arena, PK__ALONG_NODES, sizeof(double));
    along->weights = pk__arena_take(arena, PK__ALONG_NODES, sizeof(double));
}

PK__INTERNAL pk_status pk__along_prepare(pk_context *context, const pk_graph *graph, size_t numbers,
                                         pk__along *along)
{
    memset(along, 0, sizeof *along);
    along->context = context;
    along->graph = graph;
    along->numbers = numbers;
    along->name = "kernels";
    pk__arena measured = {NULL, 0, 0, 0};
    pk__along_take(&measured, along);
    if (measured.overflow)
        return pk__fail(context, PK_OVERFLOW, "kernels: the memory of a kernel of so many rows overflows");
    pk_status status = pk_allocate(context, measured.used, 1, "kernels", &along->memory);
    pk__arena arena = {along->memory, measured.used, 0, 0};
    if (!status)
        pk__along_take(&arena, along);
    return status;
}

PK__INTERNAL void pk__along_release(pk__along *along)
{
    pk_release(along->context, along->memory);
    memset(along, 0, sizeof *along);
}

PK__INTERNAL void pk__along_begin(pk__along *along)
{
    const pk_graph *graph = along->graph;
    for (size_t p = 0; p < graph->parameters; p++)
        along->direction[p] = (pk_real)((double)along->next[p] - along->w[p]);
    if (graph->tied) {
        pk_graph_spread(graph, along->w, along->spread);
        pk_graph_spread(graph, along->direction, along->spread + graph->spread);
    }
}

/* ---- common values of t -------------------------------------------------------------------------------- */

static size_t pk__along_kept(const pk__along *along, const pk__gram_rows_of *side)
{
    return side->seeds == PK__SEEDS_UNITS && !along->summed ? along->graph->output_width : 1;
}

static size_t pk__along_planes(const pk__along *along)
{
    return along->by_layer ? along->graph->columns : 1;
}

/* part = the matrix of rows whose sides stand where they say. The library's fractions of one matrix are none of all. */
static pk_status pk__along_gram(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                pk_real *part)
{
    const size_t kept = pk__along_kept(along, left);
    const pk__gram_request request = {
        .name = along->name,
        .graph = along->graph,
        .criterion = along->criterion,
        .summed = along->summed,
        .by_layer = along->by_layer,
        .result = pk_matrix_view(part, left->rows.rows * kept, (right ? right : left)->rows.rows * kept)};
    int (*progress)(void *, const char *, double) = along->context ? along->context->progress : NULL;
    if (along->context)
        along->context->progress = NULL;
    const pk_status status = pk__gram_compute(along->context, &request, left, right);
    if (along->context)
        along->context->progress = progress;
    return status;
}

/* to += weight times the matrix at t. */
static pk_status pk__along_add(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                               const int moves[2], double t, double weight, double *to)
{
    const size_t kept = pk__along_kept(along, left), planes = pk__along_planes(along);
    const size_t numbers = planes * left->rows.rows * kept * (right ? right : left)->rows.rows * kept;
    const pk_real *at = along->w;
    pk__gram_rows_of sides[2] = {*left, right ? *right : *left};
    if (t > 0 && (moves[0] || moves[1])) {
        pk__step_point(along->graph->parameters, along->w, along->next, t, along->at);
        at = along->at;
    }
    for (int s = 0; s < 2; s++)
        sides[s].weights = moves[s] ? at : along->w;
    const pk_status status = pk__along_gram(along, &sides[0], right ? &sides[1] : NULL, along->part);
    for (size_t i = 0; !status && i < numbers; i++)
        to[i] += weight * along->part[i];
    along->points++;
    return status;
}

/* to = the Gauss rule of so many nodes on [a, b]. */
static pk_status pk__along_gauss(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                 const int moves[2], double a, double b, int nodes, size_t numbers, double *to)
{
    pk_status status = PK_OK;
    pk_gauss_legendre(nodes, along->nodes, along->weights);
    memset(to, 0, numbers * sizeof *to);
    for (int q = 0; !status && q < nodes; q++)
        status = pk__along_add(along, left, right, moves, a + (b - a) * along->nodes[q],
                               (b - a) * along->weights[q], to);
    return status;
}

/* The largest difference; scale becomes the largest entry. */
static double pk__along_apart(pk__along *along, size_t numbers)
{
    double apart = 0;
    for (size_t i = 0; i < numbers; i++) {
        apart = fmax(apart, fabs(along->fine[i] - along->coarse[i]));
        along->scale = fmax(along->scale, fabs(along->fine[i]));
    }
    return apart;
}

static double pk__along_allowed(const pk__along *along)
{
    return fmax(0.01 * along->tolerance, 64 * PK__EPSILON) * along->scale;
}

static void pk__along_swap(pk__along *along)
{
    double *spare = along->coarse;
    along->coarse = along->fine;
    along->fine = spare;
}

/* result += the integral over [a, b], by common nodes. */
static pk_status pk__along_piece(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                 const int moves[2], double a, double b, int depth, unsigned char *order,
                                 size_t numbers, double *result)
{
    int nodes = *order ? *order : 2;
    double before = INFINITY;
    pk_status status = pk__along_gauss(along, left, right, moves, a, b, nodes, numbers, along->coarse);
    for (int tried = 0; !status; nodes++, tried++) {
        status = pk__along_gauss(along, left, right, moves, a, b, nodes + 1, numbers, along->fine);
        if (status)
            break;
        const double apart = pk__along_apart(along, numbers), allowed = pk__along_allowed(along);
        const int last = depth == PK__ALONG_DEPTH || along->halvings >= PK__ALONG_HALVINGS;
        if (apart <= allowed || (last && nodes >= PK__ALONG_ORDER)) {
            along->refused += apart > allowed;
            along->error += apart;
            for (size_t i = 0; i < numbers; i++)
                result[i] += along->fine[i];
            *order = (unsigned char)(apart < 1e-3 * allowed && nodes > 1 ? nodes - 1 : nodes);
            return PK_OK;
        }
        if (!last && (nodes >= PK__ALONG_ORDER || (tried >= 3 && apart > before / 2)))
            break;
        before = apart;
        pk__along_swap(along);
    }
    if (status)
        return status;
    along->halvings++;
    *order = 4;
    status = pk__along_piece(along, left, right, moves, a, 0.5 * (a + b), depth + 1, order, numbers, result);
    return status ? status
                  : pk__along_piece(along, left, right, moves, 0.5 * (a + b), b, depth + 1, order, numbers,
                                    result);
}

/* ---- rows with kinks of their own ---------------------------------------------------------------------- */

/* The points of a side: of each row its pieces, of each piece n nodes. */
typedef struct pk__along_side {
    const pk__gram_rows_of *of;
    int moves;
    pk__pieces pieces; /* by row and place */
    size_t *first;     /* of each row: its first piece; one more at the end */
    double *size;      /* of each row: see pk__pieces_split; or NULL */
    /* Of the tile: */
    size_t start, rows, points;
    pk_real *inputs, *t, *targets;
    int64_t *labels;
} pk__along_side;

typedef struct pk__along_rows {
    pk__path path;
    pk__pieces found;
    int far; /* some activation moves far: pieces are halved */
    void *memory;
} pk__along_rows;

static size_t pk__along_pieces(void)
{
    return 64 * PK__ALONG_ROWS + 1024;
}

static void pk__along_rows_take(pk__arena *arena, const pk__along *along, pk__along_rows *rows)
{
    const size_t points = 64;
    pk__path_take(arena, along->graph, PK__ALONG_ROWS, points, 1, 1, pk__along_pieces(), 0, &rows->path);
    pk__pieces_take(arena, pk__along_pieces(), &rows->found);
}

/* The pieces of some rows between a and b; of half the rows, then of half as long pieces, where there is no room. */
static pk_status pk__along_split(pk__along *along, pk__along_rows *rows, pk__along_side *side, size_t first,
                                 size_t count, double a, double b, int depth)
{
    const pk_matrix *inputs = &side->of->rows;
    const pk_graph *graph = along->graph;
    pk__piece start[PK__ALONG_ROWS];
    pk__pieces from = {0, PK__ALONG_ROWS, start};
    pk_status status = PK_OK;
    for (size_t r = 0; r < count; r++)
        pk__pieces_push(&from, r, a, b);
    pk__path_begin(&rows->path, graph->tied ? along->spread : along->w,
                   graph->tied ? along->spread + graph->spread : along->direction, NULL, count,
                   inputs->data + first * inputs->ld);
    if (!pk__path_split(&rows->path, &from, &rows->found)) {
        if (count > 1) {
            status = pk__along_split(along, rows, side, first, count / 2, a, b, depth);
            return status
                       ? status
                       : pk__along_split(along, rows, side, first + count / 2, count - count / 2, a, b, depth);
        }
        if (depth < 8) {
            status = pk__along_split(along, rows, side, first, 1, a, 0.5 * (a + b), depth + 1);
            return status ? status : pk__along_split(along, rows, side, first, 1, 0.5 * (a + b), b, depth + 1);
        }
        return pk__fail(along->context, PK_UNSUPPORTED,
                        "%s: row %zu has more kinks in one step than there is room for", along->name, first);
    }
    for (size_t i = 0; !status && i < rows->found.count; i++) {
        pk__piece piece = rows->found.piece[i];
        piece.row += first;
        if (piece.b > piece.a)
            status = pk__pieces_append(along->context, along->name, &side->pieces, &piece);
    }
    return status;
}

/* Cuts the pieces of each row further, at the kinks of the loss and where the row's gradient is no polynomial. */
static pk_status pk__along_cut(pk__along *along, pk__along_rows *rows, pk__along_side *side)
{
    const pk_graph *graph = along->graph;
    const pk__gram_rows_of *of = side->of;
    const pk_criterion *criterion = of->seeds == PK__SEEDS_LOSS ? along->criterion : NULL;
    pk__pieces cut = {0, 0, NULL};
    pk__piece_search search;
    if (!rows->far && !pk__criterion_kinks(criterion, graph->output_width))
        return PK_OK;
    const size_t sizes = graph->node_count + 1;
    pk_status status = pk__pieces_prepare(along->context, along->name, &rows->path, criterion, rows->far,
                                          0.1 * along->tolerance, &search);
    if (!status && !side->size) {
        status =
            pk_allocate(along->context, of->rows.rows, sizes * sizeof *side->size, along->name, &side->size);
        for (size_t i = 0; !status && i < of->rows.rows * sizes; i++)
            side->size[i] = 0;
    }
    for (size_t i = 0, end; !status && i < side->pieces.count; i = end) {
        const size_t r = side->pieces.piece[i].row;
        for (end = i; end < side->pieces.count && side->pieces.piece[end].row == r;)
            end++;
        pk__path_begin(&rows->path, graph->tied ? along->spread : along->w,
                       graph->tied ? along->spread + graph->spread : along->direction, NULL, 1,
                       of->rows.data + r * of->rows.ld);
        status = pk__pieces_split(&search, end - i, side->pieces.piece + i,
                                  criterion ? of->targets + r * graph->output_width : NULL,
                                  side->size + r * sizes, &cut);
    }
    pk__pieces_release(&search);
    const pk__pieces before = side->pieces;
    side->pieces = status ? before : cut;
    pk_release(along->context, status ? cut.piece : before.piece);
    return status;
}

/* All pieces of a side between a and b, cut into 2^halved parts. */
static pk_status pk__along_find(pk__along *along, pk__along_rows *rows, pk__along_side *side, double a,
                                double b, int halved)
{
    const size_t count = side->of->rows.rows, parts = (size_t)1 << halved;
    pk_status status = PK_OK;
    if (!side->first)
        status = pk_allocate(along->context, count + 1, sizeof *side->first, along->name, &side->first);
    side->pieces.count = 0;
    for (size_t r = 0; !status && r < count && side->moves; r += PK__ALONG_ROWS)
        status = pk__along_split(along, rows, side, r, pk__min(PK__ALONG_ROWS, count - r), a, b, 0);
    for (size_t r = 0; !status && r < count && !side->moves; r++) {
        pk__piece piece;
        memset(&piece, 0, sizeof piece);
        piece.row = r;
        piece.a = a;
        piece.b = b;
        status = pk__pieces_append(along->context, along->name, &side->pieces, &piece);
    }
    if (status)
        return status;
    pk__sort_pieces(&side->pieces, pk__precedes_by_place);
    if (side->moves)
        status = pk__along_cut(along, rows, side);
    const size_t found = side->pieces.count;
    for (size_t i = 0; side->moves && parts > 1 && !status && i < found; i++) {
        const pk__piece whole = side->pieces.piece[i];
        const double length = (whole.b - whole.a) / (double)parts;
        side->pieces.piece[i].b = whole.a + length;
        for (size_t k = 1; !status && k < parts; k++) {
            pk__piece piece = whole;
            piece.a = whole.a + (double)k * length;
            piece.b = k + 1 < parts ? whole.a + (double)(k + 1) * length : whole.b;
            status = pk__pieces_append(along->context, along->name, &side->pieces, &piece);
        }
    }
    if (status)
        return status;
    pk__sort_pieces(&side->pieces, pk__precedes_by_place);
    size_t i = 0;
    for (size_t r = 0; r <= count; r++) {
        while (i < side->pieces.count && side->pieces.piece[i].row < r)
            i++;
        side->first[r] = i;
    }
    return PK_OK;
}

/* The most pieces that a row of a side has. */
static size_t pk__along_most(const pk__along_side *side)
{
    size_t most = 0;
    for (size_t r = 0; r < side->of->rows.rows; r++)
        most = pk__max(most, side->first[r + 1] - side->first[r]);
    return most;
}

/* How far the rule's integral of df/dt over [a, b] misses the change of f of a side's rows, of the largest |df/dt|; what rounding
 * of f explains is 0. f: the outputs, or the loss where its gradients, polynomials in the outputs, are integrated. */
static pk_status pk__along_closure(pk__along *along, pk__along_rows *rows, const pk__along_side *side, double a,
                                   double b, int nodes, double *worst)
{
    const pk_graph *graph = along->graph;
    const pk__gram_rows_of *of = side->of;
    const int kinks = of->seeds == PK__SEEDS_LOSS && pk__criterion_degree(along->criterion) >= 0;
    const pk_criterion *criterion = kinks ? along->criterion : NULL;
    const size_t C = graph->output_width, kept = criterion ? 1 : C, last = graph->node_count - 1;
    const size_t count = of->rows.rows;
    double *change = NULL, node[PK__ALONG_ORDER + 1], weight[PK__ALONG_ORDER + 1], largest = 0;
    pk_real *seed = NULL;
    pk_status status = pk_allocate(along->context, count, 3 * kept * sizeof *change, along->name, &change);
    if (!status)
        status = pk_allocate(along->context, C, sizeof *seed, along->name, &seed);
    double *start = change ? change + count * kept : NULL, *end = start ? start + count * kept : NULL;
    pk_gauss_legendre(nodes, node, weight);
    for (size_t r = 0; !status && r < count; r++) {
        pk_real t[PK__ALONG_ORDER + 1];
        size_t zero[PK__ALONG_ORDER + 1] = {0};
        const pk_real *f = pk__pass_output(&rows->path.tape), *target = criterion ? of->targets + r * C : NULL;
        pk__path_begin(&rows->path, graph->tied ? along->spread : along->w,
                       graph->tied ? along->spread + graph->spread : along->direction, NULL, 1,
                       of->rows.data + r * of->rows.ld);
        t[0] = (pk_real)a, t[1] = (pk_real)b;
        pk__path_forward(&rows->path, 2, zero, t);
        for (size_t c = 0; c < kept; c++) {
            start[r * kept + c] = criterion ? pk_criterion_value(criterion, C, f, target) : (double)f[c];
            end[r * kept + c] = criterion ? pk_criterion_value(criterion, C, f + C, target) : (double)f[C + c];
        }
        for (size_t i = side->first[r]; i < side->first[r + 1] && graph->nodes[last].varies; i++) {
            const pk__piece *piece = &side->pieces.piece[i];
            for (int q = 0; q < nodes; q++)
                t[q] = (pk_real)(piece->a + (piece->b - piece->a) * node[q]);
            pk__path_forward(&rows->path, (size_t)nodes, zero, t);
            pk__path_tangent(&rows->path, 0, (size_t)nodes, zero, t);
            for (int q = 0; q < nodes; q++) {
                const pk_real *tangent = rows->path.tape.tangent[last] + (size_t)q * C;
                if (criterion)
                    pk_criterion_gradient(criterion, C, f + (size_t)q * C, target, seed);
                for (size_t c = 0; c < kept; c++) {
                    double slope = tangent[c];
                    for (size_t k = criterion ? 0 : C; k < C; k++)
                        slope = (k ? slope : 0) + (double)seed[k] * tangent[k];
                    change[r * kept + c] += (piece->b - piece->a) * weight[q] * slope;
                    largest = fmax(largest, fabs(slope));
                }
            }
        }
    }
    for (size_t i = 0; !status && i < count * kept; i++) {
        const double f = fmax(fabs(start[i]), fabs(end[i])), miss = fabs(end[i] - start[i] - change[i]);
        if (largest > 0 &&
            miss > (sizeof(pk_real) == sizeof(float) ? 2e-6 : 1e-14) * fmax(f, (b - a) * largest))
            *worst = fmax(*worst, miss / largest);
    }
    pk_release(along->context, seed);
    pk_release(along->context, change);
    return status;
}

/* The rows `start` ... of a side with at most `most` points, at least one row. */
static pk_status pk__along_points(pk__along *along, pk__along_side *side, size_t start, int nodes, size_t most)
{
    const pk__gram_rows_of *of = side->of;
    const size_t D = of->rows.cols, C = along->graph->output_width, n = side->moves ? (size_t)nodes : 1;
    double node[PK__ALONG_ORDER + 1], weight[PK__ALONG_ORDER + 1];
    size_t end = start + 1;
    while (end < of->rows.rows && (side->first[end + 1] - side->first[start]) * n <= most)
        end++;
    side->start = start;
    side->rows = end - start;
    side->points = (side->first[end] - side->first[start]) * n;
    pk_release(along->context, side->inputs);
    side->inputs = NULL;
    const size_t numbers = D + 1 + (of->targets ? C : 0);
    pk_status status = pk_allocate(along->context, side->points,
                                   numbers * sizeof(pk_real) + (of->labels ? sizeof(int64_t) : 0) + 8,
                                   along->name, &side->inputs);
    if (status)
        return status;
    side->labels = of->labels ? (int64_t *)(void *)side->inputs : NULL;
    pk_real *const block = side->inputs + (of->labels ? side->points * sizeof(int64_t) / sizeof(pk_real) : 0);
    side->t = block + side->points * D;
    side->targets = of->targets ? side->t + side->points : NULL;
    pk_gauss_legendre((int)n, node, weight);
    for (size_t p = 0; p < side->points; p++) {
        const pk__piece *piece = &side->pieces.piece[side->first[start] + p / n];
        memcpy(block + p * D, of->rows.data + piece->row * of->rows.ld, D * sizeof *block);
        side->t[p] = (pk_real)(piece->a + (piece->b - piece->a) * node[p % n]);
        if (side->labels)
            side->labels[p] = of->labels[piece->row];
        if (side->targets)
            memcpy(side->targets + p * C, of->targets + piece->row * C, C * sizeof *side->targets);
    }
    along->points += side->moves ? side->points : 0;
    return PK_OK;
}

static pk__gram_rows_of pk__along_rows_of(const pk__along *along, const pk__along_side *side)
{
    pk__gram_rows_of of = *side->of;
    pk_real *const block = side->inputs && side->labels
                               ? side->inputs + side->points * sizeof(int64_t) / sizeof(pk_real)
                               : side->inputs; /* nothing may be added to NULL */
    of.rows = pk_matrix_view(block, side->points, side->of->rows.cols);
    of.weights = along->w;
    of.direction = side->moves ? along->direction : NULL;
    of.t = side->moves ? side->t : NULL;
    of.labels = side->labels;
    of.targets = side->targets;
    return of;
}

/* Gauss nodes and weights of a side that does not move (one), and of one that does. */
typedef struct pk__along_nodes {
    int count[2];
    double node[2][PK__ALONG_ORDER + 1], weight[2][PK__ALONG_ORDER + 1];
} pk__along_nodes;

/* W (left nodes x right nodes) of two pieces; 0: they do not meet. */
static int pk__along_weights(const pk__along_nodes *nodes, const pk__piece *left, int left_moves,
                             const pk__piece *right, int right_moves, double *W)
{
    const double a = fmax(left->a, right->a), b = fmin(left->b, right->b);
    const int rule = left_moves || right_moves, nx = nodes->count[left_moves], ny = nodes->count[right_moves];
    double l[PK__ALONG_ORDER + 1], r[PK__ALONG_ORDER + 1];
    if (!(b > a))
        return 0;
    memset(W, 0, (size_t)(nx * ny) * sizeof *W);
    for (int q = 0; q < nodes->count[rule]; q++) {
        const double t = a + (b - a) * nodes->node[rule][q], weight = (b - a) * nodes->weight[rule][q];
        for (int u = 0; u < nx; u++)
            l[u] = pk__lagrange(nx, nodes->node[left_moves], u, (t - left->a) / (left->b - left->a));
        for (int v = 0; v < ny; v++)
            r[v] = pk__lagrange(ny, nodes->node[right_moves], v, (t - right->a) / (right->b - right->a));
        for (int u = 0; u < nx; u++)
            for (int v = 0; v < ny; v++)
                W[u * ny + v] += weight * l[u] * r[v];
    }
    return 1;
}

/* to += what the points of two rows give, in each plane. */
static void pk__along_reduce(const pk__along *along, const pk__along_nodes *nodes, const pk__along_side *x,
                             const pk__along_side *y, size_t i, size_t j, const pk_real *gram, size_t columns,
                             double *to)
{
    enum { N = PK__ALONG_ORDER + 1 };
    const size_t kept = pk__along_kept(along, x->of), planes = pk__along_planes(along), ld = y->points * kept;
    const size_t rows = x->of->rows.rows * kept;
    const int nx = nodes->count[x->moves], ny = nodes->count[y->moves];
    double W[N * N];
    for (size_t p = x->first[i]; p < x->first[i + 1]; p++)
        for (size_t q = y->first[j]; q < y->first[j + 1]; q++) {
            if (!pk__along_weights(nodes, &x->pieces.piece[p], x->moves, &y->pieces.piece[q], y->moves, W))
                continue;
            const size_t px = (p - x->first[x->start]) * (size_t)nx, py = (q - y->first[y->start]) * (size_t)ny;
            for (size_t plane = 0; plane < planes; plane++)
                for (size_t k = 0; k < kept; k++)
                    for (size_t l = 0; l < kept; l++) {
                        double sum = 0;
                        for (int u = 0; u < nx; u++)
                            for (int v = 0; v < ny; v++)
                                sum += W[u * ny + v] *
                                       gram[(plane * x->points * kept + (px + (size_t)u) * kept + k) * ld +
                                            (py + (size_t)v) * kept + l];
                        to[(plane * rows + i * kept + k) * columns + j * kept + l] += sum;
                    }
        }
}

/* to = the integral with n nodes a piece. */
static pk_status pk__along_meet(pk__along *along, pk__along_side *x, pk__along_side *y, int nodes,
                                size_t numbers, double *to)
{
    const size_t kept = pk__along_kept(along, x->of), planes = pk__along_planes(along);
    const size_t columns = y->of->rows.rows * kept;
    pk_status status = PK_OK;
    pk__along_nodes rule = {.count = {1, nodes}};
    for (int moves = 0; moves < 2; moves++)
        pk_gauss_legendre(rule.count[moves], rule.node[moves], rule.weight[moves]);
    memset(to, 0, numbers * sizeof *to);
    for (size_t i = 0; !status && i < x->of->rows.rows; i += x->rows) {
        status = pk__along_points(along, x, i, nodes, PK__ALONG_POINTS);
        const size_t left = x->points * kept * kept * planes;
        for (size_t j = 0; !status && j < y->of->rows.rows; j += y->rows) {
            pk_real *gram = NULL;
            status = pk__along_points(along, y, j, nodes, pk__max(1, PK__ALONG_TILE / pk__max(left, 1)));
            if (!status)
                status = pk_allocate(along->context, left, y->points * sizeof *gram, along->name, &gram);
            const pk__gram_rows_of sides[2] = {pk__along_rows_of(along, x), pk__along_rows_of(along, y)};
            if (!status)
                status = pk__along_gram(along, &sides[0], &sides[1], gram);
            for (size_t r = 0; !status && r < x->rows; r++)
                for (size_t s = 0; s < y->rows; s++)
                    pk__along_reduce(along, &rule, x, y, i + r, j + s, gram, columns, to);
            pk_release(along->context, gram);
        }
    }
    return status;
}

static void pk__along_side_release(const pk__along *along, pk__along_side *side)
{
    pk_release(along->context, side->inputs);
    pk_release(along->context, side->pieces.piece);
    pk_release(along->context, side->first);
    pk_release(along->context, side->size);
}

/* Whether nothing of these rows moves far. */
static int pk__along_steady(pk__along *along, pk__along_rows *rows, const pk__gram_rows_of *of)
{
    const pk_graph *graph = along->graph;
    for (size_t r = 0; r < of->rows.rows; r += PK__ALONG_ROWS) {
        const size_t count = pk__min(PK__ALONG_ROWS, of->rows.rows - r);
        if (of->rows.ld != of->rows.cols)
            return 0;
        pk__path_begin(&rows->path, graph->tied ? along->spread : along->w,
                       graph->tied ? along->spread + graph->spread : along->direction, NULL, count,
                       of->rows.data + r * of->rows.ld);
        if (!pk__rows_are_steady(&rows->path, count, of->seeds == PK__SEEDS_LOSS ? along->criterion : NULL))
            return 0;
    }
    return 1;
}

/* The degree in t of the gradients of a side between kinks; -1: they are no polynomials. */
static int pk__along_degree(const pk__along *along, const pk__gram_rows_of *of)
{
    const pk_graph *graph = along->graph;
    const int inner = graph->degree > 1 ? graph->degree - 1 : 0;
    const int outer = of->seeds == PK__SEEDS_LOSS ? pk__criterion_degree(along->criterion) : 0;
    return graph->degree < 0 || graph->surrogate || outer < 0 ? -1 : inner + outer * graph->degree;
}

/* What the rounding of t makes of an integral over short pieces, relative to it: points of a piece are off by a part of its
 * length. */
static double pk__along_blur(const pk__along_side *side)
{
    double blur = 0;
    for (size_t i = 0; side->moves && i < side->pieces.count; i++) {
        const pk__piece *piece = &side->pieces.piece[i];
        blur = fmax(blur, 4 * PK__EPSILON * piece->b / (piece->b - piece->a));
    }
    return blur;
}

/* result += the integral over [a, b], where rows have pieces of their own. */
static pk_status pk__along_window(pk__along *along, pk__along_rows *rows, pk__along_side sides[2], int same,
                                  double a, double b, int depth, unsigned char *order, size_t numbers,
                                  double *result)
{
    const pk_graph *graph = along->graph;
    const int both = sides[0].moves && sides[1].moves;
    int degree = -1, exact = graph->degree <= PK__PATH_DEGREE && !rows->path.interpolates;
    for (int s = 0; s < 2; s++) {
        const int own = sides[s].moves ? pk__along_degree(along, sides[s].of) : 0;
        exact &= own >= 0;
        degree = own > degree ? own : degree;
    }
    int nodes = both ? degree + 1 : degree / 2 + 1, done = 0;
    exact &= nodes <= PK__ALONG_ORDER;
    if (!exact)
        nodes = rows->far ? PK__PIECE_NODES : *order ? *order : 3;
    double missed = 0;
    pk_status status = PK_OK;
    const int refined = rows->far ? 1 : PK__ALONG_REFINED; /* of pieces that are short enough already */
    for (int halved = 0; !status && !done && halved <= refined; halved++) {
        double before = INFINITY;
        for (int s = 0; !status && s < 2; s++)
            status = pk__along_find(along, rows, &sides[s], a, b, halved);
        /* All pieces of one row are multiplied with all of another: where there are many, those that are near. */
        if (!status && rows->far && !halved && depth < PK__ALONG_DEPTH &&
            along->halvings < PK__ALONG_HALVINGS &&
            pk__max(pk__along_most(&sides[0]), pk__along_most(&sides[1])) > PK__ALONG_WINDOW) {
            const double middle = 0.5 * (a + b);
            along->halvings++;
            status = pk__along_window(along, rows, sides, same, a, middle, depth + 1, order, numbers, result);
            return status ? status
                          : pk__along_window(along, rows, sides, same, middle, b, depth + 1, order, numbers,
                                             result);
        }
        if (!status)
            status = pk__along_meet(along, &sides[0], &sides[1], nodes, numbers,
                                    exact ? along->fine : along->coarse);
        if (!status && exact) {
            memcpy(along->coarse, along->fine, numbers * sizeof *along->fine);
            pk__along_apart(along, numbers);
            done = 1;
        }
        for (int tried = 0; !status && !done; nodes++, tried++) {
            status = pk__along_meet(along, &sides[0], &sides[1], nodes + 1, numbers, along->fine);
            const double apart = pk__along_apart(along, numbers), allowed = pk__along_allowed(along);
            const int last = halved == refined || graph->surrogate;
            done = !status && (apart <= allowed || (last && nodes + 1 >= PK__ALONG_ORDER));
            if (done) {
                along->error += apart;
                along->refused += apart > allowed;
                *order = (unsigned char)(apart < 1e-3 * allowed && nodes > 1 ? nodes - 1 : nodes);
                break;
            }
            if (nodes + 1 >= PK__ALONG_ORDER || (!last && tried >= 4 && apart > before / 2))
                break;
            before = apart;
            pk__along_swap(along);
        }
        if (!done)
            nodes = 4;
    }
    for (int s = 0; s < (same ? 1 : 2) && !status && !graph->surrogate; s++)
        if (sides[s].moves)
            status = pk__along_closure(along, rows, &sides[s], a, b, (int)pk__min(nodes + 1, PK__ALONG_ORDER),
                                       &missed);
    if (status)
        return status;
    double largest = 0;
    for (size_t i = 0; i < numbers; i++) {
        result[i] += along->fine[i];
        largest = fmax(largest, fabs(along->fine[i]));
    }
    missed *= along->scale;
    if (rows->far) /* between kinks, short pieces are a small part of the integral */
        missed += fmax(pk__along_blur(&sides[0]), pk__along_blur(&sides[1])) * largest;
    along->error += missed;
    along->refused += missed > pk__along_allowed(along);
    return PK_OK;
}

/* result = the integral where rows have pieces of their own, or, where neither network nor loss have kinks and the rows are
 * steady, untouched with *steady = 1. */
static pk_status pk__along_kinked(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                  const int moves[2], unsigned char *order, size_t numbers, double *result,
                                  int *steady)
{
    const pk_graph *graph = along->graph;
    pk__along_side sides[2];
    pk__along_rows rows;
    memset(sides, 0, sizeof sides);
    memset(&rows, 0, sizeof rows);
    sides[0].of = left, sides[0].moves = moves[0] != 0;
    sides[1].of = right ? right : left, sides[1].moves = moves[1] != 0;
    pk__arena measured = {NULL, 0, 0, 0};
    pk__along_rows_take(&measured, along, &rows);
    if (measured.overflow)
        return pk__fail(along->context, PK_OVERFLOW, "%s: the memory for this network overflows", along->name);
    pk_status status = pk_allocate(along->context, measured.used, 1, along->name, &rows.memory);
    if (status)
        return status;
    pk__arena arena = {rows.memory, measured.used, 0, 0};
    pk__along_rows_take(&arena, along, &rows);
    int kinks = graph->switched || graph->surrogate;
    for (int s = 0; s < (right ? 2 : 1); s++)
        if (moves[s] && !graph->surrogate) {
            const int loss = sides[s].of->seeds == PK__SEEDS_LOSS;
            kinks |= loss && pk__criterion_kinks(along->criterion, graph->output_width) > 0;
            rows.far |=
                pk__along_degree(along, sides[s].of) < 0 && !pk__along_steady(along, &rows, sides[s].of);
        }
    *steady = !kinks && !rows.far;
    if (!*steady)
        status = pk__along_window(along, &rows, sides, !right, 0, 1, 0, order, numbers, result);
    /* Both halves are computed, each from its own products: one is the other's mirror image. */
    const size_t kept = pk__along_kept(along, left), n = left->rows.rows * kept;
    for (size_t plane = 0; !status && !*steady && !right && plane < pk__along_planes(along); plane++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < i; j++)
                result[(plane * n + i) * n + j] = result[(plane * n + j) * n + i];
    for (int s = 0; s < 2; s++)
        pk__along_side_release(along, &sides[s]);
    pk_release(along->context, rows.memory);
    return status;
}

/* ---- all rules ----------------------------------------------------------------------------------------- */

PK__INTERNAL pk_status pk__along_integrate(pk__along *along, const pk__gram_rows_of *left,
                                           const pk__gram_rows_of *right, const int moves[2],
                                           unsigned char *order, double *result)
{
    const size_t kept = pk__along_kept(along, left), planes = pk__along_planes(along);
    const size_t numbers = planes * left->rows.rows * kept * (right ? right : left)->rows.rows * kept;
    const pk_rule rule = moves[0] || moves[1] ? along->rule.rule : PK_RULE_LEFT;
    const int nodes = pk__max(along->rule.nodes, rule == PK_RULE_TRAPEZOID ? 2 : 1);
    pk_status status = PK_OK;
    along->error = along->scale = 0;
    along->halvings = 0;
    memset(result, 0, numbers * sizeof *result);
    if (!numbers)
        return PK_OK;
    if (rule == PK_RULE_AUTO) {
        int steady;
        status = pk__along_kinked(along, left, right, moves, order, numbers, result, &steady);
        if (status || !steady)
            return status;
        int degree = 0;
        for (int s = 0; s < 2; s++) {
            const int own = moves[s] ? pk__along_degree(along, s && right ? right : left) : 0;
            degree = own < 0 || degree < 0 ? -1 : degree + own;
        }
        return degree >= 0 && degree < PK__ALONG_NODES
                   ? pk__along_gauss(along, left, right, moves, 0, 1, degree / 2 + 1, numbers, result)
                   : pk__along_piece(along, left, right, moves, 0, 1, 0, order, numbers, result);
    }
    if (rule == PK_RULE_GAUSS)
        return pk__along_gauss(along, left, right, moves, 0, 1, nodes, numbers, result);
    if (!moves[0] && !moves[1])
        return pk__along_add(along, left, right, moves, 0, 1, result);
    for (int q = 0; !status && q < nodes; q++) {
        const int ends = rule == PK_RULE_TRAPEZOID;
        const double t = ends ? q / (double)(nodes - 1) : (q + (rule == PK_RULE_MIDPOINT ? 0.5 : 0)) / nodes;
        const double weight = ends ? (q == 0 || q == nodes - 1 ? 0.5 : 1) / (nodes - 1) : 1.0 / nodes;
        status = pk__along_add(along, left, right, moves, t, weight, result);
    }
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
