/* pathkernel/features/sums.h: the sums over the points of a step, layer by layer: of cotangents, of inputs or of Phi,
 * depending on the kind of the layer (layers.h), and the products of Phi with given directions.
 *
 * All points of a part are in memory together, with the values and the cotangents of every layer (integral.h). The
 * products < Phi, direction >, of which a step's closure, unattributed part and decay consist, need no Phi: for a layer
 * that is multiplied point by point they are the sum over the points of w_p delta_p . F(direction, a_p), where F is what
 * the layer computes with the direction as its weights.
 */
#ifndef PATHKERNEL_SUMS_H
#define PATHKERNEL_SUMS_H
#include "layers.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SUMS_IMPLEMENTED)
#define PATHKERNEL_SUMS_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* F(direction, a) of every row for a layer on data, if the path has computed it already; else NULL. */
static const pk_real *pk__known_product(const pk__integral *integral, size_t layer, const pk_real *direction)
{
    const pk__path *segment = &integral->integrator.path;
    const size_t node = (size_t)(integral->layer[layer].node - integral->graph->nodes);
    if (integral->layer[layer].kind != PK__LAYER_DATA)
        return NULL;
    return direction == segment->direction ? segment->slope[node]
           : direction == segment->weights ? segment->base[node]
                                           : NULL;
}

/* pk__pass_transpose of a direction, if it has been computed already; else NULL. */
static const pk_real *pk__known_transposed(const pk__integral *integral, const pk_real *direction)
{
    const pk__path *segment = &integral->integrator.path;
    const pk_real *transposed = segment->tape.transposed;
    return !transposed                       ? NULL
           : direction == segment->weights   ? transposed
           : direction == segment->direction ? transposed + integral->graph->untied
                                             : NULL;
}

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p) for the points of one layer; with row == NULL for its rows. */
PK__PRIVATE void pk__add_along(pk__integral *integral, size_t layer, size_t count, const size_t *row,
                               const pk_real *weight, const pk_real *input, const pk_real *delta,
                               const pk_real *bias_scale)
{
    const pk_node *node = integral->layer[layer].node;
    const size_t out = node->width, in = node->fan_in, outputs = integral->outputs;
    for (int v = 0; v < PK__DIRECTIONS; v++) {
        if (!integral->directions[v])
            continue;
        const pk_real *direction = integral->directions[v] + node->weight_offset;
        const pk_real *product = pk__known_product(integral, layer, integral->directions[v]);
        if (!product) {
            pk_real *to = integral->scratch;
            pk__layer_product(node, count, input, integral->directions[v],
                              pk__known_transposed(integral, integral->directions[v]), 0, to);
            for (size_t p = 0; pk__has_bias(node) && p < count; p++)
                for (size_t j = 0; j < out; j++)
                    to[p * out + j] += (bias_scale ? bias_scale[p] : 1) * direction[out * in + j];
            product = to;
        }
        for (size_t p = 0; p < count; p++)
            pk__dots(outputs, out, delta + p * outputs * out, product + p * out, weight ? weight[p] : 1,
                     integral->along[v] + (row ? row[p] : p) * outputs);
    }
}

/* phi = (fresh) or += (not fresh) sum_p w_p delta_p (x) a_p over `count` points of one row, for the chosen outputs. */
static void pk__add_outer(pk__integral *integral, const pk_node *node, size_t count, const pk_real *weight,
                          const pk_real *a, const pk_real *delta, int fresh, pk_real *phi)
{
    size_t out = node->width, in = node->fan_in, outputs = integral->outputs;
    const size_t chosen = integral->output_count;
    delta += integral->first_output * out;
    /* The inputs are weighted, so that one product is enough for a unit of outputs. */
    for (size_t p = 0; p < count; p++)
        for (size_t j = 0; j < in; j++)
            integral->weighted[p * in + j] = weight[p] * a[p * in + j];
    for (size_t k = 0; k < chosen; k += integral->unit)
        pk__gemm(1, 0, pk__min(integral->unit, chosen - k) * out, in, count, 1, delta + k * out, outputs * out,
                 integral->weighted, in, !fresh, phi + k * out * in, in);
    if (pk__has_bias(node)) {
        pk_real *bias = phi + chosen * out * in;
        if (fresh)
            memset(bias, 0, chosen * out * sizeof *bias);
        for (size_t p = 0; p < count; p++)
            for (size_t j = 0; j < chosen * out; j++)
                bias[j] += weight[p] * delta[p * outputs * out + j];
    }
}

