/* pathkernel/kernels/family.h: the kernels of a recorded run: their table, what may be asked of them, and the shape of the answer.
 *
 * Every kernel is K(x, x') = sum_s omega_s integral < L_s(x; t), R_s(x'; t) > dt: two features, whether each moves along the
 * step, and weights of the steps omega_s. pk__kernel_rows is the table of them; a new kernel is a row.
 *
 *     ntk           J(w_s, x), both sides                              one matrix for each s that is asked for
 *     conjugate     what is fed to the last matrix layer at w_s         the same
 *     embedding     what is fed to every matrix layer                   the same
 *     path          J(w_s + t D_s, x), both at the same t (Domingos 2020)                          sum of eta_s times it
 *     path_average  J(w_s, x)                                           the mean over the weights that are asked for
 *     epk           test rows: J along the step; training row i: c_{s,i} J(w_s, x_i) (Bell et al. 2023)  sum of eta_s
 *     loss_path     grad l(w_s + t D_s, z), both (Chen et al. 2023)                                sum of eta_s
 *     tracin        grad l(w_s, z); on the right, training row i times c_{s,i} (Pruthi et al. 2020)  sum of eta_s
 *
 * J = df/dw; eta_s is the learning rate times the factor of clipping, whatever the optimizer, maximize included; c_{s,i} is the weight of example
 * i's loss in step s, 0 where it is not in the batch. The training rows of the run are a side of their own (NULL): rows
 * of a file with the same numbers are test rows. epk of a test and a training row moves the test row alone, of two test rows
 * both at the same t, of two training rows neither. It is one feature map, hence without negative eigenvalues, and
 * discontinuous in x at the training rows.
 */
#ifndef PATHKERNEL_FAMILY_H
#define PATHKERNEL_FAMILY_H
#include "../run/run.h"
#include "../path/quadrature.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_kernel_kind {
    PK_KERNEL_NTK = 1,
    PK_KERNEL_CONJUGATE,
    PK_KERNEL_EMBEDDING,
    PK_KERNEL_PATH,
    PK_KERNEL_PATH_AVERAGE,
    PK_KERNEL_EPK,
    PK_KERNEL_LOSS_PATH,
    PK_KERNEL_TRACIN
} pk_kernel_kind;

/* What is made of the C x C numbers K_kl of two rows. */
typedef enum pk_kernel_outputs {
    PK_OUTPUTS_NONE,  /* kernels without outputs: conjugate, embedding, loss_path, tracin */
    PK_OUTPUTS_FULL,  /* all of them */
    PK_OUTPUTS_TRACE, /* sum_k K_kk */
    PK_OUTPUTS_MEAN,  /* sum_k K_kk / C */
    PK_OUTPUTS_SUM,   /* sum_kl K_kl: of the sum of the outputs */
    PK_OUTPUTS_LABEL, /* K_kl of the labels k of one row, l of the other */
    PK_OUTPUTS_ONE    /* K_kk of one output k */
} pk_kernel_outputs;

typedef enum pk_kernel_map {
    PK_MAP_NONE,
    PK_MAP_COSINE, /* K(x,x') / sqrt(K(x,x) K(x',x')), each row with itself on its own side; of a row of zeros: 0 */
    PK_MAP_CENTER /* H K H, H = 1 - 1/M: left and right are the same rows */
} pk_kernel_map;

/* kind, and outputs where the kernel has them, are required; zeros are defaults for the rest. */
typedef struct pk_kernel_options {
    pk_kernel_kind kind;
    pk_kernel_outputs outputs;
    size_t output; /* PK_OUTPUTS_ONE */
    /* ntk, conjugate, embedding, path_average: numbers of weights, 0 .. S; NULL: the last, of path_average all. The others:
     * steps s from w_s to w_{s+1}, 0 .. S - 1, one that is there twice counts twice; NULL: all. */
    const size_t *steps;
    size_t step_count;
    pk_quadrature quadrature; /* path, epk, loss_path: along a step. auto, left, gauss, midpoint, trapezoid */
    double tolerance;         /* of auto, relative to the largest entry; 0: 1e-10 (PATHKERNEL_FLOAT: 1e-4) */
    int unweighted;           /* epk, tracin: c = 1 for all rows in every step */
    int by_layer; /* columns of by_layer (attribution/decomposition.h); embedding: matrix layers in the order of w */
    int append_one; /* conjugate: a 1 behind what is fed */
    pk_kernel_map map;
    int left_train; /* the left side of this kernel is the training rows, whatever the call's is */
} pk_kernel_options;

