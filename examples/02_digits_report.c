/* 02: which training digits speak for and against each decision of a trained network, as a picture.
 *
 * A network 64-32-32-10 learns 1437 digits in 100 steps of full-batch gradient descent; then its outputs on
 * 100 test digits are decomposed. For test digit x, output c and training digit i
 *
 *     f_c(w_S, x) = f_c(w_0, x) + sum_i A_c(x, i) + unattributed + closure:
 *
 * A_c(x, i) > 0 says that learning digit i raised output c on x; such digits speak for class c, the others
 * against it. The same sums can be kept by anything else that partitions them; here also by the training
 * digits' class k and the step s at which they acted,
 *
 *     A_c(x, k, s) = - (rate_s / N) sum over i of class k of
 *                        < integral_0^1 grad f_c(w_s + t D_s, x) dt, grad l_i(w_s) >,
 *
 * of which no M x C x N x S array is ever made.
 *
 * Written into 02_digits_report-tanh in the output folder (default pathkernel-out), beside the recorded run:
 * by_example.npy (100, 10, 1437), by_class_and_step.npy (100, 10, 10, 100), closure.npy (100, 10),
 * closure.txt, contact_sheet.png, classes.png, and the .dat files these are drawn from.
 *
 *     cc -O3 -fopenmp -I. examples/02_digits_report.c -o report -lm
 *     ./report [tanh|relu [OUTPUT FOLDER [DATA FOLDER]]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"
#include "contact_sheet.h"

enum { TRAIN = 1437, TEST = 100, CLASSES = 10, STEPS = 100 };

typedef struct report {
    pk_dataset digits, train;
    const int64_t *label; /* of every digit; test digit m is digit TRAIN + m */
    pk_real *inputs;      /* TEST x 64 */
    pk_graph graph;
    pk_run run;
    pk_decomposition parts;
    int64_t items[TEST];
    size_t read_as[TEST]; /* the network's decisions */
    sheet_subject sheet;
    char folder[TUTORIAL_PATH];
} report;

static int train(pk_context *context, report *r)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 0.5;
    options.steps = STEPS;
    options.record = r->folder;
    options.replace = 1;
    pk_real *weights = (pk_real *)malloc(r->graph.parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_network_initialize(context, &r->graph, 1, weights);
    if (status == PK_OK)
        status = pk_train(context, &r->graph, &r->train, &options, weights, NULL);
    free(weights);
    TRY(status);
    return 0;
}

static int decompose(pk_context *context, report *r)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.tolerance = 1e-12; /* a closure beyond it is reported as PK_NOT_CLOSED */
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_GROUP | PK_BY_STEP;
    options.groups = (const int64_t *)r->train.targets.data; /* a training digit's group is its class */
    options.group_count = CLASSES;
    TRY(pk_run_open(context, r->folder, &r->run));
    TRY(pk_decompose(context, &r->run, pk_matrix_view(r->inputs, TEST, 64), &options, &r->parts));
    for (size_t m = 0; m < TEST; m++)
        r->read_as[m] = tutorial_largest(r->parts.final + m * CLASSES, CLASSES);
    return 0;
}

/* The identity at the top of this file, for every output of every test digit, with sums of our own. */
static int check(const report *r)
{
    const pk_decomposition *d = &r->parts;
    double worst = 0;
    size_t right = 0;
    for (size_t cell = 0; cell < TEST * CLASSES; cell++) {
        double examples = 0, classes = 0, scale = fmax(1, fabs(d->final[cell]));
        for (size_t i = 0; i < TRAIN; i++)
            examples += d->by_example[cell * TRAIN + i];
        for (size_t i = 0; i < CLASSES * STEPS; i++)
            classes += d->kept[1].data[cell * CLASSES * STEPS + i];
        worst = fmax(worst, fabs(d->initial[cell] + examples + d->unattributed[cell] - d->final[cell]) / scale);
        worst = fmax(worst, fabs(examples - classes) / scale);
    }
    for (size_t m = 0; m < TEST; m++)
        right += r->label[TRAIN + m] == (int64_t)r->read_as[m];
    printf("%s: %d steps on %d digits; of %d test digits %zu are read rightly.\n", r->graph.text, (int)STEPS,
           (int)TRAIN, (int)TEST, right);
    printf("%d outputs decomposed over %d digits in %.1f s, %.1f nodes a step.\n", TEST * CLASSES, (int)TRAIN,
           d->seconds, (double)d->points / (TEST * STEPS));
    printf("Worst closure %.1e of a digit's largest output, unattributed at most %.1e.\n", d->worst_closure,
           d->worst_unattributed);
    printf("Numbers and pictures (contact_sheet.png, classes.png) are in %s.\n", r->folder);
    if (worst < 1e-12)
        return 0;
    fprintf(stderr, "initial + contributions + unattributed misses the final output by %g\n", worst);
    return 1;
}

