/* pathkernel/run/train.h: the training loop: batches, gradient, clipping, update, recording, resuming.
 *
 * The bits of every step depend on the options alone, neither on the number of threads nor on recording, nor on where a
 * run was interrupted and resumed.
 */
#ifndef PATHKERNEL_TRAIN_H
#define PATHKERNEL_TRAIN_H
#include "../base/random.h"
#include "record.h"
#include "revisit.h"

/* >>> declarations */
PK__BEGIN_C

/* How to train; zero means the default. */
typedef struct pk_train_options {
    pk_loss loss;                  /* required, unless there is a criterion */
    const pk_criterion *criterion; /* a loss with options; NULL: the loss with PyTorch's defaults */
    pk_optimizer optimizer;        /* zero: plain SGD */
    pk_schedule schedule;          /* schedule.rate alone: that rate at every step */
    /* To go on from a state which the optimizer reached in training that is not a part of this: its vectors (V P, as in pk_trainer),
     * and how many updates it had made. NULL and 0: it begins without one. It is recorded (run.h, initial_state.npy). */
    const pk_real *initial_state;
    size_t initial_step;
    /* Parameter groups: group_count lines such as "1,3,5-7 weight_decay=0 rate=0.1" (groups.h), or none; their schedules,
     * one a group, of rates that are no factors, or NULL. */
    const char *const *groups;
    size_t group_count;
    const pk_schedule *group_schedules;
    size_t steps;      /* S: the number of updates from w_0, those already recorded included */
    size_t batch_size; /* 0, or N and more: full batches in row order */
    int shuffle_off;   /* 1: mini-batches in row order; default: a new permutation every epoch */
    uint64_t seed;     /* of the permutations; epoch e is stream e */
    double clip_norm;  /* the gradient's largest norm (torch's clip_grad_norm_); 0: no clipping */

    const char *record; /* a run directory to write; NULL: none */
    int resume;         /* 1: continue the run in `record`, if there is one */
    int replace;        /* 1: remove the run in `record` first, if there is one */
    int record_float32, record_second_moments;
    size_t keep_every; /* k > 1: record the weights of every k-th step only (record.h); 0 or 1: of every step */

    /* Called after each step of this call (recorded already): the batch's objective at w_step, and
     * w_{step+1} (P); those of pk_train are not up to date meanwhile. Non-zero ends training with PK_CANCELLED. */
    int (*on_step)(void *user, size_t step, double objective, const pk_real *weights);
    void *user;
} pk_train_options;

typedef struct pk_train_result {
    size_t steps;     /* steps from w_0 to the weights returned */
    size_t resumed;   /* of these, steps that were read from the recording */
    double objective; /* of the last batch trained on, before its update; NaN when no step was made */
} pk_train_result;

/* weights (P): in w_0, out w_S.
 *
 *     g = sum over the batch of c_i grad l_i(w_s);  w_{s+1} = w_s + D_s(clip(g))
 *
 * c_i = 1 / |B_s|, or with class weights or ignore_index what pk_criterion_mean gives, which is recorded then.
 *
 * Mini-batches are consecutive slices of an epoch's permutation, the last one smaller. The progress
 * callback of the context is called after each step. Parallel inside a batch.
 *
 * resume: the recorded steps must be those that these options give (w_0, batches, rates); the optimizer's
 * state is read where the recording kept it last, at most 17 steps before its end (with keep_every: at the last
 * kept step; from step 0 where an older version recorded), and rebuilt from there by recomputing the gradients
 * along the recorded weights; training goes on to the same bits as without the interruption. A recording coarser
 * than pk_real cannot do that: PK_UNSUPPORTED.
 *
 * Also after an error or a cancel, weights are those of the last complete step, result (may be NULL) tells
 * its number, and the recording holds every step up to it.
 * PK_ARGUMENT, PK_SHAPE, PK_NOT_FINITE (the step at which training diverged; it is not recorded), PK_IO,
 * PK_CANCELLED, PK_MEMORY, PK_MEMORY_LIMIT. */
PK_API PK__MUST_USE pk_status pk_train(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                       const pk_train_options *options, pk_real *weights,
                                       pk_train_result *result);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_TRAIN_IMPLEMENTED)
