/* pathkernel/attribution/compare.h: how well cheaper rules approximate the exact decomposition of a recorded run on given
 * inputs: how much of the change of the outputs each of them misses, and whether it ranks the training examples as the
 * exact one does.
 *
 * A decomposition takes the derivatives J = df/dw of the test rows along each step, and the gradients J' dl/df of the examples at
 * w_s. Other rules take them elsewhere. With w_s(t) = w_s + t D_s and an optimizer without state, of learning rate eta,
 *
 *     left            < J(w_s, x),    J(w_s, x_i)'    dl/df(w_s) >                     (TracIn of every step)
 *     segment         integral over t of < J(w_s(t), x), J(w_s(t), x_i)' dl/df(w_s) >
 *     path_integral   integral over t of < J(w_s(t), x), J(w_s(t), x_i)' dl/df(w_s(t)) >
 *     trapezoid       the integrand of path_integral: the mean of t = 0 and t = 1
 *     midpoint        < J(w_s(1/2), x), J(w_s, x_i)'  dl/df(w_s) >
 *     checkpoints     left, of ten steps only, times S / 10
 *     linear_start    < J(w_0, x),    J(w_s, x_i)'    dl/df(w_s) >
 *     linear_end      < J(w_S, x),    J(w_s, x_i)'    dl/df(w_s) >
 *     telescoping     < J(w_s, x), D_s >, which is not divided among examples
 *     exact           integral over t of < J(w_s(t), x), J(w_s, x_i)' dl/df(w_s) >     (pk_decompose)
 *
 * each times - eta_s c_{s,i} (but for telescoping) and summed over the steps. For the other optimizers see pk_compare.
 */
#ifndef PATHKERNEL_COMPARE_H
#define PATHKERNEL_COMPARE_H
#include "../math/measure.h"
#include "../training/derivatives.h"
#include "decompose.h"

/* >>> declarations */
PK__BEGIN_C

enum { PK_COMPARE_RULES = 10 };

typedef struct pk_comparison {
    const char *rule; /* its name in the list above, a string constant */
    /* The largest and the median of |f_S - f_0 - sum| over all rows and outputs. The sum is that of the contributions of
     * the examples, of decay and of the unattributed part. */
    double residual_max, residual_median;
    /* Spearman's rank correlation of the contributions to one row and output, over all N training examples, with the exact ones,
     * equal ones having the mean of their ranks; averaged over the rows and outputs. Where the exact contributions are all equal
     * there is no order to be found, and the row and output are left out; where only the rule's are, the correlation is 0. NAN:
     * there is none (telescoping; or all rows and outputs are left out, as with one training example). */
    double spearman;
    /* for all decompositions that the rule needs, including those that it shares with other rules */
    double seconds;
} pk_comparison;

/* Compares the ten rules in the order of the list above for all outputs f(w_S, inputs) of a run; inputs: rows x input width.
 *
 * Each uses the optimizer's linear form D_s = sum_i D_{s,i} + decay + u_s, the one of pk_decompose: momenta, Adam's
 * divisors,
 * groups, clipping, decay and the unattributed u_s are those of the run. Their inner products with J give the rule's sum. Where a
 * rule moves the examples' gradients to w_s(t), a step takes all earlier gradients that its momentum holds, those of w_{s'}, at
 * w_{s'}(t) with the same t; decay takes w_s as it was. checkpoints takes J of the test rows in the steps floor(k S / 10), k = 0
 * .. 9, only (in all of them where there are at most ten); the gradients of all steps that these steps' momenta hold count.
 *
 * The two integrals over t are Clenshaw-Curtis sums with 3, 5, 9, 17, 33 points, of each row until the contributions to it differ
 * from those of the sum before by at most 1e-10 (float: 1e-5) of the largest. Contributions of networks or losses with kinks jump
 * in t, where no number of points brings that about: small runs (where it takes at most 1e10 flops) then have a trapezoid sum of up
 * to 512 equal parts, at least 64, which may be off by 1 / 1024, or 1 / 128, of each jump; others stay with the 33 points and are off
 * by at most a twentieth of each. Errors of the steps cancel in part.
 *
 * PK_NOT_CLOSED and PK_UNATTRIBUTED as pk_decompose, for the exact rule; the rules are filled in then. After all others they are
 * not. Same bits for any number of threads and any memory limit, but for the seconds. Cost: about 8 decompositions, and for each
 * of the two integrals 3 to 31 more, in small runs with kinks up to 542. Memory: beside that of one decomposition eight times rows
 * x outputs x examples doubles, for as many rows as the limit allows, or as 1 GiB holds; where that is not all of them, each part
 * goes through the run again. */
