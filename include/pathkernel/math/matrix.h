/* pathkernel/math/matrix.h: views of matrices, and every matrix product of the library: BLIS, or the portable
 * product of register tiles (tile.h), which is faster for small matrices and does all where there is no BLIS.
 *
 * Products run on one thread; the library is parallel over tiles around them. Tile sizes depend on shapes
 * only. The bits of a product depend on its shapes and values, not on addresses, ld or threads; those of an
 * element of the portable product do not even depend on how many rows and columns are beside it (with
 * BLIS they do).
 */
#ifndef PATHKERNEL_MATRIX_H
#define PATHKERNEL_MATRIX_H
#include "tile.h"

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

/* The name of what multiplies: "BLIS 0.9.0 (zen3), small products AVX2", "portable (AVX2)" or, where BLIS has no kernels for
 * what the processor can do, "portable (AVX-512), not BLIS 0.9.0 (generic)". Writes at most size bytes, NUL included. */
PK_API void pk_matrix_backend(char *text, size_t size);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MATRIX_IMPLEMENTED)
#define PATHKERNEL_MATRIX_IMPLEMENTED
/* >>> implementation */
#include <math.h>
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
PK__BEGIN_CODE

/* C := beta C, where beta == 0 overwrites whatever was there. */
PK__PRIVATE void pk__scale(size_t m, size_t n, pk_real beta, pk_real *c, size_t ldc)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
}

enum {
    PK__DEPTH = 240,     /* the most terms of a block: a panel of B, 15 KB, is on the stack */
    PK__BLOCK_ROWS = 96, /* rows of A whose offsets are in a table, */
    PK__STRIP_ROWS =
        384, /* and for which a pair of panels is copied once: they stay in the second-level cache */
    PK__APART_ROWS = 48, /* rows of a tile that is computed in a buffer instead of in C */
    PK__FEW_PANELS = 4,  /* at most so many panels of rows count as few */
    PK__FEW_NUMBERS =
        1 << 12, /* at most so many numbers of B stay in the first-level cache without being packed */
    /* m n k above which BLIS multiplies A B^T, unless A has few rows; 4 times as many for A B, 16 for A^T B. Below, its start
     * and its packing cost more than its kernel gains, up to a factor of 2 (bench_matrix). */
    PK__BLIS_TERMS = 1 << 19
};

/* Terms of a block: a panel of B stays in the first-level cache beside the rows of a tile. Processors with AVX-512 have larger
 * ones, and a tile of one block takes half the time there: as few blocks as possible, of equal size. */
static size_t pk__block_terms(size_t k)
{
    if (!PK__HAS_AVX512)
        return 128;
    return pk__blocks(pk__blocks(k, pk__blocks(k, PK__DEPTH)), 8) * 8;
}

#if defined(PK__AVX2) && (defined(__clang__) || __GNUC__ >= 12)
#define PK__SHUFFLES
typedef pk_real pk__four __attribute__((vector_size(4 * sizeof(pk_real)), aligned(sizeof(pk_real)), may_alias));
/* Packs 4 rows, 4 x 4 numbers at a time. */
PK__AVX2 static void pk__interleave_four(size_t depth, const pk_real *from, size_t across, pk_real *to)
{
    const pk_real *row1 = from + across, *row2 = from + 2 * across, *row3 = from + 3 * across;
    size_t p = 0;
    for (; p + 4 <= depth; p += 4, to += 4 * PK_PANEL) {
        const pk__four a = *(const pk__four *)(from + p), b = *(const pk__four *)(row1 + p),
                       c = *(const pk__four *)(row2 + p), d = *(const pk__four *)(row3 + p);
        const pk__four even_ab = __builtin_shufflevector(a, b, 0, 4, 2, 6),
                       odd_ab = __builtin_shufflevector(a, b, 1, 5, 3, 7),
                       even_cd = __builtin_shufflevector(c, d, 0, 4, 2, 6),
                       odd_cd = __builtin_shufflevector(c, d, 1, 5, 3, 7);
        *(pk__four *)to = __builtin_shufflevector(even_ab, even_cd, 0, 1, 4, 5);
        *(pk__four *)(to + PK_PANEL) = __builtin_shufflevector(odd_ab, odd_cd, 0, 1, 4, 5);
        *(pk__four *)(to + 2 * PK_PANEL) = __builtin_shufflevector(even_ab, even_cd, 2, 3, 6, 7);
        *(pk__four *)(to + 3 * PK_PANEL) = __builtin_shufflevector(odd_ab, odd_cd, 2, 3, 6, 7);
    }
    for (; p < depth; p++, to += PK_PANEL)
        for (size_t j = 0; j < 4; j++)
            to[j] = from[p + j * across];
}
#endif

