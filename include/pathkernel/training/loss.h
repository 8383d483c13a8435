/* pathkernel/training/loss.h: losses, their derivatives, and the gradient of a weighted batch.
 *
 * A loss is one row of the table pk__losses: its name, a function that gives value and gradient, one that
 * multiplies with its Hessian, what its targets must be, and whether an integer target is a class. Definitions are
 * those of PyTorch's modules, per example; a batch weights its examples (1/count where no weights are given,
 * PyTorch's mean).
 *
 *     name                    l(f, y), C outputs                                      PyTorch
 *     squared                 sum_j (f_j - y_j)^2 / 2
 *     mean_squared            sum_j (f_j - y_j)^2 / C                                 MSELoss
 *     softmax_cross_entropy   sum_j y_j (log sum_k exp f_k - f_j)                     CrossEntropyLoss
 *     logistic                sum_j (log(1 + exp f_j) - y_j f_j) / C                  BCEWithLogitsLoss
 *     nll                     - sum_j y_j f_j                                         NLLLoss
 *     huber                   sum_j h(f_j - y_j) / C, h(d) = |d| < 1 ? d^2/2 : |d| - 1/2   SmoothL1Loss
 *     hinge                   sum_{j != k} max(0, 1 - f_k + f_j) / C, y_k = 1         MultiMarginLoss
 *                             C = 1: max(0, 1 - y f)
 *
 * The derivative at a kink of hinge is 0, and so is the second one of huber at |d| = 1, as in PyTorch. Exponentials
 * never overflow, and small residuals (a confident, correct classification) keep their relative accuracy.
 */
#ifndef PATHKERNEL_LOSS_H
#define PATHKERNEL_LOSS_H
#include "../data/dataset.h"
#include "../math/elementary.h"
#include "../network/pass.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_loss {
    PK_SQUARED = 1,
    PK_MEAN_SQUARED,
    PK_SOFTMAX_CROSS_ENTROPY,
    PK_LOGISTIC,
    PK_NLL,
    PK_HUBER,
    PK_HINGE
} pk_loss;

/* The loss with this name. For another name, PK_FORMAT; the message lists the names. */
PK_API PK__MUST_USE pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss);
/* The name pk_loss_parse takes; "unknown" for a value that is not a loss. Losses are numbered from 1 on without a gap. */
PK_API const char *pk_loss_name(pk_loss loss);

/* l(f, y) for one example. f: outputs numbers, what the network gives; target: outputs numbers as
 * pk_loss_targets writes them. Targets with entries 0 do not multiply infinities. NaN for a value that is
 * not a loss. */
PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target);
/* gradient = dl/df (outputs numbers) of one example; may be f itself, not target. */
PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient);
/* product = (d2l/df2) direction (outputs numbers each) of one example; may be the direction itself. */
PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product);

/* Do the targets fit the loss and the number of outputs? Reads every target.
 *   (N,) integers        classes in [0, outputs), made one-hot. With one output they are numbers instead
 *                        (0 or 1 for logistic, +1 or -1 for hinge), except for the two losses on
 *                        (log-)probabilities.
 *   (N, outputs) floats, or (N,) where outputs == 1: finite, and
 *                        softmax_cross_entropy, nll: >= 0 (a row need not sum to 1)
 *                        logistic: in [0, 1]
 *                        hinge: one 1, the others 0; with one output +1 or -1.
 * Statuses as pk_dataset_check; the message names the first row that does not fit. Cost: two passes over the
 * targets; one row is allocated. */
PK_API PK__MUST_USE pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset,
                                            size_t outputs);
/* targets (count x outputs): the rows items[0..count) of the dataset's targets as vectors. The dataset has
 * passed pk_loss_check, and items are in range. */
PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets);

/* The examples of one step: count rows of a dataset; a row may repeat. */
typedef struct pk_batch {
    size_t count;
    const int64_t *items;
    const double *weights; /* c_b; NULL: 1 / count each */
} pk_batch;

struct pk__gradient_lane;
struct pk__gradient_group;

