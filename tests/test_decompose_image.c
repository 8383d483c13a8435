/* Decompositions of runs of convolutional networks against brute force in long double: a naive network of its own,
 * kinks by sampling and bisection of every sign and every maximum, whole Jacobians, and a moment for every example
 * carried forward in time. */
#include "fixture.h"

enum { EXAMPLES = 5, STEPS = 4, ROWS = 2, NODES = 16, SAMPLES = 128 };

typedef enum naive_kind { INPUT, CONV, RELU, MAX_POOL, AVG_POOL, DENSE, ADD } naive_kind;

/* One layer: of node `from`, ADD also of node `other`; squares only. */
typedef struct naive_layer {
    naive_kind kind;
    int from, other, out, kernel, stride, pad, groups, nobias;
} naive_layer;

typedef struct subject {
    const char *network;
    naive_layer layers[NODES]; /* the first is the input: out channels of kernel x kernel */
} subject;

/* ---- the naive network ------------------------------------------------------------------------------- */

typedef struct naive {
    const naive_layer *layers;
    int count;
    int channels[NODES], side[NODES];
    size_t width[NODES], offset[NODES + 1]; /* offset: of the weights */
    bf_real *value[NODES], *cotangent[NODES];
    int *signature; /* signs and places of maxima */
    size_t signs;
} naive;

static void naive_open(naive *net, const naive_layer *layers)
{
    memset(net, 0, sizeof *net);
    net->layers = layers;
    for (int n = 0; n < NODES && (n == 0 || layers[n].kind != INPUT); n++) {
        const naive_layer *l = &layers[n];
        const int side = n ? net->side[l->from] : l->kernel, channels = n ? net->channels[l->from] : l->out;
        const int windows = l->kind == CONV || l->kind == MAX_POOL || l->kind == AVG_POOL;
        size_t weights = 0;
        net->side[n] = windows ? (side + 2 * l->pad - l->kernel) / l->stride + 1 : l->kind == DENSE ? 1 : side;
        net->channels[n] = l->kind == CONV || l->kind == DENSE ? l->out : channels;
        net->width[n] = (size_t)(net->channels[n] * net->side[n] * net->side[n]);
        if (l->kind == CONV)
            weights = (size_t)(l->out * (channels / l->groups * l->kernel * l->kernel + !l->nobias));
        if (l->kind == DENSE)
            weights = (size_t)l->out * (net->width[l->from] + 1);
        net->offset[n + 1] = net->offset[n] + weights;
        net->value[n] = BF_NEW(bf_real, net->width[n]);
        net->cotangent[n] = BF_NEW(bf_real, net->width[n]);
        net->signs += l->kind == RELU || l->kind == MAX_POOL ? net->width[n] : 0;
        net->count = n + 1;
    }
    net->signature = FIXTURE_NEW(int, net->signs);
}

static void naive_close(naive *net)
{
    for (int n = 0; n < net->count; n++)
        free(net->value[n]), free(net->cotangent[n]);
    free(net->signature);
}

/* One window: conv and pools at output (o, y, x). Going back, cotangents and weights' gradients instead. */
static void naive_window(naive *net, int n, const bf_real *w, int o, int y, int x, int back, bf_real *gradient,
                         int *place)
{
    const naive_layer *l = &net->layers[n];
    const int side = net->side[l->from], conv = l->kind == CONV, inner = net->channels[l->from];
    const int group_in = conv ? inner / l->groups : 1, group_out = conv ? l->out / l->groups : 1;
    const size_t at = (size_t)((o * net->side[n] + y) * net->side[n] + x);
    const size_t bias = net->offset[n + 1] - (size_t)net->channels[n];
    const bf_real *in = net->value[l->from], share = 1 / (bf_real)(l->kernel * l->kernel);
    bf_real *delta = net->cotangent[l->from], own = net->cotangent[n][at], sum = 0;
    if (conv && !l->nobias) {
        sum = w[bias + (size_t)o];
        if (back)
            gradient[bias + (size_t)o] += own;
    }
    if (l->kind == MAX_POOL && back) {
        delta[*place] += own;
        return;
    }
    *place = -1;
    for (int c = 0; c < group_in; c++)
        for (int i = 0; i < l->kernel; i++)
            for (int j = 0; j < l->kernel; j++) {
                const int v = y * l->stride + i - l->pad, h = x * l->stride + j - l->pad;
                const int from = ((o / group_out * group_in + c) * side + v) * side + h;
                const size_t weight =
                    net->offset[n] + (size_t)(((o * group_in + c) * l->kernel + i) * l->kernel + j);
                if (v < 0 || h < 0 || v >= side || h >= side)
                    continue;
                if (l->kind == MAX_POOL) {
                    if (*place < 0 || in[from] > in[*place])
                        *place = from;
                } else if (back) {
                    delta[from] += own * (conv ? w[weight] : share);
                    if (conv)
                        gradient[weight] += own * in[from];
                } else
                    sum += in[from] * (conv ? w[weight] : share);
            }
    if (!back)
        net->value[n][at] = l->kind == MAX_POOL ? in[*place] : sum;
}