#define PATHKERNEL_TRAIN_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* The state of a training run between steps. */
typedef struct pk__training {
    const pk_graph *graph;
    const pk_dataset *train;
    const pk_train_options *options;
    size_t examples, batch_size, per_epoch; /* batches an epoch */
    size_t epoch;                           /* the epoch whose permutation is in `order` */
    int64_t *order;                         /* examples */
    pk_real *next;                          /* P: w_{s+1} */
    pk_parameter_groups groups;
    double *group_rates; /* of a step, or NULL */
    pk_criterion criterion;
    double *item_weights; /* of a batch, where a mean is over weights of labels, or NULL */
    pk_trainer trainer;
    pk_recorder recorder;
} pk__training;

/* What a step used and gave. */
typedef struct pk__step {
    pk_batch batch;
    double rate, scale, objective;
} pk__step;

/* Makes the batch of any step; the steps before it are not needed. */
static void pk__training_batch(pk__training *t, size_t step, pk_batch *batch)
{
    size_t epoch = step / t->per_epoch, first = step % t->per_epoch * t->batch_size;
    if (epoch != t->epoch) {
        for (size_t i = 0; i < t->examples; i++)
            t->order[i] = (int64_t)i;
        if (t->batch_size < t->examples && !t->options->shuffle_off) {
            pk_random random;
            random.seed = t->options->seed;
            random.stream = epoch;
            random.counter = 0;
            pk_random_shuffle(&random, t->examples, t->order);
        }
        t->epoch = epoch;
    }
    batch->count = t->examples - first < t->batch_size ? t->examples - first : t->batch_size;
    batch->items = t->order + first;
    batch->weights = t->item_weights;
    if (t->item_weights)
        pk_criterion_mean(&t->criterion, t->train, batch->items, batch->count, t->item_weights);
}

/* The learning rate of a step; those of the groups go to t->group_rates. */
static double pk__training_rate(pk__training *t, size_t step)
{
    for (size_t g = 0; t->group_rates && g < t->groups.count; g++)
        t->group_rates[g] =
            t->groups.group[g].frozen ? 0 : pk_schedule_rate(&t->options->group_schedules[g], step);
    return pk_schedule_rate(&t->options->schedule, step);
}

/* Computes t->next = w_{step+1} from weights = w_step, and updates the optimizer's state. */
static pk_status pk__training_next(pk_context *context, pk__training *t, size_t step, const pk_real *weights,
                                   pk__step *made)
{
    const pk_train_options *options = t->options;
    pk__training_batch(t, step, &made->batch);
    if (t->item_weights && !isfinite(t->item_weights[0]))
        return pk__fail(context, PK_NOT_FINITE,
                        "step %zu: each label of the batch is ignored or has the weight 0, so that the mean of "
                        "the losses is 0 / 0",
                        step);
    made->rate = pk__training_rate(t, step);
    t->trainer.group_rates = t->group_rates;
    for (size_t g = 0; t->group_rates && g < t->groups.count; g++)
        if (!isfinite(t->group_rates[g]) || t->group_rates[g] < 0)
            return pk__fail(context, PK_ARGUMENT, "the learning rate of group %zu at step %zu is %g", g, step,
                            t->group_rates[g]);
    return pk_training_step(context, &t->trainer, step, made->rate, options->clip_norm, &made->batch, weights,
                            t->next, &made->scale, &made->objective);
}

/* Whether t->next and the state are those of a recorded step, bit for bit. */
static pk_status pk__training_compare(pk_context *context, pk__training *t, const pk_run *run, size_t step,
                                      int *same)
{
    if (run->keep_every > 1) {
        *same = pk__same_step(run, step, t->next, t->trainer.state, t->trainer.state_numbers);
        return PK_OK;
    }
    pk_real *there = t->trainer.gradient; /* free between steps */
    pk_status status = pk_run_weights(context, run, step, there);
    *same = !status && memcmp(there, t->next, run->parameters * sizeof *there) == 0;
    return status;
}

/* Sets the optimizer's state before step 0. */
static void pk__training_begin(pk__training *t)
{
    const size_t bytes = t->trainer.state_numbers * sizeof *t->trainer.state;
    if (bytes && t->options->initial_state)
        memcpy(t->trainer.state, t->options->initial_state, bytes);
    else if (bytes)
        memset(t->trainer.state, 0, bytes);
}

/* Recomputes the optimizer's state after the recorded steps and checks that these options give the recorded weights. t->next has
 * the last recorded weights in the end. */
