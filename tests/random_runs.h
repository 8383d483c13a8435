/* random_runs.h: random training runs of all kinds of networks, optimisers and scales, for tests only, and how far their
 * decompositions are from those of graph_oracle.h.
 *
 *     rr_run run;
 *     rr_make(seed, RR_ANY, &run);              the same seed, the same run
 *     go_decompose(&run.run, run.rows, run.inputs, &truth);
 *     rr_compare(&run, &truth, 1e-7, &verdict);
 *     rr_free(&run);
 *
 * Rates are set step by step so that a step moves the weights by a chosen part of their size: no run diverges, at any
 * scale. Small networks only: P up to about 300. */
#ifndef RANDOM_RUNS_H
#define RANDOM_RUNS_H
#include "graph_oracle.h"

#define RR_FUNCTION static inline

typedef enum rr_kind { RR_SMOOTH, RR_LINEAR /* piecewise */, RR_MIXED, RR_KINDS, RR_ANY = RR_KINDS } rr_kind;
enum { RR_TEXT = 900, RR_MOST_ROWS = 6 };
/* Seeds from here on draw layers and rules that came later, too; the others draw the runs that they always did. */
enum { RR_MORE = 1000000 };

typedef struct rr_run {
    pk_context context;
    pk_run run; /* as recorded and opened again */
    uint64_t seed;
    rr_kind kind;
    size_t rows;
    pk_real *inputs; /* rows x D: what is decomposed */
    double scale;    /* of the outputs */
    double pace;     /* how far a step moves the weights, relative to their size */
    char network[RR_TEXT], optimizer[160];
} rr_run;

/* ---- choices ---- */

RR_FUNCTION size_t rr_below(uint64_t *random, size_t n)
{
    return (size_t)(bf_uniform(random) * (double)n);
}

RR_FUNCTION int rr_chance(uint64_t *random, double probability)
{
    return bf_uniform(random) < probability;
}

RR_FUNCTION const char *rr_one_of(uint64_t *random, size_t count, const char *const *words)
{
    return words[rr_below(random, count)];
}

/* log-uniform */
RR_FUNCTION double rr_between(uint64_t *random, double low, double high)
{
    return low * pow(high / low, bf_uniform(random));
}

/* ---- networks: the text so far and the shape behind it ---- */

typedef struct rr_text {
    uint64_t *random;
    rr_kind kind;
    size_t used, rank, dims[3]; /* rank 1: a vector, 2: tokens x width, 3: an image */
    char *text;
    int more;     /* see RR_MORE */
    size_t names; /* of values so far */
} rr_text;

RR_FUNCTION void rr_say(rr_text *t, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    t->used += (size_t)vsnprintf(t->text + t->used, RR_TEXT - t->used, format, arguments);
    va_end(arguments);
    if (t->used >= RR_TEXT)
        abort();
}

RR_FUNCTION int rr_smooth_allowed(const rr_text *t)
{
    return t->kind != RR_LINEAR;
}

RR_FUNCTION void rr_activation(rr_text *t)
{
    static const char *const smooth[] = {"tanh", "sigmoid", "softplus", "softplus 2.5", "gelu",
                                         "silu", "erf",     "sine",     "sine 0.5"};
    static const char *const kinked[] = {"relu",           "relu", "relu",     "leaky_relu",
                                         "leaky_relu 0.2", "abs",  "hard_tanh"};
    static const char *const more_smooth[] = {"gelu tanh", "mish", "log_sigmoid", "softmin"};
    static const char *const more_kinked[] = {"relu6", "hard_sigmoid", "prelu"};
    static const char *const joined[] = {"elu", "elu 0.3", "selu", "softsign", "hardswish"};
    const int kink = t->kind == RR_LINEAR || (t->kind == RR_MIXED && rr_chance(t->random, 0.5));
    if (t->more && rr_chance(t->random, 0.5)) {
        rr_say(t, "; %s",
               t->kind == RR_MIXED && rr_chance(t->random, 0.4) ? rr_one_of(t->random, 5, joined)
               : kink                                           ? rr_one_of(t->random, 3, more_kinked)
                                                                : rr_one_of(t->random, 4, more_smooth));
        return;
    }
    rr_say(t, "; %s",
           kink ? kinked[rr_below(t->random, sizeof kinked / sizeof *kinked)]
                : smooth[rr_below(t->random, sizeof smooth / sizeof *smooth)]);
}

RR_FUNCTION void rr_norm(rr_text *t)
{
    const char *const affine = rr_chance(t->random, 0.3) ? " noaffine" : "";
    if (t->more && rr_smooth_allowed(t) && rr_chance(t->random, 0.3)) {
        if (t->rank == 3 && t->dims[1] * t->dims[2] > 2 && rr_chance(t->random, 0.5))
            rr_say(t, "; instance_norm epsilon=1e-2%s", affine);
        else
            rr_say(t, "; group_norm 1%s", affine);
        return;
    }
    switch (rr_below(t->random, rr_smooth_allowed(t) ? 4 : 2)) {
    case 0: rr_say(t, "; batch_norm stat%zu%s", t->dims[0], affine); break;
    case 1: rr_say(t, rr_chance(t->random, 0.3) ? "; scale 1.5" : "; affine"); break;
    case 2: rr_say(t, "; layer_norm%s%s", t->rank == 3 ? " dims=3" : "", affine); break;
    default: rr_say(t, "; rms_norm%s", affine); break;
    }
}

