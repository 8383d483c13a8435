/* Derivatives of networks with every operation there is: products from either side, Jacobians, gradients by example,
 * Hessian and Gauss-Newton products against differences, against each other, and to the bit for any number of threads. */
#include "graph_checks.h"
#include "user_operations.h"

/* ---- networks ------------------------------------------------------------------------------------------ */

/* Together these hold every built-in operation. */
static const struct {
    const char *text;
    double tokens; /* inputs are whole numbers below this; 0: real numbers */
} networks[] = {
    {"input 3; dense 5; identity; tanh; dense 4; sigmoid; dense 2", 0},
    {"input 2; dense 6 nobias; softplus 1.5; dense 4 ntk w_std=1.3 b_std=0.4; gelu; dense 3", 0},
    {"input 4; dense 3; silu; dense 4; erf; scale -0.7; dense 2 nobias", 0},
    {"input 3; tanh; dense 5; sine 2; dense 1", 0},
    {"input 5; dense 6; relu; dense 5; leaky_relu 0.2; dense 4; abs; dense 3; hard_tanh; dense 2", 0},
    {"input 3; dense 4; sign; dense 3; step 2; dense 2", 0},
    {"input 4x3; dense 2; tanh; position; flatten; dense 3", 0},
    {"input 3; fourier 4 scale=0.3 seed=5; dense 4; tanh; dense 2", 0},
    {"input 3; dense 4; residual( tanh; dense 4 ); residual( dense 3; gelu | dense 3 ); dense 2", 0},
    {"input 5x2; propagate matrix; dense 3; tanh; propagate matrix; dense 2; flatten", 0},
    {"input 1; constant table; dense 3; tanh; propagate matrix; dense 2; select", 5},
    {"input 6; dense 7; softmax; dense 4; log_softmax", 0},
    {"input 2x6; layer_norm; dense 4; rms_norm; flatten; dense 3", 0},
    {"input 3x4; dense 4; layer_norm dims=2 epsilon=0.1; flatten; dense 2; rms_norm noaffine", 0},
    {"input 3x4x2; batch_norm statistics; tanh; flatten; dense 5; tanh; dense 2", 0},
    {"input 4; embedding 6 3; position; attention 1; flatten; dense 3", 6},
    {"input 5; embedding 4 4; residual( attention 2 causal nobias ); layer_norm; mean_tokens; dense 2", 4},
    {"input 3x4; attention 2 shared; token -1; dense 2", 0},
    {"input 4; dense 5; exp; power -0.5; dense 4; tanh; power 2; as x; parameter 4; as y; multiply "
     "y; add x; "
     "exp; log; dense 3",
     0},
    NETWORKS_OF_VALUES("sine"),
    {"input 5; as x; dense 6; gather places; tanh; sum 0; as y; from x; above 0.1; gather places; sum 0; "
     "multiply y; dense 4; exp; as e; sum 0; as s; from e; divide s; dense 2",
     0},
    {"input 2x3x2; dense 4; as x; max 1; as y; from x; min 2; reshape 2x3x1; multiply x; max 0; min 1; "
     "flatten; dense "
     "3; "
     "min 0; as z; from y; flatten; dense 2; multiply z",
     0},
    {"input 4; embedding 7 2 padding=3 first=1; flatten; as x; from input; embedding 7 3 count=2 offset=2; "
     "flatten; as y; from x; "
     "concat 0 y; tanh; dense 2",
     4},
    {"input 1x5x5; conv 2 3x3 pad=1; tanh; avg_pool 2x2; flatten; dense 3", 0},
    {"input 2x6x5; conv 4 2x3 stride=2x1 pad=1x0 dilation=1x2 groups=2 nobias; gelu; conv 3 1x1; "
     "global_avg_pool; dense 2",
     0},
    {"input 2x4x4; conv 3 3x3 pad=1; max_pool 2x2; relu; conv 2 2x2; max_pool 1 ; flatten; dense 2", 0},
    {"input 3; dense 6; elu 0.5; dense 5; selu; dense 4; mish; dense 3; softsign; dense 2", 0},
    {"input 3; dense 6; hardswish; dense 5; relu6; dense 4; hard_sigmoid; dense 3; log_sigmoid; dense 2", 0},
    {"input 2x6; conv 4 3; tanh; conv_transpose 3 2 stride=2 pad=1; upsample 2 linear; adaptive_avg_pool 3; "
     "flatten",
     0},
    {"input 2x3x3; conv_transpose 4 2x3 stride=2x1 groups=2; tanh; adaptive_max_pool 2; flatten; dense 2", 0},
    {"input 1x5x4; conv 2 2; upsample 2x1; avg_pool 3 pad=1 ceil_mode count_include_pad=0; max_pool 2 "
     "ceil_mode; flatten",
     0},
    {"input 2x4x3; conv 4 2x2; group_norm 2; tanh; instance_norm epsilon=1e-3 noaffine; flatten; dense 2", 0},
    {"input 3; dense 6; gelu tanh; dense 5; prelu; dense 4; prelu 4; dense 3; softmin", 0},
};
enum { NETWORKS = (int)(sizeof networks / sizeof *networks), ROWS = 5 };

/* A symmetric matrix over five tokens as triples, five tokens of two numbers, mean and variance of three channels. */
static pk_status load(void *user, pk_context *context, const char *name, pk_array *array)
{
    static double matrix[9][3] = {{0, 0, 0.5}, {1, 0, 0.25}, {0, 1, 0.25}, {2, 3, -1}, {3, 2, -1},
                                  {4, 4, 2},   {1, 4, 0.75}, {4, 1, 0.75}, {3, 3, 0.1}},
                  table[5][2] = {{1, 0.5}, {-1, 0.25}, {0.75, -2}, {0.1, 0.2}, {-0.6, 0.9}},
                  statistics[2][3] = {{0.1, -0.2, 0.3}, {0.5, 2, 1}}, places[2][3] = {{4, 0, -1}, {1, 4, 2}};
    static const size_t shapes[4][2] = {{9, 3}, {5, 2}, {2, 3}, {2, 3}};
    (void)user, (void)context;
    *array = strcmp(name, "matrix") == 0   ? pk_array_view(PK_FLOAT64, 2, shapes[0], matrix)
             : strcmp(name, "table") == 0  ? pk_array_view(PK_FLOAT64, 2, shapes[1], table)
             : strcmp(name, "places") == 0 ? pk_array_view(PK_FLOAT64, 2, shapes[3], places)
                                           : pk_array_view(PK_FLOAT64, 2, shapes[2], statistics);
    return PK_OK;
}

