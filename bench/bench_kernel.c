/* bench/bench_kernel.c: how long does an empirical NTK take, and at what share of the rate of a matrix product?
 *
 *   cc -O2 -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_kernel.c -lblis -lm -o bench_kernel
 *   ./bench_kernel [--quick] [--network TEXT] [--rows N] [--kind KIND] [--data DIR]
 *
 * input 3072; dense 512; relu; dense 512; relu; dense 8, or TEXT, at random weights; 16 x 16 and 128 x 128 rows, or
 * N x N. Lines full and trace: the kernel of rows with others; full_own and trace_own: with themselves; or one KIND of
 * these. 1 thread, and all. --data: weights.npy (1, P), x.npy and y.npy (rows, inputs) in DIR are taken, and each kernel
 * is written there as KIND.npy, which is how bench/peers/run_ntk.py compares.
 *
 * The rate is of the flops that the factored form needs, so that doing less work counts as speed: a forward pass and a
 * reverse pass for each output without the first layer's inputs, and for each pair of rows 2 (inputs + C^2 outputs) for a
 * dense layer (C for the trace, 2 inputs for the last layer; half of that for the kernel of rows with themselves); for a
 * layer that is used at several places the fewer of those of its gradients and of its pairs of places.
 * The residual is the largest |K - exact| / (|J_i| |J_j|) over some entries, exact from gradients in long double.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel/kernels/kernel.h"
#include "pathkernel/network/language.h"
#include "bench.h"
#include <float.h>
#include <float.h>

typedef struct job {
    pk_context context;
    pk_graph graph;
    const char *data; /* DIR or NULL */
    size_t rows;
    int trace, own;
    pk_real *weights, *x, *y, *gram;
    pk_status status;
} job;

static void run(void *data, size_t repeats)
{
    job *j = (job *)data;
    const size_t all = j->rows * (j->trace ? 1 : j->graph.output_width);
    const pk_matrix x = pk_matrix_view(j->x, j->rows, j->graph.input_width);
    const pk_matrix y = pk_matrix_view(j->own ? j->x : j->y, j->rows, j->graph.input_width);
    const pk_matrix gram = pk_matrix_view(j->gram, all, all);
    for (size_t r = 0; r < repeats && !j->status; r++)
        j->status = j->trace ? pk_kernel_ntk_trace(&j->context, &j->graph, j->weights, x, y, gram)
                             : pk_kernel_ntk(&j->context, &j->graph, j->weights, x, y, gram);
}

/* See the top. */
static double flops_of(const job *j)
{
    const pk_graph *graph = &j->graph;
    const double rows = (double)j->rows, outputs = (double)graph->output_width,
                 passes = rows * (j->own ? 1 : 2);
    const double kept = j->trace ? 1 : outputs, pairs = j->own ? rows * (rows + 1) / 2 : rows * rows;
    double flops = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const double places = node->positions ? (double)node->positions : 1,
                     weights = (double)node->weight_count;
        const double in = (double)node->fan_in, out = (double)node->fan_out * outputs / kept;
        const double by_rows = 2 * kept * outputs * weights;
        const double factored =
            places * places * (2 * in + (node->cotangent_constant ? 0 : 2 * kept * kept * out));
        flops += passes * 2 * places * weights * (1 + (node->input_constant ? 0 : outputs));
        flops +=
            pairs * (node->tangent_form == PK_TANGENT_OUTER && (places == 1 || factored < by_rows) ? factored
                                                                                                   : by_rows);
    }
    return flops;
}

/* The gradients of output k of one row. */
static int gradient_of(job *j, pk_real *row, size_t k, pk_real *gradient)
{
    const size_t outputs = j->graph.output_width;
    pk_real *unit = (pk_real *)calloc(outputs, sizeof *unit);
    if (!unit)
        return 0;
    unit[k] = 1;
    const pk_status status =
        pk_vjp(&j->context, &j->graph, j->weights, pk_matrix_view(row, 1, j->graph.input_width),
               pk_matrix_view(unit, 1, outputs), pk_matrix_view(gradient, 1, j->graph.parameters),
               pk_matrix_view(NULL, 0, 0));
    free(unit);
    return status == PK_OK;
}

static double residual_of(job *j)
{
    enum { PAIRS = 4 };
    const size_t outputs = j->graph.output_width, kept = j->trace ? 1 : outputs, P = j->graph.parameters,
                 all = j->rows * kept;
    pk_real *a = (pk_real *)calloc(P, sizeof *a), *b = (pk_real *)calloc(P, sizeof *b);
    double worst = a && b && !j->status ? 0 : INFINITY;
    for (size_t pair = 0; worst < INFINITY && pair < PAIRS; pair++) {
        const size_t row = pair * (j->rows - 1) / (PAIRS - 1), column = (j->rows - 1) * (pair % 2);
        const size_t k = pair % outputs, l = pair < 2 ? k : (pair + 1) % outputs;
        long double sum = 0, left = 0, right = 0;
        for (size_t c = 0; c < (j->trace ? outputs : 1); c++) {
            if (!gradient_of(j, j->x + row * j->graph.input_width, j->trace ? c : k, a) ||
                !gradient_of(j, (j->own ? j->x : j->y) + column * j->graph.input_width, j->trace ? c : l, b))
                worst = INFINITY;
            for (size_t i = 0; i < P; i++) {
                sum += (long double)a[i] * b[i];
                left += (long double)a[i] * a[i];
                right += (long double)b[i] * b[i];
            }
        }
        const double got =
            (double)j->gram[(row * kept + (j->trace ? 0 : k)) * all + column * kept + (j->trace ? 0 : l)];
        const double size = sqrt((double)left) * sqrt((double)right);
        const double error = fabs(got - (double)sum) / (size > 0 ? size : 1);
        worst = error > worst || !(error <= worst) ? error : worst;
    }
    free(a), free(b);
    return worst;
}

