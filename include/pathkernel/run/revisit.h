/* pathkernel/run/revisit.h: one step of training, and its repetition: the weights of any step of a run that keeps
 * only every k-th one, bit for bit.
 *
 * pk_train and pk_replay make a step by the same function, from the same weights, state, batch, rate and scale;
 * with the same build, BLIS and kind of processor its bits are the same, for any number of threads. The
 * checksum that was recorded with every step proves it.
 */
#ifndef PATHKERNEL_REVISIT_H
#define PATHKERNEL_REVISIT_H
#include "run.h"

/* >>> declarations */
PK__BEGIN_C

/* What steps are made with. Zeroed = none. graph and train must outlive it. */
typedef struct pk_trainer {
    const pk_graph *graph;
    const pk_dataset *train;
    pk_loss loss;
    pk_optimizer optimizer;
    const pk_parameter_groups *groups; /* NULL: none; must outlive it */
    const double *group_rates;         /* of the groups at the next step; NULL: their factors */
    size_t state_numbers;              /* V P */
    pk_real *gradient;                 /* P: of the last step */
    pk_real *state;                    /* state_numbers: the optimiser's vectors; zero before step 0 */
    pk_gradient_workspace workspace;
    void *memory; /* private */
} pk_trainer;

/* Takes the memory for steps with batches of up to largest_batch examples: (1 + V) P numbers and the workspace
 * of pk_gradient_prepare. The data have passed pk_loss_check, the optimizer pk_optimizer_check. PK_ARGUMENT,
 * or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare(pk_context *context, const pk_graph *graph,
                                                 const pk_dataset *train, pk_loss loss,
                                                 const pk_optimizer *optimizer, size_t largest_batch,
                                                 pk_trainer *trainer);
/* The same with parameter groups (NULL: none). Where these have rates of their own, trainer->group_rates points to them
 * before each step. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare_groups(pk_context *context, const pk_graph *graph,
                                                        const pk_dataset *train, pk_loss loss,
                                                        const pk_optimizer *optimizer,
                                                        const pk_parameter_groups *groups, size_t largest_batch,
                                                        pk_trainer *trainer);
PK_API void pk_trainer_release(pk_context *context, pk_trainer *trainer);

/* One step of training:
 *
 *     g = sum over the batch of c_i grad l_i(weights);  *scale = pk_clip_scale(g, clip_norm), 1 for clip_norm 0;
 *     next = weights + D_s(*scale g)
 *
 * step counts from 0. weights, next (P) do not overlap; scale and objective (at weights) may be NULL.
 * trainer->state moves on. Cost: one pk_batch_gradient and a few passes over P; no allocation.
 * PK_ARGUMENT, PK_SHAPE, PK_NOT_FINITE (the step at which training diverged; the message names it). */
PK_API PK__MUST_USE pk_status pk_training_step(pk_context *context, pk_trainer *trainer, size_t step,
                                               double learning_rate, double clip_norm, const pk_batch *batch,
                                               const pk_real *weights, pk_real *next, double *scale,
                                               double *objective);

/* The weights of a run, in any order. Zeroed = none. Of a run with keep_every = k it repeats the steps from the
 * nearest earlier ones that it holds: its own position, a kept step, or one of at most PK_REPLAY_STOPS stops that
 * it made itself. */
enum { PK_REPLAY_STOPS = 16 };
typedef struct pk_replay {
    const pk_run *run;
    size_t step, repeated; /* read only: the position, SIZE_MAX: none; how many steps were repeated */
    /* private: */
    size_t spacing, stops;        /* steps between stops; how many there is room for */
    size_t stop[PK_REPLAY_STOPS]; /* their steps */
    pk_real *stop_numbers;        /* stops x (1 + V) P */
    pk_real *weights, *next;      /* P */
    pk_trainer trainer;
    void *memory;
} pk_replay;

/* Takes the memory for a run: none for one that keeps every step; otherwise (3 + V) P numbers and the workspace
 * of pk_gradient_prepare, and (1 + V) P for each stop. reach: steps that are asked for in a row, going on
 * backwards from there; stops make that cheap: 0: none. */
