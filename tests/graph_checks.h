/* graph_checks.h: the rules of the operations of a graph against each other and against finite differences. */
#ifndef GRAPH_CHECKS_H
#define GRAPH_CHECKS_H
#include "fixture.h"

/* ---- tapes ------------------------------------------------------------------------------------------- */

/* A tape with memory of its own, filled with rubbish first. */
typedef struct holder {
    pk_context context;
    pk_graph graph;
    pk__tape tape;
    unsigned char *memory;
} holder;

FIXTURE void hold_graph(holder *h, size_t rows, size_t copies)
{
    pk__arena arena = {NULL, 0, 0, 0};
    pk__pass_take(&arena, &h->graph, rows, copies, 1, &h->tape);
    assert_false(arena.overflow);
    assert_ok(&h->context, pk_allocate(&h->context, arena.used, 1, "a tape", &h->memory));
    memset(h->memory, 0xff, arena.used); /* NaN */
    pk__arena own = {h->memory, arena.used, 0, 0};
    pk__pass_take(&own, &h->graph, rows, copies, 1, &h->tape);
    assert_false(own.overflow);
    assert_int_equal(own.used, arena.used);
}

FIXTURE void hold(holder *h, const char *network, size_t rows, size_t copies)
{
    memset(h, 0, sizeof *h);
    assert_ok(&h->context, pk_network_parse(&h->context, network, &h->graph));
    hold_graph(h, rows, copies);
}

FIXTURE void drop(holder *h)
{
    pk_release(&h->context, h->memory);
    pk_graph_release(&h->context, &h->graph);
    assert_int_equal(h->context.memory_used, 0);
}

/* ---- numbers ----------------------------------------------------------------------------------------- */

/* What a check takes is released at its end. */
typedef struct checks {
    const pk_graph *graph;
    size_t rows, copies, count;
    uint64_t seed;
    pk_real *blocks[256];
} checks;

FIXTURE pk_real *checks_take(checks *c, size_t count)
{
    assert_true(c->count < sizeof c->blocks / sizeof *c->blocks);
    pk_real *block = FIXTURE_NEW(pk_real, count);
    memset(block, 0xff, count * sizeof *block); /* NaN */
    return c->blocks[c->count++] = block;
}

FIXTURE pk_real *checks_normals(checks *c, size_t count, double scale)
{
    pk_real *block = checks_take(c, count);
    for (size_t i = 0; i < count; i++)
        block[i] = scale * bf_normal(&c->seed);
    return block;
}

FIXTURE void checks_release(checks *c, size_t keep)
{
    while (c->count > keep)
        free(c->blocks[--c->count]);
}

FIXTURE double checks_product(size_t count, const pk_real *a, const pk_real *b, double *size)
{
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += a[i] * b[i];
        *size += fabs(a[i] * b[i]);
    }
    return sum;
}

/* |a - b| <= tolerance times what is largest of them, or times one. */
FIXTURE void checks_within(const char *what, const pk_node *node, size_t count, const pk_real *a,
                           const pk_real *b, double tolerance)
{
    const double scale = fmax(1, fmax(fixture_largest(count, a), fixture_largest(count, b)));
    for (size_t i = 0; i < count; i++)
        if (!(fabs(a[i] - b[i]) <= tolerance * scale))
            fail_msg("%s, %s: number %zu of %zu is %.17g or %.17g, %.3g apart", node->operation->name, what, i,
                     count, (double)a[i], (double)b[i], (double)a[i] - b[i]);
}

/* Whether finite differences tell the derivative. In float their steps are 2^8 times as long as in double, and kinks too
 * often within: piecewise-linear networks have them in double. */
FIXTURE int checks_have_slopes(int kinked, int surrogate)
{
    return !surrogate && (!kinked || sizeof(pk_real) > sizeof(float));
}

/* tolerance: for double. */
FIXTURE void checks_equal(const char *what, const pk_node *node, size_t count, const pk_real *a,
                          const pk_real *b, double tolerance)
{
    checks_within(what, node, count, a, b, ROUNDING(tolerance));
}

/* The same with b from finite differences. A float's rounding over their step, 2^-10, is 1e-4 of the values behind them,
 * which may be many times as large. */
