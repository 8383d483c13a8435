/* pathkernel/network/graph.h: a static graph of batched operations, each one table entry with its forward, reverse and
 * tangent rules. Weights are one flat vector w of P numbers, which consists of weight blocks: a block is a range of w with
 * a shape and the list of its uses, that is of the parameter tensors of nodes that read it. Parameter groups, tied
 * weights and the columns of by_layer are properties of blocks.
 *
 * Where a block has several uses, each node still works on its own numbers, one after the other in the untied weights E w,
 * copies and transposes: f(w) = F(E w), and the gradient with respect to w is E^T that of F. Without ties E is the
 * identity, and nothing is copied.
 */
#ifndef PATHKERNEL_GRAPH_H
#define PATHKERNEL_GRAPH_H
#include "../math/matrix.h"
#include "../base/parallel.h"
#include "../base/random.h"

/* >>> declarations */
PK__BEGIN_C

enum {
    PK_SHAPE_RANK = 4,
    PK_NODE_INPUTS = 4,
    PK_NODE_ATTRIBUTES = 16,
    PK_NODE_TENSORS = 4,
    PK_CONSTANT_NAME = 32
};

/* The shape of one example at a node; width is the product of dims. */
typedef struct pk_shape {
    int rank;
    size_t dims[PK_SHAPE_RANK];
} pk_shape;

/* How an operation depends on its inputs. */
typedef enum pk_smoothness {
    PK_LINEAR,           /* linear (a constant may be added) */
    PK_PIECEWISE_LINEAR, /* linear between the zeros of its switch functions */
    PK_MULTILINEAR,      /* linear in each input, the others held: degrees along a line add up */
    PK_SMOOTH,           /* analytic, not polynomial; where it has switch functions, between their zeros */
    PK_SURROGATE         /* the reverse rule is not the derivative: no path integral can close */
} pk_smoothness;

/* How the gradient with respect to the weights is represented, see integral.h. */
typedef enum pk_tangent_form {
    PK_TANGENT_NONE, /* no weights */
    PK_TANGENT_OUTER, /* y = weight (fan_out, fan_in) x, perhaps plus a bias (fan_out), at each of `positions` positions of one
                         input. The gradient is the sum over positions of the outer products cotangent (x) input, and the sum
                         of the cotangents. */
    PK_TANGENT_ROWS /* materialized: row_gradients */
} pk_tangent_form;

typedef enum pk_option_kind {
    PK_OPTION_NUMBER, /* a number */
    PK_OPTION_PAIR,   /* AxB, or A for both; two attributes */
    PK_OPTION_FLAG,   /* the name alone: the attribute becomes `least` */
    PK_OPTION_CHOICE  /* one of the words of `choices`, its number */
} pk_option_kind;

/* A word of an operation in the network language and the attribute that it sets. */
typedef struct pk_option {
    const char *name; /* NULL ends a list */
    pk_option_kind kind;
    int attribute;
    int position; /* 1, 2, ...: the number of the word; 0: name=value, or the name of a flag, at any position */
    int required;
    double least, most; /* the range of a number */
    int whole;
    const char *choices; /* "a b c" */
} pk_option;

struct pk_operation;
struct pk_graph;

/* A parameter tensor of a node, as PyTorch counts them: each weight and each bias is one. */
typedef struct pk_parameter_tensor {
    pk_shape shape;
    size_t first, count; /* a range of the node's weights */
    int tied;            /* the earlier node whose tensor of the same number it is; 0: its own */
    int transposed;      /* it is the transpose of that node's */
    size_t block;        /* its number in graph->blocks */
} pk_parameter_tensor;

typedef struct pk_weight_use {
    int node, tensor; /* graph->nodes[node].tensors[tensor] */
} pk_weight_use;

/* A range of w, its shape and what uses it. The blocks are numbered in the order of w, which they fill. */
typedef struct pk_weight_block {
    size_t first, count;
    pk_shape shape; /* that of its first use; others may use the transpose */
    int column;     /* of by_layer: one for each node that is the first to use a block */
    size_t use_count;
    pk_weight_use *uses; /* in the order of the nodes; the first one gives it its initial values */
} pk_weight_block;

