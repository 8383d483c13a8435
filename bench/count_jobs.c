/* bench/count_jobs.c: small jobs whose instructions are counted (bench/check_counts.sh does it, and compares).
 *
 *   cc -O2 -g -DPATHKERNEL_NO_DISPATCH -Iinclude bench/count_jobs.c -lm -o count_jobs
 *   valgrind --tool=callgrind --toggle-collect=counted ./count_jobs JOB
 *
 * Without a job it names them. One thread, made data, and what a job needs is made before counting begins; files go to
 * a folder of their own, whose name has the same length everywhere where TMPDIR has. Prints "JOB FLOPS BYTES": the flops
 * that the contraction says it does, and the most memory that the library held; 0 where a job has none.
 */
#include "bench_run.h"
#include "pathkernel/kernels/kernel.h"

enum { FOLDER = 600, PARSED_STEPS = 20 };

typedef struct state state;

/* prepare and finish are not counted. */
typedef struct counted_job {
    job run; /* first its name */
    pk_status (*prepare)(state *s);
    pk_status (*work)(state *s);
} counted_job;

struct state {
    const counted_job *job;
    pk_context context, counting; /* of what is prepared, and of the work */
    pk_dataset data;
    pk_run run;
    pk_real *inputs, *weights; /* of test rows, or the operands of a product */
    char folder[FOLDER];
    pk_train_options options;
    double flops;
};

/* ---- products of matrices ----------------------------------------------------------------------------- */

enum { SIZE = 96, ODD = 31 };

static pk_status prepare_product(state *s)
{
    pk_status status = pk_allocate(&s->context, 3 * SIZE * SIZE, sizeof *s->inputs, "matrices", &s->inputs);
    for (size_t i = 0; !status && i < 2 * SIZE * SIZE; i++)
        s->inputs[i] = (pk_real)(i % 17) - 8;
    return status;
}

/* Each of the four ways to transpose, in a large size and in one that fits no tile. */
static pk_status multiply(state *s)
{
    pk_status status = PK_OK;
    for (int i = 0; i < 8 && !status; i++) {
        const size_t size = i < 4 ? SIZE : ODD;
        const pk_matrix a = pk_matrix_view(s->inputs, size, size);
        const pk_matrix b = pk_matrix_view(s->inputs + SIZE * SIZE, size, size);
        const pk_matrix c = pk_matrix_view(s->inputs + 2 * SIZE * SIZE, size, size);
        status = pk_matrix_multiply(&s->counting, 1, a, i & 1, b, i & 2, (pk_real)(i & 1), c);
        s->flops += 2.0 * (double)(size * size * size);
    }
    return status;
}

/* ---- training, recorded ------------------------------------------------------------------------------- */

static pk_status prepare_training(state *s)
{
    const job *j = &s->job->run;
    s->options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    s->options.schedule.rate = j->rate;
    s->options.steps = j->steps;
    s->options.batch_size = j->batch_size;
    s->options.record = s->folder;
    pk_status status = pk_network_parse(&s->context, j->network, &s->run.graph);
    if (!status)
        status = pk_optimizer_parse(&s->context, j->optimizer, &s->options.optimizer);
    if (!status)
        status = pk_allocate(&s->context, s->run.graph.parameters, sizeof *s->weights, "weights", &s->weights);
    return status ? status : pk_network_initialize(&s->context, &s->run.graph, 1, s->weights);
}

static pk_status train(state *s)
{
    return pk_train(&s->counting, &s->run.graph, &s->data, &s->options, s->weights, NULL);
}

/* ---- texts and files ------------------------------------------------------------------------------------ */

static pk_status prepare_parsing(state *s)
{
    pk_status status = prepare_training(s);
    return status ? status : train(s);
}

/* The network language and a run, read. */
static pk_status parse(state *s)
{
    pk_status status = PK_OK;
    for (int i = 0; i < PARSED_STEPS && !status; i++) {
        pk_run run;
        memset(&run, 0, sizeof run);
        status = pk_run_open(&s->counting, s->folder, &run);
        pk_run_release(&s->counting, &run);
    }
    return status;
}

/* ---- decompositions ------------------------------------------------------------------------------------- */

static pk_status prepare_decomposition(state *s)
{
    const job *j = &s->job->run;
    int64_t items[DIGITS];
    for (size_t i = 0; i < j->rows; i++)
        items[i] = (int64_t)(TRAINING + i);
    pk_status status = train_run(&s->context, j, &s->data, &s->run);
    if (!status)
        status = pk_allocate(&s->context, j->rows * SIDE * SIDE, sizeof *s->inputs, "inputs", &s->inputs);
    if (!status)
        pk_dataset_inputs(&s->data, items, j->rows, s->inputs);
    return status;
}

static pk_status decompose(state *s)
{
    pk_decomposition result;
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_LAYER;
    const pk_matrix inputs = pk_matrix_view(s->inputs, s->job->run.rows, SIDE * SIDE);
    pk_status status = pk_decompose(&s->counting, &s->run, inputs, &options, &result);
    s->flops = result.flops;
    pk_decomposition_release(&s->counting, &result);
    return status;
}

/* ---- kernels --------------------------------------------------------------------------------------------- */

