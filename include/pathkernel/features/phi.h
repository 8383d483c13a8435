/* pathkernel/features/phi.h: gradients and mixed derivatives integrated along one step, as arrays of numbers, for analyses
 * that need them whole:
 *
 *     Phi (C x P)     = integral_0^1 J(w + t D, x) dt,                                     J = df/dw
 *     dPhi/dx (D x P) = d/dx of row c of Phi
 *                     = integral_0^1 d/dx J_c(w + t D, x) dt + sum_k (dt_k/dx) (x) (J_c(t_k -) - J_c(t_k +)) ,
 *
 * the sum over the kinks t_k inside the step: where a switch function z_k of the network is 0, J jumps, and that place moves with
 * x by dt_k/dx = -(dz_k/dx) / (dz_k/dt). The sum belongs to the derivative: without it, the derivative of an integral over
 * pieces whose ends move is wrong.
 *
 *   1. split the step at the kinks (kinks.h), one row after the other; a network without kinks has one piece, and all rows of a
 *      block share its nodes;
 *   2. where the network is a piecewise polynomial in t, Gauss-Legendre with as many nodes as its degree integrates each piece
 *      exactly, and the polynomial through the nodes gives J at both ends of the piece exactly, from the inside;
 *   3. elsewhere the number of nodes is doubled until all numbers agree, and then the piece is halved;
 *   4. at each kink: the switch functions with different signs in the two pieces beside it are those that are 0 there;
 *      forward tangents give their derivatives by t and by x.
 */
#ifndef PATHKERNEL_PHI_H
#define PATHKERNEL_PHI_H
#include "../path/quadrature.h"
#include "../training/derivatives.h"

/* >>> declarations */
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_PHI_IMPLEMENTED)
#define PATHKERNEL_PHI_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum {
    PK__STEP_ORDERS = 32,       /* nodes of the largest rule */
    PK__STEP_DEPTH = 14,        /* halvings of a piece */
    PK__STEP_NUMBERS = 1 << 18, /* numbers of a block of rows, which is at least one row */
    PK__STEP_PIECES = 1024      /* room for the pieces of one row, and some more for each switch function */
};

typedef struct pk__step_integral {
    pk_context *context;
    const pk_graph *graph;
    int kinked, exact,
        /* the network has switch functions; it is a piecewise polynomial in t; dPhi/dx is computed instead of Phi */
        mixed;
    size_t rows, numbers; /* rows of a block; numbers of the integrand of a whole block */
    size_t output;        /* mixed */
    /* The step and the rows: */
    const pk_real *w, *next;
    pk_matrix inputs;
    /* Memory: */
    double *node, *weight; /* rules 1 .. PK__STEP_ORDERS, as pk__gauss_table has them */
    pk_real *at, *direction, *value;
    double *coarse, *fine; /* numbers */
    double *ends[4];       /* mixed: J at the start and the end of a piece, of two rules; P each */
    double *start, *end,
        *previous; /* mixed: J at both ends of the piece between two kinks; at the end of the piece before it */
    pk_real *seeds, *units, *copies; /* mixed: D x C, D x D, D x D: cotangents, directions, the input D times */
    pk__path segment;
    pk__pieces from, pieces;
    pk_real *use_weights, *use_direction; /* of each use of a tensor, see pk_graph_untie */
    /* Switch functions beside a kink: */
    pk_graph varied; /* the graph whose inputs vary, too */
    pk__tape tape;   /* D + 1 rows */
    size_t switches, piece_capacity;
    pk_real *before, *after, *here, *moved, *across,
        *zero;      /* switches each; zero: the widest input of a switch node */
    double *slopes; /* D */
    int order;      /* nodes of the rule that the last smooth piece took */
    /* Counted: */
    size_t points, kinks, unresolved, refused;
} pk__step_integral;

/* Whether every derivative is a polynomial in t on each piece, and all kinks can be found. */
static int pk__step_integral_is_exact(const pk_graph *graph)
{
    if (graph->degree < 0 || graph->surrogate || graph->degree > PK__STEP_ORDERS)
        return 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (pk__is_switch(&graph->nodes[n]) && graph->nodes[n].degree > PK__PATH_DEGREE)
            return 0;
    return 1;
}

/* The number of rows in a block; it depends on shapes alone. */
static size_t pk__step_integral_rows(const pk_graph *graph, size_t rows)
{
    const size_t one = pk__max(graph->output_width * pk__max(graph->parameters, 1), 1);
    return pk__max(1, pk__min(rows, (size_t)PK__STEP_NUMBERS / one));
}

