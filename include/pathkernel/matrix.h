/* pathkernel/matrix.h: views of matrices, and every matrix product of the library: BLIS, or the portable
 * fallback that gives the same numbers to rounding.
 *
 * Products run on one thread; the library is parallel over tiles around them. Tile sizes depend on shapes
 * only. The bits of a product depend on its shapes and values, not on addresses, ld or threads; those of an
 * element of the portable product do not even depend on how many rows and columns are beside it (with
 * BLIS they do).
 */
#ifndef PATHKERNEL_MATRIX_H
#define PATHKERNEL_MATRIX_H
#include "context.h"

/* >>> declarations */
PK__BEGIN_C

/* Row-major view: element (i, j) is data[i * ld + j], ld >= cols. Owns nothing. */
typedef struct pk_matrix {
    pk_real *data;
    size_t rows, cols, ld;
} pk_matrix;

/* A contiguous row-major view (ld == cols). */
PK_API pk_matrix pk_matrix_view(pk_real *data, size_t rows, size_t cols);

/* C := beta C + alpha op(A) op(B), op(X) = X or X^T.
 * op(A) is m x k, op(B) is k x n, C is m x n. C must not overlap A or B. With beta == 0, C may hold
 * anything, NaN included. Cost 2 m n k flops, one thread.
 * With alpha == 0, A and B are not read.
 * PK_SHAPE where the shapes disagree or an ld is smaller than its cols; PK_ARGUMENT for NULL data of a
 * matrix that is not empty, or where C overlaps an operand (shares an element with it; where their ld
 * differ: where the address ranges intersect); PK_OVERFLOW for a matrix larger than memory. C is untouched
 * then. */
PK_API PK__MUST_USE pk_status pk_matrix_multiply(pk_context *context, pk_real alpha, pk_matrix a,
                                                 int transpose_a, pk_matrix b, int transpose_b, pk_real beta,
                                                 pk_matrix c);

/* The name of what multiplies: "BLIS 0.9.0 (zen3)" or "portable". Writes at most size bytes, NUL included. */
PK_API void pk_matrix_backend(char *text, size_t size);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MATRIX_IMPLEMENTED)
#define PATHKERNEL_MATRIX_IMPLEMENTED
/* >>> implementation */
#include <stdio.h>
#include <string.h>
#ifdef PATHKERNEL_BLIS
/* blis.h needs pthread_barrier_t, which a strict -std=c11 hides once a header of the C library came first. */
#if defined(__GLIBC__) && !defined(__USE_XOPEN2K)
#error \
    "PATHKERNEL_BLIS needs POSIX: compile with -std=gnu11 or -D_POSIX_C_SOURCE=200809L, or include pathkernel first"
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#endif
#include <blis.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif
PK__BEGIN_C

/* C := beta C, where beta == 0 overwrites whatever was there. */
PK__PRIVATE void pk__scale(size_t m, size_t n, pk_real beta, pk_real *c, size_t ldc)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
}

#ifdef PATHKERNEL_BLIS

PK__PRIVATE void pk__product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    /* A rntm of its own: with none, BLIS reads the environment at each call and may abort in nested regions. */
    rntm_t runtime;
    bli_rntm_init(&runtime);
    bli_rntm_set_num_threads(1, &runtime);
    /* The small-matrix path reads a transposed B in place, at 16 to 22 GF/s instead of 30 to 44 where k is small
     * or large (bench_matrix, example_major). Packing costs 15 % where few rows use B. */
    if (transpose_b && (m >= 32 || k < 32 || k >= 384))
        bli_rntm_set_pack_b(TRUE, &runtime);
    inc_t row_a = transpose_a ? 1 : (inc_t)lda, column_a = transpose_a ? (inc_t)lda : 1;
    inc_t row_b = transpose_b ? 1 : (inc_t)ldb, column_b = transpose_b ? (inc_t)ldb : 1;
#ifdef PATHKERNEL_FLOAT
    bli_rntm_disable_l3_sup(&runtime); /* 0.9.0's small sgemm reads past its operands */
    bli_sgemm_ex(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, (dim_t)m, (dim_t)n, (dim_t)k, &alpha, (pk_real *)a,
                 row_a, column_a, (pk_real *)b, row_b, column_b, &beta, c, (inc_t)ldc, 1, NULL, &runtime);