/* A network with random weights, directions and a batch. */
typedef struct problem {
    pk_context context;
    pk_graph graph;
    checks c;
    size_t P, C, D, rows;
    pk_real *w, *v, *x, *z, *u; /* weights, a direction; inputs, their directions; cotangents */
    pk_real *y;                 /* targets */
    int64_t *items;
    double *weights;
    pk_dataset data;
    pk_batch batch;
} problem;

static void fill(problem *p, uint64_t seed, size_t rows, double tokens)
{
    p->c.graph = &p->graph;
    p->c.seed = seed;
    p->P = p->graph.parameters;
    p->C = p->graph.output_width;
    p->D = p->graph.input_width;
    p->rows = rows;
    p->w = checks_normals(&p->c, p->P, 0.6);
    p->v = checks_normals(&p->c, p->P, 1);
    p->x = checks_normals(&p->c, rows * p->D, 1);
    p->z = checks_normals(&p->c, rows * p->D, 1);
    p->u = checks_normals(&p->c, rows * p->C, 1);
    p->y = checks_normals(&p->c, rows * p->C, 0.5);
    p->weights = FIXTURE_NEW(double, rows);
    for (size_t r = 0; r < rows; r++)
        p->weights[r] = bf_normal(&p->c.seed);
    p->items = FIXTURE_NEW(int64_t, rows);
    for (size_t i = 0; tokens != 0 && i < rows * p->D; i++)
        p->x[i] = fmod(floor(fabs(p->x[i]) * 1000), tokens);
    for (size_t r = 0; r < rows; r++)
        p->items[r] = (int64_t)((7 * r + 3) % rows); /* one row may come twice, some never */
    const size_t inputs[2] = {rows, p->D}, targets[2] = {rows, p->C};
    p->data.inputs = pk_array_view(REAL_TYPE, 2, inputs, p->x);
    p->data.targets = pk_array_view(REAL_TYPE, 2, targets, p->y);
    p->batch.count = rows;
    p->batch.items = p->items;
    p->batch.weights = p->weights;
}

static void setup(problem *p, int network, size_t rows)
{
    const pk_constants constants = {load, NULL};
    memset(p, 0, sizeof *p);
    assert_ok(&p->context, pk_network_parse_with(&p->context, networks[network].text, &constants, &p->graph));
    fill(p, 100 + (uint64_t)network, rows, networks[network].tokens);
}

static void teardown(problem *p)
{
    checks_release(&p->c, 0);
    free(p->items), free(p->weights);
    pk_graph_release(&p->context, &p->graph);
    assert_int_equal(p->context.memory_used, 0);
}

static pk_matrix none(void)
{
    return pk_matrix_view(NULL, 0, 0);
}

static void test_all_operations(void **state)
{
    (void)state;
    const pk_operation *operation;
    const pk_constants constants = {load, NULL};
    for (size_t i = 0; (operation = pk_operation_at(i)) != NULL; i++) {
        int found = 0;
        for (int network = 0; network < NETWORKS; network++) {
            pk_context context;
            pk_graph graph;
            memset(&context, 0, sizeof context);
            memset(&graph, 0, sizeof graph);
            assert_ok(&context, pk_network_parse_with(&context, networks[network].text, &constants, &graph));
            for (size_t n = 1; n < graph.node_count; n++)
                found |= graph.nodes[n].operation == operation;
            pk_graph_release(&context, &graph);
        }
        if (!found)
            fail_msg("no network of this test has the operation '%s'", operation->name);
    }
}

/* ---- first derivatives ----------------------------------------------------------------------------------- */

/* difference (rows x C) of f along v in the weights and z in the inputs, either NULL: h^4 exact. */
static void differences(problem *p, const pk_real *v, const pk_real *z, pk_real *difference)
{
    const size_t keep = p->c.count, count = p->rows * p->C;
    pk_real *w = checks_take(&p->c, p->P), *x = checks_take(&p->c, p->rows * p->D),
            *f = checks_take(&p->c, count);
    memset(difference, 0, count * sizeof *difference);
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < p->P; i++)
            w[i] = p->w[i] + (v ? checks_at[k] / CHECKS_STEP_INVERSE * v[i] : 0);
        for (size_t i = 0; i < p->rows * p->D; i++)
            x[i] = p->x[i] + (z ? checks_at[k] / CHECKS_STEP_INVERSE * z[i] : 0);
        assert_ok(&p->context, pk_graph_evaluate(&p->context, &p->graph, w, pk_matrix_view(x, p->rows, p->D),
                                                 pk_matrix_view(f, p->rows, p->C)));
        for (size_t i = 0; i < count; i++)
            difference[i] += checks_factor[k] * CHECKS_STEP_INVERSE * f[i];
    }
    checks_release(&p->c, keep);
}

static const pk_node *output_of(const problem *p)
{
    return &p->graph.nodes[p->graph.node_count - 1];
}