typedef struct pk_node {
    const struct pk_operation *operation; /* NULL for the input */
    int input_count;
    int inputs[PK_NODE_INPUTS]; /* earlier nodes */
    pk_shape shape;
    size_t width;
    size_t weight_offset, weight_count; /* in the untied weights, which are w itself in a graph without ties */
    int tensor_count;
    pk_parameter_tensor tensors[PK_NODE_TENSORS]; /* all of its weights, one after the other */
    int shares;                                   /* another node uses one of its blocks, too */
    double attributes[PK_NODE_ATTRIBUTES];
    pk_real *constants;                      /* fixed numbers, which are not weights; owned by the graph */
    int constants_shared;                    /* they belong to an earlier node */
    size_t constant_count, constant_columns; /* columns: of the array that the network language names */
    char constant_name[PK_CONSTANT_NAME];    /* the name of that array, or empty */
    pk_tangent_form tangent_form;            /* the operation's, unless its shape rule chose another */
    size_t positions, fan_in, fan_out;       /* PK_TANGENT_OUTER */
    int unfolds; /* PK_TANGENT_OUTER: unfold collects the inputs of each position; 0: in[0] has them one after the other */
    int layer; /* number among the nodes with weights, -1 without */
    /* Along a line w + t d: */
    int varies;         /* the value depends on t */
    int degree;         /* the value is a (piecewise) polynomial in t of at most this degree; -1: it is not */
    int input_degree;   /* the same of its inputs, and so of its switch functions */
    int input_constant; /* no input depends on t */
    int cotangent_constant;     /* d output / d value does not depend on t */
    int shared[PK_NODE_INPUTS]; /* a later node (or an earlier input) reads the same node */
    int unread;                 /* no node reads it, and it is not the output */
    int only_reader;            /* the only node that reads it, as one input; -1: none or several do */
    int layer_node; /* a list beside the nodes: nodes[l].layer_node is the number of the node that is layer l */
} pk_node;

/* One operation applied to a batch. Arrays are row-major, rows x width; cotangents are rows x copies x
 * width: one row may carry several cotangents. */
typedef struct pk_call {
    const pk_node *node;
    size_t rows, copies;
    int threads;         /* that a rule may use, if its bits do not depend on them; 0: one */
    pk_context *context; /* of the caller, if there are several threads; may be NULL */
    size_t in_width[PK_NODE_INPUTS];
    const pk_real *weights;   /* this node's */
    const pk_real *direction; /* tangent of the weights; NULL: zero */
    const pk_real *in[PK_NODE_INPUTS];
    pk_real *out;
    const pk_real *in_tangent[PK_NODE_INPUTS]; /* NULL: zero */
    pk_real *out_tangent;
    const pk_real *out_cotangent;
    pk_real *in_cotangent[PK_NODE_INPUTS]; /* NULL: not needed */
    int accumulate[PK_NODE_INPUTS];        /* add to in_cotangent instead of writing it */
    pk_real *gradient;
    pk_real *scratch;
} pk_call;

/* An operation F(weights, in). Functions must not fail, allocate or keep state; rows are independent. */
typedef struct pk_operation {
    const char *name; /* its word in the network language */
    pk_smoothness smoothness;
    pk_tangent_form tangent_form;
    int linear_in_weights;    /* F is linear and homogeneous in its weights (or has none) */
    const pk_option *options; /* what may follow the name in the network language; NULL: nothing */
    double defaults[PK_NODE_ATTRIBUTES];
    /* Checks the inputs (the attributes fit the options), sets node->shape and node->weight_count, for
     * PK_TANGENT_OUTER positions, fan_in and fan_out where they are not 1, input width and width, and unfolds = 0
     * where unfold would only copy in[0]. It may set tensor_count and the shapes of the tensors that the weights consist of;
     * else they are a matrix (fan_out, fan_in) and perhaps a bias (fan_out) where that is their number, or one vector.
     * NULL: the first input's shape, no weights. */
    pk_status (*shape)(pk_context *context, const struct pk_graph *graph, pk_node *node);
    size_t (*scratch)(const pk_node *node, size_t rows, size_t copies); /* numbers; NULL: none */
    void (*forward)(const pk_call *call);                               /* out = F */
    void (*tangent)(const pk_call *call); /* out_tangent = sum_j dF/din_j in_tangent_j + dF/dw direction */
    void (*reverse)(const pk_call *call); /* in_cotangent_j (+)= (dF/din_j)^T out_cotangent */
    void (*weight_gradient)(
        const pk_call *call);                   /* gradient += sum_rows (dF/dw)^T out_cotangent, copies == 1 */
    void (*row_gradients)(const pk_call *call); /* gradient[row][copy][weight] = (dF/dw)^T out_cotangent */
    /* Operations with kinks: switch functions, linear in the inputs, whose zeros separate the pieces. */
    size_t (*switch_count)(const pk_node *node);
    void (*switches)(const pk_call *call); /* out[row][switch] */
    int elementwise;                       /* one input of the same shape, number by number, no weights */
    /* PK_SMOOTH and PK_MULTILINEAR: in_cotangent_j += (d/de (dF/din_j)(in + e in_tangent))^T out_cotangent, for second derivatives.
     * Operations that are linear in their inputs or between kinks need none. */
    void (*curvature)(const pk_call *call);
    /* PK_TANGENT_OUTER: out (rows x positions x fan_in) = the inputs of each position; NULL: in[0] has this layout. It is not
     * called for a node whose `unfolds` is 0. */
    void (*unfold)(const pk_call *call);
    int channels_first; /* values are fan_out x positions, not positions x fan_out */
    /* Checks one row of data; NULL: any data are allowed. The message names the row and the number. */
    pk_status (*check)(pk_context *context, const pk_node *node, size_t row, const pk_real *in);
    /* Starting weights; NULL: uniform in +-1/sqrt(fan_in), or of the input's width. */
    void (*initialize)(const pk_node *node, pk_random *random, pk_real *weights);
} pk_operation;

