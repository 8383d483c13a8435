/* 08: an operation of one's own, checked, trained with, and decomposed.
 *
 * The library does not know the activation `snake` (Ziyin, Hartwig & Ueda 2020), for functions that repeat:
 *
 *     F(x) = x + sin(a x)^2 / a,    F'(x) = 1 + sin(2 a x),    F''(x) = 2 a cos(2 a x).
 *
 * Between the two rulers below are the 44 lines that teach it: what comes out, how changes go forward (tangent) and
 * backward (reverse). 8 of them tell how the slope changes (curvature), 3 that it takes a number; both could be left
 * out. Then
 *     - a network is built node by node, and its derivatives are compared with finite differences;
 *     - the same network, now in words, learns y = sin(3 x) + x / 2 from 48 points, and is recorded;
 *     - its prediction for a point that it never saw is decomposed over these 48, and closes.
 *
 *     cc -O3 -fopenmp -I. examples/08_own_operation.c -lm && ./a.out [OUTPUT FOLDER]
 */
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel.h"
#include "tutorial.h"

/* ======== the operation ============================================================================== */

static double snake(const pk_call *call, size_t i, int derivative)
{
    const double a = call->node->attributes[0], x = call->in[0][i], s = sin(a * x);
    const double values[3] = {x + s * s / a, 1 + sin(2 * a * x), 2 * a * cos(2 * a * x)};
    return values[derivative];
}
static void snake_forward(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++)
        call->out[i] = snake(call, i, 0);
}
static void snake_tangent(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++)
        call->out_tangent[i] = call->in_tangent[0] ? snake(call, i, 1) * call->in_tangent[0][i] : 0;
}
static void snake_reverse(const pk_call *call) /* each row may have several cotangents, copies */
{
    for (size_t k = 0, w = call->node->width; k < call->rows * call->copies * w; k++) {
        const double slope = snake(call, k / (call->copies * w) * w + k % w, 1);
        const double before = call->accumulate[0] ? call->in_cotangent[0][k] : 0;
        call->in_cotangent[0][k] = before + slope * call->out_cotangent[k];
    }
}
static void snake_curvature(const pk_call *call) /* optional: for second derivatives */
{
    for (size_t k = 0, w = call->node->width; k < call->rows * call->copies * w; k++) {
        const size_t i = k / (call->copies * w) * w + k % w;
        call->in_cotangent[0][k] += snake(call, i, 2) * call->in_tangent[0][i] * call->out_cotangent[k];
    }
}
static const pk_option snake_options[2] = {{"frequency", PK_OPTION_NUMBER, 0, 1, 0, 1e-3, 1e3, 0, NULL},
                                           {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL}};
static void snake_register(pk_operation *operation) /* zeroed: the shape is the input's, there are no weights */
{
    operation->name = "snake";
    operation->smoothness = PK_SMOOTH;
    operation->options = snake_options; /* attribute 0 is the first word behind the name */
    operation->defaults[0] = 1;
    operation->forward = snake_forward;
    operation->tangent = snake_tangent;
    operation->reverse = snake_reverse;
    operation->curvature = snake_curvature;
}

/* ======== its derivatives, checked =================================================================== */

enum { HIDDEN = 16, POINTS = 48, ROWS = 6, MOST = 400 };

/* input 1; dense 16; snake 2; dense 1 */
static int build(pk_context *context, const pk_operation *operation, pk_graph *graph)
{
    const pk_shape scalar = {1, {1, 0, 0, 0}};
    double dense[PK_NODE_ATTRIBUTES], frequency[PK_NODE_ATTRIBUTES] = {2};
    int node = 0;
    memcpy(dense, pk_operation_find("dense")->defaults, sizeof dense);
    TRY(pk_graph_input(context, graph, &scalar));
    dense[PK_DENSE_OUTPUTS] = HIDDEN;
    TRY(pk_graph_add(context, graph, pk_operation_find("dense"), 1, &node, dense, &node));
    TRY(pk_graph_add(context, graph, operation, 1, &node, frequency, &node));
    dense[PK_DENSE_OUTPUTS] = 1;
    TRY(pk_graph_add(context, graph, pk_operation_find("dense"), 1, &node, dense, &node));
    return 0;
}

