/* pathkernel train: trains a network on arrays and records the run, so that it can be decomposed.
 *
 *     pathkernel train NEW_RUN --inputs X.npy --targets Y.npy --network LINE --loss L --rate R --steps S [options]
 *
 * Everything that can be wrong is looked at before the folder is made. The recording grows by a step at a time (record.h),
 * so that a cancel or a kill loses no complete step, and --resume goes on from there to the same bits. Exit status: 0
 * trained, 2 anything else, with one line on standard error: also where training diverged, whose steps before are kept.
 */
#include "schedule.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { GROUPS_MOST = 64, CONSTANTS_MOST = 32 };

typedef struct train_settings {
    const char *run, *inputs, *targets, *network, *loss, *rate, *init;
    pk_optimizer optimizer;
    size_t steps, epochs, batch, seed, keep_every, memory;
    double clip;
    struct train_lines {
        size_t count;
        const char *line[GROUPS_MOST];
    } groups;
    struct train_constants {
        size_t count;
        const char *text[CONSTANTS_MOST]; /* NAME=FILE.npy */
    } constants;
    int threads, verbose, resume, float32, in_order;
} train_settings;

typedef struct training {
    const train_settings *set;
    pk_context context;
    pk_graph graph;
    pk_dataset train;
    pk_criterion criterion;
    pk_array rates;
    pk_real *weights;
    pk_train_options options;
    pk_train_result result;
    double first_objective; /* of this call's first step */
    program_progress progress;
} training;

/* ---- arguments ----------------------------------------------------------------------------------------- */

static int parse_loss(pk_context *context, const char *text, void *place)
{
    pk_criterion criterion; /* only for the message; read_loss keeps it */
    const pk_status status = pk_criterion_parse(context, text, &criterion);
    if (status)
        return 0;
    pk_criterion_release(context, &criterion);
    *(const char **)place = text;
    return 1;
}

static int parse_optimizer(pk_context *context, const char *text, void *place)
{
    return pk_optimizer_parse(context, text, (pk_optimizer *)place) == PK_OK;
}

static int parse_group(pk_context *context, const char *text, void *place)
{
    struct train_lines *lines = (struct train_lines *)place;
    (void)context;
    if (lines->count == GROUPS_MOST)
        return 0;
    lines->line[lines->count++] = text;
    return 1;
}

static int parse_constant(pk_context *context, const char *text, void *place)
{
    struct train_constants *constants = (struct train_constants *)place;
    const char *equals = strchr(text, '=');
    (void)context;
    if (!equals || equals == text || !equals[1] || constants->count == CONSTANTS_MOST)
        return 0;
    constants->text[constants->count++] = text;
    return 1;
}

static const char *loss_names(size_t index)
{
    const char *name = pk_loss_name((pk_loss)(index + 1));
    return strcmp(name, "unknown") == 0 ? NULL : name;
}

/* "adamw beta1= beta2= ...", from the library's table. */
static const char *optimizer_names(size_t index)
{
    static char text[200];
    const char *name = index < 1000 ? pk_optimizer_name((pk_optimizer_kind)index) : NULL, *key;
    if (!name)
        return NULL;
    size_t used = (size_t)snprintf(text, sizeof text, "%s", name);
    for (size_t i = 0; (key = pk_optimizer_key((pk_optimizer_kind)index, i)) != NULL && used < 150; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, " %s=", key);
    return text;
}