PK_API PK__MUST_USE pk_status pk_compare(pk_context *context, const pk_run *run, pk_matrix inputs,
                                         pk_comparison rules[PK_COMPARE_RULES]);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_COMPARE_IMPLEMENTED)
#define PATHKERNEL_COMPARE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_COLD_CODE

enum {
    PK__COMPARE_LEFT,
    PK__COMPARE_SEGMENT,
    PK__COMPARE_PATH_INTEGRAL,
    PK__COMPARE_TRAPEZOID,
    PK__COMPARE_MIDPOINT,
    PK__COMPARE_CHECKPOINTS,
    PK__COMPARE_LINEAR_START,
    PK__COMPARE_LINEAR_END,
    PK__COMPARE_TELESCOPING,
    PK__COMPARE_EXACT
};
static const char *const pk__compare_names[PK_COMPARE_RULES] = {
    "left",        "segment",      "path_integral", "trapezoid",   "midpoint",
    "checkpoints", "linear_start", "linear_end",    "telescoping", "exact"};

/* The sums over t have 2, 4, ... intervals, and each contains the points of the one before it. PK__COMPARE_STEPS: steps of
 * the rule checkpoints. PK__COMPARE_TABLES: tables of contributions in memory besides that of a decomposition, which are
 * the exact ranks, left, and a sum for each level. */
enum {
    PK__COMPARE_LEVELS = 5,
    PK__COMPARE_INTERVALS = 1 << PK__COMPARE_LEVELS,
    PK__COMPARE_FINE = 512, /* the most and (below) the fewest equal parts of a step with kinks */
    PK__COMPARE_COARSE = 64,
    PK__COMPARE_STEPS = 10,
    PK__COMPARE_TABLES = 2 + PK__COMPARE_LEVELS
};
#define PK__COMPARE_AGREEMENT (sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-10)
#define PK__COMPARE_MEMORY ((size_t)1 << 30)
#define PK__COMPARE_FLOPS 1e10 /* the most flops that equal parts may take */

typedef struct pk__comparing {
    pk_context *context;
    const pk_run *run;
    pk_matrix inputs;
    pk_comparison *rules;
    pk_decompose_options options;
    pk__approximation how;
    size_t outputs, examples, cells;       /* cells: rows x outputs */
    size_t fine;                           /* equal parts of a step of a network with kinks; 0: none */
    double *residual, *correlation;        /* rules x cells */
    unsigned char *unordered;              /* cells: the exact contributions are all equal */
    pk_real *first_weights, *last_weights; /* graph->untied: w_0, w_S */
    /* Of the rows first .. first + rows - 1, at most `most`: */
    size_t most, first, rows;
    double *ranks, *left, *sum[PK__COMPARE_LEVELS];   /* rows x outputs x examples */
    double *left_missed, *missed[PK__COMPARE_LEVELS]; /* rows x outputs: f_S - f_0 minus the sum */
    unsigned char *settled;                           /* rows: the level whose sum is taken; 0: none yet */
    double *order;                                    /* threads x examples: ranks of a rule */
    pk__ranked *sorted;                               /* threads x examples, or cells */
    int threads;
    /* The caller's progress function, and what was reported to it: */
    int (*progress)(void *user, const char *phase, double fraction);
    void *progress_user;
    double done, share, reached;
    pk_status verdict; /* of the exact decompositions; its message: */
    char message[PK_MESSAGE_SIZE];
} pk__comparing;

/* ---- order ----------------------------------------------------------------------------------------------- */

/* The correlation of two vectors of ranks; 0 where those of b are all equal, NAN where all of a are. */
static double pk__compare_rank_correlation(size_t count, const double *a, const double *b)
{
    double aa = 0, bb = 0, ab = 0;
    for (size_t i = 0; i < count; i++) {
        aa += a[i] * a[i];
        bb += b[i] * b[i];
        ab += a[i] * b[i];
    }
    return aa == 0 ? (double)NAN : bb == 0 ? 0 : ab / sqrt(aa * bb);
}

/* ---- one rule on some rows ------------------------------------------------------------------------------- */

