/* pathkernel/attribution/sweep.h: the loop. One sweep goes through all steps of the run with some of the test rows and some of the
 * outputs, and adds what each step contributes to their results:
 *
 *     for each window of steps (in reverse time, the last first)          pk__sweep_windows
 *         the window's weights, examples' gradients and updates             pk__steps_visit      steps.h
 *         for each block of rows, in parallel                             pk__sweep_block
 *             for each step                                               pk__sweep_step
 *                 while there are points                                    pk__integral_next    path/integrator.h
 *                     values and cotangents there                           pk__integral_pass    path/path.h
 *                     sums over the points                                  pk__integral_add     features/sums.h
 *                     products with the examples' factors, added            pk__add_products     features/tiles.h, cells.h
 *                 the same of layers whose gradient is formed               pk__materialized_layers
 *                 decay, unattributed part and closure of the step          pk__close_step
 *
 * Everything else in this file is what comes before the first window: the rows, their outputs at both ends of the run, and
 * the Gram matrix of the inputs.
 */
#ifndef PATHKERNEL_SWEEP_H
#define PATHKERNEL_SWEEP_H
#include "materialized.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SWEEP_IMPLEMENTED)
#define PATHKERNEL_SWEEP_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- before the first window -------------------------------------------------------------------------- */

/* h(f(w, x)) of the pass's rows, block by block in the workers' memory. */
static void pk__predict(pk__job *job, pk_real *weights, double *h)
{
    const pk_graph *graph = job->graph;
    const size_t rows = job->part->rows, classes = graph->output_width, outputs = job->outputs;
    const size_t blocks = pk__blocks(rows, job->block);
    if (graph->tied)
        pk_graph_untie(graph, weights, job->window.use_weights);
    const pk__line line = {graph->tied ? job->window.use_weights : weights, NULL, NULL};
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__integrator *integrator = &job->workers[pk__thread()].integral.integrator;
        pk__tape *tape = &integrator->path.tape;
        size_t first = b * job->block, count = pk__min(job->block, rows - first);
        pk__pass_forward(tape, &line, count, job->rows + first * graph->input_width);
        for (size_t r = 0; r < count; r++) {
            pk__readout_apply(&job->options->readout, classes, job->part->first_row + first + r,
                              pk__pass_output(tape) + r * classes, integrator->h, integrator->slope);
            for (size_t k = 0; k < outputs; k++)
                h[(first + r) * outputs + k] = integrator->h[k];
        }
    }
    pk__team_end(&team);
}

/* The average's last weights: by the steps of the run, whose own last weights are in the window then. */
PK__PRIVATE pk_status pk__average_run(pk__job *job)
{
    const pk_average *average = job->window.average;
    pk_real *next = job->window.weights;
    pk_status status =
        pk_replay_weights(job->context, &job->window.replay, average->from, job->average_weights);
    for (size_t s = average->from; !status && s < job->run->steps; s++) {
        const double c = pk_average_weight(average, s);
        if (c == 0)
            continue;
        status = pk_replay_weights(job->context, &job->window.replay, s + 1, next);
        if (!status)
            pk__average_update(c, job->graph->parameters, next, job->average_weights, NULL);
    }
    return status;
}

/* The outputs at both ends of the run, and what the precision of the last weights leaves unattributed. */
static pk_status pk__predict_ends(pk__job *job)
{
    pk_real *weights = job->window.weights;
    pk_status status = pk_replay_weights(job->context, &job->window.replay, 0, weights);
    if (!status)
        pk__predict(job, weights, job->part->initial);
    if (!status)
        status = pk_replay_weights(job->context, &job->window.replay, job->run->steps, weights);
    if (status)
        return status;
    job->unattributed = pk__unattributed_limit(job, weights);
    pk__predict(job, job->window.average ? job->average_weights : weights, job->part->final);
    return PK_OK;
}

/* Computes the Gram matrix of the pass's rows and the training inputs, which the first layer uses at every step. */
static void pk__fill_gram(pk__job *job)
{
    const size_t in = job->graph->input_width, N = job->run->examples;
    const size_t blocks = pk__blocks(N, PK__EXAMPLE_BLOCK);
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__worker *worker = &job->workers[pk__thread()];
        size_t first = b * PK__EXAMPLE_BLOCK, count = pk__min(PK__EXAMPLE_BLOCK, N - first);
        int64_t items[PK__EXAMPLE_BLOCK];
        for (size_t i = 0; i < count; i++)
            items[i] = (int64_t)(first + i);
        pk_dataset_inputs(&job->run->train, items, count, worker->left_inputs);
        for (size_t row = 0; row < job->part->rows; row += job->block)
            pk__gemm(0, 1, pk__min(job->block, job->part->rows - row), count, in, 1, job->rows + row * in, in,
                     worker->left_inputs, in, 0, job->gram + row * job->gram_ld + first, job->gram_ld);
    }
    pk__team_end(&team);
}

