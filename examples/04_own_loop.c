/* 04: a training loop of one's own, recorded.
 *
 * Between the two rulers below is the loop of somebody who had never heard of pathkernel, and the few lines
 * that now record it: a network 64-24-10 with tanh, gradients by hand, data as an array of structs, and
 * stochastic gradient descent with its own generator, shuffling and learning rates,
 *
 *     w_{s+1} = w_s - rate_s / |B_s| * sum over i in B_s of grad l_i(w_s).
 *
 * To have the trained network decomposed, the loop tells a recorder three things after each step: the rate,
 * the rows in the batch, the weights. The recorder is told the network, the loss and the optimizer once.
 * Whether all that was true shows: the decomposition recomputes each update from the recorded weights, and
 *
 *     unattributed = sum_s < Phi_s(x), w_{s+1} - w_s - recomputed update >
 *
 * is at rounding only if network, loss, optimizer, rates and batches are those of the loop.
 *
 *     cc -O3 -fopenmp -I. examples/04_own_loop.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

/* ======== the loop =================================================================================== */

enum { PIXELS = 64, HIDDEN = 24, CLASSES = 10, EXAMPLES = 1437, BATCH = 32, EPOCHS = 6, TESTS = 20 };

/* One vector holds all weights: layer by layer, weight (out, in), then bias. This is PyTorch's order, and the
 * one that a recording needs. */
enum {
    W1 = 0,
    B1 = W1 + HIDDEN * PIXELS,
    W2 = B1 + HIDDEN,
    B2 = W2 + CLASSES * HIDDEN,
    WEIGHTS = B2 + CLASSES
};

typedef struct scan {
    unsigned char ink[PIXELS]; /* 0 .. 16 */
    int digit;
} scan;

static double uniform(unsigned *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) / 16777216.0;
}

static void predict(const pk_real *w, const scan *example, double *hidden, double *output)
{
    for (int j = 0; j < HIDDEN; j++) {
        double sum = w[B1 + j];
        for (int i = 0; i < PIXELS; i++)
            sum += w[W1 + j * PIXELS + i] * (example->ink[i] / 16.0);
        hidden[j] = tanh(sum);
    }
    for (int k = 0; k < CLASSES; k++) {
        output[k] = w[B2 + k];
        for (int j = 0; j < HIDDEN; j++)
            output[k] += w[W2 + k * HIDDEN + j] * hidden[j];
    }
}

/* gradient += that of the softmax cross-entropy of one example. */
static void add_gradient(const pk_real *w, const scan *example, double *gradient)
{
    double hidden[HIDDEN], output[CLASSES], most = -HUGE_VAL, total = 0;
    predict(w, example, hidden, output);
    for (int k = 0; k < CLASSES; k++)
        most = fmax(most, output[k]);
    for (int k = 0; k < CLASSES; k++)
        total += output[k] = exp(output[k] - most);
    for (int k = 0; k < CLASSES; k++)
        output[k] = output[k] / total - (k == example->digit);
    for (int j = 0; j < HIDDEN; j++) {
        double back = 0;
        for (int k = 0; k < CLASSES; k++) {
            gradient[W2 + k * HIDDEN + j] += output[k] * hidden[j];
            back += output[k] * w[W2 + k * HIDDEN + j];
        }
        back *= 1 - hidden[j] * hidden[j];
        gradient[B1 + j] += back;
        for (int i = 0; i < PIXELS; i++)
            gradient[W1 + j * PIXELS + i] += back * (example->ink[i] / 16.0);
    }
    for (int k = 0; k < CLASSES; k++)
        gradient[B2 + k] += output[k];
}

/* The learning rate falls by a tenth each epoch. */
static double rate_of(int epoch)
{
    return 0.4 * pow(0.9, epoch);
}

typedef struct recording {
    char folder[TUTORIAL_PATH];
    pk_recorder_options options; /* network, loss, optimizer, in words */
    pk_dataset data;             /* what the rows of a batch refer to */
    int lie;                     /* tell the recorder that the rate never fell */
} recording;

/* The lines with a context in them are the recording; without them this is the loop as it was. */
static int train(const scan *scans, pk_real *w, pk_context *context, const recording *r)
{
    static double gradient[WEIGHTS];
    int64_t order[EXAMPLES];
    unsigned state = 1;
    for (int p = 0; p < WEIGHTS; p++)
        w[p] = (2 * uniform(&state) - 1) * (p < W2 ? 0.125 : 0.2);
    for (int i = 0; i < EXAMPLES; i++)
        order[i] = i;
    pk_recorder recorder;
    TRY(pk_recorder_open(context, r->folder, &r->options, &r->data, w, &recorder));
    for (int epoch = 0; epoch < EPOCHS; epoch++) {
        for (int i = EXAMPLES - 1; i > 0; i--) {
            int other = (int)(uniform(&state) * (i + 1));
            int64_t swap = order[i];
            order[i] = order[other];
            order[other] = swap;
        }
        for (int first = 0; first < EXAMPLES; first += BATCH) {
            int count = EXAMPLES - first < BATCH ? EXAMPLES - first : BATCH;
            memset(gradient, 0, sizeof gradient);
            for (int b = 0; b < count; b++)
                add_gradient(w, &scans[order[first + b]], gradient);
            for (int p = 0; p < WEIGHTS; p++)
                w[p] -= rate_of(epoch) / count * gradient[p];
            pk_batch batch = {(size_t)count, order + first, NULL};
            double told = r->lie ? rate_of(0) : rate_of(epoch);
            pk_status status = pk_recorder_step(context, &recorder, told, &batch, 1, NULL, w);
            if (status != PK_OK) { /* a full disk, say; closing would forget its message */
                fprintf(stderr, "%s\n", pk_message(context));
                (void)!pk_recorder_close(context, &recorder);
                return 1;
            }
        }
    }
    TRY(pk_recorder_close(context, &recorder));
    return 0;
}

