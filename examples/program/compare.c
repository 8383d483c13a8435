/* pathkernel compare: which approximation of a run's kernel machine can be trusted.
 *
 *     pathkernel compare RUN --inputs X.npy --out DIR [options]        (--help lists them)
 *
 * Ten rules (attribution/compare.h), each with the residual that it leaves of the outputs and the rank correlation of its
 * contributions with the exact ones: a table, compare.csv, and a picture of it where gnuplot is installed. Exit status: 0 done,
 * 1 done but the exact rule is not closed or not explained by the run, 2 anything else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct compare_settings {
    const char *run, *inputs, *out;
    int threads, verbose;
    size_t memory;
} compare_settings;

typedef struct comparison {
    const compare_settings *set;
    pk_context context;
    pk_run run;
    pk_real *rows;
    size_t count; /* of the rows */
    pk_comparison rules[PK_COMPARE_RULES];
    program_folder folder;
    program_progress progress;
} comparison;

#define PLACE(member) offsetof(compare_settings, member)
static const program_option compare_options[] = {
    {"--inputs", "X.npy", 1, PLACE(inputs), parse_text, NULL,
     "numbers, integers or bools; one input a row, the axes in the network's order", NULL},
    {"--out", "DIR", 1, PLACE(out), parse_text, NULL,
     "where compare.csv and the picture go; made if it is not there", NULL},
    OPTION_THREADS(compare_settings),
    OPTION_MEMORY(compare_settings),
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL, "print the phases on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* ---- what goes in -------------------------------------------------------------------------------------- */

static int check_rows(comparison *job)
{
    const size_t width = job->run.graph.input_width;
    const char *path = job->set->inputs;
    for (size_t i = 0; i < job->count * width; i++)
        if (!isfinite(job->rows[i]))
            return refuse("--inputs: %s: row %zu, number %zu is %s", path, i / width, i % width,
                          isnan(job->rows[i]) ? "NaN" : "infinite");
    for (size_t row = 0; job->run.graph.checked && row < job->count; row++)
        if (pk_graph_check_inputs(&job->context, &job->run.graph, row, job->rows + row * width) != PK_OK)
            return refuse("--inputs: %s: %s", path, pk_message(&job->context));
    return PROGRAM_GO_ON;
}

static int read_rows(comparison *job)
{
    const char *path = job->set->inputs;
    pk_context *context = &job->context;
    const size_t width = job->run.graph.input_width;
    pk_array array;
    char shape[200];
    memset(&array, 0, sizeof array);
    pk_status status = pk_array_open(context, path, 0, &array);
    if (status)
        return refuse("--inputs: %s", pk_message(context));
    int failed = PROGRAM_GO_ON;
    if (array.rank < 1 || array.shape[0] == 0)
        failed = refuse("--inputs: %s has shape %s: no inputs", path, shape_text(&array, shape));
    else if (pk_run_check_inputs(context, &job->run, &array, path) != PK_OK)
        failed = refuse("--inputs: %s", pk_message(context));
    if (failed < 0) {
        job->count = array.shape[0];
        status = pk_allocate(context, job->count, width * sizeof *job->rows, path, &job->rows);
        if (!status)
            status = pk_array_read(context, &array, 0, job->count * width, job->rows);
        if (status)
            failed = refuse("%s: %s", status == PK_MEMORY_LIMIT ? "--memory" : "--inputs", pk_message(context));
    }
    pk_array_release(context, &array);
    return failed < 0 ? check_rows(job) : failed;
}

/* ---- what comes out ------------------------------------------------------------------------------------ */

static void write_table(const comparison *job, FILE *file)
{
    fprintf(file, "rule,residual_max,residual_median,spearman,seconds\n");
    for (int i = 0; i < PK_COMPARE_RULES; i++) {
        const pk_comparison *rule = &job->rules[i];
        fprintf(file, "%s,%.17g,%.17g,", rule->rule, rule->residual_max, rule->residual_median);
        if (!isnan(rule->spearman))
            fprintf(file, "%.17g", rule->spearman);
        fprintf(file, ",%.17g\n", rule->seconds);
    }
}

static void write_drawing(const comparison *job, FILE *file)
{
    (void)job;
    fprintf(file,
            "# Draws compare.png from compare.csv beside it: gnuplot compare.gp\n"
            "set terminal pngcairo size 1100, 560 font \"DejaVu Sans,11\" background \"#ffffff\"\n"
            "set output \"compare.png\"\n"
            "set datafile separator \",\"\n"
            "set datafile missing \"\"\n"
            "set multiplot layout 1, 2 title \"Ten rules on one run, against the network that was trained\"\n"
            "set yrange [%d.5:-0.5]\n"
            "set border 3; set tics nomirror out; set ytics noenhanced; set grid x lc rgb \"#e6e6e6\" lt 1\n"
            "unset key\n"
            "set xlabel \"residual: largest (filled) and median (open)\"\n"
            "set logscale x; set format x \"10^{%%L}\"\n"
            "plot \"compare.csv\" every ::1 using (column(2) > 1e-18 ? column(2) : 1e-18):0:ytic(1) "
            "with points pt 7 ps 1.5 lc rgb \"#0072b2\", \\\n"
            "     \"compare.csv\" every ::1 using (column(3) > 1e-18 ? column(3) : 1e-18):0 "
            "with points pt 6 ps 1.5 lw 2 lc rgb \"#0072b2\"\n"
            "unset logscale x; set format x \"%%g\"; set xrange [-1.05:1.05]\n"
            "set xlabel \"rank correlation with the exact contributions\"\n"
            "plot \"compare.csv\" every ::1 using 4:0:ytic(1) with points pt 7 ps 1.5 lc rgb \"#c84b00\"\n"
            "unset multiplot\n",
            PK_COMPARE_RULES - 1);
}

/* A text file of the folder, as NAME.part. */
static int write_text(comparison *job, const char *name, void (*write)(const comparison *job, FILE *file))
{
    const size_t index = job->folder.count++;
    char *path = folder_path(&job->folder, name, ".part");
    snprintf(job->folder.files[index].name, sizeof job->folder.files[index].name, "%s", name);
    const int descriptor =
        path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666) : -1;
    FILE *file = descriptor < 0 ? NULL : fdopen(descriptor, "w");
    if (!file) {
        const int status = refuse("--out: %s/%s cannot be written: %s", job->set->out, name, strerror(errno));
        if (descriptor >= 0)
            (void)close(descriptor);
        free(path);
        return status;
    }
    free(path);
    job->folder.files[index].made = 1;
    write(job, file);
    const int bad = ferror(file), closed = fclose(file);
    return bad || closed ? refuse("--out: %s/%s cannot be written: %s", job->set->out, name, strerror(errno))
                         : PROGRAM_GO_ON;
}

