/* pathkernel/features/integral.h: tangent features integrated over a step: sums over the points of the quadrature, layer by
 * layer, and the integrated gradient Phi where it is wanted.
 */
#ifndef PATHKERNEL_INTEGRAL_H
#define PATHKERNEL_INTEGRAL_H
#include "product.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_INTEGRAL_INTERNALS_KNOWN)
#define PATHKERNEL_INTEGRAL_INTERNALS_KNOWN
/* >>> internals */
/* Integrates the step of the rows and sends the tiles of the factored layers. Phi of the layers for which
 * `engine` (and the cost model) chose to materialise stands in phi afterwards, see pk__integral_row_phi. transposed: as for
 * pk__path_begin. */
PK__INTERNAL void pk__integral_step(pk__integral *tangent, const pk_real *weights, const pk_real *direction,
                                    const pk_real *transposed, size_t first_row, size_t rows,
                                    const pk_real *inputs, pk_engine engine);
/* After pk__integral_step, of a graph with ties: Phi of each use of a shared tensor becomes the sum over all of its uses (so
 * that its product with the gradients of the uses is that of the sums), its bounds likewise. */
PK__INTERNAL void pk__integral_share(pk__integral *tangent);
/* phi of the outputs first .. first + count - 1 (of those chosen) of one row after pk__integral_step: (count x layer outputs
 * x layer inputs) of the weight, then (count x layer outputs) of the bias; count x weights for PK__LAYER_ROWS. */
PK__INTERNAL void pk__integral_row_phi(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                       size_t count, pk_real *phi);
/* error >= |computed - true Phi|, same layout: twice the difference to a rule of higher order, the uncertainty of the
 * kinks times the gradients beside them, and pk__rounding_allowance times sum_p w_p |delta_p| |a_p|. */
PK__INTERNAL void pk__integral_row_error(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                         size_t count, pk_real *error);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_INTEGRAL_IMPLEMENTED)
#define PATHKERNEL_INTEGRAL_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* F(direction, a) of every row for a layer on data, which the segment has where it goes along that direction; else NULL. */
static const pk_real *pk__known_product(const pk__integral *tangent, size_t layer, const pk_real *direction)
{
    const pk__path *segment = &tangent->integrator.path;
    const size_t node = (size_t)(tangent->node[layer] - tangent->graph->nodes);
    if (tangent->kind[layer] != PK__LAYER_DATA)
        return NULL;
    return direction == segment->direction ? segment->slope[node]
           : direction == segment->weights ? segment->base[node]
                                           : NULL;
}

/* pk__pass_transpose of a direction where it is at hand. */
static const pk_real *pk__known_transposed(const pk__integral *tangent, const pk_real *direction)
{
    const pk__path *segment = &tangent->integrator.path;
    const pk_real *transposed = segment->tape.transposed;
    return !transposed                       ? NULL
           : direction == segment->weights   ? transposed
           : direction == segment->direction ? transposed + tangent->graph->spread
                                             : NULL;
}

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p) for one layer at points, or rows where row == NULL. */
static void pk__add_along(pk__integral *tangent, size_t layer, size_t count, const size_t *row,
                          const pk_real *weight, const pk_real *input, const pk_real *delta,
                          const pk_real *bias_scale)
{
    const pk_node *node = tangent->node[layer];
    const size_t out = node->width, in = node->fan_in, outputs = tangent->outputs;
    for (int v = 0; v < PK__DIRECTIONS; v++) {
        if (!tangent->directions[v])
            continue;
        const pk_real *direction = tangent->directions[v] + node->weight_offset;
        const pk_real *product = pk__known_product(tangent, layer, tangent->directions[v]);
        if (!product) {
            pk_real *to = tangent->scratch;
            pk__layer_product(node, count, input, tangent->directions[v],
                              pk__known_transposed(tangent, tangent->directions[v]), 0, to);
            for (size_t p = 0; pk__has_bias(node) && p < count; p++)
                for (size_t j = 0; j < out; j++)
                    to[p * out + j] += (bias_scale ? bias_scale[p] : 1) * direction[out * in + j];
            product = to;
        }
        for (size_t p = 0; p < count; p++)
            pk__dots(outputs, out, delta + p * outputs * out, product + p * out, weight ? weight[p] : 1,
                     tangent->along[v] + (row ? row[p] : p) * outputs);
    }
}

