/* pathkernel/math/factorize.h: Cholesky's factor and eigenvalues of symmetric matrices, and singular values, in double.
 *
 * Cholesky: by blocks of columns from the left, matrix products in between. Eigenvalues: Householder's reduction to a
 * tridiagonal matrix, then QL with implicit shifts (Martin, Reinsch and Wilkinson 1968; EISPACK's tred2 and tql2): backward
 * stable, 3 n^3 flops or so with all vectors. Without vectors the reduction goes by blocks of columns, half of its 4/3 n^3
 * flops in matrix products (Dongarra, Sorensen and Hammarling 1989). Singular values: one-sided Jacobi rotations (Hestenes
 * 1958), which give small ones to more digits than a Gram matrix could (Demmel and Veselic 1992).
 *
 * The work is cut in the same way for any number of threads, so that the bits are the same. With PATHKERNEL_LAPACK defined (and
 * -llapack) LAPACK factorizes and finds the eigenvalues; its bits are its own.
 */
#ifndef PATHKERNEL_FACTORIZE_H
#define PATHKERNEL_FACTORIZE_H
#include "../base/parallel.h"
#include "elementary.h"
#include "matrix.h"

/* >>> declarations */
PK__BEGIN_C

/* matrix (n x n, symmetric positive definite, of which the lower triangle is read) becomes its Cholesky factor L, lower
 * triangular with matrix = L L^T; what stands above the diagonal stays. PK_ARGUMENT: not positive definite; *row is then the
 * first row that is not, and may be NULL. PK_NOT_FINITE. Cost n^3/3 flops, in threads. */
PK_API PK__MUST_USE pk_status pk_cholesky(pk_context *context, size_t n, double *matrix, size_t *row);

/* Replaces the columns of right (n x cols, row-major) by x with L L^T x = right; or, where half is 1, by x with L x = right.
 * L as pk_cholesky made it. Cost 2 n^2 flops a column and triangle, in threads by columns. */
PK_API PK__MUST_USE pk_status pk_cholesky_solve(pk_context *context, size_t n, const double *factor, int half,
                                                size_t cols, double *right);

/* values (n), ascending, and vectors (n x n, row k: that of values[k], of length 1) of a symmetric matrix (n x n, of which the
 * lower triangle is read): matrix = sum_k values[k] v_k v_k^T, to a few roundings of its largest value. vectors may be the
 * matrix itself, or NULL. PK_ARGUMENT: NULL, or not symmetric to 1e-6 of its largest number; PK_NOT_FINITE names the first
 * number; PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT. Memory: n^2 numbers where vectors is NULL, and 140 n. In threads where vectors is
 * NULL. */
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
#include <limits.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__FACTORIZE_SWEEPS = 60, PK__EIGENVALUES_PANELS = 4 * 32 + 8 + 2 };

#ifdef PATHKERNEL_LAPACK
/* LAPACK's own names: lapacke.h contradicts blis.h. Behind them stand lengths of texts, which C compilers pass, too. */
extern void dpotrf_(const char *triangle, const int *n, double *a, const int *lda, int *info, size_t);
extern void dsyevd_(const char *job, const char *triangle, const int *n, double *a, const int *lda, double *w,
                    double *work, const int *lwork, int *iwork, const int *liwork, int *info, size_t, size_t);
#endif

enum { PK__CHOLESKY_BLOCK = 64, PK__TRIDIAGONAL_BLOCK = 32, PK__TRIDIAGONAL_STRIPS = 8 };

#ifdef _OPENMP
#define PK__SIMD_SUM(sum) PK__PRAGMA(omp simd reduction(+ : sum))
#else
#define PK__SIMD_SUM(sum)
#endif

