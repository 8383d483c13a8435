/* Gram matrices of the named kernels: the empirical NTK and its trace against products of Jacobians (the library's, which
 * test_autodiff checks, and those of brute_force.h) and against torch.func; symmetric bits, no negative eigenvalues, the
 * same bits for any number of threads and any memory limit, refusals. */
#include "fixture.h"

#define EPSILON (sizeof(pk_real) == sizeof(float) ? 1.2e-7 : 2.2e-16)

/* Dense layers, and all that a layer may be otherwise. */
static const struct {
    const char *text;
    size_t tokens; /* inputs are whole numbers below this; 0: real numbers */
} networks[] = {
    {"input 5; dense 9; relu; dense 7; relu; dense 3", 0},
    {"input 4; dense 6 nobias; tanh; dense 5; gelu; dense 1 nobias", 0},
    {"input 4; dense 6; tanh; dense 3; scale 0.5", 0},
    {"input 4; dense 6; tanh; dense 3; log_softmax", 0},
    {"input 3; dense 5; residual( tanh; dense 5 ); residual( dense 4; gelu | dense 4 ); dense 2", 0},
    {"input 5; dense 6; layer_norm; relu; dense 3", 0},
    {"input 1x5x5; conv 2 3x3 pad=1; tanh; avg_pool 2x2; flatten; dense 3", 0},
    {"input 2x12; dense 20; tanh; dense 11; relu; mean_tokens; dense 2", 0}, /* pairs of places */
    {"input 3x4; dense 8; residual( layer_norm; attention 2 ); mean_tokens; dense 3", 0},
    {"input 4; embedding 6 5; position; residual( attention 1 shared nobias ); flatten; dense 2", 6},
    NETWORKS_OF_VALUES("relu"),
    {"input 3; dense 4; sign; dense 2", 0},
    {"input 3; dense 2", 0},
    {"input 7; dense 70; relu; dense 67; relu; dense 4",
     0}, /* so many that those units are left out that are off */
};
enum { NETWORKS = (int)(sizeof networks / sizeof *networks) };

typedef struct problem {
    pk_context context;
    pk_graph graph;
    size_t P, C, D;
    pk_real *weights;
} problem;

static void setup(problem *p, const char *network)
{
    memset(p, 0, sizeof *p);
    assert_ok(&p->context, pk_network_parse(&p->context, network, &p->graph));
    p->P = p->graph.parameters;
    p->C = p->graph.output_width;
    p->D = p->graph.input_width;
    p->weights = fixture_normals(3, p->P, 0.6);
}

static void teardown(problem *p)
{
    free(p->weights);
    pk_graph_release(&p->context, &p->graph);
    assert_int_equal(p->context.memory_used, 0);
}

static pk_real *make_inputs(const problem *p, uint64_t seed, size_t rows, size_t tokens)
{
    pk_real *x = fixture_normals(seed, rows * p->D, 1);
    for (size_t i = 0; tokens && i < rows * p->D; i++)
        x[i] = (pk_real)((size_t)(fabs((double)x[i]) * 1000) % tokens);
    return x;
}

static pk_matrix none(void)
{
    return pk_matrix_view(NULL, 0, 0);
}

/* Either kernel, of x with y or, without y, with itself, in fresh memory that held NaN. */
static pk_real *compute(problem *p, int trace, pk_real *x, size_t n, pk_real *y, size_t m)
{
    const size_t kept = trace ? 1 : p->C, rows = n * kept, columns = (y ? m : n) * kept;
    const pk_matrix first = pk_matrix_view(x, n, p->D), second = y ? pk_matrix_view(y, m, p->D) : none();
    pk_real *gram = FIXTURE_NEW(pk_real, rows * columns);
    memset(gram, 0xff, rows * columns * sizeof *gram);
    const pk_matrix result = pk_matrix_view(gram, rows, columns);
    assert_ok(&p->context, trace
                               ? pk_kernel_ntk_trace(&p->context, &p->graph, p->weights, first, second, result)
                               : pk_kernel_ntk(&p->context, &p->graph, p->weights, first, second, result));
    return gram;
}