/* phi = or, unless fresh, += sum_p w_p delta_p (x) a_p over count points of one row, of the chosen outputs. */
static void pk__add_outer(pk__integral *tangent, const pk_node *node, size_t count, const pk_real *weight,
                          const pk_real *a, const pk_real *delta, int fresh, pk_real *phi)
{
    size_t out = node->width, in = node->fan_in, outputs = tangent->outputs;
    const size_t chosen = tangent->output_count;
    delta += tangent->first_output * out;
    /* Weighted inputs, so that one product serves a unit of outputs. */
    for (size_t p = 0; p < count; p++)
        for (size_t j = 0; j < in; j++)
            tangent->weighted[p * in + j] = weight[p] * a[p * in + j];
    for (size_t k = 0; k < chosen; k += tangent->unit)
        pk__gemm(1, 0, pk__min(tangent->unit, chosen - k) * out, in, count, 1, delta + k * out, outputs * out,
                 tangent->weighted, in, !fresh, phi + k * out * in, in);
    if (pk__has_bias(node)) {
        pk_real *bias = phi + chosen * out * in;
        if (fresh)
            memset(bias, 0, chosen * out * sizeof *bias);
        for (size_t p = 0; p < count; p++)
            for (size_t j = 0; j < chosen * out; j++)
                bias[j] += weight[p] * delta[p * outputs * out + j];
    }
}

/* Phi of one row from its points first .. last - 1, and what bounds its error. */
static void pk__add_phi(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                        size_t last)
{
    const pk_node *node = tangent->node[layer];
    const pk__tape *tape = &tangent->integrator.path.tape;
    size_t out = node->width, in = node->fan_in, outputs = tangent->outputs;
    size_t count = last - first, at = points->row[first] * tangent->output_capacity * node->weight_count;
    const int fresh = !tangent->begun[points->row[first]];
    pk_real *a = tape->value[node->inputs[0]] + first * in;
    pk_real *delta = tape->cotangent[node - tangent->graph->nodes] + first * outputs * out;
    pk__add_outer(tangent, node, count, points->weight + first, a, delta, fresh, tangent->phi[layer] + at);
    if (!tangent->check)
        return;
    pk__add_outer(tangent, node, count, points->check + first, a, delta, fresh, tangent->check[layer] + at);
    /* The sizes: absolute values of the factors, weighted by the rounding allowance and the kinks' slack. */
    pk_real *sizes = tangent->scratch, *weight = tangent->sorted.slack;
    for (size_t p = 0; p < count; p++)
        weight[p] = (pk_real)(tangent->allowance * fabs(points->weight[first + p]) + points->slack[first + p]);
    for (size_t i = 0; i < count * outputs * out; i++)
        sizes[i] = (pk_real)fabs(delta[i]);
    for (size_t i = 0; i < count * in; i++)
        tangent->absolute[i] = (pk_real)fabs(a[i]);
    pk__add_outer(tangent, node, count, weight, tangent->absolute, sizes, fresh, tangent->size[layer] + at);
}

/* along[v][row, k] += w_p delta_p,k . F(direction_v, a_p), for any layer that is linear in its weights. */
static void pk__add_along_places(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *node = tangent->node[layer];
    const pk__tape *tape = &tangent->integrator.path.tape;
    const size_t outputs = tangent->outputs, width = node->width;
    const pk_real *delta = tape->cotangent[node - tangent->graph->nodes];
    pk_call call;
    pk__pass_call(tape, node, points->count, 1, &call);
    call.out = tangent->scratch;
    for (int v = 0; v < PK__DIRECTIONS; v++) {
        if (!tangent->directions[v])
            continue;
        call.weights = tangent->directions[v] + node->weight_offset;
        node->operation->forward(&call);
        for (size_t p = 0; p < points->count; p++)
            pk__dots(outputs, width, delta + p * outputs * width, call.out + p * width, points->weight[p],
                     tangent->along[v] + points->row[p] * outputs);
    }
}

