/* pathkernel/math/measure.h: how far two Gram matrices are alike, what a spectrum says, and how two lists of predictions or of
 * scores are related. Plain functions of numbers, in double, one thread but for the products of Gram matrices.
 *
 * A measure that is 0/0 (a correlation with a constant list, an alignment with a matrix of zeros) is NaN, as SciPy has it, and
 * no error. Sums over n^2 numbers go by rows, so that their rounding grows with n.
 */
#ifndef PATHKERNEL_MEASURE_H
#define PATHKERNEL_MEASURE_H
#include "factorize.h"

/* >>> declarations */
PK__BEGIN_C

/* ---- two lists of n numbers. PK_NOT_FINITE names the first number that is not. ---- */

/* Pearson's correlation, sum (a - mean)(b - mean) / (|a - mean| |b - mean|), in [-1, 1]; NaN where a list is constant or n < 2. */
PK_API PK__MUST_USE pk_status pk_pearson(pk_context *context, size_t n, const double *a, const double *b,
                                         double *correlation);

/* Spearman's: Pearson's of the ranks, equal numbers having the mean of their ranks. Memory: 4 n numbers. */
PK_API PK__MUST_USE pk_status pk_spearman(pk_context *context, size_t n, const double *a, const double *b,
                                          double *correlation);

/* Kendall's tau-b: (concordant - discordant pairs) / sqrt((pairs not equal in a) (pairs not equal in b)). n log n operations
 * (Knight 1966). NaN where a list is constant or n < 2. Memory: 3 n numbers. */
PK_API PK__MUST_USE pk_status pk_kendall(pk_context *context, size_t n, const double *a, const double *b,
                                         double *tau);

/* How many of the k largest of a are among the k largest of b, divided by k; of equal ones the first count as larger.
 * PK_ARGUMENT where k is 0 or above n. */
PK_API PK__MUST_USE pk_status pk_top_overlap(pk_context *context, size_t n, const double *a, const double *b,
                                             size_t k, double *share);

/* ---- one Gram matrix (n x n, symmetric) ---- */

typedef struct pk_gram_measures {
    double trace, least, largest; /* of the matrix and its eigenvalues v */
    double
        effective_rank; /* exp(-sum p log p), p = v / sum v (Roy and Vetterli 2007); NaN: some v < -1e-10 trace */
    double participation_ratio; /* (sum v)^2 / sum v^2 */
    double trace_over_max;      /* sum v / max v */
} pk_gram_measures;

/* Cost: an eigenvalue problem without vectors (factorize.h). */
PK_API PK__MUST_USE pk_status pk_measure_gram(pk_context *context, size_t n, const double *gram,
                                              pk_gram_measures *measures);

/* y^T K y / (|K| |y|^2), the alignment of K with y y^T, |K| Frobenius' norm (Cristianini et al. 2001; over the steps of a run that
 * of silent alignment, Atanasov et al. 2021). targets: y (n). */
PK_API PK__MUST_USE pk_status pk_target_alignment(pk_context *context, size_t n, const double *gram,
                                                  const double *targets, double *alignment);

/* Kernel specialization (Shan and Bordelon 2021): special[c d] = A(K_cc, y_d) / mean over c' of A(K_c'c', y_d), A the target
 * alignment, y_d 1 for the rows of class d and 0 for others. grams: outputs x n x n, K_cc; labels (n) below classes; special:
 * outputs x classes. */
PK_API PK__MUST_USE pk_status pk_kernel_specialization(pk_context *context, size_t outputs, size_t n,
                                                       const double *grams, size_t classes,
                                                       const int64_t *labels, double *special);

/* ---- two Gram matrices (n x n, symmetric) ---- */

typedef struct pk_gram_pair_measures {
    double alignment; /* <K, L> / (|K| |L|) */
    double distance; /* 1 - alignment (Fort et al. 2020); divided by the steps between: the kernel's velocity */
    double cka;      /* <H K H, L> / (|H K H| |H L H|), H = I - 1/n (Kornblith et al. 2019) */
    double
        cka_unbiased; /* the same of HSIC_1 (Song et al. 2012): [tr KL + (1'K1)(1'L1)/((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)),
                          * diagonals zeroed; NaN for n < 4 */
} pk_gram_pair_measures;

