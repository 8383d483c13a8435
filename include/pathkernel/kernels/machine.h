/* pathkernel/kernels/machine.h: kernel machines on a Gram matrix: ridge regression, logistic and softmax regression, support
 * vector machines. They see the matrix and targets only, so that the matrix may come from anywhere.
 *
 * With f = K alpha + b, b = 0 without an intercept, each minimizes, over its n training rows,
 *
 *     sum_i l(y_i, f_i) + (lambda / 2) penalty,      penalty: alpha^T K alpha, or |alpha|^2; b is not penalized
 *
 *     l: squared (f - y)^2 / 2, logistic log(1 + exp(-y f)), softmax cross entropy, hinge max(0, 1 - y f), its square,
 *     epsilon-insensitive max(0, |f - y| - epsilon)
 *
 * so that the C of libsvm is 1 / lambda. How each is found, and what shows that it was:
 *
 *   Ridge. With A = K + lambda I = L L^T and P = A^-1 - A^-1 1 1^T A^-1 / (1^T A^-1 1) (without an intercept P = A^-1):
 *   alpha = P y, f = y - lambda alpha, H = I - lambda P maps y to f. The prediction of row i by the machine of the others is
 *   y_i - (y_i - f_i) / (1 - H_ii) = y_i - alpha_i / P_ii. Shown by: the residual of the equations.
 *
 *   Logistic and softmax, alpha^T K alpha: Newton's method on the function values (Rasmussen and Williams 2006, algorithms 3.1 and
 *   3.3: a Cholesky factor of order n for each class), with line search. At the minimum alpha = (target - p) / lambda: the step
 *   is taken in alpha, so nothing is ever divided by K. |alpha|^2: the same with K^2 in K's place, and alpha = K beta. Shown by:
 *   the gradient.
 *
 *   Support vector machines: sequential minimal optimization on the dual, pairs chosen by second-order gain (Fan, Chen and Lin
 *   2005), single rows where there is no intercept; then the equations of the rows between the bounds are solved at once,
 *   as long as that lowers the duality gap. The squared hinge is the hinge without an upper bound on K + (lambda / 2) I.
 *   Shown by: the duality gap.
 *
 * Several classes with logistic or a hinge: one machine for each against the rest.
 */
#ifndef PATHKERNEL_MACHINE_H
#define PATHKERNEL_MACHINE_H
#include "../data/array.h"
#include "../math/measure.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_machine_loss {
    PK_MACHINE_SQUARED = 1,
    PK_MACHINE_LOGISTIC,
    PK_MACHINE_SOFTMAX,
    PK_MACHINE_HINGE,
    PK_MACHINE_SQUARED_HINGE,
    PK_MACHINE_EPSILON_INSENSITIVE
} pk_machine_loss;

/* "squared", "logistic" ...; NULL for none. And the loss of a name; 0 for none. */
PK_API const char *pk_machine_loss_name(pk_machine_loss loss);
PK_API pk_machine_loss pk_machine_loss_find(const char *name);

typedef struct pk_machine_options {
    pk_machine_loss loss;
    double regularization;     /* lambda; > 0, or for squared 0 where K is positive definite */
    double epsilon;            /* of the epsilon-insensitive loss, >= 0 */
    int penalize_coefficients; /* |alpha|^2 in place of alpha^T K alpha: logistic and softmax only */
    int intercept;
    double tolerance; /* of the certificate; 0: 1e-9 */
    double rounding;  /* of the matrix's numbers: eigenvalues down to -rounding trace count as 0; 0: 1e-10 */
} pk_machine_options;

typedef struct pk_machine {
    pk_machine_options options;
    size_t rows, outputs; /* n, K */
    double *coefficients; /* n x K: alpha; of a support vector machine y_i alpha_i of the literature */
    double *intercept;    /* K; zeros without one */
    double *fitted;       /* n x K: f */
    double *objective;    /* K; of softmax the whole at [0] */
    /* How far from the minimum: ridge |A alpha + b - y|_max / |y|_max; logistic and softmax |gradient|_max relative to that
     * at 0; support vector machines (primal - dual objective) / primal. The largest of the outputs. */
    double certificate;
    int iterations; /* the most of an output */
    /* Ridge only, else NULL or NAN: */
    double *leave_one_out; /* n x K: the prediction of row i by the machine of the other rows */
    double *leverage;      /* n: H_ii; their sum, the effective degrees of freedom: */
    double degrees_of_freedom;
    double *
        kare; /* K: kernel alignment risk estimator [y^T A^-2 y / n] / [tr A^-1 / n]^2 (Jacot et al. 2020), no intercept */
    double *factor; /* n x n: Cholesky's, of A; for the variance */
    double *ones;   /* n: A^-1 1; NULL without an intercept */
    void *memory;
} pk_machine;

/* Fits the machine. gram (n x n): symmetric to 1e-6 of its largest number (the mean of both triangles is taken) and positive
 * semidefinite up to options->rounding, else PK_ARGUMENT with the least eigenvalue. targets: (n,) or (n, K) numbers for squared and
 * epsilon_insensitive; (n,) integers 0 to K - 1 for softmax; for logistic and the hinges (n,) of +1 and -1, or integers 0 to C - 1: one machine against the
 * rest for each class, or for C = 2 one, +1 for class 1. An intercept that has no finite best value (logistic and softmax with a
 * class without rows) is PK_ARGUMENT. PK_NOT_CLOSED: fitted, but the certificate exceeds the tolerance. Cost: ridge n^3/3 flops for
 * the factor and as many for P; logistic and softmax n^3/3 a class and iteration; support vector machines n a pair. Memory: about
 * 3 n^2 numbers; softmax (K + 2) n^2. */
PK_API PK__MUST_USE pk_status pk_machine_fit(pk_context *context, size_t n, const double *gram,
                                             const pk_array *targets, const pk_machine_options *options,
                                             pk_machine *machine);
/* Gives back what it holds, and zeroes it; zeroed or NULL is allowed. */
PK_API void pk_machine_release(pk_context *context, pk_machine *machine);

/* predictions (m x K) = gram alpha + b, of test rows: gram (m x n) holds k(test row, training row). */
PK_API PK__MUST_USE pk_status pk_machine_predict(pk_context *context, const pk_machine *machine, size_t m,
                                                 const double *gram, double *predictions);

/* shares (m x K x n): shares[m k i] = gram[m i] alpha[i k], which with b_k add up to the prediction. */
PK_API PK__MUST_USE pk_status pk_machine_attribute(pk_context *context, const pk_machine *machine, size_t m,
                                                   const double *gram, double *shares);

/* Ridge: variance (m) of the Gaussian process with covariance k and noise lambda, given the training targets: k(x, x) - k_x^T A^-1
 * k_x; with an intercept, whose prior is flat, + (1 - 1^T A^-1 k_x)^2 / (1^T A^-1 1). diagonal (m): k(x, x). Cost n^2 flops a row. */
PK_API PK__MUST_USE pk_status pk_machine_variance(pk_context *context, const pk_machine *machine, size_t m,
                                                  const double *gram, const double *diagonal, double *variance);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_MACHINE_IMPLEMENTED)
#define PATHKERNEL_MACHINE_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum { PK__MACHINE_STEPS = 200, PK__POLISHES = 40 };
#define PK__MACHINE_TOLERANCE 1e-9
#define PK__MACHINE_ROUNDING 1e-10

/* What a loss takes. */
static const struct pk__machine_kind {
    const char *name;
    int numbers; /* targets are numbers, not classes */
    int signs;   /* targets are +1 and -1, or classes */
} pk__machine_kinds[] = {
    [PK_MACHINE_SQUARED] = {.name = "squared", .numbers = 1},
    [PK_MACHINE_LOGISTIC] = {.name = "logistic", .signs = 1},
    [PK_MACHINE_SOFTMAX] = {.name = "softmax"},
    [PK_MACHINE_HINGE] = {.name = "hinge", .signs = 1},
    [PK_MACHINE_SQUARED_HINGE] = {.name = "squared_hinge", .signs = 1},
    [PK_MACHINE_EPSILON_INSENSITIVE] = {.name = "epsilon_insensitive", .numbers = 1},
};
enum { PK__MACHINE_KINDS = sizeof pk__machine_kinds / sizeof *pk__machine_kinds };