/* Memory for pk_batch_gradient; zeroed = none. The graph must outlive it. */
typedef struct pk_gradient_workspace {
    const pk_graph *graph;
    size_t largest_batch; /* examples */
    /* Private: */
    int threads;
    struct pk__gradient_lane *lanes;   /* threads: a tape and the rows of one block */
    struct pk__gradient_group *groups; /* one result a group */
    pk_real *partial;                  /* (groups - 1) x P */
    pk_real *spread;                   /* with ties: weights and gradient in the layout of the spread vector */
    void *memory;
} pk_gradient_workspace;

/* Takes the memory for batches of up to largest_batch examples with the threads of the context: about 64
 * rows of activations and cotangents a thread, and for large batches partial gradients (at most 32, and
 * no more than 2^22 numbers where P < 2^21). PK_ARGUMENT, or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph,
                                                  size_t largest_batch, pk_gradient_workspace *workspace);
PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace);

/* L = sum_b c_b l(f(w, x_items[b]), y_items[b]) and its gradient with respect to w.
 * weights, gradient: graph->parameters numbers, gradient is overwritten and overlaps nothing; objective may
 * be NULL. An empty batch gives 0. The dataset has passed pk_loss_check.
 * Cost: about 6 P flops an example; no allocation; batches of little work start no threads. The batch is
 * cut into blocks and these into groups by shapes only, groups are added in order: the same bits for any
 * number of threads.
 * PK_ARGUMENT (also for an item out of range), PK_SHAPE: nothing is written. PK_NOT_FINITE: an output (the
 * message names its position in the batch), the objective or the gradient is not finite; the outputs of
 * this function hold what was found. */
PK_API PK__MUST_USE pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                const pk_real *weights, const pk_dataset *dataset,
                                                const pk_batch *batch, pk_gradient_workspace *workspace,
                                                double *objective, pk_real *gradient);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_LOSS_IMPLEMENTED)
#define PATHKERNEL_LOSS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- rules: value, and the gradient where it is not NULL; gradient may be f ---------------------------- */

static double pk__squared(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)d;
    }
    return sum / 2;
}

static double pk__mean_squared(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, factor = 2 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)(factor * d);
    }
    return sum / (double)outputs;
}

/* With Z = 1 + rest after the largest output is subtracted: log Z = log1p(rest), and 1 - p = rest / Z for
 * the largest, so that nothing cancels where the network is sure. */
static double pk__softmax_cross_entropy(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    const double largest = f[top];
    double rest = 0, total = 0, value = 0, e[16];
    for (size_t first = 0; first < outputs; first += 16) {
        const size_t count = pk__min(outputs - first, 16);
        for (size_t j = 0; j < count; j++) {
            e[j] = f[first + j] - largest;
            total += y[first + j];
            if (y[first + j] != 0) /* 0 * infinity is 0 here */
                value -= y[first + j] * e[j];
        }
        pk__all_exponential(count, 1, e, e);
        for (size_t j = 0; j < count; j++) { /* of the largest: 1, NaN for infinity */
            rest += first + j == top ? 0 : e[j];
            if (gradient)
                gradient[first + j] = (pk_real)e[j];
        }
    }
    if (gradient) {
        const double inverse = 1 / (1 + rest);
        for (size_t j = 0; j < outputs; j++) {
            double p = gradient[j] * inverse, q = j == top ? rest * inverse : 1 - p;
            gradient[j] = (pk_real)(p * (total - y[j]) - y[j] * q);
        }
    }
    return value + total * log1p(rest);
}

static double pk__logistic(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, count = (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double x = f[j], t = y[j], e = exp(-fabs(x)), tail = e / (1 + e); /* sigmoid(-|x|) */
        sum += (x > 0 ? (1 - t) * x : -t * x) + log1p(e);
        if (gradient) /* sigmoid(x) - t without cancelling at t = 0 or 1 */
            gradient[j] = (pk_real)((x > 0 ? (1 - t) - tail : tail - t) / count);
    }
    return sum / count;
}

static double pk__nll(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        if (y[j] != 0)
            sum -= (double)y[j] * f[j];
        if (gradient)
            gradient[j] = -y[j];
    }
    return sum;
}

