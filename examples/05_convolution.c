/* 05: a convolutional network, trained in mini-batches with momentum, and decomposed exactly.
 *
 * With momentum a step also repeats the gradients of the steps before it,
 *
 *     v_{s+1} = mu v_s + sum_{i in B_s} grad l_i(w_s) / |B_s|,    w_{s+1} = w_s - rate v_{s+1},
 *
 * so what training digit i adds to output h on x is summed over the later steps that its gradient still moves:
 *
 *     A(x, i) = - sum_{s: i in B_s} < R_s(x), grad l_i(w_s) / |B_s| >,
 *     R_s(x)  = rate integral_0^1 grad h(w_s + t D_s, x) dt + mu R_{s+1}(x),    D_s = w_{s+1} - w_s.
 *
 * ReLU and max-pooling have kinks: there the gradient jumps along a step. Where the jumps are is not known before;
 * the exact rule finds them, layer by layer, and integrates the polynomials between them. Convolutions, pools and
 * momentum change nothing in the call.
 *
 * Written into 05_convolution in the output folder (default pathkernel-out), beside the recorded run:
 * by_example.npy (16, 1, 1437), contact_sheet.png and the .dat files it is drawn from.
 *
 *     cc -O3 -fopenmp -I. examples/05_convolution.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"
#include "contact_sheet.h"

#define NETWORK "input 1x8x8; conv 8 3x3 pad=1; relu; max_pool 2; conv 16 3x3 pad=1; relu; flatten; dense 10"
enum { TRAIN = 1437, UNSEEN = 360, TEST = 16, CLASSES = 10, EPOCHS = 4, BATCH = 64, FEW = 6 };

static const char *const layer_names[] = {"first convolution", "second convolution", "dense"};

typedef struct experiment {
    pk_dataset digits, train;
    pk_graph graph;
    pk_run run;
    pk_decomposition parts;
    /* Half of the digits that are decomposed are read wrongly: */
    int64_t items[TEST];
    size_t read_as[TEST];
    int64_t decided[TEST]; /* the same, as pk_readout wants it */
    pk_real inputs[TEST * 64];
    char folder[TUTORIAL_PATH];
} experiment;

static int label(const experiment *e, int64_t digit)
{
    return (int)((const int64_t *)e->digits.targets.data)[digit];
}

/* Reads the digits that training never saw, and chooses those that are decomposed: the first wrong ones and, up to
 * TEST, the first right ones. */
static int choose(pk_context *context, experiment *e, const pk_real *weights)
{
    static pk_real inputs[UNSEEN * 64], outputs[UNSEEN * CLASSES];
    int64_t unseen[UNSEEN];
    size_t chosen = 0, right = 0;
    for (int m = 0; m < UNSEEN; m++)
        unseen[m] = TRAIN + m;
    pk_dataset_inputs(&e->digits, unseen, UNSEEN, inputs);
    TRY(pk_graph_evaluate(context, &e->graph, weights, pk_matrix_view(inputs, UNSEEN, 64),
                          pk_matrix_view(outputs, UNSEEN, CLASSES)));
    for (int pass = 0; pass < 2; pass++) { /* wrong, right */
        for (size_t m = 0; m < UNSEEN; m++) {
            size_t decided = tutorial_largest(outputs + m * CLASSES, CLASSES);
            if (((int)decided == label(e, unseen[m])) != pass)
                continue;
            right += pass == 1;
            if (chosen < (pass ? TEST : TEST / 2)) {
                e->items[chosen] = unseen[m];
                e->decided[chosen] = (int64_t)decided;
                e->read_as[chosen++] = decided;
            }
        }
    }
    pk_dataset_inputs(&e->digits, e->items, TEST, e->inputs);
    printf("Of %d digits that it never saw it reads %zu rightly.\n", UNSEEN, right);
    return 0;
}

static int train(pk_context *context, experiment *e)
{
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.optimizer.momentum = 0.9; /* zeroed: plain gradient descent */
    options.schedule.rate = 0.1;
    options.batch_size = BATCH; /* shuffled anew in each epoch; the last batch of one is smaller */
    options.steps = EPOCHS * ((TRAIN + BATCH - 1) / BATCH);
    options.record = e->folder;
    options.replace = 1;
    pk_real *weights = (pk_real *)malloc(e->graph.parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_network_initialize(context, &e->graph, 1, weights);
    if (status == PK_OK)
        status = pk_train(context, &e->graph, &e->train, &options, weights, NULL);
    printf("%s: %zu weights, %zu steps of %d digits.\n", e->graph.text, e->graph.parameters, options.steps,
           BATCH);
    int failed = status == PK_OK && choose(context, e, weights);
    free(weights);
    TRY(status);
    return failed;
}

/* The output decided for, of the first `rows` digits chosen. One output and not ten: in a convolutional network most
 * of the time goes into one backward pass for each output and node. */
static pk_status decompose(pk_context *context, const experiment *e, pk_rule rule, int nodes, size_t rows,
                           pk_decomposition *parts)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.quadrature.rule = rule;
    options.quadrature.nodes = nodes;
    options.tolerance = 1e-12;
    options.readout.kind = PK_READOUT_LABEL;
    options.readout.labels = e->decided;
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_LAYER;
    return pk_decompose(context, &e->run, pk_matrix_view((pk_real *)e->inputs, rows, 64), &options, parts);
}