RR_FUNCTION void rr_dense(rr_text *t, size_t width, int zero)
{
    rr_say(t, "; dense %zu%s%s", width, rr_chance(t->random, 0.25) ? " nobias" : "",
           zero                         ? " init=zero"
           : rr_chance(t->random, 0.08) ? " ntk"
                                        : "");
    t->dims[t->rank - 1] = width;
}

/* Networks of values behind a vector: a gate, a sum of parts, a quotient, the largest of each pair, other places. */
RR_FUNCTION void rr_values(rr_text *t)
{
    const size_t width = t->dims[0], name = t->names++;
    switch (rr_below(t->random, rr_smooth_allowed(t) ? 6 : 5)) {
    case 0:
        rr_say(t, "; as v%zu; dense %zu; %s; multiply v%zu", name, width,
               t->kind == RR_LINEAR ? "relu" : "sigmoid", name);
        break;
    case 1: rr_say(t, "; as v%zu; dense %zu; subtract v%zu", name, width, name); break;
    case 2:
        rr_dense(t, 4, 0);
        rr_say(t, "; reshape 2x2; %s %zu", rr_chance(t->random, 0.5) ? "max" : "min", rr_below(t->random, 2));
        t->dims[0] = 2;
        break;
    case 3:
        rr_say(t, "; gather places2_3_%zu; sum %zu", width, rr_below(t->random, 2));
        rr_say(t, "; dense 3");
        t->dims[0] = 3;
        break;
    case 4:
        rr_dense(t, 4, 0);
        rr_say(t, "; reshape 2x2; as v%zu; matmul v%zu%s; flatten", name, name,
               rr_chance(t->random, 0.5) ? " transpose" : "");
        break;
    default:
        rr_say(
            t,
            "; as v%zu; power 2; affine scalar nobias; power 2; as w%zu; parameter 1; exp; add w%zu; as w%zuq; "
            "from v%zu; divide w%zuq",
            name, name, name, name, name, name);
    }
}

RR_FUNCTION void rr_block(rr_text *t)
{
    rr_dense(t, 3 + rr_below(t->random, 5), 0);
    if (rr_chance(t->random, 0.25))
        rr_norm(t);
    if (rr_chance(t->random, 0.95))
        rr_activation(t);
}

/* residual( ... ) of vectors or tokens; its last layer may start at zero */
RR_FUNCTION void rr_residual(rr_text *t)
{
    const size_t width = t->dims[t->rank - 1];
    rr_say(t, "; residual( identity");
    if (rr_chance(t->random, 0.5))
        rr_norm(t);
    rr_block(t);
    rr_dense(t, width, rr_chance(t->random, 0.4));
    if (rr_chance(t->random, 0.2))
        rr_activation(t);
    if (rr_chance(t->random, 0.2))
        rr_say(t, " | dense %zu", width);
    rr_say(t, " )");
}

RR_FUNCTION void rr_vector_network(rr_text *t)
{
    t->rank = 1;
    t->dims[0] = 2 + rr_below(t->random, 6);
    rr_say(t, "input %zu", t->dims[0]);
    if (rr_chance(t->random, 0.12)) {
        const size_t count = 2 + rr_below(t->random, 3);
        rr_say(t, "; fourier %zu scale=0.3 seed=%zu", count, rr_below(t->random, 100));
        t->dims[0] = 2 * count;
    }
    for (size_t blocks = 1 + rr_below(t->random, 3); blocks; blocks--)
        if (t->more && rr_chance(t->random, 0.5))
            rr_values(t);
        else if (rr_chance(t->random, 0.3))
            rr_residual(t);
        else
            rr_block(t);
    if (rr_smooth_allowed(t) && rr_chance(t->random, 0.08))
        rr_say(t, "; softmax");
}

RR_FUNCTION void rr_conv(rr_text *t, int same, int zero)
{
    const size_t groups = t->dims[0] % 2 == 0 && rr_chance(t->random, 0.3) ? 2 : 1;
    size_t kernel[2], pad = same ? 1 : rr_below(t->random, 2), stride = same ? 1 : 1 + rr_below(t->random, 2);
    const size_t channels = same ? t->dims[0] : groups * (1 + rr_below(t->random, 3 - groups + 1));
    for (int side = 0; side < 2; side++)
        kernel[side] = same ? 3 : 1 + rr_below(t->random, 3);
    for (int side = 0; side < 2; side++)
        kernel[side] = kernel[side] > t->dims[1 + side] + 2 * pad ? 1 : kernel[side];
    const size_t reach = t->dims[1] < t->dims[2] ? t->dims[1] : t->dims[2];
    const size_t dilation =
        !same && kernel[0] == 2 && kernel[1] == 2 && reach > 2 && rr_chance(t->random, 0.3) ? 2 : 1;
    rr_say(t, "; conv %zu %zux%zu stride=%zu pad=%zu dilation=%zu groups=%zu%s%s", channels, kernel[0],
           kernel[1], stride, pad, dilation, groups, rr_chance(t->random, 0.25) ? " nobias" : "",
           zero ? " init=zero" : "");
    t->dims[0] = channels;
    for (int side = 0; side < 2; side++)
        t->dims[1 + side] = (t->dims[1 + side] + 2 * pad - (kernel[side] - 1) * dilation - 1) / stride + 1;
}