/* Everything for NumPy, and one line of text for each test digit. */
static int write_numbers(pk_context *context, const report *r)
{
    const pk_decomposition *d = &r->parts;
    const size_t shape[3] = {TEST, CLASSES, TRAIN};
    char path[TUTORIAL_PATH + 100];
    snprintf(path, sizeof path, "%s/by_example.npy", r->folder);
    TRY(pk_array_write(context, path, PK_FLOAT64, 3, shape, d->by_example));
    snprintf(path, sizeof path, "%s/by_class_and_step.npy", r->folder);
    TRY(pk_array_write(context, path, PK_FLOAT64, d->kept[1].rank, d->kept[1].shape, d->kept[1].data));
    snprintf(path, sizeof path, "%s/closure.npy", r->folder);
    TRY(pk_array_write(context, path, PK_FLOAT64, 2, shape, d->closure));
    FILE *file = tutorial_create(r->folder, "closure.txt");
    if (!file)
        return 1;
    fprintf(file,
            "digit label read_as       initial  contributions          final  unattributed       closure\n");
    for (size_t m = 0; m < TEST; m++) {
        size_t cell = m * CLASSES + r->read_as[m];
        fprintf(file, "%5zu %5d %7zu %13.9f %14.9f %14.9f %13.2e %13.2e\n", TRAIN + m, (int)r->label[TRAIN + m],
                r->read_as[m], d->initial[cell], d->data[cell], d->final[cell], d->unattributed[cell],
                d->closure[cell]);
    }
    return fclose(file) ? perror("closure.txt"), 1 : 0;
}

/* ---- the classes over the steps: one test digit, two outputs ------------------------------------------ */

/* Output c of test digit m: the classes' contributions up to step s stacked, those above zero and those
 * below, and the change of the output since the start, measured by a forward pass at w_s. They must agree. */
static int write_stack(pk_context *context, const report *r, size_t m, size_t c, FILE *bands, FILE *names)
{
    const double *by_class_and_step = r->parts.kept[1].data + (m * CLASSES + c) * CLASSES * STEPS;
    double total[CLASSES] = {0}, middle[CLASSES] = {0}, start = 0, worst = 0;
    pk_real *weights = (pk_real *)malloc(r->graph.parameters * sizeof *weights), f[CLASSES];
    if (!weights)
        return perror("weights"), 1;
    for (size_t s = 0; s <= STEPS; s++) {
        double up = 0, down = 0;
        pk_status status = pk_run_weights(context, &r->run, s, weights);
        if (status == PK_OK)
            status = pk_graph_evaluate(context, &r->graph, weights, pk_matrix_view(r->inputs + m * 64, 1, 64),
                                       pk_matrix_view(f, 1, CLASSES));
        if (status != PK_OK) {
            free(weights);
            TRY(status);
        }
        start = s == 0 ? f[c] : start;
        fprintf(bands, "%zu %.9g", s, f[c] - start);
        for (size_t k = 0; k < CLASSES; k++) {
            total[k] += s ? by_class_and_step[k * STEPS + s - 1] : 0;
            middle[k] = (total[k] > 0 ? up : down) + total[k] / 2;
            *(total[k] > 0 ? &up : &down) += total[k];
            fprintf(bands, " %.9g %.9g", up, down);
        }
        fprintf(bands, "\n");
        worst = fmax(worst, fabs(f[c] - start - up - down));
    }
    free(weights);
    for (size_t k = 0; k < CLASSES; k++)
        fprintf(names, "%d %.9g %zu %.9g\n", STEPS, middle[k], k, fabs(total[k]));
    fprintf(bands, "\n\n");
    fprintf(names, "\n\n");
    if (worst < 1e-12)
        return 0;
    fprintf(stderr, "the classes' contributions miss output %zu of digit %zu by %g\n", c, TRAIN + m, worst);
    return 1;
}

