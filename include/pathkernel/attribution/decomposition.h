/* pathkernel/attribution/decomposition.h: what is asked of a decomposition and what it returns: sums of contributions over
 * examples, groups, steps and layers, the certificate, the costs. decompose.h computes it.
 */
#ifndef PATHKERNEL_DECOMPOSITION_H
#define PATHKERNEL_DECOMPOSITION_H
#include "../features/integral.h"
#include "../run/average.h"

/* >>> declarations */
PK__BEGIN_C

/* Axes of a result besides the test row and the output. They can be combined by |; a result has either examples or groups. */
enum { PK_BY_EXAMPLE = 1, PK_BY_GROUP = 2, PK_BY_STEP = 4, PK_BY_LAYER = 8, PK_BY_TOTAL = 16, PK_KEPT = 8 };

/* The tolerance of closures where none is given. What rounding leaves of them grows with the changes that add up: runs
 * of a few hundred steps leave about 1e-13 in double, 1e-5 in float. Where contributions are far smaller than the outputs,
 * rounding of the outputs hides a closure of that part of the contributions: up to PK_CLOSURE_ROUNDING of the outputs. */
#ifdef PATHKERNEL_FLOAT
#define PK_TOLERANCE 1e-3
#define PK_CLOSURE_ROUNDING 1e-4
#else
#define PK_TOLERANCE 1e-10
#define PK_CLOSURE_ROUNDING 1e-11
#endif

/* The unattributed part that a run may have although its training is declared correctly: each step rounds the weights and its gradient, and
 * these errors add up like a random walk. Measured on runs of 12 to 1500 steps by all optimizers, dense, convolutional and
 * with attention, trained in float32: at most 30 roundings times the root of the steps (docs/numerics.md). A run is in
 * float32 if it is stored so, or if all of its last weights are float32 numbers. In float64 the limit is generous, enough
 * for a recording that rounds carelessly: a wrongly declared run leaves far more. */
#define PK_UNATTRIBUTED_EPSILONS 128
#define PK_UNATTRIBUTED_LEAST 1e-10

typedef struct pk_decompose_options {
    pk_quadrature quadrature;
    pk_average
        average; /* decomposes the outputs of an average of the weights, along its own path (run/average.h); zeroed: none */
    /* 0: PK_TOLERANCE. A row is closed where |closure| is at most tolerance times its largest contribution (below), or
     * min(tolerance, PK_CLOSURE_ROUNDING) times its largest |initial| or |final|. Cost falls with a looser one, most where the
     * network has kinks: with one above PK_TOLERANCE these are split only where single contributions, too, need it. */
    double tolerance;
    /* The largest |unattributed| / max(1, |h|) that rounding explains. 0: PK_UNATTRIBUTED_EPSILONS roundings of the run's
     * numbers, times the root of its number of steps, but at least PK_UNATTRIBUTED_LEAST; where the largest output or
     * contribution of all rows is below 1, times that number. */
    double unattributed;
    pk_readout readout;
    /* Which sums of contributions to keep, e.g. {PK_BY_EXAMPLE, PK_BY_STEP | PK_BY_LAYER}; the first 0 ends the
     * list, none: PK_BY_EXAMPLE. PK_BY_TOTAL keeps none. */
    unsigned keep[PK_KEPT];
    const int64_t *groups; /* group of each training example, for PK_BY_GROUP */
    size_t group_count;
    int bounds;          /* 1: a bound on the error of each A(x, i); costs about four times as much */
    int step_closure;    /* 1: the closure of each step */
    pk_engine engine;    /* for tests and benchmarks */
    int reverse_time;    /* 1: the reverse-time form also where the optimizer has no state */
    size_t rows_at_once; /* test rows in one pass over the run; 0: as many as the memory allows */
    /* For decomposing in parts: a long job is cut into passes that take about this many seconds by the plan's estimate, so
     * that finished parts survive a cancel; but not into so many that repeating the examples' gradients takes more than a
     * tenth of the time. 0: one pass, if the memory allows it. */
    double pass_seconds;
    const struct pk__approximation
        *approximation; /* private: another rule in place of the exact one (steps.h) */
} pk_decompose_options;

/* A result: rows x outputs x (examples or groups) x steps x layers, with the axes that `axes` names, in C order. */
typedef struct pk_tensor {
    unsigned axes;
    int rank;
    size_t shape[5];
    size_t row_items; /* numbers per test row */
    double *data;
} pk_tensor;

