/* Convolutions of all small shapes, whose output is one pixel as often as not, of signals, and transposed: kernels against
 * products of Jacobians,
 * closure and bits of a decomposition over threads, its entries against gradients integrated by a fixed rule. */
#include "fixture.h"

enum { EXAMPLES = 6, BATCH = 3, STEPS = 2, ROWS = 3, OTHERS = 2, FORMS = 4, MOST_THREADS = 4 };

typedef struct shape {
    int channels, out, height, width, kernel[2], stride, pad, dilation, groups, nobias;
} shape;

static const int images[][2] = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {2, 3}, {1, 4}},
                 kernels[][2] = {{1, 1}, {2, 2}, {3, 3}, {2, 1}, {1, 3}};

/* The next shape whose windows fit, 0 behind the last one. */
static int next_shape(size_t *number, shape *s)
{
    for (;;) {
        size_t n = (*number)++;
        s->groups = 1 + (int)(n % 2), n /= 2;
        s->dilation = 1 + (int)(n % 2), n /= 2;
        s->pad = (int)(n % 2), n /= 2;
        s->stride = 1 + (int)(n % 3), n /= 3;
        memcpy(s->kernel, kernels[n % 5], sizeof s->kernel), n /= 5;
        s->height = images[n % 6][0], s->width = images[n % 6][1], n /= 6;
        if (n)
            return 0;
        s->channels = s->groups == 2 || *number % 3 ? 2 : 1;
        s->out = *number % 5 ? 2 : 4;
        s->nobias = *number % 4 == 1;
        if ((s->kernel[0] - 1) * s->dilation + 1 <= s->height + 2 * s->pad &&
            (s->kernel[1] - 1) * s->dilation + 1 <= s->width + 2 * s->pad)
            return 1;
    }
}

static int outputs_of(const shape *s, int side)
{
    return ((side ? s->width : s->height) + 2 * s->pad - (s->kernel[side] - 1) * s->dilation - 1) / s->stride +
           1;
}

/* The convolution on the data, inside, last, and below a convolution of one window, which is the last layer. */
static void network_of(const shape *s, int form, char *text, size_t size)
{
    char convolution[160];
    snprintf(convolution, sizeof convolution, "conv %d %dx%d stride=%d pad=%d dilation=%d groups=%d%s", s->out,
             s->kernel[0], s->kernel[1], s->stride, s->pad, s->dilation, s->groups, s->nobias ? " nobias" : "");
    const int c = s->channels, h = s->height, w = s->width;
    if (form == 0)
        snprintf(text, size, "input %dx%dx%d; %s; tanh; flatten; dense 2", c, h, w, convolution);
    else if (form == 1)
        snprintf(text, size, "input %dx%dx%d; conv %d 1x1; tanh; %s; tanh; flatten; dense 2", c, h, w, c,
                 convolution);
    else if (form == 2)
        snprintf(text, size, "input %dx%dx%d; conv %d 1x1; tanh; %s; flatten", c, h, w, c, convolution);
    else
        snprintf(text, size, "input %dx%dx%d; conv %d 1x1; tanh; %s; tanh; conv 2 %dx%d; flatten", c, h, w, c,
                 convolution, outputs_of(s, 0), outputs_of(s, 1));
}

/* Convolutions of signals, and transposed ones of images and of signals: number n of them. */
static int other_network(size_t number, char *text, size_t size)
{
    const size_t n = number;
    const int transposed = n % 3 > 0, signal = n % 3 < 2, stride = 1 + (int)(n / 3 % 3), pad = (int)(n / 9 % 2),
              dilation = 1 + (int)(n / 18 % 2), groups = 1 + (int)(n / 36 % 2), kernel = 1 + (int)(n / 72 % 3),
              more = transposed && (stride > 1 || dilation > 1) ? (int)(n / 5 % 2) : 0;
    char layer[160], output_pad[20] = "";
    if (n >= 216)
        return 0;
    if (transposed)
        snprintf(output_pad, sizeof output_pad, " output_pad=%d", more);
    snprintf(layer, sizeof layer, "conv%s 4 %d stride=%d pad=%d dilation=%d groups=%d%s%s",
             transposed ? "_transpose" : "", kernel, stride, pad, dilation, groups, output_pad,
             n % 4 == 1 ? " nobias" : "");
    const char *plane = signal ? "5" : "2x3";
    if (n % 2)
        snprintf(text, size, "input 2x%s; %s; tanh; flatten; dense 2", plane, layer);
    else
        snprintf(text, size, "input 2x%s; conv 2 1; tanh; %s; relu; flatten; dense 2", plane, layer);
    return 1;
}