#else
    bli_dgemm_ex(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, (dim_t)m, (dim_t)n, (dim_t)k, &alpha, (pk_real *)a,
                 row_a, column_a, (pk_real *)b, row_b, column_b, &beta, c, (inc_t)ldc, 1, NULL, &runtime);
#endif
}

#else

/* The portable product: both operands are packed, and a micro kernel keeps a tile of C in registers.
 * Every element of C is, whatever m, n and its place, the same sum: blocks of PK__DEPTH terms, each added
 * in ascending order to one accumulator. So the bits of an element depend on its row of op(A), its column
 * of op(B), k, alpha and beta only.
 *
 * A vector is what one register holds. The tile is PK__TILE_ROWS x 2 vectors: the accumulators and what
 * is multiplied fit into 16 registers. GNU vectors, since the vectorisers of gcc and clang differ by a
 * factor of 6 on the same loops over arrays (gcc 12: 6.7 GF/s with arrays, 44 with vectors). */
#if defined(__GNUC__)
#if defined(__AVX__)
#define PK__VECTOR_BYTES 32
#define PK__TILE_ROWS 6
#else
#define PK__VECTOR_BYTES 16
#define PK__TILE_ROWS 4
#endif
typedef pk_real pk__vector __attribute__((vector_size(PK__VECTOR_BYTES), aligned(sizeof(pk_real)), may_alias));
#else
#define PK__TILE_ROWS 4
typedef pk_real pk__vector;
#endif

enum {
    PK__LANES = (int)(sizeof(pk__vector) / sizeof(pk_real)),
    PK__TILE_COLUMNS = 2 * PK__LANES,
    PK__DEPTH = 128,                    /* terms per block: a panel of B stays in the first-level cache */
    PK__BLOCK_ROWS = 12 * PK__TILE_ROWS /* with PK__DEPTH: the packed A, on the stack, <= 72 KiB */
};

static inline size_t pk__at_most(size_t count, size_t most)
{
    return count < most ? count : most;
}

/* packed[p * width + i] = source[i * across + p * along] for i < count, 0 up to width. */
static inline void pk__pack(size_t width, size_t count, size_t depth, const pk_real *source, size_t across,
                            size_t along, pk_real *packed)
{
    if (count == width && across == 1) {
        for (size_t p = 0; p < depth; p++)
            memcpy(packed + p * width, source + p * along, width * sizeof *packed);
    } else if (count == width) {
        for (size_t p = 0; p < depth; p++)
            for (size_t i = 0; i < width; i++)
                packed[p * width + i] = source[i * across + p * along];
    } else {
        for (size_t p = 0; p < depth; p++)
            for (size_t i = 0; i < width; i++)
                packed[p * width + i] = i < count ? source[i * across + p * along] : 0;
    }
}

/* tile = sum over p < depth of a[p]^T b[p]: a is packed, row p of b starts at b[p * step]. Unrolled by hand,
 * so that the accumulators are registers at -O2 too. */
static inline void pk__micro(size_t depth, const pk_real *a, const pk_real *b, size_t step, pk_real *tile)
{
    const pk__vector zero = {0};
#define PK__TILE_EACH_4(X) X(0) X(1) X(2) X(3)
#define PK__TILE_EACH_6(X) PK__TILE_EACH_4(X) X(4) X(5)
#define PK__TILE_ZERO(i) pk__vector left##i = zero, right##i = zero;
#define PK__TILE_ADD(i)       \
    left##i += a[i] * left_b; \
    right##i += a[i] * right_b;
#define PK__TILE_STORE(i)                                   \
    *(pk__vector *)(tile + i * PK__TILE_COLUMNS) = left##i; \
    *(pk__vector *)(tile + i * PK__TILE_COLUMNS + PK__LANES) = right##i;
#if PK__TILE_ROWS == 6
#define PK__TILE_EACH PK__TILE_EACH_6
#else
#define PK__TILE_EACH PK__TILE_EACH_4
#endif
    PK__TILE_EACH(PK__TILE_ZERO)
    for (size_t p = 0; p < depth; p++) {
        const pk__vector left_b = *(const pk__vector *)b, right_b = *(const pk__vector *)(b + PK__LANES);
        PK__TILE_EACH(PK__TILE_ADD)
        a += PK__TILE_ROWS;
        b += step;
    }
    PK__TILE_EACH(PK__TILE_STORE)
#undef PK__TILE_EACH
#undef PK__TILE_EACH_4
#undef PK__TILE_EACH_6
#undef PK__TILE_ZERO
#undef PK__TILE_ADD
#undef PK__TILE_STORE
}

