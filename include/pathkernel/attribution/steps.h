/* pathkernel/attribution/steps.h: the train side of an attribution: windows of consecutive steps of a run with their
 * weights, the gradients of their examples, and their updates, recomputed and in linear form.
 *
 * A window is prepared as a whole, in parallel over steps and blocks of examples; the results do not depend on its length.
 * An optimizer with a state is followed forward once, and its state is saved at the start of every stride-th window. On
 * the way back to a window between two of these, up to `spare` more states are saved where they avoid most of the repeated
 * work (run/revisit.h). A few states are thus enough to visit any number of steps in reverse.
 */
#ifndef PATHKERNEL_STEPS_H
#define PATHKERNEL_STEPS_H
#include "../features/tiles.h"
#include "../run/average.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_STEPS_INTERNALS_KNOWN)
#define PATHKERNEL_STEPS_INTERNALS_KNOWN
/* >>> internals */
/* A rule that replaces the exact one, so that rules can be compared (compare.h): it takes derivatives at one point of each
 * step, for the test rows and for the examples. A zeroed structure means the exact rule. The optimizer's linear form and
 * the unattributed part, D_s minus the update, are always those of the run. */
typedef struct pk__approximation {
    /* J of the test rows is taken at w_s(at) = w_s + at D_s only, or at weights of their own, instead of along the step: */
    int at_one_point;
    double at;
    const pk_real *weights; /* graph->untied numbers, or NULL */
    /* the rule uses only this many equally spaced steps, each with the factor steps / chosen; 0: all steps */
    size_t chosen;
    /* df/dw of the examples is taken at w_s(examples_at) instead of w_s, dl/df too or at w_s: */
    int examples_move, seeds_stay;
    double examples_at;
    /* the number of rows of the whole job, of which these are some; blocks are cut as for all of them; 0: these are all
     * rows */
    size_t rows;
} pk__approximation;

/* The k-th chosen step, and whether a given step is chosen. */
PK__INTERNAL size_t pk__chosen_step(size_t steps, size_t chosen, size_t k);
PK__INTERNAL int pk__is_chosen(size_t steps, size_t chosen, size_t step);

typedef struct pk__window {
    const pk_run *run;
    /* Of the run: */
    size_t parameters, largest_batch, state_vectors;
    int preconditioned; /* p_s differs between parameters: because of the optimizer, or because of parameter groups */
    int adaptive;       /* the optimizer divides by second moments of its gradients */
    int decoupled; /* with groups: `decayed` is their decoupled decay; else their decay is a part of the gradients */
    size_t moments; /* the index of the state vector that recorded second moments replace */
    /* linear forms of a step: that of the tensors outside all groups, then one for each group */
    size_t form_count;
    /* Set by the caller after pk__steps_begin: */
    pk__representation representation;
    const pk__approximation *approximation; /* or NULL */
    const pk_average *average;              /* of the weights, whose path the test rows take; or NULL */
    size_t
        average_vectors; /* that are carried from step to step: a_s, the lag of the remainder, that of decoupled decay */
    /* Of the plan: */
    size_t capacity, windows, threads, partial_sums;
    size_t stride, spare;
    int bounds;
    /* The steps first .. first + count - 1; step first + j is number j below: */
    size_t first, count;
    pk_real *weights;    /* (count + 1) x P */
    pk_real *direction;  /* count x P: D_s */
    size_t untied;       /* of the graph: P without ties */
    pk_real *transposed; /* count x 2 x untied: pk__pass_transpose of weights and direction, or NULL */
    pk_real *remainder;  /* count x P: u_s = D_s - the update recomputed in double; the average's part of it */
    /* Of the test rows: a_s and its steps d_s, count x P. Without an average they are the weights and directions above. */
    pk_real *path_weights, *path_direction;
    size_t pitch; /* of the two that follow: P in whole cache lines, which the steps back in time read with R */
    pk_real *preconditioner; /* count x pitch: p_s, or NULL */
    pk_real *
        preconditioner_error; /* count x pitch, with bounds: what rounding of the gradients may do to p_s, or NULL */
    /* Weights, direction, remainder, preconditioner and its error with one copy for each use of a tied tensor: E w, E D, E u, E p
     * (graph.h, pk_graph_untie). Without ties there is nothing to copy, and these are the pointers above. */
    size_t uses_pitch;
    pk_real *use_weights, *use_direction, *use_remainder, *use_preconditioner, *use_preconditioner_error,
        *use_decayed, *use_path_weights, *use_path_direction;
    pk_linear_form *forms; /* count x form_count */
    /* count x P, with groups: decay o w_s. With an average and decoupled decay: the average's part of decay o w_s. */
    pk_real *decayed;
    /* P and untied, of a run that begins with a state: carry_0 m_0, what it gives to m_1; or NULL. */
    pk_real *inherited, *use_inherited;
    pk_batch *batches;
    pk__examples *examples, *magnitudes; /* magnitudes: see pk__examples_magnitude, or NULL */
    /* Private: */
    pk_real *gradient; /* count x partial_sums x untied; the first of a step becomes its whole gradient */
    /* In parts of PK__STATE_PART parameters. With bounds two more states follow the first: those of an optimizer that
     * receives perturbed gradients. */
    pk_real *state, *update;
    pk__checkpoints checkpoints; /* of the state, by window */
    pk_real *perturbed;          /* untied + 2 P */
    pk_real *perturbed_weights;  /* with bounds: count x untied */
    /* count x untied: the weights at which an approximation takes the examples' gradients, where these are not w_s */
    pk_real *moved_weights;
    size_t states;   /* 1, or 3 with the two states of perturbed gradients */
    size_t advanced; /* windows that were computed again for the optimizer's state alone */
    pk__example_workspace *workspaces;
    double *seconds; /* of each thread, spent on examples */
    double seconds_read;
    pk_replay replay; /* of runs that keep only every k-th step */
} pk__window;

