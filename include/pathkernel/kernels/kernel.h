/* pathkernel/kernels/kernel.h: Gram matrices of the named kernels (family.h) of a recorded run, and of the tangent kernel at given
 * weights.
 *
 * pk_kernels walks over the run once for any number of kernels: weights are read once, and kernels, output modes and layers
 * that need the same products share them (pk__kernel_term).
 */
#ifndef PATHKERNEL_KERNEL_H
#define PATHKERNEL_KERNEL_H
#include "family.h"
#include "along.h"
#include "../run/revisit.h"

/* >>> declarations */
PK__BEGIN_C

/* The empirical neural tangent kernel (Jacot, Gabriel and Hongler 2018; in this structured form Novak, Sohl-Dickstein and
 * Schoenholz 2022) of the rows of x (n1 x D) and y (n2 x D) at the weights w (P):
 *     gram[i C + k, j C + l] = < d f_k(w, x_i) / dw, d f_l(w, y_j) / dw >,      (n1 C x n2 C), C outputs:
 * with ld == n2 C an array of n1 x C x n2 x C numbers. y.data == NULL, or y the same view as x: the kernel of x with
 * itself, half the work, and symmetric bit for bit. gram overlaps nothing that is read.
 * Cost: a forward pass and C reverse passes a row, and for each pair of rows about sum over dense layers of
 * 2 (inputs + C^2 outputs) flops. Memory: for each row sum over dense layers of (inputs + C outputs) numbers.
 * PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT (the message says what would do): gram is untouched.
 * PK_CANCELLED: gram holds what was done. PK_NOT_FINITE: gram is complete; the message names the first pair. */
PK_API PK__MUST_USE pk_status pk_kernel_ntk(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                            pk_matrix x, pk_matrix y, pk_matrix gram);
/* Its trace over outputs, a sum and not a mean (divide by C where the mean is wanted, as neural-tangents gives it):
 *     gram[i, j] = sum_k < d f_k(w, x_i) / dw, d f_k(w, y_j) / dw >,      (n1 x n2).
 * For each pair of rows about sum over dense layers of 2 (inputs + C outputs) flops; all else as above. */
PK_API PK__MUST_USE pk_status pk_kernel_ntk_trace(pk_context *context, const pk_graph *graph,
                                                  const pk_real *weights, pk_matrix x, pk_matrix y,
                                                  pk_matrix gram);

/* Several kernels, output modes and maps in one pass over the run: grams[k] has the product of shape numbers. reports
 * (count of them) may be NULL. Each step costs a forward pass and as many reverse passes a row as the kernels have outputs, and
 * the products of pk_kernel_ntk; of sums along steps, so for each node. Same bits for any number of threads and any memory
 * limit; where kernels share products, other last bits than alone.
 * Statuses of pk_kernel_shape, and PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_IO, PK_NOT_FINITE, PK_CANCELLED: grams hold
 * parts. PK_NOT_CLOSED: grams are complete, but an error exceeds its tolerance. */
PK_API PK__MUST_USE pk_status pk_kernels(pk_context *context, const pk_run *run, const pk_dataset *left,
                                         const pk_dataset *right, size_t count,
                                         const pk_kernel_options *options, double *const *grams,
                                         pk_kernel_report *reports);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_KERNEL_INTERNALS_KNOWN)
#define PATHKERNEL_KERNEL_INTERNALS_KNOWN
/* >>> internals */
/* Part of a Gram matrix: rows and columns. */
typedef struct pk__kernel_part {
    size_t row, rows, column, columns;
} pk__kernel_part;

/* The rows and columns that are computed together: where a matrix may be cut without changing a bit. */
PK__INTERNAL size_t pk__kernel_block(const pk_run *run, const pk_kernel_options *options);
/* pk_kernels of a part, without maps: grams[k] holds the part alone, errors are absolute. */
PK__INTERNAL pk_status pk__kernels_part(pk_context *context, const pk_run *run, const pk_dataset *left,
                                        const pk_dataset *right, size_t count, const pk_kernel_options *options,
                                        const pk__kernel_part *part, double *const *grams,
                                        pk_kernel_report *reports);
/* What a call needs of memory, found by trial: `run` is called with contexts of different limits, and shall return PK_MEMORY_LIMIT
 * where that is too little. Fails with PK_MEMORY_LIMIT and the least that would do. */
typedef pk_status pk__memory_trial(pk_context *context, void *user);
PK__INTERNAL pk_status pk__fail_with_least(pk_context *context, const char *name, pk__memory_trial *run,
                                           void *user);
/* The kernels of a call on its first rows and a few steps, which take as much memory as all of them. */
typedef struct pk__kernel_sample {
    const pk_run *run;
    const pk_dataset *left, *right;
    size_t count;
    const pk_kernel_options *options;
    size_t beside;        /* bytes that the call holds at the same time */
    pk__kernel_part part; /* columns == 0: the first block */
} pk__kernel_sample;
PK__INTERNAL pk_status pk__kernel_sample_run(pk_context *context, void *sample);
/* Makes the error relative to the largest entry of the whole matrix, and applies the map. PK_NOT_CLOSED as pk_kernels. */
PK__INTERNAL pk_status pk__kernel_finish(pk_context *context, const pk_run *run, const pk_dataset *left,
                                         const pk_dataset *right, const pk_kernel_options *options,
                                         double *gram, pk_kernel_report *report);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_KERNEL_IMPLEMENTED)
#define PATHKERNEL_KERNEL_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- the tangent kernel at given weights --------------------------------------------------------------- */

static pk_status pk__ntk(const char *name, pk_context *context, const pk_graph *graph, const pk_real *weights,
                         pk_matrix x, pk_matrix y, pk_matrix gram, int summed)
{
    const pk__gram_rows_of left = {.rows = x, .weights = weights}, right = {.rows = y, .weights = weights};
    const pk__gram_request request = {.name = name, .graph = graph, .summed = summed, .result = gram};
    const int same = !y.data || (x.data == y.data && x.rows == y.rows && x.ld == y.ld);
    return pk__gram_compute(context, &request, &left, same ? NULL : &right);
}

PK_API pk_status pk_kernel_ntk(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix x,
                               pk_matrix y, pk_matrix gram)
{
    return pk__ntk("ntk", context, graph, weights, x, y, gram, 0);
}

