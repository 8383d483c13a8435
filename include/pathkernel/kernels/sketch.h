/* pathkernel/kernels/sketch.h: tangent kernels from few numbers a row, with the error that this makes.
 *
 * Gradients of P numbers are mapped to m numbers by a random linear map R with E R^T R = 1, so that products are kept on
 * average (Johnson and Lindenstrauss 1984), with a untied of about sqrt(2 / m) of |g| |g'|:
 *     Rademacher   R_ip = +-1 / sqrt(m)                                                                       m P a row
 *     SRHT         R = sqrt(1/m) (m rows of H, drawn without replacement) D, D signs, H Walsh and Hadamard's matrix of
 *                  n = 2^k >= P numbers (Ailon and Chazelle 2006; Tropp 2011)                                n log n a row
 * R is a function of the seed (random.h) and is never stored. With m = n the SRHT is an isometry: the kernel is exact.
 *
 * Features of the infinite ReLU network's tangent kernel (Zandieh et al. 2021, arXiv 2106.07880), layer by layer:
 *     z <- sqrt(2/m) relu(W z),    t <- [z, Sketch(t (x) sqrt(2/m) 1(W z > 0))],     W standard normal:
 * < t(x), t(y) > tends to the kernel, with an error like 1 / sqrt(m). The tensor product is never formed: its sketch multiplies
 * random numbers of the two transforms (Ahle et al. 2020).
 */
#ifndef PATHKERNEL_SKETCH_H
#define PATHKERNEL_SKETCH_H
#include "kernel.h"

/* >>> declarations */
PK__BEGIN_C

typedef enum pk_sketch_kind { PK_SKETCH_RADEMACHER = 0, PK_SKETCH_SRHT } pk_sketch_kind;

typedef struct pk_sketch {
    pk_sketch_kind kind;
    size_t size;   /* m */
    uint64_t seed; /* equal seeds, sizes and kinds: the same map */
} pk_sketch;

/* sketched (rows x m) = R v of each row v of vectors (rows x P). One thread. Cost: m P a row and a random number for 64 signs, or
 * n log2 n a row. PK_ARGUMENT: an unknown kind, m = 0, an SRHT with m > n; PK_SHAPE; PK_MEMORY, PK_MEMORY_LIMIT, PK_OVERFLOW. */
PK_API PK__MUST_USE pk_status pk_sketch_vectors(pk_context *context, const pk_sketch *sketch, pk_matrix vectors,
                                                pk_matrix sketched);
/* features (rows C x m): the sketched gradients of all outputs, row r C + c that of output c for inputs r. Jacobians are formed
 * for a few rows at a time. PK_CANCELLED and the statuses of pk_jacobian besides. */
PK_API PK__MUST_USE pk_status pk_sketch_gradients(pk_context *context, const pk_graph *graph,
                                                  const pk_real *weights, pk_matrix inputs,
                                                  const pk_sketch *sketch, pk_matrix features);

typedef struct pk_sketch_report {
    double error; /* |estimate - kernel| / |kernel|, Frobenius norms, on the sampled block; 0 where that is 0 */
    size_t rows, columns; /* of the block that was computed exactly: sampled by the seed, at most 16 x 16 */
} pk_sketch_report;

/* The tangent kernel of pk_kernel_ntk (trace = 0) or pk_kernel_ntk_trace (trace = 1), estimated from the sketched gradients, with
 * its error measured on a sample beside it: not a bound. gram, y as there. report may be NULL: nothing is measured.
 * Memory: m numbers for each output of each row. Of a network with surrogate gradients it is the kernel of these
 * (nodes.h). */
PK_API PK__MUST_USE pk_status pk_kernel_sketched(pk_context *context, const pk_graph *graph,
                                                 const pk_real *weights, pk_matrix x, pk_matrix y,
                                                 const pk_sketch *sketch, int trace, pk_matrix gram,
                                                 pk_sketch_report *report);