/* Reads the batch sizes, which decide how much memory a window needs, and what the optimizer does. */
PK__INTERNAL void pk__steps_begin(const pk_run *run, pk__window *window);
/* Takes the memory for windows of up to `capacity` steps and for `threads` threads. With stride > 0 the optimizer's state
 * is saved at the start of every stride-th window, and up to `spare` more states between two of these, so that windows can
 * be visited backwards. bounds: also takes what bounds need. */
PK__INTERNAL void pk__steps_take(pk__arena *arena, size_t capacity, size_t stride, size_t spare, size_t threads,
                                 int bounds, pk__window *window);
/* Prepares the steps [first, first + count), starting from the optimizer's present state. Costs about 8 P flops for each
 * example. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_prepare(pk_context *context, pk__window *window, size_t first,
                                                      size_t count);
/* Goes through the run once and saves the states. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_save_states(pk_context *context, pk__window *window);
/* Prepares window number index, starting from the nearest saved state (where the optimizer has a state, after
 * pk__steps_save_states). This is cheap for the window before the last one that was visited, see pk__checkpoints_again. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_visit(pk_context *context, pk__window *window, size_t index);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_STEPS_IMPLEMENTED)
#define PATHKERNEL_STEPS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* The number of parameters that are updated together, so few that several vectors of them fit into the cache. The
 * optimizer's state is stored part by part; within a part its vectors follow each other. */
enum { PK__STATE_PART = 4096 };
/* The least number of parameters for which several threads share the reading or the update. */
enum { PK__WINDOW_WORTH = 1 << 18 };

static int pk__has_moments(const pk__window *window)
{
    return window->moments != SIZE_MAX && window->run->second_moments.data;
}

PK__INTERNAL void pk__steps_begin(const pk_run *run, pk__window *window)
{
    memset(window, 0, sizeof *window);
    window->run = run;
    window->parameters = run->graph.parameters;
    window->untied = run->graph.untied;
    for (size_t s = 0; s < run->steps; s++) {
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        window->largest_batch = pk__max(window->largest_batch, batch.count);
    }
    window->partial_sums = pk__max(1, pk__min(16, pk__blocks(window->largest_batch, PK__EXAMPLE_BLOCK)));
    window->state_vectors = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    window->form_count = 1 + run->groups.count;
    pk_linear_form form;
    pk_optimizer_linear_form(&run->optimizer, 0, 1, run->graph.parameters, NULL, &form, NULL);
    window->adaptive = form.preconditioned;
    window->preconditioned = form.preconditioned || run->groups.count;
    window->decoupled = pk__optimizer_decoupled(&run->optimizer);
    window->inherited = NULL;
    window->moments = pk__groups_moments(&run->optimizer, &run->groups);
}

