/* pathkernel/attribution/decompose.h: the predictions of a recorded run, decomposed over its training examples to
 * rounding error, and certified.
 *
 *     h(f(w_S, x)) = initial + sum_i A(x, i) + decay + inherited + unattributed + closure
 *
 * (Domingos 2020; Bell et al. 2023, the exact path kernel.) With D_s = w_{s+1} - w_s and
 * Phi_s(x) = integral_0^1 grad_w h(f(w_s + t D_s, x)) dt, the left side is initial + sum_s Phi_s D_s. An
 * optimizer makes D_s linear in the examples' gradients g_i (optimizer.h: pk_linear_form), so that
 *
 *     A(x, i) = - sum_s scale_s c_{s,i} < E_s(x), g_{s,i} >,
 *     E_s = gain_s R_s + direct_s p_s o Phi_s,   R_s = carry_{s+1} R_{s+1} + enter_s p_s o Phi_s,   R_S = 0:
 *
 * stateful optimisers run in reverse time on the test side, without a vector per training example. decay is
 * the part of weight decay, unattributed that of u_s = D_s - (the update recomputed in double). A run that begins with an
 * optimizer's state has one more term, what is inherited from it: - carry_0 < R_0(x), m_0 >. The outputs of an average of
 * the weights are decomposed along the path of the average (run/average.h).
 */
#ifndef PATHKERNEL_DECOMPOSE_H
#define PATHKERNEL_DECOMPOSE_H
#include "sweep.h"

/* >>> declarations */
PK__BEGIN_C

/* Decomposes h(f(w_S, inputs)) of a run. inputs: rows x input width. *out is zeroed first; release it also
 * after PK_NOT_CLOSED, which means: computed, but the worst closure exceeds the tolerance (the message names
 * row, output and step), and after PK_UNATTRIBUTED: computed, but the recorded weights are not those that the declared
 * training gives (the message names row and output), so that contributions are those of another rule. Cost per step: see docs/mathematics.md. Same bits for any number of threads and any
 * memory limit. Memory beyond the results: see pk_decompose_plan; the least is about 30 P numbers, whatever the
 * number of examples, test rows, outputs and steps, and the factors of the largest batch. */
PK_API PK__MUST_USE pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                                           const pk_decompose_options *options, pk_decomposition *out);

/* The same in parts: part(user, rows first_row .. first_row + rows - 1) is called from the calling thread as
 * each pass over the run ends, so that results larger than memory can be written and finished parts survive
 * a cancel. Its tensors are valid during the call. A status other than PK_OK ends the decomposition with it.
 * *summary (may be NULL) gets the sizes, the certificate and the costs over all parts, and no arrays. */
typedef pk_status pk_decomposition_part(void *user, const pk_decomposition *part);
PK_API PK__MUST_USE pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                 const pk_decompose_options *options,
                                                 pk_decomposition_part *part, void *user,
                                                 pk_decomposition *summary);

/* The same for the rows of an array of any type, such as one of pk_array_open: they are read as they are needed, and only those
 * of a part are held. Their shape is compared by pk_run_check_inputs. */
PK_API PK__MUST_USE pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run,
                                                       const pk_array *inputs,
                                                       const pk_decompose_options *options,
                                                       pk_decomposition_part *part, void *user,
                                                       pk_decomposition *summary);

/* How pk_decompose (in_parts: pk_decompose_parts) would cut the job for rows test rows under the context's memory limit,
 * and what that costs; nothing is computed. PK_MEMORY_LIMIT names the least that would do. */
PK_API PK__MUST_USE pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                                const pk_decompose_options *options, int in_parts,
                                                pk_plan *plan);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DECOMPOSE_IMPLEMENTED)
#define PATHKERNEL_DECOMPOSE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- the calls ------------------------------------------------------------------------------------------- */

static pk_status pk__check_inputs(pk_context *context, const pk_run *run, pk_matrix inputs)
{
    if (inputs.rows == 0 || !inputs.data || inputs.cols != run->graph.input_width || inputs.ld < inputs.cols)
        return pk__fail(context, PK_SHAPE, "inputs are %zu x %zu (ld %zu); the network takes rows of %zu",
                        inputs.rows, inputs.cols, inputs.ld, run->graph.input_width);
    for (size_t r = 0; r < inputs.rows; r++)
        for (size_t j = 0; j < inputs.cols; j++)
            if (!isfinite(inputs.data[r * inputs.ld + j]))
                return pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, column %zu is not finite", r, j);
    for (size_t r = 0; run->graph.checked && r < inputs.rows; r++) {
        pk_status status = pk_graph_check_inputs(context, &run->graph, r, inputs.data + r * inputs.ld);
        if (status)
            return pk__prefix(context, status, "inputs: ");
    }
    return PK_OK;
}

