/* pathkernel/kernels/nodes.h: tangent kernels of networks that are not a function of one row alone, and of networks whose
 * gradients are not derivatives: what they are, by name.
 *
 * A graph network takes all nodes of a graph as one row (`input NODESxFEATURES; propagate S; dense ...`) and gives outputs for
 * all of them: one row of pk_kernel_ntk with itself holds every pair of nodes.
 */
#ifndef PATHKERNEL_NODES_H
#define PATHKERNEL_NODES_H
#include "kernel.h"

/* >>> declarations */
PK__BEGIN_C

/* The tangent kernel between the n nodes (tokens) of the rows of x, through what joins them, `propagate` or attention, in one
 * pass: the network's outputs are n x K, K outputs of each node behind each other (a last `flatten` keeps that order), and
 *     gram[r n + i, q n + j] = sum_k < d f_ik(w, x_r)/dw, d f_jk(w, x_q)/dw >,      (rows n) x (rows n).
 * Memory: the kernel of all outputs, (rows n K)^2 numbers, and that of pk_kernel_ntk. PK_SHAPE: the outputs
 * are not those of n nodes; the statuses of pk_kernel_ntk. */
PK_API PK__MUST_USE pk_status pk_kernel_ntk_nodes(pk_context *context, const pk_graph *graph,
                                                  const pk_real *weights, pk_matrix x, size_t nodes,
                                                  pk_matrix gram);

/* What the functions of kernel.h compute for a network: "ntk", J J^T with the Jacobian J of the outputs; or "surrogate kernel",
 * S S^T, where an operation that depends on the weights has a surrogate S of the derivative (sign, step). The
 * Jacobian of such a network is 0 almost everywhere, and so is its tangent kernel: S S^T is neither that nor the limit below. */
PK_API const char *pk_tangent_kernel_name(const pk_graph *graph);

/* The slope factor of the surrogate gradient kernel of infinitely wide networks, true derivative on one side and surrogate on
 * the other (Eilers, Memmesheimer and Goedeke 2024, arXiv 2405.15539), for the activation erf(m x), which tends to sign, and
 * the surrogate erf(x): with (u, v) normal of variances p and q and covariance s,
 *     E[erf'(m u) erf'(v)] = (4 m / pi) / sqrt((1 + 2 m^2 p)(1 + 2 q) - 4 m^2 s^2);
 * m = INFINITY: that of sign. NAN unless p, q >= 0, s^2 <= p q and m > 0 (and p > 0 for sign). */
PK_API double pk_surrogate_slope(double m, double p, double s, double q);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_NODES_IMPLEMENTED)
#define PATHKERNEL_NODES_IMPLEMENTED
/* >>> implementation */
#include <math.h>
PK__BEGIN_COLD_CODE

PK_API pk_status pk_kernel_ntk_nodes(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix x, size_t nodes, pk_matrix gram)
{
    static const char name[] = "nodes";
    pk_status status = pk__sweep_graph(context, name, graph, weights);
    if (!status)
        status = pk__sweep_matrix(context, name, "inputs", x, x.rows, graph->input_width);
    if (status)
        return status;
    if (!nodes || graph->output_width % nodes)
        return pk__fail(context, PK_SHAPE,
                        "nodes: a network with %zu outputs has not as many for each of %zu nodes",
                        graph->output_width, nodes);
    const size_t K = graph->output_width / nodes;
    size_t rows = 0, all = 0, numbers = 0;
    if (!pk__multiply(x.rows, nodes, &rows) || !pk__multiply(rows, K, &all) ||
        !pk__multiply(all, all, &numbers))
        return pk__fail(context, PK_OVERFLOW, "nodes: %zu rows of %zu nodes overflow", x.rows, nodes);
    status = pk__sweep_matrix(context, name, "entries of the result", gram, rows, rows);
    pk_real *whole = NULL;
    if (!status)
        status = pk_allocate(context, numbers, sizeof *whole, "the kernel of the nodes", &whole);
    if (!status)
        status = pk_kernel_ntk(context, graph, weights, x, pk_matrix_view(NULL, 0, 0),
                               pk_matrix_view(whole, all, all));
    for (size_t i = 0; i < rows && (!status || status == PK_NOT_FINITE); i++)
        for (size_t j = 0; j < rows; j++) {
            double sum = 0;
            for (size_t k = 0; k < K; k++)
                sum += whole[(i * K + k) * all + j * K + k];
            gram.data[i * gram.ld + j] = (pk_real)sum;
        }
    pk_release(context, whole);
    return status;
}

PK_API const char *pk_tangent_kernel_name(const pk_graph *graph)
{
    return graph->surrogate ? "surrogate kernel" : "ntk";
}

PK_API double pk_surrogate_slope(double m, double p, double s, double q)
{
    if (!(m > 0 && p >= 0 && q >= 0 && s * s <= p * q * (1 + 1e-14)))
        return NAN;
    const double factor = 1.27323954473516268615; /* 4 / pi */
    if (m > 1e100)
        return p > 0 ? factor / sqrt(2 * p * (1 + 2 * q) - 4 * s * s) : NAN;
    return factor / sqrt((1 / (m * m) + 2 * p) * (1 + 2 * q) - 4 * s * s);
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
