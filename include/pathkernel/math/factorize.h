/* pathkernel/math/factorize.h: eigenvalues of symmetric matrices, and singular values, in double.
 *
 * Symmetric: Householder's reduction to a tridiagonal matrix, then QL with implicit shifts (Martin, Reinsch and Wilkinson 1968;
 * EISPACK's tred2 and tql2): backward stable, 3 n^3 flops or so with all vectors. Singular values: one-sided Jacobi
 * rotations (Hestenes 1958), which give small ones to more digits than a Gram matrix could (Demmel and Veselic 1992).
 * One thread; the same bits whatever the context says.
 */
#ifndef PATHKERNEL_FACTORIZE_H
#define PATHKERNEL_FACTORIZE_H
#include "../base/context.h"

/* >>> declarations */
PK__BEGIN_C

/* values (n), ascending, and vectors (n x n, row k: that of values[k], of length 1) of a symmetric matrix (n x n, of which the
 * lower triangle is read): matrix = sum_k values[k] v_k v_k^T, to a few roundings of its largest value. vectors may be the
 * matrix itself, or NULL. PK_ARGUMENT: NULL, or not symmetric to 1e-6 of its largest number; PK_NOT_FINITE names the first
 * number; PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT. Memory: n^2 numbers where vectors is NULL, and n. */
PK_API PK__MUST_USE pk_status pk_symmetric_eigenvalues(pk_context *context, size_t n, const double *matrix,
                                                       double *values, double *vectors);

/* The r = min(rows, cols) singular values of a matrix (rows x cols), descending, with the left vectors (r x rows) and the right
 * ones (r x cols), either may be NULL: matrix = sum_k values[k] left_k right_k^T. Vectors of values that are 0 are 0 on the
 * longer side. Cost: about 10 sweeps of 3 r^2 max(rows, cols) flops. Memory: 2 rows cols numbers at most, and r^2.
 * Statuses as above. */
PK_API PK__MUST_USE pk_status pk_singular_values(pk_context *context, size_t rows, size_t cols,
                                                 const double *matrix, double *values, double *left,
                                                 double *right);

/* The smallest r for which the r largest squares of the values, which are in descending order, are at least `fraction` of their
 * sum; 0 where all are 0. With the singular values of a sensitivity and 0.95: its signal dimension. */
PK_API size_t pk_signal_dimension(size_t count, const double *values, double fraction);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_FACTORIZE_IMPLEMENTED)
#define PATHKERNEL_FACTORIZE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__FACTORIZE_SWEEPS = 60 };

/* v (n x n), symmetric, becomes Q^T with Q^T A Q tridiagonal: diagonal d, and e[1 ...] beside it. */
static void pk__tridiagonalize(size_t n, double *v, double *d, double *e)
{
    for (size_t j = 0; j < n; j++) /* number (i, j) is v[j n + i]: rows are what others call columns */
        d[j] = v[j * n + n - 1];
    for (size_t i = n - 1; i > 0; i--) {
        double scale = 0, h = 0;
        for (size_t k = 0; k < i; k++)
            scale += fabs(d[k]);
        if (scale == 0) {
            e[i] = d[i - 1];
            for (size_t j = 0; j < i; j++) {
                d[j] = v[j * n + i - 1];
                v[j * n + i] = v[i * n + j] = 0;
            }
            d[i] = 0;
            continue;
        }
        for (size_t k = 0; k < i; k++) {
            d[k] /= scale;
            h += d[k] * d[k];
        }
        double f = d[i - 1], g = f > 0 ? -sqrt(h) : sqrt(h);
        e[i] = scale * g;
        h -= f * g;
        d[i - 1] = f - g;
        memset(e, 0, i * sizeof *e);
        for (size_t j = 0; j < i; j++) {
            const double *column = v + j * n;
            f = d[j];
            v[i * n + j] = f;
            g = e[j] + column[j] * f;
            for (size_t k = j + 1; k < i; k++) {
                g += column[k] * d[k];
                e[k] += column[k] * f;
            }
            e[j] = g;
        }
        f = 0;
        for (size_t j = 0; j < i; j++) {
            e[j] /= h;
            f += e[j] * d[j];
        }
        for (size_t j = 0; j < i; j++)
            e[j] -= f / (h + h) * d[j];
        for (size_t j = 0; j < i; j++) {
            double *column = v + j * n;
            f = d[j];
            g = e[j];
            for (size_t k = j; k < i; k++)
                column[k] -= f * e[k] + g * d[k];
            d[j] = column[i - 1];
            column[i] = 0;
        }
        d[i] = h;
    }
    for (size_t i = 0; i + 1 < n; i++) {
        double *next = v + (i + 1) * n;
        v[i * n + n - 1] = v[i * n + i];
        v[i * n + i] = 1;
        if (d[i + 1] != 0) {
            for (size_t k = 0; k <= i; k++)
                d[k] = next[k] / d[i + 1];
            for (size_t j = 0; j <= i; j++) {
                double g = 0, *column = v + j * n;
                for (size_t k = 0; k <= i; k++)
                    g += next[k] * column[k];
                for (size_t k = 0; k <= i; k++)
                    column[k] -= g * d[k];
            }
        }
        memset(next, 0, (i + 1) * sizeof *next);
    }
    for (size_t j = 0; j < n; j++) {
        d[j] = v[j * n + n - 1];
        v[j * n + n - 1] = 0;
    }
    v[n * n - 1] = 1;
    e[0] = 0;
}

