/* pathkernel/attribution/walk.h: a run's optimizer followed step by step from the start: the linear form of each step, for
 * analyses that go forward through a run and hold one step at a time.
 */
#ifndef PATHKERNEL_WALK_H
#define PATHKERNEL_WALK_H
#include "../run/revisit.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_WALK_IMPLEMENTED)
#define PATHKERNEL_WALK_IMPLEMENTED
/* >>> implementation */
PK__BEGIN_COLD_CODE

typedef struct pk__walk {
    const pk_run *run;
    /* ranges of parameters that belong to one group; one range of all, without groups */
    const pk_parameter_range *range;
    size_t range_count;
    pk_parameter_range all;
    /* linear forms of the step: that of the parameters outside all groups, then one for each group */
    pk_linear_form *forms;
    /* P: the gradient of the step, filled in by the caller, with the step's gradient scale */
    pk_real *gradient;
    pk_real *state, *p; /* V P, P: the optimizer's vectors, the preconditioner of the step */
} pk__walk;

/* The memory must be zero, which is the state before the first step. */
PK__PRIVATE void pk__walk_take(pk__arena *arena, const pk_run *run, pk__walk *walk)
{
    const size_t P = run->parameters,
                 vectors = pk_parameter_groups_state_vectors(&run->optimizer, &run->groups);
    walk->run = run;
    walk->forms = pk__arena_take(arena, 1 + run->groups.count, sizeof *walk->forms);
    walk->gradient = pk__arena_take(arena, P, sizeof(pk_real));
    walk->state = pk__arena_take(arena, P, vectors * sizeof(pk_real));
    walk->p = pk__arena_take(arena, P, sizeof(pk_real));
    walk->all.first = walk->all.group = 0;
    walk->all.count = P;
    walk->range = run->groups.count ? run->groups.range : &walk->all;
    walk->range_count = run->groups.count ? run->groups.range_count : 1;
}

/* Sets the optimizer's vectors before step 0, and m (P), the momentum of the linear form, where it is not NULL. */
PK__PRIVATE pk_status pk__walk_begin(pk_context *context, pk__walk *walk, double *m)
{
    const pk_run *run = walk->run;
    if (!run->initial_state.data) /* zeros: the arena's */
        return PK_OK;
    pk_status status = pk_run_initial_state(context, run, walk->state);
    if (status || !m)
        return status;
    pk__groups_first_momentum(&run->optimizer, &run->groups, run->parameters, walk->state, walk->p);
    for (size_t p = 0; p < run->parameters; p++)
        m[p] = (double)walk->p[p];
    return PK_OK;
}

/* The next step, s, whose gradient stands in walk->gradient: its forms and p. w: w_s. */
PK__PRIVATE pk_status pk__walk_step(pk_context *context, pk__walk *walk, size_t s, const pk_real *w)
{
    const pk_run *run = walk->run;
    const size_t P = run->parameters;
    const double rate = run->learning_rates[s], *rates = pk_run_group_rates(run, s);
    const pk__update whole = {s, rate, 1, P, P, w, walk->gradient, walk->state, NULL};
    pk_status status = PK_OK;
    pk__groups_update(&run->optimizer, &run->groups, rates, 0, &whole);
    const size_t moments = pk__groups_moments(&run->optimizer, &run->groups);
    if (run->second_moments.data && moments != SIZE_MAX)
        status = pk_run_second_moments(context, run, s, walk->state + moments * P);
    for (size_t r = 0; r < walk->range_count && !status; r++) {
        const pk_parameter_range *range = &walk->range[r];
        pk__group_form(&run->optimizer, &run->groups, range->group, s, rate, rates, range->count, P,
                       walk->state ? walk->state + range->first : NULL, &walk->forms[range->group],
                       walk->p + range->first);
    }
    return status;
}

/* Whether the optimizer divides by moments of earlier gradients, so that the linear form of a step depends on the gradients
 * of all steps before it. */
PK__PRIVATE int pk__walk_adapts(const pk_run *run)
{
    pk_linear_form form;
    pk_optimizer_linear_form(&run->optimizer, 0, 1, run->parameters, NULL, &form, NULL);
    return form.preconditioned;
}

/* The linear form of parameter number p. *range is 0 before the first call, and p grows from call to call. */
PK__PRIVATE const pk_linear_form *pk__walk_form(const pk__walk *walk, size_t p, size_t *range)
{
    while (p >= walk->range[*range].first + walk->range[*range].count)
        ++*range;
    return &walk->forms[walk->range[*range].group];
}

/* The number of examples in the largest batch of a run. */
PK__PRIVATE size_t pk__largest_batch(const pk_run *run)
{
    size_t largest = 0;
    for (size_t s = 0; s < run->steps; s++)
        largest = pk__max(largest, (size_t)(run->batch_offsets[s + 1] - run->batch_offsets[s]));
    return largest;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