/* What moves the weights by e v, the inputs by e z: the outputs, and the gradient of their squares' sum / 2. */
typedef struct moved {
    double f[ROWS], gradient[MOST];
} moved;

static int move(pk_context *context, const pk_graph *graph, const double *w, const double *v, const double *x,
                const double *z, double e, moved *to)
{
    double at[MOST], inputs[ROWS];
    for (size_t p = 0; p < graph->parameters; p++)
        at[p] = w[p] + e * v[p];
    for (int r = 0; r < ROWS; r++)
        inputs[r] = x[r] + e * z[r];
    const pk_matrix in = pk_matrix_view(inputs, ROWS, 1), out = pk_matrix_view(to->f, ROWS, 1);
    TRY(pk_graph_evaluate(context, graph, at, in, out));
    /* d/dw sum_r f_r^2 / 2 = sum_r J_r^T f_r: the outputs are their own cotangents. */
    TRY(pk_vjp_sum(context, graph, at, in, out, to->gradient));
    return 0;
}

/* The largest differences between derivatives and central differences. */
static int check(pk_context *context, const pk_graph *graph, const double *w, double *forward, double *backward,
                 double *second)
{
    const double e = 1e-5;
    double v[MOST], x[ROWS], z[ROWS], tangent[ROWS], nothing[ROWS] = {0}, targets[ROWS] = {0}, inner = 0,
                                                     outer = 0;
    double weights[ROWS] = {1, 1, 1, 1, 1, 1}, product[MOST];
    int64_t items[ROWS];
    moved up, down, here;
    pk_random random = {7, 0, 0};
    for (size_t p = 0; p < graph->parameters; p++)
        v[p] = pk_random_normal(&random);
    for (int r = 0; r < ROWS; r++) {
        x[r] = pk_random_normal(&random);
        z[r] = pk_random_normal(&random);
        items[r] = r;
    }
    /* Forward: J v + K z. */
    if (move(context, graph, w, v, x, z, e, &up) || move(context, graph, w, v, x, z, -e, &down) ||
        move(context, graph, w, v, x, z, 0, &here))
        return 1;
    TRY(pk_jvp(context, graph, w, pk_matrix_view(x, ROWS, 1), v, pk_matrix_view(z, ROWS, 1),
               pk_matrix_view(tangent, ROWS, 1)));
    for (int r = 0; r < ROWS; r++)
        *forward = fmax(*forward, fabs(tangent[r] - (up.f[r] - down.f[r]) / (2 * e)));
    /* Backward: f . (J v) = (J^T f) . v, to rounding. */
    TRY(pk_jvp(context, graph, w, pk_matrix_view(x, ROWS, 1), v, pk_matrix_view(NULL, 0, 0),
               pk_matrix_view(tangent, ROWS, 1)));
    for (int r = 0; r < ROWS; r++)
        inner += here.f[r] * tangent[r];
    for (size_t p = 0; p < graph->parameters; p++)
        outer += here.gradient[p] * v[p];
    *backward = fabs(inner - outer);
    /* Second: the Hessian of sum_r f_r^2 / 2 times v. */
    const size_t shape[2] = {ROWS, 1};
    const pk_dataset data = {pk_array_view(PK_FLOAT64, 2, shape, x),
                             pk_array_view(PK_FLOAT64, 2, shape, targets)};
    const pk_batch batch = {ROWS, items, weights};
    TRY(pk_hessian_product(context, graph, PK_SQUARED, w, &data, &batch, v, product));
    if (move(context, graph, w, v, x, nothing, e, &up) || move(context, graph, w, v, x, nothing, -e, &down))
        return 1;
    for (size_t p = 0; p < graph->parameters; p++)
        *second = fmax(*second, fabs(product[p] - (up.gradient[p] - down.gradient[p]) / (2 * e)));
    return 0;
}