/* Of a decision that is wrong (or, where none is, of the first): the output decided for, and the output that
 * would have been right (or the second). */
static int draw_classes(pk_context *context, const report *r, const char *activation)
{
    size_t m = 0, other = CLASSES;
    while (m < TEST && !sheet_is_wrong(&r->sheet, m))
        m++;
    m = m < TEST ? m : 0;
    for (size_t c = 0; c < CLASSES; c++)
        if (c != r->read_as[m] &&
            (other == CLASSES || r->parts.final[m * CLASSES + c] > r->parts.final[m * CLASSES + other]))
            other = c;
    if (sheet_is_wrong(&r->sheet, m))
        other = (size_t)r->label[TRAIN + m];
    FILE *bands = tutorial_create(r->folder, "classes_bands.dat"),
         *names = tutorial_create(r->folder, "classes_names.dat"),
         *pixels = tutorial_create(r->folder, "classes_pixels.dat");
    if (!bands || !names || !pixels)
        return 1;
    const double *ink = (const double *)r->digits.inputs.data + (TRAIN + m) * 64;
    for (int i = 0; i < 64; i++)
        fprintf(pixels, "%g%c", ink[i], i % 8 < 7 ? ' ' : '\n');
    int failed = write_stack(context, r, m, r->read_as[m], bands, names) ||
                 write_stack(context, r, m, other, bands, names);
    failed += (fclose(bands) != 0) + (fclose(names) != 0) + (fclose(pixels) != 0);
    if (failed)
        return 1;
    char settings[256];
    snprintf(settings, sizeof settings,
             "activation = '%s'; label = %d; steps = %d; array output[2] = [%zu, %zu]", activation,
             (int)r->label[TRAIN + m], STEPS, r->read_as[m], other);
    return tutorial_plot(__FILE__, "02_classes.gp", r->folder, settings);
}

static int run(pk_context *context, report *r, const char *activation, const char *output, const char *data)
{
    char network[64], name[64], subtitle[96];
    snprintf(network, sizeof network, "input 64; dense 32; %s; dense 32; %s; dense 10", activation, activation);
    snprintf(name, sizeof name, "02_digits_report-%s", activation);
    if (tutorial_digits(context, data, __FILE__, &r->digits) || tutorial_folder(output, name, r->folder))
        return 1;
    r->label = (const int64_t *)r->digits.targets.data;
    TRY(pk_dataset_rows(context, &r->digits, 0, TRAIN, &r->train));
    for (int m = 0; m < TEST; m++)
        r->items[m] = TRAIN + m;
    r->inputs = (pk_real *)malloc(TEST * 64 * sizeof *r->inputs);
    if (!r->inputs)
        return perror("inputs"), 1;
    pk_dataset_inputs(&r->digits, r->items, TEST, r->inputs);
    TRY(pk_network_parse(context, network, &r->graph));
    if (train(context, r) || decompose(context, r) || check(r) || write_numbers(context, r))
        return 1;
    snprintf(subtitle, sizeof subtitle, "exact along %d steps of training (64-32-32-10, %s), %d digits", STEPS,
             activation, TRAIN);
    const sheet_subject subject = {&r->digits, TRAIN,     TEST,      r->items,
                                   r->read_as, &r->parts, r->folder, subtitle};
    r->sheet = subject;
    return draw_contact_sheet(&r->sheet, __FILE__) || draw_classes(context, r, activation);
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means empty, or the default */
    static report r;
    const char *activation = count > 1 ? arguments[1] : "tanh";
    int failed = run(&context, &r, activation, count > 2 ? arguments[2] : "pathkernel-out",
                     count > 3 ? arguments[3] : NULL);
    pk_decomposition_release(&context, &r.parts);
    pk_run_release(&context, &r.run);
    pk_graph_release(&context, &r.graph);
    pk_dataset_release(&context, &r.digits);
    free(r.inputs);
    return failed;
}