PK_API const char *pk_machine_loss_name(pk_machine_loss loss)
{
    return loss > 0 && (size_t)loss < PK__MACHINE_KINDS ? pk__machine_kinds[loss].name : NULL;
}

PK_API pk_machine_loss pk_machine_loss_find(const char *name)
{
    for (int i = 1; name && i < PK__MACHINE_KINDS; i++)
        if (strcmp(pk__machine_kinds[i].name, name) == 0)
            return (pk_machine_loss)i;
    return (pk_machine_loss)0;
}

typedef struct pk__fitting {
    pk_context *context;
    const pk_machine_options *options;
    pk_machine *machine;
    size_t n, outputs;
    const double *gram;    /* symmetric */
    const double *targets; /* n x K: numbers, +1 and -1, or of softmax 1 for the right class and 0 for others */
} pk__fitting;

/* ---- targets --------------------------------------------------------------------------------------------- */

/* Counts the outputs, and says what is wrong with the targets. *classes: 0, or integers 0 to classes - 1 are to be told apart. */
static pk_status pk__machine_targets(pk_context *context, size_t n, const pk_array *targets,
                                     const pk_machine_options *options, size_t *outputs, size_t *classes)
{
    const struct pk__machine_kind *kind = &pk__machine_kinds[options->loss];
    const int integers = targets->type != PK_FLOAT64 && targets->type != PK_FLOAT32;
    int signs = kind->signs;
    int64_t largest = 0;
    char has[180];
    *outputs = 1;
    *classes = 0;
    if (!targets->rank || targets->shape[0] != n || targets->rank > (kind->numbers ? 2 : 1))
        return pk__fail(context, PK_SHAPE, "targets: %s, wanted (%zu,)%s for the loss %s",
                        pk__shape_text(targets, has, sizeof has), n, kind->numbers ? " or (N, K)" : "",
                        kind->name);
    for (size_t i = 0; kind->numbers && i < n * targets->row_items; i++) {
        double number;
        pk_array_doubles(targets, i, 1, &number);
        if (!isfinite(number))
            return pk__fail(context, PK_NOT_FINITE, "targets: number %zu is not finite", i);
    }
    if (kind->numbers) {
        *outputs = targets->row_items;
        return *outputs ? PK_OK : pk__fail(context, PK_SHAPE, "targets: rows without numbers");
    }
    for (size_t i = 0; i < n && signs; i++) {
        double number;
        pk_array_doubles(targets, i, 1, &number);
        signs = number == 1 || number == -1;
        if (!signs && !integers)
            return pk__fail(context, PK_ARGUMENT,
                            "targets: row %zu is %g, neither +1 nor -1 nor an integer class", i, number);
    }
    if (!signs && !integers)
        return pk__fail(context, PK_ARGUMENT, "targets: %s, wanted integer classes for the loss %s",
                        pk_type_name(targets->type), kind->name);
    /* All of them 1: +1 alone. */
    if (signs)
        return PK_OK;
    for (size_t i = 0; i < n; i++) {
        int64_t label = 0;
        pk_array_integers(targets, i, 1, &label);
        if (label < 0 || label > 100000)
            return pk__fail(context, PK_ARGUMENT, "targets: row %zu is %lld, no class from 0", i,
                            (long long)label);
        largest = pk__max(largest, label);
    }
    *classes = (size_t)largest + 1;
    *outputs = kind->signs && *classes <= 2 ? 1 : *classes;
    return PK_OK;
}

/* targets (n x K) as the machines take them. */
static void pk__machine_read(const pk_array *from, size_t n, size_t outputs, size_t classes, int signs,
                             double *targets)
{
    for (size_t i = 0; i < n; i++) {
        int64_t label = 0;
        if (!classes) {
            pk_array_doubles(from, i * outputs, outputs, targets + i * outputs);
            continue;
        }
        pk_array_integers(from, i, 1, &label);
        for (size_t k = 0; k < outputs; k++) {
            const int own = (size_t)label == (outputs == 1 && classes == 2 ? 1 : k);
            targets[i * outputs + k] = own ? 1 : signs ? -1 : 0;
        }
    }
}

/* ---- ridge ----------------------------------------------------------------------------------------------- */

/* The diagonal of A^-1 = L^-T L^-1: squared columns of L^-1, some columns at a time, of which what is above the first is 0. */
static pk_status pk__inverse_diagonal(const pk__fitting *f, const double *factor, double *diagonal)
{
    enum { COLUMNS = 64 };
    const size_t n = f->n;
    double *block = NULL;
    pk_status status = pk_allocate(f->context, n, COLUMNS * sizeof *block, "columns of an inverse", &block);
    for (size_t first = 0; first < n && !status; first += COLUMNS) {
        const size_t width = pk__min((size_t)COLUMNS, n - first), rows = n - first;
        memset(block, 0, rows * width * sizeof *block);
        for (size_t c = 0; c < width; c++)
            block[c * width + c] = 1;
        pk__triangle_solve(f->context, rows, factor + first * n + first, n, 1, width, block);
        for (size_t c = 0; c < width; c++)
            diagonal[first + c] = 0;
        for (size_t i = 0; i < rows; i++)
            for (size_t c = 0; c < width; c++)
                diagonal[first + c] += block[i * width + c] * block[i * width + c];
    }
    pk_release(f->context, block);
    return status;
}

static pk_status pk__fit_ridge(pk__fitting *f)
{
    const size_t n = f->n, K = f->outputs;
    const double lambda = f->options->regularization, *y = f->targets;
    pk_machine *m = f->machine;
    double *inverse = m->leverage, sum = 0, most_y = 0, worst = 0, trace = 0;
    size_t row = 0;
    memcpy(m->factor, f->gram, n * n * sizeof *m->factor);
    for (size_t i = 0; i < n; i++)
        m->factor[i * n + i] += lambda;
    pk_status status = pk_cholesky(f->context, n, m->factor, &row);
    if (status)
        return row < n ? pk__fail(f->context, PK_ARGUMENT,
                                  "ridge: K + lambda I is not positive definite for lambda %g: row %zu depends "
                                  "on those before it",
                                  lambda, row)
                       : status;
    memcpy(m->coefficients, y, n * K * sizeof *y);
    status = pk_cholesky_solve(f->context, n, m->factor, 0, K, m->coefficients);
    if (!status)
        status = pk__inverse_diagonal(f, m->factor, inverse);
    if (!status && m->ones) {
        for (size_t i = 0; i < n; i++)
            m->ones[i] = 1;
        status = pk_cholesky_solve(f->context, n, m->factor, 0, 1, m->ones);
    }
    if (status)
        return status;
    for (size_t i = 0; i < n; i++)
        trace += inverse[i];
    for (size_t k = 0; k < K; k++) {
        double squares = 0;
        for (size_t i = 0; i < n; i++)
            squares += m->coefficients[i * K + k] * m->coefficients[i * K + k];
        m->kare[k] = m->ones ? (double)NAN : squares / (double)n / (trace / (double)n * (trace / (double)n));
    }
    for (size_t i = 0; m->ones && i < n; i++)
        sum += m->ones[i];
    for (size_t i = 0; m->ones && i < n; i++)
        inverse[i] -= m->ones[i] * m->ones[i] / sum;
    m->degrees_of_freedom = 0;
    for (size_t k = 0; k < K; k++) {
        if (m->ones) {
            for (size_t i = 0; i < n; i++)
                m->intercept[k] += m->coefficients[i * K + k] / sum;
            for (size_t i = 0; i < n; i++)
                m->coefficients[i * K + k] -= m->intercept[k] * m->ones[i];
        }
        for (size_t i = 0; i < n; i++) {
            double alpha = m->coefficients[i * K + k], value = m->intercept[k], error;
            for (size_t j = 0; j < n; j++)
                value += f->gram[i * n + j] * m->coefficients[j * K + k];
            m->fitted[i * K + k] = value;
            m->leave_one_out[i * K + k] = y[i * K + k] - alpha / inverse[i];
            error = value - y[i * K + k];
            worst = fmax(worst, fabs(error + lambda * alpha));
            most_y = fmax(most_y, fabs(y[i * K + k]));
            /* lambda/2 alpha^T K alpha, K alpha being the value without b */
            m->objective[k] += 0.5 * (error * error + lambda * alpha * (value - m->intercept[k]));
        }
    }
    for (size_t i = 0; i < n; i++) { /* from 1/A^-1_ii to H_ii = 1 - lambda P_ii */
        inverse[i] = 1 - lambda * inverse[i];
        m->degrees_of_freedom += inverse[i];
    }
    m->certificate = most_y > 0 ? worst / most_y : worst;
    m->iterations = 1;
    return PK_OK;
}