/* Phi of a layer used at several places, point by point: products over many places of a few points each. */
static void pk__add_rows_places(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *node = tangent->node[layer];
    const size_t outputs = tangent->outputs, weights = node->weight_count, in = node->fan_in,
                 out = node->fan_out, positions = node->positions, most = pk__place_points(node, outputs);
    for (size_t p = 0, last; p < points->count; p = last) {
        last = pk__min(pk__row_end(points, p), p + most);
        const size_t pairs = (last - p) * positions;
        pk_real *places = tangent->places, *deltas = places + pairs * in;
        for (size_t i = p; i < last; i++) {
            pk_real *own = places + (i - p) * positions * in;
            pk__node_places(&tangent->integrator.path.tape, node, i, outputs, own,
                            deltas + (i - p) * positions * outputs * out);
            for (size_t j = 0; j < positions * outputs * out; j++)
                deltas[(i - p) * positions * outputs * out + j] *= points->weight[i];
        }
        for (size_t chosen = 0; chosen < tangent->output_count; chosen++) {
            const pk_real *delta = deltas + (tangent->first_output + chosen) * out;
            pk_real *phi = tangent->phi[layer] + (points->row[p] * tangent->output_capacity + chosen) * weights;
            pk__gemm(1, 0, out, in, pairs, 1, delta, outputs * out, places, in, 1, phi, in);
            for (size_t i = 0; weights > out * in && i < pairs; i++)
                for (size_t j = 0; j < out; j++)
                    phi[out * in + j] += delta[i * outputs * out + j];
        }
    }
}

