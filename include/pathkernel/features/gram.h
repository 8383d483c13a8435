/* pathkernel/features/gram.h: every pair product of the gradients of two sets of rows, as a Gram matrix.
 *
 *     G[i,k,j,l] = < sum_c s_ikc grad f_c(w, x_i), sum_c s'_jlc grad f_c(w', y_j) >
 *
 * The seeds s choose what is differentiated: each output (as many gradients a row as there are outputs), their sum, one of
 * them, the output of a row's label, or the loss of a row.
 *
 * No Jacobian is formed for dense layers. The gradient for a dense layer's weight and bias is an outer product of the
 * layer's cotangent d and (a, 1), so that the layer's term of G is
 *     (d_ik . d_jl) (a_i . a_j + 1):
 * the Gram matrix of the inputs a is computed once for all outputs. Where the cotangent is the same for all rows, as that
 * of the last layer, d_k . d_l is computed once. A layer used at Q places has a sum of Q outer products: pairs of places
 * are taken one by one, or, where that costs fewer flops, the layer's gradients are formed; those of normalizations and
 * embeddings are. Where layers share tensors, the gradients of the parameters themselves are formed, since the uses of
 * a tensor meet each other in the product.
 *
 * With unit seeds and the sum over equal outputs, the layer below the last one, d_k = slope o W^T seed_k, is
 *     (a_i . a_j + 1) sum_h slope_ih slope_jh sum_k (W^T seed_k)_h^2,
 * in which outputs cost nothing. A request may be a sum over nodes, weights at which rows are taken: what does not depend on the
 * node is multiplied once, and where one factor alone does, the sum over nodes is part of its product. What a form costs
 * tells cost.h.
 *
 * Rows go through the network in blocks, and their factors are kept: all rows' where the memory limit allows it (without
 * a limit, up to a GiB), else the blocks of one side are computed again for each large block of the other. Blocks and
 * tiles are cut by shapes alone: the same bits for any number of threads and any memory limit. The bits of an entry
 * depend on how many rows are beside it.
 */
#ifndef PATHKERNEL_GRAM_H
#define PATHKERNEL_GRAM_H
#include "factors.h"
#include "../training/derivatives.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_GRAM_INTERNALS_KNOWN)
#define PATHKERNEL_GRAM_INTERNALS_KNOWN
/* >>> internals */
typedef enum pk__seeds {
    PK__SEEDS_UNITS, /* each output: C gradients a row */
    PK__SEEDS_SUM,   /* the sum of the outputs */
    PK__SEEDS_ONE,   /* one output */
    PK__SEEDS_LABEL, /* the output of the row's label */
    PK__SEEDS_LOSS   /* the row's loss */
} pk__seeds;

/* Rows, where in the space of weights their gradients are taken, and of what. */
typedef struct pk__gram_rows_of {
    pk_matrix rows;
    const pk_real *weights;   /* P, at each node where `moves`; or: */
    int moves;                /* each node of the request has weights of its own, one behind the other */
    const pk_real *direction; /* P: row r is at weights + t[r] direction; NULL: all at the weights */
    const pk_real *t;
    pk__seeds seeds;
    size_t output;          /* PK__SEEDS_ONE */
    const int64_t *labels;  /* PK__SEEDS_LABEL: one a row */
    const pk_real *targets; /* PK__SEEDS_LOSS: C a row, as pk_criterion_targets gives them */
} pk__gram_rows_of;

typedef struct pk__gram_request {
    const char *name; /* for messages */
    const pk_graph *graph;
    const pk_criterion *criterion; /* PK__SEEDS_LOSS */
    int summed;                    /* PK__SEEDS_UNITS: 1: the sum over equal outputs; 0: all outputs with all */
    int by_layer; /* result holds a matrix for each of graph->columns layers, one behind the other */
    size_t nodes; /* the result is a sum over so many nodes, with weights node_weight; 0: one, with weight 1 */
    const double *node_weight;
    int apart;        /* result holds the matrices of the nodes, one behind the other, instead of their sum */
    pk_matrix result; /* rows x columns, each times C where all outputs are there */
} pk__gram_request;

/* right == NULL: left with itself, half the work, symmetric bit for bit. Both sides have as many gradients a row. Statuses
 * as pk_kernel_ntk. */
PK__INTERNAL pk_status pk__gram_compute(pk_context *context, const pk__gram_request *request,
                                        const pk__gram_rows_of *left, const pk__gram_rows_of *right);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_GRAM_IMPLEMENTED)
#define PATHKERNEL_GRAM_IMPLEMENTED
/* >>> implementation */
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
PK__BEGIN_CODE

/* How a layer's part is had. */
typedef enum pk__gram_form {
    PK__GRAM_OUTER,    /* (a . a' + 1) (d . d') */
    PK__GRAM_CONSTANT, /* the same, d . d' the same for all rows */
    PK__GRAM_SLOPES,   /* the same, summed over outputs whose d_k differ by factors that all rows share */
    PK__GRAM_PLACES,   /* a sum of that over pairs of places */
    PK__GRAM_ROWS      /* the gradients' products */
} pk__gram_form;

typedef struct pk__gram_layer {
    const pk_node *node; /* NULL: with ties, the parameters of a column */
    size_t offset;       /* then: where they stand in w */
    int column;
    pk__gram_form form;
    pk_real bias;             /* 1 or 0 */
    int data;                 /* its inputs are the network's, and not kept */
    size_t left, right;       /* numbers kept of a row: inputs; cotangents or gradients, of all outputs */
    size_t left_at, right_at; /* of the numbers kept of a row, how many are in front of these */
    size_t depth;             /* terms of a product of two cotangents or gradients */
    const pk_node *last;      /* SLOPES: the last layer */
    pk_real *seen[2]; /* SLOPES: of each side, nodes x terms x outputs x width: W^T seed_k; then D^T seed_k */
    pk_real *factor;  /* SLOPES: nodes x terms x terms x width: sum_k of products of these */
    size_t places, examples; /* PLACES: how many places of one row with how many other rows at one time */
    pk_real *constant;       /* CONSTANT: kept x kept */
} pk__gram_layer;

/* Rows with their factors: layer after layer, each capacity x left, then capacity x right. */
typedef struct pk__gram_side {
    const pk__gram_rows_of *of;
    pk_matrix inputs;
    const pk_real *weights, *direction; /* in the untied layout; weights: of all nodes */
    int leads;                          /* the first of the two */
    size_t nodes, node;                 /* with weights of their own; the one whose factors are computed */
    size_t first, rows, capacity;
    size_t numbers;   /* of a row, at one node */
    pk_real *factors; /* node by node */
} pk__gram_side;

typedef struct pk__gram {
    const char *name; /* for messages */
    pk_context *context;
    const pk_graph *graph;
    const pk_criterion *criterion;
    int two_points;       /* the sides' gradients are taken at different weights */
    int uniform;          /* all rows have the same seeds */
    size_t outputs, kept; /* cotangents of a row; of these, how many the result has: all or 1 */
    size_t nodes;
    const double *node_weight;
    int apart;
    size_t terms; /* SLOPES: of V = W + t D, 2 where rows have a t of their own, else 1 */
    int slopes;   /* sums over outputs of rows with unit seeds */
    int lean;     /* no row needs a pass back */
    int by_layer;
    size_t plane;           /* by_layer: numbers of a layer's matrix */
    size_t layers, numbers; /* numbers kept of a row */
    pk__gram_layer *layer;
    size_t tile, sweep; /* rows of a tile, and of one pass through the network: powers of two */
    size_t part;        /* rows of one pass back */
    size_t unit;        /* the larger of tile and sweep: where sides are cut */
    int together;       /* the rows of both sides go through the network as one */
    size_t left, right; /* numbers of a lane's products */
    size_t scaled;      /* numbers of a row that are scaled for them, or slopes */
    int symmetric;
    pk_matrix result;
    int threads;
    size_t lane_bytes;
    unsigned char *lanes;
    size_t *bad;      /* of each lane: the first pair of rows that is not finite */
    double done, all; /* pairs of rows */
} pk__gram;

