/* pathkernel-decompose: decomposes the predictions of a recorded training run over its training examples.
 *
 *     pathkernel-decompose RUN --inputs X.npy --out DIR [options]        (--help lists them)
 *
 * Results are written as NAME.npy.part, part by part, and take their names all at once when the job ends (publish):
 * whoever reads DIR, and whoever finds it after a kill, has the older decomposition or the new one. DIR is locked
 * meanwhile. Inputs are read as they are needed. After a cancel or a full disk the files hold the rows that are
 * complete. Exit status: 0 closed within the tolerance and explained by the run, 1
 * computed but not so, 2 anything else, with one line on standard error.
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define PROGRAM "pathkernel-decompose"

/* Exit statuses; and what a part of the job ends with that needs more memory than it may have. */
enum { CLOSED = 0, NOT_CLOSED = 1, FAILED = 2, OVER_LIMIT = 3 };
enum { FILES_MOST = 16, SHOWN_INPUTS = 10, THREADS_MOST = 1024 };

static const char usage[] =
    "usage: " PROGRAM " RUN --inputs X.npy --out DIR [options]\n"
    "\n"
    "Decomposes the outputs of the network that RUN ends with, on the inputs of X.npy (M, ...):\n"
    "    final = initial + sum over the training examples + decay + unattributed + closure\n"
    "\n"
    "  --inputs X.npy        numbers, integers or bools; one input a row, the axes in the network's order\n"
    "  --out DIR             where the results go; made if it is not there\n"
    "  --keep KIND           train: by_example.npy (M,C,N), the default; step: by_step.npy (M,C,S);\n"
    "                        layer: by_layer.npy (M,C,L). Repeatable; train,step and the like keep both axes:\n"
    "                        by_example_step.npy (M,C,N,S)\n"
    "  --outputs WHICH       all (default), label (each input's label), or the number of one output, from 0\n"
    "  --labels Y.npy        each input's label (M,), integers; default: the label predicted at the end\n"
    "  --quadrature RULE     auto (default), exact, gauss:N, midpoint:N, trapezoid:N or left, N nodes a step\n"
    "  --until K             decompose the outputs after step K instead of the last one (early stopping)\n"
    "  --unattributed LIMIT  of unattributed / max(1, |final|); default: what rounding leaves of a run of its "
    "precision\n"
    "                        and length: 4e-4 of 1000 steps in float32, 1e-10 in float64\n"
    "  --recover             open a run whose files differ by more than a kill leaves, up to the shortest "
    "file\n"
    "  --tolerance T         of closure / the row's largest contribution; default 1e-10 (built in float: "
    "1e-3)\n"
    "  --bounds              also bounds.npy (M,C,N): a bound on the error of every entry of by_example.npy\n"
    "  --step-closure        also closure_by_step.npy (M,C,S)\n"
    "  --top K               print the K strongest examples for and against each input;\n"
    "                        default 3, of the first 10 inputs\n"
    "  --threads N           default: all; the results do not depend on it\n"
    "  --memory SIZE         the most memory for data, such as 2G, 64M or 512K; default 2G;\n"
    "                        the results do not depend on it\n"
    "  --rows-at-once R      inputs in one pass over the run, that is, in one part that survives a cancel\n"
    "  --verbose             print the plan, the phases and the finished parts on standard error\n"
    "  --help, --version\n"
    "\n"
    "Exit status: 0 closed within the tolerance, and unattributed within its limit; 1 computed, but one of "
    "them is\n"
    "not (results are written; a line tells which and what it means);\n"
    "2 bad input, cancelled or out of space (complete rows are kept), with a line that says what and where.\n";

typedef struct settings {
    const char *run, *inputs, *out, *labels;
    pk_decompose_options options;
    char outputs; /* 'a'll, 'l'abel, 'n'umber */
    size_t top;   /* strongest examples per input and sign */
    int top_given, threads, verbose, recover;
    const char *until; /* as it was given */
    size_t last;       /* its step */
    size_t memory;
} settings;

/* One result file. */
typedef struct result {
    char name[48];
    char *path, *partial; /* DIR/name, DIR/name.part */
    int rank, made;       /* made: the .part is ours */
    size_t row_shape[PK_ARRAY_RANK], row_items;
    pk_array_writer writer;
} result;

typedef struct task {
    settings *set;
    pk_context context;
    pk_run run;
    pk_array inputs; /* an open file */
    int64_t *labels; /* rows, or NULL */
    size_t rows, outputs, finished;
    size_t recorded; /* steps of the run */
    result files[FILES_MOST];
    size_t file_count;
    int folder;                  /* DIR, locked: its descriptor + 1; 0: none */
    int made_folder, top_hidden; /* by_example is kept for the list of the strongest only */
    size_t *strongest;           /* set->top */
    /* Progress: */
    int terminal, line_shown;
    const char *phase;
    double begin, phase_begin, last_shown;
} task;

/* ---- messages ------------------------------------------------------------------------------------------ */

static int line_on_terminal; /* a progress line stands on the terminal */

static void clear_line(void)
{
    if (line_on_terminal)
        fprintf(stderr, "\r%78s\r", "");
    line_on_terminal = 0;
}

/* One line on standard error, whatever the arguments contain. */
PK__FORMAT(1, 2)
static int refuse(const char *format, ...)
{
    char text[1600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *at = text; *at; at++)
        if ((unsigned char)*at < ' ' || *at == 127)
            *at = '?';
    fflush(stdout);
    clear_line();
    fprintf(stderr, PROGRAM ": %s\n", text);
    return FAILED;
}