typedef struct pk_kernel_report {
    double
        error; /* auto: the sum of what the accepted integrals differ by from those with one node less, and of what
                     the closure of the rows shows; of the largest entry, before the map */
    size_t points;    /* points of rows or, where they are common to all rows, values of t that were taken */
    size_t refused;   /* pieces accepted although they missed */
    size_t zero_rows; /* cosine: rows of zeros, of all matrices */
    double seconds;   /* of the whole call: the pass over the run is shared */
} pk_kernel_report;

/* The names of the table; NULL beyond its ends. The kind of that name, 0: there is none. */
PK_API const char *pk_kernel_name(pk_kernel_kind kind);
PK_API pk_kernel_kind pk_kernel_find(const char *name);
/* full, trace, mean, sum, label; PK_OUTPUTS_ONE has a number for its name, PK_OUTPUTS_NONE none: NULL. */
PK_API const char *pk_kernel_outputs_name(pk_kernel_outputs outputs);
PK_API pk_kernel_outputs pk_kernel_outputs_find(const char *name);
/* none, cosine, center. find: -1: there is none. */
PK_API const char *pk_kernel_map_name(pk_kernel_map map);
PK_API int pk_kernel_map_find(const char *name);

/* The rule of a kernel: "auto", "left", "gauss:N" (N up to PK_KERNEL_GAUSS_NODES), "midpoint:N", "trapezoid", the two ends of a
 * step, or "trapezoid:N". PK_FORMAT lists them, each with the numbers that it takes; *quadrature is untouched then. */
PK_API PK__MUST_USE pk_status pk_kernel_rule_parse(pk_context *context, const char *text,
                                                   pk_quadrature *quadrature);

/* left, right: rows with or without targets (targets.type == 0); NULL: the training rows of the run. left == right, also
 * both NULL: the same rows, symmetric bit for bit (but tracin, whose right side is weighted). Targets are classes (N,)
 * for PK_OUTPUTS_LABEL, what the run's loss takes for loss_path and tracin.
 * shape (rank numbers): [steps,] [layers,] M, [C,] M' [, C]: steps for more than one of a kernel at a step, layers for by_layer,
 * C for PK_OUTPUTS_FULL. Checks options, rows and targets: PK_ARGUMENT, PK_SHAPE, PK_UNSUPPORTED, PK_NOT_FINITE. */
PK_API PK__MUST_USE pk_status pk_kernel_shape(pk_context *context, const pk_run *run, const pk_dataset *left,
                                              const pk_dataset *right, const pk_kernel_options *options,
                                              size_t shape[6], int *rank);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_FAMILY_IMPLEMENTED)
#define PATHKERNEL_FAMILY_IMPLEMENTED
/* >>> implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

/* A kernel without a public name: an output on the left, c times the losses on the right, all along the step (domingos.h).
 * Outputs are PK_OUTPUTS_ONE; only for pk__kernels_part. */
enum { PK__KERNEL_LOSS_WEIGHTED = PK_KERNEL_TRACIN + 1 };

/* ---- the table ----------------------------------------------------------------------------------------- */

enum { PK__LEFT = 1, PK__RIGHT = 2, PK__TEST_ROWS = 1, PK__ALL_ROWS = 2 };

typedef enum pk__feature {
    PK__FEATURE_OUTPUTS,
    PK__FEATURE_LOSS,
    PK__FEATURE_LAST,
    PK__FEATURE_FED
} pk__feature;
typedef enum pk__step_weight {
    PK__STEP_ALONE, /* one matrix a step */
    PK__STEP_MEAN,  /* the mean over weights */
    PK__STEP_RATE   /* the sum over steps, times eta_s */
} pk__step_weight;

