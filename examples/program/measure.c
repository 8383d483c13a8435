/* pathkernel measure: numbers about Gram matrices and predictions, one `name value` a line.
 *
 *     pathkernel measure --first A.npy [--second B.npy] [--targets Y.npy]        (--help lists them)
 *
 * Their formulas stand in math/measure.h. Exit status: 0 done, 2 anything else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct measure_settings {
    const char *first, *second, *targets;
    int threads;
    size_t memory;
} measure_settings;

typedef struct measuring {
    const measure_settings *set;
    pk_context context;
    double *numbers[2], *targets;
    size_t rows[2], cols[2], target_rows, target_cols;
    pk_type target_type;
} measuring;

#define PLACE(member) offsetof(measure_settings, member)
static const program_option measure_options[] = {
    {"--first", "A.npy", 1, PLACE(first), parse_text, NULL,
     "a Gram matrix, if it is symmetric; else predictions, those of a surrogate: (M,) or (M, C) logits", NULL},
    {"--second", "B.npy", 0, PLACE(second), parse_text, NULL,
     "another one; of predictions those of the network", NULL},
    {"--targets", "Y.npy", 0, PLACE(targets), parse_text, NULL,
     "of one Gram matrix numbers (N,); of two (M, C) of logits the right classes (M,)", NULL},
    OPTION_THREADS(measure_settings),
    OPTION_MEMORY(measure_settings),
    OPTIONS_END,
};
#undef PLACE

static void tell(const char *name, double value)
{
    printf("%s %.17g\n", name, value);
}

/* Square and symmetric to 1e-6 of its largest number. */
static int is_gram(const measuring *job, int side)
{
    const double *a = job->numbers[side];
    const size_t n = job->rows[side];
    double largest = 0;
    for (size_t i = 0; i < n * job->cols[side]; i++)
        largest = fmax(largest, fabs(a[i]));
    int symmetric = n == job->cols[side];
    for (size_t i = 0; i < n && symmetric; i++)
        for (size_t j = 0; j < i; j++)
            symmetric &= fabs(a[i * n + j] - a[j * n + i]) <= 1e-6 * largest;
    return symmetric;
}

