/* A study: a graph network. How far do labels reach?
 *
 * Documents cite each other; each has a subject and some words. Of a few the subject is known. A graph convolutional
 * network (Kipf & Welling 2017) guesses the others' from words and citations,
 *
 *     f(w) = A (relu(A (X W_1 + b_1)) W_2 + b_2),    A = D^{-1/2} (C + I) D^{-1/2},    C: who cites whom,
 *
 * and all of it, unlabelled documents too, takes part in each step (transductive learning). For the library an example
 * is the number of a node, the words X and the matrix A are arrays that the network names, and `select` reads one row:
 *
 *     input 1; constant words; dense 16; propagate citations; relu; dense 4; propagate citations; select
 *
 * An output reads words from two citations away, no farther. What it owes to the labelled documents is another matter:
 * all of them move the same weights,
 *
 *     f_c(w_S, x) = f_c(w_0, x) + sum over labelled i of A_c(x, i),
 *
 * and this file adds A_c(x, i) up by the number of citations between x and i.
 *
 * Rows are independent of each other in the library, so each row computes the whole graph: keep it small.
 *
 * Written into graph_network in the output folder (default pathkernel-out), beside the recorded run, which holds the
 * named arrays: by_example.npy (documents, 1, labelled), contributions.dat, distance.png.
 *
 *     cc -O3 -fopenmp -I. examples/studies/graph_network.c -lm && ./a.out [OUTPUT FOLDER]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "../tutorial.h"

#define NETWORK \
    "input 1; constant words; dense 16; propagate citations; relu; dense 4; propagate citations; select"
enum { NODES = 120, SUBJECTS = 4, WORDS = 40, LABELLED = 24, ASKED = 24, STEPS = 60, FAR = 6 };

/* Node n is about subject n % SUBJECTS; the first LABELLED nodes have their labels known. */
typedef struct documents {
    double words[NODES][WORDS];         /* 1: the word occurs */
    double citations[NODES * NODES][3]; /* row, column, value of A */
    size_t citation_count;
    int cites[NODES][NODES], distance[NODES][NODES]; /* FAR: that far or farther, or not connected */
    int64_t number[NODES], subject[NODES];
} documents;

/* A stochastic block model: citations mostly inside a subject; a third of the words are the subject's own. */
static void make_documents(documents *d)
{
    pk_random random = {1, 0, 0};
    double degree[NODES] = {0};
    for (int i = 0; i < NODES; i++) {
        d->number[i] = i;
        d->subject[i] = i % SUBJECTS;
        for (int k = 0; k < 6; k++) {
            int own = pk_random_uniform(&random) < 1 / 3.0, word = (int)pk_random_below(&random, WORDS);
            d->words[i][own ? word / SUBJECTS * SUBJECTS + i % SUBJECTS : word] = 1;
        }
        for (int j = 0; j < i; j++) {
            double chance =
                i % SUBJECTS == j % SUBJECTS ? 2.4 / (NODES / SUBJECTS) : 0.6 / (NODES - NODES / SUBJECTS);
            d->cites[i][j] = d->cites[j][i] = pk_random_uniform(&random) < chance;
        }
        d->cites[i][i] = 1; /* I */
    }
    for (int i = 0; i < NODES; i++)
        for (int j = 0; j < NODES; j++)
            degree[i] += d->cites[i][j];
    for (int i = 0; i < NODES; i++)
        for (int j = 0; j < NODES; j++)
            if (d->cites[i][j]) {
                double *entry = d->citations[d->citation_count++];
                entry[0] = i;
                entry[1] = j;
                entry[2] = 1 / sqrt(degree[i] * degree[j]);
            }
    for (int i = 0; i < NODES; i++)
        for (int j = 0; j < NODES; j++)
            d->distance[i][j] = i == j ? 0 : FAR;
    for (int far = 1; far < FAR; far++)
        for (int i = 0; i < NODES; i++)
            for (int j = 0; j < NODES; j++)
                for (int k = 0; k < NODES && d->distance[i][j] == FAR; k++)
                    if (d->distance[i][k] == far - 1 && d->cites[k][j])
                        d->distance[i][j] = far;
}

/* Gives the library the arrays that the network names. They are copied, also into the recording. */
static pk_status load(void *user, pk_context *context, const char *name, pk_array *array)
{
    const documents *d = (const documents *)user;
    const int words = strcmp(name, "words") == 0;
    const size_t shape[2] = {words ? NODES : d->citation_count, words ? WORDS : 3};
    (void)context;
    if (!words && strcmp(name, "citations") != 0)
        return PK_ARGUMENT;
    *array = pk_array_view(PK_FLOAT64, 2, shape, words ? &d->words[0][0] : &d->citations[0][0]);
    return PK_OK;
}