/* Rows at ... of a side. */
typedef struct pk__gram_rows {
    const pk__gram_side *side;
    size_t at, rows;
} pk__gram_rows;

/* One thread's memory. */
typedef struct pk__gram_lane {
    pk__tape forward, back;
    pk_real *inputs;
    pk_real *left, *right, *tile, *untied, *scaled;
    pk_real *gradients; /* with ties: of a row, in the untied layout */
    pk_real *ones;      /* of a part: the cotangents that give slopes */
} pk__gram_lane;

/* The tape of a pass back stands first: the threads that share the operations of a pass forward take nothing else. */
static void pk__gram_back_take(pk__arena *arena, const pk__gram *gram, pk__tape *back)
{
    pk__pass_take(arena, gram->graph, gram->part, gram->outputs, 0, back);
}

/* With ties: room for the gradients of a row, and for one of them. */
static pk_real *pk__gram_gradients_take(pk__arena *arena, const pk__gram *gram)
{
    size_t numbers = 0;
    if (!gram->graph->tied)
        return NULL;
    if (!pk__multiply(gram->outputs + 1, gram->graph->untied, &numbers))
        arena->overflow = 1;
    return pk__arena_take(arena, numbers, sizeof(pk_real));
}

static pk_real *pk__gram_ones_take(pk__arena *arena, const pk__gram *gram)
{
    return pk__arena_take(arena, gram->part, gram->scaled * sizeof(pk_real));
}

static void pk__gram_lane_take(pk__arena *arena, const pk__gram *gram, pk__gram_lane *lane)
{
    const size_t width = gram->tile * gram->kept;
    pk__gram_back_take(arena, gram, &lane->back);
    lane->gradients = pk__gram_gradients_take(arena, gram);
    lane->ones = pk__gram_ones_take(arena, gram);
    pk__pass_take(arena, gram->graph, gram->sweep, 0, 0, &lane->forward);
    lane->inputs = pk__arena_take(arena, gram->sweep, gram->graph->input_width * sizeof(pk_real));
    lane->left = pk__arena_take(arena, gram->left, sizeof(pk_real));
    lane->right = pk__arena_take(arena, gram->right, sizeof(pk_real));
    lane->tile = pk__arena_take(arena, width, width * sizeof(pk_real));
    lane->untied = pk__arena_take(arena, width, sizeof(pk_real));
    lane->scaled = pk__arena_take(arena, gram->tile, gram->scaled * sizeof(pk_real));
}

static pk__arena pk__gram_arena(const pk__gram *gram, int lane)
{
    const pk__arena arena = {gram->lanes + (size_t)lane * gram->lane_bytes, gram->lane_bytes, 0, 0};
    return arena;
}

static pk__gram_lane pk__gram_lane_of(const pk__gram *gram, int number)
{
    pk__arena arena = pk__gram_arena(gram, number);
    pk__gram_lane lane;
    pk__gram_lane_take(&arena, gram, &lane);
    return lane;
}

/* Number `at` of the factors of a layer at a node; NULL where no layer has any: nothing may be added to NULL. */
static pk_real *pk__gram_factors(const pk__gram_side *side, size_t node, size_t layer_at, size_t at)
{
    const size_t own = side->nodes > 1 ? node : 0;
    return side->factors ? side->factors + side->capacity * (own * side->numbers + layer_at) + at : NULL;
}

/* Where a layer's factors of a row at a node are; inputs that are data are where the caller has them. */
static pk_real *pk__gram_left(const pk__gram_side *side, const pk__gram_layer *layer, size_t node, size_t row)
{
    return layer->data ? side->inputs.data + (side->first + row) * side->inputs.ld
                       : pk__gram_factors(side, node, layer->left_at, row * layer->left);
}

static pk_real *pk__gram_right(const pk__gram_side *side, const pk__gram_layer *layer, size_t node, size_t row)
{
    return pk__gram_factors(side, node, layer->right_at, row * layer->right);
}

/* The weights of a side at the node whose factors are computed, in the untied layout. */
static const pk_real *pk__gram_weights(const pk__gram_side *side, const pk_graph *graph)
{
    return side->weights + side->node * (graph->tied ? graph->untied : graph->parameters);
}

/* ---- factors ------------------------------------------------------------------------------------------- */

