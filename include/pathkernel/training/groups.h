/* pathkernel/training/groups.h: parameter groups: tensors of w with optimizer options and learning rates of their own, as
 * PyTorch's optimizers have them.
 *
 *     const char *lines[] = {"1,3,5-7 weight_decay=0 rate=0.1", "0 frozen"};
 *     pk_parameter_groups_parse(context, &graph, &optimizer, 2, lines, &groups);
 *
 * Tensors are the weight blocks of the graph (graph.h) and have their numbers. Tensors in no group have the optimizer and the
 * rate of the step.
 */
#ifndef PATHKERNEL_GROUPS_H
#define PATHKERNEL_GROUPS_H
#include "../network/graph.h"
#include "optimizer.h"

/* >>> declarations */
PK__BEGIN_C

enum { PK_GROUPS_MOST = 1024 };

typedef struct pk_parameter_group {
    pk_optimizer optimizer; /* of the same rule as that of the tensors in no group */
    double rate;            /* a factor of the step's learning rate, unless groups have rates of their own */
    int frozen;             /* never updated */
    int keys, rated;        /* how many keys its line had; whether rate= was among them */
    size_t line;            /* its line in run.txt, or 0 */
} pk_parameter_group;

/* Consecutive parameters of one group; group 0: those in no group, 1: the first group. */
typedef struct pk_parameter_range {
    size_t first, count, group;
} pk_parameter_range;

/* Zeroed = no groups. */
typedef struct pk_parameter_groups {
    size_t count, tensor_count, range_count;
    pk_parameter_group *group;
    pk_parameter_range *range; /* all of w, in order */
    size_t *tensor;            /* the group of each weight block, numbered as in a range */
} pk_parameter_groups;

/* Parses group lines "TENSORS key=value ..." (TENSORS: 1,3,5-7): keys of the optimizer whose values differ for these tensors,
 * rate=F, or only the word `frozen`. PK_FORMAT and PK_ARGUMENT name the group and the tensor or word; *groups is untouched
 * then. Without lines, *groups is zeroed. */
PK_API PK__MUST_USE pk_status pk_parameter_groups_parse(pk_context *context, const pk_graph *graph,
                                                        const pk_optimizer *optimizer, size_t count,
                                                        const char *const *lines, pk_parameter_groups *groups);
PK_API void pk_parameter_groups_release(pk_context *context, pk_parameter_groups *groups);
/* pk_optimizer_state_vectors of the group that has most of them. groups may be NULL. */
PK_API size_t pk_parameter_groups_state_vectors(const pk_optimizer *optimizer,
                                                const pk_parameter_groups *groups);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_GROUPS_IMPLEMENTED)
#define PATHKERNEL_GROUPS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

static int pk__is_grouped(const pk_parameter_groups *groups)
{
    return groups && groups->count > 0;
}

static double pk__group_rate(const pk_parameter_groups *groups, size_t group, double rate, const double *rates)
{
    return !group ? rate : rates ? rates[group - 1] : groups->group[group - 1].rate * rate;
}

static const pk_optimizer *pk__group_optimizer(const pk_optimizer *optimizer, const pk_parameter_groups *groups,
                                               size_t group)
{
    return group ? &groups->group[group - 1].optimizer : optimizer;
}

static int pk__group_frozen(const pk_parameter_groups *groups, size_t group)
{
    return group && groups->group[group - 1].frozen;
}

/* The number of parameters of a range within [first, first + count); *at: where they begin, counted from `first`. */
static size_t pk__range_part(const pk_parameter_range *range, size_t first, size_t count, size_t *at)
{
    const size_t from = pk__max(range->first, first), to = pk__min(range->first + range->count, first + count);
    *at = from - first;
    return to > from ? to - from : 0;
}

/* Computes the update of the parameters [first, first + whole->count), to whose numbers `whole` points. rates: those of the
 * groups at this step, or NULL. */
PK__PRIVATE void pk__groups_update(const pk_optimizer *optimizer, const pk_parameter_groups *groups,
                                   const double *rates, size_t first, const pk__update *whole)
{
    if (!pk__is_grouped(groups)) {
        pk__optimizer_part(optimizer, whole);
        return;
    }
    for (size_t r = 0; r < groups->range_count; r++) {
        const pk_parameter_range *range = &groups->range[r];
        size_t at;
        pk__update part = *whole;
        part.count = pk__range_part(range, first, whole->count, &at);
        if (!part.count)
            continue;
        part.rate = pk__group_rate(groups, range->group, whole->rate, rates);
        part.weights += at;
        part.gradient += part.gradient ? at : 0;
        part.state = part.state ? part.state + at : NULL;
        part.update = part.update ? part.update + at : NULL;
        if (!pk__group_frozen(groups, range->group))
            pk__optimizer_part(pk__group_optimizer(optimizer, groups, range->group), &part);
        else if (part.update)
            memset(part.update, 0, part.count * sizeof *part.update);
    }
}

