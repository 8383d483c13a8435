/* 01: train a small network on handwritten digits, and ask which training digits made one of its decisions.
 *
 * A step of gradient descent moves the weights by D_s = w_{s+1} - w_s = - (rate / N) sum_i grad l_i(w_s).
 * Hence the trained network's output on a test digit x is its output before training plus one number for
 * each training digit i (Domingos 2020; Bell et al. 2023), exactly:
 *
 *     f(w_S, x) = f(w_0, x) + sum_i A(x, i),
 *     A(x, i)   = - sum_s (rate / N) < integral_0^1 grad f(w_s + t D_s, x) dt, grad l_i(w_s) >.
 *
 * The closure is what this sum misses. It is measured with forward passes alone, and is the proof.
 *
 *     cc -O3 -fopenmp -I. examples/01_quickstart.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Every call returns a status; after an error the context holds the sentence that tells what went wrong. */
#define TRY(call)        \
    if ((call) != PK_OK) \
    return fprintf(stderr, "%s\n", pk_message(&context)), 1

/* Digits side by side, two characters a pixel, each under its contribution, label and number. */
static void draw(const char *title, const pk_dataset *digits, size_t count, const size_t *items,
                 const double *values)
{
    const int64_t *labels = (const int64_t *)digits->targets.data;
    const double *pixels = (const double *)digits->inputs.data;
    printf("\n%s\n", title);
    for (size_t k = 0; k < count; k++)
        printf("%+.2f  a %d (%4zu)   ", values[items[k]], (int)labels[items[k]], items[k]);
    for (size_t i = 0; i < 64 * count; i++) { /* row of pixels, then digit, then column */
        size_t row = i / (8 * count), k = i / 8 % count, column = i % 8;
        char ink = " .:-=+*#@"[(int)(8 * pixels[items[k] * 64 + row * 8 + column])];
        printf("%s%c%c%s", i % (8 * count) ? "" : "\n", ink, ink, column == 7 ? "    " : "");
    }
    printf("\n");
}

int main(int count, char **arguments)
{
    enum { TRAIN = 1437, TEST = 1457, SHOWN = 4 }; /* learn from digits 0 .. 1436, ask about digit 1457 */
    const char *source = __FILE__, *slash = strrchr(source, '/'); /* the data are in data/ beside this file */
    const char *output = count > 1 ? arguments[1] : "pathkernel-out";
    char data[1000], folder[1000], path[2][1100];
    snprintf(data, sizeof data, "%.*sdata", slash ? (int)(slash + 1 - source) : 0, source);
    for (int i = 0; i < 2; i++)
        snprintf(path[i], sizeof path[i], "%s/digits-%s-ubyte", count > 2 ? arguments[2] : data,
                 i ? "labels-idx1" : "images-idx3");

    /* Static, that is zeroed: in each struct of the library zero means empty, or the default. */
    static pk_context context;
    static pk_dataset digits, train;
    TRY(pk_dataset_idx(&context, path[0], path[1], 1 / 16.0, &digits));
    TRY(pk_dataset_rows(&context, &digits, 0, TRAIN, &train));
    static pk_graph graph;
    TRY(pk_network_parse(&context, "input 64; dense 16; relu; dense 10", &graph));
    pk_real *weights = (pk_real *)malloc(graph.parameters * sizeof *weights);
    TRY(pk_network_initialize(&context, &graph, 1, weights));

    snprintf(folder, sizeof folder, "%s/01_quickstart", output);
    mkdir(output, 0777);

    static pk_train_options options;
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.5;
    options.steps = 100; /* of full-batch gradient descent */
    options.record = folder;
    options.replace = 1; /* the recording of an earlier start */
    TRY(pk_train(&context, &graph, &train, &options, weights, NULL));

    static pk_run run;
    static pk_decomposition result;
    int64_t item = TEST;
    pk_real x[64];
    pk_dataset_inputs(&digits, &item, 1, x);
    TRY(pk_run_open(&context, folder, &run));
    TRY(pk_decompose(&context, &run, pk_matrix_view(x, 1, 64), NULL, &result));

    size_t c = 0, items[SHOWN]; /* c: the network's decision */
    for (size_t k = 1; k < 10; k++)
        c = result.final[k] > result.final[c] ? k : c;
    const double *contribution = result.by_example + c * TRAIN;
    double sum = 0;
    for (size_t i = 0; i < TRAIN; i++)
        sum += contribution[i];
    printf("Test digit %d is a %d. The network says %zu, because of its output %zu:\n\n", (int)TEST,
           (int)((const int64_t *)digits.targets.data)[TEST], c, c);
    printf("  %+.15f  before training\n", result.initial[c]);
    printf("  %+.15f  sum of %d contributions\n", sum, (int)TRAIN);
    printf("  %+.15f  rounding of the recorded steps (unattributed)\n", result.unattributed[c]);
    printf("  %+.15f  closure: what the sum misses\n", result.closure[c]);
    printf("= %+.15f  after training\n", result.final[c]);

    size_t shown = pk_strongest(contribution, TRAIN, 1, SHOWN, items);
    draw("The training digits that spoke for it most:", &digits, shown, items, contribution);
    shown = pk_strongest(contribution, TRAIN, -1, SHOWN, items);
    draw("And against it:", &digits, shown, items, contribution);

    /* pk_decompose returned PK_OK: the closure is below its tolerance, 1e-10. Here it is at rounding. */
    double error = result.initial[c] + sum + result.unattributed[c] + result.closure[c] - result.final[c];
    int closed = fabs(error) < 1e-12 && fabs(result.closure[c]) < 1e-12;
    if (!closed)
        fprintf(stderr, "the decomposition does not close: error %g, closure %g\n", error, result.closure[c]);
    pk_decomposition_release(&context, &result);
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    pk_dataset_release(&context, &digits);
    free(weights);
    return !closed;
}
