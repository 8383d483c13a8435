/* pathkernel/run/revisit.h: going back in a run: one step of training and its repetition, the weights of any step of a run that
 * keeps only every k-th one, and snapshots of whatever can only be computed forwards.
 *
 * pk_train and pk_replay make a step by the same function, from the same weights, state, batch, rate and scale; with the
 * same build, BLIS and kind of processor its bits are the same, for any number of threads. The checksum that was recorded with
 * every step proves it.
 *
 * A decomposition in reverse time visits the steps last to first, but weights between kept steps and states of an
 * optimizer come from those before them. With a snapshot of every step that is cheap and large, with none it takes n^2 / 2
 * steps. Snapshots at few places, moved as the visits go back, do nearly as well as many (Griewank and Walther 2000): with s of
 * them, binomial(s + r, r) positions are visited with none gone through more than r times. pk__checkpoints is that schedule, and
 * all that goes back in a run uses it: pk_replay for weights with the state that training had, and the steps of an
 * attribution for the state of the optimizer that is computed again from the recorded weights (attribution/steps.h). These
 * two states differ by rounding: the second one belongs to the update whose difference to the recorded step is reported as
 * unattributed, is there for runs that other programs have recorded, and has variants with changed gradients for the bounds.
 */
#ifndef PATHKERNEL_REVISIT_H
#define PATHKERNEL_REVISIT_H
#include "run.h"

/* >>> declarations */
PK__BEGIN_C

/* What a step of training needs, with its memory. Zeroed: none. graph and train must outlive it. */
typedef struct pk_trainer {
    const pk_graph *graph;
    const pk_dataset *train;
    pk_criterion criterion; /* its weights must outlive it */
    pk_optimizer optimizer;
    const pk_parameter_groups *groups; /* NULL: none; must outlive it */
    const double *group_rates;         /* the groups' rates at the next step; NULL: their factors hold */
    size_t state_numbers;              /* V P */
    pk_real *gradient;                 /* P: of the last step */
    /* state_numbers: the optimizer's vectors; zero before step 0, or what the caller sets, who gave an optimizer with initial_state. */
    pk_real *state;
    pk_gradient_workspace workspace;
    void *memory; /* private */
} pk_trainer;

/* Allocates the memory for steps with batches of up to largest_batch examples: (1 + V) P numbers and the workspace
 * of pk_gradient_prepare. The data have passed pk_loss_check, the optimizer pk_optimizer_check. PK_ARGUMENT,
 * or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare(pk_context *context, const pk_graph *graph,
                                                 const pk_dataset *train, pk_loss loss,
                                                 const pk_optimizer *optimizer, size_t largest_batch,
                                                 pk_trainer *trainer);
/* The same with parameter groups (NULL: none). If these have rates of their own, the caller sets trainer->group_rates
 * before each step. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare_groups(pk_context *context, const pk_graph *graph,
                                                        const pk_dataset *train, pk_loss loss,
                                                        const pk_optimizer *optimizer,
                                                        const pk_parameter_groups *groups, size_t largest_batch,
                                                        pk_trainer *trainer);
/* The same of a loss with options. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare_with(pk_context *context, const pk_graph *graph,
                                                      const pk_dataset *train, const pk_criterion *criterion,
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
 * trainer->state is updated. Cost: one pk_batch_gradient and a few passes over P; no allocation.
 * PK_ARGUMENT, PK_SHAPE, PK_NOT_FINITE (the step at which training diverged; the message names it). */
PK_API PK__MUST_USE pk_status pk_training_step(pk_context *context, pk_trainer *trainer, size_t step,
                                               double learning_rate, double clip_norm, const pk_batch *batch,
                                               const pk_real *weights, pk_real *next, double *scale,
                                               double *objective);

/* Private: snapshots, see pk__checkpoints_take. */
typedef struct pk__checkpoints {
    size_t numbers;       /* of a snapshot */
    size_t stride, fixed; /* kept for good before the positions stride, 2 stride ..., fixed of them */
    size_t spare, used;   /* room for others; how many there are */
    size_t base;          /* of the position that was asked for last: the nearest that is kept for good */
    size_t *at;           /* their positions, ascending */
    pk_real *saved;       /* (fixed + spare) x numbers */
} pk__checkpoints;

/* The weights of a run, in any order. Zeroed = none. Of a run with keep_every = k it repeats the steps from the
 * nearest earlier ones that it holds: its own position, a kept step, or one of at most PK_REPLAY_STOPS snapshots that
 * it made itself. */
enum { PK_REPLAY_STOPS = 16 };
typedef struct pk_replay {
    const pk_run *run;
    size_t step, repeated; /* read only: the position (SIZE_MAX: none), and the number of repeated steps */
    /* private: */
    size_t reach;   /* steps that are asked for in a row, going on backwards from there; 0: not known */
    size_t spacing; /* of snapshots while the steps are asked for one after another */
    pk__checkpoints checkpoints; /* of weights and state, by step */
    pk_real *weights, *next;     /* P */
    pk_trainer trainer;
    void *memory;
} pk_replay;

