/* pathkernel/attribution/plan.h: how a decomposition is cut into passes over the run so that it fits the memory limit: the job,
 * its memory, what a plan costs, the choice. sweep.h carries it out.
 *
 * A pass goes through all steps with some of the test rows and some of the outputs; windows of steps are prepared
 * before it. The results do not depend on the plan: blocks of rows, units of outputs and the order of sums follow from
 * shapes alone. What a cut costs:
 *   - each pass reads the run again and recomputes the examples' gradients and the updates;
 *   - states of the optimizer that were not saved are recomputed from saved ones (steps.h);
 *   - each slice of the outputs passes the test rows along the path again, because quadrature nodes are chosen for all
 *     outputs together; where the optimizer has no state, their products with the examples are repeated, too;
 *   - with few blocks of rows or short windows some threads have nothing to do.
 */
#ifndef PATHKERNEL_PLAN_H
#define PATHKERNEL_PLAN_H
#include "decomposition.h"
#include "steps.h"

/* >>> declarations */
PK__BEGIN_C

typedef struct pk_plan {
    size_t threads;
    size_t rows, outputs; /* the most that one pass has; all, where the memory suffices */
    size_t passes;
    size_t window; /* steps prepared at a time */
    size_t stride,
        spare; /* the optimizer's state is saved before every stride-th window, and `spare` more between two of these */
    /* the most memory that is held at one time, including the results (in parts: those of one part) */
    size_t bytes;
    /* All passes together: */
    double sweeps;       /* how often the gradients of all examples of the run are computed; 1 at best */
    double weight_bytes; /* read, of the recorded weights */
    double gradient_flops, contraction_flops;
    /* Estimated seconds at 35 GF/s a thread: in total; for computing the examples' side once; for the parts of it that are
     * recomputed; for taking the test rows along the path, including the optimizer's state; for the products of test rows
     * and examples. */
    double seconds, seconds_examples, seconds_again, seconds_test, seconds_contraction;
} pk_plan;

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PLAN_IMPLEMENTED)
#define PATHKERNEL_PLAN_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- the job --------------------------------------------------------------------------------------- */

/* One thread's memory. */
typedef struct pk__worker {
    struct pk__job *job;
    pk__integral integral;
    pk__product product;
    pk_real *phi, *tensor, /* like phi, for one tensor of a layer with tied tensors */
        *effective; /* outputs of a part x weights of its layer; effective: E, where it is not a multiple of R */
    pk_real *tile;  /* of one row: blocks of examples x outputs x PK__TILE_LD; zero between rows */
    pk_real *bound_tile; /* with bounds: outputs x PK__TILE_LD */
    pk_real *left_inputs;
    /* The step that is being computed for a block of rows: the first row and the number of rows, the step, and the factor
     * of its products. */
    size_t row, rows, step;
    const pk__examples *batch;
    double factor;
    double seconds_test;
} pk__worker;

typedef struct pk__block_state { /* of a block of rows, kept between windows */
    size_t points_last, points, pieces, refused;
    double flops, worst;
    size_t worst_step, worst_row;
} pk__block_state;

typedef struct pk__job {
    pk_context *context;
    const pk_run *run;
    const pk_decompose_options *options;
    const pk_graph *graph;
    pk_quadrature quadrature;
    double tolerance, target;
    double whole_target, whole_least; /* of steps whose kinks are not looked for; see pk__integrator */
    double unattributed;              /* the limit, known with the last weights */
    size_t outputs, block, unit;
    int reverse, decays;
    int direct;  /* E is not a multiple of R: it has a direct part, or its gain differs between groups */
    int grouped; /* the run has parameter groups: linear forms by range of w */
    pk__window window;
    pk_matrix inputs;
    const pk_array *input_array; /* in place of their data, or NULL */
    double gauss_nodes[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2],
        gauss_weights[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2];
    pk_plan plan;
    /* In the arena: */
    pk_real *rows; /* plan.rows x inputs, packed */
    pk_real *gram; /* plan.rows x gram_ld */
    size_t gram_ld;
    size_t *state_at;       /* layers + 1: where R of each layer begins, for one output; in whole cache lines */
    pk_real *reverse_state; /* plan.rows x plan.outputs x state_at[layers]: R */
    pk_real *reverse_error; /* the same: a bound on the error of R */
    /* With an average of the weights, the same of T (run/average.h); the average's last weights, P. */
    pk_real *average_state, *average_error, *average_weights;
    pk__block_state *blocks;
    pk__row_state *row_state; /* plan.rows */
    double *variation;        /* plan.rows x outputs: sum over the steps of |< Phi_s, D_s >| */
    pk__worker *workers;
    pk_linear_form *next_forms;        /* those of the step after the window */
    size_t first_output, output_count; /* of the pass */
    int by_layer;                      /* results are kept layer by layer */
    pk_decomposition *part;
} pk__job;