/* Computes the residuals and correlations of a rule on the rows. */
static void pk__compare_score(pk__comparing *c, int rule, const double *contributions, const double *missed)
{
    const size_t N = c->examples, cells = c->rows * c->outputs, first = c->first * c->outputs;
    double *residual = c->residual + (size_t)rule * c->cells + first;
    double *correlation = c->correlation + (size_t)rule * c->cells + first;
    pk__team team = pk__team_of(c->context, c->threads, cells);
    PK__PARALLEL(team)
    for (size_t cell = pk__first_task(&team); cell < cells; cell = pk__next_task(&team)) {
        double *exact = c->ranks + cell * N, *own = c->order + (size_t)pk__thread() * N;
        pk__ranked *sorted = c->sorted + (size_t)pk__thread() * N;
        residual[cell] = fabs(missed[cell]);
        if (rule == PK__COMPARE_EXACT)
            own = exact;
        pk__rank(N, contributions + cell * N, sorted, own);
        correlation[cell] = pk__compare_rank_correlation(N, exact, own);
        if (rule == PK__COMPARE_EXACT) {
            int equal = 1;
            for (size_t i = 0; i < N; i++)
                equal &= exact[i] == 0;
            c->unordered[first + cell] = (unsigned char)equal;
        }
    }
    pk__team_end(&team);
}

/* Decomposes the rows as c->how says. The caller releases *out. */
static pk_status pk__compare_decompose(pk__comparing *c, pk_decomposition *out)
{
    const pk_matrix inputs = {c->inputs.data + c->first * c->inputs.ld, c->rows, c->inputs.cols, c->inputs.ld};
    c->how.rows = c->inputs.rows;
    return pk_decompose(c->context, c->run, inputs, &c->options, out);
}

/* The rules that need one decomposition. */
static pk_status pk__compare_one(pk__comparing *c, int rule, pk_decomposition *out)
{
    memset(&c->how, 0, sizeof c->how);
    c->how.at_one_point = rule != PK__COMPARE_EXACT;
    if (rule == PK__COMPARE_MIDPOINT)
        c->how.at = 0.5;
    else if (rule == PK__COMPARE_CHECKPOINTS)
        c->how.chosen = pk__min(c->run->steps, PK__COMPARE_STEPS);
    else if (rule == PK__COMPARE_LINEAR_START)
        c->how.weights = c->first_weights;
    else if (rule == PK__COMPARE_LINEAR_END)
        c->how.weights = c->last_weights;
    pk_status status = pk__compare_decompose(c, out);
    if (rule == PK__COMPARE_EXACT && (status == PK_NOT_CLOSED || status == PK_UNATTRIBUTED)) {
        if (!c->verdict) {
            c->verdict = status;
            snprintf(c->message, sizeof c->message, "%s%s",
                     c->most < c->inputs.rows ? "in a part of the rows: " : "", pk_message(c->context));
        }
        status = PK_OK;
    }
    if (!status) {
        c->rules[rule].seconds += out->seconds;
        pk__compare_score(c, rule, out->by_example, out->closure);
    }
    return status;
}

/* Point number j of a sum of count intervals, and its weight (Clenshaw and Curtis 1960). */
static double pk__compare_clenshaw_curtis(size_t count, size_t j, double *weight)
{
    const double pi = 3.14159265358979323846, n = (double)count;
    double sum = 1;
    for (size_t k = 1; k <= count / 2; k++)
        sum -= (2 * k == count ? 1.0 : 2.0) / (4.0 * (double)k * (double)k - 1) *
               cos(2 * pi * (double)(j * k % count) / n);
    *weight = (j == 0 || j == count ? 0.5 : 1.0) * sum / n;
    const double sine = sin(0.5 * pi * (double)j / n);
    return j == count ? 1 : sine * sine;
}

static void pk__compare_add_weighted(pk__comparing *c, int level, double weight, const double *contributions,
                                     const double *missed)
{
    const size_t cells = c->rows * c->outputs, numbers = cells * c->examples;
    for (size_t i = 0; i < numbers; i++)
        c->sum[level][i] += weight * contributions[i];
    for (size_t i = 0; i < cells; i++)
        c->missed[level][i] += weight * missed[i];
}

static void pk__compare_clear_sum(pk__comparing *c, int level)
{
    const size_t cells = c->rows * c->outputs;
    memset(c->sum[level], 0, cells * c->examples * sizeof(double));
    memset(c->missed[level], 0, cells * sizeof(double));
}