FIXTURE void checks_slope(const char *what, const pk_node *node, size_t count, const pk_real *a,
                          const pk_real *b, double tolerance)
{
    checks_within(what, node, count, a, b, sizeof(pk_real) > sizeof(float) ? tolerance : 1e-2);
}

FIXTURE void checks_adjoint(const char *what, const pk_node *node, double a, double b, double size)
{
    if (!(fabs(a - b) <= ROUNDING(1e-13) * fmax(1, size)))
        fail_msg("%s, %s: %.17g and %.17g are %.3g apart", node->operation->name, what, a, b, a - b);
}

/* ---- the rules of one operation -------------------------------------------------------------------------- */

/* Runs a rule with no more scratch than it asks for, whatever the rows. */
FIXTURE void checks_run(const pk_call *call, void (*rule)(const pk_call *))
{
    enum { GUARD = 8 };
    const pk_node *node = call->node;
    size_t size = node->operation->scratch ? node->operation->scratch(node, 1, call->copies) : 0;
    if (node->tangent_form == PK_TANGENT_OUTER && node->operation->unfold)
        size = (size_t)fmax((double)size, (double)(node->positions * node->fan_in));
    pk_real *scratch = FIXTURE_NEW(pk_real, size + GUARD);
    memset(scratch, 0xff, size * sizeof *scratch);
    pk_call own = *call;
    own.scratch = scratch;
    rule(&own);
    for (size_t i = 0; i < GUARD; i++)
        if (scratch[size + i] != 0)
            fail_msg("%s writes behind its scratch", node->operation->name);
    free(scratch);
}

/* at[j] = in[j] + e v[j], weights + e direction; returns a call there, its output computed. */
FIXTURE pk_call checks_move(checks *c, const pk_call *base, const pk_real *const *v, const pk_real *direction,
                            double e)
{
    pk_call call = *base;
    const pk_node *node = base->node;
    for (int j = 0; j < node->input_count; j++) {
        const size_t count = base->rows * base->in_width[j];
        pk_real *at = checks_take(c, count);
        for (size_t i = 0; i < count; i++)
            at[i] = base->in[j][i] + (v[j] ? e * v[j][i] : 0);
        call.in[j] = at;
    }
    pk_real *weights = checks_take(c, node->weight_count);
    for (size_t i = 0; i < node->weight_count; i++)
        weights[i] = base->weights[i] + (direction ? e * direction[i] : 0);
    call.weights = weights;
    call.out = checks_take(c, base->rows * node->width);
    checks_run(&call, node->operation->forward);
    return call;
}

FIXTURE const pk_real *checks_tangent(checks *c, const pk_call *base, const pk_real *const *v,
                                      const pk_real *direction)
{
    pk_call call = *base;
    call.out_tangent = checks_take(c, base->rows * base->node->width);
    call.direction = direction;
    for (int j = 0; j < PK_NODE_INPUTS; j++)
        call.in_tangent[j] = v[j];
    checks_run(&call, base->node->operation->tangent);
    return call.out_tangent;
}

enum {
    CHECKS_STEP_INVERSE = sizeof(pk_real) > sizeof(float) ? 1 << 18 : 1 << 10
}; /* kinks are rarely that close */

/* The weights of central differences at 1, 1/2, -1/2 and -1 steps; their error is the step's fourth power. */
static const double checks_at[4] = {1, 0.5, -0.5, -1};
static const double checks_factor[4] = {-1.0 / 6, 8.0 / 6, -8.0 / 6, 1.0 / 6};

/* difference = d forward / d e along v and direction. */
FIXTURE void checks_difference(checks *c, const pk_call *base, const pk_real *const *v,
                               const pk_real *direction, pk_real *difference)
{
    const size_t count = base->rows * base->node->width, keep = c->count;
    memset(difference, 0, count * sizeof *difference);
    for (int k = 0; k < 4; k++) {
        const pk_call at = checks_move(c, base, v, direction, checks_at[k] / CHECKS_STEP_INVERSE);
        for (size_t i = 0; i < count; i++)
            difference[i] += checks_factor[k] * CHECKS_STEP_INVERSE * at.out[i];
        checks_release(c, keep);
    }
}