/* The number of outputs of a layer that are computed together, so few that they stay in the cache. */
PK__PRIVATE size_t pk__part_outputs(const pk_node *node, size_t unit)
{
    return pk__max(1, pk__min(unit, ((size_t)1 << 12) / node->weight_count));
}

/* All memory of a job, in the order of its use. */
PK__PRIVATE void pk__job_layout(pk__job *job, pk__arena *arena)
{
    const pk_graph *graph = job->graph;
    const size_t real = sizeof(pk_real), threads = job->plan.threads, rows = job->plan.rows;
    size_t largest = 0;
    pk__steps_take(arena, job->plan.window, job->reverse ? job->plan.stride : 0, job->plan.spare, threads,
                   job->options->bounds, &job->window);
    job->next_forms = pk__arena_take(arena, job->window.form_count, sizeof *job->next_forms);
    job->rows = pk__arena_take(arena, rows, graph->input_width * real);
    job->gram_ld = job->run->examples;
    job->gram = pk__arena_take(arena, job->reverse ? 0 : rows, job->gram_ld * real);
    job->reverse_state = NULL;
    if (job->reverse) {
        size_t per_row = 0, numbers = 0;
        job->state_at = pk__arena_take(arena, graph->layers + 1, sizeof *job->state_at);
        for (size_t l = 0; l <= graph->layers; l++) {
            if (job->state_at)
                job->state_at[l] = numbers;
            if (l < graph->layers)
                numbers += pk__blocks(pk_graph_layer(graph, l)->weight_count, PK_PANEL) * PK_PANEL;
        }
        if (!pk__multiply(job->plan.outputs, numbers, &per_row) || per_row > SIZE_MAX / real / 2)
            arena->overflow = 1;
        else
            job->reverse_state = pk__arena_take(arena, rows, per_row * real);
        job->reverse_error = job->average_state = job->average_error = NULL;
        if (!arena->overflow && job->options->bounds)
            job->reverse_error = pk__arena_take(arena, rows, per_row * real);
        if (!arena->overflow && job->window.average)
            job->average_state = pk__arena_take(arena, rows, per_row * real);
        if (!arena->overflow && job->window.average && job->options->bounds)
            job->average_error = pk__arena_take(arena, rows, per_row * real);
    }
    job->average_weights = pk__arena_take(arena, job->window.average ? graph->parameters : 0, real);
    job->blocks = pk__arena_take(arena, pk__blocks(rows, job->block), sizeof *job->blocks);
    job->row_state = pk__arena_take(arena, rows, sizeof *job->row_state);
    job->variation = pk__arena_take(arena, rows, job->outputs * sizeof *job->variation);
    job->workers = pk__arena_take(arena, threads, sizeof *job->workers);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        largest = pk__max(largest, pk__part_outputs(node, job->unit) * node->weight_count);
    }
    for (size_t w = 0; w < threads && !arena->overflow; w++) {
        pk__worker measured, *worker = job->workers ? &job->workers[w] : &measured;
        memset(worker, 0, sizeof *worker);
        worker->job = job;
        pk__integral_take(arena, graph, &job->options->readout, job->block,
                          job->reverse || job->options->engine != PK_ENGINE_FACTORED ? job->plan.outputs : 0,
                          job->unit, job->options->bounds, &job->window.representation, &worker->integral);
        pk__product_take(arena, &worker->integral, !job->window.representation.materialized, &worker->product);
        worker->phi = pk__arena_take(arena, largest, real);
        worker->tensor = pk__arena_take(arena, graph->tied ? largest : 0, real);
        worker->effective = pk__arena_take(arena, job->direct || job->options->bounds ? largest : 0, real);
        const size_t blocks = pk__blocks(job->window.largest_batch, PK__EXAMPLE_BLOCK),
                     tile = PK__TILE_LD * real;
        worker->tile = pk__arena_take(arena, blocks * job->outputs, tile);
        if (worker->tile)
            memset(worker->tile, 0, blocks * job->outputs * tile);
        worker->bound_tile = pk__arena_take(arena, job->options->bounds ? job->outputs : 0, tile);
        worker->left_inputs =
            pk__arena_take(arena, job->reverse ? 0 : PK__EXAMPLE_BLOCK, graph->input_width * real);
        worker->integral.integrator.gauss_nodes = job->gauss_nodes;
        worker->integral.integrator.gauss_weights = job->gauss_weights;
        worker->integral.integrator.quadrature = job->quadrature;
        worker->integral.integrator.target = job->target;
        worker->integral.integrator.whole_target = job->whole_target;
        worker->integral.integrator.whole_least = job->whole_least;
    }
}

