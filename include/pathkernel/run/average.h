/* pathkernel/run/average.h: averages of a run's weights along training, as weights that one predicts with: an exponential moving
 * average (EMA), or the mean of every k-th step from some step on (stochastic weight averaging, SWA: Izmailov et al. 2018).
 *
 * An average a_s of w_0 .. w_s has a path of its own, a_0 = w_0 to a_S. With the weight c_s that update s gives to the new weights,
 *
 *     a_{s+1} = a_s + c_s (w_{s+1} - a_s),
 *     c_s = 1 up to step FROM: the average is w itself and starts there; 0 where no update is made,
 *     c_s = 1 - BETA (EMA), 1 / (the number of weights in the mean) (SWA).
 *
 * Its steps are linear in those of the weights, D_s. With the lag e_s = w_s - a_s, which is 0 at the start,
 *
 *     d_s = a_{s+1} - a_s = c_s (e_s + D_s),     e_{s+1} = (1 - c_s) (e_s + D_s),
 *
 * one more linear vector beside the momentum of the optimizer (optimizer.h). So f(a_S, x) is decomposed exactly along the path of
 * the average: with Psi_s(x) the integral of df/dw from a_s to a_{s+1},
 *
 *     f(a_S, x) - f(w_0, x) = sum_s < Psi_s, d_s > = sum_s < T_s, D_s >,     T_s = c_s Psi_s + (1 - c_s) T_{s+1},   T_S = 0.
 *
 * T_s, carried backward in time on the test side, takes the place of Phi_s in the decomposition of the last weights
 * (attribution/decompose.h), and all else stays: the optimizer's linear form, decay, what is inherited or unattributed.
 */
#ifndef PATHKERNEL_AVERAGE_H
#define PATHKERNEL_AVERAGE_H
#include "revisit.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_average_kind { PK_AVERAGE_NONE = 0, PK_AVERAGE_EMA, PK_AVERAGE_SWA } pk_average_kind;

/* Zeroed: the weights themselves. */
typedef struct pk_average {
    pk_average_kind kind;
    double beta;  /* EMA: what stays of the average in an update, in [0, 1) */
    size_t from;  /* the average starts as w_from, the weights after `from` steps */
    size_t every; /* then there is an update after every so many steps; 0: 1 */
} pk_average;

/* "ema:BETA", "ema:BETA:FROM", "ema:BETA:FROM:EVERY", "swa:FROM:EVERY". ema:BETA starts at w_0, as timm's; torch's AveragedModel,
 * updated after each step, starts as a copy of w_1: ema:BETA:1. swa:FROM:EVERY is the mean of w_FROM, w_{FROM+EVERY}, and so on.
 * PK_ARGUMENT tells what is wrong; *average is untouched then. */
PK_API PK__MUST_USE pk_status pk_average_parse(pk_context *context, const char *text, pk_average *average);

/* Whether there is such an average of a run of so many steps. PK_ARGUMENT names the field. */
PK_API PK__MUST_USE pk_status pk_average_check(pk_context *context, const pk_average *average, size_t steps);

/* c_s, see above; 1 without an average. */
PK_API double pk_average_weight(const pk_average *average, size_t step);

/* weights (P) := a_S of the run's first run->steps steps. Reads the weights of the steps that have a part in it, of a run with
 * keep_every all. PK_ARGUMENT, PK_MEMORY, PK_MEMORY_LIMIT, and the statuses of pk_replay_weights. */
PK_API PK__MUST_USE pk_status pk_run_average(pk_context *context, const pk_run *run, const pk_average *average,
                                             pk_real *weights);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_AVERAGE_IMPLEMENTED)
#define PATHKERNEL_AVERAGE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* Reads digits up to a ':' or the end; 0 where there is anything else. */
static int pk__average_whole(const char **text, size_t *number)
{
    const char *from = *text;
    size_t value = 0;
    for (; **text >= '0' && **text <= '9' && *text - from < 18; (*text)++)
        value = 10 * value + (size_t)(**text - '0');
    if (*text == from || (**text && **text != ':'))
        return 0;
    *text += **text == ':';
    *number = value;
    return 1;
}