typedef struct pk_relu_features {
    size_t layers;     /* hidden layers, 1 or more */
    size_t width;      /* m: random units of each layer */
    size_t sketch;     /* numbers of the sketched tensor product */
    double weight_std; /* 0: sqrt(2) */
    uint64_t seed;
} pk_relu_features;

/* features (rows x (width + sketch)): products of rows tend to the infinite-width tangent kernel of
 * `dense; relu; ...; dense` in NTK parametrization without biases, of one output, inputs scaled by 1 / sqrt(D). Rows of zeros
 * have features of zeros. Cost a layer: width^2 normal numbers, 2 width^2 flops a row. PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW,
 * PK_MEMORY, PK_MEMORY_LIMIT, PK_CANCELLED. */
PK_API PK__MUST_USE pk_status pk_relu_ntk_features(pk_context *context, pk_matrix inputs,
                                                   const pk_relu_features *options, pk_matrix features);

PK__END_C
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_SKETCH_IMPLEMENTED)
#define PATHKERNEL_SKETCH_IMPLEMENTED
/* >>> implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

enum {
    PK__SKETCH_SAMPLE = 16,       /* rows of the sampled block */
    PK__SKETCH_NUMBERS = 1 << 20, /* of the Jacobians of a block, or of one row */
    PK__SKETCH_ROWS = 1 << 8      /* of a block, at most */
};

/* Streams of the generator under one seed. */
enum { PK__STREAM_SIGNS = 1, PK__STREAM_PLACES, PK__STREAM_SAMPLE, PK__STREAM_LAYERS };

/* The smallest power of two that is at least count; 0 where there is none. */
static size_t pk__power_of_two(size_t count)
{
    size_t n = 1;
    while (n < count && n <= SIZE_MAX / 4)
        n *= 2;
    return n < count ? 0 : n;
}