/* Takes the memory for a run: none for one that keeps every step; otherwise (3 + V) P numbers and the workspace
 * of pk_gradient_prepare, and (1 + V) P for each snapshot. reach: steps that are asked for in a row, going on
 * backwards from there; snapshots make that cheap: 0: none. */
PK_API PK__MUST_USE pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach,
                                                pk_replay *replay);
PK_API void pk_replay_release(pk_context *context, pk_replay *replay);

/* weights (P) := w_step, step in [0, run->steps]. Consecutive steps cost one training step each, others up to k.
 * Every repeated step is compared with the checksum of the recording:
 * PK_NOT_REPRODUCED names the step whose bits differ (another build, BLIS or kind of processor, or damaged
 * batches), PK_FORMAT a recorded step whose rows are damaged. PK_UNSUPPORTED: recorded with fewer digits than pk_real has.
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
/* Snapshots of a state with that many numbers, which is computed forwards, position after position, so that `positions` of them
 * can be visited in any order, cheaply from the last to the first. stride: one is kept for good before every stride-th
 * position; 0: none. spare: others are made and moved on the way. */
PK__INTERNAL void pk__checkpoints_take(pk__arena *arena, size_t positions, size_t stride, size_t spare,
                                       size_t numbers, pk__checkpoints *checkpoints);
/* How many of `positions` consecutive ones are gone through again when all are visited, last to first, with the state
 * before the first and room for spare more. */
PK__INTERNAL double pk__checkpoints_again(size_t positions, size_t spare);
/* Where the snapshot that is kept for good before a position is to be written, or NULL where none is. */
PK__INTERNAL pk_real *pk__checkpoints_fixed(const pk__checkpoints *checkpoints, size_t position);
/* The nearest position up to `position` with a snapshot, or `base`, the caller's own one, where *snapshot is NULL. Those behind
 * `position` are given up; those before `base` when others need their room. */
PK__INTERNAL size_t pk__checkpoints_find(pk__checkpoints *checkpoints, size_t base, size_t position,
                                         const pk_real **snapshot);
/* On the way from a position to a later one, which is visited next and then those before it at distances of `unit`: how far
 * to go before a snapshot is due. */
PK__INTERNAL size_t pk__checkpoints_next(pk__checkpoints *checkpoints, size_t from, size_t position,
                                         size_t unit);
/* Where the snapshot of a position that pk__checkpoints_next named is to be written, or NULL where there is no room. */
PK__INTERNAL pk_real *pk__checkpoints_add(pk__checkpoints *checkpoints, size_t position);
/* pk_replay_prepare from an arena, for threads threads; nothing to release. */
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
        (int)pk__min((size_t)threads, pk__gradient_cut(trainer->graph->untied, largest_batch).groups);
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
    const pk_criterion criterion = pk__criterion_of(loss);
    return pk_trainer_prepare_with(context, graph, train, &criterion, optimizer, groups, largest_batch,
                                   trainer);
}