static const char *duration(double seconds, char text[32])
{
    if (seconds < 10)
        snprintf(text, 32, "%.*f s", seconds < 0.1 ? 3 : seconds < 1 ? 2 : 1, seconds);
    else if (seconds < 60)
        snprintf(text, 32, "%.0f s", seconds);
    else if (seconds < 3600)
        snprintf(text, 32, "%d min %02d s", (int)seconds / 60, (int)seconds % 60);
    else
        snprintf(text, 32, "%.0f h %02d min", floor(seconds / 3600), (int)(fmod(seconds, 3600) / 60));
    return text;
}

static const char *size_text(double bytes, char text[32])
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    for (; bytes >= 1024 && unit < 4; unit++)
        bytes /= 1024;
    snprintf(text, 32, "%.*f %s", unit && bytes < 100 ? 1 : 0, bytes, units[unit]);
    return text;
}

static const char *shape_text(const pk_array *array, char text[200])
{
    size_t used = 0;
    text[used++] = '(';
    for (int i = 0; i < array->rank && used < 160; i++)
        used += (size_t)snprintf(text + used, 200 - used, "%s%zu", i ? ", " : "", array->shape[i]);
    snprintf(text + used, 200 - used, array->rank == 1 ? ",)" : ")");
    return text;
}

/* ---- arguments ----------------------------------------------------------------------------------------- */

/* A whole number, and nothing else. */
static int parse_count(const char *text, size_t *count)
{
    char *end = NULL;
    errno = 0;
    if (*text < '0' || *text > '9')
        return 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || *end || value > SIZE_MAX)
        return 0;
    *count = (size_t)value;
    return 1;
}

/* 512K, 64M, 2G, 1T (powers of 1024), 1.5G, or plain bytes. */
static int parse_memory(const char *text, size_t *bytes)
{
    char *end = NULL;
    if (!((*text >= '0' && *text <= '9') || *text == '.') || text[strspn(text, "0123456789.")] == 'x')
        return 0;
    double value = strtod(text, &end);
    const char *units = "KMGT", *unit = *end ? strchr(units, *end >= 'a' ? *end - 'a' + 'A' : *end) : NULL;
    if (unit) {
        value *= ldexp(1, 10 * (int)(unit - units + 1));
        end++;
        end += end[0] == 'i' && end[1] == 'B' ? 2 : end[0] == 'B';
    }
    if (*end || !(value >= 1) || value > 9e18 || value > (double)SIZE_MAX / 2)
        return 0;
    *bytes = (size_t)value;
    return 1;
}

static int parse_positive(const char *text, double *number)
{
    char *end = NULL;
    *number = strtod(text, &end);
    return end != text && !*end && *number > 0 && isfinite(*number);
}

static int parse_quadrature(const char *text, pk_quadrature *quadrature)
{
    static const struct {
        const char *name;
        pk_rule rule;
        int nodes; /* 0: takes no count, 1: may have one, 2: needs one */
    } rules[] = {{"auto", PK_RULE_AUTO, 0},         {"exact", PK_RULE_EXACT, 0},
                 {"gauss", PK_RULE_GAUSS, 2},       {"left", PK_RULE_LEFT, 1},
                 {"midpoint", PK_RULE_MIDPOINT, 2}, {"trapezoid", PK_RULE_TRAPEZOID, 2}};
    size_t length = strcspn(text, ":"), nodes = 0;
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        if (strlen(rules[i].name) != length || strncmp(rules[i].name, text, length) != 0)
            continue;
        if (text[length] ? !rules[i].nodes : rules[i].nodes == 2)
            return 0;
        if (text[length] && (!parse_count(text + length + 1, &nodes) || nodes < 1 || nodes > PK_RULE_NODES))
            return 0;
        quadrature->rule = rules[i].rule;
        quadrature->nodes = (int)nodes;
        return 1;
    }
    return 0;
}