/* C := alpha tile, or C += alpha tile. */
static inline void pk__store_tile(size_t rows, size_t columns, pk_real alpha, const pk_real *tile,
                                  int overwrite, pk_real *c, size_t ldc)
{
    for (size_t i = 0; i < rows; i++, c += ldc, tile += PK__TILE_COLUMNS)
        if (overwrite)
            for (size_t j = 0; j < columns; j++)
                c[j] = alpha * tile[j];
        else
            for (size_t j = 0; j < columns; j++)
                c[j] += alpha * tile[j];
}

PK__PRIVATE void pk__product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    pk_real packed_a[PK__BLOCK_ROWS * PK__DEPTH], packed_b[PK__TILE_COLUMNS * PK__DEPTH];
    pk_real tile[PK__TILE_ROWS * PK__TILE_COLUMNS];
    const size_t row_a = transpose_a ? 1 : lda, column_a = transpose_a ? lda : 1;
    const size_t row_b = transpose_b ? 1 : ldb, column_b = transpose_b ? ldb : 1;
    const int overwrite = beta == 0;
    /* Scaled apart, so that the update is one product and one sum, in full and in partial tiles. */
    if (beta != 0 && beta != 1)
        pk__scale(m, n, beta, c, ldc);
    for (size_t p = 0; p < k; p += PK__DEPTH) {
        const size_t depth = pk__at_most(k - p, PK__DEPTH);
        for (size_t top = 0; top < m; top += PK__BLOCK_ROWS) {
            const size_t block = pk__at_most(m - top, PK__BLOCK_ROWS);
            for (size_t i = 0; i < block; i += PK__TILE_ROWS)
                pk__pack(PK__TILE_ROWS, pk__at_most(block - i, PK__TILE_ROWS), depth,
                         a + (top + i) * row_a + p * column_a, row_a, column_a, packed_a + i * depth);
            for (size_t j = 0; j < n; j += PK__TILE_COLUMNS) {
                const size_t columns = pk__at_most(n - j, PK__TILE_COLUMNS);
                const pk_real *panel = b + p * row_b + j * column_b;
                size_t step = row_b;
                /* Rows of B that are used once or twice are read where they are. */
                if (transpose_b || columns < PK__TILE_COLUMNS || block > 2 * PK__TILE_ROWS) {
                    pk__pack(PK__TILE_COLUMNS, columns, depth, panel, column_b, row_b, packed_b);
                    panel = packed_b;
                    step = PK__TILE_COLUMNS;
                }
                for (size_t i = 0; i < block; i += PK__TILE_ROWS) {
                    pk_real *place = c + (top + i) * ldc + j;
                    pk__micro(depth, packed_a + i * depth, panel, step, tile);
                    if (block - i >= PK__TILE_ROWS && columns == PK__TILE_COLUMNS)
                        pk__store_tile(PK__TILE_ROWS, PK__TILE_COLUMNS, alpha, tile, overwrite && p == 0, place,
                                       ldc);
                    else
                        pk__store_tile(pk__at_most(block - i, PK__TILE_ROWS), columns, alpha, tile,
                                       overwrite && p == 0, place, ldc);
                }
            }
        }
    }
}

#endif

/* C := beta C + alpha op(A) op(B), row-major, unchecked, one thread, no allocation of ours; any of m, n and k
 * may be 0. With alpha == 0, A and B are not read. */