static pk_status pk__training_replay(pk_context *context, pk__training *t, const pk_run *run, pk_real *weights)
{
    const char *folder = t->options->record;
    if (run->weights.type == PK_FLOAT32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s was recorded as float32: training cannot go on to the same bits", folder);
    /* A rule without state needs no gradient of the past, nor does one whose state was kept; at least one step is
     * checked all the same. */
    size_t last = run->steps - 1, from = t->trainer.state_numbers ? 0 : last;
    if (run->keep_every > 1)
        from = last - last % run->keep_every;
    if (run->keep_every == 1 && t->trainer.state_numbers) {
        size_t kept = SIZE_MAX;
        pk_status status =
            pk__recorder_find_state(context, folder, run, &t->recorder, weights, t->trainer.state, &kept);
        if (status)
            return status;
        if (kept != SIZE_MAX)
            from = kept;
        else
            pk__training_begin(t);
    }
    for (size_t s = 0; s < run->steps; s++) {
        pk__step made;
        pk_batch there;
        pk_run_batch(run, s, &there);
        pk__training_batch(t, s, &made.batch);
        made.rate = pk__training_rate(t, s);
        if (there.count != made.batch.count || !there.weights != !made.batch.weights ||
            memcmp(there.items, made.batch.items, there.count * sizeof *there.items) != 0 ||
            (there.weights &&
             memcmp(there.weights, made.batch.weights, there.count * sizeof *there.weights) != 0))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its step %zu used another batch",
                            folder, s);
        if (run->learning_rates[s] != made.rate)
            return pk__fail(context, PK_ARGUMENT,
                            "%s cannot be resumed: the rate of its step %zu is %.17g, not %.17g", folder, s,
                            run->learning_rates[s], made.rate);
        for (size_t g = 0; t->group_rates && g < t->groups.count; g++)
            if (!t->groups.group[g].frozen && pk_run_group_rates(run, s)[g] != t->group_rates[g])
                return pk__fail(
                    context, PK_ARGUMENT,
                    "%s cannot be resumed: the rate of group %zu at its step %zu is %.17g, not %.17g", folder,
                    g, s, pk_run_group_rates(run, s)[g], t->group_rates[g]);
        if (s < from)
            continue;
        int same = 0;
        pk_status status = PK_OK;
        if (s == from && run->keep_every > 1)
            status = pk__replay_load(context, run, s, weights, t->trainer.state, t->trainer.state_numbers);
        else if (s == from)
            status = pk_run_weights(context, run, s, weights);
        if (!status)
            status = pk__training_next(context, t, s, weights, &made);
        if (!status)
            status = pk__training_compare(context, t, run, s + 1, &same);
        if (status)
            return status;
        if (!same)
            return pk__fail(
                context, PK_ARGUMENT,
                "%s cannot be resumed: its step %zu was made by other options, or by another build or "
                "processor whose sums round otherwise",
                folder, s);
        if (pk_run_gradient_scale(run, s) != made.scale)
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its step %zu was clipped otherwise",
                            folder, s);
        memcpy(weights, t->next, run->parameters * sizeof *weights);
        const size_t every = run->steps - s > 2 * (size_t)PK__RESUME_EVERY ? PK__RESUME_EVERY : 1;
        pk__recorder_keep_state(&t->recorder, s + 1, every, t->trainer.state, t->next);
        status = pk__progress(context, "replaying the recorded steps", (double)(s + 1) / (double)run->steps);
        if (status)
            return status;
    }
    return PK_OK;
}