/* Packs `count` rows or columns into a panel: to[p * PK_PANEL + j] = from[p * down + j * across]. */
PK__PRIVATE void pk__interleave(size_t count, size_t depth, const pk_real *from, size_t down, size_t across,
                                pk_real *to)
{
    size_t j = 0;
#ifdef PK__SHUFFLES
    for (; PK__HAS_AVX2 && down == 1 && j + 4 <= count; j += 4)
        pk__interleave_four(depth, from + j * across, across, to + j);
#endif
    for (; j < count; j++) /* with the loops exchanged, compilers use gather instructions, which are slow */
        for (size_t p = 0; p < depth; p++)
            to[p * PK_PANEL + j] = from[p * down + j * across];
}

/* to (cols x ld, starting at a column) = transposed from (rows x cols). */
PK__PRIVATE void pk__transpose(size_t rows, size_t cols, const pk_real *from, pk_real *to, size_t ld)
{
    enum { TILE = 32 };
    for (size_t i = 0; i < rows; i += TILE)
        for (size_t j = 0; j < cols; j += TILE)
            for (size_t r = i; r < pk__min(rows, i + TILE); r++)
                for (size_t c = j; c < pk__min(cols, j + TILE); c++)
                    to[c * ld + r] = from[r * cols + c];
}

/* packed (depth x PK_PANEL) := columns of B, filled up with 0; element (p, j) of B is b[p * down + j * across]. */
static void pk__pack_panel(size_t columns, size_t depth, const pk_real *b, size_t down, size_t across,
                           pk_real *packed)
{
    if (columns < PK_PANEL)
        memset(packed, 0, depth * PK_PANEL * sizeof *packed);
    if (across == 1 && columns == PK_PANEL)
        for (size_t p = 0; p < depth; p++)
            memcpy(packed + p * PK_PANEL, b + p * down, PK_PANEL * sizeof *packed);
    else
        pk__interleave(columns, depth, b, down, across, packed);
}

/* Whether computing C^T = B A^T is faster than C = A B^T: A has few rows and B many. */
static int pk__has_few_rows(int transpose_b, size_t m, size_t n)
{
    return transpose_b && m <= PK__FEW_PANELS * PK_PANEL && m < n;
}

/* A block of terms, from p on, of some rows of a product C (+)= alpha A B. Each function uses at most 16 KB of stack: of a
 * pair of panels, one is a variable of a function and the other one of its caller. */
typedef struct pk__block {
    size_t rows, depth;
    const pk_real *a; /* term p of the first row */
    size_t row_a, column_a;
    pk_real alpha;
    int overwrite;
    size_t ldc;
    const size_t *c_at; /* of PK__BLOCK_ROWS rows */
} pk__block;

/* One panel of B or a pair of them, packed or in B itself. */
typedef struct pk__pair {
    size_t count;
    const pk_real *panel[2];
    size_t step; /* PK_PANEL if packed */
} pk__pair;

/* target = terms of rows from row `top` of the block on, times a pair. */
static void pk__pair_rows(const pk__block *block, const pk__pair *pair, size_t top, size_t rows,
                          const pk__tile_target *target)
{
    const pk_real *a = block->a + top * block->row_a;
    const pk__panels side = {pair->count, pair->panel[0], pair->step, PK_PANEL, 0};
    if (pair->step == PK_PANEL)
        pk__pair_product(rows, block->depth, a, block->row_a, block->column_a, pair->count, pair->panel,
                         target);
    else
        pk__panel_product(rows, block->depth, a, block->row_a, block->column_a, &side, NULL, target);
}

/* C = or += alpha times the product of a block with a pair, computed in a buffer: for columns that are only partly in C, for
 * alpha other than 1, or for a transposed C. */