static double pk__huber(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, factor = 1 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j], size = fabs(d);
        sum += size < 1 ? 0.5 * d * d : size - 0.5;
        if (gradient)
            gradient[j] = (pk_real)(d <= -1 ? -factor : d >= 1 ? factor : factor * d);
    }
    return sum / (double)outputs;
}

static double pk__hinge(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    if (outputs == 1) {
        double z = 1 - (double)y[0] * f[0];
        if (gradient)
            gradient[0] = z > 0 ? -y[0] : z != z ? (pk_real)z : 0;
        return z > 0 || z != z ? z : 0;
    }
    size_t k = 0;
    for (size_t j = 1; j < outputs; j++)
        if (y[j] > y[k])
            k = j;
    double own = f[k], factor = 1 / (double)outputs, sum = 0, sum_gradient = 0;
    for (size_t j = 0; j < outputs; j++) {
        double z = j == k ? 0 : 1 - own + f[j], g = z > 0 ? factor : z != z ? z : 0;
        if (z > 0 || z != z)
            sum += z;
        sum_gradient += g;
        if (gradient)
            gradient[j] = (pk_real)g;
    }
    if (gradient)
        gradient[k] = (pk_real)-sum_gradient;
    return sum / (double)outputs;
}

/* ---- products with the Hessian; product may be v ------------------------------------------------------- */

static void pk__squared_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                pk_real *product)
{
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = v[j];
}

static void pk__mean_squared_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                     pk_real *product)
{
    const double factor = 2 / (double)outputs;
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = (pk_real)(factor * v[j]);
}

/* sum_k y_k (diag p - p p^T) v, from the differences to the largest output's v: small where the network is sure. */
static void pk__softmax_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                pk_real *product)
{
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    double sum = 0, total = 0, mean = 0;
    const double largest = f[top], base = v[top];
    for (size_t j = 0; j < outputs; j++) {
        const double e = j == top ? 1 : exp(f[j] - largest);
        sum += e;
        total += y[j];
        mean += e * (v[j] - base);
    }
    mean /= sum;
    for (size_t j = 0; j < outputs; j++) {
        const double p = (j == top ? 1 : exp(f[j] - largest)) / sum;
        product[j] = (pk_real)(total * p * ((v[j] - base) - mean));
    }
}

static void pk__logistic_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                 pk_real *product)
{
    (void)y;
    for (size_t j = 0; j < outputs; j++) {
        const double e = exp(-fabs(f[j])), tail = e / (1 + e);
        product[j] = (pk_real)(tail * (1 - tail) / (double)outputs * v[j]);
    }
}

/* nll and hinge: (piecewise) linear. */
static void pk__no_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                           pk_real *product)
{
    (void)f, (void)y, (void)v;
    memset(product, 0, outputs * sizeof *product);
}

static void pk__huber_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                              pk_real *product)
{
    for (size_t j = 0; j < outputs; j++)
        product[j] = fabs((double)f[j] - y[j]) < 1 ? (pk_real)(v[j] / (double)outputs) : 0;
}

/* ---- checks of targets: NULL, or the words for what is required ------------------------------------- */

static const char *pk__accept_any(size_t outputs, const pk_real *y)
{
    (void)outputs, (void)y;
    return NULL;
}

static const char *pk__accept_masses(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (y[j] < 0)
            return "numbers >= 0";
    return NULL;
}

static const char *pk__accept_probabilities(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (!(y[j] >= 0 && y[j] <= 1))
            return "numbers in [0, 1]";
    return NULL;
}

static const char *pk__accept_class(size_t outputs, const pk_real *y)
{
    if (outputs == 1)
        return y[0] == 1 || y[0] == -1 ? NULL : "+1 or -1";
    size_t ones = 0, zeros = 0;
    for (size_t j = 0; j < outputs; j++) {
        ones += y[j] == 1;
        zeros += y[j] == 0;
    }
    return ones == 1 && ones + zeros == outputs ? NULL : "one 1 and otherwise 0";
}

