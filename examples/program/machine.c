/* pathkernel machine: a kernel machine on a Gram matrix, from this program's kernels or from anywhere.
 *
 *     pathkernel machine --gram K.npy --targets Y.npy --loss LOSS --regularization L --out DIR [options]      (--help lists them)
 *
 * kernels/machine.h says what is minimized, and how. Exit status: 0 done, 1 done but the certificate exceeds the tolerance, 2
 * anything else, with one line on standard error.
 */
#include "program.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct machine_settings {
    const char *gram, *targets, *out, *test, *diagonal;
    pk_machine_options options;
    int attribute, threads, verbose;
    size_t memory;
} machine_settings;

typedef struct machine_job {
    const machine_settings *set;
    pk_machine_options options; /* of the settings, with the rounding of the matrix's numbers */
    pk_context context;
    double *gram, *test, *diagonal, *numbers; /* numbers: of what is written */
    size_t rows, tests;
    pk_array targets;
    pk_machine machine;
    program_folder folder;
    program_progress progress;
} machine_job;

static const char *machine_loss_names(size_t index)
{
    return index < 1000 ? pk_machine_loss_name((pk_machine_loss)(index + 1)) : NULL;
}

static int parse_machine_loss(pk_context *context, const char *text, void *place)
{
    (void)context;
    return (*(pk_machine_loss *)place = pk_machine_loss_find(text)) != 0;
}

static int parse_penalty(pk_context *context, const char *text, void *place)
{
    (void)context;
    *(int *)place = strcmp(text, "coefficients") == 0;
    return *(int *)place || strcmp(text, "rkhs") == 0;
}

#define PLACE(member) offsetof(machine_settings, member)
static const program_option machine_options[] = {
    {"--gram", "K.npy", 1, PLACE(gram), parse_text, NULL,
     "the kernel of the training rows with each other, (N, N)", NULL},
    {"--targets", "Y.npy", 1, PLACE(targets), parse_text, NULL,
     "squared, epsilon_insensitive: numbers (N,) or (N, K); softmax: classes (N,);\nlogistic and the hinges: "
     "+1 and -1, or "
     "classes, of which each is told from the rest",
     NULL},
    {"--loss", "LOSS", 1, PLACE(options.loss), parse_machine_loss, "a loss", "the loss", machine_loss_names},
    {"--regularization", "L", 1, PLACE(options.regularization), parse_not_negative, "a number from 0",
     "of sum of losses + L/2 penalty; the C of libsvm is 1/L", NULL},
    {"--out", "DIR", 1, PLACE(out), parse_text, NULL, "where the results go; made if it is not there", NULL},
    {"--epsilon", "E", 0, PLACE(options.epsilon), parse_not_negative, "a number from 0",
     "of epsilon_insensitive: errors up to E cost nothing; default 0", NULL},
    {"--penalty", "WHICH", 0, PLACE(options.penalize_coefficients), parse_penalty, "rkhs or coefficients",
     "rkhs: a'Ka, the default; coefficients: |a|^2, of logistic and softmax", NULL},
    {"--intercept", NULL, 0, PLACE(options.intercept), parse_flag, NULL, "f = K a + b, b not penalized", NULL},
    {"--test", "KT.npy", 0, PLACE(test), parse_text, NULL,
     "the kernel of test rows with training rows, (M, N): writes prediction.npy", NULL},
    {"--test-diagonal", "D.npy", 0, PLACE(diagonal), parse_text, NULL,
     "the kernel of each test row with itself, (M,): squared writes variance.npy", NULL},
    {"--attribute", NULL, 0, PLACE(attribute), parse_flag, NULL,
     "write attribution.npy (M, K, N): what each training row adds to a prediction", NULL},
    {"--tolerance", "T", 0, PLACE(options.tolerance), parse_positive, "a positive number",
     "of the certificate; default 1e-9", NULL},
    OPTION_THREADS(machine_settings),
    OPTION_MEMORY(machine_settings),
    {"--verbose", NULL, 0, PLACE(verbose), parse_flag, NULL, "print the phases on standard error", NULL},
    OPTIONS_END,
};
#undef PLACE

/* ---- what goes in -------------------------------------------------------------------------------------- */