/* c := c - op(a) op(b), op(x) = x or x^T: op(a) is m x k, op(b) k x n, in double whatever pk_real is. */
static void pk__subtract_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k,
                                 const double *a, size_t a_ld, const double *b, size_t b_ld, double *c,
                                 size_t c_ld)
{
#ifdef PATHKERNEL_FLOAT
    for (size_t i = 0; i < m; i++)
        for (size_t l = 0; l < k; l++) {
            const double times = transpose_a ? a[l * a_ld + i] : a[i * a_ld + l];
            const double *row = transpose_b ? b + l : b + l * b_ld;
            const size_t across = transpose_b ? b_ld : 1;
            PK__SIMD
            for (size_t j = 0; j < n; j++)
                c[i * c_ld + j] -= times * row[j * across];
        }
#else
    pk__gemm(transpose_a, transpose_b, m, n, k, -1, a, a_ld, b, b_ld, 1, c, c_ld);
#endif
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

/* The rows first .. of a panel become rows x with x L^T = them: L is the triangle (width x width) at its diagonal. Some rows at a
 * time, turned round into scratch, so that the innermost loop runs over rows. */
static void pk__solve_panel(size_t rows, size_t width, const double *triangle, double *panel, size_t ld,
                            double *scratch)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < width; k++)
            scratch[k * PK__CHOLESKY_BLOCK + i] = panel[i * ld + k];
    for (size_t k = 0; k < width; k++) {
        double *x = scratch + k * PK__CHOLESKY_BLOCK;
        for (size_t l = 0; l < k; l++) {
            const double factor = triangle[k * ld + l], *y = scratch + l * PK__CHOLESKY_BLOCK;
            PK__SIMD
            for (size_t i = 0; i < PK__CHOLESKY_BLOCK; i++)
                x[i] -= factor * y[i];
        }
        for (size_t i = 0; i < rows; i++)
            x[i] /= triangle[k * ld + k];
    }
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < width; k++)
            panel[i * ld + k] = scratch[k * PK__CHOLESKY_BLOCK + i];
}

/* The factor of the block at the diagonal, in place; the row that is not positive, or width. */
static size_t pk__cholesky_block(size_t width, double *block, size_t ld)
{
    for (size_t j = 0; j < width; j++) {
        double *row = block + j * ld;
        for (size_t k = 0; k < j; k++) {
            double sum = row[k];
            for (size_t l = 0; l < k; l++)
                sum -= row[l] * block[k * ld + l];
            row[k] = sum / block[k * ld + k];
        }
        double pivot = row[j];
        for (size_t l = 0; l < j; l++)
            pivot -= row[l] * row[l];
        if (!(pivot > 0) || !pk__finite(pivot))
            return j;
        row[j] = sqrt(pivot);
    }
    return width;
}

/* From the left: the next columns lose what the columns before them contribute, are factorized, and divided. */
static size_t pk__cholesky_columns(pk_context *context, size_t n, double *matrix, double *scratch)
{
    enum { WIDTH = PK__CHOLESKY_BLOCK };
    for (size_t first = 0; first < n; first += WIDTH) {
        const size_t width = pk__min((size_t)WIDTH, n - first), below = n - first - width;
        const size_t tasks = (below + WIDTH - 1) / WIDTH;
        double *diagonal = matrix + first * n + first;
        pk__subtract_product(0, 1, width, width, first, matrix + first * n, n, matrix + first * n, n, diagonal,
                             n);
        const size_t row = pk__cholesky_block(width, diagonal, n);
        if (row < width)
            return first + row;
        pk__team team = pk__team_of(context, pk_threads(context), tasks);
        PK__PARALLEL(team)
        for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
            const size_t at = first + width + task * WIDTH, rows = pk__min((size_t)WIDTH, n - at);
            double *panel = matrix + at * n + first;
            pk__subtract_product(0, 1, rows, width, first, matrix + at * n, n, matrix + first * n, n, panel, n);
            pk__solve_panel(rows, width, diagonal, panel, n, scratch + (size_t)pk__thread() * WIDTH * WIDTH);
        }
        pk__team_end(&team);
    }
    return n;
}

/* The factor in place, and the first row that has none, or n. scratch: PK__CHOLESKY_BLOCK^2 numbers for each thread. */
PK__PRIVATE size_t pk__cholesky_factor(pk_context *context, size_t n, double *matrix, double *scratch)
{
#ifdef PATHKERNEL_LAPACK
    /* Its upper triangle by columns is the lower one by rows. */
    const int order = (int)n;
    int info = 0;
    if (n <= INT_MAX / 200) {
        dpotrf_("U", &order, matrix, &order, &info, 1);
        return info > 0 ? (size_t)info - 1 : n;
    }
#endif
    return pk__cholesky_columns(context, n, matrix, scratch);
}