/* ---- logistic and softmax -------------------------------------------------------------------------------- */

typedef struct pk__newton {
    const pk__fitting *f;
    size_t n, classes;    /* of this machine: 1 or the classes of softmax */
    size_t stride, first; /* of its columns among the outputs */
    const double *gram;   /* K, or K^2 */
    double *beta, *step, *value,
        *value_step;    /* n x classes: coefficients on gram and their change, f and its change */
    double *p, *right;  /* n x classes: probabilities; a right-hand side */
    double *factors;    /* classes x n x n: of B_c = I + D^1/2 G D^1/2 / lambda */
    double *roots;      /* classes x n: sqrt(D) */
    double *coupled;    /* n x n: of the sum of E_c; softmax only */
    double *work;       /* n x (2 classes) */
    double *b, *b_step; /* classes */
    double *schur;      /* n x classes x classes: what weights answer to each intercept */
    double scale;       /* of the gradient by beta; 0: not known yet */
} pk__newton;

/* value of l at f + t step, and of the penalty; p when wanted. */
static double pk__newton_objective(pk__newton *w, double t, double *p)
{
    const size_t n = w->n, C = w->classes;
    const double lambda = w->f->options->regularization;
    double loss = 0, penalty = 0;
    for (size_t i = 0; i < n; i++) {
        const double *y = w->f->targets + i * w->stride + w->first, *f = w->value + i * C,
                     *d = w->value_step + i * C;
        if (C == 1) {
            const double margin = y[0] * (f[0] + t * d[0]);
            loss += margin > 0 ? log1p(exp(-margin)) : log1p(exp(margin)) - margin;
            if (p)
                p[i] = margin > 0 ? exp(-margin) / (1 + exp(-margin))
                                  : 1 / (1 + exp(margin)); /* of the wrong side */
        } else {
            double most = -INFINITY, sum = 0, own = 0;
            for (size_t c = 0; c < C; c++) {
                most = fmax(most, f[c] + t * d[c]);
                own += y[c] * (f[c] + t * d[c]);
            }
            for (size_t c = 0; c < C; c++)
                sum += exp(f[c] + t * d[c] - most);
            for (size_t c = 0; p && c < C; c++)
                p[i * C + c] = exp(f[c] + t * d[c] - most) / sum;
            loss += most - own + log(sum);
        }
        for (size_t c = 0; c < C; c++) {
            const double b = w->b[c] + t * w->b_step[c];
            penalty += (w->beta[i * C + c] + t * w->step[i * C + c]) * (f[c] + t * d[c] - b);
        }
    }
    return loss + 0.5 * lambda * penalty;
}

/* minus the derivative of the loss by f (i, c) */
static double pk__newton_residual(const pk__newton *w, size_t i, size_t c)
{
    const double y = w->f->targets[i * w->stride + w->first + c], p = w->p[i * w->classes + c];
    return w->classes == 1 ? y * p : y - p;
}

/* out (n x C) = G x. */
static void pk__newton_times(const pk__newton *w, const double *x, double *out)
{
    const size_t n = w->n, C = w->classes, tasks = (n + 63) / 64;
    pk__team team = pk__team_of(w->f->context, pk_threads(w->f->context), tasks);
    PK__PARALLEL(team)
    for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team))
        for (size_t i = task * 64; i < pk__min(n, task * 64 + 64); i++) {
            const double *row = w->gram + i * n;
            for (size_t c = 0; c < C; c++) {
                double sum = 0;
                PK__SIMD_SUM(sum)
                for (size_t j = 0; j < n; j++)
                    sum += row[j] * x[j * C + c];
                out[i * C + c] = sum;
            }
        }
    pk__team_end(&team);
}

/* x (n), of column c: E_c x = D^1/2 B_c^-1 D^1/2 x, in place. */
static pk_status pk__newton_e(const pk__newton *w, size_t c, double *x)
{
    const size_t n = w->n;
    const double *root = w->roots + c * n;
    for (size_t i = 0; i < n; i++)
        x[i] *= root[i];
    pk_status status = pk_cholesky_solve(w->f->context, n, w->factors + c * n * n, 0, 1, x);
    for (size_t i = 0; i < n; i++)
        x[i] *= root[i];
    return status;
}

/* The factors for the present p. */
static pk_status pk__newton_factors(pk__newton *w)
{
    const size_t n = w->n, C = w->classes;
    const double lambda = w->f->options->regularization;
    pk_status status = PK_OK;
    if (w->coupled)
        memset(w->coupled, 0, n * n * sizeof *w->coupled);
    for (size_t c = 0; c < C && !status; c++) {
        double *factor = w->factors + c * n * n, *root = w->roots + c * n;
        for (size_t i = 0; i < n; i++) {
            const double p = w->p[i * C + c];
            root[i] = sqrt(C == 1 ? p * (1 - p) : p);
        }
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j <= i; j++)
                factor[i * n + j] = (i == j) + root[i] * w->gram[i * n + j] * root[j] / lambda;
        status = pk_cholesky(w->f->context, n, factor, NULL);
        if (status || !w->coupled)
            continue;
        /* E_c = D^1/2 B^-1 D^1/2 = S^T S with S = L^-1 D^1/2, some columns of B^-1 at a time */
        enum { COLUMNS = 64 };
        for (size_t first = 0; first < n && !status; first += COLUMNS) {
            const size_t width = pk__min((size_t)COLUMNS, n - first);
            double *block = w->schur; /* n x COLUMNS */
            memset(block, 0, n * width * sizeof *block);
            for (size_t k = 0; k < width; k++)
                block[(first + k) * width + k] = root[first + k];
            status = pk_cholesky_solve(w->f->context, n, factor, 0, width, block);
            for (size_t i = 0; i < n; i++)
                for (size_t k = 0; k < width; k++)
                    w->coupled[i * n + first + k] += root[i] * block[i * width + k];
        }
    }
    if (!status && w->coupled) {
        /* A p that vanishes for all classes but one leaves nothing of a row of the sum: a row of the identity does as well. */
        for (size_t i = 0; i < n; i++)
            if (!(w->coupled[i * n + i] > 0))
                w->coupled[i * n + i] = 1;
        status = pk_cholesky(w->f->context, n, w->coupled, NULL);
    }
    return status;
}

/* x (n x C) := (I + W G / lambda)^-1 W-scaled solution: the a of  a = r - W G a / lambda, for r = x. With E as above and the sum
 * over classes R: a = (I - E G/lambda + E R M^-1 R^T E G/lambda) r (Rasmussen and Williams 2006, equation 3.39). */