static void test_first(void **state)
{
    (void)state;
    for (int network = 0; network < NETWORKS; network++) {
        problem p;
        setup(&p, network, ROWS);
        const int inputs = networks[network].tokens == 0;
        const size_t P = p.P, C = p.C, D = p.D;
        const pk_matrix x = pk_matrix_view(p.x, ROWS, D), u = pk_matrix_view(p.u, ROWS, C);
        pk_real *tangent = checks_take(&p.c, ROWS * C), *other = checks_take(&p.c, ROWS * C);
        pk_real *jacobian = checks_take(&p.c, ROWS * C * P), *in = checks_take(&p.c, ROWS * C * D);
        pk_real *rows = checks_take(&p.c, ROWS * P), *in_rows = checks_take(&p.c, ROWS * D);
        pk_real *expected = checks_take(&p.c, ROWS * (P + D)), *sum = checks_take(&p.c, P);
        /* The Jacobian times a direction, the tangent, and differences; in weights, in inputs, in both. */
        assert_ok(&p.context, pk_jacobian(&p.context, &p.graph, p.w, x, pk_matrix_view(jacobian, ROWS * C, P),
                                          inputs ? pk_matrix_view(in, ROWS * C, D) : none()));
        for (int kind = 1; kind <= (inputs ? 3 : 1); kind++) {
            const pk_real *v = kind & 1 ? p.v : NULL, *z = kind & 2 ? p.z : NULL;
            assert_ok(&p.context,
                      pk_jvp(&p.context, &p.graph, p.w, x, v, z ? pk_matrix_view(p.z, ROWS, D) : none(),
                             pk_matrix_view(tangent, ROWS, C)));
            for (size_t i = 0; i < ROWS * C; i++) {
                other[i] = 0;
                for (size_t k = 0; v && k < P; k++)
                    other[i] += jacobian[i * P + k] * v[k];
                for (size_t k = 0; z && k < D; k++)
                    other[i] += in[i * D + k] * z[i / C * D + k];
            }
            checks_equal("jvp and Jacobian", output_of(&p), ROWS * C, tangent, other, 1e-13);
            if (!checks_have_slopes(p.graph.switched, p.graph.surrogate))
                continue;
            differences(&p, v, z, other);
            checks_slope("jvp and differences", output_of(&p), ROWS * C, tangent, other, 1e-8);
        }
        /* vjp = u^T Jacobian. */
        assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, x, u, pk_matrix_view(rows, ROWS, P),
                                     inputs ? pk_matrix_view(in_rows, ROWS, D) : none()));
        assert_ok(&p.context, pk_vjp_sum(&p.context, &p.graph, p.w, x, u, sum));
        memset(expected, 0, ROWS * (P + D) * sizeof *expected);
        for (size_t r = 0; r < ROWS; r++)
            for (size_t c = 0; c < C; c++) {
                for (size_t k = 0; k < P; k++)
                    expected[r * P + k] += p.u[r * C + c] * jacobian[(r * C + c) * P + k];
                for (size_t k = 0; inputs && k < D; k++)
                    expected[ROWS * P + r * D + k] += p.u[r * C + c] * in[(r * C + c) * D + k];
            }
        checks_equal("vjp and Jacobian", output_of(&p), ROWS * P, rows, expected, 1e-13);
        if (inputs)
            checks_equal("vjp for inputs and Jacobian", output_of(&p), ROWS * D, in_rows, expected + ROWS * P,
                         1e-13);
        for (size_t r = 1; r < ROWS; r++)
            for (size_t k = 0; k < P; k++)
                expected[k] += expected[r * P + k];
        checks_equal("the sum of vjp", output_of(&p), P, sum, expected, 1e-13);
        /* Every number of the Jacobian, of the first row, against differences. */
        for (size_t k = 0; k < P + D && checks_have_slopes(p.graph.switched, p.graph.surrogate); k++) {
            if (k >= P && !inputs)
                break;
            pk_real *v = checks_take(&p.c, P), *z = checks_take(&p.c, ROWS * D);
            memset(v, 0, P * sizeof *v);
            memset(z, 0, ROWS * D * sizeof *z);
            if (k < P)
                v[k] = 1;
            for (size_t r = 0; k >= P && r < ROWS; r++)
                z[r * D + k - P] = 1;
            differences(&p, v, z, other);
            for (size_t i = 0; i < ROWS * C; i++)
                tangent[i] = k < P ? jacobian[i * P + k] : in[i * D + k - P];
            checks_slope("Jacobian and differences", output_of(&p), ROWS * C, tangent, other, 1e-8);
            checks_release(&p.c, p.c.count - 2);
        }
        if (!inputs)
            assert_refused(&p.context, PK_UNSUPPORTED, "takes whole numbers",
                           pk_vjp(&p.context, &p.graph, p.w, x, u, none(), pk_matrix_view(in_rows, ROWS, D)));
        teardown(&p);
    }
}

/* Matrices with gaps; results beside them stay. */
static void test_strides(void **state)
{
    (void)state;
    problem p;
    enum { LD = 64, N = 70 };
    setup(&p, 0, N);
    const size_t P = p.P, C = p.C, D = p.D;
    pk_real *x = checks_normals(&p.c, N * LD, 1), *u = checks_normals(&p.c, N * LD, 1),
            *z = checks_normals(&p.c, N * LD, 1), *wide[3], *narrow[3];
    for (size_t r = 0; r < N; r++) {
        memcpy(x + r * LD, p.x + r * D, D * sizeof *x);
        memcpy(z + r * LD, p.z + r * D, D * sizeof *z);
        memcpy(u + r * LD, p.u + r * C, C * sizeof *u);
    }
    assert_true(P + 1 <= 2 * LD);
    for (int i = 0; i < 3; i++) {
        wide[i] = checks_normals(&p.c, N * 2 * LD, 1);
        narrow[i] = checks_take(&p.c, N * (P + C + D));
    }
    pk_matrix in = {x, N, D, LD}, seeds = {u, N, C, LD}, push = {z, N, D, LD}, a = {wide[0], N, P, 2 * LD},
              b = {wide[1], N, D, 2 * LD}, t = {wide[2], N, C, 2 * LD};
    const double before = wide[0][P], beside = wide[1][D], last = wide[2][C];
    assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, in, seeds, a, b));
    assert_ok(&p.context, pk_jvp(&p.context, &p.graph, p.w, in, p.v, push, t));
    assert_ok(&p.context,
              pk_vjp(&p.context, &p.graph, p.w, pk_matrix_view(p.x, N, D), pk_matrix_view(p.u, N, C),
                     pk_matrix_view(narrow[0], N, P), pk_matrix_view(narrow[1], N, D)));
    assert_ok(&p.context, pk_jvp(&p.context, &p.graph, p.w, pk_matrix_view(p.x, N, D), p.v,
                                 pk_matrix_view(p.z, N, D), pk_matrix_view(narrow[2], N, C)));
    for (size_t r = 0; r < N; r++) {
        assert_memory_equal(wide[0] + r * 2 * LD, narrow[0] + r * P, P * sizeof *x);
        assert_memory_equal(wide[1] + r * 2 * LD, narrow[1] + r * D, D * sizeof *x);
        assert_memory_equal(wide[2] + r * 2 * LD, narrow[2] + r * C, C * sizeof *x);
    }
    assert_true(wide[0][P] == before && wide[1][D] == beside && wide[2][C] == last);
    /* Neither weights nor inputs move: no tangent. */
    assert_ok(&p.context, pk_jvp(&p.context, &p.graph, p.w, in, NULL, none(), t));
    for (size_t r = 0; r < N; r++)
        assert_true(fixture_largest(C, wide[2] + r * 2 * LD) == 0);
    teardown(&p);
}

/* ---- losses ----------------------------------------------------------------------------------------------- */

static const pk_loss losses[] = {PK_SQUARED, PK_MEAN_SQUARED, PK_SOFTMAX_CROSS_ENTROPY, PK_LOGISTIC, PK_NLL,
                                 PK_HUBER,   PK_HINGE};

/* Targets that fit every loss. */
static void one_hot(problem *p)
{
    for (size_t i = 0; i < p->rows * p->C; i++)
        p->y[i] = p->C == 1 ? 1 : i % p->C == i / p->C % p->C;
}

