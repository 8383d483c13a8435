/* pathkernel kernel: a Gram matrix of a kernel of a recorded run, as a .npy file.
 *
 *     pathkernel kernel RUN --kernel NAME --out K.npy [options]        (--help lists them)
 *
 * What the kernels are stands in kernels/kernel.h. The file is written block by block under the memory limit, and a call that
 * was interrupted is finished by the same call. Exit status: 0 done, 1 done but its error exceeds the tolerance, 2 anything
 * else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* "train" for a side: the training rows of the run. */
#define TRAIN_ROWS "train"

typedef struct kernel_settings {
    const char *run, *out, *left, *right, *left_labels, *right_labels, *steps;
    pk_kernel_options options;
    int threads, verbose;
    size_t memory;
} kernel_settings;

typedef struct kernel_job {
    kernel_settings *set;
    const program_command *command;
    uint64_t given;
    pk_context context;
    pk_run run;
    pk_dataset sides[2]; /* of files */
    size_t *steps;
    program_progress progress;
} kernel_job;

/* ---- arguments ----------------------------------------------------------------------------------------- */

static const char *kernel_names(size_t index)
{
    return index < 1000 ? pk_kernel_name((pk_kernel_kind)(index + 1)) : NULL;
}

static int parse_kernel(pk_context *context, const char *text, void *place)
{
    (void)context;
    return (*(pk_kernel_kind *)place = pk_kernel_find(text)) != 0;
}

/* The modes that have a name. */
static const char *outputs_names(size_t index)
{
    const char *name = NULL;
    for (int mode = 0; mode < 100; mode++)
        if ((name = pk_kernel_outputs_name((pk_kernel_outputs)mode)) != NULL && index-- == 0)
            return name;
    return NULL;
}

static int parse_kernel_outputs(pk_context *context, const char *text, void *place)
{
    pk_kernel_options *options = (pk_kernel_options *)place;
    (void)context;
    options->outputs = PK_OUTPUTS_ONE;
    if (parse_size(text, &options->output))
        return 1;
    options->outputs = pk_kernel_outputs_find(text);
    return options->outputs != PK_OUTPUTS_NONE;
}

static const char *map_names(size_t index)
{
    return index < 1000 ? pk_kernel_map_name((pk_kernel_map)index) : NULL;
}

static int parse_map(pk_context *context, const char *text, void *place)
{
    const int map = pk_kernel_map_find(text);
    (void)context;
    *(pk_kernel_map *)place = map < 0 ? PK_MAP_NONE : (pk_kernel_map)map;
    return map >= 0;
}

static int parse_step_rule(pk_context *context, const char *text, void *place)
{
    return pk_kernel_rule_parse(context, text, (pk_quadrature *)place) == PK_OK;
}

static int parse_batch(pk_context *context, const char *text, void *place)
{
    (void)context;
    *(int *)place = strcmp(text, "none") == 0;
    return *(int *)place || strcmp(text, "weight") == 0;
}