static int refuse_measure(const measuring *job, pk_status status)
{
    return refuse("%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(&job->context));
}

static int measure_one(measuring *job)
{
    const size_t n = job->rows[0];
    pk_gram_measures m;
    double alignment = 0;
    if (!is_gram(job, 0))
        return refuse("--first: %s is no Gram matrix, which is symmetric, and predictions have a --second",
                      job->set->first);
    if (job->targets && (job->target_rows != n || job->target_cols != 1))
        return refuse("--targets: %s has %zu rows of %zu numbers, wanted (%zu,)", job->set->targets,
                      job->target_rows, job->target_cols, n);
    pk_status status = pk_measure_gram(&job->context, n, job->numbers[0], &m);
    if (!status && job->targets)
        status = pk_target_alignment(&job->context, n, job->numbers[0], job->targets, &alignment);
    if (status)
        return refuse_measure(job, status);
    tell("trace", m.trace);
    tell("effective_rank", m.effective_rank);
    tell("participation_ratio", m.participation_ratio);
    tell("trace_over_max", m.trace_over_max);
    tell("least_eigenvalue", m.least);
    tell("largest_eigenvalue", m.largest);
    if (job->targets)
        tell("target_alignment", alignment);
    return PROGRAM_GO_ON;
}

static int measure_grams(measuring *job)
{
    pk_gram_pair_measures m;
    if (job->targets)
        return refuse("--targets: of two Gram matrices nothing is told about targets");
    const pk_status status =
        pk_measure_gram_pair(&job->context, job->rows[0], job->numbers[0], job->numbers[1], &m);
    if (status)
        return refuse_measure(job, status);
    tell("alignment", m.alignment);
    tell("distance", m.distance);
    tell("cka", m.cka);
    tell("cka_unbiased", m.cka_unbiased);
    return PROGRAM_GO_ON;
}

static int measure_lists(measuring *job)
{
    const size_t n = job->rows[0];
    double kendall = 0, pearson = 0, spearman = 0;
    pk_status status = pk_kendall(&job->context, n, job->numbers[0], job->numbers[1], &kendall);
    if (!status)
        status = pk_pearson(&job->context, n, job->numbers[0], job->numbers[1], &pearson);
    if (!status)
        status = pk_spearman(&job->context, n, job->numbers[0], job->numbers[1], &spearman);
    if (status)
        return refuse_measure(job, status);
    tell("kendall", kendall);
    tell("pearson", pearson);
    tell("spearman", spearman);
    return PROGRAM_GO_ON;
}

static int measure_logits(measuring *job)
{
    const size_t m = job->rows[0], classes = job->cols[0];
    pk_prediction_measures measures;
    int64_t *labels = NULL;
    if (!job->targets)
        return refuse("--targets: the right classes of the %zu rows of logits are missing", m);
    if (job->target_rows != m || job->target_cols != 1)
        return refuse("--targets: %s has %zu rows of %zu numbers, wanted (%zu,)", job->set->targets,
                      job->target_rows, job->target_cols, m);
    pk_status status = pk_allocate(&job->context, m, sizeof *labels, "labels", &labels);
    if (status)
        return refuse_measure(job, status);
    for (size_t i = 0; i < m; i++) {
        const double label = job->targets[i];
        if (!(label >= 0 && label < (double)classes && label == floor(label))) {
            pk_release(&job->context, labels);
            return refuse("--targets: %s: row %zu is %g, no class from 0 to %zu", job->set->targets, i, label,
                          classes - 1);
        }
        labels[i] = (int64_t)label;
    }
    status =
        pk_measure_predictions(&job->context, m, classes, job->numbers[0], job->numbers[1], labels, &measures);
    pk_release(&job->context, labels);
    if (status)
        return refuse_measure(job, status);
    tell("kendall", measures.kendall);
    tell("pearson", measures.pearson);
    tell("spearman", measures.spearman);
    tell("r_miss", measures.r_miss);
    tell("tad", measures.tad);
    tell("log_odds_r2", measures.log_odds_r2);
    printf("left_out %zu\n", measures.left_out);
    return PROGRAM_GO_ON;
}

static int measure_arrays(measuring *job)
{
    const measure_settings *set = job->set;
    pk_type type;
    job->context.memory_limit = set->memory;
    int status = read_matrix(&job->context, "--first", set->first, 1, &job->rows[0], &job->cols[0],
                             &job->numbers[0], &type);
    if (status < 0 && set->second)
        status = read_matrix(&job->context, "--second", set->second, 1, &job->rows[1], &job->cols[1],
                             &job->numbers[1], &type);
    if (status < 0 && set->targets)
        status = read_matrix(&job->context, "--targets", set->targets, 1, &job->target_rows, &job->target_cols,
                             &job->targets, &job->target_type);
    if (status >= 0)
        return status;
    if (!set->second)
        return measure_one(job);
    const int grams = is_gram(job, 0) && is_gram(job, 1) && job->rows[0] > 1;
    if (job->rows[0] != job->rows[1] || job->cols[0] != job->cols[1])
        return refuse("--second: %s has %zu rows of %zu numbers, and %s %zu of %zu", set->second, job->rows[1],
                      job->cols[1], set->first, job->rows[0], job->cols[0]);
    return grams ? measure_grams(job) : job->cols[0] == 1 ? measure_lists(job) : measure_logits(job);
}

static int run_measure(const program_command *command, int count, char **arguments)
{
    measure_settings set;
    measuring job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    start_with_short_spin(set.threads);
    job.set = &set;
    job.context.threads = set.threads;
    status = measure_arrays(&job);
    pk_release(&job.context, job.targets);
    pk_release(&job.context, job.numbers[1]);
    pk_release(&job.context, job.numbers[0]);
    if (status >= 0)
        return status;
    return fflush(stdout) != 0 || ferror(stdout)
               ? refuse("the numbers could not be written: %s", strerror(errno))
               : PROGRAM_DONE;
}

const program_command measure_command = {
    "measure",
    NULL,
    NULL,
    "Tells numbers about Gram matrices and predictions: alignment, CKA, effective rank, rank correlations.",
    "One `name value` a line. One Gram matrix: its spectrum's; two: how alike they are; predictions of a "
    "surrogate and of "
    "a\nnetwork: how faithful it is. A number that is 0/0, such as a correlation with a constant, is nan.",
    NULL,
    measure_options,
    run_measure};
