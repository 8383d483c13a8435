/* pathkernel/features/cost.h: what an inner product of two gradients costs in each of its forms, in flops, from sizes alone. Every
 * choice between forms asks here: those of the decomposition (factors.h, layers.h) and those of Gram matrices (gram.h).
 *
 * A layer that is used at Q places has, for a row at one point of a step, the gradient sum_q d_q (x) a_q of each output; a
 * product of two of them is sum_qr (a_q . a_r + 1) (d_q . d_r). It is computed
 *   - factored: pair by pair of places, the products of inputs once for all outputs;
 *   - by rows: both gradients are formed, and multiplied number by number;
 *   - on the left: the left gradient is formed, summed over the points, and multiplied with the right one's factors;
 *   - outside: of the layer below the last one the left d_k = slope o (W + t D)^T seed_k: the sums over points of slopes and of t
 *     slopes are multiplied with W and D, so that outputs cost once a row;
 *   - by slopes: as outside, but both sides' outputs are the same and the products of equal outputs are summed: sum_k d_k .
 *     d'_k = slope . (sum_k W_k o W'_k o slope'), in which the outputs cost nothing.
 * A number of a tile that is multiplied with another one instead of being stored counts as PK__HADAMARD flops. It is measured, as
 * is that a gradient costs twice its flops to form, since it goes through memory.
 */
#ifndef PATHKERNEL_COST_H
#define PATHKERNEL_COST_H
#include "../network/graph.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_COST_INTERNALS_KNOWN)
#define PATHKERNEL_COST_INTERNALS_KNOWN
/* >>> internals */
typedef enum pk__product_form {
    PK__PRODUCT_FACTORED,
    PK__PRODUCT_BY_ROWS,
    PK__PRODUCT_ON_THE_LEFT,
    PK__PRODUCT_OUTSIDE,
    PK__PRODUCT_BY_SLOPES
} pk__product_form;

/* Of one row on the left, and one on the right. */
typedef struct pk__product_sizes {
    double left, right; /* outputs, all of which meet all of the other side */
    double summed;      /* outputs of which only equal ones meet, and are summed; else 1 */
    double points;      /* of a step, that the left row is taken at; the right one has one */
    double terms;       /* by slopes: 2 where W is at a t of its own for each row, else 1 */
    double
        formed; /* gradients that are formed for each pair of rows: 1 / rows + 1 / columns, or one of these */
} pk__product_sizes;

/* Flops for each pair of rows. */
PK__INTERNAL double pk__product_flops(pk__product_form form, const pk_node *node,
                                      const pk__product_sizes *sizes);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_COST_IMPLEMENTED)
#define PATHKERNEL_COST_IMPLEMENTED
/* >>> implementation */
PK__BEGIN_COLD_CODE

enum { PK__HADAMARD = 8 };

PK__INTERNAL double pk__product_flops(pk__product_form form, const pk_node *node,
                                      const pk__product_sizes *sizes)
{
    const double places = (double)node->positions, in = (double)node->fan_in, out = (double)node->fan_out,
                 width = (double)node->width, weights = (double)node->weight_count, points = sizes->points,
                 outputs = sizes->left * sizes->right;
    switch (form) {
    case PK__PRODUCT_FACTORED:
        return points * places * places * (2 * in + outputs * (2 * out * sizes->summed + PK__HADAMARD));
    case PK__PRODUCT_BY_ROWS:
        return sizes->summed *
               (2 * outputs * weights + 4 * sizes->formed * sizes->left * points * places * weights);
    case PK__PRODUCT_ON_THE_LEFT:
        return 3 * sizes->formed * sizes->left * points * width * in +
               outputs * width * (2 * in + PK__HADAMARD);
    case PK__PRODUCT_OUTSIDE: return points * (2 * in + 6 * width) + width * (4 * outputs + PK__HADAMARD);
    case PK__PRODUCT_BY_SLOPES: return points * (2 * in + 2 * sizes->terms * width + PK__HADAMARD);
    }
    return 0;
}

PK__END_COLD_CODE
/* <<< implementation */
#endif
