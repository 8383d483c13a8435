/* Fuzz target: a network is read and *run*. The input is a line of the network language, then bytes that choose the
 * rest: the arrays it names, loss, optimizer, data, what is kept. Small networks are evaluated, differentiated from both
 * sides, their kernels compared with J J^T, their curvature with its own symmetry, trained for two steps, recorded,
 * reopened and decomposed, and the parts added up.
 */
#include "fuzz.h"

enum { FUZZ_WIDEST = 64, FUZZ_PARAMETERS = 400, FUZZ_NODES = 40, FUZZ_ROWS = 3, FUZZ_NAMES = 4 };

/* ---- named arrays: three that fit five tokens or three channels, all others as the bytes say ---------------- */

typedef struct fuzz_constant {
    double numbers[64];
    size_t shape[PK_ARRAY_RANK];
} fuzz_constant;

typedef struct fuzz_constant_set {
    fuzz_bytes *bytes;
    fuzz_constant made[FUZZ_NAMES];
    char names[FUZZ_NAMES][PK_CONSTANT_NAME];
    pk_array views[FUZZ_NAMES];
    size_t count;
    int plain; /* no number of its own was extreme */
} fuzz_constant_set;

/* Mostly small numbers; some at the ends of the range. */
static double fuzz_number(fuzz_bytes *bytes, int *plain)
{
    static const double special[] = {0, -0.0, 1e-300, -1e300, 5e-324, 1e16, (double)INFINITY, (double)NAN};
    unsigned byte = fuzz_byte(bytes);
    if (byte >= 248) {
        *plain = 0;
        return special[byte - 248];
    }
    return ((double)byte - 124) / 32;
}

static pk_array fuzz_make_constant(fuzz_constant_set *set, fuzz_constant *constant, const char *name)
{
    static const double matrix[9][3] = {{0, 0, 0.5}, {1, 0, 0.25}, {0, 1, 0.25}, {2, 3, -1}, {3, 2, -1},
                                        {4, 4, 2},   {1, 4, 0.75}, {4, 1, 0.75}, {3, 3, 0.1}},
                        table[5][2] = {{1, 0.5}, {-1, 0.25}, {0.75, -2}, {0.1, 0.2}, {-0.6, 0.9}},
                        statistics[2][3] = {{0.1, -0.2, 0.3}, {0.5, 2, 1}};
    static const size_t shapes[3][2] = {{9, 3}, {5, 2}, {2, 3}};
    if (strcmp(name, "matrix") == 0)
        return pk_array_view(PK_FLOAT64, 2, shapes[0], matrix);
    if (strcmp(name, "table") == 0)
        return pk_array_view(PK_FLOAT64, 2, shapes[1], table);
    if (strcmp(name, "statistics") == 0)
        return pk_array_view(PK_FLOAT64, 2, shapes[2], statistics);
    const unsigned form = fuzz_byte(set->bytes);
    const int rank = (int)(form / 4 % 4);
    const pk_type type = (pk_type)(1 + form % 4);
    size_t items = 1;
    for (int d = 0; d < rank; d++) {
        constant->shape[d] = fuzz_byte(set->bytes) % (d ? 4u : 6u);
        items *= constant->shape[d];
    }
    for (size_t i = 0; i < items && i < 64; i++) {
        const double number = fuzz_number(set->bytes, &set->plain);
        const float narrow = (float)(number < 1e30 && number > -1e30 ? number : 0);
        const int64_t whole = (int64_t)narrow;
        if (type == PK_FLOAT64)
            constant->numbers[i] = number;
        else if (type == PK_FLOAT32)
            memcpy((float *)constant->numbers + i, &narrow, sizeof narrow);
        else if (type == PK_INT64)
            memcpy((int64_t *)constant->numbers + i, &whole, sizeof whole);
        else
            ((uint8_t *)constant->numbers)[i] = (uint8_t)(whole & 255);
    }
    return pk_array_view(type, rank, constant->shape, constant->numbers);
}