/* Cost: some n^2 operations. Memory: 6 n numbers. */
PK_API PK__MUST_USE pk_status pk_measure_gram_pair(pk_context *context, size_t n, const double *first,
                                                   const double *second, pk_gram_pair_measures *measures);

/* ---- predictions of a surrogate against those of a network: logits (m x classes) ---- */

typedef struct pk_prediction_measures {
    /* Of the softmax probability p of the right class, on the rows where neither is exactly 0 or 1: */
    double kendall, pearson, spearman;
    double log_odds_r2; /* the square of Pearson's correlation of log p / (1 - p) */
    size_t left_out;    /* the other rows */
    /* On all rows, the prediction being the first largest logit: */
    double r_miss; /* rows that both get wrong / rows that one of them or both get wrong; NaN: no such row */
    double tad;    /* test accuracy difference: the surrogate's less the network's */
} pk_prediction_measures;

/* labels (m) below classes. Memory: 8 m numbers. */
PK_API PK__MUST_USE pk_status pk_measure_predictions(pk_context *context, size_t m, size_t classes,
                                                     const double *surrogate, const double *network,
                                                     const int64_t *labels, pk_prediction_measures *measures);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MEASURE_IMPLEMENTED)
#define PATHKERNEL_MEASURE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- order ----------------------------------------------------------------------------------------------- */

typedef struct pk__ranked {
    double value;
    size_t index;
} pk__ranked;

/* NaN come last; of equals the first index comes first. */
static int pk__ranks_before(const pk__ranked *a, const pk__ranked *b)
{
    const int nan_a = isnan(a->value), nan_b = isnan(b->value);
    if (nan_a != nan_b)
        return nan_b;
    return a->value < b->value || (!(b->value < a->value) && a->index < b->index);
}

/* Heap sort. */
PK__PRIVATE void pk__sort_ranked(size_t count, pk__ranked *items)
{
    for (size_t heap = count / 2, end = count; end > 1;) {
        if (heap > 0) {
            heap--;
        } else {
            end--;
            const pk__ranked top = items[0];
            items[0] = items[end];
            items[end] = top;
        }
        const pk__ranked moving = items[heap];
        size_t at = heap;
        for (size_t child = 2 * at + 1; child < end; child = 2 * at + 1) {
            child += child + 1 < end && pk__ranks_before(&items[child], &items[child + 1]);
            if (!pk__ranks_before(&moving, &items[child]))
                break;
            items[at] = items[child];
            at = child;
        }
        items[at] = moving;
    }
}

/* ranks[i]: how far the rank of value i lies from the mean of all ranks; equal values share the mean of theirs. NAN where a value is
 * not finite. ranks may be values. */
PK__PRIVATE void pk__rank(size_t count, const double *values, pk__ranked *sorted, double *ranks)
{
    int finite = 1;
    for (size_t i = 0; i < count; i++) {
        finite &= isfinite(values[i]) != 0;
        sorted[i] = (pk__ranked){values[i], i};
    }
    pk__sort_ranked(count, sorted);
    for (size_t first = 0, last; first < count; first = last) {
        for (last = first + 1; last < count && sorted[last].value == sorted[first].value; last++)
            ;
        const double rank = 0.5 * ((double)first + (double)last - (double)count);
        for (size_t i = first; i < last; i++)
            ranks[sorted[i].index] = finite ? rank : (double)NAN;
    }
}

/* ---- two lists ------------------------------------------------------------------------------------------- */

static pk_status pk__measure_check(pk_context *context, const char *what, size_t n, const double *numbers)
{
    if (n && !numbers)
        return pk__fail(context, PK_ARGUMENT, "measures: the %s is NULL", what);
    for (size_t i = 0; i < n; i++)
        if (!isfinite(numbers[i]))
            return pk__fail(context, PK_NOT_FINITE, "measures: number %zu of the %s is not finite", i, what);
    return PK_OK;
}