/* Starts a zeroed phi; mixed: with the graph whose inputs vary, whose constants are the original's. */
PK__PRIVATE pk_status pk__step_integral_begin(pk_context *context, const pk_graph *graph, int mixed,
                                              pk__step_integral *phi)
{
    memset(phi, 0, sizeof *phi);
    phi->context = context;
    phi->graph = graph;
    phi->mixed = mixed;
    phi->varied = *graph;
    phi->varied.nodes = NULL;
    if (!mixed)
        return PK_OK;
    pk_status status =
        pk_allocate(context, graph->node_count, sizeof *graph->nodes, "the sensitivity", &phi->varied.nodes);
    if (status)
        return status;
    memcpy(phi->varied.nodes, graph->nodes, graph->node_count * sizeof *graph->nodes);
    phi->varied.nodes[0].varies = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        pk__node_analyse(&phi->varied, &phi->varied.nodes[n]);
    pk__graph_analyse(&phi->varied);
    return PK_OK;
}

PK__PRIVATE void pk__step_integral_end(pk__step_integral *phi)
{
    pk_release(phi->context, phi->varied.nodes);
    phi->varied.nodes = NULL;
}

/* Takes all memory; the step is the caller's. */
PK__PRIVATE void pk__step_integral_take(pk__arena *arena, size_t rows, pk__step_integral *phi)
{
    const pk_graph *graph = phi->graph;
    const int mixed = phi->mixed;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width, real = sizeof(pk_real);
    const size_t rules = (size_t)PK__STEP_ORDERS * (PK__STEP_ORDERS + 1) / 2;
    size_t numbers = 0, widest = 0;
    phi->exact = pk__step_integral_is_exact(graph);
    phi->kinked = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        phi->kinked |= pk__is_switch(&graph->nodes[n]);
    phi->rows = mixed ? 1 : pk__step_integral_rows(graph, rows);
    if (!pk__multiply(mixed ? D + 1 : phi->rows * C, P, &numbers) || numbers > SIZE_MAX / 64)
        arena->overflow = 1;
    phi->numbers = numbers;
    phi->node = pk__arena_take(arena, rules, sizeof(double));
    phi->weight = pk__arena_take(arena, rules, sizeof(double));
    if (phi->node && phi->weight)
        pk__gauss_table(phi->node, phi->weight);
    phi->at = pk__arena_take(arena, P, real);
    phi->direction = pk__arena_take(arena, P, real);
    phi->value = pk__arena_take(arena, numbers, real);
    phi->coarse = pk__arena_take(arena, numbers, sizeof(double));
    phi->fine = pk__arena_take(arena, numbers, sizeof(double));
    phi->order = 4;
    phi->switches = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        phi->switches +=
            pk__is_switch(&graph->nodes[n]) ? graph->nodes[n].operation->switch_count(&graph->nodes[n]) : 0;
    /* Few functions change sign more often than a few times in one step. */
    phi->piece_capacity = PK__STEP_PIECES + 4 * phi->switches;
    if (phi->kinked) {
        pk__path_take(arena, graph, 1, 4 * (PK__PATH_DEGREE + 1 + PK__NEWTON_POINTS), 1, 0, phi->piece_capacity,
                      0, &phi->segment);
        pk__pieces_take(arena, 1, &phi->from);
        pk__pieces_take(arena, phi->piece_capacity, &phi->pieces);
        phi->use_weights = pk__arena_take(arena, graph->tied ? graph->untied : 0, real);
        phi->use_direction = pk__arena_take(arena, graph->tied ? graph->untied : 0, real);
    }
    if (!mixed)
        return;
    for (int i = 0; i < 4; i++)
        phi->ends[i] = pk__arena_take(arena, P, sizeof(double));
    phi->start = pk__arena_take(arena, P, sizeof(double));
    phi->end = pk__arena_take(arena, P, sizeof(double));
    phi->previous = pk__arena_take(arena, P, sizeof(double));
    phi->seeds = pk__arena_take(arena, D, C * real);
    phi->units = pk__arena_take(arena, D, D * real);
    phi->copies = pk__arena_take(arena, D, D * real);
    phi->slopes = pk__arena_take(arena, D, sizeof(double));
    if (!phi->kinked)
        return;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!pk__is_switch(node))
            continue;
        for (int j = 0; j < node->input_count; j++)
            widest = pk__max(widest, graph->nodes[node->inputs[j]].width);
    }
    pk_real **const list[] = {&phi->before, &phi->after, &phi->here, &phi->moved, &phi->across};
    for (size_t i = 0; i < 5; i++)
        *list[i] = pk__arena_take(arena, phi->switches, real);
    phi->zero = pk__arena_take(arena, widest, real);
    if (phi->zero)
        memset(phi->zero, 0, widest * real);
    pk__pass_take(arena, &phi->varied, D, 0, 1, &phi->tape);
}

