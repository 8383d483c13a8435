/* bench/bench_contraction.c: at what rate does the hot loop run, the inner products of tangent features?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_contraction.c -lblis -lm \
 *      -o bench_contraction
 *   ./bench_contraction [--quick]
 *
 * One step of a network input 64; dense W; tanh; dense W; tanh; dense C with 4 Gauss nodes, so that the work is
 * fixed: a block of test rows for each thread against a batch of examples. Sizes are C x W x W x batch.
 *
 *   factored, integrated  the engines; time of the contraction alone (a thread's own), flops as the library
 *                         counts them
 *   contraction           the engine that the library chooses; flops the least that the factored form needs,
 *                         2 batch (points (W + C W) + rows (W + C W)), so that less work counts as speed
 *   step                  the same, with the time of all that a step takes of the test side (forward, reverse,
 *                         contraction)
 *
 * It times the inside of the engine, which no public function gives, and so uses names that begin with pk__; the other
 * benchmarks use public functions only.
 *
 * The residual is the largest |A - exact| / (|Phi| . |g|) over some contributions, exact from gradients and
 * inner products in long double.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel/network/language.h"
#include "pathkernel/features/tiles.h"
#include "bench.h"
#include <float.h>

enum { INPUTS = 64, NODES = 4, LAYERS = 3 };

/* One thread's block of rows, and where its contributions go. */
typedef struct block {
    pk__integral integral;
    pk__product product;
    const pk_real *rows;
    size_t first_row, count;
    pk_real *phi, *result; /* result: count x outputs x batch */
    size_t batch, outputs;
} block;

typedef struct job {
    int threads, whole; /* whole: time the whole step */
    pk_engine engine;
    size_t width, outputs, batch, block_rows;
    pk_graph graph;
    pk_real *weights, *direction, *train, *targets, *test, *gram;
    int64_t *items;
    double *nodes, *node_weights; /* Gauss tables */
    pk_dataset data;
    pk__examples examples;
    pk__example_workspace workspace;
    block *blocks;
    unsigned char *memory;
} job;

/* ---- the step --------------------------------------------------------------------------------------- */

static void add_tile(block *b, size_t first, size_t count, const pk_real *tile)
{
    for (size_t i = 0; i < b->count * b->outputs; i++)
        for (size_t j = 0; j < count; j++)
            b->result[i * b->batch + first + j] += tile[i * PK__TILE_LD + j];
}

/* The products of the points in hand with all examples. */
static void add_products(block *b, const pk__points *points)
{
    pk__product *product = &b->product;
    const double start = pk__seconds();
    pk__tiles_begin(product, points);
    for (size_t first = 0; first < b->batch; first += PK__EXAMPLE_BLOCK) {
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, b->batch - first);
        for (size_t i = 0; i < product->due_count; i++)
            pk__tiles_layer(product, product->due[i], points, first, count, i == 0);
        if (product->due_count)
            add_tile(b, first, count, product->tile);
    }
    product->seconds += pk__seconds() - start;
}

/* The part of a step's work in the layers whose Phi was materialized. */
static void add_materialized(const job *j, block *b)
{
    for (size_t l = 0; l < j->graph.layers; l++)
        for (size_t r = 0; b->integral.layer[l].integrated && r < b->count; r++) {
            pk__integral_row_phi(&b->integral, l, r, 0, j->outputs, b->phi);
            for (size_t first = 0; first < j->batch; first += PK__EXAMPLE_BLOCK) {
                size_t count = pk__min(j->batch - first, PK__EXAMPLE_BLOCK);
                pk_real *tile = b->product.tile;
                memset(tile, 0, j->outputs * PK__TILE_LD * sizeof *tile);
                pk__product_row(&b->product, l, j->outputs, b->phi, first, count, tile);
                for (size_t k = 0; k < j->outputs; k++)
                    for (size_t i = 0; i < count; i++)
                        b->result[(r * j->outputs + k) * j->batch + first + i] += tile[k * PK__TILE_LD + i];
            }
        }
}