static int read_machine_inputs(machine_job *job)
{
    const machine_settings *set = job->set;
    pk_context *context = &job->context;
    size_t cols = 0;
    pk_type type;
    int status = read_matrix(context, "--gram", set->gram, 0, &job->rows, &cols, &job->gram, &type);
    if (status < 0 && job->rows != cols)
        status = refuse("--gram: %s has shape (%zu, %zu), wanted the square matrix of the training rows",
                        set->gram, job->rows, cols);
    /* Numbers that were stored in 32 bits are rounded to them. */
    if (type == PK_FLOAT32 && status < 0)
        job->options.rounding = 1e-6;
    if (status < 0 && pk_array_map(context, set->targets, 0, &job->targets) != PK_OK)
        status = refuse("--targets: %s", pk_message(context));
    if (status < 0 && set->test) {
        status = read_matrix(context, "--test", set->test, 0, &job->tests, &cols, &job->test, &type);
        if (status < 0 && cols != job->rows)
            status = refuse("--test: %s has shape (%zu, %zu), wanted (test rows, %zu training rows)%s",
                            set->test, job->tests, cols, job->rows,
                            job->tests == job->rows ? "; the other way round it would fit" : "");
    }
    if (status < 0 && set->diagonal) {
        size_t count = 0;
        status =
            read_matrix(context, "--test-diagonal", set->diagonal, 1, &count, &cols, &job->diagonal, &type);
        if (status < 0 && (count != job->tests || cols != 1))
            status =
                refuse("--test-diagonal: %s has %zu rows of %zu, wanted one number for each of %zu test rows",
                       set->diagonal, count, cols, job->tests);
    }
    return status;
}

static int check_machine_options(const machine_settings *set)
{
    if (set->diagonal && !set->test)
        return refuse("--test-diagonal: without --test there are no test rows");
    if (set->diagonal && set->options.loss != PK_MACHINE_SQUARED)
        return refuse("--test-diagonal: the loss %s has no variance; squared has",
                      pk_machine_loss_name(set->options.loss));
    if (set->attribute && !set->test)
        return refuse("--attribute: without --test there are no predictions to attribute");
    return PROGRAM_GO_ON;
}

/* ---- what comes out ------------------------------------------------------------------------------------ */

typedef pk_status machine_result(pk_context *context, const pk_machine *machine, size_t m, const double *gram,
                                 double *out);