RR_FUNCTION void rr_image_network(rr_text *t)
{
    t->rank = 3;
    t->dims[0] = 1 + rr_below(t->random, 2);
    t->dims[1] = 3 + rr_below(t->random, 3);
    t->dims[2] = 3 + rr_below(t->random, 3);
    rr_say(t, "input %zux%zux%zu", t->dims[0], t->dims[1], t->dims[2]);
    for (size_t blocks = 1 + rr_below(t->random, 2); blocks; blocks--) {
        if (rr_chance(t->random, 0.3)) {
            rr_say(t, "; residual( identity");
            rr_conv(t, 1, 0);
            rr_activation(t);
            rr_conv(t, 1, rr_chance(t->random, 0.4));
            rr_say(t, " )");
        } else
            rr_conv(t, 0, 0);
        if (rr_chance(t->random, 0.3))
            rr_norm(t);
        rr_activation(t);
    }
    if (t->more && rr_chance(t->random, 0.4)) {
        const int transposed = rr_chance(t->random, 0.4);
        rr_say(t,
               transposed                  ? "; conv_transpose %zu 2 stride=2"
               : rr_chance(t->random, 0.5) ? "; upsample 2"
                                           : "; upsample 2 bilinear",
               t->dims[0]);
        t->dims[1] *= 2, t->dims[2] *= 2;
    }
    if (t->dims[1] > 1 && t->dims[2] > 1 && rr_chance(t->random, 0.5)) {
        const int most = t->kind != RR_SMOOTH && rr_chance(t->random, 0.6), pad = rr_chance(t->random, 0.2);
        rr_say(t, "; %s_pool 2 stride=%d pad=%d", most ? "max" : "avg", pad ? 2 : 1, pad);
        for (int side = 1; side < 3; side++)
            t->dims[side] = pad ? t->dims[side] / 2 + 1 : t->dims[side] - 1;
    }
    if (rr_chance(t->random, 0.3))
        rr_say(t, "; global_avg_pool");
    else {
        rr_say(t, "; flatten");
        t->dims[0] *= t->dims[1] * t->dims[2];
    }
    t->rank = 1;
    if (rr_chance(t->random, 0.4))
        rr_block(t);
}

/* tokens x width: attention (where smooth parts are allowed) and dense branches */
RR_FUNCTION void rr_token_body(rr_text *t)
{
    const size_t width = t->dims[1];
    if (rr_chance(t->random, 0.5))
        rr_say(t, "; position");
    for (size_t blocks = 1 + rr_below(t->random, 2); blocks; blocks--)
        if (rr_smooth_allowed(t) && rr_chance(t->random, 0.7)) {
            const int bare = rr_chance(t->random, 0.15);
            rr_say(t, bare ? "" : "; residual( identity");
            if (!bare && rr_chance(t->random, 0.6))
                rr_say(t, rr_chance(t->random, 0.5) ? "; layer_norm" : "; rms_norm");
            rr_say(t, "; attention %zu%s%s%s", width % 2 ? 1 : 1 + rr_below(t->random, 2),
                   rr_chance(t->random, 0.5) ? " causal" : "", rr_chance(t->random, 0.25) ? " shared" : "",
                   rr_chance(t->random, 0.3) ? " nobias" : "");
            rr_say(t, bare ? "" : " )");
        } else
            rr_residual(t);
    switch (rr_below(t->random, 3)) {
    case 0: rr_say(t, "; mean_tokens"); break;
    case 1: rr_say(t, "; token %d", (int)rr_below(t->random, t->dims[0] + 1) - 1); break;
    default: rr_say(t, "; flatten"); t->dims[1] *= t->dims[0];
    }
    t->rank = 1;
    t->dims[0] = t->dims[1];
}

/* -> how many tokens the vocabulary of the inputs has; 0: the inputs are numbers */
RR_FUNCTION size_t rr_token_network(rr_text *t)
{
    const size_t vocabulary = rr_chance(t->random, 0.6) ? 3 + rr_below(t->random, 4) : 0;
    t->rank = 2;
    t->dims[0] = 2 + rr_below(t->random, 3);
    t->dims[1] = 2 + rr_below(t->random, 3);
    if (vocabulary && t->more && rr_chance(t->random, 0.5))
        rr_say(t, "input %zu; embedding %zu %zu padding=%zu first=1", t->dims[0] + 1, vocabulary, t->dims[1],
               rr_below(t->random, vocabulary));
    else if (vocabulary)
        rr_say(t, "input %zu; embedding %zu %zu", t->dims[0], vocabulary, t->dims[1]);
    else
        rr_say(t, "input %zux%zu", t->dims[0], t->dims[1]);
    rr_token_body(t);
    return vocabulary;
}