/* Sets the state of each row before the first step from its outputs at both ends of the run. */
static void pk__begin_rows(pk__job *job)
{
    const pk_decomposition *part = job->part;
    for (size_t row = 0; row < part->rows; row++) {
        pk__row_state *state = &job->row_state[row];
        memset(state, 0, sizeof *state);
        state->order.nodes = PK__FIRST_NODES;
        for (size_t i = row * part->outputs; i < (row + 1) * part->outputs; i++) {
            const double change = part->final[i] - part->initial[i];
            state->height = pk__largest(1, &part->initial[i], state->height);
            state->height = pk__largest(1, &part->final[i], state->height);
            state->change = pk__largest(1, &change, state->change);
        }
        state->change /= (double)pk__max(job->run->steps, 1);
    }
}

/* Reads the pass's rows. */
static pk_status pk__read_rows(pk__job *job)
{
    const size_t in = job->graph->input_width;
    for (size_t r = 0; r < job->part->rows; r++) {
        const size_t row = job->part->first_row + r;
        if (job->input_array) {
            pk_status status = pk_array_read(job->context, job->input_array, row * in, in, job->rows + r * in);
            if (status)
                return pk__prefix(job->context, status, "inputs: the file ");
        } else {
            memcpy(job->rows + r * in, job->inputs.data + row * job->inputs.ld, in * sizeof(pk_real));
        }
    }
    return PK_OK;
}

/* Prepares a sweep. What does not depend on the outputs of the pass is computed for the first slice of them only. */
static pk_status pk__sweep_prepare(pk__job *job)
{
    const size_t blocks = pk__blocks(job->part->rows, job->block);
    pk_status status = pk__read_rows(job);
    if (!status && job->first_output == 0) {
        status = pk__predict_ends(job);
        if (status)
            return status;
        memset(job->blocks, 0, blocks * sizeof *job->blocks);
        memset(job->variation, 0, job->part->rows * job->outputs * sizeof *job->variation);
        if (job->gram)
            pk__fill_gram(job);
    }
    if (status)
        return status;
    for (size_t b = 0; b < blocks; b++)
        job->blocks[b].points_last = 0;
    pk__begin_rows(job);
    const size_t numbers =
        job->reverse ? job->part->rows * job->plan.outputs * job->state_at[job->graph->layers] : 0;
    if (job->reverse_error)
        memset(job->reverse_error, 0, numbers * sizeof(pk_real));
    if (job->reverse)
        memset(job->reverse_state, 0, numbers * sizeof(pk_real));
    if (job->average_state)
        memset(job->average_state, 0, numbers * sizeof(pk_real));
    if (job->average_error)
        memset(job->average_error, 0, numbers * sizeof(pk_real));
    memset(job->next_forms, 0, job->window.form_count * sizeof *job->next_forms);
    job->by_layer = 0;
    for (size_t k = 0; k < job->part->kept_count; k++)
        job->by_layer |= (job->part->kept[k].axes & PK_BY_LAYER) != 0;
    return PK_OK;
}

/* ---- after a step ------------------------------------------------------------------------------------- */