typedef struct pk__loss_rule {
    pk_loss loss;
    const char *name;
    double (*evaluate)(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient);
    void (*curvature)(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v, pk_real *product);
    const char *(*accept)(size_t outputs, const pk_real *y);
    int classes; /* integer targets are classes even with one output */
} pk__loss_rule;

static const pk__loss_rule pk__losses[] = {
    {.loss = PK_SQUARED,
     .name = "squared",
     .evaluate = pk__squared,
     .curvature = pk__squared_hessian,
     .accept = pk__accept_any},
    {.loss = PK_MEAN_SQUARED,
     .name = "mean_squared",
     .evaluate = pk__mean_squared,
     .curvature = pk__mean_squared_hessian,
     .accept = pk__accept_any},
    {.loss = PK_SOFTMAX_CROSS_ENTROPY,
     .name = "softmax_cross_entropy",
     .evaluate = pk__softmax_cross_entropy,
     .curvature = pk__softmax_hessian,
     .accept = pk__accept_masses,
     .classes = 1},
    {.loss = PK_LOGISTIC,
     .name = "logistic",
     .evaluate = pk__logistic,
     .curvature = pk__logistic_hessian,
     .accept = pk__accept_probabilities},
    {.loss = PK_NLL,
     .name = "nll",
     .evaluate = pk__nll,
     .curvature = pk__no_hessian,
     .accept = pk__accept_masses,
     .classes = 1},
    {.loss = PK_HUBER,
     .name = "huber",
     .evaluate = pk__huber,
     .curvature = pk__huber_hessian,
     .accept = pk__accept_any},
    {.loss = PK_HINGE,
     .name = "hinge",
     .evaluate = pk__hinge,
     .curvature = pk__no_hessian,
     .accept = pk__accept_class},
};

enum { PK__LOSSES = (int)(sizeof pk__losses / sizeof pk__losses[0]) };

PK__PRIVATE const pk__loss_rule *pk__loss_find(pk_loss loss)
{
    for (int i = 0; i < PK__LOSSES; i++)
        if (pk__losses[i].loss == loss)
            return &pk__losses[i];
    return NULL;
}

PK_API pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss)
{
    if (!name || !loss)
        return pk__fail(context, PK_ARGUMENT, "loss: the name or the place for the loss is NULL");
    char names[128] = "";
    for (int i = 0; i < PK__LOSSES; i++) {
        if (strcmp(pk__losses[i].name, name) == 0) {
            *loss = pk__losses[i].loss;
            return PK_OK;
        }
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "",
                 pk__losses[i].name);
    }
    return pk__fail(context, PK_FORMAT, "'%.40s' is not a loss; these are: %s", name, names);
}

PK_API const char *pk_loss_name(pk_loss loss)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    return rule ? rule->name : "unknown";
}

PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    return rule ? rule->evaluate(outputs, f, target, NULL) : (double)NAN;
}

PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        rule->evaluate(outputs, f, target, gradient);
    else
        for (size_t j = 0; j < outputs; j++)
            gradient[j] = (pk_real)NAN;
}

PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        rule->curvature(outputs, f, target, direction, product);
    else
        for (size_t j = 0; j < outputs; j++)
            product[j] = (pk_real)NAN;
}

/* ---- targets ------------------------------------------------------------------------------------------ */

/* The target of one row as outputs numbers. A class out of range gives zeros. */
PK__PRIVATE void pk__loss_target(const pk__loss_rule *rule, const pk_array *targets, size_t row, size_t outputs,
                                 pk_real *target)
{
    if (!pk__is_labels(targets)) {
        pk_array_reals(targets, row * outputs, outputs, target);
        return;
    }
    const int64_t label = pk__label(targets, row);
    if (outputs == 1 && !rule->classes)
        target[0] = (pk_real)label;
    else
        for (size_t j = 0; j < outputs; j++)
            target[j] = label == (int64_t)j;
}