static void take_step(void *data, size_t repeats)
{
    job *j = (job *)data;
#ifdef _OPENMP
#pragma omp parallel for num_threads(j->threads) schedule(static, 1)
#endif
    for (int t = 0; t < j->threads; t++) {
        block *b = &j->blocks[t];
        const pk__points *points;
        /* One direction, as a decomposition has it for its closure. */
        const pk__integral_step step = {j->weights,   j->direction, NULL,    {j->direction, NULL, NULL},
                                        b->first_row, b->count,     b->rows, j->engine,
                                        j->batch};
        for (size_t r = 0; r < repeats; r++) {
            memset(b->result, 0, b->count * j->outputs * j->batch * sizeof *b->result);
            b->product.flops = 0;
            pk__integral_begin(&b->integral, &step);
            while (pk__integral_next(&b->integral, &points)) {
                pk__integral_pass(&b->integral, points);
                pk__integral_add(&b->integral, points);
                add_products(b, points);
            }
            pk__integral_end(&b->integral);
            add_materialized(j, b);
        }
    }
}

/* A thread's seconds, on average. */
static double contraction_clock(void *data)
{
    const job *j = (const job *)data;
    double seconds = 0;
    for (int t = 0; t < j->threads; t++)
        seconds += j->blocks[t].product.seconds;
    return seconds / j->threads;
}

/* ---- the same, naively ------------------------------------------------------------------------------ */

static long double *extended(size_t count)
{
    long double *x = (long double *)calloc(count, sizeof *x);
    if (!x) {
        fprintf(stderr, "bench_contraction: no memory\n");
        exit(2);
    }
    return x;
}

/* gradient (P) += factor * d < seed, f > / dw at w + t d; the seed is output k or, with targets, f - y,
 * the squared loss's. */
static void naive_gradient(const job *j, long double t, const pk_real *x, size_t k, const pk_real *targets,
                           long double factor, long double *gradient)
{
    const size_t width[LAYERS + 1] = {INPUTS, j->width, j->width, j->outputs};
    long double *value[LAYERS + 1], *delta, *below;
    size_t widest = pk__max(pk__max(j->width, INPUTS), j->outputs), offset = 0;
    delta = extended(widest);
    below = extended(widest);
    value[0] = extended(INPUTS);
    for (size_t i = 0; i < INPUTS; i++)
        value[0][i] = x[i];
#define AT(i) ((long double)j->weights[offset + (i)] + t * (long double)j->direction[offset + (i)])
    for (size_t l = 0; l < LAYERS; l++) {
        const size_t in = width[l], out = width[l + 1];
        value[l + 1] = extended(out);
        for (size_t o = 0; o < out; o++) {
            long double z = AT(out * in + o);
            for (size_t i = 0; i < in; i++)
                z += AT(o * in + i) * value[l][i];
            value[l + 1][o] = l + 1 < LAYERS ? tanhl(z) : z;
        }
        offset += out * in + out;
    }
    for (size_t o = 0; o < j->outputs; o++)
        delta[o] = targets ? value[LAYERS][o] - (long double)targets[o] : (long double)(o == k);
    for (size_t l = LAYERS; l-- > 0;) {
        const size_t in = width[l], out = width[l + 1];
        offset -= out * in + out;
        memset(below, 0, in * sizeof *below);
        for (size_t o = 0; o < out; o++) {
            gradient[offset + out * in + o] += factor * delta[o];
            for (size_t i = 0; i < in; i++) {
                gradient[offset + o * in + i] += factor * delta[o] * value[l][i];
                below[i] += delta[o] * AT(o * in + i);
            }
        }
        for (size_t i = 0; l > 0 && i < in; i++)
            delta[i] = below[i] * (1 - value[l][i] * value[l][i]);
    }
#undef AT
    for (size_t l = 0; l <= LAYERS; l++)
        free(value[l]);
    free(delta);
    free(below);
}

