/* 09: kernels on one run: the tangent kernel at the start, in the middle and at the end, how it turns towards the labels, and
 * which kernel stands for the network that was trained.
 *
 * The outputs are log-probabilities, f_c(w, x) = log p_c, and the loss is -f_y: its derivative by f is -1 at the label,
 * whatever the weights are. With full batches of N examples and plain SGD of rate eta, what example i contributes to the
 * log-probability of a test row's own label y is then a kernel alone, in each step s
 *
 *     eta/N < J_y(., x), J_{y_i}(., x_i) >,         J_c = grad_w f_c,
 *
 * and kernels differ in where they take the gradients:
 *
 *     ntk at the start, middle or end    w_0, w_{S/2}, w_S in place of every w_s (the linearized network)
 *     path_average                       the mean of the tangent kernel over w_0 .. w_S
 *     path, left                         w_s on both sides (TracIn with every step)
 *     path                               the same point between w_s and w_{s+1} on both sides (Domingos)
 *     epk                                the test row between w_s and w_{s+1}, the training row at w_s (Bell): exact
 *
 * All of them come from one pass over the run. For each, the residual |f(w_S, x) - f(w_0, x) - sum_i contribution| says whether it
 * predicts the network that was trained. The alignment of a kernel with the labels is
 *
 *     A(K, Y) = < K, Y > / (|K| |Y|),                Y_ij = 1 where the labels are equal, else 0.
 *
 *     cc -O3 -fopenmp -I. examples/09_kernels_on_a_run.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { TRAIN = 200, TEST = 40, CLASSES = 10, STEPS = 100, KINDS = 7 };
static const double rate = 0.5;

static int train(pk_context *context, const pk_graph *graph, const pk_dataset *digits, const char *folder)
{
    static pk_train_options options; /* static, that is zeroed: zero means the default */
    options.loss = PK_NLL;
    options.optimizer.kind = PK_SGD;
    options.schedule.rate = rate;
    options.steps = STEPS;
    options.batch_size = TRAIN;
    options.record = folder;
    options.replace = 1; /* the recording of an earlier start */
    pk_real *weights = (pk_real *)malloc(graph->parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_network_initialize(context, graph, 1, weights);
    if (status == PK_OK)
        status = pk_train(context, graph, digits, &options, weights, NULL);
    free(weights);
    TRY(status);
    return 0;
}

static double alignment(size_t count, const double *a, const double *b)
{
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < count; i++)
        ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
    return ab / sqrt(aa * bb);
}

/* The kernels between test and training rows, and the tangent kernel between training rows, in one pass. */
static int compute(pk_context *context, const pk_run *run, const pk_dataset *test,
                   double (*grams)[TEST * TRAIN], double *own)
{
    static const size_t some[3] = {0, STEPS / 2, STEPS};
    pk_kernel_options options[KINDS + 1];
    double *results[KINDS + 1];
    memset(options, 0, sizeof options);
    for (int k = 0; k < KINDS; k++) {
        options[k].outputs = PK_OUTPUTS_LABEL;
        results[k] = grams[k];
    }
    for (int k = 0; k < 3; k++) {
        options[k].kind = PK_KERNEL_NTK;
        options[k].steps = &some[k];
        options[k].step_count = 1;
    }
    options[3].kind = PK_KERNEL_PATH_AVERAGE;
    options[4].kind = options[5].kind = PK_KERNEL_PATH;
    options[4].quadrature.rule = PK_RULE_LEFT;
    options[6].kind = PK_KERNEL_EPK;
    options[KINDS].kind = PK_KERNEL_NTK;
    options[KINDS].outputs = PK_OUTPUTS_TRACE;
    options[KINDS].steps = some;
    options[KINDS].step_count = 3;
    options[KINDS].left_train = 1; /* training rows with training rows */
    results[KINDS] = own;
    TRY(pk_kernels(context, run, test, NULL, KINDS + 1, options, results, NULL));
    return 0;
}

/* How the tangent kernel turns: towards the labels, and away from where it was. */
static void turn(const double *own, const int64_t *labels)
{
    static double same[TRAIN * TRAIN];
    static const char *const names[3] = {"start", "middle", "end"};
    for (size_t i = 0; i < TRAIN * TRAIN; i++)
        same[i] = labels[i / TRAIN] == labels[i % TRAIN];
    printf("alignment of the tangent kernel        labels    start   middle      end\n");
    for (int k = 0; k < 3; k++) {
        const double *gram = own + k * TRAIN * TRAIN;
        printf("    %-30s %8.3f", names[k], alignment(TRAIN * TRAIN, gram, same));
        for (int l = 0; l < 3; l++)
            printf(" %8.3f", alignment(TRAIN * TRAIN, gram, own + l * TRAIN * TRAIN));
        printf("\n");
    }
}