/* Adds the contributions at point j of PK__COMPARE_INTERVALS to the sums of all levels that have it. */
static void pk__compare_add_point(pk__comparing *c, size_t j, const double *contributions, const double *missed)
{
    for (int level = 0; level < PK__COMPARE_LEVELS; level++) {
        const size_t intervals = (size_t)2 << level, apart = PK__COMPARE_INTERVALS / intervals;
        double weight;
        if (j % apart)
            continue;
        (void)pk__compare_clenshaw_curtis(intervals, j / apart, &weight);
        pk__compare_add_weighted(c, level, weight, contributions, missed);
    }
}

/* Settles the rows whose sum agrees with that of the level before; returns how many rows are not settled. */
static size_t pk__compare_settle(pk__comparing *c, int level)
{
    const size_t numbers = c->outputs * c->examples;
    size_t left = 0;
    for (size_t row = 0; row < c->rows; row++) {
        const double *now = c->sum[level] + row * numbers, *before = c->sum[level - 1] + row * numbers;
        double largest = 0, difference = 0;
        for (size_t i = 0; i < numbers; i++) {
            largest = fmax(largest, fabs(now[i]));
            difference = fmax(difference, fabs(now[i] - before[i]));
        }
        if (!c->settled[row] && difference <= PK__COMPARE_AGREEMENT * largest)
            c->settled[row] = (unsigned char)level;
        left += !c->settled[row];
    }
    return left;
}

/* Computes the contributions at one point, and adds them by pk__compare_add_point or, with a weight, to the sum of one
 * level. */
static pk_status pk__compare_take_point(pk__comparing *c, int rule, double t, size_t j, double weight)
{
    pk_decomposition point;
    memset(&c->how, 0, sizeof c->how);
    c->how.at_one_point = c->how.examples_move = 1;
    c->how.seeds_stay = rule == PK__COMPARE_SEGMENT;
    c->how.at = c->how.examples_at = t;
    pk_status status = pk__compare_decompose(c, &point);
    if (!status) {
        c->rules[rule].seconds += point.seconds;
        if (weight != 0)
            pk__compare_add_weighted(c, 0, weight, point.by_example, point.closure);
        else
            pk__compare_add_point(c, j, point.by_example, point.closure);
    }
    pk_decomposition_release(c->context, &point);
    c->done += c->share;
    return status;
}

/* The integral over t of the contributions whose examples move, too: segment, or with what is known of its end (its
 * contributions at t = 1) path_integral. left is its start. */
static pk_status pk__compare_integral(pk__comparing *c, int rule, const pk_decomposition *end)
{
    const size_t numbers = c->outputs * c->examples, fine = c->fine;
    const int last = PK__COMPARE_LEVELS - 1;
    size_t left = c->rows;
    pk_status status = PK_OK;
    memset(c->settled, 0, c->rows);
    for (int level = 0; level <= last; level++)
        pk__compare_clear_sum(c, level);
    pk__compare_add_point(c, 0, c->left, c->left_missed);
    if (end)
        pk__compare_add_point(c, PK__COMPARE_INTERVALS, end->by_example, end->closure);
    c->share /= (double)(PK__COMPARE_INTERVALS + fine);
    for (int level = 0; !status && left && level <= last; level++) {
        const size_t intervals = (size_t)2 << level, apart = PK__COMPARE_INTERVALS / intervals;
        /* The odd points are new in a level; in the first level the last one, too. */
        for (size_t j = 1; !status && j <= intervals; j++) {
            double weight;
            if (j % 2 == 1 || (level == 0 && j == intervals && !end))
                status = pk__compare_take_point(c, rule, pk__compare_clenshaw_curtis(intervals, j, &weight),
                                                j * apart, 0);
        }
        left = level > 0 && !status ? pk__compare_settle(c, level) : left;
    }
    /* Where the integrand jumps, no rule is better than equal parts. */
    if (!status && left && fine) {
        const double part = 1 / (double)fine;
        pk__compare_clear_sum(c, 0);
        pk__compare_add_weighted(c, 0, part / 2, c->left, c->left_missed);
        if (end)
            pk__compare_add_weighted(c, 0, part / 2, end->by_example, end->closure);
        for (size_t j = 1; !status && j < fine + !end; j++)
            status = pk__compare_take_point(c, rule, (double)j * part, 0, j < fine ? part : part / 2);
    }
    for (size_t row = 0; !status && row < c->rows; row++) {
        const int level = c->settled[row] ? c->settled[row] : fine ? 0 : last;
        if (level == last)
            continue;
        memcpy(c->sum[last] + row * numbers, c->sum[level] + row * numbers, numbers * sizeof(double));
        memcpy(c->missed[last] + row * c->outputs, c->missed[level] + row * c->outputs,
               c->outputs * sizeof(double));
    }
    if (!status)
        pk__compare_score(c, rule, c->sum[last], c->missed[last]);
    return status;
}