/* ======== a network that learns with it, decomposed ================================================== */

static double truth(double x)
{
    return sin(3 * x) + x / 2;
}

static int run(pk_context *context, const char *output)
{
    static pk_operation operation;
    static pk_graph nodes, graph;
    static double x[POINTS], y[POINTS], w[MOST];
    char folder[TUTORIAL_PATH];
    snake_register(&operation);
    if (build(context, &operation, &nodes))
        return 1;
    TRY(pk_network_initialize(context, &nodes, 1, w));
    double forward = 0, backward = 0, second = 0;
    if (check(context, &nodes, w, &forward, &backward, &second))
        return 1;
    printf("Derivatives of the network with snake, against finite differences:\n"
           "    forward   (Jacobian times direction)   %.1e\n"
           "    backward  (adjoint to forward)         %.1e\n"
           "    second    (Hessian times direction)    %.1e\n",
           forward, backward, second);
    if (forward > 1e-7 || backward > 1e-12 || second > 1e-6) {
        fprintf(stderr, "one of these is not what it should be\n");
        return 1;
    }

    /* A context with a list of operations knows them by name, also when it opens a recorded run. */
    const pk_operation *const own[] = {&operation, NULL};
    context->operations = own;
    TRY(pk_network_parse(context, "input 1; dense 16; snake 2; dense 1", &graph));
    for (int i = 0; i < POINTS; i++) {
        x[i] = -3 + 6.0 * i / (POINTS - 1);
        y[i] = truth(x[i]);
    }
    const size_t shape[2] = {POINTS, 1};
    const pk_dataset data = {pk_array_view(PK_FLOAT64, 2, shape, x), pk_array_view(PK_FLOAT64, 2, shape, y)};
    static pk_train_options options;
    static pk_train_result trained;
    if (tutorial_folder(output, "08_own_operation", folder))
        return 1;
    options.loss = PK_MEAN_SQUARED;
    TRY(pk_optimizer_parse(context, "adam", &options.optimizer));
    options.schedule.rate = 0.02;
    options.steps = 300;
    options.record = folder;
    options.replace = 1;
    TRY(pk_train(context, &graph, &data, &options, w, &trained));
    printf("\nAfter %zu steps the mean square of the errors is %.1e.\n", trained.steps, trained.objective);

    static pk_run recorded;
    static pk_decomposition d;
    size_t best[3];
    double at = 1.234;
    TRY(pk_run_open(context, folder, &recorded));
    TRY(pk_decompose(context, &recorded, pk_matrix_view(&at, 1, 1), NULL, &d));
    printf("At x = %.3f, which it never saw, it says %.4f; the truth is %.4f. That is %.4f from the start, and "
           "the\n"
           "rest from the points, most from\n",
           at, d.final[0], truth(at), d.initial[0]);
    const size_t count = pk_strongest(d.by_example, POINTS, 1, 3, best);
    for (size_t k = 0; k < count; k++)
        printf("    %+.4f  x = %+.3f, y = %+.3f\n", d.by_example[best[k]], x[best[k]], y[best[k]]);
    printf("Closure: %.1e.\n", d.worst_closure);
    const int wrong = trained.objective > 0.05 || d.worst_closure > 1e-10;
    pk_decomposition_release(context, &d);
    pk_run_release(context, &recorded);
    pk_graph_release(context, &graph);
    pk_graph_release(context, &nodes);
    return wrong ? fprintf(stderr, "the network did not learn, or its decomposition does not close\n"), 1 : 0;
}

int main(int count, char **arguments)
{
    static pk_context context;
    return run(&context, count > 1 ? arguments[1] : "pathkernel-out");
}
