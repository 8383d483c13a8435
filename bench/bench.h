/* bench/bench.h: what every benchmark shares: the machine's header lines, a timer that repeats until the
 * median is known to 2 % or a budget is used, the rate of a 1024^3 product between the samples, the CSV lines.
 * Include it after pathkernel's headers. A benchmark:
 *
 *   bench_run run;
 *   if (!bench_start(&run, argc, argv, "bench_x")) return 2;
 *   bench_time(&run, threads, body, NULL, data, &timing);
 *   bench_line(&run, "case", "10x64x32", threads, flops, timing, residual, bound);
 *   return bench_finish(&run);
 *
 * --quick: a budget that suits a test; results are checked all the same.
 */
#ifndef PATHKERNEL_BENCH_H
#define PATHKERNEL_BENCH_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef BENCH_FLAGS
#define BENCH_FLAGS "unknown (compile with -DBENCH_FLAGS='\"...\"')"
#endif

enum { BENCH_SAMPLES = 400, BENCH_PEAK_SIZE = 1024 };

/* One product in each thread, independent ones. */
typedef struct bench_products {
    int threads, transpose_b;
    size_t m, n, k;
    pk_real *a, *b, *c; /* one after another for each thread */
    int failed;
} bench_products;

typedef struct bench_run {
    int quick, failures;
    int threads;   /* all of them */
    double budget; /* seconds a case */
    struct {       /* 1024^3 products: one thread, all threads */
        bench_products products;
        double rate; /* flops per second, the best so far */
    } peak[2];
} bench_run;

typedef struct bench_timing {
    double minimum, median; /* seconds for one repetition */
    double uncertainty;     /* half the width of the median's 95 % confidence interval, relative */
    double peak_flops;      /* of the products, in the time of one repetition: see bench_time */
    size_t samples;
} bench_timing;

/* Does the work `repeats` times. */
typedef void (*bench_body)(void *data, size_t repeats);
/* Seconds of what is measured that have passed in all, where that is a part of the body only; NULL: all of it. */
typedef double (*bench_clock)(void *data);

static double bench_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int bench__ascending(const void *x, const void *y)
{
    double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

/* Numbers in [-1, 1) that are the same everywhere. */
static void bench_fill(pk_real *x, size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        x[i] = (pk_real)((double)(seed >> 11) / 4503599627370496.0 - 1.0);
    }
}

static void bench_multiply(void *data, size_t repeats)
{
    bench_products *p = (bench_products *)data;
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(p->threads) schedule(static, 1) reduction(+ : failed)
#endif
    for (int t = 0; t < p->threads; t++) {
        const size_t at = (size_t)t;
        pk_matrix a = pk_matrix_view(p->a + at * p->m * p->k, p->m, p->k);
        pk_matrix b =
            pk_matrix_view(p->b + at * p->k * p->n, p->transpose_b ? p->n : p->k, p->transpose_b ? p->k : p->n);
        pk_matrix c = pk_matrix_view(p->c + at * p->m * p->n, p->m, p->n);
        for (size_t r = 0; r < repeats; r++)
            failed += pk_matrix_multiply(NULL, 1, a, 0, b, p->transpose_b, 0, c) != PK_OK;
    }
    p->failed += failed;
}

static int bench_products_make(bench_products *p, int threads, int transpose_b, size_t m, size_t n, size_t k)
{
    const size_t copies = (size_t)threads;
    p->threads = threads;
    p->transpose_b = transpose_b;
    p->m = m;
    p->n = n;
    p->k = k;
    p->failed = 0;
    p->a = (pk_real *)malloc(copies * m * k * sizeof(pk_real));
    p->b = (pk_real *)malloc(copies * k * n * sizeof(pk_real));
    p->c = (pk_real *)malloc(copies * m * n * sizeof(pk_real));
    if (!p->a || !p->b || !p->c)
        return 0;
    bench_fill(p->a, copies * m * k, 1);
    bench_fill(p->b, copies * k * n, 2);
    bench_fill(p->c, copies * m * n, 3);
    return 1;
}

static void bench_products_free(bench_products *p)
{
    free(p->a);
    free(p->b);
    free(p->c);
}

