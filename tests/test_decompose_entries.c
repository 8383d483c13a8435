/* Entries, decay, unattributed, sums by step and by layer against brute force (graph_oracle.h: one momentum vector an
 * example, carried forward in time) for the layers that dense networks do not have: norms, embeddings, attention and what
 * goes with them, under every optimizer that has a state. And that brute force itself, against the other one
 * (brute_force.h) and against the library's Jacobians. */
#include "random_runs.h"

typedef struct subject {
    const char *network;
    size_t vocabulary; /* 0: inputs are numbers */
} subject;

static const subject subjects[] = {
    {"input 5; dense 6; layer_norm; tanh; dense 3", 0},
    {"input 5; dense 6; layer_norm noaffine; relu; dense 3", 0},
    {"input 5; dense 6; layer_norm epsilon=0.1; gelu; dense 4; rms_norm; dense 3", 0},
    {"input 5; dense 6; rms_norm; silu; dense 3", 0},
    {"input 5; dense 6; rms_norm noaffine epsilon=1e-3; hard_tanh; dense 3", 0},
    {"input 5; dense 6; batch_norm stat6; relu; dense 3", 0},
    {"input 5; dense 6; batch_norm stat6 noaffine epsilon=0.1; sigmoid; dense 3", 0},
    {"input 5; normalize; dense 4; rms_normalize epsilon=1e-2; affine nobias; dense 3", 0},
    {"input 5; dense 6; elu; dense 4; mish; dense 3", 0},
    {"input 5; dense 6; selu; dense 4; elu 0.3; dense 3", 0},
    {"input 5; dense 6; relu6; dense 4; hard_sigmoid; dense 3", 0},
    {"input 5; dense 5; softsign; dense 4; hardswish; dense 3", 0},
    {"input 5; dense 6; gelu tanh; dense 4; log_sigmoid; dense 4; softmin; dense 3", 0},
    {"input 5; dense 6; prelu; dense 4; prelu 4; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; prelu 3; affine scalar; affine scalar nobias factor=0.5; flatten; dense 3", 0},
    {"input 2x6; conv 4 3; relu; max_pool 2; flatten; dense 3", 0},
    {"input 2x7; conv 4 3 stride=2 pad=1 groups=2; tanh; conv 3 2 dilation=2; global_avg_pool; dense 3", 0},
    {"input 2x5; conv_transpose 3 3 stride=2 output_pad=1; relu; avg_pool 3 ceil_mode; flatten; dense 3", 0},
    {"input 2x2x3; conv_transpose 4 3x2 stride=2x1 pad=1x0 groups=2; gelu; global_avg_pool; dense 3", 0},
    {"input 2x2x3; conv 2 1; conv_transpose 2 2 nobias dilation=2 pad=1; relu; flatten; dense 3", 0},
    {"input 2x3x3; conv 2 2; upsample 2; relu; upsample 2 bilinear; avg_pool 3; flatten; dense 3", 0},
    {"input 2x3; conv 2 2; upsample 3 linear align_corners; tanh; adaptive_avg_pool 4; flatten; dense 3", 0},
    {"input 2x3x3; conv 2 2 pad=1; tanh; adaptive_max_pool 3x2; flatten; dense 3", 0},
    {"input 1x4x5; conv 2 2 pad=1; max_pool 3 stride=2 ceil_mode; flatten; dense 3", 0},
    {"input 1x4x5; conv 2 2 pad=1; avg_pool 2 pad=1 ceil_mode count_include_pad=0; flatten; dense 3", 0},
    {"input 2x3x3; conv 4 2x2; group_norm 2; relu; flatten; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; instance_norm; tanh; group_norm 1 noaffine epsilon=1e-3; flatten; dense 3", 0},
    {"input 5; dense 6; group_norm 3 epsilon=0.1; relu; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; layer_norm dims=3; relu; flatten; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; layer_norm dims=2 noaffine; erf; flatten; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; batch_norm stat3; softplus; global_avg_pool; dense 3", 0},
    {"input 2x3x3; conv 3 2x2; affine dims=0; leaky_relu; max_pool 2; flatten; dense 3", 0},
    {"input 3x4; dense 4; rms_norm dims=2; tanh; mean_tokens; dense 3", 0},
    {"input 5; dense 4; softmax; dense 3; log_softmax", 0},
    {"input 1; embedding 5 3; token 0; dense 3", 5},
    {"input 4; embedding 5 3; flatten; dense 3", 5},
    {"input 4; embedding 5 3; tanh; mean_tokens; dense 3", 5},
    {"input 3; embedding 6 4; position; relu; token -1; dense 3", 6},
    {"input 3; embedding 6 4; position; layer_norm; flatten; dense 4; silu; dense 3", 6},
    {"input 1; constant table4_3; dense 4; propagate edges4; abs; dense 3; select; dense 3", 4},
    {"input 4x3; propagate edges4; dense 4; sine; position; rms_norm; mean_tokens; dense 3", 0},
    {"input 3x4; attention 1; mean_tokens; dense 3", 0},
    {"input 3x4; attention 2 causal; flatten; dense 3", 0},
    {"input 3x4; attention 4 nobias; relu; token 1; dense 3", 0},
    {"input 3x4; attention 2 shared; mean_tokens; dense 3", 0},
    {"input 3x4; attention 2 causal shared nobias; token -1; dense 3", 0},
    {"input 3x3; dense 12; attend 2 causal; dense 3; flatten; dense 3", 0},
    {"input 3x3; dense 4; attend 2 shared; tanh; mean_tokens; dense 3", 0},
    {"input 3; embedding 5 4; position; residual( layer_norm; attention 2 causal ); residual( layer_norm; "
     "dense 5; "
     "gelu; dense 4 ); layer_norm; token -1; dense 3",
     5},
    {"input 3; embedding 5 4; residual( rms_norm; attention 1 nobias ); residual( rms_norm; dense 5; relu; "
     "dense 4 "
     "init=zero ); mean_tokens; dense 3",
     5},
    {"input 4; dense 5; exp; power -0.5; dense 4; tanh; power 2; as x; parameter 4; as y; multiply "
     "y; add x; "
     "exp; log; dense 3",
     0},
    {"input 2x3x3; conv 2 2; relu; upsample 2 bilinear; max_pool 2 stride=2; flatten; dense 3", 0},
    {"input 1x2x3; conv 2 1; upsample 3x2 bilinear align_corners; max_pool 3 stride=1; flatten; dense 3", 0},
    {"input 2x4; conv 2 2; upsample 3 linear; max_pool 2; dense 4; relu; adaptive_max_pool 2; flatten; dense 3",
     0},
    {"input 5; dense 6; gather places3_4_6; relu; max 1; dense 4; gather places2_2_4; min 0; dense 3", 0},
    {"input 4x3; dense 4; as x; max 0; as top; from x; min 1; concat 0 top; dense 3", 0},
    {"input 5; as x; above 0.2; as mask; from x; dense 5; relu; multiply mask; dense 4; exp; as e; sum 0; as "
     "s; "
     "from e; divide s; dense 3",
     0},
    {"input 4; embedding 7 2 padding=3 first=1; flatten; as x; from input; embedding 6 3 count=2 offset=2; "
     "flatten; as y; from x; "
     "concat 0 y; relu; dense 3",
     4},
    NETWORKS_OF_VALUES("relu"),
};
static const char *const optimizers[] = {
    "sgd weight_decay=0.02",
    "sgd momentum=0.9 weight_decay=0.01",
    "sgd momentum=0.8 dampening=0.3",
    "sgd momentum=0.9 nesterov=1 weight_decay=0.02",
    "adam weight_decay=0.05",
    "adam beta1=0.6 beta2=0.95",
    "adamw beta1=0.7 weight_decay=0.1",
};