PK__INTERNAL void pk__steps_take(pk__arena *arena, size_t capacity, size_t stride, size_t spare, size_t threads,
                                 int bounds, pk__window *window)
{
    const pk_graph *graph = &window->run->graph;
    const size_t real = sizeof(pk_real), P = window->parameters;
    size_t all = 0, untied = 0;
    window->pitch = pk__blocks(P, PK_PANEL) * PK_PANEL;
    window->uses_pitch = pk__blocks(window->untied, PK_PANEL) * PK_PANEL;
    if (!pk__multiply(capacity, window->pitch, &all) || !pk__multiply(capacity, window->uses_pitch, &untied))
        arena->overflow = 1;
    window->capacity = capacity;
    window->windows = pk__blocks(window->run->steps, capacity);
    window->threads = threads;
    window->stride = window->state_vectors + window->average_vectors && window->windows ? stride : 0;
    window->spare = window->stride ? spare : 0;
    window->advanced = 0;
    window->bounds = bounds;
    window->weights = pk__arena_take(arena, capacity + 1, P * real);
    window->direction = pk__arena_take(arena, all, real);
    window->transposed = pk__pass_transposes(graph) ? pk__arena_take(arena, untied, 2 * real) : NULL;
    window->remainder = pk__arena_take(arena, all, real);
    window->preconditioner = window->preconditioned ? pk__arena_take(arena, all, real) : NULL;
    /* Recorded moments are not computed from gradients here, so they have no rounding error from them. */
    window->states = bounds && window->adaptive && !pk__has_moments(window) ? 3 : 1;
    window->preconditioner_error = window->states == 3 ? pk__arena_take(arena, all, real) : NULL;
    window->perturbed = window->states == 3 ? pk__arena_take(arena, window->untied + 2 * P, real) : NULL;
    window->perturbed_weights = pk__arena_take(arena, bounds ? untied : 0, real);
    const int moves = window->approximation && window->approximation->examples_move;
    window->moved_weights = moves ? pk__arena_take(arena, untied, real) : NULL;
    window->gradient = pk__arena_take(arena, untied, window->partial_sums * real);
    window->use_weights = window->weights;
    window->use_direction = window->direction;
    window->use_remainder = window->remainder;
    window->use_preconditioner = window->preconditioner;
    window->use_preconditioner_error = window->preconditioner_error;
    const int averaged = window->average != NULL;
    window->path_weights = averaged ? pk__arena_take(arena, all, real) : window->weights;
    window->path_direction = averaged ? pk__arena_take(arena, all, real) : window->direction;
    if (graph->tied) {
        window->use_weights = pk__arena_take(arena, untied, real);
        window->use_direction = pk__arena_take(arena, untied, real);
        window->use_remainder = pk__arena_take(arena, untied, real);
        window->use_preconditioner = window->preconditioned ? pk__arena_take(arena, untied, real) : NULL;
        window->use_preconditioner_error = window->states == 3 ? pk__arena_take(arena, untied, real) : NULL;
    }
    window->use_path_weights = averaged ? window->path_weights : window->use_weights;
    window->use_path_direction = averaged ? window->path_direction : window->use_direction;
    if (graph->tied && averaged) {
        window->use_path_weights = pk__arena_take(arena, untied, real);
        window->use_path_direction = pk__arena_take(arena, untied, real);
    }
    const int inherits = window->run->initial_state.data != NULL;
    window->inherited = inherits ? pk__arena_take(arena, P, real) : NULL;
    window->use_inherited =
        graph->tied && inherits ? pk__arena_take(arena, window->untied, real) : window->inherited;
    const size_t vectors = window->states * window->state_vectors + window->average_vectors;
    window->state = pk__arena_take(arena, vectors, P * real);
    pk__checkpoints_take(arena, window->windows, window->stride, window->spare, vectors * P,
                         &window->checkpoints);
    window->update = pk__arena_take(arena, threads, PK__STATE_PART * real);
    window->forms = pk__arena_take(arena, capacity, window->form_count * sizeof *window->forms);
    const int decays = window->form_count > 1 || (averaged && window->decoupled);
    window->decayed = decays ? pk__arena_take(arena, capacity, P * real) : NULL;
    window->use_decayed = window->decayed;
    if (graph->tied && decays)
        window->use_decayed = pk__arena_take(arena, untied, real);
    window->batches = pk__arena_take(arena, capacity, sizeof *window->batches);
    window->examples = pk__arena_take(arena, capacity, sizeof(pk__examples));
    window->magnitudes = bounds ? pk__arena_take(arena, capacity, sizeof(pk__examples)) : NULL;
    for (size_t j = 0; j < capacity && !arena->overflow; j++) {
        pk__examples measured;
        pk__examples_take(arena, graph, window->largest_batch, &window->representation,
                          window->examples ? &window->examples[j] : &measured);
        if (bounds)
            pk__examples_take(arena, graph, window->largest_batch, &window->representation,
                              window->magnitudes ? &window->magnitudes[j] : &measured);
    }
    window->workspaces = pk__arena_take(arena, threads, sizeof *window->workspaces);
    window->seconds = pk__arena_take(arena, threads, sizeof *window->seconds);
    pk__replay_take(arena, window->run, window->largest_batch, (int)threads, capacity, &window->replay);
    for (size_t w = 0; w < threads && !arena->overflow; w++) {
        pk__example_workspace measured;
        pk__example_workspace_take(arena, graph, pk__max(1, pk__min(window->largest_batch, PK__EXAMPLE_BLOCK)),
                                   window->workspaces ? &window->workspaces[w] : &measured);
        if (window->seconds)
            window->seconds[w] = 0;
    }
}