typedef struct pk__kernel_row {
    const char *name;
    pk__feature feature;
    pk__step_weight step;
    int moves;      /* which rows go along the step: PK__TEST_ROWS, PK__ALL_ROWS; 0: none */
    int weighted;   /* on which sides training rows have c: PK__LEFT, PK__RIGHT */
    int right_loss; /* outputs on the left, losses on the right */
} pk__kernel_row;

static const pk__kernel_row pk__kernel_rows[] = {
    [PK_KERNEL_NTK] = {"ntk", PK__FEATURE_OUTPUTS, PK__STEP_ALONE, 0, 0, 0},
    [PK_KERNEL_CONJUGATE] = {"conjugate", PK__FEATURE_LAST, PK__STEP_ALONE, 0, 0, 0},
    [PK_KERNEL_EMBEDDING] = {"embedding", PK__FEATURE_FED, PK__STEP_ALONE, 0, 0, 0},
    [PK_KERNEL_PATH] = {"path", PK__FEATURE_OUTPUTS, PK__STEP_RATE, PK__ALL_ROWS, 0, 0},
    [PK_KERNEL_PATH_AVERAGE] = {"path_average", PK__FEATURE_OUTPUTS, PK__STEP_MEAN, 0, 0, 0},
    [PK_KERNEL_EPK] = {"epk", PK__FEATURE_OUTPUTS, PK__STEP_RATE, PK__TEST_ROWS, PK__LEFT | PK__RIGHT, 0},
    [PK_KERNEL_LOSS_PATH] = {"loss_path", PK__FEATURE_LOSS, PK__STEP_RATE, PK__ALL_ROWS, 0, 0},
    [PK_KERNEL_TRACIN] = {"tracin", PK__FEATURE_LOSS, PK__STEP_RATE, 0, PK__RIGHT, 0},
    [PK__KERNEL_LOSS_WEIGHTED] = {"loss_weighted", PK__FEATURE_OUTPUTS, PK__STEP_RATE, PK__ALL_ROWS, PK__RIGHT,
                                  1},
};
enum { PK__KERNELS = PK__KERNEL_LOSS_WEIGHTED }; /* behind those with a public name */

PK_API const char *pk_kernel_name(pk_kernel_kind kind)
{
    return (int)kind >= 1 && (int)kind < PK__KERNELS ? pk__kernel_rows[kind].name : NULL;
}

PK_API pk_kernel_kind pk_kernel_find(const char *name)
{
    for (int kind = 1; name && kind < PK__KERNELS; kind++)
        if (strcmp(name, pk__kernel_rows[kind].name) == 0)
            return (pk_kernel_kind)kind;
    return (pk_kernel_kind)0;
}

static const char *const pk__outputs_names[] = {[PK_OUTPUTS_FULL] = "full",
                                                [PK_OUTPUTS_TRACE] = "trace",
                                                [PK_OUTPUTS_MEAN] = "mean",
                                                [PK_OUTPUTS_SUM] = "sum",
                                                [PK_OUTPUTS_LABEL] = "label"};
static const char *const pk__map_names[] = {
    [PK_MAP_NONE] = "none", [PK_MAP_COSINE] = "cosine", [PK_MAP_CENTER] = "center"};

PK_API const char *pk_kernel_outputs_name(pk_kernel_outputs outputs)
{
    return (int)outputs >= 0 && (int)outputs <= PK_OUTPUTS_LABEL ? pk__outputs_names[outputs] : NULL;
}

PK_API pk_kernel_outputs pk_kernel_outputs_find(const char *name)
{
    for (int i = 1; name && i <= PK_OUTPUTS_LABEL; i++)
        if (strcmp(name, pk__outputs_names[i]) == 0)
            return (pk_kernel_outputs)i;
    return PK_OUTPUTS_NONE;
}

PK_API const char *pk_kernel_map_name(pk_kernel_map map)
{
    return (int)map >= 0 && (int)map <= PK_MAP_CENTER ? pk__map_names[map] : NULL;
}

PK_API int pk_kernel_map_find(const char *name)
{
    for (int i = 0; name && i <= PK_MAP_CENTER; i++)
        if (strcmp(name, pk__map_names[i]) == 0)
            return i;
    return -1;
}

