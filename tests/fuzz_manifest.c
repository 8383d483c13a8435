/* Fuzz target: any bytes as run.txt are parsed or refused with a message; nothing leaks. */
#include "fuzz.h"

static int fuzz_manifest(const uint8_t *data, size_t size)
{
    pk_context context;
    pk_graph graph;
    pk_loss loss = (pk_loss)0;
    size_t keep_every = 0;
    pk_optimizer optimizer, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    context.memory_limit = (size_t)1 << 26;
    pk_parameter_groups groups = {0};
    char *text = (char *)malloc(size + 1); /* exactly as long as it says: a sanitizer sees a read past it */
    FUZZ_REQUIRE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    pk_status status =
        pk__manifest_parse(&context, text, size, NULL, &graph, &loss, &optimizer, &groups, &keep_every);
    free(text);
    if (status == PK_OK) {
        char line[256];
        FUZZ_REQUIRE(graph.parameters > 0 && graph.text && loss && keep_every);
        FUZZ_REQUIRE(pk_optimizer_format(&optimizer, line, sizeof line) == PK_OK);
        FUZZ_REQUIRE(pk_optimizer_parse(&context, line, &again) == PK_OK);
    } else {
        FUZZ_REQUIRE(strncmp(context.message, "run.txt line ", 13) == 0);
        FUZZ_REQUIRE(!graph.nodes && !graph.text);
    }
    pk_parameter_groups_release(&context, &groups);
    pk_graph_release(&context, &graph);
    FUZZ_REQUIRE(context.memory_used == 0);
    return 0;
}