typedef struct pk_decomposition {
    size_t first_row, rows, outputs, examples, groups, steps, layers;
    /* rows x outputs; data: the sum over the examples; inherited: of the state that the optimizer begins with (run.h), else 0:
     * final = initial + data + decay + inherited + unattributed + closure */
    double *initial, *final, *data, *decay, *inherited, *unattributed, *closure;
    pk_tensor kept[PK_KEPT];
    size_t kept_count;
    double *by_example, *by_step, *by_layer; /* (rows, outputs, examples | steps | layers) if kept, else NULL */
    double *bounds;                          /* rows x outputs x examples, or NULL */
    double *step_closure;                    /* rows x outputs x steps, or NULL */
    /* The certificate. A row's largest contribution is the largest of the kept numbers, of data, decay, inherited and unattributed
     * and of the sum over the steps of the change that each made, over all outputs. worst_closure: |closure| / (the
     * largest of these and of |initial| and |final| of the row); worst_relative: |closure| / (its largest contribution
     * alone), which in tiny steps of a trained network is rounding of the outputs; worst_excess: |closure| / (what the
     * tolerance allows it to be), above 1 where the result is PK_NOT_CLOSED, and the row and output where that is. */
    double worst_closure, worst_relative, worst_excess;
    size_t worst_row, worst_output;
    /* With bounds: the number of cells (row and output) whose closure exceeded the sum of their bounds by more than
     * rounding. Their bounds were raised until the sum was reached. */
    size_t raised;
    /* The step whose own closure is the worst. */
    double worst_step_closure;
    size_t worst_step, worst_step_row;
    /* The largest |unattributed| / max(1, |final|) and where it occurs; its limit; the largest output or contribution of
     * all rows. */
    double worst_unattributed, unattributed_limit, scale;
    size_t worst_unattributed_row, worst_unattributed_output;
    /* What it took: */
    size_t points;  /* quadrature nodes, over rows and steps */
    size_t pieces;  /* pieces between kinks, over rows and steps */
    size_t refused; /* pieces accepted although they missed their target */
    size_t passes;
    double flops; /* of the contraction */
    /* Seconds added up over threads: for reading and updates; for the examples' gradients; for the test side (forward along
     * the steps, kinks, nodes, reverse, the recurrence of reverse time); for the sums over the nodes; for the products with
     * the examples. */
    double seconds_read, seconds_examples, seconds_test, seconds_sums, seconds_contraction, seconds;
} pk_decomposition;

/* Gives the arrays back; a zeroed decomposition is allowed. */
PK_API void pk_decomposition_release(pk_context *context, pk_decomposition *decomposition);

/* Sets `indices` to those of the largest values (sign > 0) or the smallest (sign < 0), at most `wanted`, strongest first,
 * and only values of that sign; returns how many. Ties go to the lower index. Costs count * wanted. */
PK_API size_t pk_strongest(const double *values, size_t count, int sign, size_t wanted, size_t *indices);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DECOMPOSITION_IMPLEMENTED)
#define PATHKERNEL_DECOMPOSITION_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK_API size_t pk_strongest(const double *values, size_t count, int sign, size_t wanted, size_t *indices)
{
    size_t found = 0;
    for (size_t i = 0; i < count && wanted; i++) {
        double value = sign < 0 ? -values[i] : values[i];
        if (!(value > 0))
            continue;
        size_t at = found;
        while (at > 0 && value > (sign < 0 ? -values[indices[at - 1]] : values[indices[at - 1]]))
            at--;
        if (at == wanted)
            continue;
        found = pk__min(found + 1, wanted);
        memmove(indices + at + 1, indices + at, (found - at - 1) * sizeof *indices);
        indices[at] = i;
    }
    return found;
}

/* ---- results --------------------------------------------------------------------------------------- */

/* 1 if value is worse than worst. NaN is worse than any number. */
PK__PRIVATE int pk__worse(double value, double worst)
{
    return !(value <= worst) && !isnan(worst);
}