/* (n C) x (m C) by products of Jacobians; *size: the largest sum of magnitudes. */
static double *truth_of(problem *p, pk_real *x, size_t n, pk_real *y, size_t m, double *size)
{
    const size_t P = p->P, rows = n * p->C, columns = m * p->C;
    pk_real *jx = FIXTURE_NEW(pk_real, rows * P), *jy = FIXTURE_NEW(pk_real, columns * P);
    double *gram = FIXTURE_NEW(double, rows *columns);
    assert_ok(&p->context, pk_jacobian(&p->context, &p->graph, p->weights, pk_matrix_view(x, n, p->D),
                                       pk_matrix_view(jx, rows, P), none()));
    assert_ok(&p->context, pk_jacobian(&p->context, &p->graph, p->weights, pk_matrix_view(y, m, p->D),
                                       pk_matrix_view(jy, columns, P), none()));
    *size = 0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            long double sum = 0;
            double magnitude = 0;
            for (size_t w = 0; w < P; w++) {
                sum += (long double)jx[i * P + w] * jy[j * P + w];
                magnitude += fabs((double)jx[i * P + w] * (double)jy[j * P + w]);
            }
            gram[i * columns + j] = (double)sum;
            *size = magnitude > *size ? magnitude : *size;
        }
    free(jx), free(jy);
    return gram;
}

static double entry(const problem *p, const double *gram, size_t m, int trace, size_t row, size_t column)
{
    const size_t columns = m * p->C;
    double sum = 0;
    if (!trace)
        return gram[row * columns + column];
    for (size_t k = 0; k < p->C; k++)
        sum += gram[(row * p->C + k) * columns + column * p->C + k];
    return sum;
}

/* Both kernels of n rows with m others, and of n rows with themselves. */
static void check_against_jacobians(problem *p, size_t n, size_t m, size_t tokens)
{
    pk_real *x = make_inputs(p, 11, n, tokens), *y = make_inputs(p, 12, m, tokens);
    for (int own = 0; own < 2; own++) {
        const size_t others = own ? n : m;
        double size = 0, *truth = truth_of(p, x, n, own ? x : y, others, &size);
        for (int trace = 0; trace < 2; trace++) {
            const size_t kept = trace ? 1 : p->C, columns = others * kept;
            const double bound = 200 * EPSILON * size * (trace ? (double)p->C : 1);
            pk_real *gram = compute(p, trace, x, n, own ? NULL : y, m);
            for (size_t i = 0; i < n * kept; i++)
                for (size_t j = 0; j < columns; j++) {
                    const double right = entry(p, truth, others, trace, i, j);
                    if (!(fabs((double)gram[i * columns + j] - right) <= bound))
                        fail_msg("%s (%zu x %zu), trace %d, (%zu, %zu): %.17g, not %.17g", p->graph.text, n,
                                 others, trace, i, j, (double)gram[i * columns + j], right);
                    if (own && memcmp(&gram[i * columns + j], &gram[j * columns + i], sizeof *gram) != 0)
                        fail_msg("%s, trace %d: (%zu, %zu) is not symmetric", p->graph.text, trace, i, j);
                }
            free(gram);
        }
        free(truth);
    }
    free(x), free(y);
}

static void test_networks(void **state)
{
    (void)state;
    for (int n = 0; n < NETWORKS; n++) {
        problem p;
        setup(&p, networks[n].text);
        check_against_jacobians(&p, 5, 7, networks[n].tokens);
        check_against_jacobians(&p, 1, 1, networks[n].tokens);
        check_against_jacobians(&p, 33, 18, networks[n].tokens); /* whole tiles, and parts */
        teardown(&p);
    }
}

/* Rows for many tiles, outputs so many that a tile is one row. */
static void test_sizes(void **state)
{
    (void)state;
    problem p;
    setup(&p, "input 3; dense 4; relu; dense 2");
    check_against_jacobians(&p, 300, 70, 0);
    teardown(&p);
    setup(&p, "input 3; dense 4; relu; dense 300");
    check_against_jacobians(&p, 3, 2, 0);
    teardown(&p);
    setup(&p, "input 30x4; dense 2; tanh; flatten; dense 12"); /* pairs of places in parts */
    check_against_jacobians(&p, 3, 2, 0);
    teardown(&p);
}

/* No weight reaches the output: zeros. */
static void test_constant(void **state)
{
    (void)state;
    problem p;
    const pk_shape shape = {1, {2}};
    const int input = 0;
    pk_real x[4] = {1, 2, 3, 4};
    memset(&p, 0, sizeof p);
    assert_ok(&p.context, pk_graph_input(&p.context, &p.graph, &shape));
    assert_ok(&p.context, pk_graph_add(&p.context, &p.graph, pk_operation_find("tanh"), 1, &input, NULL, NULL));
    p.C = p.D = 2;
    for (int trace = 0; trace < 2; trace++) {
        pk_real *gram = compute(&p, trace, x, 2, NULL, 0);
        for (size_t i = 0; i < (trace ? 4 : 16); i++)
            assert_true(gram[i] == 0);
        free(gram);
    }
    teardown(&p);
}

