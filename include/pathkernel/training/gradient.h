/* pathkernel/training/gradient.h: the objective of a weighted batch and its gradient.
 *
 * 1. The batch is cut into blocks of rows, and these into groups, by shapes alone. A thread takes a group at a time: each block
 *    goes forward, its losses are the seed of the reverse pass, and the group's gradients add up in one place.
 * 2. The gradients of the groups are added in order, so that the bits do not depend on the number of threads.
 * More threads than groups share the operations of a block instead.
 */
#ifndef PATHKERNEL_GRADIENT_H
#define PATHKERNEL_GRADIENT_H
#include "../network/pass.h"
#include "loss.h"

/* >>> declarations */
PK__BEGIN_C

/* The examples of one step: count rows of a dataset; a row may repeat. */
typedef struct pk_batch {
    size_t count;
    const int64_t *items;
    const double *weights; /* c_b; NULL: 1 / count each */
} pk_batch;

struct pk__gradient_lane;
struct pk__gradient_group;

/* Memory for pk_batch_gradient; zeroed = none. The graph must outlive it. */
typedef struct pk_gradient_workspace {
    const pk_graph *graph;
    size_t largest_batch; /* examples */
    /* Private: */
    int threads;
    struct pk__gradient_lane *lanes;   /* threads: a tape and the rows of one block */
    struct pk__gradient_group *groups; /* one result a group */
    pk_real *partial;                  /* (groups - 1) x P */
    pk_real *untied;                   /* with ties: weights and gradient in the layout of the untied weights */
    void *memory;
} pk_gradient_workspace;

/* Takes the memory for batches of up to largest_batch examples with the threads of the context: about 64
 * rows of activations and cotangents a thread, and for large batches partial gradients (at most 32, and
 * no more than 2^22 numbers where P < 2^21). PK_ARGUMENT, or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph,
                                                  size_t largest_batch, pk_gradient_workspace *workspace);
PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace);

/* L = sum_b c_b l(f(w, x_items[b]), y_items[b]) and its gradient with respect to w.
 * weights, gradient: graph->parameters numbers, gradient is overwritten and overlaps nothing; objective may
 * be NULL. An empty batch gives 0. The dataset has passed pk_loss_check.
 * Cost: about 6 P flops an example; no allocation; batches of little work start no threads. The batch is
 * cut into blocks and these into groups by shapes only, groups are added in order: the same bits for any
 * number of threads.
 * PK_ARGUMENT (also for an item out of range), PK_SHAPE: nothing is written. PK_NOT_FINITE: an output (the
 * message names its position in the batch), the objective or the gradient is not finite; the outputs of
 * this function hold what was found. */
PK_API PK__MUST_USE pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                const pk_real *weights, const pk_dataset *dataset,
                                                const pk_batch *batch, pk_gradient_workspace *workspace,
                                                double *objective, pk_real *gradient);
/* The same of a loss with options; the dataset has passed pk_criterion_check. */
PK_API PK__MUST_USE pk_status pk_batch_gradient_with(pk_context *context, const pk_graph *graph,
                                                     const pk_criterion *criterion, const pk_real *weights,
                                                     const pk_dataset *dataset, const pk_batch *batch,
                                                     pk_gradient_workspace *workspace, double *objective,
                                                     pk_real *gradient);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_GRADIENT_IMPLEMENTED)
#define PATHKERNEL_GRADIENT_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

typedef struct pk__gradient_lane {
    pk__tape tape;
    pk_real *inputs, *targets; /* block x input width, block x outputs */
} pk__gradient_lane;

typedef struct pk__gradient_group {
    double objective;
    size_t not_finite; /* position in the batch, SIZE_MAX: none */
} pk__gradient_group;

/* How a batch is divided: into blocks of examples, one task of a thread each, and into groups of consecutive blocks that
 * share a partial gradient. It depends on shapes only. */
typedef struct pk__gradient_plan {
    size_t block, blocks, groups;
} pk__gradient_plan;

PK__PRIVATE pk__gradient_plan pk__gradient_cut(size_t parameters, size_t count)
{
    pk__gradient_plan plan = {64, 0, 0};
    plan.blocks = count / plan.block + (count % plan.block != 0);
    size_t most = ((size_t)1 << 22) / (parameters + 1);
    most = most < 2 ? 2 : most > 32 ? 32 : most;
    plan.groups = plan.blocks < most ? plan.blocks : most;
    return plan;
}

/* The approximate number of multiplications in a forward pass with one row, from which follows how many threads pay. */
PK__PRIVATE double pk__graph_work(const pk_graph *graph)
{
    double work = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        work += (double)graph->nodes[n].weight_count * (double)pk__max(graph->nodes[n].positions, 1);
    return work;
}

