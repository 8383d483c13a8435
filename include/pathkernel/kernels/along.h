/* pathkernel/kernels/along.h: Gram matrices of gradients, integrated along one step w + t D, 0 <= t <= 1.
 *
 *     G = integral_0^1 < L(t), R(t) > dt,        each side at w + t D (it moves) or at w
 *
 * Nodes that are common to all rows cost one call of gram.h: of a layer, with weights b_q,
 *     sum_q b_q (a_q . a'_q + 1) sum_k d_qk . d'_qk.
 * Inputs that are data are multiplied once, and sum_q goes into the product of cotangents, whose terms are then nodes, outputs
 * and units; of the last layer, whose cotangents do not depend on the row, it goes into that of the inputs. A trace needs the
 * outputs of the layer below the last one only as sum_k W_kh(t) W_kh(t), once for all rows. What is left for n nodes is n
 * products of the layers between. All outputs with all (full) are C^2 numbers a pair of rows, each a sum over the units of a
 * layer: at least 2 C^2 units flops a node and layer, C times those of a decomposition.
 *
 * Fixed rules take common nodes. The rule auto is
 * 1. where no kink depends on the weights and no activation moves far (pieces.h): Gauss-Legendre with n nodes. All pairs of rows are compared with n + 1 nodes in the
 *    first step and then in each PK__ALONG_SINCE-th; between these a few rows are (that with the largest inputs, the worst of
 *    the last whole comparison, and others from step to step), and have to be PK__ALONG_SPARE times as exact. n begins with that
 *    of the step before. Where more nodes help too little, the piece is halved. Where the network and the loss are polynomials,
 *    their degree gives n. Where the network and the loss are
 *    polynomials, their degree gives n.
 * 2. where there are kinks, of the network or of a loss, or where an activation moves far: rows that have none in the step are integrated with each other as in 1, or, where the network is
 *    piecewise linear, with the n nodes that are exact. Rows with kinks have pieces of their own, between their own kinks
 *    (path/kinks.h), with n Gauss nodes each. On a piece the gradients are polynomials in t of known degree, so that their values
 *    at n nodes determine them:
 *        integral < L, R > dt = sum_{u, v} W_uv < L(t_u), R(t_v) >,   W_uv = integral over both pieces of the Lagrange
 *                                                                    polynomials of u and v.
 *    So rows with different kinks meet exactly, n^2 products for each two pieces; a row goes through the network at its own
 *    nodes, or, without kinks, at the n common ones. n follows from the degree where the network is piecewise linear; else n
 *    and n + 1 are compared as in 1, where each row with kinks meets a few others, and all pieces are halved where more nodes
 *    help too little. The integral of df/dt of each row against the change of f shows a kink that was missed.
 * Rejected: the union of all rows' kinks as common pieces costs each row the kinks of all others; halving until a kink is
 * closed in on costs about 33 matrices a kink; interpolating rows without kinks at the nodes of one with kinks costs as many
 * products as the Lagrange polynomials.
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
    size_t numbers, together; /* together: nodes of one matrix product */
    pk_real *at, *part, *untied;
    double *coarse, *fine, *nodes, *weights;
    double scale;
    double *some;    /* of the rows without kinks */
    size_t worst[2]; /* row and column of the largest difference */
    size_t halvings;
    struct pk__along_few { /* of a side: rows that stand for all */
        pk_real *rows, *targets;
        int64_t *labels;
        pk__gram_rows_of of;
    } few[2];
    void *memory;
} pk__along;

/* What is known from the step before, of the same rows: all 0 at first. */
typedef struct pk__along_order {
    struct pk__along_smooth {
        unsigned char nodes; /* of a piece */
        unsigned char since; /* steps in which only a few rows were compared with a rule of one node more */
        size_t worst[2];     /* the row and the column that differed most when all were, in their sides */
    } smooth, kinked;        /* of rows without kinks, or of all; of pairs of which one has kinks */
} pk__along_order;

enum { PK__ALONG_NODES = 1000 };

PK__INTERNAL pk_status pk__along_prepare(pk_context *context, const pk_graph *graph, size_t numbers,
                                         pk__along *along);
PK__INTERNAL void pk__along_release(pk__along *along);
/* Computes the direction of a step, after w and next are set. */
PK__INTERNAL void pk__along_begin(pk__along *along);
/* result = G of the rows; right == NULL: left with itself. Rows have their seeds, labels and targets, no weights. moves:
 * whether left and right move. */
PK__INTERNAL pk_status pk__along_integrate(pk__along *along, const pk__gram_rows_of *left,
                                           const pk__gram_rows_of *right, const int moves[2],
                                           pk__along_order *order, double *result);
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
    PK__ALONG_TOGETHER = 8,   /* nodes of one product, at most */
    PK__ALONG_DEPTH = 40,     /* halvings of a piece, */
    PK__ALONG_HALVINGS = 512, /* of a step */
    PK__ALONG_REFINED = 4,    /* halvings of all pieces of rows with kinks */
    PK__ALONG_WINDOW = 16,    /* more pieces of a row are not multiplied with all of another one's */
    PK__ALONG_FEW = 8,    /* rows of a side that stand for all: where there are PK__ALONG_MANY times as many, */
    PK__ALONG_MANY = 4,   /* and at least this long after all were compared: */
    PK__ALONG_SINCE = 16, /* steps */
    PK__ALONG_SPARE = 16, /* times as exact as all */
    PK__ALONG_ROWS = 16,  /* rows whose kinks are found together */
    PK__ALONG_SEEN = 64,  /* points of rows that go through the network together */
    PK__ALONG_POINTS = 256,  /* of the left side at one time; more where one row has more */
    PK__ALONG_TILE = 1 << 21 /* numbers of a product of points */
};

