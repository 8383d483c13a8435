/* pathkernel/training/derivatives.h: derivatives of a network, batched: products with its Jacobian from either side, the Jacobian
 * itself, gradients example by example, and products with the Hessian and the Gauss-Newton matrix of an objective.
 *
 *     f(w, x)   the network: P weights, D inputs, C outputs
 *     J = df/dw (C x P),  K = df/dx (C x D), one of each for every row of inputs
 *
 * They are exact derivatives (no differences), for networks from a text and for those built node by node, also with
 * operations of the user's own. At a kink the derivative is PyTorch's; an operation of the kind PK_SURROGATE gives its surrogate.
 * Batches are cut into blocks of rows by shapes only, and sums are added in order: the same bits for any number of
 * threads. Each call allocates: one tape of a block for each thread.
 */
#ifndef PATHKERNEL_DERIVATIVES_H
#define PATHKERNEL_DERIVATIVES_H
#include "gradient.h"

/* >>> declarations */
PK__BEGIN_C

/* For all functions here: inputs are rows x D. A result must not overlap an argument or another result. A matrix whose data
 * are NULL is not computed (a result) or zero (a direction).
 * PK_ARGUMENT (also for data that an operation does not accept), PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT:
 * results are untouched. PK_UNSUPPORTED, too: a derivative with respect to inputs that are tokens does not exist.
 * PK_NOT_FINITE: a result is not finite; the message names the first such row, and the results have it. */

/* The reverse product. With a cotangent u_r (C) for each row r:
 *     weight_gradients (rows x P), row r:  J(x_r)^T u_r        input_gradients (rows x D), row r:  K(x_r)^T u_r
 * With the gradient of a loss as u_r (pk_loss_gradient) these are the gradients of that loss.
 * Cost: about 4 P flops a row, 2 P more for weight_gradients. */
PK_API PK__MUST_USE pk_status pk_vjp(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix inputs, pk_matrix cotangents, pk_matrix weight_gradients,
                                     pk_matrix input_gradients);
/* gradient (P) = sum_r J(x_r)^T u_r, without the rows. Cost: about 6 P flops a row. */
PK_API PK__MUST_USE pk_status pk_vjp_sum(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                         pk_matrix inputs, pk_matrix cotangents, pk_real *gradient);
/* The forward product: tangents (rows x C), row r: J(x_r) v + K(x_r) z_r. v: P numbers or NULL; input_directions: rows
 * x D, row r is z_r. Cost: about 6 P flops a row. */
PK_API PK__MUST_USE pk_status pk_jvp(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix inputs, const pk_real *weight_direction,
                                     pk_matrix input_directions, pk_matrix tangents);
/* weight_jacobian (rows C x P): row r C + c is the gradient of output c for inputs r; input_jacobian (rows C x D)
 * likewise. Cost: a forward pass, and C times that of pk_vjp backwards. */
PK_API PK__MUST_USE pk_status pk_jacobian(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                          pk_matrix inputs, pk_matrix weight_jacobian,
                                          pk_matrix input_jacobian);

/* For each example b of a batch, whose weights c_b do not matter here: losses (count, may be NULL)
 * l_b = l(f(w, x_b), y_b), and gradients (count x P), row b: grad_w l_b. The dataset has passed pk_loss_check. */
PK_API PK__MUST_USE pk_status pk_loss_gradients(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                const pk_real *weights, const pk_dataset *dataset,
                                                const pk_batch *batch, double *losses, pk_matrix gradients);
/* The same of a loss with options, here and below; the dataset has passed pk_criterion_check. */
PK_API PK__MUST_USE pk_status pk_loss_gradients_with(pk_context *context, const pk_graph *graph,
                                                     const pk_criterion *criterion, const pk_real *weights,
                                                     const pk_dataset *dataset, const pk_batch *batch,
                                                     double *losses, pk_matrix gradients);

/* product (P) = H v with the Hessian H = d2L / dw2 of L = sum_b c_b l(f(w, x_b), y_b), as in pk_batch_gradient: forward
 * over reverse (Pearlmutter 1994), exact between kinks. Cost: about 14 P flops an example.
 * PK_UNSUPPORTED names an operation that has no second derivative here: a surrogate, a smooth one without a curvature
 * rule, or one whose weights do not enter it linearly, or together with a nonlinear function of its inputs. */
PK_API PK__MUST_USE pk_status pk_hessian_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                 const pk_real *weights, const pk_dataset *dataset,
                                                 const pk_batch *batch, const pk_real *direction,
                                                 pk_real *product);
PK_API PK__MUST_USE pk_status pk_hessian_product_with(pk_context *context, const pk_graph *graph,
                                                      const pk_criterion *criterion, const pk_real *weights,
                                                      const pk_dataset *dataset, const pk_batch *batch,
                                                      const pk_real *direction, pk_real *product);
/* product (P) = G v with the Gauss-Newton matrix G = sum_b c_b J_b^T (d2l/df2)_b J_b (Schraudolph 2002), which is H
 * without the curvature of the network; for every operation. Cost: about 10 P flops an example. */
PK_API PK__MUST_USE pk_status pk_gauss_newton_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                      const pk_real *weights, const pk_dataset *dataset,
                                                      const pk_batch *batch, const pk_real *direction,
                                                      pk_real *product);
PK_API PK__MUST_USE pk_status pk_gauss_newton_product_with(pk_context *context, const pk_graph *graph,
                                                           const pk_criterion *criterion,
                                                           const pk_real *weights, const pk_dataset *dataset,
                                                           const pk_batch *batch, const pk_real *direction,
                                                           pk_real *product);

