/* 03: how many nodes an integral along a step needs, and why the kinks of ReLU must be found.
 *
 * A contribution is an inner product with Phi_s(x) = integral_0^1 grad f(w_s + t D_s, x) dt. Software that
 * decomposes training runs replaces the integral by a rule with n nodes a step:
 *
 *     left       the gradient at w_s alone, or at the left ends of n parts (TracIn):   error O(1/n)
 *     midpoint   at the middles of n parts                                            O(1/n^2)
 *     trapezoid  at the ends of n - 1 parts                                           O(1/n^2)
 *     Gauss      at the roots of the Legendre polynomial of degree n                  faster than any power
 *     auto       here: Gauss with as many nodes as the measured closure asks for      rounding
 *
 * These orders hold for smooth networks. With ReLU the gradient jumps where a unit's input changes its
 * sign; every rule with fixed nodes then falls back to O(1/n), Gauss too. Between two jumps, however, the
 * gradient is a polynomial in t of a degree below the number of layers L. The exact rule finds the jumps and
 * needs ceil(L/2) Gauss nodes in each piece.
 *
 * Two errors are measured, both at their worst over test digits and training digits:
 *     closure  |final - initial - sum of contributions| / the largest output or contribution of the row: errors of
 *              entries can cancel in it
 *     entry    |A(x, i) - reference| / max |reference|, single contributions against those by Gauss with
 *              32 nodes (tanh) or the exact rule (ReLU)
 *
 *     cc -O3 -fopenmp -I. examples/03_quadrature.c -o quadrature -lm
 *     ./quadrature [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { TRAIN = 200, TEST = 16, FIRST_TEST = 1437, STEPS = 40, MOST_NODES = 256 };

static const char *const rule_names[] = {"left", "midpoint", "trapezoid", "Gauss"};
static const pk_rule rules[] = {PK_RULE_LEFT, PK_RULE_MIDPOINT, PK_RULE_TRAPEZOID, PK_RULE_GAUSS};

/* A run of an activation, and the contributions that the others are compared with. */
typedef struct subject {
    pk_run run;
    pk_matrix inputs;
    int64_t labels[TEST];
    double *reference; /* TEST x TRAIN */
    double largest;
} subject;

typedef struct errors {
    double nodes, closure, entry;
} errors;

/* Decomposes by a rule; errors against the reference, or, where there is none yet, makes it. */
static int measure(pk_context *context, subject *s, pk_rule rule, int nodes, errors *e)
{
    static pk_decompose_options options;
    pk_decomposition d;
    options.readout.kind = PK_READOUT_LABEL; /* the output of each test digit's class: one number a digit */
    options.readout.labels = s->labels;
    options.quadrature.rule = rule;
    options.quadrature.nodes = nodes;
    pk_status status = pk_decompose(context, &s->run, s->inputs, &options, &d);
    if (status != PK_NOT_CLOSED) /* computed all the same, and what we are here to see */
        TRY(status);
    int first = !s->reference;
    if (first)
        s->reference = (double *)calloc(TEST * TRAIN, sizeof *s->reference);
    if (!s->reference)
        return perror("reference"), 1;
    e->nodes = (double)d.points / (TEST * STEPS);
    e->closure = d.worst_closure;
    e->entry = 0;
    for (size_t i = 0; i < TEST * TRAIN; i++) {
        s->reference[i] = first ? d.by_example[i] : s->reference[i];
        s->largest = fmax(s->largest, fabs(s->reference[i]));
        e->entry = fmax(e->entry, fabs(d.by_example[i] - s->reference[i]));
    }
    e->entry /= s->largest;
    pk_decomposition_release(context, &d);
    return 0;
}

static int record(pk_context *context, const pk_dataset *train, const char *network, const char *folder)
{
    pk_graph graph;
    pk_train_options options;
    memset(&graph, 0, sizeof graph);
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.5;
    options.steps = STEPS;
    options.record = folder;
    options.replace = 1;
    TRY(pk_network_parse(context, network, &graph));
    pk_real *weights = (pk_real *)malloc(graph.parameters * sizeof *weights);
    pk_status status = weights ? pk_network_initialize(context, &graph, 1, weights) : PK_MEMORY;
    if (status == PK_OK)
        status = pk_train(context, &graph, train, &options, weights, NULL);
    free(weights);
    pk_graph_release(context, &graph);
    TRY(status);
    return 0;
}

static int fail(const char *activation, const char *what, double value)
{
    fprintf(stderr, "%s: %s is %g\n", activation, what, value);
    return 1;
}