/* The linear form of one group at a step, for `count` parameters with their state. p is a vector, whatever the rule, so that
 * groups can be stored side by side; it may be NULL. For a frozen group all is zero. */
PK__PRIVATE void pk__group_form(const pk_optimizer *optimizer, const pk_parameter_groups *groups, size_t group,
                                size_t step, double rate, const double *rates, size_t count, size_t apart,
                                const pk_real *state, pk_linear_form *form, pk_real *p)
{
    memset(form, 0, sizeof *form);
    if (!pk__group_frozen(groups, group))
        pk__optimizer_form(pk__group_optimizer(optimizer, groups, group), step,
                           pk__group_rate(groups, group, rate, rates), count, apart, state, form, p);
    for (size_t i = 0; p && !form->preconditioned && i < count; i++)
        p[i] = (pk_real)form->rate;
    form->preconditioned = 1;
}

/* The number of the state vector that second_moments.npy has, of all groups alike; SIZE_MAX: there is none. */
PK__PRIVATE size_t pk__groups_moments(const pk_optimizer *optimizer, const pk_parameter_groups *groups)
{
    const size_t moments = pk__optimizer_moments(optimizer);
    for (size_t g = 0; groups && g < groups->count; g++)
        if (!groups->group[g].frozen && pk__optimizer_moments(&groups->group[g].optimizer) != moments)
            return SIZE_MAX;
    return moments;
}

/* m (P): the momentum of the linear form before step 0, from the state to begin with (V P); 0 where a tensor has none. */
PK__PRIVATE void pk__groups_first_momentum(const pk_optimizer *optimizer, const pk_parameter_groups *groups,
                                           size_t parameters, const pk_real *state, pk_real *m)
{
    const pk_parameter_range all = {0, parameters, 0};
    const size_t ranges = pk__is_grouped(groups) ? groups->range_count : 1;
    for (size_t r = 0; r < ranges; r++) {
        const pk_parameter_range *range = pk__is_grouped(groups) ? &groups->range[r] : &all;
        const pk_optimizer *own = pk__group_optimizer(optimizer, groups, range->group);
        const size_t vector = pk__group_frozen(groups, range->group) ? SIZE_MAX : pk__optimizer_momentum(own);
        for (size_t i = range->first; i < range->first + range->count; i++)
            m[i] = vector == SIZE_MAX ? 0
                   : own->maximize    ? -state[vector * parameters + i]
                                      : state[vector * parameters + i];
    }
}

/* Why there is none. */
PK__PRIVATE const char *pk__no_moments(const pk_optimizer *optimizer)
{
    return optimizer->kind == PK_RMSPROP
               ? "those of rmsprop with momentum= or centered=1 are recomputed, not recorded"
               : "amsgrad is not the same for all parameter groups";
}

/* Sets the gradient of frozen tensors to zero, so that they do not count in the norm that is clipped. */
PK__PRIVATE void pk__groups_forget_frozen(const pk_parameter_groups *groups, pk_real *gradient)
{
    for (size_t r = 0; pk__is_grouped(groups) && r < groups->range_count; r++)
        if (pk__group_frozen(groups, groups->range[r].group))
            memset(gradient + groups->range[r].first, 0, groups->range[r].count * sizeof *gradient);
}

PK_API size_t pk_parameter_groups_state_vectors(const pk_optimizer *optimizer,
                                                const pk_parameter_groups *groups)
{
    size_t vectors = pk_optimizer_state_vectors(optimizer);
    for (size_t g = 0; groups && g < groups->count; g++)
        if (!groups->group[g].frozen)
            vectors = pk__max(vectors, pk_optimizer_state_vectors(&groups->group[g].optimizer));
    return vectors;
}

/* Reads a number at *text and moves *text past it. Returns 0 if there is none. */
static int pk__tensor_number(const char **text, size_t *number)
{
    const char *from = *text;
    *number = 0;
    for (; **text >= '0' && **text <= '9' && *text - from < 10; (*text)++)
        *number = 10 * *number + (size_t)(**text - '0');
    return *text > from;
}

