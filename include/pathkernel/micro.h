/* pathkernel/micro.h: products of small tiles that stay in registers, and what is done with a tile before it leaves
 * them. Nothing here is public: matrix.h makes whole products of it, contraction.h the hot loop.
 *
 * A tile is 6 or 4 rows of A times one panel of B. A is read where it stands, a number at a time; a panel of B is one cache
 * line wide: element (p, j) at p * step + j. Every element of a tile is one accumulator that
 * takes its terms in ascending order, wherever it stands in the tile and however many rows the tile has.
 *
 * GNU vectors, since the vectorisers of gcc and clang differ by a factor of 6 on the same loops over arrays. On x86-64
 * the AVX2 tiles are compiled for their own instruction set and chosen at run time, so that a program that is built
 * for every machine runs at the speed of this one; PATHKERNEL_NO_DISPATCH leaves what the compiler's flags say.
 */
#ifndef PATHKERNEL_MICRO_H
#define PATHKERNEL_MICRO_H
#include "context.h"

/* >>> declarations */
PK__BEGIN_C

/* Columns of a panel: one cache line. */
enum { PK_PANEL = 64 / (int)sizeof(pk_real) };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MICRO_IMPLEMENTED)
#define PATHKERNEL_MICRO_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_C

enum { PK__TALLEST = 6 }; /* rows of a tile */

typedef enum pk__tile_form {
    PK__TILE_SET,      /* to = product */
    PK__TILE_ADD,      /* to += product */
    PK__TILE_HADAMARD, /* to += other o product */
    PK__TILE_DOT       /* to[0] += sum of other o product over the rows of a tile */
} pk__tile_form;

/* Where the rows of a product go: row i to `to + to_at[i]` (DOT: all to `to`), with `other + other_at[i]`. */
typedef struct pk__tile_target {
    pk__tile_form form;
    pk_real *to;
    const size_t *to_at;
    const pk_real *other; /* of HADAMARD and DOT */
    const size_t *other_at;
} pk__tile_target;

/* Rows as tiles: so many of 6 and then so many of 4. */
static inline void pk__tiles(size_t rows, size_t *sixes, size_t *fours)
{
    const size_t rest = rows % 6;
    *sixes = rows / 6;
    *fours = rest == 3 || rest == 4;
    if (rest == 5)
        *sixes += 1;
    else if ((rest == 1 || rest == 2) && *sixes) {
        *sixes -= 1;
        *fours = 2;
    } else if (rest == 1 || rest == 2)
        *fours = 1;
}

#define PK__EACH_4(X) X(0) X(1) X(2) X(3)
#define PK__EACH_6(X) PK__EACH_4(X) X(4) X(5)
/* Of row i of a tile: where it stands in A, two vectors of accumulators, and the places that they go to. In scope: vector and
 * its lanes, the place `at` of a column of A, and the vectors left_b and right_b of a row of B. Rows behind the last one
 * repeat it and go nowhere. */
#define PK__TILE_ROW(i)                                               \
    const pk_real *row##i = a + (i < count ? i : count - 1) * across; \
    vector left##i, right##i;
#define PK__TILE_START(i) left##i = right##i = (start && i < count ? start[i] : 0) - zero;
#define PK__TILE_STEP(i, ADD)                   \
    left##i = ADD(left##i, row##i[at], left_b); \
    right##i = ADD(right##i, row##i[at], right_b);
#define PK__TILE_END(i, assign, left_value, right_value) \
    if (i < count) {                                     \
        pk_real *to = target->to + to_at[i] + column;    \
        *(vector *)to assign(left_value);                \
        *(vector *)(to + lanes) assign(right_value);     \
    }
#define PK__OTHER(i, beside) (*(const vector *)(target->other + other_at[i] + column + (beside)))
#define PK__TILE_SETS(i) PK__TILE_END(i, =, left##i, right##i)
#define PK__TILE_ADDS(i) PK__TILE_END(i, +=, left##i, right##i)
#define PK__TILE_HADAMARDS(i) PK__TILE_END(i, +=, left##i * PK__OTHER(i, 0), right##i * PK__OTHER(i, lanes))
#define PK__TILE_DOTS(i)                             \
    if (i < count) {                                 \
        left_sum += left##i * PK__OTHER(i, 0);       \
        right_sum += right##i * PK__OTHER(i, lanes); \
    }