static pk_status pk__loss_check_rows(pk_context *context, const pk__loss_rule *rule, const pk_array *targets,
                                     size_t outputs, pk_real *target)
{
    const int labels = pk__is_labels(targets) && (outputs > 1 || rule->classes);
    for (size_t row = 0; row < targets->shape[0]; row++) {
        if (labels) {
            const int64_t label = pk__label(targets, row);
            if (label < 0 || (uint64_t)label >= outputs)
                return pk__fail(context, PK_ARGUMENT, "targets, row %zu: label %lld is not in [0, %zu)", row,
                                (long long)label, outputs);
            continue;
        }
        pk__loss_target(rule, targets, row, outputs, target);
        const char *asked = rule->accept(outputs, target);
        if (asked)
            return pk__fail(context, PK_ARGUMENT, "targets, row %zu: %s takes %s; the row starts with %g", row,
                            rule->name, asked, (double)target[0]);
    }
    return PK_OK;
}

PK_API pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset, size_t outputs)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "targets: %d is not a loss", (int)loss);
    if (!dataset || outputs == 0)
        return pk__fail(context, PK_ARGUMENT, "targets: a dataset and at least one output are needed");
    pk_real *target = NULL;
    pk_status status = pk__dataset_check_targets(context, dataset, outputs);
    if (!status)
        status = pk_allocate(context, outputs, sizeof *target, "one target", &target);
    if (!status)
        status = pk__loss_check_rows(context, rule, &dataset->targets, outputs, target);
    pk_release(context, target);
    return status;
}

PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        for (size_t b = 0; b < count; b++)
            pk__loss_target(rule, &dataset->targets, (size_t)items[b], outputs, targets + b * outputs);
}

/* ---- the gradient of a batch -------------------------------------------------------------------------- */

typedef struct pk__gradient_lane {
    pk__tape tape;
    pk_real *inputs, *targets; /* block x input width, block x outputs */
} pk__gradient_lane;

typedef struct pk__gradient_group {
    double objective;
    size_t not_finite; /* position in the batch, SIZE_MAX: none */
} pk__gradient_group;

/* How a batch is divided: into blocks of examples, one task of a thread each, and into groups of consecutive blocks that
 * share a partial gradient. It depends on shapes only. */
typedef struct pk__gradient_plan {
    size_t block, blocks, groups;
} pk__gradient_plan;

PK__PRIVATE pk__gradient_plan pk__gradient_cut(size_t parameters, size_t count)
{
    pk__gradient_plan plan = {64, 0, 0};
    plan.blocks = count / plan.block + (count % plan.block != 0);
    size_t most = ((size_t)1 << 22) / (parameters + 1);
    most = most < 2 ? 2 : most > 32 ? 32 : most;
    plan.groups = plan.blocks < most ? plan.blocks : most;
    return plan;
}

/* The approximate number of multiplications in a forward pass with one row, from which follows how many threads pay. */
PK__PRIVATE double pk__graph_work(const pk_graph *graph)
{
    double work = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        work += (double)graph->nodes[n].weight_count * (double)pk__max(graph->nodes[n].positions, 1);
    return work;
}

/* Takes the workspace's arrays; its graph, largest_batch and threads are set. */
PK__PRIVATE void pk__gradient_take(pk__arena *arena, const pk_graph *graph, pk_gradient_workspace *workspace)
{
    pk__gradient_plan plan = pk__gradient_cut(graph->spread, workspace->largest_batch);
    size_t rows = workspace->largest_batch < plan.block ? workspace->largest_batch : plan.block, partial = 0;
    if (!pk__multiply(plan.groups > 1 ? plan.groups - 1 : 0, graph->spread, &partial))
        arena->overflow = 1;
    workspace->lanes = pk__arena_take(arena, (size_t)workspace->threads, sizeof *workspace->lanes);
    workspace->groups = pk__arena_take(arena, plan.groups, sizeof *workspace->groups);
    workspace->partial = pk__arena_take(arena, partial, sizeof *workspace->partial);
    workspace->spread =
        graph->tied ? pk__arena_take(arena, 2, graph->spread * sizeof *workspace->spread) : NULL;
    for (int thread = 0; thread < workspace->threads; thread++) {
        pk__gradient_lane lane;
        size_t inputs = 0, targets = 0;
        if (!pk__multiply(rows, graph->input_width, &inputs) ||
            !pk__multiply(rows, graph->output_width, &targets))
            arena->overflow = 1;
        memset(&lane, 0, sizeof lane);
        pk__pass_take(arena, graph, rows, 1, 0, &lane.tape);
        lane.inputs = pk__arena_take(arena, inputs, sizeof *lane.inputs);
        lane.targets = pk__arena_take(arena, targets, sizeof *lane.targets);
        if (arena->base && !arena->overflow)
            workspace->lanes[thread] = lane;
    }
}