static pk_status pk__measure_lists(pk_context *context, size_t n, const double *a, const double *b,
                                   const void *out)
{
    if (!out)
        return pk__fail(context, PK_ARGUMENT, "measures: the place for the result is NULL");
    pk_status status = pk__measure_check(context, "first list", n, a);
    return status ? status : pk__measure_check(context, "second list", n, b);
}

/* Scaled, so that no square overflows or vanishes. */
static double pk__pearson(size_t n, const double *a, const double *b)
{
    double mean_a = 0, mean_b = 0, most_a = 0, most_b = 0, aa = 0, bb = 0, ab = 0;
    int constant_a = 1, constant_b = 1;
    for (size_t i = 0; i < n; i++) {
        mean_a += a[i] / (double)n;
        mean_b += b[i] / (double)n;
        constant_a &= a[i] == a[0];
        constant_b &= b[i] == b[0];
    }
    if (n < 2 || constant_a || constant_b)
        return (double)NAN;
    for (size_t i = 0; i < n; i++) {
        most_a = fmax(most_a, fabs(a[i] - mean_a));
        most_b = fmax(most_b, fabs(b[i] - mean_b));
    }
    for (size_t i = 0; i < n; i++) {
        const double x = (a[i] - mean_a) / most_a, y = (b[i] - mean_b) / most_b;
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    return fmax(-1, fmin(1, ab / sqrt(aa) / sqrt(bb)));
}

PK_API pk_status pk_pearson(pk_context *context, size_t n, const double *a, const double *b,
                            double *correlation)
{
    pk_status status = pk__measure_lists(context, n, a, b, correlation);
    if (!status)
        *correlation = pk__pearson(n, a, b);
    return status;
}

PK_API pk_status pk_spearman(pk_context *context, size_t n, const double *a, const double *b,
                             double *correlation)
{
    double *ranks = NULL;
    pk__ranked *sorted = NULL;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status = pk__measure_lists(context, n, a, b, correlation);
    if (status)
        return status;
    do {
        ranks = pk__arena_take(&arena, n, 2 * sizeof *ranks);
        sorted = pk__arena_take(&arena, n, sizeof *sorted);
    } while (pk__arena_again(context, &arena, "ranks", &status));
    if (status)
        return status;
    *correlation = (double)NAN;
    if (n) {
        pk__rank(n, a, sorted, ranks);
        pk__rank(n, b, sorted, ranks + n);
        *correlation = pk__pearson(n, ranks, ranks + n);
    }
    pk_release(context, arena.base);
    return PK_OK;
}

/* Sorts numbers by merging, and returns how many pairs stood in the wrong order. */
static double pk__count_inversions(size_t n, double *numbers, double *other)
{
    double count = 0;
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t first = 0; first < n; first += 2 * width) {
            size_t i = first, middle = pk__min(first + width, n), j = middle, end = pk__min(middle + width, n);
            for (size_t k = first; k < end; k++)
                if (i < middle && (j == end || numbers[i] <= numbers[j])) {
                    other[k] = numbers[i++];
                } else {
                    other[k] = numbers[j++];
                    count += (double)(middle - i);
                }
        }
        memcpy(numbers, other, n * sizeof *numbers);
    }
    return count;
}

/* Pairs of equal ones among sorted numbers, where `also`, if any, is equal, too. */
static double pk__count_equal(size_t n, const double *sorted, const double *also)
{
    double pairs = 0, run = 0;
    for (size_t i = 1; i < n; i++) {
        run = sorted[i] == sorted[i - 1] && (!also || also[i] == also[i - 1]) ? run + 1 : 0;
        pairs += run;
    }
    return pairs;
}