/* Opens the recording; with resume, moves on to where it ends. */
static pk_status pk__training_record(pk_context *context, pk__training *t, pk_real *weights, size_t *done)
{
    const pk_train_options *options = t->options;
    size_t parameters = t->graph->parameters;
    char optimizer[256], *loss = NULL;
    if (!t->graph->text)
        return pk__fail(context, PK_UNSUPPORTED, "%s: a graph without a network line cannot be recorded",
                        options->record);
    pk_status status = pk_optimizer_format(&options->optimizer, optimizer, sizeof optimizer);
    if (status)
        return pk__fail(context, status, "%s: the optimizer cannot be written down", options->record);
    pk_recorder_options recording;
    memset(&recording, 0, sizeof recording);
    const pk_constants constants = pk_graph_constants(t->graph);
    recording.network = t->graph->text;
    recording.constants = &constants;
    const size_t loss_size = pk_criterion_format(&t->criterion, NULL, 0);
    status = pk_allocate(context, loss_size, 1, "the text of the loss", &loss);
    if (status)
        return status;
    (void)pk_criterion_format(&t->criterion, loss, loss_size);
    recording.loss = loss;
    recording.batch_weights = t->item_weights != NULL;
    recording.optimizer = optimizer;
    recording.groups = options->groups;
    recording.group_count = options->group_count;
    recording.group_rates = t->group_rates != NULL;
    recording.initial_state = options->initial_state;
    recording.initial_step = options->initial_step;
    recording.float32 = options->record_float32;
    recording.gradient_scales = options->clip_norm > 0;
    recording.second_moments = options->record_second_moments;
    recording.resume = options->resume;
    recording.replace = options->replace;
    recording.keep_every = options->keep_every;
    status = pk_recorder_open(context, options->record, &recording, t->train, weights, &t->recorder);
    pk_release(context, loss);
    if (status || t->recorder.steps == 0)
        return status;
    if (t->recorder.steps > options->steps)
        return pk__fail(context, PK_ARGUMENT, "%s holds %zu steps already, more than the %zu asked for",
                        options->record, t->recorder.steps, options->steps);
    pk_run run;
    status = pk_run_open(context, options->record, &run);
    if (status)
        return status;
    pk_real *replayed = NULL; /* weights stay w_0 until the replay has succeeded */
    status = pk_allocate(context, parameters, sizeof *replayed, "the weights of a replay", &replayed);
    if (!status)
        status = pk__training_replay(context, t, &run, replayed);
    if (!status) {
        memcpy(weights, t->next, parameters * sizeof *weights);
        *done = run.steps;
    }
    pk_release(context, replayed);
    pk_run_release(context, &run);
    return status;
}

static pk_status pk__training_loop(pk_context *context, pk__training *t, pk_real *weights,
                                   pk_train_result *result)
{
    const pk_train_options *options = t->options;
    size_t parameters = t->graph->parameters;
    pk_status status = PK_OK;
    if (options->record) {
        status = pk__training_record(context, t, weights, &result->steps);
        result->resumed = result->steps;
    }
    pk_real *now = weights; /* swapped with t->next after each step */
    while (!status && result->steps < options->steps) {
        size_t step = result->steps;
        pk__step made;
        status = pk__training_next(context, t, step, now, &made);
        if (!status && options->record && t->group_rates)
            status = pk_recorder_group_rates(context, &t->recorder, t->group_rates);
        if (!status && options->record)
            status = pk_recorder_training_step(context, &t->recorder, made.rate, &made.batch, made.scale,
                                               t->trainer.state, t->next);
        if (status)
            break;
        pk_real *before = now;
        now = t->next;
        t->next = before;
        result->steps++;
        result->objective = made.objective;
        if (options->on_step && options->on_step(options->user, step, made.objective, now) != 0)
            status = pk__fail(context, PK_CANCELLED, "cancelled by the caller after step %zu", step);
        else
            status = pk__progress(context, "training", (double)result->steps / (double)options->steps);
    }
    if (now != weights) {
        memcpy(weights, now, parameters * sizeof *weights);
        t->next = now;
    }
    return status;
}

static pk_status pk__training_check(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                    const pk_train_options *options, const pk_criterion *criterion,
                                    const pk_real *weights)
{
    if (!graph || !graph->nodes || !train || !train->inputs.data || !train->targets.data || !options ||
        !weights)
        return pk__fail(context, PK_ARGUMENT, "pk_train: graph, training data, options or weights are missing");
    if (graph->parameters == 0)
        return pk__fail(context, PK_SHAPE, "pk_train: the network has no parameters");
    if (!graph->nodes[graph->node_count - 1].varies)
        return pk__fail(context, PK_SHAPE, "pk_train: the network's outputs do not depend on its parameters");
    if (!(options->clip_norm >= 0) || isinf(options->clip_norm))
        return pk__fail(context, PK_ARGUMENT, "pk_train: clip_norm is %g", options->clip_norm);
    if (!options->record && (options->resume || options->replace || options->record_float32 ||
                             options->record_second_moments || options->keep_every > 1))
        return pk__fail(context, PK_ARGUMENT, "pk_train: recording options without a directory to record to");
    if (options->record_second_moments && pk__optimizer_moments(&options->optimizer) == SIZE_MAX)
        return pk__fail(context, PK_ARGUMENT, "pk_train: the optimizer has no second moments to record");
    for (size_t p = 0; p < graph->parameters; p++)
        if (!isfinite(weights[p]))
            return pk__fail(context, PK_NOT_FINITE, "pk_train: initial weight %zu is %g", p,
                            (double)weights[p]);
    pk_status status = pk_optimizer_check(context, &options->optimizer);
    if (!status)
        status = pk_schedule_check(context, &options->schedule, options->steps);
    for (size_t g = 0; options->group_schedules && !status && g < options->group_count; g++)
        status = pk__prefix(context, pk_schedule_check(context, &options->group_schedules[g], options->steps),
                            "group %zu: ", g);
    if (!status)
        status = pk__run_check_data(context, train, graph, criterion);
    return status;
}