static pk_status pk__group_tensors(pk_context *context, const char **line, size_t number,
                                   pk_parameter_groups *groups)
{
    const char *text = *line;
    const int shown = (int)pk__min(strcspn(text, " \t"), 40);
    for (int more = 1; more; text += more) {
        size_t first, last;
        int good = pk__tensor_number(&text, &first);
        last = first;
        if (good && *text == '-') {
            text++;
            good = pk__tensor_number(&text, &last);
        }
        more = *text == ',';
        if (!good || (*text && !strchr(", \t", *text)))
            return pk__fail(context, PK_FORMAT, "'%.*s' is not a list of tensors such as 1,3,5-7", shown,
                            *line);
        if (last < first)
            return pk__fail(context, PK_FORMAT, "tensors %zu-%zu: the last comes before the first", first,
                            last);
        if (last >= groups->tensor_count)
            return pk__fail(context, PK_ARGUMENT, "tensor %zu: the network has %zu, numbered from 0", last,
                            groups->tensor_count);
        for (size_t t = first; t <= last; t++) {
            if (groups->tensor[t] == number)
                return pk__fail(context, PK_FORMAT, "tensor %zu stands twice in this group", t);
            if (groups->tensor[t])
                return pk__fail(context, PK_FORMAT,
                                "tensor %zu is in group %zu already; groups are numbered from 0", t,
                                groups->tensor[t] - 1);
            groups->tensor[t] = number;
        }
    }
    *line = text;
    return PK_OK;
}

static pk_status pk__group_line(pk_context *context, const pk_optimizer *optimizer, const char *text,
                                size_t number, pk_parameter_groups *groups)
{
    const char *space = " \t";
    pk_parameter_group *group = &groups->group[number - 1];
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    unsigned seen = 0;
    group->optimizer = *optimizer;
    group->rate = 1;
    text += strspn(text, space);
    pk_status status = pk__group_tensors(context, &text, number, groups);
    for (text += strspn(text, space); !status && *text; text += strspn(text, space)) {
        const size_t length = strcspn(text, space);
        if (length == 6 && memcmp(text, "frozen", 6) == 0) {
            if (group->frozen)
                return pk__fail(context, PK_FORMAT, "'frozen' stands twice");
            group->frozen = 1;
        } else if (length > 4 && memcmp(text, "rate=", 5) == 0) {
            if (group->rated)
                return pk__fail(context, PK_FORMAT, "'%.*s' gives rate a second time", (int)pk__min(length, 40),
                                text);
            if (!pk__number(text + 5, length - 5, &group->rate))
                return pk__fail(context, PK_FORMAT, "'%.*s' is not rate=number", (int)pk__min(length, 40),
                                text);
            if (!isfinite(group->rate) || group->rate < 0)
                return pk__fail(context, PK_ARGUMENT, "rate is %.17g; it must be finite and >= 0", group->rate);
            group->rated = 1;
            group->keys++;
        } else {
            status = pk__optimizer_word(context, rule, text, length, &group->optimizer, &seen);
            group->keys++;
        }
        text += length;
    }
    if (!status && group->frozen && group->keys)
        status = pk__fail(context, PK_FORMAT, "a frozen group has no other key");
    if (!status && pk__optimizer_decoupled(&group->optimizer) != pk__optimizer_decoupled(optimizer))
        status = pk__fail(context, PK_UNSUPPORTED, "decoupled_weight_decay must be the same for all tensors");
    return status;
}

/* Neighbouring tensors of one group are one range. */
static void pk__group_ranges(const pk_graph *graph, pk_parameter_groups *groups)
{
    for (size_t t = 0; t < groups->tensor_count; t++) {
        pk_parameter_range *range = groups->range_count ? &groups->range[groups->range_count - 1] : NULL;
        if (!range || range->group != groups->tensor[t]) {
            range = &groups->range[groups->range_count++];
            range->first = graph->blocks[t].first;
            range->count = 0;
            range->group = groups->tensor[t];
        }
        range->count += graph->blocks[t].count;
    }
}

PK_API void pk_parameter_groups_release(pk_context *context, pk_parameter_groups *groups)
{
    pk_release(context, groups->group);
    pk_release(context, groups->range);
    pk_release(context, groups->tensor);
    memset(groups, 0, sizeof *groups);
}