static pk_status fuzz_load(void *user, pk_context *context, const char *name, pk_array *array)
{
    fuzz_constant_set *set = (fuzz_constant_set *)user;
    size_t at = 0;
    while (at < set->count && strcmp(set->names[at], name) != 0)
        at++;
    if (at == FUZZ_NAMES || strlen(name) >= PK_CONSTANT_NAME)
        return pk__fail(context, PK_ARGUMENT, "there is no array '%.40s'", name);
    if (at == set->count) {
        strcpy(set->names[at], name);
        set->views[at] = fuzz_make_constant(set, &set->made[at], name);
        set->count++;
    }
    *array = set->views[at];
    return PK_OK;
}

/* ---- one network ------------------------------------------------------------------------------------------ */

typedef struct fuzz_job {
    pk_context context;
    pk_graph graph;
    fuzz_bytes bytes;
    fuzz_constant_set constants;
    pk_loss loss;
    size_t P, C, D;
    int plain; /* numbers are of ordinary size: what is exact on paper holds to rounding */
    pk_real *w, *v, *x, *u, *f;
    pk_dataset data;
    size_t input_shape[2], target_shape[2];
    int64_t labels[FUZZ_ROWS];
    pk_real *y;
} fuzz_job;

static pk_real *fuzz_numbers(fuzz_job *job, size_t count)
{
    pk_real *numbers = NULL;
    FUZZ_REQUIRE(pk_allocate(&job->context, count, sizeof *numbers, "numbers", &numbers) == PK_OK);
    return numbers;
}

static pk_real *fuzz_normals(fuzz_job *job, size_t count, double scale, uint64_t stream)
{
    pk_random random = {7, 0, 0};
    pk_real *numbers = fuzz_numbers(job, count);
    random.stream = stream;
    for (size_t i = 0; i < count; i++)
        numbers[i] = (pk_real)(scale * pk_random_normal(&random));
    return numbers;
}

/* Runs that take longer than a thousandth of a second are no use here. */
static int fuzz_small(const pk_graph *graph, int *plain)
{
    size_t work = 0;
    if (graph->parameters > FUZZ_PARAMETERS || graph->node_count > FUZZ_NODES || graph->widest > FUZZ_WIDEST)
        return 0;
    for (size_t n = 0; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        work += node->width + node->weight_count * (node->positions ? node->positions : 1);
        for (int i = 0; i < PK_NODE_ATTRIBUTES; i++) {
            const double size = fabs(node->attributes[i]);
            *plain &= size == 0 || (size >= 1e-5 && size <= 100);
        }
    }
    return work < 20000;
}

static int fuzz_finite(const pk_real *numbers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (!isfinite(numbers[i]) || fabs((double)numbers[i]) > 1e8)
            return 0;
    return 1;
}

/* a == b, where both are sums of terms that are `size` together. */
static int fuzz_equal(const fuzz_job *job, double a, double b, double size)
{
    return !job->plain || fabs(a - b) <= ROUNDING(1e-7) * (size + 1e-3);
}

/* An error has a message; NaN and infinities may come from these networks. */
static int fuzz_done(fuzz_job *job, pk_status status)
{
    FUZZ_REQUIRE(status == PK_OK || job->context.message[0]);
    FUZZ_REQUIRE(status != PK_MEMORY && status != PK_OVERFLOW);
    FUZZ_REQUIRE(status == PK_OK || status == PK_NOT_FINITE || status == PK_UNSUPPORTED ||
                 status == PK_MEMORY_LIMIT);
    return status == PK_OK;
}

/* Rows that the network takes: normals, else zeros. */
static int fuzz_inputs(fuzz_job *job)
{
    job->x = fuzz_normals(job, FUZZ_ROWS * job->D, 1, 2);
    for (int whole = 0; whole < 2; whole++) {
        int taken = 1;
        for (size_t r = 0; r < FUZZ_ROWS; r++)
            taken &= pk_graph_check_inputs(&job->context, &job->graph, r, job->x + r * job->D) == PK_OK;
        if (taken)
            return 1;
        for (size_t i = 0; i < FUZZ_ROWS * job->D; i++)
            job->x[i] = (pk_real)(whole ? 0 : fuzz_byte(&job->bytes) % 3);
    }
    return 0;
}