/* Checks the numbers of an array, row by row. */
static pk_status pk__check_array(pk_context *context, const pk_run *run, const pk_array *inputs)
{
    const size_t width = run->graph.input_width;
    pk_real *row = NULL;
    pk_status status = pk_allocate(context, width, sizeof *row, "a row of inputs", &row);
    for (size_t r = 0; !status && r < inputs->shape[0]; r++) {
        status = pk_array_read(context, inputs, r * width, width, row);
        if (status)
            status = pk__prefix(context, status, "inputs: the file ");
        for (size_t j = 0; !status && j < width; j++)
            if (!isfinite(row[j]))
                status = pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, number %zu is not finite", r, j);
        if (!status && run->graph.checked)
            status = pk__prefix(context, pk_graph_check_inputs(context, &run->graph, r, row), "inputs: ");
    }
    pk_release(context, row);
    return status;
}

static pk_status pk__check_options(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options)
{
    const pk_readout *readout = &options->readout;
    if (!(options->tolerance >= 0) || !isfinite(options->tolerance))
        return pk__fail(context, PK_ARGUMENT, "a tolerance of %g", options->tolerance);
    if (!(options->unattributed >= 0))
        return pk__fail(context, PK_ARGUMENT, "a limit of %g for what is unattributed", options->unattributed);
    if ((int)readout->kind < 0 || readout->kind > PK_READOUT_FUNCTION ||
        (readout->kind == PK_READOUT_FUNCTION && (!readout->function || !readout->count)) ||
        (readout->kind == PK_READOUT_LABEL && !readout->labels))
        return pk__fail(context, PK_ARGUMENT, "the readout lacks its function, its count or its labels");
    if (readout->kind == PK_READOUT_ONE && readout->output >= run->outputs)
        return pk__fail(context, PK_ARGUMENT, "output %zu of a network with %zu outputs", readout->output,
                        run->outputs);
    for (size_t r = 0; readout->kind == PK_READOUT_LABEL && r < rows; r++)
        if (readout->labels[r] < 0 || (size_t)readout->labels[r] >= run->outputs)
            return pk__fail(context, PK_ARGUMENT, "label %lld of input %zu, of a network with %zu outputs",
                            (long long)readout->labels[r], r, run->outputs);
    for (size_t i = 0; options->groups && i < run->examples; i++)
        if (options->groups[i] < 0 || (size_t)options->groups[i] >= options->group_count)
            return pk__fail(context, PK_ARGUMENT, "example %zu is in group %lld of %zu", i,
                            (long long)options->groups[i], options->group_count);
    if (options->average.kind && options->approximation)
        return pk__fail(context, PK_UNSUPPORTED,
                        "average: rules in place of the exact one are of the last weights");
    pk_status averaged = pk_average_check(context, &options->average, run->steps);
    if (averaged)
        return averaged;
    if ((int)options->engine < 0 || options->engine > PK_ENGINE_INTEGRATED)
        return pk__fail(context, PK_ARGUMENT, "engine %d does not exist", (int)options->engine);
    if (options->bounds && options->quadrature.rule != PK_RULE_AUTO &&
        options->quadrature.rule != PK_RULE_EXACT)
        return pk__fail(context, PK_UNSUPPORTED, "bounds need a rule that measures its error: auto or exact");
    /* The error of p in steps.h relies on p falling as the gradients grow. */
    for (size_t g = 0; options->bounds && g <= run->groups.count; g++)
        if (pk__group_optimizer(&run->optimizer, &run->groups, g)->centered)
            return pk__fail(
                context, PK_UNSUPPORTED,
                "bounds: the divisor of rmsprop centered=1 does not grow with the gradients, so that what "
                "their rounding does to it is not bounded");
    return pk_quadrature_check(context, &options->quadrature, &run->graph, readout);
}

/* Makes the passes over all rows. Either `whole` has arrays, or there is a callback and each pass has arrays of its own. */
static pk_status pk__run_passes(pk__job *job, pk_decomposition *whole, pk_decomposition_part *callback,
                                void *user)
{
    const size_t rows = whole->rows;
    double start = pk__seconds();
    pk_status status =
        job->window.stride && job->run->steps ? pk__steps_save_states(job->context, &job->window) : PK_OK;
    if (!status && job->window.average)
        status = pk__average_run(job);
    for (size_t first = 0; !status && first < rows; first += job->plan.rows) {
        size_t count = pk__min(job->plan.rows, rows - first);
        pk_decomposition part;
        if (callback) {
            part = *whole;
            part.first_row = first;
            part.rows = count;
            status = pk__allocate_results(job->context, job->options, &part);
        } else {
            pk__view_rows(whole, first, count, &part);
        }
        job->part = &part;
        if (!status)
            status = pk__sweep_outputs(job, (double)first / (double)rows, (double)count / (double)rows);
        if (!status) {
            part.passes = pk__blocks(job->outputs, job->plan.outputs);
            pk__add_summary(&part, whole);
            if (callback)
                status = callback(user, &part);
        }
        if (callback)
            pk_decomposition_release(job->context, &part);
    }
    for (size_t w = 0; w < job->plan.threads; w++) {
        whole->seconds_examples += job->window.seconds[w];
        whole->seconds_test += job->workers[w].seconds_test;
        whole->seconds_sums += job->workers[w].integral.seconds;
        whole->seconds_contraction += job->workers[w].product.seconds;
    }
    whole->seconds_read = job->window.seconds_read;
    whole->seconds = pk__seconds() - start;
    whole->unattributed_limit = job->unattributed;
    if (!(job->options->unattributed > 0) && whole->scale < 1)
        whole->unattributed_limit *= whole->scale;
    const pk__approximation *how = job->options->approximation;
    const int exact = !how || (!how->at_one_point &&
                               !how->examples_move); /* what other rules miss is their result, and no error */
    return status || !exact ? status : pk__verdict(job, whole);
}