/* The rows of an array in DIR, converted; NULL where there is no such array of that width. */
static pk_real *read_rows(job *j, const char *name, size_t width, size_t *rows)
{
    char path[600];
    pk_array array;
    snprintf(path, sizeof path, "%s/%s.npy", j->data, name);
    if (pk_array_map(&j->context, path, 0, &array))
        return NULL;
    const size_t count = pk_array_items(&array);
    pk_real *numbers = count && count % width == 0 ? (pk_real *)malloc(count * sizeof *numbers) : NULL;
    if (numbers)
        pk_array_reals(&array, 0, count, numbers);
    *rows = count / width;
    pk_array_release(&j->context, &array);
    return numbers;
}

static pk_real *random_numbers(size_t count, uint64_t seed)
{
    pk_real *numbers = (pk_real *)malloc(count * sizeof *numbers);
    if (numbers)
        bench_fill(numbers, count, seed);
    return numbers;
}

static int write_result(job *j)
{
    char path[600];
    const size_t outputs = j->graph.output_width;
    const size_t full[4] = {j->rows, outputs, j->rows, outputs}, trace[2] = {j->rows, j->rows};
    snprintf(path, sizeof path, "%s/%s%s.npy", j->data, j->trace ? "trace" : "full", j->own ? "_own" : "");
    return pk_array_write(&j->context, path, sizeof(pk_real) == 8 ? PK_FLOAT64 : PK_FLOAT32, j->trace ? 2 : 4,
                          j->trace ? trace : full, j->gram) == PK_OK;
}

/* Weights and rows; without DIR the weights are PyTorch's starting weights. */
static int make(job *j, const char *network)
{
    size_t one = 0, others = 0;
    j->status = pk_network_parse(&j->context, network, &j->graph);
    if (j->status)
        return 0;
    const size_t P = j->graph.parameters, D = j->graph.input_width;
    if (j->data) {
        j->weights = read_rows(j, "weights", P, &one);
        j->x = read_rows(j, "x", D, &j->rows);
        j->y = read_rows(j, "y", D, &others);
        return j->weights && j->x && j->y && one == 1 && others == j->rows;
    }
    j->weights = (pk_real *)malloc(P * sizeof *j->weights);
    j->x = random_numbers(j->rows * D, 1);
    j->y = random_numbers(j->rows * D, 2);
    if (j->weights)
        j->status = pk_network_initialize(&j->context, &j->graph, 1, j->weights);
    return j->weights && j->x && j->y && !j->status;
}

static void release(job *j)
{
    free(j->weights), free(j->x), free(j->y);
    pk_graph_release(&j->context, &j->graph);
}

/* All lines of one number of rows, or the one that is wanted. */
static int measure(bench_run *bench, job *j, const char *network, const char *kind)
{
    static const char *const names[4] = {"full", "full_own", "trace", "trace_own"};
    char size[100];
    int done = make(j, network);
    for (int which = 0; done && which < 4; which++) {
        if (kind && strcmp(kind, names[which]) != 0)
            continue;
        j->trace = which / 2;
        j->own = which % 2;
        const size_t all = j->rows * (j->trace ? 1 : j->graph.output_width);
        j->gram = (pk_real *)malloc(all * all * sizeof *j->gram);
        done = j->gram != NULL;
        snprintf(size, sizeof size, "%zux%zux%zu", j->rows, j->rows, j->graph.parameters);
        for (int threads = 1; done; threads = bench->threads) {
            bench_timing timing;
            j->context.threads = threads;
            bench_time(bench, threads, run, NULL, j, &timing);
            bench_line(bench, names[which], size, threads, flops_of(j), timing, residual_of(j),
                       200 * (sizeof(pk_real) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON));
            if (threads == bench->threads)
                break;
        }
        done = done && !j->status && (!j->data || write_result(j));
        free(j->gram);
    }
    if (!done)
        fprintf(stderr, "bench_kernel: %s\n",
                *pk_message(&j->context) ? pk_message(&j->context) : "out of memory, or no data");
    release(j);
    return done;
}

int main(int argc, char **argv)
{
    static const size_t rows[2] = {16, 128};
    const char *network = "input 3072; dense 512; relu; dense 512; relu; dense 8", *data = NULL, *kind = NULL,
               *given = NULL;
    bench_run bench;
    int kept = 1, done = 1;
    for (int i = 1; i < argc; i++) {
        const char **text = strcmp(argv[i], "--network") == 0 ? &network
                            : strcmp(argv[i], "--data") == 0  ? &data
                            : strcmp(argv[i], "--kind") == 0  ? &kind
                            : strcmp(argv[i], "--rows") == 0  ? &given
                                                              : NULL;
        if (text && i + 1 < argc)
            *text = argv[++i];
        else
            argv[kept++] = argv[i];
    }
    if (!bench_start(&bench, kept, argv, "bench_kernel"))
        return 2;
    for (size_t k = 0; done && k < (given || data || bench.quick ? 1 : 2); k++) {
        job j;
        memset(&j, 0, sizeof j);
        j.data = data;
        j.rows = given ? (size_t)atoi(given) : rows[k];
        done = j.rows > 0 && measure(&bench, &j, network, kind);
    }
    return done ? bench_finish(&bench) : 2;
}