/* The rules trapezoid and path_integral, which both need the contributions at t = 1. */
static pk_status pk__compare_ends(pk__comparing *c)
{
    const size_t cells = c->rows * c->outputs, numbers = cells * c->examples;
    pk_decomposition end;
    memset(&c->how, 0, sizeof c->how);
    c->how.at_one_point = c->how.examples_move = 1;
    c->how.at = c->how.examples_at = 1;
    pk_status status = pk__compare_decompose(c, &end);
    if (!status) {
        for (size_t i = 0; i < numbers; i++)
            c->sum[0][i] = 0.5 * (c->left[i] + end.by_example[i]);
        for (size_t i = 0; i < cells; i++)
            c->missed[0][i] = 0.5 * (c->left_missed[i] + end.closure[i]);
        pk__compare_score(c, PK__COMPARE_TRAPEZOID, c->sum[0], c->missed[0]);
        c->rules[PK__COMPARE_TRAPEZOID].seconds += end.seconds;
        c->rules[PK__COMPARE_PATH_INTEGRAL].seconds += end.seconds;
        status = pk__compare_integral(c, PK__COMPARE_PATH_INTEGRAL, &end);
    }
    pk_decomposition_release(c->context, &end);
    return status;
}

/* All rules but telescoping on the rows first .. first + rows - 1. */
static pk_status pk__compare_rows(pk__comparing *c, double done, double share)
{
    /* exact first: the others are compared with it; then left, which others share. */
    static const int order[] = {PK__COMPARE_EXACT,       PK__COMPARE_LEFT,         PK__COMPARE_MIDPOINT,
                                PK__COMPARE_CHECKPOINTS, PK__COMPARE_LINEAR_START, PK__COMPARE_LINEAR_END,
                                PK__COMPARE_SEGMENT,     PK__COMPARE_PATH_INTEGRAL};
    static const double parts[] = {
        2, 1, 1, 1, 1, 1, 8, 8, 23}; /* approximate shares of the time; the last number is their sum */
    const size_t cells = c->rows * c->outputs, numbers = cells * c->examples;
    double left = 0;
    pk_status status = PK_OK;
    for (size_t i = 0; !status && i < sizeof order / sizeof *order; i++) {
        c->share = share * parts[i] / parts[8];
        c->done = done;
        done += c->share;
        if (order[i] == PK__COMPARE_SEGMENT || order[i] == PK__COMPARE_PATH_INTEGRAL) {
            c->rules[order[i]].seconds += left;
            c->rules[PK__COMPARE_TRAPEZOID].seconds += order[i] == PK__COMPARE_SEGMENT ? left : 0;
            status =
                order[i] == PK__COMPARE_SEGMENT ? pk__compare_integral(c, order[i], NULL) : pk__compare_ends(c);
            continue;
        }
        pk_decomposition one;
        status = pk__compare_one(c, order[i], &one);
        if (!status && order[i] == PK__COMPARE_LEFT) {
            memcpy(c->left, one.by_example, numbers * sizeof(double));
            memcpy(c->left_missed, one.closure, cells * sizeof(double));
            left = one.seconds;
        }
        pk_decomposition_release(c->context, &one);
    }
    return status;
}

/* ---- telescoping ----------------------------------------------------------------------------------------- */

