/* libFuzzer: any text is a network or is refused with a message; the canonical text of a network is the
 * same network; nothing leaks.
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Itests tests/fuzz_network.c -lm */
#define PATHKERNEL_IMPLEMENTATION
#define PATHKERNEL_STATIC
#include "pathkernel_under_test.h"
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition) \
    if (!(condition))      \
    abort()

#ifdef __cplusplus
extern "C"
#endif
    int
    LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pk_context context;
    pk_graph graph, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&again, 0, sizeof again);
    context.memory_limit = (size_t)1 << 26;
    char *text = (char *)malloc(size + 1);
    REQUIRE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    pk_status status = pk_network_parse(&context, text, &graph);
    free(text);
    if (status == PK_OK) {
        REQUIRE(graph.parameters > 0 && graph.node_count > 1);
        REQUIRE(pk_network_parse(&context, graph.text, &again) == PK_OK);
        REQUIRE(strcmp(graph.text, again.text) == 0);
        REQUIRE(graph.parameters == again.parameters && graph.node_count == again.node_count);
        REQUIRE(graph.output_width == again.output_width && graph.input_width == again.input_width);
    } else {
        REQUIRE(context.message[0] && !graph.nodes && !graph.text);
    }
    pk_graph_release(&context, &graph);
    pk_graph_release(&context, &again);
    REQUIRE(context.memory_used == 0);
    return 0;
}
