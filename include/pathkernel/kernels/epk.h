/* pathkernel/kernels/epk.h: the symmetric exact path kernel of a recorded run (Bell et al. 2023).
 *
 *     K(x, x') = sum_s eta_s < L_s(x), R_s(x') >,        eta_s the learning rate times the factor of clipping
 *     of a test row:           J(w_s + t D_s, x), and the product is integrated over t in [0, 1]
 *     of training row i:       c_{s,i} J(w_s, x_i), which does not move
 *
 * Two test rows move together, at the same t; of a test and a training row the first moves alone; two training rows have
 * c_{s,i} c_{s,j} J(w_s, x_i) J(w_s, x_j)'. It is one feature map, and so has no negative eigenvalue over test and training
 * rows together; but a training row and a test row of the same numbers have different features: it is discontinuous there.
 */
#ifndef PATHKERNEL_EPK_H
#define PATHKERNEL_EPK_H
#include "kernel.h"
#include "../path/quadrature.h"
#include "../run/revisit.h"

/* >>> declarations */
PK__BEGIN_C

enum { PK_EPK_TRACE = 1, PK_EPK_FULL = 2 };

typedef struct pk_epk_options {
    int outputs; /* required: PK_EPK_TRACE, the sum over equal outputs, or PK_EPK_FULL, all with all as in pk_kernel_ntk */
    /* 1: this side is the N training rows of the run, in their order, and its matrix is not read. A side is never taken
     * for training rows because of its numbers. */
    int x_train, y_train;
    int unweighted; /* 1: c = 1 for every training row in every step; 0: c_{s,i}, 0 outside of the batch */
    pk_quadrature
        quadrature; /* PK_RULE_AUTO, PK_RULE_GAUSS (up to 1000 nodes a step) or PK_RULE_LEFT (one node, t = 0) */
    double tolerance;    /* auto: of the largest entry; 0: 1e-10 (PATHKERNEL_FLOAT: 1e-4) */
    const size_t *steps; /* s: from w_s to w_{s+1}; one that is there twice counts twice. NULL: all */
    size_t step_count;
} pk_epk_options;

typedef struct pk_epk_report {
    double
        error; /* auto: the sum of what the accepted pieces differ by when their nodes are doubled, of the largest entry */
    size_t points;  /* values of t that were taken, over all steps */
    size_t refused; /* pieces accepted although they missed */
} pk_epk_report;

/* gram: n1 x n2 numbers, or n1 C x n2 C (PK_EPK_FULL). y.data == NULL without y_train: x with itself, symmetric bit for bit.
 * PK_RULE_AUTO doubles the nodes from 1 to 32 until the whole matrix agrees; where doubling helps too little, as at the
 * kinks of a network, the piece is halved, up to 40 times. With kinks a piece passes only where the integral of df/dt
 * also meets the change of f of every test row, since a kink beyond the outermost node changes the value at no node. What
 * remains is measured, not bounded: the report's error.
 * report may be NULL. Cost: a pk_kernel_ntk for each t, of the batch's rows where a side is the training rows. Memory: 3
 * matrices like gram. Same bits for any number of threads.
 * PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE, PK_CANCELLED: gram holds parts of the sum.
 * PK_NOT_CLOSED: gram is complete, but the error exceeds the tolerance. */
PK_API PK__MUST_USE pk_status pk_kernel_epk(pk_context *context, const pk_run *run, pk_matrix x, pk_matrix y,
                                            const pk_epk_options *options, double *gram, pk_epk_report *report);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_EPK_IMPLEMENTED)
#define PATHKERNEL_EPK_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__EPK_NODES = 1000, PK__EPK_ORDER = 32, PK__EPK_DEPTH = 40 };

typedef struct pk__epk_side {
    int train;
    pk_matrix rows; /* of the step: all test rows, or the training rows that count */
    int64_t *item;  /* of each training row; NULL: test rows */
    double *factor;
    double largest; /* of the factors' sizes; 1: test rows */
    /* Test rows of a network with kinks, rows x C each: outputs at the ends of a piece; df/dt; its integral. */
    pk_real *start, *end, *tangent;
    double *change;
} pk__epk_side;

