/* pathkernel: a training run, recorded and decomposed exactly. The implementation is C11, the declarations
 * are for C++17, too. MIT license.
 *
 * PURPOSE
 * A network trained by gradient descent is a kernel machine: its output on any input is its initial output
 * plus one exact contribution of each training example, summed over the steps of training. This library
 * trains small networks, or takes a run recorded elsewhere, and computes these contributions to rounding
 * error, with a measured closure as the proof:
 *     final = initial + sum over examples of contribution + decay + unattributed + closure
 *
 * EXAMPLE
 *     #define PATHKERNEL_IMPLEMENTATION
 *     #include "pathkernel.h"
 *     #include <stdio.h>
 *
 *     int main(void)
 *     {
 *         pk_context context = {0};
 *         pk_graph graph = {0};
 *         if (pk_network_parse(&context, "input 64; dense 32; relu; dense 10", &graph) != PK_OK) {
 *             printf("%s\n", pk_message(&context));
 *             return 1;
 *         }
 *         printf("%zu parameters\n", graph.parameters);
 *         pk_graph_release(&context, &graph);
 *         return 0;
 *     }
 * Compile with: cc -O3 -fopenmp program.c -lm
 * With BLIS:    cc -O3 -fopenmp -DPATHKERNEL_BLIS program.c -lblis -lm
 *
 * CONTENTS, by folders of include/pathkernel, each of which builds on those above it
 * base         status codes; what a call runs with: memory, threads, progress; counter-based random numbers
 * math         matrix products
 * data         .npy files; IDX, CSV, training data
 * network      the network language; the static graph behind a network, its operations, and how to add one; evaluation
 * training     losses, gradients of batches; products with Jacobians and Hessians, Jacobians; update rules and their linear
 *              form, schedules, clipping
 * run          pk_run_open: a recorded run, from here or from PyTorch; recording from a loop of your own; the weights of any
 *              step of a run that keeps every k-th one; pk_train: the training loop, recorded
 * path         rules that integrate a network along one step, exactly where it is piecewise linear
 * features     (internal) gradients of rows, their integrals along a step, and their inner products
 * attribution  pk_decompose, pk_decompose_parts, pk_decompose_plan; pk_decompose_reference: the same by its definition, slow,
 *              to read and to test with
 * kernels      pk_kernel_ntk, pk_kernel_ntk_trace
 *
 * SWITCHES
 * PATHKERNEL_IMPLEMENTATION  compile the functions here; in exactly one source file of a program
 * PATHKERNEL_STATIC          make all functions static; then each file may have its own implementation
 * PATHKERNEL_BLIS            use BLIS for matrix products; link with -lblis -lm
 * PATHKERNEL_FLOAT           float instead of double for weights and activations (sums over examples and steps, and
 *                            results, stay double): speed over digits, closures of about 1e-5. Runs of either type
 *                            are read; the weights of a float64 one are rounded, which unattributed then shows. In
 *                            all files of a program
 * The file that holds the implementation includes this header before any other, or is compiled as gnu11 or
 * with -D_POSIX_C_SOURCE=200809L: the library needs POSIX. Link with -lm.
 *
 * MEMORY
 * A zeroed pk_context uses the C library. It may carry an allocator and a limit in bytes. Sizes are checked
 * for overflow; a limit that cannot be met is an error. Hot loops do not allocate.
 *
 * THREADS
 * OpenMP, where the compiler is asked for it; pk_context.threads chooses their number. There are no mutable
 * globals: distinct contexts may run concurrently. Where another program takes a processor, so that several threads
 * take longer than one would, a call goes on with one for a while and tries again (pk_context.backed_off counts that;
 * calls without a context do not). gcc's threads spin for milliseconds where they wait: GOMP_SPINCOUNT=2000 in the
 * environment, or OMP_WAIT_POLICY=passive, keeps them from it on a machine that is shared.
 * After fork: OpenMP waits in the child for the parent's threads for ever if the parent has used them. A context that
 * the parent has computed with goes on with one thread there; give one that is made in the child threads = 1, or exec.
 *
 * DETERMINISM
 * The same bits for any number of threads and any memory limit, for the same binary, BLIS and processor.
 *
 * LIMITS
 * A call returns a pk_status and never prints, aborts or exits; after an error pk_message() has the sentence
 * that tells what was wrong. On an argument error the outputs are untouched. POSIX systems.
 */
/* Generated from the files in include/pathkernel. Change those, then: cmake -P cmake/amalgamate.cmake */

/* The implementation maps files and appends to them: POSIX. A strict -std=c11 hides POSIX unless it is
 * asked for before the first header of the C library. */
#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(_POSIX_C_SOURCE) && !defined(_FEATURES_H)
#define _POSIX_C_SOURCE 200809L
#endif

#ifndef PATHKERNEL_H
#define PATHKERNEL_H

/* pathkernel/base/status.h: status codes and their texts, the version, the linkage switches.
 *
 * Every module of pathkernel has the shape of this one: declarations under an include guard, then one
 * implementation section that is compiled where PATHKERNEL_IMPLEMENTATION is defined (in exactly one
 * source file of a program, or in each file that also defines PATHKERNEL_STATIC).
 *
 *   PATHKERNEL_IMPLEMENTATION  compile the functions here
 *   PATHKERNEL_STATIC          make all functions static
 *   PATHKERNEL_BLIS            use BLIS for matrix products (link with -lblis -lm)
 *   PATHKERNEL_NO_DISPATCH     do not look at run time for AVX2 and AVX-512: only what the compiler's flags say
 *   PATHKERNEL_NO_AVX512       take AVX2 where there is AVX-512, too
 */
#include <stddef.h>
#include <stdint.h>

#define PK_VERSION_MAJOR 0
#define PK_VERSION_MINOR 1
#define PK_VERSION_PATCH 0
#define PK_VERSION "0.1.0"

#if defined(__GNUC__)
#define PK__UNUSED __attribute__((unused))
#define PK__MUST_USE __attribute__((warn_unused_result))
#define PK__FORMAT(string, first) __attribute__((format(printf, string, first)))
#define PK__INLINE static inline __attribute__((always_inline))
#define PK__NOINLINE __attribute__((noinline)) /* functions with large frames, which shall not be in others' */
#else
#define PK__UNUSED
#define PK__MUST_USE
#define PK__FORMAT(string, first)
#define PK__INLINE static inline
#define PK__NOINLINE
#endif

#define PK__PRAGMA(text) _Pragma(#text)

/* How gcc compiles the functions at -O2 and -O3, most of whose time it would spend where it saves none. Where the caller
 * wants no or small code, that is what they are, too. Those of tile.h and elementary.h are as the caller asks.
 * WARM: all others, without passes whose work does not show in the time of the jobs (docs/performance.md).
 * COLD: modules that run once a call, a step, a layer or a row, not once a number: texts, files, checks, plans, loops of
 * calls. As with -Og, without those of its passes that cost more time than they save in code; copies are propagated, for
 * without that the fortified functions of glibc do not compile. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define PK__WITH(options) PK__PRAGMA(GCC optimize(options))
#define PK__WARM_BEGIN                                                                                       \
    _Pragma("GCC push_options") PK__WITH("no-tree-pre,no-code-hoisting,no-tree-vrp,no-tree-ccp,no-tree-dse") \
        PK__WITH("no-tree-dominator-opts,no-thread-jumps,no-tree-slsr,no-optimize-strlen")                   \
            PK__WITH("no-gcse,no-rerun-cse-after-loop,no-crossjumping,no-forward-propagate")                 \
                PK__WITH("no-cprop-registers,no-dse,no-if-conversion2,no-peephole2,no-ree")                  \
                    PK__WITH("no-lra-remat,no-schedule-insns2")
#define PK__COLD_BEGIN                                                                            \
    _Pragma("GCC push_options")                                                                   \
        PK__WITH("Og,no-guess-branch-probability,no-tree-fre,no-tree-forwprop,no-tree-dce")       \
            PK__WITH("no-ipa-pure-const,ira-algorithm=priority,ira-region=one,no-shrink-wrap")    \
                PK__WITH("no-reorder-blocks,no-dce,no-combine-stack-adjustments,no-compare-elim") \
                    PK__WITH("no-split-wide-types")
#define PK__WARM_END _Pragma("GCC pop_options")
#define PK__COLD_END _Pragma("GCC pop_options")
#else
#define PK__WARM_BEGIN
#define PK__WARM_END
#define PK__COLD_BEGIN
#define PK__COLD_END
#endif

/* Declarations are for C11 and for C++17, the implementation is C11 alone. */
#ifdef __cplusplus
#define PK__BEGIN_C extern "C" {
#define PK__END_C }
#else
#define PK__BEGIN_C
#define PK__END_C
#endif
#define PK__BEGIN_CODE PK__WARM_BEGIN
#define PK__END_CODE PK__WARM_END
#define PK__BEGIN_COLD_CODE PK__WARM_BEGIN PK__COLD_BEGIN
#define PK__END_COLD_CODE PK__COLD_END PK__WARM_END

#ifdef PATHKERNEL_STATIC
#define PK_API static PK__UNUSED
#else
#define PK_API
#endif
/* Shared between modules, invisible to users; INTERNAL: what the library's own tests and benchmarks call, too, which define
 * PATHKERNEL_INTERNALS where they include it and where it is implemented. */
#ifdef PATHKERNEL_INTERNALS
#define PK__INTERNAL
#else
#define PK__INTERNAL static PK__UNUSED
#endif
#define PK__PRIVATE static PK__UNUSED

PK__BEGIN_C

/* name, value, text. Values are stable: they may be stored. */
#define PK_STATUS_LIST(X)                                                       \
    X(PK_OK, 0, "success")                                                      \
    X(PK_ARGUMENT, 1, "an argument is invalid")                                 \
    X(PK_SHAPE, 2, "shapes do not agree")                                       \
    X(PK_OVERFLOW, 3, "a size is too large for this machine")                   \
    X(PK_MEMORY, 4, "the allocator has no memory left")                         \
    X(PK_MEMORY_LIMIT, 5, "the memory limit of the context cannot be met")      \
    X(PK_IO, 6, "a file could not be read or written")                          \
    X(PK_FORMAT, 7, "a file or a text is malformed")                            \
    X(PK_UNSUPPORTED, 8, "valid, but not supported")                            \
    X(PK_NOT_FINITE, 9, "a NaN or an infinity where a finite number is needed") \
    X(PK_NOT_CLOSED, 10, "computed, but the closure exceeds the tolerance")     \
    X(PK_CANCELLED, 11, "cancelled by the caller")                              \
    X(PK_NOT_REPRODUCED, 12, "replaying recorded steps gave other bits")        \
    X(PK_UNATTRIBUTED, 13, "computed, but the declared training does not explain the weights")

#define PK__STATUS_ENUM(name, value, text) name = value,
typedef enum pk_status { PK_STATUS_LIST(PK__STATUS_ENUM) PK__STATUS_LAST = 14 } pk_status;
#undef PK__STATUS_ENUM

/* One short lower-case phrase for a status; never NULL. pk_message() (context.h) has the details. */
PK_API const char *pk_status_text(pk_status status);

/* The version of the implementation that was compiled, "major.minor.patch". */
PK_API const char *pk_version(void);

PK__END_C

/* pathkernel/base/context.h: what a call runs with: allocator, threads, memory limit, progress; aligned
 * memory and arenas. Private, for all modules: errors, sizes, numbers as text.
 *
 * A zeroed pk_context means default everywhere, and NULL is accepted wherever a context is asked for
 * (the message of an error is then lost). A context belongs to one call at a time; distinct contexts may
 * run concurrently. There are no mutable globals.
 */
PK__BEGIN_C

/* The number type of weights, data, activations and their products. What is added up over examples and steps, results,
 * rates and times are double in any case. All files of a program must agree about it. */
#ifdef PATHKERNEL_FLOAT
typedef float pk_real;
#else
typedef double pk_real;
#endif

#define PK_MESSAGE_SIZE 512

/* Memory from the caller. allocate returns bytes aligned to alignment (a power of two, at most 64), or
 * NULL; release gets what allocate returned and the same size. Both may be called from one thread at a
 * time only. allocate == NULL: the C library. */
typedef struct pk_allocator {
    void *(*allocate)(void *user, size_t bytes, size_t alignment);
    void (*release)(void *user, void *pointer, size_t bytes);
    void *user;
} pk_allocator;

struct pk_operation;

/* Private: how the parallel regions of a context have fared of late (parallel.h). Times in seconds. */
typedef struct pk_load {
    double until, rest; /* one thread until then; how long that was, at most a second */
    double gain, work;  /* against one thread; of a trial */
    int trusted, tries; /* whether the threads are not on trial; regions of the trial */
    long process;       /* that the first region belongs to */
} pk_load;

typedef struct pk_context {
    pk_allocator allocator;
    /* 0: omp_get_max_threads(), or 1 inside a parallel region or without OpenMP. More than 64 count as 64 or as many as
     * there are processors, and no call starts more than it has tasks for. */
    int threads;
    size_t memory_limit; /* bytes that the library may hold at one time through this context; 0: no limit */
    /* Called between units of work from the calling thread, fraction in [0, 1]; non-zero cancels. */
    int (*progress)(void *user, const char *phase, double fraction);
    void *progress_user;
    /* Operations of one's own (graph.h) that the network language knows by name, behind the built-in ones; the last one
     * is NULL. They outlive every network that was read with this context. NULL: none. */
    const struct pk_operation *const *operations;
    /* Read only: */
    size_t memory_used; /* bytes held now */
    size_t memory_peak; /* the most that was ever held */
    size_t regions;     /* parallel regions that were started */
    size_t backed_off;  /* times that one thread went on alone for a while, since it would have been faster */
    pk_load load;
    char message[PK_MESSAGE_SIZE];
} pk_context;

/* The sentence that tells what went wrong last, with the offending shape, file or value; "" if nothing. */
PK_API const char *pk_message(const pk_context *context);

/* Threads that a call with this context uses, >= 1. */
PK_API int pk_threads(const pk_context *context);

/* *(void **)pointer = count * size zeroed bytes, aligned to 64; NULL for 0 bytes. what names the memory
 * in messages. PK_OVERFLOW, PK_MEMORY_LIMIT (the message says what would do) or PK_MEMORY; then
 * *pointer is NULL. */
PK_API PK__MUST_USE pk_status pk_allocate(pk_context *context, size_t count, size_t size, const char *what,
                                          void *pointer);
/* Gives back what pk_allocate gave, through the same context; NULL is allowed. */
PK_API void pk_release(pk_context *context, void *pointer);

PK__END_C

/* pathkernel/base/parallel.h: parallel regions, and what becomes of them beside other programs. Private, for all modules.
 *
 * A region ends when its last thread does, and libgomp's threads wait for each other by spinning. Where another program
 * takes one of the processors, a thread waits for one that does not run, and where the two share what is left, it is the
 * waiting itself that keeps the other from running: 8 to 25 ms a region, whatever its work, until the scheduler's slices are
 * over. So the library watches its regions, by a clock alone and not by the numbers, which stay the same bit for bit:
 *
 *   1. A region measures its time T and the processor time W that its threads took for their tasks: one thread would have
 *      taken about W. The difference W - T, added up over the regions, is what the threads have gained.
 *   2. Where that falls below -PK__LOAD_LOSS, calls with this context go on with one thread, for PK__LOAD_REST times what was
 *      lost, or for twice as long as the last time, up to PK__LOAD_LONGEST seconds.
 *   3. After that, and at the beginning, the threads are on trial: they have to gain in one region, or in several small ones,
 *      before they are trusted. A trial is cheap beside other programs, too: it starts one thread more than there are
 *      processors, which has nothing to do but tells libgomp that spinning does not pay (GOMP_SPINCOUNT: it then spins for
 *      microseconds and sleeps). On an idle machine that costs about 15 microseconds, once.
 *
 * Rejected: a thread pool of our own, whose threads would compete with those of the caller's OpenMP; omp_set_* and
 * environment variables, which are the program's; one thread more in every region, which makes each 10 microseconds longer.
 */

/* pathkernel/base/random.h: counter-based random numbers and shuffles.
 *
 * Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
 * A number is a function of (seed, stream, counter) alone, so that any point of any sequence can be reached
 * at once, by any thread, and a run can be resumed without stored state.
 */
PK__BEGIN_C

/* A place in a sequence of 2^64 numbers; sequences with another seed or stream are independent. Zeroed is
 * valid. Every number drawn moves counter on by one (pk_random_below seldom by more). */
typedef struct pk_random {
    uint64_t seed, stream, counter;
} pk_random;

/* 64 random bits. 10 to 20 ns, as each of these but for the normal, 50 ns. */
PK_API uint64_t pk_random_bits(pk_random *random);

/* Uniform in [0, 1), a multiple of 2^-53. */
PK_API double pk_random_uniform(pk_random *random);

/* Standard normal, by Box and Muller's transform of two uniforms that one count gives (1958). Its last bits
 * are those of the C library's log and cos. |result| < 8.6. */
PK_API double pk_random_normal(pk_random *random);

/* Uniform on 0 .. n - 1, without bias (by rejection); 0 where n is 0. */
PK_API uint64_t pk_random_below(pk_random *random, uint64_t n);

/* Permutes items uniformly, in place (Fisher and Yates). O(count). */
PK_API void pk_random_shuffle(pk_random *random, size_t count, int64_t *items);

PK__END_C

/* pathkernel/math/tile.h: products of small tiles that stay in registers, and what is done with a tile before it leaves
 * them. Nothing here is public: matrix.h makes whole products of it, product.h the hot loop.
 *
 * A tile is up to 12 rows of A times one panel of B, or two. A is read where it stands, a number at a time; a panel of B is
 * one cache line wide: element (p, j) at p * step + j. Every element of a tile is one accumulator that takes its terms in
 * ascending order, wherever it stands in the tile, however many rows the tile has and however long a vector is.
 *
 * GNU vectors, since the vectorisers of gcc and clang differ by a factor of 6 on the same loops over arrays. On x86-64
 * the AVX2 and AVX-512 tiles are compiled for their own instruction set and chosen at run time, so that a program that is
 * built for every machine runs at the speed of this one; PATHKERNEL_NO_DISPATCH leaves what the compiler's flags say, and
 * PATHKERNEL_NO_AVX512 takes AVX2 where there is both.
 */
PK__BEGIN_C

/* Columns of a panel: one cache line. */
enum { PK_PANEL = 64 / (int)sizeof(pk_real) };

PK__END_C

/* pathkernel/math/elementary.h: arithmetic on rows of numbers: whether they are finite, inner products, products number by
 * number, exp, tanh and their relatives. Nothing here is public.
 *
 * Of the latter, where the processor has AVX2 and FMA (chosen at run time as in tile.h) four numbers go through one computation
 * without branches, four to nine times as fast as the C library's functions; elsewhere those serve. A number's result
 * does not depend on where it stands nor on how many there are: the last ones fill a vector of their own. Largest errors
 * against long double (tests/test_elementary.c), in units in the last place: exp 1.1, tanh 2.5, sigmoid 2.3, softplus
 * 2.7; the C library's here are 0.6, 2.1, 2.1 and 1.5. NaN stays NaN, infinities give the limits.
 */
PK__BEGIN_C
PK__END_C

/* pathkernel/math/matrix.h: views of matrices, and every matrix product of the library: BLIS, or the portable
 * product of register tiles (tile.h), which is faster for small matrices and does all where there is no BLIS.
 *
 * Products run on one thread; the library is parallel over tiles around them. Tile sizes depend on shapes
 * only. The bits of a product depend on its shapes and values, not on addresses, ld or threads; those of an
 * element of the portable product do not even depend on how many rows and columns are beside it (with
 * BLIS they do).
 */
PK__BEGIN_C

/* Row-major view: element (i, j) is data[i * ld + j], ld >= cols. Owns nothing. */
typedef struct pk_matrix {
    pk_real *data;
    size_t rows, cols, ld;
} pk_matrix;

/* A contiguous row-major view (ld == cols). */
PK_API pk_matrix pk_matrix_view(pk_real *data, size_t rows, size_t cols);

/* C := beta C + alpha op(A) op(B), op(X) = X or X^T.
 * op(A) is m x k, op(B) is k x n, C is m x n. C must not overlap A or B. With beta == 0, C may hold
 * anything, NaN included. Cost 2 m n k flops, one thread.
 * With alpha == 0, A and B are not read.
 * PK_SHAPE where the shapes disagree or an ld is smaller than its cols; PK_ARGUMENT for NULL data of a
 * matrix that is not empty, or where C overlaps an operand (shares an element with it; where their ld
 * differ: where the address ranges intersect); PK_OVERFLOW for a matrix larger than memory. C is untouched
 * then. */
PK_API PK__MUST_USE pk_status pk_matrix_multiply(pk_context *context, pk_real alpha, pk_matrix a,
                                                 int transpose_a, pk_matrix b, int transpose_b, pk_real beta,
                                                 pk_matrix c);

/* The name of what multiplies: "BLIS 0.9.0 (zen3), small products AVX2", "portable (AVX2)" or, where BLIS has no kernels for
 * what the processor can do, "portable (AVX-512), not BLIS 0.9.0 (generic)". Writes at most size bytes, NUL included. */
PK_API void pk_matrix_backend(char *text, size_t size);

PK__END_C

/* pathkernel/data/array.h: n-dimensional arrays in NumPy's .npy files: mapped, written, grown by whole rows.
 *
 * Files are little-endian, in C order, of floating-point numbers, integers or bools. They are regular files: a pipe or a directory is
 * refused at once, and a symbolic link where a file is to be written; no file gets descriptor 0, 1 or 2, so that what a
 * program prints never ends in it. Every size in a file is checked against the file before it is believed. Growing files
 * are not synchronised: what a process wrote survives the process, a power cut may cost the last seconds.
 */
PK__BEGIN_C

typedef enum pk_type {
    PK_FLOAT64 = 1,
    PK_FLOAT32,
    PK_INT64,
    PK_UINT8,
    PK_INT8,
    PK_INT16,
    PK_INT32,
    PK_UINT16,
    PK_UINT32,
    PK_BOOL /* one byte, 0 or 1 */
} pk_type;

/* Bytes of one item, and NumPy's name ("float64"); 0 and "unknown" for other values. */
PK_API size_t pk_type_size(pk_type type);
PK_API const char *pk_type_name(pk_type type);

/* 1 for the integers and bool, whose items every int64_t holds; 0 for others. */
PK_API int pk_type_is_integer(pk_type type);

#define PK_ARRAY_RANK 8

/* A read-only array in C order: a view of memory, memory of its own, or a mapped file. Zeroed: none.
 * Item (i0, i1, ...) is item (i0 * shape[1] + i1) * shape[2] + ... of data, which is aligned for its type. */
typedef struct pk_array {
    pk_type type;
    int rank; /* 0: one item */
    size_t shape[PK_ARRAY_RANK];
    const void *data;
    size_t row_items;   /* shape[1] * shape[2] * ... */
    size_t extra_bytes; /* PK_ARRAY_PARTIAL: bytes in the file after its last whole row */
    /* Private: how to release. */
    void *mapping;
    size_t mapping_bytes;
    void *owned;
    int file; /* descriptor + 1 of the file that pk_array_read reads; 0: none */
    size_t file_offset;
} pk_array;

/* A view of memory that must outlive it. Zeroed where rank is not in [0, PK_ARRAY_RANK], the type is
 * unknown, or the size overflows. */
PK_API pk_array pk_array_view(pk_type type, int rank, const size_t *shape, const void *data);

/* Rows first .. first + count - 1 as a view; they must exist. */
PK_API pk_array pk_array_rows(const pk_array *array, size_t first, size_t count);

/* The number of items, and of rows (shape[0]; 1 for rank 0). */
PK_API size_t pk_array_items(const pk_array *array);
PK_API size_t pk_array_length(const pk_array *array);

/* The file may be in the middle of being appended to: its size says how many whole rows it has, not its
 * header, which may lag behind or run ahead. */
#define PK_ARRAY_PARTIAL 1u
/* Keep the file open, so that pk_array_read reads it and not the mapping. */
#define PK_ARRAY_KEEP_OPEN 2u

/* Maps a .npy file (versions 1.0, 2.0, 3.0) and reads its header only. Without PK_ARRAY_PARTIAL the file
 * must be exactly as long as its header says. Data that the header leaves misaligned (NumPy never does)
 * is copied instead. The file must not shrink while it is mapped: touching rows that are gone is SIGBUS.
 * PK_IO: cannot be opened, is no regular file. PK_FORMAT: not .npy, truncated, a header that lies.
 * PK_UNSUPPORTED: big-endian, Fortran order, another item type, rank > PK_ARRAY_RANK.
 * PK_OVERFLOW: sizes past half the address space. *array is untouched on an error. */
PK_API PK__MUST_USE pk_status pk_array_map(pk_context *context, const char *path, unsigned flags,
                                           pk_array *array);

/* The same without a mapping: data is NULL, the file is open, and pk_array_read is the only way to the items. Whatever its
 * size, it takes no memory. */
PK_API PK__MUST_USE pk_status pk_array_open(pk_context *context, const char *path, unsigned flags,
                                            pk_array *array);

/* Gives back what the array holds, through the context it came from, and zeroes it. A zeroed array or NULL
 * is allowed. */
PK_API void pk_array_release(pk_context *context, pk_array *array);

/* out[i] = item first + i (flat index) for i < count, converted; the items must exist. */
PK_API void pk_array_reals(const pk_array *array, size_t first, size_t count, pk_real *out);

/* The same from memory or, where the array has a file that is open, from there: from several threads, too. PK_IO where the
 * file has become shorter, which a mapping answers with SIGBUS. */
PK_API PK__MUST_USE pk_status pk_array_read(pk_context *context, const pk_array *array, size_t first,
                                            size_t count, pk_real *out);

/* The same as int64_t, of an array of integers or bools in memory. */
PK_API void pk_array_integers(const pk_array *array, size_t first, size_t count, int64_t *out);

/* Whether the rows of an array are what something of the shape dims[0 .. rank - 1] takes: the same dimensions in the
 * same order, dimensions of 1 left out on both sides; or, where the rows or dims have one other dimension only, the same
 * number of items. So rows of 1x8x6 are (M, 1, 8, 6), (M, 8, 6), (M, 8, 6, 1) or (M, 48), but not (M, 6, 8), which holds
 * as many numbers in another order. name stands before the message. PK_SHAPE. */
PK_API PK__MUST_USE pk_status pk_array_check_rows(pk_context *context, const pk_array *array, int rank,
                                                  const size_t *dims, const char *name);

/* Writes a whole file: path + ".tmp" first, then renamed, so that path is either as before or complete.
 * PK_ARGUMENT, PK_OVERFLOW, PK_MEMORY, PK_IO. */
PK_API PK__MUST_USE pk_status pk_array_write(pk_context *context, const char *path, pk_type type, int rank,
                                             const size_t *shape, const void *data);

/* A .npy file that grows by whole rows. Zeroed: closed. One writer a file. At any instant, kill -9 included,
 * the file holds every row whose append returned, np.load can read it, and pk_array_map with
 * PK_ARRAY_PARTIAL sees all of them. */
typedef struct pk_array_writer {
    size_t rows; /* read only: whole rows in the file */
    /* Private: */
    int file; /* descriptor + 1; 0: closed */
    pk_type type;
    int rank;
    size_t shape[PK_ARRAY_RANK];
    size_t row_bytes, header_bytes, header_rows, appends;
    char name[96]; /* the end of the path, for messages */
} pk_array_writer;

/* Makes a file of no rows, or empties an existing one. row_shape = shape[1 .. rank - 1], rank >= 1; a row
 * must have at least one item. */
PK_API PK__MUST_USE pk_status pk_array_create(pk_context *context, const char *path, pk_type type, int rank,
                                              const size_t *row_shape, pk_array_writer *writer);

/* Opens a file for appending after its first rows rows and cuts off what follows them. PK_SHAPE where the
 * file has another type or row shape, or fewer rows; otherwise errors as pk_array_map. */
PK_API PK__MUST_USE pk_status pk_array_reopen(pk_context *context, const char *path, pk_type type, int rank,
                                              const size_t *row_shape, size_t rows, pk_array_writer *writer);

/* Appends whole rows with one write (2). Where the disk is full the file is cut back to its earlier rows, the
 * writer stays usable, and the status is PK_IO. The header is rewritten at every 256th append only. */
PK_API PK__MUST_USE pk_status pk_array_append(pk_context *context, pk_array_writer *writer, size_t rows,
                                              const void *data);

/* Brings the row count in the header up to date. */
PK_API PK__MUST_USE pk_status pk_array_flush(pk_context *context, pk_array_writer *writer);

/* Flushes and closes; the writer is closed and zeroed whatever the status. A zeroed writer is allowed. */
PK_API PK__MUST_USE pk_status pk_array_close(pk_context *context, pk_array_writer *writer);

PK__END_C

/* pathkernel/data/dataset.h: examples with their targets: checked, gathered, read from IDX and CSV files. */
PK__BEGIN_C

/* Examples: inputs (N, D...), targets (N,) labels, or (N,) or (N, C) numbers. (N,) integers or bools are labels; any other
 * array holds numbers. */
typedef struct pk_dataset {
    pk_array inputs, targets;
} pk_dataset;

/* N, and the product of D... */
PK_API size_t pk_dataset_examples(const pk_dataset *dataset);
PK_API size_t pk_dataset_width(const pk_dataset *dataset);

/* Whether the data fit a network of input_width inputs and outputs outputs: at least one example, as many
 * targets as inputs, all numbers finite as pk_real. Reads all floats; O(N (D + C)). What the numbers mean,
 * also the range of labels, is the loss's: pk_loss_check.
 * PK_SHAPE, PK_NOT_FINITE, PK_ARGUMENT; messages name the row. */
PK_API PK__MUST_USE pk_status pk_dataset_check(pk_context *context, const pk_dataset *dataset,
                                               size_t input_width, size_t outputs);

/* rows (count x width) = the inputs of items[0 .. count - 1], which must be in range. Any thread. */
PK_API void pk_dataset_inputs(const pk_dataset *dataset, const int64_t *items, size_t count, pk_real *rows);

/* Two IDX files of unsigned bytes (MNIST's format, unpacked) -> inputs (N, H, W) float64 = scale * byte,
 * targets (N,) int64. Owns its memory. PK_IO, PK_FORMAT, PK_UNSUPPORTED, PK_SHAPE (N differs), PK_MEMORY... */
PK_API PK__MUST_USE pk_status pk_dataset_idx(pk_context *context, const char *images_path,
                                             const char *labels_path, double scale, pk_dataset *dataset);

/* A table of finite decimal numbers: comma-separated, one example a line, LF or CRLF. The last target_columns
 * columns become float64 targets, (N,) or (N, target_columns); with 0 the last column is an integer label.
 * A first line without any number is a header. Independent of the locale. Anything else (ragged lines, empty
 * lines but at the end, text) is PK_FORMAT with line and column. Owns its memory. */
PK_API PK__MUST_USE pk_status pk_dataset_csv(pk_context *context, const char *path, int target_columns,
                                             pk_dataset *dataset);

/* *rows = a view of count consecutive examples from first on. PK_SHAPE where they do not exist. */
PK_API PK__MUST_USE pk_status pk_dataset_rows(pk_context *context, const pk_dataset *dataset, size_t first,
                                              size_t count, pk_dataset *rows);

PK_API void pk_dataset_release(pk_context *context, pk_dataset *dataset);

PK__END_C

/* pathkernel/network/graph.h: a static graph of batched operations, each one table entry with its forward, reverse and
 * tangent rules. Weights are one flat vector w of P numbers.
 */
PK__BEGIN_C

enum { PK_SHAPE_RANK = 4, PK_NODE_INPUTS = 4, PK_NODE_ATTRIBUTES = 16, PK_CONSTANT_NAME = 32 };

/* The shape of one example at a node; width is the product of dims. */
typedef struct pk_shape {
    int rank;
    size_t dims[PK_SHAPE_RANK];
} pk_shape;

/* How an operation depends on its inputs. */
typedef enum pk_smoothness {
    PK_LINEAR,           /* linear (a constant may be added) */
    PK_PIECEWISE_LINEAR, /* linear between the zeros of its switch functions */
    PK_SMOOTH,           /* analytic, not polynomial */
    PK_SURROGATE         /* the reverse rule is not the derivative: no path integral can close */
} pk_smoothness;

/* How the gradient with respect to the weights is represented, see integral.h. */
typedef enum pk_tangent_form {
    PK_TANGENT_NONE, /* no weights */
    PK_TANGENT_OUTER, /* weight (fan_out, fan_in) times input, then perhaps plus bias (fan_out), and no more, at `positions`
                         places: sum over places of cotangent (x) input, sum of cotangents. One input. */
    PK_TANGENT_ROWS /* materialised: row_gradients */
} pk_tangent_form;

typedef enum pk_option_kind {
    PK_OPTION_NUMBER, /* a number */
    PK_OPTION_PAIR,   /* AxB, or A for both; two attributes */
    PK_OPTION_FLAG,   /* the name alone: the attribute becomes `least` */
    PK_OPTION_CHOICE  /* one of the words of `choices`, its number */
} pk_option_kind;

/* A word of an operation in the network language and the attribute that it sets. */
typedef struct pk_option {
    const char *name; /* NULL ends a list */
    pk_option_kind kind;
    int attribute;
    int position; /* 1, 2, ...: the word of this number; 0: name=value, or the name of a flag, anywhere */
    int required;
    double least, most; /* what a number may be */
    int whole;
    const char *choices; /* "a b c" */
} pk_option;

struct pk_operation;
struct pk_graph;

typedef struct pk_node {
    const struct pk_operation *operation; /* NULL for the input */
    int input_count;
    int inputs[PK_NODE_INPUTS]; /* earlier nodes */
    pk_shape shape;
    size_t width;
    size_t weight_offset, weight_count;
    double attributes[PK_NODE_ATTRIBUTES];
    pk_real *constants;                      /* fixed numbers that are no weights; owned by the graph */
    int constants_shared;                    /* they are an earlier node's */
    size_t constant_count, constant_columns; /* columns: of the array that the network language names */
    char constant_name[PK_CONSTANT_NAME];    /* its name, empty where it has none */
    pk_tangent_form tangent_form;            /* the operation's, unless its shape rule chose another */
    size_t positions, fan_in, fan_out;       /* PK_TANGENT_OUTER */
    int unfolds; /* PK_TANGENT_OUTER: unfold makes the inputs of each place; 0: in[0] holds them one after the other */
    int layer; /* number among the nodes with weights, -1 without */
    /* Along a line w + t d: */
    int varies;         /* the value depends on t */
    int degree;         /* the value is a (piecewise) polynomial in t of at most this degree; -1: it is not */
    int input_constant; /* no input depends on t */
    int cotangent_constant;     /* d output / d value does not depend on t */
    int shared[PK_NODE_INPUTS]; /* a later node (or an earlier input) takes the same input */
    int unread;                 /* no node takes it, and it is not the output */
    int only_reader;            /* the node that alone takes it, and once; -1: there is none, or several */
    int layer_node; /* of node l, whatever it is: the number of the node that is layer l, see pk_graph_layer */
} pk_node;

/* One operation applied to a batch. Arrays are row-major, rows x width; cotangents are rows x copies x
 * width: one row may carry several cotangents. */
typedef struct pk_call {
    const pk_node *node;
    size_t rows, copies;
    int threads;         /* that a rule may use, by shapes only and to the same bits; 0: one */
    pk_context *context; /* of the caller, where there are several; may be NULL */
    size_t in_width[PK_NODE_INPUTS];
    const pk_real *weights;   /* this node's */
    const pk_real *direction; /* tangent of the weights; NULL: zero */
    const pk_real *in[PK_NODE_INPUTS];
    pk_real *out;
    const pk_real *in_tangent[PK_NODE_INPUTS]; /* NULL: zero */
    pk_real *out_tangent;
    const pk_real *out_cotangent;
    pk_real *in_cotangent[PK_NODE_INPUTS]; /* NULL: not wanted */
    int accumulate[PK_NODE_INPUTS];        /* add to in_cotangent instead of writing it */
    pk_real *gradient;
    pk_real *scratch;
} pk_call;

/* An operation F(weights, in). Functions must not fail, allocate or keep state; rows are independent. */
typedef struct pk_operation {
    const char *name; /* its word in the network language */
    pk_smoothness smoothness;
    pk_tangent_form tangent_form;
    int linear_in_weights;    /* F is linear and homogeneous in its weights (or has none) */
    const pk_option *options; /* what may follow the name in the network language; NULL: nothing */
    double defaults[PK_NODE_ATTRIBUTES];
    /* Checks the inputs (the attributes fit the options), sets node->shape and node->weight_count, for
     * PK_TANGENT_OUTER positions, fan_in and fan_out where they are not 1, input width and width, and unfolds = 0
     * where unfold would only copy in[0].
     * NULL: the first input's shape, no weights. */
    pk_status (*shape)(pk_context *context, const struct pk_graph *graph, pk_node *node);
    size_t (*scratch)(const pk_node *node, size_t rows, size_t copies); /* numbers; NULL: none */
    void (*forward)(const pk_call *call);                               /* out = F */
    void (*tangent)(const pk_call *call); /* out_tangent = sum_j dF/din_j in_tangent_j + dF/dw direction */
    void (*reverse)(const pk_call *call); /* in_cotangent_j (+)= (dF/din_j)^T out_cotangent */
    void (*weight_gradient)(
        const pk_call *call);                   /* gradient += sum_rows (dF/dw)^T out_cotangent, copies == 1 */
    void (*row_gradients)(const pk_call *call); /* gradient[row][copy][weight] = (dF/dw)^T out_cotangent */
    /* Piecewise-linear: switch functions, linear in the inputs, whose zeros separate the pieces. */
    size_t (*switch_count)(const pk_node *node);
    void (*switches)(const pk_call *call); /* out[row][switch] */
    int elementwise;                       /* one input of the same shape, number by number, no weights */
    /* PK_SMOOTH: in_cotangent_j += (d/de (dF/din_j)(in + e in_tangent))^T out_cotangent, for second derivatives.
     * Operations that are linear in their inputs or between kinks need none. */
    void (*curvature)(const pk_call *call);
    /* PK_TANGENT_OUTER: out (rows x positions x fan_in) = the inputs of each place; NULL: in[0] is that. A node whose
     * `unfolds` is 0 never needs it. */
    void (*unfold)(const pk_call *call);
    int channels_first; /* values are fan_out x positions, not positions x fan_out */
    /* Whether one row of data may come in; NULL: any. The message names row and number. */
    pk_status (*check)(pk_context *context, const pk_node *node, size_t row, const pk_real *in);
    /* Starting weights; NULL: uniform in +-1/sqrt(fan_in), or of the input's width. */
    void (*initialize)(const pk_node *node, pk_random *random, pk_real *weights);
} pk_operation;

typedef struct pk_graph {
    size_t node_count, node_capacity;
    pk_node *nodes; /* in topological order; nodes[0] is the input, the last one the output */
    size_t parameters, layers, input_width, output_width, widest;
    pk_shape input_shape;
    int degree;    /* of the output in t along a line, -1: not polynomial */
    int switched;  /* some piecewise-linear node depends on the weights */
    int surrogate; /* some node that depends on the weights is PK_SURROGATE */
    int checked;   /* some operation restricts its data: pk_graph_check_inputs */
    char *text;    /* its network line where it came from one, else NULL; owned */
} pk_graph;

/* Writes a shape as 1x28x28 into text (PK_SHAPE_TEXT bytes); returns text. */
enum { PK_SHAPE_TEXT = 96 };
PK_API const char *pk_shape_text(const pk_shape *shape, char *text);

/* Starts a zeroed graph with its input. */
PK_API PK__MUST_USE pk_status pk_graph_input(pk_context *context, pk_graph *graph, const pk_shape *shape);
/* Appends operation(inputs); attributes (PK_NODE_ATTRIBUTES numbers) may be NULL for the operation's
 * defaults. *node (may be NULL) is its number. The last node added is the output. The graph is unchanged
 * on an error. */
PK_API PK__MUST_USE pk_status pk_graph_add(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                           int input_count, const int *inputs, const double *attributes,
                                           int *node);
/* The same for an operation with fixed numbers, which are copied. */
PK_API PK__MUST_USE pk_status pk_graph_add_constants(pk_context *context, pk_graph *graph,
                                                     const pk_operation *operation, int input_count,
                                                     const int *inputs, const double *attributes,
                                                     size_t constant_count, const pk_real *constants,
                                                     int *node);
/* Whether a row of data (input width) may go in: tokens are whole numbers below the vocabulary's size. PK_ARGUMENT names
 * the row by its number. */
PK_API PK__MUST_USE pk_status pk_graph_check_inputs(pk_context *context, const pk_graph *graph, size_t row,
                                                    const pk_real *inputs);
/* The node of a layer (0 <= layer < graph->layers). */
PK_API const pk_node *pk_graph_layer(const pk_graph *graph, size_t layer);
PK_API void pk_graph_release(pk_context *context, pk_graph *graph);

PK__END_C

/* pathkernel/network/pass.h: autodiff. A tape is the memory of one batch going through a graph: forward, reverse, tangent.
 *
 * Everything here also works along a line w + t d with an own t for each row (pk__line): an operation that is linear in
 * its weights gives
 *     F(w + t d, a) = F(w, a) + t F(d, a),
 * so that rows with their own t need no own weights, only two calls for the whole batch.
 */
PK__BEGIN_C

/* outputs (rows x output_width) = f(weights, inputs (rows x input_width)), tiles of rows in parallel.
 * outputs must not overlap inputs. Cost 2 P rows flops. */
PK_API PK__MUST_USE pk_status pk_graph_evaluate(pk_context *context, const pk_graph *graph,
                                                const pk_real *weights, pk_matrix inputs, pk_matrix outputs);

PK__END_C

/* pathkernel/network/elementwise.h: elementwise operations. */
PK__BEGIN_C

/* The one attribute of leaky_relu (slope below zero), scale (factor), softplus (beta), sine (frequency), and of sign
 * and step (sharpness of the surrogate's slope), for pk_graph_add. */
enum { PK_ACTIVATION_NUMBER };

PK__END_C

/* pathkernel/network/dense.h: the dense layer, and the usual distributions of starting weights. */
PK__BEGIN_C

/* Attributes of dense, for pk_graph_add: outputs, 1 with bias, initialisation, gain. */
enum { PK_DENSE_OUTPUTS, PK_DENSE_BIAS, PK_DENSE_INITIAL, PK_DENSE_GAIN };

/* Starting weights: PyTorch's default for Linear and Conv2d is uniform in +-1/sqrt(fan_in), biases too. The others
 * have zero biases; normal ones have the standard deviation gain times
 *     He: sqrt(2 / fan_in), Glorot: sqrt(2 / (fan_in + fan_out)), LeCun: sqrt(1 / fan_in), normal: 1,
 * uniform ones the same standard deviation. */
typedef enum pk_initial {
    PK_INITIAL_DEFAULT,
    PK_INITIAL_HE,
    PK_INITIAL_HE_UNIFORM,
    PK_INITIAL_GLOROT,
    PK_INITIAL_GLOROT_UNIFORM,
    PK_INITIAL_LECUN,
    PK_INITIAL_LECUN_UNIFORM,
    PK_INITIAL_NORMAL,
    PK_INITIAL_ZERO,
    PK_INITIAL_STANDARD /* weights and biases standard normal, whatever the gain: the NTK parameterisation's */
} pk_initial;

PK__END_C

/* pathkernel/network/shape.h: operations without arithmetic of their own: sums of branches, flattening, learned
 * positions, and products with a fixed sparse matrix.
 */
PK__BEGIN_C

/* Attributes of position, for pk_graph_add: tokens and width of the values that it is to be added to. */
enum { PK_POSITION_TOKENS, PK_POSITION_WIDTH };

PK__END_C

/* pathkernel/network/image.h: operations on images of channels x height x width: convolution and pooling. */
PK__BEGIN_C

/* Attributes of conv and of the pools, for pk_graph_add; pairs are height, width. */
enum {
    PK_CONVOLUTION_CHANNELS,
    PK_CONVOLUTION_KERNEL,
    PK_CONVOLUTION_STRIDE = 3,
    PK_CONVOLUTION_PAD = 5,
    PK_CONVOLUTION_DILATION = 7,
    PK_CONVOLUTION_GROUPS = 9,
    PK_CONVOLUTION_BIAS,
    PK_CONVOLUTION_INITIAL,
    PK_CONVOLUTION_GAIN
};
enum { PK_POOL_KERNEL, PK_POOL_STRIDE = 2 /* 0: the kernel */, PK_POOL_PAD = 4 };

PK__END_C

/* pathkernel/network/norm.h: operations on normalisation and softmax. */
PK__BEGIN_C

/* Attributes of normalize and rms_normalize (over the trailing dims dimensions), of standardize (epsilon
 * alone), and of affine, for pk_graph_add. affine with 0 dimensions has one factor for each channel, the
 * first dimension. */
enum { PK_NORM_EPSILON, PK_NORM_DIMS };
enum { PK_AFFINE_BIAS, PK_AFFINE_DIMS };

PK__END_C

/* pathkernel/network/sequence.h: operations on tokens: embedding, attention, and what makes one vector of several. */
PK__BEGIN_C

/* Attributes, for pk_graph_add. */
enum { PK_EMBEDDING_TOKENS, PK_EMBEDDING_WIDTH };
enum { PK_ATTEND_HEADS, PK_ATTEND_CAUSAL, PK_ATTEND_SHARED };
enum { PK_TOKEN_INDEX };

PK__END_C

/* pathkernel/network/operations.h: the built-in operations of the autodiff by name.
 *
 * To add one, write its rules and its line in its module's table; to add one from outside, fill a pk_operation
 * and give it to pk_graph_add. The engine knows nothing of single operations.
 */
PK__BEGIN_C

/* A built-in operation by name, NULL where there is none. */
PK_API const pk_operation *pk_operation_find(const char *name);
/* The built-in operations one by one: NULL behind the last one. */
PK_API const pk_operation *pk_operation_at(size_t index);

PK__END_C

/* pathkernel/network/language.h: the network language and the initialisation of weights.
 *
 *     input 64; dense 32; tanh; dense 32 nobias; leaky_relu 0.01; dense 10
 *     input 1x8x8; conv 8 3x3 pad=1; relu; residual( conv 8 3x3 pad=1; relu | conv 8 1x1 ); flatten; dense 10
 *
 * Layers are separated by `;`, words by blanks. `input 64` or `input 1x28x28` comes first. Most layers are one
 * operation of the same name with its options, built in or from outside (pk_context.operations); what is made of
 * several is in the table pk__composites. Parameters are
 * in PyTorch's order: layers in order, the branches of a residual in order, each layer's weight, then its bias.
 */
PK__BEGIN_C

/* Where the arrays come from that a network names, such as the matrix of `propagate NAME`. load fills a zeroed array,
 * which is released after use; its message names what is missing. */
typedef struct pk_constants {
    pk_status (*load)(void *user, pk_context *context, const char *name, pk_array *array);
    void *user;
} pk_constants;

/* Builds the graph that text describes into a zeroed graph; graph->text is the text with single blanks. constants may
 * be NULL for a network that names none.
 * PK_FORMAT, PK_ARGUMENT or PK_SHAPE name the layer and the word; the graph stays zeroed then. */
PK_API PK__MUST_USE pk_status pk_network_parse_with(pk_context *context, const char *text,
                                                    const pk_constants *constants, pk_graph *graph);
PK_API PK__MUST_USE pk_status pk_network_parse(pk_context *context, const char *text, pk_graph *graph);

/* The arrays that the network language named when graph was built; graph has to outlive the result. */
PK_API pk_constants pk_graph_constants(const pk_graph *graph);
/* The node behind `after` (NULL: the first) that holds a named array, with the array's view; NULL where there is none. */
PK_API const pk_node *pk_graph_named(const pk_graph *graph, const pk_node *after, pk_array *array);

/* weights (P) = each layer's own initialisation, for most PyTorch's default: weights and biases uniform in
 * +-1/sqrt(fan-in), from the generator with this seed, one stream per layer. */
PK_API PK__MUST_USE pk_status pk_network_initialize(pk_context *context, const pk_graph *graph, uint64_t seed,
                                                    pk_real *weights);

PK__END_C

/* pathkernel/training/loss.h: losses, their derivatives, and the gradient of a weighted batch.
 *
 * A loss is one row of the table pk__losses: its name, a function that gives value and gradient, one that
 * multiplies with its Hessian, what its targets must be, and whether an integer target is a class. Definitions are
 * those of PyTorch's modules, per example; a batch weights its examples (1/count where no weights are given,
 * PyTorch's mean).
 *
 *     name                    l(f, y), C outputs                                      PyTorch
 *     squared                 sum_j (f_j - y_j)^2 / 2
 *     mean_squared            sum_j (f_j - y_j)^2 / C                                 MSELoss
 *     softmax_cross_entropy   sum_j y_j (log sum_k exp f_k - f_j)                     CrossEntropyLoss
 *     logistic                sum_j (log(1 + exp f_j) - y_j f_j) / C                  BCEWithLogitsLoss
 *     nll                     - sum_j y_j f_j                                         NLLLoss
 *     huber                   sum_j h(f_j - y_j) / C, h(d) = |d| < 1 ? d^2/2 : |d| - 1/2   SmoothL1Loss
 *     hinge                   sum_{j != k} max(0, 1 - f_k + f_j) / C, y_k = 1         MultiMarginLoss
 *                             C = 1: max(0, 1 - y f)
 *
 * The derivative at a kink of hinge is 0, and so is the second one of huber at |d| = 1, as in PyTorch. Exponentials
 * never overflow, and small residuals (a confident, correct classification) keep their relative accuracy.
 */
PK__BEGIN_C

typedef enum pk_loss {
    PK_SQUARED = 1,
    PK_MEAN_SQUARED,
    PK_SOFTMAX_CROSS_ENTROPY,
    PK_LOGISTIC,
    PK_NLL,
    PK_HUBER,
    PK_HINGE
} pk_loss;

/* The loss of that name. PK_FORMAT names what is not a loss and lists those that are. */
PK_API PK__MUST_USE pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss);
/* The name pk_loss_parse takes; "unknown" for a value that is not a loss. */
PK_API const char *pk_loss_name(pk_loss loss);

/* l(f, y) for one example. f: outputs numbers, what the network gives; target: outputs numbers as
 * pk_loss_targets writes them. Targets with entries 0 do not multiply infinities. NaN for a value that is
 * not a loss. */
PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target);
/* gradient = dl/df (outputs numbers) of one example; may be f itself, not target. */
PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient);
/* product = (d2l/df2) direction (outputs numbers each) of one example; may be the direction itself. */
PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product);

/* Do the targets fit the loss and the number of outputs? Reads every target.
 *   (N,) integers        classes in [0, outputs), made one-hot. With one output they are numbers instead
 *                        (0 or 1 for logistic, +1 or -1 for hinge), except for the two losses on
 *                        (log-)probabilities.
 *   (N, outputs) floats, or (N,) where outputs == 1: finite, and
 *                        softmax_cross_entropy, nll: >= 0 (a row need not sum to 1)
 *                        logistic: in [0, 1]
 *                        hinge: one 1, the others 0; with one output +1 or -1.
 * Statuses as pk_dataset_check; the message names the first row that does not fit. Cost: two passes over the
 * targets; one row is allocated. */
PK_API PK__MUST_USE pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset,
                                            size_t outputs);
/* targets (count x outputs): the rows items[0..count) of the dataset's targets as vectors. The dataset has
 * passed pk_loss_check, and items are in range. */
PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets);

/* The examples of one step: count rows of a dataset; a row may repeat. */
typedef struct pk_batch {
    size_t count;
    const int64_t *items;
    const double *weights; /* c_b; NULL: 1 / count each */
} pk_batch;

struct pk__gradient_lane;
struct pk__gradient_group;

/* Memory for pk_batch_gradient; zeroed = none. The graph must outlive it. */
typedef struct pk_gradient_workspace {
    const pk_graph *graph;
    size_t largest_batch; /* examples */
    /* Private: */
    int threads;
    struct pk__gradient_lane *lanes;   /* threads: a tape and the rows of one block */
    struct pk__gradient_group *groups; /* one result a group */
    pk_real *partial;                  /* (groups - 1) x P */
    void *memory;
} pk_gradient_workspace;

/* Takes the memory for batches of up to largest_batch examples with the threads of the context: about 64
 * rows of activations and cotangents a thread, and for large batches partial gradients (at most 32, and
 * no more than 2^22 numbers where P < 2^21). PK_ARGUMENT, or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph,
                                                  size_t largest_batch, pk_gradient_workspace *workspace);
PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace);

/* L = sum_b c_b l(f(w, x_items[b]), y_items[b]) and its gradient with respect to w.
 * weights, gradient: graph->parameters numbers, gradient is overwritten and overlaps nothing; objective may
 * be NULL. An empty batch gives 0. The dataset has passed pk_loss_check.
 * Cost: about 6 P flops an example; no allocation; batches of little work start no threads. The batch is
 * cut into blocks and these into groups by shapes only, groups are added in order: the same bits for any
 * number of threads.
 * PK_ARGUMENT (also for an item out of range), PK_SHAPE: nothing is written. PK_NOT_FINITE: an output (the
 * message names its position in the batch), the objective or the gradient is not finite; the outputs of
 * this function hold what was found. */
PK_API PK__MUST_USE pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                const pk_real *weights, const pk_dataset *dataset,
                                                const pk_batch *batch, pk_gradient_workspace *workspace,
                                                double *objective, pk_real *gradient);

PK__END_C

/* pathkernel/training/derivatives.h: derivatives of a network, batched: products with its Jacobian from either side, the Jacobian
 * itself, gradients example by example, and products with the Hessian and the Gauss-Newton matrix of an objective.
 *
 *     f(w, x)   the network: P weights, D inputs, C outputs
 *     J = df/dw (C x P),  K = df/dx (C x D), one of each for every row of inputs
 *
 * They are exact derivatives (no differences), for networks in words and for those built node by node, with operations
 * of one's own. At a kink the derivative is PyTorch's; an operation of the kind PK_SURROGATE gives its surrogate.
 * Batches are cut into blocks of rows by shapes only, and sums are added in order: the same bits for any number of
 * threads. Each call allocates: one tape of a block for each thread.
 */
PK__BEGIN_C

/* For all functions here: inputs are rows x D. Results overlap nothing that is read, and no other result. A matrix
 * whose data are NULL is not wanted (a result) or zero (a direction).
 * PK_ARGUMENT (also for data that an operation does not take), PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT:
 * results are untouched. PK_UNSUPPORTED, too: a derivative with respect to inputs that are tokens does not exist.
 * PK_NOT_FINITE: a result is not finite; the message names the first such row, results hold what was found. */

/* The reverse product. With a cotangent u_r (C) for each row r:
 *     weight_gradients (rows x P), row r:  J(x_r)^T u_r        input_gradients (rows x D), row r:  K(x_r)^T u_r
 * With the gradient of a loss as u_r (pk_loss_gradient) these are the gradients of that loss.
 * Cost: about 4 P flops a row, 2 P more for weight_gradients. */
PK_API PK__MUST_USE pk_status pk_vjp(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix inputs, pk_matrix cotangents, pk_matrix weight_gradients,
                                     pk_matrix input_gradients);
/* gradient (P) = sum_r J(x_r)^T u_r, without the rows. Cost: about 6 P flops a row. */
PK_API PK__MUST_USE pk_status pk_vjp_sum(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                         pk_matrix inputs, pk_matrix cotangents, pk_real *gradient);
/* The forward product: tangents (rows x C), row r: J(x_r) v + K(x_r) z_r. v: P numbers or NULL; input_directions: rows
 * x D, row r is z_r. Cost: about 6 P flops a row. */
PK_API PK__MUST_USE pk_status pk_jvp(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix inputs, const pk_real *weight_direction,
                                     pk_matrix input_directions, pk_matrix tangents);
/* weight_jacobian (rows C x P): row r C + c is the gradient of output c for inputs r; input_jacobian (rows C x D)
 * likewise. Cost: a forward pass, and C times that of pk_vjp backwards. */
PK_API PK__MUST_USE pk_status pk_jacobian(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                          pk_matrix inputs, pk_matrix weight_jacobian,
                                          pk_matrix input_jacobian);

/* For each example b of a batch, whose weights c_b do not matter here: losses (count, may be NULL)
 * l_b = l(f(w, x_b), y_b), and gradients (count x P), row b: grad_w l_b. The dataset has passed pk_loss_check. */
PK_API PK__MUST_USE pk_status pk_loss_gradients(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                const pk_real *weights, const pk_dataset *dataset,
                                                const pk_batch *batch, double *losses, pk_matrix gradients);

/* product (P) = H v with the Hessian H = d2L / dw2 of L = sum_b c_b l(f(w, x_b), y_b), as in pk_batch_gradient: forward
 * over reverse (Pearlmutter 1994), exact between kinks. Cost: about 14 P flops an example.
 * PK_UNSUPPORTED names an operation that has no second derivative here: a surrogate, a smooth one without a curvature
 * rule, or one whose weights do not enter it linearly, or together with a nonlinear function of its inputs. */
PK_API PK__MUST_USE pk_status pk_hessian_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                 const pk_real *weights, const pk_dataset *dataset,
                                                 const pk_batch *batch, const pk_real *direction,
                                                 pk_real *product);
/* product (P) = G v with the Gauss-Newton matrix G = sum_b c_b J_b^T (d2l/df2)_b J_b (Schraudolph 2002), which is H
 * without the curvature of the network; for every operation. Cost: about 10 P flops an example. */
PK_API PK__MUST_USE pk_status pk_gauss_newton_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                                      const pk_real *weights, const pk_dataset *dataset,
                                                      const pk_batch *batch, const pk_real *direction,
                                                      pk_real *product);

PK__END_C

/* pathkernel/training/optimizer.h: update rules with their linear form for attribution, learning-rate schedules,
 * clipping.
 *
 * Semantics and defaults are PyTorch's (torch.optim.SGD, Adam, AdamW). A rule is one row of the table
 * pk__optimizer_rules: name, keys with defaults and ranges, state vectors, update, linear form.
 *
 *     pk_optimizer optimizer;
 *     pk_status status = pk_optimizer_parse(context, "adamw beta2=0.98 weight_decay=0.1", &optimizer);
 *     pk_optimizer_update(&optimizer, step, rate, 1.0, P, w, gradient, state, update);   // then w += update
 */
PK__BEGIN_C

typedef enum pk_optimizer_kind { PK_SGD = 0, PK_ADAM, PK_ADAMW } pk_optimizer_kind;

/* Zeroed = plain SGD. A rule reads its own fields only. */
typedef struct pk_optimizer {
    pk_optimizer_kind kind;
    double momentum, dampening;   /* sgd */
    double weight_decay;          /* coupled L2 for sgd and adam, decoupled for adamw */
    double beta1, beta2, epsilon; /* adam, adamw */
    int nesterov;                 /* sgd */
} pk_optimizer;

/* PyTorch's defaults: sgd all 0; adam 0.9, 0.999, 1e-8, no decay; adamw the same with weight_decay 0.01. */
PK_API pk_optimizer pk_optimizer_default(pk_optimizer_kind kind);
PK_API pk_optimizer pk_optimizer_adam(void);
PK_API pk_optimizer pk_optimizer_adamw(void);

/* "sgd momentum=0.9 nesterov=1": a name, then keys in any order; what is not given has PyTorch's default.
 *     sgd         momentum= dampening= nesterov=0|1 weight_decay=
 *     adam, adamw beta1= beta2= epsilon= weight_decay=
 * PK_FORMAT for an unknown name or key, a duplicate key, or what is not a number; PK_ARGUMENT as
 * pk_optimizer_check. The message names the word; *optimizer is untouched then. */
PK_API PK__MUST_USE pk_status pk_optimizer_parse(pk_context *context, const char *text,
                                                 pk_optimizer *optimizer);
/* The text that pk_optimizer_parse turns into the same bits, at most size bytes with NUL (256 always do).
 * PK_ARGUMENT for an unknown kind or too small a size; text is "" then. */
PK_API PK__MUST_USE pk_status pk_optimizer_format(const pk_optimizer *optimizer, char *text, size_t size);
/* The ranges PyTorch checks: momentum, weight_decay, epsilon >= 0, betas in [0, 1), Nesterov only with
 * momentum and without dampening; all finite. PK_ARGUMENT names the key and the value. */
PK_API PK__MUST_USE pk_status pk_optimizer_check(pk_context *context, const pk_optimizer *optimizer);

/* How many vectors of P numbers the rule carries from step to step: sgd 0, with momentum 1 (the buffer),
 * adam and adamw 2 (m, then v, both uncorrected). */
PK_API size_t pk_optimizer_state_vectors(const pk_optimizer *optimizer);
/* 1 when D_s is a function of w_s and of step s's gradient alone (plain sgd, decay included). */
PK_API int pk_optimizer_stateless(const pk_optimizer *optimizer);

/* One step: update = D_s, so that w_{s+1} = w_s + D_s, for the gradient gradient_scale * gradient.
 * step counts from 0; state (state_vectors x P) is zero before step 0 and is carried on; NULL where there
 * is none. weights, gradient, update: P numbers; state and update overlap nothing; update NULL: only the state is
 * wanted. Every number is computed on its own, so that a part of the P will do. The optimizer has passed
 * pk_optimizer_check. Cost: one pass; no allocation. Agrees with PyTorch to rounding; D_s is rounded
 * relative to itself and not to w_s. As in PyTorch, epsilon = 0 where v = 0 gives NaN. */
PK_API void pk_optimizer_update(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                double gradient_scale, size_t parameters, const pk_real *weights,
                                const pk_real *gradient, pk_real *state, pk_real *update);

/* D_s as a linear function of gradients. With g' = gradient_scale g + coupled w_s and m_0 = 0:
 *     m_{s+1} = carry m_s + gain g'
 *     D_s     = - p o (enter m_{s+1} + direct g') - decoupled w_s                                        */
typedef struct pk_linear_form {
    double carry, gain, enter, direct, coupled, decoupled;
    double rate;        /* p where it is a scalar; its numerator where it is a vector */
    int preconditioned; /* p is a vector */
} pk_linear_form;

/* The linear form of one step. state: as pk_optimizer_update left it after that step (NULL is allowed
 * where preconditioner is NULL or not needed). preconditioner: p, P numbers, written if the form is
 * preconditioned; NULL: only the scalars are wanted. Adam: p = lr / (1 - beta1^{s+1}) /
 * (sqrt(v_{s+1} / (1 - beta2^{s+1})) + epsilon). */
PK_API void pk_optimizer_linear_form(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                     size_t parameters, const pk_real *state, pk_linear_form *form,
                                     pk_real *preconditioner);

/* min(1, max_norm / (|gradient|_2 + 1e-6)), the factor of torch.nn.utils.clip_grad_norm_. The norm neither
 * overflows nor underflows. NaN where the gradient holds NaN. */
PK_API double pk_clip_scale(const pk_real *gradient, size_t parameters, double max_norm);

typedef enum pk_schedule_kind {
    PK_SCHEDULE_CONSTANT = 0, /* rate */
    PK_SCHEDULE_STEP,         /* rate factor^floor(s / period)                                  StepLR */
    PK_SCHEDULE_COSINE,       /* low + (rate - low) (1 + cos(pi s / period)) / 2     CosineAnnealingLR */
    PK_SCHEDULE_TRIANGULAR,   /* low to rate in period steps and back in period_down          CyclicLR */
    PK_SCHEDULE_ARRAY,        /* rates[s] */
    PK_SCHEDULE_FUNCTION      /* function(user, s) */
} pk_schedule_kind;

/* The learning rate of each step. {0} with a rate is constant. Any kind can be warmed up linearly: it is
 * multiplied by warmup_start + (1 - warmup_start) min(s, warmup) / warmup (LinearLR, chained). */
typedef struct pk_schedule {
    pk_schedule_kind kind;
    double rate, low;
    double factor;              /* 0: 0.1, PyTorch's default */
    size_t period, period_down; /* steps; period_down 0: period */
    size_t warmup;              /* steps; 0: none */
    double warmup_start;        /* 0: 1/3, PyTorch's default */
    const double *rates;
    size_t rates_count;
    double (*function)(void *user, size_t step);
    void *user;
} pk_schedule;

/* The learning rate of a step, counted from 0; past the end of an array its last rate. The schedule has
 * passed pk_schedule_check. */
PK_API double pk_schedule_rate(const pk_schedule *schedule, size_t step);
/* Are all rates of steps 0 .. steps-1 finite and >= 0? A function is not called, only required: who calls
 * it for a step judges its rate. PK_ARGUMENT names the field or the step and its rate. */
PK_API PK__MUST_USE pk_status pk_schedule_check(pk_context *context, const pk_schedule *schedule, size_t steps);

PK__END_C

/* pathkernel/run/run.h: the run directory: a training run as plain NumPy arrays and one text file,
 * written while training, read back mapped.
 *
 *     run.txt              the manifest: network, loss, optimizer
 *     weights.npy          (S+1, P) float32 or float64: w_0 .. w_S
 *     learning_rates.npy   (S,)     float64
 *     batch_offsets.npy    (S+1,)   integers: step s used batch_items[batch_offsets[s] : batch_offsets[s+1]]
 *     batch_items.npy      (T,)     integers: rows of train_inputs.npy; a row may repeat
 *     batch_weights.npy    (T,)     float64, optional: weight of each item's loss; 1/|B_s| without it
 *     train_inputs.npy     (N, D...) floats, integers or bools, the axes in the network's order (pk_array_check_rows)
 *     train_targets.npy    (N,) integer labels, (N, C) or (N,) numbers
 *     gradient_scales.npy  (S,)     float64, optional: what gradient clipping multiplied by; 1 without it
 *     second_moments.npy   (S, P)   float32 or float64, optional: Adam's v after each step
 *     resume_state.npy     (2, 2 + V P) float64, optional: in each row a step s, a hash of the bits of w_s and of the
 *                          optimiser's V vectors before it, and these; rewritten in turn while a run is recorded, for
 *                          nothing but resuming it
 *
 * A run of our own training may keep every k-th step only (`keep_every k` in run.txt); revisit.h repeats the
 * steps between bit for bit. Then weights.npy has the rows of steps 0, k, 2k, ..., and there are
 *     optimizer_states.npy (S/k + 1, V P) float64: the optimiser's V vectors before steps 0, k, 2k, ...;
 *                          not there where V = 0
 *     checksums.npy        (S+1,)   int64: a hash of the bits of w_s at every step; at kept steps, of the
 *                          optimiser's vectors as well
 *
 * How a run survives a kill at any moment: each step appends one row to every file with one write(2) each,
 * weights.npy last; the sizes of the files, not the counts in their headers, say how many rows there are. So the
 * other files may hold the row of one step more, or a part of it, than weights.npy (checksums.npy, where the
 * weights are not kept): a reader takes the steps that are complete. Files that differ otherwise were not left by a
 * kill: a file is wrong (one rate for all steps), or a power cut lost what the disk had not written yet. Such a run is
 * refused, and opened up to its shortest file only by pk_run_recover. run.txt is put in place last of all when a
 * run starts, so a directory with a manifest is a run.
 */
PK__BEGIN_C

enum { PK_KEEP_EVERY_MOST = 1000000000 };

/* A recorded run, mapped read-only. `steps` counts the complete steps. Read weights with pk_replay_weights
 * (revisit.h; of kept steps also with pk_run_weights) and batches with pk_run_batch: they hide how the steps
 * are stored. */
typedef struct pk_run {
    pk_graph graph;
    pk_loss loss;
    pk_optimizer optimizer;
    size_t steps, parameters, examples, outputs; /* S, P, N, C */
    size_t keep_every;                           /* k: weights of steps 0, k, 2k, ... are there; 1: of all */
    /* 1: the files hold more than the complete steps (recording was cut off inside a step, or pk_run_recover was
     * needed); after pk_run_open, pk_message then tells which file ends first. */
    int cut_off;
    pk_dataset train;
    pk_array weights;              /* (at least steps / k + 1, P) */
    pk_array optimizer_states;     /* (at least steps / k + 1, V P); data is NULL where absent */
    pk_array second_moments;       /* (at least steps, P); data is NULL where absent */
    const double *learning_rates;  /* steps */
    const int64_t *batch_offsets;  /* steps + 1 */
    const int64_t *batch_items;    /* batch_offsets[steps] */
    const double *batch_weights;   /* batch_offsets[steps]; NULL: 1/|B_s| */
    const double *gradient_scales; /* steps; NULL: 1 */
    const int64_t *checksums;      /* steps + 1; NULL where k = 1 */
    pk_array columns[6];           /* private: the arrays behind the six pointers above */
} pk_run;

/* Opens a run and checks everything that can be checked without reading the P-vectors: the manifest, every
 * type and shape against the network, finite training data, targets that fit the loss, offsets that grow,
 * items in [0, N), finite rates, weights and scales. Weights, moments and states are read row by row, and an error where
 * a file has become shorter; the other arrays stay mapped: to truncate them meanwhile is SIGBUS.
 * Cost: reads the training data, the batches and the rates once. Holds a few hundred bytes and the graph.
 * PK_IO, PK_FORMAT, PK_SHAPE, PK_ARGUMENT, PK_UNSUPPORTED, PK_NOT_FINITE, PK_MEMORY, PK_MEMORY_LIMIT; the
 * message names the file and what is wrong ("run.txt line 3: ..."). *run is untouched then. PK_SHAPE where the
 * files differ in their number of steps by more than a kill leaves, with the two counts. PK_MEMORY_LIMIT names the
 * least that would do. */
PK_API PK__MUST_USE pk_status pk_run_open(pk_context *context, const char *directory, pk_run *run);

/* The same, but a run whose files hold different numbers of steps is opened up to the shortest one: what is left
 * after a power cut. run->cut_off is 1 then, and the message tells which file ends first. */
PK_API PK__MUST_USE pk_status pk_run_recover(pk_context *context, const char *directory, pk_run *run);

/* Leaves the first `steps` steps of an open run: a decomposition is then that of f(w_steps, x), to the same bits as one
 * of a run that was recorded for so many steps. Any number up to run->steps, also between the kept steps and 0.
 * PK_ARGUMENT where the run is shorter. */
PK_API PK__MUST_USE pk_status pk_run_until(pk_context *context, pk_run *run, size_t steps);

/* Whether the rows of inputs are what the network of a run takes, by pk_array_check_rows; where the network takes plain
 * vectors, the rows of train_inputs.npy tell the order of the axes. name stands before the message. PK_SHAPE. */
PK_API PK__MUST_USE pk_status pk_run_check_inputs(pk_context *context, const pk_run *run,
                                                  const pk_array *inputs, const char *name);

/* Gives everything back; *run is zeroed. A zeroed run is allowed. */
PK_API void pk_run_release(pk_context *context, pk_run *run);

/* The batch of step `step` < run->steps, as a view of the run: never allocates. weights == NULL there
 * means 1/count. */
PK_API void pk_run_batch(const pk_run *run, size_t step, pk_batch *batch);

/* The factor that clipping applied at a step: 1 where none was recorded. */
PK_API double pk_run_gradient_scale(const pk_run *run, size_t step);

/* weights (P) := w_step, step in [0, run->steps] and a multiple of run->keep_every, converted exactly (float32
 * to double). Reads one row. PK_NOT_FINITE names the step and the parameter; PK_ARGUMENT for a step that is not
 * there. May be called from several threads with distinct contexts. weights is undefined after PK_NOT_FINITE. */
PK_API PK__MUST_USE pk_status pk_run_weights(pk_context *context, const pk_run *run, size_t step,
                                             pk_real *weights);

/* moments (P) := Adam's uncorrected v after step `step` < run->steps; like pk_run_weights.
 * PK_ARGUMENT where the run has no second_moments.npy. */
PK_API PK__MUST_USE pk_status pk_run_second_moments(pk_context *context, const pk_run *run, size_t step,
                                                    pk_real *moments);

PK__END_C

/* pathkernel/run/record.h: writes the run directory of run.h while training, and resumes it.
 *
 * Each step appends one row to every file with one write(2) each, weights.npy last; run.txt is put in place
 * last of all when a run starts. A kill at any moment loses the step in flight at most.
 *
 * Training that is resumed needs the optimiser's state. A run that keeps every k-th step has it there; of one that keeps
 * every step, resume_state.npy has that of step 16, 32, ..., written once the step after it is complete: training goes on
 * from at most 17 steps before the end, and proves at least one of them. The file has the last two, each with a hash, so that
 * one is whole at any time, and is not needed: without it all steps are recomputed, and it is written on the way; while the
 * last of them are recomputed even after each, so that training goes on that is stopped again and again after a few steps.
 */
PK__BEGIN_C

/* What to record. The texts are those of run.txt; they are written in canonical form. */
typedef struct pk_recorder_options {
    const char *network;           /* "input 64; dense 32; tanh; dense 10" */
    const pk_constants *constants; /* of a network that names arrays; they are copied into the run */
    const char *loss;              /* "softmax_cross_entropy" */
    const char *optimizer;         /* "adamw beta2=0.98"; NULL: "sgd" */
    int float32;                   /* 1: weights (and second moments) as float32; default float64 */
    int batch_weights;             /* 1: record batch_weights.npy */
    int gradient_scales;           /* 1: record gradient_scales.npy */
    int second_moments;            /* 1: record second_moments.npy */
    int resume;                    /* 1: continue the run in the directory, if there is one */
    int replace;                   /* 1: remove the run in the directory first, if there is one */
    /* k > 1: keep the weights and the optimiser's state of steps 0, k, 2k, ... only; the steps between are
     * replayed (revisit.h), so each has to be made by pk_training_step and given to pk_recorder_training_step.
     * Not with float32 (unless pk_real is float) or second_moments. 0 or 1: keep every step. */
    size_t keep_every;
} pk_recorder_options;

/* A recording in progress. A zeroed recorder is closed. */
typedef struct pk_recorder {
    size_t steps, parameters, examples; /* read only: complete steps on disk, P, N */
    /* private: */
    size_t keep_every, state_numbers; /* k; numbers of the optimiser's state, V P */
    pk_array_writer files[9];
    int present[9];
    int float32, failed, lock;
    int64_t items; /* rows of batch_items.npy */
    /* Of a run that keeps every step, whose optimiser has a state: a row of resume_state.npy; the step whose state it
     * has that is not in the file yet, 0: none; the file's descriptor + 1; the row to write next. */
    double *resume_state;
    size_t resume_step;
    int resume_file;
    size_t resume_place;
    void *row;       /* P numbers of the file's type, where that is not pk_real */
    double *states;  /* V P numbers, where k > 1 */
    double *uniform; /* weights of a batch that was given without, grows */
    size_t uniform_size;
} pk_recorder;

/* Starts a recording: makes the directory (not its parents), writes the training data, w_0 =
 * initial_weights (P) and last the manifest. Refuses a directory that already holds a file of a run.
 *
 * With options->resume and a run there: checks that it is the same one (network, loss, optimizer, types,
 * optional files, keep_every, training data, w_0; initial_weights may be NULL to skip the last), cuts off what
 * a step in flight left behind, and appends after step recorder->steps; pk_replay_weights gives the weights to
 * go on from. A directory without run.txt (a start that was cut off) is started anew.
 *
 * One recorder at a time: a second one on the same directory is refused (advisory lock).
 * PK_IO, PK_ARGUMENT, PK_SHAPE, PK_FORMAT, PK_NOT_FINITE, PK_MEMORY, PK_MEMORY_LIMIT; *recorder is
 * untouched then. */
PK_API PK__MUST_USE pk_status pk_recorder_open(pk_context *context, const char *directory,
                                               const pk_recorder_options *options, const pk_dataset *train,
                                               const pk_real *initial_weights, pk_recorder *recorder);

/* Appends one step: w_{s+1} = weights_after (P) came from w_s by this rate on this batch, whose gradient was
 * multiplied by gradient_scale (1 without clipping). batch->weights: NULL for 1/count; must be NULL unless
 * batch_weights are recorded. gradient_scale must be 1 unless recorded. second_moments (P): given exactly if
 * recorded. Cost: one write(2) a file. The step is on disk (for other processes; not yet on the platter)
 * when this returns PK_OK; on an argument error or PK_NOT_FINITE nothing was written. After PK_IO (a full
 * disk, say) the run stays readable up to the step before, and this recorder takes no further steps.
 * With keep_every: PK_ARGUMENT; only the library's own steps can be replayed (pk_recorder_training_step). */
PK_API PK__MUST_USE pk_status pk_recorder_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                               const pk_batch *batch, double gradient_scale,
                                               const pk_real *second_moments, const pk_real *weights_after);

/* The same for a step that pk_training_step (revisit.h) made, with any keep_every. state: the optimiser's vectors
 * after the step (V P numbers; NULL where it has none); second moments are taken from it. With keep_every, a
 * step costs its small rows, a hash of the weights, and at every k-th step the two long rows. */
PK_API PK__MUST_USE pk_status pk_recorder_training_step(pk_context *context, pk_recorder *recorder,
                                                        double learning_rate, const pk_batch *batch,
                                                        double gradient_scale, const pk_real *state,
                                                        const pk_real *weights_after);

/* The smallest k with which the weights of a run of `steps` steps in float64, and the optimiser's state_vectors
 * (pk_optimizer_state_vectors) that k > 1 keeps beside them, take at most `bytes` on disk; batches and rates come
 * on top. 0 where w_0 alone takes more. */
PK_API size_t pk_recorder_choose_keep_every(size_t parameters, size_t steps, size_t state_vectors,
                                            uint64_t bytes);

/* Brings the headers up to date and closes the files; *recorder is zeroed, whatever is returned. A zeroed
 * recorder is allowed. PK_IO. */
PK_API PK__MUST_USE pk_status pk_recorder_close(pk_context *context, pk_recorder *recorder);

PK__END_C

/* pathkernel/run/revisit.h: one step of training, and its repetition: the weights of any step of a run that keeps
 * only every k-th one, bit for bit.
 *
 * pk_train and pk_replay make a step by the same function, from the same weights, state, batch, rate and scale;
 * with the same build, BLIS and kind of processor its bits are the same, for any number of threads. The
 * checksum that was recorded with every step proves it.
 */
PK__BEGIN_C

/* What steps are made with. Zeroed = none. graph and train must outlive it. */
typedef struct pk_trainer {
    const pk_graph *graph;
    const pk_dataset *train;
    pk_loss loss;
    pk_optimizer optimizer;
    size_t state_numbers; /* V P */
    pk_real *gradient;    /* P: of the last step */
    pk_real *state;       /* state_numbers: the optimiser's vectors; zero before step 0 */
    pk_gradient_workspace workspace;
    void *memory; /* private */
} pk_trainer;

/* Takes the memory for steps with batches of up to largest_batch examples: (1 + V) P numbers and the workspace
 * of pk_gradient_prepare. The data have passed pk_loss_check, the optimizer pk_optimizer_check. PK_ARGUMENT,
 * or the statuses of pk_allocate. */
PK_API PK__MUST_USE pk_status pk_trainer_prepare(pk_context *context, const pk_graph *graph,
                                                 const pk_dataset *train, pk_loss loss,
                                                 const pk_optimizer *optimizer, size_t largest_batch,
                                                 pk_trainer *trainer);
PK_API void pk_trainer_release(pk_context *context, pk_trainer *trainer);

/* One step of training:
 *
 *     g = sum over the batch of c_i grad l_i(weights);  *scale = pk_clip_scale(g, clip_norm), 1 for clip_norm 0;
 *     next = weights + D_s(*scale g)
 *
 * step counts from 0. weights, next (P) do not overlap; scale and objective (at weights) may be NULL.
 * trainer->state moves on. Cost: one pk_batch_gradient and a few passes over P; no allocation.
 * PK_ARGUMENT, PK_SHAPE, PK_NOT_FINITE (the step at which training diverged; the message names it). */
PK_API PK__MUST_USE pk_status pk_training_step(pk_context *context, pk_trainer *trainer, size_t step,
                                               double learning_rate, double clip_norm, const pk_batch *batch,
                                               const pk_real *weights, pk_real *next, double *scale,
                                               double *objective);

/* The weights of a run, in any order. Zeroed = none. Of a run with keep_every = k it repeats the steps from the
 * nearest earlier ones that it holds: its own position, a kept step, or one of at most PK_REPLAY_STOPS stops that
 * it made itself. */
enum { PK_REPLAY_STOPS = 16 };
typedef struct pk_replay {
    const pk_run *run;
    size_t step, repeated; /* read only: the position, SIZE_MAX: none; how many steps were repeated */
    /* private: */
    size_t spacing, stops;        /* steps between stops; how many there is room for */
    size_t stop[PK_REPLAY_STOPS]; /* their steps */
    pk_real *stop_numbers;        /* stops x (1 + V) P */
    pk_real *weights, *next;      /* P */
    pk_trainer trainer;
    void *memory;
} pk_replay;

/* Takes the memory for a run: none for one that keeps every step; otherwise (3 + V) P numbers and the workspace
 * of pk_gradient_prepare, and (1 + V) P for each stop. reach: steps that are asked for in a row, going on
 * backwards from there; stops make that cheap: 0: none. */
PK_API PK__MUST_USE pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach,
                                                pk_replay *replay);
PK_API void pk_replay_release(pk_context *context, pk_replay *replay);

/* weights (P) := w_step, step in [0, run->steps]. Consecutive steps cost one training step each, others up to k.
 * Every repeated step is compared with the checksum of the recording:
 * PK_NOT_REPRODUCED names the step whose bits differ (another build, BLIS or kind of processor, or damaged
 * batches), PK_FORMAT a kept step whose rows are damaged, PK_UNSUPPORTED: kept with fewer digits than pk_real has.
 * PK_ARGUMENT, PK_NOT_FINITE as pk_run_weights. weights is undefined after an error. */
PK_API PK__MUST_USE pk_status pk_replay_weights(pk_context *context, pk_replay *replay, size_t step,
                                                pk_real *weights);

PK__END_C

/* pathkernel/run/train.h: the training loop: batches, gradient, clipping, update, recording, resuming.
 *
 * The bits of every step depend on the options alone: not on the number of threads, not on recording, not
 * on where a run was interrupted and resumed.
 */
PK__BEGIN_C

/* How to train; zero means the default. */
typedef struct pk_train_options {
    pk_loss loss;           /* required */
    pk_optimizer optimizer; /* zero: plain SGD */
    pk_schedule schedule;   /* schedule.rate alone: that rate at every step */
    size_t steps;           /* S: the number of updates from w_0, those already recorded included */
    size_t batch_size;      /* 0, or N and more: full batches in row order */
    int shuffle_off;        /* 1: mini-batches in row order; default: a new permutation every epoch */
    uint64_t seed;          /* of the permutations; epoch e is stream e */
    double clip_norm;       /* the gradient's largest norm (torch's clip_grad_norm_); 0: no clipping */

    const char *record; /* a run directory to write; NULL: none */
    int resume;         /* 1: continue the run in `record`, if there is one */
    int replace;        /* 1: remove the run in `record` first, if there is one */
    int record_float32, record_second_moments;
    size_t keep_every; /* k > 1: record the weights of every k-th step only (record.h); 0 or 1: of every step */

    /* Called after each step of this call (recorded already): the batch's objective at w_step, and
     * w_{step+1} (P); those of pk_train are not up to date meanwhile. Non-zero ends training with PK_CANCELLED. */
    int (*on_step)(void *user, size_t step, double objective, const pk_real *weights);
    void *user;
} pk_train_options;

typedef struct pk_train_result {
    size_t steps;     /* steps from w_0 to the weights returned */
    size_t resumed;   /* of these, steps that were read from the recording */
    double objective; /* of the last batch trained on, before its update; NaN when no step was made */
} pk_train_result;

/* weights (P): in w_0, out w_S.
 *
 *     g = sum over the batch of grad l_i(w_s) / |B_s|;  w_{s+1} = w_s + D_s(clip(g))
 *
 * Mini-batches are consecutive slices of an epoch's permutation, the last one smaller. The progress
 * callback of the context is called after each step. Parallel inside a batch.
 *
 * resume: the recorded steps must be those that these options give (w_0, batches, rates); the optimiser's
 * state is read where the recording kept it last, at most 17 steps before its end (with keep_every: at the last
 * kept step; from step 0 where an older version recorded), and rebuilt from there by recomputing the gradients
 * along the recorded weights; training goes on to the same bits as without the interruption. A recording coarser
 * than pk_real cannot do that: PK_UNSUPPORTED.
 *
 * Also after an error or a cancel, weights are those of the last complete step, result (may be NULL) tells
 * its number, and the recording holds every step up to it.
 * PK_ARGUMENT, PK_SHAPE, PK_NOT_FINITE (the step at which training diverged; it is not recorded), PK_IO,
 * PK_CANCELLED, PK_MEMORY, PK_MEMORY_LIMIT. */
PK_API PK__MUST_USE pk_status pk_train(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                       const pk_train_options *options, pk_real *weights,
                                       pk_train_result *result);

PK__END_C

/* pathkernel/path/path.h: a network along one step w + t d, 0 <= t <= 1: its values, tangents and cotangents at points
 * (row, t). What is constant or affine in t is computed once a row.
 */

/* pathkernel/path/kinks.h: where a network is not smooth along a step: the kinks of its piecewise-linear parts.
 *
 * Along a step each pre-activation of a piecewise-linear network is a piecewise polynomial in t. Its sign
 * changes are found layer by layer:
 *   1. sample the switch functions of a layer at degree + 1 nodes of a piece that the layers below left;
 *   2. convert to Bernstein form, skip what keeps one sign, isolate the roots of the rest, split there;
 *   3. a piece without roots goes on to the next layer with the samples that it has; only what was split is
 *      sampled again.
 * Where a smooth operation stands below, a switch function is no polynomial and the samples only interpolate it:
 *   4. the last Chebyshev coefficients of the interpolant tell its error. Where that error leaves open how many
 *      zeros there are, the piece is halved for this search and joined again afterwards;
 *   5. each zero of the interpolant is moved onto the zero of the function itself by Newton steps, whose values
 *      come from the network.
 * Each kink carries its slack: the distance within which the switch function differs from zero by no more than
 * its own rounding and the remaining error of step 5.
 */

/* pathkernel/path/quadrature.h: which points (row, t) with which weights integrate a step: the literature's
 * rules, adaptive Gauss-Legendre for smooth networks, and the rule that is exact for piecewise-linear ones.
 *
 * What is integrated is the gradient of a readout h(f(w + t d, x)) with respect to the weights. The adaptive rule:
 *   1. split the step at the kinks that can be found (kinks.h);
 *   2. test each piece with n nodes. Its error is the difference between the sum over the nodes of dh/dt, and h at the
 *      end minus h at the start, which forward passes give: the closure of the piece. It may be `target` times the
 *      most that h has changed in a step of this row: contributions are parts of such changes, whatever the size of h;
 *   3. the closure has a floor, the rounding of h. Where the changes are so small that the floor hides what matters, as
 *      in tiny steps of a trained network, the difference to the rule with n + 1 nodes is the error instead: its
 *      rounding is relative to the changes (a nested judgement);
 *   4. a piece that misses gets one node more, up to 16; then it is halved. All pieces of a row are tested before any
 *      is halved, and those that miss by most are halved first, since the number of halvings is limited;
 *   5. an error that neither more nodes nor two halvings lower, in several of the four parts, is rounding: these pieces
 *      are accepted as they are, counted, and their errors go into the bounds. (In one part only, it is a place where h
 *      changes within a short part of the step. It is halved until that is resolved.)
 * Depth first (one piece after the other, to its end) was rejected: where rounding makes the target unreachable, it
 * spends all halvings at the first place where this happens.
 */
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

enum { PK_GAUSS_NODES = 32, PK_RULE_NODES = 1000000 };

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

/* pathkernel/features/factors.h: the train side of every kernel: the loss gradients of a batch's examples, factored layer by
 * layer and stored in panels, as the products with the test side want them.
 */

/* pathkernel/features/features.h: the memory of tangent features, the gradients of a block of test rows' outputs with respect to
 * the weights along a step, and which of its forms each layer takes.
 */
/* How layers are contracted: for tests and benchmarks. */
typedef enum pk_engine {
    PK_ENGINE_AUTO,      /* the cheapest by the cost model */
    PK_ENGINE_FACTORED,  /* Hadamard products at each point */
    PK_ENGINE_HEAD,      /* the outputs taken out of the sum over points, where a layer allows it */
    PK_ENGINE_INTEGRATED /* Phi materialised; the only one for stateful optimisers and PK_TANGENT_ROWS */
} pk_engine;

/* pathkernel/features/product.h: inner products of tangent features with the gradients of examples: the hot loop.
 *
 * For a dense layer the gradient is an outer product, grad_W = delta (x) a, so that
 *     < grad f(x), g_i > = sum over layers (delta_x . delta_i) (a_x . a_i + 1):
 * two small Gram matrices and a Hadamard product per layer, and no vector of P numbers. What does not
 * change along a step is taken out of the sum over its points:
 *   - a layer whose input is data: sum the cotangents first, and its a_x . a_i is one Gram matrix for all steps;
 *   - a layer behind which everything is linear: its cotangent is constant, sum the inputs first;
 *   - the layer below that one: its cotangents are delta_k = slope o (W + t D)^T seed_k, W the last layer's weight;
 *     sum slope (a_x . a_i + 1) and t slope (a_x . a_i + 1) over the points, then multiply with W and D once;
 *   - any other layer: one Hadamard product per point and output, or, where many points or few examples make it
 *     cheaper, the integrated gradient Phi is materialised and multiplied with the examples' factors.
 * Products are of rows of the test side and panels of examples, and the Hadamard product is taken while a tile of
 * them is in registers (tile.h): nothing that is as large as a layer times examples goes through memory.
 * A layer that is used at Q places (a convolution, a dense layer on tokens) has a sum of Q outer products: its points
 * count Q times and its examples Q times, so Q^2 products of pairs, or both sides are materialised (pk__layer_by_rows).
 */

/* pathkernel/features/integral.h: tangent features integrated over a step: sums over the points of the quadrature, layer by
 * layer, and the integrated gradient Phi where it is wanted.
 */

/* pathkernel/attribution/decomposition.h: what is asked of a decomposition and what it returns: sums of contributions over
 * examples, groups, steps and layers, the certificate, the costs. decompose.h computes it.
 */
PK__BEGIN_C

/* Axes of a kept tensor beside the test row and the output. Any sum of them may be kept; one tensor has
 * either examples or groups. */
enum { PK_BY_EXAMPLE = 1, PK_BY_GROUP = 2, PK_BY_STEP = 4, PK_BY_LAYER = 8, PK_BY_TOTAL = 16, PK_KEPT = 8 };

/* The tolerance of closures where none is given. What rounding leaves of them grows with the changes that add up: runs
 * of a few hundred steps leave about 1e-13 in double, 1e-5 in float. Where contributions are far smaller than the outputs,
 * rounding of the outputs hides a closure of that part of the contributions: up to PK_CLOSURE_ROUNDING of the outputs. */
#ifdef PATHKERNEL_FLOAT
#define PK_TOLERANCE 1e-3
#define PK_CLOSURE_ROUNDING 1e-4
#else
#define PK_TOLERANCE 1e-10
#define PK_CLOSURE_ROUNDING 1e-11
#endif

/* What a run leaves unattributed that is described rightly: each step rounds the weights and its gradient, and what
 * steps leave adds up like a random walk. Measured on runs of 12 to 1500 steps by all optimizers, dense, convolutional
 * and with attention, trained in float32: at most 30 roundings times the root of the steps (docs/numerics.md). A run is in
 * float32 if it is stored so, or if all of its last weights are float32 numbers. In float64, where nothing that is
 * described wrongly leaves so little, the limit is that of a careless recording. */
#define PK_UNATTRIBUTED_EPSILONS 128
#define PK_UNATTRIBUTED_LEAST 1e-10

typedef struct pk_decompose_options {
    pk_quadrature quadrature;
    /* 0: PK_TOLERANCE. A row is closed where |closure| is at most tolerance times its largest contribution (below), or
     * min(tolerance, PK_CLOSURE_ROUNDING) times its largest |initial| or |final|. Cost falls with a looser one. */
    double tolerance;
    /* The largest |unattributed| / max(1, |h|) that rounding may leave; 0: PK_UNATTRIBUTED_EPSILONS roundings of the
     * run's numbers, times the root of its number of steps, but at least PK_UNATTRIBUTED_LEAST; and so much less as the
     * largest output or contribution of all rows is below 1. */
    double unattributed;
    pk_readout readout;
    /* Which sums of contributions to keep, e.g. {PK_BY_EXAMPLE, PK_BY_STEP | PK_BY_LAYER}; the first 0 ends the
     * list, none: PK_BY_EXAMPLE. PK_BY_TOTAL keeps none. */
    unsigned keep[PK_KEPT];
    const int64_t *groups; /* group of each training example, for PK_BY_GROUP */
    size_t group_count;
    int bounds;          /* 1: a bound on the error of each A(x, i); costs about four times as much */
    int step_closure;    /* 1: the closure of each step */
    pk_engine engine;    /* for tests and benchmarks */
    int reverse_time;    /* 1: the reverse-time form also where the optimiser has no state */
    size_t rows_at_once; /* test rows in one pass over the run; 0: as many as the memory allows */
} pk_decompose_options;

/* rows x outputs x (examples or groups) x steps x layers, those that axes names, C order. */
typedef struct pk_tensor {
    unsigned axes;
    int rank;
    size_t shape[5];
    size_t row_items; /* numbers per test row */
    double *data;
} pk_tensor;

typedef struct pk_decomposition {
    size_t first_row, rows, outputs, examples, groups, steps, layers;
    double *initial, *final, *data, *decay, *unattributed,
        *closure; /* rows x outputs; data: sum over examples */
    pk_tensor kept[PK_KEPT];
    size_t kept_count;
    double *by_example, *by_step, *by_layer; /* (rows, outputs, examples | steps | layers) if kept, else NULL */
    double *bounds;                          /* rows x outputs x examples, or NULL */
    double *step_closure;                    /* rows x outputs x steps, or NULL */
    /* The certificate. A row's largest contribution is the largest of the kept numbers, of data, decay and unattributed
     * and of the sum over the steps of the change that each made, over all outputs. worst_closure: |closure| / (the
     * largest of these and of |initial| and |final| of the row); worst_relative: |closure| / (its largest contribution
     * alone), which in tiny steps of a trained network is rounding of the outputs; worst_excess: |closure| / (what the
     * tolerance allows it to be), above 1 where the result is PK_NOT_CLOSED, and the row and output where that is. */
    double worst_closure, worst_relative, worst_excess;
    size_t worst_row, worst_output;
    /* With bounds: the cells (row and output) whose closure was more than their bounds add up to, beyond its rounding, so
     * that the bounds were raised to add up to it. */
    size_t raised;
    /* The step with the worst closure of its own. */
    double worst_step_closure;
    size_t worst_step, worst_step_row;
    /* The largest |unattributed| / max(1, |final|) and where; what it may be; the largest output or contribution of all. */
    double worst_unattributed, unattributed_limit, scale;
    size_t worst_unattributed_row, worst_unattributed_output;
    /* What it took: */
    size_t points;  /* quadrature nodes, over rows and steps */
    size_t pieces;  /* pieces between kinks, over rows and steps */
    size_t refused; /* pieces accepted although they missed their target */
    size_t passes;
    double flops; /* of the contraction */
    /* Thread-seconds: reading and updates; gradients of the examples; the test side: forward along the steps, kinks, nodes,
     * reverse, recurrences of reverse time; the sums over the nodes and, of all that follows, the contraction. */
    double seconds_read, seconds_examples, seconds_test, seconds_sums, seconds_contraction, seconds;
} pk_decomposition;

/* Gives the arrays back; a zeroed decomposition is allowed. */
PK_API void pk_decomposition_release(pk_context *context, pk_decomposition *decomposition);

/* indices (at most wanted) of the largest values if sign > 0, the smallest if sign < 0, strongest first, and
 * only those of that sign; returns how many. Ties by index. Cost count * wanted. */
PK_API size_t pk_strongest(const double *values, size_t count, int sign, size_t wanted, size_t *indices);

PK__END_C

/* pathkernel/attribution/steps.h: the train side of an attribution: windows of consecutive steps of a run with their
 * weights, the gradients of their examples, and their updates, recomputed and in linear form.
 *
 * A window is prepared as a whole, in parallel over steps and blocks of examples; its length never shows in
 * the results. An optimiser with state is followed forward once, its state kept at the start of every stride-th
 * window; on the way back to a window between, spare more states are kept where they save most (Griewank and
 * Walther 2000), so that any number of steps can be visited in reverse with few states.
 */

/* pathkernel/attribution/plan.h: how a decomposition is cut into passes over the run so that it fits the memory limit: the job,
 * its memory, what a plan costs, the choice. decompose.h carries it out.
 *
 * A pass goes through all steps with some of the test rows and some of the outputs; windows of steps are prepared
 * ahead of it. No cut shows in the results: blocks of rows, units of outputs and the order of sums depend on shapes
 * alone. What a cut costs:
 *   - each pass reads the run and computes the examples' gradients and the updates again;
 *   - states of the optimiser that were not kept are computed again from those that were (steps.h);
 *   - each slice of the outputs takes the test rows along the path again, because their nodes are judged by all
 *     outputs, and, where the optimiser has no state, contracts them again;
 *   - few blocks of rows and short windows leave threads idle.
 */
PK__BEGIN_C

typedef struct pk_plan {
    size_t threads;
    size_t rows, outputs; /* at most, of a pass; all of them where the memory allows it */
    size_t passes;
    size_t window; /* steps prepared at a time */
    size_t stride,
        spare;    /* the optimiser's state is kept before every stride-th window, and spare more between */
    size_t bytes; /* to be held at most, results (in parts: of a part) included */
    /* All passes together: */
    double sweeps;       /* times that the examples' gradients of the whole run are computed; 1 at best */
    double weight_bytes; /* read, of the recorded weights */
    double gradient_flops, contraction_flops;
    /* An estimate, at 35 GF/s a thread: all of it; the examples' side once, and what is computed again of it; the test
     * rows' way along the path, with the optimiser's state; their contraction. */
    double seconds, seconds_examples, seconds_again, seconds_test, seconds_contraction;
} pk_plan;

PK__END_C

/* pathkernel/attribution/decompose.h: the predictions of a recorded run, decomposed over its training examples to
 * rounding error, and certified.
 *
 *     h(f(w_S, x)) = initial + sum_i A(x, i) + decay + unattributed + closure
 *
 * (Domingos 2020; Bell et al. 2023, the exact path kernel.) With D_s = w_{s+1} - w_s and
 * Phi_s(x) = integral_0^1 grad_w h(f(w_s + t D_s, x)) dt, the left side is initial + sum_s Phi_s D_s. An
 * optimiser makes D_s linear in the examples' gradients g_i (optimizer.h: pk_linear_form), so that
 *
 *     A(x, i) = - sum_s scale_s c_{s,i} < E_s(x), g_{s,i} >,
 *     E_s = gain_s R_s + direct_s p_s o Phi_s,   R_s = carry_{s+1} R_{s+1} + enter_s p_s o Phi_s,   R_S = 0:
 *
 * stateful optimisers run in reverse time on the test side, without a vector per training example. decay is
 * the part of weight decay, unattributed that of u_s = D_s - (the update recomputed in double).
 */
PK__BEGIN_C

/* Decomposes h(f(w_S, inputs)) of a run. inputs: rows x input width. *out is zeroed first; release it also
 * after PK_NOT_CLOSED, which means: computed, but the worst closure exceeds the tolerance (the message names
 * row, output and step), and after PK_UNATTRIBUTED: computed, but the recorded weights are not those that the declared
 * training gives (the message names row and output), so that contributions are those of another rule. Cost per step: see docs/mathematics.md. Same bits for any number of threads and any
 * memory limit. Memory beyond the results: see pk_decompose_plan; the least is about 30 P numbers, whatever the
 * number of examples, test rows, outputs and steps, and the factors of the largest batch. */
PK_API PK__MUST_USE pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                                           const pk_decompose_options *options, pk_decomposition *out);

/* The same in parts: part(user, rows first_row .. first_row + rows - 1) is called from the calling thread as
 * each pass over the run ends, so that results larger than memory can be written and finished parts survive
 * a cancel. Its tensors are valid during the call. A status other than PK_OK ends the decomposition with it.
 * *summary (may be NULL) gets the sizes, the certificate and the costs over all parts, and no arrays. */
typedef pk_status pk_decomposition_part(void *user, const pk_decomposition *part);
PK_API PK__MUST_USE pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                 const pk_decompose_options *options,
                                                 pk_decomposition_part *part, void *user,
                                                 pk_decomposition *summary);

/* The same for the rows of an array of any type, such as one of pk_array_open: they are read as they are needed, and only those
 * of a part are held. Their shape is compared by pk_run_check_inputs. */
PK_API PK__MUST_USE pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run,
                                                       const pk_array *inputs,
                                                       const pk_decompose_options *options,
                                                       pk_decomposition_part *part, void *user,
                                                       pk_decomposition *summary);

/* How pk_decompose (in_parts: pk_decompose_parts) would cut the job for rows test rows under the context's memory limit,
 * and what that costs; nothing is computed. PK_MEMORY_LIMIT names the least that would do. */
PK_API PK__MUST_USE pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                                const pk_decompose_options *options, int in_parts,
                                                pk_plan *plan);

PK__END_C

/* pathkernel/attribution/reference.h: the decomposition of a run by its definition, for readers and for tests. It uses
 * derivatives alone (derivatives.h), none of what makes pk_decompose fast, and runs forward in time:
 *
 *     Phi_s(x) = integral_0^1 J(w_s + t D_s, x) dt,                      D_s = w_{s+1} - w_s
 *     g_{s,i}' = scale_s c_{s,i} grad l_i(w_s),                          decay: coupled_s w_s
 *     m_{s,i}  = carry_s m_{s-1,i} + gain_s g_{s,i}',                    one momentum for each example, and one for decay
 *     D_{s,i}  = - p_s o (enter_s m_{s,i} + direct_s g_{s,i}'),          decay: - decoupled_s w_s besides
 *     A(x, i)  = sum_s < Phi_s(x), D_{s,i} >
 *     unattributed(x) = sum_s < Phi_s(x), D_s - sum_i D_{s,i} >          decay is one of the i here
 *     closure(x) = f(w_S, x) - f(w_0, x) - sum_i A(x, i) - unattributed(x)
 *
 * pk_decompose carries the test side backward in time instead, and chooses the nodes of the integral itself.
 */
PK__BEGIN_C

/* The caller's arrays; all are needed. M test rows, C outputs, N training examples. */
typedef struct pk_reference {
    double *initial, *final;                /* M x C */
    double *by_example;                     /* M x C x N */
    double *decay, *unattributed, *closure; /* M x C */
} pk_reference;

/* Decomposes all outputs f(w_S, inputs) of a run (inputs: M x D), under any optimizer. The integral along each step is taken by
 * Gauss-Legendre with `nodes` nodes (1 to 1000) on each of `pieces` equal pieces. A smooth network needs one piece and
 * 10 to 20 nodes; one with kinks, where the error falls like 1 / pieces, many pieces with one node, and the closure tells
 * how far it is. Cost: pieces x nodes Jacobians a step, and 2 (M C + 1) N P flops. Memory: (2 N + 3 M C) P numbers.
 * PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT, PK_NOT_FINITE, and what reading the run gives; arrays hold
 * parts of sums then, also after PK_CANCELLED. */
PK_API PK__MUST_USE pk_status pk_decompose_reference(pk_context *context, const pk_run *run, pk_matrix inputs,
                                                     size_t pieces, int nodes, const pk_reference *out);

PK__END_C

/* pathkernel/kernels/kernel.h: Gram matrices of the named kernels. Each is an inner product of tangent features; they are
 * different objects, and each has functions of its own.
 *
 *     pk_kernel_ntk         the empirical neural tangent kernel at given weights, all outputs with all outputs
 *     pk_kernel_ntk_trace   its sum over equal outputs
 *
 * No Jacobian is formed for dense layers. The gradient of output k for a dense layer's weight and bias is an outer product
 * of the layer's cotangent d_k = d f_k / d (W a + b) and (a, 1), so that the layer's part of the kernel is
 *     Theta[i,k,j,l] += (d_ik . d_jl) (a_i . a_j + 1):
 * the Gram matrix of the inputs a is had once for all outputs. Where the cotangent is the same for all inputs, as that of
 * the last layer, d_k . d_l is computed once (of the last layer it is 1 for k = l, else 0). A layer used at Q places has a
 * sum of Q outer products: pairs of places are taken one by one, or, where that costs fewer flops, the layer's gradients
 * are formed; those of normalisations and embeddings are.
 *
 * Inputs go through the network in blocks of rows, and their factors are kept: all rows' where the memory limit allows it
 * (without a limit, up to a GiB), else the blocks of one side are computed again for each large block of the other.
 * Blocks and tiles are cut by shapes alone: the same bits for any number of threads and any memory limit. The bits of an
 * entry depend on how many rows are beside it.
 */
PK__BEGIN_C

/* The empirical neural tangent kernel (Jacot, Gabriel and Hongler 2018; in this structured form Novak, Sohl-Dickstein and
 * Schoenholz 2022) of the rows of x (n1 x D) and y (n2 x D) at the weights w (P):
 *     gram[i C + k, j C + l] = < d f_k(w, x_i) / dw, d f_l(w, y_j) / dw >,      (n1 C x n2 C), C outputs:
 * with ld == n2 C an array of n1 x C x n2 x C numbers. y.data == NULL, or y the same view as x: the kernel of x with
 * itself, half the work, and symmetric bit for bit. gram overlaps nothing that is read.
 * Cost: a forward pass and C reverse passes a row, and for each pair of rows about sum over dense layers of
 * 2 (inputs + C^2 outputs) flops. Memory: for each row sum over dense layers of (inputs + C outputs) numbers.
 * PK_ARGUMENT, PK_SHAPE, PK_OVERFLOW, PK_MEMORY, PK_MEMORY_LIMIT (the message says what would do): gram is untouched.
 * PK_CANCELLED: gram holds what was done. PK_NOT_FINITE: gram is complete; the message names the first pair. */
PK_API PK__MUST_USE pk_status pk_kernel_ntk(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                            pk_matrix x, pk_matrix y, pk_matrix gram);
/* Its trace over outputs, a sum and not a mean (divide by C where the mean is wanted, as neural-tangents gives it):
 *     gram[i, j] = sum_k < d f_k(w, x_i) / dw, d f_k(w, y_j) / dw >,      (n1 x n2).
 * For each pair of rows about sum over dense layers of 2 (inputs + C outputs) flops; all else as above. */
PK_API PK__MUST_USE pk_status pk_kernel_ntk_trace(pk_context *context, const pk_graph *graph,
                                                  const pk_real *weights, pk_matrix x, pk_matrix y,
                                                  pk_matrix gram);

PK__END_C

#endif /* PATHKERNEL_H */

#if (defined(PATHKERNEL_IMPLEMENTATION) || defined(PATHKERNEL_INTERNALS)) && !defined(PATHKERNEL_INTERNALS_DECLARED)
#define PATHKERNEL_INTERNALS_DECLARED

/* pathkernel/base/context.h: internals */
/* An arena hands out 64-byte aligned pieces of one allocation. With base == NULL it only adds up sizes:
 * run the same code twice, once to measure and once to take. */
typedef struct pk__arena {
    unsigned char *base;
    size_t capacity, used; /* bytes */
    int overflow;          /* a size did not fit into size_t or into the capacity */
} pk__arena;

/* count * size bytes (not zeroed), or NULL when measuring, when count * size == 0 or on overflow. */
PK__INTERNAL void *pk__arena_take(pk__arena *arena, size_t count, size_t size);

/* pathkernel/network/pass.h: internals */
/* The weights of a batch: weights + t[row] direction. direction == NULL: weights alone. */
typedef struct pk__line {
    const pk_real *weights, *direction;
    const pk_real *t;
} pk__line;

/* The memory of one batch. value[n] is rows x width, cotangent[n] rows x copies x width, tangent[n]
 * rows x width; value[0] points to the caller's inputs. */
typedef struct pk__tape {
    const pk_graph *graph;
    size_t rows, copies; /* capacity */
    int threads;         /* for each operation; 0: one */
    pk_context *context; /* of the caller, where there are several threads; NULL */
    int unit_seeds; /* the caller's word: the seeds of a row are the outputs' unit vectors, one after the other */
    pk_real **value, **cotangent, **tangent;
    pk_real *scratch, *line_scratch, *row_weights;
    const pk_real *
        transposed; /* the caller's: pk__pass_transpose of the line's weights, and behind it of its direction; NULL */
    pk__line line; /* of the last reverse */
} pk__tape;

/* Takes a tape for up to rows rows with copies cotangents each (0: no reverse), and tangents if wanted. */
PK__INTERNAL void pk__pass_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t copies,
                                int tangents, pk__tape *tape);
/* The same where reverses come with at most reverse_rows rows: cotangents are what takes the memory. Those of an elementwise
 * operation inside the graph stand where those of its input come, if it is the only one that reads it, and are gone then. */
PK__INTERNAL void pk__pass_take_parts(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                                      size_t copies, int tangents, pk__tape *tape);
/* value[n] = the graph at the line, rows rows of inputs. Cost 2 P rows flops, twice that along a line. */
PK__INTERNAL void pk__pass_forward(pk__tape *tape, const pk__line *line, size_t rows, const pk_real *inputs);
/* cotangent[n] = d (seed . output) / d value[n] for every node that depends on the weights, after a forward
 * on the same line; seeds (rows x copies x output width) stand in pk__pass_seed(). */
PK__INTERNAL void pk__pass_reverse(pk__tape *tape, const pk__line *line, size_t rows, size_t copies);
/* tangent[n] = d value[n] along the line's direction, at each row's t: a Jacobian-vector product. */
PK__INTERNAL void pk__pass_tangent(pk__tape *tape, const pk__line *line, size_t rows);
/* gradient (P) += sum over rows of the gradient, after a reverse with copies == 1. */
PK__INTERNAL void pk__pass_weight_gradient(pk__tape *tape, size_t rows, pk_real *gradient);
PK__INTERNAL pk_real *pk__pass_output(const pk__tape *tape);
PK__INTERNAL pk_real *pk__pass_seed(const pk__tape *tape);
/* Seeds of so many rows: the outputs' unit vectors, one after the other (copies == output width). The next reverse takes for
 * what is behind a last dense layer its weights. */
PK__INTERNAL void pk__pass_seed_units(pk__tape *tape, size_t rows);

/* 1 where it pays for a line along which many rows go to have the layers' matrices transposed, too. */
PK__INTERNAL int pk__pass_transposes(const pk_graph *graph);
/* transposed (P) = of each dense layer its matrix (inputs x outputs), where the layer's weights stand. Cost P. */
PK__INTERNAL void pk__pass_transpose(const pk_graph *graph, const pk_real *weights, pk_real *transposed);

/* pathkernel/run/revisit.h: internals */
/* The same from an arena, for threads threads; nothing to release. */
PK__INTERNAL void pk__replay_take(pk__arena *arena, const pk_run *run, size_t largest_batch, int threads,
                                  size_t reach, pk_replay *replay);

/* pathkernel/path/path.h: internals */
/* Above this degree, or where a pre-activation is no polynomial, it is interpolated by a polynomial of this
 * degree on each piece, and the caller must judge the pieces by their closure. */
enum { PK__PATH_DEGREE = 12 };

/* The piece [a, b] of a row's step. A slack is how far the kink at that end may lie from it, 0 where there is no kink. */
typedef struct pk__piece {
    size_t row;
    double a, b, slack_a, slack_b;
    /* Of a piece that the quadrature judges and halves, see quadrature.h: */
    double error, size;       /* of its last test */
    double family, reference; /* of a piece it has come from by halving: its a and its error */
    int age;                  /* halvings since then */
    int joined;               /* there is no kink at a: the piece in front goes on smoothly */
} pk__piece;

typedef struct pk__pieces {
    size_t count, capacity;
    pk__piece *piece;
} pk__pieces;

/* A zero of switch function number `at`: its place, how far it may lie from there, the function's slope and rounding. */
typedef struct pk__root {
    double t, slack, slope, rounding;
    size_t at;
} pk__root;

/* One block of rows along one step; memory from an arena, one segment a thread. */
typedef struct pk__path {
    const pk_graph *graph;
    size_t row_capacity, point_capacity;
    /* The step and the rows it is at: */
    const pk_real *weights, *direction, *inputs;
    size_t rows;
    /* Nodes that are constant or affine in t are evaluated once per row: base[n] + t slope[n]. */
    pk_real **base, **slope;
    int *gathered;      /* a constant node that is needed at each point */
    pk__tape tape;      /* of the points */
    int degree;         /* of the samples: the largest of a switch function */
    size_t last_switch; /* the last node with switch functions, 0: none */
    size_t *last_read;  /* of each node: the last node that takes it */
    int interpolates;   /* some switch function is no polynomial of that degree */
    pk_real *input_points, *switch_values, *coefficients, *conversion;
    double tail[3][PK__PATH_DEGREE + 1]; /* the last Chebyshev coefficients = tail * values at the samples */
    size_t *point_row;
    pk_real *point_t;
    size_t held; /* points whose values stand in the tape: held_row, held_t */
    size_t *held_row;
    pk_real *held_t;
    pk__pieces pending, batch;           /* to be sampled */
    size_t *pending_start, *batch_start; /* the first node whose switches are not yet looked at */
    pk__root *roots;
    size_t root_capacity;
} pk__path;

/* Takes a segment for blocks of rows rows, points points at a time, reverse_points of them with copies cotangents
 * each, pieces pieces at a time. gather: constant values are wanted at each point, too. */
PK__INTERNAL void pk__path_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                size_t reverse_points, size_t copies, size_t pieces, int gather,
                                pk__path *segment);
/* Moves it to a step and a block of rows (rows x input width). transposed: pk__pass_transpose of the weights, and behind it of
 * the direction; NULL: they are not there. */
PK__INTERNAL void pk__path_begin(pk__path *segment, const pk_real *weights, const pk_real *direction,
                                 const pk_real *transposed, size_t rows, const pk_real *inputs);
/* Values at points (row[p], t[p]), p < count <= point_capacity: in segment->tape, point by point. Cost 4 P flops a point; none
 * where the tape holds all of them in this order, perhaps with others between. */
PK__INTERNAL void pk__path_forward(pk__path *segment, size_t count, const size_t *row, const pk_real *t);
/* The same behind the points that the tape holds, or in their place where there is no room: returns the first one. */
PK__INTERNAL size_t pk__path_append(pk__path *segment, size_t count, const size_t *row, const pk_real *t);
/* Tangents along the step's direction at points that the tape holds from number first on. */
PK__INTERNAL void pk__path_tangent(pk__path *segment, size_t first, size_t count, const size_t *row,
                                   const pk_real *t);
/* Cotangents at the points of the last forward from the seeds in pk__pass_seed(&segment->tape). */
PK__INTERNAL void pk__path_reverse(pk__path *segment, size_t count, const pk_real *t, size_t copies);

PK__INTERNAL void pk__pieces_take(pk__arena *arena, size_t capacity, pk__pieces *pieces);
/* Appends the piece [a, b] of a row without kinks at its ends and returns it; the caller knows that it fits. */
PK__INTERNAL pk__piece *pk__pieces_push(pk__pieces *pieces, size_t row, double a, double b);

/* pathkernel/path/kinks.h: internals */
/* to = the pieces from, split at the kinks inside them, by row and t. 1, or 0 where the capacity does not suffice. Exact
 * for graphs with 0 <= degree <= PK__PATH_DEGREE. Cost 4 P flops a sample. */
PK__INTERNAL int pk__path_split(pk__path *segment, const pk__pieces *from, pk__pieces *to);

/* pathkernel/path/quadrature.h: internals */
/* h (count) and, unless NULL, slope (count x outputs) of one row. h may be NULL for the built-in kinds. */
PK__INTERNAL void pk__readout_apply(const pk_readout *readout, size_t outputs, size_t row, const pk_real *f,
                                    pk_real *h, pk_real *slope);

/* Points of a block: t[p] in [0, 1] of row row[p] with weight[p]. Where bounds are asked for, check[p] are the weights of (a
 * rule of higher order minus the rule), and slack[p] those with which the sizes of the gradients bound what no rule sees: how
 * far the kinks beside the point may lie from where they were found, and what a piece left of its closure; else both are
 * NULL. */
typedef struct pk__points {
    size_t count;
    size_t *row;
    pk_real *t, *weight, *check, *slack;
    int last; /* no more points come in this step */
} pk__points;

/* Receives points, at most the segment's point capacity at a time; once with `last` in a step, perhaps with none. */
typedef void pk__point_sink(void *user, const pk__points *points);

/* What a row's next step starts with: the nodes of each of its pieces, and for how many steps fewer nodes are not tried. */
typedef struct pk__row_order {
    unsigned char nodes, wait;
} pk__row_order;

enum { PK__FIRST_NODES = 2 };

/* What is known of a row along the run, step after step. */
typedef struct pk__row_state {
    double height;        /* the largest |h| that is known */
    double change;        /* the scale of errors: the most that h changed in one step */
    double step_change;   /* the same of this step, as far as it is known */
    size_t halvings;      /* of its pieces in this step */
    pk__row_order order;  /* at first PK__FIRST_NODES */
    unsigned char nested; /* pieces are judged by a nested rule at first */
} pk__row_state;

/* The integration of one block of rows, step after step; one a thread. */
typedef struct pk__integrator {
    pk__path segment;
    pk_quadrature quadrature;
    pk_readout readout;
    size_t first_row; /* of the block among the test rows */
    double target;    /* the error a piece may have, relative to the change of its row */
    const double *gauss_nodes, *gauss_weights; /* rules 1 .. PK_GAUSS_NODES, rule n from n (n - 1) / 2 */
    pk__row_state *state;                      /* the caller's, one per row */
    pk__pieces pending, failed, pieces;
    unsigned char *order, *passed, *nested; /* of the pieces; order: nodes */
    pk__row_order *next_order;              /* of the rows */
    double *missed;                         /* of the pieces: the error of one order less; 0: not known */
    size_t *sequence, sequence_count;       /* the pieces that have passed, one after another */
    pk__points buffer;                      /* points on their way to the sink */
    pk_real *slope, *h;
    /* h at both ends of the step (rows x 2 x readouts), of the rows where it has been measured: */
    pk_real *ends;
    unsigned char *has_ends;
    /* Counted over the steps since the caller zeroed them: */
    size_t points_last;                   /* points of the last step: the cost model's guess for the next one */
    size_t points, split_pieces, refused; /* refused: pieces accepted although they missed the target */
} pk__integrator;

/* points: of one call of the sink; reverse_points: of one pk__path_reverse. bounds: also send what bounds on the error
 * of the integrals are made from. */
PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator);
PK__INTERNAL void pk__points_take(pk__arena *arena, size_t capacity, int bounds, pk__points *points);
/* Fills a table of the rules 1 .. PK_GAUSS_NODES, PK_GAUSS_NODES (PK_GAUSS_NODES + 1) / 2 numbers each. */
PK__INTERNAL void pk__gauss_table(double *nodes, double *weights);
/* Sends points of the segment's step (after pk__path_begin) to the sink. */
PK__INTERNAL void pk__integrate(pk__integrator *integrator, pk__point_sink *sink, void *user);
/* h at both ends of the step of every row, after pk__integrate: rows x 2 x readouts numbers, until the next call. */
PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator);

/* pathkernel/features/factors.h: internals */
/* What decides how the gradients of a layer that is used at several places (a convolution, a dense layer on tokens) are
 * represented: as one outer product for each place, or by rows, materialised. */
typedef struct pk__representation {
    size_t outputs, batch; /* that a test row and a step have */
    int materialised; /* Phi is needed as a whole: stateful optimisers, bounds, or because the caller says so */
    int factored;     /* else: never materialise where that can be avoided */
    int known_data; /* what the network's inputs are multiplied with is known: examples' inputs are not needed as factors */
} pk__representation;

/* 1: gradients of the examples are materialised for the node's weights. Where Phi is, too, that costs fewest flops, as
 * long as a step's gradients fit into 256 MiB; else by flops a row and step with five points, where a Hadamard product
 * of one number counts as 8. */
PK__INTERNAL int pk__layer_by_rows(const pk__representation *representation, const pk_node *node);

/* Factors of c_i grad l_i for the examples of a batch, in panels of PK_PANEL examples: feature j of batch position b is
 * number (b / PK_PANEL * features + j) * PK_PANEL + b % PK_PANEL of input[l] (features: places x fan_in) and of cotangent[l]
 * (places x fan_out); a last panel is filled with zeros. input[l] is NULL for known data. rows[l] (weights x ld), for layers by
 * rows, is feature-major. */
typedef struct pk__examples {
    size_t count, ld;
    const int64_t *items;
    int consecutive; /* items[b] == items[0] + b */
    pk_real **input, **cotangent, **rows;
} pk__examples;

enum { PK__EXAMPLE_BLOCK = 256 };

PK__INTERNAL void pk__examples_take(pk__arena *arena, const pk_graph *graph, size_t capacity,
                                    const pk__representation *representation, pk__examples *examples);
/* Weights (P) with a random relative change of up to PK__PERTURBATION each: see pk__examples_magnitude. */
#ifdef PATHKERNEL_FLOAT
#define PK__PERTURBATION 3e-5
#else
#define PK__PERTURBATION 1e-9
#endif
PK__INTERNAL void pk__examples_perturb(size_t count, const pk_real *weights, pk_real *perturbed);
/* For bounds: to, which holds the gradients at perturbed weights, becomes the absolute values of from and how strongly
 * they depend on relative changes of the weights. pk__rounding_allowance times to then holds what rounding leaves of the
 * gradients, also where a loss is nearly zero or terms cancel on the way back. */
PK__INTERNAL void pk__examples_magnitude(const pk__examples *from, const pk_graph *graph, pk__examples *to);
/* sum (P) += sum over the examples of their gradients. */
PK__INTERNAL void pk__examples_sum(const pk__examples *examples, const pk_graph *graph, pk_real *sum);
/* The rounding allowance of a gradient, relative to its size: c eps, c = 16 nodes + 2 sum over layers (inputs + outputs). */
PK__INTERNAL double pk__rounding_allowance(const pk_graph *graph);
/* Memory of one thread to fill examples, at most rows <= PK__EXAMPLE_BLOCK at a time. */
typedef struct pk__example_workspace {
    pk__tape tape;
    pk_real *inputs, *targets, *row_gradients;
} pk__example_workspace;
PK__INTERNAL void pk__example_workspace_take(pk__arena *arena, const pk_graph *graph, size_t rows,
                                             pk__example_workspace *workspace);
PK__INTERNAL void pk__examples_begin(pk__examples *examples, const pk_batch *batch);
/* Fills the columns first .. first + PK__EXAMPLE_BLOCK - 1, as far as there are any, with gradients of
 * c_b l_b at the weights; gradient (P, may be NULL) += their sum. Cost about 6 P flops an example. */
PK__INTERNAL void pk__examples_fill(pk__examples *examples, const pk_graph *graph, pk_loss loss,
                                    const pk_real *weights, const pk_dataset *data, const pk_batch *batch,
                                    size_t first, pk__example_workspace *workspace, pk_real *gradient);

/* pathkernel/features/features.h: internals */
/* What a layer needs per point. */
typedef enum pk__layer_kind {
    PK__LAYER_DATA,   /* input constant: sum_p w_p delta_p */
    PK__LAYER_LINEAR, /* cotangent constant: sum_p w_p a_p */
    PK__LAYER_POINTS, /* both vary */
    PK__LAYER_ROWS    /* materialised row by row */
} pk__layer_kind;

enum { PK__DIRECTIONS = 3 };

/* From one row of a tile to the next: a panel more than a block of examples, so that rows fall on different cache sets. */
enum { PK__TILE_LD = PK__EXAMPLE_BLOCK + PK_PANEL };

/* tile (row_count * outputs x count, ld PK__TILE_LD) of inner products <Phi, g_b>, b = first .. first + count - 1,
 * from one layer, or from several at once (layer -1). */
typedef void pk__tile_sink(void *user, int layer, size_t first, size_t count, const pk_real *tile);

/* One thread's memory. A row's Phi is stored layer by layer: (outputs x layer outputs x layer inputs) of the weight,
 * then (outputs x layer outputs) of the bias; or (outputs x weights) for PK__LAYER_ROWS. */
typedef struct pk__integral {
    const pk_graph *graph;
    pk__integrator integrator;
    size_t outputs, rows, row_capacity, reverse_points;
    /* Phi can be had of the outputs first_output .. first_output + output_count - 1, at most output_capacity of them,
     * the caller's choice before a step: whole groups of `unit`, which are materialised together whatever is chosen. */
    size_t unit, first_output, output_count, output_capacity;
    pk__layer_kind *kind;
    const pk_node **node;
    int *integrated; /* this step: Phi of the layer is wanted */
    int *headed;     /* this step: the outputs are taken out of the sum over points */
    const pk_node *
        *head;       /* POINTS below an elementwise operation below the last layer: that layer; else NULL */
    pk_real **delta; /* DATA: rows x outputs x out, integrated; LINEAR: the constant cotangent */
    pk_real **input; /* LINEAR: rows x in, integrated; DATA: points into the segment's base */
    pk_real **phi;   /* POINTS and ROWS: rows x output_capacity x weights */
    pk_real **check,
        **size;       /* with bounds, like phi: the difference to a better rule; after a step, the error */
    double allowance; /* c eps of the rounding bound */
    int per_layer;    /* tiles layer by layer */
    const pk_real *directions[PK__DIRECTIONS]; /* P each, NULL: unused */
    pk_real *along[PK__DIRECTIONS];            /* rows x outputs: < Phi, direction > */
    pk_real *weight_sum;                       /* rows */
    unsigned char *begun;                      /* rows: whether the step has had points of it */
    /* The contraction: */
    const pk__examples *examples;
    const pk_real *gram; /* rows x gram_ld: inputs times the training inputs, or NULL */
    size_t gram_ld;
    pk__tile_sink *sink;
    void *user;
    pk_real *tile; /* rows x outputs x PK__TILE_LD */
    pk_real *left; /* points or rows, x PK__TILE_LD */
    pk_real *scratch, *weighted, *absolute;
    pk_real *ones;             /* points or rows */
    pk_real **weighted_inputs; /* of layers at points: points x in, times their weights */
    /* Where rows of products go or come from: the cell of the tile, or the row of left, of a point's or row's output; that of
     * the places of a layer that is used at several; one after another in a tile or a panel. */
    size_t *point_to, *cell_left, *place_to, *place_left, *tile_row, *panel_row, *pair_row;
    /* The headed layer: */
    pk_real *head_weights; /* 1 + rows, x outputs x (out of W^T seed, out of D^T seed) */
    pk_real *slopes;       /* points x 2 out: w slope, w t slope */
    size_t *unit_row;      /* rows x 2 out: the units that are on, as rows of a panel, twice */
    size_t *unit_count;    /* rows */
    pk_real *sums;         /* PK__HEAD_PART x PK__PAIR */
    /* Of some points of a layer used at several places: inputs times weights, then cotangents; weights */
    pk_real *places, *place_start;
    pk__points sorted;
    double flops;                             /* of the contraction, counted */
    double seconds_sums, seconds_contraction; /* of the sums over points; of all that follows them */
} pk__integral;

/* Phi of every layer can be had of materialise outputs at a time (it costs rows x materialise x P numbers; 0: of none),
 * in groups of unit; with bounds, also a bound on its error, number by number (three times that). */
PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialise, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *tangent);
/* How many test rows make a block, from shapes alone. */
PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs);
/* How many outputs are materialised together, from shapes alone: their Phi is about a megabyte, or one output's. */
PK__INTERNAL size_t pk__integral_unit(size_t outputs, size_t parameters);

/* pathkernel/features/product.h: internals */
/* tile (outputs x columns, ld PK__TILE_LD) += < e_k, g_b > for the columns b = first .. first + columns - 1, first a multiple
 * of PK_PANEL, columns <= PK__EXAMPLE_BLOCK; e of `outputs` outputs laid out like phi of the layer. The columns that fill the
 * last panel are written, too. */
PK__INTERNAL void pk__integral_contract_row(pk__integral *tangent, size_t layer, size_t outputs,
                                            const pk_real *e, size_t first, size_t columns, pk_real *tile);

/* pathkernel/features/integral.h: internals */
/* Integrates the step of the rows and sends the tiles of the factored layers. Phi of the layers for which
 * `engine` (and the cost model) chose to materialise stands in phi afterwards, see pk__integral_row_phi. transposed: as for
 * pk__path_begin. */
PK__INTERNAL void pk__integral_step(pk__integral *tangent, const pk_real *weights, const pk_real *direction,
                                    const pk_real *transposed, size_t first_row, size_t rows,
                                    const pk_real *inputs, pk_engine engine);
/* phi of the outputs first .. first + count - 1 (of those chosen) of one row after pk__integral_step: (count x layer outputs
 * x layer inputs) of the weight, then (count x layer outputs) of the bias; count x weights for PK__LAYER_ROWS. */
PK__INTERNAL void pk__integral_row_phi(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                       size_t count, pk_real *phi);
/* error >= |computed - true Phi|, same layout: twice the difference to a rule of higher order, the uncertainty of the
 * kinks times the gradients beside them, and pk__rounding_allowance times sum_p w_p |delta_p| |a_p|. */
PK__INTERNAL void pk__integral_row_error(const pk__integral *tangent, size_t layer, size_t row, size_t first,
                                         size_t count, pk_real *error);

/* pathkernel/attribution/steps.h: internals */
typedef struct pk__window {
    const pk_run *run;
    /* Of the run: */
    size_t parameters, largest_batch, state_vectors;
    int preconditioned; /* the optimiser scales each parameter on its own */
    /* The caller's, after pk__steps_begin: */
    pk__representation representation;
    /* Of the plan: */
    size_t capacity, windows, threads, lanes;
    size_t stride, spare;
    int bounds;
    /* The steps first .. first + count - 1; step first + j is number j below: */
    size_t first, count;
    pk_real *weights;    /* (count + 1) x P */
    pk_real *direction;  /* count x P: D_s */
    pk_real *transposed; /* count x 2 x P: pk__pass_transpose of weights and direction, or NULL */
    pk_real *remainder;  /* count x P: u_s = D_s - the update recomputed in double */
    size_t pitch; /* of the two that follow: P in whole cache lines, which the steps back in time read with R */
    pk_real *preconditioner; /* count x pitch: p_s, or NULL */
    pk_real *
        preconditioner_error; /* count x pitch, with bounds: what rounding of the gradients may do to p_s, or NULL */
    pk_linear_form *forms;
    pk_batch *batches;
    pk__examples *examples, *magnitudes; /* magnitudes: see pk__examples_magnitude, or NULL */
    /* Private: */
    pk_real *gradient; /* count x lanes x P; lane 0 becomes the sum */
    /* In parts of PK__STATE_PART parameters; with bounds, two more states behind the first: of perturbed gradients. */
    pk_real *state, *saved, *update;
    pk_real *perturbed;          /* 3 P */
    pk_real *perturbed_weights;  /* with bounds: count x P */
    size_t states;               /* 1, or 3: with optimisers whose gradients are perturbed */
    size_t *spare_at;            /* the windows that the spare states stand before, ascending */
    size_t spare_used, advanced; /* windows gone through only for the state */
    pk__example_workspace *workspaces;
    double *seconds; /* a thread's on examples */
    double seconds_read;
    pk_replay replay; /* of runs that keep only every k-th step */
} pk__window;

/* What of a run matters here: reads the batches' sizes. */
PK__INTERNAL void pk__steps_begin(const pk_run *run, pk__window *window);
/* Takes windows of up to capacity steps for threads threads. stride: keep the optimiser's state at the start of every
 * stride-th window and spare more between two of them, so that windows can be visited backwards; 0: do not. bounds: have
 * what bounds need. */
PK__INTERNAL void pk__steps_take(pk__arena *arena, size_t capacity, size_t stride, size_t spare, size_t threads,
                                 int bounds, pk__window *window);
/* How many windows a visit of `windows` consecutive ones, last to first, goes through again for their states, with the
 * state before the first and room for spare more. */
PK__INTERNAL double pk__steps_again(size_t windows, size_t spare);
/* Prepares the steps first .. first + count - 1, going on from the optimiser's state as it is. Cost about 8 P
 * flops an example. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_prepare(pk_context *context, pk__window *window, size_t first,
                                                      size_t count);
/* Goes through the run once and keeps the states. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_save_states(pk_context *context, pk__window *window);
/* Prepares window number index (after pk__steps_save_states where the optimiser has a state): going on from the nearest
 * state that was kept. Cheap for the window before the one that was visited last, see pk__steps_again. */
PK__INTERNAL PK__MUST_USE pk_status pk__steps_visit(pk_context *context, pk__window *window, size_t index);

#endif /* internals */

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_IMPLEMENTED)
#define PATHKERNEL_IMPLEMENTED

/* pathkernel/base/status.h: implementation */
#ifdef __cplusplus
#error \
    "pathkernel's implementation is C11: define PATHKERNEL_IMPLEMENTATION in a C file. C++ includes the declarations."
#endif
PK__BEGIN_CODE

PK_API const char *pk_status_text(pk_status status)
{
    switch (status) {
#define PK__STATUS_CASE(name, value, text) \
    case name: return text;
        PK_STATUS_LIST(PK__STATUS_CASE)
#undef PK__STATUS_CASE
    default: return "unknown status";
    }
}

PK_API const char *pk_version(void)
{
    return PK_VERSION;
}

PK__END_CODE

/* pathkernel/base/context.h: implementation */
#include <float.h>
#include <locale.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__GLIBC__) && !defined(__USE_XOPEN2K8)
#error "pathkernel's implementation needs POSIX: compile it with -std=gnu11 or -D_POSIX_C_SOURCE=200809L"
#endif
PK__BEGIN_COLD_CODE

/* The rounding of pk_real: what is measured or looked for in its numbers goes no further. */
#define PK__EPSILON (sizeof(pk_real) == sizeof(float) ? 1.1920929e-7 : 2.220446049250313e-16)

/* 1 unless value is a NaN or an infinity, whatever -ffast-math makes of isfinite. */
PK__INLINE int pk__finite(double value)
{
    uint64_t bits, exponent = (uint64_t)0x7ff << 52;
    memcpy(&bits, &value, sizeof bits);
    return (bits & exponent) != exponent;
}

PK__PRIVATE int pk__thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Numbers are written and read with a point, whatever the locale of the program: this thread has the "C"
 * locale between these two. */
typedef struct pk__locale {
    locale_t plain, before; /* plain: 0 where there is no memory for it */
} pk__locale;

static pk__locale pk__locale_enter(void)
{
    pk__locale locale = {newlocale(LC_ALL_MASK, "C", (locale_t)0), (locale_t)0};
    if (locale.plain)
        locale.before = uselocale(locale.plain);
    return locale;
}

static void pk__locale_leave(pk__locale locale)
{
    if (!locale.plain)
        return;
    uselocale(locale.before);
    freelocale(locale.plain);
}

/* snprintf in the "C" locale. */
PK__FORMAT(3, 4)
PK__PRIVATE int pk__print(char *text, size_t size, const char *format, ...)
{
    va_list arguments;
    pk__locale locale = pk__locale_enter();
    va_start(arguments, format);
    int length = vsnprintf(text, size, format, arguments);
    va_end(arguments);
    pk__locale_leave(locale);
    return length;
}

/* A message quotes files and texts that others wrote: it stays one line, and sends a terminal no commands. */
PK__PRIVATE void pk__clean_message(pk_context *context)
{
    for (char *at = context->message; *at; at++)
        if ((unsigned char)*at < ' ' || *at == 127)
            *at = '?';
}

/* Records the message and returns the status, so that errors read `return pk__fail(...)`. Not from
 * inside a parallel region. */
PK__FORMAT(3, 4)
PK__PRIVATE pk_status pk__fail(pk_context *context, pk_status status, const char *format, ...)
{
    if (context) {
        va_list arguments;
        pk__locale locale = pk__locale_enter();
        va_start(arguments, format);
        vsnprintf(context->message, sizeof context->message, format, arguments);
        va_end(arguments);
        pk__clean_message(context);
        pk__locale_leave(locale);
    }
    return status;
}

/* Bytes of a file as they may stand in a message: printable, and cut to size - 1. Returns text. */
PK__PRIVATE const char *pk__printable(const char *bytes, size_t length, char *text, size_t size)
{
    size_t i;
    for (i = 0; i < length && i + 1 < size; i++)
        text[i] = bytes[i] < ' ' || bytes[i] > '~' ? '?' : bytes[i];
    text[i] = 0;
    return text;
}

/* 1 and *value where the whole text is a finite decimal number of fewer than 512 characters, correctly
 * rounded, with a point whatever the locale; else 0. */
PK__PRIVATE int pk__number(const char *text, size_t length, double *value)
{
    static const double powers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                    1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    char copy[512];
    size_t i = 0, digits = 0;
    uint64_t mantissa = 0;
    int exponent = 0, point = 0, exact = 1, negative = length && text[0] == '-';
    if (length >= sizeof copy)
        return 0;
    for (i = length && (text[0] == '-' || text[0] == '+'); i < length; i++) {
        if (text[i] == '.' && !point) {
            point = 1;
        } else if (text[i] >= '0' && text[i] <= '9') {
            digits++;
            if (mantissa < (uint64_t)1 << 53) /* so that it stays below 2^57 */
                mantissa = 10 * mantissa + (uint64_t)(text[i] - '0'), exponent -= point;
            else
                exact = 0;
        } else {
            break;
        }
    }
    if (!digits)
        return 0;
    if (i < length) {
        int minus = 0, written = 0;
        if (text[i] != 'e' && text[i] != 'E')
            return 0;
        if (++i < length && (text[i] == '-' || text[i] == '+'))
            minus = text[i++] == '-';
        if (i == length)
            return 0;
        for (; i < length; i++) {
            if (text[i] < '0' || text[i] > '9')
                return 0;
            written = written < 100000 ? 10 * written + (text[i] - '0') : written;
        }
        exponent += minus ? -written : written;
    }
    /* Both operands exact, so one operation rounds correctly (Clinger 1990). */
    if (FLT_EVAL_METHOD == 0 && exact && mantissa <= (uint64_t)1 << 53 && exponent >= -22 && exponent <= 22) {
        double magnitude =
            exponent < 0 ? (double)mantissa / powers[-exponent] : (double)mantissa * powers[exponent];
        *value = negative ? -magnitude : magnitude;
        return 1;
    }
    pk__locale locale = pk__locale_enter();
    memcpy(copy, text, length);
    copy[length] = 0;
    double parsed = strtod(copy, NULL);
    pk__locale_leave(locale);
    if (!locale.plain || !pk__finite(parsed))
        return 0;
    *value = parsed;
    return 1;
}

/* 1 and *product = a * b, or 0 on overflow. */
PK__PRIVATE int pk__multiply(size_t a, size_t b, size_t *product)
{
    if (b != 0 && a > SIZE_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

/* Always inline: gcc does not by itself where its options differ, as they do between the tiles and the rest. */
PK__INLINE size_t pk__min(size_t a, size_t b)
{
    return a < b ? a : b;
}

PK__INLINE size_t pk__max(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* How many blocks of size hold count. */
PK__INLINE size_t pk__blocks(size_t count, size_t size)
{
    return count / size + (count % size != 0);
}

PK__PRIVATE double pk__seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

PK__PRIVATE pk_status pk__progress(pk_context *context, const char *phase, double fraction)
{
    if (context && context->progress && context->progress(context->progress_user, phase, fraction) != 0)
        return pk__fail(context, PK_CANCELLED, "cancelled by the caller during %s", phase);
    return PK_OK;
}

PK_API const char *pk_message(const pk_context *context)
{
    return context ? context->message : "";
}

PK_API int pk_threads(const pk_context *context)
{
    enum { ANY_MACHINE = 64 };
    int threads = context && context->threads > 0 ? context->threads : 1, most = ANY_MACHINE;
#ifdef _OPENMP
    if (!context || context->threads <= 0)
        threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (threads > most && omp_get_num_procs() > most)
        most = omp_get_num_procs();
#endif
    return threads < most ? threads : most;
}

enum { PK__ALIGNMENT = 64 };

/* Before each allocation, in a cache line of its own: its whole size, and what is given back. */
typedef struct pk__header {
    size_t bytes;
    void *block;
} pk__header;

/* pk_allocate, where clear == 0 without zeroes. */
PK__PRIVATE pk_status pk__allocate(pk_context *context, size_t count, size_t size, int clear, const char *what,
                                   void *pointer)
{
    void *none = NULL;
    memcpy(pointer, &none, sizeof none);
    size_t bytes = 0;
    if (!pk__multiply(count, size, &bytes) || bytes > SIZE_MAX / 2 - 2 * PK__ALIGNMENT)
        return pk__fail(context, PK_OVERFLOW, "%s: %zu items of %zu bytes overflow", what, count, size);
    if (bytes == 0)
        return PK_OK;
    const int own = !context || !context->allocator.allocate;
    bytes = (bytes + PK__ALIGNMENT - 1) / PK__ALIGNMENT * PK__ALIGNMENT + (own ? 2 : 1) * PK__ALIGNMENT;
    if (context && context->memory_limit &&
        (context->memory_used > context->memory_limit || bytes > context->memory_limit - context->memory_used))
        return pk__fail(context, PK_MEMORY_LIMIT,
                        "%s needs %zu bytes beside the %zu held, more than the memory limit of %zu bytes", what,
                        bytes, context->memory_used, context->memory_limit);
    /* Large blocks of calloc are zero pages that whoever writes them first gets: no thread clears them alone. */
    void *block = !own    ? context->allocator.allocate(context->allocator.user, bytes, PK__ALIGNMENT)
                  : clear ? calloc(1, bytes)
                          : malloc(bytes);
    if (!block)
        return pk__fail(context, PK_MEMORY, "%s: no memory for %zu bytes", what, bytes);
    if (!own && clear)
        memset(block, 0, bytes);
    unsigned char *start = (unsigned char *)block + PK__ALIGNMENT;
    if (own)
        start += PK__ALIGNMENT - (uintptr_t)start % PK__ALIGNMENT;
    pk__header *header = (pk__header *)(start - PK__ALIGNMENT);
    header->bytes = bytes;
    header->block = block;
    if (context) {
        context->memory_used += bytes;
        if (context->memory_used > context->memory_peak)
            context->memory_peak = context->memory_used;
    }
    memcpy(pointer, &start, sizeof start);
    return PK_OK;
}

PK_API pk_status pk_allocate(pk_context *context, size_t count, size_t size, const char *what, void *pointer)
{
    return pk__allocate(context, count, size, 1, what, pointer);
}

PK_API void pk_release(pk_context *context, void *pointer)
{
    if (!pointer)
        return;
    const pk__header header = *(pk__header *)((unsigned char *)pointer - PK__ALIGNMENT);
    if (context) {
        context->memory_used -= header.bytes;
        if (context->allocator.allocate) {
            context->allocator.release(context->allocator.user, header.block, header.bytes);
            return;
        }
    }
    free(header.block);
}

PK__INTERNAL void *pk__arena_take(pk__arena *arena, size_t count, size_t size)
{
    size_t bytes = 0;
    if (!pk__multiply(count, size, &bytes) || bytes > SIZE_MAX / 2 || arena->used > SIZE_MAX / 2 - bytes - 64) {
        arena->overflow = 1;
        return NULL;
    }
    bytes = (bytes + PK__ALIGNMENT - 1) / PK__ALIGNMENT * PK__ALIGNMENT;
    size_t start = arena->used;
    if (arena->base && bytes > arena->capacity - start) {
        arena->overflow = 1;
        return NULL;
    }
    arena->used += bytes;
    return arena->base && bytes ? arena->base + start : NULL;
}

PK__END_COLD_CODE

/* pathkernel/base/parallel.h: implementation */
#include <string.h>
#include <time.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

#ifdef _OPENMP
#define PK__ATOMIC_WRITE PK__PRAGMA(omp atomic write)
#define PK__ATOMIC_ADD PK__PRAGMA(omp atomic)
#define PK__ATOMIC_TAKE PK__PRAGMA(omp atomic capture)
/* Before the loop over the tasks of a team. */
#define PK__PARALLEL(team) PK__PRAGMA(omp parallel num_threads((team).started))
#else
#define PK__ATOMIC_WRITE
#define PK__ATOMIC_ADD
#define PK__ATOMIC_TAKE
#define PK__PARALLEL(team)
#endif

/* Seconds: see the top of this file. */
#define PK__LOAD_LOSS 1e-3
#define PK__LOAD_CREDIT 20e-3 /* that is gained before a loss counts for no more */
#define PK__LOAD_REST 20      /* times the loss */
#define PK__LOAD_SHORTEST 10e-3
#define PK__LOAD_LONGEST 2.0
#define PK__LOAD_EVER 60.0    /* whatever was lost: a process may have been stopped */
#define PK__LOAD_TRIAL 500e-6 /* of work that a trial takes, or as many regions as there may be */
#define PK__LOAD_START 20e-6  /* that a region of a trial may take beside its work */
enum { PK__LOAD_TRIALS = 8 };

/* Independent tasks of a region; their number and what each does never depend on the threads:
 *
 *     pk__team team = pk__team_of(context, threads, tasks);
 *     PK__PARALLEL(team)
 *     for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team))
 *         ...                 pk__thread() < threads is the thread that has it
 *     pk__team_end(&team);
 *
 * No break from that loop. */
typedef struct pk__team {
    pk_context *context; /* whose regions are watched; NULL: nobody's */
    size_t tasks, next;  /* next: that no thread has taken */
    int threads;         /* that take tasks */
    int started;         /* threads of the region */
    double begin, work;  /* its time; processor seconds of all threads */
} pk__team;

#ifdef _OPENMP
static double pk__processor_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* One thread for a while. */
static void pk__load_rest(pk_context *context, double now, double loss)
{
    pk_load *load = &context->load;
    double rest = PK__LOAD_REST * loss;
    rest = rest > 2 * load->rest ? rest : 2 * load->rest; /* at most PK__LOAD_LONGEST */
    rest = rest > PK__LOAD_SHORTEST ? rest : PK__LOAD_SHORTEST;
    rest = rest < PK__LOAD_EVER ? rest : PK__LOAD_EVER;
    load->until = now + rest;
    load->rest = rest < PK__LOAD_LONGEST / 2 ? rest : PK__LOAD_LONGEST / 2;
    load->gain = load->work = 0;
    load->trusted = load->tries = 0;
    context->backed_off++;
}

/* A region of several threads has ended. */
static void pk__load_watch(pk_context *context, double now, double wall, double work)
{
    pk_load *load = &context->load;
    const double gain = work - wall;
    if (load->trusted) {
        load->gain = load->gain + gain < PK__LOAD_CREDIT ? load->gain + gain : PK__LOAD_CREDIT;
        if (load->gain >= PK__LOAD_CREDIT)
            load->rest = 0;
        if (load->gain < -PK__LOAD_LOSS)
            pk__load_rest(context, now, -load->gain);
        return;
    }
    load->gain += gain;
    load->work += work;
    load->tries++;
    const int gained = load->gain >= 0.15 * load->work - load->tries * PK__LOAD_START;
    const int lost = load->gain < -PK__LOAD_LOSS, last = load->tries == PK__LOAD_TRIALS;
    if (!lost && !last && !(gained && load->work >= PK__LOAD_TRIAL))
        return;
    if (gained && !lost) {
        load->trusted = 1;
        load->gain = load->work = 0;
        load->tries = 0;
    } else {
        pk__load_rest(context, now, -load->gain);
    }
}

/* How many of the threads a region gets. */
static int pk__load_threads(pk_context *context, int threads, double now)
{
    pk_load *load = &context->load;
    const long process = (long)getpid();
    if (!load->process)
        load->process = process;
    /* The threads of a parent are not there after a fork, but OpenMP would wait for them. */
    if (load->process != process || now < load->until)
        return 1;
    return threads;
}
#endif

PK__PRIVATE pk__team pk__team_of(pk_context *context, int threads, size_t tasks)
{
    pk__team team = {context, tasks, 0, 1, 1, 0, 0};
#ifdef _OPENMP
    if (threads > 1 && tasks > 1)
        team.threads = (size_t)threads < tasks ? threads : (int)tasks;
    if (team.threads > 1 && context) {
        team.begin = pk__seconds();
        team.threads = pk__load_threads(context, team.threads, team.begin);
    }
    team.started = team.threads;
    if (team.threads > 1 && context) {
        context->regions++;
        if (!context->load.trusted && team.threads >= omp_get_num_procs())
            team.started = team.threads + 1;
    }
#else
    (void)threads;
#endif
    return team;
}

PK__PRIVATE void pk__team_end(pk__team *team)
{
#ifdef _OPENMP
    if (team->context && team->started > 1) {
        const double now = pk__seconds();
        pk__load_watch(team->context, now, now - team->begin, team->work);
    }
#else
    (void)team;
#endif
}

PK__PRIVATE size_t pk__next_task(pk__team *team)
{
    size_t task;
    PK__ATOMIC_TAKE
    task = team->next++;
#ifdef _OPENMP
    if (task >= team->tasks && team->context && team->started > 1) {
        const double now = pk__processor_seconds();
        PK__ATOMIC_ADD
        team->work += now;
    }
#endif
    return task;
}

PK__PRIVATE size_t pk__first_task(pk__team *team)
{
#ifdef _OPENMP
    if (omp_get_thread_num() >= team->threads)
        return SIZE_MAX;
    if (team->context && team->started > 1) {
        const double now = pk__processor_seconds();
        PK__ATOMIC_ADD
        team->work -= now;
    }
#endif
    return pk__next_task(team);
}

PK__END_COLD_CODE

/* pathkernel/base/random.h: implementation */
#include <math.h>
PK__BEGIN_CODE

/* Ten rounds of Philox4x32: block := bijection of block, chosen by key. */
static void pk__philox(const uint32_t key[2], uint32_t block[4])
{
    uint32_t k0 = key[0], k1 = key[1], x0 = block[0], x1 = block[1], x2 = block[2], x3 = block[3];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x0, p1 = (uint64_t)0xCD9E8D57u * x2;
        x0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0;
        x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
        x1 = (uint32_t)p1;
        x3 = (uint32_t)p0;
        k0 += 0x9E3779B9u; /* the golden ratio */
        k1 += 0xBB67AE85u; /* sqrt(3) - 1 */
    }
    block[0] = x0, block[1] = x1, block[2] = x2, block[3] = x3;
}

/* The 128 bits at the counter, which moves on. */
static void pk__random_block(pk_random *random, uint64_t bits[2])
{
    uint32_t key[2] = {(uint32_t)random->seed, (uint32_t)(random->seed >> 32)};
    uint32_t block[4] = {(uint32_t)random->counter, (uint32_t)(random->counter >> 32), (uint32_t)random->stream,
                         (uint32_t)(random->stream >> 32)};
    random->counter++;
    pk__philox(key, block);
    bits[0] = (uint64_t)block[1] << 32 | block[0];
    bits[1] = (uint64_t)block[3] << 32 | block[2];
}

PK_API uint64_t pk_random_bits(pk_random *random)
{
    uint64_t bits[2];
    pk__random_block(random, bits);
    return bits[0];
}

PK_API double pk_random_uniform(pk_random *random)
{
    return (double)(pk_random_bits(random) >> 11) * (1.0 / 9007199254740992.0);
}

PK_API double pk_random_normal(pk_random *random)
{
    uint64_t bits[2];
    pk__random_block(random, bits);
    double radius = (double)((bits[0] >> 11) + 1) * (1.0 / 9007199254740992.0); /* (0, 1]: log is finite */
    double angle = (double)(bits[1] >> 11) * (1.0 / 9007199254740992.0);
    return sqrt(-2 * log(radius)) * cos(6.283185307179586476925 * angle);
}

PK_API uint64_t pk_random_below(pk_random *random, uint64_t n)
{
    if (n < 2)
        return 0;
    /* 2^64 mod n values are left out, so that every remainder has the same number of preimages. */
    uint64_t excess = (0 - n) % n, bits;
    do
        bits = pk_random_bits(random);
    while (bits < excess);
    return bits % n;
}

PK_API void pk_random_shuffle(pk_random *random, size_t count, int64_t *items)
{
    for (size_t left = count; left > 1; left--) {
        size_t other = (size_t)pk_random_below(random, left);
        int64_t item = items[left - 1];
        items[left - 1] = items[other];
        items[other] = item;
    }
}

PK__END_CODE

/* pathkernel/math/tile.h: implementation */
#include <string.h>

#if defined(__GNUC__)
#define PK__ALIGNED __attribute__((aligned(64))) /* for vectors that are cache lines */
typedef pk_real pk__vector __attribute__((vector_size(16), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__wide_vector __attribute__((vector_size(32), aligned(sizeof(pk_real)), may_alias));
typedef pk_real pk__whole_vector __attribute__((vector_size(64), aligned(sizeof(pk_real)), may_alias));
#if defined(__AVX2__) && defined(__FMA__)
#define PK__AVX2 /* the whole program has it */
#define PK__HAS_AVX2 1
#elif defined(__x86_64__) && !defined(PATHKERNEL_NO_DISPATCH)
#define PK__AVX2 __attribute__((target("avx2,fma")))
#define PK__HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#endif
#if defined(PATHKERNEL_NO_AVX512)
#elif defined(__AVX512F__)
#define PK__AVX512
#define PK__HAS_AVX512 1
#elif defined(__x86_64__) && !defined(PATHKERNEL_NO_DISPATCH)
#define PK__AVX512 __attribute__((target("avx512f")))
#define PK__HAS_AVX512 __builtin_cpu_supports("avx512f")
#endif
#else
#define PK__ALIGNED
typedef pk_real pk__vector;
#endif

/* Functions name_avx512, name_avx2 and name_base, by DEFINE(suffix, attributes, vectors), and the call of the right one.
 * Whether the number of rows in a tile is known when a processor's tiles are compiled: those for processors before 2013,
 * where there are faster ones, do with one copy of 4 rows. */
#define PK__KNOWN_avx512 1
#define PK__KNOWN_avx2 1
#ifdef PK__AVX512
#define PK__FOR_AVX512(DEFINE) DEFINE(avx512, PK__AVX512, pk__whole_vector)
#define PK__ON_AVX512(name, arguments) \
    if (PK__HAS_AVX512)                \
        name##_avx512 arguments;       \
    else
#else
#define PK__HAS_AVX512 0
#define PK__FOR_AVX512(DEFINE)
#define PK__ON_AVX512(name, arguments)
#endif
#ifdef PK__AVX2
#define PK__KNOWN_base 0
#define PK__FOR_AVX2(DEFINE) DEFINE(avx2, PK__AVX2, pk__wide_vector)
#define PK__ON_AVX2(name, arguments) \
    if (PK__HAS_AVX2)                \
        name##_avx2 arguments;       \
    else
#define PK__FOR_BASE(DEFINE) PK__COLD_BEGIN DEFINE(base, , pk__vector) PK__COLD_END /* before 2013 */
#else
#define PK__HAS_AVX2 0
#define PK__KNOWN_base 1
#define PK__FOR_AVX2(DEFINE)
#define PK__ON_AVX2(name, arguments)
#define PK__FOR_BASE(DEFINE) DEFINE(base, , pk__vector)
#endif
#define PK__FOR_PROCESSORS(DEFINE) PK__FOR_AVX512(DEFINE) PK__FOR_AVX2(DEFINE) PK__FOR_BASE(DEFINE)
#define PK__ON_PROCESSOR(name, arguments) \
    PK__ON_AVX512(name, arguments) PK__ON_AVX2(name, arguments) name##_base arguments

/* sum + number times vector. gcc contracts x y + z in its GNU modes only. */
#define PK__ADD_base(sum, number, beside) ((sum) + (number) * (beside))
#if defined(__clang__)
#define PK__ADD_avx2 PK__ADD_base /* contracted */
#define PK__ADD_avx512 PK__ADD_base
#elif defined(PATHKERNEL_FLOAT)
#define PK__ADD_avx2(sum, number, beside) __builtin_ia32_vfmaddps256((number)-zero, beside, sum)
#define PK__ADD_avx512(sum, number, beside) __builtin_ia32_vfmaddps512_mask((number)-zero, beside, sum, -1, 4)
#else
#define PK__ADD_avx2(sum, number, beside) __builtin_ia32_vfmaddpd256((number)-zero, beside, sum)
#define PK__ADD_avx512(sum, number, beside) __builtin_ia32_vfmaddpd512_mask((number)-zero, beside, sum, -1, 4)
#endif

enum {
    PK__TALLEST = 6,        /* rows of a tile of two vectors a row */
    PK__PAIR = 2 * PK_PANEL /* columns that are worth multiplying together */
};

typedef enum pk__tile_form {
    PK__TILE_SET,      /* to = product */
    PK__TILE_ADD,      /* to += product */
    PK__TILE_HADAMARD, /* to += other o product */
    PK__TILE_DOT       /* to[0] += sum of other o product over the rows of a tile */
} pk__tile_form;

/* Panels of B that stand side by side in a product: row p of panel q begins at first + q * apart + p * step. */
typedef struct pk__panels {
    size_t count;
    const pk_real *first;
    size_t step, apart;
    size_t ahead; /* what is multiplied next begins so much further, 0: unknown */
} pk__panels;

/* Where the rows of a product go: row i to `to + to_at[i]` (DOT: all to `to`), with `other + other_at[i]`; those of
 * panel q PK_PANEL numbers further for each panel before it, with numbers that are other_apart further. */
typedef struct pk__tile_target {
    pk__tile_form form;
    pk_real *to;
    const size_t *to_at;
    const pk_real *other; /* of HADAMARD and DOT */
    const size_t *other_at;
    size_t other_apart;
} pk__tile_target;

/* Rows as tiles: so many of 6 and then so many of 4. */
static inline void pk__tiles(size_t rows, size_t *sixes, size_t *fours)
{
    const size_t rest = rows % 6;
    *sixes = rows / 6;
    *fours = rest == 3 || rest == 4;
    if (rest == 5)
        *sixes += 1;
    else if ((rest == 1 || rest == 2) && *sixes) {
        *sixes -= 1;
        *fours = 2;
    } else if (rest == 1 || rest == 2)
        *fours = 1;
}

#define PK__EACH_4(X) X(0) X(1) X(2) X(3)
#define PK__EACH_6(X) PK__EACH_4(X) X(4) X(5)
/* Of row i of a tile: where it stands in A, two vectors of accumulators, and the places that they go to. In scope: vector and
 * its lanes, the place `at` of a column of A, and the vectors left_b and right_b of a row of B. Rows behind the last one
 * repeat it and go nowhere. */
#define PK__TILE_ROW(i)                                               \
    const pk_real *row##i = a + (i < count ? i : count - 1) * across; \
    vector left##i, right##i;
#define PK__TILE_START(i) left##i = right##i = (start && i < count ? start[i] : 0) - zero;
#define PK__TILE_STEP(i, ADD)                   \
    left##i = ADD(left##i, row##i[at], left_b); \
    right##i = ADD(right##i, row##i[at], right_b);
#define PK__STEP_base(i) PK__TILE_STEP(i, PK__ADD_base)
#define PK__STEP_avx2(i) PK__TILE_STEP(i, PK__ADD_avx2)
#define PK__TILE_END(i, assign, left_value, right_value) \
    if (i < count) {                                     \
        pk_real *to = target->to + to_at[i] + column;    \
        *(vector *)to assign(left_value);                \
        *(vector *)(to + lanes) assign(right_value);     \
    }
#define PK__OTHER(i, beside) (*(const vector *)(target->other + other_at[i] + column + (beside)))
#define PK__TILE_SETS(i) PK__TILE_END(i, =, left##i, right##i)
#define PK__TILE_ADDS(i) PK__TILE_END(i, +=, left##i, right##i)
#define PK__TILE_HADAMARDS(i) PK__TILE_END(i, +=, left##i * PK__OTHER(i, 0), right##i * PK__OTHER(i, lanes))
#define PK__TILE_DOTS(i)                             \
    if (i < count) {                                 \
        left_sum += left##i * PK__OTHER(i, 0);       \
        right_sum += right##i * PK__OTHER(i, lanes); \
    }
/* gcc does not unroll by itself. It matters where the other thread of a core takes half of its instructions. */
#if defined(__GNUC__) && !defined(__clang__)
#define PK__UNROLL _Pragma("GCC unroll 4")
#else
#define PK__UNROLL
#endif
#define PK__DEFINE_TILE(name, attributes, EACH, vectors, STEP)                                                 \
    attributes PK__INLINE void name(size_t count, size_t depth, const pk_real *a, size_t across, size_t along, \
                                    const pk_real *panel, size_t step, const pk_real *start,                   \
                                    const pk__tile_target *target, const size_t *to_at,                        \
                                    const size_t *other_at)                                                    \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                              \
        const vector zero = {0};                                                                               \
        EACH(PK__TILE_ROW)                                                                                     \
        for (size_t column = 0; column < PK_PANEL; column += 2 * lanes) {                                      \
            const pk_real *b = panel + column;                                                                 \
            EACH(PK__TILE_START)                                                                               \
            PK__UNROLL                                                                                         \
            for (size_t p = 0, at = 0; p < depth; p++, at += along, b += step) {                               \
                const vector left_b = *(const vector *)b, right_b = *(const vector *)(b + lanes);              \
                EACH(STEP)                                                                                     \
            }                                                                                                  \
            if (target->form == PK__TILE_SET) {                                                                \
                EACH(PK__TILE_SETS)                                                                            \
            } else if (target->form == PK__TILE_ADD) {                                                         \
                EACH(PK__TILE_ADDS)                                                                            \
            } else if (target->form == PK__TILE_DOT) {                                                         \
                vector *to = (vector *)(target->to + column),                                                  \
                       *beside = (vector *)(target->to + column + lanes);                                      \
                vector left_sum = *to, right_sum = *beside;                                                    \
                EACH(PK__TILE_DOTS)                                                                            \
                *to = left_sum;                                                                                \
                *beside = right_sum;                                                                           \
            } else {                                                                                           \
                EACH(PK__TILE_HADAMARDS)                                                                       \
            }                                                                                                  \
        }                                                                                                      \
    }
/* The tiles of all rows of A, one behind the other. A tile whose rows are known when it is compiled has no questions left to
 * ask: worth three copies of it. */
#define PK__DEFINE_PANEL(suffix, attributes, vectors)                                                         \
    PK__DEFINE_TILE(pk__tile_6_##suffix, attributes, PK__EACH_6, vectors, PK__STEP_##suffix)                  \
    PK__DEFINE_TILE(pk__tile_4_##suffix, attributes, PK__EACH_4, vectors, PK__STEP_##suffix)                  \
    attributes static void pk__panel_of_##suffix(size_t rows, size_t depth, const pk_real *a, size_t across,  \
                                                 size_t along, const pk_real *panel, size_t step,             \
                                                 const pk_real *start, const pk__tile_target *target)         \
    {                                                                                                         \
        const size_t *to_at = target->to_at, *other_at = target->other_at;                                    \
        size_t sixes, fours, first = 0, count;                                                                \
        if (PK__KNOWN_##suffix)                                                                               \
            pk__tiles(rows, &sixes, &fours);                                                                  \
        else                                                                                                  \
            sixes = 0, fours = pk__blocks(rows, 4);                                                           \
        for (size_t tile = 0; tile < sixes + fours; tile++, first += count) {                                 \
            const pk_real *own = a + first * across, *begin = start ? start + first : NULL;                   \
            const size_t *to = to_at ? to_at + first : NULL, *other = other_at ? other_at + first : NULL;     \
            count = pk__min(tile < sixes ? 6 : 4, rows - first);                                              \
            if (count == 6 && PK__KNOWN_##suffix) /* when this is compiled */                                 \
                pk__tile_6_##suffix(6, depth, own, across, along, panel, step, begin, target, to, other);     \
            else if (tile < sixes && PK__KNOWN_##suffix)                                                      \
                pk__tile_6_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
            else                                                                                              \
                pk__tile_4_##suffix(count, depth, own, across, along, panel, step, begin, target, to, other); \
        }                                                                                                     \
    }                                                                                                         \
    attributes static void pk__panels_##suffix(size_t rows, size_t depth, const pk_real *a, size_t across,    \
                                               size_t along, const pk__panels *b, const pk_real *start,       \
                                               const pk__tile_target *target)                                 \
    {                                                                                                         \
        pk__tile_target own = *target;                                                                        \
        for (size_t q = 0; q < b->count; q++, own.to += PK_PANEL) {                                           \
            own.other = target->other ? target->other + q * target->other_apart : NULL;                       \
            pk__panel_of_##suffix(rows, depth, a, across, along, b->first + q * b->apart, b->step, start,     \
                                  &own);                                                                      \
        }                                                                                                     \
    }

/* Rows that are 0 at the same terms: of those only the others, which are told by number. */
#define PK__PICKED_END(i)                               \
    if (i < count) {                                    \
        pk_real *own = to + i * ld + column;            \
        if (!overwrite) {                               \
            left##i += *(const vector *)own;            \
            right##i += *(const vector *)(own + lanes); \
        }                                               \
        *(vector *)own = left##i;                       \
        *(vector *)(own + lanes) = right##i;            \
    }
#define PK__DEFINE_PICKED(suffix, attributes, vectors)                                                        \
    attributes static void pk__picked_##suffix(size_t rows, size_t terms, const unsigned char *term,          \
                                               const pk_real *a, size_t across, const pk__panels *panels,     \
                                               int overwrite, pk_real *to, size_t ld)                         \
    {                                                                                                         \
        typedef vectors vector;                                                                               \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                             \
        const vector zero = {0};                                                                              \
        const pk_real *start = NULL;                                                                          \
        for (size_t first = 0; first < rows; first += 4, a += 4 * across, to += 4 * ld) {                     \
            const size_t count = pk__min(4, rows - first);                                                    \
            PK__EACH_4(PK__TILE_ROW)                                                                          \
            for (size_t column = 0; column < panels->count * PK_PANEL; column += 2 * lanes) {                 \
                const pk_real *panel = panels->first + column / PK_PANEL * panels->apart + column % PK_PANEL; \
                PK__EACH_4(PK__TILE_START)                                                                    \
                for (size_t p = 0; p < terms; p++) {                                                          \
                    const size_t at = term[p];                                                                \
                    const pk_real *b = panel + at * panels->step;                                             \
                    const vector left_b = *(const vector *)b, right_b = *(const vector *)(b + lanes);         \
                    PK__EACH_4(PK__STEP_##suffix)                                                             \
                }                                                                                             \
                PK__EACH_4(PK__PICKED_END)                                                                    \
            }                                                                                                 \
        }                                                                                                     \
    }

/* The other way round for few terms: up to six rows of B stay in registers, and row after row of A passes. */
#define PK__SUM_LOAD(i)                                     \
    vector left##i = zero, right##i = zero;                 \
    if (i < count) {                                        \
        left##i = *(const vector *)(b + i * step);          \
        right##i = *(const vector *)(b + i * step + lanes); \
    }
#define PK__SUM_STEP(i, ADD)                              \
    if (i < count) {                                      \
        left = ADD(left, a[row + i * along], left##i);    \
        right = ADD(right, a[row + i * along], right##i); \
    }
#define PK__SUM_base(i) PK__SUM_STEP(i, PK__ADD_base)
#define PK__SUM_avx2(i) PK__SUM_STEP(i, PK__ADD_avx2)
#define PK__SUM_avx512(i) PK__SUM_STEP(i, PK__ADD_avx512)
#define PK__DEFINE_SUMS(suffix, attributes, vectors)                                                           \
    attributes PK__INLINE void pk__sums_of_##suffix(size_t count, size_t rows, const pk_real *a, size_t along, \
                                                    size_t columns, const pk_real *panel, size_t step,         \
                                                    int begin, int end, const pk_real *others, size_t apart,   \
                                                    const size_t *other_at, pk_real *to)                       \
    {                                                                                                          \
        typedef vectors vector;                                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                              \
        const vector zero = {0};                                                                               \
        const size_t next = 2 * lanes > PK_PANEL ? apart : (size_t)lanes;                                      \
        for (size_t column = 0; column < columns; column += 2 * lanes) {                                       \
            const pk_real *b = panel + column;                                                                 \
            const pk_real *other = others + column / PK_PANEL * apart + column % PK_PANEL;                     \
            PK__EACH_6(PK__SUM_LOAD)                                                                           \
            for (size_t row = 0; row < rows; row++) {                                                          \
                vector *at = (vector *)(to + row * PK__PAIR + column);                                         \
                vector left = zero, right = zero;                                                              \
                if (!begin) {                                                                                  \
                    left = at[0];                                                                              \
                    right = at[1];                                                                             \
                }                                                                                              \
                PK__EACH_6(PK__SUM_##suffix)                                                                   \
                if (end) {                                                                                     \
                    left *= *(const vector *)(other + other_at[row]);                                          \
                    right *= *(const vector *)(other + other_at[row] + next);                                  \
                }                                                                                              \
                at[0] = left;                                                                                  \
                at[1] = right;                                                                                 \
            }                                                                                                  \
        }                                                                                                      \
    }                                                                                                          \
    attributes static void pk__sums_##suffix(size_t rows, size_t depth, const pk_real *a, size_t along,        \
                                             const pk__panels *panels, const pk_real *other,                   \
                                             size_t other_apart, const size_t *other_at, pk_real *to)          \
    {                                                                                                          \
        const size_t step = panels->step, columns = panels->count * PK_PANEL;                                  \
        const size_t apart = panels->count > 1 ? other_apart : 0;                                              \
        for (size_t p = 0; p < depth; p += PK__TALLEST) {                                                      \
            const size_t count = pk__min(PK__TALLEST, depth - p);                                              \
            const pk_real *own = a + p * along, *b = panels->first + p * step;                                 \
            const int begin = p == 0, end = p + count == depth;                                                \
            PK__SUMS_CASES(PK__KNOWN_##suffix, pk__sums_of_##suffix)                                           \
        }                                                                                                      \
    }
#define PK__SUMS_OF(name, count) \
    name(count, rows, own, along, columns, b, step, begin, end, other, apart, other_at, to)
#define PK__SUMS_CASES(known, name)          \
    switch (known ? count : 0) {             \
    case 0: PK__SUMS_OF(name, count); break; \
    case 1: PK__SUMS_OF(name, 1); break;     \
    case 2: PK__SUMS_OF(name, 2); break;     \
    case 3: PK__SUMS_OF(name, 3); break;     \
    case 4: PK__SUMS_OF(name, 4); break;     \
    case 5: PK__SUMS_OF(name, 5); break;     \
    default: PK__SUMS_OF(name, 6);           \
    }

#ifdef PK__AVX512
/* A vector is a row of a panel, and an accumulator a row of the tile. Tiles are as wide as two panels, where there are two:
 * a number of A is fetched once for both, and fetching is what bounds tiles of one (1024^3 by bench_matrix: 80 GF/s, of two
 * 106). Rows are groups of 4, which one pointer and three distances address: a group's row i is group + distance_i. The first
 * rows of a group that are there twice, skip of them, go nowhere: a last group starts 4 rows before the end. */
typedef struct pk__group {
    const pk_real *a;
    size_t row, skip;
} pk__group;

#define PK__WIDE_TAKE(g)                                                                           \
    const pk_real *a##g = group[g < groups ? g : 0].a;                                             \
    const size_t row##g = group[g < groups ? g : 0].row, skip##g = group[g < groups ? g : 0].skip; \
    vector left##g##0 = zero, left##g##1 = zero, left##g##2 = zero, left##g##3 = zero;             \
    vector right##g##0 = zero, right##g##1 = zero, right##g##2 = zero, right##g##3 = zero;
#define PK__WIDE_EACH(X, g)                 \
    if (g < groups) {                       \
        if (!(halved && g + 1 == groups)) { \
            X(g, 0)                         \
            X(g, 1)                         \
        }                                   \
        X(g, 2)                             \
        X(g, 3)                             \
    }
#define PK__WIDE_START(g, i) left##g##i = right##g##i = (i < skip##g ? 0 : start[row##g + i]) - zero;
#define PK__WIDE_STEP(g, i)                                                  \
    left##g##i = PK__ADD_avx512(left##g##i, a##g[at + distance##i], left_b); \
    if (both)                                                                \
        right##g##i = PK__ADD_avx512(right##g##i, a##g[at + distance##i], right_b);
#define PK__WIDE_END(g, i, assign, left_value, right_value)              \
    if (i >= skip##g) {                                                  \
        vector *to = (vector *)(target->to + target->to_at[row##g + i]); \
        to[0] assign(left_value);                                        \
        if (both)                                                        \
            to[1] assign(right_value);                                   \
    }
#define PK__WIDE_OTHER(g, i, beside) \
    (*(const vector *)(target->other + target->other_at[row##g + i] + (beside)))
#define PK__WIDE_SETS(g, i) PK__WIDE_END(g, i, =, left##g##i, right##g##i)
#define PK__WIDE_ADDS(g, i) PK__WIDE_END(g, i, +=, left##g##i, right##g##i)
#define PK__WIDE_HADAMARDS(g, i)                                 \
    PK__WIDE_END(g, i, +=, left##g##i * PK__WIDE_OTHER(g, i, 0), \
                 right##g##i * PK__WIDE_OTHER(g, i, target->other_apart))
#define PK__WIDE_DOTS(g, i)                                                       \
    if (i >= skip##g) {                                                           \
        left_sum += left##g##i * PK__WIDE_OTHER(g, i, 0);                         \
        if (both)                                                                 \
            right_sum += right##g##i * PK__WIDE_OTHER(g, i, target->other_apart); \
    }
#define PK__WIDE_GROUPS(X) PK__WIDE_EACH(X, 0) PK__WIDE_EACH(X, 1) PK__WIDE_EACH(X, 2)
/* halved: of the last group its last two rows only. both: two panels, the second one beside the first of b. term: the terms
 * that are meant, or NULL: all. */
PK__AVX512 PK__INLINE void pk__wide_tile(size_t groups, int halved, int both, const pk__group *group,
                                         const size_t *distance, size_t depth, const unsigned char *term,
                                         size_t along, const pk__panels *b, const pk_real *beside,
                                         const pk_real *start, const pk__tile_target *target)
{
    typedef pk__whole_vector vector;
    const vector zero = {0};
    const size_t distance0 = 0, distance1 = distance[1], distance2 = distance[2], distance3 = distance[3];
    const size_t step = b->step, ahead = b->ahead;
    const int fetching = groups > 1 && !term;
    const pk_real *panel = b->first;
    PK__WIDE_TAKE(0)
    PK__WIDE_TAKE(1)
    PK__WIDE_TAKE(2)
    if (start) {
        PK__WIDE_GROUPS(PK__WIDE_START)
    }
    PK__UNROLL
    for (size_t p = 0; p < depth; p++) {
        const size_t q = term ? term[p] : p, at = q * along;
        if (fetching) {
            __builtin_prefetch(panel + q * step + ahead);
            if (both)
                __builtin_prefetch(beside + q * step + ahead);
        }
        const vector left_b = *(const vector *)(panel + q * step),
                     right_b = both ? *(const vector *)(beside + q * step) : zero;
        PK__WIDE_GROUPS(PK__WIDE_STEP)
    }
    if (target->form == PK__TILE_SET) {
        PK__WIDE_GROUPS(PK__WIDE_SETS)
    } else if (target->form == PK__TILE_ADD) {
        PK__WIDE_GROUPS(PK__WIDE_ADDS)
    } else if (target->form == PK__TILE_DOT) {
        vector *to = (vector *)target->to;
        vector left_sum = to[0], right_sum = both ? to[1] : zero;
        PK__WIDE_GROUPS(PK__WIDE_DOTS)
        to[0] = left_sum;
        if (both)
            to[1] = right_sum;
    } else {
        PK__WIDE_GROUPS(PK__WIDE_HADAMARDS)
    }
}

/* Tiles of two groups of rows, or of three; and, for networks of ten outputs, of two and a half. */
PK__AVX512 PK__INLINE void pk__wide_tiles(int both, size_t rows, size_t depth, const unsigned char *term,
                                          const pk_real *a, size_t across, size_t along, const pk__panels *b,
                                          const pk_real *beside, const pk_real *start,
                                          const pk__tile_target *target)
{
    const size_t last = rows < 4 ? 0 : rows - 4, all = pk__blocks(rows, 4);
    const size_t missing = rows < 4 ? 4 - rows : 0;
    size_t distance[4];
    for (size_t i = 0; i < 4; i++)
        distance[i] = i < missing ? 0 : (i - missing) * across;
    pk__panels own = *b;
    for (size_t done = 0, groups; done < all; done += groups) {
        pk__group group[3];
        const size_t rest = all - done;
        groups = rest == 1 ? 1 : both ? 2 + rest % 2 : rest == 4 ? 2 : pk__min(3, rest);
        for (size_t g = 0; g < groups; g++) {
            const size_t first = pk__min(4 * (done + g), last);
            group[g].a = a + first * across;
            group[g].skip = 4 * (done + g) - first + missing;
            group[g].row = first - missing; /* and, where 4 rows are not there, of the first that is: modulo */
        }
        if (groups == 3 && both && group[2].skip >= 2)
            pk__wide_tile(3, 1, 1, group, distance, depth, term, along, &own, beside, start, target);
        else if (groups == 3)
            pk__wide_tile(3, 0, both, group, distance, depth, term, along, &own, beside, start, target);
        else if (groups == 2)
            pk__wide_tile(2, 0, both, group, distance, depth, term, along, &own, beside, start, target);
        else
            pk__wide_tile(1, 0, both, group, distance, depth, term, along, &own, beside, start, target);
        own.ahead = 0;
    }
}

/* Two panels at a time, and the last one of an odd number. */
PK__AVX512 PK__INLINE void pk__wide_panels(size_t rows, size_t depth, const unsigned char *term,
                                           const pk_real *a, size_t across, size_t along, const pk__panels *b,
                                           const pk_real *start, const pk__tile_target *target)
{
    pk__panels pair = *b;
    pk__tile_target own = *target;
    for (size_t rest = b->count; rest > 0; rest -= pk__min(rest, 2)) {
        if (rest > 1)
            pk__wide_tiles(1, rows, depth, term, a, across, along, &pair, pair.first + pair.apart, start, &own);
        else
            pk__wide_tiles(0, rows, depth, term, a, across, along, &pair, NULL, start, &own);
        pair.first += 2 * pair.apart;
        own.to += 2 * PK_PANEL;
        own.other = own.other ? own.other + 2 * own.other_apart : NULL;
    }
}

PK__AVX512 static void pk__panels_avx512(size_t rows, size_t depth, const pk_real *a, size_t across,
                                         size_t along, const pk__panels *b, const pk_real *start,
                                         const pk__tile_target *target)
{
    pk__wide_panels(rows, depth, NULL, a, across, along, b, start, target);
}

PK__AVX512 static void pk__picked_avx512(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                         size_t across, const pk__panels *b, int overwrite, pk_real *to,
                                         size_t ld)
{
    enum { AT_ONCE = 16 };
    size_t at[AT_ONCE];
    for (size_t i = 0; i < AT_ONCE; i++)
        at[i] = i * ld;
    for (size_t first = 0; first < rows; first += AT_ONCE) {
        const pk__tile_target target = {
            overwrite ? PK__TILE_SET : PK__TILE_ADD, to + first * ld, at, NULL, NULL, 0};
        pk__wide_panels(pk__min(AT_ONCE, rows - first), terms, term, a + first * across, across, 1, b, NULL,
                        &target);
    }
}

/* One panel and the one beside it, wherever that stands. */
PK__AVX512 static void pk__pair_avx512(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                       const pk_real *first, const pk_real *beside,
                                       const pk__tile_target *target)
{
    const pk__panels b = {2, first, PK_PANEL, 0, 0};
    pk__wide_tiles(1, rows, depth, NULL, a, across, along, &b, beside, NULL, target);
}

PK__AVX512 static void pk__picked_pair_avx512(size_t rows, size_t terms, const unsigned char *term,
                                              const pk_real *a, size_t across, const pk_real *first,
                                              const pk_real *beside, const pk__tile_target *target)
{
    const pk__panels b = {2, first, PK_PANEL, 0, 0};
    pk__wide_tiles(1, rows, terms, term, a, across, 1, &b, beside, NULL, target);
}
#endif

PK__FOR_AVX2(PK__DEFINE_PANEL)
PK__FOR_BASE(PK__DEFINE_PANEL)

/* target form= start + A B: A is rows x depth, element (i, p) at a[i * across + p * along]; B is panels. start: a number
 * for each row, NULL: 0. No two rows of a tile have one place, unless they are added to it. */
PK__PRIVATE void pk__panel_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                   const pk__panels *b, const pk_real *start, const pk__tile_target *target)
{
    PK__ON_PROCESSOR(pk__panels, (rows, depth, a, across, along, b, start, target));
}

PK__FOR_AVX2(PK__DEFINE_PICKED)
PK__FOR_BASE(PK__DEFINE_PICKED)

/* to (rows, ld) = or, unless overwrite, += the terms term[0 .. terms - 1] of A B: element (i, p) of A is a[i * across + p]. */
PK__PRIVATE void pk__picked_product(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                    size_t across, const pk__panels *b, int overwrite, pk_real *to, size_t ld)
{
    PK__ON_PROCESSOR(pk__picked, (rows, terms, term, a, across, b, overwrite, to, ld));
}

/* pk__panel_product with one panel or two, each where it is: step PK_PANEL. */
PK__PRIVATE void pk__pair_product(size_t rows, size_t depth, const pk_real *a, size_t across, size_t along,
                                  size_t count, const pk_real *const *panels, const pk__tile_target *target)
{
#ifdef PK__AVX512
    if (PK__HAS_AVX512 && count == 2) {
        pk__pair_avx512(rows, depth, a, across, along, panels[0], panels[1], target);
        return;
    }
#endif
    pk__tile_target own = *target;
    for (size_t q = 0; q < count; q++, own.to += PK_PANEL) {
        const pk__panels one = {1, panels[q], PK_PANEL, 0, 0};
        pk__panel_product(rows, depth, a, across, along, &one, NULL, &own);
    }
}

/* pk__picked_product likewise, for at most 16 rows. at[i] = i * ld. */
PK__PRIVATE void pk__picked_pair(size_t rows, size_t terms, const unsigned char *term, const pk_real *a,
                                 size_t across, size_t count, const pk_real *const *panels, int overwrite,
                                 pk_real *to, size_t ld, const size_t *at)
{
#ifdef PK__AVX512
    if (PK__HAS_AVX512 && count == 2) {
        const pk__tile_target target = {overwrite ? PK__TILE_SET : PK__TILE_ADD, to, at, NULL, NULL, 0};
        pk__picked_pair_avx512(rows, terms, term, a, across, panels[0], panels[1], &target);
        return;
    }
#endif
    (void)at;
    for (size_t q = 0; q < count; q++) {
        const pk__panels one = {1, panels[q], PK_PANEL, 0, 0};
        pk__picked_product(rows, terms, term, a, across, &one, overwrite, to + q * PK_PANEL, ld);
    }
}

PK__FOR_PROCESSORS(PK__DEFINE_SUMS)

/* to (rows x PK__PAIR) = other o (A B), for few terms and at most two panels that stand side by side as they are,
 * apart PK_PANEL: element (i, p) of A is a[i + p * along], row i of other stands at other + other_at[i], for the next panel
 * other_apart further. Terms in ascending order. Columns behind those of one panel are written, too. */
PK__PRIVATE void pk__panel_sums(size_t rows, size_t depth, const pk_real *a, size_t along, const pk__panels *b,
                                const pk_real *other, size_t other_apart, const size_t *other_at, pk_real *to)
{
    PK__ON_PROCESSOR(pk__sums, (rows, depth, a, along, b, other, other_apart, other_at, to));
}

/* What panels are multiplied with. */
PK__PRIVATE const char *pk__panel_name(void)
{
    return PK__HAS_AVX512 ? "AVX-512" : PK__HAS_AVX2 ? "AVX2" : "baseline";
}


/* pathkernel/math/elementary.h: implementation */
#include <math.h>
#include <string.h>

/* Before a loop whose turns are independent: gcc vectorises it at -O2, too. */
#ifdef _OPENMP
#define PK__SIMD PK__PRAGMA(omp simd)
#else
#define PK__SIMD
#endif

/* 1 if all are finite: 0 x is 0, or NaN for NaN and infinities. Chains, so that the additions do not wait for each
 * other. */
static int pk__all_finite_plain(const pk_real *x, size_t count)
{
    pk_real chain[8] = {0, 0, 0, 0, 0, 0, 0, 0}, zero = 0;
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            chain[k] += 0 * x[i + k];
    for (; i < count; i++)
        zero += 0 * x[i];
    for (size_t k = 0; k < 8; k++)
        zero += chain[k];
    return zero == 0;
}

#ifdef PK__AVX2
PK__AVX2 static int pk__all_finite_avx2(const pk_real *x, size_t count)
{
    enum { LANES = (int)(sizeof(pk__wide_vector) / sizeof(pk_real)), STEP = 4 * LANES };
    pk__wide_vector a = {0}, b = a, c = a, d = a;
    const size_t whole = count / STEP * STEP;
    for (size_t i = 0; i < whole; i += STEP) {
        a += *(const pk__wide_vector *)(x + i) * 0;
        b += *(const pk__wide_vector *)(x + i + LANES) * 0;
        c += *(const pk__wide_vector *)(x + i + 2 * LANES) * 0;
        d += *(const pk__wide_vector *)(x + i + 3 * LANES) * 0;
    }
    a += b;
    c += d;
    a += c;
    pk_real lane[LANES];
    memcpy(lane, &a, sizeof lane);
    /* No call from here: gcc 12 would not clear the upper halves of the registers, and all that is not AVX, until they are
     * cleared, would take up to seven times as long. */
    pk_real zero = 0;
    for (size_t i = 0; i < LANES; i++)
        zero += lane[i];
    for (size_t i = whole; i < count; i++)
        zero += 0 * x[i];
    return zero == 0;
}
#endif

PK__PRIVATE int pk__all_finite(const pk_real *x, size_t count)
{
#ifdef PK__AVX2
    if (count >= 32 && PK__HAS_AVX2)
        return pk__all_finite_avx2(x, count);
#endif
    return pk__all_finite_plain(x, count);
}

/* In chains, so that additions do not wait for each other: a vector of AVX-512, two of the others. */
#define PK__DEFINE_DOTS(suffix, attributes, vectors)                                                        \
    attributes static void pk__dots_##suffix(size_t rows, size_t count, const pk_real *a, const pk_real *b, \
                                             pk_real factor, pk_real *to)                                   \
    {                                                                                                       \
        typedef vectors vector;                                                                             \
        enum {                                                                                              \
            lanes = (int)(sizeof(vector) / sizeof(pk_real)),                                                \
            both = lanes < PK_PANEL,                                                                        \
            chains = (both + 1) * lanes                                                                     \
        };                                                                                                  \
        for (size_t row = 0; row < rows; row++, a += count) {                                               \
            vector left = {0}, right = {0};                                                                 \
            pk_real chain[lanes], rest = 0;                                                                 \
            size_t i = 0;                                                                                   \
            for (; i + chains <= count; i += chains) {                                                      \
                left += *(const vector *)(a + i) * *(const vector *)(b + i);                                \
                if (both)                                                                                   \
                    right += *(const vector *)(a + i + lanes) * *(const vector *)(b + i + lanes);           \
            }                                                                                               \
            for (; i < count; i++)                                                                          \
                rest += a[i] * b[i];                                                                        \
            *(vector *)chain = left + right;                                                                \
            for (size_t k = lanes / 2; k > 0; k /= 2)                                                       \
                for (size_t j = 0; j < k; j++)                                                              \
                    chain[j] += chain[j + k];                                                               \
            to[row] += factor * (chain[0] + rest);                                                          \
        }                                                                                                   \
    }
PK__FOR_PROCESSORS(PK__DEFINE_DOTS)

/* to += factor A b of A (rows x count). */
PK__PRIVATE void pk__dots(size_t rows, size_t count, const pk_real *a, const pk_real *b, pk_real factor,
                          pk_real *to)
{
    PK__ON_PROCESSOR(pk__dots, (rows, count, a, b, factor, to));
}

PK__PRIVATE pk_real pk__dot(size_t count, const pk_real *a, const pk_real *b)
{
    pk_real sum = 0;
    pk__dots(1, count, a, b, 1, &sum);
    return sum;
}

#define PK__DEFINE_TIMES(suffix, attributes, vectors)                                          \
    attributes static void pk__times_##suffix(size_t rows, size_t count, const pk_real *from,  \
                                              const pk_real *factors, int add, pk_real *to)    \
    {                                                                                          \
        typedef vectors vector;                                                                \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                              \
        for (size_t row = 0; row < rows; row++, from += count, to += count) {                  \
            size_t i = 0;                                                                      \
            for (; i + lanes <= count; i += lanes) {                                           \
                vector product = *(const vector *)(from + i) * *(const vector *)(factors + i); \
                if (add)                                                                       \
                    product += *(const vector *)(to + i);                                      \
                *(vector *)(to + i) = product;                                                 \
            }                                                                                  \
            for (; i < count; i++)                                                             \
                to[i] = add ? to[i] + from[i] * factors[i] : from[i] * factors[i];             \
        }                                                                                      \
    }
PK__FOR_PROCESSORS(PK__DEFINE_TIMES)

/* to (rows x count) = or, to add, += from o factors, the same ones for every row; to may be one of
 * them. */
PK__PRIVATE void pk__times(size_t rows, size_t count, const pk_real *from, const pk_real *factors, int add,
                           pk_real *to)
{
    PK__ON_PROCESSOR(pk__times, (rows, count, from, factors, add, to));
}

/* y[i] = F(x[i]) for i < count, y may be x. b: softplus' beta; the others do without. */
typedef void pk__elementary(size_t count, double b, const double *x, double *y);

PK__PRIVATE double pk__sigmoid(double x)
{
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* log(1 + e^(b x)) / b, without overflow and without PyTorch's switch to x at b x > 20: that switch is a
 * jump of 2e-9 / b, which no path integral could close over. */
static double pk__softplus(double x, double b)
{
    return (b * x > 0 ? x : 0) + log1p(exp(-fabs(b * x))) / b;
}

#ifdef PK__AVX2

typedef double pk__quad __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t pk__quad_bits __attribute__((vector_size(32), aligned(8), may_alias));
#define PK__QUAD PK__AVX2 static inline pk__quad

/* where ? a : b, number by number. */
#define PK__CHOOSE(where, a, b) \
    ((pk__quad)(((pk__quad_bits)(where) & (pk__quad_bits)(a)) | (~(pk__quad_bits)(where) & (pk__quad_bits)(b))))

PK__QUAD pk__quad_of(double x)
{
    const pk__quad quad = {x, x, x, x};
    return quad;
}

PK__QUAD pk__quad_magnitude(pk__quad x)
{
    return (pk__quad)((pk__quad_bits)x & INT64_MAX);
}

/* The whole number nearest to x, |x| < 2^51: what is below the last place of 1.5 2^52 is rounded away. */
PK__QUAD pk__quad_round(pk__quad x)
{
    return x + 0x1.8p52 - 0x1.8p52;
}

/* 2^n for a whole n from -1022 to 1023. */
PK__QUAD pk__quad_power(pk__quad n)
{
    return (pk__quad)((pk__quad_bits)(n + (0x1.8p52 + 1023)) << 52);
}

/* x - n log 2, for |n| < 2^20: the first product is exact. */
PK__QUAD pk__quad_reduce(pk__quad x, pk__quad n)
{
    return (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
}

/* e^r - 1 for |r| <= log(2) / 2: Taylor's sum, whose rest is below 2e-17 r. */
PK__QUAD pk__quad_expm1_small(pk__quad r)
{
    const pk__quad s = r * r;
    const pk__quad even =
        1.0 / 2 +
        s * (1.0 / 24 + s * (1.0 / 720 + s * (1.0 / 40320 + s * (1.0 / 3628800 + s * (1.0 / 479001600)))));
    const pk__quad odd =
        1.0 / 6 +
        s * (1.0 / 120 + s * (1.0 / 5040 + s * (1.0 / 362880 + s * (1.0 / 39916800 + s * (1.0 / 6227020800)))));
    return r + s * (even + r * odd);
}

/* The power of 2 goes in as two factors, since it may be outside the range of a double where the product is not. */
PK__QUAD pk__quad_exp(pk__quad x)
{
    x = PK__CHOOSE(x < -746, pk__quad_of(-746), x);
    x = PK__CHOOSE(x > 710, pk__quad_of(710), x);
    const pk__quad n = pk__quad_round(x * 0x1.71547652b82fep0), half = pk__quad_round(n * 0.5);
    const pk__quad y = 1 + pk__quad_expm1_small(pk__quad_reduce(x, n));
    return y * pk__quad_power(half) * pk__quad_power(n - half);
}

/* From u = e^(2 |x|) - 1 as u / (u + 2); beyond 20 it is 1. */
PK__QUAD pk__quad_tanh(pk__quad x, double b)
{
    (void)b;
    pk__quad size = pk__quad_magnitude(x);
    size = PK__CHOOSE(size > 20, pk__quad_of(20), size);
    const pk__quad n = pk__quad_round(size * (2 * 0x1.71547652b82fep0)), power = pk__quad_power(n);
    const pk__quad u = power * pk__quad_expm1_small(pk__quad_reduce(size + size, n)) + (power - 1);
    const pk__quad y = u / (u + 2);
    return (pk__quad)((pk__quad_bits)y | ((pk__quad_bits)x & INT64_MIN));
}

PK__QUAD pk__quad_sigmoid(pk__quad x, double b)
{
    (void)b;
    const pk__quad e = pk__quad_exp(-pk__quad_magnitude(x));
    return PK__CHOOSE(x < 0, e, pk__quad_of(1)) / (1 + e);
}

/* log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: Taylor's sum, whose rest is below 1e-17 s. */
PK__QUAD pk__quad_softplus(pk__quad x, double b)
{
    const pk__quad z = x * b, e = pk__quad_exp(-pk__quad_magnitude(z));
    const pk__quad s = e / (2 + e), t = s * s, f = t * t;
    const pk__quad even =
        2.0 / 3 +
        f * (2.0 / 7 +
             f * (2.0 / 11 +
                  f * (2.0 / 15 +
                       f * (2.0 / 19 + f * (2.0 / 23 + f * (2.0 / 27 + f * (2.0 / 31 + f * (2.0 / 35))))))));
    const pk__quad odd =
        2.0 / 5 + f * (2.0 / 9 + f * (2.0 / 13 +
                                      f * (2.0 / 17 +
                                           f * (2.0 / 21 + f * (2.0 / 25 + f * (2.0 / 29 + f * (2.0 / 33)))))));
    const pk__quad tail = (2 * s + s * t * (even + t * odd)) / b;
    return PK__CHOOSE(z > 0, x, tail - tail) + tail; /* NaN where z is */
}

PK__QUAD pk__quad_exponential(pk__quad x, double b)
{
    (void)b;
    return pk__quad_exp(x);
}

/* Correctly rounded, as everywhere; gcc leaves sqrt in loops alone, for the sake of errno. */
PK__QUAD pk__quad_root(pk__quad x, double b)
{
    (void)b;
#ifdef __clang__
#if __has_builtin(__builtin_elementwise_sqrt)
    return __builtin_elementwise_sqrt(x);
#else
    return __builtin_ia32_sqrtpd256(x);
#endif
#else
    return __builtin_ia32_sqrtpd256(x);
#endif
}

#define PK__DEFINE_FAST(name)                                                                  \
    PK__AVX2 static void pk__##name##_avx2(size_t count, double b, const double *x, double *y) \
    {                                                                                          \
        size_t i = 0;                                                                          \
        for (; i + 4 <= count; i += 4)                                                         \
            *(pk__quad *)(y + i) = pk__quad_##name(*(const pk__quad *)(x + i), b);             \
        if (i < count) {                                                                       \
            double last[4] = {0, 0, 0, 0};                                                     \
            memcpy(last, x + i, (count - i) * sizeof *last);                                   \
            *(pk__quad *)last = pk__quad_##name(*(const pk__quad *)last, b);                   \
            memcpy(y + i, last, (count - i) * sizeof *last);                                   \
        }                                                                                      \
    }
#define PK__RUN_FAST(name)                 \
    if (PK__HAS_AVX2) {                    \
        pk__##name##_avx2(count, b, x, y); \
        return;                            \
    }
#else
#define PK__DEFINE_FAST(name)
#define PK__RUN_FAST(name)
#endif

#define PK__ELEMENTARY(name, value)                                                     \
    PK__DEFINE_FAST(name)                                                               \
    PK__PRIVATE void pk__all_##name(size_t count, double b, const double *x, double *y) \
    {                                                                                   \
        (void)b;                                                                        \
        PK__RUN_FAST(name)                                                              \
        for (size_t i = 0; i < count; i++)                                              \
            y[i] = value;                                                               \
    }
PK__ELEMENTARY(exponential, exp(x[i]))
PK__ELEMENTARY(root, sqrt(x[i]))
PK__ELEMENTARY(tanh, tanh(x[i]))
PK__ELEMENTARY(sigmoid, pk__sigmoid(x[i]))
PK__ELEMENTARY(softplus, pk__softplus(x[i], b))
#undef PK__ELEMENTARY
#undef PK__DEFINE_FAST
#undef PK__RUN_FAST

/* The same for numbers of the network, which are computed in double. */
PK__PRIVATE void pk__elementary_reals(pk__elementary *function, size_t count, double b, const pk_real *x,
                                      pk_real *y)
{
    double part[64];
    if (sizeof(pk_real) == sizeof(double)) {
        function(count, b, (const double *)(const void *)x, (double *)(void *)y);
        return;
    }
    for (size_t first = 0; first < count; first += 64) {
        const size_t rest = pk__min(count - first, 64);
        for (size_t i = 0; i < rest; i++)
            part[i] = (double)x[first + i];
        function(rest, b, part, part);
        for (size_t i = 0; i < rest; i++)
            y[first + i] = (pk_real)part[i];
    }
}


/* pathkernel/math/matrix.h: implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
#ifdef PATHKERNEL_BLIS
/* blis.h needs pthread_barrier_t, which a strict -std=c11 hides once a header of the C library came first. */
#if defined(__GLIBC__) && !defined(__USE_XOPEN2K)
#error \
    "PATHKERNEL_BLIS needs POSIX: compile with -std=gnu11 or -D_POSIX_C_SOURCE=200809L, or include pathkernel first"
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#endif
#include <blis.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif
PK__BEGIN_CODE

/* C := beta C, where beta == 0 overwrites whatever was there. */
PK__PRIVATE void pk__scale(size_t m, size_t n, pk_real beta, pk_real *c, size_t ldc)
{
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
}

enum {
    PK__DEPTH = 240,     /* the most terms of a block: a panel of B, 15 KB, is on the stack */
    PK__BLOCK_ROWS = 96, /* rows of A whose places are in a table, */
    PK__STRIP_ROWS =
        384, /* and for which a pair of panels is copied once: they stay in the second-level cache */
    PK__APART_ROWS = 48,       /* rows of a tile that is not C itself */
    PK__FEW_PANELS = 4,        /* so many panels of rows are few */
    PK__FEW_NUMBERS = 1 << 12, /* of B, which stay in the first-level cache as they are */
    /* m n k above which BLIS multiplies A B^T, unless A has few rows; 4 times as many for A B, 16 for A^T B. Below, its start
     * and its packing cost more than its kernel gains, up to a factor of 2 (bench_matrix). */
    PK__BLIS_TERMS = 1 << 19
};

/* Terms of a block: a panel of B stays in the first-level cache beside the rows of a tile. Processors with AVX-512 have larger
 * ones, and a tile of one block is done in half the time: as few blocks as there can be, all alike. */
static size_t pk__block_terms(size_t k)
{
    if (!PK__HAS_AVX512)
        return 128;
    return pk__blocks(pk__blocks(k, pk__blocks(k, PK__DEPTH)), 8) * 8;
}

#if defined(PK__AVX2) && (defined(__clang__) || __GNUC__ >= 12)
#define PK__SHUFFLES
typedef pk_real pk__four __attribute__((vector_size(4 * sizeof(pk_real)), aligned(sizeof(pk_real)), may_alias));
/* Of 4 rows: 4 x 4 numbers at a time. */
PK__AVX2 static void pk__interleave_four(size_t depth, const pk_real *from, size_t across, pk_real *to)
{
    const pk_real *row1 = from + across, *row2 = from + 2 * across, *row3 = from + 3 * across;
    size_t p = 0;
    for (; p + 4 <= depth; p += 4, to += 4 * PK_PANEL) {
        const pk__four a = *(const pk__four *)(from + p), b = *(const pk__four *)(row1 + p),
                       c = *(const pk__four *)(row2 + p), d = *(const pk__four *)(row3 + p);
        const pk__four even_ab = __builtin_shufflevector(a, b, 0, 4, 2, 6),
                       odd_ab = __builtin_shufflevector(a, b, 1, 5, 3, 7),
                       even_cd = __builtin_shufflevector(c, d, 0, 4, 2, 6),
                       odd_cd = __builtin_shufflevector(c, d, 1, 5, 3, 7);
        *(pk__four *)to = __builtin_shufflevector(even_ab, even_cd, 0, 1, 4, 5);
        *(pk__four *)(to + PK_PANEL) = __builtin_shufflevector(odd_ab, odd_cd, 0, 1, 4, 5);
        *(pk__four *)(to + 2 * PK_PANEL) = __builtin_shufflevector(even_ab, even_cd, 2, 3, 6, 7);
        *(pk__four *)(to + 3 * PK_PANEL) = __builtin_shufflevector(odd_ab, odd_cd, 2, 3, 6, 7);
    }
    for (; p < depth; p++, to += PK_PANEL)
        for (size_t j = 0; j < 4; j++)
            to[j] = from[p + j * across];
}
#endif

/* Numbers of `count` rows or columns side by side in a panel: to[p * PK_PANEL + j] = from[p * down + j * across]. */
PK__PRIVATE void pk__interleave(size_t count, size_t depth, const pk_real *from, size_t down, size_t across,
                                pk_real *to)
{
    size_t j = 0;
#ifdef PK__SHUFFLES
    for (; PK__HAS_AVX2 && down == 1 && j + 4 <= count; j += 4)
        pk__interleave_four(depth, from + j * across, across, to + j);
#endif
    for (; j < count; j++) /* the other way round a compiler gathers, which is slow */
        for (size_t p = 0; p < depth; p++)
            to[p * PK_PANEL + j] = from[p * down + j * across];
}

/* to (cols x ld, starting at a column) = transposed from (rows x cols). */
PK__PRIVATE void pk__transpose(size_t rows, size_t cols, const pk_real *from, pk_real *to, size_t ld)
{
    enum { TILE = 32 };
    for (size_t i = 0; i < rows; i += TILE)
        for (size_t j = 0; j < cols; j += TILE)
            for (size_t r = i; r < pk__min(rows, i + TILE); r++)
                for (size_t c = j; c < pk__min(cols, j + TILE); c++)
                    to[c * ld + r] = from[r * cols + c];
}

/* packed (depth x PK_PANEL) = columns of B, 0 behind the last: element (p, j) is b[p * down + j * across]. */
static void pk__pack_panel(size_t columns, size_t depth, const pk_real *b, size_t down, size_t across,
                           pk_real *packed)
{
    if (columns < PK_PANEL)
        memset(packed, 0, depth * PK_PANEL * sizeof *packed);
    if (across == 1 && columns == PK_PANEL)
        for (size_t p = 0; p < depth; p++)
            memcpy(packed + p * PK_PANEL, b + p * down, PK_PANEL * sizeof *packed);
    else
        pk__interleave(columns, depth, b, down, across, packed);
}

/* 1 where C^T = B A^T pays instead of C = A B^T: A has few rows and B many. */
static int pk__has_few_rows(int transpose_b, size_t m, size_t n)
{
    return transpose_b && m <= PK__FEW_PANELS * PK_PANEL && m < n;
}

/* Terms p ... of some rows of a product: C (+)= alpha A B. What is large stands in functions of its own, none of which takes
 * more than 16 KB of the stack: of a pair of panels, one has its place in a function, the other one in its caller. */
typedef struct pk__block {
    size_t rows, depth;
    const pk_real *a; /* term p of the first row */
    size_t row_a, column_a;
    pk_real alpha;
    int overwrite;
    size_t ldc;
    const size_t *c_at; /* of PK__BLOCK_ROWS rows */
} pk__block;

/* One panel, or a pair, of B as they are packed, or where they stand. */
typedef struct pk__pair {
    size_t count;
    const pk_real *panel[2];
    size_t step; /* PK_PANEL: as they are packed */
} pk__pair;

/* target = terms of rows from row `top` of the block on, times a pair. */
static void pk__pair_rows(const pk__block *block, const pk__pair *pair, size_t top, size_t rows,
                          const pk__tile_target *target)
{
    const pk_real *a = block->a + top * block->row_a;
    const pk__panels side = {pair->count, pair->panel[0], pair->step, PK_PANEL, 0};
    if (pair->step == PK_PANEL)
        pk__pair_product(rows, block->depth, a, block->row_a, block->column_a, pair->count, pair->panel,
                         target);
    else
        pk__panel_product(rows, block->depth, a, block->row_a, block->column_a, &side, NULL, target);
}

/* C = or += alpha times the product of a block with a pair, which is made apart: where C does not have its columns in full,
 * where alpha is not 1, or where C is transposed. */
PK__NOINLINE static void pk__strip_apart(const pk__block *block, const pk__pair *pair, size_t columns,
                                         int transposed, pk_real *c)
{
    PK__ALIGNED pk_real tile[PK__APART_ROWS * PK__PAIR];
    size_t tile_at[PK__APART_ROWS];
    const pk__tile_target target = {PK__TILE_SET, tile, tile_at, NULL, NULL, 0};
    const size_t down = transposed ? 1 : block->ldc, along = transposed ? block->ldc : 1;
    for (size_t i = 0; i < pk__min(block->rows, PK__APART_ROWS); i++)
        tile_at[i] = i * PK__PAIR;
    for (size_t top = 0; top < block->rows; top += PK__APART_ROWS) {
        const size_t rows = pk__min(block->rows - top, PK__APART_ROWS);
        pk_real *to = c + top * down;
        pk__pair_rows(block, pair, top, rows, &target);
        if (transposed)
            for (size_t q = 0; q < columns; q++)
                for (size_t i = 0; i < rows; i++)
                    to[i + q * along] =
                        (block->overwrite ? 0 : to[i + q * along]) + block->alpha * tile[i * PK__PAIR + q];
        else
            for (size_t i = 0; i < rows; i++)
                for (size_t q = 0; q < columns; q++)
                    to[i * down + q] =
                        (block->overwrite ? 0 : to[i * down + q]) + block->alpha * tile[i * PK__PAIR + q];
    }
}

/* The product of a block with a pair. */
static void pk__strip_product(const pk__block *block, const pk__pair *pair, size_t columns, int transposed,
                              pk_real *c)
{
    if (columns % PK_PANEL || block->alpha != 1 || transposed) {
        pk__strip_apart(block, pair, columns, transposed, c);
        return;
    }
    pk__tile_target target = {block->overwrite ? PK__TILE_SET : PK__TILE_ADD, c, block->c_at, NULL, NULL, 0};
    for (size_t top = 0; top < block->rows; top += PK__BLOCK_ROWS) {
        target.to = c + top * block->ldc;
        pk__pair_rows(block, pair, top, pk__min(block->rows - top, PK__BLOCK_ROWS), &target);
    }
}

/* The same with columns of B that are copied first: the first panel, */
PK__NOINLINE static void pk__strip_packed(const pk__block *block, const pk_real *b, size_t row_b,
                                          size_t column_b, size_t columns, const pk_real *beside,
                                          int transposed, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    const pk__pair pair = {pk__blocks(columns, PK_PANEL), {packed, beside}, PK_PANEL};
    pk__pack_panel(pk__min(columns, PK_PANEL), block->depth, b, row_b, column_b, packed);
    pk__strip_product(block, &pair, columns, transposed, c);
}

/* and the second one before it. */
PK__NOINLINE static void pk__strip_pair(const pk__block *block, const pk_real *b, size_t row_b, size_t column_b,
                                        size_t columns, int transposed, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    pk__pack_panel(columns - PK_PANEL, block->depth, b + PK_PANEL * column_b, row_b, column_b, packed);
    pk__strip_packed(block, b, row_b, column_b, columns, packed, transposed, c);
}

/* C += alpha A B^T of few rows: B is read where it stands, once for each pair of panels, and only the few rows of A are
 * packed. The same terms in the same order as below. */
static void pk__few_rows_product(size_t m, size_t n, size_t k, pk_real alpha, const pk_real *a, size_t row_a,
                                 size_t column_a, const pk_real *b, size_t ldb, int overwrite, pk_real *c,
                                 size_t ldc)
{
    const size_t most = pk__block_terms(k);
    for (size_t p = 0; p < k; p += most) {
        const pk__block block = {n, pk__min(k - p, most), b + p, ldb, 1, alpha, overwrite && p == 0, ldc, NULL};
        for (size_t top = 0; top < m; top += PK__PAIR) {
            const size_t count = pk__min(m - top, PK__PAIR);
            const pk_real *own = a + top * row_a + p * column_a;
            if (count > PK_PANEL)
                pk__strip_pair(&block, own, column_a, row_a, count, 1, c + top * ldc);
            else
                pk__strip_packed(&block, own, column_a, row_a, count, NULL, 1, c + top * ldc);
        }
    }
}

/* The product of tiles, for small matrices and where there is no BLIS. Every element of C is, whatever m, n and its
 * place, the same sum: blocks of pk__block_terms(k) terms, each added in ascending order to one accumulator. So the bits of
 * an element depend on its row of op(A), its column of op(B), k, alpha and beta only. */
static void pk__tile_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    const size_t most = pk__block_terms(k);
    size_t c_at[PK__BLOCK_ROWS];
    const size_t row_a = transpose_a ? 1 : lda, column_a = transpose_a ? lda : 1;
    const size_t row_b = transpose_b ? 1 : ldb, column_b = transpose_b ? ldb : 1;
    /* Scaled apart, so that the update is one product and one sum, in full and in partial tiles. */
    if (beta != 0 && beta != 1)
        pk__scale(m, n, beta, c, ldc);
    if (pk__has_few_rows(transpose_b, m, n)) {
        pk__few_rows_product(m, n, k, alpha, a, row_a, column_a, b, ldb, beta == 0, c, ldc);
        return;
    }
    for (size_t i = 0; i < pk__min(m, PK__BLOCK_ROWS); i++)
        c_at[i] = i * ldc;
    /* Rows of B that are used a few times are read where they are. */
    const size_t few = PK__HAS_AVX512 && k * row_b <= PK__FEW_NUMBERS ? PK__BLOCK_ROWS / 2 : 2 * PK__TALLEST;
    for (size_t top = 0; top < m; top += PK__STRIP_ROWS)
        for (size_t p = 0; p < k; p += most) {
            const pk__block block = {pk__min(m - top, PK__STRIP_ROWS),
                                     pk__min(k - p, most),
                                     a + top * row_a + p * column_a,
                                     row_a,
                                     column_a,
                                     alpha,
                                     beta == 0 && p == 0,
                                     ldc,
                                     c_at};
            for (size_t j = 0; j < n; j += PK__PAIR) {
                const size_t columns = pk__min(n - j, PK__PAIR);
                const pk_real *own = b + p * row_b + j * column_b;
                const pk__pair pair = {pk__blocks(columns, PK_PANEL), {own, NULL}, row_b};
                if (!transpose_b && columns % PK_PANEL == 0 && m <= few && row_b != PK_PANEL)
                    pk__strip_product(&block, &pair, columns, 0, c + top * ldc + j);
                else if (columns > PK_PANEL)
                    pk__strip_pair(&block, own, row_b, column_b, columns, 0, c + top * ldc + j);
                else
                    pk__strip_packed(&block, own, row_b, column_b, columns, NULL, 0, c + top * ldc + j);
            }
        }
}

#ifdef PATHKERNEL_BLIS
/* Its name for the processor. Its first question must not be this one: with BLIS_ARCH_TYPE set it would abort. */
static const char *pk__blis_name(void)
{
    bli_init();
    return bli_arch_string(bli_arch_query_id());
}

/* 1 where BLIS has kernels for this processor that use what the tiles use. 0.9.0 takes those of 2020 for the newest: on
 * Zen 4 and 5 it runs its plain C at a fifth of what the tiles do. */
static int pk__blis_has_kernels(void)
{
    static const char *const older[] = {"generic", "haswell", "zen", "zen2", "zen3", NULL};
    const char *name = pk__blis_name();
    for (size_t i = 0; older[i] && (PK__HAS_AVX512 || (PK__HAS_AVX2 && i == 0)); i++)
        if (strcmp(name, older[i]) == 0)
            return 0;
    return 1;
}

/* 1 where BLIS is faster than the tiles. */
static int pk__is_for_blis(int transpose_a, int transpose_b, size_t m, size_t n, size_t k)
{
    const int shift = transpose_b ? 0 : transpose_a ? 4 : 2;
    return m * n * k > (size_t)PK__BLIS_TERMS << shift && !pk__has_few_rows(transpose_b, m, n) &&
           pk__blis_has_kernels();
}

static void pk__blis_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                             const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                             pk_real *c, size_t ldc)
{
    /* A rntm of its own: with none, BLIS reads the environment at each call and may abort in nested regions. */
    rntm_t runtime;
    bli_rntm_init(&runtime);
    bli_rntm_set_num_threads(1, &runtime);
    /* The small-matrix path reads a transposed B in place, at 16 to 22 GF/s instead of 30 to 44 where k is small
     * or large (bench_matrix, example_major). Packing costs 15 % where few rows use B. Rows of B whose distance is a
     * multiple of 4 KiB share a cache set: 20 GF/s in place at 512 x 512, 35 packed. */
    if (transpose_b ? m >= 32 || k < 32 || k >= 384 : m >= 32 && ldb * sizeof(pk_real) % 4096 == 0)
        bli_rntm_set_pack_b(TRUE, &runtime);
    inc_t row_a = transpose_a ? 1 : (inc_t)lda, column_a = transpose_a ? (inc_t)lda : 1;
    inc_t row_b = transpose_b ? 1 : (inc_t)ldb, column_b = transpose_b ? (inc_t)ldb : 1;
#ifdef PATHKERNEL_FLOAT
    bli_rntm_disable_l3_sup(&runtime); /* 0.9.0's small sgemm reads past its operands */
    bli_sgemm_ex(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, (dim_t)m, (dim_t)n, (dim_t)k, &alpha, (pk_real *)a,
                 row_a, column_a, (pk_real *)b, row_b, column_b, &beta, c, (inc_t)ldc, 1, NULL, &runtime);
#else
    bli_dgemm_ex(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, (dim_t)m, (dim_t)n, (dim_t)k, &alpha, (pk_real *)a,
                 row_a, column_a, (pk_real *)b, row_b, column_b, &beta, c, (inc_t)ldc, 1, NULL, &runtime);
#endif
}
#endif

/* C := beta C + alpha op(A) op(B), row-major, unchecked, one thread, no allocation of ours; any of m, n and k
 * may be 0. With alpha == 0, A and B are not read. */
PK__PRIVATE void pk__gemm(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                          const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta, pk_real *c,
                          size_t ldc)
{
    if (m == 0 || n == 0)
        return;
    if (k == 0 || alpha == 0)
        pk__scale(m, n, beta, c, ldc);
#ifdef PATHKERNEL_BLIS
    else if (pk__is_for_blis(transpose_a, transpose_b, m, n, k))
        pk__blis_product(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
#endif
    else
        pk__tile_product(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

enum {
    PK__LEAST_GROUP = 4,  /* rows, */
    PK__LEAST_TERMS = 64, /* and terms: less does not pay */
    PK__GROUP_ROWS = 16,  /* a larger group is cut */
    PK__GROUPS = 16       /* for which a block of B is copied once */
};

/* term = numbers of the columns of rows (rows x columns, ld) that are not 0 in all rows; how many. */
static size_t pk__pick(size_t rows, size_t columns, const pk_real *from, size_t ld, unsigned char *term)
{
    pk_real any[PK__DEPTH];
    size_t terms = 0;
    for (size_t p = 0; p < columns; p++)
        any[p] = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t p = 0; p < columns; p++)
            any[p] += (pk_real)fabs(from[r * ld + p]);
    for (size_t p = 0; p < columns; p++) {
        term[terms] = (unsigned char)p;
        terms += any[p] != 0; /* and where it is not a number */
    }
    return terms;
}

/* 1 where rows of A (m x k) that follow one another, `group` of them, are likely to be 0 at the same terms, so many that it
 * pays to leave these out: cotangents of one example behind a ReLU. Looks at the first row of each group. */
PK__PRIVATE int pk__has_common_zeros(size_t m, size_t group, size_t k, const pk_real *a, size_t lda)
{
    size_t zeros = 0;
    if (group < PK__LEAST_GROUP || k < PK__LEAST_TERMS)
        return 0;
    for (size_t i = 0; i < m; i += group)
        for (size_t p = 0; p < k; p++)
            zeros += a[i * lda + p] == 0;
    return 4 * zeros >= m / group * k;
}

/* Rows of A (rows x k from term p on, groups of `group` rows) and the terms of each group that are meant. */
typedef struct pk__groups {
    size_t rows, group, depth;
    const pk_real *a;
    size_t lda;
    const size_t *terms;
    const unsigned char *term;
    int overwrite;
    size_t ldc;
    const size_t *at; /* of the rows of a group in C */
} pk__groups;

/* All groups with one panel or two, which are copied. */
static void pk__groups_product(const pk__groups *groups, size_t count, const pk_real *const *panels, pk_real *c)
{
    for (size_t r = 0; r < groups->rows; r += groups->group) {
        const size_t g = r / groups->group;
        pk__picked_pair(pk__min(groups->group, groups->rows - r), groups->terms[g],
                        groups->term + g * PK__DEPTH, groups->a + r * groups->lda, groups->lda, count, panels,
                        groups->overwrite, c + r * groups->ldc, groups->ldc, groups->at);
    }
}

PK__NOINLINE static void pk__groups_packed(const pk__groups *groups, const pk_real *b, size_t ldb,
                                           const pk_real *beside, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    const pk_real *const panels[2] = {packed, beside};
    pk__pack_panel(PK_PANEL, groups->depth, b, ldb, 1, packed);
    pk__groups_product(groups, beside ? 2 : 1, panels, c);
}

PK__NOINLINE static void pk__groups_pair(const pk__groups *groups, const pk_real *b, size_t ldb, pk_real *c)
{
    PK__ALIGNED pk_real packed[PK_PANEL * PK__DEPTH];
    pk__pack_panel(PK_PANEL, groups->depth, b + PK_PANEL, ldb, 1, packed);
    pk__groups_packed(groups, b, ldb, packed, c);
}

/* C = or, unless overwrite, += A B without the terms that are 0 in all rows of a group; the sums are those of the product of
 * tiles. Cost: 2 m n flops for each term that is left, and about 0.2 of that of all terms. */
PK__PRIVATE void pk__grouped_product(size_t m, size_t group, size_t n, size_t k, const pk_real *a, size_t lda,
                                     const pk_real *b, size_t ldb, int overwrite, pk_real *c, size_t ldc)
{
    unsigned char term[PK__GROUPS * PK__DEPTH];
    size_t terms[PK__GROUPS], at[PK__GROUP_ROWS];
    const size_t most = pk__block_terms(k);
    const size_t whole = n / PK_PANEL * PK_PANEL;
    group = pk__min(group, PK__GROUP_ROWS);
    for (size_t i = 0; i < group; i++)
        at[i] = i * ldc;
    for (size_t top = 0, rows; top < m; top += rows) {
        rows = pk__min(PK__GROUPS * group, m - top);
        for (size_t p = 0; p < k; p += most) {
            const size_t depth = pk__min(k - p, most);
            const pk__groups groups = {
                rows, group, depth, a + top * lda + p, lda, terms, term, overwrite && p == 0, ldc, at};
            for (size_t r = 0; r < rows; r += group)
                terms[r / group] = pk__pick(pk__min(group, rows - r), depth, groups.a + r * lda, lda,
                                            term + r / group * PK__DEPTH);
            for (size_t j = 0; j < whole; j += PK__PAIR)
                if (whole - j > PK_PANEL)
                    pk__groups_pair(&groups, b + p * ldb + j, ldb, c + top * ldc + j);
                else
                    pk__groups_packed(&groups, b + p * ldb + j, ldb, NULL, c + top * ldc + j);
        }
    }
    if (whole < n)
        pk__tile_product(0, 0, m, n - whole, k, 1, a, lda, b + whole, ldb, overwrite ? 0 : 1, c + whole, ldc);
}

PK_API pk_matrix pk_matrix_view(pk_real *data, size_t rows, size_t cols)
{
    pk_matrix view;
    view.data = data;
    view.rows = rows;
    view.cols = cols;
    view.ld = cols;
    return view;
}

/* PK_OK where the view is one that memory can hold. */
static pk_status pk__check_matrix(pk_context *context, const char *name, const pk_matrix *x)
{
    size_t items = 0;
    if (x->ld < x->cols)
        return pk__fail(context, PK_SHAPE, "matrix %s: ld %zu is smaller than its %zu columns", name, x->ld,
                        x->cols);
    if (x->rows == 0 || x->cols == 0)
        return PK_OK;
    if (!x->data)
        return pk__fail(context, PK_ARGUMENT, "matrix %s (%zu x %zu): data is NULL", name, x->rows, x->cols);
    if (!pk__multiply(x->rows, x->ld, &items) || items > SIZE_MAX / 2 / sizeof(pk_real))
        return pk__fail(context, PK_OVERFLOW, "matrix %s: %zu rows of ld %zu overflow", name, x->rows, x->ld);
    return PK_OK;
}

/* 1 where two views share an element. Exact for views of one parent (the same ld); for unrelated ld, where
 * their address ranges intersect. */
static int pk__matrices_overlap(pk_matrix x, pk_matrix y)
{
    if (x.rows == 0 || x.cols == 0 || y.rows == 0 || y.cols == 0)
        return 0;
    if ((uintptr_t)x.data > (uintptr_t)y.data) {
        pk_matrix other = x;
        x = y;
        y = other;
    }
    /* The ld of a single row means nothing. */
    if (x.rows == 1)
        x.ld = y.ld > x.cols ? y.ld : x.cols;
    if (y.rows == 1)
        y.ld = x.ld > y.cols ? x.ld : y.cols;
    size_t distance = (uintptr_t)y.data - (uintptr_t)x.data;
    if (distance >= ((x.rows - 1) * x.ld + x.cols) * sizeof(pk_real))
        return 0;
    if (x.ld != y.ld || distance % sizeof(pk_real) != 0)
        return 1;
    /* y starts on one of x's rows of ld columns: in a column of x, or beside it and then reaching, past the
     * end of that row, into x's next one. */
    size_t column = distance / sizeof(pk_real) % x.ld;
    return column < x.cols || column + y.cols > x.ld;
}

PK_API pk_status pk_matrix_multiply(pk_context *context, pk_real alpha, pk_matrix a, int transpose_a,
                                    pk_matrix b, int transpose_b, pk_real beta, pk_matrix c)
{
    const size_t m = transpose_a ? a.cols : a.rows, inner_a = transpose_a ? a.rows : a.cols;
    const size_t n = transpose_b ? b.rows : b.cols, inner_b = transpose_b ? b.cols : b.rows;
    if (inner_a != inner_b || c.rows != m || c.cols != n)
        return pk__fail(context, PK_SHAPE, "product: op(A) is %zu x %zu, op(B) %zu x %zu, C %zu x %zu", m,
                        inner_a, inner_b, n, c.rows, c.cols);
    pk_status status = pk__check_matrix(context, "A", &a);
    if (status == PK_OK)
        status = pk__check_matrix(context, "B", &b);
    if (status == PK_OK)
        status = pk__check_matrix(context, "C", &c);
    if (status != PK_OK)
        return status;
    if (pk__matrices_overlap(a, c) || pk__matrices_overlap(b, c))
        return pk__fail(context, PK_ARGUMENT, "product: C (%zu x %zu) overlaps %s", m, n,
                        pk__matrices_overlap(a, c) ? "A" : "B");
    pk__gemm(transpose_a, transpose_b, m, n, inner_a, alpha, a.data, a.ld, b.data, b.ld, beta, c.data, c.ld);
    return PK_OK;
}

PK_API void pk_matrix_backend(char *text, size_t size)
{
#ifdef PATHKERNEL_BLIS
    if (pk__blis_has_kernels())
        snprintf(text, size, "BLIS %s (%s), small products %s", bli_info_get_version_str(), pk__blis_name(),
                 pk__panel_name());
    else
        snprintf(text, size, "portable (%s), not BLIS %s (%s)", pk__panel_name(), bli_info_get_version_str(),
                 pk__blis_name());
#else
    snprintf(text, size, "portable (%s)", pk__panel_name());
#endif
}

PK__END_CODE

/* pathkernel/data/array.h: implementation */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pathkernel maps little-endian files: it needs a little-endian machine"
#endif
PK__BEGIN_COLD_CODE

/* ---- texts ---- */

/* Names in messages are the ends of paths, so that a long path never hides the sentence. */
PK__PRIVATE const char *pk__name(const char *path)
{
    size_t length = strlen(path);
    return length > 160 ? path + length - 160 : path;
}

/* "(1437, 8, 8)". Returns text. */
PK__PRIVATE const char *pk__shape_text(const pk_array *array, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < array->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i ? ", %zu" : "%zu", array->shape[i]);
    if (used < size)
        snprintf(text + used, size - used, array->rank == 1 ? ",)" : ")");
    return text;
}

/* ---- files ---- */

typedef struct pk__file {
    unsigned char *bytes; /* NULL where size is 0 */
    size_t size;
} pk__file;

/* openat; the descriptor is above those of standard input, output and error. */
PK__PRIVATE int pk__open_above(int folder, const char *path, int flags)
{
    const int file = openat(folder, path, flags | O_CLOEXEC, 0666);
    if (file < 0 || file > STDERR_FILENO)
        return file;
    const int higher = fcntl(file, F_DUPFD_CLOEXEC, STDERR_FILENO + 1), reason = errno;
    (void)close(file);
    errno = reason;
    return higher;
}

/* Opens a regular file of a folder (AT_FDCWD: of the process), and nothing else: flags as of open, with O_RDONLY or
 * O_WRONLY. What waits (a pipe) is not waited for, links are not followed to where they would be written, and the
 * descriptor is above those of standard input, output and error, also in a process where these are closed. -1 and errno;
 * *kind then names what is no file, or is NULL. */
PK__PRIVATE int pk__open_regular(int folder, const char *path, int flags, const char **kind)
{
    struct stat about;
    const int writes = (flags & O_ACCMODE) != O_RDONLY;
    int file = pk__open_above(folder, path, flags | O_NONBLOCK | O_NOCTTY | (writes ? O_NOFOLLOW : 0));
    int reason = errno, good = file >= 0;
    *kind = NULL;
    if (good && fstat(file, &about) != 0) {
        reason = errno;
        good = 0;
    } else if (good ? !S_ISREG(about.st_mode)
                    : writes && reason != EISDIR && fstatat(folder, path, &about, AT_SYMLINK_NOFOLLOW) == 0 &&
                          !S_ISREG(about.st_mode)) {
        *kind = S_ISDIR(about.st_mode)   ? "a directory"
                : S_ISLNK(about.st_mode) ? "a symbolic link"
                                         : "a device or a pipe";
        reason = good ? EINVAL : reason;
        good = 0;
    }
    if (!good && file >= 0)
        (void)close(file);
    errno = reason;
    return good ? file : -1;
}

/* The same with a message; what: "cannot be made". */
static pk_status pk__open_named(pk_context *context, const char *path, int flags, const char *what, int *file)
{
    const char *kind;
    *file = pk__open_regular(AT_FDCWD, path, flags, &kind);
    if (*file >= 0)
        return PK_OK;
    const int reason = errno;
    return kind ? pk__fail(context, PK_IO, "%s: is %s, not a file", pk__name(path), kind)
                : pk__fail(context, PK_IO, "%s: %s: %s", pk__name(path), what, strerror(reason));
}

/* Maps a whole regular file, read-only. *kept, unless kept is NULL: the descriptor. */
static pk_status pk__file_open(pk_context *context, const char *path, pk__file *file, int *kept)
{
    const char *name = pk__name(path);
    struct stat about;
    int descriptor;
    file->bytes = NULL;
    file->size = 0;
    pk_status status = pk__open_named(context, path, O_RDONLY, "cannot be opened", &descriptor);
    if (status != PK_OK)
        return status;
    if (fstat(descriptor, &about) != 0)
        status = pk__fail(context, PK_IO, "%s: cannot be read: %s", name, strerror(errno));
    else if ((uint64_t)about.st_size > SIZE_MAX / 2)
        status = pk__fail(context, PK_OVERFLOW, "%s: too long to be mapped", name);
    else
        file->size = (size_t)about.st_size;
    if (file->size) {
        void *mapping = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (mapping == MAP_FAILED) {
            status = pk__fail(context, PK_IO, "%s: cannot be mapped: %s", name, strerror(errno));
            file->size = 0;
        } else {
            file->bytes = mapping;
        }
    }
    if (status == PK_OK && kept)
        *kept = descriptor;
    else
        (void)close(descriptor);
    return status;
}

PK__PRIVATE pk_status pk__file_map(pk_context *context, const char *path, pk__file *file)
{
    return pk__file_open(context, path, file, NULL);
}

PK__PRIVATE void pk__file_unmap(pk__file *file)
{
    if (file->bytes)
        munmap(file->bytes, file->size);
    file->bytes = NULL;
    file->size = 0;
}

/* 1, or 0 with errno set: all the bytes at offset. One call unless the system stops short. */
static int pk__write_at(int descriptor, const void *data, size_t bytes, size_t offset)
{
    const unsigned char *at = (const unsigned char *)data;
    while (bytes) {
        ssize_t written = pwrite(descriptor, at, bytes, (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0) {
            if (written == 0)
                errno = ENOSPC;
            return 0;
        }
        at += written;
        offset += (size_t)written;
        bytes -= (size_t)written;
    }
    return 1;
}

/* ---- arrays ---- */

/* By pk_type. */
static const struct pk__type {
    const char *name, *descr; /* NumPy's; the first character of descr is '<' or, for bytes, '|' */
    size_t size;
    int integer;
} pk__types[] = {{"unknown", "", 0, 0},   {"float64", "<f8", 8, 0}, {"float32", "<f4", 4, 0},
                 {"int64", "<i8", 8, 1},  {"uint8", "|u1", 1, 1},   {"int8", "|i1", 1, 1},
                 {"int16", "<i2", 2, 1},  {"int32", "<i4", 4, 1},   {"uint16", "<u2", 2, 1},
                 {"uint32", "<u4", 4, 1}, {"bool", "|b1", 1, 1}};
enum { PK__TYPES = sizeof pk__types / sizeof *pk__types };

static const struct pk__type *pk__type_of(pk_type type)
{
    return &pk__types[(unsigned)type < PK__TYPES ? (unsigned)type : 0];
}

PK_API size_t pk_type_size(pk_type type)
{
    return pk__type_of(type)->size;
}

PK_API const char *pk_type_name(pk_type type)
{
    return pk__type_of(type)->name;
}

PK_API int pk_type_is_integer(pk_type type)
{
    return pk__type_of(type)->integer;
}

/* Sets row_items and *bytes; 0 on overflow. Empty dimensions count as 1 in the check, so that every partial
 * product of the shape can be formed. */
PK__PRIVATE int pk__array_measure(pk_array *array, size_t *bytes)
{
    size_t bound = pk_type_size(array->type);
    array->row_items = 1;
    for (int i = 0; i < array->rank; i++) {
        if (!pk__multiply(bound, array->shape[i] ? array->shape[i] : 1, &bound) || bound > SIZE_MAX / 2)
            return 0;
        if (i)
            array->row_items *= array->shape[i];
    }
    *bytes = pk_type_size(array->type) * pk_array_items(array);
    return 1;
}

PK_API pk_array pk_array_view(pk_type type, int rank, const size_t *shape, const void *data)
{
    pk_array array, none;
    size_t bytes;
    memset(&none, 0, sizeof none);
    array = none;
    if (!pk_type_size(type) || rank < 0 || rank > PK_ARRAY_RANK)
        return none;
    array.type = type;
    array.rank = rank;
    for (int i = 0; i < rank; i++)
        array.shape[i] = shape[i];
    if (!pk__array_measure(&array, &bytes))
        return none;
    array.data = data;
    return array;
}

PK_API pk_array pk_array_rows(const pk_array *array, size_t first, size_t count)
{
    size_t shape[PK_ARRAY_RANK];
    memcpy(shape, array->shape, sizeof shape);
    shape[0] = count;
    const char *data = (const char *)array->data;
    size_t offset = first * array->row_items * pk_type_size(array->type);
    return pk_array_view(array->type, array->rank, shape, offset ? data + offset : data);
}

PK_API void pk_array_release(pk_context *context, pk_array *array)
{
    if (!array)
        return;
    if (array->mapping)
        munmap(array->mapping, array->mapping_bytes);
    if (array->file)
        (void)close(array->file - 1);
    pk_release(context, array->owned);
    memset(array, 0, sizeof *array);
}

PK_API size_t pk_array_length(const pk_array *array)
{
    return array->rank ? array->shape[0] : 1;
}

PK_API size_t pk_array_items(const pk_array *array)
{
    return pk_array_length(array) * array->row_items;
}

PK_API void pk_array_reals(const pk_array *array, size_t first, size_t count, pk_real *out)
{
#define PK__CONVERT(from)                                         \
    for (size_t i = 0; i < count; i++)                            \
        out[i] = (pk_real)((const from *)array->data)[first + i]; \
    break
    if (!count)
        return;
    switch (array->type) {
    case PK_FLOAT64:
        if (sizeof(pk_real) == sizeof(double)) {
            memcpy(out, (const double *)array->data + first, count * sizeof(double));
            break;
        }
        PK__CONVERT(double);
    case PK_FLOAT32: PK__CONVERT(float);
    case PK_INT64: PK__CONVERT(int64_t);
    case PK_INT32: PK__CONVERT(int32_t);
    case PK_INT16: PK__CONVERT(int16_t);
    case PK_INT8: PK__CONVERT(int8_t);
    case PK_UINT32: PK__CONVERT(uint32_t);
    case PK_UINT16: PK__CONVERT(uint16_t);
    case PK_UINT8: PK__CONVERT(uint8_t);
    case PK_BOOL: PK__CONVERT(uint8_t);
    }
#undef PK__CONVERT
}

PK_API pk_status pk_array_read(pk_context *context, const pk_array *array, size_t first, size_t count,
                               pk_real *out)
{
    if (!array->file) {
        pk_array_reals(array, first, count, out);
        return PK_OK;
    }
    double block[512];
    const size_t size = pk_type_size(array->type);
    const int direct = array->type == (sizeof(pk_real) == sizeof(double) ? PK_FLOAT64 : PK_FLOAT32);
    for (size_t done = 0; done < count;) {
        const size_t items = direct ? count - done : pk__min(count - done, sizeof block / size);
        void *to = direct ? (void *)(out + done) : (void *)block;
        for (size_t have = 0; have < items * size;) {
            const ssize_t got = pread(array->file - 1, (char *)to + have, items * size - have,
                                      (off_t)(array->file_offset + (first + done) * size + have));
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                return pk__fail(context, PK_IO, "cannot be read: %s", strerror(errno));
            if (got == 0)
                return pk__fail(context, PK_IO, "became shorter while it was read: item %zu is gone",
                                first + done);
            have += (size_t)got;
        }
        if (!direct) {
            const pk_array view = pk_array_view(array->type, 1, &items, block);
            pk_array_reals(&view, 0, items, out + done);
        }
        done += items;
    }
    return PK_OK;
}

PK_API void pk_array_integers(const pk_array *array, size_t first, size_t count, int64_t *out)
{
#define PK__CONVERT(from)                                         \
    for (size_t i = 0; i < count; i++)                            \
        out[i] = (int64_t)((const from *)array->data)[first + i]; \
    break
    if (!count)
        return;
    switch (array->type) {
    case PK_INT64: PK__CONVERT(int64_t);
    case PK_INT32: PK__CONVERT(int32_t);
    case PK_INT16: PK__CONVERT(int16_t);
    case PK_INT8: PK__CONVERT(int8_t);
    case PK_UINT32: PK__CONVERT(uint32_t);
    case PK_UINT16: PK__CONVERT(uint16_t);
    case PK_UINT8: PK__CONVERT(uint8_t);
    case PK_BOOL: PK__CONVERT(uint8_t);
    case PK_FLOAT64:
    case PK_FLOAT32: memset(out, 0, count * sizeof *out); /* not asked for */
    }
#undef PK__CONVERT
}

/* The dimensions that are not 1, of which there may be none. Returns how many. */
static int pk__proper_dims(int rank, const size_t *dims, size_t proper[PK_ARRAY_RANK])
{
    int count = 0;
    for (int i = 0; i < rank; i++)
        if (dims[i] != 1)
            proper[count++] = dims[i];
    return count;
}

PK_API pk_status pk_array_check_rows(pk_context *context, const pk_array *array, int rank, const size_t *dims,
                                     const char *name)
{
    size_t has[PK_ARRAY_RANK], takes[PK_ARRAY_RANK], items = 1, used = 0;
    char rows[200], wanted[200] = "";
    if (!array || !array->type || array->rank < 1 || rank < 0 || rank > PK_ARRAY_RANK || (rank && !dims) ||
        !name)
        return pk__fail(context, PK_ARGUMENT, "%s: no array of rows, or no shape to compare it with",
                        name ? name : "rows");
    const int count = pk__proper_dims(array->rank - 1, array->shape + 1, has);
    const int expected = pk__proper_dims(rank, dims, takes);
    for (int i = 0; i < rank; i++)
        if (!pk__multiply(items, dims[i], &items))
            items = SIZE_MAX;
    int same = count == expected || count <= 1 || expected <= 1;
    for (int i = 0; same && count == expected && i < count; i++)
        same = has[i] == takes[i];
    if (same && array->row_items == items)
        return PK_OK;
    for (int i = 0; i < rank && used < sizeof wanted; i++)
        used += (size_t)snprintf(wanted + used, sizeof wanted - used, i ? "x%zu" : "%zu", dims[i]);
    pk__shape_text(array, rows, sizeof rows);
    if (array->row_items != items)
        return pk__fail(context, PK_SHAPE, "%s has shape %s, rows of %zu numbers; the network takes %s%s%zu%s",
                        name, rows, array->row_items, rank > 1 ? wanted : "", rank > 1 ? ", which are " : "",
                        items,
                        array->rank == 1 && array->shape[0] == items ? " (one input has shape (1, ...))" : "");
    return pk__fail(context, PK_SHAPE,
                    "%s has shape %s; the network takes %s: as many numbers, but in another order of the axes",
                    name, rows, wanted);
}

/* ---- .npy headers: a Python dictionary of three entries ---- */

typedef struct pk__npy {
    const char *descr;
    size_t descr_length;
    int seen[3];                                /* descr, fortran_order, shape */
    int fortran, rank, negative, large, quoted; /* rank may exceed PK_ARRAY_RANK */
    size_t shape[PK_ARRAY_RANK];
} pk__npy;

typedef struct pk__cursor {
    const char *at, *end;
} pk__cursor;

/* The next character that is no space, which stays; 0 at the end. */
static char pk__peek(pk__cursor *text)
{
    while (text->at < text->end &&
           (*text->at == ' ' || *text->at == '\n' || *text->at == '\t' || *text->at == '\r'))
        text->at++;
    return text->at < text->end ? *text->at : (char)0;
}

static int pk__take(pk__cursor *text, char wanted)
{
    if (wanted == 0 || pk__peek(text) != wanted)
        return 0;
    text->at++;
    return 1;
}

static int pk__take_word(pk__cursor *text, const char *word)
{
    size_t length = strlen(word);
    pk__peek(text);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length) != 0)
        return 0;
    text->at += length;
    return 1;
}

static int pk__take_string(pk__cursor *text, const char **string, size_t *length)
{
    char quote = pk__peek(text);
    if (quote != '\'' && quote != '"')
        return 0;
    const char *start = ++text->at;
    while (text->at < text->end && *text->at != quote)
        text->at++;
    if (text->at == text->end)
        return 0;
    *string = start;
    *length = (size_t)(text->at++ - start);
    return 1;
}

/* partial: the number of rows, which is not believed then, may be half replaced by a longer one: "1 99". */
static int pk__take_shape(pk__cursor *text, int partial, pk__npy *header)
{
    if (!pk__take(text, '('))
        return 0;
    while (!pk__take(text, ')')) {
        size_t size = 0;
        const char *start;
        int negative = pk__take(text, '-');
        for (start = text->at; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
            if (size > (SIZE_MAX - 9) / 10)
                header->large = 1;
            else
                size = 10 * size + (size_t)(*text->at - '0');
        }
        if (text->at == start)
            return 0;
        for (; partial && header->rank == 0; text->at++) {
            const char next = pk__peek(text);
            if (next < '0' || next > '9')
                break;
        }
        pk__take(text, 'L'); /* Python 2's long */
        header->negative |= negative;
        if (header->rank < PK_ARRAY_RANK)
            header->shape[header->rank] = size;
        header->rank++;
        if (!pk__take(text, ',')) {
            /* (3) is a number in Python, not a tuple */
            if (header->rank == 1 || !pk__take(text, ')'))
                return 0;
            break;
        }
    }
    return 1;
}

/* 1, or 0 where the text is no such dictionary. */
static int pk__npy_dictionary(pk__cursor *text, int partial, pk__npy *header)
{
    static const char *const keys[] = {"descr", "fortran_order", "shape"};
    memset(header, 0, sizeof *header);
    if (!pk__take(text, '{'))
        return 0;
    while (!pk__take(text, '}')) {
        const char *key = NULL;
        size_t length = 0;
        int which = 0;
        if (!pk__take_string(text, &key, &length) || !pk__take(text, ':'))
            return 0;
        while (which < 3 && (strlen(keys[which]) != length || memcmp(keys[which], key, length) != 0))
            which++;
        if (which == 3 || header->seen[which]++)
            return 0;
        if (which == 2) {
            if (!pk__take_shape(text, partial, header))
                return 0;
        } else if (which == 1) {
            header->fortran = pk__take_word(text, "True");
            if (!header->fortran && !pk__take_word(text, "False"))
                return 0;
        } else if (pk__take_string(text, &header->descr, &header->descr_length)) {
            header->quoted = 1;
        } else if (pk__peek(text) == '[') { /* a structured type, not to be read but to be named */
            const char *string;
            size_t depth = 0;
            header->descr = text->at;
            do {
                char next = pk__peek(text);
                if (next == '\'' || next == '"') {
                    if (!pk__take_string(text, &string, &length))
                        return 0;
                } else if (next == 0) {
                    return 0;
                } else {
                    depth += next == '[';
                    depth -= next == ']';
                    text->at++;
                }
            } while (depth);
            header->descr_length = (size_t)(text->at - header->descr);
        } else {
            return 0;
        }
        if (!pk__take(text, ',') && pk__peek(text) != '}')
            return 0;
    }
    pk__peek(text);
    return text->at == text->end && header->seen[0] && header->seen[1] && header->seen[2];
}

static pk_type pk__npy_type(const char *descr, size_t length)
{
    for (int type = 1; length == 3 && type < PK__TYPES; type++) {
        const char *known = pk__types[type].descr;
        const int order = known[0] == '|' || descr[0] == '<' || descr[0] == '='; /* bytes have none */
        if (order && descr[1] == known[1] && descr[2] == known[2])
            return (pk_type)type;
    }
    return (pk_type)0;
}

enum { PK__NPY_LONGEST = 65535 }; /* the longest header of version 1.0 */

/* The array that the bytes of a .npy file hold, but for its data, which start at bytes[*offset]. */
PK__PRIVATE pk_status pk__npy_parse(pk_context *context, const char *name, const unsigned char *bytes,
                                    size_t size, unsigned flags, pk_array *array, size_t *offset)
{
    char text[64];
    pk__npy header;
    if (size == 0)
        return pk__fail(context, PK_FORMAT, "%s: is empty, not a .npy file", name);
    if (memcmp(bytes, "\x93NUMPY", size < 6 ? size : 6) != 0)
        return pk__fail(context, PK_FORMAT, "%s: is not a .npy file%s", name,
                        size > 3 && memcmp(bytes, "PK\3\4", 4) == 0        ? " but a .npz or zip archive"
                        : size > 1 && bytes[0] == 0x1f && bytes[1] == 0x8b ? " but compressed by gzip"
                                                                           : "");
    if (size < 12)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes", name, size);
    if (bytes[6] < 1 || bytes[6] > 3 || bytes[7] != 0)
        return pk__fail(context, PK_UNSUPPORTED, "%s: version %d.%d of .npy is not supported", name, bytes[6],
                        bytes[7]);
    size_t start = bytes[6] == 1 ? 10 : 12, length = (size_t)bytes[8] | (size_t)bytes[9] << 8;
    if (bytes[6] > 1)
        length |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
    if (length > PK__NPY_LONGEST)
        return pk__fail(context, PK_FORMAT, "%s: a header of %zu bytes is none of NumPy's", name, length);
    if (length > size - start)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes of %zu", name, size - start,
                        length);
    pk__cursor cursor = {(const char *)bytes + start, (const char *)bytes + start + length};
    if (!pk__npy_dictionary(&cursor, (flags & PK_ARRAY_PARTIAL) != 0, &header))
        return pk__fail(context, PK_FORMAT, "%s: the header is not NumPy's: %s", name,
                        pk__printable((const char *)bytes + start, length, text, sizeof text));
    pk_array found;
    memset(&found, 0, sizeof found);
    found.type = header.quoted ? pk__npy_type(header.descr, header.descr_length) : (pk_type)0;
    pk__printable(header.descr, header.descr_length, text, sizeof text);
    if (!found.type)
        return pk__fail(
            context, PK_UNSUPPORTED,
            text[0] == '>'
                ? "%s: items are big-endian ('%s'); write them little-endian"
                : "%s: items of type %s are not supported; float64, float32, bool and integers of up to "
                  "64 bits with a sign or 32 without are",
            name, text);
    if (header.rank > PK_ARRAY_RANK)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %d dimensions, more than %d", name, header.rank,
                        PK_ARRAY_RANK);
    if (header.negative)
        return pk__fail(context, PK_FORMAT, "%s: a negative dimension", name);
    found.rank = header.rank;
    int long_dimensions = 0;
    for (int i = 0; i < header.rank; i++) {
        found.shape[i] = header.shape[i];
        long_dimensions += header.shape[i] > 1;
    }
    char shape[200];
    pk__shape_text(&found, shape, sizeof shape);
    if (header.fortran && long_dimensions > 1)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %s in Fortran order; save it with np.ascontiguousarray",
                        name, shape);
    size_t expected = 0, row_bytes = 0, held = size - start - length;
    if (header.large || !pk__array_measure(&found, &expected))
        return pk__fail(context, PK_OVERFLOW, "%s: the header's shape %s overflows", name, shape);
    row_bytes = found.row_items * pk_type_size(found.type);
    if ((flags & PK_ARRAY_PARTIAL) && found.rank && row_bytes) {
        found.shape[0] = held / row_bytes;
        found.extra_bytes = held % row_bytes;
    } else if (expected != held) {
        return pk__fail(context, PK_FORMAT, "%s: %s %s takes %zu bytes, the file holds %zu", name, shape,
                        pk_type_name(found.type), expected, held);
    }
    *array = found;
    *offset = start + length;
    return PK_OK;
}

/* Writes a header of version 1.0 that fills room bytes, or with room == 0 as many as numpy.save would use for
 * an array whose first dimension is to grow. Returns the bytes, or 0 where they do not suffice. grows: the rows have the
 * same place whatever their number is, where there is room for that, so that a header that is half replaced can be
 * read. */
enum { PK__NPY_ROOM = 4096 };
static size_t pk__npy_header(const pk_array *array, size_t room, int grows, unsigned char bytes[PK__NPY_ROOM])
{
    const char *descr = pk__type_of(array->type)->descr;
    char shape[200], digits[24];
    pk__shape_text(array, shape, sizeof shape);
    if (grows) {
        const int gap = 20 - snprintf(digits, sizeof digits, "%zu", array->shape[0]);
        memmove(shape + 1 + gap, shape + 1, strlen(shape));
        memset(shape + 1, ' ', (size_t)gap);
    }
    char *text = (char *)bytes + 10;
    size_t length =
        10 + (size_t)snprintf(text, PK__NPY_ROOM - 10, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }",
                              descr, shape);
    if (!room) {
        size_t growth =
            array->rank && !grows ? 20 - (size_t)snprintf(digits, sizeof digits, "%zu", array->shape[0]) : 0;
        room = (length + growth + 1 + 63) / 64 * 64;
    }
    if (length + 1 > room && grows)
        return pk__npy_header(array, room, 0, bytes);
    if (length + 1 > room || room > PK__NPY_ROOM)
        return 0;
    memcpy(bytes, "\x93NUMPY\1", 8); /* version 1 and the 0 after it */
    bytes[8] = (unsigned char)((room - 10) & 255);
    bytes[9] = (unsigned char)((room - 10) >> 8);
    memset(bytes + length, ' ', room - length - 1);
    bytes[room - 1] = '\n';
    return room;
}

/* Brings a header of a file from old to new, writing only what differs. 0 with errno set. */
static int pk__npy_replace(int descriptor, const unsigned char *before, const unsigned char *after, size_t room)
{
    size_t first = 0, last = room;
    while (first < room && before[first] == after[first])
        first++;
    while (last > first && before[last - 1] == after[last - 1])
        last--;
    return pk__write_at(descriptor, after + first, last - first, first);
}

PK_API pk_status pk_array_map(pk_context *context, const char *path, unsigned flags, pk_array *array)
{
    if (!path || !array)
        return pk__fail(context, PK_ARGUMENT, "pk_array_map: the path or the array is NULL");
    pk__file file;
    pk_array found;
    size_t offset = 0;
    int descriptor = -1;
    pk_status status = pk__file_open(context, path, &file, flags & PK_ARRAY_KEEP_OPEN ? &descriptor : NULL);
    if (status == PK_OK)
        status = pk__npy_parse(context, pk__name(path), file.bytes, file.size, flags, &found, &offset);
    if (status == PK_OK && offset % pk_type_size(found.type) == 0) {
        found.data = file.bytes + offset;
        found.mapping = file.bytes;
        found.mapping_bytes = file.size;
    } else if (status == PK_OK) {
        size_t items = pk_array_items(&found), size = pk_type_size(found.type);
        status = pk_allocate(context, items, size, pk__name(path), &found.owned);
        if (status == PK_OK && items)
            memcpy(found.owned, file.bytes + offset, items * size);
        found.data = found.owned;
        pk__file_unmap(&file);
    }
    found.file = descriptor + 1;
    found.file_offset = offset;
    if (status == PK_OK) {
        *array = found;
        return PK_OK;
    }
    pk__file_unmap(&file);
    if (descriptor >= 0)
        (void)close(descriptor);
    return status;
}

PK_API pk_status pk_array_open(pk_context *context, const char *path, unsigned flags, pk_array *array)
{
    if (!path || !array)
        return pk__fail(context, PK_ARGUMENT, "pk_array_open: the path or the array is NULL");
    pk__file file;
    pk_array found;
    int descriptor = -1;
    size_t offset = 0;
    pk_status status = pk__file_open(context, path, &file, &descriptor);
    if (status != PK_OK)
        return status;
    status = pk__npy_parse(context, pk__name(path), file.bytes, file.size, flags, &found, &offset);
    pk__file_unmap(&file);
    if (status != PK_OK) {
        (void)close(descriptor);
        return status;
    }
    *array = found;
    array->file = descriptor + 1;
    array->file_offset = offset;
    return PK_OK;
}

/* ---- writing ---- */

PK_API pk_status pk_array_write(pk_context *context, const char *path, pk_type type, int rank,
                                const size_t *shape, const void *data)
{
    unsigned char header[PK__NPY_ROOM];
    if (!path || rank < 0 || rank > PK_ARRAY_RANK || (rank && !shape) || !pk_type_size(type))
        return pk__fail(context, PK_ARGUMENT,
                        "pk_array_write: rank %d or type %d is invalid, or a pointer is NULL", rank, (int)type);
    pk_array array = pk_array_view(type, rank, shape, data);
    if (!array.type)
        return pk__fail(context, PK_OVERFLOW, "%s: the shape overflows", pk__name(path));
    size_t bytes = pk_array_items(&array) * pk_type_size(type), room = pk__npy_header(&array, 0, 0, header);
    size_t length = strlen(path);
    if (bytes && !data)
        return pk__fail(context, PK_ARGUMENT, "%s: the data are NULL", pk__name(path));
    char *aside = NULL;
    pk_status status = pk_allocate(context, length + 5, 1, "the name of a file", &aside);
    if (status != PK_OK)
        return status;
    memcpy(aside, path, length);
    memcpy(aside + length, ".tmp", 5);
    int file;
    status = pk__open_named(context, aside, O_WRONLY | O_CREAT, "cannot be made", &file);
    if (status == PK_OK) {
        int good = ftruncate(file, 0) == 0 && pk__write_at(file, header, room, 0) &&
                   pk__write_at(file, data, bytes, room) && fsync(file) == 0,
            reason = errno;
        if (close(file) != 0 && good)
            good = 0, reason = errno;
        if (good && rename(aside, path) != 0)
            good = 0, reason = errno;
        if (!good) {
            unlink(aside);
            status = pk__fail(context, PK_IO, "%s: %zu bytes cannot be written: %s", pk__name(path),
                              room + bytes, strerror(reason));
        }
    }
    pk_release(context, aside);
    return status;
}

/* What create and reopen share: the checked shape of a writer, with no rows. */
static pk_status pk__writer_shape(pk_context *context, const char *path, pk_type type, int rank,
                                  const size_t *row_shape, pk_array_writer *writer, pk_array *array)
{
    size_t shape[PK_ARRAY_RANK] = {0};
    if (!path || !writer || rank < 1 || rank > PK_ARRAY_RANK || (rank > 1 && !row_shape) || !pk_type_size(type))
        return pk__fail(context, PK_ARGUMENT,
                        "an array to append to: rank %d or type %d is invalid, or a pointer is NULL", rank,
                        (int)type);
    for (int i = 1; i < rank; i++)
        shape[i] = row_shape[i - 1];
    *array = pk_array_view(type, rank, shape, NULL);
    if (!array->type)
        return pk__fail(context, PK_OVERFLOW, "%s: the shape of a row overflows", pk__name(path));
    if (!array->row_items)
        return pk__fail(context, PK_SHAPE, "%s: rows without items cannot be appended", pk__name(path));
    return PK_OK;
}

static void pk__writer_fill(pk_array_writer *writer, const char *path, int file, const pk_array *array,
                            size_t header_bytes)
{
    size_t length = strlen(path);
    memset(writer, 0, sizeof *writer);
    writer->rows = writer->header_rows = array->shape[0];
    writer->file = file + 1;
    writer->type = array->type;
    writer->rank = array->rank;
    memcpy(writer->shape, array->shape, sizeof writer->shape);
    writer->row_bytes = array->row_items * pk_type_size(array->type);
    writer->header_bytes = header_bytes;
    snprintf(writer->name, sizeof writer->name, "%s",
             length < sizeof writer->name ? path : path + length - (sizeof writer->name - 1));
}

PK_API pk_status pk_array_create(pk_context *context, const char *path, pk_type type, int rank,
                                 const size_t *row_shape, pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM];
    pk_array array;
    pk_status status = pk__writer_shape(context, path, type, rank, row_shape, writer, &array);
    if (status != PK_OK)
        return status;
    int file;
    status = pk__open_named(context, path, O_WRONLY | O_CREAT, "cannot be made", &file);
    if (status != PK_OK)
        return status;
    size_t room = pk__npy_header(&array, 0, 1, header);
    if (ftruncate(file, 0) != 0 || !pk__write_at(file, header, room, 0)) {
        status = pk__fail(context, PK_IO, "%s: cannot be written: %s", pk__name(path), strerror(errno));
        close(file);
        return status;
    }
    pk__writer_fill(writer, path, file, &array, room);
    return PK_OK;
}

PK_API pk_status pk_array_reopen(pk_context *context, const char *path, pk_type type, int rank,
                                 const size_t *row_shape, size_t rows, pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM], before[PK__NPY_ROOM];
    pk_array array, found;
    pk__file file;
    size_t offset = 0;
    pk_status status = pk__writer_shape(context, path, type, rank, row_shape, writer, &array);
    if (status != PK_OK)
        return status;
    const char *name = pk__name(path);
    status = pk__file_map(context, path, &file);
    if (status == PK_OK)
        status = pk__npy_parse(context, name, file.bytes, file.size, PK_ARRAY_PARTIAL, &found, &offset);
    if (status == PK_OK)
        memcpy(before, file.bytes, pk__min(offset, sizeof before));
    pk__file_unmap(&file);
    if (status != PK_OK)
        return status;
    int same = found.type == type && found.rank == rank;
    for (int i = 1; same && i < rank; i++)
        same = found.shape[i] == array.shape[i];
    array.shape[0] = rows;
    if (!same || rows > found.shape[0]) {
        char has[180], wanted[180];
        return pk__fail(context, PK_SHAPE, "%s: holds %s %s, wanted for appending: %s %s", name,
                        pk__shape_text(&found, has, sizeof has), pk_type_name(found.type),
                        pk__shape_text(&array, wanted, sizeof wanted), pk_type_name(type));
    }
    if (!pk__npy_header(&array, offset, 1, header))
        return pk__fail(context, PK_UNSUPPORTED, "%s: the header's %zu bytes leave no room for a row count",
                        name, offset);
    int descriptor;
    status = pk__open_named(context, path, O_WRONLY, "cannot be opened for writing", &descriptor);
    if (status != PK_OK)
        return status;
    /* The header first: it may lag behind the data, but never run ahead. */
    if (!pk__npy_replace(descriptor, before, header, offset) ||
        ftruncate(descriptor, (off_t)(offset + rows * array.row_items * pk_type_size(type))) != 0) {
        status = pk__fail(context, PK_IO, "%s: cannot be cut to %zu rows: %s", name, rows, strerror(errno));
        close(descriptor);
        return status;
    }
    pk__writer_fill(writer, path, descriptor, &array, offset);
    return PK_OK;
}

/* The row count into the header; 0 with errno set. */
static int pk__writer_header(pk_array_writer *writer)
{
    unsigned char header[PK__NPY_ROOM], before[PK__NPY_ROOM];
    if (writer->header_rows == writer->rows)
        return 1;
    writer->shape[0] = writer->rows;
    pk_array array = pk_array_view(writer->type, writer->rank, writer->shape, NULL), old = array;
    old.shape[0] = writer->header_rows;
    errno = EFBIG;
    if (!pk__npy_header(&array, writer->header_bytes, 1, header) ||
        !pk__npy_header(&old, writer->header_bytes, 1, before) ||
        !pk__npy_replace(writer->file - 1, before, header, writer->header_bytes))
        return 0;
    writer->header_rows = writer->rows;
    return 1;
}

PK_API pk_status pk_array_append(pk_context *context, pk_array_writer *writer, size_t rows, const void *data)
{
    size_t bytes = 0;
    if (!writer || !writer->file || (rows && !data))
        return pk__fail(context, PK_ARGUMENT, "pk_array_append: the writer is closed, or a pointer is NULL");
    size_t end = writer->header_bytes + writer->rows * writer->row_bytes;
    if (!pk__multiply(rows, writer->row_bytes, &bytes) || bytes > SIZE_MAX / 2 - end)
        return pk__fail(context, PK_OVERFLOW, "%s: %zu rows overflow", writer->name, rows);
    if (!pk__write_at(writer->file - 1, data, bytes, end)) {
        int reason = errno;
        int undone = ftruncate(writer->file - 1, (off_t)end) == 0;
        return pk__fail(context, PK_IO, "%s: %zu rows of %zu bytes cannot be appended to %zu%s: %s",
                        writer->name, rows, writer->row_bytes, writer->rows, undone ? "" : " nor cut off",
                        strerror(reason));
    }
    writer->rows += rows;
    /* The rows are safe; a header that cannot be written now may lag, and flush will tell. */
    if (++writer->appends % 256 == 0)
        (void)pk__writer_header(writer);
    return PK_OK;
}

PK_API pk_status pk_array_flush(pk_context *context, pk_array_writer *writer)
{
    if (!writer || !writer->file)
        return pk__fail(context, PK_ARGUMENT, "pk_array_flush: the writer is closed or NULL");
    if (!pk__writer_header(writer))
        return pk__fail(context, PK_IO, "%s: the header cannot be written: %s", writer->name, strerror(errno));
    return PK_OK;
}

PK_API pk_status pk_array_close(pk_context *context, pk_array_writer *writer)
{
    if (!writer || !writer->file)
        return PK_OK;
    pk_status status = pk_array_flush(context, writer);
    if (close(writer->file - 1) != 0 && status == PK_OK)
        status = pk__fail(context, PK_IO, "%s: cannot be closed: %s", writer->name, strerror(errno));
    memset(writer, 0, sizeof *writer);
    return status;
}

PK__END_COLD_CODE

/* pathkernel/data/dataset.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- examples ---- */

PK_API size_t pk_dataset_examples(const pk_dataset *dataset)
{
    return pk_array_length(&dataset->inputs);
}

PK_API size_t pk_dataset_width(const pk_dataset *dataset)
{
    return dataset->inputs.row_items;
}

PK_API void pk_dataset_inputs(const pk_dataset *dataset, const int64_t *items, size_t count, pk_real *rows)
{
    size_t width = dataset->inputs.row_items;
    for (size_t i = 0; i < count; i++)
        pk_array_reals(&dataset->inputs, (size_t)items[i] * width, width, rows + i * width);
}

/* Whether the targets are one integer for each example: a class, or the number that a single output is to give. */
PK__PRIVATE int pk__is_labels(const pk_array *targets)
{
    return targets->rank == 1 && pk_type_is_integer(targets->type);
}

/* Whether targets have the shape of labels or of as many numbers as there are outputs. A column of integers could be
 * either, and is neither. */
PK__PRIVATE int pk__fit_outputs(const pk_array *targets, size_t outputs)
{
    const int column = targets->rank == 2 && targets->shape[1] == 1 && pk_type_is_integer(targets->type);
    return pk__is_labels(targets) || (targets->rank <= 2 && targets->row_items == outputs && !column);
}

/* The label of a row. */
PK__PRIVATE int64_t pk__label(const pk_array *targets, size_t row)
{
    int64_t label = 0;
    if (targets->type == PK_INT64)
        return ((const int64_t *)targets->data)[row];
    pk_array_integers(targets, row, 1, &label);
    return label;
}

/* The index of the first item that is no finite pk_real; the number of items where all are. */
static size_t pk__first_not_finite(const pk_array *array)
{
    enum { BLOCK = 4096 };
    const double *doubles = (const double *)array->data;
    const float *floats = (const float *)array->data;
    size_t items = pk_array_items(array), i, start;
    if (array->type != PK_FLOAT64 && array->type != PK_FLOAT32)
        return items;
    for (start = 0; start < items; start += BLOCK) {
        size_t end = pk__min(items, start + BLOCK);
        int bad = 0; /* without an exit in the loops, they become vectors */
        if (array->type == PK_FLOAT64)
            for (i = start; i < end; i++)
                bad |= !pk__finite((double)(pk_real)doubles[i]);
        else
            for (i = start; i < end; i++)
                bad |= !pk__finite((double)floats[i]);
        for (i = start; bad && i < end; i++)
            if (!pk__finite(array->type == PK_FLOAT64 ? (double)(pk_real)doubles[i] : (double)floats[i]))
                return i;
    }
    return items;
}

static pk_status pk__check_finite(pk_context *context, const char *name, const pk_array *array)
{
    size_t i = pk__first_not_finite(array);
    return i == pk_array_items(array)
               ? PK_OK
               : pk__fail(context, PK_NOT_FINITE, "%s: row %zu, number %zu is not finite", name,
                          i / array->row_items, i % array->row_items);
}

/* Whether targets have one row for each input and as many finite numbers in it as a network has outputs. */
PK__PRIVATE pk_status pk__dataset_check_targets(pk_context *context, const pk_dataset *dataset, size_t outputs)
{
    char has[200], also[200];
    if (!dataset || !dataset->inputs.type || !dataset->targets.type)
        return pk__fail(context, PK_ARGUMENT, "a data set has no inputs or no targets");
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = pk_array_length(inputs);
    pk__shape_text(inputs, has, sizeof has);
    pk__shape_text(targets, also, sizeof also);
    if (!inputs->rank || !targets->rank || pk_array_length(targets) != examples)
        return pk__fail(context, PK_SHAPE, "inputs %s and targets %s: not one target row for each input row",
                        has, also);
    if (!pk__fit_outputs(targets, outputs))
        return pk__fail(
            context, PK_SHAPE,
            "targets %s %s: the network's %zu outputs take (%zu,) integer labels or (%zu, %zu) numbers", also,
            pk_type_name(targets->type), outputs, examples, examples, outputs);
    if (pk_array_items(targets) && !targets->data)
        return pk__fail(context, PK_ARGUMENT, "targets %s: the data are NULL", also);
    return pk__check_finite(context, "targets", targets);
}

PK_API pk_status pk_dataset_check(pk_context *context, const pk_dataset *dataset, size_t input_width,
                                  size_t outputs)
{
    pk_status status = pk__dataset_check_targets(context, dataset, outputs);
    if (status != PK_OK)
        return status;
    char has[200];
    const pk_array *inputs = &dataset->inputs;
    pk__shape_text(inputs, has, sizeof has);
    if (!pk_array_length(inputs))
        return pk__fail(context, PK_SHAPE, "inputs %s: no examples", has);
    if (inputs->row_items != input_width)
        return pk__fail(context, PK_SHAPE, "inputs %s: %zu numbers an example, the network takes %zu", has,
                        inputs->row_items, input_width);
    if (pk_array_items(inputs) && !inputs->data)
        return pk__fail(context, PK_ARGUMENT, "inputs %s: the data are NULL", has);
    return pk__check_finite(context, "inputs", inputs);
}

PK_API pk_status pk_dataset_rows(pk_context *context, const pk_dataset *dataset, size_t first, size_t count,
                                 pk_dataset *rows)
{
    if (!dataset || !rows)
        return pk__fail(context, PK_ARGUMENT, "pk_dataset_rows: a data set is NULL");
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = pk_array_length(inputs);
    if (!inputs->rank || !targets->rank || pk_array_length(targets) != examples || first > examples ||
        count > examples - first)
        return pk__fail(context, PK_SHAPE, "rows %zu .. +%zu of a data set of %zu examples", first, count,
                        examples);
    pk_dataset view;
    view.inputs = pk_array_rows(inputs, first, count);
    view.targets = pk_array_rows(targets, first, count);
    *rows = view;
    return PK_OK;
}

PK_API void pk_dataset_release(pk_context *context, pk_dataset *dataset)
{
    if (!dataset)
        return;
    pk_array_release(context, &dataset->inputs);
    pk_array_release(context, &dataset->targets);
}

/* A data set's memory: inputs of the shape (shape[0], shape[1], ...), targets (shape[0],) or with columns. */
static pk_status pk__dataset_allocate(pk_context *context, int rank, const size_t *shape, pk_type target_type,
                                      size_t target_columns, pk_dataset *dataset)
{
    size_t target_shape[2] = {shape[0], target_columns}, bytes = 0;
    pk_dataset made;
    memset(&made, 0, sizeof made);
    made.inputs = pk_array_view(PK_FLOAT64, rank, shape, NULL);
    made.targets = pk_array_view(target_type, target_columns > 1 ? 2 : 1, target_shape, NULL);
    if (!made.inputs.type || !made.targets.type || !pk__array_measure(&made.inputs, &bytes))
        return pk__fail(context, PK_OVERFLOW, "a data set of %zu examples overflows", shape[0]);
    pk_status status = pk_allocate(context, bytes, 1, "the inputs of a data set", &made.inputs.owned);
    if (status == PK_OK)
        status = pk_allocate(context, pk_array_items(&made.targets), 8, "the targets of a data set",
                             &made.targets.owned);
    if (status != PK_OK) {
        pk_release(context, made.inputs.owned);
        return status;
    }
    made.inputs.data = made.inputs.owned;
    made.targets.data = made.targets.owned;
    *dataset = made;
    return PK_OK;
}

/* ---- IDX ---- */

/* A view of the bytes of an IDX file: 0, 0, type, rank, then big-endian 32-bit dimensions, then the items. */
static pk_status pk__idx_parse(pk_context *context, const char *name, const unsigned char *bytes, size_t size,
                               pk_array *array)
{
    if (size < 4 || bytes[0] || bytes[1])
        return pk__fail(context, PK_FORMAT, "%s: is not an IDX file%s", name,
                        size > 1 && bytes[0] == 0x1f && bytes[1] == 0x8b ? " but compressed by gzip; unpack it"
                                                                         : "");
    if (bytes[2] != 8)
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s: IDX items of type 0x%02x; unsigned bytes (0x08) are supported", name, bytes[2]);
    int rank = bytes[3];
    size_t shape[PK_ARRAY_RANK], start = 4 + 4 * (size_t)rank;
    if (rank < 1 || rank > PK_ARRAY_RANK)
        return pk__fail(context, PK_UNSUPPORTED, "%s: %d dimensions; 1 to %d are supported", name, rank,
                        PK_ARRAY_RANK);
    if (size < start)
        return pk__fail(context, PK_FORMAT, "%s: the header is cut off: %zu bytes of %zu", name, size, start);
    for (int i = 0; i < rank; i++) {
        const unsigned char *at = bytes + 4 + 4 * i;
        shape[i] = (size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
    }
    pk_array view = pk_array_view(PK_UINT8, rank, shape, bytes + start);
    if (!view.type)
        return pk__fail(context, PK_OVERFLOW, "%s: the header's shape overflows", name);
    if (pk_array_items(&view) != size - start) {
        char text[200];
        return pk__fail(context, PK_FORMAT, "%s: %s takes %zu bytes, the file holds %zu", name,
                        pk__shape_text(&view, text, sizeof text), pk_array_items(&view), size - start);
    }
    *array = view;
    return PK_OK;
}

/* pk_dataset_idx after its files are in memory. */
PK__PRIVATE pk_status pk__idx_dataset(pk_context *context, const char *images_name, const pk__file *images_file,
                                      const char *labels_name, const pk__file *labels_file, double scale,
                                      pk_dataset *dataset)
{
    pk_array images, labels;
    pk_status status = pk__idx_parse(context, images_name, images_file->bytes, images_file->size, &images);
    if (status == PK_OK)
        status = pk__idx_parse(context, labels_name, labels_file->bytes, labels_file->size, &labels);
    if (status != PK_OK)
        return status;
    size_t examples = images.shape[0], items = pk_array_items(&images), i;
    if (labels.rank != 1 || labels.shape[0] != examples) {
        char text[200];
        return pk__fail(context, PK_SHAPE, "%s: labels %s for %zu images", labels_name,
                        pk__shape_text(&labels, text, sizeof text), examples);
    }
    pk_dataset made;
    status = pk__dataset_allocate(context, images.rank, images.shape, PK_INT64, 1, &made);
    if (status != PK_OK)
        return status;
    double *inputs = (double *)made.inputs.owned;
    int64_t *targets = (int64_t *)made.targets.owned;
    for (i = 0; i < items; i++)
        inputs[i] = scale * ((const unsigned char *)images.data)[i];
    for (i = 0; i < examples; i++)
        targets[i] = ((const unsigned char *)labels.data)[i];
    *dataset = made;
    return PK_OK;
}

PK_API pk_status pk_dataset_idx(pk_context *context, const char *images_path, const char *labels_path,
                                double scale, pk_dataset *dataset)
{
    pk__file images = {NULL, 0}, labels = {NULL, 0};
    if (!images_path || !labels_path || !dataset || !pk__finite(scale))
        return pk__fail(context, PK_ARGUMENT,
                        "pk_dataset_idx: a pointer is NULL, or the scale %g is not finite", scale);
    pk_status status = pk__file_map(context, images_path, &images);
    if (status == PK_OK)
        status = pk__file_map(context, labels_path, &labels);
    if (status == PK_OK)
        status = pk__idx_dataset(context, pk__name(images_path), &images, pk__name(labels_path), &labels, scale,
                                 dataset);
    pk__file_unmap(&images);
    pk__file_unmap(&labels);
    return status;
}

/* ---- CSV ---- */

/* The next field of a line, without the spaces around it; the cursor moves past its comma. 1 where a comma
 * followed. quotes: a field in quotes may hold commas. */
static int pk__csv_field(pk__cursor *line, int quotes, const char **field, size_t *length)
{
    const char *start = line->at, *end;
    int quoted = 0;
    for (end = start; end < line->end && (*end != ',' || quoted); end++)
        quoted ^= quotes && *end == '"';
    line->at = end < line->end ? end + 1 : end;
    int more = end < line->end;
    while (start < end && (*start == ' ' || *start == '\t'))
        start++;
    while (start < end && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    *field = start;
    *length = (size_t)(end - start);
    return more;
}

/* The line at *at without its LF or CRLF; *at moves past it. */
static pk__cursor pk__csv_line(const char **at, const char *end)
{
    pk__cursor line = {*at, end};
    const char *feed = (const char *)memchr(*at, '\n', (size_t)(end - *at));
    if (feed)
        line.end = feed;
    *at = feed ? feed + 1 : end;
    if (line.end > line.at && line.end[-1] == '\r')
        line.end--;
    return line;
}

/* pk_dataset_csv after its file is in memory. */
PK__PRIVATE pk_status pk__csv_dataset(pk_context *context, const char *name, const char *text, size_t size,
                                      int target_columns, pk_dataset *dataset)
{
    const char *end = size ? text + size : text, *at = text, *field;
    char shown[40];
    size_t length, columns = 1, numbers = 0, line_number = 1, rows = 0, column;
    double value;
    if (size >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        at = text += 3; /* a byte order mark */
    while (end > text && (end[-1] == '\n' || end[-1] == '\r' || end[-1] == ' ' || end[-1] == '\t'))
        end--;
    if (end == text)
        return pk__fail(context, PK_FORMAT, "%s: holds no numbers", name);
    pk__cursor line = pk__csv_line(&at, end), again = line;
    for (columns = 1; pk__csv_field(&line, 0, &field, &length); columns++)
        numbers += (size_t)pk__number(field, length, &value);
    numbers += (size_t)pk__number(field, length, &value);
    if (!numbers) { /* a header */
        for (columns = 1; pk__csv_field(&again, 1, &field, &length); columns++)
            continue;
        text = at;
        line_number = 2;
    }
    size_t outputs = target_columns ? (size_t)target_columns : 1;
    if (columns <= outputs)
        return pk__fail(context, PK_FORMAT,
                        "%s: line 1 has %zu columns, there must be more than the %zu of the targets", name,
                        columns, outputs);
    /* Count first, so that memory is asked for only where the file holds as much. */
    for (at = text; at < end; rows++) {
        size_t commas = 0;
        line = pk__csv_line(&at, end);
        if (line.at == line.end)
            return pk__fail(context, PK_FORMAT, "%s: line %zu is empty", name, line_number + rows);
        for (; line.at < line.end; line.at++)
            commas += *line.at == ',';
        if (commas + 1 != columns)
            return pk__fail(context, PK_FORMAT, "%s: line %zu has %zu columns, line 1 has %zu", name,
                            line_number + rows, commas + 1, columns);
    }
    if (!rows)
        return pk__fail(context, PK_FORMAT, "%s: holds a header but no numbers", name);
    pk_dataset made;
    size_t shape[2] = {rows, columns - outputs};
    pk_status status =
        pk__dataset_allocate(context, 2, shape, target_columns ? PK_FLOAT64 : PK_INT64, outputs, &made);
    if (status != PK_OK)
        return status;
    double *inputs = (double *)made.inputs.owned, *targets = (double *)made.targets.owned;
    int64_t *labels = (int64_t *)made.targets.owned;
    for (at = text; at < end && status == PK_OK; line_number++) {
        line = pk__csv_line(&at, end);
        for (column = 0; column < columns; column++) {
            pk__csv_field(&line, 0, &field, &length);
            int good = pk__number(field, length, &value);
            if (good && column < columns - outputs)
                *inputs++ = value;
            else if (good && target_columns)
                *targets++ = value;
            else if (good && value > -9007199254740992.0 && value < 9007199254740992.0 && value == floor(value))
                *labels++ = (int64_t)value;
            else
                status = pk__fail(context, PK_FORMAT, "%s: line %zu, column %zu: '%s' is not %s", name,
                                  line_number, column + 1, pk__printable(field, length, shown, sizeof shown),
                                  good ? "an integer label" : "a finite number");
            if (status != PK_OK)
                break;
        }
    }
    if (status == PK_OK)
        *dataset = made;
    else
        pk_dataset_release(context, &made);
    return status;
}

PK_API pk_status pk_dataset_csv(pk_context *context, const char *path, int target_columns, pk_dataset *dataset)
{
    pk__file file;
    if (!path || !dataset || target_columns < 0)
        return pk__fail(context, PK_ARGUMENT,
                        "pk_dataset_csv: a pointer is NULL, or target_columns %d is negative", target_columns);
    pk_status status = pk__file_map(context, path, &file);
    if (status == PK_OK)
        status = pk__csv_dataset(context, pk__name(path), (const char *)file.bytes, file.size, target_columns,
                                 dataset);
    pk__file_unmap(&file);
    return status;
}

PK__END_CODE

/* pathkernel/network/graph.h: implementation */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- graphs ---------------------------------------------------------------------------------------- */

PK_API const char *pk_shape_text(const pk_shape *shape, char *text)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < shape->rank && i < PK_SHAPE_RANK; i++)
        used += (size_t)snprintf(text + used, PK_SHAPE_TEXT - used, i ? "x%zu" : "%zu", shape->dims[i]);
    return text;
}

/* The gradient is one outer product, of the cotangent and in[0] itself: what the factored engine takes. A single place
 * alone does not say so: its inputs may be chosen from in[0], or padded. */
PK__PRIVATE int pk__is_outer(const pk_node *node)
{
    return node->tangent_form == PK_TANGENT_OUTER && node->positions == 1 && !node->unfolds;
}

static pk_status pk__shape_width(pk_context *context, const pk_shape *shape, size_t *width)
{
    *width = 1;
    if (shape->rank < 1 || shape->rank > PK_SHAPE_RANK)
        return pk__fail(context, PK_SHAPE, "a shape has rank %d; 1 to %d are possible", shape->rank,
                        PK_SHAPE_RANK);
    for (int i = 0; i < shape->rank; i++)
        if (shape->dims[i] == 0)
            return pk__fail(context, PK_OVERFLOW, "a shape has a dimension of zero; each is at least 1");
        else if (!pk__multiply(*width, shape->dims[i], width) || *width > SIZE_MAX / 4096)
            return pk__fail(context, PK_OVERFLOW, "a shape with a dimension of %zu is too large",
                            shape->dims[i]);
    return PK_OK;
}

/* What is known of a node before it runs, see pk_node. Inputs precede it. */
static void pk__node_analyse(const pk_graph *graph, pk_node *node)
{
    const pk_operation *operation = node->operation;
    node->input_constant = 1;
    for (int j = 0; j < node->input_count; j++) {
        const pk_node *input = &graph->nodes[node->inputs[j]];
        node->input_constant &= !input->varies;
        if (input->degree < 0 || node->degree < 0)
            node->degree = -1;
        else if (input->degree > node->degree)
            node->degree = input->degree;
    }
    node->varies = !node->input_constant || node->weight_count > 0;
    if (!node->input_constant && operation->smoothness != PK_LINEAR &&
        operation->smoothness != PK_PIECEWISE_LINEAR)
        node->degree = -1;
    if (node->weight_count > 0)
        node->degree = node->degree < 0 || !operation->linear_in_weights ? -1 : node->degree + 1;
}

static void pk__graph_analyse(pk_graph *graph)
{
    size_t last = graph->node_count - 1;
    graph->switched = 0;
    graph->surrogate = 0;
    graph->checked = 0;
    graph->widest = 0;
    for (size_t n = 0; n < graph->node_count; n++) {
        pk_node *node = &graph->nodes[n];
        node->cotangent_constant = 1;
        node->unread = n != last;
        node->only_reader = -1;
        if (node->layer >= 0)
            graph->nodes[node->layer].layer_node = (int)n;
        if (node->width > graph->widest)
            graph->widest = node->width;
    }
    for (size_t n = last; n > 0; n--) {
        pk_node *node = &graph->nodes[n];
        int constant =
            node->cotangent_constant && node->operation->smoothness == PK_LINEAR && !node->weight_count;
        for (int j = 0; j < node->input_count; j++) {
            pk_node *input = &graph->nodes[node->inputs[j]];
            input->cotangent_constant &= constant;
            node->shared[j] = !input->unread;
            input->only_reader = input->unread ? (int)n : -1;
            input->unread = 0;
        }
        graph->switched |= node->operation->smoothness == PK_PIECEWISE_LINEAR && !node->input_constant;
        graph->surrogate |= node->operation->smoothness == PK_SURROGATE && !node->input_constant;
        graph->checked |= node->operation->check != NULL;
    }
    graph->output_width = graph->nodes[last].width;
    graph->degree = graph->nodes[last].degree;
}

/* Whether a node is what its operation says of it: gradients and pieces are made from that, and not from its rules. */
static pk_status pk__check_node(pk_context *context, const pk_graph *graph, const pk_node *node)
{
    const pk_operation *operation = node->operation;
    const size_t width = graph->nodes[node->inputs[0]].width;
    const int outer = node->tangent_form == PK_TANGENT_OUTER;
    const char *what = NULL;
    size_t matrix = 0, ins = 0, outs = 0;
    if (!operation->forward || !operation->tangent || !operation->reverse)
        what = "a rule for forward, tangent or reverse is missing";
    else if (node->weight_count && (node->tangent_form == PK_TANGENT_NONE || !operation->weight_gradient))
        what = "it has weights, but no tangent form or no rule for their gradient";
    else if (node->tangent_form == PK_TANGENT_ROWS && node->weight_count && !operation->row_gradients)
        what = "PK_TANGENT_ROWS needs row_gradients";
    else if (!operation->switch_count != !operation->switches)
        what = "switch_count and switches belong together";
    else if (operation->elementwise && (node->input_count != 1 || node->width != width || node->weight_count))
        what = "an elementwise operation has one input of its own width, and no weights";
    else if (outer &&
             (node->input_count != 1 || operation->smoothness != PK_LINEAR || !operation->linear_in_weights))
        what = "PK_TANGENT_OUTER is for one input, and for what is linear in it and in the weights";
    else if (outer && node->unfolds && !operation->unfold)
        what = "its positions are unfolded, and unfold is missing";
    if (what)
        return pk__fail(context, PK_ARGUMENT, "the operation %s: %s", operation->name, what);
    if (outer && (!pk__multiply(node->fan_in, node->fan_out, &matrix) ||
                  !pk__multiply(node->positions, node->fan_in, &ins) ||
                  !pk__multiply(node->positions, node->fan_out, &outs) || outs != node->width ||
                  (!node->unfolds && ins != width) ||
                  (node->weight_count != matrix && node->weight_count - matrix != node->fan_out)))
        return pk__fail(
            context, PK_SHAPE,
            "the operation %s: %zu positions of %zu inputs and %zu outputs each do not fit its %zu inputs, "
            "%zu outputs and %zu weights",
            operation->name, node->positions, node->fan_in, node->fan_out, width, node->width,
            node->weight_count);
    return PK_OK;
}

static pk_status pk__graph_grow(pk_context *context, pk_graph *graph)
{
    if (graph->node_count < graph->node_capacity)
        return PK_OK;
    size_t capacity = graph->node_capacity ? 2 * graph->node_capacity : 16;
    pk_node *nodes = NULL;
    pk_status status = pk_allocate(context, capacity, sizeof *nodes, "the graph's nodes", &nodes);
    if (status)
        return status;
    if (graph->node_count)
        memcpy(nodes, graph->nodes, graph->node_count * sizeof *nodes);
    pk_release(context, graph->nodes);
    graph->nodes = nodes;
    graph->node_capacity = capacity;
    return PK_OK;
}

PK_API pk_status pk_graph_input(pk_context *context, pk_graph *graph, const pk_shape *shape)
{
    size_t width = 0;
    pk_status status = pk__shape_width(context, shape, &width);
    if (status)
        return status;
    if (graph->node_count)
        return pk__fail(context, PK_ARGUMENT, "the graph has an input already");
    status = pk__graph_grow(context, graph);
    if (status)
        return status;
    pk_node *node = &graph->nodes[0];
    memset(node, 0, sizeof *node);
    node->shape = *shape;
    node->width = width;
    node->layer = -1;
    node->input_constant = 1;
    graph->node_count = 1;
    graph->input_width = width;
    graph->input_shape = *shape;
    pk__graph_analyse(graph);
    return PK_OK;
}

/* The number of a blank-separated word in a list, -1 where it is none of them. */
PK__PRIVATE int pk__word_index(const char *list, const char *word)
{
    const size_t length = strlen(word);
    for (int index = 0; *list; index++) {
        const size_t own = strcspn(list, " ");
        if (own == length && memcmp(list, word, own) == 0)
            return index;
        list += own + (list[own] == ' ');
    }
    return -1;
}

/* Whether attributes are in the options' ranges. */
PK__PRIVATE pk_status pk__check_attributes(pk_context *context, const char *name, const pk_option *options,
                                           const double *attributes)
{
    for (const pk_option *option = options; option && option->name; option++) {
        const int count = option->kind == PK_OPTION_PAIR ? 2 : 1;
        for (int i = 0; i < count && option->kind != PK_OPTION_FLAG; i++) {
            const double value = attributes[option->attribute + i];
            if (option->kind == PK_OPTION_CHOICE ? value >= 0 && value < 64 && value == floor(value)
                                                 : value >= option->least && value <= option->most &&
                                                       (!option->whole || value == floor(value)))
                continue;
            if (option->kind != PK_OPTION_CHOICE && option->most >= DBL_MAX)
                return pk__fail(context, PK_ARGUMENT, "%s: %s is %g; a number %s is possible", name,
                                option->name, value,
                                option->least > 0   ? "above 0"
                                : option->least < 0 ? "that is finite"
                                                    : "from 0 on");
            return pk__fail(context, PK_ARGUMENT, "%s: %s is %g; a %snumber from %g to %g is possible", name,
                            option->name, value, option->whole ? "whole " : "", option->least, option->most);
        }
    }
    return PK_OK;
}

/* Whether a node would be checked to have the shape, and all else, of an earlier one. */
static int pk__is_alike(const pk_graph *graph, const pk_node *node, const pk_node *like)
{
    if (!like || like->operation != node->operation || like->input_count != 1 || node->input_count != 1 ||
        memcmp(like->attributes, node->attributes, sizeof like->attributes) != 0)
        return 0;
    const pk_shape *a = &graph->nodes[node->inputs[0]].shape, *b = &graph->nodes[like->inputs[0]].shape;
    return a->rank == b->rank && memcmp(a->dims, b->dims, (size_t)a->rank * sizeof *a->dims) == 0;
}

/* pk_graph_add_constants without pk__graph_analyse, which takes a time that grows with the graph. like: NULL, or an earlier
 * node that has the same constants, which are shared then. */
PK__PRIVATE pk_status pk__graph_append(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                       int input_count, const int *inputs, const double *attributes,
                                       size_t constant_count, const pk_real *constants, const pk_node *like,
                                       int *number)
{
    if (!graph->node_count || !operation)
        return pk__fail(context, PK_ARGUMENT,
                        graph->node_count ? "no operation given" : "the graph has no input yet");
    if (input_count < 1 || input_count > PK_NODE_INPUTS)
        return pk__fail(context, PK_ARGUMENT, "%s has %d inputs; 1 to %d are possible", operation->name,
                        input_count, PK_NODE_INPUTS);
    pk_node node;
    memset(&node, 0, sizeof node);
    node.operation = operation;
    node.input_count = input_count;
    node.layer = -1;
    node.tangent_form = operation->tangent_form;
    node.unfolds = operation->unfold != NULL;
    node.constants = constant_count ? (pk_real *)constants : NULL; /* only read, until it is copied */
    node.constant_count = constant_count;
    memcpy(node.attributes, attributes ? attributes : operation->defaults, sizeof node.attributes);
    for (int j = 0; j < input_count; j++) {
        if (inputs[j] < 0 || (size_t)inputs[j] >= graph->node_count)
            return pk__fail(context, PK_ARGUMENT, "%s: input %d is node %d of a graph with %zu nodes",
                            operation->name, j, inputs[j], graph->node_count);
        node.inputs[j] = inputs[j];
    }
    pk_status status = pk__check_attributes(context, operation->name, operation->options, node.attributes);
    node.shape = graph->nodes[node.inputs[0]].shape;
    node.constants_shared = like != NULL;
    if (!status && pk__is_alike(graph, &node, like))
        node.shape = like->shape;
    else if (!status && operation->shape)
        status = operation->shape(context, graph, &node);
    if (!status)
        status = pk__shape_width(context, &node.shape, &node.width);
    node.unfolds &= node.tangent_form == PK_TANGENT_OUTER;
    if (node.tangent_form == PK_TANGENT_OUTER && !node.positions) {
        node.positions = 1;
        node.fan_in = graph->nodes[node.inputs[0]].width;
        node.fan_out = node.width;
    }
    if (!status)
        status = pk__check_node(context, graph, &node);
    if (!status)
        status = pk__graph_grow(context, graph);
    if (!status && node.weight_count > SIZE_MAX / 4096 - graph->parameters)
        status = pk__fail(context, PK_OVERFLOW, "%s: the number of parameters overflows", operation->name);
    if (!status && constant_count && !like) {
        status = pk_allocate(context, constant_count, sizeof *constants, "a node's constants", &node.constants);
        if (!status)
            memcpy(node.constants, constants, constant_count * sizeof *constants);
    }
    if (status)
        return status;
    if (node.weight_count) {
        node.layer = (int)graph->layers++;
        node.weight_offset = graph->parameters;
        graph->parameters += node.weight_count;
    }
    pk__node_analyse(graph, &node);
    if (number)
        *number = (int)graph->node_count;
    graph->nodes[graph->node_count++] = node;
    return PK_OK;
}

PK_API pk_status pk_graph_add_constants(pk_context *context, pk_graph *graph, const pk_operation *operation,
                                        int input_count, const int *inputs, const double *attributes,
                                        size_t constant_count, const pk_real *constants, int *number)
{
    pk_status status = pk__graph_append(context, graph, operation, input_count, inputs, attributes,
                                        constant_count, constants, NULL, number);
    if (!status)
        pk__graph_analyse(graph);
    return status;
}

PK_API pk_status pk_graph_add(pk_context *context, pk_graph *graph, const pk_operation *operation,
                              int input_count, const int *inputs, const double *attributes, int *number)
{
    return pk_graph_add_constants(context, graph, operation, input_count, inputs, attributes, 0, NULL, number);
}

PK_API pk_status pk_graph_check_inputs(pk_context *context, const pk_graph *graph, size_t row,
                                       const pk_real *inputs)
{
    for (size_t n = 1; graph->checked && n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        int data = 0;
        for (int j = 0; j < node->input_count; j++)
            data |= node->inputs[j] == 0;
        if (!node->operation->check || !data)
            continue;
        pk_status status = node->operation->check(context, node, row, inputs);
        if (status)
            return status;
    }
    return PK_OK;
}

PK_API const pk_node *pk_graph_layer(const pk_graph *graph, size_t layer)
{
    return layer < graph->layers ? &graph->nodes[graph->nodes[layer].layer_node] : NULL;
}

PK_API void pk_graph_release(pk_context *context, pk_graph *graph)
{
    for (size_t n = 0; n < graph->node_count; n++)
        if (!graph->nodes[n].constants_shared)
            pk_release(context, graph->nodes[n].constants);
    pk_release(context, graph->nodes);
    pk_release(context, graph->text);
    memset(graph, 0, sizeof *graph);
}

PK__END_COLD_CODE

/* pathkernel/network/pass.h: implementation */
#include <string.h>
PK__BEGIN_CODE

enum {
    PK__MANY_POSITIONS = 16,
    PK__MANY_COTANGENTS = 8,   /* of a row of the line, for a layer's weights, */
    PK__FEW_WEIGHTS = 1 << 14, /* that stay in the cache: so many at most */
    PK__TRANSPOSED = 1 << 16   /* parameters of a network whose matrices are transposed */
};

/* Each row gets weights of its own: the operation is not linear in them, or uses them at so many places that to make
 * them costs less than a second product. */
static int pk__has_row_weights(const pk_node *node)
{
    return node->weight_count &&
           (!node->operation->linear_in_weights || node->positions >= (size_t)PK__MANY_POSITIONS);
}

/* The same in reverse, where a row has as many cotangents as there are copies. */
static int pk__reverses_by_row(const pk_node *node, size_t copies)
{
    return pk__has_row_weights(node) ||
           (node->weight_count && node->weight_count <= (size_t)PK__FEW_WEIGHTS && !node->input_constant &&
            node->positions * copies >= (size_t)PK__MANY_COTANGENTS);
}

/* The same matrix for all rows, times the values of each place: y = w x, and perhaps plus a bias. */
static int pk__is_plain_layer(const pk_node *node)
{
    return node->tangent_form == PK_TANGENT_OUTER && !node->unfolds && !node->operation->channels_first &&
           !pk__has_row_weights(node);
}

/* A bias behind the matrix. */
PK__PRIVATE int pk__has_bias(const pk_node *node)
{
    return node->weight_count > node->fan_out * node->fan_in;
}

PK__INTERNAL int pk__pass_transposes(const pk_graph *graph)
{
    int some = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        some |= pk__is_plain_layer(&graph->nodes[n]);
    return some && graph->parameters <= (size_t)PK__TRANSPOSED;
}

PK__INTERNAL void pk__pass_transpose(const pk_graph *graph, const pk_real *weights, pk_real *transposed)
{
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (pk__is_plain_layer(node))
            pk__transpose(node->fan_out, node->fan_in, weights + node->weight_offset,
                          transposed + node->weight_offset, node->fan_out);
    }
}

/* The only node that reads node, NULL where there are none or several. */
PK__PRIVATE const pk_node *pk__only_reader(const pk_graph *graph, const pk_node *node)
{
    return node->only_reader < 0 ? NULL : &graph->nodes[node->only_reader];
}

/* in_place: see pk__pass_take_parts. */
static void pk__pass_layout(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                            size_t copies, int tangents, int in_place, pk__tape *tape)
{
    size_t count = graph->node_count, scratch = 0, line = 0, weights = 0, both = reverse_rows, all = 0;
    memset(tape, 0, sizeof *tape);
    tape->graph = graph;
    tape->rows = rows;
    tape->copies = copies;
    if (!pk__multiply(reverse_rows, copies > 1 ? copies : 1, &both) ||
        !pk__multiply(pk__max(rows, both), graph->widest, &all))
        arena->overflow = 1;
    tape->value = pk__arena_take(arena, count, sizeof *tape->value);
    tape->cotangent = copies ? pk__arena_take(arena, count, sizeof *tape->cotangent) : NULL;
    tape->tangent = tangents ? pk__arena_take(arena, count, sizeof *tape->tangent) : NULL;
    for (size_t n = 0; n < count && !arena->overflow; n++) {
        const pk_node *node = &graph->nodes[n];
        const size_t bytes = node->width * sizeof(pk_real);
        /* The input's value belongs to the caller: no room for it. */
        pk_real *value = n ? pk__arena_take(arena, rows, bytes) : NULL;
        const pk_node *input = n ? &graph->nodes[node->inputs[0]] : NULL;
        const int shared = in_place && n && n + 1 < count && node->operation->elementwise &&
                           pk__only_reader(graph, input) == node;
        pk_real *cotangent = NULL;
        if (shared && tape->cotangent)
            cotangent = tape->cotangent[node->inputs[0]];
        else if (copies && (node->varies || n + 1 == count) && !shared) /* the output's is the seed, always */
            cotangent = pk__arena_take(arena, both, bytes);
        pk_real *tangent = tangents && node->varies ? pk__arena_take(arena, rows, bytes) : NULL;
        if (tape->value)
            tape->value[n] = value;
        if (tape->cotangent)
            tape->cotangent[n] = cotangent;
        if (tape->tangent)
            tape->tangent[n] = tangent;
        if (n && node->operation->scratch && node->operation->scratch(node, rows, copies) > scratch)
            scratch = node->operation->scratch(node, rows, copies);
        if (node->unfolds)
            scratch = pk__max(scratch, node->positions * node->fan_in);
        if (node->weight_count)
            line = pk__max(line, pk__max(rows, both) * node->width);
        if (n && pk__is_plain_layer(node) && !node->input_constant)
            line = pk__max(line, rows * node->positions * node->fan_in);
        if (pk__reverses_by_row(node, copies))
            weights = pk__max(weights, node->weight_count);
    }
    tape->scratch = pk__arena_take(arena, scratch, sizeof(pk_real));
    tape->line_scratch = pk__arena_take(arena, line, sizeof(pk_real));
    tape->row_weights = pk__arena_take(arena, weights, sizeof(pk_real));
}

PK__INTERNAL void pk__pass_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t copies,
                                int tangents, pk__tape *tape)
{
    pk__pass_layout(arena, graph, rows, rows, copies, tangents, 0, tape);
}

PK__INTERNAL void pk__pass_take_parts(pk__arena *arena, const pk_graph *graph, size_t rows, size_t reverse_rows,
                                      size_t copies, int tangents, pk__tape *tape)
{
    pk__pass_layout(arena, graph, rows, reverse_rows, copies, tangents, 1, tape);
}

PK__INTERNAL pk_real *pk__pass_output(const pk__tape *tape)
{
    return tape->value[tape->graph->node_count - 1];
}

PK__INTERNAL pk_real *pk__pass_seed(const pk__tape *tape)
{
    return tape->cotangent[tape->graph->node_count - 1];
}

PK__INTERNAL void pk__pass_seed_units(pk__tape *tape, size_t rows)
{
    const size_t outputs = tape->graph->output_width;
    pk_real *seed = pk__pass_seed(tape);
    memset(seed, 0, rows * outputs * outputs * sizeof *seed);
    for (size_t i = 0; i < rows * outputs; i++)
        seed[i * outputs + i % outputs] = 1;
    tape->unit_seeds = 1;
}

PK__PRIVATE void pk__pass_call(const pk__tape *tape, const pk_node *node, size_t rows, size_t copies,
                               pk_call *call)
{
    memset(call, 0, sizeof *call);
    call->node = node;
    call->rows = rows;
    call->copies = copies;
    call->threads = tape->threads;
    call->context = tape->context;
    call->scratch = tape->scratch;
    call->out = tape->value[node - tape->graph->nodes];
    for (int j = 0; j < node->input_count; j++) {
        call->in[j] = tape->value[node->inputs[j]];
        call->in_width[j] = tape->graph->nodes[node->inputs[j]].width;
    }
}

/* out[row] (+)= t[row] add[row]; each row has count numbers. */
static void pk__scale_rows(size_t rows, size_t count, const pk_real *t, const pk_real *add, int accumulate,
                           pk_real *out)
{
    for (size_t row = 0; row < rows; row++) {
        const pk_real *from = add + row * count;
        pk_real *to = out + row * count;
        if (accumulate)
            for (size_t j = 0; j < count; j++)
                to[j] += t[row] * from[j];
        else
            for (size_t j = 0; j < count; j++)
                to[j] = t[row] * from[j];
    }
}

#define PK__DEFINE_LINE(suffix, attributes, vectors)                                                   \
    attributes static void pk__at_##suffix(size_t count, const pk_real *weights, pk_real t,            \
                                           const pk_real *direction, pk_real *to)                      \
    {                                                                                                  \
        typedef vectors vector;                                                                        \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                      \
        const vector zero = {0};                                                                       \
        size_t i = 0;                                                                                  \
        for (; i + lanes <= count; i += lanes) {                                                       \
            vector sum = zero;                                                                         \
            if (weights)                                                                               \
                sum = *(const vector *)(weights + i);                                                  \
            *(vector *)(to + i) = PK__ADD_##suffix(sum, (t - zero), *(const vector *)(direction + i)); \
        }                                                                                              \
        for (; i < count; i++)                                                                         \
            to[i] = (weights ? weights[i] : 0) + t * direction[i];                                     \
    }
PK__FOR_PROCESSORS(PK__DEFINE_LINE)

/* to = weights + t direction of count numbers; weights NULL: 0. */
static void pk__line_point(size_t count, const pk_real *weights, pk_real t, const pk_real *direction,
                           pk_real *to)
{
    PK__ON_PROCESSOR(pk__at, (count, weights, t, direction, to));
}

/* to = the numbers offset ... of w + t d at row row of the line. */
static void pk__line_weights(const pk__line *line, size_t row, size_t offset, size_t count, pk_real *to)
{
    const pk_real *weights = line->weights + offset;
    if (!line->direction) {
        memcpy(to, weights, count * sizeof *to);
        return;
    }
    pk__line_point(count, weights, line->t[row], line->direction + offset, to);
}

/* A node's weights at row row of the line; until the next call. */
PK__PRIVATE const pk_real *pk__row_weights(const pk__tape *tape, const pk__line *line, const pk_node *node,
                                           size_t row)
{
    if (!line->direction)
        return line->weights + node->weight_offset;
    pk__line_weights(line, row, node->weight_offset, node->weight_count, tape->row_weights);
    return tape->row_weights;
}

/* gradient[row][copy][weight] = (dF/dw)^T out_cotangent of a node with weights. */
PK__PRIVATE void pk__node_row_gradients(const pk_call *call)
{
    const pk_node *node = call->node;
    if (node->tangent_form != PK_TANGENT_OUTER) {
        node->operation->row_gradients(call);
        return;
    }
    const size_t positions = node->positions, in = node->fan_in, out = node->fan_out;
    const int first = node->operation->channels_first;
    for (size_t row = 0; row < call->rows; row++) {
        pk_call one = *call;
        one.rows = 1;
        one.in[0] = call->in[0] + row * call->in_width[0];
        one.out = call->scratch;
        if (node->unfolds)
            node->operation->unfold(&one);
        const pk_real *places = node->unfolds ? one.out : one.in[0];
        for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
            const pk_real *delta = call->out_cotangent + copy * node->width;
            pk_real *gradient = call->gradient + copy * node->weight_count, *bias = gradient + out * in;
            if (positions == 1) /* one outer product: a matrix product would cost three times as much */
                for (size_t j = 0; j < out; j++)
                    for (size_t k = 0; k < in; k++)
                        gradient[j * in + k] = delta[j] * places[k];
            else
                pk__gemm(!first, 0, out, in, positions, 1, delta, first ? positions : out, places, in, 0,
                         gradient, in);
            for (size_t j = 0; node->weight_count > out * in && j < out; j++) {
                bias[j] = 0;
                for (size_t q = 0; q < positions; q++)
                    bias[j] += first ? delta[j * positions + q] : delta[q * out + j];
            }
        }
    }
}

/* out = or, with beta == 1, += w x of a layer at so many places. transposed: w's, or NULL; only plain layers are in it. */
PK__PRIVATE void pk__layer_product(const pk_node *node, size_t places, const pk_real *x, const pk_real *w,
                                   const pk_real *transposed, pk_real beta, pk_real *out)
{
    const size_t fan_in = node->fan_in, fan_out = node->fan_out;
    if (transposed && pk__is_plain_layer(node)) /* of few rows, twice as fast as below */
        pk__gemm(0, 0, places, fan_out, fan_in, 1, x, fan_in, transposed + node->weight_offset, fan_out, beta,
                 out, fan_out);
    else
        pk__gemm(0, 1, places, fan_out, fan_in, 1, x, fan_in, w + node->weight_offset, fan_in, beta, out,
                 fan_out);
}

/* out = the values (or tangents) of a plain layer y = (w + t d) x + b + t c with the weights w, b along the direction d, c:
 *     y = w x + d (t x) + b + t c,    y. = w x. + d (x + t x.) + c,
 * so that one sum takes both products. */
static void pk__line_layer(const pk__tape *tape, const pk__line *line, const pk_call *call, int tangent)
{
    const pk_node *node = call->node;
    const size_t in = node->fan_in, out = node->fan_out, positions = node->positions,
                 places = call->rows * positions;
    const int bias = pk__has_bias(node);
    const pk_real *b = line->weights + node->weight_offset + out * in,
                  *c = line->direction + node->weight_offset + out * in, *transposed = tape->transposed;
    const pk_real *first = tangent ? call->in_tangent[0] : call->in[0];
    pk_real *second = tape->line_scratch, *to = tangent ? call->out_tangent : call->out;
    for (size_t i = 0; i < places; i++) {
        const pk_real t = line->t[i / positions], *x = call->in[0] + i * in, *own = first + i * in;
        pk__line_point(in, tangent ? x : NULL, t, own, second + i * in);
        if (bias && tangent)
            memcpy(to + i * out, c, out * sizeof *to);
        else if (bias)
            pk__line_point(out, b, t, c, to + i * out);
    }
    pk__layer_product(node, places, first, line->weights, transposed, (pk_real)bias, to);
    pk__layer_product(node, places, second, line->direction,
                      transposed ? transposed + tape->graph->parameters : NULL, 1, to);
}

/* From unit seeds the cotangents of the inputs of a last layer y = (w + t d) a + b are its weights: no product. */
static void pk__reverse_unit_seeds(const pk__line *line, const pk_call *call)
{
    const size_t numbers = call->node->fan_out * call->node->fan_in;
    for (size_t row = 0; row < call->rows; row++)
        pk__line_weights(line, row, call->node->weight_offset, numbers, call->in_cotangent[0] + row * numbers);
}

/* Row by row, each with its own weights. */
static void pk__by_row(pk__tape *tape, const pk__line *line, const pk_call *whole,
                       void (*rule)(const pk_call *))
{
    const pk_node *node = whole->node;
    for (size_t row = 0; row < whole->rows; row++) {
        pk_call call = *whole;
        call.rows = 1;
        call.weights = pk__row_weights(tape, line, node, row);
        call.out += row * node->width;
        if (call.out_tangent)
            call.out_tangent += row * node->width;
        if (call.out_cotangent)
            call.out_cotangent += row * call.copies * node->width;
        for (int j = 0; j < node->input_count; j++) {
            call.in[j] += row * call.in_width[j];
            if (call.in_tangent[j])
                call.in_tangent[j] += row * call.in_width[j];
            if (call.in_cotangent[j])
                call.in_cotangent[j] += row * call.copies * call.in_width[j];
        }
        rule(&call);
    }
}

PK__PRIVATE void pk__node_forward(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows)
{
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = line->weights + node->weight_offset;
    int along = line->direction && node->weight_count;
    if (along && pk__is_plain_layer(node) && !node->input_constant) {
        pk__line_layer(tape, line, &call, 0);
        return;
    }
    if (along && pk__has_row_weights(node)) {
        pk__by_row(tape, line, &call, node->operation->forward);
        return;
    }
    node->operation->forward(&call);
    if (along) {
        pk_real *out = call.out;
        call.weights = line->direction + node->weight_offset;
        call.out = tape->line_scratch;
        node->operation->forward(&call);
        pk__scale_rows(rows, node->width, line->t, tape->line_scratch, 1, out);
    }
}

PK__INTERNAL void pk__pass_forward(pk__tape *tape, const pk__line *line, size_t rows, const pk_real *inputs)
{
    const pk_graph *graph = tape->graph;
    tape->value[0] = (pk_real *)inputs; /* only read */
    for (size_t n = 1; n < graph->node_count; n++)
        pk__node_forward(tape, line, &graph->nodes[n], rows);
}

PK__PRIVATE void pk__node_reverse(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows,
                                  size_t copies)
{
    const pk_graph *graph = tape->graph;
    if (node->input_constant)
        return;
    pk_call call;
    pk__pass_call(tape, node, rows, copies, &call);
    call.weights = line->weights + node->weight_offset;
    call.out_cotangent = tape->cotangent[node - graph->nodes];
    for (int j = 0; j < node->input_count; j++) {
        if (!graph->nodes[node->inputs[j]].varies)
            continue;
        call.in_cotangent[j] = tape->cotangent[node->inputs[j]];
        /* The first consumer met, which is the last in the graph, writes; the others add. */
        call.accumulate[j] = node->shared[j];
    }
    int along = line->direction && node->weight_count;
    if (tape->unit_seeds && node == &graph->nodes[graph->node_count - 1] && copies == node->fan_out &&
        pk__is_outer(node) && !call.accumulate[0]) {
        pk__reverse_unit_seeds(line, &call);
        return;
    }
    if (along && pk__reverses_by_row(node, copies)) {
        pk__by_row(tape, line, &call, node->operation->reverse);
        return;
    }
    node->operation->reverse(&call);
    if (along) {
        pk__scale_rows(rows, copies * node->width, line->t, call.out_cotangent, 0, tape->line_scratch);
        call.weights = line->direction + node->weight_offset;
        call.out_cotangent = tape->line_scratch;
        for (int j = 0; j < node->input_count; j++)
            call.accumulate[j] = 1;
        node->operation->reverse(&call);
    }
}

PK__INTERNAL void pk__pass_reverse(pk__tape *tape, const pk__line *line, size_t rows, size_t copies)
{
    tape->line = *line;
    for (size_t n = tape->graph->node_count - 1; n > 0; n--) {
        const pk_node *node = &tape->graph->nodes[n];
        if (node->unread && node->varies)
            memset(tape->cotangent[n], 0, rows * copies * node->width * sizeof(pk_real));
        pk__node_reverse(tape, line, node, rows, copies);
    }
}

PK__PRIVATE void pk__node_tangent(pk__tape *tape, const pk__line *line, const pk_node *node, size_t rows)
{
    const pk_graph *graph = tape->graph;
    if (!node->varies)
        return;
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = line->weights + node->weight_offset;
    call.direction = line->direction && node->weight_count ? line->direction + node->weight_offset : NULL;
    call.out_tangent = tape->tangent[node - graph->nodes];
    for (int j = 0; j < node->input_count; j++)
        call.in_tangent[j] = graph->nodes[node->inputs[j]].varies ? tape->tangent[node->inputs[j]] : NULL;
    if (call.direction && line->t && pk__is_plain_layer(node) && !node->input_constant) {
        pk__line_layer(tape, line, &call, 1);
        return;
    }
    if (call.direction && line->t && pk__has_row_weights(node)) {
        pk__by_row(tape, line, &call, node->operation->tangent);
        return;
    }
    node->operation->tangent(&call);
    /* dF/din at w + t d is linear in the weights, too: add its t d part. */
    if (call.direction && line->t && !node->input_constant) {
        pk_real *out = call.out_tangent;
        call.weights = call.direction;
        call.direction = NULL;
        call.out_tangent = tape->line_scratch;
        node->operation->tangent(&call);
        pk__scale_rows(rows, node->width, line->t, tape->line_scratch, 1, out);
    }
}

PK__INTERNAL void pk__pass_tangent(pk__tape *tape, const pk__line *line, size_t rows)
{
    for (size_t n = 1; n < tape->graph->node_count; n++)
        pk__node_tangent(tape, line, &tape->graph->nodes[n], rows);
}

PK__INTERNAL void pk__pass_weight_gradient(pk__tape *tape, size_t rows, pk_real *gradient)
{
    const pk_graph *graph = tape->graph;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        pk_call call;
        pk__pass_call(tape, node, rows, 1, &call);
        call.weights = tape->line.weights + node->weight_offset;
        call.out_cotangent = tape->cotangent[n];
        call.gradient = gradient + node->weight_offset;
        if (tape->line.direction && !node->operation->linear_in_weights)
            pk__by_row(tape, &tape->line, &call, node->operation->weight_gradient);
        else
            node->operation->weight_gradient(&call);
    }
}

#define PK__EVALUATE_ROWS ((size_t)64)

PK_API pk_status pk_graph_evaluate(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                   pk_matrix inputs, pk_matrix outputs)
{
    if (!graph->node_count || inputs.cols != graph->input_width || outputs.cols != graph->output_width ||
        inputs.rows != outputs.rows || inputs.ld < inputs.cols || outputs.ld < outputs.cols)
        return pk__fail(
            context, PK_SHAPE,
            "a network from %zu to %zu cannot take inputs of %zu x %zu (ld %zu) to outputs of %zu x %zu "
            "(ld %zu)",
            graph->input_width, graph->output_width, inputs.rows, inputs.cols, inputs.ld, outputs.rows,
            outputs.cols, outputs.ld);
    if (inputs.rows == 0)
        return PK_OK;
    if (!weights || !inputs.data || !outputs.data)
        return pk__fail(context, PK_ARGUMENT, "weights, inputs or outputs are NULL");
    for (size_t row = 0; graph->checked && row < inputs.rows; row++) {
        pk_status status = pk_graph_check_inputs(context, graph, row, inputs.data + row * inputs.ld);
        if (status)
            return status;
    }
    size_t blocks = pk__blocks(inputs.rows, PK__EVALUATE_ROWS);
    size_t threads = pk__min((size_t)pk_threads(context), blocks);
    pk__arena arena = {NULL, 0, 0, 0};
    pk__tape tape;
    pk__pass_take(&arena, graph, PK__EVALUATE_ROWS, 0, 0, &tape);
    pk__arena_take(&arena, PK__EVALUATE_ROWS, inputs.cols * sizeof(pk_real));
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "the memory to evaluate this network overflows");
    const size_t bytes = arena.used;
    unsigned char *memory = NULL;
    pk_status status = pk_allocate(context, threads, bytes, "evaluating the network", &memory);
    if (status)
        return status;
    const pk__line line = {weights, NULL, NULL};
    pk__team team = pk__team_of(context, (int)threads, blocks);
    PK__PARALLEL(team)
    for (size_t block = pk__first_task(&team); block < blocks; block = pk__next_task(&team)) {
        pk__arena own = {memory + (size_t)pk__thread() * bytes, bytes, 0, 0};
        pk__tape batch;
        pk__pass_take(&own, graph, PK__EVALUATE_ROWS, 0, 0, &batch);
        pk_real *rows = pk__arena_take(&own, PK__EVALUATE_ROWS, inputs.cols * sizeof *rows);
        size_t first = block * PK__EVALUATE_ROWS;
        size_t count = pk__min(inputs.rows - first, PK__EVALUATE_ROWS);
        for (size_t row = 0; row < count; row++)
            memcpy(rows + row * inputs.cols, inputs.data + (first + row) * inputs.ld,
                   inputs.cols * sizeof *rows);
        pk__pass_forward(&batch, &line, count, rows);
        for (size_t row = 0; row < count; row++)
            memcpy(outputs.data + (first + row) * outputs.ld, pk__pass_output(&batch) + row * outputs.cols,
                   outputs.cols * sizeof *rows);
    }
    pk__team_end(&team);
    pk_release(context, memory);
    return PK_OK;
}

PK__END_CODE

/* pathkernel/network/elementwise.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

PK__PRIVATE pk_status pk__same_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context;
    node->shape = graph->nodes[node->inputs[0]].shape;
    return PK_OK;
}

PK__PRIVATE size_t pk__one_row_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return node->width;
}

PK__PRIVATE size_t pk__width_switches(const pk_node *node)
{
    return node->width;
}

typedef void pk__slopes(const pk_call *call, size_t first, size_t count, pk_real *slope);

static void pk__elementwise_tangent(const pk_call *call, pk__slopes *slopes)
{
    size_t count = call->rows * call->node->width;
    pk_real *out = call->out_tangent;
    if (!call->in_tangent[0]) {
        memset(out, 0, count * sizeof *out);
        return;
    }
    slopes(call, 0, count, out);
    pk__times(1, count, call->in_tangent[0], out, 0, out);
}

/* in_cotangent (+)= slope o out_cotangent, or, with the second derivatives as slopes, += slope o in_tangent o
 * out_cotangent. */
static void pk__elementwise_reverse(const pk_call *call, pk__slopes *slopes, int second)
{
    size_t width = call->node->width, copies = call->copies;
    pk_real *slope = call->scratch;
    const pk_real *from = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];                                /* may be from */
    if (copies == 1 && !second && !call->accumulate[0] && to != from) { /* no slope is used twice */
        const size_t count = call->rows * width;
        slopes(call, 0, count, to);
        pk__times(1, count, from, to, 0, to);
        return;
    }
    for (size_t row = 0; row < call->rows; row++) {
        slopes(call, row * width, width, slope);
        if (second)
            pk__times(1, width, call->in_tangent[0] + row * width, slope, 0, slope);
        pk__times(copies, width, from, slope, second || call->accumulate[0], to);
        from += copies * width;
        to += copies * width;
    }
}

/* slope[i] = E(x, y), for the numbers first .. first + count - 1. */
#define PK__SLOPES(name, kind, E)                                                                    \
    static void pk__##name##_##kind(const pk_call *call, size_t first, size_t count, pk_real *slope) \
    {                                                                                                \
        const double *p = call->node->attributes;                                                    \
        const pk_real *in = call->in[0] + first, *out = call->out + first;                           \
        (void)p;                                                                                     \
        for (size_t i = 0; i < count; i++) {                                                         \
            pk_real x = in[i], y = out[i];                                                           \
            (void)x, (void)y;                                                                        \
            slope[i] = (pk_real)(E);                                                                 \
        }                                                                                            \
    }

/* Elementwise y = V(x) with slope D(x, y) and second derivative D2(x, y) between kinks: p are the node's
 * attributes. Slopes at kinks are PyTorch's. */
#define PK__ELEMENTWISE(name, V, D, D2)                   \
    static void pk__##name##_forward(const pk_call *call) \
    {                                                     \
        const double *p = call->node->attributes;         \
        size_t count = call->rows * call->node->width;    \
        const pk_real *in = call->in[0];                  \
        pk_real *out = call->out;                         \
        (void)p;                                          \
        for (size_t i = 0; i < count; i++) {              \
            pk_real x = in[i];                            \
            out[i] = (pk_real)(V);                        \
        }                                                 \
    }                                                     \
    PK__ELEMENTWISE_RULES(name, D, D2)
/* The same with y from elementary.h. */
#define PK__ELEMENTWISE_FAST(name, D, D2)                                                               \
    static void pk__##name##_forward(const pk_call *call)                                               \
    {                                                                                                   \
        pk__elementary_reals(pk__all_##name, call->rows * call->node->width, call->node->attributes[0], \
                             call->in[0], call->out);                                                   \
    }                                                                                                   \
    PK__ELEMENTWISE_RULES(name, D, D2)
#define PK__ELEMENTWISE_RULES(name, D, D2)                      \
    PK__SLOPES(name, slopes, D)                                 \
    PK__SLOPES(name, seconds, D2)                               \
    PK__COLD_BEGIN                                              \
    static void pk__##name##_tangent(const pk_call *call)       \
    {                                                           \
        pk__elementwise_tangent(call, pk__##name##_slopes);     \
    }                                                           \
    static void pk__##name##_reverse(const pk_call *call)       \
    {                                                           \
        pk__elementwise_reverse(call, pk__##name##_slopes, 0);  \
    }                                                           \
    static void pk__##name##_curvature(const pk_call *call)     \
    {                                                           \
        pk__elementwise_reverse(call, pk__##name##_seconds, 1); \
    }                                                           \
    PK__COLD_END

#define PK__SQRT_HALF 0.70710678118654752440
#define PK__INV_SQRT_2PI 0.39894228040143267794
#define PK__TWO_BY_SQRT_PI 1.12837916709551257390

PK__ELEMENTWISE(identity, x, 1, 0)
PK__ELEMENTWISE(relu, x > 0 ? x : 0, x > 0 ? 1 : 0, 0)
PK__ELEMENTWISE(leaky_relu, x > 0 ? x : p[0] * x, x > 0 ? 1 : p[0], 0)
PK__ELEMENTWISE(hard_tanh, x<-1 ? -1 : x> 1 ? 1 : x, x > -1 && x < 1 ? 1 : 0, 0)
PK__ELEMENTWISE(abs, fabs(x), x > 0 ? 1 : x < 0 ? -1 : 0, 0)
PK__ELEMENTWISE(scale, p[0] * x, p[0], 0)
PK__ELEMENTWISE_FAST(tanh, 1 - y * y, -2 * y * (1 - y * y))
PK__ELEMENTWISE_FAST(sigmoid, y *(1 - y), y *(1 - y) * (1 - 2 * y))
PK__ELEMENTWISE_FAST(softplus, pk__sigmoid(p[0] * x), p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x))
PK__ELEMENTWISE(gelu, 0.5 * x * erfc(-x * PK__SQRT_HALF),
                0.5 * erfc(-x * PK__SQRT_HALF) + x * PK__INV_SQRT_2PI * exp(-0.5 * x * x),
                PK__INV_SQRT_2PI *exp(-0.5 * x * x) * (2 - x * x))
PK__ELEMENTWISE(silu, x *pk__sigmoid(x), pk__sigmoid(x) * (1 + x * pk__sigmoid(-x)),
                pk__sigmoid(x) * pk__sigmoid(-x) * (2 + x * (1 - 2 * pk__sigmoid(x))))
PK__ELEMENTWISE(erf, erf(x), PK__TWO_BY_SQRT_PI *exp(-x *x), -2 * x * PK__TWO_BY_SQRT_PI * exp(-x * x))
PK__ELEMENTWISE(sine, sin(p[0] * x), p[0] * cos(p[0] * x), -p[0] * p[0] * y)
/* The surrogates are the slopes of erf(b x) and of sigmoid(b x) (Eilers, Memmesheimer & Goedeke, 2024). */
PK__ELEMENTWISE(sign, (x > 0) - (x < 0), p[0] * PK__TWO_BY_SQRT_PI * exp(-p[0] * p[0] * x * x),
                -2 * p[0] * p[0] * x * p[0] * PK__TWO_BY_SQRT_PI * exp(-p[0] * p[0] * x * x))
PK__ELEMENTWISE(step, x > 0, p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x),
                p[0] * p[0] * pk__sigmoid(p[0] * x) * pk__sigmoid(-p[0] * x) * (1 - 2 * pk__sigmoid(p[0] * x)))
#undef PK__ELEMENTWISE
#undef PK__ELEMENTWISE_FAST
#undef PK__ELEMENTWISE_RULES
#undef PK__SLOPES

static void pk__zero_switches(const pk_call *call)
{
    memcpy(call->out, call->in[0], call->rows * call->node->width * sizeof(pk_real));
}

static size_t pk__hard_tanh_switch_count(const pk_node *node)
{
    return 2 * node->width;
}

static void pk__hard_tanh_switches(const pk_call *call)
{
    size_t count = call->rows * call->node->width;
    for (size_t i = 0; i < count; i++) {
        call->out[2 * i] = call->in[0][i] + 1;
        call->out[2 * i + 1] = call->in[0][i] - 1;
    }
}

static const pk_option pk__positive_option[] = {
    {"number", PK_OPTION_NUMBER, 0, 1, 0, DBL_MIN, DBL_MAX, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__scale_option[] = {
    {"factor", PK_OPTION_NUMBER, 0, 1, 1, -DBL_MAX, DBL_MAX, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

#define PK__ACTIVATION(name, kind, options, value, count, switches, curvature)                                 \
    {                                                                                                          \
#name, kind, PK_TANGENT_NONE, 1, options,                                                              \
            {value, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, pk__same_shape, pk__one_row_scratch,        \
             pk__##name##_forward, pk__##name##_tangent, pk__##name##_reverse, NULL, NULL, count, switches, 1, \
             curvature, NULL, 0, NULL, NULL                                                                    \
    }
#define PK__SMOOTH_OPERATION(name, options, value) \
    PK__ACTIVATION(name, PK_SMOOTH, options, value, NULL, NULL, pk__##name##_curvature)
#define PK__KINKED_OPERATION(name, options, value, count, switches) \
    PK__ACTIVATION(name, PK_PIECEWISE_LINEAR, options, value, count, switches, pk__##name##_curvature)

static const pk_operation pk__activation_operations[] = {
    PK__ACTIVATION(identity, PK_LINEAR, NULL, 0, NULL, NULL, pk__identity_curvature),
    PK__ACTIVATION(scale, PK_LINEAR, pk__scale_option, 1, NULL, NULL, pk__scale_curvature),
    PK__KINKED_OPERATION(relu, NULL, 0, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(leaky_relu, pk__positive_option, 0.01, pk__width_switches, pk__zero_switches),
    PK__KINKED_OPERATION(hard_tanh, NULL, 0, pk__hard_tanh_switch_count, pk__hard_tanh_switches),
    PK__KINKED_OPERATION(abs, NULL, 0, pk__width_switches, pk__zero_switches),
    PK__SMOOTH_OPERATION(tanh, NULL, 0),
    PK__SMOOTH_OPERATION(sigmoid, NULL, 0),
    PK__SMOOTH_OPERATION(softplus, pk__positive_option, 1),
    PK__SMOOTH_OPERATION(gelu, NULL, 0),
    PK__SMOOTH_OPERATION(silu, NULL, 0),
    PK__SMOOTH_OPERATION(erf, NULL, 0),
    PK__SMOOTH_OPERATION(sine, pk__positive_option, 1),
    PK__ACTIVATION(sign, PK_SURROGATE, pk__positive_option, 1, pk__width_switches, pk__zero_switches,
                   pk__sign_curvature),
    PK__ACTIVATION(step, PK_SURROGATE, pk__positive_option, 1, pk__width_switches, pk__zero_switches,
                   pk__step_curvature),
};
#undef PK__SMOOTH_OPERATION
#undef PK__KINKED_OPERATION
#undef PK__ACTIVATION

PK__END_CODE

/* pathkernel/network/dense.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

#define PK__INITIAL_OPTIONS(first)                                                            \
    {"init",                                                                                  \
     PK_OPTION_CHOICE,                                                                        \
     first,                                                                                   \
     0,                                                                                       \
     0,                                                                                       \
     0,                                                                                       \
     0,                                                                                       \
     0,                                                                                       \
     "default he he_uniform glorot glorot_uniform lecun lecun_uniform normal zero standard"}, \
    {                                                                                         \
        "gain", PK_OPTION_NUMBER, (first) + 1, 0, 0, 0, DBL_MAX, 0, NULL                      \
    }

/* A weight of fan_out x fan_in and count - fan_out fan_in biases. */
PK__PRIVATE void pk__initialize_matrix(pk_initial kind, double gain, size_t fan_in, size_t fan_out,
                                       size_t count, pk_random *random, pk_real *weights)
{
    const double in = (double)fan_in, out = (double)fan_out;
    double size = gain; /* the standard deviation, or half the width of a uniform distribution */
    int uniform = 0, biases = 0;
    switch (kind) {
    case PK_INITIAL_DEFAULT:
        size /= sqrt(in);
        uniform = biases = 1;
        break;
    case PK_INITIAL_HE: size *= sqrt(2 / in); break;
    case PK_INITIAL_HE_UNIFORM:
        size *= sqrt(6 / in);
        uniform = 1;
        break;
    case PK_INITIAL_GLOROT: size *= sqrt(2 / (in + out)); break;
    case PK_INITIAL_GLOROT_UNIFORM:
        size *= sqrt(6 / (in + out));
        uniform = 1;
        break;
    case PK_INITIAL_LECUN: size *= sqrt(1 / in); break;
    case PK_INITIAL_LECUN_UNIFORM:
        size *= sqrt(3 / in);
        uniform = 1;
        break;
    case PK_INITIAL_ZERO: size = 0; break;
    case PK_INITIAL_STANDARD:
        size = 1;
        biases = 1;
        break;
    case PK_INITIAL_NORMAL:
    default: break;
    }
    const size_t drawn = biases ? count : pk__min(count, fan_in * fan_out);
    for (size_t i = 0; i < count; i++) {
        if (i >= drawn || size == 0)
            weights[i] = 0;
        else if (uniform)
            weights[i] = (pk_real)(size * (2 * pk_random_uniform(random) - 1));
        else
            weights[i] = (pk_real)(size * pk_random_normal(random));
    }
}

/* dense N [nobias]: y = W x + b along the last dimension, W (out, in). */
static pk_status pk__dense_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    const size_t out = (size_t)node->attributes[PK_DENSE_OUTPUTS];
    node->shape = input->shape;
    node->fan_in = input->shape.dims[input->shape.rank - 1];
    node->fan_out = node->shape.dims[input->shape.rank - 1] = out;
    node->positions = input->width / node->fan_in;
    if (!pk__multiply(out, node->fan_in, &node->weight_count) || node->weight_count > SIZE_MAX / 2 - out)
        return pk__fail(context, PK_OVERFLOW, "dense %zu: its weights overflow", out);
    if (node->attributes[PK_DENSE_BIAS] != 0)
        node->weight_count += out;
    return PK_OK;
}

static void pk__dense_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    pk__initialize_matrix((pk_initial)(int)node->attributes[PK_DENSE_INITIAL], node->attributes[PK_DENSE_GAIN],
                          node->fan_in, node->fan_out, node->weight_count, random, weights);
}

static int pk__dense_bias(const pk_call *call)
{
    return call->node->attributes[PK_DENSE_BIAS] != 0;
}

/* A product of a layer: C (+)= op(A) op(B) in tiles of rows or of columns of C. Tiles are cut by shape only, from a size
 * on that is worth starting threads for, so that threads can share the tiles of one block of rows. */
typedef struct pk__dense_product {
    int transpose_a, transpose_b;
    size_t m, n, k;
    const pk_real *a, *b;
    size_t lda, ldb;
    pk_real beta, *c;
    size_t ldc, tile; /* ldc: also the columns of C where rows are cut */
    int by_rows;
} pk__dense_product;

enum { PK__DENSE_TILE = 256 / (int)sizeof(pk_real), PK__DENSE_TILES = 8, PK__DENSE_WORTH = 1 << 19 };

static void pk__dense_tile(const pk__dense_product *p, size_t tile)
{
    const size_t first = tile * p->tile, count = pk__min((p->by_rows ? p->m : p->n) - first, p->tile);
    if (p->by_rows)
        pk__gemm(p->transpose_a, p->transpose_b, count, p->n, p->k, 1,
                 p->a + first * (p->transpose_a ? 1 : p->lda), p->lda, p->b, p->ldb, p->beta,
                 p->c + first * p->ldc, p->ldc);
    else
        pk__gemm(p->transpose_a, p->transpose_b, p->m, count, p->k, 1, p->a, p->lda,
                 p->b + first * (p->transpose_b ? p->ldb : 1), p->ldb, p->beta, p->c + first, p->ldc);
}

static void pk__dense_multiply(pk__dense_product *p, const pk_call *call)
{
    const size_t cut = p->by_rows ? p->m : p->n;
    const double parts = (double)p->m * (double)p->n * (double)p->k / PK__DENSE_WORTH;
    /* Few rows are packed for each tile again. */
    const size_t most = p->m > PK__FEW_PANELS * PK_PANEL ? PK__DENSE_TILES : PK__DENSE_TILES / 2;
    p->tile = parts < 2 ? cut : pk__max(PK__DENSE_TILE, (cut / most + 7) / 8 * 8);
    const size_t tiles = pk__blocks(cut, p->tile);
    const int threads = (int)pk__min((size_t)pk__max((size_t)call->threads, 1), tiles);
    if (threads > 1 && threads <= parts) {
        pk__team team = pk__team_of(call->context, threads, tiles);
        PK__PARALLEL(team)
        for (size_t tile = pk__first_task(&team); tile < tiles; tile = pk__next_task(&team))
            pk__dense_tile(p, tile);
        pk__team_end(&team);
    } else {
        for (size_t tile = 0; tile < tiles; tile++)
            pk__dense_tile(p, tile);
    }
}

static void pk__dense_apply(const pk_call *call, const pk_real *weights, const pk_real *in, int bias,
                            pk_real beta, pk_real *out)
{
    const size_t rows = call->rows * call->node->positions, width = call->node->fan_out,
                 fan_in = call->node->fan_in;
    if (bias) {
        const pk_real *from = weights + width * fan_in;
        for (size_t row = 0; row < rows; row++)
            memcpy(out + row * width, from, width * sizeof *out);
        beta = 1;
    }
    pk__dense_product product = {0,      1,      rows, width, fan_in, in, weights,
                                 fan_in, fan_in, beta, out,   width,  0,  0};
    pk__dense_multiply(&product, call);
}

static void pk__dense_forward(const pk_call *call)
{
    pk__dense_apply(call, call->weights, call->in[0], pk__dense_bias(call), 0, call->out);
}

static void pk__dense_tangent(const pk_call *call)
{
    pk_real beta = 0;
    if (call->direction) {
        pk__dense_apply(call, call->direction, call->in[0], pk__dense_bias(call), 0, call->out_tangent);
        beta = 1;
    }
    if (call->in_tangent[0])
        pk__dense_apply(call, call->weights, call->in_tangent[0], 0, beta, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__dense_reverse(const pk_call *call)
{
    const size_t width = call->node->fan_out, fan_in = call->node->fan_in,
                 rows = call->rows * call->copies * call->node->positions;
    const int accumulate = call->accumulate[0];
    pk_real *to = call->in_cotangent[0];
    if (call->node->positions == 1 &&
        pk__has_common_zeros(rows, call->copies, width, call->out_cotangent, width)) {
        pk__grouped_product(rows, call->copies, fan_in, width, call->out_cotangent, width, call->weights,
                            fan_in, !accumulate, to, fan_in);
        return;
    }
    pk__dense_product product = {0,
                                 0,
                                 rows,
                                 fan_in,
                                 width,
                                 call->out_cotangent,
                                 call->weights,
                                 width,
                                 fan_in,
                                 (pk_real)(accumulate ? 1 : 0),
                                 to,
                                 fan_in,
                                 0,
                                 0};
    pk__dense_multiply(&product, call);
}

static void pk__dense_weight_gradient(const pk_call *call)
{
    const size_t rows = call->rows * call->node->positions, width = call->node->fan_out,
                 fan_in = call->node->fan_in;
    pk__dense_product product = {1,           0,     width,  fan_in, rows,           call->out_cotangent,
                                 call->in[0], width, fan_in, 1,      call->gradient, fan_in,
                                 0,           1};
    pk__dense_multiply(&product, call);
    if (pk__dense_bias(call)) {
        pk_real *bias = call->gradient + width * fan_in;
        for (size_t row = 0; row < rows; row++) {
            const pk_real *cotangent = call->out_cotangent + row * width;
            PK__SIMD
            for (size_t j = 0; j < width; j++)
                bias[j] += cotangent[j];
        }
    }
}

static const pk_option pk__dense_options[] = {
    {"outputs", PK_OPTION_NUMBER, PK_DENSE_OUTPUTS, 1, 1, 1, 1e9, 1, NULL},
    {"nobias", PK_OPTION_FLAG, PK_DENSE_BIAS, 0, 0, 0, 0, 0, NULL},
    PK__INITIAL_OPTIONS(PK_DENSE_INITIAL),
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

static const pk_operation pk__dense_operations[] = {
    {"dense",
     PK_LINEAR,
     PK_TANGENT_OUTER,
     1,
     pk__dense_options,
     {0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
     pk__dense_shape,
     NULL,
     pk__dense_forward,
     pk__dense_tangent,
     pk__dense_reverse,
     pk__dense_weight_gradient,
     NULL,
     NULL,
     NULL,
     0,
     NULL,
     NULL,
     0,
     NULL,
     pk__dense_initialize},
};

PK__END_CODE

/* pathkernel/network/shape.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* to (+)= from */
PK__PRIVATE void pk__give(size_t count, const pk_real *from, int accumulate, pk_real *to)
{
    if (!accumulate)
        memcpy(to, from, count * sizeof *to);
    else
        for (size_t i = 0; i < count; i++)
            to[i] += from[i];
}

/* Whether number at of a row of data is a whole number below count. */
PK__PRIVATE pk_status pk__check_token(pk_context *context, const char *name, size_t row, size_t at,
                                      double token, double count)
{
    if (token >= 0 && token < count && token == floor(token))
        return PK_OK;
    return pk__fail(context, PK_ARGUMENT, "row %zu, number %zu: %s takes whole numbers from 0 to %.0f, not %g",
                    row, at, name, count - 1, token);
}

/* add: y = sum_j x_j, 2 to PK_NODE_INPUTS inputs of one shape. */
static pk_status pk__add_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *first = &graph->nodes[node->inputs[0]].shape;
    for (int j = 1; j < node->input_count; j++) {
        const pk_shape *other = &graph->nodes[node->inputs[j]].shape;
        char texts[2][PK_SHAPE_TEXT];
        if (other->rank != first->rank ||
            memcmp(other->dims, first->dims, (size_t)first->rank * sizeof *first->dims) != 0)
            return pk__fail(context, PK_SHAPE, "branches of %s and of %s cannot be added",
                            pk_shape_text(first, texts[0]), pk_shape_text(other, texts[1]));
    }
    node->shape = *first;
    return PK_OK;
}

static void pk__add_forward(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        pk__give(call->rows * call->node->width, call->in[j], j > 0, call->out);
}

static void pk__add_tangent(const pk_call *call)
{
    int any = 0;
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_tangent[j])
            pk__give(call->rows * call->node->width, call->in_tangent[j], any++, call->out_tangent);
    if (!any)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__add_reverse(const pk_call *call)
{
    for (int j = 0; j < call->node->input_count; j++)
        if (call->in_cotangent[j])
            pk__give(call->rows * call->copies * call->node->width, call->out_cotangent, call->accumulate[j],
                     call->in_cotangent[j]);
}

/* flatten: the same numbers as one dimension. */
static pk_status pk__flatten_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)context;
    node->shape.rank = 1;
    node->shape.dims[0] = graph->nodes[node->inputs[0]].width;
    return PK_OK;
}

/* position: y = w (tokens, width) for every row, whatever the input. */
static pk_status pk__position_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)graph;
    node->shape.rank = 2;
    for (int i = 0; i < 2; i++)
        node->shape.dims[i] = (size_t)node->attributes[i];
    if (!pk__multiply(node->shape.dims[0], node->shape.dims[1], &node->weight_count))
        return pk__fail(context, PK_OVERFLOW, "position: its weights overflow");
    return PK_OK;
}

static void pk__repeat_rows(size_t rows, size_t width, const pk_real *from, pk_real *to)
{
    for (size_t row = 0; row < rows; row++)
        memcpy(to + row * width, from, width * sizeof *to);
}

static void pk__position_forward(const pk_call *call)
{
    pk__repeat_rows(call->rows, call->node->width, call->weights, call->out);
}

static void pk__position_tangent(const pk_call *call)
{
    if (call->direction)
        pk__repeat_rows(call->rows, call->node->width, call->direction, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__position_reverse(const pk_call *call)
{
    if (call->in_cotangent[0] && !call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * call->copies * call->in_width[0] * sizeof(pk_real));
}

static void pk__position_weight_gradient(const pk_call *call)
{
    for (size_t row = 0; row < call->rows; row++)
        pk__give(call->node->width, call->out_cotangent + row * call->node->width, 1, call->gradient);
}

static void pk__position_row_gradients(const pk_call *call)
{
    memcpy(call->gradient, call->out_cotangent,
           call->rows * call->copies * call->node->width * sizeof(pk_real));
}

/* As PyTorch's Embedding. */
PK__PRIVATE void pk__normal_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    for (size_t i = 0; i < node->weight_count; i++)
        weights[i] = (pk_real)pk_random_normal(random);
}

/* propagate: Y = A X over tokens (tokens x width), A a fixed sparse matrix (tokens x tokens); its constants are
 * triples (row, column, value), one behind the other. Kipf & Welling 2017, eq. 2, without weights. */
static pk_status pk__propagate_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (input->shape.rank != 2)
        return pk__fail(context, PK_SHAPE, "propagate needs values of tokens x width, not of rank %d",
                        input->shape.rank);
    if (node->constant_count == 0 || node->constant_count % 3)
        return pk__fail(context, PK_SHAPE, "propagate: %zu numbers are no triples (row, column, value)",
                        node->constant_count);
    for (size_t i = 0; i < node->constant_count; i += 3)
        for (size_t k = 0; k < 3; k++) {
            const double value = node->constants[i + k], tokens = (double)input->shape.dims[0];
            if (k < 2 ? !(value >= 0 && value < tokens && value == floor(value)) : !isfinite(value))
                return pk__fail(context, PK_ARGUMENT, "propagate: entry %zu has the %s %g; there are %g tokens",
                                i / 3,
                                k == 2 ? "value"
                                : k    ? "column"
                                       : "row",
                                value, tokens);
        }
    node->shape = input->shape;
    return PK_OK;
}

/* to += A from, or A^T from, for each of count matrices. */
static void pk__propagate(const pk_node *node, size_t count, int transpose, const pk_real *from, pk_real *to)
{
    const size_t width = node->shape.dims[1];
    for (size_t m = 0; m < count; m++, from += node->width, to += node->width)
        for (size_t i = 0; i < node->constant_count; i += 3) {
            const pk_real value = node->constants[i + 2];
            const pk_real *x = from + (size_t)node->constants[i + !transpose] * width;
            pk_real *y = to + (size_t)node->constants[i + transpose] * width;
            for (size_t j = 0; j < width; j++)
                y[j] += value * x[j];
        }
}

static void pk__propagate_forward(const pk_call *call)
{
    memset(call->out, 0, call->rows * call->node->width * sizeof(pk_real));
    pk__propagate(call->node, call->rows, 0, call->in[0], call->out);
}

static void pk__propagate_tangent(const pk_call *call)
{
    memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    if (call->in_tangent[0])
        pk__propagate(call->node, call->rows, 0, call->in_tangent[0], call->out_tangent);
}

static void pk__propagate_reverse(const pk_call *call)
{
    const size_t count = call->rows * call->copies;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, count * call->node->width * sizeof(pk_real));
    pk__propagate(call->node, count, 1, call->out_cotangent, call->in_cotangent[0]);
}

/* constant: y = the node's constants for every row, of the shape (attribute 0) x (attribute 1); no cotangent. */
static pk_status pk__constant_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    (void)graph;
    node->shape.rank = 2;
    for (int i = 0; i < 2; i++)
        node->shape.dims[i] = (size_t)node->attributes[i];
    if (node->shape.dims[0] * node->shape.dims[1] != node->constant_count)
        return pk__fail(context, PK_SHAPE, "a constant of %zu x %zu has %zu numbers", node->shape.dims[0],
                        node->shape.dims[1], node->constant_count);
    return PK_OK;
}

static void pk__constant_forward(const pk_call *call)
{
    pk__repeat_rows(call->rows, call->node->width, call->node->constants, call->out);
}

static void pk__constant_tangent(const pk_call *call)
{
    memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* fourier: y = (cos 2 pi B x, sin 2 pi B x), B (N, in) the node's constants; on data only: its slopes are for
 * derivatives with respect to the data, along weights it is a constant.
 * Rahimi & Recht 2007; Tancik et al. 2020, eq. 5. */
static pk_status pk__fourier_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (input->varies)
        return pk__fail(context, PK_UNSUPPORTED,
                        "Fourier features are taken of data, before the first weights");
    if (!node->constant_count || node->constant_count % input->width)
        return pk__fail(context, PK_SHAPE, "fourier: %zu frequencies for %zu inputs", node->constant_count,
                        input->width);
    node->shape.rank = 1;
    node->shape.dims[0] = 2 * (node->constant_count / input->width);
    return PK_OK;
}

#define PK__TWO_PI 6.28318530717958647693

static void pk__fourier_forward(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    pk__gemm(0, 1, call->rows, count, in, 1, call->in[0], in, call->node->constants, in, 0, call->out,
             2 * count);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t j = 0; j < count; j++) {
            pk_real *y = call->out + row * 2 * count + j;
            const double angle = PK__TWO_PI * *y;
            y[0] = (pk_real)cos(angle);
            y[count] = (pk_real)sin(angle);
        }
}

static void pk__fourier_tangent(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    if (!call->in_tangent[0]) {
        memset(call->out_tangent, 0, call->rows * 2 * count * sizeof(pk_real));
        return;
    }
    pk__gemm(0, 1, call->rows, count, in, PK__TWO_PI, call->in_tangent[0], in, call->node->constants, in, 0,
             call->out_tangent, 2 * count);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t j = 0; j < count; j++) {
            const pk_real *y = call->out + row * 2 * count + j;
            pk_real *to = call->out_tangent + row * 2 * count + j;
            to[count] = y[0] * to[0];
            to[0] *= -y[count];
        }
}

static void pk__fourier_reverse(const pk_call *call)
{
    const size_t in = call->in_width[0], count = call->node->width / 2;
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        const pk_real *y = call->out + copy / call->copies * 2 * count;
        const pk_real *c = call->out_cotangent + copy * 2 * count;
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        for (size_t j = 0; j < count; j++) {
            const pk_real slope = (pk_real)PK__TWO_PI * (c[count + j] * y[j] - c[j] * y[count + j]);
            for (size_t i = 0; i < in; i++)
                to[i] += slope * call->node->constants[j * in + i];
        }
    }
}

/* select: y = the token of the first input (tokens x width) that the row's data, the second input, name. */
static pk_status pk__select_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    if (node->input_count != 2 || node->inputs[1] != 0 || graph->input_width != 1 || input->shape.rank != 2)
        return pk__fail(context, PK_SHAPE,
                        "select needs values of tokens x width, and data of one number a row");
    node->shape.rank = 1;
    node->shape.dims[0] = input->shape.dims[1];
    node->attributes[0] = (double)input->shape.dims[0];
    return PK_OK;
}

static pk_status pk__select_check(pk_context *context, const pk_node *node, size_t row, const pk_real *in)
{
    return pk__check_token(context, "select", row, 0, in[0], node->attributes[0]);
}

/* Where the row's token starts; a token that is none counts as the first: pk_graph_check_inputs refuses it. */
static size_t pk__selected(const pk_call *call, size_t row)
{
    const double token = call->in[1][row];
    return token >= 0 && token * (double)call->node->width < (double)call->in_width[0]
               ? (size_t)token * call->node->width
               : 0;
}

static void pk__select_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width;
    for (size_t row = 0; row < call->rows; row++)
        memcpy(to + row * width, from + row * call->in_width[0] + pk__selected(call, row), width * sizeof *to);
}

static void pk__select_forward(const pk_call *call)
{
    pk__select_rows(call, call->in[0], call->out);
}

static void pk__select_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__select_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__select_reverse(const pk_call *call)
{
    const size_t width = call->node->width, in = call->in_width[0];
    for (size_t copy = 0; call->in_cotangent[0] && copy < call->rows * call->copies; copy++) {
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        pk__give(width, call->out_cotangent + copy * width, 1, to + pk__selected(call, copy / call->copies));
    }
}

static const pk_option pk__position_options[] = {
    {"tokens", PK_OPTION_NUMBER, PK_POSITION_TOKENS, 1, 1, 1, 1e9, 1, NULL},
    {"width", PK_OPTION_NUMBER, PK_POSITION_WIDTH, 2, 1, 1, 1e9, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

#define PK__NO_NUMBERS                                 \
    {                                                  \
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 \
    }
#define PK__LINEAR_OPERATION(name, shape, forward, tangent, reverse)                                       \
    {                                                                                                      \
        name, PK_LINEAR, PK_TANGENT_NONE, 1, NULL, PK__NO_NUMBERS, shape, NULL, forward, tangent, reverse, \
            NULL, NULL, NULL, NULL, 0, NULL, NULL, 0, NULL, NULL                                           \
    }

static const pk_operation pk__structure_operations[] = {
    PK__LINEAR_OPERATION("add", pk__add_shape, pk__add_forward, pk__add_tangent, pk__add_reverse),
    PK__LINEAR_OPERATION("flatten", pk__flatten_shape, pk__add_forward, pk__add_tangent, pk__add_reverse),
    PK__LINEAR_OPERATION("propagate", pk__propagate_shape, pk__propagate_forward, pk__propagate_tangent,
                         pk__propagate_reverse),
    {"select",
     PK_LINEAR,
     PK_TANGENT_NONE,
     1,
     NULL,
     PK__NO_NUMBERS,
     pk__select_shape,
     NULL,
     pk__select_forward,
     pk__select_tangent,
     pk__select_reverse,
     NULL,
     NULL,
     NULL,
     NULL,
     0,
     NULL,
     NULL,
     0,
     pk__select_check,
     NULL},
    PK__LINEAR_OPERATION("fourier", pk__fourier_shape, pk__fourier_forward, pk__fourier_tangent,
                         pk__fourier_reverse),
    {"constant",
     PK_LINEAR,
     PK_TANGENT_NONE,
     1,
     pk__position_options,
     PK__NO_NUMBERS,
     pk__constant_shape,
     NULL,
     pk__constant_forward,
     pk__constant_tangent,
     pk__position_reverse,
     NULL,
     NULL,
     NULL,
     NULL,
     0,
     NULL,
     NULL,
     0,
     NULL,
     NULL},
    {"position",
     PK_LINEAR,
     PK_TANGENT_ROWS,
     1,
     pk__position_options,
     PK__NO_NUMBERS,
     pk__position_shape,
     NULL,
     pk__position_forward,
     pk__position_tangent,
     pk__position_reverse,
     pk__position_weight_gradient,
     pk__position_row_gradients,
     NULL,
     NULL,
     0,
     NULL,
     NULL,
     0,
     NULL,
     pk__normal_initialize},
};

PK__END_CODE

/* pathkernel/network/image.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* Behind the attributes of all of them: what the rules need of the input. */
enum { PK__POOL_SWITCHES = 12, PK__IMAGE_CHANNELS, PK__IMAGE_HEIGHT, PK__IMAGE_WIDTH };

/* ---- windows ----------------------------------------------------------------------------------------- */

/* Windows on a padded plane: tap (i, j) of output (y, x) is number (y stride + i dilation - pad) of height, likewise
 * of width. Where that is in front of the plane it wraps to a number far behind it. */
typedef struct pk__windows {
    size_t height, width, rows, columns; /* of input and output */
    size_t kernel[2], stride[2], pad[2], dilation[2];
} pk__windows;

/* How far a window reaches. */
static size_t pk__reach(const pk__windows *windows, int side)
{
    return (windows->kernel[side] - 1) * windows->dilation[side] + 1;
}

/* The attributes of kernel, stride, pad and dilation; -1: one. The windows fit, see pk__image_shape. */
static pk__windows pk__windows_at(const pk_node *node, int kernel, int stride, int pad, int dilation)
{
    pk__windows windows;
    windows.height = (size_t)node->attributes[PK__IMAGE_HEIGHT];
    windows.width = (size_t)node->attributes[PK__IMAGE_WIDTH];
    for (int side = 0; side < 2; side++) {
        windows.kernel[side] = (size_t)node->attributes[kernel + side];
        windows.stride[side] = (size_t)node->attributes[stride + side];
        windows.pad[side] = (size_t)node->attributes[pad + side];
        windows.dilation[side] = dilation < 0 ? 1 : (size_t)node->attributes[dilation + side];
    }
    windows.rows = (windows.height + 2 * windows.pad[0] - pk__reach(&windows, 0)) / windows.stride[0] + 1;
    windows.columns = (windows.width + 2 * windows.pad[1] - pk__reach(&windows, 1)) / windows.stride[1] + 1;
    return windows;
}

/* The input's shape, kept in the node. */
static pk_status pk__image_input(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    char text[PK_SHAPE_TEXT];
    if (input->rank != 3)
        return pk__fail(context, PK_SHAPE,
                        "%s needs images of channels x height x width, not values of shape %s",
                        node->operation->name, pk_shape_text(input, text));
    for (int i = 0; i < 3; i++)
        node->attributes[PK__IMAGE_CHANNELS + i] = (double)input->dims[i];
    node->shape = *input;
    return PK_OK;
}

/* Whether the windows fit; the shape of the output, of as many channels as the input. */
static pk_status pk__image_shape(pk_context *context, const pk_graph *graph, pk_node *node, int kernel,
                                 int stride, int pad, int dilation)
{
    const pk_shape *input = &graph->nodes[node->inputs[0]].shape;
    pk_status status = pk__image_input(context, graph, node);
    if (status)
        return status;
    pk_shape reach = *input, padded = *input;
    char texts[3][PK_SHAPE_TEXT];
    reach.rank = 2;
    for (int side = 0; side < 2; side++) {
        const size_t step = dilation < 0 ? 1 : (size_t)node->attributes[dilation + side];
        reach.dims[side] = ((size_t)node->attributes[kernel + side] - 1) * step + 1;
        padded.dims[1 + side] += 2 * (size_t)node->attributes[pad + side];
    }
    if (reach.dims[0] > padded.dims[1] || reach.dims[1] > padded.dims[2])
        return pk__fail(context, PK_SHAPE,
                        "%s: a kernel that reaches over %s is larger than the input %s padded to %s",
                        node->operation->name, pk_shape_text(&reach, texts[0]), pk_shape_text(input, texts[1]),
                        pk_shape_text(&padded, texts[2]));
    const pk__windows windows = pk__windows_at(node, kernel, stride, pad, dilation);
    node->shape.dims[1] = windows.rows;
    node->shape.dims[2] = windows.columns;
    return PK_OK;
}

/* ---- conv -------------------------------------------------------------------------------------------- */

/* conv C KxK [stride=1] [pad=0] [dilation=1] [groups=1] [nobias]: PyTorch's Conv2d, padded with zeros. A group takes
 * in channels to out channels: y = W x + b over patches x (in x kernel), W (groups, out, patch), b (groups, out). */
typedef struct pk__convolution {
    pk__windows windows;
    size_t groups, in, out, plane, patch, positions;
    size_t band;   /* rows of an output whose patches are in scratch at a time */
    int pointwise; /* the patches are the input */
    int aligned;   /* an output's rows are as long as the input's, and step by one */
    int thin;      /* products too small for BLIS */
} pk__convolution;

enum { PK__BAND_NUMBERS = 1 << 15, PK__BAND_POSITIONS = 64, PK__THIN_PRODUCT = 1 << 12 };

static pk__convolution pk__convolution_of(const pk_node *node)
{
    pk__convolution c;
    c.windows = pk__windows_at(node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE, PK_CONVOLUTION_PAD,
                               PK_CONVOLUTION_DILATION);
    const pk__windows *w = &c.windows;
    c.groups = (size_t)node->attributes[PK_CONVOLUTION_GROUPS];
    c.in = (size_t)node->attributes[PK__IMAGE_CHANNELS] / c.groups;
    c.out = (size_t)node->attributes[PK_CONVOLUTION_CHANNELS] / c.groups;
    c.plane = w->height * w->width;
    c.patch = c.in * w->kernel[0] * w->kernel[1];
    c.positions = w->rows * w->columns;
    c.pointwise = w->kernel[0] * w->kernel[1] * w->stride[0] * w->stride[1] == 1 && w->pad[0] + w->pad[1] == 0;
    c.aligned = w->stride[0] * w->stride[1] == 1 && w->columns == w->width;
    c.thin = c.out * c.patch * c.positions <= PK__THIN_PRODUCT || c.out < 2;
    c.band = pk__max(PK__BAND_NUMBERS / c.patch, PK__BAND_POSITIONS) / w->columns;
    c.band = c.pointwise ? w->rows : pk__min(pk__max(c.band, 1), w->rows);
    return c;
}

static pk_status pk__convolution_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double channels = node->attributes[PK_CONVOLUTION_CHANNELS],
                 groups = node->attributes[PK_CONVOLUTION_GROUPS];
    pk_status status = pk__image_shape(context, graph, node, PK_CONVOLUTION_KERNEL, PK_CONVOLUTION_STRIDE,
                                       PK_CONVOLUTION_PAD, PK_CONVOLUTION_DILATION);
    if (status)
        return status;
    if (fmod(channels, groups) != 0 || fmod(node->attributes[PK__IMAGE_CHANNELS], groups) != 0)
        return pk__fail(context, PK_SHAPE, "conv: %g groups do not divide its %g input and %g output channels",
                        groups, node->attributes[PK__IMAGE_CHANNELS], channels);
    const double patch = node->attributes[PK__IMAGE_CHANNELS] / groups *
                         node->attributes[PK_CONVOLUTION_KERNEL] * node->attributes[PK_CONVOLUTION_KERNEL + 1];
    const double positions = (double)node->shape.dims[1] * (double)node->shape.dims[2];
    if (patch * channels > (double)(SIZE_MAX / 4096) || patch * positions > (double)(SIZE_MAX / 4096))
        return pk__fail(context, PK_OVERFLOW, "conv: its weights or patches overflow");
    const pk__convolution c = pk__convolution_of(node);
    node->shape.dims[0] = (size_t)channels;
    node->weight_count = node->shape.dims[0] * c.patch;
    node->positions = c.positions;
    node->fan_in = c.patch;
    node->fan_out = node->shape.dims[0];
    /* One window that is the whole image is the input itself, in the same order. */
    node->unfolds = c.positions != 1 || c.patch != graph->nodes[node->inputs[0]].width ||
                    c.windows.pad[0] + c.windows.pad[1] != 0;
    if (node->attributes[PK_CONVOLUTION_BIAS] != 0)
        node->weight_count += node->fan_out;
    if (c.groups > 1)
        node->tangent_form = PK_TANGENT_ROWS;
    return PK_OK;
}

static size_t pk__convolution_scratch(const pk_node *node, size_t rows, size_t copies)
{
    const pk__convolution c = pk__convolution_of(node);
    (void)rows, (void)copies;
    return c.pointwise ? 0 : c.patch * c.band * c.windows.columns;
}

/* As Conv2d's reset_parameters, and torch.nn.init's fans. */
static void pk__convolution_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    const pk_initial kind = (pk_initial)(int)node->attributes[PK_CONVOLUTION_INITIAL];
    const pk__convolution c = pk__convolution_of(node);
    const size_t fan_out = node->fan_out * (c.patch / c.in), own = node->fan_out * c.patch;
    const int biases = kind == PK_INITIAL_DEFAULT || kind == PK_INITIAL_STANDARD;
    memset(weights + own, 0, (node->weight_count - own) * sizeof *weights);
    pk__initialize_matrix(kind, node->attributes[PK_CONVOLUTION_GAIN], c.patch, fan_out,
                          biases ? node->weight_count : own, random, weights);
}

/* How many steps of stride reach over count. */
static size_t pk__steps(size_t count, size_t stride)
{
    return stride == 1 ? count : pk__blocks(count, stride); /* spares a division where there are many */
}

/* The outputs from first up to past of which tap number of a side is on the plane. */
static void pk__tap_range(const pk__windows *windows, int side, size_t number, size_t *first, size_t *past)
{
    const size_t size = side ? windows->width : windows->height, stride = windows->stride[side];
    const size_t offset = number * windows->dilation[side], pad = windows->pad[side];
    *past = offset < size + pad ? pk__steps(size + pad - offset, stride) : 0;
    *past = pk__min(*past, side ? windows->columns : windows->rows);
    *first = offset < pad ? pk__steps(pad - offset, stride) : 0;
    *first = pk__min(*first, *past);
}

/* The number in the plane of tap (i, j) of output (y, x). */
static size_t pk__tap_number(const pk__windows *windows, size_t i, size_t j, size_t y, size_t x)
{
    return (y * windows->stride[0] + i * windows->dilation[0] - windows->pad[0]) * windows->width +
           x * windows->stride[1] + j * windows->dilation[1] - windows->pad[1];
}

/* What a tap (i, j) has of the output rows from top up to bottom, in patches: rows from first up to past of it, in
 * these numbers from left up to right; they start at number place of the plane. */
typedef struct pk__stretch {
    size_t first, past, left, right, place;
} pk__stretch;

static pk__stretch pk__stretch_of(const pk__windows *w, size_t i, size_t j, size_t top, size_t bottom)
{
    pk__stretch s;
    pk__tap_range(w, 0, i, &s.first, &s.past);
    pk__tap_range(w, 1, j, &s.left, &s.right);
    s.first = pk__max(s.first, top);
    s.past = pk__min(s.past, bottom);
    s.place = 0;
    if (s.first < s.past && s.left < s.right)
        s.place = pk__tap_number(w, i, j, s.first, s.left);
    else
        s.first = s.past = top;
    s.first -= top;
    s.past -= top;
    return s;
}

/* Zeros at both ends of a stretch's rows. */
static void pk__clear_ends(const pk__stretch *stretch, size_t columns, pk_real *rows)
{
    if (stretch->left == 0 && stretch->right == columns)
        return;
    for (size_t y = stretch->first; y < stretch->past; y++) {
        for (size_t x = 0; x < stretch->left; x++)
            rows[y * columns + x] = 0;
        for (size_t x = stretch->right; x < columns; x++)
            rows[y * columns + x] = 0;
    }
}

/* patches (patch x (bottom - top) columns) of a group's channels, for the output rows from top up to bottom. */
static void pk__unfold_band(const pk__convolution *c, const pk_real *in, size_t top, size_t bottom,
                            pk_real *patches)
{
    const pk__windows *w = &c->windows;
    const size_t columns = w->columns, step = w->stride[1], rows = bottom - top;
    const size_t taps = w->kernel[0] * w->kernel[1];
    for (size_t tap = 0, i = 0, j = 0; tap < taps; tap++, j++) {
        if (j == w->kernel[1])
            i++, j = 0;
        const pk__stretch s = pk__stretch_of(w, i, j, top, bottom);
        for (size_t channel = 0; channel < c->in; channel++) {
            const pk_real *from = in + channel * c->plane + s.place;
            pk_real *to = patches + (channel * taps + tap) * rows * columns;
            memset(to, 0, s.first * columns * sizeof *to);
            if (c->aligned && s.past > s.first)
                memcpy(to + s.first * columns + s.left, from,
                       ((s.past - s.first - 1) * columns + s.right - s.left) * sizeof *to);
            else
                for (size_t y = s.first; y < s.past; y++, from += w->stride[0] * w->width)
                    for (size_t x = s.left; x < s.right; x++)
                        to[y * columns + x] = from[(x - s.left) * step];
            pk__clear_ends(&s, columns, to);
            memset(to + s.past * columns, 0, (rows - s.past) * columns * sizeof *to);
        }
    }
}

/* in += the sum of patches at their places: the transpose of pk__unfold_band. Overwrites patches. */
static void pk__fold_band(const pk__convolution *c, pk_real *patches, size_t top, size_t bottom, pk_real *in)
{
    const pk__windows *w = &c->windows;
    const size_t columns = w->columns, step = w->stride[1], rows = bottom - top;
    const size_t taps = w->kernel[0] * w->kernel[1];
    for (size_t tap = 0, i = 0, j = 0; tap < taps; tap++, j++) {
        if (j == w->kernel[1])
            i++, j = 0;
        const pk__stretch s = pk__stretch_of(w, i, j, top, bottom);
        for (size_t channel = 0; channel < c->in; channel++) {
            pk_real *to = in + channel * c->plane + s.place;
            pk_real *from = patches + (channel * taps + tap) * rows * columns;
            if (c->aligned && s.past > s.first) {
                const size_t count = (s.past - s.first - 1) * columns + s.right - s.left;
                pk__clear_ends(&s, columns, from);
                from += s.first * columns + s.left;
                for (size_t x = 0; x < count; x++)
                    to[x] += from[x];
            } else
                for (size_t y = s.first; y < s.past; y++, to += w->stride[0] * w->width)
                    for (size_t x = s.left; x < s.right; x++)
                        to[(x - s.left) * step] += from[y * columns + x];
        }
    }
}

/* pk__gemm, or the same by hand where its fixed cost is most of it. */
static void pk__patch_product(const pk__convolution *c, int transpose_a, int transpose_b, size_t m, size_t n,
                              size_t k, const pk_real *a, size_t lda, const pk_real *b, size_t ldb, int add,
                              pk_real *to, size_t ld)
{
    if (!c->thin) {
        pk__gemm(transpose_a, transpose_b, m, n, k, 1, a, lda, b, ldb, add ? 1 : 0, to, ld);
        return;
    }
    const size_t down = transpose_a ? 1 : lda, along = transpose_a ? lda : 1;
    for (size_t i = 0; i < m; i++, a += down, to += ld) {
        if (!add)
            memset(to, 0, n * sizeof *to);
        if (transpose_b)
            for (size_t j = 0; j < n; j++) {
                const pk_real *x = a, *y = b + j * ldb;
                pk_real sum[4] = {0, 0, 0, 0};
                size_t p = 0;
                for (; p + 4 <= k; p += 4)
                    for (size_t q = 0; q < 4; q++)
                        sum[q] += x[p + q] * y[p + q];
                for (; p < k; p++)
                    sum[0] += x[p] * y[p];
                to[j] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
        else
            for (size_t p = 0; p < k; p++) {
                const pk_real factor = a[p * along], *y = b + p * ldb;
                for (size_t j = 0; j < n; j++)
                    to[j] += factor * y[j];
            }
    }
}

/* out (channels x positions) = the bias of each channel. */
static void pk__spread_biases(size_t channels, size_t positions, const pk_real *biases, pk_real *out)
{
    for (size_t channel = 0; channel < channels; channel++)
        for (size_t q = 0; q < positions; q++)
            *out++ = biases[channel];
}

/* biases += the sums over positions of delta (channels x positions). */
static void pk__gather_biases(size_t channels, size_t positions, const pk_real *delta, pk_real *biases)
{
    for (size_t channel = 0; channel < channels; channel++)
        for (size_t q = 0; q < positions; q++)
            biases[channel] += *delta++;
}

/* out (positions x patch) for each row. */
static void pk__convolution_unfold(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const pk__windows *w = &c.windows;
    pk_real *to = call->out;
    for (size_t place = 0; place < call->rows * c.positions; place++) {
        const size_t row = place / c.positions, q = place % c.positions;
        const size_t top = q / w->columns * w->stride[0] - w->pad[0],
                     left = q % w->columns * w->stride[1] - w->pad[1];
        const pk_real *from = call->in[0] + row * call->in_width[0];
        for (size_t channel = 0; channel < c.in; channel++, from += c.plane)
            for (size_t i = 0, y = top; i < w->kernel[0]; i++, y += w->dilation[0])
                for (size_t j = 0, x = left; j < w->kernel[1]; j++, x += w->dilation[1])
                    *to++ = y < w->height && x < w->width ? from[y * w->width + x] : 0;
    }
}

/* out = W in + b for each row, or out (+)= W in. */
static void pk__convolve(const pk_call *call, const pk_real *weights, const pk_real *in, int bias, int add,
                         pk_real *out)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t channels = c.groups * c.out, columns = c.windows.columns;
    bias = bias && call->node->attributes[PK_CONVOLUTION_BIAS] != 0;
    const pk_real *biases = weights + channels * c.patch;
    for (size_t row = 0; row < call->rows; row++, in += call->in_width[0], out += call->node->width) {
        if (bias)
            pk__spread_biases(channels, c.positions, biases, out);
        for (size_t group = 0; group < c.groups; group++) {
            const pk_real *own = weights + group * c.out * c.patch, *from = in + group * c.in * c.plane;
            pk_real *to = out + group * c.out * c.positions;
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), count = (bottom - top) * columns;
                if (!c.pointwise)
                    pk__unfold_band(&c, from, top, bottom, call->scratch);
                pk__patch_product(&c, 0, 0, c.out, count, c.patch, own, c.patch,
                                  c.pointwise ? from : call->scratch, count, bias || add, to + top * columns,
                                  c.positions);
            }
        }
    }
}

static void pk__convolution_forward(const pk_call *call)
{
    pk__convolve(call, call->weights, call->in[0], 1, 0, call->out);
}

static void pk__convolution_tangent(const pk_call *call)
{
    if (call->direction)
        pk__convolve(call, call->direction, call->in[0], 1, 0, call->out_tangent);
    if (call->in_tangent[0])
        pk__convolve(call, call->weights, call->in_tangent[0], 0, call->direction != NULL, call->out_tangent);
    else if (!call->direction)
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__convolution_reverse(const pk_call *call)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t columns = c.windows.columns;
    const pk_real *delta = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        for (size_t group = 0; group < c.groups; group++, to += c.in * c.plane, delta += c.out * c.positions) {
            const pk_real *own = call->weights + group * c.out * c.patch;
            if (!c.pointwise && !call->accumulate[0])
                memset(to, 0, c.in * c.plane * sizeof *to);
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), count = (bottom - top) * columns;
                pk__patch_product(&c, 1, 0, c.patch, count, c.out, own, c.patch, delta + top * columns,
                                  c.positions, c.pointwise && call->accumulate[0],
                                  c.pointwise ? to : call->scratch, count);
                if (!c.pointwise)
                    pk__fold_band(&c, call->scratch, top, bottom, to);
            }
        }
}

/* gradient (weights) += that of each row, or gradient[row][copy] = that of each copy. */
static void pk__convolution_gradients(const pk_call *call, int sum)
{
    const pk__convolution c = pk__convolution_of(call->node);
    const size_t columns = c.windows.columns, width = call->node->width, count = call->node->weight_count;
    const size_t biases = c.groups * c.out * c.patch;
    if (!sum)
        memset(call->gradient, 0, call->rows * call->copies * count * sizeof(pk_real));
    for (size_t row = 0; row < call->rows; row++) {
        const pk_real *in = call->in[0] + row * call->in_width[0];
        const size_t first = row * call->copies;
        for (size_t group = 0; group < c.groups; group++, in += c.in * c.plane)
            for (size_t top = 0; top < c.windows.rows; top += c.band) {
                const size_t bottom = pk__min(top + c.band, c.windows.rows), band = (bottom - top) * columns;
                if (!c.pointwise)
                    pk__unfold_band(&c, in, top, bottom, call->scratch);
                for (size_t copy = first; copy < first + call->copies; copy++) {
                    pk_real *to = call->gradient + (sum ? 0 : copy * count) + group * c.out * c.patch;
                    const pk_real *delta = call->out_cotangent + copy * width + group * c.out * c.positions;
                    pk__patch_product(&c, 0, 1, c.out, c.patch, band, delta + top * columns, c.positions,
                                      c.pointwise ? in : call->scratch, band, 1, to, c.patch);
                }
            }
        for (size_t copy = first; count > biases && copy < first + call->copies; copy++)
            pk__gather_biases(c.groups * c.out, c.positions, call->out_cotangent + copy * width,
                              call->gradient + (sum ? 0 : copy * count) + biases);
    }
}

static void pk__convolution_weight_gradient(const pk_call *call)
{
    pk__convolution_gradients(call, 1);
}

static void pk__convolution_row_gradients(const pk_call *call)
{
    pk__convolution_gradients(call, 0);
}

/* ---- pools ------------------------------------------------------------------------------------------- */

static pk__windows pk__pool_windows(const pk_node *node)
{
    return pk__windows_at(node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
}

static pk_status pk__pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    double *stride = node->attributes + PK_POOL_STRIDE;
    const double *kernel = node->attributes + PK_POOL_KERNEL, *pad = node->attributes + PK_POOL_PAD;
    for (int side = 0; side < 2; side++) {
        if (stride[side] == 0)
            stride[side] = kernel[side];
        if (2 * pad[side] > kernel[side])
            return pk__fail(context, PK_SHAPE, "%s: padding of %gx%g is more than half of its kernel, %gx%g",
                            node->operation->name, pad[0], pad[1], kernel[0], kernel[1]);
    }
    return pk__image_shape(context, graph, node, PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD, -1);
}

/* max_pool K [stride=K] [pad=0]: PyTorch's MaxPool2d; padding is never the maximum. */

/* The number in its plane of a window's first maximum, or of its last NaN, as PyTorch's. */
static size_t pk__window_maximum(const pk__windows *w, const pk_real *plane, size_t y, size_t x)
{
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < w->kernel[0]; i++)
        for (size_t j = 0; j < w->kernel[1]; j++) {
            const size_t row = y * w->stride[0] + i - w->pad[0], column = x * w->stride[1] + j - w->pad[1];
            const size_t at = row * w->width + column;
            if (row < w->height && column < w->width &&
                (best == SIZE_MAX || plane[at] > plane[best] || isnan(plane[at])))
                best = at;
        }
    return best;
}

/* The same for output number output of an image: its number in the image. */
static size_t pk__pool_maximum(const pk__windows *w, const pk_real *image, size_t output)
{
    const size_t positions = w->rows * w->columns, plane = output / positions * w->height * w->width;
    return plane + pk__window_maximum(w, image + plane, output % positions / w->columns, output % w->columns);
}

/* to[output] = from[the first maximum of the output's window in the input] */
static void pk__pool_pick(const pk_call *call, const pk_real *from, pk_real *to)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real *in = call->in[0];
    for (size_t row = 0; row < call->rows; row++, in += call->in_width[0], from += call->in_width[0])
        for (size_t output = 0; output < call->node->width; output++)
            *to++ = from[pk__pool_maximum(&w, in, output)];
}

static void pk__max_pool_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t in = call->in_width[0], width = call->node->width, copies = call->copies;
    if (!call->accumulate[0])
        memset(call->in_cotangent[0], 0, call->rows * copies * in * sizeof(pk_real));
    for (size_t row = 0; row < call->rows; row++)
        for (size_t output = 0; output < width; output++) {
            const size_t at = pk__pool_maximum(&w, call->in[0] + row * in, output);
            for (size_t copy = row * copies; copy < (row + 1) * copies; copy++)
                call->in_cotangent[0][copy * in + at] += call->out_cotangent[copy * width + output];
        }
}

/* Whether the window in front of number at of a side, which starts stride earlier, has number last, too. */
static int pk__in_window_before(const pk__windows *w, int side, size_t at, size_t last)
{
    return at > 0 && last + w->pad[side] < (at - 1) * w->stride[side] + w->kernel[side];
}

/* Differences of the pairs of numbers that are in one window, each pair once: their number is pk__pool_pairs.
 * A pair that is in several windows is reported with the first of them. */
static size_t pk__pool_differences(const pk__windows *w, const pk_real *plane, pk_real *out)
{
    const size_t taps = w->kernel[0] * w->kernel[1];
    size_t count = 0;
    for (size_t y = 0; y < w->rows; y++)
        for (size_t x = 0; x < w->columns; x++)
            for (size_t a = 0; a < taps; a++)
                for (size_t b = a + 1; b < taps; b++) {
                    const size_t top = y * w->stride[0] - w->pad[0], left = x * w->stride[1] - w->pad[1];
                    const size_t row[2] = {top + a / w->kernel[1], top + b / w->kernel[1]};
                    const size_t column[2] = {left + a % w->kernel[1], left + b % w->kernel[1]};
                    if (row[0] >= w->height || row[1] >= w->height || column[0] >= w->width ||
                        column[1] >= w->width || pk__in_window_before(w, 0, y, row[1]) ||
                        pk__in_window_before(w, 1, x, pk__max(column[0], column[1])))
                        continue;
                    out[count++] = plane[row[0] * w->width + column[0]] - plane[row[1] * w->width + column[1]];
                }
    return count;
}

/* avg_pool K [stride=K] [pad=0]: PyTorch's AvgPool2d; padding counts as zeros. */
static void pk__average(const pk_call *call, const pk_real *in, pk_real *out)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real factor = (pk_real)(1 / ((double)w.kernel[0] * (double)w.kernel[1]));
    const size_t planes = call->rows * call->node->shape.dims[0];
    for (size_t plane = 0; plane < planes; plane++, in += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++)
            for (size_t x = 0; x < w.columns; x++) {
                pk_real sum = 0;
                for (size_t i = 0; i < w.kernel[0]; i++)
                    for (size_t j = 0; j < w.kernel[1]; j++) {
                        const size_t row = y * w.stride[0] + i - w.pad[0],
                                     column = x * w.stride[1] + j - w.pad[1];
                        if (row < w.height && column < w.width)
                            sum += in[row * w.width + column];
                    }
                *out++ = factor * sum;
            }
}

static void pk__average_reverse(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const pk_real factor = (pk_real)(1 / ((double)w.kernel[0] * (double)w.kernel[1]));
    const size_t planes = call->rows * call->copies * call->node->shape.dims[0];
    const pk_real *delta = call->out_cotangent;
    pk_real *to = call->in_cotangent[0];
    if (!call->accumulate[0])
        memset(to, 0, call->rows * call->copies * call->in_width[0] * sizeof *to);
    for (size_t plane = 0; plane < planes; plane++, to += w.height * w.width)
        for (size_t y = 0; y < w.rows; y++)
            for (size_t x = 0; x < w.columns; x++, delta++)
                for (size_t i = 0; i < w.kernel[0]; i++)
                    for (size_t j = 0; j < w.kernel[1]; j++) {
                        const size_t row = y * w.stride[0] + i - w.pad[0],
                                     column = x * w.stride[1] + j - w.pad[1];
                        if (row < w.height && column < w.width)
                            to[row * w.width + column] += factor * *delta;
                    }
}

static void pk__max_pool_forward(const pk_call *call)
{
    pk__pool_pick(call, call->in[0], call->out);
}

static void pk__max_pool_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__pool_pick(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* Of one side: the pairs (a, b) of numbers that are in one window, in either order and with themselves, and the numbers that
 * are in some window. Windows that reach over neither end are all alike: the work is in those that do. */
static void pk__side_pairs(const pk__windows *w, int side, double *pairs, double *numbers)
{
    const size_t size = side ? w->width : w->height, count = side ? w->columns : w->rows;
    const size_t kernel = w->kernel[side], stride = w->stride[side], pad = w->pad[side];
    /* Windows first .. past - 1 reach over no end. */
    const size_t first = pk__min(count, pk__blocks(pad, stride));
    const size_t past =
        pk__max(first, size + pad < kernel ? 0 : pk__min(count, (size + pad - kernel) / stride + 1));
    double some = 0;
    *numbers = 0;
    for (size_t at = 0, before = 0; at < count; at++) {
        const size_t start = at * stride, low = start < pad ? 0 : start - pad;
        const size_t high = pk__min(size, start + kernel < pad ? 0 : start + kernel - pad);
        const double in = high > low ? (double)(high - low) : 0,
                     both = before > low ? (double)(before - low) : 0;
        double times = 1;
        if (at > first && at < past) { /* this one, and those that are like it */
            times = (double)(past - at);
            at = past - 1;
        }
        before = times > 1 ? at * stride - pad + kernel : high;
        some += times * (in * (in + 1) - both * (both + 1)) / 2;
        *numbers += times * (in - both);
    }
    *pairs = 2 * some - *numbers;
}

/* The pairs of two numbers of a plane that are in one window: their rows are, and their columns. */
static double pk__pool_pairs(const pk__windows *w)
{
    double pairs[2], numbers[2];
    for (int side = 0; side < 2; side++)
        pk__side_pairs(w, side, &pairs[side], &numbers[side]);
    return (pairs[0] * pairs[1] - numbers[0] * numbers[1]) / 2;
}

static pk_status pk__max_pool_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__pool_shape(context, graph, node);
    if (status)
        return status;
    const pk__windows w = pk__pool_windows(node);
    const double taps = node->attributes[PK_POOL_KERNEL] * node->attributes[PK_POOL_KERNEL + 1];
    if (taps * taps * (double)w.rows * (double)w.columns * (double)node->shape.dims[0] > 1e9)
        return pk__fail(context, PK_UNSUPPORTED,
                        "max_pool: windows of %g numbers have too many pairs whose order would be watched",
                        taps);
    node->attributes[PK__POOL_SWITCHES] = (double)node->shape.dims[0] * pk__pool_pairs(&w);
    return PK_OK;
}

static size_t pk__max_pool_switch_count(const pk_node *node)
{
    return (size_t)node->attributes[PK__POOL_SWITCHES];
}

static void pk__max_pool_switches(const pk_call *call)
{
    const pk__windows w = pk__pool_windows(call->node);
    const size_t planes = call->rows * call->node->shape.dims[0];
    pk_real *out = call->out;
    for (size_t plane = 0; plane < planes; plane++)
        out += pk__pool_differences(&w, call->in[0] + plane * w.height * w.width, out);
}

static void pk__average_forward(const pk_call *call)
{
    pk__average(call, call->in[0], call->out);
}

static void pk__average_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__average(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* global_avg_pool: the mean of each channel, one number of it. */
static pk_status pk__global_average_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    pk_status status = pk__image_input(context, graph, node);
    for (int side = 0; side < 2; side++) {
        node->attributes[PK_POOL_KERNEL + side] = node->attributes[PK__IMAGE_HEIGHT + side];
        node->attributes[PK_POOL_STRIDE + side] = 1;
        node->attributes[PK_POOL_PAD + side] = 0;
    }
    node->shape.rank = 1;
    return status;
}

static const pk_option pk__convolution_options[] = {
    {"channels", PK_OPTION_NUMBER, PK_CONVOLUTION_CHANNELS, 1, 1, 1, 1e9, 1, NULL},
    {"kernel", PK_OPTION_PAIR, PK_CONVOLUTION_KERNEL, 2, 1, 1, 1e6, 1, NULL},
    {"stride", PK_OPTION_PAIR, PK_CONVOLUTION_STRIDE, 0, 0, 1, 1e6, 1, NULL},
    {"pad", PK_OPTION_PAIR, PK_CONVOLUTION_PAD, 0, 0, 0, 1e6, 1, NULL},
    {"dilation", PK_OPTION_PAIR, PK_CONVOLUTION_DILATION, 0, 0, 1, 1e6, 1, NULL},
    {"groups", PK_OPTION_NUMBER, PK_CONVOLUTION_GROUPS, 0, 0, 1, 1e9, 1, NULL},
    {"nobias", PK_OPTION_FLAG, PK_CONVOLUTION_BIAS, 0, 0, 0, 0, 0, NULL},
    PK__INITIAL_OPTIONS(PK_CONVOLUTION_INITIAL),
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__pool_options[] = {
    {"kernel", PK_OPTION_PAIR, PK_POOL_KERNEL, 1, 1, 1, 1e6, 1, NULL},
    {"stride", PK_OPTION_PAIR, PK_POOL_STRIDE, 0, 0, 0, 1e6, 1, NULL},
    {"pad", PK_OPTION_PAIR, PK_POOL_PAD, 0, 0, 0, 1e6, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

static const pk_operation pk__image_operations[] = {
    {"conv",
     PK_LINEAR,
     PK_TANGENT_OUTER,
     1,
     pk__convolution_options,
     {0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, PK_INITIAL_DEFAULT, 1, 0, 0, 0},
     pk__convolution_shape,
     pk__convolution_scratch,
     pk__convolution_forward,
     pk__convolution_tangent,
     pk__convolution_reverse,
     pk__convolution_weight_gradient,
     pk__convolution_row_gradients,
     NULL,
     NULL,
     0,
     NULL,
     pk__convolution_unfold,
     1,
     NULL,
     pk__convolution_initialize},
    {"max_pool",
     PK_PIECEWISE_LINEAR,
     PK_TANGENT_NONE,
     1,
     pk__pool_options,
     PK__NO_NUMBERS,
     pk__max_pool_shape,
     NULL,
     pk__max_pool_forward,
     pk__max_pool_tangent,
     pk__max_pool_reverse,
     NULL,
     NULL,
     pk__max_pool_switch_count,
     pk__max_pool_switches,
     0,
     NULL,
     NULL,
     0,
     NULL,
     NULL},
    {"avg_pool",
     PK_LINEAR,
     PK_TANGENT_NONE,
     1,
     pk__pool_options,
     PK__NO_NUMBERS,
     pk__pool_shape,
     NULL,
     pk__average_forward,
     pk__average_tangent,
     pk__average_reverse,
     NULL,
     NULL,
     NULL,
     NULL,
     0,
     NULL,
     NULL,
     0,
     NULL,
     NULL},
    PK__LINEAR_OPERATION("global_avg_pool", pk__global_average_shape, pk__average_forward, pk__average_tangent,
                         pk__average_reverse),
};

PK__END_CODE

/* pathkernel/network/norm.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* sum_i a_i b_i, b NULL: sum_i a_i. Four chains, since one would wait for each sum; the order is fixed. */
PK__PRIVATE double pk__sum_products(size_t count, const pk_real *a, const pk_real *b)
{
    double part[4] = {0, 0, 0, 0};
    size_t i = 0;
    if (b) {
        for (; i + 4 <= count; i += 4)
            for (size_t k = 0; k < 4; k++)
                part[k] += (double)a[i + k] * b[i + k];
        for (; i < count; i++)
            part[0] += (double)a[i] * b[i];
    } else {
        for (; i + 4 <= count; i += 4)
            for (size_t k = 0; k < 4; k++)
                part[k] += a[i + k];
        for (; i < count; i++)
            part[0] += a[i];
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

/* The numbers of the trailing dims dimensions of a node's values; 0 where it has fewer dimensions. */
static size_t pk__trailing(const pk_shape *shape, double dims)
{
    size_t count = 1;
    if (dims > shape->rank)
        return 0;
    for (int i = shape->rank - (int)dims; i < shape->rank; i++)
        count *= shape->dims[i];
    return count;
}

static pk_status pk__check_trailing(pk_context *context, const char *name, const pk_shape *shape, double dims)
{
    char text[PK_SHAPE_TEXT];
    return dims <= shape->rank ? PK_OK
                               : pk__fail(context, PK_SHAPE, "%s: dims is %g, but its values are %s", name,
                                          dims, pk_shape_text(shape, text));
}

/* ---- normalize, rms_normalize ----------------------------------------------------------------------- */

/* Over n numbers, normalize: y = (x - mean) / s, s^2 = mean((x - mean)^2) + epsilon (Ba et al. 2016, eq. 3),
 * and rms_normalize: y = x / s, s^2 = mean(x^2) + epsilon (Zhang & Sennrich 2019, eq. 4). For both the
 * Jacobian is symmetric: J v = (v - [mean(v)] - y mean(y v)) / s, where the first mean is normalize's alone.
 * */
static pk_status pk__normalize_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    node->shape = graph->nodes[node->inputs[0]].shape;
    return pk__check_trailing(context, node->operation->name, &node->shape, node->attributes[PK_NORM_DIMS]);
}

/* Where one group of numbers stands: y = (x - shift - rest) / root. */
typedef struct pk__norm {
    size_t count, groups; /* numbers of a group, groups of a row */
    int centred;
    double shift, rest, root;
} pk__norm;

static void pk__norm_begin(const pk_node *node, int centred, pk__norm *norm)
{
    norm->count = pk__trailing(&node->shape, node->attributes[PK_NORM_DIMS]);
    norm->groups = node->width / norm->count;
    norm->centred = centred;
    norm->shift = norm->rest = 0;
}

static double pk__norm_mean(const pk__norm *norm, const pk_real *a, const pk_real *b)
{
    return pk__sum_products(norm->count, a, b) / (double)norm->count;
}

/* mean_i of x_i - shift - rest, or of its square. */
static double pk__mean_deviation(size_t count, const pk_real *x, double shift, double rest, int square)
{
    double part[4] = {0, 0, 0, 0};
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (size_t k = 0; k < 4; k++) {
            const double deviation = (x[i + k] - shift) - rest;
            part[k] += square ? deviation * deviation : deviation;
        }
    for (; i < count; i++) {
        const double deviation = (x[i] - shift) - rest;
        part[0] += square ? deviation * deviation : deviation;
    }
    return ((part[0] + part[1]) + (part[2] + part[3])) / (double)count;
}

/* The mean in two parts, since the sum of a large mean and small deviations has lost the mean's last digits:
 * of equal numbers every deviation is zero. */
static void pk__norm_group(const pk_node *node, const pk_real *x, pk__norm *norm)
{
    if (norm->centred) {
        norm->shift = pk__mean_deviation(norm->count, x, 0, 0, 0);
        norm->rest = pk__mean_deviation(norm->count, x, norm->shift, 0, 0);
    }
    norm->root = sqrt(pk__mean_deviation(norm->count, x, norm->shift, norm->rest, 1) +
                      node->attributes[PK_NORM_EPSILON]);
}

static void pk__norm_forward(const pk_call *call, int centred)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const pk_real *x = call->in[0];
    pk_real *y = call->out;
    for (size_t group = 0; group < call->rows * norm.groups; group++, x += norm.count, y += norm.count) {
        pk__norm_group(call->node, x, &norm);
        for (size_t i = 0; i < norm.count; i++)
            y[i] = (pk_real)(((x[i] - norm.shift) - norm.rest) / norm.root);
    }
}

/* to (+)= J from, for each of copies vectors of each row. */
static void pk__norm_jacobian(const pk_call *call, int centred, size_t copies, const pk_real *from,
                              int accumulate, pk_real *to)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const size_t width = call->node->width, count = norm.count;
    for (size_t group = 0; group < call->rows * norm.groups; group++) {
        const size_t at = group * count, row = group / norm.groups;
        const pk_real *y = call->out + at;
        pk__norm_group(call->node, call->in[0] + at, &norm);
        for (size_t copy = 0; copy < copies; copy++) {
            const size_t place = (row * copies + copy) * width + (at - row * width);
            const pk_real *v = from + place;
            pk_real *out = to + place;
            const double mean = centred ? pk__norm_mean(&norm, v, NULL) : 0, along = pk__norm_mean(&norm, v, y);
            for (size_t i = 0; i < count; i++) {
                const double value = ((v[i] - mean) - y[i] * along) / norm.root;
                out[i] = (pk_real)(accumulate ? out[i] + value : value);
            }
        }
    }
}

/* With a dot for the derivative along the tangent v: s. = mean(y v), y. = J v, so
 * (J u). = -(s. J u + y. mean(u y) + y mean(u y.)) / s. */
static void pk__norm_curvature(const pk_call *call, int centred)
{
    pk__norm norm;
    pk__norm_begin(call->node, centred, &norm);
    const size_t width = call->node->width, count = norm.count;
    for (size_t group = 0; call->in_tangent[0] && group < call->rows * norm.groups; group++) {
        const size_t at = group * count, row = group / norm.groups;
        const pk_real *y = call->out + at, *v = call->in_tangent[0] + at;
        pk__norm_group(call->node, call->in[0] + at, &norm);
        const double mean_v = centred ? pk__norm_mean(&norm, v, NULL) : 0,
                     root_dot = pk__norm_mean(&norm, v, y);
        for (size_t copy = 0; copy < call->copies; copy++) {
            const size_t place = (row * call->copies + copy) * width + (at - row * width);
            const pk_real *u = call->out_cotangent + place;
            pk_real *out = call->in_cotangent[0] + place;
            const double mean_u = centred ? pk__norm_mean(&norm, u, NULL) : 0,
                         along = pk__norm_mean(&norm, u, y);
            double along_dot = 0;
            for (size_t i = 0; i < count; i++)
                along_dot += u[i] * ((v[i] - mean_v) - y[i] * root_dot);
            along_dot /= (double)count * norm.root;
            for (size_t i = 0; i < count; i++) {
                const double y_dot = ((v[i] - mean_v) - y[i] * root_dot) / norm.root;
                const double slope = ((u[i] - mean_u) - y[i] * along) / norm.root;
                out[i] -= (pk_real)((root_dot * slope + y_dot * along + y[i] * along_dot) / norm.root);
            }
        }
    }
}

static void pk__norm_tangent(const pk_call *call, int centred)
{
    if (call->in_tangent[0])
        pk__norm_jacobian(call, centred, 1, call->in_tangent[0], 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

#define PK__NORM(name, centred)                                                                  \
    static void pk__##name##_forward(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_forward(call, centred);                                                         \
    }                                                                                            \
    static void pk__##name##_tangent(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_tangent(call, centred);                                                         \
    }                                                                                            \
    static void pk__##name##_reverse(const pk_call *call)                                        \
    {                                                                                            \
        pk__norm_jacobian(call, centred, call->copies, call->out_cotangent, call->accumulate[0], \
                          call->in_cotangent[0]);                                                \
    }                                                                                            \
    static void pk__##name##_curvature(const pk_call *call)                                      \
    {                                                                                            \
        pk__norm_curvature(call, centred);                                                       \
    }
PK__NORM(normalize, 1)
PK__NORM(rms_normalize, 0)
#undef PK__NORM

/* ---- standardize ------------------------------------------------------------------------------------ */

/* y = (x - mean_c) / sqrt(variance_c + epsilon) with the channel c the first dimension; its constants are the
 * means, then the variances: batch norm with fixed statistics (Ioffe & Szegedy 2015, algorithm 2). */
static pk_status pk__standardize_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    node->shape = graph->nodes[node->inputs[0]].shape;
    const size_t channels = node->shape.dims[0];
    if (node->constant_count != 2 * channels)
        return pk__fail(context, PK_SHAPE,
                        "standardize: %zu numbers are no mean and variance for each of %zu channels",
                        node->constant_count, channels);
    for (size_t c = 0; c < channels; c++)
        if (!(node->constants[channels + c] >= 0) ||
            !(node->constants[channels + c] + node->attributes[PK_NORM_EPSILON] > 0))
            return pk__fail(context, PK_ARGUMENT,
                            "standardize: channel %zu has the variance %g; with epsilon %g it must be positive",
                            c, (double)node->constants[channels + c], node->attributes[PK_NORM_EPSILON]);
    return PK_OK;
}

/* to (+)= (from - shift mean) / root, for each of count rows. */
static void pk__standardize(const pk_node *node, size_t count, int shift, const pk_real *from, int accumulate,
                            pk_real *to)
{
    const size_t channels = node->shape.dims[0], each = node->width / channels;
    for (size_t row = 0; row < count; row++)
        for (size_t c = 0; c < channels; c++, from += each, to += each) {
            const double mean = shift ? node->constants[c] : 0;
            const double root = sqrt(node->constants[channels + c] + node->attributes[PK_NORM_EPSILON]);
            for (size_t i = 0; i < each; i++) {
                const double value = (from[i] - mean) / root;
                to[i] = (pk_real)(accumulate ? to[i] + value : value);
            }
        }
}

static void pk__standardize_forward(const pk_call *call)
{
    pk__standardize(call->node, call->rows, 1, call->in[0], 0, call->out);
}

static void pk__standardize_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__standardize(call->node, call->rows, 0, call->in_tangent[0], 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__standardize_reverse(const pk_call *call)
{
    pk__standardize(call->node, call->rows * call->copies, 0, call->out_cotangent, call->accumulate[0],
                    call->in_cotangent[0]);
}

/* ---- affine ----------------------------------------------------------------------------------------- */

/* y = gamma x + beta: a gamma, and a beta, for each number of the trailing dims dimensions, or (dims 0) for
 * each channel. Weights: gamma, then beta. */
static pk_status pk__affine_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double dims = node->attributes[PK_AFFINE_DIMS];
    node->shape = graph->nodes[node->inputs[0]].shape;
    node->weight_count = dims == 0 ? node->shape.dims[0] : pk__trailing(&node->shape, dims);
    if (node->attributes[PK_AFFINE_BIAS] != 0)
        node->weight_count *= 2; /* at most twice the input's width, which is far from overflow */
    return pk__check_trailing(context, "affine", &node->shape, dims);
}

static void pk__affine_initialize(const pk_node *node, pk_random *random, pk_real *weights)
{
    const int biased = node->attributes[PK_AFFINE_BIAS] != 0;
    (void)random;
    for (size_t i = 0; i < node->weight_count; i++)
        weights[i] = !biased || i < node->weight_count / 2;
}

/* A row is outer x count x each numbers, of which each slice [o][j] has the gamma j. */
typedef struct pk__affine {
    size_t outer, count, each;
    int biased;
} pk__affine;

static pk__affine pk__affine_layout(const pk_node *node)
{
    pk__affine layout;
    layout.biased = node->attributes[PK_AFFINE_BIAS] != 0;
    layout.count = layout.biased ? node->weight_count / 2 : node->weight_count;
    layout.each = node->attributes[PK_AFFINE_DIMS] == 0 ? node->width / layout.count : 1;
    layout.outer = node->width / layout.count / layout.each;
    return layout;
}

/* to (+)= gamma from (+ beta), for each of count rows. */
static void pk__affine_apply(const pk_node *node, size_t count, const pk_real *weights, const pk_real *from,
                             int bias, int accumulate, pk_real *to)
{
    const pk__affine layout = pk__affine_layout(node);
    const pk_real *beta = bias && layout.biased ? weights + layout.count : NULL;
    for (size_t slice = 0; slice < count * layout.outer; slice++) {
        for (size_t j = 0; layout.each == 1 && j < layout.count; j++)
            to[j] = (accumulate ? to[j] : 0) + (weights[j] * from[j] + (beta ? beta[j] : 0));
        for (size_t j = 0; layout.each > 1 && j < layout.count; j++) {
            const pk_real gamma = weights[j], shift = beta ? beta[j] : 0;
            for (size_t i = j * layout.each; i < (j + 1) * layout.each; i++)
                to[i] = (accumulate ? to[i] : 0) + (gamma * from[i] + shift);
        }
        from += layout.count * layout.each;
        to += layout.count * layout.each;
    }
}

/* gradient += (dF/dw)^T delta of one row x. */
static void pk__affine_gradient(const pk__affine *layout, const pk_real *x, const pk_real *delta,
                                pk_real *gradient)
{
    const size_t count = layout->count, each = layout->each;
    for (size_t slice = 0; slice < layout->outer; slice++, x += count * each, delta += count * each) {
        for (size_t j = 0; each == 1 && j < count; j++)
            gradient[j] += x[j] * delta[j];
        for (size_t j = 0; each > 1 && j < count; j++)
            gradient[j] += (pk_real)pk__sum_products(each, x + j * each, delta + j * each);
        for (size_t j = 0; each == 1 && layout->biased && j < count; j++)
            gradient[count + j] += delta[j];
        for (size_t j = 0; each > 1 && layout->biased && j < count; j++)
            gradient[count + j] += (pk_real)pk__sum_products(each, delta + j * each, NULL);
    }
}

static void pk__affine_forward(const pk_call *call)
{
    pk__affine_apply(call->node, call->rows, call->weights, call->in[0], 1, 0, call->out);
}

static void pk__affine_tangent(const pk_call *call)
{
    if (call->direction)
        pk__affine_apply(call->node, call->rows, call->direction, call->in[0], 1, 0, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    if (call->in_tangent[0])
        pk__affine_apply(call->node, call->rows, call->weights, call->in_tangent[0], 0, 1, call->out_tangent);
}

static void pk__affine_reverse(const pk_call *call)
{
    pk__affine_apply(call->node, call->rows * call->copies, call->weights, call->out_cotangent, 0,
                     call->accumulate[0], call->in_cotangent[0]);
}

static void pk__affine_weight_gradient(const pk_call *call)
{
    const pk__affine layout = pk__affine_layout(call->node);
    const size_t width = call->node->width;
    for (size_t row = 0; row < call->rows; row++)
        pk__affine_gradient(&layout, call->in[0] + row * width, call->out_cotangent + row * width,
                            call->gradient);
}

static void pk__affine_row_gradients(const pk_call *call)
{
    const pk__affine layout = pk__affine_layout(call->node);
    const size_t width = call->node->width, weights = call->node->weight_count;
    memset(call->gradient, 0, call->rows * call->copies * weights * sizeof(pk_real));
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        pk__affine_gradient(&layout, call->in[0] + copy / call->copies * width,
                            call->out_cotangent + copy * width, call->gradient + copy * weights);
}

/* ---- softmax, log_softmax --------------------------------------------------------------------------- */

/* p_i = exp(x_i) / sum_j exp(x_j) and y_i = log p_i, over the last dimension. */
static size_t pk__last_dimension(const pk_node *node)
{
    return node->shape.dims[node->shape.rank - 1];
}

static size_t pk__softmax_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return pk__last_dimension(node);
}

static size_t pk__largest_at(size_t count, const pk_real *x)
{
    size_t at = 0;
    for (size_t i = 1; i < count; i++)
        at = x[i] > x[at] ? i : at;
    return at;
}

/* p = softmax(x) of count numbers; may be in place. */
PK__PRIVATE void pk__softmax_row(size_t count, const pk_real *x, pk_real *p)
{
    const pk_real most = x[pk__largest_at(count, x)];
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        p[i] = x[i] - most;
    pk__elementary_reals(pk__all_exponential, count, 1, p, p);
    for (size_t i = 0; i < count; i++)
        sum += p[i];
    for (size_t i = 0; i < count; i++)
        p[i] = (pk_real)(p[i] / sum);
}

/* The largest term of the sum is 1: log1p of the others keeps the logarithm of a p near 1. */
static void pk__log_softmax_forward(const pk_call *call)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    for (size_t at = 0; at < all; at += count) {
        const pk_real *x = call->in[0] + at;
        pk_real *y = call->out + at;
        const size_t first = pk__largest_at(count, x);
        double others = 0;
        for (size_t i = 0; i < count; i++)
            y[i] = x[i] - x[first];
        pk__elementary_reals(pk__all_exponential, count, 1, y, y);
        for (size_t i = 0; i < count; i++)
            others += i == first ? 0 : (double)y[i];
        const double logarithm = log1p(others);
        for (size_t i = 0; i < count; i++)
            y[i] = (pk_real)((double)(x[i] - x[first]) - logarithm);
    }
}

/* The p of the slice at `at`. */
static const pk_real *pk__probabilities(const pk_call *call, int logarithm, size_t at)
{
    const size_t count = pk__last_dimension(call->node);
    if (!logarithm)
        return call->out + at;
    pk__elementary_reals(pk__all_exponential, count, 1, call->out + at, call->scratch);
    return call->scratch;
}

/* softmax: p. = p o (x. - p . x.); log_softmax: y. = x. - p . x. */
static void pk__softmax_tangents(const pk_call *call, int logarithm)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    const pk_real *v = call->in_tangent[0];
    if (!v)
        memset(call->out_tangent, 0, all * sizeof(pk_real));
    for (size_t at = 0; v && at < all; at += count) {
        const pk_real *p = pk__probabilities(call, logarithm, at);
        const double mean = pk__sum_products(count, p, v + at);
        for (size_t i = 0; i < count; i++)
            call->out_tangent[at + i] = (pk_real)((v[at + i] - mean) * (logarithm ? 1 : p[i]));
    }
}

/* softmax: p o (u - p . u); log_softmax: u - p sum(u). With second their derivatives along the tangent, of
 * which p. = p o (v - p . v): p. o (u - p . u) - p (p. . u), and -p. sum(u). Where the largest p is nearly 1, nothing
 * cancels: u enters by its differences to the u of that p, and 1 - p is taken from log p. */
static void pk__softmax_cotangents(const pk_call *call, int logarithm, int second)
{
    const size_t count = pk__last_dimension(call->node), width = call->node->width;
    const int accumulate = second || call->accumulate[0];
    if (second && !call->in_tangent[0])
        return;
    for (size_t at = 0; at < call->rows * width; at += count) {
        const size_t row = at / width;
        const pk_real *p = pk__probabilities(call, logarithm, at),
                      *v = second ? call->in_tangent[0] + at : NULL;
        const double mean_v = second ? pk__sum_products(count, p, v) : 0;
        const size_t top = pk__largest_at(count, p);
        const double rest = logarithm && !second ? -expm1((double)call->out[at + top]) : 0;
        for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
            const pk_real *u = call->out_cotangent + copy * width + (at - row * width);
            pk_real *to = call->in_cotangent[0] + copy * width + (at - row * width);
            const double base = logarithm ? 0 : u[top];
            double sum = 0, mean_dot = 0;
            for (size_t i = 0; i < count; i++)
                sum += i == top ? 0 : logarithm ? (double)u[i] : p[i] * (u[i] - base);
            const double others = sum;
            sum += logarithm ? (double)u[top] : base;
            for (size_t i = 0; second && !logarithm && i < count; i++)
                mean_dot += p[i] * (v[i] - mean_v) * u[i];
            for (size_t i = 0; i < count; i++) {
                double value = logarithm ? u[i] - p[i] * sum : p[i] * (u[i] - base - others);
                if (logarithm && i == top)
                    value = u[i] * rest - p[i] * others;
                if (second) {
                    const double p_dot = p[i] * (v[i] - mean_v);
                    value = logarithm ? -p_dot * sum : p_dot * (u[i] - sum) - p[i] * mean_dot;
                }
                to[i] = (pk_real)(accumulate ? to[i] + value : value);
            }
        }
    }
}

static void pk__softmax_forward(const pk_call *call)
{
    const size_t count = pk__last_dimension(call->node), all = call->rows * call->node->width;
    for (size_t at = 0; at < all; at += count)
        pk__softmax_row(count, call->in[0] + at, call->out + at);
}

#define PK__SOFTMAX(name, logarithm)                        \
    static void pk__##name##_tangent(const pk_call *call)   \
    {                                                       \
        pk__softmax_tangents(call, logarithm);              \
    }                                                       \
    static void pk__##name##_reverse(const pk_call *call)   \
    {                                                       \
        pk__softmax_cotangents(call, logarithm, 0);         \
    }                                                       \
    static void pk__##name##_curvature(const pk_call *call) \
    {                                                       \
        pk__softmax_cotangents(call, logarithm, 1);         \
    }
PK__SOFTMAX(softmax, 0)
PK__SOFTMAX(log_softmax, 1)
#undef PK__SOFTMAX

/* ---- the table -------------------------------------------------------------------------------------- */

static const pk_option pk__normalize_options[] = {
    {"epsilon", PK_OPTION_NUMBER, PK_NORM_EPSILON, 0, 0, 0, DBL_MAX, 0, NULL},
    {"dims", PK_OPTION_NUMBER, PK_NORM_DIMS, 0, 0, 1, PK_SHAPE_RANK, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__standardize_options[] = {
    {"epsilon", PK_OPTION_NUMBER, PK_NORM_EPSILON, 0, 0, 0, DBL_MAX, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__affine_options[] = {
    {"nobias", PK_OPTION_FLAG, PK_AFFINE_BIAS, 0, 0, 0, 0, 0, NULL},
    {"dims", PK_OPTION_NUMBER, PK_AFFINE_DIMS, 0, 0, 0, PK_SHAPE_RANK, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

#define PK__NORM_OPERATION(name, text, kind, form, options, first, second, shape, scratch, gradient, rows,   \
                           curvature, initialize)                                                            \
    {                                                                                                        \
        text, kind, form, 1, options, {first, second, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, shape,      \
            scratch, pk__##name##_forward, pk__##name##_tangent, pk__##name##_reverse, gradient, rows, NULL, \
            NULL, 0, curvature, NULL, 0, NULL, initialize                                                    \
    }

/* rms_normalize: the epsilon of torch.nn.RMSNorm in double precision, torch.finfo(torch.float64).eps. */
static const pk_operation pk__norm_operations[] = {
    PK__NORM_OPERATION(normalize, "normalize", PK_SMOOTH, PK_TANGENT_NONE, pk__normalize_options, 1e-5, 1,
                       pk__normalize_shape, NULL, NULL, NULL, pk__normalize_curvature, NULL),
    PK__NORM_OPERATION(rms_normalize, "rms_normalize", PK_SMOOTH, PK_TANGENT_NONE, pk__normalize_options,
                       2.220446049250313e-16, 1, pk__normalize_shape, NULL, NULL, NULL,
                       pk__rms_normalize_curvature, NULL),
    PK__NORM_OPERATION(standardize, "standardize", PK_LINEAR, PK_TANGENT_NONE, pk__standardize_options, 1e-5, 0,
                       pk__standardize_shape, NULL, NULL, NULL, NULL, NULL),
    PK__NORM_OPERATION(affine, "affine", PK_LINEAR, PK_TANGENT_ROWS, pk__affine_options, 1, 1, pk__affine_shape,
                       NULL, pk__affine_weight_gradient, pk__affine_row_gradients, NULL, pk__affine_initialize),
    PK__NORM_OPERATION(softmax, "softmax", PK_SMOOTH, PK_TANGENT_NONE, NULL, 0, 0, pk__same_shape,
                       pk__softmax_scratch, NULL, NULL, pk__softmax_curvature, NULL),
    PK__NORM_OPERATION(log_softmax, "log_softmax", PK_SMOOTH, PK_TANGENT_NONE, NULL, 0, 0, pk__same_shape,
                       pk__softmax_scratch, NULL, NULL, pk__log_softmax_curvature, NULL),
};
#undef PK__NORM_OPERATION

PK__END_CODE

/* pathkernel/network/sequence.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- embedding -------------------------------------------------------------------------------------- */

/* y_i = w[x_i] for the tokens x_i of a row of data, w (tokens, width). */
static pk_status pk__embedding_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_node *input = &graph->nodes[node->inputs[0]];
    const size_t tokens = (size_t)node->attributes[PK_EMBEDDING_TOKENS],
                 width = (size_t)node->attributes[PK_EMBEDDING_WIDTH];
    char text[PK_SHAPE_TEXT];
    if (node->inputs[0] != 0 || input->shape.rank != 1)
        return pk__fail(
            context, PK_SHAPE, "embedding takes the data, a row of whole numbers such as 'input 3', not %s%s",
            pk_shape_text(&input->shape, text), node->inputs[0] ? " values behind other layers" : "");
    node->shape.rank = 2;
    node->shape.dims[0] = input->width;
    node->shape.dims[1] = width;
    if (!pk__multiply(tokens, width, &node->weight_count))
        return pk__fail(context, PK_OVERFLOW, "embedding: its weights overflow");
    return PK_OK;
}

static pk_status pk__embedding_check(pk_context *context, const pk_node *node, size_t row, const pk_real *in)
{
    pk_status status = PK_OK;
    for (size_t i = 0; i < node->shape.dims[0] && !status; i++)
        status = pk__check_token(context, "embedding", row, i, in[i], node->attributes[PK_EMBEDDING_TOKENS]);
    return status;
}

/* Where a token's weights start; what is no token counts as the first: pk_graph_check_inputs refuses it. */
static size_t pk__embedded(const pk_node *node, double token)
{
    return token >= 0 && token < node->attributes[PK_EMBEDDING_TOKENS] ? (size_t)token * node->shape.dims[1]
                                                                       : 0;
}

static void pk__embedding_rows(const pk_call *call, const pk_real *weights, pk_real *to)
{
    const size_t width = call->node->shape.dims[1];
    for (size_t i = 0; i < call->rows * call->in_width[0]; i++)
        memcpy(to + i * width, weights + pk__embedded(call->node, call->in[0][i]), width * sizeof *to);
}

static void pk__embedding_forward(const pk_call *call)
{
    pk__embedding_rows(call, call->weights, call->out);
}

static void pk__embedding_tangent(const pk_call *call)
{
    if (call->direction)
        pk__embedding_rows(call, call->direction, call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* gradient += (dF/dw)^T delta of the row. */
static void pk__embedding_add(const pk_call *call, size_t row, const pk_real *delta, pk_real *gradient)
{
    const size_t tokens = call->in_width[0], width = call->node->shape.dims[1];
    for (size_t i = 0; i < tokens; i++)
        pk__give(width, delta + i * width, 1,
                 gradient + pk__embedded(call->node, call->in[0][row * tokens + i]));
}

static void pk__embedding_weight_gradient(const pk_call *call)
{
    for (size_t row = 0; row < call->rows; row++)
        pk__embedding_add(call, row, call->out_cotangent + row * call->node->width, call->gradient);
}

static void pk__embedding_row_gradients(const pk_call *call)
{
    const size_t weights = call->node->weight_count;
    memset(call->gradient, 0, call->rows * call->copies * weights * sizeof(pk_real));
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        pk__embedding_add(call, copy / call->copies, call->out_cotangent + copy * call->node->width,
                          call->gradient + copy * weights);
}

/* ---- token, mean_tokens ----------------------------------------------------------------------------- */

static pk_status pk__tokens_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *shape = &graph->nodes[node->inputs[0]].shape;
    char text[PK_SHAPE_TEXT];
    if (shape->rank != 2)
        return pk__fail(context, PK_SHAPE, "%s needs values of tokens x width, not %s", node->operation->name,
                        pk_shape_text(shape, text));
    node->shape.rank = 1;
    node->shape.dims[0] = shape->dims[1];
    return PK_OK;
}

/* token I: y = x_I; a negative I counts from the end. */
static pk_status pk__token_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const double tokens = (double)graph->nodes[node->inputs[0]].shape.dims[0];
    const double index = node->attributes[PK_TOKEN_INDEX];
    pk_status status = pk__tokens_shape(context, graph, node);
    if (!status && !(index >= -tokens && index < tokens))
        status = pk__fail(context, PK_SHAPE, "token %g: there are %g tokens", index, tokens);
    return status;
}

/* Where the token starts in a row of its input. */
static size_t pk__token_start(const pk_call *call)
{
    const double index = call->node->attributes[PK_TOKEN_INDEX];
    return index >= 0 ? (size_t)index * call->node->width
                      : call->in_width[0] - (size_t)-index * call->node->width;
}

static void pk__token_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width, start = pk__token_start(call);
    for (size_t row = 0; row < call->rows; row++)
        memcpy(to + row * width, from + row * call->in_width[0] + start, width * sizeof *to);
}

static void pk__token_forward(const pk_call *call)
{
    pk__token_rows(call, call->in[0], call->out);
}

static void pk__token_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__token_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

static void pk__token_reverse(const pk_call *call)
{
    const size_t width = call->node->width, in = call->in_width[0], start = pk__token_start(call);
    for (size_t copy = 0; copy < call->rows * call->copies; copy++) {
        pk_real *to = call->in_cotangent[0] + copy * in;
        if (!call->accumulate[0])
            memset(to, 0, in * sizeof *to);
        pk__give(width, call->out_cotangent + copy * width, 1, to + start);
    }
}

/* mean_tokens: y = the mean of the tokens. */
static void pk__mean_rows(const pk_call *call, const pk_real *from, pk_real *to)
{
    const size_t width = call->node->width, tokens = call->in_width[0] / width;
    for (size_t row = 0; row < call->rows; row++, to += width) {
        for (size_t i = 0; i < tokens; i++, from += width)
            pk__give(width, from, i > 0, to);
        for (size_t j = 0; j < width; j++)
            to[j] /= (pk_real)tokens;
    }
}

static void pk__mean_tokens_reverse(const pk_call *call)
{
    const size_t width = call->node->width, tokens = call->in_width[0] / width;
    pk_real *to = call->in_cotangent[0];
    for (size_t copy = 0; copy < call->rows * call->copies; copy++)
        for (size_t i = 0; i < tokens; i++, to += width)
            for (size_t j = 0; j < width; j++)
                to[j] =
                    (call->accumulate[0] ? to[j] : 0) + call->out_cotangent[copy * width + j] / (pk_real)tokens;
}

static void pk__mean_tokens_forward(const pk_call *call)
{
    pk__mean_rows(call, call->in[0], call->out);
}

static void pk__mean_tokens_tangent(const pk_call *call)
{
    if (call->in_tangent[0])
        pk__mean_rows(call, call->in_tangent[0], call->out_tangent);
    else
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
}

/* ---- attend ----------------------------------------------------------------------------------------- */

/* Each head, a slice of the width d = E / heads: O = P V, P = softmax(Q K^T / sqrt(d)) by rows (Vaswani et
 * al. 2017, eq. 1); causal: token i sees tokens 0 .. i, the softmax is over these. A row of the input is Q, K
 * and V side by side (tokens x 3E), or, shared, all three at once (tokens x E). */
static pk_status pk__attend_shape(pk_context *context, const pk_graph *graph, pk_node *node)
{
    const pk_shape *shape = &graph->nodes[node->inputs[0]].shape;
    const size_t heads = (size_t)node->attributes[PK_ATTEND_HEADS];
    const size_t parts = node->attributes[PK_ATTEND_SHARED] != 0 ? 1 : 3;
    char text[PK_SHAPE_TEXT];
    size_t scores = 0;
    if (shape->rank != 2)
        return pk__fail(context, PK_SHAPE, "attend needs values of tokens x width, not %s",
                        pk_shape_text(shape, text));
    if (shape->dims[1] % parts || shape->dims[1] / parts % heads)
        return pk__fail(context, PK_SHAPE, "attention: a width of %zu%s cannot be split into %zu heads",
                        shape->dims[1], parts == 3 ? " for queries, keys and values" : "", heads);
    if (!pk__multiply(shape->dims[0], shape->dims[0], &scores) || scores > SIZE_MAX / 4096)
        return pk__fail(context, PK_OVERFLOW, "attention over %zu tokens: the scores overflow", shape->dims[0]);
    node->shape.rank = 2;
    node->shape.dims[0] = shape->dims[0];
    node->shape.dims[1] = shape->dims[1] / parts;
    return PK_OK;
}

/* P and, for the derivatives, three more matrices of one head of one row. */
static size_t pk__attend_scratch(const pk_node *node, size_t rows, size_t copies)
{
    (void)rows, (void)copies;
    return 4 * node->shape.dims[0] * node->shape.dims[0];
}

/* The sizes, and where a head's queries, keys and values start in a row. */
typedef struct pk__heads {
    size_t heads, tokens, depth; /* of a head */
    size_t in, out;              /* width of a token */
    size_t key, value;           /* the query is at 0 */
    pk_real scale;
    int causal, shared;
} pk__heads;

static pk__heads pk__attend_heads(const pk_node *node)
{
    pk__heads h;
    h.heads = (size_t)node->attributes[PK_ATTEND_HEADS];
    h.causal = node->attributes[PK_ATTEND_CAUSAL] != 0;
    h.shared = node->attributes[PK_ATTEND_SHARED] != 0;
    h.tokens = node->shape.dims[0];
    h.out = node->shape.dims[1];
    h.in = h.shared ? h.out : 3 * h.out;
    h.depth = h.out / h.heads;
    h.key = h.shared ? 0 : h.out;
    h.value = 2 * h.key;
    h.scale = (pk_real)(1 / sqrt((double)h.depth));
    return h;
}

/* C := beta C + alpha op(A) B, or op(A) B^T where A is not transposed. Heads of a few short tokens are too
 * small for a library's product. */
static void pk__attend_product(int transpose_a, int transpose_b, size_t m, size_t n, size_t k, pk_real alpha,
                               const pk_real *a, size_t lda, const pk_real *b, size_t ldb, pk_real beta,
                               pk_real *c, size_t ldc)
{
    if (m * n * k > 8192) {
        pk__gemm(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    const size_t down = transpose_a ? 1 : lda, along = transpose_a ? lda : 1;
    for (size_t i = 0; i < m; i++, a += down, c += ldc) {
        if (transpose_b) {
            for (size_t j = 0; j < n; j++)
                c[j] = (beta == 0 ? 0 : beta * c[j]) + alpha * (pk_real)pk__sum_products(k, a, b + j * ldb);
            continue;
        }
        if (beta != 1)
            for (size_t j = 0; j < n; j++)
                c[j] = beta == 0 ? 0 : beta * c[j];
        for (size_t l = 0; l < k; l++) {
            const pk_real factor = alpha * a[l * along], *row = b + l * ldb;
            for (size_t j = 0; j < n; j++)
                c[j] += factor * row[j];
        }
    }
}

/* tokens x tokens = beta to + alpha a b^T, of slices of a head, and tokens x depth += alpha op(p) b. */
static void pk__scores(const pk__heads *h, pk_real alpha, const pk_real *a, size_t lda, const pk_real *b,
                       size_t ldb, pk_real beta, pk_real *to)
{
    pk__attend_product(0, 1, h->tokens, h->tokens, h->depth, alpha, a, lda, b, ldb, beta, to, h->tokens);
}

static void pk__mix(const pk__heads *h, int transpose, pk_real alpha, const pk_real *p, const pk_real *b,
                    size_t ldb, pk_real beta, pk_real *to, size_t ldto)
{
    pk__attend_product(transpose, 0, h->tokens, h->depth, h->tokens, alpha, p, h->tokens, b, ldb, beta, to,
                       ldto);
}

/* The tokens that token i sees. */
static size_t pk__seen(const pk__heads *h, size_t i)
{
    return h->causal ? i + 1 : h->tokens;
}

/* P of the head whose query starts at x. */
static void pk__attend_weights(const pk__heads *h, const pk_real *x, pk_real *p)
{
    pk__scores(h, h->scale, x, h->in, x + h->key, h->in, 0, p);
    for (size_t i = 0; i < h->tokens; i++, p += h->tokens) {
        const size_t seen = pk__seen(h, i);
        pk__softmax_row(seen, p, p);
        memset(p + seen, 0, (h->tokens - seen) * sizeof *p);
    }
}

/* s := p o (s - p . s) by rows: the softmax's tangent and cotangent. */
static void pk__attend_jacobian(const pk__heads *h, const pk_real *p, pk_real *s)
{
    for (size_t i = 0; i < h->tokens; i++, p += h->tokens, s += h->tokens) {
        const size_t seen = pk__seen(h, i);
        const double mean = pk__sum_products(seen, p, s);
        for (size_t j = 0; j < seen; j++)
            s[j] = (pk_real)(p[j] * (s[j] - mean));
        memset(s + seen, 0, (h->tokens - seen) * sizeof *s);
    }
}

/* s (U V^T on entry) := S, s_dot (U V.^T) := S. = P. o (s - P . s) + P o (s_dot - P . s_dot - P. . s). */
static void pk__attend_second(const pk__heads *h, const pk_real *p, const pk_real *p_dot, pk_real *s,
                              pk_real *s_dot)
{
    for (size_t i = 0; i < h->tokens; i++) {
        const size_t seen = pk__seen(h, i), hidden = h->tokens - seen;
        const double mean = pk__sum_products(seen, p, s);
        const double mean_dot = pk__sum_products(seen, p, s_dot) + pk__sum_products(seen, p_dot, s);
        for (size_t j = 0; j < seen; j++) {
            s_dot[j] = (pk_real)(p_dot[j] * (s[j] - mean) + p[j] * (s_dot[j] - mean_dot));
            s[j] = (pk_real)(p[j] * (s[j] - mean));
        }
        memset(s + seen, 0, hidden * sizeof *s);
        memset(s_dot + seen, 0, hidden * sizeof *s_dot);
        p += h->tokens, p_dot += h->tokens, s += h->tokens, s_dot += h->tokens;
    }
}

/* P. = the tangent of P along v. */
static void pk__attend_weights_tangent(const pk__heads *h, const pk_real *x, const pk_real *v, const pk_real *p,
                                       pk_real *p_dot)
{
    pk__scores(h, h->scale, v, h->in, x + h->key, h->in, 0, p_dot);
    pk__scores(h, h->scale, x, h->in, v + h->key, h->in, 1, p_dot);
    pk__attend_jacobian(h, p, p_dot);
}

static void pk__attend_forward(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call->node);
    for (size_t row = 0; row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const pk_real *x = call->in[0] + row * call->in_width[0] + head * h.depth;
            pk__attend_weights(&h, x, call->scratch);
            pk__mix(&h, 0, 1, call->scratch, x + h.value, h.in, 0,
                    call->out + row * call->node->width + head * h.depth, h.out);
        }
}

/* O. = P. V + P V. */
static void pk__attend_tangent(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call->node);
    pk_real *p = call->scratch, *p_dot = p + h.tokens * h.tokens;
    if (!call->in_tangent[0])
        memset(call->out_tangent, 0, call->rows * call->node->width * sizeof(pk_real));
    for (size_t row = 0; call->in_tangent[0] && row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const size_t at = row * call->in_width[0] + head * h.depth;
            const pk_real *x = call->in[0] + at, *v = call->in_tangent[0] + at;
            pk_real *to = call->out_tangent + row * call->node->width + head * h.depth;
            pk__attend_weights(&h, x, p);
            pk__attend_weights_tangent(&h, x, v, p, p_dot);
            pk__mix(&h, 0, 1, p_dot, x + h.value, h.in, 0, to, h.out);
            pk__mix(&h, 0, 1, p, v + h.value, h.in, 1, to, h.out);
        }
}

/* With the cotangent U of O: of V it is P^T U, of the scores S = P o (U V^T - rows of P . U V^T), of Q scale
 * S K, of K scale S^T Q. */
static void pk__attend_reverse(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call->node);
    pk_real *p = call->scratch, *s = p + h.tokens * h.tokens;
    const pk_real add = call->accumulate[0] ? 1 : 0;
    for (size_t row = 0; row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const pk_real *x = call->in[0] + row * call->in_width[0] + head * h.depth;
            pk__attend_weights(&h, x, p);
            for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
                const pk_real *u = call->out_cotangent + copy * call->node->width + head * h.depth;
                pk_real *to = call->in_cotangent[0] + copy * call->in_width[0] + head * h.depth;
                pk__scores(&h, 1, u, h.out, x + h.value, h.in, 0, s);
                pk__attend_jacobian(&h, p, s);
                pk__mix(&h, 1, 1, p, u, h.out, add, to + h.value, h.in);
                pk__mix(&h, 0, h.scale, s, x + h.key, h.in, h.shared ? 1 : add, to, h.in);
                pk__mix(&h, 1, h.scale, s, x, h.in, h.shared ? 1 : add, to + h.key, h.in);
            }
        }
}

/* The derivative of reverse along the tangent v of the input. */
static void pk__attend_curvature(const pk_call *call)
{
    const pk__heads h = pk__attend_heads(call->node);
    const size_t square = h.tokens * h.tokens;
    pk_real *p = call->scratch, *p_dot = p + square, *s = p_dot + square, *s_dot = s + square;
    for (size_t row = 0; call->in_tangent[0] && row < call->rows; row++)
        for (size_t head = 0; head < h.heads; head++) {
            const size_t at = row * call->in_width[0] + head * h.depth;
            const pk_real *x = call->in[0] + at, *v = call->in_tangent[0] + at;
            pk__attend_weights(&h, x, p);
            pk__attend_weights_tangent(&h, x, v, p, p_dot);
            for (size_t copy = row * call->copies; copy < (row + 1) * call->copies; copy++) {
                const pk_real *u = call->out_cotangent + copy * call->node->width + head * h.depth;
                pk_real *to = call->in_cotangent[0] + copy * call->in_width[0] + head * h.depth;
                pk__scores(&h, 1, u, h.out, x + h.value, h.in, 0, s);
                pk__scores(&h, 1, u, h.out, v + h.value, h.in, 0, s_dot);
                pk__attend_second(&h, p, p_dot, s, s_dot);
                pk__mix(&h, 1, 1, p_dot, u, h.out, 1, to + h.value, h.in);
                pk__mix(&h, 0, h.scale, s_dot, x + h.key, h.in, 1, to, h.in);
                pk__mix(&h, 0, h.scale, s, v + h.key, h.in, 1, to, h.in);
                pk__mix(&h, 1, h.scale, s_dot, x, h.in, 1, to + h.key, h.in);
                pk__mix(&h, 1, h.scale, s, v, h.in, 1, to + h.key, h.in);
            }
        }
}

/* ---- the table -------------------------------------------------------------------------------------- */

static const pk_option pk__embedding_options[] = {
    {"number of tokens", PK_OPTION_NUMBER, PK_EMBEDDING_TOKENS, 1, 1, 1, 1e9, 1, NULL},
    {"width", PK_OPTION_NUMBER, PK_EMBEDDING_WIDTH, 2, 1, 1, 1e9, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__token_options[] = {
    {"number", PK_OPTION_NUMBER, PK_TOKEN_INDEX, 1, 1, -1e9, 1e9, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};
static const pk_option pk__attend_options[] = {
    {"number of heads", PK_OPTION_NUMBER, PK_ATTEND_HEADS, 1, 1, 1, 1e6, 1, NULL},
    {"causal", PK_OPTION_FLAG, PK_ATTEND_CAUSAL, 0, 0, 1, 0, 0, NULL},
    {"shared", PK_OPTION_FLAG, PK_ATTEND_SHARED, 0, 0, 1, 0, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

#define PK__SEQUENCE_OPERATION(name, text, kind, form, options, shape, scratch, reverse, gradient, rows, \
                               curvature, check, initialize)                                             \
    {                                                                                                    \
        text, kind, form, 1, options, PK__NO_NUMBERS, shape, scratch, pk__##name##_forward,              \
            pk__##name##_tangent, reverse, gradient, rows, NULL, NULL, 0, curvature, NULL, 0, check,     \
            initialize                                                                                   \
    }

static const pk_operation pk__sequence_operations[] = {
    PK__SEQUENCE_OPERATION(embedding, "embedding", PK_LINEAR, PK_TANGENT_ROWS, pk__embedding_options,
                           pk__embedding_shape, NULL, pk__position_reverse, pk__embedding_weight_gradient,
                           pk__embedding_row_gradients, NULL, pk__embedding_check, pk__normal_initialize),
    PK__SEQUENCE_OPERATION(token, "token", PK_LINEAR, PK_TANGENT_NONE, pk__token_options, pk__token_shape, NULL,
                           pk__token_reverse, NULL, NULL, NULL, NULL, NULL),
    PK__SEQUENCE_OPERATION(mean_tokens, "mean_tokens", PK_LINEAR, PK_TANGENT_NONE, NULL, pk__tokens_shape, NULL,
                           pk__mean_tokens_reverse, NULL, NULL, NULL, NULL, NULL),
    PK__SEQUENCE_OPERATION(attend, "attend", PK_SMOOTH, PK_TANGENT_NONE, pk__attend_options, pk__attend_shape,
                           pk__attend_scratch, pk__attend_reverse, NULL, NULL, pk__attend_curvature, NULL,
                           NULL),
};
#undef PK__SEQUENCE_OPERATION

PK__END_CODE

/* pathkernel/network/operations.h: implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

PK_API const pk_operation *pk_operation_at(size_t index)
{
    static const struct {
        const pk_operation *operations;
        size_t count;
    } tables[] = {
        {pk__dense_operations, sizeof pk__dense_operations / sizeof *pk__dense_operations},
        {pk__activation_operations, sizeof pk__activation_operations / sizeof *pk__activation_operations},
        {pk__structure_operations, sizeof pk__structure_operations / sizeof *pk__structure_operations},
        {pk__image_operations, sizeof pk__image_operations / sizeof *pk__image_operations},
        {pk__norm_operations, sizeof pk__norm_operations / sizeof *pk__norm_operations},
        {pk__sequence_operations, sizeof pk__sequence_operations / sizeof *pk__sequence_operations},
    };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (index < tables[i].count)
            return &tables[i].operations[index];
        index -= tables[i].count;
    }
    return NULL;
}

PK_API const pk_operation *pk_operation_find(const char *name)
{
    const pk_operation *operation;
    for (size_t i = 0; (operation = pk_operation_at(i)) != NULL; i++)
        if (strcmp(name, operation->name) == 0)
            return operation;
    return NULL;
}

PK__END_COLD_CODE

/* pathkernel/network/language.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

enum { PK__LAYER_WORDS = 16, PK__LAYER_TEXT = 256, PK__NETWORK_LAYERS = 10000, PK__NETWORK_DEPTH = 32 };
/* Characters of a network with single blanks: what a line of run.txt holds behind its key. */
enum { PK__NETWORK_TEXT = (1 << 16) - 64 };

/* The words of a layer, its name first. */
typedef struct pk__layer {
    int count;
    const char *words[PK__LAYER_WORDS];
    char text[PK__LAYER_TEXT];
} pk__layer;

typedef struct pk__parser {
    pk_context *context;
    pk_graph *graph;
    const pk_constants *constants;
    const char *start, *at; /* the text, and in it */
    char *canonical;        /* where the next canonical character goes */
    int number;             /* of the layer */
    int depth;              /* of residuals */
    int node;               /* the last one of the branch in hand */
    int failed;             /* the number of the layer that could not be made; 0: none */
    int full;               /* the canonical text has no room for what came */
    size_t room;            /* characters that the canonical text may still have */
    size_t frequencies;     /* numbers drawn for fourier so far */
    pk__layer layer;        /* the layer in hand: of all depths, so that the stack holds none */
} pk__parser;

/* ---- words ----------------------------------------------------------------------------------------- */

/* "64" or "1x28x28" as a shape. */
static pk_status pk__parse_shape(pk_context *context, const char *word, pk_shape *shape)
{
    const char *at = word;
    shape->rank = 0;
    do {
        size_t dim = 0;
        if (shape->rank == PK_SHAPE_RANK)
            return pk__fail(context, PK_FORMAT, "the shape '%.40s' has more than %d dimensions", word,
                            PK_SHAPE_RANK);
        if (*at < '0' || *at > '9')
            return pk__fail(context, PK_FORMAT, "'%.40s' is not a shape such as 64 or 1x28x28", word);
        for (; *at >= '0' && *at <= '9'; at++) {
            if (dim > SIZE_MAX / 65536)
                return pk__fail(context, PK_OVERFLOW, "the shape '%.40s' is too large", word);
            dim = 10 * dim + (size_t)(*at - '0');
        }
        shape->dims[shape->rank++] = dim;
    } while (*at++ == 'x');
    if (at[-1])
        return pk__fail(context, PK_FORMAT, "'%.40s' is not a shape such as 64 or 1x28x28", word);
    return PK_OK;
}

/* Layers of the language that are no operation of their own name, beside those of pk__composites that are. */
#define PK__OTHER_LAYERS                                                                                \
    "input residual position propagate constant fourier select dropout layer_norm rms_norm batch_norm " \
    "attention"

/* An operation by name, built in or the context's; NULL where there is none. */
static const pk_operation *pk__named_operation(const pk_context *context, const char *name)
{
    const pk_operation *found = pk_operation_find(name);
    for (size_t i = 0; !found && context && context->operations && context->operations[i]; i++)
        if (strcmp(context->operations[i]->name, name) == 0)
            found = context->operations[i];
    return found;
}

static char pk__lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

/* How many letters have to be changed, added or left out, whatever their case; at most PK__FAR_WORD. */
enum { PK__FAR_WORD = 3, PK__LONGEST_NAME = 31 };
static int pk__word_distance(const char *a, size_t length, const char *b)
{
    int row[PK__LONGEST_NAME + 1];
    const size_t other = strlen(b);
    if (length > PK__LONGEST_NAME || other > PK__LONGEST_NAME)
        return PK__FAR_WORD;
    for (size_t i = 0; i <= length; i++)
        row[i] = (int)i;
    for (size_t j = 1; j <= other; j++) {
        int corner = row[0];
        row[0] = (int)j;
        for (size_t i = 1; i <= length; i++) {
            int best = corner + (pk__lower(a[i - 1]) != pk__lower(b[j - 1]));
            corner = row[i];
            best = best < row[i] + 1 ? best : row[i] + 1;
            row[i] = best < row[i - 1] + 1 ? best : row[i - 1] + 1;
        }
    }
    return row[length] < PK__FAR_WORD ? row[length] : PK__FAR_WORD;
}

/* The layer whose name is nearest to a word, or an empty text where each is `most` letters away or more. */
static void pk__nearest_layer(const pk_context *context, const char *word, int most, char *name, size_t size)
{
    const pk_operation *operation;
    int best = most;
    name[0] = 0;
    if (pk__word_distance("linear", 6, word) < 2 || strcmp(word, "fc") == 0) { /* PyTorch's name, and another */
        snprintf(name, size, "dense");
        return;
    }
    for (size_t i = 0; (operation = pk_operation_at(i)) != NULL; i++)
        if (strcmp(operation->name, "add") != 0 &&
            pk__word_distance(operation->name, strlen(operation->name), word) < best) {
            best = pk__word_distance(operation->name, strlen(operation->name), word);
            snprintf(name, size, "%s", operation->name);
        }
    for (size_t i = 0; context && context->operations && context->operations[i]; i++) {
        const char *own = context->operations[i]->name;
        if (pk__word_distance(own, strlen(own), word) < best) {
            best = pk__word_distance(own, strlen(own), word);
            snprintf(name, size, "%s", own);
        }
    }
    for (const char *at = PK__OTHER_LAYERS; *at; at += strspn(at, " ")) {
        const size_t length = strcspn(at, " ");
        if (pk__word_distance(at, length, word) < best) {
            best = pk__word_distance(at, length, word);
            snprintf(name, size, "%.*s", (int)length, at);
        }
        at += length;
    }
}

/* What is to be said of a word that stands where it cannot: that a layer of its own is separated from the one before. */
static const char *pk__separator_hint(const pk_context *context, const char *word)
{
    const int sign = strpbrk(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#") == NULL;
    char name[PK__LONGEST_NAME + 1];
    pk__nearest_layer(context, word, 2, name, sizeof name);
    return sign || name[0] ? "; layers are separated by ';'" : "";
}

/* Whether a word has no sign that the language gives no meaning, and that people write between words. */
static pk_status pk__check_word(pk_context *context, const char *word)
{
    const char *comma = strchr(word, ',');
    if (!comma)
        return PK_OK;
    if (comma > word && comma[-1] >= '0' && comma[-1] <= '9' && comma[1] >= '0' && comma[1] <= '9')
        return pk__fail(context, PK_FORMAT,
                        "'%.40s': the sizes of a shape or of a pair are written with x, as in 3x3", word);
    return pk__fail(context, PK_FORMAT, "'%.40s' has a comma: layers are separated by ';', words by blanks",
                    word);
}

/* The value of an option: what follows `name=`, or the positional word. */
static pk_status pk__parse_value(pk_context *context, const char *name, const pk_option *option,
                                 const char *value, double *attributes)
{
    double *to = attributes + option->attribute;
    size_t length = strlen(value);
    if (option->kind == PK_OPTION_CHOICE) {
        int choice = pk__word_index(option->choices, value);
        *to = choice;
        return choice >= 0 ? PK_OK
                           : pk__fail(context, PK_FORMAT, "%s: %s: '%.40s' is none of: %s", name, option->name,
                                      value, option->choices);
    }
    if (option->kind == PK_OPTION_PAIR) {
        const size_t first = strcspn(value, "x");
        if (value[first] && !pk__number(value + first + 1, length - first - 1, &to[1]))
            return pk__fail(context, PK_FORMAT, "%s: %s: '%.40s' is not a pair such as 3x3", name, option->name,
                            value);
        length = first;
    }
    if (!pk__number(value, length, to))
        return pk__fail(context, PK_FORMAT, "%s: %s: '%.40s' is not a finite number%s", name, option->name,
                        value, option->position ? pk__separator_hint(context, value) : "");
    if (option->kind == PK_OPTION_PAIR && !value[length])
        to[1] = to[0];
    return PK_OK;
}

static const pk_option *pk__find_option(const pk_option *options, const char *word, int position)
{
    for (const pk_option *option = options; option && option->name; option++) {
        const size_t length = strlen(option->name);
        if (position ? option->position == position
                     : !option->position && strncmp(word, option->name, length) == 0 &&
                           word[length] == (option->kind == PK_OPTION_FLAG ? '\0' : '='))
            return option;
    }
    return NULL;
}

/* A list of the options without a position, for a message. */
static void pk__option_names(const pk_option *options, char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    for (const pk_option *option = options; option && option->name; option++)
        if (!option->position && used < size)
            used += (size_t)snprintf(text + used, size - used, "%s'%s%s'", used ? ", " : "", option->name,
                                     option->kind == PK_OPTION_FLAG ? "" : "=");
}

/* What is wrong with a word that is no option. */
static pk_status pk__refuse_word(pk_context *context, const char *name, const pk_option *options,
                                 const char *word)
{
    const size_t length = strcspn(word, "=");
    char names[256];
    for (const pk_option *option = options; option && option->name; option++) {
        if (option->position || strlen(option->name) != length || strncmp(word, option->name, length) != 0)
            continue;
        return option->kind == PK_OPTION_FLAG
                   ? pk__fail(context, PK_FORMAT,
                              "'%.40s' is not an option of %s: '%s' stands there without a value", word, name,
                              option->name)
                   : pk__fail(context, PK_FORMAT,
                              "'%.40s' is not an option of %s: its value comes behind a '=', without blanks, "
                              "as in %s=1",
                              word, name, option->name);
    }
    pk__option_names(options, names, sizeof names);
    return pk__fail(context, PK_FORMAT, "'%.40s' is not an option of %s%s%s%s", word, name,
                    names[0] ? "; possible are " : "", names, pk__separator_hint(context, word));
}

/* Reads the words of a layer after its name into attributes, which hold the defaults. */
static pk_status pk__parse_options(pk_context *context, const char *name, const pk_option *options,
                                   const pk__layer *layer, double *attributes)
{
    const pk_option *seen[PK__LAYER_WORDS];
    int position = 0;
    for (int i = 1; i < layer->count; i++) {
        const char *word = layer->words[i];
        const pk_option *option = pk__find_option(options, word, 0);
        const char *value = option ? word + strlen(option->name) + 1 : word;
        pk_status status = pk__check_word(context, word);
        if (status)
            return status;
        if (!option && !strchr(word, '='))
            option = pk__find_option(options, word, ++position);
        seen[i] = option;
        for (int k = 1; option && k < i; k++)
            if (seen[k] == option)
                return pk__fail(context, PK_FORMAT, "%s: '%.40s' comes twice", name, word);
        if (!option)
            return pk__refuse_word(context, name, options, word);
        if (option->kind == PK_OPTION_FLAG) {
            attributes[option->attribute] = option->least;
            continue;
        }
        status = pk__parse_value(context, name, option, value, attributes);
        if (status)
            return status;
    }
    for (const pk_option *option = options; option && option->name; option++)
        if (option->required && position < option->position)
            return pk__fail(context, PK_FORMAT, "%s needs its %s, a number%s behind a blank", name,
                            option->name, option->kind == PK_OPTION_PAIR ? " or a pair such as 3x3," : "");
    return PK_OK;
}

/* ---- layers ---------------------------------------------------------------------------------------- */

/* Appends an operation behind the branch in hand. */
static pk_status pk__append(pk__parser *parser, const char *name, const double *attributes,
                            size_t constant_count, const pk_real *constants)
{
    return pk__graph_append(parser->context, parser->graph, pk__named_operation(parser->context, name), 1,
                            &parser->node, attributes, constant_count, constants, NULL, &parser->node);
}

static pk_status pk__append_add(pk__parser *parser, int other)
{
    const int both[2] = {parser->node, other};
    return pk__graph_append(parser->context, parser->graph, pk_operation_find("add"), 2, both, NULL, 0, NULL,
                            NULL, &parser->node);
}

/* A layer that is one operation. */
static pk_status pk__plain_layer(pk__parser *parser, const pk__layer *layer, const pk_operation *operation,
                                 double *attributes)
{
    memcpy(attributes, operation->defaults, PK_NODE_ATTRIBUTES * sizeof *attributes);
    return pk__parse_options(parser->context, operation->name, operation->options, layer, attributes);
}

static void pk__constants_view(const pk_node *node, pk_array *array)
{
    const size_t shape[2] = {node->constant_count / node->constant_columns, node->constant_columns};
    *array =
        pk_array_view(sizeof(pk_real) == sizeof(double) ? PK_FLOAT64 : PK_FLOAT32, 2, shape, node->constants);
}

/* An earlier node that holds or shares the array of this name: one of the operation, if there is one. */
static const pk_node *pk__like_named(const pk_graph *graph, const char *name, const char *operation)
{
    const pk_node *like = NULL;
    for (size_t n = graph->node_count; n-- > 1;) {
        const pk_node *node = &graph->nodes[n];
        if (!node->constant_name[0] || strcmp(node->constant_name, name) != 0)
            continue;
        if (strcmp(node->operation->name, operation) == 0)
            return node;
        like = node;
    }
    return like;
}

/* An array that the network names, as numbers; the caller releases both. *like: an earlier node that has them already. */
static pk_status pk__named_constants(pk__parser *parser, const pk__layer *layer, const char *operation,
                                     const pk_node **like, pk_array *array, pk_real **numbers)
{
    const char *name = layer->count > 1 ? layer->words[1] : "";
    *like = NULL;
    *numbers = NULL;
    memset(array, 0, sizeof *array);
    if (!name[0] || strlen(name) >= PK_CONSTANT_NAME ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != strlen(name))
        return pk__fail(parser->context, PK_FORMAT,
                        "%s needs the name of an array: up to %d letters, digits and _", layer->words[0],
                        PK_CONSTANT_NAME - 1);
    if (!parser->constants)
        return pk__fail(parser->context, PK_ARGUMENT, "%s: no arrays were given, so '%.40s' is not known",
                        layer->words[0], name);
    *like = pk__like_named(parser->graph, name, operation);
    if (*like) {
        pk__constants_view(*like, array);
        return PK_OK;
    }
    pk_status status = parser->constants->load(parser->constants->user, parser->context, name, array);
    if (!status)
        status = pk_allocate(parser->context, pk_array_items(array), sizeof **numbers, "constants", numbers);
    if (!status)
        pk_array_reals(array, 0, pk_array_items(array), *numbers);
    for (size_t i = 0; !status && i < pk_array_items(array); i++)
        if (!isfinite((*numbers)[i]))
            status = pk__fail(parser->context, PK_NOT_FINITE,
                              "the array '%.40s' has a number that is not finite", name);
    return status;
}

/* The shape of the branch in hand. */
static const pk_shape *pk__branch_shape(const pk__parser *parser)
{
    return &parser->graph->nodes[parser->node].shape;
}

/* dense and conv, `ntk` [w_std=] [b_std=]: the NTK parameterisation y = w_std / sqrt(fan_in) W x + b_std b with
 * standard normal W and b (Jacot et al. 2018, section 2; Lee et al. 2019, eq. 1), as scaled inputs and outputs. */
enum { PK__NTK_FLAG, PK__NTK_WEIGHTS, PK__NTK_BIASES };
static const pk_option pk__ntk_options[] = {
    {"ntk", PK_OPTION_FLAG, PK__NTK_FLAG, 0, 0, 1, 0, 0, NULL},
    {"w_std", PK_OPTION_NUMBER, PK__NTK_WEIGHTS, 0, 0, DBL_MIN, DBL_MAX, 0, NULL},
    {"b_std", PK_OPTION_NUMBER, PK__NTK_BIASES, 0, 0, DBL_MIN, DBL_MAX, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

static pk_status pk__append_scale(pk__parser *parser, double factor)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_ACTIVATION_NUMBER] = factor;
    return factor == 1 ? PK_OK : pk__append(parser, "scale", attributes, 0, NULL);
}

static pk_status pk__weights_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_operation *operation = pk_operation_find(layer->words[0]);
    const int dense = strcmp(operation->name, "dense") == 0;
    double attributes[PK_NODE_ATTRIBUTES], ntk[PK_NODE_ATTRIBUTES] = {0, 1, 1};
    pk__layer rest = *layer, own = *layer;
    rest.count = own.count = 1;
    for (int i = 1; i < layer->count; i++) {
        pk__layer *to = pk__find_option(pk__ntk_options, layer->words[i], 0) ? &own : &rest;
        to->words[to->count++] = layer->words[i];
    }
    pk_status status = pk__plain_layer(parser, &rest, operation, attributes);
    if (!status)
        status = pk__parse_options(parser->context, operation->name, pk__ntk_options, &own, ntk);
    if (!status)
        status = pk__check_attributes(parser->context, operation->name, pk__ntk_options, ntk);
    if (!status && ntk[PK__NTK_FLAG] == 0 && own.count > 1)
        status =
            pk__fail(parser->context, PK_FORMAT, "%s: '%.40s' belongs to ntk", operation->name, own.words[1]);
    if (status || ntk[PK__NTK_FLAG] == 0)
        return status ? status : pk__append(parser, operation->name, attributes, 0, NULL);
    /* Biases are scaled with everything behind the layer, so the input is scaled by what is left. */
    const pk_shape *shape = pk__branch_shape(parser);
    const int biased = attributes[dense ? (int)PK_DENSE_BIAS : (int)PK_CONVOLUTION_BIAS] != 0;
    const double after = biased ? ntk[PK__NTK_BIASES] : 1;
    const double fan_in = dense ? (double)shape->dims[shape->rank - 1]
                                : (double)shape->dims[0] / attributes[PK_CONVOLUTION_GROUPS] *
                                      attributes[PK_CONVOLUTION_KERNEL] * attributes[PK_CONVOLUTION_KERNEL + 1];
    attributes[dense ? (int)PK_DENSE_INITIAL : (int)PK_CONVOLUTION_INITIAL] = PK_INITIAL_STANDARD;
    status = pk__append_scale(parser, ntk[PK__NTK_WEIGHTS] / (after * sqrt(fan_in)));
    if (!status)
        status = pk__append(parser, operation->name, attributes, 0, NULL);
    return status ? status : pk__append_scale(parser, after);
}

/* position: a learned vector for each token. */
static pk_status pk__position_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_shape *shape = pk__branch_shape(parser);
    const int values = parser->node;
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    char text[PK_SHAPE_TEXT];
    if (layer->count > 1)
        return pk__refuse_word(parser->context, "position", NULL, layer->words[1]);
    if (shape->rank != 2)
        return pk__fail(parser->context, PK_SHAPE, "position needs values of tokens x width, not of shape %s",
                        pk_shape_text(shape, text));
    attributes[PK_POSITION_TOKENS] = (double)shape->dims[0];
    attributes[PK_POSITION_WIDTH] = (double)shape->dims[1];
    parser->node = 0; /* it depends on weights alone */
    pk_status status = pk__append(parser, "position", attributes, 0, NULL);
    return status ? status : pk__append_add(parser, values);
}

/* A learned factor and, with bias, summand for each number of the trailing dims dimensions; dims 0: each channel. */
static pk_status pk__append_affine(pk__parser *parser, int bias, double dims)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    attributes[PK_AFFINE_BIAS] = bias;
    attributes[PK_AFFINE_DIMS] = dims;
    return pk__append(parser, "affine", attributes, 0, NULL);
}

/* layer_norm and rms_norm [epsilon=] [dims=1] [noaffine], batch_norm NAME [epsilon=] [noaffine]. */
enum { PK__NORM_AFFINE = PK_NODE_ATTRIBUTES - 1 };
static const pk_option pk__norm_options[] = {
    {"dims", PK_OPTION_NUMBER, PK_NORM_DIMS, 0, 0, 1, PK_SHAPE_RANK, 1, NULL}, /* not of batch_norm */
    {"epsilon", PK_OPTION_NUMBER, PK_NORM_EPSILON, 0, 0, 0, DBL_MAX, 0, NULL},
    {"noaffine", PK_OPTION_FLAG, PK__NORM_AFFINE, 0, 0, 0, 0, 0, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

static pk_status pk__norm_layer(pk__parser *parser, const pk__layer *layer)
{
    const int root = strcmp(layer->words[0], "rms_norm") == 0;
    const char *name = root ? "rms_normalize" : "normalize";
    double attributes[PK_NODE_ATTRIBUTES];
    memcpy(attributes, pk_operation_find(name)->defaults, sizeof attributes);
    attributes[PK__NORM_AFFINE] = 1;
    pk_status status = pk__parse_options(parser->context, layer->words[0], pk__norm_options, layer, attributes);
    const int affine = attributes[PK__NORM_AFFINE] != 0;
    attributes[PK__NORM_AFFINE] = 0;
    if (!status)
        status = pk__append(parser, name, attributes, 0, NULL);
    return status || !affine ? status : pk__append_affine(parser, !root, attributes[PK_NORM_DIMS]);
}

/* attention H [causal] [shared] [nobias]: PyTorch's MultiheadAttention with as many outputs as inputs; shared: one
 * projection for queries, keys and values. */
static pk_status pk__attention_layer(pk__parser *parser, const pk__layer *layer)
{
    enum { BIAS = PK_NODE_ATTRIBUTES - 1 };
    static const pk_option options[] = {
        {"number of heads", PK_OPTION_NUMBER, PK_ATTEND_HEADS, 1, 1, 1, 1e6, 1, NULL},
        {"causal", PK_OPTION_FLAG, PK_ATTEND_CAUSAL, 0, 0, 1, 0, 0, NULL},
        {"shared", PK_OPTION_FLAG, PK_ATTEND_SHARED, 0, 0, 1, 0, 0, NULL},
        {"nobias", PK_OPTION_FLAG, BIAS, 0, 0, 0, 0, 0, NULL},
        {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
    };
    const pk_shape *shape = pk__branch_shape(parser);
    const double width = (double)shape->dims[shape->rank - 1];
    double attributes[PK_NODE_ATTRIBUTES] = {0}, dense[PK_NODE_ATTRIBUTES] = {0};
    attributes[BIAS] = 1;
    char text[PK_SHAPE_TEXT];
    pk_status status = pk__parse_options(parser->context, "attention", options, layer, attributes);
    if (!status)
        status = pk__check_attributes(parser->context, "attention", options, attributes);
    dense[PK_DENSE_OUTPUTS] = (attributes[PK_ATTEND_SHARED] != 0 ? 1 : 3) * width;
    dense[PK_DENSE_BIAS] = attributes[BIAS];
    dense[PK_DENSE_INITIAL] = PK_INITIAL_GLOROT_UNIFORM;
    dense[PK_DENSE_GAIN] = 1;
    attributes[BIAS] = 0;
    if (!status && shape->rank != 2)
        status =
            pk__fail(parser->context, PK_SHAPE, "attention needs values of tokens x width, not of shape %s",
                     pk_shape_text(shape, text));
    if (!status && fmod(width, attributes[PK_ATTEND_HEADS]) != 0)
        status = pk__fail(parser->context, PK_SHAPE, "attention: a width of %g cannot be split into %g heads",
                          width, attributes[PK_ATTEND_HEADS]);
    if (!status)
        status = pk__append(parser, "dense", dense, 0, NULL);
    if (!status)
        status = pk__append(parser, "attend", attributes, 0, NULL);
    dense[PK_DENSE_OUTPUTS] = width;
    dense[PK_DENSE_INITIAL] = PK_INITIAL_LECUN_UNIFORM;
    dense[PK_DENSE_GAIN] =
        0.57735026918962576451; /* PyTorch's default weight, 1/sqrt(3) of LeCun's, bias zero */
    return status ? status : pk__append(parser, "dense", dense, 0, NULL);
}

/* max_pool of KxK as 1xK and Kx1: fewer differences whose signs must be watched. */
static pk_status pk__max_pool_layer(pk__parser *parser, const pk__layer *layer)
{
    const pk_operation *operation = pk_operation_find("max_pool");
    static const int pairs[3] = {PK_POOL_KERNEL, PK_POOL_STRIDE, PK_POOL_PAD};
    double attributes[PK_NODE_ATTRIBUTES], part[PK_NODE_ATTRIBUTES];
    pk_status status = pk__plain_layer(parser, layer, operation, attributes);
    for (int i = 0; i < 2 && !status; i++) { /* an unstated stride is the kernel */
        if (attributes[PK_POOL_STRIDE + i] == 0)
            attributes[PK_POOL_STRIDE + i] = attributes[PK_POOL_KERNEL + i];
        if (2 * attributes[PK_POOL_PAD + i] > attributes[PK_POOL_KERNEL + i] &&
            attributes[PK_POOL_KERNEL + i] > 0)
            status = pk__fail(parser->context, PK_SHAPE,
                              "max_pool: padding of %gx%g is more than half of its kernel, %gx%g",
                              attributes[PK_POOL_PAD], attributes[PK_POOL_PAD + 1], attributes[PK_POOL_KERNEL],
                              attributes[PK_POOL_KERNEL + 1]);
    }
    for (int side = 1; side >= 0 && !status; side--) {
        memcpy(part, attributes, sizeof part);
        for (int i = 0; i < 3; i++)
            part[pairs[i] + !side] = pairs[i] == PK_POOL_PAD ? 0 : 1;
        if (part[PK_POOL_KERNEL + side] != 1 || part[PK_POOL_STRIDE + side] != 1 ||
            part[PK_POOL_PAD + side] != 0)
            status = pk__append(parser, "max_pool", part, 0, NULL);
    }
    return status;
}

/* constant NAME, propagate NAME, batch_norm NAME. */
static pk_status pk__constant_layer(pk__parser *parser, const pk__layer *layer)
{
    const char *name = layer->words[0];
    pk_array array;
    pk_real *numbers = NULL;
    const pk_node *like = NULL;
    const int norm = strcmp(name, "batch_norm") == 0;
    const pk_operation *operation = pk_operation_find(norm ? "standardize" : name);
    double attributes[PK_NODE_ATTRIBUTES] = {0};
    pk__layer rest = *layer;
    rest.count--;
    for (int i = 1; i < rest.count; i++)
        rest.words[i] = layer->words[i + 1];
    attributes[PK_NORM_EPSILON] = norm ? 1e-5 : 0;
    attributes[PK__NORM_AFFINE] = norm;
    if (norm && (layer->count < 2 || strchr(layer->words[1], '=')))
        return pk__fail(
            parser->context, PK_FORMAT,
            "batch_norm needs the name of an array with its frozen means and variances; in training mode an "
            "example's output would depend on the rest of its batch");
    pk_status status = pk__named_constants(parser, layer, operation->name, &like, &array, &numbers);
    if (!status)
        status =
            pk__parse_options(parser->context, name, norm ? pk__norm_options + 1 : NULL, &rest, attributes);
    const int affine = attributes[PK__NORM_AFFINE] != 0;
    attributes[PK__NORM_AFFINE] = 0;
    if (!status && array.rank != 2)
        status = pk__fail(parser->context, PK_SHAPE, "%s: the array '%.40s' has rank %d, not 2", name,
                          layer->words[1], array.rank);
    if (!status && norm && array.shape[0] != 2 &&
        pk_array_items(&array) % 2 == 0) /* (channels, 2) holds as many numbers in another order */
        status = pk__fail(parser->context, PK_SHAPE,
                          "batch_norm: the array '%.40s' has %zu rows, not one of means and one of variances",
                          layer->words[1], array.shape[0]);
    if (!status && strcmp(name, "propagate") == 0 && array.shape[1] != 3)
        status = pk__fail(parser->context, PK_SHAPE,
                          "propagate: the array '%.40s' has %zu columns, not row, column and value",
                          layer->words[1], array.shape[1]);
    if (!status && strcmp(name, "constant") == 0) {
        attributes[PK_POSITION_TOKENS] = (double)array.shape[0];
        attributes[PK_POSITION_WIDTH] = (double)array.shape[1];
        parser->node = 0;
    }
    if (!status)
        status =
            pk__graph_append(parser->context, parser->graph, operation, 1, &parser->node, attributes,
                             pk_array_items(&array), like ? like->constants : numbers, like, &parser->node);
    if (!status) {
        pk_node *node = &parser->graph->nodes[parser->node];
        memcpy(node->constant_name, layer->words[1], strlen(layer->words[1]) + 1);
        node->constant_columns = array.shape[1];
    }
    pk_release(parser->context, numbers);
    pk_array_release(parser->context, &array);
    return status || !affine ? status : pk__append_affine(parser, 1, 0);
}

/* fourier N [scale=1] [seed=0]: N normal frequencies of standard deviation scale for each input. */
enum { PK__FOURIER_COUNT, PK__FOURIER_SCALE, PK__FOURIER_SEED };
enum {
    PK__FOURIER_NUMBERS = 1 << 19
}; /* of a whole network: a text of a few words shall not take seconds to read */
static const pk_option pk__fourier_options[] = {
    {"number of frequencies", PK_OPTION_NUMBER, PK__FOURIER_COUNT, 1, 1, 1, 1e9, 1, NULL},
    {"scale", PK_OPTION_NUMBER, PK__FOURIER_SCALE, 0, 0, DBL_MIN, DBL_MAX, 0, NULL},
    {"seed", PK_OPTION_NUMBER, PK__FOURIER_SEED, 0, 0, 0, 9e15, 1, NULL},
    {NULL, PK_OPTION_FLAG, 0, 0, 0, 0, 0, 0, NULL},
};

static pk_status pk__fourier_layer(pk__parser *parser, const pk__layer *layer)
{
    double attributes[PK_NODE_ATTRIBUTES] = {0, 1, 0};
    pk_status status = pk__parse_options(parser->context, "fourier", pk__fourier_options, layer, attributes);
    if (!status)
        status = pk__check_attributes(parser->context, "fourier", pk__fourier_options, attributes);
    pk_real *numbers = NULL;
    size_t count = 0;
    const pk_node *input = &parser->graph->nodes[parser->node];
    if (!status && input->varies)
        status = pk__fail(parser->context, PK_UNSUPPORTED,
                          "Fourier features are taken of data, before the first weights");
    if (!status && attributes[PK__FOURIER_COUNT] * (double)input->width >
                       (double)PK__FOURIER_NUMBERS - (double)parser->frequencies)
        status = pk__fail(
            parser->context, PK_OVERFLOW,
            "fourier: %g frequencies of %zu inputs are %g numbers, and a network has at most %d; larger "
            "features may be computed beforehand, as the inputs",
            attributes[PK__FOURIER_COUNT], input->width, attributes[PK__FOURIER_COUNT] * (double)input->width,
            PK__FOURIER_NUMBERS);
    if (!status) {
        count = (size_t)attributes[PK__FOURIER_COUNT] * input->width;
        parser->frequencies += count;
        status = pk_allocate(parser->context, count, sizeof *numbers, "frequencies", &numbers);
    }
    if (!status) {
        pk_random random = {(uint64_t)attributes[PK__FOURIER_SEED], 0, 0};
        for (size_t i = 0; i < count; i++)
            numbers[i] = (pk_real)(attributes[PK__FOURIER_SCALE] * pk_random_normal(&random));
        status = pk__append(parser, "fourier", NULL, count, numbers);
    }
    pk_release(parser->context, numbers);
    return status;
}

/* select: the token that the row's data name. */
static pk_status pk__select_layer(pk__parser *parser, const pk__layer *layer)
{
    const int both[2] = {parser->node, 0};
    if (layer->count > 1)
        return pk__refuse_word(parser->context, "select", NULL, layer->words[1]);
    return pk__graph_append(parser->context, parser->graph, pk_operation_find("select"), 2, both, NULL, 0, NULL,
                            NULL, &parser->node);
}

static pk_status pk__refused_layer(pk__parser *parser, const pk__layer *layer)
{
    (void)layer;
    return pk__fail(parser->context, PK_UNSUPPORTED,
                    "dropout draws a random network at each step, so a step's update is not a function of the "
                    "weights and the examples; train without it");
}

/* Layers that are more than one operation, or need more than numbers. */
static const struct {
    const char *name;
    pk_status (*build)(pk__parser *parser, const pk__layer *layer);
} pk__composites[] = {
    {"dense", pk__weights_layer},      {"conv", pk__weights_layer},        {"position", pk__position_layer},
    {"propagate", pk__constant_layer}, {"constant", pk__constant_layer},   {"fourier", pk__fourier_layer},
    {"select", pk__select_layer},      {"dropout", pk__refused_layer},     {"layer_norm", pk__norm_layer},
    {"rms_norm", pk__norm_layer},      {"batch_norm", pk__constant_layer}, {"attention", pk__attention_layer},
    {"max_pool", pk__max_pool_layer},
};

/* input SHAPE, the first layer. */
static pk_status pk__input_layer(pk__parser *parser, const pk__layer *layer)
{
    pk_context *context = parser->context;
    pk_shape shape;
    pk_status status = PK_OK;
    if (strcmp(layer->words[0], "input") != 0)
        return pk__fail(
            context, PK_FORMAT,
            "a network starts with 'input' and the shape of an example, such as 'input 64', not with '%.40s'",
            layer->words[0]);
    if (layer->count < 2)
        return pk__fail(context, PK_FORMAT,
                        "input needs the shape of an example, such as 'input 64' or 'input 1x28x28'");
    for (int i = 1; i < layer->count && !status; i++)
        status = pk__check_word(context, layer->words[i]);
    if (!status && layer->count > 2)
        status =
            pk__fail(context, PK_FORMAT,
                     "input has one shape, such as 64 or 1x28x28, and '%.40s' stands behind it; layers are "
                     "separated by ';'",
                     layer->words[2]);
    if (!status)
        status = pk__parse_shape(context, layer->words[1], &shape);
    return status ? status : pk_graph_input(context, parser->graph, &shape);
}

static pk_status pk__unknown_layer(pk__parser *parser, const char *word)
{
    pk_context *context = parser->context;
    char name[PK__LONGEST_NAME + 1];
    pk_status status = pk__check_word(context, word);
    if (status)
        return status;
    if (strcmp(word, "add") == 0)
        return pk__fail(context, PK_FORMAT, "'add' is no layer: 'residual' adds its branches");
    if (strcmp(word, "input") == 0)
        return pk__fail(context, PK_FORMAT, "'input' is the first layer, and no other one");
    if (strcmp(word, "residual") == 0)
        return pk__fail(
            context, PK_FORMAT,
            "'residual' has its layers in parentheses: residual( BODY ) or residual( BODY | SHORTCUT )");
    pk__nearest_layer(context, word, strlen(word) < 4 ? 2 : PK__FAR_WORD, name, sizeof name);
    return pk__fail(context, PK_FORMAT,
                    "'%.40s' is not a layer that is known%s%s%s; docs/network-language.md has those that are",
                    word, name[0] ? " (is it '" : "", name, name[0] ? "'?)" : "");
}

static pk_status pk__add_layer(pk__parser *parser, const pk__layer *layer)
{
    if (!parser->graph->node_count)
        return pk__input_layer(parser, layer);
    for (size_t i = 0; i < sizeof pk__composites / sizeof *pk__composites; i++)
        if (strcmp(layer->words[0], pk__composites[i].name) == 0)
            return pk__composites[i].build(parser, layer);
    const pk_operation *operation = pk__named_operation(parser->context, layer->words[0]);
    double attributes[PK_NODE_ATTRIBUTES];
    if (!operation || strcmp(operation->name, "add") == 0)
        return pk__unknown_layer(parser, layer->words[0]);
    pk_status status = pk__plain_layer(parser, layer, operation, attributes);
    return status ? status : pk__append(parser, operation->name, attributes, 0, NULL);
}

/* ---- the language ---------------------------------------------------------------------------------- */

static int pk__is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static int pk__ends_layer(char c)
{
    return c == 0 || c == ';' || c == '(' || c == ')' || c == '|';
}

/* Where there is no more room, that is an error of the next layer, see pk__parse_layers. */
static void pk__write_canonical(pk__parser *parser, const char *text)
{
    const size_t length = strlen(text);
    if (length > parser->room) {
        parser->room = 0;
        parser->full = 1;
        return;
    }
    memcpy(parser->canonical, text, length);
    parser->canonical += length;
    parser->room -= length;
}

/* What stands at a place of the text, for a message. */
static const char *pk__sign_name(const pk__parser *parser, const char *at)
{
    return at < parser->start ? "the start of the text"
           : *at == ';'       ? "';'"
           : *at == '('       ? "'('"
           : *at == ')'       ? "')'"
           : *at == '|'       ? "'|'"
                              : "the end of the text";
}

/* One layer: reads words up to what ends it, and appends them to the canonical text, single blanks between. */
static pk_status pk__split_layer(pk__parser *parser, pk__layer *layer)
{
    size_t used = 0;
    const char *from = parser->at, *before = from - 1;
    layer->count = 0;
    while (!pk__ends_layer(*from)) {
        if (pk__is_blank(*from)) {
            from++;
            continue;
        }
        if (layer->count == PK__LAYER_WORDS)
            return pk__fail(parser->context, PK_FORMAT,
                            "more than %d words behind '%.40s'; layers are separated by ';'", PK__LAYER_WORDS,
                            layer->words[0]);
        layer->words[layer->count++] = layer->text + used;
        while (!pk__ends_layer(*from) && !pk__is_blank(*from)) {
            if (used + 2 > PK__LAYER_TEXT)
                return pk__fail(parser->context, PK_FORMAT,
                                "more than %d characters in one layer; layers are separated by ';'",
                                PK__LAYER_TEXT - 2);
            layer->text[used++] = *from++;
        }
        layer->text[used++] = 0;
    }
    parser->at = from;
    for (int i = 0; i < layer->count; i++) {
        pk__write_canonical(parser, i ? " " : "");
        pk__write_canonical(parser, layer->words[i]);
    }
    return layer->count ? PK_OK
                        : pk__fail(parser->context, PK_FORMAT, "no words, and so no layer, between %s and %s",
                                   pk__sign_name(parser, before), pk__sign_name(parser, from));
}

static pk_status pk__parse_layers(pk__parser *parser);

/* Whether both branches of a residual have one shape. */
static pk_status pk__check_branches(const pk__parser *parser, int body, int shortcut, int given)
{
    const pk_shape *a = &parser->graph->nodes[body].shape, *b = &parser->graph->nodes[shortcut].shape;
    char texts[2][PK_SHAPE_TEXT];
    if (a->rank == b->rank && memcmp(a->dims, b->dims, (size_t)a->rank * sizeof *a->dims) == 0)
        return PK_OK;
    return pk__fail(
        parser->context, PK_SHAPE,
        "residual: branches of %s and of %s cannot be added: its body gives the first, and its %s the second",
        pk_shape_text(a, texts[0]), pk_shape_text(b, texts[1]),
        given ? "shortcut" : "input, which is the shortcut where there is no '|',");
}

/* residual( body ) or residual( body | shortcut ), from behind the '(': y = body(x) + shortcut(x). */
static pk_status pk__parse_residual(pk__parser *parser)
{
    const pk__layer *layer = &parser->layer;
    const int start = parser->node;
    int given = 0;
    if (strcmp(layer->words[0], "residual") != 0 || layer->count != 1)
        return pk__fail(
            parser->context, PK_FORMAT,
            "'%.40s' has no parentheses: only 'residual' has, and words are separated by blanks, as in "
            "'dense 10'",
            layer->words[layer->count - 1]);
    if (!parser->graph->node_count)
        return pk__input_layer(parser, layer);
    if (++parser->depth > PK__NETWORK_DEPTH)
        return pk__fail(parser->context, PK_FORMAT, "residuals are nested more than %d deep",
                        PK__NETWORK_DEPTH);
    parser->at++;
    pk__write_canonical(parser, "( ");
    pk_status status = pk__parse_layers(parser);
    int body = parser->node, shortcut = start;
    if (!status && *parser->at == '|') {
        given = 1;
        parser->at++;
        parser->node = start;
        pk__write_canonical(parser, " | ");
        status = pk__parse_layers(parser);
        shortcut = parser->node;
    }
    if (!status && *parser->at != ')')
        status = pk__fail(
            parser->context, PK_FORMAT,
            *parser->at ? "a second '|' where the ')' of a residual should be: it has two branches at most"
                        : "the ')' of a residual is missing");
    if (status)
        return status;
    parser->depth--;
    parser->at++;
    pk__write_canonical(parser, " )");
    while (pk__is_blank(*parser->at))
        parser->at++;
    if (!pk__ends_layer(*parser->at) || *parser->at == '(')
        return pk__fail(parser->context, PK_FORMAT, "'%.20s' behind the ')' of a residual; a ';' is missing",
                        parser->at);
    parser->node = body;
    status = pk__check_branches(parser, body, shortcut, given);
    return status ? status : pk__append_add(parser, shortcut);
}

/* Layers up to what is no ';'. Of a failure, the number of the innermost layer is kept. */
static pk_status pk__parse_layers(pk__parser *parser)
{
    for (;;) {
        const int number = ++parser->number;
        pk_status status = number > PK__NETWORK_LAYERS
                               ? pk__fail(parser->context, PK_FORMAT, "more than %d layers", PK__NETWORK_LAYERS)
                               : pk__split_layer(parser, &parser->layer);
        if (!status)
            status = *parser->at == '(' ? pk__parse_residual(parser) : pk__add_layer(parser, &parser->layer);
        if (!status && parser->full)
            status =
                pk__fail(parser->context, PK_FORMAT,
                         "the network's text is longer than the %d characters that a run directory records",
                         PK__NETWORK_TEXT);
        if (!status && parser->depth == 0 && *parser->at && *parser->at != ';')
            status = pk__fail(
                parser->context, PK_FORMAT,
                *parser->at == ')' ? "')' outside of a residual: there is no '(' for it"
                : *parser->at == '('
                    ? "'(' behind the ')' of a residual; a ';' is missing"
                    : "'|' outside of a residual, whose two branches it separates; layers are separated "
                      "by ';'");
        if (status) {
            if (!parser->failed)
                parser->failed = number;
            return status;
        }
        if (*parser->at != ';')
            return PK_OK;
        parser->at++;
        pk__write_canonical(parser, "; ");
    }
}

/* The message of a layer, with its number in front. */
static pk_status pk__name_layer(pk_context *context, pk_status status, int number)
{
    char message[PK_MESSAGE_SIZE];
    if (!context)
        return status;
    memcpy(message, context->message, sizeof message);
    return pk__fail(context, status, "network, layer %d: %.480s", number, message);
}

PK_API pk_status pk_network_parse_with(pk_context *context, const char *text, const pk_constants *constants,
                                       pk_graph *graph)
{
    if (!text || graph->node_count)
        return pk__fail(context, PK_ARGUMENT,
                        text ? "network: the graph is in use already" : "network: no text");
    /* A sign becomes at most three characters, a blank on each side. */
    const size_t length = pk__min(strlen(text), PK__NETWORK_TEXT),
                 room = pk__min(3 * length + 3, PK__NETWORK_TEXT);
    pk_status status = pk_allocate(context, room + 1, 1, "the network's text", &graph->text);
    if (!status) {
        pk__parser parser;
        memset(&parser, 0, sizeof parser);
        parser.context = context;
        parser.graph = graph;
        parser.constants = constants;
        parser.start = parser.at = text;
        parser.canonical = graph->text;
        parser.room = room;
        status = pk__parse_layers(&parser);
        *parser.canonical = 0;
        if (status)
            status = pk__name_layer(context, status, parser.failed);
    }
    if (!status) {
        pk__graph_analyse(graph);
        if (!graph->parameters)
            status = pk__fail(context, PK_ARGUMENT, "network: it has no weights, so nothing can be trained");
        else if (!graph->nodes[graph->node_count - 1].varies)
            status =
                pk__fail(context, PK_ARGUMENT,
                         "network: its outputs do not depend on its weights: a 'constant' leaves the values of "
                         "the layers before it behind, and no layer with weights follows");
    }
    if (!status && graph->nodes[graph->node_count - 1].shape.rank != 1) {
        char shape[PK_SHAPE_TEXT];
        status = pk__fail(
            context, PK_SHAPE,
            "network: its outputs are %s numbers, not a vector; a last layer 'flatten' makes one of them, "
            "'token' or 'mean_tokens' of tokens",
            pk_shape_text(&graph->nodes[graph->node_count - 1].shape, shape));
    }
    if (status)
        pk_graph_release(context, graph);
    return status;
}

PK_API pk_status pk_network_parse(pk_context *context, const char *text, pk_graph *graph)
{
    return pk_network_parse_with(context, text, NULL, graph);
}

PK_API const pk_node *pk_graph_named(const pk_graph *graph, const pk_node *after, pk_array *array)
{
    for (size_t n = after ? (size_t)(after - graph->nodes) + 1 : 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->constant_name[0] || node->constants_shared)
            continue;
        pk__constants_view(node, array);
        return node;
    }
    return NULL;
}

static pk_status pk__load_from_graph(void *user, pk_context *context, const char *name, pk_array *array)
{
    const pk_graph *graph = (const pk_graph *)user;
    const pk_node *node = NULL;
    while ((node = pk_graph_named(graph, node, array)) != NULL)
        if (strcmp(node->constant_name, name) == 0)
            return PK_OK;
    return pk__fail(context, PK_ARGUMENT, "the network holds no array '%.40s'", name);
}

PK_API pk_constants pk_graph_constants(const pk_graph *graph)
{
    pk_constants constants = {pk__load_from_graph, (void *)graph}; /* only read */
    return constants;
}

PK_API pk_status pk_network_initialize(pk_context *context, const pk_graph *graph, uint64_t seed,
                                       pk_real *weights)
{
    if (!graph->node_count || !weights)
        return pk__fail(context, PK_ARGUMENT, "initialisation needs a network and room for its weights");
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        pk_random random = {seed, (uint64_t)node->layer, 0};
        if (node->operation->initialize)
            node->operation->initialize(node, &random, weights + node->weight_offset);
        else
            pk__initialize_matrix(PK_INITIAL_DEFAULT, 1, graph->nodes[node->inputs[0]].width, 1,
                                  node->weight_count, &random, weights + node->weight_offset);
    }
    return PK_OK;
}

PK__END_COLD_CODE

/* pathkernel/training/loss.h: implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- rules: value, and the gradient where it is not NULL; gradient may be f ---------------------------- */

static double pk__squared(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)d;
    }
    return sum / 2;
}

static double pk__mean_squared(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, factor = 2 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j];
        sum += d * d;
        if (gradient)
            gradient[j] = (pk_real)(factor * d);
    }
    return sum / (double)outputs;
}

/* With Z = 1 + rest after the largest output is subtracted: log Z = log1p(rest), and 1 - p = rest / Z for
 * the largest, so that nothing cancels where the network is sure. */
static double pk__softmax_cross_entropy(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    const double largest = f[top];
    double rest = 0, total = 0, value = 0, e[16];
    for (size_t first = 0; first < outputs; first += 16) {
        const size_t count = pk__min(outputs - first, 16);
        for (size_t j = 0; j < count; j++) {
            e[j] = f[first + j] - largest;
            total += y[first + j];
            if (y[first + j] != 0) /* 0 * infinity is 0 here */
                value -= y[first + j] * e[j];
        }
        pk__all_exponential(count, 1, e, e);
        for (size_t j = 0; j < count; j++) { /* of the largest: 1, NaN for infinity */
            rest += first + j == top ? 0 : e[j];
            if (gradient)
                gradient[first + j] = (pk_real)e[j];
        }
    }
    if (gradient) {
        const double inverse = 1 / (1 + rest);
        for (size_t j = 0; j < outputs; j++) {
            double p = gradient[j] * inverse, q = j == top ? rest * inverse : 1 - p;
            gradient[j] = (pk_real)(p * (total - y[j]) - y[j] * q);
        }
    }
    return value + total * log1p(rest);
}

static double pk__logistic(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, count = (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double x = f[j], t = y[j], e = exp(-fabs(x)), tail = e / (1 + e); /* sigmoid(-|x|) */
        sum += (x > 0 ? (1 - t) * x : -t * x) + log1p(e);
        if (gradient) /* sigmoid(x) - t without cancelling at t = 0 or 1 */
            gradient[j] = (pk_real)((x > 0 ? (1 - t) - tail : tail - t) / count);
    }
    return sum / count;
}

static double pk__nll(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0;
    for (size_t j = 0; j < outputs; j++) {
        if (y[j] != 0)
            sum -= (double)y[j] * f[j];
        if (gradient)
            gradient[j] = -y[j];
    }
    return sum;
}

static double pk__huber(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    double sum = 0, factor = 1 / (double)outputs;
    for (size_t j = 0; j < outputs; j++) {
        double d = (double)f[j] - y[j], size = fabs(d);
        sum += size < 1 ? 0.5 * d * d : size - 0.5;
        if (gradient)
            gradient[j] = (pk_real)(d <= -1 ? -factor : d >= 1 ? factor : factor * d);
    }
    return sum / (double)outputs;
}

static double pk__hinge(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient)
{
    if (outputs == 1) {
        double z = 1 - (double)y[0] * f[0];
        if (gradient)
            gradient[0] = z > 0 ? -y[0] : z != z ? (pk_real)z : 0;
        return z > 0 || z != z ? z : 0;
    }
    size_t k = 0;
    for (size_t j = 1; j < outputs; j++)
        if (y[j] > y[k])
            k = j;
    double own = f[k], factor = 1 / (double)outputs, sum = 0, sum_gradient = 0;
    for (size_t j = 0; j < outputs; j++) {
        double z = j == k ? 0 : 1 - own + f[j], g = z > 0 ? factor : z != z ? z : 0;
        if (z > 0 || z != z)
            sum += z;
        sum_gradient += g;
        if (gradient)
            gradient[j] = (pk_real)g;
    }
    if (gradient)
        gradient[k] = (pk_real)-sum_gradient;
    return sum / (double)outputs;
}

/* ---- products with the Hessian; product may be v ------------------------------------------------------- */

static void pk__squared_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                pk_real *product)
{
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = v[j];
}

static void pk__mean_squared_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                     pk_real *product)
{
    const double factor = 2 / (double)outputs;
    (void)f, (void)y;
    for (size_t j = 0; j < outputs; j++)
        product[j] = (pk_real)(factor * v[j]);
}

/* sum_k y_k (diag p - p p^T) v, from the differences to the largest output's v: small where the network is sure. */
static void pk__softmax_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                pk_real *product)
{
    size_t top = 0;
    for (size_t j = 1; j < outputs; j++)
        if (f[j] > f[top])
            top = j;
    double sum = 0, total = 0, mean = 0;
    const double largest = f[top], base = v[top];
    for (size_t j = 0; j < outputs; j++) {
        const double e = j == top ? 1 : exp(f[j] - largest);
        sum += e;
        total += y[j];
        mean += e * (v[j] - base);
    }
    mean /= sum;
    for (size_t j = 0; j < outputs; j++) {
        const double p = (j == top ? 1 : exp(f[j] - largest)) / sum;
        product[j] = (pk_real)(total * p * ((v[j] - base) - mean));
    }
}

static void pk__logistic_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                                 pk_real *product)
{
    (void)y;
    for (size_t j = 0; j < outputs; j++) {
        const double e = exp(-fabs(f[j])), tail = e / (1 + e);
        product[j] = (pk_real)(tail * (1 - tail) / (double)outputs * v[j]);
    }
}

/* nll and hinge: (piecewise) linear. */
static void pk__no_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                           pk_real *product)
{
    (void)f, (void)y, (void)v;
    memset(product, 0, outputs * sizeof *product);
}

static void pk__huber_hessian(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v,
                              pk_real *product)
{
    for (size_t j = 0; j < outputs; j++)
        product[j] = fabs((double)f[j] - y[j]) < 1 ? (pk_real)(v[j] / (double)outputs) : 0;
}

/* ---- what targets must be: NULL, or the words for what is asked ------------------------------------- */

static const char *pk__accept_any(size_t outputs, const pk_real *y)
{
    (void)outputs, (void)y;
    return NULL;
}

static const char *pk__accept_masses(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (y[j] < 0)
            return "numbers >= 0";
    return NULL;
}

static const char *pk__accept_probabilities(size_t outputs, const pk_real *y)
{
    for (size_t j = 0; j < outputs; j++)
        if (!(y[j] >= 0 && y[j] <= 1))
            return "numbers in [0, 1]";
    return NULL;
}

static const char *pk__accept_class(size_t outputs, const pk_real *y)
{
    if (outputs == 1)
        return y[0] == 1 || y[0] == -1 ? NULL : "+1 or -1";
    size_t ones = 0, zeros = 0;
    for (size_t j = 0; j < outputs; j++) {
        ones += y[j] == 1;
        zeros += y[j] == 0;
    }
    return ones == 1 && ones + zeros == outputs ? NULL : "one 1 and otherwise 0";
}

typedef struct pk__loss_rule {
    pk_loss loss;
    const char *name;
    double (*evaluate)(size_t outputs, const pk_real *f, const pk_real *y, pk_real *gradient);
    void (*curvature)(size_t outputs, const pk_real *f, const pk_real *y, const pk_real *v, pk_real *product);
    const char *(*accept)(size_t outputs, const pk_real *y);
    int classes; /* integer targets are classes for one output, too */
} pk__loss_rule;

static const pk__loss_rule pk__losses[] = {
    {PK_SQUARED, "squared", pk__squared, pk__squared_hessian, pk__accept_any, 0},
    {PK_MEAN_SQUARED, "mean_squared", pk__mean_squared, pk__mean_squared_hessian, pk__accept_any, 0},
    {PK_SOFTMAX_CROSS_ENTROPY, "softmax_cross_entropy", pk__softmax_cross_entropy, pk__softmax_hessian,
     pk__accept_masses, 1},
    {PK_LOGISTIC, "logistic", pk__logistic, pk__logistic_hessian, pk__accept_probabilities, 0},
    {PK_NLL, "nll", pk__nll, pk__no_hessian, pk__accept_masses, 1},
    {PK_HUBER, "huber", pk__huber, pk__huber_hessian, pk__accept_any, 0},
    {PK_HINGE, "hinge", pk__hinge, pk__no_hessian, pk__accept_class, 0},
};

enum { PK__LOSSES = (int)(sizeof pk__losses / sizeof pk__losses[0]) };

PK__PRIVATE const pk__loss_rule *pk__loss_find(pk_loss loss)
{
    for (int i = 0; i < PK__LOSSES; i++)
        if (pk__losses[i].loss == loss)
            return &pk__losses[i];
    return NULL;
}

PK_API pk_status pk_loss_parse(pk_context *context, const char *name, pk_loss *loss)
{
    if (!name || !loss)
        return pk__fail(context, PK_ARGUMENT, "loss: the name or the place for the loss is NULL");
    char names[128] = "";
    for (int i = 0; i < PK__LOSSES; i++) {
        if (strcmp(pk__losses[i].name, name) == 0) {
            *loss = pk__losses[i].loss;
            return PK_OK;
        }
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "",
                 pk__losses[i].name);
    }
    return pk__fail(context, PK_FORMAT, "'%.40s' is not a loss; these are: %s", name, names);
}

PK_API const char *pk_loss_name(pk_loss loss)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    return rule ? rule->name : "unknown";
}

PK_API double pk_loss_value(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    return rule ? rule->evaluate(outputs, f, target, NULL) : (double)NAN;
}

PK_API void pk_loss_gradient(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                             pk_real *gradient)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        rule->evaluate(outputs, f, target, gradient);
    else
        for (size_t j = 0; j < outputs; j++)
            gradient[j] = (pk_real)NAN;
}

PK_API void pk_loss_hessian_product(pk_loss loss, size_t outputs, const pk_real *f, const pk_real *target,
                                    const pk_real *direction, pk_real *product)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        rule->curvature(outputs, f, target, direction, product);
    else
        for (size_t j = 0; j < outputs; j++)
            product[j] = (pk_real)NAN;
}

/* ---- targets ------------------------------------------------------------------------------------------ */

/* The target of one row as outputs numbers. A class out of range gives zeros. */
PK__PRIVATE void pk__loss_target(const pk__loss_rule *rule, const pk_array *targets, size_t row, size_t outputs,
                                 pk_real *target)
{
    if (!pk__is_labels(targets)) {
        pk_array_reals(targets, row * outputs, outputs, target);
        return;
    }
    const int64_t label = pk__label(targets, row);
    if (outputs == 1 && !rule->classes)
        target[0] = (pk_real)label;
    else
        for (size_t j = 0; j < outputs; j++)
            target[j] = label == (int64_t)j;
}

static pk_status pk__loss_check_rows(pk_context *context, const pk__loss_rule *rule, const pk_array *targets,
                                     size_t outputs, pk_real *target)
{
    const int labels = pk__is_labels(targets) && (outputs > 1 || rule->classes);
    for (size_t row = 0; row < targets->shape[0]; row++) {
        if (labels) {
            const int64_t label = pk__label(targets, row);
            if (label < 0 || (uint64_t)label >= outputs)
                return pk__fail(context, PK_ARGUMENT, "targets, row %zu: label %lld is not in [0, %zu)", row,
                                (long long)label, outputs);
            continue;
        }
        pk__loss_target(rule, targets, row, outputs, target);
        const char *asked = rule->accept(outputs, target);
        if (asked)
            return pk__fail(context, PK_ARGUMENT, "targets, row %zu: %s takes %s; the row starts with %g", row,
                            rule->name, asked, (double)target[0]);
    }
    return PK_OK;
}

PK_API pk_status pk_loss_check(pk_context *context, pk_loss loss, const pk_dataset *dataset, size_t outputs)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "targets: %d is not a loss", (int)loss);
    if (!dataset || outputs == 0)
        return pk__fail(context, PK_ARGUMENT, "targets: a dataset and at least one output are needed");
    pk_real *target = NULL;
    pk_status status = pk__dataset_check_targets(context, dataset, outputs);
    if (status == PK_OK)
        status = pk_allocate(context, outputs, sizeof *target, "one target", &target);
    if (status == PK_OK)
        status = pk__loss_check_rows(context, rule, &dataset->targets, outputs, target);
    pk_release(context, target);
    return status;
}

PK_API void pk_loss_targets(pk_loss loss, const pk_dataset *dataset, const int64_t *items, size_t count,
                            size_t outputs, pk_real *targets)
{
    const pk__loss_rule *rule = pk__loss_find(loss);
    if (rule)
        for (size_t b = 0; b < count; b++)
            pk__loss_target(rule, &dataset->targets, (size_t)items[b], outputs, targets + b * outputs);
}

/* ---- the gradient of a batch -------------------------------------------------------------------------- */

typedef struct pk__gradient_lane {
    pk__tape tape;
    pk_real *inputs, *targets; /* block x input width, block x outputs */
} pk__gradient_lane;

typedef struct pk__gradient_group {
    double objective;
    size_t not_finite; /* position in the batch, SIZE_MAX: none */
} pk__gradient_group;

/* How a batch is cut: blocks of examples that one thread takes at a time, groups of consecutive blocks that
 * share a partial gradient. By shapes only. */
typedef struct pk__gradient_plan {
    size_t block, blocks, groups;
} pk__gradient_plan;

PK__PRIVATE pk__gradient_plan pk__gradient_cut(size_t parameters, size_t count)
{
    pk__gradient_plan plan = {64, 0, 0};
    plan.blocks = count / plan.block + (count % plan.block != 0);
    size_t most = ((size_t)1 << 22) / (parameters + 1);
    most = most < 2 ? 2 : most > 32 ? 32 : most;
    plan.groups = plan.blocks < most ? plan.blocks : most;
    return plan;
}

/* Multiplications of a forward pass with one row, about: what a thread is worth being started for. */
PK__PRIVATE double pk__graph_work(const pk_graph *graph)
{
    double work = 0;
    for (size_t n = 1; n < graph->node_count; n++)
        work += (double)graph->nodes[n].weight_count * (double)pk__max(graph->nodes[n].positions, 1);
    return work;
}

/* workspace: graph, largest_batch and threads are set. */
PK__PRIVATE void pk__gradient_take(pk__arena *arena, const pk_graph *graph, pk_gradient_workspace *workspace)
{
    pk__gradient_plan plan = pk__gradient_cut(graph->parameters, workspace->largest_batch);
    size_t rows = workspace->largest_batch < plan.block ? workspace->largest_batch : plan.block, partial = 0;
    if (!pk__multiply(plan.groups > 1 ? plan.groups - 1 : 0, graph->parameters, &partial))
        arena->overflow = 1;
    workspace->lanes = pk__arena_take(arena, (size_t)workspace->threads, sizeof *workspace->lanes);
    workspace->groups = pk__arena_take(arena, plan.groups, sizeof *workspace->groups);
    workspace->partial = pk__arena_take(arena, partial, sizeof *workspace->partial);
    for (int thread = 0; thread < workspace->threads; thread++) {
        pk__gradient_lane lane;
        size_t inputs = 0, targets = 0;
        if (!pk__multiply(rows, graph->input_width, &inputs) ||
            !pk__multiply(rows, graph->output_width, &targets))
            arena->overflow = 1;
        memset(&lane, 0, sizeof lane);
        pk__pass_take(arena, graph, rows, 1, 0, &lane.tape);
        lane.inputs = pk__arena_take(arena, inputs, sizeof *lane.inputs);
        lane.targets = pk__arena_take(arena, targets, sizeof *lane.targets);
        if (arena->base && !arena->overflow)
            workspace->lanes[thread] = lane;
    }
}

PK_API pk_status pk_gradient_prepare(pk_context *context, const pk_graph *graph, size_t largest_batch,
                                     pk_gradient_workspace *workspace)
{
    if (!graph || !workspace || largest_batch == 0 || graph->node_count == 0)
        return pk__fail(context, PK_ARGUMENT,
                        "gradient: a graph, a workspace and batches of at least 1 example are needed");
    pk_gradient_workspace taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.largest_batch = largest_batch;
    size_t groups = pk__gradient_cut(graph->parameters, largest_batch).groups;
    taken.threads = pk_threads(context);
    if ((size_t)taken.threads > groups)
        taken.threads = (int)groups;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__gradient_take(&arena, graph, &taken);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "gradient: the memory for batches of %zu overflows",
                        largest_batch);
    void *memory = NULL;
    pk_status status = pk_allocate(context, arena.used, 1, "the workspace of the batch gradient", &memory);
    if (status != PK_OK)
        return status;
    arena.base = memory;
    arena.capacity = arena.used;
    arena.used = 0;
    pk__gradient_take(&arena, graph, &taken);
    taken.memory = memory;
    *workspace = taken;
    return PK_OK;
}

PK_API void pk_gradient_release(pk_context *context, pk_gradient_workspace *workspace)
{
    if (!workspace)
        return;
    pk_release(context, workspace->memory);
    memset(workspace, 0, sizeof *workspace);
}

/* What all blocks of one call share. */
typedef struct pk__gradient_job {
    const pk__loss_rule *rule;
    const pk_real *weights;
    const pk_dataset *dataset;
    const pk_batch *batch;
    pk__gradient_plan plan;
} pk__gradient_job;

/* The losses of the rows of a block that went forward, and their weighted gradients as the tape's seed. */
static void pk__gradient_seed(const pk__gradient_job *job, pk__gradient_lane *lane, size_t first, size_t rows,
                              pk__gradient_group *sum)
{
    const pk_batch *batch = job->batch;
    const size_t outputs = lane->tape.graph->output_width;
    const pk_real *output = pk__pass_output(&lane->tape);
    pk_real *seed = pk__pass_seed(&lane->tape);
    const int finite = pk__all_finite(output, rows * outputs);
    for (size_t row = 0; !finite && sum->not_finite == SIZE_MAX && row < rows; row++)
        if (!pk__all_finite(output + row * outputs, outputs))
            sum->not_finite = first + row;
    for (size_t row = 0; row < rows; row++, output += outputs, seed += outputs) {
        pk_real *target = lane->targets + row * outputs;
        double weight = batch->weights ? batch->weights[first + row] : 1 / (double)batch->count;
        pk__loss_target(job->rule, &job->dataset->targets, (size_t)batch->items[first + row], outputs, target);
        sum->objective += weight * job->rule->evaluate(outputs, output, target, seed);
        for (size_t j = 0; j < outputs; j++)
            seed[j] *= (pk_real)weight;
    }
}

/* gradient += the other groups' parts, in order, for one range of the parameters; whether it is finite. */
static int pk__gradient_reduce_range(pk_real *gradient, const pk_real *partial, size_t groups,
                                     size_t parameters, size_t first, size_t count)
{
    pk_real *sum = gradient + first;
    for (size_t group = 1; group < groups; group++) {
        const pk_real *part = partial + (group - 1) * parameters + first;
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            sum[i] += part[i];
    }
    return pk__all_finite(sum, count);
}

/* The rows of a block, by several threads where they are long. */
static void pk__gradient_inputs(const pk__gradient_job *job, const pk__tape *tape, size_t first, size_t rows,
                                pk_real *inputs)
{
    const size_t width = pk_dataset_width(job->dataset), parts = rows * width >> 14;
    const int64_t *items = job->batch->items + first;
    const int threads = (int)pk__min((size_t)pk__max((size_t)tape->threads, 1), parts);
    if (threads <= 1) {
        pk_dataset_inputs(job->dataset, items, rows, inputs);
        return;
    }
    pk__team team = pk__team_of(tape->context, threads, parts);
    PK__PARALLEL(team)
    for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team)) {
        const size_t from = rows * part / parts, to = rows * (part + 1) / parts;
        pk_dataset_inputs(job->dataset, items + from, to - from, inputs + from * width);
    }
    pk__team_end(&team);
}

/* gradient = the part of one group of blocks. */
static void pk__gradient_group_run(const pk__gradient_job *job, size_t group, pk__gradient_lane *lane,
                                   pk__gradient_group *result, pk_real *gradient)
{
    const pk_batch *batch = job->batch;
    pk__tape *tape = &lane->tape;
    size_t block = job->plan.block;
    size_t first = job->plan.blocks * group / job->plan.groups * block;
    size_t end = job->plan.blocks * (group + 1) / job->plan.groups * block;
    if (end > batch->count)
        end = batch->count;
    pk__gradient_group sum = {0, SIZE_MAX}; /* results of groups share cache lines: written once */
    memset(gradient, 0, tape->graph->parameters * sizeof *gradient);
    for (; first < end; first += block) {
        size_t rows = end - first < block ? end - first : block;
        pk__line line = {job->weights, NULL, NULL};
        pk__gradient_inputs(job, tape, first, rows, lane->inputs);
        pk__pass_forward(tape, &line, rows, lane->inputs);
        pk__gradient_seed(job, lane, first, rows, &sum);
        pk__pass_reverse(tape, &line, rows, 1);
        pk__pass_weight_gradient(tape, rows, gradient);
    }
    *result = sum;
}

/* The same for all parameters. Ranges are independent; so many of all groups are worth a region of several threads. */
enum { PK__REDUCE_WORTH = 64 };
PK__PRIVATE int pk__gradient_reduce(pk_context *context, pk_real *gradient, const pk_real *partial,
                                    size_t groups, size_t parameters, int threads)
{
    const size_t range = 4096, ranges = pk__blocks(parameters, range);
    int finite = 1;
    if (threads > 1 && groups * ranges >= (size_t)PK__REDUCE_WORTH) {
        pk__team team = pk__team_of(context, threads, ranges);
        PK__PARALLEL(team)
        for (size_t r = pk__first_task(&team); r < ranges; r = pk__next_task(&team))
            if (!pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                           pk__min(parameters - r * range, range))) {
                PK__ATOMIC_WRITE
                finite = 0;
            }
        pk__team_end(&team);
    } else {
        for (size_t r = 0; r < ranges; r++)
            finite &= pk__gradient_reduce_range(gradient, partial, groups, parameters, r * range,
                                                pk__min(parameters - r * range, range));
    }
    return finite;
}

/* Whether a batch fits a dataset and a network; name is for messages. */
PK__PRIVATE pk_status pk__batch_arguments(pk_context *context, const char *name, const pk_graph *graph,
                                          const pk__loss_rule *rule, const pk_dataset *dataset,
                                          const pk_batch *batch)
{
    if (!dataset || !batch || (batch->count && !batch->items))
        return pk__fail(context, PK_ARGUMENT, "%s: an argument is NULL", name);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "%s: the loss is unknown", name);
    const pk_array *inputs = &dataset->inputs, *targets = &dataset->targets;
    size_t examples = inputs->rank < 1 ? 0 : inputs->shape[0], outputs = graph->output_width;
    pk_status status =
        pk_array_check_rows(context, inputs, graph->input_shape.rank, graph->input_shape.dims, "inputs");
    if (status != PK_OK)
        return status;
    if (targets->rank < 1 || targets->shape[0] != examples || !pk__fit_outputs(targets, outputs))
        return pk__fail(context, PK_SHAPE, "%s: %zu targets of %zu numbers for %zu examples and %zu outputs",
                        name, targets->rank < 1 ? (size_t)0 : targets->shape[0], targets->row_items, examples,
                        outputs);
    for (size_t b = 0; b < batch->count; b++)
        if (batch->items[b] < 0 || (uint64_t)batch->items[b] >= examples)
            return pk__fail(context, PK_ARGUMENT, "%s: batch position %zu is example %lld of %zu", name, b,
                            (long long)batch->items[b], examples);
    return PK_OK;
}

static pk_status pk__gradient_arguments(pk_context *context, const pk_graph *graph, const pk__loss_rule *rule,
                                        const pk_real *weights, const pk_dataset *dataset,
                                        const pk_batch *batch, const pk_gradient_workspace *workspace,
                                        const pk_real *gradient)
{
    if (!graph || !batch || !workspace || (graph->parameters && (!weights || !gradient)))
        return pk__fail(context, PK_ARGUMENT, "gradient: an argument is NULL");
    pk_status status = pk__batch_arguments(context, "gradient", graph, rule, dataset, batch);
    if (status == PK_OK && (workspace->graph != graph || batch->count > workspace->largest_batch))
        return pk__fail(context, PK_ARGUMENT, "gradient: the workspace is for batches of up to %zu%s, not %zu",
                        workspace->largest_batch, workspace->graph != graph ? " of another graph" : "",
                        batch->count);
    return status;
}

PK_API pk_status pk_batch_gradient(pk_context *context, const pk_graph *graph, pk_loss loss,
                                   const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                   pk_gradient_workspace *workspace, double *objective, pk_real *gradient)
{
    pk__gradient_job job = {pk__loss_find(loss), weights, dataset, batch, {0, 0, 0}};
    pk_status status =
        pk__gradient_arguments(context, graph, job.rule, weights, dataset, batch, workspace, gradient);
    if (status != PK_OK)
        return status;
    size_t parameters = graph->parameters;
    job.plan = pk__gradient_cut(parameters, batch->count);
    size_t groups = job.plan.groups;
    pk__gradient_lane *lanes = workspace->lanes;
    /* A thread is started for about a million flops or more. */
    const double work = 6.0 * pk__graph_work(graph) * (double)batch->count / 1048576.0;
    int threads = pk_threads(context);
    threads = threads <= work ? threads : work < 1 ? 1 : (int)work;
    /* More threads than groups share the operations of each group. */
    const int inside = (size_t)threads > groups ? threads : 0;
    threads = (int)pk__min((size_t)threads, (size_t)workspace->threads);
    lanes[0].tape.threads = inside;
    lanes[0].tape.context = context;
    if (groups == 0) {
        memset(gradient, 0, parameters * sizeof *gradient);
        workspace->groups[0].objective = 0;
        workspace->groups[0].not_finite = SIZE_MAX;
    } else if (inside || threads <= 1) {
        for (size_t group = 0; group < groups; group++)
            pk__gradient_group_run(&job, group, lanes, &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
    } else {
        pk__team team = pk__team_of(context, threads, groups);
        PK__PARALLEL(team)
        for (size_t group = pk__first_task(&team); group < groups; group = pk__next_task(&team))
            pk__gradient_group_run(&job, group, &lanes[pk__thread()], &workspace->groups[group],
                                   group ? workspace->partial + (group - 1) * parameters : gradient);
        pk__team_end(&team);
    }
    const int finite = pk__gradient_reduce(context, gradient, workspace->partial, groups, parameters,
                                           inside ? inside : threads);
    double sum = workspace->groups[0].objective;
    size_t not_finite = workspace->groups[0].not_finite;
    for (size_t group = 1; group < groups; group++) {
        sum += workspace->groups[group].objective;
        if (not_finite == SIZE_MAX)
            not_finite = workspace->groups[group].not_finite;
    }
    if (objective)
        *objective = sum;
    if (not_finite != SIZE_MAX)
        return pk__fail(context, PK_NOT_FINITE,
                        "gradient: the network's output is not finite at batch position %zu "
                        "(example %lld)",
                        not_finite, (long long)batch->items[not_finite]);
    if (!isfinite(sum) || !finite)
        return pk__fail(context, PK_NOT_FINITE, "gradient: the %s is not finite",
                        isfinite(sum) ? "gradient" : "objective");
    return PK_OK;
}

PK__END_CODE

/* pathkernel/training/derivatives.h: implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- a pass over a batch ------------------------------------------------------------------------------- */

/* One thread's memory. */
typedef struct pk__sweep_lane {
    pk__tape tape;
    pk_real *inputs, *target; /* block x D, C */
    pk_real **second;         /* by node: the tangent of its cotangent, rows x width */
    pk_real *zeros;           /* block x the widest input of a layer */
    pk_real *part;            /* 2 x the largest number of weights of a layer */
} pk__sweep_lane;

typedef struct pk__sweep {
    const char *name; /* for messages */
    const pk_graph *graph;
    const pk_real *weights, *direction;
    pk_matrix inputs; /* or: */
    const pk_dataset *dataset;
    const pk_batch *batch;
    const pk__loss_rule *rule;
    size_t rows, copies; /* cotangents a row; 0: no reverse */
    int tangents, second;
    /* Takes rows first ..., whose inputs are in the lane; adds to sum where there is one. The first of them with a
     * result that is not finite, or SIZE_MAX. */
    size_t (*block)(const struct pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                    pk_real *sum);
    pk_matrix cotangents, input_directions;
    pk_matrix of_weights, of_inputs, tangents_out;
    double *losses;
    pk_real *sum; /* P, NULL: none */
} pk__sweep;

static void pk__sweep_take(pk__arena *arena, const pk__sweep *sweep, size_t rows, pk__sweep_lane *lane)
{
    const pk_graph *graph = sweep->graph;
    size_t widest = 0, most = 0;
    memset(lane, 0, sizeof *lane);
    pk__pass_take(arena, graph, rows, sweep->copies, sweep->tangents, &lane->tape);
    lane->inputs = pk__arena_take(arena, rows, graph->input_width * sizeof(pk_real));
    lane->target = pk__arena_take(arena, graph->output_width, sizeof(pk_real));
    if (!sweep->second)
        return;
    lane->second = pk__arena_take(arena, graph->node_count, sizeof *lane->second);
    for (size_t n = 0; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        pk_real *second = node->varies ? pk__arena_take(arena, rows, node->width * sizeof(pk_real)) : NULL;
        if (lane->second && !arena->overflow)
            lane->second[n] = second;
        if (!node->weight_count)
            continue;
        most = pk__max(most, node->weight_count);
        for (int j = 0; j < node->input_count; j++)
            widest = pk__max(widest, graph->nodes[node->inputs[j]].width);
    }
    lane->zeros = pk__arena_take(arena, rows, widest * sizeof(pk_real));
    lane->part = pk__arena_take(arena, most, 2 * sizeof(pk_real));
    if (lane->zeros && !arena->overflow)
        memset(lane->zeros, 0, rows * widest * sizeof(pk_real));
}

static void pk__sweep_inputs(const pk__sweep *sweep, size_t first, size_t rows, pk_real *to)
{
    const size_t width = sweep->graph->input_width;
    if (sweep->dataset)
        pk_dataset_inputs(sweep->dataset, sweep->batch->items + first, rows, to);
    else
        for (size_t r = 0; r < rows; r++)
            memcpy(to + r * width, sweep->inputs.data + (first + r) * sweep->inputs.ld, width * sizeof *to);
}

/* A group of blocks, which a thread takes at a time, and which has its own sum. The first row with a result that is
 * not finite, or SIZE_MAX. */
static size_t pk__sweep_group(const pk__sweep *sweep, const pk__gradient_plan *plan, size_t group,
                              unsigned char *memory, size_t bytes, pk_real *sum)
{
    size_t first = plan->blocks * group / plan->groups * plan->block, bad = SIZE_MAX;
    const size_t end = pk__min(plan->blocks * (group + 1) / plan->groups * plan->block, sweep->rows);
    pk__arena arena = {memory, bytes, 0, 0};
    pk__sweep_lane lane;
    pk__sweep_take(&arena, sweep, pk__min(plan->block, sweep->rows), &lane);
    if (sum)
        memset(sum, 0, sweep->graph->parameters * sizeof *sum);
    for (; first < end; first += plan->block) {
        const size_t rows = pk__min(end - first, plan->block);
        pk__sweep_inputs(sweep, first, rows, lane.inputs);
        const size_t found = sweep->block(sweep, &lane, first, rows, sum);
        bad = bad == SIZE_MAX ? found : bad;
    }
    return bad;
}

/* Checks the rows, takes the memory, runs the blocks. */
static pk_status pk__sweep_run(pk_context *context, const pk__sweep *sweep)
{
    const pk_graph *graph = sweep->graph;
    const size_t parameters = graph->parameters;
    pk__gradient_plan plan = pk__gradient_cut(parameters, sweep->rows);
    if (!sweep->sum) {
        plan.block = sweep->copies > 1 ? pk__max(64 / sweep->copies, 1) : 64;
        plan.groups = plan.blocks = pk__blocks(sweep->rows, plan.block);
    }
    if (!sweep->rows) {
        if (sweep->sum)
            memset(sweep->sum, 0, parameters * sizeof *sweep->sum);
        return PK_OK;
    }
    const double copies = (double)pk__max(sweep->copies, 1);
    const double work = 6.0 * pk__graph_work(graph) * (double)sweep->rows * copies / 1048576.0;
    size_t threads = pk__min((size_t)pk_threads(context), plan.groups);
    threads = (double)threads <= work ? threads : work < 1 ? 1 : (size_t)work;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__sweep_lane lane;
    pk__sweep_take(&arena, sweep, pk__min(plan.block, sweep->rows), &lane);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "%s: the memory for this network overflows", sweep->name);
    const size_t bytes = arena.used;
    unsigned char *memory = NULL;
    size_t *bad = NULL;
    pk_real *partial = NULL;
    pk_status status = pk_allocate(context, threads, bytes, sweep->name, &memory);
    if (!status)
        status = pk_allocate(context, plan.groups, sizeof *bad, sweep->name, &bad);
    if (!status && sweep->sum && plan.groups > 1)
        status = pk_allocate(context, plan.groups - 1, parameters * sizeof *partial, sweep->name, &partial);
    for (size_t r = 0; !status && graph->checked && r < sweep->rows; r++) {
        pk__sweep_inputs(sweep, r, 1, (pk_real *)memory);
        status = pk_graph_check_inputs(context, graph, r, (pk_real *)memory);
    }
    if (!status) {
        const int workers = (int)threads;
        pk__team team = pk__team_of(context, workers, plan.groups);
        PK__PARALLEL(team)
        for (size_t group = pk__first_task(&team); group < plan.groups; group = pk__next_task(&team))
            bad[group] = pk__sweep_group(sweep, &plan, group, memory + (size_t)pk__thread() * bytes, bytes,
                                         group && sweep->sum ? partial + (group - 1) * parameters : sweep->sum);
        pk__team_end(&team);
        const int finite =
            !sweep->sum || pk__gradient_reduce(context, sweep->sum, partial, plan.groups, parameters, workers);
        size_t group = 0;
        while (group < plan.groups && bad[group] == SIZE_MAX)
            group++;
        if (group < plan.groups)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the result for row %zu is not finite", sweep->name,
                              bad[group]);
        else if (!finite)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the sum over rows is not finite", sweep->name);
    }
    pk_release(context, partial);
    pk_release(context, bad);
    pk_release(context, memory);
    return status;
}

/* ---- blocks -------------------------------------------------------------------------------------------- */

/* Row r of the block's cotangents of the outputs: given, or of the losses. */
static void pk__sweep_seed(const pk__sweep *sweep, pk__sweep_lane *lane, size_t row, const pk_real *f,
                           pk_real *seed)
{
    const size_t outputs = sweep->graph->output_width;
    if (sweep->rule) {
        pk__loss_target(sweep->rule, &sweep->dataset->targets, (size_t)sweep->batch->items[row], outputs,
                        lane->target);
        const double value = sweep->rule->evaluate(outputs, f, lane->target, seed);
        if (sweep->losses)
            sweep->losses[row] = value;
    } else {
        memcpy(seed, sweep->cotangents.data + row * sweep->cotangents.ld, outputs * sizeof *seed);
    }
}

/* The gradients of one row and copy of the tape. */
static void pk__sweep_row_gradient(const pk__sweep *sweep, const pk__tape *tape, size_t row, size_t copy,
                                   pk_real *gradient)
{
    const pk_graph *graph = sweep->graph;
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (!node->weight_count)
            continue;
        pk_call call;
        pk__pass_call(tape, node, 1, 1, &call);
        for (int j = 0; j < node->input_count; j++)
            call.in[j] += row * call.in_width[j];
        call.out += row * node->width;
        call.weights = sweep->weights + node->weight_offset;
        call.out_cotangent = tape->cotangent[n] + (row * tape->copies + copy) * node->width;
        call.gradient = gradient + node->weight_offset;
        pk__node_row_gradients(&call);
    }
}

/* Forward and reverse. */
static size_t pk__sweep_reverse(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const size_t outputs = graph->output_width, inputs = graph->input_width, copies = sweep->copies;
    const pk__line line = {sweep->weights, NULL, NULL};
    pk__tape *tape = &lane->tape;
    size_t bad = SIZE_MAX;
    const int units = !sweep->rule && !sweep->cotangents.data; /* a Jacobian */
    pk__pass_forward(tape, &line, rows, lane->inputs);
    if (units)
        pk__pass_seed_units(tape, rows);
    for (size_t r = 0; r < rows; r++) {
        const pk_real *f = pk__pass_output(tape) + r * outputs;
        if (!units)
            pk__sweep_seed(sweep, lane, first + r, f, pk__pass_seed(tape) + r * outputs);
        if (bad == SIZE_MAX && !pk__all_finite(f, outputs))
            bad = first + r;
    }
    pk__pass_reverse(tape, &line, rows, copies);
    if (sum)
        pk__pass_weight_gradient(tape, rows, sum);
    for (size_t at = 0; at < rows * copies; at++) {
        const size_t to = first * copies + at;
        int finite = 1;
        if (sweep->of_weights.data) {
            pk_real *gradient = sweep->of_weights.data + to * sweep->of_weights.ld;
            pk__sweep_row_gradient(sweep, tape, at / copies, at % copies, gradient);
            finite = pk__all_finite(gradient, graph->parameters);
        }
        if (sweep->of_inputs.data) {
            pk_real *gradient = sweep->of_inputs.data + to * sweep->of_inputs.ld;
            memcpy(gradient, tape->cotangent[0] + at * inputs, inputs * sizeof *gradient);
            finite &= pk__all_finite(gradient, inputs);
        }
        if (!finite)
            bad = pk__min(bad, first + at / copies);
    }
    return bad;
}

/* Forward, and the tangents along the directions; those of the outputs. */
static const pk_real *pk__sweep_push(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows)
{
    const size_t inputs = sweep->graph->input_width, last = sweep->graph->node_count - 1;
    const pk__line plain = {sweep->weights, NULL, NULL}, line = {sweep->weights, sweep->direction, NULL};
    pk__tape *tape = &lane->tape;
    pk__pass_forward(tape, &plain, rows, lane->inputs);
    for (size_t r = 0; tape->tangent[0] && r < rows; r++) {
        pk_real *to = tape->tangent[0] + r * inputs;
        if (sweep->input_directions.data)
            memcpy(to, sweep->input_directions.data + (first + r) * sweep->input_directions.ld,
                   inputs * sizeof *to);
        else
            memset(to, 0, inputs * sizeof *to);
    }
    pk__pass_tangent(tape, &line, rows);
    return tape->tangent[last];
}

static size_t pk__sweep_forward(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                pk_real *sum)
{
    const size_t outputs = sweep->graph->output_width;
    const pk_real *tangents = pk__sweep_push(sweep, lane, first, rows);
    size_t bad = SIZE_MAX;
    (void)sum;
    for (size_t r = 0; r < rows; r++) {
        memcpy(sweep->tangents_out.data + (first + r) * sweep->tangents_out.ld, tangents + r * outputs,
               outputs * sizeof *tangents);
        if (bad == SIZE_MAX && !pk__all_finite(tangents + r * outputs, outputs))
            bad = first + r;
    }
    return bad;
}

/* Reverse of what the first reverse did: with dots for tangents along the direction v,
 *     cotangent_in' = F_x(w)^T cotangent' + F_x(v)^T cotangent + (F_xx in')^T cotangent. */
static void pk__sweep_second_node(const pk__sweep *sweep, const pk__sweep_lane *lane, const pk_node *node,
                                  size_t rows)
{
    const pk_graph *graph = sweep->graph;
    const pk__tape *tape = &lane->tape;
    const size_t n = (size_t)(node - graph->nodes);
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = sweep->weights + node->weight_offset;
    call.out_cotangent = lane->second[n];
    for (int j = 0; j < node->input_count; j++) {
        if (!graph->nodes[node->inputs[j]].varies)
            continue;
        call.in_cotangent[j] = lane->second[node->inputs[j]];
        call.in_tangent[j] = tape->tangent[node->inputs[j]];
        call.accumulate[j] = node->shared[j];
    }
    node->operation->reverse(&call);
    for (int j = 0; j < node->input_count; j++)
        call.accumulate[j] = 1;
    call.out_cotangent = tape->cotangent[n];
    if (node->operation->smoothness == PK_SMOOTH)
        node->operation->curvature(&call);
    if (node->weight_count) {
        call.weights = sweep->direction + node->weight_offset;
        node->operation->reverse(&call);
    }
}

/* sum += the tangent of a layer's gradient, which is linear in the cotangent and affine in the inputs: its part of
 * degree 0 in these is taken off; of outer products that is the biases. */
static void pk__sweep_second_gradient(const pk__sweep *sweep, const pk__sweep_lane *lane, const pk_node *node,
                                      size_t rows, pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const pk__tape *tape = &lane->tape;
    const int outer = node->tangent_form == PK_TANGENT_OUTER;
    const size_t n = (size_t)(node - graph->nodes), count = node->weight_count;
    pk_real *parts[2] = {lane->part, lane->part + count};
    pk_call call;
    pk__pass_call(tape, node, rows, 1, &call);
    call.weights = sweep->weights + node->weight_offset;
    call.out_cotangent = lane->second[n];
    call.gradient = sum + node->weight_offset;
    node->operation->weight_gradient(&call);
    if (node->input_constant)
        return;
    call.out_cotangent = tape->cotangent[n];
    memset(lane->part, 0, 2 * count * sizeof *lane->part);
    for (int part = 0; part < 2 - outer; part++) {
        for (int j = 0; j < node->input_count; j++) {
            const size_t from = (size_t)node->inputs[j];
            call.in[j] = part || !graph->nodes[from].varies ? lane->zeros : tape->tangent[from];
        }
        call.gradient = parts[part];
        node->operation->weight_gradient(&call);
    }
    for (size_t i = 0; i < (outer ? node->fan_out * node->fan_in : count); i++)
        sum[node->weight_offset + i] += parts[0][i] - parts[1][i];
}

/* Hessian and Gauss-Newton products. */
static size_t pk__sweep_curvature(const pk__sweep *sweep, pk__sweep_lane *lane, size_t first, size_t rows,
                                  pk_real *sum)
{
    const pk_graph *graph = sweep->graph;
    const pk_batch *batch = sweep->batch;
    const size_t outputs = graph->output_width, last = graph->node_count - 1;
    const pk__line line = {sweep->weights, NULL, NULL};
    const pk_real *tangents = pk__sweep_push(sweep, lane, first, rows);
    pk__tape *tape = &lane->tape;
    pk_real *seeds = pk__pass_seed(tape), *bent = sweep->second ? lane->second[last] : seeds;
    size_t bad = SIZE_MAX;
    for (size_t at = 0; at < rows * outputs; at += outputs) {
        const size_t row = first + at / outputs;
        const pk_real *f = pk__pass_output(tape) + at;
        const double weight = batch->weights ? batch->weights[row] : 1.0 / (double)batch->count;
        pk__sweep_seed(sweep, lane, row, f, seeds + at);
        sweep->rule->curvature(outputs, f, lane->target, tangents + at, bent + at);
        for (size_t c = 0; c < outputs; c++) {
            bent[at + c] *= (pk_real)weight;
            if (sweep->second)
                seeds[at + c] *= (pk_real)weight;
        }
        if (bad == SIZE_MAX && !pk__all_finite(f, outputs))
            bad = row;
    }
    pk__pass_reverse(tape, &line, rows, 1);
    if (!sweep->second) {
        pk__pass_weight_gradient(tape, rows, sum);
        return bad;
    }
    for (size_t n = last; n > 0; n--) {
        const pk_node *node = &graph->nodes[n];
        if (node->unread && node->varies)
            memset(lane->second[n], 0, rows * node->width * sizeof(pk_real));
        if (!node->input_constant)
            pk__sweep_second_node(sweep, lane, node, rows);
        if (node->weight_count)
            pk__sweep_second_gradient(sweep, lane, node, rows, sum);
    }
    return bad;
}

/* ---- arguments ----------------------------------------------------------------------------------------- */

/* Runs a sweep whose inputs vary as well where wanted, on a copy of the graph that says so. The copy shares the
 * original's constants. */
static pk_status pk__sweep_vary(pk_context *context, pk__sweep *sweep, int vary)
{
    const pk_graph *graph = sweep->graph;
    pk_graph copy = *graph;
    /* Also where no weight reaches the output: so it gets a cotangent. */
    if (!vary && graph->nodes[graph->node_count - 1].varies)
        return pk__sweep_run(context, sweep);
    for (size_t n = 1; vary && n < graph->node_count; n++)
        for (int j = 0; j < graph->nodes[n].input_count; j++)
            if (graph->nodes[n].inputs[j] == 0 && graph->nodes[n].operation->check)
                return pk__fail(context, PK_UNSUPPORTED,
                                "%s: %s takes whole numbers, so the network has no derivative with respect to "
                                "its inputs",
                                sweep->name, graph->nodes[n].operation->name);
    pk_status status = pk_allocate(context, copy.node_count, sizeof *copy.nodes, sweep->name, &copy.nodes);
    if (status)
        return status;
    memcpy(copy.nodes, graph->nodes, copy.node_count * sizeof *copy.nodes);
    copy.nodes[0].varies = 1;
    for (size_t n = 1; n < copy.node_count; n++)
        pk__node_analyse(&copy, &copy.nodes[n]);
    pk__graph_analyse(&copy);
    sweep->graph = &copy;
    status = pk__sweep_run(context, sweep);
    sweep->graph = graph;
    pk_release(context, copy.nodes);
    return status;
}

static pk_status pk__sweep_graph(pk_context *context, const char *name, const pk_graph *graph,
                                 const pk_real *weights)
{
    if (graph && graph->node_count > 1 && (weights || !graph->parameters))
        return PK_OK;
    return pk__fail(context, PK_ARGUMENT, "%s: %s", name,
                    graph && graph->node_count > 1 ? "the weights are NULL" : "there is no network");
}

/* Whether a matrix is rows x cols. */
static pk_status pk__sweep_matrix(pk_context *context, const char *name, const char *what, pk_matrix matrix,
                                  size_t rows, size_t cols)
{
    if (matrix.rows != rows || matrix.cols != cols || matrix.ld < cols)
        return pk__fail(context, PK_SHAPE, "%s: the %s are %zu x %zu (ld %zu), not %zu x %zu", name, what,
                        matrix.rows, matrix.cols, matrix.ld, rows, cols);
    if (rows && cols && !matrix.data)
        return pk__fail(context, PK_ARGUMENT, "%s: the %s are NULL", name, what);
    return PK_OK;
}

/* A sweep over inputs at weights, checked; the rest of it is zero. */
static pk_status pk__sweep_begin(pk_context *context, const char *name, const pk_graph *graph,
                                 const pk_real *weights, pk_matrix inputs, pk__sweep *sweep)
{
    memset(sweep, 0, sizeof *sweep);
    sweep->name = name;
    sweep->graph = graph;
    sweep->weights = weights;
    sweep->inputs = inputs;
    pk_status status = pk__sweep_graph(context, name, graph, weights);
    return status ? status : pk__sweep_matrix(context, name, "inputs", inputs, inputs.rows, graph->input_width);
}

/* Whether the results (those with data) overlap nothing. */
static pk_status pk__sweep_results(pk_context *context, const char *name, size_t count, const pk_matrix *read,
                                   size_t results, const pk_matrix *written)
{
    for (size_t i = 0; i < results; i++)
        for (size_t k = 0; written[i].data && k < count + i; k++) {
            const pk_matrix other = k < count ? read[k] : written[k - count];
            if (other.data && pk__matrices_overlap(written[i], other))
                return pk__fail(context, PK_ARGUMENT, "%s: a result overlaps what is read, or another result",
                                name);
        }
    return PK_OK;
}

static pk_matrix pk__as_row(const pk_real *data, size_t count)
{
    return pk_matrix_view((pk_real *)data, 1, count); /* only to be compared, or read */
}

/* The reverse products and the Jacobian. */
static pk_status pk__sweep_pull(pk_context *context, pk__sweep *sweep, const char *of_weights,
                                const char *of_inputs)
{
    const pk_graph *graph = sweep->graph;
    const size_t rows = sweep->inputs.rows, outputs = graph->output_width;
    size_t all = 0;
    if (!pk__multiply(rows, sweep->copies, &all))
        return pk__fail(context, PK_OVERFLOW, "%s: %zu rows of %zu outputs overflow", sweep->name, rows,
                        outputs);
    pk_status status = PK_OK;
    if (sweep->of_weights.data)
        status = pk__sweep_matrix(context, sweep->name, of_weights, sweep->of_weights, all, graph->parameters);
    if (!status && sweep->of_inputs.data)
        status = pk__sweep_matrix(context, sweep->name, of_inputs, sweep->of_inputs, all, graph->input_width);
    const pk_matrix read[3] = {sweep->inputs, sweep->cotangents, pk__as_row(sweep->weights, graph->parameters)},
                    written[3] = {sweep->of_weights, sweep->of_inputs,
                                  pk__as_row(sweep->sum, graph->parameters)};
    if (!status)
        status = pk__sweep_results(context, sweep->name, 3, read, 3, written);
    if (status || (!sweep->of_weights.data && !sweep->of_inputs.data && !sweep->sum))
        return status;
    sweep->rows = rows;
    sweep->block = pk__sweep_reverse;
    return pk__sweep_vary(context, sweep, sweep->of_inputs.data != NULL);
}

PK_API pk_status pk_vjp(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix inputs,
                        pk_matrix cotangents, pk_matrix weight_gradients, pk_matrix input_gradients)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "vjp", graph, weights, inputs, &sweep);
    if (!status)
        status = pk__sweep_matrix(context, "vjp", "cotangents", cotangents, inputs.rows, graph->output_width);
    if (status)
        return status;
    sweep.cotangents = cotangents;
    sweep.copies = 1;
    sweep.of_weights = weight_gradients;
    sweep.of_inputs = input_gradients;
    return pk__sweep_pull(context, &sweep, "gradients for the weights", "gradients for the inputs");
}

PK_API pk_status pk_vjp_sum(pk_context *context, const pk_graph *graph, const pk_real *weights,
                            pk_matrix inputs, pk_matrix cotangents, pk_real *gradient)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "vjp", graph, weights, inputs, &sweep);
    if (!status)
        status = pk__sweep_matrix(context, "vjp", "cotangents", cotangents, inputs.rows, graph->output_width);
    if (!status && graph->parameters && !gradient)
        status = pk__fail(context, PK_ARGUMENT, "vjp: the place for the gradient is NULL");
    if (status)
        return status;
    sweep.cotangents = cotangents;
    sweep.copies = 1;
    sweep.sum = gradient;
    return pk__sweep_pull(context, &sweep, "", "");
}

PK_API pk_status pk_jacobian(pk_context *context, const pk_graph *graph, const pk_real *weights,
                             pk_matrix inputs, pk_matrix weight_jacobian, pk_matrix input_jacobian)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "jacobian", graph, weights, inputs, &sweep);
    if (status)
        return status;
    sweep.copies = graph->output_width;
    sweep.of_weights = weight_jacobian;
    sweep.of_inputs = input_jacobian;
    return pk__sweep_pull(context, &sweep, "derivatives for the weights", "derivatives for the inputs");
}

PK_API pk_status pk_jvp(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix inputs,
                        const pk_real *weight_direction, pk_matrix input_directions, pk_matrix tangents)
{
    pk__sweep sweep;
    pk_status status = pk__sweep_begin(context, "jvp", graph, weights, inputs, &sweep);
    if (!status && input_directions.data)
        status = pk__sweep_matrix(context, "jvp", "directions of the inputs", input_directions, inputs.rows,
                                  graph->input_width);
    if (!status)
        status = pk__sweep_matrix(context, "jvp", "tangents", tangents, inputs.rows, graph->output_width);
    if (status)
        return status;
    const pk_matrix read[4] = {inputs, input_directions, pk__as_row(weights, graph->parameters),
                               pk__as_row(weight_direction, graph->parameters)};
    status = pk__sweep_results(context, "jvp", 4, read, 1, &tangents);
    if (status)
        return status;
    sweep.name = "jvp";
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.direction = weight_direction;
    sweep.inputs = inputs;
    sweep.input_directions = input_directions;
    sweep.tangents_out = tangents;
    sweep.tangents = 1;
    sweep.rows = inputs.rows;
    sweep.block = pk__sweep_forward;
    return pk__sweep_vary(context, &sweep, input_directions.data != NULL);
}

PK_API pk_status pk_loss_gradients(pk_context *context, const pk_graph *graph, pk_loss loss,
                                   const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                   double *losses, pk_matrix gradients)
{
    pk__sweep sweep;
    memset(&sweep, 0, sizeof sweep);
    sweep.name = "gradients";
    sweep.rule = pk__loss_find(loss);
    pk_status status = pk__sweep_graph(context, sweep.name, graph, weights);
    if (!status)
        status = pk__batch_arguments(context, sweep.name, graph, sweep.rule, dataset, batch);
    if (!status)
        status = pk__sweep_matrix(context, sweep.name, "gradients", gradients, batch->count, graph->parameters);
    const pk_matrix read = pk__as_row(weights, status ? 0 : graph->parameters);
    if (!status)
        status = pk__sweep_results(context, sweep.name, 1, &read, 1, &gradients);
    if (status)
        return status;
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.dataset = dataset;
    sweep.batch = batch;
    sweep.copies = 1;
    sweep.losses = losses;
    sweep.of_weights = gradients;
    sweep.rows = batch->count;
    sweep.block = pk__sweep_reverse;
    return pk__sweep_vary(context, &sweep, 0);
}

/* ---- second derivatives -------------------------------------------------------------------------------- */

/* Whether the second reverse is right for every node: see pk_hessian_product. */
static pk_status pk__check_second(pk_context *context, const pk_graph *graph)
{
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        const pk_operation *operation = node->operation;
        const char *why = NULL;
        if (node->weight_count && !operation->linear_in_weights)
            why = "is not linear in its weights";
        else if (node->input_constant)
            why = NULL;
        else if (operation->smoothness == PK_SURROGATE)
            why = "has a surrogate for a derivative";
        else if (node->weight_count && operation->smoothness != PK_LINEAR)
            why = "has weights and is not linear in its inputs";
        else if (operation->smoothness == PK_SMOOTH && !operation->curvature)
            why = "has no curvature rule";
        if (why)
            return pk__fail(context, PK_UNSUPPORTED, "hessian: node %zu, %s, %s: no second derivatives", n,
                            operation->name, why);
    }
    return PK_OK;
}

static pk_status pk__curvature_product(pk_context *context, const char *name, const pk_graph *graph,
                                       pk_loss loss, const pk_real *weights, const pk_dataset *dataset,
                                       const pk_batch *batch, const pk_real *direction, int second,
                                       pk_real *product)
{
    pk__sweep sweep;
    memset(&sweep, 0, sizeof sweep);
    sweep.name = name;
    sweep.rule = pk__loss_find(loss);
    pk_status status = pk__sweep_graph(context, name, graph, weights);
    if (!status)
        status = pk__batch_arguments(context, name, graph, sweep.rule, dataset, batch);
    if (!status && graph->parameters && (!direction || !product))
        status = pk__fail(context, PK_ARGUMENT, "%s: the direction or the place for the product is NULL", name);
    if (status)
        return status;
    const pk_matrix read[2] = {pk__as_row(weights, graph->parameters),
                               pk__as_row(direction, graph->parameters)},
                    written = pk__as_row(product, graph->parameters);
    status = pk__sweep_results(context, name, 2, read, 1, &written);
    if (!status && second)
        status = pk__check_second(context, graph);
    if (status || !graph->parameters)
        return status;
    sweep.graph = graph;
    sweep.weights = weights;
    sweep.direction = direction;
    sweep.dataset = dataset;
    sweep.batch = batch;
    sweep.copies = 1;
    sweep.tangents = 1;
    sweep.second = second;
    sweep.sum = product;
    sweep.rows = batch->count;
    sweep.block = pk__sweep_curvature;
    return pk__sweep_vary(context, &sweep, 0);
}

PK_API pk_status pk_hessian_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                    const pk_real *weights, const pk_dataset *dataset, const pk_batch *batch,
                                    const pk_real *direction, pk_real *product)
{
    return pk__curvature_product(context, "hessian", graph, loss, weights, dataset, batch, direction, 1,
                                 product);
}

PK_API pk_status pk_gauss_newton_product(pk_context *context, const pk_graph *graph, pk_loss loss,
                                         const pk_real *weights, const pk_dataset *dataset,
                                         const pk_batch *batch, const pk_real *direction, pk_real *product)
{
    return pk__curvature_product(context, "gauss_newton", graph, loss, weights, dataset, batch, direction, 0,
                                 product);
}

PK__END_COLD_CODE

/* pathkernel/training/optimizer.h: implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- rules -------------------------------------------------------------------------------------------- */

/* Of count numbers of one step; state vectors are `apart` numbers from each other. */
typedef struct pk__update {
    size_t step;
    double rate, scale;
    size_t count, apart;
    const pk_real *weights, *gradient;
    pk_real *state, *update;
} pk__update;

static size_t pk__sgd_state_vectors(const pk_optimizer *optimizer)
{
    return optimizer->momentum != 0;
}

static void pk__sgd_update(const pk_optimizer *optimizer, const pk__update *call)
{
    double rate = call->rate, scale = call->scale, decay = optimizer->weight_decay,
           momentum = optimizer->momentum;
    const pk_real *weights = call->weights, *gradient = call->gradient;
    pk_real *buffer = call->state, *update = call->update;
    const size_t count = call->count;
    if (momentum == 0) {
        if (!update)
            return;
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            update[i] = (pk_real)(-rate * (scale * gradient[i] + decay * weights[i]));
        return;
    }
    /* PyTorch starts the buffer as the gradient itself, undampened. */
    double carry = call->step ? momentum : 0, gain = call->step ? 1 - optimizer->dampening : 1;
    double enter = optimizer->nesterov ? momentum : 1, direct = optimizer->nesterov ? 1 : 0;
    if (update) {
        PK__SIMD
        for (size_t i = 0; i < count; i++) {
            double g = scale * gradient[i] + decay * weights[i], m = carry * buffer[i] + gain * g;
            update[i] = (pk_real)(-rate * (direct * g + enter * m));
            buffer[i] = (pk_real)m;
        }
    } else {
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            buffer[i] = (pk_real)(carry * buffer[i] + gain * (scale * gradient[i] + decay * weights[i]));
    }
}

static void pk__sgd_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t parameters,
                                const pk_real *state, pk_linear_form *form, pk_real *preconditioner)
{
    (void)parameters, (void)state, (void)preconditioner;
    double momentum = optimizer->momentum;
    if (momentum != 0) {
        form->carry = step ? momentum : 0;
        form->gain = step ? 1 - optimizer->dampening : 1;
        form->enter = optimizer->nesterov ? momentum : 1;
    }
    form->direct = momentum == 0 || optimizer->nesterov ? 1 : 0;
    form->coupled = optimizer->weight_decay;
    form->rate = rate;
}

static size_t pk__adam_state_vectors(const pk_optimizer *optimizer)
{
    (void)optimizer;
    return 2;
}

/* lr / (1 - beta1^{s+1}) and 1 / sqrt(1 - beta2^{s+1}). */
static void pk__adam_corrections(const pk_optimizer *optimizer, size_t step, double rate, double *size,
                                 double *spread)
{
    double count = (double)step + 1;
    *size = rate / (1 - pow(optimizer->beta1, count));
    *spread = 1 / sqrt(1 - pow(optimizer->beta2, count));
}

static void pk__adam_step(const pk_optimizer *optimizer, const pk__update *call, double coupled,
                          double decoupled)
{
    double size, spread, scale = call->scale, beta2 = optimizer->beta2, epsilon = optimizer->epsilon,
                         roots[256];
    double blend = 1 - optimizer->beta1, blend2 = 1 - beta2;
    pk__adam_corrections(optimizer, call->step, call->rate, &size, &spread);
    /* torch.lerp: from the end that is nearer. */
    const double near = blend < 0.5, gain = near ? blend : blend - 1;
    for (size_t first = 0; first < call->count; first += 256) {
        const size_t count = pk__min(call->count - first, 256);
        const pk_real *weights = call->weights + first, *gradient = call->gradient + first;
        pk_real *m = call->state + first, *v = m + call->apart;
        PK__SIMD
        for (size_t i = 0; i < count; i++) {
            const double g = scale * gradient[i] + coupled * weights[i], end = near ? (double)m[i] : g;
            m[i] = (pk_real)(end + gain * (g - m[i]));
            v[i] = (pk_real)(beta2 * v[i] + blend2 * g * g);
            roots[i] = (double)v[i];
        }
        if (!call->update)
            continue;
        pk_real *update = call->update + first;
        pk__all_root(count, 0, roots, roots);
        PK__SIMD
        for (size_t i = 0; i < count; i++)
            update[i] = (pk_real)(-size * m[i] / (roots[i] * spread + epsilon) - decoupled * weights[i]);
    }
}

static void pk__adam_update(const pk_optimizer *optimizer, const pk__update *call)
{
    pk__adam_step(optimizer, call, optimizer->weight_decay, 0);
}

static void pk__adamw_update(const pk_optimizer *optimizer, const pk__update *call)
{
    pk__adam_step(optimizer, call, 0, call->rate * optimizer->weight_decay);
}

static void pk__adam_linear_form(const pk_optimizer *optimizer, size_t step, double rate, size_t parameters,
                                 const pk_real *state, pk_linear_form *form, pk_real *preconditioner)
{
    double spread;
    form->carry = optimizer->beta1;
    form->gain = 1 - optimizer->beta1;
    form->enter = 1;
    form->preconditioned = 1;
    form->coupled = optimizer->kind == PK_ADAM ? optimizer->weight_decay : 0;
    form->decoupled = optimizer->kind == PK_ADAMW ? rate * optimizer->weight_decay : 0;
    pk__adam_corrections(optimizer, step, rate, &form->rate, &spread);
    if (preconditioner)
        for (size_t i = 0; i < parameters; i++)
            preconditioner[i] =
                (pk_real)(form->rate / (sqrt((double)state[parameters + i]) * spread + optimizer->epsilon));
}

/* At i, of as many numbers as a `number` is: one, or a vector of them. */
#define PK__BACK_STEP(number, nothing)                                    \
    number entering = rate - nothing;                                     \
    if (p)                                                                \
        entering = *(const number *)(p + i);                              \
    entering *= factor * *(const number *)(phi + i);                      \
    const number next = keep * *(number *)(state + i) + enter * entering; \
    *(number *)(state + i) = next;                                        \
    if (e)                                                                \
        *(number *)(e + i) = gain * next + direct * entering;
#define PK__DEFINE_BACK(suffix, attributes, vectors)                                                      \
    attributes static void pk__back_##suffix(size_t rows, size_t count, const pk_linear_form *form,       \
                                             double carry, const pk_real *p, const pk_real *factors,      \
                                             const pk_real *phi, size_t step, pk_real *state, pk_real *e) \
    {                                                                                                     \
        typedef vectors vector;                                                                           \
        enum { lanes = (int)(sizeof(vector) / sizeof(pk_real)) };                                         \
        const pk_real keep = (pk_real)carry, enter = (pk_real)form->enter, rate = (pk_real)form->rate;    \
        const pk_real gain = (pk_real)form->gain, direct = (pk_real)form->direct;                         \
        const vector zero = {0};                                                                          \
        for (size_t row = 0; row < rows; row++) {                                                         \
            const pk_real factor = factors ? factors[row] : 1;                                            \
            size_t i = 0;                                                                                 \
            for (; i + lanes <= count; i += lanes) {                                                      \
                PK__BACK_STEP(vector, zero)                                                               \
            }                                                                                             \
            for (; i < count; i++) {                                                                      \
                PK__BACK_STEP(pk_real, 0)                                                                 \
            }                                                                                             \
            p = p ? p + count : NULL;                                                                     \
            e = e ? e + count : NULL;                                                                     \
            phi += step;                                                                                  \
            state += count;                                                                               \
        }                                                                                                 \
    }
PK__FOR_PROCESSORS(PK__DEFINE_BACK)

/* state = carry state + enter p o phi, and e = gain state + direct p o phi where e is wanted, of rows x count numbers: one
 * pass, since memory bounds it. phi: factors (NULL: 1), a number a row, times rows that are `step` numbers apart (0: all the
 * same one). p NULL: the rate. */
PK__PRIVATE void pk__linear_form_back(size_t rows, size_t count, const pk_linear_form *form, double carry,
                                      const pk_real *p, const pk_real *factors, const pk_real *phi, size_t step,
                                      pk_real *state, pk_real *e)
{
    PK__ON_PROCESSOR(pk__back, (rows, count, form, carry, p, factors, phi, step, state, e));
}

typedef enum pk__range { PK__ANY, PK__NOT_NEGATIVE, PK__BELOW_ONE, PK__SWITCH } pk__range;

/* A field of pk_optimizer: a double, or an int for a switch. */
typedef struct pk__optimizer_key {
    const char *name;
    size_t offset;
    pk__range range;
    double standard; /* PyTorch's default */
} pk__optimizer_key;

enum { PK__OPTIMIZER_KEYS = 6 };

typedef struct pk__optimizer_rule {
    pk_optimizer_kind kind;
    const char *name;
    pk__optimizer_key keys[PK__OPTIMIZER_KEYS]; /* ends with a NULL name */
    size_t (*state_vectors)(const pk_optimizer *optimizer);
    void (*update)(const pk_optimizer *optimizer, const pk__update *call);
    void (*linear_form)(const pk_optimizer *optimizer, size_t step, double rate, size_t parameters,
                        const pk_real *state, pk_linear_form *form,
                        pk_real *preconditioner); /* form is zeroed */
} pk__optimizer_rule;

#define PK__KEY(field, range, standard)                        \
    {                                                          \
#field, offsetof(pk_optimizer, field), range, standard \
    }
#define PK__NO_KEY          \
    {                       \
        NULL, 0, PK__ANY, 0 \
    }
static const pk__optimizer_rule pk__optimizer_rules[] = {
    {PK_SGD,
     "sgd",
     {PK__KEY(momentum, PK__NOT_NEGATIVE, 0), PK__KEY(dampening, PK__ANY, 0), PK__KEY(nesterov, PK__SWITCH, 0),
      PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0), PK__NO_KEY, PK__NO_KEY},
     pk__sgd_state_vectors,
     pk__sgd_update,
     pk__sgd_linear_form},
    {PK_ADAM,
     "adam",
     {PK__KEY(beta1, PK__BELOW_ONE, 0.9), PK__KEY(beta2, PK__BELOW_ONE, 0.999),
      PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0), PK__NO_KEY,
      PK__NO_KEY},
     pk__adam_state_vectors,
     pk__adam_update,
     pk__adam_linear_form},
    {PK_ADAMW,
     "adamw",
     {PK__KEY(beta1, PK__BELOW_ONE, 0.9), PK__KEY(beta2, PK__BELOW_ONE, 0.999),
      PK__KEY(epsilon, PK__NOT_NEGATIVE, 1e-8), PK__KEY(weight_decay, PK__NOT_NEGATIVE, 0.01), PK__NO_KEY,
      PK__NO_KEY},
     pk__adam_state_vectors,
     pk__adamw_update,
     pk__adam_linear_form},
};
#undef PK__KEY
#undef PK__NO_KEY

static const pk__optimizer_rule *pk__optimizer_find(pk_optimizer_kind kind)
{
    for (size_t i = 0; i < sizeof pk__optimizer_rules / sizeof pk__optimizer_rules[0]; i++)
        if (pk__optimizer_rules[i].kind == kind)
            return &pk__optimizer_rules[i];
    return NULL;
}

static double pk__key_get(const pk__optimizer_key *key, const pk_optimizer *optimizer)
{
    const char *field = (const char *)optimizer + key->offset;
    double value;
    int flag;
    if (key->range != PK__SWITCH) {
        memcpy(&value, field, sizeof value);
        return value;
    }
    memcpy(&flag, field, sizeof flag);
    return flag;
}

static void pk__key_set(const pk__optimizer_key *key, pk_optimizer *optimizer, double value)
{
    char *field = (char *)optimizer + key->offset;
    int flag = value != 0;
    if (key->range == PK__SWITCH)
        memcpy(field, &flag, sizeof flag);
    else
        memcpy(field, &value, sizeof value);
}

PK_API pk_optimizer pk_optimizer_default(pk_optimizer_kind kind)
{
    pk_optimizer optimizer;
    memset(&optimizer, 0, sizeof optimizer);
    optimizer.kind = kind;
    const pk__optimizer_rule *rule = pk__optimizer_find(kind);
    for (const pk__optimizer_key *key = rule ? rule->keys : NULL; key && key->name; key++)
        pk__key_set(key, &optimizer, key->standard);
    return optimizer;
}

PK_API pk_optimizer pk_optimizer_adam(void)
{
    return pk_optimizer_default(PK_ADAM);
}

PK_API pk_optimizer pk_optimizer_adamw(void)
{
    return pk_optimizer_default(PK_ADAMW);
}

/* What a value of the key must be, NULL if it is. */
static const char *pk__key_refuse(const pk__optimizer_key *key, double value)
{
    switch (key->range) {
    case PK__SWITCH: return value == 0 || value == 1 ? NULL : "0 or 1";
    case PK__BELOW_ONE: return value >= 0 && value < 1 ? NULL : "in [0, 1)";
    case PK__NOT_NEGATIVE: return isfinite(value) && value >= 0 ? NULL : "finite and >= 0";
    default: return isfinite(value) ? NULL : "finite";
    }
}

PK_API pk_status pk_optimizer_check(pk_context *context, const pk_optimizer *optimizer)
{
    if (!optimizer)
        return pk__fail(context, PK_ARGUMENT, "optimizer: it is NULL");
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    if (!rule)
        return pk__fail(context, PK_ARGUMENT, "optimizer: kind %d is unknown", (int)optimizer->kind);
    for (const pk__optimizer_key *key = rule->keys; key->name; key++) {
        double value = pk__key_get(key, optimizer);
        const char *asked = pk__key_refuse(key, value);
        if (asked)
            return pk__fail(context, PK_ARGUMENT, "optimizer %s: %s is %.17g; it must be %s", rule->name,
                            key->name, value, asked);
    }
    if (optimizer->kind == PK_SGD && optimizer->nesterov &&
        (optimizer->momentum == 0 || optimizer->dampening != 0))
        return pk__fail(context, PK_ARGUMENT,
                        "optimizer sgd: nesterov needs momentum > 0 and dampening 0, not %.17g and %.17g",
                        optimizer->momentum, optimizer->dampening);
    return PK_OK;
}

PK_API size_t pk_optimizer_state_vectors(const pk_optimizer *optimizer)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    return rule ? rule->state_vectors(optimizer) : 0;
}

PK_API int pk_optimizer_stateless(const pk_optimizer *optimizer)
{
    return pk_optimizer_state_vectors(optimizer) == 0;
}

PK__PRIVATE void pk__optimizer_part(const pk_optimizer *optimizer, const pk__update *call)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    if (rule)
        rule->update(optimizer, call);
}

PK_API void pk_optimizer_update(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                double gradient_scale, size_t parameters, const pk_real *weights,
                                const pk_real *gradient, pk_real *state, pk_real *update)
{
    const pk__update call = {step,    learning_rate, gradient_scale, parameters, parameters,
                             weights, gradient,      state,          update};
    pk__optimizer_part(optimizer, &call);
}

PK_API void pk_optimizer_linear_form(const pk_optimizer *optimizer, size_t step, double learning_rate,
                                     size_t parameters, const pk_real *state, pk_linear_form *form,
                                     pk_real *preconditioner)
{
    const pk__optimizer_rule *rule = pk__optimizer_find(optimizer->kind);
    memset(form, 0, sizeof *form);
    if (rule)
        rule->linear_form(optimizer, step, learning_rate, parameters, state, form, preconditioner);
}

/* ---- text --------------------------------------------------------------------------------------------- */

PK_API pk_status pk_optimizer_parse(pk_context *context, const char *text, pk_optimizer *optimizer)
{
    const char *space = " \t";
    if (!text || !optimizer)
        return pk__fail(context, PK_ARGUMENT, "optimizer: the text or the place for the optimizer is NULL");
    text += strspn(text, space);
    size_t length = strcspn(text, space);
    const pk__optimizer_rule *rule = NULL;
    for (size_t i = 0; i < sizeof pk__optimizer_rules / sizeof pk__optimizer_rules[0]; i++)
        if (strlen(pk__optimizer_rules[i].name) == length &&
            strncmp(pk__optimizer_rules[i].name, text, length) == 0)
            rule = &pk__optimizer_rules[i];
    if (!rule)
        return pk__fail(context, PK_FORMAT, "optimizer: '%.*s' is not sgd, adam or adamw",
                        (int)(length < 40 ? length : 40), text);
    pk_optimizer parsed = pk_optimizer_default(rule->kind);
    unsigned seen = 0;
    for (text += length, text += strspn(text, space); *text; text += length, text += strspn(text, space)) {
        length = strcspn(text, space);
        size_t name = strcspn(text, "= \t");
        int shown = (int)(length < 40 ? length : 40), index = 0;
        double value = 0;
        while (rule->keys[index].name &&
               (strlen(rule->keys[index].name) != name || strncmp(rule->keys[index].name, text, name) != 0))
            index++;
        const pk__optimizer_key *key = &rule->keys[index];
        if (!key->name)
            return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' is not one of its keys", rule->name,
                            shown, text);
        if (text[name] != '=' || !pk__number(text + name + 1, length - name - 1, &value))
            return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' is not %s=number", rule->name, shown,
                            text, key->name);
        if (seen & (1u << index))
            return pk__fail(context, PK_FORMAT, "optimizer %s: '%.*s' gives %s a second time", rule->name,
                            shown, text, key->name);
        if (pk__key_refuse(key, value)) /* before a switch becomes an int */
            return pk__fail(context, PK_ARGUMENT, "optimizer %s: %s is %.17g; it must be %s", rule->name,
                            key->name, value, pk__key_refuse(key, value));
        seen |= 1u << index;
        pk__key_set(key, &parsed, value);
    }
    pk_status status = pk_optimizer_check(context, &parsed);
    if (status == PK_OK)
        *optimizer = parsed;
    return status;
}

PK_API pk_status pk_optimizer_format(const pk_optimizer *optimizer, char *text, size_t size)
{
    if (!text || size == 0)
        return PK_ARGUMENT;
    text[0] = '\0';
    const pk__optimizer_rule *rule = optimizer ? pk__optimizer_find(optimizer->kind) : NULL;
    if (!rule)
        return PK_ARGUMENT;
    char whole[512];
    size_t used = (size_t)snprintf(whole, sizeof whole, "%s", rule->name);
    for (const pk__optimizer_key *key = rule->keys; key->name; key++) {
        char number[64];
        double value = pk__key_get(key, optimizer), back;
        if (value == 0 && key->standard == 0)
            continue;
        for (int digits = 15; digits <= 17; digits++) { /* the shortest that gives the same bits back */
            pk__print(number, sizeof number, "%.*g", digits, value);
            if (pk__number(number, strlen(number), &back) && back == value)
                break;
        }
        used += (size_t)snprintf(whole + used, sizeof whole - used, " %s=%s", key->name, number);
    }
    if (used + 1 > size)
        return PK_ARGUMENT;
    memcpy(text, whole, used + 1);
    return PK_OK;
}

/* ---- clipping and schedules ---------------------------------------------------------------------------- */

/* sum (factor x_i)^2 in eight chains, so that the additions do not wait for each other. */
static double pk__sum_of_squares(const pk_real *x, size_t count, double factor)
{
    double chain[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++) {
            double y = factor * x[i + k];
            chain[k] += y * y;
        }
    for (; i < count; i++)
        chain[i % 8] += (factor * x[i]) * (factor * x[i]);
    return ((chain[0] + chain[1]) + (chain[2] + chain[3])) + ((chain[4] + chain[5]) + (chain[6] + chain[7]));
}

PK_API double pk_clip_scale(const pk_real *gradient, size_t parameters, double max_norm)
{
    double sum = pk__sum_of_squares(gradient, parameters, 1), norm = sqrt(sum);
    if (!(sum > 1e-280 && sum < 1e300)) { /* squares may have overflowed or vanished: scale by a power of 2 */
        double largest = 0;
        for (size_t i = 0; i < parameters; i++)
            if (fabs((double)gradient[i]) > largest || gradient[i] != gradient[i])
                largest = fabs((double)gradient[i]);
        int exponent = 0;
        if (largest != largest)
            return largest;
        if (largest > 0 && isfinite(largest)) {
            (void)frexp(largest, &exponent);
            exponent = exponent < -1000 ? -1000 : exponent;
            norm = ldexp(sqrt(pk__sum_of_squares(gradient, parameters, ldexp(1, -exponent))), exponent);
        }
    }
    double scale = max_norm / (norm + 1e-6);
    return scale < 1 || scale != scale ? scale : 1;
}

PK_API double pk_schedule_rate(const pk_schedule *schedule, size_t step)
{
    double s = (double)step, rate = schedule->rate, low = schedule->low, period = (double)schedule->period;
    switch (schedule->kind) {
    case PK_SCHEDULE_STEP:
        rate *= pow(schedule->factor != 0 ? schedule->factor : 0.1, floor(s / period));
        break;
    case PK_SCHEDULE_COSINE:
        rate = low + (rate - low) * (1 + cos(3.14159265358979323846 * s / period)) / 2;
        break;
    case PK_SCHEDULE_TRIANGULAR: {
        double down = schedule->period_down ? (double)schedule->period_down : period;
        double place = fmod(s, period + down);
        rate = low + (rate - low) * (place <= period ? place / period : (period + down - place) / down);
        break;
    }
    case PK_SCHEDULE_ARRAY:
        rate = schedule->rates[step < schedule->rates_count ? step : schedule->rates_count - 1];
        break;
    case PK_SCHEDULE_FUNCTION: rate = schedule->function(schedule->user, step); break;
    default: break;
    }
    if (step < schedule->warmup) {
        double start = schedule->warmup_start != 0 ? schedule->warmup_start : 1.0 / 3;
        rate *= start + (1 - start) * s / (double)schedule->warmup;
    }
    return rate;
}

PK_API pk_status pk_schedule_check(pk_context *context, const pk_schedule *schedule, size_t steps)
{
    if (!schedule)
        return pk__fail(context, PK_ARGUMENT, "schedule: it is NULL");
    pk_schedule_kind kind = schedule->kind;
    int periodic = kind == PK_SCHEDULE_STEP || kind == PK_SCHEDULE_COSINE || kind == PK_SCHEDULE_TRIANGULAR;
    if ((int)kind < (int)PK_SCHEDULE_CONSTANT || (int)kind > (int)PK_SCHEDULE_FUNCTION)
        return pk__fail(context, PK_ARGUMENT, "schedule: kind %d is unknown", (int)kind);
    if (periodic && schedule->period == 0)
        return pk__fail(context, PK_ARGUMENT, "schedule: period is 0 steps");
    if (kind == PK_SCHEDULE_ARRAY && steps && (!schedule->rates || schedule->rates_count < steps))
        return pk__fail(context, PK_ARGUMENT, "schedule: %zu rates for %zu steps",
                        schedule->rates ? schedule->rates_count : (size_t)0, steps);
    if (kind == PK_SCHEDULE_FUNCTION && !schedule->function)
        return pk__fail(context, PK_ARGUMENT, "schedule: the function is NULL");
    if (!isfinite(schedule->factor) || !isfinite(schedule->warmup_start) || schedule->factor < 0 ||
        schedule->warmup_start < 0)
        return pk__fail(context, PK_ARGUMENT, "schedule: factor %g or warmup_start %g is not finite and >= 0",
                        schedule->factor, schedule->warmup_start);
    for (size_t step = 0; kind != PK_SCHEDULE_FUNCTION && step < steps; step++) {
        double rate = pk_schedule_rate(schedule, step);
        if (!isfinite(rate) || rate < 0)
            return pk__fail(context, PK_ARGUMENT,
                            "schedule: the rate of step %zu is %g; it must be finite and >= 0", step, rate);
    }
    return PK_OK;
}

PK__END_CODE

/* pathkernel/run/run.h: implementation */
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

/* The files that grow, in the order in which a step writes them: weights.npy commits the step; checksums.npy
 * does where the weights are not kept. */
enum {
    PK__RUN_RATES,
    PK__RUN_OFFSETS,
    PK__RUN_ITEMS,
    PK__RUN_ITEM_WEIGHTS,
    PK__RUN_SCALES,
    PK__RUN_CHECKSUMS,
    PK__RUN_MOMENTS,
    PK__RUN_STATES,
    PK__RUN_WEIGHTS,
    PK__RUN_FILES
};

typedef struct pk__run_file {
    const char *name;
    pk_type type; /* 0: float32 or float64 */
    int rank;     /* 2: rows of P, or V P */
    int optional;
    size_t before; /* rows that belong to no step: w_0, the first offset */
    int kept;      /* one row a kept step */
} pk__run_file;

static const pk__run_file pk__run_files[PK__RUN_FILES] = {
    {"learning_rates.npy", PK_FLOAT64, 1, 0, 0, 0},  {"batch_offsets.npy", PK_INT64, 1, 0, 1, 0},
    {"batch_items.npy", PK_INT64, 1, 0, 0, 0},       {"batch_weights.npy", PK_FLOAT64, 1, 1, 0, 0},
    {"gradient_scales.npy", PK_FLOAT64, 1, 1, 0, 0}, {"checksums.npy", PK_INT64, 1, 0, 1, 0},
    {"second_moments.npy", (pk_type)0, 2, 1, 0, 0},  {"optimizer_states.npy", PK_FLOAT64, 2, 0, 1, 1},
    {"weights.npy", (pk_type)0, 2, 0, 1, 1}};

/* Whether a run of this optimiser that keeps every k-th step has such a file: 1, 0, or -1 for as it likes. */
static int pk__run_has(int file, size_t keep_every, const pk_optimizer *optimizer)
{
    if (file == PK__RUN_CHECKSUMS)
        return keep_every > 1;
    if (file == PK__RUN_STATES)
        return keep_every > 1 && pk_optimizer_state_vectors(optimizer) > 0;
    if (file == PK__RUN_MOMENTS && keep_every > 1)
        return 0;
    return pk__run_files[file].optional ? -1 : 1;
}

/* Of P numbers and then of count more, as the bits of doubles: what a replay is compared with. Four lanes, so
 * that the multiplications do not wait for each other; the order of the numbers matters in each. */
static uint64_t pk__checksum_mix(uint64_t hash, uint64_t bits)
{
    hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

PK__PRIVATE int64_t pk__checksum(const pk_real *weights, size_t parameters, const pk_real *state, size_t count)
{
    uint64_t lane[4] = {1, 2, 3, 4}, hash = parameters;
    const pk_real *part[2] = {weights, state};
    const size_t numbers[2] = {parameters, state ? count : 0};
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < numbers[k]; i++) {
            double number = (double)part[k][i];
            uint64_t bits;
            memcpy(&bits, &number, sizeof bits);
            lane[i % 4] = pk__checksum_mix(lane[i % 4], bits);
        }
    for (int k = 0; k < 4; k++)
        hash = pk__checksum_mix(hash, lane[k]);
    int64_t signed_hash;
    memcpy(&signed_hash, &hash, sizeof signed_hash);
    return signed_hash;
}

/* Puts a prefix before the message of an error that another module reported. */
PK__FORMAT(3, 4)
PK__PRIVATE pk_status pk__prefix(pk_context *context, pk_status status, const char *format, ...)
{
    if (context && status != PK_OK) {
        char message[PK_MESSAGE_SIZE];
        memcpy(message, context->message, sizeof message);
        va_list arguments;
        va_start(arguments, format);
        int length = vsnprintf(context->message, sizeof context->message, format, arguments);
        va_end(arguments);
        if (length >= 0 && (size_t)length < sizeof message) {
            size_t room = sizeof message - (size_t)length - 1;
            memcpy(context->message + length, message, room);
            context->message[sizeof message - 1] = '\0';
        }
        pk__clean_message(context);
    }
    return status;
}

/* out (P) = a row of weights.npy or second_moments.npy. step: of the row, for the message. */
static pk_status pk__run_row(pk_context *context, const pk_run *run, const pk_array *array, const char *name,
                             size_t row, size_t step, pk_real *out)
{
    pk_status status = pk_array_read(context, array, row * run->parameters, run->parameters, out);
    if (status != PK_OK)
        return pk__prefix(context, status, "%s: the row of step %zu ", name, step);
    for (size_t p = 0; p < run->parameters; p++)
        if (!isfinite(out[p]))
            return pk__fail(context, PK_NOT_FINITE, "%s: parameter %zu at step %zu is %g", name, p, step,
                            (double)out[p]);
    return PK_OK;
}

/* Those that do not grow; the manifest is the last to appear. */
enum { PK__RUN_INPUTS, PK__RUN_TARGETS, PK__RUN_MANIFEST, PK__RUN_FIXED };
static const char *const pk__run_fixed[PK__RUN_FIXED] = {"train_inputs.npy", "train_targets.npy", "run.txt"};

#ifdef PATHKERNEL_FLOAT
#define PK__REAL_TYPE PK_FLOAT32
#else
#define PK__REAL_TYPE PK_FLOAT64
#endif

/* directory/name in one buffer that fits every file of a run. */
typedef struct pk__run_path {
    const char *directory;
    char *text;
    size_t size;
} pk__run_path;

static pk_status pk__run_path_take(pk_context *context, const char *directory, pk__run_path *path)
{
    path->directory = directory;
    path->size = strlen(directory) + 32;
    return pk_allocate(context, path->size, 1, "the path of a run", &path->text);
}

static const char *pk__run_path_of(pk__run_path *path, const char *name)
{
    snprintf(path->text, path->size, "%s/%s", path->directory, name);
    return path->text;
}

static pk_status pk__run_io(pk_context *context, const char *path)
{
    return pk__fail(context, PK_IO, "%s: %s", path, strerror(errno));
}

/* ---- the manifest ---------------------------------------------------------------------------------- */

enum { PK__MANIFEST_NETWORK, PK__MANIFEST_LOSS, PK__MANIFEST_OPTIMIZER, PK__MANIFEST_KEEP, PK__MANIFEST_KEYS };
static const char *const pk__manifest_keys[PK__MANIFEST_KEYS] = {"network", "loss", "optimizer", "keep_every"};
enum { PK__MANIFEST_LINE = 1 << 16, PK__MANIFEST_SIZE = 1 << 20 }; /* bytes at most */

typedef struct pk__manifest {
    char *value[PK__MANIFEST_KEYS]; /* inside the text that was split */
    size_t line[PK__MANIFEST_KEYS]; /* counted from 1; 0: not there */
} pk__manifest;

static int pk__blank(char c)
{
    return c == ' ' || c == '\t';
}

/* One line without its line break, key and value cut out in place. *version: the version line was read. */
static pk_status pk__manifest_line(pk_context *context, char *begin, char *end, size_t line, int *version,
                                   pk__manifest *manifest)
{
    if (end - begin > PK__MANIFEST_LINE)
        return pk__fail(context, PK_FORMAT, "run.txt line %zu: longer than %d bytes", line,
                        (int)PK__MANIFEST_LINE);
    for (char *c = begin; c < end; c++)
        if ((unsigned char)*c < 32 && *c != '\t')
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: a control character (0x%02x) in column %zu",
                            line, (unsigned)(unsigned char)*c, (size_t)(c - begin) + 1);
    char *comment = (char *)memchr(begin, '#', (size_t)(end - begin));
    if (comment)
        end = comment;
    while (begin < end && pk__blank(*begin))
        begin++;
    while (end > begin && pk__blank(end[-1]))
        end--;
    if (begin == end)
        return PK_OK;
    *end = '\0'; /* the line break, the comment, trailing blanks or the terminating NUL stood here */
    char *value = begin;
    while (*value && !pk__blank(*value))
        value++;
    while (pk__blank(*value))
        *value++ = '\0';
    if (!*version) {
        if (strcmp(begin, "pathkernel-run") != 0)
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: expected 'pathkernel-run 1', found '%.60s'",
                            line, begin);
        if (strcmp(value, "1") != 0)
            return pk__fail(context, PK_UNSUPPORTED, "run.txt line %zu: version '%.20s'; this library reads 1",
                            line, value);
        *version = 1;
        return PK_OK;
    }
    for (int k = 0; k < PK__MANIFEST_KEYS; k++) {
        if (strcmp(begin, pk__manifest_keys[k]) != 0)
            continue;
        if (manifest->line[k])
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: '%s' again, it stands on line %zu already",
                            line, begin, manifest->line[k]);
        if (!*value)
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: '%s' has no value", line, begin);
        manifest->line[k] = line;
        manifest->value[k] = value;
        return PK_OK;
    }
    return pk__fail(context, PK_FORMAT,
                    "run.txt line %zu: unknown key '%.60s' (known: network, loss, optimizer, keep_every)", line,
                    begin);
}

/* Splits text (size bytes and a NUL after them), which is changed. */
static pk_status pk__manifest_split(pk_context *context, char *text, size_t size, pk__manifest *manifest)
{
    memset(manifest, 0, sizeof *manifest);
    int version = 0;
    size_t line = 0;
    for (size_t at = 0; at < size;) {
        char *begin = text + at, *feed = (char *)memchr(begin, '\n', size - at);
        char *end = feed ? feed : text + size;
        at = (size_t)(end - text) + 1;
        if (end > begin && end[-1] == '\r')
            end--;
        pk_status status = pk__manifest_line(context, begin, end, ++line, &version, manifest);
        if (status != PK_OK)
            return status;
    }
    if (!version)
        return pk__fail(context, PK_FORMAT, "run.txt line 1: expected 'pathkernel-run 1', found an empty file");
    for (int k = 0; k < PK__MANIFEST_KEEP; k++)
        if (!manifest->line[k])
            return pk__fail(context, PK_FORMAT, "run.txt line %zu: the file ends without a '%s' line", line,
                            pk__manifest_keys[k]);
    return PK_OK;
}

/* A whole number from 1 to 10^9: a decimal text without sign. */
static pk_status pk__manifest_keep(pk_context *context, const pk__manifest *manifest, size_t *keep_every)
{
    const char *text = manifest->value[PK__MANIFEST_KEEP];
    *keep_every = 1;
    if (!manifest->line[PK__MANIFEST_KEEP])
        return PK_OK;
    size_t value = 0, length = 0;
    for (; text[length] >= '0' && text[length] <= '9' && length < 10; length++)
        value = 10 * value + (size_t)(text[length] - '0');
    if (text[length] || value < 1 || value > PK_KEEP_EVERY_MOST)
        return pk__fail(context, PK_FORMAT, "keep_every '%.60s' is not a whole number from 1 to %d", text,
                        (int)PK_KEEP_EVERY_MOST);
    *keep_every = value;
    return PK_OK;
}

/* text (size bytes and a NUL after them) is changed. The graph stays zeroed on an error. */
PK__PRIVATE pk_status pk__manifest_parse(pk_context *context, char *text, size_t size,
                                         const pk_constants *constants, pk_graph *graph, pk_loss *loss,
                                         pk_optimizer *optimizer, size_t *keep_every)
{
    pk__manifest manifest;
    pk_status status = pk__manifest_split(context, text, size, &manifest);
    if (status != PK_OK)
        return status;
    int key = PK__MANIFEST_KEEP;
    status = pk__manifest_keep(context, &manifest, keep_every);
    if (status == PK_OK) {
        key = PK__MANIFEST_LOSS;
        status = pk_loss_parse(context, manifest.value[key], loss);
    }
    if (status == PK_OK) {
        key = PK__MANIFEST_OPTIMIZER;
        status = pk_optimizer_parse(context, manifest.value[key], optimizer);
    }
    if (status == PK_OK) {
        key = PK__MANIFEST_NETWORK;
        status = pk_network_parse_with(context, manifest.value[key], constants, graph);
    }
    return pk__prefix(context, status, "run.txt line %zu: ", manifest.line[key]);
}

/* constant_NAME.npy */
enum { PK__CONSTANT_FILE = PK_CONSTANT_NAME + 16 };

static const char *pk__constant_file(const char *name, char *text)
{
    snprintf(text, PK__CONSTANT_FILE, "constant_%s.npy", name);
    return text;
}

static pk_status pk__load_from_run(void *user, pk_context *context, const char *name, pk_array *array)
{
    char file[PK__CONSTANT_FILE];
    return pk_array_map(context, pk__run_path_of((pk__run_path *)user, pk__constant_file(name, file)), 0,
                        array);
}

static pk_status pk__manifest_read(pk_context *context, pk__run_path *directory, pk_run *run)
{
    const char *path = pk__run_path_of(directory, "run.txt");
    const char *kind;
    int file = pk__open_regular(AT_FDCWD, path, O_RDONLY, &kind);
    if (file < 0 && kind)
        return pk__fail(context, PK_IO, "%s is not a regular file but %s", path, kind);
    if (file < 0)
        return pk__run_io(context, path);
    struct stat about;
    pk_status status = PK_OK;
    if (fstat(file, &about) != 0)
        status = pk__run_io(context, path);
    /* One byte past the limit tells that the file is longer. */
    size_t limit = (size_t)PK__MANIFEST_SIZE + 1, size = 0;
    char *text = NULL;
    if (status == PK_OK) {
        if (about.st_size < (off_t)limit)
            limit = (size_t)about.st_size;
        status = pk_allocate(context, limit + 1, 1, "the text of run.txt", &text);
    }
    while (status == PK_OK && size < limit) {
        ssize_t count = read(file, text + size, limit - size);
        if (count > 0)
            size += (size_t)count;
        else if (count == 0)
            break;
        else if (errno != EINTR)
            status = pk__run_io(context, path);
    }
    close(file);
    if (status == PK_OK) {
        const pk_constants constants = {pk__load_from_run, directory};
        text[size] = '\0';
        status = pk__manifest_parse(context, text, size, &constants, &run->graph, &run->loss, &run->optimizer,
                                    &run->keep_every);
        if (status == PK_OK && size > PK__MANIFEST_SIZE)
            status = pk__fail(context, PK_FORMAT, "run.txt is longer than %d bytes", (int)PK__MANIFEST_SIZE);
    }
    pk_release(context, text);
    return status;
}

/* ---- reading a run --------------------------------------------------------------------------------- */

static pk_array *pk__run_array(pk_run *run, int file)
{
    return file == PK__RUN_WEIGHTS   ? &run->weights
           : file == PK__RUN_MOMENTS ? &run->second_moments
           : file == PK__RUN_STATES  ? &run->optimizer_states
                                     : &run->columns[file];
}

/* NULL where a growing file may hold items of a type, else what it has to hold. Rates are float64 alone: 0.1 as float32
 * is another number, which the optimiser did not use. */
static const char *pk__run_wants(int file, pk_type type)
{
    const int numbers = file == PK__RUN_OFFSETS || file == PK__RUN_ITEMS;
    if (numbers)
        return pk_type_is_integer(type) && type != PK_BOOL ? NULL : "integers";
    if (file == PK__RUN_ITEM_WEIGHTS || file == PK__RUN_SCALES)
        return NULL;
    if (pk__run_files[file].type)
        return type == pk__run_files[file].type ? NULL : pk_type_name(pk__run_files[file].type);
    return type == PK_FLOAT64 || type == PK_FLOAT32 ? NULL : "float64 or float32";
}

/* A column of another type in place of the mapped one, as int64 or float64. */
static pk_status pk__run_convert(pk_context *context, const char *path, pk_type type, pk_array *array)
{
    const size_t items = pk_array_items(array);
    pk_array made = *array;
    made.type = type;
    made.mapping = NULL;
    made.owned = NULL;
    made.file = 0;
    pk_status status = pk_allocate(context, items, pk_type_size(type), path, &made.owned);
    if (status != PK_OK)
        return status;
    made.data = made.owned;
    if (type == PK_INT64)
        pk_array_integers(array, 0, items, (int64_t *)made.owned);
    for (size_t i = 0; type == PK_FLOAT64 && i < items; i++) {
        int64_t integer = 0;
        if (array->type == PK_FLOAT32)
            ((double *)made.owned)[i] = (double)((const float *)array->data)[i];
        else {
            pk_array_integers(array, i, 1, &integer);
            ((double *)made.owned)[i] = (double)integer;
        }
    }
    pk_array_release(context, array);
    *array = made;
    return PK_OK;
}

/* Maps one of the growing files and checks its type and the shape of its rows. */
static pk_status pk__run_map(pk_context *context, pk__run_path *path, int file, pk_run *run)
{
    const pk__run_file *expected = &pk__run_files[file];
    pk_array *array = pk__run_array(run, file);
    pk__run_path_of(path, expected->name);
    int has = pk__run_has(file, run->keep_every, &run->optimizer);
    struct stat about;
    if (has <= 0 && lstat(path->text, &about) != 0 && errno == ENOENT) /* a link to nowhere is no absent file */
        return PK_OK;
    if (!has && file == PK__RUN_MOMENTS)
        return pk__fail(context, PK_FORMAT, "%s: a run with keep_every has optimizer_states.npy in its place",
                        path->text);
    if (!has) /* other programs may leave what they like */
        return PK_OK;
    const unsigned flags = PK_ARRAY_PARTIAL | (expected->rank == 2 ? PK_ARRAY_KEEP_OPEN : 0);
    pk_status status = pk_array_map(context, path->text, flags, array);
    if (status != PK_OK)
        return status;
    const char *wanted = pk__run_wants(file, array->type);
    if (wanted)
        return pk__fail(context, PK_FORMAT, "%s holds %s, it has to hold %s", path->text,
                        pk_type_name(array->type), wanted);
    if (array->rank != expected->rank)
        return pk__fail(context, PK_SHAPE, "%s has %d dimensions, it has to have %d", path->text, array->rank,
                        expected->rank);
    size_t vectors = file == PK__RUN_STATES ? pk_optimizer_state_vectors(&run->optimizer) : 1;
    if (expected->rank == 2 && (array->shape[1] / vectors != run->parameters || array->shape[1] % vectors))
        return pk__fail(context, PK_SHAPE, "%s has rows of %zu numbers, the network has %zu parameters%s",
                        path->text, array->shape[1], run->parameters,
                        vectors > 1 ? " and the optimizer two vectors" : "");
    if (array->shape[0] < expected->before)
        return pk__fail(context, PK_FORMAT, "%s holds no row, not even that of the start", path->text);
    return expected->type && array->type != expected->type
               ? pk__run_convert(context, path->text, expected->type, array)
               : PK_OK;
}

/* The first of count numbers that is not finite, or count. */
static size_t pk__not_finite(const double *numbers, size_t count)
{
    size_t i = 0;
    while (i < count && isfinite(numbers[i]))
        i++;
    return i;
}

/* "learning_rates.npy holds 1 row", with the bytes of a part of a row. */
static const char *pk__run_rows_text(const pk_run *run, int file, char *text, size_t size)
{
    const pk_array *array = pk__run_array((pk_run *)run, file); /* only read */
    size_t used = (size_t)snprintf(text, size, "%s holds %zu row%s", pk__run_files[file].name, array->shape[0],
                                   array->shape[0] == 1 ? "" : "s");
    if (array->extra_bytes && used < size)
        snprintf(text + used, size - used, " and %zu bytes", array->extra_bytes);
    return text;
}

/* Whether the files hold what a kill leaves of steps complete steps: each the rows of these, and those before
 * weights.npy in the order of writing also the row of the next step or a part of it. If not, *file is one that holds
 * something else. */
static int pk__run_is_whole(const pk_run *run, size_t steps, int *file)
{
    const int keeps = (steps + 1) % run->keep_every == 0, last = keeps ? PK__RUN_WEIGHTS : PK__RUN_CHECKSUMS;
    const size_t items = (size_t)run->batch_offsets[steps];
    const pk_array *offsets = pk__run_array((pk_run *)run, PK__RUN_OFFSETS); /* only read, as below */
    const size_t next_items =
        offsets->shape[0] > steps + 1 ? pk__max(items, (size_t)run->batch_offsets[steps + 1]) : items;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array((pk_run *)run, f);
        const pk__run_file *kind = &pk__run_files[f];
        const int per_item = f == PK__RUN_ITEMS || f == PK__RUN_ITEM_WEIGHTS;
        const size_t least = (per_item ? items : kind->kept ? steps / run->keep_every : steps) + kind->before;
        size_t most = per_item ? next_items + kind->before : kind->kept && !keeps ? least : least + 1;
        if (f == last) /* its whole row would make the step complete */
            most = least;
        *file = f;
        if (array->data && (array->shape[0] < least || array->shape[0] > most ||
                            (array->shape[0] == most && array->extra_bytes && f != last)))
            return 0;
    }
    return 1;
}

/* How many steps are complete, and whether the batches of these make sense. recover: whatever the files' lengths. */
static pk_status pk__run_count(pk_context *context, const char *directory, int recover, pk_run *run)
{
    size_t rows[PK__RUN_FILES], steps = SIZE_MAX;
    int least = 0, per_item[PK__RUN_FILES] = {0, 0, 1, 1, 0, 0, 0, 0, 0};
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        rows[f] = array->data ? array->shape[0] : SIZE_MAX;
        size_t reach = rows[f] - pk__run_files[f].before; /* the last step that this file allows */
        if (pk__run_files[f].kept)
            reach = rows[f] > SIZE_MAX / run->keep_every ? SIZE_MAX : rows[f] * run->keep_every - 1;
        if (array->data && !per_item[f] && reach < steps)
            steps = reach, least = f;
    }
    int shorter = rows[PK__RUN_ITEM_WEIGHTS] < rows[PK__RUN_ITEMS] ? PK__RUN_ITEM_WEIGHTS : PK__RUN_ITEMS;
    const int64_t *offsets = run->batch_offsets;
    if (offsets[0] != 0)
        return pk__fail(context, PK_FORMAT, "%s/batch_offsets.npy starts with %lld, not with 0", directory,
                        (long long)offsets[0]);
    for (size_t s = 0; s < steps; s++) {
        if (offsets[s + 1] <= offsets[s])
            return pk__fail(context, PK_FORMAT, "%s/batch_offsets.npy %s at row %zu: from %lld to %lld",
                            directory, offsets[s + 1] < offsets[s] ? "goes backwards" : "holds an empty batch",
                            s + 1, (long long)offsets[s], (long long)offsets[s + 1]);
        if ((uint64_t)offsets[s + 1] > rows[shorter])
            steps = s, least = shorter; /* ends the loop */
    }
    size_t items = (size_t)offsets[steps];
    for (size_t i = 0; i < items; i++)
        if (run->batch_items[i] < 0 || (uint64_t)run->batch_items[i] >= run->examples)
            return pk__fail(context, PK_ARGUMENT,
                            "%s/batch_items.npy holds %lld at row %zu; there are %zu examples", directory,
                            (long long)run->batch_items[i], i, run->examples);
    const double *finite[3] = {run->learning_rates, run->batch_weights, run->gradient_scales};
    const int file[3] = {PK__RUN_RATES, PK__RUN_ITEM_WEIGHTS, PK__RUN_SCALES};
    for (int k = 0; k < 3; k++) {
        size_t count = !finite[k] ? 0 : k == 1 ? items : steps, i = pk__not_finite(finite[k], count);
        if (i < count)
            return pk__fail(context, PK_NOT_FINITE, "%s/%s holds %g at row %zu", directory,
                            pk__run_files[file[k]].name, finite[k][i], i);
    }
    run->steps = steps;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        size_t complete = per_item[f] ? items : pk__run_files[f].kept ? steps / run->keep_every : steps;
        complete += pk__run_files[f].before;
        if (array->data && (rows[f] > complete || array->extra_bytes))
            run->cut_off = 1;
    }
    int other = 0;
    if (!recover && !pk__run_is_whole(run, steps, &other)) {
        char has[120], also[120];
        if (least != PK__RUN_WEIGHTS && rows[PK__RUN_WEIGHTS] > steps / run->keep_every + 1)
            other = PK__RUN_WEIGHTS; /* what is looked at first */
        return pk__fail(
            context, PK_SHAPE,
            "%s: %s, %s; recording that is cut off leaves at most the row of one step more in the other "
            "files than in weights.npy, so a file is wrong or a power cut lost rows; to recover the run "
            "(--recover, pk_run_recover) gives its first %zu steps",
            directory, pk__run_rows_text(run, least, has, sizeof has),
            pk__run_rows_text(run, other, also, sizeof also), steps);
    }
    if (run->cut_off)
        (void)pk__fail(context, PK_OK, "%s was cut off after step %zu: %s ends first, with %zu whole rows",
                       directory, steps, pk__run_files[least].name, rows[least]);
    return PK_OK;
}

/* Inputs and targets against network and loss; also what a recorder is given. */
PK__PRIVATE pk_status pk__run_check_data(pk_context *context, const pk_dataset *train, const pk_graph *graph,
                                         pk_loss loss)
{
    pk_status status = pk_dataset_check(context, train, graph->input_width, graph->output_width);
    if (status == PK_OK)
        status = pk_array_check_rows(context, &train->inputs, graph->input_shape.rank, graph->input_shape.dims,
                                     "inputs");
    if (status == PK_OK)
        status = pk_loss_check(context, loss, train, graph->output_width);
    if (status != PK_OK || !graph->checked)
        return status;
    pk_real *row = NULL;
    status = pk_allocate(context, graph->input_width, sizeof *row, "a row of inputs", &row);
    for (size_t i = 0; status == PK_OK && i < pk_dataset_examples(train); i++) {
        const int64_t item = (int64_t)i;
        pk_dataset_inputs(train, &item, 1, row);
        status = pk_graph_check_inputs(context, graph, i, row);
    }
    pk_release(context, row);
    return status;
}

static pk_status pk__run_load(pk_context *context, pk__run_path *path, int recover, pk_run *run)
{
    pk_status status = pk__manifest_read(context, path, run);
    if (status != PK_OK)
        return status;
    run->parameters = run->graph.parameters;
    run->outputs = run->graph.output_width;
    for (int f = 0; f < PK__RUN_FILES && status == PK_OK; f++)
        status = pk__run_map(context, path, f, run);
    pk_array *data[2] = {&run->train.inputs, &run->train.targets};
    for (int k = 0; k < 2 && status == PK_OK; k++) {
        status = pk_array_map(context, pk__run_path_of(path, pk__run_fixed[k]), 0, data[k]);
    }
    if (status != PK_OK)
        return status;
    status = pk__run_check_data(context, &run->train, &run->graph, run->loss);
    if (status != PK_OK)
        return pk__prefix(context, status, "%s: train_inputs.npy, train_targets.npy: ", path->directory);
    run->examples = pk_dataset_examples(&run->train);
    run->learning_rates = (const double *)run->columns[PK__RUN_RATES].data;
    run->batch_offsets = (const int64_t *)run->columns[PK__RUN_OFFSETS].data;
    run->batch_items = (const int64_t *)run->columns[PK__RUN_ITEMS].data;
    run->batch_weights = (const double *)run->columns[PK__RUN_ITEM_WEIGHTS].data;
    run->gradient_scales = (const double *)run->columns[PK__RUN_SCALES].data;
    run->checksums = (const int64_t *)run->columns[PK__RUN_CHECKSUMS].data;
    return pk__run_count(context, path->directory, recover, run);
}

/* A run, from its path on. */
static pk_status pk__run_read(pk_context *context, const char *directory, int recover, pk_run *run)
{
    pk__run_path path;
    pk_status status = pk__run_path_take(context, directory, &path);
    memset(run, 0, sizeof *run);
    if (status != PK_OK)
        return status;
    status = pk__run_load(context, &path, recover, run);
    pk_release(context, path.text);
    if (status != PK_OK)
        pk_run_release(context, run);
    return status;
}

static pk_status pk__run_open(pk_context *context, const char *directory, int recover, pk_run *run)
{
    if (!directory || !run)
        return pk__fail(context, PK_ARGUMENT, "pk_run_open: %s is NULL", directory ? "run" : "directory");
    pk_run opened;
    pk_status status = pk__run_read(context, directory, recover, &opened);
    if (status == PK_OK)
        *run = opened;
    if (status != PK_MEMORY_LIMIT)
        return status;
    /* The least that would do, which only opening it without the limit can tell. A run takes little but the arrays
     * that its network names. */
    pk_context unlimited = *context;
    unlimited.memory_limit = 0;
    unlimited.memory_peak = unlimited.memory_used;
    if (pk__run_read(&unlimited, directory, recover, &opened) != PK_OK)
        return status;
    pk_run_release(&unlimited, &opened);
    return pk__fail(context, PK_MEMORY_LIMIT,
                    "%s: opening the run within %zu bytes is not possible; the least that would do is %zu",
                    directory, context->memory_limit, unlimited.memory_peak);
}

PK_API pk_status pk_run_open(pk_context *context, const char *directory, pk_run *run)
{
    return pk__run_open(context, directory, 0, run);
}

PK_API pk_status pk_run_recover(pk_context *context, const char *directory, pk_run *run)
{
    return pk__run_open(context, directory, 1, run);
}

PK_API pk_status pk_run_until(pk_context *context, pk_run *run, size_t steps)
{
    if (!run || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_run_until: no run");
    if (steps > run->steps)
        return pk__fail(context, PK_ARGUMENT, "the weights after step %zu: the run has %zu steps", steps,
                        run->steps);
    run->steps = steps;
    return PK_OK;
}

PK_API pk_status pk_run_check_inputs(pk_context *context, const pk_run *run, const pk_array *inputs,
                                     const char *name)
{
    if (!run || !run->graph.node_count || !run->train.inputs.rank)
        return pk__fail(context, PK_ARGUMENT, "pk_run_check_inputs: no run");
    const pk_shape *shape = &run->graph.input_shape;
    pk_status status = pk_array_check_rows(context, inputs, shape->rank, shape->dims, name);
    if (status != PK_OK)
        return status;
    const pk_array *train = &run->train.inputs;
    char has[200], also[200];
    if (pk_array_check_rows(NULL, inputs, train->rank - 1, train->shape + 1, name) != PK_OK)
        return pk__fail(context, PK_SHAPE,
                        "%s has shape %s, the training inputs %s: the axes have another order", name,
                        pk__shape_text(inputs, has, sizeof has), pk__shape_text(train, also, sizeof also));
    return PK_OK;
}

PK_API void pk_run_release(pk_context *context, pk_run *run)
{
    if (!run)
        return;
    for (int f = 0; f < PK__RUN_FILES; f++)
        pk_array_release(context, pk__run_array(run, f));
    pk_dataset_release(context, &run->train);
    pk_graph_release(context, &run->graph);
    memset(run, 0, sizeof *run);
}

PK_API void pk_run_batch(const pk_run *run, size_t step, pk_batch *batch)
{
    size_t first = (size_t)run->batch_offsets[step];
    batch->count = (size_t)run->batch_offsets[step + 1] - first;
    batch->items = run->batch_items ? run->batch_items + first : NULL;
    batch->weights = run->batch_weights ? run->batch_weights + first : NULL;
}

PK_API double pk_run_gradient_scale(const pk_run *run, size_t step)
{
    return run->gradient_scales ? run->gradient_scales[step] : 1;
}

PK_API pk_status pk_run_weights(pk_context *context, const pk_run *run, size_t step, pk_real *weights)
{
    if (!run || !weights || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_run_weights: no run or no weights");
    if (step > run->steps)
        return pk__fail(context, PK_ARGUMENT, "weights of step %zu: the run has %zu steps", step, run->steps);
    if (step % run->keep_every)
        return pk__fail(
            context, PK_ARGUMENT,
            "weights of step %zu: the run keeps every %zuth step; pk_replay_weights repeats the others", step,
            run->keep_every);
    return pk__run_row(context, run, &run->weights, "weights.npy", step / run->keep_every, step, weights);
}

PK_API pk_status pk_run_second_moments(pk_context *context, const pk_run *run, size_t step, pk_real *moments)
{
    if (!run || !moments || !run->second_moments.data)
        return pk__fail(context, PK_ARGUMENT, "second moments: %s",
                        run && moments ? "the run has no second_moments.npy" : "an argument is NULL");
    if (step >= run->steps)
        return pk__fail(context, PK_ARGUMENT, "second moments of step %zu: the run has %zu steps", step,
                        run->steps);
    return pk__run_row(context, run, &run->second_moments, "second_moments.npy", step, step, moments);
}

PK__END_COLD_CODE

/* pathkernel/run/record.h: implementation */
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
PK__BEGIN_COLD_CODE

/* ---- recording ------------------------------------------------------------------------------------- */

/* What a recorder was asked for, parsed. */
typedef struct pk__recording {
    pk_graph graph;
    pk_loss loss;
    pk_optimizer optimizer;
    char optimizer_text[256];
    size_t keep_every;
    int present[PK__RUN_FILES];
    int exists; /* the directory holds a manifest */
    int made;   /* the directory is new */
} pk__recording;

static pk_status pk__recording_parse(pk_context *context, const pk_recorder_options *options,
                                     const pk_dataset *train, pk__recording *recording)
{
    pk_status status = pk_loss_parse(context, options->loss, &recording->loss);
    if (status == PK_OK)
        status =
            pk_optimizer_parse(context, options->optimizer ? options->optimizer : "sgd", &recording->optimizer);
    if (status == PK_OK)
        status = pk_optimizer_format(&recording->optimizer, recording->optimizer_text,
                                     sizeof recording->optimizer_text);
    if (status == PK_OK)
        status = pk_network_parse_with(context, options->network, options->constants, &recording->graph);
    if (status != PK_OK)
        return status;
    recording->keep_every = options->keep_every ? options->keep_every : 1;
    if (recording->keep_every > PK_KEEP_EVERY_MOST)
        return pk__fail(context, PK_ARGUMENT, "keep_every %zu is more than %d", recording->keep_every,
                        (int)PK_KEEP_EVERY_MOST);
    if (recording->keep_every > 1 && options->float32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_ARGUMENT, "keep_every: steps cannot be replayed from weights in float32");
    if (recording->keep_every > 1 && options->second_moments)
        return pk__fail(context, PK_ARGUMENT, "keep_every: second moments are kept with the optimizer's state");
    for (int f = 0; f < PK__RUN_FILES; f++)
        recording->present[f] = pk__run_has(f, recording->keep_every, &recording->optimizer) > 0;
    recording->present[PK__RUN_ITEM_WEIGHTS] = options->batch_weights != 0;
    recording->present[PK__RUN_SCALES] = options->gradient_scales != 0;
    recording->present[PK__RUN_MOMENTS] = options->second_moments != 0;
    return pk__run_check_data(context, train, &recording->graph, recording->loss);
}

/* Parameters of numbers as the file's type, in recorder->row where they have to be converted; the caller
 * has checked that they fit. */
static const void *pk__recorder_row(const pk_recorder *recorder, const pk_real *numbers)
{
    if (!recorder->row)
        return numbers;
    for (size_t p = 0; p < recorder->parameters; p++)
        if (recorder->float32)
            ((float *)recorder->row)[p] = (float)numbers[p];
        else
            ((double *)recorder->row)[p] = (double)numbers[p];
    return recorder->row;
}

/* Whether P numbers are finite as the file's type. */
static pk_status pk__recorder_finite(pk_context *context, const pk_recorder *recorder, const char *what,
                                     const pk_real *numbers)
{
    const double limit = recorder->float32 ? FLT_MAX : DBL_MAX;
    if ((!recorder->float32 || sizeof(pk_real) == sizeof(float)) &&
        pk__all_finite(numbers, recorder->parameters))
        return PK_OK;
    for (size_t p = 0; p < recorder->parameters; p++)
        if (!(fabs((double)numbers[p]) <= limit))
            return pk__fail(context, PK_NOT_FINITE, "%s: parameter %zu is %g after step %zu, not a finite %s",
                            what, p, (double)numbers[p], recorder->steps,
                            recorder->float32 ? "float32" : "float64");
    return PK_OK;
}

/* train_inputs.npy or train_targets.npy, of the types that every reader of a run knows: bytes become numbers, labels and
 * other integers int64. */
static pk_status pk__recorder_data(pk_context *context, const char *path, const pk_array *array)
{
    if (!pk_type_is_integer(array->type) || array->type == PK_INT64)
        return pk_array_write(context, path, array->type, array->rank, array->shape, array->data);
    const int bytes = array->type == PK_UINT8 && !pk__is_labels(array);
    pk_array_writer writer;
    memset(&writer, 0, sizeof writer);
    void *row = NULL;
    pk_status status = pk_allocate(context, array->row_items, sizeof(int64_t), "a row of training data", &row);
    if (status == PK_OK)
        status = pk_array_create(context, path, bytes ? PK__REAL_TYPE : PK_INT64, array->rank, array->shape + 1,
                                 &writer);
    for (size_t i = 0; i < pk_array_length(array) && status == PK_OK; i++) {
        if (bytes)
            pk_array_reals(array, i * array->row_items, array->row_items, (pk_real *)row);
        else
            pk_array_integers(array, i * array->row_items, array->row_items, (int64_t *)row);
        status = pk_array_append(context, &writer, 1, row);
    }
    pk_release(context, row);
    pk_status closed = pk_array_close(status == PK_OK ? context : NULL, &writer); /* keeps the first message */
    return status == PK_OK ? closed : status;
}

enum { PK__RESUME_EVERY = 16, PK__RESUME_HEAD = 2 };
#define PK__RESUME_FILE "resume_state.npy"

/* A step and a hash as numbers that a double holds: of the hash 53 bits. */
static void pk__resume_head(size_t step, const pk_real *weights, size_t parameters, const pk_real *state,
                            size_t count, double head[PK__RESUME_HEAD])
{
    uint64_t hash = (uint64_t)pk__checksum(weights, parameters, state, count);
    head[0] = (double)step;
    head[1] = (double)(hash >> 11);
}

/* Opens resume_state.npy for writing in place: with its states where it is one, else with none. */
static int pk__recorder_open_state(const pk_recorder *recorder, const unsigned char *header, size_t room,
                                   size_t bytes)
{
    const off_t size = (off_t)(room + 2 * bytes);
    unsigned char there[PK__NPY_ROOM];
    struct stat about;
    const char *kind;
    int file = pk__open_regular(recorder->lock - 1, PK__RESUME_FILE, O_RDWR | O_CREAT, &kind);
    if (file < 0)
        return -1;
    int good = fstat(file, &about) == 0;
    if (good && (about.st_size != size || pread(file, there, room, 0) != (ssize_t)room ||
                 memcmp(there, header, room) != 0))
        good = ftruncate(file, 0) == 0 && ftruncate(file, size) == 0 && pk__write_at(file, header, room, 0);
    if (good)
        return file;
    close(file);
    return -1;
}

/* Writes the state in the place of the older of the two that the file has: the other one stays whole meanwhile. No step is
 * lost where that fails: they are there. */
static void pk__recorder_write_state(pk_recorder *recorder)
{
    const size_t shape[2] = {2, PK__RESUME_HEAD + recorder->state_numbers}, bytes = shape[1] * sizeof(double);
    unsigned char header[PK__NPY_ROOM];
    const pk_array array = pk_array_view(PK_FLOAT64, 2, shape, recorder->resume_state);
    const size_t room = pk__npy_header(&array, 0, 0, header);
    if (!recorder->resume_file)
        recorder->resume_file = pk__recorder_open_state(recorder, header, room, bytes) + 1;
    if (recorder->resume_file && pk__write_at(recorder->resume_file - 1, recorder->resume_state, bytes,
                                              room + recorder->resume_place * bytes))
        recorder->resume_place = !recorder->resume_place;
}

/* The optimiser's state and the weights after `steps` steps, which are complete in the recording: every so many times. */
PK__PRIVATE void pk__recorder_keep_state(pk_recorder *recorder, size_t steps, size_t every,
                                         const pk_real *state, const pk_real *weights)
{
    if (!recorder->resume_state || !state)
        return;
    if (recorder->resume_step && steps == recorder->resume_step + 1)
        pk__recorder_write_state(recorder);
    recorder->resume_step = 0;
    if (steps % every)
        return;
    recorder->resume_step = steps;
    pk__resume_head(steps, weights, recorder->parameters, state, recorder->state_numbers,
                    recorder->resume_state);
    for (size_t i = 0; i < recorder->state_numbers; i++)
        recorder->resume_state[PK__RESUME_HEAD + i] = (double)state[i];
}

/* *step: the latest before the last whose state (V P) resume_state.npy has; SIZE_MAX where there is none. weights (P):
 * room. */
PK__PRIVATE pk_status pk__recorder_find_state(pk_context *context, const char *directory, const pk_run *run,
                                              pk_recorder *recorder, pk_real *weights, pk_real *state,
                                              size_t *step)
{
    const size_t numbers = recorder->state_numbers, row = PK__RESUME_HEAD + numbers;
    pk__run_path path;
    pk_array array;
    memset(&path, 0, sizeof path);
    memset(&array, 0, sizeof array);
    *step = SIZE_MAX;
    pk_status status = pk__run_path_take(context, directory, &path);
    if (status != PK_OK)
        return status;
    /* Without a context: it is no error that there is no such file, or another one. */
    if (pk_array_map(NULL, pk__run_path_of(&path, PK__RESUME_FILE), 0, &array) == PK_OK &&
        array.type == PK_FLOAT64 && array.rank == 2 && array.shape[0] == 2 && array.shape[1] == row) {
        double head[2][PK__RESUME_HEAD], own[PK__RESUME_HEAD] = {0, 0};
        for (size_t i = 0; i < 2; i++)
            memcpy(head[i], (const double *)array.data + i * row, sizeof head[i]);
        size_t place = head[1][0] > head[0][0];
        for (int tries = 0; tries < 2 && *step == SIZE_MAX; tries++, place = !place) {
            if (!(head[place][0] >= 1 && head[place][0] < (double)run->steps))
                continue;
            const size_t there = (size_t)head[place][0];
            pk_array_reals(&array, place * row + PK__RESUME_HEAD, numbers, state);
            if (pk_run_weights(NULL, run, there, weights) == PK_OK)
                pk__resume_head(there, weights, run->parameters, state, numbers, own);
            if (memcmp(head[place], own, sizeof own) == 0) {
                *step = there;
                recorder->resume_place = !place;
            }
        }
    }
    pk_array_release(NULL, &array);
    pk_release(context, path.text);
    return PK_OK;
}

/* run.txt in the directory folder, complete or not there at all. */
static pk_status pk__recorder_manifest(pk_context *context, int folder, const char *directory,
                                       const pk__recording *recording)
{
    char *text = NULL;
    size_t size = strlen(recording->graph.text) + sizeof recording->optimizer_text + 256, at = 0;
    char keep[40] = "";
    if (recording->keep_every > 1)
        snprintf(keep, sizeof keep, "keep_every %zu\n", recording->keep_every);
    pk_status status = pk_allocate(context, size, 1, "the text of run.txt", &text);
    if (status != PK_OK)
        return status;
    size =
        (size_t)snprintf(text, size, "pathkernel-run 1\nnetwork   %s\nloss      %s\noptimizer %s\n%s",
                         recording->graph.text, pk_loss_name(recording->loss), recording->optimizer_text, keep);
    const char *kind;
    int file = pk__open_regular(folder, "run.txt.tmp", O_WRONLY | O_CREAT, &kind);
    int failed = file < 0 || ftruncate(file, 0) != 0;
    while (!failed && at < size) {
        ssize_t count = write(file, text + at, size - at);
        if (count >= 0)
            at += (size_t)count;
        else
            failed = errno != EINTR;
    }
    /* On the platter before it has its name, and the name as well: after a power cut there is all of it or nothing. */
    failed = failed || fsync(file) != 0 || renameat(folder, "run.txt.tmp", folder, "run.txt") != 0;
    if (failed)
        status = pk__fail(context, PK_IO, "%s/run.txt: %s%s", directory, kind ? "run.txt.tmp is " : "",
                          kind ? kind : strerror(errno));
    else
        (void)fsync(folder);
    if (file >= 0)
        close(file);
    pk_release(context, text);
    return status;
}

/* Undoes a start that failed. */
static void pk__recorder_clear(int folder)
{
    for (int f = 0; f < PK__RUN_FILES + PK__RUN_FIXED; f++) {
        const char *name = f < PK__RUN_FILES ? pk__run_files[f].name : pk__run_fixed[f - PK__RUN_FILES];
        char unfinished[64];
        snprintf(unfinished, sizeof unfinished, "%s.tmp", name);
        (void)unlinkat(folder, name, 0);
        (void)unlinkat(folder, unfinished, 0);
    }
    (void)unlinkat(folder, PK__RESUME_FILE, 0);
}

/* Makes the directory where it is missing, locks it, and sees what it holds. */
static pk_status pk__recorder_folder(pk_context *context, pk__run_path *path, int resume, int replace,
                                     pk_recorder *recorder, pk__recording *recording)
{
    if (mkdir(path->directory, 0777) == 0)
        recording->made = 1;
    else if (errno != EEXIST)
        return pk__run_io(context, path->directory);
    int folder = pk__open_above(AT_FDCWD, path->directory, O_RDONLY | O_DIRECTORY);
    if (folder < 0)
        return pk__run_io(context, path->directory);
    recorder->lock = folder + 1;
    /* Where the file system has no locks, go without. */
    if (flock(folder, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return pk__fail(context, PK_IO, "%s is being recorded by another recorder", path->directory);
    if (replace) { /* the manifest first: without it the rest is no run */
        (void)unlinkat(folder, pk__run_fixed[PK__RUN_MANIFEST], 0);
        pk__recorder_clear(folder);
    }
    struct stat about; /* a link to nowhere is there, too */
    recording->exists = fstatat(folder, pk__run_fixed[PK__RUN_MANIFEST], &about, AT_SYMLINK_NOFOLLOW) == 0;
    if (recording->exists && !resume)
        return pk__fail(context, PK_ARGUMENT,
                        "%s holds a run already: resume or replace it, or record elsewhere", path->directory);
    for (int f = 0; f < PK__RUN_FILES + PK__RUN_FIXED && !resume; f++) {
        const char *name = f < PK__RUN_FILES ? pk__run_files[f].name : pk__run_fixed[f - PK__RUN_FILES];
        if (fstatat(folder, name, &about, AT_SYMLINK_NOFOLLOW) == 0)
            return pk__fail(context, PK_ARGUMENT, "%s exists already: record elsewhere",
                            pk__run_path_of(path, name));
    }
    return PK_OK;
}

static pk_type pk__recorder_type(const pk_recorder *recorder, int file)
{
    return pk__run_files[file].type ? pk__run_files[file].type : recorder->float32 ? PK_FLOAT32 : PK_FLOAT64;
}

/* Numbers in a row of a file of rank 2. */
static const size_t *pk__recorder_width(const pk_recorder *recorder, int file)
{
    return file == PK__RUN_STATES ? &recorder->state_numbers : &recorder->parameters;
}

/* The optimiser's state as float64. */
static const double *pk__recorder_state(pk_recorder *recorder, const pk_real *state)
{
    for (size_t i = 0; i < recorder->state_numbers; i++)
        recorder->states[i] = (double)state[i];
    return recorder->states;
}

/* What goes with w_0 where steps are replayed: the optimiser's vectors are zero then. */
static pk_status pk__recorder_first(pk_context *context, pk_recorder *recorder, const pk_real *initial)
{
    int64_t checksum = pk__checksum(initial, recorder->parameters, NULL, 0);
    if (recorder->state_numbers) {
        pk_real *zeros = NULL;
        pk_status status =
            pk_allocate(context, recorder->state_numbers, sizeof *zeros, "the optimizer's first state", &zeros);
        if (status == PK_OK) {
            checksum = pk__checksum(initial, recorder->parameters, zeros, recorder->state_numbers);
            status = pk_array_append(context, &recorder->files[PK__RUN_STATES], 1,
                                     pk__recorder_state(recorder, zeros));
        }
        pk_release(context, zeros);
        if (status != PK_OK)
            return status;
    }
    return pk_array_append(context, &recorder->files[PK__RUN_CHECKSUMS], 1, &checksum);
}

static pk_status pk__recorder_start(pk_context *context, pk__run_path *path, const pk__recording *recording,
                                    const pk_dataset *train, const pk_real *initial, pk_recorder *recorder)
{
    const pk_array *data[2] = {&train->inputs, &train->targets};
    pk_status status = PK_OK;
    for (int k = 0; k < 2 && status == PK_OK; k++)
        status = pk__recorder_data(context, pk__run_path_of(path, pk__run_fixed[k]), data[k]);
    pk_array constant;
    const pk_node *node = NULL;
    while (status == PK_OK && (node = pk_graph_named(&recording->graph, node, &constant)) != NULL) {
        char file[PK__CONSTANT_FILE];
        status = pk__recorder_data(context, pk__run_path_of(path, pk__constant_file(node->constant_name, file)),
                                   &constant);
    }
    for (int f = 0; f < PK__RUN_FILES && status == PK_OK; f++)
        if (recording->present[f])
            status = pk_array_create(context, pk__run_path_of(path, pk__run_files[f].name),
                                     pk__recorder_type(recorder, f), pk__run_files[f].rank,
                                     pk__recorder_width(recorder, f), &recorder->files[f]);
    int64_t zero = 0;
    if (status == PK_OK)
        status = pk_array_append(context, &recorder->files[PK__RUN_OFFSETS], 1, &zero);
    if (status == PK_OK && recorder->present[PK__RUN_CHECKSUMS])
        status = pk__recorder_first(context, recorder, initial);
    if (status == PK_OK)
        status =
            pk_array_append(context, &recorder->files[PK__RUN_WEIGHTS], 1, pk__recorder_row(recorder, initial));
    if (status == PK_OK)
        status = pk__recorder_manifest(context, recorder->lock - 1, path->directory, recording);
    return status;
}

/* Whether the training data are those of the run. */
static int pk__same_data(const pk_array *given, const pk_array *recorded)
{
    if (given->rank != recorded->rank)
        return 0;
    for (int d = 0; d < given->rank; d++)
        if (given->shape[d] != recorded->shape[d])
            return 0;
    size_t items = pk_array_items(given);
    if (given->type == recorded->type)
        return memcmp(given->data, recorded->data, items * pk_type_size(given->type)) == 0;
    if (!pk_type_is_integer(given->type)) /* only integers are recorded as another type */
        return 0;
    for (size_t i = 0; i < items; i++) {
        int64_t here, there;
        pk_real number;
        pk_array_integers(given, i, 1, &here);
        pk_array_reals(recorded, i, 1, &number);
        int same = number == (pk_real)here;
        if (pk_type_is_integer(recorded->type)) {
            pk_array_integers(recorded, i, 1, &there);
            same = here == there;
        }
        if (!same)
            return 0;
    }
    return 1;
}

/* Whether the run is the one that would have been recorded. */
static pk_status pk__recorder_compare(pk_context *context, const char *directory,
                                      const pk__recording *recording, const pk_dataset *train,
                                      const pk_real *initial, const pk_recorder *recorder, pk_run *run)
{
    char optimizer[256];
    pk_status status = pk_optimizer_format(&run->optimizer, optimizer, sizeof optimizer);
    if (status != PK_OK)
        return pk__fail(context, status, "%s/run.txt: the optimizer cannot be written", directory);
    const char *line[3][3] = {{"network", run->graph.text, recording->graph.text},
                              {"loss", pk_loss_name(run->loss), pk_loss_name(recording->loss)},
                              {"optimizer", optimizer, recording->optimizer_text}};
    for (int k = 0; k < 3; k++)
        if (strcmp(line[k][1], line[k][2]) != 0)
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its %s is '%.120s', not '%.120s'",
                            directory, line[k][0], line[k][1], line[k][2]);
    if (run->keep_every != recording->keep_every)
        return pk__fail(context, PK_ARGUMENT,
                        "%s cannot be resumed: it keeps every %zuth step, not every %zuth", directory,
                        run->keep_every, recording->keep_every);
    for (int f = 0; f < PK__RUN_FILES; f++) {
        const pk_array *array = pk__run_array(run, f);
        if (!array->data != !recording->present[f])
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: it was recorded %s %s", directory,
                            array->data ? "with" : "without", pk__run_files[f].name);
        if (array->data && array->type != pk__recorder_type(recorder, f))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: %s holds %s, not %s", directory,
                            pk__run_files[f].name, pk_type_name(array->type),
                            pk_type_name(pk__recorder_type(recorder, f)));
    }
    const pk_array *given[2] = {&train->inputs, &train->targets};
    const pk_array *recorded[2] = {&run->train.inputs, &run->train.targets};
    for (int k = 0; k < 2; k++)
        if (!pk__same_data(given[k], recorded[k]))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: %s holds other data", directory,
                            pk__run_fixed[k]);
    pk_array own, other;
    const pk_node *node = NULL, *wanted = NULL; /* the same network: the same nodes */
    while ((node = pk_graph_named(&run->graph, node, &own)) != NULL) {
        wanted = pk_graph_named(&recording->graph, wanted, &other);
        if (!wanted || !pk__same_data(&other, &own))
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its array '%s' holds other numbers",
                            directory, node->constant_name);
    }
    for (size_t p = 0; initial && p < run->parameters; p++) {
        pk_real there, here = recorder->float32 ? (pk_real)(float)initial[p] : initial[p];
        pk_array_reals(&run->weights, p, 1, &there);
        if (there != here)
            return pk__fail(
                context, PK_ARGUMENT,
                "%s cannot be resumed: it starts from other weights, parameter %zu is %.17g, not %.17g",
                directory, p, (double)there, (double)here);
    }
    return PK_OK;
}

static pk_status pk__recorder_continue(pk_context *context, pk__run_path *path, const pk__recording *recording,
                                       const pk_dataset *train, const pk_real *initial, pk_recorder *recorder)
{
    pk_run run;
    pk_status status = pk_run_open(context, path->directory, &run);
    if (status != PK_OK)
        return status;
    status = pk__recorder_compare(context, path->directory, recording, train, initial, recorder, &run);
    recorder->steps = run.steps;
    recorder->items = run.batch_offsets[run.steps];
    pk_run_release(context, &run); /* before files shrink */
    /* What was written last is cut off first: a kill on the way leaves what a kill while recording does. */
    for (int f = PK__RUN_FILES - 1; f >= 0 && status == PK_OK; f--) {
        int per_item = f == PK__RUN_ITEMS || f == PK__RUN_ITEM_WEIGHTS;
        size_t rows = per_item                ? (size_t)recorder->items
                      : pk__run_files[f].kept ? recorder->steps / recorder->keep_every
                                              : recorder->steps;
        if (recording->present[f])
            status = pk_array_reopen(context, pk__run_path_of(path, pk__run_files[f].name),
                                     pk__recorder_type(recorder, f), pk__run_files[f].rank,
                                     pk__recorder_width(recorder, f), rows + pk__run_files[f].before,
                                     &recorder->files[f]);
    }
    return status;
}

/* Closes; errors go to report only: NULL keeps the message of an earlier error. */
PK__PRIVATE pk_status pk__recorder_end(pk_context *context, pk_context *report, pk_recorder *recorder)
{
    pk_status first = PK_OK;
    for (int f = 0; f < PK__RUN_FILES; f++) {
        pk_status status = pk_array_close(first == PK_OK ? report : NULL, &recorder->files[f]);
        if (first == PK_OK)
            first = status;
    }
    pk_release(context, recorder->row);
    pk_release(context, recorder->states);
    pk_release(context, recorder->resume_state);
    if (recorder->resume_file)
        close(recorder->resume_file - 1);
    pk_release(context, recorder->uniform);
    if (recorder->lock)
        close(recorder->lock - 1);
    memset(recorder, 0, sizeof *recorder);
    return first;
}

PK_API pk_status pk_recorder_open(pk_context *context, const char *directory,
                                  const pk_recorder_options *options, const pk_dataset *train,
                                  const pk_real *initial_weights, pk_recorder *recorder)
{
    const char *missing = !directory                                              ? "directory"
                          : !options || !options->network || !options->loss       ? "options, network or loss"
                          : !train || !train->inputs.data || !train->targets.data ? "training data"
                          : !initial_weights && !options->resume                  ? "initial_weights"
                          : !recorder                                             ? "recorder"
                                                                                  : NULL;
    if (missing)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_open: %s missing (NULL)", missing);
    if (options->resume && options->replace)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_open: a run cannot be both resumed and replaced");
    pk__recording recording;
    pk_recorder opened;
    pk__run_path path;
    memset(&recording, 0, sizeof recording);
    memset(&opened, 0, sizeof opened);
    memset(&path, 0, sizeof path);
    opened.float32 = options->float32 != 0;
    pk_status status = pk__recording_parse(context, options, train, &recording);
    opened.parameters = recording.graph.parameters;
    opened.examples = pk_dataset_examples(train);
    memcpy(opened.present, recording.present, sizeof opened.present);
    opened.keep_every = recording.keep_every;
    if (status == PK_OK && !pk__multiply(pk_optimizer_state_vectors(&recording.optimizer), opened.parameters,
                                         &opened.state_numbers))
        status = pk__fail(context, PK_OVERFLOW, "the optimizer's state overflows");
    if (status == PK_OK && initial_weights)
        status = pk__recorder_finite(context, &opened, "initial weights", initial_weights);
    if (status == PK_OK && pk__recorder_type(&opened, PK__RUN_WEIGHTS) != PK__REAL_TYPE)
        status = pk_allocate(context, opened.parameters, opened.float32 ? sizeof(float) : sizeof(double),
                             "a row of weights", &opened.row);
    if (status == PK_OK && opened.present[PK__RUN_STATES])
        status = pk_allocate(context, opened.state_numbers, sizeof *opened.states, "a row of optimizer states",
                             &opened.states);
    if (status == PK_OK && opened.keep_every == 1 && opened.state_numbers &&
        !(opened.float32 && sizeof(pk_real) > sizeof(float))) {
        if (opened.state_numbers > SIZE_MAX - PK__RESUME_HEAD)
            status = pk__fail(context, PK_OVERFLOW, "the optimizer's state overflows");
        else
            status = pk_allocate(context, PK__RESUME_HEAD + opened.state_numbers, sizeof *opened.resume_state,
                                 "the state to resume from", &opened.resume_state);
    }
    if (status == PK_OK)
        status = pk__run_path_take(context, directory, &path);
    if (status == PK_OK)
        status = pk__recorder_folder(context, &path, options->resume, options->replace, &opened, &recording);
    if (status == PK_OK && recording.exists) {
        status = pk__recorder_continue(context, &path, &recording, train, initial_weights, &opened);
    } else if (status == PK_OK) {
        if (initial_weights)
            status = pk__recorder_start(context, &path, &recording, train, initial_weights, &opened);
        else
            status = pk__fail(context, PK_ARGUMENT, "%s: there is no run to resume, and no initial weights",
                              directory);
        if (status != PK_OK)
            pk__recorder_clear(opened.lock - 1);
    }
    if (status != PK_OK && recording.made)
        (void)rmdir(directory);
    pk_release(context, path.text);
    pk_graph_release(context, &recording.graph);
    if (status == PK_OK) {
        *recorder = opened;
        return PK_OK;
    }
    (void)pk__recorder_end(context, NULL, &opened);
    return status;
}

/* Everything about a step that can be wrong before anything is written. */
static pk_status pk__recorder_check(pk_context *context, const pk_recorder *recorder, double learning_rate,
                                    const pk_batch *batch, double gradient_scale, const pk_real *second_moments,
                                    const pk_real *state, const pk_real *weights_after)
{
    size_t step = recorder->steps;
    if (!recorder->lock)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_step: the recorder is closed");
    if (recorder->failed)
        return pk__fail(context, PK_IO, "%s: a write failed at step %zu; resume the run with a new recorder",
                        recorder->files[PK__RUN_WEIGHTS].name, step);
    if (!batch || !batch->items || batch->count == 0 || !weights_after)
        return pk__fail(context, PK_ARGUMENT, "step %zu: an empty batch, or no weights", step);
    if (!isfinite(learning_rate) || !isfinite(gradient_scale))
        return pk__fail(context, PK_NOT_FINITE, "step %zu: the learning rate is %g, the gradient scale %g",
                        step, learning_rate, gradient_scale);
    if (gradient_scale != 1 && !recorder->present[PK__RUN_SCALES])
        return pk__fail(context, PK_ARGUMENT,
                        "step %zu: gradient scale %g, but gradient_scales are not recorded", step,
                        gradient_scale);
    if (batch->weights && !recorder->present[PK__RUN_ITEM_WEIGHTS])
        return pk__fail(context, PK_ARGUMENT,
                        "step %zu: the batch has weights, but batch_weights are not recorded", step);
    if (!second_moments != !recorder->present[PK__RUN_MOMENTS])
        return pk__fail(context, PK_ARGUMENT, "step %zu: second moments are %s, but %s", step,
                        second_moments ? "given" : "missing", second_moments ? "not recorded" : "recorded");
    for (size_t b = 0; b < batch->count; b++)
        if (batch->items[b] < 0 || (uint64_t)batch->items[b] >= recorder->examples)
            return pk__fail(context, PK_ARGUMENT,
                            "step %zu: item %zu of the batch is %lld; there are %zu examples", step, b,
                            (long long)batch->items[b], recorder->examples);
    size_t bad = batch->weights ? pk__not_finite(batch->weights, batch->count) : batch->count;
    if (bad < batch->count)
        return pk__fail(context, PK_NOT_FINITE, "step %zu: weight %zu of the batch is %g", step, bad,
                        batch->weights[bad]);
    pk_status status = pk__recorder_finite(context, recorder, "weights", weights_after);
    if (status == PK_OK && second_moments)
        status = pk__recorder_finite(context, recorder, "second moments", second_moments);
    if (status == PK_OK && !state && recorder->present[PK__RUN_STATES])
        return pk__fail(context, PK_ARGUMENT, "step %zu: the optimizer's state is missing", step);
    if (!recorder->present[PK__RUN_STATES] || status != PK_OK || pk__all_finite(state, recorder->state_numbers))
        return status;
    for (size_t i = 0; i < recorder->state_numbers; i++)
        if (!isfinite(state[i]))
            return pk__fail(context, PK_NOT_FINITE, "the optimizer's state: number %zu is %g after step %zu", i,
                            (double)state[i], step);
    return status;
}

/* batch->weights, or as many times 1/count. */
static pk_status pk__recorder_batch_weights(pk_context *context, pk_recorder *recorder, const pk_batch *batch,
                                            const double **weights)
{
    *weights = batch->weights;
    if (batch->weights || !recorder->present[PK__RUN_ITEM_WEIGHTS])
        return PK_OK;
    if (recorder->uniform_size < batch->count) {
        double *more = NULL;
        pk_status status = pk_allocate(context, batch->count, sizeof *more, "the weights of a batch", &more);
        if (status != PK_OK)
            return status;
        pk_release(context, recorder->uniform);
        recorder->uniform = more;
        recorder->uniform_size = batch->count;
    }
    for (size_t b = 0; b < batch->count; b++)
        recorder->uniform[b] = 1 / (double)batch->count;
    *weights = recorder->uniform;
    return PK_OK;
}

/* Appends the rows of a step. state: where steps are replayed. */
static pk_status pk__recorder_append(pk_context *context, pk_recorder *recorder, double learning_rate,
                                     const pk_batch *batch, double gradient_scale,
                                     const pk_real *second_moments, const pk_real *state,
                                     const pk_real *weights_after)
{
    const double *batch_weights = NULL;
    pk_status status = pk__recorder_check(context, recorder, learning_rate, batch, gradient_scale,
                                          second_moments, state, weights_after);
    if (status == PK_OK)
        status = pk__recorder_batch_weights(context, recorder, batch, &batch_weights);
    if (status != PK_OK)
        return status;
    int64_t end = recorder->items + (int64_t)batch->count;
    int keeps = (recorder->steps + 1) % recorder->keep_every == 0;
    int64_t checksum =
        !recorder->present[PK__RUN_CHECKSUMS]
            ? 0
            : pk__checksum(weights_after, recorder->parameters, keeps ? state : NULL, recorder->state_numbers);
    const void *rows[PK__RUN_FILES] = {&learning_rate, &end, batch->items, batch_weights, &gradient_scale,
                                       &checksum,      NULL, NULL,         NULL};
    for (int f = 0; f < PK__RUN_FILES && status == PK_OK; f++) {
        if (!recorder->present[f] || (pk__run_files[f].kept && !keeps))
            continue;
        int per_item = f == PK__RUN_ITEMS || f == PK__RUN_ITEM_WEIGHTS;
        const void *row = f == PK__RUN_WEIGHTS   ? pk__recorder_row(recorder, weights_after)
                          : f == PK__RUN_MOMENTS ? pk__recorder_row(recorder, second_moments)
                          : f == PK__RUN_STATES  ? pk__recorder_state(recorder, state)
                                                 : rows[f];
        status = pk_array_append(context, &recorder->files[f], per_item ? batch->count : 1, row);
    }
    if (status != PK_OK) {
        recorder->failed = 1; /* the files disagree now: readers see the step before */
        return status;
    }
    recorder->items = end;
    recorder->steps++;
    pk__recorder_keep_state(recorder, recorder->steps, PK__RESUME_EVERY, state, weights_after);
    return PK_OK;
}

PK_API pk_status pk_recorder_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                  const pk_batch *batch, double gradient_scale, const pk_real *second_moments,
                                  const pk_real *weights_after)
{
    if (!recorder)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_step: recorder is NULL");
    if (recorder->present[PK__RUN_CHECKSUMS])
        return pk__fail(context, PK_ARGUMENT,
                        "keep_every: only steps of pk_training_step can be replayed; they are recorded by "
                        "pk_recorder_training_step");
    return pk__recorder_append(context, recorder, learning_rate, batch, gradient_scale, second_moments, NULL,
                               weights_after);
}

PK_API pk_status pk_recorder_training_step(pk_context *context, pk_recorder *recorder, double learning_rate,
                                           const pk_batch *batch, double gradient_scale, const pk_real *state,
                                           const pk_real *weights_after)
{
    if (!recorder)
        return pk__fail(context, PK_ARGUMENT, "pk_recorder_training_step: recorder is NULL");
    const pk_real *moments = state && recorder->present[PK__RUN_MOMENTS] ? state + recorder->parameters : NULL;
    return pk__recorder_append(context, recorder, learning_rate, batch, gradient_scale, moments, state,
                               weights_after);
}

PK_API size_t pk_recorder_choose_keep_every(size_t parameters, size_t steps, size_t state_vectors,
                                            uint64_t bytes)
{
    double row = (double)parameters * sizeof(double); /* exact below 2^50 parameters */
    if (((double)steps + 1) * row <= (double)bytes)
        return 1;
    /* R rows fit: floor(S / k) + 1 <= R where k > S / R. */
    double rows = floor(((double)bytes - 8 * ((double)steps + 1)) / (row * (1 + (double)state_vectors)));
    if (!(rows >= 1))
        return 0;
    size_t every = rows > (double)steps ? 2 : steps / (size_t)rows + 1;
    return every < 2 ? 2 : every;
}

PK_API pk_status pk_recorder_close(pk_context *context, pk_recorder *recorder)
{
    return recorder ? pk__recorder_end(context, context, recorder) : PK_OK;
}

PK__END_COLD_CODE

/* pathkernel/run/revisit.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- one step --------------------------------------------------------------------------------------- */

/* graph, train, loss and optimizer are set. */
static void pk__trainer_take(pk__arena *arena, size_t largest_batch, int threads, pk_trainer *trainer)
{
    const size_t P = trainer->graph->parameters, real = sizeof(pk_real);
    pk_gradient_workspace *workspace = &trainer->workspace;
    if (!pk__multiply(pk_optimizer_state_vectors(&trainer->optimizer), P, &trainer->state_numbers))
        arena->overflow = 1;
    trainer->gradient = pk__arena_take(arena, P, real);
    trainer->state = pk__arena_take(arena, trainer->state_numbers, real);
    memset(workspace, 0, sizeof *workspace);
    workspace->graph = trainer->graph;
    workspace->largest_batch = largest_batch;
    workspace->threads = (int)pk__min((size_t)threads, pk__gradient_cut(P, largest_batch).groups);
    pk__gradient_take(arena, trainer->graph, workspace);
}

PK_API pk_status pk_trainer_prepare(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                    pk_loss loss, const pk_optimizer *optimizer, size_t largest_batch,
                                    pk_trainer *trainer)
{
    if (!graph || !graph->node_count || !train || !optimizer || !trainer || !largest_batch)
        return pk__fail(context, PK_ARGUMENT, "training steps: graph, data, optimizer or batches are missing");
    pk_trainer taken;
    memset(&taken, 0, sizeof taken);
    taken.graph = graph;
    taken.train = train;
    taken.loss = loss;
    taken.optimizer = *optimizer;
    pk__arena arena = {NULL, 0, 0, 0};
    pk__trainer_take(&arena, largest_batch, pk_threads(context), &taken);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "the memory for training steps on %zu examples overflows",
                        largest_batch);
    pk_status status = pk_allocate(context, arena.used, 1, "the memory of a training step", &taken.memory);
    if (status != PK_OK)
        return status;
    pk__arena own = {taken.memory, arena.used, 0, 0};
    pk__trainer_take(&own, largest_batch, pk_threads(context), &taken);
    *trainer = taken;
    return PK_OK;
}

PK_API void pk_trainer_release(pk_context *context, pk_trainer *trainer)
{
    if (!trainer)
        return;
    pk_release(context, trainer->memory);
    memset(trainer, 0, sizeof *trainer);
}

enum { PK__STEP_RANGE = 4096 }; /* parameters that go through a step together, while they are in the cache */

/* next = weights + their update, for one range of the parameters; whether it is finite. */
static int pk__step_range(const pk_optimizer *optimizer, const pk__update *whole, size_t range)
{
    const size_t first = range * PK__STEP_RANGE;
    pk__update part = *whole;
    part.count = pk__min(whole->count - first, PK__STEP_RANGE);
    part.weights += first;
    part.gradient += part.gradient ? first : 0;
    part.state = part.state ? part.state + first : NULL;
    part.update += first;
    pk__optimizer_part(optimizer, &part);
    const pk_real *weights = part.weights;
    pk_real *next = part.update;
    const size_t count = part.count;
    PK__SIMD
    for (size_t p = 0; p < count; p++)
        next[p] += weights[p];
    return pk__all_finite(next, count);
}

/* Whether all of next is finite. Ranges are independent: threads share them where that is worth their start. */
static int pk__step_update(pk_context *context, const pk_optimizer *optimizer, const pk__update *whole)
{
    const size_t ranges = pk__blocks(whole->count, PK__STEP_RANGE);
    const int threads = (int)pk__min((size_t)pk_threads(context), pk__max(ranges / 8, 1));
    int finite = 1;
    if (threads > 1) {
        pk__team team = pk__team_of(context, threads, ranges);
        PK__PARALLEL(team)
        for (size_t range = pk__first_task(&team); range < ranges; range = pk__next_task(&team))
            if (!pk__step_range(optimizer, whole, range)) {
                PK__ATOMIC_WRITE
                finite = 0;
            }
        pk__team_end(&team);
    } else {
        for (size_t range = 0; range < ranges; range++)
            finite &= pk__step_range(optimizer, whole, range);
    }
    return finite;
}

/* The step, whoever makes it. clip_norm 0: *scale is given. */
static pk_status pk__make_step(pk_context *context, pk_trainer *trainer, size_t step, double rate,
                               double clip_norm, const pk_batch *batch, const pk_real *weights, pk_real *next,
                               double *scale, double *objective)
{
    const size_t P = trainer->graph->parameters;
    pk_status status = pk_batch_gradient(context, trainer->graph, trainer->loss, weights, trainer->train, batch,
                                         &trainer->workspace, objective, trainer->gradient);
    if (status != PK_OK)
        return pk__prefix(context, status, "step %zu: ", step);
    if (clip_norm > 0)
        *scale = pk_clip_scale(trainer->gradient, P, clip_norm);
    const pk__update whole = {step, rate, *scale, P, P, weights, trainer->gradient, trainer->state, next};
    if (!pk__step_update(context, &trainer->optimizer, &whole))
        for (size_t p = 0; p < P; p++)
            if (!isfinite(next[p]))
                return pk__fail(context, PK_NOT_FINITE, "step %zu: training diverged, parameter %zu becomes %g",
                                step, p, (double)next[p]);
    return PK_OK;
}

PK_API pk_status pk_training_step(pk_context *context, pk_trainer *trainer, size_t step, double learning_rate,
                                  double clip_norm, const pk_batch *batch, const pk_real *weights,
                                  pk_real *next, double *scale, double *objective)
{
    double used = 1;
    if (!trainer || !trainer->gradient || !batch || !weights || !next)
        return pk__fail(context, PK_ARGUMENT, "step %zu: trainer, batch or weights are missing", step);
    if (!isfinite(learning_rate))
        return pk__fail(context, PK_ARGUMENT, "the learning rate of step %zu is %g", step, learning_rate);
    if (!(clip_norm >= 0))
        return pk__fail(context, PK_ARGUMENT, "the clip_norm of step %zu is %g", step, clip_norm);
    pk_status status =
        pk__make_step(context, trainer, step, learning_rate, clip_norm, batch, weights, next, &used, objective);
    if (scale)
        *scale = used;
    return status;
}

/* ---- replay ----------------------------------------------------------------------------------------- */

/* Whether weights and state are those that the run had at a step. */
PK__PRIVATE int pk__same_step(const pk_run *run, size_t step, const pk_real *weights, const pk_real *state,
                              size_t state_numbers)
{
    const pk_real *kept = step % run->keep_every ? NULL : state;
    return pk__checksum(weights, run->parameters, kept, state_numbers) == run->checksums[step];
}

/* Reads a kept step of a run with keep_every > 1. */
PK__PRIVATE pk_status pk__replay_load(pk_context *context, const pk_run *run, size_t step, pk_real *weights,
                                      pk_real *state, size_t state_numbers)
{
    if (run->weights.type == PK_FLOAT32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_UNSUPPORTED,
                        "keep_every: steps cannot be replayed from weights in float32");
    pk_status status = pk_run_weights(context, run, step, weights);
    if (status != PK_OK)
        return status;
    if (state_numbers)
        status = pk_array_read(context, &run->optimizer_states, step / run->keep_every * state_numbers,
                               state_numbers, state);
    if (status != PK_OK)
        return pk__prefix(context, status, "optimizer_states.npy: the row of step %zu ", step);
    if (!pk__same_step(run, step, weights, state, state_numbers))
        return pk__fail(context, PK_FORMAT,
                        "weights.npy%s: the rows of step %zu are damaged, their checksum differs",
                        state_numbers ? ", optimizer_states.npy" : "", step);
    return PK_OK;
}

PK__INTERNAL void pk__replay_take(pk__arena *arena, const pk_run *run, size_t largest_batch, int threads,
                                  size_t reach, pk_replay *replay)
{
    const size_t P = run->parameters, every = pk__min(run->keep_every, run->steps + 1);
    memset(replay, 0, sizeof *replay);
    replay->run = run;
    replay->step = SIZE_MAX;
    if (run->keep_every == 1)
        return;
    replay->trainer.graph = &run->graph;
    replay->trainer.train = &run->train;
    replay->trainer.loss = run->loss;
    replay->trainer.optimizer = run->optimizer;
    pk__trainer_take(arena, pk__max(largest_batch, 1), threads, &replay->trainer);
    replay->weights = pk__arena_take(arena, P, sizeof(pk_real));
    replay->next = pk__arena_take(arena, P, sizeof(pk_real));
    if (reach && every > 1) {
        replay->spacing = pk__max(reach, pk__blocks(every, PK_REPLAY_STOPS + 1));
        replay->stops = (every - 1) / replay->spacing;
    }
    size_t numbers = 0;
    if (!pk__multiply(P, 1 + pk_optimizer_state_vectors(&run->optimizer), &numbers) ||
        !pk__multiply(replay->stops, numbers, &numbers))
        arena->overflow = 1;
    replay->stop_numbers = pk__arena_take(arena, numbers, sizeof(pk_real));
    for (int i = 0; i < PK_REPLAY_STOPS; i++)
        replay->stop[i] = SIZE_MAX;
}

PK_API pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach, pk_replay *replay)
{
    if (!run || !replay || !run->weights.data)
        return pk__fail(context, PK_ARGUMENT, "pk_replay_prepare: no run or no replay");
    pk_replay taken;
    size_t largest = 1;
    for (size_t s = 0; s < run->steps; s++)
        largest = pk__max(largest, (size_t)(run->batch_offsets[s + 1] - run->batch_offsets[s]));
    pk__arena arena = {NULL, 0, 0, 0};
    pk__replay_take(&arena, run, largest, pk_threads(context), reach, &taken);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "the memory of a replay overflows");
    void *memory = NULL;
    pk_status status = pk_allocate(context, arena.used, 1, "the memory of a replay", &memory);
    if (status != PK_OK)
        return status;
    pk__arena own = {memory, arena.used, 0, 0};
    if (memory)
        pk__replay_take(&own, run, largest, pk_threads(context), reach, &taken);
    taken.memory = memory;
    *replay = taken;
    return PK_OK;
}

PK_API void pk_replay_release(pk_context *context, pk_replay *replay)
{
    if (!replay)
        return;
    pk_release(context, replay->memory);
    memset(replay, 0, sizeof *replay);
}

/* The room of the stop at replay->step, or NULL where none belongs. */
static pk_real *pk__replay_stop(const pk_replay *replay, size_t step, size_t *index)
{
    size_t within = step % replay->run->keep_every;
    if (!replay->stops || !within || within % replay->spacing)
        return NULL;
    *index = within / replay->spacing - 1;
    return replay->stop_numbers + *index * (replay->run->parameters + replay->trainer.state_numbers);
}

/* Goes to the latest step up to `step` whose weights and state are at hand. */
static pk_status pk__replay_start(pk_context *context, pk_replay *replay, size_t step)
{
    const size_t P = replay->run->parameters, state = replay->trainer.state_numbers;
    size_t kept = step - step % replay->run->keep_every, best = kept, index = 0, found = 0;
    for (size_t i = 0; i < replay->stops; i++)
        if (replay->stop[i] != SIZE_MAX && replay->stop[i] <= step && replay->stop[i] > best)
            best = replay->stop[i], found = i + 1;
    /* Also from just before: it proves the step into a kept one. */
    if (replay->step != SIZE_MAX && replay->step <= step && replay->step + 1 >= best)
        return PK_OK;
    replay->step = SIZE_MAX; /* until it is there */
    if (found) {
        const pk_real *stop = pk__replay_stop(replay, best, &index);
        memcpy(replay->weights, stop, P * sizeof *stop);
        if (state)
            memcpy(replay->trainer.state, stop + P, state * sizeof *stop);
    } else {
        pk_status status =
            pk__replay_load(context, replay->run, kept, replay->weights, replay->trainer.state, state);
        if (status != PK_OK)
            return status;
    }
    replay->step = best;
    return PK_OK;
}

/* One step on. */
static pk_status pk__replay_advance(pk_context *context, pk_replay *replay)
{
    const pk_run *run = replay->run;
    const size_t P = run->parameters, state = replay->trainer.state_numbers, step = replay->step;
    double scale = pk_run_gradient_scale(run, step);
    pk_batch batch;
    pk_run_batch(run, step, &batch);
    replay->step = SIZE_MAX; /* after an error, the state belongs to no step */
    pk_status status = pk__make_step(context, &replay->trainer, step, run->learning_rates[step], 0, &batch,
                                     replay->weights, replay->next, &scale, NULL);
    if (status != PK_OK)
        return pk__prefix(context, PK_NOT_REPRODUCED, "replay: ");
    if (!pk__same_step(run, step + 1, replay->next, replay->trainer.state, state))
        return pk__fail(
            context, PK_NOT_REPRODUCED,
            "replaying step %zu gives other bits than were recorded at step %zu: another build, BLIS "
            "or processor than that of the training, or damaged files",
            step, step + 1);
    pk_real *weights = replay->next;
    replay->next = replay->weights;
    replay->weights = weights;
    replay->step = step + 1;
    replay->repeated++;
    size_t index = 0;
    pk_real *stop = pk__replay_stop(replay, step + 1, &index);
    if (stop) {
        memcpy(stop, weights, P * sizeof *stop);
        if (state)
            memcpy(stop + P, replay->trainer.state, state * sizeof *stop);
        replay->stop[index] = step + 1;
    }
    return PK_OK;
}

PK_API pk_status pk_replay_weights(pk_context *context, pk_replay *replay, size_t step, pk_real *weights)
{
    if (!replay || !replay->run || !weights)
        return pk__fail(context, PK_ARGUMENT, "pk_replay_weights: no replay or no weights");
    const pk_run *run = replay->run;
    if (run->keep_every == 1 || step > run->steps)
        return pk_run_weights(context, run, step, weights);
    pk_status status = pk__replay_start(context, replay, step);
    while (status == PK_OK && replay->step < step)
        status = pk__replay_advance(context, replay);
    if (status == PK_OK)
        memcpy(weights, replay->weights, run->parameters * sizeof *weights);
    return status;
}

PK__END_COLD_CODE

/* pathkernel/run/train.h: implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* What a training run holds between steps. */
typedef struct pk__training {
    const pk_graph *graph;
    const pk_dataset *train;
    const pk_train_options *options;
    size_t examples, batch_size, per_epoch; /* batches an epoch */
    size_t epoch;                           /* whose permutation order holds */
    int64_t *order;                         /* examples */
    pk_real *next;                          /* P: w_{s+1} */
    pk_trainer trainer;
    pk_recorder recorder;
} pk__training;

/* One step as it was made. */
typedef struct pk__step {
    pk_batch batch;
    double rate, scale, objective;
} pk__step;

/* The batch of any step, without the steps before it. */
static void pk__training_batch(pk__training *t, size_t step, pk_batch *batch)
{
    size_t epoch = step / t->per_epoch, first = step % t->per_epoch * t->batch_size;
    if (epoch != t->epoch) {
        for (size_t i = 0; i < t->examples; i++)
            t->order[i] = (int64_t)i;
        if (t->batch_size < t->examples && !t->options->shuffle_off) {
            pk_random random;
            random.seed = t->options->seed;
            random.stream = epoch;
            random.counter = 0;
            pk_random_shuffle(&random, t->examples, t->order);
        }
        t->epoch = epoch;
    }
    batch->count = t->examples - first < t->batch_size ? t->examples - first : t->batch_size;
    batch->items = t->order + first;
    batch->weights = NULL;
}

/* t->next = w_{step+1} from weights = w_step; the optimiser's state moves on. */
static pk_status pk__training_next(pk_context *context, pk__training *t, size_t step, const pk_real *weights,
                                   pk__step *made)
{
    const pk_train_options *options = t->options;
    pk__training_batch(t, step, &made->batch);
    made->rate = pk_schedule_rate(&options->schedule, step);
    return pk_training_step(context, &t->trainer, step, made->rate, options->clip_norm, &made->batch, weights,
                            t->next, &made->scale, &made->objective);
}

/* Whether t->next and the state are those of a recorded step, bit for bit. */
static pk_status pk__training_compare(pk_context *context, pk__training *t, const pk_run *run, size_t step,
                                      int *same)
{
    if (run->keep_every > 1) {
        *same = pk__same_step(run, step, t->next, t->trainer.state, t->trainer.state_numbers);
        return PK_OK;
    }
    pk_real *there = t->trainer.gradient; /* free between steps */
    pk_status status = pk_run_weights(context, run, step, there);
    *same = status == PK_OK && memcmp(there, t->next, run->parameters * sizeof *there) == 0;
    return status;
}

/* Rebuilds the state after the recorded steps and proves that these options made them. t->next holds the
 * weights to go on from when it is done. */
static pk_status pk__training_replay(pk_context *context, pk__training *t, const pk_run *run, pk_real *weights)
{
    const char *folder = t->options->record;
    if (run->weights.type == PK_FLOAT32 && sizeof(pk_real) > sizeof(float))
        return pk__fail(context, PK_UNSUPPORTED,
                        "%s was recorded as float32: training cannot go on to the same bits", folder);
    /* A rule without state needs no gradient of the past, nor does one whose state was kept; at least one step is
     * checked all the same. */
    size_t last = run->steps - 1, from = pk_optimizer_stateless(&t->options->optimizer) ? last : 0;
    if (run->keep_every > 1)
        from = last - last % run->keep_every;
    if (run->keep_every == 1 && t->trainer.state_numbers) {
        size_t kept = SIZE_MAX;
        pk_status status =
            pk__recorder_find_state(context, folder, run, &t->recorder, weights, t->trainer.state, &kept);
        if (status != PK_OK)
            return status;
        if (kept != SIZE_MAX)
            from = kept;
        else
            memset(t->trainer.state, 0, t->trainer.state_numbers * sizeof *t->trainer.state);
    }
    for (size_t s = 0; s < run->steps; s++) {
        pk__step made;
        pk_batch there;
        pk_run_batch(run, s, &there);
        pk__training_batch(t, s, &made.batch);
        made.rate = pk_schedule_rate(&t->options->schedule, s);
        if (there.count != made.batch.count || there.weights ||
            memcmp(there.items, made.batch.items, there.count * sizeof *there.items) != 0)
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its step %zu used another batch",
                            folder, s);
        if (run->learning_rates[s] != made.rate)
            return pk__fail(context, PK_ARGUMENT,
                            "%s cannot be resumed: the rate of its step %zu is %.17g, not %.17g", folder, s,
                            run->learning_rates[s], made.rate);
        if (s < from)
            continue;
        int same = 0;
        pk_status status = PK_OK;
        if (s == from && run->keep_every > 1)
            status = pk__replay_load(context, run, s, weights, t->trainer.state, t->trainer.state_numbers);
        else if (s == from)
            status = pk_run_weights(context, run, s, weights);
        if (status == PK_OK)
            status = pk__training_next(context, t, s, weights, &made);
        if (status == PK_OK)
            status = pk__training_compare(context, t, run, s + 1, &same);
        if (status != PK_OK)
            return status;
        if (!same)
            return pk__fail(
                context, PK_ARGUMENT,
                "%s cannot be resumed: its step %zu was made by other options, or by another build or "
                "processor whose sums round otherwise",
                folder, s);
        if (pk_run_gradient_scale(run, s) != made.scale)
            return pk__fail(context, PK_ARGUMENT, "%s cannot be resumed: its step %zu was clipped otherwise",
                            folder, s);
        memcpy(weights, t->next, run->parameters * sizeof *weights);
        const size_t every = run->steps - s > 2 * (size_t)PK__RESUME_EVERY ? PK__RESUME_EVERY : 1;
        pk__recorder_keep_state(&t->recorder, s + 1, every, t->trainer.state, t->next);
        status = pk__progress(context, "replaying the recorded steps", (double)(s + 1) / (double)run->steps);
        if (status != PK_OK)
            return status;
    }
    return PK_OK;
}

/* Opens the recording; with resume, moves on to where it ends. */
static pk_status pk__training_record(pk_context *context, pk__training *t, pk_real *weights, size_t *done)
{
    const pk_train_options *options = t->options;
    size_t parameters = t->graph->parameters;
    char optimizer[256];
    if (!t->graph->text)
        return pk__fail(context, PK_UNSUPPORTED, "%s: a graph without a network line cannot be recorded",
                        options->record);
    pk_status status = pk_optimizer_format(&options->optimizer, optimizer, sizeof optimizer);
    if (status != PK_OK)
        return pk__fail(context, status, "%s: the optimizer cannot be written down", options->record);
    pk_recorder_options recording;
    memset(&recording, 0, sizeof recording);
    const pk_constants constants = pk_graph_constants(t->graph);
    recording.network = t->graph->text;
    recording.constants = &constants;
    recording.loss = pk_loss_name(options->loss);
    recording.optimizer = optimizer;
    recording.float32 = options->record_float32;
    recording.gradient_scales = options->clip_norm > 0;
    recording.second_moments = options->record_second_moments;
    recording.resume = options->resume;
    recording.replace = options->replace;
    recording.keep_every = options->keep_every;
    status = pk_recorder_open(context, options->record, &recording, t->train, weights, &t->recorder);
    if (status != PK_OK || t->recorder.steps == 0)
        return status;
    if (t->recorder.steps > options->steps)
        return pk__fail(context, PK_ARGUMENT, "%s holds %zu steps already, more than the %zu asked for",
                        options->record, t->recorder.steps, options->steps);
    pk_run run;
    status = pk_run_open(context, options->record, &run);
    if (status != PK_OK)
        return status;
    pk_real *replayed = NULL; /* weights stay w_0 until the replay has succeeded */
    status = pk_allocate(context, parameters, sizeof *replayed, "the weights of a replay", &replayed);
    if (status == PK_OK)
        status = pk__training_replay(context, t, &run, replayed);
    if (status == PK_OK) {
        memcpy(weights, t->next, parameters * sizeof *weights);
        *done = run.steps;
    }
    pk_release(context, replayed);
    pk_run_release(context, &run);
    return status;
}

static pk_status pk__training_loop(pk_context *context, pk__training *t, pk_real *weights,
                                   pk_train_result *result)
{
    const pk_train_options *options = t->options;
    size_t parameters = t->graph->parameters;
    pk_status status = PK_OK;
    if (options->record) {
        status = pk__training_record(context, t, weights, &result->steps);
        result->resumed = result->steps;
    }
    pk_real *now = weights; /* takes turns with t->next */
    while (status == PK_OK && result->steps < options->steps) {
        size_t step = result->steps;
        pk__step made;
        status = pk__training_next(context, t, step, now, &made);
        if (status == PK_OK && options->record)
            status = pk_recorder_training_step(context, &t->recorder, made.rate, &made.batch, made.scale,
                                               t->trainer.state, t->next);
        if (status != PK_OK)
            break;
        pk_real *before = now;
        now = t->next;
        t->next = before;
        result->steps++;
        result->objective = made.objective;
        if (options->on_step && options->on_step(options->user, step, made.objective, now) != 0)
            status = pk__fail(context, PK_CANCELLED, "cancelled by the caller after step %zu", step);
        else
            status = pk__progress(context, "training", (double)result->steps / (double)options->steps);
    }
    if (now != weights) {
        memcpy(weights, now, parameters * sizeof *weights);
        t->next = now;
    }
    return status;
}

static pk_status pk__training_check(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                                    const pk_train_options *options, const pk_real *weights)
{
    if (!graph || !graph->nodes || !train || !train->inputs.data || !train->targets.data || !options ||
        !weights)
        return pk__fail(context, PK_ARGUMENT, "pk_train: graph, training data, options or weights are missing");
    if (graph->parameters == 0)
        return pk__fail(context, PK_SHAPE, "pk_train: the network has no parameters");
    if (!graph->nodes[graph->node_count - 1].varies)
        return pk__fail(context, PK_SHAPE, "pk_train: the network's outputs do not depend on its parameters");
    if (!(options->clip_norm >= 0) || isinf(options->clip_norm))
        return pk__fail(context, PK_ARGUMENT, "pk_train: clip_norm is %g", options->clip_norm);
    if (!options->record && (options->resume || options->replace || options->record_float32 ||
                             options->record_second_moments || options->keep_every > 1))
        return pk__fail(context, PK_ARGUMENT, "pk_train: recording options without a directory to record to");
    if (options->record_second_moments && pk_optimizer_state_vectors(&options->optimizer) < 2)
        return pk__fail(context, PK_ARGUMENT, "pk_train: the optimizer has no second moments to record");
    for (size_t p = 0; p < graph->parameters; p++)
        if (!isfinite(weights[p]))
            return pk__fail(context, PK_NOT_FINITE, "pk_train: initial weight %zu is %g", p,
                            (double)weights[p]);
    pk_status status = pk_optimizer_check(context, &options->optimizer);
    if (status == PK_OK)
        status = pk_schedule_check(context, &options->schedule, options->steps);
    if (status == PK_OK)
        status = pk__run_check_data(context, train, graph, options->loss);
    return status;
}

PK_API pk_status pk_train(pk_context *context, const pk_graph *graph, const pk_dataset *train,
                          const pk_train_options *options, pk_real *weights, pk_train_result *result)
{
    pk_status status = pk__training_check(context, graph, train, options, weights);
    if (status != PK_OK)
        return status;
    pk_train_result reached;
    memset(&reached, 0, sizeof reached);
    reached.objective = (double)NAN;
    pk__training t;
    memset(&t, 0, sizeof t);
    t.graph = graph;
    t.train = train;
    t.options = options;
    t.examples = pk_dataset_examples(train);
    t.batch_size = options->batch_size && options->batch_size < t.examples ? options->batch_size : t.examples;
    t.per_epoch = (t.examples - 1) / t.batch_size + 1;
    t.epoch = SIZE_MAX;
    status = pk_allocate(context, t.examples, sizeof *t.order, "the order of the examples", &t.order);
    if (status == PK_OK)
        status = pk_allocate(context, graph->parameters, sizeof *t.next, "the next weights", &t.next);
    if (status == PK_OK)
        status = pk_trainer_prepare(context, graph, train, options->loss, &options->optimizer, t.batch_size,
                                    &t.trainer);
    if (status == PK_OK)
        status = pk__training_loop(context, &t, weights, &reached);
    pk_status closed = pk__recorder_end(context, status == PK_OK ? context : NULL, &t.recorder);
    if (status == PK_OK)
        status = closed;
    pk_trainer_release(context, &t.trainer);
    pk_release(context, t.next);
    pk_release(context, t.order);
    if (result)
        *result = reached;
    return status;
}

PK__END_COLD_CODE

/* pathkernel/path/path.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

PK__INTERNAL void pk__pieces_take(pk__arena *arena, size_t capacity, pk__pieces *pieces)
{
    pieces->count = 0;
    pieces->capacity = capacity;
    pieces->piece = pk__arena_take(arena, capacity, sizeof *pieces->piece);
}

PK__INTERNAL pk__piece *pk__pieces_push(pk__pieces *pieces, size_t row, double a, double b)
{
    pk__piece *piece = &pieces->piece[pieces->count++];
    memset(piece, 0, sizeof *piece);
    piece->row = row;
    piece->a = a;
    piece->b = b;
    return piece;
}

/* Affine in t for each row: no product per point is needed. */
static int pk__is_affine(const pk_node *node)
{
    return node->weight_count && node->input_constant && node->operation->linear_in_weights;
}

static int pk__is_switch(const pk_node *node)
{
    return node->operation && node->operation->switch_count && !node->input_constant;
}

/* Its switch functions are polynomials in t that the samples determine. */
static int pk__is_polynomial(const pk_node *node)
{
    return node->degree >= 0 && node->degree <= PK__PATH_DEGREE;
}

static int pk__sample_degree(const pk_node *node)
{
    return pk__is_polynomial(node) ? node->degree : (int)PK__PATH_DEGREE;
}

/* The sampling nodes: Chebyshev-Lobatto on [0, 1]. */
static double pk__sample_node(int degree, int k)
{
    double s = sin(1.57079632679489661923 * k / degree);
    return s * s;
}

/* conversion (degree + 1 squared): Bernstein coefficients = conversion * values at the sampling nodes; the
 * inverse of B[k][i] = binomial(degree, i) x_k^i (1 - x_k)^(degree - i), by Gauss-Jordan with pivoting. */
static void pk__bernstein_conversion(int degree, pk_real *conversion)
{
    enum { N = PK__PATH_DEGREE + 1 };
    long double m[N][2 * N];
    int n = degree + 1;
    for (int k = 0; k < n; k++) {
        long double x = pk__sample_node(degree, k), binomial = 1;
        for (int i = 0; i < n; i++) {
            m[k][i] = binomial * powl(x, i) * powl(1 - x, degree - i);
            binomial = binomial * (degree - i) / (i + 1);
            m[k][n + i] = i == k;
        }
    }
    for (int column = 0; column < n; column++) {
        int pivot = column;
        for (int k = column + 1; k < n; k++)
            if (fabsl(m[k][column]) > fabsl(m[pivot][column]))
                pivot = k;
        for (int i = 0; i < 2 * n; i++) {
            long double swap = m[column][i];
            m[column][i] = m[pivot][i];
            m[pivot][i] = swap;
        }
        long double scale = 1 / m[column][column];
        for (int i = 0; i < 2 * n; i++)
            m[column][i] *= scale;
        for (int k = 0; k < n; k++) {
            long double factor = m[k][column];
            if (k != column && factor != 0)
                for (int i = 0; i < 2 * n; i++)
                    m[k][i] -= factor * m[column][i];
        }
    }
    for (int k = 0; k < n; k++)
        for (int i = 0; i < n; i++)
            conversion[k * n + i] = (pk_real)m[k][n + i];
}

/* The Chebyshev coefficients number PK__PATH_DEGREE - 2 and up of the interpolant, from its values at the sampling nodes. */
static void pk__chebyshev_tail(double tail[3][PK__PATH_DEGREE + 1])
{
    const int degree = PK__PATH_DEGREE;
    for (int i = 0; i < 3; i++)
        for (int k = 0; k <= degree; k++) {
            const int m = degree - 2 + i, end = k == 0 || k == degree;
            tail[i][k] = (m == degree ? 1.0 : 2.0) / degree * (end ? 0.5 : 1.0) *
                         cos(3.14159265358979323846 * m * k / degree);
        }
}

PK__INTERNAL void pk__path_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                size_t reverse_points, size_t copies, size_t pieces, int gather,
                                pk__path *segment)
{
    size_t count = graph->node_count, switches = 0;
    memset(segment, 0, sizeof *segment);
    points = pk__max(points, PK__PATH_DEGREE + 1); /* the samples of one piece */
    segment->graph = graph;
    segment->row_capacity = rows;
    segment->point_capacity = points;
    segment->base = pk__arena_take(arena, count, sizeof *segment->base);
    segment->slope = pk__arena_take(arena, count, sizeof *segment->slope);
    segment->gathered = pk__arena_take(arena, count, sizeof *segment->gathered);
    segment->last_read = pk__arena_take(arena, count, sizeof *segment->last_read);
    for (size_t n = 0; n < count && segment->gathered; n++)
        segment->gathered[n] = 0;
    for (size_t n = 0; n < count; n++) {
        const pk_node *node = &graph->nodes[n];
        int affine = n && pk__is_affine(node), constant = n && !node->varies;
        pk_real *base = affine || constant ? pk__arena_take(arena, rows, node->width * sizeof *base) : NULL;
        pk_real *slope = affine ? pk__arena_take(arena, rows, node->width * sizeof *slope) : NULL;
        if (segment->base) {
            segment->base[n] = base;
            segment->slope[n] = slope;
        }
        if (n && node->varies && (gather || !affine || !pk__is_outer(node)) && segment->gathered)
            for (int j = 0; j < node->input_count; j++)
                segment->gathered[node->inputs[j]] |= !graph->nodes[node->inputs[j]].varies;
        for (int j = 0; j < node->input_count && segment->last_read; j++)
            segment->last_read[node->inputs[j]] = n;
        if (n && pk__is_switch(node)) {
            switches = pk__max(switches, node->operation->switch_count(node));
            if (segment->last_switch && segment->degree < 2)
                segment->degree = 2; /* see pk__is_dead */
            segment->last_switch = n;
            if (pk__sample_degree(node) > segment->degree)
                segment->degree = pk__sample_degree(node);
            segment->interpolates |= !pk__is_polynomial(node);
        }
    }
    const size_t samples = (size_t)segment->degree + 1;
    segment->conversion = pk__arena_take(arena, segment->last_switch ? samples * samples : 0, sizeof(pk_real));
    if (segment->conversion && segment->last_switch)
        pk__bernstein_conversion(segment->degree, segment->conversion);
    pk__chebyshev_tail(segment->tail);
    pk__pass_take_parts(arena, graph, points, reverse_points, copies, 1, &segment->tape);
    segment->input_points = pk__arena_take(arena, points, graph->input_width * sizeof(pk_real));
    segment->switch_values = pk__arena_take(arena, points, switches * sizeof(pk_real));
    segment->coefficients = pk__arena_take(arena, PK__PATH_DEGREE + 1, switches * sizeof(pk_real));
    segment->point_row = pk__arena_take(arena, points, sizeof *segment->point_row);
    segment->point_t = pk__arena_take(arena, points, sizeof *segment->point_t);
    segment->held_row = pk__arena_take(arena, points, sizeof *segment->held_row);
    segment->held_t = pk__arena_take(arena, points, sizeof *segment->held_t);
    pk__pieces_take(arena, pieces, &segment->pending);
    segment->pending_start = pk__arena_take(arena, pieces, sizeof *segment->pending_start);
    pk__pieces_take(arena, points, &segment->batch);
    segment->batch_start = pk__arena_take(arena, points, sizeof *segment->batch_start);
    segment->root_capacity = pieces;
    segment->roots = pk__arena_take(arena, pieces, sizeof *segment->roots);
}

/* out = an affine node of the segment's rows with these weights (transposed: NULL where they are not there). */
static void pk__path_affine(pk__path *segment, const pk_node *node, const pk_real *weights,
                            const pk_real *transposed, pk_real *out)
{
    pk_call call;
    pk__pass_call(&segment->tape, node, segment->rows, 1, &call);
    for (int j = 0; j < node->input_count; j++)
        call.in[j] = segment->base[node->inputs[j]];
    call.weights = weights + node->weight_offset;
    call.out = out;
    if (transposed && pk__is_plain_layer(node)) {
        const size_t places = call.rows * node->positions;
        if (pk__has_bias(node))
            for (size_t i = 0; i < places; i++)
                memcpy(out + i * node->fan_out, call.weights + node->fan_out * node->fan_in,
                       node->fan_out * sizeof *out);
        pk__layer_product(node, places, call.in[0], weights, transposed, (pk_real)pk__has_bias(node), out);
    } else {
        node->operation->forward(&call);
    }
}

PK__INTERNAL void pk__path_begin(pk__path *segment, const pk_real *weights, const pk_real *direction,
                                 const pk_real *transposed, size_t rows, const pk_real *inputs)
{
    const pk_graph *graph = segment->graph;
    segment->weights = weights;
    segment->direction = direction;
    segment->tape.transposed = transposed;
    segment->rows = rows;
    segment->held = 0;
    segment->inputs = inputs;
    segment->base[0] = (pk_real *)inputs; /* only read */
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (segment->base[n])
            pk__path_affine(segment, node, weights, transposed, segment->base[n]);
        if (segment->slope[n])
            pk__path_affine(segment, node, direction, transposed ? transposed + graph->parameters : NULL,
                            segment->slope[n]);
    }
}

/* The value of node n at points whose earlier nodes are there. */
static void pk__path_node(pk__path *segment, size_t n, size_t count, const size_t *row, const pk_real *t)
{
    const pk__line line = {segment->weights, segment->direction, t};
    const pk_node *node = &segment->graph->nodes[n];
    const size_t width = node->width;
    pk_real *value = segment->tape.value[n];
    const pk_real *base = segment->base[n], *slope = segment->slope[n];
    if (!node->varies) {
        if (segment->gathered[n])
            for (size_t p = 0; p < count; p++)
                memcpy(value + p * width, base + row[p] * width, width * sizeof *value);
    } else if (slope) {
        for (size_t p = 0; p < count; p++)
            for (size_t j = 0; j < width; j++)
                value[p * width + j] = base[row[p] * width + j] + t[p] * slope[row[p] * width + j];
    } else {
        pk__node_forward(&segment->tape, &line, node, count);
    }
}

/* Makes point number first of the tape, or again that in front of it, its first one. */
static void pk__shift_tape(pk__path *segment, size_t first, int again)
{
    for (size_t n = 0; n < segment->graph->node_count; n++) {
        const size_t numbers = first * segment->graph->nodes[n].width;
        pk_real **value = &segment->tape.value[n], **tangent = &segment->tape.tangent[n];
        *value = again ? *value - numbers : *value + numbers;
        if (*tangent)
            *tangent = again ? *tangent - numbers : *tangent + numbers;
    }
}

PK__INTERNAL size_t pk__path_append(pk__path *segment, size_t count, const size_t *row, const pk_real *t)
{
    const size_t first = count <= segment->point_capacity - segment->held ? segment->held : 0;
    segment->tape.value[0] = segment->input_points;
    pk__shift_tape(segment, first, 0);
    for (size_t n = 0; n < segment->graph->node_count; n++)
        pk__path_node(segment, n, count, row, t);
    pk__shift_tape(segment, first, 1);
    if (count)
        memcpy(segment->held_row + first, row, count * sizeof *row);
    if (count)
        memcpy(segment->held_t + first, t, count * sizeof *t);
    segment->held = first + count;
    return first;
}

/* Whether the tape holds the points in this order; with move, they go to its front. */
static int pk__find_points(pk__path *segment, size_t count, const size_t *row, const pk_real *t, int move)
{
    for (size_t p = 0, at = 0, run; p < count; p += run, at += run) {
        while (at < segment->held && !(segment->held_row[at] == row[p] && segment->held_t[at] == t[p]))
            at++;
        for (run = 0; p + run < count && at + run < segment->held; run++)
            if (segment->held_row[at + run] != row[p + run] || segment->held_t[at + run] != t[p + run])
                break;
        if (!run)
            return 0;
        for (size_t n = 0; move && p < at && n < segment->graph->node_count; n++) {
            const size_t width = segment->graph->nodes[n].width;
            pk_real *value = segment->tape.value[n];
            memmove(value + p * width, value + at * width, run * width * sizeof *value);
        }
    }
    return 1;
}

PK__INTERNAL void pk__path_forward(pk__path *segment, size_t count, const size_t *row, const pk_real *t)
{
    if (!pk__find_points(segment, count, row, t, 0)) {
        segment->held = 0;
        pk__path_append(segment, count, row, t);
        return;
    }
    (void)pk__find_points(segment, count, row, t, 1);
    if (count)
        memcpy(segment->held_row, row, count * sizeof *row);
    if (count)
        memcpy(segment->held_t, t, count * sizeof *t);
    segment->held = count;
}

PK__INTERNAL void pk__path_tangent(pk__path *segment, size_t first, size_t count, const size_t *row,
                                   const pk_real *t)
{
    const pk_graph *graph = segment->graph;
    const pk__line line = {segment->weights, segment->direction, t};
    pk__shift_tape(segment, first, 0);
    for (size_t n = 1; n < graph->node_count; n++) {
        const pk_node *node = &graph->nodes[n];
        if (segment->slope[n])
            for (size_t p = 0; p < count; p++)
                memcpy(segment->tape.tangent[n] + p * node->width, segment->slope[n] + row[p] * node->width,
                       node->width * sizeof(pk_real));
        else
            pk__node_tangent(&segment->tape, &line, node, count);
    }
    pk__shift_tape(segment, first, 1);
}

PK__INTERNAL void pk__path_reverse(pk__path *segment, size_t count, const pk_real *t, size_t copies)
{
    const pk__line line = {segment->weights, segment->direction, t};
    pk__pass_reverse(&segment->tape, &line, count, copies);
}

PK__END_CODE

/* pathkernel/path/kinks.h: implementation */
#include <float.h>
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* c (degree + 1) at x by de Casteljau; left and right (may be NULL) are the halves, *slope the derivative. */
static double pk__casteljau(int degree, const double *c, double x, double *left, double *right, double *slope)
{
    double work[PK__PATH_DEGREE + 1];
    memcpy(work, c, (size_t)(degree + 1) * sizeof *work);
    if (slope)
        *slope = degree == 1 ? c[1] - c[0] : 0;
    for (int k = 0; k <= degree; k++) {
        if (left)
            left[k] = work[0];
        if (right)
            right[degree - k] = work[degree - k];
        if (slope && degree - k == 1)
            *slope = degree * (work[1] - work[0]);
        for (int i = 0; i < degree - k; i++)
            work[i] = (1 - x) * work[i] + x * work[i + 1];
    }
    return work[0];
}

/* The one root of c, of which the ends have opposite signs: false position (Illinois) with bisection. */
static double pk__bracketed_root(int degree, const double *c)
{
    double lo = 0, hi = 1, at_lo = c[0], at_hi = c[degree];
    if (degree == 1)
        return at_lo / (at_lo - at_hi);
    for (int i = 0, side = 0; i < 200 && hi - lo > DBL_EPSILON * hi; i++) {
        double x = i % 4 == 3 ? 0.5 * (lo + hi) : lo + (hi - lo) * (at_lo / (at_lo - at_hi));
        if (!(x > lo && x < hi))
            x = 0.5 * (lo + hi);
        if (!(x > lo && x < hi))
            break;
        double value = pk__casteljau(degree, c, x, NULL, NULL, NULL);
        if (value == 0)
            return x;
        if ((value > 0) == (at_hi > 0)) {
            hi = x;
            at_hi = value;
            if (side == 1)
                at_lo *= 0.5;
            side = 1;
        } else {
            lo = x;
            at_lo = value;
            if (side == -1)
                at_hi *= 0.5;
            side = -1;
        }
    }
    return 0.5 * (lo + hi);
}

/* Where the roots of a piece go: t = a + (b - a) x for x in the local [0, 1]. The polynomial stands for switch function
 * number `at`, but for its rounding and the error of an interpolant. */
typedef struct pk__root_sink {
    double a, b, rounding, error;
    size_t at;
    pk__root *roots;
    size_t count, capacity;
} pk__root_sink;

/* How far around x the polynomial c stays within `uncertain` of zero, about: of the k-th derivatives the one that leaves
 * first. At a double zero that is a square root, no division by a slope of zero. */
static double pk__root_slack(int degree, const double *c, double x, double uncertain)
{
    double work[PK__PATH_DEGREE + 1], least = 1, factor = 1;
    memcpy(work, c, (size_t)(degree + 1) * sizeof *work);
    for (int k = 1; k <= degree; k++) {
        factor *= (double)(degree - k + 1) / k;
        for (int i = 0; i <= degree - k; i++)
            work[i] = work[i + 1] - work[i];
        const double size = factor * fabs(pk__casteljau(degree - k, work, x, NULL, NULL, NULL));
        if (uncertain < size) {
            const double width = k == 1 ? uncertain / size : pow(uncertain / size, 1.0 / k);
            least = width < least ? width : least;
        }
    }
    return 2 * least < 1 ? 2 * least : 1;
}

/* x: of the polynomial c on the local [lo, hi]. */
static void pk__push_root(pk__root_sink *sink, int degree, const double *c, double x, double lo, double hi)
{
    if (sink->count < sink->capacity) {
        const double length = (sink->b - sink->a) * (hi - lo);
        pk__root *root = &sink->roots[sink->count];
        double slope = 0;
        pk__casteljau(degree, c, x, NULL, NULL, &slope);
        root->t = sink->a + (sink->b - sink->a) * (lo + (hi - lo) * x);
        root->slack = length * pk__root_slack(degree, c, x, sink->rounding + sink->error);
        root->slope = slope / length;
        root->rounding = sink->rounding;
        root->at = sink->at;
    }
    sink->count++; /* beyond the capacity: the caller sees it */
}

/* How often the numbers change their sign; those of at most `drop` have none. */
static int pk__sign_changes(int degree, const double *c, double drop)
{
    int changes = 0;
    double last = 0;
    for (int i = 0; i <= degree; i++)
        if (fabs(c[i]) > drop) {
            changes += last != 0 && (c[i] > 0) != (last > 0);
            last = c[i];
        }
    return changes;
}

/* Pushes the sign changes inside (lo, hi) of the polynomial with Bernstein coefficients c on [lo, hi]. */
static void pk__isolate(int degree, const double *c, double lo, double hi, pk__root_sink *sink)
{
    const int changes = pk__sign_changes(degree, c, 0);
    if (changes == 0 || sink->count > sink->capacity)
        return;
    if (changes == 1 && c[0] != 0 && c[degree] != 0) {
        pk__push_root(sink, degree, c, pk__bracketed_root(degree, c), lo, hi);
        return;
    }
    double middle = 0.5 * (lo + hi), left[PK__PATH_DEGREE + 1], right[PK__PATH_DEGREE + 1];
    if (hi - lo < 4 * DBL_EPSILON) {
        /* A cluster that touches zero: one split serves them all. */
        pk__push_root(sink, degree, c, 0.5, lo, hi);
        return;
    }
    if (pk__casteljau(degree, c, 0.5, left, right, NULL) == 0)
        pk__push_root(sink, degree, right, 0, middle, hi);
    pk__isolate(degree, left, lo, middle, sink);
    pk__isolate(degree, right, middle, hi, sink);
}

/* A difference of units that are off inside the piece, such as two rectified ones in one pool: exactly zero there, and
 * rounding at the ends, where their own kinks are. To split it would only make short pieces. */
static int pk__is_dead(const pk__path *segment, size_t switches, size_t j, const pk_real *values)
{
    double largest = 0;
    for (int k = 1; k < segment->degree; k++)
        if (values[(size_t)k * switches + j] != 0)
            return 0;
    if (segment->degree < 2)
        return 0;
    for (size_t i = 0; i < switches; i++)
        largest = fabs(values[i]) > largest ? fabs(values[i]) : largest;
    return fabs(values[j]) <= 64 * PK__EPSILON * largest &&
           fabs(values[(size_t)segment->degree * switches + j]) <= 64 * PK__EPSILON * largest;
}

enum {
    PK__SWITCH_ROUNDINGS = 16, /* of the largest number of a layer: what rounding leaves of a switch function */
    PK__NEWTON_STEPS = 4,
    PK__NEWTON_POINTS = 8 /* room for them behind the samples */
};
/* Pieces are halved down to this length in order to see the zeros of a switch function apart. */
#define PK__SHORTEST_SEARCH 1e-6

/* The error of the interpolant of switch function j: its Chebyshev coefficients fall about geometrically. */
static double pk__interpolation_error(const pk__path *segment, size_t switches, size_t j, const pk_real *values)
{
    double largest = 0;
    for (int i = 0; i < 3; i++) {
        double sum = 0;
        for (int k = 0; k <= PK__PATH_DEGREE; k++)
            sum += segment->tail[i][k] * values[(size_t)k * switches + j];
        largest = fabs(sum) > largest ? fabs(sum) : largest;
    }
    return 4 * largest;
}

/* The largest of the coefficients of a layer's switch functions. */
static double pk__largest_coefficient(const pk_real *coefficients, size_t count)
{
    double largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = fabs((double)coefficients[i]) > largest ? fabs((double)coefficients[i]) : largest;
    return largest;
}

/* The sign changes of one piece's switch functions, whose samples stand in switch_values at point first: polynomials of
 * degree 1 (samples 0 and the last suffice), at most of the samples' degree, or interpolated (exact == 0). Unless the
 * piece is the shortest: 1 where the interpolant's error leaves open how many there are. */
static int pk__piece_roots(pk__path *segment, int linear, int exact, int shortest, size_t switches,
                           size_t first, pk__root_sink *sink)
{
    const int degree = linear ? 1 : segment->degree;
    const pk_real *values = segment->switch_values + first * switches;
    pk_real *coefficients = segment->coefficients;
    double largest = -1;
    for (int k = 0; k <= degree; k++) {
        pk_real *to = coefficients + (size_t)k * switches;
        if (k == 0 || k == degree) { /* end coefficients are end values, exactly */
            memcpy(to, values + (size_t)(k ? segment->degree : 0) * switches, switches * sizeof *to);
            continue;
        }
        memset(to, 0, switches * sizeof *to);
        for (int i = 0; i <= degree; i++) {
            const pk_real *from = values + (size_t)i * switches;
            const pk_real factor = segment->conversion[k * (degree + 1) + i];
            for (size_t j = 0; j < switches; j++)
                to[j] += factor * from[j];
        }
    }
    for (size_t j = 0; j < switches; j++) {
        double c[PK__PATH_DEGREE + 1], low = coefficients[j], high = low, error = 0;
        for (int k = 0; k <= degree; k++) {
            c[k] = coefficients[(size_t)k * switches + j];
            low = c[k] < low ? c[k] : low;
            high = c[k] > high ? c[k] : high;
        }
        if (!exact && 4 * low < high && low < 4 * high) /* zero is not far away */
            error = pk__interpolation_error(segment, switches, j, values);
        if (!(low < error && high > -error && (low < 0 || high > 0)) ||
            pk__is_dead(segment, switches, j, values))
            continue;
        if (largest < 0)
            largest = pk__largest_coefficient(coefficients, ((size_t)degree + 1) * switches);
        const double rounding = PK__SWITCH_ROUNDINGS * PK__EPSILON * largest;
        if (!shortest && error > 32 * rounding &&
            (pk__sign_changes(degree, c, 0) != 1 || fabs(c[0]) <= error || fabs(c[degree]) <= error))
            return 1;
        /* From a zero at an end, a branch that starts with weights of zero for one, it may leave as t^2: what is between are
         * roundings of the samples. */
        if ((c[0] == 0 || c[degree] == 0) && pk__sign_changes(degree, c, rounding) == 0)
            continue;
        sink->rounding = rounding;
        sink->error = error;
        sink->at = j;
        pk__isolate(degree, c, 0, 1, sink);
    }
    return 0;
}

/* The switch functions of node n at points behind the samples of the batch, which end at point `used`. */
static const pk_real *pk__switches_behind(pk__path *segment, size_t n, size_t used, size_t count)
{
    const pk_node *node = &segment->graph->nodes[n];
    pk_real *out = segment->switch_values + used * node->operation->switch_count(node);
    pk_call call;
    pk__shift_tape(segment, used, 0);
    for (size_t m = 0; m < n; m++)
        pk__path_node(segment, m, count, segment->point_row + used, segment->point_t + used);
    pk__pass_call(&segment->tape, node, count, 1, &call);
    call.out = out;
    node->operation->switches(&call);
    pk__shift_tape(segment, used, 1);
    return out;
}

/* Moves roots of interpolants of a piece of row onto the zeros of the switch functions of node n themselves: Newton steps
 * with the interpolants' slopes, as long as the values fall. */
static void pk__refine_roots(pk__path *segment, size_t n, size_t used, size_t row, double a, double b,
                             size_t count, pk__root *roots)
{
    const pk_node *node = &segment->graph->nodes[n];
    const size_t switches = node->operation->switch_count(node);
    double best_t[PK__NEWTON_POINTS], best[PK__NEWTON_POINTS];
    for (size_t r = 0; r < count; r++) {
        best_t[r] = roots[r].t;
        best[r] = -1;
    }
    for (int step = 0; step < PK__NEWTON_STEPS; step++) {
        int moved = 0;
        for (size_t r = 0; r < count; r++) {
            segment->point_row[used + r] = row;
            segment->point_t[used + r] = (pk_real)roots[r].t;
        }
        const pk_real *z = pk__switches_behind(segment, n, used, count);
        for (size_t r = 0; r < count; r++) {
            const double value = (double)z[r * switches + roots[r].at];
            double t = roots[r].t - value / roots[r].slope;
            if (best[r] >= 0 && !(fabs(value) < best[r]))
                continue;
            best[r] = fabs(value);
            best_t[r] = roots[r].t;
            t = t < a ? a : t > b ? b : t;
            if (!(fabs(t - roots[r].t) > DBL_EPSILON))
                continue;
            roots[r].t = t;
            moved = 1;
        }
        if (!moved)
            break;
    }
    for (size_t r = 0; r < count; r++) {
        const double left = 2 * (best[r] + roots[r].rounding) / fabs(roots[r].slope);
        roots[r].t = best_t[r];
        roots[r].slack = left < roots[r].slack ? left : roots[r].slack;
    }
}

static void pk__sort_roots(size_t count, pk__root *roots)
{
    for (size_t i = 1; i < count; i++) { /* insertion sort: few */
        const pk__root root = roots[i];
        size_t k = i;
        for (; k > 0 && roots[k - 1].t > root.t; k--)
            roots[k] = roots[k - 1];
        roots[k] = root;
    }
}

/* Appends a piece of the batch to pieces, split at the roots. How many parts; 0 where they do not fit. */
static size_t pk__append_split(pk__pieces *pieces, const pk__piece *piece, pk__root_sink *sink)
{
    const size_t before = pieces->count;
    const double least = 4 * PK__EPSILON;
    pk__piece rest = *piece;
    if (sink->count > sink->capacity || pieces->count + sink->count + 1 > pieces->capacity)
        return 0;
    pk__sort_roots(sink->count, sink->roots);
    for (size_t i = 0; i < sink->count; i++) {
        const double t = sink->roots[i].t, slack = sink->roots[i].slack;
        if (t - rest.a <= least) {
            rest.slack_a = slack > rest.slack_a ? slack : rest.slack_a;
            rest.joined = 0;
        } else if (rest.b - t <= least) {
            rest.slack_b = slack > rest.slack_b ? slack : rest.slack_b;
        } else {
            pk__piece part = rest;
            part.b = t;
            part.slack_b = slack;
            pieces->piece[pieces->count++] = part;
            rest.a = t;
            rest.slack_a = slack;
            rest.joined = 0;
        }
    }
    pieces->piece[pieces->count++] = rest;
    return pieces->count - before;
}

/* The next pieces that wait, as many as there are points for, and their samples. */
static void pk__begin_batch(pk__path *segment)
{
    pk__pieces *pending = &segment->pending, *batch = &segment->batch;
    const size_t samples = (size_t)segment->degree + 1;
    const size_t most = (segment->point_capacity - (segment->interpolates ? PK__NEWTON_POINTS : 0)) / samples;
    batch->count = 0;
    while (pending->count && batch->count < most) {
        const size_t top = --pending->count, i = batch->count++;
        const pk__piece *piece = &pending->piece[top];
        segment->batch_start[i] = segment->pending_start[top];
        batch->piece[i] = *piece;
        for (size_t k = 0; k < samples; k++) {
            segment->point_row[i * samples + k] = piece->row;
            segment->point_t[i * samples + k] =
                (pk_real)(piece->a + (piece->b - piece->a) * pk__sample_node(segment->degree, (int)k));
        }
    }
}

/* Moves piece `from` of the batch and all that is known of its samples, as far as nodes from n on need it. */
static void pk__keep_piece(pk__path *segment, size_t n, size_t from, size_t to)
{
    const size_t samples = (size_t)segment->degree + 1;
    pk__pieces *batch = &segment->batch;
    if (from == to)
        return;
    batch->piece[to] = batch->piece[from];
    segment->batch_start[to] = segment->batch_start[from];
    memcpy(segment->point_row + to * samples, segment->point_row + from * samples,
           samples * sizeof *segment->point_row);
    memcpy(segment->point_t + to * samples, segment->point_t + from * samples,
           samples * sizeof *segment->point_t);
    for (size_t m = 0; m < n; m++) {
        const pk_node *node = &segment->graph->nodes[m];
        const size_t count = samples * node->width;
        if (segment->last_read[m] >= n && (node->varies || segment->gathered[m]))
            memcpy(segment->tape.value[m] + to * count, segment->tape.value[m] + from * count,
                   count * sizeof(pk_real));
    }
}

/* Both halves of a piece wait, to be joined again when all is found. 0: no room. */
static int pk__halve_search(pk__path *segment, const pk__piece *piece, size_t n)
{
    pk__pieces *pending = &segment->pending;
    if (pending->count + 2 > pending->capacity)
        return 0;
    for (int half = 0; half < 2; half++) {
        pk__piece part = *piece;
        const double middle = 0.5 * (piece->a + piece->b);
        if (half) {
            part.a = middle;
            part.slack_a = 0;
            part.joined = 1;
        } else {
            part.b = middle;
            part.slack_b = 0;
        }
        segment->pending_start[pending->count] = n;
        pending->piece[pending->count++] = part;
    }
    return 1;
}

/* Looks at the switches of node n: pieces with kinks leave the batch, their parts wait. 0: no room. */
static int pk__split_batch(pk__path *segment, size_t n)
{
    const pk_node *node = &segment->graph->nodes[n];
    const size_t samples = (size_t)segment->degree + 1, switches = node->operation->switch_count(node);
    const size_t used = segment->batch.count * samples;
    const int exact = pk__is_polynomial(node);
    pk__pieces *batch = &segment->batch, *pending = &segment->pending;
    size_t kept = 0;
    pk_call call;
    pk__pass_call(&segment->tape, node, used, 1, &call);
    call.out = segment->switch_values;
    node->operation->switches(&call);
    for (size_t i = 0; i < batch->count; i++) {
        if (segment->batch_start[i] <= n) {
            const pk__piece piece = batch->piece[i];
            const int shortest = piece.b - piece.a <= PK__SHORTEST_SEARCH;
            pk__root_sink sink = {piece.a, piece.b, 0, 0, 0, segment->roots, 0, segment->root_capacity};
            if (pk__piece_roots(segment, node->degree == 1, exact, shortest, switches, i * samples, &sink)) {
                if (!pk__halve_search(segment, &piece, n))
                    return 0;
                continue;
            }
            if (sink.count > sink.capacity)
                return 0;
            for (size_t r = 0; !exact && r < sink.count; r += PK__NEWTON_POINTS)
                pk__refine_roots(segment, n, used, piece.row, piece.a, piece.b,
                                 pk__min(PK__NEWTON_POINTS, sink.count - r), sink.roots + r);
            const size_t parts = pk__append_split(pending, &piece, &sink);
            if (!parts)
                return 0;
            for (size_t k = 0; k < parts; k++)
                segment->pending_start[pending->count - 1 - k] = n + 1;
            if (parts > 1)
                continue;
            batch->piece[i] = pending->piece[--pending->count]; /* it is whole: go on with it */
        }
        pk__keep_piece(segment, n, i, kept++);
    }
    batch->count = kept;
    return 1;
}

typedef int pk__piece_order(const pk__piece *piece, const pk__piece *other);

/* By row, then by t. */
PK__PRIVATE int pk__precedes_by_place(const pk__piece *piece, const pk__piece *other)
{
    return piece->row < other->row || (piece->row == other->row && piece->a < other->a);
}

/* Shell sort: in place. */
PK__PRIVATE void pk__sort_pieces(pk__pieces *pieces, pk__piece_order *precedes)
{
    size_t gap = 1;
    while (gap < pieces->count / 3)
        gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (size_t i = gap; i < pieces->count; i++) {
            const pk__piece piece = pieces->piece[i];
            size_t k = i;
            for (; k >= gap && precedes(&piece, &pieces->piece[k - gap]); k -= gap)
                pieces->piece[k] = pieces->piece[k - gap];
            pieces->piece[k] = piece;
        }
}

/* Joins what was halved for the search alone; the pieces are sorted. */
static void pk__join_pieces(pk__pieces *pieces)
{
    size_t kept = 0;
    for (size_t i = 0; i < pieces->count; i++) {
        const pk__piece piece = pieces->piece[i];
        pk__piece *last = kept ? &pieces->piece[kept - 1] : NULL;
        if (last && piece.joined && last->row == piece.row && last->b == piece.a && last->slack_b == 0) {
            last->b = piece.b;
            last->slack_b = piece.slack_b;
        } else {
            pieces->piece[kept++] = piece;
        }
    }
    pieces->count = kept;
}

PK__INTERNAL int pk__path_split(pk__path *segment, const pk__pieces *from, pk__pieces *to)
{
    pk__pieces *pending = &segment->pending, *batch = &segment->batch;
    const size_t samples = (size_t)segment->degree + 1;
    to->count = pending->count = 0;
    if (from->count > to->capacity || from->count > pending->capacity)
        return 0;
    for (size_t i = 0; i < from->count; i++) {
        pk__pieces *first = segment->last_switch ? pending : to;
        segment->pending_start[i] = 1;
        first->piece[first->count] = from->piece[i];
        first->piece[first->count++].joined = 0;
    }
    segment->tape.value[0] = segment->input_points;
    segment->held = 0; /* samples take their place */
    while (pending->count) {
        pk__begin_batch(segment);
        for (size_t n = 0; n <= segment->last_switch && batch->count; n++) {
            if (n && pk__is_switch(&segment->graph->nodes[n]) && !pk__split_batch(segment, n))
                return 0;
            if (n < segment->last_switch && batch->count)
                pk__path_node(segment, n, batch->count * samples, segment->point_row, segment->point_t);
        }
        for (size_t i = 0; i < batch->count; i++) {
            if (to->count == to->capacity)
                return 0;
            to->piece[to->count++] = batch->piece[i];
        }
    }
    pk__sort_pieces(to, pk__precedes_by_place);
    pk__join_pieces(to);
    return 1;
}

PK__END_CODE

/* pathkernel/path/quadrature.h: implementation */
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
static int pk__is_exact(const pk_graph *graph, const pk_readout *readout)
{
    if (graph->degree < 0 || graph->surrogate || readout->kind == PK_READOUT_FUNCTION ||
        (graph->degree + 1) / 2 > PK_GAUSS_NODES)
        return 0;
    for (size_t n = 1; n < graph->node_count; n++)
        if (pk__is_switch(&graph->nodes[n]) && graph->nodes[n].degree > PK__PATH_DEGREE)
            return 0;
    return 1;
}

PK_API pk_status pk_quadrature_check(pk_context *context, const pk_quadrature *quadrature,
                                     const pk_graph *graph, const pk_readout *readout)
{
    if ((int)quadrature->rule < 0 || quadrature->rule > PK_RULE_LEFT)
        return pk__fail(context, PK_ARGUMENT, "quadrature rule %d does not exist", (int)quadrature->rule);
    if (quadrature->nodes < 0 || quadrature->nodes > PK_RULE_NODES)
        return pk__fail(context, PK_ARGUMENT, "a quadrature with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_RULE_NODES);
    if (quadrature->rule == PK_RULE_GAUSS && quadrature->nodes > PK_GAUSS_NODES)
        return pk__fail(context, PK_ARGUMENT, "Gauss-Legendre with %d nodes; 1 to %d are possible",
                        quadrature->nodes, (int)PK_GAUSS_NODES);
    if (quadrature->rule == PK_RULE_TRAPEZOID && quadrature->nodes == 1)
        return pk__fail(context, PK_ARGUMENT, "the trapezoid rule needs at least 2 nodes");
    if (quadrature->rule == PK_RULE_EXACT && !pk__is_exact(graph, readout))
        return pk__fail(
            context, PK_UNSUPPORTED,
            "the exact rule needs a piecewise-linear network (degree at most %d at a kink) and a linear "
            "readout; use auto, which measures its closure",
            (int)PK__PATH_DEGREE);
    return PK_OK;
}

/* Pieces in one batch: room for the kinks of a block; more of them are met by halving the batch. */
static size_t pk__piece_capacity(size_t rows)
{
    return 64 * rows + 1024;
}

/* Halvings a row may cost in one step; an unreachable target or a NaN must end. Of these, at one time: */
enum { PK__HALVINGS = 512, PK__HALVED_TOGETHER = 128 };

PK__INTERNAL void pk__points_take(pk__arena *arena, size_t capacity, int bounds, pk__points *points)
{
    points->count = 0;
    points->row = pk__arena_take(arena, capacity, sizeof *points->row);
    points->t = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->weight = pk__arena_take(arena, capacity, sizeof(pk_real));
    points->check = bounds ? pk__arena_take(arena, capacity, sizeof(pk_real)) : NULL;
    points->slack = bounds ? pk__arena_take(arena, capacity, sizeof(pk_real)) : NULL;
}

PK__INTERNAL void pk__integrator_take(pk__arena *arena, const pk_graph *graph, size_t rows, size_t points,
                                      size_t reverse_points, size_t copies, int bounds,
                                      pk__integrator *integrator)
{
    size_t pieces = pk__piece_capacity(rows), outputs = graph->output_width;
    memset(integrator, 0, sizeof *integrator);
    points = pk__max(points, PK_GAUSS_NODES + 2);
    pk__path_take(arena, graph, rows, points, reverse_points, copies, pieces, bounds, &integrator->segment);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->pending);
    pk__pieces_take(arena, 2 * PK__HALVED_TOGETHER * rows, &integrator->failed);
    pk__pieces_take(arena, pieces, &integrator->pieces);
    integrator->order = pk__arena_take(arena, pieces, 1);
    integrator->passed = pk__arena_take(arena, pieces, 1);
    integrator->nested = pk__arena_take(arena, pieces, 1);
    integrator->next_order = pk__arena_take(arena, rows, sizeof *integrator->next_order);
    integrator->missed = pk__arena_take(arena, pieces, sizeof *integrator->missed);
    integrator->sequence = pk__arena_take(arena, pieces, sizeof *integrator->sequence);
    pk__points_take(arena, points, bounds, &integrator->buffer);
    integrator->slope = pk__arena_take(arena, copies, outputs * sizeof *integrator->slope);
    integrator->h = pk__arena_take(arena, copies, 5 * sizeof *integrator->h);
    integrator->ends = pk__arena_take(arena, rows, 2 * copies * sizeof *integrator->ends);
    integrator->has_ends = pk__arena_take(arena, rows, 1);
}

/* One behind the last of the points from p on that are of its row. */
PK__PRIVATE size_t pk__row_end(const pk__points *points, size_t p)
{
    size_t end = p + 1;
    while (end < points->count && points->row[end] == points->row[p])
        end++;
    return end;
}

static void pk__flush(pk__integrator *integrator, pk__point_sink *sink, void *user, int last)
{
    integrator->buffer.last = last;
    sink(user, &integrator->buffer);
    integrator->points += integrator->buffer.count;
    integrator->buffer.count = 0;
}

static void pk__emit(pk__integrator *integrator, pk__point_sink *sink, void *user, size_t row, double t,
                     double weight, double check, double slack)
{
    pk__points *buffer = &integrator->buffer;
    if (buffer->count == integrator->segment.point_capacity)
        pk__flush(integrator, sink, user, 0);
    size_t at = buffer->count++;
    buffer->row[at] = row;
    buffer->t[at] = (pk_real)t;
    buffer->weight[at] = (pk_real)weight;
    if (buffer->check) {
        buffer->check[at] = (pk_real)check;
        buffer->slack[at] = (pk_real)slack;
    }
}

/* How large the polynomial through the values at n nodes can be at the start of [0, 1], for values of size 1 at node q
 * alone; at its end for node n - 1 - q. */
static double pk__edge_weight(int n, const double *x, int q)
{
    double weight = 1;
    for (int r = 0; r < n; r++)
        if (r != q)
            weight *= x[r] / (x[q] - x[r]);
    return fabs(weight);
}

/* The nodes of the rule that shows the error of the rule with n: so many that its own error is far smaller. */
static int pk__check_order(int n)
{
    return n + 4 + n / 4 < PK_GAUSS_NODES ? n + 4 + n / 4 : (int)PK_GAUSS_NODES;
}

/* checked: the rule is not exact, its error is to be estimated by one of more nodes; left is the part of the integral
 * that the piece's own judgement could not explain. */
static void pk__emit_gauss(pk__integrator *integrator, pk__point_sink *sink, void *user, const pk__piece *piece,
                           int order, int checked, double left)
{
    const double *x = integrator->gauss_nodes + order * (order - 1) / 2;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    const double a = piece->a, length = piece->b - a;
    checked = checked && integrator->buffer.check;
    for (int q = 0; q < order; q++) {
        double slack = length * w[q] * left;
        /* A kink that lies elsewhere takes the gradients on its wrong side along: those beside it on both sides. */
        if (integrator->buffer.check && piece->slack_a > 0)
            slack += piece->slack_a * pk__edge_weight(order, x, q);
        if (integrator->buffer.check && piece->slack_b > 0)
            slack += piece->slack_b * pk__edge_weight(order, x, order - 1 - q);
        pk__emit(integrator, sink, user, piece->row, a + length * x[q], length * w[q],
                 checked ? -length * w[q] : 0, slack);
    }
    if (!checked)
        return;
    order = pk__check_order(order);
    x = integrator->gauss_nodes + order * (order - 1) / 2;
    w = integrator->gauss_weights + order * (order - 1) / 2;
    for (int q = 0; q < order; q++)
        pk__emit(integrator, sink, user, piece->row, a + length * x[q], 0, length * w[q], 0);
}

/* A rule that is the same for every row and step. */
static void pk__emit_fixed(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk_rule rule = integrator->quadrature.rule;
    int count = integrator->quadrature.nodes ? integrator->quadrature.nodes : rule == PK_RULE_TRAPEZOID ? 2 : 1;
    const double *x = integrator->gauss_nodes + count * (count - 1) / 2;
    const double *w = integrator->gauss_weights + count * (count - 1) / 2;
    for (size_t row = 0; row < integrator->segment.rows; row++)
        for (int q = 0; q < count; q++) {
            double t = 0, weight = 1.0 / count;
            if (rule == PK_RULE_GAUSS) {
                t = x[q];
                weight = w[q];
            } else if (rule == PK_RULE_MIDPOINT) {
                t = (q + 0.5) / count;
            } else if (rule == PK_RULE_LEFT) {
                t = (double)q / count;
            } else {
                t = (double)q / (count - 1);
                weight = (q == 0 || q == count - 1 ? 0.5 : 1.0) / (count - 1);
            }
            pk__emit(integrator, sink, user, row, t, weight, 0, 0);
        }
}

/* Roundings of what is added: below a few nothing can be measured, and an error below many of them that another node
 * does not mend is rounding. In float no target is below the former, so that they are fewer. */
#define PK__MEASURABLE (sizeof(pk_real) == sizeof(float) ? 4 : 16)
enum { PK__NOISE = 128 };
/* The closure judges a piece while its rounding is at most so many targets. */
enum { PK__JUDGE = 100 };
/* A nested difference that another node does not mend is rounding below this part of what h changes. */
#define PK__NESTED_NOISE (sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-7)

/* What the test of a piece found, each the largest over the readouts: its error, the sum of |dh/dt|, |h|; the error beyond
 * rounding as a part of the sum, at most 1. */
typedef struct pk__judgement {
    double error, size, height, left;
} pk__judgement;

/* sum (+)= the integral of dh/dt, size += that of |dh/dt|, by the rule with `order` nodes, which are the points from first
 * on of the tape; *height: at least |h| there. value: room for h. */
static void pk__sum_nodes(pk__integrator *integrator, size_t first, size_t row, double length, int order,
                          pk_real *value, pk_real *sum, pk_real *size, double *height)
{
    const pk__tape *tape = &integrator->segment.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    const pk_real *f = pk__pass_output(tape) + first * outputs;
    const pk_real *tangent = tape->tangent[tape->graph->node_count - 1] + first * outputs;
    const double *w = integrator->gauss_weights + order * (order - 1) / 2;
    const pk_real *slope = integrator->slope;
    for (int q = 0; q < order; q++, f += outputs, tangent += outputs) {
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f, value,
                          integrator->slope);
        for (size_t k = 0; k < count; k++) {
            double along = 0;
            for (size_t c = 0; c < outputs; c++)
                along += slope[k * outputs + c] * tangent[c];
            sum[k] += (pk_real)(length * w[q] * along);
            if (size)
                size[k] += (pk_real)(length * w[q] * fabs(along));
            if (height)
                *height = fabs((double)value[k]) > *height ? fabs((double)value[k]) : *height;
        }
    }
}

/* A NaN counts as the largest. */
static double pk__larger(double a, double b)
{
    return a <= b || b != b ? b : a;
}

/* Judges a piece from the tape: its nodes are the points from first on; its ends the points `ends` and the next, or, nested,
 * the nodes of one order more follow its own. height: of the row, as far as it is known. */
static pk__judgement pk__judge(pk__integrator *integrator, size_t first, size_t ends, size_t row, double length,
                               int order, int nested, double height)
{
    const pk__tape *tape = &integrator->segment.tape;
    const size_t outputs = tape->graph->output_width, count = pk_readout_count(&integrator->readout, outputs);
    pk_real *start = integrator->h, *end = start + count, *sum = end + count, *size = sum + count,
            *better = size + count;
    pk__judgement found = {0, 0, height, 0};
    memset(sum, 0, 3 * count * sizeof *sum);
    pk__sum_nodes(integrator, first, row, length, order, start, sum, size, nested ? &found.height : NULL);
    if (nested) {
        pk__sum_nodes(integrator, first + (size_t)order, row, length, order + 1, start, better, NULL, NULL);
    } else {
        const pk_real *f = pk__pass_output(tape) + ends * outputs;
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f, start,
                          integrator->slope);
        pk__readout_apply(&integrator->readout, outputs, integrator->first_row + row, f + outputs, end,
                          integrator->slope);
    }
    for (size_t k = 0; k < count; k++) {
        found.size = pk__larger(fabs((double)size[k]), found.size);
        if (!nested) {
            found.height = pk__larger(fabs((double)start[k]), found.height);
            found.height = pk__larger(fabs((double)end[k]), found.height);
        }
    }
    const double rounding = PK__MEASURABLE * PK__EPSILON * (nested ? found.size : found.height + found.size);
    for (size_t k = 0; k < count; k++) {
        const double error = fabs((double)(nested ? better[k] - sum[k] : end[k] - start[k] - sum[k]));
        found.error = pk__larger(error, found.error);
        if (!(error <= rounding))
            found.left = pk__larger(error < size[k] ? error / (double)size[k] : 1, found.left);
    }
    return found;
}

enum { PK__LARGEST_ORDER = 16 };

/* *next = what the row's next step starts with, where a piece of it took `nodes` nodes; missed: by how much one node less
 * missed its target, 0: not tried. A test costs little beside a node that is too many, so the next step starts one lower;
 * but steps change slowly, so after a miss by 16^k not for k steps. Of several pieces the largest counts. */
static void pk__plan_next(pk__row_order *next, pk__row_order now, int nodes, double missed)
{
    int wait = now.wait;
    if (missed > 1)
        wait = missed < 1e9 ? (int)(log2(missed) / 4) : 7; /* log2(1e9) / 4 is 7.5 */
    else if (wait && nodes == now.nodes)
        wait--;
    else
        nodes -= nodes > 1;
    if (nodes > next->nodes || (nodes == next->nodes && wait > next->wait)) {
        next->nodes = (unsigned char)nodes;
        next->wait = (unsigned char)wait;
    }
}

/* Whether a piece waits for a test of its order. */
static int pk__is_open(const pk__integrator *integrator, size_t piece)
{
    return !integrator->passed[piece] && integrator->order[piece] <= PK__LARGEST_ORDER;
}

/* Of a piece that is the whole step, what pk__judge left in h. */
static void pk__keep_ends(pk__integrator *integrator, size_t row)
{
    const size_t both = 2 * pk_readout_count(&integrator->readout, integrator->segment.graph->output_width);
    memcpy(integrator->ends + row * both, integrator->h, both * sizeof *integrator->h);
    integrator->has_ends[row] = 1;
}

/* What a judgement of piece number i decides: it passes, or it is tested again by another order or judge. 1: again. */
static int pk__decide(pk__integrator *integrator, size_t i, const pk__judgement *found)
{
    pk__piece *piece = &integrator->pieces.piece[i];
    pk__row_state *state = &integrator->state[piece->row];
    const double before = integrator->missed[i], eps = PK__EPSILON;
    const int nodes = integrator->order[i], nested = integrator->nested[i];
    if (piece->size < 0 && isfinite(found->size)) { /* its first test */
        state->step_change += found->size;
        state->change = pk__larger(state->step_change, state->change);
    }
    piece->size = found->size;
    piece->error = found->error;
    if (isfinite(found->height))
        state->height = pk__larger(found->height, state->height);
    const double allowed = integrator->target * state->change;
    const double closure_floor = PK__MEASURABLE * eps * (state->height + found->size);
    if (!nested && closure_floor > PK__JUDGE * allowed && found->error <= closure_floor) {
        integrator->nested[i] = state->nested = 1;
        return 1;
    }
    if (nested && 2 * closure_floor < PK__JUDGE * allowed)
        state->nested = 0; /* from the next step on */
    const double floor = nested ? PK__MEASURABLE * eps * found->size : closure_floor;
    const double limit = allowed > floor ? allowed : floor;
    const double error = found->error <= limit ? (limit > 0 ? found->error / limit : 0) : found->error / limit;
    double noise = PK__NOISE / PK__MEASURABLE * floor;
    if (nested) {
        const double most = PK__NESTED_NOISE * found->size;
        noise = pk__larger(noise, closure_floor < most ? closure_floor : most);
    }
    integrator->missed[i] = error;
    if (error > 1 && before > 0 && error >= 0.5 * before && found->error <= noise) {
        integrator->order[i]--;
    } else if (!(error <= 1)) {
        integrator->order[i] = (unsigned char)(nodes < 12 ? nodes + 1 : nodes + 2);
        return integrator->order[i] <= PK__LARGEST_ORDER;
    }
    integrator->passed[i] = 1;
    integrator->missed[i] = found->left; /* the rest of its use: for the bounds */
    integrator->sequence[integrator->sequence_count++] = i;
    pk__plan_next(&integrator->next_order[piece->row], state->order, integrator->order[i], before);
    return 0;
}

/* Tests every piece that has not passed with its own order. Whether some piece is to be tested again. */
static int pk__test_pieces(pk__integrator *integrator)
{
    pk__path *segment = &integrator->segment;
    const pk__pieces *pieces = &integrator->pieces;
    const unsigned char *order = integrator->order, *nested = integrator->nested;
    int again = 0;
    for (size_t next = 0, last; next < pieces->count; next = last) {
        size_t points = 0, ends = 0;
        for (last = next; last < pieces->count; last++) { /* the nodes of all pieces; slopes are wanted here */
            const pk__piece *piece = &pieces->piece[last];
            const size_t nodes = order[last], all = nested[last] ? 2 * nodes + 1 : nodes;
            if (!pk__is_open(integrator, last))
                continue;
            if (points + all + ends + 2 > segment->point_capacity)
                break;
            for (size_t i = 0; i < all; i++, points++) {
                const size_t n = nodes + (i >= nodes), q = i < nodes ? i : i - nodes;
                segment->point_row[points] = piece->row;
                segment->point_t[points] =
                    (pk_real)(piece->a + (piece->b - piece->a) * integrator->gauss_nodes[n * (n - 1) / 2 + q]);
            }
            ends += nested[last] ? 0 : 2;
        }
        if (!points)
            continue;
        ends = points;
        for (size_t i = next; i < last; i++) /* then their ends; only values are */
            for (int end = 0; end < 2 && pk__is_open(integrator, i) && !nested[i]; end++, ends++) {
                segment->point_row[ends] = pieces->piece[i].row;
                segment->point_t[ends] = (pk_real)(end ? pieces->piece[i].b : pieces->piece[i].a);
            }
        const size_t first = pk__path_append(segment, ends, segment->point_row, segment->point_t);
        pk__path_tangent(segment, first, points, segment->point_row, segment->point_t);
        ends = first + points;
        points = first;
        for (size_t i = next; i < last; i++) {
            const pk__piece *piece = &pieces->piece[i];
            if (!pk__is_open(integrator, i))
                continue;
            const size_t nodes = order[i];
            const int closed = !nested[i];
            /* The values at the ends are those at the ends' t, rounded. */
            const double length = (double)(pk_real)piece->b - (double)(pk_real)piece->a;
            const pk__judgement found = pk__judge(integrator, points, ends, piece->row, length, (int)nodes,
                                                  !closed, integrator->state[piece->row].height);
            if (closed && piece->a == 0 && piece->b == 1)
                pk__keep_ends(integrator, piece->row);
            points += closed ? nodes : 2 * nodes + 1;
            ends += closed ? 2 : 0;
            again |= pk__decide(integrator, i, &found);
        }
    }
    return again;
}

/* Shorter pieces have nodes that pk_real hardly tells apart. */
#define PK__SHORTEST (sizeof(pk_real) == sizeof(float) ? 1e-5 : 1e-13)
/* After so many halvings the error must have fallen by half, unless at most so many parts are left. */
enum { PK__GENERATIONS = 2, PK__FEW_PARTS = 1 };
/* Errors that are a larger part of |h| are no rounding. */
#define PK__LARGEST_ROUNDING (sizeof(pk_real) == sizeof(float) ? 1e-2 : 1e-8)

/* Takes a piece as it is, although it missed. */
static void pk__accept(pk__integrator *integrator, const pk__piece *piece, pk__point_sink *sink, void *user)
{
    const double length = piece->b - piece->a;
    integrator->refused++;
    if (piece->size < 0) { /* its kinks have not been found */
        pk__emit(integrator, sink, user, piece->row, 0.5 * (piece->a + piece->b), length, 0, length);
        return;
    }
    const double left = piece->error < piece->size ? piece->error / piece->size : 1;
    pk__emit_gauss(integrator, sink, user, piece, PK__LARGEST_ORDER, 1, left);
}

/* A piece that has not passed, or whose kinks do not find room, waits for its halves; or is accepted where halving is of no
 * use. */
static void pk__fail_piece(pk__integrator *integrator, const pk__piece *piece, pk__point_sink *sink, void *user)
{
    pk__pieces *to = &integrator->failed;
    if (piece->b - piece->a < PK__SHORTEST || to->count == to->capacity)
        pk__accept(integrator, piece, sink, user);
    else
        to->piece[to->count++] = *piece;
}

/* By row; of a row the largest error first, NaN in front of all, then by t. */
static int pk__precedes_by_error(const pk__piece *piece, const pk__piece *other)
{
    if (piece->row != other->row || piece->error == other->error)
        return pk__precedes_by_place(piece, other);
    return isnan(piece->error) ? !isnan(other->error) || piece->a < other->a : piece->error > other->error;
}

/* Of each family of failed pieces, the parts of one ancestor, those whose error has not fallen are taken as they are where
 * there are several. */
static void pk__drop_stalled(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__pieces *failed = &integrator->failed;
    size_t kept = 0;
    pk__sort_pieces(failed, pk__precedes_by_place);
    for (size_t first = 0, last; first < failed->count; first = last) {
        const size_t row = failed->piece[first].row;
        const double family = failed->piece[first].family;
        for (last = first; last < failed->count; last++)
            if (failed->piece[last].row != row || failed->piece[last].family != family)
                break;
        for (size_t i = first; i < last; i++) {
            pk__piece piece = failed->piece[i];
            if (piece.age == 0 || piece.age == PK__GENERATIONS) {
                const pk__row_state *state = &integrator->state[row];
                if (piece.age && last - first > PK__FEW_PARTS && piece.size >= 0 &&
                    !(piece.error < 0.5 * piece.reference) &&
                    !(piece.error > PK__LARGEST_ROUNDING * (state->height + state->change))) {
                    pk__accept(integrator, &piece, sink, user);
                    continue;
                }
                piece.family = piece.a;
                piece.reference = piece.error;
                piece.age = 0;
            }
            piece.age++;
            failed->piece[kept++] = piece;
        }
    }
    failed->count = kept;
}

/* The halves of what has failed, the worst first, as long as there are halvings; the rest is accepted. */
static void pk__halve_failed(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__pieces *pending = &integrator->pending, *failed = &integrator->failed;
    pk__drop_stalled(integrator, sink, user);
    pk__sort_pieces(failed, pk__precedes_by_error);
    pending->count = 0;
    for (size_t i = 0; i < failed->count; i++) {
        const pk__piece *piece = &failed->piece[i];
        pk__row_state *state = &integrator->state[piece->row];
        if (state->halvings >= PK__HALVINGS || pending->count + 2 > pending->capacity) {
            pk__accept(integrator, piece, sink, user);
            continue;
        }
        state->halvings++;
        for (int half = 0; half < 2; half++) {
            pk__piece *part = &pending->piece[pending->count++];
            *part = *piece;
            if (half) {
                part->a = 0.5 * (piece->a + piece->b);
                part->slack_a = 0;
            } else {
                part->b = 0.5 * (piece->a + piece->b);
                part->slack_b = 0;
            }
        }
    }
}

/* Raises the order of each piece until it passes or the largest order is reached; emits what passed. */
static void pk__adapt(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    const pk__pieces *pieces = &integrator->pieces;
    memset(integrator->passed, 0, pieces->count);
    memset(integrator->missed, 0, pieces->count * sizeof *integrator->missed);
    for (size_t i = 0; i < pieces->count; i++) {
        pk__piece *piece = &pieces->piece[i];
        const pk__row_state *state = &integrator->state[piece->row];
        integrator->order[i] = state->order.nodes;
        integrator->nested[i] = state->nested;
        piece->size = piece->age ? 0 : -1; /* halves are parts of what has been counted */
    }
    integrator->sequence_count = 0;
    while (pk__test_pieces(integrator))
        ;
    for (size_t i = 0; i < integrator->sequence_count; i++) { /* as the tape holds their nodes */
        const size_t at = integrator->sequence[i];
        pk__emit_gauss(integrator, sink, user, &pieces->piece[at], integrator->order[at], 1,
                       integrator->missed[at]);
    }
    for (size_t i = 0; i < pieces->count; i++)
        if (!integrator->passed[i])
            pk__fail_piece(integrator, &pieces->piece[i], sink, user);
}

enum { PK__SURROGATE_NODES = 8 };

PK__INTERNAL void pk__integrate(pk__integrator *integrator, pk__point_sink *sink, void *user)
{
    pk__path *segment = &integrator->segment;
    pk_rule rule = integrator->quadrature.rule;
    memset(integrator->has_ends, 0, segment->rows);
    if (rule != PK_RULE_AUTO && rule != PK_RULE_EXACT) {
        pk__emit_fixed(integrator, sink, user);
        pk__flush(integrator, sink, user, 1);
        return;
    }
    int exact = pk__is_exact(segment->graph, &integrator->readout);
    /* A surrogate's integrand is no derivative, so that nothing can judge a rule: take one that is fine between
     * the jumps of its values. */
    int fixed = exact || segment->graph->surrogate;
    int order = segment->graph->surrogate    ? PK__SURROGATE_NODES
                : segment->graph->degree < 2 ? 1
                                             : (segment->graph->degree + 1) / 2;
    pk__pieces *pending = &integrator->pending, *pieces = &integrator->pieces;
    memset(integrator->next_order, 0, segment->rows * sizeof *integrator->next_order);
    pending->count = 0;
    for (size_t row = 0; row < segment->rows; row++) {
        integrator->state[row].halvings = 0;
        integrator->state[row].step_change = 0;
        pk__pieces_push(pending, row, 0, 1);
    }
    while (pending->count) {
        integrator->failed.count = 0;
        for (size_t first = 0; first < pending->count; first += segment->rows) {
            pk__pieces batch = {pk__min(segment->rows, pending->count - first), 0, pending->piece + first};
            if (!pk__path_split(segment, &batch, pieces)) {
                /* More kinks than there is room for: half as long pieces have fewer. */
                for (size_t i = 0; i < batch.count; i++) {
                    batch.piece[i].size = -1;
                    batch.piece[i].error = INFINITY;
                    pk__fail_piece(integrator, &batch.piece[i], sink, user);
                }
                continue;
            }
            integrator->split_pieces += pieces->count;
            for (size_t i = 0; fixed && i < pieces->count; i++)
                pk__emit_gauss(integrator, sink, user, &pieces->piece[i], order, 0, 0);
            if (!fixed)
                pk__adapt(integrator, sink, user);
        }
        pk__halve_failed(integrator, sink, user);
    }
    for (size_t row = 0; !fixed && row < segment->rows; row++)
        integrator->state[row].order = integrator->next_order[row].nodes
                                           ? integrator->next_order[row]
                                           : (pk__row_order){PK__LARGEST_ORDER, 0};
    pk__flush(integrator, sink, user, 1);
}

PK__INTERNAL const pk_real *pk__integrator_ends(pk__integrator *integrator)
{
    pk__path *segment = &integrator->segment;
    const size_t classes = segment->graph->output_width,
                 outputs = pk_readout_count(&integrator->readout, classes);
    for (size_t row = 0, points = 0; row < segment->rows; row++) {
        for (int end = 0; end < 2 && !integrator->has_ends[row]; end++, points++) {
            segment->point_row[points] = row;
            segment->point_t[points] = (pk_real)end;
        }
        if (!points || (row + 1 < segment->rows && points + 2 <= segment->point_capacity))
            continue;
        pk__path_forward(segment, points, segment->point_row, segment->point_t);
        for (size_t p = 0; p < points; p++)
            pk__readout_apply(&integrator->readout, classes, integrator->first_row + segment->point_row[p],
                              pk__pass_output(&segment->tape) + p * classes,
                              integrator->ends + (2 * segment->point_row[p] + p % 2) * outputs,
                              integrator->slope);
        points = 0;
    }
    return integrator->ends;
}

PK__END_CODE

/* pathkernel/features/factors.h: implementation */
#include <math.h>
#include <string.h>
#include <time.h>
PK__BEGIN_CODE

static const pk_node *pk__layer_input(const pk_graph *graph, const pk_node *node)
{
    return &graph->nodes[node->inputs[0]];
}

PK__INTERNAL int pk__layer_by_rows(const pk__representation *representation, const pk_node *node)
{
    if (pk__is_outer(node))
        return 0;
    if (node->tangent_form != PK_TANGENT_OUTER)
        return 1;
    if (representation->materialised)
        return representation->batch <= ((size_t)1 << 25) / node->weight_count;
    const double places = (double)node->positions, in = (double)node->fan_in, out = (double)node->fan_out;
    const double outputs = (double)representation->outputs, batch = (double)representation->batch, points = 5;
    const double factored = points * batch * places * places * (2 * in + (2 * out + 8) * outputs);
    const double by_rows = 2 * outputs * out * in * (batch + points * places);
    return !representation->factored && by_rows <= factored;
}

PK__INTERNAL void pk__examples_take(pk__arena *arena, const pk_graph *graph, size_t capacity,
                                    const pk__representation *representation, pk__examples *examples)
{
    memset(examples, 0, sizeof *examples);
    /* Whole cache lines, and no multiple of 4 KiB, which would map every feature to the same cache set. */
    const size_t columns = pk__blocks(capacity, PK_PANEL) * PK_PANEL;
    examples->ld = columns % 512 ? columns : columns + PK_PANEL;
    examples->input = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->cotangent = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    examples->rows = pk__arena_take(arena, graph->layers, sizeof(pk_real *));
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        int rows = pk__layer_by_rows(representation, node);
        const size_t bytes = columns * sizeof(pk_real);
        const int known = representation->known_data && pk__is_outer(node) && node->inputs[0] == 0;
        pk_real *input = rows || known ? NULL : pk__arena_take(arena, node->positions * node->fan_in, bytes);
        pk_real *cotangent = rows ? NULL : pk__arena_take(arena, node->width, bytes);
        pk_real *gradients =
            rows ? pk__arena_take(arena, node->weight_count, examples->ld * sizeof(pk_real)) : NULL;
        if (examples->input) {
            examples->input[l] = input;
            examples->cotangent[l] = cotangent;
            examples->rows[l] = gradients;
        }
    }
}

/* Examples that go through the network at one time: a block of them, or about 2^20 numbers of values. */
static size_t pk__example_rows(const pk_graph *graph)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        numbers += graph->nodes[n].width;
    return pk__max(1, pk__min(PK__EXAMPLE_BLOCK, ((size_t)1 << 20) / numbers));
}

PK__INTERNAL void pk__example_workspace_take(pk__arena *arena, const pk_graph *graph, size_t rows,
                                             pk__example_workspace *workspace)
{
    size_t most = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        if (pk__is_outer(node))
            continue;
        most = pk__max(most, node->weight_count);
        if (node->tangent_form == PK_TANGENT_OUTER)
            most = pk__max(most, node->positions * node->fan_in + node->width);
    }
    rows = pk__min(rows, pk__example_rows(graph));
    pk__pass_take(arena, graph, rows, 1, 0, &workspace->tape);
    workspace->inputs = pk__arena_take(arena, rows, graph->input_width * sizeof(pk_real));
    workspace->targets = pk__arena_take(arena, rows, graph->output_width * sizeof(pk_real));
    workspace->row_gradients = pk__arena_take(arena, most, rows * sizeof(pk_real));
}

PK__INTERNAL void pk__examples_begin(pk__examples *examples, const pk_batch *batch)
{
    examples->count = batch->count;
    examples->items = batch->items;
    examples->consecutive = 1;
    for (size_t b = 1; b < batch->count; b++)
        examples->consecutive &= batch->items[b] == batch->items[0] + (int64_t)b;
}

/* Columns first .. first + count - 1 of panels of features = rows of from (count x features); the rest of a last panel = 0. */
static void pk__put_panels(size_t count, size_t features, const pk_real *from, size_t first, pk_real *panels)
{
    for (size_t b = 0, columns; b < count; b += columns) {
        const size_t lane = (first + b) % PK_PANEL;
        pk_real *to = panels + (first + b) / PK_PANEL * features * PK_PANEL;
        columns = pk__min(PK_PANEL - lane, count - b);
        pk__interleave(columns, features, from + b * features, 1, features, to + lane);
        for (size_t i = lane + columns; i < PK_PANEL; i++)
            for (size_t j = 0; j < features; j++)
                to[j * PK_PANEL + i] = 0;
    }
}

/* places (positions x fan_in) and deltas (positions x copies x fan_out) of row row of a node that is used at several
 * places. */
PK__PRIVATE void pk__node_places(const pk__tape *tape, const pk_node *node, size_t row, size_t copies,
                                 pk_real *places, pk_real *deltas)
{
    const size_t positions = node->positions, out = node->fan_out;
    const pk_real *from = tape->cotangent[node - tape->graph->nodes] + row * copies * node->width;
    pk_call call;
    pk__pass_call(tape, node, 1, copies, &call);
    call.in[0] += row * call.in_width[0];
    call.out = places;
    if (node->unfolds)
        node->operation->unfold(&call);
    else
        memcpy(places, call.in[0], call.in_width[0] * sizeof *places);
    for (size_t k = 0; k < copies; k++)
        for (size_t q = 0; q < positions; q++)
            for (size_t j = 0; j < out; j++)
                deltas[(q * copies + k) * out + j] =
                    from[k * node->width + (node->operation->channels_first ? j * positions + q : q * out + j)];
}

PK__INTERNAL void pk__examples_perturb(size_t count, const pk_real *weights, pk_real *perturbed)
{
    /* Changes have random sizes, not only random signs: else half of all pairs of weights would change by the same factor,
     * and their difference would seem exact. */
    pk_random random = {0, 0, 0};
    for (size_t i = 0; i < count; i += 4) {
        const uint64_t bits = pk_random_bits(&random);
        for (size_t k = 0; k < 4 && i + k < count; k++) {
            const double change = (double)(bits >> 16 * k & 0xffff) / 32768 - 1;
            perturbed[i + k] = (pk_real)(weights[i + k] * (1 + PK__PERTURBATION * change));
        }
    }
}

/* Twice the change that was seen: random changes are half as large as they may be. */
PK__INTERNAL void pk__examples_magnitude(const pk__examples *from, const pk_graph *graph, pk__examples *to)
{
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const pk_real *sources[3] = {from->input[l], from->cotangent[l], from->rows[l]};
        pk_real *targets[3] = {to->input[l], to->cotangent[l], to->rows[l]};
        const size_t columns = pk__blocks(from->count, PK_PANEL) * PK_PANEL;
        const size_t numbers[3] = {node->positions * node->fan_in * columns, node->width * columns,
                                   node->weight_count * from->ld};
        for (int part = 0; part < 3; part++)
            for (size_t i = 0; sources[part] && i < numbers[part]; i++)
                targets[part][i] = (pk_real)(fabs(sources[part][i]) +
                                             2 * fabs(targets[part][i] - sources[part][i]) / PK__PERTURBATION);
    }
}

PK__INTERNAL void pk__examples_sum(const pk__examples *examples, const pk_graph *graph, pk_real *sum)
{
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t in = node->fan_in, out = node->fan_out, ld = examples->ld, count = examples->count;
        pk_real *to = sum + node->weight_offset;
        if (examples->rows[l]) {
            for (size_t i = 0; i < node->weight_count; i++)
                for (size_t b = 0; b < count; b++)
                    to[i] += examples->rows[l][i * ld + b];
            continue;
        }
        /* A panel's place q after the other: the features of a panel stand by places. */
        for (size_t q = 0; q < pk__blocks(count, PK_PANEL) * node->positions; q++) {
            const pk_real *input = examples->input[l] + q * in * PK_PANEL;
            const pk_real *cotangent = examples->cotangent[l] + q * out * PK_PANEL;
            pk__gemm(0, 1, out, in, PK_PANEL, 1, cotangent, PK_PANEL, input, PK_PANEL, 1, to, in);
            for (size_t j = 0; pk__has_bias(node) && j < out; j++)
                for (size_t b = 0; b < PK_PANEL; b++)
                    to[out * in + j] += cotangent[j * PK_PANEL + b];
        }
    }
}

/* The factors of count examples from column first on; room: places x (fan_in + fan_out). */
static void pk__fill_places(const pk__tape *tape, const pk_node *node, size_t count, pk_real *room,
                            pk__examples *examples, size_t first)
{
    const size_t ins = node->positions * node->fan_in;
    for (size_t b = 0; b < count; b++) {
        pk__node_places(tape, node, b, 1, room, room + ins);
        pk__put_panels(1, ins, room, first + b, examples->input[node->layer]);
        pk__put_panels(1, node->width, room + ins, first + b, examples->cotangent[node->layer]);
    }
}

/* Columns first .. first + count - 1, as many as the workspace holds. */
static void pk__fill_rows(pk__examples *examples, const pk_graph *graph, pk_loss loss, const pk_real *weights,
                          const pk_dataset *data, const pk_batch *batch, size_t first, size_t count,
                          pk__example_workspace *workspace, pk_real *gradient)
{
    const size_t outputs = graph->output_width;
    pk__tape *tape = &workspace->tape;
    const pk__line line = {weights, NULL, NULL};
    pk_dataset_inputs(data, batch->items + first, count, workspace->inputs);
    pk_loss_targets(loss, data, batch->items + first, count, outputs, workspace->targets);
    pk__pass_forward(tape, &line, count, workspace->inputs);
    const pk_real *f = pk__pass_output(tape);
    pk_real *seed = pk__pass_seed(tape);
    for (size_t b = 0; b < count; b++) {
        pk_loss_gradient(loss, outputs, f + b * outputs, workspace->targets + b * outputs, seed + b * outputs);
        double weight = batch->weights ? batch->weights[first + b] : 1.0 / (double)batch->count;
        for (size_t c = 0; c < outputs; c++)
            seed[b * outputs + c] = (pk_real)(weight * seed[b * outputs + c]);
    }
    pk__pass_reverse(tape, &line, count, 1);
    if (gradient)
        pk__pass_weight_gradient(tape, count, gradient);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        const size_t n = (size_t)(node - graph->nodes);
        if (examples->rows[l]) {
            pk_call call;
            pk__pass_call(tape, node, count, 1, &call);
            call.weights = weights + node->weight_offset;
            call.out_cotangent = tape->cotangent[n];
            call.gradient = workspace->row_gradients;
            pk__node_row_gradients(&call);
            pk__transpose(count, node->weight_count, workspace->row_gradients, examples->rows[l] + first,
                          examples->ld);
            continue;
        }
        if (pk__is_outer(node)) {
            if (examples->input[l])
                pk__put_panels(count, node->fan_in, tape->value[node->inputs[0]], first, examples->input[l]);
            pk__put_panels(count, node->width, tape->cotangent[n], first, examples->cotangent[l]);
        } else {
            pk__fill_places(tape, node, count, workspace->row_gradients, examples, first);
        }
    }
}

PK__INTERNAL void pk__examples_fill(pk__examples *examples, const pk_graph *graph, pk_loss loss,
                                    const pk_real *weights, const pk_dataset *data, const pk_batch *batch,
                                    size_t first, pk__example_workspace *workspace, pk_real *gradient)
{
    const size_t last = first + pk__min(batch->count - first, PK__EXAMPLE_BLOCK), rows = workspace->tape.rows;
    for (; first < last; first += rows)
        pk__fill_rows(examples, graph, loss, weights, data, batch, first, pk__min(rows, last - first),
                      workspace, gradient);
}

PK__INTERNAL double pk__rounding_allowance(const pk_graph *graph)
{
    double sum = 8 * (double)graph->node_count;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        sum += (double)(node->width + pk__layer_input(graph, node)->width);
    }
    return 2 * PK__EPSILON * sum;
}

PK__END_CODE

/* pathkernel/features/features.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK__INTERNAL size_t pk__integral_block(const pk_graph *graph, size_t outputs)
{
    /* What is in memory of them at one time stays in the second-level cache. Examples of wide layers do not, and are worth
     * fetching for more rows. */
    size_t widest = 0;
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        widest = pk__max(widest, pk__max(node->fan_in, node->fan_out));
    }
    return pk__max(
        1, pk__min(widest < 128 || widest >= 256 ? 32 : 16, (widest < 256 ? 50 : 100) / pk__max(outputs, 1)));
}

PK__INTERNAL size_t pk__integral_unit(size_t outputs, size_t parameters)
{
    return pk__max(1, pk__min(outputs, ((size_t)1 << 17) / pk__max(parameters, 1)));
}

/* Points of one call of the sink: enough rows for the products to run at speed, few enough for the cache. */
static size_t pk__point_capacity(size_t outputs)
{
    return pk__max(PK_GAUSS_NODES + 2, pk__min(256, 640 / pk__max(outputs, 1)));
}

/* Of those, points whose cotangents are in memory at one time: about 2^21 numbers, or one point. */
static size_t pk__reverse_points(const pk_graph *graph, size_t points, size_t outputs)
{
    size_t numbers = 1;
    for (size_t n = 1; n < graph->node_count; n++)
        if (graph->nodes[n].varies)
            numbers += graph->nodes[n].width;
    return pk__max(1, pk__min(points, ((size_t)1 << 21) / numbers / pk__max(outputs, 1)));
}

enum {
    PK__PART_NUMBERS = 1 << 14, /* of rows, which stay in a second-level cache of 512 KB beside the panels */
    PK__HEAD_PART = 96          /* sums of a headed layer in hand: they stay in the first-level cache */
};

/* The last layer where only an elementwise operation stands between it and node. */
static const pk_node *pk__head_of(const pk_graph *graph, const pk_node *node)
{
    const pk_node *between = pk__only_reader(graph, node);
    const pk_node *head = between && between->operation->elementwise ? pk__only_reader(graph, between) : NULL;
    return head && head->cotangent_constant && pk__is_outer(head) ? head : NULL;
}

static pk__layer_kind pk__kind_of_layer(const pk_node *node, const pk_readout *readout, int bounds,
                                        const pk__representation *representation)
{
    if (pk__layer_by_rows(representation, node) || (representation->materialised && !pk__is_outer(node)))
        return PK__LAYER_ROWS;
    if (bounds || !pk__is_outer(node))
        return PK__LAYER_POINTS;
    if (node->input_constant)
        return PK__LAYER_DATA;
    return node->cotangent_constant && readout->kind != PK_READOUT_FUNCTION ? PK__LAYER_LINEAR
                                                                            : PK__LAYER_POINTS;
}

/* Points of a spread layer whose places are in memory at one time. */
PK__PRIVATE size_t pk__place_points(const pk_node *node, size_t outputs)
{
    return pk__max(1, ((size_t)1 << 16) / (node->positions * (node->fan_in + outputs * node->fan_out)));
}

/* A layer used at several places, where it is not by rows. */
PK__PRIVATE int pk__is_spread(const pk__integral *tangent, size_t layer)
{
    return tangent->kind[layer] == PK__LAYER_POINTS && !pk__is_outer(tangent->node[layer]);
}

/* Rows of a product that stay in the second-level cache while panel after panel passes: equal parts of all of them. */
PK__PRIVATE size_t pk__part_rows(size_t rows, size_t depth)
{
    const size_t numbers = PK__HAS_AVX512 ? 4 * (size_t)PK__PART_NUMBERS : (size_t)PK__PART_NUMBERS;
    const size_t tiles = 2 * PK__TALLEST, most = pk__max(1, numbers / tiles / pk__max(depth, 1)) * tiles;
    const size_t all = pk__max(rows, 1), parts = pk__blocks(all, most);
    return pk__blocks(pk__blocks(all, parts), tiles) * tiles;
}

static pk_real *pk__take_reals(pk__arena *arena, size_t count, size_t numbers)
{
    return pk__arena_take(arena, count, numbers * sizeof(pk_real));
}

static size_t *pk__take_indices(pk__arena *arena, size_t count)
{
    return pk__arena_take(arena, count, sizeof(size_t));
}

/* What the contraction needs: points in hand at one time, places of a layer that is used at several, and their numbers. */
static void pk__contraction_take(pk__arena *arena, size_t points, size_t places, size_t place_numbers,
                                 int factored, pk__integral *tangent)
{
    const size_t outputs = tangent->outputs, rows = tangent->row_capacity, layers = tangent->graph->layers;
    const size_t items = pk__max(points, rows);
    size_t most = pk__max(pk__max(items * outputs, places), PK__HEAD_PART), widest = 0;
    tangent->weighted_inputs = pk__arena_take(arena, layers, sizeof(pk_real *));
    for (size_t l = 0; l < layers; l++) {
        const pk_node *node = pk_graph_layer(tangent->graph, l);
        const int used = factored && pk__is_outer(node);
        pk_real *inputs = pk__take_reals(arena, used ? points : 0, node->fan_in);
        if (tangent->weighted_inputs)
            tangent->weighted_inputs[l] = inputs;
        widest = pk__max(widest, used ? node->width : 0);
        most = pk__max(most, node->fan_out);
    }
    tangent->tile = pk__take_reals(arena, rows * outputs, PK__TILE_LD);
    tangent->left = pk__take_reals(arena, pk__max(items * PK__TILE_LD, places * PK__PAIR), 1);
    tangent->ones = pk__take_reals(arena, items, 1);
    tangent->point_to = pk__take_indices(arena, points * outputs);
    tangent->cell_left = pk__take_indices(arena, items * outputs);
    tangent->place_to = pk__take_indices(arena, places * outputs);
    tangent->place_left = pk__take_indices(arena, places * outputs);
    tangent->places = pk__take_reals(arena, place_numbers, 1);
    tangent->place_start = pk__take_reals(arena, places, 1);
    tangent->head_weights = pk__take_reals(arena, (1 + rows) * outputs, 2 * widest);
    tangent->slopes = pk__take_reals(arena, points, 2 * widest);
    tangent->unit_row = pk__take_indices(arena, rows * 2 * widest);
    tangent->unit_count = pk__take_indices(arena, rows);
    tangent->sums = pk__take_reals(arena, PK__HEAD_PART, PK__PAIR);
    tangent->tile_row = pk__take_indices(arena, most);
    tangent->panel_row = pk__take_indices(arena, most);
    tangent->pair_row = pk__take_indices(arena, places);
    for (size_t i = 0; tangent->panel_row && i < most; i++) {
        tangent->tile_row[i] = i * PK__TILE_LD;
        tangent->panel_row[i] = i * PK_PANEL;
    }
    for (size_t i = 0; tangent->panel_row && i < places; i++)
        tangent->pair_row[i] = i * PK__PAIR;
    for (size_t i = 0; tangent->panel_row && i < items; i++)
        tangent->ones[i] = 1;
    for (size_t i = 0; tangent->panel_row && i < items * outputs; i++)
        tangent->cell_left[i] = i / outputs * PK__TILE_LD;
}

PK__INTERNAL void pk__integral_take(pk__arena *arena, const pk_graph *graph, const pk_readout *readout,
                                    size_t rows, size_t materialise, size_t unit, int bounds,
                                    const pk__representation *representation, pk__integral *tangent)
{
    size_t outputs = pk_readout_count(readout, graph->output_width), layers = graph->layers;
    size_t points = pk__point_capacity(outputs), both = rows * outputs, widest = 0, deepest = 0, places = 0,
           place_numbers = 0, by_rows = 0;
    memset(tangent, 0, sizeof *tangent);
    tangent->graph = graph;
    tangent->outputs = outputs;
    tangent->row_capacity = rows;
    tangent->unit = unit;
    tangent->output_capacity = tangent->output_count = materialise ? materialise : outputs;
    tangent->allowance = pk__rounding_allowance(graph);
    points = pk__max(points, PK_GAUSS_NODES + 2);
    tangent->reverse_points = pk__reverse_points(graph, points, outputs);
    pk__integrator_take(arena, graph, rows, points, tangent->reverse_points, outputs, bounds,
                        &tangent->integrator);
    tangent->integrator.readout = *readout;
    points = tangent->reverse_points;
    tangent->kind = pk__arena_take(arena, layers, sizeof *tangent->kind);
    tangent->node = pk__arena_take(arena, layers, sizeof *tangent->node);
    tangent->integrated = pk__arena_take(arena, layers, sizeof *tangent->integrated);
    tangent->headed = pk__arena_take(arena, layers, sizeof *tangent->headed);
    tangent->head = pk__arena_take(arena, layers, sizeof *tangent->head);
    tangent->delta = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->input = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->phi = pk__arena_take(arena, layers, sizeof(pk_real *));
    tangent->check = bounds ? pk__arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    tangent->size = bounds ? pk__arena_take(arena, layers, sizeof(pk_real *)) : NULL;
    for (size_t l = 0; l < layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        pk__layer_kind kind = pk__kind_of_layer(node, readout, bounds, representation);
        size_t fan_in = pk__layer_input(graph, node)->width;
        const int spread = node->tangent_form == PK_TANGENT_OUTER && !pk__is_outer(node);
        int hoisted = kind == PK__LAYER_DATA || kind == PK__LAYER_LINEAR;
        int phi_wanted =
            kind == PK__LAYER_ROWS || (kind == PK__LAYER_POINTS && !spread && (materialise || bounds));
        pk_real *delta = hoisted ? pk__arena_take(arena, both, node->width * sizeof *delta) : NULL;
        pk_real *input = kind == PK__LAYER_LINEAR ? pk__arena_take(arena, rows, fan_in * sizeof *input) : NULL;
        const size_t cells = rows * tangent->output_capacity, bytes = node->weight_count * sizeof(pk_real);
        pk_real *phi = phi_wanted ? pk__arena_take(arena, cells, bytes) : NULL;
        pk_real *check = bounds ? pk__arena_take(arena, cells, bytes) : NULL;
        pk_real *size = bounds ? pk__arena_take(arena, cells, bytes) : NULL;
        if (tangent->check) {
            tangent->check[l] = check;
            tangent->size[l] = size;
        }
        if (tangent->kind) {
            tangent->kind[l] = kind;
            tangent->head[l] = kind == PK__LAYER_POINTS && !bounds && readout->kind != PK_READOUT_FUNCTION
                                   ? pk__head_of(graph, node)
                                   : NULL;
            tangent->node[l] = node;
            tangent->delta[l] = delta;
            tangent->input[l] = input;
            tangent->phi[l] = phi;
        }
        if (phi_wanted)
            deepest = pk__max(deepest, fan_in);
        if (spread) {
            const size_t together = pk__place_points(node, outputs) * node->positions;
            places = pk__max(places, together);
            place_numbers = pk__max(place_numbers, together * (node->fan_in + outputs * node->fan_out));
        }
        widest = pk__max(widest, node->width);
        by_rows = pk__max(by_rows, kind == PK__LAYER_ROWS ? node->weight_count : 0);
    }
    for (int v = 0; v < PK__DIRECTIONS; v++)
        tangent->along[v] = pk__arena_take(arena, both, sizeof(pk_real));
    tangent->weight_sum = pk__arena_take(arena, rows, sizeof(pk_real));
    tangent->begun = pk__arena_take(arena, rows, 1);
    pk__contraction_take(arena, points, places, place_numbers, !representation->materialised, tangent);
    /* Products with a direction (points x widest), slopes of the units of a row or its outputs, or a point's gradients of a
     * layer by rows (outputs x weights). */
    tangent->scratch =
        pk__arena_take(arena,
                       pk__max(pk__max(pk__max(points * (bounds ? outputs : 2), rows), 2 * outputs) * widest,
                               outputs * by_rows),
                       sizeof(pk_real));
    tangent->weighted = pk__arena_take(arena, points, deepest * sizeof(pk_real));
    tangent->absolute = bounds ? pk__arena_take(arena, points, deepest * sizeof(pk_real)) : NULL;
    points = tangent->integrator.segment.point_capacity;
    pk__points_take(arena, points, bounds, &tangent->sorted);
}

PK__END_COLD_CODE

/* pathkernel/features/product.h: implementation */
#include <string.h>
PK__BEGIN_CODE

/* The first panel of a block of examples, of features a number each. */
static const pk_real *pk__first_panel(const pk_real *all, size_t features, size_t first)
{
    return all + first * features; /* first is a multiple of PK_PANEL */
}

/* Columns of the panels that are multiplied together: with AVX-512 tiles are as wide as two. */
static size_t pk__columns_at_once(void)
{
    return PK__HAS_AVX512 ? (size_t)PK__PAIR : (size_t)PK_PANEL;
}

/* Of the panels of a block, those from column on. */
static pk__panels pk__panels_at(const pk_real *panels, size_t features, size_t column, size_t block)
{
    const pk__panels own = {pk__blocks(pk__min(pk__columns_at_once(), block - column), PK_PANEL),
                            pk__first_panel(panels, features, column), PK_PANEL, features * PK_PANEL, 0};
    return own;
}

/* The same, with those behind them, where there are some, fetched in the meantime: tiles are short, so that the processor
 * would see too late that they go on there. Tiles of AVX-512 fetch as they go; else the first-level cache, which is small,
 * takes the beginning of a deep panel, which leaves the room to what is multiplied. */
static pk__panels pk__fetch_panels(const pk_real *panels, size_t features, size_t column, size_t block)
{
    const size_t next = column + pk__columns_at_once();
    pk__panels own = pk__panels_at(panels, features, column, block);
    own.ahead = next < block ? features * pk__columns_at_once() : 0;
#if defined(__GNUC__)
    const size_t rows = own.ahead && !PK__HAS_AVX512 ? pk__min(features, 128) : 0;
    for (size_t p = 0; p < rows; p++)
        __builtin_prefetch(panels + next * features + p * PK_PANEL);
#endif
    return own;
}

/* cells x columns of a tile = 0, up to the end of the last panel. */
PK__PRIVATE void pk__clear_tile(size_t cells, size_t columns, pk_real *tile)
{
    for (size_t i = 0; i < cells; i++)
        memset(tile + i * PK__TILE_LD, 0, pk__blocks(columns, PK_PANEL) * PK_PANEL * sizeof *tile);
}

/* For a block of examples: target form= start + A (rows x depth, rows one behind the other) times a panel, panel after panel,
 * for as many rows at a time as stay in the second-level cache. The panels of
 * the target lie side by side. */
static void pk__block_product(size_t rows, size_t depth, const pk_real *a, const pk_real *panels, size_t block,
                              const pk_real *start, const pk__tile_target *target)
{
    const size_t most = pk__part_rows(rows, depth);
    pk__tile_target part = *target;
    for (size_t first = 0; first < rows; first += most) {
        part.to_at = target->to_at + first;
        part.other_at = target->other_at ? target->other_at + first : NULL;
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            const pk__panels b = pk__fetch_panels(panels, depth, column, block);
            part.to = target->to + column;
            part.other = target->other ? target->other + column : NULL;
            pk__panel_product(pk__min(most, rows - first), depth, a + first * depth, depth, 1, &b,
                              start ? start + first : NULL, &part);
        }
    }
}

/* left = start + inputs of rows (rows x in) times those of a block of examples. */
static void pk__multiply_inputs(pk__integral *tangent, size_t layer, size_t rows, const pk_real *inputs,
                                const pk_real *start, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const size_t in = node->fan_in;
    pk__tile_target target = {PK__TILE_SET, tangent->left, tangent->tile_row, NULL, NULL, 0};
    pk__block_product(rows, in, inputs, pk__first_panel(tangent->examples->input[layer], in, first), block,
                      pk__has_bias(node) ? start : NULL, &target);
    tangent->flops += 2.0 * (double)block * (double)(rows * in);
}

/* tile += left o (cotangents of cells (cells x out) times those of a block of examples). */
static void pk__multiply_cotangents(pk__integral *tangent, size_t layer, size_t cells,
                                    const pk_real *cotangents, const size_t *to, const size_t *left,
                                    size_t first, size_t block)
{
    const size_t out = tangent->node[layer]->width;
    pk__tile_target target = {PK__TILE_HADAMARD, tangent->tile, to, tangent->left, left, PK_PANEL};
    pk__block_product(cells, out, cotangents, pk__first_panel(tangent->examples->cotangent[layer], out, first),
                      block, NULL, &target);
    tangent->flops += 2.0 * (double)block * (double)(cells * out);
}

/* ---- layers used at several places ----------------------------------------------------------------------- */

/* One layer used at several places, one block of examples, the points in hand: every place of a point with every place
 * of an example, tile += w_p sum_qr (a_pq . a_ir + bias) (delta_pq . delta_ir). */
static void pk__contract_places(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                                size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk__examples *examples = tangent->examples;
    const size_t outputs = tangent->outputs, positions = node->positions, in = node->fan_in,
                 out = node->fan_out, together = pk__place_points(node, outputs);
    const pk_real *input_panels = pk__first_panel(examples->input[layer], positions * in, first);
    const pk_real *cotangent_panels = pk__first_panel(examples->cotangent[layer], positions * out, first);
    for (size_t p = 0; p < points->count; p += together) {
        const size_t count = pk__min(together, points->count - p), pairs = count * positions;
        pk_real *places = tangent->places, *deltas = places + pairs * in, *start = tangent->place_start;
        for (size_t i = 0; i < count; i++)
            pk__node_places(&tangent->integrator.segment.tape, node, p + i, outputs,
                            places + i * positions * in, deltas + i * positions * outputs * out);
        for (size_t i = 0; i < pairs; i++) {
            const size_t point = p + i / positions;
            start[i] = points->weight[point];
            for (size_t j = 0; j < in; j++)
                places[i * in + j] *= start[i];
            for (size_t k = 0; k < outputs; k++) {
                tangent->place_to[i * outputs + k] = (points->row[point] * outputs + k) * PK__TILE_LD;
                tangent->place_left[i * outputs + k] = i * PK__PAIR;
            }
        }
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            pk__panels inputs = pk__panels_at(input_panels, positions * in, column, block);
            pk__panels cotangents = pk__panels_at(cotangent_panels, positions * out, column, block);
            pk__tile_target left = {PK__TILE_SET, tangent->left, tangent->pair_row, NULL, NULL, 0};
            pk__tile_target tile = {PK__TILE_HADAMARD, tangent->tile + column, tangent->place_to,
                                    tangent->left,     tangent->place_left,    PK_PANEL};
            for (size_t r = 0; r < positions; r++) {
                pk__panel_product(pairs, in, places, in, 1, &inputs, pk__has_bias(node) ? start : NULL, &left);
                pk__panel_product(pairs * outputs, out, deltas, out, 1, &cotangents, NULL, &tile);
                inputs.first += in * PK_PANEL;
                cotangents.first += out * PK_PANEL;
            }
        }
        tangent->flops += 2.0 * (double)(block * pairs * positions) * (double)(in + outputs * out);
    }
}

/* ---- the layer below the last one ------------------------------------------------------------------------ */

/* 1 where the layer's cotangents are the unit matrix: the last layer of all outputs. */
static int pk__is_readout(const pk__integral *tangent, size_t layer)
{
    return tangent->kind[layer] == PK__LAYER_LINEAR && tangent->integrator.readout.kind == PK_READOUT_ALL &&
           tangent->node[layer] == &tangent->graph->nodes[tangent->graph->node_count - 1];
}

/* W^T seed_k and D^T seed_k of the last layer side by side: seeds are its cotangents. For every row and output, a row's behind
 * those of all rows; where the seeds are unit vectors, those of all rows are the rows of W and D. */
static void pk__head_weights(pk__integral *tangent, const pk_node *head)
{
    const pk__path *segment = &tangent->integrator.segment;
    const size_t outputs = tangent->outputs, out = head->width, in = head->fan_in;
    const int shared = pk__is_readout(tangent, head->layer);
    for (size_t part = 0; part < 2; part++) {
        const pk_real *matrix = (part ? segment->direction : segment->weights) + head->weight_offset;
        pk_real *to = tangent->head_weights + part * in;
        if (!shared)
            pk__gemm(0, 0, tangent->rows * outputs, in, out, 1, tangent->delta[head->layer], out, matrix, in, 0,
                     to + outputs * 2 * in, 2 * in);
        for (size_t k = 0; k < outputs && shared; k++)
            memcpy(to + k * 2 * in, matrix + k * in, in * sizeof *to);
    }
}

/* Where the weights of a row stand, of in units below the last layer. */
static pk_real *pk__weights_of_row(const pk__integral *tangent, const pk_node *head, size_t row)
{
    const size_t all = tangent->outputs * 2 * head->fan_in;
    const int shared = pk__is_readout(tangent, head->layer) && tangent->unit_count[row] == head->fan_in;
    return tangent->head_weights + (shared ? 0 : (row + 1) * all);
}

/* w slope and w t slope of the operation between the layer and the last one, at the points in hand. */
static void pk__head_slopes(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk__tape *tape = &tangent->integrator.segment.tape;
    const pk_node *between = pk__layer_input(tangent->graph, tangent->head[layer]);
    const size_t out = between->width;
    pk_real *weights = tangent->slopes, *slopes = tangent->scratch;
    pk_call call;
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++)
            weights[p * out + i] = points->weight[p];
    pk__pass_call(tape, between, points->count, 1, &call);
    call.out_cotangent = weights;
    call.in_cotangent[0] = slopes;
    between->operation->reverse(&call);
    for (size_t p = 0; p < points->count; p++)
        for (size_t i = 0; i < out; i++) {
            tangent->slopes[p * 2 * out + i] = slopes[p * out + i];
            tangent->slopes[p * 2 * out + out + i] = points->t[p] * slopes[p * out + i];
        }
}

/* to = the columns of the units that are on, side by side, of count rows of 2 out numbers; from may be to. */
static void pk__keep_units(size_t count, size_t out, size_t units, const size_t *unit_row, const pk_real *from,
                           pk_real *to)
{
    for (size_t i = 0; i < count; i++, from += 2 * out, to += 2 * out)
        for (size_t j = 0; j < 2 * units; j++)
            to[j] = from[unit_row[j] / PK_PANEL + (j < units ? 0 : out)];
}

/* What a headed layer is multiplied with: slopes and weights of the units whose slope is not 0 at all points of their row, as
 * that of a ReLU is where it is off. */
static void pk__prepare_head(pk__integral *tangent, size_t layer, const pk__points *points)
{
    const pk_node *head = tangent->head[layer];
    const size_t outputs = tangent->outputs, out = head->fan_in;
    pk__head_weights(tangent, head);
    pk__head_slopes(tangent, layer, points);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p];
        size_t *unit_row = tangent->unit_row + row * 2 * out, units = 0;
        pk_real *slopes = tangent->slopes + p * 2 * out;
        last = pk__row_end(points, p);
        for (size_t j = 0; j < out; j++) {
            int on = 0;
            for (size_t i = 0; i < last - p; i++)
                on |= slopes[i * 2 * out + j] != 0;
            if (on)
                unit_row[units++] = j * PK_PANEL;
        }
        memcpy(unit_row + units, unit_row, units * sizeof *unit_row);
        tangent->unit_count[row] = units;
        if (units < out) {
            pk_real *weights = pk__weights_of_row(tangent, head, row);
            pk__keep_units(last - p, out, units, unit_row, slopes, slopes);
            pk__keep_units(outputs, out, units, unit_row,
                           pk__is_readout(tangent, head->layer) ? tangent->head_weights : weights, weights);
        }
    }
}

/* One layer below the last, one block of examples: tile += sum_j (W_kj Q_ji + D_kj R_ji) delta_ij with
 * Q = sum_p w_p slope_p (a_p . a_i + bias) and R the same with t_p: outputs cost once a row, not once a point. */
static void pk__contract_head(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                              size_t block)
{
    const pk_node *node = tangent->node[layer];
    const size_t outputs = tangent->outputs, out = node->width;
    const pk_real *cotangents = pk__first_panel(tangent->examples->cotangent[layer], out, first);
    pk__multiply_inputs(tangent, layer, points->count, tangent->integrator.segment.tape.value[node->inputs[0]],
                        tangent->ones, first, block);
    for (size_t p = 0, last; p < points->count; p = last) {
        const size_t row = points->row[p], units = 2 * tangent->unit_count[row];
        const pk_real *slopes = tangent->slopes + p * 2 * out;
        const pk_real *weights = pk__weights_of_row(tangent, tangent->head[layer], row);
        const size_t *unit_row = tangent->unit_row + row * 2 * out;
        pk__tile_target tile = {PK__TILE_ADD, NULL, tangent->tile_row, NULL, NULL, 0};
        last = pk__row_end(points, p);
        for (size_t column = 0; column < block; column += pk__columns_at_once()) {
            const pk__panels b = pk__fetch_panels(cotangents, out, column, block);
            const pk__panels left = {b.count, tangent->left + p * PK__TILE_LD + column, PK__TILE_LD, PK_PANEL,
                                     0};
            const pk__panels sums = {b.count, tangent->sums, PK__PAIR, PK_PANEL, 0};
            tile.to = tangent->tile + row * outputs * PK__TILE_LD + column;
            for (size_t j = 0; j < units; j += PK__HEAD_PART) {
                const size_t count = pk__min(PK__HEAD_PART, units - j);
                pk__panel_sums(count, last - p, slopes + j, 2 * out, &left, b.first, b.apart, unit_row + j,
                               tangent->sums);
                pk__panel_product(outputs, count, weights + j, 2 * out, 1, &sums, NULL, &tile);
            }
        }
        tangent->flops += 4.0 * (double)block * (double)(out * (last - p + outputs));
    }
}

/* ---- layers whose sum over points is taken first --------------------------------------------------------- */

/* left = x . x_i + bias of a layer on data: from the Gram matrix of the inputs, where there is one. */
static void pk__multiply_data(pk__integral *tangent, size_t layer, size_t first, size_t block)
{
    const pk_node *node = tangent->node[layer];
    const pk__examples *examples = tangent->examples;
    const pk_real bias = pk__has_bias(node);
    if (!tangent->gram || node->inputs[0] != 0) {
        pk__multiply_inputs(tangent, layer, tangent->rows, tangent->integrator.segment.base[node->inputs[0]],
                            tangent->ones, first, block);
        return;
    }
    const int64_t *items = examples->items + first;
    for (size_t r = 0; r < tangent->rows; r++) {
        const pk_real *gram = tangent->gram + r * tangent->gram_ld;
        pk_real *left = tangent->left + r * PK__TILE_LD;
        if (examples->consecutive)
            for (size_t i = 0; i < block; i++)
                left[i] = gram[(size_t)items[0] + i] + bias;
        else
            for (size_t i = 0; i < block; i++)
                left[i] = gram[items[i]] + bias;
        for (size_t i = block; i % PK_PANEL; i++)
            left[i] = 0;
    }
}

/* tile = or, unless fresh, += left o cotangents of the examples, output by output. */
static void pk__add_readout(pk__integral *tangent, size_t layer, size_t first, size_t block, int fresh)
{
    const size_t outputs = tangent->outputs;
    const pk_real *panels = pk__first_panel(tangent->examples->cotangent[layer], outputs, first);
    for (size_t cell = 0; cell < tangent->rows * outputs; cell++) {
        const pk_real *left = tangent->left + cell / outputs * PK__TILE_LD;
        pk_real *tile = tangent->tile + cell * PK__TILE_LD;
        for (size_t column = 0; column < block; column += PK_PANEL) {
            const pk_real *right = panels + column * outputs + cell % outputs * PK_PANEL;
            if (fresh)
                for (size_t i = 0; i < PK_PANEL; i++)
                    tile[column + i] = left[column + i] * right[i];
            else
                for (size_t i = 0; i < PK_PANEL; i++)
                    tile[column + i] += left[column + i] * right[i];
        }
    }
}

/* ---- a step ---------------------------------------------------------------------------------------------- */

/* Where a layer has something to contract now. */
static int pk__is_due(const pk__integral *tangent, size_t layer, const pk__points *points)
{
    return !tangent->integrated[layer] &&
           (tangent->kind[layer] == PK__LAYER_POINTS ? points->count > 0 : points->last);
}

/* What all blocks of examples are multiplied with, beside what stands in the tape: inputs of points times their weights, and
 * the cell of the tile and the row of left that each product belongs to. */
static void pk__prepare_layers(pk__integral *tangent, const pk__points *points)
{
    const size_t outputs = tangent->outputs;
    for (size_t p = 0; p < points->count; p++)
        for (size_t k = 0; k < outputs; k++)
            tangent->point_to[p * outputs + k] = (points->row[p] * outputs + k) * PK__TILE_LD;
    for (size_t l = 0; points->count && l < tangent->graph->layers; l++) {
        const pk_node *node = tangent->node[l];
        const pk_real *inputs = tangent->integrator.segment.tape.value[node->inputs[0]];
        const size_t in = node->fan_in;
        if (tangent->integrated[l] || tangent->kind[l] != PK__LAYER_POINTS || pk__is_spread(tangent, l))
            continue;
        if (tangent->headed[l]) /* at most one layer stands below the last one */
            pk__prepare_head(tangent, l, points);
        else
            for (size_t p = 0; p < points->count; p++)
                for (size_t i = p * in; i < (p + 1) * in; i++)
                    tangent->weighted_inputs[l][i] = points->weight[p] * inputs[i];
    }
}

/* fresh: the tile holds nothing yet. */
static void pk__contract_layer(pk__integral *tangent, size_t layer, const pk__points *points, size_t first,
                               size_t block, int fresh)
{
    const size_t outputs = tangent->outputs, rows = tangent->rows, count = points->count;
    if (fresh && !pk__is_readout(tangent, layer))
        pk__clear_tile(rows * outputs, block, tangent->tile);
    if (pk__is_spread(tangent, layer)) {
        pk__contract_places(tangent, layer, points, first, block);
    } else if (tangent->kind[layer] == PK__LAYER_POINTS && tangent->headed[layer]) {
        pk__contract_head(tangent, layer, points, first, block);
    } else if (tangent->kind[layer] == PK__LAYER_POINTS) {
        const pk_node *node = tangent->node[layer];
        pk__multiply_inputs(tangent, layer, count, tangent->weighted_inputs[layer], points->weight, first,
                            block);
        pk__multiply_cotangents(tangent, layer, count * outputs,
                                tangent->integrator.segment.tape.cotangent[node - tangent->graph->nodes],
                                tangent->point_to, tangent->cell_left, first, block);
    } else {
        if (tangent->kind[layer] == PK__LAYER_DATA)
            pk__multiply_data(tangent, layer, first, block);
        else
            pk__multiply_inputs(tangent, layer, rows, tangent->input[layer], tangent->weight_sum, first, block);
        if (pk__is_readout(tangent, layer))
            pk__add_readout(tangent, layer, first, block, fresh);
        else
            pk__multiply_cotangents(tangent, layer, rows * outputs, tangent->delta[layer], tangent->tile_row,
                                    tangent->cell_left, first, block);
    }
}

/* The tiles of the factored layers, block after block of examples: of the points in hand and, after the last
 * ones, of what was summed over the step. */
PK__PRIVATE void pk__contract(pk__integral *tangent, const pk__points *points)
{
    const pk__examples *examples = tangent->examples;
    const size_t layers = tangent->graph->layers;
    double start = pk__seconds();
    if (examples && examples->count)
        pk__prepare_layers(tangent, points);
    for (size_t first = 0; examples && first < examples->count; first += PK__EXAMPLE_BLOCK) {
        const size_t block = pk__min(PK__EXAMPLE_BLOCK, examples->count - first);
        int filled = 0;
        for (size_t i = 0; i < layers; i++) {
            const size_t l = (i + layers - 1) % layers; /* the last one first: it may set the tile */
            if (!pk__is_due(tangent, l, points))
                continue;
            pk__contract_layer(tangent, l, points, first, block, !filled || tangent->per_layer);
            filled = 1;
            if (tangent->per_layer)
                tangent->sink(tangent->user, (int)l, first, block, tangent->tile);
        }
        if (filled && !tangent->per_layer)
            tangent->sink(tangent->user, -1, first, block, tangent->tile);
    }
    tangent->seconds_contraction += pk__seconds() - start;
}

/* How a layer is contracted in a step: the cost model, with the points per row of the last step. */
PK__PRIVATE void pk__choose_contraction(pk__integral *tangent, size_t layer, pk_engine engine)
{
    const pk_node *node = tangent->node[layer];
    const int is_points = tangent->kind[layer] == PK__LAYER_POINTS && !pk__is_spread(tangent, layer);
    double in = (double)node->fan_in, out = (double)node->width;
    double outputs = (double)tangent->outputs, batch = tangent->examples ? (double)tangent->examples->count : 1;
    double points = (double)tangent->integrator.points_last / (double)pk__max(tangent->rows, 1);
    /* Flops a row. What is done with a tile of registers costs about 8 flops a number; few points make small tiles. */
    double factored = points * batch * (2 * (outputs * out + in) + 8 * outputs);
    double headed = batch * (points * 2 * in + out * (6 * points + 8) + 4 * outputs * out);
    double integrated = 3 * points * outputs * out * in + batch * outputs * out * (2 * in + 8);
    const int automatic = engine == PK_ENGINE_AUTO && is_points;
    tangent->headed[layer] = tangent->head[layer] && (engine == PK_ENGINE_HEAD ||
                                                      (automatic && headed < factored && headed < integrated));
    tangent->integrated[layer] =
        tangent->kind[layer] == PK__LAYER_ROWS ||
        (!pk__is_spread(tangent, layer) && (engine == PK_ENGINE_INTEGRATED || tangent->check)) ||
        (automatic && tangent->phi[layer] && !tangent->headed[layer] && integrated < factored);
}

/* tile += sum over the places of an example of (e_k a_i + bias) . delta_i, output after output and unit after unit. */
static void pk__contract_matrix(pk__integral *tangent, size_t layer, size_t outputs, const pk_real *e,
                                size_t first, size_t columns, pk_real *tile)
{
    const pk_node *node = tangent->node[layer];
    const size_t in = node->fan_in, out = node->fan_out, places = node->positions,
                 most = pk__part_rows(node->fan_out, node->fan_in);
    /* Matrix and bias stand together where a layer is materialised row by row; else all matrices, then all biases. */
    const int together = tangent->kind[layer] == PK__LAYER_ROWS;
    const size_t stride = together ? node->weight_count : out * in, bias_stride = together ? stride : out;
    const pk_real *biases = pk__has_bias(node) ? e + (together ? out * in : outputs * out * in) : NULL;
    const pk_real *panels = pk__first_panel(tangent->examples->input[layer], places * in, first);
    const pk_real *cotangents = pk__first_panel(tangent->examples->cotangent[layer], places * out, first);
    pk__tile_target target = {PK__TILE_DOT, NULL, NULL, NULL, tangent->panel_row, places * out * PK_PANEL};
    for (size_t k = 0; k < outputs; k++)
        for (size_t j = 0; j < out; j += most)
            for (size_t column = 0; column < columns; column += pk__columns_at_once()) {
                pk__panels inputs = pk__panels_at(panels, places * in, column, columns);
                target.to = tile + k * PK__TILE_LD + column;
                for (size_t q = 0; q < places; q++, inputs.first += in * PK_PANEL) {
                    target.other = cotangents + column * places * out + (q * out + j) * PK_PANEL;
                    pk__panel_product(pk__min(most, out - j), in, e + k * stride + j * in, in, 1, &inputs,
                                      biases ? biases + k * bias_stride + j : NULL, &target);
                }
            }
    tangent->flops += 2.0 * (double)(outputs * out * places) * (double)columns * (double)in;
}

PK__INTERNAL void pk__integral_contract_row(pk__integral *tangent, size_t layer, size_t outputs,
                                            const pk_real *e, size_t first, size_t columns, pk_real *tile)
{
    const pk__examples *examples = tangent->examples;
    const size_t weights = tangent->node[layer]->weight_count;
    double start = pk__seconds();
    if (!examples->rows[layer]) {
        pk__contract_matrix(tangent, layer, outputs, e, first, columns, tile);
    } else {
        pk__gemm(0, 0, outputs, columns, weights, 1, e, weights, examples->rows[layer] + first, examples->ld, 1,
                 tile, PK__TILE_LD);
        tangent->flops += 2.0 * (double)outputs * (double)columns * (double)weights;
    }
    tangent->seconds_contraction += pk__seconds() - start;
}

PK__END_CODE

/* pathkernel/features/integral.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* F(direction, a) of every row for a layer on data, which the segment has where it goes along that direction; else NULL. */
static const pk_real *pk__known_product(const pk__integral *tangent, size_t layer, const pk_real *direction)
{
    const pk__path *segment = &tangent->integrator.segment;
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
    const pk__path *segment = &tangent->integrator.segment;
    const pk_real *transposed = segment->tape.transposed;
    return !transposed                       ? NULL
           : direction == segment->weights   ? transposed
           : direction == segment->direction ? transposed + tangent->graph->parameters
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
    const pk__tape *tape = &tangent->integrator.segment.tape;
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
    const pk__tape *tape = &tangent->integrator.segment.tape;
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
            pk__node_places(&tangent->integrator.segment.tape, node, i, outputs, own,
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
    const pk__tape *tape = &tangent->integrator.segment.tape;
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
    const pk__tape *tape = &tangent->integrator.segment.tape;
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
    pk__path *segment = &tangent->integrator.segment;
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

static void pk__integral_points(void *user, const pk__points *unsorted)
{
    pk__integral *tangent = user;
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
    pk__path_begin(&tangent->integrator.segment, weights, direction, transposed, rows, inputs);
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
    size_t before = tangent->integrator.points;
    pk__integrate(&tangent->integrator, pk__integral_points, tangent);
    tangent->integrator.points_last = tangent->integrator.points - before;
    for (size_t l = 0; tangent->check && l < graph->layers; l++)
        for (size_t i = 0; i < chosen * tangent->node[l]->weight_count; i++)
            tangent->size[l][i] += (pk_real)(2 * fabs(tangent->check[l][i]));
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
        (data ? tangent->integrator.segment.base[node->inputs[0]] : tangent->input[layer]) + row * node->fan_in;
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

/* pathkernel/attribution/decomposition.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

PK_API size_t pk_strongest(const double *values, size_t count, int sign, size_t wanted, size_t *indices)
{
    size_t found = 0;
    for (size_t i = 0; i < count && wanted; i++) {
        double value = sign < 0 ? -values[i] : values[i];
        if (!(value > 0))
            continue;
        size_t at = found;
        while (at > 0 && value > (sign < 0 ? -values[indices[at - 1]] : values[indices[at - 1]]))
            at--;
        if (at == wanted)
            continue;
        found = pk__min(found + 1, wanted);
        memmove(indices + at + 1, indices + at, (found - at - 1) * sizeof *indices);
        indices[at] = i;
    }
    return found;
}

/* ---- results --------------------------------------------------------------------------------------- */

/* value is worse than worst; a NaN is the worst. */
PK__PRIVATE int pk__worse(double value, double worst)
{
    return !(value <= worst) && !isnan(worst);
}

PK__PRIVATE pk_status pk__keep(pk_context *context, const pk_decompose_options *options, pk_decomposition *out)
{
    out->kept_count = 0;
    for (int i = 0; i < PK_KEPT && (options->keep[i] || i == 0); i++) {
        unsigned axes = options->keep[i] ? options->keep[i] : (unsigned)PK_BY_EXAMPLE;
        if (axes == PK_BY_TOTAL)
            continue;
        if (axes >= PK_BY_TOTAL || (axes & PK_BY_EXAMPLE && axes & PK_BY_GROUP))
            return pk__fail(context, PK_ARGUMENT, "keep[%d] = %u is no sum of axes that can be kept", i, axes);
        if (axes & PK_BY_GROUP && (!options->groups || !options->group_count))
            return pk__fail(context, PK_ARGUMENT, "keep[%d] wants groups, but no groups are given", i);
        pk_tensor *tensor = &out->kept[out->kept_count++];
        const size_t sizes[4] = {out->examples, out->groups, out->steps, out->layers};
        memset(tensor, 0, sizeof *tensor);
        tensor->axes = axes;
        tensor->shape[0] = out->rows;
        tensor->shape[1] = out->outputs;
        tensor->rank = 2;
        tensor->row_items = out->outputs;
        for (int axis = 0; axis < 4; axis++) {
            if (!(axes & (1U << axis)))
                continue;
            tensor->shape[tensor->rank++] = sizes[axis];
            if (!pk__multiply(tensor->row_items, sizes[axis], &tensor->row_items))
                return pk__fail(context, PK_OVERFLOW, "keep[%d]: the size of a kept tensor overflows", i);
        }
    }
    return PK_OK;
}

static void pk__name_tensors(pk_decomposition *out)
{
    out->by_example = out->by_step = out->by_layer = NULL;
    for (size_t i = 0; i < out->kept_count; i++) {
        if (out->kept[i].axes == PK_BY_EXAMPLE)
            out->by_example = out->kept[i].data;
        if (out->kept[i].axes == PK_BY_STEP)
            out->by_step = out->kept[i].data;
        if (out->kept[i].axes == PK_BY_LAYER)
            out->by_layer = out->kept[i].data;
    }
}

PK_API void pk_decomposition_release(pk_context *context, pk_decomposition *decomposition)
{
    pk_release(context, decomposition->initial); /* the six of rows x outputs are one piece */
    for (size_t i = 0; i < decomposition->kept_count; i++)
        pk_release(context, decomposition->kept[i].data);
    pk_release(context, decomposition->bounds);
    pk_release(context, decomposition->step_closure);
    memset(decomposition, 0, sizeof *decomposition);
}

static void pk__split_six(double *memory, size_t cells, pk_decomposition *out)
{
    out->initial = memory;
    out->final = memory ? memory + cells : NULL;
    out->data = memory ? memory + 2 * cells : NULL;
    out->decay = memory ? memory + 3 * cells : NULL;
    out->unattributed = memory ? memory + 4 * cells : NULL;
    out->closure = memory ? memory + 5 * cells : NULL;
}

/* Arrays for out->rows rows. */
PK__PRIVATE pk_status pk__allocate_results(pk_context *context, const pk_decompose_options *options,
                                           pk_decomposition *out)
{
    double *memory = NULL;
    size_t cells = out->rows * out->outputs;
    pk_status status = pk_allocate(context, cells, 6 * sizeof *memory, "the results", &memory);
    pk__split_six(memory, cells, out);
    for (size_t i = 0; !status && i < out->kept_count; i++) {
        size_t count = 0;
        out->kept[i].shape[0] = out->rows;
        status = pk__multiply(out->rows, out->kept[i].row_items, &count)
                     ? pk_allocate(context, count, sizeof(double), "a kept tensor", &out->kept[i].data)
                     : pk__fail(context, PK_OVERFLOW, "the size of a kept tensor overflows");
    }
    if (!status && options->bounds)
        status = pk_allocate(context, cells, out->examples * sizeof(double), "the bounds", &out->bounds);
    if (!status && options->step_closure)
        status =
            pk_allocate(context, cells, out->steps * sizeof(double), "the closure by step", &out->step_closure);
    pk__name_tensors(out);
    return status;
}

/* A view of rows of whole, for a pass to write into. */
PK__PRIVATE void pk__view_rows(const pk_decomposition *whole, size_t first, size_t rows, pk_decomposition *part)
{
    size_t cell = (first - whole->first_row) * whole->outputs;
    *part = *whole;
    part->first_row = first;
    part->rows = rows;
    part->initial += cell;
    part->final += cell;
    part->data += cell;
    part->decay += cell;
    part->unattributed += cell;
    part->closure += cell;
    for (size_t i = 0; i < part->kept_count; i++) {
        part->kept[i].shape[0] = rows;
        if (part->kept[i].data)
            part->kept[i].data += (first - whole->first_row) * part->kept[i].row_items;
    }
    if (part->bounds)
        part->bounds += cell * whole->examples;
    if (part->step_closure)
        part->step_closure += cell * whole->steps;
    pk__name_tensors(part);
}

PK__END_COLD_CODE

/* pathkernel/attribution/steps.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_CODE

/* Parameters that are updated together: a few vectors of them fit the cache. The optimiser's state stands part by part,
 * each part's vectors one behind the other. */
enum { PK__STATE_PART = 4096 };
/* Numbers that are read or updated, at least, where several threads share that. */
enum { PK__WINDOW_WORTH = 1 << 18 };

PK__INTERNAL void pk__steps_begin(const pk_run *run, pk__window *window)
{
    memset(window, 0, sizeof *window);
    window->run = run;
    window->parameters = run->graph.parameters;
    for (size_t s = 0; s < run->steps; s++) {
        pk_batch batch;
        pk_run_batch(run, s, &batch);
        window->largest_batch = pk__max(window->largest_batch, batch.count);
    }
    window->lanes = pk__max(1, pk__min(16, pk__blocks(window->largest_batch, PK__EXAMPLE_BLOCK)));
    window->state_vectors = pk_optimizer_state_vectors(&run->optimizer);
    pk_linear_form form;
    pk_optimizer_linear_form(&run->optimizer, 0, 1, run->graph.parameters, NULL, &form, NULL);
    window->preconditioned = form.preconditioned;
}

/* Windows that can be visited last to first with states states (the first one's among them) where none is gone
 * through more than again times: binomial(states + again, again). */
static double pk__binomial(double states, double again)
{
    double reach = again >= 0;
    for (double k = 1; k <= again; k++)
        reach = reach * (states + k) / k;
    return reach;
}

/* The fewest times that will do: pk__binomial(states, again) >= windows. */
static double pk__repeats(double windows, double states)
{
    double again = 0;
    for (double reach = 1; reach < windows; reach = reach * (states + again) / again)
        again++;
    return again;
}

PK__INTERNAL double pk__steps_again(size_t windows, size_t spare)
{
    const double count = (double)windows, states = (double)spare + 1;
    if (!spare) /* the formula below, at once */
        return windows ? count * (count - 1) / 2 : 0;
    const double again = pk__repeats(count, states);
    return again * count - pk__binomial(states + 1, again - 1);
}

/* How far ahead of a state the next one belongs, of windows >= 2 to be visited with states >= 2. */
static size_t pk__next_state(size_t windows, size_t states)
{
    const double count = (double)windows, all = (double)states, again = pk__repeats(count, all);
    const double most = pk__binomial(all, again - 1), left = count - pk__binomial(all - 1, again - 1);
    return (size_t)floor((most < left ? most : left) + 0.5);
}

static size_t pk__states_kept(const pk__window *window)
{
    return window->stride ? (window->windows - 1) / window->stride : 0; /* that of window 0 is zero */
}

PK__INTERNAL void pk__steps_take(pk__arena *arena, size_t capacity, size_t stride, size_t spare, size_t threads,
                                 int bounds, pk__window *window)
{
    const pk_graph *graph = &window->run->graph;
    const size_t real = sizeof(pk_real), P = window->parameters;
    size_t all = 0;
    window->pitch = pk__blocks(P, PK_PANEL) * PK_PANEL;
    if (!pk__multiply(capacity, window->pitch, &all))
        arena->overflow = 1;
    window->capacity = capacity;
    window->windows = pk__blocks(window->run->steps, capacity);
    window->threads = threads;
    window->stride = window->state_vectors && window->windows ? stride : 0;
    window->spare = window->stride ? spare : 0;
    window->spare_used = window->advanced = 0;
    window->bounds = bounds;
    window->weights = pk__arena_take(arena, capacity + 1, P * real);
    window->direction = pk__arena_take(arena, all, real);
    window->transposed = pk__pass_transposes(graph) ? pk__arena_take(arena, all, 2 * real) : NULL;
    window->remainder = pk__arena_take(arena, all, real);
    window->preconditioner = window->preconditioned ? pk__arena_take(arena, all, real) : NULL;
    /* Recorded moments are no result of gradients here: they have no error of their own. */
    window->states = bounds && window->preconditioned && !window->run->second_moments.data ? 3 : 1;
    window->preconditioner_error = window->states == 3 ? pk__arena_take(arena, all, real) : NULL;
    window->perturbed = window->states == 3 ? pk__arena_take(arena, 3 * P, real) : NULL;
    window->perturbed_weights = pk__arena_take(arena, bounds ? all : 0, real);
    window->gradient = pk__arena_take(arena, all, window->lanes * real);
    const size_t states = window->states * window->state_vectors;
    window->state = pk__arena_take(arena, states, P * real);
    window->saved = pk__arena_take(arena, pk__states_kept(window) + window->spare, states * P * real);
    window->spare_at = pk__arena_take(arena, window->spare, sizeof *window->spare_at);
    window->update = pk__arena_take(arena, threads, PK__STATE_PART * real);
    window->forms = pk__arena_take(arena, capacity, sizeof *window->forms);
    window->batches = pk__arena_take(arena, capacity, sizeof *window->batches);
    window->examples = pk__arena_take(arena, capacity, sizeof(pk__examples));
    window->magnitudes = bounds ? pk__arena_take(arena, capacity, sizeof(pk__examples)) : NULL;
    for (size_t j = 0; j < capacity && !arena->overflow; j++) {
        pk__examples measured;
        pk__examples_take(arena, graph, window->largest_batch, &window->representation,
                          window->examples ? &window->examples[j] : &measured);
        if (bounds)
            pk__examples_take(arena, graph, window->largest_batch, &window->representation,
                              window->magnitudes ? &window->magnitudes[j] : &measured);
    }
    window->workspaces = pk__arena_take(arena, threads, sizeof *window->workspaces);
    window->seconds = pk__arena_take(arena, threads, sizeof *window->seconds);
    pk__replay_take(arena, window->run, window->largest_batch, (int)threads, capacity, &window->replay);
    for (size_t w = 0; w < threads && !arena->overflow; w++) {
        pk__example_workspace measured;
        pk__example_workspace_take(arena, graph, pk__max(1, pk__min(window->largest_batch, PK__EXAMPLE_BLOCK)),
                                   window->workspaces ? &window->workspaces[w] : &measured);
        if (window->seconds)
            window->seconds[w] = 0;
    }
}

static pk_status pk__load_window(pk_context *context, pk__window *window, int advance)
{
    const size_t P = window->parameters;
    for (size_t j = 0; j < window->count + !advance; j++) {
        pk_status status =
            pk_replay_weights(context, &window->replay, window->first + j, window->weights + j * P);
        if (status)
            return status;
    }
    const size_t numbers = window->count * P * (!advance && window->transposed ? 4 : 1);
    pk__team team =
        pk__team_of(context, numbers >= (size_t)PK__WINDOW_WORTH ? (int)window->threads : 1, window->count);
    PK__PARALLEL(team)
    for (size_t j = pk__first_task(&team); j < window->count; j = pk__next_task(&team)) {
        const pk_real *from = window->weights + j * P;
        for (size_t i = 0; !advance && i < P; i++)
            window->direction[j * P + i] = from[P + i] - from[i];
        if (!advance && window->transposed) {
            pk_real *to = window->transposed + j * 2 * P;
            pk__pass_transpose(&window->run->graph, from, to);
            pk__pass_transpose(&window->run->graph, window->direction + j * P, to + P);
        }
        pk_run_batch(window->run, window->first + j, &window->batches[j]);
        pk__examples_begin(&window->examples[j], &window->batches[j]);
        if (window->magnitudes) {
            pk__examples_begin(&window->magnitudes[j], &window->batches[j]);
            pk__examples_perturb(P, from, window->perturbed_weights + j * P);
        }
    }
    pk__team_end(&team);
    return PK_OK;
}

/* Gradients of the examples of every step of the window, and their sums. A lane adds its blocks in order. */
static void pk__fill_window(pk_context *context, pk__window *window)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters, lanes = window->lanes;
    const size_t tasks = window->count * lanes;
    const int threads = (int)window->threads;
    pk__team team = pk__team_of(context, threads, tasks);
    PK__PARALLEL(team)
    for (size_t task = pk__first_task(&team); task < tasks; task = pk__next_task(&team)) {
        const size_t thread = (size_t)pk__thread(), j = task / lanes, lane = task % lanes;
        double start = pk__seconds();
        size_t blocks = pk__blocks(window->batches[j].count, PK__EXAMPLE_BLOCK),
               each = pk__blocks(blocks, lanes);
        pk_real *gradient = window->gradient + task * P;
        memset(gradient, 0, P * sizeof *gradient);
        for (size_t b = lane * each; b < pk__min(blocks, (lane + 1) * each); b++) {
            pk__examples_fill(&window->examples[j], &run->graph, run->loss, window->weights + j * P,
                              &run->train, &window->batches[j], b * PK__EXAMPLE_BLOCK,
                              &window->workspaces[thread], gradient);
            if (window->magnitudes)
                pk__examples_fill(&window->magnitudes[j], &run->graph, run->loss,
                                  window->perturbed_weights + j * P, &run->train, &window->batches[j],
                                  b * PK__EXAMPLE_BLOCK, &window->workspaces[thread], NULL);
        }
        window->seconds[thread] += pk__seconds() - start;
    }
    pk__team_end(&team);
    if (!window->magnitudes)
        return;
    team = pk__team_of(context, threads, window->count);
    PK__PARALLEL(team)
    for (size_t j = pk__first_task(&team); j < window->count; j = pk__next_task(&team))
        pk__examples_magnitude(&window->examples[j], &run->graph, &window->magnitudes[j]);
    pk__team_end(&team);
}

static int pk__has_moments(const pk__window *window)
{
    return window->preconditioned && window->run->second_moments.data;
}

/* The second moments that were recorded, into the place of p: what the optimiser did divide by, while a recomputed
 * moment of gradients that nearly cancel has few digits in common with that of a float32 run. */
static pk_status pk__read_moments(pk_context *context, pk__window *window, size_t j)
{
    const size_t P = window->parameters, step = window->first + j;
    pk_real *moments = window->preconditioner + j * window->pitch;
    pk_status status = pk_run_second_moments(context, window->run, step, moments);
    for (size_t i = 0; !status && i < P; i++)
        if (moments[i] < 0)
            status = pk__fail(context, PK_FORMAT, "second_moments.npy: parameter %zu is %g after step %zu", i,
                              (double)moments[i], step);
    return status;
}

/* D_s from its linear form, of count parameters. */
static void pk__update_from_form(const pk_linear_form *form, double scale, size_t count, const pk_real *p,
                                 const pk_real *m, const pk_real *gradient, const pk_real *weights,
                                 pk_real *update)
{
    for (size_t i = 0; i < count; i++)
        update[i] = (pk_real)(-p[i] * (form->enter * m[i] +
                                       form->direct * (scale * gradient[i] + form->coupled * weights[i])) -
                              form->decoupled * weights[i]);
}

/* The updates of the window's steps recomputed from their gradients, of count parameters from first on: u_s, and the
 * optimiser's linear form; or only its state. */
static void pk__recompute_updates(pk__window *window, size_t first, size_t count, int advance, pk_real *update)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters;
    const int recorded = pk__has_moments(window);
    pk_real *state = window->state_vectors ? window->state + window->state_vectors * first : NULL;
    for (size_t j = 0; j < window->count; j++) {
        const size_t step = window->first + j, at = j * P + first;
        const double rate = run->learning_rates[step], scale = pk_run_gradient_scale(run, step);
        const pk_real *weights = window->weights + at;
        pk_real *gradient = window->gradient + j * window->lanes * P + first;
        pk_real *p = window->preconditioner ? window->preconditioner + j * window->pitch + first : NULL;
        pk_linear_form form;
        for (size_t lane = 1; lane < window->lanes; lane++)
            for (size_t i = 0; i < count; i++)
                gradient[i] += gradient[lane * P + i];
        pk_optimizer_update(&run->optimizer, step, rate, scale, count, weights, gradient, state,
                            advance || recorded ? NULL : update);
        if (advance)
            continue;
        if (recorded)
            memcpy(state + (window->state_vectors - 1) * count, p, count * sizeof *p);
        if (p)
            pk_optimizer_linear_form(&run->optimizer, step, rate, count, state, &form, p);
        if (recorded)
            pk__update_from_form(&form, scale, count, p, state, gradient, weights, update);
        for (size_t i = 0; i < count; i++)
            window->remainder[at + i] = window->direction[at + i] - update[i];
    }
}

/* How far p_s may be off: Adam divides by the root of the mean of squared gradients, and a gradient that nearly
 * cancels has few digits. Two more optimisers get gradients that are smaller and larger by their rounding allowance; p
 * falls with the gradients' size, and the larger difference to their p is the error. */
static void pk__perturb_update(pk__window *window, size_t j, int advance)
{
    const pk_run *run = window->run;
    const size_t P = window->parameters, step = window->first + j;
    const pk_real *gradient = window->gradient + j * window->lanes * P, *weights = window->weights + j * P;
    double scale = pk_run_gradient_scale(run, step), coupled = window->forms[j].coupled;
    double allowance = pk__rounding_allowance(&run->graph);
    pk_real *sizes = window->perturbed, *perturbed = sizes + P, *p = perturbed + P;
    pk_real *error = window->preconditioner_error + j * window->pitch;
    memset(sizes, 0, P * sizeof *sizes);
    pk__examples_sum(&window->magnitudes[j], &run->graph, sizes);
    for (int larger = 0; larger < 2; larger++) {
        pk_real *state = window->state + (1 + (size_t)larger) * window->state_vectors * P;
        for (size_t i = 0; i < P; i++) {
            const double whole = scale * gradient[i] + coupled * weights[i];
            double change = scale * allowance * sizes[i];
            if (!larger)
                change = change < fabs(whole) ? -change : -fabs(whole);
            perturbed[i] = (pk_real)(gradient[i] + (scale != 0 ? (whole > 0 ? change : -change) / scale : 0));
        }
        pk_optimizer_update(&run->optimizer, step, run->learning_rates[step], scale, P, weights, perturbed,
                            state, NULL);
        if (advance)
            continue;
        pk_linear_form form;
        pk_optimizer_linear_form(&run->optimizer, step, run->learning_rates[step], P, state, &form, p);
        for (size_t i = 0; i < P; i++) {
            const double off = fabs((double)p[i] - (double)window->preconditioner[j * window->pitch + i]);
            error[i] = (pk_real)(larger && off < error[i] ? error[i] : off);
        }
    }
}

static pk_status pk__prepare_window(pk_context *context, pk__window *window, size_t first, size_t count,
                                    int advance)
{
    const size_t P = window->parameters, parts = pk__blocks(P, PK__STATE_PART);
    double start = pk__seconds();
    window->first = first;
    window->count = count;
    pk_status status = pk__load_window(context, window, advance);
    if (status)
        return status;
    window->seconds_read += pk__seconds() - start;
    pk__fill_window(context, window);
    start = pk__seconds();
    for (size_t j = 0; j < count; j++)
        pk_optimizer_linear_form(&window->run->optimizer, first + j, window->run->learning_rates[first + j], P,
                                 NULL, &window->forms[j], NULL);
    for (size_t j = 0; !advance && pk__has_moments(window) && j < count; j++) {
        status = pk__read_moments(context, window, j);
        if (status)
            return status;
    }
    const int worth = count * P * (window->lanes + 1) >= (size_t)PK__WINDOW_WORTH;
    pk__team team = pk__team_of(context, worth ? (int)window->threads : 1, parts);
    PK__PARALLEL(team)
    for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team))
        pk__recompute_updates(window, part * PK__STATE_PART, pk__min(PK__STATE_PART, P - part * PK__STATE_PART),
                              advance, window->update + (size_t)pk__thread() * PK__STATE_PART);
    pk__team_end(&team);
    for (size_t j = 0; window->states == 3 && j < count; j++)
        pk__perturb_update(window, j, advance);
    window->seconds_read += pk__seconds() - start;
    return PK_OK;
}

PK__INTERNAL pk_status pk__steps_prepare(pk_context *context, pk__window *window, size_t first, size_t count)
{
    return pk__prepare_window(context, window, first, count, 0);
}

/* From the state before window number index to the one behind it. */
static pk_status pk__advance_window(pk_context *context, pk__window *window, size_t index)
{
    const size_t first = index * window->capacity;
    window->advanced++;
    return pk__prepare_window(context, window, first, pk__min(window->capacity, window->run->steps - first), 1);
}

PK__INTERNAL pk_status pk__steps_save_states(pk_context *context, pk__window *window)
{
    const size_t numbers = window->states * window->state_vectors * window->parameters;
    const size_t last = pk__states_kept(window) * window->stride;
    memset(window->state, 0, numbers * sizeof(pk_real));
    for (size_t w = 0; w < last; w++) {
        pk_status status = pk__progress(context, "recomputing the optimiser's state", (double)w / (double)last);
        if (!status)
            status = pk__advance_window(context, window, w);
        if (status)
            return status;
        if ((w + 1) % window->stride == 0)
            memcpy(window->saved + ((w + 1) / window->stride - 1) * numbers, window->state,
                   numbers * sizeof(pk_real));
    }
    return PK_OK;
}

/* The state before window number index: from the nearest one that is there, leaving spare ones on the way. */
static pk_status pk__find_state(pk_context *context, pk__window *window, size_t index)
{
    const size_t numbers = window->states * window->state_vectors * window->parameters;
    const size_t kept = index / window->stride;
    pk_real *spare = window->saved ? window->saved + pk__states_kept(window) * numbers : NULL;
    size_t from = kept * window->stride;
    while (window->spare_used && window->spare_at[window->spare_used - 1] > index)
        window->spare_used--;
    if (window->spare_used && window->spare_at[0] < from)
        window->spare_used = 0; /* of another part of the run */
    const pk_real *nearest = kept ? window->saved + (kept - 1) * numbers : NULL;
    if (window->spare_used) {
        from = window->spare_at[window->spare_used - 1];
        nearest = spare + (window->spare_used - 1) * numbers;
    }
    if (nearest)
        memcpy(window->state, nearest, numbers * sizeof(pk_real));
    else
        memset(window->state, 0, numbers * sizeof(pk_real));
    while (from < index) {
        const size_t room = window->spare - window->spare_used;
        const size_t next = room ? from + pk__next_state(index + 1 - from, room + 1) : index;
        for (; from < next; from++) {
            pk_status status = pk__advance_window(context, window, from);
            if (status)
                return status;
        }
        if (room) {
            memcpy(spare + window->spare_used * numbers, window->state, numbers * sizeof(pk_real));
            window->spare_at[window->spare_used++] = from;
        }
    }
    return PK_OK;
}

PK__INTERNAL pk_status pk__steps_visit(pk_context *context, pk__window *window, size_t index)
{
    pk_status status = window->stride ? pk__find_state(context, window, index) : PK_OK;
    const size_t first = index * window->capacity;
    if (status)
        return status;
    return pk__prepare_window(context, window, first, pk__min(window->capacity, window->run->steps - first), 0);
}

PK__END_CODE

/* pathkernel/attribution/plan.h: implementation */
#include <math.h>
#include <string.h>
PK__BEGIN_COLD_CODE

/* ---- the job --------------------------------------------------------------------------------------- */

/* One thread's memory. */
typedef struct pk__worker {
    struct pk__job *job;
    pk__integral tangent;
    pk_real *phi,
        *effective;      /* outputs of a part x weights of its layer; effective where E is no multiple of R */
    pk_real *tile;       /* of one row: blocks of examples x outputs x PK__TILE_LD; zero between rows */
    pk_real *bound_tile; /* with bounds: outputs x PK__TILE_LD */
    pk_real *left_inputs;
    /* Of the tile that is being added: */
    size_t row, rows, step;
    const pk__examples *batch;
    double factor;
    double seconds_test;
} pk__worker;

typedef struct pk__block_state { /* of a block of rows, kept between windows */
    size_t points_last, points, pieces, refused;
    double flops, worst;
    size_t worst_step, worst_row;
} pk__block_state;

typedef struct pk__job {
    pk_context *context;
    const pk_run *run;
    const pk_decompose_options *options;
    const pk_graph *graph;
    pk_quadrature quadrature;
    double tolerance, target;
    double unattributed; /* the limit, known with the last weights */
    size_t outputs, block, unit;
    int reverse, decays;
    int direct; /* E has a part of its own beside R */
    pk__window window;
    pk_matrix inputs;
    const pk_array *input_array; /* in place of their data, or NULL */
    double gauss_nodes[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2],
        gauss_weights[PK_GAUSS_NODES * (PK_GAUSS_NODES + 1) / 2];
    pk_plan plan;
    unsigned char *memory;
    /* In the arena: */
    pk_real *rows; /* plan.rows x inputs, packed */
    pk_real *gram; /* plan.rows x gram_ld */
    size_t gram_ld;
    size_t *state_at;       /* layers + 1: numbers of R of an output before a layer's; whole cache lines */
    pk_real *reverse_state; /* plan.rows x plan.outputs x state_at[layers]: R */
    pk_real *reverse_error; /* the same: a bound on the error of R */
    pk__block_state *blocks;
    pk__row_state *row_state; /* plan.rows */
    double *variation;        /* plan.rows x outputs: sum over the steps of |< Phi_s, D_s >| */
    pk__worker *workers;
    double next_carry;                 /* carry of the step after the window */
    size_t first_output, output_count; /* of the pass */
    pk_decomposition *part;
} pk__job;

/* A layer's outputs come in parts of a unit that stay in the cache. */
PK__PRIVATE size_t pk__part_outputs(const pk_node *node, size_t unit)
{
    return pk__max(1, pk__min(unit, ((size_t)1 << 12) / node->weight_count));
}

/* Kinds of things in memory, in the order in which they are used. Measures and takes. */
PK__PRIVATE void pk__job_layout(pk__job *job, pk__arena *arena)
{
    const pk_graph *graph = job->graph;
    const size_t real = sizeof(pk_real), threads = job->plan.threads, rows = job->plan.rows;
    size_t largest = 0;
    pk__steps_take(arena, job->plan.window, job->reverse ? job->plan.stride : 0, job->plan.spare, threads,
                   job->options->bounds, &job->window);
    job->rows = pk__arena_take(arena, rows, graph->input_width * real);
    job->gram_ld = job->run->examples;
    job->gram = pk__arena_take(arena, job->reverse ? 0 : rows, job->gram_ld * real);
    job->reverse_state = NULL;
    if (job->reverse) {
        size_t per_row = 0, numbers = 0;
        job->state_at = pk__arena_take(arena, graph->layers + 1, sizeof *job->state_at);
        for (size_t l = 0; l <= graph->layers; l++) {
            if (job->state_at)
                job->state_at[l] = numbers;
            if (l < graph->layers)
                numbers += pk__blocks(pk_graph_layer(graph, l)->weight_count, PK_PANEL) * PK_PANEL;
        }
        if (!pk__multiply(job->plan.outputs, numbers, &per_row) || per_row > SIZE_MAX / real / 2)
            arena->overflow = 1;
        else
            job->reverse_state = pk__arena_take(arena, rows, per_row * real);
        job->reverse_error = NULL;
        if (!arena->overflow && job->options->bounds)
            job->reverse_error = pk__arena_take(arena, rows, per_row * real);
    }
    job->blocks = pk__arena_take(arena, pk__blocks(rows, job->block), sizeof *job->blocks);
    job->row_state = pk__arena_take(arena, rows, sizeof *job->row_state);
    job->variation = pk__arena_take(arena, rows, job->outputs * sizeof *job->variation);
    job->workers = pk__arena_take(arena, threads, sizeof *job->workers);
    for (size_t l = 0; l < graph->layers; l++) {
        const pk_node *node = pk_graph_layer(graph, l);
        largest = pk__max(largest, pk__part_outputs(node, job->unit) * node->weight_count);
    }
    for (size_t w = 0; w < threads && !arena->overflow; w++) {
        pk__worker measured, *worker = job->workers ? &job->workers[w] : &measured;
        memset(worker, 0, sizeof *worker);
        worker->job = job;
        pk__integral_take(arena, graph, &job->options->readout, job->block,
                          job->reverse || job->options->engine != PK_ENGINE_FACTORED ? job->plan.outputs : 0,
                          job->unit, job->options->bounds, &job->window.representation, &worker->tangent);
        worker->phi = pk__arena_take(arena, largest, real);
        worker->effective = pk__arena_take(arena, job->direct || job->options->bounds ? largest : 0, real);
        const size_t blocks = pk__blocks(job->window.largest_batch, PK__EXAMPLE_BLOCK),
                     tile = PK__TILE_LD * real;
        worker->tile = pk__arena_take(arena, blocks * job->outputs, tile);
        if (worker->tile)
            memset(worker->tile, 0, blocks * job->outputs * tile);
        worker->bound_tile = pk__arena_take(arena, job->options->bounds ? job->outputs : 0, tile);
        worker->left_inputs =
            pk__arena_take(arena, job->reverse ? 0 : PK__EXAMPLE_BLOCK, graph->input_width * real);
        worker->tangent.integrator.gauss_nodes = job->gauss_nodes;
        worker->tangent.integrator.gauss_weights = job->gauss_weights;
        worker->tangent.integrator.quadrature = job->quadrature;
        worker->tangent.integrator.target = job->target;
    }
}

/* Numbers of result per row, in bytes. */
PK__PRIVATE size_t pk__result_bytes(const pk_decomposition *out, const pk_decompose_options *options)
{
    size_t items = 6 * out->outputs;
    for (size_t i = 0; i < out->kept_count; i++)
        items += out->kept[i].row_items;
    items += options->bounds ? out->outputs * out->examples : 0;
    items += options->step_closure ? out->outputs * out->steps : 0;
    return items * sizeof(double);
}

/* Bytes that a plan needs with row_bytes of results per row, of all rows or of those of a pass; SIZE_MAX: overflow. */
static size_t pk__plan_bytes(pk__job *job, const pk_plan *plan, size_t rows, size_t row_bytes, int by_pass)
{
    pk__arena arena = {NULL, 0, 0, 0};
    size_t results = 0;
    job->plan = *plan;
    pk__job_layout(job, &arena);
    if (arena.overflow || !pk__multiply(by_pass ? plan->rows : rows, row_bytes, &results) ||
        arena.used > SIZE_MAX / 2 - results)
        return SIZE_MAX;
    return arena.used + results + 4096; /* headers and rounding of a dozen allocations */
}

/* What each costs, in seconds of one thread; measured on one machine, where only their proportions matter. */
static const double pk__flop_seconds = 1 / 35e9;
static const double pk__update_seconds =
    14e-9; /* a parameter and step: D_s, the update again, its linear form */
static const double pk__advance_seconds = 2e-9; /* the same where only the optimiser's state is wanted */
static const double pk__state_seconds = 1.3e-9; /* a number of R and step */
static const double pk__usual_points = 5;       /* quadrature nodes per row and step, about */

/* How much longer a number of equal tasks takes than if they were spread evenly over the threads. */
static double pk__idle(size_t tasks, size_t threads)
{
    return tasks ? (double)(pk__blocks(tasks, threads) * threads) / (double)tasks : 1;
}

/* Fills in what the plan costs: see the top of this file. */
static void pk__plan_cost(const pk__job *job, size_t rows, pk_plan *plan)
{
    const pk_run *run = job->run;
    const double P = (double)run->parameters, steps = (double)run->steps, threads = (double)plan->threads;
    const double items = run->steps ? (double)run->batch_offsets[run->steps] : 0;
    const double outputs = (double)job->outputs, all_rows = (double)rows;
    const size_t row_passes = pk__blocks(rows, plan->rows), slices = pk__blocks(job->outputs, plan->outputs);
    const size_t blocks = pk__blocks(plan->rows, job->block), windows = pk__blocks(run->steps, plan->window);
    const double factor = job->options->bounds ? 3 : 1;
    double widths = 0, again = 0, saved = 0;
    plan->passes = row_passes * slices;
    for (size_t l = 0; l < run->graph.layers; l++) {
        const pk_node *node = pk_graph_layer(&run->graph, l);
        widths += (double)node->width + (double)pk__layer_input(&run->graph, node)->width / outputs;
    }
    if (plan->stride && job->window.state_vectors && windows) {
        const size_t kept = (windows - 1) / plan->stride, last = windows - kept * plan->stride;
        again =
            ((double)kept * pk__steps_again(plan->stride, plan->spare) + pk__steps_again(last, plan->spare)) /
            (double)windows;
        saved = (double)(kept * plan->stride) / (double)windows;
    }
    const double passes = (double)plan->passes;
    const double gradients =
        6 * P * items * pk__flop_seconds * factor *
        pk__idle(pk__min(plan->window, pk__max(run->steps, 1)) * job->window.lanes, plan->threads);
    const double visit = gradients + P * steps * pk__update_seconds,
                 advance = gradients + P * steps * pk__advance_seconds;
    const double idle = pk__idle(blocks, plan->threads);
    plan->sweeps = saved + passes * (1 + again);
    plan->weight_bytes = plan->sweeps * P * steps * (double)pk_type_size(run->weights.type);
    plan->gradient_flops = plan->sweeps * 6 * P * items;
    plan->contraction_flops =
        job->reverse ? 2 * P * outputs * items * all_rows * factor
                     : (double)slices * 2 * outputs * widths * items * all_rows * pk__usual_points * factor;
    plan->seconds_examples = visit / threads;
    plan->seconds_again = ((passes - 1) * visit + (saved + passes * again) * advance) / threads;
    plan->seconds_test = (double)slices * all_rows * steps * P * (4 + 6 * pk__usual_points) * pk__flop_seconds;
    if (job->reverse)
        plan->seconds_test += all_rows * steps * P * outputs * pk__state_seconds * factor;
    plan->seconds_test *= idle / threads;
    plan->seconds_contraction = plan->contraction_flops * pk__flop_seconds * idle / threads;
    plan->seconds =
        plan->seconds_examples + plan->seconds_again + plan->seconds_test + plan->seconds_contraction;
}

/* What a plan is chosen for. */
typedef struct pk__choice {
    size_t rows, row_bytes, available, least;
    int by_pass;
    pk_plan best;
} pk__choice;

/* Keeps the plan if it is cheaper than the best one, by a twentieth where it takes more memory; 1 where it fits. */
static int pk__consider(pk__job *job, pk__choice *choice, pk_plan *plan)
{
    pk__plan_cost(job, choice->rows, plan);
    if (choice->best.threads && !(plan->seconds < choice->best.seconds))
        return 1;
    plan->bytes = pk__plan_bytes(job, plan, choice->rows, choice->row_bytes, choice->by_pass);
    choice->least = pk__min(choice->least, plan->bytes);
    if (plan->bytes > choice->available)
        return 0;
    if (!choice->best.threads || plan->bytes <= choice->best.bytes ||
        plan->seconds < 0.95 * choice->best.seconds)
        choice->best = *plan;
    return 1;
}

/* The next of the numbers 1, 2, 3, 4, 5, 6, 8, 10, 12, 15 ... up to last; 0 after it. */
static size_t pk__next_size(size_t size, size_t last)
{
    return size >= last ? 0 : pk__min(size + 1 + size / 5, last);
}

/* Threads, rows, outputs and window are set: chooses the states that are kept. */
static void pk__choose_states(pk__job *job, pk__choice *choice, pk_plan *plan)
{
    const size_t windows = pk__blocks(pk__max(job->run->steps, 1), plan->window);
    const size_t vectors = job->reverse ? job->window.state_vectors : 0;
    plan->stride = 1;
    plan->spare = 0;
    if (!vectors || windows == 1) {
        (void)pk__consider(job, choice, plan);
        return;
    }
    /* The cheapest that a plan can be, by keeping all. */
    pk__plan_cost(job, choice->rows, plan);
    if (choice->best.threads && !(plan->seconds < choice->best.seconds))
        return;
    /* With three states a run of any length is decomposed in tolerable time, with fewer it is not. */
    const size_t fewest = pk__min(3, windows - 1);
    plan->stride = windows;
    plan->spare = fewest;
    if (!pk__consider(job, choice, plan))
        return;
    size_t state = 0;
    if (!pk__multiply(vectors * (job->options->bounds ? 3 : 1), job->graph->parameters * sizeof(pk_real),
                      &state))
        return;
    size_t states = fewest;
    plan->bytes = pk__plan_bytes(job, plan, choice->rows, choice->row_bytes, choice->by_pass);
    if (choice->available > plan->bytes + 256) /* what the pieces are rounded up to */
        states += pk__min((choice->available - plan->bytes - 256) / (state + sizeof(size_t)), windows);
    for (size_t stride = 1; stride; stride = pk__next_size(stride, windows)) {
        const size_t kept = (windows - 1) / stride;
        if (kept > states)
            continue;
        plan->stride = stride;
        plan->spare = pk__min(states - kept, stride - 1);
        (void)pk__consider(job, choice, plan);
        if (stride == 1)
            break;
    }
}

/* The cheapest plan that fits, with at most `most` blocks of rows in a pass. whole: search even where the plan that saves
 * nothing fits. */
static void pk__search_plans(pk__job *job, pk__choice *choice, size_t most, int whole)
{
    static const size_t windows[] = {32, 64, 24, 16, 12, 8, 6, 4, 3, 2, 1, 128, 256, 512};
    const size_t steps = pk__max(job->run->steps, 1), rows = choice->rows,
                 blocks = pk__blocks(rows, job->block);
    const size_t units = pk__blocks(job->outputs, job->unit);
    const size_t tasks = pk__max(blocks, job->window.lanes * pk__min(steps, windows[0]));
    const size_t all_threads = pk__min((size_t)pk_threads(job->context), tasks);
    pk_plan plan;
    memset(&plan, 0, sizeof plan);
    /* Where nothing has to be saved: */
    plan.threads = all_threads;
    plan.rows = pk__min(rows, most * job->block);
    plan.outputs = job->outputs;
    plan.window = pk__min(windows[0], steps);
    plan.stride = 1;
    if (pk__consider(job, choice, &plan) && !whole)
        return;
    for (plan.threads = all_threads; plan.threads >= 1; plan.threads /= 2)
        for (size_t slices = 1; slices; slices = pk__next_size(slices, units))
            for (size_t i = 0; i < sizeof windows / sizeof *windows; i++)
                for (size_t passes = pk__blocks(blocks, most); passes; passes = pk__next_size(passes, blocks)) {
                    if (i && windows[i] >= 2 * steps)
                        continue;
                    plan.outputs = pk__min(job->outputs, pk__blocks(units, slices) * job->unit);
                    plan.rows = pk__min(rows, pk__blocks(blocks, passes) * job->block);
                    plan.window = pk__min(windows[i], steps);
                    pk__choose_states(job, choice, &plan);
                }
}

/* Where the caller sets no limit: enough for any window to pay, and less than most machines have. */
#define PK__USUAL_MEMORY (SIZE_MAX > 0xffffffffu ? SIZE_MAX >> 32 : SIZE_MAX / 4) /* 4 GiB */

/* Chooses a plan so that everything fits, at the least cost. */
PK__PRIVATE pk_status pk__job_plan(pk__job *job, size_t rows, size_t row_bytes, int by_pass)
{
    const size_t limit = job->context ? job->context->memory_limit : 0,
                 held = job->context ? job->context->memory_used : 0, blocks = pk__blocks(rows, job->block);
    const size_t most = pk__min(
        blocks, job->options->rows_at_once ? pk__blocks(job->options->rows_at_once, job->block) : blocks);
    size_t results = 0;
    pk__choice choice;
    memset(&choice, 0, sizeof choice);
    choice.rows = rows;
    choice.row_bytes = row_bytes;
    choice.by_pass = by_pass;
    choice.available = limit > held ? limit - held : 0;
    if (!limit)
        choice.available = pk__multiply(rows, row_bytes, &results) && results < SIZE_MAX - PK__USUAL_MEMORY
                               ? results + PK__USUAL_MEMORY
                               : SIZE_MAX - 1;
    choice.least = SIZE_MAX;
    pk__search_plans(job, &choice, most, limit != 0);
    if (!limit && !choice.best.threads) {
        choice.available = SIZE_MAX - 1;
        pk__search_plans(job, &choice, most, 0);
    }
    job->plan = choice.best;
    if (choice.best.threads)
        return PK_OK;
    if (choice.least == SIZE_MAX)
        return pk__fail(job->context, PK_OVERFLOW, "the memory to decompose this run overflows");
    return pk__fail(
        job->context, PK_MEMORY_LIMIT,
        "decomposing this run within %zu bytes is not possible; the least that would do is %zu bytes", limit,
        held + choice.least);
}

/* Everything but the plan and the memory. */
PK__PRIVATE void pk__job_begin(pk__job *job, pk_context *context, const pk_run *run, pk_matrix inputs,
                               const pk_decompose_options *options)
{
    memset(job, 0, sizeof *job);
    job->context = context;
    job->run = run;
    job->options = options;
    job->graph = &run->graph;
    job->quadrature = options->quadrature;
    job->inputs = inputs;
    job->outputs = pk_readout_count(&options->readout, run->graph.output_width);
    job->tolerance = options->tolerance > 0 ? options->tolerance : PK_TOLERANCE;
    /* Closures of the steps add up at random: leave them a margin, so that the sum is far inside. */
    job->target = 1e-3 * job->tolerance / sqrt((double)pk__max(run->steps, 1));
    pk__gauss_table(job->gauss_nodes, job->gauss_weights);
    pk__steps_begin(run, &job->window);
    job->reverse = options->reverse_time || !pk_optimizer_stateless(&run->optimizer);
    pk_linear_form form;
    pk_optimizer_linear_form(&run->optimizer, 0, 1, run->graph.parameters, NULL, &form, NULL);
    job->reverse |= form.preconditioned;
    job->window.representation.outputs = job->outputs;
    job->window.representation.batch = job->window.largest_batch;
    job->window.representation.materialised =
        job->reverse || options->bounds || options->engine == PK_ENGINE_INTEGRATED;
    job->window.representation.factored = options->engine == PK_ENGINE_FACTORED;
    job->window.representation.known_data = !job->window.representation.materialised; /* job->gram */
    job->direct = job->reverse && form.direct != 0;
    job->unit = pk__integral_unit(job->outputs, run->graph.parameters);
    /* At least 16 blocks, where there are as many rows, so that few rows keep several threads busy, too. */
    job->block =
        pk__min(pk__integral_block(&run->graph, job->outputs), pk__blocks(pk__max(inputs.rows, 1), 16));
    /* The least memory is that of one block: in reverse time at most about 2^20 numbers, or one row. */
    if (job->reverse)
        job->block = pk__max(
            1, pk__min(job->block, ((size_t)1 << 20) / pk__max(1, job->outputs * run->graph.parameters)));
    job->decays = form.decoupled != 0 || (form.coupled != 0 && !job->reverse);
}

PK__END_COLD_CODE

/* pathkernel/attribution/decompose.h: implementation */
#include <math.h>
#include <stdio.h>
#include <string.h>
PK__BEGIN_CODE

/* ---- the test side of one block over one window ------------------------------------------------------ */

/* In eight sums, so that a vector of them is added at a time. */
static double pk__sum(size_t count, const pk_real *x)
{
    double sums[8] = {0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            sums[k] += x[i + k];
    for (size_t k = 0; i < count; i++, k++)
        sums[k] += x[i];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/* Adds factor * tile (cells x count, ld PK__TILE_LD) of one layer, or of all (-1), to the results of the cells from cell on. */
static void pk__add_cells(const pk__worker *worker, int layer, size_t cell, size_t cells, double factor,
                          size_t first, size_t count, const pk_real *tile)
{
    const pk__job *job = worker->job;
    pk_decomposition *part = job->part;
    const int64_t *items = worker->batch->items + first;
    const size_t outputs = job->outputs, level = layer < 0 ? 0 : (size_t)layer;
    for (const pk_real *from = tile; from < tile + cells * PK__TILE_LD; from += PK__TILE_LD, cell++) {
        const double sum = pk__sum(count, from);
        part->data[cell] += factor * sum;
        for (size_t k = 0; k < part->kept_count; k++) {
            const pk_tensor *tensor = &part->kept[k];
            unsigned axes = tensor->axes;
            size_t layers = axes & PK_BY_LAYER ? part->layers : 1, steps = axes & PK_BY_STEP ? part->steps : 1;
            size_t at = (axes & PK_BY_STEP ? worker->step * layers : 0) + (axes & PK_BY_LAYER ? level : 0);
            double *to = tensor->data + cell * (tensor->row_items / outputs) + at;
            if (axes == PK_BY_EXAMPLE && worker->batch->consecutive) {
                to += items[0];
                for (size_t b = 0; b < count; b++)
                    to[b] += factor * from[b];
            } else if (axes & PK_BY_EXAMPLE) {
                for (size_t b = 0; b < count; b++)
                    to[(size_t)items[b] * steps * layers] += factor * from[b];
            } else if (axes & PK_BY_GROUP) {
                for (size_t b = 0; b < count; b++)
                    to[(size_t)job->options->groups[items[b]] * steps * layers] += factor * from[b];
            } else {
                *to += factor * sum;
            }
        }
    }
}

/* The tile of a block of rows from the factored layers. */
static void pk__add_tile(void *user, int layer, size_t first, size_t count, const pk_real *tile)
{
    const pk__worker *worker = user;
    const pk__job *job = worker->job;
    const size_t outputs = job->outputs;
    if (job->output_count == outputs) {
        pk__add_cells(worker, layer, worker->row * outputs, worker->rows * outputs, worker->factor, first,
                      count, tile);
        return;
    }
    for (size_t row = 0; row < worker->rows; row++)
        pk__add_cells(worker, layer, (worker->row + row) * outputs + job->first_output, job->output_count,
                      worker->factor, first, count, tile + (row * outputs + job->first_output) * PK__TILE_LD);
}

/* Weights of a layer that Phi keeps apart from its matrix. */
static size_t pk__bias_count(const pk_node *node)
{
    return pk__is_outer(node) && pk__has_bias(node) ? node->width : 0;
}

/* R of one layer of one row, outputs first .. first + count - 1, in the layout of Phi. */
typedef struct pk__part {
    const pk_node *node;
    size_t layer, row, first, count; /* row of the block */
    size_t bias, matrix;             /* weights of each output */
} pk__part;

/* Phi of a part, as it is stored: matrices, and biases elsewhere (inputs == NULL); or as outer products of cotangents and
 * one row of inputs, and the cotangents times bias_input. */
typedef struct pk__phi {
    const pk_real *matrices, *biases;
    const pk_real *cotangents, *inputs;
    pk_real bias_input;
} pk__phi;

/* R of a part a step back, and E where it is wanted. p: out x in, then out; state and e: matrices, then biases. */
static void pk__advance_state(const pk__part *part, const pk_linear_form *form, double carry, const pk_real *p,
                              const pk__phi *phi, pk_real *state, pk_real *e)
{
    const pk_real *p_bias = p ? p + part->matrix : NULL;
    const size_t in = part->node->fan_in, out = part->node->fan_out, matrices = part->count * part->matrix;
    for (size_t k = 0; k < part->count; k++) {
        size_t at = k * part->matrix;
        if (phi->inputs)
            pk__linear_form_back(out, in, form, carry, p, phi->cotangents + k * out, phi->inputs, 0, state + at,
                                 e ? e + at : NULL);
        else
            pk__linear_form_back(1, part->matrix, form, carry, p, NULL, phi->matrices + at, 0, state + at,
                                 e ? e + at : NULL);
        at = matrices + k * part->bias;
        pk__linear_form_back(1, part->bias, form, carry, p_bias, phi->inputs ? &phi->bias_input : NULL,
                             (phi->inputs ? phi->cotangents : phi->biases) + k * part->bias, 0, state + at,
                             e ? e + at : NULL);
    }
}

/* < e_k, v > for e laid out like Phi of a part and v like the layer's weights. */
static double pk__dot_part(const pk__part *part, size_t k, const pk_real *e, const pk_real *v)
{
    return (double)pk__dot(part->matrix, e + k * part->matrix, v) +
           (double)pk__dot(part->bias, e + part->count * part->matrix + k * part->bias, v + part->matrix);
}

/* The tile of a row, all outputs, with block number `block` of the examples. */
static pk_real *pk__row_tile(const pk__worker *worker, size_t block)
{
    return worker->tile + block * worker->job->outputs * PK__TILE_LD;
}

/* The row's tiles += < e, g_b > of a part. */
static void pk__contract_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *e)
{
    const size_t examples = worker->job->window.batches[j].count;
    for (size_t first = 0; first < examples; first += PK__EXAMPLE_BLOCK)
        pk__integral_contract_row(&worker->tangent, part->layer, part->count, e, first,
                                  pk__min(PK__EXAMPLE_BLOCK, examples - first),
                                  pk__row_tile(worker, first / PK__EXAMPLE_BLOCK) + part->first * PK__TILE_LD);
}

/* |factor| < error, |g_b| > of a part added to the bounds. */
static void pk__bound_part(pk__worker *worker, const pk__part *part, size_t j, const pk_real *error)
{
    pk__job *job = worker->job;
    const size_t cell = (worker->row + part->row) * job->outputs + part->first;
    const pk_batch *batch = &job->window.batches[j];
    worker->tangent.examples = &job->window.magnitudes[j];
    for (size_t first = 0; first < batch->count; first += PK__EXAMPLE_BLOCK) {
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, batch->count - first);
        pk__clear_tile(part->count, count, worker->bound_tile);
        pk__integral_contract_row(&worker->tangent, part->layer, part->count, error, first, count,
                                  worker->bound_tile);
        for (size_t k = 0; k < part->count; k++)
            for (size_t b = 0; b < count; b++)
                job->part->bounds[(cell + k) * job->part->examples + (size_t)batch->items[first + b]] +=
                    fabs(worker->factor) * (double)worker->bound_tile[k * PK__TILE_LD + b];
    }
    worker->tangent.examples = &job->window.examples[j];
}

/* One part whose Phi is materialised: E (through R in reverse time), coupled decay, the contraction with the batch, and
 * the bounds by the same way with absolute values. */
static void pk__materialised_part(pk__worker *worker, const pk__part *part, size_t j, double carry)
{
    pk__job *job = worker->job;
    pk__window *window = &job->window;
    const pk_linear_form *form = &window->forms[j];
    const size_t P = job->graph->parameters, offset = part->node->weight_offset;
    const size_t cell = (worker->row + part->row) * job->outputs;
    /* R: row after row, layer after layer, part after part. */
    size_t at = 0;
    if (job->reverse) {
        const size_t *before = job->state_at + part->layer, all = job->state_at[job->graph->layers];
        at = (worker->row + part->row) * job->plan.outputs * all + job->output_count * before[0] +
             (part->first - job->first_output) * (before[1] - before[0]);
    }
    const pk_real *p = window->preconditioner ? window->preconditioner + j * window->pitch + offset : NULL;
    const pk_real *e = worker->phi;
    pk__phi phi = {NULL, NULL, NULL, NULL, 0};
    if (!job->reverse || job->part->bounds) {
        pk__integral_row_phi(&worker->tangent, part->layer, part->row, part->first, part->count, worker->phi);
        phi.matrices = worker->phi;
        phi.biases = worker->phi + part->count * part->matrix;
    } else if (worker->tangent.phi[part->layer])
        pk__row_view(&worker->tangent, part->layer, part->row, part->first, &phi.matrices, &phi.biases);
    else
        phi.bias_input = pk__row_factors(&worker->tangent, part->layer, part->row, part->first, &phi.cotangents,
                                         &phi.inputs);
    if (job->reverse) {
        /* Without a direct part E is gain R: no copy is needed. */
        const int direct = form->direct != 0;
        e = direct ? worker->effective : job->reverse_state + at;
        pk__advance_state(part, form, carry, p, &phi, job->reverse_state + at,
                          direct ? worker->effective : NULL);
        for (size_t k = 0; form->coupled != 0 && k < part->count; k++)
            job->part->decay[cell + part->first + k] -=
                form->coupled * (direct ? 1 : form->gain) *
                pk__dot_part(part, k, e, window->weights + j * P + offset);
    }
    pk__contract_part(worker, part, j, e);
    if (!job->part->bounds)
        return;
    const size_t numbers = part->count * part->node->weight_count, matrix = part->count * part->matrix;
    pk_real *error = worker->effective;
    pk__integral_row_error(&worker->tangent, part->layer, part->row, part->first, part->count, error);
    if (job->reverse) {
        if (window->preconditioner_error) {
            /* |error of p Phi| <= p (|error of Phi| + |error of p| / p |Phi|), and p > 0. */
            const pk_real *slack = window->preconditioner_error + j * window->pitch + offset;
            for (size_t i = 0; i < numbers; i++) {
                const size_t w = i < matrix ? i % part->matrix : part->matrix + (i - matrix) % part->bias;
                error[i] += p[w] > 0 ? slack[w] / p[w] * (pk_real)fabs(worker->phi[i]) : 0;
            }
        }
        phi.matrices = error;
        phi.biases = error + matrix;
        pk__advance_state(part, form, carry, p, &phi, job->reverse_error + at, error);
    }
    pk__bound_part(worker, part, j, error);
}

static void pk__materialised_layer(pk__worker *worker, size_t row, size_t layer, size_t j, double carry)
{
    const pk__job *job = worker->job;
    pk__part part;
    part.node = worker->tangent.node[layer];
    part.layer = layer;
    part.row = row;
    part.bias = pk__bias_count(part.node);
    part.matrix = part.node->weight_count - part.bias;
    const size_t last = job->first_output + job->output_count;
    /* Copies of a part should stay in the cache; where R is used as it stands there are none. */
    const int copied = !job->reverse || job->direct || job->part->bounds != NULL;
    const size_t each = copied ? pk__part_outputs(part.node, job->unit) : job->unit;
    for (size_t unit = job->first_output; unit < last; unit += job->unit) {
        const size_t end = pk__min(unit + job->unit, last);
        for (part.first = unit; part.first < end; part.first += part.count) {
            part.count = pk__min(each, end - part.first);
            pk__materialised_part(worker, &part, j, carry);
        }
    }
}

/* The row's tiles, of one layer or of all, added to the results; then zero. */
static void pk__add_row(pk__worker *worker, size_t row, int layer, size_t j, double factor)
{
    const pk__job *job = worker->job;
    const size_t examples = job->window.batches[j].count, first_output = job->first_output;
    const double start = pk__seconds();
    for (size_t first = 0; first < examples; first += PK__EXAMPLE_BLOCK) {
        pk_real *tile = pk__row_tile(worker, first / PK__EXAMPLE_BLOCK) + first_output * PK__TILE_LD;
        const size_t count = pk__min(PK__EXAMPLE_BLOCK, examples - first);
        pk__add_cells(worker, layer, (worker->row + row) * job->outputs + first_output, job->output_count,
                      factor, first, count, tile);
        pk__clear_tile(job->output_count, count, tile);
    }
    worker->tangent.seconds_contraction += pk__seconds() - start; /* as the factored layers' tiles count */
}

/* The layers of a step whose Phi is materialised. */
static void pk__materialised_layers(pk__worker *worker, size_t j, double carry)
{
    const pk__job *job = worker->job;
    const pk__integral *tangent = &worker->tangent;
    const pk_linear_form *form = &job->window.forms[j];
    const double factor = worker->factor * (job->reverse && form->direct == 0 ? form->gain : 1);
    size_t layers = 0;
    for (size_t l = 0; l < job->graph->layers; l++)
        layers += tangent->integrated[l] != 0;
    for (size_t row = 0; layers && row < worker->rows; row++) {
        for (size_t l = 0; l < job->graph->layers; l++) {
            if (!tangent->integrated[l])
                continue;
            pk__materialised_layer(worker, row, l, j, carry);
            if (tangent->per_layer)
                pk__add_row(worker, row, (int)l, j, factor);
        }
        if (!tangent->per_layer)
            pk__add_row(worker, row, -1, j, factor);
    }
}

/* What a step adds beside its examples, and its own closure. */
static void pk__close_step(pk__worker *worker, pk__block_state *block, size_t j, size_t step)
{
    pk__job *job = worker->job;
    pk_decomposition *part = job->part;
    const pk_linear_form *form = &job->window.forms[j];
    const pk_real *ends = pk__integrator_ends(&worker->tangent.integrator);
    double linear = form->decoupled;
    if (!job->reverse)
        linear += form->rate * (form->direct + form->gain * form->enter) * form->coupled;
    for (size_t i = 0; i < worker->rows * job->outputs; i++) {
        const size_t cell = worker->row * job->outputs + i, output = i % job->outputs;
        if (output < job->first_output || output >= job->first_output + job->output_count)
            continue;
        const pk_real *start = ends + (2 * (i / job->outputs) * job->outputs + output),
                      *end = start + job->outputs;
        double closure = (double)(*end - *start) - (double)worker->tangent.along[0][i];
        job->variation[cell] += fabs((double)worker->tangent.along[0][i]);
        part->unattributed[cell] += worker->tangent.along[1][i];
        if (worker->tangent.directions[2])
            part->decay[cell] -= linear * worker->tangent.along[2][i];
        if (part->step_closure)
            part->step_closure[cell * part->steps + step] = closure;
        /* Of equals the first step, then the first row, in whatever order they are met. */
        const size_t row = part->first_row + worker->row + i / job->outputs;
        const int before = step < block->worst_step || (step == block->worst_step && row < block->worst_row);
        if (pk__worse(fabs(closure), block->worst) || (fabs(closure) == block->worst && before)) {
            block->worst = fabs(closure);
            block->worst_step = step;
            block->worst_row = row;
        }
    }
}

static void pk__block_window(pk__worker *worker, size_t number, size_t first, size_t count)
{
    pk__job *job = worker->job;
    pk__block_state *block = &job->blocks[number];
    pk__integral *tangent = &worker->tangent;
    const size_t P = job->graph->parameters;
    const double begin = pk__seconds(), before = tangent->seconds_sums + tangent->seconds_contraction;
    worker->row = number * job->block;
    worker->rows = pk__min(job->block, job->part->rows - worker->row);
    tangent->integrator.state = job->row_state + worker->row;
    tangent->integrator.points_last = block->points_last;
    tangent->integrator.points = tangent->integrator.split_pieces = tangent->integrator.refused = 0;
    tangent->flops = 0;
    tangent->gram = job->gram ? job->gram + worker->row * job->gram_ld : NULL;
    tangent->gram_ld = job->gram_ld;
    tangent->sink = pk__add_tile;
    tangent->user = worker;
    tangent->first_output = job->first_output;
    tangent->output_count = job->output_count;
    tangent->per_layer = 0;
    for (size_t k = 0; k < job->part->kept_count; k++)
        tangent->per_layer |= (job->part->kept[k].axes & PK_BY_LAYER) != 0;
    for (size_t i = 0; i < count; i++) {
        size_t j = job->reverse ? count - 1 - i : i;
        const pk_linear_form *form = &job->window.forms[j];
        double scale = pk_run_gradient_scale(job->run, first + j);
        worker->step = first + j;
        worker->batch = &job->window.examples[j];
        worker->factor =
            job->reverse ? -scale : -scale * form->rate * (form->direct + form->gain * form->enter);
        tangent->examples = &job->window.examples[j];
        tangent->directions[0] = job->window.direction + j * P;
        tangent->directions[1] = job->window.remainder + j * P;
        tangent->directions[2] = job->decays ? job->window.weights + j * P : NULL;
        pk__integral_step(tangent, job->window.weights + j * P, job->window.direction + j * P,
                          job->window.transposed ? job->window.transposed + j * 2 * P : NULL,
                          job->part->first_row + worker->row, worker->rows,
                          job->rows + worker->row * job->graph->input_width,
                          job->reverse ? PK_ENGINE_INTEGRATED : job->options->engine);
        pk__materialised_layers(worker, j, j + 1 < count ? job->window.forms[j + 1].carry : job->next_carry);
        pk__close_step(worker, block, j, first + j);
    }
    block->points_last = tangent->integrator.points_last;
    if (job->first_output == 0) { /* they are the same for every slice of the outputs */
        block->points += tangent->integrator.points;
        block->pieces += tangent->integrator.split_pieces;
        block->refused += tangent->integrator.refused;
    }
    block->flops += tangent->flops;
    worker->seconds_test +=
        pk__seconds() - begin - (tangent->seconds_sums + tangent->seconds_contraction - before);
}

/* ---- one pass over the run ----------------------------------------------------------------------------- */

/* Gram matrix of the pass's rows and the training inputs: the first layer's share, the same at every step. */
static void pk__fill_gram(pk__job *job)
{
    const size_t in = job->graph->input_width, N = job->run->examples;
    const size_t blocks = pk__blocks(N, PK__EXAMPLE_BLOCK);
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__worker *worker = &job->workers[pk__thread()];
        size_t first = b * PK__EXAMPLE_BLOCK, count = pk__min(PK__EXAMPLE_BLOCK, N - first);
        int64_t items[PK__EXAMPLE_BLOCK];
        for (size_t i = 0; i < count; i++)
            items[i] = (int64_t)(first + i);
        pk_dataset_inputs(&job->run->train, items, count, worker->left_inputs);
        for (size_t row = 0; row < job->part->rows; row += job->block)
            pk__gemm(0, 1, pk__min(job->block, job->part->rows - row), count, in, 1, job->rows + row * in, in,
                     worker->left_inputs, in, 0, job->gram + row * job->gram_ld + first, job->gram_ld);
    }
    pk__team_end(&team);
}

/* h(f(w_s, x)) of the pass's rows, block by block in the workers' memory. */
static pk_status pk__predict(pk__job *job, size_t step, double *h)
{
    const pk_graph *graph = job->graph;
    const size_t rows = job->part->rows, classes = graph->output_width, outputs = job->outputs;
    const size_t blocks = pk__blocks(rows, job->block);
    pk_status status = pk_replay_weights(job->context, &job->window.replay, step, job->window.weights);
    if (status)
        return status;
    const pk__line line = {job->window.weights, NULL, NULL};
    pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
    PK__PARALLEL(team)
    for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team)) {
        pk__integrator *integrator = &job->workers[pk__thread()].tangent.integrator;
        pk__tape *tape = &integrator->segment.tape;
        size_t first = b * job->block, count = pk__min(job->block, rows - first);
        pk__pass_forward(tape, &line, count, job->rows + first * graph->input_width);
        for (size_t r = 0; r < count; r++) {
            pk__readout_apply(&job->options->readout, classes, job->part->first_row + first + r,
                              pk__pass_output(tape) + r * classes, integrator->h, integrator->slope);
            for (size_t k = 0; k < outputs; k++)
                h[(first + r) * outputs + k] = integrator->h[k];
        }
    }
    pk__team_end(&team);
    return PK_OK;
}

/* The largest unattributed term that is taken for rounding, from the precision of the run's last weights. */
static double pk__unattributed_limit(const pk__job *job, const pk_real *weights)
{
    const double given = job->options->unattributed;
    if (given > 0)
        return given;
    int coarse = 1;
    for (size_t p = 0; coarse && p < job->graph->parameters; p++)
        coarse = weights[p] == (pk_real)(float)weights[p];
    const double epsilon = coarse ? 1.1920929e-7 : 2.220446049250313e-16;
    return fmax(PK_UNATTRIBUTED_LEAST,
                PK_UNATTRIBUTED_EPSILONS * epsilon * sqrt((double)pk__max(job->run->steps, 1)));
}

/* The largest |x|, at least `largest`; numbers that are not finite do not count. */
static double pk__largest(size_t count, const double *x, double largest)
{
    for (size_t i = 0; i < count; i++)
        largest = isfinite(x[i]) && fabs(x[i]) > largest ? fabs(x[i]) : largest;
    return largest;
}

/* value / scale; 0 where the value is 0, whatever the scale is. */
static double pk__part_of(double value, double scale)
{
    return value == 0 ? 0 : value / scale;
}

/* No bound of a cell is below rounding of the largest contribution of an example to its row. They must explain the cell's
 * closure, but for the closure's own rounding; else they are raised. */
static void pk__raise_bounds(pk__job *job, size_t cell, double height, double largest)
{
    pk_decomposition *part = job->part;
    double *bounds = part->bounds + cell * part->examples, sum = 0;
    for (size_t i = 0; i < part->examples; i++)
        bounds[i] += bounds[i] > 0 ? PK__MEASURABLE * PK__EPSILON * largest : 0;
    const double closure = fabs(part->closure[cell]) - PK__MEASURABLE * PK__EPSILON * height;
    for (size_t i = 0; i < part->examples; i++)
        sum += bounds[i];
    if (!(closure > sum))
        return;
    for (size_t i = 0; i < part->examples; i++)
        bounds[i] = sum > 0 ? bounds[i] * (closure / sum * (1 + PK__MEASURABLE * PK__EPSILON)) : closure;
    part->raised++;
}

static void pk__certify_row(pk__job *job, size_t row)
{
    pk_decomposition *part = job->part;
    const size_t outputs = part->outputs, first = row * outputs;
    for (size_t i = first; i < first + outputs; i++)
        part->closure[i] =
            part->final[i] - part->initial[i] - part->data[i] - part->decay[i] - part->unattributed[i];
    double height = pk__largest(outputs, part->initial + first, 0);
    height = pk__largest(outputs, part->final + first, height);
    double largest = pk__largest(outputs, job->variation + first, 0);
    largest = pk__largest(outputs, part->data + first, largest);
    largest = pk__largest(outputs, part->decay + first, largest);
    largest = pk__largest(outputs, part->unattributed + first, largest);
    for (size_t k = 0; k < part->kept_count; k++) {
        const size_t items = part->kept[k].row_items;
        largest = items ? pk__largest(items, part->kept[k].data + row * items, largest) : largest;
    }
    const double scale = height > largest ? height : largest;
    const double floor = (job->tolerance < PK_CLOSURE_ROUNDING ? job->tolerance : PK_CLOSURE_ROUNDING) * height;
    const double allowed = job->tolerance * largest > floor ? job->tolerance * largest : floor;
    part->scale = scale > part->scale ? scale : part->scale;
    const size_t entries = outputs * part->examples;
    const double entry =
        part->bounds && part->by_example ? pk__largest(entries, part->by_example + row * entries, 0) : 0;
    for (size_t i = first; i < first + outputs; i++) {
        const double closure = fabs(part->closure[i]), excess = pk__part_of(closure, allowed);
        if (pk__worse(pk__part_of(closure, scale), part->worst_closure))
            part->worst_closure = pk__part_of(closure, scale);
        if (pk__worse(pk__part_of(closure, largest), part->worst_relative))
            part->worst_relative = pk__part_of(closure, largest);
        if (pk__worse(excess, part->worst_excess)) {
            part->worst_excess = excess;
            part->worst_row = part->first_row + row;
            part->worst_output = i - first;
        }
        const double size = fabs(part->final[i]) > 1 ? fabs(part->final[i]) : 1;
        if (pk__worse(fabs(part->unattributed[i]) / size, part->worst_unattributed)) {
            part->worst_unattributed = fabs(part->unattributed[i]) / size;
            part->worst_unattributed_row = part->first_row + row;
            part->worst_unattributed_output = i - first;
        }
        if (part->bounds)
            pk__raise_bounds(job, i, height, entry);
    }
}

static void pk__certify(pk__job *job)
{
    pk_decomposition *part = job->part;
    size_t blocks = pk__blocks(part->rows, job->block);
    part->worst_closure = part->worst_relative = part->worst_excess = part->worst_unattributed = 0;
    part->raised = 0;
    part->scale = 0;
    for (size_t row = 0; row < part->rows; row++)
        pk__certify_row(job, row);
    part->worst_step_closure = 0;
    part->points = part->pieces = part->refused = 0;
    part->flops = 0;
    for (size_t b = 0; b < blocks; b++) {
        const pk__block_state *block = &job->blocks[b];
        part->points += block->points;
        part->pieces += block->pieces;
        part->refused += block->refused;
        part->flops += block->flops;
        if (pk__worse(block->worst, part->worst_step_closure)) {
            part->worst_step_closure = block->worst;
            part->worst_step = block->worst_step;
            part->worst_step_row = block->worst_row;
        }
    }
}

/* Sets the state of each row before the first step from its outputs at both ends of the run. */
static void pk__begin_rows(pk__job *job)
{
    const pk_decomposition *part = job->part;
    for (size_t row = 0; row < part->rows; row++) {
        pk__row_state *state = &job->row_state[row];
        memset(state, 0, sizeof *state);
        state->order.nodes = PK__FIRST_NODES;
        for (size_t i = row * part->outputs; i < (row + 1) * part->outputs; i++) {
            const double change = part->final[i] - part->initial[i];
            state->height = pk__largest(1, &part->initial[i], state->height);
            state->height = pk__largest(1, &part->final[i], state->height);
            state->change = pk__largest(1, &change, state->change);
        }
        state->change /= (double)pk__max(job->run->steps, 1);
    }
}

/* A pass over the run with the outputs first_output .. first_output + output_count - 1 of the part's rows. */
static pk_status pk__pass(pk__job *job, double done, double share)
{
    const size_t in = job->graph->input_width, steps = job->run->steps;
    const size_t window = job->plan.window, windows = job->window.windows;
    const size_t blocks = pk__blocks(job->part->rows, job->block);
    for (size_t r = 0; r < job->part->rows; r++) {
        const size_t row = job->part->first_row + r;
        if (job->input_array) {
            pk_status status = pk_array_read(job->context, job->input_array, row * in, in, job->rows + r * in);
            if (status)
                return pk__prefix(job->context, status, "inputs: the file ");
        } else {
            memcpy(job->rows + r * in, job->inputs.data + row * job->inputs.ld, in * sizeof(pk_real));
        }
    }
    if (job->first_output == 0) {
        pk_status status = pk__predict(job, 0, job->part->initial);
        if (!status)
            status = pk__predict(job, steps, job->part->final);
        if (status)
            return status;
        job->unattributed = pk__unattributed_limit(job, job->window.weights);
        memset(job->blocks, 0, blocks * sizeof *job->blocks);
        memset(job->variation, 0, job->part->rows * job->outputs * sizeof *job->variation);
        if (job->gram)
            pk__fill_gram(job);
    }
    for (size_t b = 0; b < blocks; b++)
        job->blocks[b].points_last = 0;
    pk__begin_rows(job);
    const size_t numbers =
        job->reverse ? job->part->rows * job->plan.outputs * job->state_at[job->graph->layers] : 0;
    if (job->reverse_error)
        memset(job->reverse_error, 0, numbers * sizeof(pk_real));
    if (job->reverse)
        memset(job->reverse_state, 0, numbers * sizeof(pk_real));
    job->next_carry = 0;
    for (size_t i = 0; i < windows; i++) {
        size_t w = job->reverse ? windows - 1 - i : i;
        size_t first = w * window, count = pk__min(window, steps - first);
        pk_status status =
            pk__progress(job->context, "decomposing", done + share * (double)i / (double)windows);
        if (status)
            return status;
        status = pk__steps_visit(job->context, &job->window, w);
        if (status)
            return status;
        pk__team team = pk__team_of(job->context, (int)job->plan.threads, blocks);
        PK__PARALLEL(team)
        for (size_t b = pk__first_task(&team); b < blocks; b = pk__next_task(&team))
            pk__block_window(&job->workers[pk__thread()], b, first, count);
        pk__team_end(&team);
        job->next_carry = job->window.forms[0].carry;
    }
    return PK_OK;
}

/* Pass after pass, all outputs of the part's rows: done and share of the whole are theirs. */
static pk_status pk__passes(pk__job *job, double done, double share)
{
    const size_t outputs = job->outputs;
    for (size_t first = 0; first < outputs; first += job->plan.outputs) {
        job->first_output = first;
        job->output_count = pk__min(job->plan.outputs, outputs - first);
        pk_status status = pk__pass(job, done + share * (double)first / (double)outputs,
                                    share * (double)job->output_count / (double)outputs);
        if (status)
            return status;
    }
    pk__certify(job);
    return PK_OK;
}

/* ---- the calls ------------------------------------------------------------------------------------------- */

static pk_status pk__check_inputs(pk_context *context, const pk_run *run, pk_matrix inputs)
{
    if (inputs.rows == 0 || !inputs.data || inputs.cols != run->graph.input_width || inputs.ld < inputs.cols)
        return pk__fail(context, PK_SHAPE, "inputs are %zu x %zu (ld %zu); the network takes rows of %zu",
                        inputs.rows, inputs.cols, inputs.ld, run->graph.input_width);
    for (size_t r = 0; r < inputs.rows; r++)
        for (size_t j = 0; j < inputs.cols; j++)
            if (!isfinite(inputs.data[r * inputs.ld + j]))
                return pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, column %zu is not finite", r, j);
    for (size_t r = 0; run->graph.checked && r < inputs.rows; r++) {
        pk_status status = pk_graph_check_inputs(context, &run->graph, r, inputs.data + r * inputs.ld);
        if (status)
            return pk__prefix(context, status, "inputs: ");
    }
    return PK_OK;
}

/* The numbers of an array, row by row. */
static pk_status pk__check_array(pk_context *context, const pk_run *run, const pk_array *inputs)
{
    const size_t width = run->graph.input_width;
    pk_real *row = NULL;
    pk_status status = pk_allocate(context, width, sizeof *row, "a row of inputs", &row);
    for (size_t r = 0; !status && r < inputs->shape[0]; r++) {
        status = pk_array_read(context, inputs, r * width, width, row);
        if (status)
            status = pk__prefix(context, status, "inputs: the file ");
        for (size_t j = 0; !status && j < width; j++)
            if (!isfinite(row[j]))
                status = pk__fail(context, PK_NOT_FINITE, "inputs: row %zu, number %zu is not finite", r, j);
        if (!status && run->graph.checked)
            status = pk__prefix(context, pk_graph_check_inputs(context, &run->graph, r, row), "inputs: ");
    }
    pk_release(context, row);
    return status;
}

static pk_status pk__check_options(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options)
{
    const pk_readout *readout = &options->readout;
    if (!(options->tolerance >= 0) || !isfinite(options->tolerance))
        return pk__fail(context, PK_ARGUMENT, "a tolerance of %g", options->tolerance);
    if (!(options->unattributed >= 0))
        return pk__fail(context, PK_ARGUMENT, "a limit of %g for what is unattributed", options->unattributed);
    if ((int)readout->kind < 0 || readout->kind > PK_READOUT_FUNCTION ||
        (readout->kind == PK_READOUT_FUNCTION && (!readout->function || !readout->count)) ||
        (readout->kind == PK_READOUT_LABEL && !readout->labels))
        return pk__fail(context, PK_ARGUMENT, "the readout lacks its function, its count or its labels");
    if (readout->kind == PK_READOUT_ONE && readout->output >= run->outputs)
        return pk__fail(context, PK_ARGUMENT, "output %zu of a network with %zu outputs", readout->output,
                        run->outputs);
    for (size_t r = 0; readout->kind == PK_READOUT_LABEL && r < rows; r++)
        if (readout->labels[r] < 0 || (size_t)readout->labels[r] >= run->outputs)
            return pk__fail(context, PK_ARGUMENT, "label %lld of input %zu, of a network with %zu outputs",
                            (long long)readout->labels[r], r, run->outputs);
    for (size_t i = 0; options->groups && i < run->examples; i++)
        if (options->groups[i] < 0 || (size_t)options->groups[i] >= options->group_count)
            return pk__fail(context, PK_ARGUMENT, "example %zu is in group %lld of %zu", i,
                            (long long)options->groups[i], options->group_count);
    if ((int)options->engine < 0 || options->engine > PK_ENGINE_INTEGRATED)
        return pk__fail(context, PK_ARGUMENT, "engine %d does not exist", (int)options->engine);
    if (options->bounds && options->quadrature.rule != PK_RULE_AUTO &&
        options->quadrature.rule != PK_RULE_EXACT)
        return pk__fail(context, PK_UNSUPPORTED, "bounds need a rule that measures its error: auto or exact");
    return pk_quadrature_check(context, &options->quadrature, &run->graph, readout);
}

static void pk__add_summary(const pk_decomposition *part, pk_decomposition *whole)
{
    if (!whole->passes || pk__worse(part->worst_excess, whole->worst_excess)) {
        whole->worst_excess = part->worst_excess;
        whole->worst_row = part->worst_row;
        whole->worst_output = part->worst_output;
    }
    if (!whole->passes || pk__worse(part->worst_closure, whole->worst_closure))
        whole->worst_closure = part->worst_closure;
    if (!whole->passes || pk__worse(part->worst_relative, whole->worst_relative))
        whole->worst_relative = part->worst_relative;
    whole->raised += part->raised;
    whole->scale = part->scale > whole->scale ? part->scale : whole->scale;
    if (!whole->passes || pk__worse(part->worst_step_closure, whole->worst_step_closure)) {
        whole->worst_step_closure = part->worst_step_closure;
        whole->worst_step = part->worst_step;
        whole->worst_step_row = part->worst_step_row;
    }
    if (!whole->passes || pk__worse(part->worst_unattributed, whole->worst_unattributed)) {
        whole->worst_unattributed = part->worst_unattributed;
        whole->worst_unattributed_row = part->worst_unattributed_row;
        whole->worst_unattributed_output = part->worst_unattributed_output;
    }
    whole->points += part->points;
    whole->pieces += part->pieces;
    whole->refused += part->refused;
    whole->flops += part->flops;
    whole->passes += part->passes;
}

/* The status of a decomposition that was computed. The closure is judged first: where it is open, nothing else holds. */
static pk_status pk__verdict(const pk__job *job, const pk_decomposition *whole)
{
    const int closed = whole->worst_excess <= 1;
    const int explained = whole->worst_unattributed <= whole->unattributed_limit;
    char text[400] = "";
    if (!explained)
        snprintf(
            text, sizeof text,
            "unattributed %.3g of max(1, |f|) at row %zu, output %zu exceeds %.3g, far more than rounding: the "
            "loss, optimizer, rates, batches or gradient scales that are declared did not train these weights, "
            "and "
            "contributions are those of the declared training",
            whole->worst_unattributed, whole->worst_unattributed_row, whole->worst_unattributed_output,
            whole->unattributed_limit);
    if (!closed)
        return pk__fail(
            job->context, PK_NOT_CLOSED,
            "closure is %.3g times what the tolerance %.3g allows at row %zu, output %zu; at worst it is "
            "%.3g of a row's largest output or contribution, %.3g of its largest contribution; the worst "
            "step is %zu (closure %.3g at row %zu)%s%s",
            whole->worst_excess, job->tolerance, whole->worst_row, whole->worst_output, whole->worst_closure,
            whole->worst_relative, whole->worst_step, whole->worst_step_closure, whole->worst_step_row,
            explained ? "" : "; and ", text);
    return explained ? PK_OK : pk__fail(job->context, PK_UNATTRIBUTED, "%s", text);
}

/* Passes over all rows. whole has its arrays, or a part callback is there and each pass has own ones. */
static pk_status pk__run_passes(pk__job *job, pk_decomposition *whole, pk_decomposition_part *callback,
                                void *user)
{
    const size_t rows = whole->rows;
    double start = pk__seconds();
    pk_status status =
        job->window.stride && job->run->steps ? pk__steps_save_states(job->context, &job->window) : PK_OK;
    for (size_t first = 0; !status && first < rows; first += job->plan.rows) {
        size_t count = pk__min(job->plan.rows, rows - first);
        pk_decomposition part;
        if (callback) {
            part = *whole;
            part.first_row = first;
            part.rows = count;
            status = pk__allocate_results(job->context, job->options, &part);
        } else {
            pk__view_rows(whole, first, count, &part);
        }
        job->part = &part;
        if (!status)
            status = pk__passes(job, (double)first / (double)rows, (double)count / (double)rows);
        if (!status) {
            part.passes = pk__blocks(job->outputs, job->plan.outputs);
            pk__add_summary(&part, whole);
            if (callback)
                status = callback(user, &part);
        }
        if (callback)
            pk_decomposition_release(job->context, &part);
    }
    for (size_t w = 0; w < job->plan.threads; w++) {
        whole->seconds_examples += job->window.seconds[w];
        whole->seconds_test += job->workers[w].seconds_test;
        whole->seconds_sums += job->workers[w].tangent.seconds_sums;
        whole->seconds_contraction += job->workers[w].tangent.seconds_contraction;
    }
    whole->seconds_read = job->window.seconds_read;
    whole->seconds = pk__seconds() - start;
    whole->unattributed_limit = job->unattributed;
    if (!(job->options->unattributed > 0) && whole->scale < 1)
        whole->unattributed_limit *= whole->scale;
    return status ? status : pk__verdict(job, whole);
}

/* The sizes of the result, the job and its plan, for inputs or for a number of rows without any. */
static pk_status pk__plan_job(pk__job *job, pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, int by_pass, pk_decomposition *whole)
{
    memset(whole, 0, sizeof *whole);
    pk_status status = pk__check_options(context, run, inputs.rows, options);
    if (status)
        return status;
    whole->rows = inputs.rows;
    whole->outputs = pk_readout_count(&options->readout, run->graph.output_width);
    whole->examples = run->examples;
    whole->groups = options->group_count;
    whole->steps = run->steps;
    whole->layers = run->graph.layers;
    status = pk__keep(context, options, whole);
    if (status)
        return status;
    pk__job_begin(job, context, run, inputs, options);
    return pk__job_plan(job, inputs.rows, pk__result_bytes(whole, options), by_pass);
}

/* array, where it is not NULL, in place of inputs. */
static pk_status pk__decompose(pk_context *context, const pk_run *run, pk_matrix inputs, const pk_array *array,
                               const pk_decompose_options *options, pk_decomposition *whole,
                               pk_decomposition_part *callback, void *user)
{
    pk__job own_job, *job = &own_job;
    pk_decompose_options defaults;
    memset(&defaults, 0, sizeof defaults);
    memset(job, 0, sizeof *job);
    options = options ? options : &defaults;
    pk_status status =
        array ? pk_run_check_inputs(context, run, array, "inputs") : pk__check_inputs(context, run, inputs);
    memset(whole, 0, sizeof *whole);
    if (!status && array)
        inputs.rows = array->shape[0];
    if (!status && !inputs.rows)
        status = pk__fail(context, PK_SHAPE, "inputs: there are none");
    if (!status)
        status = pk__plan_job(job, context, run, inputs, options, callback != NULL, whole);
    if (status)
        return status;
    job->input_array = array;
    if (array) /* with memory of its own, less than that of the job */
        status = pk__check_array(context, run, array);
    if (status)
        return status;
    if (!callback)
        status = pk__allocate_results(context, options, whole);
    pk__arena arena = {NULL, 0, 0, 0};
    if (!status) {
        pk__job_layout(job, &arena);
        status = pk_allocate(context, 1, arena.used, "the decomposition's work", &job->memory);
    }
    if (!status) {
        pk__arena own = {job->memory, arena.used, 0, 0};
        pk__job_layout(job, &own);
        status = pk__run_passes(job, whole, callback, user);
    }
    pk_release(context, job->memory);
    return status;
}

PK_API pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs,
                              const pk_decompose_options *options, pk_decomposition *out)
{
    pk_status status = pk__decompose(context, run, inputs, NULL, options, out, NULL, NULL);
    if (status && status != PK_NOT_CLOSED && status != PK_UNATTRIBUTED)
        pk_decomposition_release(context, out);
    return status;
}

static pk_status pk__decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                     const pk_array *array, const pk_decompose_options *options,
                                     pk_decomposition_part *part, void *user, pk_decomposition *summary)
{
    pk_decomposition own;
    if (!part)
        return pk__fail(context, PK_ARGUMENT, "decomposing in parts needs a function that takes them");
    summary = summary ? summary : &own;
    pk_status status = pk__decompose(context, run, inputs, array, options, summary, part, user);
    memset(summary->kept, 0, sizeof summary->kept);
    summary->kept_count = 0;
    return status;
}

PK_API pk_status pk_decompose_parts(pk_context *context, const pk_run *run, pk_matrix inputs,
                                    const pk_decompose_options *options, pk_decomposition_part *part,
                                    void *user, pk_decomposition *summary)
{
    return pk__decompose_parts(context, run, inputs, NULL, options, part, user, summary);
}

PK_API pk_status pk_decompose_array_parts(pk_context *context, const pk_run *run, const pk_array *inputs,
                                          const pk_decompose_options *options, pk_decomposition_part *part,
                                          void *user, pk_decomposition *summary)
{
    const pk_matrix none = {NULL, 0, 0, 0};
    if (!inputs)
        return pk__fail(context, PK_ARGUMENT, "inputs: no array");
    return pk__decompose_parts(context, run, none, inputs, options, part, user, summary);
}

PK_API pk_status pk_decompose_plan(pk_context *context, const pk_run *run, size_t rows,
                                   const pk_decompose_options *options, int in_parts, pk_plan *plan)
{
    pk__job job;
    pk_decompose_options defaults;
    pk_decomposition whole;
    memset(&defaults, 0, sizeof defaults);
    memset(&job, 0, sizeof job);
    if (!run || !plan || !rows)
        return pk__fail(context, PK_ARGUMENT, "pk_decompose_plan: no run, no rows or no place for the plan");
    const pk_matrix inputs = {NULL, rows, run->graph.input_width, run->graph.input_width};
    pk_status status =
        pk__plan_job(&job, context, run, inputs, options ? options : &defaults, in_parts, &whole);
    if (!status)
        *plan = job.plan;
    return status;
}

PK__END_CODE

/* pathkernel/attribution/reference.h: implementation */
#include <string.h>
PK__BEGIN_COLD_CODE

enum { PK__REFERENCE_NODES = 1000 };

/* Sources of updates are the examples 0 .. N-1, and decay, which is number N. */
typedef struct pk__reference_memory {
    pk_replay replay;
    double *node, *weight;                    /* nodes: the rule on [0, 1] */
    pk_real *w, *next, *at, *one;             /* P each: w_s, w_{s+1}, w_s + t D_s, one gradient */
    pk_real *sum, *state, *update;            /* P, V P, P: the optimiser's */
    pk_real *p;                               /* P */
    pk_real *jacobian, *f;                    /* M C x P, M C */
    double *phi, *gradient, *momentum, *rest; /* M C x P, (N + 1) x P twice, P */
} pk__reference_memory;

/* phi = the integral of the Jacobian along the step from w to next. */
static pk_status pk__reference_integral(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                        int nodes, pk__reference_memory *m)
{
    const size_t P = run->parameters, cells = inputs.rows * run->outputs;
    const pk_matrix none = {NULL, 0, 0, 0};
    memset(m->phi, 0, cells * P * sizeof *m->phi);
    for (size_t k = 0; k < pieces * (size_t)nodes; k++) {
        const double t = ((double)(k / (size_t)nodes) + m->node[k % (size_t)nodes]) / (double)pieces;
        const double weight = m->weight[k % (size_t)nodes] / (double)pieces;
        for (size_t p = 0; p < P; p++)
            m->at[p] = (pk_real)(m->w[p] + t * ((double)m->next[p] - m->w[p]));
        pk_status status =
            pk_jacobian(context, &run->graph, m->at, inputs, pk_matrix_view(m->jacobian, cells, P), none);
        if (status)
            return status;
        for (size_t i = 0; i < cells * P; i++)
            m->phi[i] += weight * m->jacobian[i];
    }
    return PK_OK;
}

/* gradient: row i the scaled and weighted gradient of example i, row N that of coupled decay; and the linear form of the step. */
static pk_status pk__reference_step(pk_context *context, const pk_run *run, size_t s, pk__reference_memory *m,
                                    pk_linear_form *form)
{
    const size_t P = run->parameters, N = run->examples;
    const double scale = pk_run_gradient_scale(run, s), rate = run->learning_rates[s];
    pk_batch batch;
    pk_status status = PK_OK;
    pk_run_batch(run, s, &batch);
    memset(m->gradient, 0, (N + 1) * P * sizeof *m->gradient);
    for (size_t b = 0; !status && b < batch.count; b++) {
        const pk_batch item = {1, batch.items + b, NULL};
        const double c = batch.weights ? batch.weights[b] : 1 / (double)batch.count;
        status = pk_loss_gradients(context, &run->graph, run->loss, m->w, &run->train, &item, NULL,
                                   pk_matrix_view(m->one, 1, P));
        for (size_t p = 0; !status && p < P; p++)
            m->gradient[(size_t)batch.items[b] * P + p] += scale * c * m->one[p];
    }
    for (size_t p = 0; p < P; p++) {
        double sum = 0;
        for (size_t i = 0; i < N; i++)
            sum += m->gradient[i * P + p];
        m->sum[p] = (pk_real)sum;
    }
    if (status)
        return status;
    pk_optimizer_update(&run->optimizer, s, rate, 1, P, m->w, m->sum, m->state, m->update);
    if (run->second_moments.data && pk_optimizer_state_vectors(&run->optimizer) == 2)
        status = pk_run_second_moments(context, run, s, m->state + P);
    pk_optimizer_linear_form(&run->optimizer, s, rate, P, m->state, form, m->p);
    for (size_t p = 0; p < P; p++) {
        m->p[p] = form->preconditioned ? m->p[p] : (pk_real)form->rate;
        m->gradient[N * P + p] = form->coupled * m->w[p];
        m->rest[p] = (double)m->next[p] - m->w[p];
    }
    return status;
}

/* Adds a step: < Phi, D_i > for each source, and what is left of D. */
static void pk__reference_add(const pk_run *run, size_t cells, const pk_linear_form *form,
                              pk__reference_memory *m, const pk_reference *out)
{
    const size_t P = run->parameters, N = run->examples;
    for (size_t i = 0; i <= N; i++) {
        double *momentum = m->momentum + i * P, *share = m->gradient + i * P;
        for (size_t p = 0; p < P; p++) {
            momentum[p] = form->carry * momentum[p] + form->gain * share[p];
            share[p] = -m->p[p] * (form->enter * momentum[p] + form->direct * share[p]) -
                       (i == N ? form->decoupled * m->w[p] : 0);
            m->rest[p] -= share[p];
        }
    }
    for (size_t cell = 0; cell < cells; cell++)
        for (size_t i = 0; i <= N + 1; i++) {
            const double *share = i <= N ? m->gradient + i * P : m->rest;
            double sum = 0;
            for (size_t p = 0; p < P; p++)
                sum += m->phi[cell * P + p] * share[p];
            *(i < N    ? &out->by_example[cell * N + i]
              : i == N ? &out->decay[cell]
                       : &out->unattributed[cell]) += sum;
        }
}

/* The definition, with its memory. */
static pk_status pk__reference_run(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                   int nodes, pk__reference_memory *m, const pk_reference *out)
{
    const size_t P = run->parameters, N = run->examples, cells = inputs.rows * run->outputs;
    const pk_matrix f = pk_matrix_view(m->f, inputs.rows, run->outputs);
    pk_linear_form form;
    pk_gauss_legendre(nodes, m->node, m->weight);
    memset(out->by_example, 0, cells * N * sizeof(double));
    memset(out->decay, 0, cells * sizeof(double));
    memset(out->unattributed, 0, cells * sizeof(double));
    pk_status status = pk_replay_weights(context, &m->replay, 0, m->next);
    if (!status)
        status = pk_graph_evaluate(context, &run->graph, m->next, inputs, f);
    for (size_t cell = 0; cell < cells; cell++)
        out->initial[cell] = m->f[cell];
    for (size_t s = 0; !status && s < run->steps; s++) {
        memcpy(m->w, m->next, P * sizeof *m->w);
        status = pk__progress(context, "reference", (double)s / (double)run->steps);
        if (!status)
            status = pk_replay_weights(context, &m->replay, s + 1, m->next);
        if (!status)
            status = pk__reference_integral(context, run, inputs, pieces, nodes, m);
        if (!status)
            status = pk__reference_step(context, run, s, m, &form);
        if (!status)
            pk__reference_add(run, cells, &form, m, out);
    }
    if (!status)
        status = pk_graph_evaluate(context, &run->graph, m->next, inputs, f);
    for (size_t cell = 0; cell < cells; cell++) {
        out->final[cell] = m->f[cell];
        out->closure[cell] = out->final[cell] - out->initial[cell] - out->decay[cell] - out->unattributed[cell];
        for (size_t i = 0; i < N; i++)
            out->closure[cell] -= out->by_example[cell * N + i];
    }
    return status;
}

static void pk__reference_take(pk__arena *arena, const pk_run *run, size_t cells, int nodes,
                               pk__reference_memory *m)
{
    const size_t P = run->parameters, real = sizeof(pk_real), number = sizeof(double);
    const size_t vectors = pk_optimizer_state_vectors(&run->optimizer);
    size_t sources = 0, results = 0;
    if (!pk__multiply(run->examples + 1, P, &sources) || !pk__multiply(cells, P, &results))
        arena->overflow = 1;
    m->node = (double *)pk__arena_take(arena, (size_t)nodes, number);
    m->weight = (double *)pk__arena_take(arena, (size_t)nodes, number);
    pk_real **const vector[] = {&m->w, &m->next, &m->at, &m->one, &m->sum, &m->update, &m->p};
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++)
        *vector[i] = (pk_real *)pk__arena_take(arena, P, real);
    m->state = (pk_real *)pk__arena_take(arena, P, vectors * real);
    m->jacobian = (pk_real *)pk__arena_take(arena, results, real);
    m->f = (pk_real *)pk__arena_take(arena, cells, real);
    m->phi = (double *)pk__arena_take(arena, results, number);
    m->gradient = (double *)pk__arena_take(arena, sources, number);
    m->momentum = (double *)pk__arena_take(arena, sources, number);
    m->rest = (double *)pk__arena_take(arena, P, number);
}

PK_API pk_status pk_decompose_reference(pk_context *context, const pk_run *run, pk_matrix inputs, size_t pieces,
                                        int nodes, const pk_reference *out)
{
    if (!run || !run->weights.data || !out || !out->initial || !out->final || !out->by_example || !out->decay ||
        !out->unattributed || !out->closure)
        return pk__fail(context, PK_ARGUMENT, "reference: the run or an array of the result is missing");
    if (nodes < 1 || nodes > PK__REFERENCE_NODES || !pieces || pieces > SIZE_MAX / PK__REFERENCE_NODES)
        return pk__fail(context, PK_ARGUMENT,
                        "reference: %zu pieces of %d nodes; there is at least 1 piece, with 1 to %d nodes",
                        pieces, nodes, (int)PK__REFERENCE_NODES);
    pk_status status =
        pk__sweep_matrix(context, "reference", "inputs", inputs, inputs.rows, run->graph.input_width);
    if (status)
        return status;
    size_t cells = 0;
    pk__reference_memory memory;
    memset(&memory, 0, sizeof memory);
    pk__arena arena = {NULL, 0, 0, !pk__multiply(inputs.rows, run->outputs, &cells)};
    pk__reference_take(&arena, run, cells, nodes, &memory);
    if (arena.overflow)
        return pk__fail(context, PK_OVERFLOW, "reference: the memory for %zu rows overflows", inputs.rows);
    void *block = NULL;
    status = pk_allocate(context, arena.used, 1, "the reference decomposition", &block);
    if (!status)
        status = pk_replay_prepare(context, run, 0, &memory.replay);
    if (!status) {
        pk__arena own = {(unsigned char *)block, arena.used, 0, 0};
        pk__reference_take(&own, run, cells, nodes, &memory);
        status = pk__reference_run(context, run, inputs, pieces, nodes, &memory, out);
    }
    pk_replay_release(context, &memory.replay);
    pk_release(context, block);
    return status;
}

PK__END_COLD_CODE

/* pathkernel/kernels/kernel.h: implementation */
#include <string.h>
PK__BEGIN_CODE

/* How a layer's part is had. */
typedef enum pk__gram_form {
    PK__GRAM_OUTER,    /* (a . a' + 1) (d . d') */
    PK__GRAM_CONSTANT, /* the same, d . d' the same for all rows */
    PK__GRAM_PLACES,   /* a sum of that over pairs of places */
    PK__GRAM_ROWS      /* the gradients' products */
} pk__gram_form;

typedef struct pk__gram_layer {
    const pk_node *node;
    pk__gram_form form;
    pk_real bias;             /* 1 or 0 */
    int data;                 /* its inputs are the network's, and not kept */
    size_t left, right;       /* numbers kept of a row: inputs; cotangents or gradients, of all outputs */
    size_t left_at, right_at; /* of the numbers kept of a row, how many are in front of these */
    size_t depth;             /* terms of a product of two cotangents or gradients */
    size_t places, examples;  /* PLACES: how many places of one row with how many other rows at one time */
    pk_real *constant;        /* CONSTANT: kept x kept */
} pk__gram_layer;

/* Rows with their factors: layer after layer, each capacity x left, then capacity x right. */
typedef struct pk__gram_side {
    pk_matrix inputs;
    int leads; /* the first of the two */
    size_t first, rows, capacity;
    pk_real *factors;
} pk__gram_side;

typedef struct pk__gram {
    const char *name; /* for messages */
    pk_context *context;
    const pk_graph *graph;
    const pk_real *weights;
    size_t outputs, kept;   /* kept: outputs that the result has, all or 1 */
    size_t layers, numbers; /* numbers kept of a row */
    pk__gram_layer *layer;
    size_t tile, sweep; /* rows of a tile, and of one pass through the network: powers of two */
    size_t part;        /* rows of one pass back */
    size_t unit;        /* the larger of tile and sweep: where sides are cut */
    int together;       /* the rows of both sides go through the network as one */
    size_t left, right; /* numbers of a lane's products */
    int symmetric;
    pk_matrix result;
    int threads;
    size_t lane_bytes;
    unsigned char *lanes;
    size_t *bad;      /* of each lane: the first pair of rows that is not finite */
    double done, all; /* pairs of rows */
} pk__gram;

/* Rows at ... of a side. */
typedef struct pk__gram_rows {
    const pk__gram_side *side;
    size_t at, rows;
} pk__gram_rows;

/* One thread's memory. */
typedef struct pk__gram_lane {
    pk__tape forward, back;
    pk_real *inputs;
    pk_real *left, *right, *tile, *spread;
} pk__gram_lane;

/* The tape of a pass back stands first: the threads that share the operations of a pass forward take nothing else. */
static void pk__gram_back_take(pk__arena *arena, const pk__gram *gram, pk__tape *back)
{
    pk__pass_take(arena, gram->graph, gram->part, gram->outputs, 0, back);
}

static void pk__gram_lane_take(pk__arena *arena, const pk__gram *gram, pk__gram_lane *lane)
{
    const size_t width = gram->tile * gram->kept;
    pk__gram_back_take(arena, gram, &lane->back);
    pk__pass_take(arena, gram->graph, gram->sweep, 0, 0, &lane->forward);
    lane->inputs = pk__arena_take(arena, gram->sweep, gram->graph->input_width * sizeof(pk_real));
    lane->left = pk__arena_take(arena, gram->left, sizeof(pk_real));
    lane->right = pk__arena_take(arena, gram->right, sizeof(pk_real));
    lane->tile = pk__arena_take(arena, width, width * sizeof(pk_real));
    lane->spread = pk__arena_take(arena, width, sizeof(pk_real));
}

static pk__arena pk__gram_arena(const pk__gram *gram, int lane)
{
    const pk__arena arena = {gram->lanes + (size_t)lane * gram->lane_bytes, gram->lane_bytes, 0, 0};
    return arena;
}

static pk__gram_lane pk__gram_lane_of(const pk__gram *gram, int number)
{
    pk__arena arena = pk__gram_arena(gram, number);
    pk__gram_lane lane;
    pk__gram_lane_take(&arena, gram, &lane);
    return lane;
}

/* Number `at` of the factors of a layer; NULL where no layer has any: nothing may be added to NULL. */
static pk_real *pk__gram_factors(const pk__gram_side *side, size_t layer_at, size_t at)
{
    return side->factors ? side->factors + side->capacity * layer_at + at : NULL;
}

/* Where a layer's factors of a row are; inputs that are data are where the caller has them. */
static pk_real *pk__gram_left(const pk__gram_side *side, const pk__gram_layer *layer, size_t row)
{
    return layer->data ? side->inputs.data + (side->first + row) * side->inputs.ld
                       : pk__gram_factors(side, layer->left_at, row * layer->left);
}

static pk_real *pk__gram_right(const pk__gram_side *side, const pk__gram_layer *layer, size_t row)
{
    return pk__gram_factors(side, layer->right_at, row * layer->right);
}

/* ---- factors ------------------------------------------------------------------------------------------- */

/* What else is kept of the rows of a tape after their pass back, which are rows at ... of the side. */
static void pk__gram_keep(const pk__gram *gram, const pk__tape *tape, const pk__gram_side *side, size_t at,
                          size_t rows)
{
    const size_t outputs = gram->outputs;
    for (size_t l = 0; l < gram->layers; l++) {
        const pk__gram_layer *layer = &gram->layer[l];
        const pk_node *node = layer->node;
        const pk_real *cotangent = tape->cotangent[node - gram->graph->nodes];
        pk_real *left = pk__gram_left(side, layer, at), *right = pk__gram_right(side, layer, at);
        if (layer->form == PK__GRAM_ROWS) {
            pk_call call;
            pk__pass_call(tape, node, rows, outputs, &call);
            call.weights = gram->weights + node->weight_offset;
            call.out_cotangent = cotangent;
            call.gradient = right;
            pk__node_row_gradients(&call);
        } else if (layer->form == PK__GRAM_PLACES) {
            for (size_t r = 0; r < rows; r++)
                pk__node_places(tape, node, r, outputs, left + r * layer->left, right + r * layer->right);
        } else {
            if (!layer->data)
                memcpy(left, tape->value[node->inputs[0]], rows * layer->left * sizeof *left);
            if (layer->form == PK__GRAM_CONSTANT && side->leads && side->first + at == 0)
                /* any row's will do; one thread has this one */
                pk__gemm(0, 1, gram->kept, gram->kept, layer->depth, 1, cotangent, layer->depth, cotangent,
                         layer->depth, 0, layer->constant, gram->kept);
        }
    }
}

/* The pass back of part number `part` of the rows of one or two sides, whose values stand one behind the other in a tape.
 * Cotangents that are kept are written where they are kept. */
static void pk__gram_back(const pk__gram *gram, const pk__tape *values, const pk__gram_rows *sides, size_t part,
                          int lane)
{
    const size_t first = pk__blocks(sides[0].rows, gram->part);
    const pk__gram_rows *from = &sides[part >= first];
    const size_t skipped = (part < first ? part : part - first) * gram->part;
    const size_t row = skipped + (part < first ? 0 : sides[0].rows), at = from->at + skipped,
                 rows = pk__min(gram->part, from->rows - skipped);
    const pk_graph *graph = gram->graph;
    const pk__line line = {gram->weights, NULL, NULL};
    pk__arena arena = pk__gram_arena(gram, lane);
    pk__tape back, *tape = &back;
    pk__gram_back_take(&arena, gram, tape);
    for (size_t n = 0; n < graph->node_count; n++)
        tape->value[n] = values->value[n] + row * graph->nodes[n].width;
    for (size_t l = 0; l < gram->layers; l++)
        if (gram->layer[l].form == PK__GRAM_OUTER)
            tape->cotangent[gram->layer[l].node - graph->nodes] =
                pk__gram_right(from->side, &gram->layer[l], at);
    pk__pass_seed_units(tape, rows);
    pk__pass_reverse(tape, &line, rows, gram->outputs);
    pk__gram_keep(gram, tape, from->side, at, rows);
}

/* Pass number `pass` of a side's rows, at most gram->sweep, or of both sides', through the network: with several threads for
 * each operation, or one. lane: of the calling thread. */
static void pk__gram_pass(const pk__gram *gram, const pk__gram_side *side, const pk__gram_side *other,
                          size_t pass, int threads, int lane)
{
    const size_t width = gram->graph->input_width, own = pk__blocks(side->rows, gram->sweep);
    const pk__gram_side *to = pass < own ? side : other;
    const size_t at = (pass < own ? pass : pass - own) * gram->sweep;
    const pk__gram_rows sides[2] = {{to, at, pk__min(gram->sweep, to->rows - at)},
                                    {other, 0, gram->together && other ? other->rows : 0}};
    const pk__line line = {gram->weights, NULL, NULL};
    pk__gram_lane room = pk__gram_lane_of(gram, lane);
    const pk_real *inputs = room.inputs;
    size_t rows = 0, parts = 0;
    for (size_t s = 0; s < 2 && sides[s].rows; s++) {
        const pk_matrix *from = &sides[s].side->inputs;
        const pk_real *data = from->data + (sides[s].side->first + sides[s].at) * from->ld;
        if (!sides[1].rows && from->ld == width)
            inputs = data;
        else
            for (size_t r = 0; r < sides[s].rows; r++)
                memcpy(room.inputs + (rows + r) * width, data + r * from->ld, width * sizeof *data);
        rows += sides[s].rows;
        parts += pk__blocks(sides[s].rows, gram->part);
    }
    room.forward.threads = threads;
    room.forward.context = gram->context;
    pk__pass_forward(&room.forward, &line, rows, inputs);
    if (threads > 1) {
        pk__team team = pk__team_of(gram->context, threads, parts);
        PK__PARALLEL(team)
        for (size_t part = pk__first_task(&team); part < parts; part = pk__next_task(&team))
            pk__gram_back(gram, &room.forward, sides, part, pk__thread());
        pk__team_end(&team);
    } else { /* no region of one thread inside one of several: that would be its thread 0 */
        for (size_t part = 0; part < parts; part++)
            pk__gram_back(gram, &room.forward, sides, part, lane);
    }
}

/* Fills a side, and perhaps another, with their rows first .. first + rows - 1. Threads have passes of their own or, where
 * some of them would wait, share the operations of each: in no region around those, which would start threads anew. */
static void pk__gram_fill(const pk__gram *gram, pk__gram_side *side, pk__gram_side *other)
{
    const size_t threads = (size_t)gram->threads;
    const size_t passes = gram->together ? 1
                                         : pk__blocks(side->rows, gram->sweep) +
                                               (other ? pk__blocks(other->rows, gram->sweep) : 0);
    const int workers = gram->threads;
    if (passes % threads && passes < 4 * threads) {
        for (size_t pass = 0; pass < passes; pass++)
            pk__gram_pass(gram, side, other, pass, workers, 0);
    } else {
        pk__team team = pk__team_of(gram->context, workers, passes);
        PK__PARALLEL(team)
        for (size_t pass = pk__first_task(&team); pass < passes; pass = pk__next_task(&team))
            pk__gram_pass(gram, side, other, pass, 1, pk__thread());
        pk__team_end(&team);
    }
}

/* ---- tiles --------------------------------------------------------------------------------------------- */

/* tile += sum over pairs of places (a_q . a_r + bias) (d_q . d_r). */
static void pk__gram_places(const pk__gram *gram, const pk__gram_layer *layer, pk__gram_lane *lane,
                            const pk_real *x_left, const pk_real *x_right, const pk_real *y_left,
                            const pk_real *y_right, size_t rows, size_t columns)
{
    const size_t positions = layer->node->positions, in = layer->node->fan_in, kept = gram->kept,
                 depth = layer->depth, ld = columns * kept;
    for (size_t p = 0, together; p < rows * positions; p += together) {
        /* Places of one row. */
        together = pk__min(layer->places, positions - p % positions);
        for (size_t j = 0; j < columns; j += layer->examples) {
            const size_t count = pk__min(layer->examples, columns - j), across = count * positions;
            pk__gemm(0, 1, together, across, in, 1, x_left + p * in, in, y_left + j * positions * in, in, 0,
                     lane->left, across);
            pk__gemm(0, 1, together * kept, across * kept, depth, 1, x_right + p * kept * depth, depth,
                     y_right + j * positions * kept * depth, depth, 0, lane->right, across * kept);
            for (size_t q = 0; q < together; q++)
                for (size_t k = 0; k < kept; k++) {
                    const pk_real *left = lane->left + q * across;
                    const pk_real *right = lane->right + (q * kept + k) * across * kept;
                    pk_real *to = lane->tile + (p / positions * kept + k) * ld + j * kept;
                    for (size_t r = 0; r < across; r++)
                        for (size_t l = 0; l < kept; l++)
                            to[r / positions * kept + l] += (left[r] + layer->bias) * right[r * kept + l];
                }
        }
    }
}

/* tile = the kernel of rows at i ... of x and j ... of y. */
static void pk__gram_tile(const pk__gram *gram, pk__gram_lane *lane, const pk__gram_side *x, size_t i,
                          size_t rows, const pk__gram_side *y, size_t j, size_t columns)
{
    const size_t kept = gram->kept, ld = columns * kept;
    const pk_node *input = NULL; /* whose Gram matrix is in lane->left */
    memset(lane->tile, 0, rows * kept * ld * sizeof *lane->tile);
    for (size_t l = 0; l < gram->layers; l++) {
        const pk__gram_layer *layer = &gram->layer[l];
        const size_t in = layer->node->fan_in, depth = layer->depth;
        const pk_real *x_left = pk__gram_left(x, layer, i), *x_right = pk__gram_right(x, layer, i);
        const pk_real *y_left = pk__gram_left(y, layer, j), *y_right = pk__gram_right(y, layer, j);
        if (layer->form == PK__GRAM_ROWS) {
            pk__gemm(0, 1, rows * kept, ld, depth, 1, x_right, depth, y_right, depth, 1, lane->tile, ld);
            continue;
        }
        if (layer->form == PK__GRAM_PLACES) {
            pk__gram_places(gram, layer, lane, x_left, x_right, y_left, y_right, rows, columns);
            input = NULL;
            continue;
        }
        if (input != pk__layer_input(gram->graph, layer->node))
            pk__gemm(0, 1, rows, columns, in, 1, x_left, layer->data ? x->inputs.ld : in, y_left,
                     layer->data ? y->inputs.ld : in, 0, lane->left, columns);
        input = pk__layer_input(gram->graph, layer->node);
        if (layer->form == PK__GRAM_OUTER)
            pk__gemm(0, 1, rows * kept, ld, depth, 1, x_right, depth, y_right, depth, 0, lane->right, ld);
        for (size_t r = 0; r < rows; r++) {
            for (size_t s = 0; s < ld; s++)
                lane->spread[s] = lane->left[r * columns + s / kept] + layer->bias;
            for (size_t k = 0; k < kept; k++) {
                pk_real *to = lane->tile + (r * kept + k) * ld;
                const pk_real *right = lane->right + (r * kept + k) * ld;
                if (layer->form == PK__GRAM_OUTER)
                    for (size_t s = 0; s < ld; s++)
                        to[s] += lane->spread[s] * right[s];
                else
                    for (size_t s = 0; s < kept; s++)
                        for (size_t t = s; layer->constant[k * kept + s] != 0 && t < ld; t += kept)
                            to[t] += lane->spread[t] * layer->constant[k * kept + s];
            }
        }
    }
}

/* Writes a tile whose first row is i of all x, whose first column j of all y; the first pair that is not finite, or
 * SIZE_MAX. */
static size_t pk__gram_write(const pk__gram *gram, pk_real *tile, size_t i, size_t rows, size_t j,
                             size_t columns)
{
    const size_t kept = gram->kept, ld = columns * kept, to_ld = gram->result.ld;
    pk_real *to = gram->result.data + i * kept * to_ld + j * kept;
    size_t bad = SIZE_MAX;
    if (gram->symmetric && i == j)
        for (size_t r = 0; r < ld; r++)
            for (size_t s = 0; s < r; s++)
                tile[s * ld + r] = tile[r * ld + s];
    else if (gram->symmetric)
        pk__transpose(rows * kept, ld, tile, gram->result.data + j * kept * to_ld + i * kept, to_ld);
    for (size_t r = 0; r < rows * kept; r++) {
        const pk_real *from = tile + r * ld;
        memcpy(to + r * to_ld, from, ld * sizeof *to);
        if (bad == SIZE_MAX && !pk__all_finite(from, ld)) {
            size_t s = 0;
            while (pk__finite(from[s]))
                s++;
            bad = (i + r / kept) * (gram->result.cols / kept) + j + s / kept;
        }
    }
    return bad;
}

/* All pairs of two sides, or of one with itself. */
static pk_status pk__gram_pairs(pk__gram *gram, const pk__gram_side *x, const pk__gram_side *y)
{
    const size_t down = pk__blocks(x->rows, gram->tile), across = pk__blocks(y->rows, gram->tile);
    const int half = x == y, workers = gram->threads;
    const size_t tiles = half ? down * (down + 1) / 2 : down * across, most = 32 * (size_t)workers;
    for (size_t start = 0; start < tiles; start += most) {
        const size_t end = start + pk__min(most, tiles - start);
        pk_status status = pk__progress(gram->context, "kernel", gram->done / gram->all);
        if (status)
            return status;
        const size_t count = end - start;
        pk__team team = pk__team_of(gram->context, workers, count);
        PK__PARALLEL(team)
        for (size_t task = pk__first_task(&team); task < count; task = pk__next_task(&team)) {
            pk__gram_lane lane = pk__gram_lane_of(gram, pk__thread());
            const size_t t = start + task;
            size_t i = t / across, j = t % across;
            if (half) {
                i = 0;
                for (j = t; j > i; i++)
                    j -= i + 1;
            }
            i *= gram->tile, j *= gram->tile;
            const size_t rows = pk__min(gram->tile, x->rows - i), columns = pk__min(gram->tile, y->rows - j);
            pk__gram_tile(gram, &lane, x, i, rows, y, j, columns);
            size_t *bad = &gram->bad[pk__thread()];
            *bad = pk__min(*bad, pk__gram_write(gram, lane.tile, x->first + i, rows, y->first + j, columns));
        }
        pk__team_end(&team);
        gram->done += (double)(end - start) / (double)tiles * (double)x->rows * (double)y->rows *
                      (gram->symmetric && !half ? 2 : 1);
    }
    return PK_OK;
}

/* ---- how it is cut ------------------------------------------------------------------------------------- */

/* The form of a layer, by flops a pair of rows. */
static void pk__gram_plan_layer(const pk__gram *gram, double rows, pk__gram_layer *layer)
{
    const pk_node *node = layer->node;
    const size_t kept = gram->kept, group = gram->outputs / kept, room = (size_t)1 << 16;
    const int outer = pk__is_outer(node);
    const double c = (double)kept, in = (double)node->fan_in,
                 weights = (double)node->weight_count * (double)group;
    const double all = c * (double)group, places = (double)node->positions;
    const double by_rows = 2 * c * c * weights + 4 * all * places * (double)node->weight_count / rows;
    const double factored =
        places * places * (2 * in + 2 * c * (double)(node->fan_out * group) * c + 8 * c * c);
    layer->form = outer ? node->cotangent_constant ? PK__GRAM_CONSTANT : PK__GRAM_OUTER
                  : node->tangent_form == PK_TANGENT_OUTER && factored < by_rows ? PK__GRAM_PLACES
                                                                                 : PK__GRAM_ROWS;
    if (layer->form == PK__GRAM_ROWS) {
        layer->right = node->weight_count * gram->outputs;
        layer->depth = node->weight_count * group;
        return;
    }
    layer->bias = (pk_real)pk__has_bias(node);
    layer->data = outer && node->inputs[0] == 0;
    layer->left = layer->data ? 0 : node->positions * node->fan_in;
    layer->right = layer->form == PK__GRAM_CONSTANT ? 0 : node->width * gram->outputs;
    layer->depth = node->fan_out * group;
    if (layer->form == PK__GRAM_PLACES) {
        const size_t row = node->positions * kept;
        layer->places = pk__max(1, pk__min(node->positions, room / row / kept));
        layer->examples = pk__max(1, room / row / kept / layer->places);
    }
}

/* Layers, tiles and the memory of a thread, from shapes alone. */
static pk_status pk__gram_plan(pk__gram *gram, size_t rows, size_t columns)
{
    const pk_graph *graph = gram->graph;
    const size_t kept = gram->kept;
    size_t values = graph->input_width, cotangents = 0;
    for (size_t n = 1; n < graph->node_count; n++) {
        values += graph->nodes[n].width;
        cotangents += graph->nodes[n].varies ? graph->nodes[n].width * gram->outputs : 0;
    }
    /* Tiles of about 128 x 128 numbers stay in the second-level cache with their products; there should be several. */
    gram->tile = 64;
    while (gram->tile > 1 && gram->tile * kept > 128)
        gram->tile /= 2;
    while (gram->tile > (kept > 1 ? 8 : 16) && pk__max(rows, columns) < 2 * gram->tile)
        gram->tile /= 2;
    /* Every pass reads all weights: many rows. A pass back has as many rows of cotangents as there are outputs: fewer, which
     * stay in the second-level cache. */
    const size_t most = (size_t)1 << 22, all = gram->symmetric ? rows : rows + columns;
    gram->sweep = 128;
    while (gram->sweep > 1 && (values > most / gram->sweep || gram->sweep / 2 >= all))
        gram->sweep /= 2;
    gram->part = gram->sweep;
    while (gram->part > 1 && (gram->part * gram->outputs > 256 || cotangents > most / gram->part))
        gram->part /= 2;
    gram->together = all <= gram->sweep;
    gram->unit = pk__max(gram->tile, gram->sweep);
    gram->left = gram->tile * gram->tile;
    gram->right = gram->left * kept * kept;
    for (size_t l = 0; l < graph->layers; l++) {
        pk__gram_layer *layer = &gram->layer[gram->layers];
        layer->node = pk_graph_layer(graph, l);
        pk__gram_plan_layer(gram, (double)rows * (double)columns / ((double)rows + (double)columns), layer);
        layer->left_at = gram->numbers;
        layer->right_at = gram->numbers + layer->left;
        gram->numbers = layer->right_at + layer->right;
        gram->layers++;
        const size_t pairs = layer->places * layer->examples * layer->node->positions;
        gram->left = pk__max(gram->left, pairs);
        gram->right = pk__max(gram->right, pairs * kept * kept);
    }
    pk__arena arena = {NULL, 0, 0, 0};
    pk__gram_lane lane;
    pk__gram_lane_take(&arena, gram, &lane);
    gram->lane_bytes = arena.used;
    if (arena.overflow || gram->numbers > SIZE_MAX / 4096 / gram->unit)
        return pk__fail(gram->context, PK_OVERFLOW, "%s: the memory for this network overflows", gram->name);
    return PK_OK;
}

enum { PK__OPERATION_TILES = 8 };

/* How many rows of either side are in memory at one time, and how many threads run, within the memory there is. */
static pk_status pk__gram_cut(pk__gram *gram, size_t x, size_t y, size_t *x_rows, size_t *y_rows)
{
    pk_context *context = gram->context;
    const size_t row = gram->numbers * sizeof(pk_real), unit = gram->unit,
                 used = context ? context->memory_used : 0;
    const size_t limit = context ? context->memory_limit : 0, other = 4096; /* what allocations add */
    const int whole = gram->symmetric && x <= unit;
    const size_t least = pk__min(x, unit) + (whole ? 0 : pk__min(y, unit));
    const size_t rows = least * row + other;
    size_t room = limit ? limit - pk__min(used, limit) : rows + ((size_t)1 << 30);
    const double work = 6 * pk__graph_work(gram->graph) * (double)gram->outputs * ((double)x + (double)y) +
                        2 * (double)x * (double)y * (double)gram->numbers * (double)gram->kept;
    size_t threads = (size_t)pk_threads(context), bytes = 0;
    threads = work / 1048576 < (double)threads ? pk__max(1, (size_t)(work / 1048576)) : threads;
    /* No more than the tiles, the passes back, or what an operation is cut into. */
    size_t tasks = 0;
    if (!pk__multiply(pk__blocks(x, gram->tile), pk__blocks(y, gram->tile), &tasks))
        tasks = threads;
    tasks = pk__max(tasks, pk__blocks(x, gram->part) + pk__blocks(y, gram->part));
    threads = pk__min(threads, pk__max(tasks, PK__OPERATION_TILES));
    if (!pk__multiply(threads, gram->lane_bytes, &bytes) || bytes > SIZE_MAX / 2 - room)
        return pk__fail(context, PK_OVERFLOW, "%s: the memory of %zu threads overflows", gram->name, threads);
    if (!limit)
        room += bytes;
    while (threads > 1 && threads * gram->lane_bytes + rows > room)
        threads--;
    if (threads * gram->lane_bytes + rows > room)
        return pk__fail(
            context, PK_MEMORY_LIMIT,
            "%s: a kernel of this network within %zu bytes is not possible; the least that would do is %zu "
            "bytes",
            gram->name, limit, used + gram->lane_bytes + rows);
    gram->threads = (int)threads;
    const size_t left = room - threads * gram->lane_bytes - other, capacity = row ? left / row : SIZE_MAX;
    *x_rows = x;
    *y_rows = gram->symmetric ? 0 : y;
    if (x <= capacity && *y_rows <= capacity - x)
        return PK_OK;
    /* One side as a whole, or most of the memory for x. */
    *y_rows = y <= capacity - pk__min(x, unit) && !gram->symmetric
                  ? y
                  : pk__min(y, pk__max(unit, capacity / 4 / unit * unit));
    *x_rows = pk__min(x, pk__max(unit, (capacity - *y_rows) / unit * unit));
    return PK_OK;
}

/* ---- all of it ----------------------------------------------------------------------------------------- */

static pk_status pk__gram_blocks(pk__gram *gram, pk__gram_side *x, pk__gram_side *y)
{
    const size_t rows = x->inputs.rows, columns = y->inputs.rows;
    const int whole = !gram->symmetric && y->capacity == columns; /* y is filled once */
    y->rows = columns;
    for (x->first = 0; x->first < rows; x->first += x->capacity) {
        pk_status status = pk__progress(gram->context, "kernel", gram->done / gram->all);
        if (status)
            return status;
        x->rows = pk__min(x->capacity, rows - x->first);
        pk__gram_fill(gram, x, whole && !x->first ? y : NULL);
        if (gram->symmetric || whole)
            status = pk__gram_pairs(gram, x, whole ? y : x);
        /* Of a symmetric kernel the blocks below the diagonal. */
        const size_t end = whole ? 0 : gram->symmetric ? x->first : columns;
        for (y->first = 0; !status && y->first < end; y->first += y->capacity) {
            y->rows = pk__min(y->capacity, end - y->first);
            pk__gram_fill(gram, y, NULL);
            status = pk__gram_pairs(gram, x, y);
        }
        y->first = 0;
        if (status)
            return status;
    }
    return PK_OK;
}

/* With the layers' memory. */
static pk_status pk__gram_run(pk__gram *gram, pk__gram_side *x, pk__gram_side *y)
{
    pk_context *context = gram->context;
    const size_t row = gram->numbers;
    size_t pair = SIZE_MAX;
    pk_status status = pk__gram_cut(gram, x->inputs.rows, y->inputs.rows, &x->capacity, &y->capacity);
    /* Both sides at once: glibc gives back to the system, and takes anew page by page at the next call, what is larger than
     * twice the largest of the blocks that are freed. That cost a quarter of the time of 128 x 128 rows. */
    if (!status)
        status =
            pk__allocate(context, x->capacity + y->capacity, row * sizeof(pk_real), 0, gram->name, &x->factors);
    if (!status && x->factors)
        y->factors = x->factors + x->capacity * row;
    if (!status)
        status = pk__allocate(context, (size_t)gram->threads, gram->lane_bytes, 0, gram->name, &gram->lanes);
    if (!status)
        status = pk_allocate(context, (size_t)gram->threads, sizeof *gram->bad, gram->name, &gram->bad);
    if (!status) {
        for (int t = 0; t < gram->threads; t++)
            gram->bad[t] = SIZE_MAX;
        status = pk__gram_blocks(gram, x, y);
        for (int t = 0; t < gram->threads; t++)
            pair = pk__min(pair, gram->bad[t]);
        if (!status && pair != SIZE_MAX)
            status = pk__fail(context, PK_NOT_FINITE, "%s: the kernel of row %zu with row %zu is not finite",
                              gram->name, pair / y->inputs.rows, pair % y->inputs.rows);
    }
    pk_release(context, gram->bad);
    pk_release(context, gram->lanes);
    pk_release(context, x->factors);
    return status;
}

static pk_status pk__gram_check(pk__gram *gram, pk_matrix x, pk_matrix y)
{
    const pk_graph *graph = gram->graph;
    pk_context *context = gram->context;
    size_t rows = 0, columns = 0;
    pk_status status = pk__sweep_graph(context, gram->name, graph, gram->weights);
    if (!status)
        status = pk__sweep_matrix(context, gram->name, "first inputs", x, x.rows, graph->input_width);
    if (!status)
        status = pk__sweep_matrix(context, gram->name, "second inputs", y, y.rows, graph->input_width);
    if (status)
        return status;
    gram->outputs = graph->output_width;
    gram->kept = gram->kept ? 1 : gram->outputs;
    if (!pk__multiply(x.rows, gram->kept, &rows) || !pk__multiply(y.rows, gram->kept, &columns))
        return pk__fail(context, PK_OVERFLOW, "%s: %zu and %zu rows of %zu outputs overflow", gram->name,
                        x.rows, y.rows, gram->outputs);
    status = pk__sweep_matrix(context, gram->name, "entries of the result", gram->result, rows, columns);
    const pk_matrix read[3] = {x, y, pk__as_row(gram->weights, graph->parameters)};
    if (!status)
        status = pk__sweep_results(context, gram->name, 3, read, 1, &gram->result);
    for (size_t r = 0; !status && graph->checked && r < x.rows; r++)
        status = pk_graph_check_inputs(context, graph, r, x.data + r * x.ld);
    for (size_t r = 0; !status && graph->checked && !gram->symmetric && r < y.rows; r++)
        status = pk_graph_check_inputs(context, graph, r, y.data + r * y.ld);
    return status;
}

static pk_status pk__gram_make(const char *name, pk_context *context, const pk_graph *graph,
                               const pk_real *weights, pk_matrix x, pk_matrix y, pk_matrix result, int trace)
{
    pk__gram gram;
    pk__gram_side sides[2];
    pk_real *constants = NULL;
    memset(&gram, 0, sizeof gram);
    memset(sides, 0, sizeof sides);
    y = y.data ? y : x;
    gram.name = name;
    gram.context = context;
    gram.graph = graph;
    gram.weights = weights;
    gram.result = result;
    gram.kept = (size_t)trace;
    gram.symmetric = x.data == y.data && x.rows == y.rows && x.ld == y.ld;
    gram.all = (double)x.rows * (double)y.rows;
    pk_status status = pk__gram_check(&gram, x, y);
    if (status || !x.rows || !y.rows)
        return status;
    if (!graph->nodes[graph->node_count - 1].varies) { /* no weight reaches the output */
        for (size_t r = 0; r < result.rows; r++)
            memset(result.data + r * result.ld, 0, result.cols * sizeof *result.data);
        return PK_OK;
    }
    status = pk_allocate(context, graph->layers, sizeof *gram.layer, name, &gram.layer);
    if (!status)
        status =
            pk_allocate(context, graph->layers, gram.kept * gram.kept * sizeof *constants, name, &constants);
    if (!status)
        status = pk__gram_plan(&gram, x.rows, y.rows);
    for (size_t l = 0; !status && l < graph->layers; l++)
        gram.layer[l].constant = constants + l * gram.kept * gram.kept;
    sides[0].inputs = x;
    sides[0].leads = 1;
    sides[1].inputs = y;
    if (!status)
        status = pk__gram_run(&gram, &sides[0], &sides[1]);
    pk_release(context, constants);
    pk_release(context, gram.layer);
    return status;
}

PK_API pk_status pk_kernel_ntk(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix x,
                               pk_matrix y, pk_matrix gram)
{
    return pk__gram_make("ntk", context, graph, weights, x, y, gram, 0);
}

PK_API pk_status pk_kernel_ntk_trace(pk_context *context, const pk_graph *graph, const pk_real *weights,
                                     pk_matrix x, pk_matrix y, pk_matrix gram)
{
    return pk__gram_make("ntk trace", context, graph, weights, x, y, gram, 1);
}

PK__END_CODE

#endif /* PATHKERNEL_IMPLEMENTATION */