static pk_status pk__newton_apply(pk__newton *w, double *x)
{
    const size_t n = w->n, C = w->classes;
    const double lambda = w->f->options->regularization;
    double *g = w->work, *column = w->work + n * C, *sum = column + n;
    pk_status status = PK_OK;
    pk__newton_times(w, x, g);
    memset(sum, 0, n * sizeof *sum);
    for (size_t c = 0; c < C && !status; c++) { /* g: c = E G x / lambda */
        for (size_t i = 0; i < n; i++)
            column[i] = g[i * C + c] / lambda;
        status = pk__newton_e(w, c, column);
        for (size_t i = 0; i < n; i++) {
            g[i * C + c] = column[i];
            sum[i] += column[i];
        }
    }
    if (!status && w->coupled)
        status = pk_cholesky_solve(w->f->context, n, w->coupled, 0, 1, sum);
    for (size_t c = 0; c < C && !status; c++) {
        if (w->coupled) {
            memcpy(column, sum, n * sizeof *sum);
            status = pk__newton_e(w, c, column);
        }
        for (size_t i = 0; i < n; i++)
            x[i * C + c] += (w->coupled ? column[i] : 0) - g[i * C + c];
    }
    return status;
}

/* out (n x C) = W x, W the second derivative of the loss by f. */
static void pk__newton_curvature(const pk__newton *w, const double *x, double *out)
{
    const size_t C = w->classes;
    for (size_t i = 0; i < w->n; i++) {
        const double *p = w->p + i * C;
        double mean = 0;
        for (size_t c = 0; c < C; c++)
            mean += C == 1 ? 0 : p[c] * x[i * C + c];
        for (size_t c = 0; c < C; c++)
            out[i * C + c] = C == 1 ? p[0] * (1 - p[0]) * x[i] : p[c] * (x[i * C + c] - mean);
    }
}

/* Solves the C x C equations of the intercepts, symmetric and semidefinite (a shift of all is free), by elimination with pivots from
 * the diagonal; what is left of the free direction is 0. */
static void pk__intercept_solve(size_t C, double *a, double *right)
{
    double largest = 0;
    for (size_t c = 0; c < C; c++)
        largest = fmax(largest, fabs(a[c * C + c]));
    for (size_t c = 0; c < C; c++) {
        if (!(a[c * C + c] > 1e-13 * largest)) {
            for (size_t j = 0; j < C; j++)
                a[c * C + j] = a[j * C + c] = 0;
            a[c * C + c] = 1;
            right[c] = 0;
            continue;
        }
        for (size_t i = c + 1; i < C; i++) {
            const double times = a[i * C + c] / a[c * C + c];
            for (size_t j = c; j < C; j++)
                a[i * C + j] -= times * a[c * C + j];
            right[i] -= times * right[c];
        }
    }
    for (size_t c = C; c-- > 0;) {
        for (size_t j = c + 1; j < C; j++)
            right[c] -= a[c * C + j] * right[j];
        right[c] /= a[c * C + c];
    }
}

/* The change of beta and b by a step of Newton. beta' solves lambda beta' = r - W (G beta' + 1 b' - f), r = -dl/df, and with an
 * intercept sum_i beta'_i = 0. */
static pk_status pk__newton_step(pk__newton *w)
{
    const size_t n = w->n, C = w->classes;
    const double lambda = w->f->options->regularization;
    double *answer = w->schur + n * 64; /* n x C for one intercept */
    double *matrix = w->b_step + C;     /* C x C */
    pk_status status = pk__newton_factors(w);
    if (status)
        return status;
    pk__newton_curvature(w, w->value, w->step);
    for (size_t i = 0; i < n; i++)
        for (size_t c = 0; c < C; c++)
            w->step[i * C + c] = (w->step[i * C + c] + pk__newton_residual(w, i, c)) / lambda;
    status = pk__newton_apply(w, w->step);
    for (size_t c = 0; c < C; c++)
        w->b_step[c] = 0;
    if (w->f->options->intercept && !status) {
        for (size_t i = 0; i < n; i++)
            for (size_t c = 0; c < C; c++)
                w->b_step[c] += w->step[i * C + c];
        double *const answers = answer;
        for (size_t k = 0; k < C && !status; k++) {
            double *a = answers + k * n * C;
            memset(w->right, 0, n * C * sizeof *w->right);
            for (size_t i = 0; i < n; i++)
                w->right[i * C + k] = 1;
            pk__newton_curvature(w, w->right, a);
            for (size_t i = 0; i < n * C; i++)
                a[i] /= lambda;
            status = pk__newton_apply(w, a);
            for (size_t c = 0; c < C; c++) {
                matrix[c * C + k] = 0;
                for (size_t i = 0; i < n; i++)
                    matrix[c * C + k] += a[i * C + c];
            }
        }
        if (status)
            return status;
        pk__intercept_solve(C, matrix, w->b_step);
        double mean = 0;
        for (size_t c = 0; C > 1 && c < C; c++)
            mean += w->b_step[c] / (double)C;
        for (size_t c = 0; c < C; c++)
            w->b_step[c] -= mean;
        for (size_t k = 0; k < C; k++)
            for (size_t i = 0; i < n * C; i++)
                w->step[i] -= answers[k * n * C + i] * w->b_step[k];
    }
    for (size_t i = 0; i < n * C; i++)
        w->step[i] -= w->beta[i];
    pk__newton_times(w, w->step, w->value_step);
    for (size_t c = 0; c < C; c++)
        w->b_step[c] -= w->b[c];
    for (size_t i = 0; i < n; i++)
        for (size_t c = 0; c < C; c++)
            w->value_step[i * C + c] += w->b_step[c];
    return status;
}

/* The largest |gradient| by beta, G (lambda beta - r), relative to its largest at 0; and by b, sum r, to the largest that it could be:
 * for one may be in units of the other's square. r is minus the derivative of the loss by f. */
static double pk__newton_gradient(pk__newton *w)
{
    const size_t n = w->n, C = w->classes;
    const double lambda = w->f->options->regularization;
    double by_beta = 0, by_b = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t c = 0; c < C; c++)
            w->right[i * C + c] = lambda * w->beta[i * C + c] - pk__newton_residual(w, i, c);
    pk__newton_times(w, w->right, w->work);
    for (size_t i = 0; i < n * C; i++)
        by_beta = fmax(by_beta, fabs(w->work[i]));
    for (size_t c = 0; c < C && w->f->options->intercept; c++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += pk__newton_residual(w, i, c);
        by_b = fmax(by_b, fabs(sum));
    }
    if (!(w->scale > 0))
        w->scale = by_beta;
    return fmax(w->scale > 0 ? by_beta / w->scale : 0, by_b / (double)n);
}

/* beta and b by t of their steps, and f anew. */
static void pk__newton_move(pk__newton *w, double t)
{
    const size_t n = w->n, C = w->classes;
    for (size_t i = 0; i < n * C; i++)
        w->beta[i] += t * w->step[i];
    pk__newton_times(w, w->beta, w->value);
    for (size_t c = 0; c < C; c++) {
        w->b[c] += t * w->b_step[c];
        for (size_t i = 0; i < n; i++)
            w->value[i * C + c] += w->b[c];
    }
}