static void test_loss_gradients(void **state)
{
    (void)state;
    for (int network = 0; network < NETWORKS; network++) {
        problem p;
        pk_gradient_workspace workspace;
        const pk_loss loss = losses[network % 7];
        setup(&p, network, ROWS);
        one_hot(&p);
        const size_t P = p.P, C = p.C, D = p.D;
        pk_real *gradients = checks_take(&p.c, ROWS * P), *again = checks_take(&p.c, ROWS * P);
        double values[ROWS], objective, sum_objective = 0;
        pk_real *f = checks_take(&p.c, ROWS * C), *x = checks_take(&p.c, ROWS * D), *sum = checks_take(&p.c, P),
                *whole = checks_take(&p.c, P), *seeds = checks_take(&p.c, ROWS * C);
        assert_ok(&p.context, pk_loss_gradients(&p.context, &p.graph, loss, p.w, &p.data, &p.batch, values,
                                                pk_matrix_view(gradients, ROWS, P)));
        assert_ok(&p.context, pk_loss_gradients(&p.context, &p.graph, loss, p.w, &p.data, &p.batch, NULL,
                                                pk_matrix_view(again, ROWS, P)));
        assert_memory_equal(gradients, again, ROWS * P * sizeof *again);
        for (size_t r = 0; r < ROWS; r++)
            memcpy(x + r * D, p.x + (size_t)p.items[r] * D, D * sizeof *x);
        assert_ok(&p.context, pk_graph_evaluate(&p.context, &p.graph, p.w, pk_matrix_view(x, ROWS, D),
                                                pk_matrix_view(f, ROWS, C)));
        memset(sum, 0, P * sizeof *sum);
        for (size_t r = 0; r < ROWS; r++) {
            const pk_real *y = p.y + (size_t)p.items[r] * C;
            assert_close(values[r], pk_loss_value(loss, C, f + r * C, y), ROUNDING(1e-14) * fmax(1, values[r]));
            pk_loss_gradient(loss, C, f + r * C, y, seeds + r * C);
            sum_objective += p.weights[r] * values[r];
            for (size_t k = 0; k < P; k++)
                sum[k] += p.weights[r] * gradients[r * P + k];
        }
        assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, pk_matrix_view(x, ROWS, D),
                                     pk_matrix_view(seeds, ROWS, C), pk_matrix_view(again, ROWS, P), none()));
        checks_equal("gradients by example and vjp", output_of(&p), ROWS * P, gradients, again, 1e-14);
        memset(&workspace, 0, sizeof workspace);
        assert_ok(&p.context, pk_gradient_prepare(&p.context, &p.graph, ROWS, &workspace));
        assert_ok(&p.context, pk_batch_gradient(&p.context, &p.graph, loss, p.w, &p.data, &p.batch, &workspace,
                                                &objective, whole));
        checks_equal("gradients by example and their sum", output_of(&p), P, sum, whole, 1e-13);
        assert_close(objective, sum_objective, ROUNDING(1e-13) * fmax(1, fabs(objective)));
        pk_gradient_release(&p.context, &workspace);
        teardown(&p);
    }
}

/* ---- second derivatives ----------------------------------------------------------------------------------- */

/* difference (P) of the batch's gradient along v. */
static void gradient_differences(problem *p, pk_loss loss, const pk_real *v, pk_real *difference)
{
    const size_t keep = p->c.count;
    pk_real *w = checks_take(&p->c, p->P), *g = checks_take(&p->c, p->P);
    pk_gradient_workspace workspace;
    memset(&workspace, 0, sizeof workspace);
    assert_ok(&p->context, pk_gradient_prepare(&p->context, &p->graph, p->rows, &workspace));
    memset(difference, 0, p->P * sizeof *difference);
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < p->P; i++)
            w[i] = p->w[i] + checks_at[k] / CHECKS_STEP_INVERSE * v[i];
        assert_ok(&p->context,
                  pk_batch_gradient(&p->context, &p->graph, loss, w, &p->data, &p->batch, &workspace, NULL, g));
        for (size_t i = 0; i < p->P; i++)
            difference[i] += checks_factor[k] * CHECKS_STEP_INVERSE * g[i];
    }
    pk_gradient_release(&p->context, &workspace);
    checks_release(&p->c, keep);
}

static void check_second(problem *p, pk_loss loss)
{
    const size_t P = p->P, C = p->C, D = p->D, keep = p->c.count;
    pk_real *hv = checks_take(&p->c, P), *hs = checks_take(&p->c, P), *gv = checks_take(&p->c, P);
    pk_real *difference = checks_take(&p->c, P), *s = checks_normals(&p->c, P, 1);
    pk_real *jacobian = checks_take(&p->c, p->rows * C * P), *f = checks_take(&p->c, p->rows * C),
            *bent = checks_take(&p->c, C);
    double left, right, size = 0;
    pk_context *context = &p->context;
    assert_ok(context, pk_gauss_newton_product(context, &p->graph, loss, p->w, &p->data, &p->batch, p->v, gv));
    assert_ok(context, pk_jacobian(context, &p->graph, p->w, pk_matrix_view(p->x, p->rows, D),
                                   pk_matrix_view(jacobian, p->rows * C, P), none()));
    assert_ok(context, pk_graph_evaluate(context, &p->graph, p->w, pk_matrix_view(p->x, p->rows, D),
                                         pk_matrix_view(f, p->rows, C)));
    memset(difference, 0, P * sizeof *difference);
    for (size_t b = 0; b < p->batch.count; b++) {
        const size_t row = (size_t)p->items[b];
        const pk_real *J = jacobian + row * C * P;
        for (size_t c = 0; c < C; c++) {
            bent[c] = 0;
            for (size_t k = 0; k < P; k++)
                bent[c] += J[c * P + k] * p->v[k];
        }
        pk_loss_hessian_product(loss, C, f + row * C, p->y + row * C, bent, bent);
        for (size_t c = 0; c < C; c++)
            for (size_t k = 0; k < P; k++)
                difference[k] += p->weights[b] * bent[c] * J[c * P + k];
    }
    checks_equal("Gauss-Newton product and Jacobians", output_of(p), P, gv, difference, 1e-13);
    if (p->graph.surrogate) {
        memset(hv, 0, P * sizeof *hv);
        assert_refused(context, PK_UNSUPPORTED, "surrogate",
                       pk_hessian_product(context, &p->graph, loss, p->w, &p->data, &p->batch, p->v, hv));
        assert_true(fixture_largest(P, hv) == 0);
        checks_release(&p->c, keep);
        return;
    }
    assert_ok(context, pk_hessian_product(context, &p->graph, loss, p->w, &p->data, &p->batch, p->v, hv));
    assert_ok(context, pk_hessian_product(context, &p->graph, loss, p->w, &p->data, &p->batch, s, hs));
    left = checks_product(P, s, hv, &size);
    right = checks_product(P, p->v, hs, &size);
    checks_adjoint("symmetry of the Hessian", output_of(p), left, right, size);
    if (checks_have_slopes(p->graph.switched || loss == PK_HUBER || loss == PK_HINGE, 0)) {
        gradient_differences(p, loss, p->v, difference);
        checks_slope("Hessian product and differences", output_of(p), P, hv, difference, 1e-7);
    }
    checks_release(&p->c, keep);
}

