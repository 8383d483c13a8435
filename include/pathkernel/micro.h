/* pathkernel/micro.h: products of small tiles that stay in registers, and what is done with a tile before it leaves
 * them. Nothing here is public: matrix.h makes whole products of it, contraction.h the hot loop.
 *
 * A tile is up to 12 rows of A times one panel of B. A is read where it stands, a number at a time; a panel of B is one
 * cache line wide: element (p, j) at p * step + j. Every element of a tile is one accumulator that takes its terms in
 * ascending order, wherever it stands in the tile, however many rows the tile has and however long a vector is.
 *
 * GNU vectors, since the vectorisers of gcc and clang differ by a factor of 6 on the same loops over arrays. On x86-64
 * the AVX2 and AVX-512 tiles are compiled for their own instruction set and chosen at run time, so that a program that is
 * built for every machine runs at the speed of this one; PATHKERNEL_NO_DISPATCH leaves what the compiler's flags say, and
 * PATHKERNEL_NO_AVX512 takes AVX2 where there is both.
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

#if defined(__GNUC__)
#define PK__ALIGNED __attribute__((aligned(64))) /* for vectors that are cache lines */
typedef pk_real pk__vector __attribute__((vector_size(16), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__wide_vector __attribute__((vector_size(32), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__whole_vector __attribute__((vector_size(64), aligned(sizeof(pk_real)), may_alias));
#if defined(__AVX2__) && defined(__FMA__)
#define PK__AVX2 /* the whole program has it */
#define PK__HAS_AVX2 1
#elif defined(__x86_64__) && !defined(PATHKERNEL_NO_DISPATCH)
#define PK__AVX2 __attribute__((target("avx2,fma")))
#define PK__HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#endif
#if defined(PATHKERNEL_NO_AVX512)
#elif defined(__AVX512F__)
#define PK__AVX512
#define PK__HAS_AVX512 1
#elif defined(__x86_64__) && !defined(PATHKERNEL_NO_DISPATCH)
#define PK__AVX512 __attribute__((target("avx512f")))
#define PK__HAS_AVX512 __builtin_cpu_supports("avx512f")
#endif
#else
#define PK__ALIGNED
typedef pk_real pk__vector;
#endif

/* Functions name_avx512, name_avx2 and name_base, by DEFINE(suffix, attributes, vectors), and the call of the right one.
 * Whether the number of rows in a tile is known when a processor's tiles are compiled: those for processors before 2013,
 * where there are faster ones, do with one copy of 4 rows. */
#define PK__KNOWN_avx512 1
#define PK__KNOWN_avx2 1
#ifdef PK__AVX512
#define PK__FOR_AVX512(DEFINE) DEFINE(avx512, PK__AVX512, pk__whole_vector)
#define PK__ON_AVX512(name, arguments) \
    if (PK__HAS_AVX512)                \
        name##_avx512 arguments;       \
    else
#else
#define PK__HAS_AVX512 0
#define PK__FOR_AVX512(DEFINE)
#define PK__ON_AVX512(name, arguments)
#endif
#ifdef PK__AVX2
#define PK__KNOWN_base 0
#define PK__FOR_AVX2(DEFINE) DEFINE(avx2, PK__AVX2, pk__wide_vector)
#define PK__ON_AVX2(name, arguments) \
    if (PK__HAS_AVX2)                \
        name##_avx2 arguments;       \
    else
#define PK__FOR_BASE(DEFINE) PK__COLD_BEGIN DEFINE(base, , pk__vector) PK__COLD_END /* before 2013 */
#else
#define PK__HAS_AVX2 0
#define PK__KNOWN_base 1
#define PK__FOR_AVX2(DEFINE)
#define PK__ON_AVX2(name, arguments)
#define PK__FOR_BASE(DEFINE) DEFINE(base, , pk__vector)
#endif
#define PK__FOR_PROCESSORS(DEFINE) PK__FOR_AVX512(DEFINE) PK__FOR_AVX2(DEFINE) PK__FOR_BASE(DEFINE)
#define PK__ON_PROCESSOR(name, arguments) \
    PK__ON_AVX512(name, arguments) PK__ON_AVX2(name, arguments) name##_base arguments

/* sum + number times vector. gcc contracts x y + z in its GNU modes only. */
#define PK__ADD_base(sum, number, beside) ((sum) + (number) * (beside))
#if defined(__clang__)
#define PK__ADD_avx2 PK__ADD_base /* contracted */
#define PK__ADD_avx512 PK__ADD_base
#elif defined(PATHKERNEL_FLOAT)
#define PK__ADD_avx2(sum, number, beside) __builtin_ia32_vfmaddps256((number)-zero, beside, sum)
#define PK__ADD_avx512(sum, number, beside) __builtin_ia32_vfmaddps512_mask((number)-zero, beside, sum, -1, 4)
#else
#define PK__ADD_avx2(sum, number, beside) __builtin_ia32_vfmaddpd256((number)-zero, beside, sum)
#define PK__ADD_avx512(sum, number, beside) __builtin_ia32_vfmaddpd512_mask((number)-zero, beside, sum, -1, 4)
#endif

enum { PK__TALLEST = 6 }; /* rows of a tile of two vectors a row */

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
#define PK__STEP_base(i) PK__TILE_STEP(i, PK__ADD_base)
#define PK__STEP_avx2(i) PK__TILE_STEP(i, PK__ADD_avx2)
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
#define PK__SUM_LOAD(i)                                         \
    vector left##i = zero, right##i = zero;                     \
    if (i < count) {                                            \
        left##i = *(const vector *)(b + i * step);              \
        if (both)                                               \
            right##i = *(const vector *)(b + i * step + lanes); \
    }
#define PK__SUM_STEP(i, ADD)                                  \
    if (i < count) {                                          \
        left = ADD(left, a[row + i * along], left##i);        \
        if (both)                                             \
            right = ADD(right, a[row + i * along], right##i); \
    }
#define PK__SUM_base(i) PK__SUM_STEP(i, PK__ADD_base)
#define PK__SUM_avx2(i) PK__SUM_STEP(i, PK__ADD_avx2)
#define PK__SUM_avx512(i) PK__SUM_STEP(i, PK__ADD_avx512)
#define PK__DEFINE_SUMS(suffix, attributes, vectors)                                                           \
    attributes PK__INLINE void pk__sums_of_##suffix(size_t count, size_t rows, const pk_real *a, size_t along, \
                                                    const pk_real *panel, size_t step, int begin, int end,     \
                                                    const pk_real *other, const size_t *other_at, pk_real *to) \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)), both = lanes < PK_PANEL };                     \
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
                    if (both)                                                                                  \
                        right = *beside;                                                                       \
                }                                                                                              \
                PK__EACH_6(PK__SUM_##suffix)                                                                   \
                if (end) {                                                                                     \
                    left *= *(const vector *)(other + other_at[row] + column);                                 \
                    if (both)                                                                                  \
                        right *= *(const vector *)(other + other_at[row] + column + lanes);                    \
                }                                                                                              \
                *at = left;                                                                                    \
                if (both)                                                                                      \
                    *beside = right;                                                                           \
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

#ifdef PK__AVX512
/* A vector is a row of a panel, and an accumulator a row of the tile: it takes 12 rows to keep two multipliers busy. They are
 * groups of 4, which one pointer and three distances address: a group's row i is group + distance_i. The first rows of a
 * group that are there twice, skip of them, go nowhere: a last group starts 4 rows before the end. term: as below, or NULL:
 * all terms. */
typedef struct pk__group {
    const pk_real *a;
    size_t row, skip;
} pk__group;

#define PK__WIDE_TAKE(g)                                                                           \
    const pk_real *a##g = group[g < groups ? g : 0].a;                                             \
    const size_t row##g = group[g < groups ? g : 0].row, skip##g = group[g < groups ? g : 0].skip; \
    vector sum##g##0 = zero, sum##g##1 = zero, sum##g##2 = zero, sum##g##3 = zero;
#define PK__WIDE_EACH(X, g) \
    if (g < groups) {       \
        X(g, 0)             \
        X(g, 1)             \
        X(g, 2)             \
        X(g, 3)             \
    }
#define PK__WIDE_START(g, i) sum##g##i = (i < skip##g ? 0 : start[row##g + i]) - zero;
#define PK__WIDE_STEP(g, i) sum##g##i = PK__ADD_avx512(sum##g##i, a##g[at + distance##i], beside);
#define PK__WIDE_END(g, i, assign, value) \
    if (i >= skip##g)                     \
        *(vector *)(target->to + target->to_at[row##g + i]) assign(value);
#define PK__WIDE_OTHER(g, i) (*(const vector *)(target->other + target->other_at[row##g + i]))
#define PK__WIDE_SETS(g, i) PK__WIDE_END(g, i, =, sum##g##i)
#define PK__WIDE_ADDS(g, i) PK__WIDE_END(g, i, +=, sum##g##i)
#define PK__WIDE_HADAMARDS(g, i) PK__WIDE_END(g, i, +=, sum##g##i * PK__WIDE_OTHER(g, i))
#define PK__WIDE_DOTS(g, i) \
    if (i >= skip##g)       \
        all += sum##g##i * PK__WIDE_OTHER(g, i);
#define PK__WIDE_GROUPS(X) PK__WIDE_EACH(X, 0) PK__WIDE_EACH(X, 1) PK__WIDE_EACH(X, 2)
PK__AVX512 PK__INLINE void pk__wide_tile(size_t groups, const pk__group *group, const size_t *distance,
                                         size_t depth, const unsigned char *term, size_t along,
                                         const pk_real *panel, size_t step, const pk_real *start,
                                         const pk__tile_target *target)
{
    typedef pk__whole_vector vector;
    const vector zero = {0};
    const size_t distance0 = 0, distance1 = distance[1], distance2 = distance[2], distance3 = distance[3];
    PK__WIDE_TAKE(0)
    PK__WIDE_TAKE(1)
    PK__WIDE_TAKE(2)
    if (start) {
        PK__WIDE_GROUPS(PK__WIDE_START)
    }
    PK__UNROLL
    for (size_t p = 0; p < depth; p++) {
        const size_t at = (term ? term[p] : p) * along;
        const vector beside = *(const vector *)(panel + (term ? term[p] : p) * step);
        PK__WIDE_GROUPS(PK__WIDE_STEP)
    }
    if (target->form == PK__TILE_SET) {
        PK__WIDE_GROUPS(PK__WIDE_SETS)
    } else if (target->form == PK__TILE_ADD) {
        PK__WIDE_GROUPS(PK__WIDE_ADDS)
    } else if (target->form == PK__TILE_DOT) {
        vector all = *(vector *)target->to;
        PK__WIDE_GROUPS(PK__WIDE_DOTS)
        *(vector *)target->to = all;
    } else {
        PK__WIDE_GROUPS(PK__WIDE_HADAMARDS)
    }
}

/* Tiles of three groups of rows; and of two, where there would be one of one. */
PK__AVX512 PK__INLINE void pk__wide_tiles(size_t rows, size_t depth, const unsigned char *term,
                                          const pk_real *a, size_t across, size_t along, const pk_real *panel,
                                          size_t step, const pk_real *start, const pk__tile_target *target)
{
    const size_t last = rows < 4 ? 0 : rows - 4, all = pk__blocks(rows, 4);
    const size_t missing = rows < 4 ? 4 - rows : 0;
    size_t distance[4];
    for (size_t i = 0; i < 4; i++)
        distance[i] = i < missing ? 0 : (i - missing) * across;
    for (size_t done = 0, groups; done < all; done += groups) {
        pk__group group[3];
        groups = all - done == 4 ? 2 : pk__least(3, all - done);
        for (size_t g = 0; g < groups; g++) {
            const size_t first = pk__least(4 * (done + g), last);
            group[g].a = a + first * across;
            group[g].skip = 4 * (done + g) - first + missing;
            group[g].row = first - missing; /* and, where 4 rows are not there, of the first that is: modulo */
        }
        if (groups == 3)
            pk__wide_tile(3, group, distance, depth, term, along, panel, step, start, target);
        else if (groups == 2)
            pk__wide_tile(2, group, distance, depth, term, along, panel, step, start, target);
        else
            pk__wide_tile(1, group, distance, depth, term, along, panel, step, start, target);
    }
}

PK__AVX512 static void pk__panel_avx512(size_t rows, size_t depth, const pk_real *a, size_t across,
                                        size_t along, const pk_real *panel, size_t step, const pk_real *start,
                                        const pk__tile_target *target)
{
    pk__wide_tiles(rows, depth, NULL, a, across, along, panel, step, start, target);
}

PK__AVX512 static void pk__picked_avx512(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                         size_t across, const pk_real *panel, int overwrite, pk_real *to,
                                         size_t ld)
{
    size_t at[12];
    pk__tile_target target = {overwrite ? PK__TILE_SET : PK__TILE_ADD, to, at, NULL, NULL};
    for (size_t first = 0; first < rows; first += 12) {
        const size_t count = pk__least(12, rows - first);
        for (size_t i = 0; i < count; i++)
            at[i] = (first + i) * ld;
        pk__wide_tiles(count, terms, term, a + first * across, across, 1, panel, PK_PANEL, NULL, &target);
    }
}
#endif

PK__FOR_AVX2(PK__DEFINE_PANEL)
PK__FOR_BASE(PK__DEFINE_PANEL)

/* target form= start + A panel: A is rows x depth, element (i, p) at a[i * across + p * along]; row p of the panel
 * starts at panel + p * step. start: a number for each row, NULL: 0. No two rows of a tile have one place, unless they
 * are added to it. */
PK__PRIVATE void pk__panel_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                   const pk_real *panel, size_t step, const pk_real *start,
                                   const pk__tile_target *target)
{
    PK__ON_PROCESSOR(pk__panel, (rows, depth, a, across, along, panel, step, start, target));
}

PK__FOR_AVX2(PK__DEFINE_PICKED)
PK__FOR_BASE(PK__DEFINE_PICKED)

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
    return PK__HAS_AVX512 ? "AVX-512" : PK__HAS_AVX2 ? "AVX2" : "baseline";
}

PK__END_C
/* <<< implementation */
#endif