PK__NOINLINE static void pk__strip_apart(const pk__block *block, const pk__pair *pair, size_t columns,
                                         int transposed, pk_real *c)
{
    PK__ALIGNED pk_real tile[PK__APART_ROWS * PK__PAIR];
    size_t tile_at[PK__APART_ROWS];
    const pk__tile_target target = {PK__TILE_SET, tile, tile_at, NULL, NULL, 0};
    const size_t down = transposed ? 1 : block->ldc, along = transposed ? block->ldc : 1;
    for (size_t i = 0; i < pk__min(block->rows, PK__APART_ROWS); i++)
        tile_at[i] = i * PK__PAIR;
    for (size_t top = 0; top < block->rows; top += PK__APART_ROWS) {
        const size_t rows = pk__min(block->rows - top, PK__APART_ROWS);
        pk_real *to = c + top * down;
        pk__pair_rows(block, pair, top, rows, &target);
        if (transposed)
            for (size_t q = 0; q < columns; q++)
                for (size_t i = 0; i < rows; i++)
                    to[i + q * along] =
                        (block->overwrite ? 0 : to[i + q * along]) + block->alpha * tile[i * PK__PAIR + q];
        else
            for (size_t i = 0; i < rows; i++)
                for (size_t q = 0; q < columns; q++)
                    to[i * down + q] =
                        (block->overwrite ? 0 : to[i * down + q]) + block->alpha * tile[i * PK__PAIR + q];
    }
}

/* The product of a block with a pair. */
static void pk__strip_product(const pk__block *block, const pk__pair *pair, size_t columns, int transposed,
                              pk_real *c)
{
    if (columns % PK_PANEL || block->alpha != 1 || transposed) {
        pk__strip_apart(block, pair, columns, transposed, c);
        return;
    }
    pk__tile_target target = {block->overwrite ? PK__TILE_SET : PK__TILE_ADD, c, block->c_at, NULL, NULL, 0};
    for (size_t top = 0; top < block->rows; top += PK__BLOCK_ROWS) {
        target.to = c + top * block->ldc;
        pk__pair_rows(block, pair, top, pk__min(block->rows - top, PK__BLOCK_ROWS), &target);
    }
}

/* The same with columns of B that are copied first: the first panel, */
PK__NOINLINE static void pk__strip_packed(const pk__block *block, const pk_real *b, size_t row_b,
                                          size_t column_b, size_t columns, const pk_real *beside,
                                          int transposed, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    const pk__pair pair = {pk__blocks(columns, PK_PANEL), {packed, beside}, PK_PANEL};
    pk__pack_panel(pk__min(columns, PK_PANEL), block->depth, b, row_b, column_b, packed);
    pk__strip_product(block, &pair, columns, transposed, c);
}

/* and the second one before it. */
PK__NOINLINE static void pk__strip_pair(const pk__block *block, const pk_real *b, size_t row_b, size_t column_b,
                                        size_t columns, int transposed, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    pk__pack_panel(columns - PK_PANEL, block->depth, b + PK_PANEL * column_b, row_b, column_b, packed);
    pk__strip_packed(block, b, row_b, column_b, columns, packed, transposed, c);
}

/* C += alpha A B^T with few rows of A: only these are packed, and B is read in place. The terms and their order are those of
 * the general case below. */
static void pk__few_rows_product(size_t m, size_t n, size_t k, pk_real alpha, const pk_real *a, size_t row_a,
                                 size_t column_a, const pk_real *b, size_t ldb, int overwrite, pk_real *c,
                                 size_t ldc)
{
    const size_t most = pk__block_terms(k);
    for (size_t p = 0; p < k; p += most) {
        const pk__block block = {n, pk__min(k - p, most), b + p, ldb, 1, alpha, overwrite && p == 0, ldc, NULL};
        for (size_t top = 0; top < m; top += PK__PAIR) {
            const size_t count = pk__min(m - top, PK__PAIR);
            const pk_real *own = a + top * row_a + p * column_a;
            if (count > PK_PANEL)
                pk__strip_pair(&block, own, column_a, row_a, count, 1, c + top * ldc);
            else
                pk__strip_packed(&block, own, column_a, row_a, count, NULL, 1, c + top * ldc);
        }
    }
}

/* The product by tiles, for small matrices and without BLIS. Every element of C is the same sum, whatever m, n and its
 * position: blocks of pk__block_terms(k) terms, each added in ascending order to one accumulator. So the bits of
 * an element depend on its row of op(A), its column of op(B), k, alpha and beta only. */
