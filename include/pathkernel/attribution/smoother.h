/* pathkernel/attribution/smoother.h: predictions along training: telescoped, and as a smoother of the targets.
 *
 * Telescoping (Jeffares, Curth and van der Schaar 2024, arXiv 2411.00247), to first order in each step:
 *     f_S(x) ~ f_0(x) + sum_s J(w_s, x) D_s.
 *
 * The smoother. Where the loss is squared, the gradient of example i is J_i^T kappa (f(w_s, x_i) - y_i), linear in the targets
 * once the path of the weights is given. With y all N C targets behind each other,
 *     f(w_s, x) = s_s(x) y + c_s(x),      s_s(x): C x N C,
 *     [s | c]_{s+1}(x) = [s | c]_s(x) - sum_i eta_s c_{s,i} kappa K_s(x, x_i) ([s | c]_s(x_i) - [e_i | 0]),
 *     K_s(x, x_i) = integral_0^1 J(w_s + t D_s, x) dt  J(w_s, x_i)^T:
 * the test side is integrated along the step, as in the exact path kernel, so that this is the network and no
 * approximation of it, at every step and for every row. (With J(w_s, x) in place of the integral it is that of the paper.)
 *
 * An optimizer with a state makes D_s a linear function of all gradients so far (optimizer.h, pk_linear_form). Its momentum
 * is then linear in y, too: one vector of P numbers for each target, carried along. Weight decay, and what steps differ
 * by from the declared training, do not depend on y: they go into c.
 */
#ifndef PATHKERNEL_SMOOTHER_H
#define PATHKERNEL_SMOOTHER_H
#include "../features/phi.h"
#include "decomposition.h"
#include "walk.h"

/* >>> declarations */
PK__BEGIN_C

/* predictions ((S + 1) x M x C): at [s, m, c] the telescoped f_c(w_s, x_m), f_0 + sum_{u < s} J(w_u, x_m) D_u. inputs: M x D.
 * Cost: a forward product a step and row. PK_ARGUMENT, PK_SHAPE, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE,
 * PK_CANCELLED, and what reading the run gives; predictions hold what was done. */
PK_API PK__MUST_USE pk_status pk_telescope(pk_context *context, const pk_run *run, pk_matrix inputs,
                                           double *predictions);

typedef struct pk_smoother_options {
    int first_order; /* 1: J(w_s, x) in place of its integral along the step: the paper's; the residual says how far it is */
    double tolerance; /* of the residual; 0: 1e-10, in float 1e-3 */
} pk_smoother_options;

/* Rows are the N training examples in their order, then the M test rows. */
typedef struct pk_smoother {
    size_t rows, examples, outputs, steps; /* N + M, N, C, S */
    double *matrix;                        /* rows C x N C: s_S(x), output by output */
    double *constant;                      /* rows C: c_S(x) */
    double *targets;                       /* N C: y, as the loss takes them */
    double *predictions;                   /* (S + 1) x rows x C: s_s(x) y + c_s(x) */
    double *
        effective; /* (S + 1) x 2: effective parameters of the training rows, of the test rows (0 where there are none) */
    /* The largest |s y + c - f| / max(1, the largest |f|) of all steps, and where it is: f is the network's output. */
    double residual;
    size_t worst_step, worst_row, worst_output;
    double
        unattributed; /* the largest |sum_s Phi_s u_s| / max(1, |f|), u_s: D_s - the update of the declared training */
    size_t points;  /* quadrature nodes, over rows and steps */
    size_t refused; /* pieces that were accepted although more nodes still changed them */
    double seconds;
} pk_smoother;

/* The smoother of a run with the loss squared or mean_squared, under any optimizer. inputs: M x D test rows, or no data: M = 0.
 * *out is zeroed first; release it also after PK_NOT_CLOSED (computed, but the residual exceeds the tolerance; not where
 * first_order is set) and PK_UNATTRIBUTED (computed, but the recorded weights are not those of the declared training).
 * Cost a step: the Jacobians of the batch, those of all rows at the quadrature's nodes, and about
 * 2 rows C (B C P + B C N C) flops for a batch of B; with a state 2 N C P (B C + rows C). Memory: the results, B C P numbers,
 * a block of about 2^18 numbers, and with a state 2 N C P. PK_UNSUPPORTED: another loss, whose gradients are not linear in
 * the targets. PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE, PK_CANCELLED; *out has no arrays
 * then. */