/* Contributions of each kernel against the exact ones, and the residual of their sum. */
static int judge(const double (*grams)[TEST * TRAIN], const pk_decomposition *d, const int64_t *labels)
{
    static const char *const names[KINDS] = {
        "ntk at the start", "ntk in the middle", "ntk at the end", "path_average", "path, left", "path", "epk"};
    static double exact[TEST * TRAIN], part[TEST * TRAIN];
    double residual[KINDS], entries = 0, largest = 0;
    for (size_t m = 0; m < TEST; m++)
        for (size_t i = 0; i < TRAIN; i++)
            exact[m * TRAIN + i] = d->by_example[(m * CLASSES + (size_t)labels[m]) * TRAIN + i];
    printf("kernel                 largest residual    alignment of contributions with the exact ones\n");
    for (int k = 0; k < KINDS; k++) {
        /* The kernels at a point have no rate yet: S steps of eta/N. path has eta, epk eta and 1/N. */
        const double scale = k < 4 ? STEPS * rate / TRAIN : k < 6 ? 1.0 / TRAIN : 1;
        residual[k] = 0;
        for (size_t m = 0; m < TEST; m++) {
            const size_t cell = m * CLASSES + (size_t)labels[m];
            double left = d->final[cell] - d->initial[cell];
            for (size_t i = 0; i < TRAIN; i++) {
                part[m * TRAIN + i] = scale * grams[k][m * TRAIN + i];
                left -= part[m * TRAIN + i];
            }
            residual[k] = fmax(residual[k], fabs(left));
        }
        printf("%-22s %16.1e    %.6f\n", names[k], residual[k], alignment(TEST * TRAIN, part, exact));
    }
    for (size_t i = 0; i < TEST * TRAIN; i++) {
        entries = fmax(entries, fabs(part[i] - exact[i]));
        largest = fmax(largest, fabs(exact[i]));
    }
    printf("The contributions of epk are those of pk_decompose: they differ by %.1e of the largest.\n",
           entries / largest);
    const double limit = sizeof(pk_real) < sizeof(double) ? 1e-3 : 1e-11;
    int failed = !(residual[KINDS - 1] < limit && entries < limit * largest);
    for (int k = 0; k < KINDS - 1; k++)
        failed |= !(residual[k] > 100 * residual[KINDS - 1]);
    return failed ? fprintf(stderr, "epk is not exact, or another kernel is\n"), 1 : 0;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static pk_dataset digits, learned, test;
    static pk_graph graph;
    static pk_run recorded;
    static pk_decomposition d;
    static pk_decompose_options all;
    static double grams[KINDS][TEST * TRAIN], own[3 * TRAIN * TRAIN];
    static pk_real x[TEST * 64];
    char folder[TUTORIAL_PATH];
    int64_t items[TEST];
    if (tutorial_digits(context, data, __FILE__, &digits) ||
        tutorial_folder(output, "09_kernels_on_a_run", folder))
        return 1;
    TRY(pk_dataset_rows(context, &digits, 0, TRAIN, &learned));
    TRY(pk_dataset_rows(context, &digits, TRAIN, TEST, &test));
    TRY(pk_network_parse(context, "input 64; dense 16; tanh; dense 10; log_softmax", &graph));
    if (train(context, &graph, &learned, folder))
        return 1;
    TRY(pk_run_open(context, folder, &recorded));
    for (int m = 0; m < TEST; m++)
        items[m] = TRAIN + m;
    pk_dataset_inputs(&digits, items, TEST, x);
    TRY(pk_decompose(context, &recorded, pk_matrix_view(x, TEST, 64), &all, &d));
    if (compute(context, &recorded, &test, grams, own))
        return 1;
    const int64_t *labels = (const int64_t *)digits.targets.data;
    turn(own, labels);
    const int failed = judge((const double(*)[TEST * TRAIN]) grams, &d, labels + TRAIN);
    pk_decomposition_release(context, &d);
    pk_run_release(context, &recorded);
    pk_graph_release(context, &graph);
    pk_dataset_release(context, &digits);
    return failed;
}

int main(int count, char **arguments)
{
    static pk_context context;
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
