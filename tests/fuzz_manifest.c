/* Fuzz target: any bytes as run.txt are parsed or refused with a message; nothing leaks. */
#include "fuzz.h"

static int fuzz_manifest(const uint8_t *data, size_t size)
{
    pk_context context;
    pk_graph graph;
    pk_criterion criterion, same;
    size_t keep_every = 0;
    pk_optimizer optimizer, again;
    memset(&context, 0, sizeof context);
    memset(&graph, 0, sizeof graph);
    memset(&criterion, 0, sizeof criterion);
    context.memory_limit = (size_t)1 << 26;
    pk_parameter_groups groups = {0};
    char *text = (char *)malloc(size + 1); /* exactly as long as it says: a sanitizer sees a read past it */
    FUZZ_REQUIRE(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    pk_status status =
        pk__manifest_parse(&context, text, size, NULL, &graph, &criterion, &optimizer, &groups, &keep_every);
    free(text);
    if (status == PK_OK) {
        char line[256];
        FUZZ_REQUIRE(graph.parameters > 0 && graph.text && criterion.loss && keep_every);
        FUZZ_REQUIRE(pk_optimizer_format(&optimizer, line, sizeof line) == PK_OK);
        FUZZ_REQUIRE(pk_optimizer_parse(&context, line, &again) == PK_OK);
        const size_t room = pk_criterion_format(&criterion, NULL, 0);
        char *loss = (char *)malloc(2 * room);
        FUZZ_REQUIRE(room && loss && pk_criterion_format(&criterion, loss, room) == room);
        FUZZ_REQUIRE(pk_criterion_parse(&context, loss, &same) == PK_OK);
        FUZZ_REQUIRE(pk_criterion_format(&same, loss + room, room) == room && strcmp(loss, loss + room) == 0);
        pk_criterion_release(&context, &same);
        free(loss);
    } else {
        FUZZ_REQUIRE(strncmp(context.message, "run.txt line ", 13) == 0);
        FUZZ_REQUIRE(!graph.nodes && !graph.text && !criterion.memory);
    }
    pk_parameter_groups_release(&context, &groups);
    pk_criterion_release(&context, &criterion);
    pk_graph_release(&context, &graph);
    FUZZ_REQUIRE(context.memory_used == 0);
    return 0;
}