/* Second derivatives of the outputs themselves, along a direction (v, z_r) of weights and inputs together: with the scalar
 * s_r(w, x) = u_r . f(w, x), u_r row r of the cotangents,
 *     weight_products (rows x P), row r:  d/de grad_w s_r(w + e v, x_r + e z_r)
 *     input_products (rows x D), row r:   d/de grad_x s_r(w + e v, x_r + e z_r)          at e = 0.
 * So with z = 0 the input products are d/dx <u_r, J(w, x_r) v>, and with v = 0 the weight products are how grad_w s_r moves with
 * x: both are the mixed derivative. weight_direction: P numbers or NULL, zero; input_directions: rows x D, or zero.
 * Forward over reverse, exact between kinks. Cost: about 14 P flops a row. PK_UNSUPPORTED as pk_hessian_product, and for
 * inputs that are tokens where directions or products of the inputs are wanted. */
PK_API PK__MUST_USE pk_status pk_mixed_product(pk_context *context, const pk_graph *graph,
                                               const pk_real *weights, pk_matrix inputs, pk_matrix cotangents,
                                               const pk_real *weight_direction, pk_matrix input_directions,
                                               pk_matrix weight_products, pk_matrix input_products);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DERIVATIVES_IMPLEMENTED)
#define PATHKERNEL_DERIVATIVES_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- a pass over a batch ------------------------------------------------------------------------------- */

/* One thread's memory. */
typedef struct pk__sweep_lane {
    pk__tape tape;
    pk_real *inputs, *target; /* block x D, C */
    pk_real **second;         /* by node: the tangent of its cotangent, rows x width */
    pk_real *untied;          /* with ties: the gradient of a row, of each use of a tensor */
    pk_real *zeros;           /* block x the widest input of a layer */
    pk_real *part;            /* 2 x the largest number of weights of a layer */
} pk__sweep_lane;

typedef struct pk__sweep {
    const char *name; /* for messages */
    const pk_graph *graph;
    const pk_real *weights, *direction;
    pk_matrix inputs; /* or: */
    const pk_dataset *dataset;
    const pk_batch *batch;
    const pk__loss_rule *rule;
    const pk_criterion *criterion;
    size_t rows, copies; /* cotangents a row; 0: no reverse */
    int tangents, second;
    /* Computes the rows from `first` on, whose inputs are in the lane, and adds to sum if there is one. Returns the first with a
     * result that is not finite, or SIZE_MAX. */
    size_t (*block)(const struct pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                    pk_real *sum);
    pk_matrix cotangents, input_directions;
    pk_matrix of_weights, of_inputs, tangents_out;
    double *losses;
    pk_real *sum; /* P, NULL: none */
} pk__sweep;

static void pk__sweep_take(pk__arena *arena, const pk__sweep *sweep, size_t rows, pk__sweep_lane *lane)
{
    const pk_graph *graph = sweep->graph;
    size_t widest = 0, most = 0;
    memset(lane, 0, sizeof *lane);
    pk__pass_take(arena, graph, rows, sweep->copies, sweep->tangents, &lane->tape);
    lane->inputs = pk__arena_take(arena, rows, graph->input_width * sizeof(pk_real));
    lane->target = pk__arena_take(arena, graph->output_width, sizeof(pk_real));
    lane->untied = graph->tied && sweep->of_weights.data
                       ? pk__arena_take(arena, graph->untied, sizeof *lane->untied)
                       : NULL;
    if (!sweep->second)
        return;
    lane->second = pk__arena_take(arena, graph->node_count, sizeof *lane->second);
    for (size_t n = 0; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        pk_real *second = node->varies ? pk__arena_take(arena, rows, node->width * sizeof(pk_real)) : NULL;
        if (lane->second && !arena->overflow)
            lane->second[n] = second;
        if (!node->weight_count)
            continue;
        most = pk__max(most, node->weight_count);
        for (int j = 0; j < node->input_count; j++)
            widest = pk__max(widest, graph->nodes[node->inputs[j]].width);
    }
    lane->zeros = pk__arena_take(arena, rows, widest * sizeof(pk_real));
    lane->part = pk__arena_take(arena, most, 2 * sizeof(pk_real));
    if (lane->zeros && !arena->overflow)
        memset(lane->zeros, 0, rows * widest * sizeof(pk_real));
}

static void pk__sweep_inputs(const pk__sweep *sweep, size_t first, size_t rows, pk_real *to)
{
    const size_t width = sweep->graph->input_width;
    if (sweep->dataset)
        pk_dataset_inputs(sweep->dataset, sweep->batch->items + first, rows, to);
    else
        for (size_t r = 0; r < rows; r++)
            memcpy(to + r * width, sweep->inputs.data + (first + r) * sweep->inputs.ld, width * sizeof *to);
}

/* Computes a group of blocks, one task of a thread, with a sum of its own. Returns the first row with a result that is not
 * finite, or SIZE_MAX. */
static size_t pk__sweep_group(const pk__sweep *sweep, const pk__gradient_plan *plan, size_t group,
                              pk__sweep_lane *lane, pk_real *sum)
{
    size_t first = plan->blocks * group / plan->groups * plan->block, bad = SIZE_MAX;
    const size_t end = pk__min(plan->blocks * (group + 1) / plan->groups * plan->block, sweep->rows);
    if (sum)
        memset(sum, 0, sweep->graph->untied * sizeof *sum);
    for (; first < end; first += plan->block) {
        const size_t rows = pk__min(end - first, plan->block);
        pk__sweep_inputs(sweep, first, rows, lane->inputs);
        const size_t found = sweep->block(sweep, lane, first, rows, sum);
        bad = bad == SIZE_MAX ? found : bad;
    }
    return bad;
}