static void naive_layer_run(naive *net, int n, const bf_real *w, int back, bf_real *gradient, int **signature)
{
    const naive_layer *l = &net->layers[n];
    const bf_real *in = net->value[l->from];
    bf_real *delta = net->cotangent[l->from];
    int ignored = 0;
    for (size_t at = 0; at < net->width[n]; at++) {
        const bf_real own = net->cotangent[n][at];
        const size_t inputs = net->width[l->from], row = net->offset[n] + at * inputs,
                     bias = net->offset[n] + (size_t)l->out * inputs + at;
        const int side = net->side[n], place = (int)at;
        int *sign = l->kind == RELU || l->kind == MAX_POOL ? (*signature)++ : &ignored;
        switch (l->kind) {
        case RELU:
            *sign = in[at] > 0;
            if (back)
                delta[at] += *sign ? own : 0;
            else
                net->value[n][at] = *sign ? in[at] : 0;
            break;
        case ADD:
            if (back) {
                delta[at] += own;
                net->cotangent[l->other][at] += own;
            } else
                net->value[n][at] = in[at] + net->value[l->other][at];
            break;
        case DENSE:
            if (!back)
                net->value[n][at] = w[bias];
            else
                gradient[bias] += own;
            for (size_t k = 0; k < inputs; k++) {
                if (!back)
                    net->value[n][at] += w[row + k] * in[k];
                else {
                    delta[k] += own * w[row + k];
                    gradient[row + k] += own * in[k];
                }
            }
            break;
        default:
            naive_window(net, n, w, place / side / side, place / side % side, place % side, back, gradient,
                         sign);
        }
    }
}

static void naive_forward(naive *net, const bf_real *w, const pk_real *x)
{
    int *signature = net->signature;
    for (size_t i = 0; i < net->width[0]; i++)
        net->value[0][i] = (bf_real)x[i];
    for (int n = 1; n < net->count; n++)
        naive_layer_run(net, n, w, 0, NULL, &signature);
}

/* gradient (P) += that of seed . output, after naive_forward. */
static void naive_reverse(naive *net, const bf_real *w, const bf_real *seed, bf_real *gradient)
{
    int *signature = net->signature + net->signs;
    for (int n = 0; n < net->count; n++)
        memset(net->cotangent[n], 0, net->width[n] * sizeof **net->cotangent);
    memcpy(net->cotangent[net->count - 1], seed, net->width[net->count - 1] * sizeof *seed);
    for (int n = net->count - 1; n > 0; n--) {
        const naive_kind kind = net->layers[n].kind;
        if (kind == RELU || kind == MAX_POOL)
            signature -= net->width[n];
        int *own = signature;
        naive_layer_run(net, n, w, 1, gradient, &own);
    }
}

/* ---- along a step ------------------------------------------------------------------------------------ */

typedef struct path {
    naive *net;
    const bf_real *from, *to;
    bf_real *at;
    const pk_real *x;
    bf_real *kinks;
    size_t count, capacity;
} path;

static void path_at(path *p, bf_real t)
{
    for (size_t i = 0; i < p->net->offset[p->net->count]; i++)
        p->at[i] = p->from[i] + t * (p->to[i] - p->from[i]);
    naive_forward(p->net, p->at, p->x);
}