PK_API pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph, size_t largest_batch,
                                     pk_gradient_workspace *workspace)
{
    if (!graph || !workspace || largest_batch == 0 || graph->node_count == 0)
        return pk__fail(context, PK_ARGUMENT,
                        "gradient: a graph, a workspace and batches of at least 1 example are needed");
    pk_gradient_workspace taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.largest_batch = largest_batch;
    size_t groups = pk__gradient_cut(graph->spread, largest_batch).groups;
    taken.threads = pk_threads(context);
    if ((size_t)taken.threads > groups)
        taken.threads = (int)groups;
    pk__arena arena = {NULL, 0, 0, 0};
    pk_status status;
    do
        pk__gradient_take(&arena, graph, &taken);
    while (pk__arena_again(context, &arena, "the workspace of the batch gradient", &status));
    if (status)
        return status;
    taken.memory = arena.base;
    *workspace = taken;
    return PK_OK;
}

PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace)
{
    if (!workspace)
        return;
    pk_release(context, workspace->memory);
    memset(workspace, 0, sizeof *workspace);
}

/* What all blocks of one call share. */
typedef struct pk__gradient_job {
    const pk__loss_rule *rule;
    const pk_real *weights;
    const pk_dataset *dataset;
    const pk_batch *batch;
    pk__gradient_plan plan;
} pk__gradient_job;

/* Computes the losses of a block's rows after the forward pass, and sets the tape's seeds to their weighted gradients. */
static void pk__gradient_seed(const pk__gradient_job *job, pk__gradient_lane *lane, size_t first, size_t rows,
                              pk__gradient_group *sum)
{
    const pk_batch *batch = job->batch;
    const size_t outputs = lane->tape.graph->output_width;
    const pk_real *output = pk__pass_output(&lane->tape);
    pk_real *seed = pk__pass_seed(&lane->tape);
    const int finite = pk__all_finite(output, rows * outputs);
    for (size_t row = 0; !finite && sum->not_finite == SIZE_MAX && row < rows; row++)
        if (!pk__all_finite(output + row * outputs, outputs))
            sum->not_finite = first + row;
    for (size_t row = 0; row < rows; row++, output += outputs, seed += outputs) {
        pk_real *target = lane->targets + row * outputs;
        double weight = batch->weights ? batch->weights[first + row] : 1 / (double)batch->count;
        pk__loss_target(job->rule, &job->dataset->targets, (size_t)batch->items[first + row], outputs, target);
        sum->objective += weight * job->rule->evaluate(outputs, output, target, seed);
        for (size_t j = 0; j < outputs; j++)
            seed[j] *= (pk_real)weight;
    }
}

/* Adds the other groups' partial gradients in order, for one range of the parameters. Returns whether all is finite. */
static int pk__gradient_reduce_range(pk_real *gradient, const pk_real *partial, size_t groups,
                                     size_t parameters, size_t first, size_t count)
{
    pk_real *sum = gradient + first;
    for (size_t group = 1; group < groups; group++) {
        const pk_real *part = partial + (group - 1) * parameters + first;
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            sum[i] += part[i];
    }
    return pk__all_finite(sum, count);
}