/* The same few digits by rules with fixed nodes, which cannot know where the kinks are. */
static int compare_rules(pk_context *context, const experiment *e)
{
    static const struct {
        const char *name;
        pk_rule rule;
        int nodes;
    } rules[] = {{"midpoint", PK_RULE_MIDPOINT, 1},
                 {"midpoint", PK_RULE_MIDPOINT, 10},
                 {"midpoint", PK_RULE_MIDPOINT, 100},
                 {"Gauss", PK_RULE_GAUSS, 32},
                 {"exact", PK_RULE_EXACT, 0}};
    double worst = 0;
    printf("\n%d digits by       nodes a step     closure    seconds\n", FEW);
    for (size_t k = 0; k < sizeof rules / sizeof *rules; k++) {
        pk_decomposition d;
        pk_status status = decompose(context, e, rules[k].rule, rules[k].nodes, FEW, &d);
        if (status != PK_NOT_CLOSED) /* computed all the same, and what we are here to see */
            TRY(status);
        worst = d.worst_closure;
        printf("    %-12s  %12.1f    %8.1e    %7.1f\n", rules[k].name,
               (double)d.points / ((double)FEW * (double)d.steps), worst, d.seconds);
        pk_decomposition_release(context, &d);
    }
    if (worst < 1e-12)
        return 0;
    fprintf(stderr, "the exact rule does not close: %g\n", worst);
    return 1;
}

/* What came of it, and that each way of adding up gives the same: by example, by layer, by forward passes. */
static int report(const experiment *e)
{
    const pk_decomposition *d = &e->parts;
    double worst = 0, layers[3] = {0};
    for (size_t m = 0; m < TEST; m++) {
        double examples = 0, by_layer = 0;
        for (size_t i = 0; i < TRAIN; i++)
            examples += d->by_example[m * TRAIN + i];
        for (size_t l = 0; l < d->layers; l++) {
            by_layer += d->by_layer[m * d->layers + l];
            layers[l] += d->by_layer[m * d->layers + l] / TEST;
        }
        const double change = d->final[m] - d->initial[m] - d->unattributed[m],
                     scale = fmax(1, fabs(d->final[m]));
        worst = fmax(worst, fmax(fabs(change - examples), fabs(change - by_layer)) / scale);
    }
    const double steps = (double)TEST * (double)d->steps;
    printf("\nThe decisions on %d digits, decomposed over %d training digits in %.1f s:\n", TEST, TRAIN,
           d->seconds);
    printf("    %.1f pieces between kinks and %.1f nodes for each digit and step\n", (double)d->pieces / steps,
           (double)d->points / steps);
    printf("    worst closure %.1e of a digit's largest output, unattributed at most %.1e\n", d->worst_closure,
           d->worst_unattributed);
    printf("    through which layer the output decided for was moved, on average:\n");
    for (size_t l = 0; l < d->layers; l++)
        printf("        %+8.3f  %s\n", layers[l], layer_names[l]);
    printf("    the training digits that moved it most:\n");
    for (size_t m = 0; m < TEST; m++) {
        size_t items[SHOWN], count = pk_strongest(d->by_example + m * TRAIN, TRAIN, 1, 3, items);
        printf("        digit %d, a %d, read as %zu:", (int)e->items[m], label(e, e->items[m]), e->read_as[m]);
        for (size_t k = 0; k < count; k++)
            printf("  %+.2f (%zu, a %d)", d->by_example[m * TRAIN + items[k]], items[k],
                   label(e, (int64_t)items[k]));
        printf("\n");
    }
    if (worst < 1e-12)
        return 0;
    fprintf(stderr, "initial + contributions + unattributed misses the final output by %g\n", worst);
    return 1;
}

static int run(pk_context *context, experiment *e, const char *output, const char *data)
{
    char path[TUTORIAL_PATH + 100], subtitle[96];
    if (tutorial_digits(context, data, __FILE__, &e->digits) ||
        tutorial_folder(output, "05_convolution", e->folder))
        return 1;
    TRY(pk_dataset_rows(context, &e->digits, 0, TRAIN, &e->train));
    TRY(pk_network_parse(context, NETWORK, &e->graph));
    if (train(context, e))
        return 1;
    TRY(pk_run_open(context, e->folder, &e->run));
    if (compare_rules(context, e))
        return 1;
    TRY(decompose(context, e, PK_RULE_AUTO, 0, TEST, &e->parts)); /* auto: exact, as there are only kinks */
    snprintf(path, sizeof path, "%s/by_example.npy", e->folder);
    TRY(pk_array_write(context, path, PK_FLOAT64, e->parts.kept[0].rank, e->parts.kept[0].shape,
                       e->parts.by_example));
    if (report(e))
        return 1;
    snprintf(subtitle, sizeof subtitle, "exact along %zu steps of a convolutional network, %d digits",
             e->run.steps, TRAIN);
    const sheet_subject subject = {&e->digits, TRAIN,     TEST,      e->items,
                                   e->read_as, &e->parts, e->folder, subtitle};
    printf("\nThe picture is contact_sheet.png in %s.\n", e->folder);
    return draw_contact_sheet(&subject, __FILE__);
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means empty, or the default */
    static experiment e;
    int failed =
        run(&context, &e, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
    pk_decomposition_release(&context, &e.parts);
    pk_run_release(&context, &e.run);
    pk_graph_release(&context, &e.graph);
    pk_dataset_release(&context, &e.digits);
    return failed;
}