/* Takes the workspace's arrays; its graph, largest_batch and threads are set. */
PK__PRIVATE void pk__gradient_take(pk__arena *arena, const pk_graph *graph, pk_gradient_workspace *workspace)
{
    pk__gradient_plan plan = pk__gradient_cut(graph->untied, workspace->largest_batch);
    size_t rows = workspace->largest_batch < plan.block ? workspace->largest_batch : plan.block, partial = 0;
    if (!pk__multiply(plan.groups > 1 ? plan.groups - 1 : 0, graph->untied, &partial))
        arena->overflow = 1;
    workspace->lanes = pk__arena_take(arena, (size_t)workspace->threads, sizeof *workspace->lanes);
    workspace->groups = pk__arena_take(arena, plan.groups, sizeof *workspace->groups);
    workspace->partial = pk__arena_take(arena, partial, sizeof *workspace->partial);
    workspace->untied =
        graph->tied ? pk__arena_take(arena, 2, graph->untied * sizeof *workspace->untied) : NULL;
    for (int thread = 0; thread < workspace->threads; thread++) {
        pk__gradient_lane lane;
        size_t inputs = 0, targets = 0;
        if (!pk__multiply(rows, graph->input_width, &inputs) ||
            !pk__multiply(rows, graph->output_width, &targets))
            arena->overflow = 1;
        memset(&lane, 0, sizeof lane);
        pk__pass_take(arena, graph, rows, 1, 0, &lane.tape);
        lane.inputs = pk__arena_take(arena, inputs, sizeof *lane.inputs);
        lane.targets = pk__arena_take(arena, targets, sizeof *lane.targets);
        if (arena->base && !arena->overflow)
            workspace->lanes[thread] = lane;
    }
}

PK_API pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph, size_t largest_batch,
                                     pk_gradient_workspace *workspace)
{
    if (!graph || !workspace || largest_batch == 0 || graph->node_count == 0)
        return pk__fail(context, PK_ARGUMENT,
                        "gradient: a graph, a workspace and batches of at least 1 example are needed");
    pk_gradient_workspace taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.largest_batch = largest_batch;
    size_t groups = pk__gradient_cut(graph->untied, largest_batch).groups;
    taken.threads = pk_threads(context);
    if ((size_t)taken.threads > groups)
        taken.threads = (int)groups;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status;
    do
        pk__gradient_take(&arena, graph, &taken);
    while (pk__arena_again(context, &arena, "the workspace of the batch gradient", &status));
    if (status)
        return status;
    taken.memory = arena.base;
    *workspace = taken;
    return PK_OK;
}

PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace)
{
    if (!workspace)
        return;
    pk_release(context, workspace->memory);
    memset(workspace, 0, sizeof *workspace);
}

/* What all blocks of one call share. */
typedef struct pk__gradient_job {
    const pk__loss_rule *rule;
    const pk_criterion *criterion;
    const pk_real *weights;
    const pk_dataset *dataset;
    const pk_batch *batch;
    pk__gradient_plan plan;
} pk__gradient_job;

/* Computes the losses of a block's rows after the forward pass, and sets the tape's seeds to their weighted gradients. */
static void pk__gradient_seed(const pk__gradient_job *job, pk__gradient_lane *lane, size_t first, size_t rows,
                              pk__gradient_group *sum)
{
    const pk_batch *batch = job->batch;
    const size_t outputs = lane->tape.graph->output_width;
    const pk_real *output = pk__pass_output(&lane->tape);
    pk_real *seed = pk__pass_seed(&lane->tape);
    const int finite = pk__all_finite(output, rows * outputs);
    for (size_t row = 0; !finite && sum->not_finite == SIZE_MAX && row < rows; row++)
        if (!pk__all_finite(output + row * outputs, outputs))
            sum->not_finite = first + row;
    for (size_t row = 0; row < rows; row++, output += outputs, seed += outputs) {
        pk_real *target = lane->targets + row * outputs;
        double weight = batch->weights ? batch->weights[first + row] : 1 / (double)batch->count;
        pk__loss_target(job->criterion, &job->dataset->targets, (size_t)batch->items[first + row], outputs,
                        target);
        sum->objective += weight * job->rule->evaluate(job->criterion, outputs, output, target, seed);
        for (size_t j = 0; j < outputs; j++)
            seed[j] *= (pk_real)weight;
    }
}

/* Adds the other groups' partial gradients in order, for one range of the parameters. Returns whether all is finite. */
static int pk__gradient_reduce_range(pk_real *gradient, const pk_real *partial, size_t groups,
                                     size_t parameters, size_t first, size_t count)
{
    pk_real *sum = gradient + first;
    for (size_t group = 1; group < groups; group++) {
        const pk_real *part = partial + (group - 1) * parameters + first;
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            sum[i] += part[i];
    }
    return pk__all_finite(sum, count);
}