/* Phi of a layer whose gradients are materialised point by point. */
static void pk__add_rows(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *node = tangent->node[layer];
    const pk__tape *tape = &tangent->integrator.path.tape;
    size_t outputs = tangent->outputs, weights = node->weight_count;
    if (node->tangent_form == PK_TANGENT_OUTER && !tangent->check) {
        pk__add_rows_places(tangent, layer, points);
        return;
    }
    for (size_t p = 0; p < points->count; p++) {
        const size_t at = points->row[p] * tangent->output_capacity * weights;
        const pk_real weight = points->weight[p],
                      *gradient = tangent->scratch + tangent->first_output * weights;
        pk_call call;
        pk__pass_call(tape, node, 1, outputs, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += p * call.in_width[j];
        call.out += p * node->width;
        call.out_cotangent = tape->cotangent[node - tangent->graph->nodes] + p * outputs * node->width;
        call.weights = pk__has_row_weights(node) ? pk__row_weights(tape, &tape->line, node, p)
                                                 : tape->line.weights + node->weight_offset;
        call.gradient = tangent->scratch;
        pk__node_row_gradients(&call);
        for (size_t i = 0; i < tangent->output_count * weights; i++)
            tangent->phi[layer][at + i] += weight * gradient[i];
        for (size_t i = 0; tangent->check && i < tangent->output_count * weights; i++) {
            tangent->check[layer][at + i] += points->check[p] * gradient[i];
            tangent->size[layer][at + i] +=
                (pk_real)((tangent->allowance * fabs(weight) + points->slack[p]) * fabs(gradient[i]));
        }
    }
}

/* along[v][row, k] += < Phi, direction_v > of the chosen outputs of a layer by rows, whose Phi is complete. */
static void pk__add_along_rows(pk__integral *tangent, size_t layer)
{
    const pk_node *node = tangent->node[layer];
    const size_t weights = node->weight_count, chosen = tangent->output_count;
    for (int v = 0; v < PK__DIRECTIONS; v++)
        for (size_t row = 0; tangent->directions[v] && row < tangent->rows; row++)
            pk__dots(chosen, weights, tangent->phi[layer] + row * tangent->output_capacity * weights,
                     tangent->directions[v] + node->weight_offset, 1,
                     tangent->along[v] + row * tangent->outputs + tangent->first_output);
}

/* Points of one row side by side: products over a row's points need them so. Stable. */
static const pk__points *pk__sort_points(pk__integral *tangent, const pk__points *points)
{
    int sorted = 1;
    for (size_t p = 1; p < points->count; p++)
        for (size_t q = 0; points->row[p] != points->row[p - 1] && q < p; q++)
            sorted &= points->row[q] != points->row[p];
    if (sorted)
        return points;
    pk__points *to = &tangent->sorted;
    to->count = 0;
    to->last = points->last;
    for (size_t r = 0; r < tangent->rows; r++)
        for (size_t p = 0; p < points->count; p++) {
            if (points->row[p] != r)
                continue;
            size_t at = to->count++;
            to->row[at] = r;
            to->t[at] = points->t[p];
            to->weight[at] = points->weight[p];
            if (points->check) {
                to->check[at] = points->check[p];
                to->slack[at] = points->slack[p];
            }
        }
    return to;
}

/* What the layers at either end keep of the points: sum_p w_p delta_p, or delta and sum_p w_p a_p. */
static void pk__add_ends(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *node = tangent->node[layer];
    const pk__tape *tape = &tangent->integrator.path.tape;
    const size_t cotangents = tangent->outputs * node->width, in = node->fan_in;
    const pk_real *delta = tape->cotangent[node - tangent->graph->nodes], *a = tape->value[node->inputs[0]];
    for (size_t p = 0; p < points->count; p++) {
        const pk_real weight = points->weight[p];
        pk_real *to = tangent->delta[layer] + points->row[p] * cotangents;
        if (tangent->kind[layer] == PK__LAYER_DATA) {
            for (size_t j = 0; j < cotangents; j++)
                to[j] += weight * delta[p * cotangents + j];
            continue;
        }
        memcpy(to, delta + p * cotangents, cotangents * sizeof *to);
        for (size_t j = 0; j < in; j++)
            tangent->input[layer][points->row[p] * in + j] += weight * a[p * in + j];
    }
}

/* What a layer keeps of the points that are in memory: sums over the points, before any example is looked at. */
static void pk__add_points(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const double start = pk__seconds();
    if (tangent->kind[layer] == PK__LAYER_DATA || tangent->kind[layer] == PK__LAYER_LINEAR)
        pk__add_ends(tangent, layer, points);
    else if (tangent->kind[layer] == PK__LAYER_ROWS)
        pk__add_rows(tangent, layer, points);
    for (size_t p = 0, last; tangent->kind[layer] == PK__LAYER_POINTS && p < points->count; p = last) {
        last = pk__row_end(points, p);
        pk__add_phi(tangent, layer, points, p, last);
    }
    tangent->seconds_sums += pk__seconds() - start;
}

/* As many points as can be reversed at one time. */
static void pk__integral_part(pk__integral *tangent, const pk__points *points)
{
    pk__path *segment = &tangent->integrator.path;
    const pk_graph *graph = tangent->graph;
    const size_t outputs = tangent->outputs, classes = graph->output_width, count = points->count;
    const size_t *row = points->row;
    const pk_real *weight = points->weight;
    if (count)
        pk__path_forward(segment, count, row, points->t);
    for (size_t p = 0; p < count; p++) {
        pk__readout_apply(&tangent->integrator.readout, classes, tangent->integrator.first_row + row[p],
                          pk__pass_output(&segment->tape) + p * classes, tangent->integrator.h,
                          pk__pass_seed(&segment->tape) + p * outputs * classes);
        tangent->weight_sum[row[p]] += weight[p];
    }
    segment->tape.unit_seeds = tangent->integrator.readout.kind == PK_READOUT_ALL;
    if (count)
        pk__path_reverse(segment, count, points->t, outputs);
    for (size_t l = 0; count && l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        const pk_real *delta = segment->tape.cotangent[node - graph->nodes];
        const pk_real *a = segment->tape.value[node->inputs[0]];
        const int spread = pk__is_spread(tangent, l);
        if (spread)
            pk__add_along_places(tangent, l, points);
        else if (tangent->kind[l] == PK__LAYER_POINTS)
            pk__add_along(tangent, l, count, row, weight, a, delta, NULL);
        if (tangent->kind[l] != PK__LAYER_POINTS || (tangent->integrated[l] && !spread))
            pk__add_points(tangent, l, points);
    }
    for (size_t p = 0; p < count; p++)
        tangent->begun[row[p]] = 1;
    for (size_t l = 0; points->last && l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        if (tangent->kind[l] == PK__LAYER_ROWS)
            pk__add_along_rows(tangent, l);
        else if (tangent->kind[l] == PK__LAYER_DATA)
            pk__add_along(tangent, l, tangent->rows, NULL, NULL, segment->base[node->inputs[0]],
                          tangent->delta[l], NULL);
        else if (tangent->kind[l] == PK__LAYER_LINEAR)
            pk__add_along(tangent, l, tangent->rows, NULL, NULL, tangent->input[l], tangent->delta[l],
                          tangent->weight_sum);
    }
    pk__contract(tangent, points);
}

static void pk__integral_points(pk__integral *tangent, const pk__points *unsorted)
{
    const pk__points *points = pk__sort_points(tangent, unsorted);
    size_t first = 0;
    do {
        pk__points part = *points;
        part.count = pk__min(tangent->reverse_points, points->count - first);
        part.row += first;
        part.t += first;
        part.weight += first;
        if (part.check) {
            part.check += first;
            part.slack += first;
        }
        first += part.count;
        part.last = points->last && first == points->count;
        pk__integral_part(tangent, &part);
    } while (first < points->count);
}

PK__INTERNAL void pk__integral_step(pk__integral *tangent, const pk_real *weights, const pk_real *direction,
                                    const pk_real *transposed, size_t first_row, size_t rows,
                                    const pk_real *inputs, pk_engine engine)
{
    const pk_graph *graph = tangent->graph;
    size_t outputs = tangent->outputs;
    const size_t chosen = rows * tangent->output_capacity;
    tangent->rows = rows;
    tangent->integrator.first_row = first_row;
    pk__path_begin(&tangent->integrator.path, weights, direction, transposed, rows, inputs);
    memset(tangent->weight_sum, 0, rows * sizeof(pk_real));
    memset(tangent->begun, 0, rows);
    for (int v = 0; v < PK__DIRECTIONS; v++)
        memset(tangent->along[v], 0, rows * outputs * sizeof(pk_real));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        pk__choose_contraction(tangent, l, engine);
        if (tangent->delta[l])
            memset(tangent->delta[l], 0, rows * outputs * node->width * sizeof(pk_real));
        if (tangent->input[l])
            memset(tangent->input[l], 0, rows * node->fan_in * sizeof(pk_real));
        /* Elsewhere Phi starts with the row's first points: every row has some. */
        if (tangent->kind[l] != PK__LAYER_ROWS)
            continue;
        memset(tangent->phi[l], 0, chosen * node->weight_count * sizeof(pk_real));
        if (tangent->check) {
            memset(tangent->check[l], 0, chosen * node->weight_count * sizeof(pk_real));
            memset(tangent->size[l], 0, chosen * node->weight_count * sizeof(pk_real));
        }
    }
    const size_t before = tangent->integrator.point_count;
    const pk__points *batch;
    pk__integrator_begin(&tangent->integrator);
    while (pk__integrator_next(&tangent->integrator, &batch))
        pk__integral_points(tangent, batch);
    tangent->integrator.points_last = tangent->integrator.point_count - before;
    for (size_t l = 0; tangent->check && l < graph->layers; l++)
        for (size_t i = 0; i < chosen * tangent->node[l]->weight_count; i++)
            tangent->size[l][i] += (pk_real)(2 * fabs(tangent->check[l][i]));
}