PK_API pk_status pk_kernel_ntk_trace(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix x, pk_matrix y, pk_matrix gram)
{
    return pk__ntk("ntk trace", context, graph, weights, x, y, gram, 1);
}

/* ---- what is asked for --------------------------------------------------------------------------------- */

/* left, right, and the training rows where a kernel has them on its left and the call has not */
enum { PK__SIDE_LEFT, PK__SIDE_RIGHT, PK__SIDE_TRAIN, PK__SIDES };

/* The rows first .. first + count - 1 of a data set. */
typedef struct pk__kernel_side {
    const pk_dataset *data;
    int train;
    size_t first, count;
} pk__kernel_side;

/* What is multiplied with what: kernels with equal terms share the products. */
typedef struct pk__kernel_term {
    pk__feature feature;
    pk__seeds seeds[2];
    size_t output;
    int side[2], batch[2], moves[2]; /* batch: only rows whose c is not zero */
    int append_one;
    pk_quadrature rule;
    double tolerance;
} pk__kernel_term;

typedef struct pk__kernel {
    pk_kernel_options options;
    const pk__kernel_row *row;
    pk_kernel_report report;
    int side[2];
    size_t term;
    size_t slots, layers, rows, columns, width; /* of the result; width: C or 1 */
    double *gram, *diagonal[2];                 /* diagonal: slots x layers x rows of the side */
} pk__kernel;

typedef struct pk__kernel_pass {
    pk_context *context;
    const pk_run *run;
    pk__kernel_side side[PK__SIDES];
    size_t count, terms;
    pk__kernel *kernel;
    pk__kernel_term *term;
    pk__along along;
    size_t step;
    double *c; /* N: of the step */
    pk_real *w, *next;
    pk__along_order *order; /* of each term and pair of blocks */
    size_t orders;          /* of a term */
    /* Of one pair of blocks: the rows that count. */
    struct pk__kernel_rows {
        size_t count, *index; /* of the side's rows */
        pk_real *rows, *targets;
        int64_t *labels;
        pk__gram_rows_of of;
    } rows[2];
    double *block;
    size_t capacity;
    void *memory;
} pk__kernel_pass;

/* ---- the pass: what it takes --------------------------------------------------------------------------- */

enum { PK__KERNEL_ROWS = 512, PK__KERNEL_NUMBERS = 1 << 20 };

PK__INTERNAL size_t pk__kernel_block(const pk_run *run, const pk_kernel_options *options)
{
    const size_t width = options->outputs == PK_OUTPUTS_FULL ? run->outputs : 1;
    const size_t layers = pk__kernel_layers(run, options);
    size_t rows = PK__KERNEL_ROWS;
    while (rows > 1 &&
           rows * width * rows * width > PK__KERNEL_NUMBERS / pk__min(layers, PK__KERNEL_NUMBERS / 16))
        rows /= 2;
    return rows;
}

static pk__kernel_term pk__kernel_term_of(const pk__kernel_pass *pass, const pk__kernel *kernel, int left,
                                          int right)
{
    static const pk__seeds seeds[] = {
        [PK_OUTPUTS_NONE] = PK__SEEDS_LOSS,   [PK_OUTPUTS_FULL] = PK__SEEDS_UNITS,
        [PK_OUTPUTS_TRACE] = PK__SEEDS_UNITS, [PK_OUTPUTS_MEAN] = PK__SEEDS_UNITS,
        [PK_OUTPUTS_SUM] = PK__SEEDS_SUM,     [PK_OUTPUTS_LABEL] = PK__SEEDS_LABEL,
        [PK_OUTPUTS_ONE] = PK__SEEDS_ONE};
    const pk_kernel_options *options = &kernel->options;
    const int which[2] = {left, right};
    pk__kernel_term term;
    memset(&term, 0, sizeof term);
    term.feature = kernel->row->feature;
    term.output = options->outputs == PK_OUTPUTS_ONE ? options->output : 0;
    term.append_one = options->append_one != 0;
    for (int s = 0; s < 2; s++) {
        const int side = kernel->side[which[s]], train = pass->side[side].train;
        term.seeds[s] = which[s] && kernel->row->right_loss ? PK__SEEDS_LOSS : seeds[options->outputs];
        term.side[s] = side;
        term.batch[s] =
            train && !options->unweighted && (kernel->row->weighted & (which[s] ? PK__RIGHT : PK__LEFT)) != 0;
        term.moves[s] = kernel->row->moves == PK__ALL_ROWS || (kernel->row->moves == PK__TEST_ROWS && !train);
    }
    if (options->quadrature.rule == PK_RULE_LEFT && options->quadrature.nodes <= 1)
        term.moves[0] = term.moves[1] = 0;
    if (term.moves[0] || term.moves[1]) {
        term.rule = options->quadrature;
        term.tolerance = options->quadrature.rule == PK_RULE_AUTO ? options->tolerance : 0;
    }
    return term;
}

/* Fields are compared one by one: there may be padding between them. */
static int pk__same_term(const pk__kernel_term *a, const pk__kernel_term *b)
{
    int same = a->feature == b->feature && a->output == b->output && a->append_one == b->append_one &&
               a->rule.rule == b->rule.rule && a->rule.nodes == b->rule.nodes && a->tolerance == b->tolerance;
    for (int s = 0; s < 2; s++)
        same &= a->seeds[s] == b->seeds[s] && a->side[s] == b->side[s] && a->batch[s] == b->batch[s] &&
                a->moves[s] == b->moves[s];
    return same;
}

static int pk__term_symmetric(const pk__kernel_term *term)
{
    return term->seeds[0] == term->seeds[1] && term->side[0] == term->side[1] &&
           term->batch[0] == term->batch[1] && term->moves[0] == term->moves[1];
}

static size_t pk__pass_block(const pk__kernel_pass *pass)
{
    size_t rows = PK__KERNEL_ROWS;
    for (size_t k = 0; k < pass->count; k++)
        rows = pk__min(rows, pk__kernel_block(pass->run, &pass->kernel[k].options));
    return rows;
}

