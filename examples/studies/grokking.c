/* A study: grokking. A transformer learns to add modulo P: first by heart, much later by rule. What made it generalise?
 *
 * An example is the three tokens a, b, = (the number P), its answer (a + b) mod P; training sees some of the P x P
 * pairs. The network is one transformer layer without layer norm, whose heads share one projection for query, key and
 * value (Nanda et al. 2023; decomposed in ExPLAIND, Eichin et al. 2025); full batches, AdamW. With
 *
 *     g_s = sum_i grad l_i(w_s) / N,    m_{s+1} = b1 m_s + (1 - b1) g_s,    v_{s+1} = b2 v_s + (1 - b2) g_s^2,
 *     w_{s+1} = w_s - p_s m_{s+1} - rate decay w_s,
 *     p_s = rate / (1 - b1^{s+1}) / (sqrt(v_{s+1} / (1 - b2^{s+1})) + epsilon),
 *
 * a prediction h(x) of the trained network is its value before training, plus one number for each training pair i,
 * step s and layer l, plus what weight decay took away, exactly:
 *
 *     h(w_S, x) = h(w_0, x) + sum_{i, s, l} A(x, i, s, l) + decay(x),
 *     A(x, i, s, l) = - (1 - b1) < R_s(x), grad l_i(w_s) / N > over the weights of layer l,
 *     R_s(x) = p_s integral_0^1 grad h(w_s + t (w_{s+1} - w_s), x) dt + b1 R_{s+1}(x).
 *
 * Here h is the margin of the right answer c, f_c - mean_k f_k: softmax does not see what all outputs share. It is
 * decomposed for pairs that training never saw. Which training pairs made it: those with the same answer or others?
 * Through which layers, and when? (At the end gradients and decay hold each other. Where a
 * prediction is about linear in a matrix, decay takes rate decay h through it at each step, and the gradients give it
 * back: the same for each such layer.)
 *
 * Written into grokking in the output folder (default pathkernel-out), beside the recorded run: grokking.png,
 * the .dat files it is drawn from, by_example.npy (pairs, 1, N), by_step_and_layer.npy (pairs, 1, S, 7).
 *
 *     cc -O3 -fopenmp -I. examples/studies/grokking.c -o grokking -lm
 *     ./grokking [NAME=NUMBER ...] [OUTPUT FOLDER]
 *     ./grokking p=113 train=4000 width=64 hidden=512 decay=4 rate=0.001 steps=2000
 *
 * The last line is ExPLAIND's setting; on two cores half a second to train and four to decompose a step.
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "../tutorial.h"
#include <time.h>

enum { ASKED = 8, LAYERS = 7, CURVES = 50 };
enum { P, TRAIN, WIDTH, HIDDEN, STEPS, SEED, DECAY, RATE, SETTINGS };

static const char *const setting_names[SETTINGS] = {"p",     "train", "width", "hidden",
                                                    "steps", "seed",  "decay", "rate"};
static const char *const layer_names[LAYERS] = {"embedding",        "positions",        "query, key, value",
                                                "attention output", "hidden layer, in", "out of it",
                                                "unembedding"};

typedef struct experiment {
    double settings[SETTINGS];
    size_t p, train, pairs, steps; /* pairs = p * p; those from number train on are unseen */
    int64_t *tokens, *answers;     /* pairs x 3, pairs */
    pk_real *inputs, *outputs;     /* pairs x 3, pairs x p */
    double *margins;               /* steps + 1 : of the pairs asked about, at w_s, on average */
    FILE *accuracy;
    pk_graph graph;
    pk_dataset data;
    pk_run run;
    pk_decomposition parts;
    char folder[TUTORIAL_PATH];
} experiment;

static double seconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* All pairs in random order, those for training first. */
static int make_pairs(experiment *e)
{
    pk_random random = {(uint64_t)e->settings[SEED], 0, 0};
    int64_t *order = (int64_t *)malloc(e->pairs * sizeof *order);
    e->tokens = (int64_t *)malloc(3 * e->pairs * sizeof *e->tokens);
    e->answers = (int64_t *)malloc(e->pairs * sizeof *e->answers);
    e->inputs = (pk_real *)malloc(3 * e->pairs * sizeof *e->inputs);
    e->outputs = (pk_real *)malloc(e->pairs * e->p * sizeof *e->outputs);
    e->margins = (double *)calloc(e->steps + 1, sizeof *e->margins);
    if (!order || !e->tokens || !e->answers || !e->inputs || !e->outputs || !e->margins) {
        free(order);
        return perror("pairs"), 1;
    }
    const int64_t p = (int64_t)e->p;
    for (size_t i = 0; i < e->pairs; i++)
        order[i] = (int64_t)i;
    pk_random_shuffle(&random, e->pairs, order);
    for (size_t i = 0; i < e->pairs; i++) {
        int64_t *pair = e->tokens + 3 * i;
        pair[0] = order[i] / p;
        pair[1] = order[i] % p;
        pair[2] = p;
        e->answers[i] = (pair[0] + pair[1]) % p;
        for (int k = 0; k < 3; k++)
            e->inputs[3 * i + (size_t)k] = (pk_real)pair[k];
    }
    free(order);
    const size_t shape[2] = {e->train, 3}; /* tokens are recorded as whole numbers */
    e->data.inputs = pk_array_view(PK_INT64, 2, shape, e->tokens);
    e->data.targets = pk_array_view(PK_INT64, 1, shape, e->answers);
    return 0;
}