/* missed += sign f(w, x), or sign J(w, x) d where d is there, of all rows, piece by piece. */
static pk_status pk__compare_telescope_step(pk__comparing *c, const pk_real *w, const pk_real *d, double sign,
                                            size_t piece, pk_real *part, double *missed)
{
    const pk_matrix none = {NULL, 0, 0, 0};
    const pk_graph *graph = &c->run->graph;
    for (size_t first = 0; first < c->inputs.rows; first += piece) {
        const size_t rows = pk__min(piece, c->inputs.rows - first), C = c->outputs;
        const pk_matrix inputs = {c->inputs.data + first * c->inputs.ld, rows, c->inputs.cols, c->inputs.ld};
        const pk_matrix out = pk_matrix_view(part, rows, C);
        pk_status status = d ? pk_jvp(c->context, graph, w, inputs, d, none, out)
                             : pk_graph_evaluate(c->context, graph, w, inputs, out);
        if (status)
            return pk__prefix(c->context, status, "compare: ");
        for (size_t i = 0; i < rows * C; i++)
            missed[first * C + i] += sign * (double)part[i];
    }
    return PK_OK;
}

/* f_S - f_0 - sum_s J(w_s, x) D_s. w, next, d: P numbers. */
static pk_status pk__compare_telescope_run(pk__comparing *c, pk_replay *replay, size_t piece, pk_real *w,
                                           pk_real *next, pk_real *d, pk_real *part)
{
    const size_t P = c->run->parameters, steps = c->run->steps;
    const pk_graph *graph = &c->run->graph;
    double *missed = c->residual + (size_t)PK__COMPARE_TELESCOPING * c->cells;
    memset(missed, 0, c->cells * sizeof *missed);
    pk_status status = pk_replay_weights(c->context, replay, 0, next);
    if (!status)
        status = pk__compare_telescope_step(c, next, NULL, -1, piece, part, missed);
    if (!status)
        pk_graph_untie(graph, next, c->first_weights);
    for (size_t s = 0; !status && s < steps; s++) {
        memcpy(w, next, P * sizeof *w);
        status = pk__progress(c->context, "comparing", (double)s / (double)steps);
        if (!status)
            status = pk_replay_weights(c->context, replay, s + 1, next);
        for (size_t p = 0; !status && p < P; p++)
            d[p] = next[p] - w[p];
        if (!status)
            status = pk__compare_telescope_step(c, w, d, -1, piece, part, missed);
    }
    if (!status)
        status = pk__compare_telescope_step(c, next, NULL, 1, piece, part, missed);
    if (status)
        return status;
    pk_graph_untie(graph, next, c->last_weights);
    for (size_t i = 0; i < c->cells; i++)
        missed[i] = fabs(missed[i]);
    return PK_OK;
}

/* The rule telescoping. It also stores w_0 and w_S, which the linear rules need. */
static pk_status pk__compare_telescope(pk__comparing *c)
{
    const size_t P = c->run->parameters, rows = c->inputs.rows;
    /* The number of rows at a time is what one thread's tape holds in some MB. It does not depend on the memory limit, so
     * that the bits do not either. */
    const size_t few = pk__example_rows(&c->run->graph), piece = few < 64 ? few : rows;
    const double start = pk__seconds();
    pk_real *w, *next, *direction, *f;
    pk_replay replay;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        w = pk__arena_take(&arena, P, sizeof *w);
        next = pk__arena_take(&arena, P, sizeof *next);
        direction = pk__arena_take(&arena, P, sizeof *direction);
        f = pk__arena_take(&arena, piece, c->outputs * sizeof *f);
    } while (pk__arena_again(c->context, &arena, "telescoping", &status));
    memset(&replay, 0, sizeof replay);
    if (!status)
        status = pk_replay_prepare(c->context, c->run, 0, &replay);
    if (!status)
        status = pk__compare_telescope_run(c, &replay, piece, w, next, direction, f);
    if (status == PK_MEMORY_LIMIT && piece == rows &&
        rows > 64) /* as many rows at a time as one thread takes */
        status = pk__compare_telescope_run(c, &replay, 64, w, next, direction, f);
    pk_replay_release(c->context, &replay);
    pk_release(c->context, arena.base);
    c->rules[PK__COMPARE_TELESCOPING].seconds = pk__seconds() - start;
    return status;
}

/* ---- all rows -------------------------------------------------------------------------------------------- */

/* Turns the progress of one decomposition into that of the comparison, which never goes back, even if a decomposition goes
 * through the run twice. */
static int pk__compare_progress(void *user, const char *phase, double fraction)
{
    pk__comparing *c = user;
    const double now = c->done + c->share * fraction;
    (void)phase;
    c->reached = now > c->reached ? now < 1 ? now : 1 : c->reached;
    return c->progress(c->progress_user, "comparing", c->reached);
}

