/* Matrix products against a naive long double one, with the bound (k + 3) eps (|alpha| |A| |B| + |beta| |C|);
 * refusals; no access outside the operands; bits that depend on nothing but shapes and values. */
#include "pathkernel_under_test.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
PK__BEGIN_C /* Debian's cmocka.h does not say so itself */
#include <cmocka.h>
    PK__END_C

    static const double epsilon = sizeof(pk_real) == 8 ? DBL_EPSILON : FLT_EPSILON;

/* In [-1, 1). */
static pk_real next_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (pk_real)((double)(*state >> 40) / 8388608.0 - 1.0);
}

static size_t next_below(uint64_t *state, size_t bound)
{
    return (size_t)((double)bound * 0.5 * (1.0 + (double)next_number(state)));
}

static pk_matrix make_matrix(size_t rows, size_t cols, size_t ld, uint64_t *state)
{
    pk_matrix x = pk_matrix_view(NULL, rows, cols);
    x.ld = ld;
    x.data = (pk_real *)malloc((rows * ld + 1) * sizeof(pk_real));
    assert_non_null(x.data);
    for (size_t i = 0; i < rows * ld; i++)
        x.data[i] = next_number(state);
    return x;
}

static pk_matrix copy_matrix(pk_matrix x)
{
    pk_matrix y = x;
    y.data = (pk_real *)malloc((x.rows * x.ld + 1) * sizeof(pk_real));
    assert_non_null(y.data);
    memcpy(y.data, x.data, x.rows * x.ld * sizeof(pk_real));
    return y;
}

static pk_real element(pk_matrix x, int transpose, size_t i, size_t j)
{
    return transpose ? x.data[j * x.ld + i] : x.data[i * x.ld + j];
}

/* after = beta before + alpha op(A) op(B), and what is between the rows of C is as before. */
static void check_product(pk_real alpha, pk_matrix a, int transpose_a, pk_matrix b, int transpose_b,
                          pk_real beta, pk_matrix before, pk_matrix after)
{
    const size_t k = transpose_a ? a.rows : a.cols;
    for (size_t i = 0; i < after.rows; i++)
        for (size_t j = 0; j < after.ld; j++) {
            const pk_real old = before.data[i * before.ld + j], now = after.data[i * after.ld + j];
            if (j >= after.cols) {
                assert_memory_equal(&old, &now, sizeof old);
                continue;
            }
            long double sum = 0, size = 0;
            for (size_t p = 0; p < k; p++) {
                long double term = (long double)element(a, transpose_a, i, p) * element(b, transpose_b, p, j);
                sum += alpha * term;
                size += fabsl(alpha * term);
            }
            if (beta != 0) {
                sum += (long double)beta * old;
                size += fabsl((long double)beta * old);
            }
            long double error = fabsl(now - sum), bound = (long double)((double)k + 3) * epsilon * size;
            if (!(error <= bound))
                fail_msg(
                    "%zu x %zu x %zu, transposed %d %d, alpha %g, beta %g: C[%zu, %zu] = %.17g, exact %.17Lg",
                    after.rows, after.cols, k, transpose_a, transpose_b, (double)alpha, (double)beta, i, j,
                    (double)now, sum);
        }
}

static void one_product(size_t m, size_t n, size_t k, int transposes, size_t spare, pk_real alpha, pk_real beta,
                        uint64_t *state)
{
    const int transpose_a = transposes & 1, transpose_b = transposes >> 1;
    const size_t cols_a = transpose_a ? m : k, cols_b = transpose_b ? k : n;
    pk_matrix a = make_matrix(transpose_a ? k : m, cols_a, cols_a + spare, state);
    pk_matrix b = make_matrix(transpose_b ? n : k, cols_b, cols_b + 2 * spare, state);
    pk_matrix c = make_matrix(m, n, n + spare, state);
    if (beta == 0)
        for (size_t i = 0; i < m * c.ld; i++)
            c.data[i] = (pk_real)NAN;
    pk_matrix before = copy_matrix(c);
    assert_int_equal(pk_matrix_multiply(NULL, alpha, a, transpose_a, b, transpose_b, beta, c), PK_OK);
    check_product(alpha, a, transpose_a, b, transpose_b, beta, before, c);
    free(a.data);
    free(b.data);
    free(c.data);
    free(before.data);
}