PK_API pk_status pk_kendall(pk_context *context, size_t n, const double *a, const double *b, double *tau)
{
    double *first = NULL, *second = NULL, *other = NULL;
    pk__ranked *sorted = NULL;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status = pk__measure_lists(context, n, a, b, tau);
    if (status)
        return status;
    do {
        sorted = pk__arena_take(&arena, n, sizeof *sorted);
        first = pk__arena_take(&arena, n, sizeof *first);
        second = pk__arena_take(&arena, n, sizeof *second);
        other = pk__arena_take(&arena, n, sizeof *other);
    } while (pk__arena_again(context, &arena, "pairs", &status));
    if (status)
        return status;
    for (size_t i = 0; i < n; i++)
        sorted[i] = (pk__ranked){a[i], i};
    pk__sort_ranked(n, sorted);
    /* By a, and where a is equal by b: runs of equal a are sorted by their b. */
    for (size_t begin = 0, end; begin < n; begin = end) {
        for (end = begin + 1; end < n && sorted[end].value == sorted[begin].value; end++)
            ;
        for (size_t i = begin; i < end; i++) {
            first[i] = sorted[i].value;
            second[i] = b[sorted[i].index];
        }
        (void)pk__count_inversions(end - begin, second + begin, other);
    }
    const double pairs = 0.5 * (double)n * ((double)n - 1), equal_a = pk__count_equal(n, first, NULL),
                 equal_both = pk__count_equal(n, first, second),
                 discordant = pk__count_inversions(n, second, other),
                 equal_b = pk__count_equal(n, second, NULL);
    const double more = pairs - equal_a - equal_b + equal_both - 2 * discordant;
    *tau = n < 2 || equal_a == pairs || equal_b == pairs
               ? (double)NAN
               : fmax(-1, fmin(1, more / sqrt(pairs - equal_a) / sqrt(pairs - equal_b)));
    pk_release(context, arena.base);
    return PK_OK;
}

PK_API pk_status pk_top_overlap(pk_context *context, size_t n, const double *a, const double *b, size_t k,
                                double *share)
{
    pk__ranked *sorted = NULL;
    unsigned char *among = NULL;
    pk__arena arena = {NULL, 0, 0, 0};
    size_t both = 0;
    pk_status status = pk__measure_lists(context, n, a, b, share);
    if (status)
        return status;
    if (!k || k > n)
        return pk__fail(context, PK_ARGUMENT, "measures: the %zu largest of %zu numbers", k, n);
    do {
        sorted = pk__arena_take(&arena, n, sizeof *sorted);
        among = pk__arena_take(&arena, n, sizeof *among);
    } while (pk__arena_again(context, &arena, "ranks", &status));
    if (status)
        return status;
    memset(among, 0, n);
    for (int list = 0; list < 2; list++) {
        for (size_t i = 0; i < n; i++)
            sorted[i] = (pk__ranked){-(list ? b : a)[i], i};
        pk__sort_ranked(n, sorted);
        for (size_t i = 0; i < k; i++)
            both += among[sorted[i].index]++;
    }
    *share = (double)both / (double)k;
    pk_release(context, arena.base);
    return PK_OK;
}

/* ---- Gram matrices --------------------------------------------------------------------------------------- */

/* Finite, and symmetric to 1e-6 of the largest number, *largest. */
PK__PRIVATE pk_status pk__symmetric_check(pk_context *context, const char *name, size_t n, const double *gram,
                                     double *largest)
{
    size_t numbers = 0;
    if (n && !gram)
        return pk__fail(context, PK_ARGUMENT, "%s: the Gram matrix is NULL", name);
    if (!pk__multiply(n, n, &numbers) || numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "%s: a Gram matrix of %zu rows and columns overflows", name, n);
    pk_status status = pk__factorize_check(context, name, n, n, gram, largest);
    for (size_t i = 0; i < n && !status; i++)
        for (size_t j = 0; j < i && !status; j++)
            if (fabs(gram[i * n + j] - gram[j * n + i]) > 1e-6 * *largest)
                status = pk__fail(context, PK_ARGUMENT,
                                  "%s: the matrix is not symmetric: (%zu, %zu) is %g and (%zu, %zu) %g", name,
                                  i, j, gram[i * n + j], j, i, gram[j * n + i]);
    return status;
}