typedef struct pk_graph {
    size_t node_count, node_capacity;
    pk_node *nodes;    /* in topological order; nodes[0] is the input, the last one the output */
    size_t parameters; /* P, of w */
    size_t untied;     /* the number of untied weights: the sum of the nodes' weight_count */
    size_t columns;    /* of by_layer: nodes that are the first to use a block */
    size_t block_count, use_count, tensor_capacity;
    pk_weight_block *blocks; /* owned */
    pk_weight_use *uses;     /* of all blocks; owned */
    int tied;                /* some block has several uses */
    size_t layers, input_width, output_width, widest;
    pk_shape input_shape;
    int degree;    /* of the output in t along a line, -1: not polynomial */
    int switched;  /* some node with kinks depends on the weights */
    int surrogate; /* some node that depends on the weights is PK_SURROGATE */
    int checked;   /* some operation restricts its data: pk_graph_check_inputs */
    char *text;    /* the network line that it was made from, or NULL; owned */
} pk_graph;

/* Writes a shape as 1x28x28 into text (PK_SHAPE_TEXT bytes); returns text. */
enum { PK_SHAPE_TEXT = 96 };
PK_API const char *pk_shape_text(const pk_shape *shape, char *text);

/* Starts a zeroed graph with its input. */
PK_API PK__MUST_USE pk_status pk_graph_input(pk_context *context, pk_graph *graph, const pk_shape *shape);
/* Appends operation(inputs); attributes (PK_NODE_ATTRIBUTES numbers) may be NULL for the operation's
 * defaults. *node (may be NULL) is its number. The last node added is the output. The graph is unchanged
 * on an error. */
PK_API PK__MUST_USE pk_status pk_graph_add(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                           int input_count, const int *inputs, const double *attributes,
                                           int *node);
/* The same for an operation with fixed numbers, which are copied. */
PK_API PK__MUST_USE pk_status pk_graph_add_constants(pk_context *context, pk_graph *graph,
                                                     const pk_operation *operation, int input_count,
                                                     const int *inputs, const double *attributes,
                                                     size_t constant_count, const pk_real *constants,
                                                     int *node);
/* Lets a tensor (0: weight, 1: bias) of the node that was added last be that of an earlier node, of the same shape, or, for a
 * transposed matrix, of the transposed shape. PK_ARGUMENT or PK_SHAPE name both; the graph is unchanged then. */
PK_API PK__MUST_USE pk_status pk_graph_tie(pk_context *context, pk_graph *graph, int node, int tensor,
                                           int other, int transposed);
/* untied (graph->untied) = E flat (graph->parameters). */
PK_API void pk_graph_untie(const pk_graph *graph, const pk_real *flat, pk_real *untied);
/* flat = E^T untied: the sum over the uses of each block. flat may be the same array as untied. */
PK_API void pk_graph_gather(const pk_graph *graph, const pk_real *untied, pk_real *flat);
/* Checks a row of data (input width) against the operations that read it: tokens are whole numbers below the vocabulary's
 * size. PK_ARGUMENT names the row by its number. */
PK_API PK__MUST_USE pk_status pk_graph_check_inputs(pk_context *context, const pk_graph *graph, size_t row,
                                                    const pk_real *inputs);
/* The node of a layer (0 <= layer < graph->layers). */
PK_API const pk_node *pk_graph_layer(const pk_graph *graph, size_t layer);
PK_API void pk_graph_release(pk_context *context, pk_graph *graph);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_GRAPH_IMPLEMENTED)
#define PATHKERNEL_GRAPH_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- graphs ---------------------------------------------------------------------------------------- */

PK_API const char *pk_shape_text(const pk_shape *shape, char *text)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < shape->rank && i < PK_SHAPE_RANK; i++)
        used += (size_t)snprintf(text + used, PK_SHAPE_TEXT - used, i ? "x%zu" : "%zu", shape->dims[i]);
    return text;
}

/* Whether the gradient of each row is one outer product, of the cotangent and in[0] itself, as the factored engine needs it. One
 * position is not enough for that: its inputs may be a part of in[0], or padded. */
PK__PRIVATE int pk__is_outer(const pk_node *node)
{
    return node->tangent_form == PK_TANGENT_OUTER && node->positions == 1 && !node->unfolds;
}

static pk_status pk__shape_width(pk_context *context, const pk_shape *shape, size_t *width)
{
    *width = 1;
    if (shape->rank < 1 || shape->rank > PK_SHAPE_RANK)
        return pk__fail(context, PK_SHAPE, "a shape has rank %d; 1 to %d are possible", shape->rank,
                        PK_SHAPE_RANK);
    for (int i = 0; i < shape->rank; i++)
        if (shape->dims[i] == 0)
            return pk__fail(context, PK_OVERFLOW, "a shape has a dimension of zero; each is at least 1");
        else if (!pk__multiply(*width, shape->dims[i], width) || *width > SIZE_MAX / 4096)
            return pk__fail(context, PK_OVERFLOW, "a shape with a dimension of %zu is too large",
                            shape->dims[i]);
    return PK_OK;
}