/* Dense networks against an oracle that shares nothing with the library. */
static void test_brute_force(void **state)
{
    (void)state;
    enum { N = 6 };
    for (int k = 0; k < 2; k++) {
        problem p;
        setup(&p, networks[k].text);
        const bf_network network = fixture_network(networks[k].text);
        pk_real *x = make_inputs(&p, 5, N, 0), *gram = compute(&p, 0, x, N, NULL, 0);
        bf_real *jacobian = BF_NEW(bf_real, N * p.C * p.P), f[BF_WIDTH];
        for (size_t i = 0; i < N; i++)
            bf_evaluate(&network, p.weights, x + i * p.D, f, jacobian + i * p.C * p.P);
        const size_t all = N * p.C;
        for (size_t i = 0; i < all; i++)
            for (size_t j = 0; j < all; j++) {
                bf_real sum = 0, size = 0;
                for (size_t w = 0; w < p.P; w++) {
                    const bf_real product = jacobian[i * p.P + w] * jacobian[j * p.P + w];
                    sum += product;
                    size += product < 0 ? -product : product;
                }
                assert_close(gram[i * all + j], (double)sum, 1000 * EPSILON * (1 + (double)size));
            }
        free(jacobian), free(gram), free(x);
        teardown(&p);
    }
}

/* Made by PyTorch 2.15:
 *     model = Sequential(Linear(3, 4), Tanh(), LayerNorm(4), Linear(4, 5), ReLU(), Linear(5, 2)), or
 *             Sequential(Conv2d(1, 2, 3, padding=1), GELU(), Flatten(), Linear(18, 2), Tanh()), in float64
 *     each parameter, number i of all: 0.5 sin(1.7 i + 0.3);  x = cos(0.9 arange), y = cos(0.4 arange + 1)
 *     jac = lambda z: cat([j.reshape(2, 2, -1) for j in vmap(jacrev(lambda p, z:
 *           functional_call(model, p, z[None])[0]), (None, 0))(parameters, z).values()], 2)
 *     einsum('ikp,jlp->ikjl', jac(x), jac(y)).flatten() */
static void test_torch(void **state)
{
    (void)state;
    static const struct {
        const char *network;
        double gram[16];
    } cases[2] = {
        {"input 3; dense 4; tanh; layer_norm; dense 5; relu; dense 2",
         {2.056714706886401, -0.4092901484276944, 2.107690827804198, -0.3944301773459106, -0.4088235174180461,
          2.242626720371841, -0.3943710923432468, 2.225099379861793, 2.232030948257329, -0.434688600624165,
          2.496528537778512, -0.6357558509644679, -0.4349859228871114, 2.344731576942594, -0.639439111595721,
          2.834783456877027}},
        {"input 1x3x3; conv 2 3x3 pad=1; gelu; flatten; dense 2; tanh",
         {1.235041367968592, -0.1512537851366147, 0.5265744533435859, 0.09452172554851435, 0.06896725690141822,
          2.01907018398021, -0.1520295638749415, 1.615434464154122, 2.704681877456532, 0.0975587646278126,
          0.8686870353554192, 0.05893253396655269, 0.2782270892133377, 2.4958700768215, -0.1588224481657836,
          1.866405795379485}},
    };
    for (int k = 0; k < 2; k++) {
        problem p;
        setup(&p, cases[k].network);
        for (size_t i = 0; i < p.P; i++)
            p.weights[i] = (pk_real)(0.5 * sin(1.7 * (double)i + 0.3));
        pk_real *x = FIXTURE_NEW(pk_real, 2 * p.D), *y = FIXTURE_NEW(pk_real, 2 * p.D);
        for (size_t i = 0; i < 2 * p.D; i++) {
            x[i] = (pk_real)cos(0.9 * (double)i);
            y[i] = (pk_real)cos(0.4 * (double)i + 1);
        }
        pk_real *gram = compute(&p, 0, x, 2, y, 2), *trace = compute(&p, 1, x, 2, y, 2);
        for (size_t i = 0; i < 16; i++)
            assert_close(gram[i], cases[k].gram[i], 500 * EPSILON);
        for (size_t i = 0; i < 4; i++)
            assert_close(trace[i],
                         cases[k].gram[i / 2 * 8 + i % 2 * 2] + cases[k].gram[i / 2 * 8 + 4 + i % 2 * 2 + 1],
                         1000 * EPSILON);
        free(x), free(y), free(gram), free(trace);
        teardown(&p);
    }
}