/* gradient (rows x outputs x weight_count) of a node after the pass back of `rows` rows from row number `first` on. */
static void pk__gram_node_gradients(const pk__gram *gram, const pk__tape *tape, const pk__line *line,
                                    const pk_node *node, size_t first, size_t rows, pk_real *gradient)
{
    const size_t outputs = gram->outputs;
    pk_call call;
    pk__pass_call(tape, node, rows, outputs, &call);
    for (int j = 0; j < node->input_count; j++)
        call.in[j] += first * call.in_width[j];
    call.out += first * node->width;
    call.out_cotangent = tape->cotangent[node - gram->graph->nodes] + first * outputs * node->width;
    call.gradient = gradient;
    call.weights = line->weights + node->weight_offset;
    if (!line->direction || !pk__has_row_weights(node)) {
        pk__node_row_gradients(&call);
        return;
    }
    call.rows = 1;
    for (size_t r = 0; r < rows; r++) {
        call.weights = pk__row_weights(tape, line, node, first + r);
        pk__node_row_gradients(&call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += call.in_width[j];
        call.out += node->width;
        call.out_cotangent += outputs * node->width;
        call.gradient += outputs * node->weight_count;
    }
}

/* With ties: the gradients of the parameters, row by row. gradients: node by node outputs x weights, then one of w. */
static void pk__gram_keep_tied(const pk__gram *gram, const pk__tape *tape, const pk__line *line,
                               const pk__gram_side *side, size_t at, size_t rows, pk_real *gradients)
{
    const pk_graph *graph = gram->graph;
    const size_t outputs = gram->outputs, untied = graph->untied;
    for (size_t r = 0; r < rows; r++) {
        for (size_t n = 1; n < graph->node_count; n++) {
            const pk_node *node = &graph->nodes[n];
            if (!node->weight_count)
                continue;
            pk__gram_node_gradients(gram, tape, line, node, r, 1, gradients + outputs * node->weight_offset);
        }
        for (size_t k = 0; k < outputs; k++) {
            pk_real *flat = gradients + outputs * untied;
            for (size_t n = 1; n < graph->node_count; n++) {
                const pk_node *node = &graph->nodes[n];
                if (node->weight_count)
                    memcpy(flat + node->weight_offset,
                           gradients + outputs * node->weight_offset + k * node->weight_count,
                           node->weight_count * sizeof *flat);
            }
            pk_graph_gather(graph, flat, flat);
            for (size_t l = 0; l < gram->layers; l++) {
                const pk__gram_layer *layer = &gram->layer[l];
                const size_t count = layer->right / outputs;
                memcpy(pk__gram_right(side, layer, side->node, at + r) + k * count, flat + layer->offset,
                       count * sizeof *flat);
            }
        }
    }
}

/* W^T seed_k and D^T seed_k of the last layer behind a layer, from the pass back of a row. */
static void pk__gram_see(const pk__gram *gram, const pk__tape *tape, const pk__gram_side *side,
                         const pk__gram_layer *layer)
{
    const pk_node *last = layer->last;
    const size_t C = gram->outputs, out = last->fan_out, in = last->fan_in;
    const pk_real *seeds = tape->cotangent[last - gram->graph->nodes],
                  *weights = pk__gram_weights(side, gram->graph) + last->weight_offset;
    pk_real *seen = layer->seen[!side->leads] + side->node * gram->terms * C * in;
    pk__gemm(0, 0, C, in, out, 1, seeds, out, weights, in, 0, seen, in);
    if (side->direction)
        pk__gemm(0, 0, C, in, out, 1, seeds, out, side->direction + last->weight_offset, in, 0, seen + C * in,
                 in);
    else if (gram->terms > 1)
        memset(seen + C * in, 0, C * in * sizeof *seen);
}

/* The slopes of the operation between a layer and the last one, and t times these. */
static void pk__gram_slopes(const pk__gram *gram, const pk__tape *tape, const pk__line *line,
                            const pk__gram_layer *layer, size_t rows, pk_real *ones, pk_real *to)
{
    const pk_node *between = pk__only_reader(gram->graph, layer->node);
    const size_t width = between->width;
    pk_call call;
    for (size_t i = 0; i < rows * width; i++)
        ones[i] = 1;
    pk__pass_call(tape, between, rows, 1, &call);
    call.out_cotangent = ones;
    call.in_cotangent[0] = gram->terms > 1 ? ones : to;
    between->operation->reverse(&call);
    for (size_t r = 0; r < rows && gram->terms > 1; r++)
        for (size_t j = 0; j < width; j++) {
            to[r * 2 * width + j] = ones[r * width + j];
            to[r * 2 * width + width + j] = line->direction ? line->t[r] * ones[r * width + j] : 0;
        }
}

/* What else is kept of the rows of a tape after their pass back, which are rows at ... of the side. */
static void pk__gram_keep(const pk__gram *gram, const pk__tape *tape, const pk__line *line,
                          const pk__gram_side *side, size_t at, size_t rows, pk_real *ones)
{
    const size_t outputs = gram->outputs;
    for (size_t l = 0; l < gram->layers; l++) {
        const pk__gram_layer *layer = &gram->layer[l];
        const pk_node *node = layer->node;
        const pk_real *cotangent = tape->cotangent[node - gram->graph->nodes];
        pk_real *left = pk__gram_left(side, layer, side->node, at),
                *right = pk__gram_right(side, layer, side->node, at);
        if (layer->form == PK__GRAM_ROWS) {
            pk__gram_node_gradients(gram, tape, line, node, 0, rows, right);
        } else if (layer->form == PK__GRAM_PLACES) {
            for (size_t r = 0; r < rows; r++)
                pk__node_places(tape, node, r, outputs, left + r * layer->left, right + r * layer->right);
        } else {
            if (!layer->data)
                memcpy(left, tape->value[node->inputs[0]], rows * layer->left * sizeof *left);
            if (layer->form == PK__GRAM_CONSTANT && side->leads && side->first + at == 0)
                /* any row's will do; one thread has this one */
                pk__gemm(0, 1, gram->kept, gram->kept, layer->depth, 1, cotangent, layer->depth, cotangent,
                         layer->depth, 0, layer->constant, gram->kept);
            if (layer->form == PK__GRAM_SLOPES) {
                if (side->first + at == 0)
                    pk__gram_see(gram, tape, side, layer);
                pk__gram_slopes(gram, tape, line, layer, rows, ones, right);
            }
        }
    }
}

/* The seeds of rows `at` ... of a side, whose outputs are in the tape. */
static void pk__gram_seed(const pk__gram *gram, pk__tape *tape, const pk__gram_side *side, size_t at,
                          size_t rows)
{
    const size_t C = gram->graph->output_width;
    const pk__gram_rows_of *of = side->of;
    pk_real *seed = pk__pass_seed(tape);
    if (of->seeds == PK__SEEDS_UNITS) {
        pk__pass_seed_units(tape, rows);
        return;
    }
    for (size_t r = 0; r < rows; r++, seed += C) {
        const size_t row = side->first + at + r;
        for (size_t c = 0; c < C; c++)
            seed[c] = of->seeds == PK__SEEDS_SUM || (of->seeds == PK__SEEDS_ONE && c == of->output) ||
                      (of->seeds == PK__SEEDS_LABEL && c == (size_t)of->labels[row]);
        if (of->seeds == PK__SEEDS_LOSS)
            pk_criterion_gradient(gram->criterion, C, pk__pass_output(tape) + r * C, of->targets + row * C,
                                  seed);
    }
}

/* The pass back of part number `part` of the rows of one or two sides, whose values stand one behind the other in a tape.
 * Cotangents that are kept are written where they are kept. */
static void pk__gram_back(const pk__gram *gram, const pk__tape *values, const pk__gram_rows *sides, size_t part,
                          int lane)
{
    const size_t first = pk__blocks(sides[0].rows, gram->part);
    const pk__gram_rows *from = &sides[part >= first];
    const size_t skipped = (part < first ? part : part - first) * gram->part;
    const size_t row = skipped + (part < first ? 0 : sides[0].rows), at = from->at + skipped,
                 rows = pk__min(gram->part, from->rows - skipped);
    const pk_graph *graph = gram->graph;
    const pk__line line = {pk__gram_weights(from->side, graph), from->side->direction,
                           from->side->direction ? from->side->of->t + from->side->first + at : NULL};
    pk__arena arena = pk__gram_arena(gram, lane);
    pk__tape back, *tape = &back;
    pk__gram_back_take(&arena, gram, tape);
    pk_real *gradients = pk__gram_gradients_take(&arena, gram), *ones = pk__gram_ones_take(&arena, gram);
    const size_t back_rows = !gram->lean ? rows : from->side->first + at == 0;
    for (size_t n = 0; n < graph->node_count; n++)
        tape->value[n] = values->value[n] + row * graph->nodes[n].width;
    for (size_t l = 0; l < gram->layers; l++)
        if (gram->layer[l].form == PK__GRAM_OUTER)
            tape->cotangent[gram->layer[l].node - graph->nodes] =
                pk__gram_right(from->side, &gram->layer[l], from->side->node, at);
    if (back_rows) {
        pk__gram_seed(gram, tape, from->side, at, back_rows);
        pk__pass_reverse(tape, &line, back_rows, gram->outputs);
    }
    if (gradients)
        pk__gram_keep_tied(gram, tape, &line, from->side, at, rows, gradients);
    else
        pk__gram_keep(gram, tape, &line, from->side, at, rows, ones);
}

/* Pass number `pass` of a side's rows, at most gram->sweep, or of both sides', through the network: with several threads for
 * each operation, or one. lane: of the calling thread. */
static void pk__gram_pass(const pk__gram *gram, const pk__gram_side *side, const pk__gram_side *other,
                          size_t pass, int threads, int lane)
{
    const size_t width = gram->graph->input_width, own = pk__blocks(side->rows, gram->sweep);
    const pk__gram_side *to = pass < own ? side : other;
    const size_t at = (pass < own ? pass : pass - own) * gram->sweep;
    const pk__gram_rows sides[2] = {{to, at, pk__min(gram->sweep, to->rows - at)},
                                    {other, 0, gram->together && other ? other->rows : 0}};
    const pk__line line = {pk__gram_weights(to, gram->graph), to->direction,
                           to->direction ? to->of->t + to->first + at : NULL};
    pk__gram_lane room = pk__gram_lane_of(gram, lane);
    const pk_real *inputs = room.inputs;
    size_t rows = 0, parts = 0;
    for (size_t s = 0; s < 2 && sides[s].rows; s++) {
        const pk_matrix *from = &sides[s].side->inputs;
        const pk_real *data = from->data + (sides[s].side->first + sides[s].at) * from->ld;
        if (!sides[1].rows && from->ld == width)
            inputs = data;
        else
            for (size_t r = 0; r < sides[s].rows; r++)
                memcpy(room.inputs + (rows + r) * width, data + r * from->ld, width * sizeof *data);
        rows += sides[s].rows;
        parts += pk__blocks(sides[s].rows, gram->part);
    }
    room.forward.threads = threads;
    room.forward.context = gram->context;
    pk__pass_forward(&room.forward, &line, rows, inputs);
    if (threads > 1) {
        pk__team team = pk__team_of(gram->context, threads, parts);
        PK__PARALLEL(team)
        for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team))
            pk__gram_back(gram, &room.forward, sides, part, pk__thread());
        pk__team_end(&team);
    } else { /* no region of one thread inside one of several: that would be its thread 0 */
        for (size_t part = 0; part < parts; part++)
            pk__gram_back(gram, &room.forward, sides, part, lane);
    }
}