static void pk__kernel_pass_take(pk__arena *arena, pk__kernel_pass *pass)
{
    const pk_run *run = pass->run;
    const size_t P = run->parameters, D = run->graph.input_width, C = run->outputs, B = pk__pass_block(pass);
    pass->w = pk__arena_take(arena, P, sizeof(pk_real));
    pass->next = pk__arena_take(arena, P, sizeof(pk_real));
    pass->order = pk__arena_take(arena, pass->terms, pk__max(pass->orders, 1) * sizeof *pass->order);
    pass->block = pk__arena_take(arena, pass->capacity, sizeof(double));
    for (int s = 0; s < 2; s++) {
        pass->rows[s].index = pk__arena_take(arena, B, sizeof(size_t));
        pass->rows[s].rows = pk__arena_take(arena, B, D * sizeof(pk_real));
        pass->rows[s].targets = pk__arena_take(arena, B, C * sizeof(pk_real));
        pass->rows[s].labels = pk__arena_take(arena, B, sizeof(int64_t));
    }
    pass->c = pk__arena_take(arena, run->examples, sizeof(double));
}

/* Reads rows number first + index[..] of a side. */
static void pk__kernel_gather(const pk__kernel_pass *pass, const pk__kernel_term *term, int s,
                              struct pk__kernel_rows *rows)
{
    const pk__kernel_side *side = &pass->side[term->side[s]];
    const size_t D = pass->run->graph.input_width, C = pass->run->outputs;
    const pk_dataset *data = side->data;
    for (size_t r = 0; r < rows->count; r++) {
        const int64_t item = (int64_t)(side->first + rows->index[r]);
        pk_dataset_inputs(data, &item, 1, rows->rows + r * D);
        if (term->seeds[s] == PK__SEEDS_LABEL)
            rows->labels[r] = pk__label(&data->targets, (size_t)item);
        if (term->seeds[s] == PK__SEEDS_LOSS && term->feature <= PK__FEATURE_LOSS)
            pk_criterion_targets(&pass->run->criterion, data, &item, 1, C, rows->targets + r * C);
    }
}

/* ---- the pass: one step -------------------------------------------------------------------------------- */

static void pk__kernel_batch(pk__kernel_pass *pass, size_t s)
{
    double *c = pass->c;
    pk_batch batch;
    memset(c, 0, pass->run->examples * sizeof *c);
    pk_run_batch(pass->run, s, &batch);
    for (size_t b = 0; b < batch.count; b++)
        c[batch.items[b]] += batch.weights ? batch.weights[b] : 1 / (double)batch.count;
}

/* The rows of block number `block` that count. */
static void pk__kernel_choose(pk__kernel_pass *pass, const pk__kernel_term *term, int s, size_t start,
                              size_t end)
{
    struct pk__kernel_rows *rows = &pass->rows[s];
    const pk__kernel_side *side = &pass->side[term->side[s]];
    rows->count = 0;
    for (size_t r = start; r < end; r++)
        if (!term->batch[s] || pass->c[side->first + r] != 0)
            rows->index[rows->count++] = r;
    pk__kernel_gather(pass, term, s, rows);
    memset(&rows->of, 0, sizeof rows->of);
    rows->of.rows = pk_matrix_view(rows->rows, rows->count, pass->run->graph.input_width);
    rows->of.seeds = term->seeds[s];
    rows->of.output = term->output;
    rows->of.labels = term->seeds[s] == PK__SEEDS_LABEL ? rows->labels : NULL;
    rows->of.targets =
        term->seeds[s] == PK__SEEDS_LOSS && term->feature <= PK__FEATURE_LOSS ? rows->targets : NULL;
}

enum { PK__FED_ROWS = 64 };

/* to[plane][i][j] = products of what is fed, of rows i0 ... and j0 ... whose values are in the tapes. */
static void pk__fed_products(const pk_graph *graph, const pk__kernel_term *term, int by_layer,
                             pk__tape *const tape[2], const size_t at[2], const size_t count[2],
                             const size_t size[2], pk_real *part, double *to)
{
    const size_t layers = pk__matrix_layers(graph);
    for (size_t l = term->feature == PK__FEATURE_LAST ? layers - 1 : 0; l < layers; l++) {
        const pk_node *node = pk__matrix_layer(graph, l);
        const size_t input = (size_t)node->inputs[0], width = graph->nodes[input].width;
        const pk_real *x = tape[0]->value[input], *y = tape[1]->value[input];
        if (node->operation->tangent_form == PK_TANGENT_OUTER)
            pk__gemm(0, 1, count[0], count[1], width, 1, x, width, y, width, 0, part, count[1]);
        else /* tokens, as unit vectors */
            for (size_t i = 0; i < count[0]; i++)
                for (size_t j = 0; j < count[1]; j++) {
                    part[i * count[1] + j] = 0;
                    for (size_t k = 0; k < width; k++)
                        part[i * count[1] + j] += x[i * width + k] == y[j * width + k];
                }
        double *plane = to + (by_layer ? l : 0) * size[0] * size[1];
        for (size_t i = 0; i < count[0]; i++)
            for (size_t j = 0; j < count[1]; j++)
                plane[(at[0] + i) * size[1] + at[1] + j] += part[i * count[1] + j] + (term->append_one ? 1 : 0);
    }
}

static void pk__fed_take(pk__arena *arena, const pk_graph *graph, pk__tape tapes[2], pk_real **part,
                         pk_real **untied)
{
    pk__pass_take(arena, graph, PK__FED_ROWS, 0, 0, &tapes[0]);
    pk__pass_take(arena, graph, PK__FED_ROWS, 0, 0, &tapes[1]);
    *part = pk__arena_take(arena, PK__FED_ROWS, PK__FED_ROWS * sizeof(pk_real));
    *untied = graph->tied ? pk__arena_take(arena, graph->untied, sizeof(pk_real)) : NULL;
}