static void test_second(void **state)
{
    (void)state;
    for (int network = 0; network < NETWORKS; network++)
        for (int loss = network % 2; loss < 7; loss += 2) {
            problem p;
            setup(&p, network, ROWS);
            one_hot(&p);
            check_second(&p, losses[loss]);
            teardown(&p);
        }
}

/* pk_mixed_product against differences of pk_vjp, along weights, inputs and both; between kinks the second derivative
 * of a piecewise-linear network is compared, too, where no step of the differences crosses one. */
static void check_mixed(problem *p, int inputs, int kind)
{
    const size_t rows = p->rows, P = p->P, C = p->C, D = p->D;
    const pk_matrix x = pk_matrix_view(p->x, rows, D), u = pk_matrix_view(p->u, rows, C);
    const size_t keep = p->c.count;
    const pk_real *v = kind & 1 ? p->v : NULL;
    const pk_matrix z = kind & 2 ? pk_matrix_view(p->z, rows, D) : none();
    pk_real *of_w = checks_take(&p->c, rows * P), *of_x = checks_take(&p->c, rows * D),
            *again = checks_take(&p->c, rows * (P > D ? P : D)), *slope_w = checks_take(&p->c, rows * P),
            *slope_x = checks_take(&p->c, rows * D), *w = checks_take(&p->c, P),
            *at = checks_take(&p->c, rows * D), *g = checks_take(&p->c, rows * P),
            *gx = checks_take(&p->c, rows * D);
    const pk_matrix wanted_x = inputs ? pk_matrix_view(of_x, rows, D) : none();
    if (p->graph.surrogate) {
        assert_refused(&p->context, PK_UNSUPPORTED, "surrogate",
                       pk_mixed_product(&p->context, &p->graph, p->w, x, u, v, z, pk_matrix_view(of_w, rows, P),
                                        wanted_x));
        checks_release(&p->c, keep);
        return;
    }
    assert_ok(&p->context, pk_mixed_product(&p->context, &p->graph, p->w, x, u, v, z,
                                            pk_matrix_view(of_w, rows, P), wanted_x));
    /* One result alone is the same. */
    assert_ok(&p->context, pk_mixed_product(&p->context, &p->graph, p->w, x, u, v, z,
                                            pk_matrix_view(again, rows, P), none()));
    checks_equal("weight products alone", output_of(p), rows * P, again, of_w, 1e-14);
    if (inputs) {
        assert_ok(&p->context, pk_mixed_product(&p->context, &p->graph, p->w, x, u, v, z, none(),
                                                pk_matrix_view(again, rows, D)));
        checks_equal("input products alone", output_of(p), rows * D, again, of_x, 1e-14);
    }
    if (!checks_have_slopes(p->graph.switched, 0)) {
        checks_release(&p->c, keep);
        return;
    }
    memset(slope_w, 0, rows * P * sizeof *slope_w);
    memset(slope_x, 0, rows * D * sizeof *slope_x);
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < P; i++)
            w[i] = p->w[i] + (v ? checks_at[k] / CHECKS_STEP_INVERSE * v[i] : 0);
        for (size_t i = 0; i < rows * D; i++)
            at[i] = p->x[i] + (z.data ? checks_at[k] / CHECKS_STEP_INVERSE * p->z[i] : 0);
        assert_ok(&p->context,
                  pk_vjp(&p->context, &p->graph, w, pk_matrix_view(at, rows, D), u, pk_matrix_view(g, rows, P),
                         inputs ? pk_matrix_view(gx, rows, D) : none()));
        for (size_t i = 0; i < rows * P; i++)
            slope_w[i] += checks_factor[k] * CHECKS_STEP_INVERSE * g[i];
        for (size_t i = 0; inputs && i < rows * D; i++)
            slope_x[i] += checks_factor[k] * CHECKS_STEP_INVERSE * gx[i];
    }
    checks_slope("weight products and differences", output_of(p), rows * P, of_w, slope_w, 1e-7);
    if (inputs)
        checks_slope("input products and differences", output_of(p), rows * D, of_x, slope_x, 1e-7);
    checks_release(&p->c, keep);
}

static void test_mixed(void **state)
{
    (void)state;
    for (int network = 0; network < NETWORKS; network++) {
        problem p;
        setup(&p, network, ROWS);
        const int inputs = networks[network].tokens == 0;
        for (int kind = 0; kind <= (inputs ? 3 : 1); kind++)
            check_mixed(&p, inputs, kind);
        if (!inputs && !p.graph.surrogate) {
            pk_real *out = checks_take(&p.c, ROWS * p.D);
            assert_refused(&p.context, PK_UNSUPPORTED, "takes whole numbers",
                           pk_mixed_product(&p.context, &p.graph, p.w, pk_matrix_view(p.x, ROWS, p.D),
                                            pk_matrix_view(p.u, ROWS, p.C), p.v, none(), none(),
                                            pk_matrix_view(out, ROWS, p.D)));
        }
        teardown(&p);
    }
    /* Shared tensors: the products are those of w, not of its uses. */
    problem p;
    memset(&p, 0, sizeof p);
    assert_ok(&p.context,
              pk_network_parse(&p.context,
                               "input 4; dense 4 name=a; tanh; dense 4 tied=a transposed; tanh; dense 2",
                               &p.graph));
    fill(&p, 77, ROWS, 0);
    for (int kind = 1; kind <= 3; kind++)
        check_mixed(&p, 1, kind);
    /* Bad shapes, overlap, nothing wanted. */
    const pk_matrix x = pk_matrix_view(p.x, ROWS, p.D), u = pk_matrix_view(p.u, ROWS, p.C);
    assert_refused(
        &p.context, PK_SHAPE, "mixed product: the cotangents",
        pk_mixed_product(&p.context, &p.graph, p.w, x, x, p.v, none(), none(), pk_matrix_view(p.z, ROWS, p.D)));
    assert_refused(
        &p.context, PK_SHAPE, "directions of the inputs",
        pk_mixed_product(&p.context, &p.graph, p.w, x, u, p.v, u, none(), pk_matrix_view(p.z, ROWS, p.D)));
    assert_refused(&p.context, PK_ARGUMENT, "overlaps",
                   pk_mixed_product(&p.context, &p.graph, p.w, x, u, p.v, none(), none(), x));
    assert_ok(&p.context, pk_mixed_product(&p.context, &p.graph, p.w, x, u, p.v, none(), none(), none()));
    teardown(&p);
}

/* ---- operations from outside ------------------------------------------------------------------------------- */