#define PLACE(member) offsetof(kernel_settings, member)
static const program_option kernel_options[] = {
    {"--kernel", "NAME", 1, PLACE(options.kind), parse_kernel, "a kernel", "the kernel", kernel_names},
    {"--out", "K.npy", 1, PLACE(out), parse_text, NULL, "the file that is written, float64", NULL},
    {"--left", "X.npy", 0, PLACE(left), parse_text, NULL,
     "the rows of the matrix: inputs, or train, the training rows of the run; default train", NULL},
    {"--right", "Y.npy", 0, PLACE(right), parse_text, NULL,
     "its columns, the same; default: the rows and labels of --left", NULL},
    {"--left-labels", "L.npy", 0, PLACE(left_labels), parse_text, NULL,
     "labels of a file: classes (M,) for --outputs label, as train_targets.npy for the kernels of the loss",
     NULL},
    {"--right-labels", "L.npy", 0, PLACE(right_labels), parse_text, NULL, "the same of --right", NULL},
    {"--outputs", "WHICH", 0, PLACE(options), parse_kernel_outputs,
     "an output mode or the number of an output, counted from 0",
     "of the network's outputs; or the number of one, from 0; default trace. full: (M,C,M',C)", outputs_names},
    {"--steps", "WHICH", 0, PLACE(steps), parse_text, NULL,
     "final, initial, all, I,J,.. or A:B:K (A, A+K, ... below B). Weights 0 to S of kernels at a step, "
     "default\n"
     "final, more than one: an axis in front; all of path_average; steps 0 to S-1 of sums, default all",
     NULL},
    {"--rule", "RULE", 0, PLACE(options.quadrature), parse_step_rule, NULL,
     "along a step, of the kernels that move along it: left, trapezoid, gauss:N, midpoint:N or auto, the "
     "default",
     NULL},
    {"--batch", "WHICH", 0, PLACE(options.unweighted), parse_batch, "weight or none",
     "epk and tracin: weight, the default: training rows times their weight in each batch; none: times 1",
     NULL},
    {"--by-layer", NULL, 0, PLACE(options.by_layer), parse_flag, NULL,
     "an axis of layers in front of the rows, behind that of steps", NULL},
    {"--append-one", NULL, 0, PLACE(options.append_one), parse_flag, NULL,
     "conjugate: append a 1 to what is fed", NULL},
    {"--map", "MAP", 0, PLACE(options.map), parse_map, "a map", "of the finished matrix; default none",
     map_names},
    {"--tolerance", "T", 0, PLACE(options.tolerance), parse_positive, "a positive number",
     "of the rule auto, relative to the largest entry; default 1e-10 (built in float: 1e-4)", NULL},
    OPTION_THREADS(kernel_settings),
    OPTION_MEMORY(kernel_settings),
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL, "print the phases on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* The options that a kernel accepts: outputs, weights at single steps (not a sum along steps), a rule along the step, weights of batches. */
static int has_outputs(pk_kernel_kind kind)
{
    return kind == PK_KERNEL_NTK || kind == PK_KERNEL_PATH || kind == PK_KERNEL_PATH_AVERAGE ||
           kind == PK_KERNEL_EPK;
}

static int takes_weights(pk_kernel_kind kind)
{
    return kind == PK_KERNEL_NTK || kind == PK_KERNEL_CONJUGATE || kind == PK_KERNEL_EMBEDDING ||
           kind == PK_KERNEL_PATH_AVERAGE;
}

static int has_rule(pk_kernel_kind kind)
{
    return kind == PK_KERNEL_PATH || kind == PK_KERNEL_EPK || kind == PK_KERNEL_LOSS_PATH;
}

static int has_batches(pk_kernel_kind kind)
{
    return kind == PK_KERNEL_EPK || kind == PK_KERNEL_TRACIN;
}

/* Options that do not go with the kernel, or with each other. */
static int check_kernel_options(kernel_job *job)
{
    kernel_settings *set = job->set;
    pk_kernel_options *options = &set->options;
    const char *name = pk_kernel_name(options->kind);
    const int outputs = options_given(job->command, job->given, "--outputs");
    if (outputs && !has_outputs(options->kind))
        return refuse("--outputs: the kernel %s has none", name);
    if (!outputs && has_outputs(options->kind))
        options->outputs = PK_OUTPUTS_TRACE;
    if (!has_rule(options->kind) && options_given(job->command, job->given, "--rule") &&
        !(options->quadrature.rule == PK_RULE_LEFT && options->quadrature.nodes <= 1) &&
        !(options->quadrature.rule == PK_RULE_AUTO && takes_weights(options->kind)))
        return refuse("--rule: the kernel %s is taken at the left end of a step; it has no rule but left",
                      name);
    if (!has_rule(options->kind))
        memset(&options->quadrature, 0, sizeof options->quadrature);
    if (options_given(job->command, job->given, "--tolerance") &&
        (!has_rule(options->kind) || options->quadrature.rule != PK_RULE_AUTO))
        return refuse("--tolerance: it is that of the rule auto along a step");
    if (!has_batches(options->kind) && options_given(job->command, job->given, "--batch"))
        return refuse("--batch: the kernel %s has no weights of batches", name);
    if (options->append_one && options->kind != PK_KERNEL_CONJUGATE)
        return refuse("--append-one: the kernel %s has none; conjugate has", name);
    if (set->right_labels && !set->right)
        return refuse("--right-labels: without --right the columns are the rows of --left, with their labels");
    return PROGRAM_GO_ON;
}

/* ---- steps --------------------------------------------------------------------------------------------- */

/* Reads a number, if the text starts with one. Returns the text behind it, NULL where the number is too long. */
static const char *read_index(const char *text, size_t *number)
{
    char digits[32];
    const size_t length = strspn(text, "0123456789");
    if (!length)
        return text;
    if (length >= sizeof digits)
        return NULL;
    memcpy(digits, text, length);
    digits[length] = 0;
    return parse_size(digits, number) ? text + length : NULL;
}

/* A:B:K as Python's slice of the numbers 0 .. last, whose end and step may be missing; 0 where it is none. */
static int read_slice(const char *text, size_t last, size_t slice[3])
{
    slice[0] = 0;
    slice[1] = last + 1;
    slice[2] = 1;
    for (int part = 0; part < 3; part++) {
        text = read_index(text, &slice[part]);
        if (!text || (*text && *text != ':') || (!*text && part == 0))
            return 0;
        if (!*text)
            break;
        text++;
    }
    return (!*text || text[-1] != ':') && slice[2] > 0;
}

/* The numbers of a text into a list, or how many there are where it is NULL; 0: it is no list. */
static size_t read_steps(const char *text, size_t last, size_t *list)
{
    size_t slice[3], count = 0;
    if (strcmp(text, "final") == 0 || strcmp(text, "initial") == 0) {
        if (list)
            list[0] = *text == 'f' ? last : 0;
        return 1;
    }
    if (strcmp(text, "all") == 0 || strchr(text, ':')) {
        if (!read_slice(*text == 'a' ? ":" : text, last, slice))
            return 0;
        if (slice[0] >= slice[1])
            return 0;
        count = (slice[1] - slice[0] - 1) / slice[2] + 1;
        for (size_t i = 0; list && i < count; i++)
            list[i] = slice[0] + i * slice[2];
        return count;
    }
    for (;; text++) {
        size_t number = 0;
        const char *end = read_index(text, &number);
        if (!end || end == text || (*end && *end != ','))
            return 0;
        if (list)
            list[count] = number;
        count++;
        text = end;
        if (!*text)
            return count;
    }
}

/* --steps, of the weights 0 .. S or the steps 0 .. S - 1 of the run. */
static int choose_steps(kernel_job *job)
{
    const char *text = job->set->steps;
    pk_kernel_options *options = &job->set->options;
    const int weights = takes_weights(options->kind);
    const char *what = weights ? "weights" : "steps";
    const size_t last = weights ? job->run.steps : job->run.steps - 1;
    size_t slice[3];
    if (!text)
        return PROGRAM_GO_ON;
    if (!weights && !job->run.steps)
        return refuse("--steps: the run has no steps");
    const size_t count = read_steps(text, last, NULL);
    if (!count)
        return refuse(
            "--steps: '%s' is not final, initial, all, numbers such as 0,3,5 or A:B:K with some below B", text);
    if (strchr(text, ':') && read_slice(text, last, slice) && slice[0] + (count - 1) * slice[2] > last)
        return refuse("--steps: '%s' has %zu; the run has the %s 0 to %zu", text,
                      slice[0] + (count - 1) * slice[2], what, last);
    if (pk_allocate(&job->context, count, sizeof *job->steps, "the steps", &job->steps) != PK_OK)
        return refuse("--steps: %s", pk_message(&job->context));
    (void)read_steps(text, last, job->steps);
    for (size_t i = 0; i < count; i++)
        if (job->steps[i] > last)
            return refuse("--steps: '%s' has %zu; the run has the %s 0 to %zu", text, job->steps[i], what,
                          last);
    options->steps = job->steps;
    options->step_count = count;
    return PROGRAM_GO_ON;
}

/* ---- rows ---------------------------------------------------------------------------------------------- */

static int is_train(const char *rows)
{
    return !rows || strcmp(rows, TRAIN_ROWS) == 0;
}

/* The rows of a side and their labels. */
static int read_side(kernel_job *job, int right)
{
    const kernel_settings *set = job->set;
    const char *rows = right ? set->right : set->left, *labels = right ? set->right_labels : set->left_labels;
    const char *option = right ? "--right" : "--left";
    pk_context *context = &job->context;
    pk_dataset *side = &job->sides[right];
    if (is_train(rows))
        return labels ? refuse("%s-labels: the training rows have labels of their own", option) : PROGRAM_GO_ON;
    if (pk_array_map(context, rows, 0, &side->inputs) != PK_OK)
        return refuse("%s: %s", option, pk_message(context));
    watch_array(rows, &side->inputs);
    if (!side->inputs.rank || !side->inputs.shape[0])
        return refuse("%s: %s has no rows", option, rows);
    if (pk_run_check_inputs(context, &job->run, &side->inputs, rows) != PK_OK)
        return refuse("%s: %s", option, pk_message(context));
    if (labels && pk_array_map(context, labels, 0, &side->targets) != PK_OK)
        return refuse("%s-labels: %s", option, pk_message(context));
    if (labels)
        watch_array(labels, &side->targets);
    if (labels && pk_array_length(&side->targets) != side->inputs.shape[0])
        return refuse("%s-labels: %s has %zu rows; %s has %zu", option, labels, pk_array_length(&side->targets),
                      rows, side->inputs.shape[0]);
    return PROGRAM_GO_ON;
}

/* 1 if both names lead to the same file. */
static int same_file(const char *a, const char *b)
{
    struct stat one, other;
    return a && b && stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_dev == other.st_dev &&
           one.st_ino == other.st_ino;
}

/* Whether the columns are the rows: no --right, or the same names again. */
static int same_sides(const kernel_settings *set)
{
    if (!set->right || (is_train(set->left) && is_train(set->right)))
        return 1;
    if (is_train(set->left) || is_train(set->right) || strcmp(set->left, set->right) != 0)
        return 0;
    return !set->left_labels == !set->right_labels &&
           (!set->left_labels || strcmp(set->left_labels, set->right_labels) == 0);
}

static int prepare_kernel(kernel_job *job)
{
    const kernel_settings *set = job->set;
    const char *const inputs[] = {set->left, set->right, set->left_labels, set->right_labels};
    int status = check_kernel_options(job);
    for (size_t i = 0; status < 0 && i < sizeof inputs / sizeof *inputs; i++)
        if (same_file(inputs[i], set->out))
            status = refuse("--out: %s is read; it would be overwritten", set->out);
    if (status >= 0)
        return status;
    job->context.memory_limit = set->memory;
    const pk_status opened = pk_run_open(&job->context, set->run, &job->run);
    if (opened)
        return refuse_run(&job->context, opened, set->run);
    watch_run(&job->run);
    status = choose_steps(job);
    if (status < 0)
        status = read_side(job, 0);
    return status < 0 && !same_sides(set) ? read_side(job, 1) : status;
}

/* ---- the matrix ---------------------------------------------------------------------------------------- */

static void print_kernel(const kernel_job *job, const size_t *shape, int rank, const pk_kernel_report *report)
{
    const kernel_settings *set = job->set;
    char took[32], size[32];
    double bytes = sizeof(double);
    printf("kernel       %s of %s: (", pk_kernel_name(set->options.kind), set->run);
    for (int i = 0; i < rank; i++) {
        printf("%s%zu", i ? ", " : "", shape[i]);
        bytes *= (double)shape[i];
    }
    printf("), %s in %s\n", size_text(bytes, size), set->out);
    if (has_rule(set->options.kind))
        printf("error        %.2e of the largest entry, %zu points\n", report->error, report->points);
    if (report->refused)
        printf("             %zu pieces were accepted although they missed their target\n", report->refused);
    if (report->zero_rows)
        printf("             %zu rows are zero, and their cosines are 0\n", report->zero_rows);
    printf("time         %s, %d thread%s, %s of memory at the peak\n", duration(report->seconds, took),
           pk_threads(&job->context), pk_threads(&job->context) == 1 ? "" : "s",
           size_text((double)job->context.memory_peak, size));
}

/* A message about the rows of a side: with its option and its file in front. */
static int refuse_rows(const kernel_job *job)
{
    const kernel_settings *set = job->set;
    const char *const files[] = {set->left, set->right, set->left_labels, set->right_labels};
    const char *const options[] = {"--left", "--right", "--left-labels", "--right-labels"};
    const char *message = pk_message(&job->context);
    for (int side = 0; side < 2; side++) {
        const int labels = strstr(message, "targets") || strstr(message, "has label");
        const int of = side + (labels && files[side + 2] ? 2 : 0);
        if (strstr(message, side ? "right rows" : "left rows") && files[of])
            return refuse("%s: %s: %s", options[of], files[of], message);
    }
    return refuse("%s", message);
}

static int compute_kernel(kernel_job *job)
{
    const kernel_settings *set = job->set;
    pk_context *context = &job->context;
    pk_kernel_report report;
    size_t shape[6];
    int rank = 0, status = prepare_kernel(job);
    if (status >= 0)
        return status;
    const pk_dataset *left = is_train(set->left) ? NULL : &job->sides[0], *right = same_sides(set) ? left
                                                                                   : is_train(set->right)
                                                                                       ? NULL
                                                                                       : &job->sides[1];
    memset(&report, 0, sizeof report);
    if (pk_kernel_shape(context, &job->run, left, right, &set->options, shape, &rank) != PK_OK)
        return refuse_rows(job);
    catch_signals(&job->progress);
    const pk_status made = pk_kernel_file(context, &job->run, left, right, &set->options, set->out, &report);
    clear_line();
    if (made == PK_CANCELLED)
        return refuse("cancelled: the same call goes on with %s", set->out);
    if (made && made != PK_NOT_CLOSED)
        return refuse("%s%s", made == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(context));
    print_kernel(job, shape, rank, &report);
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("the kernel is in %s, but the summary could not be written: %s", set->out,
                      strerror(errno));
    if (made) {
        (void)refuse("%s", pk_message(context));
        return PROGRAM_MISSED;
    }
    return PROGRAM_DONE;
}

static int run_kernel(const program_command *command, int count, char **arguments)
{
    kernel_settings set;
    kernel_job job;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &job.given);
    if (status >= 0)
        return status;
    job.set = &set;
    job.command = command;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = compute_kernel(&job);
    pk_release(&job.context, job.steps);
    for (int side = 0; side < 2; side++) {
        pk_array_release(&job.context, &job.sides[side].inputs);
        pk_array_release(&job.context, &job.sides[side].targets);
    }
    pk_run_release(&job.context, &job.run);
    return status;
}

const program_command kernel_command = {
    "kernel",
    "RUN",
    "run directory",
    "Computes the Gram matrix of a kernel of a run: tangent, path, conjugate and more.",
    "K.npy is (M,M'); --outputs full (M,C,M',C); more than one step, and --by-layer, are axes in front.",
    "Exit status: 0 done; 1 done, but the error exceeds the tolerance; 2 bad input, cancelled or out of space\n"
    "(the same call goes on where it ended), with a line that says what and where.",
    kernel_options,
    run_kernel};