/* block = the Gram matrix of what is fed to layers at w. */
static pk_status pk__kernel_fed(pk__kernel_pass *pass, const pk__kernel_term *term, int by_layer)
{
    const pk_graph *graph = &pass->run->graph;
    const struct pk__kernel_rows *rows = pass->rows;
    const size_t size[2] = {rows[0].count, rows[1].count}, D = graph->input_width;
    const int symmetric = pk__term_symmetric(term) && rows[0].index[0] == rows[1].index[0];
    pk__tape tapes[2];
    pk_real *part = NULL, *untied = NULL;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do
        pk__fed_take(&arena, graph, tapes, &part, &untied);
    while (pk__arena_again(pass->context, &arena, "kernels", &status));
    if (status)
        return status;
    if (untied)
        pk_graph_untie(graph, pass->w, untied);
    const pk__line line = {untied ? untied : pass->w, NULL, NULL};
    pk__tape *const tape[2] = {&tapes[0], &tapes[1]};
    size_t at[2], count[2];
    for (at[0] = 0; at[0] < size[0]; at[0] += PK__FED_ROWS) {
        count[0] = pk__min(PK__FED_ROWS, size[0] - at[0]);
        for (int s = 0; s < 2; s++)
            tapes[s].threads = pk_threads(pass->context), tapes[s].context = pass->context;
        pk__pass_forward(tape[0], &line, count[0], rows[0].rows + at[0] * D);
        for (at[1] = symmetric ? at[0] : 0; at[1] < size[1]; at[1] += PK__FED_ROWS) {
            count[1] = pk__min(PK__FED_ROWS, size[1] - at[1]);
            pk__pass_forward(tape[1], &line, count[1], rows[1].rows + at[1] * D);
            pk__fed_products(graph, term, by_layer, tape, at, count, size, part, pass->block);
        }
    }
    const size_t planes = by_layer ? pk__matrix_layers(graph) : 1;
    for (size_t plane = 0; plane < planes && symmetric; plane++)
        for (size_t i = 0; i < size[0]; i++)
            for (size_t j = 0; j < i; j++) {
                double *own = pass->block + plane * size[0] * size[0];
                own[i * size[0] + j] = own[j * size[0] + i];
            }
    for (size_t i = 0; !status && i < planes * size[0] * size[1]; i++)
        if (!pk__finite(pass->block[i]))
            status = pk__fail(pass->context, PK_NOT_FINITE,
                              "kernels: what is fed to a layer at step %zu is not finite", pass->step);
    pk_release(pass->context, arena.base);
    return status;
}

/* block = the products of the rows that were chosen. */
static pk_status pk__kernel_multiply(pk__kernel_pass *pass, const pk__kernel_term *term, int full, int by_layer,
                                     pk__along_order *order)
{
    const struct pk__kernel_rows *rows = pass->rows;
    const size_t first[2] = {rows[0].count ? rows[0].index[0] : 0, rows[1].count ? rows[1].index[0] : 1};
    pass->along.error = 0;
    memset(pass->block, 0, pass->capacity * sizeof *pass->block);
    if (!rows[0].count || !rows[1].count)
        return PK_OK;
    if (term->feature == PK__FEATURE_LAST || term->feature == PK__FEATURE_FED)
        return pk__kernel_fed(pass, term, by_layer);
    pass->along.summed = !full;
    pass->along.by_layer = by_layer;
    pass->along.rule = term->rule;
    pass->along.tolerance = term->tolerance > 0                ? term->tolerance
                            : sizeof(pk_real) == sizeof(float) ? 1e-4
                                                               : 1e-10;
    const int same = pk__term_symmetric(term) && first[0] == first[1] && rows[0].count == rows[1].count;
    return pk__along_integrate(&pass->along, &rows[0].of, same ? NULL : &rows[1].of, term->moves, order,
                               pass->block);
}

/* How many times, and in which slot, a kernel takes step s: the k-th time. */
static int pk__kernel_takes(const pk__kernel_pass *pass, const pk__kernel *kernel, size_t s, size_t from,
                            size_t *slot)
{
    const pk_kernel_options *options = &kernel->options;
    const size_t steps = pass->run->steps;
    const pk__step_weight kind = kernel->row->step;
    *slot = 0;
    if (!options->steps)
        return from == 0 && (kind == PK__STEP_ALONE  ? s == steps
                             : kind == PK__STEP_MEAN ? s <= steps
                                                     : s < steps);
    for (size_t k = from; k < options->step_count; k++)
        if (options->steps[k] == s) {
            *slot = k;
            return 1;
        }
    return 0;
}

/* The sum over the times that a kernel takes step s of omega, where it is a sum; 0: it does not take it. */
static double pk__kernel_omega(const pk__kernel_pass *pass, const pk__kernel *kernel, size_t s)
{
    const pk_run *run = pass->run;
    size_t slot = 0, times = 0;
    for (size_t from = 0; pk__kernel_takes(pass, kernel, s, from, &slot); from = slot + 1)
        times++;
    const double all = kernel->options.steps ? (double)kernel->options.step_count : (double)run->steps + 1;
    return kernel->row->step == PK__STEP_RATE
               ? (double)times * run->learning_rates[s] * pk_run_gradient_scale(run, s)
           : kernel->row->step == PK__STEP_MEAN ? (double)times / all
                                                : 1;
}

/* The number that a kernel makes of the products of rows i and j in a plane. */
static double pk__kernel_entry(const pk__kernel_pass *pass, const pk__kernel *kernel,
                               const pk__kernel_term *term, int full, size_t plane, size_t i, size_t j,
                               size_t k, size_t l)
{
    const size_t C = pass->run->outputs, kept = full ? C : 1, rows = pass->rows[0].count * kept,
                 columns = pass->rows[1].count * kept;
    const double *at = pass->block + (plane * rows + i * kept) * columns + j * kept;
    const double scale = kernel->options.outputs == PK_OUTPUTS_MEAN ? 1 / (double)C : 1;
    double sum = 0;
    if (!full || term->seeds[0] != PK__SEEDS_UNITS)
        return scale * *at;
    if (kernel->options.outputs == PK_OUTPUTS_FULL)
        return at[k * columns + l];
    for (size_t c = 0; c < C; c++)
        sum += at[c * columns + c];
    return scale * sum;
}

/* Adds the products of rows i0 ... and j0 ... to a kernel; mirrored: also to the other half. diagonal >= 0: only row with row,
 * to that side's. planes of the block, which a kernel without layers sums. */