/* Sets what a node's inputs determine about it, see pk_node: whether and how its value depends on t. */
static void pk__node_analyse(const pk_graph *graph, pk_node *node)
{
    const pk_operation *operation = node->operation;
    node->input_constant = 1;
    for (int j = 0; j < node->input_count; j++) {
        const pk_node *input = &graph->nodes[node->inputs[j]];
        node->input_constant &= !input->varies;
        if (input->degree < 0 || node->degree < 0)
            node->degree = -1;
        else if (operation->smoothness == PK_MULTILINEAR)
            node->degree += input->degree;
        else if (input->degree > node->degree)
            node->degree = input->degree;
    }
    node->input_degree = node->degree;
    node->varies = !node->input_constant || node->weight_count > 0;
    if (!node->input_constant && (operation->smoothness == PK_SMOOTH || operation->smoothness == PK_SURROGATE))
        node->degree = -1;
    if (node->weight_count > 0)
        node->degree = node->degree < 0 || !operation->linear_in_weights ? -1 : node->degree + 1;
}

static void pk__graph_analyse(pk_graph *graph)
{
    size_t last = graph->node_count - 1;
    graph->switched = 0;
    graph->surrogate = 0;
    graph->checked = 0;
    graph->widest = 0;
    for (size_t n = 0; n < graph->node_count; n++) {
        pk_node *node = &graph->nodes[n];
        node->cotangent_constant = 1;
        node->unread = n != last;
        node->only_reader = -1;
        if (node->layer >= 0)
            graph->nodes[node->layer].layer_node = (int)n;
        if (node->width > graph->widest)
            graph->widest = node->width;
    }
    for (size_t n = last; n > 0; n--) {
        pk_node *node = &graph->nodes[n];
        int constant =
            node->cotangent_constant && node->operation->smoothness == PK_LINEAR && !node->weight_count;
        for (int j = 0; j < node->input_count; j++) {
            pk_node *input = &graph->nodes[node->inputs[j]];
            input->cotangent_constant &= constant;
            node->shared[j] = !input->unread;
            input->only_reader = input->unread ? (int)n : -1;
            input->unread = 0;
        }
        graph->switched |= node->operation->switch_count && node->operation->smoothness != PK_SURROGATE &&
                           !node->input_constant;
        graph->surrogate |= node->operation->smoothness == PK_SURROGATE && !node->input_constant;
        graph->checked |= node->operation->check != NULL;
    }
    graph->output_width = graph->nodes[last].width;
    graph->degree = graph->nodes[last].degree;
}

/* Checks a node against the properties that its operation declares, since gradients and pieces are computed from these. */
static pk_status pk__check_node(pk_context *context, const pk_graph *graph, const pk_node *node)
{
    const pk_operation *operation = node->operation;
    const size_t width = graph->nodes[node->inputs[0]].width;
    const int outer = node->tangent_form == PK_TANGENT_OUTER;
    const char *what = NULL;
    size_t matrix = 0, ins = 0, outs = 0;
    if (!operation->forward || !operation->tangent || !operation->reverse)
        what = "a rule for forward, tangent or reverse is missing";
    else if (node->weight_count && (node->tangent_form == PK_TANGENT_NONE || !operation->weight_gradient))
        what = "it has weights, but no tangent form or no rule for their gradient";
    else if (node->tangent_form == PK_TANGENT_ROWS && node->weight_count && !operation->row_gradients)
        what = "PK_TANGENT_ROWS needs row_gradients";
    else if (!operation->switch_count != !operation->switches)
        what = "switch_count and switches belong together";
    else if (operation->elementwise && (node->input_count != 1 || node->width != width || node->weight_count))
        what = "an elementwise operation has one input of its own width, and no weights";
    else if (outer &&
             (node->input_count != 1 || operation->smoothness != PK_LINEAR || !operation->linear_in_weights))
        what = "PK_TANGENT_OUTER is for one input, and for what is linear in it and in the weights";
    else if (outer && node->unfolds && !operation->unfold)
        what = "its positions are unfolded, and unfold is missing";
    if (what)
        return pk__fail(context, PK_ARGUMENT, "the operation %s: %s", operation->name, what);
    if (outer && (!pk__multiply(node->fan_in, node->fan_out, &matrix) ||
                  !pk__multiply(node->positions, node->fan_in, &ins) ||
                  !pk__multiply(node->positions, node->fan_out, &outs) || outs != node->width ||
                  (!node->unfolds && ins != width) ||
                  (node->weight_count != matrix && node->weight_count - matrix != node->fan_out)))
        return pk__fail(
            context, PK_SHAPE,
            "the operation %s: %zu positions of %zu inputs and %zu outputs each do not fit its %zu inputs, "
            "%zu outputs and %zu weights",
            operation->name, node->positions, node->fan_in, node->fan_out, width, node->width,
            node->weight_count);
    return PK_OK;
}