static void fuzz_derivatives(fuzz_job *job)
{
    pk_context *context = &job->context;
    const pk_graph *graph = &job->graph;
    const size_t P = job->P, C = job->C, D = job->D, rows = FUZZ_ROWS;
    const pk_matrix x = pk_matrix_view(job->x, rows, D), none = {NULL, 0, 0, 0};
    pk_real *gradients = fuzz_numbers(job, rows * P), *tangents = fuzz_numbers(job, rows * C),
            *jacobian = fuzz_numbers(job, rows * C * P), *sum = fuzz_numbers(job, P);
    int found = fuzz_done(job, pk_vjp(context, graph, job->w, x, pk_matrix_view(job->u, rows, C),
                                      pk_matrix_view(gradients, rows, P), none));
    found &= fuzz_done(job, pk_vjp_sum(context, graph, job->w, x, pk_matrix_view(job->u, rows, C), sum));
    found &= fuzz_done(job, pk_jvp(context, graph, job->w, x, job->v, none, pk_matrix_view(tangents, rows, C)));
    found &=
        fuzz_done(job, pk_jacobian(context, graph, job->w, x, pk_matrix_view(jacobian, rows * C, P), none));
    if (found && fuzz_finite(jacobian, rows * C * P)) {
        for (size_t r = 0; r < rows; r++) { /* u J v from either side, and from J itself */
            double left = 0, right = 0, size = 0, all = 0;
            for (size_t p = 0; p < P; p++)
                left += (double)gradients[r * P + p] * (double)job->v[p];
            for (size_t c = 0; c < C; c++)
                right += (double)tangents[r * C + c] * (double)job->u[r * C + c];
            for (size_t c = 0; c < C; c++)
                for (size_t p = 0; p < P; p++) {
                    double term =
                        (double)job->u[r * C + c] * (double)job->v[p] * (double)jacobian[(r * C + c) * P + p];
                    all += term;
                    size += fabs(term);
                }
            if (!graph->surrogate) {
                FUZZ_REQUIRE(fuzz_equal(job, left, right, size));
                FUZZ_REQUIRE(fuzz_equal(job, left, all, size));
            }
        }
        for (size_t p = 0; p < P; p++) {
            double all = 0, size = 0;
            for (size_t r = 0; r < rows; r++) {
                all += (double)gradients[r * P + p];
                size += fabs((double)gradients[r * P + p]);
            }
            FUZZ_REQUIRE(fuzz_equal(job, (double)sum[p], all, size));
        }
        pk_real *gram = fuzz_numbers(job, rows * C * rows * C), *trace = fuzz_numbers(job, rows * rows);
        const pk_matrix self = {NULL, 0, 0, 0};
        if (fuzz_done(job, pk_kernel_ntk(context, graph, job->w, x, self,
                                         pk_matrix_view(gram, rows * C, rows * C))) &&
            fuzz_done(job,
                      pk_kernel_ntk_trace(context, graph, job->w, x, self, pk_matrix_view(trace, rows, rows))))
            for (size_t i = 0; i < rows * C; i++)
                for (size_t j = 0; j < rows * C; j++) {
                    double all = 0, size = 0;
                    for (size_t p = 0; p < P; p++) {
                        double term = (double)jacobian[i * P + p] * (double)jacobian[j * P + p];
                        all += term;
                        size += fabs(term);
                    }
                    FUZZ_REQUIRE(gram[i * rows * C + j] == gram[j * rows * C + i]);
                    FUZZ_REQUIRE(fuzz_equal(job, (double)gram[i * rows * C + j], all, size));
                }
        pk_release(context, gram);
        pk_release(context, trace);
    }
    pk_release(context, gradients);
    pk_release(context, tangents);
    pk_release(context, jacobian);
    pk_release(context, sum);
}