PK_API pk_status pk_kernel_rule_parse(pk_context *context, const char *text, pk_quadrature *quadrature)
{
    return pk__rule_parse(context, text, 1, quadrature);
}

/* ---- layers that are fed ------------------------------------------------------------------------------- */

static int pk__is_matrix_layer(const pk_node *node)
{
    return node->weight_count && (node->operation->tangent_form == PK_TANGENT_OUTER ||
                                  strcmp(node->operation->name, "embedding") == 0);
}

/* Matrix layer number `number` in the order of the untied vector, which is that of w; NULL beyond the last. */
PK__PRIVATE const pk_node *pk__matrix_layer(const pk_graph *graph, size_t number)
{
    for (size_t l = 0; l < graph->node_count; l++) {
        const pk_node *node = &graph->nodes[l];
        size_t before = 0;
        if (!l || !pk__is_matrix_layer(node))
            continue;
        for (size_t n = 1; n < graph->node_count; n++)
            before +=
                pk__is_matrix_layer(&graph->nodes[n]) && graph->nodes[n].weight_offset < node->weight_offset;
        if (before == number)
            return node;
    }
    return NULL;
}

static size_t pk__matrix_layers(const pk_graph *graph)
{
    size_t count = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        count += (size_t)pk__is_matrix_layer(&graph->nodes[n]);
    return count;
}

/* ---- what is asked for --------------------------------------------------------------------------------- */

static size_t pk__kernel_slots(const pk_run *run, const pk_kernel_options *options)
{
    (void)run;
    return pk__kernel_rows[options->kind].step == PK__STEP_ALONE && options->steps ? options->step_count : 1;
}

static size_t pk__kernel_layers(const pk_run *run, const pk_kernel_options *options)
{
    return !options->by_layer                                          ? 1
           : pk__kernel_rows[options->kind].feature == PK__FEATURE_FED ? pk__matrix_layers(&run->graph)
                                                                       : run->graph.columns;
}

static pk_status pk__kernel_check_steps(pk_context *context, const pk_run *run,
                                        const pk_kernel_options *options)
{
    const pk__kernel_row *row = &pk__kernel_rows[options->kind];
    const size_t end = row->step == PK__STEP_RATE ? run->steps : run->steps + 1;
    if (options->steps && !options->step_count)
        return pk__fail(context, PK_ARGUMENT, "%s: the list of steps is empty", row->name);
    for (size_t k = 0; options->steps && k < options->step_count; k++)
        if (options->steps[k] >= end)
            return pk__fail(
                context, PK_ARGUMENT,
                row->step == PK__STEP_RATE
                    ? "%s: step %zu of a run of %zu steps; they are numbered from 0"
                    : "%s: the weights of step %zu of a run of %zu steps, which has those of 0 to %zu",
                row->name, options->steps[k], run->steps, run->steps);
    return PK_OK;
}

static pk_status pk__kernel_check_rule(pk_context *context, const pk_run *run, const pk_kernel_options *options)
{
    const pk__kernel_row *row = &pk__kernel_rows[options->kind];
    const pk_quadrature *rule = &options->quadrature;
    if ((row->feature == PK__FEATURE_LOSS || row->right_loss) && run->loss_gradients.data)
        return pk__fail(
            context, PK_UNSUPPORTED,
            "%s: the run has recorded derivatives of a loss, at its own steps only, so that gradients of the "
            "loss at other weights are not known",
            row->name);
    if (!row->moves && rule->rule != PK_RULE_AUTO && rule->rule != PK_RULE_LEFT)
        return pk__fail(context, PK_ARGUMENT,
                        "%s takes its features at the weights themselves: no rule but left", row->name);
    if (!pk_rule_name(rule->rule) || pk__rules[rule->rule].kernel_nodes == PK__NO_RULE)
        return pk__fail(context, PK_ARGUMENT, "%s: rule %d is none of auto, left, gauss, midpoint, trapezoid",
                        row->name, (int)rule->rule);
    const int least = pk__rules[rule->rule].least,
              most = rule->rule == PK_RULE_GAUSS ? (int)PK_KERNEL_GAUSS_NODES : (int)PK_RULE_NODES;
    if (rule->nodes && least && (rule->nodes < least || rule->nodes > most))
        return pk__fail(context, PK_ARGUMENT, "%s: the rule %s cannot have %d nodes; it takes %d to %d",
                        row->name, pk_rule_name(rule->rule), rule->nodes, least, most);
    if (!(options->tolerance >= 0 && options->tolerance < 1))
        return pk__fail(context, PK_ARGUMENT, "%s: the tolerance %g is not in [0, 1)", row->name,
                        options->tolerance);
    return PK_OK;
}