/* Fills a side, and perhaps another, with their rows first .. first + rows - 1 at their node. Threads have passes of their own or, where
 * some of them would wait, share the operations of each: in no region around those, which would start threads anew. */
static void pk__gram_fill(const pk__gram *gram, pk__gram_side *side, pk__gram_side *other)
{
    const size_t threads = (size_t)gram->threads;
    const size_t passes = gram->together ? 1
                                         : pk__blocks(side->rows, gram->sweep) +
                                               (other ? pk__blocks(other->rows, gram->sweep) : 0);
    const int workers = gram->threads;
    if (passes % threads && passes < 4 * threads) {
        for (size_t pass = 0; pass < passes; pass++)
            pk__gram_pass(gram, side, other, pass, workers, 0);
    } else {
        pk__team team = pk__team_of(gram->context, workers, passes);
        PK__PARALLEL(team)
        for (size_t pass = pk__first_task(&team); pass < passes; pass = pk__next_task(&team))
            pk__gram_pass(gram, side, other, pass, 1, pk__thread());
        pk__team_end(&team);
    }
}

/* The same at all their nodes. */
static void pk__gram_fill_nodes(const pk__gram *gram, pk__gram_side *side, pk__gram_side *other)
{
    for (size_t node = 0; node < gram->nodes; node++) {
        pk__gram_side *second = other && node < other->nodes ? other : NULL;
        side->node = node;
        if (second)
            second->node = node;
        if (node < side->nodes)
            pk__gram_fill(gram, side, second);
        else if (second)
            pk__gram_fill(gram, second, NULL);
    }
}

/* ---- tiles --------------------------------------------------------------------------------------------- */

/* tile += weight times the sum over pairs of places (a_q . a_r + bias) (d_q . d_r). */
static void pk__gram_places(const pk__gram *gram, const pk__gram_layer *layer, pk__gram_lane *lane,
                            pk_real weight, const pk_real *x_left, const pk_real *x_right,
                            const pk_real *y_left, const pk_real *y_right, size_t rows, size_t columns)
{
    const size_t positions = layer->node->positions, in = layer->node->fan_in, kept = gram->kept,
                 depth = layer->depth, ld = columns * kept;
    for (size_t p = 0, together; p < rows * positions; p += together) {
        /* Places of one row. */
        together = pk__min(layer->places, positions - p % positions);
        for (size_t j = 0; j < columns; j += layer->examples) {
            const size_t count = pk__min(layer->examples, columns - j), across = count * positions;
            pk__gemm(0, 1, together, across, in, 1, x_left + p * in, in, y_left + j * positions * in, in, 0,
                     lane->left, across);
            pk__gemm(0, 1, together * kept, across * kept, depth, weight, x_right + p * kept * depth, depth,
                     y_right + j * positions * kept * depth, depth, 0, lane->right, across * kept);
            for (size_t q = 0; q < together; q++)
                for (size_t k = 0; k < kept; k++) {
                    const pk_real *left = lane->left + q * across;
                    const pk_real *right = lane->right + (q * kept + k) * across * kept;
                    pk_real *to = lane->tile + (p / positions * kept + k) * ld + j * kept;
                    for (size_t r = 0; r < across; r++)
                        for (size_t l = 0; l < kept; l++)
                            to[r / positions * kept + l] += (left[r] + layer->bias) * right[r * kept + l];
                }
        }
    }
}

/* left (+)= weight times the products of the inputs of a layer's rows at a node. */
static void pk__gram_inputs(const pk__gram_layer *layer, const pk__gram_side *x, size_t i, size_t rows,
                            const pk__gram_side *y, size_t j, size_t columns, size_t node, double weight,
                            int more, pk_real *left)
{
    const size_t in = layer->node->fan_in;
    pk__gemm(0, 1, rows, columns, in, (pk_real)weight, pk__gram_left(x, layer, node, i),
             layer->data ? x->inputs.ld : in, pk__gram_left(y, layer, node, j), layer->data ? y->inputs.ld : in,
             (pk_real)more, left, columns);
}

/* right (+)= weight times the products of what is kept of a layer's cotangents at a node. */
static void pk__gram_cotangents(const pk__gram *gram, const pk__gram_layer *layer, pk__gram_lane *lane,
                                const pk__gram_side *x, size_t i, size_t rows, const pk__gram_side *y, size_t j,
                                size_t columns, size_t node, int more, pk_real *right)
{
    const size_t kept = gram->kept, depth = layer->depth, terms = gram->terms, width = depth / terms;
    const pk_real *x_right = pk__gram_right(x, layer, node, i);
    if (layer->form == PK__GRAM_SLOPES) { /* the sum over outputs, taken to the left side */
        const pk_real *factor = layer->factor + node * terms * depth;
        for (size_t r = 0; r < rows; r++)
            for (size_t term = 0; term < terms; term++)
                for (size_t h = 0; h < width; h++)
                    lane->scaled[r * depth + term * width + h] =
                        x_right[r * depth + h] * factor[term * width + h] +
                        (terms > 1 ? x_right[r * depth + width + h] * factor[(2 + term) * width + h] : 0);
        x_right = lane->scaled;
    }
    pk__gemm(0, 1, rows * kept, columns * kept, depth, (pk_real)gram->node_weight[node], x_right, depth,
             pk__gram_right(y, layer, node, j), depth, (pk_real)more, right, columns * kept);
}