/* Reads the rows of a block, with several threads if they are long. */
static void pk__gradient_inputs(const pk__gradient_job *job, const pk__tape *tape, size_t first, size_t rows,
                                pk_real *inputs)
{
    const size_t width = pk_dataset_width(job->dataset), parts = rows * width >> 14;
    const int64_t *items = job->batch->items + first;
    const int threads = (int)pk__min((size_t)pk__max((size_t)tape->threads, 1), parts);
    if (threads <= 1) {
        pk_dataset_inputs(job->dataset, items, rows, inputs);
        return;
    }
    pk__team team = pk__team_of(tape->context, threads, parts);
    PK__PARALLEL(team)
    for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team)) {
        const size_t from = rows * part / parts, to = rows * (part + 1) / parts;
        pk_dataset_inputs(job->dataset, items + from, to - from, inputs + from * width);
    }
    pk__team_end(&team);
}

/* gradient := the partial gradient of one group of blocks. */
static void pk__gradient_group_run(const pk__gradient_job *job, size_t group, pk__gradient_lane *lane,
                                   pk__gradient_group *result, pk_real *gradient)
{
    const pk_batch *batch = job->batch;
    pk__tape *tape = &lane->tape;
    size_t block = job->plan.block;
    size_t first = job->plan.blocks * group / job->plan.groups * block;
    size_t end = job->plan.blocks * (group + 1) / job->plan.groups * block;
    if (end > batch->count)
        end = batch->count;
    pk__gradient_group sum = {0, SIZE_MAX}; /* results of groups share cache lines: written once */
    memset(gradient, 0, tape->graph->spread * sizeof *gradient);
    for (; first < end; first += block) {
        size_t rows = end - first < block ? end - first : block;
        pk__line line = {job->weights, NULL, NULL};
        pk__gradient_inputs(job, tape, first, rows, lane->inputs);
        pk__pass_forward(tape, &line, rows, lane->inputs);
        pk__gradient_seed(job, lane, first, rows, &sum);
        pk__pass_reverse(tape, &line, rows, 1);
        pk__pass_weight_gradient(tape, rows, gradient);
    }
    *result = sum;
}

/* The same for all parameters, with several threads if there are many. */
enum { PK__REDUCE_WORTH = 64 };
PK__PRIVATE int pk__gradient_reduce(pk_context *context, pk_real *gradient, const pk_real *partial,
                                    size_t groups, size_t parameters, int threads)
{
    const size_t range = 4096, ranges = pk__blocks(parameters, range);
    int finite = 1;
    if (threads > 1 && groups * ranges >= (size_t)PK__REDUCE_WORTH) {
        pk__team team = pk__team_of(context, threads, ranges);
        PK__PARALLEL(team)
        for (size_t r = pk__first_task(&team); r < ranges; r = pk__next_task(&team))
            if (!pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                           pk__min(parameters - r * range, range))) {
                PK__ATOMIC_WRITE
                finite = 0;
            }
        pk__team_end(&team);
    } else {
        for (size_t r = 0; r < ranges; r++)
            finite &= pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                                pk__min(parameters - r * range, range));
    }
    return finite;
}

/* Checks a batch against a dataset and a network; messages begin with `name`. */
PK__PRIVATE pk_status pk__batch_arguments(pk_context *context, const char *name, const pk_graph *graph,
                                          const pk__loss_rule *rule, const pk_dataset *dataset,
                                          const pk_batch *batch)
{
    if (!dataset || !batch || (batch->count && !batch->items))
        return pk__fail(context, PK_ARGUMENT, "%s: an argument is NULL", name);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "%s: the loss is unknown", name);
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = inputs->rank < 1 ? 0 : inputs->shape[0], outputs = graph->output_width;
    pk_status status =
        pk_array_check_rows(context, inputs, graph->input_shape.rank, graph->input_shape.dims, "inputs");
    if (status)
        return status;
    if (targets->rank < 1 || targets->shape[0] != examples || !pk__fit_outputs(targets, outputs))
        return pk__fail(context, PK_SHAPE, "%s: %zu targets of %zu numbers for %zu examples and %zu outputs",
                        name, targets->rank < 1 ? (size_t)0 : targets->shape[0], targets->row_items, examples,
                        outputs);
    for (size_t b = 0; b < batch->count; b++)
        if (batch->items[b] < 0 || (uint64_t)batch->items[b] >= examples)
            return pk__fail(context, PK_ARGUMENT, "%s: batch position %zu is example %lld of %zu", name, b,
                            (long long)batch->items[b], examples);
    return PK_OK;
}