#define PLACE(member) offsetof(train_settings, member)
static const program_option train_options[] = {
    {"--inputs", "X.npy", 1, PLACE(inputs), parse_text, NULL,
     "numbers, integers or bools; one example a row, the axes in the network's order", NULL},
    {"--targets", "Y.npy", 1, PLACE(targets), parse_text, NULL,
     "classes (N,), integers; or numbers (N,C), or (N,) where the network has one output", NULL},
    {"--network", "LINE", 1, PLACE(network), parse_text, NULL,
     "such as \"input 64; dense 32; tanh; dense 10\": layers separated by ;", pk_network_layer},
    {"--loss", "TEXT", 1, PLACE(loss), parse_loss, NULL,
     "the loss of an example, such as \"softmax_cross_entropy label_smoothing=0.1\"; a batch has their mean",
     loss_names},
    {"--rate", "SCHEDULE", 1, PLACE(rate), parse_text, NULL,
     "the learning rate: a number R; from R0 to R1 along half a cosine, over all steps or PERIOD;\n"
     "R times FACTOR every EVERY steps; from LOW up to HIGH and back; a rate for each step (S,);\n"
     "warmup:N: rises to a schedule over N steps, from a third of it as PyTorch's LinearLR",
     schedule_forms},
    {"--optimizer", "TEXT", 0, PLACE(optimizer), parse_optimizer, NULL,
     "such as \"adamw weight_decay=0.1\", with PyTorch's defaults; default sgd", optimizer_names},
    {"--steps", "S", 0, PLACE(steps), parse_positive_whole, "a whole number, 1 or more",
     "updates of the weights", NULL},
    {"--epochs", "E", 0, PLACE(epochs), parse_positive_whole, "a whole number, 1 or more",
     "in place of --steps: times that each example is used", NULL},
    {"--batch", "B", 0, PLACE(batch), parse_positive_whole, "a whole number, 1 or more",
     "examples in a step, in a new random order every epoch, whose last batch may be smaller;\n"
     "default: all of them, in their order",
     NULL},
    {"--in-order", NULL, 0, PLACE(in_order), parse_flag, NULL, "take batches in the order of the rows", NULL},
    {"--seed", "K", 0, PLACE(seed), parse_whole, "a whole number, 0 or more",
     "of the initial weights (PyTorch's default distributions) and of the batches; default 0", NULL},
    {"--init", "W.npy", 0, PLACE(init), parse_text, NULL,
     "the initial weights (P,), in PyTorch's order (parameters_to_vector); default: from the seed", NULL},
    {"--clip", "NORM", 0, PLACE(clip), parse_positive, "a positive number",
     "the largest norm of a step's gradient, as PyTorch's clip_grad_norm_", NULL},
    {"--group", "LINE", 0, PLACE(groups), parse_group, "one of at most 64 lines such as \"1,3 weight_decay=0\"",
     "tensors with options of their own, \"1,3 weight_decay=0 rate=0.1\" or \"0 frozen\"; repeatable", NULL},
    {"--constant", "NAME=A.npy", 0, PLACE(constants), parse_constant, "NAME=FILE.npy",
     "an array that the network names, as in \"propagate NAME\"; repeatable", NULL},
    {"--keep-every", "K", 0, PLACE(keep_every), parse_positive_whole, "a whole number, 1 or more",
     "record the weights of every K-th step; those between are computed again, bit for bit", NULL},
    {"--float32", NULL, 0, PLACE(float32), parse_flag, NULL, "record the weights as float32", NULL},
    {"--resume", NULL, 0, PLACE(resume), parse_flag, NULL,
     "go on with the run in NEW_RUN, which the same options began, to the same bits; begin it where\n"
     "there is none",
     NULL},
    OPTION_THREADS(train_settings),
    OPTION_MEMORY(train_settings),
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL, "print the phases on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* ---- what goes in -------------------------------------------------------------------------------------- */

static pk_status load_constant(void *user, pk_context *context, const char *name, pk_array *array)
{
    const struct train_constants *constants = (const struct train_constants *)user;
    const size_t length = strlen(name);
    for (size_t i = 0; i < constants->count; i++)
        if (strncmp(constants->text[i], name, length) == 0 && constants->text[i][length] == '=')
            return pk_array_map(context, constants->text[i] + length + 1, 0, array);
    /* What is not there gives the message: a file that has the name of the array. */
    char path[300];
    snprintf(path, sizeof path, "%.200s.npy (--constant %.60s=FILE.npy)", name, name);
    return pk_array_map(context, path, 0, array);
}

/* A status other than PK_OK as a line that names the option. */
static int refuse_training(const training *job, pk_status status, const char *option)
{
    return refuse("%s: %s", status == PK_MEMORY_LIMIT ? "--memory" : option, pk_message(&job->context));
}

static int read_network(training *job)
{
    struct train_constants constants = job->set->constants;
    const pk_constants named = {load_constant, &constants};
    const pk_status status = pk_network_parse_with(&job->context, job->set->network, &named, &job->graph);
    if (status)
        return refuse_training(job, status, "--network");
    if (!job->graph.parameters)
        return refuse("--network: the network has no parameters");
    return PROGRAM_GO_ON;
}

static int read_loss(training *job)
{
    const pk_status status = pk_criterion_parse(&job->context, job->set->loss, &job->criterion);
    return status ? refuse_training(job, status, "--loss") : PROGRAM_GO_ON;
}

/* The examples, and whether the network and the loss take them. */
static int read_examples(training *job)
{
    const train_settings *set = job->set;
    pk_context *context = &job->context;
    const pk_shape *shape = &job->graph.input_shape;
    pk_status status = pk_array_map(context, set->inputs, 0, &job->train.inputs);
    if (status)
        return refuse_training(job, status, "--inputs");
    status = pk_array_map(context, set->targets, 0, &job->train.targets);
    if (status)
        return refuse_training(job, status, "--targets");
    watch_array(set->inputs, &job->train.inputs);
    watch_array(set->targets, &job->train.targets);
    if (pk_array_check_rows(context, &job->train.inputs, shape->rank, shape->dims, set->inputs) != PK_OK)
        return refuse("--inputs: %s", pk_message(context));
    if (pk_dataset_check(context, &job->train, job->graph.input_width, job->graph.output_width) != PK_OK)
        return refuse("--inputs %s, --targets %s: %s", set->inputs, set->targets, pk_message(context));
    if (pk_criterion_check(context, &job->criterion, &job->train, job->graph.output_width) != PK_OK)
        return refuse("--targets: %s: %s", set->targets, pk_message(context));
    pk_real *row = NULL; /* tokens and the like, where the network restricts its inputs */
    status = pk_allocate(context, job->graph.input_width, sizeof *row, "a row of inputs", &row);
    for (size_t i = 0; !status && job->graph.checked && i < pk_dataset_examples(&job->train); i++) {
        const int64_t item = (int64_t)i;
        pk_dataset_inputs(&job->train, &item, 1, row);
        status = pk_graph_check_inputs(context, &job->graph, i, row);
    }
    pk_release(context, row);
    return status ? refuse_training(job, status, "--inputs") : PROGRAM_GO_ON;
}

/* w_0, from the seed or a file. */
static int read_weights(training *job)
{
    const train_settings *set = job->set;
    pk_context *context = &job->context;
    const size_t parameters = job->graph.parameters;
    pk_array given;
    char shape[200];
    if (pk_allocate(context, parameters, sizeof *job->weights, "the weights", &job->weights) != PK_OK)
        return refuse("--memory: %s", pk_message(context));
    if (!set->init)
        return pk_network_initialize(context, &job->graph, set->seed, job->weights) == PK_OK
                   ? PROGRAM_GO_ON
                   : refuse("--network: %s", pk_message(context));
    memset(&given, 0, sizeof given);
    if (pk_array_map(context, set->init, 0, &given) != PK_OK)
        return refuse("--init: %s", pk_message(context));
    int status = PROGRAM_GO_ON;
    if (pk_array_items(&given) != parameters || given.rank > 2 || (given.rank == 2 && given.shape[0] != 1))
        status = refuse("--init: %s has shape %s; the network has %zu parameters, (%zu,)", set->init,
                        shape_text(&given, shape), parameters, parameters);
    else
        pk_array_reals(&given, 0, parameters, job->weights);
    for (size_t p = 0; status < 0 && p < parameters; p++)
        if (!isfinite(job->weights[p]))
            status = refuse("--init: %s: weight %zu is %s", set->init, p,
                            isnan(job->weights[p]) ? "NaN" : "infinite");
    pk_array_release(context, &given);
    return status;
}

/* The number of steps, and what the library trains with. */
static int read_plan(training *job)
{
    const train_settings *set = job->set;
    pk_context *context = &job->context;
    pk_train_options *options = &job->options;
    pk_parameter_groups groups;
    char problem[400];
    const size_t examples = pk_dataset_examples(&job->train),
                 batch = set->batch && set->batch < examples ? set->batch : examples,
                 batches = (examples - 1) / batch + 1;
    if (set->epochs > SIZE_MAX / 16 / batches)
        return refuse("--epochs: %zu epochs of %zu steps are too many", set->epochs, batches);
    options->steps = set->epochs ? set->epochs * batches : set->steps;
    if (!schedule_read(context, set->rate, options->steps, &options->schedule, &job->rates, problem))
        return refuse("--rate: %s", problem);
    const pk_status status = pk_parameter_groups_parse(context, &job->graph, &set->optimizer, set->groups.count,
                                                       set->groups.line, &groups);
    if (status)
        return refuse_training(job, status, "--group");
    pk_parameter_groups_release(context, &groups);
    if (set->keep_every > PK_KEEP_EVERY_MOST)
        return refuse("--keep-every: %zu is more than %d", set->keep_every, (int)PK_KEEP_EVERY_MOST);
    options->criterion = &job->criterion;
    options->optimizer = set->optimizer;
    options->groups = set->groups.line;
    options->group_count = set->groups.count;
    options->batch_size = set->batch;
    options->shuffle_off = set->in_order;
    options->seed = set->seed;
    options->clip_norm = set->clip;
    options->record = set->run;
    options->resume = set->resume;
    options->record_float32 = set->float32;
    options->keep_every = set->keep_every;
    return PROGRAM_GO_ON;
}

/* ---- training ------------------------------------------------------------------------------------------ */

static int after_step(void *user, size_t step, double objective, const pk_real *weights)
{
    training *job = (training *)user;
    (void)weights, (void)step;
    if (isnan(job->first_objective))
        job->first_objective = objective;
    snprintf(job->progress.detail, sizeof job->progress.detail, ", step %zu of %zu, loss %.4g", step + 1,
             job->options.steps, objective);
    return 0;
}

/* The mean loss of all examples at the last weights, and how many of those with a class are classified correctly (right -1:
 * they have no classes). */
static pk_status measure(training *job, double *loss, size_t *classified, double *right)
{
    pk_context *context = &job->context;
    const size_t examples = pk_dataset_examples(&job->train), width = job->graph.input_width,
                 outputs = job->graph.output_width, most = 4096 / (width + outputs) + 1,
                 block = most < examples ? most : examples;
    pk_real *x = NULL, *f = NULL, *y = NULL;
    double weights = 0;
    const int classes =
        job->train.targets.rank == 1 && pk_type_is_integer(job->train.targets.type) && outputs > 1;
    int64_t items[4097];
    pk_criterion plain = job->criterion;
    plain.label_smoothing = 0;
    plain.weight = NULL;
    *loss = *right = 0;
    *classified = 0;
    pk_status status = pk_allocate(context, block, width * sizeof *x, "some inputs", &x);
    if (!status)
        status = pk_allocate(context, block, outputs * sizeof *f, "some outputs", &f);
    if (!status)
        status = pk_allocate(context, block, outputs * sizeof *y, "some targets", &y);
    for (size_t first = 0, count; !status && first < examples; first += count) {
        count = block < examples - first ? block : examples - first;
        for (size_t i = 0; i < count; i++)
            items[i] = (int64_t)(first + i);
        pk_dataset_inputs(&job->train, items, count, x);
        pk_criterion_targets(&job->criterion, &job->train, items, count, outputs, y);
        status = pk_graph_evaluate(context, &job->graph, job->weights, pk_matrix_view(x, count, width),
                                   pk_matrix_view(f, count, outputs));
        for (size_t i = 0; !status && i < count; i++) {
            double mean; /* of a batch of this example alone: 1 / its weight */
            pk_criterion_mean(&job->criterion, &job->train, items + i, 1, &mean);
            weights += 1 / mean;
            *loss += pk_criterion_value(&job->criterion, outputs, f + i * outputs, y + i * outputs);
        }
        /* Without smoothing and weights: 1 for the class, and 0 everywhere where the label is ignored. */
        if (!status && classes)
            pk_criterion_targets(&plain, &job->train, items, count, outputs, y);
        for (size_t i = 0; !status && classes && i < count; i++) {
            size_t largest = 0, class = 0;
            for (size_t c = 1; c < outputs; c++) {
                largest = f[i * outputs + c] > f[i * outputs + largest] ? c : largest;
                class = y[i * outputs + c] > y[i * outputs + class] ? c : class;
            }
            const int known = y[i * outputs + class] > 0;
            *classified += known != 0;
            *right += known && largest == class;
        }
    }
    *loss /= weights;
    if (!classes)
        *right = -1;
    pk_release(context, x);
    pk_release(context, f);
    pk_release(context, y);
    return status;
}

static void print_training(training *job)
{
    const pk_train_result *result = &job->result;
    const size_t examples = pk_dataset_examples(&job->train);
    const train_settings *set = job->set;
    char rule[256], took[32];
    double loss = 0, right = -1;
    size_t classified = 0;
    if (pk_optimizer_format(&set->optimizer, rule, sizeof rule) != PK_OK)
        rule[0] = 0;
    printf("run          %s: %s; %s; %s\n", set->run, job->graph.text, set->loss, rule);
    printf("sizes        %zu examples, %zu parameters, %zu steps of %zu example%s, seed %zu\n", examples,
           job->graph.parameters, result->steps, set->batch && set->batch < examples ? set->batch : examples,
           (set->batch ? set->batch : examples) == 1 ? "" : "s", set->seed);
    if (result->resumed)
        printf("             resumed after step %zu\n", result->resumed);
    if (result->steps > result->resumed)
        printf("loss         %.6g of the batch at the first step, %.6g at the last one\n", job->first_objective,
               result->objective);
    if (measure(job, &loss, &classified, &right) == PK_OK) {
        printf("             %.6g of all examples at the end", loss);
        if (right >= 0)
            printf(", %.0f of %zu classified correctly", right, classified);
        printf("\n");
    }
    printf("time         %s, %d thread%s\n", duration(program_seconds() - job->progress.begin, took),
           pk_threads(&job->context), pk_threads(&job->context) == 1 ? "" : "s");
    printf("next         pathkernel decompose %s --inputs TEST.npy --out DIR\n", set->run);
}

/* Of a folder that this call made: whatever is in it. */
static void remove_folder(const char *path)
{
    DIR *entries = opendir(path);
    for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            (void)unlinkat(dirfd(entries), entry->d_name, 0);
    if (entries)
        (void)closedir(entries);
    (void)rmdir(path);
}

/* What a call ends with that did not reach its last step. */
static int report_stop(training *job, pk_status status, int is_new)
{
    const train_settings *set = job->set;
    const size_t steps = job->result.steps;
    const char *message = pk_message(&job->context);
    if (is_new && steps == 0)
        remove_folder(set->run);
    if (is_new && steps == 0 && status == PK_CANCELLED)
        return refuse("cancelled before the first step: nothing was recorded");
    if (status == PK_CANCELLED)
        return refuse("cancelled: %zu of %zu steps are recorded in %s; --resume goes on from there", steps,
                      job->options.steps, set->run);
    if (status == PK_NOT_FINITE)
        return refuse("training diverged, %s; %s", message,
                      is_new && steps == 0 ? "nothing was recorded" : "the steps before it are recorded");
    if (status == PK_MEMORY_LIMIT)
        return refuse("--memory: %s", message);
    if (steps > job->result.resumed)
        return refuse("%s; %zu of %zu steps are recorded", message, steps, job->options.steps);
    return refuse("%s", message);
}

static int train(training *job)
{
    const train_settings *set = job->set;
    struct stat about;
    const int is_new = lstat(set->run, &about) != 0;
    if (!is_new && !set->resume)
        return refuse("%s is there already; a run is recorded into a new folder, and --resume goes on with one",
                      set->run);
    job->context.memory_limit = set->memory;
    int status = read_network(job);
    if (status < 0)
        status = read_loss(job);
    if (status < 0)
        status = read_examples(job);
    if (status < 0)
        status = read_plan(job);
    if (status < 0)
        status = read_weights(job);
    if (status >= 0)
        return status;
    catch_signals(&job->progress);
    job->options.on_step = after_step;
    job->options.user = job;
    job->first_objective = (double)NAN;
    pk_status trained =
        pk_train(&job->context, &job->graph, &job->train, &job->options, job->weights, &job->result);
    clear_line();
    if (trained)
        return report_stop(job, trained, is_new);
    print_training(job);
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("the run is in %s, but the summary could not be written: %s", set->run, strerror(errno));
    return PROGRAM_DONE;
}

static int run_train(const program_command *command, int count, char **arguments)
{
    train_settings set;
    training job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    if (!set.steps == !set.epochs)
        return refuse(set.steps ? "--steps and --epochs are both given; one of them tells how long to train"
                                : "--steps S or --epochs E is missing; --help tells how");
    job.set = &set;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = train(&job);
    pk_release(&job.context, job.weights);
    pk_array_release(&job.context, &job.rates);
    pk_dataset_release(&job.context, &job.train);
    pk_graph_release(&job.context, &job.graph);
    pk_criterion_release(&job.context, &job.criterion);
    return status;
}

const program_command train_command = {
    "train",
    "NEW_RUN",
    "folder for the run",
    "Trains a network on arrays and records the run.",
    "NEW_RUN is a folder that is not there yet. The run has the same bits for any number of threads.",
    "Exit status: 0 trained; 2 bad input, cancelled, out of space, or diverged (the steps before are "
    "recorded),\n"
    "with a line that says what and where.",
    train_options,
    run_train};