/* Kinks inside (low, high), of which the ends have these signatures. */
static void path_kinks(path *p, bf_real low, bf_real high, const int *at_low, const int *at_high)
{
    const size_t bytes = p->net->signs * sizeof *at_low;
    const bf_real middle = (low + high) / 2;
    if (memcmp(at_low, at_high, bytes) == 0)
        return;
    if (high - low < 8 * BF_EPSILON) {
        assert_true(p->count < p->capacity);
        p->kinks[p->count++] = middle;
        return;
    }
    int *at_middle = FIXTURE_NEW(int, p->net->signs);
    path_at(p, middle);
    memcpy(at_middle, p->net->signature, bytes);
    path_kinks(p, low, middle, at_low, at_middle);
    path_kinks(p, middle, high, at_middle, at_high);
    free(at_middle);
}

/* phi (C x P) = the Jacobian's integral over t. */
static size_t path_jacobian(path *p, bf_real *phi)
{
    const size_t P = p->net->offset[p->net->count], C = p->net->width[p->net->count - 1];
    bf_real node[BF_NODES], weight[BF_NODES], seed[8], *gradient = BF_NEW(bf_real, P);
    int *before = FIXTURE_NEW(int, p->net->signs), *here = FIXTURE_NEW(int, p->net->signs);
    bf_gauss_legendre(node, weight);
    memset(phi, 0, C * P * sizeof *phi);
    p->count = 0;
    for (int k = 0; k <= SAMPLES; k++) {
        path_at(p, (bf_real)k / SAMPLES);
        memcpy(here, p->net->signature, p->net->signs * sizeof *here);
        if (k)
            path_kinks(p, (bf_real)(k - 1) / SAMPLES, (bf_real)k / SAMPLES, before, here);
        memcpy(before, here, p->net->signs * sizeof *here);
    }
    for (size_t piece = 0; piece <= p->count; piece++) {
        const bf_real a = piece ? p->kinks[piece - 1] : 0, b = piece < p->count ? p->kinks[piece] : 1;
        for (int q = 0; q < BF_NODES; q++) {
            path_at(p, (a + b + (b - a) * node[q]) / 2);
            for (size_t c = 0; c < C; c++) {
                for (size_t k = 0; k < C; k++)
                    seed[k] = k == c;
                memset(gradient, 0, P * sizeof *gradient);
                naive_reverse(p->net, p->at, seed, gradient);
                for (size_t i = 0; i < P; i++)
                    phi[c * P + i] += weight[q] * (b - a) / 2 * gradient[i];
            }
        }
    }
    free(gradient), free(before), free(here);
    return p->count + 1;
}

/* ---- the decomposition ------------------------------------------------------------------------------- */

typedef struct truth {
    bf_real *by_example, *by_layer, *decay, *initial, *final_output;
    bf_real closure; /* the worst one of the brute force itself */
    size_t pieces;
} truth;

static bf_real *run_weights(pk_context *context, const pk_run *run, size_t step)
{
    pk_real *weights = FIXTURE_NEW(pk_real, run->graph.parameters);
    assert_ok(context, pk_run_weights(context, run, step, weights));
    bf_real *extended = bf_extend(run->graph.parameters, weights);
    free(weights);
    return extended;
}