/* x = H x, without a factor, n a power of two. */
static void pk__walsh_hadamard(size_t n, double *x)
{
    for (size_t half = 1; half < n; half *= 2)
        for (size_t at = 0; at < n; at += 2 * half)
            for (size_t i = at; i < at + half; i++) {
                const double a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

/* The signs 64 k ... 64 k + 63 of a sequence, a bit each. */
static uint64_t pk__signs(uint64_t seed, uint64_t stream, uint64_t k)
{
    pk_random random = {seed, stream, k};
    return pk_random_bits(&random);
}

/* x (n) = H D v; v has count numbers. */
static void pk__signed_transform(uint64_t seed, uint64_t stream, size_t count, const pk_real *v, size_t n,
                                 double *x)
{
    uint64_t bits = 0;
    for (size_t p = 0; p < count; p++) {
        bits = p % 64 ? bits >> 1 : pk__signs(seed, stream, p / 64);
        x[p] = bits & 1 ? (double)v[p] : -(double)v[p];
    }
    memset(x + count, 0, (n - count) * sizeof *x);
    pk__walsh_hadamard(n, x);
}

static pk_status pk__sketch_check(pk_context *context, const pk_sketch *sketch, size_t numbers)
{
    if (!sketch || !sketch->size)
        return pk__fail(context, PK_ARGUMENT, "sketch: there is none, or its size is 0");
    if (sketch->kind != PK_SKETCH_RADEMACHER && sketch->kind != PK_SKETCH_SRHT)
        return pk__fail(context, PK_ARGUMENT,
                        "sketch: kind %d is neither PK_SKETCH_RADEMACHER nor PK_SKETCH_SRHT",
                        (int)sketch->kind);
    const size_t n = pk__power_of_two(numbers);
    if (!n || n > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "sketch: %zu numbers are too many", numbers);
    if (sketch->kind == PK_SKETCH_SRHT && sketch->size > n)
        return pk__fail(
            context, PK_ARGUMENT,
            "sketch: size %zu of an SRHT of %zu numbers, which has %zu rows; sketches larger than the "
            "gradient save nothing",
            sketch->size, numbers, n);
    return PK_OK;
}

/* Random signs: one after the other number of the rows. sums: rows x m. */
static void pk__rademacher(const pk_sketch *sketch, pk_matrix vectors, double *sums)
{
    const size_t m = sketch->size, words = pk__blocks(m, 64);
    memset(sums, 0, vectors.rows * m * sizeof *sums);
    for (size_t p = 0; p < vectors.cols; p++)
        for (size_t k = 0; k < words; k++) {
            const uint64_t bits = pk__signs(sketch->seed, PK__STREAM_SIGNS, p * words + k);
            const size_t first = 64 * k, count = pk__min(m - first, 64);
            double sign[64];
            for (size_t i = 0; i < count; i++)
                sign[i] = bits >> i & 1 ? 1 : -1;
            for (size_t r = 0; r < vectors.rows; r++) {
                const double value = vectors.data[r * vectors.ld + p];
                double *to = sums + r * m + first;
                for (size_t i = 0; i < count; i++)
                    to[i] += sign[i] * value;
            }
        }
}

PK_API pk_status pk_sketch_vectors(pk_context *context, const pk_sketch *sketch, pk_matrix vectors,
                                   pk_matrix sketched)
{
    pk_status status = pk__sketch_check(context, sketch, vectors.cols);
    if (!status)
        status = pk__sweep_matrix(context, "sketch", "vectors", vectors, vectors.rows, vectors.cols);
    if (!status)
        status = pk__sweep_matrix(context, "sketch", "sketched vectors", sketched, vectors.rows, sketch->size);
    if (!status && pk__matrices_overlap(vectors, sketched))
        status = pk__fail(context, PK_ARGUMENT, "sketch: the result overlaps the vectors");
    if (status || !vectors.rows)
        return status;
    const size_t m = sketch->size, n = pk__power_of_two(vectors.cols);
    const int hadamard = sketch->kind == PK_SKETCH_SRHT;
    const size_t block = hadamard ? 1 : pk__min(vectors.rows, PK__SKETCH_ROWS);
    double *numbers;
    int64_t *place;
    pk__arena arena = {NULL, 0, 0, m > SIZE_MAX / 64};
    do {
        numbers = pk__arena_take(&arena, block, (hadamard ? n : m) * sizeof *numbers);
        place = pk__arena_take(&arena, hadamard ? n : 0, sizeof *place);
    } while (pk__arena_again(context, &arena, "a sketch", &status));
    /* The first m of a shuffled 0 ... n - 1. */
    for (size_t i = 0; !status && hadamard && i < n; i++)
        place[i] = (int64_t)i;
    pk_random random = {status ? 0 : sketch->seed, PK__STREAM_PLACES, 0};
    for (size_t i = 0; !status && hadamard && i < m; i++) {
        const size_t other = i + (size_t)pk_random_below(&random, n - i);
        const int64_t swap = place[i];
        place[i] = place[other];
        place[other] = swap;
    }
    const double scale = status ? 0 : 1 / sqrt((double)m);
    for (size_t first = 0; !status && first < vectors.rows; first += block) {
        pk_matrix part = vectors;
        part.rows = pk__min(block, vectors.rows - first);
        part.data += first * vectors.ld;
        if (hadamard)
            pk__signed_transform(sketch->seed, PK__STREAM_SIGNS, vectors.cols, part.data, n, numbers);
        else
            pk__rademacher(sketch, part, numbers);
        for (size_t r = 0; r < part.rows; r++)
            for (size_t i = 0; i < m; i++)
                sketched.data[(first + r) * sketched.ld + i] =
                    (pk_real)(scale * (hadamard ? numbers[place[i]] : numbers[r * m + i]));
    }
    pk_release(context, arena.base);
    return status;
}

PK_API pk_status pk_sketch_gradients(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix inputs, const pk_sketch *sketch, pk_matrix features)
{
    pk_status status = pk__sweep_graph(context, "sketch", graph, weights);
    if (status)
        return status;
    const size_t P = graph->parameters, C = graph->output_width;
    size_t one = 0, all = 0;
    status = pk__sketch_check(context, sketch, P);
    if (!status)
        status = pk__sweep_matrix(context, "sketch", "inputs", inputs, inputs.rows, graph->input_width);
    if (!status && (!pk__multiply(C, P, &one) || one > SIZE_MAX / 64 || !pk__multiply(inputs.rows, C, &all)))
        status = pk__fail(context, PK_OVERFLOW, "sketch: the gradients of one row overflow");
    if (!status)
        status = pk__sweep_matrix(context, "sketch", "features", features, all, sketch->size);
    if (status || !inputs.rows)
        return status;
    const size_t block =
        pk__max(1, pk__min(pk__min(inputs.rows, PK__SKETCH_ROWS), PK__SKETCH_NUMBERS / pk__max(one, 1)));
    pk_real *jacobian = NULL;
    status = pk_allocate(context, block, one * sizeof *jacobian, "a sketch", &jacobian);
    for (size_t first = 0; !status && first < inputs.rows; first += block) {
        const size_t rows = pk__min(block, inputs.rows - first);
        const pk_matrix part = {inputs.data + first * inputs.ld, rows, inputs.cols, inputs.ld},
                        to = {features.data + first * C * features.ld, rows * C, features.cols, features.ld};
        status = pk__progress(context, "sketch", (double)first / (double)inputs.rows);
        if (!status)
            status = pk_jacobian(context, graph, weights, part, pk_matrix_view(jacobian, rows * C, P),
                                 pk_matrix_view(NULL, 0, 0));
        if (!status)
            status = pk_sketch_vectors(context, sketch, pk_matrix_view(jacobian, rows * C, P), to);
    }
    pk_release(context, jacobian);
    return status;
}

/* ---- kernels ------------------------------------------------------------------------------------------- */

/* Which rows of `count` are in the sample: at most PK__SKETCH_SAMPLE, ascending draws of a random order. */
static size_t pk__sketch_sample(uint64_t seed, uint64_t stream, size_t count, size_t *rows)
{
    const size_t wanted = pk__min(count, PK__SKETCH_SAMPLE);
    pk_random random = {seed, stream, 0};
    size_t taken = 0;
    for (size_t i = 0; i < count && taken < wanted; i++) /* Knuth's algorithm S */
        if (pk_random_below(&random, count - i) < wanted - taken)
            rows[taken++] = i;
    return taken;
}

static pk_status pk__sketch_measure(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                    pk_matrix x, pk_matrix y, uint64_t seed, size_t kept, pk_matrix gram,
                                    pk_sketch_report *report)
{
    size_t rows[2][PK__SKETCH_SAMPLE];
    const size_t D = graph->input_width, a = pk__sketch_sample(seed, PK__STREAM_SAMPLE, x.rows, rows[0]),
                 b = pk__sketch_sample(seed, PK__STREAM_SAMPLE + 100, y.rows, rows[1]);
    const size_t entries = a * kept * b * kept;
    pk_real *inputs, *exact;
    pk_status status;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        inputs = pk__arena_take(&arena, a + b, D * sizeof *inputs);
        exact = pk__arena_take(&arena, entries, sizeof *exact);
    } while (pk__arena_again(context, &arena, "a sketch's sample", &status));
    report->rows = a, report->columns = b, report->error = 0;
    if (status)
        return status;
    for (size_t i = 0; i < a + b; i++) {
        const pk_matrix *from = i < a ? &x : &y;
        memcpy(inputs + i * D, from->data + (i < a ? rows[0][i] : rows[1][i - a]) * from->ld,
               D * sizeof *inputs);
    }
    const pk_matrix left = pk_matrix_view(inputs, a, D), right = pk_matrix_view(inputs + a * D, b, D),
                    to = pk_matrix_view(exact, a * kept, b * kept);
    status = kept == 1 && graph->output_width > 1
                 ? pk_kernel_ntk_trace(context, graph, weights, left, right, to)
                 : pk_kernel_ntk(context, graph, weights, left, right, to);
    double apart = 0, size = 0;
    for (size_t i = 0; !status && i < entries; i++) {
        const size_t r = i / (b * kept), c = i % (b * kept);
        const double estimate =
            gram.data[(rows[0][r / kept] * kept + r % kept) * gram.ld + rows[1][c / kept] * kept + c % kept];
        apart += (estimate - exact[i]) * (estimate - exact[i]);
        size += (double)exact[i] * exact[i];
    }
    report->error = size > 0 ? sqrt(apart / size) : 0;
    pk_release(context, arena.base);
    return status;
}

PK_API pk_status pk_kernel_sketched(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                    pk_matrix x, pk_matrix y, const pk_sketch *sketch, int trace,
                                    pk_matrix gram, pk_sketch_report *report)
{
    pk_status status = pk__sweep_graph(context, "sketched kernel", graph, weights);
    if (!status)
        status = pk__sketch_check(context, sketch, graph->parameters);
    if (status)
        return status;
    const int same = !y.data || (y.data == x.data && y.rows == x.rows && y.ld == x.ld);
    y = same ? x : y;
    const size_t C = graph->output_width, kept = trace ? 1 : C, m = sketch->size;
    size_t rows = 0, columns = 0;
    if (!pk__multiply(x.rows, C, &rows) || !pk__multiply(y.rows, C, &columns) || m > SIZE_MAX / 64)
        return pk__fail(context, PK_OVERFLOW, "sketched kernel: %zu and %zu rows overflow", x.rows, y.rows);
    status = pk__sweep_matrix(context, "sketched kernel", "entries of the result", gram, x.rows * kept,
                              y.rows * kept);
    if (status)
        return status;
    pk_real *features, *other;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        features = pk__arena_take(&arena, rows, m * sizeof *features);
        other = same ? features : pk__arena_take(&arena, columns, m * sizeof *other);
    } while (pk__arena_again(context, &arena, "a sketched kernel", &status));
    if (!status)
        status = pk_sketch_gradients(context, graph, weights, x, sketch, pk_matrix_view(features, rows, m));
    if (!status && !same)
        status = pk_sketch_gradients(context, graph, weights, y, sketch, pk_matrix_view(other, columns, m));
    /* The trace is one product of rows of C m numbers. */
    if (!status && x.rows && y.rows)
        pk__gemm(0, 1, x.rows * kept, y.rows * kept, m * (C / kept), 1, features, m * (C / kept), other,
                 m * (C / kept), 0, gram.data, gram.ld);
    if (!status && report)
        status = pk__sketch_measure(context, graph, weights, x, y, sketch->seed, kept, gram, report);
    pk_release(context, arena.base);
    return status;
}