static void test_entries(void **state)
{
    double worst = 0, worst_others = 0, worst_oracle = 0;
    (void)state;
    for (size_t n = 0; n < sizeof subjects / sizeof *subjects; n++)
        for (size_t o = 0; o < sizeof optimizers / sizeof *optimizers; o++) {
            rr_recipe recipe = rr_plain(subjects[n].network, optimizers[o], PK_SOFTMAX_CROSS_ENTROPY,
                                        subjects[n].vocabulary, 100 * n + o);
            rr_run r;
            go_result truth;
            rr_verdict v;
            if (strstr(recipe.network, "log_softmax"))
                recipe.loss = PK_NLL;
            rr_build(&recipe, &r);
            go_decompose(&r.run, r.rows, r.inputs, &truth);
            rr_compare(&r, &truth, 0, 0, &v);
            if (v.status || truth.missed || !(v.error <= ROUNDING(1e-11)) || !(v.others <= ROUNDING(1e-11)) ||
                !(v.closure <= ROUNDING(1e-11)))
                fail_msg(
                    "%s, %s: entries are off by %.3g of the largest, other terms by %.3g, closure %.3g; %s",
                    recipe.network, recipe.optimizer, v.error, v.others, v.closure, pk_status_text(v.status));
            worst = fmax(worst, v.error), worst_others = fmax(worst_others, v.others);
            worst_oracle = fmax(worst_oracle, v.accuracy);
            free(v.looseness);
            go_result_free(&truth);
            rr_free(&r);
        }
    print_message("worst entry %.2g of the largest, other terms %.2g; the oracle is good to %.2g\n", worst,
                  worst_others, worst_oracle);
}