/* Computes the sizes of the result, the job and its plan, for inputs or, if these have no data, for a number of rows. */
static pk_status pk__plan_job(pk__job *job, pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, int by_pass, pk_decomposition *whole)
{
    memset(whole, 0, sizeof *whole);
    pk_status status = pk__check_options(context, run, inputs.rows, options);
    if (status)
        return status;
    whole->rows = inputs.rows;
    whole->outputs = pk_readout_count(&options->readout, run->graph.output_width);
    whole->examples = run->examples;
    whole->groups = options->group_count;
    whole->steps = run->steps;
    whole->layers = run->graph.columns;
    status = pk__keep(context, options, whole);
    if (status)
        return status;
    pk__job_begin(job, context, run, inputs, options);
    return pk__job_plan(job, inputs.rows, pk__result_bytes(whole, options), by_pass);
}

/* If array is not NULL, it replaces inputs. */
static pk_status pk__decompose(pk_context *context, const pk_run *run, pk_matrix inputs, const pk_array *array,
                               const pk_decompose_options *options, pk_decomposition *whole,
                               pk_decomposition_part *callback, void *user)
{
    pk__job own_job, *job = &own_job;
    pk_decompose_options defaults;
    memset(&defaults, 0, sizeof defaults);
    memset(job, 0, sizeof *job);
    options = options ? options : &defaults;
    pk_status status =
        array ? pk_run_check_inputs(context, run, array, "inputs") : pk__check_inputs(context, run, inputs);
    memset(whole, 0, sizeof *whole);
    if (!status && array)
        inputs.rows = array->shape[0];
    if (!status && !inputs.rows)
        status = pk__fail(context, PK_SHAPE, "inputs: there are none");
    if (!status)
        status = pk__plan_job(job, context, run, inputs, options, callback != NULL, whole);
    if (status)
        return status;
    job->input_array = array;
    if (array) /* with memory of its own, less than that of the job */
        status = pk__check_array(context, run, array);
    if (status)
        return status;
    if (!callback)
        status = pk__allocate_results(context, options, whole);
    if (status)
        return status;
    pk__arena arena = {NULL, 0, 0, 0};
    do
        pk__job_layout(job, &arena);
    while (pk__arena_again(context, &arena, "the decomposition's work", &status));
    if (!status)
        status = pk__run_passes(job, whole, callback, user);
    pk_release(context, arena.base);
    return status;
}

PK_API pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, pk_decomposition *out)
{
    pk_status status = pk__decompose(context, run, inputs, NULL, options, out, NULL, NULL);
    if (status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED)
        pk_decomposition_release(context, out);
    return status;
}

static pk_status pk__decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                     const pk_array *array, const pk_decompose_options *options,
                                     pk_decomposition_part *part, void *user, pk_decomposition *summary)
{
    pk_decomposition own;
    if (!part)
        return pk__fail(context, PK_ARGUMENT, "decomposing in parts needs a function that takes them");
    summary = summary ? summary : &own;
    pk_status status = pk__decompose(context, run, inputs, array, options, summary, part, user);
    memset(summary->kept, 0, sizeof summary->kept);
    summary->kept_count = 0;
    return status;
}

PK_API pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                    const pk_decompose_options *options, pk_decomposition_part *part,
                                    void *user, pk_decomposition *summary)
{
    return pk__decompose_parts(context, run, inputs, NULL, options, part, user, summary);
}

PK_API pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run, const pk_array *inputs,
                                          const pk_decompose_options *options, pk_decomposition_part *part,
                                          void *user, pk_decomposition *summary)
{
    const pk_matrix none = {NULL, 0, 0, 0};
    if (!inputs)
        return pk__fail(context, PK_ARGUMENT, "inputs: no array");
    return pk__decompose_parts(context, run, none, inputs, options, part, user, summary);
}

PK_API pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options, int in_parts, pk_plan *plan)
{
    pk__job job;
    pk_decompose_options defaults;
    pk_decomposition whole;
    memset(&defaults, 0, sizeof defaults);
    memset(&job, 0, sizeof job);
    if (!run || !plan || !rows)
        return pk__fail(context, PK_ARGUMENT, "pk_decompose_plan: no run, no rows or no place for the plan");
    const pk_matrix inputs = {NULL, rows, run->graph.input_width, run->graph.input_width};
    pk_status status =
        pk__plan_job(&job, context, run, inputs, options ? options : &defaults, in_parts, &whole);
    if (!status)
        *plan = job.plan;
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