/* ---- features of the infinite network ------------------------------------------------------------------ */

/* to (count) = products of random numbers of H D t and H D psi: E < to, to' > = < t, t' > < psi, psi' >. a, b: the transforms. */
static void pk__tensor_sketch(uint64_t seed, uint64_t stream, size_t count, size_t first_count,
                              const pk_real *t, size_t second_count, const pk_real *psi, double *a, double *b,
                              pk_real *to)
{
    const size_t n = pk__power_of_two(first_count), k = pk__power_of_two(second_count);
    const double scale = 1 / sqrt((double)count);
    pk__signed_transform(seed, stream, first_count, t, n, a);
    pk__signed_transform(seed, stream + 1, second_count, psi, k, b);
    for (size_t i = 0; i < count; i++) {
        const uint64_t bits = pk__signs(seed, stream + 2, i); /* n and k are powers of two */
        to[i] = (pk_real)(scale * a[bits & (n - 1)] * b[bits >> 32 & (k - 1)]);
    }
}

/* One hidden layer, number l: z (rows x z_width) and t (rows x t_width) become those behind it. */
static void pk__relu_layer(const pk_relu_features *options, double std, size_t l, size_t rows, size_t z_width,
                           const pk_real *z, size_t t_width, const pk_real *t, pk_real *normals, pk_real *units,
                           double *a, double *b, pk_matrix to)
{
    const size_t m = options->width;
    const uint64_t stream = PK__STREAM_LAYERS + 8 * l;
    const double scale = 1 / sqrt((double)m);
    for (size_t i = 0; i < m; i++) {
        pk_random random = {options->seed, stream, i * z_width};
        for (size_t k = 0; k < z_width; k++)
            normals[k] = (pk_real)pk_random_normal(&random);
        for (size_t r = 0; r < rows; r++) {
            double sum = 0;
            for (size_t k = 0; k < z_width; k++)
                sum += (double)normals[k] * z[r * z_width + k];
            to.data[r * to.ld + i] = (pk_real)(sum > 0 ? std * std * scale * sum : 0);
            units[r * m + i] = (pk_real)(sum > 0 ? scale : 0);
        }
    }
    for (size_t r = 0; r < rows; r++) {
        pk_real *row = to.data + r * to.ld;
        pk__tensor_sketch(options->seed, stream + 1, options->sketch, t_width, t + r * t_width, m,
                          units + r * m, a, b, row + m);
        for (size_t i = 0; i < options->sketch; i++)
            row[m + i] *= (pk_real)std;
    }
}

