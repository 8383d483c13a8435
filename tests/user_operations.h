/* Operations registered from outside, for the tests of graphs and of decompositions. */
#ifndef USER_OPERATIONS_H
#define USER_OPERATIONS_H
#include "fixture.h"

/* All take the shape of their first input. */
FIXTURE pk_status user_same_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context;
    node->shape = graph->nodes[node->inputs[0]].shape;
    return PK_OK;
}

FIXTURE pk_status user_scale_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    node->weight_count = graph->nodes[node->inputs[0]].width;
    return user_same_shape(context, graph, node);
}

FIXTURE void user_add(const pk_call *call, int j, size_t at, pk_real value)
{
    if (!call->in_cotangent[j])
        return;
    if (call->accumulate[j])
        call->in_cotangent[j][at] += value;
    else
        call->in_cotangent[j][at] = value;
}

/* y = sum_j x_j */
FIXTURE void user_sum_forward(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++) {
        pk_real sum = 0;
        for (int j = 0; j < call->node->input_count; j++)
            sum += call->in[j][i];
        call->out[i] = sum;
    }
}

FIXTURE void user_sum_tangent(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++) {
        pk_real sum = 0;
        for (int j = 0; j < call->node->input_count; j++)
            sum += call->in_tangent[j] ? call->in_tangent[j][i] : 0;
        call->out_tangent[i] = sum;
    }
}

FIXTURE void user_sum_reverse(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        for (size_t i = 0; i < call->rows * call->copies * call->node->width; i++)
            user_add(call, j, i, call->out_cotangent[i]);
}

/* y = x_0 x_1, elementwise */
FIXTURE void user_product_forward(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++)
        call->out[i] = call->in[0][i] * call->in[1][i];
}

FIXTURE void user_product_tangent(const pk_call *call)
{
    for (size_t i = 0; i < call->rows * call->node->width; i++)
        call->out_tangent[i] = (call->in_tangent[0] ? call->in_tangent[0][i] * call->in[1][i] : 0) +
                               (call->in_tangent[1] ? call->in_tangent[1][i] * call->in[0][i] : 0);
}

FIXTURE void user_product_reverse(const pk_call *call)
{
    const size_t width = call->node->width;
    for (int j = 0; j < 2; j++)
        for (size_t i = 0; i < call->rows * call->copies * width; i++)
            user_add(call, j, i,
                     call->out_cotangent[i] * call->in[1 - j][i / (call->copies * width) * width + i % width]);
}

/* y = w o x: linear in its weights. y = exp(w) o x: not. */
FIXTURE pk_real user_factor(const pk_call *call, pk_real w)
{
    return call->node->operation->linear_in_weights ? w : exp(w);
}

FIXTURE pk_real user_factor_slope(const pk_call *call, pk_real w)
{
    return call->node->operation->linear_in_weights ? 1 : exp(w);
}

FIXTURE void user_scale_forward(const pk_call *call)
{
    const size_t width = call->node->width;
    for (size_t i = 0; i < call->rows * width; i++)
        call->out[i] = user_factor(call, call->weights[i % width]) * call->in[0][i];
}

FIXTURE void user_scale_tangent(const pk_call *call)
{
    const size_t width = call->node->width;
    for (size_t i = 0; i < call->rows * width; i++) {
        const pk_real w = call->weights[i % width];
        pk_real sum = call->in_tangent[0] ? user_factor(call, w) * call->in_tangent[0][i] : 0;
        if (call->direction)
            sum += user_factor_slope(call, w) * call->direction[i % width] * call->in[0][i];
        call->out_tangent[i] = sum;
    }
}

FIXTURE void user_scale_reverse(const pk_call *call)
{
    const size_t width = call->node->width;
    for (size_t i = 0; i < call->rows * call->copies * width; i++)
        user_add(call, 0, i, call->out_cotangent[i] * user_factor(call, call->weights[i % width]));
}

FIXTURE void user_scale_rows(const pk_call *call)
{
    const size_t width = call->node->width;
    for (size_t row = 0; row < call->rows; row++)
        for (size_t i = 0; i < call->copies * width; i++) {
            const size_t at = row * call->copies * width + i;
            const pk_real slope = user_factor_slope(call, call->weights[i % width]);
            call->gradient[at] = call->out_cotangent[at] * slope * call->in[0][row * width + i % width];
        }
}

FIXTURE void user_scale_gradient(const pk_call *call)
{
    const size_t width = call->node->width;
    for (size_t i = 0; i < call->rows * width; i++) {
        const pk_real slope = user_factor_slope(call, call->weights[i % width]);
        call->gradient[i % width] += call->out_cotangent[i] * slope * call->in[0][i];
    }
}

/* Dense with its gradients materialized row by row. */
FIXTURE void user_dense_rows(const pk_call *call)
{
    const size_t out = call->node->width, in = call->in_width[0], weights = call->node->weight_count;
    for (size_t r = 0; r < call->rows * call->copies; r++) {
        pk_real *to = call->gradient + r * weights;
        const pk_real *delta = call->out_cotangent + r * out, *a = call->in[0] + r / call->copies * in;
        for (size_t j = 0; j < out; j++)
            for (size_t k = 0; k < in; k++)
                to[j * in + k] = delta[j] * a[k];
        for (size_t j = 0; weights > out * in && j < out; j++)
            to[out * in + j] = delta[j];
    }
}