/* gcc does not unroll by itself. It matters where the other thread of a core takes half of its instructions. */
#if defined(__GNUC__) && !defined(__clang__)
#define PK__UNROLL _Pragma("GCC unroll 4")
#else
#define PK__UNROLL
#endif
#define PK__DEFINE_TILE(name, attributes, EACH, vectors, STEP)                                                 \
    attributes PK__INLINE void name(size_t count, size_t depth, const pk_real *a, size_t across, size_t along, \
                                    const pk_real *panel, size_t step, const pk_real *start,                   \
                                    const pk__tile_target *target, const size_t *to_at,                        \
                                    const size_t *other_at)                                                    \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                              \
        const vector zero = {0};                                                                               \
        EACH(PK__TILE_ROW)                                                                                     \
        for (size_t column = 0; column < PK_PANEL; column += 2 * lanes) {                                      \
            const pk_real *b = panel + column;                                                                 \
            EACH(PK__TILE_START)                                                                               \
            PK__UNROLL                                                                                         \
            for (size_t p = 0, at = 0; p < depth; p++, at += along, b += step) {                               \
                const vector left_b = *(const vector *)b, right_b = *(const vector *)(b + lanes);              \
                EACH(STEP)                                                                                     \
            }                                                                                                  \
            if (target->form == PK__TILE_SET) {                                                                \
                EACH(PK__TILE_SETS)                                                                            \
            } else if (target->form == PK__TILE_ADD) {                                                         \
                EACH(PK__TILE_ADDS)                                                                            \
            } else if (target->form == PK__TILE_DOT) {                                                         \
                vector *to = (vector *)(target->to + column),                                                  \
                       *beside = (vector *)(target->to + column + lanes);                                      \
                vector left_sum = *to, right_sum = *beside;                                                    \
                EACH(PK__TILE_DOTS)                                                                            \
                *to = left_sum;                                                                                \
                *beside = right_sum;                                                                           \
            } else {                                                                                           \
                EACH(PK__TILE_HADAMARDS)                                                                       \
            }                                                                                                  \
        }                                                                                                      \
    }
/* The tiles of all rows of A, one behind the other. A tile whose rows are known when it is compiled has no questions left to
 * ask: worth three copies of it. */