static void product_curvature(const pk_call *call)
{
    const size_t width = call->node->width;
    for (int j = 0; j < 2; j++)
        for (size_t i = 0; call->in_cotangent[j] && i < call->rows * call->copies * width; i++)
            if (call->in_tangent[1 - j])
                call->in_cotangent[j][i] +=
                    call->out_cotangent[i] *
                    call->in_tangent[1 - j][i / (call->copies * width) * width + i % width];
}

static void test_user_operations(void **state)
{
    (void)state;
    user_operations all;
    user_fill(&all);
    for (int kind = 0; kind < 5; kind++) {
        problem p;
        memset(&p, 0, sizeof p);
        if (kind == 2) {
            all.product.curvature = product_curvature;
            all.power.linear_in_weights = 1; /* w instead of exp(w) */
        }
        if (kind == 3)
            all.scale.smoothness = PK_SMOOTH;
        if (kind == 4)
            all.scale.smoothness = PK_PIECEWISE_LINEAR;
        user_residual(&p.context, &all, 3, 2, kind == 1, &p.graph);
        fill(&p, 40 + (uint64_t)kind, ROWS, 0);
        one_hot(&p);
        static const char *const words[5] = {"node 6, power, is not linear in its weights", NULL, NULL,
                                             "scale, has weights and is not linear in its inputs",
                                             "scale, has weights and is not linear in its inputs"};
        if (words[kind]) {
            pk_real *hv = checks_take(&p.c, p.P);
            assert_refused(
                &p.context, PK_UNSUPPORTED, words[kind],
                pk_hessian_product(&p.context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, hv));
        } else {
            check_second(&p, PK_SOFTMAX_CROSS_ENTROPY);
        }
        if (kind == 0) { /* not even linear in its weights: first derivatives are as exact */
            pk_real *tangent = checks_take(&p.c, ROWS * p.C), *difference = checks_take(&p.c, ROWS * p.C);
            assert_ok(&p.context, pk_jvp(&p.context, &p.graph, p.w, pk_matrix_view(p.x, ROWS, p.D), p.v,
                                         pk_matrix_view(p.z, ROWS, p.D), pk_matrix_view(tangent, ROWS, p.C)));
            differences(&p, p.v, p.z, difference);
            checks_slope("jvp and differences", output_of(&p), ROWS * p.C, tangent, difference, 1e-8);
        }
        teardown(&p);
    }
    problem p;
    memset(&p, 0, sizeof p);
    user_input(&p.context, &p.graph, 3);
    all.product.curvature = NULL;
    const int a = user_node(&p.context, &p.graph, pk_operation_find("dense"), 0, -1, 3);
    (void)user_node(&p.context, &p.graph, &all.product, a, a, 0);
    fill(&p, 9, ROWS, 0);
    pk_real *product = checks_take(&p.c, p.P);
    assert_refused(&p.context, PK_UNSUPPORTED, "node 2, product, has no curvature rule",
                   pk_hessian_product(&p.context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, product));
    teardown(&p);
}

/* The network language takes the context's operations, behind its own. */
static void test_language(void **state)
{
    (void)state;
    user_operations all;
    user_fill(&all);
    pk_operation tanh_too = all.scale;
    tanh_too.name = "tanh";
    all.scale.name = "slope";
    all.sum.shape = NULL; /* that of its input */
    all.sum.name = "total";
    const pk_operation *const own[4] = {&tanh_too, &all.scale, &all.sum, NULL};
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_refused(&context, PK_FORMAT, "'slope'",
                   pk_network_parse(&context, "input 3; dense 2; tanh; slope", &graph));
    context.operations = own;
    assert_ok(&context, pk_network_parse(&context, "input 3; dense 2; tanh; slope; total", &graph));
    assert_true(graph.nodes[2].operation == pk_operation_find("tanh"));
    assert_true(graph.nodes[3].operation == &all.scale);
    check_graph(&context, &graph, 3);
    pk_graph_release(&context, &graph);
    assert_refused(&context, PK_FORMAT, "'2'", pk_network_parse(&context, "input 3; slope 2", &graph));
    assert_int_equal(context.memory_used, 0);
}

/* ---- threads, memory, errors ------------------------------------------------------------------------------- */

static void everything(problem *p, pk_real **out)
{
    const size_t P = p->P, C = p->C, D = p->D, N = p->rows;
    const pk_matrix x = pk_matrix_view(p->x, N, D), u = pk_matrix_view(p->u, N, C);
    pk_context *context = &p->context;
    assert_ok(context, pk_vjp(context, &p->graph, p->w, x, u, pk_matrix_view(out[0], N, P),
                              pk_matrix_view(out[1], N, D)));
    assert_ok(context, pk_vjp_sum(context, &p->graph, p->w, x, u, out[2]));
    assert_ok(context, pk_jvp(context, &p->graph, p->w, x, p->v, pk_matrix_view(p->z, N, D),
                              pk_matrix_view(out[3], N, C)));
    assert_ok(context, pk_jacobian(context, &p->graph, p->w, x, pk_matrix_view(out[4], N * C, P),
                                   pk_matrix_view(out[5], N * C, D)));
    assert_ok(context, pk_loss_gradients(context, &p->graph, PK_LOGISTIC, p->w, &p->data, &p->batch,
                                         (double *)out[6], pk_matrix_view(out[7], N, P)));
    assert_ok(context,
              pk_hessian_product(context, &p->graph, PK_LOGISTIC, p->w, &p->data, &p->batch, p->v, out[8]));
    assert_ok(context, pk_gauss_newton_product(context, &p->graph, PK_LOGISTIC, p->w, &p->data, &p->batch, p->v,
                                               out[9]));
}

static void test_threads(void **state)
{
    (void)state;
    static const char *const texts[] = {"input 6; dense 40; tanh; dense 40; relu; dense 3",
                                        "input 6; dense 200; gelu; dense 160; tanh; dense 2"};
    for (int t = 0; t < 2; t++) {
        problem p;
        enum { N = 333 };
        pk_real *out[2][10];
        memset(&p, 0, sizeof p);
        assert_ok(&p.context, pk_network_parse(&p.context, texts[t], &p.graph));
        fill(&p, 70, t ? 65 : N, 0);
        one_hot(&p);
        const size_t n = p.rows, P = p.P, C = p.C, D = p.D;
        const size_t sizes[10] = {
            n * P, n * D, P, n * C, n * C * P, n * C * D, n * (sizeof(double) / sizeof(pk_real)), n * P, P, P};
        for (int i = 0; i < 20; i++)
            out[i / 10][i % 10] = checks_take(&p.c, sizes[i % 10]);
        p.context.threads = 1;
        everything(&p, out[0]);
        for (int threads = 2; threads < 8; threads += 3) {
            p.context.threads = threads;
            everything(&p, out[1]);
            for (int i = 0; i < 10; i++)
                assert_memory_equal(out[0][i], out[1][i], sizes[i] * sizeof(pk_real));
        }
        teardown(&p);
    }
}