/* Newton's method with line search, from 0. It ends where no step makes the objective or, in its last digits, the gradient smaller. */
static pk_status pk__newton_run(pk__newton *w, double *certificate, double *objective, int *iterations)
{
    const size_t n = w->n, C = w->classes;
    pk_status status = PK_OK;
    memset(w->beta, 0, n * C * sizeof *w->beta);
    memset(w->step, 0, n * C * sizeof *w->step);
    memset(w->value, 0, n * C * sizeof *w->value);
    memset(w->value_step, 0, n * C * sizeof *w->value_step);
    memset(w->b, 0, 2 * C * sizeof *w->b);
    double value = pk__newton_objective(w, 0, w->p), gradient = pk__newton_gradient(w);
    *iterations = 0;
    while (*iterations < PK__MACHINE_STEPS && gradient > 1e-16 && !status) {
        status = pk__newton_step(w);
        if (status)
            break;
        /* In its last digits the objective is rounding, and the gradient decides. */
        double t = 1, next = pk__newton_objective(w, t, NULL);
        while (!(next < value) && t > 1e-10 && !(fabs(next - value) <= 1e-10 * fabs(value))) {
            t /= 2;
            next = pk__newton_objective(w, t, NULL);
        }
        pk__newton_move(w, t);
        const double after = pk__newton_objective(w, 0, w->p), slope = pk__newton_gradient(w);
        ++*iterations;
        if (!(slope < gradient) && !(after < value - 1e-10 * fabs(value))) {
            pk__newton_move(w, -t);
            (void)pk__newton_objective(w, 0, w->p);
            gradient = pk__newton_gradient(w);
            break;
        }
        value = after;
        gradient = slope;
    }
    *certificate = gradient;
    *objective = value;
    return status;
}

/* One machine, columns first .. first + classes - 1 of the outputs. */
static pk_status pk__fit_newton(pk__fitting *f, const double *gram, size_t first, size_t classes)
{
    const size_t n = f->n, C = classes, K = f->outputs;
    const int coefficients = f->options->penalize_coefficients;
    pk_machine *m = f->machine;
    pk__newton w = {.f = f, .n = n, .classes = C, .stride = K, .first = first, .gram = gram};
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status = PK_OK;
    double certificate = 0, objective = 0;
    int iterations = 0;
    do {
        double **const vectors[] = {&w.beta, &w.step, &w.value, &w.value_step, &w.p, &w.right};
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
            *vectors[i] = pk__arena_take(&arena, n, C * sizeof(double));
        w.factors = pk__arena_take(&arena, n, n * C * sizeof(double));
        w.roots = pk__arena_take(&arena, n, C * sizeof(double));
        w.coupled = C > 1 ? pk__arena_take(&arena, n, n * sizeof(double)) : NULL;
        w.work = pk__arena_take(&arena, n, (C + 2) * sizeof(double));
        w.schur = pk__arena_take(&arena, n, (64 + C * C) * sizeof(double));
        w.b = pk__arena_take(&arena, 2 + C, C * sizeof(double));
    } while (pk__arena_again(f->context, &arena, "Newton's method", &status));
    if (status)
        return status;
    w.b_step = w.b + C;
    status = pk__newton_run(&w, &certificate, &objective, &iterations);
    if (!status) {
        for (size_t c = 0; c < C; c++)
            m->intercept[first + c] = w.b[c];
        /* alpha = beta, or K beta where G = K^2 */
        if (coefficients) {
            w.gram = f->gram;
            pk__newton_times(&w, w.beta, w.step);
        }
        for (size_t i = 0; i < n; i++)
            for (size_t c = 0; c < C; c++) {
                m->coefficients[i * K + first + c] = (coefficients ? w.step : w.beta)[i * C + c];
                m->fitted[i * K + first + c] = w.value[i * C + c];
            }
        m->objective[first] = objective;
        m->certificate = fmax(m->certificate, certificate);
        m->iterations = pk__max(m->iterations, iterations);
    }
    pk_release(f->context, arena.base);
    return status;
}

/* ---- support vector machines ----------------------------------------------------------------------------- */

/* The dual: minimize 1/2 u^T Q u - sum_i gain(u_i) over u = the coefficients, with lower_i <= u_i <= upper_i and, with an
 * intercept, sum u = 0; gain = y_i u_i - epsilon |u_i|. For the hinges the sign of u_i is that of y_i, and epsilon is 0. */
typedef struct pk__dual {
    const double *gram, *y; /* y with a stride */
    size_t n, stride;
    double shift;          /* Q = gram + shift I */
    double bound, epsilon; /* C, infinite for the squared hinge */
    int signed_rows;       /* u_i y_i >= 0 */
    int intercept;
    double *u, *gradient; /* n: u, and Q u - y */
} pk__dual;

static double pk__dual_lower(const pk__dual *d, size_t i)
{
    return d->signed_rows && d->y[i * d->stride] > 0 ? 0 : -d->bound;
}

static double pk__dual_upper(const pk__dual *d, size_t i)
{
    return d->signed_rows && d->y[i * d->stride] < 0 ? 0 : d->bound;
}

/* The derivative of the objective by u_i, to its right (up) or left. */
static double pk__dual_slope(const pk__dual *d, size_t i, int up)
{
    const double u = d->u[i];
    return d->gradient[i] + (u > 0 || (u == 0 && up) ? d->epsilon : -d->epsilon);
}

static int pk__dual_movable(const pk__dual *d, size_t i, int up)
{
    return up ? d->u[i] < pk__dual_upper(d, i) : d->u[i] > pk__dual_lower(d, i);
}

static double pk__dual_entry(const pk__dual *d, size_t i, size_t j)
{
    return d->gram[i * d->n + j] + (i == j ? d->shift : 0);
}

static void pk__dual_move(pk__dual *d, size_t i, double by)
{
    const double *row = d->gram + i * d->n;
    d->u[i] += by;
    PK__SIMD
    for (size_t j = 0; j < d->n; j++)
        d->gradient[j] += by * row[j];
    d->gradient[i] += by * d->shift;
}

/* How far u_i may go up or down along one piece of the objective: to its bound, or to 0 where |u| has its kink. */
static double pk__dual_room(const pk__dual *d, size_t i, int up)
{
    const double u = d->u[i], to = up ? pk__dual_upper(d, i) : pk__dual_lower(d, i);
    if (d->epsilon > 0 && (up ? u < 0 : u > 0) && (up ? to > 0 : to < 0))
        return fabs(u);
    return fabs(to - u);
}

/* Moves u_i by exactly its room where that is what it takes: rounding shall not leave it beside the bound. */
static void pk__dual_land(pk__dual *d, size_t i, int up, double by, double room)
{
    const double u = d->u[i], bound = up ? pk__dual_upper(d, i) : pk__dual_lower(d, i);
    pk__dual_move(d, i, up ? by : -by);
    if (by == room)
        d->u[i] = fabs(bound - u) == room ? bound : 0;
}

/* One step, of a pair or of a single row; 0 where no slope exceeds the tolerance. */
static int pk__dual_step(pk__dual *d, double tolerance)
{
    const size_t n = d->n;
    size_t i = n, j = n;
    double steepest = -INFINITY, best = 0;
    int i_up = 1;
    if (!d->intercept) {
        for (size_t k = 0; k < n; k++)
            for (int up = 0; up < 2; up++) {
                const double slope = up ? -pk__dual_slope(d, k, 1) : pk__dual_slope(d, k, 0);
                const double gain = slope * slope / fmax(pk__dual_entry(d, k, k), 1e-300);
                if (slope > tolerance && pk__dual_movable(d, k, up) && gain > best) {
                    best = gain;
                    i = k;
                    i_up = up;
                }
            }
        if (i == n)
            return 0;
        const double slope = i_up ? -pk__dual_slope(d, i, 1) : pk__dual_slope(d, i, 0);
        const double room = pk__dual_room(d, i, i_up), curve = pk__dual_entry(d, i, i);
        if (!(curve > 0) && isinf(room))
            return 0;
        pk__dual_land(d, i, i_up, curve > 0 ? fmin(room, slope / curve) : room, room);
        return 1;
    }
    /* i goes up, j down by the same */
    for (size_t k = 0; k < n; k++)
        if (pk__dual_movable(d, k, 1) && -pk__dual_slope(d, k, 1) > steepest) {
            steepest = -pk__dual_slope(d, k, 1);
            i = k;
        }
    for (size_t k = 0; i < n && k < n; k++) {
        const double slope = k == i ? 0 : steepest + pk__dual_slope(d, k, 0);
        if (k == i || !pk__dual_movable(d, k, 0) || !(slope > tolerance))
            continue;
        const double curve = pk__dual_entry(d, i, i) + pk__dual_entry(d, k, k) - 2 * pk__dual_entry(d, i, k);
        const double gain = slope * slope / fmax(curve, 1e-12);
        if (gain > best) {
            best = gain;
            j = k;
        }
    }
    if (j == n)
        return 0;
    const double slope = steepest + pk__dual_slope(d, j, 0), room_i = pk__dual_room(d, i, 1),
                 room_j = pk__dual_room(d, j, 0), room = fmin(room_i, room_j),
                 curve = pk__dual_entry(d, i, i) + pk__dual_entry(d, j, j) - 2 * pk__dual_entry(d, i, j);
    const double by = fmin(room, slope / fmax(curve, 1e-12));
    if (isinf(by))
        return 0;
    pk__dual_land(d, i, 1, by, room_i);
    pk__dual_land(d, j, 0, by, room_j);
    return 1;
}