PK__INTERNAL size_t pk__chosen_step(size_t steps, size_t chosen, size_t k)
{
    /* floor(k steps / chosen) without a large product */
    return k * (steps / chosen) + k * (steps % chosen) / chosen;
}

PK__INTERNAL int pk__is_chosen(size_t steps, size_t chosen, size_t step)
{
    for (size_t k = 0; k < chosen; k++)
        if (pk__chosen_step(steps, chosen, k) == step)
            return 1;
    return 0;
}

/* Transposes the weights and directions of the test rows in step number j, where a pass wants them so. */
static void pk__transpose_path(pk__window *window, size_t j)
{
    const size_t U = window->untied;
    const pk_graph *graph = &window->run->graph;
    const pk__approximation *own = window->approximation;
    if (!window->transposed)
        return;
    pk_real *to = window->transposed + j * 2 * U;
    pk__pass_transpose(graph, own && own->weights ? own->weights : window->use_path_weights + j * U, to);
    pk__pass_transpose(graph, window->use_path_direction + j * U, to + U);
}

static pk_status pk__load_window(pk_context *context, pk__window *window, int advance)
{
    const size_t P = window->parameters, U = window->untied;
    const pk_graph *graph = &window->run->graph;
    for (size_t j = 0; j < window->count + !advance; j++) {
        pk_status status =
            pk_replay_weights(context, &window->replay, window->first + j, window->weights + j * P);
        if (status)
            return status;
    }
    const size_t numbers = window->count * P * (!advance && window->transposed ? 4 : 1);
    pk__team team =
        pk__team_of(context, numbers >= (size_t)PK__WINDOW_WORTH ? (int)window->threads : 1, window->count);
    PK__PARALLEL(team)
    for (size_t j = pk__first_task(&team); j < window->count; j = pk__next_task(&team)) {
        const pk_real *from = window->weights + j * P;
        for (size_t i = 0; !advance && i < P; i++)
            window->direction[j * P + i] = from[P + i] - from[i];
        if (graph->tied) {
            pk_graph_untie(graph, from, window->use_weights + j * U);
            if (!advance)
                pk_graph_untie(graph, window->direction + j * P, window->use_direction + j * U);
        }
        from = window->use_weights + j * U;
        if (!advance && !window->average)
            pk__transpose_path(window, j);
        pk_run_batch(window->run, window->first + j, &window->batches[j]);
        size_t row = 0;
        const pk_array *recorded = pk_run_loss_gradients(window->run, window->first + j, &row);
        pk__examples_begin(&window->examples[j], &window->batches[j], recorded, row);
        if (window->magnitudes) {
            pk__examples_begin(&window->magnitudes[j], &window->batches[j], recorded, row);
            pk__examples_perturb(U, from, window->perturbed_weights + j * U);
        }
    }
    pk__team_end(&team);
    return PK_OK;
}

/* Computes the gradients of the examples of every step of the window, and partial sums of them, each over consecutive
 * blocks of examples in ascending order. */
static void pk__fill_window(pk_context *context, pk__window *window)
{
    const pk_run *run = window->run;
    const size_t U = window->untied, partial_sums = window->partial_sums;
    const size_t tasks = window->count * partial_sums;
    const int threads = (int)window->threads;
    pk__team team = pk__team_of(context, threads, tasks);
    PK__PARALLEL(team)
    for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
        const size_t thread = (size_t)pk__thread(), j = task / partial_sums, part = task % partial_sums;
        double start = pk__seconds();
        size_t blocks = pk__blocks(window->batches[j].count, PK__EXAMPLE_BLOCK),
               each = pk__blocks(blocks, partial_sums);
        pk_real *gradient = window->gradient + task * U;
        memset(gradient, 0, U * sizeof *gradient);
        for (size_t b = part * each; b < pk__min(blocks, (part + 1) * each); b++) {
            pk__examples_fill(&window->examples[j], &run->graph, &run->criterion, window->use_weights + j * U,
                              &run->train, &window->batches[j], b * PK__EXAMPLE_BLOCK,
                              &window->workspaces[thread], gradient);
            if (window->magnitudes)
                pk__examples_fill(&window->magnitudes[j], &run->graph, &run->criterion,
                                  window->perturbed_weights + j * U, &run->train, &window->batches[j],
                                  b * PK__EXAMPLE_BLOCK, &window->workspaces[thread], NULL);
        }
        if (run->graph.tied)
            pk_graph_gather(&run->graph, gradient, gradient);
        window->seconds[thread] += pk__seconds() - start;
    }
    pk__team_end(&team);
    if (!window->magnitudes)
        return;
    team = pk__team_of(context, threads, window->count);
    PK__PARALLEL(team)
    for (size_t j = pk__first_task(&team); j < window->count; j = pk__next_task(&team))
        pk__examples_magnitude(&window->examples[j], &run->graph, &window->magnitudes[j]);
    pk__team_end(&team);
}