PK__PRIVATE pk_status pk__keep(pk_context *context, const pk_decompose_options *options, pk_decomposition *out)
{
    out->kept_count = 0;
    for (int i = 0; i < PK_KEPT && (options->keep[i] || i == 0); i++) {
        unsigned axes = options->keep[i] ? options->keep[i] : (unsigned)PK_BY_EXAMPLE;
        if (axes == PK_BY_TOTAL)
            continue;
        if (axes >= PK_BY_TOTAL || (axes & PK_BY_EXAMPLE && axes & PK_BY_GROUP))
            return pk__fail(context, PK_ARGUMENT, "keep[%d] = %u is no sum of axes that can be kept", i, axes);
        if (axes & PK_BY_GROUP && (!options->groups || !options->group_count))
            return pk__fail(context, PK_ARGUMENT, "keep[%d] wants groups, but no groups are given", i);
        pk_tensor *tensor = &out->kept[out->kept_count++];
        const size_t sizes[4] = {out->examples, out->groups, out->steps, out->layers};
        memset(tensor, 0, sizeof *tensor);
        tensor->axes = axes;
        tensor->shape[0] = out->rows;
        tensor->shape[1] = out->outputs;
        tensor->rank = 2;
        tensor->row_items = out->outputs;
        for (int axis = 0; axis < 4; axis++) {
            if (!(axes & (1U << axis)))
                continue;
            tensor->shape[tensor->rank++] = sizes[axis];
            if (!pk__multiply(tensor->row_items, sizes[axis], &tensor->row_items))
                return pk__fail(context, PK_OVERFLOW, "keep[%d]: the size of a kept tensor overflows", i);
        }
    }
    return PK_OK;
}

static void pk__name_tensors(pk_decomposition *out)
{
    out->by_example = out->by_step = out->by_layer = NULL;
    for (size_t i = 0; i < out->kept_count; i++) {
        if (out->kept[i].axes == PK_BY_EXAMPLE)
            out->by_example = out->kept[i].data;
        if (out->kept[i].axes == PK_BY_STEP)
            out->by_step = out->kept[i].data;
        if (out->kept[i].axes == PK_BY_LAYER)
            out->by_layer = out->kept[i].data;
    }
}

PK_API void pk_decomposition_release(pk_context *context, pk_decomposition *decomposition)
{
    pk_release(context, decomposition->initial); /* where the memory of all results begins */
    memset(decomposition, 0, sizeof *decomposition);
}

/* Each of the arrays of rows x outputs. */
enum { PK__RESULT_VECTORS = 7 };
static double **pk__result_vector(pk_decomposition *out, size_t index)
{
    double **const vectors[PK__RESULT_VECTORS] = {&out->initial, &out->final,     &out->data,
                                                  &out->decay,   &out->inherited, &out->unattributed,
                                                  &out->closure};
    return vectors[index];
}

/* Arrays for out->rows rows, one piece of memory that begins with out->initial, which is never empty. */
PK__PRIVATE pk_status pk__allocate_results(pk_context *context, const pk_decompose_options *options,
                                           pk_decomposition *out)
{
    const size_t cells = out->rows * out->outputs, row = out->rows * sizeof(double);
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        for (size_t i = 0; i < PK__RESULT_VECTORS; i++)
            *pk__result_vector(out, i) = pk__arena_take(&arena, cells, sizeof(double));
        for (size_t i = 0; i < out->kept_count; i++)
            out->kept[i].data = pk__arena_take(&arena, out->kept[i].row_items, row);
        out->bounds = pk__arena_take(&arena, options->bounds ? cells : 0, out->examples * sizeof(double));
        out->step_closure =
            pk__arena_take(&arena, options->step_closure ? cells : 0, out->steps * sizeof(double));
    } while (pk__arena_again(context, &arena, "the results", &status));
    for (size_t i = 0; i < out->kept_count; i++)
        out->kept[i].shape[0] = out->rows;
    pk__name_tensors(out);
    return status;
}

/* Makes a view of some rows of whole, into which a pass writes. */
PK__PRIVATE void pk__view_rows(const pk_decomposition *whole, size_t first, size_t rows, pk_decomposition *part)
{
    size_t cell = (first - whole->first_row) * whole->outputs;
    *part = *whole;
    part->first_row = first;
    part->rows = rows;
    for (size_t i = 0; i < PK__RESULT_VECTORS; i++)
        *pk__result_vector(part, i) += cell;
    for (size_t i = 0; i < part->kept_count; i++) {
        part->kept[i].shape[0] = rows;
        if (part->kept[i].data)
            part->kept[i].data += (first - whole->first_row) * part->kept[i].row_items;
    }
    if (part->bounds)
        part->bounds += cell * whole->examples;
    if (part->step_closure)
        part->step_closure += cell * whole->steps;
    pk__name_tensors(part);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
