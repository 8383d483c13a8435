/* pathkernel/kernels/novelty.h: is a row like the training rows, as a kernel sees them?
 *
 * The part of a row's feature that lies in the span of the training features' first r principal directions, from Gram matrices
 * alone: with K = V Lambda V^T the Gram of the training rows, k(x) the row's products with them,
 *     e_r(x) = k(x)^T V_r Lambda_r^-1 V_r^T k(x) / K(x, x),
 * 1 for a row inside the span, 0 for one across it. A low energy is novelty. What a step of training changes of an output at
 * x lies in that span for the tangent kernel of that step (OpenReview gZRfDWLlGY).
 *
 * Any kernel serves: its Gram at one step, summed over steps, of one layer, by pk_kernel_ntk_trace or read from a file;
 * pk_kernel_novelty does it for a kernel of a run, at each step and for each layer that is asked for.
 */
#ifndef PATHKERNEL_NOVELTY_H
#define PATHKERNEL_NOVELTY_H
#include "../math/factorize.h"
#include "kernel.h"

/* >>> declarations */
PK__BEGIN_C

typedef struct pk_novelty_options {
    size_t rank;     /* r; 0: by energy */
    double fraction; /* the smallest r whose eigenvalues are this part of the trace; 0: 0.95 */
} pk_novelty_options;

typedef struct pk_novelty_report {
    size_t rank;       /* r that was taken: never more than the numerical rank */
    size_t whole_rank; /* eigenvalues above n roundings of the largest */
    size_t zero_rows;  /* rows with K(x, x) = 0, whose energy is 0 */
    double share;      /* of the trace that the r directions have */
    double least;      /* the smallest eigenvalue / the largest: below 0 by rounding, at most */
} pk_novelty_report;

/* energies (m): e_r of m rows. gram (n x n): of the training rows; cross (m x n): of the rows with them; diagonal (m): of the
 * rows with themselves. options, report may be NULL. Cost: 5 n^3 + 2 m n r flops; memory n (n + 1) numbers.
 * PK_ARGUMENT: a Gram that is not symmetric, or with an eigenvalue below -1e-6 of the largest: no Gram; a negative diagonal;
 * a fraction outside of [0, 1]. PK_NOT_FINITE names the number; PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT. */
PK_API PK__MUST_USE pk_status pk_novelty(pk_context *context, size_t n, const double *gram, size_t m,
                                         const double *cross, const double *diagonal,
                                         const pk_novelty_options *options, double *energies,
                                         pk_novelty_report *report);

/* The same for the rows of `rows` (M of them) against the training rows of a run, by a kernel of family.h: a product of features
 * for each step and layer. options: as of pk_kernels, with a number for each pair of rows (outputs not full), without a map;
 * several steps of a kernel at a step, and by_layer, are matrices of their own. PK_OUTPUTS_LABEL and the kernels of losses need
 * the rows' targets. energies: [steps x] [layers x] M; reports: one for each step and layer, or NULL.
 * Memory: the matrices of training rows with training rows and of the rows with them, for all steps and layers.
 * Statuses of pk_kernels and pk_novelty; PK_ARGUMENT for outputs full, a map, and tracin, unless unweighted: its two sides have
 * different features. */
PK_API PK__MUST_USE pk_status pk_kernel_novelty(pk_context *context, const pk_run *run, const pk_dataset *rows,
                                                const pk_kernel_options *options,
                                                const pk_novelty_options *novelty, double *energies,
                                                pk_novelty_report *reports);

/* The area under the ROC curve: the probability that a number of `high` is above one of `low`, ties counting half. NAN where
 * either is empty or holds a NaN. Cost O(n log n). PK_MEMORY, PK_MEMORY_LIMIT, PK_OVERFLOW; PK_ARGUMENT for NULL. */
PK_API PK__MUST_USE pk_status pk_auroc(pk_context *context, size_t high_count, const double *high,
                                       size_t low_count, const double *low, double *area);
/* The false positive rate where the true positive rate is at least `rate` (0.95), at the highest threshold that has it: which
 * part of `low` is not below that threshold. rate in (0, 1]. Else as pk_auroc. */
PK_API PK__MUST_USE pk_status pk_false_positives(pk_context *context, size_t high_count, const double *high,
                                                 size_t low_count, const double *low, double rate,
                                                 double *false_positives);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_NOVELTY_IMPLEMENTED)
#define PATHKERNEL_NOVELTY_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
PK__BEGIN_COLD_CODE