static void fuzz_curvature(fuzz_job *job)
{
    static const int64_t items[FUZZ_ROWS] = {2, 0, 2};
    pk_context *context = &job->context;
    const size_t P = job->P;
    pk_real *hv = fuzz_numbers(job, P), *hw = fuzz_numbers(job, P);
    pk_batch batch = {FUZZ_ROWS, items, NULL};
    for (int gauss = 0; gauss < 2; gauss++) {
        pk_status (*product)(pk_context *, const pk_graph *, pk_loss, const pk_real *, const pk_dataset *,
                             const pk_batch *, const pk_real *, pk_real *) =
            gauss ? pk_gauss_newton_product : pk_hessian_product;
        if (fuzz_done(job, product(context, &job->graph, job->loss, job->w, &job->data, &batch, job->v, hv)) &&
            fuzz_done(job, product(context, &job->graph, job->loss, job->w, &job->data, &batch, job->w, hw)) &&
            fuzz_finite(hv, P) && fuzz_finite(hw, P) && !job->graph.surrogate) {
            double left = 0, right = 0, size = 0, square = 0;
            for (size_t p = 0; p < P; p++) {
                left += (double)hv[p] * (double)job->w[p];
                right += (double)hw[p] * (double)job->v[p];
                square += (double)hv[p] * (double)job->v[p];
                size += fabs((double)hv[p]) + fabs((double)hw[p]);
            }
            FUZZ_REQUIRE(fuzz_equal(job, left, right, 100 * size));
            FUZZ_REQUIRE(!gauss || fuzz_equal(job, square < 0 ? square : 0, 0, 100 * size));
        }
    }
    pk_release(context, hv);
    pk_release(context, hw);
}

static void fuzz_decomposition(fuzz_job *job, const pk_run *run)
{
    pk_context *context = &job->context;
    pk_decompose_options options;
    pk_decomposition out;
    const unsigned choice = fuzz_byte(&job->bytes);
    memset(&options, 0, sizeof options);
    options.keep[0] = PK_BY_EXAMPLE;
    options.keep[1] = choice & 1 ? PK_BY_STEP | PK_BY_LAYER : PK_BY_LAYER;
    options.bounds = choice >> 1 & 1;
    options.step_closure = choice >> 2 & 1;
    options.reverse_time = choice >> 3 & 1;
    /* The adaptive rules take most of the time of this target: seldom to the last digit. */
    options.quadrature.rule = choice & 128 ? PK_RULE_AUTO : PK_RULE_GAUSS;
    options.quadrature.nodes = choice & 128 ? 0 : 2;
    options.tolerance = choice & 64 ? 0 : 1e-3;
    pk_status status = pk_decompose(context, run, pk_matrix_view(job->x, FUZZ_ROWS, job->D), &options, &out);
    FUZZ_REQUIRE(status == PK_OK || context->message[0]);
    /* The rounding of float32 may count for much where weights are large; that of double does not. */
    const int coarse = run->weights.type == PK_FLOAT32 || sizeof(pk_real) == sizeof(float) || !job->plain;
    const int done = status == PK_OK || status == PK_NOT_CLOSED || (coarse && status == PK_UNATTRIBUTED);
    FUZZ_REQUIRE(done || status == PK_NOT_FINITE || status == PK_UNSUPPORTED || status == PK_MEMORY_LIMIT);
    for (size_t cell = 0; done && cell < out.rows * out.outputs; cell++) {
        double sum = out.initial[cell], size = fabs(sum) + fabs(out.final[cell]);
        for (size_t i = 0; i < out.examples; i++) {
            sum += out.by_example[cell * out.examples + i];
            size += fabs(out.by_example[cell * out.examples + i]);
        }
        sum += out.decay[cell] + out.unattributed[cell] + out.closure[cell];
        size += fabs(out.decay[cell]) + fabs(out.unattributed[cell]) + fabs(out.closure[cell]);
        FUZZ_REQUIRE(!isfinite(size) || fabs(sum - out.final[cell]) <= 1e-12 * size);
    }
    pk_decomposition_release(context, &out);
}