/* cotangents[j] = the reverse of out_cotangent for the inputs that vary (and are wanted: -1 all), added to before. */
FIXTURE void checks_reverse(checks *c, const pk_call *base, void (*rule)(const pk_call *),
                            const pk_real *const *before, int wanted, const pk_real **cotangents)
{
    pk_call call = *base;
    for (int j = 0; j < base->node->input_count; j++) {
        const size_t count = base->rows * base->copies * base->in_width[j];
        cotangents[j] = NULL;
        if (!c->graph->nodes[base->node->inputs[j]].varies || (wanted >= 0 && j != wanted))
            continue;
        call.in_cotangent[j] = checks_take(c, count);
        call.accumulate[j] = before != NULL;
        if (before)
            memcpy(call.in_cotangent[j], before[j], count * sizeof(pk_real));
        cotangents[j] = call.in_cotangent[j];
    }
    checks_run(&call, rule);
}

FIXTURE void check_node_reverse(checks *c, const pk_call *base, const pk_real *const *v)
{
    const pk_node *node = base->node;
    const pk_real *reverse[PK_NODE_INPUTS], *other[PK_NODE_INPUTS], *before[PK_NODE_INPUTS] = {NULL};
    checks_reverse(c, base, node->operation->reverse, NULL, -1, reverse);
    for (int j = 0; j < node->input_count; j++)
        if (v[j])
            before[j] = checks_normals(c, base->rows * base->copies * base->in_width[j], 1);
    checks_reverse(c, base, node->operation->reverse, before, -1, other);
    for (int j = 0; j < node->input_count; j++) {
        const size_t width = base->in_width[j], count = base->rows * base->copies * width;
        const pk_real *one[PK_NODE_INPUTS] = {NULL}, *alone[PK_NODE_INPUTS];
        if (!v[j])
            continue;
        one[j] = v[j];
        const pk_real *tangent = checks_tangent(c, base, one, NULL);
        pk_real *sum = checks_take(c, count);
        for (size_t i = 0; i < count; i++)
            sum[i] = before[j][i] + reverse[j][i];
        checks_equal("reverse that adds", node, count, other[j], sum, 1e-14);
        checks_reverse(c, base, node->operation->reverse, NULL, j, alone);
        checks_equal("reverse of one input", node, count, alone[j], reverse[j], 1e-15);
        for (size_t copy = 0; copy < base->rows * base->copies; copy++) {
            const size_t row = copy / base->copies;
            double size = 0;
            const double left = checks_product(node->width, base->out_cotangent + copy * node->width,
                                               tangent + row * node->width, &size);
            const double right = checks_product(width, reverse[j] + copy * width, v[j] + row * width, &size);
            checks_adjoint("reverse and tangent", node, left, right, size);
        }
    }
}

/* gradient[row][copy][weight], by hand where the operation gives the outer products' factors. */
FIXTURE void checks_node_gradients(const pk_call *call)
{
    const pk_node *node = call->node;
    const size_t in = node->fan_in, out = node->fan_out, positions = node->positions;
    if (node->tangent_form == PK_TANGENT_ROWS) {
        node->operation->row_gradients(call);
        return;
    }
    for (size_t row = 0; row < call->rows; row++) {
        pk_call one = *call;
        one.rows = 1;
        one.in[0] += row * call->in_width[0];
        one.out = call->scratch;
        if (node->operation->unfold)
            node->operation->unfold(&one);
        const pk_real *places = node->operation->unfold ? one.out : one.in[0];
        for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
            pk_real *gradient = call->gradient + copy * node->weight_count;
            memset(gradient, 0, node->weight_count * sizeof *gradient);
            for (size_t j = 0; j < out; j++)
                for (size_t q = 0; q < positions; q++) {
                    const double delta =
                        call->out_cotangent[copy * node->width + (node->operation->channels_first
                                                                      ? j * positions + q
                                                                      : q * out + j)];
                    for (size_t k = 0; k < in; k++)
                        gradient[j * in + k] += delta * places[q * in + k];
                    if (node->weight_count > out * in)
                        gradient[out * in + j] += delta;
                }
        }
    }
}