/* ---- kernels ----------------------------------------------------------------------------------------- */

static pk_real *jacobian_of(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_real *x,
                            size_t rows)
{
    pk_real *j = FIXTURE_NEW(pk_real, rows * graph->output_width * graph->parameters);
    assert_ok(context, pk_jacobian(context, graph, weights, pk_matrix_view(x, rows, graph->input_width),
                                   pk_matrix_view(j, rows * graph->output_width, graph->parameters),
                                   pk_matrix_view(NULL, 0, 0)));
    return j;
}

/* Both kernels of ROWS rows with OTHERS others; 1 where they are not J J^T. */
static int check_kernels(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_real *x)
{
    const size_t P = graph->parameters, C = graph->output_width, across = OTHERS * C;
    pk_real *y = x + ROWS * graph->input_width;
    pk_real *jx = jacobian_of(context, graph, weights, x, ROWS),
            *jy = jacobian_of(context, graph, weights, y, OTHERS);
    pk_real *gram = FIXTURE_NEW(pk_real, ROWS * C * across), traces[ROWS * OTHERS];
    double size = 0, apart = 0;
    assert_ok(context, pk_kernel_ntk(context, graph, weights, pk_matrix_view(x, ROWS, graph->input_width),
                                     pk_matrix_view(y, OTHERS, graph->input_width),
                                     pk_matrix_view(gram, ROWS * C, across)));
    assert_ok(context, pk_kernel_ntk_trace(context, graph, weights, pk_matrix_view(x, ROWS, graph->input_width),
                                           pk_matrix_view(y, OTHERS, graph->input_width),
                                           pk_matrix_view(traces, ROWS, OTHERS)));
    for (size_t i = 0; i < ROWS; i++)
        for (size_t j = 0; j < OTHERS; j++) {
            double trace = 0;
            for (size_t k = 0; k < C * C; k++) {
                const pk_real *a = jx + (i * C + k / C) * P, *b = jy + (j * C + k % C) * P;
                double sum = 0, magnitude = 0;
                for (size_t p = 0; p < P; p++) {
                    sum += (double)a[p] * b[p];
                    magnitude += fabs((double)a[p] * b[p]);
                }
                size = fmax(size, magnitude);
                trace += k / C == k % C ? sum : 0;
                apart = fmax(apart, fabs(sum - (double)gram[(i * C + k / C) * across + j * C + k % C]));
            }
            apart = fmax(apart, fabs(trace - (double)traces[i * OTHERS + j]) / (double)C);
        }
    free(jx), free(jy), free(gram);
    return !(apart <= ROUNDING(1e-13) * size);
}

static void test_kernels(void **state)
{
    (void)state;
    size_t number = 0, shapes = 0, pixels = 0, wrong = 0, others = 0;
    for (shape s; next_shape(&number, &s); shapes++) {
        const int one = outputs_of(&s, 0) * outputs_of(&s, 1) == 1;
        pixels += (size_t)one;
        for (int form = 0; form < FORMS; form++) {
            pk_context context;
            pk_graph graph;
            char text[400];
            memset(&context, 0, sizeof context);
            memset(&graph, 0, sizeof graph);
            network_of(&s, form, text, sizeof text);
            assert_ok(&context, pk_network_parse(&context, text, &graph));
            pk_real *weights = fixture_normals(number, graph.parameters, 0.7);
            pk_real *x = fixture_normals(number + 1, (ROWS + OTHERS) * graph.input_width, 1);
            if (check_kernels(&context, &graph, weights, x) && wrong++ < 10)
                print_message("the kernel is not J J^T: %s\n", text);
            free(weights), free(x);
            pk_graph_release(&context, &graph);
            assert_int_equal(context.memory_used, 0);
        }
    }
    char text[400];
    for (size_t n = 0; other_network(n, text, sizeof text); n++) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        if (pk_network_parse(&context, text, &graph) !=
            PK_OK) { /* the padding leaves nothing, or windows do not fit */
            assert_non_null(strstr(context.message, "pad"));
            continue;
        }
        pk_real *weights = fixture_normals(n, graph.parameters, 0.7);
        pk_real *x = fixture_normals(n + 1, (ROWS + OTHERS) * graph.input_width, 1);
        if (check_kernels(&context, &graph, weights, x) && wrong++ < 10)
            print_message("the kernel is not J J^T: %s\n", text);
        others++;
        free(weights), free(x);
        pk_graph_release(&context, &graph);
        assert_int_equal(context.memory_used, 0);
    }
    assert_true(others > 180);
    print_message("%zu shapes, %zu of them with an output of one pixel; %zu networks of %zu wrong\n", shapes,
                  pixels, wrong, FORMS * shapes);
    assert_true(shapes > 438 && pixels > 134);
    assert_int_equal(wrong, 0);
}