static int fuzz_same(void *user, size_t step, double objective, const pk_real *weights)
{
    (void)user, (void)step, (void)objective, (void)weights;
    return 0;
}

/* Two steps, recorded; read again, they are the same bits. */
static void fuzz_training(fuzz_job *job)
{
    static const char *const optimizers[] = {"sgd",
                                             "sgd momentum=0.9 nesterov=1 weight_decay=0.01",
                                             "adam",
                                             "adamw beta1=0 beta2=0.9",
                                             "sgd momentum=0.5 dampening=0.5",
                                             "adamw epsilon=1e-3 weight_decay=0.5"};
    char folder[400];
    pk_context *context = &job->context;
    pk_train_options options;
    pk_train_result result;
    pk_run run;
    const unsigned choice = fuzz_byte(&job->bytes), kept = fuzz_byte(&job->bytes);
    pk_real *after = fuzz_numbers(job, job->P), *again = fuzz_numbers(job, job->P);
    memset(&options, 0, sizeof options);
    memset(&run, 0, sizeof run);
    snprintf(folder, sizeof folder, "%s/run", fuzz_enter());
    options.loss = job->loss;
    FUZZ_REQUIRE(pk_optimizer_parse(context, optimizers[choice % 6], &options.optimizer) == PK_OK);
    options.schedule.rate = choice & 64 ? 0.5 : 0.01;
    options.steps = 2;
    options.batch_size = choice & 128 ? 2 : 0;
    options.clip_norm = kept & 4 ? 0.5 : 0;
    options.record = folder;
    options.replace = 1;
    options.keep_every = kept % 4;
    options.record_float32 = kept >> 3 & 1 && options.keep_every < 2;
    options.record_second_moments = kept >> 4 & 1 && options.keep_every < 2 && choice % 6 % 4 >= 2;
    if (choice % 6 == 5)
        options.record_second_moments = 0;
    options.on_step = fuzz_same;
    memcpy(after, job->w, job->P * sizeof *after);
    pk_status status = pk_train(context, &job->graph, &job->data, &options, after, &result);
    FUZZ_REQUIRE(status == PK_OK || context->message[0]);
    FUZZ_REQUIRE(status == PK_OK || status == PK_NOT_FINITE || status == PK_UNSUPPORTED ||
                 status == PK_MEMORY_LIMIT);
    if (status == PK_OK || (status == PK_NOT_FINITE && access(folder, F_OK) == 0)) {
        pk_status opened = pk_run_open(context, folder, &run);
        if (opened && opened != PK_NOT_FINITE)
            fprintf(stderr, "recorded, but not read: %s\n", context->message);
        FUZZ_REQUIRE(opened == PK_OK || opened == PK_NOT_FINITE);
        if (opened == PK_OK) {
            pk_replay replay;
            FUZZ_REQUIRE(status || run.steps == 2);
            FUZZ_REQUIRE(strcmp(run.graph.text, job->graph.text) == 0);
            FUZZ_REQUIRE(run.steps == result.steps);
            FUZZ_REQUIRE(pk_replay_prepare(context, &run, 0, &replay) == PK_OK);
            pk_status read = pk_replay_weights(context, &replay, run.steps, again);
            FUZZ_REQUIRE(read == PK_OK || read == PK_NOT_FINITE);
            FUZZ_REQUIRE(read || options.record_float32 || memcmp(after, again, job->P * sizeof *after) == 0);
            pk_replay_release(context, &replay);
            fuzz_decomposition(job, &run);
            pk_run_release(context, &run);
        }
    }
    fuzz_clear(folder);
    pk_release(context, after);
    pk_release(context, again);
}