FIXTURE void check_node_weights(checks *c, const pk_call *base, const pk_real *direction)
{
    const pk_node *node = base->node;
    const pk_real *none[PK_NODE_INPUTS] = {NULL}, *tangent = checks_tangent(c, base, none, direction);
    const size_t count = node->weight_count;
    pk_call call = *base;
    call.gradient = checks_take(c, base->rows * base->copies * count);
    checks_run(&call, checks_node_gradients);
    for (size_t copy = 0; copy < base->rows * base->copies; copy++) {
        double size = 0;
        const double left = checks_product(node->width, base->out_cotangent + copy * node->width,
                                           tangent + copy / base->copies * node->width, &size);
        const double right = checks_product(count, call.gradient + copy * count, direction, &size);
        checks_adjoint("row gradients and tangent", node, left, right, size);
    }
    /* The sum over rows, of the first copy alone. */
    pk_call summed = *base;
    pk_real *cotangent = checks_take(c, base->rows * node->width), *before = checks_normals(c, count, 1);
    summed.copies = 1;
    summed.out_cotangent = cotangent;
    summed.gradient = checks_take(c, count);
    memcpy(summed.gradient, before, count * sizeof *before);
    for (size_t row = 0; row < base->rows; row++) {
        memcpy(cotangent + row * node->width, base->out_cotangent + row * base->copies * node->width,
               node->width * sizeof *cotangent);
        for (size_t i = 0; i < count; i++)
            before[i] += call.gradient[row * base->copies * count + i];
    }
    checks_run(&summed, node->operation->weight_gradient);
    checks_equal("weight gradient and row gradients", node, count, summed.gradient, before, 1e-13);
    if (node->tangent_form != PK_TANGENT_OUTER || !node->operation->unfold)
        return;
    const size_t places = node->positions * node->fan_in;
    pk_real *one = checks_take(c, places);
    call.out = checks_take(c, base->rows * places);
    checks_run(&call, node->operation->unfold);
    for (size_t row = 0; row < base->rows; row++) {
        pk_call single = *base;
        single.rows = 1;
        single.in[0] += row * base->in_width[0];
        single.out = one;
        checks_run(&single, node->operation->unfold);
        assert_memory_equal(one, call.out + row * places, places * sizeof *one);
    }
}

/* Second derivatives against differences of the reverse rule. */
FIXTURE void check_node_curvature(checks *c, const pk_call *base, const pk_real *const *v)
{
    const pk_node *node = base->node;
    const pk_real *before[PK_NODE_INPUTS] = {NULL}, *added[PK_NODE_INPUTS], *reverse[PK_NODE_INPUTS];
    pk_real *expected[PK_NODE_INPUTS] = {NULL};
    pk_call call = *base;
    for (int j = 0; j < node->input_count; j++) {
        const size_t count = base->rows * base->copies * base->in_width[j];
        call.in_tangent[j] = v[j];
        if (!v[j])
            continue;
        before[j] = checks_normals(c, count, 1);
        expected[j] = checks_take(c, count);
        memcpy(expected[j], before[j], count * sizeof **expected);
    }
    checks_reverse(c, &call, node->operation->curvature, before, -1, added);
    const size_t keep = c->count;
    for (int k = 0; k < 4; k++) {
        const pk_call at = checks_move(c, base, v, NULL, checks_at[k] / CHECKS_STEP_INVERSE);
        checks_reverse(c, &at, node->operation->reverse, NULL, -1, reverse);
        for (int j = 0; j < node->input_count; j++)
            for (size_t i = 0; v[j] && i < base->rows * base->copies * base->in_width[j]; i++)
                expected[j][i] += checks_factor[k] * CHECKS_STEP_INVERSE * reverse[j][i];
        checks_release(c, keep);
    }
    for (int j = 0; j < node->input_count; j++)
        if (v[j])
            checks_slope("curvature and differences of reverse", node,
                         base->rows * base->copies * base->in_width[j], added[j], expected[j], 1e-8);
}

FIXTURE int checks_ascending(const void *a, const void *b)
{
    const double x = *(const pk_real *)a, y = *(const pk_real *)b;
    return (x > y) - (x < y);
}

/* Switches are linear in the inputs, and a piecewise-linear operation is linear between their zeros: along in + e v, e in
 * [0, 1]. */
