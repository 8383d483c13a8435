/* bounds_campaign.c: do the bounds on the entries hold? Random runs of all kinds of networks, decomposed at four
 * tolerances, each entry against brute force (graph_oracle.h).
 *
 *     bounds_campaign COUNT FIRST_SEED [smooth|linear|mixed]    COUNT runs; exits with 1 where a promise is broken
 *     bounds_campaign --seed SEED [smooth|linear|mixed]         one run, in full
 *
 * Promises: no entry is further off than its bound; |closure| of a row's output is at most the sum of its bounds
 * (and what rounding leaves of two forward passes); at a
 * tolerance of 1e-10 no entry of a decomposition that closed is off by more than 1e-10 of the largest. Prints a line for each run and tolerance that
 * breaks one, then a table by kind of network and tolerance. */
#include "random_runs.h"

enum { TOLERANCES = 4 };
static const double tolerances[TOLERANCES] = {1e-2, 1e-5, 1e-7, 1e-10};
static const char *const kinds[RR_KINDS] = {"smooth", "linear", "mixed"};

/* All runs of one kind at one tolerance. */
typedef struct tally {
    size_t runs, entries, above, runs_above, cells, open, wide_open, points, pieces, refused, not_closed, off;
    double excess, error, open_factor, closure, others;
    double *looseness;
    size_t loose_count, loose_capacity;
} tally;