/* Takes the arrays for all rows. */
static void pk__compare_take(pk__arena *arena, pk__comparing *c)
{
    const size_t threads = (size_t)c->threads;
    size_t sorted = 0;
    if (!pk__multiply(c->inputs.rows, c->outputs, &c->cells) || !pk__multiply(threads, c->examples, &sorted))
        arena->overflow = 1;
    c->residual = pk__arena_take(arena, c->cells, PK_COMPARE_RULES * sizeof *c->residual);
    c->correlation = pk__arena_take(arena, c->cells, PK_COMPARE_RULES * sizeof *c->correlation);
    c->unordered = pk__arena_take(arena, c->cells, sizeof *c->unordered);
    c->order = pk__arena_take(arena, threads, c->examples * sizeof *c->order);
    c->sorted = pk__arena_take(arena, pk__max(sorted, c->cells), sizeof *c->sorted);
    c->first_weights = pk__arena_take(arena, c->run->graph.untied, sizeof *c->first_weights);
    c->last_weights = pk__arena_take(arena, c->run->graph.untied, sizeof *c->last_weights);
}

/* Takes the tables of `most` rows. */
static void pk__compare_tables_take(pk__arena *arena, pk__comparing *c)
{
    size_t numbers = 0;
    if (!pk__multiply(c->most * c->outputs, c->examples, &numbers))
        arena->overflow = 1;
    c->ranks = pk__arena_take(arena, numbers, sizeof(double));
    c->left = pk__arena_take(arena, numbers, sizeof(double));
    c->left_missed = pk__arena_take(arena, c->most, c->outputs * sizeof(double));
    for (int level = 0; level < PK__COMPARE_LEVELS; level++) {
        c->sum[level] = pk__arena_take(arena, numbers, sizeof(double));
        c->missed[level] = pk__arena_take(arena, c->most, c->outputs * sizeof(double));
    }
    c->settled = pk__arena_take(arena, c->most, 1);
}

/* Chooses how many rows are compared together (whole blocks), and takes their tables. */
static pk_status pk__compare_tables(pk__comparing *c, size_t block, void **tables)
{
    const size_t limit = c->context ? c->context->memory_limit : 0,
                 held = c->context ? c->context->memory_used : 0;
    const size_t room = !limit ? PK__COMPARE_MEMORY : limit > held ? (limit - held) / 2 : 0;
    const double row =
        (double)(PK__COMPARE_TABLES + 1) * sizeof(double) * (double)c->outputs * (double)c->examples;
    const double blocks = floor((double)room / row / (double)block);
    /* The settings whose plan needs the most memory of all rules. */
    memset(&c->how, 0, sizeof c->how);
    c->how.at_one_point = c->how.examples_move = 1;
    c->how.rows = c->inputs.rows;
    c->most = blocks * (double)block < (double)c->inputs.rows ? (size_t)blocks * block : c->inputs.rows;
    for (c->most = pk__max(c->most, pk__min(block, c->inputs.rows));;) {
        pk__arena arena = {NULL, 0, 0, 0};
        pk_plan plan;
        pk_status status;
        do
            pk__compare_tables_take(&arena, c);
        while (pk__arena_again(c->context, &arena, "the contributions that are compared", &status));
        if (!status)
            status = pk_decompose_plan(c->context, c->run, c->most, &c->options, 0, &plan);
        *tables = arena.base;
        if (!status)
            return PK_OK;
        pk_release(c->context, *tables);
        *tables = NULL;
        if (status != PK_MEMORY_LIMIT || c->most <= block)
            return pk__prefix(c->context, status, "compare: ");
        c->most = pk__blocks(pk__blocks(c->most, block), 2) * block;
    }
}

/* The number of equal parts into which a step is cut if its kinks keep the sums from agreeing. It depends on shapes alone. */
static size_t pk__compare_parts(const pk__job *job)
{
    const pk_run *run = job->run;
    const pk_graph *graph = job->graph;
    const double P = (double)graph->untied, C = (double)run->outputs, M = (double)job->inputs.rows;
    const double S = (double)run->steps, items = S > 0 ? (double)run->batch_offsets[run->steps] : 0;
    double widths = 0;
    int kinks = pk__criterion_kinks(&run->criterion, 1) > 0;
    for (size_t n = 1; n < graph->node_count; n++)
        kinks |= pk__is_switch(&graph->nodes[n]);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        widths += (double)node->width + (double)pk__layer_input(graph, node)->width;
    }
    const double work =
        18 * P * items + (4 + 6 * C) * P * S * M + 2 * (job->reverse ? P : widths) * C * items * M;
    size_t parts = kinks ? PK__COMPARE_FINE : 0;
    while (parts >= PK__COMPARE_COARSE && (double)parts * work > PK__COMPARE_FLOPS)
        parts /= 2;
    return parts >= PK__COMPARE_COARSE ? parts : 0;
}