/* a graph network: the input is the number of a vertex, or a row of tokens */
RR_FUNCTION size_t rr_vertex_network(rr_text *t)
{
    const int table = rr_chance(t->random, 0.5);
    t->rank = 2;
    t->dims[0] = 3 + rr_below(t->random, 3);
    t->dims[1] = 2 + rr_below(t->random, 3);
    const size_t vertices = t->dims[0];
    if (table)
        rr_say(t, "input 1; constant table%zu_%zu", t->dims[0], t->dims[1]);
    else
        rr_say(t, "input %zux%zu", t->dims[0], t->dims[1]);
    for (size_t blocks = 1 + rr_below(t->random, 2); blocks; blocks--) {
        rr_dense(t, 3 + rr_below(t->random, 3), 0);
        rr_say(t, "; propagate edges%zu", vertices);
        rr_activation(t);
    }
    rr_say(t, table ? "; select" : "; mean_tokens");
    t->rank = 1;
    t->dims[0] = t->dims[1];
    return table ? vertices : 0;
}

/* The arrays that these networks name: their sizes and their numbers follow from the names. */
RR_FUNCTION pk_status rr_load(void *user, pk_context *context, const char *name, pk_array *array)
{
    uint64_t random = *(const uint64_t *)user;
    size_t shape[2] = {0, 0}, count = 0, of = 0;
    double values[3 * 40];
    for (const char *at = name; *at; at++)
        random = random * 31 + (uint64_t)*at;
    if (sscanf(name, "stat%zu", &shape[1]) == 1) {
        shape[0] = 2;
        for (count = 0; count < 2 * shape[1]; count++)
            values[count] = count < shape[1] ? 0.5 * bf_normal(&random) : 0.25 + 2 * bf_uniform(&random);
    } else if (sscanf(name, "table%zu_%zu", &shape[0], &shape[1]) == 2) {
        for (count = 0; count < shape[0] * shape[1]; count++)
            values[count] = bf_normal(&random);
    } else if (sscanf(name, "places%zu_%zu_%zu", &shape[0], &shape[1], &of) == 3) {
        for (count = 0; count < shape[0] * shape[1]; count++)
            values[count] = rr_chance(&random, 0.1) ? -1 : (double)rr_below(&random, of);
    } else if (sscanf(name, "edges%zu", &shape[0]) == 1) {
        const size_t vertices = shape[0];
        shape[1] = 3;
        for (size_t i = 0; i < 2 * vertices; i++) {
            values[count++] = (double)(i / 2);
            values[count++] = (double)(i % 2 ? rr_below(&random, vertices) : i / 2);
            values[count++] = 0.3 + 0.5 * bf_uniform(&random);
        }
        shape[0] = count / 3;
    }
    if (!count || count > sizeof values / sizeof *values)
        abort();
    /* the context owns what the caller releases */
    double *copy = NULL;
    pk_status status = pk_allocate(context, count, sizeof *values, "an array", &copy);
    if (status)
        return status;
    memcpy(copy, values, count * sizeof *values);
    *array = pk_array_view(PK_FLOAT64, 2, shape, copy);
    array->owned = copy;
    return PK_OK;
}

/* ---- runs ---- */

RR_FUNCTION void rr_optimizer(uint64_t *random, int more, char *text, size_t size)
{
    const double decay = rr_chance(random, 0.4) ? rr_between(random, 1e-3, 0.1) : 0;
    const double momentum = 0.5 + 0.45 * bf_uniform(random);
    if (more && rr_chance(random, 0.5)) {
        const int maximize = rr_chance(random, 0.2);
        switch (rr_below(random, 3)) {
        case 0:
            snprintf(text, size, "rmsprop alpha=%.3g momentum=%.3g weight_decay=%.3g maximize=%d",
                     0.5 + 0.49 * bf_uniform(random), rr_chance(random, 0.5) ? momentum : 0, decay, maximize);
            break;
        case 1:
            snprintf(text, size,
                     "adagrad lr_decay=%.3g initial_accumulator_value=%.3g weight_decay=%.3g maximize=%d",
                     0.1 * bf_uniform(random), rr_chance(random, 0.5) ? 0.1 : 0, decay, maximize);
            break;
        default:
            snprintf(text, size,
                     "nadam beta1=%.3g weight_decay=%.3g decoupled_weight_decay=%d float32_product=0 "
                     "maximize=%d",
                     momentum, decay, rr_chance(random, 0.5), maximize);
        }
        return;
    }
    switch (rr_below(random, 6)) {
    case 0: snprintf(text, size, "sgd weight_decay=%.3g", decay); break;
    case 1: snprintf(text, size, "sgd momentum=%.3g weight_decay=%.3g", momentum, decay); break;
    case 2: snprintf(text, size, "sgd momentum=%.3g dampening=%.3g", momentum, bf_uniform(random)); break;
    case 3: snprintf(text, size, "sgd momentum=%.3g nesterov=1 weight_decay=%.3g", momentum, decay); break;
    case 4:
        snprintf(text, size, "adam beta2=%.3g weight_decay=%.3g", 0.9 + 0.099 * bf_uniform(random), decay);
        break;
    default: snprintf(text, size, "adamw beta1=%.3g weight_decay=%.3g", 0.5 + 0.45 * bf_uniform(random), decay);
    }
}