/* Computes the examples' gradients at the weights that an approximation asks for, after the update has been recomputed from
 * those at w_s. */
static void pk__move_examples(pk_context *context, pk__window *window)
{
    const pk_run *run = window->run;
    const pk__approximation *how = window->approximation;
    const size_t U = window->untied, partial_sums = window->partial_sums, tasks = window->count * partial_sums;
    pk__team team = pk__team_of(context, (int)window->threads, window->count);
    PK__PARALLEL(team)
    for (size_t j = pk__first_task(&team); j < window->count; j = pk__next_task(&team))
        for (size_t i = j * U; i < (j + 1) * U; i++)
            window->moved_weights[i] =
                (pk_real)(window->use_weights[i] + how->examples_at * window->use_direction[i]);
    pk__team_end(&team);
    team = pk__team_of(context, (int)window->threads, tasks);
    PK__PARALLEL(team)
    for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
        const size_t thread = (size_t)pk__thread(), j = task / partial_sums, part = task % partial_sums;
        const double start = pk__seconds();
        const size_t blocks = pk__blocks(window->batches[j].count, PK__EXAMPLE_BLOCK),
                     each = pk__blocks(blocks, partial_sums);
        const pk_real *at = window->moved_weights + j * U;
        for (size_t b = part * each; b < pk__min(blocks, (part + 1) * each); b++)
            pk__examples_fill_apart(&window->examples[j], &run->graph, &run->criterion,
                                    how->seeds_stay ? window->use_weights + j * U : at, at, &run->train,
                                    &window->batches[j], b * PK__EXAMPLE_BLOCK, &window->workspaces[thread],
                                    NULL);
        window->seconds[thread] += pk__seconds() - start;
    }
    pk__team_end(&team);
}

/* Copies the recorded second moments to p. These are what the optimizer really divided by; a recomputed moment of gradients
 * that nearly cancel agrees with that of a float32 run in a few digits only. */
static pk_status pk__read_moments(pk_context *context, pk__window *window, size_t j)
{
    const size_t step = window->first + j;
    return pk_run_second_moments(context, window->run, step, window->preconditioner + j * window->pitch);
}

/* Computes D_s of `count` parameters from the linear form. */
static void pk__update_from_form(const pk_linear_form *form, double scale, size_t count, const pk_real *p,
                                 const pk_real *m, const pk_real *gradient, const pk_real *weights,
                                 pk_real *update)
{
    /* m is the optimizer's own momentum, whose sign does not change. */
    const double enter = form->negated ? -form->enter : form->enter;
    for (size_t i = 0; i < count; i++)
        update[i] = (pk_real)(-p[i] * (enter * m[i] +
                                       form->direct * (scale * gradient[i] + form->coupled * weights[i])) -
                              form->decoupled * weights[i]);
}

/* Recomputes the updates of the window's steps from their gradients, for the parameters [first, first + count): u_s and the
 * optimizer's linear form, or its state alone. */
static void pk__recompute_updates(pk__window *window, size_t first, size_t count, int advance, pk_real *update)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters;
    const int recorded = pk__has_moments(window);
    pk_real *state = window->state_vectors ? window->state + window->state_vectors * first : NULL;
    for (size_t j = 0; j < window->count; j++) {
        const size_t step = window->first + j, at = j * P + first;
        const double rate = run->learning_rates[step], scale = pk_run_gradient_scale(run, step);
        const pk_real *weights = window->weights + at;
        pk_real *gradient = window->gradient + j * window->partial_sums * window->untied + first;
        pk_real *p = window->preconditioner ? window->preconditioner + j * window->pitch + first : NULL;
        pk_linear_form form;
        for (size_t part = 1; part < window->partial_sums; part++)
            for (size_t i = 0; i < count; i++)
                gradient[i] += gradient[part * window->untied + i];
        const double *rates = pk_run_group_rates(run, step);
        const pk__update whole = {
            step, rate, scale, count, count, weights, gradient, state, advance || recorded ? NULL : update};
        pk__groups_update(&run->optimizer, &run->groups, rates, first, &whole);
        if (advance)
            continue;
        if (recorded)
            memcpy(state + window->moments * count, p, count * sizeof *p);
        for (size_t r = 0; r < run->groups.range_count; r++) {
            const pk_parameter_range *range = &run->groups.range[r];
            size_t from;
            const size_t numbers = pk__range_part(range, first, count, &from);
            if (!numbers)
                continue;
            pk__group_form(&run->optimizer, &run->groups, range->group, step, rate, rates, numbers, count,
                           state ? state + from : NULL, &form, p + from);
            if (recorded)
                pk__update_from_form(&form, scale, numbers, p + from, state + from, gradient + from,
                                     weights + from, update + from);
            const double decay = window->decoupled ? form.decoupled : form.coupled;
            for (size_t i = from; i < from + numbers; i++)
                window->decayed[at + i] = (pk_real)(decay * weights[i]);
        }
        if (p && window->form_count == 1)
            pk_optimizer_linear_form(&run->optimizer, step, rate, count, state, &form, p);
        if (recorded && window->form_count == 1)
            pk__update_from_form(&form, scale, count, p, state, gradient, weights, update);
        for (size_t i = 0; i < count; i++)
            window->remainder[at + i] = window->direction[at + i] - update[i];
    }
}

