/* pathkernel/base/random.h: counter-based random numbers and shuffles.
 *
 * Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
 * A number is a function of (seed, stream, counter) alone, so that any point of any sequence can be reached
 * at once, by any thread, and a run can be resumed without stored state.
 */
#ifndef PATHKERNEL_RANDOM_H
#define PATHKERNEL_RANDOM_H
#include "context.h"

/* >>> declarations */
PK__BEGIN_C

/* A position in a sequence of 2^64 numbers; sequences with different seeds or streams are independent. Zeroed is
 * valid. Every number drawn increments the counter (pk_random_below rarely by more than one). */
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
/* <<< declarations */
#endif

#if defined(PATHKERNEL_IMPLEMENTATION) && !defined(PATHKERNEL_RANDOM_IMPLEMENTED)
#define PATHKERNEL_RANDOM_IMPLEMENTED
/* >>> implementation */
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

/* The 128 bits at the counter, which is incremented. */
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
/* <<< implementation */
#endif