static void pk__along_take(pk__arena *arena, pk__along *along)
{
    const size_t P = along->graph->parameters;
    along->direction = pk__arena_take(arena, P, sizeof(pk_real));
    along->at = pk__arena_take(arena, P, along->together * sizeof(pk_real));
    along->untied =
        along->graph->tied ? pk__arena_take(arena, along->graph->untied, 2 * sizeof(pk_real)) : NULL;
    along->part = pk__arena_take(arena, along->numbers, sizeof(pk_real));
    along->coarse = pk__arena_take(arena, along->numbers, sizeof(double));
    along->fine = pk__arena_take(arena, along->numbers, sizeof(double));
    along->some = pk__arena_take(arena, along->numbers, sizeof(double));
    along->nodes = pk__arena_take(arena, PK__ALONG_NODES, sizeof(double));
    along->weights = pk__arena_take(arena, PK__ALONG_NODES, sizeof(double));
    for (int s = 0; s < 2; s++) {
        along->few[s].rows = pk__arena_take(arena, PK__ALONG_FEW, along->graph->input_width * sizeof(pk_real));
        along->few[s].targets =
            pk__arena_take(arena, PK__ALONG_FEW, along->graph->output_width * sizeof(pk_real));
        along->few[s].labels = pk__arena_take(arena, PK__ALONG_FEW, sizeof(int64_t));
    }
}

/* Nodes whose weights and factors are in memory together, from shapes alone: a pass has about 128 rows. */
static size_t pk__along_together(const pk_graph *graph)
{
    size_t row = graph->input_width;
    for (size_t n = 1; n < graph->node_count; n++)
        row += graph->nodes[n].width;
    const size_t most = ((size_t)1 << 24) / pk__max(graph->parameters, 128 * row);
    return pk__max(1, pk__min(most / pk__max(graph->output_width, 1), PK__ALONG_TOGETHER));
}