/* Room for the blocks and uses of one node more. */
static pk_status pk__graph_grow_blocks(pk_context *context, pk_graph *graph)
{
    const size_t needed = graph->use_count + PK_NODE_TENSORS,
                 capacity = pk__max(2 * graph->tensor_capacity, 16);
    pk_weight_block *blocks = NULL;
    pk_weight_use *uses = NULL;
    if (needed <= graph->tensor_capacity)
        return PK_OK;
    pk_status status = pk_allocate(context, capacity, sizeof *blocks, "the graph's weight blocks", &blocks);
    if (!status)
        status = pk_allocate(context, capacity, sizeof *uses, "the uses of weight blocks", &uses);
    if (status) {
        pk_release(context, blocks);
        return status;
    }
    if (graph->use_count) {
        memcpy(blocks, graph->blocks, graph->block_count * sizeof *blocks);
        memcpy(uses, graph->uses, graph->use_count * sizeof *uses);
        for (size_t b = 0; b < graph->block_count; b++)
            blocks[b].uses = uses + (graph->blocks[b].uses - graph->uses);
    }
    pk_release(context, graph->blocks);
    pk_release(context, graph->uses);
    graph->blocks = blocks;
    graph->uses = uses;
    graph->tensor_capacity = capacity;
    return PK_OK;
}

static pk_status pk__graph_grow(pk_context *context, pk_graph *graph)
{
    pk_status status = pk__graph_grow_blocks(context, graph);
    if (status || graph->node_count < graph->node_capacity)
        return status;
    size_t capacity = graph->node_capacity ? 2 * graph->node_capacity : 16;
    pk_node *nodes = NULL;
    status = pk_allocate(context, capacity, sizeof *nodes, "the graph's nodes", &nodes);
    if (status)
        return status;
    if (graph->node_count)
        memcpy(nodes, graph->nodes, graph->node_count * sizeof *nodes);
    pk_release(context, graph->nodes);
    graph->nodes = nodes;
    graph->node_capacity = capacity;
    return PK_OK;
}

PK_API pk_status pk_graph_input(pk_context *context, pk_graph *graph, const pk_shape *shape)
{
    size_t width = 0;
    pk_status status = pk__shape_width(context, shape, &width);
    if (status)
        return status;
    if (graph->node_count)
        return pk__fail(context, PK_ARGUMENT, "the graph has an input already");
    status = pk__graph_grow(context, graph);
    if (status)
        return status;
    pk_node *node = &graph->nodes[0];
    memset(node, 0, sizeof *node);
    node->shape = *shape;
    node->width = width;
    node->layer = -1;
    node->input_constant = 1;
    graph->node_count = 1;
    graph->input_width = width;
    graph->input_shape = *shape;
    pk__graph_analyse(graph);
    return PK_OK;
}

/* The index of a word in a list of words that are separated by blanks, or -1. */
PK__PRIVATE int pk__word_index(const char *list, const char *word)
{
    const size_t length = strlen(word);
    for (int index = 0; *list; index++) {
        const size_t own = strcspn(list, " ");
        if (own == length && memcmp(list, word, own) == 0)
            return index;
        list += own + (list[own] == ' ');
    }
    return -1;
}

/* Whether attributes are in the options' ranges. */
PK__PRIVATE pk_status pk__check_attributes(pk_context *context, const char *name, const pk_option *options,
                                           const double *attributes)
{
    for (const pk_option *option = options; option && option->name; option++) {
        const int count = option->kind == PK_OPTION_PAIR ? 2 : 1;
        for (int i = 0; i < count && option->kind != PK_OPTION_FLAG; i++) {
            const double value = attributes[option->attribute + i];
            if (option->kind == PK_OPTION_CHOICE ? value >= 0 && value < 64 && value == floor(value)
                                                 : value >= option->least && value <= option->most &&
                                                       (!option->whole || value == floor(value)))
                continue;
            if (option->kind != PK_OPTION_CHOICE && option->most >= DBL_MAX)
                return pk__fail(context, PK_ARGUMENT, "%s: %s is %g; a number %s is possible", name,
                                option->name, value,
                                option->least > 0   ? "above 0"
                                : option->least < 0 ? "that is finite"
                                                    : "from 0 on");
            return pk__fail(context, PK_ARGUMENT, "%s: %s is %g; a %snumber from %g to %g is possible", name,
                            option->name, value, option->whole ? "whole " : "", option->least, option->most);
        }
    }
    return PK_OK;
}

