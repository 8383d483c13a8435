/* pathkernel/math/tile.h: products of small matrices ("tiles") that stay in registers, and the operations on a tile before
 * it is stored. Nothing here is public: matrix.h builds whole products from it, product.h the inner loop of the decomposition.
 *
 * A tile is the product of up to 12 rows of A with one or two panels of B. A is read without copying, one number at a
 * time; a panel of B is one cache line wide: element (p, j) is at p * step + j. Every element of a tile has one accumulator,
 * to which its terms are added in ascending order. Its bits therefore depend neither on its position in the tile nor on the
 * tile's number of rows nor on the length of a vector.
 *
 * GNU vectors, since the vectorizers of gcc and clang differ by a factor of 6 on the same loops over arrays. On x86-64
 * the AVX2 and AVX-512 tiles are compiled for their own instruction set and chosen at run time, so that a program that is
 * built for every machine runs at the speed of this one; PATHKERNEL_NO_DISPATCH uses the instruction set of the compiler's flags
 * only, and PATHKERNEL_NO_AVX512 uses AVX2 even if AVX-512 is available.
 */
#ifndef PATHKERNEL_TILE_H
#define PATHKERNEL_TILE_H
#include "../base/context.h"

/* >>> declarations */
PK__BEGIN_C

/* Columns of a panel: one cache line. */
enum { PK_PANEL = 64 / (int)sizeof(pk_real) };

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_TILE_IMPLEMENTED)
#define PATHKERNEL_TILE_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_CODE
PK__WITH("forward-propagate") /* for the addresses in the loops of the tiles */