PK_API PK__MUST_USE pk_status pk_smooth(pk_context *context, const pk_run *run, pk_matrix inputs,
                                        const pk_smoother_options *options, pk_smoother *out);
PK_API void pk_smoother_release(pk_context *context, pk_smoother *smoother);

/* Effective parameters of some rows I (Curth, Jeffares and van der Schaar 2023, arXiv 2310.18988):
 *     p(I) = (N / |I|) sum_{j in I} |s_S(x_j)|^2 ,
 * the sum over the C outputs of each row included. rows: count numbers below smoother->rows. 0 where count is 0. */
PK_API double pk_effective_parameters(const pk_smoother *smoother, size_t count, const size_t *rows);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SMOOTHER_IMPLEMENTED)
#define PATHKERNEL_SMOOTHER_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- telescoping --------------------------------------------------------------------------------------- */

static pk_status pk__telescope_steps(pk_context *context, const pk_run *run, pk_matrix inputs,
                                     pk_replay *replay, pk_real *w, pk_real *next, pk_real *direction,
                                     pk_real *f, double *predictions)
{
    const size_t P = run->parameters, cells = inputs.rows * run->outputs;
    const pk_matrix out = pk_matrix_view(f, inputs.rows, run->outputs);
    pk_status status = pk_replay_weights(context, replay, 0, next);
    if (!status)
        status = pk_graph_evaluate(context, &run->graph, next, inputs, out);
    for (size_t i = 0; !status && i < cells; i++)
        predictions[i] = f[i];
    for (size_t s = 0; s < run->steps && !status; s++) {
        status = pk__progress(context, "telescoping", (double)s / (double)run->steps);
        memcpy(w, next, P * sizeof *w);
        if (!status)
            status = pk_replay_weights(context, replay, s + 1, next);
        if (status)
            return status;
        for (size_t p = 0; p < P; p++)
            direction[p] = (pk_real)((double)next[p] - w[p]);
        status = pk_jvp(context, &run->graph, w, inputs, direction, pk__no_matrix(), out);
        for (size_t i = 0; !status && i < cells; i++)
            predictions[(s + 1) * cells + i] = predictions[s * cells + i] + f[i];
    }
    return status;
}

PK_API pk_status pk_telescope(pk_context *context, const pk_run *run, pk_matrix inputs, double *predictions)
{
    if (!run || !run->weights.data || (!predictions && inputs.rows))
        return pk__fail(context, PK_ARGUMENT,
                        "telescoping: the run or the place for the predictions is missing");
    pk_status status =
        pk__sweep_matrix(context, "telescoping", "inputs", inputs, inputs.rows, run->graph.input_width);
    if (status || !inputs.rows)
        return status;
    pk_real *w, *next, *direction, *f;
    pk_replay replay;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        w = pk__arena_take(&arena, run->parameters, sizeof *w);
        next = pk__arena_take(&arena, run->parameters, sizeof *next);
        direction = pk__arena_take(&arena, run->parameters, sizeof *direction);
        f = pk__arena_take(&arena, inputs.rows, run->outputs * sizeof *f);
    } while (pk__arena_again(context, &arena, "telescoping", &status));
    memset(&replay, 0, sizeof replay);
    if (!status)
        status = pk_replay_prepare(context, run, 0, &replay);
    if (!status)
        status = pk__telescope_steps(context, run, inputs, &replay, w, next, direction, f, predictions);
    pk_replay_release(context, &replay);
    pk_release(context, arena.base);
    return status;
}

/* ---- the smoother -------------------------------------------------------------------------------------- */

typedef struct pk__smooth {
    pk_context *context;
    const pk_run *run;
    pk_smoother *out;
    int first_order;
    size_t columns; /* N C + 1: the constants stand behind the targets */
    double kappa;   /* dl/df = kappa (f - y) */
    pk__walk walk;
    pk__step_integral phi;
    pk_replay replay;
    pk_real *w, *next;               /* P */
    pk_real *inputs;                 /* rows x D */
    pk_real *f, *batch, *jacobian;   /* rows C; B x D; B C x P */
    pk_real *sources;                /* B C x columns: weights times ([s | c] - [e | 0]) of the batch */
    pk_real *left, *kernel, *change; /* of a block of rows: C x P, C x B C, C x columns each */
    pk_real *gradients, *momenta;    /* with a state: columns x P */
    double *integral;                /* of a block: C x P each */
    double *sum, *mean, *all;        /* P: the step's gradient; its momentum, without and with weight decay */
    double *other, *rest; /* P: of D_s what is not of the gradients; what the declared training leaves */
    double *table;        /* rows C x columns: [s | c] */
    double *unattributed; /* rows C */
    double scale;         /* the largest |f| */
} pk__smooth;