/* Adds what a step contributes besides its examples, and computes its closure. */
static void pk__close_step(pk__worker *worker, pk__block_state *block, size_t j)
{
    pk__job *job = worker->job;
    const size_t step = worker->step;
    pk_decomposition *part = job->part;
    const pk_linear_form *form = &job->window.forms[j * job->window.form_count];
    const pk_real *ends = pk__integrator_ends(&worker->integral.integrator);
    /* With groups, and with an average, it is in the direction. */
    double linear = job->grouped || job->window.average ? 1 : form->decoupled;
    if (!job->reverse)
        linear += form->rate * (form->direct + form->gain * form->enter) * form->coupled;
    for (size_t i = 0; i < worker->rows * job->outputs; i++) {
        const size_t cell = worker->row * job->outputs + i, output = i % job->outputs;
        if (output < job->first_output || output >= job->first_output + job->output_count)
            continue;
        const pk_real *start = ends + (2 * (i / job->outputs) * job->outputs + output),
                      *end = start + job->outputs;
        double closure = (double)(*end - *start) - (double)worker->integral.along[0][i];
        job->variation[cell] += fabs((double)worker->integral.along[0][i]);
        part->unattributed[cell] += worker->integral.along[1][i];
        if (worker->integral.directions[2])
            part->decay[cell] -= linear * worker->integral.along[2][i];
        if (part->step_closure)
            part->step_closure[cell * part->steps + step] = closure;
        /* Ties go to the earliest step, then to the lowest row, so that the result does not depend on the order in which
         * threads find them. */
        const size_t row = part->first_row + worker->row + i / job->outputs;
        const int before = step < block->worst_step || (step == block->worst_step && row < block->worst_row);
        if (pk__worse(fabs(closure), block->worst) || (fabs(closure) == block->worst && before)) {
            block->worst = fabs(closure);
            block->worst_step = step;
            block->worst_row = row;
        }
    }
}

/* ---- the loop ----------------------------------------------------------------------------------------- */

/* Adds the products of the points in memory with the examples of the step to the results, layer by layer. The tiles of all
 * layers are added at once, unless some result is kept by layer. */
static void pk__add_products(pk__worker *worker, const pk__points *points)
{
    pk__product *product = &worker->product;
    const int by_layer = worker->job->by_layer;
    const double start = pk__seconds();
    pk__tiles_begin(product, points);
    for (size_t first = 0; first < worker->batch->count; first += PK__EXAMPLE_BLOCK) {
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, worker->batch->count - first);
        for (size_t i = 0; i < product->due_count; i++) {
            const size_t layer = product->due[i];
            pk__tiles_layer(product, layer, points, first, count, by_layer || i == 0);
            if (by_layer || i + 1 == product->due_count)
                pk__add_tile(worker, by_layer ? (int)layer : -1, first, count, product->tile);
        }
    }
    product->seconds += pk__seconds() - start;
}

/* Sets the weights at which an approximation takes the test rows' derivatives. */
static void pk__approximate_step(pk__worker *worker, pk__integral_step *step)
{
    const pk__job *job = worker->job;
    const pk__approximation *how = job->options->approximation;
    pk__integrator *integrator = &worker->integral.integrator;
    if (how && how->weights)
        step->weights = how->weights;
    if (!how || !how->at_one_point)
        return;
    const size_t steps = job->run->steps, chosen = how->chosen ? how->chosen : steps;
    integrator->at_one_point = 1;
    integrator->point = how->at;
    integrator->point_weight = !how->chosen                                 ? 1
                               : pk__is_chosen(steps, chosen, worker->step) ? (double)steps / (double)chosen
                                                                            : 0;
}

/* Moves the worker to step number j of the window. */
static pk__integral_step pk__begin_step(pk__worker *worker, size_t j)
{
    const pk__job *job = worker->job;
    const pk__window *window = &job->window;
    const pk_linear_form *form = &window->forms[j * window->form_count];
    const size_t at = j * window->untied;
    const double scale = pk_run_gradient_scale(job->run, window->first + j);
    worker->step = window->first + j;
    worker->batch = worker->product.examples = &window->examples[j];
    worker->factor = job->reverse ? -scale : -scale * form->rate * (form->direct + form->gain * form->enter);
    return (pk__integral_step){
        .weights = window->use_path_weights + at,
        .direction = window->use_path_direction + at,
        .transposed = window->transposed ? window->transposed + 2 * at : NULL,
        .directions = {window->use_path_direction + at, window->use_remainder + at,
                       !job->decays                      ? NULL
                       : job->grouped || window->average ? window->use_decayed + at
                                                         : window->use_weights + at},
        .first_row = job->part->first_row + worker->row,
        .rows = worker->rows,
        .inputs = job->rows + worker->row * job->graph->input_width,
        .engine = job->reverse ? PK_ENGINE_INTEGRATED : job->options->engine,
        .examples = window->examples[j].count,
    };
}

/* Moves the worker to a block of rows. */
static void pk__begin_block(pk__worker *worker, size_t number)
{
    const pk__job *job = worker->job;
    pk__integral *integral = &worker->integral;
    pk__integrator *integrator = &integral->integrator;
    worker->row = number * job->block;
    worker->rows = pk__min(job->block, job->part->rows - worker->row);
    worker->product.gram = job->gram ? job->gram + worker->row * job->gram_ld : NULL;
    worker->product.gram_ld = job->gram_ld;
    worker->product.flops = 0;
    integral->first_output = job->first_output;
    integral->output_count = job->output_count;
    integrator->state = job->row_state + worker->row;
    integrator->points_last = job->blocks[number].points_last;
    integrator->point_count = integrator->split_pieces = integrator->refused = 0;
}

