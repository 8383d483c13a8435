/* pathkernel/kernels/domingos.h: Domingos' kernel machine of a recorded run (2020, theorem 1), and its loss-weighted form.
 *
 * Under gradient flow, f(x) = sum_i a_i(x) K^p(x, x_i) + b(x) with the path kernel K^p and
 *     a_i(x) = - integral L'_i K^g dt / integral K^g dt,        b(x) = f(w_0, x):
 * both depend on x, and a_i is undefined where the integral of K^g is 0. What needs no division is
 *     contribution_c(x, i) = - integral sum_c' K^g_cc'(x, x_i) dl_i/df_c' dt,
 * which for networks with several outputs is the only form; then a_i,c is contribution_c / K^p_cc. A recorded run takes finite
 * steps, so that dt is eta_s along each step, and l_i has the weight c_{s,i}: the sum misses f(w_S, x) at first order in the
 * rate. The exact decomposition (pk_decompose) does not. Of a run with maximize=1, which goes up its gradients, both
 * contributions and a_i have the opposite sign.
 */
#ifndef PATHKERNEL_DOMINGOS_H
#define PATHKERNEL_DOMINGOS_H
#include "kernel.h"

/* >>> declarations */
PK__BEGIN_C

typedef struct pk_domingos {
    double *contributions; /* M x C x N */
    double *coefficients;  /* a: M x C x N, NaN where undefined; NULL: not wanted */
    double *intercept;     /* b: M x C; NULL: not wanted */
    size_t undefined;      /* coefficients that are not defined */
    double error;          /* of the integrals, of the largest entry, see pk_kernel_report */
} pk_domingos;

/* For the test rows `inputs` (M of them) and all N training rows; quadrature as in pk_kernel_options (zeroed: auto), tolerance 0:
 * 1e-10. The caller has set the pointers of *result.
 * Statuses of pk_kernels; PK_UNSUPPORTED: the result is complete, but some a_i are undefined, since the path kernel vanishes there
 * (within 1e-12 of its largest entry); the message names the first; or nothing is computed, since maximize is not the same for all
 * parameter groups that are trained: there is no one sign then. */
PK_API PK__MUST_USE pk_status pk_kernel_domingos(pk_context *context, const pk_run *run,
                                                 const pk_dataset *inputs, pk_quadrature quadrature,
                                                 double tolerance, pk_domingos *result);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_DOMINGOS_IMPLEMENTED)
#define PATHKERNEL_DOMINGOS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* b: the outputs before training. */
static pk_status pk__domingos_intercept(pk_context *context, const pk_run *run, const pk_dataset *inputs,
                                        size_t rows, double *intercept)
{
    const size_t D = run->graph.input_width, C = run->outputs;
    pk_real *w, *x, *f;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        w = pk__arena_take(&arena, run->parameters, sizeof *w);
        x = pk__arena_take(&arena, rows, D * sizeof *x);
        f = pk__arena_take(&arena, rows, C * sizeof *f);
    } while (pk__arena_again(context, &arena, "domingos", &status));
    if (!status)
        status = pk_run_weights(context, run, 0, w);
    if (!status) {
        pk_array_reals(&inputs->inputs, 0, rows * D, x);
        status =
            pk_graph_evaluate(context, &run->graph, w, pk_matrix_view(x, rows, D), pk_matrix_view(f, rows, C));
        for (size_t i = 0; !status && i < rows * C; i++)
            intercept[i] = f[i];
    }
    pk_release(context, arena.base);
    return status;
}

/* -1 of a run that goes down its gradients, 1 of one that goes up, 0 where parameter groups do both. */
static double pk__domingos_sign(const pk_run *run)
{
    const pk_parameter_groups *groups = &run->groups;
    double sign = 0;
    if (!groups->count)
        return run->optimizer.maximize ? 1 : -1;
    for (size_t r = 0; r < groups->range_count; r++) {
        const size_t group = groups->range[r].group;
        const double own = pk__group_optimizer(&run->optimizer, groups, group)->maximize ? 1 : -1;
        if (pk__group_frozen(groups, group) || own == sign)
            continue;
        if (sign != 0)
            return 0;
        sign = own;
    }
    return sign != 0 ? sign : -1;
}

/* From C matrices M x N of the path kernel, and behind them C of the contributions, which the sign turns: of steps down the gradients. */
static pk_status pk__domingos_fill(pk_context *context, const pk_run *run, size_t rows, const double *grams,
                                   pk_domingos *result)
{
    const size_t C = run->outputs, N = run->examples, plane = rows * N;
    const double sign = pk__domingos_sign(run);
    double largest = 0;
    size_t first = SIZE_MAX;
    for (size_t i = 0; i < C * plane; i++)
        largest = fmax(largest, fabs(grams[i]));
    for (size_t m = 0; m < rows; m++)
        for (size_t c = 0; c < C; c++)
            for (size_t i = 0; i < N; i++) {
                const double kernel = grams[c * plane + m * N + i];
                const size_t at = (m * C + c) * N + i;
                const int defined = fabs(kernel) > 1e-12 * largest;
                result->contributions[at] = sign * grams[(C + c) * plane + m * N + i];
                if (!result->coefficients)
                    continue;
                result->coefficients[at] = defined ? result->contributions[at] / kernel : NAN;
                result->undefined += !defined;
                first = defined ? first : pk__min(first, at);
            }
    return result->undefined
               ? pk__fail(
                     context, PK_UNSUPPORTED,
                     "domingos: %zu coefficients are undefined, where the path kernel is 0, the first that of "
                     "test row %zu, output %zu, training row %zu; the contributions are complete",
                     result->undefined, first / N / C, first / N % C, first % N)
               : PK_OK;
}