static void pk__smooth_take(pk__arena *arena, pk__smooth *m)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters, C = run->outputs, D = run->graph.input_width, real = sizeof(pk_real);
    const size_t rows = m->out->rows, batch = pk__largest_batch(run);
    const int state = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups) > 0;
    size_t cells = 0, terms = 0, block = 0;
    if (!pk__multiply(run->examples, C, &m->columns) || !pk__multiply(rows, C, &cells) ||
        !pk__multiply(batch, C, &terms))
        arena->overflow = 1;
    m->columns++;
    pk__walk_take(arena, run, &m->walk);
    pk__step_integral_take(arena, rows, &m->phi);
    block = m->phi.rows * C;
    m->w = pk__arena_take(arena, P, real);
    m->next = pk__arena_take(arena, P, real);
    m->inputs = pk__arena_take(arena, rows, D * real);
    m->f = pk__arena_take(arena, cells, real);
    m->batch = pk__arena_take(arena, batch, D * real);
    m->jacobian = pk__arena_take(arena, terms, P * real);
    m->sources = pk__arena_take(arena, terms, m->columns * real);
    m->left = pk__arena_take(arena, block, P * real);
    m->kernel = pk__arena_take(arena, block, terms * real);
    m->change = pk__arena_take(arena, block, m->columns * real);
    m->gradients = pk__arena_take(arena, state ? m->columns : 0, P * real);
    m->momenta = pk__arena_take(arena, state ? m->columns : 0, P * real);
    m->integral = pk__arena_take(arena, block, P * sizeof(double));
    double **const vectors[] = {&m->sum, &m->mean, &m->all, &m->other, &m->rest};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        *vectors[i] = pk__arena_take(arena, P, sizeof(double));
    m->table = pk__arena_take(arena, cells, m->columns * sizeof(double));
    m->unattributed = pk__arena_take(arena, cells, sizeof(double));
}

/* Predictions and effective parameters at w, which is w_s, and the residual. */
static pk_status pk__smooth_look(pk__smooth *m, size_t s, const pk_real *w)
{
    pk_smoother *out = m->out;
    const size_t C = out->outputs, cells = out->rows * C, targets = m->columns - 1, train = out->examples * C;
    pk_status status = pk_graph_evaluate(m->context, &m->run->graph, w,
                                         pk_matrix_view(m->inputs, out->rows, m->run->graph.input_width),
                                         pk_matrix_view(m->f, out->rows, C));
    if (status)
        return status;
    double sums[2] = {0, 0};
    for (size_t i = 0; i < cells; i++) {
        double *row = m->table + i * m->columns;
        if (s == 0)
            row[targets] = m->f[i];
        double value = row[targets], norm = 0;
        for (size_t j = 0; j < targets; j++) {
            value += row[j] * out->targets[j];
            norm += row[j] * row[j];
        }
        sums[i >= train] += norm;
        out->predictions[s * cells + i] = value;
        m->scale = fmax(m->scale, fabs((double)m->f[i]));
        const double miss = fabs(value - (double)m->f[i]);
        if (!(miss <= out->residual)) {
            out->residual = miss;
            out->worst_step = s, out->worst_row = i / C, out->worst_output = i % C;
        }
    }
    out->effective[2 * s] = sums[0];
    if (out->rows > out->examples)
        out->effective[2 * s + 1] = sums[1] * (double)out->examples / (double)(out->rows - out->examples);
    return PK_OK;
}