/* Estimates the error of p_s. Adam divides by the root of a mean of squared gradients, and a gradient that nearly cancels
 * has few correct digits. Two more optimizers receive gradients that are smaller and larger by the rounding allowance.
 * Since p falls as the gradients grow, the larger of the two differences to p is the error. */
static void pk__perturb_update(pk__window *window, size_t j, int advance)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters, step = window->first + j;
    const pk_real *gradient = window->gradient + j * window->partial_sums * window->untied,
                  *weights = window->weights + j * P;
    const double *rates = pk_run_group_rates(run, step), rate = run->learning_rates[step];
    const pk_parameter_range all = {0, P, 0};
    const pk_parameter_range *ranges = run->groups.range_count ? run->groups.range : &all;
    const size_t range_count = pk__max(run->groups.range_count, 1);
    double scale = pk_run_gradient_scale(run, step);
    double allowance = pk__rounding_allowance(&run->graph);
    pk_real *sizes = window->perturbed, *perturbed = sizes + window->untied, *p = perturbed + P;
    pk_real *error = window->preconditioner_error + j * window->pitch;
    memset(sizes, 0, window->untied * sizeof *sizes);
    pk__examples_sum(&window->magnitudes[j], &run->graph, sizes);
    if (run->graph.tied)
        pk_graph_gather(&run->graph, sizes, sizes);
    for (int larger = 0; larger < 2; larger++) {
        pk_real *state = window->state + (1 + (size_t)larger) * window->state_vectors * P;
        size_t r = 0;
        for (size_t i = 0; i < P; i++) {
            r += i == ranges[r].first + ranges[r].count;
            const double coupled = window->forms[j * window->form_count + ranges[r].group].coupled;
            const double whole = scale * gradient[i] + coupled * weights[i];
            double change = scale * allowance * sizes[i];
            if (!larger)
                change = change < fabs(whole) ? -change : -fabs(whole);
            perturbed[i] = (pk_real)(gradient[i] + (scale != 0 ? (whole > 0 ? change : -change) / scale : 0));
        }
        const pk__update whole_update = {step, rate, scale, P, P, weights, perturbed, state, NULL};
        pk__groups_update(&run->optimizer, &run->groups, rates, 0, &whole_update);
        if (advance)
            continue;
        pk_linear_form form;
        for (r = 0; r < range_count; r++)
            pk__group_form(&run->optimizer, &run->groups, ranges[r].group, step, rate, rates, ranges[r].count,
                           P, state + ranges[r].first, &form, p + ranges[r].first);
        for (size_t i = 0; i < P; i++) {
            const double off = fabs((double)p[i] - (double)window->preconditioner[j * window->pitch + i]);
            error[i] = (pk_real)(larger && off < error[i] ? error[i] : off);
        }
    }
}

/* The vectors of the average, P numbers each. */
static pk_real *pk__average_state(const pk__window *window)
{
    return window->state + window->states * window->state_vectors * window->parameters;
}

/* The average along the window's steps, of count parameters from first on: its path, and the parts of it that are the remainder's
 * and decoupled decay's (run/average.h). */
static void pk__average_steps(pk__window *window, size_t first, size_t count)
{
    const size_t P = window->parameters;
    pk_real *mean = pk__average_state(window) + first;
    for (size_t j = 0; j < window->count; j++) {
        const size_t at = j * P + first;
        const double c = pk_average_weight(window->average, window->first + j);
        pk_real *due[2] = {window->remainder + at, window->decoupled ? window->decayed + at : NULL};
        memcpy(window->path_weights + at, mean, count * sizeof *mean);
        pk__average_update(c, count, window->weights + at + P, mean, window->path_direction + at);
        if (due[1] && window->form_count == 1)
            for (size_t i = 0; i < count; i++)
                due[1][i] = (pk_real)(window->forms[j].decoupled * window->weights[at + i]);
        for (size_t k = 0; k < 2 && due[k]; k++) {
            pk_real *lag = mean + (k + 1) * P;
            for (size_t i = 0; i < count; i++) {
                const double sum = (double)lag[i] + due[k][i];
                due[k][i] = (pk_real)(c * sum);
                lag[i] = (pk_real)((1 - c) * sum);
            }
        }
    }
}