PK_API PK__MUST_USE pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach,
                                                pk_replay *replay);
PK_API void pk_replay_release(pk_context *context, pk_replay *replay);

/* weights (P) := w_step, step in [0, run->steps]. Consecutive steps cost one training step each, others up to k.
 * Every repeated step is compared with the checksum of the recording:
 * PK_NOT_REPRODUCED names the step whose bits differ (another build, BLIS or kind of processor, or damaged
 * batches), PK_FORMAT a kept step whose rows are damaged, PK_UNSUPPORTED: kept with fewer digits than pk_real has.
 * PK_ARGUMENT, PK_NOT_FINITE as pk_run_weights. weights is undefined after an error. */
PK_API PK__MUST_USE pk_status pk_replay_weights(pk_context *context, pk_replay *replay, size_t step,
                                                pk_real *weights);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_REVISIT_INTERNALS_KNOWN)
#define PATHKERNEL_REVISIT_INTERNALS_KNOWN
/* >>> internals */
/* The same from an arena, for threads threads; nothing to release. */
PK__INTERNAL void pk__replay_take(pk__arena *arena, const pk_run *run, size_t largest_batch, int threads,
                                  size_t reach, pk_replay *replay);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_REVISIT_IMPLEMENTED)
#define PATHKERNEL_REVISIT_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- one step --------------------------------------------------------------------------------------- */

/* graph, train, loss and optimizer are set. */
static void pk__trainer_take(pk__arena *arena, size_t largest_batch, int threads, pk_trainer *trainer)
{
    const size_t P = trainer->graph->parameters, real = sizeof(pk_real);
    pk_gradient_workspace *workspace = &trainer->workspace;
    if (!pk__multiply(pk_parameter_groups_state_vectors(&trainer->optimizer, trainer->groups), P,
                      &trainer->state_numbers))
        arena->overflow = 1;
    trainer->gradient = pk__arena_take(arena, P, real);
    trainer->state = pk__arena_take(arena, trainer->state_numbers, real);
    memset(workspace, 0, sizeof *workspace);
    workspace->graph = trainer->graph;
    workspace->largest_batch = largest_batch;
    workspace->threads =
        (int)pk__min((size_t)threads, pk__gradient_cut(trainer->graph->spread, largest_batch).groups);
    pk__gradient_take(arena, trainer->graph, workspace);
}

PK_API pk_status pk_trainer_prepare(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                    pk_loss loss, const pk_optimizer *optimizer, size_t largest_batch,
                                    pk_trainer *trainer)
{
    return pk_trainer_prepare_groups(context, graph, train, loss, optimizer, NULL, largest_batch, trainer);
}

PK_API pk_status pk_trainer_prepare_groups(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                           pk_loss loss, const pk_optimizer *optimizer,
                                           const pk_parameter_groups *groups, size_t largest_batch,
                                           pk_trainer *trainer)
{
    if (!graph || !graph->node_count || !train || !optimizer || !trainer || !largest_batch)
        return pk__fail(context, PK_ARGUMENT, "training steps: graph, data, optimizer or batches are missing");
    pk_trainer taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.train = train;
    taken.loss = loss;
    taken.optimizer = *optimizer;
    taken.groups = groups;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__trainer_take(&arena, largest_batch, pk_threads(context), &taken);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "the memory for training steps on %zu examples overflows",
                        largest_batch);
    pk_status status = pk_allocate(context, arena.used, 1, "the memory of a training step", &taken.memory);
    if (status != PK_OK)
        return status;
    pk__arena own = {taken.memory, arena.used, 0, 0};
    pk__trainer_take(&own, largest_batch, pk_threads(context), &taken);
    *trainer = taken;
    return PK_OK;
}

PK_API void pk_trainer_release(pk_context *context, pk_trainer *trainer)
{
    if (!trainer)
        return;
    pk_release(context, trainer->memory);
    memset(trainer, 0, sizeof *trainer);
}

enum { PK__STEP_RANGE = 4096 }; /* parameters that go through a step together, while they are in the cache */