/* What the threads of a sweep share, and the lane of each. */
typedef struct pk__sweep_memory {
    pk__sweep_lane *lanes;
    size_t *bad;      /* of each group: what pk__sweep_group returned */
    pk_real *partial; /* the sums of all groups but the first, which writes to the result */
} pk__sweep_memory;

static void pk__sweep_memory_take(pk__arena *arena, const pk__sweep *sweep, const pk__gradient_plan *plan,
                                  size_t threads, pk__sweep_memory *memory)
{
    const size_t sum = sweep->graph->untied * sizeof *memory->partial;
    memory->lanes = pk__arena_take(arena, threads, sizeof *memory->lanes);
    memory->bad = pk__arena_take(arena, plan->groups, sizeof *memory->bad);
    memory->partial = pk__arena_take(arena, sweep->sum ? plan->groups - 1 : 0, sum);
    for (size_t thread = 0; thread < threads; thread++) {
        pk__sweep_lane measured;
        pk__sweep_take(arena, sweep, pk__min(plan->block, sweep->rows),
                       memory->lanes ? &memory->lanes[thread] : &measured);
    }
}

/* Checks the rows, allocates and computes all blocks; weights and sum have the layout of the untied weights. */
static pk_status pk__sweep_untied(pk_context *context, const pk__sweep *sweep)
{
    const pk_graph *graph = sweep->graph;
    const size_t parameters = graph->untied;
    pk__gradient_plan plan = pk__gradient_cut(parameters, sweep->rows);
    if (!sweep->sum) {
        plan.block = sweep->copies > 1 ? pk__max(64 / sweep->copies, 1) : 64;
        plan.groups = plan.blocks = pk__blocks(sweep->rows, plan.block);
    }
    if (!sweep->rows) {
        if (sweep->sum)
            memset(sweep->sum, 0, parameters * sizeof *sweep->sum);
        return PK_OK;
    }
    const double copies = (double)pk__max(sweep->copies, 1);
    const double work = 6.0 * pk__graph_work(graph) * (double)sweep->rows * copies / 1048576.0;
    size_t threads = pk__min((size_t)pk_threads(context), plan.groups);
    threads = (double)threads <= work ? threads : work < 1 ? 1 : (size_t)work;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__sweep_memory memory;
    pk_status status;
    do
        pk__sweep_memory_take(&arena, sweep, &plan, threads, &memory);
    while (pk__arena_again(context, &arena, sweep->name, &status));
    for (size_t r = 0; !status && graph->checked && r < sweep->rows; r++) {
        pk__sweep_inputs(sweep, r, 1, memory.lanes->inputs);
        status = pk_graph_check_inputs(context, graph, r, memory.lanes->inputs);
    }
    if (!status) {
        const int workers = (int)threads;
        pk__team team = pk__team_of(context, workers, plan.groups);
        PK__PARALLEL(team)
        for (size_t group = pk__first_task(&team); group < plan.groups; group = pk__next_task(&team))
            memory.bad[group] =
                pk__sweep_group(sweep, &plan, group, &memory.lanes[pk__thread()],
                                group && sweep->sum ? memory.partial + (group - 1) * parameters : sweep->sum);
        pk__team_end(&team);
        const int finite = !sweep->sum || pk__gradient_reduce(context, sweep->sum, memory.partial, plan.groups,
                                                              parameters, workers);
        size_t group = 0;
        while (group < plan.groups && memory.bad[group] == SIZE_MAX)
            group++;
        if (group < plan.groups)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the result for row %zu is not finite", sweep->name,
                              memory.bad[group]);
        else if (!finite)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the sum over rows is not finite", sweep->name);
    }
    pk_release(context, arena.base);
    return status;
}

static pk_status pk__sweep_run(pk_context *context, const pk__sweep *sweep)
{
    const pk_graph *graph = sweep->graph;
    const size_t untied = graph->untied;
    if (!graph->tied)
        return pk__sweep_untied(context, sweep);
    pk__sweep own = *sweep;
    pk_real *weights, *direction;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        weights = pk__arena_take(&arena, untied, sizeof *weights);
        direction = pk__arena_take(&arena, sweep->direction ? untied : 0, sizeof *direction);
        own.sum = pk__arena_take(&arena, sweep->sum ? untied : 0, sizeof *own.sum);
    } while (pk__arena_again(context, &arena, sweep->name, &status));
    if (status)
        return status;
    pk_graph_untie(graph, sweep->weights, weights);
    if (direction)
        pk_graph_untie(graph, sweep->direction, direction);
    own.weights = weights;
    own.direction = direction;
    status = pk__sweep_untied(context, &own);
    if (sweep->sum && (!status || status == PK_NOT_FINITE)) {
        pk_graph_gather(graph, own.sum, own.sum);
        memcpy(sweep->sum, own.sum, graph->parameters * sizeof *own.sum);
    }
    pk_release(context, arena.base);
    return status;
}

/* ---- blocks -------------------------------------------------------------------------------------------- */

/* Sets row r of the seeds to the given cotangents, or to the gradient of the loss. */
static void pk__sweep_seed(const pk__sweep *sweep, pk__sweep_lane *lane, size_t row, const pk_real *f,
                           pk_real *seed)
{
    const size_t outputs = sweep->graph->output_width;
    if (sweep->rule) {
        pk__loss_target(sweep->criterion, &sweep->dataset->targets, (size_t)sweep->batch->items[row], outputs,
                        lane->target);
        const double value = sweep->rule->evaluate(sweep->criterion, outputs, f, lane->target, seed);
        if (sweep->losses)
            sweep->losses[row] = value;
    } else {
        memcpy(seed, sweep->cotangents.data + row * sweep->cotangents.ld, outputs * sizeof *seed);
    }
}