static void brute(pk_context *context, const pk_run *run, naive *net, const bf_optimizer *optimizer,
                  const pk_real *data, const pk_real *targets, const pk_real *test, truth *out)
{
    const size_t P = net->offset[net->count], C = net->width[net->count - 1], D = net->width[0];
    const size_t cells = ROWS * C, sources = EXAMPLES + 1;
    bf_run rule;
    path p;
    bf_real *gradient = BF_NEW(bf_real, sources * P), *m = BF_NEW(bf_real, sources * P),
            *update = BF_NEW(bf_real, sources * P), *sum = BF_NEW(bf_real, P), *v = BF_NEW(bf_real, P),
            *denominator = BF_NEW(bf_real, P), *phi = BF_NEW(bf_real, C * P), *data_part = BF_NEW(bf_real, P);
    memset(&rule, 0, sizeof rule);
    memset(&p, 0, sizeof p);
    rule.optimizer = *optimizer;
    rule.parameters = P;
    rule.learning_rates = (double *)run->learning_rates;
    p.net = net;
    p.at = BF_NEW(bf_real, P);
    p.capacity = 100000;
    p.kinks = BF_NEW(bf_real, p.capacity);
    bf_real *closed = BF_NEW(bf_real, cells);
    for (size_t s = 0; s < run->steps; s++) {
        bf_real *from = run_weights(context, run, s), *to = run_weights(context, run, s + 1);
        bf_real seed[8];
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        memset(gradient, 0, sources * P * sizeof *gradient);
        memset(sum, 0, P * sizeof *sum);
        for (size_t b = 0; b < batch.count; b++) {
            const size_t i = (size_t)batch.items[b];
            naive_forward(net, from, data + i * D);
            bf_loss_value(BF_SOFTMAX_CROSS_ENTROPY, C, net->value[net->count - 1], targets + i * C, seed);
            for (size_t c = 0; c < C; c++)
                seed[c] /= (bf_real)batch.count;
            naive_reverse(net, from, seed, gradient + i * P);
        }
        bf_real *decay = gradient + EXAMPLES * P;
        for (size_t i = 0; i < P; i++) {
            for (size_t k = 0; k < EXAMPLES; k++)
                sum[i] += gradient[k * P + i];
            decay[i] = optimizer->rule == BF_ADAMW ? 0 : (bf_real)optimizer->weight_decay * from[i];
        }
        bf_second_moment(&rule, s, sum, decay, v, denominator);
        memset(data_part, 0, P * sizeof *data_part);
        for (size_t k = 0; k < EXAMPLES; k++) {
            bf_advance(optimizer, s, rule.learning_rates[s], P, denominator, gradient + k * P, m + k * P,
                       update + k * P);
            for (size_t i = 0; i < P; i++)
                data_part[i] += update[k * P + i];
        }
        bf_advance_decay(&rule, s, from, denominator, decay, m + EXAMPLES * P, update + EXAMPLES * P);
        p.from = from;
        p.to = to;
        for (size_t r = 0; r < ROWS; r++) {
            p.x = test + r * D;
            out->pieces += path_jacobian(&p, phi);
            for (size_t c = 0; c < C; c++) {
                const size_t cell = r * C + c;
                for (size_t k = 0; k < EXAMPLES; k++)
                    out->by_example[cell * EXAMPLES + k] += bf_dot(P, phi + c * P, update + k * P);
                out->decay[cell] += bf_dot(P, phi + c * P, update + EXAMPLES * P);
                for (size_t i = 0; i < P; i++)
                    closed[cell] -= phi[c * P + i] * (to[i] - from[i]);
                size_t layer = 0;
                for (int n = 1; n < net->count; n++)
                    if (net->offset[n + 1] > net->offset[n]) {
                        const size_t at = net->offset[n], size = net->offset[n + 1] - at;
                        out->by_layer[cell * run->graph.layers + layer++] +=
                            bf_dot(size, phi + c * P + at, data_part + at);
                    }
            }
        }
        for (size_t r = 0; r < ROWS; r++)
            for (int end = 0; end < 2; end++)
                if (end ? s + 1 == run->steps : s == 0) {
                    naive_forward(net, end ? to : from, test + r * D);
                    memcpy((end ? out->final_output : out->initial) + r * C, net->value[net->count - 1],
                           C * sizeof *phi);
                }
        free(from), free(to);
    }
    for (size_t cell = 0; cell < cells; cell++) {
        const bf_real rest = closed[cell] + out->final_output[cell] - out->initial[cell];
        out->closure = BF_MATH(fmax)(out->closure, BF_MATH(fabs)(rest));
    }
    free(gradient), free(m), free(update), free(sum), free(v), free(denominator), free(phi), free(data_part);
    free(p.at), free(p.kinks), free(closed);
}

/* ---- tests ------------------------------------------------------------------------------------------- */

static double worst_closure, worst_entry, worst_oracle;

static double entry_error(size_t count, const double *got, const bf_real *expected, double scale)
{
    return fixture_error(count, got, expected) / scale;
}