/* Bytes of results per row. */
PK__PRIVATE size_t pk__result_bytes(const pk_decomposition *out, const pk_decompose_options *options)
{
    size_t items = PK__RESULT_VECTORS * out->outputs;
    for (size_t i = 0; i < out->kept_count; i++)
        items += out->kept[i].row_items;
    items += options->bounds ? out->outputs * out->examples : 0;
    items += options->step_closure ? out->outputs * out->steps : 0;
    return items * sizeof(double);
}

/* Bytes that a plan needs with row_bytes of results per row, of all rows or of those of a pass; SIZE_MAX: overflow. */
static size_t pk__plan_bytes(pk__job *job, const pk_plan *plan, size_t rows, size_t row_bytes, int by_pass)
{
    pk__arena arena = {NULL, 0, 0, 0};
    size_t results = 0;
    job->plan = *plan;
    pk__job_layout(job, &arena);
    if (arena.overflow || !pk__multiply(by_pass ? plan->rows : rows, row_bytes, &results) ||
        arena.used > SIZE_MAX / 2 - results)
        return SIZE_MAX;
    return arena.used + results + 4096; /* headers and rounding of a dozen allocations */
}

/* Seconds of one thread, as measured on one machine. Only their proportions matter. */
static const double pk__flop_seconds = 1 / 35e9;
static const double pk__update_seconds =
    14e-9; /* for each parameter and step: D_s, the recomputed update and its linear form */
static const double pk__advance_seconds =
    2e-9; /* for each parameter and step, where only the optimizer's state is computed */
static const double pk__state_seconds = 1.3e-9; /* for each number of R and step */
static const double pk__usual_points = 5;       /* a typical number of quadrature nodes per row and step */

/* The error that a step may have whose kinks are not looked for, as a part of the tolerance: single contributions differ by more
 * than their sum, which is what is measured. */
#define PK__WHOLE_PART (1.0 / 32)

/* How much longer a number of equal tasks takes than if they were spread evenly over the threads. */
static double pk__idle(size_t tasks, size_t threads)
{
    return tasks ? (double)(pk__blocks(tasks, threads) * threads) / (double)tasks : 1;
}

