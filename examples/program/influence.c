/* pathkernel influence: what would have happened to test rows with other weights of the training examples, to first order.
 *
 *     pathkernel influence RUN --inputs X.npy --readout margin|loss|output:N --out DIR [options]        (--help lists them)
 *
 * The mathematics stands in attribution/influence.h. Exit status: 0 done, 2 anything else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct influence_settings {
    const char *run, *inputs, *labels, *out;
    pk_influence_options options;
    int threads, verbose;
    size_t memory;
} influence_settings;

typedef struct influence_job {
    const influence_settings *set;
    pk_context context;
    pk_run run;
    pk_dataset rows;
    pk_influence result;
    program_folder folder;
    program_progress progress;
} influence_job;

static int parse_readout(pk_context *context, const char *text, void *place)
{
    pk_influence_options *options = (pk_influence_options *)place;
    (void)context;
    options->readout = PK_READOUT_OUTPUT;
    if (strncmp(text, "output:", 7) == 0)
        return parse_size(text + 7, &options->output);
    options->readout = strcmp(text, "loss") == 0 ? PK_READOUT_LOSS : PK_READOUT_MARGIN;
    return options->readout == PK_READOUT_LOSS || strcmp(text, "margin") == 0;
}

#define PLACE(member) offsetof(influence_settings, member)
static const program_option influence_options[] = {
    {"--inputs", "X.npy", 1, PLACE(inputs), parse_text, NULL,
     "numbers, integers or bools; one input a row, the axes in the network's order", NULL},
    {"--readout", "WHICH", 1, PLACE(options), parse_readout, "margin, loss or output:N with N from 0",
     "of the trained network on each row: margin, f_y - log sum of exp f_c over the other\nclasses; loss, the "
     "run's; output:N",
     NULL},
    {"--out", "DIR", 1, PLACE(out), parse_text, NULL, "where the results go; made if it is not there", NULL},
    {"--labels", "L.npy", 0, PLACE(labels), parse_text, NULL,
     "for margin classes (M,), for loss as train_targets.npy of the run", NULL},
    {"--renormalize", NULL, 0, PLACE(options.renormalize), parse_flag, NULL,
     "weights of a batch keep their sum: the mean is over what remains. Else the others stay", NULL},
    {"--by-step", NULL, 0, PLACE(options.by_step), parse_flag, NULL,
     "write influence_by_step.npy (M, N, S), too", NULL},
    {"--hyperparameters", NULL, 0, PLACE(options.hyperparameters), parse_flag, NULL,
     "write rate_derivative.npy (M, S), by each step's learning rate, and decay_derivative.npy (M,)", NULL},
    OPTION_THREADS(influence_settings),
    OPTION_MEMORY(influence_settings),
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL, "print the phases on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* ---- what goes in -------------------------------------------------------------------------------------- */

static int read_influence_rows(influence_job *job)
{
    const influence_settings *set = job->set;
    pk_context *context = &job->context;
    char shape[200];
    const int labelled = set->options.readout == PK_READOUT_MARGIN || set->options.readout == PK_READOUT_LOSS;
    if (labelled && !set->labels)
        return refuse("--labels: the readout %s takes them",
                      set->options.readout == PK_READOUT_LOSS ? "loss" : "margin");
    if (pk_array_map(context, set->inputs, 0, &job->rows.inputs) != PK_OK)
        return refuse("--inputs: %s", pk_message(context));
    const pk_array *inputs = &job->rows.inputs;
    if (inputs->rank < 1 || inputs->shape[0] == 0)
        return refuse("--inputs: %s has shape %s: no inputs", set->inputs, shape_text(inputs, shape));
    if (pk_run_check_inputs(context, &job->run, inputs, set->inputs) != PK_OK)
        return refuse("--inputs: %s", pk_message(context));
    watch_array(set->inputs, inputs);
    if (!set->labels)
        return PROGRAM_GO_ON;
    if (pk_array_map(context, set->labels, 0, &job->rows.targets) != PK_OK)
        return refuse("--labels: %s", pk_message(context));
    watch_array(set->labels, &job->rows.targets);
    if (job->rows.targets.rank < 1 || job->rows.targets.shape[0] != inputs->shape[0])
        return refuse("--labels: %s has shape %s, wanted a row for each of %zu inputs", set->labels,
                      shape_text(&job->rows.targets, shape), inputs->shape[0]);
    return PROGRAM_GO_ON;
}