/* next = weights + their update, for one range of the parameters; whether it is finite. */
static int pk__step_range(const pk_trainer *trainer, const pk__update *whole, size_t range)
{
    const size_t first = range * PK__STEP_RANGE;
    pk__update part = *whole;
    part.count = pk__min(whole->count - first, PK__STEP_RANGE);
    part.weights += first;
    part.gradient += part.gradient ? first : 0;
    part.state = part.state ? part.state + first : NULL;
    part.update += first;
    pk__groups_update(&trainer->optimizer, trainer->groups, trainer->group_rates, first, &part);
    const pk_real *weights = part.weights;
    pk_real *next = part.update;
    const size_t count = part.count;
    PK__SIMD
    for (size_t p = 0; p < count; p++)
        next[p] += weights[p];
    return pk__all_finite(next, count);
}

/* Whether all of next is finite. Ranges are independent: threads share them where that is worth their start. */
static int pk__step_update(pk_context *context, const pk_trainer *trainer, const pk__update *whole)
{
    const size_t ranges = pk__blocks(whole->count, PK__STEP_RANGE);
    const int threads = (int)pk__min((size_t)pk_threads(context), pk__max(ranges / 8, 1));
    int finite = 1;
    if (threads > 1) {
        pk__team team = pk__team_of(context, threads, ranges);
        PK__PARALLEL(team)
        for (size_t range = pk__first_task(&team); range < ranges; range = pk__next_task(&team))
            if (!pk__step_range(trainer, whole, range)) {
                PK__ATOMIC_WRITE
                finite = 0;
            }
        pk__team_end(&team);
    } else {
        for (size_t range = 0; range < ranges; range++)
            finite &= pk__step_range(trainer, whole, range);
    }
    return finite;
}

/* The step, whoever makes it. clip_norm 0: *scale is given. */
static pk_status pk__make_step(pk_context *context, pk_trainer *trainer, size_t step, double rate,
                               double clip_norm, const pk_batch *batch, const pk_real *weights, pk_real *next,
                               double *scale, double *objective)
{
    const size_t P = trainer->graph->parameters;
    pk_status status = pk_batch_gradient(context, trainer->graph, trainer->loss, weights, trainer->train, batch,
                                         &trainer->workspace, objective, trainer->gradient);
    if (status != PK_OK)
        return pk__prefix(context, status, "step %zu: ", step);
    pk__groups_forget_frozen(trainer->groups, trainer->gradient);
    if (clip_norm > 0)
        *scale = pk_clip_scale(trainer->gradient, P, clip_norm);
    const pk__update whole = {step, rate, *scale, P, P, weights, trainer->gradient, trainer->state, next};
    if (!pk__step_update(context, trainer, &whole))
        for (size_t p = 0; p < P; p++)
            if (!isfinite(next[p]))
                return pk__fail(context, PK_NOT_FINITE, "step %zu: training diverged, parameter %zu becomes %g",
                                step, p, (double)next[p]);
    return PK_OK;
}

PK_API pk_status pk_training_step(pk_context *context, pk_trainer *trainer, size_t step, double learning_rate,
                                  double clip_norm, const pk_batch *batch, const pk_real *weights,
                                  pk_real *next, double *scale, double *objective)
{
    double used = 1;
    if (!trainer || !trainer->gradient || !batch || !weights || !next)
        return pk__fail(context, PK_ARGUMENT, "step %zu: trainer, batch or weights are missing", step);
    if (!isfinite(learning_rate))
        return pk__fail(context, PK_ARGUMENT, "the learning rate of step %zu is %g", step, learning_rate);
    if (!(clip_norm >= 0))
        return pk__fail(context, PK_ARGUMENT, "the clip_norm of step %zu is %g", step, clip_norm);
    pk_status status =
        pk__make_step(context, trainer, step, learning_rate, clip_norm, batch, weights, next, &used, objective);
    if (scale)
        *scale = used;
    return status;
}

/* ---- replay ----------------------------------------------------------------------------------------- */

