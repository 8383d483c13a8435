/* Products of register tiles and of rows, by every set of instructions that this processor has: against sums in long
 * double, for any number of rows and columns, and an element's bits depend on neither the rows beside it nor the length of a
 * vector. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __cplusplus
extern "C" {
#endif
#include <cmocka.h>
#ifdef __cplusplus
}
#endif
/* Static, so that the private functions can be called. */
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#define UNDER_TEST "pathkernel/math/elementary.h"
#include "pathkernel_under_test.h"

enum {
    ROWS = 40,
    DEPTH = 37,
    PANELS = 3,
    COLUMNS = PANELS * PK_PANEL,
    LD = COLUMNS + PK_PANEL,
    WORDS = ROWS * LD
};

typedef struct processor {
    const char *name;
    int fused; /* multiplies and adds with one rounding */
    void (*panels)(size_t, size_t, const pk_real *, size_t, size_t, const pk__panels *, const pk_real *,
                   const pk__tile_target *);
    void (*picked)(size_t, size_t, const unsigned char *, const pk_real *, size_t, const pk__panels *, int,
                   pk_real *, size_t);
    void (*sums)(size_t, size_t, const pk_real *, size_t, const pk__panels *, const pk_real *, size_t,
                 const size_t *, pk_real *);
    void (*dots)(size_t, size_t, const pk_real *, const pk_real *, pk_real, pk_real *);
    void (*times)(size_t, size_t, const pk_real *, const pk_real *, int, pk_real *);
} processor;

static processor processors[3];
static size_t processor_count;

static void add_processor(const char *name, int fused, const processor *functions)
{
    processors[processor_count] = *functions;
    processors[processor_count].name = name;
    processors[processor_count++].fused = fused;
}

static int find_processors(void **unused)
{
    (void)unused;
#ifdef PK__AVX512
    if (PK__HAS_AVX512) {
        const processor own = {
            NULL, 0, pk__panels_avx512, pk__picked_avx512, pk__sums_avx512, pk__dots_avx512, pk__times_avx512};
        add_processor("AVX-512", 1, &own);
    }
#endif
#ifdef PK__AVX2
    if (PK__HAS_AVX2) {
        const processor own = {NULL,          0, pk__panels_avx2, pk__picked_avx2, pk__sums_avx2, pk__dots_avx2,
                               pk__times_avx2};
        add_processor("AVX2", 1, &own);
    }
#endif
    const processor own = {NULL,          0, pk__panels_base, pk__picked_base, pk__sums_base, pk__dots_base,
                           pk__times_base};
    add_processor("baseline", 0, &own);
    print_message("%s and %zu others\n", processors[0].name, processor_count - 1);
    return 0;
}

/* A, B, start and other. Panels of B are one behind the other, a row's numbers of other, too. */
static pk_real numbers[4][ROWS * DEPTH + (DEPTH + ROWS) * COLUMNS];

static pk__panels panels_of(size_t count)
{
    const pk__panels b = {count, numbers[1], PK_PANEL, DEPTH * PK_PANEL, 0};
    return b;
}

/* Number p of column j. */
static pk_real b_at(size_t p, size_t j)
{
    return numbers[1][j / PK_PANEL * DEPTH * PK_PANEL + p * PK_PANEL + j % PK_PANEL];
}

static pk_real other_of(const size_t *other_at, size_t i, size_t j)
{
    return numbers[3][other_at[i] + j / PK_PANEL * ROWS * PK_PANEL + j % PK_PANEL];
}

static void fill(void)
{
    uint64_t state = 1;
    for (size_t i = 0; i < sizeof numbers / sizeof **numbers; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        (&numbers[0][0])[i] = (pk_real)((double)(state >> 40) / 8388608.0 - 1.0);
    }
}

static void expect_near(pk_real got, long double exact, double size, const char *what)
{
    const double error = fabs((double)((long double)got - exact));
    if (!(error <= ROUNDING(1e-14) * (size + 1)))
        fail_msg("%s: %.17g, not %.17g", what, (double)got, (double)exact);
}