/* pk_parameter_groups_parse without checks of its arguments; *at: the number of the line with an error. */
PK__PRIVATE pk_status pk__groups_parse(pk_context *context, const pk_graph *graph,
                                       const pk_optimizer *optimizer, size_t count, const char *const *lines,
                                       pk_parameter_groups *groups, size_t *at)
{
    pk_parameter_groups parsed;
    memset(&parsed, 0, sizeof parsed);
    *at = 0;
    if (count) {
        parsed.count = count;
        parsed.tensor_count = graph->block_count;
        pk_status status = pk_allocate(context, count, sizeof *parsed.group, "parameter groups", &parsed.group);
        if (!status)
            status = pk_allocate(context, parsed.tensor_count, sizeof *parsed.range, "parameter ranges",
                                 &parsed.range);
        if (!status)
            status = pk_allocate(context, parsed.tensor_count, sizeof *parsed.tensor, "the groups of tensors",
                                 &parsed.tensor);
        if (!status) {
            memset(parsed.group, 0, count * sizeof *parsed.group);
            memset(parsed.tensor, 0, parsed.tensor_count * sizeof *parsed.tensor);
        }
        for (; !status && *at < count; *at += !status)
            status = pk__group_line(context, optimizer, lines[*at], *at + 1, &parsed);
        if (!status)
            pk__group_ranges(graph, &parsed);
        if (status) {
            pk_parameter_groups_release(context, &parsed);
            return status;
        }
    }
    *groups = parsed;
    return PK_OK;
}

PK_API pk_status pk_parameter_groups_parse(pk_context *context, const pk_graph *graph,
                                           const pk_optimizer *optimizer, size_t count,
                                           const char *const *lines, pk_parameter_groups *groups)
{
    size_t at = 0;
    if (!graph || !optimizer || (count && !lines) || !groups || count > PK_GROUPS_MOST)
        return pk__fail(context, PK_ARGUMENT,
                        "parameter groups: graph, optimizer or lines are missing, or more than %d",
                        (int)PK_GROUPS_MOST);
    for (size_t g = 0; g < count; g++)
        if (!lines[g])
            return pk__fail(context, PK_ARGUMENT, "parameter groups: line %zu is NULL", g);
    pk_status status = pk__groups_parse(context, graph, optimizer, count, lines, groups, &at);
    char message[PK_MESSAGE_SIZE];
    if (!status || !context)
        return status;
    memcpy(message, context->message, sizeof message);
    return pk__fail(context, status, "group %zu: %.*s", at, (int)sizeof message - 32, message);
}

/* The largest size of the text of all group lines, in bytes. */
PK__PRIVATE size_t pk__groups_text_size(const pk_parameter_groups *groups)
{
    return 24 * groups->tensor_count + 512 * groups->count + 1;
}

/* Writes "group 1,3,5-7 weight_decay=0 rate=0.1\n" for each group, in canonical form: equal groups have equal texts. */
PK__PRIVATE void pk__groups_text(const pk_optimizer *optimizer, const pk_parameter_groups *groups, char *text,
                                 size_t size)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    size_t used = 0;
    text[0] = '\0';
    for (size_t g = 0; g < groups->count; g++) {
        const pk_parameter_group *group = &groups->group[g];
        const char *before = "group     ";
        for (size_t t = 0, last; t < groups->tensor_count; t = last + 1) {
            last = t;
            if (groups->tensor[t] != g + 1)
                continue;
            while (last + 1 < groups->tensor_count && groups->tensor[last + 1] == g + 1)
                last++;
            used +=
                (size_t)snprintf(text + used, size - used, last > t ? "%s%zu-%zu" : "%s%zu", before, t, last);
            before = ",";
        }
        if (group->frozen)
            used += (size_t)snprintf(text + used, size - used, " frozen");
        const size_t bare = used;
        for (const pk__optimizer_key *key = rule->keys; !group->frozen && key->name; key++) {
            const double value = pk__key_get(key, &group->optimizer);
            if (value != pk__key_get(key, optimizer))
                used += pk__key_text(key->name, value, text + used, size - used);
        }
        if (group->rated && (group->rate != 1 || used == bare))
            used += pk__key_text("rate", group->rate, text + used, size - used);
        else if (group->keys && used == bare) /* its keys repeat the optimizer's values, but it needs one */
            used += pk__key_text(rule->keys[0].name, pk__key_get(&rule->keys[0], &group->optimizer),
                                 text + used, size - used);
        used += (size_t)snprintf(text + used, size - used, "\n");
    }
}

PK__END_CODE
/* <<< implementation */
#endif