/* h and its slope; row 0 is the first unseen pair. */
static void margin(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope)
{
    const experiment *e = (const experiment *)user;
    const size_t answer = (size_t)e->answers[e->train + row];
    *h = f[answer];
    for (size_t k = 0; k < e->p; k++) {
        *h -= f[k] / (pk_real)e->p;
        if (slope)
            slope[k] = (k == answer) - 1 / (pk_real)e->p;
    }
}

static double accuracy(const experiment *e, size_t first, size_t end)
{
    double right = 0;
    for (size_t i = first; i < end; i++)
        right += (int64_t)tutorial_largest(e->outputs + i * e->p, e->p) == e->answers[i];
    return right / (double)(end - first);
}

/* The margins at w_s and, now and then, how many pairs are answered rightly. */
static pk_status measure(pk_context *context, experiment *e, size_t step, const pk_real *weights,
                         double objective)
{
    const size_t every = e->steps / CURVES + (e->steps < CURVES);
    const int all = step % every == 0 || step == e->steps;
    const size_t first = all ? 0 : e->train, rows = all ? e->pairs : (size_t)ASKED;
    pk_status status =
        pk_graph_evaluate(context, &e->graph, weights, pk_matrix_view(e->inputs + 3 * first, rows, 3),
                          pk_matrix_view(e->outputs + first * e->p, rows, e->p));
    for (size_t m = 0; m < ASKED && status == PK_OK; m++) {
        pk_real h;
        margin(e, m, e->outputs + (e->train + m) * e->p, &h, NULL);
        e->margins[step] += h / ASKED;
    }
    if (status != PK_OK || !all)
        return status;
    const double seen = accuracy(e, 0, e->train), unseen = accuracy(e, e->train, e->pairs);
    fprintf(e->accuracy, "%zu %g %g %g\n", step, 100 * seen, 100 * unseen, objective);
    if (step % (5 * every) == 0 || step == e->steps)
        printf("    %5zu   %9.4f   %5.1f %%    %5.1f %%\n", step, objective, 100 * seen, 100 * unseen);
    return PK_OK;
}

typedef struct watcher {
    pk_context *context;
    experiment *e;
} watcher;

static int on_step(void *user, size_t step, double objective, const pk_real *weights)
{
    const watcher *w = (const watcher *)user;
    fflush(stdout);
    return measure(w->context, w->e, step + 1, weights, objective) != PK_OK;
}

static int train(pk_context *context, experiment *e)
{
    watcher w = {context, e};
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.optimizer = pk_optimizer_adamw(); /* PyTorch's defaults */
    options.optimizer.beta2 = 0.98;
    options.optimizer.weight_decay = e->settings[DECAY];
    options.schedule.rate = e->settings[RATE];
    options.steps = e->steps;
    options.on_step = on_step;
    options.user = &w;
    options.record = e->folder;
    options.replace = 1;
    /* A run that would not fit a gigabyte keeps every k-th step; the others are repeated when they are needed. */
    options.keep_every = pk_recorder_choose_keep_every(e->graph.parameters, e->steps, 2, (uint64_t)1 << 30);
    pk_real *weights = (pk_real *)malloc(e->graph.parameters * sizeof *weights);
    if (!weights)
        return perror("weights"), 1;
    printf("%s\n%zu weights; %zu of %zu pairs to learn from.\n\n", e->graph.text, e->graph.parameters, e->train,
           e->pairs);
    printf("     step        loss   learned    unseen\n");
    double start = seconds();
    pk_status status = pk_network_initialize(context, &e->graph, (uint64_t)e->settings[SEED], weights);
    if (status == PK_OK)
        status = measure(context, e, 0, weights, log((double)e->p));
    if (status == PK_OK)
        status = pk_train(context, &e->graph, &e->data, &options, weights, NULL);
    free(weights);
    TRY(status);
    start = seconds() - start;
    printf("\n%zu steps in %.1f s, %.1f ms a step.\n", e->steps, start, 1e3 * start / (double)e->steps);
    return 0;
}