/* Whether a node has the operation, attributes and input shape of an earlier one, and with them its shape. */
static int pk__is_alike(const pk_graph *graph, const pk_node *node, const pk_node *like)
{
    if (!like || like->operation != node->operation || like->input_count != 1 || node->input_count != 1 ||
        memcmp(like->attributes, node->attributes, sizeof like->attributes) != 0)
        return 0;
    const pk_shape *a = &graph->nodes[node->inputs[0]].shape, *b = &graph->nodes[like->inputs[0]].shape;
    return a->rank == b->rank && memcmp(a->dims, b->dims, (size_t)a->rank * sizeof *a->dims) == 0;
}

/* Declares the next tensor of a node. */
PK__PRIVATE void pk__node_tensor(pk_node *node, int rank, size_t first, size_t second)
{
    pk_shape *shape = &node->tensors[node->tensor_count++].shape;
    shape->rank = rank;
    shape->dims[0] = first;
    shape->dims[1] = second;
}

/* Lays out the tensors of a node with weights; those that its shape rule did not declare are the usual ones. */
static pk_status pk__node_tensors(pk_context *context, pk_node *node)
{
    const char *name = node->operation->name;
    const size_t matrix = node->fan_out * node->fan_in;
    size_t first = 0;
    if (!node->weight_count)
        return PK_OK;
    if (!node->tensor_count && matrix &&
        (node->weight_count == matrix || node->weight_count - matrix == node->fan_out)) {
        pk__node_tensor(node, 2, node->fan_out, node->fan_in);
        if (node->weight_count > matrix)
            pk__node_tensor(node, 1, node->fan_out, 0);
    }
    if (!node->tensor_count)
        pk__node_tensor(node, 1, node->weight_count, 0);
    if (node->tensor_count < 0 || node->tensor_count > PK_NODE_TENSORS)
        return pk__fail(context, PK_ARGUMENT, "the operation %s: %d parameter tensors; 1 to %d are possible",
                        name, node->tensor_count, PK_NODE_TENSORS);
    for (int t = 0; t < node->tensor_count; t++) {
        pk_parameter_tensor *tensor = &node->tensors[t];
        pk_status status = pk__shape_width(context, &tensor->shape, &tensor->count);
        if (status)
            return status;
        tensor->first = first;
        first += tensor->count;
    }
    return first == node->weight_count
               ? PK_OK
               : pk__fail(context, PK_SHAPE,
                          "the operation %s: its parameter tensors have %zu numbers, it has %zu weights", name,
                          first, node->weight_count);
}

/* The weight block of a node's tensor. */
PK__PRIVATE const pk_weight_block *pk__block_of(const pk_graph *graph, const pk_node *node, int tensor)
{
    return &graph->blocks[node->tensors[tensor].block];
}

/* pk_graph_add_constants without pk__graph_analyse and pk__graph_list, whose cost grows with the graph. like: NULL, or an
 * earlier node with the same constants, which are shared then. */
PK__PRIVATE pk_status pk__graph_append(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                       int input_count, const int *inputs, const double *attributes,
                                       size_t constant_count, const pk_real *constants, const pk_node *like,
                                       int *number)
{
    if (!graph->node_count || !operation)
        return pk__fail(context, PK_ARGUMENT,
                        graph->node_count ? "no operation given" : "the graph has no input yet");
    if (input_count < 1 || input_count > PK_NODE_INPUTS)
        return pk__fail(context, PK_ARGUMENT, "%s has %d inputs; 1 to %d are possible", operation->name,
                        input_count, PK_NODE_INPUTS);
    pk_node node;
    memset(&node, 0, sizeof node);
    node.operation = operation;
    node.input_count = input_count;
    node.layer = -1;
    node.tangent_form = operation->tangent_form;
    node.unfolds = operation->unfold != NULL;
    node.constants = constant_count ? (pk_real *)constants : NULL; /* only read, until it is copied */
    node.constant_count = constant_count;
    memcpy(node.attributes, attributes ? attributes : operation->defaults, sizeof node.attributes);
    for (int j = 0; j < input_count; j++) {
        if (inputs[j] < 0 || (size_t)inputs[j] >= graph->node_count)
            return pk__fail(context, PK_ARGUMENT, "%s: input %d is node %d of a graph with %zu nodes",
                            operation->name, j, inputs[j], graph->node_count);
        node.inputs[j] = inputs[j];
    }
    pk_status status = pk__check_attributes(context, operation->name, operation->options, node.attributes);
    node.shape = graph->nodes[node.inputs[0]].shape;
    node.constants_shared = like != NULL;
    if (!status && pk__is_alike(graph, &node, like))
        node.shape = like->shape;
    else if (!status && operation->shape)
        status = operation->shape(context, graph, &node);
    if (!status)
        status = pk__shape_width(context, &node.shape, &node.width);
    node.unfolds &= node.tangent_form == PK_TANGENT_OUTER;
    if (node.tangent_form == PK_TANGENT_OUTER && !node.positions) {
        node.positions = 1;
        node.fan_in = graph->nodes[node.inputs[0]].width;
        node.fan_out = node.width;
    }
    if (!status)
        status = pk__check_node(context, graph, &node);
    if (!status && node.weight_count > SIZE_MAX / 4096 - graph->untied)
        status = pk__fail(context, PK_OVERFLOW, "%s: the number of parameters overflows", operation->name);
    if (!status)
        status = pk__node_tensors(context, &node);
    if (!status)
        status = pk__graph_grow(context, graph);
    if (!status && constant_count && !like) {
        status = pk_allocate(context, constant_count, sizeof *constants, "a node's constants", &node.constants);
        if (!status)
            memcpy(node.constants, constants, constant_count * sizeof *constants);
    }
    if (status)
        return status;
    if (node.weight_count) {
        node.layer = (int)graph->layers++;
        node.weight_offset = graph->untied;
        graph->untied += node.weight_count;
        graph->use_count += (size_t)node.tensor_count;
    }
    pk__node_analyse(graph, &node);
    if (number)
        *number = (int)graph->node_count;
    graph->nodes[graph->node_count++] = node;
    return PK_OK;
}