/* The table of one activation, on the terminal and as columns n, closure, entry of one block a rule. */
static int tabulate(pk_context *context, subject *s, const char *activation, FILE *data)
{
    static const char *const last_names[] = {"exact", "auto"};
    int smooth = !strcmp(activation, "tanh"), n;
    errors e, last, table[4][16];
    memset(table, 0, sizeof table);
    if (measure(context, s, smooth ? PK_RULE_GAUSS : PK_RULE_EXACT, smooth ? PK_GAUSS_NODES : 0, &last) ||
        measure(context, s, PK_RULE_AUTO, 0, &e))
        return 1;
    last = smooth ? e : last;
    for (int rule = 0; rule < 4; rule++) {
        int k = 0;
        const int most = rules[rule] == PK_RULE_GAUSS ? (int)PK_GAUSS_NODES : (int)MOST_NODES;
        for (n = 1; n <= most; n *= 2, k++) {
            if (rules[rule] == PK_RULE_TRAPEZOID && n == 1)
                continue;
            if (measure(context, s, rules[rule], n, &table[rule][k]))
                return 1;
            fprintf(data, "%d %g %g\n", n, table[rule][k].closure, table[rule][k].entry);
        }
        fprintf(data, "\n\n");
    }
    fprintf(data, "%g %g %g\n\n\n", last.nodes, last.closure, last.entry);

    printf("\n%-5s       ", activation);
    for (int rule = 0; rule < 4; rule++)
        printf("%-19s", rule_names[rule]);
    printf("\nnodes       closure  entry     closure  entry     closure  entry     closure  entry\n");
    n = 1;
    for (int k = 0; n <= MOST_NODES; n *= 2, k++) {
        printf("%5d       ", n);
        for (int rule = 0; rule < 4; rule++)
            if (smooth && rules[rule] == PK_RULE_GAUSS && n == PK_GAUSS_NODES)
                printf("%7.1e  %-10s", table[rule][k].closure, "reference");
            else if (table[rule][k].nodes > 0)
                printf("%7.1e  %7.1e   ", table[rule][k].closure, table[rule][k].entry);
            else
                printf("%-19s", "-");
        printf("\n");
    }
    printf("%5.1f %-5s %7.1e  ", last.nodes, last_names[smooth], last.closure);
    if (smooth)
        printf("%7.1e\n", last.entry);
    else
        printf("reference\n");

    /* The orders that the top of this file promises, and what is new here. */
    double halved = table[0][7].entry / table[0][6].entry, quartered = table[1][7].entry / table[1][6].entry;
    if (!(last.closure < 1e-12))
        return fail(activation, "the closure of the last rule", last.closure);
    if (smooth && !(last.entry < 1e-12))
        return fail(activation, "the entry error of the automatic rule", last.entry);
    if (smooth && !(fabs(halved - 0.5) < 0.1 && fabs(quartered - 0.25) < 0.1))
        return fail(activation, "the error of midpoint when its nodes double, relative,", quartered);
    if (!smooth && !(table[3][5].closure > 1e-8))
        return fail(activation, "(the kinks do not show) the closure of Gauss with 32 nodes",
                    table[3][5].closure);
    return 0;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static const char *const activations[] = {"tanh", "relu"};
    static pk_dataset digits, train;
    static pk_real inputs[TEST * 64];
    char folder[TUTORIAL_PATH], path[TUTORIAL_PATH + 100], name[64], network[64];
    int64_t items[TEST];
    int failed = tutorial_digits(context, data, __FILE__, &digits);
    if (failed || tutorial_folder(output, "03_quadrature", folder))
        return 1;
    TRY(pk_dataset_rows(context, &digits, 0, TRAIN, &train));
    for (int m = 0; m < TEST; m++)
        items[m] = FIRST_TEST + m;
    pk_dataset_inputs(&digits, items, TEST, inputs);
    snprintf(path, sizeof path, "%s/errors.dat", folder);
    FILE *file = fopen(path, "w");
    if (!file)
        return perror(path), 1;
    printf("Worst errors over %d test digits, %d training digits, %d steps of 64-32-32-10.\n", (int)TEST,
           (int)TRAIN, (int)STEPS);
    for (int a = 0; a < 2 && !failed; a++) {
        static subject s;
        memset(&s, 0, sizeof s);
        s.inputs = pk_matrix_view(inputs, TEST, 64);
        for (int m = 0; m < TEST; m++)
            s.labels[m] = ((const int64_t *)digits.targets.data)[items[m]];
        snprintf(name, sizeof name, "03_quadrature-%s", activations[a]);
        snprintf(network, sizeof network, "input 64; dense 32; %s; dense 32; %s; dense 10", activations[a],
                 activations[a]);
        failed = tutorial_folder(output, name, path) || record(context, &train, network, path);
        if (!failed)
            TRY(pk_run_open(context, path, &s.run));
        failed = failed || tabulate(context, &s, activations[a], file);
        free(s.reference);
        pk_run_release(context, &s.run);
    }
    pk_dataset_release(context, &digits);
    if (fclose(file))
        return perror(folder), 1;
    printf("\nThe plot is errors.png in %s.\n", folder);
    return failed || tutorial_plot(__FILE__, "03_quadrature.gp", folder, "");
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means empty, or the default */
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