PK_API pk_status pk_cholesky(pk_context *context, size_t n, double *matrix, size_t *row)
{
    static const char name[] = "Cholesky's factor";
    size_t numbers = 0, bad = n;
    double largest = 0, *scratch = NULL;
    if (!n)
        return PK_OK;
    if (!matrix)
        return pk__fail(context, PK_ARGUMENT, "%s: the matrix is NULL", name);
    if (!pk__multiply(n, n, &numbers) || numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "%s: a matrix of %zu rows and columns overflows", name, n);
    pk_status status = pk__factorize_check(context, name, n, n, matrix, &largest);
    if (!status)
        status = pk_allocate(context, (size_t)pk_threads(context) * PK__CHOLESKY_BLOCK,
                             PK__CHOLESKY_BLOCK * sizeof *scratch, name, &scratch);
    if (!status)
        bad = pk__cholesky_factor(context, n, matrix, scratch);
    pk_release(context, scratch);
    if (row)
        *row = bad;
    if (!status && bad < n)
        status = pk__fail(context, PK_ARGUMENT, "%s: the matrix is not positive definite: not at row %zu", name,
                          bad);
    return status;
}

/* Columns of right (rows x width, leading dimension ld), by blocks of rows: L x = right, or with `up` L^T x = right. */
static void pk__solve_columns(size_t n, const double *factor, size_t factor_ld, int up, size_t width, double *x,
                              size_t ld)
{
    enum { ROWS = PK__CHOLESKY_BLOCK };
    const size_t blocks = (n + ROWS - 1) / ROWS;
    for (size_t b = 0; b < blocks; b++) {
        const size_t first = (up ? blocks - 1 - b : b) * ROWS, end = pk__min(first + (size_t)ROWS, n);
        if (up)
            pk__subtract_product(1, 0, end - first, width, n - end, factor + end * factor_ld + first, factor_ld,
                                 x + end * ld, ld, x + first * ld, ld);
        else
            pk__subtract_product(0, 0, end - first, width, first, factor + first * factor_ld, factor_ld, x, ld,
                                 x + first * ld, ld);
        for (size_t r = first; r < end; r++) {
            const size_t i = up ? end - 1 - (r - first) : r;
            double *row = x + i * ld;
            for (size_t k = up ? i + 1 : first; k < (up ? end : i); k++) {
                const double times = up ? factor[k * factor_ld + i] : factor[i * factor_ld + k];
                const double *other = x + k * ld;
                PK__SIMD
                for (size_t c = 0; c < width; c++)
                    row[c] -= times * other[c];
            }
            for (size_t c = 0; c < width; c++)
                row[c] /= factor[i * factor_ld + i];
        }
    }
}

/* pk_cholesky_solve with a leading dimension of the factor, and in threads by columns. */
PK__PRIVATE void pk__triangle_solve(pk_context *context, size_t n, const double *factor, size_t factor_ld,
                                    int half, size_t cols, double *right)
{
    enum { WIDTH = 32 };
    const size_t tasks = n ? (cols + WIDTH - 1) / WIDTH : 0;
    pk__team team = pk__team_of(context, pk_threads(context), tasks);
    PK__PARALLEL(team)
    for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
        const size_t width = pk__min((size_t)WIDTH, cols - task * WIDTH);
        for (int up = 0; up < (half ? 1 : 2); up++)
            pk__solve_columns(n, factor, factor_ld, up, width, right + task * WIDTH, cols);
    }
    pk__team_end(&team);
}

PK_API pk_status pk_cholesky_solve(pk_context *context, size_t n, const double *factor, int half, size_t cols,
                                   double *right)
{
    if (n && cols && (!factor || !right))
        return pk__fail(context, PK_ARGUMENT, "Cholesky's factor: it or the right sides are NULL");
    pk__triangle_solve(context, n, factor, n, half, cols, right);
    return PK_OK;
}

/* ---- eigenvalues ----------------------------------------------------------------------------------------- */