/* Lists the weight blocks and their uses, from the tensors of the nodes and their ties; there is room for them. */
PK__PRIVATE void pk__graph_list(pk_graph *graph)
{
    graph->parameters = graph->columns = graph->block_count = 0;
    for (size_t n = 1; n < graph->node_count; n++) {
        const size_t before = graph->block_count;
        for (int t = 0; t < graph->nodes[n].tensor_count; t++) {
            pk_parameter_tensor *tensor = &graph->nodes[n].tensors[t];
            if (tensor->tied) {
                tensor->block = graph->nodes[tensor->tied].tensors[t].block;
                graph->blocks[tensor->block].use_count++;
                continue;
            }
            pk_weight_block *block = &graph->blocks[tensor->block = graph->block_count++];
            block->first = graph->parameters;
            block->count = tensor->count;
            block->shape = tensor->shape;
            block->column = (int)graph->columns;
            block->use_count = 1;
            graph->parameters += tensor->count;
        }
        graph->columns += graph->block_count > before;
    }
    graph->tied = graph->block_count < graph->use_count;
    pk_weight_use *next = graph->uses;
    for (size_t b = 0; b < graph->block_count; b++) {
        graph->blocks[b].uses = next;
        next += graph->blocks[b].use_count;
        graph->blocks[b].use_count = 0; /* counts up again */
    }
    for (size_t n = 1; n < graph->node_count; n++)
        for (int t = 0; t < graph->nodes[n].tensor_count; t++) {
            pk_weight_block *block = &graph->blocks[graph->nodes[n].tensors[t].block];
            const pk_weight_use use = {(int)n, t};
            block->uses[block->use_count++] = use;
        }
    for (size_t n = 1; n < graph->node_count; n++) {
        pk_node *node = &graph->nodes[n];
        node->shares = 0;
        for (int t = 0; t < node->tensor_count; t++)
            node->shares |= pk__block_of(graph, node, t)->use_count > 1;
    }
}

PK_API pk_status pk_graph_add_constants(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                        int input_count, const int *inputs, const double *attributes,
                                        size_t constant_count, const pk_real *constants, int *number)
{
    pk_status status = pk__graph_append(context, graph, operation, input_count, inputs, attributes,
                                        constant_count, constants, NULL, number);
    if (status)
        return status;
    pk__graph_list(graph);
    pk__graph_analyse(graph);
    return PK_OK;
}

PK_API pk_status pk_graph_add(pk_context *context, pk_graph *graph, const pk_operation *operation,
                              int input_count, const int *inputs, const double *attributes, int *number)
{
    return pk_graph_add_constants(context, graph, operation, input_count, inputs, attributes, 0, NULL, number);
}

/* pk_graph_tie without the list of blocks; messages call the node `name`. */
PK__PRIVATE pk_status pk__tie(pk_context *context, pk_graph *graph, int number, int tensor, int other,
                              int transposed, const char *name)
{
    static const char *const words[PK_NODE_TENSORS] = {"weight", "bias", "third tensor", "fourth tensor"};
    char own[PK_SHAPE_TEXT], its[PK_SHAPE_TEXT];
    if (tensor < 0 || tensor >= PK_NODE_TENSORS || other < 1 || other >= number ||
        (size_t)number + 1 > graph->node_count)
        return pk__fail(context, PK_ARGUMENT,
                        "node %d of %zu cannot share tensor %d of node %d: an earlier node's "
                        "weight (0) or bias (1) can be shared",
                        number, graph->node_count, tensor, other);
    pk_node *node = &graph->nodes[number];
    const pk_node *owner = &graph->nodes[other];
    if (tensor >= node->tensor_count || tensor >= owner->tensor_count)
        return pk__fail(context, PK_ARGUMENT, "%s: %s has no %s to share", name,
                        tensor < node->tensor_count ? owner->operation->name : node->operation->name,
                        words[tensor]);
    const pk_parameter_tensor *to = &owner->tensors[tensor];
    const pk_shape *a = &node->tensors[tensor].shape, *b = &to->shape;
    if (transposed && (a->rank != 2 || b->rank != 2))
        return pk__fail(context, PK_SHAPE, "%s: a %s of shape %s has no transpose: only matrices have", name,
                        words[tensor], pk_shape_text(b, its));
    int same = a->rank == b->rank;
    for (int i = 0; same && i < a->rank; i++)
        same = a->dims[i] == b->dims[transposed ? 1 - i : i];
    if (!same)
        return pk__fail(context, PK_SHAPE,
                        "%s: its %s has the shape %s, that of the %s which it shares is %s%s", name,
                        words[tensor], pk_shape_text(a, own), owner->operation->name, pk_shape_text(b, its),
                        transposed ? ", and transposed they must agree" : "");
    node->tensors[tensor].tied = to->tied ? to->tied : other;
    node->tensors[tensor].transposed = transposed ^ to->transposed;
    return PK_OK;
}