static void test_small_shapes(void **unused)
{
    (void)unused;
    static const pk_real alphas[] = {1, (pk_real)-0.5, 0}, betas[] = {0, 1, (pk_real)1.5};
    uint64_t state = 1;
    for (size_t m = 0; m < 10; m++)
        for (size_t n = 0; n < 10; n++)
            for (size_t k = 0; k < 10; k++)
                for (int transposes = 0; transposes < 4; transposes++)
                    for (size_t spare = 0; spare < 4; spare += 3)
                        for (int scale = 0; scale < 9; scale += 1 + (int)((m + n + k) % 3))
                            one_product(m, n, k, transposes, spare, alphas[scale / 3], betas[scale % 3],
                                        &state);
}

static void test_larger_shapes(void **unused)
{
    (void)unused;
    uint64_t state = 2;
    static const size_t edges[][3] = {{1, 300, 129}, {300, 1, 128}, {10, 64, 512},  {73, 17, 257},
                                      {72, 16, 128}, {33, 9, 384},  {145, 40, 127}, {2, 2, 1000},
                                      {13, 65, 30},  {48, 200, 10}};
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++)
        for (int transposes = 0; transposes < 4; transposes++)
            one_product(edges[i][0], edges[i][1], edges[i][2], transposes, i % 3, 1, (pk_real)(i % 2), &state);
    for (int round = 0; round < 40; round++) {
        const size_t m = next_below(&state, 160), n = next_below(&state, 160), k = next_below(&state, 160);
        one_product(m, n, k, round % 4, next_below(&state, 9), next_number(&state),
                    round % 3 ? next_number(&state) : 0, &state);
    }
}

static void test_special_values(void **unused)
{
    (void)unused;
    pk_real bad[4] = {(pk_real)NAN, (pk_real)INFINITY, 1, 2}, good[4] = {1, 2, 3, 4}, out[4] = {5, 6, 7, 8};
    pk_matrix a = pk_matrix_view(bad, 2, 2), b = pk_matrix_view(good, 2, 2), c = pk_matrix_view(out, 2, 2);
    /* alpha == 0 does not read A and B. */
    assert_int_equal(pk_matrix_multiply(NULL, 0, a, 0, b, 0, 2, c), PK_OK);
    assert_true(out[0] == 10 && out[1] == 12 && out[2] == 14 && out[3] == 16);
    /* A NaN stays in the row that it belongs to. */
    assert_int_equal(pk_matrix_multiply(NULL, 1, a, 0, b, 0, 0, c), PK_OK);
    assert_true(isnan(out[0]) && isnan(out[1]) && out[2] == 7 && out[3] == 10);
    /* An empty sum is zero, and empty matrices need no memory. */
    out[0] = (pk_real)NAN;
    assert_int_equal(
        pk_matrix_multiply(NULL, 1, pk_matrix_view(NULL, 2, 0), 0, pk_matrix_view(NULL, 0, 2), 0, 0, c), PK_OK);
    assert_true(out[0] == 0 && out[1] == 0 && out[2] == 0 && out[3] == 0);
    assert_int_equal(
        pk_matrix_multiply(NULL, 1, pk_matrix_view(NULL, 0, 2), 0, b, 0, 0, pk_matrix_view(NULL, 0, 2)), PK_OK);
}

static void expect_refusal(pk_status expected, pk_matrix a, int transpose_a, pk_matrix b, int transpose_b,
                           pk_matrix c)
{
    enum { MEMORY = 64 };
    pk_context context;
    pk_real before[MEMORY];
    memset(&context, 0, sizeof context);
    memset(before, 0, sizeof before);
    if (c.data)
        memcpy(before, c.data, 8 * sizeof(pk_real));
    assert_int_equal(pk_matrix_multiply(&context, 1, a, transpose_a, b, transpose_b, 0, c), expected);
    assert_true(strlen(pk_message(&context)) > 10);
    if (c.data)
        assert_memory_equal(before, c.data, 8 * sizeof(pk_real));
}

static pk_matrix view_of(pk_real *data, size_t rows, size_t cols, size_t ld)
{
    pk_matrix x = pk_matrix_view(data, rows, cols);
    x.ld = ld;
    return x;
}

