/* pathkernel/math/elementary.h: arithmetic on rows of numbers: whether they are finite, inner products, products number by
 * number, exp, tanh and their relatives. Nothing here is public.
 *
 * Where the processor has AVX2 and FMA (chosen at run time as in tile.h), exp, tanh and their relatives compute four numbers at
 * a time without branches, four to nine times as fast as the C library's functions; elsewhere the C library is called. The
 * result for a number depends neither on its position nor on how many there are: the last ones fill a vector of their own.
 * Largest errors against long double (tests/test_elementary.c), in units in the last place: exp 1.1, tanh 2.5, sigmoid 2.3, softplus
 * 2.7; the C library's here are 0.6, 2.1, 2.1 and 1.5. NaN stays NaN, infinities give the limits.
 */
#ifndef PATHKERNEL_ELEMENTARY_H
#define PATHKERNEL_ELEMENTARY_H
#include "tile.h"

/* >>> declarations */
PK__BEGIN_C
PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_ELEMENTARY_IMPLEMENTED)
#define PATHKERNEL_ELEMENTARY_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>

/* Before a loop with independent iterations: gcc then vectorizes it at -O2, too. */
#ifdef _OPENMP
#define PK__SIMD PK__PRAGMA(omp simd)
#else
#define PK__SIMD
#endif

/* 1 if all are finite: 0 x is 0, or NaN for NaN and infinities. Chains, so that the additions do not wait for each
 * other. */
static int pk__all_finite_plain(const pk_real *x, size_t count)
{
    pk_real chain[8] = {0, 0, 0, 0, 0, 0, 0, 0}, zero = 0;
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            chain[k] += 0 * x[i + k];
    for (; i < count; i++)
        zero += 0 * x[i];
    for (size_t k = 0; k < 8; k++)
        zero += chain[k];
    return zero == 0;
}

#ifdef PK__AVX2
PK__AVX2 static int pk__all_finite_avx2(const pk_real *x, size_t count)
{
    enum { LANES = (int)(sizeof(pk__wide_vector) / sizeof(pk_real)), STEP = 4 * LANES };
    pk__wide_vector a = {0}, b = a, c = a, d = a;
    const size_t whole = count / STEP * STEP;
    for (size_t i = 0; i < whole; i += STEP) {
        a += *(const pk__wide_vector *)(x + i) * 0;
        b += *(const pk__wide_vector *)(x + i + LANES) * 0;
        c += *(const pk__wide_vector *)(x + i + 2 * LANES) * 0;
        d += *(const pk__wide_vector *)(x + i + 3 * LANES) * 0;
    }
    a += b;
    c += d;
    a += c;
    pk_real lane[LANES];
    memcpy(lane, &a, sizeof lane);
    /* No call from here: gcc 12 would not clear the upper halves of the registers, and all that is not AVX, until they are
     * cleared, would take up to seven times as long. */
    pk_real zero = 0;
    for (size_t i = 0; i < LANES; i++)
        zero += lane[i];
    for (size_t i = whole; i < count; i++)
        zero += 0 * x[i];
    return zero == 0;
}
#endif

PK__PRIVATE int pk__all_finite(const pk_real *x, size_t count)
{
#ifdef PK__AVX2
    if (count >= 32 && PK__HAS_AVX2)
        return pk__all_finite_avx2(x, count);
#endif
    return pk__all_finite_plain(x, count);
}