/* "train", "step", "layer", or several with commas between. */
static int parse_keep(const char *text, unsigned keep[PK_KEPT])
{
    static const char *const names[] = {"train", "step", "layer"};
    static const unsigned axes[] = {PK_BY_EXAMPLE, PK_BY_STEP, PK_BY_LAYER};
    unsigned wanted = 0;
    for (;; text++) {
        size_t length = strcspn(text, ","), i = 0;
        while (i < 3 && (strlen(names[i]) != length || strncmp(names[i], text, length) != 0))
            i++;
        if (i == 3)
            return 0;
        wanted |= axes[i];
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

/* Whether arguments[*at] is the option; then *value is what follows it, NULL where nothing does. */
static int is_option(char **arguments, int *at, const char *option, const char **value)
{
    size_t length = strlen(option);
    if (strncmp(arguments[*at], option, length) != 0 ||
        (arguments[*at][length] && arguments[*at][length] != '='))
        return 0;
    if (arguments[*at][length]) {
        *value = arguments[*at] + length + 1;
        return 1;
    }
    *value = arguments[++*at];
    if (*value && strncmp(*value, "--", 2) == 0) /* the next option; --out=--name is for such a name */
        *value = NULL;
    return 1;
}

/* -1: go on; otherwise the exit status. */
static int parse_arguments(int count, char **arguments, settings *set)
{
    pk_decompose_options *options = &set->options;
    memset(set, 0, sizeof *set);
    set->outputs = 'a';
    set->top = 3;
    set->memory = (size_t)2 << 30;
    int only_names = 0;
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i], *value = argument, *wanted = NULL;
        size_t number = 0;
        if (only_names || argument[0] != '-' || !argument[1]) {
            if (set->run)
                return refuse("'%s': only one run can be decomposed, and that is '%s'", argument, set->run);
            set->run = argument;
        } else if (strcmp(argument, "--") == 0) {
            only_names = 1;
        } else if (strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0) {
            return fputs(usage, stdout) < 0 || fflush(stdout) != 0 ? FAILED : CLOSED;
        } else if (strcmp(argument, "--version") == 0) {
            return printf(PROGRAM " %s\n", pk_version()) < 0 || fflush(stdout) != 0 ? FAILED : CLOSED;
        } else if (strcmp(argument, "--bounds") == 0) {
            options->bounds = 1;
        } else if (strcmp(argument, "--step-closure") == 0) {
            options->step_closure = 1;
        } else if (strcmp(argument, "--verbose") == 0) {
            set->verbose = 1;
        } else if (strcmp(argument, "--recover") == 0) {
            set->recover = 1;
        } else if (is_option(arguments, &i, "--inputs", &value)) {
            set->inputs = value;
        } else if (is_option(arguments, &i, "--out", &value)) {
            set->out = value;
        } else if (is_option(arguments, &i, "--labels", &value)) {
            set->labels = value;
        } else if (is_option(arguments, &i, "--keep", &value)) {
            if (value && !parse_keep(value, options->keep))
                wanted = "train, step or layer";
        } else if (is_option(arguments, &i, "--outputs", &value)) {
            set->outputs = value && strcmp(value, "label") == 0 ? 'l'
                           : value && strcmp(value, "all") == 0 ? 'a'
                                                                : 'n';
            if (value && set->outputs == 'n' && !parse_count(value, &options->readout.output))
                wanted = "all, label or the number of an output, counted from 0";
        } else if (is_option(arguments, &i, "--quadrature", &value)) {
            if (value && !parse_quadrature(value, &options->quadrature))
                wanted = "auto, exact, gauss:N, midpoint:N, trapezoid:N or left, with N from 1 to 1000000";
        } else if (is_option(arguments, &i, "--tolerance", &value)) {
            if (value && !parse_positive(value, &options->tolerance))
                wanted = "a positive number";
        } else if (is_option(arguments, &i, "--unattributed", &value)) {
            if (value && !parse_positive(value, &options->unattributed))
                wanted = "a positive number";
        } else if (is_option(arguments, &i, "--until", &value)) {
            set->until = value;
            if (value && !parse_count(value, &set->last))
                wanted = "the number of a step: of 12 steps, from 0 to 12";
        } else if (is_option(arguments, &i, "--top", &value)) {
            set->top_given = 1;
            if (value && !parse_count(value, &set->top))
                wanted = "a whole number, 0 or more";
        } else if (is_option(arguments, &i, "--threads", &value)) {
            if (value && (!parse_count(value, &number) || number < 1 || number > THREADS_MOST))
                wanted = "a whole number from 1 to 1024";
            set->threads = (int)number;
        } else if (is_option(arguments, &i, "--rows-at-once", &value)) {
            if (value && (!parse_count(value, &options->rows_at_once) || !options->rows_at_once))
                wanted = "a whole number, 1 or more";
        } else if (is_option(arguments, &i, "--memory", &value)) {
            if (value && !parse_memory(value, &set->memory))
                wanted = "a size such as 2G, 64M or 512K";
        } else {
            return refuse("unknown option '%s'; --help lists them", argument);
        }
        if (!value || !*value)
            return refuse("%.*s needs a value; --help tells which", (int)strcspn(argument, "="), argument);
        if (wanted)
            return refuse("%.*s: '%s' is not %s", (int)strcspn(argument, "="), argument, value, wanted);
    }
    if (!set->run)
        return refuse("no run directory is given; --help tells how");
    if (!set->inputs || !set->out)
        return refuse("%s is missing; --help tells how", set->inputs ? "--out DIR" : "--inputs X.npy");
    return -1;
}

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