/* Some rows, the first and the last output, some examples; the last thread's rows among them. */
static double residual_of(const job *j)
{
    const size_t P = j->graph.parameters, at = NODES * (NODES - 1) / 2;
    const size_t example[3] = {0, j->batch / 2, j->batch - 1};
    long double *phi = extended(P), *g[3];
    double worst = 0;
    for (size_t e = 0; e < 3; e++) {
        g[e] = extended(P);
        naive_gradient(j, 0, j->train + example[e] * INPUTS, 0, j->targets + example[e] * j->outputs,
                       1.0L / (long double)j->batch, g[e]);
    }
    for (int end = 0; end < 2; end++)
        for (int last = 0; last < (j->outputs > 1 ? 2 : 1); last++) {
            const block *b = &j->blocks[end ? j->threads - 1 : 0];
            const size_t r = end ? b->count - 1 : 0, k = last ? j->outputs - 1 : 0;
            memset(phi, 0, P * sizeof *phi);
            for (size_t q = 0; q < NODES; q++)
                naive_gradient(j, (long double)j->nodes[at + q], b->rows + r * INPUTS, k, NULL,
                               (long double)j->node_weights[at + q], phi);
            for (size_t e = 0; e < 3; e++) {
                long double sum = 0, size = 0;
                for (size_t p = 0; p < P; p++) {
                    sum += phi[p] * g[e][p];
                    size += fabsl(phi[p] * g[e][p]);
                }
                long double own = b->result[(r * j->outputs + k) * j->batch + example[e]];
                double error = (double)(fabsl(own - sum) / size);
                if (!(error <= worst))
                    worst = error;
            }
        }
    for (size_t e = 0; e < 3; e++)
        free(g[e]);
    free(phi);
    return worst;
}

/* ---- a case ----------------------------------------------------------------------------------------- */

/* Everything whose size depends on the case; measures and takes. */
static void job_layout(job *j, pk__arena *arena)
{
    const size_t real = sizeof(pk_real), P = j->graph.parameters, rows = j->block_rows * (size_t)j->threads;
    const size_t table = PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2;
    pk_readout readout;
    memset(&readout, 0, sizeof readout);
    j->weights = (pk_real *)pk__arena_take(arena, P, real);
    j->direction = (pk_real *)pk__arena_take(arena, P, real);
    j->train = (pk_real *)pk__arena_take(arena, j->batch, INPUTS * real);
    j->targets = (pk_real *)pk__arena_take(arena, j->batch, j->outputs * real);
    j->test = (pk_real *)pk__arena_take(arena, rows, INPUTS * real);
    j->gram = (pk_real *)pk__arena_take(arena, rows, j->batch * real);
    j->items = (int64_t *)pk__arena_take(arena, j->batch, sizeof *j->items);
    j->nodes = (double *)pk__arena_take(arena, table, sizeof(double));
    j->node_weights = (double *)pk__arena_take(arena, table, sizeof(double));
    const pk__representation representation = {j->outputs, j->batch, j->engine == PK_ENGINE_INTEGRATED,
                                               j->engine == PK_ENGINE_FACTORED, 0};
    pk__examples_take(arena, &j->graph, j->batch, &representation, &j->examples);
    pk__example_workspace_take(arena, &j->graph, PK__EXAMPLE_BLOCK, &j->workspace);
    j->blocks = (block *)pk__arena_take(arena, (size_t)j->threads, sizeof *j->blocks);
    for (size_t t = 0; t < (size_t)j->threads; t++) {
        block measured, *b = j->blocks ? &j->blocks[t] : &measured;
        memset(b, 0, sizeof *b);
        pk__integral_take(arena, &j->graph, &readout, j->block_rows,
                          j->engine != PK_ENGINE_FACTORED ? j->outputs : 0, j->outputs, 0, &representation,
                          &b->integral);
        pk__product_take(arena, &b->integral, !representation.materialized, &b->product);
        b->phi = (pk_real *)pk__arena_take(arena, j->outputs, P * real);
        b->result = (pk_real *)pk__arena_take(arena, j->block_rows * j->outputs, j->batch * real);
        b->rows = j->test ? j->test + t * j->block_rows * INPUTS : NULL;
        b->first_row = t * j->block_rows;
        b->count = j->block_rows;
        b->batch = j->batch;
        b->outputs = j->outputs;
    }
}