/* The batch's Jacobian, its sources, the sum of its gradients. */
static pk_status pk__smooth_batch(pk__smooth *m, size_t s, size_t *terms)
{
    const pk_run *run = m->run;
    const pk_smoother *out = m->out;
    const size_t P = run->parameters, C = out->outputs, D = run->graph.input_width;
    const double scale = pk_run_gradient_scale(run, s);
    pk_batch batch;
    pk_run_batch(run, s, &batch);
    *terms = batch.count * C;
    memset(m->sum, 0, P * sizeof *m->sum);
    for (size_t b = 0; b < batch.count; b++)
        memcpy(m->batch + b * D, m->inputs + (size_t)batch.items[b] * D, D * sizeof *m->batch);
    pk_status status = PK_OK;
    if (batch.count)
        status = pk_jacobian(m->context, &run->graph, m->w, pk_matrix_view(m->batch, batch.count, D),
                             pk_matrix_view(m->jacobian, *terms, P), pk__no_matrix());
    for (size_t i = 0; i < *terms && !status; i++) {
        const size_t at = (size_t)batch.items[i / C] * C + i % C;
        const double c = batch.weights ? batch.weights[i / C] : 1 / (double)batch.count;
        const double weight = scale * c * m->kappa, *row = m->table + at * m->columns;
        pk_real *to = m->sources + i * m->columns;
        for (size_t j = 0; j < m->columns; j++)
            to[j] = (pk_real)(weight * (row[j] - (j == at)));
        const double slope = weight * ((double)m->f[at] - out->targets[at]);
        for (size_t p = 0; p < P; p++)
            m->sum[p] += slope * m->jacobian[i * P + p];
    }
    for (size_t p = 0; p < P; p++)
        m->walk.gradient[p] = (pk_real)m->sum[p];
    return status;
}

/* What the step's form makes of the gradients: momenta; what is left of D_s without them, and without decay. */
static void pk__smooth_form(pk__smooth *m, size_t terms)
{
    const size_t P = m->run->parameters;
    size_t range = 0;
    if (m->momenta)
        pk__gemm(1, 0, m->columns, P, terms, 1, m->sources, m->columns, m->jacobian, P, 0, m->gradients, P);
    for (size_t p = 0; p < P; p++) {
        const pk_linear_form *form = pk__walk_form(&m->walk, p, &range);
        const double step = (double)m->next[p] - m->w[p];
        const double inside = pk__form_inside(form, m->walk.p[p]),
                     outside = pk__form_outside(form, m->walk.p[p]);
        const double gain = form->gain * inside, direct = form->direct * inside;
        const double decayed = m->sum[p] + form->coupled * m->w[p];
        m->mean[p] = form->carry * m->mean[p] + gain * m->sum[p];
        m->all[p] = form->carry * m->all[p] + gain * decayed;
        m->other[p] = step + outside * (form->enter * m->mean[p] + direct * m->sum[p]);
        m->rest[p] = step + outside * (form->enter * m->all[p] + direct * decayed) + form->decoupled * m->w[p];
        for (size_t j = 0; m->momenta && j < m->columns; j++) {
            pk_real *gradient = m->gradients + j * P + p, *momentum = m->momenta + j * P + p;
            *momentum = (pk_real)(form->carry * *momentum + gain * *gradient);
            *gradient = (pk_real)(outside * (form->enter * *momentum + direct * *gradient));
        }
    }
}

/* [s | c] of a block of rows, from first on, whose integral is there. */
static void pk__smooth_rows(pk__smooth *m, size_t first, size_t rows, size_t terms)
{
    const size_t P = m->run->parameters, C = m->out->outputs, cells = rows * C, columns = m->columns;
    for (size_t i = 0; i < cells; i++) {
        const double *phi = m->integral + i * P;
        double other = 0, rest = 0;
        size_t range = 0;
        for (size_t p = 0; p < P; p++) {
            const pk_linear_form *form = pk__walk_form(&m->walk, p, &range);
            const double scale = m->walk.p[p];
            const double factor = m->momenta ? 1
                                             : pk__form_outside(form, scale) * pk__form_inside(form, scale) *
                                                   (form->enter * form->gain + form->direct);
            m->left[i * P + p] = (pk_real)(factor * phi[p]);
            other += phi[p] * m->other[p];
            rest += phi[p] * m->rest[p];
        }
        m->table[(first * C + i + 1) * columns - 1] += other;
        m->unattributed[first * C + i] += rest;
    }
    if (!terms && !m->momenta)
        return;
    if (m->momenta) {
        pk__gemm(0, 1, cells, columns, P, 1, m->left, P, m->gradients, P, 0, m->change, columns);
    } else {
        pk__gemm(0, 1, cells, terms, P, 1, m->left, P, m->jacobian, P, 0, m->kernel, terms);
        pk__gemm(0, 0, cells, columns, terms, 1, m->kernel, terms, m->sources, columns, 0, m->change, columns);
    }
    for (size_t i = 0; i < cells * columns; i++)
        m->table[first * C * columns + i] -= m->change[i];
}