/* A Gram matrix: Cholesky's factorisation of it and a rounding's worth of the unit matrix exists. */
static void test_positive(void **state)
{
    (void)state;
    for (int n = 0; n < NETWORKS; n++) {
        problem p;
        setup(&p, networks[n].text);
        const size_t rows = 12, all = rows * p.C;
        pk_real *x = make_inputs(&p, 8, rows, networks[n].tokens), *gram = compute(&p, 0, x, rows, NULL, 0);
        double *a = FIXTURE_NEW(double, all *all), trace = 0;
        for (size_t i = 0; i < all; i++)
            trace += (double)gram[i * all + i];
        for (size_t i = 0; i < all; i++)
            for (size_t j = 0; j <= i; j++) {
                double sum = (double)gram[i * all + j] + (i == j ? 20 * EPSILON * trace + 1e-300 : 0);
                for (size_t k = 0; k < j; k++)
                    sum -= a[i * all + k] * a[j * all + k];
                if (i == j && !(sum > 0))
                    fail_msg("%s: a pivot is %g", networks[n].text, sum);
                a[i * all + j] = i == j ? sqrt(sum) : sum / a[j * all + j];
            }
        free(a), free(gram), free(x);
        teardown(&p);
    }
}

/* The least memory that the message names, and any more, for any number of threads: the same bits. */
static void check_bits(problem *p, size_t n, size_t m, size_t tokens)
{
    for (int trace = 0; trace < 2; trace++)
        for (int own = 0; own < 2; own++) {
            const size_t kept = trace ? 1 : p->C, count = n * kept * (own ? n : m) * kept;
            pk_real *x = make_inputs(p, 21, n, tokens), *y = make_inputs(p, 22, m, tokens);
            p->context.threads = 1;
            pk_real *first = compute(p, trace, x, n, own ? NULL : y, m);
            for (int threads = 2; threads <= 5; threads++) {
                p->context.threads = threads;
                pk_real *other = compute(p, trace, x, n, own ? NULL : y, m);
                assert_memory_equal(first, other, count * sizeof *first);
                free(other);
            }
            const pk_matrix a = pk_matrix_view(x, n, p->D), b = own ? none() : pk_matrix_view(y, m, p->D);
            pk_matrix result = pk_matrix_view(FIXTURE_NEW(pk_real, count), n * kept, count / (n * kept));
            size_t least = 0;
            p->context.memory_limit = p->context.memory_used + 1;
            assert_int_equal(trace ? pk_kernel_ntk_trace(&p->context, &p->graph, p->weights, a, b, result)
                                   : pk_kernel_ntk(&p->context, &p->graph, p->weights, a, b, result),
                             PK_MEMORY_LIMIT);
            p->context.memory_limit = p->context.memory_used + EITHER(20000, 10000); /* for the plan */
            assert_refused(&p->context, PK_MEMORY_LIMIT, "the least that would do is ",
                           trace ? pk_kernel_ntk_trace(&p->context, &p->graph, p->weights, a, b, result)
                                 : pk_kernel_ntk(&p->context, &p->graph, p->weights, a, b, result));
            for (size_t i = 0; i < count; i++)
                assert_true(result.data[i] == 0); /* untouched */
            assert_int_equal(
                sscanf(strstr(pk_message(&p->context), "least that"), "least that would do is %zu", &least), 1);
            for (size_t more = 0; more < 9; more++) {
                p->context.memory_limit = least + more * more * least / 40;
                p->context.memory_peak = 0;
                pk_real *other = compute(p, trace, x, n, own ? NULL : y, m);
                assert_true(p->context.memory_peak <= p->context.memory_limit);
                if (memcmp(first, other, count * sizeof *first) != 0)
                    fail_msg("%s, trace %d: other bits within %zu bytes", p->graph.text, trace,
                             p->context.memory_limit);
                free(other);
            }
            p->context.memory_limit = 0;
            free(result.data), free(first), free(x), free(y);
        }
}