/* One form, one processor, with an order of A, a start, and so many panels. */
static void check_form(const processor *p, pk__tile_form form, int transposed, int with_start, size_t count)
{
    const pk_real *a = numbers[0], *start = with_start ? numbers[2] : NULL;
    const size_t across = transposed ? 1 : DEPTH, along = transposed ? ROWS : 1, columns = count * PK_PANEL;
    const pk__panels b = panels_of(count);
    size_t to_at[ROWS], other_at[ROWS];
    static pk_real whole[WORDS], part[WORDS];
    for (size_t rows = ROWS; rows > 0; rows--) {
        pk_real *to = rows == ROWS ? whole : part;
        pk__tile_target target = {form, to, to_at, numbers[3], other_at, ROWS * PK_PANEL};
        for (size_t i = 0; i < ROWS; i++) {
            to_at[i] = i * LD;
            other_at[i] = (ROWS - 1 - i) * PK_PANEL;
        }
        for (size_t i = 0; i < WORDS; i++)
            to[i] = 7;
        p->panels(rows, DEPTH, a, across, along, &b, start, &target);
        for (size_t j = 0; j < columns; j++) {
            long double all = 7;
            for (size_t i = 0; i < rows; i++) {
                long double sum = start ? start[i] : 0;
                for (size_t q = 0; q < DEPTH; q++)
                    sum += (long double)a[i * across + q * along] * b_at(q, j);
                const long double product = sum * other_of(other_at, i, j);
                all += product;
                if (form == PK__TILE_SET)
                    expect_near(to[i * LD + j], sum, DEPTH, p->name);
                else if (form == PK__TILE_ADD)
                    expect_near(to[i * LD + j], 7 + sum, DEPTH, p->name);
                else if (form == PK__TILE_HADAMARD)
                    expect_near(to[i * LD + j], 7 + product, DEPTH, p->name);
            }
            if (form == PK__TILE_DOT)
                expect_near(to[j], all, (double)rows * DEPTH, p->name);
        }
        const size_t written = form == PK__TILE_DOT ? 1 : rows;
        for (size_t i = 0; i < WORDS; i++)
            if (i / LD >= written || i % LD >= columns)
                assert_true(to[i] == 7);
        /* What is multiplied with the tile afterwards may be rounded once or twice. */
        for (size_t i = 0; (form == PK__TILE_SET || form == PK__TILE_ADD) && i < rows; i++)
            assert_memory_equal(to + i * LD, whole + i * LD, columns * sizeof *to);
    }
}

static void test_panels(void **unused)
{
    static const pk__tile_form forms[] = {PK__TILE_SET, PK__TILE_ADD, PK__TILE_HADAMARD, PK__TILE_DOT};
    (void)unused;
    for (size_t p = 0; p < processor_count; p++)
        for (int which = 0; which < 16; which++)
            for (size_t count = 1; count <= PANELS; count++)
                check_form(&processors[p], forms[which % 4], which / 4 % 2, which / 8, count);
}

/* Terms that are left out are those that are 0: the same sums. */
static void test_picked(void **unused)
{
    static pk_real zeroed[ROWS * DEPTH], whole[WORDS], part[WORDS];
    unsigned char term[DEPTH];
    size_t to_at[ROWS], terms = 0;
    (void)unused;
    for (size_t q = 0; q < DEPTH; q++)
        if (q % 3 != 1)
            term[terms++] = (unsigned char)q;
    for (size_t i = 0; i < ROWS * DEPTH; i++)
        zeroed[i] = i % DEPTH % 3 == 1 ? 0 : numbers[0][i];
    for (size_t i = 0; i < ROWS; i++)
        to_at[i] = i * LD;
    for (size_t p = 0; p < processor_count; p++)
        for (size_t rows = 1; rows <= ROWS; rows++)
            for (int overwrite = 0; overwrite < 2; overwrite++) {
                const pk__tile_target target = {
                    overwrite ? PK__TILE_SET : PK__TILE_ADD, whole, to_at, NULL, NULL, 0};
                for (size_t i = 0; i < WORDS; i++)
                    whole[i] = part[i] = 7;
                const pk__panels b = panels_of(1 + rows % PANELS);
                processors[p].panels(rows, DEPTH, zeroed, DEPTH, 1, &b, NULL, &target);
                processors[p].picked(rows, terms, term, numbers[0], DEPTH, &b, overwrite, part, LD);
                assert_memory_equal(whole, part, sizeof part);
            }
}