/* Rotates rows of v so that d holds the eigenvalues. 0: no end in sight. */
static int pk__diagonalize(size_t n, double *v, double *d, double *e)
{
    double f = 0, largest = 0;
    const double eps = 2.220446049250313e-16;
    for (size_t i = 1; i < n; i++)
        e[i - 1] = e[i];
    e[n - 1] = 0;
    for (size_t l = 0; l < n; l++) {
        size_t m = l;
        largest = fmax(largest, fabs(d[l]) + fabs(e[l]));
        while (m + 1 < n && !(fabs(e[m]) <= eps * largest))
            m++;
        for (int sweep = 0; m > l && fabs(e[l]) > eps * largest; sweep++) {
            if (sweep == PK__FACTORIZE_SWEEPS)
                return 0;
            double g = d[l], p = (d[l + 1] - g) / (2 * e[l]), r = p < 0 ? -hypot(p, 1) : hypot(p, 1);
            d[l] = e[l] / (p + r);
            d[l + 1] = e[l] * (p + r);
            const double below = d[l + 1], beside = e[l + 1];
            double h = g - d[l], c = 1, c2 = 1, c3 = 1, s = 0, s2 = 0;
            for (size_t i = l + 2; i < n; i++)
                d[i] -= h;
            f += h;
            p = d[m];
            for (size_t i = m; i-- > l;) {
                double *here = v + i * n, *after = here + n;
                c3 = c2, c2 = c, s2 = s;
                g = c * e[i];
                h = c * p;
                r = hypot(p, e[i]);
                e[i + 1] = s * r;
                s = e[i] / r;
                c = p / r;
                p = c * d[i] - s * g;
                d[i + 1] = h + s * (c * g + s * d[i]);
                for (size_t k = 0; k < n; k++) {
                    h = after[k];
                    after[k] = s * here[k] + c * h;
                    here[k] = c * here[k] - s * h;
                }
            }
            p = -s * s2 * c3 * beside * e[l] / below;
            e[l] = s * p;
            d[l] = c * p;
        }
        d[l] += f;
        e[l] = 0;
    }
    return 1;
}

/* Sorts values with the rows of vectors, ascending; NULL: none. By selection: at most n exchanges of rows. */
static void pk__sort_values(size_t count, double *values, double sign, double *a, size_t a_width, double *b,
                            size_t b_width)
{
    double *const vectors[2] = {a, b};
    const size_t widths[2] = {a_width, b_width};
    for (size_t i = 0; i < count; i++) {
        size_t least = i;
        for (size_t k = i + 1; k < count; k++)
            least = sign * values[k] < sign * values[least] ? k : least;
        if (least == i)
            continue;
        const double value = values[i];
        values[i] = values[least];
        values[least] = value;
        for (int side = 0; side < 2; side++)
            for (size_t k = 0; vectors[side] && k < widths[side]; k++) {
                double *x = vectors[side] + i * widths[side] + k, *y = vectors[side] + least * widths[side] + k;
                const double number = *x;
                *x = *y;
                *y = number;
            }
    }
}

/* The largest |number|, or a failure. */
static pk_status pk__factorize_check(pk_context *context, const char *name, size_t rows, size_t cols,
                                     const double *matrix, double *largest)
{
    *largest = 0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            if (!pk__finite(matrix[i * cols + j]))
                return pk__fail(context, PK_NOT_FINITE, "%s: the number (%zu, %zu) of the matrix is not finite",
                                name, i, j);
            *largest = fmax(*largest, fabs(matrix[i * cols + j]));
        }
    return PK_OK;
}