static pk_status job_fill(pk_context *context, job *j)
{
    const size_t rows = j->block_rows * (size_t)j->threads;
    const size_t inputs[2] = {j->batch, INPUTS}, targets[2] = {j->batch, j->outputs};
    const pk_type type = sizeof(pk_real) == 8 ? PK_FLOAT64 : PK_FLOAT32;
    pk_batch batch = {j->batch, j->items, NULL};
    pk_status status = pk_network_initialize(context, &j->graph, 1, j->weights);
    bench_fill(j->direction, j->graph.parameters, 2);
    for (size_t p = 0; p < j->graph.parameters; p++)
        j->direction[p] *= (pk_real)0.01;
    bench_fill(j->train, j->batch * INPUTS, 3);
    bench_fill(j->targets, j->batch * j->outputs, 4);
    bench_fill(j->test, rows * INPUTS, 5);
    for (size_t i = 0; i < j->batch; i++)
        j->items[i] = (int64_t)i;
    pk__gauss_table(j->nodes, j->node_weights);
    j->data.inputs = pk_array_view(type, 2, inputs, j->train);
    j->data.targets = pk_array_view(type, 2, targets, j->targets);
    const pk_criterion squared = {.loss = PK_SQUARED};
    pk__examples_begin(&j->examples, &batch, NULL, 0);
    for (size_t first = 0; first < j->batch; first += PK__EXAMPLE_BLOCK)
        pk__examples_fill(&j->examples, &j->graph, &squared, j->weights, &j->data, &batch, first, &j->workspace,
                          NULL);
    if (!status)
        status = pk_matrix_multiply(context, 1, pk_matrix_view(j->test, rows, INPUTS), 0,
                                    pk_matrix_view(j->train, j->batch, INPUTS), 1, 0,
                                    pk_matrix_view(j->gram, rows, j->batch));
    for (size_t t = 0; t < (size_t)j->threads; t++) {
        pk__integral *integral = &j->blocks[t].integral;
        pk__product *product = &j->blocks[t].product;
        integral->integrator.quadrature.rule = PK_RULE_GAUSS;
        integral->integrator.quadrature.nodes = NODES;
        integral->integrator.gauss_nodes = j->nodes;
        integral->integrator.gauss_weights = j->node_weights;
        integral->integrator.points_last = NODES * j->block_rows;
        product->examples = &j->examples;
        product->gram = j->gram + t * j->block_rows * j->batch;
        product->gram_ld = j->batch;
    }
    return status;
}

static void job_report(bench_run *run, job *j)
{
    const double epsilon = sizeof(pk_real) == 8 ? DBL_EPSILON : FLT_EPSILON;
    const double cells = (double)(j->outputs * j->width + j->width);
    double flops = 0;
    bench_timing timing;
    char size[64];
    bench_time(run, j->threads, take_step, j->whole ? NULL : contraction_clock, j, &timing);
    for (int t = 0; t < j->threads; t++)
        flops += j->blocks[t].product.flops;
    if (j->engine == PK_ENGINE_AUTO)
        flops = 2.0 * (double)j->batch * (NODES + 1) * (double)(j->block_rows * (size_t)j->threads) * cells;
    snprintf(size, sizeof size, "%zux%zux%zux%zu", j->outputs, j->width, j->width, j->batch);
    bench_line(run,
               j->whole                          ? "step"
               : j->engine == PK_ENGINE_AUTO     ? "contraction"
               : j->engine == PK_ENGINE_FACTORED ? "factored"
                                                 : "integrated",
               size, j->threads, flops, timing, residual_of(j),
               (double)(INPUTS + 4 * j->width + j->outputs) * epsilon);
}