/* Whether weights and state are those that the run had at a step. */
PK__PRIVATE int pk__same_step(const pk_run *run, size_t step, const pk_real *weights, const pk_real *state,
                              size_t state_numbers)
{
    const pk_real *kept = step % run->keep_every ? NULL : state;
    return pk__checksum(weights, run->parameters, kept, state_numbers) == run->checksums[step];
}

/* Reads a kept step of a run with keep_every > 1. */
PK__PRIVATE pk_status pk__replay_load(pk_context *context, const pk_run *run, size_t step, pk_real *weights,
                                      pk_real *state, size_t state_numbers)
{
    if (run->weights.type == PK_FLOAT32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_UNSUPPORTED,
                        "keep_every: steps cannot be replayed from weights in float32");
    pk_status status = pk_run_weights(context, run, step, weights);
    if (status != PK_OK)
        return status;
    if (state_numbers)
        status = pk_array_read(context, &run->optimizer_states, step / run->keep_every * state_numbers,
                               state_numbers, state);
    if (status != PK_OK)
        return pk__prefix(context, status, "optimizer_states.npy: the row of step %zu ", step);
    if (!pk__same_step(run, step, weights, state, state_numbers))
        return pk__fail(context, PK_FORMAT,
                        "weights.npy%s: the rows of step %zu are damaged, their checksum differs",
                        state_numbers ? ", optimizer_states.npy" : "", step);
    return PK_OK;
}

PK__INTERNAL void pk__replay_take(pk__arena *arena, const pk_run *run, size_t largest_batch, int threads,
                                  size_t reach, pk_replay *replay)
{
    const size_t P = run->parameters, every = pk__min(run->keep_every, run->steps + 1);
    memset(replay, 0, sizeof *replay);
    replay->run = run;
    replay->step = SIZE_MAX;
    if (run->keep_every == 1)
        return;
    replay->trainer.graph = &run->graph;
    replay->trainer.train = &run->train;
    replay->trainer.loss = run->loss;
    replay->trainer.optimizer = run->optimizer;
    replay->trainer.groups = &run->groups;
    pk__trainer_take(arena, pk__max(largest_batch, 1), threads, &replay->trainer);
    replay->weights = pk__arena_take(arena, P, sizeof(pk_real));
    replay->next = pk__arena_take(arena, P, sizeof(pk_real));
    if (reach && every > 1) {
        replay->spacing = pk__max(reach, pk__blocks(every, PK_REPLAY_STOPS + 1));
        replay->stops = (every - 1) / replay->spacing;
    }
    size_t numbers = 0;
    if (!pk__multiply(P, 1 + pk_parameter_groups_state_vectors(&run->optimizer, &run->groups), &numbers) ||
        !pk__multiply(replay->stops, numbers, &numbers))
        arena->overflow = 1;
    replay->stop_numbers = pk__arena_take(arena, numbers, sizeof(pk_real));
    for (int i = 0; i < PK_REPLAY_STOPS; i++)
        replay->stop[i] = SIZE_MAX;
}

PK_API pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach, pk_replay *replay)
{
    if (!run || !replay || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_replay_prepare: no run or no replay");
    pk_replay taken;
    size_t largest = 1;
    for (size_t s = 0; s < run->steps; s++)
        largest = pk__max(largest, (size_t)(run->batch_offsets[s + 1] - run->batch_offsets[s]));
    pk__arena arena = {NULL, 0, 0, 0};
    pk__replay_take(&arena, run, largest, pk_threads(context), reach, &taken);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "the memory of a replay overflows");
    void *memory = NULL;
    pk_status status = pk_allocate(context, arena.used, 1, "the memory of a replay", &memory);
    if (status != PK_OK)
        return status;
    pk__arena own = {memory, arena.used, 0, 0};
    if (memory)
        pk__replay_take(&own, run, largest, pk_threads(context), reach, &taken);
    taken.memory = memory;
    *replay = taken;
    return PK_OK;
}

PK_API void pk_replay_release(pk_context *context, pk_replay *replay)
{
    if (!replay)
        return;
    pk_release(context, replay->memory);
    memset(replay, 0, sizeof *replay);
}