/* A row of inputs: normal, or (one in ten) blank, or in part zero; or tokens. */
RR_FUNCTION void rr_inputs(uint64_t *random, size_t vocabulary, size_t count, double scale, pk_real *row)
{
    const int blank = rr_chance(random, 0.1), sparse = rr_chance(random, 0.2);
    for (size_t i = 0; i < count; i++) {
        const double value = bf_normal(random);
        row[i] = (pk_real)(vocabulary                                    ? (double)rr_below(random, vocabulary)
                           : blank || (sparse && rr_chance(random, 0.5)) ? 0
                                                                         : scale * value);
    }
}

RR_FUNCTION double rr_norm_of(size_t count, const pk_real *values)
{
    double sum = 0, largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = fmax(largest, fabs((double)values[i]));
    for (size_t i = 0; i < count && largest > 0; i++)
        sum += (double)values[i] / largest * ((double)values[i] / largest);
    return largest * sqrt(sum);
}

/* How many times the update the weights may be moved until they have changed by their own size: all together (only where
 * the layers' scales are alike), or until the first layer has; layers that are zero count as ordinary ones. */
RR_FUNCTION double rr_room(const rr_run *r, const pk_graph *graph, int together, const pk_real *weights,
                           const pk_real *update)
{
    double room = HUGE_VAL;
    if (together)
        return rr_norm_of(graph->parameters, weights) / rr_norm_of(graph->parameters, update);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *layer = pk_graph_layer(graph, l);
        const double move = rr_norm_of(layer->weight_count, update + layer->weight_offset);
        double size = rr_norm_of(layer->weight_count, weights + layer->weight_offset);
        if (size == 0)
            size = 0.3 * sqrt((double)layer->weight_count) * (l + 1 == graph->layers ? r->scale : 1);
        if (move > 0)
            room = fmin(room, size / move);
    }
    return room;
}

/* Trains and records: batches with repeats, weights, clipping, all at random. */
RR_FUNCTION void rr_train(rr_run *r, uint64_t *random, const pk_graph *graph, pk_loss loss,
                          const pk_dataset *train, size_t steps, pk_real *weights, const char *directory)
{
    const size_t P = graph->parameters, N = pk_dataset_examples(train);
    pk_recorder_options options;
    pk_recorder recorder;
    pk_optimizer optimizer;
    pk_gradient_workspace workspace;
    const pk_constants constants = pk_graph_constants(graph);
    memset(&options, 0, sizeof options);
    memset(&recorder, 0, sizeof recorder);
    memset(&workspace, 0, sizeof workspace);
    assert_ok(&r->context, pk_optimizer_parse(&r->context, r->optimizer, &optimizer));
    options.network = r->network;
    options.constants = &constants;
    options.loss = pk_loss_name(loss);
    options.optimizer = r->optimizer;
    options.batch_weights = rr_chance(random, 0.3);
    options.gradient_scales = 1;
    options.second_moments =
        (optimizer.kind == PK_ADAM || optimizer.kind == PK_ADAMW) && rr_chance(random, 0.3);
    const int clipped = rr_chance(random, 0.3), together = r->scale == 1 && rr_chance(random, 0.5);
    assert_ok(&r->context, pk_recorder_open(&r->context, directory, &options, train, weights, &recorder));
    assert_ok(&r->context, pk_gradient_prepare(&r->context, graph, 2 * N, &workspace));
    pk_real *gradient = BF_NEW(pk_real, P), *update = BF_NEW(pk_real, P), *state = BF_NEW(pk_real, 3 * P),
            *trial = BF_NEW(pk_real, 3 * P);
    int64_t *items = BF_NEW(int64_t, 2 * N);
    double *shares = BF_NEW(double, 2 * N);
    for (size_t s = 0; s < steps; s++) {
        const int full = rr_chance(random, 0.3);
        pk_batch batch = {full ? N : 1 + rr_below(random, N), items, options.batch_weights ? shares : NULL};
        for (size_t b = 0; b < batch.count; b++) {
            items[b] = (int64_t)(full ? b : rr_below(random, N));
            shares[b] = (0.5 + bf_uniform(random)) / (double)batch.count;
        }
        assert_ok(&r->context, pk_batch_gradient(&r->context, graph, loss, weights, train, &batch, &workspace,
                                                 NULL, gradient));
        const double clip = clipped ? pk_clip_scale(gradient, P, 0.5 * rr_norm_of(P, gradient)) : 1;
        /* Updates are proportional to the rate: a trial at rate 1 tells the rate that gives the wanted size. */
        memcpy(trial, state, 3 * P * sizeof *state);
        pk_optimizer_update(&optimizer, s, 1, clip, P, weights, gradient, trial, update);
        double rate = r->pace * (0.5 + bf_uniform(random)) * rr_room(r, graph, together, weights, update);
        rate = rate > 0 && isfinite(rate) ? rate : 0.1;
        pk_optimizer_update(&optimizer, s, rate, clip, P, weights, gradient, state, update);
        for (size_t p = 0; p < P; p++)
            weights[p] += update[p];
        const pk_real *moments = options.second_moments ? state + P : NULL;
        assert_ok(&r->context, pk_recorder_step(&r->context, &recorder, rate, &batch, clip, moments, weights));
    }
    assert_ok(&r->context, pk_recorder_close(&r->context, &recorder));
    pk_gradient_release(&r->context, &workspace);
    free(gradient), free(update), free(state), free(trial), free(items), free(shares);
}