/* Runs gnuplot in the folder; 0 where it is not installed or could not draw. */
static int draw(const char *folder)
{
    char name[] = "gnuplot", script[] = "compare.gp", *arguments[] = {name, script, NULL};
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const int nothing = open("/dev/null", O_RDWR);
        if (chdir(folder) != 0 || dup2(nothing, STDOUT_FILENO) < 0 || dup2(nothing, STDERR_FILENO) < 0)
            _exit(126);
        execvp(name, arguments);
        _exit(127);
    }
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    return child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void print_comparison(const comparison *job, int drawn)
{
    char took[32];
    printf("run          %s: %s, %zu steps, %zu examples; %zu inputs of %s\n\n", job->set->run,
           job->run.graph.text ? job->run.graph.text : "", job->run.steps, job->run.examples, job->count,
           job->set->inputs);
    printf("%-14s %14s %14s %10s %10s\n", "rule", "residual: max", "median", "spearman", "seconds");
    for (int i = 0; i < PK_COMPARE_RULES; i++) {
        const pk_comparison *rule = &job->rules[i];
        char rank[32] = "-";
        if (!isnan(rule->spearman))
            snprintf(rank, sizeof rank, "%.4f", rule->spearman);
        printf("%-14s %14.3e %14.3e %10s %10.3g\n", rule->rule, rule->residual_max, rule->residual_median, rank,
               rule->seconds);
    }
    printf(
        "\nresidual: |f_S - f_0 - sum|; spearman: rank correlation of the contributions with the exact ones\n");
    printf("time         %s, %d thread%s\n", duration(program_seconds() - job->progress.begin, took),
           pk_threads(&job->context), pk_threads(&job->context) == 1 ? "" : "s");
    printf("results      %s/compare.csv%s\n", job->set->out,
           drawn ? ", compare.png" : "; no picture: gnuplot is not installed (compare.gp draws it)");
}

/* The folder is locked: computes, writes, publishes. */
static int fill_folder(comparison *job, pk_status *compared)
{
    pk_context *context = &job->context;
    if (!folder_prepare(&job->folder))
        return refuse("%s", job->folder.problem);
    *compared = pk_compare(context, &job->run,
                           pk_matrix_view(job->rows, job->count, job->run.graph.input_width), job->rules);
    clear_line();
    if (*compared == PK_CANCELLED)
        return refuse("cancelled: nothing was written to %s", job->set->out);
    if (*compared && *compared != PK_NOT_CLOSED && *compared != PK_UNATTRIBUTED)
        return refuse("%s%s", *compared == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(context));
    int status = write_text(job, "compare.csv", write_table);
    if (status < 0)
        status = write_text(job, "compare.gp", write_drawing);
    if (status < 0 && !folder_publish(&job->folder))
        status = refuse("%s", job->folder.problem);
    return status;
}

static int compare(comparison *job)
{
    const compare_settings *set = job->set;
    pk_context *context = &job->context;
    pk_status compared = PK_OK;
    context->memory_limit = set->memory;
    const pk_status opened = pk_run_open(context, set->run, &job->run);
    if (opened)
        return refuse_run(context, opened, set->run);
    watch_run(&job->run);
    int status = read_rows(job);
    if (status < 0)
        status = folder_open(&job->folder, set->out, "--out");
    if (status >= 0)
        return status;
    catch_signals(&job->progress);
    status = fill_folder(job, &compared);
    folder_close(&job->folder, status < 0);
    if (status >= 0)
        return status;
    print_comparison(job, draw(set->out));
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("the results are in %s, but the table could not be written: %s", set->out,
                      strerror(errno));
    if (compared) {
        (void)refuse("%s", pk_message(context));
        return PROGRAM_MISSED;
    }
    return PROGRAM_DONE;
}

static int run_compare(const program_command *command, int count, char **arguments)
{
    compare_settings set;
    comparison job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    job.set = &set;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = compare(&job);
    pk_release(&job.context, job.rows);
    pk_run_release(&job.context, &job.run);
    return status;
}

const program_command compare_command = {
    "compare",
    "RUN",
    "run directory",
    "Compares ten approximations on a run: which of them can be trusted.",
    "For each rule, on the inputs of X.npy: what it leaves of the outputs that the network really has, and how "
    "its\n"
    "contributions rank beside the exact ones. compare.csv has the table, compare.png a picture (with "
    "gnuplot).",
    "Exit status: 0 done; 1 done, but the exact rule is not closed, or not explained by the run (a line "
    "tells);\n"
    "2 bad input, cancelled or out of space, with a line that says what and where.",
    compare_options,
    run_compare};