/* Fills in what the plan costs: see the top of this file. */
static void pk__plan_cost(const pk__job *job, size_t rows, pk_plan *plan)
{
    const pk_run *run = job->run;
    const double P = (double)run->parameters, steps = (double)run->steps, threads = (double)plan->threads;
    const double items = run->steps ? (double)run->batch_offsets[run->steps] : 0;
    const double outputs = (double)job->outputs, all_rows = (double)rows;
    const size_t row_passes = pk__blocks(rows, plan->rows), slices = pk__blocks(job->outputs, plan->outputs);
    const size_t blocks = pk__blocks(plan->rows, job->block), windows = pk__blocks(run->steps, plan->window);
    const double factor = job->options->bounds ? 3 : 1;
    double widths = 0, again = 0, saved = 0;
    plan->passes = row_passes * slices;
    for (size_t l = 0; l < run->graph.layers; l++) {
        const pk_node *node = pk_graph_layer(&run->graph, l);
        widths += (double)node->width + (double)pk__layer_input(&run->graph, node)->width / outputs;
    }
    if (plan->stride && job->window.state_vectors + job->window.average_vectors && windows) {
        const size_t kept = (windows - 1) / plan->stride, last = windows - kept * plan->stride;
        again = ((double)kept * pk__checkpoints_again(plan->stride, plan->spare) +
                 pk__checkpoints_again(last, plan->spare)) /
                (double)windows;
        saved = (double)(kept * plan->stride) / (double)windows;
    }
    const double passes = (double)plan->passes;
    const double gradients =
        6 * P * items * pk__flop_seconds * factor *
        pk__idle(pk__min(plan->window, pk__max(run->steps, 1)) * job->window.partial_sums, plan->threads);
    const double visit = gradients + P * steps * pk__update_seconds,
                 advance = gradients + P * steps * pk__advance_seconds;
    const double idle = pk__idle(blocks, plan->threads);
    plan->sweeps = saved + passes * (1 + again);
    plan->weight_bytes = plan->sweeps * P * steps * (double)pk_type_size(run->weights.type);
    plan->gradient_flops = plan->sweeps * 6 * P * items;
    plan->contraction_flops =
        job->reverse ? 2 * P * outputs * items * all_rows * factor
                     : (double)slices * 2 * outputs * widths * items * all_rows * pk__usual_points * factor;
    plan->seconds_examples = visit / threads;
    plan->seconds_again = ((passes - 1) * visit + (saved + passes * again) * advance) / threads;
    plan->seconds_test = (double)slices * all_rows * steps * P * (4 + 6 * pk__usual_points) * pk__flop_seconds;
    if (job->reverse)
        plan->seconds_test +=
            all_rows * steps * P * outputs * pk__state_seconds * factor * (job->window.average ? 2 : 1);
    plan->seconds_test *= idle / threads;
    plan->seconds_contraction = plan->contraction_flops * pk__flop_seconds * idle / threads;
    plan->seconds =
        plan->seconds_examples + plan->seconds_again + plan->seconds_test + plan->seconds_contraction;
}

/* The limits that a plan has to keep, and the best plan so far. */
typedef struct pk__choice {
    size_t rows, row_bytes, available, least;
    int by_pass;
    pk_plan best;
} pk__choice;

/* Keeps the plan if it is cheaper than the best one, by a twentieth where it takes more memory; 1 where it fits. */
static int pk__consider(pk__job *job, pk__choice *choice, pk_plan *plan)
{
    pk__plan_cost(job, choice->rows, plan);
    if (choice->best.threads && !(plan->seconds < choice->best.seconds))
        return 1;
    plan->bytes = pk__plan_bytes(job, plan, choice->rows, choice->row_bytes, choice->by_pass);
    choice->least = pk__min(choice->least, plan->bytes);
    if (plan->bytes > choice->available)
        return 0;
    if (!choice->best.threads || plan->bytes <= choice->best.bytes ||
        plan->seconds < 0.95 * choice->best.seconds)
        choice->best = *plan;
    return 1;
}

/* The next of the numbers 1, 2, 3, 4, 5, 6, 8, 10, 12, 15 ... up to last; 0 after it. */
static size_t pk__next_size(size_t size, size_t last)
{
    return size >= last ? 0 : pk__min(size + 1 + size / 5, last);
}

/* Chooses how many states of the optimizer are saved; threads, rows, outputs and window are set. */
static void pk__choose_states(pk__job *job, pk__choice *choice, pk_plan *plan)
{
    const size_t windows = pk__blocks(pk__max(job->run->steps, 1), plan->window);
    const size_t vectors = !job->reverse ? 0
                                         : job->window.state_vectors * (job->options->bounds ? 3 : 1) +
                                               job->window.average_vectors;
    plan->stride = 1;
    plan->spare = 0;
    if (!vectors || windows == 1) {
        (void)pk__consider(job, choice, plan);
        return;
    }
    /* First the cost without any repetition, with all states saved: no plan is cheaper. */
    pk__plan_cost(job, choice->rows, plan);
    if (choice->best.threads && !(plan->seconds < choice->best.seconds))
        return;
    /* With three saved states a run of any length takes a tolerable time, with fewer it does not. */
    const size_t fewest = pk__min(3, windows - 1);
    plan->stride = windows;
    plan->spare = fewest;
    if (!pk__consider(job, choice, plan))
        return;
    size_t state = 0;
    if (!pk__multiply(vectors, job->graph->parameters * sizeof(pk_real), &state))
        return;
    size_t states = fewest;
    plan->bytes = pk__plan_bytes(job, plan, choice->rows, choice->row_bytes, choice->by_pass);
    if (choice->available > plan->bytes + 256) /* for rounding up to whole cache lines */
        states += pk__min((choice->available - plan->bytes - 256) / (state + sizeof(size_t)), windows);
    for (size_t stride = 1; stride; stride = pk__next_size(stride, windows)) {
        const size_t kept = (windows - 1) / stride;
        if (kept > states)
            continue;
        plan->stride = stride;
        plan->spare = pk__min(states - kept, stride - 1);
        (void)pk__consider(job, choice, plan);
        if (stride == 1)
            break;
    }
}