PK_API pk_status pk_measure_gram(pk_context *context, size_t n, const double *gram, pk_gram_measures *measures)
{
    double *values = NULL, entropy = 0, squares = 0, trace = 0;
    if (!measures)
        return pk__fail(context, PK_ARGUMENT, "measures: the place for the result is NULL");
    if (!n)
        return pk__fail(context, PK_ARGUMENT, "measures: a Gram matrix without rows");
    pk_status status = pk_allocate(context, n, sizeof *values, "eigenvalues", &values);
    if (!status)
        status = pk_symmetric_eigenvalues(context, n, gram, values, NULL);
    if (!status) {
        for (size_t i = 0; i < n; i++)
            trace += gram[i * n + i];
        const double scale = fmax(fabs(values[0]), fabs(values[n - 1]));
        for (size_t i = 0; i < n; i++) {
            const double p = values[i] / trace, q = values[i] / scale;
            entropy -= p > 0 ? p * log(p) : 0;
            squares += q * q;
        }
        *measures = (pk_gram_measures){
            .trace = trace,
            .least = values[0],
            .largest = values[n - 1],
            .effective_rank = values[0] < -1e-10 * trace || !(trace > 0) ? (double)NAN : exp(entropy),
            .participation_ratio = trace / scale * (trace / scale) / squares,
            .trace_over_max = trace / values[n - 1]};
    }
    pk_release(context, values);
    return status;
}

static double pk__target_alignment(size_t n, const double *gram, double largest, const double *targets)
{
    double form = 0, norm = 0, length = 0, most = 0;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs(targets[i]));
    if (most == 0 || largest == 0)
        return (double)NAN;
    for (size_t i = 0; i < n; i++) {
        double product = 0, squares = 0;
        for (size_t j = 0; j < n; j++) {
            const double number = gram[i * n + j] / largest;
            product += number * (targets[j] / most);
            squares += number * number;
        }
        form += product * (targets[i] / most);
        norm += squares;
        length += targets[i] / most * (targets[i] / most);
    }
    return form / sqrt(norm) / length;
}

PK_API pk_status pk_target_alignment(pk_context *context, size_t n, const double *gram, const double *targets,
                                     double *alignment)
{
    double largest = 0;
    if (!alignment)
        return pk__fail(context, PK_ARGUMENT, "measures: the place for the result is NULL");
    pk_status status = pk__symmetric_check(context, "measures", n, gram, &largest);
    if (!status)
        status = pk__measure_check(context, "targets", n, targets);
    if (!status)
        *alignment = pk__target_alignment(n, gram, largest, targets);
    return status;
}

static pk_status pk__labels_check(pk_context *context, size_t n, size_t classes, const int64_t *labels)
{
    if (n && !labels)
        return pk__fail(context, PK_ARGUMENT, "measures: the labels are NULL");
    for (size_t i = 0; i < n; i++)
        if (labels[i] < 0 || (uint64_t)labels[i] >= classes)
            return pk__fail(context, PK_ARGUMENT, "measures: label %zu is %lld, not 0 to %zu", i,
                            (long long)labels[i], classes ? classes - 1 : 0);
    return PK_OK;
}

PK_API pk_status pk_kernel_specialization(pk_context *context, size_t outputs, size_t n, const double *grams,
                                          size_t classes, const int64_t *labels, double *special)
{
    double *indicator = NULL;
    if (outputs && classes && !special)
        return pk__fail(context, PK_ARGUMENT, "measures: the place for the result is NULL");
    pk_status status = pk__labels_check(context, n, classes, labels);
    if (!status)
        status = pk_allocate(context, n, sizeof *indicator, "a class", &indicator);
    for (size_t c = 0; c < outputs && !status; c++) {
        double largest = 0;
        status = pk__symmetric_check(context, "measures", n, grams ? grams + c * n * n : NULL, &largest);
        for (size_t d = 0; d < classes && !status; d++) {
            for (size_t i = 0; i < n; i++)
                indicator[i] = labels[i] == (int64_t)d;
            special[c * classes + d] = pk__target_alignment(n, grams + c * n * n, largest, indicator);
        }
    }
    for (size_t d = 0; d < classes && !status; d++) {
        double mean = 0;
        for (size_t c = 0; c < outputs; c++)
            mean += special[c * classes + d] / (double)outputs;
        for (size_t c = 0; c < outputs; c++)
            special[c * classes + d] /= mean;
    }
    pk_release(context, indicator);
    return status;
}