/* In independent chains, so that the additions do not wait for each other: one vector of AVX-512, or two of the others. */
#define PK__DEFINE_DOTS(suffix, attributes, vectors)                                                        \
    attributes static void pk__dots_##suffix(size_t rows, size_t count, const pk_real *a, const pk_real *b, \
                                             pk_real factor, pk_real *to)                                   \
    {                                                                                                       \
        typedef vectors vector;                                                                             \
        enum {                                                                                              \
            lanes = (int)(sizeof(vector) / sizeof(pk_real)),                                                \
            both = lanes < PK_PANEL,                                                                        \
            chains = (both + 1) * lanes                                                                     \
        };                                                                                                  \
        for (size_t row = 0; row < rows; row++, a += count) {                                               \
            vector left = {0}, right = {0};                                                                 \
            pk_real chain[lanes], rest = 0;                                                                 \
            size_t i = 0;                                                                                   \
            for (; i + chains <= count; i += chains) {                                                      \
                left += *(const vector *)(a + i) * *(const vector *)(b + i);                                \
                if (both)                                                                                   \
                    right += *(const vector *)(a + i + lanes) * *(const vector *)(b + i + lanes);           \
            }                                                                                               \
            for (; i < count; i++)                                                                          \
                rest += a[i] * b[i];                                                                        \
            *(vector *)chain = left + right;                                                                \
            for (size_t k = lanes / 2; k > 0; k /= 2)                                                       \
                for (size_t j = 0; j < k; j++)                                                              \
                    chain[j] += chain[j + k];                                                               \
            to[row] += factor * (chain[0] + rest);                                                          \
        }                                                                                                   \
    }
PK__FOR_PROCESSORS(PK__DEFINE_DOTS)

/* to += factor A b of A (rows x count). */
PK__PRIVATE void pk__dots(size_t rows, size_t count, const pk_real *a, const pk_real *b, pk_real factor,
                          pk_real *to)
{
    PK__ON_PROCESSOR(pk__dots, (rows, count, a, b, factor, to));
}

PK__PRIVATE pk_real pk__dot(size_t count, const pk_real *a, const pk_real *b)
{
    pk_real sum = 0;
    pk__dots(1, count, a, b, 1, &sum);
    return sum;
}

#define PK__DEFINE_TIMES(suffix, attributes, vectors)                                          \
    attributes static void pk__times_##suffix(size_t rows, size_t count, const pk_real *from,  \
                                              const pk_real *factors, int add, pk_real *to)    \
    {                                                                                          \
        typedef vectors vector;                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                              \
        for (size_t row = 0; row < rows; row++, from += count, to += count) {                  \
            size_t i = 0;                                                                      \
            for (; i + lanes <= count; i += lanes) {                                           \
                vector product = *(const vector *)(from + i) * *(const vector *)(factors + i); \
                if (add)                                                                       \
                    product += *(const vector *)(to + i);                                      \
                *(vector *)(to + i) = product;                                                 \
            }                                                                                  \
            for (; i < count; i++)                                                             \
                to[i] = add ? to[i] + from[i] * factors[i] : from[i] * factors[i];             \
        }                                                                                      \
    }
PK__FOR_PROCESSORS(PK__DEFINE_TIMES)

/* to (rows x count) = or, to add, += from o factors, the same ones for every row; to may be one of
 * them. */
PK__PRIVATE void pk__times(size_t rows, size_t count, const pk_real *from, const pk_real *factors, int add,
                           pk_real *to)
{
    PK__ON_PROCESSOR(pk__times, (rows, count, from, factors, add, to));
}

/* y[i] = F(x[i]) for i < count, y may be x. b: softplus' beta; the others do without. */
typedef void pk__elementary(size_t count, double b, const double *x, double *y);