static double bench__wall(void *data)
{
    (void)data;
    return bench_seconds();
}

static double bench__median(const double *sample, double *sorted, size_t count)
{
    memcpy(sorted, sample, count * sizeof *sorted);
    qsort(sorted, count, sizeof *sorted, bench__ascending);
    return 0.5 * (sorted[(count - 1) / 2] + sorted[count / 2]);
}

/* Flops per second of the products, now. */
static double bench__peak_now(bench_run *run, int threads)
{
    const double start = bench_seconds(), edge = BENCH_PEAK_SIZE;
    bench_multiply(&run->peak[threads > 1].products, 1);
    const double rate = 2 * edge * edge * edge * threads / (bench_seconds() - start);
    run->peak[threads > 1].rate = fmax(run->peak[threads > 1].rate, rate);
    return rate;
}

/* Samples of some milliseconds each (the barrier at the end of a parallel body must not count), until the
 * order statistics around the median lie within 2 % of it or the budget is used. A virtual machine's speed changes
 * by a third within seconds; so samples come in rounds between two products, and peak_flops is the median over the
 * rounds of the round's median time times the mean rate of those two. */
static inline void bench_time(bench_run *run, int threads, bench_body body, bench_clock clock, void *data,
                              bench_timing *timing)
{
    static double sample[BENCH_SAMPLES], sorted[BENCH_SAMPLES], beside[BENCH_SAMPLES];
    const double shortest = run->quick ? 1e-3 : 4e-3, start = bench_seconds(), longest = 10 * shortest;
    size_t repeats = 1, count = 0, rounds = 0;
    double rate = run->peak[threads > 1].rate;
    if (!clock)
        clock = bench__wall;
    for (;;) {
        double before = clock(data);
        body(data, repeats);
        double passed = clock(data) - before;
        if (passed >= shortest || repeats > (size_t)1 << 30)
            break;
        repeats = passed > 0 && passed * 16 > shortest ? (size_t)((double)repeats * 1.2 * shortest / passed) + 1
                                                       : repeats * 8;
    }
    if (!run->quick)
        rate = bench__peak_now(run, threads);
    do {
        const size_t first = count;
        const double begin = bench_seconds(), rate_before = rate;
        do {
            double before = clock(data);
            body(data, repeats);
            sample[count++] = (clock(data) - before) / (double)repeats;
        } while (count < BENCH_SAMPLES && bench_seconds() - begin < longest);
        if (!run->quick)
            rate = bench__peak_now(run, threads);
        beside[rounds++] = bench__median(sample + first, sorted, count - first) * 0.5 * (rate_before + rate);
        timing->median = bench__median(sample, sorted, count);
        double reach =
            0.98 * sqrt((double)count) + 1; /* ranks: 1.96 standard deviations of Binomial(count, 1/2) */
        double middle = 0.5 * (double)(count - 1);
        size_t low = middle > reach ? (size_t)(middle - reach) : 0;
        size_t high = middle + reach < (double)(count - 1) ? (size_t)(middle + reach + 0.999) : count - 1;
        timing->minimum = sorted[0];
        timing->uncertainty = 0.5 * (sorted[high] - sorted[low]) / timing->median;
        timing->samples = count;
    } while (count < BENCH_SAMPLES && (count < 7 || rounds < 5 || timing->uncertainty > 0.02) &&
             (count < 3 || bench_seconds() - start < run->budget));
    timing->peak_flops = bench__median(beside, sorted, rounds);
}

static void bench__first_line(const char *path, const char *key, const char *title)
{
    char line[512];
    FILE *file = fopen(path, "r");
    const char *found = "unknown";
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, key, strlen(key)) == 0) {
            line[strcspn(line, "\n")] = 0;
            found = *key && strchr(line, ':') ? strchr(line, ':') + 2 : line;
            break;
        }
    printf("# %s: %s\n", title, found);
    if (file)
        fclose(file);
}