/* Element i of a tensor, in the order in which it stands in w, is element pk__use_index of a use. */
static size_t pk__use_index(const pk_tensor_use *use, size_t i)
{
    return use->rows ? i % use->rows * use->cols + i / use->rows : i;
}

/* Sums over the uses of the tensor that `owner` brings into w, in all of them, of one of phi, check and size. */
static void pk__share_tensor(const pk__integral *tangent, const pk_tensor_use *owner, pk_real *const *features)
{
    const pk_graph *graph = tangent->graph;
    const pk_tensor_use *end = graph->pieces + graph->piece_count;
    const pk_node *own = &graph->nodes[owner->node];
    const size_t cells = tangent->rows * tangent->output_capacity, own_at = owner->spread - own->weight_offset;
    for (int back = 0; back < 2; back++)
        for (const pk_tensor_use *use = owner + 1; use < end; use++) {
            const pk_node *node = &graph->nodes[use->node];
            const size_t at = use->spread - node->weight_offset;
            if (use->flat != owner->flat)
                continue;
            for (size_t cell = 0; cell < cells; cell++) {
                pk_real *sum = features[own->layer] + cell * own->weight_count + own_at;
                pk_real *one = features[node->layer] + cell * node->weight_count + at;
                for (size_t i = 0; i < use->count; i++)
                    if (back)
                        one[pk__use_index(use, i)] = sum[i];
                    else
                        sum[i] += one[pk__use_index(use, i)];
            }
        }
}