/* Computes Phi of one row from its points [first, last), and what bounds its error. */
static void pk__add_phi(pk__integral *integral, size_t layer, const pk__points *points, size_t first,
                        size_t last)
{
    const pk_node *node = integral->layer[layer].node;
    const pk__tape *tape = &integral->integrator.path.tape;
    size_t out = node->width, in = node->fan_in, outputs = integral->outputs;
    size_t count = last - first, at = points->row[first] * integral->output_capacity * node->weight_count;
    const int fresh = !integral->begun[points->row[first]];
    pk_real *a = tape->value[node->inputs[0]] + first * in;
    pk_real *delta = tape->cotangent[node - integral->graph->nodes] + first * outputs * out;
    pk__add_outer(integral, node, count, points->weight + first, a, delta, fresh,
                  integral->layer[layer].phi + at);
    if (!integral->bounds)
        return;
    pk__add_outer(integral, node, count, points->check + first, a, delta, fresh,
                  integral->layer[layer].check + at);
    /* Sums of absolute values of the factors, weighted by the rounding allowance and by the uncertainty of the kinks. */
    pk_real *sizes = integral->scratch, *weight = integral->sorted.slack;
    for (size_t p = 0; p < count; p++)
        weight[p] = (pk_real)(integral->allowance * fabs(points->weight[first + p]) + points->slack[first + p]);
    for (size_t i = 0; i < count * outputs * out; i++)
        sizes[i] = (pk_real)fabs(delta[i]);
    for (size_t i = 0; i < count * in; i++)
        integral->absolute[i] = (pk_real)fabs(a[i]);
    pk__add_outer(integral, node, count, weight, integral->absolute, sizes, fresh,
                  integral->layer[layer].size + at);
}

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p), for any layer that is linear in its weights. */
PK__PRIVATE void pk__add_along_places(pk__integral *integral, size_t layer, const pk__points *points)
{
    const pk_node *node = integral->layer[layer].node;
    const pk__tape *tape = &integral->integrator.path.tape;
    const size_t outputs = integral->outputs, width = node->width;
    const pk_real *delta = tape->cotangent[node - integral->graph->nodes];
    pk_call call;
    pk__pass_call(tape, node, points->count, 1, &call);
    call.out = integral->scratch;
    for (int v = 0; v < PK__DIRECTIONS; v++) {
        if (!integral->directions[v])
            continue;
        call.weights = integral->directions[v] + node->weight_offset;
        node->operation->forward(&call);
        for (size_t p = 0; p < points->count; p++)
            pk__dots(outputs, width, delta + p * outputs * width, call.out + p * width, points->weight[p],
                     integral->along[v] + points->row[p] * outputs);
    }
}

/* Computes Phi of a layer used at several places: for a few points at a time, one product over all their places. */
static void pk__add_rows_places(pk__integral *integral, size_t layer, const pk__points *points)
{
    const pk_node *node = integral->layer[layer].node;
    const size_t outputs = integral->outputs, weights = node->weight_count, in = node->fan_in,
                 out = node->fan_out, positions = node->positions, most = pk__place_points(node, outputs);
    for (size_t p = 0, last; p < points->count; p = last) {
        last = pk__min(pk__row_end(points, p), p + most);
        const size_t pairs = (last - p) * positions;
        pk_real *places = integral->places, *deltas = places + pairs * in;
        for (size_t i = p; i < last; i++) {
            pk_real *own = places + (i - p) * positions * in;
            pk__node_places(&integral->integrator.path.tape, node, i, outputs, own,
                            deltas + (i - p) * positions * outputs * out);
            for (size_t j = 0; j < positions * outputs * out; j++)
                deltas[(i - p) * positions * outputs * out + j] *= points->weight[i];
        }
        for (size_t chosen = 0; chosen < integral->output_count; chosen++) {
            const pk_real *delta = deltas + (integral->first_output + chosen) * out;
            pk_real *phi =
                integral->layer[layer].phi + (points->row[p] * integral->output_capacity + chosen) * weights;
            pk__gemm(1, 0, out, in, pairs, 1, delta, outputs * out, places, in, 1, phi, in);
            for (size_t i = 0; weights > out * in && i < pairs; i++)
                for (size_t j = 0; j < out; j++)
                    phi[out * in + j] += delta[i * outputs * out + j];
        }
    }
}