/* Labels := the largest outputs at w_S. */
static int predict_labels(task *job)
{
    pk_context *context = &job->context;
    const size_t outputs = job->run.outputs, width = job->run.graph.input_width, block = rows_in_hand(job);
    pk_real *weights = NULL, *f = NULL, *rows = NULL;
    pk_replay replay;
    memset(&replay, 0, sizeof replay);
    pk_status status = pk_allocate(context, job->run.parameters, sizeof *weights, "the weights", &weights);
    if (!status)
        status = pk_allocate(context, block, outputs * sizeof *f, "the predictions", &f);
    if (!status)
        status = pk_allocate(context, block, width * sizeof *rows, "some inputs", &rows);
    if (!status)
        status = pk_allocate(context, job->rows, sizeof *job->labels, "the labels", &job->labels);
    if (!status)
        status =
            pk_replay_prepare(context, &job->run, 0, &replay); /* the last step may lie between kept ones */
    if (!status)
        status = pk_replay_weights(context, &replay, job->run.steps, weights);
    pk_replay_release(context, &replay);
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

static int folder_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* The folder and those above it. */
static int make_folder(task *job)
{
    const char *out = job->set->out;
    char *path = (char *)malloc(strlen(out) + 1);
    if (!path)
        return refuse("--out: no memory");
    strcpy(path, out);
    for (char *at = path + 1; *path && *at; at++)
        if (*at == '/' && at[-1] != '/') {
            *at = 0;
            (void)mkdir(path, 0777);
            *at = '/';
        }
    job->made_folder = mkdir(path, 0777) == 0;
    int reason = errno;
    free(path);
    if (!job->made_folder && !(reason == EEXIST && folder_exists(out)))
        return refuse("--out: %s: the folder cannot be made: %s", out,
                      reason == EEXIST ? "there is a file of that name" : strerror(reason));
    if (access(out, W_OK | X_OK) != 0)
        return refuse("--out: %s: the folder cannot be written: %s", out, strerror(errno));
    const int folder = pk__open_above(AT_FDCWD, out, O_RDONLY | O_DIRECTORY);
    if (folder < 0)
        return refuse("--out: %s: the folder cannot be opened: %s", out, strerror(errno));
    job->folder = folder + 1;
    /* Where the file system has no locks, go without. */
    if (flock(folder, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return refuse("--out: %s is being written by another program", out);
    return -1;
}

static void name_kept(unsigned axes, char name[48])
{
    snprintf(name, 48, "by%s%s%s.npy", axes & PK_BY_EXAMPLE ? "_example" : "", axes & PK_BY_STEP ? "_step" : "",
             axes & PK_BY_LAYER ? "_layer" : "");
}

static pk_status add_file(task *job, const char *name, size_t count, const size_t *sizes)
{
    result *file = &job->files[job->file_count++];
    size_t length = strlen(job->set->out) + sizeof file->name + 8;
    snprintf(file->name, sizeof file->name, "%s", name);
    file->rank = 2;
    file->row_shape[0] = file->row_items = job->outputs;
    for (size_t i = 0; i < count; i++) {
        file->row_shape[file->rank++ - 1] = sizes[i];
        if (!pk__multiply(file->row_items, sizes[i], &file->row_items))
            file->row_items = SIZE_MAX; /* the decomposition itself refuses this */
    }
    pk_status status = pk_allocate(&job->context, length, 1, "a path", &file->path);
    if (!status)
        status = pk_allocate(&job->context, length, 1, "a path", &file->partial);
    if (status)
        return status;
    snprintf(file->path, length, "%s/%s", job->set->out, name);
    snprintf(file->partial, length, "%s/%s.part", job->set->out, name);
    return PK_OK;
}

/* The large ones first, so that a full disk shows before the small ones have grown. The order is that of
 * rows_of(). */
static pk_status list_files(task *job)
{
    static const char *const always[] = {"initial.npy", "final.npy", "decay.npy", "unattributed.npy",
                                         "closure.npy"};
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
    return status;
}

/* The rows that a part adds to each file, in the order of list_files(). */
static void rows_of(const task *job, const pk_decomposition *part, const double *rows[FILES_MOST])
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
}

/* ---- results take their names ---------------------------------------------------------------------------
 * All at once, so that DIR holds the old results or the new ones at any moment, whatever is killed when:
 *   1. the new files move to DIR/.pathkernel/new, and hard links to the old ones to DIR/.pathkernel/old;
 *   2. every NAME becomes a symbolic link to .pathkernel/current/NAME, where current -> old;
 *   3. one rename makes current -> new: from here on the new results are there;
 *   4. the new files take the places of the links, and the folder goes.
 * What a kill leaves of it, the next job brings to its end (settle). Where a file system has no links, or no room
 * for them, the files are renamed one after the other. */

#define WORK ".pathkernel"

static const char *work_path(const char *part, const char *name, char path[96])
{
    snprintf(path, 96, WORK "/%s%s%s", part, *name ? "/" : "", name);
    return path;
}

static const char *const work_parts[] = {"new", "old", "links"};

/* Removes DIR/.pathkernel and the files in it; nothing else. */
static void remove_work(int folder)
{
    static const char *const links[] = {"current", "next"};
    char path[96];
    for (int i = 0; i < 2; i++)
        (void)unlinkat(folder, work_path(links[i], "", path), 0);
    for (int i = 0; i < 3; i++) {
        const int part =
            pk__open_above(folder, work_path(work_parts[i], "", path), O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        DIR *entries = part < 0 ? NULL : fdopendir(part);
        for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;)
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                (void)unlinkat(part, entry->d_name, 0);
        if (entries)
            (void)closedir(entries);
        else if (part >= 0)
            (void)close(part);
        (void)unlinkat(folder, path, AT_REMOVEDIR);
    }
    (void)unlinkat(folder, WORK, AT_REMOVEDIR);
}

/* Files in the places of all links to DIR/.pathkernel/current; then that folder goes. Where a link has to stay, so has
 * what it leads to: the next job tries again. */
static void settle(int folder)
{
    static const char begin[] = WORK "/current/";
    struct stat about;
    if (fstatat(folder, WORK, &about, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(about.st_mode))
        return;
    int stays = 0;
    for (int changed = 1; changed;) {
        changed = stays = 0;
        const int again = pk__open_above(folder, ".", O_RDONLY | O_DIRECTORY);
        DIR *entries = again < 0 ? NULL : fdopendir(again);
        for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;) {
            char target[96];
            const ssize_t length = readlinkat(folder, entry->d_name, target, sizeof target - 1);
            if (length < (ssize_t)sizeof begin || strncmp(target, begin, sizeof begin - 1) != 0)
                continue;
            target[length] = 0;
            /* To nothing: of a result that the older decomposition does not have. */
            const int gone = renameat(folder, target, folder, entry->d_name) == 0 ||
                             (errno == ENOENT && unlinkat(folder, entry->d_name, 0) == 0);
            changed |= gone;
            stays |= !gone;
        }
        stays |= !entries;
        if (entries)
            (void)closedir(entries);
        else if (again >= 0)
            (void)close(again);
    }
    if (!stays)
        remove_work(folder);
}

/* Makes DIR/.pathkernel now, while there is room. */
static pk_status make_work(task *job)
{
    const int folder = job->folder - 1;
    char path[96];
    settle(folder);
    int made = mkdirat(folder, WORK, 0777) == 0;
    for (int i = 0; made && i < 3; i++)
        made = mkdirat(folder, work_path(work_parts[i], "", path), 0777) == 0;
    return made ? PK_OK
                : pk__fail(&job->context, PK_IO, "%s/" WORK ": cannot be made: %s", job->set->out,
                           strerror(errno));
}

/* Steps 1 and 2 up to where names change; 0 where there can be no links. */
static int prepare_links(task *job)
{
    const int folder = job->folder - 1;
    char path[96], target[96];
    struct stat about;
    int good = symlinkat("old", folder, work_path("current", "", path)) == 0 &&
               symlinkat("new", folder, work_path("next", "", path)) == 0;
    for (size_t i = 0; good && i < job->file_count; i++) {
        const char *name = job->files[i].name;
        good = symlinkat(work_path("current", name, target), folder, work_path("links", name, path)) == 0;
        if (good && fstatat(folder, name, &about, AT_SYMLINK_NOFOLLOW) == 0)
            good = linkat(folder, name, folder, work_path("old", name, path), 0) == 0;
    }
    return good;
}

/* Whether the new results replace older ones; then they reach the disk first. */
static int reach_disk(task *job)
{
    const int folder = job->folder - 1;
    struct stat about;
    const char *kind;
    char path[96];
    int replaces = 0, good = 1;
    for (size_t i = 0; i < job->file_count; i++)
        replaces |= fstatat(folder, job->files[i].name, &about, AT_SYMLINK_NOFOLLOW) == 0;
    for (size_t i = 0; good && replaces && i < job->file_count; i++) {
        const int file = pk__open_regular(folder, work_path("new", job->files[i].name, path), O_RDONLY, &kind);
        good = file >= 0 && fsync(file) == 0;
        if (file >= 0)
            (void)close(file);
    }
    return good;
}

/* Gives the complete .part files their names. 0 with errno, and *name of the file that could not be replaced. */
static int publish(task *job, const char **name)
{
    const int folder = job->folder - 1;
    struct stat about;
    char path[96];
    for (size_t i = 0; i < job->file_count; i++) {
        *name = job->files[i].name;
        errno = EISDIR;
        if (fstatat(folder, *name, &about, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(about.st_mode))
            return 0;
    }
    for (size_t i = 0; i < job->file_count; i++) {
        char partial[96];
        *name = job->files[i].name;
        snprintf(partial, sizeof partial, "%s.part", *name);
        if (renameat(folder, partial, folder, work_path("new", *name, path)) != 0)
            return 0;
        job->files[i].made = 0;
    }
    if (!reach_disk(job))
        return 0;
    const int linked = prepare_links(job);
    for (size_t i = 0; linked && i < job->file_count; i++) {
        *name = job->files[i].name;
        if (renameat(folder, work_path("links", *name, path), folder, *name) != 0)
            return 0;
    }
    if (linked && renameat(folder, WORK "/next", folder, WORK "/current") != 0)
        return 0;
    for (size_t i = 0; i < job->file_count; i++) {
        *name = job->files[i].name;
        if (renameat(folder, work_path("new", *name, path), folder, *name) != 0)
            return 0;
    }
    return 1;
}

static pk_status create_files(task *job)
{
    pk_status status = make_work(job);
    for (size_t i = 0; !status && i < job->file_count; i++) {
        result *file = &job->files[i];
        if (file->row_items) /* a run of no steps has nothing by step: see publish_files */
            status = pk_array_create(&job->context, file->partial, PK_FLOAT64, file->rank, file->row_shape,
                                     &file->writer);
        file->made = status == PK_OK;
    }
    return status;
}

/* Closes the files with exactly the finished rows and gives them their names; none: removes them. */
static pk_status publish_files(task *job)
{
    pk_context *context = &job->context;
    const char *name = NULL;
    pk_status status = PK_OK;
    for (size_t i = 0; i < job->file_count; i++) {
        result *file = &job->files[i];
        pk_status closed = PK_OK;
        if (file->writer.file) {
            size_t rows = file->writer.rows;
            closed = pk_array_close(context, &file->writer);
            if (!closed && job->finished && rows != job->finished) {
                closed = pk_array_reopen(context, file->partial, PK_FLOAT64, file->rank, file->row_shape,
                                         job->finished, &file->writer);
                if (!closed)
                    closed = pk_array_close(context, &file->writer);
            }
        } else if (job->finished && !file->row_items) {
            size_t shape[PK_ARRAY_RANK] = {job->finished};
            memcpy(shape + 1, file->row_shape, (size_t)(file->rank - 1) * sizeof *shape);
            closed = pk_array_write(context, file->partial, PK_FLOAT64, file->rank, shape, NULL);
        }
        status = status ? status : closed;
    }
    if (job->finished && !status && !publish(job, &name))
        status =
            pk__fail(context, PK_IO, "%s/%s: cannot be replaced: %s", job->set->out, name, strerror(errno));
    for (size_t i = 0; i < job->file_count; i++)
        if (job->files[i].made)
            (void)unlink(job->files[i].partial);
    settle(job->folder - 1);
    if (!job->finished && job->made_folder)
        (void)rmdir(job->set->out);
    return status;
}

/* ---- printed along the way ----------------------------------------------------------------------------- */

static void print_examples(const task *job, const double *values, int sign, const char *word)
{
    const pk_array *targets = &job->run.train.targets;
    size_t found = pk_strongest(values, job->run.examples, sign, job->set->top, job->strongest);
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
    const settings *set = job->set;
    const double *by_example = part->by_example;
    for (size_t r = 0; r < part->rows && by_example; r++) {
        size_t row = part->first_row + r, cell = r * part->outputs, output = 0;
        size_t predicted = largest_of(part->final + cell, part->outputs);
        if (row >= SHOWN_INPUTS && !set->top_given)
            return;
        if (row == 0)
            printf("strongest examples of each input: row of train_inputs.npy%s, contribution\n",
                   job->run.train.targets.rank == 1 && pk_type_is_integer(job->run.train.targets.type)
                       ? " (label)"
                   : job->run.outputs == 1 ? " (target)"
                                           : "");
        printf("input %zu: ", row);
        if (set->outputs == 'a' && part->outputs > 1) {
            output = job->labels ? (size_t)job->labels[row] : predicted;
            printf("predicted %zu; output %zu", predicted, output);
        } else {
            printf("output %zu", set->outputs == 'l'   ? (size_t)job->labels[row]
                                 : set->outputs == 'n' ? set->options.readout.output
                                                       : (size_t)0);
        }
        cell += output;
        printf(" = %.6g = initial %.6g, examples %+.6g", part->final[cell], part->initial[cell],
               part->data[cell]);
        if (part->decay[cell] != 0)
            printf(", decay %+.4g", part->decay[cell]);
        printf(", rest %+.1e\n", part->unattributed[cell] + part->closure[cell]);
        print_examples(job, by_example + cell * part->examples, +1, "for");
        print_examples(job, by_example + cell * part->examples, -1, "against");
    }
}

static volatile sig_atomic_t signalled, tell_signal;

/* A second signal ends the program at once: the handler is installed for one. */
static void on_signal(int number)
{
    static const char text[] = " stopping after the steps in hand; once more ends at once\n";
    int reason = errno;
    signalled = number;
    if (tell_signal && write(STDERR_FILENO, text, sizeof text - 1) < 0)
        tell_signal = 0;
    errno = reason;
}

static void catch_signals(int terminal)
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, old;
    tell_signal = terminal;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = on_signal;
    action.sa_flags = (int)SA_RESETHAND;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN) /* nohup */
            (void)sigaction(numbers[i], &action, NULL);
    (void)signal(SIGPIPE, SIG_IGN); /* `| head` must not cost the results */
#ifdef SIGXFSZ
    (void)signal(SIGXFSZ, SIG_IGN); /* a file size limit is a full disk, not a reason to die */
#endif
}

/* The mapped files, for the signal that tells that one has become shorter. */
static struct mapped {
    const char *name, *begin, *end;
} mapped[PK__RUN_FILES + 2];
static size_t mapped_count;

static void on_shrunk(int number, siginfo_t *info, void *machine)
{
    static const char begin[] = PROGRAM ": ", end[] = " became shorter while it was read\n";
    const char *at = (const char *)info->si_addr, *name = "a file";
    (void)number;
    (void)machine;
    for (size_t i = 0; i < mapped_count; i++)
        if (at >= mapped[i].begin && at < mapped[i].end)
            name = mapped[i].name;
    if (write(STDERR_FILENO, begin, sizeof begin - 1) < 0 || write(STDERR_FILENO, name, strlen(name)) < 0 ||
        write(STDERR_FILENO, end, sizeof end - 1) < 0)
        _exit(FAILED);
    _exit(FAILED); /* the older decomposition stays, and the next job tidies up */
}

static void watch_mappings(task *job)
{
    struct sigaction action;
    mapped_count = 0;
    for (int f = 0; f < PK__RUN_FILES + 2; f++) {
        const pk_array *array = f < PK__RUN_FILES    ? pk__run_array(&job->run, f)
                                : f == PK__RUN_FILES ? &job->run.train.inputs
                                                     : &job->run.train.targets;
        if (!array->mapping)
            continue;
        mapped[mapped_count].name =
            f < PK__RUN_FILES ? pk__run_files[f].name : pk__run_fixed[f - PK__RUN_FILES];
        mapped[mapped_count].begin = (const char *)array->mapping;
        mapped[mapped_count++].end = (const char *)array->mapping + array->mapping_bytes;
    }
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_sigaction = on_shrunk;
    action.sa_flags = SA_SIGINFO;
    (void)sigaction(SIGBUS, &action, NULL);
}

static int on_progress(void *user, const char *phase, double fraction)
{
    task *own = (task *)user;
    double now = pk__seconds();
    char took[32], left[32];
    if (!own->phase || strcmp(own->phase, phase) != 0) {
        own->phase = phase;
        own->phase_begin = now;
        if (own->set->verbose) {
            clear_line();
            fprintf(stderr, PROGRAM ": %s, after %s\n", phase, duration(now - own->begin, took));
        }
    }
    if (signalled) {
        line_on_terminal = 0; /* the handler wrote below it */
        return 1;
    }
    if (own->terminal && now - own->begin > 0.3 && now - own->last_shown > 0.1) {
        double spent = now - own->phase_begin;
        char line[128];
        own->last_shown = now;
        int used = snprintf(line, sizeof line, "%s %3.0f %%", phase, floor(100 * fraction));
        if (own->finished)
            used += snprintf(line + used, sizeof line - (size_t)used, ", %zu of %zu inputs", own->finished,
                             own->rows);
        used +=
            snprintf(line + used, sizeof line - (size_t)used, ", %s", duration(floor(now - own->begin), took));
        if (spent > 1 && fraction > 0.01)
            snprintf(line + used, sizeof line - (size_t)used, ", about %s left",
                     duration(ceil(spent * (1 - fraction) / fraction), left));
        fprintf(stderr, "\r%-77.77s", line);
        fflush(stderr);
        line_on_terminal = 1;
    }
    return 0;
}

static pk_status on_part(void *user, const pk_decomposition *part)
{
    task *own = (task *)user;
    const double *rows[FILES_MOST];
    char took[32];
    rows_of(own, part, rows);
    for (size_t i = 0; i < own->file_count; i++) {
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
    clear_line();
    if (own->set->verbose)
        fprintf(stderr, PROGRAM ": %zu of %zu inputs complete, after %s\n", own->finished, own->rows,
                duration(pk__seconds() - own->begin, took));
    if (own->set->top)
        print_strongest(own, part);
    fflush(stdout);
    return PK_OK;
}

/* ---- the job ------------------------------------------------------------------------------------------- */

/* Inputs in one pass. Each pass reads the run and computes the examples' gradients anew, and each finished one
 * survives a cancel: passes of about half a minute, long enough that the gradients cost under a tenth of them,
 * results of at most a quarter of the memory; one pass where all takes less than a minute. */
static size_t choose_rows(const task *job)
{
    const pk_run *run = &job->run;
    const double steps = (double)run->steps, items = (double)run->batch_offsets[run->steps], points = 6;
    const double outputs = (double)job->outputs, P = (double)run->parameters,
                 threads = pk_threads(&job->context);
    const int stateful = !pk_optimizer_stateless(&run->optimizer);
    double widths = 0, bytes = 0;
    for (size_t l = 0; l < run->graph.layers; l++)
        widths += 2 * (double)pk_graph_layer(&run->graph, l)->width;
    for (size_t i = 0; i < job->file_count; i++)
        bytes += 8 * (double)job->files[i].row_items;
    /* Operations: per training example in a pass, per test input. */
    double example_side = 6 * P * items;
    double row = outputs * (items * (stateful ? 2 * P : 2 * points * widths) + 6 * points * P * steps);
    row *= job->set->options.bounds ? 3 : 1;
    const double rate = 8e9 * threads, rows = (double)job->rows,
                 block = (double)pk__integral_block(&job->run.graph, job->outputs);
    double wanted = (row * rows + example_side) / rate < 60
                        ? rows
                        : fmax(fmax(30 * rate / row, 10 * example_side / row), 4 * threads * block);
    wanted = fmax(block, fmin(wanted, (double)job->set->memory / 4 / fmax(bytes, 1)));
    double passes = ceil(rows / fmin(wanted, rows));
    return (size_t)fmax(1, ceil(rows / passes));
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
    fprintf(stderr,
            PROGRAM
            ": plan: %zu pass%s over the run, %zu of %zu inputs and %zu of %zu outputs in each, %zu thread%s, "
            "%zu steps prepared at a time",
            plan.passes, plan.passes == 1 ? "" : "es", plan.rows, job->rows, plan.outputs, job->outputs,
            plan.threads, plan.threads == 1 ? "" : "s", plan.window);
    if (pk_optimizer_state_vectors(&job->run.optimizer))
        fprintf(stderr, ", the optimizer's state kept every %zu steps and at %zu between",
                plan.stride * plan.window, plan.spare);
    fprintf(stderr, "; %s of %s\n", size_text((double)plan.bytes, size),
            size_text((double)job->context.memory_limit, limit));
    fprintf(stderr,
            PROGRAM ": plan: reads %s of weights and computes the examples' gradients %.1f times (%.1e flops); "
                    "contraction %.1e flops\n",
            size_text(plan.weight_bytes, read), plan.sweeps, plan.gradient_flops, plan.contraction_flops);
    fprintf(stderr,
            PROGRAM
            ": plan: about %s: examples once %.0f %%, examples again %.0f %%, inputs along the path %.0f %%, "
            "contraction %.0f %%\n",
            duration(plan.seconds, time), plan.seconds_examples / all, plan.seconds_again / all,
            plan.seconds_test / all, plan.seconds_contraction / all);
}

static void print_quadrature(const task *job, const pk_decomposition *d)
{
    static const char *const names[] = {"auto", "exact", "gauss", "midpoint", "trapezoid", "left"};
    const pk_quadrature *rule = &job->set->options.quadrature;
    double cells = (double)job->finished * (double)d->steps;
    printf("quadrature   %s", names[rule->rule]);
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
    for (unsigned i = 0; i < 9; i++) {
        static const unsigned axes[] = {1, 4, 8, 5, 9, 12, 13};
        if (i < 7)
            name_kept(axes[i], name);
        else
            snprintf(name, sizeof name, i == 7 ? "bounds.npy" : "closure_by_step.npy");
        size_t f = 0;
        while (f < job->file_count && strcmp(job->files[f].name, name) != 0)
            f++;
        int length = snprintf(path, sizeof path, "%s/%s", job->set->out, name);
        if (f == job->file_count && length < (int)sizeof path && access(path, F_OK) == 0)
            printf("note         %s is of an older decomposition\n", path);
    }
}

static void print_summary(const task *job, const pk_decomposition *d, pk_status status)
{
    const pk_run *run = &job->run;
    const char *out = job->set->out;
    char rule[200], size[32];
    double tolerance = job->set->options.tolerance > 0 ? job->set->options.tolerance : PK_TOLERANCE, bytes = 0;
    if (pk_optimizer_format(&run->optimizer, rule, sizeof rule) != PK_OK)
        rule[0] = 0;
    if (job->set->top)
        printf("\n");
    printf("run          %s: %s; %s; %s\n", job->set->run, run->graph.text ? run->graph.text : "",
           pk_loss_name(run->loss), rule);
    if (run->cut_off)
        printf("             recording was cut off: %zu steps are complete\n", job->recorded);
    if (job->set->until)
        printf("             until step %zu of %zu\n", run->steps, job->recorded);
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
    for (size_t i = 0; i < job->file_count; i++)
        bytes += 8 * (double)job->files[i].row_items * (double)job->finished;
    printf("results      %s in %s:", size_text(bytes, size), out);
    for (size_t i = 0; i < job->file_count; i++)
        printf(" %.*s", (int)(strlen(job->files[i].name) - 4), job->files[i].name);
    printf("\n");
    print_left_behind(job);
    printf("%s\n", status == PK_OK             ? "closed"
                   : status == PK_UNATTRIBUTED ? "closed, but NOT EXPLAINED by the declared training"
                                               : "NOT CLOSED");
}

static int finish(task *job, const pk_decomposition *summary, pk_status status)
{
    char reason[PK_MESSAGE_SIZE];
    const char *out = job->set->out;
    clear_line();
    snprintf(reason, sizeof reason, "%s", pk_message(&job->context));
    if (status == PK_CANCELLED)
        snprintf(reason, sizeof reason, "cancelled");
    pk_status published = publish_files(job);
    if (published)
        return refuse("%s%s%s", pk_message(&job->context), status ? ", after: " : "", status ? reason : "");
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
        return NOT_CLOSED;
    }
    return CLOSED;
}

/* Opens the run, and reads what is asked about it. */
static int prepare(task *job)
{
    settings *set = job->set;
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
    if (set->until && pk_run_until(context, &job->run, set->last) != PK_OK)
        return refuse("--until: there is no step %s; the run has %zu, so K is from 0 to %zu", set->until,
                      job->recorded, job->recorded);
    if (set->outputs == 'n' && options->readout.output >= job->run.outputs)
        return refuse("--outputs: there is no output %zu; the network has %zu, 0 to %zu",
                      options->readout.output, job->run.outputs, job->run.outputs - 1);
    failed = read_inputs(job);
    if (failed < 0 && set->labels)
        failed = read_labels(job);
    else if (failed < 0 && set->outputs == 'l')
        failed = predict_labels(job);
    return failed;
}

static void release(task *job)
{
    pk_release(&job->context, job->labels);
    pk_array_release(&job->context, &job->inputs);
    pk_run_release(&job->context, &job->run);
    job->labels = NULL;
}

static int decompose(task *job)
{
    settings *set = job->set;
    pk_decompose_options *options = &set->options;
    pk_context *context = &job->context;
    size_t kept = 0;
    context->memory_limit = set->memory;
    int failed = prepare(job);
    if (failed == OVER_LIMIT) { /* the decomposition, which will not be, can tell the least that would do */
        release(job);
        context->memory_limit = 0;
        failed = prepare(job);
    }
    context->memory_limit = 0; /* a few lists; what is held counts when the limit is back */
    if (failed >= 0)
        return failed;
    watch_mappings(job);
    options->readout.kind = set->outputs == 'n'   ? PK_READOUT_ONE
                            : set->outputs == 'l' ? PK_READOUT_LABEL
                                                  : PK_READOUT_ALL;
    options->readout.labels = job->labels;
    job->outputs = pk_readout_count(&options->readout, job->run.outputs);
    if (pk_quadrature_check(context, &options->quadrature, &job->run.graph, &options->readout) != PK_OK)
        return refuse("--quadrature: %s", pk_message(context));
    if (!options->keep[0])
        options->keep[0] = PK_BY_EXAMPLE;
    if (list_files(job) != PK_OK)
        return refuse("%s", pk_message(context));
    if (set->top > job->run.examples)
        set->top = job->run.examples;
    if (pk_allocate(context, set->top, sizeof *job->strongest, "the strongest examples", &job->strongest) !=
        PK_OK)
        return refuse("%s", pk_message(context));
    for (kept = 0; kept < PK_KEPT && options->keep[kept]; kept++)
        job->top_hidden |= options->keep[kept] == PK_BY_EXAMPLE;
    job->top_hidden = set->top && !job->top_hidden; /* at most six sums of axes are kept then */
    if (job->top_hidden)
        options->keep[kept] = PK_BY_EXAMPLE;
    context->memory_limit = set->memory;
    failed = make_folder(job);
    if (failed >= 0)
        return failed;
    catch_signals(job->terminal);
    if (!options->rows_at_once)
        options->rows_at_once = choose_rows(job);
    pk_decomposition summary;
    memset(&summary, 0, sizeof summary);
    pk_status status = create_files(job);
    if (!status) {
        print_plan(job);
        status = pk_decompose_array_parts(context, &job->run, &job->inputs, options, on_part, job, &summary);
        context->memory_limit = 0;
    }
    return finish(job, &summary, status);
}

/* Threads of OpenMP wait for each other by spinning, in gcc's libgomp for milliseconds: beside another program that is what
 * keeps a processor from the thread that is waited for. How long they spin can be said in the environment only, before the
 * program starts: so it starts itself again, once, unless the user has said something about it. */
static void start_with_short_spin(const settings *set, char **arguments)
{
#ifdef _OPENMP
    static const char *const said[] = {"PATHKERNEL_RESTARTED", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"};
    char program[4096];
    for (size_t i = 0; i < sizeof said / sizeof *said; i++)
        if (getenv(said[i]))
            return;
    if (set->threads == 1 || (set->threads == 0 && pk_threads(NULL) == 1))
        return;
    ssize_t length =
        readlink("/proc/self/exe", program, sizeof program - 1); /* elsewhere than on Linux there is none */
    if (length <= 0 || (size_t)length >= sizeof program - 1)
        return;
    program[length] = 0;
    if (setenv("PATHKERNEL_RESTARTED", "1", 1) == 0 && setenv("GOMP_SPINCOUNT", "2000", 1) == 0)
        execv(program, arguments); /* where that fails, the job is done all the same */
#else
    (void)set, (void)arguments;
#endif
}

/* Where a standard stream is closed, nothing else may take its place. */
static void fill_streams(void)
{
    for (int file = STDIN_FILENO; file <= STDERR_FILENO; file++)
        if (fcntl(file, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0)
            (void)open("/", O_RDONLY);
}

int main(int count, char **arguments)
{
    settings set;
    task job;
    fill_streams();
    int status = parse_arguments(count, arguments, &set);
    if (status >= 0)
        return status;
    start_with_short_spin(&set, arguments);
    memset(&job, 0, sizeof job);
    job.set = &set;
    job.context.threads = set.threads;
    job.context.progress = on_progress;
    job.context.progress_user = &job;
    job.terminal = isatty(STDERR_FILENO);
    job.begin = pk__seconds();
    status = decompose(&job);
    for (size_t i = 0; i < job.file_count; i++) {
        pk_release(&job.context, job.files[i].path);
        pk_release(&job.context, job.files[i].partial);
    }
    pk_release(&job.context, job.strongest);
    release(&job);
    if (job.folder)
        (void)close(job.folder - 1);
    return status;
}