RR_FUNCTION void rr_random_network(uint64_t *random, rr_kind kind, int more, char *text, size_t outputs,
                                   int logarithm, size_t *vocabulary)
{
    rr_text t;
    memset(&t, 0, sizeof t);
    t.random = random;
    t.kind = kind;
    t.more = more;
    t.text = text;
    *vocabulary = 0;
    switch (rr_below(random, 8)) {
    case 0:
    case 1:
    case 2: rr_vector_network(&t); break;
    case 3:
    case 4: rr_image_network(&t); break;
    case 5:
    case 6: *vocabulary = rr_token_network(&t); break;
    default: *vocabulary = rr_vertex_network(&t);
    }
    rr_say(&t, "; dense %zu%s%s", outputs, rr_chance(random, 0.25) ? " nobias" : "",
           logarithm ? "; log_softmax" : "");
}

/* What a run is made of. */
typedef struct rr_recipe {
    uint64_t random, seed;
    rr_kind kind;
    char network[RR_TEXT], optimizer[160];
    pk_loss loss;
    size_t vocabulary; /* of inputs that are tokens; 0: numbers */
    size_t examples, steps, rows;
    double pace, scale; /* of rr_run */
    double spread;      /* of the inputs */
    double zeroed;      /* how probable it is that weights of some layer start at zero */
    int unscaled;       /* 1: the scale is in the network's text, not in the last layer's weights */
} rr_recipe;

/* A recipe for a given network and rule: 6 examples, 4 steps, 3 rows, ordinary sizes. */
RR_FUNCTION rr_recipe rr_plain(const char *network, const char *optimizer, pk_loss loss, size_t vocabulary,
                               uint64_t seed)
{
    rr_recipe recipe;
    memset(&recipe, 0, sizeof recipe);
    recipe.random = seed * 0x2545f4914f6cdd1du + 7;
    recipe.seed = seed;
    recipe.kind = RR_ANY;
    snprintf(recipe.network, sizeof recipe.network, "%s", network);
    snprintf(recipe.optimizer, sizeof recipe.optimizer, "%s", optimizer);
    recipe.loss = loss;
    recipe.vocabulary = vocabulary;
    recipe.examples = 6, recipe.steps = 4, recipe.rows = 3;
    recipe.pace = 0.1, recipe.scale = recipe.spread = 1;
    return recipe;
}

/* The recipe of a seed, of one kind of network or of any. */
RR_FUNCTION void rr_choose(uint64_t seed, rr_kind kind, rr_recipe *r)
{
    static const pk_loss losses[] = {
        PK_SQUARED, PK_MEAN_SQUARED, PK_SOFTMAX_CROSS_ENTROPY, PK_SOFTMAX_CROSS_ENTROPY, PK_LOGISTIC, PK_NLL,
        PK_HUBER,   PK_HINGE};
    const pk_constants constants = {rr_load, &seed};
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(r, 0, sizeof *r);
    r->seed = seed;
    r->random = seed * 0x2545f4914f6cdd1du + 99;
    uint64_t *random = &r->random;
    r->kind = kind != RR_ANY ? kind : (rr_kind)(seed % RR_KINDS);
    r->loss = losses[rr_below(random, sizeof losses / sizeof *losses)];
    const size_t C = (r->loss == PK_SOFTMAX_CROSS_ENTROPY) + 1 + rr_below(random, 3);
    r->examples = 4 + rr_below(random, 5);
    r->steps = 2 + rr_below(random, 4);
    const int logarithm = r->loss == PK_NLL && r->kind != RR_LINEAR && rr_chance(random, 0.8);
    for (int small = 0; !small;) {
        memset(&graph, 0, sizeof graph);
        rr_random_network(random, r->kind, seed >= RR_MORE, r->network, C, logarithm, &r->vocabulary);
        assert_ok(&context, pk_network_parse_with(&context, r->network, &constants, &graph));
        small = graph.parameters <= 300;
        pk_graph_release(&context, &graph);
    }
    rr_optimizer(random, seed >= RR_MORE, r->optimizer, sizeof r->optimizer);
    const double part = bf_uniform(random);
    r->pace = part < 0.2 ? rr_between(random, 1e-6, 1e-3) : rr_between(random, part < 0.4 ? 1e-3 : 0.1, 3);
    r->scale = rr_chance(random, 0.5) || logarithm ? 1 : rr_between(random, 1e-12, 1e12);
    /* In the last weights it lets them alone move; in a layer of its own, all. */
    r->unscaled = r->scale != 1 && rr_chance(random, 0.5);
    if (r->unscaled)
        snprintf(r->network + strlen(r->network), 30, "; scale %.3g", r->scale);
    r->rows = 2 + rr_below(random, RR_MOST_ROWS - 1);
    r->spread = rr_chance(random, 0.2) ? rr_between(random, 1e-2, 10) : 1;
    r->zeroed = 0.15;
}