PK_API pk_status pk_relu_ntk_features(pk_context *context, pk_matrix inputs, const pk_relu_features *options,
                                      pk_matrix features)
{
    static const char name[] = "relu features";
    if (!options || !options->layers || !options->width || !options->sketch)
        return pk__fail(context, PK_ARGUMENT, "%s: the layers, the width or the sketch are 0", name);
    if (!(options->weight_std >= 0 && options->weight_std < INFINITY) || !inputs.cols)
        return pk__fail(context, PK_ARGUMENT, "%s: the standard deviation is %g, and rows have %zu numbers",
                        name, options->weight_std, inputs.cols);
    if (options->width > (size_t)1 << 31 || options->sketch > (size_t)1 << 31 || inputs.cols > (size_t)1 << 31)
        return pk__fail(context, PK_OVERFLOW, "%s: more than 2^31 numbers of a row", name);
    const size_t D = inputs.cols, m = options->width, all = m + options->sketch, widest = pk__max(D, all);
    pk_status status = pk__sweep_matrix(context, name, "inputs", inputs, inputs.rows, D);
    if (!status)
        status = pk__sweep_matrix(context, name, "features", features, inputs.rows, all);
    if (!status && pk__matrices_overlap(inputs, features))
        status = pk__fail(context, PK_ARGUMENT, "%s: the result overlaps the inputs", name);
    if (status)
        return status;
    const double std = options->weight_std > 0 ? options->weight_std : sqrt(2);
    const size_t rows = inputs.rows, n = pk__power_of_two(widest);
    pk_real *z, *t, *units, *normals;
    double *first, *second;
    pk__arena arena = {NULL, 0, 0, 0};
    do {
        z = pk__arena_take(&arena, rows, widest * sizeof *z);
        t = pk__arena_take(&arena, rows, widest * sizeof *t);
        units = pk__arena_take(&arena, rows, m * sizeof *units);
        normals = pk__arena_take(&arena, widest, sizeof *normals);
        first = pk__arena_take(&arena, n, sizeof *first);
        second = pk__arena_take(&arena, n, sizeof *second);
    } while (pk__arena_again(context, &arena, name, &status));
    for (size_t i = 0; !status && i < rows * D; i++) {
        z[i] = (pk_real)(inputs.data[i / D * inputs.ld + i % D] / sqrt((double)D));
        t[i] = (pk_real)(std * z[i]);
    }
    for (size_t l = 0; l < options->layers && !status; l++) {
        status = pk__progress(context, name, (double)l / (double)options->layers);
        if (!status)
            pk__relu_layer(options, std, l, rows, l ? m : D, z, l ? all : D, t, normals, units, first, second,
                           features);
        for (size_t r = 0; !status && r < rows; r++) {
            const pk_real *row = features.data + r * features.ld;
            memcpy(t + r * all, row, all * sizeof *t);
            for (size_t i = 0; i < m; i++) /* the next layer's inputs, without its standard deviation */
                z[r * m + i] = (pk_real)(row[i] / std);
        }
    }
    pk_release(context, arena.base);
    return status;
}

PK__END_CODE
/* <<< implementation */
#endif