static void pk__tile_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    const size_t most = pk__block_terms(k);
    size_t c_at[PK__BLOCK_ROWS];
    const size_t row_a = transpose_a ? 1 : lda, column_a = transpose_a ? lda : 1;
    const size_t row_b = transpose_b ? 1 : ldb, column_b = transpose_b ? ldb : 1;
    /* C is scaled separately, so that the update is one product and one sum in full and in partial tiles alike. */
    if (beta != 0 && beta != 1)
        pk__scale(m, n, beta, c, ldc);
    if (pk__has_few_rows(transpose_b, m, n)) {
        pk__few_rows_product(m, n, k, alpha, a, row_a, column_a, b, ldb, beta == 0, c, ldc);
        return;
    }
    for (size_t i = 0; i < pk__min(m, PK__BLOCK_ROWS); i++)
        c_at[i] = i * ldc;
    /* Rows of B that are used only a few times are not packed. */
    const size_t few = PK__HAS_AVX512 && k * row_b <= PK__FEW_NUMBERS ? PK__BLOCK_ROWS / 2 : 2 * PK__TALLEST;
    for (size_t top = 0; top < m; top += PK__STRIP_ROWS)
        for (size_t p = 0; p < k; p += most) {
            const pk__block block = {pk__min(m - top, PK__STRIP_ROWS),
                                     pk__min(k - p, most),
                                     a + top * row_a + p * column_a,
                                     row_a,
                                     column_a,
                                     alpha,
                                     beta == 0 && p == 0,
                                     ldc,
                                     c_at};
            for (size_t j = 0; j < n; j += PK__PAIR) {
                const size_t columns = pk__min(n - j, PK__PAIR);
                const pk_real *own = b + p * row_b + j * column_b;
                const pk__pair pair = {pk__blocks(columns, PK_PANEL), {own, NULL}, row_b};
                if (!transpose_b && columns % PK_PANEL == 0 && m <= few && row_b != PK_PANEL)
                    pk__strip_product(&block, &pair, columns, 0, c + top * ldc + j);
                else if (columns > PK_PANEL)
                    pk__strip_pair(&block, own, row_b, column_b, columns, 0, c + top * ldc + j);
                else
                    pk__strip_packed(&block, own, row_b, column_b, columns, NULL, 0, c + top * ldc + j);
            }
        }
}

#ifdef PATHKERNEL_BLIS
/* Its name for the processor. Its first question must not be this one: with BLIS_ARCH_TYPE set it would abort. */
static const char *pk__blis_name(void)
{
    bli_init();
    return bli_arch_string(bli_arch_query_id());
}

/* 1 where BLIS has kernels for this processor that use what the tiles use. 0.9.0 takes those of 2020 for the newest: on
 * Zen 4 and 5 it runs its plain C at a fifth of what the tiles do. */
static int pk__blis_has_kernels(void)
{
    static const char *const older[] = {"generic", "haswell", "zen", "zen2", "zen3", NULL};
    const char *name = pk__blis_name();
    for (size_t i = 0; older[i] && (PK__HAS_AVX512 || (PK__HAS_AVX2 && i == 0)); i++)
        if (strcmp(name, older[i]) == 0)
            return 0;
    return 1;
}

/* Whether BLIS is faster than the tiles. */
static int pk__is_for_blis(int transpose_a, int transpose_b, size_t m, size_t n, size_t k)
{
    const int shift = transpose_b ? 0 : transpose_a ? 4 : 2;
    return m * n * k > (size_t)PK__BLIS_TERMS << shift && !pk__has_few_rows(transpose_b, m, n) &&
           pk__blis_has_kernels();
}

static void pk__blis_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    /* A rntm of its own: with none, BLIS reads the environment at each call and may abort in nested regions. */
    rntm_t runtime;
    bli_rntm_init(&runtime);
    bli_rntm_set_num_threads(1, &runtime);
    /* The small-matrix path reads a transposed B in place, at 16 to 22 GF/s instead of 30 to 44 where k is small
     * or large (bench_matrix, example_major). Packing costs 15 % where few rows use B. Rows of B whose distance is a
     * multiple of 4 KiB share a cache set: 20 GF/s in place at 512 x 512, 35 packed. */
    if (transpose_b ? m >= 32 || k < 32 || k >= 384 : m >= 32 && ldb * sizeof(pk_real) % 4096 == 0)
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
#endif

/* C (m x n) = beta C + alpha A B, with number l of row i of A at i down + l along: four rows at a time, in registers.
 * For matrices that are too small for a product which packs them. */