/* Computes something of the test rows, rows x `width` and the rest of the shape, and writes it. */
static int write_result(machine_job *job, const char *name, machine_result *compute, int rank,
                        const size_t *shape)
{
    size_t count = 1;
    for (int i = 0; i < rank; i++)
        count *= shape[i];
    pk_status status = pk_allocate(&job->context, count, sizeof *job->numbers, name, &job->numbers);
    if (!status)
        status = compute(&job->context, &job->machine, job->tests, job->test, job->numbers);
    int done = status ? refuse("%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(&job->context))
                      : folder_write(&job->folder, &job->context, name, rank, shape, job->numbers);
    pk_release(&job->context, job->numbers);
    job->numbers = NULL;
    return done;
}

static int write_variance(machine_job *job)
{
    const size_t shape[1] = {job->tests};
    pk_status status = pk_allocate(&job->context, job->tests, sizeof *job->numbers, "variances", &job->numbers);
    if (!status)
        status = pk_machine_variance(&job->context, &job->machine, job->tests, job->test, job->diagonal,
                                     job->numbers);
    return status ? refuse("%s%s", status == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(&job->context))
                  : folder_write(&job->folder, &job->context, "variance.npy", 1, shape, job->numbers);
}

static int write_machine(machine_job *job)
{
    const pk_machine *m = &job->machine;
    const size_t shape[2] = {m->rows, m->outputs}, predicted[3] = {job->tests, m->outputs, m->rows};
    pk_context *context = &job->context;
    int status = folder_write(&job->folder, context, "coefficients.npy", 2, shape, m->coefficients);
    if (status < 0)
        status = folder_write(&job->folder, context, "intercept.npy", 1, shape + 1, m->intercept);
    if (status < 0)
        status = folder_write(&job->folder, context, "fitted.npy", 2, shape, m->fitted);
    if (status < 0 && m->leave_one_out)
        status = folder_write(&job->folder, context, "leave_one_out.npy", 2, shape, m->leave_one_out);
    if (status < 0 && job->set->test)
        status = write_result(job, "prediction.npy", pk_machine_predict, 2, predicted);
    if (status < 0 && job->set->attribute)
        status = write_result(job, "attribution.npy", pk_machine_attribute, 3, predicted);
    if (status < 0 && job->set->diagonal)
        status = write_variance(job);
    return status;
}

static void print_machine(const machine_job *job)
{
    const pk_machine *m = &job->machine;
    const int ridge = m->options.loss == PK_MACHINE_SQUARED,
              dual = m->options.loss >= PK_MACHINE_HINGE && m->options.loss <= PK_MACHINE_EPSILON_INSENSITIVE;
    double objective = 0;
    size_t support = 0;
    for (size_t k = 0; k < m->outputs; k++)
        objective += m->objective[k];
    printf("machine      %s%s, %zu rows, %zu output%s, regularization %g%s\n",
           pk_machine_loss_name(m->options.loss),
           m->options.penalize_coefficients ? ", penalized coefficients" : "", m->rows, m->outputs,
           m->outputs == 1 ? "" : "s", m->options.regularization, m->options.intercept ? ", intercept" : "");
    printf("objective    %.17g\n", objective);
    printf("certificate  %.2e: %s, after %d step%s\n", m->certificate,
           ridge  ? "residual of the equations, relative to the targets"
           : dual ? "duality gap, relative to the objective"
                  : "gradient, relative to that at 0",
           m->iterations, m->iterations == 1 ? "" : "s");
    if (ridge) {
        printf("freedom      %.17g effective degrees\n", m->degrees_of_freedom);
        for (size_t k = 0; k < m->outputs && !isnan(m->kare[k]); k++)
            printf("%s%.17g%s", k ? " " : "kare         ", m->kare[k], k + 1 == m->outputs ? "\n" : "");
    }
    for (size_t i = 0; dual && i < m->rows; i++) {
        int used = 0;
        for (size_t k = 0; k < m->outputs; k++)
            used |= m->coefficients[i * m->outputs + k] != 0;
        support += (size_t)used;
    }
    if (dual)
        printf("support      %zu of %zu rows\n", support, m->rows);
    print_folder(&job->folder, &job->context, job->progress.begin);
}

static int fill_machine_folder(machine_job *job, pk_status *fitted)
{
    if (!folder_prepare(&job->folder))
        return refuse("%s", job->folder.problem);
    *fitted = pk_machine_fit(&job->context, job->rows, job->gram, &job->targets, &job->options, &job->machine);
    clear_line();
    if (*fitted && *fitted != PK_NOT_CLOSED)
        return refuse("%s%s", *fitted == PK_MEMORY_LIMIT ? "--memory: " : "", pk_message(&job->context));
    char message[PK_MESSAGE_SIZE];
    memcpy(message, job->context.message, sizeof message);
    int status = write_machine(job);
    if (status < 0 && !folder_publish(&job->folder))
        status = refuse("%s", job->folder.problem);
    memcpy(job->context.message, message, sizeof message);
    return status;
}

static int fit_machine(machine_job *job)
{
    const machine_settings *set = job->set;
    pk_status fitted = PK_OK;
    job->context.memory_limit = set->memory;
    int status = check_machine_options(set);
    if (status < 0)
        status = read_machine_inputs(job);
    if (status < 0)
        status = folder_open(&job->folder, set->out, "--out");
    if (status >= 0)
        return status;
    catch_signals(&job->progress);
    status = fill_machine_folder(job, &fitted);
    folder_close(&job->folder, status < 0);
    if (status >= 0)
        return status;
    print_machine(job);
    if (fflush(stdout) != 0 || ferror(stdout))
        return refuse("the results are in %s, but the report could not be written: %s", set->out,
                      strerror(errno));
    return fitted ? ((void)refuse("%s", pk_message(&job->context)), PROGRAM_MISSED) : PROGRAM_DONE;
}

static int run_machine(const program_command *command, int count, char **arguments)
{
    machine_settings set;
    machine_job job;
    uint64_t given;
    memset(&set, 0, sizeof set);
    memset(&job, 0, sizeof job);
    set.memory = PROGRAM_MEMORY;
    int status = options_parse(command, count, arguments, &set, &given);
    if (status >= 0)
        return status;
    job.set = &set;
    job.options = set.options;
    start_job(&job.context, &job.progress, set.threads, set.verbose);
    status = fit_machine(&job);
    pk_machine_release(&job.context, &job.machine);
    pk_array_release(&job.context, &job.targets);
    pk_release(&job.context, job.numbers);
    pk_release(&job.context, job.diagonal);
    pk_release(&job.context, job.test);
    pk_release(&job.context, job.gram);
    return status;
}

const program_command machine_command = {
    "machine",
    NULL,
    NULL,
    "Fits a kernel machine to a Gram matrix: ridge, logistic, softmax, support vectors.",
    "It writes coefficients.npy (N, K), intercept.npy (K,), fitted.npy (N, K), and what the options name; "
    "squared\nwrites "
    "leave_one_out.npy (N, K), the prediction of each row by the machine of the others.",
    "Exit status: 0 done; 1 done, but the certificate exceeds the tolerance (a line tells);\n"
    "2 bad input, cancelled or out of space, with a line that says what and where.",
    machine_options,
    run_machine};