/* The integral of a block of rows along the step, or J at its start. */
static pk_status pk__smooth_integral(pk__smooth *m, pk_matrix inputs)
{
    if (!m->first_order)
        return pk__step_integral_run(&m->phi, m->w, m->next, inputs, m->integral);
    const size_t P = m->run->parameters, cells = inputs.rows * m->out->outputs;
    pk_status status = pk_jacobian(m->context, &m->run->graph, m->w, inputs, pk_matrix_view(m->left, cells, P),
                                   pk__no_matrix());
    for (size_t i = 0; i < cells * P && !status; i++)
        m->integral[i] = m->left[i];
    return status;
}

static pk_status pk__smooth_run(pk__smooth *m)
{
    const pk_run *run = m->run;
    const size_t P = run->parameters, D = run->graph.input_width, rows = m->out->rows;
    pk_status status = pk__walk_begin(m->context, &m->walk, m->all); /* m->mean is of the gradients alone */
    if (!status)
        status = pk_replay_weights(m->context, &m->replay, 0, m->next);
    for (size_t s = 0; s < run->steps && !status; s++) {
        size_t terms = 0;
        status = pk__progress(m->context, "smoother", (double)s / (double)run->steps);
        memcpy(m->w, m->next, P * sizeof *m->w);
        if (!status)
            status = pk_replay_weights(m->context, &m->replay, s + 1, m->next);
        if (!status)
            status = pk__smooth_look(m, s, m->w);
        if (!status)
            status = pk__smooth_batch(m, s, &terms);
        if (!status)
            status = pk__walk_step(m->context, &m->walk, s, m->w);
        if (status)
            return status;
        pk__smooth_form(m, terms);
        for (size_t first = 0; first < rows && !status; first += m->phi.rows) {
            const size_t count = pk__min(m->phi.rows, rows - first);
            status = pk__smooth_integral(m, pk_matrix_view(m->inputs + first * D, count, D));
            if (!status)
                pk__smooth_rows(m, first, count, terms);
        }
    }
    return status ? status : pk__smooth_look(m, run->steps, m->next);
}

/* Splits the table, and judges. */
static pk_status pk__smooth_finish(pk__smooth *m, double tolerance)
{
    pk_smoother *out = m->out;
    const size_t cells = out->rows * out->outputs, targets = m->columns - 1;
    for (size_t i = 0; i < cells; i++) {
        memcpy(out->matrix + i * targets, m->table + i * m->columns, targets * sizeof *out->matrix);
        out->constant[i] = m->table[i * m->columns + targets];
        out->unattributed = fmax(out->unattributed, fabs(m->unattributed[i]));
    }
    out->residual /= fmax(1, m->scale);
    out->unattributed /= fmax(1, m->scale);
    out->points = m->phi.points;
    out->refused = m->phi.refused;
    int coarse = 1; /* float32 numbers */
    for (size_t p = 0; p < m->run->parameters; p++)
        coarse &= m->next[p] == (pk_real)(float)m->next[p];
    const double limit =
        fmax(PK_UNATTRIBUTED_LEAST, PK_UNATTRIBUTED_EPSILONS * (coarse ? 1.1920929e-7 : 2.220446049250313e-16) *
                                        sqrt((double)pk__max(out->steps, 1)));
    if (!m->first_order && !(out->residual <= tolerance))
        return pk__fail(
            m->context, PK_NOT_CLOSED,
            "smoother: row %zu, output %zu misses the network by %.3g of the largest output at step "
            "%zu; the tolerance is %.3g",
            out->worst_row, out->worst_output, out->residual, out->worst_step, tolerance);
    if (!(out->unattributed <= limit))
        return pk__fail(
            m->context, PK_UNATTRIBUTED,
            "smoother: steps that differ from the declared training account for %.3g of the outputs, "
            "more than the %.3g that rounding explains",
            out->unattributed, limit);
    return PK_OK;
}

/* The results: one piece of memory that begins with the matrix, which is never empty. */
static pk_status pk__smooth_results(pk_context *context, pk_smoother *out)
{
    const size_t real = sizeof(double);
    size_t cells = 0, targets = 0;
    pk_status status;
    pk__arena arena = {NULL, 0, 0,
                       !pk__multiply(out->rows, out->outputs, &cells) ||
                           !pk__multiply(out->examples, out->outputs * real, &targets)};
    do {
        out->matrix = pk__arena_take(&arena, cells, targets);
        out->constant = pk__arena_take(&arena, cells, real);
        out->targets = pk__arena_take(&arena, targets, 1);
        out->predictions = pk__arena_take(&arena, cells, (out->steps + 1) * real);
        out->effective = pk__arena_take(&arena, out->steps + 1, 2 * real);
    } while (pk__arena_again(context, &arena, "the smoother's results", &status));
    return status;
}