#ifndef PATHKERNEL_LAPACK
/* One strip of w := A v, of which the lower triangle is there: its rows first .. last - 1 times v, and their transposes times the
 * v of these rows, into partial (n). Four rows at a time. */
static void pk__symmetric_strip(const double *a, size_t ld, size_t first, size_t last, const double *v,
                                double *partial)
{
    size_t i = first;
    memset(partial, 0, last * sizeof *partial);
    for (; i + 4 <= last; i += 4) {
        const double *a0 = a + i * ld, *a1 = a0 + ld, *a2 = a1 + ld, *a3 = a2 + ld;
        const double v0 = v[i], v1 = v[i + 1], v2 = v[i + 2], v3 = v[i + 3];
        double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#ifdef _OPENMP
        PK__PRAGMA(omp simd reduction(+ : s0, s1, s2, s3))
#endif
        for (size_t j = 0; j < i; j++) {
            const double x = v[j];
            partial[j] += a0[j] * v0 + a1[j] * v1 + a2[j] * v2 + a3[j] * v3;
            s0 += a0[j] * x;
            s1 += a1[j] * x;
            s2 += a2[j] * x;
            s3 += a3[j] * x;
        }
        partial[i] += s0 + a0[i] * v0 + a1[i] * v1 + a2[i] * v2 + a3[i] * v3;
        partial[i + 1] += s1 + a1[i] * v0 + a1[i + 1] * v1 + a2[i + 1] * v2 + a3[i + 1] * v3;
        partial[i + 2] += s2 + a2[i] * v0 + a2[i + 1] * v1 + a2[i + 2] * v2 + a3[i + 2] * v3;
        partial[i + 3] += s3 + a3[i] * v0 + a3[i + 1] * v1 + a3[i + 2] * v2 + a3[i + 3] * v3;
    }
    for (; i < last; i++) {
        const double *row = a + i * ld;
        double sum = row[i] * v[i];
        for (size_t j = 0; j < i; j++) {
            partial[j] += row[j] * v[i];
            sum += row[j] * v[j];
        }
        partial[i] += sum;
    }
}

/* w := A v (n): strips of about the same area, so that each costs the same, added in their order. partial: strips x n. */
static void pk__symmetric_times(pk_context *context, size_t n, const double *a, size_t ld, const double *v,
                                double *w, double *partial)
{
    size_t ends[PK__TRIDIAGONAL_STRIPS + 1] = {0};
    const size_t strips = n < 256 ? 1 : PK__TRIDIAGONAL_STRIPS;
    for (size_t s = 1; s <= strips; s++)
        ends[s] = s == strips ? n : (size_t)((double)n * sqrt((double)s / (double)strips)) / 4 * 4;
    pk__team team = pk__team_of(context, pk_threads(context), strips);
    PK__PARALLEL(team)
    for (size_t s = pk__first_task(&team); s < strips; s = pk__next_task(&team))
        pk__symmetric_strip(a, ld, ends[s], ends[s + 1], v, partial + s * n);
    pk__team_end(&team);
    memset(w, 0, n * sizeof *w);
    for (size_t s = 0; s < strips; s++)
        for (size_t j = 0; j < ends[s + 1]; j++)
            w[j] += partial[s * n + j];
}

/* Householder's vector v (v[0] = 1) of x (n), which may be v: (1 - tau v v^T) x = (beta, 0 ...). Returns tau. */
static double pk__householder(size_t n, const double *x, double *v, double *beta)
{
    double below = 0, largest = 0;
    const double first = x[0];
    for (size_t i = 1; i < n; i++)
        largest = fmax(largest, fabs(x[i]));
    if (largest == 0) {
        *beta = first;
        memset(v, 0, n * sizeof *v);
        v[0] = 1;
        return 0;
    }
    largest = fmax(largest, fabs(first));
    for (size_t i = 1; i < n; i++)
        below += x[i] / largest * (x[i] / largest);
    const double norm = largest * sqrt(below + first / largest * (first / largest));
    *beta = first > 0 ? -norm : norm;
    for (size_t i = 1; i < n; i++)
        v[i] = x[i] / (first - *beta);
    v[0] = 1;
    return (*beta - first) / *beta;
}