static int decompose(pk_context *context, experiment *e)
{
    pk_decompose_options options;
    memset(&options, 0, sizeof options);
    options.readout.kind = PK_READOUT_FUNCTION;
    options.readout.count = 1;
    options.readout.function = margin;
    options.readout.user = e;
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = PK_BY_STEP | PK_BY_LAYER;
    options.keep[2] = PK_BY_GROUP | PK_BY_STEP;
    options.groups = e->answers;
    options.group_count = e->p;
    TRY(pk_run_open(context, e->folder, &e->run));
    TRY(pk_decompose(context, &e->run, pk_matrix_view(e->inputs + 3 * e->train, ASKED, 3), &options,
                     &e->parts));
    const pk_decomposition *d = &e->parts;
    const double steps = (double)ASKED * (double)d->steps;
    printf("%d unseen pairs decomposed over %zu pairs, %zu steps and %zu layers in %.1f s, %.1f ms a step:\n",
           ASKED, d->examples, d->steps, d->layers, d->seconds, 1e3 * d->seconds / (double)d->steps);
    printf("    %.1f pieces and %.1f nodes for each pair and step\n", (double)d->pieces / steps,
           (double)d->points / steps);
    printf("    worst closure %.1e of the largest margin, unattributed at most %.1e\n", d->worst_closure,
           d->worst_unattributed);
    char path[TUTORIAL_PATH + 100];
    for (int k = 0; k < 2; k++) {
        snprintf(path, sizeof path, "%s/by_%s.npy", e->folder, k ? "step_and_layer" : "example");
        TRY(pk_array_write(context, path, PK_FLOAT64, d->kept[k].rank, d->kept[k].shape, d->kept[k].data));
    }
    return 0;
}

/* Sums up to each step, on average over the pairs asked about: all training pairs with the same answer, all others,
 * the layers one by one, and the margin itself by forward passes. Decay is what is left; it includes, until the end,
 * what momentum has still in store. */
static int write_curves(const experiment *e, double *by_layer)
{
    const pk_decomposition *d = &e->parts;
    double same = 0, others = 0;
    FILE *file = tutorial_create(e->folder, "curves.dat");
    if (!file)
        return 1;
    for (size_t s = 0; s <= e->steps; s++) {
        for (size_t m = 0; m < ASKED && s; m++) {
            for (size_t l = 0; l < LAYERS; l++)
                by_layer[l] += d->kept[1].data[(m * e->steps + s - 1) * LAYERS + l] / ASKED;
            for (size_t k = 0; k < e->p; k++)
                *(k == (size_t)e->answers[e->train + m] ? &same : &others) +=
                    d->kept[2].data[(m * e->p + k) * e->steps + s - 1] / ASKED;
        }
        fprintf(file, "%zu %g %g %g %g", s, e->margins[s] - e->margins[0], same, others,
                e->margins[s] - e->margins[0] - same - others);
        for (size_t l = 0; l < LAYERS; l++)
            fprintf(file, " %g", by_layer[l]);
        fprintf(file, "\n");
    }
    return fclose(file) ? perror("curves.dat"), 1 : 0;
}

/* What a training pair has in common with the pair asked about. */
static int relation(const int64_t *asked, int64_t answer, const int64_t *pair, int64_t other)
{
    const int swapped = pair[0] == asked[1] && pair[1] == asked[0];
    const int shares = pair[0] == asked[0] || pair[0] == asked[1] || pair[1] == asked[0] || pair[1] == asked[1];
    return swapped ? 0 : answer == other ? 1 : shares ? 2 : 3;
}