/* The gradients of one row and copy of the tape. */
static void pk__sweep_row_gradient(const pk__sweep *sweep, const pk__tape *tape, size_t row, size_t copy,
                                   pk_real *gradient)
{
    const pk_graph *graph = sweep->graph;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        pk_call call;
        pk__pass_call(tape, node, 1, 1, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += row * call.in_width[j];
        call.out += row * node->width;
        call.weights = sweep->weights + node->weight_offset;
        call.out_cotangent = tape->cotangent[n] + (row * tape->copies + copy) * node->width;
        call.gradient = gradient + node->weight_offset;
        pk__node_row_gradients(&call);
    }
}

/* Forward and reverse. */
static size_t pk__sweep_reverse(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const size_t outputs = graph->output_width, inputs = graph->input_width, copies = sweep->copies;
    const pk__line line = {sweep->weights, NULL, NULL};
    pk__tape *tape = &lane->tape;
    size_t bad = SIZE_MAX;
    const int units = !sweep->rule && !sweep->cotangents.data; /* a Jacobian */
    pk__pass_forward(tape, &line, rows, lane->inputs);
    if (units)
        pk__pass_seed_units(tape, rows);
    for (size_t r = 0; r < rows; r++) {
        const pk_real *f = pk__pass_output(tape) + r * outputs;
        if (!units)
            pk__sweep_seed(sweep, lane, first + r, f, pk__pass_seed(tape) + r * outputs);
        if (bad == SIZE_MAX && !pk__all_finite(f, outputs))
            bad = first + r;
    }
    pk__pass_reverse(tape, &line, rows, copies);
    if (sum)
        pk__pass_weight_gradient(tape, rows, sum);
    for (size_t at = 0; at < rows * copies; at++) {
        const size_t to = first * copies + at;
        int finite = 1;
        if (sweep->of_weights.data) {
            pk_real *gradient = sweep->of_weights.data + to * sweep->of_weights.ld;
            pk__sweep_row_gradient(sweep, tape, at / copies, at % copies,
                                   graph->tied ? lane->untied : gradient);
            if (graph->tied) {
                pk_graph_gather(graph, lane->untied, lane->untied);
                memcpy(gradient, lane->untied, graph->parameters * sizeof *gradient);
            }
            finite = pk__all_finite(gradient, graph->parameters);
        }
        if (sweep->of_inputs.data) {
            pk_real *gradient = sweep->of_inputs.data + to * sweep->of_inputs.ld;
            memcpy(gradient, tape->cotangent[0] + at * inputs, inputs * sizeof *gradient);
            finite &= pk__all_finite(gradient, inputs);
        }
        if (!finite)
            bad = pk__min(bad, first + at / copies);
    }
    return bad;
}

/* A forward pass with tangents along the directions; copies those of the outputs. */
static const pk_real *pk__sweep_push(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows)
{
    const size_t inputs = sweep->graph->input_width, last = sweep->graph->node_count - 1;
    const pk__line plain = {sweep->weights, NULL, NULL}, line = {sweep->weights, sweep->direction, NULL};
    pk__tape *tape = &lane->tape;
    pk__pass_forward(tape, &plain, rows, lane->inputs);
    for (size_t r = 0; tape->tangent[0] && r < rows; r++) {
        pk_real *to = tape->tangent[0] + r * inputs;
        if (sweep->input_directions.data)
            memcpy(to, sweep->input_directions.data + (first + r) * sweep->input_directions.ld,
                   inputs * sizeof *to);
        else
            memset(to, 0, inputs * sizeof *to);
    }
    pk__pass_tangent(tape, &line, rows);
    return tape->tangent[last];
}

static size_t pk__sweep_forward(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                pk_real *sum)
{
    const size_t outputs = sweep->graph->output_width;
    const pk_real *tangents = pk__sweep_push(sweep, lane, first, rows);
    size_t bad = SIZE_MAX;
    (void)sum;
    for (size_t r = 0; r < rows; r++) {
        memcpy(sweep->tangents_out.data + (first + r) * sweep->tangents_out.ld, tangents + r * outputs,
               outputs * sizeof *tangents);
        if (bad == SIZE_MAX && !pk__all_finite(tangents + r * outputs, outputs))
            bad = first + r;
    }
    return bad;
}

/* Reverse of what the first reverse did: with dots for tangents along the direction v,
 *     cotangent_in' = F_x(w)^T cotangent' + F_x(v)^T cotangent + (F_xx in')^T cotangent. */
static void pk__sweep_second_node(const pk__sweep *sweep, const pk__sweep_lane *lane, const pk_node *node,
                                  size_t rows)
{
    const pk_graph *graph = sweep->graph;
    const pk__tape *tape = &lane->tape;
    const size_t n = (size_t)(node - graph->nodes);
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = sweep->weights + node->weight_offset;
    call.out_cotangent = lane->second[n];
    for (int j = 0; j < node->input_count; j++) {
        if (!graph->nodes[node->inputs[j]].varies)
            continue;
        call.in_cotangent[j] = lane->second[node->inputs[j]];
        call.in_tangent[j] = tape->tangent[node->inputs[j]];
        call.accumulate[j] = node->shared[j];
    }
    node->operation->reverse(&call);
    for (int j = 0; j < node->input_count; j++)
        call.accumulate[j] = 1;
    call.out_cotangent = tape->cotangent[n];
    if (node->operation->smoothness == PK_SMOOTH || node->operation->smoothness == PK_MULTILINEAR)
        node->operation->curvature(&call);
    if (node->weight_count && sweep->direction) {
        call.weights = sweep->direction + node->weight_offset;
        node->operation->reverse(&call);
    }
}