/* Dense whose bias is no attribute of the node: the built-in one behind a node that has it. */
FIXTURE void user_own_dense(const pk_call *call, void (*rule)(const pk_call *))
{
    pk_node node = *call->node;
    pk_call own = *call;
    node.attributes[1] = 1;
    own.node = &node;
    rule(&own);
}
FIXTURE void user_own_forward(const pk_call *call)
{
    user_own_dense(call, pk_operation_find("dense")->forward);
}
FIXTURE void user_own_tangent(const pk_call *call)
{
    user_own_dense(call, pk_operation_find("dense")->tangent);
}
FIXTURE void user_own_reverse(const pk_call *call)
{
    user_own_dense(call, pk_operation_find("dense")->reverse);
}
FIXTURE void user_own_gradient(const pk_call *call)
{
    user_own_dense(call, pk_operation_find("dense")->weight_gradient);
}
FIXTURE pk_status user_own_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    node->attributes[1] = 1;
    pk_status status = pk_operation_find("dense")->shape(context, graph, node);
    node->attributes[1] = 0;
    return status;
}

typedef struct user_operations {
    pk_operation sum, product, scale, power, dense_rows, own_dense;
} user_operations;

FIXTURE void user_fill(user_operations *all)
{
    memset(all, 0, sizeof *all);
    all->sum.name = "sum";
    all->sum.smoothness = PK_LINEAR;
    all->sum.tangent_form = PK_TANGENT_NONE;
    all->sum.linear_in_weights = 1;
    all->sum.shape = user_same_shape;
    all->sum.forward = user_sum_forward;
    all->sum.tangent = user_sum_tangent;
    all->sum.reverse = user_sum_reverse;
    all->product = all->sum;
    all->product.name = "product";
    all->product.smoothness = PK_SMOOTH;
    all->product.forward = user_product_forward;
    all->product.tangent = user_product_tangent;
    all->product.reverse = user_product_reverse;
    all->scale.name = "scale";
    all->scale.smoothness = PK_LINEAR;
    all->scale.tangent_form = PK_TANGENT_ROWS;
    all->scale.linear_in_weights = 1;
    all->scale.shape = user_scale_shape;
    all->scale.forward = user_scale_forward;
    all->scale.tangent = user_scale_tangent;
    all->scale.reverse = user_scale_reverse;
    all->scale.weight_gradient = user_scale_gradient;
    all->scale.row_gradients = user_scale_rows;
    all->power = all->scale;
    all->power.name = "power";
    all->power.linear_in_weights = 0;
    all->dense_rows = *pk_operation_find("dense");
    all->dense_rows.name = "dense_rows";
    all->dense_rows.tangent_form = PK_TANGENT_ROWS;
    all->dense_rows.row_gradients = user_dense_rows;
    all->own_dense = *pk_operation_find("dense");
    all->own_dense.name = "own_dense";
    all->own_dense.shape = user_own_shape;
    all->own_dense.forward = user_own_forward;
    all->own_dense.tangent = user_own_tangent;
    all->own_dense.reverse = user_own_reverse;
    all->own_dense.weight_gradient = user_own_gradient;
}

/* Adds operation(a [, b]), -1: none; width for a dense one. */
FIXTURE int user_node(pk_context *context, pk_graph *graph, const pk_operation *operation, int a, int b,
                      size_t width)
{
    const int inputs[2] = {a, b};
    double attributes[PK_NODE_ATTRIBUTES];
    int node = -1;
    memcpy(attributes, operation->defaults, sizeof attributes);
    if (width) {
        attributes[0] = (double)width;
        attributes[1] = strcmp(operation->name, "own_dense") != 0;
    }
    assert_ok(context, pk_graph_add(context, graph, operation, b < 0 ? 1 : 2, inputs, attributes, &node));
    return node;
}

FIXTURE void user_input(pk_context *context, pk_graph *graph, size_t width)
{
    pk_shape shape;
    memset(&shape, 0, sizeof shape);
    memset(graph, 0, sizeof *graph);
    shape.rank = 1;
    shape.dims[0] = width;
    assert_ok(context, pk_graph_input(context, graph, &shape));
}

/* A residual network: nodes used twice, by one operation and by several; with every user operation.
 * kinked: relu instead of tanh, no products and no powers, so that it stays piecewise linear. */
FIXTURE void user_residual(pk_context *context, const user_operations *all, size_t inputs, size_t outputs,
                           int kinked, pk_graph *graph)
{
    const pk_operation *dense = pk_operation_find("dense"), *act = pk_operation_find(kinked ? "relu" : "tanh");
    user_input(context, graph, inputs);
    int a = user_node(context, graph, dense, 0, -1, 4);
    int b = user_node(context, graph, act, a, -1, 0);
    int c = user_node(context, graph, &all->own_dense, b, -1, 4);
    int d = user_node(context, graph, &all->sum, c, b, 0); /* the skip */
    int e = user_node(context, graph, &all->sum, d, d, 0); /* one input twice */
    int f = user_node(context, graph, kinked ? &all->scale : &all->power, e, -1, 0);
    int g = user_node(context, graph, act, f, -1, 0);
    int h = user_node(context, graph, kinked ? &all->sum : &all->product, g, d, 0);
    int i = user_node(context, graph, &all->dense_rows, h, -1, 4);
    int j = user_node(context, graph, &all->sum, i, a, 0); /* a long skip */
    int k = user_node(context, graph, &all->scale, j, -1, 0);
    int l = user_node(context, graph, dense, 0, -1, 4); /* a second branch from the data */
    int m = user_node(context, graph, kinked ? &all->sum : &all->product, k, l, 0);
    (void)user_node(context, graph, dense, m, -1, outputs);
}

#endif
