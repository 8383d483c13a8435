/* 06: momentum and AdamW in reverse time.
 *
 * An optimizer with a state lets the gradient of step s act at all later steps. With the batch's weights c_{s,i} and the
 * gradients g_{s,i} of its examples,
 *
 *     m_{s+1} = carry_s m_s + gain_s sum_i c_{s,i} g_{s,i},
 *     D_s     = - p_s o (enter_s m_{s+1} + direct_s sum_i c_{s,i} g_{s,i}) - decoupled_s w_s      (o: number by number).
 *
 * Forward in time one momentum m^i for each training example i would do, N x P numbers:
 *
 *     m^i_{s+1} = carry_s m^i_s + gain_s c_{s,i} g_{s,i},
 *     A(x, i)   = - sum_s < Phi_s(x), p_s o (enter_s m^i_{s+1} + direct_s c_{s,i} g_{s,i}) >,
 *
 * where Phi_s(x) = integral_0^1 grad f(w_s + t D_s, x) dt. In the other order of summation, the last step first, one
 * vector R for each test row and output is enough, however many examples there are:
 *
 *     R_s = carry_{s+1} R_{s+1} + enter_s p_s o Phi_s   (R_S = 0),      E_s = gain_s R_s + direct_s p_s o Phi_s,
 *     A(x, i) = - sum_s c_{s,i} < E_s(x), g_{s,i} >,      decay = - sum_s decoupled_s < Phi_s, w_s >.
 *
 * pk_decompose works in this way. Here all three are computed and must agree, and
 * final = initial + sum_i A(x, i) + decay must hold.
 *
 *     cc -O3 -fopenmp -I. examples/06_reverse_time.c -lm && ./a.out [OUTPUT FOLDER [DATA FOLDER]]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

enum {
    TRAIN = 600,
    TEST_DIGIT = 1500,
    INPUTS = 64,
    CLASSES = 10,
    HIDDEN = 8,
    STEPS = 60,
    BATCH = 32,
    NODES = 8
};
enum { P = HIDDEN * (INPUTS + 1) + CLASSES * (HIDDEN + 1) };

/* All that the formulas above need of a run and one output of a test digit. */
typedef struct history {
    pk_linear_form form[STEPS]; /* carry, gain, enter, direct, decoupled */
    pk_real w[P], after[P], state[2 * P], p[STEPS][P], g[STEPS][BATCH][P];
    double phi[STEPS][P];
    pk_batch batch[STEPS];
    double decay;
} history;

static int read_history(pk_context *context, const pk_run *run, const pk_real *x, size_t output, history *h)
{
    static pk_real at[P], gradient[P], mean[P], update[P];
    double node[NODES], weight[NODES];
    pk_real one[CLASSES] = {0};
    one[output] = 1;
    pk_gauss_legendre(NODES, node, weight);
    memset(h, 0, sizeof *h);
    for (size_t s = 0; s < STEPS; s++) {
        TRY(pk_run_weights(context, run, s, h->w));
        TRY(pk_run_weights(context, run, s + 1, h->after));
        pk_run_batch(run, s, &h->batch[s]);
        TRY(pk_loss_gradients_with(context, &run->graph, &run->criterion, h->w, &run->train, &h->batch[s], NULL,
                              pk_matrix_view(h->g[s][0], h->batch[s].count, P)));
        memset(mean, 0, sizeof mean);
        for (size_t b = 0; b < h->batch[s].count; b++)
            for (size_t k = 0; k < P; k++)
                mean[k] += h->g[s][b][k] / (pk_real)h->batch[s].count;

        /* The optimizer's state is computed again, forward. Of it p needs Adam's second moments. */
        const double rate = run->learning_rates[s];
        pk_optimizer_update(&run->optimizer, s, rate, 1, P, h->w, mean, h->state, update);
        pk_optimizer_linear_form(&run->optimizer, s, rate, P, h->state, &h->form[s], h->p[s]);
        for (size_t k = 0; k < P && !h->form[s].preconditioned; k++)
            h->p[s][k] = (pk_real)h->form[s].rate;

        for (int n = 0; n < NODES; n++) {
            for (size_t k = 0; k < P; k++)
                at[k] = (pk_real)(h->w[k] + node[n] * (h->after[k] - h->w[k]));
            TRY(pk_vjp(context, &run->graph, at, pk_matrix_view((pk_real *)x, 1, INPUTS),
                       pk_matrix_view(one, 1, CLASSES), pk_matrix_view(gradient, 1, P),
                       pk_matrix_view(NULL, 0, 0)));
            for (size_t k = 0; k < P; k++)
                h->phi[s][k] += weight[n] * gradient[k];
        }
        for (size_t k = 0; k < P; k++)
            h->decay -= h->form[s].decoupled * h->phi[s][k] * h->w[k];
    }
    return 0;
}

/* One momentum for each training example. */
static void forward_in_time(const history *h, double *contributions)
{
    static double momentum[TRAIN][P];
    memset(momentum, 0, sizeof momentum);
    for (size_t s = 0; s < STEPS; s++) {
        const pk_linear_form *form = &h->form[s];
        for (size_t i = 0; i < TRAIN; i++)
            for (size_t k = 0; k < P; k++)
                momentum[i][k] *= form->carry;
        for (size_t b = 0; b < h->batch[s].count; b++)
            for (size_t k = 0; k < P; k++) {
                const double g = h->g[s][b][k] / (double)h->batch[s].count;
                momentum[h->batch[s].items[b]][k] += form->gain * g;
                contributions[h->batch[s].items[b]] -= form->direct * h->phi[s][k] * h->p[s][k] * g;
            }
        for (size_t i = 0; i < TRAIN; i++)
            for (size_t k = 0; k < P; k++)
                contributions[i] -= form->enter * h->phi[s][k] * h->p[s][k] * momentum[i][k];
    }
}

