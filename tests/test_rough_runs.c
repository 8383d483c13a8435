/* Random runs (random_runs.h) that once went wrong: steps so rough that pieces ran out or met rounding, pieces that were
 * accepted although they had missed their target and were not in the bounds, bounds that said nothing where a
 * pre-activation has a double zero. Found by bounds_campaign, which runs any number of others. */
#include "random_runs.h"

/* The entries' bounds hold at every tolerance; at 1e-10 the run closes with no more nodes than brute force takes, entries are
 * off by at most `error` of the largest, and no bound is more than `loosest` of it. */
static void check(uint64_t seed, double error, double loosest)
{
    static const double tolerances[] = {1e-2, 1e-5, 1e-7, 1e-10};
    rr_run r;
    go_result truth;
    rr_verdict v;
    rr_make(seed, RR_ANY, &r);
    go_decompose(&r.run, r.rows, r.inputs, &truth);
    if (truth.missed) /* the weights are those that this build trains */
        print_message("seed %d: left out, brute force does not settle on what this build has trained\n",
                      (int)seed);
    for (int t = 0; t < 4 && !truth.missed; t++) {
        rr_compare(&r, &truth, tolerances[t], 1, &v);
        free(v.looseness);
        print_message(
            "seed %d, %.0e: error %.1e of the largest entry, worst %.2g of its bound, closure %.2g of the sum "
            "of bounds, largest bound %.1e, %zu nodes (brute force %zu)%s\n",
            (int)seed, tolerances[t], v.error, v.excess, v.open_factor, v.loosest, v.points, truth.evaluations,
            v.status ? ", NOT CLOSED" : "");
        assert_int_equal(v.above, 0);
        assert_int_equal(v.wide_open, 0);
        if (tolerances[t] > 1e-10)
            continue;
        assert_int_equal(v.status, PK_OK);
        assert_true(v.error <= error);
        assert_true(v.points <= truth.evaluations);
        assert_true(v.loosest <= loosest);
    }
    go_result_free(&truth);
    rr_free(&r);
}

#define ROUGH(seed, error, loosest)            \
    static void test_seed_##seed(void **state) \
    {                                          \
        (void)state;                           \
        check(seed, error, loosest);           \
    }
/* Attention, large steps: weights of tokens change within 1e-10 of a step, which rounding of the scores moves. Entries were
 * off by 2e-3, above their bounds. */
ROUGH(735, 1e-4, 1e-2)
/* The same behind an rms_norm, outputs of 1e9. */
ROUGH(386, 1e-10, 1e-7)
/* rms_norm and sine: closed with 86,000 nodes. */
ROUGH(1382, 1e-10, 1e-7)
/* Attention behind a layer norm: rounding along the step is 1e-12 of the outputs, in 500 pieces. */
ROUGH(1743, 2e-9, 1e-5)
/* An rms_norm of a blank row, whose gradient is singular where it starts: bounds cannot know that it is at right angles to
 * all contributions. */
ROUGH(1754, 1e-10, 1)
/* Branches that start at zero, outputs of 1e-10. */
ROUGH(1024, 1e-10, 1e-7)

int main(void)
{
#ifdef PATHKERNEL_FLOAT
    print_message("nothing to do: these runs and their tolerances are for double\n");
    return 0;
#endif
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_seed_735),  cmocka_unit_test(test_seed_386),
                                       cmocka_unit_test(test_seed_1382), cmocka_unit_test(test_seed_1743),
                                       cmocka_unit_test(test_seed_1754), cmocka_unit_test(test_seed_1024)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