static void fuzz_run_network(fuzz_job *job)
{
    pk_context *context = &job->context;
    const pk_graph *graph = &job->graph;
    job->P = graph->parameters;
    job->C = graph->output_width;
    job->D = graph->input_width;
    const unsigned choice = fuzz_byte(&job->bytes);
    job->loss = (pk_loss)(1 + choice % 7);
    job->w = fuzz_numbers(job, job->P);
    FUZZ_REQUIRE(pk_network_initialize(context, graph, choice / 7, job->w) == PK_OK);
    /* Weights up to 4 saturate attention: differences of nearly equal numbers are no measure then. */
    job->plain &= !(choice & 128);
    for (size_t p = 0; (choice & 128) && p < job->P; p++)
        job->w[p] += (pk_real)(((double)fuzz_byte(&job->bytes)) / 64);
    job->v = fuzz_normals(job, job->P, 1, 1);
    job->u = fuzz_normals(job, FUZZ_ROWS * job->C, 1, 3);
    job->f = fuzz_numbers(job, FUZZ_ROWS * job->C);
    job->y = fuzz_normals(job, FUZZ_ROWS * job->C, 0.5, 4);
    if (fuzz_inputs(job)) {
        job->input_shape[0] = job->target_shape[0] = FUZZ_ROWS;
        job->input_shape[1] = job->D;
        job->target_shape[1] = job->C;
        job->data.inputs = pk_array_view(REAL_TYPE, 2, job->input_shape, job->x);
        job->data.targets = pk_array_view(REAL_TYPE, 2, job->target_shape, job->y);
        for (size_t r = 0; r < FUZZ_ROWS; r++) {
            job->labels[r] = (int64_t)(r % job->C);
            for (size_t c = 0; c < job->C; c++)
                if (job->loss == PK_LOGISTIC || job->loss == PK_NLL || job->loss == PK_SOFTMAX_CROSS_ENTROPY)
                    job->y[r * job->C + c] = (pk_real)((r + c) % 2);
        }
        if (job->loss == PK_HINGE || (choice & 64)) {
            job->data.targets = pk_array_view(PK_INT64, 1, job->target_shape, job->labels);
            if (job->C == 1)
                for (size_t r = 0; r < FUZZ_ROWS; r++)
                    job->labels[r] = job->loss == PK_HINGE ? (r % 2 ? 1 : -1) : 0;
        }
        FUZZ_REQUIRE(pk_loss_check(context, job->loss, &job->data, job->C) == PK_OK);
        pk_status status = pk_graph_evaluate(context, graph, job->w, pk_matrix_view(job->x, FUZZ_ROWS, job->D),
                                             pk_matrix_view(job->f, FUZZ_ROWS, job->C));
        if (fuzz_done(job, status)) {
            job->plain &= fuzz_finite(job->f, FUZZ_ROWS * job->C);
            fuzz_derivatives(job);
            fuzz_curvature(job);
            fuzz_training(job);
        }
    }
    pk_release(context, job->w);
    pk_release(context, job->v);
    pk_release(context, job->u);
    pk_release(context, job->f);
    pk_release(context, job->x);
    pk_release(context, job->y);
}

static int fuzz_execute(const uint8_t *data, size_t size)
{
    fuzz_job job;
    size_t length = 0;
    memset(&job, 0, sizeof job);
    while (length < size && data[length] != '\n' && data[length])
        length++;
    job.bytes.at = data + length + (length < size);
    job.bytes.left = size - length - (length < size);
    job.constants.bytes = &job.bytes;
    job.constants.plain = job.plain = 1;
    job.context.memory_limit = (size_t)1 << 26;
    job.context.threads = 1;
    char *text = (char *)malloc(length + 1);
    FUZZ_REQUIRE(text);
    if (length)
        memcpy(text, data, length);
    text[length] = 0;
    const pk_constants constants = {fuzz_load, &job.constants};
    pk_status status = pk_network_parse_with(&job.context, text, &constants, &job.graph);
    free(text);
    FUZZ_REQUIRE(status == PK_OK || (job.context.message[0] && !job.graph.nodes && !job.graph.text));
    if (status == PK_OK && fuzz_small(&job.graph, &job.plain)) {
        job.plain &= job.constants.plain;
        fuzz_run_network(&job);
    }
    pk_graph_release(&job.context, &job.graph);
    FUZZ_REQUIRE(job.context.memory_used == 0);
    return 0;
}