static pk_status pk__kernel_check_options(pk_context *context, const pk_run *run,
                                          const pk_kernel_options *options)
{
    if (!run || !run->weights.type || !options)
        return pk__fail(context, PK_ARGUMENT, "kernels: the run or the options are missing");
    if (!pk_kernel_name(options->kind))
        return pk__fail(context, PK_ARGUMENT, "kernels: %d is not the kind of a kernel", (int)options->kind);
    const pk__kernel_row *row = &pk__kernel_rows[options->kind];
    if (row->feature != PK__FEATURE_OUTPUTS && options->outputs != PK_OUTPUTS_NONE)
        return pk__fail(context, PK_ARGUMENT, "%s has no outputs to choose from", row->name);
    if (row->feature == PK__FEATURE_OUTPUTS &&
        (options->outputs <= PK_OUTPUTS_NONE || options->outputs > PK_OUTPUTS_ONE))
        return pk__fail(context, PK_ARGUMENT,
                        "%s: outputs must be named: full, trace, mean, sum, label or one of them", row->name);
    if (options->outputs == PK_OUTPUTS_ONE && options->output >= run->outputs)
        return pk__fail(context, PK_ARGUMENT, "%s: output %zu of a network with %zu outputs", row->name,
                        options->output, run->outputs);
    if (options->append_one && row->feature != PK__FEATURE_LAST)
        return pk__fail(context, PK_ARGUMENT, "%s: a 1 is appended for conjugate alone", row->name);
    if (options->unweighted && !row->weighted)
        return pk__fail(context, PK_ARGUMENT, "%s does not weight its rows by the batch", row->name);
    if (options->by_layer && row->feature == PK__FEATURE_LAST)
        return pk__fail(context, PK_ARGUMENT, "%s is of one layer and has no layers to tell apart", row->name);
    if ((int)options->map < 0 || options->map > PK_MAP_CENTER)
        return pk__fail(context, PK_ARGUMENT, "%s: %d is not a map", row->name, (int)options->map);
    if (options->map != PK_MAP_NONE && options->outputs == PK_OUTPUTS_FULL)
        return pk__fail(context, PK_ARGUMENT, "%s: maps are for matrices of rows, not for all outputs with all",
                        row->name);
    if ((row->feature == PK__FEATURE_LAST || row->feature == PK__FEATURE_FED) &&
        !pk__matrix_layers(&run->graph))
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s: the network has no matrix layer (dense, conv, embedding, attention)", row->name);
    pk_status status = pk__kernel_check_steps(context, run, options);
    return status ? status : pk__kernel_check_rule(context, run, options);
}

/* Whether the operations of the network take the numbers of each row: tokens are whole numbers in a range. */
static pk_status pk__kernel_check_tokens(pk_context *context, const pk_graph *graph, const pk_array *inputs,
                                         const char *where)
{
    pk_real *row = NULL;
    if (!graph->checked)
        return PK_OK;
    pk_status status = pk_allocate(context, graph->input_width, sizeof *row, "one row", &row);
    for (size_t r = 0; !status && r < pk_array_length(inputs); r++) {
        pk_array_reals(inputs, r * graph->input_width, graph->input_width, row);
        status = pk__prefix(context, pk_graph_check_inputs(context, graph, r, row), "%s: ", where);
    }
    pk_release(context, row);
    return status;
}