RR_FUNCTION void rr_build(const rr_recipe *recipe, rr_run *r)
{
    uint64_t random = recipe->random, constant_seed = recipe->seed;
    const pk_constants constants = {rr_load, &constant_seed};
    const pk_loss loss = recipe->loss;
    const char *temporary = getenv("TMPDIR");
    char directory[300];
    pk_graph graph;
    memset(&graph, 0, sizeof graph);
    memset(r, 0, sizeof *r);
    r->context.threads = 1;
    r->seed = recipe->seed, r->kind = recipe->kind;
    r->scale = recipe->scale, r->pace = recipe->pace, r->rows = recipe->rows;
    memcpy(r->network, recipe->network, sizeof r->network);
    memcpy(r->optimizer, recipe->optimizer, sizeof r->optimizer);
    assert_ok(&r->context, pk_network_parse_with(&r->context, r->network, &constants, &graph));
    const size_t P = graph.parameters, D = graph.input_width, C = graph.output_width, N = recipe->examples;
    const int labels = loss == PK_SOFTMAX_CROSS_ENTROPY || loss == PK_NLL || (loss == PK_HINGE && C > 1);
    r->inputs = BF_NEW(pk_real, r->rows * D);
    for (size_t i = 0; i < r->rows; i++)
        rr_inputs(&random, recipe->vocabulary, D, recipe->spread, r->inputs + i * D);
    pk_real *data = BF_NEW(pk_real, N * D), *numbers = BF_NEW(pk_real, N * C), *weights = BF_NEW(pk_real, P);
    int64_t *classes = BF_NEW(int64_t, N);
    for (size_t i = 0; i < N; i++) {
        rr_inputs(&random, recipe->vocabulary, D, recipe->spread, data + i * D);
        classes[i] = (int64_t)rr_below(&random, C);
        for (size_t c = 0; c < C; c++)
            numbers[i * C + c] = (pk_real)(loss == PK_LOGISTIC ? bf_uniform(&random) < 0.5
                                           : loss == PK_HINGE  ? (bf_uniform(&random) < 0.5 ? -1 : 1)
                                                               : r->scale * bf_normal(&random));
    }
    const size_t shape_x[2] = {N, D}, shape_y[2] = {N, C};
    const pk_dataset train = {pk_array_view(REAL_TYPE, 2, shape_x, data),
                              labels ? pk_array_view(PK_INT64, 1, shape_y, classes)
                                     : pk_array_view(REAL_TYPE, 2, shape_y, numbers)};
    assert_ok(&r->context, pk_network_initialize(&r->context, &graph, recipe->seed, weights));
    /* Some weights start at zero; those of the last dense layer carry the scale. */
    const pk_node *last = pk_graph_layer(&graph, graph.layers - 1);
    for (size_t p = 0; p < last->weight_count && !recipe->unscaled; p++)
        weights[last->weight_offset + p] *= (pk_real)r->scale;
    if (rr_chance(&random, recipe->zeroed)) {
        const pk_node *zeroed = pk_graph_layer(&graph, rr_below(&random, graph.layers));
        const double zeros = rr_chance(&random, 0.5) ? 1 : 0.5;
        for (size_t p = 0; p < zeroed->weight_count; p++)
            if (rr_chance(&random, zeros))
                weights[zeroed->weight_offset + p] = 0;
    }
    snprintf(directory, sizeof directory, "%.200s/pathkernel-run-XXXXXX", temporary ? temporary : "/tmp");
    assert_non_null(mkdtemp(directory));
    rr_train(r, &random, &graph, loss, &train, recipe->steps, weights, directory);
    assert_ok(&r->context, pk_run_open(&r->context, directory, &r->run));
    fixture_clear(directory);
    pk_graph_release(&r->context, &graph);
    free(data), free(numbers), free(weights), free(classes);
}

/* The run of a seed. */
RR_FUNCTION void rr_make(uint64_t seed, rr_kind kind, rr_run *r)
{
    rr_recipe recipe;
    rr_choose(seed, kind, &recipe);
    rr_build(&recipe, r);
}

RR_FUNCTION void rr_free(rr_run *r)
{
    pk_run_release(&r->context, &r->run);
    assert_int_equal(r->context.memory_used, 0);
    free(r->inputs);
    memset(r, 0, sizeof *r);
}

/* ---- the comparison ---- */

typedef struct rr_verdict {
    pk_status status;
    size_t entries, above; /* entries further off than their bound and the oracle's accuracy allow */
    double largest;        /* entry */
    double error;          /* the worst |error| / largest entry */
    double excess;         /* the worst |error| / bound */
    double loosest;        /* the largest bound / largest entry */
    double *looseness;     /* entries: bound / max(|error|, rounding); 0: no bound is needed */
    double closure;        /* the worst |closure| / largest entry */
    double row_closure;    /* the worst |closure| / max(|initial|, |final|, |entry|) of a row's output */
    double reported;       /* worst_closure, as the library reports it */
    /* Cells whose |closure| exceeds the sum of their bounds; of those, by more than what rounding leaves of two forward
     * passes (16 roundings of the row's largest output); and the worst |closure| / (sum + that rounding). */
    size_t cells, open, wide_open;
    double open_factor;
    size_t points, pieces, refused;
    double others;   /* the worst error of by_step, by_layer, decay, unattributed / largest of all entries */
    double accuracy; /* the oracle's, / largest entry */
    size_t worst_entry;
} rr_verdict;

