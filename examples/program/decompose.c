/* pathkernel decompose: decomposes the predictions of a recorded training run over its training examples.
 *
 *     pathkernel decompose RUN --inputs X.npy --out DIR [options]        (--help lists them)
 *
 * Results are written part by part and take their names all at once when the job ends (folder.c). Inputs are read as
 * they are needed. After a cancel or a full disk the files hold the rows that are complete. Exit status: 0 closed within
 * the tolerance and explained by the run, 1 computed but not so, 2 anything else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The exit of a job that needs more memory than its limit. */
enum { OVER_LIMIT = 3 };
enum { SHOWN_INPUTS = 10 };

/* A pass of a long job takes about so long, so that finished inputs survive a cancel. */
#define PASS_SECONDS 15

typedef struct decompose_settings {
    const char *run, *inputs, *out, *labels;
    pk_decompose_options options;
    struct decompose_outputs {
        char kind; /* 'a'll, 'l'abel, 'n'umber */
        size_t number;
    } outputs;
    struct decompose_top {
        size_t count; /* strongest examples per input and sign */
        int given;
    } top;
    struct decompose_until {
        const char *text; /* as it was given */
        size_t step;
    } until;
    struct decompose_average {
        const char *text;
        pk_average average;
    } average;
    int threads, verbose, recover;
    size_t memory;
} decompose_settings;

/* One result file. */
typedef struct result {
    int rank;
    size_t row_shape[PK_ARRAY_RANK], row_items;
    char *partial; /* DIR/NAME.part */
    pk_array_writer writer;
} result;

typedef struct task {
    decompose_settings *set;
    pk_context context;
    pk_run run;
    pk_array inputs; /* an open file */
    int64_t *labels; /* rows, or NULL */
    size_t rows, outputs, finished;
    size_t recorded; /* steps of the run */
    program_folder folder;
    result files[FOLDER_FILES]; /* those of the folder */
    int top_hidden;             /* by_example is kept for the list of the strongest only */
    size_t *strongest;          /* set->top.count */
    program_progress progress;
} task;

/* ---- arguments ----------------------------------------------------------------------------------------- */

static const char *const kept_names[] = {"train", "step", "layer"};
static const unsigned kept_axes[] = {PK_BY_EXAMPLE, PK_BY_STEP, PK_BY_LAYER};

/* "train", "step", "layer", or several with commas between. */
static int parse_keep(pk_context *context, const char *text, void *place)
{
    unsigned *keep = (unsigned *)place;
    (void)context;
    unsigned wanted = 0;
    for (;; text++) {
        size_t length = strcspn(text, ","), i = 0;
        while (i < 3 && (strlen(kept_names[i]) != length || strncmp(kept_names[i], text, length) != 0))
            i++;
        if (i == 3)
            return 0;
        wanted |= kept_axes[i];
        text += length;
        if (!*text)
            break;
    }
    size_t at = 0;
    while (keep[at] && keep[at] != wanted) /* seven sums of axes, eight places */
        at++;
    keep[at] = wanted;
    return 1;
}

static int parse_outputs(pk_context *context, const char *text, void *place)
{
    struct decompose_outputs *outputs = (struct decompose_outputs *)place;
    (void)context;
    outputs->kind = strcmp(text, "label") == 0 ? 'l' : strcmp(text, "all") == 0 ? 'a' : 'n';
    return outputs->kind != 'n' || parse_size(text, &outputs->number);
}

static int parse_top(pk_context *context, const char *text, void *place)
{
    struct decompose_top *top = (struct decompose_top *)place;
    (void)context;
    top->given = 1;
    return parse_size(text, &top->count);
}

static int parse_until(pk_context *context, const char *text, void *place)
{
    struct decompose_until *until = (struct decompose_until *)place;
    (void)context;
    until->text = text;
    return parse_size(text, &until->step);
}

static int parse_average(pk_context *context, const char *text, void *place)
{
    struct decompose_average *average = (struct decompose_average *)place;
    average->text = text;
    return pk_average_parse(context, text, &average->average) == PK_OK;
}