/* Memory for the results. */
static pk_status take_results(influence_job *job)
{
    const pk_influence_options *options = &job->set->options;
    const size_t M = job->rows.inputs.shape[0], N = job->run.examples, S = job->run.steps;
    pk_influence *out = &job->result;
    pk_context *context = &job->context;
    pk_status status = pk_allocate(context, M, N * sizeof(double), "influence.npy", &out->influence);
    if (!status && options->by_step)
        status = M && N > SIZE_MAX / 8 / M
                     ? PK_OVERFLOW
                     : pk_allocate(context, M * N, S * sizeof(double), "influence_by_step.npy", &out->by_step);
    if (!status && options->hyperparameters)
        status = pk_allocate(context, M, S * sizeof(double), "rate_derivative.npy", &out->rate_derivative);
    if (!status && options->hyperparameters)
        status = pk_allocate(context, M, sizeof(double), "decay_derivative.npy", &out->decay_derivative);
    return status;
}

/* ---- what comes out ------------------------------------------------------------------------------------ */

static int write_influences(influence_job *job)
{
    const pk_influence_options *options = &job->set->options;
    const size_t M = job->rows.inputs.shape[0], shape[3] = {M, job->run.examples, job->run.steps},
                 steps[2] = {M, job->run.steps};
    const pk_influence *out = &job->result;
    int status = folder_write(&job->folder, &job->context, "influence.npy", 2, shape, out->influence);
    if (status < 0 && options->by_step)
        status = folder_write(&job->folder, &job->context, "influence_by_step.npy", 3, shape, out->by_step);
    if (status < 0 && options->hyperparameters)
        status =
            folder_write(&job->folder, &job->context, "rate_derivative.npy", 2, steps, out->rate_derivative);
    if (status < 0 && options->hyperparameters)
        status =
            folder_write(&job->folder, &job->context, "decay_derivative.npy", 1, steps, out->decay_derivative);
    return status;
}

static int fill_influence_folder(influence_job *job)
{
    if (!folder_prepare(&job->folder))
        return refuse("%s", job->folder.problem);
    pk_status status = take_results(job);
    if (!status)
        status = pk_influences(&job->context, &job->run, &job->rows, &job->set->options, &job->result);
    clear_line();
    if (status == PK_CANCELLED)
        return refuse("cancelled: nothing was written to %s", job->set->out);
    if (status)
        return refuse("%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(&job->context));
    const int written = write_influences(job);
    return written < 0 && !folder_publish(&job->folder) ? refuse("%s", job->folder.problem) : written;
}

static void print_influences(const influence_job *job)
{
    printf("run          %s: %s, %zu steps, %zu examples; %zu inputs of %s\n", job->set->run,
           job->run.graph.text ? job->run.graph.text : "", job->run.steps, job->run.examples,
           job->rows.inputs.shape[0], job->set->inputs);
    if (job->result.without_root)
        printf("without root %zu weights and steps whose second moment is 0: their direct part is taken\n",
               job->result.without_root);
    print_folder(&job->folder, &job->context, job->progress.begin);
}

static int find_influences(influence_job *job)
{
    const influence_settings *set = job->set;
    job->context.memory_limit = set->memory;
    const pk_status opened = pk_run_open(&job->context, set->run, &job->run);
    if (opened)
        return refuse_run(&job->context, opened, set->run);
    watch_run(&job->run);
    int status = read_influence_rows(job);
    if (status < 0)
        status = folder_open(&job->folder, set->out, "--out");
    if (status >= 0)
        return status;
    catch_signals(&job->progress);
    status = fill_influence_folder(job);
    folder_close(&job->folder, status < 0);
    if (status >= 0)
        return status;
    print_influences(job);
    return fflush(stdout) != 0 || ferror(stdout)
               ? refuse("the results are in %s, but the report could not be written: %s", set->out,
                        strerror(errno))
               : PROGRAM_DONE;
}

static int run_influence(const program_command *command, int count, char **arguments)
{
    influence_settings set;
    influence_job job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    job.set = &set;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = find_influences(&job);
    pk_release(&job.context, job.result.decay_derivative);
    pk_release(&job.context, job.result.rate_derivative);
    pk_release(&job.context, job.result.by_step);
    pk_release(&job.context, job.result.influence);
    pk_array_release(&job.context, &job.rows.targets);
    pk_array_release(&job.context, &job.rows.inputs);
    pk_run_release(&job.context, &job.run);
    return status;
}

const program_command influence_command = {
    "influence",
    "RUN",
    "run directory",
    "What would have happened: the derivative of the trained network by each example's weight.",
    "influence.npy (M, N): the derivative of row m's readout by the factor of example i's loss in every step, "
    "through the\n"
    "whole training. At 1: to remove the example is minus this, to first order.",
    "Exit status: 0 done; 2 bad input, cancelled or out of space, with a line that says what and where.",
    influence_options,
    run_influence};