/* Computes the largest, the median and the mean over the rows and outputs. */
static void pk__compare_summarize(pk__comparing *c, int rule)
{
    const double *residual = c->residual + (size_t)rule * c->cells;
    const double *correlation = c->correlation + (size_t)rule * c->cells;
    pk_comparison *to = &c->rules[rule];
    double sum = 0;
    size_t ordered = 0;
    for (size_t i = 0; i < c->cells; i++) {
        c->sorted[i] = (pk__ranked){residual[i], i};
        ordered += !c->unordered[i];
        sum += c->unordered[i] ? 0 : correlation[i];
    }
    pk__sort_ranked(c->cells, c->sorted);
    to->residual_max = c->sorted[c->cells - 1].value;
    to->residual_median = 0.5 * (c->sorted[(c->cells - 1) / 2].value + c->sorted[c->cells / 2].value);
    to->spearman = ordered && rule != PK__COMPARE_TELESCOPING ? sum / (double)ordered : (double)NAN;
}

static pk_status pk__compare_all(pk__comparing *c)
{
    pk__job *job = NULL;
    void *tables = NULL;
    c->done = 0;
    c->share = 0.02;
    pk_status status = pk__compare_telescope(c);
    if (!status) /* which tells how the rows are cut into blocks */
        status = pk_allocate(c->context, 1, sizeof *job, "a plan", &job);
    if (!status) {
        pk__job_begin(job, c->context, c->run, c->inputs, &c->options);
        const size_t block = job->block;
        c->fine = pk__compare_parts(job);
        pk_release(c->context, job);
        status = pk__compare_tables(c, block, &tables);
    }
    for (c->first = 0; !status && c->first < c->inputs.rows; c->first += c->rows) {
        const double rows = (double)c->inputs.rows;
        c->rows = pk__min(c->most, c->inputs.rows - c->first);
        status = pk__compare_rows(c, 0.02 + 0.98 * (double)c->first / rows, 0.98 * (double)c->rows / rows);
    }
    for (int rule = 0; !status && rule < PK_COMPARE_RULES; rule++)
        pk__compare_summarize(c, rule);
    pk_release(c->context, tables);
    c->done = 1;
    c->share = 0;
    return status ? status : pk__progress(c->context, "comparing", 1);
}

PK_API pk_status pk_compare(pk_context *context, const pk_run *run, pk_matrix inputs,
                            pk_comparison rules[PK_COMPARE_RULES])
{
    if (!run || !run->weights.data || !rules)
        return pk__fail(context, PK_ARGUMENT, "compare: the run or the place for the rules is missing");
    pk_status status = pk__check_inputs(context, run, inputs);
    if (status)
        return pk__prefix(context, status, "compare: ");
    pk__comparing comparing, *c = &comparing;
    memset(c, 0, sizeof *c);
    c->context = context;
    c->run = run;
    c->inputs = inputs;
    c->rules = rules;
    c->outputs = run->outputs;
    c->examples = run->examples;
    c->threads = pk_threads(context);
    c->options.keep[0] = PK_BY_EXAMPLE;
    c->options.approximation = &c->how;
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++)
        rules[rule] = (pk_comparison){pk__compare_names[rule], NAN, NAN, NAN, 0};
    pk__arena arena = {NULL, 0, 0, 0};
    do
        pk__compare_take(&arena, c);
    while (pk__arena_again(context, &arena, "compare", &status));
    if (!status) {
        c->progress = context ? context->progress : NULL;
        c->progress_user = context ? context->progress_user : NULL;
        if (c->progress) {
            context->progress = pk__compare_progress;
            context->progress_user = c;
        }
        status = pk__compare_all(c);
        if (c->progress) {
            context->progress = c->progress;
            context->progress_user = c->progress_user;
        }
    }
    pk_release(context, arena.base);
    return status || !c->verdict ? status : pk__fail(context, c->verdict, "%s", c->message);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