/* Takes what training needs, which the caller releases, and trains. */
static pk_status pk__training_run(pk_context *context, pk__training *t, pk_real *weights,
                                  pk_train_result *reached)
{
    const pk_train_options *options = t->options;
    pk_status status =
        pk_allocate(context, t->examples, sizeof *t->order, "the order of the examples", &t->order);
    if (!status)
        status = pk_allocate(context, t->graph->parameters, sizeof *t->next, "the next weights", &t->next);
    pk_optimizer optimizer = options->optimizer;
    optimizer.initial_state = options->initial_state != NULL;
    optimizer.initial_step = options->initial_step;
    if (!status)
        status = pk_parameter_groups_parse(context, t->graph, &optimizer, options->group_count, options->groups,
                                           &t->groups);
    if (!status && options->group_schedules && t->groups.count)
        status = pk_allocate(context, t->groups.count, sizeof *t->group_rates, "the rates of groups",
                             &t->group_rates);
    if (!status && pk__mean_is_weighted(&t->criterion, &t->train->targets))
        status = pk_allocate(context, t->batch_size, sizeof *t->item_weights, "the weights of a batch",
                             &t->item_weights);
    if (status)
        return status;
    for (size_t g = 0; t->group_rates && g < t->groups.count; g++)
        if (t->groups.group[g].rated)
            return pk__fail(context, PK_ARGUMENT,
                            "group %zu: rate= beside group_schedules, which have the rates", g);
    const size_t vectors = pk_parameter_groups_state_vectors(&optimizer, &t->groups);
    if (options->initial_state ? !vectors : vectors && options->initial_step)
        return pk__fail(context, PK_ARGUMENT,
                        options->initial_state ? "pk_train: an initial_state, of an optimizer that has none"
                                               : "pk_train: initial_step without initial_state");
    status = pk_trainer_prepare_with(context, t->graph, t->train, &t->criterion, &optimizer, &t->groups,
                                     t->batch_size, &t->trainer);
    if (status)
        return status;
    for (size_t i = 0; options->initial_state && i < t->trainer.state_numbers; i++)
        if (!isfinite(options->initial_state[i]))
            return pk__fail(context, PK_NOT_FINITE, "pk_train: number %zu of initial_state is %g", i,
                            (double)options->initial_state[i]);
    pk__training_begin(t);
    return pk__training_loop(context, t, weights, reached);
}

PK_API pk_status pk_train(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                          const pk_train_options *options, pk_real *weights, pk_train_result *result)
{
    pk_criterion criterion = pk__criterion_of(options ? options->loss : (pk_loss)0);
    if (options && options->criterion)
        criterion = *options->criterion;
    pk_status status = pk__training_check(context, graph, train, options, &criterion, weights);
    if (status)
        return status;
    if (options->criterion && options->loss && options->loss != criterion.loss)
        return pk__fail(context, PK_ARGUMENT, "pk_train: loss is %s, and that of criterion is %s",
                        pk_loss_name(options->loss), pk_loss_name(criterion.loss));
    pk_train_result reached;
    memset(&reached, 0, sizeof reached);
    reached.objective = (double)NAN;
    pk__training t;
    memset(&t, 0, sizeof t);
    t.graph = graph;
    t.train = train;
    t.options = options;
    t.criterion = criterion;
    t.examples = pk_dataset_examples(train);
    t.batch_size = options->batch_size && options->batch_size < t.examples ? options->batch_size : t.examples;
    t.per_epoch = (t.examples - 1) / t.batch_size + 1;
    t.epoch = SIZE_MAX;
    status = pk__training_run(context, &t, weights, &reached);
    pk_status closed = pk__recorder_end(context, status ? NULL : context, &t.recorder);
    if (!status)
        status = closed;
    pk_trainer_release(context, &t.trainer);
    pk_release(context, t.group_rates);
    pk_parameter_groups_release(context, &t.groups);
    pk_release(context, t.item_weights);
    pk_release(context, t.next);
    pk_release(context, t.order);
    if (result)
        *result = reached;
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