/* The path kernel of each output, then the contributions to it: 2 C kernels in one pass. */
static pk_kernel_options pk__domingos_option(const pk_kernel_options *first, size_t outputs, size_t number)
{
    pk_kernel_options options = *first;
    options.kind = number < outputs ? PK_KERNEL_PATH : (pk_kernel_kind)PK__KERNEL_LOSS_WEIGHTED;
    options.output = number % outputs;
    return options;
}

static pk_status pk__domingos_compute(pk_context *context, const pk_run *run, const pk_dataset *inputs,
                                      const pk_kernel_options *first, size_t rows, pk_domingos *result)
{
    const size_t C = run->outputs, plane = rows * run->examples;
    pk_kernel_options *options;
    pk_kernel_report *reports;
    double *numbers, **grams;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        options = pk__arena_take(&arena, 2 * C, sizeof *options);
        reports = pk__arena_take(&arena, 2 * C, sizeof *reports);
        grams = pk__arena_take(&arena, 2 * C, sizeof *grams);
        numbers = pk__arena_take(&arena, 2 * C, plane * sizeof *numbers);
    } while (pk__arena_again(context, &arena, "domingos", &status));
    for (size_t k = 0; !status && k < 2 * C; k++) {
        options[k] = pk__domingos_option(first, C, k);
        grams[k] = numbers ? numbers + k * plane : NULL;
    }
    if (!status && plane)
        status = pk__kernels_part(context, run, inputs, NULL, 2 * C, options, NULL, grams, reports);
    if (!status && result->intercept)
        status = pk__domingos_intercept(context, run, inputs, rows, result->intercept);
    for (size_t k = 0; !status && plane && k < 2 * C; k++) {
        double largest = 0;
        for (size_t i = 0; i < plane; i++)
            largest = fmax(largest, fabs(grams[k][i]));
        result->error = fmax(result->error, largest > 0 ? reports[k].error / largest : 0);
    }
    if (!status && plane)
        status = pk__domingos_fill(context, run, rows, numbers, result);
    pk_release(context, arena.base);
    return status;
}

typedef struct pk__domingos_sample {
    const pk_run *run;
    const pk_dataset *inputs;
    const pk_kernel_options *first;
    size_t rows;
} pk__domingos_sample;

static pk_status pk__domingos_sample_run(pk_context *context, void *user)
{
    const pk__domingos_sample *own = user;
    const size_t C = own->run->outputs;
    pk_kernel_options *options = NULL;
    pk_status status = pk_allocate(context, 2 * C, sizeof *options, "domingos", &options);
    pk__kernel_sample sample = {.run = own->run, .left = own->inputs, .count = 2 * C, .options = options};
    for (size_t k = 0; !status && k < 2 * C; k++)
        options[k] = pk__domingos_option(own->first, C, k);
    if (!status)
        sample.beside =
            pk__kernel_beside(own->run, own->inputs, NULL, 2 * C, options) +
            2 * C * (own->rows * own->run->examples * sizeof(double) + sizeof(pk_kernel_report) + 128);
    if (!status)
        status = pk__kernel_sample_run(context, &sample);
    pk_release(context, options);
    return status;
}

PK_API pk_status pk_kernel_domingos(pk_context *context, const pk_run *run, const pk_dataset *inputs,
                                    pk_quadrature quadrature, double tolerance, pk_domingos *result)
{
    const pk_kernel_options first = {
        .kind = PK_KERNEL_PATH, .outputs = PK_OUTPUTS_ONE, .quadrature = quadrature, .tolerance = tolerance};
    size_t shape[6];
    int rank;
    if (!inputs || !result || !result->contributions)
        return pk__fail(context, PK_ARGUMENT,
                        "domingos: the test rows or the place for the result are missing");
    pk_status status = pk_kernel_shape(context, run, inputs, NULL, &first, shape, &rank);
    if (status)
        return status;
    if (pk__domingos_sign(run) == 0)
        return pk__fail(context, PK_UNSUPPORTED,
                        "domingos: maximize is not the same for all parameter groups, so that the kernel's "
                        "coefficients have no one sign");
    result->undefined = 0;
    result->error = 0;
    status = pk__domingos_compute(context, run, inputs, &first, shape[0], result);
    if (status != PK_MEMORY_LIMIT)
        return status;
    pk__domingos_sample sample = {run, inputs, &first, shape[0]};
    return pk__fail_with_least(context, "domingos", pk__domingos_sample_run, &sample);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