static pk_status pk__gradient_arguments(pk_context *context, const pk_graph *graph, const pk__loss_rule *rule,
                                        const pk_real *weights, const pk_dataset *dataset,
                                        const pk_batch *batch, const pk_gradient_workspace *workspace,
                                        const pk_real *gradient)
{
    if (!graph || !batch || !workspace || (graph->parameters && (!weights || !gradient)))
        return pk__fail(context, PK_ARGUMENT, "gradient: an argument is NULL");
    pk_status status = pk__batch_arguments(context, "gradient", graph, rule, dataset, batch);
    if (!status && (workspace->graph != graph || batch->count > workspace->largest_batch))
        return pk__fail(context, PK_ARGUMENT, "gradient: the workspace is for batches of up to %zu%s, not %zu",
                        workspace->largest_batch, workspace->graph != graph ? " of another graph" : "",
                        batch->count);
    return status;
}

PK_API pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                   const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                   pk_gradient_workspace *workspace, double *objective, pk_real *gradient)
{
    pk__gradient_job job = {pk__loss_find(loss), weights, dataset, batch, {0, 0, 0}};
    pk_status status =
        pk__gradient_arguments(context, graph, job.rule, weights, dataset, batch, workspace, gradient);
    if (status)
        return status;
    const size_t parameters = graph->spread;
    pk_real *flat = gradient;
    if (graph->tied) {
        pk_graph_spread(graph, weights, workspace->spread);
        job.weights = workspace->spread;
        gradient = workspace->spread + parameters;
    }
    job.plan = pk__gradient_cut(parameters, batch->count);
    size_t groups = job.plan.groups;
    pk__gradient_lane *lanes = workspace->lanes;
    /* A thread is started for about a million flops or more. */
    const double work = 6.0 * pk__graph_work(graph) * (double)batch->count / 1048576.0;
    int threads = pk_threads(context);
    threads = threads <= work ? threads : work < 1 ? 1 : (int)work;
    /* More threads than groups share the operations of each group. */
    const int inside = (size_t)threads > groups ? threads : 0;
    threads = (int)pk__min((size_t)threads, (size_t)workspace->threads);
    lanes[0].tape.threads = inside;
    lanes[0].tape.context = context;
    if (groups == 0) {
        memset(gradient, 0, parameters * sizeof *gradient);
        workspace->groups[0].objective = 0;
        workspace->groups[0].not_finite = SIZE_MAX;
    } else if (inside || threads <= 1) {
        for (size_t group = 0; group < groups; group++)
            pk__gradient_group_run(&job, group, lanes, &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
    } else {
        pk__team team = pk__team_of(context, threads, groups);
        PK__PARALLEL(team)
        for (size_t group = pk__first_task(&team); group < groups; group = pk__next_task(&team))
            pk__gradient_group_run(&job, group, &lanes[pk__thread()], &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
        pk__team_end(&team);
    }
    const int finite = pk__gradient_reduce(context, gradient, workspace->partial, groups, parameters,
                                           inside ? inside : threads);
    if (graph->tied) {
        pk_graph_gather(graph, gradient, gradient);
        memcpy(flat, gradient, graph->parameters * sizeof *flat);
    }
    double sum = workspace->groups[0].objective;
    size_t not_finite = workspace->groups[0].not_finite;
    for (size_t group = 1; group < groups; group++) {
        sum += workspace->groups[group].objective;
        if (not_finite == SIZE_MAX)
            not_finite = workspace->groups[group].not_finite;
    }
    if (objective)
        *objective = sum;
    if (not_finite != SIZE_MAX)
        return pk__fail(context, PK_NOT_FINITE,
                        "gradient: the network's output is not finite at batch position %zu "
                        "(example %lld)",
                        not_finite, (long long)batch->items[not_finite]);
    if (!isfinite(sum) || !finite)
        return pk__fail(context, PK_NOT_FINITE, "gradient: the %s is not finite",
                        isfinite(sum) ? "gradient" : "objective");
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