#define PLACE(member) offsetof(decompose_settings, member)
static const program_option decompose_options[] = {
    {"--inputs", "X.npy", 1, PLACE(inputs), parse_text, NULL,
     "numbers, integers or bools; one input a row, the axes in the network's order", NULL},
    {"--out", "DIR", 1, PLACE(out), parse_text, NULL, "where the results go; made if it is not there", NULL},
    {"--keep", "KIND", 0, PLACE(options.keep), parse_keep, "train, step or layer",
     "train: by_example.npy (M,C,N), the default; step: by_step.npy (M,C,S);\n"
     "layer: by_layer.npy (M,C,L). Repeatable; train,step and the like keep both axes:\n"
     "by_example_step.npy (M,C,N,S)",
     NULL},
    {"--outputs", "WHICH", 0, PLACE(outputs), parse_outputs,
     "all, label or the number of an output, counted from 0",
     "all (default), label (each input's label), or the number of one output, from 0", NULL},
    {"--labels", "Y.npy", 0, PLACE(labels), parse_text, NULL,
     "each input's label (M,), integers; default: the label predicted at the end", NULL},
    {"--quadrature", "RULE", 0, PLACE(options.quadrature), parse_rule, NULL,
     "default auto; others than auto, exact and left with :N, the nodes of a step", rule_names},
    {"--until", "K", 0, PLACE(until), parse_until, "the number of a step: of 12 steps, from 0 to 12",
     "decompose the outputs after step K instead of the last one (early stopping)", NULL},
    {"--average", "WHICH", 0, PLACE(average), parse_average, NULL,
     "decompose the outputs of an average of the weights, along its own path:\n"
     "ema:BETA from w_0, ema:BETA:FROM[:EVERY] from the weights after step FROM, a step in\n"
     "EVERY; swa:FROM:EVERY the mean of the weights after steps FROM, FROM + EVERY, ...",
     NULL},
    {"--unattributed", "LIMIT", 0, PLACE(options.unattributed), parse_positive, "a positive number",
     "of unattributed / max(1, |final|); default: what rounding leaves of a run of its precision\n"
     "and length: 4e-4 of 1000 steps in float32, 1e-10 in float64",
     NULL},
    {"--recover", NULL, 0, PLACE(recover), parse_flag, NULL,
     "open a run whose files differ by more than a kill leaves, up to the shortest file", NULL},
    {"--tolerance", "T", 0, PLACE(options.tolerance), parse_positive, "a positive number",
     "of closure / the row's largest contribution; default 1e-10 (built in float: 1e-3); a looser one saves "
     "most where\n"
     "a network has kinks: the first thing to turn when a job is too long",
     NULL},
    {"--bounds", NULL, 0, PLACE(options.bounds), parse_flag, NULL,
     "also bounds.npy (M,C,N): a bound on the error of every entry of by_example.npy", NULL},
    {"--step-closure", NULL, 0, PLACE(options.step_closure), parse_flag, NULL,
     "also closure_by_step.npy (M,C,S)", NULL},
    {"--top", "K", 0, PLACE(top), parse_top, "a whole number, 0 or more",
     "print the K strongest examples for and against each input;\ndefault 3, of the first 10 inputs", NULL},
    OPTION_THREADS(decompose_settings),
    OPTION_MEMORY(decompose_settings),
    {"--rows-at-once", "R", 0, PLACE(options.rows_at_once), parse_positive_whole, "a whole number, 1 or more",
     "inputs in one pass over the run, that is, in one part that survives a cancel", NULL},
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL,
     "print the plan, the phases and the finished parts on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* ---- what goes in -------------------------------------------------------------------------------------- */

/* A status other than PK_OK as a line; none where there is too little memory: see decompose. */
static int refuse_status(const task *job, pk_status status, const char *before)
{
    if (status == PK_MEMORY_LIMIT && job->context.memory_limit)
        return OVER_LIMIT;
    return refuse("%s%s", before, pk_message(&job->context));
}

/* Rows of inputs that are read together: few numbers, and at least one row. */
static size_t rows_in_hand(const task *job)
{
    const size_t rows = ((size_t)1 << 13) / job->run.graph.input_width;
    return rows < 1 ? 1 : rows > job->rows ? job->rows : rows;
}

/* Opens the inputs and looks at every number. */
static int read_inputs(task *job)
{
    const char *path = job->set->inputs;
    pk_context *context = &job->context;
    pk_array *array = &job->inputs;
    char shape[200];
    const size_t width = job->run.graph.input_width;
    pk_real *numbers = NULL;
    pk_status status = pk_array_open(context, path, 0, array);
    if (status != PK_OK)
        return refuse_status(job, status, "--inputs: ");
    if (array->rank < 1 || array->shape[0] == 0)
        return refuse("--inputs: %s has shape %s: no inputs", path, shape_text(array, shape));
    if (pk_run_check_inputs(context, &job->run, array, path) != PK_OK)
        return refuse("--inputs: %s", pk_message(context));
    job->rows = array->shape[0];
    const size_t block = rows_in_hand(job) * width, all = job->rows * width;
    status = pk_allocate(context, block, sizeof *numbers, path, &numbers);
    int failed = status ? refuse_status(job, status, "--inputs: ") : -1;
    for (size_t first = 0; failed < 0 && first < all; first += block) {
        const size_t count = block < all - first ? block : all - first;
        if (pk_array_read(context, array, first, count, numbers) != PK_OK)
            failed = refuse("--inputs: %s %s", path, pk_message(context));
        for (size_t i = 0; failed < 0 && i < count; i++)
            if (!isfinite(numbers[i]))
                failed = refuse("--inputs: %s: row %zu, number %zu is %s", path, (first + i) / width,
                                (first + i) % width, isnan(numbers[i]) ? "NaN" : "infinite");
        for (size_t row = 0; failed < 0 && job->run.graph.checked && row < count / width; row++)
            if (pk_graph_check_inputs(context, &job->run.graph, first / width + row, numbers + row * width) !=
                PK_OK)
                failed = refuse("--inputs: %s: %s", path, pk_message(context));
    }
    pk_release(context, numbers);
    return failed;
}

static int read_labels(task *job)
{
    const char *path = job->set->labels;
    pk_context *context = &job->context;
    pk_array array;
    char shape[200];
    pk_status mapped = pk_array_map(context, path, 0, &array);
    if (mapped != PK_OK)
        return refuse_status(job, mapped, "--labels: ");
    int status = -1;
    if (array.rank < 1 || array.shape[0] != job->rows || array.row_items != 1)
        status = refuse("--labels: %s has shape %s; %zu inputs need (%zu,)", path, shape_text(&array, shape),
                        job->rows, job->rows);
    else if (!pk_type_is_integer(array.type))
        status = refuse("--labels: %s has type %s; labels are integers", path, pk_type_name(array.type));
    else if ((mapped = pk_allocate(context, job->rows, sizeof *job->labels, path, &job->labels)) != PK_OK)
        status = refuse_status(job, mapped, "--labels: ");
    if (status < 0)
        pk_array_integers(&array, 0, job->rows, job->labels);
    for (size_t i = 0; status < 0 && i < job->rows; i++) {
        if (job->labels[i] < 0 || (size_t)job->labels[i] >= job->run.outputs)
            status = refuse("--labels: %s: label %lld in row %zu; the network has outputs 0 to %zu", path,
                            (long long)job->labels[i], i, job->run.outputs - 1);
    }
    pk_array_release(context, &array);
    return status;
}

/* Labels := the largest outputs at w_S, or at its average. */
static int predict_labels(task *job)
{
    pk_context *context = &job->context;
    const size_t outputs = job->run.outputs, width = job->run.graph.input_width, block = rows_in_hand(job);
    pk_real *weights = NULL, *f = NULL, *rows = NULL;
    pk_status status = pk_allocate(context, job->run.parameters, sizeof *weights, "the weights", &weights);
    if (!status)
        status = pk_allocate(context, block, outputs * sizeof *f, "the predictions", &f);
    if (!status)
        status = pk_allocate(context, block, width * sizeof *rows, "some inputs", &rows);
    if (!status)
        status = pk_allocate(context, job->rows, sizeof *job->labels, "the labels", &job->labels);
    if (!status)
        status = pk_run_average(context, &job->run, &job->set->options.average, weights);
    for (size_t first = 0; !status && first < job->rows; first += block) {
        const size_t count = block < job->rows - first ? block : job->rows - first;
        status = pk_array_read(context, &job->inputs, first * width, count * width, rows);
        if (!status)
            status = pk_graph_evaluate(context, &job->run.graph, weights, pk_matrix_view(rows, count, width),
                                       pk_matrix_view(f, count, outputs));
        for (size_t i = 0; !status && i < count; i++)
            for (size_t k = 1; k < outputs; k++)
                if (f[i * outputs + k] > f[i * outputs + (size_t)job->labels[first + i]])
                    job->labels[first + i] = (int64_t)k;
    }
    pk_release(context, rows);
    pk_release(context, f);
    pk_release(context, weights);
    return status ? refuse_status(job, status, "") : -1;
}

/* ---- what comes out ------------------------------------------------------------------------------------ */

static void name_kept(unsigned axes, char name[48])
{
    snprintf(name, 48, "by%s%s%s.npy", axes & PK_BY_EXAMPLE ? "_example" : "", axes & PK_BY_STEP ? "_step" : "",
             axes & PK_BY_LAYER ? "_layer" : "");
}

static pk_status add_file(task *job, const char *name, size_t count, const size_t *sizes)
{
    result *file = &job->files[job->folder.count];
    snprintf(job->folder.files[job->folder.count++].name, sizeof job->folder.files[0].name, "%s", name);
    file->rank = 2;
    file->row_shape[0] = file->row_items = job->outputs;
    for (size_t i = 0; i < count; i++) {
        file->row_shape[file->rank++ - 1] = sizes[i];
        if (sizes[i] && file->row_items > SIZE_MAX / sizes[i])
            file->row_items = SIZE_MAX; /* the decomposition itself refuses this */
        else
            file->row_items *= sizes[i];
    }
    const size_t length = strlen(job->set->out) + sizeof job->folder.files[0].name + 8;
    pk_status status = pk_allocate(&job->context, length, 1, "a path", &file->partial);
    if (!status)
        snprintf(file->partial, length, "%s/%s.part", job->set->out, name);
    return status;
}

/* The large ones first, so that a full disk shows before the small ones have grown. The order is that of
 * rows_of(). */
static pk_status list_files(task *job)
{
    static const char *const always[] = {"initial.npy", "final.npy", "decay.npy", "unattributed.npy",
                                         "closure.npy"};
    const int inherits = job->run.initial_state.data != NULL;
    const pk_decompose_options *options = &job->set->options;
    const size_t examples = job->run.examples, steps = job->run.steps, layers = job->run.graph.columns;
    pk_status status = PK_OK;
    for (size_t i = 0; !status && i < PK_KEPT && options->keep[i]; i++) {
        size_t sizes[3], count = 0;
        char name[48];
        if (options->keep[i] & PK_BY_EXAMPLE)
            sizes[count++] = examples;
        if (options->keep[i] & PK_BY_STEP)
            sizes[count++] = steps;
        if (options->keep[i] & PK_BY_LAYER)
            sizes[count++] = layers;
        name_kept(options->keep[i], name);
        status = add_file(job, name, count, sizes);
    }
    if (!status && options->bounds)
        status = add_file(job, "bounds.npy", 1, &examples);
    if (!status && options->step_closure)
        status = add_file(job, "closure_by_step.npy", 1, &steps);
    for (size_t i = 0; !status && i < sizeof always / sizeof *always; i++)
        status = add_file(job, always[i], 0, NULL);
    if (!status && inherits)
        status = add_file(job, "inherited.npy", 0, NULL);
    return status;
}

/* The rows that a part adds to each file, in the order of list_files(). */
static void rows_of(const task *job, const pk_decomposition *part, const double *rows[FOLDER_FILES])
{
    size_t count = 0;
    for (size_t i = 0; i < part->kept_count - (size_t)job->top_hidden; i++)
        rows[count++] = part->kept[i].data;
    if (job->set->options.bounds)
        rows[count++] = part->bounds;
    if (job->set->options.step_closure)
        rows[count++] = part->step_closure;
    rows[count++] = part->initial;
    rows[count++] = part->final;
    rows[count++] = part->decay;
    rows[count++] = part->unattributed;
    rows[count++] = part->closure;
    if (job->run.initial_state.data)
        rows[count++] = part->inherited;
}

static pk_status create_files(task *job)
{
    pk_status status = PK_OK;
    for (size_t i = 0; !status && i < job->folder.count; i++) {
        result *file = &job->files[i];
        if (file->row_items) /* a run of no steps has nothing by step: see publish_files */
            status = pk_array_create(&job->context, file->partial, PK_FLOAT64, file->rank, file->row_shape,
                                     &file->writer);
        job->folder.files[i].made = status == PK_OK;
    }
    return status;
}

/* Closes a file with exactly the finished rows. */
static pk_status close_file(task *job, result *file)
{
    pk_context *context = &job->context;
    if (!file->writer.file) {
        if (!job->finished || file->row_items)
            return PK_OK;
        size_t shape[PK_ARRAY_RANK] = {job->finished};
        memcpy(shape + 1, file->row_shape, (size_t)(file->rank - 1) * sizeof *shape);
        return pk_array_write(context, file->partial, PK_FLOAT64, file->rank, shape, NULL);
    }
    const size_t rows = file->writer.rows;
    pk_status closed = pk_array_close(context, &file->writer);
    if (closed || !job->finished || rows == job->finished)
        return closed;
    closed = pk_array_reopen(context, file->partial, PK_FLOAT64, file->rank, file->row_shape, job->finished,
                             &file->writer);
    return closed ? closed : pk_array_close(context, &file->writer);
}

/* Closes the files and gives them their names; without a finished row, removes them. What is wrong, or NULL. */
static const char *publish_files(task *job)
{
    const char *problem = NULL;
    for (size_t i = 0; i < job->folder.count; i++)
        if (close_file(job, &job->files[i]) != PK_OK && !problem)
            problem = pk_message(&job->context);
    if (job->finished && !problem && !folder_publish(&job->folder))
        problem = job->folder.problem;
    folder_close(&job->folder, job->finished > 0);
    return problem;
}

/* ---- printed along the way ----------------------------------------------------------------------------- */

static void print_examples(const task *job, const double *values, int sign, const char *word)
{
    const pk_array *targets = &job->run.train.targets;
    size_t found = pk_strongest(values, job->run.examples, sign, job->set->top.count, job->strongest);
    printf("  %-8s", word);
    for (size_t i = 0; i < found; i++) {
        size_t example = job->strongest[i];
        printf("%s%zu", i ? ",  " : " ", example);
        if (targets->row_items == 1 && pk_type_is_integer(targets->type)) {
            int64_t label;
            pk_array_integers(targets, example, 1, &label);
            printf(" (%lld)", (long long)label);
        } else if (targets->row_items == 1) {
            pk_real target;
            pk_array_reals(targets, example, 1, &target);
            printf(" (%.4g)", (double)target);
        }
        printf(" %+.4g", values[example]);
    }
    printf(found ? "\n" : " none\n");
}

static size_t largest_of(const double *values, size_t count)
{
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        if (values[i] > values[best])
            best = i;
    return best;
}

/* final = initial + data + ... of one output of each input, and the examples that made it. */
static void print_strongest(const task *job, const pk_decomposition *part)
{
    const decompose_settings *set = job->set;
    const double *by_example = part->by_example;
    for (size_t r = 0; r < part->rows && by_example; r++) {
        size_t row = part->first_row + r, cell = r * part->outputs, output = 0;
        size_t predicted = largest_of(part->final + cell, part->outputs);
        if (row >= SHOWN_INPUTS && !set->top.given)
            return;
        if (row == 0)
            printf("strongest examples of each input: row of train_inputs.npy%s, contribution\n",
                   job->run.train.targets.rank == 1 && pk_type_is_integer(job->run.train.targets.type)
                       ? " (label)"
                   : job->run.outputs == 1 ? " (target)"
                                           : "");
        printf("input %zu: ", row);
        if (set->outputs.kind == 'a' && part->outputs > 1) {
            output = job->labels ? (size_t)job->labels[row] : predicted;
            printf("predicted %zu; output %zu", predicted, output);
        } else {
            printf("output %zu", set->outputs.kind == 'l'   ? (size_t)job->labels[row]
                                 : set->outputs.kind == 'n' ? set->options.readout.output
                                                            : (size_t)0);
        }
        cell += output;
        printf(" = %.6g = initial %.6g, examples %+.6g", part->final[cell], part->initial[cell],
               part->data[cell]);
        if (part->decay[cell] != 0)
            printf(", decay %+.4g", part->decay[cell]);
        if (part->inherited[cell] != 0)
            printf(", inherited %+.4g", part->inherited[cell]);
        printf(", rest %+.1e\n", part->unattributed[cell] + part->closure[cell]);
        print_examples(job, by_example + cell * part->examples, +1, "for");
        print_examples(job, by_example + cell * part->examples, -1, "against");
    }
}

static pk_status on_part(void *user, const pk_decomposition *part)
{
    task *own = (task *)user;
    const double *rows[FOLDER_FILES];
    char took[32];
    rows_of(own, part, rows);
    for (size_t i = 0; i < own->folder.count; i++) {
        result *file = &own->files[i];
        if (!file->row_items)
            continue;
        pk_status status = pk_array_append(&own->context, &file->writer, part->rows, rows[i]);
        if (!status)
            status = pk_array_flush(&own->context, &file->writer);
        if (status)
            return status;
    }
    own->finished = part->first_row + part->rows;
    snprintf(own->progress.detail, sizeof own->progress.detail, ", %zu of %zu inputs", own->finished,
             own->rows);
    clear_line();
    if (own->progress.verbose)
        fprintf(stderr, "%s: %zu of %zu inputs complete, after %s\n", program_name, own->finished, own->rows,
                duration(program_seconds() - own->progress.begin, took));
    if (own->set->top.count)
        print_strongest(own, part);
    fflush(stdout);
    return PK_OK;
}

/* The plan, under the memory limit: what a pass is, what the passes cost again, what it all takes. */
static void print_plan(task *job)
{
    pk_plan plan;
    char size[32], limit[32], read[32], time[32];
    if (!job->set->verbose ||
        pk_decompose_plan(&job->context, &job->run, job->rows, &job->set->options, 1, &plan) != PK_OK)
        return; /* the decomposition itself tells why */
    const double all = plan.seconds > 0 ? plan.seconds / 100 : 1;
    fprintf(
        stderr,
        "%s: plan: %zu pass%s over the run, %zu of %zu inputs and %zu of %zu outputs in each, %zu thread%s, "
        "%zu steps prepared at a time",
        program_name, plan.passes, plan.passes == 1 ? "" : "es", plan.rows, job->rows, plan.outputs,
        job->outputs, plan.threads, plan.threads == 1 ? "" : "s", plan.window);
    if (pk_optimizer_state_vectors(&job->run.optimizer))
        fprintf(stderr, ", the optimizer's state kept every %zu steps and at %zu between",
                plan.stride * plan.window, plan.spare);
    fprintf(stderr, "; %s of %s\n", size_text((double)plan.bytes, size),
            size_text((double)job->context.memory_limit, limit));
    fprintf(stderr,
            "%s: plan: reads %s of weights and computes the examples' gradients %.1f times (%.1e flops); "
            "contraction %.1e flops\n",
            program_name, size_text(plan.weight_bytes, read), plan.sweeps, plan.gradient_flops,
            plan.contraction_flops);
    fprintf(stderr,
            "%s: plan: about %s: examples once %.0f %%, examples again %.0f %%, inputs along the path %.0f %%, "
            "contraction %.0f %%\n",
            program_name, duration(plan.seconds, time), plan.seconds_examples / all, plan.seconds_again / all,
            plan.seconds_test / all, plan.seconds_contraction / all);
}

/* Steps that are tried before a job, and the least number of steps of all inputs for which that is worth it. */
enum { TRIED_STEPS = 3, WORTH_TRYING = 500 };

/* Seconds that the job takes at a tolerance, from its first input along the first steps; negative where these were not decomposed. */
static double tried_seconds(task *job, double tolerance, const pk_real *input)
{
    pk_run few = job->run; /* a view: it is not released */
    pk_decompose_options options = job->set->options;
    pk_decomposition tried;
    memset(options.keep, 0, sizeof options.keep);
    options.keep[0] = PK_BY_EXAMPLE;
    options.bounds = 0;
    options.tolerance = tolerance;
    if (pk_run_until(&job->context, &few, TRIED_STEPS) != PK_OK)
        return -1;
    /* The closure and what is unattributed are reported by the job itself, not by this trial. */
    const pk_status status = pk_decompose(
        &job->context, &few, pk_matrix_view((pk_real *)input, 1, few.graph.input_width), &options, &tried);
    const int done = status == PK_OK || status == PK_NOT_CLOSED || status == PK_UNATTRIBUTED;
    const double threads = (double)(pk_threads(&job->context) > 0 ? pk_threads(&job->context) : 1),
                 along = tried.seconds_test + tried.seconds_sums + tried.seconds_contraction,
                 steps = (double)job->run.steps / TRIED_STEPS;
    const double seconds = steps * (along * (double)job->rows / fmin(threads, (double)job->rows) +
                                    tried.seconds_examples / threads);
    if (done)
        pk_decomposition_release(&job->context, &tried);
    return done ? seconds : -1;
}

/* Where a network has kinks, how many of them a step meets is not known before; so a few steps are tried: how long the job takes
 * at its tolerance, and how long at 1e-3. */
static void print_tried(task *job)
{
    const pk_decompose_options *options = &job->set->options;
    const double own = options->tolerance > 0 ? options->tolerance : PK_TOLERANCE,
                 loose = fmax(1e-3, PK_TOLERANCE);
    char time[32], other[32];
    pk_real *input = NULL;
    if (!job->set->verbose || options->quadrature.rule != PK_RULE_AUTO || !job->run.graph.switched ||
        options->readout.kind == PK_READOUT_LABEL || job->run.steps <= TRIED_STEPS ||
        job->rows * job->run.steps < WORTH_TRYING)
        return;
    const size_t width = job->run.graph.input_width;
    int (*const progress)(void *, const char *, double) = job->context.progress;
    job->context.progress = NULL;
    double seconds[2] = {-1, -1};
    if (pk_allocate(&job->context, width, sizeof *input, "an input", &input) == PK_OK &&
        pk_array_read(&job->context, &job->inputs, 0, width, input) == PK_OK) {
        seconds[0] = tried_seconds(job, own, input);
        seconds[1] = own < loose ? tried_seconds(job, loose, input) : -1;
    }
    pk_release(&job->context, input);
    job->context.progress = progress;
    if (seconds[0] >= 0)
        fprintf(stderr, "%s: plan: tried on the first input and %d steps: about %s at --tolerance %g",
                program_name, (int)TRIED_STEPS, duration(seconds[0], time), own);
    if (seconds[0] >= 0 && seconds[1] >= 0)
        fprintf(stderr, ", %s at %g", duration(seconds[1], other), loose);
    if (seconds[0] >= 0)
        fprintf(stderr, "\n");
}

static void print_quadrature(const task *job, const pk_decomposition *d)
{
    const pk_quadrature *rule = &job->set->options.quadrature;
    double cells = (double)job->finished * (double)d->steps;
    printf("quadrature   %s", pk_rule_name(rule->rule));
    if (rule->nodes)
        printf(":%d", rule->nodes);
    if (cells > 0)
        printf(", %.2f nodes and %.2f pieces per input and step, %zu nodes in all", (double)d->points / cells,
               (double)d->pieces / cells, d->points);
    printf("\n");
    if (d->refused)
        printf("             %zu pieces were accepted although they missed their target\n", d->refused);
}

static void print_time(const task *job, const pk_decomposition *d)
{
    const struct {
        const char *name;
        double seconds;
    } phases[] = {{"reading and updates", d->seconds_read},
                  {"gradients of the examples", d->seconds_examples},
                  {"inputs along the path", d->seconds_test},
                  {"sums over the nodes", d->seconds_sums},
                  {"contraction", d->seconds_contraction}};
    enum { count = sizeof phases / sizeof *phases };
    double sum = 0;
    char took[32], peak[32];
    for (int i = 0; i < count; i++)
        sum += phases[i].seconds;
    printf("time         %s in %zu pass%s, %d thread%s, %s of memory at the peak\n", duration(d->seconds, took),
           d->passes, d->passes == 1 ? "" : "es", pk_threads(&job->context),
           pk_threads(&job->context) == 1 ? "" : "s", size_text((double)job->context.memory_peak, peak));
    printf("             thread time:");
    for (int i = 0; i < count; i++)
        printf("%s %s %.0f %%", i ? "," : "", phases[i].name, sum > 0 ? 100 * phases[i].seconds / sum : 0);
    if (d->flops > 0 && d->seconds_contraction > 0)
        printf(" (%.1f GF/s a thread)", d->flops / d->seconds_contraction * 1e-9);
    printf("\n");
}

/* Files of the same kind in DIR that this job did not write. */
static void print_left_behind(const task *job)
{
    char name[48], path[4096];
    for (unsigned i = 0; i < 10; i++) {
        static const unsigned axes[] = {1, 4, 8, 5, 9, 12, 13};
        static const char *const others[] = {"bounds.npy", "closure_by_step.npy", "inherited.npy"};
        if (i < 7)
            name_kept(axes[i], name);
        else
            snprintf(name, sizeof name, "%s", others[i - 7]);
        size_t f = 0;
        while (f < job->folder.count && strcmp(job->folder.files[f].name, name) != 0)
            f++;
        int length = snprintf(path, sizeof path, "%s/%s", job->set->out, name);
        if (f == job->folder.count && length < (int)sizeof path && access(path, F_OK) == 0)
            printf("note         %s is of an older decomposition\n", path);
    }
}

static void print_summary(const task *job, const pk_decomposition *d, pk_status status)
{
    const pk_run *run = &job->run;
    const char *out = job->set->out;
    char loss[200], rule[200], size[32];
    double tolerance = job->set->options.tolerance > 0 ? job->set->options.tolerance : PK_TOLERANCE, bytes = 0;
    if (pk_optimizer_format(&run->optimizer, rule, sizeof rule) != PK_OK)
        rule[0] = 0;
    (void)pk_criterion_format(&run->criterion, loss, sizeof loss);
    if (job->set->top.count)
        printf("\n");
    printf("run          %s: %s; %s; %s\n", job->set->run, run->graph.text ? run->graph.text : "", loss, rule);
    if (run->cut_off)
        printf("             recording was cut off: %zu steps are complete\n", job->recorded);
    if (job->set->until.text)
        printf("             until step %zu of %zu\n", run->steps, job->recorded);
    if (job->set->average.text)
        printf("             final is that of an average of the weights, %s\n", job->set->average.text);
    if (run->initial_state.data)
        printf("             it begins with an optimizer's state, after %zu updates\n",
               run->optimizer.initial_step);
    printf("sizes        %zu of %zu inputs, %zu of %zu outputs, %zu examples, %zu steps, %zu layers, %zu "
           "parameters in %s\n",
           job->finished, job->rows, job->outputs, run->outputs, run->examples, run->steps, run->graph.columns,
           run->parameters, pk_type_name(run->weights.type));
    print_quadrature(job, d);
    printf("closure      %.2e of an input's largest output or contribution, %.2e of its largest contribution\n"
           "             alone; closest to its tolerance, %g, at input %zu, output %zu\n",
           d->worst_closure, d->worst_relative, tolerance, d->worst_row, d->worst_output);
    if (d->steps)
        printf("             %.2e in the worst single step (step %zu, input %zu)\n", d->worst_step_closure,
               d->worst_step, d->worst_step_row);
    printf("unattributed %.2e of max(1, |final|) at worst (input %zu, output %zu); limit %.1e\n",
           d->worst_unattributed, d->worst_unattributed_row, d->worst_unattributed_output,
           d->unattributed_limit);
    print_time(job, d);
    for (size_t i = 0; i < job->folder.count; i++)
        bytes += 8 * (double)job->files[i].row_items * (double)job->finished;
    printf("results      %s in %s:", size_text(bytes, size), out);
    for (size_t i = 0; i < job->folder.count; i++)
        printf(" %.*s", (int)(strlen(job->folder.files[i].name) - 4), job->folder.files[i].name);
    printf("\n");
    print_left_behind(job);
    printf("%s\n", status == PK_OK             ? "closed"
                   : status == PK_UNATTRIBUTED ? "closed, but NOT EXPLAINED by the declared training"
                                               : "NOT CLOSED");
}

static int conclude(task *job, const pk_decomposition *summary, pk_status status)
{
    char reason[PK_MESSAGE_SIZE];
    const char *out = job->set->out;
    clear_line();
    snprintf(reason, sizeof reason, "%s", pk_message(&job->context));
    if (status == PK_CANCELLED)
        snprintf(reason, sizeof reason, "cancelled");
    const char *problem = publish_files(job);
    if (problem)
        return refuse("%s%s%s", problem, status ? ", after: " : "", status ? reason : "");
    if ((status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED) || job->finished < job->rows) {
        if (!job->finished && status == PK_CANCELLED)
            return refuse("cancelled: 0 of %zu inputs are complete, nothing was written to %s", job->rows, out);
        if (!job->finished)
            return refuse("%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", reason);
        return refuse("%s: %zu of %zu inputs are complete, rows 0 to %zu of the files in %s", reason,
                      job->finished, job->rows, job->finished - 1, out);
    }
    print_summary(job, summary, status);
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("the results are in %s, but the summary could not be written: %s", out, strerror(errno));
    if (status) {
        (void)refuse("%s%s", status == PK_NOT_CLOSED ? "not closed: " : "", reason);
        return PROGRAM_MISSED;
    }
    return PROGRAM_DONE;
}

/* Opens the run, and reads what is asked about it. */
static int open_job(task *job)
{
    decompose_settings *set = job->set;
    pk_decompose_options *options = &set->options;
    pk_context *context = &job->context;
    int failed = -1;
    pk_status opened = (set->recover ? pk_run_recover : pk_run_open)(context, set->run, &job->run);
    if (opened != PK_OK) {
        int named = strstr(pk_message(context), set->run) != NULL;
        char before[400];
        snprintf(before, sizeof before, "%.396s%s", named ? "" : set->run, named ? "" : ": ");
        return refuse_status(job, opened, before);
    }
    job->recorded = job->run.steps;
    if (set->until.text && pk_run_until(context, &job->run, set->until.step) != PK_OK)
        return refuse("--until: there is no step %s; the run has %zu, so K is from 0 to %zu", set->until.text,
                      job->recorded, job->recorded);
    if (pk_average_check(context, &options->average, job->run.steps) != PK_OK)
        return refuse("--average: %s", pk_message(context));
    if (set->outputs.kind == 'n' && options->readout.output >= job->run.outputs)
        return refuse("--outputs: there is no output %zu; the network has %zu, 0 to %zu",
                      options->readout.output, job->run.outputs, job->run.outputs - 1);
    failed = read_inputs(job);
    if (failed < 0 && set->labels)
        failed = read_labels(job);
    else if (failed < 0 && set->outputs.kind == 'l')
        failed = predict_labels(job);
    return failed;
}

static void release_job(task *job)
{
    pk_release(&job->context, job->labels);
    pk_array_release(&job->context, &job->inputs);
    pk_run_release(&job->context, &job->run);
    job->labels = NULL;
}

/* The outputs to decompose, and the sums to write. */
static int choose_results(task *job)
{
    decompose_settings *set = job->set;
    pk_decompose_options *options = &set->options;
    pk_context *context = &job->context;
    size_t kept = 0;
    options->readout.kind = set->outputs.kind == 'n'   ? PK_READOUT_ONE
                            : set->outputs.kind == 'l' ? PK_READOUT_LABEL
                                                       : PK_READOUT_ALL;
    options->readout.labels = job->labels;
    job->outputs = pk_readout_count(&options->readout, job->run.outputs);
    if (pk_quadrature_check(context, &options->quadrature, &job->run.graph, &options->readout) != PK_OK)
        return refuse("--quadrature: %s", pk_message(context));
    if (!options->keep[0])
        options->keep[0] = PK_BY_EXAMPLE;
    if (list_files(job) != PK_OK)
        return refuse("%s", pk_message(context));
    if (set->top.count > job->run.examples)
        set->top.count = job->run.examples;
    if (pk_allocate(context, set->top.count, sizeof *job->strongest, "the strongest examples", &job->strongest))
        return refuse("%s", pk_message(context));
    for (kept = 0; kept < PK_KEPT && options->keep[kept]; kept++)
        job->top_hidden |= options->keep[kept] == PK_BY_EXAMPLE;
    job->top_hidden = set->top.count && !job->top_hidden; /* at most six sums of axes are kept then */
    if (job->top_hidden)
        options->keep[kept] = PK_BY_EXAMPLE;
    return PROGRAM_GO_ON;
}

static int decompose(task *job)
{
    decompose_settings *set = job->set;
    pk_context *context = &job->context;
    context->memory_limit = set->memory;
    int failed = open_job(job);
    if (failed == OVER_LIMIT) { /* the decomposition, which will not be, can tell the least that would do */
        release_job(job);
        context->memory_limit = 0;
        failed = open_job(job);
    }
    context->memory_limit = 0; /* a few lists; what is held counts when the limit is back */
    if (failed >= 0)
        return failed;
    watch_run(&job->run);
    failed = choose_results(job);
    if (failed >= 0)
        return failed;
    context->memory_limit = set->memory;
    failed = folder_open(&job->folder, set->out, "--out");
    if (failed >= 0)
        return failed;
    catch_signals(&job->progress);
    pk_decomposition summary;
    memset(&summary, 0, sizeof summary);
    if (!folder_prepare(&job->folder)) {
        failed = refuse("%s", job->folder.problem);
        folder_close(&job->folder, 0);
        return failed;
    }
    pk_status status = create_files(job);
    if (!status) {
        print_plan(job);
        print_tried(job);
        status =
            pk_decompose_array_parts(context, &job->run, &job->inputs, &set->options, on_part, job, &summary);
        context->memory_limit = 0;
    }
    return conclude(job, &summary, status);
}

static int run_decompose(const program_command *command, int count, char **arguments)
{
    decompose_settings set;
    task job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.outputs.kind = 'a';
    set.top.count = 3;
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    set.options.readout.output = set.outputs.number;
    set.options.average = set.average.average;
    set.options.pass_seconds = PASS_SECONDS;
    job.set = &set;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = decompose(&job);
    for (size_t i = 0; i < job.folder.count; i++)
        pk_release(&job.context, job.files[i].partial);
    pk_release(&job.context, job.strongest);
    release_job(&job);
    folder_close(&job.folder, 1);
    return status;
}

const program_command decompose_command = {
    "decompose",
    "RUN",
    "run directory",
    "Decomposes the outputs of a trained network over its training examples.",
    "The outputs of the network that RUN ends with, on the inputs of X.npy (M, ...):\n"
    "    final = initial + sum over the training examples + decay + unattributed + closure\n"
    "and + inherited, where the run begins with an optimizer's state (initial_state.npy).",
    "Exit status: 0 closed within the tolerance, and unattributed within its limit; 1 computed, but one of "
    "them is\nnot (results are written; a line tells which and what it means);\n"
    "2 bad input, cancelled or out of space (complete rows are kept), with a line that says what and where.",
    decompose_options,
    run_decompose};