/* a (n x n, lower triangle) becomes tridiagonal: d, and e[1 ...] beside it. Columns by blocks: A := A - v w^T - w v^T of those in
 * a block is put off to its end, one matrix product, and until then applied to what is read. memory: (4 block + strips + 1) n. */
static void pk__tridiagonalize_blocks(pk_context *context, size_t n, double *a, double *d, double *e,
                                      double *memory)
{
    enum { BLOCK = PK__TRIDIAGONAL_BLOCK, ROWS = 64 };
    double *vw = memory, *wv = vw + 2 * BLOCK * n, *partial = wv + 2 * BLOCK * n,
           *x = partial +
                PK__TRIDIAGONAL_STRIPS * n; /* rows of vw: v_1 .. v_b w_1 .. w_b; of wv: w_1 .. v_1 .. */
    for (size_t first = 0; first < n; first += BLOCK) {
        const size_t block = pk__min((size_t)BLOCK, n - first);
        memset(vw, 0, 4 * BLOCK * n * sizeof *vw);
        for (size_t b = 0; b < block; b++) {
            const size_t j = first + b, m = n - j - 1; /* m: below the diagonal */
            for (size_t i = j; i < n; i++) {
                double sum = a[i * n + j];
                for (size_t l = 0; l < b; l++)
                    sum -= vw[i * 2 * BLOCK + l] * wv[j * 2 * BLOCK + l] +
                           wv[i * 2 * BLOCK + l] * vw[j * 2 * BLOCK + l];
                if (i == j)
                    d[j] = sum;
                else
                    x[i - j - 1] = sum;
            }
            if (!m)
                break;
            double beta = 0, dots[2 * BLOCK] = {0}, vdotw = 0;
            const double tau = pk__householder(m, x, x, &beta);
            e[j + 1] = beta;
            /* w = tau (A v - V W^T v - W V^T v), and then w -= tau/2 (w.v) v */
            double *w = x + n;
            pk__symmetric_times(context, m, a + (j + 1) * n + j + 1, n, x, w, partial);
            for (size_t i = 0; i < m; i++) {
                const double *row = vw + (i + j + 1) * 2 * BLOCK;
                for (size_t l = 0; l < 2 * BLOCK; l++)
                    dots[l] += row[l] * x[i];
            }
            for (size_t i = 0; i < m; i++) { /* the halves of a row of wv are those of vw, exchanged */
                const double *row = wv + (i + j + 1) * 2 * BLOCK;
                double sum = 0;
                for (size_t l = 0; l < 2 * BLOCK; l++)
                    sum += row[l] * dots[l];
                w[i] = tau * (w[i] - sum);
                vdotw += w[i] * x[i];
            }
            for (size_t i = 0; i < m; i++) {
                double *row = vw + (i + j + 1) * 2 * BLOCK, *other = wv + (i + j + 1) * 2 * BLOCK;
                row[b] = other[BLOCK + b] = x[i];
                row[BLOCK + b] = other[b] = w[i] - tau / 2 * vdotw * x[i];
            }
        }
        const size_t next = first + block, tasks = (n - next + ROWS - 1) / ROWS;
        pk__team team = pk__team_of(context, pk_threads(context), tasks);
        PK__PARALLEL(team)
        for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
            const size_t at = next + task * ROWS, rows = pk__min((size_t)ROWS, n - at);
            pk__subtract_product(0, 1, rows, at + rows - next, 2 * BLOCK, vw + at * 2 * BLOCK, 2 * BLOCK,
                                 wv + next * 2 * BLOCK, 2 * BLOCK, a + at * n + next, n);
        }
        pk__team_end(&team);
    }
    e[0] = 0;
}
#endif

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

