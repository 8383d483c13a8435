/* libFuzzer: any bytes as a .safetensors file are read or refused with a message; nothing leaks, and weights are
 * untouched unless all of them are there.
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Itests tests/fuzz_safetensors.c -lm */
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "pathkernel_under_test.h"
#ifndef PATHKERNEL_TEST_AMALGAM
#include "pathkernel/network.h"
#include "pathkernel/safetensors.h"
#endif
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition) \
    if (!(condition))      \
    abort()

enum { PARAMETERS = 5 };

/* A file of the right tensors with these bytes as the numbers, so that the fuzzer gets past the header too. */
static size_t with_header(const uint8_t *data, size_t size, char bytes[400])
{
    static const char header[] = "{\"0.weight\":{\"dtype\":\"F64\",\"shape\":[1,2],\"data_offsets\":[0,16]},"
                                 "\"0.bias\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[16,20]},"
                                 "\"2.weight\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[20,28]}}";
    memset(bytes, 0, 400);
    bytes[0] = (char)(sizeof header - 1);
    memcpy(bytes + 8, header, sizeof header - 1);
    size = size < 28 ? size : 28;
    if (size)
        memcpy(bytes + 8 + sizeof header - 1, data, size);
    return 8 + sizeof header - 1 + size;
}

#ifdef __cplusplus
extern "C"
#endif
    int
    LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pk_context context;
    pk_graph graph;
    pk_real weights[PARAMETERS], before[PARAMETERS];
    char made[400];
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    context.memory_limit = (size_t)1 << 26;
    REQUIRE(pk_network_parse(&context, "input 2; dense 1; tanh; dense 2 nobias", &graph) == PK_OK);
    REQUIRE(graph.parameters == PARAMETERS);
    memset(before, 0x5a, sizeof before);
    memcpy(weights, before, sizeof weights);
    int framed = size > 0 && data[0] == 0xfe;
    size_t length = framed ? with_header(data + 1, size - 1, made) : size;
    unsigned char *bytes = (unsigned char *)malloc(length ? length : 1); /* of its own size, for the sanitizer */
    REQUIRE(bytes);
    if (length)
        memcpy(bytes, framed ? (const void *)made : (const void *)data, length);
    pk_status status = pk__safetensors_parse(&context, "x", bytes, length, &graph, weights);
    free(bytes);
    if (status == PK_OK) {
        for (int i = 0; i < PARAMETERS; i++)
            REQUIRE(pk__finite((double)weights[i]));
    } else {
        REQUIRE(strncmp(context.message, "x: ", 3) == 0);
        for (const char *c = context.message; *c; c++)
            REQUIRE(*c >= ' ' && *c <= '~');
        REQUIRE(memcmp(weights, before, sizeof weights) == 0);
    }
    pk_graph_release(&context, &graph);
    REQUIRE(context.memory_used == 0);
    return 0;
}