/* The room of the stop at replay->step, or NULL where none belongs. */
static pk_real *pk__replay_stop(const pk_replay *replay, size_t step, size_t *index)
{
    size_t within = step % replay->run->keep_every;
    if (!replay->stops || !within || within % replay->spacing)
        return NULL;
    *index = within / replay->spacing - 1;
    return replay->stop_numbers + *index * (replay->run->parameters + replay->trainer.state_numbers);
}

/* Goes to the latest step up to `step` whose weights and state are at hand. */
static pk_status pk__replay_start(pk_context *context, pk_replay *replay, size_t step)
{
    const size_t P = replay->run->parameters, state = replay->trainer.state_numbers;
    size_t kept = step - step % replay->run->keep_every, best = kept, index = 0, found = 0;
    for (size_t i = 0; i < replay->stops; i++)
        if (replay->stop[i] != SIZE_MAX && replay->stop[i] <= step && replay->stop[i] > best)
            best = replay->stop[i], found = i + 1;
    /* Also from just before: it proves the step into a kept one. */
    if (replay->step != SIZE_MAX && replay->step <= step && replay->step + 1 >= best)
        return PK_OK;
    replay->step = SIZE_MAX; /* until it is there */
    if (found) {
        const pk_real *stop = pk__replay_stop(replay, best, &index);
        memcpy(replay->weights, stop, P * sizeof *stop);
        if (state)
            memcpy(replay->trainer.state, stop + P, state * sizeof *stop);
    } else {
        pk_status status =
            pk__replay_load(context, replay->run, kept, replay->weights, replay->trainer.state, state);
        if (status != PK_OK)
            return status;
    }
    replay->step = best;
    return PK_OK;
}

/* One step on. */
static pk_status pk__replay_advance(pk_context *context, pk_replay *replay)
{
    const pk_run *run = replay->run;
    const size_t P = run->parameters, state = replay->trainer.state_numbers, step = replay->step;
    double scale = pk_run_gradient_scale(run, step);
    pk_batch batch;
    pk_run_batch(run, step, &batch);
    replay->trainer.group_rates = pk_run_group_rates(run, step);
    replay->step = SIZE_MAX; /* after an error, the state belongs to no step */
    pk_status status = pk__make_step(context, &replay->trainer, step, run->learning_rates[step], 0, &batch,
                                     replay->weights, replay->next, &scale, NULL);
    if (status != PK_OK)
        return pk__prefix(context, PK_NOT_REPRODUCED, "replay: ");
    if (!pk__same_step(run, step + 1, replay->next, replay->trainer.state, state))
        return pk__fail(
            context, PK_NOT_REPRODUCED,
            "replaying step %zu gives other bits than were recorded at step %zu: another build, BLIS "
            "or processor than that of the training, or damaged files",
            step, step + 1);
    pk_real *weights = replay->next;
    replay->next = replay->weights;
    replay->weights = weights;
    replay->step = step + 1;
    replay->repeated++;
    size_t index = 0;
    pk_real *stop = pk__replay_stop(replay, step + 1, &index);
    if (stop) {
        memcpy(stop, weights, P * sizeof *stop);
        if (state)
            memcpy(stop + P, replay->trainer.state, state * sizeof *stop);
        replay->stop[index] = step + 1;
    }
    return PK_OK;
}

PK_API pk_status pk_replay_weights(pk_context *context, pk_replay *replay, size_t step, pk_real *weights)
{
    if (!replay || !replay->run || !weights)
        return pk__fail(context, PK_ARGUMENT, "pk_replay_weights: no replay or no weights");
    const pk_run *run = replay->run;
    if (run->keep_every == 1 || step > run->steps)
        return pk_run_weights(context, run, step, weights);
    pk_status status = pk__replay_start(context, replay, step);
    while (status == PK_OK && replay->step < step)
        status = pk__replay_advance(context, replay);
    if (status == PK_OK)
        memcpy(weights, replay->weights, run->parameters * sizeof *weights);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