PK__PRIVATE double pk__sigmoid(double x)
{
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* log(1 + e^(b x)) / b, without overflow and without PyTorch's switch to x at b x > 20: that switch is a
 * jump of 2e-9 / b, which no path integral could close over. */
static double pk__softplus(double x, double b)
{
    return (b * x > 0 ? x : 0) + log1p(exp(-fabs(b * x))) / b;
}

#ifdef PK__AVX2

typedef double pk__quad __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t pk__quad_bits __attribute__((vector_size(32), aligned(8), may_alias));
#define PK__QUAD PK__AVX2 static inline pk__quad

/* where ? a : b, elementwise. */
#define PK__CHOOSE(where, a, b) \
    ((pk__quad)(((pk__quad_bits)(where) & (pk__quad_bits)(a)) | (~(pk__quad_bits)(where) & (pk__quad_bits)(b))))

PK__QUAD pk__quad_of(double x)
{
    const pk__quad quad = {x, x, x, x};
    return quad;
}

PK__QUAD pk__quad_magnitude(pk__quad x)
{
    return (pk__quad)((pk__quad_bits)x & INT64_MAX);
}

/* The whole number nearest to x, |x| < 2^51: what is below the last place of 1.5 2^52 is rounded away. */
PK__QUAD pk__quad_round(pk__quad x)
{
    return x + 0x1.8p52 - 0x1.8p52;
}

/* 2^n for a whole n from -1022 to 1023. */
PK__QUAD pk__quad_power(pk__quad n)
{
    return (pk__quad)((pk__quad_bits)(n + (0x1.8p52 + 1023)) << 52);
}

/* x - n log 2, for |n| < 2^20: the first product is exact. */
PK__QUAD pk__quad_reduce(pk__quad x, pk__quad n)
{
    return (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
}

/* e^r - 1 for |r| <= log(2) / 2: Taylor's sum, whose rest is below 2e-17 r. */
PK__QUAD pk__quad_expm1_small(pk__quad r)
{
    const pk__quad s = r * r;
    const pk__quad even =
        1.0 / 2 +
        s * (1.0 / 24 + s * (1.0 / 720 + s * (1.0 / 40320 + s * (1.0 / 3628800 + s * (1.0 / 479001600)))));
    const pk__quad odd =
        1.0 / 6 +
        s * (1.0 / 120 + s * (1.0 / 5040 + s * (1.0 / 362880 + s * (1.0 / 39916800 + s * (1.0 / 6227020800)))));
    return r + s * (even + r * odd);
}

/* The power of 2 goes in as two factors, since it may be outside the range of a double where the product is not. */
PK__QUAD pk__quad_exp(pk__quad x)
{
    x = PK__CHOOSE(x < -746, pk__quad_of(-746), x);
    x = PK__CHOOSE(x > 710, pk__quad_of(710), x);
    const pk__quad n = pk__quad_round(x * 0x1.71547652b82fep0), half = pk__quad_round(n * 0.5);
    const pk__quad y = 1 + pk__quad_expm1_small(pk__quad_reduce(x, n));
    return y * pk__quad_power(half) * pk__quad_power(n - half);
}

/* From u = e^(2 |x|) - 1 as u / (u + 2); beyond 20 it is 1. */
PK__QUAD pk__quad_tanh(pk__quad x, double b)
{
    (void)b;
    pk__quad size = pk__quad_magnitude(x);
    size = PK__CHOOSE(size > 20, pk__quad_of(20), size);
    const pk__quad n = pk__quad_round(size * (2 * 0x1.71547652b82fep0)), power = pk__quad_power(n);
    const pk__quad u = power * pk__quad_expm1_small(pk__quad_reduce(size + size, n)) + (power - 1);
    const pk__quad y = u / (u + 2);
    return (pk__quad)((pk__quad_bits)y | ((pk__quad_bits)x & INT64_MIN));
}

PK__QUAD pk__quad_sigmoid(pk__quad x, double b)
{
    (void)b;
    const pk__quad e = pk__quad_exp(-pk__quad_magnitude(x));
    return PK__CHOOSE(x < 0, e, pk__quad_of(1)) / (1 + e);
}

/* log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: Taylor's sum, whose rest is below 1e-17 s. */
PK__QUAD pk__quad_softplus(pk__quad x, double b)
{
    const pk__quad z = x * b, e = pk__quad_exp(-pk__quad_magnitude(z));
    const pk__quad s = e / (2 + e), t = s * s, f = t * t;
    const pk__quad even =
        2.0 / 3 +
        f * (2.0 / 7 +
             f * (2.0 / 11 +
                  f * (2.0 / 15 +
                       f * (2.0 / 19 + f * (2.0 / 23 + f * (2.0 / 27 + f * (2.0 / 31 + f * (2.0 / 35))))))));
    const pk__quad odd =
        2.0 / 5 + f * (2.0 / 9 + f * (2.0 / 13 +
                                      f * (2.0 / 17 +
                                           f * (2.0 / 21 + f * (2.0 / 25 + f * (2.0 / 29 + f * (2.0 / 33)))))));
    const pk__quad tail = (2 * s + s * t * (even + t * odd)) / b;
    return PK__CHOOSE(z > 0, x, tail - tail) + tail; /* NaN where z is */
}

PK__QUAD pk__quad_exponential(pk__quad x, double b)
{
    (void)b;
    return pk__quad_exp(x);
}

/* Correctly rounded, as everywhere; gcc leaves sqrt in loops alone, for the sake of errno. */
PK__QUAD pk__quad_root(pk__quad x, double b)
{
    (void)b;
#ifdef __clang__
#if __has_builtin(__builtin_elementwise_sqrt)
    return __builtin_elementwise_sqrt(x);
#else
    return __builtin_ia32_sqrtpd256(x);
#endif
#else
    return __builtin_ia32_sqrtpd256(x);
#endif
}

#define PK__DEFINE_FAST(name)                                                                  \
    PK__AVX2 static void pk__##name##_avx2(size_t count, double b, const double *x, double *y) \
    {                                                                                          \
        size_t i = 0;                                                                          \
        for (; i + 4 <= count; i += 4)                                                         \
            *(pk__quad *)(y + i) = pk__quad_##name(*(const pk__quad *)(x + i), b);             \
        if (i < count) {                                                                       \
            double last[4] = {0, 0, 0, 0};                                                     \
            memcpy(last, x + i, (count - i) * sizeof *last);                                   \
            *(pk__quad *)last = pk__quad_##name(*(const pk__quad *)last, b);                   \
            memcpy(y + i, last, (count - i) * sizeof *last);                                   \
        }                                                                                      \
    }
#define PK__RUN_FAST(name)                 \
    if (PK__HAS_AVX2) {                    \
        pk__##name##_avx2(count, b, x, y); \
        return;                            \
    }
#else
#define PK__DEFINE_FAST(name)
#define PK__RUN_FAST(name)
#endif

#define PK__ELEMENTARY(name, value)                                                     \
    PK__DEFINE_FAST(name)                                                               \
    PK__PRIVATE void pk__all_##name(size_t count, double b, const double *x, double *y) \
    {                                                                                   \
        (void)b;                                                                        \
        PK__RUN_FAST(name)                                                              \
        for (size_t i = 0; i < count; i++)                                              \
            y[i] = value;                                                               \
    }
PK__ELEMENTARY(exponential, exp(x[i]))
PK__ELEMENTARY(root, sqrt(x[i]))
PK__ELEMENTARY(tanh, tanh(x[i]))
PK__ELEMENTARY(sigmoid, pk__sigmoid(x[i]))
PK__ELEMENTARY(softplus, pk__softplus(x[i], b))
#undef PK__ELEMENTARY
#undef PK__DEFINE_FAST
#undef PK__RUN_FAST

/* The same for numbers of the network, which are computed in double. */
PK__PRIVATE void pk__elementary_reals(pk__elementary *function, size_t count, double b, const pk_real *x,
                                      pk_real *y)
{
    double part[64];
    if (sizeof(pk_real) == sizeof(double)) {
        function(count, b, (const double *)(const void *)x, (double *)(void *)y);
        return;
    }
    for (size_t first = 0; first < count; first += 64) {
        const size_t rest = pk__min(count - first, 64);
        for (size_t i = 0; i < rest; i++)
            part[i] = (double)x[first + i];
        function(rest, b, part, part);
        for (size_t i = 0; i < rest; i++)
            y[first + i] = (pk_real)part[i];
    }
}

/* <<< implementation */
#endif