static void test_sums(void **unused)
{
    static pk_real to[ROWS * PK__PAIR];
    size_t other_at[ROWS];
    (void)unused;
    for (size_t i = 0; i < ROWS; i++)
        other_at[i] = (ROWS - 1 - i) * PK_PANEL;
    for (size_t p = 0; p < processor_count; p++)
        for (size_t depth = 1; depth <= 20; depth++)
            for (size_t count = 1; count <= 2; count++) {
                const pk__panels b = {count, numbers[1], PK__PAIR, PK_PANEL, 0};
                processors[p].sums(ROWS, depth, numbers[0], ROWS, &b, numbers[3], ROWS * PK_PANEL, other_at,
                                   to);
                for (size_t i = 0; i < ROWS * count * PK_PANEL; i++) {
                    const size_t row = i / (count * PK_PANEL), j = i % (count * PK_PANEL);
                    long double sum = 0;
                    for (size_t q = 0; q < depth; q++)
                        sum += (long double)numbers[0][row + q * ROWS] * numbers[1][q * PK__PAIR + j];
                    expect_near(to[row * PK__PAIR + j], sum * other_of(other_at, row, j), (double)depth,
                                processors[p].name);
                }
            }
}

static void test_rows(void **unused)
{
    enum { MOST = 70, ROW = 3 };
    const pk_real *a = numbers[0], *b = numbers[1];
    pk_real to[ROW * MOST + 1];
    (void)unused;
    for (size_t p = 0; p < processor_count; p++)
        for (size_t count = 0; count <= MOST; count++) {
            to[0] = to[1] = to[2] = 7;
            processors[p].dots(2, count, a, b, 3, to);
            for (size_t row = 0; row < 3; row++) {
                long double sum = 0;
                for (size_t i = 0; row < 2 && i < count; i++)
                    sum += (long double)a[row * count + i] * b[i];
                expect_near(to[row], 7 + 3 * sum, 3 * (double)count, processors[p].name);
            }
            for (int add = 0; add < 2; add++) {
                for (size_t i = 0; i <= ROW * MOST; i++)
                    to[i] = 7;
                processors[p].times(ROW, count, a, b, add, to);
                for (size_t i = 0; i <= ROW * MOST; i++)
                    expect_near(to[i], i < ROW * count ? 7 * add + (long double)a[i] * b[i % count] : 7, 8,
                                processors[p].name);
            }
        }
}

/* Processors that round once a term give the same bits, whatever their vectors. */
static void test_lengths(void **unused)
{
    static pk_real first[WORDS], own[WORDS];
    size_t to_at[ROWS];
    (void)unused;
    for (size_t i = 0; i < ROWS; i++)
        to_at[i] = i * LD;
    for (size_t p = 0; p < processor_count && processors[p].fused; p++) {
        pk__tile_target target = {PK__TILE_SET, p ? own : first, to_at, NULL, NULL, 0};
        const pk__panels b = panels_of(PANELS);
        processors[p].panels(ROWS, DEPTH, numbers[0], DEPTH, 1, &b, numbers[2], &target);
        for (size_t i = 0; p && i < ROWS; i++)
            assert_memory_equal(own + i * LD, first + i * LD, COLUMNS * sizeof *own);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_panels), cmocka_unit_test(test_picked),  cmocka_unit_test(test_sums),
        cmocka_unit_test(test_rows),   cmocka_unit_test(test_lengths),
    };
    fill();
    return cmocka_run_group_tests(tests, find_processors, NULL);
}