FIXTURE void check_node_switches(checks *c, const pk_call *base, const pk_real *const *v)
{
    const pk_node *node = base->node;
    const size_t switches = node->operation->switch_count(node), width = node->width;
    pk_real *values[3];
    for (int k = 0; k < 3; k++) {
        pk_call at = checks_move(c, base, v, NULL, 0.5 * k);
        at.out = values[k] = checks_take(c, base->rows * switches);
        checks_run(&at, node->operation->switches);
    }
    pk_real *middle = checks_take(c, base->rows * switches), *kinks = checks_take(c, switches + 2);
    for (size_t i = 0; i < base->rows * switches; i++)
        middle[i] = 0.5 * (values[0][i] + values[2][i]);
    checks_equal("switches are linear", node, base->rows * switches, values[1], middle, 1e-14);
    for (size_t row = 0; node->operation->smoothness == PK_PIECEWISE_LINEAR && row < base->rows; row++) {
        size_t count = 0;
        kinks[count++] = 0;
        kinks[count++] = 1;
        for (size_t s = row * switches; s < (row + 1) * switches; s++)
            if ((values[0][s] > 0) != (values[2][s] > 0))
                kinks[count++] = values[0][s] / (values[0][s] - values[2][s]);
        qsort(kinks, count, sizeof *kinks, checks_ascending);
        pk_call one = *base;
        const pk_real *own[PK_NODE_INPUTS];
        one.rows = 1;
        for (int j = 0; j < node->input_count; j++) {
            one.in[j] += row * one.in_width[j];
            own[j] = v[j] ? v[j] + row * one.in_width[j] : NULL;
        }
        for (size_t k = 0; k + 1 < count; k++) {
            /* A little inside: operations may jump at their kinks. */
            const double length = kinks[k + 1] - kinks[k], a = kinks[k] + 1e-3 * length,
                         b = kinks[k + 1] - 1e-3 * length;
            const size_t keep = c->count;
            if (length < 1e-9)
                continue;
            const pk_call at_a = checks_move(c, &one, own, NULL, a), at_b = checks_move(c, &one, own, NULL, b),
                          at_m = checks_move(c, &one, own, NULL, 0.5 * (a + b));
            pk_real *mean = checks_take(c, width);
            for (size_t i = 0; i < width; i++)
                mean[i] = 0.5 * (at_a.out[i] + at_b.out[i]);
            checks_equal("linear between the zeros of its switches", node, width, at_m.out, mean, 1e-14);
            checks_release(c, keep);
        }
    }
}

/* Every rule of a node at the inputs in (rows x width each), with respect to the inputs that vary. */
FIXTURE void check_node(checks *c, const pk_node *node, const pk_real *weights, pk_real *const *value)
{
    const size_t keep = c->count, out = c->rows * node->width;
    const pk_real *v[PK_NODE_INPUTS] = {NULL}, *none[PK_NODE_INPUTS] = {NULL}, *direction = NULL;
    const pk_operation *operation = node->operation;
    int varies = 0;
    pk_call base;
    memset(&base, 0, sizeof base);
    base.node = node;
    base.rows = c->rows;
    base.copies = c->copies;
    base.weights = weights + node->weight_offset;
    for (int j = 0; j < node->input_count; j++) {
        const pk_node *input = &c->graph->nodes[node->inputs[j]];
        base.in[j] = value[node->inputs[j]];
        base.in_width[j] = input->width;
        varies |= input->varies;
        if (!input->varies)
            continue;
        /* A little beside the values: a maximum of zeros from relu would be at a kink. */
        pk_real *beside = checks_normals(c, c->rows * input->width, 0.1);
        for (size_t i = 0; i < c->rows * input->width; i++)
            beside[i] += base.in[j][i];
        base.in[j] = beside;
        v[j] = checks_normals(c, c->rows * input->width, 1);
    }
    if (node->weight_count)
        direction = checks_normals(c, node->weight_count, 1);
    base.out = checks_take(c, out);
    base.out_cotangent = checks_normals(c, c->copies * out, 1);
    checks_run(&base, operation->forward);
    for (size_t row = 0; row < c->rows; row++) { /* rows are independent */
        pk_call one = base;
        one.rows = 1;
        for (int j = 0; j < node->input_count; j++)
            one.in[j] += row * base.in_width[j];
        one.out = checks_take(c, node->width);
        checks_run(&one, operation->forward);
        checks_equal("a row by itself", node, node->width, one.out, base.out + row * node->width, 1e-14);
    }
    /* The tangent, whole and in parts. */
    const pk_real *tangent = checks_tangent(c, &base, v, direction);
    pk_real *sum = checks_take(c, out);
    memcpy(sum, checks_tangent(c, &base, none, direction), out * sizeof *sum);
    assert_true(direction || fixture_largest(out, sum) == 0);
    for (int j = 0; j < node->input_count; j++) {
        const pk_real *one[PK_NODE_INPUTS] = {NULL};
        one[j] = v[j];
        const pk_real *part = checks_tangent(c, &base, one, NULL);
        for (size_t i = 0; i < out; i++)
            sum[i] += part[i];
    }
    checks_equal("tangent in parts", node, out, tangent, sum, 1e-13);
    if (checks_have_slopes(operation->switch_count != NULL,
                           operation->smoothness == PK_SURROGATE)) {
        checks_difference(c, &base, v, direction, sum);
        checks_slope("tangent and differences", node, out, tangent, sum, 1e-8);
    }
    if (varies)
        check_node_reverse(c, &base, v);
    if (node->weight_count)
        check_node_weights(c, &base, direction);
    if (varies && operation->curvature && checks_have_slopes(operation->switch_count != NULL, 0))
        check_node_curvature(c, &base, v);
    if (varies && operation->switch_count)
        check_node_switches(c, &base, v);
    checks_release(c, keep);
}

