/* pathkernel/path/quadrature.h: the rules that integrate the gradient of a readout h(f(w + t d, x)) with respect to the weights
 * over a step, t from 0 to 1: the literature's rules, adaptive Gauss-Legendre for smooth networks, and the rule that is
 * exact for piecewise-linear ones. integrator.h applies them.
 */
#ifndef PATHKERNEL_QUADRATURE_H
#define PATHKERNEL_QUADRATURE_H
#include "kinks.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_rule {
    PK_RULE_AUTO,      /* exact where the network is piecewise linear, adaptive Gauss elsewhere */
    PK_RULE_EXACT,     /* split at the kinks; refused where the integrand is no piecewise polynomial */
    PK_RULE_GAUSS,     /* Gauss-Legendre, nodes per step */
    PK_RULE_MIDPOINT,  /* composite midpoint */
    PK_RULE_TRAPEZOID, /* composite trapezoid, nodes >= 2 points */
    PK_RULE_LEFT       /* t = 0, or the left ends of nodes subintervals (TracIn with every step) */
} pk_rule;

typedef struct pk_quadrature {
    pk_rule rule;
    int nodes; /* per step; 0: 1 (trapezoid: 2). Ignored by auto and exact */
} pk_quadrature;

/* The name of a rule, such as "gauss"; NULL behind the last one. Rules are numbered from 0 on without a gap. */
PK_API const char *pk_rule_name(pk_rule rule);

/* "auto", "exact", "gauss:N", "midpoint:N", "trapezoid:N", "left" or "left:N", N nodes a step. PK_FORMAT lists those that
 * are known, each with the numbers that it takes; *quadrature is untouched then. Whether the rule fits a network tells pk_quadrature_check. */
PK_API PK__MUST_USE pk_status pk_quadrature_parse(pk_context *context, const char *text,
                                                  pk_quadrature *quadrature);

/* The most nodes of a rule; Gauss-Legendre of a decomposition and of a kernel have fewer. */
enum { PK_GAUSS_NODES = 32, PK_KERNEL_GAUSS_NODES = 1000, PK_RULE_NODES = 1000000 };

/* Gauss-Legendre on [0, 1]: count nodes, exact for degree 2 count - 1; count <= 1000 or so. By Newton's
 * method on the Legendre polynomial in long double. Cost O(count^2). */
PK_API void pk_gauss_legendre(int count, double *nodes, double *weights);

/* What is decomposed: a readout h(f) of the network's outputs f. */
typedef enum pk_readout_kind {
    PK_READOUT_ALL,     /* h = f */
    PK_READOUT_ONE,     /* h = f[output] */
    PK_READOUT_LABEL,   /* h = f[labels[row]] */
    PK_READOUT_FUNCTION /* the caller's */
} pk_readout_kind;

typedef struct pk_readout {
    pk_readout_kind kind;
    size_t output;
    const int64_t *labels; /* one per test row */
    /* h[0 .. count-1] = h(f) of test row row, slope[k * outputs + c] = dh_k / df_c; called from several
     * threads at once, differentiable along the path. */
    size_t count;
    void (*function)(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope);
    void *user;
} pk_readout;

/* The number of values of h for a network with outputs outputs. */
PK_API size_t pk_readout_count(const pk_readout *readout, size_t outputs);

/* PK_UNSUPPORTED where the rule does not fit the network or the readout, PK_ARGUMENT for a bad node count. */
PK_API PK__MUST_USE pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                                  const pk_graph *graph, const pk_readout *readout);

PK__END_C
/* <<< declarations */
#endif

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && \
    !defined(PATHKERNEL_QUADRATURE_INTERNALS_KNOWN)