/* Units that a ReLU has off are left out where several cotangents of an example go back together: the outputs' gradients are
 * those that come one by one, of widths that are no multiples of anything. */
static void test_units_off(void **state)
{
    (void)state;
    problem p;
    memset(&p, 0, sizeof p);
    assert_ok(&p.context,
              pk_network_parse(&p.context, "input 6; dense 150; relu; dense 141; relu; dense 19", &p.graph));
    fill(&p, 71, 70, 0);
    const size_t n = p.rows, P = p.P, C = p.C, D = p.D;
    const pk_matrix x = pk_matrix_view(p.x, n, D);
    pk_real *weights = checks_take(&p.c, n * C * P), *inputs = checks_take(&p.c, n * C * D);
    pk_real *weight = checks_take(&p.c, n * P), *input = checks_take(&p.c, n * D);
    assert_ok(&p.context, pk_jacobian(&p.context, &p.graph, p.w, x, pk_matrix_view(weights, n * C, P),
                                      pk_matrix_view(inputs, n * C, D)));
    for (size_t c = 0; c < C; c++) {
        for (size_t i = 0; i < n * C; i++)
            p.u[i] = i % C == c;
        assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, x, pk_matrix_view(p.u, n, C),
                                     pk_matrix_view(weight, n, P), pk_matrix_view(input, n, D)));
        for (size_t i = 0; i < n * P; i++)
            assert_close(weights[(i / P * C + c) * P + i % P], weight[i], ROUNDING(1e-12));
        for (size_t i = 0; i < n * D; i++)
            assert_close(inputs[(i / D * C + c) * D + i % D], input[i], ROUNDING(1e-12));
    }
    teardown(&p);
}

static void test_memory(void **state)
{
    (void)state;
    problem p;
    fixture_memory memory;
    pk_real *out[10];
    memset(&p, 0, sizeof p);
    fixture_use(&p.context, &memory);
    assert_ok(&p.context, pk_network_parse(&p.context, "input 3; dense 4; tanh; dense 2", &p.graph));
    fill(&p, 5, 200, 0);
    one_hot(&p);
    for (int i = 0; i < 10; i++)
        out[i] = checks_take(&p.c, p.rows * p.C * (p.P + p.D));
    everything(&p, out); /* with NaN in fresh memory */
    const pk_matrix x = pk_matrix_view(p.x, p.rows, p.D), u = pk_matrix_view(p.u, p.rows, p.C);
    p.context.memory_limit = p.context.memory_used + 500;
    out[2][0] = 7;
    assert_int_equal(pk_vjp_sum(&p.context, &p.graph, p.w, x, u, out[2]), PK_MEMORY_LIMIT);
    assert_int_equal(pk_vjp(&p.context, &p.graph, p.w, x, u, none(), pk_matrix_view(out[2], p.rows, p.D)),
                     PK_MEMORY_LIMIT);
    assert_int_equal(pk_hessian_product(&p.context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out[2]),
                     PK_MEMORY_LIMIT);
    assert_true(out[2][0] == 7);
    p.context.memory_limit = 0;
    const size_t held = p.context.memory_used;
    for (size_t fail = 1;; fail++) {
        memory.allocations = 0;
        memory.fail_at = fail;
        pk_status status =
            pk_hessian_product(&p.context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out[2]);
        if (!status)
            status = pk_vjp(&p.context, &p.graph, p.w, x, u, none(), pk_matrix_view(out[1], p.rows, p.D));
        assert_int_equal(p.context.memory_used, held);
        if (!status) {
            assert_true(fail > 2);
            break;
        }
        assert_int_equal(status, PK_MEMORY);
    }
    memory.fail_at = 0;
    teardown(&p);
    assert_int_equal(memory.held, 0);
}