/* sum += the tangent of a layer's gradient, of rows of the block from `first` on. The gradient is linear in the cotangent and
 * affine in the inputs: its part of degree 0 in these is taken off; of outer products that is the biases. */
static void pk__sweep_second_gradient(const pk__sweep *sweep, const pk__sweep_lane *lane, const pk_node *node,
                                      size_t first, size_t rows, pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const pk__tape *tape = &lane->tape;
    const int outer = node->tangent_form == PK_TANGENT_OUTER;
    const size_t n = (size_t)(node - graph->nodes), count = node->weight_count;
    pk_real *parts[2] = {lane->part, lane->part + count};
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    for (int j = 0; j < node->input_count; j++)
        call.in[j] += first * call.in_width[j];
    call.out += first * node->width;
    call.weights = sweep->weights + node->weight_offset;
    call.out_cotangent = lane->second[n] + first * node->width;
    call.gradient = sum + node->weight_offset;
    node->operation->weight_gradient(&call);
    if (node->input_constant)
        return;
    call.out_cotangent = tape->cotangent[n] + first * node->width;
    memset(lane->part, 0, 2 * count * sizeof *lane->part);
    for (int part = 0; part < 2 - outer; part++) {
        for (int j = 0; j < node->input_count; j++) {
            const size_t from = (size_t)node->inputs[j];
            call.in[j] = part || !graph->nodes[from].varies ? lane->zeros
                                                            : tape->tangent[from] + first * call.in_width[j];
        }
        call.gradient = parts[part];
        node->operation->weight_gradient(&call);
    }
    for (size_t i = 0; i < (outer ? node->fan_out * node->fan_in : count); i++)
        sum[node->weight_offset + i] += parts[0][i] - parts[1][i];
}

/* Hessian and Gauss-Newton products. */
static size_t pk__sweep_curvature(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                  pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const pk_batch *batch = sweep->batch;
    const size_t outputs = graph->output_width, last = graph->node_count - 1;
    const pk__line line = {sweep->weights, NULL, NULL};
    const pk_real *tangents = pk__sweep_push(sweep, lane, first, rows);
    pk__tape *tape = &lane->tape;
    pk_real *seeds = pk__pass_seed(tape), *bent = sweep->second ? lane->second[last] : seeds;
    size_t bad = SIZE_MAX;
    for (size_t at = 0; at < rows * outputs; at += outputs) {
        const size_t row = first + at / outputs;
        const pk_real *f = pk__pass_output(tape) + at;
        const double weight = batch->weights ? batch->weights[row] : 1.0 / (double)batch->count;
        pk__sweep_seed(sweep, lane, row, f, seeds + at);
        sweep->rule->curvature(sweep->criterion, outputs, f, lane->target, tangents + at, bent + at);
        for (size_t c = 0; c < outputs; c++) {
            bent[at + c] *= (pk_real)weight;
            if (sweep->second)
                seeds[at + c] *= (pk_real)weight;
        }
        if (bad == SIZE_MAX && !pk__all_finite(f, outputs))
            bad = row;
    }
    pk__pass_reverse(tape, &line, rows, 1);
    if (!sweep->second) {
        pk__pass_weight_gradient(tape, rows, sum);
        return bad;
    }
    for (size_t n = last; n > 0; n--) {
        const pk_node *node = &graph->nodes[n];
        if (node->unread && node->varies)
            memset(lane->second[n], 0, rows * node->width * sizeof(pk_real));
        if (!node->input_constant)
            pk__sweep_second_node(sweep, lane, node, rows);
        if (node->weight_count)
            pk__sweep_second_gradient(sweep, lane, node, 0, rows, sum);
    }
    return bad;
}

/* Products with the second derivatives of the outputs, row by row. */
static size_t pk__sweep_mixed(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                              pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const size_t outputs = graph->output_width, inputs = graph->input_width, last = graph->node_count - 1;
    const pk__line line = {sweep->weights, NULL, NULL};
    pk__tape *tape = &lane->tape;
    size_t bad = SIZE_MAX;
    (void)sum;
    (void)pk__sweep_push(sweep, lane, first, rows);
    for (size_t r = 0; r < rows; r++)
        pk__sweep_seed(sweep, lane, first + r, NULL, pk__pass_seed(tape) + r * outputs);
    pk__pass_reverse(tape, &line, rows, 1);
    memset(lane->second[last], 0, rows * outputs * sizeof(pk_real)); /* the seeds do not move */
    for (size_t n = 0; n < last; n++)
        if (graph->nodes[n].unread && graph->nodes[n].varies)
            memset(lane->second[n], 0, rows * graph->nodes[n].width * sizeof(pk_real));
    for (size_t n = last; n > 0; n--)
        if (!graph->nodes[n].input_constant)
            pk__sweep_second_node(sweep, lane, &graph->nodes[n], rows);
    for (size_t r = 0; r < rows; r++) {
        int finite = 1;
        if (sweep->of_weights.data) {
            pk_real *to = sweep->of_weights.data + (first + r) * sweep->of_weights.ld;
            pk_real *gradient = graph->tied ? lane->untied : to;
            memset(gradient, 0, graph->untied * sizeof *gradient);
            for (size_t n = 1; n < graph->node_count; n++)
                if (graph->nodes[n].weight_count)
                    pk__sweep_second_gradient(sweep, lane, &graph->nodes[n], r, 1, gradient);
            if (graph->tied) {
                pk_graph_gather(graph, lane->untied, lane->untied);
                memcpy(to, lane->untied, graph->parameters * sizeof *to);
            }
            finite = pk__all_finite(to, graph->parameters);
        }
        if (sweep->of_inputs.data) {
            pk_real *to = sweep->of_inputs.data + (first + r) * sweep->of_inputs.ld;
            memcpy(to, lane->second[0] + r * inputs, inputs * sizeof *to);
            finite &= pk__all_finite(to, inputs);
        }
        if (!finite)
            bad = pk__min(bad, first + r);
    }
    return bad;
}