/* ---- whole graphs ---------------------------------------------------------------------------------------- */

/* gradient (rows x copies x P) of the cotangents that stand in the tape, each row at its own t. */
FIXTURE void checks_row_gradients(checks *c, const pk__tape *tape, const pk__line *line, pk_real *gradient)
{
    const pk_graph *graph = tape->graph;
    const size_t keep = c->count;
    pk_real *weights = checks_take(c, graph->parameters);
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        pk_real *own = checks_take(c, c->copies * node->weight_count);
        for (size_t row = 0; node->weight_count && row < c->rows; row++) {
            pk_call call;
            memset(&call, 0, sizeof call);
            call.node = node;
            call.rows = 1;
            call.copies = c->copies;
            for (size_t p = 0; p < node->weight_count; p++)
                weights[p] = line->weights[node->weight_offset + p] +
                             line->t[row] * line->direction[node->weight_offset + p];
            call.weights = weights;
            for (int j = 0; j < node->input_count; j++) {
                call.in_width[j] = graph->nodes[node->inputs[j]].width;
                call.in[j] = tape->value[node->inputs[j]] + row * call.in_width[j];
            }
            call.out = tape->value[n] + row * node->width;
            call.out_cotangent = tape->cotangent[n] + row * c->copies * node->width;
            call.gradient = own;
            checks_run(&call, checks_node_gradients);
            for (size_t copy = 0; copy < c->copies; copy++)
                memcpy(gradient + (row * c->copies + copy) * graph->parameters + node->weight_offset,
                       own + copy * node->weight_count, node->weight_count * sizeof *own);
        }
    }
    checks_release(c, keep);
}

/* A graph's rules at random weights, directions and, where inputs (3 rows) is NULL, random inputs: each operation by
 * itself, then the tape along a line with an own t for each row against plain weights there, differences and
 * adjoints. */