static void check(const subject *s, const char *optimizer, size_t batch, double rate, uint64_t seed)
{
    pk_context context;
    pk_graph graph;
    pk_run run;
    naive net;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, s->network, &graph));
    naive_open(&net, s->layers);
    const size_t P = graph.parameters, C = graph.output_width, D = graph.input_width, cells = ROWS * C;
    assert_int_equal(P, net.offset[net.count]);
    assert_int_equal(D, net.width[0]);
    assert_int_equal(C, net.width[net.count - 1]);
    assert_true(graph.switched && graph.degree > 0);
    const size_t shape_x[2] = {EXAMPLES, D}, shape_y[1] = {EXAMPLES};
    pk_real *data = fixture_normals(seed, EXAMPLES * D, 1), *test = fixture_normals(seed + 1, ROWS * D, 1);
    pk_real *targets = FIXTURE_NEW(pk_real, EXAMPLES * C), *weights = FIXTURE_NEW(pk_real, P);
    int64_t labels[EXAMPLES];
    for (size_t i = 0; i < EXAMPLES; i++) {
        labels[i] = (int64_t)(i % C);
        targets[i * C + i % C] = 1;
    }
    const pk_dataset train = {pk_array_view(REAL_TYPE, 2, shape_x, data),
                              pk_array_view(PK_INT64, 1, shape_y, labels)};
    assert_ok(&context, pk_network_initialize(&context, &graph, seed, weights));
    pk_train_options options;
    pk_train_result result;
    memset(&options, 0, sizeof options);
    options.loss = PK_SOFTMAX_CROSS_ENTROPY;
    options.steps = STEPS;
    options.batch_size = batch;
    options.schedule.rate = rate;
    options.record = fixture_run_path;
    options.replace = 1;
    assert_ok(&context, pk_optimizer_parse(&context, optimizer, &options.optimizer));
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, &result));
    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
    const bf_optimizer rule = fixture_optimizer(optimizer);
    truth expected;
    memset(&expected, 0, sizeof expected);
    expected.by_example = BF_NEW(bf_real, cells * EXAMPLES);
    expected.by_layer = BF_NEW(bf_real, cells * graph.layers);
    expected.decay = BF_NEW(bf_real, cells);
    expected.initial = BF_NEW(bf_real, cells);
    expected.final_output = BF_NEW(bf_real, cells);
    brute(&context, &run, &net, &rule, data, targets, test, &expected);
    const double scale = fixture_largest_real(cells * EXAMPLES, expected.by_example);
    worst_oracle = fmax(worst_oracle, (double)expected.closure);
    assert_true(expected.closure <= 1e-16); /* no kink was missed */
    for (int bounds = 0; bounds < 2; bounds++) {
        pk_decompose_options how;
        pk_decomposition out;
        const pk_matrix inputs = {test, ROWS, D, D};
        memset(&how, 0, sizeof how);
        how.bounds = bounds;
        how.keep[0] = PK_BY_EXAMPLE;
        how.keep[1] = PK_BY_LAYER;
        assert_ok(&context, pk_decompose(&context, &run, inputs, &how, &out));
        double error = entry_error(cells * EXAMPLES, out.by_example, expected.by_example, scale);
        error = fmax(error, entry_error(cells * graph.layers, out.by_layer, expected.by_layer, scale));
        error = fmax(error, entry_error(cells, out.decay, expected.decay, scale));
        error = fmax(error, entry_error(cells, out.initial, expected.initial, fmax(1, scale)));
        error = fmax(error, entry_error(cells, out.final, expected.final_output, fmax(1, scale)));
        print_message("%s | %s, batches of %zu: closure %.2g, entries %.2g; pieces %zu, by brute force %zu\n",
                      s->network, optimizer, batch, out.worst_closure, error, out.pieces, expected.pieces);
        for (size_t i = 0; bounds && i < cells * EXAMPLES; i++)
            assert_true(fabs((double)((bf_real)out.by_example[i] - expected.by_example[i])) <=
                        out.bounds[i] + 1e-15 * scale);
        worst_entry = fmax(worst_entry, error);
        worst_closure = fmax(worst_closure, out.worst_closure);
        assert_true(error <= ROUNDING(1e-12));
        assert_true(out.worst_closure <= ROUNDING(1e-12));
        pk_decomposition_release(&context, &out);
    }
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    naive_close(&net);
    free(expected.by_example), free(expected.by_layer), free(expected.decay), free(expected.initial);
    free(expected.final_output), free(data), free(test), free(targets), free(weights);
}