/* What the measures of a pair are made of, K and L each divided by its largest number. Of the zeroed ones: without diagonals. */
typedef struct pk__gram_sums {
    double kk, ll, kl;             /* inner products */
    double row_kk, row_ll, row_kl; /* 1' K L 1 and so on: inner products of the sums of rows */
    double total_k, total_l;       /* 1' K 1 */
} pk__gram_sums;

static pk__gram_sums pk__gram_sum(size_t n, const double *k, double most_k, const double *l, double most_l,
                                  int zeroed)
{
    pk__gram_sums s = {0, 0, 0, 0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        double kk = 0, ll = 0, kl = 0, row_k = 0, row_l = 0;
        for (size_t j = 0; j < n; j++) {
            const double x = zeroed && j == i ? 0 : k[i * n + j] / most_k,
                         y = zeroed && j == i ? 0 : l[i * n + j] / most_l;
            kk += x * x;
            ll += y * y;
            kl += x * y;
            row_k += x;
            row_l += y;
        }
        s.kk += kk;
        s.ll += ll;
        s.kl += kl;
        s.row_kk += row_k * row_k;
        s.row_ll += row_l * row_l;
        s.row_kl += row_k * row_l;
        s.total_k += row_k;
        s.total_l += row_l;
    }
    return s;
}

/* <H K H, H L H>, of matrices from which the means of rows and columns and the total one are subtracted: for the formula by sums
 * would lose digits where these are large. rows: means of rows (n) of both, and of all at the end. */
static double pk__centred_product(size_t n, const double *k, double most_k, const double *mean_k,
                                  const double *l, double most_l, const double *mean_l)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double row = 0;
        for (size_t j = 0; j < n; j++)
            row += (k[i * n + j] / most_k - mean_k[i] - mean_k[j] + mean_k[n]) *
                   (l[i * n + j] / most_l - mean_l[i] - mean_l[j] + mean_l[n]);
        sum += row;
    }
    return sum;
}

static void pk__row_means(size_t n, const double *k, double most, double *means)
{
    means[n] = 0;
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (size_t j = 0; j < n; j++)
            sum += k[i * n + j] / most;
        means[i] = sum / (double)n;
        means[n] += means[i] / (double)n;
    }
}

/* n (n - 3) HSIC_1. */
static double pk__unbiased(double n, double product, double rows, double total_a, double total_b)
{
    return product + total_a * total_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows;
}

PK_API pk_status pk_measure_gram_pair(pk_context *context, size_t n, const double *first, const double *second,
                                      pk_gram_pair_measures *measures)
{
    const double *k = first, *l = second;
    double most_k = 0, most_l = 0, *means = NULL;
    if (!measures)
        return pk__fail(context, PK_ARGUMENT, "measures: the place for the result is NULL");
    pk_status status = pk__symmetric_check(context, "measures, first matrix", n, k, &most_k);
    if (!status)
        status = pk__symmetric_check(context, "measures, second matrix", n, l, &most_l);
    if (!status)
        status = pk_allocate(context, n + 1, 2 * sizeof *means, "means of rows", &means);
    if (status)
        return status;
    *measures = (pk_gram_pair_measures){(double)NAN, (double)NAN, (double)NAN, (double)NAN};
    if (most_k > 0 && most_l > 0) {
        const pk__gram_sums s = pk__gram_sum(n, k, most_k, l, most_l, 0);
        double *mean_k = means, *mean_l = means + n + 1;
        measures->alignment = s.kl / sqrt(s.kk) / sqrt(s.ll);
        measures->distance = 1 - measures->alignment;
        pk__row_means(n, k, most_k, mean_k);
        pk__row_means(n, l, most_l, mean_l);
        const double kk = pk__centred_product(n, k, most_k, mean_k, k, most_k, mean_k),
                     ll = pk__centred_product(n, l, most_l, mean_l, l, most_l, mean_l),
                     tiny = 1e-28 * (double)n * (double)n; /* rounding: what is centred is 0 */
        if (kk > tiny && ll > tiny)
            measures->cka = pk__centred_product(n, k, most_k, mean_k, l, most_l, mean_l) / sqrt(kk) / sqrt(ll);
        if (n >= 4) {
            const pk__gram_sums z = pk__gram_sum(n, k, most_k, l, most_l, 1);
            const double m = (double)n, kl_1 = pk__unbiased(m, z.kl, z.row_kl, z.total_k, z.total_l),
                         kk_1 = pk__unbiased(m, z.kk, z.row_kk, z.total_k, z.total_k),
                         ll_1 = pk__unbiased(m, z.ll, z.row_ll, z.total_l, z.total_l);
            if (kk_1 > tiny && ll_1 > tiny)
                measures->cka_unbiased = kl_1 / sqrt(kk_1) / sqrt(ll_1);
        }
    }
    pk_release(context, means);
    return PK_OK;
}