/* tile += (left + bias) o right, or of constants instead of right. */
static void pk__gram_join(const pk__gram *gram, const pk__gram_layer *layer, pk__gram_lane *lane, size_t rows,
                          size_t columns, pk_real bias)
{
    const size_t kept = gram->kept, ld = columns * kept;
    if (kept == 1 && layer->form != PK__GRAM_CONSTANT) {
        for (size_t i = 0; i < rows * columns; i++)
            lane->tile[i] += (lane->left[i] + bias) * lane->right[i];
        return;
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t s = 0; s < ld; s++)
            lane->untied[s] = lane->left[r * columns + s / kept] + bias;
        for (size_t k = 0; k < kept; k++) {
            pk_real *to = lane->tile + (r * kept + k) * ld;
            const pk_real *right = lane->right + (r * kept + k) * ld;
            if (layer->form != PK__GRAM_CONSTANT)
                for (size_t s = 0; s < ld; s++)
                    to[s] += lane->untied[s] * right[s];
            else
                for (size_t s = 0; s < kept; s++)
                    for (size_t t = s; layer->constant[k * kept + s] != 0 && t < ld; t += kept)
                        to[t] += lane->untied[t] * layer->constant[k * kept + s];
        }
    }
}

/* tile = the kernel of rows at i ... of x and j ... of y, of all layers or, column >= 0, of those of one; the sum over some
 * nodes, from number first on. Where only one factor depends on the node, that one is summed first, in the products. */
static void pk__gram_tile(const pk__gram *gram, pk__gram_lane *lane, const pk__gram_side *x, size_t i,
                          size_t rows, const pk__gram_side *y, size_t j, size_t columns, size_t first,
                          size_t nodes, int column)
{
    const size_t kept = gram->kept, ld = columns * kept, end = first + nodes;
    double weight_sum = 0;
    const pk_node *input = NULL; /* whose Gram matrix is in lane->left, of all nodes */
    memset(lane->tile, 0, rows * kept * ld * sizeof *lane->tile);
    for (size_t q = first; q < end; q++)
        weight_sum += gram->node_weight[q];
    for (size_t l = 0; l < gram->layers; l++) {
        const pk__gram_layer *layer = &gram->layer[l];
        const size_t depth = layer->depth;
        if (column >= 0 && layer->column != column)
            continue;
        if (layer->form == PK__GRAM_ROWS || layer->form == PK__GRAM_PLACES) {
            for (size_t q = first; q < end; q++) {
                const pk_real weight = (pk_real)gram->node_weight[q];
                const pk_real *x_right = pk__gram_right(x, layer, q, i),
                              *y_right = pk__gram_right(y, layer, q, j);
                if (layer->form == PK__GRAM_ROWS)
                    pk__gemm(0, 1, rows * kept, ld, depth, weight, x_right, depth, y_right, depth, 1,
                             lane->tile, ld);
                else
                    pk__gram_places(gram, layer, lane, weight, pk__gram_left(x, layer, q, i), x_right,
                                    pk__gram_left(y, layer, q, j), y_right, rows, columns);
            }
            input = layer->form == PK__GRAM_ROWS ? input : NULL;
            continue;
        }
        const pk_node *own = pk__layer_input(gram->graph, layer->node);
        const int constant = layer->form == PK__GRAM_CONSTANT;
        if (nodes == 1 || layer->data) { /* inputs that all nodes share */
            if (input != own)
                pk__gram_inputs(layer, x, i, rows, y, j, columns, first, 1, 0, lane->left);
            input = own;
            for (size_t q = first; q < end && !constant; q++)
                pk__gram_cotangents(gram, layer, lane, x, i, rows, y, j, columns, q, q > first, lane->right);
            pk__gram_join(gram, layer, lane, rows, columns, layer->bias);
            continue;
        }
        input = NULL;
        for (size_t q = first; q < end; q++) {
            pk__gram_inputs(layer, x, i, rows, y, j, columns, q, constant ? gram->node_weight[q] : 1,
                            constant && q > first, lane->left);
            if (constant)
                continue;
            pk__gram_cotangents(gram, layer, lane, x, i, rows, y, j, columns, q, 0, lane->right);
            pk__gram_join(gram, layer, lane, rows, columns, layer->bias);
        }
        if (constant)
            pk__gram_join(gram, layer, lane, rows, columns, (pk_real)(layer->bias * weight_sum));
    }
}

/* Writes a tile whose first row is i of all x, whose first column j of all y; the first pair that is not finite, or
 * SIZE_MAX. */
static size_t pk__gram_write(const pk__gram *gram, pk_real *tile, size_t plane, size_t i, size_t rows, size_t j,
                             size_t columns)
{
    const size_t kept = gram->kept, ld = columns * kept, to_ld = gram->result.ld;
    pk_real *result = gram->result.data + plane * gram->plane, *to = result + i * kept * to_ld + j * kept;
    size_t bad = SIZE_MAX;
    if (gram->symmetric && i == j)
        for (size_t r = 0; r < ld; r++)
            for (size_t s = 0; s < r; s++)
                tile[s * ld + r] = tile[r * ld + s];
    else if (gram->symmetric)
        pk__transpose(rows * kept, ld, tile, result + j * kept * to_ld + i * kept, to_ld);
    for (size_t r = 0; r < rows * kept; r++) {
        const pk_real *from = tile + r * ld;
        memcpy(to + r * to_ld, from, ld * sizeof *to);
        if (bad == SIZE_MAX && !pk__all_finite(from, ld)) {
            size_t s = 0;
            while (pk__finite(from[s]))
                s++;
            bad = (i + r / kept) * (gram->result.cols / kept) + j + s / kept;
        }
    }
    return bad;
}

/* The factors of slopes: sum_k (V0 + t V1)_kh (V0' + t' V1')_kh, term by term. */
static void pk__gram_factor(const pk__gram *gram, const pk__gram_side *x, const pk__gram_side *y)
{
    const size_t terms = gram->terms, C = gram->outputs;
    for (size_t l = 0; l < gram->layers; l++) {
        const pk__gram_layer *layer = &gram->layer[l];
        const size_t width = layer->depth / terms;
        for (size_t q = 0; q < gram->nodes && layer->form == PK__GRAM_SLOPES; q++)
            for (size_t term = 0; term < terms * terms; term++) {
                const pk_real *v[2];
                const pk__gram_side *sides[2] = {x, y};
                const size_t of[2] = {term / terms, term % terms};
                pk_real *to = layer->factor + (q * terms * terms + term) * width;
                for (int s = 0; s < 2; s++)
                    v[s] = layer->seen[!sides[s]->leads] +
                           ((sides[s]->nodes > 1 ? q : 0) * terms + of[s]) * C * width;
                for (size_t h = 0; h < width; h++) {
                    double sum = 0;
                    for (size_t k = 0; k < C; k++)
                        sum += (double)v[0][k * width + h] * v[1][k * width + h];
                    to[h] = (pk_real)sum;
                }
            }
    }
}

