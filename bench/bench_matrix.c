/* bench/bench_matrix.c: at what rate do products run at the shapes that the library uses?
 *
 *   cc -O3 -march=native -fopenmp -DPATHKERNEL_BLIS -Iinclude bench/bench_matrix.c -lblis -lm -o bench_matrix
 *   ./bench_matrix [--quick]
 *
 * feature_major: C = A B with B k x n. example_major: C = A B^T with B n x k. Sizes are m x n x k. With more
 * than one thread each runs products of its own. The residual is the largest |C - exact| / (|A| |B|), the
 * exact product in long double, over all elements or, of large products, those of evenly spaced rows.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define PATHKERNEL_IMPLEMENTATION
#include "pathkernel/math/matrix.h"
#include "bench.h"
#include <float.h>

static double residual_of(const bench_products *p, double terms)
{
    double worst = 0;
    const double rows = terms / ((double)p->n * (double)p->k);
    const size_t step = rows >= (double)p->m ? 1 : (size_t)((double)p->m / (rows < 1 ? 1 : rows)) + 1;
    for (size_t t = 0; t < (size_t)p->threads; t++) {
        const pk_real *a = p->a + t * p->m * p->k, *b = p->b + t * p->k * p->n, *c = p->c + t * p->m * p->n;
        for (size_t i = 0; i < p->m; i += step)
            for (size_t j = 0; j < p->n; j++) {
                const pk_real *column = p->transpose_b ? b + j * p->k : b + j;
                const size_t stride = p->transpose_b ? 1 : p->n;
                long double sum = 0, size = 0;
                for (size_t q = 0; q < p->k; q++) {
                    long double term = (long double)a[i * p->k + q] * column[q * stride];
                    sum += term;
                    size += term < 0 ? -term : term;
                }
                double error = (double)(fabsl((long double)c[i * p->n + j] - sum) / (size > 0 ? size : 1));
                if (!(error <= worst))
                    worst = error;
            }
    }
    return worst;
}

static int measure(bench_run *run, int threads, int transpose_b, size_t m, size_t n, size_t k)
{
    bench_products p;
    bench_timing timing;
    char size[64];
    const double epsilon = sizeof(pk_real) == 8 ? DBL_EPSILON : FLT_EPSILON;
    int made = bench_products_make(&p, threads, transpose_b, m, n, k);
    if (made) {
        bench_time(run, threads, bench_multiply, NULL, &p, &timing);
        snprintf(size, sizeof size, "%zux%zux%zu", m, n, k);
        bench_line(run, transpose_b ? "example_major" : "feature_major", size, threads,
                   2.0 * (double)m * (double)n * (double)k * threads, timing,
                   p.failed ? INFINITY : residual_of(&p, run->quick ? 1e6 : 1e7),
                   ((double)k + 2) / 2 * epsilon);
    }
    bench_products_free(&p);
    return made;
}

int main(int argc, char **argv)
{
    static const size_t rows[] = {10, 64, 100, 128, 400}, depths[] = {10, 32, 64, 128, 512},
                        columns[] = {64, 256, 1437};
    bench_run run;
    int made = 1;
    if (!bench_start(&run, argc, argv, "bench_matrix"))
        return 2;
    for (int all = 0; all < (run.threads > 1 ? 2 : 1); all++)
        for (int transpose_b = 0; transpose_b < 2; transpose_b++) {
            const int threads = all ? run.threads : 1;
            made = made && measure(&run, threads, transpose_b, 1024, 1024, 1024);
            for (size_t i = 0; i < 5; i++)
                for (size_t q = 0; q < 5; q++)
                    for (size_t j = 0; j < 3; j++)
                        made = made && measure(&run, threads, transpose_b, rows[i], columns[j], depths[q]);
        }
    if (!made)
        fprintf(stderr, "bench_matrix: no memory\n");
    return made ? bench_finish(&run) : 2;
}