#define PK__DEFINE_PANEL(suffix, attributes, vectors)                                                         \
    PK__DEFINE_TILE(pk__tile_6_##suffix, attributes, PK__EACH_6, vectors, PK__STEP_##suffix)                  \
    PK__DEFINE_TILE(pk__tile_4_##suffix, attributes, PK__EACH_4, vectors, PK__STEP_##suffix)                  \
    attributes static void pk__panel_##suffix(size_t rows, size_t depth, const pk_real *a, size_t across,     \
                                              size_t along, const pk_real *panel, size_t step,                \
                                              const pk_real *start, const pk__tile_target *target)            \
    {                                                                                                         \
        const size_t *to_at = target->to_at, *other_at = target->other_at;                                    \
        size_t sixes, fours, first = 0, count;                                                                \
        if (PK__KNOWN_##suffix)                                                                               \
            pk__tiles(rows, &sixes, &fours);                                                                  \
        else                                                                                                  \
            sixes = 0, fours = pk__blocks(rows, 4);                                                           \
        for (size_t tile = 0; tile < sixes + fours; tile++, first += count) {                                 \
            const pk_real *own = a + first * across, *begin = start ? start + first : NULL;                   \
            const size_t *to = to_at ? to_at + first : NULL, *other = other_at ? other_at + first : NULL;     \
            count = pk__least(tile < sixes ? 6 : 4, rows - first);                                            \
            if (count == 6 && PK__KNOWN_##suffix) /* when this is compiled */                                 \
                pk__tile_6_##suffix(6, depth, own, across, along, panel, step, begin, target, to, other);     \
            else if (tile < sixes && PK__KNOWN_##suffix)                                                      \
                pk__tile_6_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
            else                                                                                              \
                pk__tile_4_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
        }                                                                                                     \
    }

/* Rows that are 0 at the same terms: of those only the others, which are told by number. */
#define PK__PICKED_END(i)                               \
    if (i < count) {                                    \
        pk_real *own = to + i * ld + column;            \
        if (!overwrite) {                               \
            left##i += *(const vector *)own;            \
            right##i += *(const vector *)(own + lanes); \
        }                                               \
        *(vector *)own = left##i;                       \
        *(vector *)(own + lanes) = right##i;            \
    }
#define PK__DEFINE_PICKED(suffix, attributes, vectors)                                                \
    attributes static void pk__picked_##suffix(size_t rows, size_t terms, const unsigned char *term,  \
                                               const pk_real *a, size_t across, const pk_real *panel, \
                                               int overwrite, pk_real *to, size_t ld)                 \
    {                                                                                                 \
        typedef vectors vector;                                                                       \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                     \
        const vector zero = {0};                                                                      \
        const pk_real *start = NULL;                                                                  \
        for (size_t first = 0; first < rows; first += 4, a += 4 * across, to += 4 * ld) {             \
            const size_t count = pk__least(4, rows - first);                                          \
            PK__EACH_4(PK__TILE_ROW)                                                                  \
            for (size_t column = 0; column < PK_PANEL; column += 2 * lanes) {                         \
                PK__EACH_4(PK__TILE_START)                                                            \
                for (size_t p = 0; p < terms; p++) {                                                  \
                    const size_t at = term[p];                                                        \
                    const pk_real *b = panel + column + at * PK_PANEL;                                \
                    const vector left_b = *(const vector *)b, right_b = *(const vector *)(b + lanes); \
                    PK__EACH_4(PK__STEP_##suffix)                                                     \
                }                                                                                     \
                PK__EACH_4(PK__PICKED_END)                                                            \
            }                                                                                         \
        }                                                                                             \
    }

/* The other way round for few terms: up to six rows of B stay in registers, and row after row of A passes. */
#define PK__SUM_LOAD(i)                                     \
    vector left##i = zero, right##i = zero;                 \
    if (i < count) {                                        \
        left##i = *(const vector *)(b + i * step);          \
        right##i = *(const vector *)(b + i * step + lanes); \
    }
#define PK__SUM_STEP(i, ADD)                              \
    if (i < count) {                                      \
        left = ADD(left, a[row + i * along], left##i);    \
        right = ADD(right, a[row + i * along], right##i); \
    }
#define PK__DEFINE_SUMS(suffix, attributes, vectors)                                                           \
    attributes PK__INLINE void pk__sums_of_##suffix(size_t count, size_t rows, const pk_real *a, size_t along, \
                                                    const pk_real *panel, size_t step, int begin, int end,     \
                                                    const pk_real *other, const size_t *other_at, pk_real *to) \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                              \
        const vector zero = {0};                                                                               \
        for (size_t column = 0; column < PK_PANEL; column += 2 * lanes) {                                      \
            const pk_real *b = panel + column;                                                                 \
            PK__EACH_6(PK__SUM_LOAD)                                                                           \
            for (size_t row = 0; row < rows; row++) {                                                          \
                vector *at = (vector *)(to + row * PK_PANEL + column),                                         \
                       *beside = (vector *)(to + row * PK_PANEL + column + lanes);                             \
                vector left = zero, right = zero;                                                              \
                if (!begin) {                                                                                  \
                    left = *at;                                                                                \
                    right = *beside;                                                                           \
                }                                                                                              \
                PK__EACH_6(PK__SUM_##suffix)                                                                   \
                if (end) {                                                                                     \
                    left *= *(const vector *)(other + other_at[row] + column);                                 \
                    right *= *(const vector *)(other + other_at[row] + column + lanes);                        \
                }                                                                                              \
                *at = left;                                                                                    \
                *beside = right;                                                                               \
            }                                                                                                  \
        }                                                                                                      \
    }                                                                                                          \
    attributes static void pk__sums_##suffix(size_t rows, size_t depth, const pk_real *a, size_t along,        \
                                             const pk_real *panel, size_t step, const pk_real *other,          \
                                             const size_t *other_at, pk_real *to)                              \
    {                                                                                                          \
        for (size_t p = 0; p < depth; p += PK__TALLEST) {                                                      \
            const size_t count = pk__least(PK__TALLEST, depth - p);                                            \
            const pk_real *own = a + p * along, *b = panel + p * step;                                         \
            const int begin = p == 0, end = p + count == depth;                                                \
            if (!PK__KNOWN_##suffix)                                                                           \
                pk__sums_of_##suffix(count, rows, own, along, b, step, begin, end, other, other_at, to);       \
            else                                                                                               \
                switch (count) {                                                                               \
                case 1:                                                                                        \
                    pk__sums_of_##suffix(1, rows, own, along, b, step, begin, end, other, other_at, to);       \
                    break;                                                                                     \
                case 2:                                                                                        \
                    pk__sums_of_##suffix(2, rows, own, along, b, step, begin, end, other, other_at, to);       \
                    break;                                                                                     \
                case 3:                                                                                        \
                    pk__sums_of_##suffix(3, rows, own, along, b, step, begin, end, other, other_at, to);       \
                    break;                                                                                     \
                case 4:                                                                                        \
                    pk__sums_of_##suffix(4, rows, own, along, b, step, begin, end, other, other_at, to);       \
                    break;                                                                                     \
                case 5:                                                                                        \
                    pk__sums_of_##suffix(5, rows, own, along, b, step, begin, end, other, other_at, to);       \
                    break;                                                                                     \
                default: pk__sums_of_##suffix(6, rows, own, along, b, step, begin, end, other, other_at, to);  \
                }                                                                                              \
        }                                                                                                      \
    }

#if defined(__GNUC__)
typedef pk_real pk__vector __attribute__((vector_size(16), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__wide_vector __attribute__((vector_size(32), aligned(sizeof(pk_real)), may_alias));
#if defined(__AVX2__) && defined(__FMA__)
#define PK__AVX2 /* the whole program has it */
#elif defined(__x86_64__) && !defined(PATHKERNEL_NO_DISPATCH)
#define PK__AVX2 __attribute__((target("avx2,fma")))
#define PK__DISPATCH
#endif
#else
typedef pk_real pk__vector;
#endif

/* Whether the number of rows in a tile is known when a processor's tiles are compiled: those for processors before 2013, where
 * there are faster ones, do with one copy of 4 rows. */
#define PK__KNOWN_avx2 1
#ifdef PK__DISPATCH
#define PK__KNOWN_base 0
#else
#define PK__KNOWN_base 1
#endif
/* sum + number times vector. */
#define PK__ADD_base(sum, number, beside) ((sum) + (number) * (beside))
#define PK__STEP_base(i) PK__TILE_STEP(i, PK__ADD_base)
#define PK__SUM_base(i) PK__SUM_STEP(i, PK__ADD_base)
#ifdef PK__AVX2
#if defined(__clang__)
#define PK__ADD_avx2 PK__ADD_base /* contracted */
#else
/* gcc contracts x y + z in its GNU modes only. */
#ifdef PATHKERNEL_FLOAT
#define PK__AVX2_FMA __builtin_ia32_vfmaddps256
#else
#define PK__AVX2_FMA __builtin_ia32_vfmaddpd256
#endif
#define PK__ADD_avx2(sum, number, beside) PK__AVX2_FMA((number)-zero, beside, sum)
#endif
#define PK__STEP_avx2(i) PK__TILE_STEP(i, PK__ADD_avx2)
#define PK__SUM_avx2(i) PK__SUM_STEP(i, PK__ADD_avx2)
#endif

/* Functions name_avx2 and name_base, as the processors need them that this is compiled for, by DEFINE(suffix, attributes,
 * vectors); and the call of the right one. */
#if defined(PK__DISPATCH)
#define PK__HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define PK__FOR_PROCESSORS(DEFINE)             \
    DEFINE(avx2, PK__AVX2, pk__wide_vector)    \
    PK__COLD_BEGIN /* for those before 2013 */ \
    DEFINE(base, , pk__vector) PK__COLD_END
#define PK__ON_PROCESSOR(name, arguments) \
    if (PK__HAS_AVX2)                     \
        name##_avx2 arguments;            \
    else                                  \
        name##_base arguments
#elif defined(PK__AVX2)
#define PK__HAS_AVX2 1
#define PK__FOR_PROCESSORS(DEFINE) DEFINE(avx2, PK__AVX2, pk__wide_vector)
#define PK__ON_PROCESSOR(name, arguments) name##_avx2 arguments
#else
#define PK__HAS_AVX2 0
#define PK__FOR_PROCESSORS(DEFINE) DEFINE(base, , pk__vector)
#define PK__ON_PROCESSOR(name, arguments) name##_base arguments
#endif

PK__FOR_PROCESSORS(PK__DEFINE_PANEL)

/* target form= start + A panel: A is rows x depth, element (i, p) at a[i * across + p * along]; row p of the panel
 * starts at panel + p * step. start: a number for each row, NULL: 0. No two rows of a tile have one place, unless they
 * are added to it. */
PK__PRIVATE void pk__panel_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                   const pk_real *panel, size_t step, const pk_real *start,
                                   const pk__tile_target *target)
{
    PK__ON_PROCESSOR(pk__panel, (rows, depth, a, across, along, panel, step, start, target));
}

PK__FOR_PROCESSORS(PK__DEFINE_PICKED)

/* to (rows, ld) = or, unless overwrite, += the terms term[0 .. terms - 1] of A panel: element (i, p) of A is
 * a[i * across + p], the rows of the panel stand one behind the other. */
PK__PRIVATE void pk__picked_product(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                    size_t across, const pk_real *panel, int overwrite, pk_real *to, size_t ld)
{
    PK__ON_PROCESSOR(pk__picked, (rows, terms, term, a, across, panel, overwrite, to, ld));
}

PK__FOR_PROCESSORS(PK__DEFINE_SUMS)

/* to (rows x PK_PANEL) = other o (A panel), for few terms: element (i, p) of A is a[i + p * along], row i of other stands at
 * other + other_at[i]. Terms in ascending order. */
PK__PRIVATE void pk__panel_sums(size_t rows, size_t depth, const pk_real *a, size_t along, const pk_real *panel,
                                size_t step, const pk_real *other, const size_t *other_at, pk_real *to)
{
    PK__ON_PROCESSOR(pk__sums, (rows, depth, a, along, panel, step, other, other_at, to));
}

/* What panels are multiplied with. */
PK__PRIVATE const char *pk__panel_name(void)
{
    return PK__HAS_AVX2 ? "AVX2" : "baseline";
}

PK__END_C
/* <<< implementation */
#endif