/* Computes Phi of a layer whose gradients are materialized point by point. */
static void pk__add_rows(pk__integral *integral, size_t layer, const pk__points *points)
{
    const pk_node *node = integral->layer[layer].node;
    const pk__tape *tape = &integral->integrator.path.tape;
    size_t outputs = integral->outputs, weights = node->weight_count;
    if (node->tangent_form == PK_TANGENT_OUTER && !integral->bounds) {
        pk__add_rows_places(integral, layer, points);
        return;
    }
    for (size_t p = 0; p < points->count; p++) {
        const size_t at = points->row[p] * integral->output_capacity * weights;
        const pk_real weight = points->weight[p],
                      *gradient = integral->scratch + integral->first_output * weights;
        pk_call call;
        pk__pass_call(tape, node, 1, outputs, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += p * call.in_width[j];
        call.out += p * node->width;
        call.out_cotangent = tape->cotangent[node - integral->graph->nodes] + p * outputs * node->width;
        call.weights = pk__has_row_weights(node) ? pk__row_weights(tape, &tape->line, node, p)
                                                 : tape->line.weights + node->weight_offset;
        call.gradient = integral->scratch;
        pk__node_row_gradients(&call);
        for (size_t i = 0; i < integral->output_count * weights; i++)
            integral->layer[layer].phi[at + i] += weight * gradient[i];
        for (size_t i = 0; integral->bounds && i < integral->output_count * weights; i++) {
            integral->layer[layer].check[at + i] += points->check[p] * gradient[i];
            integral->layer[layer].size[at + i] +=
                (pk_real)((integral->allowance * fabs(weight) + points->slack[p]) * fabs(gradient[i]));
        }
    }
}

/* along[v][row, k] += < Phi, direction_v > for the chosen outputs of a layer by rows, after its Phi is complete. */
PK__PRIVATE void pk__add_along_rows(pk__integral *integral, size_t layer)
{
    const pk_node *node = integral->layer[layer].node;
    const size_t weights = node->weight_count, chosen = integral->output_count;
    for (int v = 0; v < PK__DIRECTIONS; v++)
        for (size_t row = 0; integral->directions[v] && row < integral->rows; row++)
            pk__dots(chosen, weights, integral->layer[layer].phi + row * integral->output_capacity * weights,
                     integral->directions[v] + node->weight_offset, 1,
                     integral->along[v] + row * integral->outputs + integral->first_output);
}

/* Sorts the points by row, because products over the points of a row need them side by side. The order within a row stays. */
PK__PRIVATE const pk__points *pk__sort_points(pk__integral *integral, const pk__points *points)
{
    int sorted = 1;
    for (size_t p = 1; p < points->count; p++)
        for (size_t q = 0; points->row[p] != points->row[p - 1] && q < p; q++)
            sorted &= points->row[q] != points->row[p];
    if (sorted)
        return points;
    pk__points *to = &integral->sorted;
    to->count = 0;
    to->last = points->last;
    to->means = points->means;
    for (size_t r = 0; r < integral->rows; r++)
        for (size_t p = 0; p < points->count; p++) {
            if (points->row[p] != r)
                continue;
            size_t at = to->count++;
            to->row[at] = r;
            to->t[at] = points->t[p];
            to->weight[at] = points->weight[p];
            to->from[at] = points->from[p];
            to->to[at] = points->to[p];
            if (points->check) {
                to->check[at] = points->check[p];
                to->slack[at] = points->slack[p];
            }
        }
    return to;
}

/* Adds to the sums of a layer whose input or cotangent does not change: sum_p w_p delta_p, or delta and sum_p w_p a_p. */
static void pk__add_ends(pk__integral *integral, size_t layer, const pk__points *points)
{
    const pk_node *node = integral->layer[layer].node;
    const pk__tape *tape = &integral->integrator.path.tape;
    const size_t cotangents = integral->outputs * node->width, in = node->fan_in;
    const pk_real *delta = tape->cotangent[node - integral->graph->nodes], *a = tape->value[node->inputs[0]];
    for (size_t p = 0; p < points->count; p++) {
        const pk_real weight = points->weight[p];
        pk_real *to = integral->layer[layer].delta + points->row[p] * cotangents;
        if (integral->layer[layer].kind == PK__LAYER_DATA) {
            for (size_t j = 0; j < cotangents; j++)
                to[j] += weight * delta[p * cotangents + j];
            continue;
        }
        memcpy(to, delta + p * cotangents, cotangents * sizeof *to);
        for (size_t j = 0; j < in; j++)
            integral->layer[layer].input[points->row[p] * in + j] += weight * a[p * in + j];
    }
}

/* Adds the points in memory to the sums of one layer. */
PK__PRIVATE void pk__add_points(pk__integral *integral, size_t layer, const pk__points *points)
{
    const double start = pk__seconds();
    if (integral->layer[layer].kind == PK__LAYER_DATA || integral->layer[layer].kind == PK__LAYER_LINEAR)
        pk__add_ends(integral, layer, points);
    else if (integral->layer[layer].kind == PK__LAYER_ROWS)
        pk__add_rows(integral, layer, points);
    for (size_t p = 0, last; integral->layer[layer].kind == PK__LAYER_POINTS && p < points->count; p = last) {
        last = pk__row_end(points, p);
        pk__add_phi(integral, layer, points, p, last);
    }
    integral->seconds += pk__seconds() - start;
}

PK__END_CODE
/* <<< implementation */
#endif