typedef struct pk__epk {
    pk_context *context;
    const pk_run *run;
    const pk_epk_options *options;
    pk_epk_report report;
    size_t kept, columns; /* numbers of a row of the result */
    pk__epk_side x, y;
    pk_real *w, *next, *at, *part;
    pk_real *direction; /* D_s */
    int kinks;
    double slope;                                /* the largest |df/dt| of the step */
    double *c, *coarse, *fine, *nodes, *weights; /* N; parts of an integral; the rule */
    double scale;                                /* the largest entry of the step's first rule */
    double eta, fraction, *gram;
} pk__epk;

/* The training rows that count in a step, with their c. */
static void pk__epk_batch(pk__epk *epk, size_t s, pk__epk_side *side)
{
    const size_t N = epk->run->examples;
    pk_batch batch;
    pk_run_batch(epk->run, s, &batch);
    for (size_t i = 0; i < N; i++)
        epk->c[i] = epk->options->unweighted;
    for (size_t b = 0; !epk->options->unweighted && b < batch.count; b++)
        epk->c[batch.items[b]] += batch.weights ? batch.weights[b] : 1 / (double)batch.count;
    side->rows.rows = 0;
    side->largest = 0;
    for (size_t i = 0; i < N; i++)
        if (epk->c[i] != 0) {
            side->item[side->rows.rows] = (int64_t)i;
            side->factor[side->rows.rows++] = epk->c[i];
            side->largest = fmax(side->largest, fabs(epk->c[i]));
        }
    pk_dataset_inputs(&epk->run->train, side->item, side->rows.rows, side->rows.data);
}

/* to += the rule of `nodes` nodes on [a, b], in the rows and columns that count. */
static pk_status pk__epk_rule(pk__epk *epk, double a, double b, int nodes, double *to)
{
    const size_t rows = epk->x.rows.rows * epk->kept, columns = epk->y.rows.rows * epk->kept;
    const size_t P = epk->run->parameters;
    pk_gauss_legendre(nodes, epk->nodes, epk->weights);
    for (int q = 0; q < nodes; q++) {
        const int left = epk->options->quadrature.rule == PK_RULE_LEFT || (epk->x.train && epk->y.train);
        const double t = left ? 0 : a + (b - a) * epk->nodes[q], weight = (b - a) * epk->weights[q];
        pk__step_point(P, epk->w, epk->next, t, epk->at);
        /* Fractions of one kernel are none of the sum over the steps. */
        int (*progress)(void *, const char *, double) = epk->context ? epk->context->progress : NULL;
        pk_status status = pk__progress(epk->context, "path kernel", epk->fraction);
        if (status)
            return status;
        if (epk->context)
            epk->context->progress = NULL;
        status = pk__gram_make("epk", epk->context, &epk->run->graph, epk->x.train ? epk->w : epk->at,
                               epk->y.train ? epk->w : epk->at, epk->x.rows, epk->y.rows,
                               pk_matrix_view(epk->part, rows, columns), epk->options->outputs == PK_EPK_TRACE);
        if (epk->context)
            epk->context->progress = progress;
        if (status)
            return status;
        epk->report.points++;
        for (size_t i = 0; i < rows * columns; i++)
            to[i] += weight * epk->part[i];
    }
    return PK_OK;
}

/* gram += eta c_i c_j of a piece's integral. */
static void pk__epk_add(pk__epk *epk, const double *piece)
{
    const pk__epk_side *x = &epk->x, *y = &epk->y;
    const size_t kept = epk->kept, columns = y->rows.rows * kept;
    for (size_t i = 0; i < x->rows.rows * kept; i++) {
        const size_t row = (x->train ? (size_t)x->item[i / kept] : i / kept) * kept + i % kept;
        for (size_t j = 0; j < columns; j++) {
            const size_t column = (y->train ? (size_t)y->item[j / kept] : j / kept) * kept + j % kept;
            const double c = (x->train ? x->factor[i / kept] : 1) * (y->train ? y->factor[j / kept] : 1);
            epk->gram[row * epk->columns + column] += epk->eta * c * piece[i * columns + j];
        }
    }
}

/* By how much the rule's integral of df/dt misses the change of f on [a, b], of the largest |df/dt|, for the worst of a side's
 * test rows: this shows a kink that no node sees. What rounding of f explains is 0. */