/* Reads the rows of a block, with several threads if they are long. */
static void pk__gradient_inputs(const pk__gradient_job *job, const pk__tape *tape, size_t first, size_t rows,
                                pk_real *inputs)
{
    const size_t width = pk_dataset_width(job->dataset), parts = rows * width >> 14;
    const int64_t *items = job->batch->items + first;
    const int threads = (int)pk__min((size_t)pk__max((size_t)tape->threads, 1), parts);
    if (threads <= 1) {
        pk_dataset_inputs(job->dataset, items, rows, inputs);
        return;
    }
    pk__team team = pk__team_of(tape->context, threads, parts);
    PK__PARALLEL(team)
    for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team)) {
        const size_t from = rows * part / parts, to = rows * (part + 1) / parts;
        pk_dataset_inputs(job->dataset, items + from, to - from, inputs + from * width);
    }
    pk__team_end(&team);
}

/* gradient := the partial gradient of one group of blocks. */
static void pk__gradient_group_run(const pk__gradient_job *job, size_t group, pk__gradient_lane *lane,
                                   pk__gradient_group *result, pk_real *gradient)
{
    const pk_batch *batch = job->batch;
    pk__tape *tape = &lane->tape;
    size_t block = job->plan.block;
    size_t first = job->plan.blocks * group / job->plan.groups * block;
    size_t end = job->plan.blocks * (group + 1) / job->plan.groups * block;
    if (end > batch->count)
        end = batch->count;
    pk__gradient_group sum = {0, SIZE_MAX}; /* results of groups share cache lines: written once */
    memset(gradient, 0, tape->graph->untied * sizeof *gradient);
    for (; first < end; first += block) {
        size_t rows = end - first < block ? end - first : block;
        pk__line line = {job->weights, NULL, NULL};
        pk__gradient_inputs(job, tape, first, rows, lane->inputs);
        pk__pass_forward(tape, &line, rows, lane->inputs);
        pk__gradient_seed(job, lane, first, rows, &sum);
        pk__pass_reverse(tape, &line, rows, 1);
        pk__pass_weight_gradient(tape, rows, gradient);
    }
    *result = sum;
}

/* The same for all parameters, with several threads if there are many. */
enum { PK__REDUCE_WORTH = 64 };
PK__PRIVATE int pk__gradient_reduce(pk_context *context, pk_real *gradient, const pk_real *partial,
                                    size_t groups, size_t parameters, int threads)
{
    const size_t range = 4096, ranges = pk__blocks(parameters, range);
    int finite = 1;
    if (threads > 1 && groups * ranges >= (size_t)PK__REDUCE_WORTH) {
        pk__team team = pk__team_of(context, threads, ranges);
        PK__PARALLEL(team)
        for (size_t r = pk__first_task(&team); r < ranges; r = pk__next_task(&team))
            if (!pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                           pk__min(parameters - r * range, range))) {
                PK__ATOMIC_WRITE
                finite = 0;
            }
        pk__team_end(&team);
    } else {
        for (size_t r = 0; r < ranges; r++)
            finite &= pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                                pk__min(parameters - r * range, range));
    }
    return finite;
}

/* Checks a batch against a dataset and a network; messages begin with `name`. */
PK__PRIVATE pk_status pk__batch_arguments(pk_context *context, const char *name, const pk_graph *graph,
                                          const pk__loss_rule *rule, const pk_dataset *dataset,
                                          const pk_batch *batch)
{
    if (!dataset || !batch || (batch->count && !batch->items))
        return pk__fail(context, PK_ARGUMENT, "%s: an argument is NULL", name);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "%s: the loss is unknown", name);
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = inputs->rank < 1 ? 0 : inputs->shape[0], outputs = graph->output_width;
    pk_status status =
        pk_array_check_rows(context, inputs, graph->input_shape.rank, graph->input_shape.dims, "inputs");
    if (status)
        return status;
    if (targets->rank < 1 || targets->shape[0] != examples || !pk__fit_outputs(targets, outputs))
        return pk__fail(context, PK_SHAPE, "%s: %zu targets of %zu numbers for %zu examples and %zu outputs",
                        name, targets->rank < 1 ? (size_t)0 : targets->shape[0], targets->row_items, examples,
                        outputs);
    for (size_t b = 0; b < batch->count; b++)
        if (batch->items[b] < 0 || (uint64_t)batch->items[b] >= examples)
            return pk__fail(context, PK_ARGUMENT, "%s: batch position %zu is example %lld of %zu", name, b,
                            (long long)batch->items[b], examples);
    return PK_OK;
}