/* Copies the remainder, the preconditioner and its error to each use of a tied tensor. */
static void pk__spread_updates(pk__window *window)
{
    const pk_graph *graph = &window->run->graph;
    const size_t P = window->parameters, U = window->untied;
    for (size_t j = 0; j < window->count; j++) {
        pk_graph_untie(graph, window->remainder + j * P, window->use_remainder + j * U);
        if (window->preconditioner)
            pk_graph_untie(graph, window->preconditioner + j * window->pitch,
                           window->use_preconditioner + j * window->uses_pitch);
        if (window->preconditioner_error)
            pk_graph_untie(graph, window->preconditioner_error + j * window->pitch,
                           window->use_preconditioner_error + j * window->uses_pitch);
        if (window->decayed)
            pk_graph_untie(graph, window->decayed + j * P, window->use_decayed + j * U);
        if (!window->average)
            continue;
        pk_graph_untie(graph, window->path_weights + j * P, window->use_path_weights + j * U);
        pk_graph_untie(graph, window->path_direction + j * P, window->use_path_direction + j * U);
    }
}

/* Computes the scalars of a step's linear forms. */
static void pk__window_forms(const pk__window *window, size_t step, pk_linear_form *forms)
{
    const pk_run *run = window->run;
    const double rate = run->learning_rates[step], *rates = pk_run_group_rates(run, step);
    if (window->form_count == 1)
        pk_optimizer_linear_form(&run->optimizer, step, rate, window->parameters, NULL, forms, NULL);
    for (size_t g = 0; window->form_count > 1 && g < window->form_count; g++)
        pk__group_form(&run->optimizer, &run->groups, g, step, rate, rates, 0, 0, NULL, &forms[g], NULL);
}

static pk_status pk__prepare_window(pk_context *context, pk__window *window, size_t first, size_t count,
                                    int advance)
{
    const size_t P = window->parameters, parts = pk__blocks(P, PK__STATE_PART);
    double start = pk__seconds();
    window->first = first;
    window->count = count;
    pk_status status = pk__load_window(context, window, advance);
    if (status)
        return status;
    window->seconds_read += pk__seconds() - start;
    pk__fill_window(context, window);
    start = pk__seconds();
    for (size_t j = 0; j < count; j++)
        pk__window_forms(window, first + j, window->forms + j * window->form_count);
    for (size_t j = 0; !advance && pk__has_moments(window) && j < count; j++) {
        status = pk__read_moments(context, window, j);
        if (status)
            return status;
    }
    const int worth = count * P * (window->partial_sums + 1) >= (size_t)PK__WINDOW_WORTH;
    pk__team team = pk__team_of(context, worth ? (int)window->threads : 1, parts);
    PK__PARALLEL(team)
    for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team))
        pk__recompute_updates(window, part * PK__STATE_PART, pk__min(PK__STATE_PART, P - part * PK__STATE_PART),
                              advance, window->update + (size_t)pk__thread() * PK__STATE_PART);
    pk__team_end(&team);
    for (size_t j = 0; window->states == 3 && j < count; j++)
        pk__perturb_update(window, j, advance);
    if (window->average) {
        team = pk__team_of(context, worth ? (int)window->threads : 1, parts);
        PK__PARALLEL(team)
        for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team))
            pk__average_steps(window, part * PK__STATE_PART,
                              pk__min(PK__STATE_PART, P - part * PK__STATE_PART));
        pk__team_end(&team);
    }
    if (!advance && window->run->graph.tied)
        pk__spread_updates(window);
    if (window->average) {
        team = pk__team_of(context, worth ? (int)window->threads : 1, count);
        PK__PARALLEL(team)
        for (size_t j = pk__first_task(&team); j < count; j = pk__next_task(&team))
            pk__transpose_path(window, j);
        pk__team_end(&team);
    }
    if (!advance && window->moved_weights)
        pk__move_examples(context, window);
    window->seconds_read += pk__seconds() - start;
    return PK_OK;
}

PK__INTERNAL pk_status pk__steps_prepare(pk_context *context, pk__window *window, size_t first, size_t count)
{
    return pk__prepare_window(context, window, first, count, 0);
}

/* From the state before window number index to the one behind it. An average takes whole steps, as their remainder and decay
 * are parts of it. */
static pk_status pk__advance_window(pk_context *context, pk__window *window, size_t index)
{
    const size_t first = index * window->capacity;
    window->advanced++;
    return pk__prepare_window(context, window, first, pk__min(window->capacity, window->run->steps - first),
                              !window->average);
}