static void test_errors(void **state)
{
    (void)state;
    problem p;
    setup(&p, 0, ROWS);
    one_hot(&p);
    const size_t P = p.P, C = p.C, D = p.D;
    pk_context *context = &p.context;
    pk_real *out = checks_take(&p.c, ROWS * C * (P + D)), *keep = checks_take(&p.c, ROWS * C * (P + D));
    memset(out, 0x40, ROWS * C * (P + D) * sizeof *out);
    memcpy(keep, out, ROWS * C * (P + D) * sizeof *out);
    const pk_matrix x = pk_matrix_view(p.x, ROWS, D), u = pk_matrix_view(p.u, ROWS, C),
                    gw = pk_matrix_view(out, ROWS, P), gx = pk_matrix_view(out, ROWS, D);
    pk_matrix bad;
    pk_graph empty;
    memset(&empty, 0, sizeof empty);
    assert_refused(context, PK_ARGUMENT, "no network", pk_vjp(context, NULL, p.w, x, u, gw, none()));
    assert_refused(context, PK_ARGUMENT, "no network", pk_vjp(context, &empty, p.w, x, u, gw, none()));
    assert_refused(context, PK_ARGUMENT, "weights are NULL",
                   pk_jvp(context, &p.graph, NULL, x, p.v, none(), u));
    bad = x, bad.cols--;
    assert_refused(context, PK_SHAPE, "inputs are 5 x 2 (ld 3), not 5 x 3",
                   pk_jacobian(context, &p.graph, p.w, bad, gw, none()));
    bad = x, bad.ld--;
    assert_refused(context, PK_SHAPE, "ld 2", pk_vjp(context, &p.graph, p.w, bad, u, gw, none()));
    bad = x, bad.data = NULL;
    assert_refused(context, PK_ARGUMENT, "inputs are NULL", pk_vjp(context, &p.graph, p.w, bad, u, gw, none()));
    bad = u, bad.rows--;
    assert_refused(context, PK_SHAPE, "cotangents are 4 x 2",
                   pk_vjp(context, &p.graph, p.w, x, bad, gw, none()));
    assert_refused(context, PK_ARGUMENT, "cotangents are NULL",
                   pk_vjp_sum(context, &p.graph, p.w, x, pk_matrix_view(NULL, ROWS, C), out));
    assert_refused(context, PK_ARGUMENT, "NULL", pk_vjp_sum(context, &p.graph, p.w, x, u, NULL));
    bad = gw, bad.rows++;
    assert_refused(context, PK_SHAPE, "gradients for the weights are 6 x",
                   pk_vjp(context, &p.graph, p.w, x, u, bad, none()));
    bad = gx, bad.cols++, bad.ld++;
    assert_refused(context, PK_SHAPE, "gradients for the inputs",
                   pk_vjp(context, &p.graph, p.w, x, u, none(), bad));
    assert_refused(context, PK_SHAPE, "derivatives for the weights are 5 x",
                   pk_jacobian(context, &p.graph, p.w, x, gw, none()));
    assert_refused(context, PK_ARGUMENT, "overlaps", pk_vjp(context, &p.graph, p.w, x, u, gw, gx));
    assert_refused(context, PK_ARGUMENT, "overlaps", pk_vjp(context, &p.graph, p.w, x, u, none(), x));
    assert_refused(context, PK_ARGUMENT, "overlaps", pk_vjp_sum(context, &p.graph, p.w, x, u, p.w));
    bad = x, bad.rows--;
    assert_refused(context, PK_SHAPE, "directions of the inputs",
                   pk_jvp(context, &p.graph, p.w, x, p.v, bad, pk_matrix_view(out, ROWS, C)));
    assert_refused(context, PK_SHAPE, "tangents", pk_jvp(context, &p.graph, p.w, x, p.v, none(), gx));
    assert_refused(context, PK_ARGUMENT, "loss is unknown",
                   pk_loss_gradients(context, &p.graph, (pk_loss)0, p.w, &p.data, &p.batch, NULL, gw));
    bad = gw, bad.data = NULL;
    assert_refused(context, PK_ARGUMENT, "gradients are NULL",
                   pk_loss_gradients(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, NULL, bad));
    assert_refused(context, PK_ARGUMENT, "hessian: an argument",
                   pk_hessian_product(context, &p.graph, PK_SQUARED, p.w, &p.data, NULL, p.v, out));
    assert_refused(context, PK_ARGUMENT, "hessian: the direction",
                   pk_hessian_product(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, NULL, out));
    assert_refused(context, PK_ARGUMENT, "overlaps",
                   pk_gauss_newton_product(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, p.v));
    p.items[2] = ROWS;
    assert_refused(context, PK_ARGUMENT, "gauss_newton: batch position 2 is example 5 of 5",
                   pk_gauss_newton_product(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out));
    p.items[2] = 1;
    assert_memory_equal(out, keep, ROWS * C * (P + D) * sizeof *out);
    /* Nothing asked for, or no rows. */
    assert_ok(context, pk_vjp(context, &p.graph, p.w, x, u, none(), none()));
    assert_ok(context, pk_jacobian(context, &p.graph, p.w, pk_matrix_view(NULL, 0, D),
                                   pk_matrix_view(out, 0, P), none()));
    assert_memory_equal(out, keep, ROWS * C * (P + D) * sizeof *out);
    assert_ok(context,
              pk_vjp_sum(context, &p.graph, p.w, pk_matrix_view(NULL, 0, D), pk_matrix_view(NULL, 0, C), out));
    assert_true(fixture_largest(P, out) == 0);
    p.batch.count = 0;
    memcpy(out, keep, P * sizeof *out);
    assert_ok(context, pk_hessian_product(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out));
    assert_true(fixture_largest(P, out) == 0);
    p.batch.count = ROWS;
    /* Numbers that are not finite are found where they are. */
    p.x[3 * D] = NAN;
    assert_refused(context, PK_NOT_FINITE, "jvp: the result for row 3",
                   pk_jvp(context, &p.graph, p.w, x, p.v, none(), pk_matrix_view(out, ROWS, C)));
    assert_refused(context, PK_NOT_FINITE, "jacobian: the result for row 3",
                   pk_jacobian(context, &p.graph, p.w, x, pk_matrix_view(out, ROWS * C, P), none()));
    assert_refused(context, PK_NOT_FINITE, "row 3", pk_vjp_sum(context, &p.graph, p.w, x, u, out));
    assert_refused(context, PK_NOT_FINITE, "hessian: the result for row",
                   pk_hessian_product(context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out));
    p.x[3 * D] = 1;
    p.u[4 * C] = INFINITY;
    assert_refused(context, PK_NOT_FINITE, "sum over rows", pk_vjp_sum(context, &p.graph, p.w, x, u, out));
    teardown(&p);
    /* Tokens, also those that a later layer reads. */
    setup(&p, 10, ROWS);
    pk_real *tangent = checks_take(&p.c, ROWS * p.C);
    p.x[3] = 5;
    assert_refused(&p.context, PK_ARGUMENT, "row 3, number 0: select takes whole numbers from 0 to 4, not 5",
                   pk_jvp(&p.context, &p.graph, p.w, pk_matrix_view(p.x, ROWS, 1), p.v, none(),
                          pk_matrix_view(tangent, ROWS, p.C)));
    teardown(&p);
}

/* An output that no weight reaches has derivatives, all zero; a node that nobody reads disturbs nobody. */
static void test_unread(void **state)
{
    (void)state;
    problem p;
    memset(&p, 0, sizeof p);
    user_input(&p.context, &p.graph, 3);
    (void)user_node(&p.context, &p.graph, pk_operation_find("dense"), 0, -1, 2);
    (void)user_node(&p.context, &p.graph, pk_operation_find("tanh"), 0, -1, 0);
    fill(&p, 5, ROWS, 0);
    pk_real *out = checks_take(&p.c, ROWS * 8), *in = checks_take(&p.c, ROWS * 3);
    const pk_matrix x = pk_matrix_view(p.x, ROWS, 3), u = pk_matrix_view(p.u, ROWS, 3);
    assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, x, u, pk_matrix_view(out, ROWS, 8),
                                 pk_matrix_view(in, ROWS, 3)));
    assert_true(fixture_largest(ROWS * 8, out) == 0);
    for (size_t i = 0; i < ROWS * 3; i++)
        assert_close(in[i], p.u[i] * (1 - tanh(p.x[i]) * tanh(p.x[i])), ROUNDING(1e-15));
    memset(out, 0xff, ROWS * 8 * sizeof *out);
    assert_ok(&p.context, pk_vjp(&p.context, &p.graph, p.w, x, u, pk_matrix_view(out, ROWS, 8), none()));
    assert_true(fixture_largest(ROWS * 8, out) == 0);
    assert_ok(&p.context, pk_jvp(&p.context, &p.graph, p.w, x, p.v, none(), pk_matrix_view(in, ROWS, 3)));
    assert_true(fixture_largest(ROWS * 3, in) == 0);
    assert_ok(&p.context,
              pk_hessian_product(&p.context, &p.graph, PK_SQUARED, p.w, &p.data, &p.batch, p.v, out));
    assert_true(fixture_largest(8, out) == 0);
    teardown(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_operations), cmocka_unit_test(test_first),
        cmocka_unit_test(test_strides),        cmocka_unit_test(test_loss_gradients),
        cmocka_unit_test(test_second),         cmocka_unit_test(test_user_operations),
        cmocka_unit_test(test_language),       cmocka_unit_test(test_threads),
        cmocka_unit_test(test_memory),         cmocka_unit_test(test_errors),
        cmocka_unit_test(test_unread),         cmocka_unit_test(test_units_off),
        cmocka_unit_test(test_mixed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