/* Those at a step, along steps and of the losses, of all test rows with all training rows of the run, in one pass. */
static pk_status compute_kernels(state *s)
{
    enum { KERNELS = 6 };
    const size_t rows = s->job->run.rows, N = s->run.examples, C = s->run.outputs, final = s->run.steps;
    const size_t shape[2] = {rows, SIDE * SIDE};
    const pk_kernel_options options[KERNELS] = {
        {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_TRACE, .steps = &final, .step_count = 1},
        {.kind = PK_KERNEL_NTK, .outputs = PK_OUTPUTS_FULL},
        {.kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_TRACE},
        {.kind = PK_KERNEL_EPK, .outputs = PK_OUTPUTS_SUM},
        {.kind = PK_KERNEL_CONJUGATE},
        {.kind = PK_KERNEL_TRACIN, .left_train = 1}};
    double *grams[KERNELS] = {NULL};
    pk_status status = PK_OK;
    pk_dataset data;
    memset(&data, 0, sizeof data);
    data.inputs =
        pk_array_view(sizeof(pk_real) == sizeof(float) ? PK_FLOAT32 : PK_FLOAT64, 2, shape, s->inputs);
    for (int k = 0; k < KERNELS && !status; k++)
        status = pk_allocate(&s->context, (k == 5 ? N : rows) * N * (k == 1 ? C * C : 1), sizeof(double),
                             "kernels", &grams[k]);
    if (!status)
        status = pk_kernels(&s->counting, &s->run, &data, NULL, KERNELS, options, grams, NULL);
    for (int k = 0; k < KERNELS; k++)
        pk_release(&s->context, grams[k]);
    return status;
}

/* ---- the list --------------------------------------------------------------------------------------------- */

#define MLP(activation) "input 64; dense 32; " activation "; dense 32; " activation "; dense 10"
#define IMAGE                                                                                                 \
    "input 1x8x8; conv 4 3x3 pad=1; relu; max_pool 2; residual( conv 4 3x3 pad=1; relu ); conv 8 3x3; tanh; " \
    "flatten; dense 10"
#define SEQUENCE                                                                                          \
    "input 8x8; dense 8; position; residual( layer_norm; attention 2 ); residual( layer_norm; dense 16; " \
    "gelu; dense 8 ); mean_tokens; dense 10"

/* Name, network, optimizer, rate, steps, batch, training rows, test rows. */
static const counted_job jobs[] = {
    {{"product", "", "", 0, 0, 0, 0, 0, 0}, prepare_product, multiply},
    {{"train", MLP("tanh"), "adamw", 0.003, 60, 32, TRAINING, 0, 0}, prepare_training, train},
    {{"parse", IMAGE, "adam", 0.003, PARSED_STEPS, 8, 64, 0, 0}, prepare_parsing, parse},
    {{"decompose_tanh", MLP("tanh"), "sgd", 0.5, 4, 0, 256, 8, 0}, prepare_decomposition, decompose},
    {{"decompose_relu", MLP("relu"), "sgd", 0.5, 4, 0, 256, 8, 0}, prepare_decomposition, decompose},
    {{"decompose_adamw", MLP("tanh"), "adamw", 0.003, 12, 32, 256, 8, 0}, prepare_decomposition, decompose},
    {{"decompose_image", IMAGE, "sgd", 0.1, 3, 32, 96, 2, 0}, prepare_decomposition, decompose},
    {{"decompose_sequence", SEQUENCE, "sgd momentum=0.9", 0.05, 3, 32, 96, 2, 0},
     prepare_decomposition,
     decompose},
    {{"kernels_tanh", MLP("tanh"), "sgd", 0.5, 3, 0, 64, 16, 0}, prepare_decomposition, compute_kernels},
    {{"kernels_relu", MLP("relu"), "sgd", 0.5, 3, 0, 64, 16, 0}, prepare_decomposition, compute_kernels},
};

/* What is counted: a function of its own, for valgrind to find. */
__attribute__((noinline)) void counted(state *s, pk_status *status);
__attribute__((noinline)) void counted(state *s, pk_status *status)
{
    *status = s->job->work(s);
}

static int run_job(const counted_job *j)
{
    static state s;
    const char *temporary = getenv("TMPDIR");
    s.job = j;
    s.context.threads = s.counting.threads = 1;
    make_data(&s.data);
    snprintf(s.folder, sizeof s.folder, "%.400s/pathkernel-count-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(s.folder)) {
        perror(s.folder);
        return 1;
    }
    pk_status status = j->prepare(&s);
    if (!status)
        counted(&s, &status);
    remove_run(s.folder);
    if (status) {
        fprintf(stderr, "%s: %s\n", j->run.name,
                *pk_message(&s.context) ? pk_message(&s.context) : pk_message(&s.counting));
        return 1;
    }
    printf("%s %.0f %zu\n", j->run.name, s.flops, s.counting.memory_peak);
    return 0;
}

int main(int count, char **arguments)
{
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) {
        if (count < 2)
            puts(jobs[i].run.name);
        else if (!strcmp(arguments[1], jobs[i].run.name))
            return run_job(&jobs[i]);
    }
    if (count >= 2)
        fprintf(stderr, "no job `%s`\n", arguments[1]);
    return count >= 2;
}