PK_API pk_status pk_trainer_prepare_with(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                         const pk_criterion *criterion, const pk_optimizer *optimizer,
                                         const pk_parameter_groups *groups, size_t largest_batch,
                                         pk_trainer *trainer)
{
    if (!graph || !graph->node_count || !train || !criterion || !optimizer || !trainer || !largest_batch)
        return pk__fail(context, PK_ARGUMENT,
                        "training steps: graph, data, loss, optimizer or batches are missing");
    pk_trainer taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.train = train;
    taken.criterion = *criterion;
    taken.optimizer = *optimizer;
    taken.groups = groups;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status;
    do
        pk__trainer_take(&arena, largest_batch, pk_threads(context), &taken);
    while (pk__arena_again(context, &arena, "the memory of a training step", &status));
    if (status)
        return status;
    taken.memory = arena.base;
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
    pk_status status =
        pk_batch_gradient_with(context, trainer->graph, &trainer->criterion, weights, trainer->train, batch,
                               &trainer->workspace, objective, trainer->gradient);
    if (status)
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

/* ---- snapshots -------------------------------------------------------------------------------------- */

/* Positions that can be visited last to first with states states (the first one's among them) where none is gone
 * through more than again times: binomial(states + again, again). */
static double pk__binomial(double states, double again)
{
    double reach = again >= 0;
    for (double k = 1; k <= again; k++)
        reach = reach * (states + k) / k;
    return reach;
}

/* The fewest times that will do: pk__binomial(states, again) >= positions. */
static double pk__repeats(double positions, double states)
{
    double again = 0;
    for (double reach = 1; reach < positions; reach = reach * (states + again) / again)
        again++;
    return again;
}

PK__INTERNAL double pk__checkpoints_again(size_t positions, size_t spare)
{
    const double count = (double)positions, states = (double)spare + 1;
    if (!spare) /* the formula below, at once */
        return positions ? count * (count - 1) / 2 : 0;
    const double again = pk__repeats(count, states);
    return again * count - pk__binomial(states + 1, again - 1);
}

/* How far ahead of a state the next one belongs, of positions >= 2 to be visited with states >= 2. */
static size_t pk__next_state(size_t positions, size_t states)
{
    const double count = (double)positions, all = (double)states, again = pk__repeats(count, all);
    const double most = pk__binomial(all, again - 1), left = count - pk__binomial(all - 1, again - 1);
    return (size_t)floor((most < left ? most : left) + 0.5);
}

PK__INTERNAL void pk__checkpoints_take(pk__arena *arena, size_t positions, size_t stride, size_t spare,
                                       size_t numbers, pk__checkpoints *checkpoints)
{
    checkpoints->numbers = numbers;
    checkpoints->stride = stride;
    checkpoints->fixed = stride && positions ? (positions - 1) / stride : 0;
    checkpoints->spare = spare;
    checkpoints->used = checkpoints->base = 0;
    checkpoints->saved = NULL;
    if (numbers > SIZE_MAX / sizeof(pk_real))
        arena->overflow = 1;
    else
        checkpoints->saved = pk__arena_take(arena, checkpoints->fixed + spare, numbers * sizeof(pk_real));
    checkpoints->at = pk__arena_take(arena, spare, sizeof *checkpoints->at);
}

PK__INTERNAL pk_real *pk__checkpoints_fixed(const pk__checkpoints *checkpoints, size_t position)
{
    const size_t stride = checkpoints->stride;
    if (!stride || !position || position % stride || position / stride > checkpoints->fixed)
        return NULL;
    return checkpoints->saved + (position / stride - 1) * checkpoints->numbers;
}

PK__INTERNAL size_t pk__checkpoints_find(pk__checkpoints *checkpoints, size_t base, size_t position,
                                         const pk_real **snapshot)
{
    const size_t stride = checkpoints->stride, kept = stride ? position - position % stride : 0;
    *snapshot = NULL;
    if (kept > base) {
        *snapshot = pk__checkpoints_fixed(checkpoints, kept);
        base = kept;
    }
    while (checkpoints->used && checkpoints->at[checkpoints->used - 1] > position)
        checkpoints->used--;
    checkpoints->base = base;
    if (!checkpoints->used || checkpoints->at[checkpoints->used - 1] < base)
        return base;
    *snapshot = checkpoints->saved + (checkpoints->fixed + checkpoints->used - 1) * checkpoints->numbers;
    return checkpoints->at[checkpoints->used - 1];
}

/* Room for one more, or for as many as there may be. Those before the base are of another part of the run. */
static size_t pk__checkpoints_room(pk__checkpoints *checkpoints)
{
    if (checkpoints->used && checkpoints->at[0] < checkpoints->base)
        checkpoints->used = 0;
    return checkpoints->spare - checkpoints->used;
}

PK__INTERNAL size_t pk__checkpoints_next(pk__checkpoints *checkpoints, size_t from, size_t position,
                                         size_t unit)
{
    if (!unit || position - from <= unit) /* nothing between is visited */
        return position;
    const size_t units = (position - from) / unit, room = pk__checkpoints_room(checkpoints);
    return room ? position - (units - pk__next_state(units + 1, room + 1)) * unit : position;
}

PK__INTERNAL pk_real *pk__checkpoints_add(pk__checkpoints *checkpoints, size_t position)
{
    if (!pk__checkpoints_room(checkpoints))
        return NULL;
    checkpoints->at[checkpoints->used] = position;
    return checkpoints->saved + (checkpoints->fixed + checkpoints->used++) * checkpoints->numbers;
}

/* ---- replay ----------------------------------------------------------------------------------------- */

/* Whether weights and state have the checksum that the run recorded for a step. */
PK__PRIVATE int pk__same_step(const pk_run *run, size_t step, const pk_real *weights, const pk_real *state,
                              size_t state_numbers)
{
    const pk_real *kept = step % run->keep_every ? NULL : state;
    return pk__checksum(weights, run->parameters, kept, state_numbers) == run->checksums[step];
}

/* Reads weights and state of a recorded step, for a run with keep_every > 1. */
PK__PRIVATE pk_status pk__replay_load(pk_context *context, const pk_run *run, size_t step, pk_real *weights,
                                      pk_real *state, size_t state_numbers)
{
    if (run->weights.type == PK_FLOAT32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_UNSUPPORTED,
                        "keep_every: steps cannot be replayed from weights in float32");
    pk_status status = pk_run_weights(context, run, step, weights);
    if (status)
        return status;
    if (state_numbers)
        status = pk_array_read(context, &run->optimizer_states, step / run->keep_every * state_numbers,
                               state_numbers, state);
    if (status)
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
    replay->trainer.criterion = run->criterion;
    replay->trainer.optimizer = run->optimizer;
    replay->trainer.groups = &run->groups;
    pk__trainer_take(arena, pk__max(largest_batch, 1), threads, &replay->trainer);
    replay->weights = pk__arena_take(arena, P, sizeof(pk_real));
    replay->next = pk__arena_take(arena, P, sizeof(pk_real));
    const size_t spare = reach ? pk__min(PK_REPLAY_STOPS, (every - 1) / reach) : 0;
    size_t numbers = 0;
    if (!pk__multiply(P, 1 + pk_parameter_groups_state_vectors(&run->optimizer, &run->groups), &numbers))
        arena->overflow = 1;
    replay->reach = reach;
    replay->spacing = pk__max(reach, pk__blocks(every, spare + 1));
    pk__checkpoints_take(arena, 0, 0, spare, numbers, &replay->checkpoints);
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
    pk_status status;
    do
        pk__replay_take(&arena, run, largest, pk_threads(context), reach, &taken);
    while (pk__arena_again(context, &arena, "the memory of a replay", &status));
    if (status)
        return status;
    taken.memory = arena.base;
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

/* Goes to the latest step up to `step` whose weights and state are at hand. */
static pk_status pk__replay_start(pk_context *context, pk_replay *replay, size_t step)
{
    const size_t P = replay->run->parameters, state = replay->trainer.state_numbers;
    const size_t kept = step - step % replay->run->keep_every;
    const pk_real *snapshot;
    const size_t best = pk__checkpoints_find(&replay->checkpoints, kept, step, &snapshot);
    /* The own position, where that is not farther; also from just before a kept step: it proves the step into that. */
    if (replay->step != SIZE_MAX && replay->step <= step && replay->step + (best == kept) >= best)
        return PK_OK;
    replay->step = SIZE_MAX; /* until it is there */
    if (snapshot) {
        memcpy(replay->weights, snapshot, P * sizeof *snapshot);
        if (state)
            memcpy(replay->trainer.state, snapshot + P, state * sizeof *snapshot);
    } else {
        pk_status status =
            pk__replay_load(context, replay->run, kept, replay->weights, replay->trainer.state, state);
        if (status)
            return status;
    }
    replay->step = best;
    return PK_OK;
}

/* Whether the position is so far from what is kept before it that whoever goes on backwards from here would miss it; of
 * those that will be asked for, which are `reach` apart. */
static int pk__replay_is_spaced(const pk_replay *replay)
{
    const pk__checkpoints *checkpoints = &replay->checkpoints;
    const size_t kept = replay->step - replay->step % replay->run->keep_every;
    const size_t last = checkpoints->used ? checkpoints->at[checkpoints->used - 1] : kept;
    return replay->reach && replay->step % replay->reach == 0 &&
           replay->step >= pk__max(last, kept) + replay->spacing;
}

/* Keeps weights and state of the position, where there is room. */
static void pk__replay_remember(pk_replay *replay)
{
    const size_t P = replay->run->parameters, state = replay->trainer.state_numbers;
    pk_real *snapshot = pk__checkpoints_add(&replay->checkpoints, replay->step);
    if (!snapshot)
        return;
    memcpy(snapshot, replay->weights, P * sizeof *snapshot);
    if (state)
        memcpy(snapshot + P, replay->trainer.state, state * sizeof *snapshot);
}

/* One step on. */
static pk_status pk__replay_advance(pk_context *context, pk_replay *replay)
{
    const pk_run *run = replay->run;
    const size_t state = replay->trainer.state_numbers, step = replay->step;
    double scale = pk_run_gradient_scale(run, step);
    pk_batch batch;
    pk_run_batch(run, step, &batch);
    replay->trainer.group_rates = pk_run_group_rates(run, step);
    replay->step = SIZE_MAX; /* after an error, the state belongs to no step */
    pk_status status = pk__make_step(context, &replay->trainer, step, run->learning_rates[step], 0, &batch,
                                     replay->weights, replay->next, &scale, NULL);
    if (status)
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
    while (!status && replay->step < step) {
        const size_t next = pk__checkpoints_next(&replay->checkpoints, replay->step, step, replay->reach);
        while (!status && replay->step < next)
            status = pk__replay_advance(context, replay);
        if (!status && (next < step || pk__replay_is_spaced(replay)))
            pk__replay_remember(replay);
    }
    if (!status)
        memcpy(weights, replay->weights, run->parameters * sizeof *weights);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