/* The best intercept given u: between the largest -slope up and the least -slope down; where one is infinite, the other. */
static double pk__dual_intercept(const pk__dual *d)
{
    double low = -INFINITY, high = INFINITY;
    if (!d->intercept)
        return 0;
    for (size_t i = 0; i < d->n; i++) {
        if (pk__dual_movable(d, i, 1))
            low = fmax(low, -pk__dual_slope(d, i, 1));
        if (pk__dual_movable(d, i, 0))
            high = fmin(high, -pk__dual_slope(d, i, 0));
    }
    return isinf(low) ? (isinf(high) ? 0 : high) : isinf(high) ? low : 0.5 * (low + high);
}

/* Objectives, divided by lambda: 1/2 u^T K u + C sum of losses, and the dual's. f = K u + b. */
static void pk__dual_objectives(const pk__dual *d, double b, int squared, double weight, double *primal,
                                double *dual)
{
    double form = 0, losses = 0, gain = 0, square = 0;
    for (size_t i = 0; i < d->n; i++) {
        const double y = d->y[i * d->stride], u = d->u[i], ku = d->gradient[i] + y - d->shift * u, f = ku + b;
        const double beyond = fmax(0, d->signed_rows ? 1 - y * f : fabs(f - y) - d->epsilon);
        losses += squared ? beyond * beyond : beyond;
        form += u * ku;
        square += u * u;
        gain += y * u - d->epsilon * fabs(u);
    }
    *primal = 0.5 * form + weight * losses;
    *dual = gain - 0.5 * form - 0.5 * d->shift * square;
}

/* u recomputed as rounding left it: gradient = Q u - y. */
static void pk__dual_refresh(pk__dual *d)
{
    for (size_t i = 0; i < d->n; i++)
        d->gradient[i] = -d->y[i * d->stride];
    for (size_t i = 0; i < d->n; i++) {
        const double u = d->u[i];
        d->u[i] = 0;
        if (u != 0)
            pk__dual_move(d, i, u);
        d->u[i] = u;
    }
}

/* Solves the equations of the rows between the bounds, the others staying: Q_ff x - b 1 = r, sum x = s. In `to` (n). 0: singular, or a
 * row would leave its piece. memory: n^2 + 2 n numbers. */
static int pk__dual_polish(const pk__dual *d, size_t *rows, double *memory, double *scratch, double *to)
{
    const size_t n = d->n;
    size_t count = 0;
    double *q = memory, *right;
    for (size_t i = 0; i < n; i++)
        if (d->u[i] != 0 && fabs(d->u[i]) != d->bound)
            rows[count++] = i;
    if (!count)
        return 0;
    right = q + count * count; /* count x 2: r and ones */
    double sum = 0, of_right = 0, of_ones = 0;
    for (size_t i = 0; i < n; i++)
        sum -= fabs(d->u[i]) == d->bound ? d->u[i] : 0;
    for (size_t a = 0; a < count; a++) {
        const size_t i = rows[a];
        /* r: the gradient of the rows at their bounds alone */
        double r = d->y[i * d->stride] - (d->u[i] > 0 ? d->epsilon : -d->epsilon);
        for (size_t j = 0; j < n; j++)
            r -= fabs(d->u[j]) == d->bound ? d->gram[i * n + j] * d->u[j] : 0;
        right[2 * a] = r;
        right[2 * a + 1] = 1;
        for (size_t c = 0; c < count; c++)
            q[a * count + c] = pk__dual_entry(d, i, rows[c]);
    }
    /* With an intercept Q need be positive on sum x = 0 alone: 1 1^T times its scale changes nothing there. */
    const double scale = d->intercept ? fabs(q[0]) + 1e-300 : 0;
    for (size_t a = 0; a < count * count; a++)
        q[a] += scale;
    for (size_t a = 0; a < count; a++)
        right[2 * a] += scale * sum;
    pk_context one = {0};
    one.threads = 1;
    if (pk__cholesky_factor(&one, count, q, scratch) < count)
        return 0;
    pk__triangle_solve(&one, count, q, count, 0, 2, right);
    for (size_t a = 0; a < count; a++) {
        of_right += right[2 * a];
        of_ones += right[2 * a + 1];
    }
    const double b = d->intercept ? (of_right - sum) / of_ones : 0;
    memcpy(to, d->u, n * sizeof *to);
    for (size_t a = 0; a < count; a++) {
        const double u = d->u[rows[a]], x = right[2 * a] - b * right[2 * a + 1];
        if (!((u > 0) == (x > 0) && x != 0 && fabs(x) <= d->bound))
            return 0;
        to[rows[a]] = x;
    }
    return 1;
}

/* One machine: column k. */
static pk_status pk__fit_dual(pk__fitting *f, size_t k, double *certificate, int *iterations)
{
    const pk_machine_options *options = f->options;
    const size_t n = f->n, K = f->outputs;
    const int squared = options->loss == PK_MACHINE_SQUARED_HINGE;
    const double lambda = options->regularization;
    pk_machine *m = f->machine;
    pk__dual d = {.gram = f->gram,
                  .y = f->targets + k,
                  .n = n,
                  .stride = K,
                  .shift = squared ? lambda / 2 : 0,
                  .bound = squared ? INFINITY : 1 / lambda,
                  .epsilon = options->loss == PK_MACHINE_EPSILON_INSENSITIVE ? options->epsilon : 0,
                  .signed_rows = options->loss != PK_MACHINE_EPSILON_INSENSITIVE,
                  .intercept = options->intercept};
    double *to = NULL, *memory = NULL, *scratch = NULL, *best = NULL, primal = 0, dual = 0, gap = INFINITY,
           best_gap = INFINITY, scale = options->epsilon;
    size_t *rows = NULL, steps = 0;
    const size_t most = pk__max((size_t)1000000, 200 * n);
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status = PK_OK;
    do {
        d.u = pk__arena_take(&arena, n, sizeof *d.u);
        d.gradient = pk__arena_take(&arena, n, sizeof *d.gradient);
        to = pk__arena_take(&arena, n, sizeof *to);
        best = pk__arena_take(&arena, n, sizeof *best);
        rows = pk__arena_take(&arena, n, sizeof *rows);
        memory = pk__arena_take(&arena, n + 2, n * sizeof *memory);
        scratch = pk__arena_take(&arena, PK__CHOLESKY_BLOCK, PK__CHOLESKY_BLOCK * sizeof *scratch);
    } while (pk__arena_again(f->context, &arena, "the dual problem", &status));
    if (status)
        return status;
    for (size_t i = 0; i < n; i++) {
        d.u[i] = 0;
        scale = fmax(scale, fabs(d.y[i * K]));
    }
    pk__dual_refresh(&d);
    double tolerance = 1e-3 * (scale > 0 ? scale : 1);
    /* Each round goes on to a tolerance a tenth of the last, then solves for the free rows as long as the gap falls. */
    for (int round = 0; round < 14 && steps < most; round++, tolerance /= 10) {
        while (steps < most && pk__dual_step(&d, tolerance))
            steps++;
        for (int polish = 0; polish < PK__POLISHES; polish++) {
            pk__dual_refresh(&d);
            pk__dual_objectives(&d, pk__dual_intercept(&d), squared, 1 / lambda, &primal, &dual);
            gap = primal > 0 ? (primal - dual) / primal : 0;
            if (gap < best_gap) {
                best_gap = gap;
                memcpy(best, d.u, n * sizeof *best);
            } else if (polish) {
                break;
            }
            if (!pk__dual_polish(&d, rows, memory, scratch, to))
                break;
            memcpy(d.u, to, n * sizeof *to);
        }
        memcpy(d.u, best, n * sizeof *best);
        pk__dual_refresh(&d);
        if (best_gap < 1e-14)
            break;
    }
    m->intercept[k] = pk__dual_intercept(&d);
    pk__dual_objectives(&d, m->intercept[k], squared, 1 / lambda, &primal, &dual);
    m->objective[k] = primal * lambda;
    for (size_t i = 0; i < n; i++) {
        m->coefficients[i * K + k] = d.u[i];
        m->fitted[i * K + k] = d.gradient[i] + d.y[i * K] - d.shift * d.u[i] + m->intercept[k];
    }
    *certificate = best_gap;
    *iterations = (int)pk__min(steps, (size_t)INT_MAX);
    pk_release(f->context, arena.base);
    return PK_OK;
}