PK_API pk_status pk_average_parse(pk_context *context, const char *text, pk_average *average)
{
    pk_average parsed;
    memset(&parsed, 0, sizeof parsed);
    if (!text || !average)
        return pk__fail(context, PK_ARGUMENT, "the text of the average or the place for it is NULL");
    const char *at = text + 4;
    const int ema = strncmp(text, "ema:", 4) == 0;
    int good = ema || strncmp(text, "swa:", 4) == 0;
    if (ema) {
        const size_t length = strcspn(at, ":");
        parsed.kind = PK_AVERAGE_EMA;
        good = pk__number(at, length, &parsed.beta);
        at += length;
        int more = good && *at == ':';
        at += more;
        if (more) {
            good = pk__average_whole(&at, &parsed.from);
            more = good && at[-1] == ':';
        }
        if (more)
            good = pk__average_whole(&at, &parsed.every);
        good = good && !*at && (!more || (at[-1] != ':' && parsed.every > 0));
    } else if (good) {
        parsed.kind = PK_AVERAGE_SWA;
        good = pk__average_whole(&at, &parsed.from) && at[-1] == ':' && pk__average_whole(&at, &parsed.every) &&
               at[-1] != ':' && !*at && parsed.every > 0;
    }
    if (!good)
        return pk__fail(
            context, PK_ARGUMENT,
            "'%.60s' is no average; these are ema:BETA, ema:BETA:FROM, ema:BETA:FROM:EVERY and swa:FROM:EVERY",
            text);
    if (!(parsed.beta >= 0 && parsed.beta < 1))
        return pk__fail(context, PK_ARGUMENT, "'%.60s': BETA is %g; it must be in [0, 1)", text, parsed.beta);
    parsed.every = pk__max(parsed.every, 1);
    *average = parsed;
    return PK_OK;
}

PK_API pk_status pk_average_check(pk_context *context, const pk_average *average, size_t steps)
{
    if (!average)
        return pk__fail(context, PK_ARGUMENT, "the average is NULL");
    if ((int)average->kind < 0 || average->kind > PK_AVERAGE_SWA)
        return pk__fail(context, PK_ARGUMENT, "the average is of kind %d, which is unknown",
                        (int)average->kind);
    if (average->kind == PK_AVERAGE_EMA && !(average->beta >= 0 && average->beta < 1))
        return pk__fail(context, PK_ARGUMENT, "the average has beta %g; it must be in [0, 1)", average->beta);
    if (average->kind && average->from > steps)
        return pk__fail(context, PK_ARGUMENT, "the average starts after step %zu; there are %zu steps",
                        average->from, steps);
    return PK_OK;
}

PK_API double pk_average_weight(const pk_average *average, size_t step)
{
    const size_t every = pk__max(average->every, 1);
    if (average->kind == PK_AVERAGE_NONE || step < average->from)
        return 1;
    const size_t since = step - average->from + 1;
    if (since % every)
        return 0;
    return average->kind == PK_AVERAGE_EMA ? 1 - average->beta : 1 / ((double)(since / every) + 1);
}

/* average += c (weights - average), and the change. change may be NULL. */
PK__PRIVATE void pk__average_update(double c, size_t count, const pk_real *weights, pk_real *average,
                                    pk_real *change)
{
    for (size_t p = 0; p < count; p++) {
        const pk_real before = average[p];
        average[p] = c == 1   ? weights[p]
                     : c == 0 ? before
                              : (pk_real)(before + c * ((double)weights[p] - before));
        if (change)
            change[p] = average[p] - before;
    }
}

PK_API pk_status pk_run_average(pk_context *context, const pk_run *run, const pk_average *average,
                                pk_real *weights)
{
    if (!run || !run->weights.data || !average || !weights)
        return pk__fail(context, PK_ARGUMENT, "pk_run_average: no run, no average or no weights");
    pk_status status = pk_average_check(context, average, run->steps);
    if (status)
        return status;
    pk_replay replay;
    pk_real *next = NULL;
    memset(&replay, 0, sizeof replay);
    const size_t first = average->kind ? average->from : run->steps;
    status = pk_allocate(context, run->parameters, sizeof *next, "the weights to average", &next);
    if (!status)
        status = pk_replay_prepare(context, run, 0, &replay);
    if (!status)
        status = pk_replay_weights(context, &replay, first, weights);
    for (size_t s = first; s < run->steps && !status; s++) {
        const double c = pk_average_weight(average, s);
        if (c == 0)
            continue;
        status = pk_replay_weights(context, &replay, s + 1, next);
        if (!status)
            pk__average_update(c, run->parameters, next, weights, NULL);
    }
    pk_replay_release(context, &replay);
    pk_release(context, next);
    return status;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