#define PK__DEFINE_SMALL(suffix, attributes, vectors)                                                        \
    attributes static void pk__small_##suffix(size_t m, size_t n, size_t k, pk_real alpha, const pk_real *a, \
                                              size_t down, size_t along, const pk_real *b, size_t ldb,       \
                                              pk_real beta, pk_real *c, size_t ldc)                          \
    {                                                                                                        \
        typedef vectors vector;                                                                              \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)), ROWS = 4 };                                  \
        const vector zero = {0};                                                                             \
        for (size_t i = 0; i < m; i += ROWS) {                                                               \
            const size_t rows = m - i < ROWS ? m - i : ROWS;                                                 \
            const pk_real *r0 = a + i * down, *r1 = r0 + (rows > 1 ? down : 0),                              \
                          *r2 = r1 + (rows > 2 ? down : 0), *r3 = r2 + (rows > 3 ? down : 0);                \
            size_t j = 0;                                                                                    \
            for (; j + lanes <= n; j += lanes) {                                                             \
                vector sums[ROWS] = {zero, zero, zero, zero};                                                \
                for (size_t l = 0; l < k; l++) {                                                             \
                    const vector other = *(const vector *)(b + l * ldb + j);                                 \
                    sums[0] = PK__ADD_##suffix(sums[0], (r0[l * along] - zero), other);                      \
                    sums[1] = PK__ADD_##suffix(sums[1], (r1[l * along] - zero), other);                      \
                    sums[2] = PK__ADD_##suffix(sums[2], (r2[l * along] - zero), other);                      \
                    sums[3] = PK__ADD_##suffix(sums[3], (r3[l * along] - zero), other);                      \
                }                                                                                            \
                for (size_t r = 0; r < rows; r++) {                                                          \
                    vector *to = (vector *)(c + (i + r) * ldc + j);                                          \
                    if (beta == 0)                                                                           \
                        *to = alpha * sums[r];                                                               \
                    else                                                                                     \
                        *to = beta * *to + alpha * sums[r];                                                  \
                }                                                                                            \
            }                                                                                                \
            for (; j < n; j++)                                                                               \
                for (size_t r = 0; r < rows; r++) {                                                          \
                    pk_real *to = c + (i + r) * ldc + j, sum = 0;                                            \
                    for (size_t l = 0; l < k; l++)                                                           \
                        sum += a[(i + r) * down + l * along] * b[l * ldb + j];                               \
                    *to = alpha * sum + (beta == 0 ? 0 : beta * *to);                                        \
                }                                                                                            \
        }                                                                                                    \
    }
PK__FOR_PROCESSORS(PK__DEFINE_SMALL)