/* All pairs of two sides, or of one with itself. */
static pk_status pk__gram_pairs(pk__gram *gram, const pk__gram_side *x, const pk__gram_side *y)
{
    const size_t down = pk__blocks(x->rows, gram->tile), across = pk__blocks(y->rows, gram->tile);
    const int half = x == y, workers = gram->threads;
    const size_t tiles = half ? down * (down + 1) / 2 : down * across, most = 32 * (size_t)workers;
    pk__gram_factor(gram, x, y);
    for (size_t start = 0; start < tiles; start += most) {
        const size_t end = start + pk__min(most, tiles - start);
        pk_status status = pk__progress(gram->context, "kernel", gram->done / gram->all);
        if (status)
            return status;
        const size_t count = end - start;
        pk__team team = pk__team_of(gram->context, workers, count);
        PK__PARALLEL(team)
        for (size_t task = pk__first_task(&team); task < count; task = pk__next_task(&team)) {
            pk__gram_lane lane = pk__gram_lane_of(gram, pk__thread());
            const size_t t = start + task;
            size_t i = t / across, j = t % across;
            if (half) {
                i = 0;
                for (j = t; j > i; i++)
                    j -= i + 1;
            }
            i *= gram->tile, j *= gram->tile;
            const size_t rows = pk__min(gram->tile, x->rows - i), columns = pk__min(gram->tile, y->rows - j);
            size_t *bad = &gram->bad[pk__thread()];
            const size_t parts = gram->by_layer ? gram->graph->columns : 1,
                         sums = gram->apart ? gram->nodes : 1;
            for (size_t c = 0; c < sums * parts; c++) {
                pk__gram_tile(gram, &lane, x, i, rows, y, j, columns, c / parts, gram->nodes / sums,
                              gram->by_layer ? (int)(c % parts) : -1);
                const size_t found =
                    pk__gram_write(gram, lane.tile, c, x->first + i, rows, y->first + j, columns);
                *bad = pk__min(*bad, found);
            }
        }
        pk__team_end(&team);
        gram->done += (double)(end - start) / (double)tiles * (double)x->rows * (double)y->rows *
                      (gram->symmetric && !half ? 2 : 1);
    }
    return PK_OK;
}

/* ---- how it is cut ------------------------------------------------------------------------------------- */

/* The column of by_layer that a node's own weight blocks belong to; -1: all of its tensors are others'. */
static int pk__gram_column(const pk_graph *graph, const pk_node *node)
{
    for (int t = 0; t < node->tensor_count; t++)
        if (!node->tensors[t].tied)
            return pk__block_of(graph, node, t)->column;
    return -1;
}

/* The form of a layer, by flops a pair of rows (cost.h); rows: that a gradient is formed once for, about. */
static void pk__gram_plan_layer(const pk__gram *gram, double rows, pk__gram_layer *layer)
{
    const pk_node *node = layer->node;
    const size_t kept = gram->kept, group = gram->outputs / kept, room = (size_t)1 << 16;
    const int outer = pk__is_outer(node);
    const pk__product_sizes sizes = {.left = (double)kept,
                                     .right = (double)kept,
                                     .summed = (double)group,
                                     .points = 1,
                                     .terms = (double)gram->terms,
                                     .formed = 1 / rows};
    const double factored = pk__product_flops(PK__PRODUCT_FACTORED, node, &sizes);
    layer->column = pk__gram_column(gram->graph, node);
    layer->last = outer && gram->slopes && pk__product_flops(PK__PRODUCT_BY_SLOPES, node, &sizes) < factored
                      ? pk__last_behind(gram->graph, node)
                      : NULL;
    layer->form = layer->last ? PK__GRAM_SLOPES
                  : outer     ? node->cotangent_constant && gram->uniform ? PK__GRAM_CONSTANT : PK__GRAM_OUTER
                  : node->tangent_form == PK_TANGENT_OUTER &&
                          factored < pk__product_flops(PK__PRODUCT_BY_ROWS, node, &sizes)
                      ? PK__GRAM_PLACES
                      : PK__GRAM_ROWS;
    if (layer->form == PK__GRAM_ROWS) {
        layer->right = node->weight_count * gram->outputs;
        layer->depth = node->weight_count * group;
        return;
    }
    layer->bias = (pk_real)pk__has_bias(node);
    layer->data = outer && node->inputs[0] == 0;
    layer->left = layer->data ? 0 : node->positions * node->fan_in;
    layer->right = layer->form == PK__GRAM_CONSTANT ? 0 : node->width * gram->outputs;
    layer->depth = node->fan_out * group;
    if (layer->form == PK__GRAM_SLOPES)
        layer->right = layer->depth = node->width * gram->terms;
    if (layer->form == PK__GRAM_PLACES) {
        const size_t row = node->positions * kept;
        layer->places = pk__max(1, pk__min(node->positions, room / row / kept));
        layer->examples = pk__max(1, room / row / kept / layer->places);
    }
}

/* With ties: the blocks that a layer brings into w stand side by side there. */
static void pk__gram_plan_column(const pk__gram *gram, pk__gram_layer *layer)
{
    const pk_graph *graph = gram->graph;
    const size_t group = gram->outputs / gram->kept;
    size_t count = 0;
    layer->offset = SIZE_MAX;
    layer->column = pk__gram_column(graph, layer->node);
    for (size_t b = 0; b < graph->block_count; b++) {
        const pk_weight_block *block = &graph->blocks[b];
        if (block->column != layer->column)
            continue;
        layer->offset = pk__min(layer->offset, block->first);
        count += block->count;
    }
    layer->node = NULL;
    layer->form = PK__GRAM_ROWS;
    layer->right = count * gram->outputs;
    layer->depth = count * group;
}

/* Layers, tiles and the memory of a thread, from shapes alone. */
static pk_status pk__gram_plan(pk__gram *gram, size_t rows, size_t columns)
{
    const pk_graph *graph = gram->graph;
    const size_t kept = gram->kept;
    size_t values = graph->input_width, cotangents = 0;
    for (size_t n = 1; n < graph->node_count; n++) {
        values += graph->nodes[n].width;
        cotangents += graph->nodes[n].varies ? graph->nodes[n].width * gram->outputs : 0;
    }
    /* Tiles of about 128 x 128 numbers, or somewhat more, stay in the second-level cache with their products; there should be several. */
    gram->tile = 64;
    while (gram->tile > 1 && gram->tile * kept > 192)
        gram->tile /= 2;
    while (gram->tile > (kept > 1 ? 8 : 16) && pk__max(rows, columns) < 2 * gram->tile)
        gram->tile /= 2;
    /* Every pass reads all weights: many rows. A pass back has as many rows of cotangents as there are outputs: fewer, which
     * stay in the second-level cache. */
    const size_t most = (size_t)1 << 22, all = gram->symmetric ? rows : rows + columns;
    gram->sweep = 128;
    while (gram->sweep > 1 && (values > most / gram->sweep || gram->sweep / 2 >= all))
        gram->sweep /= 2;
    gram->part = gram->sweep;
    while (gram->part > 1 && (gram->part * gram->outputs > 256 || cotangents > most / 4 / gram->part))
        gram->part /= 2;
    gram->together = all <= gram->sweep && !gram->two_points;
    gram->unit = pk__max(gram->tile, gram->sweep);
    gram->left = gram->tile * gram->tile;
    gram->right = gram->left * kept * kept;
    gram->lean = !graph->tied;
    for (size_t l = 0; l < graph->layers; l++) {
        pk__gram_layer *layer = &gram->layer[gram->layers];
        layer->node = pk_graph_layer(graph, l);
        if (graph->tied && pk__gram_column(graph, layer->node) < 0)
            continue;
        if (graph->tied)
            pk__gram_plan_column(gram, layer);
        else
            pk__gram_plan_layer(gram, (double)rows * (double)columns / ((double)rows + (double)columns), layer);
        layer->left_at = gram->numbers;
        layer->right_at = gram->numbers + layer->left;
        gram->numbers = layer->right_at + layer->right;
        gram->layers++;
        if (graph->tied)
            continue;
        gram->lean &= layer->form == PK__GRAM_CONSTANT || layer->form == PK__GRAM_SLOPES;
        gram->scaled = pk__max(gram->scaled, layer->form == PK__GRAM_SLOPES ? layer->depth : 0);
        const size_t pairs = layer->places * layer->examples * layer->node->positions;
        gram->left = pk__max(gram->left, pairs);
        gram->right = pk__max(gram->right, pairs * kept * kept);
    }
    pk__arena arena = {NULL, 0, 0, 0};
    pk__gram_lane lane;
    pk__gram_lane_take(&arena, gram, &lane);
    gram->lane_bytes = arena.used;
    if (arena.overflow || gram->numbers > SIZE_MAX / 4096 / gram->unit / gram->nodes)
        return pk__fail(gram->context, PK_OVERFLOW, "%s: the memory for this network overflows", gram->name);
    return PK_OK;
}