/* The cheapest plan that fits, with at most `most` blocks of rows in a pass. whole: search even where the plan that saves
 * nothing fits. */
static void pk__search_plans(pk__job *job, pk__choice *choice, size_t most, int whole)
{
    static const size_t windows[] = {32, 64, 24, 16, 12, 8, 6, 4, 3, 2, 1, 128, 256, 512};
    const size_t steps = pk__max(job->run->steps, 1), rows = choice->rows,
                 blocks = pk__blocks(rows, job->block);
    const size_t units = pk__blocks(job->outputs, job->unit);
    const size_t tasks = pk__max(blocks, job->window.partial_sums * pk__min(steps, windows[0]));
    const size_t all_threads = pk__min((size_t)pk_threads(job->context), tasks);
    pk_plan plan;
    memset(&plan, 0, sizeof plan);
    /* The plan for enough memory: */
    plan.threads = all_threads;
    plan.rows = pk__min(rows, most * job->block);
    plan.outputs = job->outputs;
    plan.window = pk__min(windows[0], steps);
    plan.stride = 1;
    if (pk__consider(job, choice, &plan) && !whole)
        return;
    for (plan.threads = all_threads; plan.threads >= 1; plan.threads /= 2)
        for (size_t slices = 1; slices; slices = pk__next_size(slices, units))
            for (size_t i = 0; i < sizeof windows / sizeof *windows; i++)
                for (size_t passes = pk__blocks(blocks, most); passes; passes = pk__next_size(passes, blocks)) {
                    if (i && windows[i] >= 2 * steps)
                        continue;
                    plan.outputs = pk__min(job->outputs, pk__blocks(units, slices) * job->unit);
                    plan.rows = pk__min(rows, pk__blocks(blocks, passes) * job->block);
                    plan.window = pk__min(windows[i], steps);
                    pk__choose_states(job, choice, &plan);
                }
}

/* Cuts a job of more than two passes of options->pass_seconds into such passes. What a pass repeats is a tenth of the time
 * at most, and each thread has four blocks in it. */
static void pk__shorten_passes(pk__job *job, pk__choice *choice)
{
    const double asked = job->options->pass_seconds;
    const pk_plan *best = &choice->best;
    if (!(asked > 0) || !choice->by_pass || job->options->rows_at_once || !best->threads ||
        best->seconds < 2 * asked)
        return;
    const size_t blocks = pk__blocks(choice->rows, job->block), fewest = pk__min(4 * best->threads, blocks);
    const double passes =
        fmin(best->seconds / asked, 1 + 0.1 * best->seconds / fmax(best->seconds_examples, 1e-9));
    const size_t most = pk__max(fewest, pk__blocks(blocks, (size_t)fmin(passes, (double)blocks)));
    if (most * job->block >= best->rows)
        return;
    pk__choice shorter = *choice;
    memset(&shorter.best, 0, sizeof shorter.best);
    pk__search_plans(job, &shorter, most, 1);
    if (shorter.best.threads)
        *choice = shorter;
}

/* The limit where the caller sets none: enough for useful windows, and less than most machines have. */
#define PK__USUAL_MEMORY (SIZE_MAX > 0xffffffffu ? SIZE_MAX >> 32 : SIZE_MAX / 4) /* 4 GiB */