/* ---- predictions ----------------------------------------------------------------------------------------- */

/* The probability of the right class, its log odds f_y - log sum of exp f_c over the others, and whether it is predicted. */
static int pk__right_class(size_t classes, const double *logits, size_t right, double *probability,
                           double *log_odds)
{
    double most = logits[0], others = -INFINITY, sum = 0, rest = 0;
    size_t predicted = 0;
    for (size_t c = 0; c < classes; c++) {
        if (logits[c] > most) {
            most = logits[c];
            predicted = c;
        }
        if (c != right)
            others = fmax(others, logits[c]);
    }
    for (size_t c = 0; c < classes; c++) {
        sum += exp(logits[c] - most);
        rest += c == right ? 0 : exp(logits[c] - others);
    }
    *probability = exp(logits[right] - most) / sum;
    *log_odds = logits[right] - others - log(rest);
    return predicted == right;
}

PK_API pk_status pk_measure_predictions(pk_context *context, size_t m, size_t classes, const double *surrogate,
                                        const double *network, const int64_t *labels,
                                        pk_prediction_measures *measures)
{
    const double *logits[2] = {surrogate, network};
    double *p[2], *odds[2], right[2] = {0, 0}, correlation = 0;
    size_t numbers = 0, both = 0, either = 0, count = 0;
    pk__arena arena = {NULL, 0, 0, 0};
    if (!measures || !classes)
        return pk__fail(context, PK_ARGUMENT, "measures: %s",
                        classes ? "the place for the result is NULL" : "predictions of no class");
    if (!pk__multiply(m, classes, &numbers))
        return pk__fail(context, PK_OVERFLOW, "measures: %zu x %zu predictions overflow", m, classes);
    pk_status status = pk__measure_check(context, "surrogate's predictions", numbers, surrogate);
    if (!status)
        status = pk__measure_check(context, "network's predictions", numbers, network);
    if (!status)
        status = pk__labels_check(context, m, classes, labels);
    if (status)
        return status;
    do
        for (int side = 0; side < 2; side++) {
            p[side] = pk__arena_take(&arena, m, sizeof(double));
            odds[side] = pk__arena_take(&arena, m, sizeof(double));
        }
    while (pk__arena_again(context, &arena, "probabilities", &status));
    if (status)
        return status;
    for (size_t i = 0; i < m; i++) {
        int good[2];
        for (int side = 0; side < 2; side++) {
            good[side] = pk__right_class(classes, logits[side] + i * classes, (size_t)labels[i],
                                         &p[side][count], &odds[side][count]);
            right[side] += good[side];
        }
        both += !good[0] && !good[1];
        either += !good[0] || !good[1];
        count += p[0][count] > 0 && p[0][count] < 1 && p[1][count] > 0 && p[1][count] < 1;
    }
    memset(measures, 0, sizeof *measures);
    measures->left_out = m - count;
    measures->r_miss = either ? (double)both / (double)either : (double)NAN;
    measures->tad = m ? (right[0] - right[1]) / (double)m : (double)NAN;
    status = pk_kendall(context, count, p[0], p[1], &measures->kendall);
    if (!status)
        status = pk_pearson(context, count, p[0], p[1], &measures->pearson);
    if (!status)
        status = pk_spearman(context, count, p[0], p[1], &measures->spearman);
    if (!status)
        status = pk_pearson(context, count, odds[0], odds[1], &correlation);
    measures->log_odds_r2 = correlation * correlation;
    pk_release(context, arena.base);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