FIXTURE void check_graph_at(pk_context *context, const pk_graph *graph, uint64_t seed, const pk_real *inputs)
{
    enum { ROWS = 3, COPIES = 2 };
    static const pk_real t[ROWS] = {0, 0.5, 0.875};
    const size_t P = graph->parameters, C = graph->output_width, last = graph->node_count - 1;
    checks c;
    memset(&c, 0, sizeof c);
    c.graph = graph;
    c.rows = ROWS;
    c.copies = COPIES;
    c.seed = seed;
    const pk_real *w = checks_normals(&c, P, 0.5), *d = checks_normals(&c, P, 0.5);
    const pk_real *x = inputs ? inputs : checks_normals(&c, ROWS * graph->input_width, 1);
    const pk_real *u = checks_normals(&c, ROWS * COPIES * C, 1);
    pk_real *at = checks_take(&c, P), *difference = checks_take(&c, C);
    pk_real *gradient = checks_take(&c, ROWS * COPIES * P), *sum = checks_take(&c, P);
    holder line, plain;
    memset(&line, 0, sizeof line);
    memset(&plain, 0, sizeof plain);
    line.context = plain.context = *context;
    line.graph = plain.graph = *graph;
    hold_graph(&line, ROWS, COPIES);
    hold_graph(&plain, ROWS, COPIES);
    const pk__line start = {w, NULL, NULL}, along = {w, d, t}, there = {at, NULL, NULL};

    pk__pass_forward(&plain.tape, &start, ROWS, x);
    for (size_t n = 1; n <= last; n++)
        check_node(&c, &graph->nodes[n], w, plain.tape.value);

    pk__pass_forward(&line.tape, &along, ROWS, x);
    pk__pass_tangent(&line.tape, &along, ROWS);
    memcpy(pk__pass_seed(&line.tape), u, ROWS * COPIES * C * sizeof *u);
    pk__pass_reverse(&line.tape, &along, ROWS, COPIES);
    checks_row_gradients(&c, &line.tape, &along, gradient);
    for (size_t row = 0; row < ROWS; row++) {
        const pk_real *tangent = line.tape.tangent[last] + row * C;
        memset(difference, 0, C * sizeof *difference);
        for (int k = 0; k <= 4; k++) { /* last at t itself */
            const double moved = t[row] + (k < 4 ? checks_at[k] / CHECKS_STEP_INVERSE : 0);
            for (size_t p = 0; p < P; p++)
                at[p] = w[p] + moved * d[p];
            pk__pass_forward(&plain.tape, &there, 1, x + row * graph->input_width);
            for (size_t i = 0; k < 4 && i < C; i++)
                difference[i] += checks_factor[k] * CHECKS_STEP_INVERSE * pk__pass_output(&plain.tape)[i];
        }
        if (checks_have_slopes(graph->switched, graph->surrogate))
            checks_slope("the graph's tangent and differences", &graph->nodes[last], C, tangent, difference,
                         1e-8);
        memcpy(pk__pass_seed(&plain.tape), u + row * COPIES * C, COPIES * C * sizeof *u);
        pk__pass_reverse(&plain.tape, &there, 1, COPIES);
        for (size_t n = 1; n <= last; n++) {
            const pk_node *node = &graph->nodes[n];
            checks_equal("value along a line", node, node->width, line.tape.value[n] + row * node->width,
                         plain.tape.value[n], 1e-12);
            if (node->varies)
                checks_equal("cotangent along a line", node, COPIES * node->width,
                             line.tape.cotangent[n] + row * COPIES * node->width, plain.tape.cotangent[n],
                             1e-12);
        }
        for (size_t copy = row * COPIES; copy < (row + 1) * COPIES; copy++) {
            double size = 0;
            const double left = checks_product(C, u + copy * C, tangent, &size);
            const double right = checks_product(P, gradient + copy * P, d, &size);
            checks_adjoint("the graph's gradients and tangent", &graph->nodes[last], left, right, 10 * size);
        }
    }
    /* The sum over rows, each at its own t. */
    for (size_t row = 0; row < ROWS; row++)
        memcpy(pk__pass_seed(&line.tape) + row * C, u + row * COPIES * C, C * sizeof *u);
    pk__pass_reverse(&line.tape, &along, ROWS, 1);
    for (size_t p = 0; p < P; p++)
        at[p] = sum[p] = (double)p / (double)P;
    pk__pass_weight_gradient(&line.tape, ROWS, at);
    for (size_t row = 0; row < ROWS; row++)
        for (size_t p = 0; p < P; p++)
            sum[p] += gradient[row * COPIES * P + p];
    checks_equal("the graph's weight gradient and row gradients", &graph->nodes[last], P, at, sum, 1e-12);
    pk_release(&line.context, line.memory);
    pk_release(&plain.context, plain.memory);
    checks_release(&c, 0);
}

FIXTURE void check_graph(pk_context *context, const pk_graph *graph, uint64_t seed)
{
    check_graph_at(context, graph, seed, NULL);
}

/* The same for a line of the network language. */
FIXTURE void check_network_text(const char *network, uint64_t seed)
{
    pk_context context;
    pk_graph graph;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    assert_ok(&context, pk_network_parse(&context, network, &graph));
    check_graph(&context, &graph, seed);
    pk_graph_release(&context, &graph);
    assert_int_equal(context.memory_used, 0);
}

#endif