static pk_status pk__novelty_check(pk_context *context, size_t n, const double *gram, size_t m,
                                   const double *cross, const double *diagonal, double fraction,
                                   const double *energies)
{
    if ((n && !gram) || (m && (!diagonal || !energies)) || (n && m && !cross))
        return pk__fail(context, PK_ARGUMENT,
                        "novelty: a Gram, the diagonal or the place for the energies is NULL");
    if (!(fraction >= 0 && fraction <= 1))
        return pk__fail(context, PK_ARGUMENT, "novelty: the fraction %g is not in [0, 1]", fraction);
    for (size_t i = 0; i < m; i++) {
        if (!pk__finite(diagonal[i]))
            return pk__fail(context, PK_NOT_FINITE, "novelty: the diagonal of row %zu is not finite", i);
        if (diagonal[i] < 0)
            return pk__fail(context, PK_ARGUMENT, "novelty: the diagonal of row %zu is %g, below 0", i,
                            diagonal[i]);
        for (size_t j = 0; j < n; j++)
            if (!pk__finite(cross[i * n + j]))
                return pk__fail(context, PK_NOT_FINITE,
                                "novelty: the product of row %zu with row %zu is not finite", i, j);
    }
    return PK_OK;
}

PK_API pk_status pk_novelty(pk_context *context, size_t n, const double *gram, size_t m, const double *cross,
                            const double *diagonal, const pk_novelty_options *options, double *energies,
                            pk_novelty_report *report)
{
    const double fraction = options ? options->fraction : 0;
    pk_novelty_report own = {0, 0, 0, 0, 0};
    double *values, *vectors, trace = 0, kept = 0;
    pk_status status = pk__novelty_check(context, n, gram, m, cross, diagonal, fraction, energies);
    if (status)
        return status;
    pk__arena arena = {NULL, 0, 0, n > SIZE_MAX / 64};
    do {
        values = pk__arena_take(&arena, n, sizeof *values);
        vectors = pk__arena_take(&arena, n, n * sizeof *vectors);
    } while (pk__arena_again(context, &arena, "novelty", &status));
    if (!status && n)
        status = pk_symmetric_eigenvalues(context, n, gram, values, vectors);
    const double largest = status || !n ? 0 : fmax(fabs(values[n - 1]), fabs(values[0]));
    if (!status && n && values[0] < -1e-6 * largest)
        status = pk__fail(context, PK_ARGUMENT,
                          "novelty: the matrix has the eigenvalue %g beside %g: it is no Gram matrix",
                          values[0], values[n - 1]);
    if (status) {
        pk_release(context, arena.base);
        return status;
    }
    for (size_t k = 0; k < n; k++) {
        trace += fmax(values[k], 0);
        own.whole_rank += values[k] > (double)n * DBL_EPSILON * largest;
    }
    own.least = largest > 0 ? values[0] / largest : 0;
    const double wanted = (fraction > 0 ? fraction : 0.95) * trace;
    while (own.rank < own.whole_rank && (options && options->rank ? own.rank < options->rank : kept < wanted))
        kept += values[n - ++own.rank];
    own.share = trace > 0 ? kept / trace : 0;
    for (size_t i = 0; i < m; i++) {
        double sum = 0;
        for (size_t k = n - own.rank; k < n; k++) {
            double dot = 0;
            for (size_t j = 0; j < n; j++)
                dot += vectors[k * n + j] * cross[i * n + j];
            sum += dot / values[k] * dot;
        }
        own.zero_rows += diagonal[i] == 0;
        energies[i] = diagonal[i] > 0 ? sum / diagonal[i] : 0;
    }
    if (report)
        *report = own;
    pk_release(context, arena.base);
    return PK_OK;
}

/* The matrices of all steps and layers, one behind the other: train (N x N), cross (M x N), then each row and each training row
 * with itself. */
static pk_status pk__novelty_planes(pk_context *context, const pk_run *run, const pk_dataset *rows,
                                    const pk_kernel_options *options, const pk_novelty_options *novelty,
                                    double *memory, double *energies, pk_novelty_report *reports)
{
    const size_t N = run->examples, M = pk__kernel_count(run, rows), layers = pk__kernel_layers(run, options);
    const size_t planes = pk__kernel_slots(run, options) * layers;
    double *train = memory, *cross = train + planes * N * N, *own = cross + planes * M * N,
           *spare = own + planes * M;
    pk_status status = pk_kernels(context, run, NULL, NULL, 1, options, &train, NULL);
    if (!status)
        status = pk_kernels(context, run, rows, NULL, 1, options, &cross, NULL);
    if (!status)
        status = pk__kernel_diagonals(context, run, rows, NULL, options, own, spare);
    for (size_t p = 0; !status && p < planes; p++)
        status = pk_novelty(context, N, train + p * N * N, M, cross + p * M * N, own + p * M, novelty,
                            energies + p * M, reports ? &reports[p] : NULL);
    return status;
}