static void test_bits(void **state)
{
    (void)state;
    static const int some[] = {0, 5, 7, 8, 12};
    for (int k = 0; k < 5; k++) {
        problem p;
        setup(&p, networks[some[k]].text);
        check_bits(&p, 130, 75, networks[some[k]].tokens);
        check_bits(&p, 40, 170, networks[some[k]].tokens);
        teardown(&p);
    }
}

/* Called by several threads of the caller's at one time, each with a context of its own, of as many threads or of two. */
static void test_in_region(void **state)
{
    (void)state;
    enum { CALLS = 6 };
    static const size_t sizes[] = {12, 300}; /* one pass, and several */
    for (int k = 0; k < 2; k++) {
        problem p;
        setup(&p, "input 7; dense 70; relu; dense 4");
        const size_t n = sizes[k], all = n * p.C;
        pk_real *x = make_inputs(&p, 31, n, 0), *gram = compute(&p, 0, x, n, NULL, 0);
        pk_real *others = FIXTURE_NEW(pk_real, CALLS * all * all);
        int failures = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(3) schedule(dynamic, 1) reduction(+ : failures)
#endif
        for (int i = 0; i < CALLS; i++) {
            pk_context context;
            memset(&context, 0, sizeof context);
            context.threads = i % 3;
            failures += pk_kernel_ntk(&context, &p.graph, p.weights, pk_matrix_view(x, n, p.D), none(),
                                      pk_matrix_view(others + (size_t)i * all * all, all, all)) != PK_OK;
        }
        assert_int_equal(failures, 0);
        for (size_t i = 0; i < CALLS; i++)
            assert_memory_equal(others + i * all * all, gram, all * all * sizeof *gram);
        free(others), free(gram), free(x);
        teardown(&p);
    }
}

/* Views with an ld of their own; a view of the same rows under another name is another array. */
static void test_views(void **state)
{
    (void)state;
    problem p;
    setup(&p, networks[0].text);
    const size_t n = 20, all = n * p.C, wide = all + 3;
    pk_real *x = make_inputs(&p, 1, n, 0), *copy = FIXTURE_NEW(pk_real, n * 8);
    pk_real *gram = compute(&p, 0, x, n, NULL, 0), *other = FIXTURE_NEW(pk_real, all * wide);
    for (size_t i = 0; i < n; i++)
        memcpy(copy + i * 8, x + i * p.D, p.D * sizeof *x);
    pk_matrix view = pk_matrix_view(copy, n, p.D), result = pk_matrix_view(other, all, all);
    view.ld = 8;
    result.ld = wide;
    assert_ok(&p.context, pk_kernel_ntk(&p.context, &p.graph, p.weights, view, view, result));
    for (size_t i = 0; i < all; i++) {
        assert_memory_equal(gram + i * all, other + i * wide, all * sizeof *gram);
        assert_true(other[i * wide + all] == 0); /* beside the view: untouched */
    }
    assert_ok(&p.context,
              pk_kernel_ntk(&p.context, &p.graph, p.weights, view, pk_matrix_view(x, n, p.D), result));
    for (size_t i = 0; i < all * all; i++)
        assert_close(gram[i], other[i / all * wide + i % all], 1e4 * EPSILON);
    free(x), free(copy), free(gram), free(other);
    teardown(&p);
}

static int cancel(void *user, const char *phase, double fraction)
{
    assert_string_equal(phase, "kernel");
    assert_true(fraction >= 0 && fraction <= 1);
    return --*(int *)user == 0;
}