/* Chooses the cheapest plan that fits into the memory. */
PK__PRIVATE pk_status pk__job_plan(pk__job *job, size_t rows, size_t row_bytes, int by_pass)
{
    const size_t limit = job->context ? job->context->memory_limit : 0,
                 held = job->context ? job->context->memory_used : 0, blocks = pk__blocks(rows, job->block);
    const size_t most = pk__min(
        blocks, job->options->rows_at_once ? pk__blocks(job->options->rows_at_once, job->block) : blocks);
    size_t results = 0;
    pk__choice choice;
    memset(&choice, 0, sizeof choice);
    choice.rows = rows;
    choice.row_bytes = row_bytes;
    choice.by_pass = by_pass;
    choice.available = limit > held ? limit - held : 0;
    if (!limit)
        choice.available = pk__multiply(rows, row_bytes, &results) && results < SIZE_MAX - PK__USUAL_MEMORY
                               ? results + PK__USUAL_MEMORY
                               : SIZE_MAX - 1;
    choice.least = SIZE_MAX;
    pk__search_plans(job, &choice, most, limit != 0);
    if (!limit && !choice.best.threads) {
        choice.available = SIZE_MAX - 1;
        pk__search_plans(job, &choice, most, 0);
    }
    pk__shorten_passes(job, &choice);
    job->plan = choice.best;
    if (choice.best.threads)
        return PK_OK;
    if (choice.least == SIZE_MAX)
        return pk__fail(job->context, PK_OVERFLOW, "the memory to decompose this run overflows");
    return pk__fail(
        job->context, PK_MEMORY_LIMIT,
        "decomposing this run within %zu bytes is not possible; the least that would do is %zu bytes", limit,
        held + choice.least);
}

/* Fills in the job, except for the plan and the memory. */
PK__PRIVATE void pk__job_begin(pk__job *job, pk_context *context, const pk_run *run, pk_matrix inputs,
                               const pk_decompose_options *options)
{
    memset(job, 0, sizeof *job);
    job->context = context;
    job->run = run;
    job->options = options;
    job->graph = &run->graph;
    job->quadrature = options->quadrature;
    job->inputs = inputs;
    job->outputs = pk_readout_count(&options->readout, run->graph.output_width);
    job->tolerance = options->tolerance > 0 ? options->tolerance : PK_TOLERANCE;
    /* Closures of the steps add up at random: leave them a margin, so that the sum is far inside. */
    job->target = 1e-3 * job->tolerance / sqrt((double)pk__max(run->steps, 1));
    if (job->tolerance > PK_TOLERANCE) {
        job->whole_target = PK__WHOLE_PART * job->tolerance;
        job->whole_least = job->whole_target / sqrt((double)pk__max(run->steps, 1));
    }
    pk__gauss_table(job->gauss_nodes, job->gauss_weights);
    pk__steps_begin(run, &job->window);
    job->window.approximation = options->approximation;
    job->window.average = options->average.kind ? &options->average : NULL;
    job->window.average_vectors = !job->window.average ? 0 : 2 + (job->window.decoupled != 0);
    const size_t rows = options->approximation ? options->approximation->rows : 0;
    job->grouped = run->groups.count > 0;
    job->reverse =
        options->reverse_time || job->window.state_vectors > 0 || job->grouped || job->window.average != NULL;
    pk_linear_form form;
    pk_optimizer_linear_form(&run->optimizer, 0, 1, run->graph.parameters, NULL, &form, NULL);
    job->reverse |= form.preconditioned;
    job->window.representation.outputs = job->outputs;
    job->window.representation.batch = job->window.largest_batch;
    job->window.representation.materialized =
        job->reverse || options->bounds || options->engine == PK_ENGINE_INTEGRATED;
    job->window.representation.factored = options->engine == PK_ENGINE_FACTORED;
    job->window.representation.known_data = !job->window.representation.materialized; /* job->gram */
    job->direct = job->grouped || (job->reverse && pk__form_direct(&form));
    job->unit = pk__integral_unit(job->outputs, run->graph.untied);
    /* Small jobs are cut into at least 16 blocks, if they have as many rows, so that several threads have work. */
    job->block = pk__min(pk__integral_block(&run->graph, job->outputs),
                         pk__blocks(pk__max(rows ? rows : inputs.rows, 1), 16));
    /* The least memory is that of one block: in reverse time at most about 2^20 numbers, or one row. */
    if (job->reverse)
        job->block =
            pk__max(1, pk__min(job->block, ((size_t)1 << 20) / pk__max(1, job->outputs * run->graph.untied)));
    job->decays =
        job->grouped ? job->window.decoupled : form.decoupled != 0 || (form.coupled != 0 && !job->reverse);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
