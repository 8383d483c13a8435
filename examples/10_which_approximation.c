/* 10: which approximation can I trust?
 *
 * The change of an output over a run of plain SGD is, exactly,
 *
 *     f(w_S, x) - f(w_0, x) = sum_i A(x, i),
 *     A(x, i) = - sum_s eta_s c_{s,i} integral_0^1 < J(w_s + t D_s, x), J(w_s, x_i)' dl/df_i(w_s) > dt,
 *
 * J = df/dw, D_s = w_{s+1} - w_s, and c_{s,i} the weight of example i in the batch of step s. Most methods of the literature take the
 * three derivatives elsewhere, which is cheaper or seemed more natural: all at w_s (TracIn of every step), all along the step (the
 * literal path integral), at a few checkpoints only, at the first or at the last weights (the linearised network). Each leaves a
 * residual,
 *
 *     |f(w_S, x) - f(w_0, x) - sum_i A'(x, i)|,
 *
 * and may order the training examples otherwise. How much depends on the run: on the size of its steps, and on whether its network
 * has kinks. pk_compare measures both on a run and inputs of one's own, by the same code as the exact decomposition.
 *
 * Here: digits, a smooth network (tanh) and one with kinks (relu) in the same full-batch steps; then tanh in steps of half the size,
 * twice as many: the residual of a rule of order 1 halves, that of the midpoint falls to a quarter. What to see: to integrate
 * everything along the step is no better than to take everything at its start, since what was trained did not follow that
 * integral; the midpoint costs as much as the start and is far better; a rule may order the examples well and leave a residual
 * that is not small; the linearised network does neither.
 *
 *     cc -O3 -fopenmp -I. examples/10_which_approximation.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { TRAIN = 300, FIRST_TEST = 1500, TEST = 16, INPUTS = 64, STEPS = 60, RUNS = 3 };
enum {
    LEFT,
    SEGMENT,
    PATH_INTEGRAL,
    TRAPEZOID,
    MIDPOINT,
    CHECKPOINTS,
    LINEAR_START,
    LINEAR_END,
    TELESCOPING,
    EXACT
};

static const struct {
    const char *name, *network;
    double rate;
    size_t steps;
} runs[RUNS] = {{"tanh", "input 64; dense 12; tanh; dense 10", 0.5, STEPS},
                {"relu", "input 64; dense 12; relu; dense 10", 0.5, STEPS},
                {"tanh, half the steps' size", "input 64; dense 12; tanh; dense 10", 0.25, 2 * STEPS}};

static int train_and_compare(pk_context *context, int which, const char *folder, const pk_dataset *learned,
                             pk_matrix test, pk_comparison *rules)
{
    pk_train_options options;
    pk_graph graph;
    pk_run run;
    memset(&options, 0, sizeof options);
    memset(&graph, 0, sizeof graph);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = runs[which].rate;
    options.steps = runs[which].steps;
    options.record = folder;
    options.replace = 1;
    TRY(pk_network_parse(context, runs[which].network, &graph));
    pk_real *weights = calloc(graph.parameters, sizeof *weights);
    if (!weights)
        return fprintf(stderr, "no memory\n"), 1;
    TRY(pk_network_initialize(context, &graph, 1, weights));
    TRY(pk_train(context, &graph, learned, &options, weights, NULL));
    TRY(pk_run_open(context, folder, &run));
    TRY(pk_compare(context, &run, test, rules));
    pk_run_release(context, &run);
    pk_graph_release(context, &graph);
    free(weights);
    return 0;
}

static void print(int which, const pk_comparison *rules, FILE *file)
{
    printf("%s: %zu steps of rate %g\n    %-14s %12s %14s %10s %10s\n", runs[which].name, runs[which].steps,
           runs[which].rate, "rule", "residual", "median", "ranks", "seconds");
    for (int rule = 0; rule < PK_COMPARE_RULES; rule++) {
        const pk_comparison *r = &rules[rule];
        char ranks[20] = "";
        if (!isnan(r->spearman))
            snprintf(ranks, sizeof ranks, "%.4f", r->spearman);
        printf("    %-14s %12.2e %14.2e %10s %10.3f\n", r->rule, r->residual_max, r->residual_median, ranks,
               r->seconds);
        fprintf(file, "%s %.17g %.17g %.17g %.6g\n", r->rule, r->residual_max, r->residual_median, r->spearman,
                r->seconds);
    }
    fprintf(file, "\n\n");
}

/* Checks what holds for any data. */
static int check(pk_comparison rules[RUNS][PK_COMPARE_RULES])
{
    const double rounding = sizeof(pk_real) == sizeof(double) ? 1e-12 : 1e-3;
    int failed = 0;
    for (int k = 0; k < RUNS; k++) {
        failed |= !(rules[k][EXACT].residual_max < rounding && rules[k][EXACT].spearman == 1);
        failed |= !(fabs(rules[k][LEFT].residual_max - rules[k][TELESCOPING].residual_max) < rounding);
        failed |= !(rules[k][MIDPOINT].residual_max < rules[k][LEFT].residual_max / 4);
        failed |= !(rules[k][LINEAR_START].residual_max > rules[k][LEFT].residual_max);
    }
    const double first = rules[0][LEFT].residual_max / rules[2][LEFT].residual_max;
    const double second = rules[0][MIDPOINT].residual_max / rules[2][MIDPOINT].residual_max;
    printf("Half the size: the residual of left falls to 1/%.2f, that of midpoint to 1/%.2f.\n", first, second);
    failed |= !(first > 1.5 && first < 2.7 && second > 3 && second < 5.5);
    return failed ? fprintf(stderr, "the rules are not what they should be\n"), 1 : 0;
}

static int work(pk_context *context, const char *output, const char *data)
{
    static pk_dataset digits, learned;
    static pk_real x[TEST * INPUTS];
    static pk_comparison rules[RUNS][PK_COMPARE_RULES];
    char folder[TUTORIAL_PATH], run[TUTORIAL_PATH + 10];
    int64_t items[TEST];
    if (tutorial_digits(context, data, __FILE__, &digits) ||
        tutorial_folder(output, "10_which_approximation", folder))
        return 1;
    for (int i = 0; i < TEST; i++)
        items[i] = FIRST_TEST + i;
    pk_dataset_inputs(&digits, items, TEST, x);
    TRY(pk_dataset_rows(context, &digits, 0, TRAIN, &learned));
    snprintf(run, sizeof run, "%s/run", folder);
    FILE *file = tutorial_create(folder, "rules.dat");
    if (!file)
        return 1;
    for (int k = 0; k < RUNS; k++) {
        if (train_and_compare(context, k, run, &learned, pk_matrix_view(x, TEST, INPUTS), rules[k]))
            return 1;
        print(k, rules[k], file);
    }
    if (fclose(file))
        return perror("rules.dat"), 1;
    pk_dataset_release(context, &digits);
    if (check(rules))
        return 1;
    if (tutorial_plot(__FILE__, "10_which_approximation.gp", folder, ""))
        return 1;
    printf("Numbers in %s/rules.dat; picture, where gnuplot is there: %s/rules.png\n", folder, folder);
    return 0;
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means the default */
    return work(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