/* ======== what to do with the recording ============================================================== */

/* Decomposes every output of the first test digits: the worst unattributed part and closure, and how far the
 * outputs are from those of predict(). */
static int decompose(pk_context *context, const recording *r, const scan *tests, const pk_real *w,
                     double *unattributed, double *closure, double *mismatch)
{
    static pk_run run;
    static pk_decomposition d;
    static pk_real inputs[TESTS * PIXELS];
    for (int m = 0; m < TESTS; m++)
        for (int i = 0; i < PIXELS; i++)
            inputs[m * PIXELS + i] = tests[m].ink[i] / 16.0;
    TRY(pk_run_open(context, r->folder, &run));
    pk_status status = pk_decompose(context, &run, pk_matrix_view(inputs, TESTS, PIXELS), NULL, &d);
    if (r->lie)
        printf("The library says: %s.\n", pk_message(context));
    if (status != (r->lie ? PK_UNATTRIBUTED : PK_OK)) /* computed all the same, and the lie is noticed */
        return fprintf(stderr, "%s\n", pk_message(context)), 1;
    *unattributed = d.worst_unattributed;
    *closure = d.worst_closure;
    *mismatch = 0;
    for (int m = 0; m < TESTS; m++) {
        double hidden[HIDDEN], output[CLASSES];
        predict(w, &tests[m], hidden, output);
        for (int k = 0; k < CLASSES; k++)
            *mismatch = fmax(*mismatch, fabs(output[k] - d.final[m * CLASSES + k]));
    }
    if (!r->lie) {
        size_t best[3], digit = (size_t)tests[0].digit,
                        count = pk_strongest(d.by_example + digit * EXAMPLES, EXAMPLES, 1, 3, best);
        printf("Output %zu of the first test digit, a %zu: %+.3f at the start, %+.3f after %zu steps. Most "
               "of it came from\n",
               digit, digit, d.initial[digit], d.final[digit], d.steps);
        for (size_t i = 0; i < count; i++)
            printf("    %+.3f  training digit %zu, a %d\n", d.by_example[digit * EXAMPLES + best[i]], best[i],
                   (int)((const int64_t *)run.train.targets.data)[best[i]]);
    }
    pk_decomposition_release(context, &d);
    pk_run_release(context, &run);
    return 0;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static pk_dataset digits;
    static scan scans[EXAMPLES + TESTS];
    static double inputs[EXAMPLES][PIXELS];
    static int64_t labels[EXAMPLES];
    static pk_real w[WEIGHTS];
    if (tutorial_digits(context, data, __FILE__, &digits))
        return 1;
    for (int i = 0; i < EXAMPLES + TESTS; i++) { /* as if they came from elsewhere */
        for (int j = 0; j < PIXELS; j++)
            scans[i].ink[j] = (unsigned char)(16 * ((const double *)digits.inputs.data)[i * PIXELS + j]);
        scans[i].digit = (int)((const int64_t *)digits.targets.data)[i];
    }
    pk_dataset_release(context, &digits);

    /* What the network sees of the training data, as arrays; views, nothing is copied. */
    const size_t shape[2] = {EXAMPLES, PIXELS};
    for (int i = 0; i < EXAMPLES; i++) {
        labels[i] = scans[i].digit;
        for (int j = 0; j < PIXELS; j++)
            inputs[i][j] = scans[i].ink[j] / 16.0;
    }
    static recording r; /* static, that is zeroed: zero means empty, or the default */
    r.data.inputs = pk_array_view(PK_FLOAT64, 2, shape, inputs);
    r.data.targets = pk_array_view(PK_INT64, 1, shape, labels);
    r.options.network = "input 64; dense 24; tanh; dense 10";
    r.options.replace = 1;
    r.options.loss = "softmax_cross_entropy";
    r.options.optimizer = "sgd";
    for (r.lie = 0; r.lie < 2; r.lie++) {
        double unattributed, closure, mismatch;
        if (tutorial_folder(output, r.lie ? "04_own_loop-lie" : "04_own_loop", r.folder) ||
            train(scans, w, context, &r) ||
            decompose(context, &r, scans + EXAMPLES, w, &unattributed, &closure, &mismatch))
            return 1;
        printf("%s: closure %.1e, unattributed %.1e; our own outputs differ by %.1e.\n",
               r.lie ? "The same loop, recorded with a wrong learning rate" : "Recorded as it was", closure,
               unattributed, mismatch);
        if (closure > 1e-12 || mismatch > 1e-12 || (r.lie ? unattributed < 1e-2 : unattributed > 1e-12)) {
            fprintf(stderr, "one of these three is not what it should be\n");
            return 1;
        }
    }
    return 0;
}

int main(int count, char **arguments)
{
    static pk_context context;
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