static int report(const experiment *e)
{
    static const char *const relations[4] = {"the same pair, swapped", "the same answer", "a summand in common",
                                             "nothing in common"};
    const pk_decomposition *d = &e->parts;
    double layers[LAYERS] = {0}, sums[4] = {0}, pairs[4] = {0}, initial = 0, decay = 0, final = 0, worst = 0;
    for (size_t m = 0; m < ASKED; m++) {
        double sum = 0;
        for (size_t i = 0; i < e->train; i++) {
            const int k = relation(e->tokens + 3 * (e->train + m), e->answers[e->train + m], e->tokens + 3 * i,
                                   e->answers[i]);
            const double value = d->by_example[m * e->train + i];
            sum += value;
            sums[k] += value / ASKED;
            pairs[k] += 1.0 / ASKED;
        }
        worst = fmax(worst, fabs(d->initial[m] + sum + d->decay[m] + d->unattributed[m] - d->final[m]) /
                                fmax(1, fabs(d->final[m])));
        initial += d->initial[m] / ASKED;
        decay += d->decay[m] / ASKED;
        final += d->final[m] / ASKED;
    }
    if (write_curves(e, layers))
        return 1;
    printf("\nThe margin of the right answer on unseen pairs, on average:\n    %+10.3f  before training\n",
           initial);
    for (int k = 0; k < 4; k++)
        printf("    %+10.3f  from %5.1f training pairs with %s, %+.4f each\n", sums[k], pairs[k], relations[k],
               sums[k] / fmax(pairs[k], 1));
    printf("    %+10.3f  taken by weight decay\n  = %+10.3f  after training\n", decay, final);
    printf("What the training pairs gave, through the layers:\n");
    for (int l = 0; l < LAYERS; l++)
        printf("    %+10.3f  %s\n", layers[l], layer_names[l]);
    if (worst < 1e-10 && fabs(e->margins[e->steps] - final) < 1e-10)
        return 0;
    fprintf(stderr, "initial + contributions + decay + unattributed misses the final margin by %g\n", worst);
    return 1;
}

static int read_settings(experiment *e, int count, char **arguments, const char **output)
{
    static const double defaults[SETTINGS] = {23, 0, 32, 128, 800, 1, 3, 0.005};
    memcpy(e->settings, defaults, sizeof defaults);
    for (int i = 1; i < count; i++) {
        const char *equals = strchr(arguments[i], '=');
        int k = 0;
        while (equals && k < SETTINGS &&
               (strlen(setting_names[k]) != (size_t)(equals - arguments[i]) ||
                strncmp(setting_names[k], arguments[i], strlen(setting_names[k])) != 0))
            k++;
        if (!equals)
            *output = *output ? *output : arguments[i]; /* behind it, other tutorials have a folder of data */
        else if (k < SETTINGS)
            e->settings[k] = atof(equals + 1);
        else
            return fprintf(stderr, "%s: the settings are p train width hidden steps seed decay rate\n",
                           arguments[i]),
                   1;
    }
    e->p = (size_t)e->settings[P];
    e->pairs = e->p * e->p;
    e->train = e->settings[TRAIN] > 0 ? (size_t)e->settings[TRAIN] : e->pairs * 3 / 5;
    e->steps = (size_t)e->settings[STEPS];
    if (e->p >= 2 && e->p <= 1000 && e->train + ASKED <= e->pairs && e->steps >= 1)
        return 0;
    fprintf(stderr, "p from 2 to 1000, at least one step, and %d pairs that are not trained on, please\n",
            ASKED);
    return 1;
}

static int run(pk_context *context, experiment *e, const char *output)
{
    char network[300], settings[400], *to = settings;
    const double *s = e->settings;
    if (tutorial_folder(output, "grokking", e->folder) || make_pairs(e))
        return 1;
    snprintf(network, sizeof network,
             "input 3; embedding %zu %g; position; residual( attention 4 nobias shared ); "
             "residual( dense %g; relu; dense %g ); token -1; dense %zu nobias",
             e->p + 1, s[WIDTH], s[HIDDEN], s[WIDTH], e->p);
    TRY(pk_network_parse(context, network, &e->graph));
    e->accuracy = tutorial_create(e->folder, "accuracy.dat");
    if (!e->accuracy || train(context, e))
        return 1;
    fflush(e->accuracy);
    if (decompose(context, e) || report(e))
        return 1;
    to += snprintf(settings, sizeof settings, "p = %zu; pairs = %zu; steps = %zu; array layer[%d] = [", e->p,
                   e->train, e->steps, LAYERS);
    for (int l = 0; l < LAYERS; l++)
        to += sprintf(to, "%s'%s'", l ? ", " : "", layer_names[l]);
    sprintf(to, "]");
    printf("The picture is grokking.png in %s.\n", e->folder);
    return tutorial_plot(__FILE__, "grokking.gp", e->folder, settings);
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means empty, or the default */
    static experiment e;
    const char *output = NULL;
    int failed =
        read_settings(&e, count, arguments, &output) || run(&context, &e, output ? output : "pathkernel-out");
    if (e.accuracy)
        fclose(e.accuracy);
    pk_decomposition_release(&context, &e.parts);
    pk_run_release(&context, &e.run);
    pk_graph_release(&context, &e.graph);
    free(e.tokens);
    free(e.answers);
    free(e.inputs);
    free(e.outputs);
    free(e.margins);
    return failed;
}
