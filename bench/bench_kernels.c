/* bench/bench_kernels.c: how long do the kernels of a recorded run take, in times of the decomposition of the same rows?
 *
 *   cc -O2 -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_kernels.c -lblis -lm -o bench_kernels
 *   ./bench_kernels [--quick] [--rows N] [--training N] [--steps N] [--rate R] [--batch N] [--threads N] [--times N] [NETWORK ...]
 *
 * Each network is trained on digits, recorded, and then N test rows are decomposed by example, and their kernels with all
 * training rows computed: path, epk, path_average and loss_path, in turn, N times; the fastest of each counts, in seconds of the
 * processor, so that other programs matter less. points: of rows, or common values of t, in a step.
 */
#define PATHKERNEL_INTERNALS
#include "bench_run.h"
#include "pathkernel/kernels/kernel.h"

static double processor_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

typedef struct line {
    const char *name;
    pk_kernel_options options;
    double seconds;
    pk_kernel_report report;
} line;

static pk_status decompose(pk_context *context, const pk_run *run, const pk_dataset *rows, double *seconds,
                           double *points)
{
    pk_decomposition result;
    pk_decompose_options options;
    pk_real *inputs = NULL;
    const size_t count = pk_dataset_examples(rows), width = pk_dataset_width(rows);
    memset(&options, 0, sizeof options);
    options.keep[0] = PK_BY_EXAMPLE;
    pk_status status = pk_allocate(context, count, width * sizeof *inputs, "inputs", &inputs);
    for (int64_t r = 0; !status && r < (int64_t)count; r++)
        pk_dataset_inputs(rows, &r, 1, inputs + (size_t)r * width);
    const double start = processor_seconds();
    if (!status)
        status = pk_decompose(context, run, pk_matrix_view(inputs, count, width), &options, &result);
    const double taken = processor_seconds() - start;
    *seconds = taken < *seconds ? taken : *seconds;
    if (!status) {
        *points = (double)result.points;
        pk_decomposition_release(context, &result);
    }
    pk_release(context, inputs);
    return status;
}

static pk_status measure(pk_context *context, const job *j, const pk_dataset *data, int times)
{
    static const struct {
        const char *name;
        pk_kernel_kind kind;
        pk_kernel_outputs outputs;
    } kinds[] = {
        {"path trace", PK_KERNEL_PATH, PK_OUTPUTS_TRACE},
        {"path full", PK_KERNEL_PATH, PK_OUTPUTS_FULL},
        {"path label", PK_KERNEL_PATH, PK_OUTPUTS_LABEL},
        {"path_average trace", PK_KERNEL_PATH_AVERAGE, PK_OUTPUTS_TRACE},
        {"epk trace", PK_KERNEL_EPK, PK_OUTPUTS_TRACE},
        {"loss_path", PK_KERNEL_LOSS_PATH, PK_OUTPUTS_NONE},
    };
    enum { KINDS = sizeof kinds / sizeof *kinds };
    line lines[KINDS];
    pk_run run;
    pk_dataset rows;
    double decomposition = INFINITY, points = 0, *gram = NULL;
    memset(lines, 0, sizeof lines);
    pk_status status = train_run(context, j, data, &run);
    if (!status)
        status = pk_dataset_rows(context, data, TRAINING, j->rows, &rows);
    for (int k = 0; k < KINDS; k++) {
        lines[k].name = kinds[k].name;
        lines[k].options.kind = kinds[k].kind;
        lines[k].options.outputs = kinds[k].outputs;
        lines[k].seconds = INFINITY;
    }
    for (int t = 0; t < times && !status; t++) {
        status = decompose(context, &run, &rows, &decomposition, &points);
        for (int k = 0; k < KINDS && !status; k++) {
            const size_t width = kinds[k].outputs == PK_OUTPUTS_FULL ? run.outputs : 1;
            gram = (double *)malloc(j->rows * run.examples * width * width * sizeof *gram);
            const double start = processor_seconds();
            status = pk_kernels(context, &run, &rows, NULL, 1, &lines[k].options, &gram, &lines[k].report);
            const double taken = processor_seconds() - start;
            lines[k].seconds = taken < lines[k].seconds ? taken : lines[k].seconds;
            free(gram);
        }
    }
    if (!status) {
        printf("%s, %zu rows, %zu training rows, %zu steps\n", j->network, j->rows, run.examples, run.steps);
        printf("  %-20s %10.4f s          %8.2f points a row\n", "decomposition", decomposition,
               points / (double)(run.steps * j->rows));
        for (int k = 0; k < KINDS; k++)
            printf("  %-20s %10.4f s  %6.2f  %10.2f points a step, error %.1e\n", lines[k].name,
                   lines[k].seconds, lines[k].seconds / decomposition,
                   (double)lines[k].report.points / (double)run.steps, lines[k].report.error);
    } else {
        fprintf(stderr, "%s: %s\n", j->network, pk_message(context));
    }
    for (int k = 0; k < KINDS && !status; k++)
        if (!(lines[k].report.error <= (sizeof(pk_real) == sizeof(float) ? 1e-4 : 1e-10))) {
            fprintf(stderr, "%s: %s: error %g\n", j->network, lines[k].name, lines[k].report.error);
            status = PK_NOT_CLOSED;
        }
    pk_run_release(context, &run);
    return status;
}

int main(int count, char **arguments)
{
    static const char *const networks[] = {"input 64; dense 32; tanh; dense 10",
                                           "input 64; dense 32; relu; dense 10",
                                           "input 64; dense 64; tanh; dense 64; tanh; dense 10",
                                           "input 64; dense 64; relu; dense 64; relu; dense 10"};
    pk_context context;
    pk_dataset data;
    job j = {"", "", "sgd", 0.1, 10, 0, 512, 64, 0};
    int times = 3, threads = 1, given = 0;
    memset(&context, 0, sizeof context);
    for (int i = 1; i < count; i++)
        if (!strcmp(arguments[i], "--quick")) { /* for a test: errors are judged all the same */
            j.rows = 16, j.training = 64, j.steps = 2, times = 1;
            arguments[i][0] = '\0';
        } else if (i + 1 < count && arguments[i][0] == '-') {
            const double value = atof(arguments[i + 1]);
            const char *name = arguments[i++] + 2;
            if (!strcmp(name, "rows"))
                j.rows = (size_t)value;
            else if (!strcmp(name, "training"))
                j.training = (size_t)value;
            else if (!strcmp(name, "steps"))
                j.steps = (size_t)value;
            else if (!strcmp(name, "rate"))
                j.rate = value;
            else if (!strcmp(name, "batch"))
                j.batch_size = (size_t)value;
            else if (!strcmp(name, "threads"))
                threads = (int)value;
            else if (!strcmp(name, "times"))
                times = (int)value;
            arguments[i - 1][0] = arguments[i][0] = '\0';
        }
    context.threads = threads;
    find_data(&context, NULL, &data);
    pk_status status = PK_OK;
    for (int i = 1; i < count && !status; i++)
        if (*arguments[i]) {
            j.network = arguments[i];
            status = measure(&context, &j, &data, times);
            given = 1;
        }
    for (size_t i = 0; i < sizeof networks / sizeof *networks && !status && !given; i++) {
        j.network = networks[i];
        status = measure(&context, &j, &data, times);
    }
    pk_dataset_release(&context, &data);
    return status ? 1 : 0;
}
