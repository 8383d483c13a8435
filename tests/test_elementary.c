/* exp, tanh and their relatives for many numbers: errors against long double over their whole range, special values,
 * and that a number's result depends on nothing else. */
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
#include "pathkernel/base/random.h"

enum { COUNT = 4096 };

static long double exact_exponential(long double x, long double b)
{
    (void)b;
    return expl(x);
}

static long double exact_root(long double x, long double b)
{
    (void)b;
    return sqrtl(x);
}

static long double exact_tanh(long double x, long double b)
{
    (void)b;
    return tanhl(x);
}

static long double exact_sigmoid(long double x, long double b)
{
    (void)b;
    return x < 0 ? expl(x) / (1 + expl(x)) : 1 / (1 + expl(-x));
}

static long double exact_softplus(long double x, long double b)
{
    return (b * x > 0 ? x : 0) + log1pl(expl(-fabsl(b * x))) / b;
}

static const struct {
    pk__elementary *function;
    long double (*exact)(long double x, long double b);
    double least, most, b, bound; /* bound: units in the last place */
    double at_nan, at_plus, at_minus;
} functions[] = {
    {pk__all_exponential, exact_exponential, -745, 709.5, 1, 1.1, NAN, INFINITY, 0},
    {pk__all_root, exact_root, 0, 1e300, 1, 0.501, NAN, INFINITY, NAN},
    {pk__all_tanh, exact_tanh, -30, 30, 1, 2.5, NAN, 1, -1},
    {pk__all_sigmoid, exact_sigmoid, -745, 700, 1, 2.3, NAN, 1, 0},
    {pk__all_softplus, exact_softplus, -700, 700, 1, 2.7, NAN, INFINITY, 0},
    {pk__all_softplus, exact_softplus, -350, 350, 2, 2.7, NAN, INFINITY, 0},
};
enum { FUNCTIONS = sizeof functions / sizeof *functions };

static double in_last_place(double y)
{
    int exponent;
    if (fabs(y) < DBL_MIN)
        return 0x1p-1074;
    (void)frexp(y, &exponent);
    return ldexp(1, exponent - 53);
}

/* Numbers of all sizes between the two, of either sign where that is between them. */
static void spread(double least, double most, uint64_t seed, double *x)
{
    pk_random random = {seed, 0, 0};
    for (size_t i = 0; i < COUNT; i++) {
        const double t = pk_random_uniform(&random), sign = pk_random_uniform(&random) < 0.5 ? -1 : 1;
        x[i] = i % 3 == 0   ? sign * exp(-700 + t * (log(most) + 700))
               : i % 3 == 1 ? least + (most - least) * t
                            : 4 * t - 2;
        x[i] = fmin(fmax(x[i], least), most);
    }
}

static void test_errors(void **state)
{
    (void)state;
    double *x = (double *)calloc(COUNT, sizeof(double)), *y = (double *)calloc(COUNT, sizeof(double));
    for (int f = 0; f < FUNCTIONS; f++)
        for (uint64_t seed = 0; seed < 40; seed++) {
            spread(functions[f].least, functions[f].most, seed, x);
            functions[f].function(COUNT, functions[f].b, x, y);
            for (size_t i = 0; i < COUNT; i++) {
                const long double exact = functions[f].exact(x[i], functions[f].b);
                const double error = (double)fabsl(y[i] - exact) / in_last_place((double)exact);
                if (!(error <= functions[f].bound))
                    fail_msg("function %d of %.17g is %.17g: %.2f units off", f, x[i], y[i], error);
            }
        }
    free(x);
    free(y);
}

static void test_special(void **state)
{
    (void)state;
    const double x[7] = {NAN, INFINITY, -INFINITY, 0, -0.0, 1e5, -1e5};
    double y[7];
    for (int f = 0; f < FUNCTIONS; f++) {
        functions[f].function(7, functions[f].b, x, y);
        const double wanted[3] = {functions[f].at_nan, functions[f].at_plus, functions[f].at_minus};
        for (int i = 0; i < 3; i++)
            assert_true(wanted[i] != wanted[i] ? y[i] != y[i] : y[i] == wanted[i]);
    }
    pk__all_tanh(7, 0, x, y);
    assert_true(y[3] == 0 && !signbit(y[3]) && y[4] == 0 && signbit(y[4]) && y[5] == 1 && y[6] == -1);
    pk__all_exponential(7, 0, x, y);
    assert_true(y[3] == 1 && y[4] == 1 && isinf(y[5]) && y[6] == 0);
    pk__all_softplus(7, 3, x, y);
    assert_true(y[5] == 1e5 && y[6] == 0);
    const double small[4] = {5e-324, -5e-324, 1e-310, -1e-310};
    pk__all_tanh(4, 0, small, y);
    assert_memory_equal(y, small, sizeof small);
}

/* The same bits wherever a number stands, and whatever stands beside it; also in place. */
static void test_places(void **state)
{
    (void)state;
    double *x = (double *)calloc(COUNT, sizeof(double)), *y = (double *)calloc(COUNT, sizeof(double)),
           *part = (double *)calloc(COUNT, sizeof(double));
    for (int f = 0; f < FUNCTIONS; f++) {
        spread(functions[f].least, functions[f].most, 99, x);
        functions[f].function(COUNT, functions[f].b, x, y);
        for (size_t first = 0; first < 40; first++)
            for (size_t count = 0; count < 12; count++) {
                functions[f].function(count, functions[f].b, x + first, part);
                assert_memory_equal(part, y + first, count * sizeof *part);
            }
        memcpy(part, x, COUNT * sizeof *part);
        functions[f].function(COUNT, functions[f].b, part, part);
        assert_memory_equal(part, y, COUNT * sizeof *part);
    }
    free(x);
    free(y);
    free(part);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_special),
        cmocka_unit_test(test_places),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