static size_t pk__state_bytes(const pk__window *window)
{
    return (window->states * window->state_vectors + window->average_vectors) * window->parameters *
           sizeof(pk_real);
}

/* The state before step 0: zeros, or what the run begins with; an average starts as w_0. */
static pk_status pk__first_state(pk_context *context, pk__window *window)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters, vectors = window->state_vectors;
    pk_status status = PK_OK;
    memset(window->state, 0, pk__state_bytes(window));
    for (size_t first = 0; run->initial_state.data && first < P; first += PK__STATE_PART) {
        const size_t count = pk__min(PK__STATE_PART, P - first);
        for (size_t v = 0; !status && v < vectors; v++)
            status = pk_array_read(context, &run->initial_state, v * P + first, count,
                                   window->state + vectors * first + v * count);
    }
    for (size_t k = 1; run->initial_state.data && !status && k < window->states; k++)
        status = pk_array_read(context, &run->initial_state, 0, vectors * P, window->state + k * vectors * P);
    if (status)
        return pk__prefix(context, status, "initial_state.npy ");
    return window->average ? pk_replay_weights(context, &window->replay, 0, pk__average_state(window)) : PK_OK;
}

/* window->inherited: see there. */
static pk_status pk__read_inherited(pk_context *context, pk__window *window)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters;
    const pk_parameter_range all = {0, P, 0};
    const pk_parameter_range *ranges = run->groups.range_count ? run->groups.range : &all;
    pk_status status = PK_OK;
    pk__window_forms(window, 0, window->forms);
    for (size_t r = 0; !status && r < pk__max(run->groups.range_count, 1); r++) {
        const pk_linear_form *form = &window->forms[ranges[r].group];
        const size_t vector =
            pk__optimizer_momentum(pk__group_optimizer(&run->optimizer, &run->groups, ranges[r].group));
        const double factor = form->negated ? -form->carry : form->carry; /* m is the optimizer's */
        pk_real *to = window->inherited + ranges[r].first;
        memset(to, 0, ranges[r].count * sizeof *to);
        if (factor == 0 || vector == SIZE_MAX)
            continue;
        status = pk_array_read(context, &run->initial_state, vector * P + ranges[r].first, ranges[r].count, to);
        for (size_t i = 0; !status && i < ranges[r].count; i++)
            to[i] = (pk_real)(factor * to[i]);
    }
    if (!status && run->graph.tied)
        pk_graph_untie(&run->graph, window->inherited, window->use_inherited);
    return pk__prefix(context, status, "initial_state.npy ");
}

PK__INTERNAL pk_status pk__steps_save_states(pk_context *context, pk__window *window)
{
    const size_t last = window->checkpoints.fixed * window->stride;
    pk_status status = window->inherited ? pk__read_inherited(context, window) : PK_OK;
    if (!status)
        status = pk__first_state(context, window);
    for (size_t w = 0; !status && w < last; w++) {
        status = pk__progress(context, "recomputing the optimiser's state", (double)w / (double)last);
        if (!status)
            status = pk__advance_window(context, window, w);
        if (status)
            return status;
        pk_real *kept = pk__checkpoints_fixed(&window->checkpoints, w + 1);
        if (kept)
            memcpy(kept, window->state, pk__state_bytes(window));
    }
    return status;
}

/* Computes the state before window number index from the nearest earlier one that is saved, and saves spare states on the
 * way. */
static pk_status pk__find_state(pk_context *context, pk__window *window, size_t index)
{
    pk__checkpoints *checkpoints = &window->checkpoints;
    const pk_real *nearest;
    size_t from = pk__checkpoints_find(checkpoints, 0, index, &nearest);
    pk_status status = PK_OK;
    if (nearest)
        memcpy(window->state, nearest, pk__state_bytes(window));
    else
        status = pk__first_state(context, window);
    if (status)
        return status;
    while (from < index) {
        const size_t next = pk__checkpoints_next(checkpoints, from, index, 1);
        for (; from < next; from++) {
            status = pk__advance_window(context, window, from);
            if (status)
                return status;
        }
        pk_real *spare = pk__checkpoints_add(checkpoints, from);
        if (spare)
            memcpy(spare, window->state, pk__state_bytes(window));
    }
    return PK_OK;
}

PK__INTERNAL pk_status pk__steps_visit(pk_context *context, pk__window *window, size_t index)
{
    pk_status status = window->stride ? pk__find_state(context, window, index) : PK_OK;
    const size_t first = index * window->capacity;
    if (status)
        return status;
    return pk__prepare_window(context, window, first, pk__min(window->capacity, window->run->steps - first), 0);
}

PK__END_CODE
/* <<< implementation */
#endif