static void pk__kernel_add(pk__kernel_pass *pass, pk__kernel *kernel, const pk__kernel_term *term, int full,
                           size_t planes, int mirrored, int diagonal)
{
    const struct pk__kernel_rows *rows = pass->rows;
    const size_t width = kernel->width, s = pass->step;
    const double omega = pk__kernel_omega(pass, kernel, s);
    size_t slot = 0;
    for (size_t from = 0; pk__kernel_takes(pass, kernel, s, from, &slot); from = slot + 1) {
        const int alone = kernel->row->step == PK__STEP_ALONE;
        for (size_t plane = 0; plane < planes; plane++)
            for (size_t i = 0; i < rows[0].count; i++)
                for (size_t j = diagonal >= 0 ? i : 0; j < (diagonal >= 0 ? i + 1 : rows[1].count); j++) {
                    const size_t row = rows[0].index[i], column = rows[1].index[j];
                    const double *c = pass->c;
                    const double x = term->batch[0] ? c[pass->side[term->side[0]].first + row] : 1;
                    const double y = term->batch[1] ? c[pass->side[term->side[1]].first + column] : 1;
                    const size_t to =
                        (alone ? slot : 0) * kernel->layers + (kernel->options.by_layer ? plane : 0);
                    if (diagonal >= 0) {
                        kernel->diagonal[diagonal][to * (diagonal ? kernel->columns : kernel->rows) + row] +=
                            omega * x * y * pk__kernel_entry(pass, kernel, term, full, plane, i, j, 0, 0);
                        continue;
                    }
                    for (size_t k = 0; k < width; k++)
                        for (size_t l = 0; l < width; l++) {
                            const double value =
                                omega * x * y * pk__kernel_entry(pass, kernel, term, full, plane, i, j, k, l);
                            double *own = kernel->gram + to * kernel->rows * width * kernel->columns * width;
                            own[(row * width + k) * kernel->columns * width + column * width + l] += value;
                            if (mirrored)
                                own[(column * width + l) * kernel->columns * width + row * width + k] += value;
                        }
                }
        if (!alone) /* omega has counted them all */
            break;
    }
}

static double pk__kernel_largest(const pk__kernel_pass *pass, const pk__kernel_term *term, int s)
{
    double largest = term->batch[s] ? 0 : 1;
    for (size_t r = 0; term->batch[s] && r < pass->rows[s].count; r++)
        largest = fmax(largest, fabs(pass->c[pass->side[term->side[s]].first + pass->rows[s].index[r]]));
    return largest;
}

/* One term at one step, all pairs of blocks. */
static pk_status pk__kernel_blocks(pk__kernel_pass *pass, size_t t)
{
    const pk__kernel_term *term = &pass->term[t];
    const size_t B = pk__pass_block(pass);
    const pk__kernel_side *x = &pass->side[term->side[0]], *y = &pass->side[term->side[1]];
    const int symmetric = pk__term_symmetric(term);
    int full = 0, by_layer = 0, active = 0;
    size_t slot = 0, planes = 1;
    for (size_t k = 0; k < pass->count; k++) {
        const pk__kernel *kernel = &pass->kernel[k];
        if (kernel->term != t || !pk__kernel_takes(pass, kernel, pass->step, 0, &slot))
            continue;
        active = 1;
        full |= kernel->options.outputs == PK_OUTPUTS_FULL;
        by_layer |= kernel->options.by_layer;
        planes = pk__max(planes, kernel->layers);
    }
    for (size_t i = 0, pair = 0; active && i < x->count; i += B)
        for (size_t j = 0; j < (symmetric ? i + 1 : y->count); j += B, pair++) {
            pk__kernel_choose(pass, term, 0, i, pk__min(i + B, x->count));
            pk__kernel_choose(pass, term, 1, j, pk__min(j + B, y->count));
            const size_t points = pass->along.points, refused = pass->along.refused;
            pk_status status =
                pk__kernel_multiply(pass, term, full, by_layer, &pass->order[t * pass->orders + pair]);
            if (status)
                return status;
            for (size_t k = 0; k < pass->count; k++) {
                pk__kernel *kernel = &pass->kernel[k];
                if (kernel->term != t || !pk__kernel_takes(pass, kernel, pass->step, 0, &slot))
                    continue;
                pk__kernel_add(pass, kernel, term, full, planes, symmetric && j < i, -1);
                kernel->report.error += fabs(pk__kernel_omega(pass, kernel, pass->step)) *
                                        pk__kernel_largest(pass, term, 0) * pk__kernel_largest(pass, term, 1) *
                                        pass->along.error;
                kernel->report.points += pass->along.points - points;
                kernel->report.refused += pass->along.refused - refused;
            }
        }
    return PK_OK;
}

/* Each row of a side with itself, a few rows at a time. */
static pk_status pk__kernel_diagonal(pk__kernel_pass *pass, pk__kernel *kernel, int s)
{
    const size_t some = pk__min(8, pk__pass_block(pass));
    const pk__kernel_term term = pk__kernel_term_of(pass, kernel, s, s);
    const pk__kernel_side *side = &pass->side[term.side[0]];
    pk__along_order order;
    memset(&order, 0, sizeof order);
    size_t slot = 0;
    if (!pk__kernel_takes(pass, kernel, pass->step, 0, &slot))
        return PK_OK;
    for (size_t i = 0; i < side->count; i += some) {
        pk__kernel_choose(pass, &term, 0, i, pk__min(i + some, side->count));
        pk__kernel_choose(pass, &term, 1, i, pk__min(i + some, side->count));
        const pk_status status = pk__kernel_multiply(pass, &term, 0, kernel->options.by_layer, &order);
        if (status)
            return status;
        pk__kernel_add(pass, kernel, &term, 0, kernel->layers, 0, s);
    }
    return PK_OK;
}

/* Whether a kernel's matrix holds each row with itself. */
static int pk__kernel_has_diagonal(const pk__kernel_pass *pass, const pk__kernel *kernel)
{
    const pk__kernel_term term = pk__kernel_term_of(pass, kernel, 0, 1);
    return pk__term_symmetric(&term);
}

/* ---- the pass: all steps ------------------------------------------------------------------------------- */

/* Goes over the steps that the kernels take; diagonals: for these alone. */
static pk_status pk__kernel_steps(pk__kernel_pass *pass, pk_replay *replay, int diagonals)
{
    const pk_run *run = pass->run;
    for (size_t s = 0; s <= run->steps; s++) {
        int taken = 0, moves = 0;
        size_t slot = 0;
        pass->step = s;
        for (size_t k = 0; k < pass->count; k++) {
            const pk__kernel *kernel = &pass->kernel[k];
            const int takes = pk__kernel_takes(pass, kernel, s, 0, &slot);
            taken |= takes;
            moves |= takes && kernel->row->moves;
        }
        if (!taken)
            continue;
        pk_status status = pk__progress(pass->context, "kernels", (double)s / ((double)run->steps + 1));
        if (!status)
            status = pk_replay_weights(pass->context, replay, s, pass->w);
        if (!status && moves)
            status = pk_replay_weights(pass->context, replay, s + 1, pass->next);
        if (status)
            return status;
        pass->along.w = pass->w;
        pass->along.next = pass->next;
        if (moves)
            pk__along_begin(&pass->along);
        if (s < run->steps)
            pk__kernel_batch(pass, s);
        for (size_t t = 0; !status && !diagonals && t < pass->terms; t++)
            status = pk__kernel_blocks(pass, t);
        for (size_t k = 0; !status && diagonals && k < pass->count; k++)
            for (int side = 0; side < 2 && !status; side++)
                status = pk__kernel_diagonal(pass, &pass->kernel[k], side);
        if (status)
            return status;
    }
    return PK_OK;
}