/* ---- integrands ---------------------------------------------------------------------------------------- */

PK__PRIVATE pk_matrix pk__no_matrix(void)
{
    return pk_matrix_view(NULL, 0, 0);
}

/* phi->value = the integrand at t: the Jacobians of the rows, or D rows of d/dx_d J_c and then J_c. */
static pk_status pk__step_integral_value(pk__step_integral *phi, pk_matrix inputs, double t)
{
    const pk_graph *graph = phi->graph;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width;
    pk__step_point(P, phi->w, phi->next, t, phi->at);
    phi->points += inputs.rows;
    if (!phi->mixed)
        return pk_jacobian(phi->context, graph, phi->at, inputs, pk_matrix_view(phi->value, inputs.rows * C, P),
                           pk__no_matrix());
    pk_status status = pk_mixed_product(
        phi->context, graph, phi->at, pk_matrix_view(phi->copies, D, D), pk_matrix_view(phi->seeds, D, C), NULL,
        pk_matrix_view(phi->units, D, D), pk_matrix_view(phi->value, D, P), pk__no_matrix());
    if (status)
        return status;
    return pk_vjp(phi->context, graph, phi->at, inputs, pk_matrix_view(phi->seeds, 1, C),
                  pk_matrix_view(phi->value + D * P, 1, P), pk__no_matrix());
}

/* to = the rule of n nodes on [a, b]; mixed: start and end = J there, from the inside. */
static pk_status pk__step_integral_rule(pk__step_integral *phi, pk_matrix inputs, double a, double b, int n,
                                        size_t numbers, double *to, double *start, double *end)
{
    const double *node = phi->node + n * (n - 1) / 2, *weight = phi->weight + n * (n - 1) / 2;
    const size_t P = phi->graph->parameters;
    memset(to, 0, numbers * sizeof *to);
    if (phi->mixed) {
        memset(start, 0, P * sizeof *start);
        memset(end, 0, P * sizeof *end);
    }
    for (int q = 0; q < n; q++) {
        pk_status status = pk__step_integral_value(phi, inputs, a + (b - a) * node[q]);
        if (status)
            return status;
        const double w = (b - a) * weight[q];
        for (size_t i = 0; i < numbers; i++)
            to[i] += w * phi->value[i];
        if (!phi->mixed)
            continue;
        const pk_real *j = phi->value + phi->graph->input_width * P;
        const double first = pk__lagrange(n, node, q, 0), last = pk__lagrange(n, node, q, 1);
        for (size_t p = 0; p < P; p++) {
            start[p] += first * j[p];
            end[p] += last * j[p];
        }
    }
    return PK_OK;
}

/* The largest difference of two vectors, as a part of the largest number of the second; 0 where that is 0. */
static double pk__step_integral_apart(size_t count, const double *a, const double *b)
{
    double apart = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        apart = fmax(apart, fabs(a[i] - b[i]));
        largest = fmax(largest, fabs(b[i]));
    }
    return largest > 0 ? apart / largest : 0;
}

/* sum += the integral over [a, b]; mixed: phi->start (where first) and phi->end = J at its ends. */
static pk_status pk__step_integral_piece(pk__step_integral *phi, pk_matrix inputs, double a, double b,
                                         int depth, int first, size_t numbers, double *sum)
{
    const size_t P = phi->graph->parameters;
    const int exact = phi->exact ? pk__max((size_t)phi->graph->degree, 1) : 0;
    int n = exact ? exact : phi->order > 4 ? phi->order / 2 : 2;
    /* The error of a rule with twice the nodes is about the square of the difference. */
    const double enough = sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-10;
    pk_status status =
        pk__step_integral_rule(phi, inputs, a, b, n, numbers, phi->fine, phi->ends[0], phi->ends[1]);
    for (double before = INFINITY; !status && !exact;) {
        double *swap = phi->coarse;
        phi->coarse = phi->fine, phi->fine = swap;
        for (int i = 0; i < 2; i++)
            swap = phi->ends[i], phi->ends[i] = phi->ends[i + 2], phi->ends[i + 2] = swap;
        n *= 2;
        status = pk__step_integral_rule(phi, inputs, a, b, n, numbers, phi->fine, phi->ends[0], phi->ends[1]);
        if (status)
            break;
        double apart = pk__step_integral_apart(numbers, phi->coarse, phi->fine);
        for (int i = 0; i < 2 && phi->mixed && phi->kinked; i++)
            apart = fmax(apart, pk__step_integral_apart(P, phi->ends[i + 2], phi->ends[i]));
        if (apart <= enough) {
            phi->order = n;
            break;
        }
        const int last = 2 * n > PK__STEP_ORDERS || (n > 8 && apart > 0.1 * before);
        before = apart;
        if (!last)
            continue;
        if (depth < PK__STEP_DEPTH) {
            const double middle = 0.5 * (a + b);
            status = pk__step_integral_piece(phi, inputs, a, middle, depth + 1, first, numbers, sum);
            return status ? status
                          : pk__step_integral_piece(phi, inputs, middle, b, depth + 1, 0, numbers, sum);
        }
        phi->refused++;
        break;
    }
    if (status)
        return status;
    for (size_t i = 0; i < numbers; i++)
        sum[i] += phi->fine[i];
    if (phi->mixed) {
        if (first)
            memcpy(phi->start, phi->ends[0], P * sizeof *phi->start);
        memcpy(phi->end, phi->ends[1], P * sizeof *phi->end);
    }
    return PK_OK;
}