RR_FUNCTION double rr_worst(size_t count, const double *got, const bf_real *truth)
{
    return fixture_error(count, got, truth);
}

/* bounds 0: without bounds. The caller frees verdict->looseness. */
RR_FUNCTION void rr_compare(rr_run *r, const go_result *truth, double tolerance, int bounds,
                            rr_verdict *verdict)
{
    const pk_matrix inputs = pk_matrix_view(r->inputs, r->rows, r->run.graph.input_width);
    const size_t N = truth->examples, cells = truth->rows * truth->outputs;
    pk_decompose_options options;
    pk_decomposition got;
    memset(&options, 0, sizeof options);
    memset(verdict, 0, sizeof *verdict);
    options.tolerance = tolerance;
    options.unattributed = HUGE_VAL; /* what it leaves is compared, not judged */
    options.bounds = bounds;
    options.keep[0] = PK_BY_EXAMPLE, options.keep[1] = PK_BY_STEP, options.keep[2] = PK_BY_LAYER;
    verdict->status = pk_decompose(&r->context, &r->run, inputs, &options, &got);
    if (verdict->status != PK_NOT_CLOSED)
        assert_ok(&r->context, verdict->status);
    verdict->entries = cells * N;
    verdict->cells = cells;
    verdict->largest = fixture_largest_real(cells * N, truth->by_example);
    verdict->accuracy = fixture_largest_real(cells * N, truth->accuracy);
    verdict->looseness = BF_NEW(double, cells *N);
    verdict->points = got.points, verdict->pieces = got.pieces, verdict->refused = got.refused;
    verdict->reported = got.worst_closure;
    const double largest = verdict->largest > 0 ? verdict->largest : 1;
    verdict->accuracy /= largest;
    for (size_t i = 0; i < cells * N; i++) {
        double error = fabs((double)((bf_real)got.by_example[i] - truth->by_example[i]));
        error = isnan(error) ? (double)INFINITY : error;
        verdict->error = fmax(verdict->error, error / largest);
        if (!bounds)
            continue;
        verdict->loosest = fmax(verdict->loosest, got.bounds[i] / largest);
        const double beyond = error - (double)truth->accuracy[i],
                     factor = beyond <= 0 ? 0 : beyond / got.bounds[i];
        if (!(factor <= 1))
            verdict->above++;
        if (!(factor <= verdict->excess)) {
            verdict->excess = factor;
            verdict->worst_entry = i;
        }
        const double rounding = 8 * (double)truth->accuracy[i]; /* about one of double in each of its terms */
        verdict->looseness[i] = got.bounds[i] > 0 ? got.bounds[i] / fmax(fmax(error, rounding), DBL_MIN) : 0;
    }
    for (size_t cell = 0; cell < cells; cell++) {
        double sum = 0;
        verdict->closure = fmax(verdict->closure, fabs(got.closure[cell]) / largest);
        double size = fmax(fabs(got.initial[cell]), fabs(got.final[cell]));
        size = fmax(size, fixture_largest_real(N, truth->by_example + cell * N));
        if (got.closure[cell] != 0)
            verdict->row_closure = fmax(verdict->row_closure, fabs(got.closure[cell]) / size);
        for (size_t i = 0; bounds && i < N; i++)
            sum += got.bounds[cell * N + i];
        if (!bounds)
            continue;
        const double *first = got.initial + cell / got.outputs * got.outputs,
                     *last = got.final + cell / got.outputs * got.outputs;
        double height = 0;
        for (size_t k = 0; k < got.outputs; k++)
            height = fmax(height, fmax(fabs(first[k]), fabs(last[k])));
        const double floor = sum + 16 * DBL_EPSILON * height;
        verdict->open += !(fabs(got.closure[cell]) <= sum);
        verdict->wide_open += !(fabs(got.closure[cell]) <= floor);
        if (floor > 0)
            verdict->open_factor = fmax(verdict->open_factor, fabs(got.closure[cell]) / floor);
    }
    double all = largest;
    all = fmax(all, fixture_largest_real(cells * truth->steps, truth->by_step));
    all = fmax(all, fixture_largest_real(cells * truth->layers, truth->by_layer));
    all = fmax(all, fixture_largest_real(cells, truth->decay));
    verdict->others = rr_worst(cells * truth->steps, got.by_step, truth->by_step);
    verdict->others = fmax(verdict->others, rr_worst(cells * truth->layers, got.by_layer, truth->by_layer));
    verdict->others = fmax(verdict->others, rr_worst(cells, got.decay, truth->decay));
    verdict->others = fmax(verdict->others, rr_worst(cells, got.unattributed, truth->unattributed));
    verdict->others /= all;
    pk_decomposition_release(&r->context, &got);
}
#endif