PK_API pk_status pk_symmetric_eigenvalues(pk_context *context, size_t n, const double *matrix, double *values,
                                          double *vectors)
{
    static const char name[] = "eigenvalues";
    double largest = 0, *memory = NULL;
    size_t numbers = 0;
    if (!n)
        return PK_OK;
    if (!matrix || !values)
        return pk__fail(context, PK_ARGUMENT, "%s: the matrix or the place for the values is NULL", name);
    if (!pk__multiply(n, n, &numbers) || numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "%s: a matrix of %zu rows and columns overflows", name, n);
    pk_status status = pk__factorize_check(context, name, n, n, matrix, &largest);
    for (size_t i = 0; i < n && !status; i++)
        for (size_t j = 0; j < i; j++)
            if (fabs(matrix[i * n + j] - matrix[j * n + i]) > 1e-6 * largest)
                return pk__fail(context, PK_ARGUMENT,
                                "%s: the matrix is not symmetric: (%zu, %zu) is %g and (%zu, %zu) %g", name, i,
                                j, matrix[i * n + j], j, i, matrix[j * n + i]);
    if (!status)
        status = pk_allocate(context, n + (vectors ? 0 : numbers), sizeof *memory, name, &memory);
    if (status)
        return status;
    double *v = vectors ? vectors : memory + n;
    const double scale = largest > 0 ? largest : 1; /* so that no square overflows */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++)
            v[i * n + j] = matrix[i * n + j] / scale;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++)
            v[j * n + i] = v[i * n + j];
    pk__tridiagonalize(n, v, values, memory);
    if (!pk__diagonalize(n, v, values, memory))
        status = pk__fail(context, PK_NOT_FINITE, "%s: the iteration does not converge", name);
    for (size_t i = 0; i < n; i++)
        values[i] *= scale;
    pk__sort_values(n, values, 1, v, n, NULL, 0);
    pk_release(context, memory);
    return status;
}

/* Rotates pairs of the `count` rows of w (each `width`), and with them rows of v (each `count`), until all are orthogonal. */
static int pk__orthogonalize(size_t count, size_t width, double *w, double *v)
{
    for (int sweep = 0; sweep < PK__FACTORIZE_SWEEPS; sweep++) {
        int turned = 0;
        for (size_t i = 0; i < count; i++)
            for (size_t j = i + 1; j < count; j++) {
                double *a = w + i * width, *b = w + j * width, aa = 0, bb = 0, ab = 0;
                for (size_t k = 0; k < width; k++) {
                    aa += a[k] * a[k];
                    bb += b[k] * b[k];
                    ab += a[k] * b[k];
                }
                if (!(fabs(ab) > 4e-16 * sqrt(aa) * sqrt(bb)) || aa < 1e-300 || bb < 1e-300)
                    continue;
                turned = 1;
                const double zeta = (bb - aa) / (2 * ab);
                const double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + hypot(zeta, 1));
                const double c = 1 / hypot(t, 1), s = c * t;
                for (int side = 0; side < 2; side++) {
                    double *x = side ? v + i * count : a, *y = side ? v + j * count : b;
                    for (size_t k = 0; k < (side ? count : width); k++) {
                        const double before = x[k];
                        x[k] = c * before - s * y[k];
                        y[k] = s * before + c * y[k];
                    }
                }
            }
        if (!turned)
            return 1;
    }
    return 0;
}

PK_API pk_status pk_singular_values(pk_context *context, size_t rows, size_t cols, const double *matrix,
                                    double *values, double *left, double *right)
{
    static const char name[] = "singular values";
    const size_t few = pk__min(rows, cols), many = pk__max(rows, cols);
    double largest = 0, *memory = NULL;
    size_t numbers = 0;
    if (!few)
        return PK_OK;
    if (!matrix || !values)
        return pk__fail(context, PK_ARGUMENT, "%s: the matrix or the place for the values is NULL", name);
    if (!pk__multiply(few, many, &numbers) || numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "%s: a matrix of %zu x %zu overflows", name, rows, cols);
    pk_status status = pk__factorize_check(context, name, rows, cols, matrix, &largest);
    if (!status)
        status = pk_allocate(context, numbers + few * few, sizeof *memory, name, &memory);
    if (status)
        return status;
    double *w = memory, *v = memory + numbers;
    const double scale = largest > 0 ? largest : 1;
    for (size_t i = 0; i < few; i++) {
        for (size_t k = 0; k < many; k++)
            w[i * many + k] = (rows >= cols ? matrix[k * cols + i] : matrix[i * cols + k]) / scale;
        v[i * few + i] = 1;
    }
    if (!pk__orthogonalize(few, many, w, v))
        status = pk__fail(context, PK_NOT_FINITE, "%s: the iteration does not converge", name);
    for (size_t i = 0; i < few; i++) {
        double norm = 0;
        for (size_t k = 0; k < many; k++)
            norm += w[i * many + k] * w[i * many + k];
        norm = sqrt(norm);
        values[i] = norm * scale;
        for (size_t k = 0; k < many; k++)
            w[i * many + k] /= norm > 0 ? norm : 1;
    }
    pk__sort_values(few, values, -1, w, many, v, few);
    double *wide = rows >= cols ? left : right, *narrow = rows >= cols ? right : left;
    if (wide)
        memcpy(wide, w, numbers * sizeof *wide);
    if (narrow)
        memcpy(narrow, v, few * few * sizeof *narrow);
    pk_release(context, memory);
    return status;
}

PK_API size_t pk_signal_dimension(size_t count, const double *values, double fraction)
{
    double sum = 0, so_far = 0;
    size_t r = 0;
    for (size_t i = 0; i < count; i++)
        sum += values[i] * values[i];
    while (r < count && sum > 0 && so_far < fraction * sum)
        so_far += values[r] * values[r], r++;
    return r;
}

PK__END_CODE
/* <<< implementation */
#endif