/* ---- kinks --------------------------------------------------------------------------------------------- */

/* The pieces of a row. */
static pk_status pk__step_integral_split(pk__step_integral *phi, pk_matrix inputs, double a, double b)
{
    const pk_graph *graph = phi->graph;
    const pk_real *weights = phi->w, *direction = phi->direction;
    if (graph->tied) {
        pk_graph_untie(graph, phi->w, phi->use_weights);
        pk_graph_untie(graph, phi->direction, phi->use_direction);
        weights = phi->use_weights, direction = phi->use_direction;
    }
    pk__path_begin(&phi->segment, weights, direction, NULL, 1, inputs.data);
    phi->from.count = 0;
    (void)pk__pieces_push(&phi->from, 0, a, b);
    if (pk__path_split(&phi->segment, &phi->from, &phi->pieces))
        return PK_OK;
    return pk__fail(phi->context, PK_UNSUPPORTED,
                    "a step has more than %zu kinks of one row, too many for this analysis",
                    phi->piece_capacity);
}

/* values = the switch functions of one row of the tape; tangents: their derivatives along its tangents. */
static void pk__step_integral_switches(const pk__step_integral *phi, size_t row, int tangents, pk_real *values)
{
    const pk_graph *graph = &phi->varied;
    const pk__tape *tape = &phi->tape;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!pk__is_switch(&phi->graph->nodes[n]))
            continue;
        const size_t count = node->operation->switch_count(node);
        pk_call call;
        pk__pass_call(tape, node, 1, 1, &call);
        call.out = values;
        if (tangents) { /* affine in the inputs: the constant part is subtracted */
            for (int j = 0; j < node->input_count; j++)
                call.in[j] = phi->zero;
            node->operation->switches(&call);
            call.out = phi->here;
        }
        for (int j = 0; j < node->input_count; j++) {
            const size_t from = (size_t)node->inputs[j];
            const pk_real *base = tangents ? tape->tangent[from] : tape->value[from];
            call.in[j] = base ? base + row * call.in_width[j] : phi->zero;
        }
        node->operation->switches(&call);
        for (size_t i = 0; tangents && i < count; i++)
            values[i] = phi->here[i] - values[i];
        values += count;
    }
}

/* The network at t, for `rows` copies of the input. */
static void pk__step_integral_forward(pk__step_integral *phi, double t, size_t rows, const pk_real *inputs)
{
    const pk_graph *graph = phi->graph;
    pk__step_point(graph->parameters, phi->w, phi->next, t, phi->at);
    const pk_real *weights = phi->at;
    if (graph->tied) {
        pk_graph_untie(graph, phi->at, phi->use_weights);
        weights = phi->use_weights;
    }
    const pk__line line = {weights, NULL, NULL};
    pk__pass_forward(&phi->tape, &line, rows, inputs);
}