static pk_status pk__epk_closure(pk__epk *epk, const pk__epk_side *side, double a, double b, int nodes,
                                 double *worst)
{
    const pk_graph *graph = &epk->run->graph;
    const size_t rows = side->rows.rows, C = epk->run->outputs, count = rows * C;
    const pk_matrix none = {NULL, 0, 0, 0};
    const size_t P = epk->run->parameters;
    memset(side->change, 0, count * sizeof *side->change);
    for (size_t p = 0; p < P; p++)
        epk->direction[p] = (pk_real)((double)epk->next[p] - epk->w[p]);
    pk__step_point(P, epk->w, epk->next, a, epk->at);
    pk_status status =
        pk_graph_evaluate(epk->context, graph, epk->at, side->rows, pk_matrix_view(side->start, rows, C));
    pk__step_point(P, epk->w, epk->next, b, epk->at);
    if (!status)
        status =
            pk_graph_evaluate(epk->context, graph, epk->at, side->rows, pk_matrix_view(side->end, rows, C));
    pk_gauss_legendre(nodes, epk->nodes, epk->weights);
    for (int q = 0; !status && q < nodes; q++) {
        pk__step_point(P, epk->w, epk->next, a + (b - a) * epk->nodes[q], epk->at);
        status = pk_jvp(epk->context, graph, epk->at, side->rows, epk->direction, none,
                        pk_matrix_view(side->tangent, rows, C));
        for (size_t i = 0; i < count; i++) {
            side->change[i] += (b - a) * epk->weights[q] * side->tangent[i];
            epk->slope = fmax(epk->slope, fabs((double)side->tangent[i]));
        }
    }
    for (size_t i = 0; !status && i < count; i++) {
        const double f = fmax(fabs((double)side->start[i]), fabs((double)side->end[i]));
        const double miss = fabs((double)side->end[i] - (double)side->start[i] - side->change[i]);
        if (miss > (sizeof(pk_real) == sizeof(float) ? 2e-6 : 4e-15) * fmax(f, epk->slope) && epk->slope > 0)
            *worst = fmax(*worst, miss / epk->slope);
    }
    return status;
}

/* Doubles the nodes on [a, b] until the matrix agrees; halves the piece where that helps too little. */
static pk_status pk__epk_piece(pk__epk *epk, double a, double b, int depth)
{
    const size_t numbers = epk->x.rows.rows * epk->kept * epk->y.rows.rows * epk->kept;
    const double eps = sizeof(pk_real) == sizeof(float) ? 1e-7 : 1e-15;
    double before = INFINITY, apart = 0;
    memset(epk->coarse, 0, numbers * sizeof *epk->coarse);
    pk_status status = pk__epk_rule(epk, a, b, 1, epk->coarse);
    for (int nodes = 2; !status && nodes <= PK__EPK_ORDER; nodes *= 2, before = apart) {
        memset(epk->fine, 0, numbers * sizeof *epk->fine);
        status = pk__epk_rule(epk, a, b, nodes, epk->fine);
        apart = 0;
        for (size_t i = 0; i < numbers; i++) {
            apart = fmax(apart, fabs(epk->fine[i] - epk->coarse[i]));
            epk->scale = fmax(epk->scale, fabs(epk->fine[i]));
        }
        const double allowed = fmax(0.01 * epk->options->tolerance, 4 * eps) * epk->scale;
        double missed = 0;
        pk__epk_side *const sides[] = {&epk->x, &epk->y};
        for (int k = 0; epk->kinks && k < 2 && !status && apart <= allowed; k++)
            if (!sides[k]->train && (k == 0 || epk->y.rows.data != epk->x.rows.data || epk->x.train))
                status = pk__epk_closure(epk, sides[k], a, b, nodes, &missed);
        apart = fmax(apart, missed * epk->scale);
        const int last = depth == PK__EPK_DEPTH && nodes == PK__EPK_ORDER;
        if (!status && (apart <= allowed || last)) {
            epk->report.refused += apart > allowed;
            epk->report.error += fabs(epk->eta) * epk->x.largest * epk->y.largest * apart;
            pk__epk_add(epk, epk->fine);
            return PK_OK;
        }
        if (depth < PK__EPK_DEPTH && nodes > 2 && apart > before / 8)
            break;
        double *spare = epk->coarse;
        epk->coarse = epk->fine;
        epk->fine = spare;
    }
    if (!status)
        status = pk__epk_piece(epk, a, 0.5 * (a + b), depth + 1);
    return status ? status : pk__epk_piece(epk, 0.5 * (a + b), b, depth + 1);
}

