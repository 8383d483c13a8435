/* 00: the definition, written out with plain loops; then the library, which must agree.
 *
 * A network f with one hidden layer of tanh units is trained by SGD. Step s takes the weights from w_s to
 * w_{s+1} = w_s - r (1/|B|) sum over the batch B of grad l_i(w_s), with D_s = w_{s+1} - w_s. Training example i
 * contributes to output c on input x
 *
 *     A_c(x, i) = - sum over the steps s whose batch holds i of
 *                     (r / |B|) < integral_0^1 grad f_c(w_s + t D_s, x) dt, grad l_i(w_s) >,
 *
 * and by the fundamental theorem of calculus f_c(w_S, x) = f_c(w_0, x) + sum_i A_c(x, i).
 *
 *     cc -O3 -fopenmp -I. examples/00_by_hand.c -lm && ./a.out [OUTPUT FOLDER]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { IN = 3, HIDDEN = 4, OUT = 2, EXAMPLES = 6, BATCH = 2, STEPS = 60, NODES = 10 };
/* One vector holds all weights, layer by layer: the matrix, row by row, then the biases. */
enum { W1 = 0, B1 = W1 + HIDDEN * IN, W2 = B1 + HIDDEN, B2 = W2 + OUT * HIDDEN, P = B2 + OUT };

/* f_c(w, x), and its gradient in all weights. */
static double output(const double *w, const double *x, int c, double *gradient)
{
    double f = w[B2 + c];
    memset(gradient, 0, P * sizeof *gradient);
    gradient[B2 + c] = 1;
    for (int j = 0; j < HIDDEN; j++) {
        double sum = w[B1 + j];
        for (int i = 0; i < IN; i++)
            sum += w[W1 + j * IN + i] * x[i];
        const double h = tanh(sum), v = w[W2 + c * HIDDEN + j];
        f += v * h;
        gradient[W2 + c * HIDDEN + j] = h;
        gradient[B1 + j] = v * (1 - h * h);
        for (int i = 0; i < IN; i++)
            gradient[W1 + j * IN + i] = v * (1 - h * h) * x[i];
    }
    return f;
}

/* The gradient of the loss l = sum_c (f_c - y_c)^2 / 2. */
static void loss_gradient(const double *w, const double *x, const double *y, double *gradient)
{
    double of_output[P];
    memset(gradient, 0, P * sizeof *gradient);
    for (int c = 0; c < OUT; c++) {
        const double residual = output(w, x, c, of_output) - y[c];
        for (int p = 0; p < P; p++)
            gradient[p] += residual * of_output[p];
    }
}

/* Gauss-Legendre on [0, 1]: the roots of the Legendre polynomial of degree NODES, by Newton's method. */
static void gauss_legendre(double *node, double *weight)
{
    for (int k = 0; k < NODES; k++) {
        double z = cos(acos(-1) * (k + 0.75) / (NODES + 0.5)), slope = 1;
        for (int round = 0; round < 20; round++) {
            double before = 1, value = z;
            for (int n = 2; n <= NODES; n++) {
                const double next = ((2 * n - 1) * z * value - (n - 1) * before) / n;
                before = value;
                value = next;
            }
            slope = NODES * (z * value - before) / (z * z - 1);
            z -= value / slope;
        }
        node[k] = (1 + z) / 2;
        weight[k] = 1 / ((1 - z * z) * slope * slope);
    }
}