PK__PRIVATE void pk__gemm(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                          const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta, pk_real *c,
                          size_t ldc)
{
    if (m == 0 || n == 0)
        return;
    if (k == 0 || alpha == 0)
        pk__scale(m, n, beta, c, ldc);
    else
        pk__product(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

PK_API pk_matrix pk_matrix_view(pk_real *data, size_t rows, size_t cols)
{
    pk_matrix view;
    view.data = data;
    view.rows = rows;
    view.cols = cols;
    view.ld = cols;
    return view;
}

/* PK_OK where the view is one that memory can hold. */
static pk_status pk__check_matrix(pk_context *context, const char *name, const pk_matrix *x)
{
    size_t items = 0;
    if (x->ld < x->cols)
        return pk__fail(context, PK_SHAPE, "matrix %s: ld %zu is smaller than its %zu columns", name, x->ld,
                        x->cols);
    if (x->rows == 0 || x->cols == 0)
        return PK_OK;
    if (!x->data)
        return pk__fail(context, PK_ARGUMENT, "matrix %s (%zu x %zu): data is NULL", name, x->rows, x->cols);
    if (!pk__multiply(x->rows, x->ld, &items) || items > SIZE_MAX / 2 / sizeof(pk_real))
        return pk__fail(context, PK_OVERFLOW, "matrix %s: %zu rows of ld %zu overflow", name, x->rows, x->ld);
    return PK_OK;
}

/* 1 where two views share an element. Exact for views of one parent (the same ld); for unrelated ld, where
 * their address ranges intersect. */
static int pk__matrices_overlap(pk_matrix x, pk_matrix y)
{
    if (x.rows == 0 || x.cols == 0 || y.rows == 0 || y.cols == 0)
        return 0;
    if ((uintptr_t)x.data > (uintptr_t)y.data) {
        pk_matrix other = x;
        x = y;
        y = other;
    }
    /* The ld of a single row means nothing. */
    if (x.rows == 1)
        x.ld = y.ld > x.cols ? y.ld : x.cols;
    if (y.rows == 1)
        y.ld = x.ld > y.cols ? x.ld : y.cols;
    size_t distance = (uintptr_t)y.data - (uintptr_t)x.data;
    if (distance >= ((x.rows - 1) * x.ld + x.cols) * sizeof(pk_real))
        return 0;
    if (x.ld != y.ld || distance % sizeof(pk_real) != 0)
        return 1;
    /* y starts on one of x's rows of ld columns: in a column of x, or beside it and then reaching, past the
     * end of that row, into x's next one. */
    size_t column = distance / sizeof(pk_real) % x.ld;
    return column < x.cols || column + y.cols > x.ld;
}

PK_API pk_status pk_matrix_multiply(pk_context *context, pk_real alpha, pk_matrix a, int transpose_a,
                                    pk_matrix b, int transpose_b, pk_real beta, pk_matrix c)
{
    const size_t m = transpose_a ? a.cols : a.rows, inner_a = transpose_a ? a.rows : a.cols;
    const size_t n = transpose_b ? b.rows : b.cols, inner_b = transpose_b ? b.cols : b.rows;
    if (inner_a != inner_b || c.rows != m || c.cols != n)
        return pk__fail(context, PK_SHAPE, "product: op(A) is %zu x %zu, op(B) %zu x %zu, C %zu x %zu", m,
                        inner_a, inner_b, n, c.rows, c.cols);
    pk_status status = pk__check_matrix(context, "A", &a);
    if (status == PK_OK)
        status = pk__check_matrix(context, "B", &b);
    if (status == PK_OK)
        status = pk__check_matrix(context, "C", &c);
    if (status != PK_OK)
        return status;
    if (pk__matrices_overlap(a, c) || pk__matrices_overlap(b, c))
        return pk__fail(context, PK_ARGUMENT, "product: C (%zu x %zu) overlaps %s", m, n,
                        pk__matrices_overlap(a, c) ? "A" : "B");
    pk__gemm(transpose_a, transpose_b, m, n, inner_a, alpha, a.data, a.ld, b.data, b.ld, beta, c.data, c.ld);
    return PK_OK;
}

PK_API void pk_matrix_backend(char *text, size_t size)
{
#ifdef PATHKERNEL_BLIS
    snprintf(text, size, "BLIS %s (%s)", bli_info_get_version_str(), bli_arch_string(bli_arch_query_id()));
#else
    snprintf(text, size, "portable");
#endif
}

PK__END_C
/* <<< implementation */
#endif