static int measure(bench_run *run, int threads, pk_engine engine, int whole, size_t width, size_t outputs,
                   size_t batch)
{
    job j;
    pk_context context;
    char text[128];
    pk__arena arena = {NULL, 0, 0, 0};
    memset(&j, 0, sizeof j);
    memset(&context, 0, sizeof context);
    j.threads = threads;
    j.engine = engine;
    j.whole = whole;
    j.width = width;
    j.outputs = outputs;
    j.batch = batch;
    snprintf(text, sizeof text, "input %d; dense %zu; tanh; dense %zu; tanh; dense %zu", INPUTS, width, width,
             outputs);
    pk_status status = pk_network_parse(&context, text, &j.graph);
    if (!status) {
        j.block_rows = pk__integral_block(&j.graph, outputs);
        job_layout(&j, &arena);
        status = pk_allocate(&context, 1, arena.used, "the benchmark", &j.memory);
    }
    if (!status) {
        pk__arena own = {j.memory, arena.used, 0, 0};
        job_layout(&j, &own);
        status = job_fill(&context, &j);
    }
    if (!status)
        job_report(run, &j);
    else
        fprintf(stderr, "bench_contraction: %s\n", pk_message(&context));
    pk_release(&context, j.memory);
    pk_graph_release(&context, &j.graph);
    return status == PK_OK;
}

/* The other side of a roofline: bytes read and written per second by memcpy within caches of several sizes. */
static void report_copies(const bench_run *run)
{
    static const size_t sizes[] = {(size_t)24 << 10, (size_t)384 << 10, (size_t)8 << 20, (size_t)256 << 20};
    printf("# memcpy with 1 thread, read and written:");
    for (size_t s = 0; s < (run->quick ? 2 : 4); s++) {
        const size_t half = sizes[s] / 2;
        unsigned char *memory = (unsigned char *)malloc(2 * half);
        double best = 0;
        if (!memory)
            break;
        memset(memory, 1, 2 * half);
        for (int sample = 0; sample < 20; sample++) {
            const size_t repeats = 1 + ((size_t)16 << 20) / half;
            const double start = bench_seconds();
            for (size_t r = 0; r < repeats; r++)
                memcpy(memory + r % 2 * half, memory + (r + 1) % 2 * half, half);
            best = fmax(best, 2.0 * (double)(half * repeats) / (bench_seconds() - start));
        }
        printf("%s %zu KiB %.0f GB/s", s ? "," : "", sizes[s] >> 10, best * 1e-9);
        free(memory);
    }
    printf("\n");
}

int main(int argc, char **argv)
{
    static const size_t widths[] = {32, 64, 128, 256, 512}, outputs[] = {10, 1}, batches[] = {1437, 64};
    static const pk_engine engines[] = {PK_ENGINE_AUTO, PK_ENGINE_AUTO, PK_ENGINE_FACTORED,
                                        PK_ENGINE_INTEGRATED};
    bench_run run;
    int made = 1;
    if (!bench_start(&run, argc, argv, "bench_contraction"))
        return 2;
    report_copies(&run);
    for (int all = 0; all < (run.threads > 1 ? 2 : 1); all++)
        for (size_t e = 0; e < 4; e++)
            for (size_t o = 0; o < 2; o++)
                for (size_t b = 0; b < 2; b++)
                    for (size_t w = 0; w < (run.quick ? 2 : 5); w++)
                        made = made && measure(&run, all ? run.threads : 1, engines[e], e == 1, widths[w],
                                               outputs[o], run.quick ? batches[b] / 4 : batches[b]);
    return made ? bench_finish(&run) : 2;
}
