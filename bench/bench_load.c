/* bench/bench_load.c: what do several threads cost where another program takes a processor?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_load.c -lblis -lm -o bench_load
 *   ./bench_load [--quick] [--busy N] [--samples N] [--job NAME] [--program]
 *
 * Four jobs on the digits (64-32-32-10, tanh; 1437 of them, or made ones), each with a context of its own, as in a new
 * program: train, 300 steps with all examples; sgd, decomposing 100 inputs over 60 of these steps; adamw, 100 inputs
 * over 200 steps of batch 64; ntk, 100 kernels of 64 inputs with one context; ntk_once, one with each context.
 * Beside them run N other processes that compute (1; 0: an idle machine). Samples with one thread and with all take
 * turns, and the minimum and the median count.
 *
 * --program: with the environment that the program pathkernel-decompose gives itself: a short spin.
 *
 * Columns: job, threads' minimum and median seconds, their ratios, regions of the last sample, how often it backed off.
 * Exit status 1 where a number has other bits; a time never fails.
 */
#include "bench_run.h"
#include "pathkernel/kernels/kernel.h"
#include <signal.h>
#include <sys/wait.h>

enum { ROWS = 100, NTK_ROWS = 64, MOST = 101 };

typedef struct subject {
    const char *name;
    int repeats, fresh; /* calls a sample; whether each has a new context */
    pk_run *run;        /* NULL: training, or a kernel */
    size_t steps;       /* of training */
} subject;

static pk_dataset digits;
static pk_graph graph;
static pk_real *weights, *after;
static pk_matrix inputs;
static double *gram;

