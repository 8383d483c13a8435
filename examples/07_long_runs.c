/* 07: long runs and little memory: fewer recorded weights, a memory limit, results in parts, and the same bits.
 *
 * The decomposition is a sum over the steps s, the test rows x and the outputs c,
 *
 *     f_c(w_S, x) = f_c(w_0, x) + sum_i A_c(x, i) + decay + unattributed + closure,
 *     A_c(x, i) = sum_s A_c(x, i, s),
 *
 * whose terms need the weights w_s and, with AdamW, the optimizer's state at every step, from the last to the
 * first. None of it has to be held at once:
 *
 *   - keep_every = k records w_0, w_k, w_2k, ... only. The steps between are trained again when they are needed,
 *     bit for bit, and compared with recorded checksums. The weights on disk take 1/k.
 *   - context.memory_limit bounds what the library allocates. The decomposition is then done in passes over the
 *     run, each for some of the test rows; pk_decompose_plan tells beforehand how many and at what cost.
 *   - pk_decompose_parts hands over the rows of each pass as it ends, so that no array of all results is needed.
 *
 * None of this changes a bit of the result, which is checked here.
 *
 *     cc -O3 -fopenmp -I. examples/07_long_runs.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum { TRAIN = 1437, TEST = 40, CLASSES = 10, STEPS = 400, KEEP_EVERY = 50, CELLS = TEST * CLASSES };

static int train(pk_context *context, const pk_graph *graph, const pk_dataset *digits, const char *folder,
                 size_t keep_every)
{
    static pk_train_options options; /* static, that is zeroed: zero means the default */
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.optimizer = pk_optimizer_adamw();
    options.schedule.rate = 0.003;
    options.steps = STEPS;
    options.batch_size = 32;
    options.record = folder;
    options.replace = 1; /* the recording of an earlier start */
    options.keep_every = keep_every;
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

/* Receives the rows of one pass. This tutorial compares them with the result that was computed at once; a program
 * with more results than memory writes them to a file instead. */
typedef struct comparison {
    const pk_decomposition *all;
    size_t rows, parts;
    int differs;
} comparison;

static pk_status compare(void *user, const pk_decomposition *part)
{
    comparison *c = (comparison *)user;
    const size_t first = part->first_row * CLASSES, cells = part->rows * CLASSES;
    c->differs |= memcmp(part->by_example, c->all->by_example + first * TRAIN, cells * TRAIN * sizeof(double));
    c->differs |= memcmp(part->decay, c->all->decay + first, cells * sizeof(double)) != 0;
    c->differs |= memcmp(part->closure, c->all->closure + first, cells * sizeof(double)) != 0;
    c->rows += part->rows;
    c->parts++;
    return PK_OK; /* another status would end the decomposition */
}

/* Decomposes a run under a limit of bytes. */
static int decompose_within(pk_context *context, const pk_run *run, pk_matrix inputs, size_t limit,
                            const pk_decomposition *all)
{
    pk_plan plan;
    pk_decomposition summary;
    comparison c = {all, 0, 0, 0};
    context->memory_limit = limit;
    context->memory_peak = 0;
    TRY(pk_decompose_plan(context, run, inputs.rows, NULL, 1, &plan));
    TRY(pk_decompose_parts(context, run, inputs, NULL, compare, &c, &summary));
    printf("    at most %5.2f MB: %zu passes of at most %zu rows x %zu outputs, %zu steps prepared at a time; "
           "peak %5.2f MB; %s bits\n",
           limit / 1e6, plan.passes, plan.rows, plan.outputs, plan.window, context->memory_peak / 1e6,
           c.differs ? "OTHER" : "the same");
    if (!c.differs && c.rows == inputs.rows && context->memory_peak <= limit)
        return 0;
    fprintf(stderr, "the limit, a row or a bit was missed\n");
    return 1;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static pk_dataset digits, learned;
    static pk_graph graph;
    static pk_run runs[2];
    static pk_decomposition all;
    static pk_real x[TEST * 64];
    char folder[TUTORIAL_PATH];
    int64_t items[TEST];
    if (tutorial_digits(context, data, __FILE__, &digits))
        return 1;
    for (int m = 0; m < TEST; m++)
        items[m] = TRAIN + m;
    pk_dataset_inputs(&digits, items, TEST, x);
    const pk_matrix inputs = pk_matrix_view(x, TEST, 64);
    TRY(pk_dataset_rows(context, &digits, 0, TRAIN, &learned));
    TRY(pk_network_parse(context, "input 64; dense 32; tanh; dense 32; tanh; dense 10", &graph));
    for (int i = 0; i < 2; i++) {
        if (tutorial_folder(output, i ? "07_long_runs-every_50th" : "07_long_runs", folder) ||
            train(context, &graph, &learned, folder, i ? KEEP_EVERY : 1))
            return 1;
        TRY(pk_run_open(context, folder, &runs[i]));
        printf("%d steps recorded, weights of every %s step: %.2f MB of weights and states\n", STEPS,
               i ? "50th" : "single",
               (double)(runs[i].weights.shape[0] * runs[i].weights.shape[1] +
                        (runs[i].optimizer_states.data
                             ? runs[i].optimizer_states.shape[0] * runs[i].optimizer_states.shape[1]
                             : 0)) *
                   sizeof(double) / 1e6);
    }

    context->memory_peak = 0;
    TRY(pk_decompose(context, &runs[0], inputs, NULL, &all));
    double worst = 0;
    for (size_t cell = 0; cell < CELLS; cell++) {
        double sum = all.initial[cell] + all.decay[cell] + all.unattributed[cell];
        for (size_t i = 0; i < TRAIN; i++)
            sum += all.by_example[cell * TRAIN + i];
        worst = fmax(worst, fabs(sum - all.final[cell]) / fmax(1, fabs(all.final[cell])));
    }
    printf("%d outputs decomposed without a limit: peak %.2f MB; the identity holds to %.1e\n", CELLS,
           context->memory_peak / 1e6, worst);
    if (worst > (sizeof(pk_real) < sizeof(double) ? 1e-3 : 1e-12))
        return fprintf(stderr, "the decomposition does not close\n"), 1;

    const size_t held = context->memory_used; /* by the runs and the result above, within the limit too */
    for (int i = 0; i < 2; i++) {
        printf("%s:\n", i ? "The run that keeps every 50th step" : "The run that keeps every step");
        if (decompose_within(context, &runs[i], inputs, held + 16000000, &all) ||
            decompose_within(context, &runs[i], inputs, held + 7000000, &all))
            return 1;
    }

    /* Too little is an error that says what would do; nothing was computed. */
    pk_plan plan;
    context->memory_limit = held + 100000;
    if (pk_decompose_plan(context, &runs[0], TEST, NULL, 1, &plan) != PK_MEMORY_LIMIT)
        return fprintf(stderr, "a limit of 0.1 MB should not do\n"), 1;
    printf("With 0.1 MB the library says: %s.\n", pk_message(context));
    pk_decomposition_release(context, &all);
    for (int i = 0; i < 2; i++)
        pk_run_release(context, &runs[i]);
    pk_graph_release(context, &graph);
    pk_dataset_release(context, &digits);
    return 0;
}

int main(int count, char **arguments)
{
    static pk_context context;
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