/* Trains on the labelled documents; answers become what the network reads every document as. */
static int train(pk_context *context, const documents *d, pk_graph *graph, const char *folder, int64_t *answers)
{
    pk_dataset data;
    pk_train_options options;
    pk_real inputs[NODES], outputs[NODES * SUBJECTS];
    const size_t shape[2] = {LABELLED, 1};
    memset(&data, 0, sizeof data);
    memset(&options, 0, sizeof options);
    data.inputs = pk_array_view(PK_INT64, 2, shape, d->number);
    data.targets = pk_array_view(PK_INT64, 1, shape, d->subject);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.schedule.rate = 1;
    options.steps = STEPS;
    options.record = folder;
    options.replace = 1;
    for (int i = 0; i < NODES; i++)
        inputs[i] = i;
    pk_real *weights = (pk_real *)malloc(graph->parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    pk_status status = pk_network_initialize(context, graph, 1, weights);
    if (status == PK_OK)
        status = pk_train(context, graph, &data, &options, weights, NULL);
    if (status == PK_OK)
        status = pk_graph_evaluate(context, graph, weights, pk_matrix_view(inputs, NODES, 1),
                                   pk_matrix_view(outputs, NODES, SUBJECTS));
    free(weights);
    TRY(status);
    int right = 0;
    for (int i = 0; i < NODES; i++) {
        answers[i] = (int64_t)tutorial_largest(outputs + i * SUBJECTS, SUBJECTS);
        right += i >= LABELLED && answers[i] == d->subject[i];
    }
    printf("%s\n%zu weights, %d steps. Of %d documents without label %d are read rightly.\n", graph->text,
           graph->parameters, STEPS, NODES - LABELLED, right);
    return 0;
}

/* By distance: labelled documents of the subject decided for, and of the others. */
static int report(const documents *d, const int64_t *answers, const int64_t *asked,
                  const pk_decomposition *parts, const char *folder)
{
    double sum[FAR + 1][2] = {{0}}, count[FAR + 1][2] = {{0}}, initial = 0, final = 0, worst = 0;
    FILE *file = tutorial_create(folder, "contributions.dat");
    if (!file)
        return 1;
    for (size_t m = 0; m < ASKED; m++) {
        double all = 0;
        for (size_t i = 0; i < LABELLED; i++) {
            const double value = parts->by_example[m * LABELLED + i];
            const int far = d->distance[asked[m]][i], other = d->subject[i] != answers[asked[m]];
            sum[far][other] += value / ASKED;
            count[far][other] += 1.0 / ASKED;
            all += value;
            fprintf(file, "%d %d %g\n", far, other, value);
        }
        initial += parts->initial[m] / ASKED;
        final += parts->final[m] / ASKED;
        worst = fmax(worst, fabs(parts->initial[m] + all + parts->unattributed[m] - parts->final[m]));
    }
    if (fclose(file))
        return perror("contributions.dat"), 1;
    printf("\nThe output decided for, on average %+.3f before training and %+.3f after. It owes\n\n", initial,
           final);
    printf("               to labelled documents of that subject       of other subjects\n");
    printf("    citations     number       sum   each             number       sum   each\n");
    for (int far = 0; far <= FAR; far++) {
        printf("    %d%-9s", far, far == FAR ? " and more" : "");
        for (int other = 0; other < 2; other++)
            if (count[far][other] > 0)
                printf("   %6.2f  %+8.3f %+6.3f%s", count[far][other], sum[far][other],
                       sum[far][other] / count[far][other], other ? "\n" : "       ");
            else
                printf("   %6d  %8s %6s%s", 0, "-", "-", other ? "\n" : "       ");
    }
    if (worst < 1e-12)
        return 0;
    fprintf(stderr, "initial + contributions + unattributed misses the final output by %g\n", worst);
    return 1;
}

static int run(pk_context *context, const char *output, pk_graph *graph, pk_run *recorded,
               pk_decomposition *parts)
{
    static documents d;
    char folder[TUTORIAL_PATH], path[TUTORIAL_PATH + 100];
    int64_t answers[NODES], asked[ASKED], decided[ASKED];
    pk_real inputs[ASKED];
    pk_constants constants = {load, &d};
    pk_decompose_options options;
    make_documents(&d);
    if (tutorial_folder(output, "graph_network", folder))
        return 1;
    TRY(pk_network_parse_with(context, NETWORK, &constants, graph));
    if (train(context, &d, graph, folder, answers))
        return 1;
    /* Four labelled documents, and others without label: the number of a node is all that a test input holds. */
    for (int m = 0; m < ASKED; m++) {
        asked[m] = m < 4 ? m : LABELLED + m - 4;
        inputs[m] = (pk_real)asked[m];
        decided[m] = answers[asked[m]];
    }
    memset(&options, 0, sizeof options);
    options.tolerance = 1e-12;
    options.readout.kind = PK_READOUT_LABEL;
    options.readout.labels = decided;
    TRY(pk_run_open(context, folder, recorded)); /* the named arrays are in the run: none to give */
    TRY(pk_decompose(context, recorded, pk_matrix_view(inputs, ASKED, 1), &options, parts));
    printf("%d decisions decomposed in %.1f s: %.1f pieces for each document and step, worst closure %.1e.\n",
           ASKED, parts->seconds, (double)parts->pieces / (ASKED * STEPS), parts->worst_closure);
    snprintf(path, sizeof path, "%s/by_example.npy", folder);
    TRY(pk_array_write(context, path, PK_FLOAT64, parts->kept[0].rank, parts->kept[0].shape,
                       parts->by_example));
    if (report(&d, answers, asked, parts, folder))
        return 1;
    printf("\nThe picture is distance.png in %s.\n", folder);
    return tutorial_plot(__FILE__, "graph_network.gp", folder, "");
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means empty, or the default */
    static pk_graph graph;
    static pk_run recorded;
    static pk_decomposition parts;
    int failed = run(&context, count > 1 ? arguments[1] : "pathkernel-out", &graph, &recorded, &parts);
    pk_decomposition_release(&context, &parts);
    pk_run_release(&context, &recorded);
    pk_graph_release(&context, &graph);
    return failed;
}