static void test_refusals(void **unused)
{
    (void)unused;
    pk_real x[64], y[64], z[64];
    for (int i = 0; i < 64; i++)
        x[i] = y[i] = z[i] = (pk_real)i;
    pk_matrix a = pk_matrix_view(x, 2, 3), b = pk_matrix_view(y, 3, 4), c = pk_matrix_view(z, 2, 4);
    expect_refusal(PK_SHAPE, a, 1, b, 0, c);
    expect_refusal(PK_SHAPE, a, 0, b, 1, c);
    expect_refusal(PK_SHAPE, a, 0, b, 0, pk_matrix_view(z, 4, 2));
    expect_refusal(PK_SHAPE, a, 0, b, 0, pk_matrix_view(z, 2, 5));
    expect_refusal(PK_SHAPE, view_of(x, 2, 3, 2), 0, b, 0, c);
    expect_refusal(PK_SHAPE, a, 0, view_of(y, 3, 4, 3), 0, c);
    expect_refusal(PK_SHAPE, a, 0, b, 0, view_of(z, 2, 4, 0));
    expect_refusal(PK_ARGUMENT, pk_matrix_view(NULL, 2, 3), 0, b, 0, c);
    expect_refusal(PK_ARGUMENT, a, 0, pk_matrix_view(NULL, 3, 4), 0, c);
    expect_refusal(PK_ARGUMENT, a, 0, b, 0, pk_matrix_view(NULL, 2, 4));
    expect_refusal(PK_OVERFLOW, view_of(x, 2, 3, SIZE_MAX / 2), 0, b, 0, c);
    expect_refusal(PK_OVERFLOW, a, 0, b, 0, view_of(z, 2, 4, SIZE_MAX));
}

/* The refusal is exact for blocks of one parent: checked against the sets of elements. */
static void test_overlap(void **unused)
{
    (void)unused;
    enum { LD = 7, ROWS = 8 };
    pk_real parent[LD * ROWS], other[64];
    uint64_t state = 3;
    for (int i = 0; i < 64; i++)
        other[i] = 1;
    for (int round = 0; round < 4000; round++) {
        size_t m = 1 + next_below(&state, 3), k = 1 + next_below(&state, 3), n = 1 + next_below(&state, 3);
        size_t at_a = next_below(&state, LD * (ROWS - 4)), at_c = next_below(&state, LD * (ROWS - 4));
        int shared = 0;
        for (size_t i = 0; i < m * k; i++)
            for (size_t j = 0; j < m * n; j++)
                shared |= at_a + i / k * LD + i % k == at_c + j / n * LD + j % n;
        for (size_t i = 0; i < LD * ROWS; i++)
            parent[i] = (pk_real)i;
        pk_matrix a = view_of(parent + at_a, m, k, LD), c = view_of(parent + at_c, m, n, LD);
        pk_matrix b = pk_matrix_view(other, k, n);
        if (shared) {
            expect_refusal(PK_ARGUMENT, a, 0, b, 0, c);
            continue;
        }
        assert_int_equal(pk_matrix_multiply(NULL, 1, a, 0, b, 0, 0, c), PK_OK);
        assert_true(c.data[0] == (pk_real)(k * at_a + k * (k - 1) / 2));
    }
    expect_refusal(PK_ARGUMENT, pk_matrix_view(other, 2, 2), 0, pk_matrix_view(parent, 2, 2), 0,
                   view_of(parent + 3, 2, 2, LD));
}

/* Reads and writes stay inside: every matrix in turn ends, and starts, beside a page without access. */
static void test_guard_pages(void **unused)
{
    (void)unused;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = 8 * page;
    unsigned char *memory[3];
    int zeros = open("/dev/zero", O_RDWR);
    uint64_t state = 4;
    assert_true(zeros >= 0);
    for (int i = 0; i < 3; i++) {
        void *mapped = mmap(NULL, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, zeros, 0);
        assert_true(mapped != MAP_FAILED);
        memory[i] = (unsigned char *)mapped + page;
        assert_int_equal(mprotect(memory[i] - page, page, PROT_NONE), 0);
        assert_int_equal(mprotect(memory[i] + room, page, PROT_NONE), 0);
    }
    for (int round = 0; round < 6000; round++) {
        const size_t m = 1 + next_below(&state, round % 7 ? 12 : 60), n = 1 + next_below(&state, 24),
                     k = 1 + next_below(&state, round % 5 ? 20 : 60);
        const int transpose_a = round & 1, transpose_b = round >> 1 & 1, at_end = round >> 2 & 1;
        pk_matrix x[3];
        x[0] = pk_matrix_view(NULL, transpose_a ? k : m, transpose_a ? m : k);
        x[1] = pk_matrix_view(NULL, transpose_b ? n : k, transpose_b ? k : n);
        x[2] = pk_matrix_view(NULL, m, n);
        for (int i = 0; i < 3; i++) {
            x[i].ld += next_below(&state, 3);
            size_t items = (x[i].rows - 1) * x[i].ld + x[i].cols;
            assert_true(items * sizeof(pk_real) <= room);
            x[i].data = (pk_real *)(void *)(memory[i] + (at_end ? room - items * sizeof(pk_real) : 0));
        }
        assert_int_equal(
            pk_matrix_multiply(NULL, 1, x[0], transpose_a, x[1], transpose_b, (pk_real)(round % 2), x[2]),
            PK_OK);
    }
    for (int i = 0; i < 3; i++)
        munmap(memory[i] - page, room + 2 * page);
    close(zeros);
}