/* Rotates rows of v (or none, NULL) so that d holds the eigenvalues. 0: no end in sight. */
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
                double *here = v ? v + i * n : NULL, *after = v ? here + n : NULL;
                c3 = c2, c2 = c, s2 = s;
                g = c * e[i];
                h = c * p;
                r = hypot(p, e[i]);
                e[i + 1] = s * r;
                s = e[i] / r;
                c = p / r;
                p = c * d[i] - s * g;
                d[i + 1] = h + s * (c * g + s * d[i]);
                for (size_t k = 0; v && k < n; k++) {
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

#ifdef PATHKERNEL_LAPACK
/* memory: 138 n, of which it takes 2 n + 1. */
static int pk__lapack_eigenvalues(int n, double *matrix, double *values, double *memory)
{
    const int doubles = 138 * n, integers = 1;
    int integer = 0, info = 0;
    dsyevd_("N", "U", &n, matrix, &n, values, memory, &doubles, &integer, &integers, &info, 1, 1);
    return info == 0;
}
#endif

PK_API pk_status pk_symmetric_eigenvalues(pk_context *context, size_t n, const double *matrix, double *values,
                                          double *vectors)
{
    static const char name[] = "eigenvalues";
    double largest = 0, *beside, *own, *panels;
    if (!n)
        return PK_OK;
    if (!matrix || !values)
        return pk__fail(context, PK_ARGUMENT, "%s: the matrix or the place for the values is NULL", name);
    if (n > SIZE_MAX / 64 / n)
        return pk__fail(context, PK_OVERFLOW, "%s: a matrix of %zu rows and columns overflows", name, n);
    pk_status status = pk__factorize_check(context, name, n, n, matrix, &largest);
    for (size_t i = 0; i < n && !status; i++)
        for (size_t j = 0; j < i; j++)
            if (fabs(matrix[i * n + j] - matrix[j * n + i]) > 1e-6 * largest)
                return pk__fail(context, PK_ARGUMENT,
                                "%s: the matrix is not symmetric: (%zu, %zu) is %g and (%zu, %zu) %g", name, i,
                                j, matrix[i * n + j], j, i, matrix[j * n + i]);
    if (status)
        return status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        beside = pk__arena_take(&arena, n, sizeof *beside);
        own = pk__arena_take(&arena, vectors ? 0 : n, n * sizeof *own);
        panels = pk__arena_take(&arena, vectors ? 0 : n, PK__EIGENVALUES_PANELS * sizeof *panels);
    } while (pk__arena_again(context, &arena, name, &status));
    if (status)
        return status;
    double *v = vectors ? vectors : own;
    const double scale = largest > 0 ? largest : 1; /* so that no square overflows */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++)
            v[i * n + j] = matrix[i * n + j] / scale;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++)
            v[j * n + i] = v[i * n + j];
    int found = 1;
#ifdef PATHKERNEL_LAPACK
    if (!vectors && n <= INT_MAX / 200)
        found = pk__lapack_eigenvalues((int)n, v, values, panels);
    else {
        pk__tridiagonalize(n, v, values, beside);
        found = pk__diagonalize(n, v, values, beside);
    }
#else
    if (vectors)
        pk__tridiagonalize(n, v, values, beside);
    else
        pk__tridiagonalize_blocks(context, n, v, values, beside, panels);
    found = pk__diagonalize(n, vectors, values, beside);
#endif
    if (!found)
        status = pk__fail(context, PK_NOT_FINITE, "%s: the iteration does not converge", name);
    for (size_t i = 0; i < n; i++)
        values[i] *= scale;
    pk__sort_values(n, values, 1, vectors, n, NULL, 0);
    pk_release(context, arena.base);
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
    double largest = 0, *w, *v;
    if (!few)
        return PK_OK;
    if (!matrix || !values)
        return pk__fail(context, PK_ARGUMENT, "%s: the matrix or the place for the values is NULL", name);
    if (many > SIZE_MAX / 64 / few)
        return pk__fail(context, PK_OVERFLOW, "%s: a matrix of %zu x %zu overflows", name, rows, cols);
    pk_status status = pk__factorize_check(context, name, rows, cols, matrix, &largest);
    if (status)
        return status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        w = pk__arena_take(&arena, few, many * sizeof *w);
        v = pk__arena_take(&arena, few, few * sizeof *v);
    } while (pk__arena_again(context, &arena, name, &status));
    if (status)
        return status;
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
        memcpy(wide, w, few * many * sizeof *wide);
    if (narrow)
        memcpy(narrow, v, few * few * sizeof *narrow);
    pk_release(context, arena.base);
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