#define PATHKERNEL_QUADRATURE_INTERNALS_KNOWN
/* >>> internals */
/* h (count) and, unless NULL, slope (count x outputs) of one row. h may be NULL for the built-in kinds. */
PK__INTERNAL void pk__readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                                    pk_real *h, pk_real *slope);
/* Fills a table of the rules 1 .. PK_GAUSS_NODES, PK_GAUSS_NODES (PK_GAUSS_NODES + 1) / 2 numbers each. */
PK__INTERNAL void pk__gauss_table(double *nodes, double *weights);
/* <<< internals */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_QUADRATURE_IMPLEMENTED)
#define PATHKERNEL_QUADRATURE_IMPLEMENTED
/* >>> implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

PK_API void pk_gauss_legendre(int count, double *nodes, double *weights)
{
    for (int i = 0; i < count; i++) {
        long double x = cosl(3.14159265358979323846264338327950288L * (i + 0.75L) / (count + 0.5L)), slope = 1;
        for (int iteration = 0; iteration < 100; iteration++) {
            long double p = 1, before = 0;
            for (int k = 1; k <= count; k++) {
                long double next = ((2 * k - 1) * x * p - (k - 1) * before) / k;
                before = p;
                p = next;
            }
            slope = count * (before - x * p) / (1 - x * x);
            long double change = p / slope;
            x -= change;
            if (fabsl(change) < 4 * LDBL_EPSILON)
                break;
        }
        /* Descending x: the last node first, so that nodes ascend. */
        nodes[count - 1 - i] = (double)((1 + x) / 2);
        weights[count - 1 - i] = (double)(1 / ((1 - x * x) * slope * slope));
    }
    if (count % 2)
        nodes[count / 2] = 0.5;
}

PK__INTERNAL void pk__gauss_table(double *nodes, double *weights)
{
    for (int n = 1; n <= PK_GAUSS_NODES; n++)
        pk_gauss_legendre(n, nodes + n * (n - 1) / 2, weights + n * (n - 1) / 2);
}

/* How large the polynomial through n nodes in [0, 1] that is 1 at node q and 0 at the others is at x. */
PK__PRIVATE double pk__lagrange(int n, const double *node, int q, double x)
{
    double product = 1;
    for (int r = 0; r < n; r++)
        if (r != q)
            product *= (x - node[r]) / (node[q] - node[r]);
    return product;
}

PK_API size_t pk_readout_count(const pk_readout *readout, size_t outputs)
{
    switch (readout->kind) {
    case PK_READOUT_ALL: return outputs;
    case PK_READOUT_FUNCTION: return readout->count;
    case PK_READOUT_ONE:
    case PK_READOUT_LABEL:
    default: return 1;
    }
}

PK__INTERNAL void pk__readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                                    pk_real *h, pk_real *slope)
{
    size_t count = pk_readout_count(readout, outputs);
    if (readout->kind == PK_READOUT_FUNCTION) {
        readout->function(readout->user, row, f, h, slope);
        return;
    }
    for (size_t k = 0; k < count; k++) {
        size_t output = readout->kind == PK_READOUT_ALL   ? k
                        : readout->kind == PK_READOUT_ONE ? readout->output
                                                          : (size_t)readout->labels[row];
        if (h && f)
            h[k] = f[output];
        if (slope) {
            memset(slope + k * outputs, 0, outputs * sizeof *slope);
            slope[k * outputs + output] = 1;
        }
    }
}

/* The integrand is a piecewise polynomial whose pieces can all be found. */
PK__PRIVATE int pk__is_exact(const pk_graph *graph, const pk_readout *readout)
{
    if (graph->degree < 0 || graph->surrogate || readout->kind == PK_READOUT_FUNCTION ||
        (graph->degree + 1) / 2 > PK_GAUSS_NODES)
        return 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (pk__is_switch(&graph->nodes[n]) && graph->nodes[n].input_degree > PK__PATH_DEGREE)
            return 0;
    return 1;
}

/* Names; whether a number of nodes stands behind them, in decompositions and in kernels; and the least number. */
enum { PK__NO_RULE, PK__NO_NODES, PK__MAY_HAVE_NODES, PK__NEEDS_NODES };
static const struct {
    const char *name;
    int nodes, kernel_nodes, least;
} pk__rules[] = {[PK_RULE_AUTO] = {"auto", PK__NO_NODES, PK__NO_NODES, 0},
                 [PK_RULE_EXACT] = {"exact", PK__NO_NODES, PK__NO_RULE, 0},
                 [PK_RULE_GAUSS] = {"gauss", PK__NEEDS_NODES, PK__NEEDS_NODES, 1},
                 [PK_RULE_MIDPOINT] = {"midpoint", PK__NEEDS_NODES, PK__NEEDS_NODES, 1},
                 [PK_RULE_TRAPEZOID] = {"trapezoid", PK__NEEDS_NODES, PK__MAY_HAVE_NODES, 2},
                 [PK_RULE_LEFT] = {"left", PK__MAY_HAVE_NODES, PK__NO_NODES, 1}};