static pk_status pk__epk_steps(pk__epk *epk, pk_replay *replay)
{
    const pk_run *run = epk->run;
    const pk_epk_options *options = epk->options;
    const size_t count = options->steps ? options->step_count : run->steps;
    const pk_rule rule = epk->x.train && epk->y.train ? PK_RULE_LEFT : options->quadrature.rule;
    for (size_t k = 0; k < count; k++) {
        const size_t s = options->steps ? options->steps[k] : k;
        epk->fraction = (double)k / (double)count;
        epk->eta = run->learning_rates[s] * pk_run_gradient_scale(run, s);
        epk->scale = epk->slope = 0;
        pk_status status = pk_replay_weights(epk->context, replay, s, epk->w);
        if (!status)
            status = pk_replay_weights(epk->context, replay, s + 1, epk->next);
        if (status)
            return status;
        if (epk->x.train)
            pk__epk_batch(epk, s, &epk->x);
        if (epk->y.train && epk->x.train)
            epk->y = epk->x; /* the same rows: half the work, and the same bits on both sides of the diagonal */
        else if (epk->y.train)
            pk__epk_batch(epk, s, &epk->y);
        const size_t numbers = epk->x.rows.rows * epk->kept * epk->y.rows.rows * epk->kept;
        if (numbers && rule == PK_RULE_AUTO) {
            status = pk__epk_piece(epk, 0, 1, 0);
        } else if (numbers) {
            memset(epk->fine, 0, numbers * sizeof *epk->fine);
            status = pk__epk_rule(epk, 0, 1, rule == PK_RULE_GAUSS ? pk__max(options->quadrature.nodes, 1) : 1,
                                  epk->fine);
            pk__epk_add(epk, epk->fine);
        }
        if (status)
            return status;
    }
    return PK_OK;
}

static void pk__epk_take(pk__arena *arena, pk__epk *epk, size_t numbers)
{
    const size_t P = epk->run->parameters, N = epk->run->examples, width = epk->run->graph.input_width;
    pk_real **const vector[] = {&epk->w, &epk->next, &epk->at, &epk->direction};
    for (size_t i = 0; i < 4; i++)
        *vector[i] = pk__arena_take(arena, P, sizeof(pk_real));
    epk->part = pk__arena_take(arena, numbers, sizeof(pk_real));
    epk->coarse = pk__arena_take(arena, numbers, sizeof(double));
    epk->fine = pk__arena_take(arena, numbers, sizeof(double));
    epk->nodes = pk__arena_take(arena, PK__EPK_NODES, sizeof(double));
    epk->weights = pk__arena_take(arena, PK__EPK_NODES, sizeof(double));
    epk->c = pk__arena_take(arena, N, sizeof(double));
    pk__epk_side *const sides[] = {&epk->x, &epk->y};
    for (size_t i = 0; i < 2; i++) {
        if (!sides[i]->train) {
            size_t count = 0;
            if (!epk->kinks)
                continue;
            if (!pk__multiply(sides[i]->rows.rows, epk->run->outputs, &count))
                arena->overflow = 1;
            sides[i]->start = pk__arena_take(arena, count, sizeof(pk_real));
            sides[i]->end = pk__arena_take(arena, count, sizeof(pk_real));
            sides[i]->tangent = pk__arena_take(arena, count, sizeof(pk_real));
            sides[i]->change = pk__arena_take(arena, count, sizeof(double));
            continue;
        }
        sides[i]->item = pk__arena_take(arena, N, sizeof(int64_t));
        sides[i]->factor = pk__arena_take(arena, N, sizeof(double));
        sides[i]->rows = pk_matrix_view(pk__arena_take(arena, N, width * sizeof(pk_real)), N, width);
    }
}