/* ---- decompositions ---------------------------------------------------------------------------------- */

/* expected (ROWS x C x EXAMPLES) of a plain SGD run: the Jacobians of rows, integrated, times gradients of examples. */
static void brute(pk_context *context, const pk_run *run, pk_real *inputs, double *expected)
{
    enum { NODES = 16 };
    const pk_graph *graph = &run->graph;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width;
    double x[NODES], w[NODES], *phi = FIXTURE_NEW(double, ROWS *C *P);
    pk_real *start = FIXTURE_NEW(pk_real, P), *end = FIXTURE_NEW(pk_real, P), *at = FIXTURE_NEW(pk_real, P),
            *row = FIXTURE_NEW(pk_real, D), *target = FIXTURE_NEW(pk_real, C), *f = FIXTURE_NEW(pk_real, C),
            *seed = FIXTURE_NEW(pk_real, C);
    pk_gauss_legendre(NODES, x, w);
    memset(expected, 0, ROWS * C * EXAMPLES * sizeof *expected);
    for (size_t s = 0; s < run->steps; s++) {
        assert_ok(context, pk_run_weights(context, run, s, start));
        assert_ok(context, pk_run_weights(context, run, s + 1, end));
        memset(phi, 0, ROWS * C * P * sizeof *phi);
        for (int q = 0; q < NODES; q++) {
            for (size_t p = 0; p < P; p++)
                at[p] = (pk_real)(start[p] + x[q] * (end[p] - start[p]));
            pk_real *j = jacobian_of(context, graph, at, inputs, ROWS);
            for (size_t i = 0; i < ROWS * C * P; i++)
                phi[i] += w[q] * (double)j[i];
            free(j);
        }
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        for (size_t b = 0; b < batch.count; b++) {
            pk_dataset_inputs(&run->train, &batch.items[b], 1, row);
            pk_loss_targets(run->loss, &run->train, &batch.items[b], 1, C, target);
            assert_ok(context, pk_graph_evaluate(context, graph, start, pk_matrix_view(row, 1, D),
                                                 pk_matrix_view(f, 1, C)));
            pk_loss_gradient(run->loss, C, f, target, seed);
            pk_real *j = jacobian_of(context, graph, start, row, 1);
            for (size_t k = 0; k < ROWS * C; k++)
                for (size_t i = 0; i < C * P; i++)
                    expected[k * EXAMPLES + (size_t)batch.items[b]] -=
                        run->learning_rates[s] / (double)batch.count * phi[k * P + i % P] *
                        (double)seed[i / P] * (double)j[i];
            free(j);
        }
    }
    free(phi), free(start), free(end), free(at), free(row), free(target), free(f), free(seed);
}

static double worst_closure, worst_entry;
static size_t moved; /* runs with an entry that is not small */