/* The targets and the rows of both kinds. */
static void pk__smooth_data(pk__smooth *m, pk_matrix inputs)
{
    const pk_run *run = m->run;
    const size_t N = run->examples, D = run->graph.input_width, C = run->outputs;
    for (size_t i = 0; i < N; i++) {
        const int64_t item = (int64_t)i;
        pk_dataset_inputs(&run->train, &item, 1, m->inputs + i * D);
        pk_criterion_targets(&run->criterion, &run->train, &item, 1, C, m->f);
        for (size_t c = 0; c < C; c++)
            m->out->targets[i * C + c] = m->f[c];
    }
    for (size_t i = 0; i < inputs.rows; i++)
        memcpy(m->inputs + (N + i) * D, inputs.data + i * inputs.ld, D * sizeof *m->inputs);
}

PK_API void pk_smoother_release(pk_context *context, pk_smoother *smoother)
{
    pk_release(context, smoother->matrix);
    memset(smoother, 0, sizeof *smoother);
}

PK_API pk_status pk_smooth(pk_context *context, const pk_run *run, pk_matrix inputs,
                           const pk_smoother_options *options, pk_smoother *out)
{
    if (out)
        memset(out, 0, sizeof *out);
    if (!run || !run->weights.data || !out)
        return pk__fail(context, PK_ARGUMENT, "smoother: the run or the place for the result is missing");
    if (run->loss != PK_SQUARED && run->loss != PK_MEAN_SQUARED)
        return pk__fail(
            context, PK_UNSUPPORTED,
            "smoother: the gradients of the loss %s are not linear in the targets; those of squared "
            "and mean_squared are",
            pk_loss_name(run->loss));
    if (run->graph.surrogate && !(options && options->first_order))
        return pk__fail(context, PK_UNSUPPORTED,
                        "smoother: the network has an operation with a surrogate for a derivative, so that no "
                        "integral of gradients is a change of its outputs");
    if (options && !(options->tolerance >= 0 && options->tolerance < INFINITY))
        return pk__fail(context, PK_ARGUMENT, "smoother: the tolerance is %g", options->tolerance);
    if (!inputs.data)
        inputs.rows = 0, inputs.cols = inputs.ld = run->graph.input_width;
    pk_status status =
        pk__sweep_matrix(context, "smoother", "inputs", inputs, inputs.rows, run->graph.input_width);
    if (status)
        return status;
    const double start = pk__seconds();
    pk__smooth m;
    pk__arena arena = {NULL, 0, 0, 0};
    memset(&m, 0, sizeof m);
    m.context = context, m.run = run, m.out = out;
    m.first_order = options && options->first_order;
    m.kappa = run->loss == PK_SQUARED ? 1 : 2 / (double)run->outputs;
    out->examples = run->examples, out->outputs = run->outputs, out->steps = run->steps;
    out->rows = run->examples + inputs.rows;
    status = pk__smooth_results(context, out);
    if (!status)
        status = pk__step_integral_begin(context, &run->graph, 0, &m.phi);
    if (!status) {
        do
            pk__smooth_take(&arena, &m);
        while (pk__arena_again(context, &arena, "the smoother", &status));
    }
    if (!status)
        status = pk_replay_prepare(context, run, 0, &m.replay);
    for (size_t r = 0; r < inputs.rows && !status && run->graph.checked; r++)
        status = pk_graph_check_inputs(context, &run->graph, r, inputs.data + r * inputs.ld);
    if (!status) {
        pk__smooth_data(&m, inputs);
        status = pk__smooth_run(&m);
        if (!status)
            status = pk__smooth_finish(&m, options && options->tolerance > 0  ? options->tolerance
                                           : sizeof(pk_real) == sizeof(float) ? 1e-3
                                                                              : 1e-10);
    }
    pk__step_integral_end(&m.phi);
    pk_replay_release(context, &m.replay);
    pk_release(context, arena.base);
    if (status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED)
        pk_smoother_release(context, out);
    else
        out->seconds = pk__seconds() - start;
    return status;
}

PK_API double pk_effective_parameters(const pk_smoother *smoother, size_t count, const size_t *rows)
{
    const size_t C = smoother->outputs, targets = smoother->examples * C;
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < C * targets; k++) {
            const double value = smoother->matrix[rows[i] * C * targets + k];
            sum += value * value;
        }
    return count ? sum * (double)smoother->examples / (double)count : 0;
}

PK__END_CODE
/* <<< implementation */
#endif
