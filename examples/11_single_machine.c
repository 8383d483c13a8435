/* 11: one kernel machine that is the trained network.
 *
 * In every step of plain SGD, f(w_{s+1}, x) - f(w_s, x) = - eta_s sum_i c_{s,i} K_s(x, x_i) dl_i/df(w_s), a machine with the kernel
 *
 *     K_s(x, x_i) = integral_0^1 < J(w_s + t D_s, x), J(w_s, x_i) > dt,          J = df/dw:
 *
 * an ensemble of machines, one a step, since dl_i/df changes. Where it is constant, the sums over the steps can be exchanged,
 * and one machine is left (Bell et al. 2023). That is so for the negative log-likelihood, read on log-probabilities,
 * l_i = - log p_{y_i}(x_i), and with the kernel K = sum_s eta_s c_{s,i} K_s,
 *
 *     log p_c(x; w_S) = log p_c(x; w_0) + sum_i K_{c, y_i}(x, x_i),
 *
 * and it is so for the hinge loss max(0, 1 - y f) as long as it is active for all examples, dl/df = -y:
 *
 *     f(w_S, x) = f(w_0, x) + sum_i y_i K(x, x_i).
 *
 * K is PK_KERNEL_EPK. It is one feature map for test and training rows (test rows: J along the step; training rows: c J at its
 * beginning), hence symmetric and without negative eigenvalues; and a test row with the numbers of a training row is
 * another row: K is discontinuous there.
 *
 *     cc -O3 -fopenmp -I. examples/11_single_machine.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { TRAIN = 100, TEST = 10, CLASSES = 10, MOST = TEST * CLASSES };

typedef struct machine {
    const char *network, *folder;
    pk_loss loss;
    size_t steps;
    double rate;
} machine;

static int train(pk_context *context, const machine *m, const pk_graph *graph, const pk_dataset *data,
                 const char *folder)
{
    static pk_train_options options;
    options.loss = m->loss;
    options.optimizer.kind = PK_SGD;
    options.schedule.rate = m->rate;
    options.steps = m->steps;
    options.batch_size = 32;
    options.record = folder;
    options.replace = 1;
    pk_real *weights = (pk_real *)malloc(graph->parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_network_initialize(context, graph, 1, weights);
    if (status == PK_OK)
        status = pk_train(context, graph, data, &options, weights, NULL);
    free(weights);
    TRY(status);
    return 0;
}

/* The network's outputs on the test rows at step s. */
static int outputs(pk_context *context, const pk_run *run, size_t s, pk_real *x, pk_real *f)
{
    pk_real *weights = (pk_real *)malloc(run->parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_run_weights(context, run, s, weights);
    if (status == PK_OK)
        status = pk_graph_evaluate(context, &run->graph, weights, pk_matrix_view(x, TEST, 64),
                                   pk_matrix_view(f, TEST, run->outputs));
    free(weights);
    TRY(status);
    return 0;
}

/* The machine's change of the outputs against the network's. y: the labels, or +1 and -1. */
static int check(pk_context *context, const pk_run *run, const pk_dataset *test, pk_real *x, const int64_t *y)
{
    static double gram[MOST * TRAIN * CLASSES];
    static pk_real before[MOST], after[MOST];
    const size_t C = run->outputs;
    double *result = gram, residual = 0, largest = 0;
    pk_kernel_options options;
    pk_kernel_report report;
    memset(&options, 0, sizeof options);
    options.kind = PK_KERNEL_EPK;
    options.outputs = PK_OUTPUTS_FULL; /* (TEST, C, TRAIN, C) */
    TRY(pk_kernels(context, run, test, NULL, 1, &options, &result, &report));
    if (outputs(context, run, 0, x, before) || outputs(context, run, run->steps, x, after))
        return 1;
    for (size_t cell = 0; cell < TEST * C; cell++) {
        double sum = 0;
        for (size_t i = 0; i < TRAIN; i++)
            sum += C > 1 ? gram[(cell * TRAIN + i) * C + (size_t)y[i]] : (double)y[i] * gram[cell * TRAIN + i];
        residual = fmax(residual, fabs((double)after[cell] - (double)before[cell] - sum));
        largest = fmax(largest, fabs((double)after[cell] - (double)before[cell]));
    }
    printf("    outputs change by up to %.2f; the machine misses at most %.1e (%zu points of quadrature)\n",
           largest, residual, report.points);
    const double limit = sizeof(pk_real) < sizeof(double) ? 1e-3 : 1e-12;
    return residual < limit * fmax(largest, 1) && largest > 0.1
               ? 0
               : (fprintf(stderr, "the machine is not the network\n"), 1);
}

/* Symmetric between training rows; and a training row that comes as a test row is another. */
static int look(pk_context *context, const pk_run *run, const pk_dataset *learned)
{
    static double own[TRAIN * TRAIN], other[TRAIN * TRAIN];
    pk_dataset rows;
    pk_kernel_options options[1];
    double *result = own, apart = 0, largest = 0;
    int differs = 0;
    memset(options, 0, sizeof options);
    options->kind = PK_KERNEL_EPK;
    options->outputs = PK_OUTPUTS_TRACE;
    TRY(pk_dataset_rows(context, learned, 0, TRAIN, &rows));
    TRY(pk_kernels(context, run, NULL, NULL, 1, options, &result, NULL));
    result = other;
    TRY(pk_kernels(context, run, &rows, NULL, 1, options, &result, NULL));
    for (size_t i = 0; i < TRAIN * TRAIN; i++) {
        differs |= own[i] != own[i % TRAIN * TRAIN + i / TRAIN];
        apart = fmax(apart, fabs(own[i] - other[i]));
        largest = fmax(largest, fabs(own[i]));
    }
    printf("    training rows with training rows: %s; the same rows as test rows differ by up to %.2f, entries "
           "are "
           "up to %.2f\n",
           differs ? "NOT SYMMETRIC" : "symmetric bit for bit", apart, largest);
    return differs || !(apart > 0) ? fprintf(stderr, "the kernel is not what it should be\n"), 1 : 0;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static const machine machines[] = {
        {"input 64; dense 16; tanh; dense 10; log_softmax", "11_single_machine-tanh", PK_NLL, 60, 0.3},
        {"input 64; dense 16; relu; dense 10; log_softmax", "11_single_machine-relu", PK_NLL, 60, 0.2},
        {"input 64; dense 16; relu; dense 1", "11_single_machine-hinge", PK_HINGE, 8, 0.05}};
    static pk_dataset digits;
    static pk_real x[TEST * 64];
    static int64_t signs[TRAIN + TEST];
    int64_t items[TEST];
    int failed = 0;
    if (tutorial_digits(context, data, __FILE__, &digits))
        return 1;
    const int64_t *labels = (const int64_t *)digits.targets.data;
    const size_t shape[1] = {TRAIN + TEST};
    for (size_t i = 0; i < TRAIN + TEST; i++)
        signs[i] = labels[i] < 5 ? 1 : -1;
    for (int m = 0; m < TEST; m++)
        items[m] = TRAIN + m;
    pk_dataset_inputs(&digits, items, TEST, x);
    for (size_t k = 0; k < sizeof machines / sizeof *machines && !failed; k++) {
        const machine *m = &machines[k];
        char folder[TUTORIAL_PATH];
        pk_dataset all, learned, test;
        pk_graph graph;
        pk_run recorded;
        memset(&graph, 0, sizeof graph);
        TRY(pk_dataset_rows(context, &digits, 0, TRAIN + TEST, &all));
        if (m->loss == PK_HINGE)
            all.targets = pk_array_view(PK_INT64, 1, shape, signs);
        TRY(pk_dataset_rows(context, &all, 0, TRAIN, &learned));
        TRY(pk_dataset_rows(context, &all, TRAIN, TEST, &test));
        TRY(pk_network_parse(context, m->network, &graph));
        if (tutorial_folder(output, m->folder, folder) || train(context, m, &graph, &learned, folder))
            return 1;
        TRY(pk_run_open(context, folder, &recorded));
        printf("%s, %s, %zu steps:\n", m->network, pk_loss_name(m->loss), m->steps);
        failed = check(context, &recorded, &test, x, m->loss == PK_HINGE ? signs : labels) ||
                 look(context, &recorded, &learned);
        pk_run_release(context, &recorded);
        pk_graph_release(context, &graph);
    }
    pk_dataset_release(context, &digits);
    return failed;
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means the default */
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