/* ---- maps ---------------------------------------------------------------------------------------------- */

/* x, y: each row with itself on its side; own: gram's own diagonal. */
static size_t pk__kernel_cosine(size_t rows, size_t columns, int own, double *x, double *y, double *gram)
{
    size_t zeros = 0;
    for (size_t i = 0; own && i < rows; i++)
        x[i] = y[i] = gram[i * columns + i];
    for (size_t i = 0; i < rows; i++)
        zeros += !(x[i] > 0);
    for (size_t j = 0; !own && j < columns; j++)
        zeros += !(y[j] > 0);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            double *at = &gram[i * columns + j];
            *at = x[i] > 0 && y[j] > 0 ? (own && i == j ? 1 : *at / (sqrt(x[i]) * sqrt(y[j]))) : 0;
        }
    return zeros;
}

/* H K H: K minus the means of its rows and columns, plus that of all. means: 2 x rows. */
static void pk__kernel_center(size_t rows, double *gram, double *means)
{
    const double n = (double)rows;
    double all = 0;
    int symmetric = 1;
    memset(means, 0, 2 * rows * sizeof *means);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < rows; j++) {
            means[i] += gram[i * rows + j] / n;
            means[rows + j] += gram[i * rows + j] / n;
            symmetric &= gram[i * rows + j] == gram[j * rows + i];
        }
    for (size_t i = 0; i < rows; i++)
        all += means[i] / n;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < rows; j++)
            gram[i * rows + j] -= symmetric ? (means[i] + means[j]) - all : (means[i] + means[rows + j]) - all;
}

/* ---- the pass: its beginning and end ------------------------------------------------------------------- */

/* The terms of the kernels. */
static void pk__kernel_terms(pk__kernel_pass *pass)
{
    for (size_t k = 0; k < pass->count; k++) {
        const pk__kernel_term term = pk__kernel_term_of(pass, &pass->kernel[k], 0, 1);
        size_t t = 0;
        while (t < pass->terms && !pk__same_term(&pass->term[t], &term))
            t++;
        if (t == pass->terms)
            pass->term[pass->terms++] = term;
        pass->kernel[k].term = t;
    }
}

/* Sides and kernels of a part; all sizes have passed pk_kernel_shape. */
static void pk__kernel_pass_set(pk__kernel_pass *pass, const pk_dataset *left, const pk_dataset *right,
                                const pk_kernel_options *options, const pk__kernel_part *part,
                                double *const *grams)
{
    const pk_run *run = pass->run;
    const size_t rows = pk__kernel_count(run, left), columns = pk__kernel_count(run, right);
    pass->side[PK__SIDE_LEFT] =
        (pk__kernel_side){left ? left : &run->train, !left, part ? part->row : 0, part ? part->rows : rows};
    pass->side[PK__SIDE_RIGHT] = (pk__kernel_side){right ? right : &run->train, !right, part ? part->column : 0,
                                                   part ? part->columns : columns};
    pass->side[PK__SIDE_TRAIN] = (pk__kernel_side){&run->train, 1, 0, run->examples};
    for (size_t k = 0; k < pass->count; k++) {
        pk__kernel *kernel = &pass->kernel[k];
        kernel->options = options[k];
        kernel->row = &pk__kernel_rows[options[k].kind];
        kernel->side[0] = options[k].left_train && left ? PK__SIDE_TRAIN : PK__SIDE_LEFT;
        kernel->side[1] = PK__SIDE_RIGHT;
        const pk__kernel_side *x = &pass->side[kernel->side[0]], *y = &pass->side[PK__SIDE_RIGHT];
        if (x->data == y->data && x->train == y->train && x->first == y->first && x->count == y->count)
            kernel->side[1] = kernel->side[0];
        kernel->slots = pk__kernel_slots(run, &options[k]);
        kernel->layers = pk__kernel_layers(run, &options[k]);
        kernel->rows = x->count;
        kernel->columns = y->count;
        kernel->width = options[k].outputs == PK_OUTPUTS_FULL ? run->outputs : 1;
        kernel->gram = grams ? grams[k] : NULL;
    }
    pk__kernel_terms(pass);
    const size_t B = pk__pass_block(pass);
    size_t width = 1, layers = 1, most = 1, sides[2] = {1, 1};
    for (size_t k = 0; k < pass->count; k++) {
        sides[0] = pk__max(sides[0], pass->kernel[k].rows);
        sides[1] = pk__max(sides[1], pass->kernel[k].columns);
        width = pk__max(width, pass->kernel[k].width);
        layers = pk__max(layers, pass->kernel[k].layers);
        most =
            pk__max(most, pk__max(pk__blocks(pass->kernel[k].rows, B), pk__blocks(pass->kernel[k].columns, B)));
    }
    pass->orders = most * most;
    /* a diagonal takes rows of one side with themselves */
    const size_t some = pk__min(B, pk__max(pk__min(sides[0], sides[1]), 8)),
                 all = pk__min(B, pk__max(pk__max(sides[0], sides[1]), 8));
    pass->capacity = some * width * all * width * layers;
}

static void pk__kernel_pass_release(pk__kernel_pass *pass)
{
    pk__along_release(&pass->along);
    pk_release(pass->context, pass->memory);
    pk_release(pass->context, pass->kernel);
    pk_release(pass->context, pass->term);
}