/* ---- arguments ----------------------------------------------------------------------------------------- */

/* Whether the second reverse is right for every node: see pk_hessian_product. */
static pk_status pk__check_second(pk_context *context, const char *name, const pk_graph *graph)
{
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        const pk_operation *operation = node->operation;
        const char *why = NULL;
        if (node->weight_count && !operation->linear_in_weights)
            why = "is not linear in its weights";
        else if (node->input_constant)
            why = NULL;
        else if (operation->smoothness == PK_SURROGATE)
            why = "has a surrogate for a derivative";
        else if (node->weight_count && operation->smoothness != PK_LINEAR)
            why = "has weights and is not linear in its inputs";
        else if ((operation->smoothness == PK_SMOOTH || operation->smoothness == PK_MULTILINEAR) &&
                 !operation->curvature)
            why = "has no curvature rule";
        if (why)
            return pk__fail(context, PK_UNSUPPORTED, "%s: node %zu, %s, %s: no second derivatives", name, n,
                            operation->name, why);
    }
    return PK_OK;
}

/* Runs a sweep whose inputs vary as well where wanted, on a copy of the graph that says so. The copy shares the
 * original's constants. */
static pk_status pk__sweep_vary(pk_context *context, pk__sweep *sweep, int vary)
{
    const pk_graph *graph = sweep->graph;
    pk_graph copy = *graph;
    /* Also where no weight reaches the output: so it gets a cotangent. */
    if (!vary && graph->nodes[graph->node_count - 1].varies)
        return pk__sweep_run(context, sweep);
    for (size_t n = 1; vary && n < graph->node_count; n++)
        for (int j = 0; j < graph->nodes[n].input_count; j++)
            if (graph->nodes[n].inputs[j] == 0 && graph->nodes[n].operation->check)
                return pk__fail(context, PK_UNSUPPORTED,
                                "%s: %s takes whole numbers, so the network has no derivative with respect to "
                                "its inputs",
                                sweep->name, graph->nodes[n].operation->name);
    pk_status status = pk_allocate(context, copy.node_count, sizeof *copy.nodes, sweep->name, &copy.nodes);
    if (status)
        return status;
    memcpy(copy.nodes, graph->nodes, copy.node_count * sizeof *copy.nodes);
    copy.nodes[0].varies = 1;
    for (size_t n = 1; n < copy.node_count; n++)
        pk__node_analyse(&copy, &copy.nodes[n]);
    pk__graph_analyse(&copy);
    sweep->graph = &copy;
    if (sweep->second)
        status = pk__check_second(context, sweep->name, &copy);
    if (!status)
        status = pk__sweep_run(context, sweep);
    sweep->graph = graph;
    pk_release(context, copy.nodes);
    return status;
}

static pk_status pk__sweep_graph(pk_context *context, const char *name, const pk_graph *graph,
                                 const pk_real *weights)
{
    if (graph && graph->node_count > 1 && (weights || !graph->parameters))
        return PK_OK;
    return pk__fail(context, PK_ARGUMENT, "%s: %s", name,
                    graph && graph->node_count > 1 ? "the weights are NULL" : "there is no network");
}

/* Whether a matrix is rows x cols. */
static pk_status pk__sweep_matrix(pk_context *context, const char *name, const char *what, pk_matrix matrix,
                                  size_t rows, size_t cols)
{
    if (matrix.rows != rows || matrix.cols != cols || matrix.ld < cols)
        return pk__fail(context, PK_SHAPE, "%s: the %s are %zu x %zu (ld %zu), not %zu x %zu", name, what,
                        matrix.rows, matrix.cols, matrix.ld, rows, cols);
    if (rows && cols && !matrix.data)
        return pk__fail(context, PK_ARGUMENT, "%s: the %s are NULL", name, what);
    return PK_OK;
}

/* Checks the arguments of a sweep over inputs and sets them; its other fields are zero. */
static pk_status pk__sweep_begin(pk_context *context, const char *name, const pk_graph *graph,
                                 const pk_real *weights, pk_matrix inputs, pk__sweep *sweep)
{
    memset(sweep, 0, sizeof *sweep);
    sweep->name = name;
    sweep->graph = graph;
    sweep->weights = weights;
    sweep->inputs = inputs;
    pk_status status = pk__sweep_graph(context, name, graph, weights);
    return status ? status : pk__sweep_matrix(context, name, "inputs", inputs, inputs.rows, graph->input_width);
}

/* Checks that no result overlaps an argument or another result. */
static pk_status pk__sweep_results(pk_context *context, const char *name, size_t count, const pk_matrix *read,
                                   size_t results, const pk_matrix *written)
{
    for (size_t i = 0; i < results; i++)
        for (size_t k = 0; written[i].data && k < count + i; k++) {
            const pk_matrix other = k < count ? read[k] : written[k - count];
            if (other.data && pk__matrices_overlap(written[i], other))
                return pk__fail(context, PK_ARGUMENT, "%s: a result overlaps what is read, or another result",
                                name);
        }
    return PK_OK;
}