enum { PK__OPERATION_TILES = 8 };

/* How many rows of either side are in memory at one time, and how many threads run, within the memory there is. */
static pk_status pk__gram_cut(pk__gram *gram, size_t x, size_t y, size_t *x_rows, size_t *y_rows)
{
    pk_context *context = gram->context;
    const size_t row = gram->numbers * gram->nodes * sizeof(pk_real), unit = gram->unit,
                 used = context ? context->memory_used : 0;
    const size_t limit = context ? context->memory_limit : 0, other = 4096; /* what allocations add */
    const int whole = gram->symmetric && x <= unit;
    const size_t least = pk__min(x, unit) + (whole ? 0 : pk__min(y, unit));
    const size_t rows = least * row + other;
    size_t room = limit ? limit - pk__min(used, limit) : rows + ((size_t)1 << 30);
    const double work = 6 * pk__graph_work(gram->graph) * (double)gram->outputs * ((double)x + (double)y) +
                        2 * (double)x * (double)y * (double)gram->numbers * (double)gram->kept;
    size_t threads = (size_t)pk_threads(context), bytes = 0;
    threads = work / 1048576 < (double)threads ? pk__max(1, (size_t)(work / 1048576)) : threads;
    /* No more than the tiles, the passes back, or what an operation is cut into. */
    size_t tasks = 0;
    if (!pk__multiply(pk__blocks(x, gram->tile), pk__blocks(y, gram->tile), &tasks))
        tasks = threads;
    tasks = pk__max(tasks, pk__blocks(x, gram->part) + pk__blocks(y, gram->part));
    threads = pk__min(threads, pk__max(tasks, PK__OPERATION_TILES));
    if (!pk__multiply(threads, gram->lane_bytes, &bytes) || bytes > SIZE_MAX / 2 - room)
        return pk__fail(context, PK_OVERFLOW, "%s: the memory of %zu threads overflows", gram->name, threads);
    if (!limit)
        room += bytes;
    while (threads > 1 && threads * gram->lane_bytes + rows > room)
        threads--;
    if (threads * gram->lane_bytes + rows > room)
        return pk__fail(
            context, PK_MEMORY_LIMIT,
            "%s: a kernel of this network within %zu bytes is not possible; the least that would do is %zu "
            "bytes",
            gram->name, limit, used + gram->lane_bytes + rows);
    gram->threads = (int)threads;
    const size_t left = room - threads * gram->lane_bytes - other, capacity = row ? left / row : SIZE_MAX;
    *x_rows = x;
    *y_rows = gram->symmetric ? 0 : y;
    if (x <= capacity && *y_rows <= capacity - x)
        return PK_OK;
    /* One side as a whole, or most of the memory for x. */
    *y_rows = y <= capacity - pk__min(x, unit) && !gram->symmetric
                  ? y
                  : pk__min(y, pk__max(unit, capacity / 4 / unit * unit));
    *x_rows = pk__min(x, pk__max(unit, (capacity - *y_rows) / unit * unit));
    return PK_OK;
}

/* ---- all of it ----------------------------------------------------------------------------------------- */

static pk_status pk__gram_blocks(pk__gram *gram, pk__gram_side *x, pk__gram_side *y)
{
    const size_t rows = x->inputs.rows, columns = y->inputs.rows;
    const int whole = !gram->symmetric && y->capacity == columns; /* y is filled once */
    y->rows = columns;
    for (x->first = 0; x->first < rows; x->first += x->capacity) {
        pk_status status = pk__progress(gram->context, "kernel", gram->done / gram->all);
        if (status)
            return status;
        x->rows = pk__min(x->capacity, rows - x->first);
        pk__gram_fill_nodes(gram, x, whole && !x->first ? y : NULL);
        if (gram->symmetric || whole)
            status = pk__gram_pairs(gram, x, whole ? y : x);
        /* Of a symmetric kernel the blocks below the diagonal. */
        const size_t end = whole ? 0 : gram->symmetric ? x->first : columns;
        for (y->first = 0; !status && y->first < end; y->first += y->capacity) {
            y->rows = pk__min(y->capacity, end - y->first);
            pk__gram_fill_nodes(gram, y, NULL);
            status = pk__gram_pairs(gram, x, y);
        }
        y->first = 0;
        if (status)
            return status;
    }
    return PK_OK;
}

/* Factors of hundreds of megabytes are written once and soon released: with pages of 4 KB, the system spent a quarter of the time of
 * a small kernel on clearing them one by one. */
static void pk__gram_large_pages(void *memory, size_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    enum { SYSTEM_PAGE = 4096, LARGE_FACTORS = 1 << 24 };
    if (bytes >= LARGE_FACTORS) {
        const size_t skip = SYSTEM_PAGE - (size_t)((uintptr_t)memory % SYSTEM_PAGE);
        (void)madvise((unsigned char *)memory + skip, (bytes - skip) / SYSTEM_PAGE * SYSTEM_PAGE,
                      MADV_HUGEPAGE);
    }
#else
    (void)memory, (void)bytes;
#endif
}

/* With the layers' memory. */
static pk_status pk__gram_run(pk__gram *gram, pk__gram_side *x, pk__gram_side *y)
{
    pk_context *context = gram->context;
    const size_t row = gram->numbers * gram->nodes;
    size_t pair = SIZE_MAX;
    pk_status status = pk__gram_cut(gram, x->inputs.rows, y->inputs.rows, &x->capacity, &y->capacity);
    /* Both sides at once: glibc gives back to the system, and takes anew page by page at the next call, what is larger than
     * twice the largest of the blocks that are freed. That cost a quarter of the time of 128 x 128 rows. */
    if (!status)
        status =
            pk__allocate(context, x->capacity + y->capacity, row * sizeof(pk_real), 0, gram->name, &x->factors);
    if (!status && x->factors) {
        pk__gram_large_pages(x->factors, (x->capacity + y->capacity) * row * sizeof(pk_real));
        y->factors = x->factors + x->capacity * row;
    }
    x->numbers = y->numbers = gram->numbers;
    if (!status)
        status = pk__allocate(context, (size_t)gram->threads, gram->lane_bytes, 0, gram->name, &gram->lanes);
    if (!status)
        status = pk_allocate(context, (size_t)gram->threads, sizeof *gram->bad, gram->name, &gram->bad);
    if (!status) {
        for (int t = 0; t < gram->threads; t++)
            gram->bad[t] = SIZE_MAX;
        status = pk__gram_blocks(gram, x, y);
        for (int t = 0; t < gram->threads; t++)
            pair = pk__min(pair, gram->bad[t]);
        if (!status && pair != SIZE_MAX)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the kernel of row %zu with row %zu is not finite",
                              gram->name, pair / y->inputs.rows, pair % y->inputs.rows);
    }
    pk_release(context, gram->bad);
    pk_release(context, gram->lanes);
    pk_release(context, x->factors);
    return status;
}