PK__PRIVATE void pk__small_product(size_t m, size_t n, size_t k, pk_real alpha, const pk_real *a, size_t down,
                                   size_t along, const pk_real *b, size_t ldb, pk_real beta, pk_real *c,
                                   size_t ldc)
{
    PK__ON_PROCESSOR(pk__small, (m, n, k, alpha, a, down, along, b, ldb, beta, c, ldc));
}

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
#ifdef PATHKERNEL_BLIS
    else if (pk__is_for_blis(transpose_a, transpose_b, m, n, k))
        pk__blis_product(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
    else
        pk__tile_product(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

enum {
    PK__LEAST_GROUP = 4,  /* the least rows of a group, */
    PK__LEAST_TERMS = 64, /* and the least terms, for which leaving terms out is faster */
    PK__GROUP_ROWS = 16,  /* larger groups are divided */
    PK__GROUPS = 16       /* groups for which a block of B is packed once */
};

/* term := the numbers of the columns that are not 0 in all rows (rows x columns, ld). Returns how many there are. */
static size_t pk__pick(size_t rows, size_t columns, const pk_real *from, size_t ld, unsigned char *term)
{
    pk_real any[PK__DEPTH];
    size_t terms = 0;
    for (size_t p = 0; p < columns; p++)
        any[p] = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t p = 0; p < columns; p++)
            any[p] += (pk_real)fabs(from[r * ld + p]);
    for (size_t p = 0; p < columns; p++) {
        term[terms] = (unsigned char)p;
        terms += any[p] != 0; /* NaN counts as not 0 */
    }
    return terms;
}

/* Whether groups of `group` consecutive rows of A (m x k) are likely to be 0 at the same terms, so many that it is faster to
 * leave these out: the cotangents of one example at a ReLU are. It examines the first row of each group. */
PK__PRIVATE int pk__has_common_zeros(size_t m, size_t group, size_t k, const pk_real *a, size_t lda)
{
    size_t zeros = 0;
    if (group < PK__LEAST_GROUP || k < PK__LEAST_TERMS)
        return 0;
    for (size_t i = 0; i < m; i += group)
        for (size_t p = 0; p < k; p++)
            zeros += a[i * lda + p] == 0;
    return 4 * zeros >= m / group * k;
}

/* Rows of A (rows x k from term p on, in groups of `group` rows), and the terms of each group that are added. */
typedef struct pk__groups {
    size_t rows, group, depth;
    const pk_real *a;
    size_t lda;
    const size_t *terms;
    const unsigned char *term;
    int overwrite;
    size_t ldc;
    const size_t *at; /* of the rows of a group in C */
} pk__groups;

/* All groups with one panel or two, which are copied. */
static void pk__groups_product(const pk__groups *groups, size_t count, const pk_real *const *panels, pk_real *c)
{
    for (size_t r = 0; r < groups->rows; r += groups->group) {
        const size_t g = r / groups->group;
        pk__picked_pair(pk__min(groups->group, groups->rows - r), groups->terms[g],
                        groups->term + g * PK__DEPTH, groups->a + r * groups->lda, groups->lda, count, panels,
                        groups->overwrite, c + r * groups->ldc, groups->ldc, groups->at);
    }
}

PK__NOINLINE static void pk__groups_packed(const pk__groups *groups, const pk_real *b, size_t ldb,
                                           const pk_real *beside, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    const pk_real *const panels[2] = {packed, beside};
    pk__pack_panel(PK_PANEL, groups->depth, b, ldb, 1, packed);
    pk__groups_product(groups, beside ? 2 : 1, panels, c);
}

PK__NOINLINE static void pk__groups_pair(const pk__groups *groups, const pk_real *b, size_t ldb, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    pk__pack_panel(PK_PANEL, groups->depth, b + PK_PANEL, ldb, 1, packed);
    pk__groups_packed(groups, b, ldb, packed, c);
}

/* C = or, unless overwrite, += A B without the terms that are 0 in all rows of a group; the sums are those of the product of
 * tiles. Cost: 2 m n flops for each term that is left, and about 0.2 of that of all terms. */
PK__PRIVATE void pk__grouped_product(size_t m, size_t group, size_t n, size_t k, const pk_real *a, size_t lda,
                                     const pk_real *b, size_t ldb, int overwrite, pk_real *c, size_t ldc)
{
    unsigned char term[PK__GROUPS * PK__DEPTH];
    size_t terms[PK__GROUPS], at[PK__GROUP_ROWS];
    const size_t most = pk__block_terms(k);
    const size_t whole = n / PK_PANEL * PK_PANEL;
    group = pk__min(group, PK__GROUP_ROWS);
    for (size_t i = 0; i < group; i++)
        at[i] = i * ldc;
    for (size_t top = 0, rows; top < m; top += rows) {
        rows = pk__min(PK__GROUPS * group, m - top);
        for (size_t p = 0; p < k; p += most) {
            const size_t depth = pk__min(k - p, most);
            const pk__groups groups = {
                rows, group, depth, a + top * lda + p, lda, terms, term, overwrite && p == 0, ldc, at};
            for (size_t r = 0; r < rows; r += group)
                terms[r / group] = pk__pick(pk__min(group, rows - r), depth, groups.a + r * lda, lda,
                                            term + r / group * PK__DEPTH);
            for (size_t j = 0; j < whole; j += PK__PAIR)
                if (whole - j > PK_PANEL)
                    pk__groups_pair(&groups, b + p * ldb + j, ldb, c + top * ldc + j);
                else
                    pk__groups_packed(&groups, b + p * ldb + j, ldb, NULL, c + top * ldc + j);
        }
    }
    if (whole < n)
        pk__tile_product(0, 0, m, n - whole, k, 1, a, lda, b + whole, ldb, overwrite ? 0 : 1, c + whole, ldc);
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

/* Checks that a view fits into memory. */
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
    if (!status)
        status = pk__check_matrix(context, "B", &b);
    if (!status)
        status = pk__check_matrix(context, "C", &c);
    if (status)
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
    if (pk__blis_has_kernels())
        snprintf(text, size, "BLIS %s (%s), small products %s", bli_info_get_version_str(), pk__blis_name(),
                 pk__panel_name());
    else
        snprintf(text, size, "portable (%s), not BLIS %s (%s)", pk__panel_name(), bli_info_get_version_str(),
                 pk__blis_name());
#else
    snprintf(text, size, "portable (%s)", pk__panel_name());
#endif
}

PK__END_CODE
/* <<< implementation */
#endif