static void test_refusals(void **state)
{
    (void)state;
    problem p;
    setup(&p, "input 3; dense 4; relu; dense 2");
    enum { N = 4 };
    pk_real *x = make_inputs(&p, 1, N, 0), gram[N * 2 * N * 2] = {0}, none_of[1] = {0};
    pk_context *context = &p.context;
    pk_graph *graph = &p.graph, empty;
    memset(&empty, 0, sizeof empty);
    const pk_matrix a = pk_matrix_view(x, N, 3), all = pk_matrix_view(gram, N * 2, N * 2);
    assert_refused(context, PK_ARGUMENT, "no network", pk_kernel_ntk(context, &empty, p.weights, a, a, all));
    assert_refused(context, PK_ARGUMENT, "no network", pk_kernel_ntk(context, NULL, p.weights, a, a, all));
    assert_refused(context, PK_ARGUMENT, "weights are NULL", pk_kernel_ntk(context, graph, NULL, a, a, all));
    assert_refused(context, PK_SHAPE, "first inputs",
                   pk_kernel_ntk(context, graph, p.weights, pk_matrix_view(x, N, 2), a, all));
    assert_refused(context, PK_SHAPE, "second inputs",
                   pk_kernel_ntk(context, graph, p.weights, a, pk_matrix_view(x, N, 2), all));
    assert_refused(context, PK_ARGUMENT, "first inputs are NULL",
                   pk_kernel_ntk(context, graph, p.weights, pk_matrix_view(NULL, N, 3), none(), all));
    assert_refused(context, PK_SHAPE, "entries of the result",
                   pk_kernel_ntk(context, graph, p.weights, a, a, pk_matrix_view(gram, N, N)));
    assert_refused(context, PK_SHAPE, "ntk trace: the entries of the result",
                   pk_kernel_ntk_trace(context, graph, p.weights, a, a, all));
    assert_refused(context, PK_ARGUMENT, "result are NULL",
                   pk_kernel_ntk(context, graph, p.weights, a, a, pk_matrix_view(NULL, N * 2, N * 2)));
    assert_refused(context, PK_ARGUMENT, "overlaps",
                   pk_kernel_ntk_trace(context, graph, p.weights, a, a, pk_matrix_view(x, N, N)));
    assert_refused(
        context, PK_OVERFLOW, "overflow",
        pk_kernel_ntk(context, graph, p.weights, pk_matrix_view(x, SIZE_MAX / 2 + 1, 3), none(), all));
    for (size_t i = 0; i < N * 2 * N * 2; i++)
        assert_true(gram[i] == 0);
    /* No rows are fine. */
    assert_ok(context, pk_kernel_ntk(context, graph, p.weights, pk_matrix_view(none_of, 0, 3), a,
                                     pk_matrix_view(NULL, 0, N * 2)));
    /* Not finite: the first pair is named, the others are there. */
    x[2 * 3] = (pk_real)NAN;
    assert_refused(context, PK_NOT_FINITE, "row 0 with row 2",
                   pk_kernel_ntk(context, graph, p.weights, a, a, all));
    assert_true(gram[0] > 0);
    x[2 * 3] = 1;
    for (int calls = 1; calls < 10; calls++) {
        int left = calls;
        context->progress = cancel;
        context->progress_user = &left;
        pk_status status = pk_kernel_ntk(context, graph, p.weights, a, none(), all);
        context->progress = NULL;
        if (left > 0) {
            assert_ok(context, status);
            assert_true(calls > 1);
            break;
        }
        assert_int_equal(status, PK_CANCELLED);
    }
    free(x);
    teardown(&p);
    /* Tokens are checked on both sides. */
    setup(&p, networks[9].text);
    x = make_inputs(&p, 1, N, 6);
    pk_real *y = make_inputs(&p, 2, N, 6);
    y[5] = 6;
    assert_refused(
        &p.context, PK_ARGUMENT, "row 1",
        pk_kernel_ntk(&p.context, &p.graph, p.weights, pk_matrix_view(x, N, 4), pk_matrix_view(y, N, 4), all));
    free(x), free(y);
    teardown(&p);
}

/* Failure of each allocation: a status, nothing leaks, the result is untouched. */
static void test_allocation(void **state)
{
    (void)state;
    problem p;
    setup(&p, networks[8].text);
    enum { N = 4 };
    pk_real *x = make_inputs(&p, 1, N, 0), gram[N * N];
    size_t fail_at = 0;
    for (pk_status status = PK_MEMORY; status;) {
        pk_context context;
        fixture_memory memory;
        memset(&context, 0, sizeof context);
        memset(gram, 0, sizeof gram);
        fixture_use(&context, &memory);
        memory.fail_at = ++fail_at;
        status = pk_kernel_ntk_trace(&context, &p.graph, p.weights, pk_matrix_view(x, N, p.D), none(),
                                     pk_matrix_view(gram, N, N));
        assert_int_equal(memory.held, 0);
        if (status) {
            assert_refused(&context, PK_MEMORY, "ntk trace", status);
            for (size_t i = 0; i < N * N; i++)
                assert_true(gram[i] == 0);
        }
    }
    assert_true(fail_at > 3 && gram[0] > 0);
    free(x);
    teardown(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_networks),    cmocka_unit_test(test_sizes),     cmocka_unit_test(test_constant),
        cmocka_unit_test(test_brute_force), cmocka_unit_test(test_torch),     cmocka_unit_test(test_positive),
        cmocka_unit_test(test_bits),        cmocka_unit_test(test_views),     cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_allocation),  cmocka_unit_test(test_in_region),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