static void add(const rr_verdict *v, tally *t)
{
    t->runs++;
    t->entries += v->entries, t->above += v->above, t->runs_above += v->above > 0;
    t->cells += v->cells, t->open += v->open, t->wide_open += v->wide_open;
    t->points += v->points, t->pieces += v->pieces, t->refused += v->refused;
    t->not_closed += v->status == PK_NOT_CLOSED;
    t->off += v->error > 1e-10;
    t->excess = fmax(t->excess, v->excess), t->error = fmax(t->error, v->error);
    t->open_factor = fmax(t->open_factor, v->open_factor), t->closure = fmax(t->closure, v->closure);
    t->others = fmax(t->others, v->others);
    for (size_t i = 0; i < v->entries; i++) {
        if (!(v->looseness[i] > 0))
            continue;
        t->looseness =
            (double *)go_grow(t->looseness, t->loose_count, &t->loose_capacity, sizeof *t->looseness);
        t->looseness[t->loose_count++] = v->looseness[i];
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* the median, the geometric mean and the value that 99 % are below */
static void looseness_of(tally *t, double *median, double *mean, double *most)
{
    double sum = 0;
    *median = *mean = *most = 0;
    if (!t->loose_count)
        return;
    qsort(t->looseness, t->loose_count, sizeof *t->looseness, ascending);
    for (size_t i = 0; i < t->loose_count; i++)
        sum += log(t->looseness[i]);
    *median = t->looseness[t->loose_count / 2];
    *mean = exp(sum / (double)t->loose_count);
    *most = t->looseness[(size_t)(0.99 * (double)(t->loose_count - 1))];
}

static int broken(const rr_verdict *v, double tolerance)
{
    const int silent = v->status != PK_NOT_CLOSED && !(v->error - v->accuracy <= 1e-10);
    return v->above > 0 || v->wide_open > 0 || (tolerance <= 1e-10 && silent);
}

static void describe(const rr_run *r, const go_result *truth)
{
    printf("seed %llu %s: %s\n    %s, %s; P %zu, %zu steps, %zu examples, %zu rows; scale %.1e, pace %.1e; %zu "
           "pieces%s\n",
           (unsigned long long)r->seed, kinds[r->kind], r->network, r->optimizer, pk_loss_name(r->run.loss),
           r->run.parameters, r->run.steps, r->run.examples, r->rows, r->scale, r->pace, truth->pieces,
           truth->missed ? "; THE ORACLE DID NOT SETTLE" : "");
}

static void tell(const rr_verdict *v, double tolerance)
{
    printf("    at %.0e: error %.1e of the largest entry (%.1e, oracle %.0e), %zu of %zu entries above their "
           "bound, by up to %.3g; "
           "closure %.1e of it, %zu of %zu above the sum of bounds (%zu not by rounding, by up to %.3g); "
           "others %.1e; %zu nodes, %zu pieces, "
           "%zu refused%s\n",
           tolerance, v->error, v->largest, v->accuracy, v->above, v->entries, v->excess, v->closure, v->open,
           v->cells, v->wide_open, v->open_factor, v->others, v->points, v->pieces, v->refused,
           v->status == PK_NOT_CLOSED ? "; NOT CLOSED" : "");
}

/* -> whether a promise is broken */
static int one_run(uint64_t seed, rr_kind kind, int in_full, tally (*tallies)[TOLERANCES], size_t *unsettled)
{
    rr_run r;
    go_result truth;
    rr_verdict v;
    int any = 0;
    rr_make(seed, kind, &r);
    go_decompose(&r.run, r.rows, r.inputs, &truth);
    *unsettled += truth.missed > 0;
    if (in_full || truth.missed)
        describe(&r, &truth);
    for (int t = 0; t < TOLERANCES && (in_full || !truth.missed); t++) {
        rr_compare(&r, &truth, tolerances[t], 1, &v);
        const int bad = broken(&v, tolerances[t]);
        if (bad && !any && !in_full)
            describe(&r, &truth);
        any |= bad;
        if (bad || in_full)
            tell(&v, tolerances[t]);
        if (in_full) {
            tally own;
            double median, mean, most;
            memset(&own, 0, sizeof own);
            add(&v, &own);
            looseness_of(&own, &median, &mean, &most);
            printf("        bound / error: median %.2g, geometric mean %.2g, 99 %% below %.2g; reported "
                   "closure %.1e\n",
                   median, mean, most, v.reported);
            free(own.looseness);
        }
        add(&v, &tallies[r.kind][t]);
        free(v.looseness);
    }
    fflush(stdout);
    go_result_free(&truth);
    rr_free(&r);
    return any;
}

int main(int count, char **words)
{
    tally tallies[RR_KINDS][TOLERANCES];
    size_t bad = 0, unsettled = 0;
    const int single = count > 2 && strcmp(words[1], "--seed") == 0;
    rr_kind kind = RR_ANY;
    memset(tallies, 0, sizeof tallies);
    for (int k = 0; k < RR_KINDS && count > 3; k++)
        if (strcmp(words[3], kinds[k]) == 0)
            kind = (rr_kind)k;
    if (count < 3 || count > 4 || (count == 4 && kind == RR_ANY)) {
        fprintf(stderr,
                "usage: %s COUNT FIRST_SEED [smooth|linear|mixed], or --seed SEED [smooth|linear|mixed]\n",
                words[0]);
        return 2;
    }
    const uint64_t runs = single ? 1 : strtoull(words[1], NULL, 10), first = strtoull(words[2], NULL, 10);
    for (uint64_t seed = first; seed < first + runs; seed++)
        bad += (size_t)one_run(seed, kind, single, tallies, &unsettled);
    printf("%-7s %-9s %5s %7s %13s %9s %9s %13s %9s | %9s %9s %9s | %9s %6s %10s\n", "network", "tolerance",
           "runs", "entries", "above (runs)", "worst x", "error", "open (wide)", "worst x", "loose med",
           "geo mean", "99 %", "nodes", "refused", "not closed");
    for (int k = 0; k < RR_KINDS; k++)
        for (int t = 0; t < TOLERANCES; t++) {
            tally *y = &tallies[k][t];
            double median, mean, most;
            looseness_of(y, &median, &mean, &most);
            if (y->runs)
                printf("%-7s %-9.0e %5zu %7zu %7zu (%3zu) %9.2g %9.1e %6zu (%4zu) %9.2g | %9.2g %9.2g %9.2g | "
                       "%9zu %6zu %10zu\n",
                       kinds[k], tolerances[t], y->runs, y->entries, y->above, y->runs_above, y->excess,
                       y->error, y->open, y->wide_open, y->open_factor, median, mean, most, y->points,
                       y->refused, y->not_closed);
            free(y->looseness);
        }
    printf("%llu runs, %zu of them break a promise; the oracle did not settle in %zu\n",
           (unsigned long long)runs, bad, unsettled);
    return bad > 0;
}