PK__INTERNAL void pk__integral_share(pk__integral *tangent)
{
    const pk_graph *graph = tangent->graph;
    for (const pk_tensor_use *use = graph->pieces; use < graph->pieces + graph->piece_count; use++) {
        if (use->owner != use->node || !graph->nodes[use->node].shares)
            continue;
        pk__share_tensor(tangent, use, tangent->phi);
        if (tangent->size)
            pk__share_tensor(tangent, use, tangent->size);
    }
}

/* Where matrices and biases of the outputs from first on of one row of phi stand, for a layer that has it stored. */
PK__PRIVATE void pk__row_view(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                              const pk_real **matrices, const pk_real **biases)
{
    const pk_node *node = tangent->node[layer];
    const int rows = tangent->kind[layer] == PK__LAYER_ROWS;
    const size_t bias = !rows && pk__has_bias(node) ? node->width : 0, matrix = node->weight_count - bias;
    const pk_real *from = tangent->phi[layer] + row * tangent->output_capacity * node->weight_count;
    first -= tangent->first_output;
    *matrices = from + first * matrix;
    *biases = from + tangent->output_count * matrix + first * bias;
}

/* The outputs first .. first + count - 1 of one row of phi (or check, size), whose matrix and bias parts of all chosen
 * outputs stand one behind the other. */
static void pk__row_outputs(const pk__integral *tangent, size_t layer, size_t row, size_t first, size_t count,
                            const pk_real *from, pk_real *to)
{
    const pk_node *node = tangent->node[layer];
    const size_t weights = node->weight_count;
    const int rows = tangent->kind[layer] == PK__LAYER_ROWS;
    const size_t bias = !rows && pk__has_bias(node) ? node->width : 0, matrix = weights - bias;
    from += row * tangent->output_capacity * weights;
    first -= tangent->first_output;
    memcpy(to, from + first * matrix, count * matrix * sizeof *to);
    memcpy(to + count * matrix, from + tangent->output_count * matrix + first * bias,
           count * bias * sizeof *to);
}

/* The factors of one row's Phi of a layer whose sum over points is taken first: cotangents of the outputs from first on (x
 * layer outputs) and inputs. Returns what stands in the place of an input for the bias. */
PK__PRIVATE pk_real pk__row_factors(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                    const pk_real **cotangents, const pk_real **inputs)
{
    const pk_node *node = tangent->node[layer];
    const int data = tangent->kind[layer] == PK__LAYER_DATA;
    *inputs =
        (data ? tangent->integrator.path.base[node->inputs[0]] : tangent->input[layer]) + row * node->fan_in;
    *cotangents = tangent->delta[layer] + (row * tangent->outputs + first) * node->width;
    return data ? 1 : tangent->weight_sum[row];
}

PK__INTERNAL void pk__integral_row_phi(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                       size_t count, pk_real *phi)
{
    const pk_node *node = tangent->node[layer];
    const size_t out = node->width, in = node->fan_in;
    if (tangent->phi[layer]) {
        pk__row_outputs(tangent, layer, row, first, count, tangent->phi[layer], phi);
        return;
    }
    const pk_real *delta, *a;
    const pk_real bias = pk__row_factors(tangent, layer, row, first, &delta, &a);
    for (size_t j = 0; j < count * out; j++)
        for (size_t i = 0; i < in; i++)
            phi[j * in + i] = delta[j] * a[i];
    if (pk__has_bias(node))
        for (size_t j = 0; j < count * out; j++)
            phi[count * out * in + j] = delta[j] * bias;
}

PK__INTERNAL void pk__integral_row_error(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                         size_t count, pk_real *error)
{
    pk__row_outputs(tangent, layer, row, first, count, tangent->size[layer], error);
}

PK__END_CODE
/* <<< implementation */
#endif
