/* Random numbers: the published vectors of Philox, a checked-in sequence, and the distributions. All seeds
 * are fixed, so that every statistic is one number: the bounds only say that it is a likely one. */
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
#define UNDER_TEST "pathkernel/base/random.h"
#include "pathkernel_under_test.h"

/* Random123, tests/kat_vectors, "philox4x32 10": counter, key, output. */
static void test_known_answers(void **state)
{
    static const uint32_t vectors[3][10] = {{0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                            {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff,
                                             0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                            {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822,
                                             0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
    (void)state;
    for (int i = 0; i < 3; i++) {
        uint32_t block[4];
        memcpy(block, vectors[i], sizeof block);
        pk__philox(vectors[i] + 4, block);
        assert_memory_equal(block, vectors[i] + 6, sizeof block);
        pk_random random = {(uint64_t)vectors[i][5] << 32 | vectors[i][4],
                            (uint64_t)vectors[i][3] << 32 | vectors[i][2],
                            (uint64_t)vectors[i][1] << 32 | vectors[i][0]};
        uint64_t counter = random.counter;
        assert_true(pk_random_bits(&random) == ((uint64_t)vectors[i][7] << 32 | vectors[i][6]));
        assert_true(random.counter == counter + 1);
    }
}

/* The numbers of recorded runs: they must never change. From an independent program in Python. */
static void test_sequence(void **state)
{
    static const uint64_t bits[4] = {0x9ac337106c27f2ff, 0xd5e23e1588aef304, 0xe55410cc67ee6f2c,
                                     0x600f6196e5dde940};
    static const double normals[3] = {-0.07194076360401848, 1.7423762666432816, -0.737087527346444};
    static const int64_t shuffled[10] = {7, 0, 5, 1, 2, 3, 8, 6, 9, 4};
    pk_random random = {42, 7, UINT64_MAX - 1}, normal = {1, 2, 3}, shuffle = {42, 7, 0};
    int64_t items[10];
    (void)state;
    for (int i = 0; i < 4; i++) /* past the counter's end, which wraps */
        assert_true(pk_random_bits(&random) == bits[i]);
    assert_true(random.counter == 2);
    for (int i = 0; i < 3; i++)
        assert_true(fabs(pk_random_normal(&normal) - normals[i]) < 1e-15);
    assert_true(pk_random_uniform(&normal) == 0.5694199699324595);
    for (int i = 0; i < 10; i++)
        items[i] = i;
    pk_random_shuffle(&shuffle, 10, items);
    assert_memory_equal(items, shuffled, sizeof items);
    assert_true(shuffle.counter == 9);
}

/* Moments and a chi-square of 64 bins; also neighbours within, and numbers across, streams and seeds. */
static void test_uniform(void **state)
{
    enum { COUNT = 200000, BINS = 64 };
    static size_t bins[BINS];
    double sum = 0, square = 0, lag = 0, streams = 0, seeds = 0, last = 0.5, chi = 0;
    pk_random random = {1, 0, 0}, other_stream = {1, 1, 0}, other_seed = {2, 0, 0};
    (void)state;
    memset(bins, 0, sizeof bins);
    for (int i = 0; i < COUNT; i++) {
        double x = pk_random_uniform(&random);
        assert_true(x >= 0 && x < 1);
        bins[(size_t)(x * BINS)]++;
        sum += x - 0.5;
        square += (x - 0.5) * (x - 0.5);
        lag += (x - 0.5) * (last - 0.5);
        streams += (x - 0.5) * (pk_random_uniform(&other_stream) - 0.5);
        seeds += (x - 0.5) * (pk_random_uniform(&other_seed) - 0.5);
        last = x;
    }
    for (int i = 0; i < BINS; i++) {
        double expected = (double)COUNT / BINS;
        chi += ((double)bins[i] - expected) * ((double)bins[i] - expected) / expected;
    }
    double root = sqrt((double)COUNT);
    assert_true(fabs(sum) < 4 * root * sqrt(1 / 12.0));
    assert_true(fabs(square / COUNT - 1 / 12.0) < 4 * sqrt(1 / 180.0) / root);
    assert_true(fabs(lag) < 4 * root / 12 && fabs(streams) < 4 * root / 12 && fabs(seeds) < 4 * root / 12);
    assert_true(chi > 30 && chi < 110); /* 63 degrees of freedom */
}

static void test_normal(void **state)
{
    enum { COUNT = 200000 };
    double moments[5] = {0};
    size_t beyond = 0;
    pk_random random = {3, 0, 0};
    (void)state;
    for (int i = 0; i < COUNT; i++) {
        double x = pk_random_normal(&random), power = 1;
        assert_true(fabs(x) < 8.6);
        beyond += fabs(x) > 1.959963984540054;
        for (int k = 0; k < 5; k++, power *= x)
            moments[k] += power / COUNT;
    }
    double unit = 1 / sqrt((double)COUNT);
    assert_true(random.counter == COUNT);
    assert_true(fabs(moments[1]) < 4 * unit);
    assert_true(fabs(moments[2] - 1) < 4 * sqrt(2.0) * unit);
    assert_true(fabs(moments[3]) < 4 * sqrt(15.0) * unit);
    assert_true(fabs(moments[4] - 3) < 4 * sqrt(96.0) * unit);
    assert_true(fabs((double)beyond / COUNT - 0.05) < 4 * sqrt(0.05 * 0.95) * unit);
}

static void test_below(void **state)
{
    enum { COUNT = 60000 };
    pk_random random = {4, 0, 0};
    uint64_t huge = (uint64_t)3 << 62, thirds[3] = {0, 0, 0};
    size_t counts[7] = {0};
    (void)state;
    assert_true(pk_random_below(&random, 0) == 0 && pk_random_below(&random, 1) == 0);
    for (int i = 0; i < COUNT; i++) {
        uint64_t x = pk_random_below(&random, huge);
        assert_true(x < huge);
        thirds[x >> 62]++;
        x = pk_random_below(&random, 7);
        assert_true(x < 7);
        counts[x]++;
        assert_true(pk_random_below(&random, ((uint64_t)1 << 63) + 1) <= (uint64_t)1 << 63);
        assert_true(pk_random_below(&random, UINT64_MAX) < UINT64_MAX);
    }
    /* A remainder without rejection would give the first third half of all. */
    for (int i = 0; i < 3; i++)
        assert_true(fabs((double)thirds[i] / COUNT - 1.0 / 3) < 4 * sqrt(2.0 / 9 / COUNT));
    for (int i = 0; i < 7; i++)
        assert_true(fabs((double)counts[i] / COUNT - 1.0 / 7) < 4 * sqrt(6.0 / 49 / COUNT));
}

static void test_shuffle(void **state)
{
    enum { COUNT = 48000 };
    size_t orders[256] = {0};
    pk_random random = {5, 0, 0};
    (void)state;
    pk_random_shuffle(&random, 0, NULL);
    int64_t one = 17;
    pk_random_shuffle(&random, 1, &one);
    assert_true(one == 17 && random.counter == 0);
    for (int i = 0; i < COUNT; i++) {
        int64_t items[4] = {0, 1, 2, 3};
        pk_random_shuffle(&random, 4, items);
        assert_int_equal(1 << items[0] | 1 << items[1] | 1 << items[2] | 1 << items[3], 15);
        orders[items[0] << 6 | items[1] << 4 | items[2] << 2 | items[3]]++;
    }
    size_t seen = 0;
    for (int i = 0; i < 256; i++) {
        if (!orders[i])
            continue;
        seen++;
        assert_true(fabs((double)orders[i] / COUNT - 1.0 / 24) < 4 * sqrt(23.0 / 576 / COUNT));
    }
    assert_int_equal(seen, 24);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_answers), cmocka_unit_test(test_sequence),
                                       cmocka_unit_test(test_uniform),       cmocka_unit_test(test_normal),
                                       cmocka_unit_test(test_below),         cmocka_unit_test(test_shuffle)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