static pk_status pk__kernel_pass_begin(pk_context *context, const pk_run *run, const pk_dataset *left,
                                       const pk_dataset *right, size_t count, const pk_kernel_options *options,
                                       const pk__kernel_part *part, double *const *grams, pk__kernel_pass *pass)
{
    memset(pass, 0, sizeof *pass);
    pass->context = context;
    pass->run = run;
    pass->count = count;
    pk_status status = pk_allocate(context, count, sizeof *pass->kernel, "kernels", &pass->kernel);
    if (!status)
        status = pk_allocate(context, count, sizeof *pass->term, "kernels", &pass->term);
    if (status)
        return status;
    pk__kernel_pass_set(pass, left, right, options, part, grams);
    pk__arena arena = {NULL, 0, 0, 0};
    do
        pk__kernel_pass_take(&arena, pass);
    while (pk__arena_again(context, &arena, "kernels", &status));
    pass->memory = arena.base;
    if (!status)
        status = pk__along_prepare(context, &run->graph, pass->capacity, &pass->along);
    pass->along.criterion = &run->criterion;
    return status;
}

PK__INTERNAL pk_status pk__kernels_part(pk_context *context, const pk_run *run, const pk_dataset *left,
                                        const pk_dataset *right, size_t count, const pk_kernel_options *options,
                                        const pk__kernel_part *part, double *const *grams,
                                        pk_kernel_report *reports)
{
    pk__kernel_pass pass;
    pk_replay replay;
    memset(&replay, 0, sizeof replay);
    pk_status status = pk__kernel_pass_begin(context, run, left, right, count, options, part, grams, &pass);
    if (!status)
        status = pk_replay_prepare(context, run, 0, &replay);
    for (size_t k = 0; !status && k < count; k++) {
        const pk__kernel *kernel = &pass.kernel[k];
        memset(kernel->gram, 0,
               kernel->slots * kernel->layers * kernel->rows * kernel->width * kernel->columns * kernel->width *
                   sizeof *kernel->gram);
    }
    if (!status)
        status = pk__kernel_steps(&pass, &replay, 0);
    for (size_t k = 0; reports && pass.kernel && k < count; k++)
        reports[k] = pass.kernel[k].report;
    pk_replay_release(context, &replay);
    pk__kernel_pass_release(&pass);
    return status;
}

/* The diagonals of one kernel whose matrix does not hold them, by a pass of their own: slots x layers x rows, then columns. */
static pk_status pk__kernel_diagonals(pk_context *context, const pk_run *run, const pk_dataset *left,
                                      const pk_dataset *right, const pk_kernel_options *options, double *x,
                                      double *y)
{
    pk__kernel_pass pass;
    pk_replay replay;
    memset(&replay, 0, sizeof replay);
    pk_status status = pk__kernel_pass_begin(context, run, left, right, 1, options, NULL, NULL, &pass);
    if (!status)
        status = pk_replay_prepare(context, run, 0, &replay);
    if (!status) {
        pass.kernel->diagonal[0] = x;
        pass.kernel->diagonal[1] = y;
        if (!pk__kernel_has_diagonal(&pass, pass.kernel))
            status = pk__kernel_steps(&pass, &replay, 1);
    }
    pk_replay_release(context, &replay);
    pk__kernel_pass_release(&pass);
    return status;
}

PK__INTERNAL pk_status pk__kernel_finish(pk_context *context, const pk_run *run, const pk_dataset *left,
                                         const pk_dataset *right, const pk_kernel_options *options,
                                         double *gram, pk_kernel_report *report)
{
    const pk__kernel_row *row = &pk__kernel_rows[options->kind];
    const int full = options->outputs == PK_OUTPUTS_FULL, train = !right;
    left = options->left_train ? NULL : left;
    const size_t rows = pk__kernel_count(run, left), columns = pk__kernel_count(run, right);
    const size_t planes = pk__kernel_slots(run, options) * pk__kernel_layers(run, options);
    const size_t plane = rows * columns, numbers = planes * plane * (full ? run->outputs * run->outputs : 1);
    const double tolerance = options->tolerance > 0             ? options->tolerance
                             : sizeof(pk_real) == sizeof(float) ? 1e-4
                                                                : 1e-10;
    const int mapped = options->map != PK_MAP_NONE && numbers;
    double largest = 0, *x, *y, *means;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    for (size_t i = 0; i < numbers; i++)
        largest = fmax(largest, fabs(gram[i]));
    report->error = largest > 0 ? report->error / largest : 0;
    do {
        x = pk__arena_take(&arena, mapped ? planes : 0, rows * sizeof *x);
        y = pk__arena_take(&arena, mapped ? planes : 0, columns * sizeof *y);
        means = pk__arena_take(&arena, mapped ? rows : 0, 2 * sizeof *means);
    } while (pk__arena_again(context, &arena, "kernels", &status));
    if (!status && options->map == PK_MAP_COSINE && numbers) {
        /* The same rows on both sides, and the same factors: the matrix has them already. */
        const int same = left == right && !(train && row->weighted == PK__RIGHT && !options->unweighted);
        status = same ? PK_OK : pk__kernel_diagonals(context, run, left, right, options, x, y);
        for (size_t p = 0; !status && p < planes; p++)
            report->zero_rows +=
                pk__kernel_cosine(rows, columns, same, x + p * rows, y + p * columns, gram + p * plane);
    }
    for (size_t p = 0; !status && options->map == PK_MAP_CENTER && numbers && p < planes; p++)
        pk__kernel_center(rows, gram + p * plane, means);
    pk_release(context, arena.base);
    if (!status && row->moves && options->quadrature.rule == PK_RULE_AUTO && report->error > tolerance)
        status = pk__fail(context, PK_NOT_CLOSED,
                          "%s: the integrals along the steps are off by %.3g of the largest entry, not %.3g",
                          row->name, report->error, tolerance);
    return status;
}

/* ---- how much memory would do --------------------------------------------------------------------------- */

PK__INTERNAL pk_status pk__fail_with_least(pk_context *context, const char *name, pk__memory_trial *run,
                                           void *user)
{
    const size_t limit = context->memory_limit;
    pk_context trial = *context;
    size_t low = limit, high = pk__max(limit, context->memory_used + 4096);
    trial.progress = NULL;
    for (int grows = 1; grows;) {
        low = high;
        if (high > SIZE_MAX / 4)
            return PK_MEMORY_LIMIT;
        high += high / 2;
        trial.memory_limit = high;
        grows = run(&trial, user) == PK_MEMORY_LIMIT;
    }
    while (high - low > high / 64) {
        const size_t middle = low + (high - low) / 2;
        trial.memory_limit = middle;
        if (run(&trial, user) == PK_MEMORY_LIMIT)
            low = middle;
        else
            high = middle;
    }
    high += high / 32; /* rows with more kinks in a step than those of the trial take more */
    return pk__fail(context, PK_MEMORY_LIMIT,
                    "%s: %zu bytes of memory are not enough; the least that would do is %zu bytes", name, limit,
                    high);
}