/* Dense networks: two oracles that share losses and optimizers, but neither networks nor quadrature. */
static void test_oracles_agree(void **state)
{
    static const char *const networks[] = {"input 4; dense 6; tanh; dense 5; sigmoid; dense 3",
                                           "input 4; dense 6; relu; dense 5 nobias; leaky_relu 0.2; dense 3",
                                           "input 4; dense 6; gelu; dense 5; hard_tanh; dense 4; abs; dense 3"};
    static const char *const rules[] = {"sgd", "sgd momentum=0.9 weight_decay=0.01", "adam", "adamw"};
    (void)state;
    for (size_t n = 0; n < 3; n++)
        for (size_t o = 0; o < 4; o++) {
            pk_context context;
            pk_run run;
            bf_run made;
            bf_result other;
            go_result truth;
            memset(&context, 0, sizeof context);
            const bf_recipe recipe = fixture_recipe(n + 1, 6, 4, 3, o > 1 ? 0.02 : 0.3);
            fixture_make(networks[n], BF_SOFTMAX_CROSS_ENTROPY, rules[o], &recipe, &made);
            fixture_open(&context, &made, &run);
            pk_real *inputs = fixture_normals(5, 2 * 4, 1);
            bf_decompose(&made, 2, inputs, &other);
            go_decompose(&run, 2, inputs, &truth);
            const size_t cells = 2 * 3, counts[5] = {cells * 6, cells * 4, cells, cells, cells};
            const bf_real *const pairs[5][2] = {{other.by_example, truth.by_example},
                                                {other.by_step, truth.by_step},
                                                {other.decay, truth.decay},
                                                {other.unattributed, truth.unattributed},
                                                {other.final_output, truth.final_output}};
            const double largest = fixture_largest_real(counts[0], other.by_example);
            for (int k = 0; k < 5; k++)
                for (size_t i = 0; i < counts[k]; i++)
                    assert_close(pairs[k][0][i], pairs[k][1][i], 1e-14 * fmax(largest, 1));
            assert_true(fixture_largest_real(counts[0], truth.accuracy) <= 1e-14 * largest);
            bf_result_free(&other);
            go_result_free(&truth);
            pk_run_release(&context, &run);
            bf_run_free(&made);
            free(inputs);
        }
}

/* Networks of all kinds: the oracle's values and derivatives are the library's, and its sums close by themselves. */
static void test_oracle_is_sound(void **state)
{
    (void)state;
    int unsettled = 0;
    for (uint64_t number = 1; number <= 140; number++) {
        const uint64_t seed = number <= 60 ? number : RR_MORE + number;
        rr_recipe recipe;
        rr_run r;
        go_result truth;
        go_tape tape;
        rr_choose(seed, RR_ANY, &recipe);
        recipe.pace = fmin(recipe.pace, 0.3);
        recipe.scale = recipe.spread = 1;
        rr_build(&recipe, &r);
        const size_t P = r.run.parameters, C = r.run.outputs, D = r.run.graph.input_width;
        pk_real *weights = BF_NEW(pk_real, P), *jacobian = BF_NEW(pk_real, r.rows * C * P);
        bf_real *seeds = BF_NEW(bf_real, C), *row = BF_NEW(bf_real, P);
        assert_ok(&r.context, pk_run_weights(&r.context, &r.run, r.run.steps, weights));
        const pk_matrix none = {NULL, 0, 0, 0};
        assert_ok(&r.context,
                  pk_jacobian(&r.context, &r.run.graph, weights, pk_matrix_view(r.inputs, r.rows, D),
                              pk_matrix_view(jacobian, r.rows * C, P), none));
        const double size = fmax(1, (double)fixture_largest(r.rows * C * P, jacobian));
        go_tape_make(&r.run.graph, &tape);
        for (size_t p = 0; p < P; p++)
            tape.weights[p] = (bf_real)weights[p];
        for (size_t k = 0; k < r.rows * C; k++) {
            go_forward(&tape, r.inputs + k / C * D);
            memset(row, 0, P * sizeof *row);
            seeds[k % C] = 1;
            go_reverse(&tape, seeds, 1, row);
            seeds[k % C] = 0;
            for (size_t p = 0; p < P; p++)
                if (!(fabs((double)(row[p] - (bf_real)jacobian[k * P + p])) <= ROUNDING(1e-12) * size))
                    fail_msg("seed %d, %s: derivative %zu of output %zu is %.17g, the library's %.17g",
                             (int)seed, r.network, p, k, (double)row[p], (double)jacobian[k * P + p]);
        }
        go_decompose(&r.run, r.rows, r.inputs, &truth);
        if (truth.missed) { /* a norm of numbers that are equal, whose rounding an abs or a maximum sees */
            print_message("seed %d: brute force does not settle: %s\n", (int)seed, r.network);
            unsettled++;
        }
        for (size_t cell = 0; cell < r.rows * C && !truth.missed; cell++) {
            double allowed = 0, entries = 0;
            for (size_t i = 0; i < truth.examples; i++) {
                allowed += (double)truth.accuracy[cell * truth.examples + i];
                entries += fabs((double)truth.by_example[cell * truth.examples + i]);
            }
            allowed += 1e-16 *
                       (entries + fabs((double)truth.final_output[cell]) + fabs((double)truth.decay[cell]) + 1);
            if (!(fabs((double)truth.closure[cell]) <= 10 * allowed))
                fail_msg("seed %d, %s: the oracle's closure is %.3g", (int)seed, r.network,
                         (double)truth.closure[cell]);
        }
        go_tape_free(&tape);
        go_result_free(&truth);
        free(weights), free(jacobian), free(seeds), free(row);
        rr_free(&r);
    }
    assert_true(unsettled <= 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_oracles_agree),
                                       cmocka_unit_test(test_oracle_is_sound), cmocka_unit_test(test_entries)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