/* Address and ld do not show in the bits; in the portable product nor do the rows and columns beside. */
static void test_bits(void **unused)
{
    (void)unused;
    char backend[64];
    uint64_t state = 5;
    pk_matrix_backend(backend, sizeof backend);
    assert_true(strncmp(backend, "BLIS ", 5) == 0 || strncmp(backend, "portable (", 10) == 0);
    for (int round = 0; round < 60; round++) {
        const size_t m = 1 + next_below(&state, 90), n = 1 + next_below(&state, 90),
                     k = 1 + next_below(&state, 300);
        pk_matrix a = make_matrix(m, k, k, &state), b = make_matrix(k, n, n, &state),
                  c = make_matrix(m, n, n, &state);
        pk_matrix far_a = make_matrix(m, k, k + 5, &state), far_b = make_matrix(k, n, n + 3, &state);
        pk_matrix far_c = make_matrix(m, n, n + 1, &state);
        for (size_t i = 0; i < m; i++)
            memcpy(far_a.data + i * far_a.ld, a.data + i * k, k * sizeof(pk_real));
        for (size_t p = 0; p < k; p++)
            memcpy(far_b.data + p * far_b.ld, b.data + p * n, n * sizeof(pk_real));
        assert_int_equal(pk_matrix_multiply(NULL, 1, a, 0, b, 0, 0, c), PK_OK);
        assert_int_equal(pk_matrix_multiply(NULL, 1, far_a, 0, far_b, 0, 0, far_c), PK_OK);
        for (size_t i = 0; i < m; i++)
            assert_memory_equal(c.data + i * n, far_c.data + i * far_c.ld, n * sizeof(pk_real));
        if (strncmp(backend, "portable (", 10) == 0) {
            const size_t top = next_below(&state, m), left = next_below(&state, n);
            const size_t rows = 1 + next_below(&state, m - top), cols = 1 + next_below(&state, n - left);
            pk_matrix part = view_of(far_c.data, rows, cols, far_c.ld);
            assert_int_equal(pk_matrix_multiply(NULL, 1, view_of(a.data + top * k, rows, k, k), 0,
                                                view_of(b.data + left, k, cols, n), 0, 0, part),
                             PK_OK);
            for (size_t i = 0; i < rows; i++)
                assert_memory_equal(c.data + (top + i) * n + left, part.data + i * part.ld,
                                    cols * sizeof(pk_real));
        }
        free(a.data);
        free(b.data);
        free(c.data);
        free(far_a.data);
        free(far_b.data);
        free(far_c.data);
    }
}

static void test_concurrent_products(void **unused)
{
    (void)unused;
    enum { PRODUCTS = 300, SIZE = 40 };
    uint64_t state = 6;
    pk_matrix a = make_matrix(PRODUCTS, SIZE * SIZE, SIZE * SIZE, &state);
    pk_matrix serial = make_matrix(PRODUCTS, SIZE * SIZE, SIZE * SIZE, &state), parallel = copy_matrix(serial);
    int failures = 0;
    for (int pass = 0; pass < 2; pass++) {
        pk_real *out = pass ? parallel.data : serial.data;
        const int many = pass;
        (void)many; /* without OpenMP */
#ifdef _OPENMP
#pragma omp parallel for num_threads(4) schedule(dynamic, 1) if (many) reduction(+ : failures)
#endif
        for (int i = 0; i < PRODUCTS; i++) {
            const size_t m = 1 + (size_t)i * 7 % SIZE, n = 1 + (size_t)i * 11 % SIZE,
                         k = 1 + (size_t)i * 13 % SIZE;
            const int next = (i + 1) % PRODUCTS;
            pk_context context;
            memset(&context, 0, sizeof context);
            failures += pk_matrix_multiply(
                            &context, 1, pk_matrix_view(a.data + (size_t)i * SIZE * SIZE, m, k), 0,
                            pk_matrix_view(a.data + (size_t)next * SIZE * SIZE, i & 1 ? n : k, i & 1 ? k : n),
                            i & 1, 1, pk_matrix_view(out + (size_t)i * SIZE * SIZE, m, n)) != PK_OK;
        }
    }
    assert_int_equal(failures, 0);
    assert_memory_equal(serial.data, parallel.data, sizeof(pk_real) * PRODUCTS * SIZE * SIZE);
    free(a.data);
    free(serial.data);
    free(parallel.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_shapes),   cmocka_unit_test(test_larger_shapes),
        cmocka_unit_test(test_special_values), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_overlap),        cmocka_unit_test(test_guard_pages),
        cmocka_unit_test(test_bits),           cmocka_unit_test(test_concurrent_products),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