/* ---- all ------------------------------------------------------------------------------------------------- */

/* Positive semidefinite up to rounding: K + rounding trace I has a factor. */
static pk_status pk__machine_check_gram(pk__fitting *f, double rounding, double *work)
{
    const size_t n = f->n;
    double trace = 0, least = 0;
    size_t row = n;
    memcpy(work, f->gram, n * n * sizeof *work);
    for (size_t i = 0; i < n; i++)
        trace += f->gram[i * n + i];
    for (size_t i = 0; i < n; i++)
        work[i * n + i] += rounding * trace;
    if (trace == 0 && n) {
        for (size_t i = 0; i < n * n; i++)
            if (f->gram[i] != 0)
                return pk__fail(f->context, PK_ARGUMENT,
                                "machine: the Gram matrix is not positive semidefinite: its trace is 0");
        return PK_OK;
    }
    pk_status status = pk_cholesky(f->context, n, work, &row);
    if (!status || row >= n)
        return status;
    double *values = NULL;
    status = pk_allocate(f->context, n, sizeof *values, "eigenvalues", &values);
    if (!status)
        status = pk_symmetric_eigenvalues(f->context, n, f->gram, values, NULL);
    if (!status) {
        least = values[0];
        status = pk__fail(f->context, PK_ARGUMENT,
                          "machine: the Gram matrix is not positive semidefinite: its least eigenvalue is "
                          "%.3g, its trace %.3g",
                          least, trace);
    }
    pk_release(f->context, values);
    return status;
}

static pk_status pk__machine_check(pk_context *context, size_t n, const double *gram, const pk_array *targets,
                                   const pk_machine_options *o)
{
    if (!o || !targets || !pk_machine_loss_name(o->loss))
        return pk__fail(context, PK_ARGUMENT, "machine: %s",
                        !o         ? "the options are NULL"
                        : !targets ? "the targets are NULL"
                                   : "no such loss");
    if (!n || !gram)
        return pk__fail(context, PK_ARGUMENT, "machine: %s",
                        n ? "the Gram matrix is NULL" : "a Gram matrix without rows");
    if (!(o->regularization >= 0) || isinf(o->regularization) ||
        (o->regularization == 0 && o->loss != PK_MACHINE_SQUARED))
        return pk__fail(context, PK_ARGUMENT, "machine: the regularization %g, wanted a positive number",
                        o->regularization);
    if (!(o->epsilon >= 0) || isinf(o->epsilon))
        return pk__fail(context, PK_ARGUMENT, "machine: epsilon %g, wanted a number from 0", o->epsilon);
    if (o->epsilon > 0 && o->loss != PK_MACHINE_EPSILON_INSENSITIVE)
        return pk__fail(context, PK_ARGUMENT, "machine: the loss %s has no epsilon",
                        pk_machine_loss_name(o->loss));
    if (o->penalize_coefficients && o->loss != PK_MACHINE_LOGISTIC && o->loss != PK_MACHINE_SOFTMAX)
        return pk__fail(context, PK_ARGUMENT,
                        "machine: coefficients are penalized by logistic and softmax only, not by %s",
                        pk_machine_loss_name(o->loss));
    return PK_OK;
}

/* An unpenalized intercept runs away where a class has no row. */
static pk_status pk__machine_check_classes(const pk__fitting *f)
{
    const int softmax = f->options->loss == PK_MACHINE_SOFTMAX;
    if (!f->options->intercept || (!softmax && f->options->loss != PK_MACHINE_LOGISTIC))
        return PK_OK;
    for (size_t k = 0; k < f->outputs; k++) {
        size_t own = 0;
        for (size_t i = 0; i < f->n; i++)
            own += f->targets[i * f->outputs + k] > 0;
        if ((own == 0 && !(softmax && f->outputs == 1)) || (!softmax && own == f->n))
            return pk__fail(f->context, PK_ARGUMENT, "machine: %s %zu: the intercept has no finite best value",
                            own ? "all rows are of class" : "no row is of class", k);
    }
    return PK_OK;
}

static pk_status pk__machine_solve(pk__fitting *f, double *square)
{
    const size_t n = f->n, K = f->outputs;
    pk_machine *m = f->machine;
    pk_status status = PK_OK;
    if (f->options->loss == PK_MACHINE_SQUARED)
        return pk__fit_ridge(f);
    if (f->options->loss == PK_MACHINE_LOGISTIC || f->options->loss == PK_MACHINE_SOFTMAX) {
        const int softmax = f->options->loss == PK_MACHINE_SOFTMAX;
        if (f->options->penalize_coefficients) {
            memset(square, 0, n * n * sizeof *square);
            const size_t tasks = (n + 63) / 64;
            pk__team team = pk__team_of(f->context, pk_threads(f->context), tasks);
            PK__PARALLEL(team)
            for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
                const size_t at = task * 64, rows = pk__min((size_t)64, n - at);
                pk__subtract_product(0, 0, rows, n, n, f->gram + at * n, n, f->gram, n, square + at * n, n);
            }
            pk__team_end(&team);
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j <= i; j++)
                    square[i * n + j] = square[j * n + i] = -square[i * n + j];
        }
        const double *gram = f->options->penalize_coefficients ? square : f->gram;
        if (softmax && K == 1) /* one class: f = 0 is as good as any */
            return memset(m->fitted, 0, n * sizeof *m->fitted),
                   memset(m->coefficients, 0, n * sizeof *m->coefficients), PK_OK;
        for (size_t k = 0; k < (softmax ? 1 : K) && !status; k++)
            status = pk__fit_newton(f, gram, k, softmax && K > 1 ? K : 1);
        return status;
    }
    for (size_t k = 0; k < K && !status; k++) {
        double certificate = 0;
        int iterations = 0;
        status = pk__fit_dual(f, k, &certificate, &iterations);
        m->certificate = fmax(m->certificate, certificate);
        m->iterations = pk__max(m->iterations, iterations);
    }
    return status;
}