/* Decomposes a run of the network; with the entries of brute force where they are wanted. */
static void check_decomposition(const char *text, uint64_t seed, int engine, int entries)
{
    pk_context context;
    pk_graph graph;
    pk_run run;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    context.threads = 1;
    assert_ok(&context, pk_network_parse(&context, text, &graph));
    const size_t C = graph.output_width, D = graph.input_width, cells = ROWS * C;
    const size_t shape_x[2] = {EXAMPLES, D}, shape_y[2] = {EXAMPLES, C};
    pk_real *data = fixture_normals(seed, EXAMPLES * D, 1),
            *targets = fixture_normals(seed + 1, EXAMPLES * C, 1),
            *test = fixture_normals(seed + 2, ROWS * D, 1),
            *weights = fixture_normals(seed + 3, graph.parameters, 0.5);
    pk_dataset train = {pk_array_view(REAL_TYPE, 2, shape_x, data),
                        pk_array_view(REAL_TYPE, 2, shape_y, targets)};
    pk_train_options options;
    memset(&options, 0, sizeof options);
    options.loss = PK_SQUARED;
    options.steps = STEPS;
    options.batch_size = BATCH;
    options.schedule.rate = 0.05;
    options.record = fixture_run_path;
    options.replace = 1;
    assert_ok(&context, pk_optimizer_parse(&context, "sgd", &options.optimizer));
    assert_ok(&context, pk_train(&context, &graph, &train, &options, weights, NULL));
    assert_ok(&context, pk_run_open(&context, fixture_run_path, &run));
    uint64_t first[ROWS] = {0}, hash[ROWS];
    const int several = 2 + (int)(seed % (MOST_THREADS - 1));
    for (int threads = 1; threads <= several; threads += several - 1) {
        pk_decompose_options how;
        pk_decomposition out;
        memset(&how, 0, sizeof how);
        how.engine = (pk_engine)engine;
        context.threads = threads;
        assert_ok(&context, pk_decompose(&context, &run, pk_matrix_view(test, ROWS, D), &how, &out));
        fixture_hash_rows(&out, hash);
        if (threads == 1)
            memcpy(first, hash, sizeof first);
        else if (memcmp(first, hash, sizeof first) != 0)
            fail_msg("%s: other bits with %d threads", text, threads);
        if (!(out.worst_closure <= ROUNDING(1e-12)))
            fail_msg("%s: closure %.3g", text, out.worst_closure);
        worst_closure = fmax(worst_closure, out.worst_closure);
        if (threads == 1 && entries) {
            double *expected = FIXTURE_NEW(double, cells *EXAMPLES);
            brute(&context, &run, test, expected);
            const double largest = fixture_largest(cells * EXAMPLES, expected);
            const double error = fixture_apart(cells * EXAMPLES, out.kept[0].data, expected);
            /* All is 0 where every window sees padding alone. */
            if (!(error <= ROUNDING(1e-10) * largest))
                fail_msg("%s: an entry is off by %.3g, the largest is %.3g", text, error, largest);
            worst_entry = fmax(worst_entry, largest > 0 ? error / largest : 0);
            moved += largest > 1e-4;
            free(expected);
        }
        pk_decomposition_release(&context, &out);
    }
    pk_run_release(&context, &run);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
    free(data), free(targets), free(test), free(weights);
}

static void test_decompositions(void **state)
{
    (void)state;
    static const pk_engine engines[] = {PK_ENGINE_AUTO, PK_ENGINE_FACTORED, PK_ENGINE_HEAD,
                                        PK_ENGINE_INTEGRATED};
    size_t number = 0, shapes = 0, entries = 0;
    for (shape s; next_shape(&number, &s); shapes++) {
        const int one = outputs_of(&s, 0) * outputs_of(&s, 1) == 1,
                  brute_too = one ? shapes % 3 == 0 : shapes % 16 == 0;
        char text[400];
        network_of(&s, (int)(shapes % FORMS), text, sizeof text);
        check_decomposition(text, shapes, (int)engines[shapes / FORMS % 4], brute_too);
        entries += (size_t)brute_too;
    }
    char text[400];
    for (size_t n = 0; other_network(n, text, sizeof text); n += 5) {
        pk_context context;
        pk_graph graph;
        memset(&context, 0, sizeof context);
        memset(&graph, 0, sizeof graph);
        if (pk_network_parse(&context, text, &graph) != PK_OK)
            continue;
        pk_graph_release(&context, &graph);
        check_decomposition(text, 1000 + n, (int)engines[n % 4], strstr(text, "relu") == NULL);
        entries += strstr(text, "relu") == NULL;
        shapes++;
    }
    print_message("%zu runs: closure %.2g; of %zu the entries are within %.2g of the largest\n", shapes,
                  worst_closure, entries, worst_entry);
    assert_true(moved > entries * 9 / 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_kernels), cmocka_unit_test(test_decompositions)};
    return cmocka_run_group_tests(tests, fixture_enter, fixture_leave);
}