enum { PK__RULES = (int)(sizeof pk__rules / sizeof *pk__rules) };

PK_API const char *pk_rule_name(pk_rule rule)
{
    return (int)rule >= 0 && (int)rule < PK__RULES ? pk__rules[rule].name : NULL;
}

/* ":N" behind the name of a rule; 0 where it is no number of nodes that the rule may have. */
static int pk__rule_nodes(const char *text, int allowed, int least, int most, int *nodes)
{
    *nodes = 0;
    if (!*text)
        return allowed != PK__NEEDS_NODES;
    if (allowed == PK__NO_NODES || !text[1])
        return 0;
    for (const char *digit = text + 1; *digit; digit++) {
        if (*digit < '0' || *digit > '9' || *nodes > most)
            return 0;
        *nodes = 10 * *nodes + (*digit - '0');
    }
    return *nodes >= least && *nodes <= most;
}

/* How the rules of decompositions, or of kernels, are written. */
PK__PRIVATE pk_status pk__rule_parse(pk_context *context, const char *text, int kernel,
                                     pk_quadrature *quadrature)
{
    char names[192] = "";
    if (!text || !quadrature)
        return pk__fail(context, PK_ARGUMENT, "quadrature: the text or the place for the rule is NULL");
    const size_t length = strcspn(text, ":");
    for (int i = 0; i < PK__RULES; i++) {
        const int allowed = kernel ? pk__rules[i].kernel_nodes : pk__rules[i].nodes;
        const int most = kernel && i == PK_RULE_GAUSS ? (int)PK_KERNEL_GAUSS_NODES
                         : i == PK_RULE_GAUSS         ? (int)PK_GAUSS_NODES
                                                      : (int)PK_RULE_NODES;
        char range[48] = "";
        int nodes;
        if (allowed == PK__NO_RULE)
            continue;
        if (strlen(pk__rules[i].name) == length && strncmp(pk__rules[i].name, text, length) == 0 &&
            pk__rule_nodes(text + length, allowed, pk__rules[i].least, most, &nodes)) {
            quadrature->rule = (pk_rule)i;
            quadrature->nodes = nodes;
            return PK_OK;
        }
        if (allowed != PK__NO_NODES)
            snprintf(range, sizeof range, allowed == PK__NEEDS_NODES ? ":N (%d to %d)" : "[:N] (%d to %d)",
                     pk__rules[i].least, most);
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s%s", *names ? ", " : "",
                 pk__rules[i].name, range);
    }
    return pk__fail(context, PK_FORMAT, "'%.40s' is not a rule; these are: %s", text, names);
}

PK_API pk_status pk_quadrature_parse(pk_context *context, const char *text, pk_quadrature *quadrature)
{
    return pk__rule_parse(context, text, 0, quadrature);
}

PK_API pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                     const pk_graph *graph, const pk_readout *readout)
{
    if (!pk_rule_name(quadrature->rule))
        return pk__fail(context, PK_ARGUMENT, "quadrature rule %d does not exist", (int)quadrature->rule);
    if (quadrature->nodes < 0 || quadrature->nodes > PK_RULE_NODES)
        return pk__fail(context, PK_ARGUMENT, "a quadrature with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_RULE_NODES);
    if (quadrature->rule == PK_RULE_GAUSS && quadrature->nodes > PK_GAUSS_NODES)
        return pk__fail(context, PK_ARGUMENT, "Gauss-Legendre with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_GAUSS_NODES);
    if (quadrature->nodes && quadrature->nodes < pk__rules[quadrature->rule].least)
        return pk__fail(context, PK_ARGUMENT, "the %s rule needs at least %d nodes",
                        pk__rules[quadrature->rule].name, pk__rules[quadrature->rule].least);
    if (quadrature->rule == PK_RULE_EXACT && !pk__is_exact(graph, readout))
        return pk__fail(
            context, PK_UNSUPPORTED,
            "the exact rule needs a piecewise-linear network (degree at most %d at a kink) and a linear "
            "readout; use auto, which measures its closure",
            (int)PK__PATH_DEGREE);
    return PK_OK;
}

PK__END_CODE
/* <<< implementation */
#endif