static pk_status pk__gram_check_side(pk_context *context, const pk__gram *gram, const char *what,
                                     const pk__gram_rows_of *of)
{
    const pk_graph *graph = gram->graph;
    pk_status status = pk__sweep_matrix(context, gram->name, what, of->rows, of->rows.rows, graph->input_width);
    for (size_t r = 0; !status && graph->checked && r < of->rows.rows; r++)
        status = pk_graph_check_inputs(context, graph, r, of->rows.data + r * of->rows.ld);
    return status;
}

static pk_status pk__gram_check(pk__gram *gram, const pk__gram_rows_of *x, const pk__gram_rows_of *y)
{
    const pk_graph *graph = gram->graph;
    pk_context *context = gram->context;
    size_t rows = 0, columns = 0;
    pk_status status = pk__sweep_graph(context, gram->name, graph, x->weights);
    if (!status)
        status = pk__gram_check_side(context, gram, "first inputs", x);
    if (!status && !gram->symmetric)
        status = pk__gram_check_side(context, gram, "second inputs", y);
    if (status)
        return status;
    gram->outputs = x->seeds == PK__SEEDS_UNITS ? graph->output_width : 1;
    gram->kept = gram->kept ? 1 : gram->outputs;
    if (!pk__multiply(x->rows.rows, gram->kept, &rows) || !pk__multiply(y->rows.rows, gram->kept, &columns))
        return pk__fail(context, PK_OVERFLOW, "%s: %zu and %zu rows of %zu outputs overflow", gram->name,
                        x->rows.rows, y->rows.rows, gram->outputs);
    status = pk__sweep_matrix(context, gram->name, "entries of the result", gram->result, rows, columns);
    const pk_matrix read[4] = {x->rows, y->rows,
                               pk__as_row(x->weights, graph->parameters * (x->moves ? gram->nodes : 1)),
                               pk__as_row(y->weights, graph->parameters * (y->moves ? gram->nodes : 1))};
    return status ? status : pk__sweep_results(context, gram->name, 4, read, 1, &gram->result);
}

/* The weights and directions of the sides in the untied layout; *memory is released by the caller. */
static pk_status pk__gram_untie(pk__gram *gram, pk__gram_side *sides, pk_real **memory)
{
    const pk_graph *graph = gram->graph;
    const size_t untied = graph->untied;
    pk_status status = PK_OK;
    if (graph->tied)
        status =
            pk_allocate(gram->context, untied, 2 * (gram->nodes + 1) * sizeof **memory, gram->name, memory);
    for (int s = 0; s < 2; s++) {
        pk__gram_side *side = &sides[s];
        side->weights = side->of->weights;
        side->direction = side->of->direction;
        side->nodes = side->of->moves ? gram->nodes : 1;
        if (status || !graph->tied)
            continue;
        pk_real *own = *memory + (size_t)s * (gram->nodes + 1) * untied;
        for (size_t q = 0; q < side->nodes; q++)
            pk_graph_untie(graph, side->weights + q * graph->parameters, own + q * untied);
        side->weights = own;
        if (side->direction) {
            pk_graph_untie(graph, side->direction, own + gram->nodes * untied);
            side->direction = own + gram->nodes * untied;
        }
    }
    return status;
}

/* Constants of the layers, and what slopes are multiplied with; *memory is released by the caller. */
static pk_status pk__gram_constants(pk__gram *gram, pk_real **memory)
{
    const size_t square = gram->kept * gram->kept, C = gram->outputs, nodes = gram->nodes;
    pk_status status = PK_OK;
    pk__arena arena = {NULL, 0, 0, 0};
    do
        for (size_t l = 0; l < gram->layers; l++) {
            pk__gram_layer *layer = &gram->layer[l];
            const size_t depth = layer->form == PK__GRAM_SLOPES ? layer->depth * nodes : 0;
            layer->constant = pk__arena_take(&arena, square, sizeof(pk_real));
            for (int s = 0; s < 2; s++)
                layer->seen[s] = pk__arena_take(&arena, depth, C * sizeof(pk_real));
            layer->factor = pk__arena_take(&arena, depth, gram->terms * sizeof(pk_real));
        }
    while (pk__arena_again(gram->context, &arena, gram->name, &status));
    *memory = (pk_real *)(void *)arena.base;
    return status;
}

PK__INTERNAL pk_status pk__gram_compute(pk_context *context, const pk__gram_request *request,
                                        const pk__gram_rows_of *left, const pk__gram_rows_of *right)
{
    const pk_graph *graph = request->graph;
    const pk_matrix result = request->result;
    pk__gram gram;
    pk__gram_side sides[2];
    pk_real *constants = NULL, *untied = NULL;
    const double one = 1;
    memset(&gram, 0, sizeof gram);
    memset(sides, 0, sizeof sides);
    gram.symmetric = !right;
    right = right ? right : left;
    gram.name = request->name;
    gram.context = context;
    gram.graph = graph;
    gram.criterion = request->criterion;
    gram.nodes = request->nodes ? request->nodes : 1;
    gram.node_weight = request->nodes ? request->node_weight : &one;
    gram.apart = request->apart;
    gram.two_points =
        left->weights != right->weights || left->moves != right->moves || left->direction || right->direction;
    gram.terms = left->direction || right->direction ? 2 : 1;
    gram.slopes = request->summed && left->seeds == PK__SEEDS_UNITS && right->seeds == PK__SEEDS_UNITS;
    gram.uniform = left->seeds <= PK__SEEDS_ONE && left->seeds == right->seeds && left->output == right->output;
    gram.result = result;
    gram.kept = (size_t)request->summed;
    gram.by_layer = request->by_layer;
    gram.plane = result.rows * result.ld;
    gram.all = (double)left->rows.rows * (double)right->rows.rows;
    pk_status status = pk__gram_check(&gram, left, right);
    if (status || !left->rows.rows || !right->rows.rows)
        return status;
    if (!graph->nodes[graph->node_count - 1].varies) { /* no weight reaches the output */
        const size_t planes = (gram.by_layer ? graph->columns : 1) * (gram.apart ? gram.nodes : 1);
        for (size_t r = 0; r < result.rows * planes; r++)
            memset(result.data + r * result.ld, 0, result.cols * sizeof *result.data);
        return PK_OK;
    }
    status = pk_allocate(context, graph->layers, sizeof *gram.layer, gram.name, &gram.layer);
    if (!status)
        status = pk__gram_plan(&gram, left->rows.rows, right->rows.rows);
    if (!status)
        status = pk__gram_constants(&gram, &constants);
    sides[0].of = left;
    sides[0].inputs = left->rows;
    sides[0].leads = 1;
    sides[1].of = right;
    sides[1].inputs = right->rows;
    if (!status)
        status = pk__gram_untie(&gram, sides, &untied);
    if (!status)
        status = pk__gram_run(&gram, &sides[0], &sides[1]);
    pk_release(context, untied);
    pk_release(context, constants);
    pk_release(context, gram.layer);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