/* One vector R, and nothing for a training example. */
static void reverse_in_time(const history *h, double *contributions)
{
    double r[P] = {0}, carry = 0; /* that of the step after s */
    for (size_t s = STEPS; s-- > 0; carry = h->form[s].carry) {
        const pk_linear_form *form = &h->form[s];
        for (size_t k = 0; k < P; k++) {
            const double p_phi = h->p[s][k] * h->phi[s][k];
            r[k] = carry * r[k] + form->enter * p_phi;
            const double e = form->gain * r[k] + form->direct * p_phi;
            for (size_t b = 0; b < h->batch[s].count; b++)
                contributions[h->batch[s].items[b]] -= e * h->g[s][b][k] / (double)h->batch[s].count;
        }
    }
}

static int compare(pk_context *context, const pk_run *run, pk_real *x, size_t output)
{
    static double forward[TRAIN], reverse[TRAIN];
    static history h;
    pk_decomposition d;
    TRY(pk_decompose(context, run, pk_matrix_view(x, 1, INPUTS), NULL, &d));
    if (read_history(context, run, x, output, &h))
        return 1;
    memset(forward, 0, sizeof forward);
    memset(reverse, 0, sizeof reverse);
    forward_in_time(&h, forward);
    reverse_in_time(&h, reverse);

    const double *library = d.by_example + output * TRAIN;
    double largest = 0, sum = 0, error[3] = {0, 0, fabs(h.decay - d.decay[output])};
    for (size_t i = 0; i < TRAIN; i++) {
        largest = fmax(largest, fabs(library[i]));
        error[0] = fmax(error[0], fabs(forward[i] - library[i]));
        error[1] = fmax(error[1], fabs(reverse[i] - library[i]));
        sum += library[i];
    }
    const double missed = d.initial[output] + sum + d.decay[output] + d.unattributed[output] - d.final[output];
    printf("  output %zu: %+.12f = %+.12f before training %+.12f from examples %+.12f by weight decay\n",
           output, d.final[output], d.initial[output], sum, d.decay[output]);
    printf(
        "  largest contribution %.2e; from it differ, at most: forward in time, %d vectors, %.1e; reverse, one "
        "vector, %.1e;\n  weight decay %.1e. The identity misses %.1e, unattributed %.1e.\n",
        largest, TRAIN, error[0], error[1], error[2], missed, d.unattributed[output]);
    const double limit = sizeof(pk_real) < sizeof(double) ? 1e-4 : 1e-12;
    const int failed = !(error[0] < limit && error[1] < limit && error[2] < limit && fabs(missed) < limit &&
                         fabs(d.unattributed[output]) < limit);
    pk_decomposition_release(context, &d);
    return failed ? fprintf(stderr, "one of these is more than rounding\n"), 1 : 0;
}

static int run(pk_context *context, const char *output, const char *data)
{
    static const struct {
        const char *optimizer;
        double rate;
    } rules[] = {
        {"sgd momentum=0.9", 0.1}, {"sgd momentum=0.9 nesterov=1", 0.1}, {"adamw weight_decay=0.1", 0.01}};
    static pk_dataset digits, learned;
    static pk_graph graph;
    pk_real weights[P], x[INPUTS];
    const int64_t item = TEST_DIGIT;
    char folder[TUTORIAL_PATH];
    if (tutorial_digits(context, data, __FILE__, &digits) || tutorial_folder(output, "06_reverse_time", folder))
        return 1;
    pk_dataset_inputs(&digits, &item, 1, x);
    TRY(pk_dataset_rows(context, &digits, 0, TRAIN, &learned));
    TRY(pk_network_parse(context, "input 64; dense 8; tanh; dense 10", &graph));
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        pk_train_options options;
        pk_run recorded;
        memset(&options, 0, sizeof options);
        options.loss = PK_SOFTMAX_CROSS_ENTROPY;
        TRY(pk_optimizer_parse(context, rules[i].optimizer, &options.optimizer));
        options.schedule.rate = rules[i].rate;
        options.steps = STEPS;
        options.batch_size = BATCH;
        options.record = folder;
        options.replace = 1;
        TRY(pk_network_initialize(context, &graph, 1, weights));
        TRY(pk_train(context, &graph, &learned, &options, weights, NULL));
        TRY(pk_run_open(context, folder, &recorded));
        printf("%s, %d steps of %d digits:\n", rules[i].optimizer, STEPS, BATCH);
        const int failed =
            compare(context, &recorded, x, (size_t)((const int64_t *)digits.targets.data)[TEST_DIGIT]);
        pk_run_release(context, &recorded);
        if (failed)
            return 1;
    }
    pk_graph_release(context, &graph);
    pk_dataset_release(context, &digits);
    return 0;
}

int main(int count, char **arguments)
{
    static pk_context context; /* static, that is zeroed: zero means the default */
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out", count > 2 ? arguments[2] : NULL);
}