PK_API pk_status pk_machine_fit(pk_context *context, size_t n, const double *gram, const pk_array *targets,
                                const pk_machine_options *options, pk_machine *machine)
{
    pk__fitting f = {.context = context, .options = options, .machine = machine, .n = n};
    size_t outputs = 0, classes = 0;
    double largest = 0, *symmetric = NULL, *y = NULL, *work = NULL;
    pk__arena kept = {NULL, 0, 0, 0}, arena = kept;
    if (!machine)
        return pk__fail(context, PK_ARGUMENT, "machine: the place for the result is NULL");
    memset(machine, 0, sizeof *machine);
    pk_status status = pk__machine_check(context, n, gram, targets, options);
    if (!status)
        status = pk__symmetric_check(context, "machine", n, gram, &largest);
    if (!status)
        status = pk__machine_targets(context, n, targets, options, &outputs, &classes);
    if (status)
        return status;
    const int ridge = options->loss == PK_MACHINE_SQUARED;
    do {
        machine->coefficients = pk__arena_take(&kept, n, outputs * sizeof(double));
        machine->fitted = pk__arena_take(&kept, n, outputs * sizeof(double));
        machine->intercept = pk__arena_take(&kept, outputs, sizeof(double));
        machine->objective = pk__arena_take(&kept, outputs, sizeof(double));
        if (ridge) {
            machine->leave_one_out = pk__arena_take(&kept, n, outputs * sizeof(double));
            machine->leverage = pk__arena_take(&kept, n, sizeof(double));
            machine->kare = pk__arena_take(&kept, outputs, sizeof(double));
            machine->factor = pk__arena_take(&kept, n, n * sizeof(double));
            machine->ones = options->intercept ? pk__arena_take(&kept, n, sizeof(double)) : NULL;
        }
    } while (pk__arena_again(context, &kept, "a kernel machine", &status));
    machine->memory = kept.base;
    if (!status)
        do {
            symmetric = pk__arena_take(&arena, n, n * sizeof(double));
            work = pk__arena_take(&arena, n, n * sizeof(double));
            y = pk__arena_take(&arena, n, outputs * sizeof(double));
        } while (pk__arena_again(context, &arena, "a kernel machine", &status));
    if (!status) {
        machine->options = *options;
        machine->rows = n;
        machine->outputs = outputs;
        machine->degrees_of_freedom = (double)NAN;
        memset(machine->intercept, 0, outputs * sizeof(double));
        memset(machine->objective, 0, outputs * sizeof(double));
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++)
                symmetric[i * n + j] = 0.5 * gram[i * n + j] + 0.5 * gram[j * n + i];
        pk__machine_read(targets, n, outputs, classes, pk__machine_kinds[options->loss].signs, y);
        f.gram = symmetric;
        f.targets = y;
        f.outputs = outputs;
        status = pk__machine_check_classes(&f);
    }
    if (!status)
        status =
            pk__machine_check_gram(&f, options->rounding > 0 ? options->rounding : PK__MACHINE_ROUNDING, work);
    if (!status)
        status = pk__machine_solve(&f, work);
    pk_release(context, arena.base);
    if (status) {
        pk_machine_release(context, machine);
        return status;
    }
    const double tolerance = options->tolerance > 0 ? options->tolerance : PK__MACHINE_TOLERANCE;
    if (!(machine->certificate <= tolerance))
        status = pk__fail(context, PK_NOT_CLOSED,
                          "machine: the %s is %.2g of its scale after %d steps; the tolerance is %.2g",
                          ridge                                 ? "residual"
                          : options->loss <= PK_MACHINE_SOFTMAX ? "gradient"
                                                                : "duality gap",
                          machine->certificate, machine->iterations, tolerance);
    return status;
}

PK_API void pk_machine_release(pk_context *context, pk_machine *machine)
{
    if (!machine)
        return;
    pk_release(context, machine->memory);
    memset(machine, 0, sizeof *machine);
}

/* Shared by what is said about test rows. */
static pk_status pk__machine_check_test(pk_context *context, const pk_machine *machine, size_t m,
                                        const double *gram, const void *out)
{
    size_t numbers = 0;
    if (!machine || !machine->rows || (m && (!gram || !out)))
        return pk__fail(context, PK_ARGUMENT, "machine: %s",
                        machine && machine->rows ? "the test rows or the place for the result are NULL"
                                                 : "it is not fitted");
    if (!pk__multiply(m, machine->rows, &numbers) || !pk__multiply(numbers, machine->outputs, &numbers) ||
        numbers > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "machine: %zu test rows overflow", m);
    for (size_t i = 0; i < m * machine->rows; i++)
        if (!isfinite(gram[i]))
            return pk__fail(context, PK_NOT_FINITE,
                            "machine: the number (%zu, %zu) of the test rows is not finite", i / machine->rows,
                            i % machine->rows);
    return PK_OK;
}

PK_API pk_status pk_machine_predict(pk_context *context, const pk_machine *machine, size_t m,
                                    const double *gram, double *predictions)
{
    pk_status status = pk__machine_check_test(context, machine, m, gram, predictions);
    if (status)
        return status;
    const size_t n = machine->rows, K = machine->outputs;
    pk__team team = pk__team_of(context, pk_threads(context), m);
    PK__PARALLEL(team)
    for (size_t i = pk__first_task(&team); i < m; i = pk__next_task(&team))
        for (size_t k = 0; k < K; k++) {
            double sum = 0;
            PK__SIMD_SUM(sum)
            for (size_t j = 0; j < n; j++)
                sum += gram[i * n + j] * machine->coefficients[j * K + k];
            predictions[i * K + k] = sum + machine->intercept[k];
        }
    pk__team_end(&team);
    return PK_OK;
}

PK_API pk_status pk_machine_attribute(pk_context *context, const pk_machine *machine, size_t m,
                                      const double *gram, double *shares)
{
    pk_status status = pk__machine_check_test(context, machine, m, gram, shares);
    for (size_t i = 0; i < m && !status; i++)
        for (size_t k = 0; k < machine->outputs; k++)
            for (size_t j = 0; j < machine->rows; j++)
                shares[(i * machine->outputs + k) * machine->rows + j] =
                    gram[i * machine->rows + j] * machine->coefficients[j * machine->outputs + k];
    return status;
}

PK_API pk_status pk_machine_variance(pk_context *context, const pk_machine *machine, size_t m,
                                     const double *gram, const double *diagonal, double *variance)
{
    enum { ROWS = 32 };
    double *columns = NULL, sum = 0;
    pk_status status = pk__machine_check_test(context, machine, m, gram, variance);
    if (!status && (m && !diagonal))
        status = pk__fail(context, PK_ARGUMENT, "machine: the diagonal is NULL");
    if (!status && !machine->factor)
        status = pk__fail(context, PK_UNSUPPORTED, "machine: the loss %s has no variance; squared has",
                          pk_machine_loss_name(machine->options.loss));
    for (size_t i = 0; i < m && !status; i++)
        if (!isfinite(diagonal[i]))
            status = pk__fail(context, PK_NOT_FINITE, "machine: number %zu of the diagonal is not finite", i);
    if (status)
        return status;
    const size_t n = machine->rows;
    status = pk_allocate(context, n, ROWS * sizeof *columns, "test rows", &columns);
    for (size_t i = 0; machine->ones && i < n; i++)
        sum += machine->ones[i];
    for (size_t first = 0; first < m && !status; first += ROWS) {
        const size_t width = pk__min((size_t)ROWS, m - first);
        for (size_t c = 0; c < width; c++) {
            double answer = 1;
            for (size_t j = 0; j < n; j++) {
                columns[j * width + c] = gram[(first + c) * n + j];
                answer -= machine->ones ? machine->ones[j] * gram[(first + c) * n + j] : 0;
            }
            variance[first + c] = diagonal[first + c] + (machine->ones ? answer * answer / sum : 0);
        }
        status = pk_cholesky_solve(context, n, machine->factor, 1, width, columns);
        for (size_t j = 0; j < n && !status; j++)
            for (size_t c = 0; c < width; c++)
                variance[first + c] -= columns[j * width + c] * columns[j * width + c];
    }
    pk_release(context, columns);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