PK__INTERNAL pk_status pk__along_prepare(pk_context *context, const pk_graph *graph, size_t numbers,
                                         pk__along *along)
{
    memset(along, 0, sizeof *along);
    along->context = context;
    along->graph = graph;
    along->numbers = numbers;
    along->together = pk__along_together(graph);
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
        pk_graph_untie(graph, along->w, along->untied);
        pk_graph_untie(graph, along->direction, along->untied + graph->untied);
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

/* part = the sum of the matrices at some nodes, of rows whose sides stand where they say. The library's fractions of one
 * matrix are none of all. */
static pk_status pk__along_gram(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                size_t nodes, const double *weights, int apart, pk_real *part)
{
    const size_t kept = pk__along_kept(along, left);
    const pk__gram_request request = {
        .name = along->name,
        .graph = along->graph,
        .criterion = along->criterion,
        .summed = along->summed,
        .by_layer = along->by_layer,
        .nodes = nodes,
        .node_weight = weights,
        .apart = apart,
        .result = pk_matrix_view(part, left->rows.rows * kept, (right ? right : left)->rows.rows * kept)};
    int (*progress)(void *, const char *, double) = along->context ? along->context->progress : NULL;
    if (along->context)
        along->context->progress = NULL;
    const pk_status status = pk__gram_compute(along->context, &request, left, right);
    if (along->context)
        along->context->progress = progress;
    return status;
}

static size_t pk__along_numbers(const pk__along *along, const pk__gram_rows_of *left,
                                const pk__gram_rows_of *right)
{
    const size_t kept = pk__along_kept(along, left);
    return pk__along_planes(along) * left->rows.rows * kept * (right ? right : left)->rows.rows * kept;
}

/* to = the sum of weights times the matrices at the nodes, a few at a time. */
static pk_status pk__along_sum(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                               const int moves[2], size_t nodes, const double *t, const double *weights,
                               double *to)
{
    const size_t numbers = pk__along_numbers(along, left, right), P = along->graph->parameters;
    const int some = moves[0] || moves[1];
    pk__gram_rows_of sides[2] = {*left, right ? *right : *left};
    pk_status status = PK_OK;
    memset(to, 0, numbers * sizeof *to);
    for (size_t first = 0, count; first < nodes && !status; first += count) {
        count = pk__min(nodes - first, along->together);
        for (size_t q = 0; q < count && some; q++)
            pk__step_point(P, along->w, along->next, t[first + q], along->at + q * P);
        for (int s = 0; s < 2; s++) {
            sides[s].moves = moves[s];
            sides[s].weights = moves[s] ? along->at : along->w;
        }
        status =
            pk__along_gram(along, &sides[0], right ? &sides[1] : NULL, count, weights + first, 0, along->part);
        for (size_t i = 0; !status && i < numbers; i++)
            to[i] += along->part[i];
    }
    along->points += nodes;
    return status;
}

/* to = the Gauss rule of so many nodes on [a, b]. */
static pk_status pk__along_gauss(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                 const int moves[2], double a, double b, int nodes, double *to)
{
    pk_gauss_legendre(nodes, along->nodes, along->weights);
    for (int q = 0; q < nodes; q++) {
        along->nodes[q] = a + (b - a) * along->nodes[q];
        along->weights[q] *= b - a;
    }
    return pk__along_sum(along, left, right, moves, (size_t)nodes, along->nodes, along->weights, to);
}

/* The largest difference, worst where it is among `columns` columns of a plane of `rows` rows, a row of outputs each;
 * scale becomes the largest entry. */
static double pk__along_apart(pk__along *along, size_t numbers, size_t rows, size_t columns, size_t kept)
{
    double apart = 0;
    for (size_t i = 0; i < numbers; i++) {
        const double own = fabs(along->fine[i] - along->coarse[i]);
        if (own > apart) {
            apart = own;
            along->worst[0] = i / (columns * kept) % (rows * kept) / kept;
            along->worst[1] = i % (columns * kept) / kept;
        }
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

/* Which rows of a list stand for all: those that differed most the last time, that with the largest inputs, and others from one
 * step to the next. list: NULL: all rows of the side. */
static size_t pk__along_spread(const pk__gram_rows_of *of, size_t count, const size_t *list,
                               const struct pk__along_smooth *state, int side, int both,
                               size_t index[PK__ALONG_FEW])
{
    const size_t few = pk__min(count, PK__ALONG_FEW), D = of->rows.cols;
    double most = -1;
    for (size_t i = 0; i < few; i++) {
        const size_t at = (i * count / few + state->since) % count;
        index[i] = list ? list[at] : at;
    }
    for (size_t i = 0, named = 1; i < count; i++) {
        const size_t row = list ? list[i] : i;
        const pk_real *x = of->rows.data + row * of->rows.ld;
        double size = 0;
        for (size_t j = 0; j < D; j++)
            size += (double)x[j] * x[j];
        if (size > most) {
            most = size;
            index[0] = row;
        }
        if ((row == state->worst[side] || (both && row == state->worst[!side])) && named < few)
            index[named++] = row;
    }
    return few;
}

/* The rows `index` of a side. */
static void pk__along_gather(const pk__gram_rows_of *of, size_t outputs, size_t count, const size_t *index,
                             struct pk__along_few *few)
{
    const size_t D = of->rows.cols;
    few->of = *of;
    few->of.rows = pk_matrix_view(few->rows, count, D);
    few->of.labels = of->labels ? few->labels : NULL;
    few->of.targets = of->targets ? few->targets : NULL;
    for (size_t i = 0; i < count; i++) {
        memcpy(few->rows + i * D, of->rows.data + index[i] * of->rows.ld, D * sizeof *few->rows);
        if (of->labels)
            few->labels[i] = of->labels[index[i]];
        if (of->targets)
            memcpy(few->targets + i * outputs, of->targets + index[i] * outputs,
                   outputs * sizeof *few->targets);
    }
}

/* Whether a few rows can tell how many nodes all need: all have been compared not long ago, and there are many. */
static int pk__along_can_spot(const struct pk__along_smooth *state, size_t rows, size_t columns)
{
    return state->nodes && state->since < PK__ALONG_SINCE &&
           rows * columns >= (size_t)PK__ALONG_FEW * PK__ALONG_FEW * PK__ALONG_MANY * PK__ALONG_MANY;
}

/* The nodes with which a few rows are integrated as exactly as all shall be, with room to spare; 0: none are found. They are
 * PK__ALONG_SPARE times as exact, as the largest error of all is larger than that of a few. */
static pk_status pk__along_spot(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                const int moves[2], const struct pk__along_smooth *state, int *nodes,
                                double *apart)
{
    const pk__gram_rows_of *few[2] = {NULL, NULL};
    for (int s = 0; s < (right ? 2 : 1); s++) {
        size_t index[PK__ALONG_FEW];
        const pk__gram_rows_of *of = s ? right : left;
        const size_t count = pk__along_spread(of, of->rows.rows, NULL, state, s, !right, index);
        pk__along_gather(of, along->graph->output_width, count, index, &along->few[s]);
        few[s] = &along->few[s].of;
    }
    const size_t numbers = pk__along_numbers(along, few[0], few[1]), points = along->points;
    const size_t kept = pk__along_kept(along, left);
    int n = state->nodes, found = 0;
    pk_status status = pk__along_gauss(along, few[0], few[1], moves, 0, 1, n, along->coarse);
    for (int tried = 0; !status && !found && tried < 4 && n < PK__ALONG_ORDER; tried++, n++) {
        status = pk__along_gauss(along, few[0], few[1], moves, 0, 1, n + 1, along->fine);
        *apart =
            PK__ALONG_SPARE * pk__along_apart(along, numbers, few[0]->rows.rows, few[!!right]->rows.rows, kept);
        found = *apart <= pk__along_allowed(along) ? n : 0;
        pk__along_swap(along);
    }
    along->points = points; /* of these few: not counted */
    *nodes = found;
    return status;
}

/* The nodes that the next step begins with. */
static unsigned char pk__along_next(int nodes, double apart, double allowed)
{
    return (unsigned char)(apart < 1e-3 * allowed && nodes > 1 ? nodes - 1 : nodes);
}

/* result += the integral over [a, b], by common nodes. */
static pk_status pk__along_piece(pk__along *along, const pk__gram_rows_of *left, const pk__gram_rows_of *right,
                                 const int moves[2], double a, double b, int depth,
                                 struct pk__along_smooth *state, size_t numbers, double *result)
{
    const size_t kept = pk__along_kept(along, left), rows = left->rows.rows,
                 columns = (right ? right : left)->rows.rows;
    int nodes = 0;
    double before = INFINITY, apart = 0;
    pk_status status = PK_OK;
    if (depth == 0 && pk__along_can_spot(state, rows, columns)) {
        status = pk__along_spot(along, left, right, moves, state, &nodes, &apart);
        if (!status && nodes) {
            status = pk__along_gauss(along, left, right, moves, a, b, nodes, result);
            along->error += apart;
            state->nodes = pk__along_next(nodes, apart, pk__along_allowed(along));
            state->since++;
        }
        if (status || nodes)
            return status;
    }
    state->since = 0;
    nodes = state->nodes ? state->nodes : 2;
    status = pk__along_gauss(along, left, right, moves, a, b, nodes, along->coarse);
    for (int tried = 0; !status; nodes++, tried++) {
        status = pk__along_gauss(along, left, right, moves, a, b, nodes + 1, along->fine);
        if (status)
            break;
        apart = pk__along_apart(along, numbers, rows, columns, kept);
        memcpy(state->worst, along->worst, sizeof state->worst);
        const double allowed = pk__along_allowed(along);
        const int last = depth == PK__ALONG_DEPTH || along->halvings >= PK__ALONG_HALVINGS;
        if (apart <= allowed || (last && nodes >= PK__ALONG_ORDER)) {
            along->refused += apart > allowed;
            along->error += apart;
            for (size_t i = 0; i < numbers; i++)
                result[i] += along->fine[i];
            state->nodes = pk__along_next(nodes, apart, allowed);
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
    state->nodes = 4;
    status = pk__along_piece(along, left, right, moves, a, 0.5 * (a + b), depth + 1, state, numbers, result);
    return status ? status
                  : pk__along_piece(along, left, right, moves, 0.5 * (a + b), b, depth + 1, state, numbers,
                                    result);
}

/* ---- rows with kinks of their own ---------------------------------------------------------------------- */

/* The points of a side: of each row its pieces, of each piece n nodes. */
typedef struct pk__along_side {
    const pk__gram_rows_of *of;
    int moves;
    pk__pieces pieces; /* by row and place */
    size_t *first;     /* of each row: its first piece; one more at the end */
    size_t *smooth, smooth_count, *kinked, kinked_count,
        *is_kinked; /* rows without kinks, with kinks; of each row: 1 or 0 */
    /* Rows that are multiplied, and where the points of each begin in the tile, of positions start ...: */
    const size_t *list;
    size_t listed, *at, start, rows, points;
    double a, b;  /* the part of the step at hand */
    double *size; /* of each row: see pk__pieces_split; or NULL */
    int common;   /* rows without kinks: the points are common nodes of all of them, in a matrix for each */
    int borrowed; /* the pieces and lists are those of the other side */
    void *room;   /* of at */
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
    pk__path_take(arena, along->graph, PK__ALONG_ROWS, PK__ALONG_SEEN, 1, 1, pk__along_pieces(), 0,
                  &rows->path);
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
    pk__path_begin(&rows->path, graph->tied ? along->untied : along->w,
                   graph->tied ? along->untied + graph->untied : along->direction, NULL, count,
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
        pk__path_begin(&rows->path, graph->tied ? along->untied : along->w,
                       graph->tied ? along->untied + graph->untied : along->direction, NULL, 1,
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
        status = pk_allocate(along->context, count + 1, 4 * sizeof *side->first, along->name, &side->first);
    if (!status && !side->room)
        status = pk_allocate(along->context, count + 1, sizeof *side->at, along->name, &side->room);
    side->pieces.count = 0;
    side->a = a, side->b = b;
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
    if (halved)
        return status;
    side->smooth = side->first + count + 1;
    side->kinked = side->smooth + count + 1;
    side->is_kinked = side->kinked + count + 1;
    side->at = (size_t *)side->room;
    side->smooth_count = side->kinked_count = 0;
    for (size_t r = 0; r < count; r++) {
        const int smooth = side->first[r + 1] - side->first[r] == 1 &&
                           side->pieces.piece[side->first[r]].a <= a &&
                           side->pieces.piece[side->first[r]].b >= b;
        if (smooth)
            side->smooth[side->smooth_count++] = r;
        else
            side->kinked[side->kinked_count++] = r;
        side->is_kinked[r] = !smooth;
    }
    return status;
}

/* The pieces of both sides; where these are the same rows, the second has those of the first. */
static pk_status pk__along_find_both(pk__along *along, pk__along_rows *rows, pk__along_side *sides, int same,
                                     double a, double b, int halved)
{
    pk__along_side *y = &sides[1];
    pk_status status = pk__along_find(along, rows, &sides[0], a, b, halved);
    if (status || !same)
        return status ? status : pk__along_find(along, rows, y, a, b, halved);
    if (!y->room)
        status = pk_allocate(along->context, y->of->rows.rows + 1, sizeof *y->at, along->name, &y->room);
    void *const room = y->room;
    pk_real *const inputs = y->inputs;
    *y = sides[0];
    y->borrowed = 1;
    y->room = room;
    y->inputs = inputs;
    y->at = (size_t *)room;
    return status;
}

/* The most pieces that a row of a side has. */
static size_t pk__along_most(const pk__along_side *side)
{
    size_t most = 0;
    for (size_t r = 0; r < side->of->rows.rows; r++)
        most = pk__max(most, side->first[r + 1] - side->first[r]);
    return most;
}

/* How far the rule's integral of df/dt over the part of the step at hand misses the change of f of a side's rows, of the
 * largest |df/dt|; what rounding of f explains is 0. f: the outputs, or the loss where its gradients, polynomials in the outputs,
 * are integrated. As many points as there is room for go through the network together: of each row both ends, then the nodes
 * of its pieces. */
static pk_status pk__along_closure(pk__along *along, pk__along_rows *rows, const pk__along_side *side,
                                   int nodes, double *worst)
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
    const double a = side->a, b = side->b;
    pk_gauss_legendre(nodes, node, weight);
    for (size_t first = 0, some; !status && first < count; first += some) {
        some = pk__min(count - first, PK__ALONG_ROWS);
        pk__path_begin(&rows->path, graph->tied ? along->untied : along->w,
                       graph->tied ? along->untied + graph->untied : along->direction, NULL, some,
                       of->rows.data + first * of->rows.ld);
        const size_t pieces = side->first[first + some] - side->first[first], n = (size_t)nodes;
        for (size_t p = 0, together; p < 2 * some + pieces * n; p += together) {
            size_t row[PK__ALONG_SEEN];
            pk_real t[PK__ALONG_SEEN];
            double factor[PK__ALONG_SEEN];
            together = pk__min(2 * some + pieces * n - p, PK__ALONG_SEEN);
            for (size_t i = 0; i < together; i++) {
                const size_t at = p + i;
                if (at < 2 * some) { /* ends */
                    row[i] = at / 2;
                    t[i] = (pk_real)(at % 2 ? b : a);
                    factor[i] = 0;
                } else {
                    const pk__piece *piece = &side->pieces.piece[side->first[first] + (at - 2 * some) / n];
                    const size_t q = (at - 2 * some) % n;
                    row[i] = piece->row - first;
                    t[i] = (pk_real)(piece->a + (piece->b - piece->a) * node[q]);
                    factor[i] = (piece->b - piece->a) * weight[q];
                }
            }
            pk__path_forward(&rows->path, together, row, t);
            if (graph->nodes[last].varies)
                pk__path_tangent(&rows->path, 0, together, row, t);
            for (size_t i = 0; i < together; i++) {
                const size_t own = (first + row[i]) * kept;
                const pk_real *f = pk__pass_output(&rows->path.tape) + i * C,
                              *target = criterion ? of->targets + (first + row[i]) * C : NULL;
                double *const value = ((p + i) % 2 ? end : start) + own;
                const int is_end = p + i < 2 * some;
                if (!is_end && !graph->nodes[last].varies)
                    continue;
                const pk_real *tangent = is_end ? NULL : rows->path.tape.tangent[last] + i * C;
                if (criterion && !is_end)
                    pk_criterion_gradient(criterion, C, f, target, seed);
                for (size_t c = 0; c < kept; c++) {
                    if (is_end) {
                        value[c] = criterion ? pk_criterion_value(criterion, C, f, target) : (double)f[c];
                        continue;
                    }
                    double slope = criterion ? 0 : (double)tangent[c];
                    for (size_t k = 0; criterion && k < C; k++)
                        slope += (double)seed[k] * tangent[k];
                    change[own + c] += factor[i] * slope;
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

/* The listed rows `start` ... of a side with at most `most` points, at least one row. */
static pk_status pk__along_points(pk__along *along, pk__along_side *side, size_t start, int nodes, size_t most)
{
    const pk__gram_rows_of *of = side->of;
    const size_t D = of->rows.cols, C = along->graph->output_width,
                 n = side->moves && !side->common ? (size_t)nodes : 1;
    double node[PK__ALONG_ORDER + 1], weight[PK__ALONG_ORDER + 1];
    side->start = start;
    side->rows = side->points = 0;
    for (size_t i = start; i < side->listed; i++) {
        const size_t row = side->list[i], own = (side->first[row + 1] - side->first[row]) * n;
        if (side->rows && side->points + own > most)
            break;
        side->at[side->rows++] = side->points;
        side->points += own;
    }
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
    for (size_t i = 0, p = 0; i < side->rows; i++) {
        const size_t row = side->list[start + i];
        for (size_t j = side->first[row]; j < side->first[row + 1]; j++)
            for (size_t q = 0; q < n; q++, p++) {
                const pk__piece *piece = &side->pieces.piece[j];
                memcpy(block + p * D, of->rows.data + row * of->rows.ld, D * sizeof *block);
                side->t[p] = (pk_real)(piece->a + (piece->b - piece->a) * node[q]);
                if (side->labels)
                    side->labels[p] = of->labels[row];
                if (side->targets)
                    memcpy(side->targets + p * C, of->targets + row * C, C * sizeof *side->targets);
            }
    }
    along->points += side->moves ? side->points * (side->common ? (size_t)nodes : 1) : 0;
    return PK_OK;
}

static pk__gram_rows_of pk__along_rows_of(const pk__along *along, const pk__along_side *side)
{
    pk__gram_rows_of of = *side->of;
    pk_real *const block = side->inputs && side->labels
                               ? side->inputs + side->points * sizeof(int64_t) / sizeof(pk_real)
                               : side->inputs; /* nothing may be added to NULL */
    of.rows = pk_matrix_view(block, side->points, side->of->rows.cols);
    of.weights = side->common ? along->at : along->w;
    of.moves = side->common;
    of.direction = side->moves && !side->common ? along->direction : NULL;
    of.t = side->moves && !side->common ? side->t : NULL;
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

/* The weights of the last pair of pieces: many rows have the same ones, the whole step. */
typedef struct pk__along_pair {
    double ends[4], W[(PK__ALONG_ORDER + 1) * (PK__ALONG_ORDER + 1)];
    int known, meet;
} pk__along_pair;

static int pk__along_pair_weights(const pk__along_nodes *nodes, const pk__along_side *x, const pk__piece *left,
                                  const pk__along_side *y, const pk__piece *right, pk__along_pair *pair)
{
    const double ends[4] = {left->a, left->b, right->a, right->b};
    if (!pair->known || memcmp(ends, pair->ends, sizeof ends) != 0) {
        memcpy(pair->ends, ends, sizeof ends);
        pair->known = 1;
        pair->meet = pk__along_weights(nodes, left, x->moves, right, y->moves, pair->W);
    }
    return pair->meet;
}

/* Where the product of output k of row i of x with output l of row j of y stands: turned: x is the right side. */
static size_t pk__along_place(const pk__along_side *x, const pk__along_side *y, size_t kept, int turned,
                              size_t plane, size_t i, size_t k, size_t j, size_t l)
{
    const size_t rows = (turned ? y : x)->of->rows.rows * kept,
                 columns = (turned ? x : y)->of->rows.rows * kept;
    return turned ? (plane * rows + j * kept + l) * columns + i * kept + k
                  : (plane * rows + i * kept + k) * columns + j * kept + l;
}

/* to += what the points of row number i of the tile of x give with those of y, in each plane, piece by piece. */
static void pk__along_reduce(const pk__along *along, const pk__along_nodes *nodes, const pk__along_side *x,
                             const pk__along_side *y, size_t i, int turned, const pk_real *gram, double *to)
{
    const size_t kept = pk__along_kept(along, x->of), planes = pk__along_planes(along), ld = y->points * kept;
    const size_t step = y->common ? planes * x->points * kept * ld : kept; /* from a node of y to the next */
    const size_t row = x->list[x->start + i];
    const int nx = nodes->count[x->moves], ny = nodes->count[y->moves];
    pk__along_pair pair;
    pair.known = 0;
    const pk__piece whole = {.a = y->a, .b = y->b}; /* of common nodes, however rows with kinks are halved */
    for (size_t p = x->first[row]; p < x->first[row + 1]; p++)
        for (size_t j = 0; j < y->rows; j++) {
            const size_t column = y->list[y->start + j];
            const size_t end = y->common ? y->first[column] + 1 : y->first[column + 1];
            for (size_t q = y->first[column]; q < end; q++) {
                const pk__piece *other = y->common ? &whole : &y->pieces.piece[q];
                if (!pk__along_pair_weights(nodes, x, &x->pieces.piece[p], y, other, &pair))
                    continue;
                const size_t px = x->at[i] + (p - x->first[row]) * (size_t)nx,
                             py = y->common ? y->at[j] : y->at[j] + (q - y->first[column]) * (size_t)ny;
                for (size_t plane = 0; plane < planes; plane++)
                    for (size_t k = 0; k < kept; k++)
                        for (size_t l = 0; l < kept; l++) {
                            const pk_real *from =
                                gram + ((plane * x->points + px) * kept + k) * ld + py * kept + l;
                            double sum = 0;
                            for (int u = 0; u < nx; u++)
                                for (int v = 0; v < ny; v++)
                                    sum += pair.W[u * ny + v] * from[(size_t)u * kept * ld + (size_t)v * step];
                            to[pk__along_place(x, y, kept, turned, plane, row, k, column, l)] += sum;
                        }
            }
        }
}

/* to += the integral with n nodes a piece of the listed rows. */
static pk_status pk__along_meet(pk__along *along, pk__along_side *x, pk__along_side *y, int turned, int nodes,
                                double *to)
{
    const size_t kept = pk__along_kept(along, x->of), planes = pk__along_planes(along);
    pk_status status = PK_OK;
    pk__along_nodes rule = {.count = {1, nodes}};
    for (int moves = 0; moves < 2; moves++)
        pk_gauss_legendre(rule.count[moves], rule.node[moves], rule.weight[moves]);
    const size_t common = y->common ? (size_t)nodes : 1, P = along->graph->parameters;
    const double *ones = along->weights;
    for (size_t q = 0; q < common; q++) {
        along->weights[q] = 1;
        for (size_t p = 0; p < (y->common ? P : 0); p++)
            along->at[q * P + p] = (pk_real)(along->w[p] + (y->a + (y->b - y->a) * rule.node[1][q]) *
                                                               ((double)along->next[p] - along->w[p]));
    }
    for (size_t i = 0; !status && i < x->listed; i += x->rows) {
        status = pk__along_points(along, x, i, nodes, PK__ALONG_POINTS);
        const size_t left = x->points * kept * kept * planes * common;
        for (size_t j = 0; !status && j < y->listed; j += y->rows) {
            pk_real *gram = NULL;
            status = pk__along_points(along, y, j, nodes, pk__max(1, PK__ALONG_TILE / pk__max(left, 1)));
            if (!status)
                status = pk_allocate(along->context, left, y->points * sizeof *gram, along->name, &gram);
            const pk__gram_rows_of sides[2] = {pk__along_rows_of(along, x), pk__along_rows_of(along, y)};
            if (!status)
                status = pk__along_gram(along, &sides[0], &sides[1], common, ones, y->common, gram);
            for (size_t r = 0; !status && r < x->rows; r++)
                pk__along_reduce(along, &rule, x, y, r, turned, gram, to);
            pk_release(along->context, gram);
        }
    }
    return status;
}

/* to = the integral with n nodes a piece of all pairs of which one has kinks; sides of which the rows are the same: of the rows
 * with kinks alone, with all. few: each row with kinks with a few others. */
static pk_status pk__along_meet_all(pk__along *along, pk__along_side *sides, int same, int nodes,
                                    const struct pk__along_smooth *few, size_t numbers, double *to)
{
    pk__along_side *x = &sides[0], *y = &sides[1];
    size_t some[PK__ALONG_FEW];
    pk_status status = PK_OK;
    memset(to, 0, numbers * sizeof *to);
    for (int part = 0; part < (same ? 2 : 3) && !status; part++) {
        const int turned = part == 2;
        pk__along_side *left = turned ? y : x, *right = turned ? x : y;
        left->common = 0;
        left->list = left->kinked, left->listed = left->kinked_count;
        right->list = part ? right->smooth : right->kinked;
        right->listed = part ? right->smooth_count : right->kinked_count;
        right->common = part && right->moves && (size_t)nodes <= along->together;
        if (few && right->listed) {
            right->listed = pk__along_spread(right->of, right->listed, right->list, few, !turned, same, some);
            right->list = some;
        }
        if (left->listed && right->listed)
            status = pk__along_meet(along, left, right, turned, nodes, to);
    }
    return status;
}

static void pk__along_side_release(const pk__along *along, pk__along_side *side)
{
    pk_release(along->context, side->inputs);
    pk_release(along->context, side->room);
    if (side->borrowed)
        return;
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
        pk__path_begin(&rows->path, graph->tied ? along->untied : along->w,
                       graph->tied ? along->untied + graph->untied : along->direction, NULL, count,
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

/* result += the integrals of the pairs of rows without kinks. */
static pk_status pk__along_unkinked(pk__along *along, pk__along_side *sides, int same, const int moves[2],
                                    int nodes, int depth, struct pk__along_smooth *state, double *result)
{
    const double a = sides[0].a, b = sides[0].b;
    const size_t kept = pk__along_kept(along, sides[0].of), planes = pk__along_planes(along),
                 C = along->graph->output_width, D = along->graph->input_width;
    struct pk__along_few some[2];
    pk_status status = PK_OK;
    memset(some, 0, sizeof some);
    for (int s = 0; s < (same ? 1 : 2) && !status; s++) {
        const pk__along_side *side = &sides[s];
        status =
            pk_allocate(along->context, side->smooth_count, D * sizeof(pk_real), along->name, &some[s].rows);
        if (!status && side->of->targets)
            status = pk_allocate(along->context, side->smooth_count, C * sizeof(pk_real), along->name,
                                 &some[s].targets);
        if (!status && side->of->labels)
            status =
                pk_allocate(along->context, side->smooth_count, sizeof(int64_t), along->name, &some[s].labels);
        if (!status)
            pk__along_gather(side->of, C, side->smooth_count, side->smooth, &some[s]);
    }
    const pk__gram_rows_of *left = &some[0].of, *right = same ? NULL : &some[1].of;
    const pk__along_side *x = &sides[0], *y = &sides[same ? 0 : 1];
    const size_t rows = x->smooth_count * kept, columns = y->smooth_count * kept;
    memset(along->some, 0, planes * rows * columns * sizeof *along->some);
    for (int s = 0; s < 2; s++) { /* the worst rows, by their numbers among these */
        const pk__along_side *side = s ? y : x;
        size_t at = 0;
        while (at < side->smooth_count && side->smooth[at] < state->worst[s])
            at++;
        state->worst[s] = at;
    }
    if (!status && rows && columns)
        status = nodes ? pk__along_gauss(along, left, right, moves, a, b, nodes, along->some)
                       : pk__along_piece(along, left, right, moves, a, b, depth, state, planes * rows * columns,
                                         along->some);
    for (int s = 0; s < 2; s++) {
        const pk__along_side *side = s ? y : x;
        state->worst[s] = state->worst[s] < side->smooth_count ? side->smooth[state->worst[s]] : 0;
    }
    for (size_t p = 0; !status && p < planes; p++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++) {
                const double value = along->some[(p * rows + i) * columns + j];
                result[pk__along_place(x, y, kept, 0, p, x->smooth[i / kept], i % kept, y->smooth[j / kept],
                                       j % kept)] += value;
                along->scale = fmax(along->scale, fabs(value));
            }
    for (int s = 0; s < 2; s++) {
        pk_release(along->context, some[s].rows);
        pk_release(along->context, some[s].targets);
        pk_release(along->context, some[s].labels);
    }
    return status;
}

/* Adds the integrals of the pairs of which one has kinks, in along->fine, to result, and returns the largest. Where the sides are the same rows, those of
 * rows with kinks are there alone: the others are their mirror images, and of two that were computed one is the other's. */
static double pk__along_put(pk__along *along, const pk__along_side *sides, int same, double *result)
{
    double largest = 0;
    const size_t kept = pk__along_kept(along, sides[0].of), planes = pk__along_planes(along);
    const pk__along_side *x = &sides[0], *y = &sides[1];
    for (int turned = 0; turned < (same ? 1 : 2); turned++) {
        const pk__along_side *left = turned ? y : x, *right = turned ? x : y;
        const size_t columns = turned ? right->smooth_count : right->of->rows.rows;
        for (size_t p = 0; p < planes; p++)
            for (size_t i = 0; i < left->kinked_count * kept; i++)
                for (size_t j = 0; j < columns * kept; j++) {
                    const size_t row = left->kinked[i / kept], k = i % kept,
                                 column = turned ? right->smooth[j / kept] : j / kept, l = j % kept;
                    const size_t at = pk__along_place(left, right, kept, turned, p, row, k, column, l);
                    const size_t mirrored = pk__along_place(left, right, kept, 0, p, column, l, row, k);
                    const int other = same && sides[0].is_kinked[column];
                    largest = fmax(largest, fabs(along->fine[at]));
                    if (other && row * kept + k > column * kept + l)
                        continue;
                    result[at] += along->fine[at];
                    if (same && mirrored != at)
                        result[mirrored] += along->fine[at];
                }
    }
    along->scale = fmax(along->scale, largest);
    return largest;
}

/* along->fine = the integrals of the pairs of which one has kinks, with so many nodes, or with enough. */
static pk_status pk__along_pairs(pk__along *along, pk__along_rows *rows, pk__along_side *sides, int same,
                                 int nodes, struct pk__along_smooth *state, size_t numbers, int *used)
{
    const pk_graph *graph = along->graph;
    const size_t kept = pk__along_kept(along, sides[0].of), x = sides[0].of->rows.rows,
                 y = sides[1].of->rows.rows;
    pk_status status = PK_OK;
    double apart = 0, allowed = 0;
    *used = nodes;
    if (nodes)
        return pk__along_meet_all(along, sides, same, nodes, NULL, numbers, along->fine);
    const int refined = rows->far ? 1 : PK__ALONG_REFINED; /* of pieces that are short enough already */
    nodes = rows->far ? PK__PIECE_NODES : state->nodes ? state->nodes : 3;
    if (!rows->far &&
        pk__along_can_spot(state, x,
                           y)) { /* each row with kinks and a few others tell how many nodes all need */
        const size_t points = along->points;
        int found = 0;
        status = pk__along_meet_all(along, sides, same, nodes, state, numbers, along->coarse);
        for (int tried = 0; !status && !found && tried < 4 && nodes < PK__ALONG_ORDER; tried++, nodes++) {
            status = pk__along_meet_all(along, sides, same, nodes + 1, state, numbers, along->fine);
            apart = PK__ALONG_SPARE * pk__along_apart(along, numbers, x, y, kept);
            allowed = pk__along_allowed(along);
            found = apart <= allowed ? nodes : 0;
            pk__along_swap(along);
        }
        along->points = points;
        if (!status && found) {
            status = pk__along_meet_all(along, sides, same, found, NULL, numbers, along->fine);
            along->error += apart;
            state->nodes = pk__along_next(found, apart, allowed);
            state->since++;
            *used = found;
            return status;
        }
        nodes = state->nodes;
    }
    state->since = 0;
    for (int halved = 0; !status && halved <= refined; halved++, nodes = 4) {
        double before = INFINITY;
        if (halved)
            status = pk__along_find_both(along, rows, sides, same, sides[0].a, sides[0].b, halved);
        if (!status)
            status = pk__along_meet_all(along, sides, same, nodes, NULL, numbers, along->coarse);
        for (int tried = 0; !status; nodes++, tried++) {
            status = pk__along_meet_all(along, sides, same, nodes + 1, NULL, numbers, along->fine);
            apart = pk__along_apart(along, numbers, x, y, kept);
            memcpy(state->worst, along->worst, sizeof state->worst);
            allowed = pk__along_allowed(along);
            const int last = halved == refined || graph->surrogate;
            if (!status && (apart <= allowed || (last && nodes + 1 >= PK__ALONG_ORDER))) {
                along->error += apart;
                along->refused += apart > allowed;
                state->nodes = pk__along_next(nodes, apart, allowed);
                *used = nodes;
                return PK_OK;
            }
            if (nodes + 1 >= PK__ALONG_ORDER || (!last && tried >= 4 && apart > before / 2))
                break;
            before = apart;
            pk__along_swap(along);
        }
    }
    return status;
}

/* result += the integral over [a, b], where rows have pieces of their own. */
static pk_status pk__along_window(pk__along *along, pk__along_rows *rows, pk__along_side sides[2], int same,
                                  double a, double b, int depth, pk__along_order *order, size_t numbers,
                                  double *result)
{
    const pk_graph *graph = along->graph;
    const int moves[2] = {sides[0].moves, sides[1].moves}, both = moves[0] && moves[1];
    int degree = -1, exact = graph->degree <= PK__PATH_DEGREE && !rows->path.interpolates;
    for (int s = 0; s < 2; s++) {
        const int own = moves[s] ? pk__along_degree(along, sides[s].of) : 0;
        exact &= own >= 0;
        degree = own > degree ? own : degree;
    }
    int nodes = both ? degree + 1 : degree / 2 + 1;
    if (!exact || nodes > PK__ALONG_ORDER)
        nodes = 0;
    int used = nodes;
    double missed = 0, largest = 0;
    pk_status status = pk__along_find_both(along, rows, sides, same, a, b, 0);
    /* All pieces of one row are multiplied with all of another: where there are many, those that are near. */
    if (!status && rows->far && depth < PK__ALONG_DEPTH && along->halvings < PK__ALONG_HALVINGS &&
        pk__max(pk__along_most(&sides[0]), pk__along_most(&sides[1])) > PK__ALONG_WINDOW) {
        const double middle = 0.5 * (a + b);
        along->halvings++;
        status = pk__along_window(along, rows, sides, same, a, middle, depth + 1, order, numbers, result);
        return status
                   ? status
                   : pk__along_window(along, rows, sides, same, middle, b, depth + 1, order, numbers, result);
    }
    if (!status)
        status = pk__along_unkinked(along, sides, same, moves, nodes, depth, &order->smooth, result);
    if (!status && (sides[0].kinked_count || sides[1].kinked_count)) {
        status = pk__along_pairs(along, rows, sides, same, nodes, &order->kinked, numbers, &used);
        if (!status)
            largest = pk__along_put(along, sides, same, result);
    }
    /* With a few nodes more than the integrals had, and where these are too few for df/dt of a row without kinks, with many. */
    for (int s = 0; s < (same ? 1 : 2) && !graph->surrogate; s++)
        for (int n = pk__min(pk__max(used, 2) + 1, PK__ALONG_ORDER); moves[s] && !status && n;) {
            double own = 0;
            status = pk__along_closure(along, rows, &sides[s], n, &own);
            const int again = own * along->scale > pk__along_allowed(along) && n < PK__ALONG_ORDER;
            missed = again ? missed : fmax(missed, own);
            n = again ? PK__ALONG_ORDER : 0;
        }
    if (status)
        return status;
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
                                  const int moves[2], pk__along_order *order, size_t numbers, double *result,
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
    for (int s = 0; s < 2; s++)
        pk__along_side_release(along, &sides[s]);
    pk_release(along->context, rows.memory);
    return status;
}

/* ---- all rules ----------------------------------------------------------------------------------------- */

PK__INTERNAL pk_status pk__along_integrate(pk__along *along, const pk__gram_rows_of *left,
                                           const pk__gram_rows_of *right, const int moves[2],
                                           pk__along_order *order, double *result)
{
    const size_t numbers = pk__along_numbers(along, left, right);
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
                   ? pk__along_gauss(along, left, right, moves, 0, 1, degree / 2 + 1, result)
                   : pk__along_piece(along, left, right, moves, 0, 1, 0, &order->smooth, numbers, result);
    }
    if (rule == PK_RULE_GAUSS)
        return pk__along_gauss(along, left, right, moves, 0, 1, nodes, result);
    const int moving = moves[0] || moves[1], ends = rule == PK_RULE_TRAPEZOID, all = moving ? nodes : 1;
    double *part = along->coarse;
    for (int first = 0, count; first < all && !status; first += count) {
        count = pk__min(all - first, PK__ALONG_NODES);
        for (int i = 0; i < count; i++) {
            const int q = first + i;
            along->nodes[i] = ends ? q / (double)(nodes - 1) : (q + (rule == PK_RULE_MIDPOINT ? 0.5 : 0)) / all;
            along->weights[i] = ends ? (q == 0 || q == nodes - 1 ? 0.5 : 1) / (nodes - 1) : 1.0 / all;
        }
        status = pk__along_sum(along, left, right, moves, (size_t)count, along->nodes, along->weights, part);
        for (size_t i = 0; !status && i < numbers; i++)
            result[i] += part[i];
    }
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
