/* libFuzzer: any bytes as run.txt are parsed or refused with a message; nothing leaks.
 *   clang -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Itests tests/fuzz_manifest.c -lm */
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
    pk_graph graph;
    pk_loss loss = (pk_loss)0;
    size_t keep_every = 0;
    pk_optimizer optimizer, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    context.memory_limit = (size_t)1 << 26;
    char *text = (char *)malloc(size + 1); /* exactly as long as it says: a sanitizer sees a read past it */
    REQUIRE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    pk_status status = pk__manifest_parse(&context, text, size, NULL, &graph, &loss, &optimizer, &keep_every);
    free(text);
    if (status == PK_OK) {
        char line[256];
        REQUIRE(graph.parameters > 0 && graph.text && loss && keep_every);
        REQUIRE(pk_optimizer_format(&optimizer, line, sizeof line) == PK_OK);
        REQUIRE(pk_optimizer_parse(&context, line, &again) == PK_OK);
    } else {
        REQUIRE(strncmp(context.message, "run.txt line ", 13) == 0);
        REQUIRE(!graph.nodes && !graph.text);
    }
    pk_graph_release(&context, &graph);
    REQUIRE(context.memory_used == 0);
    return 0;
}