#if defined(__GNUC__)
#define PK__ALIGNED __attribute__((aligned(64))) /* for vectors of the size of a cache line */
typedef pk_real pk__vector __attribute__((vector_size(16), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__wide_vector __attribute__((vector_size(32), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__whole_vector __attribute__((vector_size(64), aligned(sizeof(pk_real)), may_alias));
#if defined(__AVX2__) && defined(__FMA__)
#define PK__AVX2 /* the whole program is compiled for it */
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

enum {
    PK__TALLEST = 6,        /* rows of a tile whose rows have two vectors */
    PK__PAIR = 2 * PK_PANEL /* columns of a pair of panels, which are multiplied together */
};

typedef enum pk__tile_form {
    PK__TILE_SET,      /* to = product */
    PK__TILE_ADD,      /* to += product */
    PK__TILE_HADAMARD, /* to += other o product */
    PK__TILE_DOT       /* to[0] += sum of other o product over the rows of a tile */
} pk__tile_form;

/* Panels of B that stand side by side in a product: row p of panel q begins at first + q * apart + p * step. */
typedef struct pk__panels {
    size_t count;
    const pk_real *first;
    size_t step, apart;
    size_t ahead; /* the distance to the panels that are multiplied next, for prefetching; 0: unknown */
} pk__panels;

/* Where the rows of a product go: row i to `to + to_at[i]` (DOT: all to `to`), with `other + other_at[i]`; those of
 * panel q PK_PANEL numbers further for each panel before it, with numbers that are other_apart further. */
typedef struct pk__tile_target {
    pk__tile_form form;
    pk_real *to;
    const size_t *to_at;
    const pk_real *other; /* of HADAMARD and DOT */
    const size_t *other_at;
    size_t other_apart;
} pk__tile_target;

/* The division of rows into tiles: first those of 6 rows, then those of 4. */
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
/* For row i of a tile: its pointer into A, two vectors of accumulators, and the addresses to which they are stored. In scope:
 * vector and its number of elements `lanes`, the offset `at` of a column of A, and the vectors left_b and right_b of a row of
 * B. Rows after the last one repeat it and are not stored. */
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
/* gcc does not unroll by itself. This matters when another thread of the same core takes half of the instruction slots. */
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
/* The tiles of all rows of A, one after the other. A tile with a number of rows that is known at compile time needs no
 * branches, which justifies three copies of the code. */
#define PK__DEFINE_PANEL(suffix, attributes, vectors)                                                         \
    PK__DEFINE_TILE(pk__tile_6_##suffix, attributes, PK__EACH_6, vectors, PK__STEP_##suffix)                  \
    PK__DEFINE_TILE(pk__tile_4_##suffix, attributes, PK__EACH_4, vectors, PK__STEP_##suffix)                  \
    attributes static void pk__panel_of_##suffix(size_t rows, size_t depth, const pk_real *a, size_t across,  \
                                                 size_t along, const pk_real *panel, size_t step,             \
                                                 const pk_real *start, const pk__tile_target *target)         \
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
            count = pk__min(tile < sixes ? 6 : 4, rows - first);                                              \
            if (count == 6 && PK__KNOWN_##suffix) /* when this is compiled */                                 \
                pk__tile_6_##suffix(6, depth, own, across, along, panel, step, begin, target, to, other);     \
            else if (tile < sixes && PK__KNOWN_##suffix)                                                      \
                pk__tile_6_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
            else                                                                                              \
                pk__tile_4_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
        }                                                                                                     \
    }                                                                                                         \
    attributes static void pk__panels_##suffix(size_t rows, size_t depth, const pk_real *a, size_t across,    \
                                               size_t along, const pk__panels *b, const pk_real *start,       \
                                               const pk__tile_target *target)                                 \
    {                                                                                                         \
        pk__tile_target own = *target;                                                                        \
        for (size_t q = 0; q < b->count; q++, own.to += PK_PANEL) {                                           \
            own.other = target->other ? target->other + q * target->other_apart : NULL;                       \
            pk__panel_of_##suffix(rows, depth, a, across, along, b->first + q * b->apart, b->step, start,     \
                                  &own);                                                                      \
        }                                                                                                     \
    }

/* Rows of A that are 0 at the same terms: only the other terms are added, whose numbers are given. */
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
#define PK__DEFINE_PICKED(suffix, attributes, vectors)                                                        \
    attributes static void pk__picked_##suffix(size_t rows, size_t terms, const unsigned char *term,          \
                                               const pk_real *a, size_t across, const pk__panels *panels,     \
                                               int overwrite, pk_real *to, size_t ld)                         \
    {                                                                                                         \
        typedef vectors vector;                                                                               \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                             \
        const vector zero = {0};                                                                              \
        const pk_real *start = NULL;                                                                          \
        for (size_t first = 0; first < rows; first += 4, a += 4 * across, to += 4 * ld) {                     \
            const size_t count = pk__min(4, rows - first);                                                    \
            PK__EACH_4(PK__TILE_ROW)                                                                          \
            for (size_t column = 0; column < panels->count * PK_PANEL; column += 2 * lanes) {                 \
                const pk_real *panel = panels->first + column / PK_PANEL * panels->apart + column % PK_PANEL; \
                PK__EACH_4(PK__TILE_START)                                                                    \
                for (size_t p = 0; p < terms; p++) {                                                          \
                    const size_t at = term[p];                                                                \
                    const pk_real *b = panel + at * panels->step;                                             \
                    const vector left_b = *(const vector *)b, right_b = *(const vector *)(b + lanes);         \
                    PK__EACH_4(PK__STEP_##suffix)                                                             \
                }                                                                                             \
                PK__EACH_4(PK__PICKED_END)                                                                    \
            }                                                                                                 \
        }                                                                                                     \
    }

/* For few terms, up to six rows of B stay in registers while the rows of A are read one after the other. */
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
#define PK__SUM_base(i) PK__SUM_STEP(i, PK__ADD_base)
#define PK__SUM_avx2(i) PK__SUM_STEP(i, PK__ADD_avx2)
#define PK__SUM_avx512(i) PK__SUM_STEP(i, PK__ADD_avx512)
#define PK__DEFINE_SUMS(suffix, attributes, vectors)                                                           \
    attributes PK__INLINE void pk__sums_of_##suffix(size_t count, size_t rows, const pk_real *a, size_t along, \
                                                    size_t columns, const pk_real *panel, size_t step,         \
                                                    int begin, int end, const pk_real *others, size_t apart,   \
                                                    const size_t *other_at, pk_real *to)                       \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                              \
        const vector zero = {0};                                                                               \
        const size_t next = 2 * lanes > PK_PANEL ? apart : (size_t)lanes;                                      \
        for (size_t column = 0; column < columns; column += 2 * lanes) {                                       \
            const pk_real *b = panel + column;                                                                 \
            const pk_real *other = others + column / PK_PANEL * apart + column % PK_PANEL;                     \
            PK__EACH_6(PK__SUM_LOAD)                                                                           \
            for (size_t row = 0; row < rows; row++) {                                                          \
                vector *at = (vector *)(to + row * PK__PAIR + column);                                         \
                vector left = zero, right = zero;                                                              \
                if (!begin) {                                                                                  \
                    left = at[0];                                                                              \
                    right = at[1];                                                                             \
                }                                                                                              \
                PK__EACH_6(PK__SUM_##suffix)                                                                   \
                if (end) {                                                                                     \
                    left *= *(const vector *)(other + other_at[row]);                                          \
                    right *= *(const vector *)(other + other_at[row] + next);                                  \
                }                                                                                              \
                at[0] = left;                                                                                  \
                at[1] = right;                                                                                 \
            }                                                                                                  \
        }                                                                                                      \
    }                                                                                                          \
    attributes static void pk__sums_##suffix(size_t rows, size_t depth, const pk_real *a, size_t along,        \
                                             const pk__panels *panels, const pk_real *other,                   \
                                             size_t other_apart, const size_t *other_at, pk_real *to)          \
    {                                                                                                          \
        const size_t step = panels->step, columns = panels->count * PK_PANEL;                                  \
        const size_t apart = panels->count > 1 ? other_apart : 0;                                              \
        for (size_t p = 0; p < depth; p += PK__TALLEST) {                                                      \
            const size_t count = pk__min(PK__TALLEST, depth - p);                                              \
            const pk_real *own = a + p * along, *b = panels->first + p * step;                                 \
            const int begin = p == 0, end = p + count == depth;                                                \
            PK__SUMS_CASES(PK__KNOWN_##suffix, pk__sums_of_##suffix)                                           \
        }                                                                                                      \
    }
#define PK__SUMS_OF(name, count) \
    name(count, rows, own, along, columns, b, step, begin, end, other, apart, other_at, to)
#define PK__SUMS_CASES(known, name)          \
    switch (known ? count : 0) {             \
    case 0: PK__SUMS_OF(name, count); break; \
    case 1: PK__SUMS_OF(name, 1); break;     \
    case 2: PK__SUMS_OF(name, 2); break;     \
    case 3: PK__SUMS_OF(name, 3); break;     \
    case 4: PK__SUMS_OF(name, 4); break;     \
    case 5: PK__SUMS_OF(name, 5); break;     \
    default: PK__SUMS_OF(name, 6);           \
    }

#ifdef PK__AVX512
/* A vector is a row of a panel, and an accumulator a row of the tile. Tiles are as wide as two panels, where there are two:
 * a number of A is fetched once for both, and fetching is what bounds tiles of one (1024^3 by bench_matrix: 80 GF/s, of two
 * 106). Rows form groups of 4, which are addressed by one pointer and three distances: row i of a group is at
 * group + distance_i. The last group begins 4 rows before the end; its first `skip` rows belong to the group before as
 * well and are not stored again. */
typedef struct pk__group {
    const pk_real *a;
    size_t row, skip;
} pk__group;

#define PK__WIDE_TAKE(g)                                                                           \
    const pk_real *a##g = group[g < groups ? g : 0].a;                                             \
    const size_t row##g = group[g < groups ? g : 0].row, skip##g = group[g < groups ? g : 0].skip; \
    vector left##g##0 = zero, left##g##1 = zero, left##g##2 = zero, left##g##3 = zero;             \
    vector right##g##0 = zero, right##g##1 = zero, right##g##2 = zero, right##g##3 = zero;
#define PK__WIDE_EACH(X, g)                 \
    if (g < groups) {                       \
        if (!(halved && g + 1 == groups)) { \
            X(g, 0)                         \
            X(g, 1)                         \
        }                                   \
        X(g, 2)                             \
        X(g, 3)                             \
    }
#define PK__WIDE_START(g, i) left##g##i = right##g##i = (i < skip##g ? 0 : start[row##g + i]) - zero;
#define PK__WIDE_STEP(g, i)                                                  \
    left##g##i = PK__ADD_avx512(left##g##i, a##g[at + distance##i], left_b); \
    if (both)                                                                \
        right##g##i = PK__ADD_avx512(right##g##i, a##g[at + distance##i], right_b);
#define PK__WIDE_END(g, i, assign, left_value, right_value)              \
    if (i >= skip##g) {                                                  \
        vector *to = (vector *)(target->to + target->to_at[row##g + i]); \
        to[0] assign(left_value);                                        \
        if (both)                                                        \
            to[1] assign(right_value);                                   \
    }
#define PK__WIDE_OTHER(g, i, beside) \
    (*(const vector *)(target->other + target->other_at[row##g + i] + (beside)))
#define PK__WIDE_SETS(g, i) PK__WIDE_END(g, i, =, left##g##i, right##g##i)
#define PK__WIDE_ADDS(g, i) PK__WIDE_END(g, i, +=, left##g##i, right##g##i)
#define PK__WIDE_HADAMARDS(g, i)                                 \
    PK__WIDE_END(g, i, +=, left##g##i * PK__WIDE_OTHER(g, i, 0), \
                 right##g##i * PK__WIDE_OTHER(g, i, target->other_apart))
#define PK__WIDE_DOTS(g, i)                                                       \
    if (i >= skip##g) {                                                           \
        left_sum += left##g##i * PK__WIDE_OTHER(g, i, 0);                         \
        if (both)                                                                 \
            right_sum += right##g##i * PK__WIDE_OTHER(g, i, target->other_apart); \
    }
#define PK__WIDE_GROUPS(X) PK__WIDE_EACH(X, 0) PK__WIDE_EACH(X, 1) PK__WIDE_EACH(X, 2)
/* halved: only the last two rows of the last group are computed. both: two panels, the second one next to the first in b.
 * picked: the terms to add are those that term lists, and the target is set or added to. */
PK__AVX512 PK__INLINE void pk__wide_tile(size_t groups, int halved, int both, int picked,
                                         const pk__group *group, const size_t *distance, size_t depth,
                                         const unsigned char *term, size_t along, const pk__panels *b,
                                         const pk_real *beside, const pk_real *start,
                                         const pk__tile_target *target)
{
    typedef pk__whole_vector vector;
    const vector zero = {0};
    const size_t distance0 = 0, distance1 = distance[1], distance2 = distance[2], distance3 = distance[3];
    const size_t step = b->step, ahead = b->ahead;
    const int fetching = groups > 1 && !picked;
    const pk_real *panel = b->first;
    PK__WIDE_TAKE(0)
    PK__WIDE_TAKE(1)
    PK__WIDE_TAKE(2)
    if (start) {
        PK__WIDE_GROUPS(PK__WIDE_START)
    }
    PK__UNROLL
    for (size_t p = 0; p < depth; p++) {
        const size_t q = picked ? term[p] : p, at = q * along;
        if (fetching) {
            __builtin_prefetch(panel + q * step + ahead);
            if (both)
                __builtin_prefetch(beside + q * step + ahead);
        }
        const vector left_b = *(const vector *)(panel + q * step),
                     right_b = both ? *(const vector *)(beside + q * step) : zero;
        PK__WIDE_GROUPS(PK__WIDE_STEP)
    }
    if (target->form == PK__TILE_SET) {
        PK__WIDE_GROUPS(PK__WIDE_SETS)
    } else if (picked || target->form == PK__TILE_ADD) {
        PK__WIDE_GROUPS(PK__WIDE_ADDS)
    } else if (target->form == PK__TILE_DOT) {
        vector *to = (vector *)target->to;
        vector left_sum = to[0], right_sum = both ? to[1] : zero;
        PK__WIDE_GROUPS(PK__WIDE_DOTS)
        to[0] = left_sum;
        if (both)
            to[1] = right_sum;
    } else {
        PK__WIDE_GROUPS(PK__WIDE_HADAMARDS)
    }
}

/* Tiles of two groups of rows, or of three; and, for networks of ten outputs, of two and a half. */
PK__AVX512 PK__INLINE void pk__wide_tiles(int both, int picked, size_t rows, size_t depth,
                                          const unsigned char *term, const pk_real *a, size_t across,
                                          size_t along, const pk__panels *b, const pk_real *beside,
                                          const pk_real *start, const pk__tile_target *target)
{
    const size_t last = rows < 4 ? 0 : rows - 4, all = pk__blocks(rows, 4);
    const size_t missing = rows < 4 ? 4 - rows : 0;
    size_t distance[4];
    for (size_t i = 0; i < 4; i++)
        distance[i] = i < missing ? 0 : (i - missing) * across;
    pk__panels own = *b;
    for (size_t done = 0, groups; done < all; done += groups) {
        pk__group group[3];
        const size_t rest = all - done;
        groups = rest == 1 ? 1 : both ? 2 + rest % 2 : rest == 4 ? 2 : pk__min(3, rest);
        for (size_t g = 0; g < groups; g++) {
            const size_t first = pk__min(4 * (done + g), last);
            group[g].a = a + first * across;
            group[g].skip = 4 * (done + g) - first + missing;
            group[g].row = first - missing; /* and, where 4 rows are not there, of the first that is: modulo */
        }
        if (groups == 3 && both && group[2].skip >= 2)
            pk__wide_tile(3, 1, 1, picked, group, distance, depth, term, along, &own, beside, start, target);
        else if (groups == 3)
            pk__wide_tile(3, 0, both, picked, group, distance, depth, term, along, &own, beside, start, target);
        else if (groups == 2)
            pk__wide_tile(2, 0, both, picked, group, distance, depth, term, along, &own, beside, start, target);
        else
            pk__wide_tile(1, 0, both, picked, group, distance, depth, term, along, &own, beside, start, target);
        own.ahead = 0;
    }
}

/* Two panels at a time, and the last one alone if their number is odd. */
PK__AVX512 PK__INLINE void pk__wide_panels(int picked, size_t rows, size_t depth, const unsigned char *term,
                                           const pk_real *a, size_t across, size_t along, const pk__panels *b,
                                           const pk_real *start, const pk__tile_target *target)
{
    pk__panels pair = *b;
    pk__tile_target own = *target;
    for (size_t rest = b->count; rest > 0; rest -= pk__min(rest, 2)) {
        if (rest > 1)
            pk__wide_tiles(1, picked, rows, depth, term, a, across, along, &pair, pair.first + pair.apart,
                           start, &own);
        else
            pk__wide_tiles(0, picked, rows, depth, term, a, across, along, &pair, NULL, start, &own);
        pair.first += 2 * pair.apart;
        own.to += 2 * PK_PANEL;
        own.other = own.other ? own.other + 2 * own.other_apart : NULL;
    }
}

PK__AVX512 static void pk__panels_avx512(size_t rows, size_t depth, const pk_real *a, size_t across,
                                         size_t along, const pk__panels *b, const pk_real *start,
                                         const pk__tile_target *target)
{
    pk__wide_panels(0, rows, depth, NULL, a, across, along, b, start, target);
}

PK__AVX512 static void pk__picked_avx512(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                         size_t across, const pk__panels *b, int overwrite, pk_real *to,
                                         size_t ld)
{
    enum { AT_ONCE = 16 };
    size_t at[AT_ONCE];
    for (size_t i = 0; i < AT_ONCE; i++)
        at[i] = i * ld;
    for (size_t first = 0; first < rows; first += AT_ONCE) {
        const pk__tile_target target = {
            overwrite ? PK__TILE_SET : PK__TILE_ADD, to + first * ld, at, NULL, NULL, 0};
        pk__wide_panels(1, pk__min(AT_ONCE, rows - first), terms, term, a + first * across, across, 1, b, NULL,
                        &target);
    }
}

/* One panel and the next one, which may be at any address. */
PK__AVX512 static void pk__pair_avx512(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                       const pk_real *first, const pk_real *beside,
                                       const pk__tile_target *target)
{
    const pk__panels b = {2, first, PK_PANEL, 0, 0};
    pk__wide_tiles(1, 0, rows, depth, NULL, a, across, along, &b, beside, NULL, target);
}

PK__AVX512 static void pk__picked_pair_avx512(size_t rows, size_t terms, const unsigned char *term,
                                              const pk_real *a, size_t across, const pk_real *first,
                                              const pk_real *beside, const pk__tile_target *target)
{
    const pk__panels b = {2, first, PK_PANEL, 0, 0};
    pk__wide_tiles(1, 1, rows, terms, term, a, across, 1, &b, beside, NULL, target);
}
#endif

PK__FOR_AVX2(PK__DEFINE_PANEL)
PK__FOR_BASE(PK__DEFINE_PANEL)

/* target form= start + A B: A is rows x depth, element (i, p) at a[i * across + p * along]; B is panels. start: a number
 * for each row, or NULL for 0. Two rows of a tile may have the same target only if they are added to it. */
PK__PRIVATE void pk__panel_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                   const pk__panels *b, const pk_real *start, const pk__tile_target *target)
{
    PK__ON_PROCESSOR(pk__panels, (rows, depth, a, across, along, b, start, target));
}

PK__FOR_AVX2(PK__DEFINE_PICKED)
PK__FOR_BASE(PK__DEFINE_PICKED)

/* to (rows, ld) = or, unless overwrite, += the terms term[0 .. terms - 1] of A B: element (i, p) of A is a[i * across + p]. */
PK__PRIVATE void pk__picked_product(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                    size_t across, const pk__panels *b, int overwrite, pk_real *to, size_t ld)
{
    PK__ON_PROCESSOR(pk__picked, (rows, terms, term, a, across, b, overwrite, to, ld));
}

/* pk__panel_product with one or two panels, each at its own address, with step PK_PANEL. */
PK__PRIVATE void pk__pair_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                  size_t count, const pk_real *const *panels, const pk__tile_target *target)
{
#ifdef PK__AVX512
    if (PK__HAS_AVX512 && count == 2) {
        pk__pair_avx512(rows, depth, a, across, along, panels[0], panels[1], target);
        return;
    }
#endif
    pk__tile_target own = *target;
    for (size_t q = 0; q < count; q++, own.to += PK_PANEL) {
        const pk__panels one = {1, panels[q], PK_PANEL, 0, 0};
        pk__panel_product(rows, depth, a, across, along, &one, NULL, &own);
    }
}

/* pk__picked_product likewise, for at most 16 rows. at[i] = i * ld. */
PK__PRIVATE void pk__picked_pair(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                 size_t across, size_t count, const pk_real *const *panels, int overwrite,
                                 pk_real *to, size_t ld, const size_t *at)
{
#ifdef PK__AVX512
    if (PK__HAS_AVX512 && count == 2) {
        const pk__tile_target target = {overwrite ? PK__TILE_SET : PK__TILE_ADD, to, at, NULL, NULL, 0};
        pk__picked_pair_avx512(rows, terms, term, a, across, panels[0], panels[1], &target);
        return;
    }
#endif
    (void)at;
    for (size_t q = 0; q < count; q++) {
        const pk__panels one = {1, panels[q], PK_PANEL, 0, 0};
        pk__picked_product(rows, terms, term, a, across, &one, overwrite, to + q * PK_PANEL, ld);
    }
}

PK__FOR_PROCESSORS(PK__DEFINE_SUMS)

/* to (rows x PK__PAIR) = other o (A B), for few terms and at most two panels that stand side by side as they are,
 * apart PK_PANEL: element (i, p) of A is a[i + p * along], row i of other stands at other + other_at[i], for the next panel
 * other_apart further. Terms in ascending order. Columns behind those of one panel are written, too. */
PK__PRIVATE void pk__panel_sums(size_t rows, size_t depth, const pk_real *a, size_t along, const pk__panels *b,
                                const pk_real *other, size_t other_apart, const size_t *other_at, pk_real *to)
{
    PK__ON_PROCESSOR(pk__sums, (rows, depth, a, along, b, other, other_apart, other_at, to));
}

/* The name of the instruction set that multiplies panels. */
PK__PRIVATE const char *pk__panel_name(void)
{
    return PK__HAS_AVX512 ? "AVX-512" : PK__HAS_AVX2 ? "AVX2" : "baseline";
}

PK__END_CODE
/* <<< implementation */
#endif