enum { PK__SAMPLE_STEPS = 16 };

/* Options with some of the steps, the first and the last among them; every row counts. */
static pk_kernel_options pk__kernel_sample_options(const pk_run *run, const pk_kernel_options *options,
                                                   size_t steps[PK__SAMPLE_STEPS])
{
    pk_kernel_options some = *options;
    const pk__kernel_row *row = &pk__kernel_rows[some.kind];
    const size_t all = some.steps                    ? some.step_count
                       : row->step == PK__STEP_ALONE ? 0
                       : row->step == PK__STEP_MEAN  ? run->steps + 1
                                                     : run->steps;
    some.unweighted = row->weighted != 0;
    if (!all)
        return some;
    some.step_count = pk__min(all, PK__SAMPLE_STEPS);
    for (size_t k = 0; k < some.step_count; k++) {
        const size_t at = some.step_count > 1 ? k * (all - 1) / (some.step_count - 1) : 0;
        steps[k] = some.steps ? some.steps[at] : at;
    }
    some.steps = steps;
    return some;
}

PK__INTERNAL pk_status pk__kernel_sample_run(pk_context *context, void *user)
{
    const pk__kernel_sample *sample = user;
    const pk_run *run = sample->run;
    pk_context own = *context; /* the results are the caller's */
    pk_kernel_options *options = NULL;
    double **grams = NULL;
    void *beside = NULL;
    size_t(*steps)[PK__SAMPLE_STEPS] = NULL, B = SIZE_MAX;
    own.memory_limit = 0;
    pk_status status = pk_allocate(&own, sample->count, sizeof *options, "kernels", &options);
    if (!status)
        status = pk_allocate(&own, sample->count, sizeof *grams, "kernels", &grams);
    if (!status)
        status = pk_allocate(&own, sample->count, sizeof *steps, "kernels", &steps);
    for (size_t k = 0; !status && k < sample->count; k++) {
        options[k] = pk__kernel_sample_options(run, &sample->options[k], steps[k]);
        B = pk__min(B, pk__kernel_block(run, &options[k]));
    }
    pk__kernel_part part = sample->part;
    if (!part.columns)
        part = (pk__kernel_part){0, pk__min(B, pk__kernel_count(run, sample->left)), 0,
                                 pk__min(B, pk__kernel_count(run, sample->right))};
    for (size_t k = 0; !status && k < sample->count; k++) {
        const size_t width = options[k].outputs == PK_OUTPUTS_FULL ? run->outputs : 1;
        const size_t rows = options[k].left_train ? run->examples : part.rows;
        status = pk_allocate(&own, rows * part.columns * width * width,
                             pk__kernel_slots(run, &options[k]) * pk__kernel_layers(run, &options[k]) *
                                 sizeof(double),
                             "kernels", &grams[k]);
    }
    if (!status)
        status = pk_allocate(context, sample->beside, 1, "kernels", &beside);
    if (!status)
        status = pk__kernels_part(context, run, sample->left, sample->right, sample->count, options, &part,
                                  grams, NULL);
    pk_release(context, beside);
    for (size_t k = 0; grams && k < sample->count; k++)
        pk_release(&own, grams[k]);
    pk_release(&own, steps);
    pk_release(&own, grams);
    pk_release(&own, options);
    return status;
}

/* Bytes beside a pass over the run: for a map, and for what is kept of each pair of blocks. */
static size_t pk__kernel_beside(const pk_run *run, const pk_dataset *left, const pk_dataset *right,
                                size_t count, const pk_kernel_options *options)
{
    size_t most = 0, pairs = 0;
    for (size_t k = 0; k < count; k++) {
        const size_t rows = pk__kernel_count(run, options[k].left_train ? NULL : left),
                     columns = pk__kernel_count(run, right);
        const size_t planes = pk__kernel_slots(run, &options[k]) * pk__kernel_layers(run, &options[k]);
        const size_t blocks = pk__blocks(pk__max(rows, columns), pk__kernel_block(run, &options[k]));
        if (options[k].map != PK_MAP_NONE)
            most = pk__max(most, planes * (2 * rows + columns) * sizeof(double));
        pairs = pk__max(pairs, blocks * blocks);
    }
    return most + count * pairs * sizeof(pk__along_order) + 1024; /* what allocations add */
}

PK_API pk_status pk_kernels(pk_context *context, const pk_run *run, const pk_dataset *left,
                            const pk_dataset *right, size_t count, const pk_kernel_options *options,
                            double *const *grams, pk_kernel_report *reports)
{
    const double start = pk__seconds();
    pk_kernel_report *own = NULL;
    pk_status status = PK_OK, missed = PK_OK;
    if (count && (!options || !grams))
        return pk__fail(context, PK_ARGUMENT, "kernels: the options or the results are missing");
    for (size_t k = 0; k < count && !status; k++) {
        size_t shape[6];
        int rank = 0;
        status = pk_kernel_shape(context, run, left, right, &options[k], shape, &rank);
        if (!status && !grams[k])
            status = pk__fail(context, PK_ARGUMENT, "kernels: there is no place for result %zu", k);
    }
    if (status || !count)
        return status;
    status = pk_allocate(context, count, sizeof *own, "kernels", &own);
    if (!status)
        status = pk__kernels_part(context, run, left, right, count, options, NULL, grams, own);
    for (size_t k = 0; k < count && !status; k++) {
        status = pk__kernel_finish(context, run, left, right, &options[k], grams[k], &own[k]);
        if (status == PK_NOT_CLOSED) {
            missed = status;
            status = PK_OK;
        }
    }
    for (size_t k = 0; k < count && reports && own; k++) {
        reports[k] = own[k];
        reports[k].seconds = pk__seconds() - start;
    }
    pk_release(context, own);
    if (status == PK_MEMORY_LIMIT) {
        pk__kernel_sample sample = {
            .run = run, .left = left, .right = right, .count = count, .options = options};
        sample.beside = pk__kernel_beside(run, left, right, count, options) + count * sizeof *own;
        return pk__fail_with_least(context, "kernels", pk__kernel_sample_run, &sample);
    }
    return status ? status : missed;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