static pk_status pk__gradient_arguments(pk_context *context, const pk_graph *graph, const pk__loss_rule *rule,
                                        const pk_real *weights, const pk_dataset *dataset,
                                        const pk_batch *batch, const pk_gradient_workspace *workspace,
                                        const pk_real *gradient)
{
    if (!graph || !batch || !workspace || (graph->parameters && (!weights || !gradient)))
        return pk__fail(context, PK_ARGUMENT, "gradient: an argument is NULL");
    pk_status status = pk__batch_arguments(context, "gradient", graph, rule, dataset, batch);
    if (!status && (workspace->graph != graph || batch->count > workspace->largest_batch))
        return pk__fail(context, PK_ARGUMENT, "gradient: the workspace is for batches of up to %zu%s, not %zu",
                        workspace->largest_batch, workspace->graph != graph ? " of another graph" : "",
                        batch->count);
    return status;
}

PK_API pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                   const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                   pk_gradient_workspace *workspace, double *objective, pk_real *gradient)
{
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk_batch_gradient_with(context, graph, &criterion, weights, dataset, batch, workspace, objective,
                                  gradient);
}

PK_API pk_status pk_batch_gradient_with(pk_context *context, const pk_graph *graph,
                                        const pk_criterion *criterion, const pk_real *weights,
                                        const pk_dataset *dataset, const pk_batch *batch,
                                        pk_gradient_workspace *workspace, double *objective, pk_real *gradient)
{
    pk__gradient_job job = {.rule = criterion ? pk__loss_find(criterion->loss) : NULL,
                            .criterion = criterion,
                            .weights = weights,
                            .dataset = dataset,
                            .batch = batch};
    pk_status status =
        pk__gradient_arguments(context, graph, job.rule, weights, dataset, batch, workspace, gradient);
    if (status)
        return status;
    const size_t parameters = graph->untied;
    pk_real *flat = gradient;
    if (graph->tied) {
        pk_graph_untie(graph, weights, workspace->untied);
        job.weights = workspace->untied;
        gradient = workspace->untied + parameters;
    }
    job.plan = pk__gradient_cut(parameters, batch->count);
    size_t groups = job.plan.groups;
    pk__gradient_lane *lanes = workspace->lanes;
    /* A thread is started for about a million flops or more. */
    const double work = 6.0 * pk__graph_work(graph) * (double)batch->count / 1048576.0;
    int threads = pk_threads(context);
    threads = threads <= work ? threads : work < 1 ? 1 : (int)work;
    /* More threads than groups share the operations of each group. */
    const int inside = (size_t)threads > groups ? threads : 0;
    threads = (int)pk__min((size_t)threads, (size_t)workspace->threads);
    lanes[0].tape.threads = inside;
    lanes[0].tape.context = context;
    if (groups == 0) {
        memset(gradient, 0, parameters * sizeof *gradient);
        workspace->groups[0].objective = 0;
        workspace->groups[0].not_finite = SIZE_MAX;
    } else if (inside || threads <= 1) {
        for (size_t group = 0; group < groups; group++)
            pk__gradient_group_run(&job, group, lanes, &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
    } else {
        pk__team team = pk__team_of(context, threads, groups);
        PK__PARALLEL(team)
        for (size_t group = pk__first_task(&team); group < groups; group = pk__next_task(&team))
            pk__gradient_group_run(&job, group, &lanes[pk__thread()], &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
        pk__team_end(&team);
    }
    const int finite = pk__gradient_reduce(context, gradient, workspace->partial, groups, parameters,
                                           inside ? inside : threads);
    if (graph->tied) {
        pk_graph_gather(graph, gradient, gradient);
        memcpy(flat, gradient, graph->parameters * sizeof *flat);
    }
    double sum = workspace->groups[0].objective;
    size_t not_finite = workspace->groups[0].not_finite;
    for (size_t group = 1; group < groups; group++) {
        sum += workspace->groups[group].objective;
        if (not_finite == SIZE_MAX)
            not_finite = workspace->groups[group].not_finite;
    }
    if (objective)
        *objective = sum;
    if (not_finite != SIZE_MAX)
        return pk__fail(context, PK_NOT_FINITE,
                        "gradient: the network's output is not finite at batch position %zu "
                        "(example %lld)",
                        not_finite, (long long)batch->items[not_finite]);
    if (!isfinite(sum) || !finite)
        return pk__fail(context, PK_NOT_FINITE, "gradient: the %s is not finite%s%s",
                        isfinite(sum) ? "gradient" : "objective", job.rule->domain ? "; " : "",
                        job.rule->domain ? job.rule->domain : "");
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