/* The peak at the start: needs the memory of 3 matrices of 8 MiB for each thread, until the end. */
static int bench__peak(bench_run *run)
{
    for (int all = 0; all < (run->threads > 1 ? 2 : 1); all++) {
        bench_products *own = &run->peak[all].products;
        const double start = bench_seconds();
        const int threads = all ? run->threads : 1;
        if (!bench_products_make(own, threads, 0, BENCH_PEAK_SIZE, BENCH_PEAK_SIZE, BENCH_PEAK_SIZE))
            return 0;
        do
            bench__peak_now(run, threads);
        while (bench_seconds() - start < (run->quick ? 0.3 : 2.0));
        if (own->failed)
            return 0;
    }
    return 1;
}

/* Reads the arguments, prints the header, measures the peak; 0 where that is not possible. */
static inline int bench_start(bench_run *run, int argc, char **argv, const char *name)
{
    static const char *const variables[] = {"OMP_NUM_THREADS", "OMP_PROC_BIND",    "OMP_PLACES",
                                            "OMP_DYNAMIC",     "OMP_WAIT_POLICY",  "BLIS_NUM_THREADS",
                                            "BLIS_ARCH_TYPE",  "GOMP_CPU_AFFINITY"};
    char backend[128];
    memset(run, 0, sizeof *run);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--quick") != 0) {
            fprintf(stderr, "%s: unknown argument %s\nusage: %s [--quick]\n", name, argv[i], name);
            return 0;
        }
        run->quick = 1;
    }
    run->budget = run->quick ? 0.01 : 1.0;
    run->threads = pk_threads(NULL);
    pk_matrix_backend(backend, sizeof backend);
    printf("# %s%s, pathkernel %s, %s\n", name, run->quick ? " --quick" : "", pk_version(),
           sizeof(pk_real) == 8 ? "double" : "float");
    bench__first_line("/proc/cpuinfo", "model name", "CPU");
    printf("# products: %s\n", backend);
#ifdef __VERSION__
    printf("# compiler: %s\n", __VERSION__);
#endif
    printf("# flags: %s\n", BENCH_FLAGS);
    printf("# threads: %d\n# environment:", run->threads);
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
        if (getenv(variables[i]))
            printf(" %s=%s", variables[i], getenv(variables[i]));
    printf("\n");
    bench__first_line("/proc/loadavg", "", "load average");
    fflush(stdout);
    if (!bench__peak(run)) {
        fprintf(stderr, "%s: the peak could not be measured\n", name);
        return 0;
    }
    printf("# peak (%d^3): %.1f GF/s with 1 thread, %.1f GF/s with %d\n", BENCH_PEAK_SIZE,
           run->peak[0].rate * 1e-9, run->peak[run->threads > 1].rate * 1e-9, run->threads);
    printf(
        "case,size,threads,minimum_s,median_s,uncertainty,gflops,share_of_peak,share_beside,residual,status\n");
    fflush(stdout);
    return 1;
}

/* One case. share_of_peak: the best rate over the best of the products; share_beside: the median over rounds of the
 * rate over that of the products before and after. PASS where residual <= bound. */
static inline void bench_line(bench_run *run, const char *name, const char *size, int threads, double flops,
                              bench_timing timing, double residual, double bound)
{
    const int pass = residual <= bound; /* not with a NaN */
    const double rate = flops / timing.minimum;
    printf("%s,%s,%d,%.4e,%.4e,%.3f,%.2f,%.3f,%.3f,%.2e,%s\n", name, size, threads, timing.minimum,
           timing.median, timing.uncertainty, rate * 1e-9, rate / run->peak[threads > 1].rate,
           flops / timing.peak_flops, residual, pass ? "PASS" : "FAIL");
    fflush(stdout);
    run->failures += !pass;
}

/* The exit status. */
static inline int bench_finish(bench_run *run)
{
    if (!run->quick) {
        printf("# best peak: %.1f GF/s with 1 thread, %.1f GF/s with %d\n", run->peak[0].rate * 1e-9,
               run->peak[run->threads > 1].rate * 1e-9, run->threads);
        bench__first_line("/proc/loadavg", "", "load average at the end");
    }
    for (int all = 0; all < 2; all++)
        bench_products_free(&run->peak[all].products);
    if (run->failures)
        printf("# %d wrong results\n", run->failures);
    return run->failures ? 1 : 0;
}

#endif
