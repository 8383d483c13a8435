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
#ifndef PATHKERNEL_STATUS_H
#define PATHKERNEL_STATUS_H

/* The implementation maps files and appends to them: POSIX. A strict -std=c11 hides POSIX unless it is
 * asked for before the first header of the C library. */
#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(_POSIX_C_SOURCE) && !defined(_FEATURES_H)
#define _POSIX_C_SOURCE 200809L
#endif

/* >>> declarations */
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
 * wants no or small code, that is what they are, too. Those of elementary.h are as the caller asks.
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
#define PK__WITH(options)
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
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_STATUS_IMPLEMENTED)
#define PATHKERNEL_STATUS_IMPLEMENTED
/* >>> implementation */
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
/* <<< implementation */
#endif