static pk_status pk__epk_check(pk_context *context, const pk_run *run, const pk_epk_options *options,
                               const double *gram)
{
    if (!run || !run->weights.data || !options || !gram)
        return pk__fail(context, PK_ARGUMENT, "epk: the run, the options or the result are missing");
    if (options->outputs != PK_EPK_TRACE && options->outputs != PK_EPK_FULL)
        return pk__fail(context, PK_ARGUMENT, "epk: outputs is %d, neither PK_EPK_TRACE nor PK_EPK_FULL",
                        options->outputs);
    const pk_quadrature rule = options->quadrature;
    if ((rule.rule != PK_RULE_AUTO && rule.rule != PK_RULE_GAUSS && rule.rule != PK_RULE_LEFT) ||
        (rule.rule == PK_RULE_GAUSS && (rule.nodes < 0 || rule.nodes > PK__EPK_NODES)))
        return pk__fail(context, PK_ARGUMENT,
                        "epk: rule %d with %d nodes is none of auto, left, gauss with at most %d",
                        (int)rule.rule, rule.nodes, (int)PK__EPK_NODES);
    if (!(options->tolerance >= 0 && options->tolerance < 1))
        return pk__fail(context, PK_ARGUMENT, "epk: the tolerance %g is not in [0, 1)", options->tolerance);
    for (size_t k = 0; options->steps && k < options->step_count; k++)
        if (options->steps[k] >= run->steps)
            return pk__fail(context, PK_ARGUMENT, "epk: step %zu of a run of %zu steps", options->steps[k],
                            run->steps);
    return PK_OK;
}

PK_API pk_status pk_kernel_epk(pk_context *context, const pk_run *run, pk_matrix x, pk_matrix y,
                               const pk_epk_options *options, double *gram, pk_epk_report *report)
{
    pk_status status = pk__epk_check(context, run, options, gram);
    if (status)
        return status;
    pk_epk_options own = *options;
    pk__epk epk;
    pk_replay replay;
    void *block = NULL;
    memset(&epk, 0, sizeof epk);
    memset(&replay, 0, sizeof replay);
    if (!(own.tolerance > 0))
        own.tolerance = sizeof(pk_real) == sizeof(float) ? 1e-4 : 1e-10;
    epk.context = context, epk.run = run, epk.options = &own;
    epk.kept = own.outputs == PK_EPK_FULL ? run->outputs : 1;
    epk.x.train = own.x_train;
    epk.y.train = own.y_train || (own.x_train && !y.data);
    epk.x.largest = epk.y.largest = 1;
    for (size_t n = 1; n < run->graph.node_count; n++)
        epk.kinks |= run->graph.nodes[n].operation->switch_count != NULL;
    epk.x.rows = x;
    epk.y.rows = y.data ? y : x;
    for (int side = 0; side < 2 && !status; side++)
        if (!(side ? &epk.y : &epk.x)->train)
            status =
                pk__sweep_matrix(context, "epk", side ? "second inputs" : "first inputs", side ? epk.y.rows : x,
                                 (side ? epk.y.rows : x).rows, run->graph.input_width);
    if (status)
        return status;
    size_t rows = 0, numbers = 0;
    const int fits = pk__multiply(epk.x.train ? run->examples : epk.x.rows.rows, epk.kept, &rows) &&
                     pk__multiply(epk.y.train ? run->examples : epk.y.rows.rows, epk.kept, &epk.columns) &&
                     pk__multiply(rows, epk.columns, &numbers) && numbers <= SIZE_MAX / sizeof(double);
    pk__arena measured = {NULL, 0, 0, !fits};
    pk__epk_take(&measured, &epk, numbers);
    if (measured.overflow)
        return pk__fail(context, PK_OVERFLOW, "epk: the memory of a kernel of so many rows overflows");
    status = pk_allocate(context, measured.used, 1, "the path kernel", &block);
    if (!status)
        status = pk_replay_prepare(context, run, 1, &replay);
    if (!status) {
        pk__arena arena = {block, measured.used, 0, 0};
        pk__epk_take(&arena, &epk, numbers);
        epk.gram = gram;
        memset(gram, 0, numbers * sizeof *gram);
        status = pk__epk_steps(&epk, &replay);
        double largest = 0;
        for (size_t i = 0; i < numbers; i++)
            largest = fmax(largest, fabs(gram[i]));
        epk.report.error = largest > 0 ? epk.report.error / largest : 0;
        if (report)
            *report = epk.report;
        if (!status && epk.report.error > own.tolerance)
            status = pk__fail(context, PK_NOT_CLOSED,
                              "epk: the integrals are off by %.3g of the largest entry, not %.3g",
                              epk.report.error, own.tolerance);
    }
    pk_replay_release(context, &replay);
    pk_release(context, block);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