static int run(pk_context *context, const char *folder)
{
    static double w[STEPS + 1][P], inputs[EXAMPLES][IN], targets[EXAMPLES][OUT], by_hand[OUT][EXAMPLES];
    static pk_real weights[P], test[IN];
    const double rate = 0.2, x[IN] = {0.3, -0.7, 0.5};
    double node[NODES], weight[NODES], g[P], at[P], gradient[P], worst = 0;

    /* Train. Nothing here is random: any numbers will do. */
    for (int i = 0; i < EXAMPLES * IN; i++)
        inputs[i / IN][i % IN] = sin(1 + 2.0 * i);
    for (int i = 0; i < EXAMPLES * OUT; i++)
        targets[i / OUT][i % OUT] = cos(3.0 * i);
    for (int p = 0; p < P; p++)
        w[0][p] = (pk_real)(0.5 * sin(5.0 * p + 2));
    for (int s = 0; s < STEPS; s++) {
        memcpy(w[s + 1], w[s], sizeof w[s]);
        for (int b = 0; b < BATCH; b++) {
            const int i = (s * BATCH + b) % EXAMPLES;
            loss_gradient(w[s], inputs[i], targets[i], g);
            for (int p = 0; p < P; p++)
                w[s + 1][p] -= rate / BATCH * g[p];
        }
    }

    /* Decompose by hand. */
    gauss_legendre(node, weight);
    for (int s = 0; s < STEPS; s++)
        for (int c = 0; c < OUT; c++)
            for (int k = 0; k < NODES; k++) {
                for (int p = 0; p < P; p++)
                    at[p] = w[s][p] + node[k] * (w[s + 1][p] - w[s][p]);
                (void)output(at, x, c, gradient);
                for (int b = 0; b < BATCH; b++) {
                    const int i = (s * BATCH + b) % EXAMPLES;
                    loss_gradient(w[s], inputs[i], targets[i], g);
                    for (int p = 0; p < P; p++)
                        by_hand[c][i] -= rate / BATCH * weight[k] * gradient[p] * g[p];
                }
            }

    /* The same by the library: record the weights of every step, then decompose the recording. */
    const size_t input_shape[2] = {EXAMPLES, IN}, target_shape[2] = {EXAMPLES, OUT};
    static pk_recorder_options options;
    static pk_dataset data;
    static pk_recorder recorder;
    static pk_run recorded;
    static pk_decomposition d;
    options.network = "input 3; dense 4; tanh; dense 2";
    options.loss = "squared";
    options.replace = 1; /* the recording of an earlier start */
    data.inputs = pk_array_view(PK_FLOAT64, 2, input_shape, inputs);
    data.targets = pk_array_view(PK_FLOAT64, 2, target_shape, targets);
    for (int s = 0; s <= STEPS; s++) {
        for (int p = 0; p < P; p++)
            weights[p] = (pk_real)w[s][p];
        if (s == 0) {
            TRY(pk_recorder_open(context, folder, &options, &data, weights, &recorder));
            continue;
        }
        const int64_t items[BATCH] = {(s - 1) * BATCH % EXAMPLES, ((s - 1) * BATCH + 1) % EXAMPLES};
        const pk_batch batch = {BATCH, items, NULL};
        TRY(pk_recorder_step(context, &recorder, rate, &batch, 1, NULL, weights));
    }
    TRY(pk_recorder_close(context, &recorder));
    for (int i = 0; i < IN; i++)
        test[i] = (pk_real)x[i];
    TRY(pk_run_open(context, folder, &recorded));
    TRY(pk_decompose(context, &recorded, pk_matrix_view(test, 1, IN), NULL, &d));

    for (int c = 0; c < OUT; c++) {
        double sum = output(w[0], x, c, g);
        printf("Output %d: %+.15f before training\n", c, sum);
        for (int i = 0; i < EXAMPLES; i++) {
            const double library = d.by_example[c * EXAMPLES + i];
            printf("          %+.15f from example %d; by the library %+.15f\n", by_hand[c][i], i, library);
            sum += by_hand[c][i];
            worst = fmax(worst, fabs(by_hand[c][i] - library));
        }
        worst = fmax(worst, fabs(sum - output(w[STEPS], x, c, g)));
        printf("        = %+.15f after training (a forward pass: %+.15f)\n", sum, output(w[STEPS], x, c, g));
    }
    printf("By hand, by the library and by forward passes: the largest difference is %.1e.\n", worst);
    pk_decomposition_release(context, &d);
    pk_run_release(context, &recorded);
    if (worst < (sizeof(pk_real) < sizeof(double) ? 1e-4 : 1e-13))
        return 0;
    fprintf(stderr, "they differ by more than rounding\n");
    return 1;
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means the default */
    char folder[TUTORIAL_PATH];
    return tutorial_folder(count > 1 ? arguments[1] : "pathkernel-out", "00_by_hand", folder) ||
           run(&context, folder);
}