static void test_exact(void **state)
{
    (void)state;
    static const subject subjects[] = {
        {"input 1x6x6; conv 2 3x3 pad=1; relu; max_pool 2; conv 3 2x2; relu; flatten; dense 2",
         {{INPUT, 0, 0, 1, 6, 0, 0, 0, 0},
          {CONV, 0, 0, 2, 3, 1, 1, 1, 0},
          {RELU, 1, 0, 0, 0, 0, 0, 0, 0},
          {MAX_POOL, 2, 0, 0, 2, 2, 0, 0, 0},
          {CONV, 3, 0, 3, 2, 1, 0, 1, 0},
          {RELU, 4, 0, 0, 0, 0, 0, 0, 0},
          {DENSE, 5, 0, 2, 0, 0, 0, 0, 0}}},
        {"input 1x5x5; conv 4 3x3 pad=1; relu; residual( conv 4 3x3 pad=1 groups=2; relu; conv 4 1x1 ); "
         "avg_pool 2; "
         "flatten; dense 3",
         {{INPUT, 0, 0, 1, 5, 0, 0, 0, 0},
          {CONV, 0, 0, 4, 3, 1, 1, 1, 0},
          {RELU, 1, 0, 0, 0, 0, 0, 0, 0},
          {CONV, 2, 0, 4, 3, 1, 1, 2, 0},
          {RELU, 3, 0, 0, 0, 0, 0, 0, 0},
          {CONV, 4, 0, 4, 1, 1, 0, 1, 0},
          {ADD, 5, 2, 0, 0, 0, 0, 0, 0},
          {AVG_POOL, 6, 0, 0, 2, 2, 0, 0, 0},
          {DENSE, 7, 0, 3, 0, 0, 0, 0, 0}}},
        {"input 2x6x6; conv 3 3x3 stride=2 pad=1; max_pool 3 stride=1 pad=1; relu; conv 2 2x2 nobias; relu; "
         "global_avg_pool; dense 2",
         {{INPUT, 0, 0, 2, 6, 0, 0, 0, 0},
          {CONV, 0, 0, 3, 3, 2, 1, 1, 0},
          {MAX_POOL, 1, 0, 0, 3, 1, 1, 0, 0},
          {RELU, 2, 0, 0, 0, 0, 0, 0, 0},
          {CONV, 3, 0, 2, 2, 1, 0, 1, 1},
          {RELU, 4, 0, 0, 0, 0, 0, 0, 0},
          {AVG_POOL, 5, 0, 0, 2, 2, 0, 0, 0},
          {DENSE, 6, 0, 2, 0, 0, 0, 0, 0}}},
        {"input 2x5x5; conv 2 3x3 groups=2; relu; conv 3 1x1; relu; max_pool 2 stride=1; flatten; dense 2",
         {{INPUT, 0, 0, 2, 5, 0, 0, 0, 0},
          {CONV, 0, 0, 2, 3, 1, 0, 2, 0},
          {RELU, 1, 0, 0, 0, 0, 0, 0, 0},
          {CONV, 2, 0, 3, 1, 1, 0, 1, 0},
          {RELU, 3, 0, 0, 0, 0, 0, 0, 0},
          {MAX_POOL, 4, 0, 0, 2, 1, 0, 0, 0},
          {DENSE, 5, 0, 2, 0, 0, 0, 0, 0}}},
    };
    for (size_t k = 0; k < sizeof subjects / sizeof *subjects; k++) {
        check(&subjects[k], "sgd", 0, 0.5, 10 * k);
        check(&subjects[k], "sgd momentum=0.9 weight_decay=0.01", 2, 0.2, 10 * k + 1);
        check(&subjects[k], "adamw weight_decay=0.05", 3, 0.02, 10 * k + 2);
    }
    print_message("worst closure %.3g, worst entry %.3g of the largest, brute force's closure %.3g\n",
                  worst_closure, worst_entry, worst_oracle);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_exact)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