/* Counts what a block of rows took. The points are the same for every slice of the outputs, so they count once. */
static void pk__end_block(const pk__worker *worker, pk__block_state *block)
{
    const pk__integrator *integrator = &worker->integral.integrator;
    block->points_last = integrator->points_last;
    if (worker->job->first_output == 0) {
        block->points += integrator->point_count;
        block->pieces += integrator->split_pieces;
        block->refused += integrator->refused;
    }
    block->flops += worker->product.flops;
}

/* One step of one block of rows. */
static void pk__sweep_step(pk__worker *worker, pk__block_state *block, size_t j, const pk_linear_form *next)
{
    pk__integral *integral = &worker->integral;
    pk__integral_step step = pk__begin_step(worker, j);
    pk__approximate_step(worker, &step);
    const pk__points *points = NULL;
    const int moves = pk__step_average(worker->job, j) != 0; /* an average may stay where it is */
    pk__integral_begin(integral, &step);
    while (moves && pk__integral_next(integral, &points)) {
        pk__integral_pass(integral, points);
        pk__integral_add(integral, points);
        pk__add_products(worker, points);
    }
    if (moves)
        pk__integral_end(integral);
    pk__materialized_layers(worker, j, next);
    if (moves)
        pk__close_step(worker, block, j);
}

/* The steps of the window, for one block of rows. */
static void pk__sweep_block(pk__worker *worker, size_t number)
{
    const pk__job *job = worker->job;
    const pk__window *window = &job->window;
    const double begin = pk__seconds(), before = worker->integral.seconds + worker->product.seconds;
    pk__begin_block(worker, number);
    for (size_t i = 0; i < window->count; i++) {
        const size_t j = job->reverse ? window->count - 1 - i : i;
        const pk_linear_form *next =
            j + 1 < window->count ? window->forms + (j + 1) * window->form_count : job->next_forms;
        pk__sweep_step(worker, &job->blocks[number], j, next);
    }
    pk__end_block(worker, &job->blocks[number]);
    worker->seconds_test +=
        pk__seconds() - begin - (worker->integral.seconds + worker->product.seconds - before);
}

/* Goes through the whole run for the outputs [first_output, first_output + output_count) of the part's rows. done and share
 * tell which part of the job this is, for the progress. */
static pk_status pk__sweep_windows(pk__job *job, double done, double share)
{
    const size_t blocks = pk__blocks(job->part->rows, job->block), steps = job->run->steps;
    /* Without a state, the steps that an approximation does not choose need not be computed. */
    const pk__approximation *how = job->options->approximation;
    const size_t chosen = how && !job->reverse && steps ? how->chosen : 0;
    const size_t windows = chosen ? chosen : job->window.windows;
    pk_status status = pk__sweep_prepare(job);
    for (size_t i = 0; !status && i < windows; i++) {
        status = pk__progress(job->context, "decomposing", done + share * (double)i / (double)windows);
        if (!status)
            status = chosen
                         ? pk__steps_prepare(job->context, &job->window, pk__chosen_step(steps, chosen, i), 1)
                         : pk__steps_visit(job->context, &job->window, job->reverse ? windows - 1 - i : i);
        if (status)
            break;
        pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
        PK__PARALLEL(team)
        for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team))
            pk__sweep_block(&job->workers[pk__thread()], b);
        pk__team_end(&team);
        memcpy(job->next_forms, job->window.forms, job->window.form_count * sizeof *job->next_forms);
    }
    return status;
}

/* Runs one sweep for each slice of the outputs of the part's rows. done and share as above. */
PK__PRIVATE pk_status pk__sweep_outputs(pk__job *job, double done, double share)
{
    const size_t outputs = job->outputs;
    for (size_t first = 0; first < outputs; first += job->plan.outputs) {
        job->first_output = first;
        job->output_count = pk__min(job->plan.outputs, outputs - first);
        pk_status status = pk__sweep_windows(job, done + share * (double)first / (double)outputs,
                                             share * (double)job->output_count / (double)outputs);
        if (status)
            return status;
    }
    pk__certify(job);
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