PK_API pk_status pk_graph_tie(pk_context *context, pk_graph *graph, int node, int tensor, int other,
                              int transposed)
{
    if (!graph || !graph->node_count || (size_t)node + 1 != graph->node_count || graph->nodes[node].layer < 0)
        return pk__fail(context, PK_ARGUMENT, "only the node that was added last, with weights, can be tied");
    if (tensor >= 0 && tensor < PK_NODE_TENSORS && graph->nodes[node].tensors[tensor].tied)
        return pk__fail(context, PK_ARGUMENT, "node %d is tied already", node);
    pk_status status =
        pk__tie(context, graph, node, tensor, other, transposed != 0, graph->nodes[node].operation->name);
    if (!status)
        pk__graph_list(graph);
    return status;
}

PK_API void pk_graph_untie(const pk_graph *graph, const pk_real *flat, pk_real *untied)
{
    if (!graph->tied && graph->untied)
        memcpy(untied, flat, graph->untied * sizeof *untied);
    for (size_t b = 0; graph->tied && b < graph->block_count; b++)
        for (size_t u = 0; u < graph->blocks[b].use_count; u++) {
            const pk_node *node = &graph->nodes[graph->blocks[b].uses[u].node];
            const pk_parameter_tensor *tensor = &node->tensors[graph->blocks[b].uses[u].tensor];
            const pk_real *from = flat + graph->blocks[b].first;
            pk_real *to = untied + node->weight_offset + tensor->first;
            const size_t rows = tensor->transposed ? tensor->shape.dims[0] : 0, cols = tensor->shape.dims[1];
            if (!rows)
                memcpy(to, from, tensor->count * sizeof *to);
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c++)
                    to[r * cols + c] = from[c * rows + r];
        }
}

/* Works in place: a block begins in flat no later than its first use in untied, and blocks come in the order of their first
 * uses, so that nothing is overwritten before it is read. */
PK_API void pk_graph_gather(const pk_graph *graph, const pk_real *untied, pk_real *flat)
{
    if (!graph->tied && graph->untied && flat != untied)
        memcpy(flat, untied, graph->untied * sizeof *untied);
    for (size_t b = 0; graph->tied && b < graph->block_count; b++)
        for (size_t u = 0; u < graph->blocks[b].use_count; u++) {
            const pk_node *node = &graph->nodes[graph->blocks[b].uses[u].node];
            const pk_parameter_tensor *tensor = &node->tensors[graph->blocks[b].uses[u].tensor];
            const pk_real *from = untied + node->weight_offset + tensor->first;
            pk_real *to = flat + graph->blocks[b].first;
            const size_t rows = tensor->transposed ? tensor->shape.dims[0] : 0, cols = tensor->shape.dims[1];
            if (!u)
                memmove(to, from, tensor->count * sizeof *to);
            for (size_t i = 0; u && !rows && i < tensor->count; i++)
                to[i] += from[i];
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c++)
                    to[c * rows + r] += from[r * cols + c];
        }
}

PK_API pk_status pk_graph_check_inputs(pk_context *context, const pk_graph *graph, size_t row,
                                       const pk_real *inputs)
{
    for (size_t n = 1; graph->checked && n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        int data = 0;
        for (int j = 0; j < node->input_count; j++)
            data |= node->inputs[j] == 0;
        if (!node->operation->check || !data)
            continue;
        pk_status status = node->operation->check(context, node, row, inputs);
        if (status)
            return status;
    }
    return PK_OK;
}

PK_API const pk_node *pk_graph_layer(const pk_graph *graph, size_t layer)
{
    return layer < graph->layers ? &graph->nodes[graph->nodes[layer].layer_node] : NULL;
}

PK_API void pk_graph_release(pk_context *context, pk_graph *graph)
{
    for (size_t n = 0; n < graph->node_count; n++)
        if (!graph->nodes[n].constants_shared)
            pk_release(context, graph->nodes[n].constants);
    pk_release(context, graph->nodes);
    pk_release(context, graph->text);
    pk_release(context, graph->blocks);
    pk_release(context, graph->uses);
    memset(graph, 0, sizeof *graph);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