static pk_matrix pk__as_row(const pk_real *data, size_t count)
{
    return pk_matrix_view((pk_real *)data, 1, count); /* only to be compared, or read */
}

/* The reverse products and the Jacobian. */
static pk_status pk__sweep_pull(pk_context *context, pk__sweep *sweep, const char *of_weights,
                                const char *of_inputs)
{
    const pk_graph *graph = sweep->graph;
    const size_t rows = sweep->inputs.rows, outputs = graph->output_width;
    size_t all = 0;
    if (!pk__multiply(rows, sweep->copies, &all))
        return pk__fail(context, PK_OVERFLOW, "%s: %zu rows of %zu outputs overflow", sweep->name, rows,
                        outputs);
    pk_status status = PK_OK;
    if (sweep->of_weights.data)
        status = pk__sweep_matrix(context, sweep->name, of_weights, sweep->of_weights, all, graph->parameters);
    if (!status && sweep->of_inputs.data)
        status = pk__sweep_matrix(context, sweep->name, of_inputs, sweep->of_inputs, all, graph->input_width);
    const pk_matrix read[3] = {sweep->inputs, sweep->cotangents, pk__as_row(sweep->weights, graph->parameters)},
                    written[3] = {sweep->of_weights, sweep->of_inputs,
                                  pk__as_row(sweep->sum, graph->parameters)};
    if (!status)
        status = pk__sweep_results(context, sweep->name, 3, read, 3, written);
    if (status || (!sweep->of_weights.data && !sweep->of_inputs.data && !sweep->sum))
        return status;
    sweep->rows = rows;
    sweep->block = pk__sweep_reverse;
    return pk__sweep_vary(context, sweep, sweep->of_inputs.data != NULL);
}

PK_API pk_status pk_vjp(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix inputs,
                        pk_matrix cotangents, pk_matrix weight_gradients, pk_matrix input_gradients)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "vjp", graph, weights, inputs, &sweep);
    if (!status)
        status = pk__sweep_matrix(context, "vjp", "cotangents", cotangents, inputs.rows, graph->output_width);
    if (status)
        return status;
    sweep.cotangents = cotangents;
    sweep.copies = 1;
    sweep.of_weights = weight_gradients;
    sweep.of_inputs = input_gradients;
    return pk__sweep_pull(context, &sweep, "gradients for the weights", "gradients for the inputs");
}

PK_API pk_status pk_vjp_sum(pk_context *context, const pk_graph *graph, const pk_real *weights,
                            pk_matrix inputs, pk_matrix cotangents, pk_real *gradient)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "vjp", graph, weights, inputs, &sweep);
    if (!status)
        status = pk__sweep_matrix(context, "vjp", "cotangents", cotangents, inputs.rows, graph->output_width);
    if (!status && graph->parameters && !gradient)
        status = pk__fail(context, PK_ARGUMENT, "vjp: the place for the gradient is NULL");
    if (status)
        return status;
    sweep.cotangents = cotangents;
    sweep.copies = 1;
    sweep.sum = gradient;
    return pk__sweep_pull(context, &sweep, "", "");
}

PK_API pk_status pk_jacobian(pk_context *context, const pk_graph *graph, const pk_real *weights,
                             pk_matrix inputs, pk_matrix weight_jacobian, pk_matrix input_jacobian)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "jacobian", graph, weights, inputs, &sweep);
    if (status)
        return status;
    sweep.copies = graph->output_width;
    sweep.of_weights = weight_jacobian;
    sweep.of_inputs = input_jacobian;
    return pk__sweep_pull(context, &sweep, "derivatives for the weights", "derivatives for the inputs");
}

PK_API pk_status pk_jvp(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix inputs,
                        const pk_real *weight_direction, pk_matrix input_directions, pk_matrix tangents)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "jvp", graph, weights, inputs, &sweep);
    if (!status && input_directions.data)
        status = pk__sweep_matrix(context, "jvp", "directions of the inputs", input_directions, inputs.rows,
                                  graph->input_width);
    if (!status)
        status = pk__sweep_matrix(context, "jvp", "tangents", tangents, inputs.rows, graph->output_width);
    if (status)
        return status;
    const pk_matrix read[4] = {inputs, input_directions, pk__as_row(weights, graph->parameters),
                               pk__as_row(weight_direction, graph->parameters)};
    status = pk__sweep_results(context, "jvp", 4, read, 1, &tangents);
    if (status)
        return status;
    sweep.name = "jvp";
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.direction = weight_direction;
    sweep.inputs = inputs;
    sweep.input_directions = input_directions;
    sweep.tangents_out = tangents;
    sweep.tangents = 1;
    sweep.rows = inputs.rows;
    sweep.block = pk__sweep_forward;
    return pk__sweep_vary(context, &sweep, input_directions.data != NULL);
}

PK_API pk_status pk_loss_gradients(pk_context *context, const pk_graph *graph, pk_loss loss,
                                   const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                   double *losses, pk_matrix gradients)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk_loss_gradients_with(context, graph, &criterion, weights, dataset, batch, losses, gradients);
}

