/* Fuzz target: any text is a network or is refused with a message; the canonical text of a network is the
 * same network; nothing leaks. */
#include "fuzz.h"

static int fuzz_network(const uint8_t *data, size_t size)
{
    pk_context context;
    pk_graph graph, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&again, 0, sizeof again);
    context.memory_limit = (size_t)1 << 26;
    char *text = (char *)malloc(size + 1);
    FUZZ_REQUIRE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    pk_status status = pk_network_parse(&context, text, &graph);
    free(text);
    if (status == PK_OK) {
        FUZZ_REQUIRE(graph.parameters > 0 && graph.node_count > 1);
        FUZZ_REQUIRE(pk_network_parse(&context, graph.text, &again) == PK_OK);
        FUZZ_REQUIRE(strcmp(graph.text, again.text) == 0);
        FUZZ_REQUIRE(graph.parameters == again.parameters && graph.node_count == again.node_count);
        FUZZ_REQUIRE(graph.output_width == again.output_width && graph.input_width == again.input_width);
    } else {
        FUZZ_REQUIRE(context.message[0] && !graph.nodes && !graph.text);
    }
    pk_graph_release(&context, &graph);
    pk_graph_release(&context, &again);
    FUZZ_REQUIRE(context.memory_used == 0);
    return 0;
}