PK_API pk_status pk_kernel_novelty(pk_context *context, const pk_run *run, const pk_dataset *rows,
                                   const pk_kernel_options *options, const pk_novelty_options *novelty,
                                   double *energies, pk_novelty_report *reports)
{
    size_t shape[6], planes = 0, numbers = 0;
    int rank = 0;
    double *memory = NULL;
    if (!rows || !energies)
        return pk__fail(context, PK_ARGUMENT, "novelty: the rows or the place for the energies are missing");
    pk_status status = pk_kernel_shape(context, run, rows, NULL, options, shape, &rank);
    if (status)
        return status;
    const char *name = pk_kernel_name(options->kind);
    if (options->outputs == PK_OUTPUTS_FULL || options->map != PK_MAP_NONE || options->left_train)
        return pk__fail(
            context, PK_ARGUMENT,
            "novelty: %s needs one number for each pair of rows: outputs full, maps and left_train do not "
            "give the products of features",
            name);
    if (pk__kernel_rows[options->kind].weighted == PK__RIGHT && !options->unweighted)
        return pk__fail(context, PK_ARGUMENT,
                        "novelty: the two sides of %s have different features; take it unweighted", name);
    const size_t N = run->examples, M = pk__kernel_count(run, rows);
    if (!pk__multiply(pk__kernel_slots(run, options), pk__kernel_layers(run, options), &planes) ||
        M > SIZE_MAX / 4 - N || !pk__multiply(N + M, N + 1, &numbers) ||
        !pk__multiply(numbers, planes, &numbers) || numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "novelty: matrices of %zu and %zu rows overflow", N, M);
    status = pk_allocate(context, numbers, sizeof *memory, "the matrices of novelty", &memory);
    if (!status && planes > 0 && M > 0)
        status = pk__novelty_planes(context, run, rows, options, novelty, memory, energies, reports);
    pk_release(context, memory);
    if (status == PK_MEMORY_LIMIT) {
        pk__kernel_sample sample = {.run = run, .left = rows, .count = 1, .options = options};
        sample.beside =
            pk__kernel_beside(run, rows, NULL, 1, options) + (numbers + N * (N + 1)) * sizeof *memory;
        return pk__fail_with_least(context, "novelty", pk__kernel_sample_run, &sample);
    }
    return status;
}

static int pk__compare_numbers(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Both lists sorted, in *memory. *bad: one is empty, or holds a NaN. */
static pk_status pk__two_sorted(pk_context *context, const char *name, size_t high_count, const double *high,
                                size_t low_count, const double *low, const double *out, double **memory,
                                int *bad)
{
    *memory = NULL;
    *bad = !high_count || !low_count;
    if ((high_count && !high) || (low_count && !low) || !out)
        return pk__fail(context, PK_ARGUMENT, "%s: a list or the place for the result is NULL", name);
    if (high_count > SIZE_MAX / 64 || low_count > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "%s: %zu and %zu numbers overflow", name, high_count, low_count);
    for (size_t i = 0; i < high_count; i++)
        *bad |= isnan(high[i]) != 0;
    for (size_t i = 0; i < low_count; i++)
        *bad |= isnan(low[i]) != 0;
    if (*bad)
        return PK_OK;
    pk_status status = pk_allocate(context, high_count + low_count, sizeof **memory, name, memory);
    if (status)
        return status;
    memcpy(*memory, high, high_count * sizeof *high);
    memcpy(*memory + high_count, low, low_count * sizeof *low);
    qsort(*memory, high_count, sizeof **memory, pk__compare_numbers);
    qsort(*memory + high_count, low_count, sizeof **memory, pk__compare_numbers);
    return PK_OK;
}

PK_API pk_status pk_auroc(pk_context *context, size_t high_count, const double *high, size_t low_count,
                          const double *low, double *area)
{
    double *sorted, pairs = 0;
    int bad = 0;
    pk_status status = pk__two_sorted(context, "auroc", high_count, high, low_count, low, area, &sorted, &bad);
    if (status)
        return status;
    *area = NAN;
    if (bad)
        return PK_OK;
    const double *below = sorted + high_count;
    size_t under = 0, upto = 0;
    for (size_t i = 0; i < high_count; i++) {
        while (under < low_count && below[under] < sorted[i])
            under++;
        while (upto < low_count && below[upto] <= sorted[i])
            upto++;
        pairs += 0.5 * ((double)under + (double)upto);
    }
    *area = pairs / ((double)high_count * (double)low_count);
    pk_release(context, sorted);
    return PK_OK;
}

PK_API pk_status pk_false_positives(pk_context *context, size_t high_count, const double *high,
                                    size_t low_count, const double *low, double rate, double *false_positives)
{
    double *sorted;
    int bad = 0;
    if (!(rate > 0 && rate <= 1))
        return pk__fail(context, PK_ARGUMENT, "false positives: the rate %g is not in (0, 1]", rate);
    pk_status status = pk__two_sorted(context, "false positives", high_count, high, low_count, low,
                                      false_positives, &sorted, &bad);
    if (status)
        return status;
    *false_positives = NAN;
    if (bad)
        return PK_OK;
    size_t wanted = (size_t)ceil(rate * (double)high_count * (1 - 4 * DBL_EPSILON)), above = 0;
    wanted = pk__max(1, pk__min(wanted, high_count));
    const double threshold = sorted[high_count - wanted];
    for (size_t i = 0; i < low_count; i++)
        above += sorted[high_count + i] >= threshold;
    *false_positives = (double)above / (double)low_count;
    pk_release(context, sorted);
    return PK_OK;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