/* to (D + 1 rows of P) += (dt/dx) (x) (J before - J after) at the kink t between pieces with middles a and b. */
static void pk__step_integral_kink(pk__step_integral *phi, pk_matrix inputs, double a, double t, double b,
                                   double *to)
{
    const pk_graph *graph = phi->graph;
    const size_t P = graph->parameters, D = graph->input_width;
    double jump = 0, size = 0;
    for (size_t p = 0; p < P; p++) {
        jump = fmax(jump, fabs(phi->previous[p] - phi->start[p]));
        size = fmax(size, fmax(fabs(phi->previous[p]), fabs(phi->start[p])));
    }
    if (!(jump > 64 * PK__EPSILON * size)) /* the output does not depend on this switch */
        return;
    phi->kinks++;
    pk__step_integral_forward(phi, a, 1, inputs.data);
    pk__step_integral_switches(phi, 0, 0, phi->before);
    pk__step_integral_forward(phi, b, 1, inputs.data);
    pk__step_integral_switches(phi, 0, 0, phi->after);
    pk__step_integral_forward(phi, t, D, phi->copies);
    const pk_real *weights = phi->at, *direction = phi->direction;
    if (graph->tied) {
        pk_graph_untie(graph, phi->direction, phi->use_direction);
        weights = phi->use_weights, direction = phi->use_direction;
    }
    /* dz/dt, along the step, for one row. */
    const pk__line step = {weights, direction, NULL}, still = {weights, NULL, NULL};
    memset(phi->tape.tangent[0], 0, D * D * sizeof(pk_real));
    pk__pass_tangent(&phi->tape, &step, 1);
    pk__step_integral_switches(phi, 0, 1, phi->moved);
    /* dz/dx: rows are directions. */
    memcpy(phi->tape.tangent[0], phi->units, D * D * sizeof(pk_real));
    pk__pass_tangent(&phi->tape, &still, D);
    size_t used = 0;
    int agree = 1;
    memset(phi->slopes, 0, D * sizeof *phi->slopes);
    /* Several functions may change sign here, such as those of units that are copies of each other; all must move in the
     * same way. */
    for (size_t d = 0; d < D; d++) {
        pk__step_integral_switches(phi, d, 1, phi->across);
        used = 0;
        for (size_t i = 0; i < phi->switches; i++) {
            if ((phi->before[i] > 0) == (phi->after[i] > 0) || phi->moved[i] == 0)
                continue;
            const double slope = -(double)phi->across[i] / (double)phi->moved[i];
            if (!used++)
                phi->slopes[d] = slope;
            else if (!(fabs(slope - phi->slopes[d]) <= 1e-7 * (fabs(slope) + fabs(phi->slopes[d]))))
                agree = 0;
        }
    }
    if (!used || !agree) {
        phi->unresolved++;
        if (!used)
            return;
    }
    for (size_t d = 0; d < D; d++)
        for (size_t p = 0; p < P; p++)
            to[d * P + p] += phi->slopes[d] * (phi->previous[p] - phi->start[p]);
}

/* ---- a step -------------------------------------------------------------------------------------------- */

/* to (rows C x P, or D x P and behind it P of scratch) = the integral along the step from w to next of a block of rows, at most
 * phi->rows, or of one. mixed: of output phi->output. */
PK__PRIVATE pk_status pk__step_integral_run(pk__step_integral *phi, const pk_real *w, const pk_real *next,
                                            pk_matrix inputs, double *to)
{
    const pk_graph *graph = phi->graph;
    const size_t P = graph->parameters, C = graph->output_width, D = graph->input_width;
    const size_t one = phi->mixed ? (D + 1) * P : C * P;
    pk_status status = PK_OK;
    phi->w = w, phi->next = next;
    memset(to, 0, (phi->mixed ? 1 : inputs.rows) * one * sizeof *to);
    if (phi->mixed) {
        memset(phi->seeds, 0, D * C * sizeof *phi->seeds);
        memset(phi->units, 0, D * D * sizeof *phi->units);
        for (size_t d = 0; d < D; d++) {
            phi->seeds[d * C + phi->output] = 1;
            phi->units[d * D + d] = 1;
            memcpy(phi->copies + d * D, inputs.data, D * sizeof *phi->copies);
        }
    }
    if (!phi->kinked)
        return pk__step_integral_piece(phi, inputs, 0, 1, 0, 1, inputs.rows * one, to);
    for (size_t p = 0; p < P; p++)
        phi->direction[p] = (pk_real)((double)next[p] - w[p]);
    for (size_t r = 0; r < inputs.rows && !status; r++) {
        const pk_matrix row = pk_matrix_view(inputs.data + r * inputs.ld, 1, D);
        status = pk__step_integral_split(phi, row, 0, 1);
        for (size_t k = 0; k < phi->pieces.count && !status; k++) {
            const pk__piece *piece = &phi->pieces.piece[k];
            status = pk__step_integral_piece(phi, row, piece->a, piece->b, 0, 1, one, to + r * one);
            if (!status && phi->mixed && k)
                pk__step_integral_kink(phi, row, 0.5 * (piece[-1].a + piece[-1].b), piece->a,
                                       0.5 * (piece->a + piece->b), to);
            if (phi->mixed)
                memcpy(phi->previous, phi->end, P * sizeof *phi->previous);
        }
    }
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