static double checksum(const void *data, size_t bytes)
{
    uint64_t sum = 1469598103934665603u;
    for (size_t i = 0; i < bytes; i++)
        sum = (sum ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return (double)(sum >> 12);
}

/* Seconds; *sum: a hash of the result, NaN after an error. */
static double sample(const subject *s, int threads, pk_context *context, double *sum)
{
    memset(context, 0, sizeof *context);
    context->threads = threads;
    const double start = bench_seconds();
    pk_status status = PK_OK;
    *sum = NAN;
    if (s->steps) {
        pk_train_options options;
        memset(&options, 0, sizeof options);
        options.loss = PK_SOFTMAX_CROSS_ENTROPY;
        options.schedule.rate = 0.5;
        options.steps = s->steps;
        memcpy(after, weights, graph.parameters * sizeof *after);
        status = pk_train(context, &graph, &digits, &options, after, NULL);
        if (!status)
            *sum = checksum(after, graph.parameters * sizeof *after);
    } else if (s->run) {
        pk_decomposition result;
        pk_decompose_options options;
        memset(&options, 0, sizeof options);
        status = pk_decompose(context, s->run, inputs, &options, &result);
        if (!status || status == PK_NOT_CLOSED) {
            *sum = checksum(result.by_example, result.rows * result.outputs * result.examples * sizeof(double));
            pk_decomposition_release(context, &result);
        }
    } else {
        pk_matrix x = inputs;
        x.rows = NTK_ROWS;
        const size_t edge = NTK_ROWS * CLASSES;
        pk_real *kernel = (pk_real *)gram;
        for (int i = 0; i < s->repeats && !status; i++) {
            if (s->fresh) {
                memset(context, 0, sizeof *context);
                context->threads = threads;
            }
            status = pk_kernel_ntk(context, &graph, weights, x, x, pk_matrix_view(kernel, edge, edge));
        }
        if (!status)
            *sum = checksum(kernel, edge * edge * sizeof *kernel);
    }
    if (status && status != PK_NOT_CLOSED)
        fprintf(stderr, "bench_load: %s: %s\n", s->name, pk_message(context));
    return bench_seconds() - start;
}

static pid_t start_busy(void)
{
    pid_t child = fork();
    if (child == 0) {
        volatile double x = 1;
        for (;;)
            x = x * 1.0000001 + 1e-9;
    }
    return child;
}

int main(int argc, char **argv)
{
    int busy = 1, samples = 11, wrong = 0, program = 0;
    pid_t children[64];
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") == 0)
            samples = 1;
        else if (strcmp(argv[i], "--program") == 0)
            program = 1;
        else if (strcmp(argv[i], "--busy") == 0 && i + 1 < argc)
            busy = atoi(argv[++i]);
        else if (strcmp(argv[i], "--job") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--samples") == 0 && i + 1 < argc)
            samples = atoi(argv[++i]);
        else {
            fprintf(stderr, "usage: %s [--quick] [--busy N] [--samples N] [--job NAME] [--program]\n", argv[0]);
            return 2;
        }
    }
    samples = samples < 1 ? 1 : samples > MOST ? MOST : samples;
    busy = busy < 0 ? 0 : busy > 64 ? 64 : busy;
    if (program && !getenv("GOMP_SPINCOUNT")) {
        setenv("GOMP_SPINCOUNT", "2000", 1);
        execv("/proc/self/exe", argv);
    }
    for (int i = 0; i < busy; i++) /* before OpenMP has threads */
        children[i] = start_busy();
    pk_context context;
    pk_dataset data;
    pk_run runs[2];
    memset(&context, 0, sizeof context);
    context.threads = 1;
    find_data(&context, NULL, &data);
    const job jobs[2] = {
        {"sgd", "input 64; dense 32; tanh; dense 32; tanh; dense 10", "sgd", 0.5, 60, 0, TRAINING, ROWS, 0},
        {"adamw", "input 64; dense 32; tanh; dense 32; tanh; dense 10", "adamw", 1e-3, 200, 64, TRAINING, ROWS,
         0}};
    pk_status status = pk_dataset_rows(&context, &data, 0, TRAINING, &digits);
    for (int j = 0; j < 2 && !status; j++)
        status = train_run(&context, &jobs[j], &data, &runs[j]);
    if (!status)
        status = pk_network_parse(&context, jobs[0].network, &graph);
    if (!status)
        status = pk_allocate(&context, graph.parameters, sizeof *weights, "weights", &weights);
    if (!status)
        status = pk_allocate(&context, graph.parameters, sizeof *after, "weights", &after);
    if (!status)
        status = pk_network_initialize(&context, &graph, 1, weights);
    const size_t edge = NTK_ROWS * CLASSES;
    if (!status)
        status = pk_allocate(&context, edge * edge, sizeof *gram, "the kernel", &gram);
    pk_real *rows = NULL;
    int64_t items[ROWS];
    for (int i = 0; i < ROWS; i++)
        items[i] = TRAINING + i;
    if (!status)
        status = pk_allocate(&context, ROWS * SIDE * SIDE, sizeof *rows, "the inputs", &rows);
    if (status) {
        fprintf(stderr, "bench_load: %s\n", pk_message(&context));
        return 2;
    }
    pk_dataset_inputs(&data, items, ROWS, rows);
    inputs = pk_matrix_view(rows, ROWS, SIDE * SIDE);
    const int all = pk_threads(NULL);
    const subject subjects[] = {{"train", 1, 0, NULL, 300},
                                {"sgd", 1, 0, &runs[0], 0},
                                {"adamw", 1, 0, &runs[1], 0},
                                {"ntk", 100, 0, NULL, 0},
                                {"ntk_once", 20, 1, NULL, 0}};
    bench__first_line("/proc/loadavg", "", "load average");
    printf("# %d busy processes, %d threads, %d samples\n", busy, all, samples);
    printf("job,one_minimum_s,one_median_s,all_minimum_s,all_median_s,ratio_minimum,ratio_median,regions,"
           "backed_off\n");
    for (size_t j = 0; j < sizeof subjects / sizeof *subjects; j++) {
        static double seconds[2][MOST], sorted[MOST];
        double sums[2] = {0, 0}, least[2] = {INFINITY, INFINITY};
        pk_context last;
        if (only && strcmp(only, subjects[j].name) != 0)
            continue;
        for (int i = 0; i < samples; i++)
            for (int k = 0; k < 2; k++) {
                double sum;
                seconds[k][i] = sample(&subjects[j], k ? all : 1, &last, &sum);
                least[k] = fmin(least[k], seconds[k][i]);
                wrong += !(i + k == 0 || sum == sums[0]);
                sums[k] = i ? sums[k] : sum;
            }
        double median[2];
        for (int k = 0; k < 2; k++)
            median[k] = bench__median(seconds[k], sorted, (size_t)samples);
        printf("%s,%.4f,%.4f,%.4f,%.4f,%.2f,%.2f,%zu,%zu\n", subjects[j].name, least[0], median[0], least[1],
               median[1], least[1] / least[0], median[1] / median[0], last.regions, last.backed_off);
        fflush(stdout);
    }
    for (int i = 0; i < busy; i++)
        if (children[i] > 0) {
            kill(children[i], SIGKILL);
            waitpid(children[i], NULL, 0);
        }
    if (wrong)
        printf("# %d results with other bits\n", wrong);
    return wrong ? 1 : 0;
}