PK_API pk_status pk_loss_gradients_with(pk_context *context, const pk_graph *graph,
                                        const pk_criterion *criterion, const pk_real *weights,
                                        const pk_dataset *dataset, const pk_batch *batch, double *losses,
                                        pk_matrix gradients)
{
    pk__sweep sweep;
    memset(&sweep, 0, sizeof sweep);
    sweep.name = "gradients";
    sweep.rule = criterion ? pk__loss_find(criterion->loss) : NULL;
    sweep.criterion = criterion;
    pk_status status = pk__sweep_graph(context, sweep.name, graph, weights);
    if (!status)
        status = pk__batch_arguments(context, sweep.name, graph, sweep.rule, dataset, batch);
    if (!status)
        status = pk__sweep_matrix(context, sweep.name, "gradients", gradients, batch->count, graph->parameters);
    const pk_matrix read = pk__as_row(weights, status ? 0 : graph->parameters);
    if (!status)
        status = pk__sweep_results(context, sweep.name, 1, &read, 1, &gradients);
    if (status)
        return status;
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.dataset = dataset;
    sweep.batch = batch;
    sweep.copies = 1;
    sweep.losses = losses;
    sweep.of_weights = gradients;
    sweep.rows = batch->count;
    sweep.block = pk__sweep_reverse;
    return pk__sweep_vary(context, &sweep, 0);
}

/* ---- second derivatives -------------------------------------------------------------------------------- */

static pk_status pk__curvature_product(pk_context *context, const char *name, const pk_graph *graph,
                                       const pk_criterion *criterion, const pk_real *weights,
                                       const pk_dataset *dataset, const pk_batch *batch,
                                       const pk_real *direction, int second, pk_real *product)
{
    pk__sweep sweep;
    memset(&sweep, 0, sizeof sweep);
    sweep.name = name;
    sweep.rule = criterion ? pk__loss_find(criterion->loss) : NULL;
    sweep.criterion = criterion;
    pk_status status = pk__sweep_graph(context, name, graph, weights);
    if (!status)
        status = pk__batch_arguments(context, name, graph, sweep.rule, dataset, batch);
    if (!status && graph->parameters && (!direction || !product))
        status = pk__fail(context, PK_ARGUMENT, "%s: the direction or the place for the product is NULL", name);
    if (status)
        return status;
    const pk_matrix read[2] = {pk__as_row(weights, graph->parameters),
                               pk__as_row(direction, graph->parameters)},
                    written = pk__as_row(product, graph->parameters);
    status = pk__sweep_results(context, name, 2, read, 1, &written);
    if (!status && second)
        status = pk__check_second(context, name, graph);
    if (status || !graph->parameters)
        return status;
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.direction = direction;
    sweep.dataset = dataset;
    sweep.batch = batch;
    sweep.copies = 1;
    sweep.tangents = 1;
    sweep.second = second;
    sweep.sum = product;
    sweep.rows = batch->count;
    sweep.block = pk__sweep_curvature;
    return pk__sweep_vary(context, &sweep, 0);
}

PK_API pk_status pk_hessian_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                    const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                    const pk_real *direction, pk_real *product)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk__curvature_product(context, "hessian", graph, &criterion, weights, dataset, batch, direction, 1,
                                 product);
}

PK_API pk_status pk_hessian_product_with(pk_context *context, const pk_graph *graph,
                                         const pk_criterion *criterion, const pk_real *weights,
                                         const pk_dataset *dataset, const pk_batch *batch,
                                         const pk_real *direction, pk_real *product)
{
    return pk__curvature_product(context, "hessian", graph, criterion, weights, dataset, batch, direction, 1,
                                 product);
}

PK_API pk_status pk_gauss_newton_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                         const pk_real *weights, const pk_dataset *dataset,
                                         const pk_batch *batch, const pk_real *direction, pk_real *product)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk__curvature_product(context, "gauss_newton", graph, &criterion, weights, dataset, batch, direction,
                                 0, product);
}

PK_API pk_status pk_gauss_newton_product_with(pk_context *context, const pk_graph *graph,
                                              const pk_criterion *criterion, const pk_real *weights,
                                              const pk_dataset *dataset, const pk_batch *batch,
                                              const pk_real *direction, pk_real *product)
{
    return pk__curvature_product(context, "gauss_newton", graph, criterion, weights, dataset, batch, direction,
                                 0, product);
}

PK_API pk_status pk_mixed_product(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                  pk_matrix inputs, pk_matrix cotangents, const pk_real *weight_direction,
                                  pk_matrix input_directions, pk_matrix weight_products,
                                  pk_matrix input_products)
{
    static const char name[] = "mixed product";
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, name, graph, weights, inputs, &sweep);
    if (!status)
        status = pk__sweep_matrix(context, name, "cotangents", cotangents, inputs.rows, graph->output_width);
    if (!status && input_directions.data)
        status = pk__sweep_matrix(context, name, "directions of the inputs", input_directions, inputs.rows,
                                  graph->input_width);
    if (!status && weight_products.data)
        status = pk__sweep_matrix(context, name, "products for the weights", weight_products, inputs.rows,
                                  graph->parameters);
    if (!status && input_products.data)
        status = pk__sweep_matrix(context, name, "products for the inputs", input_products, inputs.rows,
                                  graph->input_width);
    if (status)
        return status;
    const pk_matrix read[5] = {inputs, cotangents, input_directions, pk__as_row(weights, graph->parameters),
                               pk__as_row(weight_direction, graph->parameters)},
                    written[2] = {weight_products, input_products};
    status = pk__sweep_results(context, name, 5, read, 2, written);
    const int vary = input_directions.data || input_products.data;
    if (!status && !vary)
        status = pk__check_second(context, name, graph);
    if (status || (!weight_products.data && !input_products.data))
        return status;
    sweep.direction = weight_direction;
    sweep.cotangents = cotangents;
    sweep.input_directions = input_directions;
    sweep.of_weights = weight_products;
    sweep.of_inputs = input_products;
    sweep.copies = 1;
    sweep.tangents = 1;
    sweep.second = 1;
    sweep.rows = inputs.rows;
    sweep.block = pk__sweep_mixed;
    return pk__sweep_vary(context, &sweep, vary);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