/* Rows of a side: their width, numbers and, where the kernel needs them, targets. */
static pk_status pk__kernel_check_side(pk_context *context, const pk_run *run, const pk_kernel_options *options,
                                       const pk_dataset *data, const char *side)
{
    const pk__kernel_row *row = &pk__kernel_rows[options->kind];
    const int train = !data;
    char text[64];
    data = data ? data : &run->train;
    pk__print(text, sizeof text, "%s: %s rows", row->name, train ? "training" : side);
    if (data->inputs.rank < 1 || !data->inputs.type || (!data->inputs.data && pk_array_length(&data->inputs)))
        return pk__fail(context, PK_ARGUMENT, "%s are missing", text);
    pk_status status = train ? PK_OK : pk_run_check_inputs(context, run, &data->inputs, text);
    if (!status && !train)
        status = pk__check_finite(context, text, &data->inputs);
    if (!status && !train)
        status = pk__kernel_check_tokens(context, &run->graph, &data->inputs, text);
    const size_t count = pk_array_length(&data->inputs);
    if (status || (row->feature != PK__FEATURE_LOSS && options->outputs != PK_OUTPUTS_LABEL))
        return status;
    if (!data->targets.type)
        return pk__fail(context, PK_ARGUMENT, "%s need %s, which are missing", text,
                        row->feature == PK__FEATURE_LOSS ? "the targets of the loss" : "labels");
    if (data->targets.rank < 1 || pk_array_length(&data->targets) != count)
        return pk__fail(context, PK_SHAPE, "%s: %zu rows of targets for %zu rows of inputs", text,
                        data->targets.rank < 1 ? (size_t)0 : pk_array_length(&data->targets), count);
    if (row->feature == PK__FEATURE_LOSS)
        return train || !count
                   ? PK_OK
                   : pk__prefix(context, pk_criterion_check(context, &run->criterion, data, run->outputs),
                                "%s: ", text);
    if (!pk__is_labels(&data->targets))
        return pk__fail(context, PK_ARGUMENT,
                        "%s: targets are not class labels, one whole number a row, which outputs by label need",
                        text);
    for (size_t r = 0; r < count; r++) {
        const int64_t label = pk__label(&data->targets, r);
        if (label < 0 || (uint64_t)label >= run->outputs)
            return pk__fail(context, PK_ARGUMENT, "%s: row %zu has label %lld, the network has %zu outputs",
                            text, r, (long long)label, run->outputs);
    }
    return PK_OK;
}

static size_t pk__kernel_count(const pk_run *run, const pk_dataset *data)
{
    return data ? pk_array_length(&data->inputs) : run->examples;
}

PK_API pk_status pk_kernel_shape(pk_context *context, const pk_run *run, const pk_dataset *left,
                                 const pk_dataset *right, const pk_kernel_options *options, size_t shape[6],
                                 int *rank)
{
    pk_status status = pk__kernel_check_options(context, run, options);
    if (!status && (!shape || !rank))
        status = pk__fail(context, PK_ARGUMENT, "kernels: there is no place for the shape");
    left = options && options->left_train ? NULL : left;
    if (!status)
        status = pk__kernel_check_side(context, run, options, left, "left");
    if (!status && left != right)
        status = pk__kernel_check_side(context, run, options, right, "right");
    if (!status && options->map == PK_MAP_CENTER && left != right)
        status = pk__fail(context, PK_ARGUMENT, "%s: to center needs the same rows on both sides",
                          pk_kernel_name(options->kind));
    if (status)
        return status;
    const size_t slots = pk__kernel_slots(run, options);
    const int full = options->outputs == PK_OUTPUTS_FULL;
    size_t numbers = sizeof(double);
    int n = 0;
    if (slots > 1)
        shape[n++] = slots;
    if (options->by_layer)
        shape[n++] = pk__kernel_layers(run, options);
    shape[n++] = pk__kernel_count(run, left);
    if (full)
        shape[n++] = run->outputs;
    shape[n++] = pk__kernel_count(run, right);
    if (full)
        shape[n++] = run->outputs;
    *rank = n;
    for (int i = 0; i < n; i++)
        if (!pk__multiply(numbers, shape[i], &numbers))
            return pk__fail(context, PK_OVERFLOW, "%s: a Gram matrix of so many rows overflows",
                            pk_kernel_name(options->kind));
    return PK_OK;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
